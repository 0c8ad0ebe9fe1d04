"""What transformers are made of, as modules of a private copy: as torch computes them, but for many tasks under `vmap`.

There a layer norm has its own passes, since torch's has a silently wrong second order (pytorch/functorch issue 534); a
linear layer sees all rows of a task as one matrix, where torch would copy its weights for each sequence; and
self-attention takes its heads apart once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlib.run import encoder, fast
from mtlib.run.encoder import of_softmax, row_mean
from mtlib.run.rows import Tensors, by_rows

# Layer norm ----------------------------------------------------------------------------------
#
# x̂ = (x − μ)·r with r = 1/√(σ² + ε) for each row, ⟨·⟩ the mean over a row, P t = r (t − ⟨t⟩ − x̂ ⟨t x̂⟩) = ∂x̂/∂x t.
#   forward    y = γ x̂ + β
#   backward   g_x = P h with h = γ g,  g_γ = Σ g x̂,  g_β = Σ g  over the rows of a task
#   twice      for cotangents v, v_γ, v_β:  g: γ P v + v_γ x̂ + v_β,  γ: Σ g P v,
#              x: P c − r x̂ ⟨h P v⟩ with c = g v_γ − r (h ⟨v x̂⟩ + v ⟨h x̂⟩)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, whose derivatives are right under `vmap`, too."""
    n, x, shape = math.prod(normalized_shape), input, tuple(normalized_shape)
    if any(t is not None and t.shape[-len(shape) :] != shape for t in (x, weight, bias)):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)  # which says what is wrong
    if unusual(x, weight, bias):
        return _written(x, len(normalized_shape), weight, bias, eps)
    w = x.new_ones(1, n) if weight is None else weight.reshape(1, n)
    b = x.new_zeros(1, n) if bias is None else bias.reshape(1, n)
    own = stacked(x, w, b)
    if own is None:
        return _layer_norm(eps)(x.reshape(-1, n), w, b).view_as(x)
    (xs, ws, bs), back = own
    with fast.OutsideOfVmap():
        rows = xs.reshape(len(xs), -1, n)
        row = encoder.Row((encoder.norm(eps, rows),))
        y = encoder.answer(row, rows, (ws[:, 0], bs[:, 0])).view(xs.shape)
    return back(y)


