"""The built book in a browser that reaches no other host. Run `make book` first.

The variable BOOK_HTML names another folder than `_build/html`. Tests of one page follow each other, and a page that is
shown already is not loaded again (`Tab.show`).
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axe_playwright_python.base import AXE_SCRIPT
from machine import ROOT, files_of, printed, served, tool
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

BUILT = Path(os.environ.get("BOOK_HTML") or ROOT / "_build" / "html").resolve()
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
CHAPTERS = [c for part in TOC["parts"] for c in part["chapters"]]
PAGES = [TOC["root"], *(p["file"] for c in CHAPTERS for p in (c, *c.get("sections", ())))]
PAGES_TOOL, PDF_TOOL = tool("pages"), tool("pdf")
SCREEN, PHONE = PAGES_TOOL.WIDTHS
FITTING = {"book/index", *(f"book/{name}" for name in PAGES_TOOL.REWRITTEN)}
A4 = 665  # pixels between the margins of `paper.css`
each_page = pytest.mark.parametrize("page", PAGES, scope="module")
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
OUTPUTS = """
[...document.querySelectorAll(".cell_output, .pasted-text")].map(e => e.textContent).join("\\n")
"""


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


@each_page
def test_a_page_is_whole(page: str, site: str, built: Path, tab: Tab):
    """Equations rendered, headings in order, nothing missing, nothing from elsewhere, no error."""
    assert tab.wrong(f"{site}/{page}.html") == []
    equations = len(re.findall(r'class="math ', (built / f"{page}.html").read_text("utf8")))
    assert tab.run("document.querySelectorAll('mjx-container').length") >= equations


@each_page
def test_a_page_fits_a_phone(page: str, site: str, phone: Tab):
    assert phone.wrong(f"{site}/{page}.html") == []
    wide = phone.run("document.documentElement.scrollWidth")
    assert wide <= PHONE, f"{wide} pixels wide on a screen of {PHONE}"


@each_page
def test_nothing_scrolls_sideways(page: str, site: str, tab: Tab, phone: Tab):
    """On a phone programs may: their lines keep their form. The reference may where a name is long."""
    if page in FITTING:
        tab.show(f"{site}/{page}.html")
        assert sideways(tab) == []
        phone.show(f"{site}/{page}.html")
        assert sideways(phone, but=("code",)) == []


@each_page
def test_on_paper_solutions_are_open_and_nothing_is_cut(page: str, site: str, paper: Tab):
    paper.show(f"{site}/{page}.html")
    paper.run("dispatchEvent(new Event('beforeprint'))")
    assert paper.run("document.querySelectorAll('.toggle-hidden').length") == 0
    assert sideways(paper) == []


@pytest.mark.skipif(not os.environ.get("MTLIB_DATA"), reason="MTLIB_DATA is not set")
@each_page
def test_real_data_stood_in_for_nothing(page: str, site: str, tab: Tab):
    """Pages print their data's source: no stand-in, and the real set where a page asks for it."""
    tab.show(f"{site}/{page}.html")
    shown = tab.run(OUTPUTS)
    assert "stand-in" not in shown
    notebook = ROOT / f"{page}.ipynb"
    if notebook.exists() and re.search(r"\b(characters|omniglot)\(", source(notebook)):
        assert "(real)" in shown


