"""Requests by intent: the real files, what stands in for them, copies, and the page's choices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from machine import real
from pages import run_until

from mtlib.data import clinc as module
from mtlib.data.clinc import FILES, drawn, intents, key, once
from mtlib.data.download import Altered, fetch

there = real("clinc150")


@there
def test_counts_and_copies():
    found = intents(50)
    assert len(found.domains) == 10 and len(found.names) == len(set(found.names)) == 150
    assert {len(t) for t in found.texts} == {50} and found.source.endswith("(real)")
    assert {k: len(v) for k, v in found.outside.items()} == {"val": 200, "test": 1000}
    assert found.repeated == 120
    once_each = {key(t) for texts in intents(130).texts for t in texts}
    assert len(once_each) == 150 * 130
    outside = [key(t) for texts in found.outside.values() for t in texts]
    assert len(set(outside)) == 1200 and not once_each & set(outside)
    assert intents(130).texts[7][:50] == found.texts[7]


@there
def test_domains_hold_their_own_intents():
    """The files list the intents of each domain; a sentence goes where the files say."""
    found = intents(50)
    domains = json.loads(fetch(FILES["domains"]).read_text("utf8"))
    content = json.loads(fetch(FILES["sentences"]).read_text("utf8"))
    assert found.domains == list(domains)
    for i, domain in enumerate(found.domains):
        assert found.names[15 * i : 15 * (i + 1)] == domains[domain]
    label = {text: name for part in ("train", "test", "val") for text, name in content[part]}
    for name, texts in zip(found.names, found.texts, strict=True):
        assert all(label[text] == name for text in texts)


def test_a_copy_is_dropped_whatever_its_intent_capitals_and_stops():
    content = {
        "val": [["Next song, please!", "next"], ["stop", "stop"]],
        "test": [["next song please", "next"], ["STOP.", "next"], ["go on", "next"]],
        "train": [["halt", "stop"]],
        "oos_train": [["a", "oos"]],
        "oos_val": [["b", "oos"]],
        "oos_test": [["c", "oos"]],
    }
    found = once(content, {"music": ["next", "stop"]}, 2)
    assert found.texts == [["Next song, please!", "go on"], ["stop", "halt"]]
    assert found.repeated == 2 and found.outside == {"val": ["a", "b"], "test": ["c"]}


@there
@pytest.mark.parametrize("name", list(FILES))
def test_one_altered_file_is_an_error_and_no_stand_in(name, tmp_path, monkeypatch):
    for k, remote in FILES.items():
        data = fetch(remote).read_bytes()
        copy = tmp_path / remote.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(data.replace(b"flight", b"fright") + b" " if k == name else data)
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    with pytest.raises(Altered, match="truncated or altered"):
        intents()


def test_a_number_of_sentences_that_is_not_there_is_refused():
    for n in (1, 131):
        with pytest.raises(ValueError, match="from 2 to 130"):
            intents(n)


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
    found = intents(20)
    assert found.source.endswith("(stand-in)") and len(found.names) == len(set(found.names)) == 150
    assert drawn(20) == found != drawn(20, seed=1)
    every = [t for texts in (*found.texts, *found.outside.values()) for t in texts]
    assert len(every) == len({key(t) for t in every}) == 150 * 20 + 1200
    words = [
        {w for texts in found.texts[a : a + 15] for t in texts for w in t.split()} for a in (0, 15)
    ]
    assert words[0] - words[1] and words[1] - words[0] and words[0] & words[1]


def run(monkeypatch, data):
    monkeypatch.setattr(module, "intents", lambda sentences: data)
    return run_until("intents", "THRESHOLDS")


def test_nothing_is_chosen_with_labels_of_the_target(small):
    """With the target's labels shuffled and other sentences outside at test, method and threshold stay."""
    plain = drawn(20)
    before = run(small, plain)
    rng = np.random.default_rng(0)
    for target in (0, 1):
        own = [t for texts in plain.texts[15 * target : 15 * (target + 1)] for t in texts]
        order = rng.permutation(len(own)).reshape(15, 20)
        texts = list(plain.texts)
        texts[15 * target : 15 * (target + 1)] = [[own[i] for i in row] for row in order]
        outside = {**plain.outside, "test": plain.outside["test"][::-1]}
        after = run(small, plain._replace(texts=texts, outside=outside))
        mine = [k for k in before["CHOSEN"] if k[1] == target]
        assert mine and all(after["CHOSEN"][k] == before["CHOSEN"][k] for k in mine)
        kept = [k for k in before["THRESHOLDS"] if k[1] == target]
        assert kept and all(after["THRESHOLDS"][k] == before["THRESHOLDS"][k] for k in kept)
        moved = [k for k in before["right"] if k[2] == target]
        assert any(not (before["right"][k] == after["right"][k]).all() for k in moved)


def test_target_validation_and_sources_never_meet(small):
    space = run_until("intents", "roles")
    for target in range(10):
        held, sources = space["roles"](target)
        assert sorted([target, *held, *sources]) == list(range(10)) and len(held) == 3
