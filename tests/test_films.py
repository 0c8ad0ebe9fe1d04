"""Ratings of films: the real files, what stands in for them, biases that do not know their answer, the page's choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from machine import real
from pages import run_until
from sklearn.metrics import ndcg_score

from mtlib.book.results import recorded
from mtlib.data import movietweetings as module
from mtlib.data.movietweetings import (
    drawn,
    factors,
    factors_in_time,
    known,
    movietweetings,
    past,
    rated_before,
)
from mtlib.evaluate import interval
from mtlib.metrics import ndcg


def in_order(r):
    steps = np.diff(r.user)
    return (steps >= 0).all() and (np.diff(r.time)[steps == 0] >= 0).all()


@real("movietweetings")
def test_counts_and_order():
    r = movietweetings()
    assert len(r.user) == 100_000 and r.user.max() + 1 == 16_554 and r.film.max() + 1 == 10_506
    assert (np.bincount(r.user) >= 20).sum() == 1_154
    assert r.rating.min() == 0 and r.rating.max() == 10 and in_order(r)
    assert r.source.endswith("(real)") and r.genres.shape == (10_506, 25)
    assert (np.diff(r.genres.sum(0)) <= 0).all() and r.year.min() > 1880 and r.year.max() < 2016


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
    a, b = movietweetings(), drawn()
    assert all(np.array_equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))
    assert a.source.endswith("(stand-in)") and in_order(a)


def test_biases_solve_their_normal_equations_and_leave_the_own_rating_out():
    r = drawn(users=60, films=30)
    training = r.user < 50
    k = known(r, training, shrink=2.0, rounds=200)
    u, f, y = r.user[training], r.film[training], r.rating[training]
    design = np.zeros((len(y), 50 + 30))
    design[np.arange(len(y)), u] = 1
    design[np.arange(len(y)), 50 + f] = 1
    solution = np.linalg.solve(design.T @ design + 2 * np.eye(80), design.T @ (y - y.mean()))
    np.testing.assert_allclose(k.bias[~training], solution[50:][r.film[~training]], atol=1e-8)
    row = int(np.flatnonzero(training)[7])
    others = training & (r.film == r.film[row])
    others[row] = False
    left = r.rating[others] - y.mean() - solution[r.user[others]]
    assert abs(k.bias[row] - left.sum() / (others.sum() + 2)) < 1e-8
    assert k.seen[row] == others.sum()


def test_the_past_is_what_a_fit_on_earlier_days_says():
    r = drawn(users=60, films=30)
    training = r.user < 50
    found = past(r, training, 2.0, rounds=300)
    day = (r.time - r.time.min()) // 86_400
    for row in (3, 400, 900, len(day) - 1):
        before = training & (day < day[row])
        if before.any():
            k = known(r, before, 2.0, rounds=300)
            other = r.film[before] == r.film[row]
            assert found.seen[row] == other.sum()
            assert abs(found.mean[row] - r.rating[before].mean()) < 1e-9
            # a row that is in no average, of the same film
            asked = np.flatnonzero(~before & (r.film == r.film[row]))[0]
            assert abs(found.bias[row] - k.bias[asked]) < 1e-6
    assert (rated_before(r, training, r.film, r.time) == found.seen).all()
    first = day == 0
    assert (found.seen[first] == 0).all() and (found.mean[first] == 5).all()


def test_no_rating_of_the_same_day_or_later_reaches_an_average():
    r = drawn(users=80, films=30)
    training = r.user < 60
    day = (r.time - r.time.min()) // 86_400
    cut = int(np.median(day))
    changed = r._replace(rating=np.where(day >= cut, 10 - r.rating, r.rating))
    before, after = (past(v, training, 2.0) for v in (r, changed))
    early = day <= cut
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a[early], b[early]) and not np.isnan(a).any()
    assert not np.array_equal(before.bias[~early], after.bias[~early])
    left = r.rating - 7
    z = [factors_in_time(v, training, v.rating - 7, 3, 1.0, 3 * 86_400) for v in (r, changed)]
    period = (r.time - r.time.min()) // (3 * 86_400)
    early = period <= cut // 3
    assert np.array_equal(z[0][early], z[1][early]) and (z[0][period == 0] == 0).all()
    assert left.any() and not np.array_equal(*z)


def test_a_question_may_be_any_film_at_any_time():
    r = drawn(users=60, films=30)
    training = r.user < 50
    rows = np.array([5, 100, 700])
    own = past(r, training, 2.0, r.film[rows], r.time[rows], rounds=300)
    plain = past(r, training, 2.0, rounds=300)
    for a, b in zip(own, plain, strict=True):
        np.testing.assert_allclose(a, b[rows], atol=1e-6)  # other days' turns were left out
    assert own.seen.tolist() == plain.seen[rows].tolist()


def test_factors_are_a_minimum_of_their_equation_on_what_was_rated():
    rng = np.random.default_rng(0)
    user, film = np.divmod(rng.choice(20 * 12, 90, replace=False), 12)
    left, start = rng.normal(size=90), rng.normal(size=(14, 2))
    q = factors(user, film, left, start, 1.5, rounds=3000)
    assert q.shape == (14, 2) and (q[12:] == 0).all(), "nobody rated the last two"

    def solved(of, by, x):
        rows = [(x[by[of == i]], left[of == i]) for i in range(of.max() + 1)]
        return np.stack([np.linalg.solve(z.T @ z + 1.5 * np.eye(2), z.T @ y) for z, y in rows])

    p = solved(user, film, q)
    np.testing.assert_allclose(solved(film, user, p), q[:12], atol=1e-6)
    one = factors(user, film, left, start, 1.5, rounds=1)
    np.testing.assert_allclose(one[:12], solved(film, user, solved(user, film, start)))


@pytest.fixture
def changed(small):
    """The page until what it ranks, on drawn ratings; those of some users turned around."""
    plain = drawn(users=200, films=80)

    def run(users):
        rows = np.isin(plain.user, users)
        rating = np.where(rows, 10 - plain.rating, plain.rating)
        small.setattr(module, "movietweetings", lambda: plain._replace(rating=rating))
        return run_until("films", "MIXES")

    return run


def test_labels_of_test_users_choose_nothing(changed):
    before = changed([])
    after, other = changed(before["FOLDS"][0]), changed(before["FOLDS"][-1])

    def choices(page):
        (part,) = page["PARTS"]
        return {k: part.tuning(k) for k in page["GRIDS"]}, page["MIXES"], page["CHOSEN"]

    assert choices(before) == choices(after)
    assert choices(before)[0] != choices(other)[0], "validation users do choose"
    error = "MAE", "biases"
    assert before["found"].told(error[1]) != after["found"].told(error[1])


@real("movietweetings")
def test_the_error_of_biases_in_the_record_is_numpys():
    """The first fold once more, day by day with loops, at the slope and shrinkage that were chosen."""
    r, held = movietweetings(), recorded("films").details["fold 0"]["ways"]["biases"]
    slope, shrink = held["setting"]
    count = np.bincount(r.user)
    who = np.random.default_rng(0).permutation(np.flatnonzero(count >= 20))
    split = np.array_split(who, 5)
    test, apart = split[0], np.isin(r.user, np.concatenate([split[0], split[4]]))
    day = (r.time - r.time.min()) // 86_400
    of_user, of_film = np.zeros(len(count)), np.zeros(r.film.max() + 1)
    average = np.empty(len(day))
    for today in range(day.max() + 1):
        old = np.flatnonzero(~apart & (day < today))
        u, f, y = r.user[old], r.film[old], r.rating[old]
        mean = y.mean() if len(y) else 5.0
        n_film, n_user = np.zeros_like(of_film), np.zeros_like(of_user)
        np.add.at(n_film, f, 1)
        np.add.at(n_user, u, 1)
        for _ in range(3):
            total, sums = np.zeros_like(of_film), np.zeros_like(of_user)
            np.add.at(total, f, y - mean - of_user[u])
            of_film = total / (n_film + 2)
            np.add.at(sums, u, y - mean - of_film[f])
            of_user = sums / (n_user + 2)
        last = np.zeros_like(of_film)
        np.add.at(last, f, y - mean - of_user[u])
        now = np.flatnonzero(day == today)
        average[now] = mean + (last / (n_film + 2))[r.film[now]]
    found = []
    for user in test:
        rows = np.flatnonzero(r.user == user)
        base = 7 + slope * (average[rows] - 7)
        mood = (r.rating[rows[:15]] - base[:15]).sum() / (15 + shrink)
        found.append(np.abs(base[15:] + mood - r.rating[rows[15:]]).mean())
    column = held["columns"]["15 ratings"]
    np.testing.assert_allclose(column["groups"], found, atol=1e-4)
    assert column["runs"][0] == pytest.approx(np.mean(found), abs=1e-5)


@real("movietweetings")
def test_a_random_orders_ndcg_is_scikit_learns():
    """The page's number, by scikit-learn: equal scores for the 16th and later ratings of every test user."""
    r = movietweetings()
    found = []
    for user in np.flatnonzero(np.bincount(r.user) >= 20):
        later = r.rating[np.flatnonzero(r.user == user)[15:]]
        expected = ndcg_score([later], [np.zeros(len(later))])
        ours = ndcg(torch.zeros(len(later)), torch.from_numpy(later)).item()
        assert ours == pytest.approx(expected, abs=1e-9)
        found.append(expected)
    assert round(float(np.mean(found)), 2) == 0.94


