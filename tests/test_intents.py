"""Requests by intent: the real files, what stands in for them, copies, heads that read them, and the page's choices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from machine import real
from pages import run_until
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from mtlib.book.results import recorded
from mtlib.book.sentences import (
    Row,
    Said,
    Sentences,
    answers,
    areas,
    cross_validated,
    limit,
    refusal,
    trained,
)
from mtlib.data import clinc as module
from mtlib.data.clinc import FILES, drawn, intents, key, once
from mtlib.data.download import Altered, fetch
from mtlib.learners.finetune import folds
from mtlib.models.encoders import has_minilm, hashed, minilm
from mtlib.tasks import one_hot

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


# Heads ------------------------------------------------------------------------------------------


def labelled(n=40, d=60, ways=4, seed=0):
    """Rows of length one, more of their numbers than rows, around a mean for each class; and rows to ask about."""
    g = torch.Generator().manual_seed(seed)
    y = np.arange(n) % ways
    x = torch.randn(n + 30, d, generator=g)
    x[:n] += 1.5 * torch.randn(ways, d, generator=g)[y]
    x = torch.nn.functional.normalize(x, dim=1)
    return x[:n], y, x[n:]


@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_logistic_regression_is_scikit_learns_and_the_packages_probe(ways, strength):
    """In the span of the labelled rows, as on all numbers; the probe takes 1/(C n)."""
    x, y, asked = labelled(ways=ways)
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=9999).fit(x.double().numpy(), y)
    right = model.predict_proba(asked.double().numpy())
    found = answers("logistic regression", x, y, asked, strength).softmax(1)
    assert np.abs(found.numpy() - right).max() < 1e-4
    if ways > 2:
        probe = answers("probe", x, y, asked, 1 / (strength * len(x))).softmax(1)
        assert np.abs(probe.numpy() - right).max() < 1e-3


def test_class_means_and_ridge_are_their_formulas():
    x, y, asked = labelled()
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    found = answers("class means", x, y, asked)
    assert torch.allclose(found, -(torch.cdist(asked, means) ** 2), atol=1e-5)
    gram, labels = x @ x.T + 1, torch.eye(4)[y]
    for strength in (0.3, 3.0):
        right = (asked @ x.T + 1) @ torch.linalg.solve(gram + strength * torch.eye(40), labels)
        assert torch.allclose(answers("ridge", x, y, asked, strength), right, atol=1e-5)


def test_cross_validation_is_scikit_learns_on_the_same_folds():
    x, y, _ = labelled()
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    fold = folds(one_hot(torch.from_numpy(y), 4)).numpy()
    search = GridSearchCV(
        LogisticRegression(tol=1e-6, max_iter=5000), {"C": grid}, cv=PredefinedSplit(fold)
    ).fit(x.double().numpy(), y)
    assert cross_validated("logistic regression", x, y, grid) == search.best_params_["C"]


# Episodes, refusing, training --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    g = torch.Generator().manual_seed(1)
    sizes = {"val": 7, "test": 11}
    rows = 10 * 3 * 12 + 30 + 18
    z, grams = (
        torch.nn.functional.normalize(torch.rand(rows, d, generator=g), dim=1) for d in (8, 16)
    )
    return Sentences(z, grams, domains=10, ways=3, each=12, outside=sizes, steps=3, asked=4)


def test_target_validation_and_sources_never_meet(bench):
    for target in range(10):
        held, sources = bench.validation(target), bench.sources(target)
        assert sorted([target, *held, *sources]) == list(range(10)) and len(held) == 3


def test_an_episode_asks_about_other_sentences_and_more_labels_keep_the_first(bench):
    for draw in range(5):
        s, y, q = bench.drawn((4,), 5, draw, names=True)
        assert not {*s.tolist()} & {*q.tolist()} and len({*s.tolist(), *q.tolist()}) == 18 + 12
        assert s[-3:].tolist() == (360 + np.arange(12, 15)).tolist()
        assert ((s[:-3] // 12) % 3 == y[:-3]).all() and set(s[:-3] // 36) == {4}
        assert ((q // 12) % 3 == np.arange(12) % 3).all()
        more, _, again = bench.drawn((4,), 8, draw, names=False)
        assert more[:15].tolist() == s[:15].tolist() and again.tolist() == q.tolist()
    assert bench.place("test").tolist() == list(range(397, 408))
    with pytest.raises(ValueError, match="at most 8 labels"):
        bench.drawn((0,), 9, 0, names=False)


def test_n_grams_beside_the_embedding_add_their_inner_products(bench):
    row = Row("baseline", "ridge", [])
    s, y, q = bench.drawn((2,), 5, 0, names=True)
    said = bench.ask(row, 2, 5, 0, (0.7, 0.25), (), "val")
    both = torch.cat([bench.embedded, 0.5 * bench.grams], 1).double()
    gram = both @ both.T + 1
    right = gram[q][:, s] @ torch.linalg.solve(
        gram[s][:, s] + 0.7 * torch.eye(len(s)), torch.eye(3).double()[y]
    )
    assert said.answer.tolist() == right.argmax(1).tolist() and len(said.near) == len(q) + 7
    alone = bench.ask(row, 2, 5, 0, (0.7, None))
    gram = bench.grams.double() @ bench.grams.double().T + 1
    right = gram[q][:, s] @ torch.linalg.solve(
        gram[s][:, s] + 0.7 * torch.eye(len(s)), torch.eye(3).double()[y]
    )
    assert alone.answer.tolist() == right.argmax(1).tolist()
    assert alone.fine.tolist() == (right.argmax(1) == torch.arange(12) % 3).tolist()


def test_all_domains_at_once(bench):
    share = bench.offered("class means", None, (1, 5), 5, 0)
    s, y, q = bench.drawn((1, 5), 5, 0, names=True)
    said = answers("class means", bench.embedded[s], y, bench.embedded[q]).argmax(1).numpy()
    right = said == np.arange(len(q)) % 6
    assert share.tolist() == [right[np.arange(len(q)) % 6 // 3 == k].mean() for k in (0, 1)]
    assert torch.equal(
        bench.offered("ridge", (1.0, 10.0), (1,), 5, 0),
        bench.offered(
            "ridge",
            cross_validated(
                "ridge",
                bench.embedded[bench.drawn((1,), 5, 0, True)[0]],
                bench.drawn((1,), 5, 0, True)[1],
                (1.0, 10.0),
            ),
            (1,),
            5,
            0,
        ),
    )


def said(seed=0, n=40, outside=25):
    g = torch.Generator().manual_seed(seed)
    near = torch.randn(n + outside, generator=g)
    near[:n] += 1
    return Said(torch.zeros(n), torch.rand(n, generator=g) < 0.8, near.sigmoid(), near)


def test_the_limit_is_the_best_of_all_levels_by_a_loop():
    seen = [said(0), said(1)]
    best, at = -1.0, None
    for level in np.quantile(np.r_[seen[0].near, seen[1].near], np.linspace(0.01, 0.99, 99)):
        quality = np.mean(
            [
                (s.fine & (s.near[:40] >= level)).double().mean()
                + (s.near[40:] < level).double().mean()
                for s in seen
            ]
        )
        if quality > best + 1e-12:
            best, at = quality, level
    assert limit(seen) == pytest.approx(at)
    assert sum(refusal(seen[0], limit(seen)).values()) > sum(refusal(seen[0], -9.0).values())
    truth = np.arange(65) < 40
    assert areas(seen[0])["area, nearness"] == roc_auc_score(truth, seen[0].near)
    assert areas(seen[0])["area, probability"] == pytest.approx(areas(seen[0])["area, nearness"])


@pytest.mark.parametrize("by", ["joint", "episodes"])
def test_a_trained_map_follows_its_seed_and_sees_no_sentence_of_other_domains(by, bench):
    z = torch.rand(5, 8)
    one = trained(bench, by, 2, 0, 0.1, 16)(z)
    assert torch.allclose(one.norm(dim=1), torch.ones(5))
    assert torch.equal(one, trained(bench, by, 2, 0, 0.1, 16)(z))
    assert not torch.equal(one, trained(bench, by, 2, 1, 0.1, 16)(z))
    other = bench.embedded.clone()
    for d in (2, *bench.validation(2)):
        other[36 * d : 36 * (d + 1)] = torch.rand(36, 8)
    other[360:] = 0
    moved = Sentences(other, bench.grams, 10, 3, 12, bench.outside, 3, 4)
    assert torch.equal(one, trained(moved, by, 2, 0, 0.1, 16)(z))
    start = trained(bench, by, 2, 0, 1e-9, 16)(z)
    assert torch.allclose(start, torch.nn.functional.normalize(z, dim=1), atol=1e-5)


# The page ---------------------------------------------------------------------------------------


def run(monkeypatch, data):
    monkeypatch.setattr(module, "intents", lambda sentences: data)
    space = run_until("intents", "columns")
    names = ["logistic regression + names", "ProtoNet, class means", "joint training, class means"]
    chosen = {(k, t): space["chosen"](k, t) for k in names for t in (0, 9)}
    who = {k: ((0, 0),) if space["ROWS"][k].by else () for k in names}
    right = {k: space["right"](k, 0, 5, 0, chosen[k, 0], *who[k]) for k in names}
    seen = [
        space["ask"](names[0], *place, chosen[names[0], 0], (), "val")
        for place in space["held_out"](0)
    ]
    return space["QUALITY"], chosen, limit(seen), right


def test_nothing_is_chosen_with_labels_of_the_target(small):
    """With the target's labels shuffled and other sentences outside at test, settings and limit stay."""
    plain = drawn(20)
    tried, before, bar, right = run(small, plain)
    own = [t for texts in plain.texts[:15] for t in texts]
    order = np.random.default_rng(0).permutation(len(own)).reshape(15, 20)
    texts = [[own[i] for i in row] for row in order] + plain.texts[15:]
    outside = {**plain.outside, "test": plain.outside["test"][::-1]}
    again, after, same, moved = run(small, plain._replace(texts=texts, outside=outside))
    for name, target in before:
        if target == 0:
            assert after[name, 0] == before[name, 0]
            assert again[name][plain.domains[0]] == tried[name][plain.domains[0]]
    assert same == bar and moved != right
    last = plain.domains[9]  # the first domain is one of its validation domains
    assert any(again[k][last] != tried[k][last] for k in tried)


