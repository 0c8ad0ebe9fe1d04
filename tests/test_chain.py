"""A row of linear layers under `vmap` equals torch's own layers to third order, and steps aside where something looks on."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from problems import OF_ITS_OWN, gap
from torch import nn
from torch.nn.functional import mse_loss

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode, apply, parameters
from mtlib.learners.gradient import adam, maml
from mtlib.run import chain as module
from mtlib.run import copies, unroll

T = 3
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid)


def row(widths, activation, bias=True, last=False) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b, bias), activation())]
    return nn.Sequential(*(layers if last else layers[:-1])).double()


def points(d, w, n=5) -> Episode:
    def reals(*shape):
        return torch.randn(T, *shape, dtype=torch.float64)

    return Episode(Batch(reals(n, d), reals(n, w)), Batch(reals(n + 1, d), reals(n + 1, w)))


@pytest.fixture(autouse=True)
def not_plain(monkeypatch):
    """The reference is asked for by name here, and no kernel of `mtlib.run.unroll` comes first."""
    monkeypatch.setenv("MTLIB_PLAIN", "0")
    monkeypatch.setattr(unroll, "_kernel", lambda dtype: None)


@pytest.fixture
def used(monkeypatch):
    """How often the row answers in the place of the network."""
    found = []

    def counted(net, theta, x):
        out = module.chain(net, theta, x)
        found.append(out is not None)
        return out

    monkeypatch.setattr(copies, "chain", counted)
    return found


def apart(objective, phi, data, monkeypatch) -> float:
    """The largest relative distance of a value or gradient to the plain reference's."""
    value, grads = objective.value_and_grad(phi, data)
    with monkeypatch.context() as m:
        m.setenv("MTLIB_PLAIN", "1")
        right, reference = objective.value_and_grad(phi, data)
    assert grads.keys() == reference.keys()
    return max(gap(value, right), *(gap(grads[k], reference[k]) for k in reference))


@pytest.mark.parametrize("widths", [(1, 7, 6, 1), (3, 5, 2), (4, 1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("activation", "bias", "last"), list(product(ACTIVATIONS, (True, False), (True, False)))
)
def test_the_meta_gradient_is_the_reference_s(widths, activation, bias, last, used, monkeypatch):
    torch.manual_seed(0)
    net, data = row(widths, activation, bias, last), points(widths[0], widths[-1])
    for rule, way in ((None, None), (adam(), None), (None, first_order)):
        learner = maml(net, mse_loss, 0.1, 2, rule=rule)
        objective = bilevel(learner, mse_loss, way)
        objective.value_and_grad(learner.init(), data)  # the first call is watched
        used.clear()
        assert apart(objective, learner.init(), data, monkeypatch) < 1e-10
        assert any(used)


def test_the_first_call_which_is_watched_is_as_the_others_bit_for_bit(used):
    net = row((1, 7, 6, 1), nn.ReLU)
    objective, data = bilevel(maml(net, mse_loss, 0.1, 2), mse_loss), points(1, 1)
    (one, first), (two, second) = (objective.value_and_grad(parameters(net), data) for _ in "12")
    assert all(used)
    assert torch.equal(one, two) and all(torch.equal(first[k], second[k]) for k in first)


def test_a_frozen_layer(used, monkeypatch):
    torch.manual_seed(0)
    net = row((2, 6, 5, 1), nn.Tanh)
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    learner = maml(net, mse_loss, 0.1, 3)
    objective = bilevel(learner, mse_loss)
    data = points(2, 1)
    objective.value_and_grad(learner.init(), data)
    assert apart(objective, learner.init(), data, monkeypatch) < 1e-10


def together(net, f, *args):
    """`f(net, …)` under vmap over tasks, and in a loop, where the network runs as it is."""
    many = torch.vmap(lambda *a: f(net, *a), randomness="error")(*args)
    return many, torch.stack([f(net, *(a[t] for a in args)) for t in range(T)])


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (1, 4), (2, 0, 4)])
def test_rows_of_any_number_of_axes(shape, used):
    torch.manual_seed(0)
    net = row((4, 5, 2), nn.ReLU)
    theta = [torch.randn(T, *p.shape).double() for p in net.parameters()]
    names = [k for k, _ in net.named_parameters()]
    x = torch.randn(T, *shape).double().transpose(0, -1).contiguous().transpose(0, -1)

    def f(net, x, *p):
        return apply(net)(dict(zip(names, p, strict=True)), x)

    many, each = together(net, f, x, *theta)
    assert used[0] and many.shape == each.shape
    torch.testing.assert_close(many, each, rtol=1e-12, atol=1e-12)
    same = torch.vmap(lambda *p: f(net, x[0], *p))(*theta)  # all tasks have one x
    torch.testing.assert_close(same[0], each[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_all_derivatives_to_the_third_by_finite_differences(activation):
    torch.manual_seed(0)
    act = activation and module.ACTIVATIONS[activation]
    acts = [act, act]
    shapes = [(2, 3, 2), (2, 4, 2), (2, 4), (2, 1, 4), (2, 1)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def f(x, *weights):
        return module.answer(acts, x, weights)

    def slope(*inputs):
        return torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(slope, inputs)


@pytest.mark.parametrize("change", OF_ITS_OWN)
def test_it_steps_aside_for_what_a_module_has_of_its_own(change, used, monkeypatch):
    torch.manual_seed(0)
    net = row((2, 4, 1), nn.Tanh)
    change(net)
    learner = maml(net, mse_loss, 0.1, 2)
    objective, data = bilevel(learner, mse_loss), points(2, 1)
    objective.value_and_grad(parameters(net), data)
    used.clear()
    assert apart(objective, parameters(net), data, monkeypatch) < 1e-10
    assert not any(used)


def test_it_steps_aside_for_autocast_half_precision_a_mode_and_a_hook_of_all_modules(used):
    net = row((2, 4, 1), nn.ReLU)
    phi = {k: v.expand(T, *v.shape) for k, v in parameters(net).items()}
    x = torch.randn(T, 3, 2).double()

    def run(x=x, phi=phi):
        torch.vmap(apply(net))(phi, x)
        return used.pop()

    assert run()
    with torch.autocast("cpu", torch.bfloat16):
        assert not run()
    assert not run(x.half(), {k: v.half() for k, v in phi.items()})
    with torch.overrides.BaseTorchFunctionMode():
        assert not run()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not run()
    finally:
        hook.remove()
    torch.func.grad(lambda p: torch.vmap(apply(net))(p, x).sum())(phi)
    assert not used.pop()


def test_after_an_error_inside_functorch_is_as_it_was(monkeypatch):
    net = row((2, 4, 1), nn.ReLU)
    phi = {k: v.expand(T, *v.shape) for k, v in parameters(net).items()}

    def broken(*_):
        raise RuntimeError("inside")

    monkeypatch.setattr(module, "answer", broken)
    with pytest.raises(RuntimeError, match="inside"):
        torch.vmap(apply(net))(phi, torch.randn(T, 3, 2).double())
    assert torch.vmap(torch.sin)(torch.ones(2)).shape == (2,)
    assert not torch._C._are_functorch_transforms_active()
