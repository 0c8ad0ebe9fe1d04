"""How hard each page is to read, in numbers: `python tools/pages.py [book/metric.ipynb ...]` prints a table.

statements   of Python, at any depth, in all code cells but the one that installs the package, folded or removed, too
in sight     lines of code that a reader sees without opening a bar
functions    that these cells define by `def`, but for methods and what stands in another function
words        of prose for each line of code in sight
numbers      most numbers that stand in one paragraph, or in one item of a list
wide         lines of code in sight of more than 76 columns
bars         folded cells in a row, at most
bookkeeping  cells in sight that record a result or glue numbers into the prose

Prose is running text, that of exercises, solutions and remarks too; it is not tables, equations, code, captions and
headings. A star marks what is beyond its limit, one of `LIMITS`; `tests/test_pages_measure.py` holds every page to them
but those that `book/ruff.toml` names as not yet written anew. `--pending` prints these.

`python tools/pages.py --built _build/html [metric ...]` lists what scrolls sideways on the built pages, in a browser
1,280 and 390 pixels wide.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
STYLE = tomllib.loads((BOOK / "ruff.toml").read_text("utf8"))
WIDTH: int = STYLE["line-length"]  # columns that fit beside the contents of a page at 1,280 pixels
PENDING = tuple(Path(name).stem for name in STYLE["extend-exclude"])  # not written anew yet
REWRITTEN = tuple(sorted({path.stem for path in BOOK.glob("*.ipynb")} - {*PENDING}))

CODE_PAGES = ("code", "mathematics")  # whose subject is the code
FOLDED = {"hide-input", "hide-cell"}
BARS = FOLDED | {"hide-output"}
INSTALLS = "%pip install"  # the cell that a page begins with, the same everywhere
GONE = {"remove-cell", "remove-input"}
BOOKKEEPING = {"glue", "record", "Entry", "Result"}


class Measure(NamedTuple):
    """What is counted on one page."""

    page: str
    statements: int
    in_sight: int
    functions: int
    words: float
    numbers: int
    wide: int
    bars: int
    bookkeeping: int


LIMITS: dict[str, tuple[float, float]] = {  # (least, most)
    "statements": (0, 160),
    "functions": (0, 7),
    "words": (10, float("inf")),
    "numbers": (0, 4),
    "wide": (0, 0),
    "bars": (0, 1),
    "bookkeeping": (0, 0),
}


def limits(page: str) -> dict[str, tuple[float, float]]:
    """The limits of one page."""
    return LIMITS | ({"statements": (0, 220)} if page in CODE_PAGES else {})


def beyond(found: Measure) -> list[str]:
    """What is outside of its limits on a page, as sentences."""
    return [
        f"{name}: {value:g}, expected {least:g} to {most:g}"
        for name, (least, most) in limits(found.page).items()
        if not least <= (value := getattr(found, name)) <= most
    ]


def measure(path: Path) -> Measure:
    """The numbers of one notebook."""
    cells = json.loads(path.read_text("utf8"))["cells"]
    met = [c for c in cells if not tags(c) & GONE]
    code = [(text(c), tags(c)) for c in met if c["cell_type"] == "code"]
    trees = [parsed(source, path) for source, _ in code]
    every = [text(c) for c in cells if c["cell_type"] == "code" and INSTALLS not in text(c)]
    whole = [parsed(source, path) for source in every]
    seen = [i for i, (_, held) in enumerate(code) if not held & FOLDED]
    lines = [line for i in seen for line in code[i][0].splitlines() if line.strip()]
    prose = [p for c in cells if c["cell_type"] == "markdown" for p in paragraphs(text(c))]
    return Measure(
        path.stem,
        sum(isinstance(node, ast.stmt) for tree in whole for node in ast.walk(tree)),
        len(lines),
        sum(len(list(defined(tree))) for tree in whole),
        sum(map(words, prose)) / max(1, len(lines)),
        max(map(numbers, prose), default=0),
        sum(len(line) > WIDTH for line in lines),
        in_a_row(c["cell_type"] == "code" and tags(c) & BARS for c in met),
        sum(keeps_books(trees[i]) for i in seen),
    )


# Code ------------------------------------------------------------------------------------------


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def parsed(source: str, path: Path) -> ast.Module:
    """Code as Python; a line of the notebook's own, `%` or `!`, is one statement."""
    return ast.parse(re.sub(r"(?m)^(\s*)(?:%%?|!)\w.*", r"\1pass", source), str(path))


