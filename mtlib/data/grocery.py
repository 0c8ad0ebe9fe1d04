"""Photographs of groceries {cite}`klasson2019hierarchical`: 74 classes, each from two folders of the authors."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtlib.core import Stream, over
from mtlib.data.crates import crates
from mtlib.data.download import (
    Remote,
    Unreachable,
    cache,
    check_content,
    contents,
    fetch,
    in_data_folder,
)
from mtlib.data.parsing import content, parsing
from mtlib.run import checkpoint
from mtlib.run.progress import bar
from mtlib.tasks import ClassSet, episodes, functions, positive

_COMMIT = "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc"
_FOLDER = f"https://raw.githubusercontent.com/marcusklasson/GroceryStoreDataset/{_COMMIT}/dataset"
CONTENT = "be5adb9c200687694f2f306dd62b4cd10d6b64e48dce86e563351760e95ba049"
"""`digest_of` the archive's photographs, sorted by path, however they were zipped."""

PARTS = ("train", "val", "test")
FOLDERS = ("train", "test")
SIZE, SOURCE = 128, 348  # pixels a side: here, and in the authors' files
STAND_IN = {"train": (0, 37), "val": (37, 14), "test": (51, 23)}
"""Which of the drawn classes stand in for a part: the first, and how many."""


def check(path: Path) -> None:
    """Raises ValueError unless the archive at `path` holds exactly the photographs of this data set."""
    check_content(contents(path, ".jpg"), CONTENT)


ARCHIVE = Remote(
    "grocery/grocery.zip",
    f"{_FOLDER}/",
    ("17b2ced43c293c93d271ce11f8975ff9f5fa42e35f887a1393001dadfe37da5e",),
    size=2**25,
    check=check,
)
"""All photographs at 128 × 128, which is only read from the folder MTLIB_DATA: it cannot be downloaded."""


class Group(NamedTuple):
    """The photographs of one class in one folder."""

    part: str  # "train", "val" or "test": all classes of one coarse class are in one part
    kind: str  # "fruit", "vegetables" or "cartons"
    coarse: str
    name: str
    folder: str  # of the authors: "train" or "test"
    place: str  # below their `dataset/`
    files: dict[str, str]  # number -> SHA-256 of the authors' file


class Folders(NamedTuple):
    """One part of the data, as the authors' two folders hold it: the same classes, other photographs.

    Photographs of one folder often show one crate seconds apart. A task whose queries lie in the folder of its support
    set asks for near-duplicates; `draw` never does.
    """

    support: ClassSet
    query: ClassSet

    def draw(self, **how: object) -> Stream:
        """`episodes(...)` with support sets from the one folder and queries from the other."""
        return episodes(self.support, queries_from=self.query, **how)  # type: ignore[arg-type]

    def numbered(self) -> Folders:
        """The same with each item replaced by the number of its class, (C, n, 1): a stream's twin, which tells who is who."""
        return Folders(
            *(
                d._replace(
                    items=torch.arange(len(d.names))
                    .view(-1, 1, 1)
                    .expand(-1, d.items.shape[1], 1)
                    .float()
                )
                for d in self
            )
        )

    def mixed(self) -> ClassSet:
        """All photographs of each class in one set, 36 of the real ones: the trap."""
        both = torch.cat([self.support.items, self.query.items], 1)
        return self.support._replace(
            items=both, source=f"{self.support.source}, both folders mixed"
        )

    def map(self, f: Callable[[Tensor], Any]) -> Folders:
        """The same classes with `f(items)` in the place of their items: (N, 3, h, w) of uint8 -> (N, *item), or a nest of such."""
        functions(1, f=f)

        def mapped(data: ClassSet) -> ClassSet:
            classes, n = data.items.shape[:2]

            def row(d: Tensor) -> Tensor:
                if len(d) != classes * n:
                    raise ValueError(f"expected f to give {classes * n} rows, got {tuple(d.shape)}")
                parted: Tensor = d.unflatten(0, (classes, n))
                return parted

            return data._replace(items=over(row, f(data.items.flatten(0, 1))))

        return Folders(mapped(self.support), mapped(self.query))


def groceries(part: str = "train", size: int = SIZE) -> Folders:
    """One part: 37 classes of "train", 14 of "val", 23 of "test", each with 18 photographs a folder, uint8.

    Items are (C, 18, 3, size, size); names are "fruit/Melon/Cantaloupe", kind, coarse class and class, and all classes of
    a coarse class are in one part. Photographs have 128 × 128 pixels; another `size` is made of these (Lanczos).

    Reads the archive if the folder MTLIB_DATA has it, otherwise fetches 2,664 files of the authors' repository, 60 MB, each
    held to its SHA-256, and keeps them at 128 × 128. Without file and network it is `crates`, drawn pictures of as many
    classes. `source` ends in "(real)" or "(stand-in)". Raises ValueError for an unknown part or size, and what `fetch`
    raises: a file that is there but altered is an error.
    """
    if part not in PARTS:
        raise ValueError(f"expected a part of {PARTS}, got {part!r}")
    positive(size=size)
    try:
        files = _files()
    except Unreachable:
        first, classes = STAND_IN[part]
        drawn = [crates(classes, size=size, first=first, visit=v) for v in range(2)]
        return Folders(
            *(
                d._replace(source=f"{d.source}, {part} classes, {f} folder (stand-in)")
                for d, f in zip(drawn, FOLDERS, strict=True)
            )
        )
    return Folders(*(_folder(files, part, folder, size) for folder in FOLDERS))


