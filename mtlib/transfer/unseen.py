"""Training on several domains for an unseen one: objectives over batches (T, B, ...), T the training domains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.bilevel import at, unrolled
from mtlib.core import Batch, Draw, Episode, Loss, Params, Stream, apply, over, risk, take
from mtlib.joint import risks
from mtlib.learners.gradient import at_least_zero, maml
from mtlib.objective import Objective, add_gradient, count, leaves_of, over_tasks, whole
from mtlib.run.copies import grad_mode_kept
from mtlib.run.fast import outside_inference
from mtlib.tasks import check_seed, check_stream, positive

GROUP = "group."  # prefix of `group_dro`'s own entries in φ


def irm(net: nn.Module, loss: Loss, strength: float) -> Objective:
    """IRMv1: 1/T Σ_t [L_t(f_θ) + λ ‖∇_{w|w=1} L_t(w · f_θ)‖²]: the same output scale should be best in all domains.

    λ = `strength`; 0 is plain joint training. The paper's code has λ = 1 for the first 100 of 501 steps, then a large
    one, and divides the objective by it; `fit` takes a function of the step. The square is taken on the batch, which adds
    the variance of the slope to its expectation.
    Raises ValueError if λ < 0. {cite}`arjovsky2019invariant`
    """
    at_least_zero(strength=strength)
    f = apply(net)

    def value(theta: Params, batch: Batch) -> Tensor:
        batch = _domains(batch, "irm", 1)

        def one(x: Any, y: Tensor) -> Tensor:
            prediction = f(theta, x)
            level, slope = scale_slope(loss, prediction, y)
            return level + strength * slope**2

        return torch.stack([one(*take(batch, t)) for t in range(count(batch))]).mean()

    return whole(value, net)


def scale_slope(loss: Loss, prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L(w · ŷ) and its derivative in w, at w = 1: two scalars."""

    def scaled(w: Tensor) -> Tensor:
        return risk(loss, w * prediction, y)

    one = torch.ones_like(prediction[0, 0])
    slope, level = outside_inference(torch.func.grad_and_value(scaled), one)
    return level, slope


def vrex(net: nn.Module, loss: Loss, strength: float) -> Objective:
    """VREx: mean_t L_t(f_θ) + λ Var_t L_t(f_θ), the variance over the T training domains (divided by T).

    λ = `strength`; 0 is plain joint training. Raises ValueError if λ < 0. {cite}`krueger2021rex`
    """
    at_least_zero(strength=strength)
    terms = risks(net, loss)

    def value(theta: Params, batch: Batch) -> Tensor:
        values = terms(theta, batch)
        return values.mean() + strength * values.var(correction=0)

    return whole(value, net)


def group_dro(net: nn.Module, loss: Loss) -> Objective:
    """Group DRO: Σ_t q_t L_t(f_θ) with q = softmax(γ); domains that do badly gain weight. {cite}`sagawa2020distributionally`

    The gradient of θ is that of the sum with q constant; the gradient of γ is set to −L_t, so that SGD with rate η on γ is
    the paper's exponentiated gradient, q_t ← q_t e^{η L_t} / Σ. (The paper updates q before θ, here both at once.)
    Rate 0 on γ is plain joint training. Start from {**φ, **group_weights(T)}, with plain SGD on the entries `group.`.
    """
    terms = risks(net, loss)

    def value(phi: Params, batch: Draw) -> Tensor:
        values = terms(phi, batch)
        return torch.softmax(_logits(phi, values), 0) @ values

    @grad_mode_kept
    def value_and_grad(phi: Params, batch: Draw) -> tuple[Tensor, Params]:
        leaves = leaves_of(phi, net)
        with torch.enable_grad():
            values = terms(leaves, batch)
            total = torch.softmax(_logits(phi, values).detach(), 0) @ values
        grads = add_gradient({}, total, leaves)
        return total.detach(), {**grads, _GAMMA: -values.detach().to(phi[_GAMMA])}

    return Objective(value, value_and_grad, net=net)


def group_weights(domains: int) -> Params:
    """The entries that `group_dro` adds to φ: γ_t = 0, equal weights, for T = `domains`."""
    positive(domains=domains)
    return {_GAMMA: torch.zeros(domains)}


def mldg(net: nn.Module, loss: Loss, lr: float, strength: float) -> Objective:
    """MLDG: L^S(φ) + β L^Q(φ − α ∇L^S(φ)): a step on some domains should help on the one that is held out. {cite}`li2018mldg`

    α = `lr`, β = `strength`; the data are the episodes of `held_out`. It is MAML with one step plus the joint risk of
    the support set; strength 0 is plain joint training on it. Raises ValueError if α or β < 0.
    """
    at_least_zero(lr=lr, strength=strength)
    learner = maml(net, loss, lr, steps=1)
    after = unrolled(learner, loss)

    def task(phi: Params, episode: Episode) -> Tensor:
        if not isinstance(episode, Episode):
            raise TypeError(
                f"mldg expects episodes, as `held_out` makes them of batches, got {type(episode).__name__}"
            )
        return at(learner, loss, phi, episode.support) + strength * after(phi, episode)

    return over_tasks(task, net=net)


