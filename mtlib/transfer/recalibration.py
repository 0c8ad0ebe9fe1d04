"""A trained model of risks carried to a new place: its logits corrected with a few outcomes of that place, or with none.

o are the logits of the model, carried there as it is; n are the people of the new place whose outcome y, 0 or 1, is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

from mtlib.core import Batch, Learner, Params
from mtlib.tasks import above_zero, positive


def revised(
    x: Tensor,
    offset: Tensor,
    y: Tensor,
    precision: Tensor,
    weight: Tensor | None = None,
    steps: int = 12,
) -> Tensor:
    """Model revision with shrinkage: δ* = argmin_δ Σ_i w_i ℓ(o_i + δᵀx_i; y_i) + ½ Σ_j p_j δ_j², ℓ the log-loss.

    x: (…, n, D), offset o, y and weight w: (…, n), precision p: (…, D), which are broadcast -> δ*: (…, D). The corrected
    logits are o + xδ*. The most probable coefficients under a normal prior about those of the model, with precisions p; to
    transfer it is L2-SP {cite}`li2018l2sp`, to clinical prediction an update of the model {cite}`steyerberg2004validation`.
    A prior is worth a number of patients, however many come, as the loss is a sum. With x of ones this is
    recalibration-in-the-large; with o = 0 it is a model of the new place alone; w is 0 for whom it may not see.

    Each of the `steps` is Newton's, or where that would end higher one by the bound
    tanh(z/2)/(2z) ≥ σ(z)(1 − σ(z)) on its curvature, which cannot; a last one of Newton's carries the exact (implicit)
    gradient with respect to all arguments. Works under `torch.vmap` and inside a learner's `adapt`. δ* is NaN where there is
    no minimum, as outcomes of one kind with p = 0, or where the steps have not reached it. Raises ValueError for shapes
    that do not fit.
    """
    w = torch.ones_like(y) if weight is None else weight
    try:
        torch.broadcast_shapes(offset.shape, y.shape, w.shape, x.shape[:-1])
        torch.broadcast_shapes(precision.shape, (*x.shape[:-2], x.shape[-1]))
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            "expected x (…, n, D), offset, y and weight (…, n) and precision (…, D), got "
            f"{[tuple(t.shape) for t in (x, offset, y, w, precision)]}"
        ) from error
    with torch.no_grad():
        held = tuple(t.detach() for t in (x, offset, y, precision, w))
        first = torch.broadcast_shapes(offset.shape[:-1], y.shape[:-1], w.shape[:-1], x.shape[:-2])
        delta = x.new_zeros(*first, x.shape[-1]) + 0 * held[3]
        for _ in range(steps):
            delta = _better(delta, *held)
    slope, curvature = _derivatives(delta, x, offset, y, precision, w)
    last = delta - _solved(curvature.detach(), slope)
    with torch.no_grad():
        near = (last - delta).abs() <= 10 * torch.finfo(x.dtype).eps ** 0.5 * (1 + delta.abs())
    return torch.where(near.all(-1, keepdim=True), last, torch.nan)


def in_the_large(logits: Tensor, y: Tensor, precision: float = 0.0) -> float:
    """Recalibration-in-the-large: b* = argmin_b Σ_i ℓ(o_i + b; y_i) + ½ p b², to be added to every logit.

    logits o and y: (n,), y of 0 and 1. One number moves, the intercept: the mean risk becomes the share of the ill, and no
    ranking changes. With `precision` p = 0 it is the field's first update of a model at external validation
    {cite}`steyerberg2004validation`; p > 0 draws b* to 0, as if p had been known before. Raises ValueError for outcomes of
    one kind where p = 0, as b* is then infinite. {cite}`vancalster2019calibration`
    """
    o, y = _known(logits, y)
    return float(_told(o.new_ones(len(o), 1), o, y, [precision])[0])


def logistic_recalibration(
    logits: Tensor, y: Tensor, precision: Sequence[float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Logistic recalibration: (a*, s*) = argmin Σ_i ℓ(a + s o_i; y_i) + ½ p_a a² + ½ p_s (s − 1)²; the risk is σ(a + s o).

    logits o and y: (n,), y of 0 and 1; `precision` (p_a, p_s). The calibration intercept and slope: s < 1 says that the
    model is too sure of itself in the new place. A ranking changes only where s < 0. Raises ValueError where there is no
    minimum: outcomes of one kind, or separated by the logits, with p = 0. {cite}`steyerberg2004validation`
    """
    o, y = _known(logits, y)
    if len(list(precision)) != 2:
        raise ValueError(f"expected two precisions, of intercept and slope, got {precision!r}")
    a, more = _told(torch.stack([torch.ones_like(o), o], 1), o, y, precision).tolist()
    return a, 1 + more