@there
@pytest.mark.skipif(not has_minilm(), reason="no encoder on this machine")
def test_the_headline_by_scikit_learn_alone():
    """Logistic regression on MiniLM with names in one domain, from the texts; the record has the same six episodes."""
    held = recorded("intents").details
    data, name = intents(60), "logistic regression + names"
    domain = 4
    texts = [t for x in data.texts[60:75] for t in x] + [
        n.replace("_", " ") for n in data.names[60:75]
    ]
    z = minilm(texts).double().numpy()
    own = data.domains[domain]
    strength = [0.1, 1, 10, 100, 1000][int(np.argmax(held["tuning"][name][own]))]
    found = []
    for draw in range(6):
        rng = np.random.default_rng([draw, domain])
        mixed = np.stack([rng.permutation(60) for _ in range(15)])
        s = np.r_[(60 * np.arange(15)[:, None] + mixed[:, :5]).ravel(), 900 + np.arange(15)]
        q = (60 * np.arange(15)[:, None] + mixed[:, -10:]).ravel()
        y = np.r_[np.repeat(np.arange(15), 5), np.arange(15)]
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=9999).fit(z[s], y)
        found.append((model.predict(z[q]) == np.repeat(np.arange(15), 10)).mean())
    row = held["domains"]["between"].index(f"the others to {own}")
    kept = held["domains"]["ways"][name]["columns"]["5 labels"]["each"][row][0]
    assert np.mean(found) == pytest.approx(kept, abs=0.002)


@there
@pytest.mark.skipif(not has_minilm(), reason="no encoder on this machine")
def test_intents_of_all_domains_are_easier():
    """An exercise says so: fifteen intents of ten domains against fifteen of one, class means of hashed words."""
    data = intents(20)
    rng, found = np.random.default_rng(0), {"one": [], "all": []}
    x = hashed([t for texts in data.texts for t in texts]).view(150, 20, -1)
    for draw in range(40):
        for kind, own in (
            ("one", np.arange(15) + 15 * (draw % 10)),
            ("all", rng.permutation(150)[:15]),
        ):
            means = x[own, :5].mean(1)
            asked = x[own, 5:].flatten(0, 1)
            scores = 2 * asked @ means.T - (means**2).sum(1)
            truth = torch.arange(15).repeat_interleave(15)
            found[kind].append((scores.argmax(1) == truth).double().mean().item())
    assert np.mean(found["all"]) > np.mean(found["one"]) + 0.02
