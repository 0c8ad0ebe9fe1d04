"""A layer of a transformer encoder, for all tasks of a `vmap` at once: one function with three passes of its own.

Its parts know their passes, and `Row` puts parts in a row: of a whole layer autograd sees one node a pass, where it would
see fifty. Between the matrix products stand C functions (`encoder.c`), and torch's operations where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from mtlib.run import compiled, fast

Tensors = Sequence[Tensor]
"""The weights of a part, or what belongs to each of them."""
Kept = tuple[Any, ...]
"""What a pass leaves for the next ones: a nest of tensors."""

# A part y = f(x, w), for x (T, N, n) of T tasks with N rows and weights w of each task, has four passes:
#
#   forward    y
#   backward   g_x, g_w of g = ∂L/∂y
#   along      for cotangents v of g_x and u of g_w: that of g, and from g the `local` part of those of x and w
#   again      their sum with what a cotangent q of y adds, which is the backward pass of q; q = None is 0
#
# The last two together are the backward pass of `backward`. In a row `along` goes forward through all parts and `again`
# back, so that no product is made twice.


class Part(Protocol):
    """The four passes, and f in torch's operations, of so many `weights`."""

    @property
    def weights(self) -> int: ...
    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]: ...
    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]: ...
    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]: ...
    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]: ...
    def written(self, x: Tensor, w: Tensors) -> Tensor: ...


class Row(NamedTuple):
    """Parts one after the other; `residual`: x is added to what they give, into what the last one does not keep."""

    parts: tuple[Part, ...]
    residual: bool = False

    @property
    def weights(self) -> int:
        return sum(p.weights for p in self.parts)

    def shared(self, w: Sequence[Any]) -> list[Any]:
        """Each part's own."""
        rest = iter(w)
        return [[next(rest) for _ in range(p.weights)] for p in self.parts]

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        h, kept = [x], list[Kept]()
        for part, own in zip(self.parts, self.shared(w), strict=True):
            y, left = part.forward(h[-1], own)
            h.append(y)
            kept.append(left)
        return h.pop().add_(x) if self.residual else h.pop(), (h, kept)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        found, gs, more, t = list[list[Tensor]](), list[Tensor](), list[Kept](), g
        for part, h, own, left in self._steps(w, *kept):
            gs.append(t)
            t, gw, new = part.backward(t, h, own, left)
            found.append(gw)
            more.append(new)
        t = t.add_(g) if self.residual else t
        return t, [g for gw in reversed(found) for g in gw], (gs[::-1], more[::-1])

    def _steps(self, w: Sequence[Any], *kept: Sequence[Any]) -> Iterator[Any]:
        h, *left = kept
        rows: list[Any] = [*zip(self.parts, h, self.shared(w), *left, strict=True)]
        yield from reversed(rows)

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        t, local = v, list[Kept]()
        own = zip(self.parts, self.shared(u), self.shared(w), *kept, *more, strict=True)
        for part, up, wp, h, left, gp, new in own:
            t, part_local = part.along(t, up, gp, h, wp, left, new)
            local.append(part_local)
        return t.add_(v) if self.residual else t, tuple(local)

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        found, t = list[list[Tensor | None]](), q
        for part, h, own, left, new, part_local in self._steps(w, *kept, more[1], local):
            t, to_w = part.again(t, h, own, left, new, part_local)
            found.append(to_w)
        assert t is not None
        t = t.add_(q) if self.residual and q is not None else t
        return t, [g for to_w in reversed(found) for g in to_w]

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        y = x
        for part, own in zip(self.parts, self.shared(w), strict=True):
            y = part.written(y, own)
        return x + y if self.residual else y


class Linear(NamedTuple):
    """y = x Wᵀ + b."""

    weights: int = 2

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        return self.written(x, w), ()

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        return torch.bmm(g, w[0]), [torch.bmm(g.mT, x), g.sum(1)], ()

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        to_g = self.written(v, (w[0], u[1])).baddbmm_(x, u[0].mT)
        return to_g, (torch.bmm(g, u[0]), torch.bmm(g.mT, v))

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        to_x, to_w = local
        if q is None:
            return to_x, [to_w, None]
        return to_x.baddbmm_(q, w[0]), [to_w.baddbmm_(q.mT, x), q.sum(1)]

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        return torch.baddbmm(w[1][:, None], x, w[0].mT)


