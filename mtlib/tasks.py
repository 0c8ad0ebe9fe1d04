"""Data in, streams of tasks out. A stream is pure: `stream(step)` is the same draw on every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import Batch, Episode, Params, Stream, over, take


class Rows:
    """Items that lie elsewhere and are read when they are drawn: give a class of your own these two methods.

    `mtlib.data.own` makes them of folders and of torch's data sets. They must be pure: one index, one item, always.
    """

    def __len__(self) -> int:
        """How many there are."""
        raise NotImplementedError

    def __getitem__(self, index: Tensor) -> Any:
        """Those with these indices (k,): a tensor (k, *item), or a nest of such tensors."""
        raise NotImplementedError


class ClassSet(NamedTuple):
    """Labelled items, sorted by class.

    `items` are a tensor (C, n, *item), as many in each class; or a list of C tensors (n_c, *item), of any lengths, or
    of `Rows`, which are read when they are drawn. In the place of each tensor may stand a nest, such as a dict of
    tokens and masks, whose tensors have these axes.
    """

    items: Any  # (C, n, *item), or a list of C classes (n_c, *item)
    names: list[str]  # C names
    source: str  # one line that says what this data is

    def select(self, keep: list[int] | Tensor) -> ClassSet:
        """The classes with these indices, or where a mask (C,) is true."""
        index = chosen(keep, len(self.names), "classes")
        if isinstance(self.items, list | tuple):
            items: Any = [self.items[i] for i in index.tolist()]
        else:
            items = over(lambda d: d[index.to(d.device)], self.items)
        return ClassSet(items, [self.names[i] for i in index.tolist()], self.source)

    def split(self, *, seed: int = 0, **parts: float) -> tuple[ClassSet, ...]:
        """Sets of different classes, in the order in which they are asked for; `seed` says which class goes where.

        Parts are numbers of classes, `split(train=60, validation=20, test=20)`, or shares, `split(train=0.8, test=0.2)`.
        What is left over is in none of them. Raises ValueError for a part without a class, or more than there are.

        ```pycon
        >>> data = ClassSet(torch.rand(10, 15, 8), [str(c) for c in range(10)], "random rows")
        >>> train, test = data.split(train=0.7, test=0.3)
        >>> len(train.names), len(test.names), set(train.names) & set(test.names)
        (7, 3, set())

        ```
        """
        check_classes(self)
        indices = divided(len(self.names), seed, parts, f"classes of {self.source!r}")
        return tuple(
            self.select(torch.from_numpy(index))._replace(source=f"{self.source}, {name}")
            for name, index in zip(parts, indices, strict=True)
        )


def divided(n: int, seed: int, parts: Mapping[str, float], what: str) -> list[np.ndarray]:
    """n things in parts that do not meet, by numbers or by shares: the sorted indices of each part."""
    check_seed(seed)
    given = dict(parts)
    whole_ones = [isinstance(p, Integral) and not isinstance(p, bool) for p in given.values()]
    shares = [isinstance(p, Real) and not isinstance(p, Integral) for p in given.values()]
    asked = ", ".join(f"{k}={v!r}" for k, v in given.items())
    if not given or not (all(whole_ones) or all(shares)):
        raise ValueError(
            f"expected parts as numbers of {what}, train=60, test=20, or all as shares, train=0.8, test=0.2; "
            f"got {asked or 'none'}"
        )
    if all(shares):
        within(0, 1, **given)
        total = math.fsum(given.values())
        if total > 1 + 1e-9:
            raise ValueError(f"expected shares that sum to at most 1, got {asked}")
        ends = [round(n * math.fsum([*given.values()][: i + 1])) for i in range(len(given))]
    else:
        ends = [int(e) for e in np.cumsum([*given.values()])]
    sizes = np.diff([0, *ends])
    if min(sizes) < 1 or ends[-1] > n:
        found = ", ".join(f"{k} {m}" for k, m in zip(given, sizes.tolist(), strict=True))
        raise ValueError(
            f"expected at least one in each part and at most {n} in all, the number of {what}; {asked} gives {found}"
        )
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(part) for part in np.split(order, ends)[: len(given)]]


def episodes(
    data: ClassSet,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    cast: torch.dtype | None = None,
    queries_from: ClassSet | None = None,
    small: str = "refuse",
    numbers: str = "anew",
) -> Stream:
    """N-way K-shot episodes: `stream(step)` -> Episode with a leading axis T = `tasks`.

    Each task draws `ways` classes and, from each, `shots` support items and `queries` other query
    items, all without replacement. Support x: (T, ways·shots, *item), y: (T, ways·shots, ways) one-hot; rows are
    sorted by class. A draw is where the data are; `fit(device=)` moves it.

    Items keep their dtype: tokens are indices and stay int64, images may stay uint8. `cast=torch.float32` turns a draw's
    bytes, 0 to 255, into numbers from 0 to 1, and other real numbers into that dtype; the data stay as they are. y has
    the dtype of x, or torch's default one where x has integers alone.

    `queries_from` is a second set with classes of the same names, another session, camera or hospital: support items
    come from `data`, query items from there. A class with fewer than `shots` + `queries` items is an error that names
    it; `small="leave out"` leaves such classes out. `stream.part(step, tasks)` draws and reads a slice of the tasks alone.

    Each episode numbers its classes anew. With `numbers="fixed"` class c has the number c mod `ways` in all of them: then
    the items alone tell their labels, and a learner may learn them by heart {cite}`yin2020memorization`.

    ```pycon
    >>> data = ClassSet(torch.rand(20, 15, 8), [str(c) for c in range(20)], "random rows")
    >>> draw = episodes(data, ways=5, shots=1, queries=3, tasks=4, seed=0)(step=17)
    >>> draw.support.x.shape, draw.query.y.shape
    (torch.Size([4, 5, 8]), torch.Size([4, 15, 5]))

    ```

    Raises ValueError if the data is too small for such a task, for a `cast` that is no floating dtype, and where it has
    nothing to turn; the classes of `queries_from` must have all names of `data`.
    """
    positive(ways=ways, shots=shots, queries=queries, tasks=tasks)
    check_seed(seed)
    check_cast(cast)
    one_of(small=(small, ("refuse", "leave out")), numbers=(numbers, ("anew", "fixed")))
    items, other, twin = Items(data), None, None
    needs = [(data.source, items.sizes, shots + queries if queries_from is None else shots)]
    if queries_from is not None:
        other, twin = Items(queries_from), _twins(data, queries_from)
        needs.append((queries_from.source, other.sizes[twin], queries))
    enough = np.all([found >= need for _, found, need in needs], axis=0)
    if small == "leave out" and not enough.all():
        keep = torch.from_numpy(enough)
        data, twin = data.select(keep), None if twin is None else twin[enough]
        items = Items(data) if data.names else items
    if ways > len(data.names):
        left = "" if enough.all() or small == "refuse" else " with enough items"
        raise ValueError(
            f"expected at most {len(data.names)} ways, the number of classes in {data.source!r}{left}; got {ways}"
        )
    if small == "refuse":
        for (source, found, need), what in zip(needs, _asked(shots, queries, twin), strict=True):
            _check_sizes(source, found, need, what, data.names)
    return _Episodes(items, other, twin, ways, shots, queries, tasks, seed, cast, numbers)


@dataclass(frozen=True, eq=False)
class _Episodes:
    """What `episodes` makes."""

    items: Items
    other: Items | None  # where queries come from, if not from `items`
    twin: np.ndarray | None  # the number there of each class
    ways: int
    shots: int
    queries: int
    tasks: int
    seed: int
    cast: torch.dtype | None
    numbers: str

    def __call__(self, step: int) -> Episode:
        return self.part(step, slice(None))

    def part(self, step: int, tasks: slice) -> Episode:
        rng = np.random.default_rng([self.seed, step])
        sizes, starts = self.items.sizes, self.items.starts
        classes = self.drawn(rng, len(sizes))
        both = self.shots if self.other else self.shots + self.queries
        picked = different(rng, sizes[classes], both)
        rows = (starts[classes][..., None] + picked)[tasks]  # (T, W, K+Q)
        support, query, there = rows[:, :, : self.shots], rows[:, :, self.shots :], self.items
        if self.other is not None and self.twin is not None:
            there, classes = self.other, self.twin[classes]
            picked = different(rng, there.sizes[classes], self.queries)
            query = (there.starts[classes][..., None] + picked)[tasks]
        return Episode(
            _labelled(self.items, support, self.ways, self.cast),
            _labelled(there, query, self.ways, self.cast),
        )

    def drawn(self, rng: np.random.Generator, classes: int) -> np.ndarray:
        """The classes of each task, in the order of their numbers: (T, W)."""
        if self.numbers == "anew":
            return _without_replacement(rng, (self.tasks,), classes, self.ways)
        number = np.arange(self.ways)
        alike = (classes - number + self.ways - 1) // self.ways  # classes of each number
        return number + self.ways * rng.integers(alike, size=(self.tasks, self.ways))


def mixture(
    *datasets: Batch | ClassSet, batch: int, seed: int, cast: torch.dtype | None = None
) -> Stream:
    """Batches drawn from several data sets at once: `stream(step)` -> Batch of x (T, B, *item).

    T is the number of data sets, B = `batch` items drawn from each, with replacement. `y` holds either
    targets (n, W), or class numbers (n,), which become one-hot rows as wide as all data sets together need. A ClassSet
    gives its items with the number of their class, in the order in which names first come; items that are read when
    they are drawn stay where they are. x may be a nest of tensors (n, ...). `cast` is that of `episodes`.

    ```pycon
    >>> source, target = (Batch(torch.rand(n, 8), torch.arange(n) % 3) for n in (60, 9))
    >>> mixture(source, target, batch=32, seed=0)(step=0).x.shape
    torch.Size([2, 32, 8])

    ```
    """
    positive(batch=batch)
    check_seed(seed)
    check_cast(cast)
    if not datasets:
        raise ValueError("expected at least one data set, got none")
    if any(isinstance(d, ClassSet) for d in datasets):
        return _Mixture(*_by_name(datasets), batch, seed, cast)
    return _Mixture(*_by_number(datasets), batch, seed, cast)


@dataclass(frozen=True, eq=False)
class _Mixture:
    """What `mixture` makes."""

    xs: list[Any]
    ys: list[Tensor]
    ways: int  # one-hot rows are so wide; 0 where y are targets
    batch: int
    seed: int
    cast: torch.dtype | None

    def __call__(self, step: int) -> Batch:
        return self.part(step, slice(None))

    def part(self, step: int, tasks: slice) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        drawn = [torch.from_numpy(rng.integers(len(y), size=self.batch)) for y in self.ys]
        mine = [*zip(self.xs, self.ys, drawn, strict=True)][tasks]
        x = together([over(lambda d: d[None], read(x, rows)) for x, _, rows in mine])
        x = x if self.cast is None else cast_to(x, self.cast)  # (T, B, *item)
        y = torch.stack([y[rows.to(y.device)] for _, y, rows in mine])  # (T, B) or (T, B, W)
        return Batch(x, one_hot(y, self.ways, _real(x)) if self.ways else y)


def pool(data: ClassSet) -> Batch:
    """Every item with its class number: x (Σ_c n_c, *item), y (Σ_c n_c,) of integers. Reads all, where items are read."""
    items = Items(data)
    x = items.everything()
    y = torch.arange(len(items.sizes)).repeat_interleave(torch.from_numpy(items.sizes))
    return Batch(x, y.to(_first(x).device))


def one_hot(y: Tensor, ways: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class numbers (...,) -> one-hot rows (..., ways). Raises ValueError for other numbers than 0 to ways − 1.

    ```pycon
    >>> one_hot(torch.tensor([1, 0]), ways=2)
    tensor([[0., 1.],
            [1., 0.]])

    ```
    """
    positive(ways=ways)
    if not isinstance(y, Tensor):
        raise TypeError(f"expected class numbers in a tensor, got {type(y).__name__}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"expected class numbers, integers, got {y.dtype}; convert with .long()")
    try:
        return torch.nn.functional.one_hot(y.long(), ways).to(dtype)
    except RuntimeError as error:
        raise ValueError(
            f"expected class numbers from 0 to {ways - 1}, got {int(y.min())} to {int(y.max())}"
        ) from error


def quiz(stream: Stream) -> Stream:
    """The query sets of a stream of episodes, as batches: what joint training on the same tasks sees."""
    check_stream(stream)
    return _Quiz(stream)


@dataclass(frozen=True, eq=False)
class _Quiz:
    """What `quiz` makes."""

    stream: Stream

    def __call__(self, step: int) -> Batch:
        return self.of(self.stream(step))

    def part(self, step: int, tasks: slice) -> Batch:
        return self.of(some_tasks(self.stream, step, tasks))

    def of(self, draw: Any) -> Batch:
        if not isinstance(draw, Episode):
            raise TypeError(f"expected a stream of episodes, got a {type(draw).__name__}")
        return draw.query


def cut(batch: Batch, size: int) -> Episode:
    """A draw of tasks cut in two: the first `size` rows of each task are its support set, the others its query set.

    x: (T, rows, *item), y: (T, rows, W). Raises ValueError where nothing would be left to ask.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"expected a Batch, x and y of all tasks, got {type(batch).__name__}")
    positive(size=size)
    rows = batch.y.shape[1]
    if size >= rows:
        raise ValueError(f"expected a size below {rows}, the rows of a task, got {size}")
    return Episode(over(lambda d: d[:, :size], batch), over(lambda d: d[:, size:], batch))


def relabelled(stream: Stream, change: Callable[[Tensor], Tensor]) -> Stream:
    """The same episodes with changed support labels, y -> change(y), (T, N, W): the test for memorisation.

    A learner that reads its support set follows the wrong labels, and its error soars; one that knows its tasks by heart
    goes on as before {cite}`yin2020memorization`. For class numbers `lambda y: y.roll(1, -1)` makes each class the next
    one, for real targets `torch.neg` turns their sign.
    """
    check_stream(stream)
    functions(1, change=change)

    def draw(step: int) -> Episode:
        found = stream(step)
        if not isinstance(found, Episode):
            raise TypeError(f"expected a stream of episodes, got a {type(found).__name__}")
        x, y = found.support
        return Episode(Batch(x, change(y)), found.query)

    return draw


def uneven(
    stream: Stream,
    counts: Sequence[int] | Callable[[np.random.Generator], Sequence[int]],
    seed: int = 0,
) -> Stream:
    """The same episodes with other numbers of questions: of class k the first n_k query items.

    `counts` has n_k for each class, or is a function of a generator that draws them anew for each task, with one sum:
    Dirichlet-distributed shares {cite}`veilleux2021realistic` are `lambda rng: rng.multinomial(19, rng.dirichlet(5 * [2.0]))`.
    What is drawn depends on `seed` and the step. Raises ValueError where a class has fewer query items, or none is left.
    """
    check_stream(stream)
    check_seed(seed)
    if not callable(counts) and not isinstance(counts, Sequence):
        raise TypeError(f"expected counts, a number for each class or a function, got {counts!r}")

    def rows(y: Tensor, n: Sequence[int]) -> Tensor:
        own = [(y.argmax(1) == k).nonzero()[:, 0] for k in range(y.shape[1])]
        sizes = [len(r) for r in own]
        if len(n) != len(own) or any(not 0 <= a <= b for a, b in zip(n, sizes, strict=True)):
            raise ValueError(
                f"expected counts of at most {sizes}, the query items of each class, got {list(n)}"
            )
        return torch.cat([r[:a] for r, a in zip(own, n, strict=True)])

    def draw(step: int) -> Episode:
        found = stream(step)
        if not isinstance(found, Episode):
            raise TypeError(f"expected a stream of episodes, got a {type(found).__name__}")
        rng = np.random.default_rng([seed, step])
        kept = [rows(y, counts(rng) if callable(counts) else counts) for y in found.query.y]
        if len({len(r) for r in kept}) > 1 or not len(kept[0]):
            raise ValueError(
                f"expected counts of one sum above 0 in all tasks, got {[len(r) for r in kept]}"
            )
        index, task = torch.stack(kept), torch.arange(len(kept))[:, None]
        return Episode(found.support, over(lambda d: d[task.to(d.device), index], found.query))

    return draw


def some_tasks(stream: Stream, step: int, tasks: slice) -> Any:
    """A slice of the tasks of stream(step); a stream with a method `part(step, tasks)` draws these alone."""
    part = getattr(stream, "part", None)
    return take(stream(step), tasks) if part is None else part(step, tasks)


# Items ---------------------------------------------------------------------------------------


class Items(Rows):
    """All items of a class set in one row, class after class, read where they lie."""

    def __init__(self, data: ClassSet):
        self.sizes = np.array(check_classes(data))  # (C,)
        self.starts = (
            self.sizes.cumsum() - self.sizes
        )  # (C,), the number of each class's first item
        listed = isinstance(data.items, list | tuple)
        self.classes = list(data.items) if listed else None
        self.flat = None if listed else over(lambda d: d.flatten(0, 1), data.items)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, index: Tensor) -> Any:
        if self.classes is None:
            return read(self.flat, index)
        numbers = index.numpy()
        owner = np.searchsorted(self.starts, numbers, side="right") - 1
        inside = torch.from_numpy(numbers - self.starts[owner])
        ends = [*(np.flatnonzero(np.diff(owner)) + 1), len(numbers)]  # of runs from one class
        runs = zip([0, *ends[:-1]], ends, strict=True)
        return together([read(self.classes[owner[a]], inside[a:b]) for a, b in runs])

    def everything(self) -> Any:
        """All of them."""
        if self.classes is None:
            return self.flat
        every = zip(self.classes, self.sizes.tolist(), strict=True)
        return together([read(c, torch.arange(n)) if isinstance(c, Rows) else c for c, n in every])


def read(rows: Any, index: Tensor) -> Any:
    """rows[index] of a tensor, of each tensor in a nest, or of `Rows`."""
    if not isinstance(rows, Rows):
        return over(lambda d: d[index.to(d.device)], rows)
    x = rows[index]
    for leaf in _leaves(x, f"the items of {type(rows).__name__}"):
        if leaf.ndim < 1 or len(leaf) != len(index):
            raise ValueError(
                f"expected rows[index] of {type(rows).__name__} with one item for each of {len(index)} indices, got "
                f"{tuple(leaf.shape)}"
            )
    return x


def together(parts: list[Any]) -> Any:
    """Tensors, or nests of them, joined along their first axis."""
    first = _form(parts[0])
    for p in parts[1:]:
        if (found := _form(p)) != first:
            raise ValueError(
                f"expected items of one shape and dtype, got {first} and {found}. Pad, crop or resize them first."
            )
    return _joined(parts)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if len(parts) > 1 else first
    if isinstance(first, Mapping):
        return {k: _joined([p[k] for p in parts]) for k in first}
    made = [_joined(list(p)) for p in zip(*parts, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)


def _form(x: Any) -> Any:
    """The nest, with shape and dtype of an item in the place of each tensor."""
    return over(lambda d: (tuple(d.shape[1:]), d.dtype), x)


def cast_to(x: Any, dtype: torch.dtype) -> Any:
    """Bytes 0 to 255 -> 0 to 1 in this dtype, real numbers -> this dtype; in a nest int64 and masks stay.

    Raises ValueError where there is neither.
    """
    held = [d.dtype for d in _leaves(x, "x")]
    if not any(d == torch.uint8 or d.is_floating_point for d in held):
        kinds = ", ".join(sorted({str(d) for d in held}))
        raise ValueError(
            f"expected bytes (uint8) or real numbers to turn into {dtype}, got items of {kinds}. Indices such as tokens "
            "stay as they are: leave cast= out. Numbers convert before: items.float()."
        )

    def turn(d: Tensor) -> Tensor:
        if d.dtype == torch.uint8:
            return d.to(dtype).div_(255)
        return d.to(dtype) if d.is_floating_point() else d

    return over(turn, x)


def different(rng: np.random.Generator, sizes: np.ndarray, k: int) -> np.ndarray:
    """k different numbers below each of `sizes`, all equally likely: (*sizes.shape, k)."""
    flat = sizes.reshape(-1)
    if (flat == flat[0]).all():
        return _without_replacement(rng, sizes.shape, int(flat[0]), k)
    cells = np.split(rng.random(int(flat.sum())), flat.cumsum()[:-1])
    return np.stack([np.argsort(cell)[:k] for cell in cells]).reshape(*sizes.shape, k)


# Checks --------------------------------------------------------------------------------------


def chosen(keep: list[int] | Tensor, n: int, what: str) -> Tensor:
    """Indices (k,) of some of n things, given so or as a mask (n,). Raises ValueError for anything else."""
    try:
        index = torch.as_tensor(keep).cpu()  # where it may index tensors of any device
    except (TypeError, ValueError):  # words, for one
        index = torch.empty(0, 0)
    if index.dtype == torch.bool and index.shape == (n,):
        index = index.nonzero()[:, 0]
    index = index.long() if index.numel() == 0 and index.ndim == 1 else index
    if (
        index.ndim != 1
        or index.dtype == torch.bool
        or index.is_floating_point()
        or not bool(((index >= -n) & (index < n)).all())
    ):
        raise ValueError(
            f"expected indices of {what} from 0 to {n - 1}, or a mask of {n}, got {keep}"
        )
    return index.long()


def check_classes(data: ClassSet) -> list[int]:
    """How many items each class of a ClassSet has, or an error that says what is wrong with it."""
    if not isinstance(data, ClassSet):
        raise TypeError(
            f"expected a ClassSet(items, names, source), items sorted by class, got {type(data).__name__}"
        )
    items = data.items
    listed = isinstance(items, list | tuple) and not hasattr(items, "_fields")
    sizes = _sizes_of_list(data) if listed else _sizes_of_rectangle(data)
    if len(data.names) != len(sizes):
        raise ValueError(
            f"expected one name per class: {len(sizes)} classes, {len(data.names)} names"
        )
    named = [name for name in data.names if name]  # "" is a class without a name
    if len(set(named)) != len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ValueError(f"expected classes of different names; {twice!r} stands there twice")
    return sizes


def _sizes_of_rectangle(data: ClassSet) -> list[int]:
    if not isinstance(data.items, Tensor | Mapping | tuple):
        raise TypeError(
            f"expected items in a tensor, or in a list with one for each class; got {_kind(data.items)}"
        )
    leaves = _leaves(data.items, f"items of {data.source!r}")
    least = 3 if isinstance(data.items, Tensor) else 2
    for x in leaves:
        if x.ndim < least or 0 in x.shape or x.shape[:2] != leaves[0].shape[:2]:
            raise ValueError(
                "expected items of shape (classes, items per class, ...), at least one class of one item, got "
                f"{tuple(x.shape)}"
            )
        _readable(x, f"items of {data.source!r}", masks=least == 2)
    return [leaves[0].shape[1]] * len(leaves[0])


def _sizes_of_list(data: ClassSet) -> list[int]:
    if not len(data.items):
        raise ValueError(f"expected items of at least one class in {data.source!r}, got none")
    sizes, held = [], []
    for i, rows in enumerate(data.items):
        name = data.names[i] if i < len(data.names) and data.names[i] else i
        what = f"class {name!r} of {data.source!r}"
        if not isinstance(rows, Rows):
            found = _leaves(rows, what)
            least = 2 if isinstance(rows, Tensor) else 1
            bad = [x for x in found if x.ndim < least or 0 in x.shape[1:]]
            if bad or len({len(x) for x in found}) > 1:
                raise ValueError(
                    f"expected items (n, *item) in {what}, got {[tuple(x.shape) for x in found]}. An item of one number "
                    "needs its axis: x[:, None]."
                )
            held.append((what, _form(rows)))
            for x in found:
                _readable(x, what, masks=least == 1)
        sizes.append(len(rows) if isinstance(rows, Rows) else len(found[0]))
        if not sizes[-1]:
            raise ValueError(f"expected at least one item in every class, got none in {what}")
    for what, form in held:
        if form != held[0][1]:
            raise ValueError(
                f"expected items of one shape and dtype in all classes; {held[0][0]} has {held[0][1]}, {what} {form}"
            )
    return sizes


def check_rows(data: Batch, what: str) -> None:
    """Raise unless x: (n, *item), or a nest of such, and y: (n, W) or class numbers (n,) fit together and are finite."""
    if not isinstance(data, Batch):
        raise TypeError(
            f"expected {what} to be a Batch(x, y) of two tensors, got {type(data).__name__}"
        )
    if isinstance(data.x, Tensor) or not isinstance(data.x, Mapping | tuple | list):
        check_tensor(data.x, f"x of {what}")
    check_tensor(data.y, f"y of {what}")
    leaves = _leaves(data.x, f"x of {what}")
    least = 2 if isinstance(data.x, Tensor) else 1
    for x in leaves:
        if x.ndim < least or data.y.ndim < 1:
            raise ValueError(
                f"expected x (n, *item) and y (n,) or (n, W) in {what}, got {tuple(x.shape)} and "
                f"{tuple(data.y.shape)}. An item of one number needs its axis: x[:, None]."
            )
        _readable(x, f"x of {what}", masks=least == 1)
        if len(x) != len(data.y) or len(x) == 0:
            raise ValueError(
                f"expected as many labels as items in {what}, got {len(x)} items, {len(data.y)} labels"
            )
    if data.y.ndim == 1 and (data.y.dtype != torch.int64 or int(data.y.min()) < 0):
        raise ValueError(
            f"expected y of {what} to be targets (n, W), or class numbers (n,) of dtype int64 from 0 on; "
            f"got {tuple(data.y.shape)} of {data.y.dtype}. For regression write y[:, None]. {UNLABELLED}"
        )
    if data.y.ndim > 2:
        raise ValueError(f"expected y of {what} with one or two axes, got {tuple(data.y.shape)}")
    if data.y.ndim == 2:
        _real_targets(data.y, what)
    finite(data.y, f"y of {what}", UNLABELLED)


def check_cast(cast: object) -> None:
    """Raise unless it is None or a floating dtype."""
    if cast is not None and not (isinstance(cast, torch.dtype) and cast.is_floating_point):
        raise ValueError(
            f"expected cast to be a floating dtype such as torch.float32, or None, got {cast!r}"
        )


def one_of(**words: tuple[object, tuple[object, ...]]) -> None:
    """Raise unless each is one of the words that are known: name=(found, known)."""
    for name, (found, known) in words.items():
        if found not in known:
            raise ValueError(f"expected {name} to be one of {known}, got {found!r}")


def _check_sizes(source: str, sizes: np.ndarray, need: int, asked: str, names: list[str]) -> None:
    """Raise, with their names, where classes have fewer items than needed."""
    few = [(names[i] or i, int(sizes[i])) for i in np.flatnonzero(sizes < need)]
    if few:
        shown = ", ".join(f"{name!r} has {n}" for name, n in few[:10]) + (", …" if few[10:] else "")
        raise ValueError(
            f"expected {asked.partition(':')[0]} ≤ {min(sizes)}, the number of items per class in {source!r}; got "
            f"{asked.partition(':')[2]}. {len(few)} of {len(sizes)} classes have too few: {shown}. "
            'small="leave out" leaves them out.'
        )


def _asked(shots: int, queries: int, twin: object) -> list[str]:
    if twin is None:
        return [f"shots + queries:{shots} + {queries} = {shots + queries}"]
    return [f"shots:{shots}", f"queries:{queries}"]


def _twins(data: ClassSet, other: ClassSet) -> np.ndarray:
    """Where each class of `data` stands in `other`, by name."""
    listed = isinstance(data.items, list | tuple) and isinstance(other.items, list | tuple)
    held = {id(rows) for rows in data.items} & {id(rows) for rows in other.items} if listed else ()
    if other is data or other.items is data.items or held:
        raise ValueError(
            "expected other items in queries_from, got those of data: a query item could be a support item. Without "
            "queries_from= both are drawn from data and never meet."
        )
    where = {name: i for i, name in enumerate(other.names)}
    missing = [name for name in data.names if not name or name not in where]
    if missing:
        raise ValueError(
            f"expected queries_from to have the classes of data, by name; {len(missing)} of {len(data.names)} are not in "
            f"{other.source!r}: {missing[:5]}. It has {other.names[:5]}."
        )
    return np.array([where[name] for name in data.names])


def _by_number(datasets: tuple[Any, ...]) -> tuple[list[Any], list[Tensor], int]:
    """x, y and the number of classes of several batches, 0 where y are targets. Raises where they do not fit together."""
    for i, d in enumerate(datasets):
        check_rows(d, f"data set {i}")
        _check_alike(datasets[0].x, d.x, i)
    numbered = [d.y.ndim == 1 for d in datasets]
    if any(numbered) and not all(numbered):
        raise ValueError(
            "expected y to be class numbers (n,) in every data set, or targets (n, W) in every one; got both"
        )
    ways = max(int(d.y.max()) + 1 for d in datasets) if all(numbered) else 0
    widths = {tuple(d.y.shape[1:]) for d in datasets}
    if len(widths) > 1:
        raise ValueError(f"expected targets of the same width in every data set, got {widths}")
    return [d.x for d in datasets], [d.y for d in datasets], ways


def _by_name(datasets: tuple[Any, ...]) -> tuple[list[Any], list[Tensor], int]:
    """Items, class numbers and number of classes of several class sets, whose classes are known by their names."""
    kinds = {type(d).__name__ for d in datasets}
    if kinds != {"ClassSet"}:
        raise TypeError(
            f"expected every data set to be a ClassSet, or every one a Batch, got {kinds}"
        )
    items = [Items(d) for d in datasets]
    if len(datasets) > 1 and not all(name for d in datasets for name in d.names):
        raise ValueError(
            "expected a name for each class of several data sets: by it they are known"
        )
    first = datasets[0].names
    union = dict.fromkeys(name for d in datasets for name in d.names)
    number = {name: i for i, name in enumerate(union)}
    numbers = [
        range(len(first)) if d is datasets[0] else [number[k] for k in d.names] for d in datasets
    ]
    ys = [
        torch.tensor([*n]).repeat_interleave(torch.from_numpy(i.sizes))
        for n, i in zip(numbers, items, strict=True)
    ]
    return items, ys, len(union) if len(datasets) > 1 else len(first)


def _check_alike(one: Any, other: Any, i: int) -> None:
    """Raise unless the items of data set i are as those of data set 0."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if other.shape[1:] != one.shape[1:]:
            raise ValueError(
                f"expected items of the same shape; data set 0 has {tuple(one.shape[1:])}, "
                f"data set {i} has {tuple(other.shape[1:])}"
            )
        if other.dtype != one.dtype:
            raise ValueError(
                f"expected items of the same dtype; data set 0 has {one.dtype}, data set {i} {other.dtype}"
            )
    elif _form(one) != _form(other):
        raise ValueError(
            f"expected items alike; data set 0 has {_form(one)}, data set {i} {_form(other)}"
        )


def check_draw(data: object, numbers: bool = True) -> None:
    """Raise unless a stream's draw is an Episode or Batch of (T, rows, ...) tensors that fit together.

    With `numbers`, they must be finite, too.
    """
    if isinstance(data, Episode):
        parts = {"the support set": data.support, "the query set": data.query}
    elif isinstance(data, Batch):
        parts = {"the batch": data}
    else:
        raise TypeError(
            f"expected a stream that gives an Episode or a Batch, got {type(data).__name__}"
        )
    for what, part in parts.items():
        if not isinstance(part, Batch):
            raise TypeError(
                f"expected {what} to be a Batch of two tensors, got {type(part).__name__}"
            )
        leaves = _leaves(part.x, f"x of {what}")
        check_tensor(part.y, f"y of {what}")
        least = 3 if isinstance(part.x, Tensor) else 2
        for x in leaves:
            if (
                x.ndim < least
                or part.y.ndim != 3
                or x.shape[:2] != part.y.shape[:2]
                or 0 in x.shape
            ):
                shapes = over(lambda d: tuple(d.shape), part.x)
                raise ValueError(
                    f"expected x (T, rows, *item) and y (T, rows, W) in {what}, got {shapes} and {tuple(part.y.shape)}. Labels "
                    "are one-hot rows, `one_hot(y, ways)`, regression targets need an axis W = 1."
                )
        _real_targets(part.y, what)
        for x in leaves:
            _readable(x, f"x of {what}", masks=not isinstance(part.x, Tensor), numbers=numbers)
        if numbers:
            finite(part.y, f"y of {what}", UNLABELLED)
    tasks = [len(part.y) for part in parts.values()]
    if len(set(tasks)) > 1:
        raise ValueError(f"expected as many tasks in support and query, got {tasks}")


def check_shapes(net: nn.Module, phi: Params) -> None:
    """Raise ValueError where an entry of φ has another shape than the network's parameter of that name.

    torch would run the network with φ's sizes, without a word.
    """
    for k, p in net.named_parameters():
        if k in phi and phi[k].shape != p.shape:
            raise ValueError(
                f"expected φ's entry {k} of the network's shape {tuple(p.shape)}, got {tuple(phi[k].shape)}: is φ another "
                "network's? `start(learner, trained)` carries over what fits."
            )


UNLABELLED = "Items without labels may have any label, with weight 0 in `joint`."


def finite(x: Tensor, what: str, advice: str = "Drop or impute them first.") -> None:
    """Raise if x holds NaN or infinity, saying how many and where the first is."""
    check_tensor(x, what)
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero()
        raise ValueError(
            f"expected finite numbers in {what}; {len(bad)} are NaN or infinite, the first at {bad[0].tolist()}. "
            + advice
        )


def positive(**sizes: int) -> None:
    """Raise unless each size is a whole number of at least 1."""
    whole(1, **sizes)


def whole(least: int = 0, **numbers: int) -> None:
    """Raise unless each is a whole number of at least `least`."""
    for name, n in numbers.items():
        if not isinstance(n, Integral) or isinstance(n, bool) or n < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {n!r}")


def functions(arguments: int, **found: object) -> None:
    """Raise unless each is a function of so many arguments; the class of a module has yet to be made one."""
    for name, f in found.items():
        unmade = isinstance(f, type) and issubclass(f, nn.Module)
        if unmade or not takes(f, arguments):
            some = f"{arguments} argument{'s' if arguments > 1 else ''}"
            raise TypeError(f"expected {name} to be a function of {some}, got {f!r:.60}")


def takes(f: object, arguments: int) -> bool:
    """Whether f can be called with so many arguments, as far as Python knows."""
    try:
        signature(f).bind(*range(arguments))  # type: ignore[arg-type]
    except TypeError:
        return False
    except ValueError:  # a function of C has no signature
        return callable(f)
    return True


def within(low: float, high: float = math.inf, **numbers: float) -> None:
    """Raise unless each is a finite number from `low` to `high`."""
    for name, n in numbers.items():
        real = isinstance(n, Real) and not isinstance(n, bool)
        if not (real and math.isfinite(n) and low <= n <= high):
            limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"expected {name} to be a finite number {limits}, got {n!r}")


