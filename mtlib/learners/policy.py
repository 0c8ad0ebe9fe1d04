"""Learners whose loss is a return: what a policy's actions earn in a world that has no derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Episode,
    Learner,
    Loss,
    Params,
    Point,
    apply,
    expect,
    parameters,
    risk,
    rows,
)
from mtlib.learners.gradient import at_least_zero, check_steps, descending, made, moving
from mtlib.tasks import above_zero

World = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`world(state, action, hidden)` -> (next state, reward (N,)); it is never differentiated."""

Surrogate = Callable[[Tensor, Tensor], Tensor]
"""`surrogate(log_p, rewards)` -> numbers equal to the rewards (N, H), which can be differentiated in log π (N, H)."""


def policy_gradient(
    net: nn.Module,
    world: World,
    spread: float,
    lr: float,
    steps: int,
    dims: int = 2,
    surrogate: Surrogate | None = None,
    start: Callable[[Tensor], Tensor] | None = None,
) -> Learner:
    """MAML where the loss is a return: steps of policy gradient on trajectories of the support set.

    θ ← θ + α ∇R̂(θ), `steps` times from θ = φ, R̂ the mean return of the `surrogate`'s rewards, `dice` by default. A step
    acts anew, so the steps share the trajectories of the support set out among them: of k steps the j-th takes
    trajectories j, j + k, …. The policy is N(f_θ(s), `spread`² I) with actions of `dims` numbers. x: (N, H, `dims` + hidden) holds,
    for H steps of N trajectories, the standard-normal draws of the action and what the world hides; y: (N, H) how much
    each reward counts (1, or a discount). A trajectory starts at s = 0 (N, `dims`), or at `start(hidden)`: so a policy can
    be told what others must find out. `predict` gives the rewards (N, H). With `steps` = 0 `bilevel` trains one policy
    for all tasks. Raises ValueError if `spread` ≤ 0 or `lr` < 0, or where a step has no trajectory.
    {cite}`finn2017maml,foerster2018dice`
    """
    at_least_zero(lr=lr)
    check_steps(dims, "dims", 1)
    if not 0 < spread < math.inf:
        raise ValueError(f"expected a policy with a spread > 0, finite, got {spread}")
    f, rewarded = apply(net), dice if surrogate is None else surrogate
    expect(made(rewarded), "surrogate(log_p, rewards), a function such as dice", rewarded)
    expect(start is None or made(start), "start(hidden), a function", start)

    def predict(theta: Params, x: Tensor) -> Tensor:
        states, actions, rewards = act(f, theta, world, x, spread, dims, start)
        means = f(theta, states.flatten(0, 1)).view_as(actions)
        return rewarded(log_normal(actions, means, spread), rewards)

    def value(phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        return lambda theta: cost(predict({**phi, **theta}, support.x), support.y)

    every = descending(moving(net), value, lambda phi: lr, steps)

    def own(phi: Params, support: Batch, j: int, point: Point) -> Point:
        n = rows(support.x)
        expect(n >= steps, f"a trajectory for each of {steps} steps", n)
        return every.step(phi, Batch(support.x[j::steps], support.y[j::steps]), j, point)

    adapt = every._replace(step=own, descent=None)  # the cost of a step is a sample, and may rise
    return Learner(lambda: parameters(net), adapt, predict, net=net)


def with_sampling(
    net: nn.Module, world: World, spread: float, dims: int = 2, level: float = 0.0
) -> Callable[[Learner, Loss], Callable[[Params, Episode], Tensor]]:
    """The gradient of the expected loss of `policy_gradient`, for one support set: of θ, and of which walks it is made from.

    ∇E_S[L^Q(θ(φ, S))] = E_S[∇L^Q(θ(φ, S)) + (L^Q(θ) − b) ∇log p_φ(S)], with b = `level`, any constant: near the loss it
    saves noise. The second term is credit for walks that adapt well. Exact in expectation where the learner's surrogate is
    `reinforce`, one step and an unbiased query loss: `dice` would count part of it twice.
    {cite}`stadie2018importance,alshedivat2018continuous`
    """
    f = apply(net)
    expect(made(world), "world(state, action, hidden), a function", world)
    expect(math.isfinite(level), "a finite level", level)
    above_zero(spread=spread)

    def hypergradient(learner: Learner, loss: Loss) -> Callable[[Params, Episode], Tensor]:
        def task(phi: Params, episode: Episode) -> Tensor:
            states, actions, _ = act(f, phi, world, episode.support.x, spread, dims)
            means = f(phi, states.flatten(0, 1)).view_as(actions)
            log_p = log_normal(actions, means, spread).sum()
            theta = learner.adapt(phi, episode.support)
            value = risk(loss, learner.predict(theta, episode.query.x), episode.query.y)
            return value + (value.detach() - level) * (log_p - log_p.detach())

        return task

    return hypergradient


def act(
    f: Callable[[Params, Tensor], Tensor],
    theta: Params,
    world: World,
    x: Tensor,
    spread: float,
    dims: int,
    start: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Trajectories, as constants: states (N, H, S), actions (N, H, `dims`), rewards (N, H)."""
    expect(made(world), "world(state, action, hidden), a function", world)
    expect(isinstance(x, Tensor) and x.ndim == 3, "x (N, H, dims + hidden), one tensor", x)
    theta = {k: v.detach() for k, v in theta.items()}
    state = start(x[:, 0, dims:]) if start else x.new_zeros(len(x), dims)
    seen = list[tuple[Tensor, Tensor, Tensor]]()
    for step in x.unbind(1):
        action = f(theta, state) + spread * step[:, :dims]
        after, reward = world(state, action, step[:, dims:])
        seen.append((state, action, reward))
        state = after
    states, actions, rewards = (torch.stack(part, 1) for part in zip(*seen, strict=True))
    return states, actions, rewards


class Constant(nn.Module):
    """A policy with one parameter, the mean of every action, whatever the state: (N, S) -> (N, 1), in float64."""

    def __init__(self, mean: float):
        super().__init__()
        expect(math.isfinite(mean), "a finite mean", mean)
        self.mean = nn.Parameter(torch.tensor([mean], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean.expand(len(x), 1)


# Surrogates ------------------------------------------------------------------------------------


def box(v: Tensor) -> Tensor:
    """□(v) = exp(v − stop(v)): one, and its derivative is □ v′. {cite}`foerster2018dice`"""
    return (v - v.detach()).exp()


def reinforce(log_p: Tensor, rewards: Tensor) -> Tensor:
    """The usual surrogate, r_h + (log π_h − stop(log π_h)) (G_h − b_h): its first derivative is right, its second is not.

    G_h = Σ_{j≥h} r_j, b_h of `baseline`. Differentiated twice it keeps the trajectories where they are, though they move
    with the policy: E Σ_h ∇²log π_h (G_h − b_h) is not ∇²J. {cite}`williams1992simple`
    """
    return rewards + (log_p - log_p.detach()) * (to_go(rewards) - baseline(rewards))


def low_variance(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Low variance curvature, r_h + (□(log π_h) − 1)(G_h − b_h): second derivatives with ∇log π_h ∇log π_hᵀ.

    Products of the scores of two different steps are left out, which costs a bias and saves noise. With one step it is
    `dice`. {cite}`rothfuss2019promp`
    """
    return rewards + (box(log_p) - 1) * (to_go(rewards) - baseline(rewards))


def dice(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Numbers equal to the rewards (N, H), whose derivatives of any order estimate those of the expected rewards (DiCE).

    c_h = □(Σ_{j≤h} log π_j) r_h + (1 − □(log π_h)) b_h. The baseline b_h is the mean reward-to-go of the *other*
    trajectories: it depends on no action that it is multiplied with. {cite}`foerster2018dice`
    """
    return box(log_p.cumsum(1)) * rewards + (1 - box(log_p)) * baseline(rewards)


def to_go(rewards: Tensor) -> Tensor:
    """G_h = Σ_{j≥h} r_j, the reward still to come: (N, H)."""
    return rewards.flip(1).cumsum(1).flip(1)


def baseline(rewards: Tensor) -> Tensor:
    """b_nh: the mean of G_h over the trajectories other than n; 0 where there is no other."""
    g = to_go(rewards)
    return (g.sum(0) - g) / max(len(rewards) - 1, 1)


def log_normal(a: Tensor, mean: Tensor, spread: float) -> Tensor:
    """log N(a; mean, spread² I), summed over the last axis. Raises ValueError if `spread` ≤ 0."""
    if not 0 < spread < math.inf:
        raise ValueError(f"expected a spread > 0, finite, got {spread}")
    z = (a - mean) / spread
    return -0.5 * (z**2).sum(-1) - a.shape[-1] * math.log(spread * math.sqrt(2 * math.pi))


def cost(rewards: Tensor, y: Tensor) -> Tensor:
    """Minus the mean return, −(1/N) Σ_n Σ_h y_nh r_nh: the loss for `bilevel`."""
    return -mean_return(rewards, y)


def mean_return(rewards: Tensor, y: Tensor) -> Tensor:
    """(1/N) Σ_n Σ_h y_nh r_nh: the metric for `evaluate`."""
    return (rewards * y).sum(1).mean()
