"""Sentences from three sites: the real files, what stands in for them, and the page's choices."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from machine import real
from pages import run_until
from sklearn.linear_model import LogisticRegression

from mtlib.book.across import Across
from mtlib.book.results import recorded
from mtlib.data import sentiment as module
from mtlib.data.sentiment import FILES, drawn, draws, sites, with_share
from mtlib.data.sentiment import tested as order
from mtlib.models.encoders import has_minilm, minilm

there = real("sentiment")


@there
def test_counts_and_copies():
    found = sites()
    assert {k: len(s.texts) for k, s in found.items()} == {"Amazon": 981, "IMDb": 996, "Yelp": 995}
    assert {k: s.repeated for k, s in found.items()} == {"Amazon": 19, "IMDb": 4, "Yelp": 5}
    for s in found.values():
        assert s.source.endswith("(real)") and set(s.y.tolist()) == {0, 1}
        keys = {re.sub(r"[\W_]", "", t.lower()) for t in s.texts}
        assert len(keys) == len(s.texts) == len(s.y)
        assert abs(s.y.double().mean() - 0.5) < 0.01


@there
def test_a_line_ends_in_a_line_feed_only():
    """IMDb's sentences hold other line breaks, which would split a sentence in two."""
    assert any("\x85" in t for t in sites()["IMDb"].texts)


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
    found = sites()
    assert list(found) == list(FILES) and all(
        s.source.endswith("(stand-in)") for s in found.values()
    )
    assert drawn("Yelp").texts == found["Yelp"].texts != drawn("Yelp", seed=1).texts
    words = [set(" ".join(s.texts).lower().split()) for s in found.values()]
    assert words[0] - words[1] - words[2] and words[0] & words[1] & words[2]


def test_draws_never_meet_their_test_rows():
    z, y = torch.arange(100.0)[:, None], torch.arange(100) % 2
    stream = draws(z, y, labels=10, tasks=3, seed=4)
    a, b = stream(0), stream(7)
    assert a.support.x.shape == (3, 10, 1) and a.query.x.shape == (3, 50, 1)
    assert torch.equal(a.query.x, b.query.x) and not torch.equal(a.support.x, b.support.x)
    assert torch.equal(stream(7).support.x, b.support.x)
    tested = set(a.query.x.flatten().tolist())
    for draw in (a, b):
        assert (draw.support.y.sum(1) == 5).all()
        for rows, labels in zip(draw.support.x[..., 0], draw.support.y, strict=True):
            assert len(set(rows.tolist())) == 10 and not tested & set(rows.tolist())
            assert torch.equal(labels.argmax(1), rows.long() % 2)
    other = draws(z, y, labels=10, tasks=1, seed=4, fold=1)(0)
    assert set(other.query.x.flatten().tolist()) == set(range(100)) - tested
    both = torch.cat([draws(z, y, 10, 1, 4, fold)(0).query.x[0, :, 0] for fold in (0, 1)])
    assert torch.equal(both.long(), order(100, seed=4))
    for labels in (0, 3, 80):
        with pytest.raises(ValueError, match="even number of labels"):
            draws(z, y, labels=labels, tasks=1, seed=0)


def test_a_site_drawn_anew_has_the_share_that_was_asked_for():
    y = torch.arange(200) % 2
    kept = with_share(y, 0.9, seed=0)
    assert len(kept) == len(set(kept.tolist())) == 100 and int(y[kept].sum()) == 90
    assert torch.equal(kept, with_share(y, 0.9, seed=0))
    assert not torch.equal(kept, with_share(y, 0.9, seed=1))
    with pytest.raises(ValueError, match="items of the classes"):
        with_share(y[:150].clamp(max=0), 0.5, seed=0)


def contest_of(patch, held):
    """The page's contest on these sites, at the small scale; nothing of it has run."""
    patch.setattr(module, "sites", lambda: held)
    space = run_until("sentiment", "tuned")  # all ways stand
    space["GAME"] = Across("sentiment", space["WAYS"], [*held], "drawn", items="sentences")
    return space["GAME"]


def test_the_settings_are_chosen_without_labels_of_the_target(small):
    """With a target's labels shuffled, what every way chooses for it stays; what is right of its answers does not."""
    plain = {name: drawn(name, sentences=240) for name in FILES}
    game = contest_of(small, plain)
    for target in FILES:
        order = np.random.default_rng(0).permutation(len(plain[target].y))
        shuffled = plain[target]._replace(y=plain[target].y[order])
        other = contest_of(small, {**plain, target: shuffled})
        before, after = ({w: g.setting(w, target) for w in g.ways} for g in (game, other))
        assert before == after and len(before) > 10
        assert {s[0] for s in before.values()} > {"plain"}  # and centred features
        right = [float(g.asked("source only", target).mean()) for g in (game, other)]
        assert right[0] != right[1]


@there
@pytest.mark.skipif(not has_minilm(), reason="the encoder is not installed")
def test_the_headline_by_scikit_learn_alone():
    """Source only, without a label: features, centring, C chosen between the two sources, and the share told right."""
    found = sites()
    y = {name: s.y.numpy() for name, s in found.items()}
    plain = {name: minilm(s.texts).double().numpy() for name, s in found.items()}
    kinds = {"plain": plain, "centred": {k: z - z.mean(0) for k, z in plain.items()}}

    def right(kind, c, names, target):
        z = kinds[kind]
        model = LogisticRegression(C=c, max_iter=5000)
        model.fit(np.concatenate([z[s] for s in names]), np.concatenate([y[s] for s in names]))
        return (model.predict(z[target]) == y[target]).mean()

    told = []
    for target in found:
        a, b = (s for s in found if s != target)
        grid = [(k, c) for k in kinds for c in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]
        kind, c = max(grid, key=lambda s: right(*s, (a,), b) + right(*s, (b,), a))
        assert kind == "centred"
        told.append(right(kind, c, (a, b), target))
    kept = {e.method: e.mean for e in recorded("sentiment").entries}
    assert abs(np.mean(told) - kept["source only"]) <= 1e-3
    assert kept["source only"] > kept["source only, plain"] > kept["words"]


@there
def test_what_the_page_says_of_its_record():
    """No way with labels is beyond the line without any by a point, nor is practice worth one."""
    kept = {e.method: e.mean for e in recorded("sentiment").entries}
    few = [k for k in kept if k.endswith("0 labels") and not k.startswith("target only")]
    assert len(few) > 10 and max(kept[k] for k in few) < kept["source only"] + 0.01
    for n in (10, 50):
        assert abs(kept[f"MAML, {n} labels"] - kept[f"fine-tuning, {n} labels"]) < 0.01
        assert kept[f"target only, {n} labels"] < kept["source only"] - 0.03


def test_uneven_shares_move_the_threshold_by_what_the_exercise_says():
    """m_t = π μ₁ + (1 − π) μ₀, so w · m_t is off its place at equal shares by (π − ½) w · (μ₁ − μ₀)."""
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(200, 5)), rng.normal(size=5)
    praise = np.arange(200) < 180
    one, none = z[praise].mean(0), z[~praise].mean(0)
    off = w @ z.mean(0) - w @ (one + none) / 2
    assert abs(off - 0.4 * w @ (one - none)) <= 1e-12
