"""The built book in a browser that reaches no other host. Run `make book` first.

Tests of one page follow each other, and a page that is shown already is not loaded again (`Tab.show`).
"""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import PAGES_TOOL, PHONE, Tab, sideways
from machine import ROOT, printed, tool

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
CHAPTERS = [c for part in TOC["parts"] for c in part["chapters"]]
PAGES = [TOC["root"], *(p["file"] for c in CHAPTERS for p in (c, *c.get("sections", ())))]
PDF_TOOL = tool("pdf")
FITTING = {"book/index", *(f"book/{name}" for name in PAGES_TOOL.REWRITTEN)}
each_page = pytest.mark.parametrize("page", PAGES, scope="module")
OUTPUTS = """
[...document.querySelectorAll(".cell_output, .pasted-text")].map(e => e.textContent).join("\\n")
"""


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