def prior_shift(source: float, target: float) -> float:
    """What to add to a logit where the share of the ill changes from `source` to `target`, and nothing else.

    log π_t / (1 − π_t) − log π_s / (1 − π_s). By Bayes' rule it is exact where the ill look alike in both places, and so do
    the healthy {cite}`saerens2002adjusting`. It needs no person's outcome. Raises ValueError unless both shares lie between
    0 and 1, without the ends.
    """
    for name, share in {"source": source, "target": target}.items():
        if not isinstance(share, Real) or not 0 < share < 1:
            raise ValueError(
                f"expected the {name}'s share of the ill, between 0 and 1, got {share!r}"
            )
    return math.log(target / (1 - target)) - math.log(source / (1 - source))


def revision(width: int, precision: float = 10.0) -> Learner:
    """Learner: `revised` from each support set, where φ are the precisions that the tasks, hospitals say, share.

    x: (B, D + 1), D = `width` inputs and the carried model's logit o as the last column; y: (B, 1) of 0 and 1.
    φ = {"log_p": (D + 1,)}: log p of the inputs, at first all that of `precision`, and of the intercept, at first 1.
    θ = {"delta": (D + 1,)}; predicted is the logit o + δᵀ(x, 1), (B, 1). Meta-learned, φ says how far places differ, and in
    what; given and not learned, it is L2-SP on a linear model. Raises ValueError unless D ≥ 1 and p > 0, and for x of
    another width.
    """
    positive(width=width)
    above_zero(precision=precision)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != width + 1:
            raise ValueError(
                f"expected x (B, {width + 1}), {width} inputs and the model's logit, got {tuple(x.shape)}"
            )
        return torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], 1), x[:, -1]

    def init() -> Params:
        return {"log_p": torch.tensor([precision] * width + [1.0]).log()}

    def adapt(phi: Params, support: Batch) -> Params:
        x, offset = parts(support.x)
        return {"delta": revised(x, offset, support.y[:, 0], phi["log_p"].exp())}

    def predict(theta: Params, x: Tensor) -> Tensor:
        inputs, offset = parts(x)
        return (offset + inputs @ theta["delta"])[:, None]

    return Learner(init, adapt, predict, settings=("log_p",))


def _derivatives(
    delta: Tensor, x: Tensor, offset: Tensor, y: Tensor, precision: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope (…, D) and curvature (…, D, D) of the objective."""
    risk = torch.sigmoid(offset + (x @ delta[..., None])[..., 0])
    slope = (x.mT @ (w * (risk - y))[..., None])[..., 0] + precision * delta
    return slope, x.mT @ ((w * risk * (1 - risk))[..., None] * x) + torch.diag_embed(precision)


def _better(
    delta: Tensor, x: Tensor, offset: Tensor, y: Tensor, precision: Tensor, w: Tensor
) -> Tensor:
    """One step: of two, that by the curvature and that by a bound on it, the one that ends lower."""
    slope, curvature = _derivatives(delta, x, offset, y, precision, w)
    z = offset + (x @ delta[..., None])[..., 0]
    bound = torch.where(z.abs() < 1e-3, 0.25, torch.tanh(z / 2) / (2 * z + (z == 0)))
    above = x.mT @ ((w * bound)[..., None] * x) + torch.diag_embed(precision)

    def value(d: Tensor) -> Tensor:
        logit = offset + (x @ d[..., None])[..., 0]
        loss = w * log_loss(logit, y.expand_as(logit).to(logit), reduction="none")
        return loss.sum(-1) + 0.5 * (precision * d.square()).sum(-1)

    fast, safe = delta - _solved(curvature, slope), delta - _solved(above, slope)
    return torch.where((value(fast) <= value(safe))[..., None], fast, safe)


def _solved(curvature: Tensor, slope: Tensor) -> Tensor:
    """H⁻¹g; not finite where H has no inverse."""
    found: Tensor = torch.linalg.solve_ex(curvature, slope[..., None])[0][..., 0]
    return found


def _known(logits: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Logits and outcomes as two rows of floats. Raises unless they are of the same people."""
    for name, t in {"logits": logits, "y": y}.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"expected {name}, a tensor (n,), got {type(t).__name__}")
    if logits.ndim != 1 or logits.shape != y.shape or not len(y):
        raise ValueError(
            f"expected a logit and an outcome of each person, (n,) twice, got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(logits).all()) or not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("expected finite logits, and outcomes of 0 and 1")
    return logits.detach().cpu().double(), y.detach().cpu().double()


def _told(x: Tensor, offset: Tensor, y: Tensor, precision: Sequence[float]) -> Tensor:
    """`revised` with all its conditions checked."""
    numbers = [float(p) for p in precision]
    if not all(math.isfinite(p) and p >= 0 for p in numbers):
        raise ValueError(f"expected precisions of at least 0, got {precision!r}")
    found = revised(x, offset, y, x.new_tensor(numbers), steps=60)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"expected outcomes of both kinds that the logits do not separate, or precisions above 0: no correction is best for "
            f"{int(y.sum())} ill of {len(y)}"
        )
    return found
