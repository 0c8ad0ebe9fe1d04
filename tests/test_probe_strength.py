"""The strength of `linear_probe` by cross-validation, beside scikit-learn and a loop written out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.core import Batch
from mtlib.learners.finetune import LIMITS, STRENGTHS, linear_probe, lowest, lp_ft
from mtlib.nets import two_halves
from mtlib.tasks import one_hot

PLAIN = two_halves(nn.Identity(), nn.Linear(4, 3)).double()


def labelled(shots, spread=1.0, seed=0, ways=3):
    """`shots` items of each class around its mean, in mixed order."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat_interleave(torch.tensor(shots))
    labels = labels[torch.randperm(len(labels), generator=g)]
    x = torch.randn(len(labels), 4, generator=g, dtype=torch.float64)
    return x + spread * torch.eye(ways, 4, dtype=torch.float64)[labels], labels


def by_class(labels, k):
    """The i-th item of its class in fold i mod k."""
    seen, fold = {}, []
    for c in labels.tolist():
        fold.append(seen.get(c, 0) % k)
        seen[c] = seen.get(c, 0) + 1
    return np.array(fold)


def chosen(x, y, loss=cross_entropy, net=PLAIN, iterations=500):
    learner = linear_probe(net, loss, strength=None, iterations=iterations)
    return learner.adapt({}, Batch(x, y))


@pytest.mark.parametrize(
    ("shots", "k"), [((10, 10, 10), 5), ((3, 7, 12), 3), ((2, 2, 2), 2), ((5, 9, 6), 5)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_strength_of_a_loop_over_scikit_learns_logistic_regression(shots, k, seed):
    x, labels = labelled(shots, seed=seed)
    fold, z, y = by_class(labels, k), x.numpy(), labels.numpy()
    tried = {}

    def held_out(s):
        total = 0.0
        for i in range(k):
            inside = fold != i
            model = LogisticRegression(C=1 / (s * inside.sum()), tol=1e-10, max_iter=5000)
            p = model.fit(z[inside], y[inside]).predict_proba(z[~inside])
            total += log_loss(y[~inside], p, labels=[0, 1, 2], normalize=False)
        return total

    grid = [10.0**e for e in range(-6, 4)]
    tried = {s: held_out(s) for s in grid}
    best = min(tried, key=tried.get)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if best in LIMITS else "error")
        theta = chosen(x, one_hot(labels, 3, torch.float64))
    assert theta["probe.strength"].item() == pytest.approx(best)
    model = LogisticRegression(C=1 / (best * len(x)), tol=1e-12, max_iter=5000).fit(z, y)
    said = (x @ theta["probe.weight"].mT + theta["probe.bias"]).softmax(1).numpy()
    assert np.abs(said - model.predict_proba(z)).max() <= 1e-4


def test_it_is_the_strength_of_logistic_regression_cv():
    x, labels = labelled((10, 10, 10))
    fold = by_class(labels, 5)
    pairs = [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that scikit-learn will rename
        model = LogisticRegressionCV(
            Cs=[1 / (s * 24) for s in STRENGTHS],
            cv=pairs,
            scoring="neg_log_loss",
            tol=1e-10,
            max_iter=5000,
        ).fit(x.numpy(), labels.numpy())
    found = chosen(x, one_hot(labels, 3, torch.float64))["probe.strength"].item()
    assert found == pytest.approx(1 / (24 * float(np.ravel(model.C_)[0])))


def test_real_targets_choose_as_ridge_regression_does():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(23, 4, generator=g, dtype=torch.float64)
    y = x[:, :2] + 0.8 * torch.randn(23, 2, generator=g, dtype=torch.float64)
    fold = np.arange(23) % 5

    def ridge(s, inside):  # mean of squares over n·2 numbers + ½ s‖W‖²
        return Ridge(alpha=s * inside.sum()).fit(x.numpy()[inside], y.numpy()[inside])

    def held_out(s):
        off = [
            (ridge(s, fold != i).predict(x.numpy()[fold == i]) - y.numpy()[fold == i]) ** 2
            for i in range(5)
        ]
        return np.concatenate(off).mean()

    best = min([10.0**e for e in range(-6, 4)], key=held_out)
    net = two_halves(nn.Identity(), nn.Linear(4, 2)).double()
    theta = chosen(x, y, mse_loss, net)
    assert theta["probe.strength"].item() == pytest.approx(best)
    right = ridge(best, np.full(23, True))
    assert np.abs(theta["probe.weight"].numpy() - right.coef_).max() <= 1e-6


@pytest.mark.parametrize("best", [1e-5, 1e-4, 0.01, 1.0, 10.0, 100.0])
def test_an_edge_of_the_grid_is_passed(best):
    tried = []

    def loss(s):
        tried.append(s)
        return abs(np.log10(s) - np.log10(best))

    assert lowest(loss) == pytest.approx(best)
    assert min(tried) < 0.9 * best and max(tried) > 1.1 * best and len(tried) == len(set(tried))


def test_at_the_last_strength_it_warns():
    with pytest.warns(UserWarning, match="still falls at the strength 1e-06"):
        assert lowest(lambda s: s) == LIMITS[0]
    with pytest.warns(UserWarning, match=r"at the strength 1000.*tell nothing about y"):
        assert lowest(lambda s: -s) == LIMITS[1]
    with pytest.warns(UserWarning, match="at the strength 1000"):  # of equal ones the largest
        assert lowest(lambda s: 1.0) == LIMITS[1]
    with pytest.raises(ValueError, match="held-out loss that is a number"):
        lowest(lambda s: float("nan"))
    x, labels = labelled((8, 8, 8), spread=60.0)
    with pytest.warns(UserWarning, match="the features determine y"):
        chosen(x, one_hot(labels, 3, torch.float64))


def test_below_two_items_a_class_it_is_a_hundredth():
    for shots in ((1, 1, 1), (1, 6, 6)):
        x, labels = labelled(shots)
        y = one_hot(labels, 3, torch.float64)
        theta, fixed = chosen(x, y), linear_probe(PLAIN, iterations=500).adapt({}, Batch(x, y))
        assert theta["probe.strength"].item() == 0.01
        assert torch.equal(theta["probe.weight"], fixed["probe.weight"])
    theta = chosen(x[:2], torch.randn(2, 3).double(), mse_loss)
    assert theta["probe.strength"].item() == 0.01


def test_a_class_without_items_and_the_same_choice_again():
    x, labels = labelled((12, 12, 0), spread=0.3)
    y = one_hot(labels, 3, torch.float64)
    first, again = chosen(x, y), chosen(x, y)
    assert all(torch.equal(first[k], v) for k, v in again.items())
    assert bool(first["probe.weight"].isfinite().all())


def test_lp_ft_begins_at_the_chosen_probe():
    x, labels = labelled((6, 6, 6))
    support = Batch(x, one_hot(labels, 3, torch.float64))
    net = two_halves(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    nn.init.eye_(net.body.weight)
    probe = linear_probe(net, strength=None)
    solved = probe.adapt(probe.init(), support)
    theta = lp_ft(net, cross_entropy, 0.1, 0, strength=None).adapt(probe.init(), support)
    assert torch.equal(theta["head.weight"], solved["probe.weight"])
    assert "probe.strength" in solved


def test_a_given_strength_leaves_no_entry():
    x, labels = labelled((6, 6, 6))
    theta = linear_probe(PLAIN, strength=0.1).adapt({}, Batch(x, one_hot(labels, 3, torch.float64)))
    assert set(theta) == {"probe.weight", "probe.bias"}
