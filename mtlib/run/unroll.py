"""MAML's gradient in a row of linear layers, for all tasks at once: in C, where this machine has a compiler.

A small network's tasks cost more to hand from operation to operation than to compute. `unroll.c` takes each task through its
inner steps, the query loss and the way back, and adds the tasks up; `_by_autograd` is the same as an equation.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.core import Batch, Episode, Learner, Loss, Params, Steps, apply, take
from mtlib.run import compiled
from mtlib.run.chain import ACTIVATIONS, Activation, Row, row_of
from mtlib.run.fast import plain, untransformed, unwatched

LOSSES = (mse_loss, cross_entropy)
SIGMAS = (None, *(ACTIVATIONS[k] for k in (nn.ReLU, nn.Tanh, nn.Sigmoid)))  # as `unroll.c` counts
LAYERS = 16  # that it has room for
WIDEST = 256  # beyond, torch's products of matrices are better
ALONE = 50_000  # multiplications, up to which one thread is faster
_APPLY = apply(nn.Identity()).__code__
_Maybe = Tensor | None


class AtOnce(NamedTuple):
    """(φ, episodes, w) -> Σ_t w_t L^Q(θ_K) and its gradient; None where only the plain way goes.

    It goes where the learner descends a plain loss from φ in a network that is a row of linear layers, and nothing looks on:
    no mode of torch's, no hook, no module of a class of its own. `second` False: the inner steps count as constants.
    """

    learner: Learner
    loss: Loss
    second: bool

    def __call__(self, phi: Params, data: Any, w: Tensor) -> tuple[Tensor, Params] | None:
        net, adapt = self.learner.net, self.learner.adapt
        if not (_alone() and net is not None and isinstance(adapt, Steps) and _episodes(data)):
            return None
        found = self.inner(phi, adapt)
        row = row_of(net, phi) if found else None
        if found is None or row is None or not _takes(row, (found, self.loss), data, w):
            return None
        kernel = _kernel(data.query.x.dtype)
        rates = _rates(adapt, phi, row)
        if kernel is None or rates is None:
            return None
        kinds = LOSSES.index(found), LOSSES.index(self.loss)
        answer = kernel(row, data, kinds, rates, w, self.second)
        if answer is None:
            return None
        value, grads = answer
        return value, {k: grads[k] for k in phi if k in grads and k not in row.still}

    def inner(self, phi: Params, adapt: Steps) -> Loss | None:
        """The support loss of a learner that goes down it from the network's own weights, and predicts with the network."""
        says = getattr(adapt.step, "plainly", None)
        own = adapt.given is Steps._field_defaults["given"] and hasattr(adapt.begin, "plainly")
        if adapt.alone or not (says and own) or self.learner.settings:
            return None
        if (found := says(phi)) is None:
            return None
        f, loss = found
        same = all(_network(g) is self.learner.net for g in (f, self.learner.predict))
        return loss if same else None


