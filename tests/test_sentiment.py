"""Sentences from three sites: the real files, what stands in for them, and the page's choices."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from machine import real
from pages import run_until

from mtlib.data import sentiment as module
from mtlib.data.sentiment import FILES, drawn, draws, sites
from mtlib.data.sentiment import tested as order

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


def test_the_settings_are_chosen_without_labels_of_the_target(small):
    """With a target's labels shuffled, what is chosen for it stays; what it scores does not."""
    plain = {name: drawn(name, sentences=300) for name in FILES}

    def run(shuffled: str | None):
        found = dict(plain)
        if shuffled:
            order = np.random.default_rng(0).permutation(len(plain[shuffled].y))
            found[shuffled] = plain[shuffled]._replace(y=plain[shuffled].y[order])
        small.setattr(module, "sites", lambda: found)
        return run_until("sentiment", "CHOSEN")["CHOSEN"]

    before = run(None)
    assert set(before) == {(t, n) for t in FILES for n in (10, 50)}
    for target in FILES:
        after = run(target)
        for key in before:
            if key[0] == target:
                assert after[key] == before[key]
