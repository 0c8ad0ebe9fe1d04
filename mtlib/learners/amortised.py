"""Learners that adapt in one forward pass: a trained network reads the support set (neural processes).

They predict a distribution: means and standard deviations side by side, (B, 2W), scored by `gaussian_nll`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mtlib.core import Batch, Learner, Params, apply, below, features, parameters
from mtlib.learners.metric import above, attend, body_of, check_targets, width
from mtlib.tasks import positive, within


def cnp(net: nn.Module, hidden: int = 64, floor: float = 0.1) -> Learner:
    """Conditional neural process: the mean of the encoded support items represents the task.

    r_w = (1/N) Σ_i h([z(φ, x_i), y_iw]);  (μ_w, a_w) = g([z(φ, x), r_w]),  σ_w = f + (1 − f) softplus(a_w), f = `floor`.
    The same h and g read each target w by itself, so that W = 1 is the paper's case and the order of classes does
    not matter. Both have one hidden layer and are under `process.`; the head is not used. θ carries r as
    `process.task` (W, hidden). Raises ValueError like `width`. {cite}`garnelo2018cnp`
    """
    z, d = features(net), _width(net, hidden, floor)
    own, (h, g) = networks(
        net, encoder=perceptron(d + 1, hidden, hidden), decoder=perceptron(d + hidden, hidden, 2)
    )

    def adapt(phi: Params, support: Batch) -> Params:
        zs = z(phi, support.x)
        y = check_targets(zs, support.y)
        values = h(phi, joined(zs, y[..., None]))  # (N, W, hidden)
        return {**phi, "process.task": values.mean(0)}

    def predict(theta: Params, x: Any) -> Tensor:
        zq = z(theta, x)
        r = theta["process.task"].expand(len(zq), -1, -1)  # (B, W, hidden)
        return distribution(g(theta, joined(zq, r)), floor)

    return Learner(lambda: {**body_of(net), **own()}, adapt, predict, net=net)


def attentive_cnp(net: nn.Module, hidden: int = 64, floor: float = 0.1) -> Learner:
    """Attentive conditional neural process: each query item attends to the support items that it resembles.

    r_w(x) = Σ_i softmax_i( q(z(φ, x)) · k(z(φ, x_i)) / √hidden ) h([z(φ, x_i), y_iw]), q and k linear; the rest is `cnp`,
    and q = 0 is `cnp` itself. θ carries k(z_i) as `process.keys` (N, hidden) and h's outputs as `process.values`
    (N, W, hidden). The paper's latent variable and its attention among the support items are left out.
    Raises ValueError like `width`. {cite}`kim2019attentive`
    """
    z, d = features(net), _width(net, hidden, floor)
    own, (h, g, q, k) = networks(
        net,
        encoder=perceptron(d + 1, hidden, hidden),
        decoder=perceptron(d + hidden, hidden, 2),
        query=nn.Linear(d, hidden, bias=False),
        key=nn.Linear(d, hidden, bias=False),
    )

    def adapt(phi: Params, support: Batch) -> Params:
        zs = z(phi, support.x)
        y = check_targets(zs, support.y)
        values = h(phi, joined(zs, y[..., None]))  # (N, W, hidden)
        return {**phi, "process.keys": k(phi, zs), "process.values": values}

    def predict(theta: Params, x: Any) -> Tensor:
        zq, values = z(theta, x), theta["process.values"]
        r = attend(q(theta, zq), theta["process.keys"], values.flatten(1))  # (B, W·hidden)
        return distribution(g(theta, joined(zq, r.unflatten(1, values.shape[1:]))), floor)

    return Learner(lambda: {**body_of(net), **own()}, adapt, predict, net=net)


def gaussian_nll(prediction: Tensor, y: Tensor) -> Tensor:
    """−log N(y; μ, σ²) = ½((y − μ)/σ)² + log σ + ½ log 2π, the mean over items and targets; (B, 2W), (B, W) -> scalar.

    NaN where a σ < 0. Raises ValueError unless there are two columns for each target.
    """
    if prediction.shape != (*y.shape[:-1], 2 * y.shape[-1]):
        raise ValueError(
            "expected two columns for each target, means (B, W) beside deviations (B, W), got predictions "
            f"{tuple(prediction.shape)} and y {tuple(y.shape)}"
        )
    mean, scale = prediction.chunk(2, -1)
    return (0.5 * ((y - mean) / scale) ** 2 + scale.log()).mean() + 0.5 * math.log(2 * math.pi)


gaussian_nll.columns = 2  # type: ignore[attr-defined]  # `mtlib.core.fits` reads it


def point(learner: Learner) -> Learner:
    """The same learner, predicting its means only: (B, 2W) -> (B, W), for squared error or accuracy."""
    if not isinstance(learner, Learner):
        raise TypeError(f"expected a learner, e.g. cnp(net), got {type(learner).__name__}")

    def predict(theta: Params, x: Any) -> Tensor:
        found = learner.predict(theta, x)
        if found.shape[-1] % 2:
            raise ValueError(
                "expected predictions of an even number of columns, means beside deviations (B, 2W), got "
                f"{tuple(found.shape)}"
            )
        return found.chunk(2, -1)[0]

    return learner._replace(predict=predict)


# What they share -----------------------------------------------------------------------------


def _width(net: nn.Module, hidden: int, floor: float) -> int:
    """D, once the settings are known to be good."""
    positive(hidden=hidden)
    within(0, 1, floor=floor)
    return width(net)


def networks(
    net: nn.Module, **parts: nn.Module
) -> tuple[Callable[[], Params], list[Callable[[Params, Tensor], Tensor]]]:
    """Fresh φ of some small networks under `process.`, and each as a function of φ; dtype and device are `net`'s."""
    together = nn.ModuleDict(parts).to(next(net.parameters()))

    def part(name: str, module: nn.Module) -> Callable[[Params, Tensor], Tensor]:
        f = apply(module)
        return lambda theta, x: f(below(f"process.{name}.", theta), x)

    return lambda: above("process.", parameters(together)), [part(*p) for p in parts.items()]


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """One hidden layer: (..., inputs) -> (..., outputs)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def joined(z: Tensor, r: Tensor) -> Tensor:
    """[z_b, r_bw] for each item and target: (B, D), (B, W, E) -> (B, W, D+E)."""
    return torch.cat([z[:, None].expand(-1, r.shape[1], -1), r], -1)


def distribution(out: Tensor, floor: float) -> Tensor:
    """(μ, a) -> [μ, f + (1 − f) softplus(a)]: (B, W, 2) -> (B, 2W)."""
    mean, a = out.unbind(-1)
    return torch.cat([mean, floor + (1 - floor) * softplus(a)], 1)
