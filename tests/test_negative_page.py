"""Negative transfer: the crossover of pooling, the weight of the target, and that no test label chooses it."""

from __future__ import annotations

import pytest
import torch
from pages import run_until

from mtlib.evaluate import interval
from mtlib.transfer.weights import exact_alpha


@pytest.fixture
def page(small):
    return run_until("negative", "validated")


def test_pooling_stops_helping_where_predicted(page):
    """E4: δ* = 0.797 with 200 source and 30 target examples in ten dimensions."""
    assert page["crossover"](30) == pytest.approx(0.797, abs=5e-4)
    assert page["simulated"](30, 10_000) == pytest.approx(0.797, rel=0.02)


def test_the_crossover_is_where_the_two_predicted_risks_are_equal(page):
    for n in (15, 40, 200):
        assert page["pooled"](n, page["crossover"](n)) == pytest.approx(page["alone"](n))


@pytest.mark.parametrize("angle", [20, 30, 45])
def test_the_best_weight_beats_all_three_ends(page, angle):
    """E5, paired over worlds; α is chosen on other worlds than it is judged on."""
    alphas = (0.3, 0.5, 0.7, 0.85)
    error, weighted, worlds = (page[k] for k in ("error", "weighted", "worlds"))
    tune, judge = worlds(angle, 40, seed=1), worlds(angle, 60, seed=2)
    best = min(alphas, key=lambda a: error(weighted(tune, a)).mean().item())
    ours = error(weighted(judge, best))
    for other in (0.0, 50 / 1050, 1.0):  # source only, pooled, target only
        gain = interval(error(weighted(judge, other)) - ours)
        assert gain.mean > gain.interval


def test_pooling_is_the_plain_fit_of_all_examples(page):
    sets = page["worlds"](30, 2)
    x, y = (torch.cat(part, 1) for part in zip(*sets, strict=True))
    plain = page["fitted"](x, y, torch.full((1050,), 1 / 1050, dtype=torch.float64))
    assert torch.allclose(page["weighted"](sets, 50 / 1050), plain, atol=1e-10)


def test_one_number_has_its_exact_weight(page):
    for delta in (0.0, 0.4, 2.0):
        best = exact_alpha(10, 50, delta, 1.0)
        error = page["squared_error"]
        assert error(best, delta) < min(error(best - 1e-3, delta), error(best + 1e-3, delta))


def test_a_weight_is_chosen_by_the_fifty_labels_alone(page):
    """The worlds hold no test labels; other labels of the target change the choice, the truth does not."""
    sets = page["worlds"](45, 6)
    chosen = page["validated"](sets)
    mixed = [sets[0], sets[1]._replace(y=sets[1].y.roll(1, dims=1))]
    assert torch.equal(page["validated"](sets), chosen)
    assert not torch.equal(page["validated"](mixed), chosen)
