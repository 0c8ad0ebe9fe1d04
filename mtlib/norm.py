"""A batch norm whose gradients are exact under `vmap`, to second order.

torch's own gives a silently wrong second-order gradient there. Here each of the three passes is one
function with its own rule for `vmap`: T tasks of C channels are treated as T·C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mtlib.core import Params, apply, parameters
from mtlib.run.fast import plain

Statistics = Literal["batch", "stored"]
"""Where a norm takes mean and variance from: its input, or its buffers."""


class Norm(nn.Module):
    """Batch normalisation over every axis of x but the channels: (B, channels, ...).

    y = γ (x − μ) / √(σ² + ε) + β, μ and σ² (biased) per channel.

    `statistics="batch"` takes μ, σ² from x itself. It is transductive: a query batch sees itself.
    `statistics="stored"` reads them from the buffers `mean` and `var`, which only `calibrate` writes.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, statistics: Statistics = "batch", eps: float = 1e-5):
        super().__init__()
        if statistics not in ("batch", "stored"):
            raise ValueError(f'expected statistics "batch" or "stored", got {statistics!r}')
        self.statistics, self.eps = statistics, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if statistics == "stored":
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.weight):
            raise ValueError(
                f"expected x of shape (B, {len(self.weight)}, ...) in this Norm, got {tuple(x.shape)}"
            )
        if self.statistics == "batch" and not plain():
            return _Normalise.apply(x, self.weight, self.bias, self.eps)[0]
        stored = self.statistics == "stored"
        mean, var = (self.mean.detach(), self.var.detach()) if stored else moments(x)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * _per_channel(scale, x) + _per_channel(self.bias - mean * scale, x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, statistics={self.statistics!r}"


@torch.no_grad()
def calibrate(net: nn.Module, phi: Params, batches: Iterable[Tensor]) -> Params:
    """φ with the stored statistics of each `Norm` set to the moments of its input, averaged over `batches`.

    Layer by layer, so that each norm sees what it gets once the norms before it use stored statistics.
    `net` is built with `statistics="stored"`; `batches` are inputs x: (B, *item). Calling it with
    batches of another domain is AdaBN. Returns a new φ; neither `net` nor φ changes.
    """
    batches = list(batches)
    norms = [(k, m) for k, m in net.named_modules() if isinstance(m, Norm)]
    stored = [(k, m) for k, m in norms if m.statistics == "stored"]
    if not stored:
        raise ValueError(
            'expected a network with norms of statistics="stored", found none; '
            'build it with, e.g., conv4(statistics="stored")'
        )
    if not batches:
        raise ValueError("expected at least one batch of inputs to calibrate on, got none")
    phi = {**parameters(net), **phi}
    for name, norm in stored:
        seen: list[tuple[int, Tensor, Tensor]] = []  # elements per channel, mean, variance
        hook = norm.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append((_elements(args[0]), *moments(args[0])))
        )
        try:
            for x in batches:
                apply(net)(phi, x)
        finally:
            hook.remove()
        total = sum(n for n, _, _ in seen)
        mean = torch.stack([m * (n / total) for n, m, _ in seen]).sum(0)
        var = torch.stack([(v + (m - mean) ** 2) * (n / total) for n, m, v in seen]).sum(0)
        phi |= {f"{name}.mean": mean, f"{name}.var": var}
    return phi


def _elements(x: Tensor) -> int:
    """How many numbers each channel of x has."""
    return x.numel() // x.shape[1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel of x: (B, channels, ...)."""
    var, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    return mean, var


# The three passes ----------------------------------------------------------------------------
#
# x̂ = (x − μ)·r with r = 1/√(σ² + ε),  k = γ r,  n elements per channel,  ⟨·⟩ the mean over a channel.
#   forward    y = γ x̂ + β
#   backward   g_x = k (g − ⟨g⟩ − x̂ ⟨g x̂⟩),  g_γ = n ⟨g x̂⟩,  g_β = n ⟨g⟩           for g = ∂L/∂y
#   its own    with cotangents v, v_γ, v_β of (g_x, g_γ, g_β): `_Twice`


def _signed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the signature, which torch otherwise looks up at every call: a twentieth of a MAML step."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


_Triple = tuple[Tensor, Tensor, Tensor]


class _Normalise(Function):
    apply: ClassVar[Callable[..., _Triple]]

    @staticmethod
    @_signed
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Triple:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        return *_Backward.apply(g, *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        tensors = _fold(info.batch_size, dims, x, weight, bias)
        return _unfold(info.batch_size, _Normalise.apply(*tensors, eps))


class _Backward(Function):
    apply: ClassVar[Callable[..., _Triple]]

    @staticmethod
    @_signed
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> _Triple:
        wanted = [True, True, True]
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        g = g.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        grads: _Triple = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, rstd, True, eps, wanted
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> Any:
        return *_Twice.apply(v, v_weight, v_bias, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        tensors = _fold(info.batch_size, dims, *inputs[:5])
        return _unfold(info.batch_size, _Backward.apply(*tensors, inputs[5]))


class _Twice(Function):
    """The backward pass of `_Backward`: (v, v_γ, v_β) -> cotangents of g, x and γ."""

    apply: ClassVar[Callable[..., _Triple]]

    @staticmethod
    @_signed
    def forward(
        v: Tensor,
        vw: Tensor,
        vb: Tensor,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> _Triple:
        axes, n = _all_but_channels(x), x.numel() // x.shape[1]

        def c(per_channel: Tensor) -> Tensor:
            return _per_channel(per_channel, x)

        xh = (x - c(mean)) * c(rstd)
        k = weight * rstd
        g0, g1 = g.mean(axes), (g * xh).mean(axes)  # ⟨g⟩, ⟨g x̂⟩
        v0, v1 = v.mean(axes), (v * xh).mean(axes)  # ⟨v⟩, ⟨v x̂⟩
        q = (v * g).mean(axes) - g0 * v0 - g1 * v1
        u = vw - k * v1
        to_g = c(k) * v + c(u) * xh + c(vb - k * v0)
        slope = g1 * (vw - 2 * k * v1) + k * q
        level = g0 * vw - k * (g0 * v1 + g1 * v0)
        to_x = c(rstd) * (c(u) * g - c(k * g1) * v - c(slope) * xh - c(level))
        return to_g, to_x, n * rstd * q

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "mtlib's batch-statistics norm has gradients of first and second order, not of third. "
            'Use group norm, or statistics="stored".'
        )

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Tensor) -> Any:
        return _unfold(info.batch_size, _Twice.apply(*_fold(info.batch_size, dims, *inputs)))


def _all_but_channels(x: Tensor) -> list[int]:
    return [i for i in range(x.ndim) if i != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.ndim - 2))


def _fold(tasks: int, dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Tensors of T tasks as tensors of one task: (T, B, C, ...) -> (B, T·C, ...), and (T, C) -> (T·C,)."""

    def fold(t: Tensor, dim: int | None) -> Tensor:
        t = t.expand(tasks, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten() if t.ndim == 2 else t.transpose(0, 1).flatten(1, 2)

    return [fold(t, d) for t, d in zip(tensors, dims, strict=False)]


def _unfold(tasks: int, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def unfold(t: Tensor) -> Tensor:
        if t.ndim == 1:
            return t.view(tasks, -1)
        apart: Tensor = t.unflatten(1, (tasks, -1))
        return apart.transpose(0, 1)

    return tuple(unfold(t) for t in tensors), (0,) * len(tensors)
