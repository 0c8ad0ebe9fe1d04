"""The questions at the ends of pages and on the quiz page, and the directive that makes forms of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from machine import ROOT

BOOK = ROOT / "book"
caption = ""
PARTS: dict[str, list[dict[str, Any]]] = {}
for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]:
    caption = part.get("caption") or caption  # a part's overview stands before its numbered pages
    PARTS.setdefault(caption, []).extend(
        c for c in part["chapters"] if not Path(c["file"]).name.startswith("part_")
    )
ASKED = [
    *(
        Path(chapter["file"]).name
        for part in ("Foundations", "Meta-learning in depth", "Transfer in depth")
        for chapter in PARTS[part]
    ),
    "applications",  # the pages of data sets have exercises instead
    "own",
]
QUIZ = (BOOK / "quiz.md").read_text("utf8")

FENCE = re.compile(r"(?ms)^:::\{selftest\} (\S+)\n(.+?)^:::$")
OPTION = re.compile(r"(?m)^- \[([ x])\] (.+)\n((?:  .*\n|\n(?=  ))*)")


class Asked(NamedTuple):
    """One question as it is written."""

    label: str
    text: str
    options: list[tuple[bool, str, str]]  # right?, the option, its reason

    @property
    def all(self) -> str:
        return "\n".join([self.text, *(t for o in self.options for t in o[1:])])


def written(text: str) -> list[Asked]:
    """The questions of a page's Markdown, read without the directive."""
    return [
        Asked(
            label,
            body.split("\n- ")[0].strip(),
            [
                (mark == "x", option, reason.strip().removeprefix("- "))
                for mark, option, reason in OPTION.findall(body)
            ],
        )
        for label, body in FENCE.findall(text)
    ]


