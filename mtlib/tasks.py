"""Data in, streams of tasks out. A stream is pure: `stream(step)` is the same draw on every call."""

from __future__ import annotations

import math
from inspect import signature
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import Batch, Episode, Params, Stream, over


class ClassSet(NamedTuple):
    """Labelled items, sorted by class."""

    items: Tensor  # (C, n, *item): n items of each of C classes
    names: list[str]  # C names
    source: str  # one line that says what this data is

    def select(self, keep: list[int] | Tensor) -> ClassSet:
        """The classes with these indices, or where a mask (C,) is true."""
        index = chosen(keep, len(self.names), "classes")
        return ClassSet(self.items[index], [self.names[i] for i in index.tolist()], self.source)


def episodes(
    data: ClassSet,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
) -> Stream:
    """N-way K-shot episodes: `stream(step)` -> Episode with a leading axis T = `tasks`.

    Each task draws `ways` classes and, from each, `shots` support items and `queries` other query
    items, all without replacement. Support x: (T, ways·shots, *item), y: (T, ways·shots, ways) one-hot; rows are
    sorted by class. A draw is where the data are: `move(data, "cuda")` keeps both there. Items keep their dtype, so that
    images may stay uint8, and tokens int64, for a network that reads them; y is then of torch's default dtype. Raises
    ValueError if the data is too small for such a task.

    ```pycon
    >>> data = ClassSet(torch.rand(20, 15, 8), [str(c) for c in range(20)], "random rows")
    >>> draw = episodes(data, ways=5, shots=1, queries=3, tasks=4, seed=0)(step=17)
    >>> draw.support.x.shape, draw.query.y.shape
    (torch.Size([4, 5, 8]), torch.Size([4, 15, 5]))

    ```
    """
    positive(ways=ways, shots=shots, queries=queries, tasks=tasks)
    check_seed(seed)
    classes, items = check_classes(data)
    if ways > classes:
        raise ValueError(
            f"expected at most {classes} ways, the number of classes in {data.source!r}; got {ways}"
        )
    if shots + queries > items:
        raise ValueError(
            f"expected shots + queries ≤ {items}, the number of items per class in {data.source!r}; "
            f"got {shots} + {queries} = {shots + queries}"
        )
    flat = data.items.flatten(0, 1)  # (C·n, *item)

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        chosen = _without_replacement(rng, (tasks,), classes, ways)  # (T, W)
        picked = _without_replacement(rng, (tasks, ways), items, shots + queries)  # (T, W, K+Q)
        rows = torch.from_numpy(chosen[..., None] * items + picked).to(flat.device)
        return Episode(
            _labelled(flat, rows[:, :, :shots], ways), _labelled(flat, rows[:, :, shots:], ways)
        )

    return stream


