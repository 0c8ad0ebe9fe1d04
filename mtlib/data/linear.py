"""Linear-regression tasks, on which every objective of this package has a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Episode, Learner, Params, Stream, expect
from mtlib.tasks import above_zero, check_seed, check_tensor, positive, whole, within


class LinearTasks(NamedTuple):
    """Task t has the population loss ½ (w − w_t)ᵀ Σ_t (w − w_t)."""

    weights: Tensor  # (T, D) the w_t
    covariances: Tensor  # (T, D, D) the Σ_t


def linear_tasks(tasks: int = 20, dims: int = 5, seed: int = 0, alike: bool = False) -> LinearTasks:
    """Tasks whose optimum w_t depends on their covariance Σ_t (float64); `alike` gives all tasks the same Σ.

    Σ_t = Q_t diag(s) Q_tᵀ with s ~ U(0.2, 2); w_t = Σ_t 1 + ε_t, ε_t ~ N(0, I).
    """
    positive(tasks=tasks, dims=dims)
    check_seed(seed)
    rng = np.random.default_rng([seed, 41])
    q, _ = np.linalg.qr(rng.normal(size=(tasks, dims, dims)))
    s = rng.uniform(0.2, 2.0, (tasks, dims))
    if alike:
        q, s = q[:1].repeat(tasks, 0), s[:1].repeat(tasks, 0)
    sigma = q @ (s[:, :, None] * q.transpose(0, 2, 1))
    w = rng.normal(size=(tasks, dims)) + np.einsum("tij,tj->ti", sigma, np.ones((tasks, dims)))
    return LinearTasks(torch.from_numpy(w), torch.from_numpy(sigma))


def exact_stream(tasks: LinearTasks) -> Stream:
    """Episodes whose mean squared error over D rows is exactly the population loss: X = √D Σ_t^½, y = X w_t.

    ½ · mean((X w − y)²) = ½ (w − w_t)ᵀ Σ_t (w − w_t). Support and query are the same rows.
    """
    w, sigma = _checked(tasks)
    if w.ndim != 2 or sigma.shape != (*w.shape, w.shape[-1]):
        raise ValueError(
            f"expected weights (T, D) and covariances (T, D, D), got {tuple(w.shape)} and {tuple(sigma.shape)}"
        )
    values, vectors = torch.linalg.eigh(tasks.covariances)
    if not bool((values >= -1e-9 * values.amax(-1, keepdim=True)).all()):
        raise ValueError(
            f"expected covariances, without negative eigenvalues or NaN; got {values.min().item():.3g} for the smallest"
        )
    root = vectors @ (values.clamp(min=0).sqrt()[:, :, None] * vectors.mT)  # (T, D, D)
    x = root * root.shape[-1] ** 0.5
    batch = Batch(x, x @ tasks.weights[:, :, None])  # (T, D, D), (T, D, 1)

    def stream(step: int) -> Episode:
        return Episode(batch, batch)

    return stream


def resting(
    tasks: LinearTasks, rate: float, steps: int = 1, reptile_steps: int = 5
) -> dict[str, Tensor]:
    """Where methods rest on these tasks: name -> (Σ_t Q_t)⁻¹ Σ_t Q_t w_t.

    The expected gradient of each is Σ_t Q_t (w − w_t), with k inner steps
    of rate α and R = I − αΣ. Points are (D,).
    """
    s, power = _checked(tasks).covariances, torch.linalg.matrix_power
    positive(steps=steps, reptile_steps=reptile_steps)
    within(0, rate=rate)
    eye = torch.eye(s.shape[-1]).to(s)
    r = eye - rate * s
    q = {
        "joint training": s,
        "MAML": power(r, steps) @ s @ power(r, steps),
        "first-order MAML": s @ power(r, steps),
        f"Reptile, {reptile_steps} steps": eye - power(r, reptile_steps),
    }
    w = tasks.weights[..., None]
    sums = {name: (m.sum(0), (m @ w).sum(0)) for name, m in q.items()}
    return {n: torch.linalg.solve(a, b)[:, 0] for n, (a, b) in sums.items()}


def losses_at_rest(
    tasks: LinearTasks, rates: Sequence[float], steps: int, reptile_steps: int = 5
) -> dict[str, Tensor]:
    """What the points of `resting` for one inner step are worth: name -> the mean loss after `steps` steps, at each rate.

    Where w' is w after k steps of rate α, w' − w_t = (I − αΣ_t)ᵏ (w − w_t), and the loss ½ (w' − w_t)ᵀ Σ_t (w' − w_t).
    """
    s = _checked(tasks).covariances
    whole(0, steps=steps)
    eye, found = torch.eye(s.shape[-1]).to(s), list[dict[str, Tensor]]()
    for rate in rates:
        r = torch.linalg.matrix_power(eye - rate * s, steps)
        points = resting(tasks, rate, reptile_steps=reptile_steps)
        d = {name: r @ (w - tasks.weights)[..., None] for name, w in points.items()}
        found.append({name: (0.5 * v.mT @ s @ v).mean() for name, v in d.items()})
    expect(bool(found), "rates, at least one", rates)
    return {name: torch.stack([at[name] for at in found]) for name in found[0]}


def _checked(tasks: LinearTasks) -> LinearTasks:
    if not isinstance(tasks, LinearTasks):
        raise TypeError(f"expected LinearTasks(weights, covariances), got {type(tasks).__name__}")
    return tasks


def samples(
    rows: int,
    dims: int = 10,
    tasks: int = 4,
    noise: float = 0.1,
    spread: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Data for a linear model: y = xᵀ w_t + noise, w_t = w₀ + spread · δ_t. x: (T, rows, dims)."""
    positive(rows=rows, dims=dims, tasks=tasks)
    within(0, noise=noise, spread=spread)
    check_seed(seed)
    rng = np.random.default_rng([seed, 43])
    w = rng.normal(size=(1, dims, 1)) + spread * rng.normal(size=(tasks, dims, 1))
    x = rng.normal(size=(tasks, rows, dims))
    y = x @ w + noise * rng.normal(size=(tasks, rows, 1))
    return Batch(torch.from_numpy(x).float(), torch.from_numpy(y).float())


