"""Patients of four hospitals: the real files and their traps, what stands in for them, and the page's choices."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from machine import FOLDER, real
from pages import run_until
from scipy import stats
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mtlib.book.results import recorded
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
    pooled,
    prepare,
)
from mtlib.transfer.recalibration import in_the_large, prior_shift

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


def test_sources_and_target_are_pooled_on_the_sources_scale():
    a, b, c = (h for h, _ in zip(drawn().values(), range(3), strict=False))
    pool = pooled({"A": a, "B": b}, c)
    done = prepare(np.concatenate([encode(a.x), encode(b.x)]))
    np.testing.assert_array_equal(pool.x, done(encode(c.x)))
    np.testing.assert_array_equal(pool.xs, done(np.concatenate([encode(a.x), encode(b.x)])))
    np.testing.assert_array_equal(pool.ys, np.r_[a.y, b.y])
    assert pool.whose.tolist() == ["A"] * len(a.y) + ["B"] * len(b.y)
    cut = pooled({"A": a, "B": b}, c, limit=1.5)
    np.testing.assert_array_equal(cut.x, pool.x.clip(-1.5, 1.5))
    assert abs(cut.xs).max() == 1.5 < abs(pool.xs).max()
    alone = pooled({"A": a, "B": b}, c, lambda h: h.x[:, :1], own_scale=True)
    assert alone.x.shape == (len(c.y), 1)
    for part in (alone.x, alone.xs[: len(a.y)], alone.xs[len(a.y) :]):
        assert abs(part.mean()) < 1e-9


@pytest.fixture
def patients(small):
    """Drawn patients, whom the page takes for the hospitals'."""
    plain = drawn()
    small.setattr(module, "hospitals", lambda: plain)
    return plain


def test_nothing_is_chosen_with_outcomes_of_the_target(patients, small):
    """Each setting, and the way itself: the target's outcomes shuffled, all stay; those of a source shuffled, some move."""

    def run(shuffled: str | None, target: str):
        found = dict(patients)
        if shuffled:
            y = np.random.default_rng(0).permutation(patients[shuffled].y)
            found[shuffled] = patients[shuffled]._replace(y=y)
        small.setattr(module, "hospitals", lambda: found)
        page = run_until("heart", "scores")
        return {way: page["chosen"](way, target, 10) for way in page["WAYS"]}

    before = run(None, "Switzerland")
    assert {"L2-SP", "learned prior", "MAML", "transfer as chosen"} < {*before}
    assert sum(np.isfinite(quality) and quality < 0 for _, quality in before.values()) == 9
    assert before == run("Switzerland", "Switzerland")
    assert before != run("Cleveland", "Switzerland")


RECORD = recorded("heart")


def runs(row: str, column: str) -> np.ndarray:
    """(hospitals, seeds)."""
    return np.array(RECORD.details["hospitals"]["ways"][row]["columns"][column]["each"])