def above_zero(**numbers: float) -> None:
    """Raise unless each is a finite number above 0."""
    for name, n in numbers.items():
        real = isinstance(n, Real) and not isinstance(n, bool)
        if not (real and 0 < n < math.inf):
            raise ValueError(f"expected {name} > 0, a finite number, got {n!r}")


def check_seed(seed: int) -> None:
    """Raise unless the seed is a whole number of at least 0: without one, no draw could come again."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"expected the seed to be a whole number of at least 0, got {seed!r}")


def check_stream(stream: object) -> None:
    """Raise unless it is a function, as streams are."""
    if not callable(stream):
        raise TypeError(
            f"expected a stream, a function of the step that gives a draw, got {type(stream).__name__}"
        )


def check_tensor(x: object, what: str) -> None:
    """Raise unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {what} to be a tensor, got {_kind(x)}")


def _kind(found: Any) -> str:
    advice = "; convert with torch.from_numpy" if isinstance(found, np.ndarray) else ""
    advice = f". {UNLABELLED}" if found is None else advice
    return f"{type(found).__name__}{advice}"


def _leaves(x: Any, what: str) -> list[Tensor]:
    """The tensors of x: one, or those of a nest of dicts and tuples."""
    found: list[Tensor] = []

    def leaf(d: Tensor) -> Tensor:
        found.append(d)
        return d

    try:
        over(leaf, x)
    except TypeError as error:
        raise TypeError(
            f"expected {what} to be a tensor, or a nest of tensors, got {_kind(x)}"
        ) from error
    if not found:
        raise ValueError(f"expected at least one tensor in {what}, got none")
    return found


