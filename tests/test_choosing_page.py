"""The page on choosing: who reads test labels, what a louder network gains, and the numbers of its solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.data import digits as module
from mtlib.data.digits import changed, prepared


def stand_in(wrong: bool):
    """The stand-in's scanners; where `wrong`, the labels of each one's test half are those of other images."""
    found = {}
    for name, (images, y) in changed().items():
        x = torch.from_numpy(np.stack([prepared(i, 16, True) for i in images]))[:, None]
        y = y.copy()
        if wrong:
            tested = np.random.default_rng(9).permutation(len(y))[: len(y) // 2]
            y[tested] = np.random.default_rng(0).permutation(y[tested])
        found[name] = module.Domain(x, torch.from_numpy(y.astype(np.int64)), "x (stand-in)")
    return found


@pytest.fixture(scope="module")
def runs():
    with at_small_scale() as patch:
        found = []
        for wrong in (False, True):
            held = stand_in(wrong)
            patch.setattr(module, "scanners", lambda held=held, **_: held)
            found.append(run_until("choosing", "loss"))
        yield found


def test_test_labels_choose_nothing_but_the_bad_habits_column(runs):
    a, b = runs
    ways = a["CHOICE"]["all and × 4"]
    assert ways == b["CHOICE"]["all and × 4"] and len(ways) > 4
    for rule in [*a["RULES"], "labels"]:
        assert np.array_equal(a["grid"](rule, ways), b["grid"](rule, ways)), rule
    assert not np.array_equal(a["grid"]("accuracy", ways), b["grid"]("accuracy", ways))
    best = a["grid"]("accuracy", ways).max(0)
    assert np.allclose(a["taken"]("accuracy", ways), best)
    assert a["losses"](ways)["labels"].mean >= 0


def test_a_louder_copy_gains_by_raw_criteria_and_nothing_by_calibrated_ones(runs):
    page, _ = runs
    calm, loud = (
        {c: page["grid"](c, [way]) for c in [*page["RULES"], "T", "accuracy"]}
        for way in ("source only", "source only × 4")
    )
    assert np.allclose(loud["T"], 4 * calm["T"], rtol=1e-6)
    for rule in page["RULES"]:
        if rule.endswith("calibrated") or rule in ("source accuracy", "closest domains"):
            assert np.allclose(loud[rule], calm[rule], rtol=1e-6), rule
        else:
            assert not np.allclose(loud[rule], calm[rule], rtol=1e-3), rule
    assert (loud["information"] > calm["information"]).all()
    assert np.array_equal(loud["accuracy"], calm["accuracy"])


def test_equal_candidates_share_the_choice(runs):
    page, _ = runs
    value = np.array([0.3, 0.5, 0.5])[:, None, None]
    assert page["share"](value).ravel().tolist() == [0.0, 0.5, 0.5]


def test_a_source_shares_as_many_inputs_with_the_target_as_it_says():
    with at_small_scale():
        page = run_until("choosing", "probe")
    for shared in range(6):
        means = page["centres"](shared, np.random.default_rng(shared))
        used = np.flatnonzero(means.any(0))
        assert len(used) == 5 and (used < 5).sum() == shared


def test_the_best_of_twenty_equally_good_candidates_looks_three_points_better():
    rng = np.random.default_rng(0)
    best = rng.binomial(750, 0.6, (20_000, 20)).max(1) / 750
    assert best.mean() - 0.6 == pytest.approx(0.033, abs=5e-4)
    assert rng.normal(size=(100_000, 20)).max(1).mean() == pytest.approx(1.87, abs=0.01)