def prose(page: str) -> list[str]:
    """The Markdown cells of a page."""
    cells = json.loads((BOOK / f"{page}.ipynb").read_text("utf8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


ON_PAGES = {page: written("\n".join(prose(page))) for page in ASKED}
OWN = written(QUIZ)
EVERY = [*((page, q) for page, all_ in ON_PAGES.items() for q in all_), *(("quiz", q) for q in OWN)]
TAKEN = [
    line for block in re.findall(r"(?s)```\{selftests\}\n(.+?)```", QUIZ) for line in block.split()
]
each = pytest.mark.parametrize("page, question", EVERY, ids=[q.label for _, q in EVERY])


# What is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ASKED)
def test_a_page_ends_with_three_to_five_questions(page):
    cells = json.loads((BOOK / f"{page}.ipynb").read_text("utf8"))["cells"]
    last = "".join(cells[-1]["source"])
    assert cells[-1]["cell_type"] == "markdown" and last.startswith("## Test yourself\n")
    assert written(last) == ON_PAGES[page]
    assert 3 <= len(ON_PAGES[page]) <= 5


def test_no_question_is_lost_by_the_way_it_is_written():
    """A fence that the reader of this file would miss."""
    text = "\n".join([QUIZ, *(t for page in ASKED for t in prose(page))])
    assert len(re.findall(r"\{selftest\}", text)) == len(EVERY)


@each
def test_every_option_has_its_reason(page, question):
    assert 3 <= len(question.options) <= 4
    assert sum(right for right, *_ in question.options) == 1
    assert question.text.endswith("?")
    for _, option, reason in question.options:
        assert option.endswith(".") and len(reason) > 20
    assert len({option for _, option, _ in question.options}) == len(question.options)


def test_labels_are_unique_and_name_their_page():
    assert len({q.label for _, q in EVERY}) == len(EVERY)
    for page, q in EVERY:
        assert q.label.startswith(page.replace("_", "-") + "-"), q.label


def test_the_right_answer_has_no_place_and_no_length_of_its_own():
    """Neither "always the second" nor "always the longest" passes the quiz."""
    places = Counter([right for right, *_ in q.options].index(True) for _, q in EVERY)
    assert min(places[i] for i in range(3)) > len(EVERY) / 6
    assert max(places.values()) < len(EVERY) / 2
    longest = sum(max(q.options, key=lambda o: len(o[1]))[0] for _, q in EVERY)
    assert longest < 0.6 * len(EVERY)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower().replace(" ", "-"))


@each
def test_links_lead_somewhere(page, question):
    home = QUIZ if page == "quiz" else "\n".join(prose(page))
    anchors = {slug(h) for h in re.findall(r"(?m)^#{1,3} (.+)$", home)}
    assert set(re.findall(r"\]\(#(.+?)\)", question.all)) <= anchors
    assert not re.search(r"\]\((?!#)", question.all), "pages are linked by {doc}"
    for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`", question.all):
        assert list(BOOK.glob(f"{name}.*")), name
    for label in re.findall(r"\{ref\}`([\w-]+)`", question.all):
        assert re.search(rf":label: {label}\b", home), label


@each
def test_what_is_chosen_has_no_links_and_no_number_was_typed(page, question):
    """A link inside of a button's label would be pressed by mistake; numbers are the page's, by `glue`."""
    for text in (question.text, *(option for _, option, _ in question.options)):
        assert not re.search(r"\]\(|\{(?:doc|ref|cite|numref|eq)\}", text) or page == "quiz"
    bare = re.sub(
        r"\{[\w:]+\}`[^`]*`|\$[^$]*\$|`[^`]*`|\[[^\]]*\]\([^)]*\)|\b95 %", "", question.all
    )
    assert not re.search(r"(?<![\w-])\d", bare), bare


def asked(label: str) -> str:
    return next(q.all for _, q in EVERY if q.label == label)


def test_the_quiz_draws_from_every_part():
    """And what it takes does not speak of "this page", which is another there."""
    known = {q.label: page for page, all_ in ON_PAGES.items() for q in all_}
    assert not set(TAKEN) - set(known) and len(TAKEN) == len(set(TAKEN))
    assert 20 <= len(TAKEN) + len(OWN) <= 25
    assert not [label for label in TAKEN if re.search(r"\b[Tt]his page\b", asked(label))]
    assert len(TAKEN) + len(OWN) == 25 and "Twenty-five questions" in QUIZ
    for part in ("Foundations", "Meta-learning in depth", "Transfer in depth"):
        pages = {Path(c["file"]).name for c in PARTS[part]}
        assert len({known[label] for label in TAKEN} & pages) >= 4
    assert "own" in re.findall(r"\{doc\}`(\w+)`", "".join(q.all for q in OWN))
    assert "{selftest-score}" in QUIZ


def test_this_reader_reads():
    found = written(
        ":::{selftest} a-b\nWhich?\n\n- [ ] One.\n  - Why one.\n- [x] Two.\n  - Why two.\n\n    More.\n:::\n"
    )
    assert found == [
        Asked(
            "a-b", "Which?", [(False, "One.", "Why one."), (True, "Two.", "Why two.\n\n    More.")]
        )
    ]
    assert slug("What's `a` worth?") == "whats-a-worth"


# What becomes of it -----------------------------------------------------------------------------

CONF = f"""
import sys
sys.path.insert(0, {str(BOOK / "_ext")!r})
extensions = ["myst_parser", "selftest"]
myst_enable_extensions = ["tasklist", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_static_path = [{str(BOOK / "_static")!r}]
html_theme = "basic"
"""
ONE = """# One

## A section

:::{selftest} one-a
What does $x$ leave *out*?

- [ ] The `inner` steps & a < b.
  - Read [a section](#a-section).
- [x] The rest.
  - Two paragraphs.

    And {doc}`two`.
:::
"""
SEVERAL = """
:::{selftest} two-several
Which of them?

- [x] Red.
  - Yes.
- [ ] Green.
  - Not green.
- [x] Blue.
  - Blue, too.
:::
"""
TWO = f"# Two\n\n```{{selftests}}\none-a\n```\n{SEVERAL}\n```{{selftest-score}}\n```\n"
INDEX = "# Index\n\n```{toctree}\none\ntwo\n```\n"


def built(folder: Path, pages: dict[str, str], builder: str = "html", more: str = "") -> str:
    """Warnings of Sphinx, which has built these pages in `folder / builder`."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "conf.py").write_text(CONF + more, "utf8")
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text, "utf8")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", builder, source, folder / builder]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


class Elements(HTMLParser):
    """The elements of a page, each a dict: its tag, its attributes, and `in`, the tags around it."""

    EMPTY = ("input", "link", "meta", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append({"tag": tag, "in": tuple(self.open), **dict(attrs)})
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def all(self, tag: str, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in self.found if e["tag"] == tag and kind in (e.get("class") or "")]


def form(page: str, number: int = 0) -> str:
    return re.findall(r'(?s)<form class="selftest".+?</form>', page)[number]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftest")
    assert built(folder, {"index": INDEX, "one": ONE, "two": TWO}) == ""
    return folder


def test_a_question_is_a_form_that_a_keyboard_can_use(site):
    found = Elements(form((site / "html" / "one.html").read_text("utf8")))
    (legend,), inputs, labels = found.all("legend"), found.all("input"), found.all("label")
    assert legend["in"] == ("form", "fieldset")
    assert [i["type"] for i in inputs] == ["radio"] * 2 and len({i["name"] for i in inputs}) == 1
    assert [label["for"] for label in labels] == [i["id"] for i in inputs]
    assert not [e for e in found.found if e["tag"] == "p" and set(e["in"]) & {"legend", "label"}]
    assert found.all("div", "selftest-verdict")[0]["role"] == "status"


def test_without_the_script_the_answers_are_left(site):
    """No button that does nothing, and none that Enter could press; every reason in `details`."""
    text = form((site / "html" / "one.html").read_text("utf8"))
    found = Elements(text)
    (button,), items = found.all("button"), found.all("li")
    assert "hidden" in button and "disabled" in button
    assert [i["class"] for i in items] == ["selftest-wrong", "selftest-right"]
    assert all(i["in"] == ("form", "details", "ol") for i in items)
    assert "checked" not in text and "<summary>" in text
    assert 'href="#a-section"' in text and 'href="two.html"' in text
    assert "&amp; a &lt; b" in text and r"\(x\)" in text and "<em>out</em>" in text


def test_several_right_answers_are_boxes(site):
    text = form((site / "html" / "two.html").read_text("utf8"), 1)
    assert [i["type"] for i in Elements(text).all("input")] == ["checkbox"] * 3
    assert "More than one is right." in text


def test_a_question_is_shown_again_on_another_page(site):
    here, there = ((site / "html" / f"{p}.html").read_text("utf8") for p in ("one", "two"))
    again = form(there)
    assert 'href="one.html#a-section"' in again and 'href="two.html"' in again
    assert '<p class="selftest-from">From: <a href="one.html">One</a></p>' in again
    without = re.sub(r'(?m)^<p class="selftest-from">.+\n', "", again).replace("one.html#", "#")
    assert without == form(here)


def test_script_and_styles_are_on_pages_with_questions_alone(site):
    for page, asks in {"index": False, "one": True, "two": True}.items():
        text = (site / "html" / f"{page}.html").read_text("utf8")
        assert ("selftest.js" in text) == ("selftest.css" in text) == asks


def test_a_changed_question_changes_the_page_that_shows_it(site):
    assert built(site, {"one": ONE.replace("The rest.", "What remains.")}) == ""
    assert "What remains." in (site / "html" / "two.html").read_text("utf8")


def test_all_of_it_can_be_translated(tmp_path):
    assert built(tmp_path, {"index": INDEX, "one": ONE, "two": TWO}, "gettext") == ""
    said = re.findall(r'(?m)^msgid "(.+)"$', (tmp_path / "gettext" / "one.pot").read_text("utf8"))
    assert said == [
        "One",
        "A section",
        "What does $x$ leave *out*?",
        "The `inner` steps & a < b.",
        "The rest.",
        "Read [a section](#a-section).",
        "Two paragraphs.",
        "And {doc}`two`.",
    ]
    words = 'selftest_words = {"right": "对。", "check": "查"}'
    assert built(tmp_path, {}, more=words) == ""
    text = form((tmp_path / "html" / "one.html").read_text("utf8"))
    assert "对。" in text and ">查</button>" in text and "No." in text


def test_as_plain_text_the_answers_follow(tmp_path):
    assert built(tmp_path, {"index": INDEX, "one": ONE, "two": TWO}, "text") == ""
    for page in ("one", "two"):
        text = (tmp_path / "text" / f"{page}.txt").read_text("utf8")
        where = [
            text.index(part) for part in ("leave *out*?", "The rest.", "**No.**", "**Right.**")
        ]
        assert where == sorted(where)


GOOD = "Which?\n\n- [ ] One.\n  - Why one.\n- [x] Two.\n  - Why two.\n"
BAD = {
    "no-options": ("Which?\n", "expected one paragraph, then a list of options; got paragraph"),
    "nothing": ("", "got nothing"),
    "two-paragraphs": (f"Hear.\n\n{GOOD}", "got paragraph, paragraph, bullet_list"),
    "one-option": ("Which?\n\n- [x] One.\n  - Why.\n", "expected 2 to 6 options; got 1"),
    "none-right": (GOOD.replace("[x]", "[ ]"), "expected at least one option marked [x]"),
    "all-right": (GOOD.replace("[ ]", "[x]"), "expected at least one option marked [ ]"),
    "no-mark": (
        GOOD.replace("[ ] ", ""),
        "expected an option to begin with [ ] or [x]; got 'One.'",
    ),
    "no-reason": (GOOD.replace("  - Why two.\n", ""), "its reason, for option B; got paragraph"),
    "two-reasons": (GOOD + "  - And why.\n", "expected one paragraph and below it one item"),
    "empty-reason": (
        GOOD.replace("Why one.", "![](a.png)"),
        "expected words in option A and in its reason",
    ),
}


def test_bad_input_says_what_was_expected(tmp_path):
    pages = {k: f"# {k}\n\n:::{{selftest}} bad-{k}\n{body}:::\n" for k, (body, _) in BAD.items()}
    pages["bad-label"] = f"# Label\n\n:::{{selftest}} BadLabel\n{GOOD}:::\n"
    pages["first"] = f"# First\n\n:::{{selftest}} the-same\n{GOOD}:::\n"
    pages["second"] = pages["first"]
    pages["unknown"] = "# Unknown\n\n```{selftests}\nnobody-asked\n```\n"
    pages["empty"] = "# Empty\n\n```{selftests}\n```\n"
    pages["index"] = "# Index\n\n```{toctree}\n" + "\n".join(pages) + "\n```\n"
    lines = built(tmp_path, pages).splitlines()

    def told(page: str) -> str:
        return "\n".join(line for line in lines if f"/{page}.md:" in line)

    for page, (_, expected) in BAD.items():
        assert expected in told(page) and f"'bad-{page}'" in told(page), page
    assert "expected a label such as page-what-it-asks" in told("bad-label")
    assert "expected a label of its own; 'the-same' stands on first, too" in told("second")
    assert "no question has the label 'nobody-asked'" in told("unknown")
    assert "expected labels, one a line, each once" in told("empty")
    assert not told("first")
