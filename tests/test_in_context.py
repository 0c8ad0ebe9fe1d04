"""The transformer that learns in its forward pass: its formula, a step of gradient descent by hand, and what cannot matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import seeded
from scipy.special import erf, expit, softmax
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, features, over
from mtlib.data.linear import best_plane, planes
from mtlib.data.sinusoids import best_possible, noisy_sinusoids, sinusoids, varied_sinusoids
from mtlib.evaluate import evaluate
from mtlib.learners.amortised import gaussian_nll, in_context, point
from mtlib.nets import Harmonics, expanded, mlp, two_halves
from mtlib.tasks import one_hot
from mtlib.train import rising_adam

G = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


@pytest.fixture
def net():
    return seeded(lambda: mlp(2, (6,), 3)).double()


def small(net, ways=None, **how):
    torch.manual_seed(0)
    return in_context(net, ways, **{"hidden": 8, "layers": 2, "heads": 2, **how})


def task(rows=5, width=2, classes=None):
    y = rand(rows, width) if classes is None else one_hot(torch.arange(rows) % classes, classes)
    return Batch(rand(rows, 2), y.double())


def answer(learner, phi, support, x):
    return learner.predict(learner.adapt(phi, support), x)


def louder(learner):
    """Parameters of a size at which attention is far from uniform."""
    return {k: 3 * v for k, v in learner.init().items()}


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)


def by_hand(phi, z, y, zq, layers, heads):
    """The docstring's equations for one target, item by item, head by head: support z (N, D), y (N, E), query zq (D,)."""
    w = {k.removeprefix("process."): v.numpy() for k, v in phi.items()}
    tokens = [
        w["item.weight"] @ z[i] + w["target.weight"] @ y[i] + w["target.bias"]
        for i in range(len(z))
    ]
    tokens.append(w["item.weight"] @ zq)
    for j in range(layers):
        support = [w[f"read{j}.weight"] @ norm(h) for h in tokens[:-1]]
        moved = []
        for h in tokens:
            q = w[f"ask{j}.weight"] @ norm(h)
            d, parts = len(q) // heads, []
            for a in range(heads):
                at = slice(a * d, (a + 1) * d)
                keys = [r[: len(q)][at] for r in support]
                values = [r[len(q) :][at] for r in support]
                share = softmax([q[at] @ k / np.sqrt(d) for k in keys])
                parts.append(sum(s * v for s, v in zip(share, values, strict=True)))
            h = h + w[f"mix{j}.weight"] @ np.concatenate(parts)
            u = w[f"widen{j}.weight"] @ norm(h) + w[f"widen{j}.bias"]
            u = u * (1 + erf(u / np.sqrt(2))) / 2
            moved.append(h + w[f"narrow{j}.weight"] @ u + w[f"narrow{j}.bias"])
        tokens = moved
    return w["answer.weight"] @ norm(tokens[-1]) + w["answer.bias"]


def test_real_targets_are_the_formula(net):
    learner = small(net, floor=0.2)
    phi, support, x = louder(learner), task(), rand(4, 2)
    ours = answer(learner, phi, support, x).numpy()
    z, zq = (features(net)(phi, v).numpy() for v in (support.x, x))
    for t in range(2):
        for b in range(4):
            mean, a = by_hand(phi, z, support.y[:, t : t + 1].numpy(), zq[b], 2, 2)
            assert abs(ours[b, t] - mean) <= 1e-11
            assert abs(ours[b, 2 + t] - (0.2 + 0.8 * -np.log(expit(-a)))) <= 1e-11


def test_classes_are_the_formula(net):
    learner = small(net, 4)
    phi, support, x = louder(learner), task(classes=3), rand(4, 2)
    ours = answer(learner, phi, support, x).numpy()
    z, zq = (features(net)(phi, v).numpy() for v in (support.x, x))
    y = np.pad(support.y.numpy(), ((0, 0), (0, 1)))
    assert ours.shape == (4, 3)
    for b in range(4):
        assert np.abs(ours[b] - by_hand(phi, z, y, zq[b], 2, 2)[:3]).max() <= 1e-11


