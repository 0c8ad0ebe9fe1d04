"""Batch norm, 2×2 max-pool and ReLU as one operation on a CPU, with gradients of first and second order.

The three passes are those of `mtlib.norm`, in C (`block.c`): each reads an image twice and writes once what the three
operations write, and read again, one by one. Ties go as they do in torch: the first of equal winners of a window is the
winner, and where the winner is 0 or less nothing passes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import max_pool2d

from mtlib.run import compiled
from mtlib.run.fast import plain, untransformed

LAST = torch.channels_last
NO_THIRD = (
    "mtlib's batch-statistics norm has gradients of first and second order, not of third. "
    'Use group norm, or statistics="stored".'
)


def fits(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels can take these: real numbers on a CPU, channels last, outside of torch's transforms."""
    return (
        type(x) is Tensor
        and untransformed()
        and not (plain() or torch.compiler.is_compiling())
        and x.dtype in compiled.KINDS
        and x.dtype == weight.dtype == bias.dtype
        and x.device.type == weight.device.type == bias.device.type == "cpu"
        and x.ndim == 4
        and x.numel() > 0
        and weight.shape == bias.shape == x.shape[1:2]
        and min(x.shape[2:]) > 1
        and _laid_out(x)
    )


def norm_pool_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | None:
    """relu(max-pool(norm(x))) (N, C, H/2, W/2) for x that `fits`; None where this machine has no kernels."""
    kernels = _kernels(x.dtype)
    if kernels is None:
        return None
    y: Tensor = _Forward.apply(x, weight, bias, eps, kernels)
    return y


def _laid_out(x: Tensor) -> bool:
    _, c, h, w = x.shape
    return x.stride() == (c * h * w, 1, c * w, c) or (c > 1 and x.is_contiguous(memory_format=LAST))


