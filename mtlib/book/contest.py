"""Contests on fair ground: every way of learning is tuned alike, trained with the same seeds, met by the same tests.

A page says how each way trains and which settings it may choose from. `contest` chooses on validation tasks, trains, scores
and keeps what was found in the page's record; a reader's run trains some of the ways and is held to that record.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from mtlib.book.page import claim, is_full, recorded_claim
from mtlib.book.results import (
    KINDS,
    Paired,
    Result,
    agrees,
    clean_commit,
    kept,
    record,
    recorded,
    recording,
    row,
    write,
)
from mtlib.core import Episode, Learner, Params, Stream
from mtlib.data.download import cache
from mtlib.evaluate import NotFinite, Score, answers, best_of, compare, evaluate, interval
from mtlib.metrics import Metric, accuracy
from mtlib.tasks import ClassSet, functions, positive
from mtlib.train import Diverged

TUNING_SEED = 1000  # of the runs that choose a setting; no run that is scored has it
BOOTSTRAP = 4000
PERCENT = ("accuracy", "AP50", "AP50 of platelets")  # measures that are told in percent

Train = Callable[[Any, int, int], tuple[Learner, Params]]
"""`train(setting, seed, share)` -> the learner as the tests use it, and its φ."""


class Way(NamedTuple):
    """A contender.

    `kind` is "baseline", "transfer" or "meta". `train(setting, seed, share)` -> (learner, φ) trains for 1/`share` of its steps
    and gives the learner as the tests use it. `settings` is the grid it chooses from, as `best_of` takes it. Where nothing is
    `drawn`, no weight and no batch, one run stands for all seeds.
    """

    kind: str
    train: Train
    settings: Mapping[Any, Any] | Sequence[Any]
    ordered: bool = True
    drawn: bool = True


class Trial(NamedTuple):
    """A contender of `measured`.

    `kind` is "baseline", "transfer" or "meta". `test(setting, seed)` trains and gives column -> (number, a part of it for each
    group (G,)). `quality(setting)` trains and judges on validation data, higher for better; `settings` is the grid it chooses
    from, as `best_of` takes it.
    """

    kind: str
    test: Callable[[Any, int], Mapping[str, tuple[float, Tensor]]]
    quality: Callable[[Any], float]
    settings: Mapping[Any, Any] | Sequence[Any]
    ordered: bool = True


class Gap(NamedTuple):
    """A paired difference of two ways: its mean over seeds, and half its 95 % interval over `seeds` and over `groups`.

    `seeds` is None where one seed ran. `groups` are alphabets, classes or tasks: these drawn anew, by bootstrap.
    """

    mean: float
    seeds: float | None
    groups: float

    @property
    def widest(self) -> float:
        """The wider of the two half-widths."""
        return max(self.seeds or 0.0, self.groups)

    @property
    def low(self) -> float:
        """The lower end of the wider interval."""
        return self.mean - self.widest

    @property
    def high(self) -> float:
        """The upper end of the wider interval."""
        return self.mean + self.widest

    def points(self) -> str:
        """In percentage points, with its sign and the wider interval: '+1.3 ± 0.4'."""
        return _signed(100 * self.mean, 100 * self.widest, 1)

    def __str__(self) -> str:
        return _signed(self.mean, self.widest, 3)


@dataclass(frozen=True)
class Contest:
    """What `contest` found: of the record where `kept`, else of this run. The first column counts where none is named.

    A number of a way that has not run here is NaN, and as text "not run".
    """

    name: str
    ways: Mapping[str, Any]  # name -> Way, or another contender with a `kind`
    found: Mapping[str, Any]  # what the record keeps of it
    kept: bool
    here: Mapping[str, Mapping[str, Score]]  # way -> column -> this run, seed 0
    metric: str
    higher: bool
    data: str

    def __contains__(self, way: str) -> bool:
        return way in self.found["ways"]

    def mean(self, way: str, column: str | None = None) -> float:
        """The mean over seeds."""
        return math.fsum(self.runs(way, column)) / len(self.runs(way, column))

    def told(self, way: str, column: str | None = None) -> str:
        """The mean and the wider of its intervals over seeds and groups, as text: '87.1 ± 0.4' for shares, in percent."""
        gap = self._gap(self._at(way, column), None, column)
        share = 100 if self.metric in PERCENT else 1
        text = _signed(share * gap.mean, share * gap.widest, 1 if share > 1 else 3)
        return text.removeprefix("+")

    def runs(self, way: str, column: str | None = None) -> list[float]:
        """One number a seed."""
        runs: list[float] = self._at(way, column)["runs"]
        return runs

    def setting(self, way: str) -> Any:
        """The setting that was chosen on validation tasks."""
        return self._of(way)["setting"]

    def tuning(self, way: str) -> dict[str, float | None]:
        """Setting, as text -> its quality on validation tasks, None for one that diverged."""
        table: dict[str, float | None] = self._of(way)["tuning"]
        return table

    @property
    def edges(self) -> list[str]:
        """The ways whose best setting lies at the edge of an ordered grid."""
        return [way for way, held in self.found["ways"].items() if held["edge"]]

    def minus(self, one: str, other: str, column: str | None = None) -> Gap:
        """What one way has more than another, paired: the same seeds, the same test episodes."""
        a, b = self._at(one, column), self._at(other, column)
        if len(a["runs"]) != len(b["runs"]) and one in self and other in self:
            raise ValueError(
                f"expected two ways with the same seeds, got {len(a['runs'])} of {one!r} and {len(b['runs'])} of {other!r}"
            )
        return self._gap(a, b, column)

    def gain(self, one: str, other: str, column: str | None = None) -> Paired:
        """`minus` as a record keeps it: more is better, over seeds or groups, whichever is wider, with its unit and number."""
        gap, sign = self.minus(one, other, column), 1 if self.higher else -1
        over: dict[str, float] = {} if gap.seeds is None else {"seeds": gap.seeds}
        over[self.found["groups"]] = gap.groups
        unit = max(over, key=lambda u: over[u])
        n = len(self.runs(one, column) if unit == "seeds" else self._sizes(column))
        ends = (sign * gap.mean - gap.widest, sign * gap.mean + gap.widest)
        return Paired(one, other, sign * gap.mean, *ends, unit, n)

    def chosen(self, kind: str) -> str:
        """The way of a kind ("baseline", "transfer", "meta") that did best on validation tasks.

        Raises ValueError where a way of the kind was not judged there.
        """
        among: list[str] = [w for w in self.found["ways"] if self.ways[w].kind == kind]
        seen = {w: [q for q in self.tuning(w).values() if q is not None] for w in among}
        if not seen or not all(seen.values()):
            raise ValueError(f"expected {kind} judged on validation tasks, got {seen}")
        return max(seen, key=lambda w: max(seen[w]))

    def rows(self, column: str | None = None) -> dict[str, dict[str, Any]]:
        """A row for each way, the best first, for `table`: number, intervals over seeds and groups, setting."""
        share = self.metric in PERCENT

        def form(v: float) -> str:
            return f"{100 * v:.1f}" if share else f"{v:.3f}"

        names = sorted(self.found["ways"], key=lambda w: self.mean(w, column), reverse=self.higher)
        table = {}
        for way in names:
            held, gap = self._of(way), self._gap(self._at(way, column), None, column)
            table[way] = {
                f"{self.metric}, %" if share else self.metric: form(self.mean(way, column)),
                "± seeds": "" if gap.seeds is None else form(gap.seeds),
                f"± {self.found['groups']}": form(gap.groups),
            }
            if held["setting"] is not None:
                table[way]["setting"] = f"{_told(held['setting'])}{' (edge)' * held['edge']}"
        return table

    def each(self, way: str, column: str | None = None) -> Tensor:
        """One number for each direction and seed, (directions, seeds), where `directions` made the contest."""
        at = self._at(way, column)
        if "each" not in at and way in self:
            raise ValueError("expected a contest of directions; this one keeps means alone")
        return torch.tensor(at.get("each", [[math.nan]]), dtype=torch.float64)

    def columns(self) -> list[str]:
        """The names of the tests."""
        return list(self.found["sizes"])

    def judge(self, text: str, holds: bool) -> None:
        """`recorded_claim` where the rows come from the record, `claim` where they come from this run on real data."""
        if not self.kept and not self.data.endswith("(real)"):
            print(f"not judged on stand-in data: {text}")
        else:
            (recorded_claim if self.kept else claim)(text, holds)

    def _gap(self, a: Mapping[str, Any], b: Mapping[str, Any] | None, column: str | None) -> Gap:
        runs, groups = (_row(a, k) - (_row(b, k) if b else 0.0) for k in ("runs", "groups"))
        seeds = _over_seeds(_row(a, "runs"), _row(b, "runs") if b else None)
        return Gap(runs.mean().item(), seeds, _over_groups(groups, self._sizes(column)))

    def _of(self, way: str) -> dict[str, Any]:
        if way not in self.ways:
            raise KeyError(f"there is no way {way!r}; there are {list(self.ways)}")
        nothing = {"setting": "not run", "edge": False, "tuning": {}, "columns": {}}
        held: dict[str, Any] = self.found["ways"].get(way, nothing)
        return held

    def _at(self, way: str, column: str | None) -> dict[str, Any]:
        column = self.columns()[0] if column is None else column
        if column not in self.columns():
            raise KeyError(f"there is no test {column!r}; there are {self.columns()}")
        nothing = {"runs": [math.nan], "groups": [math.nan] * len(self._sizes(column))}
        at: dict[str, Any] = self._of(way)["columns"].get(column, nothing)
        return at

    def _sizes(self, column: str | None) -> Tensor:
        return torch.tensor(self.found["sizes"][column or self.columns()[0]], dtype=torch.float64)


def contest(
    page: str,
    name: str,
    ways: Mapping[str, Way],
    validation: Stream,
    tests: Mapping[str, Stream],
    data: str,
    live: Sequence[str] = (),
    of: Mapping[str, Stream] | None = None,
    seeds: int = 5,
    share: int = 3,
    choose: int = 40,
    episodes: int = 200,
    metric: Metric = accuracy,
    higher: bool = True,
    tries: int = 1,
    groups: str = "alphabets",
) -> Contest:
    """Tune, train and test every way alike; with a record of the page, only those of `live`.

    For each way: the setting of the best quality on `choose` tasks of `validation`, after a run of 1/`share` of the
    length with a seed of its own, or the mean of `tries` such runs; whole runs with seeds 0, …, `seeds` − 1; the `metric`
    on `episodes` tasks of each of `tests`, column -> stream. `of` has for each column the same stream over
    `alphabets(...)`, for intervals over alphabets, or whatever `groups` calls what they are; without it they are over tasks.
    `data` is the data's source.

    At the full scale, on real data, a committed record gives settings and rows; the ways in `live` train with seed 0 and
    are held to it by `agrees`, else ValueError. Without a record these alone are tuned and run, with seed 0. With
    MTLIB_RECORD=1 everything runs on a clean tree, and each finished piece is kept until the commit changes.
    """
    _check(ways, tests, of, live)
    positive(seeds=seeds, share=share, choose=choose, episodes=episodes, tries=tries)
    functions(2, metric=metric)
    details = kept(page, data.endswith("(real)"))
    old = details.get(name, {})
    if details:
        _check_record(page, old, ways, tests)
    judge = _Judge(metric, higher, choose, episodes)
    pieces = Pieces(page, name)
    held: dict[str, Any] = {}
    here: dict[str, dict[str, Score]] = {}
    sizes: dict[str, list[float]] = {}
    for called, way in ways.items():
        if called not in live and not recording():
            continue
        if old:
            tuned = {k: old["ways"][called][k] for k in ("setting", "edge", "tuning")}
        else:

            def quality(setting: Any, called: str = called, way: Way = way) -> float:
                tried = [
                    pieces.keep(
                        [called, _told(setting), i],
                        partial(judge.quality, way, setting, share, validation, TUNING_SEED + i),
                        (NotFinite, Diverged),
                    )
                    for i in range(tries)
                ]
                return math.fsum(tried) / tries

            tuned = _tune(way, quality)
        test = partial(judge.test, way, _grid(way)[_told(tuned["setting"])], tests, of)
        runs = [
            pieces.keep([called, "seed", seed], partial(test, seed))
            for seed in range(seeds if recording() and way.drawn else 1)
        ]
        runs *= 1 if way.drawn or not recording() else seeds
        held[called] = {**tuned, "columns": {c: _column([run[c] for run in runs]) for c in tests}}
        here[called] = {c: _score(runs[0][c][0], f"{name}, {c}") for c in tests}
        sizes = {c: runs[0][c][2] for c in tests}
    if old:
        _hold(here, old, page)
    new = {"groups": groups if of else "tasks", "sizes": sizes, "ways": held}
    words = "accuracy" if metric is accuracy else "score" if higher else "error"
    return Contest(name, ways, old or new, bool(old), here, words, higher, data)


def of_page(page: str, name: str, metric: str = "", higher: bool | None = None) -> Contest:
    """A contest of a page's record, `details[name]`, to be asked for means and paired differences.

    `metric` and `higher` are those of the page's first result where they are not given: name them for a contest of another
    measure. Raises ValueError where the page's record has no such contest.
    """
    held = recorded(page)
    found = held.details.get(name)
    if not isinstance(found, dict) or not {"ways", "sizes", "groups"} <= found.keys():
        raise ValueError(
            f"expected a contest of {page}.json, one of {list(held.details)}, got {name!r}"
        )
    up = held.higher if higher is None else higher
    return Contest(name, found["ways"], found, True, {}, metric or held.metric, up, held.data)


def folds(parts: Sequence[Contest], unit: str) -> Contest:
    """Contests of the same ways on folds of one data set as one contest: their tasks, `unit`, stand in a row.

    Each fold tunes by itself, so a way has no setting here; `Contest.chosen` asks a fold. A seed's number is the mean over
    all tasks. Only the first test is kept. Raises ValueError for contests over groups, or of other ways or seeds.
    """
    if not parts or not all(isinstance(p, Contest) for p in parts):
        raise TypeError(f"expected at least one contest, as `contest` gives it, got {parts!r}")
    first, column = parts[0], parts[0].columns()[0]
    size = [len(p.found["sizes"][column]) for p in parts]
    ways: dict[str, Any] = {}
    for p in parts:
        if p.found["groups"] != "tasks" or list(p.found["ways"]) != list(first.found["ways"]):
            raise ValueError("expected contests of the same ways, over tasks")
    for name in first.found["ways"]:
        at = [p.found["ways"][name]["columns"][column] for p in parts]
        if len({len(a["runs"]) for a in at}) > 1:
            raise ValueError(f"expected the same seeds in each fold, got others of {name!r}")
        each = [value for a in at for value in a["groups"]]
        pairs = zip(*(a["runs"] for a in at), strict=True)
        runs = [
            math.fsum(n * v for n, v in zip(size, row, strict=True)) / sum(size) for row in pairs
        ]
        held = {"runs": runs, "groups": each, "cases": _score(each, "").interval}
        ways[name] = {"setting": None, "edge": False, "tuning": {}, "columns": {column: held}}
    here = {
        k: {column: _score([v for p in parts for v in p.here[k][column].values.tolist()], "")}
        for k in first.here
    }
    found = {"groups": unit, "sizes": {column: [1.0] * sum(size)}, "ways": ways}
    return replace(first, name=unit, found=found, here=here)


def measured(
    page: str,
    name: str,
    trials: Mapping[str, Trial],
    groups: str,
    data: str,
    live: Sequence[str] = (),
    seeds: int = 5,
    metric: str = "score",
    higher: bool = True,
) -> Contest:
    """A contest by a measure that is no mean over tasks, such as average precision: each trial tests itself.

    `groups` says what a test's parts are of, such as "photographs", and the intervals over them are those of their mean: give
    parts whose mean moves as the number does, as `mtlib.models.detection.by_photograph`. Else as `contest`: with a record only
    the trials in `live` run, with seed 0, and are held to it, in the columns that they give here; with MTLIB_RECORD=1 all run,
    are tuned, and the finished pieces are kept. Raises ValueError where parts are no row of finite numbers of one length.
    """
    if not isinstance(trials, Mapping) or not trials:
        raise TypeError("expected trials, name -> Trial, at least one")
    check_contenders(trials, live, Trial, 2)
    positive(seeds=seeds)
    details = kept(page, data.endswith("(real)"))
    old = details.get(name, {})
    if details:
        same_as_recorded(page, "trials", sorted(old.get("ways", {})), sorted(trials))
        for called, trial in trials.items():
            held_of = old["ways"][called]
            tried = held_of["tuning"] or [_told(held_of["setting"])]
            same_as_recorded(page, f"settings of {called!r}", sorted(tried), sorted(_grid(trial)))
    pieces = Pieces(page, name)
    held: dict[str, Any] = {}
    here: dict[str, dict[str, Score]] = {}
    sizes: dict[str, list[float]] = {}
    for called, trial in trials.items():
        if called not in live and not recording():
            continue
        if old:
            tuned = {k: old["ways"][called][k] for k in ("setting", "edge", "tuning")}
        else:

            def quality(setting: Any, called: str = called, trial: Trial = trial) -> float:
                whole = partial(trial.quality, _grid(trial)[_told(setting)])
                found: float = pieces.keep([called, _told(setting)], whole, (NotFinite, Diverged))
                return found

            tuned = _tune(trial, quality)
        setting = _grid(trial)[_told(tuned["setting"])]
        runs = [
            pieces.keep([called, "seed", seed], partial(_parts, trial, setting, seed))
            for seed in range(seeds if recording() else 1)
        ]
        held[called] = {**tuned, "columns": {c: _measure([r[c] for r in runs]) for c in runs[0]}}
        here[called] = {}
        for c, (mean, parts) in runs[0].items():
            values = torch.tensor(parts, dtype=torch.float64)
            half = _over_groups(values, torch.ones_like(values))
            here[called][c] = Score(mean, half, values, f"{name}, {c}")
            sizes.setdefault(c, [1.0] * len(parts))
    if old:
        _hold(here, old, page)
    new = {"groups": groups, "sizes": sizes, "ways": held}
    return Contest(name, trials, old or new, bool(old), here, metric, higher, data)


def _parts(trial: Trial, setting: Any, seed: int) -> dict[str, tuple[float, list[float]]]:
    """Column -> its number, and its parts, of a whole run."""
    found = {}
    for column, (number, parts) in trial.test(setting, seed).items():
        each = torch.as_tensor(parts, dtype=torch.float64).cpu()
        if each.ndim != 1 or len(each) < 2 or not bool(torch.isfinite(each).all()):
            raise ValueError(
                f"expected a finite part of {column!r} for each of two groups or more, got {parts}"
            )
        found[column] = (float(number), each.tolist())
    return found


def _measure(runs: list[Any]) -> dict[str, Any]:
    """What the record keeps of one column: every run's number, each group over the seeds, the first run's interval."""
    each = torch.tensor([parts for _, parts in runs], dtype=torch.float64)
    return {
        "runs": [mean for mean, _ in runs],
        "groups": [float(f"{v:.4g}") for v in each.mean(0)],
        "cases": _over_groups(each[0], torch.ones_like(each[0])),
    }


def alphabets(data: ClassSet) -> ClassSet:
    """The same classes and items, but each item is the number of its alphabet: what a class's name has before its "/".

    A stream draws by its seed alone, so the same stream over this set tells where each item of each episode comes from.
    Raises ValueError unless there are two alphabets or more.
    """
    if not isinstance(data, ClassSet):
        raise TypeError(f"expected a ClassSet, got {type(data).__name__}")
    names = [n.partition("/")[0] for n in data.names]
    known = sorted(set(names))
    if len(known) < 2 or not all("/" in n for n in data.names):
        raise ValueError(
            'expected classes of at least two alphabets, with names such as "Tibetan/character07", got '
            f"{data.names[:2]} and so on"
        )
    number = torch.tensor([known.index(n) for n in names])
    items = number[:, None].expand(len(names), data.items.shape[1])[..., None].float()
    return ClassSet(items.contiguous(), data.names, f"{data.source}, alphabets")


def conclude(
    page: str,
    field: str,
    protocol: str,
    contests: Sequence[Contest],
    gain: tuple[str, str],
    labels: str,
    details: Mapping[str, Any] | None = None,
    versus: tuple[str, str] | None = None,
) -> str:
    """Record a page's contests, or hold this run to the record: `record` with the first one's rows. Returns what was done.

    `gain` = (ours, rival): its paired difference is the record's, with the wider of its intervals. So is that of
    `versus` = (meta-learner, transfer), which `Contest.chosen` names from what validation tasks said.
    """
    if not contests or not all(isinstance(c, Contest) for c in contests):
        raise TypeError(f"expected at least one contest, as `contest` gives it, got {contests!r}")
    first = contests[0]
    entries, column = [], first.columns()[0] if first.columns() else ""
    for way, columns in first.here.items():
        if recording():
            at = first._at(way, column)
            entries.append(row(way, first.ways[way].kind, at["runs"], at["cases"]))
        else:
            entries.append(row(way, first.ways[way].kind, [columns[column].mean], columns[column]))
    if first.kept:
        return f"{len(entries)} of {len(first.ways)} ways ran, and agree with {page}.json"
    if not all(way in first for way in gain) or not entries:
        return f"not recorded: {' and '.join(gain)} did not both run"
    result = Result(
        page=page,
        field=field,
        metric=first.metric,
        higher=first.higher,
        labels=labels,
        protocol=protocol,
        data=first.data,
        entries=tuple(entries),
        gain=first.gain(*gain),
        versus=first.gain(*versus) if versus else None,
        details={**{c.name: c.found for c in contests}, **(details or {})},
    )
    return record(result)


class _Judge(NamedTuple):
    """How a trained learner is scored."""

    metric: Metric
    higher: bool
    choose: int
    episodes: int

    def quality(self, way: Way, setting: Any, share: int, stream: Stream, seed: int) -> float:
        """How good a setting is, higher for a better one, after a shorter run with a seed of its own."""
        learner, phi = way.train(_grid(way)[_told(setting)], seed, share)
        found = evaluate(learner, phi, stream, max(2, self.choose), self.metric, progress=False)
        return float(found.mean if self.higher else -found.mean)

    def test(
        self,
        way: Way,
        setting: Any,
        tests: Mapping[str, Stream],
        of: Mapping[str, Stream] | None,
        seed: int,
    ) -> dict[str, Any]:
        """Column -> one number an episode, one a group, and the groups' sizes, of a whole run."""
        learner, phi = way.train(setting, seed, 1)
        if of is not None:
            return {c: self.by_group(learner, phi, tests[c], of[c]) for c in tests}
        return {c: self.by_task(learner, phi, tests[c]) for c in tests}

    def by_task(self, learner: Learner, phi: Params, stream: Stream) -> Any:
        """The metric for each task, which is its own group."""
        found = evaluate(learner, phi, stream, self.episodes, self.metric, progress=False)
        each = found.values.tolist()
        return each, each, [1.0] * len(each)

    def by_group(self, learner: Learner, phi: Params, stream: Stream, twin: Stream) -> Any:
        """Accuracy for each episode, and for each group that the twin stream names; and the groups' sizes."""
        right: list[Tensor] = []
        whose: list[Tensor] = []
        for step in itertools.count():
            draw, number = stream(step), twin(step)
            if not isinstance(draw, Episode) or not isinstance(number, Episode):
                raise TypeError("expected streams of episodes to test on, such as `episodes(...)`")
            said, y = answers(learner, phi, draw).cpu(), draw.query.y.cpu()
            if said.shape != y.shape:
                raise ValueError(
                    f"expected answers of shape {tuple(y.shape)}, a number for each class, got {tuple(said.shape)}; "
                    "`point` takes the means of answers with a spread"
                )
            if not bool(torch.isfinite(said).all()):
                raise NotFinite("expected finite answers of the learner to every test episode")
            right.append((said.argmax(-1) == y.argmax(-1)).double())
            whose.append(number.query.x.flatten(1).long())
            if sum(len(part) for part in right) >= self.episodes:
                break
        hit, group = (torch.cat(parts)[: self.episodes] for parts in (right, whose))
        size = torch.bincount(group.flatten()).double()
        total = torch.zeros(len(size)).double().index_add(0, group.flatten(), hit.flatten())
        return hit.mean(1).tolist(), (total / size.clamp_min(1)).tolist(), size.tolist()


