"""The page of all methods: its catalogue is whole, lines train as they say, and what it tells is in the records."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from machine import ROOT
from pages import BOOK, code_cells, mix_test_characters, run_until
from scipy.stats import t as student
from torch.nn.functional import cross_entropy

import mtlib.learners
from mtlib.book import catalogue, results
from mtlib.book.catalogue import FAMILIES, Line, bench_of, costs, ways_of, worth
from mtlib.book.contest import Contest, of_page
from mtlib.book.results import Paired
from mtlib.book.ways import study
from mtlib.core import Learner, take
from mtlib.data import characters as letters
from mtlib.learners.finetune import finetune, fresh_head
from mtlib.learners.metric import protonet
from mtlib.tasks import ClassSet, episodes

GENERAL = {"descent", "inner_loop", "learned", "point"}  # what learners are made of
OTHER_PROTOCOLS = {"transductive", "policy", "hyper"}  # rooms whose tasks are of another kind
ELSEWHERE = {  # learner -> the page that measures it
    "alpaca": "closed_form",
    "anil_at_once": "closed_form",
    "lp_ft": "adapting",
    "linear_probe": "adapting",
    "learned_optimizer": "problems",
    "one_rate": "problems",
}
RECORD = json.loads((results.FOLDER / "which.json").read_text("utf8"))
FOUND = RECORD["details"].get("characters", {})


def public_learners():
    """Names of the functions of `mtlib.learners` that return a Learner, with their rooms."""
    for module in pkgutil.iter_modules(mtlib.learners.__path__):
        room = importlib.import_module(f"mtlib.learners.{module.name}")
        for name, f in inspect.getmembers(room, inspect.isfunction):
            own = f.__module__ == room.__name__ and not name.startswith("_")
            if own and inspect.signature(f).return_annotation in (Learner, "Learner"):
                yield module.name, name


@pytest.fixture
def drawn():
    """Twelve classes of eight flat drawings, which can be told apart."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(24, 1, 9, generator=g)
    items = centre + 0.3 * torch.randn(24, 16, 9, generator=g)
    return ClassSet(items, [f"{chr(97 + i // 6)}/{i}" for i in range(24)], "drawn (real)")


# The catalogue ---------------------------------------------------------------------------------


def test_the_catalogue_has_every_learner():
    code = "\n".join(text for text in code_cells("which") if "import " not in text)
    known = {name for room, name in public_learners() if room not in OTHER_PROTOCOLS} - GENERAL
    assert len(known) > 25
    missing = {name for name in known if not re.search(rf"\b{name}\b", code)}
    assert missing == {*ELSEWHERE}, "no line for these"
    for name, page in ELSEWHERE.items():
        text = (BOOK / f"{page}.ipynb").read_text("utf8")
        rooms = set(re.findall(r"from mtlib\.book(?:\.| import )(\w+)", text)) - {"results"}
        text += "".join((ROOT / f"mtlib/book/{room}.py").read_text("utf8") for room in rooms)
        assert name in text, f"{name} is not on {page}"


def test_every_line_has_four_settings_of_one_number(small):
    lines = run_until("which", "CATALOGUE")["CATALOGUE"]
    assert len(lines) > 30 and {line.family for line in lines.values()} == {*FAMILIES}
    for name, line in lines.items():
        assert len(line.grid) == 4, name
        assert all(a < b for a, b in zip(line.grid, line.grid[1:], strict=False)), name


def test_every_line_trains_and_answers(small):
    page = run_until("which", "CATALOGUE")
    bench = bench_of(page["train"], 2)
    ways = ways_of(bench, page["CATALOGUE"])
    task = take(episodes(page["held"], 5, 2, 3, tasks=1, seed=0)(0), 0)
    for name, way in ways.items():
        learner, phi = way.train(way.settings[0], 0, 1)
        prediction = learner.predict(learner.adapt(phi, task.support), task.query.x)
        assert prediction.shape == (15, 5) and torch.isfinite(prediction).all(), name
        assert way.kind == FAMILIES[page["CATALOGUE"][name].family]


# How a line trains -----------------------------------------------------------------------------


def test_practice_is_adam_on_episodes_of_one_and_five_labels_in_turn(drawn):
    """ProtoNet's training written anew: its loss, Adam and the cosine, on the same draws."""
    bench = bench_of(drawn, 4)
    line = Line("metric", "episodes", protonet, (0.01,), rate=True)
    _, phi = ways_of(bench, {"x": line})["x"].train(0.01, 3, 1)
    net = bench.network(5, seed=3)
    body = [*net.body.parameters()]
    adam = torch.optim.Adam(body, lr=0.01)
    parts = [episodes(drawn, 5, k, q, t, seed=3) for k, q, t in ((1, 5, 8), (5, 3, 6))]
    for step in range(4):
        episode = parts[step % 2](step)
        loss = 0.0
        for i in range(len(episode.support.x)):
            s, q = (type(p)(p.x[i], p.y[i]) for p in (episode.support, episode.query))
            means = (s.y.T @ net.body(s.x)) / s.y.sum(0)[:, None]
            away = (net.body(q.x)[:, None] - means).square().sum(-1)
            loss = loss + cross_entropy(-away, q.y) / len(episode.support.x)
        adam.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 4)) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, value in net.body.named_parameters():
        if (
            name == "2.bias"
        ):  # means take it off where a unit is on for all: its gradient is rounding, which Adam scales up
            continue
        assert torch.allclose(phi[f"body.{name}"], value, atol=1e-4), name