def _readable(x: Tensor, what: str, masks: bool = False, numbers: bool = True) -> None:
    """Raise unless x holds finite real numbers, or integers: tokens for an embedding, images as bytes."""
    if x.is_complex() or (x.dtype == torch.bool and not masks):
        raise ValueError(
            f"expected real numbers or integers in {what}, got {x.dtype}; convert with "
            + ("torch.view_as_real" if x.is_complex() else ".float()")
        )
    if numbers:
        finite(x, what)


def _real_targets(y: Tensor, what: str) -> None:
    if not y.is_floating_point():
        raise ValueError(
            f"expected floating-point y in {what}, got {y.dtype}: one-hot rows or targets, not class numbers; "
            "convert with .float()"
        )


def _real(x: Any) -> torch.dtype:
    """The dtype of the targets that go with items x: theirs, or torch's default where they are integers."""
    held = [d.dtype for d in _leaves(x, "x") if d.is_floating_point()]
    return held[0] if held else torch.get_default_dtype()


def _first(x: Any) -> Tensor:
    return _leaves(x, "x")[0]


def _without_replacement(
    rng: np.random.Generator, shape: tuple[int, ...], n: int, k: int
) -> np.ndarray:
    """k different numbers below n, for each cell of `shape`: (*shape, k)."""
    return np.argsort(rng.random((*shape, n)), axis=-1)[..., :k]


def _labelled(items: Items, rows: np.ndarray, ways: int, cast: torch.dtype | None) -> Batch:
    tasks, _, k = rows.shape  # (T, W, k)
    x = items[torch.from_numpy(rows.reshape(-1))]
    x = over(lambda d: d.unflatten(0, (tasks, -1)), x if cast is None else cast_to(x, cast))
    y = torch.arange(ways, device=_first(x).device).repeat_interleave(k).expand(tasks, -1)
    return Batch(x, one_hot(y, ways, _real(x)))
