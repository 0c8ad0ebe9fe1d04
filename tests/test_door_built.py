"""The way into the built book, in a browser: search, the index of questions, descriptions, keyboard. Run `make book` first."""

from __future__ import annotations

import html
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from browser import PHONE, Tab, sideways
from machine import ROOT, tool
from playwright.sync_api import Browser
from test_book_built import PAGES
from test_door import PARTS

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import door
import sharing
import words

DOOR = ["book/index", "book/pages", *PARTS]
CHAPTERS = [f"book/{chapter}" for part in PARTS.values() for chapter in part]
HITS = """[...document.querySelectorAll('#search-results li a')].map(a =>
    a.getAttribute('href').replace(/[?].*?(#|$)/, '$1'))"""
FOUND = [  # what a reader types, and what must be among the first five
    ("MAML++", ["book/glossary.html#", "book/gradient.html"]),
    ("θ", ["book/glossary.html#", "book/mathematics.html"]),
    ("L2-SP", ["book/glossary.html#term-L2-SP", "book/adapting.html"]),
    ("元学习", ["book/glossary.html#term-meta-learning", "book/background.html"]),
    ("负迁移", ["book/glossary.html#term-negative-transfer"]),
    ("negative transfer", ["book/negative.html"]),
]


@pytest.mark.parametrize("query, expected", FOUND)
def test_search_finds(query: str, expected: list[str], site: str, tab: Tab):
    tab.open(f"{site}/search.html?q={quote(query)}")
    assert found(tab, expected) == []
    assert tab.faults == []


@pytest.mark.parametrize("query, expected", FOUND[:1])
def test_search_finds_without_a_server(
    query: str, expected: list[str], built: Path, browser: Browser
):
    own = Tab(browser, PHONE)  # it notes that a file may not fetch others
    own.open(f"{(built / 'search.html').as_uri()}?q={quote(query)}")
    assert found(own, expected) == []
    own.page.close()


def found(tab: Tab, expected: list[str]) -> list[str]:
    """Pages that are not among the first five of a search that is shown."""
    tab.wait(f"{HITS}.length >= {len(expected)}")
    tab.wait("!document.querySelector('#search-results h2').textContent.includes('Searching')")
    first = tab.run(HITS)[:5]
    return [f"{page} in {first}" for page in expected if not any(h.startswith(page) for h in first)]


def test_words_are_cut_as_they_are_written():
    split = words.English({}).split
    assert "MAML++" in split("MAML, MAML++ and others") and "MAML" in split("MAML++")
    assert "1++2" not in split("1++2") and not any("+" in word for word in split("a++b, c+"))
    assert split(r"\theta_0 = \varphi - \etalon") == ["theta_0", "varphi", "etalon", "θ", "φ"]


@pytest.mark.parametrize("page", DOOR)
def test_a_page_of_the_door_does_not_scroll_sideways(page: str, site: str, tab: Tab, phone: Tab):
    for shown in (tab, phone):
        shown.open(f"{site}/{page}.html")
        assert sideways(shown, but=("code",) if shown is phone else ()) == []


@pytest.mark.parametrize("page", DOOR)
def test_every_card_and_link_is_reached_by_keyboard(page: str, site: str, tab: Tab):
    """Tab comes to each link of the article, in order, which is then seen to have it; Enter opens the first card."""
    tab.open(f"{site}/{page}.html")
    links = "[...document.querySelectorAll('article a[href]:not(.headerlink)')].filter(a => a.checkVisibility())"
    expected = tab.run(f"{links}.map(a => a.getAttribute('href'))")
    assert len(expected) >= 5
    tab.run(f"{links}[0].focus()")
    reached = [tab.run("document.activeElement.getAttribute('href')")]
    for _ in expected[1:]:
        tab.page.keyboard.press("Tab")
        while tab.run("!document.activeElement.matches('article a[href]:not(.headerlink)')"):
            tab.page.keyboard.press("Tab")
        reached.append(tab.run("document.activeElement.getAttribute('href')"))
        seen = tab.run(
            "(e => [e, e.closest('.sd-card')].some(b => b && (s => s.outlineStyle != 'none' && s.outlineWidth != '0px'"
            " || s.boxShadow != 'none')(getComputedStyle(b))))(document.activeElement)"
        )
        assert seen, f"nothing shows that {reached[-1]} has the focus"
    assert reached == expected
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_url(lambda url: page not in url)


def test_parts_show_figures_of_their_chapters(site: str, tab: Tab):
    images = "[...document.querySelectorAll('article figure img')].map(i => [i.src, i.alt, i.naturalWidth])"
    for page in ["book/index", *PARTS]:
        tab.open(f"{site}/{page}.html")
        ((source, says, width), *again) = tab.run(
            images
        )  # a phone's right half is the same picture
        assert {shown[0] for shown in again} <= {source}
        assert tab.page.locator("article figure img:visible").count() == 1
        (chapter,) = re.findall(r"\{figure-of\} (\w+)", (ROOT / f"{page}.md").read_text("utf8"))
        tab.open(f"{site}/book/{chapter}.html")
        assert width > 0 and [source, says] in [shown[:2] for shown in tab.run(images)]


def test_the_index_has_the_question_of_every_chapter(site: str, tab: Tab):
    tab.open(f"{site}/book/pages.html")
    rows = tab.run(
        "[...document.querySelectorAll('.page-questions li')].map(r => "
        "[r.querySelector('a').getAttribute('href'), r.querySelector('p > span').textContent])"
    )
    assert [href for href, _ in rows] == [f"{c.removeprefix('book/')}.html" for c in CHAPTERS]
    assert all(asked.endswith("?") for _, asked in rows)
    heads = tab.run(
        "[...document.querySelectorAll('.page-questions .rubric a')].map(a => a.getAttribute('href'))"
    )
    assert heads == [f"{page.removeprefix('book/')}.html" for page in PARTS]


