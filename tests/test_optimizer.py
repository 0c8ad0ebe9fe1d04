"""Optimizers as learners: what is set by hand equals torch's own, gradients equal differences, halves make a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import normal
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, checkpointed, unrolled
from mtlib.book.checks import differences
from mtlib.book.training import (
    Bowls,
    bowl_variance,
    curves,
    digit_trainings,
    mislabelled,
    runs,
    side_by_side,
    three_numbers,
    tuned,
)
from mtlib.core import Batch, Episode, over, parameters, take
from mtlib.learners.gradient import adam, minibatches, momentum
from mtlib.learners.hyper import flat, unflat
from mtlib.learners.optimizer import alike, cosine, learned_optimizer, one_rate, with_starts
from mtlib.nets import mlp
from mtlib.train import cosine_adam, fit


def make():
    return mlp(4, (6,), 3)


def classes(tasks=2, rows=8, seed=0):
    """Episodes in float64, each with a start of its own."""
    x, y = normal(tasks, 2 * rows, 4, seed=seed), torch.eye(3).double()[torch.arange(2 * rows) % 3]
    y = y.expand(tasks, -1, -1)
    plain = Episode(Batch(x[:, :rows], y[:, :rows]), Batch(x[:, rows:], y[:, rows:]))
    return with_starts(lambda step: plain, make, seed)(0)


def net():
    return mlp(4, (6,), 3, seed=0).double()


def drawn(phi, seed=3):
    """φ off its special values."""
    found = enumerate(phi.items())
    return {k: v + 0.1 * normal(*v.shape, 1, seed=seed + i)[..., 0] for i, (k, v) in found}


def by_torch(episode, optimizer, steps, schedule=None, size=None):
    """θ after so many steps of one of torch's own optimizers."""
    network, (x, y) = net(), episode.support
    start = unflat(x["start"][0], parameters(network))
    network.load_state_dict(start)
    rule = optimizer(network.parameters())
    rates = schedule and torch.optim.lr_scheduler.CosineAnnealingLR(rule, T_max=schedule)
    k = len(y) // size if size else 1
    for j in range(steps):
        rule.zero_grad()
        cross_entropy(network(x["x"][j % k :: k]), y[j % k :: k]).backward()
        rule.step()
        if rates:
            rates.step()
    return flat(parameters(network))


HAND = {
    "gradient descent": ((0.3, 0.0, 0.0), lambda p: torch.optim.SGD(p, lr=0.3), None),
    "momentum": ((0.0, 0.05, 0.0), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), momentum()),
    "adam": ((0.0, 0.0, 0.02), lambda p: torch.optim.Adam(p, lr=0.02), adam()),
}


@pytest.mark.parametrize("name", HAND)
def test_set_by_hand_it_equals_torchs_optimizer(name):
    rates, theirs, rule = HAND[name]
    episode = take(classes(), 0)
    expected = by_torch(episode, theirs, 7)
    learned = learned_optimizer(net(), cross_entropy, 7, rates)
    plain = one_rate(net(), cross_entropy, max(rates), 7, rule)
    for learner in (learned, plain):
        phi = over(torch.Tensor.double, learner.init())
        found = flat(learner.adapt(phi, episode.support))
        assert (found - expected).abs().max() <= 1e-7  # the rate is a float32 in φ
    exact = {**learned.init(), "optimizer.rates": torch.tensor(rates).double()}
    exact = over(torch.Tensor.double, exact) | {
        "optimizer.rates": torch.tensor(rates, dtype=torch.float64)
    }
    found = flat(learned.adapt(exact, episode.support))
    assert (found - expected).abs().max() <= (1e-12 if name != "adam" else 1e-9)


def test_the_cosine_and_the_mini_batches_equal_torchs():
    episode, rate = take(classes(), 0), 0.02
    theirs = by_torch(episode, lambda p: torch.optim.Adam(p, lr=rate), 10, schedule=10, size=4)
    learner = minibatches(one_rate(net(), cross_entropy, rate, 10, adam(), cosine(10)), 4)
    phi = {"optimizer.log_lr": torch.tensor(rate, dtype=torch.float64).log()}
    assert (flat(learner.adapt(phi, episode.support)) - theirs).abs().max() <= 1e-9
    assert cosine(10)(10) == cosine(10)(25) == 0 and cosine(10)(0) == 1


