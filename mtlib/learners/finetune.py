"""Learners of transfer: keep the trained parameters, or continue from them on the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Loss, Params, Rate, apply, features, parameters, risk
from mtlib.learners.gradient import descent


def as_is(net: nn.Module) -> Learner:
    """No adaptation: θ = φ. Under `bilevel` this is joint training, the hinge between the two objectives."""
    return Learner(lambda: parameters(net), lambda phi, support: phi, apply(net))


def finetune(net: nn.Module, loss: Loss, lr: Rate, steps: int) -> Learner:
    """Fine-tuning: continue gradient descent on the target's support set, every parameter moving.

    θ ← θ − α ∇L^S(θ) from θ₀ = φ. Inside a task this is what MAML does; the two differ in what trained φ,
    and in how far the steps go.
    """
    return descent(net, loss, lr, steps, adapted="")


def linear_probe(
    net: nn.Module,
    loss: Loss = nn.functional.cross_entropy,
    strength: float = 1e-2,
    iterations: int = 100,
) -> Learner:
    """Linear probe: a new linear head on frozen features, solved by L-BFGS.

    W*, b* = argmin L(z Wᵀ + b, y) + ½λ‖W‖², z = body(φ, x), λ = `strength` > 0; starts from zero, so φ's
    head is not used. The solution is a constant to the outer gradient. Runs in a loop over tasks only.
    """
    if strength <= 0:
        raise ValueError(
            f"expected strength > 0 (a probe on separable features has no optimum without), got {strength}"
        )
    z = features(net)

    def init() -> Params:
        return {k: v for k, v in parameters(net).items() if k.startswith("body.")}

    def adapt(phi: Params, support: Batch) -> Params:
        with torch.no_grad():
            zs = z(phi, support.x)
        w = zs.new_zeros(support.y.shape[1], zs.shape[1]).requires_grad_()
        b = zs.new_zeros(support.y.shape[1]).requires_grad_()
        solver = torch.optim.LBFGS(
            [w, b],
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            value = risk(loss, zs @ w.mT + b, support.y) + 0.5 * strength * (w * w).sum()
            value.backward()
            return value

        with torch.enable_grad():
            solver.step(closure)
        return {**phi, "probe.weight": w.detach(), "probe.bias": b.detach()}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return z(theta, x) @ theta["probe.weight"].mT + theta["probe.bias"]

    return Learner(init, adapt, predict, vmap=False)