def _written_out(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same by torch's operations: what the kernels are held against, and what runs under `vmap`."""
    x = x.contiguous()  # under the older of torch's two vmaps no other layout goes
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    c = (-1, 1, 1)
    y = (x - mean) * (var + eps).rsqrt() * weight.view(c) + bias.view(c)
    return torch.relu(max_pool2d(y, 2))


class _Kernels:
    """The three functions of `block.c` for one dtype."""

    def __init__(self, functions: Any):
        self.functions = functions
        address, size = ctypes.c_void_p, ctypes.c_ssize_t
        sizes = [*[size] * 4, ctypes.c_int]
        functions.forward.argtypes = [*[address] * 3, ctypes.c_double, *sizes, *[address] * 5]
        functions.backward.argtypes = [*[address] * 7, *sizes, *[address] * 3]
        functions.twice.argtypes = [*[address] * 12, *sizes, *[address] * 3]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
        """y, x̂ of the winners, which they are, μ, 1/√(σ² + ε)."""
        n, c, h, w = x.shape
        y = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, memory_format=LAST)
        out = [y, torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)]
        out += [torch.empty_like(weight), torch.empty_like(weight)]
        self.call(self.functions.forward, x, [x, weight, bias], out, eps)
        return out

    def backward(self, g: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """(g_x, g_γ, g_β); `rest` is x̂, which, γ, μ, 1/√(σ² + ε)."""
        weight = rest[2]
        out = (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight))
        self.call(self.functions.backward, x, [_as_last(g), x, *rest], out)
        return out

    def twice(self, v: Tensor, vw: Tensor, vb: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of g, x and γ; `rest` is g, x, x̂, which, γ, μ, 1/√(σ² + ε), g_γ, g_β."""
        g, x, weight = rest[0], rest[1], rest[4]
        g = _as_last(g)
        out = (torch.empty_like(g), torch.empty_like(x), torch.empty_like(weight))
        self.call(self.functions.twice, x, [_as_last(v), vw, vb, g, *rest[1:]], out)
        return out

    def call(self, f: Any, x: Tensor, given: Any, out: Any, *more: float) -> None:
        n, c, h, w = x.shape
        threads = torch.get_num_threads() if x.numel() > 1 << 15 else 1
        given = [t if t.is_contiguous() or t.ndim == 4 else t.contiguous() for t in given]
        places = [t.data_ptr() for t in given], [t.data_ptr() for t in out]
        if f(*places[0], *more, n, h, w, c, threads, *places[1]):
            raise MemoryError("no memory for the sums over the channels of a norm")


def _as_last(g: Tensor) -> Tensor:
    """g with its channels last in memory, whatever its strides are."""
    return g if _laid_out(g) else torch.empty_like(g, memory_format=LAST).copy_(g)


class _Forward(Function):
    apply: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: _Kernels
    ) -> Tensor:
        y, *rest = kernels.forward(x, weight, bias, eps)
        xh, won, mean, rstd = rest
        ctx.save_for_backward(x, weight, bias, xh, won, mean, rstd)
        ctx.eps, ctx.kernels = eps, kernels
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, bias, xh, won, mean, rstd = ctx.saved_tensors
        if _mapped(g):
            x, weight, bias = at = _moving(x, weight, bias)
            with torch.enable_grad():
                y = _written_out(x, weight, bias, ctx.eps)
            grads = torch.autograd.grad(y, at, g, create_graph=torch.is_grad_enabled())
            return *grads, None, None
        return *_Backward.apply(g, x, xh, won, weight, mean, rstd, ctx.kernels), None, None


class _Backward(Function):
    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        g, *rest, ctx.kernels = given
        out: tuple[Tensor, ...] = ctx.kernels.backward(g, *rest)
        ctx.save_for_backward(g, *rest, *out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        to_g, to_x, to_weight = _Twice.apply(*v, *ctx.saved_tensors, ctx.kernels)
        return to_g, to_x, None, None, to_weight, None, None, None


def _mapped(g: Tensor) -> bool:
    """Whether a backward pass runs under vmap, where a tensor says nothing of its layout: torch's operations then run anew."""
    try:
        g.is_contiguous(memory_format=LAST)
    except RuntimeError:
        return True
    return not untransformed() or type(g) is not Tensor


def _moving(*tensors: Tensor) -> list[Tensor]:
    """The tensors as new ones that all have a gradient: none is reached through another, as one of them may be made of it."""
    with torch.enable_grad():
        return [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]


class _Twice(Function):
    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        *tensors, kernels = given
        out: tuple[Tensor, ...] = kernels.twice(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(NO_THIRD)


@cache
def _kernels(dtype: torch.dtype) -> _Kernels | None:
    """The kernels for a dtype, once they gave what torch's operations give, on odd sizes; None where they cannot be had."""
    found = compiled.library("block", REAL=compiled.KINDS[dtype])
    if found is None:
        return None
    kernels = _Kernels(found)
    return kernels if _right(kernels, dtype) else None


def _right(kernels: _Kernels, dtype: torch.dtype) -> bool:
    """Whether the kernels' values and gradients of both orders are those of torch's operations."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        found = [
            _orders(lambda *at: _Forward.apply(*at, 1e-5, kernels), dtype),
            _orders(lambda x, w, b: _written_out(x, w, b, 1e-5), dtype),
        ]
    return compiled.agree(*found)


def _orders(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """f's values and gradients of both orders, for an image whose last row and column no window has."""
    x = torch.arange(210.0, dtype=dtype, device="cpu").sin().view(2, 3, 5, 7)
    weight, bias = torch.tensor([[1.0, -0.5, 2.0], [0.5, 0.25, -0.5]], dtype=dtype, device="cpu")
    at = [x.contiguous(memory_format=LAST), weight.clone(), bias.clone()]
    at = [t.requires_grad_() for t in at]
    y = f(*at)
    first = torch.autograd.grad((y**3).sum(), at, create_graph=True)
    second = torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), at)
    return [y, *first, *second]
