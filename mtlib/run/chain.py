"""Linear layers and activations in a row, for all tasks of a `vmap` at once: one function with three passes of its own.

torch's rules for `vmap` make many small operations of a small network, each seen by functorch and by autograd. Here they
are products of stacks of matrices, outside of functorch, and autograd sees one function for each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mtlib.core import Params
from mtlib.run.fast import (
    IS_BATCHED,
    OutsideOfVmap,
    in_one_vmap,
    untouched,
    unwatched,
    way_to_autograd,
)


class Activation(NamedTuple):
    """σ, and its derivatives by its value h: `back` is p ∘ σ′, `curve` is σ″/σ′, None where that is 0."""

    value: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    curve: Callable[[Tensor], Tensor] | None = None


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(torch.relu, lambda p, h: torch.ops.aten.threshold_backward(p, h, 0)),
    nn.Tanh: Activation(torch.tanh, torch.ops.aten.tanh_backward, lambda h: -2 * h),
    nn.Sigmoid: Activation(torch.sigmoid, torch.ops.aten.sigmoid_backward, lambda h: 1 - 2 * h),
}
_Maybe = Tensor | None


class Row(NamedTuple):
    """h_l = σ_l(h_{l−1} W_lᵀ + b_l), l = 1 … L. `weights` are W_1, b_1, …, W_L, b_L; a bias may be None, and a σ: the identity."""

    weights: list[_Maybe]
    acts: list[Activation | None]
    names: list[str]  # of the weights, in θ
    still: set[str]  # those of them that are frozen


def chain(net: nn.Module, theta: Params, x: Any) -> Tensor | None:
    """f(θ, x) of a network that is such a row, in one `vmap` over tasks; None elsewhere, where the network runs as it is."""
    if type(net) not in (nn.Sequential, nn.Linear) or not (in_one_vmap() and unwatched()):
        return None
    way = way_to_autograd()
    row = None if way is None else row_of(net, theta)
    if way is None or row is None or not _reads(row, x):
        return None
    unwrap, rewrap = way
    stacked, weights = unwrap(x), [None if w is None else unwrap(w) for w in row.weights]
    with OutsideOfVmap():
        out = answer(row.acts, stacked, weights)
    return rewrap(out)


def row_of(net: nn.Module, theta: Params) -> Row | None:
    """The row that a network is, with θ's entries; None where it is none, or has something of its own."""
    if type(net) not in (nn.Sequential, nn.Linear):
        return None
    row = Row([], [], [], set())
    return row if _into(row, net, theta, "") and row.acts else None


def _into(row: Row, module: nn.Module, theta: Params, place: str) -> bool:
    """Whether a module goes on with the row. (What it has of its own, a hook or another `forward`, would be left out.)"""
    own, kind = vars(module), type(module)
    if not untouched(module):
        return False
    if kind is nn.Sequential:
        parts = own["_modules"].items()
        return all(m is not None and _into(row, m, theta, f"{place}{k}.") for k, m in parts)
    if kind is nn.Linear:
        given = own["_parameters"]
        w, b = theta.get(f"{place}weight"), theta.get(f"{place}bias")
        if len(given) != 2 or w is None or w.shape != given["weight"].shape:
            return False
        if (bias := given["bias"]) is not None and (b is None or b.shape != bias.shape):
            return False
        row.weights.extend((w, None if bias is None else b))
        row.names.extend((f"{place}weight", f"{place}bias"))
        row.still.update(
            f"{place}{k}" for k, p in given.items() if not (p is None or p.requires_grad)
        )
        row.acts.append(None)
        return True
    if kind in ACTIVATIONS and row.acts and row.acts[-1] is None:
        row.acts[-1] = ACTIVATIONS[kind]
        return True
    return False


