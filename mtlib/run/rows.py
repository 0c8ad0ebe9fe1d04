"""Operations whose gradients are right under `vmap`, to any order, and few: what transformers are made of.

Each works on rows, the first axis of all its tensors, so that T tasks are T times as many rows. torch's own layer norm has
a silently wrong second-order gradient there (pytorch/functorch issue 534).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

Tensors = tuple[Tensor, ...]
"""What a pass reads or gives."""


def by_rows(
    reference: Callable[..., Tensor],
    forward: Callable[..., Tensors],
    backward: Callable[..., Tensors],
    twice: Callable[..., Tensors],
    inputs: int,
) -> Callable[..., Tensor]:
    """y = f(*x) for tensors x with rows first, so many `inputs`, from its passes; `reference` is f in torch's operations.

        forward(*x)                          -> y, and what the next pass can use
        backward(g, *x, *kept)               -> gradients g_x of x for g = ∂L/∂y, and what the next pass can use
        twice(*v, g, *x, *kept, *kept again) -> cotangents of g and of x for cotangents v of g_x

    The third order and those above are the reference's.
    """

    def of(ctx: Any, own: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*own, *kept)

    def folded(call: Callable[..., Tensors]) -> Any:
        def vmap(info: Any, dims: Any, *tensors: Tensor) -> Any:
            tasks = info.batch_size
            outputs = call(*(_fold(tasks, t, d) for t, d in zip(tensors, dims, strict=True)))
            return tuple(t.unflatten(0, (tasks, -1)) for t in outputs), (0,) * len(outputs)

        return staticmethod(vmap)

    class First(Function):
        apply: ClassVar[Callable[..., Tensors]]

        @staticmethod
        def forward(*x: Tensor) -> Tensors:
            return forward(*x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            of(ctx, inputs, output[1:])

        @staticmethod
        def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
            return Backward.apply(g, *ctx.saved_tensors)[:inputs]

        vmap = folded(lambda *t: First.apply(*t))

    class Backward(Function):
        apply: ClassVar[Callable[..., Tensors]]

        @staticmethod
        def forward(*gx: Tensor) -> Tensors:
            return backward(*gx)

        @staticmethod
        def setup_context(ctx: Any, gx: Any, output: Any) -> None:
            ctx.shapes = [t.shape for t in output[:inputs]]
            ctx.given = len(gx)
            of(ctx, gx, output[inputs:])

        @staticmethod
        def backward(ctx: Any, *v: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            whole = [
                saved[0].new_zeros(s) if t is None else t
                for t, s in zip(v, ctx.shapes, strict=False)
            ]
            found = Twice.apply(*whole, *saved)
            return *found, *[None] * (ctx.given - len(found))

        vmap = folded(lambda *t: Backward.apply(*t))

    class Twice(Function):
        apply: ClassVar[Callable[..., Tensors]]

        @staticmethod
        def forward(*vgx: Tensor) -> Tensors:
            return twice(*vgx)

        @staticmethod
        def setup_context(ctx: Any, vgx: Any, output: Any) -> None:
            ctx.given = len(vgx)
            ctx.save_for_backward(*vgx[: 2 * inputs + 1])

        @staticmethod
        def backward(ctx: Any, *c: Tensor) -> Any:
            found = torch.func.vjp(again, *ctx.saved_tensors)[1](c)
            return *found, *[None] * (ctx.given - len(found))

        vmap = folded(lambda *t: Twice.apply(*t))

    def gradient(g: Tensor, *x: Tensor) -> Tensors:
        found: Tensors = torch.func.vjp(reference, *x)[1](g)
        return found

    def again(*vgx: Tensor) -> Tensors:
        found: Tensors = torch.func.vjp(gradient, *vgx[inputs:])[1](vgx[:inputs])
        return found

    return lambda *x: First.apply(*x)[0]


def _fold(tasks: int, t: Tensor, dim: int | None) -> Tensor:
    """T tasks of R rows as T·R rows."""
    t = t.expand(tasks, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)
