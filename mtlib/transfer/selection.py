"""Criteria that use no target labels, for choosing methods, strengths and when to stop training.

n items · C classes · D features. Everything is computed in float64. Each docstring says which direction is better.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtlib.run.devices import double
from mtlib.tasks import check_tensor, positive
from mtlib.transfer.transferability import rows


def entropy(logits: Tensor) -> float:
    """(1/n) Σ_i H(p_i), p = softmax(logits), in nats: lower is more confident. {cite}`morerio2018minimal`

    logits: (n, C) on the target's items. Predicting one class for everything also reaches its minimum, 0. Raises
    ValueError for another shape, numbers that are not finite, or rows that are probabilities.
    """
    p = torch.softmax(check_logits(logits), 1)
    return float(torch.special.entr(p).sum(1).mean())


def information(logits: Tensor) -> float:
    """H(mean p) − mean H(p), p = softmax(logits): mutual information of prediction and item, higher is better.

    logits: (n, C). Between 0 and log C, in nats: high if each prediction is confident and all together are varied. It
    assumes that the classes are about equally frequent in the target. {cite}`bridle1991unsupervised`
    """
    p = torch.softmax(check_logits(logits), 1)
    of_mean = torch.special.entr(p.mean(0)).sum()
    return float(of_mean - torch.special.entr(p).sum(1).mean())


def temperature(logits: Tensor, y: Tensor) -> float:
    """T > 0 that minimises the cross-entropy of logits / T: how many times too sure they are. {cite}`guo2017calibration`

    logits: (n, C) on held-out items with labels, y: (n,) class numbers. The other criteria here measure how sure a model is,
    so that one whose logits are doubled scores higher and is no better; dividing by T first takes that away:
    `information(target_logits / temperature(source_logits, source_y))`. At T, Σ_i Σ_c p_ic z_ic = Σ_i z_i,y_i: the mean
    logit that the model expects is the one it gets. Raises ValueError where no T does, as all answers are right or logits
    do not follow the labels at all.
    """
    z = check_logits(logits)
    check_tensor(y, "y")
    if z.shape[1] < 2:
        raise ValueError(f"expected logits of at least two classes, got {tuple(z.shape)}")
    if y.shape != z.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"expected a class number for each of {len(z)} items, got y {tuple(y.shape)} of {y.dtype}"
        )
    from scipy.optimize import brentq

    y = y.long().to(z.device)
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < z.shape[1]):
        raise ValueError(
            f"expected class numbers from 0 to {z.shape[1] - 1}, got {int(y.min())} to {int(y.max())}"
        )
    own = z.gather(1, y[:, None]).mean()

    def slope(log_scale: float) -> float:
        scale = math.exp(log_scale)  # 1/T; the cross-entropy is convex in it
        return float((torch.softmax(scale * z, 1) * z).sum(1).mean() - own)

    low, high = -10.0, 10.0
    if not slope(low) < 0 < slope(high):
        raise ValueError(
            "expected held-out items of which some are wrong and most follow their labels: no temperature from e⁻¹⁰ to e¹⁰ is "
            "best. Give more items, or other ones than those trained on."
        )
    return math.exp(-brentq(slope, low, high, xtol=1e-10))


def class_shares(logits: Tensor, before: Tensor | None = None, steps: int = 100) -> Tensor:
    """Shares of the classes among unlabelled items (C,), from a classifier's logits (n, C), by EM.

    π ← mean_i q_i, q_ic ∝ π_c p_ic / `before`_c, p = softmax(logits), from π = `before`, the shares where the classifier was
    trained, equal ones unless given. `logits + (π / before).log()` are the corrected logits. It assumes calibrated
    probabilities, and that nothing but the shares has changed: what else moves the answers is taken for a change of shares.
    Computed in float64. Raises ValueError for another shape, rows that are probabilities, or shares that do not sum to 1.
    {cite}`saerens2002adjusting`
    """
    positive(steps=steps)
    p = torch.softmax(check_logits(logits), 1)
    first = torch.full_like(p[0], 1 / p.shape[1]) if before is None else double(before).to(p)
    if first.shape != p[0].shape or bool((first <= 0).any()) or abs(float(first.sum()) - 1) > 1e-6:
        raise ValueError(f"expected {p.shape[1]} shares above 0 that sum to 1, got {before}")
    shares = first
    for _ in range(steps):
        q = shares / first * p
        shares = (q / q.sum(1, keepdim=True)).mean(0)
    return shares


def snd(x: Tensor, temperature: float = 0.05) -> float:
    """Soft neighbourhood density: −(1/n) Σ_i Σ_{j≠i} P_ij log P_ij, higher is denser. {cite}`saito2021snd`

    P_ij ∝ exp(⟨x_i, x_j⟩ / τ) over j ≠ i, rows of x: (n, D) at length one; the paper takes the softmax outputs as
    x. Between 0 and log(n − 1): items with many near neighbours score high, and all items at one point score
    highest.
    """
    x = rows(x, "x")
    if len(x) < 2 or not temperature > 0:
        raise ValueError(
            f"expected n ≥ 2 rows and a temperature > 0, got {len(x)} and {temperature}"
        )
    x = torch.nn.functional.normalize(x, dim=1)
    alike = (x @ x.mT / temperature).fill_diagonal_(-torch.inf)
    return float(torch.special.entr(torch.softmax(alike, 1)).sum(1).mean())


def density_ratio(source: Tensor, target: Tensor, at: Tensor) -> Tensor:
    """w(f) = p_T(f) / p_S(f) at the rows of `at`, from a classifier that tells the domains apart. {cite}`you2019dev`

    w = (n_S / n_T) · q(target | f) / q(source | f), q a logistic regression on standardised features. source: (n_S,
    D), target: (n_T, D), at: (n, D) -> (n,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    source, target, at = rows(source, "source"), rows(target, "target"), rows(at, "at")
    if not source.shape[1] == target.shape[1] == at.shape[1]:
        shapes = [tuple(d.shape) for d in (source, target, at)]
        raise ValueError(f"expected features of the same width, got {shapes}")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    domain = np.repeat([0, 1], [len(source), len(target)])
    model.fit(torch.cat([source, target]).cpu().numpy(), domain)
    odds = np.exp(np.clip(model.decision_function(at.cpu().numpy()), -50, 50))
    return torch.from_numpy(odds) * len(source) / len(target)


def dev(losses: Tensor, weights: Tensor) -> float:
    """Deep embedded validation: an estimate of the target's risk, lower is better. {cite}`you2019dev`

    mean(wℓ) + η mean(w) − η, η = −cov(wℓ, w) / var(w). losses: (n,) of held-out source items, with labels; weights:
    (n,) their `density_ratio` on features of the model being judged. The control variate w, whose mean is 1,
    reduces the variance: with the true w the estimate errs by O(1/n) on average. Equal weights give mean(wℓ).
    """
    check_tensor(losses, "losses")
    check_tensor(weights, "weights")
    losses, weights = double(losses.detach()), double(weights.detach())
    weights = weights.to(losses.device)
    if losses.ndim != 1 or losses.shape != weights.shape or len(losses) < 2:
        raise ValueError(
            f"expected a loss and a weight for each of n ≥ 2 items, got {tuple(losses.shape)} and {tuple(weights.shape)}"
        )
    if bool((weights < 0).any()) or not bool(torch.isfinite(torch.stack([losses, weights])).all()):
        raise ValueError("expected finite losses and weights ≥ 0")
    weighted, spread = weights * losses, weights.var()
    if spread == 0:
        return weighted.mean().item()
    cov = ((weighted - weighted.mean()) * (weights - weights.mean())).sum() / (len(losses) - 1)
    eta = -cov / spread
    return (weighted.mean() + eta * weights.mean() - eta).item()


def check_logits(logits: Tensor) -> Tensor:
    """Logits (n, C) in float64. Raises ValueError for rows that are probabilities: softmax would flatten them."""
    found = rows(logits, "logits")
    sure = torch.finfo(logits.dtype).eps if logits.is_floating_point() else 0.0
    sums = (found.sum(1) - 1).abs() <= max(1e-5, 4 * sure)
    if found.shape[1] > 1 and bool((found >= 0).all()) and bool(sums.all()):
        raise ValueError(
            "expected logits, got probabilities: rows ≥ 0 that sum to 1. Give what came before the softmax, or p.log()"
        )
    return found
