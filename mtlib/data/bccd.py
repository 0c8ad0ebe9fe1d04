"""BCCD: 364 photographs of blood smears with boxes of red cells, white cells and platelets."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtlib.data.download import Remote, Unreachable, check_content, contents, digest_of, fetch
from mtlib.data.parsing import number, parsing
from mtlib.data.scenes import Photographs, scenes

_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
CONTENT = "3e8c757e7046d96547ca7956d5ad5b4d108e6e47a73934de0ebcaec04158a800"
"""`content_digest` of the archive, however it was zipped."""


def content_digest(path: Path) -> str:
    """`digest_of` the members below BCCD/, sorted by path. Raises ValueError for what is no such archive."""
    return digest_of(sorted(_files(path).items()))


def check(path: Path) -> None:
    """Raises ValueError unless the archive at `path` holds exactly the photographs, annotations and lists of BCCD."""
    check_content(sorted(_files(path).items()), CONTENT)


ARCHIVE = Remote(
    "bccd/bccd.zip",
    f"https://github.com/Shenggan/BCCD_Dataset/archive/{_COMMIT}.zip",
    ("f5d1119835d0a479b209290861aab45a307acfb94377fe40303f2741fa2e1eb8",),
    size=2**24,
    check=check,
)
"""The photographs and annotations of one commit. The server zips them anew for each request, so this digest is
of our own zip file, and a download is held to `CONTENT` instead."""

CLASSES = ["RBC", "WBC", "Platelets"]
PARTS = ("train", "val", "test")
WIDTH, HEIGHT = 640, 480


def blood_cells(part: str = "train", size: tuple[int, int] = (320, 240)) -> Photographs:
    """`bccd(part, size)`, or, without file and network, drawn scenes of three glyphs, the same three in every part.

    `source` ends in "(real)" or "(stand-in)". A file that is there but altered is an error.
    """
    _check(part, size)
    try:
        return bccd(part, size)
    except Unreachable:
        first, last = {"train": (0, 40), "val": (40, 56), "test": (56, 72)}[part]
        width, height = size
        drawn = scenes(72, len(CLASSES), height=height, width=width, seed=1)
        return drawn.select(list(range(first, last)))


def bccd(part: str = "train", size: tuple[int, int] = (320, 240)) -> Photographs:
    """One part of BCCD, as its own lists divide it: 205 photographs of "train", 87 of "val", 72 of "test".

    Raises ValueError for an unknown part or size, and what `fetch` raises.
    """
    _check(part, size)
    return read(fetch(ARCHIVE), part, size)


def read(path: Path, part: str = "train", size: tuple[int, int] = (320, 240)) -> Photographs:
    """One part of an archive in BCCD's form.

    Images are reduced from 640×480 to `size` (width, height) by area averaging, and the boxes with them. The two
    boxes without area, in BloodImage_00338 and BloodImage_00343, are dropped. Raises ValueError for an archive that
    is damaged or of another kind: a photograph of another size, a box that is not in it, a class that is not BCCD's.
    """
    _check(part, size)
    with parsing(path, "an archive of BCCD"):
        files = _files(path)
        names = files[f"BCCD/ImageSets/Main/{part}.txt"].decode().split()
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected each photograph of {part!r} once, got {len(names)} names")
        scale = torch.tensor([size[0] / WIDTH, size[1] / HEIGHT] * 2)
        images, boxes, labels = [], [], []
        for name in names:
            images.append(_photograph(files[f"BCCD/JPEGImages/{name}.jpg"], name, size))
            corners, classes = annotation(files[f"BCCD/Annotations/{name}.xml"])
            area = (corners[:, 2:] > corners[:, :2]).all(1)
            boxes.append(corners[area] * scale)
            labels.append(classes[area])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Photographs(
        pixels, boxes, labels, names, list(CLASSES), f"BCCD blood cells, {part} (real)"
    )


def _photograph(data: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        if image.size != (WIDTH, HEIGHT):  # known before anything is decoded
            raise ValueError(f"expected {name} to have {WIDTH}×{HEIGHT} pixels, got {image.size}")
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))


def annotation(xml: bytes) -> tuple[Tensor, Tensor]:
    """Boxes (K, 4) in pixels of the full photograph and class numbers (K,), as given in the file.

    Raises ValueError for a class that is not BCCD's, and for a box that is turned around or leaves the photograph.
    """
    with parsing("an annotation", "in the form of BCCD"):
        text = xml.decode()
        if "<!" in text:
            raise ValueError("expected no declarations: they may grow without end")
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise ValueError(f"expected XML: {error}") from error
        corners, labels = [], []
        for found in root.findall("object"):
            name = found.findtext("name", "")
            if name not in CLASSES:
                raise ValueError(f"expected a class of {CLASSES}, got {name!r}")
            x1, y1, x2, y2 = (
                number(found.findtext(f"bndbox/{side}", ""), 0, most, side)
                for side, most in zip(
                    ("xmin", "ymin", "xmax", "ymax"), (WIDTH, HEIGHT) * 2, strict=True
                )
            )
            if x2 < x1 or y2 < y1:
                raise ValueError(f"expected xmin ≤ xmax and ymin ≤ ymax, got {(x1, y1, x2, y2)}")
            corners.append([x1, y1, x2, y2])
            labels.append(CLASSES.index(name))
    return torch.tensor(corners).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)


def _files(path: Path) -> dict[str, bytes]:
    """Path from BCCD/ on -> bytes; only photographs, annotations and lists."""
    wanted = tuple(f"BCCD/{folder}/" for folder in ("Annotations", "ImageSets", "JPEGImages"))
    found: dict[str, bytes] = {}
    for name, data in contents(path, "BCCD/"):
        inner = name[name.find("BCCD/") :]
        if inner.startswith(wanted):
            if inner in found:
                raise ValueError(f"{path} holds {inner} twice")
            found[inner] = data
    return found


def _check(part: str, size: tuple[int, int]) -> None:
    if part not in PARTS:
        raise ValueError(f"expected a part of {PARTS}, got {part!r}")
    pair = isinstance(size, tuple | list) and len(size) == 2
    if not (pair and all(isinstance(n, Integral) for n in size)):
        raise ValueError(
            f"expected a size (width, height), two whole numbers of pixels, got {size!r}"
        )
    if not (40 <= size[0] <= WIDTH and 40 <= size[1] <= HEIGHT):
        raise ValueError(f"expected a size (width, height) from 40 to {WIDTH}×{HEIGHT}, got {size}")
