"""Negative transfer: where pooling stops helping, and what pooling is."""

from __future__ import annotations

import pytest
import torch
from pages import run_until


@pytest.fixture
def page(small):
    return run_until("negative", "weighted")


def test_pooling_stops_helping_where_predicted(page):
    """E4: δ* = 0.797 with 200 source and 30 target examples in ten dimensions."""
    assert page["crossover"](30) == pytest.approx(0.797, abs=5e-4)
    assert page["simulated"](30, 10_000) == pytest.approx(0.797, rel=0.02)


def test_the_crossover_is_where_the_two_predicted_risks_are_equal(page):
    for n in (15, 40, 200):
        assert page["pooled"](n, page["crossover"](n)) == pytest.approx(page["alone"](n))


def test_pooling_is_the_plain_fit_of_all_examples(page):
    sets = page["worlds"](30, 2)
    x, y = (torch.cat(part, 1) for part in zip(*sets, strict=True))
    plain = page["fitted"](x, y, torch.full((1050,), 1 / 1050, dtype=torch.float64))
    assert torch.allclose(page["weighted"](sets, 50 / 1050), plain, atol=1e-10)
