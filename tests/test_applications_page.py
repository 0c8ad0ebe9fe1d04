"""The page on applications: its counts and differences again from the records' files, and the words that count them."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
from machine import ROOT
from pages import BOOK

FIELDS = [
    "images",
    "pretrained",
    "digits",
    "detection",
    "intents",
    "sentiment",
    "films",
    "genes",
    "heart",
]
COUNTS = {9: "Nine"}  # as the README, which computes nothing, writes them
CELLS = json.loads((BOOK / "applications.ipynb").read_text("utf8"))["cells"]
TEXT = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")


def held(page: str) -> dict[str, Any]:
    return json.loads((ROOT / f"mtlib/book/results/{page}.json").read_text("utf8"))


def column(contest: dict[str, Any], way: str, name: str) -> np.ndarray:
    """The mean of each group."""
    return np.array(contest["ways"][way]["columns"][name]["groups"])


def side(page: str) -> int:
    """1 where meta-learning is ahead of transfer, −1 where it is behind, 0 where the interval holds zero."""
    if page != "digits":
        v = held(page)["versus"]
        return int(v["low"] > 0) - int(v["high"] < 0)
    scanners, signs = held(page)["details"]["scanners"], set()
    (name, *_) = scanners["sizes"]
    for n in (10, 50):
        gap = column(scanners, f"ProtoNet, {n} labels", name) - column(
            scanners, f"joint, {n} labels", name
        )
        half = 2.571 * gap.std(ddof=1) / np.sqrt(len(gap))  # Student's quantile of five
        assert len(gap) == 6
        signs.add(int(gap.mean() > half) - int(gap.mean() < -half))
    (sign,) = signs
    return sign


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    """What the page's own code puts into its prose; figures are left out."""
    space: dict[str, Any] = {"__name__": "applications"}
    found = dict[str, str]()
    for cell in CELLS:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in code:
            continue
        head = code.partition("with figure(")[0]
        exec(compile(head, "applications.ipynb", "exec"), space)
        space["glue"] = lambda name, value, form="": found.update({name: format(value, form)})
    return found


def test_the_counts_are_those_of_the_records(page):
    signs = {f: side(f) for f in FIELDS}
    assert {f for f, s in signs.items() if s == 1} == {"images", "films", "genes"}
    assert {f for f, s in signs.items() if s == -1} == {"digits"}
    for name, wanted in {"ahead": 1, "behind": -1, "open": 0}.items():
        assert page[f"applications-{name}"] == str([*signs.values()].count(wanted))
    assert page["applications-fields"] == str(len(FIELDS)) and len(FIELDS) >= 8


def test_every_field_has_its_difference_at_equal_labels():
    assert [f for f in FIELDS if held(f).get("versus") is None] == ["digits"]
    for field in set(FIELDS) - {"digits"}:
        result = held(field)
        v, kinds = result["versus"], {e["method"]: e["kind"] for e in result["entries"]}
        assert v["unit"] and v["n"] > 1 and v["low"] <= v["mean"] <= v["high"]
        assert (kinds[v["ours"]], kinds[v["baseline"]]) == ("meta", "transfer"), field


def test_photographs_meet_the_best_transfer_that_validation_chose(page):
    """The rival of the practised head is the whitening, chosen on validation classes, and not SimpleShot."""
    result = held("pretrained")
    ways = result["details"]["groceries, 1 label"]["ways"]
    kinds = {e["method"]: e["kind"] for e in result["entries"]}
    best = {
        kind: max(
            (w for w in ways if kinds[w] == kind),
            key=lambda w: max(q for q in ways[w]["tuning"].values() if q is not None),
        )
        for kind in ("meta", "transfer")
    }
    v = result["versus"]
    assert (v["ours"], v["baseline"]) == (best["meta"], best["transfer"])
    runs = [np.mean(ways[w]["columns"]["1 label"]["runs"]) for w in best.values()]
    assert page["applications-photographs"].startswith(f"{100 * (runs[0] - runs[1]):+.1f} ± ")


