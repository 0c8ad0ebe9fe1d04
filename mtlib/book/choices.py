"""What a page of many targets chooses on validation data, kept with its record, and over what its numbers vary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mtlib.book.contest import TUNING_SEED, Contest, Pieces, same_as_recorded
from mtlib.book.results import kept, recording
from mtlib.core import expect
from mtlib.evaluate import Score, best_of, interval, over_clusters
from mtlib.tasks import functions

_Setting = TypeVar("_Setting", bound=Hashable)

Trial = Callable[[], Sequence[Sequence[float]]]
"""`trial()` -> for each setting of a grid, in its order, a quality on validation data for each column."""


class Choice(NamedTuple):
    """What a method takes in one part of the data, and whether it lies at an edge of its grid."""

    setting: Any
    at_edge: bool


class Tuning:
    """Settings of methods, chosen in each part of the data on its own validation data; a part is a fold or a target.

    A recording tries the settings; any other run takes what the record keeps of it, `details["tuning"]`, or where there is
    none the middle of the grid, untried. `qualities` is method -> part -> (settings, columns), plain JSON, to be recorded.
    `seed` is the one to try settings with, which no run that is scored has.
    """

    seed = TUNING_SEED

    def __init__(self, page: str, real: bool = True):
        self.page = page
        self.qualities: dict[str, dict[str, Any]] = kept(page, real).get("tuning", {})
        self._pieces = Pieces(page, "tuning")

    def choose(
        self, name: str, part: str, grid: Sequence[_Setting], trial: Trial, column: int = 0
    ) -> Choice:
        """The setting of `grid` with the best quality in a column; of equal ones the first. One setting is not tried.

        Raises ValueError for an empty grid, or where the record is of a grid of another size.
        """
        functions(0, trial=trial)
        expect(len(grid) > 0, "a grid of at least one setting", grid)
        if len(grid) == 1:
            return Choice(grid[0], False)
        mine = self.qualities.get(name, {})
        if part not in mine and recording():
            mine = self.qualities.setdefault(name, {})
            mine[part] = self._pieces.keep([name, part], trial)
        if part not in mine:
            return Choice(grid[len(grid) // 2], False)
        tried = list(map(str, range(len(mine[part]))))
        same_as_recorded(self.page, f"settings of {name!r}", tried, map(str, range(len(grid))))
        scores = {s: row[column] for s, row in zip(grid, mine[part], strict=True)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the best setting")  # `at_edge` says it
            best = best_of(list(scores), scores.__getitem__)
        return Choice(best.setting, best.at_edge)

    def best(self, name: str, column: int = 0) -> float:
        """The quality of a method's best settings, the mean over parts; NaN where nothing was tried."""
        rows = [torch.tensor(q, dtype=torch.float64) for q in self.qualities.get(name, {}).values()]
        best = [q[:, column].max() for q in rows]
        return float(torch.stack(best).mean()) if best else float("nan")


def over_units(
    found: Contest,
    one: str,
    other: str | None = None,
    column: str | None = None,
    among: Sequence[bool] | None = None,
    clusters: Sequence[int] | None = None,
    unit: str = "directions",
) -> dict[str, Score]:
    """unit -> the mean of a method over directions, or its paired difference from another: what `paired` takes.

    The units are the directions, by the name `unit`; with `clusters`, a number for each direction, "clusters of" these
    (`over_clusters`); and "seeds" where there are several. `among` says of each direction whether it counts. A run without
    a record may have the first directions alone: {} where fewer than two of them count, or a method did not run.
    """
    expect(isinstance(found, Contest), "a contest, as `directions` gives it", found)
    if not all(name in found for name in (one, other or one)):
        return {}
    each = found.each(one, column)
    if other is not None:
        each = each - found.each(other, column)
    counts = _first(among, len(each), "among")
    mine = torch.ones(len(each), dtype=torch.bool) if counts is None else counts.bool()
    if mine.sum() < 2:
        return {}
    each, whose = each[mine], _first(clusters, len(mine), "clusters")
    over = {unit: interval(each.mean(1))}
    if whose is not None and len(whose[mine].unique()) > 1:
        over[f"clusters of {unit}"] = over_clusters(each.mean(1), whose[mine])
    if each.shape[1] > 1:
        over["seeds"] = interval(each.mean(0))
    return over


def _first(found: Sequence[Any] | None, n: int, what: str) -> Tensor | None:
    """The entries of the directions that ran."""
    if found is None:
        return None
    if len(found) < n:
        raise ValueError(
            f"expected an entry of {what} for each of {n} directions, got {len(found)}"
        )
    return torch.as_tensor(found)[:n]