def mixture(*datasets: Batch, batch: int, seed: int) -> Stream:
    """Batches drawn from several data sets at once: `stream(step)` -> Batch of x (T, B, *item).

    T is the number of data sets, B = `batch` items drawn from each, with replacement. `y` holds either
    targets (n, W), or class numbers (n,), which become one-hot rows as wide as all data sets together need.

    ```pycon
    >>> source, target = (Batch(torch.rand(n, 8), torch.arange(n) % 3) for n in (60, 9))
    >>> mixture(source, target, batch=32, seed=0)(step=0).x.shape
    torch.Size([2, 32, 8])

    ```
    """
    positive(batch=batch)
    check_seed(seed)
    if not datasets:
        raise ValueError("expected at least one data set, got none")
    for i, d in enumerate(datasets):
        check_rows(d, f"data set {i}")
        if d.x.shape[1:] != datasets[0].x.shape[1:]:
            raise ValueError(
                f"expected items of the same shape; data set 0 has {tuple(datasets[0].x.shape[1:])}, "
                f"data set {i} has {tuple(d.x.shape[1:])}"
            )
        if d.x.dtype != datasets[0].x.dtype:
            raise ValueError(
                f"expected items of the same dtype; data set 0 has {datasets[0].x.dtype}, data set {i} {d.x.dtype}"
            )
    numbered = [d.y.ndim == 1 for d in datasets]
    if any(numbered) and not all(numbered):
        raise ValueError(
            "expected y to be class numbers (n,) in every data set, or targets (n, W) in every one; got both"
        )
    ways = max(int(d.y.max()) + 1 for d in datasets) if all(numbered) else 0
    widths = {tuple(d.y.shape[1:]) for d in datasets}
    if len(widths) > 1:
        raise ValueError(f"expected targets of the same width in every data set, got {widths}")

    def stream(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        rows = [
            torch.from_numpy(rng.integers(len(d.x), size=batch)).to(d.x.device) for d in datasets
        ]
        x = torch.stack([d.x[r] for d, r in zip(datasets, rows, strict=True)])  # (T, B, *item)
        y = torch.stack(
            [d.y[r] for d, r in zip(datasets, rows, strict=True)]
        )  # (T, B) or (T, B, W)
        return Batch(x, one_hot(y, ways, _real(x)) if ways else y)

    return stream


def pool(data: ClassSet) -> Batch:
    """Every item with its class number: x (C·n, *item), y (C·n,) of integers."""
    classes, items = check_classes(data)
    y = torch.arange(classes, device=data.items.device).repeat_interleave(items)
    return Batch(data.items.flatten(0, 1), y)


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

    def queries(step: int) -> Batch:
        draw = stream(step)
        if not isinstance(draw, Episode):
            raise TypeError(f"expected a stream of episodes, got a {type(draw).__name__}")
        return draw.query

    return queries


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


def check_classes(data: ClassSet) -> tuple[int, int]:
    """(C, n) of a ClassSet, or an error that says what is wrong with it."""
    if not isinstance(data, ClassSet):
        raise TypeError(
            f"expected a ClassSet(items, names, source), items sorted by class, got {type(data).__name__}"
        )
    items = data.items
    if not isinstance(items, Tensor):
        raise TypeError(f"expected items in a tensor, got {_kind(items)}")
    if items.ndim < 3 or 0 in items.shape:
        raise ValueError(
            f"expected items of shape (classes, items per class, ...), at least one class of one item, got "
            f"{tuple(items.shape)}"
        )
    _readable(items, f"items of {data.source!r}")
    if len(data.names) != len(items):
        raise ValueError(
            f"expected one name per class: {len(items)} classes, {len(data.names)} names"
        )
    named = [name for name in data.names if name]  # "" is a class without a name
    if len(set(named)) != len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ValueError(f"expected classes of different names; {twice!r} stands there twice")
    return items.shape[0], items.shape[1]


def check_rows(data: Batch, what: str) -> None:
    """Raise unless x: (n, *item) and y: (n, W) or class numbers (n,) fit together and are finite."""
    if not isinstance(data, Batch):
        raise TypeError(
            f"expected {what} to be a Batch(x, y) of two tensors, got {type(data).__name__}"
        )
    for name, part in (("x", data.x), ("y", data.y)):
        check_tensor(part, f"{name} of {what}")
    if data.x.ndim < 2 or data.y.ndim < 1:
        raise ValueError(
            f"expected x (n, *item) and y (n,) or (n, W) in {what}, got {tuple(data.x.shape)} and "
            f"{tuple(data.y.shape)}. An item of one number needs its axis: x[:, None]."
        )
    _readable(data.x, f"x of {what}")
    if len(data.x) != len(data.y) or len(data.x) == 0:
        raise ValueError(
            f"expected as many labels as items in {what}, got {len(data.x)} items, {len(data.y)} labels"
        )
    if data.y.ndim == 1 and (data.y.dtype != torch.int64 or int(data.y.min()) < 0):
        raise ValueError(
            f"expected y of {what} to be targets (n, W), or class numbers (n,) of dtype int64 from 0 on; "
            f"got {tuple(data.y.shape)} of {data.y.dtype}. For regression write y[:, None]."
        )
    if data.y.ndim > 2:
        raise ValueError(f"expected y of {what} with one or two axes, got {tuple(data.y.shape)}")
    if data.y.ndim == 2:
        _real_targets(data.y, what)
    finite(data.x, f"x of {what}")
    finite(data.y, f"y of {what}")


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
                raise ValueError(
                    f"expected x (T, rows, *item) and y (T, rows, W) in {what}, got {tuple(x.shape)} and "
                    f"{tuple(part.y.shape)}. Labels are one-hot rows, regression targets need an axis W = 1."
                )
        _real_targets(part.y, what)
        for x in leaves:
            _readable(x, f"x of {what}", masks=not isinstance(part.x, Tensor), numbers=numbers)
        if numbers:
            finite(part.y, f"y of {what}")
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


def finite(x: Tensor, what: str) -> None:
    """Raise if x holds NaN or infinity, saying how many and where the first is."""
    check_tensor(x, what)
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero()
        raise ValueError(
            f"expected finite numbers in {what}; {len(bad)} are NaN or infinite, the first at {bad[0].tolist()}. "
            "Drop or impute them first."
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


def _real(x: Tensor) -> torch.dtype:
    """The dtype of the targets that go with items x: theirs, or torch's default where they are integers."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _without_replacement(
    rng: np.random.Generator, shape: tuple[int, ...], n: int, k: int
) -> np.ndarray:
    """k different numbers below n, for each cell of `shape`: (*shape, k)."""
    return np.argsort(rng.random((*shape, n)), axis=-1)[..., :k]


def _labelled(flat: Tensor, rows: Tensor, ways: int) -> Batch:
    tasks, _, k = rows.shape  # (T, W, k)
    y = torch.arange(ways, device=rows.device).repeat_interleave(k).expand(tasks, -1)
    return Batch(flat[rows.flatten(1)], one_hot(y, ways, _real(flat)))
