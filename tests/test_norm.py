"""The norm's three passes against autograd on the formula written out, and under every transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlib.norm import Norm

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2)]


def plain(x, weight, bias, eps=1e-5):
    axes = [i for i in range(x.ndim) if i != 1]
    centred = x - x.mean(axes, keepdim=True)
    c = (-1, *[1] * (x.ndim - 2))
    return centred * ((centred**2).mean(axes, keepdim=True) + eps).rsqrt() * weight.view(
        c
    ) + bias.view(c)


def ours(x, weight, bias):
    return torch.func.functional_call(Norm(len(weight)), {"weight": weight, "bias": bias}, (x,))


def inputs(shape, seed=0, lead=()):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*lead, *s, generator=g, dtype=torch.float64)
        for s in (shape, shape[1:2], shape[1:2])
    ]


def scalar(f):
    return lambda *a: (f(*a) ** 3).sum() + f(*a).sin().sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_two_orders_of_gradients_equal_the_formula(shape):
    args = inputs(shape)
    directions = inputs(shape, seed=1)
    assert (ours(*args) - plain(*args)).abs().max() <= 1e-12
    first = [torch.func.grad(scalar(f), (0, 1, 2))(*args) for f in (ours, plain)]
    second = [
        torch.func.vjp(torch.func.grad(scalar(f), (0, 1, 2)), *args)[1](tuple(directions))
        for f in (ours, plain)
    ]
    for pair in (first, second):
        assert max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True)) <= 1e-10


def test_gradcheck():
    args = [a.requires_grad_() for a in inputs((5, 2, 3))]
    assert torch.autograd.gradcheck(ours, args) and torch.autograd.gradgradcheck(ours, args)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", ["nothing", "weights", "images"])
def test_vmap_equals_the_loop_to_second_order(shape, shared):
    args = inputs(shape, lead=(3,))
    dims = [0, 0, 0]
    for i in {"nothing": (), "weights": (1, 2), "images": (0,)}[shared]:
        args[i], dims[i] = args[i][0], None
    v = inputs(shape, seed=2)

    def twice(x, w, b):
        gradient = torch.func.grad(scalar(ours), (0, 1, 2))
        return gradient(x, w, b), torch.func.vjp(gradient, x, w, b)[1](tuple(v))

    many = torch.vmap(twice, in_dims=tuple(dims))(*args)
    for t in range(3):
        one = twice(*(a if d is None else a[t] for a, d in zip(args, dims, strict=True)))
        for order in (0, 1):
            for a, b in zip(many[order], one[order], strict=True):
                assert (a[t] - b).abs().max() <= 1e-10


def test_a_hessian_by_vmapped_backward_passes_is_right():
    """torch.func.hessian runs the backward pass under vmap; torch's own norm is wrong there too."""
    x, w, b = inputs((4, 2))
    h = [
        torch.func.jacrev(torch.func.jacrev(lambda x, f=f: scalar(f)(x, w, b)))(x)
        for f in (ours, plain)
    ]
    assert (h[0] - h[1]).abs().max() <= 1e-10


def test_nested_vmap():
    args = inputs((4, 2, 3), lead=(2, 3))
    assert (
        torch.vmap(torch.vmap(ours))(*args)
        - torch.stack([torch.vmap(ours)(*(a[i] for a in args)) for i in range(2)])
    ).abs().max() <= 1e-12


@pytest.mark.fast
def test_the_third_order_is_refused_not_wrong():
    x, w, b = (a.requires_grad_() for a in inputs((5, 2)))
    g = torch.autograd.grad(scalar(ours)(x, w, b), x, create_graph=True)[0]
    gg = torch.autograd.grad((g**2).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="not of third"):
        torch.autograd.grad((gg**2).sum(), x)
    f = scalar(lambda x: ours(x, w.detach(), b.detach()))
    third = torch.func.grad(
        lambda x: torch.func.grad(lambda x: (torch.func.grad(f)(x) ** 2).sum())(x).sum()
    )
    with pytest.raises(NotImplementedError, match="not of third"):
        third(x.detach())


def test_the_norm_equals_torchs_batch_norm():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (Norm(3).double()(x) - nn.BatchNorm2d(3).double()(x)).abs().max() <= 1e-12