def test_numbers_of_solutions():
    gains = np.array([8.0] * 10 + [4.0] * 2)
    worst = ndcg_score([gains], [-gains])
    lot = ndcg_score([gains], [np.zeros(12)])
    assert (round(worst, 2), round(lot, 2)) == (0.89, 0.97)
    assert round(1.4**2 / 0.8**2, 1) == 3.1
    rng = np.random.default_rng(0)
    moods = rng.normal(scale=0.8, size=100_000)
    sums = 15 * moods + rng.normal(scale=1.4 * 15**0.5, size=100_000)
    errors = {k: ((sums / (15 + k) - moods) ** 2).mean() for k in (1.0, 3.0625, 8.0)}
    assert min(errors, key=errors.get) == 3.0625


@real("movietweetings")
def test_shuffled_users_are_hardly_easier():
    """The solution's number, in NumPy: biases with slope 0.9 and κ = 4, ratings in their order and in another."""
    r, count = movietweetings(), np.bincount(movietweetings().user)
    first = np.cumsum(count) - count
    who = np.random.default_rng(0).permutation(np.flatnonzero(count >= 20))
    split, rng, gaps = np.array_split(who, 5), np.random.default_rng(1), []
    for f, test in enumerate(split):
        k = past(r, ~np.isin(r.user, [*test, *split[f - 1]]), 2.0)
        base = 7 + 0.9 * (k.mean + k.bias - 7)
        for user in test:
            rows = first[user] + np.arange(count[user])
            off = []
            for some in (rows, rng.permutation(rows)):
                left = r.rating[some] - base[some]
                off.append(np.abs(left[15:] - left[:15].sum() / 19).mean())
            gaps.append(off[0] - off[1])
    found = interval(torch.tensor(gaps))
    assert (round(found.mean, 3), round(found.interval, 3)) == (0.005, 0.017)