def source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text("utf8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@each_page
def test_a_page_has_no_barriers(page: str, site: str, tab: Tab, phone: Tab):
    """axe finds nothing critical and nothing serious, on a screen and on a phone, light and dark."""
    assert tab.barriers(f"{site}/{page}.html") == []
    assert phone.barriers(f"{site}/{page}.html") == []


@each_page
def test_a_page_is_whole_as_a_plain_file(page: str, built: Path, tab: Tab):
    assert tab.wrong((built / f"{page}.html").as_uri()) == []


def test_links_of_the_pdf_lead_to_its_places(built: Path, tmp_path: Path):
    """Two pages printed as the book is: links between them have a place, others are text or addresses."""
    target = tmp_path / "two.pdf"
    pages = ["book/code", "book/glossary"]
    printed(str(ROOT / "tools" / "pdf.py"), str(built), str(target), *pages)
    pdf = target.read_bytes()
    places, (inside, outside) = PDF_TOOL.destinations(pdf), PDF_TOOL.links(pdf)
    assert 2 <= places["code"] < places["glossary"]
    assert any(name.startswith("glossary--term-") for name in inside)
    assert set(inside) <= {*places}
    assert not [url for url in outside if not url.startswith(("http", "mailto:"))]


def test_the_menu_opens_on_a_phone(site: str, phone: Tab):
    phone.open(f"{site}/{PAGES[0]}.html")
    chapters = (
        "[...document.querySelectorAll('dialog a, .bd-sidebar-primary a')].filter(a => {"
        "const b = a.getBoundingClientRect();"
        f"return a.checkVisibility() && b.width > 0 && b.left >= 0 && b.right <= {PHONE}"
        "}).map(a => a.getAttribute('href'))"
    )
    assert not any("algorithms" in href for href in phone.run(chapters))
    phone.page.locator("button.primary-toggle >> visible=true").first.click()
    phone.wait(f"{chapters}.some(href => href.includes('algorithms.html'))")
    assert phone.faults == []


def test_menu_and_search_without_a_mouse(site: str, tab: Tab, phone: Tab):
    """The first stop skips to the text; Enter opens the menu and Escape closes it; Ctrl+K searches."""
    tab.open(f"{site}/book/digits.html")
    tab.page.keyboard.press("Tab")
    assert tab.run("document.activeElement.textContent.trim()") == "Skip to main content"
    tab.page.locator(".bd-sidebar-primary details summary").first.focus()
    tab.page.keyboard.press("Enter")
    tab.wait("document.querySelector('.bd-sidebar-primary details').open")
    tab.page.keyboard.press("Control+k")
    tab.wait("document.activeElement.type == 'search'")
    tab.page.keyboard.type("MAML")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_url("**/search.html?q=MAML*")

    phone.open(f"{site}/{PAGES[0]}.html")
    phone.page.locator("button.primary-toggle >> visible=true").first.focus()
    phone.page.keyboard.press("Enter")
    phone.wait("document.querySelector('dialog[open] a')")
    phone.page.keyboard.press("Tab")
    assert phone.run("!!document.activeElement.closest('dialog')")
    phone.page.keyboard.press("Escape")
    phone.wait("!document.querySelector('dialog[open] a')")


def test_search_finds_maml(site: str, built: Path, tab: Tab):
    hits = "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))"
    texts = "[...document.querySelectorAll('#search-results p.context')].map(p => p.textContent)"

    tab.open(f"{site}/search.html?q=MAML")
    tab.wait(f"{hits}.length > 1")
    tab.wait(f"{texts}.some(t => t.includes('MAML'))")
    assert tab.faults == []

    tab.open(f"{(built / 'search.html').as_uri()}?q=MAML")
    tab.wait(f"{hits}.length > 1")


def test_the_index_leads_to_the_front_page(site: str, tab: Tab):
    tab.page.goto(f"{site}/index.html")
    tab.page.wait_for_url(f"{site}/{PAGES[0]}.html")


@pytest.mark.parametrize("page", PAGES)
def test_colab_links_lead_to_notebooks(page: str, built: Path):
    """On every page that is a notebook, and on no other: elsewhere the link is dead. Without an address, on none."""
    text = (built / f"{page}.html").read_text("utf8")
    links = re.findall(r'https://colab\.research\.google\.com/[^"]+', text)
    if (ROOT / f"{page}.ipynb").exists() and (OWN or "").startswith("https://github.com/"):
        there = f"{OWN.removeprefix('https://github.com')}/blob/notebooks/{page}.ipynb"
        assert links and all(link.endswith(there) for link in links)
    else:
        assert not links


# The notebooks that the build makes ----------------------------------------------------------

OWN = tool("address").known(ROOT)
MADE = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]
RAW = re.compile(  # what MyST alone reads
    r"\{[\w:+.-]+\}`"  # a role
    r"|^[ >]*(?:`{3,}|:{3,}|~{3,})\s*\{"  # a directive
    r"|^[ >]*:[\w-]+:(?:\s|$)"  # its option
    r"|^[ >]*\([\w:.-]+\)=\s*$"  # a place to refer to
    r"|\$\$[ \t]*\([\w:.-]+\)"  # an equation's name
    r"|\{\{|^\+\+\+",
    re.MULTILINE,
)


