"""Users in the order of time, and contenders of the page on recommendation, against NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge

from mtlib.book import cold_start as cold
from mtlib.core import Batch, parameters
from mtlib.data.movietweetings import Ratings, drawn, past
from mtlib.evaluate import evaluate
from mtlib.learners.finetune import as_is
from mtlib.metrics import recall_at


def films() -> Ratings:
    return drawn(users=120, films=60)


def users() -> cold.Users:
    """Five users of 4 to 8 ratings; x holds the number of the row."""
    count = np.array([4, 8, 5, 6, 7])
    first = np.cumsum(count) - count
    rows = torch.arange(int(count.sum())).float()[:, None]
    return cold.Users(rows, rows / 10, first, count)


def test_features_begin_with_the_films_average_and_end_with_its_genres():
    r = films()
    k = past(r, r.user < 100, 2.0)
    x = cold.described(r, k, r.film, r.time)
    assert x.shape == (len(r.film), cold.FILM) and torch.isfinite(x).all()
    np.testing.assert_allclose(x[:, 0], k.mean + k.bias - 7, atol=1e-5)
    flat = k.mean + k.bias * (k.seen + 2) / (k.seen + 6) - 7
    np.testing.assert_allclose(x[:, 2], flat, atol=1e-5)
    np.testing.assert_allclose(x[:, 8:14], 0.5 * r.genres[r.film])
    assert (x[:, 14:] == 0).all(), "drawn films have six genres"


def test_a_test_episode_has_the_first_ratings_and_all_later_ones():
    held = users()
    data = held.test(np.array([1, 3]), 2, after=4)
    assert data.support.x[..., 0].tolist() == [[4, 5], [17, 18]]
    assert data.query.x.shape == (2, 4, 1) and data.query.x[0, :, 0].tolist() == [8, 9, 10, 11]
    assert data.query.x[1, :2, 0].tolist() == [21, 22]
    assert (data.query.y[1, 2:] == cold.MISSING).all() and (data.query.y < 99).sum() == 6
    said = data.query.y.clone()
    said[0, 0] += 2
    said[1, 3] = 5  # of a rating that is not there
    one = [cold.mean_absolute_error(s, y).item() for s, y in zip(said, data.query.y, strict=True)]
    assert one == pytest.approx([0.5, 0])


def test_practice_asks_for_later_ratings_and_is_the_same_each_time():
    held, who = users(), np.array([1, 3, 4])
    stream = held.practice(who, (1, 3), after=4, queries=2, seed=5)
    sizes = set()
    for step in range(12):
        data, again = stream(step), stream(step)
        assert torch.equal(data.query.x, again.query.x)
        first = data.support.x[..., 0]
        sizes.add(first.shape[1])
        begin = torch.from_numpy(held.first)[who].float()
        assert all(f in begin for f in first[:, 0])
        place = data.query.x[..., 0] - first[:, :1]
        size = torch.tensor([held.count[list(held.first).index(int(f))] for f in first[:, 0]])
        assert (place >= 4).all() and (place < size[:, None]).all()
        assert (place[:, 0] != place[:, 1]).all()
        torch.testing.assert_close(data.query.y, data.query.x / 10)
    assert sizes == {1, 3}
    pooled = held.pooled(who, 6, seed=5)(3)
    assert pooled.x.shape == (1, 64 * 6, 1)
    each = pooled.x[0, :, 0].view(64, 6)
    assert all(len(set(row.tolist())) == 6 for row in each)
    with pytest.raises(ValueError, match="at least 6 ratings"):
        held.practice(np.array([0]), (1,), after=4, queries=2, seed=5)


def rated(n=7, q=5, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n + q, cold.FILM + 3)))
    y = torch.from_numpy(rng.normal(size=(n, 1)))
    return Batch(x[:n], y), x[n:]


def test_biases_are_their_equation_and_a_ridge_of_what_they_leave():
    first, x = rated()
    plain = cold.biases(0.9, 4)
    said = plain.predict(plain.adapt({}, first), x)[:, 0]
    base = 0.9 * first.x[:, 0].numpy()
    mood = (first.y[:, 0].numpy() - base).sum() / (7 + 4)
    np.testing.assert_allclose(said, 0.9 * x[:, 0].numpy() + mood)
    z = [cold.FILM, cold.FILM + 1, cold.FILM + 2]
    learner = cold.biases(0.9, 4, z, 2.5)
    solved = Ridge(2.5, fit_intercept=False).fit(
        first.x[:, z].numpy(), first.y[:, 0].numpy() - base - mood
    )
    said = learner.predict(learner.adapt({}, first), x)[:, 0]
    expected = 0.9 * x[:, 0].numpy() + mood + solved.predict(x[:, z].numpy())
    np.testing.assert_allclose(said, expected)


def test_the_network_starts_as_the_films_average():
    net = cold.network(3)
    x = torch.randn(6, cold.FILM + 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:, 0], x[:, 0])
    same, other = cold.network(3), cold.network(4)
    name = "body.more.0.weight"
    assert torch.equal(parameters(net)[name], parameters(same)[name])
    assert not torch.equal(parameters(net)[name], parameters(other)[name])


def test_summaries_are_their_sentences_written_out():
    first, x = rated()
    found = cold.summarised(first, x).numpy()
    assert found.shape == (5, cold.FILM + 5)
    level, y = first.x[:, 0].numpy(), first.y[:, 0].numpy()
    mood = (y - level).sum() / 9
    rest, bend = y - level - mood, level - level.mean()
    slope = (bend * rest).sum() / ((bend**2).sum() + 2)
    own = [mood, rest.std(ddof=1), slope, y.mean()]
    np.testing.assert_allclose(found[:, cold.FILM : -1], np.tile(own, (5, 1)), atol=1e-12)
    kinds, told = x[:, 8 : cold.FILM].numpy(), first.x[:, 8 : cold.FILM].numpy()
    near = np.exp(-2 * ((kinds[:, None] - told) ** 2).sum(-1))
    np.testing.assert_allclose(found[:, -1], near @ rest / (near.sum(1) + 2), atol=1e-9)
    both = cold.summarised(Batch(first.x[None], first.y[None]), x[None])
    np.testing.assert_allclose(both[0], found)


def in_time():
    r = films()
    know = past(r, r.user < 90, 2.0)
    count = np.bincount(r.user)
    y = torch.from_numpy(r.rating - cold.MIDDLE).float()[:, None]
    x = cold.described(r, know, r.film, r.time)
    return r, cold.Users(x, y, np.cumsum(count) - count, count)


def test_boosting_is_scikit_learns_on_the_rows_of_training_users():
    r, held = in_time()
    count = np.bincount(r.user)
    train, test = np.flatnonzero(count[:90] >= 10), 90 + np.flatnonzero(count[90:] >= 10)
    learner = cold.boosting(lambda n: held.test(train, n, after=6), 0.2, 8, trees=10)
    data = held.test(test, 5, after=6)
    found = evaluate(learner, {}, lambda _: data, len(test), cold.mean_absolute_error)
    rows = [held.first[u] + np.arange(count[u]) for u in [*train, *test]]
    table = [
        (
            cold.summarised(Batch(held.x[i[:5]], held.y[i[:5]]), held.x[i[6:]]).numpy(),
            held.y[i[6:], 0].numpy(),
        )
        for i in rows
    ]
    x, y = (np.concatenate([t[k] for t in table[: len(train)]]) for k in (0, 1))
    model = HistGradientBoostingRegressor(
        loss="absolute_error",
        learning_rate=0.2,
        max_leaf_nodes=8,
        max_iter=10,
        min_samples_leaf=40,
        early_stopping=False,
    ).fit(x, y)
    off = [np.abs(model.predict(x) - y).mean() for x, y in table[len(train) :]]
    np.testing.assert_allclose(found.values, off, atol=1e-5)


def test_answers_are_measured_user_by_user():
    _, held = in_time()
    who = np.flatnonzero(held.count >= 10)[:4]
    net = cold.network(0)
    said = cold.told(as_is(net), parameters(net), held, who, 5, after=6)
    later = [np.arange(held.first[u] + 6, held.first[u] + held.count[u]) for u in who]
    assert [len(s) for s in said] == [len(rows) for rows in later]
    truth = [held.y[rows, 0] for rows in later]
    for s, rows in zip(said, later, strict=True):
        torch.testing.assert_close(s, held.x[rows, 0])
    found = cold.by_user(said, truth)
    off = [np.abs((s - y).numpy()).mean() for s, y in zip(said, truth, strict=True)]
    assert found.mean == pytest.approx(np.mean(off)) and found.draw == "users"
    keep = [np.arange(len(y)) < (1 if i else 0) for i, y in enumerate(truth)]
    some = cold.by_user(said, truth, keep=keep)
    assert len(some.values) == 3, "a user without a rating to keep is left out"
    assert some.values[0] == pytest.approx(float((said[1] - truth[1])[0].abs()))


def test_shelves_hold_what_was_known_and_the_user_had_not_rated():
    r, held = in_time()
    training, who = r.user < 90, 90 + np.flatnonzero(held.count[90:] >= 10)
    found = cold.shelves(r, training, who, 6, least=8, known=3)
    assert found
    day = (r.time - r.time.min()) // 86_400
    seen = 0
    for user in who:
        rows = np.flatnonzero(r.user == user)
        before = training & (day < day[rows[5]])
        month = before & (
            day >= (max(r.time[rows[5]] - 28 * 86_400, r.time.min()) - r.time.min()) // 86_400
        )
        often = np.bincount(r.film[before], minlength=len(r.year))
        lately = np.bincount(r.film[month], minlength=len(r.year))
        there = [f for f in range(len(r.year)) if often[f] >= 3 and f not in r.film[rows[:6]]]
        good = set(r.film[rows[6:]][r.rating[rows[6:]] >= 8]) & set(there)
        if good:
            shelf = found[seen]
            seen += 1
            assert shelf.own.tolist() == rows[:6].tolist()
            assert shelf.ever.tolist() == often[there].tolist()
            assert shelf.lately.tolist() == lately[there].tolist()
            assert shelf.liked.tolist() == [float(f in good) for f in there]
    assert seen == len(found)
    net = cold.network(0)
    said = cold.foretold(found, as_is(net), parameters(net), held)
    torch.testing.assert_close(said[0], found[0].x[:, 0])
    got = cold.recall(found, said, lambda said, film: film.ever, 4)
    assert got[0] == recall_at(found[0].ever, found[0].liked, 4)
