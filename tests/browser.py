"""The built book in a browser that reaches no other host: what the tests in test_*_built.py share.

`conftest.py` has its fixtures from here. The variable BOOK_HTML names another folder than `_build/html`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from machine import ROOT, files_of, served, tool
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

BUILT = Path(os.environ.get("BOOK_HTML") or ROOT / "_build" / "html").resolve()
PAGES_TOOL = tool("pages")
SCREEN, PHONE = PAGES_TOOL.WIDTHS
A4 = 665  # pixels between the margins of `paper.css`
LOCAL = ("http://127.0.0.1:", "file:", "data:", "blob:", "about:")

# What is wrong with a page that is shown, as a list of sentences.
INSPECT = r"""
(() => {
  const wrong = [];
  const short = e => e.textContent.trim().slice(0, 60);
  for (const e of document.querySelectorAll("div.math, span.math"))
    if (!e.querySelector("mjx-container")) wrong.push("equation not rendered: " + short(e));
  for (const e of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    wrong.push("equation in error: " + (e.getAttribute("data-mjx-error") || short(e)));
  for (const e of document.querySelectorAll("img")) {
    const name = (e.getAttribute("src") || e.id).slice(0, 60);
    if (!(e.getAttribute("alt") || "").trim()) wrong.push("image without alt text: " + name);
    if (e.getAttribute("src") && e.complete && !e.naturalWidth) wrong.push("empty image: " + name);
  }
  for (const e of document.querySelectorAll("input, select, button"))
    if (e.checkVisibility() && !(e.labels && e.labels.length) && !e.textContent.trim() &&
        !e.title && !e.getAttribute("aria-label") && !e.getAttribute("placeholder"))
      wrong.push("control without a name: " + e.outerHTML.slice(0, 80));
  const levels = [...document.querySelectorAll("article :is(h1, h2, h3, h4, h5, h6)")];
  if (levels.filter(e => e.tagName == "H1").length != 1) wrong.push("not one heading of the page");
  levels.slice(1).forEach((e, i) => {
    if (e.tagName[1] - levels[i].tagName[1] > 1) wrong.push("heading out of order: " + short(e));
  });
  return wrong;
})()
"""
# What axe finds, critical or serious, as [rule, selector, HTML, what is said]. In the modes that follow the first only what
# changes with the mode is asked again: colours, of each kind of text once. Programs keep one word of each kind.
PREPARE = """
(() => {
  const style = document.createElement("style");
  style.textContent = "*, ::before, ::after { transition: none !important; animation: none !important }";
  document.head.append(style);
  const seen = new Set();
  for (const e of document.querySelectorAll("pre span")) {
    const box = e.closest("pre").parentElement.parentElement;
    const kind = [e, e.parentElement, box].map(x => x.className).join("|");
    if (seen.has(kind)) e.replaceWith(...e.childNodes);
    seen.add(kind);
  }
  document.querySelector("article").normalize();
})()
"""
AXE = """
async mode => {
  document.documentElement.dataset.theme = mode;
  const kinds = new Map();
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const e = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || !e.checkVisibility() || e.closest("script, mjx-container")) continue;
    let kind = "";
    for (let up = e; up && up != document.body; up = up.parentElement) kind += up.tagName + up.className + " ";
    if (!kinds.has(kind)) kinds.set(kind, e);
  }
  const some = { resultTypes: ["violations"], xpath: false };
  const whole = mode == "light" ? await axe.run({ ...some, rules: {
    "color-contrast": { enabled: false }, "label-content-name-mismatch": { enabled: true },
  } }) : { violations: [] };
  const colours = await axe.run([...kinds.values()], { ...some, runOnly: ["color-contrast"] });
  return [...whole.violations, ...colours.violations]
    .filter(found => ["critical", "serious"].includes(found.impact))
    .flatMap(({ id, nodes }) => nodes.map(node =>
      [id, node.target.join(" "), node.html, [...node.any, ...node.all, ...node.none].map(x => x.message).join("; ")]));
}
"""
THEMES_OWN = {
    # Its name is "Color mode"; the text within are titles of its pictures, one of which is shown.
    ("label-content-name-mismatch", "theme-switch-button"),
}


def need(holds: bool, what: str) -> None:
    """Skip where something is missing on one's own machine; fail where it must be there."""
    if not holds and os.environ.get("CI"):
        pytest.fail(what)
    if not holds:
        pytest.skip(what)


