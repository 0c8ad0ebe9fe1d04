"""The built book as one PDF: `python tools/pdf.py [_build/html [_build/book.pdf [book/digits ...]]]`.

`make pdf` does this; with names of pages it prints those alone.

Chromium shows every page of `_toc.yml`, with its equations and figures. Their articles are joined in one document,
where each id begins with its page's name and a link to another page leads to its place, and that is printed: once to
see on which page each chapter begins, and again with these numbers in the table of contents. How paper looks is in
`book/_static/custom.css`, under `@media print`.
"""

from __future__ import annotations

import datetime
import html
import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = runpy.run_path(str(Path(__file__).parent / "pages.py"))
ROOT, TYPESET, chromium = HERE["ROOT"], HERE["TYPESET"], HERE["chromium"]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
TIMES = 3  # that the book is printed at most, until each chapter stays where the contents say
PATIENCE = 600_000  # milliseconds, on a busy machine too
SETTINGS = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))

# One page's article, for a document of many: its ids and the links to them, and the rules of its equations.
TAKE = r"""
([known, root]) => {
  const own = known[location.pathname];
  const name = id => id.replace(/[^\w.-]/g, "_");
  const at = (page, id) => id ? `${page}--${name(id)}` : page;
  dispatchEvent(new Event("beforeprint"));
  const shown = document.querySelector("article");
  const plain = new Map();  // whether a kind of word in a program looks as the program does
  for (const e of shown.querySelectorAll("pre span")) {
    const kind = e.parentElement.className + " " + e.className;
    if (!plain.has(kind)) {
      const [own, outer] = [e, e.parentElement].map(x => getComputedStyle(x));
      plain.set(kind, ["color", "fontWeight", "fontStyle", "backgroundColor", "textDecorationLine"]
        .every(key => own[key] == outer[key]));
    }
    if (plain.get(kind)) e.dataset.plain = "";
  }
  const article = shown.cloneNode(true);
  article.querySelectorAll("[data-plain]").forEach(e => e.replaceWith(...e.childNodes));
  article.querySelectorAll("mjx-math").forEach(e => e.setAttribute("role", "img"));
  article.normalize();
  const drawn = shown.querySelectorAll("canvas");
  article.querySelectorAll("canvas").forEach((canvas, i) => {
    const image = document.createElement("img");
    image.src = drawn[i].toDataURL();
    image.alt = canvas.getAttribute("aria-label") || "";
    canvas.replaceWith(image);
  });
  article.querySelectorAll("script, noscript, .headerlink, .copybtn, mjx-assistive-mml")
    .forEach(e => e.remove());
  for (const a of article.querySelectorAll("a[href]")) {
    const url = new URL(a.href);
    const page = known[url.pathname];
    if (page) a.setAttribute("href", "#" + at(page, decodeURIComponent(url.hash.slice(1))));
    else if (url.href.startsWith(root)) a.replaceWith(...a.childNodes);  // a file beside the book
    else a.setAttribute("href", url.href);
  }
  for (const e of article.querySelectorAll("*"))
    for (const {name: key, value} of [...e.attributes]) {
      if (key == "id") e.id = at(own, value);
      else if (key == "src") { e.setAttribute("src", e.src); e.removeAttribute("loading"); }
      else if (key == "name" && e.tagName == "INPUT") e.name = at(own, value);
      else if (["for", "headers"].includes(key) || /^aria-(labelledby|describedby|controls)$/.test(key))
        e.setAttribute(key, value.split(/\s+/).map(id => at(own, id)).join(" "));
      else if (/url\(["']?#/.test(value))
        e.setAttribute(key, value.replace(/url\((["']?)#([^)"']+)/g, (_, q, id) => `url(${q}#${at(own, id)}`));
      else if (/href$/.test(key) && e.closest("svg") && value.startsWith("#") && e.tagName != "a")
        e.setAttribute(key, "#" + at(own, value.slice(1)));
    }
  const sheets = [...document.styleSheets];
  const equations = sheets.find(s => s.ownerNode && s.ownerNode.id == "MJX-CHTML-styles");
  const heading = article.querySelector("h1");
  return {
    title: heading ? heading.textContent.trim() : document.title,
    body: article.innerHTML,
    rules: equations ? [...equations.cssRules].map(rule => rule.cssText) : [],
    styles: [...document.querySelectorAll("link[rel=stylesheet]")].map(e => e.href),
  };
}
"""