def test_one_layer_can_be_one_step_of_gradient_descent():
    """Two heads of opposite sign cancel all but the linear part of their softmax: the layer is a step on ½ mean (y − wᵀx)².

    From w = 0 at rate η: f(x) = (η/N) Σ y_i x_iᵀx, for centred x_i {cite}`vonoswald2023transformers`. A large constant
    keeps the layer norm from dividing by the item's own length.
    """
    net = two_halves(torch.nn.Identity(), torch.nn.Linear(3, 1)).double()
    learner = in_context(net, hidden=8, layers=1, heads=2)
    phi = {k: torch.zeros_like(v) for k, v in learner.init().items()}
    big, beta, rate, n = 1e4, 1e-3, 0.7, 6
    up = big / 2  # undoes the norm: |h| = h / up
    for row, column, value in (
        (0, 0, 1),
        (1, 1, 1),
        (3, 2, big),
    ):  # h = (x₁, x₂, y, c) and its negative
        phi["process.item.weight"][row, column] = value
        phi["process.item.weight"][row + 4, column] = -value
    phi["process.target.weight"][2], phi["process.target.weight"][6] = 1, -1
    for head, sign in ((0, 1), (4, -1)):
        for i in range(2):
            phi["process.ask0.weight"][head + i, i] = sign * beta * up * np.sqrt(4)
            phi["process.read0.weight"][head + i, i] = up
        phi["process.read0.weight"][8 + head, 2] = up
        phi["process.mix0.weight"][2, head] = sign * rate / (2 * beta)
        phi["process.mix0.weight"][6, head] = -sign * rate / (2 * beta)
    phi["process.answer.weight"][0, 2] = up
    x = rand(n, 2)
    x, y, xq = x - x.mean(0), rand(n, 1), rand(5, 2)
    z, zq = (torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], 1) for v in (x, xq))
    ours = answer(point(learner), phi, Batch(z, y), zq)
    assert (ours - rate / n * xq @ x.mT @ y).abs().max() <= 1e-5


def test_silent_queries_read_a_mean_as_cnp_does(net):
    """With silent queries the softmax is uniform: what is read is a mean over items, as in `cnp`."""
    learner = small(net, layers=1)
    phi, support, x = louder(learner), task(width=1), rand(4, 2)
    phi["process.ask0.weight"] *= 0
    theta = learner.adapt(phi, support)
    values = theta["process.read0"][..., 8:].mean(1, keepdim=True)
    mean = {**theta, "process.read0": torch.cat([0 * values, values], -1)}
    assert (learner.predict(mean, x) - learner.predict(theta, x)).abs().max() <= 1e-12


@pytest.mark.parametrize("ways", [None, 3])
def test_order_repeats_and_other_queries_do_not_matter(net, ways):
    learner = small(net, ways)
    phi, support, x = louder(learner), task(6, classes=ways), rand(4, 2)
    ours, order = answer(learner, phi, support, x), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = over(lambda d: d[order], support)
    twice = over(lambda d: torch.cat([d, d]), support)
    for same in (shuffled, twice):
        assert (answer(learner, phi, same, x) - ours).abs().max() <= 1e-11
    for b in range(4):
        assert (answer(learner, phi, support, x[b : b + 1]) - ours[b]).abs().max() <= 1e-11
    other = Batch(support.x, support.y.flip(0))
    assert (answer(learner, phi, other, x) - ours).abs().max() > 1e-3


def test_real_targets_are_read_one_by_one(net):
    learner = small(net)
    phi, support, x = louder(learner), task(width=3), rand(4, 2)
    ours = answer(learner, phi, support, x)
    for t in range(3):
        alone = answer(learner, phi, Batch(support.x, support.y[:, t : t + 1]), x)
        assert (alone - ours[:, t::3]).abs().max() <= 1e-12


def test_columns_of_absent_classes_change_nothing(net):
    learner = small(net, 4)
    phi, support, x = louder(learner), task(classes=2), rand(4, 2)
    wider = Batch(support.x, torch.nn.functional.pad(support.y, (0, 2)))
    ours, all_four = (answer(learner, phi, s, x) for s in (support, wider))
    assert ours.shape == (4, 2) and all_four.shape == (4, 4)
    assert torch.equal(ours, all_four[:, :2])


