"""Made-up tables and real ones: what the prior draws, what a table becomes before it is read, and rivals against scikit-learn's own tools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from mtlib.book import tables as protocol
from mtlib.book.results import recorded
from mtlib.book.tables import (
    COLUMNS,
    ROWS,
    STRENGTHS,
    boosting,
    contenders,
    logistic,
    majority,
    on_made_up,
    reading,
    real_tables,
    scored,
    source_of,
)
from mtlib.core import Batch
from mtlib.data import tables as prior
from mtlib.data.tables import KINDS, prepared, standardised, tables
from mtlib.learners.amortised import in_context
from mtlib.nets import two_halves

REAL = real_tables()
RNG = np.random.default_rng(0)


# The prior -----------------------------------------------------------------------------------


def test_a_step_is_the_same_draw_always_and_another_one_is_not():
    stream = tables(seed=3)
    a, b, c = stream(5), stream(5), tables(seed=4)(5)
    assert torch.equal(a.support.x, b.support.x) and torch.equal(a.query.y, b.query.y)
    assert not torch.equal(a.query.x[:, :5], c.query.x[:, :5])
    assert not torch.equal(a.query.x[:, :5], stream(6).query.x[:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_classes_and_finite_numbers_of_each_kind(kind):
    stream = tables(columns=12, rows=(5, 40), queries=7, tasks=8, seed=1, kinds=[kind])
    for step in range(6):
        draw = stream(step)
        n = draw.support.x.shape[1]
        assert 5 <= n <= 40 and draw.support.x.shape == (8, n, 12)
        assert draw.query.y.shape == (8, 7, 2) and draw.query.x.shape == (8, 7, 12)
        assert bool((draw.support.y.sum(1) > 0).all()), "a class without a support row"
        assert bool((draw.query.y.sum(-1) == 1).all())
        assert bool(torch.isfinite(draw.support.x).all() and torch.isfinite(draw.query.x).all())


def test_the_number_of_columns_and_of_rows_is_log_uniform():
    stream = tables(columns=30, rows=(5, 100), queries=1, tasks=4, seed=0)
    draws = [stream(step) for step in range(300)]
    rows = np.array([d.support.x.shape[1] for d in draws])
    wide = np.concatenate([(d.support.x != 0).any(1).sum(1).numpy() for d in draws])
    for found, low, high in ((rows, 5, 101), (wide, 2, 31)):
        expected = stats.loguniform(low, high).mean() - 0.5  # the whole part of it
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


def test_either_class_is_as_often_the_larger_one():
    share = torch.cat([tables(queries=20, tasks=50, seed=s)(0).query.y[..., 1] for s in range(8)])
    means = share.mean(1)
    assert abs(means.mean() - 0.5) < 4 * means.std() / np.sqrt(len(means))
    assert means.std() > 0.15, "classes of unequal size"


def test_a_linear_table_is_linear_before_it_is_measured():
    x, s = prior.linear(np.random.default_rng(1), 200, 6)
    w, *_ = np.linalg.lstsq(x, s, rcond=None)
    assert np.allclose(x @ w, s) and np.isclose(np.linalg.norm(w), 1)


def test_a_table_of_classes_has_one_mean_a_class():
    x, s = prior.classes(np.random.default_rng(0), 4000, 5)
    assert set(np.unique(s)) == {-1.0, 1.0}
    gap = x[s > 0].mean(0) - x[s < 0].mean(0)
    assert np.linalg.norm(gap) > 0.5


def test_steps_take_few_values():
    _, s = prior.steps(np.random.default_rng(2), 500, 4)
    assert len(np.unique(s)) <= 8**5 and len(np.unique(s)) < 400


# What a table becomes ------------------------------------------------------------------------


def test_standardised_is_what_scikit_learn_makes_of_the_support_rows():
    x = RNG.normal(2, 3, (40, 5))
    scaler = StandardScaler().fit(x[:15])
    assert np.allclose(standardised(x, 15), scaler.transform(x).clip(-4, 4))


def test_missing_values_are_the_mean_of_the_support_rows_and_query_rows_decide_nothing():
    x = RNG.normal(2, 3, (30, 4))
    x[3, 1] = x[20, 2] = np.nan
    z = standardised(x, 15)
    assert z[3, 1] == 0 and z[20, 2] == 0
    other = x.copy()
    other[15:] *= 7
    assert np.array_equal(standardised(other, 15)[:15], z[:15])
    x[:, 0] = np.nan
    assert (standardised(x, 15)[:, 0] == 0).all(), "a column without a value"


def test_a_row_is_as_long_whatever_the_number_of_columns():
    for d in (2, 10, 30):
        x = prepared(np.random.default_rng(d).normal(size=(2000, d)), 2000, 30)
        assert x.shape == (2000, 30) and (x[:, d:] == 0).all()
        assert abs((x**2).sum(1).mean() - 30) < 0.1


# Real tables and rivals ----------------------------------------------------------------------


def test_ten_tables_of_two_classes_that_fit_the_network():
    assert len(REAL) == 10 and source_of(REAL).startswith("10 tables of")
    for t in REAL.values():
        assert t.x.shape[1] <= COLUMNS and set(np.unique(t.y)) == {0, 1}
        assert len(t.y) == len(t.x) >= max(ROWS) + 20
    assert REAL["iris"].y.sum() == 50 and REAL["wine"].y.sum() == 71
    assert REAL["cancer"].y.sum() == 357 and REAL["cancer"].x.shape[1] == 30


def test_a_source_says_what_is_drawn():
    one = {"a": REAL["iris"], "b": REAL["iris"]._replace(source="b (stand-in)")}
    assert source_of(one).endswith("(stand-in)") and source_of({"a": one["a"]}).endswith("(real)")


def problem(n=60, d=4):
    x = np.random.default_rng(1).uniform(-1, 1, (n + 50, d))
    y = (x @ np.arange(1, d + 1) + np.random.default_rng(2).logistic(size=n + 50) > 0).astype(int)
    return x[:n], y[:n], x[n:]


def test_logistic_regression_is_what_a_grid_search_finds():
    x, y, asked = problem()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        {"logisticregression__C": STRENGTHS},
        scoring="neg_log_loss",
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
    ).fit(x, y)
    assert np.allclose(logistic(x, y, asked), search.predict_proba(asked)[:, 1])


def test_boosting_finds_a_step_that_no_line_can():
    x = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    y = (np.abs(x[:, 0]) < 0.5).astype(int)
    for f, low, high in ((boosting, 0.9, 1.0), (logistic, 0.3, 0.7)):
        right = ((f(x[:100], y[:100], x[100:]) > 0.5) == y[100:]).mean()
        assert low <= right <= high, f.__name__


@pytest.mark.parametrize("f", [logistic, boosting, majority])
def test_one_row_of_a_class_is_enough(f):
    x, y = np.random.default_rng(0).normal(size=(10, 3)), np.eye(10, dtype=int)[0]
    p = f(x, y, x)
    assert p.shape == (10,) and ((p >= 0) & (p <= 1)).all()


def test_the_share_of_the_class_is_scikit_learns_prior_with_one_more_of_each():
    x, y, asked = problem()
    more = np.append(y, [0, 1])
    prior_ = DummyClassifier(strategy="prior").fit(np.zeros((len(more), 1)), more)
    assert np.allclose(majority(x, y, asked), prior_.predict_proba(np.zeros((len(asked), 1)))[:, 1])


def test_scored_is_scikit_learns_log_loss_on_the_rows_that_were_not_seen():
    seen = []

    def classifier(x, y, asked):
        seen.append((x, y, asked))
        return np.full(len(asked), 0.3)

    one = {"iris": REAL["iris"]}
    mean, parts = scored(classifier, one, (10,), 2, seed=1)["log-loss, 10 rows"]
    assert len(seen) == 2 and parts.shape == (1,)
    losses = []
    for x, y, asked in seen:
        assert len(x) == 10 and len(asked) == 140 and 0 < y.sum() < 10
        truth = np.r_[np.zeros(100 - (y == 0).sum()), np.ones(50 - y.sum())]
        losses.append(log_loss(truth, np.full(140, 0.3)))
    assert np.isclose(mean, np.mean(losses))


def test_all_classifiers_meet_the_same_splits_and_each_seed_others():
    seen = {}

    def spy(name):
        def classifier(x, y, asked):
            seen.setdefault(name, []).append(x)
            return np.full(len(asked), 0.5)

        return classifier

    one = {"wine": REAL["wine"]}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        scored(spy(name), one, (10, 25), 1, seed)
    assert all(np.array_equal(p, q) for p, q in zip(seen["a"], seen["b"], strict=True))
    assert not np.array_equal(seen["a"][0], seen["c"][0])


# The network ---------------------------------------------------------------------------------


def network(columns=COLUMNS):
    torch.manual_seed(0)
    net = two_halves(nn.Identity(), nn.Linear(columns, 2))
    learner = in_context(net, ways=2, hidden=16, layers=2)
    return learner, {k: 2 * v for k, v in learner.init().items()}


def test_reading_is_the_learner_on_the_prepared_table():
    (x, y, asked), (learner, phi) = problem(), network()
    z = torch.from_numpy(prepared(np.concatenate([x, asked]), len(x), COLUMNS)).float()
    theta = learner.adapt(phi, Batch(z[: len(x)], torch.eye(2)[torch.from_numpy(y)]))
    p = torch.softmax(learner.predict(theta, z[len(x) :]), -1)[:, 1].detach().numpy()
    assert np.allclose(reading(learner, phi, COLUMNS)(x, y, asked), p, atol=1e-6)


def test_two_orders_average_the_swapped_classes_back():
    (x, y, asked), (learner, phi) = problem(), network()
    once = reading(learner, phi, COLUMNS)
    order = np.random.default_rng(0).permutation(x.shape[1])
    other = 1 - once(x[:, order], 1 - y, asked[:, order])
    both = reading(learner, phi, COLUMNS, orders=2)(x, y, asked)
    assert np.allclose(both, (once(x, y, asked) + other) / 2, atol=1e-6)
    assert not np.allclose(both, once(x, y, asked), atol=1e-3)


def test_the_order_of_the_rows_is_nothing_to_the_network():
    (x, y, asked), (learner, phi) = problem(), network()
    order = np.random.default_rng(3).permutation(len(y))
    f = reading(learner, phi, COLUMNS, 4)
    assert np.allclose(f(x, y, asked), f(x[order], y[order], asked), atol=1e-5)


def test_made_up_tables_of_a_seed_are_others_than_those_of_training():
    mean, each = on_made_up(majority, 3, 1)
    assert each.shape == (3,) and np.isclose(mean, each.mean())
    assert not torch.equal(each, on_made_up(majority, 3, 2)[1])


def test_training_on_made_up_tables_beats_the_share_of_the_class():
    one = {k: REAL[k] for k in ("cancer", "wine")}
    few = contenders(one, steps=100, splits=1, rows=(25,), drawn=20)
    own, chance = (
        few[k].test(s, 0)
        for k, s in (("in context", 3e-3), ("share of the class", "on the rows it has"))
    )
    assert [*own] == ["log-loss, 25 rows", "accuracy, 25 rows", "log-loss, made up"]
    assert own["log-loss, 25 rows"][0] < chance["log-loss, 25 rows"][0]
    assert own["log-loss, made up"][0] < chance["log-loss, made up"][0]
    assert few["logistic regression"].quality("on the rows it has") < 0
    assert protocol.TUNING_SEED > 100, "no seed that is scored"


# The record ----------------------------------------------------------------------------------


def gap(one, other, column):
    """Mean and half the wider of Student's intervals over seeds and over tables, from the record's numbers."""
    ways = recorded("in_context_tables").details["tables"]["ways"]
    a, b = (ways[w]["columns"][column] for w in (one, other))
    halves = []
    for key in ("runs", "groups"):
        d = np.subtract(a[key], b[key])
        halves.append(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    return np.mean(np.subtract(a["runs"], b["runs"])), max(halves)


def test_the_record_has_five_seeds_of_ten_tables():
    ways = recorded("in_context_tables").details["tables"]["ways"]
    assert [*ways["in context"]["tuning"]] == [f"{r:g}" for r in protocol.RATES]
    assert not ways["in context"]["edge"]
    for name, way in ways.items():
        for column, own in way["columns"].items():
            n = 10 if "rows" in column else protocol.MADE_UP
            assert (len(own["runs"]), len(own["groups"])) == (5, n)
            assert np.isclose(np.mean(own["runs"]), np.mean(own["groups"]), atol=2e-4), name


def test_what_the_section_says_of_the_record_computed_anew():
    mean, half = gap("in context", "logistic regression", "accuracy, 100 rows")
    assert abs(mean) + half < 0.04, "level in accuracy"
    mean, half = gap("in context", "logistic regression", "log-loss, made up")
    assert mean - half > 0, "behind on its own prior"
    ten, hundred = (gap("in context", "boosting", f"log-loss, {n} rows") for n in (10, 100))
    assert ten[0] + ten[1] < 0 < hundred[0] - hundred[1], "boosting: ahead, then behind"


def test_each_table_of_the_record_as_the_section_tells_it():
    ways = recorded("in_context_tables").details["tables"]["ways"]
    own, rival = (
        np.array(ways[w]["columns"]["log-loss, 100 rows"]["groups"])
        for w in ("in context", "logistic regression")
    )
    behind = dict(zip(REAL, own - rival, strict=True))
    apart = ("cancer", "wine", "digits 3, 8", "digits 4, 9")
    assert min(behind[k] for k in apart) > 0.2 > max(v for k, v in behind.items() if k not in apart)
    assert behind["iris"] < 0
