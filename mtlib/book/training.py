"""What the page on bi-level problems trains: bowls with noise, digits in pairs, several runs at once; and its searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, Draw, Episode, Learner, Loss, Params, Steps, Stream, expect
from mtlib.learners.gradient import adam, minibatches, momentum
from mtlib.learners.optimizer import cosine, learned_optimizer, one_rate, with_starts
from mtlib.nets import mlp
from mtlib.tasks import ClassSet, above_zero, check_rows, check_seed, episodes, positive

# Splits, wrong labels, and what a few numbers say --------------------------------------------------


def parts_of(data: Batch, seed: int, *sizes: int) -> list[Batch]:
    """Rows of `data` in a drawn order, in parts of these sizes; what is left is one part more."""
    check_rows(data, "data")
    check_seed(seed)
    positive(**{f"sizes[{i}]": n for i, n in enumerate(sizes)})
    expect(sum(sizes) < len(data.y), f"sizes of less than {len(data.y)} rows in all", sizes)
    order = np.random.default_rng([seed, 77]).permutation(len(data.y))
    return [Batch(data.x[i], data.y[i]) for i in np.split(order, np.cumsum(sizes))]


def mislabelled(y: Tensor, share: float, seed: int) -> Tensor:
    """One-hot rows y (N, W), of which about a `share` has another class, each other one alike."""
    expect(isinstance(y, Tensor) and y.ndim == 2, "one-hot rows y (N, W)", y)
    expect(0 <= share <= 1, "a share from 0 to 1", share)
    check_seed(seed)
    rng, (n, ways) = np.random.default_rng([seed, 79]), y.shape
    by = rng.integers(1, ways, n) * (rng.random(n) < share)  # 0: it is right
    return torch.stack([row.roll(int(i)) for row, i in zip(y, by, strict=True)])


def three_numbers(rank: Tensor, clean: int, share: float, drop: float, log: float) -> Params:
    """φ of `weighted_ridge` by three numbers: the weight of the noisy images in all, which share is dropped, the log decay.

    `rank` (N,) is a noisy image's place by its loss, the smallest first; a dropped one weighs e⁻⁵ of one that is kept.
    `clean` is how many images follow whose labels are sure; they share the rest of the weight.
    """
    expect(0 < share < 1 and 0 <= drop < 1, "0 < share < 1 and 0 <= drop < 1", (share, drop))
    positive(clean=clean)
    kept = (1 - drop) * len(rank)
    noisy = np.log(share / kept) - 5.0 * (rank >= kept).double()
    sure = torch.full((clean,), np.log((1 - share) / clean)).double()
    return {
        "example.logit": torch.cat([noisy, sure]),
        "decay.group": sure.new_tensor([log]),
    }


def random_search(value: Callable[[Tensor], float], best: Tensor, trials: int, seed: int) -> Tensor:
    """Where `trials` random steps from `best` lead: each from the best place so far, longer after a success."""
    expect(callable(value), "a function of the numbers that are searched", value)
    positive(trials=trials)
    check_seed(seed)
    g, low, size = torch.Generator().manual_seed(seed), value(best), 1.5
    for _ in range(trials):
        tried = best + size * torch.randn(best.shape, generator=g)
        found = value(tried)
        size *= 1.5 if found < low else 1.5**-0.25
        best, low = (tried, found) if found < low else (best, low)
    return best


# A bowl with noise: the expected loss is known ----------------------------------------------------


class Bowls(nn.Module):
    """M bowls in D directions: the minimum of a row's is at x (N, M·D), h (D,) is how steep; outputs are √h (θ − x)."""

    root: Tensor

    def __init__(self, steepness: Tensor, bowls: int):
        super().__init__()
        expect(
            steepness.ndim == 1 and bool((steepness > 0).all()), "steepness > 0, (D,)", steepness
        )
        positive(bowls=bowls)
        self.theta = nn.Parameter(steepness.new_zeros(bowls, len(steepness)))
        self.register_buffer("root", steepness.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        away: Tensor = self.theta - x.unflatten(-1, self.theta.shape)
        out: Tensor = self.root * away
        return out.flatten(1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """½ Σ h (θ − x)², a sum over the bowls too, so that each has its own gradient; y is 0."""
        return 0.5 * (output - y).square().sum(-1).mean()

    def stream(self, variance: Tensor, steps: int, seed: int = 0) -> Stream:
        """One task a draw: starts of this `variance` (D,), a row of support for each step with a minimum from N(0, 1).

        The query has the minimum where it is in the mean, at 0.
        """
        positive(steps=steps)
        check_seed(seed)

        def stream(step: int) -> Episode:
            g = torch.Generator().manual_seed(1000 * seed + step)
            start = torch.randn(self.theta.shape, generator=g) * variance.sqrt()
            x = torch.randn(1, steps, self.theta.numel(), generator=g)
            zeros = torch.zeros_like(x[:, :1])
            held = {"x": x, "start": start.view(1, 1, -1).expand_as(x)}
            return Episode(Batch(held, torch.zeros_like(x)), Batch(zeros, zeros))

        return stream


def bowl_variance(steepness: Tensor, variance: Tensor, rate: float | Tensor, steps: int) -> Tensor:
    """E θ² after gradient steps of one rate α in a bowl whose minimum moves by N(0, 1) at every step.

    E θ_T² = q^T E θ_0² + (αh)² (1 − q^T)/(1 − q),  q = (1 − αh)²: the noisy quadratic model. {cite}`wu2018understanding`
    Raises ValueError unless 0 < αh < 2, where it stays bounded. `rate` () or (R, 1).
    """
    ah = torch.as_tensor(rate, dtype=steepness.dtype) * steepness
    expect(bool(((ah > 0) & (ah < 2)).all()), "rates with 0 < rate · steepness < 2", ah)
    q = (1 - ah) ** 2
    return q**steps * variance + ah**2 * (1 - q**steps) / (1 - q)


# Small trainings of real networks, several runs at once --------------------------------------------


def projected_pairs(
    data: ClassSet, inputs: int, shots: int, queries: int, tasks: int, seed: int
) -> Stream:
    """Two classes of `data`, seen through `inputs` random directions and at a random size: each task differs in all three.

    x ← 2 e^u (x − x̄) P, with P (D, `inputs`) orthonormal, u uniform on (−1, 1) and x̄ the mean of all numbers in `data`.
    Draws follow (`seed`, step).
    """
    positive(inputs=inputs)
    pairs = episodes(data, 2, shots, queries, tasks, seed)
    items = torch.cat(list(data.items)).flatten(1)
    width, mean = items.shape[1], items.mean()
    expect(inputs <= width, f"inputs of at most {width}", inputs)

    def stream(step: int) -> Episode:
        draw: Any = pairs(step)
        rng = np.random.default_rng([seed, step, 5])
        size = 2 * np.exp(rng.uniform(-1, 1, (tasks, 1, 1)))
        p = torch.from_numpy(np.linalg.qr(rng.standard_normal((tasks, width, inputs)))[0] * size)
        seen = [Batch((b.x.flatten(2) - mean) @ p.to(b.x), b.y) for b in draw]
        return Episode(*seen)

    return stream


def digit_trainings(
    images: Tensor,
    classes: Tensor,
    seeds: Sequence[int],
    part: int,
    tasks: int,
    width: Sequence[int] = (8,),
) -> Stream:
    """Small trainings for several runs: pairs of digits through eight directions, each with a new network of this `width`.

    A run's seed deals the ten digits out: four to practise (`part` 0), three for validation (1), three for the test (2).
    A task trains on 96 images and is judged on 64 others; a draw has `tasks` tasks of each run.
    """
    expect(part in (0, 1, 2), "a part 0, 1 or 2", part)
    make = partial(mlp, 8, width, 2)
    least, found = int(classes.bincount().min()), []
    for seed in seeds:
        digits = np.split(np.random.default_rng([seed, 1]).permutation(10), [4, 7])[part]
        items = torch.stack([images[classes == c][:least] for c in digits]).float()
        data = ClassSet(items, [str(c) for c in digits], "digits")
        own = 10 * seed + part
        found.append(with_starts(projected_pairs(data, 8, 48, 32, tasks, own), make, own))
    return runs(found)


def side_by_side(learner: Learner, copies: int) -> Learner:
    """Several runs in one: each entry of φ has a leading axis of runs, and support.x["run"] (N,) names a task's own.

    No run sees another: the gradient of a run's tasks reaches its own entries alone, and Adam moves each number by itself.
    So `fit` trains all of them as it would train each, up to rounding and Adam's ε.
    """
    positive(copies=copies)
    adapt = learner.adapt
    if not isinstance(adapt, Steps):
        raise ValueError(f"expected a learner with inner steps, got {type(adapt).__name__}")

    def init() -> Params:
        return {k: v.expand(copies, *v.shape).clone() for k, v in learner.init().items()}

    def given(phi: Params, support: Batch) -> Params:
        run = support.x["run"][:1]
        return {k: v.index_select(0, run)[0] for k, v in phi.items()}

    return learner._replace(init=init, adapt=adapt._replace(given=given))


def runs(streams: Sequence[Stream]) -> Stream:
    """The tasks of several streams as one draw, each with the number of its stream in support.x["run"]."""
    expect(len(streams) > 0, "streams, at least one", streams)

    def numbered(draw: Draw, run: int) -> Episode:
        if not isinstance(draw, Episode) or not isinstance(draw.support.x, dict):
            raise ValueError(
                f"expected streams of `with_starts(stream, make)`, got a {type(draw).__name__}"
            )
        x, y = draw.support
        run_of = torch.full(y.shape[:2], run, device=y.device)
        return Episode(Batch({**x, "run": run_of}, y), draw.query)

    def stream(step: int) -> Episode:
        found: Episode = _joined([numbered(s(step), i) for i, s in enumerate(streams)])
        return found

    return stream


def _joined(draws: Sequence[Any]) -> Any:
    """Draws one after the other along the axis of tasks."""
    first = draws[0]
    if isinstance(first, Tensor):
        return torch.cat(list(draws))
    if isinstance(first, dict):
        return {k: _joined([d[k] for d in draws]) for k in first}
    return type(first)(*(_joined(parts) for parts in zip(*draws, strict=True)))


def curves(learner: Learner, phi: Params, draw: Episode, loss: Loss, cap: float = 2.0) -> Tensor:
    """The mean query loss of each run's tasks after each inner step: (runs, K + 1).

    A task's loss above `cap`, or none as the training diverged, counts as `cap`: one task does not decide about a run.
    """
    above_zero(cap=cap)
    adapt, copies = learner.adapt, len(next(iter(phi.values())))
    if not isinstance(adapt, Steps):
        raise ValueError(f"expected a learner with inner steps, got {type(adapt).__name__}")

    def one(episode: Episode) -> Tensor:
        x, y = episode.query
        path = adapt.path(phi, episode.support)
        return torch.stack([loss(learner.predict(theta, x), y) for theta in path])

    with torch.no_grad():
        found: Tensor = torch.vmap(one)(draw).nan_to_num(cap).clamp(max=cap)
    return found.view(copies, -1, found.shape[1]).mean(1)


RIVALS: dict[str, tuple[Any, Any, tuple[float, ...]]] = {
    "gradient descent": (None, None, (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)),
    "momentum": (momentum(), None, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "Adam": (adam(), None, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "Adam, cosine": (adam(), cosine, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
}
"""Optimizers of one number: the rule, the schedule, the grid of rates."""


def trainer(
    way: str, steps: int, copies: int, width: Sequence[int] = (8,), loss: Loss = cross_entropy
) -> Learner:
    """One of `RIVALS`, or else the learned optimizer, as `copies` runs of so many steps, 16 rows each, on a network of this width."""
    net = mlp(8, width, 2, seed=0)
    rule, schedule, _ = RIVALS.get(way, (None, None, ()))
    learner = (
        one_rate(net, loss, 0.1, steps, rule, schedule and schedule(steps))
        if way in RIVALS
        else learned_optimizer(net, loss, steps)
    )
    return side_by_side(minibatches(learner, 16), copies)


def tuned(
    make: Callable[[], Learner], rates: Sequence[float], draw: Episode, loss: Loss, copies: int
) -> tuple[Params, bool]:
    """Each run's best rate of a grid, by the loss at the end of its own tasks: φ of `one_rate`, and whether one lies at an edge."""
    expect(len(rates) > 2, "a grid of at least three rates", rates)
    above_zero(**{f"rates[{i}]": a for i, a in enumerate(rates)})
    learner, logs = make(), torch.tensor(rates).log()
    ends = [
        curves(learner, {"optimizer.log_lr": a.expand(copies)}, draw, loss)[:, -1] for a in logs
    ]
    best = torch.stack(ends).argmin(0)
    edge = bool(((best == 0) | (best == len(rates) - 1)).any())
    return {"optimizer.log_lr": logs[best]}, edge
