"""The page on adapting a trained model: its linear example is the package's LP-FT."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.learners.finetune import lp_ft


def test_the_linear_example_is_the_packages_lp_ft(small):
    page = run_until("adapting", "found")
    line, mse, support = page["line"], page["mse_loss"], page["worlds"][11][3]
    learner = lp_ft(line, mse, 0.1, page["DESCENT"], strength=1e-9)
    theta = learner.adapt({"body.weight": page["bodies"][11]}, support)
    stacked = page["after_tuning"](page["probed"], page["offset"])
    assert torch.allclose(theta["body.weight"], stacked["body.weight"][11], atol=1e-6)
    assert torch.allclose(theta["head.weight"], stacked["head.weight"][11], atol=1e-6)
