"""`across` and `heads`: contests across domains that choose among sources alone, and linear heads on fixed features."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from pages import at_small_scale
from problems import normal
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from mtlib.book import results
from mtlib.book.across import Across, Rival
from mtlib.book.heads import Heads, adapted, drawn_back, joined, linear_net, logits
from mtlib.core import Batch, take
from mtlib.data.sentiment import draws
from mtlib.data.sentiment import tested as order_of
from mtlib.evaluate import interval
from mtlib.learners.finetune import finetune, logistic_head

DOMAINS = ("a", "b", "c")
N = {"a": 100, "b": 110, "c": 120}
REAL = "drawn (real)"


@pytest.fixture(autouse=True)
def small():
    with at_small_scale() as patch:
        yield patch


@pytest.fixture
def full(small, tmp_path, monkeypatch):
    """The full scale with an empty folder of records, and a clean commit."""
    small.setenv("MTLIB_SCALE", "full")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    monkeypatch.setattr("mtlib.book.contest.clean_commit", lambda: "0123456789ab")
    monkeypatch.setenv("MTLIB_CACHE", str(tmp_path / "cache"))
    return small


def share_of(name, setting):
    return {"plain": 0.6, "pull": 0.5 + 0.1 * setting, "meta": 0.8 - 0.1 * setting}[name]


def drawn(name, calls, sources, target, run, setting):
    """Three draws of answers, right with a share that the setting sets."""
    calls.append((name, sources, target, run, setting))
    g = torch.Generator().manual_seed(1000 * DOMAINS.index(target) + run)
    return torch.rand(3, N[target], generator=g) < share_of(name, setting)


def ways(calls):
    return {
        "plain": Rival("baseline", partial(drawn, "plain", calls), [0]),
        "pull": Rival("transfer", partial(drawn, "pull", calls), [0, 1, 2, 3]),
        "meta": Rival("meta", partial(drawn, "meta", calls), [0, 1, 2, 3]),
    }


def game(calls=None, **how):
    return Across("trees", ways([] if calls is None else calls), DOMAINS, REAL, **how)


def test_a_target_takes_no_part_in_its_own_choice():
    calls = []
    found = game(calls)
    assert found.setting("pull", "a") == 3 and found.setting("meta", "a") == 0
    assert {c[1:3] for c in calls} == {(("b",), "c"), (("c",), "b")}
    assert {c[3] for c in calls} == {1000}  # a seed that no scored run has
    assert found.behind(("b",), "c") == "a" and found.behind(("b", "c"), "a") == "a"


def test_numbers_are_those_of_the_answers():
    found = game()
    for way in ("plain", "pull"):
        own = found.setting(way, "b")
        by_hand = torch.stack(
            [drawn(way, [], ("a", "c"), "b", run, own).double().mean(0) for run in (0, 1)]
        )
        torch.testing.assert_close(found.right(way, "b"), by_hand)
        torch.testing.assert_close(found.asked(way, "b"), by_hand[0])
    gap = found.minus("pull", "plain")
    parts = [found.right("pull", t) - found.right("plain", t) for t in DOMAINS]
    means = torch.stack([p.mean() for p in parts])
    assert gap["targets"].mean == pytest.approx(means.mean().item())
    assert gap["targets"].interval == pytest.approx(interval(means).interval)
    assert len(gap["items"].values) == sum(N.values()) and len(gap["runs"].values) == 2
    half = max(s.interval for s in gap.values())
    assert found.points("pull", "plain") == f"{100 * means.mean():+.1f} ± {100 * half:.1f}"
    assert found.points("plain", "pull").startswith("−")
    kept = found.paired("pull", "plain")
    assert (kept.unit, kept.n) in {("targets", 3), ("items", 330), ("runs", 2)}
    assert found.line("plain")[0] == f"{100 * found.right('plain', 'a').mean():.1f}"


def test_no_difference_has_no_width():
    """All-zero differences are no shares of which none is right."""
    found = game()
    assert max(s.interval for s in found.minus("plain", "plain").values()) == 0


def test_the_best_of_a_family_is_the_best_among_sources():
    found = game()
    assert found.best("transfer as chosen", ["pull"]) == dict.fromkeys(DOMAINS, "pull")
    assert found.points("transfer as chosen", "pull") == "+0.0 ± 0.0"
    with pytest.raises(ValueError, match="one kind"):
        found.best("x", ["pull", "meta"])
    found.make("all", "baseline", {t: torch.ones(N[t]) for t in DOMAINS})
    assert found.told("all").startswith("100.0")
    with pytest.raises(KeyError, match="no way"):
        found.setting("push", "a")
    with pytest.raises(KeyError, match="no domain"):
        found.sources("d")


def test_a_record_gives_the_same_numbers_and_runs_nothing(full):
    full.setenv("MTLIB_RECORD", "1")
    told = {"field": "Trees", "protocol": "drawn", "labels": "none", "gain": ("pull", "plain")}
    first = game()
    assert first.conclude(**told, versus=("meta", "pull")) == "recorded as trees.json"
    full.delenv("MTLIB_RECORD")
    calls = []
    again = game(calls)
    assert again.kept and again.runs == 5 == len(again.right("pull", "a"))
    for way in first.ways:
        assert again.told(way) == first.told(way)
        assert again.setting(way, "c") == first.setting(way, "c")
    assert again.conclude(**told, versus=("meta", "pull")).startswith("agrees")
    assert not calls
    again.hold(["pull"])
    assert {c[3] for c in calls} == {0}
    held = json.loads((results.FOLDER / "trees.json").read_text("utf8"))
    assert held["versus"]["unit"] and held["versus"]["n"] >= 2

    def worse(sources, target, run, setting):
        return torch.zeros(3, N[target])

    other = Across(
        "trees", ways([]) | {"pull": Rival("transfer", worse, [0, 1, 2, 3])}, DOMAINS, REAL
    )
    with pytest.raises(ValueError, match="record anew"):
        other.hold(["pull"])
    with pytest.raises(ValueError, match="other settings"):
        Across("trees", ways([]) | {"plain": Rival("baseline", worse, [1])}, DOMAINS, REAL)
    with pytest.raises(ValueError, match="other ways"):
        Across("trees", {"plain": ways([])["plain"]}, DOMAINS, REAL)


def test_without_a_record_the_middle_of_a_grid_is_taken(full):
    calls = []
    found = game(calls)
    assert found.setting("pull", "a") == 2 and not calls and found.runs == 2


# Heads ---------------------------------------------------------------------------------------

WIDTH = 6


@pytest.fixture
def bench():
    """Three domains whose classes lie apart along one direction, at places of their own."""
    y = {d: torch.arange(N[d]) % 2 for d in DOMAINS}
    z = {}
    for i, d in enumerate(DOMAINS):
        away = torch.zeros(WIDTH)
        away[0] = 1.0
        z[d] = (normal(N[d], WIDTH, seed=i).float() + 2 * (y[d][:, None] - 0.5) * away) / 3
        z[d] += i * 0.3 * away
    sets = {"plain": z, "centred": {d: v - v.mean(0) for d, v in z.items()}}
    return Heads(sets, y, lambda sources, target: 1.0, draws=2, steps=3)


def right_by_hand(bench, kind, target, labels, model_of):
    """(draws, n) with scikit-learn, in the items' own order."""
    y = bench.y[target]
    parts = []
    for fold in (0, 1):
        few = draws(bench.sets[kind][target], y, labels, 2, seed=7, fold=fold)(0)
        rows = []
        for x, said in zip(few.support.x, few.support.y.argmax(2), strict=True):
            model = model_of(x.numpy(), said.numpy())
            rows.append(torch.from_numpy(model.predict(few.query.x[0].numpy())))
        parts.append(torch.stack(rows) == few.query.y[0].argmax(1))
    found, order = torch.cat(parts, 1), order_of(len(y), seed=7)
    back = torch.empty_like(found)
    back[:, order] = found
    return back