DANGLING = """
[...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href"))
  .filter(href => href.startsWith("#") ? !document.getElementById(href.slice(1)) : /^file:/.test(href))
"""


class Chapter(NamedTuple):
    """One page of the book: where it is in `_toc.yml`, and what is printed of it."""

    key: str
    part: str
    depth: int
    title: str
    body: str


def contents() -> Iterator[tuple[str, str, int]]:
    """The pages in their order: the file without its ending, its part, and below how many others it stands."""
    yield TOC["root"], "", 0
    caption = ""
    for part in TOC["parts"]:
        caption = part.get("caption", caption)  # what has none goes on with the part before it
        yield from listed(part["chapters"], caption, 0)


def listed(pages: list[Any], part: str, depth: int) -> Iterator[tuple[str, str, int]]:
    for page in pages:
        if "file" in page:
            yield page["file"], part, depth
        yield from listed(page.get("sections", []), part, depth + 1)


def prefix(file: str) -> str:
    return re.sub(r"[^\w]+", "-", file.removeprefix("book/"))


def taken(tab: Any, built: Path, only: list[str]) -> tuple[list[Chapter], list[str], list[str]]:
    """All chapters, the rules of their equations, and the book's style sheets."""
    wanted = [row for row in contents() if not only or row[0] in only]
    known = {(built / f"{file}.html").as_uri()[7:]: prefix(file) for file, *_ in wanted}
    chapters: list[Chapter] = []
    rules: dict[str, None] = {}
    styles: dict[str, None] = {}
    for file, part, depth in wanted:
        tab.goto((built / f"{file}.html").as_uri())
        tab.evaluate(TYPESET)
        found = tab.evaluate(TAKE, [known, built.as_uri()])
        chapters.append(Chapter(prefix(file), part, depth, found["title"], found["body"]))
        rules |= dict.fromkeys(found["rules"])
        styles |= dict.fromkeys(found["styles"])
    return chapters, list(rules), list(styles)


def joined(chapters: list[Chapter], rules: list[str], styles: list[str]) -> str:
    """One document: its title, the contents, the chapters."""
    links = "".join(f'<link rel="stylesheet" href="{html.escape(s)}">' for s in styles)
    running = "".join(running_head(chapter) for chapter in chapters)
    articles = "".join(
        f'<article class="bd-article" id="{c.key}" style="page: {c.key}">{c.body}</article>'
        for c in chapters
    )
    title = html.escape(SETTINGS["title"])
    return (
        f'<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light"><head>'
        f'<meta charset="utf-8"><title>{title}</title>{links}'
        f"<style>{' '.join(rules)}</style><style>@page {{ size: A4 }} {running}</style></head>"
        f'<body class="whole-book"><section class="book-title"><p class="book-name">{title}</p>'
        f"<p>{html.escape(SETTINGS['author'])}</p><p>{about()}</p></section>"
        f"{table_of(chapters)}{articles}</body></html>"
    )


def running_head(chapter: Chapter) -> str:
    """The chapter's name above each of its pages."""
    name = " · ".join(filter(None, (chapter.part, chapter.title)))
    return f"@page {chapter.key} {{ @top-left {{ content: {json.dumps(name, ensure_ascii=False)} }} }}\n"


def table_of(chapters: list[Chapter]) -> str:
    """The table of contents; `numbered` fills in where each chapter begins."""
    lines, part = [], ""
    for c in chapters:
        if c.part != part:
            lines.append(f'<p class="book-part">{html.escape(c.part)}</p>')
            part = c.part
        lines.append(
            f'<p class="book-line depth-{c.depth}"><a href="#{c.key}">{html.escape(c.title)}</a>'
            f'<span class="book-dots"></span><a href="#{c.key}" data-page-of="{c.key}">000</a></p>'
        )
    return f'<nav class="book-contents"><p class="book-head">Contents</p>{"".join(lines)}</nav>'


