"""Penalties of `joint` that draw the features of several domains together."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from mtlib.core import Params, apply, below, parameters
from mtlib.joint import Penalty

CRITIC = "critic."  # where `dann` looks for its critic's parameters among θ's


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


def mcc(strength: float = 1.0, temperature: float = 2.5) -> Penalty:
    """Minimum class confusion, on the last domain's logits: λ · (Σ_jk C_jk − Σ_j C_jj) / W. {cite}`jin2020mcc`

    P = softmax(logits / τ) (B, W); an item counts by w = B (1 + e^−H(P)) / Σ(1 + e^−H(P)), H its entropy;
    C = Pᵀ diag(w) P, each row divided by its sum: how often class j is taken for k, as far as the model knows.
    """

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        p = torch.softmax(logits[-1] / temperature, -1)  # (B, W)
        certain = 1 + torch.exp(torch.special.entr(p).sum(-1).neg().detach())
        w = len(p) * certain / certain.sum()
        c = p.mT @ (w[:, None] * p)  # (W, W)
        c = c / c.sum(-1, keepdim=True)
        return strength * (c.sum() - c.trace()) / len(c)

    return penalty


def mmd(strength: float = 1.0, widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> Penalty:
    """Maximum mean discrepancy, unbiased: λ · Σ_k [ E k(s, s') + E k(t, t') − 2 E k(s, t) ]. {cite}`gretton2012kernel,long2015dan`

    Gaussian kernels k(a, b) = exp(−‖a − b‖² / (c m)), m the mean squared distance of the two domains' features (a
    constant to the gradient), c in `widths`. With more than two domains, the mean over their pairs.
    """

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        if z.ndim != 3 or len(z) < 2 or z.shape[1] < 2:
            raise ValueError(
                f"MMD expects features (T, B, D) of T ≥ 2 domains and B ≥ 2 items, got {tuple(z.shape)}"
            )
        gaps = torch.stack([_mmd(a, b, widths) for a, b in combinations(z, 2)])
        return strength * gaps.mean()

    return penalty


def _mmd(s: Tensor, t: Tensor, widths: tuple[float, ...]) -> Tensor:
    b = len(s)
    both = torch.cat([s, t])
    squared = ((both[:, None] - both[None]) ** 2).sum(-1)  # (2B, 2B)
    mean = squared.detach().sum() / (2 * b * (2 * b - 1))
    k = torch.stack([torch.exp(-squared / (c * mean)) for c in widths]).sum(0)
    off = ~torch.eye(b, dtype=torch.bool, device=s.device)
    return k[:b, :b][off].mean() + k[b:, b:][off].mean() - 2 * k[:b, b:].mean()


def entropy(strength: float = 1.0) -> Penalty:
    """Entropy minimisation, on the last domain's logits: λ · (1/B) Σ_i H(p_i), p = softmax(logits).

    One class for every item is a minimum, too: where features are poor, training may end there.
    """

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        p = torch.softmax(logits[-1], -1)
        return strength * torch.special.entr(p).sum(-1).mean()

    return penalty


def dann(critic: nn.Module, strength: float = 1.0) -> Penalty:
    """Domain-adversarial training: −(1/T) Σ_t E log q_t(R(z_t)), q = softmax(critic(·)) over the T domains.

    R is the identity whose derivative is −λ: the critic, (B, D) -> (B, T), descends on telling the domains apart while the
    body ascends on it. θ must hold the critic's parameters: start training at `{**phi, **adversary(critic)}`.
    {cite}`ganin2016dann`, without its schedule of λ.
    """
    f = apply(critic)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        reversed_z = (1 + strength) * z.detach() - strength * z
        own = below(CRITIC, theta)
        said = torch.stack([f(own, zt) for zt in reversed_z])  # (T, B, T)
        if said.shape[-1] != len(z):
            raise ValueError(
                f"expected a critic with one output for each of {len(z)} domains, got {said.shape[-1]}"
            )
        return -torch.log_softmax(said, -1).mean(1).diagonal().mean()

    return penalty


def adversary(critic: nn.Module) -> Params:
    """The critic's parameters as `dann` looks for them, under `critic.`."""
    return {f"{CRITIC}{k}": v for k, v in parameters(critic).items()}
