"""The page on theory: its claims at a size for every day, and each failing where its condition is broken."""

from __future__ import annotations

import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.core import Batch
from mtlib.evaluate import compare


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("theory", "error_after")


# A start, or a representation ----------------------------------------------------------------


def test_a_start_leaves_what_its_inputs_do_not_span(page):
    """Without noise and with hardly any ridge, the error is exactly the part of w orthogonal to the inputs."""
    data, w = page["shared"](page["basis"](12, 1, 3), 20, 5, noise=0.0, seed=4)
    q = torch.linalg.qr(data.x.mT)[0]
    left = ((w - q @ (q.mT @ w)) ** 2).sum((1, 2))
    errors = page["errors"](torch.eye(12, dtype=torch.float64), data, w, 1e-10)
    torch.testing.assert_close(errors, left, rtol=1e-6, atol=1e-9)


def test_without_noise_the_representation_is_found_exactly(page):
    truth = page["basis"](20, 3, 5)
    data, w = page["shared"](truth, 30, 10, noise=0.0, seed=6)
    found = page["representation"](data, 3, rounds=60)
    torch.testing.assert_close(found @ found.mT, truth @ truth.mT, rtol=0, atol=1e-8)
    assert page["errors"](found, data, w, 0.0).max() < 1e-12


def test_a_start_fails_with_the_dimension_and_a_representation_does_not(page):
    low, high = (
        page["start_or_representation"](d, seed=0, new=1000, outer=outer)
        for d, outer in ((10, 40), (160, 100))
    )
    assert high["the best start"] - low["the best start"] > 0.2
    for d, found in ((10, low), (160, high)):
        assert found["the best start"] > 1 - 5 / d
        assert found["representation, multi-task"] < 0.1 and found["representation, ANIL"] < 0.1
        assert found["a random direction"] > 0.8  # not any direction: the one learned


# What a representation costs -----------------------------------------------------------------


def ratio(page, tasks, n1=40, **options):
    """Measured over predicted, for each number of examples of the new task."""
    rows = page["repeated"](tasks, n1, new=500, **options)
    return [
        r.mean / page["predicted"](tasks, n1, n2) for r, n2 in zip(rows, page["N2"], strict=True)
    ]


def test_the_rate_holds_where_its_conditions_do(page):
    for tasks in (25, 60):  # n₁T = 1000 and 2400, 10 dk = 900
        assert all(abs(r - 1) < 0.25 for r in ratio(page, tasks, draws=6))


def test_the_rate_needs_examples_even_tasks_and_a_learned_representation(page):
    assert ratio(page, 5, draws=4)[-1] > 1.5
    even, uneven = (ratio(page, 10, 100, even=e, draws=6)[-1] for e in (True, False))
    assert abs(even - 1) < 0.25 and uneven > 1.25
    arbitrary = ratio(page, 60, draws=3, learn=lambda data, k: page["basis"](30, k, 77))
    assert min(arbitrary) > 2


# Must a task be split ------------------------------------------------------------------------


def test_linear_tasks_are_better_not_split(page):
    found = page["realizable"](0.0, draws=8, lambdas=(0.3, 1.0))
    for strength in (0.3, 1.0):
        assert found[strength, 4].mean > 2 * found[strength, None].mean


@pytest.mark.parametrize(
    ("case", "factor"),
    [("linear", 1 / 1.5), ("saturating", 1.5), ("saturating, uneven inputs", 10)],
)
def test_the_order_turns_with_the_case(page, case, factor):
    """factor: how many times train-train's excess loss is train-val's, at least (above 1) or at most (below)."""
    tt, tv = (row[0].mean for row in page["excesses"](case, (1600,), 3, 10_000).values())
    assert tt > factor * tv if factor > 1 else tt < factor * tv


def test_train_train_stops_improving_only_where_tasks_are_not_linear(page):
    fall = {}
    for case in ("linear", "saturating, uneven inputs"):
        few, many = page["excesses"](case, (100, 1600), 3, 10_000)["train-train, 8"]
        fall[case] = few.mean / many.mean
    assert fall["linear"] > 8 and fall["saturating, uneven inputs"] < 3


# How long may the inner loop run -------------------------------------------------------------


def linear_path(page, sigma):
    g = torch.Generator().manual_seed(1)
    x, gap = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((6, 10), (10,)))
    return torch.stack([page["written_out"](x, gap, sigma, 0.1, 2**k) for k in range(14)])


def test_linear_regression_has_a_u_with_noise_and_none_without(page):
    assert (linear_path(page, 0.0).diff() <= 0).all()
    noisy = linear_path(page, 2.0)
    low = int(noisy.argmin())
    assert 0 < low < len(noisy) - 1 and noisy[-1] > 1.15 * noisy[low]
    assert (noisy[: low + 1].diff() < 0).all() and (noisy[low:].diff() > -1e-9).all()


def test_the_best_stop_keeps_the_share_of_the_distance_that_bayes_keeps(page):
    """One direction: (1 − αs)^k is best at τ²/(b² + τ²)."""
    x, gap, sigma = torch.ones(4, 1).double(), torch.tensor([2.0]).double(), 3.0
    steps = torch.arange(1, 400)
    path = torch.stack([page["written_out"](x, gap, sigma, 0.01, int(k)) for k in steps])
    kept = 0.99 ** steps[path.argmin()]
    tau = sigma**2 / 4
    assert abs(kept - tau / (4 + tau)) < 0.005


def test_maml_on_noisy_sinusoids_falls_and_rises_and_falls_alone_without_noise(page):
    phi = page["by_maml"](0, steps=400)
    steps = (0, 3, 100)
    free, hurt = (
        [page["error_after"](phi, k, sigma, tests=100).mean for k in steps] for sigma in (0.0, 1.0)
    )
    assert free[0] > free[1] > free[2]
    assert hurt[0] > hurt[1] and hurt[2] > 1.15 * hurt[1]
    plain, pulled = (
        page["error_after"](phi, 100, 1.0, strength=strength, tests=100) for strength in (0.0, 1.0)
    )
    gain = compare(plain, pulled)
    assert gain.mean > gain.interval


def test_noise_falls_on_support_labels_alone_and_is_the_same_each_time(page):
    clean = page["sinusoids"](5, 7, 3, seed=1)
    noisy = page["noisy"](clean, 0.5, seed=2)
    a, b, c = noisy(4), noisy(4), clean(4)
    assert torch.equal(a.support.y, b.support.y) and not torch.equal(a.support.y, c.support.y)
    assert torch.equal(a.support.x, c.support.x)
    assert all(torch.equal(u, v) for u, v in zip(a.query, Batch(*c.query), strict=True))
