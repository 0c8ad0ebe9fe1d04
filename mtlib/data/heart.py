"""Heart disease in four hospitals {cite}`detrano1989heart`; drawn patients without file and network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtlib.data.download import Remote, Unreachable, fetch
from mtlib.data.parsing import content, number, parsing
from mtlib.tasks import check_seed, positive

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"

FILES = {
    "Cleveland": Remote(
        "heart/processed.cleveland.data",
        f"{_UCI}/processed.cleveland.data",
        ("a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",),
        size=18_461,
    ),
    "Hungarian": Remote(
        "heart/processed.hungarian.data",
        f"{_UCI}/processed.hungarian.data",
        ("d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",),
        size=10_263,
    ),
    "Switzerland": Remote(
        "heart/processed.switzerland.data",
        f"{_UCI}/processed.switzerland.data",
        ("834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",),
        size=4_109,
    ),
    "VA Long Beach": Remote(
        "heart/processed.va.data",
        f"{_UCI}/processed.va.data",
        ("e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",),
        size=6_737,
    ),
}

COLUMNS = (
    "age",
    "sex",
    "cp",
    "trestbps",
    "chol",
    "fbs",
    "restecg",
    "thalach",
    "exang",
    "oldpeak",
    "slope",
    "ca",
    "thal",
)
"""Years; 1 male; chest pain 1-4; resting pressure, mm Hg; cholesterol, mg/dl; fasting sugar > 120 mg/dl; resting ECG
0-2; highest heart rate; angina on exercise; ST depression; slope 1-3; vessels coloured 0-3; thallium 3, 6, 7."""

LEVELS = {"cp": (1, 2, 3), "restecg": (1, 2), "slope": (2, 3), "thal": (6, 7)}
"""Numbers that are codes for categories: each listed one gets a column, the one left out is the reference."""


RANGES = {
    "age": (1, 120),
    "sex": (0, 1),
    "cp": (1, 2, 3, 4),
    "trestbps": (0, 300),
    "chol": (0, 1000),
    "fbs": (0, 1),
    "restecg": (0, 1, 2),
    "thalach": (20, 250),
    "exang": (0, 1),
    "oldpeak": (-10, 10),
    "slope": (1, 2, 3),
    "ca": (0, 1, 2, 3),
    "thal": (3, 6, 7),
}
"""What a column may hold: the codes of a category, or, for a measurement, from and to. A file with anything else is
refused; a pressure or cholesterol of 0 is let through, and counts as missing."""

_MEASURED = ("age", "trestbps", "chol", "thalach", "oldpeak")


class Hospital(NamedTuple):
    """Patients of one hospital, as measured."""

    x: np.ndarray  # (n, 13) in the order of COLUMNS; NaN where missing
    y: np.ndarray  # (n,) 1 where a vessel is narrowed by more than half
    zero: np.ndarray  # (n, 13) where the file has a 0 that no patient can have: missing in x
    source: str


def hospitals() -> dict[str, Hospital]:
    """The four hospitals, or four drawn ones without file and network; each `source` says which.

    A cholesterol or blood pressure of 0 counts as missing. Raises `mtlib.data.download.Altered` for a wrong digest.
    """
    try:
        return {name: read(fetch(remote), name) for name, remote in FILES.items()}
    except Unreachable:
        return drawn()


def read(path: Path, name: str) -> Hospital:
    """One file of comma-separated numbers, `?` where missing, the last column 0 (healthy) to 4.

    Raises ValueError for another number of columns, and for what is not in `RANGES`.
    """
    with parsing(path, "a file of heart patients"):
        table = np.array([_patient(line) for line in content(path).decode("ascii").split()])
        if not len(table):
            raise ValueError("expected at least one patient")
    x, y = table[:, :13], (table[:, 13] > 0).astype(np.int64)
    zero = (x == 0) & np.isin(COLUMNS, ("chol", "trestbps"))
    return Hospital(
        np.where(zero, np.nan, x), y, zero, f"{name}, {len(y)} patients, {y.sum()} ill (real)"
    )


def _patient(line: str) -> list[float]:
    values = line.split(",")
    if len(values) != 14:
        raise ValueError(f"expected 14 columns, got {len(values)} in {line[:80]!r}")
    row = [
        np.nan if v == "?" else number(v, RANGES[name][0], RANGES[name][-1], name)
        for name, v in zip(COLUMNS, values[:13], strict=True)
    ]
    for name, v in zip(COLUMNS, row, strict=True):
        if name not in _MEASURED and not np.isnan(v) and v not in RANGES[name]:
            raise ValueError(f"expected {name} to be one of {RANGES[name]}, got {v:g}")
    last = number(values[13], 0, 4, "the diagnosis")
    if last != int(last):
        raise ValueError(f"expected the diagnosis to be a whole number, got {last:g}")
    return [*row, last]


def as_written(hospital: Hospital) -> np.ndarray:
    """(n, 13) measurements with the impossible zeros put back, for benchmarks that keep them."""
    return np.where(hospital.zero, 0.0, hospital.x)


def drawn(seed: int = 0) -> dict[str, Hospital]:
    """Four hospitals drawn from a seed: the same disease, but different shares of ill patients, ages and missing values."""
    check_seed(seed)
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=13) / np.sqrt(13)
    low = np.array([30, 0, 1, 90, 120, 0, 0, 70, 0, 0, 1, 0, 3.0])
    high = np.array([75, 1, 4, 200, 400, 1, 2, 200, 1, 5, 3, 3, 7.0])
    whole = [COLUMNS.index(c) for c in ("sex", "cp", "fbs", "restecg", "exang", "slope", "ca")]
    found = {}
    sizes = {"Cleveland": 300, "Hungarian": 290, "Switzerland": 120, "VA Long Beach": 200}
    for (name, n), share in zip(sizes.items(), (0.46, 0.36, 0.9, 0.74), strict=True):
        y = (rng.random(n) < share).astype(np.int64)
        own = direction + 0.3 * rng.normal(size=13) / np.sqrt(13)
        u = rng.normal(size=(n, 13)) + np.outer(y - 0.5, own) * 2 + 0.3 * rng.normal(size=13)
        x = low + (high - low) / (1 + np.exp(-u))
        x[:, whole] = x[:, whole].round()
        x[:, 12] = np.array([3, 6, 7])[np.clip((x[:, 12] - 3) // 1.5, 0, 2).astype(int)]
        often = rng.random(13) < (0.0 if name == "Cleveland" else 0.3)
        x[rng.random((n, 13)) < np.where(often, 0.6, 0.01)] = np.nan
        zero = np.zeros((n, 13), dtype=bool)
        found[name] = Hospital(
            x, y, zero, f"{name}, {n} patients drawn from seed {seed} (stand-in)"
        )
    return found


def encode(x: np.ndarray) -> np.ndarray:
    """(n, 13) -> (n, 18): categories become columns of 0 and 1, missing values stay NaN."""
    if x.ndim != 2 or x.shape[1] != len(COLUMNS):
        raise ValueError(f"expected patients (n, 13), in the order of COLUMNS, got {x.shape}")
    columns = []
    for j, name in enumerate(COLUMNS):
        if name in LEVELS:
            for level in LEVELS[name]:
                columns.append(np.where(np.isnan(x[:, j]), np.nan, x[:, j] == level))
        else:
            columns.append(x[:, j])
    return np.stack(columns, 1)


class Preparation(NamedTuple):
    """What is learned from the source's patients before any model: fills and scales."""

    fill: np.ndarray  # the mean of each column, for missing values
    centre: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[1] != len(self.fill):
            raise ValueError(f"expected encoded patients (n, {len(self.fill)}), got {x.shape}")
        filled: np.ndarray = np.where(np.isnan(x), self.fill, x)
        scaled: np.ndarray = (filled - self.centre) / self.scale
        return scaled


