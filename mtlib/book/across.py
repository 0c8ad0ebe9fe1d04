"""Contests across domains: each in turn is the target, all others are its sources, and every way chooses among the sources.

Where one source plays the target and the rest its sources, each in turn, a way's settings are judged; no label of the target
takes part. What a recording has found is kept in the page's record, item by item, so that any two ways can be paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtlib.book.contest import TUNING_SEED, Pieces, check_contenders, same_as_recorded
from mtlib.book.page import is_full
from mtlib.book.results import Paired, Result, agrees, kept, paired, record, recording, row
from mtlib.core import expect
from mtlib.evaluate import Score, at_edge, best_of, compare, interval
from mtlib.tasks import positive

Ask = Callable[[Sequence[str], str, int, Any], Tensor]
"""`ask(sources, target, run, setting)` -> what is right of the target's items, 0 or 1: (draws, n), at most 9 draws."""

Units = Mapping[str, Score]
"""Targets, items or runs -> the mean, and its 95 % interval over these."""


class Rival(NamedTuple):
    """A way to a target; `kind` is "baseline", "transfer" or "meta". `settings` is the grid that it chooses from."""

    kind: str
    ask: Ask
    settings: Sequence[Any]


class Across:
    """Ways in all directions: what they chose, what they told right, and differences over targets, items and runs.

    `ways` are name -> `Rival`, `domains` the names, three or more, and `data` the data's source. A run has a number: `ask`
    takes its seeds and its draws of labels from it. Nothing runs before it is asked for, so that a way may ask what another
    chose for the same target (`setting`). At the full scale a record of the page, made on `real` data, gives settings and
    answers; without one, settings are the middle of their grids, and two runs are made. At the small scale all is chosen.
    """

    def __init__(
        self,
        page: str,
        ways: Mapping[str, Rival],
        domains: Sequence[str],
        data: str,
        runs: int = 5,
        items: str = "items",
    ):
        if not isinstance(ways, Mapping) or not ways:
            raise TypeError("expected ways, name -> Rival, at least one")
        for called, way in ways.items():
            if not isinstance(way, Rival):
                raise TypeError(f"expected a Rival for {called!r}, got {type(way).__name__}")
            if not way.settings:
                raise ValueError(f"expected settings of {called!r} to choose from, got none")
        check_contenders({k: _Judged(w.kind, _three) for k, w in ways.items()}, (), _Judged)
        if len(domains) < 3 or len(set(domains)) < len(domains):
            raise ValueError(f"expected at least three domains, each once, got {list(domains)}")
        positive(runs=runs)
        self.page, self.ways, self.domains, self.data = page, dict(ways), list(domains), data
        self.items = items
        old = kept(page, data.endswith("(real)"))
        if old:
            same_as_recorded(page, "ways", sorted(old["grids"]), sorted(ways))
            for called, way in ways.items():
                grid = [str(s) for s in way.settings]
                same_as_recorded(page, f"settings of {called!r}", old["grids"][called], grid)
        self.kept, self.runs = bool(old), runs if old or recording() else 2
        self.quality: dict[str, list[float]] = dict(old.get("quality", {}))
        self.counts: dict[str, list[str]] = dict(old.get("counts", {}))
        self.draws: dict[str, int] = dict(old.get("draws", {}))
        self.made: dict[str, tuple[str, dict[str, Tensor]]] = {}
        self.pieces = Pieces(page, "across")

    def sources(self, target: str) -> tuple[str, ...]:
        """All other domains."""
        if target not in self.domains:
            raise KeyError(f"there is no domain {target!r}; there are {self.domains}")
        return tuple(d for d in self.domains if d != target)

    def behind(self, sources: Sequence[str], target: str) -> str:
        """For which target a way is asked: the one domain that takes no part in a pretence, else the target itself."""
        left = [d for d in self.domains if d not in (*sources, target)]
        return left[0] if left else target

    def setting(self, way: str, target: str) -> Any:
        """What a way chooses for a target: the best mean where each source plays the target, and the rest its sources."""
        among, key = self._of(way).settings, f"{way} to {target}"
        tuned = recording() or not is_full()
        if key not in self.quality and tuned and len(among) > 1:
            self.quality[key] = [
                self.pieces.keep([key, str(s)], partial(self._pretended, way, target, s))
                for s in among
            ]
        if key not in self.quality:
            return among[len(among) // 2]
        found = dict(zip(map(str, among), self.quality[key], strict=True))
        named = {str(s): s for s in among}
        return named[best_of(list(named), found.__getitem__, ordered=False).setting]

    def at_end(self, way: str, setting: Any) -> bool:
        """Whether a number of a setting is at an end of the way's grid: `mtlib.evaluate.at_edge`."""
        return at_edge(setting, self._of(way).settings)

    def asked(self, way: str, target: str, run: int = 0, setting: Any = None) -> Tensor:
        """(n,): how often each item of the target is told right in one run here, whatever the record has."""
        setting = self.setting(way, target) if setting is None else setting
        found = self._of(way).ask(self.sources(target), target, run, setting)
        return self._checked(way, found).double().mean(0)

    def right(self, way: str, target: str) -> Tensor:
        """(runs, n): how often each item of the target is told right, by the record or here."""
        if way in self.made:
            return self.made[way][1][target]
        key = f"{way} to {target}"
        if key not in self.counts:
            setting = self.setting(way, target)
            self.counts[key] = [
                self.pieces.keep([key, "run", r], partial(self._counted, way, target, r, setting))
                for r in range(self.runs)
            ]
        if way not in self.draws:  # where pieces were found finished
            ask = self._of(way).ask(self.sources(target), target, 0, self.setting(way, target))
            self.draws[way] = len(ask)
        digits = [[*map(int, told)] for told in self.counts[key]]
        return torch.tensor(digits, dtype=torch.float64) / self.draws[way]

    def make(self, way: str, kind: str, right: Mapping[str, Tensor]) -> None:
        """Another way, of a kind, from what it told right: target -> (n,) or (runs, n)."""
        self.made[way] = (kind, {t: torch.atleast_2d(right[t].double()) for t in self.domains})

    def best(self, way: str, among: Sequence[str]) -> dict[str, str]:
        """Another way: for each target that of `among` which was best on the pretended targets. Returns its name."""
        kinds = {self._of(k).kind for k in among}
        if len(kinds) != 1:
            raise ValueError(f"expected ways of one kind to choose from, got {sorted(kinds)}")
        found = {}
        for target in self.domains:
            for k in among:
                self.setting(k, target)
            seen = {k: max(self.quality.get(f"{k} to {target}", [0.0])) for k in among}
            found[target] = max(seen, key=lambda k: seen[k])
        self.make(way, kinds.pop(), {t: self.right(k, t) for t, k in found.items()})
        return found

    def level(self, way: str) -> Units:
        """The mean over targets, with its interval over targets, items and runs."""
        parts = [self.right(way, t) for t in self.domains]
        return {
            "targets": interval(torch.stack([p.mean() for p in parts]), "targets"),
            self.items: interval(torch.cat([p.mean(0) for p in parts]), self.items),
            "runs": interval(torch.stack([self._runs(p) for p in parts]).mean(0), "runs"),
        }

    def minus(self, one: str, other: str) -> Units:
        """What one way has more than another, paired item by item."""
        a, b = self.level(one), self.level(other)
        return {unit: compare(a[unit], b[unit]) for unit in a}

    def told(self, way: str) -> str:
        """The mean in percent and the widest interval, as text: '89.4 ± 2.7'."""
        return _text(self.level(way))

    def points(self, one: str, other: str) -> str:
        """`minus` in percentage points with its sign and the widest interval: '+1.3 ± 0.4'."""
        found = self.minus(one, other)
        return f"{'+' * (found['targets'].mean >= 0)}{_text(found)}".replace("-", "−")

    def line(self, way: str) -> list[str]:
        """For a table: the percentage of each target, and `told`."""
        each = [f"{100 * self.right(way, t).mean():.1f}" for t in self.domains]
        return [*each, self.told(way)]

    def paired(self, one: str, other: str) -> Paired:
        """`minus` as a record keeps it: the widest interval, with its unit and number."""
        return paired(one, other, self.minus(one, other))

    def hold(self, ways: Sequence[str]) -> None:
        """Make run 0 of some ways here, for all targets. Raises ValueError where one is not that of the record."""
        for way in ways:
            for t in self.domains:
                here, runs = self.asked(way, t), self.right(way, t).mean(1)
                if not agrees(here.mean().item(), runs, interval(here).interval / 2):
                    raise ValueError(
                        f"{way} to {t}: {here.mean():.4f} here, {runs[0]:.4f} in {self.page}.json; record anew with "
                        "MTLIB_RECORD=1"
                    )

    def conclude(
        self,
        field: str,
        protocol: str,
        labels: str,
        gain: tuple[str, str],
        versus: tuple[str, str] | None = None,
    ) -> str:
        """Record all ways, or hold what is here to the record: `mtlib.book.results.record`. Returns what was done."""
        kinds = {k: w.kind for k, w in self.ways.items()} | {
            k: v for k, (v, _) in self.made.items()
        }
        entries = []
        for way, kind in kinds.items():
            found = self.level(way)
            each = [self.right(way, t).mean(1) for t in self.domains]
            runs = torch.stack(each).mean(0)
            entries.append(row(way, kind, runs, found[self.items], found["targets"].mean))
        result = Result(
            page=self.page,
            field=field,
            metric="accuracy",
            higher=True,
            labels=labels,
            protocol=protocol,
            data=self.data,
            entries=tuple(entries),
            gain=self.paired(*gain),
            versus=versus and self.paired(*versus),
            details={
                "grids": {k: [str(s) for s in w.settings] for k, w in self.ways.items()},
                "quality": self.quality,
                "draws": self.draws,
                "counts": self.counts,
            },
        )
        return record(result)

    def _of(self, way: str) -> Rival:
        if way not in self.ways:
            raise KeyError(f"there is no way {way!r}; there are {list(self.ways)}")
        return self.ways[way]

    def _checked(self, way: str, found: Tensor) -> Tensor:
        expect(
            isinstance(found, Tensor) and found.ndim == 2,
            f"right answers of {way!r}, (draws, n)",
            found,
        )
        if not 1 <= len(found) <= 9 or not bool(((found == 0) | (found == 1)).all()):
            raise ValueError(f"expected 0 or 1 of {way!r}, in 1 to 9 draws, got {len(found)} draws")
        return found.cpu()

    def _pretended(self, way: str, target: str, setting: Any) -> float:
        sources, ask = self.sources(target), self._of(way).ask
        tried = [
            self._checked(way, ask(tuple(s for s in sources if s != b), b, TUNING_SEED, setting))
            for b in sources
        ]
        return float(np.mean([t.double().mean().item() for t in tried]))

    def _counted(self, way: str, target: str, run: int, setting: Any) -> str:
        found = self._checked(way, self._of(way).ask(self.sources(target), target, run, setting))
        return "".join(str(int(k)) for k in found.long().sum(0))

    def _runs(self, right: Tensor) -> Tensor:
        return right.mean(1).expand(self.runs)


class _Judged(NamedTuple):
    kind: str
    ask: Callable[..., Any]


def _three(a: Any, b: Any, c: Any) -> None: ...


def _text(found: Units) -> str:
    half = max(s.interval for s in found.values())
    return f"{100 * found['targets'].mean:.1f} ± {100 * half:.1f}"
