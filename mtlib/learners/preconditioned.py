"""Gradient descent whose rates or directions are learned: they are entries of φ like any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    Point,
    Steps,
    apply,
    below,
    expect,
    parameters,
    require,
)
from mtlib.learners.gradient import (
    Rate,
    Rule,
    at_least_zero,
    check_descent,
    check_steps,
    descending,
    made,
    moving,
    support_loss,
    weights,
)


def meta_sgd(
    net: nn.Module, loss: Loss, lr: float, steps: int, rule: Rule | None = None
) -> Learner:
    """Meta-SGD: MAML with a learned rate for each parameter.

    θ ← θ − α ⊙ ∇L^S(θ), α = φ["lr.*"] of θ's shape, `lr` at first. Raises ValueError if `lr` < 0. {cite}`li2017metasgd`
    """
    at_least_zero(lr=lr)
    own = {f"lr.{k}": torch.full_like(v, lr) for k, v in weights(net).items()}
    return _descent(net, loss, own, lambda phi: below("lr.", phi), steps, lambda phi: rule)


def per_step_rates(
    net: nn.Module, loss: Loss, lr: float, steps: int, rule: Rule | None = None
) -> Learner:
    """MAML++'s rates: one for each tensor of the network and each inner step.

    θ_k ← θ_k − α_{k,j} ∇_k L^S(θ) at step j, α_k = φ["lr.k"] (steps,), `lr` at first. With more steps than
    rates, the last rate stays. Raises ValueError if `lr` < 0. {cite}`antoniou2019how`
    """
    at_least_zero(lr=lr)
    check_steps(steps)
    own = {f"lr.{k}": v.new_full((max(steps, 1),), lr) for k, v in weights(net).items()}

    def rates(phi: Params) -> Rate:
        own = below("lr.", phi)
        return lambda step: {k: a[min(step, len(a) - 1)] for k, a in own.items()}

    return _descent(net, loss, own, rates, steps, lambda phi: rule)


def meta_curvature(net: nn.Module, loss: Loss, lr: float, steps: int) -> Learner:
    """Meta-Curvature: MAML whose gradient is multiplied by a learned matrix along each of its axes.

    θ ← θ − α G ×₁ M_out ×₂ M_in ×₃ M_kernel, G = ∇L^S(θ) with the axes of a convolution's kernel as one;
    M = φ["curvature.*"], identity at first. Raises ValueError if `lr` < 0. {cite}`park2019metacurvature`
    """
    at_least_zero(lr=lr)
    own = {
        f"curvature.{k}.{i}": torch.eye(n).to(v)
        for k, v in weights(net).items()
        for i, n in enumerate(_flat(v).shape)
    }

    def rule_of(phi: Params) -> Rule:
        def rule(g: Params, state: None) -> tuple[Params, None]:
            return {
                k: along(_flat(v), list(below(f"curvature.{k}.", phi).values())).reshape(v.shape)
                for k, v in g.items()
            }, None

        return rule

    return _descent(net, loss, own, lambda phi: lr, steps, rule_of)


def along(g: Tensor, matrices: list[Tensor]) -> Tensor:
    """G ×₁ M₁ ×₂ M₂ …: matrix i multiplies axis i, G'[…, a, …] = Σ_b M_i[a, b] G[…, b, …]."""
    expect(len(matrices) <= g.ndim, f"at most one matrix for each of {g.ndim} axes", len(matrices))
    for i, m in enumerate(matrices):
        g = torch.tensordot(m, g, dims=([1], [i])).movedim(0, i)
    return g


def learned(own: Params, make: Callable[[Params], Learner]) -> Learner:
    """A learner whose settings are entries of φ: adapt(φ, S) = make(φ).adapt(φ, S).

    `own` are their first values, under a prefix of their own. The outer objective chooses them with the
    rest of φ; `unrolled` reaches them, and so does the rule `constant` at the cost of `first_order`, which refuses
    such learners.
    """
    expect(made(make) and not isinstance(make, nn.Module), "make, a function own -> learner", make)
    base = make(own)
    expect(isinstance(base, Learner), "make(own) to give a learner, such as maml(net, ...)", base)

    def init() -> Params:
        return {**base.init(), **{k: v.clone() for k, v in own.items()}}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, own)
        return make(phi).adapt(phi, support)

    if not isinstance(base.adapt, Steps):
        return Learner(init, adapt, base.predict, base.vmap, base.net, tuple(own))

    def steps(phi: Params) -> Steps:
        require(phi, own)
        found = make(phi).adapt
        assert isinstance(found, Steps)
        return found

    def step(phi: Params, support: Batch, number: int, point: Point) -> Point:
        return steps(phi).step(phi, support, number, point)

    def descent(phi: Params, support: Batch) -> tuple[Callable[[Params], Tensor], Rate]:
        found = steps(phi).descent
        assert found is not None
        return found(phi, support)

    seen = Steps(
        lambda phi, support: steps(phi).begin(phi, support),
        step,
        base.adapt.steps,
        lambda phi, support: steps(phi).given(phi, support),
        base.adapt.alone,
        descent=descent if base.adapt.descent else None,
    )
    return Learner(init, seen, base.predict, base.vmap, base.net, tuple(own))


def _descent(
    net: nn.Module,
    loss: Loss,
    own: Params,
    lr: Callable[[Params], Rate],
    steps: int,
    rule: Callable[[Params], Rule | None],
) -> Learner:
    """MAML whose rates and rule are made from entries of φ; `own` are their first values."""
    start, f = moving(net), apply(net)
    check_descent(loss, 0.0, steps)

    def init() -> Params:
        return {**parameters(net), **{k: v.clone() for k, v in own.items()}}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, own)
        return start(phi, support)

    adapt = descending(begin, support_loss(f, loss), lr, steps, rule)
    return Learner(init, adapt, f, net=net, settings=tuple(own))


def _flat(g: Tensor) -> Tensor:
    """(out, in, h, w) as (out, in, h·w); a matrix or a vector as it is."""
    return g.flatten(2) if g.ndim > 2 else g
