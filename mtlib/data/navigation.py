"""Point navigation, as in the MAML paper {cite}`finn2017maml`: walk to a goal that only the rewards reveal."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Episode, Stream, expect
from mtlib.tasks import above_zero, check_seed, positive

STEP = 0.2  # the longest step along each axis


def navigation(trajectories: int = 20, horizon: int = 10, tasks: int = 20, seed: int = 0) -> Stream:
    """Tasks are goals g ~ U(−1, 1)²; an episode contains the noise of its actions, so the stream is pure.

    `stream(step)` -> Episode; support and query have x (T, N, H, 4): two standard-normal draws for the action
    and the goal, in each of H steps of N trajectories; y (T, N, H): ones, how much each reward counts.
    """
    positive(trajectories=trajectories, horizon=horizon, tasks=tasks)
    check_seed(seed)

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        shape = (2, tasks, trajectories, horizon)
        goals = np.broadcast_to(rng.uniform(-1, 1, (tasks, 1, 1, 2)), (*shape, 2))
        x = torch.from_numpy(np.concatenate([rng.normal(size=(*shape, 2)), goals], -1)).float()
        return Episode(*(Batch(half, torch.ones(shape[1:])) for half in x))

    return stream


def walk(position: Tensor, action: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(next position, reward): a step of at most 0.2 along each axis, rewarded with −‖position − goal‖²."""
    position = position + action.clamp(-STEP, STEP)
    return position, -((position - goal) ** 2).sum(-1)


def told(state: Tensor, action: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """`walk` for a policy that sees the goal: its state is (position, goal), (N, 4). It starts at `beside(goal)`."""
    position, reward = walk(state[:, :2], action, goal)
    return torch.cat([position, goal], 1), reward


def beside(goal: Tensor) -> Tensor:
    """The first state of `told`: the centre, and the goal (N, 2) beside it."""
    return torch.cat([torch.zeros_like(goal), goal], 1)


def best_return(goals: Tensor, horizon: int = 10, spread: float = 0.1) -> Tensor:
    """The highest expected return of a policy N(m(s), `spread`² I) that knows the goal: goals (..., 2) -> (...).

    By dynamic programming, on each axis alone, as reward and clip are sums over axes. With u the distance from the goal,
    V_0 = 0 and V_{k+1}(u) = max_m E[−v² + V_k(v)], v = u + clip(m + `spread` ε, −0.2, 0.2); the return is V_H of both axes.
    The grid is 0.005 wide, and V linear in between: off by less than 1e-3. Goals lie in [−1, 1]².
    """
    expect(
        isinstance(goals, Tensor) and goals.shape[-1:] == (2,), "goals (..., 2), a tensor", goals
    )
    expect(bool((goals.abs() <= 1).all()), "goals in [−1, 1]²", goals)
    positive(horizon=horizon)
    above_zero(spread=spread)
    width, reach = 0.005, round(STEP / 0.005)
    steps = width * torch.arange(-reach, reach + 1, dtype=torch.float64)
    means = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None] * (STEP + 6 * spread)
    z = (means - steps) / spread
    density = (-0.5 * z**2).exp() / math.sqrt(2 * math.pi)
    above = spread * (z * torch.special.ndtr(z) + density)  # E (m + spread ε − step)₊
    above = above - above[:, -1:]  # the same after the clip
    weights = torch.zeros_like(above)  # of each step, linear in between
    weights[:, 1:-1] = above[:, :-2] - 2 * above[:, 1:-1] + above[:, 2:]
    weights[:, -1] = above[:, -2]
    weights[:, 1:] /= width
    weights[:, 0] = 1 - weights.sum(1)
    far = round(1 / width) + reach * horizon
    u = width * torch.arange(-far, far + 1, dtype=torch.float64)
    value = torch.zeros_like(u)
    for _ in range(horizon):
        after = (value - u**2).unfold(0, 2 * reach + 1, 1)
        best = (after @ weights.mT).amax(1)
        value, u = best, u[reach:-reach]
    at = (goals.double() + 1) / width
    left = at.floor().long().clamp(0, len(value) - 2)
    share = at - left
    return ((1 - share) * value[left] + share * value[left + 1]).sum(-1)


# Two steps on a line: a world in which expectations are known -------------------------------------


def line(position: Tensor, action: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(next position, reward): a step on a line, rewarded with −½(position − goal)²; all (N, 1)."""
    position = position + action
    return position, -0.5 * ((position - goal) ** 2).sum(-1)


def line_return(mean: Tensor, goal: float, spread: float, horizon: int = 2) -> Tensor:
    """The expected return on the `line` where every action is N(μ, σ²): J(μ) = −½ Σ_{h ≤ H} ((hμ − g)² + hσ²)."""
    positive(horizon=horizon)
    above_zero(spread=spread)
    h = torch.arange(1, horizon + 1, dtype=mean.dtype)
    return -0.5 * ((mean * h - goal) ** 2 + h * spread**2).sum()


def line_walks(draws: Tensor, goal: float) -> Episode:
    """Episodes of walks on the `line` from the draws of their actions, (T, N, H); support and query are the same."""
    expect(isinstance(draws, Tensor) and draws.ndim == 3, "draws (T, N, H), a tensor", draws)
    half = Batch(torch.stack([draws, torch.full_like(draws, goal)], -1), torch.ones_like(draws))
    return Episode(half, half)


def every_draw(walks: int, horizon: int = 2, points: int = 5) -> tuple[Tensor, Tensor]:
    """Draws of all actions, (`points`^(N H), N, H), and their weights, by the rule of Gauss and Hermite.

    Weighted sums are expectations over normal draws, exactly, of what is a polynomial in each draw of a degree up to
    2 `points` − 1.
    """
    positive(walks=walks, horizon=horizon, points=points)
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(points))
    axes = walks * horizon
    grid = torch.cartesian_prod(*[z] * axes).view(-1, walks, horizon)
    weights = torch.cartesian_prod(*[w / w.sum()] * axes).view(len(grid), -1).prod(-1)
    return grid, weights
