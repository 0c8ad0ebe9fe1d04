"""Patients of four hospitals: the real files and their traps, what stands in for them, and the page's choices."""

from __future__ import annotations

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from machine import FOLDER, real
from pages import run_until
from sklearn.linear_model import LogisticRegression

from mtlib.core import Batch
from mtlib.data import heart as module
from mtlib.data.download import Altered
from mtlib.data.heart import (
    COLUMNS,
    FILES,
    as_written,
    drawn,
    encode,
    hospitals,
    labelled,
    prepare,
)

there = real("heart")


@there
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
    zeros = {
        k: tuple(h.zero[:, [COLUMNS.index("trestbps"), chol]].sum(0)) for k, h in found.items()
    }
    assert zeros["VA Long Beach"] == (1, 49) and zeros["Switzerland"] == (0, 123)
    assert sum(map(sum, zeros.values())) == sum(h.zero.sum() for h in found.values())
    for h in found.values():
        assert h.source.endswith("(real)") and h.x.shape == (len(h.y), 13)
        assert np.nanmin(h.x[:, COLUMNS.index("trestbps")]) > 0
        assert not np.isnan(as_written(h)[h.zero]).any() and (as_written(h)[h.zero] == 0).all()
        np.testing.assert_array_equal(as_written(h)[~h.zero], h.x[~h.zero])


@there
def test_the_benchmarks_patients_are_those_it_counts(monkeypatch):
    """FLamby's rule, the zeros kept and a patient with a gap dropped, leaves its 303, 261, 46 and 130 patients."""
    whole = {k: ~np.isnan(as_written(h)[:, :10]).any(1) for k, h in hospitals().items()}
    assert [int(w.sum()) for w in whole.values()] == [303, 261, 46, 130]
    assert (hospitals()["Switzerland"].y[whole["Switzerland"]] == 0).sum() == 1


@there
@pytest.mark.parametrize("name", list(FILES))
def test_one_altered_file_is_an_error_and_no_stand_in(name, tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "heart", tmp_path / "heart", copy_function=shutil.copyfile)
    (tmp_path / "heart").chmod(0o755)
    copy = tmp_path / FILES[name].name
    copy.write_bytes(copy.read_bytes().replace(b"1", b"2", 1))
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    with pytest.raises(Altered, match="truncated or altered"):
        hospitals()


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
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
    with pytest.raises(ValueError, match="at least 3 patients of each class"):
        labelled(np.ones(20, dtype=int), 5, 1, 0)


@pytest.fixture
def patients(small):
    """Drawn patients, whom the page takes for the hospitals'."""
    plain = drawn()
    small.setattr(module, "hospitals", lambda: plain)
    return plain


def test_nothing_is_chosen_with_labels_of_the_target(patients, small):
    """Baselines' settings, precisions, MAML's rate and the method itself: the target's outcomes shuffled, all stay."""

    def run(shuffled: str | None):
        found = dict(patients)
        if shuffled:
            y = np.random.default_rng(0).permutation(patients[shuffled].y)
            found[shuffled] = patients[shuffled]._replace(y=y)
        small.setattr(module, "hospitals", lambda: found)
        space = run_until("heart", "by_name")
        return space["CHOSEN"]

    before = run(None)
    kinds = {"C", "alone", "weight", "intercept", "L2-SP", "MAML", "ours"}
    for target in ("Switzerland", "Cleveland"):
        after = run(target)
        mine = {k: v for k, v in before.items() if k[0] == target}
        assert {k[1] for k in mine} == kinds
        assert mine == {k: after[k] for k in mine}


def test_the_correction(patients):
    """What the page's learner claims, in one run of the page up to it."""
    space = run_until("heart", "corrected")
    penalised_maximum(space["corrected"])
    intercept_alone_and_descent(space["corrected"], space["FIXED"])


def penalised_maximum(corrected):
    """(δ*, b*) against scikit-learn's solver, with one precision for all and no source (o = 0)."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 18)), (rng.random(40) < 0.8).astype(float)
    shown = Batch(torch.tensor(np.c_[x, np.zeros(40)]), torch.tensor(y)[:, None])
    learner = corrected(pb=4.0, pw=4.0, steps=300)
    phi = {k: v.double() for k, v in learner.init().items()}
    delta = learner.adapt(phi, shown)["delta"].numpy()
    model = LogisticRegression(C=1 / 4.0, fit_intercept=False, tol=1e-10, max_iter=5000)
    np.testing.assert_allclose(delta, model.fit(np.c_[x, np.ones(40)], y).coef_[0], atol=1e-5)


def intercept_alone_and_descent(corrected, held):
    """Precisions of infinity keep the ranking; no step raises the objective."""
    rng = np.random.default_rng(2)
    x = torch.tensor(np.c_[rng.normal(size=(30, 18)), 3 * rng.normal(size=30)])
    y = torch.tensor(rng.random(30) < 0.9).double()[:, None]

    def theta(pw, steps):
        learner = corrected(pb=0.3, pw=pw, steps=steps)
        phi = {k: v.double() for k, v in learner.init().items()}
        return learner, learner.adapt(phi, Batch(x, y))

    learner, fixed = theta(held, 30)
    moved = learner.predict(fixed, x) - x[:, -1:]
    assert abs(moved.mean()) > 0.1 and moved.std() < 1e-3

    def objective(steps):
        learner, at = theta(3.0, steps)
        p = torch.tensor([3.0] * 18 + [0.3])
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return loss(learner.predict(at, x), y, reduction="sum") + 0.5 * (p * at["delta"] ** 2).sum()

    values = [objective(k).item() for k in range(12)]
    assert all(b <= a for a, b in pairwise(values)) and values[-1] < values[0]
