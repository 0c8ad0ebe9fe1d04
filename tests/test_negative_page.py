"""Negative transfer: where pooling stops helping, and what the folds of the target's labels notice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pages import run_until

from mtlib.book.weighing import lowest, noisy, worlds


@pytest.fixture
def page(small):
    return run_until("negative", "decided")


def test_pooling_stops_helping_where_predicted(page):
    """E4: δ* = 0.797 with 200 source and 30 target examples in ten dimensions."""
    assert page["crossover"](30) == pytest.approx(0.797, abs=5e-4)
    assert page["simulated"](30, 2_000) == pytest.approx(0.797, rel=0.02)


def test_the_crossover_is_where_the_two_predicted_risks_are_equal(page):
    for n in (15, 40, 200):
        assert page["pooled"](n, page["crossover"](n)) == pytest.approx(page["alone"](n))


def test_with_many_examples_the_border_is_the_noise_of_the_measured_distance(page):
    for n in (200, 2000, 10**6):
        assert page["crossover"](n) == pytest.approx(math.sqrt(10 * (1 / n + 1 / 200)), rel=0.05)


def test_pooling_is_the_plain_fit_of_all_examples(page):
    sets = worlds(torch.zeros(2, 2, 10).double(), (30, 200), noisy, 0)
    x, y = (torch.cat(part, 1).numpy() for part in zip(*sets, strict=True))
    found = lowest(sets, page["both"](30), (0.0,))[:, :, 0]
    for r in range(2):
        plain = np.linalg.lstsq(x[r], y[r], rcond=None)[0]
        alone = np.linalg.lstsq(x[r, :30], y[r, :30], rcond=None)[0]
        assert np.allclose(found[r], [plain, alone], atol=1e-10)


def test_the_differences_are_of_losses_on_labels_that_were_held_out(page):
    """One fold by hand, with numpy's least squares."""
    sets = worlds(torch.zeros(1, 2, 10).double(), (20, 200), noisy, 1)
    (x, y), (xs, ys) = ((d[0].numpy() for d in data) for data in sets)
    held = np.arange(20) % 5 == 3
    pooled = np.linalg.lstsq(np.r_[x[~held], xs], np.r_[y[~held], ys], rcond=None)[0]
    alone = np.linalg.lstsq(x[~held], y[~held], rcond=None)[0]
    expected = (x[held] @ pooled - y[held]) ** 2 - (x[held] @ alone - y[held]) ** 2
    assert np.allclose(page["differences"](sets)[0, held], expected)


def test_what_the_exercises_say(page):
    assert page["crossover"](10**6) == pytest.approx(math.sqrt(10 / 200), rel=1e-3)  # about 0.22
    assert page["pooled"](30, 0.0) / page["alone"](30) < 0.1
    page["N_SOURCE"] = 20
    assert page["crossover"](30) == pytest.approx(1.30, abs=5e-3)
    assert page["pooled"](30, 0.0) / page["alone"](30) == pytest.approx(0.49, abs=0.01)


@pytest.mark.parametrize(("times", "least"), [(0.0, 0.93), (2.0, 0.99)])
def test_the_measured_distance_decides_as_the_exercise_says(page, times, least):
    n, delta = 40, times * page["crossover"](40)
    truth = torch.zeros(2000, 2, 10).double()
    truth[:, 1, 0] = delta
    sets = worlds(truth, (n, 200), noisy, 7)
    rows = torch.cat([page["both"](n), torch.tensor([[0.0, 1.0]]).double()])
    theta = lowest(sets, rows, (0.0,))[:, :, 0]
    pooled, alone, _ = theta.square().sum(-1).unbind(1)
    measured = (theta[:, 1] - theta[:, 2]).square().sum(-1)
    taken = measured < 2 * (page["alone"](n) + page["alone"](200))
    assert (taken == (pooled < alone)).double().mean() > least
