"""What `after` says of adaptation at test time, computed anew from its record's runs."""

from __future__ import annotations

import pytest
import torch

from mtlib.book.results import recorded, recorded_pages

DETAILS = recorded("after").details if "after" in recorded_pages() else {}
pytestmark = pytest.mark.skipif("streams" not in DETAILS, reason="nothing is recorded yet")


def each(contest, method, column="accuracy"):
    held = DETAILS[contest]["ways"][method]["columns"][column]["each"]
    return torch.tensor(held, dtype=torch.float64)


def settings():
    return [k for k in DETAILS["streams"]["ways"] if "rate" in k]


def test_six_directions_and_five_seeds():
    for contest in ("test time", "streams"):
        for method in DETAILS[contest]["ways"]:
            assert each(contest, method).shape == (6, 5)


def test_a_tenth_changed_is_never_missed_and_never_late():
    """The law of the page, in every run of the record: accuracy loses no more than the share of answers changed."""
    falls = 0
    for method in DETAILS["streams"]["ways"]:
        fell, rang = (each("streams", method, c) for c in ("fell 10", "changed 10"))
        assert bool(((fell < 0) | ((rang > 0) & (rang <= fell))).all()), method
        falls += int((fell > 0).sum())
    assert falls > 100


def test_sorted_batches_fail_where_nothing_is_learned():
    for size in (16, 64):
        name = f"sorted, batch of {size}, rate 0"
        assert bool((each("streams", name, "fell 10") > 0).all())
        gap = each("streams", name) - each("streams", name, "frozen")
        assert gap.mean() < -0.3


def test_stored_statistics_mend_sorted_streams_at_the_same_rate():
    batch, stored = ("sorted, batch of 16, rate 0.01", "sorted, stored, rate 0.01")
    gap = each("streams", stored) - each("streams", batch)
    assert bool((gap.mean(1) > 0.2).all())  # in each direction


def test_shot_is_above_what_the_statistics_give():
    gap = (each("test time", "SHOT") - each("test time", "target statistics")).mean(1)
    assert bool((gap > 0).all()) and gap.mean() > 0.05
    online = each("test time", "TENT") - each("test time", "target statistics")
    assert abs(online.mean()) < 0.02


def test_the_twin_is_the_same_whatever_is_learned():
    """On the same order and seed the frozen network answers alike."""
    for order in ("mixed", "sorted"):
        twins = [each("streams", k, "frozen") for k in settings() if k.startswith(order)]
        assert all(torch.equal(t, twins[0]) for t in twins)
