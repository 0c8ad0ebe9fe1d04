"""Penalties of `joint` that pull the features of several domains together: distances, spectra, confident predictions.

Those with a critic are in `mtlib.transfer.critics`. AdaBN needs no penalty: `mtlib.norm.calibrate` on the target.
Each raises ValueError if its strength λ is negative.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mtlib.core import Params
from mtlib.joint import Penalty
from mtlib.learners.finetune import spectral_sum
from mtlib.learners.gradient import at_least_zero
from mtlib.learners.metric import squared_distances
from mtlib.run.devices import double
from mtlib.tasks import above_zero, positive

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of Gaussian kernels, times the mean squared distance


def coral(strength: float = 1.0) -> Penalty:
    """Deep CORAL: λ · ‖C_s − C_t‖²_F / (4D²), C the covariance of a domain's features (B, D).

    With more than two domains, the mean over their pairs. `recoloured` needs no training. {cite}`sun2016coral`
    """
    at_least_zero(strength=strength)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _pairs(z, "CORAL")
        c = [covariance(zt) for zt in z]
        gaps = torch.stack([((a - b) ** 2).sum() for a, b in combinations(c, 2)])
        return strength * gaps.mean() / (4 * z.shape[-1] ** 2)

    return penalty


def recoloured(z: Tensor, like: Tensor, strength: float = 1.0) -> Tensor:
    """CORAL in closed form: features z (N, D) with the covariance of another domain's, `like` (M, D).

    z (C + λI)^(−1/2) (C_like + λI)^(1/2), each C a covariance, λ = `strength` > 0; 1 in the paper. It is the linear map of z
    that brings the two, with λI added, to agree; the larger λ, the less it does. Means are mapped along: take each domain's own
    off before. Computed in float64. Raises ValueError for features of different widths. {cite}`sun2016return`
    """
    above_zero(strength=strength)
    z, like, kind, place = double(z), double(like), z.dtype, z.device
    if z.shape[-1:] != like.shape[-1:]:
        raise ValueError(f"expected as many columns twice, got {z.shape} and {like.shape}")

    def power(features: Tensor, p: float) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance(features))
        found: Tensor = (vectors * (values.clamp_min(0) + strength) ** p) @ vectors.mT
        return found

    return (z @ power(z, -0.5) @ power(like, 0.5)).to(place, kind)


def covariance(z: Tensor) -> Tensor:
    """(B, D) -> the unbiased covariance (D, D)."""
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"expected features (B, D) of B ≥ 2 rows, got {tuple(z.shape)}")
    centred = z - z.mean(0)
    return centred.mT @ centred / (len(z) - 1)


def mcc(strength: float = 1.0, temperature: float = 2.5) -> Penalty:
    """Minimum class confusion, on the last domain's logits: λ · (Σ_jk C_jk − Σ_j C_jj) / W. {cite}`jin2020mcc`

    P = softmax(logits / τ) (B, W); an item has the weight w = B (1 + e^−H(P)) / Σ(1 + e^−H(P)), H its entropy;
    C = Pᵀ diag(w) P, each row divided by its sum: how often the model itself expects class j to be taken for k.
    """
    at_least_zero(strength=strength)
    above_zero(temperature=temperature)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several_classes(logits, "mcc")
        p = torch.softmax(logits[-1] / temperature, -1)  # (B, W)
        certain = 1 + torch.exp(torch.special.entr(p).sum(-1).neg().detach())
        w = len(p) * certain / certain.sum()
        c = p.mT @ (w[:, None] * p)  # (W, W)
        rows = c.sum(-1, keepdim=True)  # 0 for a class that is never predicted: it confuses nothing
        c = c / torch.where(rows > 0, rows, 1.0)
        return strength * (c.sum() - c.trace()) / len(c)

    return penalty


def mmd(strength: float = 1.0, widths: tuple[float, ...] = WIDTHS) -> Penalty:
    """Maximum mean discrepancy, unbiased: λ · Σ_k [ E k(s, s') + E k(t, t') − 2 E k(s, t) ]. {cite}`gretton2012kernel,long2015dan`

    Gaussian kernels k(a, b) = exp(−‖a − b‖² / (c m)), m the mean squared distance of the two domains' features (a
    constant to the gradient), c in `widths`. With more than two domains, the mean over their pairs.
    """
    at_least_zero(strength=strength)
    _widths(widths)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _pairs(z, "MMD")
        gaps = [discrepancy(kernel(torch.cat(pair), widths)) for pair in combinations(z, 2)]
        return strength * torch.stack(gaps).mean()

    return penalty


def jan(
    strength: float = 1.0, widths: tuple[float, ...] = WIDTHS, bandwidth: float = 0.92
) -> Penalty:
    """Joint adaptation: MMD of features and predictions together, with the kernel k(z, z') · exp(−‖p − p'‖² / (2σ²)).

    p = softmax(logits), k that of `mmd`, σ = `bandwidth`: predictions lie on one scale whatever the network, so theirs is
    fixed. Two domains may agree in features and in predictions, and still pair them differently.
    {cite}`long2017jan,jiang2020tllib`
    """
    at_least_zero(strength=strength)
    above_zero(bandwidth=bandwidth)
    _widths(widths)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _pairs(z, "JAN")
        p = torch.softmax(logits, -1)
        gaps = [
            discrepancy(
                kernel(torch.cat(features), widths) * _gaussian(torch.cat(answers), bandwidth)
            )
            for features, answers in zip(combinations(z, 2), combinations(p, 2), strict=True)
        ]
        return strength * torch.stack(gaps).mean()

    return penalty


def kernel(both: Tensor, widths: tuple[float, ...] = WIDTHS) -> Tensor:
    """Σ_c exp(−‖a − b‖² / (c m)) over all pairs of rows (2B, D) -> (2B, 2B); m is a constant to the gradient."""
    n, both = len(both), both.to(torch.promote_types(both.dtype, torch.float32))
    if both.ndim != 2 or n < 2:
        raise ValueError(f"expected at least two rows (2B, D), got {tuple(both.shape)}")
    _widths(widths)
    squared = squared_distances(both, both)
    mean = squared.detach().sum() / (n * (n - 1))
    number = torch.finfo(both.dtype)
    mean = mean.clamp(min=number.tiny / number.eps)  # if all rows are equal; 1/(c m) is finite
    return torch.stack([torch.exp(-squared / (c * mean)) for c in widths]).sum(0)


def _gaussian(rows: Tensor, bandwidth: float) -> Tensor:
    """exp(−‖a − b‖² / (2σ²)) over all pairs of rows (2B, D) -> (2B, 2B)."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.exp(-squared_distances(rows, rows) / (2 * bandwidth**2))