def planes(
    shots: int = 10,
    queries: int = 20,
    tasks: int = 25,
    seed: int = 0,
    dims: int = 5,
    noise: float = 0.5,
    clean_queries: bool = False,
) -> Stream:
    """Linear regression, each task with weights of its own: y = wᵀx + σ ε, w ~ N(0, I/D), x ~ N(0, I), ε ~ N(0, 1), σ = `noise`.

    So that E[y²] = 1 + σ². `stream(step)` -> Episode, support x: (T, shots, D), y: (T, shots, 1), query alike; with
    `clean_queries` the noise falls on the support alone, and on the same places as without.
    Raises ValueError for a negative noise, and for numbers below 1. {cite}`garg2022incontext`
    """
    positive(shots=shots, queries=queries, tasks=tasks, dims=dims)
    check_seed(seed)
    within(0, noise=noise)

    def stream(step: int) -> Episode:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        w = torch.randn(tasks, dims, 1, generator=g) / dims**0.5
        x = torch.randn(tasks, shots + queries, dims, generator=g)
        off = noise * torch.randn(tasks, shots + queries, 1, generator=g)
        off[:, shots:] *= not clean_queries
        y = x @ w + off
        return Episode(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))

    return stream


def best_plane(noise: float = 0.5) -> Learner:
    """The exact posterior mean of `planes`: ridge regression with the true prior.

    E[w | S] = (XᵀX + σ² D I)⁻¹ Xᵀy, σ = `noise`: no learner has a lower expected squared error there. There is nothing to
    train: φ is empty; θ["weight"] is (D, 1). `predict`: x (B, D) -> (B, 1). Raises ValueError unless `noise` is above 0.
    """
    above_zero(noise=noise)

    def adapt(phi: Params, support: Batch) -> Params:
        x, y = support
        dims = x.shape[-1]
        a = x.mT @ x + noise**2 * dims * torch.eye(dims).to(x)
        return {**phi, "weight": torch.linalg.solve(a, x.mT @ y)}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return x @ theta["weight"]

    return Learner(dict, adapt, predict)


# What tasks share -----------------------------------------------------------------------------


