"""What the page on theory takes from the package: its formulas where the answer is known."""

from __future__ import annotations

import pytest
import torch
from pages import at_small_scale, run_until
from torch import nn

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, Learner
from mtlib.data.linear import around, directions, error_after, spanned
from mtlib.data.sinusoids import named_sinusoids, noisy_sinusoids, sinusoids
from mtlib.evaluate import evaluate
from mtlib.learners.closed_form import (
    ridge_on,
    ridge_prior,
    ridge_residual,
    ridge_solution,
    shared_features,
)
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.tasks import ClassSet, cut, episodes, relabelled

mse = nn.functional.mse_loss


def normal(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, dtype=torch.float64, generator=g) for s in shapes]


# A start, or a representation ----------------------------------------------------------------


def test_directions_are_orthonormal_and_follow_their_seed():
    b = directions(12, 3, seed=4)
    torch.testing.assert_close(b.mT @ b, torch.eye(3).double())
    assert torch.equal(b, directions(12, 3, seed=4))
    assert not torch.equal(b, directions(12, 3, seed=5))


def test_tasks_lie_along_their_directions_and_may_cover_them_evenly():
    b = directions(9, 2, seed=1)
    (x, y), w = spanned(b, 40, 6, noise=0.0, seed=2, even=True)
    assert x.shape == (40, 6, 9) and y.shape == (40, 6, 1) and w.shape == (40, 9, 1)
    torch.testing.assert_close(x @ w, y)
    a = (b.mT @ w)[..., 0]
    torch.testing.assert_close(b @ a[..., None], w)
    torch.testing.assert_close(a.mT @ a, 40 * torch.eye(2).double())
    noisy = spanned(b, 400, 50, noise=0.5, seed=2)
    off = noisy[0].y - noisy[0].x @ noisy[1]
    assert abs(off.std() - 0.5) < 0.02


def test_a_start_leaves_what_its_inputs_do_not_span():
    """Without noise and with hardly any ridge, the error is exactly the part of w orthogonal to the inputs."""
    data, w = spanned(directions(12, 1, 3), 20, 5, noise=0.0, seed=4)
    q = torch.linalg.qr(data.x.mT)[0]
    found = ridge_on(torch.eye(12).double(), data, 1e-10)
    torch.testing.assert_close(found - w, q @ (q.mT @ w) - w, rtol=1e-6, atol=1e-8)


def test_mamls_inner_loop_leaves_it_too():
    data, _ = spanned(directions(12, 1, 3), 20, 5, noise=0.5, seed=4)
    net = nn.Linear(12, 1, bias=False).double()
    start = {"weight": torch.zeros(1, 12).double()}
    adapt = maml(net, mse, lr=0.01, steps=20).adapt
    theta = torch.vmap(adapt, (None, 0))(start, data)["weight"].mT
    q = torch.linalg.qr(data.x.mT)[0]
    torch.testing.assert_close(q @ (q.mT @ theta), theta, rtol=0, atol=1e-12)


def test_without_noise_the_representation_is_found_exactly():
    truth = directions(20, 3, 5)
    data, w = spanned(truth, 30, 10, noise=0.0, seed=6)
    found = shared_features(data, 3, rounds=60)
    torch.testing.assert_close(found @ found.mT, truth @ truth.mT, rtol=0, atol=1e-8)
    torch.testing.assert_close(ridge_on(found, data, 0.0), w, rtol=0, atol=1e-7)


def test_the_exercises_count_is_nearer_than_the_pages():
    """d = 30, k = 3, n₁ = 10, T = 200, n₂ = 100, noise 1: the numbers of the solution."""
    risks = []
    for seed in range(8):
        truth = directions(30, 3, 1000 * seed)
        seen, _ = spanned(truth, 200, 10, 1.0, 1000 * seed + 100, even=True)
        new, w = spanned(truth, 300, 100, 1.0, 1000 * seed + 300)
        risks.append((ridge_on(shared_features(seen, 3), new, 0.0) - w).square().sum((1, 2)).mean())
    risk = torch.stack(risks).mean().item()
    head = 3 / 96
    plain, better = 90 / 2000 + head, 3 * 27 / (7 * 200) + head
    assert 1.35 < risk / plain < 1.45 and 1.15 < risk / better < 1.25


# Must a task be split ------------------------------------------------------------------------


def centroid(strength, dims):
    """A_λ as a learner."""

    def adapt(phi, support):
        x, y = support
        lam = x.new_tensor(len(x) * strength)
        return {"w": phi["w"] + ridge_solution(x, y - x @ phi["w"], lam)}

    def init():
        return {"w": torch.zeros(dims, 1).double()}

    return Learner(init, adapt, lambda theta, x: x @ theta["w"])


