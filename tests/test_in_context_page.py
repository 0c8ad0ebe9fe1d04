"""The page on learning in context: its exact answers and headline numbers, recomputed by other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.book.results import recorded, recorded_pages
from mtlib.data.linear import planes
from mtlib.data.sinusoids import noisy_sinusoids
from mtlib.learners.amortised import in_context

RECORD = pytest.mark.skipif(
    "in_context" not in recorded_pages(), reason="the page has not been recorded"
)


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        return run_until("in_context", "COUNTS")


def by_sums(x, y, xq, noise, frequency=1.0):
    """The posterior mean as a sum over 300 × 300 midpoints of amplitude and phase, in numpy."""
    a = 0.1 + 4.9 * (np.arange(300) + 0.5) / 300
    phase = np.pi * (np.arange(300) + 0.5) / 300
    a, phase = (v.ravel() for v in np.meshgrid(a, phase))
    off = y[:, None] - a * np.sin(frequency * x[:, None] - phase)
    log = -(off**2).sum(0) / (2 * noise**2)
    weight = np.exp(log - log.max())
    curves = a * np.sin(frequency * xq[:, None] - phase)
    return curves @ (weight / weight.sum())


@pytest.mark.parametrize("asked", ["3", "10", "noise 0.1", "frequency 2"])
def test_the_exact_answers_of_the_last_table(page, asked):
    """The one that knows the true distribution, for the first tasks of a test."""
    truth = {
        "noise 0.1": page["best_possible"](0.1),
        "frequency 2": page["best_possible"](0.3, frequency=2.0),
    }.get(asked, page["EXACT"])
    noise, frequency = 0.1 if "noise" in asked else 0.3, 2.0 if "freq" in asked else 1.0
    draw = page["tests"][asked](0)
    for t in range(2):
        (x, y), xq = (part[t, :, 0].double() for part in draw.support), draw.query.x[t]
        ours = truth.predict(truth.adapt({}, page_batch(draw, t)), xq)[:, 0].double()
        theirs = by_sums(x.numpy(), y.numpy(), xq[:, 0].double().numpy(), noise, frequency)
        assert np.abs(ours.numpy() - theirs).max() < 0.02


def page_batch(draw, t):
    return type(draw.support)(*(part[t] for part in draw.support))


def test_test_curves_are_not_training_or_validation_curves(page):
    """Seeds of the streams differ, and so do the curves."""
    test, trained = page["tests"]["3"](0), page["curves_of"](seed=0)(0)
    assert not torch.isin(test.support.x, trained.support.x).any()


def test_all_learners_see_x_in_the_same_sines(page):
    body, rival = (page["net"](*widths).body[0] for widths in ((), (40, 40)))
    assert torch.equal(body.omega, rival.omega) and body.omega.tolist() == [0.25, 0.5, 1, 2]
    assert in_context(page["net"](), layers=3).init().keys() >= {"process.read2.weight"}


@RECORD
def test_the_record_has_the_exact_errors():
    """Of 200 curves from three points, and of 200 linear tasks, each by numpy alone."""
    details = recorded("in_context").details
    draw = noisy_sinusoids(3, 50, 200, seed=3002, noise=0.3)(0)
    (x, y), (xq, yq) = ([v[..., 0].double().numpy() for v in part] for part in draw)
    errors = [
        ((by_sums(*task[:3], 0.3) - task[3]) ** 2).mean() for task in zip(x, y, xq, yq, strict=True)
    ]
    held = details["curves"]["ways"]["exact answer"]["columns"]["3"]["runs"][0]
    assert abs(np.mean(errors) - held) < 2e-3
    draw = planes(10, 50, 200, seed=3002, dims=5, noise=0.5)(0)
    (x, y), (xq, yq) = ([v.double().numpy() for v in part] for part in draw)
    stacked = np.concatenate([x, np.tile(np.sqrt(5) * 0.5 * np.eye(5), (200, 1, 1))], 1)
    targets = np.concatenate([y, np.zeros((200, 5, 1))], 1)
    w = [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(stacked, targets, strict=True)]
    held = details["depth"]["ways"]["exact ridge"]["columns"]["10"]["runs"][0]
    assert abs(((xq @ np.stack(w) - yq) ** 2).mean() - held) < 1e-5


@RECORD
def test_no_recorded_run_is_better_than_the_exact_answer():
    """On the very curves a learner could be lucky; on 200 of them none of the learned ones is."""
    ways = recorded("in_context").details["curves"]["ways"]
    for column in ("1", "3", "5", "10", "20"):
        exact = ways["exact answer"]["columns"][column]["runs"][0]
        for way in set(ways) - {"exact answer"}:
            assert len(ways[way]["columns"][column]["runs"]) == 5
            assert min(ways[way]["columns"][column]["runs"]) > exact
