"""Point navigation, as in the MAML paper {cite}`finn2017maml`: walk to a goal that only the rewards reveal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Episode, Stream
from mtlib.tasks import check_seed, positive

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
