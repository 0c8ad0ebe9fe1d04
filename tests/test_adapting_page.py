"""The page on adapting a trained model: E6 as a test, the probe's cost, and settings that test labels do not choose."""

from __future__ import annotations

import torch
from pages import code_cells, mix_test_characters, run_until

from mtlib.evaluate import interval
from mtlib.learners.finetune import lp_ft


def test_probing_first_helps_with_good_features_and_not_with_bad_ones(small):
    """E6: exact risks of the linear example after adaptation to convergence."""
    page = run_until("adapting", "worlds")
    page["DESCENT"] = 3000
    cell = next(c for c in code_cells("adapting") if "def risks" in c)
    exec(cell, page)
    inside, far = ({k: v[i] for k, v in page["found"].items()} for i in (0, 1))
    probe_first, fine, zero = (
        "probe, then fine-tuning",
        "fine-tuning, random head",
        "fine-tuning, zero head",
    )
    assert far["probe"][0].max() < 1e-8 and far[probe_first][0].max() < 1e-8
    assert max(inside[k].max() for k in (fine, zero, probe_first)) < 1e-3, "all fit the examples"
    for other in (fine, zero):
        gain = interval(far[other][0] - far[probe_first][0])
        assert gain.mean > gain.interval, "good features: out of distribution"
    assert far[fine][0].mean() > 0.5 and far[zero][0].mean() < 0.3
    lost = interval(far[probe_first][-1] - far[zero][-1])
    assert lost.mean > 0, "bad features: the advantage is gone"


def test_the_linear_example_is_the_packages_lp_ft(small):
    page = run_until("adapting", "found")
    line, mse, support = page["line"], page["mse_loss"], page["worlds"][11][3]
    learner = lp_ft(line, mse, 0.1, page["DESCENT"], strength=1e-9)
    theta = learner.adapt({"body.weight": page["bodies"][11]}, support)
    stacked = page["tuned"](page["probed"], page["offset"])
    assert torch.allclose(theta["body.weight"], stacked["body.weight"][11], atol=1e-6)
    assert torch.allclose(theta["head.weight"], stacked["head.weight"][11], atol=1e-6)


def test_settings_are_chosen_without_labels_of_test_characters(small):
    before = run_until("adapting", "scores")
    mix_test_characters(small)
    after = run_until("adapting", "scores")
    assert before["CHOSEN"] and before["CHOSEN"] == after["CHOSEN"]
    assert any(
        not torch.equal(s.values, after["scores"][k].values) for k, s in before["scores"].items()
    )
