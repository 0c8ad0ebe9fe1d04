"""Low-rank adaptation: a thin product beside each weight matrix moves in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Loss, Params, Rate, apply, parameters, require
from mtlib.learners.gradient import inner_loop

PREFIX = "lora."


def lora(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, rank: int = 4, scale: float = 1.0
) -> Learner:
    """LoRA: W = W₀ + s B A beside each weight of the body; A, B and the head move, W₀ stays.

    W₀ (m, n) is φ's, kernels flattened to (m, n); A (r, n) and B (m, r), r = min(`rank`, m, n), are φ's entries
    `lora.<name>.a` and `.b`. B starts at zero, so that θ₀ predicts as φ does; A is drawn, uniform in ±1/√n.
    s = `scale`, the paper's α/r. {cite}`hu2022lora`
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    own = parameters(net)
    wide = {k: v for k, v in own.items() if k.startswith("body.") and v.ndim > 1}
    if not wide:
        raise ValueError(f"expected a body with weights of two axes or more, got {list(own)}")
    for k, v in wide.items():
        m, n = v.flatten(1).shape
        r = min(rank, m, n)
        own[f"{PREFIX}{k}.a"] = (2 * torch.rand(r, n).to(v) - 1) / n**0.5
        own[f"{PREFIX}{k}.b"] = v.new_zeros(m, r)
    f = apply(net)

    def init() -> Params:
        return {k: v.clone() for k, v in own.items()}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, own)
        return {k: phi[k] for k in own if k.startswith((PREFIX, "head."))}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return f(merged(theta, scale), x)

    return inner_loop(init, begin, predict, loss, lr, steps)


def merged(theta: Params, scale: float = 1.0) -> Params:
    """The plain network's parameters, W₀ + s B A multiplied out: LoRA then costs nothing."""
    plain = {k: v for k, v in theta.items() if not k.startswith(PREFIX)}
    for k in plain:
        if f"{PREFIX}{k}.a" in theta:
            a, b = theta[f"{PREFIX}{k}.a"], theta[f"{PREFIX}{k}.b"]
            plain[k] = plain[k] + scale * (b @ a).view_as(plain[k])
    return plain
