"""Learners that adapt in one forward pass: a trained network reads the support set (neural processes).

They predict a distribution: means and standard deviations side by side, (B, 2W), scored by `gaussian_nll`; `in_context`
also predicts logits (B, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pad, softplus

from mtlib.core import Batch, Learner, Params, apply, below, features, parameters, require
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


def in_context(
    net: nn.Module,
    ways: int | None = None,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    floor: float = 0.1,
) -> Learner:
    """A transformer that learns in its forward pass: support and query items are tokens, all of them attend to the support.

    A support item enters as the token h_i = E z(φ, x_i) + U y_i + u, a query item as E z(φ, x), without a target. Layer l:

        h ← h + O_l softmax( Q_l |h| (K_l |S|)ᵀ / √d ) V_l |S|,   h ← h + MLP_l |h|,   l = 1 … `layers`,

    |·| the layer norm, S the support's tokens at this layer, (N, `hidden`), softmax over them for each of `heads` heads of
    width d = `hidden`/`heads`; MLP has one hidden layer of 2 `hidden` with a GELU. Queries do not see one another, and nothing
    tells the place of an item: an answer depends on the *set* of support items alone, and a support repeated as a whole gives
    the same answer. `adapt` reads the support; θ carries its keys and values as `process.read<l>` (R, N, 2 `hidden`), l from 0.
    `predict` is one pass of the queries.

    ways=None: real targets. A linear layer gives (μ, a), predicted as in `cnp`, (B, 2W): for `gaussian_nll`. Each of the R = W
    targets is read by itself, so their order does not matter; what one target says about another is not used.

    ways=k: classes. y is one-hot (N, W) with W ≤ k, read whole (R = 1), and filled up with zeros to k columns. A linear layer
    gives k logits, of which the first W are predicted, (B, W): for `cross_entropy`. A class without a support item has a
    logit like the others. What classes are called is *not* built in: train on tasks that number their classes anew, as
    `mtlib.tasks.episodes` does, and an answer hardly depends on it; a mean over permuted columns removes the rest.

    Inputs of varying width are filled up with zeros to the D of the network. The network's head is not used. Raises ValueError
    like `cnp`, unless `heads` divides `hidden`, and where y has one column or more than `ways`: a single logit would have no loss.
    {cite}`nguyen2022tnp,muller2022pfn`
    """
    z, d = features(net), _width(net, hidden, floor)
    positive(layers=layers, heads=heads, **({} if ways is None else {"ways": ways}))
    if hidden % heads:
        raise ValueError(
            f"expected heads that divide hidden = {hidden}, got {heads}; each has hidden/heads columns"
        )
    reads, answers = (1, 2) if ways is None else (ways, ways)
    item, target = tokens(d, reads, hidden)
    parts = {"item": item, "target": target, "answer": nn.Linear(hidden, answers)}
    for j in range(layers):
        parts[f"ask{j}"] = nn.Linear(hidden, hidden, bias=False)
        parts[f"read{j}"] = nn.Linear(hidden, 2 * hidden, bias=False)
        parts[f"mix{j}"] = nn.Linear(hidden, hidden, bias=False)
        parts[f"widen{j}"] = nn.Linear(hidden, 2 * hidden)
        parts[f"narrow{j}"] = nn.Linear(2 * hidden, hidden)
    own, _ = networks(net, **parts)

    def layer(phi: Params, j: int, h: Tensor, known: Tensor, read: Tensor) -> Tensor:
        """Tokens h, |h| = `known`, after layer j, where `read` are the support's keys and values."""
        k, v = read.chunk(2, -1)
        a = attend(*(split(t, heads) for t in (linear(phi, f"ask{j}", known), k, v)))
        h = h + linear(phi, f"mix{j}", a.transpose(-3, -2).flatten(-2))
        return h + linear(phi, f"narrow{j}", gelu(linear(phi, f"widen{j}", normal(h))))

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, (f"process.{name}.weight" for name in parts))
        zs = z(phi, support.x)
        y = check_targets(zs, support.y)
        h = linear(phi, "item", zs) + linear(phi, "target", readings(y, ways))  # (R, N, hidden)
        theta = {**phi, "process.classes": y.sum(0)}
        for j in range(layers):
            known = normal(h)
            theta[f"process.read{j}"] = read = linear(phi, f"read{j}", known)
            h = layer(phi, j, h, known, read) if j < layers - 1 else h
        return theta

    def predict(theta: Params, x: Any) -> Tensor:
        h = linear(theta, "item", z(theta, x))[None]  # (1, B, hidden)
        for j in range(layers):
            h = layer(theta, j, h, normal(h), theta[f"process.read{j}"])
        out = linear(theta, "answer", normal(h))  # (R, B, answers)
        if ways is None:
            return distribution(out.transpose(0, 1), floor)
        return out[0, :, : len(theta["process.classes"])]

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


def tokens(items: int, targets: int, hidden: int) -> tuple[nn.Linear, nn.Linear]:
    """E (without a shift) and U, u, drawn as one linear layer of [z, y] would be: neither drowns the other in a token."""
    item, target = nn.Linear(items, hidden, bias=False), nn.Linear(targets, hidden)
    both = nn.Linear(items + targets, hidden)
    with torch.no_grad():
        item.weight.copy_(both.weight[:, :items])
        target.weight.copy_(both.weight[:, items:])
        target.bias.copy_(both.bias)
    return item, target


def linear(theta: Params, name: str, h: Tensor) -> Tensor:
    """W h + b, of the entries under `process.<name>`."""
    at = f"process.{name}"
    return torch.nn.functional.linear(h, theta[f"{at}.weight"], theta.get(f"{at}.bias"))


def normal(h: Tensor) -> Tensor:
    """|h|, the layer norm, without a scale and a shift: they would be those of the next linear layer."""
    return layer_norm(h, h.shape[-1:])


def split(t: Tensor, heads: int) -> Tensor:
    """Columns into heads: (R, N, H·d) -> (R, H, N, d)."""
    apart: Tensor = t.unflatten(-1, (heads, -1))
    return apart.transpose(-3, -2)


def readings(y: Tensor, ways: int | None) -> Tensor:
    """What a transformer reads beside the items: each target by itself, (W, N, 1), or all classes at once, (1, N, ways)."""
    if ways is None:
        return y.mT[..., None]
    if not 2 <= y.shape[1] <= ways:
        raise ValueError(
            f"expected one-hot labels (N, W) of 2 to ways = {ways} classes, got {tuple(y.shape)}. For more classes give "
            "`in_context` more ways; for real targets give it none, ways=None"
        )
    return pad(y, (0, ways - y.shape[1]))[None]


def joined(z: Tensor, r: Tensor) -> Tensor:
    """[z_b, r_bw] for each item and target: (B, D), (B, W, E) -> (B, W, D+E)."""
    return torch.cat([z[:, None].expand(-1, r.shape[1], -1), r], -1)


def distribution(out: Tensor, floor: float) -> Tensor:
    """(μ, a) -> [μ, f + (1 − f) softplus(a)]: (B, W, 2) -> (B, 2W)."""
    mean, a = out.unbind(-1)
    return torch.cat([mean, floor + (1 - floor) * softplus(a)], 1)