def _reads(row: Row, x: Any) -> bool:
    """Whether x (…, D) and the weights are plain tensors in single or double precision, and each task has weights of its own.

    (What tasks share is one product for all of them, and better left to torch.)
    """
    first = row.weights[0]
    if type(x) is not Tensor or first is None or x.shape[-1:] != first.shape[1:]:
        return False
    widths = [w.shape for w in row.weights[::2] if w is not None]
    return (
        all(a[0] == b[1] for a, b in pairwise(widths))
        and x.dtype in (torch.float32, torch.float64)
        and all(
            w is None
            or (type(w) is Tensor and w.dtype == x.dtype and w.device == x.device and IS_BATCHED(w))
            for w in row.weights
        )
    )


def answer(acts: Sequence[Activation | None], x: Tensor, weights: Sequence[_Maybe]) -> Tensor:
    """h_L (T, …, W) for x (T, …, D), W_l (T, W, D) and b_l (T, W)."""
    rows = x.reshape(len(x), -1, x.shape[-1]) if x.ndim != 3 else x
    out = _Row.apply(acts, rows, *weights)
    return out if x.ndim == 3 else out.view(*x.shape[:-1], out.shape[-1])


# The three passes ----------------------------------------------------------------------------
#
#   forward    h_l = σ_l(h_{l−1} W_lᵀ + b_l)
#   backward   δ_l = p_l ∘ σ_l′,  p_{l−1} = δ_l W_l,  g_W = δ_lᵀ h_{l−1},  g_b = Σ δ_l         from p_L = ∂L/∂h_L
#   its own    with cotangents v of (g_x, g_W, g_b): the derivative of the other two along v, Pearlmutter's
#                a_l = t_{l−1} W_lᵀ + h_{l−1} v_Wᵀ + v_b,  t_l = a_l ∘ σ_l′                       from t_0 = v_x
#                c_l = q_l ∘ σ_l′ + δ_l ∘ a_l ∘ σ_l″/σ_l′,  q_{l−1} = c_l W_l + δ_l v_W           from q_L = 0
#              is t_L for ∂L/∂h_L,  δ_lᵀ t_{l−1} + c_lᵀ h_{l−1} for W_l,  Σ c_l for b_l,  q_0 for x


def product(a: Tensor, b: Tensor, c: _Maybe = None) -> Tensor:
    """c + a b, for each task."""
    if a.shape[2] == 1:
        return a * b if c is None else torch.addcmul(c, a, b)
    return torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b)


def added(a: _Maybe, b: _Maybe, c: _Maybe) -> _Maybe:
    """c + a b, where None is 0."""
    return c if a is None or b is None else product(a, b, c)


def _turned(a: _Maybe) -> _Maybe:
    return None if a is None else a.mT


def _values(
    acts: Sequence[Activation | None], x: Tensor, weights: Sequence[_Maybe]
) -> list[Tensor]:
    """h_0 = x, …, h_L."""
    h = [x]
    for act, w, b in zip(acts, weights[::2], weights[1::2], strict=True):
        a = product(h[-1], w.mT, None if b is None else b[:, None])  # type: ignore[union-attr]
        h.append(a if act is None else act.value(a))
    return h


