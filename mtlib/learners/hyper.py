"""Bi-level problems beside meta-learning: what φ holds is a decay, a weight for each example, or the examples themselves.

The support set is the inner problem's training data, the query set the outer problem's validation data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import Batch, Episode, Learner, Loss, Params, Stream, apply, expect, require, risk
from mtlib.learners.gradient import (
    Rate,
    at_least_zero,
    check_descent,
    check_steps,
    descending,
    weights,
)
from mtlib.run.devices import random_kept
from mtlib.tasks import check_rows, check_seed, functions, positive


def weight_decay(net: nn.Module, loss: Loss, lr: float, steps: int, decay: float = 1e-2) -> Learner:
    """Hyper-parameter optimisation: φ is the logarithm of a decay λ_k for each weight matrix.

    θ(φ) ≈ argmin_θ L^S(θ) + ½ Σ_k λ_k ‖θ_k‖²,  λ_k = exp(φ["decay." + k]), by `steps` gradient steps from the
    network's own start, which stays fixed; biases have no decay, each λ_k starts at `decay`.
    {cite}`pedregosa2016hyperparameter,franceschi2018bilevel`
    Diverges where lr · λ_k > 2. Raises ValueError if `decay` ≤ 0, `lr` < 0, or no parameter is a matrix.
    """
    at_least_zero(lr=lr)
    check_descent(loss, lr, steps)
    start, f = _start(net), apply(net)
    decayed = [k for k, v in start.items() if v.ndim > 1]
    if not 0 < decay < float("inf") or not decayed:
        raise ValueError(
            f"expected decay > 0, finite, and a weight matrix, got {decay} and {list(start)}"
        )

    def init() -> Params:
        return {f"decay.{k}": start[k].new_tensor(decay).log() for k in decayed}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, (f"decay.{k}" for k in decayed))
        like = next(iter(phi.values()))
        return {k: v.to(like) for k, v in start.items()}

    def value(phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        def inner(theta: Params) -> Tensor:
            norms = sum(phi[f"decay.{k}"].exp() * (theta[k] ** 2).sum() for k in decayed)
            return risk(loss, f(theta, support.x), support.y) + 0.5 * norms

        return inner

    adapt = descending(begin, value, lambda phi: _rate(net, lr), steps)
    return Learner(init, adapt._replace(alone=True), f)


def reweighted(
    net: nn.Module, loss: Loss, lr: float, steps: int, examples: int, decay: float = 0.0
) -> Learner:
    """Learning to reweight: φ is a weight for each of the `examples` of the support set, row by row.

    θ(φ) ≈ argmin_θ Σ_i w_i ℓ(f_θ(x_i), y_i) + ½λ‖θ‖²,  w = softmax(φ["example.logit"]), λ = `decay`, by `steps`
    gradient steps from the network's own start; all logits start at 0, uniform weights. Data hyper-cleaning learns such
    weights {cite}`franceschi2017forward`; {cite:t}`ren2018reweight` set them anew for each batch, by one step.
    Raises ValueError if the support set has another number of rows, `examples` < 1, or `lr` or `decay` < 0.
    """
    at_least_zero(lr=lr, decay=decay)
    check_descent(loss, lr, steps)
    check_steps(examples, "examples", 1)
    start, f = _start(net), apply(net)

    def init() -> Params:
        return {"example.logit": next(iter(start.values())).new_zeros(examples)}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, ["example.logit"])
        if len(support.y) != examples:
            raise ValueError(
                f"expected {examples} support rows, one per weight; got {len(support.y)}"
            )
        like = next(iter(phi.values()))
        return {k: v.to(like) for k, v in start.items()}

    def value(phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        w = phi["example.logit"].softmax(0)

        def inner(theta: Params) -> Tensor:
            prediction = f(theta, support.x)
            each = torch.vmap(partial(risk, loss))(prediction[:, None], support.y[:, None])  # (N,)
            return w @ each + 0.5 * decay * sum((v**2).sum() for v in theta.values())

        return inner

    adapt = descending(begin, value, lambda phi: _rate(net, lr), steps)
    return Learner(init, adapt._replace(alone=True), f)


def weighted_ridge(groups: Tensor, examples: int, decay: float = 1e-2) -> Learner:
    """An inner problem that is solved exactly: φ is a log decay for each group of inputs, and a weight for each example.

    θ(φ) = argmin Σ_i w_i mse(V x_i + b, y_i) + ½ Σ_j λ_{g(j)} ‖V_j‖²,  w = softmax(φ["example.logit"]) (N,),
    λ = exp(φ["decay.group"]) (K,). `groups` (D,) has the number g(j) < K of each input's group, V_j are the weights of
    input j, N = `examples`. At first all λ_k are `decay`, and the weights are equal. x is (N, D), y (N, W).
    {cite}`pedregosa2016hyperparameter,franceschi2017forward`
    Raises ValueError unless `groups` are whole numbers from 0 on, or for data of other sizes, or `decay` ≤ 0.
    """
    check_steps(examples, "examples", 1)
    whole = isinstance(groups, Tensor) and groups.dtype == torch.long and groups.ndim == 1
    expect(whole and len(groups) > 0 and int(groups.min()) == 0, "groups (D,), 0, 1, …", groups)
    expect(0 < decay < float("inf"), "decay > 0, finite", decay)

    def init() -> Params:
        decays = torch.full((int(groups.max()) + 1,), decay).log()
        return {"decay.group": decays, "example.logit": torch.zeros(examples)}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, ("decay.group", "example.logit"))
        if support.x.shape != (examples, len(groups)):
            raise ValueError(
                f"expected x of {examples} examples and {len(groups)} inputs; got {tuple(support.x.shape)}"
            )
        w = phi["example.logit"].softmax(0)[:, None]
        centre, level = (w * support.x).sum(0), (w * support.y).sum(0)
        x, y = support.x - centre, support.y - level
        half = 2 / y.shape[1] * (w * x).mT  # mse is a mean over the W outputs
        decays = phi["decay.group"].exp()[groups.to(x.device)]
        v = torch.linalg.solve(half @ x + decays.diag(), half @ y)  # (D, W)
        return {"weight": v.mT, "bias": level - centre @ v}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return x @ theta["weight"].mT + theta["bias"]

    return Learner(init, adapt, predict)


def distilled(net: nn.Module, loss: Loss, lr: float, steps: int, seeds: Batch) -> Learner:
    """Data distillation: φ is the training data, as many examples as `seeds` has and starting there.

    θ(φ) = `steps` gradient steps of rate exp(φ["distilled.log_lr"]) on L(θ; φ["distilled.x"], y), y = `seeds.y`. A task is
    a *start* of the network: support.x (1, P) holds θ₀, `flat(params)`, and support.y is not used.
    Raises ValueError if `lr` ≤ 0, as its logarithm is learned. {cite}`wang2018distillation`
    """
    if not isinstance(lr, Real) or not 0 < lr < float("inf"):
        raise ValueError(f"expected lr > 0, finite, whose logarithm is learned, got {lr!r}")
    check_descent(loss, lr, steps)
    expect(isinstance(seeds, Batch), "seeds, a Batch(x, y)", seeds)
    learnable = isinstance(seeds.x, Tensor) and seeds.x.is_floating_point()
    expect(learnable, "seeds whose x is one tensor of real numbers, which are learned", seeds.x)
    sizes, f = _start(net), apply(net)

    def init() -> Params:
        return {"distilled.x": seeds.x.clone(), "distilled.log_lr": seeds.x.new_tensor(lr).log()}

    def begin(phi: Params, support: Batch) -> Params:
        return unflat(support.x[0], sizes)

    def value(phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        x = phi["distilled.x"]
        return lambda theta: risk(loss, f(theta, x), seeds.y.to(x))

    adapt = descending(begin, value, lambda phi: _rate(net, phi["distilled.log_lr"].exp()), steps)
    return Learner(init, adapt._replace(alone=True), f)


def new_networks(
    make: Callable[[], nn.Module], data: Batch, tasks: int, rows: int, seed: int = 0
) -> Stream:
    """A stream for `distilled`: each task is a new network of `make()`, judged on `rows` rows of real data.

    support.x (T, 1, P) has the parameters of T = `tasks` networks, `flat(params)`, and query the rows, drawn without
    replacement for each. Draws follow (`seed`, step); another seed gives other networks.
    """
    expect(not isinstance(make, nn.Module), "make, a function that makes a network", make)
    functions(0, make=make)
    positive(tasks=tasks, rows=rows)
    check_seed(seed)
    check_rows(data, "data")
    if rows > len(data.y):
        raise ValueError(f"expected at most {len(data.y)} rows, as many as data has; got {rows}")

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        with random_kept():
            torch.manual_seed(int(rng.integers(2**31)))
            begin = torch.stack([flat(weights(make()))[None] for _ in range(tasks)])
        picks = [torch.from_numpy(rng.permutation(len(data.y))[:rows]) for _ in range(tasks)]
        query = Batch(*(torch.stack([d[i] for i in picks]) for d in data))
        return Episode(Batch(begin.detach(), torch.zeros(tasks, 1, 1)), query)

    return stream


def flat(params: Params) -> Tensor:
    """All entries, one after the other: (P,)."""
    expect(isinstance(params, dict) and bool(params), "parameters, at least one entry", params)
    return torch.cat([v.reshape(-1) for v in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    """The inverse of `flat`, with the names and shapes of `like`."""
    sizes = [v.numel() for v in like.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(
            f"expected a start of {sum(sizes)} numbers (P,), got {len(vector)}, of shape {tuple(vector.shape)}: another network's?"
        )
    parts = vector.split(sizes)
    return {k: p.reshape(v.shape) for p, (k, v) in zip(parts, like.items(), strict=True)}


def _rate(net: nn.Module, lr: float | Tensor) -> Rate:
    """The rate of each entry: 0 for what is frozen in the network, `lr` for the others."""
    frozen = [not p.requires_grad for p in net.parameters()]
    each = torch.as_tensor(lr)
    rates = {k: each * p.requires_grad for k, p in net.named_parameters()}
    return rates if any(frozen) else lr


def _start(net: nn.Module) -> Params:
    return {k: v.clone() for k, v in weights(net).items()}
