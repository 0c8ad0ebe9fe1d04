"""What leads into the book: the question of each page, an index of these, and figures that stand on two pages.

`question` finds it where a page begins, so nobody keeps a list. `sharing` makes the descriptions of them.

    ```{questions}
    ```

lists every chapter under its part, with its question. A figure of another page is shown again, with a caption of its
own and without a number, by

    ```{figure-of} background fig-background-steps
    One new sine wave, ...
    ```

With `:halves:` a phone shows its left part and, below, its right one, each as wide as the screen: `door.css` has where
each figure is cut.

Pages that show something of others are read anew in each build: `SHOWS_OTHERS`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

SHOWS_OTHERS = re.compile(r"book/(index|pages|faq|quiz|part_\w+)")
LEADS = 4  # paragraphs in which a page says what it asks
LEAST, MOST = 20, 300  # characters of a description


# Questions -------------------------------------------------------------------------------------


def question(tree: nodes.document) -> str:
    """What a page asks at its beginning; without a question mark there, its first sentences; "" without a text."""
    top = next(tree.findall(nodes.section), None)
    if top is None:
        return ""
    said = []
    for node in top.children:
        if isinstance(node, nodes.section):
            break
        if isinstance(node, nodes.paragraph) and (text := " ".join(node.astext().split())):
            said.append(re.sub(r"^The question\. ", "", text))
    for text in said[:LEADS]:
        if "?" in text and len(text) >= LEAST:
            return text[: text.rindex("?") + 1]
    return sentences(said[0]) if said else ""


def sentences(text: str, most: int = MOST) -> str:
    """As many whole sentences as fit; of a first one that is too long, its beginning."""
    kept = ""
    for sentence in re.split(r"(?<=[.?!:])\s+", text):
        if len(kept) + len(sentence) + 1 > most:
            break
        kept = f"{kept} {sentence}".strip()
    return (kept or f"{text[: most - 1].rsplit(' ', 1)[0]}…").removesuffix(":")


def keep(app: Any, tree: nodes.document) -> None:
    app.env.metadata[app.env.docname]["question"] = question(tree)


def outdated(app: Any, env: Any, added: set, changed: set, removed: set) -> list[str]:
    return [page for page in env.found_docs if SHOWS_OTHERS.fullmatch(page)]


# The index -------------------------------------------------------------------------------------


class Questions(SphinxDirective):
    """Every chapter under its part, with what it asks."""

    def run(self) -> list[nodes.Node]:
        return [nodes.container(classes=["page-questions"])]


def fill(app: Any, tree: nodes.document, page: str) -> None:
    for place in list(tree.findall(nodes.container)):
        if "page-questions" not in place["classes"]:
            continue
        place.children = []
        for part, first, chapters in parts(app.env):
            head = make_refnode(app.builder, page, first, "", nodes.Text(part))
            rows = nodes.bullet_list()
            for chapter in chapters:
                title = nodes.strong("", app.env.titles[chapter].astext())
                link = make_refnode(app.builder, page, chapter, "", title)
                asked = nodes.inline("", app.env.metadata[chapter].get("question", ""))
                rows += nodes.list_item("", nodes.paragraph("", "", link, nodes.Text(" "), asked))
            place += [nodes.rubric("", "", head), rows]


def parts(env: Any) -> list[tuple[str, str, list[str]]]:
    """Of each part with numbered chapters: its name, its own page, and its chapters.

    In `_toc.yml` a part is two lists: one with its name and its page, and one with its chapters, which have numbers.
    """
    lists = [
        (toctree, [file for _, file in toctree["entries"] if file in env.titles])
        for toctree in env.get_doctree(env.config.root_doc).findall(addnodes.toctree)
    ]
    return [
        (head.get("caption") or env.titles[files[0]].astext(), files[0], chapters)
        for (head, files), (toctree, chapters) in itertools.pairwise(lists)
        if toctree.get("numbered") and files and chapters
    ]


# Figures ---------------------------------------------------------------------------------------


class FigureOf(SphinxDirective):
    """A page, the name of a figure there, and a caption: the figure, with the text alternative that it has there."""

    required_arguments = 2
    has_content = True
    option_spec: ClassVar = {"halves": directives.flag}

    def run(self) -> list[nodes.Node]:
        page, name = self.arguments
        halves = "halves" in self.options
        classes = ["figure-of", *["in-halves"] * halves]
        figure = nodes.figure(classes=classes, page=f"book/{page}", of=name)
        self.set_source_info(figure)
        held = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, held)
        if len(held) != 1 or not isinstance(held[0], nodes.paragraph):
            raise self.error("figure-of: expected a caption of one paragraph")
        figure += nodes.caption("", "", *held[0].children)
        return [figure]


class ShowFigures(SphinxPostTransform):
    """Put the picture in once all pages are read."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        for figure in self.document.findall(nodes.figure):
            if "of" in figure:
                picture = image(self.env, figure["page"], figure["of"])
                figure.insert(0, picture)
                if "in-halves" in figure["classes"]:  # hidden but on a phone
                    right = picture.deepcopy()
                    right["alt"] = "The right part of the same picture."
                    right["classes"] = [*right["classes"], "right-half"]
                    figure.insert(1, right)
                figure["ids"] = [f"of-{figure['of']}"]  # one of its own: it gets no number


def image(env: Any, page: str, name: str) -> nodes.image:
    """The first picture of a figure of another page."""
    for figure in env.get_doctree(page).findall(nodes.figure):
        if name in (*figure["ids"], *figure["names"]):
            picture = next(figure.findall(nodes.image)).deepcopy()
            if not picture.get("alt"):
                raise ExtensionError(f"{name} of {page} has no text alternative")
            return picture
    raise ExtensionError(f"expected a figure {name!r} on {page}")


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("questions", Questions)
    app.add_directive("figure-of", FigureOf)
    app.add_post_transform(ShowFigures)
    app.connect("doctree-read", keep)
    app.connect("env-get-outdated", outdated)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
