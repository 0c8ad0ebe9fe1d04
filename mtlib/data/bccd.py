"""BCCD: 364 photographs of blood smears with boxes of red cells, white cells and platelets."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pooch
import requests
import torch
from PIL import Image
from torch import Tensor

from mtlib.data.download import (
    Altered,
    Remote,
    Unreachable,
    cache,
    contents,
    digest_of,
    fetch,
    offline,
)
from mtlib.data.scenes import Photographs, scenes

_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
ARCHIVE = Remote(
    "bccd/bccd.zip",
    f"https://github.com/Shenggan/BCCD_Dataset/archive/{_COMMIT}.zip",
    ("f5d1119835d0a479b209290861aab45a307acfb94377fe40303f2741fa2e1eb8",),
)
"""The photographs and annotations of one commit. The server zips them anew for each request, so this digest is
of our own zip file, and a download is checked against `CONTENT` instead."""

CONTENT = "3e8c757e7046d96547ca7956d5ad5b4d108e6e47a73934de0ebcaec04158a800"
"""`content_digest` of the archive, however it was zipped."""

CLASSES = ["RBC", "WBC", "Platelets"]
PARTS = ("train", "val", "test")
WIDTH, HEIGHT = 640, 480


def blood_cells(part: str = "train", size: tuple[int, int] = (320, 240)) -> Photographs:
    """`bccd(part, size)`, or, if it cannot be downloaded, drawn scenes of three glyphs, the same three in every part.

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

    Images are reduced from 640×480 to `size` (width, height) by area averaging, and the boxes with them. The two
    boxes without area, in BloodImage_00338 and BloodImage_00343, are dropped. Raises ValueError for an unknown part
    or size, `Altered` if the content differs, and what `fetch` raises.
    """
    _check(part, size)
    files = _files(_archive())
    names = files[f"BCCD/ImageSets/Main/{part}.txt"].decode().split()
    scale = torch.tensor([size[0] / WIDTH, size[1] / HEIGHT] * 2)
    images, boxes, labels = [], [], []
    for name in names:
        image = Image.open(io.BytesIO(files[f"BCCD/JPEGImages/{name}.jpg"])).convert("RGB")
        images.append(np.asarray(image.resize(size, Image.Resampling.BOX)))
        corners, classes = annotation(files[f"BCCD/Annotations/{name}.xml"])
        area = (corners[:, 2:] > corners[:, :2]).all(1)
        boxes.append(corners[area] * scale)
        labels.append(classes[area])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Photographs(
        pixels, boxes, labels, names, list(CLASSES), f"BCCD blood cells, {part} (real)"
    )


def annotation(xml: bytes) -> tuple[Tensor, Tensor]:
    """Boxes (K, 4) in pixels of the full photograph and class numbers (K,), as given in the file."""
    objects = ElementTree.fromstring(xml).findall("object")
    corners = [
        [float(o.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        for o in objects
    ]
    labels = [CLASSES.index(o.findtext("name", "")) for o in objects]
    return torch.tensor(corners).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)


def content_digest(path: Path) -> str:
    """`digest_of` the members below BCCD/, sorted by path."""
    return digest_of(sorted(_files(path).items()))


def _files(path: Path) -> dict[str, bytes]:
    """Path from BCCD/ on -> bytes; only photographs, annotations and lists."""
    wanted = tuple(f"BCCD/{folder}/" for folder in ("Annotations", "ImageSets", "JPEGImages"))
    found = {}
    for name, data in contents(path):
        inner = name[max(name.find("BCCD/"), 0) :]
        if inner.startswith(wanted):
            found[inner] = data
    return found


def _archive() -> Path:
    """The archive: our own zip file if `fetch` finds it, otherwise a download whose members are verified."""
    kept = cache() / "bccd" / "archive.zip"
    try:
        return fetch(ARCHIVE, local=True)
    except Unreachable:
        if not kept.exists():
            _download(kept)
    return _verified(kept)


def _download(target: Path, timeout: float = 10.0) -> None:
    """The commit's archive into the cache, whole or not at all."""
    part = target.with_suffix(".part")
    if offline():
        raise Unreachable(
            f"{ARCHIVE.name} is not on this machine and MTLIB_OFFLINE=1 is set; put it into the folder MTLIB_DATA"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        pooch.HTTPDownloader(timeout=timeout)(ARCHIVE.url, str(part), None)
        _verified(part).replace(target)
    except requests.exceptions.ChunkedEncodingError as error:
        raise Altered(f"the download of {ARCHIVE.url} broke off ({error}); try again") from error
    except requests.exceptions.RequestException as error:
        raise Unreachable(f"{ARCHIVE.url} cannot be reached: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _verified(path: Path) -> Path:
    try:
        digest = content_digest(path)
    except ValueError as error:
        raise Altered(str(error)) from error
    if digest != CONTENT:
        raise Altered(
            f"{path} does not hold BCCD's files: content digest {digest}, expected {CONTENT}. "
            f"It is truncated or altered; delete it and download it again from {ARCHIVE.url}"
        )
    return path


def _check(part: str, size: tuple[int, int]) -> None:
    if part not in PARTS:
        raise ValueError(f"expected a part of {PARTS}, got {part!r}")
    if not (40 <= size[0] <= WIDTH and 40 <= size[1] <= HEIGHT):
        raise ValueError(f"expected a size (width, height) from 40 to {WIDTH}×{HEIGHT}, got {size}")