@pytest.mark.parametrize("size", [None, 3])
def test_the_prior_is_where_bilevels_gradient_vanishes(size):
    data = around(torch.ones(6, 1).double(), 30, 8, noise=0.3, bend=2.0, seed=1)
    episode = cut(data, size) if size else Episode(data, data)
    objective = bilevel(centroid(0.7, 6), mse)
    zero, best = (
        objective.value_and_grad({"w": w}, episode)[1]["w"].norm()
        for w in (torch.zeros(6, 1).double(), ridge_prior(episode, 0.7))
    )
    assert best < 1e-12 * zero


def test_the_residual_is_linear_in_the_prior():
    data = cut(around(torch.zeros(4, 1).double(), 5, 7, noise=1.0, seed=2), 3)
    left, moved = ridge_residual(data, 0.5)
    (phi,) = normal(3, (4, 1))
    learner = centroid(0.5, 4)
    for t in range(5):
        support, query = (Batch(*(d[t] for d in part)) for part in data)
        theta = learner.adapt({"w": phi}, support)
        torch.testing.assert_close(
            query.y - learner.predict(theta, query.x), left[t] - moved[t] @ phi
        )


def test_tasks_around_a_point_have_their_centre_and_may_saturate():
    centre = torch.full((5, 1), 0.4).double()
    x, y = around(centre, 4000, 9, seed=1)
    w = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(w.mean(0), centre, rtol=0, atol=0.03)
    assert abs(w.var(0).mean() - 1 / 5) < 0.02
    bent = around(centre, 4000, 9, bend=2.0, seed=1)
    assert torch.equal(bent.x, x)
    torch.testing.assert_close(bent.y, torch.tanh(2 * y))


# How long may the inner loop run -------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_the_equation_is_the_error_of_mamls_inner_loop(steps):
    """The loop is linear in the labels, so that one run for each unit of noise gives its part exactly."""
    x, gap = normal(0, (6, 10), (10,))
    net = nn.Linear(10, 1, bias=False).double()
    adapt = maml(net, lambda p, y: 0.5 * mse(p, y), lr=0.1, steps=steps).adapt
    zero = {"weight": torch.zeros(1, 10).double()}

    def after(y):
        return adapt(zero, Batch(x, y[:, None]))["weight"][0]

    bias, noise = after(x @ gap) - gap, torch.vmap(after)(torch.eye(6).double())
    loop = (bias.square().sum() + 0.5**2 * noise.square().sum()).item()
    assert abs(loop / error_after(x, gap, 0.5, 0.1, steps) - 1) < 1e-12


def linear_path(sigma):
    x, gap = normal(1, (6, 10), (10,))
    return torch.tensor([error_after(x, gap, sigma, 0.1, 2**k) for k in range(14)])


def test_linear_regression_has_a_u_with_noise_and_none_without():
    assert (linear_path(0.0).diff() <= 0).all()
    noisy = linear_path(2.0)
    low = int(noisy.argmin())
    assert 0 < low < len(noisy) - 1 and noisy[-1] > 1.15 * noisy[low]
    assert (noisy[: low + 1].diff() < 0).all() and (noisy[low:].diff() > -1e-6).all()


def test_the_best_stop_keeps_the_share_of_the_distance_that_bayes_keeps():
    """One direction: (1 − αs)^k is best at τ²/(b² + τ²)."""
    x, gap, sigma = torch.ones(4, 1).double(), torch.tensor([2.0]).double(), 3.0
    path = [error_after(x, gap, sigma, 0.01, k) for k in range(1, 400)]
    kept = 0.99 ** (1 + path.index(min(path)))
    tau = sigma**2 / 4
    assert abs(kept - tau / (4 + tau)) < 0.005


def test_noise_may_fall_on_support_labels_alone():
    clean, noisy = sinusoids(5, 7, 3, seed=1)(4), noisy_sinusoids(5, 7, 3, 1, 0.5, True)(4)
    assert torch.equal(noisy.support.x, clean.support.x)
    assert not torch.equal(noisy.support.y, clean.support.y)
    assert all(torch.equal(a, b) for a, b in zip(noisy.query, clean.query, strict=True))
    both = noisy_sinusoids(5, 7, 3, 1, 0.5)(4)
    assert torch.equal(both.support.y, noisy.support.y)


# Memorisation --------------------------------------------------------------------------------


