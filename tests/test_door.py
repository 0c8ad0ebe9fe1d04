"""What leads into the book: each part has a page with a card for every chapter, and what these pages show exists."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from machine import ROOT

BOOK = ROOT / "book"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))["parts"]
PARTS = {  # page of a part -> its chapters; the list with numbers follows the one with the page
    head["chapters"][0]["file"]: [c["file"].removeprefix("book/") for c in part["chapters"]]
    for head, part in pairwise(TOC)
    if part.get("numbered")
}
CARD = re.compile(
    r":::\{grid-item-card\} (.+)\n:link: ([\w-]+)\n:link-type: (doc|ref)\n(?:.*\n)+?\n(.+)\n:::"
)
FIGURE = re.compile(r"```\{figure-of\} (\w+) ([\w-]+)\n(?::halves:\n\n)?(.+)\n```")


def cards(page: str) -> list[tuple[str, str, str, str]]:
    """(title, target, kind of target, sentence) of each card of a page."""
    return CARD.findall((ROOT / f"{page}.md").read_text("utf8"))


def test_every_part_has_a_page_of_its_own():
    assert len(PARTS) == 5 and all(re.fullmatch(r"book/part_\w+", page) for page in PARTS)
    assert sorted(PARTS) == sorted(f"book/{p.stem}" for p in BOOK.glob("part_*.md"))


@pytest.mark.parametrize("page", PARTS)
def test_a_part_has_a_card_for_each_chapter_in_order_with_a_question(page):
    found = cards(page)
    assert [target for _, target, _, _ in found] == PARTS[page]
    assert all(sentence.endswith("?") for *_, sentence in found)
    assert (ROOT / f"{page}.md").read_text("utf8").count("{figure-of}") == 1


def test_the_front_page_has_cards_and_every_chapter_on_its_map():
    text = (BOOK / "index.md").read_text("utf8")
    assert len(cards("book/index")) == text.count(":link:") == 8
    linked = set(re.findall(r"\{doc\}`[^`<]+<(\w+)>`", text.split("## The map")[1]))
    assert {chapter for part in PARTS.values() for chapter in part} <= linked
    assert {page.removeprefix("book/") for page in PARTS} <= linked


def test_the_front_page_leads_to_the_path_of_questions():
    """To the place of the figure itself, on a page that draws it."""
    page = (BOOK / "meta_or_transfer.ipynb").read_text("utf8")
    place = page.index('"(mot-nearest)=')
    assert "<mot-nearest>`" in (BOOK / "index.md").read_text("utf8")
    assert 0 < page.index('"nearest_case()', place) - place < 2000


@pytest.mark.parametrize("page", ["book/index", *PARTS])
def test_a_figure_of_another_page_is_there(page):
    """The build would stop at it, half an hour later."""
    shown = FIGURE.findall((ROOT / f"{page}.md").read_text("utf8"))
    assert len(shown) == 1
    for source, name, _ in shown:
        assert name in figures(BOOK / f"{source}.ipynb")


def figures(path: Path) -> set[str]:
    """Names of the figures of a notebook."""
    cells = json.loads(path.read_text("utf8"))["cells"]
    options = [c["metadata"].get("mystnb", {}).get("figure", {}) for c in cells]
    prose = "\n".join("".join(c["source"]) for c in cells)
    return {o["name"] for o in options if "name" in o} | {*re.findall(r":name: ([\w-]+)", prose)}


@pytest.mark.parametrize("name", ["README.md", "book/index.md"])
def test_commands_that_a_page_names_are_targets(name):
    commands = set(re.findall(r"(?m)(?:^|[`|] *)make ([a-z-]+)", (ROOT / name).read_text("utf8")))
    makefile = (ROOT / "Makefile").read_text("utf8")
    assert {"book", "lab", "page"} <= commands <= {*re.findall(r"(?m)^([a-z-]+):", makefile)}


def test_pictures_of_the_readme_exist_and_are_light():
    shown = re.findall(r"!\[[^\]]{40,}\]\(([^):]+)\)", (ROOT / "README.md").read_text("utf8"))
    assert shown == ["book/_static/result.png", ".github/page.png"]
    assert all((ROOT / path).stat().st_size <= 200_000 for path in shown)
