"""Scores of source models: each against the same number computed another way, its invariances and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.linalg import subspace_angles
from sklearn.linear_model import BayesianRidge, LinearRegression
from sklearn.metrics import mutual_info_score

from mtlib.transfer.transferability import (
    a_distance,
    evidence_maximum,
    h_score,
    leep,
    log_evidence,
    logme,
    nce,
    transrate,
)


def draw(n=60, d=4, classes=3, signal=1.0, seed=0):
    """Features in which the class shows, and the class: (n, d) and (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    f = signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return torch.from_numpy(f), torch.from_numpy(y)


def turn(d, seed=1):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return torch.from_numpy(q)


# H-score --------------------------------------------------------------------------------------


def test_h_score_is_the_squared_canonical_correlations():
    f, y = draw()
    centred = (f - f.mean(0)).numpy()
    one_hot = np.eye(3)[y.numpy()]
    angles = subspace_angles(centred, (one_hot - one_hot.mean(0))[:, :2])
    assert abs(h_score(f, y) - (np.cos(angles) ** 2).sum()) <= 1e-10


def test_h_score_is_its_equation_and_what_least_squares_explains():
    f, y = draw()
    means = np.stack([f[y == c].mean(0).numpy() for c in y])
    within = np.cov(f.numpy().T)
    expected = np.trace(np.linalg.inv(within) @ np.cov(means.T))
    assert abs(h_score(f, y) - expected) <= 1e-10
    # Two classes: the share of the label's variance that a linear fit explains.
    f, y = draw(classes=2)
    r2 = LinearRegression().fit(f.numpy(), y.numpy()).score(f.numpy(), y.numpy())
    assert abs(h_score(f, y) - r2) <= 1e-10


def test_h_score_is_the_same_after_any_invertible_map_and_has_its_limits():
    f, y = draw()
    a = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 4)))
    assert abs(h_score(f @ a + 5, y) - h_score(f, y)) <= 1e-10
    doubled = torch.cat([f, f @ a], 1)  # a singular covariance
    assert abs(h_score(doubled, y) - h_score(f, y)) <= 1e-8
    clean = torch.eye(3, dtype=torch.float64)[y]
    assert abs(h_score(clean, y) - 2) <= 1e-10
    many, classes = draw(n=30_000, signal=0.0)
    assert 0 <= h_score(many, classes) < 0.002


# NCE and LEEP ---------------------------------------------------------------------------------


def test_nce_is_mutual_information_less_entropy():
    rng = np.random.default_rng(0)
    y = rng.integers(4, size=200)
    z = np.where(rng.random(200) < 0.5, y, rng.integers(6, size=200))
    expected = mutual_info_score(z, y) - stats.entropy(np.bincount(y))
    assert abs(nce(torch.from_numpy(z), torch.from_numpy(y)) - expected) <= 1e-12


def test_nce_limits():
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    assert nce(5 - y, y) == 0.0
    assert abs(nce(torch.zeros(6, dtype=torch.long), y) + math.log(3)) <= 1e-12


def test_leep_is_its_equation_written_out():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=40)
    y = rng.integers(3, size=40)
    total = 0.0
    for i in range(40):
        inner = 0.0
        for z in range(5):
            given = sum(p[k, z] for k in range(40) if y[k] == y[i]) / sum(
                p[k, z] for k in range(40)
            )
            inner += given * p[i, z]
        total += math.log(inner)
    assert abs(leep(torch.from_numpy(p), torch.from_numpy(y)) - total / 40) <= 1e-12


def test_leep_of_sure_answers_is_nce_and_of_none_the_entropy_of_y():
    rng = np.random.default_rng(1)
    z, y = (torch.from_numpy(rng.integers(k, size=90)) for k in (5, 3))
    sure = torch.eye(7, dtype=torch.float64)[z]  # two source classes are never answered
    assert abs(leep(sure, y) - nce(z, y)) <= 1e-12
    torn = torch.full((90, 5), 0.2)
    shares = np.bincount(y.numpy()) / 90
    assert abs(leep(torn, y) + stats.entropy(shares)) <= 1e-6