class Pieces:
    """What a recording has finished, a file each, in a folder of the cache for page and commit; nothing where none is made.

    Several processes may record at the same commit: each finds what the others have finished.
    """

    def __init__(self, page: str, name: str):
        self.folder: Path | None = None
        self.name = name
        if recording() and is_full():
            self.folder = cache() / "recordings" / f"{page}-{clean_commit()}"

    def keep(self, key: list[Any], run: Callable[[], Any], failed: tuple[Any, ...] = ()) -> Any:
        """run(), or what it gave when it last ran at this commit; NaN where it raises one of `failed`."""
        called = json.dumps([self.name, *key])
        path = (
            self.folder
            and self.folder / f"{blake2b(called.encode(), digest_size=16).hexdigest()}.json"
        )
        if path and path.exists():
            found = json.loads(path.read_text("utf8"))["found"]
            return math.nan if found is None else found
        try:
            found = run()
        except failed:
            found = math.nan
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            nothing = isinstance(found, float) and not math.isfinite(found)
            write(path, {"of": called, "found": None if nothing else found})
        return found


def _grid(way: Way | Trial) -> dict[str, Any]:
    """Every setting of a way, by its name as text; at the small scale two are enough."""
    named = way.settings if isinstance(way.settings, Mapping) else {s: s for s in way.settings}
    told = {_told(s): setting for s, setting in named.items()}
    return told if is_full() else dict(itertools.islice(told.items(), 2))