@pytest.fixture(scope="module")
def built() -> Path:
    need((BUILT / "index.html").exists(), "the book is not built: run `make book`")
    return BUILT


class Tab:
    """A page of the browser, `width` pixels wide. `faults` lists what went wrong while it was shown."""

    def __init__(self, browser: Browser, width: int) -> None:
        size = {"width": width, "height": 900}
        self.page: Page = browser.new_page(viewport=size, is_mobile=width < 600)
        self.faults: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("requestfailed", self._failed)
        self.page.on("response", lambda r: r.status < 400 or self._note(f"{r.status}: {r.url}"))
        self.page.on("pageerror", lambda e: self._note(f"exception: {e.name}: {e.message}"))
        self.page.on("console", self._told)

    def _note(self, fault: str) -> None:
        self.faults.append(fault)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(LOCAL):
            self._note(f"asked another host: {request.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page moved on before it came
            self._note(f"not loaded: {request.url} ({request.failure})")

    def _told(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            self._note(f"console error: {message.text}")

    def open(self, url: str) -> None:
        """Show a page; return when it, its scripts and its equations are there."""
        self.faults.clear()
        self.page.goto(url)
        self.run(PAGES_TOOL.TYPESET)

    def show(self, url: str) -> None:
        """Show a page, unless it is the one that is shown already."""
        if self.page.url != url:
            self.open(url)

    def run(self, script: str, given: Any = None) -> Any:
        """The value of a JavaScript expression, or of a function of what is given; a promise is awaited."""
        return self.page.evaluate(script, given)

    def wait(self, script: str) -> None:
        """Return once an expression is true; an error if it does not become so in time."""
        self.page.wait_for_function(script, timeout=15_000)

    def wrong(self, url: str) -> list[str]:
        """All that is wrong with a page: in itself, and with what it loads and says."""
        self.show(url)
        return self.run(INSPECT) + self.faults

    def barriers(self, url: str) -> list[str]:
        """What axe finds on a page, light and dark, but for what is the theme's own."""
        self.show(url)
        self.run(AXE_SCRIPT)
        self.run(PREPARE)
        self.page.wait_for_timeout(
            400
        )  # until the theme knows which programs scroll, and lets the keyboard reach them
        return [
            f"{mode}: {rule}, {place}: {what}"
            for mode in ("light", "dark")
            for rule, place, held, what in self.run(AXE, mode)
            if not any(rule == known and name in held for known, name in THEMES_OWN)
        ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window, which finds no host but this machine."""
    program = PAGES_TOOL.chromium()
    need(bool(program), "Chromium is not installed (Debian, Ubuntu: the package chromium)")
    alone = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[alone])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Tab:
    return Tab(browser, SCREEN)


@pytest.fixture(scope="module")
def phone(browser: Browser) -> Tab:
    return Tab(browser, PHONE)


@pytest.fixture(scope="module")
def paper(browser: Browser) -> Tab:
    tab = Tab(browser, A4)
    tab.page.emulate_media(media="print")
    return tab


@pytest.fixture(scope="module")
def site(built: Path) -> Iterator[str]:
    """The address at which the built folder is served."""
    with served(files_of(built)) as url:
        yield url


def sideways(tab: Tab, *, but: tuple[str, ...] = ()) -> list[str]:
    """What scrolls sideways on the page that is shown, but for some kinds."""
    found = tab.run(PAGES_TOOL.SIDEWAYS)
    return [f"{kind}, {over} pixels: {text}" for kind, over, text in found if kind not in but]
