"""Scores over many episodes, with the interval they deserve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from scipy import stats
from torch import Tensor

from mtlib.core import Episode, Learner, Params, Stream, fits, move, take
from mtlib.objective import Batched, in_chunks
from mtlib.run.copies import evaluating
from mtlib.run.progress import bar
from mtlib.tasks import check_draw
from mtlib.train import Diverged

_Setting = TypeVar("_Setting")

Metric = Callable[[Tensor, Tensor], Tensor]
"""`metric(prediction, y)` -> one number per episode."""


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest output is the labelled class; (B, W) and one-hot (B, W) -> scalar.

    Raises ValueError for one column: one output is always the largest.
    """
    if prediction.shape[-1] < 2 or y.shape[-1] < 2:
        raise ValueError(
            f"expected at least two classes, y one-hot (B, W), got predictions {tuple(prediction.shape)} and y "
            f"{tuple(y.shape)}. For regression give a metric, e.g. evaluate(..., metric=mse_loss); for one logit "
            "a metric of your own."
        )
    return (prediction.argmax(-1) == y.argmax(-1)).to(prediction.dtype).mean()


class NotFinite(ValueError):
    """Some of the numbers that should give a score are NaN or infinite."""


class Score(NamedTuple):
    """A `mean` and half the width of its 95 % `interval`, over episodes or over seeds.

    `values` (E,) has one number for each of them. `draw` identifies the episodes, so that scores can be paired.
    """

    mean: float
    interval: float
    values: Tensor
    draw: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f}"

    def __neg__(self) -> Score:
        return Score(-self.mean, self.interval, -self.values, self.draw)

    def percent(self) -> str:
        """As a percentage with one decimal: '94.6 ± 0.4'."""
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f}"

    def points(self) -> str:
        """A difference of two shares, in percentage points and with its sign: '+1.3 ± 0.4'."""
        return f"{100 * self.mean:+.1f} ± {100 * self.interval:.1f}"

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.interval

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.interval

    def minus(self, other: Score) -> Score:
        """This score less another on the same episodes, paired: `compare(self, other)`."""
        return compare(self, other)


def evaluate(
    learner: Learner,
    params: Params,
    stream: Stream,
    episodes: int = 600,
    metric: Metric = accuracy,
    chunk: int | None = None,
    progress: bool = True,
) -> Score:
    """Adapt to each episode's support set and score its query set: mean and 95 % interval over episodes.

    ```pycon
    >>> from mtlib.data.planted import planted
    >>> from mtlib.learners.metric import protonet
    >>> from mtlib.nets import mlp
    >>> from mtlib.tasks import episodes
    >>> learner = protonet(mlp(30, (32,), 5, seed=0))
    >>> stream = episodes(planted(), ways=5, shots=5, queries=10, tasks=10, seed=1)
    >>> score = evaluate(learner, learner.init(), stream, episodes=50)
    >>> score.mean > 0.2, len(score.values)
    (True, 50)

    ```

    The interval is one over episodes, given these parameters; what another training run would give is
    `over_seeds`' business. Draws stream(0), stream(1), … until `episodes` are scored; memory does not grow
    with their number. Runs where `params` are. Networks adapt and predict as in evaluation mode, whatever mode they are in:
    without dropout, and with norms that read their running statistics if `params` has them (`mtlib.norm.calibrate`).
    """
    if episodes < 2:
        raise ValueError(f"expected at least 2 episodes for an interval, got {episodes}")
    device = next(iter(params.values())).device

    def score(phi: Params, episode: Episode) -> Tensor:
        theta = learner.adapt(phi, episode.support)
        prediction = learner.predict(theta, episode.query.x)
        if not fits(metric, prediction, episode.query.y):
            raise ValueError(
                f"expected predictions of the targets' shape {tuple(episode.query.y.shape)}, got "
                f"{tuple(prediction.shape)}: the head has {prediction.shape[-1]} outputs. "
                "`start(learner, trained)` gives a learner of the right width."
            )
        known = ~torch.isnan(prediction).any()  # argmax would make a class of NaN
        return torch.where(known, metric(prediction, episode.query.y), torch.nan)

    def scores(part: slice) -> Tensor:
        return run(params, take(data, part))

    run = Batched(score, learner.vmap)
    values, step, draw = list[Tensor](), 0, 0.0
    with torch.no_grad(), evaluating(), bar(episodes, "evaluate", progress) as shown:
        while sum(map(len, values)) < episodes:
            data = stream(step)
            if not isinstance(data, Episode):
                raise TypeError(
                    f"evaluate expects episodes (support, query), got {type(data).__name__}; "
                    "`mtlib.tasks.episodes` makes such a stream"
                )
            if step == 0:
                check_draw(data)
                draw = data.query.x.double().sum().item()
            if metric is accuracy and data.query.y.shape[-1] > 1 and not _one_hot(data.query.y):
                raise ValueError(
                    "expected one-hot rows in the query's y for accuracy: one 1 in each row, 0 elsewhere. For several "
                    "labels per item, or real targets, give another metric."
                )
            data = move(data, device)
            values.append(in_chunks(scores, _joined, params, data, chunk, run.share).cpu())
            shown.update(len(values[-1]))
            step += 1
    return interval(torch.cat(values)[:episodes], draw)


def _one_hot(y: Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all() and (y.sum(-1) == 1).all())


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def answers(learner: Learner, params: Params, draw: Episode) -> Tensor:
    """What the learner predicts for the query items of each task of a draw: (T, Q, W), where `params` are.

    predict(adapt(φ, S_t), x_t) for each task t, without gradients and in evaluation mode; the labels of the queries are not
    looked at.
    """
    draw = move(draw, next(iter(params.values())).device)

    def task(phi: Params, episode: Episode) -> Tensor:
        return learner.predict(learner.adapt(phi, episode.support), episode.query.x)

    def part(tasks: slice) -> Tensor:
        return run(params, take(draw, tasks))

    run = Batched(task, learner.vmap)
    with torch.no_grad(), evaluating():
        return in_chunks(part, _joined, params, draw, None, run.share)