def _alone() -> bool:
    """Whether nothing of torch's sees, transforms or replaces what is computed here."""
    return (
        untransformed()
        and unwatched()
        and not (plain() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
    )


def _network(f: Any) -> nn.Module | None:
    """The network of an f that `apply` made."""
    if getattr(f, "__code__", None) is not _APPLY:
        return None
    net: nn.Module = f.__closure__[0].cell_contents
    return net


def _episodes(data: Any) -> bool:
    return isinstance(data, Episode) and all(isinstance(part, Batch) for part in data)


def _takes(row: Row, losses: tuple[Loss, Loss], data: Episode, w: Tensor) -> bool:
    """Whether the kernel can take these: numbers of one precision on the CPU (labels take it), in shapes that fit. (What does not fit, the plain way tells.)"""
    widths = _widths(row)
    weights = [v for v in row.weights if v is not None]
    given = [*data.support, *data.query, *weights]
    numbers = {v.dtype for v in (data.support.x, data.query.x, *weights)}
    if not (
        all(any(loss is known for known in LOSSES) for loss in losses)
        and all(type(v) in (Tensor, nn.Parameter) for v in given)
        and len(numbers) == 1
        and numbers | {y.dtype for _, y in data} <= compiled.KINDS.keys()
        and all(v.device.type == "cpu" and v.layout is torch.strided for v in (*given, w))
        and not any(v.is_neg() for v in given)
        and len(row.acts) <= LAYERS
        and min(widths) > 0
        and max(widths) <= WIDEST
    ):
        return False
    least = 2 if cross_entropy in losses else 1
    return widths[-1] >= least and all(
        x.ndim == 3
        and x.shape == (len(w), x.shape[1], widths[0])
        and y.shape == (len(w), x.shape[1], widths[-1])
        and x.numel() > 0
        for x, y in data
    )


def _widths(row: Row) -> list[int]:
    """d_0, …, d_L; [0] where they do not fit."""
    shapes = [v.shape for v in row.weights[::2] if v is not None]
    if any(a[0] != b[1] for a, b in pairwise(shapes)):
        return [0]
    return [shapes[0][1], *(s[0] for s in shapes)]


def _rates(adapt: Any, phi: Params, row: Row) -> tuple[float, ...] | None:
    """α of each step and tensor of the row, 0 where it does not move; None where they are no plain numbers."""
    own = adapt.begin.plainly()
    moves = set(own or ()) - row.still
    if not moves or not moves <= set(row.names):
        return None
    found = list[float]()
    for j in range(adapt.steps):
        a = adapt.step.rate(phi, j)
        of = a if isinstance(a, dict) else dict.fromkeys(moves, a)
        if not (moves <= of.keys() <= phi.keys()):
            return None  # an error, which the plain way tells
        if not all(type(b) in (float, int) and 0 < b < math.inf for b in of.values()):
            return None
        found += [of[k] if k in moves else 0.0 for k in row.names]
    return tuple(found)


class _Kernel:
    """The function of `unroll.c` for one dtype."""

    def __init__(self, function: Any, dtype: torch.dtype):
        self.function, self.dtype = function, dtype
        address, size, number = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
        sizes, data = [size, address, address, size, size, size], [address] * 5
        rest = [number, number, size, address, number, address, number, address, address]
        function.argtypes = [*sizes, *data, *rest]

    def __call__(
        self,
        row: Row,
        data: Episode,
        kinds: tuple[int, int],
        rates: tuple[float, ...],
        w: Tensor,
        second: bool,
    ) -> tuple[Tensor, Params] | None:
        """Σ w_t L_t and its gradient by the names of the row's tensors; None where there is no memory for it."""
        given = [_laid_out(v.to(self.dtype)) for batch in data for v in batch]
        weights = [None if v is None else _laid_out(v) for v in row.weights]
        grads = [None if v is None else torch.empty_like(v) for v in weights]
        w = w.detach().to(self.dtype).contiguous()
        values = torch.empty_like(w)
        shape, acts, alpha = _described(
            tuple(_widths(row)), tuple(map(SIGMAS.index, row.acts)), rates, self.dtype
        )
        (tasks, n, _), q = given[0].shape, given[2].shape[1]
        steps = len(rates) // len(weights)
        work = tasks * (n * steps + q) * sum(v.numel() for v in weights if v is not None)
        failed = self.function(
            len(row.acts), shape.data_ptr(), acts.data_ptr(), tasks, n, q,
            *(v.data_ptr() for v in given), _addresses(weights), *kinds,
            steps, alpha.data_ptr(), second, w.data_ptr(),
            min(tasks, torch.get_num_threads()) if work > ALONE else 1, values.data_ptr(), _addresses(grads),
        )  # fmt: skip
        if failed:
            return None
        return w @ values, {k: g for k, g in zip(row.names, grads, strict=True) if g is not None}


def _laid_out(v: Tensor) -> Tensor:
    return v if v.is_contiguous() else v.detach().contiguous()


def _addresses(tensors: Sequence[_Maybe]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if v is None else v.data_ptr() for v in tensors])


