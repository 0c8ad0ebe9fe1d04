"""Corrections of a carried model: against scikit-learn, closed forms, finite differences, and the laws they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from mtlib.core import Batch
from mtlib.transfer.recalibration import (
    in_the_large,
    logistic_recalibration,
    prior_shift,
    revised,
    revision,
)


def patients(n=40, width=6, seed=0, share=0.7):
    rng = np.random.default_rng(seed)
    x, o = rng.normal(size=(n, width)), 2 * rng.normal(size=n)
    y = (rng.random(n) < share).astype(float)
    return torch.tensor(x), torch.tensor(o), torch.tensor(y)


def objective(delta, x, o, y, p, w=None):
    z = o + x @ delta
    loss = torch.nn.functional.softplus(torch.where(y == 1, -z, z))
    return (loss * (1 if w is None else w)).sum() + 0.5 * (p * delta.square()).sum()


def test_without_a_model_it_is_scikit_learns_regression():
    x, _, y = patients()
    p = torch.tensor([4.0] * 6 + [0.0]).double()
    delta = revised(torch.cat([x, torch.ones(40, 1)], 1), torch.zeros(40).double(), y, p)
    model = LogisticRegression(C=1 / 4, tol=1e-12, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(delta, np.r_[model.coef_[0], model.intercept_], atol=1e-6)


def test_with_an_offset_it_is_the_minimum_that_a_solver_finds():
    x, o, y = patients(seed=3)
    p = torch.linspace(0.2, 5, 6).double()
    at = revised(x, o, y, p)
    found = minimize(
        lambda d: objective(torch.tensor(d), x, o, y, p).item(), np.zeros(6), tol=1e-12
    )
    np.testing.assert_allclose(at, found.x, atol=1e-4)
    assert objective(at, x, o, y, p) <= found.fun + 1e-12


def test_weights_are_counts_and_those_of_none_are_not_there():
    x, o, y = patients(seed=1)
    p = torch.ones(6).double()
    w = torch.tensor([0.0, 1.0, 3.0, 1.0]).repeat(10).double()
    often = torch.repeat_interleave(torch.arange(40), w.long())
    assert torch.allclose(revised(x, o, y, p, w), revised(x[often], o[often], y[often], p))
    masks = (torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    each = torch.stack([revised(x[m > 0], o[m > 0], y[m > 0], p) for m in masks])
    assert torch.allclose(revised(x, o, y, p, masks), each)


def test_far_offsets_converge_too_and_an_infinite_one_is_not_a_number():
    for scale in (1.0, 30.0, 300.0):
        o = scale * torch.linspace(-1, 1, 30).double()
        y = (torch.arange(30) % 9 > 0).double()
        b = in_the_large(o, y)
        assert abs(torch.sigmoid(o + b).mean() - y.mean()) < 1e-9
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(10, 1, dtype=dtype)
        nothing = revised(x, 0 * x[:, 0], x[:, 0], torch.zeros(1, dtype=dtype))
        assert nothing.isnan().all()


def test_its_gradient_is_that_of_the_minimum():
    x, o, y = patients(12, 3, seed=2, share=0.5)
    p = torch.tensor([0.5, 1.0, 2.0]).double()
    given = [t.requires_grad_() for t in (x, o, p)]
    assert torch.autograd.gradcheck(lambda x, o, p: revised(x, o, y, p), given)


def test_it_maps_over_tasks():
    x, o, y = (
        torch.stack(v) for v in zip(*(patients(9, 2, seed=s) for s in range(4)), strict=True)
    )
    p = torch.ones(2).double()
    assert torch.allclose(
        torch.vmap(lambda *t: revised(*t, p))(x, o, y), revised(x, o, y, p), atol=1e-12
    )


def test_in_the_large_by_hand():
    """With all logits 0 the intercept is the log odds of the ill; a prior draws it to 0."""
    y = torch.tensor([1.0] * 8 + [0.0] * 2)
    assert in_the_large(torch.zeros(10), y) == pytest.approx(math.log(4))
    b = in_the_large(torch.zeros(10), y, precision=2.0)
    assert 10 / (1 + math.exp(-b)) - 8 + 2 * b == pytest.approx(0, abs=1e-9)
    assert in_the_large(torch.zeros(10), torch.ones(10), 1.0) == pytest.approx(1.6335, abs=1e-4)


def test_logistic_recalibration_is_a_regression_on_the_logit_and_undoes_a_distortion():
    rng = np.random.default_rng(0)
    true = rng.normal(size=4000) * 2
    y = torch.tensor((rng.random(4000) < 1 / (1 + np.exp(-true))).astype(float))
    told = torch.tensor(2.0 * true + 1.0)  # too sure, and too high
    a, s = logistic_recalibration(told, y)
    model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=5000).fit(told[:, None], y)
    assert (a, s) == pytest.approx((model.intercept_[0], model.coef_[0, 0]), abs=1e-4)
    assert (a, s) == pytest.approx((-0.5, 0.5), abs=0.1)
    assert logistic_recalibration(told, y, (1e9, 1e9)) == pytest.approx((0, 1), abs=1e-5)


def test_a_known_share_is_bayes_rule():
    """Two densities, mixed in other shares: the corrected posterior is exact."""
    x = np.linspace(-3, 3, 13)
    ratio = 2 * x  # log N(x; 1, 1) / N(x; −1, 1)
    for source, target in ((0.5, 0.9), (0.3, 0.3), (0.8, 0.1)):
        posterior = ratio + math.log(source / (1 - source))
        exact = ratio + math.log(target / (1 - target))
        np.testing.assert_allclose(posterior + prior_shift(source, target), exact)
    assert prior_shift(0.3, 0.3) == 0


def test_the_learner_is_the_correction_and_infinite_precisions_keep_the_ranking():
    x, o, y = patients(width=4)
    support = Batch(torch.cat([x, o[:, None]], 1), y[:, None])
    learner = revision(4, 3.0)
    phi = {k: v.double() for k, v in learner.init().items()}
    delta = learner.adapt(phi, support)["delta"]
    p = torch.tensor([3.0] * 4 + [1.0]).double()
    z = torch.cat([x, torch.ones(40, 1)], 1)
    assert torch.allclose(delta, revised(z, o, y, p), atol=1e-6)
    assert torch.allclose(
        learner.predict({"delta": delta}, support.x)[:, 0], o + z @ delta, atol=1e-12
    )
    fixed = {"log_p": torch.tensor([1e9] * 4 + [1e-3]).double().log()}
    moved = learner.predict(learner.adapt(fixed, support), support.x)[:, 0] - o
    assert moved.std() < 1e-6 < abs(moved.mean())
    assert moved.mean() == pytest.approx(in_the_large(o, y, 1e-3), abs=1e-5)
