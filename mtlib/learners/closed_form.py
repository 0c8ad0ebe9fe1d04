"""Learners whose inner problem has a closed solution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Params, apply, features, parameters, require


def ridge(net: nn.Module, strength: float = 1.0) -> Learner:
    """Ridge regression of the targets on the features, drawn towards φ's own head.

    V = argmin ‖Z V − Y‖² + λ ‖V − V_φ‖², Z = [z(φ, x), 1] (N, D+1), V = [Wᵀ; b] (D+1, W): in closed form
    V = V_φ + Zᵀ (Z Zᵀ + λI)⁻¹ (Y − Z V_φ). λ = exp(φ["ridge.log_strength"]) is learned along with the body and
    the head; it starts at `strength`. With V_φ = 0 it is R2-D2's solver. {cite}`bertinetto2019meta`
    Raises ValueError where `strength` ≤ 0, or the head is not one linear layer.
    """
    if strength <= 0:
        raise ValueError(f"expected strength > 0, got {strength}")
    names = ("head.weight", "head.bias", "ridge.log_strength")
    z, f = features(net), apply(net)
    if not isinstance(net.head, nn.Linear) or net.head.bias is None:
        raise ValueError(
            f"expected a head of one linear layer with a bias, got {type(net.head).__name__}"
        )

    def init() -> Params:
        phi = parameters(net)
        return {**phi, names[2]: phi[names[0]].new_tensor(strength).log()}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, names)
        zs = z(phi, support.x)
        zs = torch.cat([zs, torch.ones_like(zs[:, :1])], 1)  # (N, D+1)
        prior = torch.cat([phi["head.weight"], phi["head.bias"][:, None]], 1).mT  # (D+1, W)
        v = prior + ridge_solution(zs, support.y - zs @ prior, phi[names[2]].exp())
        return {**phi, "head.weight": v[:-1].mT, "head.bias": v[-1]}

    return Learner(init, adapt, f)


def ridge_solution(z: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """argmin_V ‖Z V − Y‖² + λ‖V‖²: (N, D), (N, W) -> (D, W), by the smaller of the two systems."""
    n, d = z.shape
    if n <= d:
        return z.mT @ torch.linalg.solve(z @ z.mT + strength * torch.eye(n).to(z), y)
    return torch.linalg.solve(z.mT @ z + strength * torch.eye(d).to(z), z.mT @ y)