def _tune(way: Way | Trial, quality: Callable[[Any], float]) -> dict[str, Any]:
    """What the record keeps of the choice: the best setting, whether it lies at an edge, and all qualities."""
    names = [s for s in way.settings if _told(s) in _grid(way)]
    if len(names) == 1 and not recording():  # a recording judges it beside the other ways
        return {"setting": _plain(names[0]), "edge": False, "tuning": {}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the best setting")  # the table marks it
        best = best_of(names, quality, way.ordered)
    found = {_told(s): q if math.isfinite(q) else None for s, q in best.table.items()}  # type: ignore[arg-type]
    return {"setting": _plain(best.setting), "edge": best.at_edge, "tuning": found}


def _score(values: list[float], draw: str) -> Score:
    return interval(torch.tensor(values, dtype=torch.float64), draw)


def _column(runs: list[Any]) -> dict[str, Any]:
    """What the record keeps of one test: a mean for each seed, the first's interval, and each group over the seeds."""
    scores = [_score(values, "") for values, _, _ in runs]
    groups = torch.tensor([group for _, group, _ in runs], dtype=torch.float64).mean(0)
    return {
        "runs": [s.mean for s in scores],
        "groups": [float(f"{v:.5g}") for v in groups],
        "cases": scores[0].interval,
    }


def _check_record(
    page: str, old: Mapping[str, Any], ways: Mapping[str, Way], tests: Mapping[str, Stream]
) -> None:
    """ValueError unless the record is of these ways, with these grids and these tests."""
    held = old.get("ways", {})
    same_as_recorded(page, "ways", sorted(held), sorted(ways))
    same_as_recorded(page, "tests", sorted(old.get("sizes", {})), sorted(tests))
    for called, way in ways.items():
        tried = held[called]["tuning"] or [_told(held[called]["setting"])]
        same_as_recorded(page, f"settings of {called!r}", sorted(tried), sorted(_grid(way)))


def _hold(here: Mapping[str, Mapping[str, Score]], old: Mapping[str, Any], page: str) -> None:
    """ValueError where this run is not one of those that the record has."""
    for way, columns in here.items():
        for column, score in columns.items():
            runs = old["ways"][way]["columns"][column]["runs"]
            if not agrees(score.mean, runs, score.interval):
                raise ValueError(
                    f"{way}, {column}: {score.mean:.4f} here, {runs[0]:.4f} in {page}.json: more apart than chance; record "
                    "anew with MTLIB_RECORD=1"
                )


def _row(at: Mapping[str, Any], key: str) -> Tensor:
    return torch.tensor(at[key], dtype=torch.float64)


def _signed(mean: float, half: float, digits: int) -> str:
    """'+1.3 ± 0.4', or that it has not run."""
    if not math.isfinite(mean):
        return "not run"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def _over_seeds(runs: Tensor, others: Tensor | None) -> float | None:
    """Half the 95 % interval of the mean over seeds, or of the paired difference from `others`; None of one seed."""
    if len(runs) < 2:
        return None
    own = interval(runs, "seeds")
    return (own if others is None else compare(own, interval(others, "seeds"))).interval


def _over_groups(parts: Tensor, sizes: Tensor) -> float:
    """Half the 95 % interval of the mean of `parts`, weighted by `sizes`, with the groups drawn anew.

    A bootstrap takes n groups for all there are: of few its interval is too short. It is widened by √(n / (n − 1)) and by
    Student's quantile over the normal one, so that of equal sizes it is nearly `interval`'s.
    """
    n = len(parts)
    if not bool(torch.isfinite(parts).all()):
        return math.nan
    drawn, weights = _drawn(n), sizes.double()
    means = drawn @ (parts * weights) / (drawn @ weights)
    low, high = (means.nanquantile(q).item() for q in (0.025, 0.975))
    few = math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, 0.975) / ndtri(0.975)) if n > 1 else 1.0
    return few * (high - low) / 2


