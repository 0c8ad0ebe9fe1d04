"""A batch norm whose gradients are exact under `vmap`, to second order.

torch's own gives a silently wrong second-order gradient there. Here each of the three passes is one
function with its own rule for `vmap`: T tasks of C channels are treated as T·C channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mtlib.core import Batch, Episode, Params, expect, move
from mtlib.run import block
from mtlib.run.copies import before, evaluating, grad_mode_kept, private
from mtlib.run.fast import plain

Statistics = Literal["batch", "stored"]
"""Where a norm takes mean and variance from: its input, or its buffers."""


class Norm(nn.Module):
    """Batch normalisation over every axis of x but the channels: (B, channels, ...).

    y = γ (x − μ) / √(σ² + ε) + β, μ and σ² (biased) per channel.

    `statistics="batch"` takes μ, σ² from x itself. It is transductive: a query batch sees itself. In evaluation mode, which
    `mtlib.evaluate.evaluate` asks for, it reads them from `running_mean` and `running_var` where φ has them: `calibrate`
    puts them there. `statistics="stored"` reads them always.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, channels: int, statistics: Statistics = "batch", eps: float = 1e-5):
        super().__init__()
        if statistics not in ("batch", "stored"):
            raise ValueError(f'expected statistics "batch" or "stored", got {statistics!r}')
        whole = isinstance(channels, Integral) and not isinstance(channels, bool) and channels >= 1
        expect(whole, "channels, a whole number of at least 1", channels)
        expect(0 <= eps < math.inf, "a finite eps of at least 0", eps)
        self.statistics, self.eps = statistics, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.track_running_stats = (
            statistics == "batch"
        )  # they follow training, through `calibrate`
        stored = statistics == "stored"
        self.register_buffer("running_mean", torch.zeros(channels) if stored else None)
        self.register_buffer("running_var", torch.ones(channels) if stored else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.weight):
            raise ValueError(
                f"expected x of shape (B, {len(self.weight)}, ...) in this Norm, got {tuple(x.shape)}"
            )
        if self.bias.shape != self.weight.shape:  # torch would read past its end
            raise ValueError(
                f"expected a bias of shape {tuple(self.weight.shape)} in this Norm, got {tuple(self.bias.shape)}"
            )
        if x.dtype != self.weight.dtype and torch.float64 in (x.dtype, self.weight.dtype):
            raise ValueError(f"expected x of {self.weight.dtype} in this Norm, got {x.dtype}")
        own = self.reads_batch()
        if own and _elements(x) < 2:
            raise ValueError(
                f"expected more than one number per channel to take mean and variance of, got x {tuple(x.shape)}: "
                'x − μ would be 0. Give more rows, or statistics="stored".'
            )
        if own and not plain():
            return _Normalise.apply(x, self.weight, self.bias, self.eps)[0]
        if self.running_mean is None or self.running_var is None or own:
            mean, var = moments(x)
        else:
            mean, var = self.running_mean.detach(), self.running_var.detach()
        scale = self.weight * (var + self.eps).rsqrt()
        return x * _per_channel(scale, x) + _per_channel(self.bias - mean * scale, x)

    def pooled(self, x: Tensor) -> Tensor:
        """relu(max_pool2d(norm(x), 2)), as one operation where `mtlib.run.block` has one."""
        y = None
        if self.reads_batch() and block.fits(x, self.weight, self.bias):
            y = block.norm_pool_relu(x, self.weight, self.bias, self.eps)
        return nn.functional.max_pool2d(self(x), 2).relu() if y is None else y

    def reads_batch(self) -> bool:
        """Whether mean and variance are now those of the input."""
        return self.running_mean is None or (self.statistics == "batch" and self.training)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, statistics={self.statistics!r}"


