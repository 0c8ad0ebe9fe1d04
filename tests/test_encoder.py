"""A layer of a transformer encoder as one function with three passes, against torch's operations one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode
from mtlib.learners.gradient import maml
from mtlib.run import encoder
from mtlib.run.encoder import Attention, Gelu, Linear, Norm, Relu, Row
from mtlib.run.transformers import layer_norm

pytestmark = pytest.mark.fast

HAS = encoder.kernels(torch.float64)
WAYS = [
    None,
    pytest.param(HAS, marks=pytest.mark.skipif(HAS is None, reason="no C compiler here")),
]
T = 2


def reals(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def gap(a, b):
    return max(
        ((x - y).abs().max() / (1 + y.abs().max())).item() for x, y in zip(a, b, strict=True)
    )


def orders(f, xs, highest=3):
    """Values and gradients of each order below the highest with a graph, the last without one as well."""
    leaves = [x.clone().requires_grad_() for x in xs]
    found = [f(leaves[0], leaves[1:])]
    now = found[0].sin().sum()
    for order in range(1, highest + 1):
        if order > 1:
            found += torch.autograd.grad(now, leaves, retain_graph=True, materialize_grads=True)
        grads = torch.autograd.grad(now, leaves, create_graph=True, materialize_grads=True)
        found += grads
        now = sum(g.sin().sum() for g in grads)
    return found


PARTS = {
    "linear": (lambda own: Linear(), 6, [(4, 6), (4,)]),
    "relu": (lambda own: Relu(), 6, []),
    "gelu": (Gelu, 6, []),
    "norm": (lambda own: Norm(1e-3, own), 6, [(6,), (6,)]),
    "attention": (lambda own: Attention(2, 5, own), 18, []),
    "row": (lambda own: Row((Norm(0.1, own), Linear(), Gelu(own), Linear()), True), 6, None),
}
PARTS["row"] = (*PARTS["row"][:2], [(6,), (6,), (7, 6), (7,), (6, 7), (6,)])


@pytest.mark.fast
@pytest.mark.parametrize("own", WAYS)
@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_exact_to_third_order(name, own):
    make, width, shapes = PARTS[name]
    part = Row((make(own),))
    xs = [reals(T, 10, width), *(reals(T, *s, seed=i) / 2 for i, s in enumerate(shapes))]
    found = orders(lambda x, w: encoder.answer(part, x, w), xs)
    assert gap(found, orders(part.written, xs)) <= 1e-10


@pytest.mark.parametrize("own", WAYS)
@pytest.mark.parametrize(("length", "wide"), [(1, 1), (3, 17), (17, 3), (16, 16), (32, 32)])
def test_attention_of_any_size_is_softmax(length, wide, own):
    part, xs = Row((Attention(3, length, own),)), [reals(T, 2 * length, 9 * wide)]
    found = orders(lambda x, w: encoder.answer(part, x, w), xs, 2)
    assert gap(found, orders(part.written, xs, 2)) <= 1e-10
    x = xs[0].view(2 * T, length, 3, 3, wide)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(T, 2 * length, -1)
    assert gap([found[0]], [y]) <= 1e-12


@pytest.mark.skipif(HAS is None, reason="no C compiler here")
def test_single_precision_is_near_for_small_and_large_numbers():
    own = encoder.kernels(torch.float32)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 40, -40])])
    x = x.view(1, 1, -1)
    y, (first, second) = Gelu(own).forward(x, ())
    wide = x.double().requires_grad_()
    right = F.gelu(wide)
    (one,) = torch.autograd.grad(right.sum(), wide, create_graph=True)
    (two,) = torch.autograd.grad(one.sum(), wide)
    for a, b in ((y, right), (first, one), (second, two)):
        assert ((a - b).abs() <= 5e-7 * b.abs() + 3e-7).all()
    tail = (x < -2) & (x > -8)
    right = wide * torch.erfc(-wide * 0.5**0.5) / 2  # where 1 + erf has lost its digits
    assert ((y - right)[tail].abs() <= 5e-6 * right[tail].abs() + 1e-20).all()
    for size in (0.01, 1, 30):
        q = size * reals(1, 16, 48, dtype=torch.float32)
        found = Attention(2, 16, own).forward(q, ())[0]
        assert gap([found], [Attention(2, 16).forward(q.double(), ())[0]]) <= 3e-6 * (1 + size)


@pytest.mark.skipif(HAS is None, reason="no C compiler here")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_seen(bad):
    for dtype in (torch.float32, torch.float64):
        own = encoder.kernels(dtype)
        for part, width, w in [
            (Gelu(own), 6, []),
            (Attention(2, 5, own), 12, []),
            (Norm(1e-5, own), 6, [torch.ones(1, 6, dtype=dtype)] * 2),
        ]:
            x = reals(1, 5, width, dtype=dtype)
            x[0, 1, 0] = bad
            y = part.forward(x, w)[0]
            assert (y.isfinite() == part.written(x, w).isfinite()).all() and not y.isfinite().all()


@pytest.mark.parametrize("length", [encoder.FEW // 8, encoder.FEW // 8 + 1])
def test_what_would_not_fit_on_a_stack_goes_by_torch(length):
    x = reals(1, length, 6)
    assert encoder.attention(2, length, x).kernels is (HAS if length * 8 <= encoder.FEW else None)
    wide = reals(1, 2, encoder.WIDE + 1)
    assert encoder.norm(1e-5, wide).kernels is None
    y = torch.vmap(lambda x: layer_norm(x, x.shape[-1:]))(wide)
    assert gap([y], [F.layer_norm(wide, wide.shape[-1:])]) <= 1e-12


@pytest.mark.skipif(HAS is None, reason="no C compiler here")
def test_threads_change_nothing():
    row = Row((Norm(1e-5, HAS), Linear(), Attention(4, 16, HAS), Gelu(HAS)))
    w = [reals(8, 64), reals(8, 64), reals(8, 192, 64), reals(8, 192)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, kept = row.forward(reals(8, 80, 64), w)
            found.append([y, *row.backward(y.cos(), reals(8, 80, 64), w, kept)[1][:2]])
    finally:
        torch.set_num_threads(before)
    assert gap(*found) <= 1e-14


# In a network --------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self, change=None, **settings):
        super().__init__()
        self.read, self.head = nn.Linear(2, 8), nn.Linear(8, 1)
        given = {"dropout": 0.0, "activation": "gelu", "batch_first": True, **settings}
        self.block = nn.TransformerEncoderLayer(8, 2, 12, **given)
        self.change = change

    def forward(self, x):
        z = self.read(x)
        if self.change == "mask":
            mask = nn.Transformer.generate_square_subsequent_mask(z.shape[-2], dtype=z.dtype)
            return self.head(self.block(z, src_mask=mask)[:, -1])
        if self.change == "turned":
            z = self.read(x.transpose(-1, -2).contiguous().transpose(-1, -2))
        return self.head(self.block(z)[:, -1])


def data(rows=3):
    return Episode(
        *(Batch(reals(T, rows, 5, 2, seed=s), reals(T, rows, 1, seed=s)) for s in (0, 1))
    )


def grads(net, way=None, few=None):
    learner = maml(net, F.mse_loss, 0.1, 2)
    objective = bilevel(learner, F.mse_loss, way)
    for _ in range(2):
        value, found = objective.value_and_grad(learner.init(), few or data())
    return [value, *found.values()]


@pytest.fixture
def calls(monkeypatch):
    """How often a layer ran as one function."""
    made, before = [], encoder.layer
    monkeypatch.setattr(encoder, "layer", lambda *a: made.append(1) or before(*a))
    return made


def like_the_reference(net, monkeypatch, way=None):
    found = grads(net, way)
    monkeypatch.setenv("MTLIB_PLAIN", "1")
    right = grads(net, way)
    monkeypatch.setenv("MTLIB_PLAIN", "0")
    return gap(found, right) <= 1e-10


AS_ONE = {
    "before": {"norm_first": True},
    "after": {"norm_first": False},
    "relu": {"activation": "relu"},
    "a module": {"activation": nn.GELU()},
    "turned": {"change": "turned"},
    "another eps": {"layer_norm_eps": 0.1},
}
IN_PARTS = {
    "mask": {"change": "mask"},
    "no bias": {"bias": False},
    "tanh": {"activation": torch.tanh},
    "near gelu": {"activation": nn.GELU("tanh")},
    "sequences last": {"batch_first": False},
}


@pytest.mark.fast
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("way", [None, first_order])
@pytest.mark.parametrize("name", AS_ONE)
def test_a_layer_runs_as_one_function_and_is_the_reference(name, way, compiler, calls, monkeypatch):
    if not compiler:
        monkeypatch.setattr(encoder, "kernels", lambda dtype: None)
    torch.manual_seed(0)
    assert like_the_reference(Reader(**AS_ONE[name]).double(), monkeypatch, way)
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("name", IN_PARTS)
def test_another_layer_runs_in_parts_and_is_the_reference(name, calls, monkeypatch):
    torch.manual_seed(0)
    assert like_the_reference(Reader(**IN_PARTS[name]).double(), monkeypatch)
    assert not calls


class Doubling(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def hooked(net):
    net.block.linear1.register_forward_hook(lambda m, x, y: 2 * y)


def replaced(net):
    net.block.norm1 = nn.Identity()


def inherited(net):
    net.block = Doubling(8, 2, 12, 0.0, "gelu", batch_first=True)


def frozen(net):
    net.block.linear1.weight.requires_grad_(False)


def looked_at(net):
    net.block.activation = nn.GELU()
    net.block.activation.register_forward_hook(lambda m, x, y: 2 * y)


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x.sigmoid()


def odd(net):
    net.block.activation = Unhashable()


@pytest.mark.parametrize("change", [hooked, replaced, inherited, frozen, looked_at, odd])
def test_what_a_user_changed_is_not_left_out(change, calls, monkeypatch):
    torch.manual_seed(0)
    net = Reader()
    change(net)
    assert like_the_reference(net.double(), monkeypatch)
    assert not calls


def test_dropout_is_not_left_out(calls):
    torch.manual_seed(0)
    net = Reader(dropout=0.5).double()
    with pytest.raises(Exception, match="random"):
        torch.vmap(lambda x, k: net(x))(data().support.x, torch.ones(T))
    net.eval()
    grads(net)
    assert calls


def test_a_hook_of_the_layer_sees_what_goes_in_and_out(calls, monkeypatch):
    torch.manual_seed(0)
    net = Reader().double()
    net.block.register_forward_hook(lambda m, x, y: 2 * y)
    assert like_the_reference(net, monkeypatch)
    assert calls


def test_one_layer_twice_and_one_sequence_long(calls, monkeypatch):
    torch.manual_seed(0)
    net = Reader().double()
    net.read = nn.Sequential(net.read, net.block)
    assert like_the_reference(net, monkeypatch)
    long = Episode(*(Batch(reals(T, 1, 70, 2), reals(T, 1, 1)) for _ in range(2)))
    found = grads(net, None, long)
    monkeypatch.setenv("MTLIB_PLAIN", "1")
    assert gap(found, grads(net, None, long)) <= 1e-10


@pytest.mark.fast
def test_the_meta_gradient_is_that_of_finite_differences(calls):
    torch.manual_seed(0)
    net = Reader().double()
    learner = maml(net, F.mse_loss, 0.1, 2)
    objective, phi, few = bilevel(learner, F.mse_loss), learner.init(), data()
    g = objective.value_and_grad(phi, few)[1]
    u = {k: reals(*v.shape) for k, v in phi.items()}
    h = 1e-5
    ends = [
        objective.value_and_grad({k: v + s * h * u[k] for k, v in phi.items()}, few)[0]
        for s in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert calls and abs(slope - sum((g[k] * u[k]).sum() for k in g)) <= 1e-7 * abs(slope) + 1e-8


def test_autocast_goes_in_parts(calls):
    torch.manual_seed(0)
    few = Episode(*(Batch(b.x.float(), b.y.float()) for b in data()))
    with torch.autocast("cpu", torch.bfloat16):
        grads(Reader(), None, few)
    assert not calls


def test_threads_of_a_user_do_not_disturb_each_other():
    torch.manual_seed(0)
    net = Reader().double()
    right, found = grads(net), []
    threads = [threading.Thread(target=lambda: found.append(grads(net))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 3 and all(gap(f, right) <= 1e-12 for f in found)
