"""The page "Background": what the solutions of its exercises say, on networks trained as it trains them."""

from __future__ import annotations

import math

import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.data import sinusoids as family
from mtlib.evaluate import LossRose, best_of

NAMES = ("meta-learned", "transferred", "from scratch")
RATES = (0.002, 0.005, 0.01, 0.02)


@pytest.fixture(scope="module")
def page():
    """The page's functions, and its training at nearly its full length."""
    with at_small_scale():
        space = run_until("background", "picked")
        space["STEPS"] = 500
        yield space


@pytest.fixture(scope="module")
def ways(page):
    return page["train"](0, page["tasks"])


def errors(page, ways, shots=10, steps=10, waves=100):
    """The error of each way, at its best rate, on new waves."""
    learner, loss = page["finetune"], page["mse_loss"]
    stream = page["sinusoids"](shots, queries=50, tasks=waves, seed=3)

    def best(params):  # a rate that diverges is the worst
        def quality(rate):
            return -page["error"](learner(page["net"], loss, rate, steps), params, stream, waves)

        return -best_of(RATES, quality, ordered=False).score.mean

    return {name: best(ways[name]) for name in NAMES}


def test_with_few_phases_two_of_three_gain(page, ways, monkeypatch):
    """Exercise "narrow": from scratch gets worse by a few tenths, the others better."""
    every = errors(page, ways)
    monkeypatch.setattr(family, "PHASE", (0.0, 0.8))
    few = errors(page, page["train"](0, page["tasks"]))
    assert few["transferred"] < 0.7 * every["transferred"]
    assert few["meta-learned"] < min(0.8 * every["meta-learned"], 0.5 * few["transferred"])
    assert 0.1 < few["from scratch"] - every["from scratch"] < 0.8


@pytest.mark.parametrize(("phases", "found"), [((0.0, math.pi), 4.25), ((0.0, 0.8), 4.40)])
def test_the_mean_square_of_a_wave(monkeypatch, phases, found):
    monkeypatch.setattr(family, "PHASE", phases)
    assert family.risk_of(torch.zeros_like) == pytest.approx(found, abs=0.005)


def test_one_step_of_another_size(page, ways):
    """Exercise "rate": ten times larger is far worse than no step, ten times smaller goes the right way, not far."""
    test = page["sinusoids"](10, queries=50, tasks=200, seed=3)

    def after(rate):
        learner = page["finetune"](page["net"], page["mse_loss"], rate, 1)
        return page["error"](learner, ways["meta-learned"], test, 200).mean

    small, trained = after(0.001), after(0.01)
    with pytest.warns(LossRose):
        large = after(0.1)
    assert trained < 1.2 and 2 < small < 3 and large > 5 * 3.0057


def test_a_hundred_points_and_two_hundred_steps_keep_the_order(page, ways):
    """Exercise "shots"."""
    found = errors(page, ways, shots=100, steps=200, waves=30)
    assert found["meta-learned"] < found["transferred"] < 0.15
    assert found["transferred"] < found["from scratch"] < 1