def about() -> str:
    """When this was printed, and from which commit."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = f" from commit {done.stdout.strip()}" if done.returncode == 0 else ""
    return (
        f"Printed on {datetime.date.today():%-d %B %Y}{commit}. Code that a page folds away is left out "
        "unless the text asks for it; the notebooks have all of it."
    )


# The PDF ---------------------------------------------------------------------------------------


def destinations(pdf: bytes) -> dict[str, int]:
    """The named places of a PDF that Chromium wrote, and the number of the page each is on."""
    objects = {int(n): body for n, body in re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf, re.S)}
    catalog = next(body for body in objects.values() if b"/Type /Catalog" in body[:80])

    def reference(key: bytes) -> int:
        match = re.search(rb"/" + key + rb" (\d+) 0 R", catalog)
        if match is None:
            raise SystemExit(f"the PDF has no {key.decode()}; Chromium 131 or newer is needed")
        return int(match[1])

    def below(number: int) -> Iterator[int]:
        kids = re.search(rb"/Kids \[([^\]]*)\]", objects[number])
        if b"/Type /Pages" in objects[number] and kids:
            for kid in re.findall(rb"(\d+) 0 R", kids[1]):
                yield from below(int(kid))
        else:
            yield number

    order = {number: place for place, number in enumerate(below(reference(b"Pages")), 1)}
    named = re.findall(rb"/(\S*) \[(\d+) 0 R /XYZ", objects[reference(b"Dests")])
    return {name.decode(): order[int(page)] for name, page in named}


def links(pdf: bytes) -> tuple[list[str], list[str]]:
    """Where the links of a PDF that Chromium wrote lead: names of places in it, and addresses."""
    inside = [name.decode() for name in re.findall(rb"/Dest /(\S+)", pdf)]
    outside = [uri.decode("latin1") for uri in re.findall(rb"/URI \(((?:\\.|[^\\)])*)\)", pdf)]
    return inside, outside


def printed(tab: Any) -> bytes:
    """The document as it stands, with bookmarks, and with what readers aloud need."""
    return tab.pdf(prefer_css_page_size=True, print_background=True, outline=True, tagged=True)


def numbered(document: str, pages: dict[str, int]) -> str:
    """The document with the page of each chapter in its table of contents."""
    for key, page in pages.items():
        document = document.replace(f'data-page-of="{key}">000<', f'data-page-of="{key}">{page}<')
    return document


def write(built: Path, target: Path, only: list[str]) -> None:
    """Print the book built at a folder, or some pages of it, into a file, and say how large it is."""
    from playwright.sync_api import sync_playwright

    begun = time.monotonic()
    joint = target.with_suffix(".html")
    alone = "--host-resolver-rules=MAP * ~NOTFOUND"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[alone])
        tab = browser.new_page(viewport={"width": 1000, "height": 900})
        tab.set_default_timeout(PATIENCE)
        chapters, rules, styles = taken(tab, built, only)
        print(f"{len(chapters)} pages read after {time.monotonic() - begun:.0f} s", flush=True)
        document = joined(chapters, rules, styles)
        pages: dict[str, int] = {}
        moved: list[str] = []
        for _ in range(TIMES):
            joint.write_text(numbered(document, pages), "utf8")
            tab.goto("about:blank")
            tab.goto(joint.as_uri())  # anew: what was printed before may break its pages elsewhere
            if dangling := tab.evaluate(DANGLING):
                raise SystemExit(f"links of the book that lead nowhere in the PDF: {dangling[:10]}")
            pdf = printed(tab)
            target.write_bytes(pdf)
            places = destinations(pdf)
            if missing := [c.key for c in chapters if c.key not in places]:
                raise SystemExit(f"chapters without a place in the PDF: {missing}")
            moved = [c.key for c in chapters if pages.get(c.key) != places[c.key]]
            if not moved:
                break
            pages = {c.key: places[c.key] for c in chapters}
        browser.close()
    joint.unlink()
    count = len(re.findall(rb"/Type /Page\b", pdf))
    print(
        f"{target}: {count} pages, {len(pdf) / 1e6:.1f} MB, {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    if moved:
        raise SystemExit(f"its contents name another page than the one that begins {moved}")


if __name__ == "__main__":
    BUILT = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_build" / "html").resolve()
    TARGET = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "_build" / "book.pdf").resolve()
    if not (BUILT / "index.html").exists():
        raise SystemExit(f"no built book at {BUILT}: run `make book`")
    if not chromium():
        raise SystemExit("Chromium is not installed (Debian, Ubuntu: the package chromium)")
    write(BUILT, TARGET, sys.argv[3:])
