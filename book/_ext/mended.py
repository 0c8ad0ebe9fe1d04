"""What the theme and its extensions leave to mend in the pages they wrote: names, tables, lists, and what loads in vain.

`mended` takes a page and gives it back; after a build every page is read and, where that changes it, written again.
`lean` leaves of Font Awesome, two thousand pictures in one script, those that the book shows. Our own styles for
legibility and for paper come last.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ICON = re.compile(r'"?([\w-]+)"?:\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?')
ICONS = "scripts/fontawesome.js"
STYLES = ("access.css", "paper.css")

# Searching happens on one page; the others need neither its programs nor the index of all words.
SEARCHES = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>'
)
BELOW = re.compile(
    r'(<a class="[^"]*reference internal" href="[^"]*">)(.*?)(</a><details[^>]*><summary)>'
)
# The name of a folded cell's bar is what stands on it.
BAR = re.compile(r'<summary aria-label="Toggle hidden content">')
# The key beside "Search" belongs to the name.
SEARCH_BUTTON = re.compile(r'(<button class="[^"]*search-button-field[^>]*?)\s+aria-label="Search"')
# Parameters, one a line, are no list of words and their meanings.
PARAMETERS = re.compile(r'<dl>(?=\s*<dd><em class="sig-param">)')
# Entries of a bibliography stand in a list whose items are none.
ENTRIES = re.compile(r' role="(?:list|doc-biblioentry)"(?= class="citation-list"|>)')
CORNER = re.compile(r"<th(?= |>)([^>]*)>(\s*(?:<p>\s*</p>)?\s*)</th>")


def named(match: re.Match[str]) -> str:
    link, title, rest = match.groups()
    text = html.escape(html.unescape(re.sub(r"<[^>]*>", "", title)), quote=True)
    return f'{link}{title}{rest} aria-label="Pages below {text}">'


def mended(text: str, page: str) -> str:
    """The HTML of a page, with names for what opens, cells without a heading as such, and no scripts in vain."""
    if page != "search":
        text = SEARCHES.sub("", text)
    text = BELOW.sub(named, text)
    text = BAR.sub("<summary>", text)
    text = SEARCH_BUTTON.sub(r"\1", text)
    text = ENTRIES.sub("", text)
    text = PARAMETERS.sub('<dl role="presentation">', text)
    return CORNER.sub(r"<td\1>\2</td>", text)


def lean(icons: str, used: set[str]) -> str:
    """Font Awesome's script without the pictures that nobody shows; as it was where it is written otherwise."""

    def keep(match: re.Match[str]) -> str:
        names = {match[1], *re.findall(r'"([\w-]+)"', match[2])}
        return match[0] if names & used else ""

    return ICON.sub(keep, icons)


def mend(app: Any, exception: Exception | None) -> None:
    """After a build: every page, then the pictures."""
    if exception or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    used: set[str] = set()
    for path in sorted(folder.rglob("*.html")):
        text = path.read_text("utf8")
        better = mended(text, path.relative_to(folder).with_suffix("").as_posix())
        if better != text:
            path.write_text(better, "utf8")
        used.update(re.findall(r"\bfa-([\w-]+)", better))
    for path in folder.glob("_static/**/*.js"):
        if path.name != Path(ICONS).name:
            used.update(re.findall(r"\bfa-([\w-]+)", path.read_text("utf8")))
    icons = folder / "_static" / ICONS
    if icons.exists():
        icons.write_text(lean(icons.read_text("utf8"), used), "utf8")


def setup(app: Any) -> dict[str, bool]:
    for name in STYLES:
        app.add_css_file(name, priority=900)
    app.add_js_file("paper.js", loading_method="defer")
    app.connect("build-finished", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
