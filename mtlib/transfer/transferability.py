"""How well a source model suits a target task, judged without training on it; and how far two domains lie apart.

n items · D features · C target classes · Z source classes. Everything is computed in float64; higher means better
suited.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mtlib.run.devices import double
from mtlib.tasks import above_zero, check_seed, check_tensor


def h_score(f: Tensor, y: Tensor) -> float:
    """tr(cov(f)⁺ cov(E[f | y])): the part of the features' variance that the class explains. {cite}`bao2019hscore`

    f: (n, D), y: (n,) class numbers. If the covariance is singular its pseudo-inverse is used, so the score is
    between 0 and min(D, C − 1): the sum of squared canonical correlations of features and one-hot labels, the same
    after any invertible affine map of f. Raises ValueError for shapes that do not fit, fewer than two classes,
    or numbers that are not finite.
    """
    f, y = _labelled(f, y)
    g = f - f.mean(0)
    targets = _indicators(y)
    means = targets @ (targets.mT @ g / targets.sum(0)[:, None])  # (n, D), E[f | y] of each item
    inverse = torch.linalg.pinv(g.mT @ g, hermitian=True, rtol=1e-12)
    return float((inverse * (means.mT @ means)).sum())


def nce(z: Tensor, y: Tensor) -> float:
    """Negative conditional entropy −H(Y | Z) = Σ_zy P(z, y) log P(y | z), P the empirical shares. {cite}`tran2019nce`

    z: (n,) source classes of the target's items (labels, or a model's predictions), y: (n,) target classes. At most 0,
    and 0 if z determines y. Raises ValueError for shapes that do not fit or numbers that are not class numbers.
    """
    z, y = _classes(z, "z"), _classes(y, "y").to(z.device)
    if z.shape != y.shape:
        raise ValueError(f"expected as many z as y, got {tuple(z.shape)} and {tuple(y.shape)}")
    joint = _indicators(z).mT @ _indicators(y) / len(y)  # (Z, C)
    given = joint / joint.sum(1, keepdim=True)
    return float(torch.special.xlogy(joint, given).sum())


def leep(p: Tensor, y: Tensor) -> float:
    """Log expected empirical prediction: (1/n) Σ_i log Σ_z P(y_i | z) p_iz. {cite}`nguyen2020leep`

    p: (n, Z) a source model's probabilities on the target's items, rows summing to one; y: (n,) target classes. P(y
    | z) = Σ_{i: y_i = y} p_iz / Σ_i p_iz. For one-hot rows it equals `nce` of the predictions. Rows in half precision
    are brought to the sum one first. Raises ValueError for shapes that do not fit, or rows that are not
    probabilities: numbers ≥ 0 whose sum is 1 up to rounding.
    """
    check_tensor(p, "p")
    rounding = 4 * torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0
    p, y = _labelled(p, y, at_least=1)
    total = p.sum(1, keepdim=True)
    if bool((p < 0).any()) or bool(((total - 1).abs() > max(1e-4, rounding)).any()):
        raise ValueError(
            "expected probabilities: rows ≥ 0 that sum to 1; apply torch.softmax(logits, 1) first"
        )
    p = p / total if rounding > 1e-4 else p  # half precision rounds each row's sum
    targets = _indicators(y)
    joint = targets.mT @ p  # (C, Z)
    given = joint / joint.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return (targets * (p @ given.mT)).sum(1).log().mean().item()


def logme(f: Tensor, y: Tensor) -> float:
    """Log maximum evidence: (1/n) max_{α, β} log p(y | f, α, β), averaged over the columns of y. {cite}`you2021logme`

    f: (n, D); y: (n,) class numbers, made one-hot, or real targets (n,) or (n, K) for regression. The model is y =
    f w + noise, w ~ N(0, α⁻¹ I), noise ~ N(0, β⁻¹ I), without an intercept; α and β are `evidence_maximum`'s. Rotating
    or rescaling f changes nothing. Raises ValueError for shapes that do not fit or numbers that are not finite.
    """
    check_tensor(y, "y")
    if y.is_floating_point():
        f = rows(f)
        targets = _columns(y, len(f)).to(f.device)
    else:
        f, y = _labelled(f, y)
        targets = _indicators(y)
    spectrum = _spectrum(f, targets)
    total = _evidence(spectrum, len(f), *_precisions(spectrum, len(f))).sum()
    return total.item() / targets.shape[1] / len(f)


class Precisions(NamedTuple):
    """α and β of `logme`'s model, each () or (K,): one per column of the targets."""

    alpha: Tensor  # of the prior of w
    beta: Tensor  # of the noise


