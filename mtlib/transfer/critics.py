"""Penalties of `joint` with a critic: a second network that is trained against the body.

Its parameters are in θ under `critic.`: start training at `{**phi, **adversary(critic)}`. One step trains both, as
the gradient is reversed between them. The two may need rates of their own: `fit(..., rates={"critic.": 1e-2})`. A critic
sees the features of all domains as one batch, so that a norm in it takes its statistics from all of them: from one domain
alone they would hide the very difference that it looks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Loss,
    Params,
    apply,
    below,
    classify,
    features,
    move,
    parameters,
    take,
)
from mtlib.joint import Penalty
from mtlib.learners.gradient import at_least_zero
from mtlib.nets import normed, seeded
from mtlib.objective import Objective, count, whole
from mtlib.tasks import above_zero, check_tensor, positive, within

CRITIC = "critic."  # prefix of the critic's parameters in θ


def critic(inputs: int, outputs: int = 2, width: int = 64, seed: int | None = None) -> nn.Module:
    """A critic of three layers, the first two with a norm: (B, inputs) -> (B, outputs).

    `inputs` are the features for `dann`, `adda` and `mdd`, and features × classes for `cdan`; `outputs` the domains, or
    for `mdd` the classes. `seed` as in `mtlib.nets.mlp`. {cite}`jiang2020tllib`
    """
    positive(inputs=inputs, outputs=outputs, width=width)
    with seeded(seed):
        return nn.Sequential(
            *normed(inputs, width), *normed(width, width), nn.Linear(width, outputs)
        )


def adversary(critic: nn.Module) -> Params:
    """The critic's parameters under the names that the penalties expect, `critic.*`."""
    return {f"{CRITIC}{k}": v for k, v in parameters(critic).items()}


def reverse(z: Tensor, strength: float = 1.0) -> Tensor:
    """R(z) = z with dR/dz = −λ, λ = `strength`: gradient reversal. {cite}`ganin2016dann`"""
    check_tensor(z, "z")
    at_least_zero(strength=strength)
    return (1 + strength) * z.detach() - strength * z


def warm(progress: float) -> float:
    """The published schedule of λ: 2 / (1 + e^{−10p}) − 1, from 0 at p = 0 to 1 at p = 1. {cite}`ganin2016dann`

    Training with it: `fit(lambda step: joint(net, loss, (1, 0), [dann(critic, warm(step / steps))]), ...)`.
    """
    within(0, 1, progress=progress)
    return 2 / (1 + math.exp(-10 * progress)) - 1


def dann(critic: nn.Module, strength: float = 1.0) -> Penalty:
    """Domain-adversarial training: −(1/T) Σ_t E log q_t(R(z_t)), q = softmax(critic(·)) over the T domains.

    The critic, (B, D) -> (B, T), minimises this to tell the domains apart; the body, behind R, maximises it, times
    λ = `strength`. Raises ValueError for fewer than two domains. {cite}`ganin2016dann`
    """
    at_least_zero(strength=strength)
    f = apply(critic)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several(z, "dann")
        domain = _outputs(f, theta, reverse(z, strength))  # (T, B, T)
        return -torch.log_softmax(domain, -1).mean(1).diagonal().mean()

    return penalty


def cdan(critic: nn.Module, strength: float = 1.0, by_entropy: bool = True) -> Penalty:
    """Conditional DANN: the critic, (B, D·W) -> (B, T), reads z ⊗ p, p = softmax(logits) as a constant.

    −(1/T) Σ_t Σ_i w_i log q_t(R(z_i) ⊗ p_i); w_i is 1/B, or with `by_entropy` grows with 1 + e^{−H(p_i)}:
    confident predictions count more (CDAN+E). Raises ValueError for fewer than two domains. {cite}`long2018cdan`
    """
    at_least_zero(strength=strength)
    f = apply(critic)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several(z, "cdan")
        p = torch.softmax(logits, -1).detach()  # (T, B, W)
        both = (reverse(z, strength)[..., None] * p[..., None, :]).flatten(2)  # (T, B, D·W)
        log_q = torch.log_softmax(_outputs(f, theta, both), -1)  # (T, B, T)
        w = (
            1 + torch.exp(-torch.special.entr(p).sum(-1))
            if by_entropy
            else torch.ones_like(z[..., 0])
        )
        own = log_q.diagonal(dim1=0, dim2=2).mT  # (T, B): log q_t of domain t's items
        return -((w / w.sum(1, keepdim=True)) * own).sum(1).mean()

    return penalty


def mdd(critic: nn.Module, strength: float = 1.0, margin: float = 4.0) -> Penalty:
    """Margin disparity discrepancy: a second head f', the critic (B, D) -> (B, W), against the net's predictions ŷ.

    γ E_s[ −log σ_ŷ(f'(R(z))) ] + E_t[ −log(1 − σ_ŷ(f'(R(z)))) ], ŷ = argmax of the net, γ = `margin`: f' agrees with
    the net on the source (the first domain) and disagrees on the target (the last) where it can; the body is trained
    to prevent it. Raises ValueError for fewer than two domains or two classes. {cite}`zhang2019mdd`
    """
    at_least_zero(strength=strength)
    above_zero(margin=margin)
    f = apply(critic)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        _several(z, "mdd")
        if logits.shape[-1] < 2:
            raise ValueError(f"mdd expects at least two classes, got {logits.shape[-1]} output")
        other = _outputs(f, theta, reverse(z, strength), logits.shape[-1])  # (T, B, W)
        named = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        total = other.logsumexp(-1)  # log σ_ŷ = own − total, log(1 − σ_ŷ) = rest − total
        own, rest = other[named].view_as(total), other.masked_fill(named, -torch.inf).logsumexp(-1)
        on_source = (total - own)[0].mean()
        on_target = (total - rest)[-1].mean()
        return margin * on_source + on_target

    return penalty


