"""Made-up tables of two classes, drawn from a prior over how a table comes about {cite}`muller2022pfn,hollmann2023tabpfn`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mtlib.core import Batch, Episode, Stream
from mtlib.tasks import check_seed, positive, whole

LIMIT = 4.0  # standardised values beyond it are brought to here

Rng = np.random.Generator
"""The source of all draws: numpy's generator."""


def tables(
    columns: int = 30,
    rows: tuple[int, int] = (5, 100),
    queries: int = 50,
    tasks: int = 16,
    seed: int = 0,
    kinds: Sequence[str] = (),
) -> Stream:
    """Classification tables that nobody measured: each task is a table of its own, with two classes.

    A table has d columns, log d ~ U(log 2, log `columns`), and comes about in one of the ways of `KINDS`, or of those
    named in `kinds`: a score s(x) of its rows and a cut of it, where the share of the first class is ~ U(.1, .9) and the
    noise beside the score has a deviation of u² score deviations, u ~ U(0, 1). Some columns are then bent, some cut to a few
    levels, so that they look like categories, some replaced by noise. Tables in which a class has no support row are
    drawn again. `prepared` makes x of them: the same that it makes of a real table.

    All tables of a step have N support rows, log N ~ U(log rows[0], log rows[1]). `stream(step)` -> Episode, support x
    (T, N, `columns`), y (T, N, 2) one-hot, query x (T, `queries`, `columns`). Raises ValueError for an unknown kind, for
    fewer than 2 columns and for rows other than (from, to), from at least 2.

    ```pycon
    >>> draw = tables(columns=10, rows=(20, 20), queries=5, tasks=4)(step=17)
    >>> draw.support.x.shape, draw.query.y.shape
    (torch.Size([4, 20, 10]), torch.Size([4, 5, 2]))

    ```
    """
    positive(queries=queries, tasks=tasks)
    check_seed(seed)
    whole(columns=columns)
    chosen = _kinds(kinds)
    low, high = _limits(rows)
    if columns < 2:
        raise ValueError(f"expected at least 2 columns, got {columns}")

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step, 83])
        n = _log_uniform(rng, low, high)
        drawn = [_table(rng, chosen, columns, n, n + queries) for _ in range(tasks)]
        x = torch.from_numpy(np.stack([prepared(x, n, columns) for x, _ in drawn])).float()
        y = torch.from_numpy(np.eye(2)[np.stack([y for _, y in drawn])]).float()
        return Episode(Batch(x[:, :n], y[:, :n]), Batch(x[:, n:], y[:, n:]))

    return stream


def prepared(x: np.ndarray, support: int, columns: int) -> np.ndarray:
    """A table as the network reads it: (rows, d) -> (rows, `columns`), by what its first `support` rows say.

    Missing values (NaN) become the mean of their column, each column gets mean 0 and deviation 1 on the support rows and
    is cut at ±4; then all are multiplied by √(columns / d), so that a row's length does not depend on d, and zeros fill
    the columns that the table has not. Raises ValueError for more columns, and like `standardised`.
    """
    z = standardised(x, support)
    if not 0 < z.shape[1] <= columns:
        raise ValueError(f"expected a table (rows, d) with d from 1 to {columns}, got {x.shape}")
    wide = np.zeros((len(z), columns))
    wide[:, : z.shape[1]] = z * math.sqrt(columns / z.shape[1])
    return wide


def standardised(x: np.ndarray, support: int) -> np.ndarray:
    """The same (rows, d), without scale and zeros: what any other classifier is given.

    Raises ValueError unless x is a table (rows, d), finite or NaN where missing, and `support` from 1 to all of its rows.
    """
    if x.ndim != 2 or not 1 <= support <= len(x) or np.isinf(x).any():
        raise ValueError(
            "expected a table (rows, d), finite or NaN where missing, and 1 to all of its rows to learn from; got "
            f"{x.shape} and {support}"
        )
    known = ~np.isnan(x[:support])
    total = np.where(known, x[:support], 0).sum(0)
    mean = total / np.maximum(known.sum(0), 1)
    filled = np.where(np.isnan(x), mean, x) - mean
    deviation = np.sqrt((filled[:support] ** 2).mean(0))
    z: np.ndarray = filled / np.where(deviation > 1e-9, deviation, 1.0)
    return z.clip(-LIMIT, LIMIT)


# How a table comes about: (rng, rows, columns) -> x (rows, d), a score (rows,) -----------------


