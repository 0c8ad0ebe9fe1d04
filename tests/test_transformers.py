"""Layer norm, attention and linear layers of many tasks: exact under `vmap` to any order, whoever takes the gradient."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode, parameters
from mtlib.learners.gradient import maml
from mtlib.run.copies import private, replaced
from mtlib.run.fast import by_reference
from mtlib.run.transformers import Own, attention, is_exact, layer_norm

T = 3
NORMS = {
    "affine": ((4,), (0, 0, 0)),
    "two axes": ((3, 4), (0, 0, 0)),
    "shared affine": ((4,), (0, None, None)),
    "shared x": ((4,), (None, 0, 0)),
    "shared bias": ((4,), (0, 0, None)),
}


def reals(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def written(x, shape, w=None, b=None, eps=1e-5):
    over = tuple(range(-len(shape), 0))
    apart = x - x.mean(over, keepdim=True)
    y = apart * (apart.square().mean(over, keepdim=True) + eps).rsqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def orders(f, xs, highest=3):
    """Value and gradients of each order, of scalars made from the one before."""
    leaves = [x.clone().requires_grad_() for x in xs]
    found = [f(*leaves)]
    now = found[0].sin().sum()
    for _ in range(highest):
        grads = torch.autograd.grad(now, leaves, create_graph=True, materialize_grads=True)
        found += grads
        now = sum(g.sin().sum() for g in grads)
    return found


def gap(a, b):
    return max(
        ((x - y).abs().max() / (1 + y.abs().max())).item() for x, y in zip(a, b, strict=True)
    )


def mapped(f, dims, xs):
    """Gradients taken by functorch in each task, differentiated outside."""
    taken = torch.func.grad(lambda *a: f(*a).sin().sum(), argnums=tuple(range(len(xs))))

    def task(*a):
        return sum(g.sin().sum() for g in taken(*a))

    return lambda *a: torch.vmap(task, in_dims=dims)(*a)


def one_by_one(f, dims, xs):
    taken = torch.func.grad(lambda *a: f(*a).sin().sum(), argnums=tuple(range(len(xs))))

    def task(*a):
        return sum(g.sin().sum() for g in taken(*a))

    def loop(*a):
        parts = [[v if d is None else v[t] for v, d in zip(a, dims, strict=True)] for t in range(T)]
        return torch.stack([task(*p) for p in parts])

    return loop


@pytest.mark.fast
@pytest.mark.parametrize("name", NORMS)
def test_a_layer_norm_is_exact_under_vmap_to_third_order(name):
    torch.manual_seed(0)
    shape, dims = NORMS[name]
    parts = [(5, *shape), shape, shape]
    xs = [reals(*([T] if d == 0 else []), *p) for p, d in zip(parts, dims, strict=True)]
    ours, plain = (lambda x, w, b, g=g: g(x, shape, w, b) for g in (layer_norm, written))
    one = [x if d is None else x[0] for x, d in zip(xs, dims, strict=True)]
    assert gap(orders(ours, one), orders(plain, one)) <= 1e-10
    a = orders(mapped(ours, dims, xs), xs, 2)
    assert gap(a, orders(one_by_one(plain, dims, xs), xs, 2)) <= 1e-10


@pytest.mark.fast
def test_attention_is_exact_under_vmap_to_third_order():
    torch.manual_seed(0)
    xs, dims = [reals(T, 2, 5, 4), reals(T, 2, 6, 4), reals(T, 2, 6, 3)], (0, 0, 0)

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v

    a = orders(mapped(attention, dims, xs), xs, 2)
    assert gap(a, orders(one_by_one(plain, dims, xs), xs, 2)) <= 1e-10
    one = [x[0] for x in xs]
    assert gap(orders(attention, one), orders(plain, one)) <= 1e-10


@pytest.mark.fast
def test_nested_transforms_and_no_grad():
    torch.manual_seed(0)
    x, w, b = reals(T, 2, 5, 4), reals(T, 4), reals(4)

    def f(g):
        return torch.vmap(torch.vmap(lambda x, w: g(x, (4,), w, b), (0, None)), (0, 0))(x, w)

    assert gap([f(layer_norm)], [f(written)]) <= 1e-12
    with torch.no_grad():
        assert gap([f(layer_norm)], [f(written)]) <= 1e-12


@pytest.mark.fast
def test_half_precision_and_no_rows():
    x = torch.randn(2, 5, 4).bfloat16()
    w, b = torch.randn(4), torch.randn(4)
    f = torch.vmap(lambda x: layer_norm(x, (4,), w.bfloat16(), b.bfloat16()))
    assert (f(x) - F.layer_norm(x, (4,), w.bfloat16(), b.bfloat16())).abs().max() < 0.1
    assert torch.vmap(lambda x: layer_norm(x, (4,)))(torch.ones(2, 0, 4)).shape == (2, 0, 4)


def test_torchs_own_layer_norm_is_wrong_under_vmap_which_is_why():
    """The day this fails torch is mended."""
    torch.manual_seed(0)
    xs, dims = [reals(T, 5, 4), reals(T, 4), reals(T, 4)], (0, 0, 0)

    def native(x, w, b):
        return F.layer_norm(x, (4,), w, b)

    a = orders(mapped(native, dims, xs), xs, 1)
    assert gap(a, orders(one_by_one(native, dims, xs), xs, 1)) > 1e-3


# In a network --------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self, functional=False, first=True):
        super().__init__()
        self.read, self.head, self.functional = nn.Linear(2, 8), nn.Linear(8, 1), functional
        self.block = nn.TransformerEncoderLayer(
            *(8, 2, 12, 0.0, "gelu"), batch_first=True, norm_first=first
        )

    def forward(self, x):
        h = self.block(self.read(x))[:, -1]
        return self.head(F.layer_norm(h, (8,)) if self.functional else h)


def data():
    torch.manual_seed(1)
    return Episode(*(Batch(reals(T, 3, 5, 2), reals(T, 3, 1)) for _ in range(2)))


def grads(net, way=None, **settings):
    learner = maml(net, F.mse_loss, 0.1, 2)
    objective = bilevel(learner, F.mse_loss, way, **settings)
    for _ in range(2):
        found = objective.value_and_grad(learner.init(), data())[1]
    return [*found.values()]


@pytest.mark.fast
@pytest.mark.parametrize("way", [None, first_order])
@pytest.mark.parametrize("by_functorch", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_a_transformer_runs_together_and_is_the_loop(way, by_functorch, functional, monkeypatch):
    torch.manual_seed(0)
    net = Reader(functional).double()
    monkeypatch.setenv("MTLIB_PLAIN", "1")
    right = grads(net, way, chunk=1)
    monkeypatch.setenv("MTLIB_PLAIN", "0")
    monkeypatch.setattr("mtlib.objective.Batched.loop", None)
    if by_functorch:
        with by_reference():
            found = grads(net, way)
    else:
        found = grads(net, way)
    assert gap(found, right) <= 1e-10


@pytest.mark.parametrize("functional", [False, True])
def test_autocast_is_near(functional):
    torch.manual_seed(0)
    net, right = Reader(functional), None
    learner = maml(net, F.mse_loss, 0.1, 1)
    few = Episode(*(Batch(b.x.float(), b.y.float()) for b in data()))
    right = bilevel(learner, F.mse_loss, chunk=1).value_and_grad(learner.init(), few)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = bilevel(learner, F.mse_loss).value_and_grad(learner.init(), few)[1]
    far = sum((found[k] - right[k]).square().sum() for k in right) / sum(
        v.square().sum() for v in right.values()
    )
    assert far.sqrt() < 0.1


class Narrow(nn.Module):
    """A layer norm of four numbers that is asked to norm rows of eight."""

    def __init__(self, functional):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        self.norm, self.functional = nn.LayerNorm(4), functional

    def forward(self, x):
        z = self.body(x)
        own = self.norm.weight, self.norm.bias
        return self.head(F.layer_norm(z, (4,), *own) if self.functional else self.norm(z))


@pytest.mark.parametrize("functional", [False, True])
def test_rows_of_another_width_are_an_error_and_not_cut_in_pieces(functional):
    net = Narrow(functional).double()
    learner = maml(net, F.mse_loss, 0.1, 1)
    data = Episode(*[Batch(reals(T, 5, 3), reals(T, 5, 1)) for _ in range(2)])
    with pytest.raises(ValueError, match="normalized_shape"):
        bilevel(learner, F.mse_loss).value_and_grad(learner.init(), data)
    for wrong in [(reals(5, 8), None), (reals(5, 4), reals(2, 2)), (reals(5, 4), reals(1))]:
        with pytest.raises(RuntimeError, match=r"normalized_shape|weight"):
            torch.vmap(lambda x, w=wrong[1]: layer_norm(x, (4,), w))(wrong[0][None])


class Asking(nn.Module):
    """A network that asks its layers for their class."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() if type(layer) is nn.Linear else 3 * layer(x)
        return x