def defined(node: ast.AST) -> Iterator[ast.AST]:
    """Functions that stand in no other and in no class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt) and not isinstance(child, ast.ClassDef):
            yield from defined(child)


def keeps_books(tree: ast.Module) -> bool:
    """Whether code records or glues. `claim`, `recorded_claim` and `equal` judge, and are to be seen."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(name, ast.Name) and name.id in BOOKKEEPING for name in calls)


def in_a_row(marks: Iterable[Any]) -> int:
    """The longest run of true marks."""
    longest = run = 0
    for mark in marks:
        run = run + 1 if mark else 0
        longest = max(longest, run)
    return longest


# Prose -----------------------------------------------------------------------------------------

FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})\s*(?:\{([\w:.-]+)\})?(.*)")
REMARKS = {  # directives that hold running text
    *("admonition", "attention", "caution", "danger", "dropdown", "epigraph", "error", "exercise"),
    *("grid", "grid-item", "grid-item-card", "hint", "important", "margin", "note", "seealso"),
    *("sidebar", "solution", "tab-item", "tab-set", "tip", "topic", "warning"),
}
NO_TEXT = re.compile(r"\||#{1,6}\s|%|\+\+\+|\([\w:.-]+\)=$|\{[.#][^}]*\}$|[-*_]{3,}$")
ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s+")