class Relu(NamedTuple):
    """y = max(x, 0)."""

    weights: int = 0

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        y = x.relu()
        return y, (y,)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        return torch.ops.aten.threshold_backward(g, kept[0], 0), [], ()

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        return self.backward(v, x, w, kept)[0], ()

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        return self.backward(torch.zeros_like(x) if q is None else q, x, w, kept)[0], []

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        return x.relu()


class Gelu(NamedTuple):
    """y = x Φ(x): y′ = Φ + x φ, y″ = φ (2 − x²), with Φ and φ of the normal distribution."""

    kernels: Kernels | None = None
    weights: int = 0

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        if self.kernels:
            y, first, second = (_fresh(x) for _ in range(3))
            self.kernels.call("gelu", (x, x.numel()), (y, first, second))
            return y, (first, second)
        return self.written(x, w), ()

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        return g * kept[0] if kept else torch.ops.aten.gelu_backward(g, x), [], ()

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        if self.kernels:
            to = _fresh(x), _fresh(x)
            self.kernels.call("gelu_twice", (v, g, *kept, x.numel()), to)
            return to[0], (to[1],)
        density = torch.exp(x * x * -0.5).mul_((2 * torch.pi) ** -0.5)
        return self.backward(v, x, w, kept)[0], ((v * g).mul_(density.mul_(2 - x * x)),)

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        (to_x,) = local
        if q is None:
            return to_x, []
        if kept:
            return to_x.addcmul_(q, kept[0]), []
        return to_x.add_(self.backward(q, x, w, kept)[0]), []

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        return torch.nn.functional.gelu(x)


class Norm(NamedTuple):
    """y = γ x̂ + β with x̂ = (x − μ) r, r = 1/√(σ² + ε) of each row; its passes are those of `mtlib.run.transformers`.

    P t = r (t − ⟨t⟩ − x̂ ⟨t x̂⟩), ⟨·⟩ the mean over a row.
    """

    eps: float
    kernels: Kernels | None = None
    weights: int = 2

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        if self.kernels:
            y, hat, r = _fresh(x), _fresh(x), _fresh(x[..., :1])
            self.kernels.call("norm", (x, *w, self.eps, *x.shape), (y, hat, r))
            return y, (hat, r)
        hat, mean, r = torch.ops.aten.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
        return torch.addcmul(w[1][:, None], hat, w[0][:, None]), (hat, r, mean)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        if self.kernels:
            to = _fresh(x), _fresh(w[0]), _fresh(w[0])
            self._onto(0, g, w, kept, to)
            return to[0], [*to[1:]], ()
        gx = _projected(g * w[0][:, None], x, kept)
        return gx, [(g * kept[0]).sum(1), g.sum(1)], ()

    def _onto(self, onto: int, g: Tensor, w: Tensors, kept: Kept, to: Tensors) -> None:
        assert self.kernels
        self.kernels.call("norm_backward", (g, w[0], *kept, *g.shape), to, onto)

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        hat, r, *_ = kept
        if self.kernels:
            to = _fresh(v), _fresh(v), _fresh(w[0])
            self.kernels.call("norm_twice", (v, *u, g, w[0], hat, r, *v.shape), to)
            return to[0], to[1:]
        h, pv = g * w[0][:, None], _projected(v, x, kept)
        to_g = torch.addcmul(u[1][:, None], hat, u[0][:, None]).addcmul_(pv, w[0][:, None])
        c = (g * u[0][:, None]).addcmul_(h, row_mean(v * hat) * r, value=-1)
        c = c.addcmul_(v, row_mean(h * hat) * r, value=-1)
        to_x = _projected(c, x, kept).addcmul_(hat, row_mean(h * pv) * r, value=-1)
        return to_g, (to_x, (g * pv).sum(1))

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        to_x, to_w = local
        if q is None:
            return to_x, [to_w, None]
        if self.kernels:
            to = (to_x, to_w, torch.zeros_like(to_w))
            self._onto(1, q, w, kept, to)
            return to_x, [*to[1:]]
        to_q, (gw, gb), _ = self.backward(q, x, w, kept)
        return to_x.add_(to_q), [to_w.add_(gw), gb]

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        apart = x - row_mean(x)
        hat = apart * (row_mean(apart.square()) + self.eps).rsqrt()
        return hat * w[0][:, None] + w[1][:, None]


