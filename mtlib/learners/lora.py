"""Low-rank adaptation: a thin product beside each weight matrix moves in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Loss, Params, apply, expect, fixed, parameters, require
from mtlib.learners.gradient import Rate, at_least_zero, check_steps, inner_loop

PREFIX = "lora."
SCALE = f"{PREFIX}scale"


def lora(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, rank: int = 4, scale: float = 1.0
) -> Learner:
    """LoRA: W = W₀ + s B A beside each weight of the body; A, B and the head move, W₀ stays.

    W₀ (m, n) is φ's, kernels flattened to (m, n); A (r, n) and B (m, r), r = min(`rank`, m, n), are φ's entries
    `lora.<name>.a` and `.b`. B starts at zero, so that θ₀ predicts as φ does; A is drawn, uniform in ±1/√n.
    s = φ["lora.scale"] = `scale` > 0, the paper's α/r, stays. {cite}`hu2022lora`
    """
    check_steps(rank, "a rank", 1)
    at_least_zero(scale=scale)
    expect(scale > 0, "scale > 0: without one the adapters do nothing", scale)
    own = parameters(net)
    wide = {k: v for k, v in own.items() if k.startswith("body.") and v.ndim > 1}
    if not wide:
        raise ValueError(f"expected a body with weights of two axes or more, got {list(own)}")
    for k, v in wide.items():
        m, n = v.flatten(1).shape
        r = min(rank, m, n)
        own[f"{PREFIX}{k}.a"] = (2 * torch.rand(r, n).to(v) - 1) / n**0.5
        own[f"{PREFIX}{k}.b"] = v.new_zeros(m, r)
    own[SCALE] = next(iter(wide.values())).new_tensor(scale)
    f = apply(net)

    def init() -> Params:
        return {k: v.clone() for k, v in own.items()}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, own)
        still = fixed(net) | {SCALE}
        return {k: phi[k] for k in own if k.startswith((PREFIX, "head.")) and k not in still}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return f(merged(theta), x)

    return inner_loop(init, begin, predict, loss, lr, steps, net=net)


def merged(theta: Params, scale: float | None = None) -> Params:
    """The plain network's parameters, W₀ + s B A multiplied out, s = θ["lora.scale"]: LoRA then costs nothing.

    `scale` is needed only where θ has none. Raises ValueError where the two differ, where an adapter has no weight beside
    it, or its other half is missing.
    """
    expect(isinstance(theta, dict), "parameters {name: tensor}", theta)
    if any(k.startswith(PREFIX) for k in theta) and scale is None:
        require(theta, (SCALE,))
    if (
        scale is not None
        and SCALE in theta
        and abs(theta[SCALE].item() - scale) > 1e-6 * abs(scale)
    ):
        raise ValueError(f"expected θ's own scale, {theta[SCALE].item():g}, got {scale}")
    plain = {k: v for k, v in theta.items() if not k.startswith(PREFIX)}
    adapted = {k.removeprefix(PREFIX)[:-2] for k in theta if k.startswith(PREFIX) and k != SCALE}
    for k in adapted:
        require(theta, (k, f"{PREFIX}{k}.a", f"{PREFIX}{k}.b"))
        low = theta[f"{PREFIX}{k}.b"] @ theta[f"{PREFIX}{k}.a"]
        own = theta[SCALE].detach() if scale is None else scale
        plain[k] = plain[k] + own * low.view_as(plain[k])
    return plain