def test_leep_is_the_same_when_source_classes_change_names():
    rng = np.random.default_rng(2)
    p, y = torch.from_numpy(rng.dirichlet(np.ones(5), size=40)), torch.arange(40) % 3
    assert abs(leep(p[:, [3, 1, 4, 0, 2]], y) - leep(p, y)) <= 1e-12


# LogME ----------------------------------------------------------------------------------------


def density(f, t, alpha, beta):
    cov = np.eye(len(f)) / beta + f @ f.T / alpha
    return stats.multivariate_normal(np.zeros(len(f)), cov).logpdf(t)


@pytest.mark.parametrize(("n", "d"), [(40, 4), (12, 20)])
def test_the_evidence_is_the_log_density_of_a_normal(n, d):
    f, y = draw(n, d)
    t = (y == 1).double()
    for alpha, beta in ((1.0, 2.0), (0.3, 40.0), tuple(v.item() for v in evidence_maximum(f, t))):
        expected = density(f.numpy(), t.numpy(), alpha, beta)
        assert abs(log_evidence(f, t, alpha, beta) - expected) <= 1e-8


def test_no_other_precisions_have_more_evidence():
    f, y = draw()
    t = (y == 1).double()
    alpha, beta = (v.item() for v in evidence_maximum(f, t))
    best = log_evidence(f, t, alpha, beta)
    for a in np.geomspace(0.01, 100, 21):
        for b in np.geomspace(0.01, 100, 21):
            assert log_evidence(f, t, alpha * a, beta * b) <= best + 1e-9
    found = optimize.minimize(
        lambda v: -density(f.numpy(), t.numpy(), *np.exp(v)),
        [0.0, 0.0],
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000},
    )
    assert abs(best + found.fun) <= 1e-8
    assert np.allclose(np.exp(found.x), [alpha, beta], rtol=1e-4)


def test_the_fixed_point_is_scikit_learns_bayesian_ridge():
    f, y = draw()
    t = (y == 1).double()
    alpha, beta = (v.item() for v in evidence_maximum(f, t))
    none = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    other = BayesianRidge(tol=1e-14, max_iter=5000, fit_intercept=False, compute_score=True, **none)
    other.fit(f.numpy(), t.numpy())
    assert np.allclose([other.lambda_, other.alpha_], [alpha, beta], rtol=1e-6)
    assert abs(other.scores_[-1] - log_evidence(f, t, alpha, beta)) <= 1e-8


def test_logme_is_the_mean_over_classes_of_the_largest_log_density():
    f, y = draw()
    best = []
    for c in range(3):
        t = (y == c).double()
        best.append(density(f.numpy(), t.numpy(), *(v.item() for v in evidence_maximum(f, t))))
    assert abs(logme(f, y) - np.mean(best) / 60) <= 1e-8
    columns = torch.stack([(y == c).double() for c in range(3)], 1)
    together = evidence_maximum(f, columns)
    for c in range(3):  # each column has its own
        alone = evidence_maximum(f, columns[:, c])
        assert torch.allclose(together.alpha[c], alone.alpha, rtol=1e-9)
        assert torch.allclose(together.beta[c], alone.beta, rtol=1e-9)
    one = torch.stack([(y == c).double() for c in range(3)], 1)
    assert logme(f, one) == logme(f, y)
    assert logme(f, one[:, 0]) == logme(f, one[:, :1])


def test_logme_is_the_same_after_a_rotation_and_a_scale_and_not_after_any_map():
    f, y = draw()
    value = logme(f, y)
    assert abs(logme(f @ turn(4), y) - value) <= 1e-10
    assert abs(logme(100 * f, y) - value) <= 1e-8
    stretch = torch.tensor([1.0, 30.0, 0.05, 1.0], dtype=torch.float64)
    assert abs(logme(f * stretch, y) - value) > 1e-4


