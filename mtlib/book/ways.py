"""Contenders of contests on few-shot classes and curves: networks practised on episodes, and networks pre-trained on names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.book.contest import Way
from mtlib.book.page import device
from mtlib.core import Batch, Episode, Learner, Params, expect, features, move, parameters, start
from mtlib.data.sinusoids import noisy_sinusoids
from mtlib.joint import joint
from mtlib.learners.amortised import point
from mtlib.learners.closed_form import alpaca, head_matrix, heads_prior, ridge
from mtlib.learners.finetune import check_linear_head, finetune, from_there
from mtlib.learners.gradient import check_steps, maml
from mtlib.learners.metric import centred, cosine_head
from mtlib.nets import mlp, seeded
from mtlib.norm import Norm, calibrate
from mtlib.tasks import ClassSet, above_zero, cut, episodes, mixture, one_of, pool, positive
from mtlib.train import cosine_adam, fit

Make = Callable[..., Any]
"""(network, *settings) -> a learner, or for practice what `bilevel` takes: learner, loss and perhaps a hypergradient."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What ways of learning share: classes to train on, a network, and how long practice and pre-training are.

    `network(outputs, statistics, seed)` draws it, where `statistics` are those of its norms. `practise` are outer steps,
    `study` batches of 64 items.
    """

    data: ClassSet
    network: Callable[..., nn.Module]
    practise: int
    study: int


def ready(bench: Bench, make: Make, phi: Params, centre: bool = False) -> tuple[Learner, Params]:
    """The learner as the tests use it: statistics of its norms, and with `centre` a centre, stored from training items."""
    learner = make(bench.network(5, "stored").to(device()))
    phi, items = move(start(learner, phi).params, device()), bench.data.items
    some = [move(items[:, k].contiguous(), device()) for k in (0, 7, 14)]
    if any(isinstance(m, Norm) for m in learner.net.modules()):
        phi = calibrate(learner.net, phi, some)
    return learner, centred(learner.net, phi, some[0]) if centre else phi


@cache
def study(bench: Bench, head: str, rate: float, batch: int, seed: int) -> Params:
    """Pre-training: all classes named at once, by a "linear" or a "cosine" head. Runs once for the same arguments."""
    net = bench.network(len(bench.data.names), seed=seed)
    net = cosine_head(net) if head == "cosine" else net
    named = mixture(pool(bench.data), batch=batch, seed=seed)
    steps = max(1, bench.study * 64 // batch)
    how = {**cosine_adam(rate, steps), "device": device()}
    return fit(joint(net, cross_entropy), parameters(net), named, steps, **how).params


def studying(
    bench: Bench,
    make: Make,
    settings: Sequence[Any],
    head: str = "linear",
    centre: bool = False,
) -> Way:
    """Pre-training, and then the learner `make(net, *rest)`; a setting is (rate, batch, *rest), tried at full length."""

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        rate, batch, *rest = setting
        phi = study(bench, head, rate, batch, seed)
        return ready(bench, lambda net: make(net, *rest), phi, centre)

    return Way("transfer", train, settings, ordered=False)


def practising(
    bench: Bench,
    make: Make,
    settings: Sequence[Any],
    first: tuple[float, int] | None = None,
    ways: int = 20,
    whole: bool = False,
) -> Way:
    """Practice on one-shot episodes; a setting is (rate, *rest), and `make(net, *rest)` gives what `bilevel` takes.

    With `first`, rate and batch of pre-training, that goes before, and half the practice follows. With `whole` each
    setting is tried at full length. A grid of rates alone is ordered.
    """

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        rate, *rest = setting
        with seeded(seed):
            learner, *loss = make(bench.network(5), *rest)
            phi = learner.init()
        steps = max(1, bench.practise // (1 if whole else share))
        if first is not None:
            before = study(bench, "linear", *first, seed)
            phi, steps = start(learner, before).params, max(1, steps // 2)
        drawn = episodes(bench.data, ways, 1, 5, tasks=1, seed=seed)
        how = {**cosine_adam(rate, steps), "device": device()}
        phi = fit(bilevel(learner, *loss), phi, drawn, steps, **how).params
        return ready(bench, lambda net: make(net, *rest)[0], phi)

    return Way("meta", train, settings, ordered=all(len(s) == 1 for s in settings))


def crossed(cross: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    """A grid in which one thing changes at a time: each of `cross` with the first of `rest`, its first with the others."""
    if not cross or not rest:
        raise ValueError(f"expected two grids of at least one setting, got {cross!r} and {rest!r}")
    return [(*c, *rest[0]) for c in cross] + [(*cross[0], *r) for r in rest[1:]]


TRAINED = {
    "untrained": "baseline",
    "joint": "transfer",
    "own heads": "transfer",
    "MAML": "meta",
    "ridge head": "meta",
}
"""How curves are trained -> the kind of contender that this makes."""

TAKES = {"baseline": 0, "transfer": 2, "meta": 3}
"""Kind -> the numbers of a setting that training takes: rate, decay and, practising, one of the learner."""


def on_curves(by: str, settings: Sequence[Any], curves: int, points: int, steps: int) -> Way:
    """A contender on a fixed set of `curves` noisy sinusoids that have `points` measurements in all.

    `by` is one of `TRAINED`: nothing; one function for all curves, "joint"; an output for each, "own heads"; or practice on
    episodes of five points, "MAML" with three inner steps or a "ridge head". Each step sees 375 points; the first two
    trainings take twice as many steps. A setting is (rate, decay, *rest): the inner rate or the strength that practice
    begins with, then inner rate and steps of the adaptation, or for own heads the noise of `heads_prior`.
    """
    one_of(by=(by, tuple(TRAINED)))
    positive(curves=curves, points=points, steps=steps)
    kind = TRAINED[by]
    first = TAKES[kind]

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        net, rest = mlp(1, (40, 40), 1, seed=seed), setting[first:]
        phi = move(parameters(net), device())
        if first:
            how = (by, tuple(setting[:first]), seed, curves, points // curves)
            phi = _trained_on_curves(
                *how, max(1, steps * (2 if kind == "transfer" else 1) // share)
            )
        if by == "ridge head":
            return ridge(net), phi
        if by != "own heads":
            return finetune(net, mse_loss, *rest), phi
        body = {k: v for k, v in phi.items() if k.startswith("body")}
        return point(alpaca(net)), {**body, **heads_prior(head_matrix(phi), *rest)}

    return Way(kind, train, settings)


@cache
def _trained_on_curves(
    by: str, setting: Any, seed: int, curves: int, points: int, steps: int
) -> Params:
    """φ of one training of `on_curves`, on curves of the seed with `points` measurements each. Runs once for the same arguments."""
    rate, decay, *inner = setting
    draw = noisy_sinusoids(points, 1, curves, 10 + seed)(0)
    assert isinstance(draw, Episode)
    data = draw.support
    size, own = min(points, 15), by == "own heads"

    def few(step: int) -> Episode:
        g = torch.Generator().manual_seed(10_007 * seed + step)
        some = torch.randint(curves, (375 // size, 1), generator=g)
        at = torch.rand(len(some), points, generator=g).argsort(1)[:, :size]
        return cut(Batch(data.x[some, at], data.y[some, at]), 5)

    def each_its_own(prediction: Tensor, y: Tensor) -> Tensor:
        return ((prediction - y) * (y != 0)).square().sum() / len(y)  # 0 where it is another's row

    how = {**cosine_adam(rate, steps, decay), "device": device()}
    net = mlp(1, (40, 40), curves if own else 1, seed=seed)
    if by in ("MAML", "ridge head"):
        learner = ridge(net, *inner) if by == "ridge head" else maml(net, mse_loss, inner[0], 3)
        return fit(bilevel(learner, mse_loss), learner.init(), few, steps, **how).params
    y = data.y * (torch.eye(curves)[:, None] if own else 1)
    rows = Batch(data.x.flatten(0, 1), y.flatten(0, 1))
    some = mixture(rows, batch=375, seed=seed)
    return fit(joint(net, each_its_own), parameters(net), some, steps, **how).params


def probed(learner: Learner, strength: float, iterations: int = 600) -> Learner:
    """The learner, begun with the probe's head: θ₀ has φ's body, and W, b = argmin CE(z Wᵀ + b, y) + ½λ‖W‖², λ = `strength`.

    For a `finetune` that is `lp_ft`. There a solver runs task by task; here all tasks run at once, by `iterations` steps of
    Nesterov's method, begun anew where it turns back, on features (N, D) of mean zero. Steps are taken in the metric
    Zᵀ Z / 2N + λI, which bounds the curvature. The solution is a constant to the outer gradient. It is NaN where the slope
    that is left, over λ, is more than a hundredth of ‖W, b‖: large features and a small λ need more iterations.

    Raises ValueError for a learner without a network, a head other than one linear layer with a bias, targets that are not
    rows (N, W), or unless λ > 0. {cite}`kumar2022finetuning`
    """
    expect(isinstance(learner, Learner), "a learner, such as finetune(net, ...)", learner)
    expect(learner.net is not None, "a learner with a network", learner)
    above_zero(strength=strength)
    check_steps(iterations, "iterations", 1)
    net: nn.Module = learner.net  # type: ignore[assignment]
    check_linear_head(net)
    z = features(net)

    @torch.no_grad()
    def solved(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n, mean = len(x), x.mean(0)
        x = x - mean
        one = (x.square().sum() / n).sqrt().clamp(min=1e-6).expand(n, 1)  # for the bias
        x = torch.cat([x, one], 1)
        decay = torch.cat([torch.full_like(mean, strength), torch.zeros_like(mean[:1])])
        metric = torch.linalg.inv(x.mT @ x / (2 * n) + torch.diag(decay))

        def slope(w: Tensor) -> Tensor:
            return ((x @ w.mT).softmax(-1) - y).mT @ x / n + decay * w

        ahead = w = x.new_zeros(y.shape[-1], x.shape[-1])
        t = x.new_ones(())
        for _ in range(iterations):
            new = ahead - slope(ahead) @ metric
            t = torch.where(((ahead - new) * (new - w)).sum() > 0, 1.0, t)
            after = (1 + (1 + 4 * t**2).sqrt()) / 2
            ahead, w, t = new + (t - 1) / after * (new - w), new, after
        left = slope(w).norm() / strength
        w = torch.where(left <= 0.01 * w.norm(), w, torch.nan)
        return w[:, :-1], w[:, -1] * one[0] - w[:, :-1] @ mean

    def given(phi: Params, support: Batch) -> Params:
        expect(support.y.ndim == 2, "targets y (N, W): `mtlib.tasks.one_hot(y, ways)`", support.y)
        w, b = solved(z(phi, support.x).detach(), support.y)
        return {**phi, "head.weight": w, "head.bias": b}

    def init() -> Params:
        return {k: v for k, v in learner.init().items() if not k.startswith("head.")}

    return learner._replace(init=init, adapt=from_there(learner.adapt, given))
