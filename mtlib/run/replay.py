"""A function whose graph is made when its gradient passes, and not before: time for memory, exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtlib.run.copies import evaluating, is_evaluating
from mtlib.run.devices import random_kept, random_states
from mtlib.run.fast import NeedsLoop, transforming, vmapping


def replay(f: Callable[[Any], Any], at: Any) -> Any:
    """f(at), for nested dicts and tuples of tensors; only `at` is kept, f is recomputed in the backward pass.

    Random numbers that f draws from torch are drawn again, and f is in the same mode (`evaluating`, autocast). Its gradient has no gradient of its own: a second one
    raises. Under `vmap` it raises `NeedsLoop`; under functorch's other transforms f runs as it is, and everything is
    kept. {cite}`chen2016sublinear`
    """
    if not callable(f):
        raise TypeError(f"expected a function of `at`, got {type(f).__name__}")
    if vmapping():
        raise NeedsLoop("a step that is recomputed in the backward pass")
    if transforming():
        return f(at)
    tensors, shape = _apart(at)
    form: list[Any] = []  # f's outputs, with `Tensor` in the place of each tensor

    def g(*tensors: Tensor) -> tuple[Tensor, ...]:
        made, form[:] = _apart(f(_together(tensors, shape)))
        return made

    return _together(_Replay.apply(g, *tensors), form)


def _apart(tree: Any) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The tensors of a nest, and in a list the nest with `Tensor` in the place of each."""
    tensors: list[Tensor] = []

    def leaf(v: Any) -> Any:
        if isinstance(v, Tensor):
            tensors.append(v)
        return Tensor if isinstance(v, Tensor) else v

    shape = each(leaf, tree)
    return tuple(tensors), [shape]


def _together(tensors: tuple[Tensor, ...], shape: list[Any]) -> Any:
    """The inverse of `_apart`."""
    rest = iter(tensors)
    return each(lambda v: next(rest) if v is Tensor else v, shape[0])


def each(f: Callable[[Any], Any], tree: Any) -> Any:
    """f on each leaf of nested dicts, lists and tuples; a leaf may be anything."""
    if isinstance(tree, dict):
        return {k: each(f, v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [each(f, v) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return f(tree)


def _cast(kind: str) -> tuple[str, dict[str, Any]]:
    """Autocast as it is now on this kind of device."""
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    cache = torch.is_autocast_cache_enabled()
    return kind, {"dtype": dtype, "enabled": enabled, "cache_enabled": cache}


class _Replay(Function):
    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]

    @staticmethod
    def forward(ctx: Any, g: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        ctx.g = g
        ctx.save_for_backward(*tensors)
        ctx.states, ctx.evaluating = random_states(), is_evaluating()
        kinds = {"cpu", *(t.device.type for t in tensors)}
        ctx.casts = [_cast(kind) for kind in kinds if is_autocast_available(kind)]
        return g(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoint: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        with ExitStack() as stack:  # off the CPU this is another thread, with modes of its own
            for mode in (random_kept(), torch.enable_grad(), evaluating(ctx.evaluating)):
                stack.enter_context(mode)
            for kind, options in ctx.casts:
                stack.enter_context(torch.autocast(kind, **options))
            for put, state in ctx.states:
                put(state)
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
