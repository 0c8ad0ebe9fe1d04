"""The page "When MAML training fails": what the solutions of its exercises state."""

from __future__ import annotations

import math

import pytest
import torch
from pages import at_small_scale, run_until
from torch import nn

from mtlib.bilevel import bilevel, sharpness
from mtlib.core import Batch, Episode, take
from mtlib.data.linear import exact_stream
from mtlib.learners.gradient import anil, maml, momentum
from mtlib.learners.preconditioned import learned
from mtlib.train import cosine_adam, fit


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        return run_until("maml_fails", "slope")


def test_after_37_steps_a_thousand_times(page):
    """Exercise thousand, in one direction: x so that the curvature is 1."""
    line, x = nn.Linear(1, 1, bias=False).double(), torch.ones(1, 4, 1).double()
    draw, phi = Episode(Batch(x, x), Batch(x, x)), {"weight": torch.zeros(1, 1).double()}

    def size(k):
        learner = maml(line, page["half"], 2.1, k)
        return bilevel(learner, page["half"]).value_and_grad(phi, draw)[1]["weight"].abs().item()

    assert sharpness(maml(line, page["half"], 2.1, 1), phi, draw).item() == pytest.approx(2.1)
    assert size(36) / size(0) < 1000 < size(37) / size(0)
    assert math.log(1000) / math.log(1.21) == pytest.approx(36.2, abs=0.05)


def test_the_heads_sharpness_is_no_higher(page):
    """Exercise head: for each of a hundred waves."""
    net, mse, phi = page["NET"], page["mse"], page["parameters"](page["NET"])
    draw = page["new"](0)
    whole, head = (sharpness(way(net, mse, 0.03, 1), phi, draw, 100) for way in (maml, anil))
    assert bool((head <= whole * 1.001).all()) and head.median() < 0.7 * whole.median()


@pytest.mark.parametrize(("reach", "falls"), [(3.7, True), (3.9, False)])
def test_momentum_moves_the_edge_to_3_8(page, reach, falls):
    """Exercise momentum: 2 (1 + μ)."""
    support = take(exact_stream(page["world"])(0).support, 0)
    phi = {"weight": page["zero"]}
    learner = maml(page["line"], page["half"], reach / page["top"], 400, rule=momentum())
    loss, _ = learner.adapt.descent(phi, support)
    assert bool(loss(learner.adapt(phi, support)) < loss(phi)) == falls


def test_a_rate_learned_by_its_logarithm(page):
    """Exercise log: it cannot leave its first value by more than the schedule adds up to."""
    net, mse = page["NET"], page["mse"]
    own = {"log_lr": torch.tensor(0.01).log()}
    learner = learned(own, lambda phi: maml(net, mse, phi["log_lr"].exp(), 5))
    run = fit(bilevel(learner, mse), learner.init(), page["waves"], 30, **cosine_adam(3e-3, 30))
    moved = (run.params["log_lr"] - own["log_lr"]).abs().item()
    assert 0.005 < moved < 1.2 * 0.003 * 30 / 2
    assert math.isclose(0.003 * 200 / 2, 0.3)  # the page's schedule


def test_the_forty_steps_of_the_figure(page):
    """At 2.1 the meta-gradient grows as the steepest direction does, at 0.5 it dies."""
    slope = page["slope"]
    grown, dead = (slope(r, 40).norm() / slope(r, 1).norm() for r in (2.1, 0.5))
    assert 1.1**70 < grown < 1.1**80 and dead < 1e-6
