"""`Tuning` chooses on validation data and keeps what it tried; `over_units` says over what a page's numbers vary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlib.book import choices, results
from mtlib.book.choices import Tuning, over_units
from mtlib.book.contest import Contest
from mtlib.book.results import paired
from mtlib.evaluate import interval, over_clusters


def test_without_a_record_the_middle_is_taken_and_nothing_is_tried():
    def trial():
        raise AssertionError("it was tried")

    choice = Tuning("no such page").choose("ridge", "fold 0", (0.1, 1.0, 10.0), trial)
    assert choice == (1.0, False)
    assert np.isnan(Tuning("no such page").best("ridge"))


@pytest.fixture
def recording(monkeypatch):
    for module in (choices, results):
        monkeypatch.setattr(module, "recording", lambda: True)


def test_a_recording_tries_each_part_once_and_takes_the_best_of_a_column(recording):
    tuning, calls = Tuning("no such page"), []

    def trial():
        calls.append(1)
        return [[0.1, 0.9], [0.3, 0.5], [0.2, 0.7]]

    grid = (0.1, 1.0, 10.0)
    assert tuning.choose("ridge", "fold 0", grid, trial) == (1.0, False)
    assert tuning.choose("ridge", "fold 0", grid, trial, column=1) == (0.1, True)
    assert len(calls) == 1
    tuning.choose("ridge", "fold 1", grid, lambda: [[0.5, 0.1]] * 3)
    assert tuning.best("ridge") == pytest.approx((0.3 + 0.5) / 2)
    assert tuning.best("ridge", 1) == pytest.approx((0.9 + 0.1) / 2)
    assert set(tuning.qualities["ridge"]) == {"fold 0", "fold 1"}


def test_words_beside_numbers_have_no_edge(recording):
    grid = [("zero", 0.1), ("zero", 1.0), ("mean", 0.1), ("mean", 1.0), ("mean", 10.0)]
    quality = [[0.0], [0.0], [0.0], [1.0], [0.0]]
    assert Tuning("a").choose("x", "p", grid, lambda: quality) == (("mean", 1.0), False)


def test_a_record_of_another_grid_is_refused(monkeypatch):
    held = {"tuning": {"ridge": {"fold 0": [[0.1], [0.2]]}}}
    monkeypatch.setattr(choices, "kept", lambda page, real: held)
    tuning = Tuning("trees")
    assert tuning.choose("ridge", "fold 0", (1, 2), lambda: []).setting == 2
    with pytest.raises(ValueError, match="settings of 'ridge'"):
        tuning.choose("ridge", "fold 0", (1, 2, 3), lambda: [])


def found(each):
    """A contest of these numbers, name -> (directions, seeds)."""
    ways = {k: {"columns": {"score": {"each": v.tolist()}}} for k, v in each.items()}
    sizes = {"score": [1.0] * len(next(iter(each.values())))}
    held = {"groups": "directions", "sizes": sizes, "ways": ways}
    return Contest("trees", dict.fromkeys([*each, "absent"]), held, False, {}, "score", True, "x")


def test_units_are_directions_clusters_and_seeds():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 6, 5, generator=g, dtype=torch.float64)
    clusters, among = [0, 0, 1, 1, 2, 2], [True] * 5 + [False]
    over = over_units(found({"a": a, "b": b}), "a", "b", "score", among, clusters, "genes")
    assert list(over) == ["genes", "clusters of genes", "seeds"]
    d = (a - b)[:5]
    assert over["genes"].interval == pytest.approx(interval(d.mean(1)).interval)
    assert over["seeds"].interval == pytest.approx(interval(d.mean(0)).interval)
    expected = over_clusters(d.mean(1), clusters[:5])
    assert over["clusters of genes"].interval == pytest.approx(expected.interval)
    assert all(s.mean == pytest.approx(float(d.mean())) for s in over.values())
    assert paired("a", "b", over).n in (3, 5)
    alone = over_units(found({"a": a}), "a")
    assert list(alone) == ["directions", "seeds"]
    assert alone["directions"].mean == pytest.approx(float(a.mean()))


def test_nothing_is_said_of_what_did_not_run():
    some = found({"a": torch.rand(3, 2)})
    assert over_units(some, "a", "absent") == {} == over_units(some, "absent")
    assert over_units(some, "a", among=[True, False, False, True]) == {}
    assert set(over_units(some, "a", clusters=[4, 4, 4])) == {"directions", "seeds"}
    with pytest.raises(ValueError, match="each of 3 directions"):
        over_units(some, "a", clusters=[0, 1])
