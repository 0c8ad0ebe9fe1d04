"""Figures that answer the hand: their numbers are the ones computed anew, and their words say the same without a script."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from mtlib.book import hand
from mtlib.book.contest import Contest
from mtlib.book.hand import End, Hand, Question, by_labels, inner_steps, nearest_case, path
from mtlib.book.results import recorded
from mtlib.core import Batch, Episode, load, parameters
from mtlib.nets import mlp
from mtlib.plots import BASELINE, META, TRANSFER

BOOK = Path(__file__).resolve().parent.parent / "book"
RATES, STEPS = (0.01, 0.05, 500.0), 3
NET = mlp(1, (8,), 1, seed=0)
WAYS = {
    "meta-learned": parameters(mlp(1, (8,), 1, seed=1)),
    "transferred": parameters(mlp(1, (8,), 1, seed=2)),
    "from scratch": parameters(NET),
}
GRID = torch.linspace(-5, 5, 11)[:, None]


def wave(x: torch.Tensor) -> Batch:
    return Batch(x, 2 * torch.sin(x - 0.5))


SUPPORT, QUERY = (torch.linspace(-4, 4, n)[:, None] for n in (6, 9))
EPISODE = Episode(wave(SUPPORT), wave(QUERY))


@pytest.fixture(scope="module")
def steps() -> Hand:
    return inner_steps(NET, mse_loss, WAYS, EPISODE, tuple(wave(GRID)), RATES, STEPS, (0.05, 1))


@pytest.fixture(scope="module")
def case() -> Hand:
    return nearest_case()


# Sliders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", RATES)
def test_the_curves_are_those_of_plain_sgd(steps, way, rate):
    """Trained anew by `torch.optim.SGD`, at each step: the curve on the grid, and the error on the query points."""
    net = load(mlp(1, (8,), 1), WAYS[way])
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    (held,) = (w for w in steps.data["ways"] if w["name"] == way)
    curves, errors = (held[key][RATES.index(rate)] for key in ("curves", "errors"))
    assert len(curves) == len(errors) == STEPS + 1
    for k in range(STEPS + 1):
        with torch.no_grad():
            curve = net(GRID).flatten().clamp(-999, 999).tolist()
            error = mse_loss(net(QUERY), wave(QUERY).y).item()
        for here, there in zip(curves[k], curve, strict=True):
            assert here is None if not math.isfinite(there) else abs(here - there) <= 0.0051
        assert errors[k] is None if not error <= 1e4 else errors[k] == pytest.approx(error, 1e-4)
        optimizer.zero_grad()
        mse_loss(net(SUPPORT), wave(SUPPORT).y).backward()
        optimizer.step()


def test_what_diverges_is_told_in_words(steps):
    assert any(e is None for w in steps.data["ways"] for e in w["errors"][2])
    assert "above 10,000" in steps.text and "above 10,000" in steps.plain
    assert steps.data["beyond"] == "above 10,000"


def test_the_sliders_begin_where_they_are_told(steps):
    assert [
        a["values"][i] for a, i in zip(steps.data["axes"], steps.data["start"], strict=True)
    ] == [
        "0.05",
        "1",
    ]
    assert [way["colour"] for way in steps.data["ways"]] == [META, TRANSFER, BASELINE]
    assert [way["family"] for way in steps.data["ways"]] == ["meta", "transfer", "baseline"]


def test_the_table_has_the_errors_of_the_sliders(steps):
    caption, heads, *rows = (line.split("; ") for line in steps.text.splitlines())
    assert heads == ["inner rate, steps", *WAYS] and "error" in caption[0]
    places = [(0, 0)] + [(i, k) for i in range(len(RATES)) for k in (1, STEPS)]
    names = ["any, 0 steps"]
    names += [f"{r:g}, {k} step{'s' * (k > 1)}" for r in RATES for k in (1, STEPS)]
    for row, name, (i, k) in zip(rows, names, places, strict=True):
        errors = [way["errors"][i][k] for way in steps.data["ways"]]
        told = ["above 10,000" if e is None else f"{e:.2f}" for e in errors]
        assert row == [name, *told]


# The matrix ------------------------------------------------------------------------------------


def made(means: dict[str, list[float]]) -> Contest:
    """A contest with these runs, the same in every task but for a little."""
    column = {
        name: {
            "columns": {"new": {"runs": runs, "groups": [sum(runs) / 3 + d for d in (-d0, 0, d0)]}},
            "setting": (),
            "edge": False,
            "tuning": {},
        }
        for name, runs in means.items()
        for d0 in (0.001,)
    }
    found = {"groups": "tasks", "sizes": {"new": [1.0] * 3}, "ways": column}
    ways = dict.fromkeys([*means, "MAML + probe"])
    return Contest("", ways, found, True, {}, "accuracy", True, "(real)")


ROWS, COLUMNS = ("untrained", "MAML"), ("means", "probe")


def test_the_best_cell_and_those_that_are_not_clearly_behind_it():
    contest = made(
        {
            "untrained + means": [0.30, 0.31, 0.32],
            "untrained + probe": [0.79, 0.80, 0.82],
            "MAML + means": [0.81, 0.79, 0.82],
        }
    )
    figure = by_labels({5: contest}, ROWS, COLUMNS)
    (level,) = figure.data["levels"]
    marks = [[c["is"] for c in row] for row in level["cells"]]
    assert marks == [["", "level"], ["best", ""]]
    assert [c["text"] for c in level["cells"][0]] == ["31.0", "80.3"]
    assert level["cells"][1][1] == {"text": "not run", "half": "", "is": "", "share": None}
    assert level["cells"][1][0]["share"] == pytest.approx(0.807, abs=5e-4)
    assert level["said"].startswith("The best cell, framed: MAML + means, 80.7 ± ")
    assert "dotted: untrained + probe" in level["said"]
    assert [r["colour"] for r in figure.data["rows"]] == [BASELINE, META]
    assert level["plain"] == level["said"].replace(", framed", "").replace(", dotted", "")
    assert level["plain"] in figure.text and level["plain"] in figure.plain
    assert "labels a class: 5" in figure.text and "MAML; 80.7 ±" in figure.text


def test_where_nothing_ran_the_matrix_says_so():
    nothing = made({"untrained + means": [0.3] * 3})
    nothing.found["ways"].clear()
    ways = {f"{r} + {c}": None for r in ROWS for c in COLUMNS}
    empty = Contest("", ways, nothing.found, True, {}, "accuracy", True, "(real)")
    (level,) = by_labels({1: empty}, ROWS, COLUMNS).data["levels"]
    assert (
        level["said"] == level["plain"] == "Not run." and level["cells"][0][0]["text"] == "not run"
    )


# The path --------------------------------------------------------------------------------------


def ends(node: Question | dict, taken: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict]]:
    if "page" in node:
        return [(taken, node)]
    return [e for answer in ("yes", "no") for e in ends(node[answer], (*taken, answer))]


def title(page: str) -> str:
    cells = json.loads((BOOK / f"{page}.ipynb").read_text("utf8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_each_path_ends_at_a_page_of_the_book_with_a_number(case):
    found = ends(case.data["root"])
    assert len(found) >= 8 and max(len(taken) for taken, _ in found) <= 6
    for _, end in found:
        assert title(end["page"]).startswith(f"# {end['title']}\n")
        assert re.search(r"[+−]\d+\.\d+ ± \d+\.\d+", end["text"])
        text = (BOOK / f"{end['page']}.ipynb").read_text("utf8")
        heads = re.findall(r'"#{2,3} (.+?)\\n"', text)
        anchors = {re.sub(r"[^\w ]", "", h).lower().replace(" ", "-") for h in heads}
        assert not end["section"] or end["section"] in anchors


def test_the_numbers_of_the_path_are_the_records(case):
    """Read anew from the files, as means over runs."""
    texts = {}
    for _, end in ends(case.data["root"]):
        texts.setdefault(end["page"], []).append(end["text"])

    def told(gap, by=100, digits=1):
        return f"{by * gap:+.{digits}f} ± ".replace("-", "−")

    def mean(page, contest, way, column):
        runs = recorded(page).details[contest]["ways"][way]["columns"][column]["runs"]
        return sum(runs) / len(runs)

    def gap(page, contest, one, other, column):
        return mean(page, contest, one, column) - mean(page, contest, other, column)

    for page in ("images", "pretrained"):
        assert told(recorded(page).versus.mean) in texts[page][0]
    for page in ("intents", "metric"):
        assert told(recorded(page).gain.mean) in texts[page][0]
    for page in ("genes", "films"):
        assert told(recorded(page).versus.mean, 1, 3) in texts[page][0]
    labelled, unlabelled = texts["digits"]
    assert (
        told(gap("digits", "scanners", "ProtoNet, 50 labels", "joint, 50 labels", "accuracy"))
        in labelled
    )
    assert told(gap("digits", "scanners", "SHOT", "source only", "accuracy")) in unlabelled
    naming = "pre-training + class means"
    turned, level, curves = texts["meta_or_transfer"]
    on = "meta_or_transfer"
    assert told(gap(on, "classes", "from scratch", naming, "turned by 60")) in turned
    assert told(gap(on, "16 classes", "ProtoNet", naming, "new classes")) in level
    own = "pre-training + own heads"
    assert told(gap(on, "24 curves", "ridge head", own, "new curves"), 1, 3) in curves


def test_counts_in_the_words_of_the_path_are_the_records(case):
    for page in ("images", "pretrained", "genes", "films"):
        assert f"over {recorded(page).versus.over}." in case.text
    assert recorded("images").versus.over == "20 alphabets"
    assert recorded("films").versus.over == "1,154 users"
    assert f"over {recorded('intents').gain.over}." in case.text


def test_what_a_path_advises_has_the_sign_of_its_number(case):
    for _, end in ends(case.data["root"]):
        sign, number, half = re.search(r"([+−])(\d+\.\d+) ± (\d+\.\d+)", end["text"]).groups()
        clear, ahead = float(number) > float(half), sign == "+"
        meta = "meta-learned ridge head minus" in end["text"] or "ProtoNet minus" in end["text"]
        if end["text"].startswith("Meta-learning"):
            assert clear and ahead
        elif end["text"].startswith("Transfer") and meta and "squared error" not in end["text"]:
            assert clear and not ahead
        elif end["text"].startswith("Either"):
            assert not clear


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.found.append(dict(attrs)["href"])


def test_the_list_says_what_the_path_says(case):
    """All of its ends, in order, with their links, also where no script runs."""
    links = Links()
    links.feed(case.plain)
    every = [end for _, end in ends(case.data["root"])]
    wanted = [f"{e['page']}.html" + (f"#{e['section']}" if e["section"] else "") for e in every]
    assert links.found == wanted
    assert all(end["text"] in case.text for end in every)
    assert case.text == repr(case)


# The HTML --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every(steps, case) -> dict[str, Hand]:
    contest = made({"untrained + means": [0.3, 0.31, 0.32], "MAML + means": [0.8, 0.81, 0.82]})
    contest.ways["untrained + probe"] = None
    return {"sliders": steps, "matrix": by_labels({1: contest}, ROWS, COLUMNS), "path": case}


@pytest.mark.parametrize("kind", hand.KINDS)
def test_a_figure_asks_nothing_of_another_place(every, kind):
    page = every[kind]._repr_html_()
    for address in re.findall(r"\w+://[^\s\"']+", page):
        assert address == "http://www.w3.org/2000/svg"  # a name, not a place
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import|eval|WebSocket)\s*\(|@import|url\(|\bsrc=", page
    )
    assert "innerHTML" not in page and "document.write" not in page and "$" not in every[kind].plain
    assert len(page.encode()) < 300_000


@pytest.mark.parametrize("kind", hand.KINDS)
def test_what_a_figure_holds_is_plain_json(every, kind):
    page = every[kind]._repr_html_()
    (held,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(held) == json.loads(json.dumps(every[kind].data))
    assert page == every[kind]._repr_html_()


def test_a_text_stays_a_text():
    """A name that is a tag ends no script, and is none in the list."""
    bad = '</script><img src=x onerror="alert(1)">&'
    figure = path(Question(bad, End(bad, "own", bad, '"><b>'), End("Go.", "own", "Own")))
    page = figure._repr_html_()
    assert "<img" not in page and "<b>" not in page and page.count("</script>") == 2
    (held,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(held)["root"]["text"] == bad


def test_two_figures_have_two_names(every):
    names = {re.search(r'data-hand="(\w+)"', f._repr_html_())[1] for f in every.values()}
    assert len(names) == 3
    assert not any(re.search(r'\sid="', f._repr_html_()) for f in every.values())