def evidence_maximum(f: Tensor, t: Tensor, tolerance: float = 1e-9) -> Precisions:
    """α and β where the evidence is largest: α = γ / ‖m‖², β = (n − γ) / ‖f m − t‖², repeated until nothing changes.

    m = (fᵀf + (α/β) I)⁻¹ fᵀt, γ = Σ_i s_i² / (s_i² + α/β), s the singular values of f: (n, D); t: (n,) or (n, K)
    columns, each with its own precisions. Both follow from the ratio α/β, which is what is iterated. It is kept
    within 10^±10 of the largest s², where the evidence is flat: uninformative features send α to infinity,
    targets that are fitted exactly send β there. {cite}`mackay1992bayesian`
    """
    f = rows(f)
    columns = _columns(t, len(f)).to(f.device)
    return Precisions(
        *(v.view(t.shape[1:]) for v in _precisions(_spectrum(f, columns), len(f), tolerance))
    )


def log_evidence(f: Tensor, t: Tensor, alpha: float, beta: float) -> float:
    """log p(t | f, α, β) = log N(t; 0, β⁻¹ I + α⁻¹ f fᵀ), for f: (n, D) and one column t: (n,).

    = (n log β + D log α − n log 2π − β ‖f m − t‖² − α ‖m‖² − log |A|) / 2, A = α I + β fᵀf and m = β A⁻¹ fᵀt.
    """
    check_tensor(t, "t")
    if t.ndim != 1:
        raise ValueError(f"expected one column of targets (n,), got {tuple(t.shape)}")
    f = rows(f)
    t = _columns(t, len(f))[:, 0].to(f.device)
    if not (0 < alpha < math.inf and 0 < beta < math.inf):
        raise ValueError(f"expected positive precisions, got alpha={alpha}, beta={beta}")
    precisions = (f.new_tensor([v]) for v in (alpha, beta))
    return _evidence(_spectrum(f, t[:, None]), len(f), *precisions).item()


class _Spectrum(NamedTuple):
    """What of f (n, D) and of columns t (n, K) the evidence depends on, from one decomposition for all columns."""

    square: Tensor  # s_i², (R, 1), of the singular values of f
    part: Tensor  # (u_iᵀt)², (R, K), along its left vectors
    outside: Tensor  # ‖t‖² outside of all of them, (K,)


def _spectrum(f: Tensor, t: Tensor) -> _Spectrum:
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    along = u.mT @ t
    return _Spectrum(s[:, None] ** 2, along**2, (t - u @ along).square().sum(0))


