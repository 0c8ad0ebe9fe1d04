"""Gradient descent on entries that each task starts afresh."""

from __future__ import annotations

from collections.abc import Callable
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
from mtlib.learners.gradient import Rate, Rule, check_steps, inner_loop, moving, weights
from mtlib.learners.metric import above, among, body_of, defined, linear_head, prototypes
from mtlib.norm import Norm


def cavia(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    dims: int = 5,
    rule: Rule | None = None,
    layer: str | None = None,
) -> Learner:
    """CAVIA: a small context vector c takes the inner steps; the network itself stays shared.

    c ← c − α ∇_c L^S(φ, c) from c = 0, c of `dims` numbers. `layer` says where the network reads it:

    - the name of a linear layer, "body.0": c stands beside the layer's input, W [x; c] + b = W_x x + A c + b. At the first
      layer this is the paper's form for vectors, and the network is nonlinear in c.
    - the name of a norm, "body.3.1": c scales and shifts what the norm gives, y ⊙ (1 + A c) + B c, the paper's FiLM for images.
    - None: c scales and shifts the features in front of the head, head(z ⊙ (1 + A c) + B c). Where the head is linear, so is
      the network in c, and the inner problem is a regression in `dims` unknowns: simpler than the paper's. Any network with
      a linear head has this place.

    A, B = φ["context.weight"] (D, `dims`) or (2D, `dims`) are learned outside; c = 0 is the network itself. θ carries c as
    `context`. Raises ValueError where there is no such layer, or it is of another kind or has no bias. {cite}`zintgraf2019cavia`
    """
    check_steps(dims, "dims", 1)
    read, width = _before_head(net) if layer is None else _inside(net, layer)
    matrix = nn.Linear(dims, width, bias=False).to(next(net.parameters()))
    product = apply(matrix)

    def init() -> Params:
        return {**parameters(net), **above("context.", parameters(matrix))}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, ["context.weight"])
        return {"context": phi["context.weight"].new_zeros(dims)}

    def f(theta: Params, x: Any) -> Tensor:
        return read(theta, x, product(below("context.", theta), theta["context"]))

    return inner_loop(init, begin, f, loss, lr, steps, rule=rule, net=net)


NORMS = (
    *(Norm, nn.LayerNorm, nn.GroupNorm, nn.SyncBatchNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""Layers whose last step is y ⊙ weight + bias."""

Read = Callable[[Params, Any, Tensor], Tensor]
"""`read(theta, x, v)` -> prediction of the network that reads v, the context times a matrix."""


def _before_head(net: nn.Module) -> tuple[Read, int]:
    """The network with its features z as z ⊙ (1 + s) + t, (s, t) = v, and how long v is."""
    width, z, h = linear_head(net, bias=True).in_features, features(net), classify(net)

    def read(theta: Params, x: Any, v: Tensor) -> Tensor:
        scale, shift = v.chunk(2)
        return h(theta, z(theta, x) * (1 + scale) + shift)

    return read, 2 * width


def _inside(net: nn.Module, layer: str) -> tuple[Read, int]:
    """The network whose linear layer adds v, or whose norm's y is y ⊙ (1 + s) + t, (s, t) = v; and how long v is."""
    own, kind = weights(net), dict(net.named_modules()).get(layer)
    weight, bias = (own.get(f"{layer}.{k}") for k in ("weight", "bias"))
    linear, norm = isinstance(kind, nn.Linear), isinstance(kind, NORMS)
    if bias is None or weight is None or not (linear or (norm and bias.ndim == 1)):
        raise ValueError(
            f"expected the name of a linear layer or of a norm, with weight and bias, got {layer!r:.60}; the network has "
            f"{list(own)[:6]}"
        )
    f, width = apply(net), len(bias)

    def read(theta: Params, x: Any, v: Tensor) -> Tensor:
        g, b = theta[f"{layer}.weight"], theta[f"{layer}.bias"]
        if linear:
            return f({**theta, f"{layer}.bias": b + v}, x)
        scale, shift = v.chunk(2)
        scaled = {f"{layer}.weight": g * (1 + scale), f"{layer}.bias": b * (1 + scale) + shift}
        return f({**theta, **scaled}, x)

    return read, width if linear else 2 * width


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