@pytest.mark.parametrize("ways", [None, 3])
def test_its_gradient_is_that_of_finite_differences(net, ways):
    learner, loss = small(net, ways), gaussian_nll if ways is None else cross_entropy
    phi = learner.init()
    tasks = [Episode(task(5, classes=ways), task(7, classes=ways)) for _ in range(3)]
    draw = Episode(
        *(Batch(*(torch.stack(p) for p in zip(*s, strict=True))) for s in zip(*tasks, strict=True))
    )
    objective = bilevel(learner, loss)
    value, gradient = objective.value_and_grad(phi, draw)
    looped = torch.stack([loss(answer(learner, phi, s, q.x), q.y) for s, q in tasks]).mean()
    assert abs(value - looped) <= 1e-12
    towards = {k: rand(*v.shape) for k, v in phi.items()}
    step = 1e-5
    ends = [
        objective({k: v + s * step * towards[k] for k, v in phi.items()}, draw) for s in (1, -1)
    ]
    slope = sum((gradient[k] * towards[k]).sum() for k in gradient)
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) <= 1e-7 * abs(slope)


def test_support_is_read_once(net):
    """`predict` needs θ alone, and of φ it needs no key and no value."""
    learner = small(net)
    phi, support, x = louder(learner), task(), rand(4, 2)
    theta = learner.adapt(phi, support)
    wanted = learner.predict(theta, x)
    kept = {k: v for k, v in theta.items() if ".weight" not in k or "read" not in k}
    for j in range(2):
        assert theta[f"process.read{j}"].shape == (2, 5, 16)
        kept[f"process.read{j}.weight"] = torch.zeros(16, 8, dtype=torch.float64)
    assert torch.equal(learner.predict(kept, x), wanted)


# The page's world --------------------------------------------------------------------------------


def test_planes_have_the_moments_they_name_and_follow_their_seed():
    draw = planes(30, 40, 400, seed=3, dims=4, noise=0.5)(7)
    again, other = planes(30, 40, 400, 3, 4, 0.5)(7), planes(30, 40, 400, 4, 4, 0.5)(7)
    assert torch.equal(draw.query.y, again.query.y) and not torch.equal(draw.query.y, other.query.y)
    clean = planes(30, 40, 400, 3, 4, 0.5, clean_queries=True)(7)
    assert torch.equal(clean.support.y, draw.support.y) and torch.equal(clean.query.x, draw.query.x)
    weights = torch.linalg.lstsq(clean.query.x, clean.query.y).solution
    assert (clean.query.x @ weights - clean.query.y).abs().max() < 1e-4
    (x, y), query = draw.support, draw.query
    assert x.shape == (400, 30, 4) and y.shape == (400, 30, 1) and query.x.shape == (400, 40, 4)
    every = torch.cat([y, query.y], 1)
    assert abs(every.square().mean() - 1.25) < 0.1 and abs(every.mean()) < 0.02
    found = torch.linalg.lstsq(torch.cat([x, query.x], 1), every).solution
    residual = every - torch.cat([x, query.x], 1) @ found
    assert abs(residual.square().sum(1).mean() / 66 - 0.25) < 0.01  # 70 rows less 4 weights
    assert abs(found.square().mean() - 0.25) < 0.03


def test_the_best_plane_is_the_posterior_mean():
    """By importance weights: the mean of many weights drawn from the prior, each by its likelihood."""
    draw, g = planes(3, 5, 1, seed=2, dims=2, noise=0.5)(0), torch.Generator().manual_seed(0)
    (x, y), xq = (over(lambda d: d[0].double(), draw.support)), draw.query.x[0].double()
    w = torch.randn(400_000, 2, generator=g, dtype=torch.float64) / 2**0.5
    share = torch.softmax(-(w @ x.T - y.T).square().sum(1) / (2 * 0.25), 0)
    ours = answer(best_plane(0.5), {}, Batch(x, y), xq)
    assert (ours[:, 0] - xq @ (share @ w)).abs().max() < 5e-3


