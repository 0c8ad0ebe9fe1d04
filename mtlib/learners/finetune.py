"""Learners of transfer: keep the trained parameters, or continue from them on the target."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    Steps,
    apply,
    features,
    half,
    parameters,
    risk,
)
from mtlib.learners.gradient import Pull, Rate, Rule, descent, proximity


def as_is(net: nn.Module) -> Learner:
    """No adaptation: θ = φ. Under `bilevel` this is joint training, the hinge between the two objectives."""
    return Learner(lambda: parameters(net), lambda phi, support: phi, apply(net), net=net)


def finetune(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    pull: Pull | None = None,
    rule: Rule | None = None,
) -> Learner:
    """Fine-tuning: continue gradient descent on the target's support set, every parameter moving.

    θ ← θ − α ∇[ L^S(θ) + R(θ, φ, S) ] from θ₀ = φ. Inside a task this is what MAML does; the two differ in what
    trained φ, and in how far the steps go. R = `pull` is none, `l2_sp`, `delta` or `bss`; `lr` is one rate, or
    `discriminative` or `gradual`.
    """
    return descent(net, loss, lr, steps, adapted="", pull=pull, rule=rule)


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

    return Learner(init, adapt, predict, vmap=False, net=net)


def lp_ft(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    strength: float = 1e-2,
    pull: Pull | None = None,
) -> Learner:
    """Linear probing, then fine-tuning: the new head is solved first, so that it does not distort the pretrained features.

    θ₀ = (φ_body, W*, b*) with the solution of `linear_probe`, a constant to the outer gradient; then `finetune`. Runs in
    a loop over tasks only.
    Raises ValueError if the head is not one linear layer. {cite}`kumar2022finetuning`
    """
    probe, tune = linear_probe(net, loss, strength), finetune(net, loss, lr, steps, pull)
    heads = {k for k in parameters(net) if k.startswith("head.")}
    if heads != {"head.weight", "head.bias"}:
        raise ValueError(f"expected a head of one linear layer with a bias, got {sorted(heads)}")

    def given(phi: Params, support: Batch) -> Params:
        solved = probe.adapt(phi, support)
        return {**phi, "head.weight": solved["probe.weight"], "head.bias": solved["probe.bias"]}

    return Learner(probe.init, from_there(tune.adapt, given), tune.predict, vmap=False, net=net)


def fresh_head(learner: Learner, net: nn.Module, seed: int | None = None) -> Learner:
    """Head re-initialisation: adapt from φ's body and another head, zeros or, with a `seed`, drawn as the net draws.

    The source's class numbers mean nothing on the target. With zeros the body does not move in the first step:
    ∂L/∂z = Wᵀ ∂L/∂ŷ = 0.
    """
    head = {k: torch.zeros_like(v) for k, v in parameters(net).items() if k.startswith("head.")}
    if seed is not None:
        other = deepcopy(half(net, "head"))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            other.apply(_redraw)
        head = {f"head.{k}": v for k, v in parameters(other).items()}

    def init() -> Params:
        return {k: v for k, v in learner.init().items() if k not in head}

    def given(phi: Params, support: Batch) -> Params:
        return {**phi, **{k: v.to(support.x) for k, v in head.items()}}

    return learner._replace(init=init, adapt=from_there(learner.adapt, given))


def from_there(
    adapt: Callable[[Params, Batch], Params] | Steps, given: Callable[[Params, Batch], Params]
) -> Callable[[Params, Batch], Params] | Steps:
    """`adapt` from given(φ, S) instead of φ; an `adapt` with inner steps keeps them."""
    if not isinstance(adapt, Steps):
        return lambda phi, support: adapt(given(phi, support), support)
    then = adapt.given
    return adapt._replace(given=lambda phi, support: then(given(phi, support), support))


def _redraw(module: nn.Module) -> None:
    getattr(module, "reset_parameters", lambda: None)()


# What holds θ back ---------------------------------------------------------------------------


def l2_sp(strength: float, head: float = 1e-2) -> Pull:
    """L2-SP: ½λ‖θ_body − φ_body‖² + ½β‖θ_head‖², λ = `strength`, β = `head`: the head has nothing to stay near.

    {cite}`li2018l2sp`
    """

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        body = {k: v for k, v in theta.items() if k.startswith("body.")}
        norm = sum((v**2).sum() for k, v in theta.items() if k.startswith("head."))
        return strength * proximity(body, anchor) + 0.5 * head * norm

    return pull


def delta(net: nn.Module, strength: float) -> Pull:
    """Features, not parameters, stay: ½λ (1/N) Σ_i ‖z_θ(x_i) − z_φ(x_i)‖², z the body's output.

    DELTA {cite}`li2019delta` without its per-channel weights, which it learns on the target first.
    """
    z = features(net)

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        gap = z(theta, x) - z(anchor, x)
        return 0.5 * strength * (gap**2).sum() / len(x)

    return pull


def bss(net: nn.Module, strength: float, smallest: int = 1) -> Pull:
    """Batch spectral shrinkage: λ Σ_{i ≤ k} σ₋ᵢ², the k = `smallest` singular values of the features z (N, D).

    Directions that the support set barely uses carry nothing to the target; they are shrunk away.
    {cite}`chen2019bss`
    """
    z = features(net)

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        f = z(theta, x)
        gram = f @ f.mT if len(f) <= f.shape[1] else f.mT @ f  # its eigenvalues are the σ²
        squares: Tensor = torch.linalg.eigvalsh(gram)
        return strength * squares[:smallest].sum()

    return pull


# How fast which layer goes -------------------------------------------------------------------


def layers(net: nn.Module) -> list[list[str]]:
    """The parameters' names, layer by layer from the first to the head: one list for each module that owns some."""
    owned: dict[str, list[str]] = {}
    for k, _ in net.named_parameters():
        owned.setdefault(k.rpartition(".")[0], []).append(k)
    return list(owned.values())


def discriminative(net: nn.Module, lr: float, factor: float = 2.6) -> Params:
    """A rate for each layer: the head's is `lr`, and each layer before it has a rate `factor` times smaller: η_{l−1} = η_l / factor.

    {cite}`howard2018ulmfit`
    """
    rates: Params = {}
    for depth, names in enumerate(reversed(layers(net))):
        rates |= {k: torch.tensor(lr / factor**depth) for k in names}
    return rates


def gradual(net: nn.Module, lr: float, every: int) -> Callable[[int], Params]:
    """Gradual unfreezing: the head moves first, and one more layer, from the top, after each `every` steps.

    A rate for `finetune` that follows the step. {cite}`howard2018ulmfit`
    """
    if every < 1:
        raise ValueError(f"expected every ≥ 1, got {every}")
    order = list(reversed(layers(net)))

    def rate(step: int) -> Params:
        open_ = 1 + step // every
        return {
            k: torch.tensor(lr if depth < open_ else 0.0)
            for depth, names in enumerate(order)
            for k in names
        }

    return rate
