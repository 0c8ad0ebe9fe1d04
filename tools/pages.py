"""How hard each page is to read, in numbers: `python tools/pages.py [book/metric.ipynb ...]` prints a table.

statements   of Python, at any depth, in all code cells, folded or not
in sight     lines of code that a reader sees without opening a bar
functions    that the page defines, at the top of a cell
words        of prose for each line of code in sight
numbers      most numbers that stand in one paragraph; equations, links and code are left out
wide         lines of code in sight of more than 76 columns
bars         folded cells in a row, at most
bookkeeping  cells in sight that record a result or glue numbers into the prose

The limits are those of `LIMITS`. `tests/test_project.py` holds the pages of `REWRITTEN` to them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 76  # columns that fit beside the contents of a page at 1,280 pixels
CODE_PAGES = ("code", "mathematics")  # whose subject is the code
FOLDED = {"hide-input", "hide-cell"}
GONE = {"remove-cell", "remove-input"}
REWRITTEN: tuple[str, ...] = ()
"""Pages that were written anew within the limits. A page joins when it is."""


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


def measure(path: Path) -> Measure:
    """The numbers of one notebook."""
    cells = [(c["cell_type"], "".join(c["source"]), tags(c)) for c in read(path)["cells"]]
    code = [(text, held) for kind, text, held in cells if kind == "code" and not held & GONE]
    seen = [text for text, held in code if not held & FOLDED]
    lines = [line for text in seen for line in text.splitlines() if line.strip()]
    trees = [ast.parse(plain(text)) for text, _ in code]
    prose = "\n\n".join(text for kind, text, _ in cells if kind == "markdown")
    return Measure(
        path.stem,
        sum(isinstance(node, ast.stmt) for tree in trees for node in ast.walk(tree)),
        len(lines),
        sum(isinstance(node, ast.FunctionDef) for tree in trees for node in tree.body),
        len(words(prose)) / max(1, len(lines)),
        max(map(numbers, paragraphs(prose)), default=0),
        sum(len(line) > WIDTH for line in lines),
        in_a_row(held & FOLDED for _, held in code_of(cells)),
        sum(bool(re.search(r"\b(glue|record|Entry|Result)\(", text)) for text in seen),
    )


def limits(page: str) -> dict[str, tuple[float, float]]:
    """The limits of one page."""
    return LIMITS | ({"statements": (0, 220)} if page in CODE_PAGES else {})


def beyond(found: Measure) -> list[str]:
    """What is outside of its limits on a page, as sentences."""
    held = limits(found.page)
    return [
        f"{name}: {value:g}, expected {least:g} to {most:g}"
        for name, (least, most) in held.items()
        if not least <= (value := getattr(found, name)) <= most
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf8"))


def tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def plain(text: str) -> str:
    """Code without the lines that are the notebook's own, `%` and `!`."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("%", "!")))


def code_of(cells: list[tuple[str, str, set[str]]]) -> list[tuple[str, set[str]]]:
    """Cells in the order in which a reader meets them, prose as a cell without tags; removed ones are not met."""
    return [
        (text, held if kind == "code" else set()) for kind, text, held in cells if not held & GONE
    ]


def in_a_row(marks: Any) -> int:
    """The longest run of true marks."""
    longest = run = 0
    for mark in marks:
        run = run + 1 if mark else 0
        longest = max(longest, run)
    return longest


def paragraphs(prose: str) -> list[str]:
    """Paragraphs of running text: no tables, equations, code, directives or headings."""
    prose = re.sub(
        r"(?ms)^(`{3,}|~{3,}|:{3,})\{(math|code-block|code-cell|figure|list-table|table).*?^\1",
        "",
        prose,
    )
    prose = re.sub(r"(?ms)^```.*?^```|^\$\$.*?^\$\$[^\n]*", "", prose)
    found = [p.strip() for p in re.split(r"\n\s*\n", prose)]
    return [p for p in found if p and not p.startswith(("|", "#", ":", "`" * 3))]


def words(prose: str) -> list[str]:
    """Words of the running text, list items and solutions too."""
    return re.findall(r"[^\W\d_][\w'’-]*", " ".join(map(bare, paragraphs(prose))))


def bare(text: str) -> str:
    """A paragraph without equations, code, targets of links and citations; what is glued in stays, as a 7."""
    text = re.sub(r"\{glue:[^}]*\}`[^`]*`", " 7 ", text)
    text = re.sub(r"\{(?:cite|eq|numref|ref|doc|prf:ref)[^}]*\}`[^`]*`", " ", text)
    text = re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|https?://\S+", " ", text)
    return re.sub(r"<[^>]*>", " ", text)


def numbers(paragraph: str) -> int:
    """Numbers in figures; `5-way 1-shot`, years, and a number with its interval count as one each."""
    text = re.sub(r"\b\d+-way\s+\d+-shot\b", "", bare(paragraph))
    text = re.sub(r"(\d)\s*±\s*[\d.]+", r"\1", text)
    return len(re.findall(r"(?<![\w.])[-−+]?\d[\d.,]*", text))


def main(paths: list[str]) -> None:
    files = [Path(p) for p in paths] or sorted((ROOT / "book").glob("*.ipynb"))
    print(f"{'page':18}" + "".join(f"{name:>13}" for name in Measure._fields[1:]))
    found = [measure(p) for p in files]
    for m in found:
        marks = {text.partition(":")[0] for text in beyond(m)}
        shown = (f"{v:.1f}" if isinstance(v, float) else v for v in m[1:])
        names = Measure._fields[1:]
        print(
            f"{m.page:18}"
            + "".join(f"{v}{'*' if n in marks else ' '}".rjust(13) for n, v in zip(names, shown))
        )
    print(f"{'sum':18}{sum(m.statements for m in found):>12}")


if __name__ == "__main__":
    main(sys.argv[1:])
