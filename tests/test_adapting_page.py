"""The page on adapting a trained model: its linear example is the package's LP-FT, and its exercises' numbers."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.learners.finetune import lp_ft
from mtlib.learners.lora import lora
from mtlib.nets import mlp


def test_the_linear_example_is_the_packages_lp_ft(small):
    page = run_until("adapting", "excess")
    line, mse, support = page["line"], page["mse_loss"], page["worlds"][11][3]
    learner = lp_ft(line, mse, 0.1, page["DESCENT"], strength=1e-9)
    theta = learner.adapt({"body.weight": page["bodies"][11]}, support)
    w = (theta["head.weight"] @ theta["body.weight"])[0]
    off = w - page["truths"][11]
    inside = page["bases"][11] @ off
    for found, here in zip(page["excess"]["fine-tuning, probe's head"], (inside, off), strict=True):
        assert torch.allclose(found.flatten()[11], (here**2).sum(), rtol=1e-4, atol=1e-9)


def test_numbers_that_lora_moves():
    net = mlp(196, (64, 64), 5, seed=0)
    own = lora(net, torch.nn.functional.cross_entropy, 0.1, 1, rank=4).init()
    thin = sum(v.numel() for k, v in own.items() if k.endswith((".a", ".b")))
    wide = sum(v.numel() for k, v in own.items() if k in ("body.0.weight", "body.2.weight"))
    assert (thin, wide) == (1_552, 16_640)
