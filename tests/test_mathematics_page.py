"""The page on mathematics: what its text and the solutions of its exercises state beyond its own checks."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pages import at_small_scale, run_until
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import first_order, secant, unrolled
from mtlib.book.checks import error_and_cosine, gradient, gradients, hessian
from mtlib.core import Batch, Episode, over, take
from mtlib.data.linear import exact_stream, linear_tasks, losses_at_rest, resting
from mtlib.data.planted import planted
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.context import protomaml
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.tasks import episodes


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        return run_until("mathematics", "in_batches")


def test_two_steps_never_turn_the_gradient_of_a_quadratic_round(page):
    """Exercise even: a median error of about 195 % where the rate is 1 / λ_max."""
    _, loss, start, data, h = page["CASES"]["linear"]
    net, top = page["linear"], torch.linalg.matrix_norm(h, 2).max().item()
    for share in (0.1, 1.0, 1.95):
        learner = maml(net, loss, share / top, 2)
        ways = (gradients(way(learner, loss), start, data) for way in (first_order, unrolled))
        error, cosine = error_and_cosine(*ways)
        assert cosine.min() > 0
        if share == 1.0:
            assert error.median() == pytest.approx(1.95, abs=0.05)


def test_with_more_steps_mamls_point_is_worse_before_any_step():
    """Exercise limit: the loss is more than half as high again with 30 steps; the slowest directions decide."""
    world = linear_tasks(400, dims=5, seed=0)
    s, losses = world.covariances, []
    for steps in (1, 3, 30):
        d = (resting(world, 0.4, steps)["MAML"] - world.weights)[..., None]
        losses.append((0.5 * d.mT @ s @ d).mean())
    assert losses[0] < losses[1] and losses[2] > 1.5 * losses[0]
    assert losses[0] == pytest.approx(losses_at_rest(world, [0.4], 0)["MAML"][0].item())


def orders(draw, parts):
    """Support sets of `parts` mini-batches in every order, as one draw."""
    cut = over(lambda d: d.unflatten(1, (parts, -1)), draw)
    every = [list(order) for order in permutations(range(parts))]
    return over(lambda d: torch.cat([d[:, o].flatten(1, 2) for o in every]), cut)


@pytest.mark.parametrize("k", [2, 3])
def test_the_coefficients_of_the_expansion(page, k):
    """eq-taylor: MAML 1, 2(k − 1); FOMAML 1, k − 1; Reptile k, k(k − 1)/2."""
    on, phi, in_batches = page["on"], page["phi"], page["in_batches"]
    support = sinusoids(5 * k, 1, tasks=4, seed=2, dtype=torch.float64)(0).support
    whole = orders(support, k)
    first, last = over(lambda d: d[:, :-5], whole), over(lambda d: d[:, -5:], whole)
    pairs = [(take(last, t), take(over(lambda d: d[:, :5], whole), t)) for t in range(len(whole.x))]
    grad = sum(gradient(on(b), phi) for b, _ in pairs) / len(pairs)
    inner = sum(hessian(on(b), phi) @ gradient(on(a), phi) for b, a in pairs) / len(pairs)
    for way, steps, data, m, c in (
        (unrolled, k - 1, Episode(first, last), 1, 2 * (k - 1)),
        (first_order, k - 1, Episode(first, last), 1, k - 1),
        (secant, k, Episode(whole, last), k, k * (k - 1) / 2),
    ):
        rest = []
        for a in (1e-3, 5e-4):
            found = gradients(way(in_batches(steps, a), mse_loss), phi, data).mean(0)
            scaled = found / a if way is secant else found
            rest.append((scaled - m * grad + c * a * inner).norm())
        assert rest[0] / rest[1] == pytest.approx(4, abs=0.15)


def test_on_the_whole_support_set_a_task_meets_its_own_hessian(page):
    """Exercise whole: 2g − αHg, with a rest of second order."""
    on, phi, net, draw = page["on"], page["phi"], page["net"], page["draw"]
    pairs = [take(draw.support, t) for t in range(8)]
    g = torch.stack([gradient(on(b), phi) for b in pairs])
    hg = torch.stack([hessian(on(b), phi) @ gradient(on(b), phi) for b in pairs])
    rest = []
    for a in (1e-3, 5e-4):
        way = gradients(secant(maml(net, mse_loss, a, 2), mse_loss), phi, draw) / a
        rest.append((way - 2 * g + a * hg).norm())
    assert rest[0] / rest[1] == pytest.approx(4, abs=0.15)


def test_protomaml_at_rate_0_is_a_prototypical_network():
    """Exercise proto."""
    net = mlp(30, (16,), 5, seed=0).double()
    draw = episodes(planted(8, 9, seed=3), 5, shots=2, queries=4, tasks=1, seed=0)(0)
    support, query = (Batch(*(d[0].double() for d in part)) for part in draw)
    one, other = protomaml(net, cross_entropy, 0.0, 3), protonet(net)
    phi = {k: v.detach() for k, v in net.named_parameters()}
    a, b = (way.predict(way.adapt(phi, support), query.x).softmax(1) for way in (one, other))
    assert (a - b).abs().max() < 1e-12


def test_the_error_is_the_curvature_along_the_query_gradient():
    """eq-first-order-error, one step on a quadratic: α‖Hq‖ beside ‖(I − αH)q‖."""
    tasks, net = linear_tasks(6, dims=4, seed=1), nn.Linear(4, 1, bias=False).double()
    data, start = exact_stream(tasks)(0), {"weight": torch.zeros(1, 4).double()}
    learner = maml(net, mse_loss, 0.01, 1)  # of which the Hessian is 2Σ
    ways = [gradients(way(learner, mse_loss), start, data) for way in (first_order, unrolled)]
    bent = (2 * tasks.covariances @ ways[0][..., None])[..., 0]
    expected = 0.01 * bent.norm(dim=1) / ways[1].norm(dim=1)
    assert (error_and_cosine(*ways)[0] - expected).abs().max() < 1e-12