def _folder(files: dict[str, bytes], part: str, folder: str, size: int) -> ClassSet:
    chosen = [g for g in groups() if g.part == part and g.folder == folder]
    items = [[_decoded(files[p], p, size) for p in paths(g)] for g in chosen]
    pixels = torch.from_numpy(np.array(items)).permute(0, 1, 4, 2, 3).contiguous()
    names = [f"{g.kind}/{g.coarse}/{g.name}" for g in chosen]
    return ClassSet(pixels, names, f"groceries, {part} classes, {folder} folder (real)")


def _decoded(data: bytes, path: str, size: int) -> np.ndarray:
    with (
        parsing(path, "a photograph of groceries"),
        Image.open(io.BytesIO(data), formats=["JPEG"]) as image,
    ):
        if image.size != (SIZE, SIZE):  # known before anything is decoded
            raise ValueError(f"expected {SIZE}×{SIZE} pixels, got {image.size}")
        colours = image.convert("RGB")
        if size != SIZE:
            colours = colours.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(colours)


def paths(group: Group) -> list[str]:
    """Of its photographs, in the archive."""
    return [f"{group.name}/{group.folder}_{number}.jpg" for number in group.files]


@once
def groups() -> tuple[Group, ...]:
    """All 148, as the package's list of the authors' files has them, sorted by part, kind, coarse class, class and folder."""
    found: list[Group] = []
    text = content(Path(__file__).with_suffix(".txt")).decode("ascii")
    for words in (line.split() for line in text.splitlines() if line[:1] != "#"):
        if len(words) == 2:
            found[-1].files[words[0]] = words[1]
        else:
            part, kind, coarse, name, folder, place = words
            found.append(Group(part, kind, coarse, name, folder, place, {}))
    return tuple(found)


def sources(group: Group) -> list[Remote]:
    """The authors' files of a group, pinned."""
    return [
        Remote(f"grocery/{place}", f"{_FOLDER}/{place}", (digest,), size=2**18)
        for number, digest in group.files.items()
        for place in (f"{group.place}/{group.name}_{number}.jpg",)
    ]


# Where they come from --------------------------------------------------------------------------


def _files() -> dict[str, bytes]:
    """Path in the archive -> JPEG of 128 × 128 pixels."""
    if in_data_folder(ARCHIVE):
        return dict(contents(fetch(ARCHIVE), ".jpg"))
    kept = cache() / "grocery" / f"{SIZE}-{CONTENT[:8]}.safetensors"
    files = _kept(kept)
    if files is None:
        files = _downloaded()
        _keep(kept, files)
    return files


def _downloaded() -> dict[str, bytes]:
    """The same from the authors' files, each fetched and verified."""
    wanted = [pair for g in groups() for pair in zip(paths(g), sources(g), strict=True)]
    fetch(wanted[0][1])  # whether there is a way to them, before many ask at once
    with (
        ThreadPoolExecutor(8) as threads,
        bar(len(wanted), "photographs", sys.stderr.isatty()) as shown,
    ):

        def one(pair: tuple[str, Remote]) -> tuple[str, bytes]:
            small = reduced(fetch(pair[1]))
            shown.update()
            return pair[0], small

        return dict(_until_error(threads, one, wanted))


def _until_error(
    threads: ThreadPoolExecutor,
    one: Callable[[tuple[str, Remote]], tuple[str, bytes]],
    wanted: list[tuple[str, Remote]],
) -> Iterator[tuple[str, bytes]]:
    """What `threads.map` gives; after an error no further file is asked for."""
    try:
        yield from threads.map(one, wanted)
    except BaseException:
        threads.shutdown(cancel_futures=True)
        raise


def reduced(path: Path) -> bytes:
    """A photograph of 348 × 348 pixels as a JPEG of 128 × 128 (Lanczos, quality 85). Raises ValueError for another."""
    with (
        parsing(path, "a photograph of groceries, a JPEG as expected"),
        Image.open(path, formats=["JPEG"]) as image,
    ):
        if image.size != (SOURCE, SOURCE):
            raise ValueError(f"expected {SOURCE}×{SOURCE} pixels, got {image.size}")
        small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=85)
    return file.getvalue()


def _kept(path: Path) -> dict[str, bytes] | None:
    """What `_keep` wrote, or None if it is absent, damaged or of other files: its SHA-256 is in it."""
    try:
        held = checkpoint.read(path)
        names, sizes = held.facts["names"], held.facts["sizes"]
        data = held.tensors["bytes"].numpy().tobytes()
    except Exception:
        return None
    if sorted(names) != sorted(p for g in groups() for p in paths(g)) or sum(sizes) != len(data):
        return None
    ends = np.cumsum(sizes).tolist()
    return {n: data[e - s : e] for n, s, e in zip(names, sizes, ends, strict=True)}


def _keep(path: Path, files: dict[str, bytes]) -> None:
    """Optional: if the cache cannot be written, the next call makes them again."""
    data = torch.from_numpy(np.frombuffer(b"".join(files.values()), np.uint8).copy())
    facts = {"names": list(files), "sizes": [len(v) for v in files.values()]}
    with contextlib.suppress(OSError):
        checkpoint.write(path, checkpoint.Checkpoint({"bytes": data}, facts))
