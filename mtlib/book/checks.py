"""Derivatives in full, for pages that check an equation: matrices and differences, which only small networks allow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtlib.core import Batch, Draw, Episode, Params, expect
from mtlib.learners.hyper import flat, unflat


def gradient(loss: Callable[[Params], Tensor], theta: Params) -> Tensor:
    """∇L(θ) as one vector: (P,)."""
    expect(callable(loss), "a loss, a function of theta", loss)
    return flat(torch.func.grad(loss)(theta))


def hessian(loss: Callable[[Params], Tensor], theta: Params) -> Tensor:
    """∇²L(θ) as a matrix (P, P), entries in the order of `flat(theta)`."""
    expect(callable(loss), "a loss, a function of theta", loss)

    def slope(v: Tensor) -> Tensor:
        return gradient(loss, unflat(v, theta))

    found: Tensor = torch.func.jacrev(slope)(flat(theta))
    return found


def gradients(task: Callable[[Params, Draw], Tensor], phi: Params, draw: Draw) -> Tensor:
    """Each task's own gradient with respect to φ, one a row: (T, P). `task` is what a hypergradient makes.

    ```pycon
    >>> from mtlib.bilevel import first_order
    >>> from mtlib.data.sinusoids import sinusoids
    >>> from mtlib.learners.gradient import maml
    >>> from mtlib.nets import mlp
    >>> mse = torch.nn.functional.mse_loss
    >>> learner = maml(mlp(1, (4,), 1, seed=0), mse, lr=0.01, steps=1)
    >>> gradients(first_order(learner, mse), learner.init(), sinusoids(tasks=3)(0)).shape
    torch.Size([3, 13])

    ```
    """
    expect(callable(task), "a task(phi, episode), such as first_order(learner, loss)", task)
    expect(isinstance(draw, Episode | Batch), "a draw of tasks, stream(0)", draw)
    rows: Params = torch.vmap(torch.func.grad(task), (None, 0))(phi, draw)
    return torch.cat([v.flatten(1) for v in rows.values()], 1)


def differences(value: Callable[[Params], Tensor], theta: Params, h: float = 1e-5) -> Tensor:
    """Central differences of a function of θ, one entry at a time: (P,). They know of no derivation."""
    expect(callable(value), "a function of theta", value)
    expect(h > 0, "a step h above 0", h)
    v = flat(theta)
    expect(v.dtype == torch.float64, "theta in float64, whose digits a difference needs", v.dtype)
    step = h * torch.eye(len(v), dtype=v.dtype, device=v.device)
    at = torch.vmap(lambda v: value(unflat(v, theta)))
    found: Tensor = (at(v + step) - at(v - step)) / (2 * h)
    return found


def error_and_cosine(found: Tensor, exact: Tensor) -> Tensor:
    """‖a − b‖/‖b‖ and cos(a, b) of the rows of two matrices (T, P): how long, and where to, a gradient is wrong. (2, T)."""
    tensors = isinstance(found, Tensor) and isinstance(exact, Tensor)
    expect(tensors, "two matrices (T, P)", found)
    expect(found.shape == exact.shape, f"two matrices of one shape {tuple(exact.shape)}", found)
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    return torch.stack([error, torch.cosine_similarity(found, exact, dim=-1)])