def made(built: Path, page: str) -> dict[str, Any]:
    path = built.parent / "notebooks" / f"{Path(page).name}.ipynb"
    return json.loads(path.read_text("utf8"))


def shown_text(notebook: dict[str, Any]) -> list[str]:
    """All Markdown of a notebook, without what it shows as code."""
    texts = [c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown"]
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            texts.append("".join(output.get("data", {}).get("text/markdown", "")))
    fenced = r"(?ms)^[ >]*(`{3,})(?!\{).*?^[ >]{0,3}\1[ \t]*$"
    return [
        re.sub(r"(?<!\})(`+)(?!`)[^`\n]+\1(?!`)", "", re.sub(fenced, "", text)) for text in texts
    ]


@pytest.mark.parametrize("page", MADE)
def test_a_made_notebook_has_nothing_raw(page: str, built: Path):
    found = [match[0] for text in shown_text(made(built, page)) for match in RAW.finditer(text)]
    assert found == []


@pytest.mark.parametrize("page", MADE)
def test_a_made_notebook_reads_as_the_page(page: str, built: Path):
    """The install cell first; the page's code, figures and equations; its links lead to what is published."""
    book = made(built, page)
    first, *cells = book["cells"]
    assert (
        first["cell_type"] == "code" and "mtlib-book" in first["source"] and not first["metadata"]
    )
    assert (f"git+{OWN}@main" in first["source"]) == bool(OWN)
    code = [c["source"] for c in cells if c["cell_type"] == "code"]
    source = json.loads((ROOT / f"{page}.ipynb").read_text("utf8"))["cells"]
    assert code == ["".join(c["source"]) for c in source if c["cell_type"] == "code"][1:]
    html_text = (built / f"{page}.html").read_text("utf8")
    numbers = re.findall(r'<span class="eqno">\(([\d.]+)\)', html_text)
    prose = "\n".join(shown_text(book))
    assert re.findall(r"\\tag\{([\d.]+)\}", prose) == numbers
    figures = re.findall(r'<span class="caption-number">Fig\. ([\d.]+?) *</span>', html_text)
    assert re.findall(r"(?m)^\*Fig\. ([\d.]+)\.\* ", prose) == figures
    for link in re.findall(r"\]\((?!data:)([^()\s]+)\)", prose):
        beside = (built.parent / "notebooks" / link).is_file()
        assert beside or link.startswith(("https://", "http://")), link


@pytest.mark.parametrize("page", MADE)
def test_a_page_offers_the_made_notebook(page: str, built: Path):
    (link,) = re.findall(
        r'href="([^"]*_sources[^"]*\.ipynb)"', (built / f"{page}.html").read_text("utf8")
    )
    offered = json.loads(((built / page).parent / link).resolve().read_text("utf8"))
    assert offered == made(built, page)


def test_no_notebook_is_left_over(built: Path):
    names = {path.stem for path in (built.parent / "notebooks").glob("*.ipynb")}
    assert names == {Path(page).name for page in MADE}


def test_no_address_is_left_open(built: Path):
    """Neither the placeholder, nor a button to nowhere."""
    kinds = {".html", ".ipynb", ".md", ".js", ".txt", ".xml"}
    files = [*built.rglob("*"), *(built.parent / "notebooks").glob("*")]
    found = [str(p) for p in files if p.suffix in kinds and b"/OWNER/" in p.read_bytes()]
    assert found == []
    text = (built / f"{PAGES[1]}.html").read_text("utf8")
    for button in ("source-repository-button", "source-edit-button", "source-issues-button"):
        assert (button in text) == bool(OWN), button


# The same without a browser, for what it need not happen to load ------------------------------

ELSEWHERE = re.compile(
    r'<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\ssrc="(?:https?:)?//[^"]+"'
    r'|<link\b[^>]*\bhref="(?:https?:)?//[^"]+"[^>]*>'
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//"
    r"|(?:import|fetch)\(\s*[\"'](?:https?:)?//[^\"']+"
)


def loaded_from_elsewhere(text: str) -> list[str]:
    """What a page loads, rather than links to, from another host."""
    found = [match[0] for match in ELSEWHERE.finditer(text)]
    return [f for f in found if not re.search(r'rel="(?:canonical|alternate)"', f)]


def test_nothing_is_loaded_from_elsewhere(built: Path):
    found = {
        str(path.relative_to(built)): wrong
        for path in sorted(built.rglob("*.html"))
        if (wrong := loaded_from_elsewhere(path.read_text("utf8")))
    }
    assert found == {}


# These checks can fail ------------------------------------------------------------------------


def test_a_bad_page_is_found_out(built: Path, tab: Tab, site: str):
    page = built / "book" / "_a_bad_page.html"
    whole = (built / "book" / "mathematics.html").read_text("utf8")
    bad = (
        '<img src="nowhere.png"><div class="math">not rendered</div>'
        '<script src="https://example.org/a.js"></script><button></button>'
        "<script>console.error('said'); throw Error('thrown')</script>"
        '<div class="math notranslate">\\[ \\frac{1} \\]</div>' + html.escape("<p>")
    )
    try:
        page.write_text(whole.replace("</article>", bad + "</article>", 1), "utf8")
        found = "\n".join(tab.wrong(f"{site}/book/{page.name}"))
    finally:
        page.unlink()
    for expected in (
        "equation not rendered: not rendered",
        "equation in error",
        "image without alt text: nowhere.png",
        "404",
        "control without a name",
        "asked another host: https://example.org/a.js",
        "console error: said",
        "exception: Error: thrown",
    ):
        assert expected in found, f"{expected} is not in\n{found}"
    assert len(loaded_from_elsewhere(bad)) == 1


def test_what_scrolls_is_found_out(tab: Tab, phone: Tab):
    """Each kind once, in a solution that is closed too; what fits, and a formula in a line, are not named."""
    wide = "x" * 300
    held = "<style>pre, .box { overflow-x: auto } .toggle-hidden > p + * { display: none }</style>"
    held += f"<div class='highlight'><pre>{wide}</pre></div><p><code>{wide}</code></p>"
    held += "<div class='cell_output'><div class='stream'><div class='highlight'>"
    held += f"<pre>{wide}</pre></div></div></div>"
    held += "<div class='toggle-hidden'><p>Solution</p><div class='box'>"
    held += f"<table><tr><td>{wide}</td></tr></table></div></div>"
    held += (
        "<p>text <mjx-container style='overflow: auto'><mjx-math>x</mjx-math></mjx-container></p>"
    )
    held += f"<pre>{'x' * 20}</pre>"
    for shown in (tab, phone):
        shown.page.set_content(f"<article style='padding: 10px'>{held}</article>")
        kinds = [found.partition(",")[0] for found in sideways(shown)]
        assert kinds == ["table", "code", "output", "word", "page"]
        assert "code" not in " ".join(sideways(shown, but=("code",)))


def test_a_barrier_is_found_out(tab: Tab, phone: Tab):
    """Each kind once: a summary and a table's row without a name, a link too pale in one of the two modes."""
    held = "<style>p { background: #fff } a { color: #777 } [data-theme=dark] a { color: #888 }</style>"
    held += "<p><a href='#x'>pale</a></p><details><summary></summary>text</details><img src=''>"
    for shown in (tab, phone):
        shown.page.goto("about:blank")
        shown.page.set_content(
            f"<html lang=en><title>x</title><main><article>{held}</article></main>"
        )
        found = {" ".join(f.split(",")[:1]) for f in shown.barriers("about:blank")}
        assert {"light: summary-name", "light: image-alt", "dark: color-contrast"} <= found
