"""The page on metric learners: its closed forms are those of the package."""

from __future__ import annotations

from collections import OrderedDict
from math import e

import pytest
import torch
from pages import run_until
from torch import nn
from torch.distributions import MultivariateNormal

from mtlib.core import Batch, parameters
from mtlib.learners.metric import matching


def test_the_best_answer_is_bayes_rule(small):
    """Classes N(0, 4I), items N(mean, I): the predictive density of each class, by conditioning one joint Gaussian."""
    page = run_until("metric", "bayes")
    g = torch.Generator().manual_seed(0)
    d, n = 5, 3
    shown = torch.randn(5, n, d, generator=g).double() + 2 * torch.randn(5, 1, d, generator=g)
    asked = 3 * torch.randn(40, d, generator=g).double()
    joint = 4 * torch.ones(n + 1, n + 1).double() + torch.eye(n + 1)  # one dimension of n + 1 items
    weights = torch.linalg.solve(joint[:n, :n], joint[:n, n])
    spread = joint[n, n] - weights @ joint[:n, n]
    assert abs(spread - (1 + 4 / (4 * n + 1))) < 1e-12
    means = torch.einsum("n,knd->kd", weights, shown)
    density = [MultivariateNormal(m, spread * torch.eye(d).double()).log_prob(asked) for m in means]
    posterior = torch.stack(density, 1).softmax(1)
    rotation = torch.from_numpy(page["rotation"])[:, :d]
    labels = torch.eye(5).double().repeat_interleave(n, 0)
    phi = {"body.weight": rotation.T.contiguous()}
    learner = page["bayes"](n)
    support = Batch(shown.flatten(0, 1) @ rotation.T, labels)
    logits = learner.predict(learner.adapt(phi, support), asked @ rotation.T)
    ours = (logits / (2 * spread)).softmax(1)
    assert (ours - posterior).abs().max() < 1e-10


@pytest.mark.parametrize("others, ceiling", [(-1.0, e**2 / (e**2 + 4)), (0.0, e / (e + 4))])
def test_the_ceilings_of_an_unscaled_vote_are_reached(others, ceiling):
    """By a query on its own item, the other items opposite to it, or at right angles."""
    plane = nn.Sequential(OrderedDict(body=nn.Identity(), head=nn.Linear(2, 5))).double()
    away = torch.tensor([others, 1.0 - abs(others)]).double()
    support = Batch(
        torch.stack([torch.tensor([1.0, 0.0]).double(), *[away] * 4]), torch.eye(5).double()
    )
    learner = matching(plane)
    theta = learner.adapt(parameters(plane), support)
    top = learner.predict(theta, support.x[:1]).exp()[0, 0].item()
    assert abs(top - ceiling) < 1e-9