def test_a_name_belongs_to_one_curve_and_stands_beside_every_x():
    seen = {}
    stream = named_sinusoids(3, 4, 5, 6, seed=0, name=2)
    for step in range(5):
        support, query = stream(step)
        assert support.x.shape == (6, 4, 3) and query.x.shape == (6, 5, 3)
        for t in range(6):
            names = torch.cat([support.x[t, :, 1:], query.x[t, :, 1:]])
            assert (names == names[0]).all()
            x = torch.cat([support.x[t, :, 0], query.x[t, :, 0]])
            y = torch.cat([support.y[t, :, 0], query.y[t, :, 0]])
            waves = torch.stack([x.sin(), x.cos()], 1)
            fit = torch.linalg.lstsq(waves, y[:, None]).solution[:, 0]
            torch.testing.assert_close(waves @ fit, y, rtol=0, atol=1e-4)
            first = seen.setdefault(tuple(names[0].tolist()), fit)
            torch.testing.assert_close(fit, first, rtol=0, atol=1e-3)
    assert len(seen) == 3
    assert named_sinusoids(3, name=0)(0).support.x.shape[-1] == 1
    other = named_sinusoids(3, 4, 5, 6, seed=0, name=2, world=1)(0)
    assert not {tuple(n.tolist()) for n in other.query.x[:, 0, 1:]} & set(seen)


def by_class(classes=13, items=6):
    """Items that say their class."""
    rows = torch.arange(classes).float()[:, None, None].expand(classes, items, 1)
    return ClassSet(rows.clone(), [str(c) for c in range(classes)], "their own numbers")


def test_fixed_numbers_are_the_classes_rest():
    draws = [episodes(by_class(), 5, 1, 2, 8, seed=3, numbers="fixed")(s) for s in range(9)]
    for part in (p for draw in draws for p in draw):
        number = part.y.argmax(-1)
        assert torch.equal(part.x[..., 0].long() % 5, number)
    seen = {int(c) for draw in draws for c in draw.query.x.flatten()}
    assert seen == set(range(13))  # also where not all numbers have as many classes
    stream = episodes(by_class(), 5, 1, 2, 8, seed=3, numbers="fixed")
    whole, part = stream(4), stream.part(4, slice(2, 5))
    assert torch.equal(part.query.x, whole.query.x[2:5])


def test_numbers_anew_are_as_before():
    a = episodes(by_class(), 5, 1, 2, 8, seed=3)(1)
    b = episodes(by_class(), 5, 1, 2, 8, seed=3, numbers="anew")(1)
    assert torch.equal(a.query.x, b.query.x)
    assert not torch.equal(a.query.x[..., 0].long() % 5, a.query.y.argmax(-1))


def test_relabelled_changes_support_labels_alone():
    plain = episodes(by_class(), 5, 1, 2, 8, seed=3)
    moved = relabelled(plain, lambda y: y.roll(1, -1))(2)
    assert torch.equal(moved.support.y.argmax(-1), (plain(2).support.y.argmax(-1) + 1) % 5)
    assert torch.equal(moved.support.x, plain(2).support.x)
    assert all(torch.equal(a, b) for a, b in zip(moved.query, plain(2).query, strict=True))


def test_class_means_cannot_learn_numbers_by_heart():
    """What the page says of learners that compare items: wrong labels mislead them, whatever they were trained on."""
    far = by_class()._replace(items=torch.eye(13)[:, None].expand(13, 6, 13).clone())
    learner = protonet(mlp(13, (32,), 5, seed=0))
    stream = episodes(far, 5, 1, 2, 20, seed=3, numbers="fixed")
    right = evaluate(learner, learner.init(), stream, 40)
    moved = relabelled(stream, lambda y: y.roll(1, -1))
    assert right.mean == 1 and evaluate(learner, learner.init(), moved, 40).mean == 0


def test_cut_takes_the_first_rows_for_support():
    data = around(torch.zeros(4, 1), 5, 7, seed=2)
    support, query = cut(data, 3)
    assert torch.equal(torch.cat([support.x, query.x], 1), data.x)
    assert torch.equal(torch.cat([support.y, query.y], 1), data.y) and support.x.shape == (5, 3, 4)


# The page ------------------------------------------------------------------------------------


def test_the_pages_learner_by_heart_has_one_number_a_character_or_none():
    with at_small_scale():
        page = run_until("theory", "by_heart")
    page["LETTER"] = 60
    moved = [page["by_heart"](10, 0, anew)("moved").mean for anew in (0.0, 1.0)]
    assert moved[0] > moved[1] + 0.05