def prepare(x: np.ndarray) -> Preparation:
    """Fit a Preparation on encoded patients (n, D); a column without a value is filled with 0."""
    if x.ndim != 2 or not len(x) or np.isinf(x).any():
        raise ValueError(
            f"expected encoded patients (n, D), at least one patient, finite or NaN where missing; got {x.shape}"
        )
    present = ~np.isnan(x)
    fill = np.where(present, x, 0).sum(0) / np.maximum(present.sum(0), 1)
    whole = np.where(present, x, fill)
    scale = whole.std(0)
    return Preparation(fill, whole.mean(0), np.where(scale > 0, scale, 1.0))


class Pool(NamedTuple):
    """Patients of several hospitals as one table, and those of another hospital on the same scale."""

    x: np.ndarray  # (n, D) of the other hospital, the target
    xs: np.ndarray  # (N, D) of the sources, one after another
    ys: np.ndarray  # (N,) their outcomes
    whose: np.ndarray  # (N,) the name of each one's hospital


def pooled(
    sources: Mapping[str, Hospital],
    target: Hospital,
    read: Callable[[Hospital], np.ndarray] | None = None,
    own_scale: bool = False,
    limit: float = np.inf,
) -> Pool:
    """The sources' patients together, and the target's filled and scaled by what the sources have.

    `read(hospital)` -> (n, D) says what a model sees of the patients, by default `encode` of the measurements. With
    `own_scale` each hospital is filled and scaled by itself instead, which takes away what sets its patients apart. What
    lies more than `limit` deviations off is brought to there: a measurement that the sources hardly made has a small
    deviation among them, and large values elsewhere. Raises ValueError without a source, or unless limit > 0.
    """
    if not sources or not limit > 0:
        raise ValueError(
            f"expected at least one source hospital and a limit above 0, got {len(sources)} and {limit!r}"
        )
    seen = {name: (read or _encoded)(h) for name, h in sources.items()}
    common, there = prepare(np.concatenate([*seen.values()])), (read or _encoded)(target)
    z = {name: (prepare(x) if own_scale else common)(x) for name, x in seen.items()}
    return Pool(
        (prepare(there) if own_scale else common)(there).clip(-limit, limit),
        np.concatenate([*z.values()]).clip(-limit, limit),
        np.concatenate([h.y for h in sources.values()]),
        np.repeat([*sources], [len(h.y) for h in sources.values()]),
    )


