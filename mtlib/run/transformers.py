"""What transformers are made of, as modules of a private copy: as torch computes them, but for many tasks under `vmap`.

There a layer norm has its own passes, since torch's has a silently wrong second order (pytorch/functorch issue 534); a
linear layer sees all rows of a task as one matrix, where torch would copy its weights for each sequence; and
self-attention takes its heads apart once.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlib.run import fast
from mtlib.run.rows import Tensors, by_rows

# Layer norm ----------------------------------------------------------------------------------
#
# x̂ = (x − μ)·r with r = 1/√(σ² + ε) for each row, ⟨·⟩ the mean over a row, P t = r (t − ⟨t⟩ − x̂ ⟨t x̂⟩) = ∂x̂/∂x t.
#   forward    y = γ x̂ + β
#   backward   g_x = P h with h = γ g,  g_γ = Σ g x̂,  g_β = Σ g  over the rows of a task
#   twice      for cotangents v, v_γ, v_β:  g: γ P v + v_γ x̂ + v_β,  γ: Σ g P v,
#              x: P c − r x̂ ⟨h P v⟩ with c = g v_γ − r (h ⟨v x̂⟩ + v ⟨h x̂⟩)


def layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.layer_norm`, whose derivatives are right under `vmap`, too."""
    n = math.prod(shape)
    w = x.new_ones(1, n) if weight is None else weight.reshape(1, n)
    b = x.new_zeros(1, n) if bias is None else bias.reshape(1, n)
    return _layer_norm(eps)(x.reshape(-1, n), w, b).view(x.shape)


@cache
def _layer_norm(eps: float) -> Any:
    """(x (T·R, n), γ (T, n), β (T, n)) -> y (T·R, n)."""

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensors:
        if len(w) == 1:
            return torch.native_layer_norm(x, w.shape[1:], w[0], b[0], eps)
        hat, mean, r = torch.native_layer_norm(x, w.shape[1:], None, None, eps)
        return torch.addcmul(b[:, None], _tasks(hat, w), w[:, None]).view_as(x), mean, r

    def backward(g: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, r: Tensor) -> Tensors:
        gt = _tasks(g, w)
        gx = _projected((gt * w[:, None]).view_as(x), x, mean, r)
        gw = _tasks((x - mean).mul_(r), w).mul_(gt).sum(1)
        return gx, gw, gt.sum(1)

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
    ) -> Tensors:
        hat, gt = (x - mean).mul_(r), _tasks(g, w)
        h, pv = (gt * w[:, None]).view_as(x), _projected(v, x, mean, r)
        to_g = torch.addcmul(vb[:, None], _tasks(hat, w), vw[:, None])
        to_g = to_g.addcmul_(_tasks(pv, w), w[:, None]).view_as(x)
        c = (gt * vw[:, None]).view_as(x)
        c = c.addcmul_(h, _mean(v * hat) * r, value=-1).addcmul_(v, _mean(h * hat) * r, value=-1)
        to_x = _projected(c, x, mean, r).addcmul_(hat, _mean(h * pv) * r, value=-1)
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


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


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


def _of_softmax(g: Tensor, p: Tensor) -> Tensor:
    """p (g − Σ g p), the backward pass of p = softmax(s)."""
    found: Tensor = torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype)
    return found


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    p = _times(q, k.mT, _scale(q)).softmax(-1)
    return torch.bmm(p, v), p


def _attended_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensors:
    s, gp = _scale(q), torch.bmm(g, v.mT)
    gs = _of_softmax(gp, p)
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
    u = _of_softmax(a, p)  # of gp
    b = torch.bmm(g, vv.mT).addcmul_(a, gp - (gp * p).sum(-1, keepdim=True))
    b = _of_softmax(b.addcmul_(gp, (a * p).sum(-1, keepdim=True), value=-1), p)  # of q kᵀ s
    to_q = torch.baddbmm(_times(b, k, s), gs, vk, alpha=s)
    to_k = torch.baddbmm(_times(b.mT, q, s), gs.mT, vq, alpha=s)
    return torch.baddbmm(torch.bmm(p, vv), u, v), to_q, to_k, torch.bmm(u.mT, g)


_attention = by_rows(_reference, _attended, _attended_backward, _attended_twice, 3)


# As modules ----------------------------------------------------------------------------------


def as_torch_computes(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether torch's own operation is to run: outside of a transform, in half precision, or where dtypes differ."""
    known = x.dtype in (torch.float32, torch.float64)
    same = all(w is None or w.dtype == x.dtype for w in weights)
    return not (fast.transforming() and known and same) or torch.is_autocast_enabled(x.device.type)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if as_torch_computes(x, self.weight, self.bias):
            return super().forward(x)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with the rows of all but the last axis in one matrix."""
    if x.ndim < 3 or not fast.transforming():
        return F.linear(x, weight, bias)
    y: Tensor = F.linear(x.flatten(0, -2), weight, bias)
    return y.unflatten(0, x.shape[:-1])


class MultiheadAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        masks = ("key_padding_mask", "attn_mask", "is_causal")
        plain = (
            query is key is value
            and query.ndim == 3
            and self.batch_first
            and self._qkv_same_embed_dim
            and self.bias_k is None
            and not (self.add_zero_attn or args or kwargs.get("need_weights", True))
            and not any(kwargs.get(m) is not None and kwargs[m] is not False for m in masks)
            and not (self.training and self.dropout)
        )
        if not plain or as_torch_computes(query, self.in_proj_weight):
            return super().forward(query, key, value, *args, **kwargs)
        rows, length, width = query.shape
        parts = linear(query, self.in_proj_weight, self.in_proj_bias)
        parts = parts.view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = parts.reshape(3, rows * self.num_heads, length, -1).unbind(0)
        out = attention(*heads).view(rows, self.num_heads, length, -1).transpose(1, 2)
        out = out.reshape(rows, length, width)
        return linear(out, self.out_proj.weight, self.out_proj.bias), None


_OURS = (LayerNorm, Linear, MultiheadAttention)
_TWINS: dict[type, type] = {}


def twin(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of a private copy: one of those above where it computes what its base does."""
    if kind not in _TWINS:
        base = next((c for c in _OURS if kind.forward is c.__base__.forward), None)
        _TWINS[kind] = kind if base is None else type(kind.__name__, (base, kind), {})
    return kind if fast.plain() else _TWINS[kind]
