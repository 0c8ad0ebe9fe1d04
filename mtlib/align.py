"""Penalties of `joint` that draw the features of several domains together."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mtlib.core import Params
from mtlib.joint import Penalty


def coral(strength: float = 1.0) -> Penalty:
    """Deep CORAL: λ · ‖C_s − C_t‖²_F / (4D²), C the covariance of a domain's features (B, D).

    With more than two domains, the mean over their pairs. {cite}`sun2016coral`
    """

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        if z.ndim != 3 or len(z) < 2 or z.shape[1] < 2:
            raise ValueError(
                f"CORAL expects features (T, B, D) of T ≥ 2 domains and B ≥ 2 items, got {tuple(z.shape)}"
            )
        c = [covariance(zt) for zt in z]
        gaps = torch.stack([((a - b) ** 2).sum() for a, b in combinations(c, 2)])
        return strength * gaps.mean() / (4 * z.shape[-1] ** 2)

    return penalty


def covariance(z: Tensor) -> Tensor:
    """(B, D) -> the unbiased covariance (D, D)."""
    centred = z - z.mean(0)
    return centred.mT @ centred / (len(z) - 1)