def _encoded(hospital: Hospital) -> np.ndarray:
    return encode(hospital.x)


def labelled(y: np.ndarray, labels: int, draws: int, seed: int) -> list[tuple[np.ndarray, ...]]:
    """`draws` pairs of row numbers: `labels` patients to learn from, and all others to test on.

    At least one patient of each class is learned from and at least two of each are tested: other draws are drawn
    again. Raises ValueError if there are too few patients for that.
    """
    positive(draws=draws, labels=labels)
    check_seed(seed)
    if y.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"expected y (n,) of 0 and 1, healthy and ill, got {y.shape} of {np.unique(y)[:5].tolist()}"
        )
    if not 2 <= labels <= len(y) - 4 or min((y == 0).sum(), (y == 1).sum()) < 3:
        raise ValueError(
            f"expected from 2 to {len(y) - 4} labels and at least 3 patients of each class; "
            f"got {labels} labels, {(y == 0).sum()} healthy and {(y == 1).sum()} ill"
        )
    rng, found = np.random.default_rng(seed), list[tuple[np.ndarray, ...]]()
    while len(found) < draws:
        chosen, rest = np.split(rng.permutation(len(y)), [labels])
        counts = [((y[chosen] == c).sum(), (y[rest] == c).sum()) for c in (0, 1)]
        if all(a >= 1 and b >= 2 for a, b in counts):
            found.append((chosen, rest))
    return found
