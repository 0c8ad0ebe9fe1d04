"""A convolution whose gradients of every order are three operations of oneDNN's, each the others' derivative.

y = conv(x, w), g_x = back(g, w), g_w = over(x, g) are each linear in both arguments, and differentiating one gives the
other two. torch differentiates the backward pass by way of a convolution with a kernel of the image's size, which takes
up to twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mtlib.run.fast import plain, untransformed


class How(NamedTuple):
    """Stride, padding and dilation, down and across."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def convolves(module: nn.Module, x: Tensor) -> bool:
    """Whether the module is a convolution of images as it is written here: zeros around, one group, no bias."""
    return (
        type(module) is nn.Conv2d
        and type(x) is Tensor
        and module.bias is None
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and x.dtype == module.weight.dtype
        and x.ndim == 4
        and x.shape[1] == module.in_channels
        and x.device.type == module.weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not plain()
        and untransformed()
    )


def convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x, w) for a module and images that it `convolves`."""
    how = How(module.stride, tuple(map(int, module.padding)), module.dilation)
    return _Convolution.apply(x, module.weight, how)


def _grads(g: Tensor, x: Tensor, w: Tensor, how: How, which: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(g, x, w, None, *how, False, [0, 0], 1, which)


class _Convolution(Function):
    apply: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return torch.conv2d(x, w, None, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        want = ctx.needs_input_grad
        return *_Both.apply(g, x, w, ctx.how, [*want[:2], False]), None


class _Both(Function):
    """(g, x, w) -> back(g, w) and over(x, g), each where it is wanted."""

    apply: ClassVar[Callable[..., tuple[Tensor | None, ...]]]

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, how: How, which: list[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return tuple(_grads(g, x, w, how, which)[:2])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> Any:
        """⟨v, back(g, w)⟩ + ⟨u, over(x, g)⟩ by g, x and w."""
        (g, x, w), how = ctx.saved_tensors, ctx.how
        to_g, to_x, to_w = None, None, None
        want_g, want_x, want_w = ctx.needs_input_grad[:3]
        if v is not None:
            to_g = _Convolution.apply(v, w, how) if want_g else None
            to_w = _Both.apply(g, v, w, how, [False, True, False])[1] if want_w else None
        if u is not None:
            other = _Convolution.apply(x, u, how) if want_g else None
            to_g = other if to_g is None else to_g if other is None else to_g + other
            to_x = _Both.apply(g, x, u, how, [True, False, False])[0] if want_x else None
        return to_g, to_x, to_w, None, None