def test_joint_training_is_scikit_learns_with_weights(bench):
    x, y = bench.rows("centred", ("a", "b"))
    for weight, ask, setting in (
        (1.0, bench.pooled(10), ("centred", 1.0)),
        (7.0, bench.joint(10), ("centred", 7.0)),
        (None, bench.target_only(10), ("centred", 1.0)),
    ):

        def model_of(own, said, weight=weight):
            if weight is None:
                return LogisticRegression().fit(own.astype(float), said)
            z = np.concatenate([x.numpy(), own]).astype(float)
            w = np.concatenate([np.ones(len(x)), np.full(len(own), weight)])
            return LogisticRegression(max_iter=1000).fit(
                z, np.concatenate([y.numpy(), said]), sample_weight=w
            )

        by_hand = right_by_hand(bench, "centred", "c", 10, model_of)
        assert torch.equal(ask(("a", "b"), "c", 0, setting), by_hand)


def test_source_only_is_asked_without_labels(bench):
    x, y = bench.rows("plain", ("a", "b"))
    model = LogisticRegression(C=0.3).fit(x.double().numpy(), y.numpy())
    found = bench.source_only()(("a", "b"), "c", 0, ("plain", 0.3))
    expected = torch.from_numpy(model.predict(bench.sets["plain"]["c"].double().numpy()))
    assert torch.equal(found[0], expected == bench.y["c"]) and torch.equal(found[0], found[1])
    coral = bench.coral()(("a", "b"), "c", 0, ("plain", 1e9))  # a large λ leaves covariances alone
    assert torch.equal(coral[0], bench.source_only()(("a", "b"), "c", 0, ("plain", 1.0))[0])


