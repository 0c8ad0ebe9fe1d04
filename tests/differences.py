"""Finite differences of an objective, for tests of its gradient."""

from __future__ import annotations

import torch


def directional(objective, phi, data, seed=0, eps=1e-5):
    """Central difference of the objective along a random unit direction, and that direction."""
    g = torch.Generator().manual_seed(seed)
    d = {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in phi.items()}
    norm = sum((v**2).sum() for v in d.values()).sqrt()
    d = {k: v / norm for k, v in d.items()}
    up = objective({k: phi[k] + eps * d[k] for k in phi}, data)
    down = objective({k: phi[k] - eps * d[k] for k in phi}, data)
    return float((up - down) / (2 * eps)), d
