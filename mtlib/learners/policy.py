"""Learners whose loss is a return: what a policy's actions earn in a world that has no derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Params, apply, expect, parameters
from mtlib.learners.gradient import at_least_zero, check_steps, descending, made, moving

World = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`world(state, action, hidden)` -> (next state, reward (N,)); it is never differentiated."""


def policy_gradient(
    net: nn.Module, world: World, spread: float, lr: float, steps: int, dims: int = 2
) -> Learner:
    """MAML where the loss is a return: steps of policy gradient on trajectories of the support set.

    θ ← θ + α ∇R̂(θ), `steps` times from θ = φ, R̂ the mean return of `surrogate`'s rewards; each step acts anew. The
    policy is N(f_θ(s), `spread`² I); states and actions have `dims` numbers, a trajectory starts at s = 0. x: (N, H,
    `dims` + hidden) holds, for H steps of N trajectories, the standard-normal draws of the action and what the world
    hides; y: (N, H) how much each reward counts (1, or a discount). `predict` gives the rewards (N, H). With `steps` = 0
    `bilevel` trains one policy for all tasks. Raises ValueError if `spread` ≤ 0 or `lr` < 0.
    {cite}`finn2017maml,foerster2018dice`
    """
    at_least_zero(lr=lr)
    check_steps(dims, "dims", 1)
    if not 0 < spread < math.inf:
        raise ValueError(f"expected a policy with a spread > 0, finite, got {spread}")
    f = apply(net)

    def predict(theta: Params, x: Tensor) -> Tensor:
        states, actions, rewards = act(f, theta, world, x, spread, dims)
        means = f(theta, states.flatten(0, 1)).view_as(actions)
        return surrogate(log_normal(actions, means, spread), rewards)

    def value(phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        return lambda theta: cost(predict({**phi, **theta}, support.x), support.y)

    adapt = descending(moving(net), value, lambda phi: lr, steps)
    rises = adapt._replace(descent=None)  # each step acts anew: its cost is a sample, and may rise
    return Learner(lambda: parameters(net), rises, predict, net=net)


def act(
    f: Callable[[Params, Tensor], Tensor],
    theta: Params,
    world: World,
    x: Tensor,
    spread: float,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Trajectories, as constants: states (N, H, `dims`), actions (N, H, `dims`), rewards (N, H)."""
    expect(made(world), "world(state, action, hidden), a function", world)
    expect(isinstance(x, Tensor) and x.ndim == 3, "x (N, H, dims + hidden), one tensor", x)
    theta = {k: v.detach() for k, v in theta.items()}
    state, rows = x.new_zeros(len(x), dims), list[tuple[Tensor, Tensor, Tensor]]()
    for step in x.unbind(1):
        action = f(theta, state) + spread * step[:, :dims]
        after, reward = world(state, action, step[:, dims:])
        rows.append((state, action, reward))
        state = after
    states, actions, rewards = (torch.stack(row, 1) for row in zip(*rows, strict=True))
    return states, actions, rewards


def surrogate(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Numbers equal to the rewards (N, H), whose derivatives of any order estimate those of the expected rewards (DiCE).

    c_h = □(Σ_{j≤h} log π_j) r_h + (1 − □(log π_h)) b_h,  □(l) = exp(l − stop(l)) = 1. The baseline b_h is the mean
    reward-to-go of the *other* trajectories: it depends on no action that it is multiplied with.
    {cite}`foerster2018dice`
    """

    def box(v: Tensor) -> Tensor:
        return (v - v.detach()).exp()

    return box(log_p.cumsum(1)) * rewards + (1 - box(log_p)) * baseline(rewards)


def baseline(rewards: Tensor) -> Tensor:
    """b_nh: the mean of Σ_{j≥h} r_j over the trajectories other than n; 0 where there is no other."""
    to_go = rewards.flip(1).cumsum(1).flip(1)
    return (to_go.sum(0) - to_go) / max(len(rewards) - 1, 1)


def log_normal(a: Tensor, mean: Tensor, spread: float) -> Tensor:
    """log N(a; mean, spread² I), summed over the last axis. Raises ValueError if `spread` ≤ 0."""
    if not 0 < spread < math.inf:
        raise ValueError(f"expected a spread > 0, finite, got {spread}")
    z = (a - mean) / spread
    return -0.5 * (z**2).sum(-1) - a.shape[-1] * math.log(spread * math.sqrt(2 * math.pi))


def cost(rewards: Tensor, y: Tensor) -> Tensor:
    """Minus the mean return, −(1/N) Σ_n Σ_h y_nh r_nh: the loss for `bilevel`."""
    return -(rewards * y).sum(1).mean()
