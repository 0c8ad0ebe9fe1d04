"""Patients of four hospitals: the real files and their traps, what stands in for them, and the page's choices."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pages import run_until

from mtlib import download
from mtlib.data import heart as module
from mtlib.data.heart import COLUMNS, FILES, drawn, encode, hospitals, labelled, prepare

FOLDER = os.environ.get("MTLIB_DATA", "")
real = pytest.mark.skipif(
    not os.path.isdir(os.path.join(FOLDER, "heart")),
    reason="MTLIB_DATA names no folder with heart",
)


@real
def test_counts_and_missing_values():
    found = hospitals()
    counts = {k: (len(h.y), int(h.y.sum())) for k, h in found.items()}
    assert counts == {
        "Cleveland": (303, 139),
        "Hungarian": (294, 106),
        "Switzerland": (123, 115),
        "VA Long Beach": (200, 149),
    }
    chol, slope = COLUMNS.index("chol"), COLUMNS.index("slope")
    assert np.isnan(found["Switzerland"].x[:, chol]).all(), "0 mg/dl is no measurement"
    assert np.isnan(found["VA Long Beach"].x[:, chol]).sum() == 56  # 49 of them coded as 0
    assert np.isnan(found["Hungarian"].x[:, slope]).sum() == 190
    assert {k: int(h.zero.sum()) for k, h in found.items()}["VA Long Beach"] == 49
    for h in found.values():
        assert h.source.endswith("(real)") and h.x.shape == (len(h.y), 13)
        assert np.nanmin(h.x[:, COLUMNS.index("trestbps")]) > 0


def test_the_stand_in_is_the_same_each_time_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MTLIB_DATA", raising=False)
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    monkeypatch.setattr(download, "cache", lambda: tmp_path)
    a, b = hospitals(), drawn()
    assert list(a) == list(FILES)
    for name in FILES:
        assert a[name].source.endswith("(stand-in)")
        np.testing.assert_array_equal(a[name].x, b[name].x)
        assert np.isnan(a[name].x).any() and 0.2 < a[name].y.mean() < 0.98


def test_names_become_columns_and_missing_stays_missing():
    x = np.zeros((3, 13))
    x[:, COLUMNS.index("cp")] = (2, 4, np.nan)
    coded = encode(x)
    assert coded.shape == (3, 18)
    np.testing.assert_array_equal(coded[0, 2:5], [0, 1, 0])
    np.testing.assert_array_equal(coded[1, 2:5], [0, 0, 0])
    assert np.isnan(coded[2, 2:5]).all() and np.isfinite(coded[2, [0, 1, 5]]).all()


def test_the_preparation_is_the_sources_own():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(50, 4))
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 3] = np.nan  # a column nobody measured
    done = prepare(x)
    z = done(x)
    assert np.allclose(z.mean(0), 0) and np.allclose(z[:, :3].std(0), 1)
    assert np.allclose(done.fill[:3], np.nanmean(x[:, :3], 0))
    assert np.isfinite(done(np.full((1, 4), np.nan))).all()
    assert np.allclose(
        done(x + 1)[:, :3][~np.isnan(x[:, :3])].mean(), 1 / done.scale[:3].mean(), atol=0.1
    )


def test_draws_leave_both_kinds_on_both_sides():
    y = np.array([0] * 8 + [1] * 115)
    found = labelled(y, 10, 30, seed=1)
    assert len(found) == 30
    for chosen, rest in found:
        assert sorted([*chosen, *rest]) == list(range(123)) and len(chosen) == 10
        assert 0 < y[chosen].sum() < 10 and (y[rest] == 0).sum() >= 2
    again = labelled(y, 10, 30, seed=1)
    assert all((a[0] == b[0]).all() for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="at least 3 patients of each kind"):
        labelled(np.ones(20, dtype=int), 5, 1, 0)


def test_the_settings_are_chosen_without_labels_of_the_target(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    plain = drawn()

    def run(shuffled: str | None):
        found = dict(plain)
        if shuffled:
            y = np.random.default_rng(0).permutation(plain[shuffled].y)
            found[shuffled] = plain[shuffled]._replace(y=y)
        monkeypatch.setattr(module, "hospitals", lambda: found)
        return run_until("heart", "CHOSEN")["CHOSEN"]

    before = run(None)
    for target in ("Switzerland", "Cleveland"):
        after = run(target)
        mine = {k: v for k, v in before.items() if k[0] == target}
        assert mine and mine == {k: after[k] for k in mine}