def test_chapters_are_numbered_through_and_pages_of_parts_are_not(site: str, tab: Tab):
    tab.open(f"{site}/book/index.html")
    shown = tab.run(
        "[...document.querySelectorAll('.bd-sidebar-primary li a')].map(a => a.textContent.trim())"
    )
    numbers = [int(n) for text in shown for n in re.findall(r"^(\d+)\.", text)]
    assert numbers == list(range(1, len(CHAPTERS) + 1))
    assert shown.count("Overview") == len(PARTS)


# Descriptions ----------------------------------------------------------------------------------


def metas(built: Path, page: str) -> dict[str, str]:
    text = (built / f"{page}.html").read_text("utf8")
    found = re.findall(r'<meta (?:name|property)="([\w:]+)" content="([^"]*)"', text)
    return {name: html.unescape(said) for name, said in found}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_a_title_and_a_description(page: str, built: Path):
    if page == "book/references":
        pytest.skip("it has no text but the list")
    said = metas(built, page)
    assert said["og:site_name"] == "Meta-Learning & Transfer Learning"
    assert said["og:title"] and said["og:description"] == said["description"]
    assert door.LEAST <= len(said["description"]) <= door.MOST
    assert not re.search(r"[$`{}\\]", said["description"])


def test_descriptions_of_chapters_differ(built: Path):
    said = [metas(built, page)["description"] for page in (*DOOR, *CHAPTERS)]
    assert len(set(said)) == len(said)


def test_a_long_description_ends_with_a_sentence():
    assert door.sentences("One. Two? Three.", 9) == "One. Two?"
    assert door.sentences("A word and more words", 12) == "A word and…"


def test_the_address_makes_a_picture_and_a_map(tmp_path: Path):
    """Without one there is neither, since both need it."""
    config = SimpleNamespace(html_baseurl="", html_title="Book")
    tree = SimpleNamespace(findall=lambda _: iter([{"uri": "../_images/b.png", "alt": "A plot"}]))
    app = SimpleNamespace(
        config=config,
        outdir=str(tmp_path),
        builder=SimpleNamespace(format="html", images={"a.png": "b.png"}, imagedir="_images"),
        env=SimpleNamespace(
            metadata={"book/a": {"question": 'Is "a" < b?'}},
            titles={"book/a": SimpleNamespace(astext=lambda: "A & B")},
            found_docs={"book/a", "book/b"},
        ),
    )

    def tags() -> str:
        context: dict[str, str] = {}
        sharing.describe(app, "book/a", "page.html", context, tree)
        sharing.list_pages(app, None)
        return context["metatags"]

    assert 'content="Is &quot;a&quot; &lt; b?"' in tags() and "og:image" not in tags()
    assert not list(tmp_path.iterdir())
    config.html_baseurl = "https://someone.github.io/book/"
    assert '"og:image" content="https://someone.github.io/book/_images/b.png"' in tags()
    assert '"og:image:alt" content="A plot"' in tags()
    assert '"og:url" content="https://someone.github.io/book/book/a.html"' in tags()
    listed = re.findall(r"<loc>(.*)</loc>", (tmp_path / "sitemap.xml").read_text("utf8"))
    assert listed == [f"https://someone.github.io/book/book/{page}.html" for page in "ab"]
    assert "sitemap.xml" in (tmp_path / "robots.txt").read_text("utf8")


# Commands --------------------------------------------------------------------------------------


def test_the_build_says_how_long_it_will_take():
    execute = tool("execute")
    guess = execute.expected(["book/background", "book/a-new-one"], "full")
    assert guess["book/background"] > 10 and guess["book/a-new-one"] > 10
    assert execute.left({"a": 10.0, "b": 30.0, "c": 30.0}, {}, 2) == 35
    assert execute.left({"a": 10.0, "b": 30.0, "c": 30.0}, {"a": 20.0}, 2) == 60  # half as fast
    assert execute.in_words(89) == "about 1 minute" and execute.in_words(20) == "less than a minute"


def test_the_laboratory_serves(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        f"--port={port}",
        "--notebook-dir=book",
    ]
    command += ["--allow-root", "--IdentityProvider.token=t"]
    homes = dict.fromkeys(
        ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"), str(tmp_path)
    )
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **homes}, stdout=log, stderr=log
        )
        try:
            for _ in range(120):
                time.sleep(0.5)
                try:
                    url = f"http://127.0.0.1:{port}/api/contents/background.ipynb?content=0&token=t"
                    with urllib.request.urlopen(url) as answer:
                        assert b'"type": "notebook"' in answer.read()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
            else:
                pytest.fail("JupyterLab did not answer within a minute")
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.mark.parametrize("page", ["book/index", "book/part_foundations", "book/part_practice"])
def test_words_in_a_figure_can_be_read_on_a_phone(page: str, site: str, phone: Tab):
    """Figures are 110 dots to the inch, with words of 9 or 10 points: at six tenths of that, 8 pixels or more."""
    phone.open(f"{site}/{page}.html")
    shown = phone.run(
        """[...document.querySelectorAll(".figure-of img")].filter(e => e.checkVisibility()).map(e =>
        Math.max(e.width / e.naturalWidth, e.height / e.naturalHeight))"""
    )
    assert len(shown) == (1 if page == "book/index" else 2) and min(shown) > 0.6
