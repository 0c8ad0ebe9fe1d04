"""What the page on learning in context needs for tables: ten real ones, the same splits for all, and rivals tuned on the rows they have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn import datasets
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.book.contest import TUNING_SEED, Trial
from mtlib.core import Batch, Episode, Learner, Params
from mtlib.data import heart
from mtlib.data.tables import prepared, standardised
from mtlib.data.tables import tables as made_up
from mtlib.evaluate import answers
from mtlib.learners.amortised import in_context
from mtlib.nets import seeded, two_halves
from mtlib.tasks import check_seed, functions, positive, within
from mtlib.train import cosine_adam, fit

ROWS = (10, 25, 50, 100)
COLUMNS = 30  # of the network
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of its training
MADE_UP = 16  # made-up tables of each seed that nobody trained on
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)  # C of logistic regression
LEAVES = (2, 4, 8)
TREES = (1, 2, 5, 10, 20, 40)
FLOOR = 1e-3  # no probability is below: one certain error would decide a mean

Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`classifier(x, y, asked)`: rows (n, d) and classes (n,) to learn from, rows (Q, d) -> the probability of class 1 (Q,)."""


class Table(NamedTuple):
    """A measured table of two classes."""

    x: np.ndarray  # (n, d), NaN where missing
    y: np.ndarray  # (n,) 0 or 1
    source: str


def real_tables() -> dict[str, Table]:
    """Four hospitals, and six tables that scikit-learn brings along; those of several classes as one against the rest.

    Hospitals: 18 columns, a vessel narrowed or not. Cancer: 30 columns, benign or not. Diabetes: 10 columns, progression
    above its median or not. Iris: 4 columns, versicolor or another; wine: 13 columns, the second cultivar or another.
    Digits: two pairs that look alike, by the first ten principal components of all images of the pair, which no label
    enters. Without file and network the hospitals are drawn, and their source says so.
    """
    found = {name: Table(heart.encode(h.x), h.y, h.source) for name, h in heart.hospitals().items()}
    x, y = datasets.load_breast_cancer(return_X_y=True)
    found["cancer"] = _own("breast cancer", x, y)
    x, y = datasets.load_diabetes(return_X_y=True)
    found["diabetes"] = _own("diabetes", x, y > np.median(y))
    x, y = datasets.load_iris(return_X_y=True)
    found["iris"] = _own("iris", x, y == 1)
    x, y = datasets.load_wine(return_X_y=True)
    found["wine"] = _own("wine", x, y == 1)
    x, y = datasets.load_digits(return_X_y=True)
    for a, b in ((3, 8), (4, 9)):
        pair = np.isin(y, (a, b))
        parts = PCA(10, svd_solver="full").fit_transform(x[pair])
        found[f"digits {a}, {b}"] = _own(f"digits {a} and {b}", parts, y[pair] == b)
    return found


def source_of(tables: Mapping[str, Table]) -> str:
    """One line on all tables; it ends in "(real)" where each of them was measured."""
    if not tables:
        raise ValueError("expected at least one table, got none")
    drawn = [name for name, t in tables.items() if not t.source.endswith("(real)")]
    what = f"{len(tables)} tables of {sum(len(t.y) for t in tables.values())} rows"
    return f"{what}, {', '.join(drawn)} drawn (stand-in)" if drawn else f"{what} (real)"


def _own(name: str, x: np.ndarray, y: np.ndarray) -> Table:
    return Table(
        x.astype(float), y.astype(np.int64), f"{name}, {len(y)} rows, scikit-learn's (real)"
    )


# Rivals --------------------------------------------------------------------------------------


