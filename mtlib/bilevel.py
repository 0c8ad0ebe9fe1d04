"""Pillar I, meta-learning: the bi-level objective, and the ways to differentiate it.

What is solved (the learner) stands apart from how it is differentiated (the hypergradient), so MAML,
FOMAML, Reptile and iMAML are one learner under four hypergradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtlib.core import (
    Batch,
    Episode,
    Learner,
    Loss,
    Params,
    Point,
    Steps,
    expect,
    fixed,
    move,
    risk,
    take,
)
from mtlib.objective import AllAtOnce, Batched, InLoop, Objective, Task, in_chunks, over_tasks
from mtlib.run.fast import twice_differentiable
from mtlib.run.replay import replay
from mtlib.run.unroll import AtOnce
from mtlib.tasks import above_zero, check_draw, positive, whole

Hypergradient = Callable[[Learner, Loss], Task]
"""Turns a learner into `task(phi, episode)`: a scalar with value L^Q(adapt(φ, S)) and the gradient it claims.

A task that only a loop can run says so: `InLoop(task)` (`mtlib.objective`).
"""

Solver = Callable[[Callable[[Params], Params], Params, int], Params]
"""`solver(matrix, b, iterations)` -> x with matrix(x) ≈ b."""


def bilevel(
    learner: Learner,
    loss: Loss,
    hypergradient: Hypergradient | None = None,
    chunk: int | None = None,
    compile: bool = False,
) -> Objective:
    """min_φ (1/T) Σ_i L_i^Q( adapt(φ, S_i) ): choose φ so that what it adapts to does well on new data.

    `hypergradient` is `unrolled` by default; `chunk` is how many tasks run as one program, `compile` makes it
    one of `torch.compile` (`mtlib.objective.over_tasks`). The data are episodes with a leading axis T.
    Without a `chunk`, `unrolled` and `first_order` of plain descent in a row of linear layers are one function in C on a CPU
    with a C compiler, `compile` or not (`mtlib.run.unroll`).
    `cross_entropy(weight=...)` divides a sum over one-hot rows by their number N, not by the sum of their weights
    (torch's rule).

    ```pycon
    >>> from mtlib.data.sinusoids import sinusoids
    >>> from mtlib.learners.gradient import maml
    >>> from mtlib.nets import mlp
    >>> mse = torch.nn.functional.mse_loss
    >>> learner = maml(mlp(1, (8,), 1, seed=0), mse, lr=0.01, steps=5)
    >>> value, gradient = bilevel(learner, mse).value_and_grad(learner.init(), sinusoids(seed=0)(0))
    >>> gradient.keys() == learner.init().keys()
    True

    ```
    """
    check(learner, loss)
    way: Any = unrolled if hypergradient is None else hypergradient
    expect(
        callable(way) and way is not implicit,
        "a hypergradient such as first_order, or implicit(strength)",
        way,
    )
    found: Any = way(learner, loss)
    at_once, task = (found.at_once, found.task) if isinstance(found, AllAtOnce) else (None, found)

    def checked(phi: Params, episode: Episode) -> Tensor:
        if not isinstance(episode, Episode):
            raise TypeError(
                f"bilevel expects episodes (support, query), got {type(episode).__name__}; "
                "a stream of batches goes with `joint`"
            )
        expect(
            episode.query.y.ndim > 1,
            "episodes with an axis of tasks, y (T, Q, W), one-hot rows of classes: `mtlib.tasks.one_hot(y, ways)`",
            episode.query.y,
        )
        value: Tensor = task(phi, episode)
        return value

    vmap = learner.vmap and not isinstance(task, InLoop)
    right: Any = AllAtOnce(checked, at_once) if at_once else checked
    return over_tasks(right, chunk=chunk, vmap=vmap, compile=compile, net=learner.net)


def check(learner: Learner, loss: Loss) -> None:
    """Raise ValueError unless these are a learner and a loss."""
    expect(isinstance(learner, Learner), "a learner, such as maml(net, loss, lr, steps)", learner)
    made = callable(loss) and not isinstance(loss, type)
    expect(made, "a loss, a function such as nn.functional.mse_loss", loss)


def unrolled(learner: Learner, loss: Loss) -> AllAtOnce:
    """The exact gradient of L^Q(θ_k(φ)), through every inner step.

    dL^Q/dφ = (I − αH_0) ⋯ (I − αH_{k−1}) ∇L^Q(θ_k),  H_j = ∇²L^S(θ_j). {cite}`finn2017maml`
    """
    check(learner, loss)

    def task(phi: Params, episode: Episode) -> Tensor:
        return at(learner, loss, learner.adapt(phi, episode.support), episode.query)

    return AllAtOnce(task, AtOnce(learner, loss, second=True))


def multi_step(weights: Sequence[float]) -> Hypergradient:
    """MAML++'s loss: the query loss after every inner step counts, Σ_j w_j L^Q(θ_j) for j = 1 … K.

    (0, …, 0, 1) is `unrolled`, at the same cost. Raises ValueError if the learner takes another number of inner steps, or
    unless the weights are finite, at least 0 and not all 0. {cite}`antoniou2019how`
    """
    expect(isinstance(weights, Sequence | Tensor), "weights, a list of numbers", weights)
    w = torch.as_tensor(weights)
    right = bool((w.isfinite() & (w >= 0)).all()) and (bool(w.any()) or not len(w))
    expect(right, "weights that are finite, at least 0 and not all 0", list(weights))

    def hypergradient(learner: Learner, loss: Loss) -> Task:
        adapt = _in_steps(learner, "multi_step")
        if adapt.steps != len(weights) or not weights:
            raise ValueError(
                f"multi_step got {len(weights)} weights, and expects one for each inner step; "
                f"this learner takes {adapt.steps}"
            )

        def task(phi: Params, episode: Episode) -> Tensor:
            _, *path = adapt.path(phi, episode.support)
            points = [(w, theta) for w, theta in zip(weights, path, strict=True) if w]
            return sum(w * at(learner, loss, theta, episode.query) for w, theta in points)  # type: ignore[return-value]

        return task

    return hypergradient


def annealed(steps: int, progress: float) -> list[float]:
    """Weights for `multi_step`: all steps alike at `progress` 0, the last alone from 1 on.

    w_j = (1 − p)/K + p [j = K], p = min(progress, 1). Train in a few phases of growing p. Raises ValueError unless `steps`
    is a whole number of at least 1 and `progress` ≥ 0.
    """
    positive(steps=steps)
    expect(progress >= 0, "progress of at least 0", progress)
    p = min(progress, 1.0)
    return [(1 - p) / steps + p * (j == steps) for j in range(1, steps + 1)]


def first_order(learner: Learner, loss: Loss) -> AllAtOnce:
    """FOMAML: the inner steps count as constants, dL^Q/dφ ≈ ∇L^Q(θ_k); no graph of them is kept.

    For learners whose θ has φ's entries, and none that only the inner steps read, such as learned rates; raises
    ValueError for others. {cite}`finn2017maml,nichol2018reptile`
    """
    check(learner, loss)
    _without_settings(learner, "first_order")

    def task(phi: Params, episode: Episode) -> Tensor:
        theta = _adapted(learner, phi, episode, "first_order")
        return at(
            learner, loss, {k: phi[k] + (theta[k] - phi[k]).detach() for k in theta}, episode.query
        )

    return AllAtOnce(task, AtOnce(learner, loss, second=False))


def checkpointed(learner: Learner, loss: Loss) -> InLoop:
    """The gradient of `unrolled`, exactly, from the points θ_j alone: each step is recomputed in the backward pass.

    λ_K = ∇L^Q(θ_K),  λ_j = λ_{j+1} ∂θ_{j+1}/∂θ_j,  dL^Q/dφ = λ_0 ∂θ_0/∂φ + Σ_j λ_{j+1} ∂θ_{j+1}/∂φ. Memory is that of one
    step and of K sets of parameters, where `unrolled` keeps the graphs of K steps; time is half as much again. Tasks
    run in a loop. Raises ValueError if the learner has no inner steps. {cite}`chen2016sublinear`
    """

    check(learner, loss)
    adapt = _in_steps(learner, "checkpointed")

    def task(phi: Params, episode: Episode) -> Tensor:
        support = episode.support
        phi = adapt.given(phi, support)
        point = adapt.begin(phi, support)
        for j in range(adapt.steps):
            point = replay(partial(_step, adapt, support, j), (phi, point))
        return at(learner, loss, adapt.theta(phi, point), episode.query)

    return InLoop(task)


def _step(adapt: Steps, support: Batch, j: int, at: tuple[Params, Point]) -> Point:
    phi, point = at
    return adapt.step(phi, support, j, point)


def _in_steps(learner: Learner, who: str) -> Steps:
    """The learner's `adapt`, or ValueError if it has no inner steps."""
    expect(isinstance(learner, Learner), "a learner, such as maml(net, loss, lr, steps)", learner)
    if not isinstance(learner.adapt, Steps):
        raise ValueError(
            f"{who} expects a learner with inner steps, e.g. maml: an `adapt` that is a `Steps`; "
            f"got {type(learner.adapt).__name__}. Use unrolled."
        )
    return learner.adapt


def secant(learner: Learner, loss: Loss) -> Task:
    """Reptile: the way the learner went, φ − θ_k, stands in for a gradient. {cite}`nichol2018reptile`

    It uses the support set alone; the query set only reports the value. With one inner step of rate α it
    is α∇L^S(φ), joint training. Raises ValueError for the learners that `first_order` refuses.
    """
    check(learner, loss)
    _without_settings(learner, "secant")

    def task(phi: Params, episode: Episode) -> Tensor:
        theta, still = _adapted(learner, phi, episode, "secant"), fixed(learner.net)
        value = at(learner, loss, theta, episode.query)
        moved = [k for k in theta if k not in still and theta[k] is not phi[k]]
        return _with_gradient(value, phi, {k: phi[k] - theta[k] for k in moved})

    return task


def implicit(strength: float, iterations: int = 5, solver: Solver | None = None) -> Hypergradient:
    """iMAML: differentiate the inner problem's solution, not the way to it.

    θ* = argmin L^S(θ) + ½λ‖θ − φ‖²  ⇒  dL^Q/dφ = (I + ∇²L^S(θ*)/λ)⁻¹ ∇L^Q(θ*), by `iterations` steps of the
    `solver`: `conjugate_gradient` by default, or `neumann`. λ = `strength`, the one the learner descends
    with: maml(..., strength=λ). Exact where the learner has reached θ*, and it moves every entry of φ that may move.
    {cite}`rajeswaran2019imaml`
    """
    above_zero(strength=strength)
    positive(iterations=iterations)

    def hypergradient(learner: Learner, loss: Loss) -> Task:
        def task(phi: Params, episode: Episode) -> Tensor:
            theta, still = _adapted(learner, phi, episode, "implicit"), fixed(learner.net)
            moved = {k: v for k, v in theta.items() if k not in still}
            if unmoved := [k for k in moved if theta[k] is phi[k]]:
                raise ValueError(
                    "implicit expects a learner that moves every entry of φ but the frozen ones and buffers; "
                    f"{unmoved[:3]} stay"
                )
            outer, value = torch.func.grad_and_value(
                lambda th: at(learner, loss, {**theta, **th}, episode.query)
            )(moved)
            inner = torch.func.grad(lambda th: at(learner, loss, {**theta, **th}, episode.support))
            with twice_differentiable():
                hvp = torch.func.vjp(inner, moved)[1]  # v -> ∇²L^S(θ*) v

            def matrix(v: Params) -> Params:
                hv = hvp(v)[0]
                return {k: v[k] + hv[k] / strength for k in v}

            return _with_gradient(
                value, phi, (solver or conjugate_gradient)(matrix, outer, iterations)
            )

        return task

    return hypergradient


def sharpness(learner: Learner, phi: Params, draw: Episode, iterations: int = 20) -> Tensor:
    """The inner rate times the largest curvature, α_j λ_j, at each inner step of each task of a draw: (T, K).

    λ_j is the eigenvalue of H_j = ∇²L(θ_j) that is largest by size, for the loss that the steps go down and the entries
    that move. Along its direction a step multiplies an error, and the chain rule the meta-gradient, by 1 − α_j λ_j: above 1
    a step overshoots, above 2 it ends farther off than it began. Where entries have rates of their own α_j is a diagonal
    matrix, and the eigenvalue that of α_j H_j. Momentum and other rules do not count.

    By so many `iterations` of power iteration from one random direction; their error is to the lower side.

    ```pycon
    >>> from mtlib.data.sinusoids import sinusoids
    >>> from mtlib.learners.gradient import maml
    >>> from mtlib.nets import mlp
    >>> learner = maml(mlp(1, (40, 40), 1, seed=0), torch.nn.functional.mse_loss, lr=0.1, steps=1)
    >>> found = sharpness(learner, learner.init(), sinusoids(seed=0)(0))
    >>> found.shape, bool(found.median() > 2)  # at this rate the steps diverge
    (torch.Size([25, 1]), True)

    ```

    Raises ValueError where the learner has no inner steps down a loss.
    """
    adapt = _in_steps(learner, "sharpness")
    descent = adapt.descent
    if descent is None:
        raise ValueError("sharpness expects a learner whose inner steps go down a loss, e.g. maml")
    expect(isinstance(draw, Episode), "a draw of episodes, stream(0)", draw)
    check_draw(draw)
    positive(iterations=iterations)
    draw = move(draw, next(iter(phi.values())).device)
    first = take(draw.support, 0)
    start, _ = adapt.begin(adapt.given(phi, first), first)
    g = torch.Generator().manual_seed(0)
    far = {k: torch.randn(v.shape, generator=g).to(v) for k, v in start.items()}

    def task(phi: Params, episode: Episode) -> Tensor:
        support, found = episode.support, list[Tensor]()
        phi = adapt.given(phi, support)
        loss, rate = descent(phi, support)
        point = adapt.begin(phi, support)
        for j in range(adapt.steps):
            a = rate(j) if callable(rate) else rate
            found.append(_largest(loss, point[0], a, far, iterations))
            point = adapt.step(phi, support, j, point)
        return torch.stack(found) if found else next(iter(start.values())).new_zeros(0)

    def part(tasks: slice) -> Tensor:
        return run(phi, take(draw, tasks))

    run = Batched(task, learner.vmap)
    with torch.no_grad():
        return in_chunks(part, lambda parts: torch.cat(list(parts)), phi, draw, None, run.share)


def _largest(
    loss: Callable[[Params], Tensor], theta: Params, rate: Any, v: Params, iterations: int
) -> Tensor:
    """The eigenvalue of diag(α) ∇²L(θ) that is largest by size, by power iteration from v."""
    rates = rate if isinstance(rate, dict) else dict.fromkeys(theta, rate)
    with twice_differentiable():
        product = torch.func.vjp(torch.func.grad(loss), theta)[1]
        for _ in range(iterations):
            size = _dot(v, v).sqrt()
            v = {k: _ratio(x, size) for k, x in v.items()}
            hv = product(v)[0]
            av = {k: rates[k] * hv[k] for k in v}
            value, v = _dot(v, av), av
    return value


def at(learner: Learner, loss: Loss, theta: Params, batch: Batch) -> Tensor:
    """L(θ) on a batch, predicted as the learner predicts."""
    expect(isinstance(learner, Learner), "a learner, such as maml(net, loss, lr, steps)", learner)
    return risk(loss, learner.predict(theta, batch.x), batch.y)


def conjugate_gradient(matrix: Callable[[Params], Params], b: Params, iterations: int) -> Params:
    """Solve `matrix`(x) = b for a symmetric positive definite map on dicts of tensors, from x = 0.

    Raises ValueError unless `iterations` ≥ 1.
    """
    expect(callable(matrix), "matrix, a function x -> Ax of dicts of tensors", matrix)
    positive(iterations=iterations)
    x = {k: torch.zeros_like(v) for k, v in b.items()}
    r, p = b, b
    rr = _dot(r, r)
    for _ in range(iterations):
        ap = matrix(p)
        alpha = _ratio(rr, _dot(p, ap))
        x = {k: x[k] + alpha * p[k] for k in x}
        r = {k: r[k] - alpha * ap[k] for k in r}
        rr, before = _dot(r, r), rr
        beta = _ratio(rr, before)
        p = {k: r[k] + beta * p[k] for k in p}
    return x


def neumann(
    matrix: Callable[[Params], Params], b: Params, iterations: int, rate: float = 1.0
) -> Params:
    """Solve `matrix`(x) = b by Neumann's series, x = α Σ_{j ≤ n} (I − αA)ʲ b, with α = `rate`, n = `iterations`.

    It converges where every |1 − αa| < 1 for the eigenvalues a of A: for `implicit` with α = 1, where
    ‖∇²L^S‖ < λ. Smaller rates converge for every positive A: `partial(neumann, rate=0.1)`.
    {cite}`lorraine2020optimizing`
    Raises ValueError unless α > 0 and n ≥ 0.
    """
    expect(callable(matrix), "matrix, a function x -> Ax of dicts of tensors", matrix)
    whole(0, iterations=iterations)
    above_zero(rate=rate)
    x = {k: rate * v for k, v in b.items()}
    for _ in range(iterations):
        ax = matrix(x)
        x = {k: x[k] + rate * (b[k] - ax[k]) for k in x}
    return x


def _without_settings(learner: Learner, who: str) -> None:
    if learner.settings:
        raise ValueError(
            f"{who} expects a learner without entries of φ that only the inner steps read; here "
            f"{list(learner.settings)[:3]} would never be trained. Use unrolled; if the learner takes a rule, rule=constant "
            "leaves out the second derivatives."
        )


def _adapted(learner: Learner, phi: Params, episode: Episode, who: str) -> Params:
    """θ as a constant: adapted from a detached φ, so that no graph of the inner steps is kept."""
    start = {k: v.detach() for k, v in phi.items()}
    with torch.no_grad():
        theta = learner.adapt(start, episode.support)
    extra = [k for k in theta if k not in phi]
    if extra:
        raise ValueError(
            f"{who} expects a learner whose θ has the entries of φ; this one adds {extra[:3]}. Use unrolled."
        )
    return {k: phi[k] if k in start and v is start[k] else v.detach() for k, v in theta.items()}


def _with_gradient(value: Tensor, phi: Params, g: Params) -> Tensor:
    """A scalar equal to `value`, whose gradient with respect to φ is g."""
    return value.detach() + sum(((phi[k] - phi[k].detach()) * g[k].detach()).sum() for k in g)


def _dot(a: Params, b: Params) -> Tensor:
    return sum((a[k] * b[k]).sum() for k in a)  # type: ignore[return-value]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: the solution has been reached."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
