"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each {cite}`lake2015human`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mtlib.data.download import Remote, cache, contents, digest_of, fetch
from mtlib.data.parsing import content, parsing
from mtlib.run import checkpoint
from mtlib.tasks import ClassSet, check_classes

_LAKE = "https://raw.githubusercontent.com/brendenlake/omniglot/057f034baf2ecb8530bc5710e5a23584d2a519cc/python"
_SNELL = (
    "https://raw.githubusercontent.com/jakesnell/prototypical-networks/"
    "8fdc675e33f630999fe39c1465647a859ad69621/data/omniglot/splits/vinyals"
)

IMAGES = {
    "background": Remote(
        "omniglot/images_background.zip",
        f"{_LAKE}/images_background.zip",
        (
            "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            "12f28f39d6d0baaa9b94998e145067e51cc8bdac385d5b3c8994ade9a99f11a2",
        ),
        ("images_background.repacked.zip",),
        size=9_464_212,
    ),
    "evaluation": Remote(
        "omniglot/images_evaluation.zip",
        f"{_LAKE}/images_evaluation.zip",
        (
            "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            "7fd4f63de21cc4a4e0abb7d2f4b8d5491637b42651c1817c538392ae00186206",
        ),
        ("images_evaluation.repacked.zip",),
        size=6_462_886,
    ),
}
"""Lake's two archives; the second digest of each is for the same images, zipped again."""

CONTENT = {
    "background": "7c563fb7d98dbd312c5e0ccb87230ca9d7e8a13d672e5de6186245e7905ed43e",
    "evaluation": "e5a69b751aa33f555bdc92febd48220b69a811b2ff01de32bf4d1bca47bd1809",
}
"""`content_digest` of each archive, however it was zipped."""

SPLITS = {
    "train": Remote(
        "omniglot/splits_vinyals/train.txt",
        f"{_SNELL}/train.txt",
        ("984522c194c30fb678ce53304a160a42faf5403ad4f9a67010f32dd3a35738e0",),
        size=133_244,
    ),
    "val": Remote(
        "omniglot/splits_vinyals/val.txt",
        f"{_SNELL}/val.txt",
        ("11f99e54faee3e26f53d3231c1cceac5bf7b8730e9be31cb6dab256551dc0c1a",),
        size=21_312,
    ),
    "test": Remote(
        "omniglot/splits_vinyals/test.txt",
        f"{_SNELL}/test.txt",
        ("845264cc5c156180828ccf17915668b17ee21424d0170df6e7d81676aa5d1204",),
        size=50_372,
    ),
}

PARTS = {
    "lake": ("background", "train", "val", "test"),
    "vinyals": ("train", "val", "test"),
}

ROTATIONS = (0, 90, 180, 270)


def omniglot(
    split: str = "lake", part: str = "train", rotations: bool = False, size: int = 28
) -> ClassSet:
    """One part of Omniglot: items (C, 20, 1, size, size), ink 1 on paper 0.

    split "lake": "background" is Lake's 964 characters, "test" his 659 evaluation characters; "val" are the
    background's alphabets number 0, 6, 12, 18, 24 in alphabetical order, whole, and "train" the others.
    split "vinyals": 1028 "train", 172 "val", 423 "test" characters {cite}`vinyals2016matching`. It mixes Lake's two
    halves, so parameters trained under one split must never be tested on the other.

    `rotations` makes four classes of each character, turned by 0, 90, 180, 270 degrees. The 105×105 drawings are
    reduced to `size` by area averaging, PIL's BOX (papers differ in this, and in what they rotate).
    Raises ValueError for an unknown split, part or size, and what `fetch` raises.
    """
    if split not in PARTS or part not in PARTS[split]:
        raise ValueError(f"expected a split and part of {PARTS}, got {split!r} and {part!r}")
    if not isinstance(size, int) or not 1 <= size <= 105:
        raise ValueError(f"expected a size of 1 to 105 pixels, a whole number, got {size!r}")
    halves = ("background",) if split == "lake" and part != "test" else ("background", "evaluation")
    halves = ("evaluation",) if (split, part) == ("lake", "test") else halves
    drawn = {k: v for half in halves for k, v in _drawings(half, size).items()}
    names = sorted(_chosen(split, part, drawn))
    items = torch.from_numpy(np.stack([drawn[k] for k in names])).float().div_(255)[:, :, None]
    source = f"Omniglot, {split} split, {part} characters (real)"
    data = ClassSet(items, names, source)
    return turned(data) if rotations else data