class Attention(NamedTuple):
    """softmax(q kᵀ / √d) v of each head of each sequence, for x = (q, k, v), (T, N, 3 · heads · d), sequences of `length` rows."""

    heads: int
    length: int
    kernels: Kernels | None = None
    weights: int = 0

    def forward(self, x: Tensor, w: Tensors) -> tuple[Tensor, Kept]:
        if self.kernels:
            y = x.new_empty(*x.shape[:-1], x.shape[-1] // 3)
            p = x.new_empty(y.shape[0] * y.shape[1] * self.heads, self.length)
            self.kernels.call("attention", (x, *self._sizes(x)), (y, p))
            return y, (p,)
        q, k, v = self._apart(x, 3)
        p = (q @ k.mT).mul_(self._scale(x)).softmax(-1)
        return self._together(p @ v, len(x)), (p,)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensors, kept: Kept
    ) -> tuple[Tensor, list[Tensor], Kept]:
        if self.kernels:
            to = _fresh(x)
            self._onto(0, g, x, kept, to)
            return to, [], ()
        (p,), (q, k, v), (gy,), s = kept, self._apart(x, 3), self._apart(g, 1), self._scale(x)
        gs = of_softmax(gy @ v.mT, p).mul_(s)
        return self._together(torch.stack([gs @ k, gs.mT @ q, p.mT @ gy]), len(x)), [], ()

    def _onto(self, onto: int, g: Tensor, x: Tensor, kept: Kept, to: Tensor) -> None:
        assert self.kernels
        given = (g, x, *kept, *self._sizes(x))
        self.kernels.call("attention_backward", given, (to,), onto)

    def along(
        self, v: Tensor, u: Tensors, g: Tensor, x: Tensor, w: Tensors, kept: Kept, more: Kept
    ) -> tuple[Tensor, Kept]:
        if self.kernels:
            to = _fresh(g), _fresh(x)
            self.kernels.call("attention_twice", (v, g, x, *kept, *self._sizes(x)), to)
            return to[0], (to[1],)
        (p,), (q, k, z), (vq, vk, vz) = kept, self._apart(x, 3), self._apart(v, 3)
        (gy,), s = self._apart(g, 1), self._scale(x)
        gp = gy @ z.mT
        gs = of_softmax(gp, p).mul_(s)
        a = (vq @ k.mT + q @ vk.mT).mul_(s)  # of gs
        to_gp = of_softmax(a, p)
        b = gy @ vz.mT + a * (gp - _along(gp, p)) - gp * _along(a, p)
        b = of_softmax(b, p).mul_(s)  # of q kᵀ
        to_x = torch.stack([b @ k + gs @ vk, b.mT @ q + gs.mT @ vq, to_gp.mT @ gy])
        return self._together(p @ vz + to_gp @ z, len(x)), (self._together(to_x, len(x)),)

    def again(
        self, q: Tensor | None, x: Tensor, w: Tensors, kept: Kept, more: Kept, local: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        (to_x,) = local
        if q is None:
            return to_x, []
        if self.kernels:
            self._onto(1, q, x, kept, to_x)
            return to_x, []
        return to_x.add_(self.backward(q, x, w, kept)[0]), []

    def written(self, x: Tensor, w: Tensors) -> Tensor:
        q, k, v = self._apart(x, 3)
        return self._together(torch.softmax(q @ k.mT * self._scale(x), -1) @ v, len(x))

    def _scale(self, x: Tensor) -> float:
        return float((x.shape[-1] // 3 // self.heads) ** -0.5)

    def _sizes(self, x: Tensor) -> tuple[Any, ...]:
        width = x.shape[-1] // 3
        sequences = x.shape[0] * x.shape[1] // self.length
        return sequences, self.length, self.heads, width // self.heads, self._scale(x)

    def _apart(self, x: Tensor, parts: int) -> Tensors:
        """(T, N, parts · heads · d) -> so many (T · sequences · heads, L, d)."""
        d = x.shape[-1] // parts // self.heads
        y = x.reshape(-1, self.length, parts, self.heads, d).permute(2, 0, 3, 1, 4)
        return y.reshape(parts, -1, self.length, d).unbind(0)

    def _together(self, x: Tensor, tasks: int) -> Tensor:
        """The way back, of one part or of a stack of them."""
        y = x.view(-1, x.shape[-3] // self.heads, self.heads, *x.shape[-2:])
        return y.permute(1, 3, 0, 2, 4).reshape(tasks, -1, len(y) * self.heads * x.shape[-1])


def row_mean(x: Tensor) -> Tensor:
    """⟨x⟩, the mean of each row: (…, n) -> (…, 1)."""
    return x.mean(-1, keepdim=True)


def _along(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def of_softmax(g: Tensor, p: Tensor) -> Tensor:
    """p (g − Σ g p), the backward pass of p = softmax(s)."""
    if fast.SOFTMAX_BACKWARD is None:
        return p * (g - _along(g, p))
    found: Tensor = fast.SOFTMAX_BACKWARD(g, p, -1, p.dtype)
    return found


def _projected(t: Tensor, x: Tensor, kept: Kept) -> Tensor:
    """P t."""
    _, r, mean = kept
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        t, x, x.shape[-1:], mean, r, None, None, [True, False, False]
    )[0]
    return found


# A layer as one function ---------------------------------------------------------------------


def answer(row: Row, x: Tensor, w: Tensors) -> Tensor:
    """What a row gives for x (T, N, n), with derivatives of any order."""
    y: Tensor = _Forward.apply(row, x, *w)
    return y


def layer(
    heads: int,
    length: int,
    eps: tuple[float, float],
    first: bool,
    act: type[Gelu | Relu],
    like: Tensor,
) -> Row:
    """`nn.TransformerEncoderLayer`: attention and feed-forward, each with its norm `first` or after it.

    Its weights are in the order in which they are used.
    """
    own = kernels_for(like)
    attends = (Linear(), attention(heads, length, like), Linear())
    feeds = (Linear(), Gelu(own) if act is Gelu else Relu(), Linear())
    norms = [norm(e, like) for e in eps]
    if first:
        return Row((Row((norms[0], *attends), True), Row((norms[1], *feeds), True)))
    return Row((Row(attends, True), norms[0], Row(feeds, True), norms[1]))


def attention(heads: int, length: int, like: Tensor) -> Attention:
    """For rows of the width of `like`, in sequences of `length`."""
    fits = max(length, like.shape[-1] // heads) * like.itemsize <= FEW
    return Attention(heads, length, kernels_for(like) if fits else None)


def norm(eps: float, like: Tensor) -> Norm:
    """For rows of the width of `like`."""
    return Norm(eps, kernels_for(like) if like.shape[-1] <= WIDE else None)


class _Forward(Function):
    apply: ClassVar[Any]

    @staticmethod
    def forward(ctx: Any, row: Row, x: Tensor, *w: Tensor) -> Tensor:
        y, kept = row.forward(x, w)
        ctx.row, ctx.form = row, _form(kept)
        ctx.save_for_backward(x, *w, *_flat(kept))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        n = ctx.row.weights
        return None, *_Backward.apply(ctx.row, (ctx.form, rest[n:]), g, x, *rest[:n])


class _Backward(Function):
    apply: ClassVar[Any]

    @staticmethod
    def forward(ctx: Any, row: Row, left: Any, g: Tensor, x: Tensor, *w: Tensor) -> Any:
        form, tensors = left
        kept = _nest(form, iter(tensors))
        gx, gw, more = row.backward(g, x, w, kept)
        ctx.row, ctx.form = row, (form, _form(more))
        ctx.save_for_backward(g, x, *w, *tensors, *_flat(more))
        return gx, *gw

    @staticmethod
    def backward(ctx: Any, v: Tensor, *u: Tensor) -> Any:
        g, x, *rest = ctx.saved_tensors
        row, n = ctx.row, ctx.row.weights
        w = rest[:n]
        if torch.is_grad_enabled():  # for a third order, which autograd knows
            return None, None, *_by_autograd(row, (v, *u), g, x, w)
        kept, more = _nest(ctx.form, iter(rest[n:]))
        to_g, local = row.along(v, u, g, x, w, kept, more)
        return None, None, to_g, *_together(row.again(None, x, w, kept, more, local))


def _together(found: tuple[Tensor, list[Tensor | None]]) -> tuple[Tensor | None, ...]:
    return found[0], *found[1]


def _by_autograd(row: Row, v: Tensors, g: Tensor, x: Tensor, w: Tensors) -> Sequence[Tensor | None]:
    """The cotangents of g, x and w, and differentiable."""
    at = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, *w)]
    first = torch.autograd.grad(row.written(at[1], at[2:]), at[1:], at[0], create_graph=True)
    found: Sequence[Tensor | None] = torch.autograd.grad(
        first, at, v, create_graph=True, allow_unused=True
    )
    return found


def _flat(nest: Any) -> list[Tensor]:
    return [nest] if isinstance(nest, Tensor) else [t for part in nest for t in _flat(part)]


def _form(nest: Any) -> Any:
    """The nest with nothing where its tensors are."""
    return None if isinstance(nest, Tensor) else [_form(part) for part in nest]


def _nest(form: Any, tensors: Iterator[Tensor]) -> Any:
    return next(tensors) if form is None else [_nest(part, tensors) for part in form]


# In C ----------------------------------------------------------------------------------------

FEW = 256
"""Bytes of a row of scores or of a head: up to here what a head needs is in the cache, and fits on a thread's stack."""
WIDE = 4096
"""Numbers in a row of a layer norm up to which its sums fit there."""
ADDRESS, SIZE, REAL, FLAG = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double, ctypes.c_int
HEADS = [*[SIZE] * 4, REAL, FLAG]
ARGUMENTS = {
    "attention": [ADDRESS, *HEADS, *[ADDRESS] * 2],
    "attention_backward": [*[ADDRESS] * 3, *HEADS, FLAG, ADDRESS],
    "attention_twice": [*[ADDRESS] * 4, *HEADS, *[ADDRESS] * 2],
    "norm": [*[ADDRESS] * 3, REAL, *[SIZE] * 3, FLAG, *[ADDRESS] * 3],
    "norm_backward": [*[ADDRESS] * 4, *[SIZE] * 3, FLAG, FLAG, *[ADDRESS] * 3],
    "norm_twice": [*[ADDRESS] * 7, *[SIZE] * 3, FLAG, *[ADDRESS] * 3],
    "gelu": [ADDRESS, SIZE, FLAG, *[ADDRESS] * 3],
    "gelu_twice": [*[ADDRESS] * 4, SIZE, FLAG, *[ADDRESS] * 2],
}


class Kernels:
    """The functions of `encoder.c` for one dtype."""

    def __init__(self, library: Any):
        self.functions = {name: getattr(library, name) for name in ARGUMENTS}
        for name, kinds in ARGUMENTS.items():
            self.functions[name].argtypes, self.functions[name].restype = kinds, None

    def call(self, name: str, given: Any, out: Tensors, *onto: int) -> None:
        """Run one: what it is given, how many threads, whether it adds onto what is in `out`, where its results go."""
        many = out[0].numel() > 1 << 14
        held = [t.contiguous() if isinstance(t, Tensor) else t for t in given]
        threads = torch.get_num_threads() if many else 1
        args = [*held, threads, *onto, *out]
        self.functions[name](*(t.data_ptr() if isinstance(t, Tensor) else t for t in args))


def _fresh(x: Tensor) -> Tensor:
    """A tensor of x's shape, one number after the other in memory."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def kernels_for(like: Tensor) -> Kernels | None:
    """The kernels for tensors such as this one; None where there are none."""
    known = type(like) is Tensor and like.is_cpu and like.dtype in compiled.KINDS
    return kernels(like.dtype) if known and not fast.plain() else None


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for a dtype, once they gave what torch's operations give, on odd sizes; None where they cannot be had."""
    found = compiled.library("encoder", REAL=compiled.KINDS[dtype])
    if found is None:
        return None
    own = Kernels(found)
    return own if _right(own, dtype) else None


def _right(own: Kernels, dtype: torch.dtype) -> bool:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = [_passes(k, dtype) for k in (own, None)]
    return compiled.agree(*found)


def _passes(own: Kernels | None, dtype: torch.dtype) -> list[Tensor]:
    """What all passes give, for two tasks of two sequences of five rows, with two heads of three numbers."""

    def wave(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(1.0, count + 1, dtype=dtype, device="cpu").mul(7).sin().view(shape)

    row = Row(
        (Norm(1e-5, own), Linear(), Attention(2, 5, own), Gelu(own), Linear(), Norm(0.1, own))
    )
    w = [wave(2, 6), wave(2, 6), wave(2, 18, 6), wave(2, 18)]
    w += [wave(2, 4, 6), wave(2, 4), wave(2, 4), wave(2, 4)]
    x, g = 3 * wave(2, 10, 6), wave(2, 10, 4)
    y, kept = row.forward(x, w)
    gx, gw, more = row.backward(g, x, w, kept)
    to_g, local = row.along(x.cos(), [t.cos() for t in w], g, x, w, kept, more)
    to_x, to_w = row.again(g.cos(), x, w, kept, more, local)
    return [y, gx, *gw, to_g, to_x, *(t for t in to_w if t is not None)]