@lru_cache(maxsize=2)  # a page asks again for as many groups
def _drawn(n: int) -> Tensor:
    """How often each of n groups is in each bootstrap sample: (BOOTSTRAP, n)."""
    drawn = torch.randint(n, (BOOTSTRAP, n), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.float64).expand(BOOTSTRAP, n)
    return torch.zeros(BOOTSTRAP, n, dtype=torch.float64).scatter_add_(1, drawn, one)


def _told(setting: Any) -> str:
    """A setting as text; a list of JSON is the tuple that it was."""
    if isinstance(setting, tuple | list):
        return ", ".join(map(_told, setting))
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def _plain(setting: Any) -> Any:
    """A setting as JSON keeps it."""
    if isinstance(setting, tuple | list):
        return [_plain(s) for s in setting]
    return setting if isinstance(setting, int | float | str | bool) else str(setting)


def check_contenders(
    ways: Mapping[str, Any], live: Iterable[str], kind: Any, arguments: int = 3
) -> None:
    """Raise unless every contender is a `kind` of a known kind, with a function of so many arguments, and the live ones are there."""
    for called, way in ways.items():
        if not isinstance(way, kind):
            raise TypeError(f"expected a {kind.__name__} for {called!r}, got {type(way).__name__}")
        if way.kind not in KINDS:
            raise ValueError(
                f"expected the kind of {called!r} to be one of {KINDS}, got {way.kind!r}"
            )
        functions(arguments, **{way._fields[1]: way[1]})
    if absent := [w for w in live if w not in ways]:
        raise ValueError(f"expected live contenders out of {list(ways)}, got {absent}")


def same_as_recorded(page: str, what: str, has: Iterable[str], wants: Iterable[str]) -> None:
    """Raise ValueError where the page's record has other ways, tests, settings or directions than the page."""
    has, wants = list(has), list(wants)
    if has != wants:
        old, new = [h for h in has if h not in wants], [w for w in wants if w not in has]
        gap = f"{old} are there and {new} are not" if old or new else f"in this order, {has}"
        raise ValueError(f"{page}.json has other {what}: {gap}; record anew with MTLIB_RECORD=1")


def _check(
    ways: Mapping[str, Way],
    tests: Mapping[str, Stream],
    of: Mapping[str, Stream] | None,
    live: Iterable[str],
) -> None:
    if not isinstance(ways, Mapping) or not ways or not isinstance(tests, Mapping) or not tests:
        raise TypeError(
            "expected ways, name -> Way, and tests, column -> stream; at least one of each"
        )
    check_contenders(ways, live, Way)
    if of is not None and set(of) != set(tests):
        raise ValueError(
            f"expected `of` to have the columns of tests, {list(tests)}, got {list(of)}"
        )