def mcd(net: nn.Module, strength: float = 1.0) -> Penalty:
    """Maximum classifier discrepancy: −E_t ‖p₁ − p₂‖₁/W on R(z), p₁ and p₂ the two halves of a head of 2W outputs.

    The halves learn to disagree on the target (the last domain), the body, behind R, to make them agree; both halves
    learn the source through `both_halves(loss)`. The paper alternates three steps; this is one, with R between them.
    {cite}`saito2018mcd`
    """
    at_least_zero(strength=strength)
    head = classify(net)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        first, second = _halves(head(theta, reverse(z[-1], strength)))
        if first.shape[-1] < 2:
            raise ValueError(
                f"mcd expects at least two classes, two halves of as many outputs, got {2 * first.shape[-1]} outputs"
            )
        return -(torch.softmax(first, -1) - torch.softmax(second, -1)).abs().mean()

    return penalty


def both_halves(loss: Loss) -> Loss:
    """L(first half) + L(second half) of outputs (B, 2W) for targets (B, W): the loss of `mcd`'s network."""

    if not callable(loss):
        raise TypeError(f"expected a loss, a function of predictions and targets, got {loss!r}")

    def total(prediction: Tensor, y: Tensor) -> Tensor:
        first, second = _halves(prediction)
        return loss(first, y) + loss(second, y)

    total.columns = 2  # type: ignore[attr-defined]
    return total


def adda(net: nn.Module, anchor: Params, critic: nn.Module) -> Objective:
    """ADDA: the target's body moves away from the source's, which stays, until a critic cannot tell target from source.

    L = −E_s log q_s(z_anchor(x)) − E_t log q_t(z_θ(x)) over the critic, (B, D) -> (B, 2), plus −E_t log q_s(z_θ(x)) over
    the body: inverted labels where DANN reverses the gradient. Start at {**anchor, **adversary(critic)}; the head gets no
    gradient and stays the source's. Data: x (2, B, ...), source then target; labels are not used. {cite}`tzeng2017adda`
    """
    z, f = features(net), apply(critic)
    if not isinstance(anchor, dict):
        raise TypeError(
            f"expected the source's parameters for the anchor, a dict as `parameters(net)` gives it, got "
            f"{type(anchor).__name__}"
        )

    def value(theta: Params, batch: Batch) -> Tensor:
        if not isinstance(batch, Batch):
            raise TypeError(f"adda expects batches (x, y), got {type(batch).__name__}")
        if count(batch) != 2:
            raise ValueError(f"adda expects a source and a target, got {count(batch)} domains")
        own = _own(theta)
        fixed = {k: v.detach() for k, v in own.items()}
        with torch.no_grad():
            source = z(move(anchor, batch.y.device), take(batch.x, 0))
        target = z(theta, take(batch.x, 1))
        b = len(source)
        log_q = torch.log_softmax(
            _wide(f(own, torch.cat([source, target.detach()])), 2, "domains"), -1
        )  # (2B, 2)
        tells = -log_q[:b, 0].mean() - log_q[b:, 1].mean()
        fools = -torch.log_softmax(f(fixed, torch.cat([source, target])), -1)[b:, 0].mean()
        return tells + fools

    return whole(value, net)


def _several(z: Tensor, who: str) -> None:
    if len(z) < 2:
        raise ValueError(f"{who} expects at least two domains, got features {tuple(z.shape)}")


def _outputs(
    f: Callable[[Params, Tensor], Tensor], theta: Params, z: Tensor, outputs: int | None = None
) -> Tensor:
    """The critic's outputs for each domain's features: (T, B, D) -> (T, B, outputs), T outputs by default."""
    found = f(_own(theta), z.flatten(0, 1)).unflatten(0, z.shape[:2])
    return _wide(found, outputs or len(z), "classes" if outputs else "domains")


def _wide(found: Tensor, wanted: int, what: str) -> Tensor:
    if found.shape[-1] != wanted:
        raise ValueError(
            f"expected a critic with one output for each of {wanted} {what}, got {found.shape[-1]}"
        )
    return found


def _own(theta: Params) -> Params:
    own = below(CRITIC, theta)
    if not own:
        raise ValueError(
            f"expected the critic's parameters in θ, under {CRITIC!r}; there are none. Start from "
            "{**phi, **adversary(critic)}."
        )
    return own


def _halves(outputs: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.shape[-1] % 2:
        raise ValueError(
            f"expected an even number of outputs, two halves of a head, got {outputs.shape[-1]}"
        )
    first, second = outputs.chunk(2, -1)
    return first, second
