"""Objectives that choose, or replace, the weights of the sum over data sets: use them in place of `joint`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlib.core import Draw, Loss, Params
from mtlib.joint import risks
from mtlib.learners.gradient import at_least_zero
from mtlib.objective import Objective, add_gradient, leaves_of, whole
from mtlib.run.copies import grad_mode_kept
from mtlib.tasks import check_tensor, positive

WEIGHT = "weight."  # prefix of these objectives' own entries in φ


def uncertainty(net: nn.Module, loss: Loss, columns: Sequence[slice] | None = None) -> Objective:
    """Weights by uncertainty: Σ_t e^{−s_t} L_t(f_θ) + s_t/2, with s_t = log σ_t² learned too. {cite}`kendall2018multi`

    This is the paper's form for classification, L/σ² + log σ. With L = ½ · (squared error) it is its form for
    regression, L/(2σ²) + log σ. At the optimal s, e^{s_t} = 2L_t; s = 0 is the plain sum. Start from
    {**φ, **log_variances(T)}.
    """
    terms = risks(net, loss, columns)

    def value(phi: Params, batch: Draw) -> Tensor:
        values = terms(phi, batch)  # (T,)
        s = _entry(phi, "log_variance", len(values), "log_variances(T)")
        return ((-s).exp() * values + s / 2).sum()

    return whole(value, net)


def log_variances(sets: int) -> Params:
    """The entries that `uncertainty` adds to φ: s_t = 0 for T = `sets` data sets."""
    positive(sets=sets)
    return {f"{WEIGHT}log_variance": torch.zeros(sets)}


def gradnorm(
    net: nn.Module,
    loss: Loss,
    strength: float = 1.5,
    columns: Sequence[slice] | None = None,
    layer: str | None = None,
) -> Objective:
    """GradNorm: Σ_t w_t L_t(f_θ) with w = T softmax(ω), with ω such that all data sets train at the same pace. {cite}`chen2018gradnorm`

    The gradient of θ is that of the sum with w constant. The gradient of ω is that of Σ_t |G_t − Ḡ r_t^α|, where
    G_t = w_t ‖∇_W L_t‖, Ḡ = mean(G), r_t = (L_t / L_t(0)) / mean(L / L(0)), α = `strength`, and Ḡ r_t^α is a constant.
    W is the entry named `layer`, by default the last of the body's weights with two axes or more. Start from
    {**φ, **balances(L(0))}: L(0) is kept in φ and gets no gradient. Where all risks are 0, r = 1. Raises ValueError if
    there is no W, α < 0, or a risk is negative: its pace is not defined.
    """
    at_least_zero(strength=strength)
    terms, name = risks(net, loss, columns), layer or _last_shared(net)
    if name not in dict(net.named_parameters()):
        raise ValueError(f"expected a layer of the network, got {name!r}: it has no such parameter")

    def value(phi: Params, batch: Draw) -> Tensor:
        values = terms(phi, batch)
        return _balance(phi, values) @ values

    @grad_mode_kept
    def value_and_grad(phi: Params, batch: Draw) -> tuple[Tensor, Params]:
        leaves = leaves_of(phi, net)
        if not leaves[name].requires_grad:
            raise ValueError(
                f"GradNorm weighs by the gradients of {name}, which is frozen; name another `layer`"
            )
        with torch.enable_grad():
            values = terms(leaves, batch)  # (T,)
            if bool((values < 0).any()):
                raise ValueError(
                    f"GradNorm expects risks of at least 0, got {values.tolist()}: give a loss with a lower bound of 0"
                )
            w = _balance(leaves, values)
            norms = torch.stack(
                [torch.autograd.grad(v, leaves[name], retain_graph=True)[0].norm() for v in values]
            )
            pace = values.detach() / _entry(phi, "initial", len(values), "balances(initial)")
            pace = torch.where(pace.mean() > 0, pace / pace.mean(), 1.0)
            target = (w * norms).detach().mean() * pace**strength
            unrest = (w * norms - target).abs().sum()
            total = w.detach() @ values
        grads = add_gradient({}, total, leaves)
        return total.detach(), add_gradient(grads, unrest, {_OMEGA: leaves[_OMEGA]})

    return Objective(value, value_and_grad, net=net)


def balances(initial: Tensor) -> Params:
    """The entries that `gradnorm` adds to φ: ω = 0, and the risks L(0) (T,) before training, all above 0."""
    check_tensor(initial, "the risks L(0)")
    known = initial.is_floating_point() and initial.ndim == 1 and len(initial)
    if not known or not bool(((initial > 0) & initial.isfinite()).all()):
        raise ValueError(
            f"expected the risks of T data sets before training, (T,) and above 0, got {initial.tolist()} of {initial.dtype}. "
            "`risks(net, loss)(phi, stream(0))` has them."
        )
    start = initial.detach().clone()
    return {_OMEGA: torch.zeros_like(start), f"{WEIGHT}initial": start}


def pcgrad(net: nn.Module, loss: Loss, columns: Sequence[slice] | None = None) -> Objective:
    """Gradient surgery: the mean of the gradients g_t, each without the part that conflicts with another. {cite}`yu2020pcgrad`

    For each t, over the other j in random order: g_t ← g_t − (g_t·g_j / ‖g_j‖²) g_j where g_t·g_j < 0, with the
    original g_j. The order is drawn from torch's random state, which `fit` sets by (seed, step). The value is the mean of the
    L_t. With separate heads (`columns`) the surgery leaves out the head, which is not shared.
    """
    terms = risks(net, loss, columns)

    def value(phi: Params, batch: Draw) -> Tensor:
        return terms(phi, batch).mean()

    @grad_mode_kept
    def value_and_grad(phi: Params, batch: Draw) -> tuple[Tensor, Params]:
        leaves = leaves_of(phi, net)
        with torch.enable_grad():
            values = terms(leaves, batch)
        moving = {k: v for k, v in leaves.items() if v.requires_grad}
        each = [
            torch.autograd.grad(v, list(moving.values()), retain_graph=True, allow_unused=True)
            for v in values
        ]
        torch.clear_autocast_cache()  # else autocast keeps a cast of each of the leaves until it ends
        grads, shared = dict[str, Tensor](), dict[str, Tensor]()
        for k, parts in zip(moving, zip(*each, strict=True), strict=True):
            if any(g is not None for g in parts):
                zero = torch.zeros_like(leaves[k])
                rows = torch.stack([zero if g is None else g for g in parts])  # (T, *shape)
                grads[k] = rows.mean(0)
                if columns is None or not k.startswith("head."):
                    shared[k] = rows
        flat = torch.cat([rows.flatten(1) for rows in shared.values()], 1)  # (T, P)
        pieces = without_conflict(flat).mean(0).split([grads[k].numel() for k in shared])
        for k, piece in zip(shared, pieces, strict=True):
            grads[k] = piece.view_as(grads[k])
        return values.detach().mean(), grads

    return Objective(value, value_and_grad, net=net)


def without_conflict(g: Tensor) -> Tensor:
    """Each row of g (T, P), projected off the other rows whose product with it is negative, in random order."""
    check_tensor(g, "g")
    if g.ndim != 2 or not g.is_floating_point():
        raise ValueError(
            f"expected the gradients of T data sets as rows, (T, P), got {tuple(g.shape)} of {g.dtype}"
        )
    result, tiny = [], torch.finfo(g.dtype).tiny / torch.finfo(g.dtype).eps
    small = (g * g).sum(1, keepdim=True) < tiny  # ‖g_j‖² would be lost; only its direction counts
    size = g.abs().amax(1, keepdim=True)
    others = torch.where(small & (size > 0), g / torch.where(size > 0, size, 1.0), g)
    for t in range(len(g)):
        row = g[t]
        for j in torch.randperm(len(g)).tolist():
            product = row @ others[j]
            if j != t and product < 0:
                row = row - product / (others[j] @ others[j]) * others[j]
        result.append(row)
    return torch.stack(result)


# The α of an α-weighted risk -------------------------------------------------------------------


def best_alpha(target: int, source: int, distance: float, dimension: float) -> float:
    """The α that minimises the bound on (1 − α) L_S + α L_T, in closed form. {cite}`bendavid2010theory`

    min_α √(d/m) · √(α²/β + (1 − α)²/(1 − β)) + (1 − α) A, with m_T = `target` and m_S = `source` labels,
    m = m_S + m_T, β = m_T/m, A = `distance` between the domains and d = `dimension` of the hypotheses. With D² = d/A²:
    α* = 1 where m_T ≥ D², else min{1, β (1 + m_S / √(D² m − m_S m_T))}.
    """
    if not (target >= 1 and source >= 0 and distance >= 0 and dimension > 0):
        raise ValueError(
            "expected at least 1 target label, no negative number of source labels or distance, and a dimension "
            f"above 0; got {target=}, {source=}, {distance=}, {dimension=}"
        )
    m = target + source
    if target * distance**2 >= dimension:
        return 1.0
    pull: float = source * distance / (dimension * m - source * target * distance**2) ** 0.5
    return min(1.0, target / m * (1 + pull))


def best_weights(variances: Tensor, offsets: Tensor) -> Tensor:
    """The weights w (T,) of sum 1 that make Σ_t w_t ȳ_t the best estimate of the target: an α-weighted risk's, where they are exact. {cite}`bendavid2010theory`

    variances v (T,): how far each data set's estimate ȳ_t lies from its mean, as an expected squared distance, above 0.
    offsets Δ (T, d): where that mean lies, seen from the target; the target's own row is 0. The expected squared error is
    ‖Σ_t w_t Δ_t‖² + Σ_t w_t² v_t = wᵀMw with M = ΔΔᵀ + diag(v), so that w = M⁻¹1 / 1ᵀM⁻¹1, and the error there is
    1 / 1ᵀM⁻¹1. With one source at δ the target's weight is (δ² + v_S) / (δ² + v_S + v_T). A weight is below 0 where sources
    err to one side, the far one more.
    """
    check_tensor(variances, "variances")
    check_tensor(offsets, "offsets")
    sets = offsets.ndim == 2 and variances.shape == offsets.shape[:1]
    if not (sets and bool((variances > 0).all()) and bool(torch.isfinite(offsets).all())):
        raise ValueError(
            "expected variances above 0, (T,), and finite offsets, (T, d), of T data sets, got "
            f"{tuple(variances.shape)} and {tuple(offsets.shape)}: {variances.tolist()}"
        )
    if not bool(torch.isfinite(variances).all()):
        raise ValueError(f"expected finite variances, got {variances.tolist()}")
    m = offsets @ offsets.mT + torch.diag(variances)
    w: Tensor = torch.linalg.solve(m, torch.ones_like(variances))
    return w / w.sum()


# Helpers -----------------------------------------------------------------------------------------

_OMEGA = f"{WEIGHT}omega"


def _balance(phi: Params, values: Tensor) -> Tensor:
    omega = _entry(phi, "omega", len(values), "balances(initial)").to(values)
    return len(values) * torch.softmax(omega, 0)


def _entry(phi: Params, name: str, sets: int, maker: str) -> Tensor:
    entry = phi.get(WEIGHT + name)
    if entry is None or entry.shape != (sets,):
        got = "none" if entry is None else f"shape {tuple(entry.shape)}"
        raise ValueError(
            f"expected an entry {WEIGHT + name!r} of φ with one number for each of {sets} data sets, got {got}. "
            f"Start from {{**phi, **{maker}}}."
        )
    return entry


def _last_shared(net: nn.Module) -> str:
    names = [k for k, v in net.named_parameters() if k.startswith("body.") and v.ndim >= 2]
    if not names:
        raise ValueError(
            f"GradNorm expects a network whose `body` has weights with two axes or more; {type(net).__name__} has "
            "none. Pass the name of a shared entry as `layer`."
        )
    return names[-1]
