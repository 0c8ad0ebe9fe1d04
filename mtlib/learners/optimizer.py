"""Optimizers as learners: a task is a network that is to be trained, from a start of its own, and φ steers the steps.

A task's start travels in the rows of its support set, as `with_starts` puts it there; φ holds no start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Episode,
    Learner,
    Loss,
    Params,
    Point,
    Steps,
    Stream,
    apply,
    expect,
    require,
    risk,
    ways,
)
from mtlib.learners.gradient import (
    Rule,
    at_least_zero,
    check_descent,
    check_steps,
    descending,
    root,
    weights,
)
from mtlib.learners.hyper import flat, unflat
from mtlib.run.devices import random_kept
from mtlib.tasks import above_zero, check_draw, check_seed, functions, positive

DECAYS = (0.5, 0.9, 0.99)
"""β of the momenta that a learned optimizer sees."""
FEATURES = len(DECAYS) + 6
"""How many numbers it sees of one parameter."""


def one_rate(
    net: nn.Module,
    loss: Loss,
    lr: float,
    steps: int,
    rule: Rule | None = None,
    schedule: Callable[[int], float] | None = None,
) -> Learner:
    """An optimizer of one number, as a learner: φ is the logarithm of its rate.

    θ_0 = the task's start,  θ_{j+1} = θ_j − c_j e^φ r(∇L^S(θ_j)),  φ["optimizer.log_lr"] = log `lr` at first. r is a `rule`:
    none for gradient descent, `momentum()`, `adam()`; c_j = `schedule`(j), 1 where there is none.
    Raises ValueError unless `lr` > 0, as its logarithm is learned, or for a start of another network.
    """
    above_zero(lr=lr)
    check_descent(loss, lr, steps, rule)
    expect(schedule is None or callable(schedule), "a schedule, a function of the step", schedule)
    own, f = weights(net), apply(net)

    def init() -> Params:
        return {"optimizer.log_lr": next(iter(own.values())).new_tensor(lr).log()}

    def rate(phi: Params) -> Callable[[int], Tensor]:
        require(phi, ["optimizer.log_lr"])
        return lambda j: (schedule(j) if schedule else 1.0) * phi["optimizer.log_lr"].exp()

    adapt = descending(
        partial(_begin, own), partial(_value, f, loss), rate, steps, lambda phi: rule
    )
    return Learner(init, adapt._replace(alone=True), f)


def cosine(steps: int) -> Callable[[int], float]:
    """A schedule for `one_rate`: c_j = ½ (1 + cos(πj/K)), K = `steps`, and 0 from then on. {cite}`loshchilov2017sgdr`"""
    positive(steps=steps)
    return lambda j: 0.5 * (1 + math.cos(math.pi * min(j, steps) / steps))


def learned_optimizer(
    net: nn.Module,
    loss: Loss,
    steps: int,
    rates: Sequence[float] = (0.0, 0.0, 0.01),
    hidden: int = 16,
    scale: float = 0.1,
    seed: int = 0,
) -> Learner:
    """A learned optimizer: φ is a small network that moves each parameter of another by what it sees of it alone.

    θ ← θ − e^s (a_1 g + a_2 m + a_3 m̂/(√v̂ + ε) + λ d),   (d, s) = Bᵀ tanh(Aᵀz + b),   λ = `scale`.

    g = ∇L^S(θ) at this step, m ← 0.9 m + g, and the third is `adam`'s direction; a = φ["optimizer.rates"], `rates` at
    first. z (9,) of one parameter is g, its means at decays 0.5, 0.9 and 0.99, √v̂ and θ, each divided by its root mean
    square in the parameter's tensor, then `adam`'s direction, tanh(j/10) and tanh(j/100) of the step j. A (9, H), b and
    B (H, 2) are φ["optimizer.in"], ["optimizer.bias"] and ["optimizer.out"], H = `hidden`. B is 0 at first, so that training
    begins at the hand-made optimizer that `rates` name: gradient descent (α, 0, 0), momentum (0, α, 0), Adam (0, 0, α).
    One φ serves networks of any size. Features and output follow {cite:t}`metz2019understanding`, the hand-made part
    {cite:t}`harrison2022closer`; {cite:t}`andrychowicz2016learning` had a recurrent network see g alone.
    A task's start is in its support set (`with_starts`). Raises ValueError unless there are three finite `rates` of at
    least 0 and `scale` > 0, or for a start of another network.
    """
    check_descent(loss, 0.0, steps)
    expect(isinstance(rates, Sequence) and len(rates) == 3, "three rates, (α_1, α_2, α_3)", rates)
    at_least_zero(**{f"rates[{i}]": a for i, a in enumerate(rates)})
    check_steps(hidden, "hidden", 1)
    above_zero(scale=scale)
    check_seed(seed)
    own, f = weights(net), apply(net)
    value = partial(_value, f, loss)
    moves = flat(
        {k: torch.full_like(p, p.requires_grad) for k, p in net.named_parameters()}
    ).detach()
    tensor = torch.cat([torch.full((v.numel(),), i) for i, v in enumerate(own.values())])  # (P,)

    def init() -> Params:
        like = next(iter(own.values()))
        drawn = torch.randn(FEATURES, hidden, generator=torch.Generator().manual_seed(seed))
        return {
            "optimizer.rates": like.new_tensor(rates),
            "optimizer.in": (drawn / FEATURES**0.5).to(like),
            "optimizer.bias": like.new_zeros(hidden),
            "optimizer.out": like.new_zeros(hidden, 2),
        }

    def one(phi: Params, support: Batch, j: int, point: Point) -> Point:
        require(phi, names)
        theta, at = flat(point[0]), tensor.to(support.y.device)
        g = flat(ways.gradient(value(phi, support), point[0]))
        seen, directions, state = features(theta, g, point[1], j, at)
        step = moves.to(g) * update(phi, seen, directions, scale)
        return unflat(theta - step, own), state

    names = tuple(init())
    begin = lambda phi, support: (_begin(own, phi, support), None)  # noqa: E731
    return Learner(init, Steps(begin, one, steps, alone=True), f)


def update(phi: Params, seen: Tensor, directions: Tensor, scale: float) -> Tensor:
    """e^s (Σ_i a_i u_i + λ d),  (d, s) = Bᵀ tanh(Aᵀz + b): what a learned optimizer takes off each parameter, (P,).

    z = `seen` (9, P), u = `directions` (3, P), λ = `scale`; a, A, b and B are φ's.
    """
    shapes = seen.ndim == 2 and directions.shape == (3, seen.shape[1])
    expect(shapes, "features (9, P) and three directions (3, P)", directions)
    hidden = (seen.mT @ phi["optimizer.in"] + phi["optimizer.bias"]).tanh()
    d, s = (hidden @ phi["optimizer.out"]).mT
    made_by_hand = phi["optimizer.rates"] @ directions
    step: Tensor = s.exp() * (made_by_hand + scale * d)
    return step


def features(
    theta: Tensor, g: Tensor, state: Any, j: int, tensor: Tensor
) -> tuple[Tensor, Tensor, Any]:
    """What is seen of each parameter at step j, z (9, P); the three directions made by hand (3, P); the state after it.

    `state` is None at first, then Σ_i β^i g_{j−i} for each β of DECAYS (3, P), and the mean of squares at decay 0.999
    (P,). `tensor` (P,) numbers the tensor that a parameter is of. θ, g: (P,).
    """
    expect(theta.shape == g.shape == tensor.shape, "theta, g and tensor, all (P,)", theta)
    sums, squares = state or (g.new_zeros(len(DECAYS), len(g)), torch.zeros_like(g))
    beta = g.new_tensor(DECAYS)[:, None]
    sums, squares = beta * sums + g, 0.999 * squares + 0.001 * g**2
    means = sums * (1 - beta) / (1 - beta ** (j + 1))
    size = root(squares / (1 - 0.999 ** (j + 1)))
    adams = means[1] / (size + 1e-8)
    own = alike(torch.stack([g, *means, size, theta]), tensor)
    clock = g.new_tensor([math.tanh(j / 10), math.tanh(j / 100)])[:, None].expand(2, len(g))
    seen = torch.cat([own, adams[None], clock])
    return seen, torch.stack([g, sums[1], adams]), (sums, squares)


def alike(features: Tensor, tensor: Tensor) -> Tensor:
    """Features (F, P), each divided by its root mean square over the parameters of one tensor, numbered by `tensor` (P,)."""
    expect(features.ndim == 2 and features.shape[1:] == tensor.shape, "features (F, P)", features)
    member = nn.functional.one_hot(tensor).to(features)  # (P, L)
    square = (features**2 @ member) / member.sum(0)
    return features / ((square + 1e-16).sqrt() @ member.mT)


def with_starts(stream: Stream, make: Callable[[], nn.Module], seed: int = 0) -> Stream:
    """Give each task of a stream a network to be trained, a new one of `make()`.

    support.x becomes {"x": x, "start": (T, N, P)}, whose rows all are the parameters of the task's network, `flat(params)`:
    so a mini-batch of rows has them too (`mtlib.learners.gradient.minibatches`). Draws follow (`seed`, step).
    """
    functions(1, stream=stream)
    expect(not isinstance(make, nn.Module), "make, a function that makes a network", make)
    functions(0, make=make)
    check_seed(seed)

    def started(step: int) -> Episode:
        draw = stream(step)
        if not isinstance(draw, Episode):
            raise ValueError(
                f"expected a stream of episodes (support, query), got {type(draw).__name__}"
            )
        check_draw(draw)
        tasks, rows = draw.support.y.shape[:2]
        rng = np.random.default_rng([seed, step])
        with random_kept():
            torch.manual_seed(int(rng.integers(2**31)))
            starts = torch.stack([flat(weights(make())) for _ in range(tasks)])
        starts = starts.to(draw.support.y)[:, None].expand(-1, rows, -1)
        return draw._replace(support=Batch({"x": draw.support.x, "start": starts}, draw.support.y))

    return started


def _begin(own: Params, phi: Params, support: Batch) -> Params:
    return unflat(_of(support, "start")[0], own)


def _value(
    f: Callable[[Params, Any], Tensor], loss: Loss, phi: Params, support: Batch
) -> Callable[[Params], Tensor]:
    x = _of(support, "x")
    return lambda theta: risk(loss, f(theta, x), support.y)


def _of(support: Batch, name: str) -> Any:
    found = isinstance(support, Batch) and isinstance(support.x, dict) and name in support.x
    what = 'a support set with x = {"x": …, "start": …}, as `with_starts(stream, make)` gives it'
    expect(found, what, support)
    return support.x[name]
