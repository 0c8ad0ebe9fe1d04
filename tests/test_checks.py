"""Derivatives in full, against closed forms and against each other."""

from __future__ import annotations

import pytest
import torch
from problems import half_mse, normal, seeded, vectors
from torch import nn
from torch.nn.functional import mse_loss

from mtlib.bilevel import bilevel, first_order, implicit, secant, unrolled
from mtlib.book.checks import differences, error_and_cosine, gradient, gradients, hessian
from mtlib.core import apply, parameters, take
from mtlib.data.linear import exact_stream, linear_tasks, losses_at_rest, resting
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.hyper import flat
from mtlib.nets import mlp


def test_of_a_quadratic_they_are_its_matrix():
    """½ (w − w_t)ᵀ Σ_t (w − w_t) has the gradient Σ_t (w − w_t) and the Hessian Σ_t."""
    tasks = linear_tasks(tasks=3, dims=4, seed=2)
    net, w = nn.Linear(4, 1, bias=False).double(), normal(4)
    for t in range(3):
        batch = take(exact_stream(tasks)(0).query, t)

        def loss(theta, batch=batch):
            return half_mse(apply(net)(theta, batch.x), batch.y)

        theta = {"weight": w[None]}
        sigma = tasks.covariances[t]
        assert (hessian(loss, theta) - sigma).abs().max() < 1e-12
        assert (gradient(loss, theta) - sigma @ (w - tasks.weights[t])).abs().max() < 1e-12


def test_of_a_network_each_is_the_difference_of_the_one_before():
    net = seeded(lambda: mlp(3, (4,), 2))
    phi, batch = parameters(net), take(vectors().support, 0)

    def loss(theta):
        return mse_loss(apply(net)(theta, batch.x).tanh(), batch.y)

    assert (differences(loss, phi) - gradient(loss, phi)).abs().max() < 1e-8
    matrix = hessian(loss, phi)
    assert (matrix - matrix.mT).abs().max() < 1e-12
    v = normal(len(matrix))
    slope = differences(lambda theta: gradient(loss, theta) @ v, phi)
    assert (slope - matrix @ v).abs().max() < 1e-7


@pytest.mark.parametrize("way", [unrolled, first_order, secant, implicit(2.0, iterations=3)])
def test_the_mean_of_the_tasks_gradients_is_the_objectives(way):
    net = seeded(lambda: mlp(3, (4,), 2))
    learner, draw = maml(net, mse_loss, 0.1, 2, strength=2.0), vectors()
    whole = bilevel(learner, mse_loss, way).value_and_grad(learner.init(), draw)[1]
    rows = gradients(way(learner, mse_loss), learner.init(), draw)
    assert rows.shape == (4, len(flat(whole)))
    assert (rows.mean(0) - flat(whole)).abs().max() < 1e-12
    alone = bilevel(learner, mse_loss, way).value_and_grad(learner.init(), take(draw, slice(2, 3)))[
        1
    ]
    assert (rows[2] - flat(alone)).abs().max() < 1e-12


def test_errors_and_cosines_are_of_rows():
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    found = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -2.0]])
    error, cosine = error_and_cosine(found, exact)
    assert torch.allclose(error, torch.tensor([1.0, 2**0.5, 2.0]))
    assert torch.allclose(cosine, torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize("steps", [1, 3])
def test_where_methods_rest_their_gradients_are_0(steps):
    tasks = linear_tasks(tasks=9, dims=4, seed=3)
    net, draw = nn.Linear(4, 1, bias=False).double(), exact_stream(tasks)(0)
    learner = maml(net, half_mse, 0.3, steps)
    objectives = {
        "joint training": (joint(net, half_mse), draw.query),
        "MAML": (bilevel(learner, half_mse), draw),
        "first-order MAML": (bilevel(learner, half_mse, first_order), draw),
        f"Reptile, {steps} steps": (bilevel(learner, half_mse, secant), draw),
    }
    points = resting(tasks, 0.3, steps, reptile_steps=steps)
    assert points.keys() == objectives.keys()
    for name, (objective, data) in objectives.items():
        slope = objective.value_and_grad({"weight": points[name][None]}, data)[1]
        assert slope["weight"].abs().max() < 1e-12


@pytest.mark.parametrize("steps", [0, 2])
def test_the_loss_at_rest_is_the_objectives(steps):
    tasks = linear_tasks(tasks=9, dims=4, seed=3)
    net, draw, rates = nn.Linear(4, 1, bias=False).double(), exact_stream(tasks)(0), (0.1, 0.3)
    found = losses_at_rest(tasks, rates, steps)
    for i, rate in enumerate(rates):
        objective = bilevel(maml(net, half_mse, rate, steps), half_mse)
        for name, w in resting(tasks, rate).items():
            assert abs(objective({"weight": w[None]}, draw) - found[name][i]) < 1e-12


def test_tasks_that_share_a_covariance_have_one_resting_point():
    tasks = linear_tasks(tasks=9, dims=4, seed=3, alike=True)
    for point in resting(tasks, 0.3, 2).values():
        assert (point - tasks.weights.mean(0)).abs().max() < 1e-12