def discrepancy(k: Tensor) -> Tensor:
    """Unbiased MMD² from the kernel of two samples of B rows each: (2B, 2B) -> scalar, which may be below 0.

    Σ_{i≠j} [k(s_i, s_j) + k(t_i, t_j)] / (B(B − 1)) − 2 Σ_ij k(s_i, t_j) / B²
    """
    b = len(k) // 2
    if k.shape != (2 * b, 2 * b) or b < 2:
        raise ValueError(
            f"expected the kernel of two samples of B ≥ 2 rows each, (2B, 2B), got {tuple(k.shape)}"
        )
    off = ~torch.eye(b, dtype=torch.bool, device=k.device)
    return k[:b, :b][off].mean() + k[b:, b:][off].mean() - 2 * k[:b, b:].mean()


def entropy(strength: float = 1.0) -> Penalty:
    """Entropy minimisation, on the last domain's logits: λ · (1/B) Σ_i H(p_i), p = softmax(logits).

    Predicting one class for every item is a minimum, too: with poor features, training may end there.
    """
    at_least_zero(strength=strength)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several_classes(logits, "entropy")
        log_p = torch.log_softmax(
            logits[-1], -1
        )  # −p log p has an infinite slope at p = 0, this has none
        h = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
        return strength * h.mean()

    return penalty


def information(strength: float = 1.0) -> Penalty:
    """Information maximisation, on the last domain's logits: λ · ( mean H(p_i) − H(mean p_i) ), p = softmax(logits).

    −λ times `mtlib.transfer.selection.information`: each answer sure, all together varied; between −λ log W and 0. With
    the head frozen, and no source data, it is SHOT's objective without its pseudo-labels:
    `fit(joint(net, loss, (0,), [information()]), phi, images, steps, moves=("body.",))`. {cite}`liang2020shot`
    """
    at_least_zero(strength=strength)
    sure = entropy()

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several_classes(logits, "information")
        varied = torch.special.entr(torch.softmax(logits[-1], -1).mean(0)).sum()
        value: Tensor = strength * (sure(theta, z, logits) - varied)
        return value

    return penalty


def afn(strength: float = 0.05, step: float = 1.0) -> Penalty:
    """Adaptive feature norm, stepwise: λ E ( ‖z‖ − (‖z‖₀ + Δ) )², ‖z‖₀ the current norm, a constant; Δ = `step`.

    Its value is always λΔ², and its gradient in z is −2λΔ z/‖z‖ (a mean over items): only the product λΔ matters. The
    features of both domains grow together: small ones carry little, and the target's are small. {cite}`xu2019afn`
    """
    at_least_zero(strength=strength, step=step)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        norm = z.norm(dim=-1)
        growth: Tensor = (norm - (norm.detach() + step)) ** 2
        return strength * growth.mean()

    return penalty


def bsp(strength: float = 1e-4, largest: int = 1) -> Penalty:
    """Batch spectral penalisation: λ Σ_t Σ_{i ≤ k} σ_i², the k = `largest` singular values of each domain's z (B, D).

    What transfers best lies in the largest directions, what tells classes apart in the others. Goes with `dann` and
    `cdan`. Raises ValueError unless 1 ≤ k ≤ min(B, D). {cite}`chen2019bsp`
    """
    at_least_zero(strength=strength)
    positive(largest=largest)
    return lambda theta, z, logits: strength * spectral_sum(z, largest, largest=True).sum()


def _pairs(z: Tensor, who: str) -> None:
    if z.ndim != 3 or len(z) < 2 or z.shape[1] < 2:
        raise ValueError(
            f"{who} expects features (T, B, D) of T ≥ 2 domains and B ≥ 2 items, got {tuple(z.shape)}"
        )


def _widths(widths: tuple[float, ...]) -> None:
    if not isinstance(widths, tuple | list) or not widths:
        raise ValueError(
            f"expected at least one width of a kernel, widths=(1.0, ...), got {widths!r}"
        )
    for c in widths:
        above_zero(width=c)


def _several_classes(logits: Tensor, who: str) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(
            f"{who} expects at least two classes, got {logits.shape[-1]} output: its softmax is always 1"
        )