def test_a_bench_gives_names_as_many_drawings_as_practice(drawn):
    bench = bench_of(drawn, 100)
    assert (bench.practise, bench.study) == (100, 375)
    assert bench.study * 64 == bench.practise * 240
    for shots, queries, tasks in catalogue.PRACTICE:
        assert 5 * (shots + queries) * tasks == 240


def test_a_residual_head_leaves_the_pre_trained_body(drawn):
    bench = bench_of(drawn, 8)
    line = Line("metric", "names, then episodes", protonet, (0.01,), rate=True, residual=True)
    _, phi = ways_of(bench, {"x": line})["x"].train(0.01, 0, 1)
    half = bench_of(drawn, 4)
    before = study(half, "linear", catalogue.RATE, 64, 0)
    assert torch.equal(phi["body.0.0.weight"], before["body.0.weight"])
    assert phi["body.1.second.weight"].abs().sum() > 0, "the residual layer has moved"


def test_from_scratch_is_a_drawn_network_with_a_head_of_zeros(drawn):
    def make(net, rate):
        return fresh_head(finetune(net, cross_entropy, rate, 2), net)

    way = ways_of(bench_of(drawn, 4), {"x": Line("baseline", "nothing", make, (0.1,))})["x"]
    _, phi = way.train(0.1, 5, 1)
    net = bench_of(drawn, 4).network(5, seed=5)
    assert torch.equal(phi["body.0.weight"], net.body[0].weight)
    task = take(episodes(drawn, 5, 2, 2, 1, seed=0)(0), 0).support
    still = fresh_head(finetune(net, cross_entropy, 0.0, 1), net).adapt(phi, task)
    assert not still["head.weight"].any()


def test_lines_that_are_none_are_named(drawn):
    bench = bench_of(drawn, 4)
    for line, words in (
        (Line("deep", "episodes", protonet, (0.1,)), "family"),
        (Line("metric", "dreams", protonet, (0.1,)), "trained"),
    ):
        with pytest.raises(ValueError, match=words):
            ways_of(bench, {"x": line})
    with pytest.raises((TypeError, ValueError), match="flat drawings"):
        bench_of(drawn._replace(items=drawn.items[..., 0]), 4)
    with pytest.raises(ValueError, match="steps"):
        bench_of(drawn, 0)
    with pytest.raises(ValueError, match=r"contest of genes\.json"):
        of_page("genes", "nothing such")


def test_settings_are_chosen_without_test_labels(small):
    before = run_until("which", "BEST")["found"].found["ways"]
    mix_test_characters(small)
    small.setattr(catalogue, "characters", letters.characters)
    after = run_until("which", "BEST")["found"].found["ways"]
    assert before
    for name, held in before.items():
        assert held["setting"] == after[name]["setting"] and held["tuning"] == after[name]["tuning"]
    assert any(
        held["columns"]["1 label"]["runs"] != after[name]["columns"]["1 label"]["runs"]
        for name, held in before.items()
    )


# The checklist ---------------------------------------------------------------------------------


def made_up(**rows):
    """A contest of ways with one number a seed; each group is one of four, and has the same number."""
    ways = {
        name: {
            "setting": 1.0,
            "edge": False,
            "tuning": dict.fromkeys("abcd", 0.5),
            "columns": {"c": {"runs": runs, "groups": [sum(runs) / len(runs)] * 4, "cases": 0.0}},
        }
        for name, runs in rows.items()
    }
    found = {"groups": "alphabets", "sizes": {"c": [1.0] * 4}, "ways": ways}
    return Contest("c", ways, found, True, {}, "accuracy", True, "made up (real)")


def test_the_checklist_says_yes_only_beyond_the_interval():
    c = made_up(
        meta=[0.80, 0.82, 0.81],
        alone=[0.50, 0.52, 0.51],
        means=[0.80, 0.78, 0.82],
        best=[0.8, 0.8, 0.8],
    )
    seconds = {"meta": 2.0, "best": 1.0}
    answers = worth(c, "meta", "alone", "means", "best", seconds)
    assert [a.yes for a in answers] == [True, False, False, True, False]
    d = np.array([0.0, 0.02, 0.01])
    half = student.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    assert answers[2].number == f"+{100 * d.mean():.1f} ± {100 * half:.1f}"
    assert worth(c, "meta", "alone", "means", "best", {"meta": 1.0, "best": 1.0})[-1].yes
    assert worth(c, "meta", "alone", "means", "best", {})[-1].yes is None


