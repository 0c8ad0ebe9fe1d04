"""Gradient descent on entries that each task starts afresh."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    apply,
    below,
    classify,
    features,
    parameters,
    require,
)
from mtlib.learners.gradient import Rate, Rule, check_steps, inner_loop, moving
from mtlib.learners.metric import above, among, body_of, defined, linear_head, prototypes


def cavia(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, dims: int = 5, rule: Rule | None = None
) -> Learner:
    """CAVIA: a small context vector c takes the inner steps; the network itself stays shared.

    c ← c − α ∇_c L^S(φ, c) from c = 0, and c scales and shifts the features in front of the head:
    f(x) = head(z ⊙ (1 + A c) + B c), z = body(x); A, B = φ["context.*"] (D, `dims`) are learned outside.
    It works with any network that has a linear head, and c = 0 is the network itself. θ carries c as `context`.
    {cite}`zintgraf2019cavia`
    """
    check_steps(dims, "dims", 1)
    film = nn.Linear(dims, 2 * linear_head(net, bias=True).in_features, bias=False)
    film = film.to(next(net.parameters()))
    z, h, modulate = features(net), classify(net), apply(film)

    def init() -> Params:
        return {**parameters(net), **above("context.", parameters(film))}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, ["context.weight"])
        return {"context": phi["context.weight"].new_zeros(dims)}

    def f(theta: Params, x: Any) -> Tensor:
        scale, shift = modulate(below("context.", theta), theta["context"]).chunk(2)  # (D,), (D,)
        return h(theta, z(theta, x) * (1 + scale) + shift)

    return inner_loop(init, begin, f, loss, lr, steps, rule=rule, net=net)


def protomaml(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, rule: Rule | None = None
) -> Learner:
    """ProtoMAML: MAML whose head starts where a prototypical network's linear classifier stands.

    w_k = 2c_k, b_k = −‖c_k‖² with the class means c of z(φ, x) over the support set; then θ ← θ − α ∇L^S(θ), body and
    head. The outer gradient also goes through c. A class without a support item has w_k = 0 and the lowest logit as
    b_k, which cross-entropy does not move: it cannot be predicted. {cite}`triantafillou2020meta`
    """
    linear_head(net, bias=True)
    z, body = features(net), moving(net, "body.")

    def begin(phi: Params, support: Batch) -> Params:
        known, c = defined(prototypes(z(phi, support.x), support.y))  # (W,), (W, D)
        head = {"head.weight": 2 * c, "head.bias": among(known, -(c**2).sum(1))}
        return {**body(phi, support), **head}

    return inner_loop(lambda: body_of(net), begin, apply(net), loss, lr, steps, rule=rule, net=net)