def turned(data: ClassSet) -> ClassSet:
    """Each class four times, its images turned by 0, 90, 180 and 270 degrees."""
    check_classes(data)
    shape = tuple(getattr(data.items, "shape", ()))
    if len(shape) != 5 or shape[-1] != shape[-2]:
        raise ValueError(
            f"expected square images (C, n, channels, size, size), got {shape or type(data.items).__name__}"
        )
    items = torch.stack([torch.rot90(data.items, k, (-2, -1)) for k in range(4)], 1).flatten(0, 1)
    names = [f"{name}/rot{degrees:03d}" for name in data.names for degrees in ROTATIONS]
    return ClassSet(items, names, f"{data.source}, four rotations as classes")


def _chosen(split: str, part: str, drawn: dict[str, np.ndarray]) -> set[str]:
    if split == "vinyals":
        path = fetch(SPLITS[part])
        chosen = read_split(path)
        if not chosen <= drawn.keys():
            raise ValueError(
                f"{path} names {min(chosen - drawn.keys())!r}, which is not in Omniglot"
            )
        return chosen
    if part in ("background", "test"):
        return set(drawn)
    held = sorted({name.split("/")[0] for name in drawn})[::6]
    return {name for name in drawn if (name.split("/")[0] in held) == (part == "val")}


def read_split(path: Path) -> set[str]:
    """The characters of a list with lines `alphabet/character/rotation`. Raises ValueError for another form."""
    with parsing(path, "a list of Omniglot's characters"):
        lines = content(path).decode("utf8").split()
        wrong = next((line for line in lines if not _ROTATED.fullmatch(line)), None)
        if wrong is not None or not lines or len(set(lines)) < len(lines):
            raise ValueError(
                f"expected lines such as Greek/character01/rot090, each once, got {wrong or len(lines)}"
            )
    return {line.rsplit("/", 1)[0] for line in lines}


_ROTATED = re.compile(r"[^/]+/character[0-9]{2}/rot(000|090|180|270)")
_DRAWING = re.compile(r"[^/]+/([^/]+/character[0-9]{2})/[0-9]{4}_[0-9]{2}\.png")


def content_digest(path: Path) -> str:
    """`digest_of` the members, sorted by path."""
    return digest_of(contents(path))


def _drawings(half: str, size: int) -> dict[str, np.ndarray]:
    """Character -> (20, size, size) of uint8, ink 255; decoded once and kept in the cache."""
    path = fetch(IMAGES[half])
    kept = cache() / "omniglot" / f"{half}-{size}-{CONTENT[half][:8]}.safetensors"
    drawn = _kept(kept, size)
    if drawn is None:
        drawn = _decode(path, size)
        _keep(kept, drawn)
    return drawn


def _decode(path: Path, size: int) -> dict[str, np.ndarray]:
    drawn: dict[str, list[np.ndarray]] = {}
    with parsing(path, "an archive of Omniglot"):
        for name, data in contents(path, ".png"):
            found = _DRAWING.fullmatch(name)
            if found is None:
                raise ValueError(
                    f"expected members such as images/Greek/character01/0001_01.png, got {name!r}"
                )
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.size != (105, 105):  # known before anything is decoded
                    raise ValueError(f"expected {name} to have 105×105 pixels, got {image.size}")
                small = image.convert("L").resize((size, size), Image.Resampling.BOX)
            drawn.setdefault(found[1], []).append(255 - np.asarray(small))
        if not drawn or {len(v) for v in drawn.values()} != {20}:
            raise ValueError("expected twenty drawings of each character")
    return {k: np.stack(v) for k, v in drawn.items()}


def _kept(path: Path, size: int) -> dict[str, np.ndarray] | None:
    """What `_keep` wrote, or None if it is absent or damaged: its SHA-256 is in it."""
    try:
        held = checkpoint.read(path)
        names, items = held.facts["names"], held.tensors["items"].numpy()
    except Exception:
        return None
    whole = items.dtype == np.uint8 and items.shape == (len(names), 20, size, size)
    return dict(zip(names, items, strict=True)) if whole else None


def _keep(path: Path, drawn: dict[str, np.ndarray]) -> None:
    """Optional: if the cache cannot be written, the next call decodes again."""
    items = torch.from_numpy(np.stack(list(drawn.values())))
    with contextlib.suppress(OSError):
        checkpoint.write(path, checkpoint.Checkpoint({"items": items}, {"names": list(drawn)}))
