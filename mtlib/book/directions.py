"""Contests of adaptation between domains: every method goes in every direction, with the same seeds.

As in `mtlib.book.contest`, a recording runs all, and a reader's run is held to it. No setting is tuned here: a target without
labels has nothing to tune on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlib.book.contest import Contest, Pieces, check_contenders, same_as_recorded
from mtlib.book.results import agrees, kept, recording
from mtlib.core import expect
from mtlib.evaluate import Score, compare, interval
from mtlib.tasks import positive

Direction = tuple[str, str]
"""Names of the source and of the target."""

Adapt = Callable[[str, str, int], Mapping[str, Tensor]]
"""`adapt(source, target, seed)` -> column -> what is right of the target's test items (n,), 0 or 1."""


class Method(NamedTuple):
    """A way to a target; `kind` is "baseline", "transfer" or "meta". A column may also hold one number, such as a criterion."""

    kind: str
    adapt: Adapt


def directions(
    page: str,
    name: str,
    methods: Mapping[str, Method],
    between: Sequence[Direction],
    data: str,
    live: Sequence[str] = (),
    here: int = 2,
    seeds: int = 5,
) -> Contest:
    """Run every method in all directions with all seeds; with a record of the page, those of `live` in the first `here`.

    Returns a `Contest` whose groups are the directions: `rows`, `minus` and `mean` are over directions and seeds, `each` gives
    (directions, seeds). Without a record the live methods run in these directions alone, with seed 0. Raises ValueError where a
    run is not one of those that the record has, and for a record of other methods or directions.
    """
    _check(methods, between, live)
    positive(here=here, seeds=seeds)
    details = kept(page, data.endswith("(real)"))
    old = details.get(name, {})
    if details:
        _check_record(page, old, methods, between)
    pieces = Pieces(page, name)
    shown: dict[str, dict[str, Score]] = {}
    ways: dict[str, Any] = {}
    among = between if recording() else between[:here]
    for called, method in methods.items():
        if called not in live and not recording():
            continue
        runs = [
            [
                pieces.keep([called, a, b, seed], partial(_plain, method, a, b, seed))
                for seed in range(seeds if recording() else 1)
            ]
            for a, b in among
        ]
        held = {c: [[run[c] for run in row] for row in runs] for c in runs[0][0]}
        at = {c: _column(rows) for c, rows in held.items()}
        ways[called] = {"setting": None, "edge": False, "tuning": {}, "columns": at}
        shown[called] = {c: _over([r[0] for r in rows], f"{name}, {c}") for c, rows in held.items()}
        if old:
            _hold(page, called, among, runs, old["ways"][called]["columns"])
    columns = list(next(iter(shown.values()), {}))
    if differing := [m for m, scores in shown.items() if list(scores) != columns]:
        raise ValueError(f"expected the columns {columns} of every method; {differing} have others")
    sizes = {c: [1.0] * len(among) for c in columns}
    told = [" to ".join(direction) for direction in among]
    found = {"groups": "directions", "sizes": sizes, "between": told, "ways": ways}
    return Contest(name, methods, old or found, bool(old), shown, "accuracy", True, data)


def widest(each: Tensor) -> Score:
    """Of (directions, seeds), as `Contest.each` gives it, or a difference of two: the mean, and the wider of two intervals.

    They are Student's, over directions and over seeds; one that has a single number is left out. `Contest.minus` comes to
    nearly the same, by a bootstrap; this takes any difference. Raises ValueError unless there are two numbers along an axis.
    """
    expect(isinstance(each, Tensor) and each.ndim == 2, "numbers (directions, seeds)", each)
    means = [each.mean(1 - i) for i in (0, 1) if each.shape[i] > 1]
    if not means:
        raise ValueError(f"expected two directions or two seeds, got {tuple(each.shape)}")
    scores = [compare(interval(m, "each"), interval(0 * m, "each")) for m in means]
    return max(scores, key=lambda s: s.interval)


def _plain(method: Method, a: str, b: str, seed: int) -> dict[str, list[float]]:
    """Column -> its number, and half of its 95 % interval over test items, 0 for a column of one number."""
    found = {}
    for column, values in method.adapt(a, b, seed).items():
        numbers = torch.as_tensor(values).cpu().double().flatten()  # some devices have no float64
        expect(len(numbers) > 0, f"numbers in the column {column!r}", values)
        score = interval(numbers) if len(numbers) > 1 else None
        found[column] = [score.mean, score.interval] if score else [float(numbers), 0.0]
    return found


def _column(rows: list[list[list[float]]]) -> dict[str, Any]:
    """What the record keeps of one column: every run, a mean for each seed, and one for each direction."""
    each = torch.tensor(rows, dtype=torch.float64)  # (directions, seeds, 2)
    return {
        "runs": each[..., 0].mean(0).tolist(),
        "groups": each[..., 0].mean(1).tolist(),
        "cases": each[:, 0, 1].square().sum().sqrt().item() / len(each),
        "each": each[..., 0].tolist(),
    }


def _over(parts: list[list[float]], draw: str) -> Score:
    """The mean over directions of one seed, with the interval over test items."""
    means, halves = torch.tensor(parts, dtype=torch.float64).unbind(1)
    half = halves.square().sum().sqrt().item() / len(parts)
    return Score(means.mean().item(), half, means, draw)


def _hold(
    page: str,
    called: str,
    among: Sequence[Direction],
    runs: list[list[Mapping[str, list[float]]]],
    old: Mapping[str, Any],
) -> None:
    """ValueError where a run is not one of those that the record has.

    On another processor a run is another run. Two runs differ by five times √2 s once in some ten thousand, s the standard
    deviation of a run about its direction's mean, over all directions.
    """
    for (a, b), row, number in zip(among, runs, range(len(among)), strict=True):
        for column, (mean, half) in row[0].items():
            recorded = old[column]["each"][number]
            each = torch.tensor(old[column]["each"], dtype=torch.float64)
            apart = 5 * (2 * each.var(1).mean()).sqrt().item() if each.shape[1] > 1 else 0.0
            if not agrees(mean, recorded, max(half, apart)):
                raise ValueError(
                    f"{called}, {a} to {b}, {column}: {mean:.4f} here, {recorded[0]:.4f} in {page}.json: more apart than "
                    "chance; record anew with MTLIB_RECORD=1"
                )


def _check_record(
    page: str, old: Mapping[str, Any], methods: Mapping[str, Method], between: Sequence[Direction]
) -> None:
    told = [" to ".join(direction) for direction in between]
    same_as_recorded(page, "methods", sorted(old.get("ways", {})), sorted(methods))
    same_as_recorded(page, "directions", old.get("between", []), told)


def _check(
    methods: Mapping[str, Method], between: Sequence[Direction], live: Sequence[str]
) -> None:
    if not isinstance(methods, Mapping) or not methods or not between:
        raise TypeError("expected methods, name -> Method, and directions; at least one of each")
    check_contenders(methods, live, Method)