@grad_mode_kept
@torch.no_grad()
def calibrate(net: nn.Module, phi: Params, batches: Iterable[Any]) -> Params:
    """φ with running statistics of each norm: the moments of its input over all items of `batches`, x: (B, *item), or nests of such.

    μ = Σ_b n_b μ_b / N,  σ² = Σ_b n_b (σ_b² + (μ_b − μ)²) / N, for n_b numbers per channel in batch b, N in all. Layer by
    layer, in evaluation mode, so that each norm sees what it gets once the norms before it read theirs. `Norm` and torch's
    batch and instance norms that track statistics take part. Then `evaluate` is inductive, and so is
    `load(net, φ).eval()`. Batches of another domain make it AdaBN. Returns a new φ; neither `net` nor φ changes.
    Where φ has the statistics of some norms (frozen in evaluation mode, so that it was trained with them) and lacks others,
    only those it lacks are computed; where it has all, or none, all are.

    Raises ValueError if there is no such norm, or no batch reaches one, or a norm meets NaN or infinity.
    """
    expect(
        not isinstance(batches, Tensor | Batch | Episode | Mapping),
        "batches, a list of inputs: [x]",
        batches,
    )
    batches = list(batches)
    for x in batches:
        expect(not isinstance(x, Batch | Episode), "batches of inputs x, tensors without labels", x)
    places = [(k, m) for k, m in net.named_modules() if _tracks(m)]
    if not places:
        raise ValueError(
            "expected a network with norms that have running statistics: Norm, or torch's batch norms with "
            "track_running_stats=True; found none"
        )
    if not batches:
        raise ValueError("expected at least one batch of inputs to calibrate on, got none")
    lacking = [(k, m) for k, m in places if f"{k}.running_mean".lstrip(".") not in phi]
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    own = {k: v.detach().clone() for k, v in state.items() if v.is_floating_point()}
    phi = {
        **(move(own, phi[min(phi)].device) if phi else own),
        **phi,
    }  # what φ lacks goes where φ is
    found: Params = {}
    for chosen in (lacking, places):
        if not found:  # none lacks any, or those that do are not on the way that these batches take
            found = _statistics(chosen, net, phi, batches)
    if not found:
        raise ValueError("expected batches that reach a norm of the network; they reach none")
    return {**phi, **found}


def _statistics(
    norms: list[tuple[str, nn.Module]], net: nn.Module, phi: Params, batches: list[Any]
) -> Params:
    """The running statistics of those of the norms that the batches reach, one after the other."""
    found: Params = {}
    for place, norm in norms:
        seen = [pair for x in batches for pair in _moments_at(place, net, {**phi, **found}, x)]
        total = sum(n for n, _, _ in seen)
        if not total:
            continue
        mean = torch.stack([m * (n / total) for n, m, _ in seen]).sum(0)
        between = 0 if isinstance(norm, INSTANCE_NORMS) else 1
        var = torch.stack([(v + between * (m - mean) ** 2) * (n / total) for n, m, v in seen]).sum(
            0
        )
        if not bool((mean.isfinite() & var.isfinite()).all()):
            raise ValueError(
                f"expected finite numbers at the norm {place!r}; the batches, or φ, hold NaN or infinity"
            )
        dot = f"{place}." if place else ""
        found |= {f"{dot}running_mean": mean, f"{dot}running_var": var}
    return found


INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_Moments = tuple[int, Tensor, Tensor]


def _moments_at(place: str, net: nn.Module, phi: Params, x: Any) -> list[_Moments]:
    """Numbers per channel, mean and variance of what one norm reads as the network reads x in evaluation mode."""
    seen: list[_Moments] = []

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = args[0]
        if isinstance(norm, INSTANCE_NORMS):  # torch averages each instance's own
            each = z.reshape(*z.shape[:2], -1)
            seen.append((len(z), each.mean(2).mean(0), each.var(2, correction=0).mean(0)))
        else:
            seen.append((_elements(z), *moments(z)))

    with evaluating():
        copy = private(net, phi).net
        before(copy.get_submodule(place), look)
        copy(x)
    return seen


def _tracks(module: nn.Module) -> bool:
    """Whether a norm has a place for running statistics."""
    if isinstance(module, Norm):
        return True
    return bool(getattr(module, "track_running_stats", False)) and module.running_mean is not None


def _elements(x: Tensor) -> int:
    """How many numbers each channel of x has."""
    return x.numel() // x.shape[1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel of x: (B, channels, ...)."""
    expect(x.ndim > 1, "x of shape (B, channels, ...)", x)
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
        raise NotImplementedError(block.NO_THIRD)

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
