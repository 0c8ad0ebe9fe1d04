"""Sinusoid regression, the first experiment of the MAML paper {cite}`finn2017maml`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Episode, Learner, Params, Stream
from mtlib.tasks import above_zero, check_seed, positive, whole, within

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
RANGE = (-5.0, 5.0)


def sinusoids(
    shots: int = 10,
    queries: int = 10,
    tasks: int = 25,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    frequency: float = 1.0,
) -> Stream:
    """Tasks y = A sin(ωx − φ), A ~ U(0.1, 5), φ ~ U(0, π), x ~ U(−5, 5); no noise. The paper's ω = `frequency` is 1.

    `stream(step)` -> Episode, support x and y: (T, shots, 1), query: (T, queries, 1).
    """
    positive(shots=shots, queries=queries, tasks=tasks)
    above_zero(frequency=frequency)
    check_seed(seed)
    if not dtype.is_floating_point:
        raise ValueError(
            f"expected a floating-point dtype, got {dtype}: the curves lie between whole numbers"
        )

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        a, phase = rng.uniform(*AMPLITUDE, (tasks, 1, 1)), rng.uniform(*PHASE, (tasks, 1, 1))
        x = rng.uniform(*RANGE, (tasks, shots + queries, 1))
        all_x, all_y = (
            torch.from_numpy(v).to(dtype) for v in (x, a * np.sin(frequency * x - phase))
        )
        support, query = slice(shots), slice(shots, None)
        return Episode(
            Batch(all_x[:, support], all_y[:, support]), Batch(all_x[:, query], all_y[:, query])
        )

    return stream


def noisy_sinusoids(
    shots: int = 10,
    queries: int = 20,
    tasks: int = 25,
    seed: int = 0,
    noise: float = 0.3,
    clean_queries: bool = False,
    frequency: float = 1.0,
) -> Stream:
    """The curves of `sinusoids` with noise on every y: y = A sin(ωx − φ) + σ ε, ε ~ N(0, 1), σ = `noise`, ω = `frequency`.

    `stream(step)` -> Episode, support x and y: (T, shots, 1), query: (T, queries, 1). The noise follows (`seed`, step),
    too. With `clean_queries` it falls on the support set alone, and a query's error is the distance from the curve.
    Raises ValueError as `sinusoids`, and where `noise` is negative.
    """
    within(0, noise=noise)
    clean = sinusoids(shots, queries, tasks, seed, frequency=frequency)

    def stream(step: int) -> Episode:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        (x, y), (xq, yq) = clean(step)
        support = Batch(x, y + noise * torch.randn(y.shape, generator=g))
        beside = 0.0 if clean_queries else noise
        return Episode(support, Batch(xq, yq + beside * torch.randn(yq.shape, generator=g)))

    return stream


def named_sinusoids(
    curves: int = 20,
    shots: int = 10,
    queries: int = 10,
    tasks: int = 25,
    seed: int = 0,
    name: int = 4,
    world: int = 0,
) -> Stream:
    """A fixed set of curves, each with a random name of `name` numbers that stands beside every x of it.

    y = A_t sin(x − φ_t), t ~ U{1, …, `curves`}; the item is [x, c_t], c_t ~ N(0, I). Curves and names follow `world`,
    which are drawn follows `seed`. The name tells which curve it is, and nothing about a curve of another world: a learner
    can know its curves by heart {cite}`yin2020memorization`. With name=0 the item is x alone.

    `stream(step)` -> Episode, support x: (T, shots, 1 + `name`), y: (T, shots, 1), and so the query.
    """
    positive(curves=curves, shots=shots, queries=queries, tasks=tasks)
    whole(name=name)
    check_seed(seed)
    check_seed(world)
    rng = np.random.default_rng([world, 47])
    a, phase = rng.uniform(*AMPLITUDE, (curves, 1, 1)), rng.uniform(*PHASE, (curves, 1, 1))
    names = rng.normal(size=(curves, 1, name))

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step, 47])
        t = rng.integers(curves, size=tasks)
        at = rng.uniform(*RANGE, (tasks, shots + queries, 1))
        y = torch.from_numpy(a[t] * np.sin(at - phase[t])).float()
        beside = np.broadcast_to(names[t], (tasks, shots + queries, name))
        x = torch.from_numpy(np.concatenate([at, beside], 2)).float()
        return Episode(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))

    return stream


def side_by_side(curves: int = 400, points: int = 2, seed: int = 0, noise: float = 0.3) -> Stream:
    """A fixed set of noisy curves, all of them measured at the same new places in each step: pre-training on known tasks.

    y_t = A_t sin(x − φ_t) + σ ε, one target for each curve t, so that a network with `curves` outputs learns all of them
    on one body. `stream(step)` -> Batch, x: (1, points, 1), y: (1, points, curves). Raises ValueError as
    `noisy_sinusoids`.
    """
    positive(curves=curves, points=points)
    check_seed(seed)
    within(0, noise=noise)
    world = torch.Generator().manual_seed(seed)
    a, phase = torch.rand(2, curves, generator=world)
    a = AMPLITUDE[0] + (AMPLITUDE[1] - AMPLITUDE[0]) * a
    phase = PHASE[0] + (PHASE[1] - PHASE[0]) * phase

    def stream(step: int) -> Batch:
        g = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        x = RANGE[0] + (RANGE[1] - RANGE[0]) * torch.rand(1, points, 1, generator=g)
        y = a * torch.sin(x - phase)
        return Batch(x, y + noise * torch.randn(y.shape, generator=g))

    return stream


def varied_sinusoids(
    shots: int = 20,
    queries: int = 20,
    tasks: int = 25,
    seed: int = 0,
    noise: float = 0.3,
    clean_queries: bool = False,
    few: int | None = None,
) -> Stream:
    """`noisy_sinusoids` with n support points, n ~ U{1, …, `shots`}, one n for all curves of a step.

    With `few`, every second step, from the second on, has n ~ U{1, …, `few`}. `stream(step)` -> Episode, support x and y:
    (T, n, 1), query: (T, queries, 1). Raises ValueError as `noisy_sinusoids`, and where `few` is not from 1 to `shots`.
    """
    positive(shots=shots, few=shots if few is None else few)
    if few is not None and few > shots:
        raise ValueError(f"expected few of at most shots = {shots} points, got {few}")
    each = [
        noisy_sinusoids(n, queries, tasks, seed, noise, clean_queries) for n in range(1, shots + 1)
    ]

    def stream(step: int) -> Episode | Batch:
        most = few if few is not None and step % 2 else shots
        n = int(np.random.default_rng([seed, step]).integers(1, most + 1))
        return each[n - 1](step)

    return stream


def waves(x: Tensor) -> Tensor:
    """[sin x, −cos x], x (N, 1) -> (N, 2): A sin(x − φ) is waves(x) · (u, v), (u, v) = A (cos φ, sin φ)."""
    return torch.cat([torch.sin(x), -torch.cos(x)], 1)


def best_possible(noise: float = 0.3, points: int = 100, frequency: float = 1.0) -> Learner:
    """The exact posterior mean of `noisy_sinusoids`: no learner has a lower expected squared error on them.

    A sin(x − φ) = u sin x − v cos x with (u, v) = A (cos φ, sin φ), so the mean of all curves given the support set is

        E[f(x) | S] = E[u | S] sin x − E[v | S] cos x,   p(A, φ | S) ∝ exp(−Σ_n (y_n − A sin(x_n − φ))² / 2σ²),

    σ = `noise`, with A and φ uniform where `sinusoids` draws them; the integrals over both are Gauss–Legendre sums of
    `points` nodes an axis. There is nothing to train: φ is empty. θ["mean"] (2,) is E[(u, v) | S] and θ["square"]
    (2, 2) is E[(u, v)(u, v)ᵀ | S], which gives the posterior's spread. `predict`: x (B, 1) -> (B, 1). With the noise of
    the query the error is about 1.39, .203, .134, .109, .099 at 1, 3, 5, 10, 20 points. With another `frequency` ω, x is
    ωx here, too. Raises ValueError unless `noise` and ω are above 0: without noise, two points nearly always tell the curve.
    """
    above_zero(noise=noise, frequency=frequency)
    positive(points=points)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(points))
    a, phase = (low + (high - low) * (nodes + 1) / 2 for low, high in (AMPLITUDE, PHASE))
    u, v = (a[:, None] * f(phase) for f in (torch.cos, torch.sin))  # (A, φ)
    grid = torch.stack([u, v], -1).reshape(-1, 2)
    log_prior = (weights[:, None] * weights).log().reshape(-1)

    def adapt(phi: Params, support: Batch) -> Params:
        x, y = support
        each, z = grid.to(x), waves(frequency * x)  # (G, 2), (N, 2)
        off = (each @ (z.T @ z) * each).sum(1) - 2 * each @ (z.T @ y)[:, 0]  # Σ (y − f)² − Σ y²
        p = torch.softmax(log_prior.to(x) - off / (2 * noise**2), 0)
        return {**phi, "mean": p @ each, "square": (p[:, None] * each).T @ each}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return waves(frequency * x) @ theta["mean"][:, None]

    return Learner(dict, adapt, predict)


def best_linear(noise: float = 0.3) -> Learner:
    """The best answer to `noisy_sinusoids` that is linear in the support targets: a normal prior with the true moments.

    On waves(x) = [sin x, −cos x] the weights (u, v) = A (cos φ, sin φ) have mean m = E[A] (0, 2/π) and covariance
    C = diag(E[A²]/2, E[A²]/2 − m₂²); u and v are normal here. No ridge or Bayesian head has a lower expected squared
    error, whatever its features. There is nothing to train: φ is empty. `predict`: x (B, 1) -> (B, 1). Raises ValueError
    unless `noise` is above 0.
    """
    above_zero(noise=noise)
    low, high = AMPLITUDE
    power = (low**2 + low * high + high**2) / 6
    centre = (low + high) / math.pi
    variance = torch.tensor([power, power - centre**2])

    def adapt(phi: Params, support: Batch) -> Params:
        z, mean = waves(support.x), support.x.new_tensor([[0.0], [centre]])
        a = z.T @ z + noise**2 * torch.diag(1 / variance).to(z)
        return {**phi, "mean": mean + torch.linalg.solve(a, z.T @ (support.y - z @ mean))}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return waves(x) @ theta["mean"]

    return Learner(dict, adapt, predict)


def joint_optimum(x: Tensor) -> Tensor:
    """E[A sin(x − φ)] = E[A] · E[cos φ sin x − sin φ cos x] = −(2/π) · 2.55 · cos x.

    The best single function for all tasks under squared error; its risk, `risk_of(joint_optimum)`, is about 3.0057.
    """
    return -(2 / math.pi) * (sum(AMPLITUDE) / 2) * torch.cos(x)


def risk_of(f: Callable[[Tensor], Tensor], points: int = 64) -> float:
    """E[(f(x) − A sin(x − φ))²] over tasks and x, by Gauss–Legendre quadrature in all three. f: (n, 1) -> (n, 1)."""
    positive(points=points)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(points))

    def scaled(low: float, high: float) -> Tensor:
        return low + (high - low) * (nodes + 1) / 2

    a, phase, x = scaled(*AMPLITUDE), scaled(*PHASE), scaled(*RANGE)
    w = weights / 2
    ea, ea2 = w @ a, w @ a**2
    with torch.no_grad():
        try:
            y = f(x[:, None].float()).cpu().double()  # (n, 1)
        except RuntimeError as error:
            raise ValueError(
                f"expected f: (n, 1) -> (n, 1), which cannot read x here: {error}"
            ) from error
    if y.shape != (points, 1):
        raise ValueError(f"expected f: (n, 1) -> (n, 1), got {tuple(y.shape)} for n = {points}")
    y = y[:, 0]
    s = torch.sin(x[:, None] - phase)  # (x, φ)
    return float(w @ (y**2 - 2 * y * ea * (s @ w) + ea2 * (s**2 @ w)))