def interval(values: Tensor, draw: float | None = None) -> Score:
    """Mean and 95 % interval of independent numbers: ± t₀.₉₇₅ · s/√n, Student's t with n − 1 degrees of freedom.

    ```pycon
    >>> print(interval(torch.tensor([0.90, 0.92, 0.94, 0.96])))
    0.930 ± 0.041

    ```
    """
    values = values.double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected at least 2 numbers in one row, got shape {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise NotFinite(
            f"expected finite scores; {int((~torch.isfinite(values)).sum())} of {len(values)} are not. Did the inner "
            "steps diverge, or does a class have no support item?"
        )
    half = float(stats.t.ppf(0.975, len(values) - 1)) * values.std().item() / math.sqrt(len(values))
    return Score(values.mean().item(), half, values, draw)


def compare(a: Score, b: Score) -> Score:
    """a − b, paired: the same episodes, so what makes an episode easy cancels.

    ```pycon
    >>> one = interval(torch.tensor([0.70, 0.90, 0.80]), draw=1.0)
    >>> other = interval(torch.tensor([0.60, 0.80, 0.71]), draw=1.0)
    >>> compare(one, other).points()
    '+9.7 ± 1.4'

    ```

    Raises ValueError if the two were not scored on the same episodes.
    """
    if len(a.values) != len(b.values) or a.draw is None or a.draw != b.draw:
        raise ValueError(
            f"expected two scores on the same episodes; got {len(a.values)} and {len(b.values)} values from draws "
            f"{a.draw} and {b.draw}. Evaluate both with one stream."
        )
    return interval(a.values - b.values, a.draw)


def over_seeds(measure: Callable[[int], float | Score], seeds: Iterable[int]) -> Score:
    """Run a whole experiment for each seed: mean and 95 % interval over training runs.

    `measure(seed)` trains and returns a number, or a Score whose mean counts.

    ```pycon
    >>> print(over_seeds(lambda seed: 0.9 + 0.01 * seed, range(3)).percent())
    91.0 ± 2.5

    ```
    """
    results = [measure(seed) for seed in seeds]
    return interval(torch.tensor([r.mean if isinstance(r, Score) else float(r) for r in results]))


# Choosing a setting on validation data --------------------------------------------------------


class Best(NamedTuple):
    """What `best_of` found."""

    setting: Any  # its name: a key of `settings`
    score: float | Score  # its quality, as it came
    at_edge: bool  # whether it is the first or last of an ordered grid: a better one may lie beyond
    table: dict[Any, float | Score]  # the quality of every setting; −∞ for one that diverged


def best_of(
    settings: Mapping[Any, _Setting] | Iterable[_Setting],
    quality: Callable[[_Setting], float | Score],
    ordered: bool = True,
) -> Best:
    """The setting of the highest quality(settings[name]), of equal ones the first: a grid search.

    Settings without names are their own names.

    ```pycon
    >>> best_of((0.01, 0.03, 0.1, 0.3), lambda rate: -((rate - 0.1) ** 2)).setting
    0.1

    ```

    `quality` trains and scores on validation data, never on test data; for a loss give its negative. A run that
    diverged (`Diverged`, `NotFinite`, NaN) is the worst. In an ordered grid a best setting at its edge gives a warning:
    widen the grid, or say where it ends. Names that are tuples of numbers are a grid with several axes, each with two
    edges; an axis with one value, or of other things than numbers, has none. Raises ValueError if there is no
    setting, `NotFinite` where all of them diverged.
    """
    named = dict(settings) if isinstance(settings, Mapping) else {s: s for s in settings}
    if not named:
        raise ValueError("expected at least one setting to choose from, got none")
    table = {name: _or_worst(quality, setting) for name, setting in named.items()}
    means = {k: s.mean if isinstance(s, Score) else s for k, s in table.items()}
    best = max(means, key=means.__getitem__)
    if means[best] == -math.inf:
        raise NotFinite(f"expected a setting that does not diverge; all did: {list(named)}")
    at_edge = ordered and _at_edge(best, list(named))
    if at_edge:
        warnings.warn(
            f"the best setting, {best}, lies at the edge of its grid, {list(named)}: widen the grid, or say why it "
            "ends there",
            stacklevel=2,
        )
    return Best(best, table[best], at_edge, table)


def _or_worst(quality: Callable[[_Setting], float | Score], setting: _Setting) -> float | Score:
    """The quality of a setting, −∞ where its run diverged."""
    try:
        found = quality(setting)
    except (Diverged, NotFinite):
        return -math.inf
    found = found if isinstance(found, Score) else float(found)
    return -math.inf if math.isnan(found.mean if isinstance(found, Score) else found) else found


def _at_edge(best: Any, names: list[Any]) -> bool:
    """Whether `best` is the first or the last of its grid, along one of its axes."""
    if not isinstance(best, tuple) and not _numbers(names):
        return len(names) > 1 and best in (names[0], names[-1])
    rows = [name if isinstance(name, tuple) else (name,) for name in names]
    own = best if isinstance(best, tuple) else (best,)
    columns = [[row[i] for row in rows if len(row) == len(own)] for i in range(len(own))]
    return any(
        _numbers(column) and len(set(column)) > 1 and value in (min(column), max(column))
        for value, column in zip(own, columns, strict=True)
    )


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