def majority(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The share of class 1 among the rows, with one more of each class: (k + 1) / (n + 2)."""
    _check(x, y, asked)
    return np.full(len(asked), (y.sum() + 1) / (len(y) + 2))


def logistic(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Logistic regression on standardised columns, with the C out of `STRENGTHS` that has the lowest log-loss in five folds."""
    _check(x, y, asked)

    def fitted(c: float, x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
        model = LogisticRegression(C=c, max_iter=500).fit(x, y)
        return np.asarray(model.predict_proba(asked)[:, 1])

    losses = np.zeros(len(STRENGTHS))
    for a, b in _folds(y):
        losses += [_off(fitted(c, *_apart(x[a], x[b], y[a])), y[b]) for c in STRENGTHS]
    return fitted(STRENGTHS[int(losses.argmin())], *_apart(x, asked, y))


def boosting(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Gradient boosting at a rate of .2, with the leaves and the number of trees that have the lowest log-loss in five folds.

    Leaves out of `LEAVES`, trees out of `TREES`; a leaf needs two rows, not scikit-learn's twenty.
    """
    _check(x, y, asked)

    def stages(leaves: int, x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
        model = HistGradientBoostingClassifier(
            learning_rate=0.2,
            max_iter=TREES[-1],
            max_leaf_nodes=leaves,
            min_samples_leaf=2,
            early_stopping=False,
            random_state=0,
        ).fit(x, y)
        each = [p[:, 1] for p in model.staged_predict_proba(asked)]
        return np.stack([each[t - 1] for t in TREES])

    losses = np.zeros((len(LEAVES), len(TREES)))
    for a, b in _folds(y):
        there = [stages(leaves, *_apart(x[a], x[b], y[a])) for leaves in LEAVES]
        losses += [[_off(p, y[b]) for p in each] for each in there]
    leaves, trees = np.unravel_index(losses.argmin(), losses.shape)
    found: np.ndarray = stages(LEAVES[leaves], *_apart(x, asked, y))[trees]
    return found


def _check(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> None:
    """ValueError unless these are rows of one table, and their classes 0 and 1, both there."""
    if x.ndim != 2 or y.shape != x.shape[:1] or asked.ndim != 2 or asked.shape[1] != x.shape[1]:
        raise ValueError(
            "expected rows (n, d), classes (n,) of 0 and 1, both classes there, and rows to ask (Q, d); got "
            f"{x.shape}, {y.shape} and {asked.shape}"
        )
    if not np.isin(y, (0, 1)).all() or not 0 < y.sum() < len(y):
        raise ValueError(f"expected both classes, 0 and 1, and no other, got {np.unique(y)[:5]}")


def _apart(x: np.ndarray, asked: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows to learn from, their classes and rows to ask, all standardised by the former."""
    z = standardised(np.concatenate([x, asked]), len(x))
    return z[: len(x)], y, z[len(x) :]


def _folds(y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Five parts with like shares of the classes; a fold whose training rows are of one class is left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        parts = [*StratifiedKFold(5, shuffle=True, random_state=0).split(y[:, None], y)]
    for a, b in parts:
        if 0 < y[a].sum() < len(a):
            yield a, b


# The network ---------------------------------------------------------------------------------


def reading(learner: Learner, phi: Params, columns: int, orders: int = 1) -> Classifier:
    """A trained learner as a classifier: it reads the rows to learn from, and answers; nothing is tuned.

    With `orders` above 1 it reads the table so many times, with its columns in another order and, each second time, with
    the classes swapped, and the probabilities are averaged {cite}`hollmann2023tabpfn`.
    """
    positive(columns=columns, orders=orders)

    def classifier(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
        _check(x, y, asked)
        rng, n, d = np.random.default_rng(0), len(x), x.shape[1]
        every = np.concatenate([x, asked])
        order = [np.arange(d), *(rng.permutation(d) for _ in range(orders - 1))]
        z = np.stack([prepared(every[:, o], n, columns) for o in order])
        swapped = np.arange(orders) % 2
        ys = np.eye(2)[y[None] ^ swapped[:, None]]
        like = next(iter(phi.values()))
        xs, seen = torch.from_numpy(z).to(like), torch.from_numpy(ys).to(like)
        query = Batch(xs[:, n:], seen.new_zeros(orders, len(asked), 2))
        said = answers(learner, phi, Episode(Batch(xs[:, :n], seen), query))
        p = torch.softmax(said.double(), -1).cpu().numpy()
        found: np.ndarray = np.mean([p[i, :, 1 - swapped[i]] for i in range(orders)], 0)
        return found

    return classifier


def trained(
    rate: float, seed: int, steps: int = 600, columns: int = COLUMNS
) -> tuple[Learner, Params]:
    """A transformer of three layers, 64 wide, after `steps` of 32 made-up tables each: the learner and φ.

    It minimises the log-loss of 30 query rows a table, `mtlib.data.tables.tables`, by Adam with half a cosine.
    """
    positive(steps=steps, columns=columns)
    within(0, rate=rate)
    with seeded(seed):
        net = two_halves(nn.Identity(), nn.Linear(columns, 2))
        learner = in_context(net, ways=2, hidden=64, layers=3)
        phi = learner.init()
    stream = made_up(columns, queries=30, tasks=32, seed=seed)
    run = fit(
        bilevel(learner, cross_entropy),
        phi,
        stream,
        steps,
        seed=seed,
        progress=False,
        **cosine_adam(rate, steps),
    )
    return learner, run.params


# Scores --------------------------------------------------------------------------------------


def contenders(
    tables: Mapping[str, Table],
    steps: int = 600,
    splits: int = 2,
    rows: Sequence[int] = ROWS,
    drawn: int = MADE_UP,
) -> dict[str, Trial]:
    """The contenders of `mtlib.book.contest.measured`: network, logistic regression, boosting and the share of a class.

    All meet the splits of `scored`, `splits` of each table and number of rows for each seed, and `drawn` made-up tables of
    50 rows, which nobody trained on. The network's rate is chosen on other made-up tables, after a quarter of the `steps`;
    the other classifiers choose on the rows that they are given. `quality` is minus the log-loss on made-up tables.
    """
    positive(steps=steps, splits=splits, drawn=drawn)
    train = cache(trained)

    def read(rate: float, seed: int, length: int) -> Classifier:
        return reading(*train(rate, seed, length), COLUMNS)

    def trial(kind: str, make: Callable[..., Classifier], settings: Sequence[float | str]) -> Trial:
        def test(setting: float | str, seed: int) -> dict[str, tuple[float, Tensor]]:
            return _everywhere(make(setting, seed, steps), tables, rows, splits, drawn, seed)

        def quality(setting: float | str) -> float:
            classifier = make(setting, TUNING_SEED, max(1, steps // 4))
            return -on_made_up(classifier, drawn, TUNING_SEED)[0]

        return Trial(kind, test, quality, settings)

    found = {"in context": trial("meta", read, RATES)}
    for name, rival in (
        ("logistic regression", logistic),
        ("boosting", boosting),
        ("share of the class", majority),
    ):
        found[name] = trial("baseline", partial(_whatever, rival), ("on the rows it has",))
    return found


def lengths(
    tables: Mapping[str, Table],
    rate: float,
    steps: tuple[int, int] = (600, 1800),
    splits: int = 2,
    rows: Sequence[int] = ROWS,
    drawn: int = MADE_UP,
) -> dict[str, dict[str, list[float]]]:
    """A network after a short and after a long training, on what `contenders` meets with seed 0: name -> column -> each table.

    Names are "short", "long", "long, 8 orders", which reads each table eight times as `reading` says, and "logistic
    regression". Numbers have four digits, for a record.
    """
    short, long = (trained(rate, 0, n) for n in steps)
    ways = {
        "short": reading(*short, COLUMNS),
        "long": reading(*long, COLUMNS),
        "long, 8 orders": reading(*long, COLUMNS, 8),
        "logistic regression": logistic,
    }
    found = {}
    for name, classifier in ways.items():
        whole = _everywhere(classifier, tables, rows, splits, drawn, 0)
        found[name] = {
            c: [float(f"{v:.4g}") for v in each.tolist()] for c, (_, each) in whole.items()
        }
    return found


def _everywhere(
    classifier: Classifier,
    tables: Mapping[str, Table],
    rows: Sequence[int],
    splits: int,
    drawn: int,
    seed: int,
) -> dict[str, tuple[float, Tensor]]:
    """`scored` on the measured tables, and on `drawn` made-up ones."""
    found = scored(classifier, tables, rows, splits, seed)
    return {**found, "log-loss, made up": on_made_up(classifier, drawn, 1 + seed)}


def _whatever(rival: Classifier, setting: float | str, seed: int, length: int) -> Classifier:
    """A rival as it is: what it chooses, it chooses on the rows that it is given."""
    return rival


def on_made_up(
    classifier: Classifier, drawn: int, seed: int, columns: int = COLUMNS
) -> tuple[float, Tensor]:
    """The log-loss on `drawn` made-up tables of 50 rows to learn from and 50 to be asked: their mean, and each one's."""
    positive(drawn=drawn)
    check_seed(seed)
    stream = made_up(columns, (50, 50), 50, drawn, 900_000 + seed)
    (x, y), (asked, truth) = stream(0)
    each = []
    for i in range(drawn):
        real = (x[i] != 0).any(0) | (asked[i] != 0).any(0)  # columns that the table has
        a, b = (v[i][:, real].double().numpy() for v in (x, asked))
        p = classifier(a, y[i, :, 1].long().numpy(), b)
        each.append(_off(p, truth[i, :, 1].long().numpy()))
    return math.fsum(each) / drawn, torch.tensor(each, dtype=torch.float64)


def scored(
    classifier: Classifier,
    tables: Mapping[str, Table],
    rows: Sequence[int] = ROWS,
    splits: int = 3,
    seed: int = 0,
) -> dict[str, tuple[float, Tensor]]:
    """Column -> its mean over tables, and each table's number: what `mtlib.book.contest.measured` asks of a trial.

    Columns are "log-loss, 10 rows", … and "accuracy, 10 rows", … Each table is split `splits` times for each number of
    rows: so many to learn from, at least one of each class, and all others to be asked. The splits follow `seed` alone,
    so all classifiers meet the same ones. Raises ValueError where an answer is no probability.
    """
    functions(3, classifier=classifier)
    positive(splits=splits)
    check_seed(seed)
    if not tables or not rows:
        raise ValueError(
            f"expected at least one table and number of rows, got {len(tables)} and {rows}"
        )
    found: dict[str, list[float]] = {
        f"{what}, {n} rows": [] for what in ("log-loss", "accuracy") for n in rows
    }
    for table in tables.values():
        for n in rows:
            each = []
            for train, test in heart.labelled(table.y, n, splits, 10_007 * seed + n):
                p = classifier(table.x[train], table.y[train], table.x[test])
                if p.shape != test.shape or not ((p >= 0) & (p <= 1)).all():
                    raise ValueError(
                        f"expected a probability for each of {len(test)} rows, got {p.shape}"
                    )
                y = table.y[test]
                each.append((_off(p, y), float(((p > 0.5) == y).mean())))
            loss, right = np.mean(each, 0)
            found[f"log-loss, {n} rows"].append(float(loss))
            found[f"accuracy, {n} rows"].append(float(right))
    parts = {c: torch.tensor(v, dtype=torch.float64) for c, v in found.items()}
    return {c: (math.fsum(v) / len(v), parts[c]) for c, v in found.items()}


def _off(p: np.ndarray, y: np.ndarray) -> float:
    """The mean log-loss, each probability at least `FLOOR` from 0 and 1."""
    q = np.where(y == 1, p, 1 - p).clip(FLOOR, 1 - FLOOR)
    return float(-np.log(q).mean())