@pytest.mark.filterwarnings("error")
def test_logme_has_its_limits():
    rng = np.random.default_rng(0)
    noise, y = torch.from_numpy(rng.normal(size=(300, 5))), torch.arange(300) % 2
    # Features that say nothing: all is noise, and its variance is the mean square of the target.
    t = torch.where(y == 1, 1.0, -1.0).double()
    flat = -0.5 * (math.log(2 * math.pi) + 1)
    assert flat - 1e-9 <= logme(noise, t) < flat + 0.02
    # A linear target is met exactly: far more evidence, and still a number.
    exact = noise @ torch.ones(5, dtype=torch.float64)
    assert math.isfinite(logme(noise, exact)) and logme(noise, exact) > 5
    few = noise[:4]
    assert math.isfinite(logme(few, y[:4]))


def test_logme_ranks_signal_over_noise():
    values = [logme(*draw(200, signal=s)) for s in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)


# TransRate ------------------------------------------------------------------------------------


def test_transrate_is_its_equation_written_out_with_eigenvalues():
    f, y = draw(n=50)
    g = f.numpy() - f.numpy().mean(0)

    def rate(part):
        values = np.linalg.eigvalsh(part @ part.T / (len(part) * 0.1))
        return 0.5 * np.log1p(np.clip(values, 0, None)).sum()

    expected = rate(g) - sum((y == c).double().mean().item() * rate(g[y == c]) for c in range(3))
    assert abs(transrate(f, y, eps=0.1) - expected) <= 1e-10


def test_transrate_is_zero_where_classes_are_alike_and_the_same_after_a_rotation():
    f, _ = draw(n=20)
    both = torch.cat([f, f])
    y = torch.arange(2).repeat_interleave(20)
    assert abs(transrate(both, y)) <= 1e-10
    f, y = draw()
    assert transrate(f, y) > 0.1
    assert abs(transrate(f @ turn(4) + 2, y) - transrate(f, y)) <= 1e-8


# A-distance -----------------------------------------------------------------------------------


def test_a_distance_of_equal_and_of_separate_domains():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(n, 3))) for n in (4000, 2000))
    assert abs(a_distance(a, b)) < 0.15
    assert a_distance(a, b + 20) == 2.0
    assert a_distance(a, b + 1, seed=3) == a_distance(a, b + 1, seed=3)


def test_a_distance_is_what_the_best_threshold_leaves():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(20_000, 1))) for _ in range(2))
    # N(0, 1) against N(1, 1): the best linear rule errs with Φ(−1/2).
    expected = 2 * (1 - 2 * stats.norm.cdf(-0.5))
    assert abs(a_distance(a, b + 1) - expected) < 0.03


# Bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    f, y = draw()
    with pytest.raises(ValueError, match="as many rows as labels, got 60 and 59"):
        h_score(f, y[:-1])
    with pytest.raises(ValueError, match="at least 2 classes"):
        logme(f, torch.zeros(60, dtype=torch.long))
    with pytest.raises(ValueError, match=r"take y\.argmax\(1\)"):
        h_score(f, torch.eye(3)[y])
    with pytest.raises(ValueError, match=r"shape \(n, D\)"):
        transrate(f[:, 0], y)
    with pytest.raises(ValueError, match="finite"):
        logme(f.where(f < 1, torch.nan), y)
    with pytest.raises(ValueError, match=r"apply torch\.softmax"):
        leep(f, y)
    with pytest.raises(ValueError, match="as many z as y"):
        nce(y[:5], y)
    with pytest.raises(ValueError, match="eps > 0"):
        transrate(f, y, eps=0.0)
    with pytest.raises(ValueError, match="positive precisions"):
        log_evidence(f, y.double(), 0.0, 1.0)
    with pytest.raises(ValueError, match="one target per item"):
        evidence_maximum(f, y.double()[:5])
    with pytest.raises(ValueError, match="one column of targets"):
        log_evidence(f, f, 1.0, 1.0)
    with pytest.raises(ValueError, match="not all zero"):
        evidence_maximum(f, torch.zeros(60))
    with pytest.raises(ValueError, match="the same width"):
        a_distance(f, f[:, :2])