def test_layers_keep_their_class_for_a_network_that_asks(monkeypatch):
    learner = maml(Asking().double(), F.mse_loss, 0.1, 2)
    data = Episode(*[Batch(reals(T, 5, 4), reals(T, 5, 1)) for _ in range(2)])
    together = bilevel(learner, F.mse_loss).value_and_grad(learner.init(), data)
    monkeypatch.setenv("MTLIB_PLAIN", "1")
    plain = bilevel(learner, F.mse_loss).value_and_grad(learner.init(), data)
    assert gap([together[0], *together[1].values()], [plain[0], *plain[1].values()]) < 1e-12


def test_a_layer_that_is_copied_in_a_forward_pass_is_an_error():
    """The copy would go on with the weights of the layer that it was made of."""
    with pytest.raises(TypeError, match="cannot be copied inside of a forward pass"):
        copy.deepcopy(Own(lambda module: None, nn.Linear(1, 1)))


@pytest.mark.fast
def test_a_private_copy_goes_when_nobody_holds_it():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    gone = []

    def task(x):
        copied = private(net, parameters(net)).net
        assert is_exact(copied[0]) and is_exact(copied[1])
        gone.append(weakref.ref(copied[0]))
        return copied(x)

    gc.disable()
    try:
        torch.vmap(task)(reals(T, 5, 4))
        assert gone[0]() is None
    finally:
        gc.enable()


def test_a_copy_of_a_copy_has_the_weights_that_it_was_given():
    """As where a wrapped network is looked at under vmap."""
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double()
    twice = {k: 2 * v for k, v in parameters(net).items()}
    place = nn.Sequential(net, nn.Identity())

    def task(x):
        once = private(net, parameters(net)).net
        again = private(once, twice).net
        held = replaced(nn.Sequential(once, nn.Identity()), "1", nn.Identity())[0]
        return once[0](x), again[0](x), once(x), again(x), held(x)

    x = reals(T, 5, 2)
    first, doubled, normed, again, held = torch.vmap(task)(x)
    assert torch.allclose(first, net[0](x)) and torch.allclose(doubled, 2 * net[0](x))
    assert torch.allclose(normed, net(x)) and torch.allclose(held, place(x))
    assert torch.allclose(again, 2 * F.layer_norm(2 * net[0](x), (2,)))