def test_what_moves_and_what_is_drawn_back(bench):
    net, few = (
        linear_net(WIDTH),
        take(draws(bench.sets["plain"]["c"], bench.y["c"], 10, 2, 7)(0), 0),
    )
    phi = bench.start("plain", ("a", "b"), 1.0)
    part = drawn_back(net, 0.1, "head.bias").adapt(phi, few.support)
    assert torch.equal(part["head.weight"], phi["head.weight"])
    assert not torch.equal(part["head.bias"], phi["head.bias"])
    still = drawn_back(net, 1e6).adapt(phi, few.support)
    torch.testing.assert_close(still, phi, atol=1e-5, rtol=0)
    theta = drawn_back(net, 0.1, steps=3000).adapt(phi, few.support)  # at rest: the slope is 0
    p = torch.softmax(logits(theta, few.support.x), 1) - few.support.y
    slope = p.mT @ few.support.x / len(p) + 0.1 * (theta["head.weight"] - phi["head.weight"])
    assert slope.abs().max() < 1e-5


def test_the_ways_adapt_draw_by_draw(bench):
    """`adapted` is a loop over draws; MAML without practice is fine-tuning of five steps."""
    draw = draws(bench.sets["plain"]["c"], bench.y["c"], 10, 2, 7)(0)
    net, phi = linear_net(WIDTH), bench.start("plain", ("a", "b"), 1.0)
    learner = finetune(net, cross_entropy, 0.5, 5)
    both = adapted(learner, phi, draw)
    for i in range(2):
        one = take(draw, i)
        alone = learner.predict(learner.adapt(phi, one.support), one.query.x)
        torch.testing.assert_close(both[i], alone)
    tuned = bench.onward(10, lambda rate: finetune(net, cross_entropy, rate, 5))
    maml = bench.practising(10, "MAML")
    assert torch.equal(
        tuned(("a", "b"), "c", 0, ("plain", 0.5)), maml(("a", "b"), "c", 0, ("plain", 0.0, 0.5))
    )
    head = bench.practising(10, "ridge head")(("a", "b"), "c", 0, ("centred", 1e-3, 10.0))
    assert head.shape == (2, N["c"]) and head.double().mean() > 0.7
    with pytest.raises(ValueError, match="ridge head"):
        bench.practising(10, "FOMAML")


def test_joined_alone_needs_no_source():
    z, y = normal(40, 3).float(), torch.arange(40) % 2
    draw = draws(z + y[:, None], y, 10, 2, seed=0)(0)
    found = joined(draw, 2.0)
    phi = logistic_head(draw.support.x[1], draw.support.y[1].argmax(1), 2.0)
    torch.testing.assert_close(found[1], logits(phi, draw.query.x[1]))
    twice = joined(draw, 1.0, 3.0, Batch(z, y))
    assert twice.shape == found.shape


def test_heads_refuse_what_does_not_fit(bench):
    with pytest.raises(ValueError, match="as many as labels"):
        Heads({"plain": {"a": torch.zeros(3, 2)}}, {"a": torch.zeros(4).long()}, max)


def test_an_end_of_any_axis_is_an_end():
    """The rate in the middle of a setting, too; a name, or an axis of one value, has no end."""
    grid = [(kind, rate, 0.5) for kind in ("plain", "centred") for rate in (0.1, 0.2, 0.3)]
    game = Across(
        "trees", {"one": Rival("meta", lambda *_: None, grid)}, "abc", "leaves (stand-in)"
    )
    assert [game.at_end("one", s) for s in grid] == [True, False, True] * 2