MAKERS = {
    "learned": lambda: learned_optimizer(net(), cross_entropy, 5, (0.1, 0.02, 0.01), hidden=4),
    "one rate": lambda: one_rate(net(), cross_entropy, 0.1, 5, momentum()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_equal_differences_and_checkpoints_change_nothing(name):
    learner, episode = MAKERS[name](), classes()
    phi = drawn(learner.init())
    objective = bilevel(learner, cross_entropy)
    value, gradient = objective.value_and_grad(phi, episode)
    expected = differences(lambda at: objective(at, episode), phi)
    assert (flat(gradient) - expected).abs().max() <= 1e-7 and expected.abs().max() > 1e-4
    saved = bilevel(learner, cross_entropy, checkpointed).value_and_grad(phi, episode)
    assert abs(saved[0] - value) <= 1e-12
    assert (flat(saved[1]) - flat(gradient)).abs().max() <= 1e-12


@pytest.mark.parametrize("name", MAKERS)
def test_two_halves_make_a_whole(name):
    learner, episode = MAKERS[name](), take(classes(), 1)
    phi, support, adapt = drawn(learner.init()), episode.support, learner.adapt
    point = adapt.begin(phi, support)
    for j in range(2):
        point = adapt.step(phi, support, j, point)
    kept = (dict(point[0]), point[1])
    for j in range(2, 5):
        kept = adapt.step(phi, support, j, kept)
    whole = adapt(phi, support)
    assert all(torch.equal(whole[k], kept[0][k]) for k in whole)


def test_one_phi_moves_networks_of_any_size_and_each_parameter_by_itself():
    """A parameter's step does not change when the others are numbered anew, as long as its tensor has the same numbers."""
    phi = drawn(MAKERS["learned"]().init())
    wide = mlp(4, (9, 5), 3, seed=1).double()
    plain = Episode(*(Batch(b.x["x"] if isinstance(b.x, dict) else b.x, b.y) for b in classes()))
    episode = with_starts(lambda step: plain, lambda: mlp(4, (9, 5), 3))(0)
    learner = learned_optimizer(wide, cross_entropy, 3, hidden=4)
    theta = learner.adapt(phi, take(episode, 0).support)
    assert {k: v.shape for k, v in theta.items()} == {
        k: v.shape for k, v in wide.named_parameters()
    }
    turn = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    f, tensor = normal(2, 10), torch.tensor([0] * 4 + [1] * 6)
    assert (alike(f[:, turn], tensor[turn]) - alike(f, tensor)[:, turn]).abs().max() <= 1e-12
    assert (alike(f, tensor)[:, :4].square().mean(1) - 1).abs().max() <= 1e-12


def test_what_is_frozen_stays():
    network = net()
    network.body[0].weight.requires_grad_(False)
    support = take(classes(), 0).support
    learner = learned_optimizer(network, cross_entropy, 3, (0.3, 0.0, 0.0))
    theta = learner.adapt(over(torch.Tensor.double, learner.init()), support)
    start = unflat(support.x["start"][0], parameters(network))
    moved = {k for k in theta if not torch.equal(theta[k], start[k])}
    assert moved == set(theta) - {"body.0.weight"}


def test_starts_are_the_networks_own_follow_the_seed_and_travel_with_any_rows():
    draw, again, other = classes(), classes(), classes(seed=1)
    start = draw.support.x["start"]
    assert torch.equal(start, again.support.x["start"])
    assert not torch.equal(start, other.support.x["start"])
    assert torch.equal(start[:, 0], start[:, -1]) and not torch.equal(start[0], start[1])


class Point(nn.Module):
    """One parameter, whatever x is."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.theta.expand(len(x), 1)


def test_a_learned_rate_is_the_exact_one():
    """θ_1 = (1 − 2α) θ_0 under θ²: the best rate is ½, whatever the start."""
    zeros = torch.zeros(1, 3, 1).double()
    draw = Episode(
        Batch({"x": zeros, "start": torch.ones(1, 3, 1).double()}, zeros), Batch(zeros, zeros)
    )
    learner = one_rate(Point().double(), mse_loss, 0.2, 1)
    objective = bilevel(learner, mse_loss, unrolled)
    run = fit(
        objective, learner.init(), lambda step: draw, 200, progress=False, **cosine_adam(0.1, 200)
    )
    assert abs(run.params["optimizer.log_lr"].exp() - 0.5) < 5e-3


# What the page trains -------------------------------------------------------------------------


def test_the_bowls_variance_is_what_its_steps_leave():
    h, start, rate, steps = torch.tensor([0.05, 1.0]), torch.tensor([4.0, 1.0]), 0.4, 6
    net = Bowls(h, 40_000)
    draw = take(net.stream(start, steps)(0), 0)
    learner = minibatches(one_rate(net, net.loss, rate, steps), 1)
    theta = learner.adapt(learner.init(), draw.support)["theta"]
    expected = bowl_variance(h, start, rate, steps)
    assert (theta.square().mean(0) / expected - 1).abs().max() < 0.03
    value = net.loss(learner.predict({"theta": theta}, draw.query.x), draw.query.y) / 40_000
    assert abs(value / (0.5 * (h * expected).sum()) - 1) < 0.03
    by_hand = start
    for _ in range(steps):
        by_hand = (1 - rate * h) ** 2 * by_hand + (rate * h) ** 2
    assert (by_hand / expected - 1).abs().max() < 1e-6


def test_the_greedy_rate_in_a_settled_bowl_is_half_the_rate_that_settled_it():
    """ex-problems-greedy"""
    for h, rate in ((1.0, 0.6), (0.3, 2.0)):
        h, grid = torch.tensor([h]).double(), torch.linspace(0.001, 1.9 / h, 100_000).double()
        settled = bowl_variance(h, torch.ones(1).double(), rate, 500)
        assert abs(settled - rate * h / (2 - rate * h)) < 1e-12
        after = bowl_variance(h, settled, grid[:, None], 1)[:, 0]
        assert abs(grid[after.argmin()] - rate / 2) < 1e-3
        v = 3.0
        after = bowl_variance(h, torch.tensor([v]), grid[:, None], 1)[:, 0]
        assert abs(grid[after.argmin()] * h - v / (1 + v)) < 1e-3


def test_runs_side_by_side_are_the_runs_alone():
    """Half of its own gradient reaches each of two runs, and nothing of the other's; the curves are its own."""
    plain = learned_optimizer(net(), cross_entropy, 3, hidden=4)
    streams = [lambda step, s=s: classes(3, seed=10 * step + s) for s in (1, 2)]
    both, own = side_by_side(plain, 2), [drawn(plain.init(), seed) for seed in (3, 30)]
    phi = {k: torch.stack([o[k] for o in own]) for k in own[0]}
    found = bilevel(both, cross_entropy).value_and_grad(phi, runs(streams)(4))[1]
    ends = curves(both, phi, runs(streams)(4), cross_entropy)
    for i, stream in enumerate(streams):
        value, gradient = bilevel(plain, cross_entropy).value_and_grad(own[i], stream(4))
        assert all((2 * found[k][i] - g).abs().max() <= 1e-12 for k, g in gradient.items())
        assert ends.shape == (2, 4) and abs(ends[i, -1] - value) <= 1e-12


def test_a_training_that_diverges_counts_as_the_cap():
    learner = side_by_side(one_rate(net(), mse_loss, 1e9, 4), 1)
    draw = runs([lambda step: classes()])(0)
    ends = curves(learner, over(torch.Tensor.double, learner.init()), draw, mse_loss)
    assert ends[0, -1] == 2 and ends[0, 0] < 2


def test_each_run_has_its_own_digits_and_no_part_shares_one():
    x = torch.arange(10.0).repeat_interleave(90)[:, None].expand(-1, 9).contiguous()
    x[:, 1:] = torch.randn(900, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat_interleave(90)
    dealt = [np.split(np.random.default_rng([s, 1]).permutation(10), [4, 7]) for s in (0, 1)]
    assert all(len(set(map(int, np.concatenate(parts)))) == 10 for parts in dealt)
    assert [*dealt[0][2]] != [*dealt[1][2]]
    for part in range(3):
        draw = digit_trainings(x, labels, [0, 1], part, 2)(0)
        assert draw.support.x["x"].shape == (4, 96, 8) and draw.query.y.shape == (4, 64, 2)
        assert draw.support.x["run"][:, 0].tolist() == [0, 0, 1, 1]


def test_the_best_rate_of_a_run_is_its_own():
    """Two bowls, one ten times as steep: the best of a grid for one step without noise is 1/h for each."""
    zeros = torch.zeros(1, 2, 1).double()

    def stream(size):
        x = {"x": zeros, "start": torch.full((1, 2, 1), size).double()}
        return lambda step: Episode(Batch(x, zeros), Batch(zeros, zeros))

    make = lambda: side_by_side(one_rate(Point().double(), mse_loss, 0.1, 1), 2)  # noqa: E731
    draw = runs([stream(1.0), stream(0.3)])(0)
    phi, edge = tuned(make, (0.1, 0.2, 0.5, 0.9), draw, mse_loss, 2)
    assert phi["optimizer.log_lr"].exp().tolist() == pytest.approx([0.5, 0.5]) and not edge
    assert tuned(make, (0.1, 0.2, 0.3), draw, mse_loss, 2)[1]


def test_wrong_labels_are_as_many_as_asked_and_never_the_right_one():
    y = torch.eye(10)[torch.arange(2000) % 10]
    moved = (mislabelled(y, 0.4, 0) != y).any(1).float().mean()
    assert abs(moved - 0.4) < 0.04 and (mislabelled(y, 0.4, 0).sum(1) == 1).all()
    assert (mislabelled(y, 1.0, 0) * y).sum() == 0 and torch.equal(mislabelled(y, 0.0, 0), y)


def test_three_numbers_are_weights_that_sum_to_one():
    phi = three_numbers(torch.arange(10), 4, 0.3, 0.4, -5.0)
    w = phi["example.logit"].exp()
    assert abs(w[10:].sum() - 0.7) < 1e-6 and abs(w[:6].sum() - 0.3) < 1e-6
    assert abs(w[9] / w[0] - np.exp(-5)) < 1e-12 and phi["decay.group"] == -5
