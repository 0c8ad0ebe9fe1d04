"""The questions of the built book, answered by keyboard in a browser. Run `make book` first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import PAGES_TOOL, PHONE, Tab
from playwright.sync_api import Browser, Page
from test_selftest import ASKED, ON_PAGES, OWN, TAKEN, Asked

QUIZ = [*TAKEN, *(q.label for q in OWN)]
BY_LABEL = {q.label: q for q in (*OWN, *(q for all_ in ON_PAGES.values() for q in all_))}
MOST_KEYS = 12


def letter(question: Asked, right: bool, which: int = 0) -> str:
    """The letter of a right option, or of a wrong one."""
    return [chr(65 + i) for i, (ok, *_) in enumerate(question.options) if ok is right][which]


def start(page: Page, label: str) -> None:
    """The keyboard's focus on the question's first button, as Tab would bring it there."""
    page.locator(f"#selftest-{label} input").first.focus()


def choose(page: Page, label: str, which: str) -> None:
    """By arrow keys to an option. Arrows choose on their way."""
    wanted = f"selftest-{label}-{which}"
    page.keyboard.press("Space")
    for _ in range(MOST_KEYS):
        if page.evaluate("document.activeElement.id") == wanted:
            break
        page.keyboard.press("ArrowDown")
    assert page.evaluate(f"document.getElementById({wanted!r}).checked")


def answer(page: Page, label: str, which: str) -> str:
    """Choose and press Enter; the verdict's text."""
    start(page, label)
    choose(page, label, which)
    page.keyboard.press("Enter")
    return page.locator(f"#selftest-{label} .selftest-verdict").inner_text()


def kind(page: Page, label: str) -> str:
    return page.locator(f"#selftest-{label} .selftest-verdict").get_attribute("class") or ""


def reason(page: Page, label: str, which: str) -> str:
    """What the list of answers says of an option."""
    at = f"#selftest-{label} .selftest-answers li[data-letter={which}]"
    return page.evaluate(f"document.querySelector({at!r}).textContent")