def test_the_rows_on_tables_are_those_of_the_record(page):
    """Log-loss against logistic regression, paired over tables, with Student's interval; lower is better."""
    tables = held("in_context_tables")["details"]["tables"]
    for key, way, rows in (
        ("tables-10", "in context", 10),
        ("tables-boosting", "boosting", 10),
        ("tables-100", "in context", 100),
        ("tables-boosting-100", "boosting", 100),
    ):
        name = f"log-loss, {rows} rows"
        gap = column(tables, way, name) - column(tables, "logistic regression", name)
        told, half = page[f"applications-{key}"].replace("−", "-").split(" ± ")
        assert float(told) == pytest.approx(gap.mean(), abs=6e-4)
        student = 2.262 * gap.std(ddof=1) / np.sqrt(len(gap))
        assert len(gap) == 10 and float(half) == pytest.approx(student, rel=0.1)
        assert float(told) + float(half) > 0  # not ahead of the regression


def test_the_other_differences_are_those_of_the_records(page):
    """Ends of an interval halve its width; the rest are means over seeds."""
    for key, (name, by) in {
        "characters": ("images", 100),
        "intents": ("intents", 100),
        "films": ("films", 1),
        "genes": ("genes", 1),
    }.items():
        v = held(name)["versus"]
        mean, half = page[f"applications-{key}"].replace("−", "-").split(" (")[0].split(" ± ")
        near = 0.06 if by == 100 else 6e-4
        assert float(mean) == pytest.approx(by * v["mean"], abs=near)
        assert float(half) == pytest.approx(by * (v["high"] - v["low"]) / 2, abs=near)
    for key, contest, name, ways in (
        ("whitening", "groceries, 1 label", "1 label", ("whitened class means", "SimpleShot")),
        ("probe-photographs", "groceries, 5 labels", "5 labels", ("ProtoNet head", "linear probe")),
    ):
        groceries = held("pretrained")["details"][contest]["ways"]
        a, b = (np.mean(groceries[w]["columns"][name]["runs"]) for w in ways)
        assert page[f"applications-{key}"].startswith(f"{100 * (a - b):+.1f} ± ")


def test_moving_the_network_on_the_labels_of_a_task_gained_nothing_that_shows():
    """The row for a pretrained model says so, for one label and for five."""
    for n in ("1 label", "5 labels"):
        moved = held("pretrained")["details"][f"moved, {n}"]
        for way in ("fine-tuning", "LoRA"):
            gap = column(moved, way, n) - column(moved, "linear probe", n)
            half = 2.07 * gap.std(ddof=1) / np.sqrt(len(gap))
            assert abs(gap.mean()) <= half, (way, n)


def test_the_advice_begins_with_the_pretrained_model():
    table = TEXT.partition("## What to run first")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "| shape of your data"
    assert rows[1].startswith("| **Is there a pretrained model? Yes**")
    assert rows[2].startswith("| **Is there a pretrained model? No**")
    assert "| small tables of numbers, each a task of its own" in rows
    chapters = set(re.findall(r"\{doc\}`(\w+)`", table))
    assert {*FIELDS, "in_context"} <= chapters


def test_other_pages_count_the_fields_by_what_this_one_computes():
    """No page writes the number of fields as a word; the README, which computes nothing, has the right one."""
    assert f"| Applications | {COUNTS[len(FIELDS)]} real problems" in (
        ROOT / "README.md"
    ).read_text("utf8")
    said = re.compile(r"(?i)\b(seven|eight|nine|ten) (such |real )*(fields|problems|cases)\b")
    for path in chain(BOOK.glob("*.md"), BOOK.glob("*.ipynb")):
        assert not said.search(path.read_text("utf8")), path.name
    faq = (BOOK / "faq.md").read_text("utf8")
    for name in ("fields", "open"):
        assert f"{{glue:text}}`applications.ipynb::applications-{name}:s`" in faq
