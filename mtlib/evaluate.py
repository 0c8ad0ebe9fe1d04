"""Scores over many episodes, with the interval they deserve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from mtlib.core import Episode, Learner, Params, Stream, accuracy, fits, move, take
from mtlib.objective import Batched, count, default_chunk, default_threads
from mtlib.run.progress import bar
from mtlib.run.threads import sharing
from mtlib.tasks import check_draw

Metric = Callable[[Tensor, Tensor], Tensor]
"""`metric(prediction, y)` -> one number an episode."""


class Score(NamedTuple):
    mean: float
    interval: float  # half the width of the 95 % interval of the mean
    values: Tensor  # (E,) one number an episode, or a seed
    draw: float | None = None  # identifies the episodes, so that scores can be paired

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f}"

    def percent(self) -> str:
        """As a percentage with one decimal: '94.6 ± 0.4'."""
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f}"


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

    The interval is one over episodes, given these parameters; what another training run would give is
    `over_seeds`' business. Draws stream(0), stream(1), … until `episodes` are scored; memory does not grow
    with their number. Runs where `params` are.
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
        return metric(prediction, episode.query.y)

    def scores(data: Episode, size: int, starts: Sequence[int]) -> Tensor:
        return torch.cat([run(params, take(data, slice(a, a + size))) for a in starts])

    run, share = Batched(score, learner.vmap), sharing()
    values, step, draw = list[Tensor](), 0, 0.0
    with torch.no_grad(), bar(episodes, "evaluate", progress) as shown:
        while sum(map(len, values)) < episodes:
            data = stream(step)
            if step == 0:
                check_draw(data)
                draw = data.query.x.double().sum().item()
            data = move(data, device)
            size = chunk or default_chunk(params, count(data))
            workers = default_threads(params, data, size)
            parts = share(partial(scores, data, size), range(0, count(data), size), workers)
            values.append(torch.cat(parts).cpu())
            shown.update(len(values[-1]))
            step += 1
    return interval(torch.cat(values)[:episodes], draw)


def interval(values: Tensor, draw: float | None = None) -> Score:
    """Mean and 95 % interval of independent numbers: ± t₀.₉₇₅ · s/√n, Student's t with n − 1 degrees of freedom."""
    values = values.double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected at least 2 numbers in one row, got shape {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"expected finite scores; {int((~torch.isfinite(values)).sum())} of {len(values)} are not"
        )
    half = float(stats.t.ppf(0.975, len(values) - 1)) * values.std().item() / math.sqrt(len(values))
    return Score(values.mean().item(), half, values, draw)


def compare(a: Score, b: Score) -> Score:
    """a − b, paired: the same episodes, so what makes an episode easy cancels.

    Raises ValueError where the two were not scored on the same episodes.
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
    """
    results = [measure(seed) for seed in seeds]
    return interval(torch.tensor([r.mean if isinstance(r, Score) else float(r) for r in results]))
