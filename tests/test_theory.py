"""The page on theory: its formulas where the answer is known."""

from __future__ import annotations

import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.core import Batch


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("theory", "noisy")


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


def test_noise_falls_on_support_labels_alone_and_is_the_same_each_time(page):
    clean = page["sinusoids"](5, 7, 3, seed=1)
    noisy = page["noisy"](clean, 0.5, seed=2)
    a, b, c = noisy(4), noisy(4), clean(4)
    assert torch.equal(a.support.y, b.support.y) and not torch.equal(a.support.y, c.support.y)
    assert torch.equal(a.support.x, c.support.x)
    assert all(torch.equal(u, v) for u, v in zip(a.query, Batch(*c.query), strict=True))
