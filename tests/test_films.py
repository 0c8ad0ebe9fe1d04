"""Ratings of films: the real files, what stands in for them, biases that do not know their answer, the page's choices."""

from __future__ import annotations

import numpy as np
from machine import real
from pages import run_until

from mtlib.data import movietweetings as module
from mtlib.data.movietweetings import drawn, known, movietweetings


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


def test_the_settings_are_chosen_without_ratings_of_test_users(small):
    plain = drawn(users=200, films=80)

    def run(changed):
        rating = plain.rating.copy()
        rows = np.isin(plain.user, changed)
        rating[rows] = 10 - rating[rows]
        small.setattr(module, "movietweetings", lambda: plain._replace(rating=rating))
        return run_until("films", "CHOSEN")

    before = run([])
    after = run(before["FOLDS"][0])
    assert before["CHOSEN"] and before["CHOSEN"] == after["CHOSEN"]