def held_out(stream: Stream, seed: int) -> Stream:
    """Episodes from batches of T domains: one domain, drawn by (seed, step), is the query, the others are the support.

    Batch (T, B, ...) -> Episode with T = 1 task: support (1, (T − 1)·B, ...), query (1, B, ...).
    """

    check_stream(stream)
    check_seed(seed)

    def episodes(step: int) -> Episode:
        batch = _domains(stream(step), "held_out")
        domains = count(batch)
        out = int(np.random.default_rng([seed, step, 53]).integers(domains))
        kept = [t for t in range(domains) if t != out]
        return Episode(
            over(lambda d: d[kept].flatten(0, 1)[None], batch), over(lambda d: d[out][None], batch)
        )

    return episodes


def mixup(stream: Stream, strength: float, seed: int) -> Stream:
    """Mixup: each item is mixed with another of the batch, of any domain. {cite}`zhang2018mixup`

    x̃_i = λ_i x_i + (1 − λ_i) x_π(i), ỹ_i likewise, λ_i ~ Beta(α, α) with α = `strength` and π a permutation of all T·B
    items, both drawn by (seed, step). Strength 0 is the stream itself; with T = 1 items of one domain mix.
    """

    def mixed(batch: Batch, rng: np.random.Generator) -> Batch:
        sets, items = batch.y.shape[:2]
        order = torch.from_numpy(rng.permutation(sets * items))
        share = torch.from_numpy(rng.beta(strength, strength, sets * items))

        def mix(d: Tensor) -> Tensor:
            flat = d.flatten(0, 1)  # (T·B, ...)
            return _between(flat, flat[order.to(d.device)], share).view_as(d)

        result: Batch = over(mix, batch)
        return result

    return _mixing(mixed, stream, strength, seed, "mixup", 1)


def domain_mixup(stream: Stream, strength: float, seed: int) -> Stream:
    """Inter-domain Mixup: each domain's items are mixed with those of one other domain. {cite}`yan2020mixup`

    x̃_t = λ_t x_t + (1 − λ_t) x_σ(t), ỹ_t likewise, for whole minibatches x_t (B, ...): σ goes round all T domains in a
    random order, and λ_t ~ Beta(α, α) with α = `strength`, one for each pair, both drawn by (seed, step). Of
    cross-entropy the loss is then λ_t L(ŷ, y_t) + (1 − λ_t) L(ŷ, y_σ(t)), as DomainBed {cite}`gulrajani2021search` has
    it. Strength 0 is the stream itself. Raises ValueError for less than two domains.
    """

    def mixed(batch: Batch, rng: np.random.Generator) -> Batch:
        ring = rng.permutation(count(batch))
        partner = torch.from_numpy(np.roll(ring, -1)[np.argsort(ring)])
        share = torch.from_numpy(rng.beta(strength, strength, len(ring)))
        result: Batch = over(lambda d: _between(d, d[partner.to(d.device)], share), batch)
        return result

    return _mixing(mixed, stream, strength, seed, "domain_mixup", 2)


# Helpers -----------------------------------------------------------------------------------------

_GAMMA = f"{GROUP}logits"


def _logits(phi: Params, values: Tensor) -> Tensor:
    gamma = phi.get(_GAMMA)
    if gamma is None or gamma.shape != values.shape:
        got = "none" if gamma is None else f"shape {tuple(gamma.shape)}"
        raise ValueError(
            f"expected an entry {_GAMMA!r} of φ with one number for each of {len(values)} domains, got {got}. "
            "Start from {**phi, **group_weights(T)}."
        )
    return gamma.to(values)


def _mixing(
    mixed: Callable[[Batch, np.random.Generator], Batch],
    stream: Stream,
    strength: float,
    seed: int,
    who: str,
    least: int,
) -> Stream:
    """The stream with each batch mixed, by numbers of (seed, step); itself at strength 0."""
    at_least_zero(strength=strength)
    check_stream(stream)
    check_seed(seed)
    if strength == 0:
        return stream
    return lambda step: mixed(
        _domains(stream(step), who, least), np.random.default_rng([seed, step, 59])
    )


def _between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share · one + (1 − share) · other, a share for each entry of the first axis."""
    if not one.is_floating_point():
        raise ValueError(
            f"mixup expects floating-point x and y, which have values between two items, got {one.dtype}: "
            "images / 255, one-hot rows; mix what an embedding makes of tokens"
        )
    w = share.to(one).view(-1, *[1] * (one.ndim - 1))
    return w * one + (1 - w) * other


def _domains(batch: object, who: str, least: int = 2) -> Batch:
    if isinstance(batch, Batch) and count(batch) >= least:
        return batch
    got = f"{count(batch)} domain" if isinstance(batch, Batch) else type(batch).__name__
    raise ValueError(f"{who} expects batches (T, B, ...) of at least {least} domains, got {got}")
