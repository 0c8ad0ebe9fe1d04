"""The page on metric learners: its closed forms are those of the package, and its solutions' numbers hold."""

from __future__ import annotations

import re
from collections import OrderedDict
from math import e, exp, log

import pytest
import torch
from pages import BOOK
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, parameters
from mtlib.data.planted import best_possible, planted
from mtlib.evaluate import evaluate
from mtlib.learners import metric
from mtlib.learners.metric import matching, protonet
from mtlib.nets import mlp, two_halves
from mtlib.tasks import episodes


@pytest.mark.parametrize("counts", [(3, 3, 3, 3, 3), (1, 2, 3, 5, 9), (1, 1, 1, 1, 1)])
def test_the_best_answer_is_bayes_rule(counts):
    """Classes N(0, 4I), items N(mean, I): the predictive density of each class, by conditioning one joint Gaussian."""
    g = torch.Generator().manual_seed(0)
    d = 5
    shown = [
        torch.randn(n, d, generator=g).double() + 2 * torch.randn(1, d, generator=g).double()
        for n in counts
    ]
    asked = 3 * torch.randn(40, d, generator=g).double()
    density = []
    for n, items in zip(counts, shown, strict=True):
        joint = 4 * torch.ones(n + 1, n + 1).double() + torch.eye(n + 1)  # one dimension
        weights = torch.linalg.solve(joint[:n, :n], joint[:n, n])
        spread = joint[n, n] - weights @ joint[:n, n]
        assert abs(spread - (1 + 4 / (4 * n + 1))) < 1e-12
        at = MultivariateNormal(weights @ items, spread * torch.eye(d).double())
        density.append(at.log_prob(asked))
    posterior = torch.stack(density, 1).softmax(1)

    learner = best_possible()
    own = read_out()
    labels = torch.eye(5).double().repeat_interleave(torch.tensor(counts), 0)
    support = Batch(torch.cat(shown) @ own.T, labels)
    logits = learner.predict(learner.adapt({}, support), asked @ own.T)
    assert (logits.softmax(1) - posterior).abs().max() < 1e-10


def read_out() -> torch.Tensor:
    """Rᵀ's informative rows, (30, 5), found from what `best_possible` makes of unit vectors."""
    one = Batch(torch.eye(30).double(), torch.eye(30).double())
    return best_possible().adapt({}, one)["means"] * 5 / 4


def test_the_best_answer_reads_the_dimensions_that_count():
    """In them the items of a class vary by 1, in all others by 2; and no member of the family is better."""
    data, read = planted(64, 100, seed=2), read_out().float()
    assert (read.T @ read - torch.eye(5)).abs().max() < 1e-6
    within = data.items - data.items.mean(1, keepdim=True)
    assert (within @ read).std((0, 1)).max() < 1.1
    assert abs((within**2).sum(-1).mean() - (within @ read).pow(2).sum(-1).mean() - 25 * 4) < 2
    stream = episodes(data, 5, 1, 15, tasks=20, seed=1)
    linear = two_halves(nn.Linear(30, 5, bias=False), nn.Linear(5, 5))
    best = evaluate(best_possible(), {}, stream, 200)
    plain = evaluate(protonet(linear), {"body.weight": read.T.contiguous()}, stream, 200)
    assert best.minus(plain).low > 0 and 0.82 < best.mean < 0.87


def test_a_class_without_labels_has_its_prior():
    theta = best_possible().adapt({}, Batch(torch.ones(1, 30), torch.eye(5)[:1]))
    assert theta["means"][1:].abs().max() == 0 and theta["variances"].tolist()[1:] == [5.0] * 4


@pytest.mark.parametrize("others, ceiling", [(-1.0, e**2 / (e**2 + 4)), (0.0, e / (e + 4))])
def test_the_ceilings_of_an_unscaled_vote_are_reached(others, ceiling):
    """By a query on its own item, the other items opposite to it, or at right angles."""
    top = certainty(1.0, others)
    assert abs(top - ceiling) < 1e-9


def certainty(scale: float, others: float) -> float:
    plane = nn.Sequential(OrderedDict(body=nn.Identity(), head=nn.Linear(2, 5))).double()
    away = torch.tensor([others, 1.0 - abs(others)]).double()
    support = Batch(
        torch.stack([torch.tensor([1.0, 0.0]).double(), *[away] * 4]), torch.eye(5).double()
    )
    learner = matching(plane, scale)
    theta = learner.adapt(parameters(plane), support)
    return learner.predict(theta, support.x[:1]).exp()[0, 0].item()


def test_the_scale_that_lets_a_vote_be_sure():
    """ex-metric-scale: behind a ReLU 99 % with five ways."""
    s = log(4 * 0.99 / 0.01)
    assert abs(s - log(396)) < 1e-9 and round(s) == 6
    assert abs(certainty(s, 0.0) - 0.99) < 1e-9 and abs(exp(s) / (exp(s) + 4) - 0.99) < 1e-12


def test_loud_dimensions_drown_the_distance():
    """ex-metric-width: the mean stays 40, the variance grows by 12 σ⁴ a dimension, and its root passes 40 at eight."""
    g = torch.Generator().manual_seed(0)
    a, b, c = 2 * torch.randn(3, 2_000_000, generator=g).double()
    term = (a - b) ** 2 - (a - c) ** 2
    assert abs(term.var() / (12 * 2**4) - 1) < 0.01 and abs(term.mean()) < 0.05
    means = 2 * torch.randn(2, 200_000, 5, generator=g).double()
    assert abs((means[0] - means[1]).pow(2).sum(-1).mean() - 40) < 0.2
    deviation = [2**2 * (12 * n) ** 0.5 for n in (8, 9)]
    assert deviation[0] < 40 < deviation[1]


def test_a_learned_scale_starts_as_protonet_and_is_trained():
    """ex-metric-tadam: the solution's code as it stands on the page."""
    text = (BOOK / "metric.ipynb").read_text("utf8").encode().decode("unicode_escape", "ignore")
    code = re.search(r"    def learned_scale\(net\):.*?return plain\._replace\([^)]*\)", text, re.S)
    assert code
    lines = [line.strip('",\r\n').removeprefix(' "') for line in code[0].split("\n")]
    body = [line.split('"', 1)[-1].rstrip('",') if '"    ' in line else line for line in lines]
    space = {"metric": metric, "torch": torch}
    source = "\n".join(line.removeprefix("    ") for line in body if line.strip())
    exec(source, space)
    net = mlp(30, (8,), 5, seed=0)
    learner, plain = space["learned_scale"](net), protonet(net)
    draw = episodes(planted(8, 20), 5, 1, 5, tasks=2, seed=0)(0)
    phi = learner.init()
    value, grads = bilevel(learner, cross_entropy).value_and_grad(phi, draw)
    assert value == bilevel(plain, cross_entropy)(plain.init(), draw)
    assert grads["log_s"].abs() > 0
