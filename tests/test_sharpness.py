"""`sharpness`: the inner rate times the largest curvature, against matrices written out in full."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import sharpness
from mtlib.book.checks import hessian
from mtlib.core import Batch, Episode, parameters, take
from mtlib.data.linear import exact_stream, linear_tasks
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.gradient import anil, maml, momentum
from mtlib.learners.metric import protonet
from mtlib.learners.preconditioned import meta_sgd, per_step_rates
from mtlib.nets import conv4, two_halves
from mtlib.tasks import one_hot


@pytest.fixture
def net():
    torch.manual_seed(0)
    return two_halves(nn.Sequential(nn.Linear(1, 6), nn.Tanh()), nn.Linear(6, 1)).double()


@pytest.fixture
def draw():
    return sinusoids(5, 5, tasks=3, seed=1, dtype=torch.float64)(0)


def by_matrices(learner, phi, draw, rates=None):
    """The eigenvalue of diag(α) H_j that is largest by size, with its sign: (T, K)."""
    rows = []
    for t in range(len(draw.support.x)):
        support = take(draw.support, t)
        loss, rate = learner.adapt.descent(phi, support)
        point, row = learner.adapt.begin(phi, support), []
        for j in range(learner.adapt.steps):
            h = hessian(loss, point[0])
            a = rate if rates is None else rates(j)
            values = torch.linalg.eigvals(a * h if rates is None else a[:, None] * h).real
            row.append(values[values.abs().argmax()])
            point = learner.adapt.step(phi, support, j, point)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [maml, anil])
def test_it_is_the_largest_eigenvalue_at_each_step(net, draw, make):
    learner = make(net, mse_loss, 0.05, 4)
    found = sharpness(learner, parameters(net), draw, iterations=300)
    assert found.shape == (3, 4)
    assert torch.allclose(found, by_matrices(learner, parameters(net), draw), rtol=1e-4)


def test_twenty_iterations_are_near(net, draw):
    learner = maml(net, mse_loss, 0.05, 3)
    found, exact = (sharpness(learner, parameters(net), draw, iterations=n) for n in (20, 300))
    assert torch.allclose(found, exact, rtol=0.02) and bool((found <= exact + 1e-9).all())


def test_a_pull_counts(net, draw):
    plain, pulled = (maml(net, mse_loss, 0.01, 1, strength=s) for s in (0.0, 3.0))
    found = [sharpness(way, parameters(net), draw, iterations=300) for way in (plain, pulled)]
    assert torch.allclose(found[1] - found[0], torch.full((3, 1), 0.03).double(), atol=1e-5)


def test_learned_rates_are_a_diagonal_matrix(net, draw):
    learner = meta_sgd(net, mse_loss, 0.05, 2)
    phi, g = learner.init(), torch.Generator().manual_seed(1)
    phi |= {k: v * (1 + torch.rand(v.shape, generator=g)) for k, v in phi.items() if k[:3] == "lr."}
    a = torch.cat([v.flatten() for k, v in phi.items() if k[:3] == "lr."])
    found = sharpness(learner, phi, draw, iterations=300)
    assert torch.allclose(found, by_matrices(learner, phi, draw, lambda j: a), rtol=1e-4)


def test_rates_of_each_step(net, draw):
    learner = per_step_rates(net, mse_loss, 0.05, 2)
    phi = learner.init()
    phi |= {k: torch.tensor([0.05, 0.01]).double() for k in phi if k[:3] == "lr."}
    exact = by_matrices(maml(net, mse_loss, lambda j: (0.05, 0.01)[j], 2), phi, draw, rates_of(net))
    assert torch.allclose(sharpness(learner, phi, draw, iterations=300), exact, rtol=1e-4)


def rates_of(net):
    size = sum(v.numel() for v in net.parameters())
    return lambda j: torch.full((size,), (0.05, 0.01)[j]).double()


def test_downward_curvature_has_its_sign():
    """L(w) = −½ c w² in one number: αλ = −αc."""
    line = nn.Linear(1, 1, bias=False).double()
    x = torch.full((2, 4, 1), 2.0).double()
    batch = Batch(x, torch.zeros_like(x))
    learner = maml(line, lambda p, y: -0.5 * (p**2).mean(), 0.1, 2)
    found = sharpness(learner, parameters(line), Episode(batch, batch))
    assert torch.allclose(found, torch.full((2, 2), -0.4).double())


def test_a_flat_loss_has_none():
    line = nn.Linear(1, 1).double()
    batch = Batch(torch.ones(1, 3, 1).double(), torch.ones(1, 3, 1).double())
    learner = maml(line, lambda p, y: 0.0 * p.mean(), 0.1, 1)
    assert sharpness(learner, parameters(line), Episode(batch, batch)).tolist() == [[0.0]]


@pytest.mark.parametrize(("reach", "grows"), [(1.9, False), (2.1, True)])
def test_above_two_the_steps_diverge(reach, grows):
    """On a quadratic it is exact: below 2 the inner loss goes to 0, above 2 it grows."""
    world = linear_tasks(tasks=1, dims=5, seed=3)
    draw, line = exact_stream(world)(0), nn.Linear(5, 1, bias=False).double()

    def half(prediction, y):
        return 0.5 * mse_loss(prediction, y)

    rate = reach / torch.linalg.eigvalsh(world.covariances[0])[-1].item()
    learner, phi = maml(line, half, rate, 200), {"weight": torch.zeros(1, 5).double()}
    found = sharpness(learner._replace(adapt=learner.adapt._replace(steps=2)), phi, draw, 200)
    assert torch.allclose(found, torch.full((1, 2), reach).double(), rtol=1e-4)
    support = take(draw.support, 0)
    loss, _ = learner.adapt.descent(phi, support)
    assert bool(loss(learner.adapt(phi, support)) > loss(phi)) == grows


def test_images_run_task_by_task():
    """A network with norms and convolutions, in float32: each task's own number, whatever stands beside it."""
    net, x = conv4(3, width=4, size=16, seed=0), torch.rand(2, 6, 1, 16, 16)
    y = torch.stack([one_hot(torch.arange(6) % 3, 3)] * 2)
    draw = Episode(Batch(x, y), Batch(x, y))
    learner = maml(net, cross_entropy, 0.1, 2)
    found = sharpness(learner, parameters(net), draw)
    alone = sharpness(learner, parameters(net), take(draw, slice(1, 2)))
    assert found.shape == (2, 2) and torch.allclose(found[1:], alone, rtol=1e-4)
    assert bool((found.abs() > 0).all())


def test_nothing_is_changed_and_no_graph_is_kept(net, draw):
    phi = {k: v.requires_grad_() for k, v in parameters(net).items()}
    before = {k: v.detach().clone() for k, v in phi.items()}
    state = torch.random.get_rng_state()
    found = sharpness(maml(net, mse_loss, 0.05, 2, rule=momentum()), phi, draw)
    assert not found.requires_grad and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(phi[k], before[k]) for k in phi)


def test_no_steps_no_numbers(net, draw):
    assert sharpness(maml(net, mse_loss, 0.05, 0), parameters(net), draw).shape == (3, 0)


def test_a_learner_without_steps_is_named(net, draw):
    with pytest.raises(ValueError, match="inner steps"):
        sharpness(protonet(net), parameters(net), draw)
