"""A score is a score: classes without support, intervals that cover, draws that come once, steps that go down."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import cache, partial
from itertools import permutations

import numpy as np
import pytest
import torch
from machine import compiling
from problems import normal, seeded
from scipy import stats
from sklearn import metrics
from test_contract import ROWS, WAYS
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, Learner, Stream, over, take
from mtlib.evaluate import (
    LossRose,
    NotFinite,
    _score,
    accuracy,
    answers,
    auroc,
    best_of,
    compare,
    digests,
    evaluate,
    interval,
    macro_f1,
    over_classes,
    over_clusters,
    over_seeds,
)
from mtlib.learners.context import protomaml
from mtlib.learners.finetune import finetune, fresh_head
from mtlib.learners.gradient import maml
from mtlib.learners.hyper import weight_decay
from mtlib.learners.metric import (
    class_means,
    feat,
    lowest,
    matching,
    protonet,
    relation,
    simpleshot,
)
from mtlib.learners.preconditioned import learned, meta_curvature, meta_sgd, per_step_rates
from mtlib.learners.transductive import bd_cspn, entropy_finetune, laplacian_shot
from mtlib.metrics import ndcg, recall_at
from mtlib.objective import over_tasks
from mtlib.tasks import ClassSet, one_hot
from mtlib.train import Run

# A class with no support item ----------------------------------------------------------------

FROM_SUPPORT = {  # learners that know a class from its support items alone
    "protonet": protonet,
    "matching": matching,
    "relation": relation,
    "simpleshot": simpleshot,
    "feat": feat,
    "protomaml": lambda net: protomaml(net, cross_entropy, 0.05, 3),
    "entropy_finetune": lambda net: entropy_finetune(net, cross_entropy, 0.1, 2),
    "bd_cspn": bd_cspn,
    "laplacian_shot": laplacian_shot,
    "laplacian_shot, plain": lambda net: laplacian_shot(
        net, normalise=False, rectify=False, shift=False
    ),
}
LABELS, ABSENT, KEPT = torch.tensor([0, 2, 3, 0, 2, 2, 3]), 1, [0, 2, 3]
SUPPORT_X, QUERY_X = normal(7, 5), normal(8, 5, seed=1)


def network(ways=4):
    body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(6, ways)))


def uneven(tasks=1, ways=4) -> Episode:
    """Episodes whose class 1 of four has query items and no support item."""
    support = Batch(SUPPORT_X, one_hot(LABELS, ways, torch.float64))
    query = Batch(QUERY_X, one_hot(torch.arange(8) % ways, ways, torch.float64))
    scales = torch.linspace(1, 2, tasks, dtype=torch.float64)[:, None, None]
    return Episode(*(Batch(scales * b.x, b.y.expand(tasks, -1, -1)) for b in (support, query)))


def off_its_start(phi):
    return {k: v + 0.1 * normal(*v.shape, seed=i) for i, (k, v) in enumerate(phi.items())}


@pytest.fixture(params=FROM_SUPPORT)
def made(request):
    """A learner with four outputs, one with three, and φ for both."""
    make = FROM_SUPPORT[request.param]
    wide, narrow = (make(seeded(lambda w=w: network(w))) for w in (4, 3))
    return wide, narrow, off_its_start(wide.init())


def test_a_class_without_support_is_never_predicted_and_changes_nothing_else(made):
    wide, narrow, phi = made
    support, query = take(uneven(), 0)
    said = wide.predict(wide.adapt(phi, support), query.x)
    alone = narrow.predict(narrow.adapt(phi, Batch(support.x, support.y[:, KEPT])), query.x)
    assert (said[:, KEPT] - alone).abs().max() <= 1e-12
    assert (said[:, ABSENT] == lowest(torch.float64)).all()
    assert (said.softmax(1)[:, ABSENT] == 0).all()


def test_a_task_with_a_class_without_support_trains(made):
    wide, narrow, phi = made
    episode = uneven(tasks=3)
    asked = episode.query.y[0].argmax(1) != ABSENT  # and the same without the class
    known = Episode(episode.support, over(lambda d: d[:, asked], episode.query))
    less = Episode(*(Batch(b.x, b.y[..., KEPT]) for b in known))
    value, grads = bilevel(wide, cross_entropy).value_and_grad(phi, episode)
    assert value.isfinite() and all(g.isfinite().all() for g in grads.values())
    if "transductive" not in wide.predict.__module__:
        some = bilevel(wide, cross_entropy).value_and_grad(phi, known)
        other = bilevel(narrow, cross_entropy).value_and_grad(phi, less)
        assert abs(some[0] - other[0]) <= 1e-12
        assert all((some[1][k] - g).abs().max() <= 1e-10 for k, g in other[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_loss_and_gradient_are_finite_in_every_precision(made, dtype):
    wide, _, phi = made
    cast = {k: v.to(dtype) for k, v in phi.items()}
    episode = over(lambda d: d.to(dtype), uneven(tasks=3))
    for chunk in (1, 3):
        value, grads = bilevel(wide, cross_entropy, chunk=chunk).value_and_grad(cast, episode)
        assert value.isfinite() and value.dtype == dtype
        assert all(g.isfinite().all() for g in grads.values())


def test_evaluate_counts_its_query_items_as_wrong(made):
    wide, _, phi = made
    episode = uneven(tasks=3)
    scores = [evaluate(wide, phi, lambda step: episode, 3, chunk=c).values for c in (1, 3)]
    assert torch.equal(*scores)
    for t, value in enumerate(scores[0]):
        support, query = take(episode, t)
        said = wide.predict(wide.adapt(phi, support), query.x).argmax(1)
        assert ABSENT not in said
        assert value == (said == query.y.argmax(1)).double().mean()


def test_a_support_set_without_labels_is_no_score(made):
    wide, _, phi = made
    support, query = uneven(tasks=3)
    empty = Episode(Batch(support.x, 0 * support.y), query)
    with pytest.raises(ValueError, match="have no labels"):
        evaluate(wide, phi, lambda step: empty, 3)


@pytest.mark.parametrize("name", ROWS)
def test_every_learner_answers_where_a_class_has_no_support(name):
    row = ROWS[name]
    learner = row.make(seeded(lambda: network(WAYS)))
    support = Batch(SUPPORT_X[:4], one_hot(torch.tensor([0, 2, 0, 2]), WAYS, torch.float64))
    query = Batch(QUERY_X, one_hot(torch.arange(8) % WAYS, WAYS, torch.float64))
    data = over(lambda d: d[None], Episode(support, query))
    value, grads = bilevel(learner, row.loss).value_and_grad(learner.init(), data)
    assert value.isfinite() and all(g.isfinite().all() for g in grads.values())


def test_an_item_without_label_counts_for_no_class_and_soft_labels_are_weights():
    z = normal(5, 3).requires_grad_()
    y = torch.tensor([[1, 0, 0], [0.25, 0, 0.75], [0, 0, 0], [0, 0, 1], [1, 0, 0.0]]).double()
    c = class_means(z, y)
    by_hand = [(w[:, None] * z).sum(0) / w.sum() for w in y.T[[0, 2]]]
    assert (c[[0, 2]] - torch.stack(by_hand)).abs().max() <= 1e-15 and c[1].isnan().all()
    (slope,) = torch.autograd.grad(c[[0, 2]].sum(), z)
    assert slope.isfinite().all() and (slope[2] == 0).all()


@compiling
def test_a_compiled_task_may_lack_a_class():
    learner, data = protonet(seeded(network)), uneven(tasks=3)

    def task(phi, episode):
        theta = learner.adapt(phi, episode.support)
        return cross_entropy(learner.predict(theta, episode.query.x), episode.query.y)

    phi = learner.init()
    plain, fast = over_tasks(task), over_tasks(task, compile=True)
    fast.value_and_grad(phi, data)
    value, grads = fast.value_and_grad(phi, data)
    expected, slopes = plain.value_and_grad(phi, data)
    assert abs(value / expected - 1) <= 1e-12
    assert all((grads[k] - g).abs().max() <= 1e-10 for k, g in slopes.items())


# Steps that end above where they began -------------------------------------------------------


def lines(tasks=6, seed=0) -> Episode:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 8, 2, generator=g, dtype=torch.float64)
    slopes = torch.randn(tasks, 2, 1, generator=g, dtype=torch.float64)
    return Episode(Batch(x, x @ slopes), Batch(2 * x, 2 * x @ slopes))


def straight():
    return seeded(lambda: nn.Sequential(OrderedDict(body=nn.Identity(), head=nn.Linear(2, 1))))


RATES = {  # the learner at this rate, where 0.1 goes down and 1.5 goes up
    "maml": lambda net, lr: maml(net, mse_loss, lr, 4),
    "proximal": lambda net, lr: maml(net, mse_loss, lr, 4, strength=0.1),
    "meta_sgd": lambda net, lr: meta_sgd(net, mse_loss, lr, 4),
    "per_step_rates": lambda net, lr: per_step_rates(net, mse_loss, lr, 4),
    "meta_curvature": lambda net, lr: meta_curvature(net, mse_loss, lr, 4),
    "learned": lambda net, lr: learned(
        {"own.rate": torch.tensor(lr).double()},
        lambda phi: maml(net, mse_loss, phi["own.rate"], 4),
    ),
    "fresh_head": lambda net, lr: fresh_head(finetune(net, mse_loss, lr, 4), net),
    "weight_decay": lambda net, lr: weight_decay(net, mse_loss, lr, 4),
}


@pytest.mark.parametrize("name", RATES)
def test_inner_steps_that_end_above_their_start_warn_once_with_the_rate(name):
    net = straight()
    slow, fast = (RATES[name](net, lr) for lr in (0.1, 1.5))
    evaluate(slow, slow.init(), lines_at, 12, mse_loss)  # a warning would be an error
    with pytest.warns(LossRose, match=r"rose in \d of 6 tasks.*rate is 1\.5") as told:
        score = evaluate(fast, fast.init(), lines_at, 12, mse_loss)
    assert len(told) == 1 and told[0].filename == __file__ and len(score.values) == 12


def lines_at(step) -> Episode:
    return lines(seed=step)


def test_the_warning_gives_the_mean_loss_at_both_ends():
    net, draw = straight(), lines_at(0)
    learner = maml(net, mse_loss, 1.5, 4, strength=0.1)
    phi = learner.init()
    ends = []
    for t in range(6):
        support = take(draw.support, t)
        theta = learner.adapt(phi, support)
        pull = 0.05 * sum(((theta[k] - phi[k]) ** 2).sum() for k in phi)
        fit = [mse_loss(learner.predict(p, support.x), support.y) for p in (phi, theta)]
        ends.append((fit[0], fit[1] + pull))
    before, after = (torch.stack(e).mean() for e in zip(*ends, strict=True))
    with pytest.warns(
        LossRose, match=re.escape(f"of {before:.4g} became {after:.4g}, and rose in 6 of 6")
    ):
        evaluate(learner, phi, lines_at, 6, mse_loss)


def test_one_task_that_rises_among_many_that_fall_does_not_warn():
    draw = lines_at(0)
    steep = draw.support.x * torch.tensor([2.2, 1, 1, 1, 1, 1])[:, None, None]
    draw = Episode(Batch(steep, 30 * draw.support.y), draw.query)
    draw.support.y[0] /= 1e4
    net = straight()
    learner = maml(net, mse_loss, 0.3, 1)
    phi = learner.init()
    first = take(draw.support, 0)
    ends = [
        mse_loss(learner.predict(p, first.x), first.y) for p in (phi, learner.adapt(phi, first))
    ]
    assert ends[1] > ends[0]
    evaluate(learner, phi, lambda step: draw, 6, mse_loss)


def test_scores_are_the_same_whether_the_steps_are_watched_or_not():
    learner = maml(straight(), mse_loss, 0.1, 4)
    unseen = learner._replace(adapt=learner.adapt._replace(descent=None))
    a, b = (evaluate(x, learner.init(), lines_at, 12, mse_loss) for x in (learner, unseen))
    assert torch.equal(a.values, b.values) and a.draw == b.draw
    loop = evaluate(learner, learner.init(), lines_at, 12, mse_loss, chunk=1)
    assert (loop.values - a.values).abs().max() <= 1e-12


def test_a_search_over_rates_does_not_warn_of_those_that_are_too_high():
    net = straight()

    def quality(lr):
        return -evaluate(
            maml(net, mse_loss, lr, 4), maml(net, mse_loss, lr, 4).init(), lines_at, 6, mse_loss
        )

    assert best_of((0.01, 0.1, 1.5), quality).setting == 0.1


# Draws that come again -----------------------------------------------------------------------


def held_out(tasks, held) -> Stream:
    """`tasks` test tasks, the same each time, as a data set of `held` gives them."""
    return lambda step: take(lines(tasks=held), [(step * tasks + t) % held for t in range(tasks)])


def lenient():
    return maml(straight(), mse_loss, 0.1, 1)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_test_tasks_asked_again_are_refused(tasks):
    learner = lenient()
    stream = held_out(tasks, 8)
    score = evaluate(learner, learner.init(), stream, 8, mse_loss)
    assert len(score.values) == 8
    with pytest.raises(ValueError, match=r"only 8 of \d+ tasks so far are different.*episodes=8"):
        evaluate(learner, learner.init(), stream, 600, mse_loss)


def test_a_draw_that_never_changes_is_refused_and_says_where():
    learner, draw = lenient(), lines()
    assert len(evaluate(learner, learner.init(), lambda step: draw, 6, mse_loss).values) == 6
    with pytest.raises(
        ValueError, match=r"stream\(1\) gives as its task 5 what stream\(0\) gave as task 5"
    ):
        evaluate(learner, learner.init(), lambda step: draw, 7, mse_loss)


def test_a_task_that_comes_twice_by_chance_is_allowed():
    learner = lenient()

    def stream(step):
        new, old = lines(seed=step), lines(seed=max(step - 1, 0))
        return over(
            lambda ab: ab,
            Episode(
                *(
                    Batch(*(torch.cat([n[:5], o[:1]]) for n, o in zip(*pair, strict=True)))
                    for pair in zip(new, old, strict=True)
                )
            ),
        )

    assert len(evaluate(learner, learner.init(), stream, 30, mse_loss).values) == 30


def test_scores_pair_by_the_whole_sequence_of_tasks():
    learner = lenient()
    phi, other = learner.init(), off_its_start(learner.init())
    a = evaluate(learner, phi, lines_at, 20, mse_loss)
    assert isinstance(a.draw, str)
    assert a.minus(evaluate(learner, other, lines_at, 20, mse_loss)).draw == a.draw
    one = evaluate(
        learner,
        phi,
        lambda step: take(lines_at(step // 6), slice(step % 6, step % 6 + 1)),
        20,
        mse_loss,
    )
    assert one.draw == a.draw  # the same tasks, drawn one at a time

    def changed(where, item):
        def stream(step):
            draw = over(torch.clone, lines_at(step))
            if step == 3:
                draw[where][item][1, 0] += 1e-9  # task 19 of 20
            return draw

        return stream

    for where in (0, 1):
        for item in (0, 1):
            b = evaluate(learner, phi, changed(where, item), 20, mse_loss)
            with pytest.raises(ValueError, match="same episodes"):
                compare(a, b)
    turned = evaluate(
        learner, phi, lambda step: take(lines_at(step), [1, 0, 2, 3, 4, 5]), 20, mse_loss
    )
    with pytest.raises(ValueError, match="same episodes"):
        compare(a, turned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_tasks_of_any_kind_of_numbers_are_known_apart(dtype):
    x = (torch.arange(24).reshape(3, 2, 4) % 5 - 1).to(dtype)
    y = torch.ones(3, 2, 1)
    found = digests(Episode(Batch({"a": x, "b": (y,)}, y), Batch(x.mT.mT, y)))
    assert len(set(found)) == 3 and found == digests(
        Episode(Batch({"a": x, "b": (y,)}, y), Batch(x, y))
    )


# Intervals that cover ------------------------------------------------------------------------


@cache
def all_intervals(n):
    return [interval((torch.arange(n) < k).double()) for k in range(n + 1)]


def covered(n, p):
    """How often the interval over n numbers, 0 or 1 with chance p, holds p: over all outcomes, by their chances."""
    ends = all_intervals(n)
    holds = [s.low - 1e-12 <= p <= s.high + 1e-12 for s in ends]
    arms = [abs(s.mean - p) <= s.interval + 1e-12 for s in ends]
    chances = stats.binom.pmf(range(n + 1), n, p)
    assert all(
        a or not h for a, h in zip(arms, holds, strict=True)
    )  # mean ± interval holds the interval
    return float((chances * holds).sum())


@pytest.mark.parametrize("n", [5, 10, 30, 100, 600])
def test_the_interval_of_right_and_wrong_answers_covers(n):
    for p in (0.5, 0.8, 0.9, 0.98, 0.995):
        assert covered(n, p) >= 0.93 and covered(n, 1 - p) >= 0.93


def test_the_interval_of_shares_near_one_covers():
    """30 episodes of 25 answers, 99 % right, episodes of unlike difficulty: ± t alone covers in three cases of four."""
    rng = np.random.default_rng(0)
    hits = {"exact": 0, "t": 0}
    for _ in range(400):
        p = rng.beta(20 * 0.99, 20 * 0.01, 30)
        values = torch.from_numpy(rng.binomial(25, p) / 25)
        s, t = (_score(values, None, shares=shares) for shares in (True, False))
        hits["exact"] += s.low <= 0.99 <= s.high
        hits["t"] += t.low <= 0.99 <= t.high
    assert hits["exact"] >= 0.93 * 400 > 0.88 * 400 > hits["t"]


def test_the_exact_interval_is_scipys():
    for n, k in ((30, 30), (30, 29), (30, 0), (100, 7), (600, 595)):
        s = interval((torch.arange(n) < k).double())
        ends = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert (s.low, s.high) == pytest.approx((ends.low, ends.high), abs=1e-12)
        assert s.interval == max(s.mean - s.low, s.high - s.mean)
        assert ((-s).low, (-s).high) == (-s.high, -s.low)


def test_where_the_spread_is_known_the_interval_is_students():
    for values in (
        (torch.arange(600) < 480).double(),
        0.9 + 0.02 * normal(600).clamp(-4, 4),
        torch.full((5,), 0.2),
        torch.tensor([1.0, 0.99, 0.98]),
        torch.tensor([0.0, -1.0, 1.0, 0.0]),
    ):
        s = _score(values, None, shares=True)
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values.double())
        assert s.ends is None and s.interval == pytest.approx(half, rel=1e-12)


def test_a_learner_less_itself_is_zero_and_certain():
    s = interval(torch.ones(30), draw="these")
    assert (s.minus(s).mean, s.minus(s).interval, s.minus(s).low) == (0, 0, 0)


def test_all_right_is_not_certain():
    right = Learner(dict, lambda phi, support: phi, lambda theta, x: x)

    def stream(step):
        y = torch.eye(3).repeat(2, 1)
        x = y + 0.1 * torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(step))
        return Episode(*(Batch(x, y.expand(5, -1, -1)) for _ in "sq"))

    score = evaluate(right, {}, stream, 30)
    assert score.mean == 1 and score.high == 1 and score.low == pytest.approx(0.025 ** (1 / 30))


# New classes ---------------------------------------------------------------------------------


def scores_of(effects, some: ClassSet, episodes=400, noise=0.05):
    """Episodes of five of these classes, an episode's score the mean of its classes' and noise."""
    rng = np.random.default_rng(7)
    chosen = np.argsort(rng.random((episodes, len(some.names))), axis=1)[:, :5]
    own = effects[[int(n) for n in some.names]]
    return interval(torch.from_numpy(own[chosen].mean(1) + noise * rng.standard_normal(episodes)))


def test_leaving_classes_out_covers_the_mean_over_new_ones():
    rng, hits = np.random.default_rng(0), {"classes": 0, "episodes": 0}
    data = ClassSet(torch.zeros(10, 2, 1), [str(c) for c in range(10)], "ten")
    for _ in range(150):
        effects = 0.7 + 0.1 * rng.standard_normal(10)
        score = over_classes(partial(scores_of, effects), data)
        alone = scores_of(effects, data)
        assert score.mean == pytest.approx(alone.mean, abs=1e-9) and len(score.values) == 10
        hits["classes"] += score.low <= 0.7 <= score.high
        hits["episodes"] += alone.low <= 0.7 <= alone.high
    assert hits["classes"] >= 0.9 * 150 and hits["episodes"] <= 0.3 * 150


def test_the_jackknife_of_a_mean_is_students_interval():
    effects = normal(8)
    data = ClassSet(effects[:, None, None].expand(8, 3, 1), list("abcdefgh"), "eight")
    score = over_classes(lambda some: float(some.items[:, 0, 0].mean()), data)
    expected = interval(effects)
    assert score.mean == pytest.approx(expected.mean) and score.interval == pytest.approx(
        expected.interval
    )
    with pytest.raises(ValueError, match="at least 3 classes"):
        over_classes(lambda some: 0.0, data.select([0, 1]))


def test_clusters_of_one_are_students_interval_and_of_one_size_their_means():
    values = normal(12)
    alone, whole = over_clusters(values, range(12)), interval(values)
    assert (alone.mean, alone.interval) == pytest.approx((whole.mean, whole.interval))
    pairs = over_clusters(values, torch.arange(12) // 2)
    means = interval(values.view(6, 2).mean(1))
    assert (pairs.mean, pairs.interval) == pytest.approx((means.mean, means.interval))
    named = over_clusters(values, [7 - 3 * (i // 2) for i in range(12)])
    assert named.interval == pytest.approx(pairs.interval) and len(named.values) == 6


def test_clusters_of_unequal_sizes_agree_with_the_bootstrap_over_clusters():
    rng = np.random.default_rng(0)
    whose = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    values = rng.standard_normal(40)[whose] + 0.3 * rng.standard_normal(len(whose))
    score = over_clusters(torch.from_numpy(values), torch.from_numpy(whose))
    total, size = (np.bincount(whose, w) for w in (values, np.ones(len(whose))))
    drawn = rng.integers(40, size=(4000, 40))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert score.mean == pytest.approx(values.mean())
    assert score.interval == pytest.approx((high - low) / 2, rel=0.12)
    assert score.interval > 1.5 * interval(torch.from_numpy(values)).interval


# Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [2, 3, 7])
def test_macro_f1_and_auroc_are_scikit_learns(ways):
    rng = np.random.default_rng(ways)
    for trial in range(30):
        labels = rng.integers(
            ways - (trial % 2 and ways > 2), size=25
        )  # every second one lacks a class
        logits = (
            rng.standard_normal((25, ways))
            if trial % 3
            else rng.integers(3, size=(25, ways)).astype(float)
        )
        prediction, y = (
            torch.from_numpy(logits),
            one_hot(torch.from_numpy(labels), ways, torch.float64),
        )
        f1 = metrics.f1_score(labels, prediction.argmax(1), average="macro")
        assert float(macro_f1(prediction, y)) == pytest.approx(f1, abs=1e-12)
        found, counts = float(auroc(prediction, y)), np.bincount(labels, minlength=ways)
        if (counts % 25 == 0).any():
            assert np.isnan(found)
            continue
        p = np.sort(np.exp(logits[:, None] - logits[..., None]), -1).sum(
            -1
        )  # 1/p_k, summed in order
        expected = np.mean([metrics.roc_auc_score(labels == k, 1 / p[:, k]) for k in range(ways)])
        assert found == pytest.approx(expected, abs=1e-12)
        if ways == 2:
            one = metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
            assert found == pytest.approx(one, abs=1e-12)
            single = torch.from_numpy(logits[:, 1:] - logits[:, :1])
            assert float(auroc(single, y[:, 1:])) == pytest.approx(one, abs=1e-12)


def test_auroc_tells_probabilities_apart_that_round_to_one():
    prediction = torch.tensor([[100.0, 0], [200.0, 0], [300.0, 0]])
    assert auroc(prediction, torch.tensor([[0.0, 1], [1, 0], [1, 0]])) == 1


def test_metrics_count_a_thousand_items_in_half_precision():
    y = one_hot(torch.arange(1000) % 2, 2)
    y[:300] = y[0]  # 650 of one class
    prediction = one_hot(torch.arange(1000) % 4 // 2, 2)
    for metric in (accuracy, macro_f1, auroc):
        half = metric(prediction.bfloat16(), y.bfloat16())
        assert half.item() == pytest.approx(
            metric(prediction.double(), y.double()).item(), abs=1e-6
        )


@pytest.mark.parametrize("metric", [macro_f1, auroc])
def test_metrics_of_classes_run_under_vmap(metric):
    learner = protonet(seeded(network))
    data = Episode(
        uneven(tasks=3).query,
        over(lambda d: 1.1 * d, uneven(tasks=3).query)._replace(y=uneven(tasks=3).query.y),
    )
    together, one = (
        evaluate(learner, learner.init(), lambda step: data, 3, metric, chunk=c) for c in (3, 1)
    )
    assert torch.equal(together.values, one.values)
    for t, value in enumerate(one.values):
        support, query = take(data, t)
        assert value == metric(
            learner.predict(learner.adapt(learner.init(), support), query.x), query.y
        )


def test_ndcg_is_scikit_learns_also_with_equal_scores():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(2, 30))
        said, gain = rng.integers(0, 6, n).astype(float), rng.integers(0, 11, n).astype(float)
        gain[0] = 1.0
        found = ndcg(torch.from_numpy(said), torch.from_numpy(gain)).item()
        assert found == pytest.approx(metrics.ndcg_score([gain], [said]), abs=1e-12)
    assert ndcg(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [1.0]])) == 1


def test_equal_scores_have_what_a_random_order_has_on_average():
    gain = torch.tensor([5.0, 0, 3, 1], dtype=torch.float64)
    orders = [torch.tensor(p, dtype=torch.float64) for p in permutations(range(4))]
    mean = sum(ndcg(p, gain) for p in orders) / len(orders)
    assert ndcg(torch.zeros(4), gain).item() == pytest.approx(mean.item())
    wanted = (gain > 2).double()
    for n in (1, 2, 3, 9):
        mean = sum(recall_at(p, wanted, n) for p in orders) / len(orders)
        assert recall_at(torch.zeros(4), wanted, n).item() == pytest.approx(mean.item())


def test_recall_counts_the_wanted_among_the_first():
    said, y = torch.tensor([0.9, 0.1, 0.8, 0.5, 0.7]), torch.tensor([1.0, 1, 0, 1, 0])
    assert [recall_at(said, y, n).item() for n in (1, 2, 4, 5, 8)] == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 1, 1]
    )
    tied = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])  # two places for three
    assert recall_at(tied, y, 3).item() == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert recall_at(said, torch.zeros(5), 2).isnan() and ndcg(said, torch.zeros(5)).isnan()
    bad = torch.tensor([0.9, float("nan"), 0.8, 0.5, 0.7])
    assert recall_at(bad, y, 2).isnan() and ndcg(bad, y).isnan()


def test_measures_of_an_order_run_under_vmap():
    said, gain = torch.rand(3, 8, 1), torch.randint(2, (3, 8, 1)).float()
    gain[:, 0] = 1
    for measure in (ndcg, partial(recall_at, n=3)):
        one = torch.stack([measure(*pair) for pair in zip(said, gain, strict=True)])
        torch.testing.assert_close(torch.vmap(measure)(said, gain), one)


def test_auroc_without_query_items_of_a_class_is_no_score():
    learner, episode = protonet(seeded(network)), uneven(tasks=3)
    some = Episode(episode.query, over(lambda d: d[:, :3], episode.query))
    with pytest.raises(
        NotFinite, match=r"3 of 3 are not, the first is number 0.*auroc a class no query item"
    ):
        evaluate(learner, learner.init(), lambda step: some, 3, auroc)


# Inputs --------------------------------------------------------------------------------------

LEARNER = maml(straight(), mse_loss, 0.1, 1)
PHI, RUN = LEARNER.init(), Run({}, [], 0.0)


def mixed(step):
    return lines_at(step) if step < 2 else lines_at(step).query


def array(step):
    draw = lines_at(step)
    return (
        draw
        if step < 2
        else Episode(Batch(draw.support.x.numpy(), draw.support.y.numpy()), draw.query)
    )


def on(learner=LEARNER, params=PHI, stream=lines_at, episodes=18, metric=mse_loss, **more):
    return lambda: evaluate(learner, params, stream, episodes, metric, **more)


INPUTS = {
    "no parameters": (on(params={}), ValueError, "parameters named"),
    "a learner for φ": (on(params=LEARNER), TypeError, "a dict of tensors.*got Learner"),
    "a run for φ": (on(params=RUN), TypeError, "got Run"),
    "numbers for φ": (on(params={"head.weight": 1.0}), TypeError, "a dict of tensors"),
    "a network for a learner": (
        on(learner=straight()),
        TypeError,
        "expected a Learner.*Sequential",
    ),
    "a draw for a stream": (on(stream=lines()), TypeError, "expected a stream.*got Episode"),
    "true episodes": (on(episodes=True), ValueError, "whole number.*True"),
    "half an episode": (on(episodes=2.5), ValueError, "whole number.*2.5"),
    "one episode": (on(episodes=1), ValueError, "at least 2 episodes"),
    "chunks of none": (on(chunk=0), ValueError, "chunk to be a whole number of at least 1"),
    "a metric of rows": (on(metric=lambda p, y: (p - y).mean(1)), ValueError, r"got shape \(8,\)"),
    "batches at step 2": (on(stream=mixed), TypeError, "got Batch at step 2"),
    "arrays at step 2": (on(stream=array), TypeError, "convert with torch.from_numpy"),
    "query rows of zeros": (
        on(
            protonet(seeded(network)),
            off_its_start(seeded(network).state_dict()),
            lambda step: uneven(2)._replace(query=Batch(uneven(2).query.x, 0 * uneven(2).query.y)),
            2,
            accuracy,
        ),
        ValueError,
        "one-hot rows",
    ),
    "answers to a batch": (
        lambda: answers(LEARNER, PHI, lines().query),
        TypeError,
        "draw of episodes",
    ),
    "answers of a run": (lambda: answers(LEARNER, RUN, lines()), TypeError, "a dict of tensors"),
    "a list of scores": (
        lambda: interval([0.1, 0.2]),
        TypeError,
        "tensor of real numbers, got list",
    ),
    "a table of scores": (lambda: interval(torch.zeros(2, 2)), ValueError, "in one row"),
    "numbers to compare": (lambda: compare(0.1, 0.2), TypeError, "two Scores.*got float"),
    "a seed twice": (
        lambda: over_seeds(float, [1, 2, 1]),
        ValueError,
        r"each once, got \[1, 2, 1\]",
    ),
    "one seed": (lambda: over_seeds(float, [1]), ValueError, "at least 2 seeds"),
    "no number for a seed": (
        lambda: over_seeds(lambda s: None, [1, 2]),
        TypeError,
        "one number or a Score, got NoneType",
    ),
    "a table for a quality": (
        lambda: best_of((1, 2), lambda s: torch.zeros(2)),
        TypeError,
        "one number or a Score",
    ),
    "settings without names": (
        lambda: best_of([{"lr": 1}], lambda s: 1.0),
        TypeError,
        "a dict of names",
    ),
}


@pytest.mark.parametrize("call, error, message", INPUTS.values(), ids=INPUTS)
def test_what_cannot_be_scored_is_said_in_our_own_words(call, error, message):
    with pytest.raises(error, match=message):
        call()
