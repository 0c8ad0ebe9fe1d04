"""Worlds with a cue that is false elsewhere, and one training for all methods of the page on unseen domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import assert_close
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.book.generalising import asked, by_colour, coloured, even, exact_world, plan, train
from mtlib.core import Batch, parameters
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.transfer import unseen


def test_exact_world_has_the_moments_of_its_equations():
    s, c = 0.7, -1.3
    x, y = exact_world(s, c)
    rng = np.random.default_rng(0)
    e = rng.normal(size=(3, 400_000))
    cause = s**0.5 * e[0]
    target = cause + s**0.5 * e[1]
    drawn = np.stack([cause, c * target + e[2], target])
    rows = torch.cat([x, y], 1).numpy()
    assert np.allclose(rows.T @ rows / 3, drawn @ drawn.T / drawn.shape[1], atol=0.03)


def test_coloured_rows_agree_as_often_as_asked():
    x, y = coloured(3, 0.8, 20_000)
    label = y[:, 1] > 0
    assert abs(((x[:, 10] > 0) == label).float().mean() - 0.8) < 0.02
    assert abs(((x[:, 0] > 0) == label).float().mean() - 0.75) < 0.02
    assert set(x[:, 10].tolist()) == {-1.0, 1.0} and torch.equal(y.sum(1), torch.ones(20_000))
    again, other = coloured(3, 0.8, 20_000), coloured(3, 0.8, 20_000, part=1)
    assert torch.equal(again.x, x) and not torch.equal(other.x, x)


def test_groups_by_colour_are_of_one_label_and_one_colour():
    x, y = by_colour(coloured(0, 0.9, 500), 30, seed=0)(4)
    assert x.shape == (4, 30, 11) and y.shape == (4, 30, 2)
    kinds = [(y[g, :, 1].unique().tolist(), x[g, :, 10].unique().tolist()) for g in range(4)]
    assert kinds == [([0.0], [-1.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([1.0], [1.0])]


def test_even_rows_have_as_many_wrong_colours_as_right_ones():
    data = coloured(0, 0.9, 1000)
    wrong, right = even(data)
    agrees = lambda d: (d.x[:, 10] > 0) == (d.y[:, 1] > 0)  # noqa: E731
    assert len(wrong.y) == len(right.y) == int((~agrees(data)).sum())
    assert not agrees(wrong).any() and agrees(right).all()


def test_asked_asks_for_every_item_once():
    one, other = coloured(0, 0.9, 30), coloured(1, 0.9, 11)
    episode = asked(one, other, parts=4)(0)
    assert episode.query.x.shape == (4, 10, 11)
    assert torch.equal(episode.query.x.flatten(0, 1), torch.cat([one.x, other.x])[:40])
    net = nn.Linear(11, 2)
    learner, phi = train("ERM", (0.1, 0.0, 0.0), net, lambda step: PAIR, 1, 0, 0)
    found = evaluate(learner, phi, asked(one, parts=3), 3, progress=False).mean
    logits = one.x @ phi["weight"].T + phi["bias"]
    assert found == pytest.approx((logits.argmax(1) == one.y.argmax(1)).float().mean().item())


PAIR = Batch(*map(torch.stack, zip(coloured(0, 0.9, 20), coloured(0, 0.8, 20), strict=True)))


def stepped(method, setting, steps, warm, **how):
    torch.manual_seed(0)
    net = nn.Linear(11, 2)
    return net, train(method, setting, net, lambda step: PAIR, steps, warm, 0, **how)[1]


@pytest.mark.parametrize(("method", "make"), [("IRM", unseen.irm), ("VREx", unseen.vrex)])
def test_a_penalty_is_weak_in_the_warm_up_and_divides_the_objective_after_it(method, make):
    for warm, strength, divided in ((1, 1.0, 1.0), (0, 50.0, 50.0)):
        net, phi = stepped(method, (0.1, 0.0, 50.0), 1, warm)
        _, g = make(net, cross_entropy, strength).value_and_grad(parameters(net), PAIR)
        begin = parameters(net)
        assert_close(phi, {k: begin[k] - 0.1 / divided * g[k] for k in g}, atol=1e-6)
    net, phi = stepped(method, (0.1, 0.0, 0.3), 1, 1)  # below 1 there is nothing to warm up to
    _, g = make(net, cross_entropy, 0.3).value_and_grad(parameters(net), PAIR)
    begin = parameters(net)
    assert_close(phi, {k: begin[k] - 0.1 * g[k] for k in g}, atol=1e-6)


def test_weight_decay_momentum_and_the_falling_rate():
    net, phi = stepped("ERM", (0.1, 0.5, 0.0), 2, 0, falls=True)
    theta, velocity = parameters(net), {}
    for rate in (0.1, 0.05):  # half a cosine over two steps
        _, g = joint(net, cross_entropy).value_and_grad(theta, PAIR)
        full = {k: g[k] + 0.5 * theta[k] for k in g}
        velocity = {k: 0.9 * velocity.get(k, 0.0) + full[k] for k in g}
        theta = {k: theta[k] - rate * velocity[k] for k in g}
    assert_close(phi, theta, atol=1e-6)


def test_group_dro_moves_its_weights_by_plain_sgd():
    net, phi = stepped("Group DRO", (0.1, 0.0, 2.0), 2, 0)
    theta, velocity = parameters(net), {}
    gamma = torch.zeros(2)
    for _ in range(2):
        begin = {**theta, "group.logits": gamma}
        _, g = unseen.group_dro(net, cross_entropy).value_and_grad(begin, PAIR)
        gamma = gamma - 2.0 * g["group.logits"]
        velocity = {k: 0.9 * velocity.get(k, 0.0) + g[k] for k in theta}
        theta = {k: theta[k] - 0.1 * velocity[k] for k in theta}
    assert_close(phi, theta, atol=1e-6)


def test_a_run_that_diverges_counts_as_untrained():
    net, phi = stepped("ERM", (1e38, 0.0, 0.0), 20, 0)
    assert_close(phi, parameters(net))


def test_plan_gives_each_method_its_objective_and_stream():
    net, stream = nn.Linear(11, 2), lambda step: PAIR
    for name, changed in (("Mixup", unseen.mixup), ("inter-domain Mixup", unseen.domain_mixup)):
        first, last, mixed = plan(name, 0.5, net, stream, 3)
        assert first is last and torch.equal(mixed(2).x, changed(stream, 0.5, 3)(2).x)
    mldg, _, cut = plan("MLDG", 0.5, net, stream, 3)
    episode = unseen.held_out(stream, 3)(1)
    assert torch.equal(cut(1).query.x, episode.query.x)
    phi = parameters(net)
    assert mldg(phi, episode) == unseen.mldg(net, cross_entropy, 0.5, 1.0)(phi, episode)
    assert plan("ERM, no decay", 0.0, net, stream, 3)[2] is stream