@lru_cache(maxsize=64)
def _described(
    widths: tuple[int, ...], acts: tuple[int, ...], rates: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that a kernel reads, in memory."""
    return (
        torch.tensor(widths, dtype=torch.int64),
        torch.tensor(acts, dtype=torch.int32),
        torch.tensor(rates, dtype=dtype),
    )


@cache
def _kernel(dtype: torch.dtype) -> _Kernel | None:
    """The kernel for a dtype, once it gave what autograd gives; None where it cannot be had."""
    found = compiled.library("unroll", REAL=compiled.KINDS[dtype])
    if found is None:
        return None
    kernel = _Kernel(found.gradient, dtype)
    return kernel if _right(kernel) else None


def _right(kernel: _Kernel) -> bool:
    """Whether the kernel's value and gradients are those of autograd, for each loss and σ, in first and second order."""
    for kind, second in ((0, True), (1, True), (1, False)):
        row, data, w = _example(kernel.dtype)
        rates = (0.1, 0.2, 0.1, 0.0, 0.3, 0.1, 0.1, 0.1) * 2
        found = kernel(row, data, (kind, kind), rates, w, second)
        value, grads = _by_autograd(row, data, (LOSSES[kind],) * 2, rates, w, second)
        if found is None:
            return False
        if not compiled.agree([found[0], *(found[1][k] for k in grads)], [value, *grads.values()]):
            return False
    return True


def _example(dtype: torch.dtype) -> tuple[Row, Episode, Tensor]:
    """Three tasks for a row with each σ, one layer without a bias."""

    def wave(*shape: int) -> Tensor:
        count = torch.arange(1.0, 1 + math.prod(shape), dtype=dtype, device="cpu")
        return (count * (7 + len(shape))).sin().view(shape)

    widths = (2, 11, 5, 3, 2)
    weights: list[_Maybe] = []
    for a, b in pairwise(widths):
        weights += [wave(b, a), wave(b)]
    weights[3] = None
    y = torch.eye(2, dtype=dtype, device="cpu")[torch.tensor([0, 1, 1, 0, 1])]
    many = y.expand(3, 5, 2)
    data = Episode(Batch(wave(3, 5, 2), many), Batch(wave(3, 4, 2) / 2, many[:, :4]))
    names = [f"{i // 2}.{'bias' if i % 2 else 'weight'}" for i in range(8)]
    acts: list[Activation | None] = [SIGMAS[2], SIGMAS[1], SIGMAS[3], None]
    return (
        Row(weights, acts, names, set()),
        data,
        torch.tensor([0.5, 0.2, 0.3], dtype=dtype, device="cpu"),
    )


def _by_autograd(
    row: Row,
    data: Episode,
    losses: tuple[Any, Any],
    rates: Sequence[float],
    w: Tensor,
    second: bool,
) -> tuple[Tensor, Params]:
    """The equation: θ_{j+1} = θ_j − α_j ∇L^S(θ_j), then ∇_φ Σ_t w_t L^Q(θ_K)."""

    def f(theta: Sequence[Tensor], x: Tensor) -> Tensor:
        of = dict(zip(present, theta, strict=True))
        for i, act in enumerate(row.acts):
            x = nn.functional.linear(x, of[2 * i], of.get(2 * i + 1))
            x = x if act is None else act.value(x)
        return x

    present = [i for i, v in enumerate(row.weights) if v is not None]
    with torch.enable_grad():
        start = [v.detach().clone().requires_grad_() for v in row.weights if v is not None]
        total = torch.zeros((), dtype=w.dtype)
        for t, share in enumerate(w):
            (x, y), query = take(data, t)
            theta = start
            for j in range(len(rates) // len(row.weights)):
                g = torch.autograd.grad(losses[0](f(theta, x), y), theta, create_graph=True)
                a = [rates[j * len(row.weights) + i] for i in present]
                theta = [
                    v - b * (u if second else u.detach())
                    for v, b, u in zip(theta, a, g, strict=True)
                ]
            total = total + share * losses[1](f(theta, query.x), query.y)
        grads = torch.autograd.grad(total, start)
    return total.detach(), {row.names[i]: g for i, g in zip(present, grads, strict=True)}
