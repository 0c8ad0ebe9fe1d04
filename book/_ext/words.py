"""Search that finds `MAML++`, `θ` and 元学习, each as it is written.

Sphinx cuts a text at whatever is no letter: of `MAML++` it keeps MAML, and of an equation the letters of its LaTeX.
Here two pluses at a word's end stay with it, in the index and in a question, and `\\theta` is found as θ, too. The Chinese
words that open the glossary's explanations become entries of the index, which the search lists first.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.search.en import SearchEnglish
from sphinx.transforms import SphinxTransform

NAMES = (
    "alpha beta gamma delta epsilon eta theta kappa lambda mu pi rho sigma tau phi chi psi omega"
)
GREEK = {
    name: unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}")
    for name in NAMES.split()
}
COMMAND = re.compile(rf"\\(?:var)?({'|'.join(GREEK)})(?![a-z])")
GLOSSARY = "book/glossary"
CHINESE = re.compile(r"^\s*\(([^)]*[\u4e00-\u9fff][^)]*)\)")


class English(SearchEnglish):
    """English, with names that end in two pluses, and Greek letters of equations."""

    js_splitter_code = (
        r"var splitQuery = query => query.match("
        r"/[\p{Letter}\p{Number}_\p{Emoji_Presentation}]+(?:\+\+(?![\p{Letter}\p{Number}_+]))?/gu"
        r") || [];"
    )

    def split(self, text: str) -> list[str]:
        found = re.findall(r"\w+", text) + re.findall(r"\w+\+\+(?![\w+])", text)
        return found + [GREEK[name] for name in COMMAND.findall(text)]


class ChineseEntries(SphinxTransform):
    """An entry of the index for the Chinese word of each term of the glossary."""

    default_priority = 800  # before the entries are collected

    def apply(self, **_: Any) -> None:
        for item in self.document.findall(nodes.definition_list_item):
            terms = [n for n in item.children if isinstance(n, nodes.term)]
            said = CHINESE.match(item[-1].astext()) if terms and terms[0]["ids"] else None
            if said:
                entry = ("single", said[1], terms[0]["ids"][0], "main", None)
                terms[0].append(addnodes.index(entries=[entry]))


def outdated(app: Any, env: Any, added: set, changed: set, removed: set) -> list[str]:
    """Sphinx forgets entries of pages that a build does not write: the glossary is always written."""
    return [page for page in env.found_docs if page == GLOSSARY]


def setup(app: Any) -> dict[str, bool]:
    app.add_search_language(English)
    app.add_transform(ChineseEntries)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