def linear(rng: Rng, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """s = xᵀw of correlated columns; few of the weights are large."""
    x = _correlated(rng, rows, d)
    return x, x @ _weights(rng, d)


def network(rng: Rng, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """s = vᵀ tanh(xW + b) of correlated columns, with a few hidden units."""
    x, hidden = _correlated(rng, rows, d), rng.integers(2, 9)
    w = np.stack([_weights(rng, d) for _ in range(hidden)], 1)
    bend = rng.uniform(0.5, 3)
    return x, np.tanh(bend * (x @ w + rng.normal(size=hidden))) @ rng.normal(size=hidden)


def steps(rng: Rng, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """s is a sum of leaves of a few trees: each asks for one to three columns whether they lie above a threshold."""
    x, score = _correlated(rng, rows, d), np.zeros(rows)
    for _ in range(rng.integers(1, 6)):
        depth = rng.integers(1, 4)
        asked = rng.integers(d, size=depth)
        above = x[:, asked] > rng.normal(scale=0.7, size=depth)
        score += rng.normal(size=2**depth)[above @ (1 << np.arange(depth))]
    return x, score


def causal(rng: Rng, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and score are nodes of one random network of causes, so that a column may be a cause, an effect or neither."""
    wide = max(4, (d + 3) // 2)
    h, nodes = rng.normal(size=(rows, wide)), []
    bend = (np.tanh, lambda v: np.maximum(v, 0), lambda v: v)[rng.integers(3)]
    for _ in range(3):
        w = rng.normal(size=(wide, wide)) * (rng.random((wide, wide)) < 3 / wide)
        h = bend(h @ w) + rng.uniform(0.05, 0.5) * rng.normal(size=(rows, wide))
        nodes.append(h)
    every = np.concatenate(nodes, 1)
    picked = rng.permutation(every.shape[1])
    return every[:, picked[1 : d + 1]], every[:, picked[0]]


def classes(rng: Rng, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """The class comes first and moves the columns: x = s δ + correlated noise, of another spread in each class."""
    s = np.sign(rng.uniform(-1, 1, rows) + rng.uniform(-0.5, 0.5))
    spread = np.where(s[:, None] > 0, 1.0, np.exp(rng.normal(scale=0.4, size=d)))
    x = _correlated(rng, rows, d) * spread + s[:, None] * rng.uniform(0.3, 2) * _weights(rng, d)
    return x, s


Kind = Callable[[Rng, int, int], tuple[np.ndarray, np.ndarray]]
"""`kind(rng, rows, d)` -> the columns x (rows, d), and a score (rows,) that the class is a cut of."""

KINDS: dict[str, Kind] = {f.__name__: f for f in (linear, network, steps, causal, classes)}
"""The ways in which a table comes about, by name."""


def _table(
    rng: Rng, kinds: Sequence[Kind], columns: int, support: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """x (rows, d) as it would be measured, and the class (rows,) of each row; both classes are among the support rows."""
    d = _log_uniform(rng, 2, columns)
    while True:
        x, s = kinds[int(rng.integers(len(kinds)))](rng, rows, d)
        s = (s - s.mean()) / (s.std() + 1e-9)
        s = s + rng.uniform(0, 1) ** 2 * rng.normal(size=rows)
        y = (s > np.quantile(s, rng.uniform(0.1, 0.9))).astype(int)
        if 0 < y[:support].sum() < support:
            return _measured(rng, x), y if rng.random() < 0.5 else 1 - y


def _measured(rng: Rng, x: np.ndarray) -> np.ndarray:
    """The columns as a file has them: bent, of a few levels, or nothing but noise."""
    z: np.ndarray = (x - x.mean(0)) / (x.std(0) + 1e-9)
    how = rng.random(len(z[0]))
    strange, levels = rng.uniform(0, 0.4), rng.uniform(0, 0.6)
    for j, u in enumerate(how):
        if u < strange * 0.5:
            z[:, j] = np.exp(rng.uniform(0.3, 1) * z[:, j])
        elif u < strange:
            z[:, j] = rng.normal(size=len(z))
        elif u < strange + levels * (1 - strange):
            cuts = np.sort(rng.normal(size=rng.integers(1, 5)))
            z[:, j] = np.searchsorted(cuts, z[:, j])
    return z


def _correlated(rng: Rng, rows: int, d: int) -> np.ndarray:
    """(rows, d) normal columns that share a few causes, strongly or hardly."""
    causes = rng.integers(1, d + 1)
    shared = rng.normal(size=(rows, causes)) @ rng.normal(size=(causes, d)) / math.sqrt(causes)
    share = rng.uniform(0, 1) ** 2
    own = rng.normal(size=(rows, d))
    x: np.ndarray = math.sqrt(share) * shared + math.sqrt(1 - share) * own
    return x


def _weights(rng: Rng, d: int) -> np.ndarray:
    """(d,) normal weights of length 1, of which a share between one column and all is not 0."""
    w = rng.normal(size=d) * (rng.random(d) < rng.uniform(0.1, 1))
    w[rng.integers(d)] += rng.normal()
    unit: np.ndarray = w / np.linalg.norm(w)
    return unit


def _log_uniform(rng: Rng, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(math.log(low), math.log(high + 1))).clip(low, high))


def _limits(rows: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(rows, tuple | list) or len(rows) != 2:
        raise ValueError(f"expected rows as (from, to), from at least 2, got {rows!r}")
    low, high = rows
    positive(**{"rows, from": low, "rows, to": high})
    if not 2 <= low <= high:
        raise ValueError(f"expected rows as (from, to), from at least 2, got {rows}")
    return low, high


def _kinds(kinds: Sequence[str]) -> list[Kind]:
    names = list(kinds) or list(KINDS)
    if isinstance(kinds, str) or not all(k in KINDS for k in names):
        raise ValueError(f"expected kinds out of {list(KINDS)}, got {kinds!r}")
    return [KINDS[k] for k in names]