class _Row(Function):
    apply: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def forward(ctx: Any, acts: Sequence[Activation | None], x: Tensor, *weights: _Maybe) -> Tensor:
        h = _values(acts, x, weights)
        ctx.acts = acts
        ctx.save_for_backward(*h, *weights)
        return h[-1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        n = len(ctx.acts) + 1
        h, weights = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return None, *_Back.apply(ctx.acts, ctx.needs_input_grad[1:], h, g, h[0], *weights)


class _Back(Function):
    apply: ClassVar[Callable[..., tuple[_Maybe, ...]]]

    @staticmethod
    def forward(
        ctx: Any,
        acts: Sequence[Activation | None],
        wanted: Sequence[bool],
        h: Sequence[Tensor],
        g: Tensor,
        x: Tensor,
        *weights: _Maybe,
    ) -> tuple[_Maybe, ...]:
        last = next((i // 2 for i, want in enumerate(wanted[1:]) if want), len(acts))
        last = 0 if wanted[0] else last
        found: list[_Maybe] = [None] * len(wanted)
        deltas: list[_Maybe] = [None] * len(acts)
        g_out = g
        for j in range(len(acts) - 1, last - 1, -1):
            act, w = acts[j], weights[2 * j]
            d = deltas[j] = g if act is None else act.back(g, h[j + 1])
            if wanted[2 * j + 1]:
                found[2 * j + 1] = product(d.mT, h[j])
            if wanted[2 * j + 2]:
                found[2 * j + 2] = d.sum(1)
            if j > last or wanted[0]:
                g = product(d, w)  # type: ignore[arg-type]
        if wanted[0]:
            found[0] = g
        ctx.acts, ctx.wanted = acts, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g_out, x, *weights, *h[1:], *deltas)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *v: _Maybe) -> Any:
        n, acts = len(ctx.acts), ctx.acts
        g, x, *rest = ctx.saved_tensors
        weights, h, deltas = rest[: 2 * n], [x, *rest[2 * n : 3 * n]], rest[3 * n :]
        if torch.is_grad_enabled():  # for a third order, which autograd knows
            return None, None, None, *_by_autograd(acts, ctx.wanted, v, g, x, weights)
        return None, None, None, *_twice(acts, h, deltas, v, weights)


def _by_autograd(
    acts: Sequence[Activation | None],
    wanted: Sequence[bool],
    v: Sequence[_Maybe],
    g: Tensor,
    x: Tensor,
    weights: Sequence[_Maybe],
) -> list[_Maybe]:
    """As `_twice`, and differentiable."""
    at = [None if t is None else t.view_as(t) for t in (x, *weights)]
    first = [
        (t, u)
        for t, u, want in zip(at, v, wanted, strict=True)
        if want and t is not None and u is not None
    ]
    g = g.view_as(g)
    *_, h = _values(acts, at[0], at[1:])  # type: ignore[arg-type]
    grads = torch.autograd.grad(h, [t for t, _ in first], g, create_graph=True)
    moving = {i: t for i, t in enumerate((g, *at)) if t is not None and t.requires_grad}
    found = torch.autograd.grad(
        grads,
        list(moving.values()),
        [u for _, u in first],
        create_graph=True,
        allow_unused=True,
    )
    of = dict(zip(moving, found, strict=True))
    return [of.get(i) for i in range(len(at) + 1)]


def _twice(
    acts: Sequence[Activation | None],
    h: Sequence[Tensor],
    deltas: Sequence[_Maybe],
    v: Sequence[_Maybe],
    weights: Sequence[_Maybe],
) -> tuple[_Maybe, ...]:
    """The third line of the equations above: cotangents of ∂L/∂h_L, x and the weights. None is 0."""
    n = len(acts)
    along: list[_Maybe] = [v[0]]
    slopes: list[_Maybe] = []
    for j, act in enumerate(acts):
        vw, vb = v[2 * j + 1], v[2 * j + 2]
        a = None if vb is None else vb[:, None].expand_as(h[j + 1])
        a = added(along[j], _turned(weights[2 * j]), a)
        a = added(h[j], _turned(vw), a)
        slopes.append(a)
        along.append(a if act is None or a is None else act.back(a, h[j + 1]))
    found: list[_Maybe] = [None] * len(v)
    q: _Maybe = None
    for j in range(n - 1, -1, -1):
        act, w, d, vw = acts[j], weights[2 * j], deltas[j], v[2 * j + 1]
        c = q if q is None or act is None else act.back(q, h[j + 1])
        if act and act.curve and d is not None and (a := slopes[j]) is not None:
            bent = d * a * act.curve(h[j + 1])
            c = bent if c is None else c + bent
        found[2 * j + 1] = added(_turned(c), h[j], added(_turned(d), along[j], None))
        if c is not None and weights[2 * j + 1] is not None:
            found[2 * j + 2] = c.sum(1)
        q = added(c, w, added(d, vw, None))
    return along[-1], q, *found[1:]