def _written(x: Tensor, axes: int, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """The same in torch's operations, in single precision at least."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over = tuple(range(-axes, 0))
        apart = wide - wide.mean(over, keepdim=True)
        y = apart * (apart.square().mean(over, keepdim=True) + eps).rsqrt()
        y = y if w is None else y * w.to(y.dtype)
        return (y if b is None else y + b.to(y.dtype)).to(x.dtype)


@cache
def _layer_norm(eps: float) -> Callable[..., Tensor]:
    """(x (T·R, n), γ (T, n), β (T, n)) -> y (T·R, n)."""

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensors:
        if len(w) == 1:
            found: Tensors = torch.ops.aten.native_layer_norm(x, w.shape[1:], w[0], b[0], eps)
            return found
        hat, mean, r = torch.ops.aten.native_layer_norm(x, w.shape[1:], None, None, eps)
        y = torch.addcmul(b[:, None], _tasks(hat, w), w[:, None])
        return y.view_as(x), mean, r, hat

    def backward(g: Tensor, x: Tensor, w: Tensor, b: Tensor, *kept: Tensor) -> Tensors:
        if len(w) == 1:
            gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
                g, x, w.shape[1:], *kept, w[0], b[0], [True, True, True]
            )
            return gx, gw[None], gb[None]
        mean, r, hat = kept
        gt = _tasks(g, w)
        gx = _projected((gt * w[:, None]).view_as(x), x, mean, r)
        return gx, (gt * _tasks(hat, w)).sum(1), gt.sum(1)

    def twice(
        v: Tensor,
        vw: Tensor,
        vb: Tensor,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor,
        mean: Tensor,
        r: Tensor,
        hat: Tensor | None = None,
    ) -> Tensors:
        hat, gt = (x - mean).mul_(r) if hat is None else hat, _tasks(g, w)
        h, pv = (gt * w[:, None]).view_as(x), _projected(v, x, mean, r)
        to_g = torch.addcmul(vb[:, None], _tasks(hat, w), vw[:, None])
        to_g = to_g.addcmul_(_tasks(pv, w), w[:, None]).view_as(x)
        c = (gt * vw[:, None]).view_as(x)
        c = c.addcmul_(h, row_mean(v * hat) * r, value=-1).addcmul_(
            v, row_mean(h * hat) * r, value=-1
        )
        to_x = _projected(c, x, mean, r).addcmul_(hat, row_mean(h * pv) * r, value=-1)
        return to_g, to_x, (gt * _tasks(pv, w)).sum(1), torch.zeros_like(b)

    def reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        hat = apart * (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
        y: Tensor = hat.view(len(w), -1, x.shape[-1]) * w[:, None] + b[:, None]
        return y.flatten(0, 1)

    return by_rows(reference, forward, backward, twice, 3)


def _tasks(x: Tensor, w: Tensor) -> Tensor:
    """(T·R, n) -> (T, R, n)."""
    return x.view(len(w), -1, x.shape[-1])


def _projected(t: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """P t."""
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        t, x, x.shape[-1:], mean, r, None, None, [True, False, False]
    )[0]
    return found


# Attention -----------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for each row: (R, L, d), (R, S, d), (R, S, e) -> (R, L, e)."""
    return _attention(q, k, v)


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * _scale(q), -1) @ v


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _times(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s a b."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=s)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    p = _times(q, k.mT, _scale(q)).softmax(-1)
    return torch.bmm(p, v), p


def _attended_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensors:
    s, gp = _scale(q), torch.bmm(g, v.mT)
    gs = of_softmax(gp, p)
    return _times(gs, k, s), _times(gs.mT, q, s), torch.bmm(p.mT, g), gp, gs


def _attended_twice(
    vq: Tensor,
    vk: Tensor,
    vv: Tensor,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    gp: Tensor,
    gs: Tensor,
) -> Tensors:
    s = _scale(q)
    a = torch.baddbmm(_times(vq, k.mT, s), q, vk.mT, alpha=s)  # of gs
    u = of_softmax(a, p)  # of gp
    b = torch.bmm(g, vv.mT).addcmul_(a, gp - (gp * p).sum(-1, keepdim=True))
    b = of_softmax(b.addcmul_(gp, (a * p).sum(-1, keepdim=True), value=-1), p)  # of q kᵀ s
    to_q = torch.baddbmm(_times(b, k, s), gs, vk, alpha=s)
    to_k = torch.baddbmm(_times(b.mT, q, s), gs.mT, vq, alpha=s)
    return torch.baddbmm(torch.bmm(p, vv), u, v), to_q, to_k, torch.bmm(u.mT, g)


_attention = by_rows(_reference, _attended, _attended_backward, _attended_twice, 3)


# As modules ----------------------------------------------------------------------------------


def unusual(x: Tensor, *weights: Tensor | None) -> bool:
    """Half precision, dtypes that differ, or autocast: for these the passes above are not made. Nor for no numbers."""
    known = x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    same = all(w is None or w.dtype == x.dtype for w in weights)
    return not (known and same) or torch.is_autocast_enabled(x.device.type)


def stacked(*tensors: Tensor | None) -> tuple[list[Any], Callable[[Tensor], Tensor]] | None:
    """Tensors of one `vmap` with the axis of tasks in front, and the way back; None where they are not to be had."""
    way = fast.way_to_autograd() if fast.transforming() else None
    return None if way is None else ([None if t is None else way[0](t) for t in tensors], way[1])


def _normed(module: nn.LayerNorm, x: Tensor) -> Tensor:
    if not (fast.transforming() and isinstance(x, Tensor)):
        return nn.LayerNorm.forward(module, x)
    return layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if not (fast.transforming() and isinstance(x, Tensor) and x.ndim > 1):
        return nn.Linear.forward(module, x)
    given = (x, module.weight, module.bias)
    own = stacked(*given) if fast.mapped(module.weight) else None
    if own is None:
        return linear(*given)
    with fast.OutsideOfVmap():
        y = linear(*own[0])
    return own[1](y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, the rows of all but the last axis in one matrix; with weights (T, m, n) of tasks, x (T, ..., n)."""
    if weight.ndim == 3:
        rows, w = x.flatten(1, -2), weight.mT
        y = torch.bmm(rows, w) if bias is None else torch.baddbmm(bias[:, None], rows, w)
        return y.view(*x.shape[:-1], -1)
    if x.ndim < 3:
        return F.linear(x, weight, bias)
    y = F.linear(x.flatten(0, -2), weight, bias)
    return y.view(*x.shape[:-1], -1)


def _attends(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
) -> Any:
    """Self-attention without masks by `attention` above, all else by torch."""
    masks = ("key_padding_mask", "attn_mask", "is_causal")
    simple = (
        query is key is value
        and isinstance(query, Tensor)
        and query.ndim == 3
        and module.batch_first
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not (module.add_zero_attn or args or kw.get("need_weights", True))
        and not any(kw.get(m) is not None and kw[m] is not False for m in masks)
        and not (module.training and module.dropout)
    )
    if not (simple and fast.transforming()) or unusual(query, module.in_proj_weight):
        return nn.MultiheadAttention.forward(module, query, key, value, *args, **kw)
    out = module.out_proj
    given: Any = (query, module.in_proj_weight, module.in_proj_bias, out.weight, out.bias)
    way = fast.way_to_autograd() if fast.in_one_vmap() and _own(*given) else None
    if way is None:
        return self_attention(module.num_heads, *given), None
    x, *pairs = way[0](query), given[1:3], given[3:]  # weights that all tasks share are one matrix
    pairs = [[t if t is None else way[0](t) for t in p] if _own(*p) else p for p in pairs]
    with fast.OutsideOfVmap():
        y = self_attention(module.num_heads, x, *pairs[0], *pairs[1])
    return way[1](y), None


def _own(*weights: Tensor | None) -> bool:
    """Whether each task has one of these weights for itself."""
    return any(t is not None and fast.mapped(t) for t in weights)


def self_attention(
    heads: int, x: Tensor, w: Tensor, b: Tensor | None, out: Tensor, shift: Tensor | None
) -> Tensor:
    """What `nn.MultiheadAttention` gives for sequences x (..., L, D), with projections W (3D, D) and `out` (D, D)."""
    length, width = x.shape[-2:]
    qkv = linear(x, w, b)
    if fast.untransformed():
        row = encoder.Row((encoder.attention(heads, length, x),))
        y = encoder.answer(row, qkv.view(1, -1, 3 * width), ())
    else:
        parts = qkv.view(-1, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.reshape(3, -1, length, width // heads).unbind(0)
        y = attention(q, k, v).view(-1, heads, length, width // heads).transpose(1, 2)
    return linear(y.reshape(x.shape), out, shift)


def _encoded(
    module: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Any:
    """A whole layer of an encoder by `encoder.answer`, where all of its weights are the tasks' own; else part by part."""
    masks = (src_mask, src_key_padding_mask)
    if not any(m is not None for m in masks) and not is_causal and isinstance(src, Tensor):
        parts = _parts(module, src)
        own = stacked(src, *parts[1]) if parts else None
        if parts and own:
            (x, *w), back = own
            with fast.OutsideOfVmap():
                y = encoder.answer(parts[0], x.flatten(1, 2), w).view(x.shape)
            return back(y)
    return nn.TransformerEncoderLayer.forward(
        module, src, src_mask, src_key_padding_mask, is_causal
    )


def _parts(m: nn.TransformerEncoderLayer, x: Tensor) -> tuple[encoder.Row, list[Any]] | None:
    """A layer as a row of parts, and their weights; None where a part is another than torch's, looked at, or random."""
    a, drops = m.self_attn, (m.dropout, m.dropout1, m.dropout2)
    kinds = {
        nn.MultiheadAttention: (a,),
        nn.Linear: (m.linear1, m.linear2),
        nn.LayerNorm: (m.norm1, m.norm2),
        nn.Dropout: drops,
    }
    act = _activation(m.activation)
    if not (
        type(m) is nn.TransformerEncoderLayer
        and vars(m).keys().isdisjoint(("_sa_block", "_ff_block"))
        and fast.in_one_vmap()
        and fast.unwatched()
        and all(type(k) is kind and _untouched(k) for kind, own in kinds.items() for k in own)
        and not any(d.p and d.training for d in drops)
        and not (a.dropout and a.training)
        and a._qkv_same_embed_dim
        and a.batch_first
        and a.bias_k is None
        and not a.add_zero_attn
        and act
        and type(x) is Tensor
        and x.ndim == 3
        and x.shape[-1:] == m.norm1.normalized_shape == m.norm2.normalized_shape
    ):
        return None
    attends = [a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias]
    feeds = [m.linear1.weight, m.linear1.bias, m.linear2.weight, m.linear2.bias]
    norms = [[m.norm1.weight, m.norm1.bias], [m.norm2.weight, m.norm2.bias]]
    w = [*attends, *norms[0], *feeds, *norms[1]]
    if m.norm_first:
        w = [*norms[0], *attends, *norms[1], *feeds]
    if unusual(x, *w) or not all(type(t) is Tensor and fast.IS_BATCHED(t) for t in w):
        return None
    eps = m.norm1.eps, m.norm2.eps
    return encoder.layer(a.num_heads, x.shape[1], eps, m.norm_first, act, x), w


def _activation(act: Any) -> type[encoder.Gelu | encoder.Relu] | None:
    """The part for what a layer has between its linear ones, if there is one."""
    if act is F.gelu or (type(act) is nn.GELU and act.approximate == "none" and _untouched(act)):
        return encoder.Gelu
    return encoder.Relu if act is F.relu or (type(act) is nn.ReLU and _untouched(act)) else None


def _untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says, and nobody looks."""
    own = vars(module)
    return not any(own[k] for k in fast.MODULE_HOOKS) and ("forward" not in own or is_exact(module))


_OURS: dict[Any, Callable[..., Any]] = {
    nn.TransformerEncoderLayer.forward: _encoded,
    nn.LayerNorm.forward: _normed,
    nn.Linear.forward: _linear,
    nn.MultiheadAttention.forward: _attends,
}


class Own:
    """The `forward` of one module of a private copy, by a function above. The module keeps its class, for who asks for it.

    It does not hold its module, which would then hold θ until Python's collector comes.
    """

    __slots__ = ("function", "module")

    def __init__(self, function: Callable[..., Any], module: nn.Module):
        self.function, self.module = function, ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module(), *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:  # it would go on with the module that was copied
        raise TypeError("a layer cannot be copied inside of a forward pass under vmap")


def own_forward(module: nn.Module) -> Own | None:
    """Ours in the place of torch's own `forward`, while a transform is at work; None where a module's is another."""
    function = _OURS.get(type(module).forward)
    return Own(function, module) if function and fast.transforming() and not fast.plain() else None


def is_exact(module: nn.Module) -> bool:
    """Whether a module of a private copy runs by a function above."""
    return isinstance(vars(module).get("forward"), Own)
