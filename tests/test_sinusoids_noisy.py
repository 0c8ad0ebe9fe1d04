"""Noisy sinusoids: the curves stay, the noise has its size, and a step has one number of points."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from mtlib.core import Batch
from mtlib.data.sinusoids import (
    best_linear,
    best_possible,
    noisy_sinusoids,
    side_by_side,
    sinusoids,
    varied_sinusoids,
)
from mtlib.evaluate import answers, evaluate
from mtlib.learners.gradient import maml
from mtlib.nets import mlp


def test_noise_lies_on_the_same_curves_and_has_its_size():
    clean, noisy = sinusoids(4, 30, 200, seed=3)(5), noisy_sinusoids(4, 30, 200, 3, noise=0.5)(5)
    apart = []
    for a, b in zip(clean, noisy, strict=True):
        assert torch.equal(a.x, b.x)
        apart.append((b.y - a.y).flatten())
    off = torch.cat(apart)
    assert abs(off.mean()) < 0.02 and abs(off.std() - 0.5) < 0.02
    exact = noisy_sinusoids(4, 30, 200, 3, noise=0.0)(5)
    assert torch.equal(exact.support.y, clean.support.y)
    assert torch.equal(exact.query.y, clean.query.y)


def test_draws_follow_seed_and_step():
    for make in (noisy_sinusoids, varied_sinusoids):
        a, b = make(seed=1)(17), make(seed=1)(17)
        assert torch.equal(a.support.y, b.support.y) and torch.equal(a.query.y, b.query.y)
        assert not torch.equal(a.query.y, make(seed=1)(18).query.y)
        assert not torch.equal(a.query.y, make(seed=2)(17).query.y)


def test_a_step_has_one_number_of_points_and_all_numbers_come():
    stream = varied_sinusoids(shots=5, queries=7, tasks=3, seed=0)
    seen = set()
    for step in range(60):
        support, query = stream(step)
        n = support.x.shape[1]
        assert support.x.shape == support.y.shape == (3, n, 1) and query.y.shape == (3, 7, 1)
        assert torch.equal(support.y, noisy_sinusoids(n, 7, 3, 0)(step).support.y)
        seen.add(n)
    assert seen == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("make", [noisy_sinusoids, varied_sinusoids])
def test_numbers_that_cannot_be_are_refused(make):
    with pytest.raises(
        ValueError, match="expected shots to be a whole number of at least 1, got 0"
    ):
        make(shots=0)
    with pytest.raises(
        ValueError, match="expected noise to be a finite number of at least 0, got -1"
    ):
        make(noise=-1)


def test_answers_are_those_of_each_task_alone_and_read_no_query_label():
    learner = maml(mlp(1, (8,), 1, seed=0), torch.nn.functional.mse_loss, 0.01, 2)
    phi, draw = learner.init(), noisy_sinusoids(5, 6, 4, seed=0)(0)
    found = answers(learner, phi, draw)
    assert found.shape == (4, 6, 1) and not found.requires_grad
    for t in range(4):
        support = type(draw.support)(*(d[t] for d in draw.support))
        alone = learner.predict(learner.adapt(phi, support), draw.query.x[t])
        torch.testing.assert_close(found[t], alone)
    wrong = draw._replace(query=draw.query._replace(y=draw.query.y * float("nan")))
    assert torch.equal(answers(learner, phi, wrong), found)


def test_curves_side_by_side_are_fixed_sinusoids_with_noise():
    """Each column is A sin(x − φ) of its own, so sin x and cos x explain all but the noise, at other places in each step."""
    stream = side_by_side(30, points=40, seed=1, noise=0.2)
    (x, y), (x2, y2) = stream(0), stream(1)
    assert x.shape == (1, 40, 1) and y.shape == (1, 40, 30) and not torch.equal(x, x2)
    waves, again = (torch.cat([torch.sin(d[0]), torch.cos(d[0])], 1) for d in (x, x2))
    w = torch.linalg.lstsq(waves, y[0]).solution
    assert (y[0] - waves @ w).std().item() == pytest.approx(0.2, rel=0.1)
    assert (y2[0] - again @ w).std().item() == pytest.approx(0.2, rel=0.15)  # the same curves
    amplitude = w.norm(dim=0)
    assert amplitude.min() > 0.0 and amplitude.max() < 5.2 and (w[1] < 0.2).all()
    assert torch.equal(stream(3).y, side_by_side(30, points=40, seed=1, noise=0.2)(3).y)
    assert not torch.equal(stream(3).y, side_by_side(30, points=40, seed=2, noise=0.2)(3).y)


def test_the_best_linear_answer_is_conditioning_with_the_moments_of_drawn_curves():
    """Mean and covariance of many drawn curves at support and query places, put into the normal formula."""
    x = torch.linspace(-4, 4, 9)[:, None]
    g = torch.Generator().manual_seed(0)
    a, phase = 0.1 + 4.9 * torch.rand(200_000, 1, generator=g), torch.rand(200_000, 1, generator=g)
    drawn = a * torch.sin(x.T - torch.pi * phase)  # (curves, places)
    mean, c = drawn.mean(0), torch.cov(drawn.T)
    near, far = slice(0, 9, 3), slice(1, 9, 3)
    y = drawn[0, near]
    gain = c[far, near] @ torch.linalg.inv(c[near, near] + 0.09 * torch.eye(3))
    learner = best_linear(0.3)
    found = learner.predict(learner.adapt({}, Batch(x[near], y[:, None])), x[far])[:, 0]
    assert (found - mean[far] - gain @ (y - mean[near])).abs().max() < 0.02


def test_no_answer_is_better_than_the_exact_one_and_the_linear_one_is_close():
    stream = noisy_sinusoids(3, 50, 100, seed=5)
    exact, linear = (
        evaluate(m, {}, stream, 400, mse_loss) for m in (best_possible(), best_linear())
    )
    assert exact.mean <= linear.mean < 1.3 * exact.mean


def spread(theta, x):
    """Var[f(x) | S] for each x, by the moments that `best_possible` keeps."""
    w = torch.cat([torch.sin(x), -torch.cos(x)], 1)
    return (w @ (theta["square"] - torch.outer(theta["mean"], theta["mean"])) * w).sum(1)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_the_exact_posterior_is_that_of_weighted_draws_from_the_prior(n):
    """By importance sampling, which knows of no quadrature and no sufficient statistics."""
    learner, episode = best_possible(0.5), noisy_sinusoids(n, 40, 6, seed=3, noise=0.5)(0)
    g = torch.Generator().manual_seed(0)
    a, phase = (
        0.1 + 4.9 * torch.rand(400_000, generator=g),
        torch.pi * torch.rand(400_000, generator=g),
    )
    for t in range(6):
        x, y = episode.support.x[t], episode.support.y[t]
        theta = learner.adapt({}, Batch(x, y))
        p = torch.softmax(-((y - a * torch.sin(x - phase)) ** 2).sum(0) / 0.5, 0)
        f = a * torch.sin(episode.query.x[t] - phase)
        mean = f @ p
        assert torch.allclose(learner.predict(theta, episode.query.x[t])[:, 0], mean, atol=0.05)
        var = (f - mean[:, None]) ** 2 @ p
        assert torch.allclose(spread(theta, episode.query.x[t]), var, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_its_error_is_its_own_spread_and_the_noise_and_nodes_do_not_matter(n):
    draw = noisy_sinusoids(n, 40, 800, seed=9)(0)
    found = {}
    for points in (100, 150):
        learner = best_possible(points=points)
        theta = torch.vmap(lambda s, of=learner: of.adapt({}, s))(draw.support)
        off = torch.vmap(learner.predict)(theta, draw.query.x) - draw.query.y
        found[points] = (off**2).mean((1, 2)), torch.vmap(spread)(theta, draw.query.x).mean(1)
    error, var = found[100]
    half = 3 * (error - var).std() / 800**0.5
    assert abs((error - var).mean() - 0.09) < half
    assert torch.allclose(error.mean(), found[150][0].mean(), rtol=1e-3)


def test_no_other_learner_can_be_better_as_the_best_constant_multiple_is_one():
    """E[(y − c · mean)²] is least at c = 1: the posterior mean is a projection."""
    learner, draw = best_possible(), noisy_sinusoids(3, 40, 4000, seed=1)(0)
    said = torch.vmap(lambda s, x: learner.predict(learner.adapt({}, s), x))(
        draw.support, draw.query.x
    )
    c = (said * draw.query.y).mean() / (said**2).mean()
    assert c == pytest.approx(1, abs=0.01)
