"""Learners that adapt by gradient descent on the support set."""

from __future__ import annotations

from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    Rate,
    apply,
    descend,
    parameters,
    proximity,
    require,
    risk,
)


def maml(net: nn.Module, loss: Loss, lr: Rate, steps: int, strength: float = 0.0) -> Learner:
    """Model-agnostic meta-learning: every parameter takes a few gradient steps on the support set.

    θ₀ = φ,  θ ← θ − α ∇_θ [ L^S(θ) + ½λ‖θ − φ‖² ]  for `steps` steps; λ = `strength` (0 for MAML, above
    0 the inner problem of iMAML). {cite}`finn2017maml,rajeswaran2019imaml`
    """
    return descent(net, loss, lr, steps, adapted="", strength=strength)


def anil(net: nn.Module, loss: Loss, lr: Rate, steps: int) -> Learner:
    """Almost no inner loop: MAML whose inner steps move the head alone; the body is shared as it is.

    θ_head ← θ_head − α ∇_head L^S(θ). {cite}`raghu2020rapid`
    """
    return descent(net, loss, lr, steps, adapted="head.")


def descent(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, adapted: str, strength: float = 0.0
) -> Learner:
    """Gradient descent on the entries of φ whose names start with `adapted`; the others stay φ's.

    Raises ValueError where `steps` < 0, or no entry has such a name.
    """
    f = apply(net)
    moving = [k for k, _ in net.named_parameters() if k.startswith(adapted)]
    if steps < 0:
        raise ValueError(f"expected a number of steps of at least 0, got {steps}")
    if not moving:
        raise ValueError(
            f"expected a network with parameters named {adapted}*, got {[k for k, _ in net.named_parameters()][:5]}"
        )

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, moving)
        anchor = {k: phi[k] for k in moving}

        def inner(theta: Params) -> Tensor:
            value = risk(loss, f({**phi, **theta}, support.x), support.y)
            return value + strength * proximity(theta, anchor) if strength else value

        return {**phi, **descend(inner, anchor, lr, steps)}

    return Learner(lambda: parameters(net), adapt, f)