def test_a_recorded_difference_as_text():
    pair = Paired("a", "b", 0.015, -0.003, 0.031)
    assert pair.told(100, 1) == "+1.5 ± 1.7" and pair.told() == "+0.015 ± 0.017"
    assert pair.over == "" and pair._replace(unit="users", n=1154).over == "1,154 users"


# The record ------------------------------------------------------------------------------------


def test_the_record_is_of_the_catalogue(small):
    lines = run_until("which", "CATALOGUE")["CATALOGUE"]
    assert {*FOUND["ways"]} == {*lines}
    for name, held in FOUND["ways"].items():
        assert [float(s) for s in held["tuning"]] == pytest.approx([*lines[name].grid])
        assert all(len(c["runs"]) == 5 for c in held["columns"].values()), name
        known = [q for q in held["tuning"].values() if q is not None]
        assert held["tuning"][f"{held['setting']:g}"] == max(known)


def test_the_best_of_both_kinds_are_those_of_validation(small):
    """`versus` computed anew: by the tuning tables, and Student's interval over seeds as the least that it can be."""
    lines = run_until("which", "CATALOGUE")["CATALOGUE"]
    best = {
        kind: max(
            (w for w in FOUND["ways"] if FAMILIES[lines[w].family] == kind),
            key=lambda w: max(q for q in FOUND["ways"][w]["tuning"].values() if q is not None),
        )
        for kind in ("meta", "transfer")
    }
    versus = RECORD["versus"]
    assert (versus["ours"], versus["baseline"]) == (best["meta"], best["transfer"])
    runs = [
        np.array(FOUND["ways"][best[k]]["columns"]["1 label"]["runs"]) for k in ("meta", "transfer")
    ]
    d = runs[0] - runs[1]
    assert versus["mean"] == pytest.approx(d.mean())
    over_seeds = student.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
    assert versus["mean"] - versus["low"] >= over_seeds - 1e-9


def test_what_practised_is_above_training_from_scratch():
    mean = {w: np.mean(h["columns"]["1 label"]["runs"]) for w, h in FOUND["ways"].items()}
    for name in ("MAML", "ProtoNet", "pre-training + class means"):
        assert mean[name] > mean["from scratch"] + 0.03, name


def test_the_page_names_its_edges():
    text = (BOOK / "which.ipynb").read_text("utf8")
    assert "which-edges" in text
    assert any(held["edge"] for held in FOUND["ways"].values())


def test_costs_are_of_every_trained_line():
    held = RECORD["details"]["costs"]
    assert {*held} == {*FOUND["ways"]} - {"from scratch"}
    assert all(s > 0 and b > 1e5 for s, b in held.values())
    assert held["FOMAML"][1] <= held["MAML"][1]


def test_the_solution_about_maml_is_of_the_record(small):
    """Exercise `check`: MAML's three differences, computed anew from the runs."""
    runs = {w: np.array(h["columns"]["1 label"]["runs"]) for w, h in FOUND["ways"].items()}
    contest = Contest("c", FOUND["ways"], FOUND, True, {}, "accuracy", True, "x (real)")
    best = RECORD["versus"]["baseline"]
    seconds = {w: c[0] for w, c in RECORD["details"]["costs"].items()}
    means = "pre-training + class means"
    answers = worth(contest, "MAML", "from scratch", means, best, seconds)
    rivals = [*dict.fromkeys(("from scratch", means, best))]
    for answer, rival in zip(answers, rivals, strict=False):
        d = runs["MAML"] - runs[rival]
        assert answer.number.startswith(f"{100 * d.mean():+.1f}".replace("-", "−"))
        half = student.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
        assert not answer.yes or d.mean() > half
    assert answers[0].yes and not answers[1].yes


def test_another_pages_contest_gives_its_own_numbers():
    held = json.loads((results.FOLDER / "meta_or_transfer.json").read_text("utf8"))["details"]
    ways = held["1280 classes"]["ways"]
    a, b = (
        np.array(ways[w]["columns"]["new classes"]["runs"])
        for w in ("ProtoNet", "pre-training + class means")
    )
    gap = of_page("meta_or_transfer", "1280 classes").minus(
        "ProtoNet", "pre-training + class means"
    )
    assert gap.mean == pytest.approx((a - b).mean())


def test_no_costs_are_measured_by_a_reader(small, drawn):
    assert costs("which", bench_of(drawn, 4), {}, made_up(meta=[0.5, 0.6])) == {}
