"""Adaptation at test time: TENT's gradient and what it moves, alarms in closed form, and the bound they rest on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mtlib.book.arriving import ORDERS, arrivals, rate_for, watched
from mtlib.book.checks import differences
from mtlib.core import Batch, apply, load, parameters
from mtlib.joint import joint
from mtlib.learners.hyper import flat
from mtlib.nets import conv2, two_halves
from mtlib.norm import Norm, calibrate
from mtlib.train import fit
from mtlib.transfer.align import entropy
from mtlib.transfer.selection import entropy as mean_of_entropies
from mtlib.transfer.test_time import (
    alarm,
    at_test,
    changes,
    least_variety,
    mean_entropy,
    scales,
    tent,
    varieties,
)


def small(norm=Norm, seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(5, 6), norm(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4))
    return two_halves(body, nn.Linear(4, 3)).double()


def inputs(n=24, seed=1):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).double()


NORMS = [Norm, nn.BatchNorm1d]


@pytest.mark.parametrize("norm", [*NORMS, nn.LayerNorm])
def test_scales_are_those_of_norms_that_are_not_frozen(norm):
    net = small(norm)
    assert scales(net) == ("body.1.weight", "body.1.bias")
    net.body[1].bias.requires_grad_(False)
    assert scales(net) == ("body.1.weight",)
    with pytest.raises(ValueError, match="norms whose scales"):
        scales(two_halves(nn.Linear(5, 4), nn.Linear(4, 3)))


def test_the_scales_of_a_convolutional_network():
    net = conv2(width=2, seed=0)
    assert len(scales(net)) == 6
    count = sum(dict(net.named_parameters())[k].numel() for k in scales(net))
    assert count == 2 * (2 + 4 + 64)


def test_mean_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64))
    each = [math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)]
    assert abs(float(mean_entropy(logits)) - sum(each) / 2) <= 1e-12
    assert abs(float(mean_entropy(logits, below=0.5)) - each[1]) <= 1e-12
    assert float(mean_entropy(logits, below=0.1)) == 0
    some = torch.randn(9, 4, dtype=torch.float64)
    assert abs(float(mean_entropy(some)) - mean_of_entropies(some)) <= 1e-12
    sure = torch.tensor([[0.0, 1e4, -1e30]], requires_grad=True)  # no 0 · ∞
    mean_entropy(sure).backward()
    assert mean_entropy(sure).item() == 0 and bool(sure.grad.isfinite().all())


@pytest.mark.parametrize("below", [math.inf, 1.08])
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_against_finite_differences(norm, below):
    net, x = at_test(small(norm)), inputs()
    phi = {k: p.detach() for k, p in net.named_parameters()}

    def value(theta):
        return mean_entropy(functional_call(net, {**phi, **theta}, (x,)), below)

    theta = {k: phi[k] + 0.1 for k in scales(net)}
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    found = torch.autograd.grad(value(leaves), list(leaves.values()))
    measured = torch.stack(
        [
            (value(_moved(theta, k, i, 1e-6)) - value(_moved(theta, k, i, -1e-6))) / 2e-6
            for k, v in theta.items()
            for i in range(len(v))
        ]
    ).detach()
    assert torch.cat(found).sub(measured).abs().max() <= 1e-8
    assert torch.cat(found).abs().max() > 1e-4


def _moved(theta, name, i, h):
    moved = {k: v.clone() for k, v in theta.items()}
    moved[name][i] += h
    return moved


def test_the_gradient_by_the_kit_differences():
    net, x = at_test(small()), inputs()
    phi = {k: p.detach() for k, p in net.named_parameters()}
    f = apply(net)
    theta = {k: phi[k] for k in scales(net)}
    exact = torch.func.grad(lambda t: mean_entropy(f({**phi, **t}, x)))(theta)
    assert (
        flat(exact) - differences(lambda t: mean_entropy(f({**phi, **t}, x)), theta)
    ).abs().max() <= 1e-8


@pytest.mark.parametrize("norm", NORMS)
def test_only_scales_and_shifts_move(norm):
    net = small(norm)
    before = copy.deepcopy(net.state_dict())
    phi = parameters(net)
    found = tent(net, phi, inputs().split(8), 0.1)
    moved = {k for k in phi if not torch.equal(phi[k], found.params[k])}
    assert moved == set(scales(net)) and found.params.keys() == phi.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the user's own
    assert net.training and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_rate_zero_is_what_batch_statistics_give(norm):
    net, x = small(norm), inputs()
    found = tent(net, parameters(net), x.split(8), 0)
    own = copy.deepcopy(net).train()
    own.body[3].eval()  # dropout stays off
    expected = torch.cat([own(part) for part in x.split(8)])
    assert torch.allclose(found.logits, expected, atol=1e-12)
    assert all(torch.equal(v, found.params[k]) for k, v in parameters(net).items())


def test_stored_statistics_are_those_of_phi():
    net, x = small(), inputs()
    phi = calibrate(net, parameters(net), [inputs(50, 3)])
    found = tent(net, phi, x.split(8), 0, statistics="stored")
    assert torch.allclose(found.logits, apply(copy.deepcopy(net).eval())(phi, x), atol=1e-12)
    with pytest.raises(ValueError, match="calibrate"):
        tent(
            small(nn.BatchNorm1d),
            parameters(small(nn.BatchNorm1d)),
            x.split(8),
            0,
            statistics="stored",
        )


def test_each_batch_is_answered_before_its_step():
    """The first step of Adam is the rate times the sign of the gradient, and the second batch is answered after it."""
    net, x, rate = small(), inputs(), 0.05
    phi = parameters(net)
    found = tent(net, phi, x.split(12), rate)
    own = at_test(net)
    first = functional_call(own, phi, (x[:12],))
    leaves = {k: phi[k].clone().requires_grad_() for k in scales(net)}
    slope = torch.autograd.grad(
        mean_entropy(functional_call(own, {**phi, **leaves}, (x[:12],))), list(leaves.values())
    )
    stepped = {k: phi[k] - rate * g.sign() for k, g in zip(leaves, slope, strict=True)}
    second = functional_call(own, {**phi, **stepped}, (x[12:],))
    assert torch.allclose(found.logits, torch.cat([first, second]), atol=1e-5)


def test_a_reset_begins_anew_to_the_bit():
    net, x = small(), inputs()
    phi = parameters(net)
    seen = []

    def watch(answers, first):
        seen.append((len(answers), first))
        return len(answers) >= 12

    found = tent(net, phi, [*x.split(6), *x.split(6)], 0.1, watch=watch)
    assert found.resets == [12, 24, 36, 48]
    assert seen == [(6, 0), (12, 0), (6, 12), (12, 12), (6, 24), (12, 24), (6, 36), (12, 36)]
    assert torch.equal(found.logits[:12], found.logits[24:36])


def test_many_passes_are_fit_with_the_network_at_test():
    net, x = small(), inputs()
    phi = parameters(net)
    objective = joint(at_test(net), nn.functional.cross_entropy, (0,), [entropy()])
    images = lambda step: Batch(x[None], torch.zeros(1, len(x), 3).double())  # noqa: E731
    found = fit(objective, phi, images, 30, progress=False).params
    assert {k for k in phi if not torch.equal(phi[k], found[k])} == set(scales(net))
    assert mean_entropy(apply(at_test(net))(found, x)) < mean_entropy(apply(at_test(net))(phi, x))


def test_varieties_of_uniform_answers_and_of_one_class():
    one = torch.zeros(6, 4)
    one[:, 2] = 100.0
    assert varieties(one, 3).abs().max() <= 1e-12
    turns = 100 * torch.eye(4)[torch.arange(8) % 4]  # sure, each class in turn
    assert (varieties(turns, 4) - math.log(4)).abs().max() <= 1e-12
    assert (varieties(torch.zeros(6, 4), 2) - math.log(4)).abs().max() <= 1e-12
    assert (varieties(turns, 2) - math.log(2)).abs().max() <= 1e-12
    assert len(varieties(turns, 3)) == 6


def test_answers_that_changed_bound_what_accuracy_lost():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = torch.randn(40, 5, generator=g), torch.randn(40, 5, generator=g)
        b = torch.where(torch.rand(40, 1, generator=g) < 0.7, a, b)
        y = torch.randint(5, (40,), generator=g)
        gap = _right(a, y) - _right(b, y)
        assert bool((gap.abs() <= changes(a, b, 10) + 1e-12).all())
    assert float(changes(a, a, 10).max()) == 0
    y = a.argmax(1)  # all of what changed was right, so the bound is met
    assert torch.allclose(_right(a, y) - _right(b, y), changes(a, b, 10))


def _right(z, y):
    return (z.argmax(1) == y).double().unfold(0, 10, 1).mean(1)


def test_an_alarm_says_after_how_many_items():
    logits = 100 * torch.eye(2)[torch.tensor([0, 1, 0, 1, 0, 0, 0, 0])]
    values = varieties(logits, 4)
    assert alarm(values, 4, below=0.6) == 6  # of the items 3 to 6 three are of one class
    assert alarm(values, 4, below=-1.0) is None
    assert alarm(changes(logits, logits.flip(1), 4), 4, above=0.5) == 4


def test_the_threshold_is_a_quantile_of_windows():
    g = torch.Generator().manual_seed(0)
    logits = 9 * torch.eye(5)[torch.randint(5, (400,), generator=g)]
    least = least_variety(logits, 50, chance=0.1)
    again = [
        float(varieties(logits[torch.randperm(400, generator=g)[:50]], 50)) for _ in range(600)
    ]
    assert abs(sum(v < least for v in again) / 600 - 0.1) < 0.04
    assert least_variety(logits, 400) == pytest.approx(float(varieties(logits, 400)))
    assert least_variety(logits, 50) < least < least_variety(logits, 50, chance=0.9)


def test_orders_of_arrival():
    y = torch.arange(10).repeat(30)
    for order in ORDERS:
        i = arrivals(y, order, 3)
        assert torch.equal(i, arrivals(y, order, 3)) and not torch.equal(i, arrivals(y, order, 4))
        if order != "uneven":
            assert torch.equal(i.sort()[0], torch.arange(300))
    assert int((y[arrivals(y, "sorted", 0)].diff() != 0).sum()) == 9
    shares = (
        torch.bincount(y[arrivals(y, "uneven", 0)], minlength=10).sort(descending=True)[0] / 300
    )
    expected = 0.6 ** torch.arange(10.0)
    assert (shares - expected / expected.sum()).abs().max() < 0.08


def test_a_watched_run_by_hand():
    y = torch.tensor([0, 1] * 20)
    before = 9 * torch.eye(2)[y]
    logits = before.clone()
    logits[20:] = torch.tensor([9.0, 0.0])  # one class from item 21 on: each second answer is wrong
    found = watched(logits, before, y, least=0.6, window=10)
    told = {k: int(v) for k, v in found.items() if v.ndim == 0}
    assert told == {
        "fell 5": 22,
        "fell 10": 24,
        "variety": 26,
        "entropy": 10,
        "changed 10": 24,
        "changed 20": 26,
    }
    assert float(found["accuracy"].mean()) == 0.75 and float(found["frozen"].mean()) == 1


def test_the_rate_is_that_of_the_other_targets():
    between = [("a", "b"), ("a", "c"), ("b", "c")]
    found = {0.1: [0.9, 0.1, 0.1], 0.2: [0.1, 0.8, 0.7]}
    assert rate_for("b", between, found) == 0.2 and rate_for("c", between, found) == 0.1


def test_the_adapted_network_loads():
    net = small()
    found = tent(net, parameters(net), inputs().split(8), 0.1)
    assert torch.equal(
        load(small(seed=4), found.params).body[1].weight, found.params["body.1.weight"]
    )