def flat(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("page", ASKED)
def test_each_question_is_answered_wrong_and_then_right(page: str, site: str, tab: Tab):
    """A wrong choice shows its reason, the right one then shows its own; arrow keys alone show nothing."""
    tab.open(f"{site}/book/{page}.html")
    forms = tab.run("[...document.querySelectorAll('form.selftest')].map(f => f.id)")
    assert forms == [f"selftest-{q.label}" for q in ON_PAGES[page]]
    for question in ON_PAGES[page]:
        wrong, right = letter(question, False), letter(question, True)
        start(tab.page, question.label)
        choose(tab.page, question.label, wrong)
        assert kind(tab.page, question.label) == "selftest-verdict"
        for which, expected, word in ((wrong, "is-wrong", "No."), (right, "is-right", "Right.")):
            said = answer(tab.page, question.label, which)
            assert said.startswith(word) and expected in kind(tab.page, question.label)
            shown = tab.page.locator(f"#selftest-{question.label} .selftest-verdict")
            assert flat(shown.evaluate("e => e.textContent")) == flat(
                reason(tab.page, question.label, which)
            )
    assert tab.faults == []


def test_tab_leads_into_a_question_and_on(site: str, tab: Tab):
    """From the text above: the options as one stop, the button, the list of answers, the next question."""
    tab.open(f"{site}/book/background.html")
    first, second = (q.label for q in ON_PAGES["background"][:2])
    tab.page.locator("#test-yourself > p").first.click()  # Tab goes on from here
    stops = []
    for _ in range(4):
        tab.page.keyboard.press("Tab")
        stops.append(
            tab.run("[document.activeElement.tagName, document.activeElement.closest('form').id]")
        )
    tags = ["INPUT", "BUTTON", "SUMMARY", "INPUT"]
    assert stops == [
        [tag, f"selftest-{label}"]
        for tag, label in zip(tags, (first, first, first, second), strict=True)
    ]


def test_without_a_choice_it_asks_for_one(site: str, tab: Tab):
    tab.open(f"{site}/book/quiz.html")
    before = tab.page.locator(".selftest-count").inner_text()
    tab.page.locator(f"#selftest-{TAKEN[0]} button").focus()
    tab.page.keyboard.press("Enter")
    assert tab.page.locator(f"#selftest-{TAKEN[0]} .selftest-verdict").inner_text().strip() == (
        "Choose an answer first."
    )
    assert tab.page.locator(".selftest-count").inner_text() == before


def test_the_score_counts_first_tries(site: str, tab: Tab):
    """One wrong and then right, all others right at once; then begin again."""
    tab.open(f"{site}/book/quiz.html")
    shown = tab.run("[...document.querySelectorAll('form.selftest')].map(f => f.id.slice(9))")
    assert sorted(shown) == sorted(QUIZ)
    count, end = tab.page.locator(".selftest-count"), tab.page.locator(".selftest-end")
    assert count.inner_text() == f"0 of {len(shown)} right at the first try; {len(shown)} left."

    missed = shown[3]
    answer(tab.page, missed, letter(BY_LABEL[missed], False))
    for label in shown:
        assert end.inner_text() == ""
        answer(tab.page, label, letter(BY_LABEL[label], True))
        assert "is-right" in kind(tab.page, label)
    assert end.inner_text() == f"Done: {len(shown) - 1} of {len(shown)} right at the first try."
    assert count.inner_text() == ""

    tab.page.locator(".selftest-score button").focus()
    tab.page.keyboard.press("Enter")
    assert end.inner_text() == "" and count.inner_text().startswith("0 of ")
    assert tab.run("document.activeElement.closest('form').id") == f"selftest-{shown[0]}"
    assert tab.run("document.querySelectorAll('form.selftest input:checked').length") == 0
    assert tab.faults == []


def test_the_quiz_names_the_page_of_each_question(site: str, built: Path, tab: Tab):
    """And links of its reasons, which lead within that page there, lead to it from here."""
    tab.open(f"{site}/book/quiz.html")
    from_pages = tab.run("document.querySelectorAll('.selftest-from a').length")
    assert from_pages == len(TAKEN)
    for page in ("quiz", *ASKED):
        tab.open(f"{site}/book/{page}.html")
        for link in tab.run(
            "[...document.querySelectorAll('form.selftest a')].map(a => a.getAttribute('href'))"
        ):
            name, _, anchor = link.partition("#")
            text = (built / "book" / (name or f"{page}.html")).read_text("utf8")
            assert not anchor or f'id="{anchor}"' in text, f"{page}: {link}"


def test_equations_and_numbers_of_a_page_are_there_on_the_quiz(site: str, tab: Tab):
    tab.open(f"{site}/book/mathematics.html")
    answer(tab.page, "mathematics-reptile", letter(BY_LABEL["mathematics-reptile"], True))
    shown = tab.run(
        "document.querySelectorAll('#selftest-mathematics-reptile .selftest-verdict mjx-container').length"
    )
    assert shown == 1
    for page in ("quiz", *ASKED):
        tab.open(f"{site}/book/{page}.html")
        assert not tab.run(
            "[...document.querySelectorAll('span.math')].some(e => !e.querySelector('mjx-container'))"
        ), page
        assert not tab.run(
            "[...document.querySelectorAll('form.selftest')].some(f => /\\{\\w+|\\(#|\\$/.test(f.textContent))"
        ), page


# Without a script, on paper, on a phone, in the dark ----------------------------------------------


@pytest.fixture
def plain(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(java_script_enabled=False)
    yield context.new_page()
    context.close()


def test_without_a_script_the_answers_open(site: str, plain: Page):
    plain.goto(f"{site}/book/quiz.html")
    held = plain.locator(f"#selftest-{TAKEN[0]}")
    assert not held.locator("button").is_visible() and not held.locator("li").first.is_visible()
    assert not plain.locator(".selftest-score").is_visible()
    held.locator("summary").focus()
    plain.keyboard.press("Enter")
    assert held.locator("li").first.is_visible()
    assert [w.inner_text() for w in held.locator(".selftest-word").all()].count("Right.") == 1
    address = plain.url
    held.locator("input").first.focus()
    plain.keyboard.press("Space")
    plain.keyboard.press("Enter")  # sends no form
    assert plain.url == address


def test_on_paper_the_answers_are_open(site: str, paper: Tab):
    paper.open(f"{site}/book/quiz.html")
    paper.run("dispatchEvent(new Event('beforeprint'))")
    items = paper.page.locator(".selftest-answers li")
    assert items.count() == sum(len(BY_LABEL[label].options) for label in QUIZ)
    assert all(
        paper.run(
            "[...document.querySelectorAll('.selftest-answers li')].map(e => e.checkVisibility())"
        )
    )
    assert not paper.run(
        "[...document.querySelectorAll('.selftest button, .selftest-score')].some(e => e.checkVisibility())"
    )
    assert paper.run(PAGES_TOOL.SIDEWAYS) == []
    paper.run("dispatchEvent(new Event('afterprint'))")
    assert paper.run("document.querySelectorAll('.selftest-answers[open]').length") == 0


@pytest.mark.parametrize("page", ["quiz", *ASKED])
def test_nothing_scrolls_sideways_on_a_phone(page: str, site: str, phone: Tab):
    phone.open(f"{site}/book/{page}.html")
    phone.run("document.querySelectorAll('.selftest-answers').forEach(e => { e.open = true })")
    wide = phone.run(
        "[...document.querySelectorAll('form.selftest, form.selftest *')].filter("
        "e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1"
        " && !e.closest('mjx-assistive-mml')).map(e => e.outerHTML.slice(0, 90))"
    )
    assert wide == []
    assert phone.run("document.documentElement.scrollWidth") <= PHONE


CONTRAST = r"""
(() => {
  const numbers = c => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const clear = c => c === "transparent" || /^rgba\(.*, 0\)$/.test(c);
  const behind = e => {
    while (e && clear(getComputedStyle(e).backgroundColor)) e = e.parentElement;
    return e ? getComputedStyle(e).backgroundColor : "white";
  };
  const light = c => numbers(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  const kinds = ["legend", "label", "button", "summary", ".selftest-verdict p", ".selftest-word",
                 "li p", "form a", ".selftest-count"];
  for (const kind of kinds)
    for (const e of document.querySelectorAll(`form.selftest ${kind.replace("form ", "")}, .selftest-score ${kind}`)) {
      if (!e.checkVisibility() || !e.textContent.trim()) continue;
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      found[kind] = Math.min(found[kind] ?? 99, (a + 0.05) / (b + 0.05));
    }
  return found;
})()
"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_all_of_it_is_legible(mode: Any, site: str, browser: Browser):
    tab = Tab(browser, PHONE)
    tab.page.emulate_media(color_scheme=mode)
    tab.open(f"{site}/book/quiz.html")
    assert tab.run("document.documentElement.dataset.theme") == mode
    for right in (False, True):
        answer(tab.page, TAKEN[int(right)], letter(BY_LABEL[TAKEN[int(right)]], right))
    tab.run("document.querySelectorAll('.selftest-answers').forEach(e => { e.open = true })")
    found = tab.run(CONTRAST)
    assert len(found) == 9 and min(found.values()) >= 4.5, found
    tab.page.close()
