"""A function whose graph is made when its gradient passes, and not before: time for memory, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states


def replay(f: Callable[[Any], Any], at: Any) -> Any:
    """f(at), for nested dicts and tuples of tensors; only `at` is kept, and f runs again in the backward pass.

    Random numbers that f draws from torch are drawn again. Its gradient has no gradient of its own: a second one
    raises. Under functorch's transforms f runs as it is, and everything is kept. {cite}`chen2016sublinear`
    """
    if torch._C._are_functorch_transforms_active():
        return f(at)
    leaves, shape = tree_flatten(at)
    places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
    others = [None if isinstance(v, Tensor) else v for v in leaves]
    form: list[Any] = []  # of what f gave: what is no tensor there, and its shape

    def g(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(others)
        for i, v in zip(places, tensors, strict=True):
            filled[i] = v
        out, form[:] = _apart(f(tree_unflatten(filled, shape)))
        return out

    made = iter(_Replay.apply(g, *[leaves[i] for i in places]))
    rest, result = form
    return tree_unflatten([next(made) if v is Tensor else v for v in rest], result)


def _apart(tree: Any) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The tensors of a tree, and the rest: its leaves with `Tensor` for each of them, and its shape."""
    leaves, shape = tree_flatten(tree)
    tensors = tuple(v for v in leaves if isinstance(v, Tensor))
    return tensors, [[Tensor if isinstance(v, Tensor) else v for v in leaves], shape]


class _Replay(Function):
    @staticmethod
    def forward(ctx: Any, g: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        ctx.g = g
        ctx.save_for_backward(*tensors)
        ctx.state, ctx.others = torch.get_rng_state(), get_device_states(*tensors)
        return g(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoint: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        devices, states = ctx.others
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            set_device_states(devices, states)
            at = [
                t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needs, strict=True)
            ]
            pairs = [(o, v) for o, v in zip(ctx.g(*at), adjoint, strict=True) if o.requires_grad]
        moved = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [t for t in at if t.requires_grad],
                [v for _, v in pairs],
                allow_unused=True,
            )
        )
        return None, *[next(moved) if n else None for n in needs]
