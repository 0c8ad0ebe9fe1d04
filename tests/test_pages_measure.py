"""Pages within the limits of `tools/pages.py`, and its counts on small notebooks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine import ROOT, tool
from pages import NOTEBOOKS

pages = tool("pages")


@pytest.mark.parametrize("page", pages.REWRITTEN)
def test_a_page_is_within_the_limits(page):
    assert pages.beyond(pages.measure(ROOT / "book" / f"{page}.ipynb")) == []


def test_pages_not_yet_rewritten_exist():
    """`book/ruff.toml` names each once, in order, by a file's name alone: `ruff` and the limits leave out the same pages."""
    listed = pages.STYLE["extend-exclude"]
    assert listed == sorted(set(listed))
    assert not {*listed} - {path.name for path in NOTEBOOKS}
    assert {*pages.PENDING, *pages.REWRITTEN} == {path.stem for path in NOTEBOOKS}
    assert not {*pages.PENDING} & {*pages.REWRITTEN}


def test_each_page_gets_one_of_the_two_styles():
    """`make lint` calls ruff once without a list, once with that of `--pending`."""

    def ruff(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "ruff", "check", "--show-files", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        found = [Path(line) for line in done.stdout.splitlines()]
        return sorted(path.stem for path in found if path.suffix == ".ipynb")

    command = [sys.executable, "tools/pages.py", "--pending"]
    pending = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ruff() == [*pages.REWRITTEN]
    if pending:
        assert ruff("--config", "pyproject.toml", *pending.split()) == sorted(pages.PENDING)


# The counts ------------------------------------------------------------------------------------

INSTALL = ("%pip install -q 'mtlib-book[pages] @ git+https://example.org/book@main'", "remove-cell")


@pytest.fixture
def found(tmp_path):
    """The numbers of a notebook of these cells: prose as a string, code as a pair with its tag."""

    def measured(*cells: str | tuple[str, str], name: str = "page") -> Any:
        path = tmp_path / f"{name}.ipynb"
        path.write_text(json.dumps({"cells": [cell(c) for c in cells]}), "utf8")
        return pages.measure(path)

    return measured


def cell(content: str | tuple[str, str]) -> dict[str, Any]:
    if isinstance(content, str):
        return {"cell_type": "markdown", "metadata": {}, "source": content}
    source, tag = content
    metadata = {"tags": [tag]} if tag else {}
    return {"cell_type": "code", "metadata": metadata, "source": source.splitlines(keepends=True)}


def test_statements_count_at_any_depth_folded_or_not(found):
    loop = "for i in range(3):\n    a = 1; b = 2\n    if a:\n        a = (1,\n            2)\n"
    assert found((loop, "")).statements == 5
    for tag in ("hide-input", "hide-cell", "hide-output", "remove-input", "remove-cell"):
        assert found(INSTALL, (loop, tag)).statements == 5
    assert found(("%matplotlib inline\nif a:\n    !ls\nx = 7 \\\n    % 3\n", "")).statements == 4


def test_lines_in_sight_and_wide_ones(found):
    wide = "x = 1  # " + "." * (pages.WIDTH - 8)
    assert pages.WIDTH == 76 and len(wide) == 77
    page = found((f"{wide}\n\n{wide[:-1]}\n", ""), (wide, "hide-input"), (wide, "remove-input"))
    assert (page.in_sight, page.wide) == (2, 1)


def test_functions_that_stand_in_no_other(found):
    code = "def f():\n    def g(): pass\n\nclass A:\n    def m(self): pass\n"
    assert found((code, "hide-cell")).functions == 1
    branches = "if a:\n    def f(x): pass\nelse:\n    async def f(x): pass\n"
    assert found((branches, ""), (branches, "remove-input")).functions == 4
    assert found(("y = sorted(x, key=lambda v: -v)", "")).functions == 0


def test_words_for_a_line_of_code_in_sight(found):
    code = ("a = 1\nb = 2\n", "")
    assert found("Four words of prose.", code).words == 2
    assert found("# A heading\n\n| a | table |\n|---|---|\n| of | words |", code).words == 0
    assert (
        found("$$\na = b\n$$ (eq-a)\n\n$x$ and `code` and ``a`b`` {cite}`someone`", code).words == 1
    )
    assert found("$$x$$\n\nTwo words\n\n$$y$$", code).words == 1
    assert found("A [link's text](https://example.org) {term}`word <Word>`", code).words == 2
    assert (
        found("```python\nno prose here\n```\n:::{figure} a.svg\nno caption\n:::", code).words == 0
    )
    solution = "````{solution} ex-a\n:class: dropdown\n\nTwo words\n```python\ncode = 1\n```\nand two\n````"
    assert found(solution, code).words == 2
    assert (
        found(
            ":::{prf:theorem} Title\n:label: thm\n\nIt holds\n:::\n(label)=\nfor all.", code
        ).words
        == 2
    )


def test_numbers_in_one_paragraph_or_item(found):
    def most(text):
        return found(text).numbers

    assert most("One paragraph: 1, 2.5 and −3 %.\n\nAnother: 4, 1,000.") == 3
    assert most("The error is {glue:text}`a-1`, then {glue:text}`a-2`.") == 2
    assert most("{glue:text}`a` ± {glue:text}`b` and 0.52 ± 0.03, 3·10⁻⁴") == 3
    assert most("5-way 1-shot tasks of CIFAR-100 in $10 + 2$, `x[3]`, R2-D2, {numref}`fig-4`") == 0
    assert most("1. with 7\n2. with 8\n   and 9\n   - nested 10\n     and 11, 12\n\n* 13") == 3
    assert most("| 1 | 2 | 3 |\n\n```{list-table}\n* - 1\n  - 2\n```\n## 4 steps, 5") == 0
    assert most("```{exercise}\n:label: ex-1\n\nFrom 1 to 2.\n```") == 2


def test_bars_in_a_row(found):
    fold, plain = ("a = 1", "hide-input"), ("a = 1", "")
    assert found(fold, plain, fold, "prose", fold).bars == 1
    assert found(fold, ("a = 1", "remove-cell"), ("a = 1", "hide-output"), plain, fold).bars == 2
    assert found(plain, "prose").bars == 0


def test_bookkeeping_in_sight(found):
    books = ("glue('a', 1)", "record(Result('a'))", "rows = [Entry(a) for a in b]")
    for code in books:
        assert found((code, "")).bookkeeping == 1
        assert found((code, "hide-input"), (code, "remove-input")).bookkeeping == 0
    judged = (
        "from mtlib.book.page import glue\nclaim('a', b)\nrecorded_claim('a', b)\nequal('a', b, c)"
    )
    assert found((f"{judged}\nevent.record()  # glue(1)\n", "")).bookkeeping == 0


def test_what_is_beyond_is_said(found):
    page = found(("\n".join(["a = 1"] * 161), ""))
    assert pages.beyond(page) == [
        "statements: 161, expected 0 to 160",
        "words: 0, expected 10 to inf",
    ]
    code = found(("\n".join(["a = 1"] * 161), "hide-input"), "ten words " * 5, name="code")
    assert pages.beyond(code) == []