def directions(dims: int, k: int, seed: int = 0) -> Tensor:
    """k orthonormal directions in `dims` dimensions, uniformly drawn: (D, k), float64."""
    positive(dims=dims, k=k)
    check_seed(seed)
    if k > dims:
        raise ValueError(f"expected at most {dims} directions in so many dimensions, got k={k}")
    g = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(dims, k, dtype=torch.float64, generator=g))[0]
    return basis


def spanned(
    b: Tensor, tasks: int, rows: int, noise: float = 0.0, seed: int = 0, even: bool = False
) -> tuple[Batch, Tensor]:
    """Tasks whose weights lie in the span of b (D, k): y = xᵀ B a_t + σ ε, a_t ~ N(0, I), x ~ N(0, I), ε ~ N(0, 1).

    Gives the rows, x: (T, rows, D) and y: (T, rows, 1), and the weights B a_t: (T, D, 1). `even`: the a_t cover their k
    directions exactly evenly, Σ_t a_t a_tᵀ = T·I; that needs T ≥ k. The world of {cite:t}`tripuraneni2021provable`.
    """
    positive(tasks=tasks, rows=rows)
    within(0, noise=noise)
    check_seed(seed)
    check_tensor(b, "b")
    if b.ndim != 2:
        raise ValueError(f"expected directions (D, k), got {tuple(b.shape)}")
    if even and tasks < b.shape[1]:
        raise ValueError(f"expected at least {b.shape[1]} tasks to cover as many directions evenly")
    normal = _normal(seed, b)
    a = normal(tasks, b.shape[1])
    if even:
        a = tasks**0.5 * torch.linalg.qr(a)[0]
    w, x = b @ a[..., None], normal(tasks, rows, len(b))
    return Batch(x, x @ w + noise * normal(tasks, rows, 1)), w


def around(
    centre: Tensor,
    tasks: int,
    rows: int,
    noise: float = 0.0,
    bend: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Tasks whose weights lie around a point (D, 1): y = f(xᵀ w_t) + σ ε, w_t ~ N(centre, I/D), ε ~ N(0, 1).

    f(v) = tanh(`bend` · v), or v where `bend` is 0: then a linear model is right. x ~ N(0, I). x: (T, rows, D),
    y: (T, rows, 1). A world for {cite:t}`bai2021how`.
    """
    positive(tasks=tasks, rows=rows)
    within(0, noise=noise, bend=bend)
    check_tensor(centre, "centre")
    if centre.ndim != 2 or centre.shape[1] != 1:
        raise ValueError(f"expected a centre (D, 1), got {tuple(centre.shape)}")
    check_seed(seed)
    normal = _normal(seed, centre)
    dims = len(centre)
    w = centre + normal(tasks, dims, 1) / dims**0.5
    x = normal(tasks, rows, dims)
    v = x @ w
    return Batch(x, (torch.tanh(bend * v) if bend else v) + noise * normal(tasks, rows, 1))


def _normal(seed: int, like: Tensor) -> Callable[..., Tensor]:
    """Draws of ε ~ N(0, 1), one after the other: shape -> numbers, drawn on the CPU, where `like` is and in its dtype."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=like.dtype, generator=g).to(like)


def error_after(x: Tensor, gap: Tensor, noise: float, lr: float, steps: int) -> float:
    """E‖θ_k − w‖² after k gradient steps on (1/2n)‖Xw − y‖² from φ, with w − φ = −gap and labels of noise σ.

    Σ_i (1 − αs_i)^{2k} b_i² + Σ_{s_i > 0} (1 − (1 − αs_i)^k)² σ²/(n s_i): s_i are the eigenvalues of XᵀX/n, b_i the gap
    along their eigenvectors. x: (n, D), gap: (D,). {cite}`ali2019continuous`
    """
    within(0, noise=noise, lr=lr)
    whole(steps=steps)
    if x.ndim != 2 or gap.shape != x.shape[1:]:
        raise ValueError(
            f"expected x (n, D) and a gap (D,), got {tuple(x.shape)}, {tuple(gap.shape)}"
        )
    s, v = torch.linalg.eigh(x.mT @ x / len(x))
    s = s.clamp(min=0)
    b, keep, seen = v.mT @ gap, (1 - lr * s) ** steps, s > 1e-10
    learned = ((1 - keep[seen]) ** 2 * noise**2 / (len(x) * s[seen])).sum()
    return float((keep**2 * b**2).sum() + learned)
