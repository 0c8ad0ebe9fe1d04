"""Data of your own: images in folders, torch's data sets, tables with a task for each machine, hospital or user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from mtlib.core import Batch, Episode, Stream, over
from mtlib.data.parsing import parsing
from mtlib.run.progress import bar
from mtlib.tasks import (
    ClassSet,
    Rows,
    check_cast,
    check_seed,
    different,
    divided,
    finite,
    one_of,
    positive,
    together,
)

# Images ----------------------------------------------------------------------------------------


def image_folder(
    path: str | Path, size: int | tuple[int, int], channels: int = 3, lazy: bool = False
) -> ClassSet:
    """Images of any sizes in a folder with one folder for each class: items are bytes (n_c, channels, height, width).

    Names are those of the folders, sorted; a class's images are all files below its folder with an ending that Pillow
    reads, sorted by path; other files are left aside, and `source` counts
    them; what is hidden is not looked at. An image is turned as its EXIF
    orientation says, its transparent parts become white, and from its middle the largest cut of the proportions of
    `size` (height, width), or of a square, is brought to that size (bilinear, antialiased). `channels` are 3 for red,
    green and blue, or 1 for grey; 16 bits of grey become 8. `episodes(..., cast=torch.float32)` makes numbers from 0 to 1.

    All images are read at once, and take channels · height · width bytes each: 20,000 of 3 × 84 × 84 take 423 MB. With
    `lazy=True` an image is read each time that it is drawn, and only paths are held; `ahead` reads in other processes.

    Raises ValueError for files that are no readable images (all of them are named; with `lazy` a file that begins as an
    image is named when it is drawn), for a class without an image, and for no classes.
    """
    height, width = _size(size)
    if channels not in (1, 3) or isinstance(channels, bool):
        raise ValueError(f"expected 1 channel (grey) or 3 (red, green, blue), got {channels!r}")
    folder = _folder(path)
    endings = {k for k, v in Image.registered_extensions().items() if v in Image.OPEN}
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files, aside = [], 0
    for c in classes:
        every = [p for p in sorted(c.rglob("*")) if p.is_file() and not _hidden(p.relative_to(c))]
        files.append([p for p in every if p.suffix.lower() in endings])
        aside += len(every) - len(files[-1])
    if not classes:
        raise ValueError(f"expected a folder for each class in {folder}, found none")
    empty = [c.name for c, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise ValueError(f"expected an image in each folder of {folder}; none in {empty[:10]}")
    kinds = [_Images(tuple(map(str, found)), height, width, channels) for found in files]
    paths = [p for k in kinds for p in k.paths]
    with ThreadPoolExecutor() as threads:
        bad = [e for e in threads.map(_broken, paths) if e] if lazy else []
    items: Sequence[Any] = kinds
    if not lazy:
        held = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
        bad = _read_all(paths, held)
        items = held.split([len(k) for k in kinds])
    if bad:
        more = f" and {len(bad) - 10} more" if bad[10:] else ""
        raise ValueError(
            f"expected readable images; {len(bad)} of {len(paths)} files are not: "
            + "; ".join(bad[:10])
            + more
        )
    sizes = [len(k) for k in kinds]
    source = f"{folder.name}: {len(classes)} classes of {min(sizes)} to {max(sizes)} images"
    source += f", {aside} other files left aside" if aside else ""
    return ClassSet(list(items), [c.name for c in classes], source)


@dataclass(frozen=True)
class _Images(Rows):
    """The images of one class, read when they are drawn."""

    paths: tuple[str, ...]
    height: int
    width: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        shape = (self.channels, self.height, self.width)
        return torch.stack([read_image(self.paths[i], shape) for i in index.tolist()])


def read_image(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """One image as bytes of this shape (channels, height, width). Raises ValueError that names a file it cannot read."""
    channels, height, width = shape
    with parsing(path, "a readable image, as expected"), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        plain = _plain(upright, "L" if channels == 1 else "RGB")
        cut = ImageOps.fit(plain, (width, height), Image.Resampling.BILINEAR)
        array = np.array(cut)  # (H, W) or (H, W, 3), a copy that torch may write to
    return torch.from_numpy(array).view(height, width, channels).permute(2, 0, 1).contiguous()


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """An image of 8 bits a channel, without transparency."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", None)):
        numbers = np.array(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("expected 8 or 16 bits a channel, it has more")
        return Image.fromarray((numbers // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, it is of mode {image.mode}")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, seen)
    return image.convert(mode)


def _read_all(paths: list[str], held: Tensor) -> list[str]:
    """Read every image into its row; what is wrong with those that cannot be read."""

    def one(i: int) -> str:
        try:
            held[i] = read_image(paths[i], (held.shape[1], held.shape[2], held.shape[3]))
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as threads, bar(len(paths), "images") as shown:
        found = []
        for told in threads.map(one, range(len(paths))):
            found.append(told)
            shown.update()
    return [told for told in found if told]


def _broken(path: str) -> str:
    """What is wrong with a file's beginning, "" if it is an image's."""
    try:
        with parsing(path, "a readable image, as expected"), Image.open(path):
            return ""
    except ValueError as error:
        return str(error)


def _hidden(path: Path) -> bool:
    """Such as .DS_Store, or the copies in .ipynb_checkpoints."""
    return any(part.startswith(".") for part in path.parts)


def _size(size: object) -> tuple[int, int]:
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"expected a size as a number of pixels, or (height, width), got {size!r}")
    positive(height=pair[0], width=pair[1])
    return int(pair[0]), int(pair[1])


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | Path):
        raise TypeError(f"expected the path of a folder, got {type(path).__name__}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"expected a folder with one folder for each class, {folder} is none")
    return folder


# torch's data sets -----------------------------------------------------------------------------


def from_dataset(dataset: Dataset[Any], labels: Any = None) -> ClassSet:
    """The items of a torch data set, sorted by class; each is loaded only when it is drawn, and lies on the CPU.

    `dataset[i]` is a tensor, (tensor, label), or a dict of tensors with a label under `label` or `labels`, which is
    taken out of it. Numbers and numpy arrays in it become tensors. All items have one shape.

    `labels` are one for each item, whole numbers or words, in a list, an array or a tensor; or the name under which
    items that are dicts have theirs. None looks for `dataset.targets` or `dataset.labels`, also through `Subset` and
    `ConcatDataset`; where there are none, every item is loaded once to see its label, with a bar that says so. Names
    of classes are the words, or the numbers' own names in `dataset.classes`, where it has them.

    A draw must be the same each time: `fit` refuses a data set with random transforms. Raises TypeError for what is no
    map-style data set; ValueError for labels that do not fit, and at the draw for an item that cannot be used or whose
    own label is another than `dataset.targets` says.
    """
    if (
        isinstance(dataset, IterableDataset | torch.utils.data.DataLoader)
        or not hasattr(dataset, "__getitem__")
        or not hasattr(dataset, "__len__")
        or isinstance(dataset, ClassSet | Mapping | Tensor | str)
    ):
        raise TypeError(
            "expected a map-style data set of torch, with len(dataset) and dataset[i]; got "
            f"{type(dataset).__name__}"
            + (": give its `.dataset`" if hasattr(dataset, "dataset") else "")
        )
    n = len(dataset)
    if not n:
        raise ValueError("expected a data set with at least one item, got an empty one")
    key = labels if isinstance(labels, str) else None
    known = _known_labels(dataset) if labels is None else labels
    given = _in_one_pass(dataset, key) if known is None or key else _labels(known, n)
    names = _names(dataset)
    kinds = sorted(set(given), key=lambda v: (isinstance(v, str), v))
    if len({type(k) for k in kinds}) > 1:
        raise ValueError(
            f"expected labels that are all numbers or all words, got {kinds[:3]} … {kinds[-1]!r}"
        )
    if isinstance(kinds[0], int) and kinds[0] < 0:
        raise ValueError(
            f"expected labels from 0 on, got {given.count(kinds[0])} of {kinds[0]}. Leave items without a class out: "
            "torch.utils.data.Subset(dataset, indices)."
        )
    members: dict[int | str, list[int]] = {k: [] for k in kinds}
    for i, label in enumerate(given):
        members[label].append(i)
    items = [
        _Loaded(dataset, tuple(m), key, k if labels is None or key else None)
        for k, m in members.items()
    ]
    called = [names[k] if isinstance(k, int) and k < len(names) else str(k) for k in kinds]
    return ClassSet(items, called, f"{type(dataset).__name__} of {n} items")


@dataclass(frozen=True, eq=False)
class _Loaded(Rows):
    """The items of one class of a torch data set, loaded when they are drawn."""

    dataset: Any
    members: tuple[int, ...]
    key: str | None
    label: int | str | None  # what each item must say of itself, if it says something

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Tensor) -> Any:
        return together([self.one(self.members[j]) for j in index.tolist()])

    def one(self, i: int) -> Any:
        """Item i, with an axis before."""
        x, label = _parted(self.dataset[i], self.key, i)
        if self.label is not None and label is not None and _label(label, i) != self.label:
            raise ValueError(
                f"expected item {i} with the label {self.label!r} that the data set says, the item itself says {label!r}. "
                "Give labels= with one for each item."
            )
        x = _tensors(x, i)
        if isinstance(x, Tensor) and not x.ndim:
            raise ValueError(
                f"expected items with an axis at least, item {i} is one number: give x[None]"
            )

        def row(d: Tensor) -> Tensor:
            finite(d, f"item {i}")
            return d.detach().cpu()[None]

        return over(row, x)


def _parted(item: Any, key: str | None, i: int) -> tuple[Any, Any]:
    """What the network reads of an item, and its label or None."""
    if isinstance(item, Mapping):
        own = [k for k in ((key,) if key else ("label", "labels")) if k in item]
        if key and not own:
            raise ValueError(f"expected item {i} to have {key!r}, it has {list(item)[:9]}")
        x = {k: v for k, v in item.items() if k not in (*own, "label", "labels")}
        if not x:
            raise ValueError(f"expected more than a label in item {i}, it has {list(item)}")
        return x, item[own[0]] if own else None
    if key:
        raise ValueError(
            f"expected items that are dicts with {key!r}, item {i} is of {type(item).__name__}: give labels= as a list with "
            "one for each item"
        )
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise TypeError(
                f"expected item {i} to be a tensor, (tensor, label) or a dict, got {len(item)} parts"
            )
        return item[0], item[1]
    return item, None


def _tensors(x: Any, i: int) -> Any:
    """An item's numbers and arrays as tensors."""
    if isinstance(x, Mapping):
        return {k: _tensors(v, i) for k, v in x.items()}
    if isinstance(x, Tensor):
        return x
    try:
        if isinstance(x, np.ndarray | np.generic | int | float | list | tuple):
            return torch.as_tensor(x if not isinstance(x, np.ndarray) else x.copy())
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(
        f"expected tensors in item {i}, got {type(x).__name__}: give the data set a transform that makes a tensor of it"
    )


def _in_one_pass(dataset: Any, key: str | None) -> list[int | str]:
    """The label of every item, each loaded once."""
    found = []
    with bar(len(dataset), "labels: every item is loaded once") as shown:
        for i in range(len(dataset)):
            label = _parted(dataset[i], key, i)[1]
            if label is None:
                raise ValueError(
                    f"expected a label with each item, item {i} has none: give labels=, one for each item, or items "
                    "(tensor, label), or dicts with `label`"
                )
            found.append(_label(label, i))
            shown.update()
    return found


def _known_labels(dataset: Any) -> list[int | str] | None:
    """What a data set says of its labels without loading items; None if it says nothing."""
    if isinstance(dataset, Subset):
        below = _known_labels(dataset.dataset)
        return None if below is None else [below[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(d) for d in dataset.datasets]
        return None if None in parts else [label for p in parts if p is not None for label in p]
    for name in ("targets", "labels"):
        if (found := getattr(dataset, name, None)) is not None and not callable(found):
            return _labels(found, len(dataset))
    return None


def _labels(given: Any, n: int) -> list[int | str]:
    """Labels as whole numbers or words, one for each of n items."""
    found = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if isinstance(found, str) or not hasattr(found, "__iter__"):
        raise TypeError(
            f"expected labels in a list, an array or a tensor, got {type(given).__name__}"
        )
    plain = [_label(label, i) for i, label in enumerate(found)]
    if len(plain) != n:
        raise ValueError(f"expected a label for each of {n} items, got {len(plain)}")
    return plain


def _label(label: Any, i: int) -> int | str:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, str):
        return str(label)
    if isinstance(label, Integral):
        return int(label)
    said = (
        f"{type(label).__name__} of shape {tuple(label.shape)}"
        if hasattr(label, "shape")
        else repr(label)
    )
    raise ValueError(f"expected a whole number or a word as the label of item {i}, got {said}")


def _names(dataset: Any) -> list[str]:
    """The names of the numbers 0, 1, …, where a data set has them."""
    if isinstance(dataset, Subset):
        return _names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts = [_names(d) for d in dataset.datasets]
        if any(p != parts[0] for p in parts):
            raise ValueError(
                f"expected data sets of the same classes, got {[p[:3] for p in parts[:3]]}: give labels= as words"
            )
        return parts[0]
    found = getattr(dataset, "classes", None)
    if not isinstance(found, list | tuple) or len({str(c) for c in found}) < len(found):
        return []
    return [str(c) for c in found]


# Tables ----------------------------------------------------------------------------------------


def rows(
    table: Any,
    by: str,
    x: Sequence[str],
    y: str | Sequence[str],
    *,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    classes: Sequence[Any] | None = None,
    small: str = "refuse",
    dtype: torch.dtype | None = None,
) -> Stream:
    """A stream with a task for each value of the column `by`: each machine, hospital, user.

    Each draw takes `tasks` of the groups and from each `shots` support and `queries` query rows, all without
    replacement, so that large groups count no more than small ones. x: (T, rows, F) are the columns `x`, numbers as
    they are. y: (T, rows, W) are the targets in the columns `y`; with `classes`, the values that the one column `y` can
    have, one-hot rows in their order. Both are of torch's default dtype, or of `dtype`.

    `table` is a dict of columns, a structured array of numpy, or a DataFrame; a column is (n,) or (n, d). Train and
    test on different groups, which `split_rows` makes:

    ```pycon
    >>> table = {"machine": np.arange(60) % 6, "load": np.random.rand(60), "heat": np.random.rand(60)}
    >>> train, test = split_rows(table, by="machine", train=4, test=2)
    >>> stream = rows(train, "machine", ["load"], "heat", shots=3, queries=5, tasks=2, seed=0)
    >>> stream(0).support.x.shape, stream(0).query.y.shape, stream.names
    (torch.Size([2, 3, 1]), torch.Size([2, 5, 1]), [2, 3, 4, 5])

    ```

    Raises ValueError for groups with fewer than `shots` + `queries` rows, named (`small="leave out"` leaves them out),
    for more tasks than groups, for missing values and columns that are no numbers, and for y among x.
    """
    positive(shots=shots, queries=queries, tasks=tasks)
    check_seed(seed)
    check_cast(dtype)
    one_of(small=(small, ("refuse", "leave out")))
    inputs, outputs = ([c] if isinstance(c, str) else list(c) for c in (x, y))
    if not inputs or not outputs or set(inputs) & set(outputs):
        raise ValueError(f"expected columns x, and other columns y, got x={inputs} and y={outputs}")
    columns = _columns(table, [by, *inputs, *outputs])
    names, members = _groups(columns[by], by)
    need, sizes = shots + queries, np.array([len(m) for m in members])
    few = [f"{k!r} has {len(m)}" for k, m in zip(names, members, strict=True) if len(m) < need]
    if few and small == "refuse":
        more = ", …" if few[10:] else ""
        raise ValueError(
            f"expected at least shots + queries = {need} rows for each {by}; {len(few)} of {len(names)} have fewer: "
            f'{", ".join(few[:10])}{more}. small="leave out" leaves them out.'
        )
    keep = np.flatnonzero(sizes >= need)
    if tasks > len(keep):
        raise ValueError(
            f"expected at most {len(keep)} tasks in a draw, one for each {by} of at least {need} rows, got {tasks}"
        )
    dtype = dtype or torch.get_default_dtype()
    inside = np.isin(np.arange(len(columns[by])), np.concatenate([members[i] for i in keep]))
    target = _one_hot(columns, outputs, classes) if classes is not None else None
    return _ByGroup(
        _matrix(columns, inputs, inside, dtype),
        _matrix(columns, outputs, inside, dtype, targets=True)
        if target is None
        else target.to(dtype),
        [names[i] for i in keep],
        [members[i] for i in keep],
        shots,
        queries,
        tasks,
        seed,
    )


@dataclass(frozen=True, eq=False)
class _ByGroup:
    """What `rows` makes."""

    x: Tensor  # (N, F)
    y: Tensor  # (N, W)
    names: list[Any]  # of the groups that it draws from
    members: list[np.ndarray]  # and their rows
    shots: int
    queries: int
    tasks: int
    seed: int

    def __call__(self, step: int) -> Episode:
        return self.part(step, slice(None))

    def part(self, step: int, tasks: slice) -> Episode:
        rng = np.random.default_rng([self.seed, step])
        groups = different(rng, np.array([len(self.members)]), self.tasks)[0]
        sizes = np.array([len(self.members[g]) for g in groups])
        picked = different(rng, sizes, self.shots + self.queries)  # (T, K+Q)
        found = [self.members[g][p] for g, p in zip(groups, picked, strict=True)][tasks]
        drawn = torch.from_numpy(np.stack(found))
        parts = drawn[:, : self.shots], drawn[:, self.shots :]
        return Episode(*(Batch(self.x[r], self.y[r]) for r in parts))


def split_rows(
    table: Any, by: str, *, seed: int = 0, **parts: float
) -> tuple[dict[str, np.ndarray], ...]:
    """Tables of different groups, as dicts of columns, in the order in which they are asked for.

    All rows of one value of `by` go to one part: a machine on which a model is tested was never trained on. Parts are
    numbers of groups, `train=40, test=10`, or shares of them, `train=0.8, test=0.2`, as in `ClassSet.split`.
    """
    columns = _columns(table, _column_names(table))
    if by not in columns:
        _columns(table, [by])
    names, members = _groups(columns[by], by)
    found = divided(len(names), seed, parts, f"different values of {by!r}")
    chosen = [np.sort(np.concatenate([members[g] for g in groups])) for groups in found]
    return tuple({k: column[index] for k, column in columns.items()} for index in chosen)


def _column_names(table: Any) -> list[str]:
    if isinstance(table, Mapping):
        return list(table)
    if isinstance(table, np.ndarray) and table.dtype.names and table.ndim == 1:
        return list(table.dtype.names)
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):
        return list(table.columns)
    raise TypeError(
        "expected a table: a dict of columns, a structured numpy array (n,), or a DataFrame; got "
        f"{type(table).__name__}"
    )


