"""The page on challenges: its headline numbers again from the records' files, and what its solutions state."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import ROOT
from pages import at_small_scale, run_until

from mtlib.data.planted import planted
from mtlib.evaluate import evaluate
from mtlib.tasks import episodes

FILES = sorted((ROOT / "mtlib" / "book" / "results").glob("*.json"))


def held(page: Path) -> dict[str, Any]:
    return json.loads(page.read_text("utf8"))


def mean(contest: dict[str, Any], way: str, column: str) -> float:
    return float(np.mean(contest["ways"][way]["columns"][column]["runs"]))


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("challenges", "level")


def test_seeds_decide_more_than_cases_in_a_third_of_the_rows(page):
    count = dict[str, list[bool]]()
    for file in FILES:
        found = held(file)
        if found["metric"] == "accuracy":
            trained = [e for e in found["entries"] if e["seeds"]]
            count[file.stem] = [e["seeds"] > e["cases"] for e in trained]
    every = [wider for row in count.values() for wider in row]
    assert (sum(every), len(every)) == (len(page["wider"]), len(page["rows"]))
    assert np.mean(every) > 1 / 3
    often = {name for name, row in count.items() if row and np.mean(row) > 0.5}
    assert often == {*page["often"]}
    assert 2 * len(often & {"alignment", "choosing", "digits", "several"}) > len(often)


def test_the_middle_of_a_grid_costs_points(page):
    costs = []
    for file in FILES:
        found = held(file)
        if found["metric"] != "accuracy":
            continue
        for contest in (c for c in found["details"].values() if "ways" in c):
            for way in contest["ways"].values():
                q = np.array([v for v in (way["tuning"] or {}).values() if v is not None])
                if len(q) >= 4 and (q >= 0).all():
                    costs.append(100 * (q.max() - np.median(q)))
    assert len(costs) == len(page["every"])
    assert float(np.median(costs)) == pytest.approx(page["middle"])
    assert 100 * page["level"] < page["middle"]


def test_naming_and_practising_are_level_until_examples_run_out(page):
    found = held(ROOT / "mtlib/book/results/meta_or_transfer.json")["details"]
    gaps = {
        n: mean(c, "ProtoNet", next(iter(c["sizes"])))
        - mean(c, "pre-training + class means", next(iter(c["sizes"])))
        for n, c in ((n, found[name]) for n, name in page["SIZES"].items())
    }
    assert max(abs(gaps[n]) for n in (8, 16, 64, 256)) == pytest.approx(page["level"])
    assert page["level"] < 0.01 < 0.1 < gaps[1280]
    turned = {
        a: [mean(found["classes"], w, c) for w in ("from scratch", "ProtoNet")]
        for a, c in page["ANGLES"].items()
    }
    assert turned[45][0] < turned[45][1] and turned[60][0] > turned[60][1]


def test_the_fewer_the_labels_the_more_the_encoder_is_worth(page):
    contest = held(ROOT / "mtlib/book/results/intents.json")["details"]["domains"]
    scratch, frozen, _ = page["READ"].values()
    gaps = [
        mean(contest, frozen, f"{k} labels") - mean(contest, scratch, f"{k} labels")
        for k in (1, 2, 5, 10, 20, 50)
    ]
    assert all(a > b > 0 for a, b in pairwise(gaps))
    assert mean(contest, frozen, "1 labels") > mean(contest, scratch, "5 labels")


@pytest.mark.parametrize(("hidden", "classes", "seen"), [(1, 3, True), (10, 16, False)])
def test_the_solution_on_other_numbers_of_directions(page, hidden, classes, seen):
    """Within five points of what 64 classes of the same budget give, or not."""
    page["STEPS"] = 120
    new = planted(200, 60, hidden, 30 - hidden, seed=1)
    exam = episodes(new, 5, 1, 15, tasks=50, seed=9)
    few, many = (
        np.mean([evaluate(*page["named"](n, hidden, s), exam, 100).mean for s in range(2)])
        for n in (classes, 64)
    )
    assert (many - few < 0.05) == seen