def test_harmonics_are_sines_and_cosines():
    x = rand(3, 2)
    ours = Harmonics((0.5, 2.0))(x)
    for d in range(2):
        wanted = [
            0.5 * x[:, d],
            *(f(w * x[:, d]) for f in (torch.sin, torch.cos) for w in (0.5, 2)),
        ]
        columns = [d, 2 + 2 * d, 3 + 2 * d, 6 + 2 * d, 7 + 2 * d]
        assert torch.equal(ours[:, columns], torch.stack(wanted, 1))


def test_another_frequency_is_another_x():
    """A sin(ωx − φ): the same curves as at frequency 1 and x' = ωx, and the exact answer knows it."""
    fast, slow = (noisy_sinusoids(4, 9, 3, seed=1, frequency=w)(2) for w in (2.0, 1.0))
    assert torch.equal(fast.support.x, slow.support.x)
    a = sinusoids(1, 1, 3, seed=1, dtype=torch.float64, frequency=1.5)(0)
    b = sinusoids(1, 1, 3, seed=1, dtype=torch.float64)(0)
    assert not torch.equal(a.query.y, b.query.y)
    (x, y), xq = over(lambda d: d[0], fast.support), fast.query.x[0]
    ours = answer(best_possible(0.3, frequency=2.0), {}, Batch(x, y), xq)
    assert torch.equal(ours, answer(best_possible(0.3), {}, Batch(2 * x, y), 2 * xq))


def test_every_second_step_has_few_points():
    """And clean queries lie on the curve: two amplitudes and a phase are told by the query alone."""
    both = [varied_sinusoids(20, 9, 2, 0, clean_queries=c, few=4) for c in (False, True)]
    plain = varied_sinusoids(20, 9, 2, 0)
    sizes = [both[0](step).support.y.shape[1] for step in range(60)]
    assert max(sizes[1::2]) == 4 and max(sizes[::2]) > 15 and min(sizes) == 1
    for step in (0, 2, 4):
        assert torch.equal(both[0](step).query.y, plain(step).query.y)
        assert torch.equal(both[1](step).support.y, plain(step).support.y)
        x, y = over(lambda d: d[0].double(), both[1](step).query)
        fit = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], 1), y).solution
        assert (torch.cat([x.sin(), x.cos()], 1) @ fit - y).abs().max() < 1e-4


def test_the_exact_answer_is_best_at_its_own_frequency():
    draws = noisy_sinusoids(10, 50, 100, seed=4, frequency=1.5)
    knows, takes_one = (
        evaluate(best_possible(0.3, frequency=w), {}, draws, 100, mse_loss, progress=False).mean
        for w in (1.5, 1.0)
    )
    assert knows < 0.13 < 1 < takes_one


def test_the_rate_rises_and_falls():
    how = rising_adam(0.1, 50, rise=0.2)
    rule = how["optimizer"]([torch.zeros(1, requires_grad=True)])
    schedule, rates = how["schedule"](rule), []
    for _ in range(50):
        rates.append(rule.param_groups[0]["lr"])
        rule.step()
        if len(rates) < 50:
            schedule.step()
    peak = rates.index(max(rates))
    assert abs(rates[0] - 0.1 / 25) < 1e-12 and abs(max(rates) - 0.1) < 1e-12 and peak == 9
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[-1] < 1e-5
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_rate_falls_where_a_rise_would_be_one_step():
    """torch's own schedule divides by 0 there."""
    how = rising_adam(0.1, 10, rise=0.1)
    schedule = how["schedule"](how["optimizer"]([torch.zeros(1, requires_grad=True)]))
    assert 0.09 < schedule.get_last_lr()[0] <= 0.1


def test_an_expanded_network_is_its_halves_after_the_expansion():
    net, first = seeded(lambda: mlp(5, (7,), 2)).float(), Harmonics((0.5, 1.0))
    x = torch.randn(4, 1, generator=G)
    both = expanded(net, first)
    assert torch.equal(both(x), net.head(net.body(first(x)))) and both.head is net.head