def _columns(table: Any, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns as arrays of one length. Raises ValueError for those that are not there."""
    names = _column_names(table)
    missing = [k for k in wanted if k not in names]
    if missing:
        raise ValueError(f"expected columns {missing}, the table has {names[:20]}")
    found = {k: np.asanyarray(table[k]) for k in wanted}
    shapes = {k: c.shape for k, c in found.items()}
    if (
        any(c.ndim not in (1, 2) for c in found.values())
        or len({s[0] for s in shapes.values()}) > 1
    ):
        raise ValueError(f"expected columns (n,) or (n, d) of one length, got {shapes}")
    if not len(next(iter(found.values()))):
        raise ValueError("expected a table with rows, got none")
    return found


def _groups(column: np.ndarray, by: str) -> tuple[list[Any], list[np.ndarray]]:
    """The values of a column, sorted, and the rows of each."""
    if column.ndim != 1:
        raise ValueError(f"expected one value of {by!r} in each row, got {column.shape}")
    _refuse_missing(_missing(column), by)
    try:
        values, where = np.unique(column, return_inverse=True)
        names = values.tolist()
    except TypeError:  # of several kinds
        names = sorted(set(column.tolist()), key=str)
        number = {k: i for i, k in enumerate(names)}
        where = np.array([number[k] for k in column.tolist()])
    order = np.argsort(where, kind="stable")
    return names, np.split(order, np.bincount(where, minlength=len(names)).cumsum()[:-1])


def _matrix(
    columns: dict[str, np.ndarray],
    names: list[str],
    inside: np.ndarray,
    dtype: torch.dtype,
    targets: bool = False,
) -> Tensor:
    """Columns of numbers beside one another: (n, F). Rows that are not `inside` are never drawn, and not looked at."""
    parts = []
    for name in names:
        column = columns[name]
        _refuse_missing(_missing(column) & (inside if column.ndim == 1 else inside[:, None]), name)
        words = (
            "convert it to numbers, or give classes=[…], the values that it can have"
            if targets
            else ("convert it to numbers, categories to one column of 0 and 1 each")
        )
        held = column[inside].reshape(-1).tolist() if column.dtype == object else []
        odd = [v for v in held if not isinstance(v, int | float | np.number)]
        if column.dtype.kind not in "biufO" or odd or (targets and column.dtype.kind == "b"):
            first = odd[0] if odd else column.reshape(-1)[0]
            raise ValueError(
                f"expected numbers in the column {name!r}, got {column.dtype} such as {first!r}: {words}"
            )
        wide = np.zeros(column.shape)
        wide[inside] = column[inside].astype(np.float64)
        parts.append(torch.from_numpy(wide.reshape(len(column), -1)).to(dtype))
        finite(parts[-1], f"the column {name!r} as {dtype}")
    return torch.cat(parts, 1)


def _one_hot(columns: dict[str, np.ndarray], names: list[str], classes: Sequence[Any]) -> Tensor:
    """Rows (n, W) with a 1 for each value's place among the classes."""
    if isinstance(classes, str) or not hasattr(classes, "__iter__"):
        raise TypeError(f"expected classes as a list of values, got {classes!r}")
    known = [c.item() if isinstance(c, np.generic | Tensor) else c for c in classes]
    if len(names) != 1 or columns[names[0]].ndim != 1:
        raise ValueError(f"expected one column y with classes=, got {names}")
    if len(known) < 2 or len(set(known)) < len(known):
        raise ValueError(f"expected at least two classes, each once, got {known}")
    column = columns[names[0]]
    _refuse_missing(_missing(column), names[0])
    values = column.tolist()
    number = {k: i for i, k in enumerate(known)}
    strange = sorted({str(v) for v in values if v not in number})
    if strange:
        raise ValueError(
            f"expected values of {names[0]!r} among classes={known}; the column has {strange[:5]}, too"
        )
    return torch.eye(len(known))[torch.tensor([number[v] for v in values])]


def _missing(column: np.ndarray) -> np.ndarray:
    """Where values are missing: None, NaN, infinite, a masked entry, or a DataFrame's own NA."""
    mask = np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else False
    plain, kind = np.asarray(column), column.dtype.kind
    found = np.zeros(plain.shape, dtype=bool)
    if kind == "f":
        found = ~np.isfinite(plain)
    elif kind in "mM":
        found = np.isnat(plain)
    elif kind == "O":
        held = [_is_missing(v) for v in plain.reshape(-1).tolist()]
        found = np.array(held, dtype=bool).reshape(plain.shape)
    return np.logical_or(found, mask)


def _is_missing(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # pandas' NA has no truth value
        return True


def _refuse_missing(missing: np.ndarray, name: str) -> None:
    if missing.any():
        at = np.argwhere(missing)[0].tolist()
        raise ValueError(
            f"expected a finite value in each row of the column {name!r}; {int(missing.sum())} are missing or infinite, "
            f"the first in row {at[0]}. Drop these rows, or fill them from training rows alone."
        )