def paragraphs(prose: str) -> list[str]:
    """Paragraphs of running text, each item of a list as one."""
    prose = "\n".join(running(prose))
    prose = re.sub(r"(?s)\$\$.*?\$\$[^\n]*|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "\n\n", prose)
    found = [""]
    for line in map(str.strip, prose.splitlines()):
        if not line or NO_TEXT.match(line):
            found.append("")
        elif ITEM.match(line):
            found.append(ITEM.sub("", line, count=1))
        else:
            found[-1] += f" {line}"
    return [p.strip() for p in found if p.strip()]


def running(prose: str) -> Iterator[str]:
    """Lines without code and without directives, but for what stands in exercises and remarks."""
    fences: list[tuple[str, bool]] = []  # how each ends, and whether it holds running text
    options = False
    for line in prose.splitlines():
        mark, name, rest = match.groups() if (match := FENCE.fullmatch(line)) else ("", "", "")
        if fences and mark.startswith(fences[-1][0]) and not name and not rest.strip():
            fences.pop()
            yield ""
        elif not all(holds for _, holds in fences):
            continue
        elif mark and "`" not in rest:
            fences.append((mark, name in REMARKS or (name or "").startswith("prf:")))
            options = True
            yield ""
        elif not (options := options and bool(re.match(r"\s*:[\w-]+:", line))):
            yield line


def bare(paragraph: str) -> str:
    """A paragraph without equations, code, citations and targets of links; what is glued in is a 7."""
    paragraph = re.sub(r"\{glue:[^}]*\}`[^`]*`", " 7 ", paragraph)
    paragraph = re.sub(r"\{(?:term|doc|ref|numref|abbr)\}`([^`<]*)[^`]*`", r"\1", paragraph)
    paragraph = re.sub(r"(?:\{[^}\s]*\})?(`+).+?\1", " ", paragraph)
    paragraph = re.sub(r"\$[^$]*\$|\]\([^)]*\)|https?://\S+", " ", paragraph)
    return re.sub(r"<[^>]*>", " ", paragraph)


def words(paragraph: str) -> int:
    return len(re.findall(r"[^\W\d_][\w'’-]*", bare(paragraph)))


def numbers(paragraph: str) -> int:
    """Numbers in figures. One with its interval, or its power of ten, is one; `5-way 1-shot` and `CIFAR-100` are names."""
    paragraph = re.sub(r"\b\d+-way[\s,]+\d+-shot\b", "", bare(paragraph))
    paragraph = re.sub(r"(\d)\s*±\s*\d[\d.,]*", r"\1", paragraph)
    paragraph = re.sub(r"(\d)\s*[×·]\s*10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", r"\1", paragraph)
    return len(re.findall(r"(?<![\w.])(?<![^\W\d]-)[-−+]?\d[\d.,]*", paragraph))


# In the browser --------------------------------------------------------------------------------

WIDTHS = (1280, 390)
SIDEWAYS = r"""
(() => {
  const article = document.querySelector("article");
  article.querySelectorAll(".toggle-hidden").forEach(e => e.classList.remove("toggle-hidden"));
  const style = getComputedStyle(article);
  const edge = article.getBoundingClientRect().right - parseFloat(style.paddingRight);
  const column = article.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const kinds = {
    equation: "mjx-container[display=true], mjx-container:not([display]) > mjx-math",
    table: "table",
    code: "div.highlight:not(.cell_output .stream *, .cell_output .text_plain *) pre",
    output: ".cell_output pre",
    image: "img, svg, video, .animation",
    word: "code, a:not(.headerlink)",
  };
  const found = [], seen = new Set();
  const scrolls = e => /auto|scroll|hidden/.test(getComputedStyle(e).overflowX);
  for (const [kind, selector] of Object.entries(kinds))
    for (const e of article.querySelectorAll(selector)) {
      if (!e.checkVisibility() || e.closest("mjx-assistive-mml")) continue;
      if (kind == "word" && e.closest("pre, table")) continue;
      const place = e.getBoundingClientRect();
      let box = e;
      while (box != article && !scrolls(box)) box = box.parentElement;
      const held = e.tagName == "MJX-MATH" ? place.width - column : box.scrollWidth - box.clientWidth;
      const over = Math.round(box == article ? place.right - edge : held);
      if (over <= 2 || seen.has(box)) continue;
      if (box != article) seen.add(box);
      const about = e.alt || (e.closest("mjx-container") || e).textContent;
      found.push([kind, over, about.trim().slice(0, 60)]);
    }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth)
    found.push(["page", page.scrollWidth - page.clientWidth, document.title]);
  return found;
})()
"""
"""What is wider than its place on a built page, with its solutions opened: [kind, pixels too many, how it begins].

It scrolls in a box of its own, or stands out of the column of text. A formula within a line is measured against the
column: its box says that it scrolls where it does not.
"""
TYPESET = "window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1"


def chromium() -> str | None:
    """The machine's own browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


def sideways(built: Path, pages: list[str]) -> None:
    """Print what scrolls sideways on the built pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        for width in WIDTHS:
            size = {"width": width, "height": 900}
            tab = browser.new_page(viewport=size, is_mobile=width < 600)
            for page in pages or sorted(p.stem for p in (built / "book").glob("*.html")):
                tab.goto((built / "book" / f"{page}.html").resolve().as_uri())
                tab.evaluate(TYPESET)
                found = tab.evaluate(SIDEWAYS)
                kinds = Counter(kind for kind, _, _ in found)
                print(
                    f"{page} at {width}:", ", ".join(f"{n} {k}" for k, n in kinds.items()) or "fits"
                )
                for kind, over, beginning in found:
                    print(f"    {kind:9}{over:>5} pixels  {' '.join(beginning.split())}")
        browser.close()


def table(paths: list[Path]) -> None:
    """Print the numbers of pages."""
    names = Measure._fields[1:]
    found = [measure(path) for path in paths]
    print(f"{'page':18}" + "".join(f"{name:>12} " for name in names))
    for row in found:
        marks = {sentence.partition(":")[0] for sentence in beyond(row)}
        shown = [f"{v:.1f}" if isinstance(v, float) else str(v) for v in row[1:]]
        starred = zip(shown, ("*" if name in marks else " " for name in names), strict=True)
        print(f"{row.page:18}" + "".join(f"{value:>12}{star}" for value, star in starred))
    print(f"{'sum':18}{sum(row.statements for row in found):>12}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--pending"]:
        print("".join(f"book/{page}.ipynb\n" for page in PENDING), end="")
    elif arguments[:1] == ["--built"]:
        sideways(Path(arguments[1]), [Path(name).stem for name in arguments[2:]])
    else:
        table([Path(name) for name in arguments] or sorted(BOOK.glob("*.ipynb")))


if __name__ == "__main__":
    main(sys.argv[1:])