def raw(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A hospital's file, read, coded and cleaned anew: (n, 18) with NaN, (n,)."""
    table = np.genfromtxt(FOLDER / FILES[name].name, delimiter=",", missing_values="?")
    x, ill = table[:, :13], table[:, 13] > 0
    x[:, [3, 4]] = np.where(x[:, [3, 4]] == 0, np.nan, x[:, [3, 4]])
    codes = {2: (1, 2, 3), 6: (1, 2), 10: (2, 3), 12: (6, 7)}
    columns = [
        np.where(np.isnan(x[:, j]), np.nan, x[:, j] == c) if c is not None else x[:, j]
        for j in range(13)
        for c in codes.get(j, (None,))
    ]
    return np.stack(columns, 1), ill.astype(int)


@there
@pytest.mark.parametrize("target", list(FILES))
def test_the_carried_model_is_that_of_plain_scikit_learn(target):
    """The headline's log-loss and AUROC from the files, without a line of the package."""
    hospitals = {name: raw(name) for name in FILES}
    x, y = (
        np.concatenate(v)
        for v in zip(*(h for k, h in hospitals.items() if k != target), strict=True)
    )
    whose = np.repeat([0, 1, 2], [len(h[1]) for k, h in hospitals.items() if k != target])
    ready = make_pipeline(SimpleImputer(), StandardScaler())
    x, (there, truth) = ready.fit_transform(x).clip(-5, 5), hospitals[target]

    def left_out(c):
        parts = []
        for k in range(3):
            model = LogisticRegression(C=c, max_iter=1000).fit(x[whose != k], y[whose != k])
            parts.append(log_loss(y[whose == k], model.predict_proba(x[whose == k])[:, 1]))
        return np.mean(parts)

    c = min((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), key=left_out)
    risk = LogisticRegression(C=c, max_iter=1000).fit(x, y)
    risk = risk.predict_proba(ready.transform(there).clip(-5, 5))[:, 1]
    i, row = list(FILES).index(target), "source only, no patients"
    assert log_loss(truth, risk) == pytest.approx(runs(row, "log-loss")[i, 0], abs=1e-4)
    assert roc_auc_score(truth, risk) == pytest.approx(runs(row, "AUROC")[i, 0], abs=1e-3)


@there
def test_a_model_of_nine_tenths_is_that_of_plain_scikit_learn():
    """Cleveland's own model by ten folds, at the strength that the record chose."""
    hospitals = {name: raw(name) for name in FILES}
    others = np.concatenate([hospitals[k][0] for k in FILES if k != "Cleveland"])
    ready = make_pipeline(SimpleImputer(), StandardScaler()).fit(others)
    x, y = hospitals["Cleveland"]
    x = ready.transform(x).clip(-5, 5)
    tried = np.array(RECORD.details["tuning"]["target only, Cleveland"])  # (settings, labels)
    pull = (1.0, 3.0, 10.0, 30.0, 100.0)[tried[:, -1].argmax()]
    said = cross_val_predict(
        LogisticRegression(C=1 / pull, tol=1e-10, max_iter=5000),
        x,
        y,
        cv=KFold(10, shuffle=True, random_state=0),
        method="predict_proba",
    )[:, 1]
    row = "target only, nine tenths"
    assert log_loss(y, said) == pytest.approx(runs(row, "log-loss")[0, 0], abs=1e-5)
    assert roc_auc_score(y, said) == pytest.approx(runs(row, "AUROC")[0, 0], abs=1e-5)


@there
def test_what_the_text_says_of_switzerland_and_of_ca():
    """Telling everyone the share is as good as the own model; Cleveland's ca lies twenty of the sources' deviations off."""
    share = raw("Switzerland")[1].mean()
    everyone = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert abs(everyone - runs("target only, nine tenths", "log-loss")[2].mean()) < 0.02
    held = hospitals()
    pool = pooled({k: h for k, h in held.items() if k != "Cleveland"}, held["Cleveland"])
    assert round(abs(pool.x).max()) == 20


def test_versus_is_the_paired_difference_over_hospitals():
    ours, rival = RECORD.versus.ours, RECORD.versus.baseline
    saved = runs(rival, "log-loss") - runs(ours, "log-loss")  # an error saved is positive
    by = {"hospitals": saved.mean(1), "seeds": saved.mean(0)}
    half = {k: stats.t.ppf(0.975, len(v) - 1) * stats.sem(v) for k, v in by.items()}
    unit = max(half, key=half.get)
    assert (RECORD.versus.unit, RECORD.versus.n) == (unit, len(by[unit]))
    assert RECORD.versus.mean == pytest.approx(saved.mean())
    assert RECORD.versus.high - RECORD.versus.mean == pytest.approx(half[unit])


def test_a_share_that_nobody_told_is_found_without_outcomes():
    """The solution's iteration: where only the share changes it finds it, and so the log-loss of the known one."""
    rng = np.random.default_rng(0)
    y = rng.random(4000) < 0.8
    x = rng.normal(size=4000) + np.where(y, 1, -1)
    logits = torch.tensor(2 * x)  # Bayes' rule where half are ill
    share = 0.5
    for _ in range(200):
        share = torch.sigmoid(logits + prior_shift(0.5, share)).mean().item()
    assert share == pytest.approx(0.8, abs=0.02)


def test_ten_ill_of_ten_and_a_prior_worth_one_patient():
    b = in_the_large(torch.zeros(10), torch.ones(10), precision=1.0)
    assert round(100 / (1 + np.exp(-b))) == 84