def _fit(spectrum: _Spectrum, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """‖m‖² and ‖f m − t‖² for α/β (K,)."""
    shrunk = ratio + spectrum.square
    m2 = (spectrum.square * spectrum.part / shrunk**2).sum(0)
    return m2, ((ratio / shrunk) ** 2 * spectrum.part).sum(0) + spectrum.outside


def _precisions(spectrum: _Spectrum, n: int, tolerance: float = 1e-9) -> tuple[Tensor, Tensor]:
    """α and β (K,) where the evidence is largest."""
    square = spectrum.square
    top = square.max()
    if not (top > 0 and bool((spectrum.part.sum(0) + spectrum.outside > 0).all())):
        raise ValueError("expected features and targets that are not all zero")
    ratio = (top / n).expand(spectrum.part.shape[1])
    for _ in range(10_000):
        m2, rest = _fit(spectrum, ratio)
        gamma = (square / (ratio + square)).sum(0)
        new = gamma * rest / ((n - gamma) * m2).clamp(min=1e-300)
        old, ratio = ratio, new.clamp(1e-10 * top, 1e10 * top)
        if (ratio / old).log().abs().max() < tolerance:
            break
    beta = n / (ratio * m2 + rest).clamp(min=1e-300)
    return ratio * beta, beta


def _evidence(spectrum: _Spectrum, n: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """`log_evidence` for each column (K,): log |A| − D log α = Σ_i log(1 + β s_i² / α)."""
    m2, rest = _fit(spectrum, alpha / beta)
    shrinkage = torch.log1p(beta / alpha * spectrum.square).sum(0)
    return (n * (beta / (2 * math.pi)).log() - beta * rest - alpha * m2 - shrinkage) / 2


def transrate(f: Tensor, y: Tensor, eps: float = 1e-4) -> float:
    """R(f) − Σ_c (n_c/n) R(f_c), R(f) = ½ log det(I + fᵀf / (n ε)): how much code per item knowing the class saves.

    f: (n, D), centred as a whole (not class by class) first; f_c the n_c rows of class c; in nats. At least 0, and
    0 if all classes have the same second moment. With classes of unequal size the authors' code weights each by
    1/C instead. The scale of f relative to ε matters. {cite}`huang2022transrate`
    """
    f, y = _labelled(f, y)
    if not 0 < eps < math.inf:
        raise ValueError(f"expected eps > 0, got {eps}")
    g = f - f.mean(0)
    saved = [len(part) / len(g) * _rate(part, eps) for part in (g[y == c] for c in y.unique())]
    return _rate(g, eps) - sum(saved)


def _rate(f: Tensor, eps: float) -> float:
    n, d = f.shape
    eye = torch.eye(d, dtype=f.dtype, device=f.device)
    return 0.5 * float(torch.linalg.slogdet(eye + f.mT @ f / (n * eps))[1])


def a_distance(a: Tensor, b: Tensor, seed: int = 0, strength: float = 1.0) -> float:
    """2 (1 − 2 ε), ε the error of a linear classifier that tells domain a from domain b. {cite}`bendavid2010theory`

    a: (n, D), b: (m, D) features. Logistic regression with a ridge (scikit-learn's C = `strength`) on standardised
    features is trained on one half of each domain and tested on the other, then the other way round; ε is the
    mean over the two domains, so sizes need not be equal. 2 if the domains can always be told apart, about 0 (or
    below, by chance) if never. Raises ValueError for shapes that do not fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_seed(seed)
    above_zero(strength=strength)
    a, b = rows(a, "a"), rows(b, "b")
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 4:
        raise ValueError(
            f"expected two domains of the same width and ≥ 4 items each, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    rng = np.random.default_rng(seed)
    halves = [np.array_split(d.detach().cpu().numpy()[rng.permutation(len(d))], 2) for d in (a, b)]
    errors = []
    for trained in (0, 1):
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=strength, class_weight="balanced", max_iter=1000),
        )
        x = np.concatenate([half[trained] for half in halves])
        model.fit(x, np.repeat([0, 1], [len(half[trained]) for half in halves]))
        errors += [np.mean(model.predict(half[1 - trained]) != k) for k, half in enumerate(halves)]
    return float(2 * (1 - 2 * np.mean(errors)))


# Checks --------------------------------------------------------------------------------------


def rows(f: Tensor, name: str = "f") -> Tensor:
    """f as constants in float64; ValueError unless it is (n, D) and finite."""
    check_tensor(f, name)
    if f.is_complex():
        raise ValueError(f"expected real numbers in {name}, got {f.dtype}")
    f = double(f.detach())
    if f.ndim != 2 or not f.numel():
        raise ValueError(f"expected {name} of shape (n, D), got {tuple(f.shape)}")
    if not bool(torch.isfinite(f).all()):
        raise ValueError(f"expected finite numbers in {name}; some are NaN or infinite")
    return f


def _columns(t: Tensor, n: int) -> Tensor:
    check_tensor(t, "t")
    if t.ndim not in (1, 2) or len(t) != n:
        raise ValueError(f"expected one target per item, ({n},), got {tuple(t.shape)}")
    return rows(t.view(n, -1), "t")


def _classes(y: Tensor, name: str) -> Tensor:
    check_tensor(y, name)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or not len(y):
        raise ValueError(
            f"expected {name} of class numbers (n,), integers; got {tuple(y.shape)} of {y.dtype}. "
            "For one-hot rows take y.argmax(1)."
        )
    return y.long()


def _labelled(f: Tensor, y: Tensor, at_least: int = 2) -> tuple[Tensor, Tensor]:
    f, y = rows(f), _classes(y, "y")
    if len(f) != len(y):
        raise ValueError(f"expected as many rows as labels, got {len(f)} and {len(y)}")
    if len(y.unique()) < at_least:
        raise ValueError(f"expected at least {at_least} classes in y, got {y.unique().tolist()}")
    return f, y.to(f.device)


def _indicators(y: Tensor) -> Tensor:
    """(n,) classes -> (n, C) ones and zeros, a column for each class that occurs."""
    return double(one_hot(torch.unique(y, return_inverse=True)[1]))
