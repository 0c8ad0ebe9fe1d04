"""The second set of notebooks, `_build/notebooks`: the pages with their numbers, for Jupyter, Colab and GitHub.

A page's source holds roles and directives, which these viewers show raw. `Converter` turns the text of a cell into
plain Markdown, with a little HTML, and asks a `Lookup` for what only the whole book knows. `Built` is the lookup of a
build: the numbers of figures and equations, the names of citations and the links are those of the built page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urljoin

import nbformat
import pybtex.plugin
from docutils import nodes
from jupyter_cache import get_cache
from sphinx.addnodes import pending_xref
from sphinx.util import logging

from own_address import address

MIME = "application/papermill.record/"  # of what is glued
LOG = logging.getLogger(__name__)
FOLDER = "notebooks"  # beside the HTML
CHARACTERS = re.compile(r"([\\`*_\[\]<$|])")


# From MyST to Markdown --------------------------------------------------------------------------


class Lookup(Protocol):
    """What a cell's text needs of the book; a KeyError where the book has it not."""

    def role(self, role: str, text: str) -> str:
        """A role, as Markdown."""

    def link(self, text: str, target: str) -> str:
        """A link to another page or to a label, as Markdown."""

    def number(self, label: str) -> str:
        """What an equation, a figure, an exercise or a theorem is called: `(2.1)`, `Fig. 3`."""

    def picture(self, name: str) -> str:
        """A glued figure, as the address of an image."""


class Block(NamedTuple):
    """A directive: ```{name} argument, its options and the lines that it holds."""

    name: str
    argument: str
    options: dict[str, str]
    body: str


FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,}|:{3,})(?P<info>.*)")
DIRECTIVE = re.compile(r"\{(?P<name>[\w:+.-]+)\}(?P<argument>.*)")
OPTION = re.compile(r":([\w-]+):\s*(.*)")
EQUATION = re.compile(r"(?P<indent>[ \t]*)\$\$(?P<rest>.*)")
END = re.compile(r"(?P<last>.*?)\$\$[ \t]*(?:\((?P<label>[\w:.-]+)\))?[ \t]*")
LABEL = re.compile(r"\([\w:.-]+\)=[ \t]*")  # a place to refer to
SAME = r"(?:(?!\n[ \t]*\n)[\s\S])"  # a character of the same paragraph
INLINE = re.compile(
    r"\\."  # what is escaped
    rf"|\{{(?P<role>[\w:+.-]+)\}}(?P<tick>`+)(?P<text>{SAME}+?)(?<!`)(?P=tick)(?!`)"
    rf"|(?P<code>`+)(?!`){SAME}+?(?<!`)(?P=code)(?!`)"
    r"|(?<!\$)\$(?!\$)(?:\\.|(?!\n[ \t]*\n)[^$\\])+\$"
    r"|(?<!!)\[(?P<words>[^\]\[]*)\]\((?P<target>[^()\s]*)\)"
)
BUTTON = "check it by the button or with Enter. Each answer has its reason."
FOLDED = "then unfold what stands below: each answer has its reason."
TITLES = {"prf:proof": "Proof"}  # of directives without a number


class Converter:
    """Turns the Markdown of MyST into one that any viewer of notebooks shows."""

    def __init__(self, lookup: Lookup, base: str = "") -> None:
        self.lookup, self.base = lookup, base  # where the published pages are, if that is known

    def __call__(self, text: str) -> str:
        parts = (part.strip("\n") for part in self.parts(text.splitlines()))
        return "\n\n".join(part for part in parts if part.strip())

    def parts(self, lines: list[str]) -> Iterator[str]:
        """The text in pieces: prose, programs, equations and directives, each turned by itself."""
        prose: list[str] = []
        i = 0
        while i < len(lines):
            stop, line, made = i, lines[i], ""
            if fence := FENCE.fullmatch(line):
                stop = closing(lines, i, fence)
                made = self.fenced(fence, lines[i : stop + 1])
            elif equation := EQUATION.fullmatch(line):
                stop, made = self.equation(lines, i, equation)
            elif not (LABEL.fullmatch(line) or line.startswith(("% ", "+++"))):  # not shown
                prose.append(line)
            if made:
                yield self.prose(prose)
                yield made
            i = stop + 1
        yield self.prose(prose)

    def prose(self, lines: list[str]) -> str:
        """Empties `lines`: paragraphs, lists and tables, which keep their form."""
        text = INLINE.sub(self.inline, "\n".join(lines).replace(BUTTON, FOLDED))
        lines.clear()
        return text

    def inline(self, found: re.Match[str]) -> str:
        if found["role"]:
            return self.lookup.role(found["role"], found["text"])
        if found["target"] and not re.match(r"(https?|mailto):", found["target"]):
            return self.lookup.link(found["words"], found["target"])
        return found[0]

    def equation(self, lines: list[str], first: int, begin: re.Match[str]) -> tuple[int, str]:
        """The last line of an equation, and the equation with its number."""
        inner = [begin["rest"], *lines[first + 1 :]]
        for i, line in enumerate(inner):
            if end := END.fullmatch(line):
                math = "\n".join([*inner[:i], end["last"]]).strip()
                if label := end["label"]:
                    math += f" \\tag{{{self.lookup.number(label).strip('()')}}}"
                indent = begin["indent"]
                return first + i, f"{indent}$$\n{math}\n{indent}$$"
        raise ValueError(f"expected $$ after {lines[first]!r}")

    def fenced(self, fence: re.Match[str], lines: list[str]) -> str:
        """A program as it stands; a directive as what it shows."""
        directive = DIRECTIVE.fullmatch(fence["info"].strip())
        if not directive:
            return "\n".join(lines)
        indent = fence["indent"]
        inner = [line.removeprefix(indent) for line in lines[1:-1]]
        options = {}
        while inner and (option := OPTION.fullmatch(inner[0])):
            options[option[1]] = option[2]
            inner = inner[1:]
        block = Block(
            directive["name"], directive["argument"].strip(), options, "\n".join(inner).strip("\n")
        )
        return "\n".join((indent + line).rstrip() for line in self.directive(block).splitlines())

    def directive(self, block: Block) -> str:
        name = block.name
        if name == "exercise":
            return headed(self.titled(block), self(block.body))
        if name == "solution":
            title = f"Solution to {self.lookup.number(block.argument)}"
            return folded(title, self(block.body))
        if name == "glue:figure":
            alt = block.options.get("alt", "").replace("[", "(").replace("]", ")")
            picture = f"![{alt}]({self.lookup.picture(block.argument)})"
            return f"{picture}\n\n{self.caption(block.options['name'], block.body)}"
        if name.startswith("prf:"):
            return quoted(headed(self.titled(block), self(block.body)))
        if name in ADMONITIONS:
            title = self(block.argument) if name in ("admonition", "topic") else ADMONITIONS[name]
            body = (
                block.body if name in ("admonition", "topic") else f"{block.argument}\n{block.body}"
            )
            return quoted(f"**{title}**\n\n{self(body.strip())}")
        if name == "selftest":
            return self.selftest(block)
        raise ValueError(f"expected a directive that notebooks know, got {name!r}: add it here")

    def selftest(self, block: Block) -> str:
        """A question with its options; which are right, and why, is folded."""
        asked, *rest = re.split(r"(?m)^- \[([ x])\] ", block.body)
        options, reasons = [], []
        for i, (mark, text) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
            letter, (option, _, reason) = "ABCDEF"[i], text.partition("\n  - ")
            options.append(f"- {letter}. {' '.join(option.split())}")
            said = " ".join(reason.split())
            reasons.append(f"- {letter}. **{'Right' if mark == 'x' else 'No'}.** {said}")
        shown = [self("\n".join(lines)) for lines in ([asked.strip(), "", *options], reasons)]
        return folded("Answers and reasons", shown[1], above=f"{shown[0]}\n\n")

    def titled(self, block: Block) -> str:
        """`Exercise 3`, `Theorem 1 (The hinge)`."""
        label = block.options.get("label")
        called = TITLES.get(block.name) or self.lookup.number(label or "")
        return called + f" ({self(block.argument)})" * bool(block.argument)

    def by_hand(self, shown: str) -> str:
        """A figure that answers the hand, its links to other pages led to the published ones."""
        if not self.base:
            return shown
        there = shown.replace(
            '<div class="mtlib-hand"', f'<div data-base="{self.base}" class="mtlib-hand"'
        )
        return re.sub(r'<a href="(?=[^"]*" data-page=)', f'<a href="{self.base}', there)

    def caption(self, name: str, text: str) -> str:
        return f"*{self.lookup.number(name)}.* {self(text)}"


KINDS = "admonition topic note tip hint important warning caution danger error attention"
ADMONITIONS = {name: name.capitalize() for name in KINDS.split()} | {"seealso": "See also"}


def closing(lines: list[str], first: int, fence: re.Match[str]) -> int:
    """The line that closes a fence: as many marks, or more, and nothing else; a program may go on to the end."""
    mark = fence["mark"]
    pattern = re.compile(rf"[ \t]{{0,{len(fence['indent']) + 3}}}{mark[0]}{{{len(mark)},}}[ \t]*")
    for i in range(first + 1, len(lines)):
        if pattern.fullmatch(lines[i]):
            return i
    if DIRECTIVE.match(fence["info"].strip()):
        raise ValueError(f"expected {mark} to close {lines[first]!r}")
    return len(lines) - 1


def headed(title: str, text: str) -> str:
    """A title in the first line of a paragraph; above a list, a program or an equation it stands alone."""
    alone = re.match(r"(?:[-*+]|\d+[.)])\s|[|>`~$]{2,}|\|", text)
    return f"**{title}.**" + ("\n\n" if alone else " ") + text


def quoted(text: str) -> str:
    """A quotation. Its equations lie in one line each: viewers that look for them first would read `>` as a part."""
    text = re.sub(
        r"^([ \t]*)\$\$\n(.*?)\n[ \t]*\$\$$",
        lambda m: f"{m[1]}$${' '.join(m[2].split())}$$",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def folded(title: str, text: str, above: str = "") -> str:
    return f"{above}<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return CHARACTERS.sub(r"\\\1", text)


# From the page to the notebook ------------------------------------------------------------------


def notebook(page: dict[str, Any], convert: Converter, own: str, note: str) -> dict[str, Any]:
    """The notebook that reads as the page does; `note` stands below its title, and `own` is the book's address."""
    cells = []
    for cell in page["cells"]:
        if cell["cell_type"] == "code":
            cells += code(cell, convert)
        else:
            cells.append(markdown(cell["id"], convert(joined(cell["source"]))))
    first = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
    installing = cells.pop(first)
    installing["metadata"] = {}
    installing["source"] = address.install(installing["source"], own or None)
    title = next(cell for cell in cells if cell["cell_type"] == "markdown")
    head, _, rest = title["source"].partition("\n")
    title["source"] = f"{head}\n\n{note}\n{rest}".rstrip("\n")
    about = page["metadata"]
    metadata = {k: about[k] for k in ("kernelspec", "language_info") if k in about}
    return {
        "cells": [installing, *cells],
        "metadata": metadata,
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def joined(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def markdown(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(cell: dict[str, Any], convert: Converter) -> list[dict[str, Any]]:
    """A cell of code, with its outputs; below it the caption of its figure."""
    tags, about = cell["metadata"].get("tags", []), cell["metadata"].get("mystnb", {})
    folded = {"hide-input", "remove-input", "remove-cell"} & {*tags}
    hidden = {"remove-cell", "remove-output"} & {*tags}
    alt = about.get("image", {}).get("alt")
    made = {
        "cell_type": "code",
        "execution_count": cell.get("execution_count"),
        "id": cell["id"],
        "metadata": {"jupyter": {"source_hidden": True}} if folded else {},
        "outputs": [o for old in cell["outputs"] if not hidden for o in output(old, convert, alt)],
        "source": joined(cell["source"]),
    }
    figure = about.get("figure", {})
    if "caption" not in figure:
        return [made]
    return [
        made,
        markdown(f"{cell['id']}-caption"[:64], convert.caption(figure["name"], figure["caption"])),
    ]


def output(old: dict[str, Any], convert: Converter, alt: str | None) -> Iterator[dict[str, Any]]:
    """An output as the page shows it, with a text alternative for its image; none for what is glued."""
    if "data" not in old:
        if old.get("name") != "stderr":  # the page has none
            yield old
        return
    data = {kind: value for kind, value in old["data"].items() if not kind.startswith(MIME)}
    metadata = {k: v for k, v in old.get("metadata", {}).items() if k in data}
    if "text/markdown" in data:
        data["text/markdown"] = convert(joined(data["text/markdown"]))
    if "text/html" in data:
        data["text/html"] = convert.by_hand(joined(data["text/html"]))
    if alt and "image/png" in data:
        metadata["image/png"] = {**metadata.get("image/png", {}), "alt": alt}
    if data:
        yield {**old, "data": data, "metadata": metadata}


def glued(page: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a page keeps for its prose: name -> what is shown, by its kind."""
    found = {}
    for cell in page["cells"]:
        for shown in cell.get("outputs", ()):
            if name := shown.get("metadata", {}).get("scrapbook", {}).get("name"):
                data = shown["data"].items()
                found[name] = {kind.removeprefix(MIME): joined(value) for kind, value in data}
    return found


# What the build knows ---------------------------------------------------------------------------


class Built:
    """The lookup of one page of a build."""

    def __init__(self, app: Any, page: str, values: dict[str, Any]) -> None:
        self.app, self.env, self.page, self.values = app, app.env, page, values
        cite = app.env.get_domain("cite")
        self.papers = {c.citation_id: c.entry for c in cite.citations}

    def role(self, role: str, text: str) -> str:
        if role.startswith("glue:"):
            if text not in self.values:
                LOG.warning(
                    f"{self.page}: no value {text!r} was glued", type="mystnb", subtype="glue"
                )
                return "?"
            return plain(self.values[text]["text/plain"].strip("'\""))
        explicit = re.fullmatch(r"(.+?)\s*<([^<>]+)>", text, re.DOTALL)
        words, target = (explicit[1], explicit[2]) if explicit else (text, text)
        shown = self.shown(self.found(role, target, words, bool(explicit)))
        if role.startswith("cite"):  # beside a link, square brackets are hard to read
            shown = shown.replace("\\[", "(").replace("\\]", ")")
        return shown

    def link(self, text: str, target: str) -> str:
        if (
            target.startswith("#") and text
        ):  # a heading of this page: each viewer names these its own way
            return text
        path, _, place = target.partition("#")
        page = re.sub(r"\.(ipynb|md)$", "", path)
        if page != path:
            found = self.found("doc", page, text or page, bool(text))
            if place and isinstance(found, nodes.reference):
                found["refuri"] = f"{found['refuri'].partition('#')[0]}#{place}"
            return self.shown(found)
        return self.shown(self.found("ref", place or path, text, bool(text)))

    def number(self, label: str) -> str:
        if label in self.env.get_domain("math").equations:
            return self.found("eq", label, label, False).astext()
        theorems = getattr(self.env, "proof_list", {})
        if label in theorems:
            kind = theorems[label]
            count = self.env.toc_fignumbers[kind["docname"]][kind["countertype"]][label]
            return f"{kind['realtype'].title()} {'.'.join(map(str, count))}"
        return self.found("numref", label, label, False).astext()

    def picture(self, name: str) -> str:
        return f"data:image/png;base64,{''.join(self.values[name]['image/png'].split())}"

    def found(self, role: str, target: str, words: str, explicit: bool) -> nodes.Node:
        """What the page's own role becomes; KeyError where it leads nowhere."""
        kind, _, typ = role.partition(":")
        if role == "ref" and not explicit and target in self.env.sphinx_exercise_registry:
            role = "numref"  # as sphinx-exercise does
        domain = {"eq": "math", "cite": "cite", "prf": "prf"}.get(kind, "std")
        typ = {"cite": typ or "p", "prf": typ}.get(kind, role)
        if role in ("ref", "numref"):
            target = target.lower()
        inside = nodes.inline("", words)
        asked = pending_xref(
            "", inside, refdomain=domain, reftype=typ, reftarget=target, refexplicit=explicit
        )
        asked["refdoc"] = self.page
        found = self.env.get_domain(domain).resolve_xref(
            self.env, self.page, self.app.builder, typ, target, asked, inside
        )
        if found is None:
            raise KeyError(f"{self.page}: {{{role}}}`{target}`")
        return found

    def shown(self, node: nodes.Node) -> str:
        """Nodes in a line of text, as Markdown."""
        inner = "".join(map(self.shown, node.children))
        match node:
            case nodes.Text():
                return plain(node.astext())
            case nodes.literal():
                return f"`{node.astext()}`"
            case nodes.math():
                return f"${node.astext()}$"
            case nodes.emphasis():
                return f"*{inner}*"
            case nodes.strong():
                return f"**{inner}**"
            case nodes.reference():
                to = self.where(node)
                return f"[{inner}]({to})" if to else inner
        return inner

    def where(self, reference: nodes.reference) -> str:
        """Where a reference leads: a paper to itself, another page to the published one. "" where it need not lead."""
        uri = reference.get("refuri", "")
        paper = self.papers.get(reference.get("refid") or uri.rpartition("#")[2])
        if paper and (known := of_paper(paper.fields)):
            return known
        if re.match(r"https?:", uri) or not uri:  # what is not a link stands on this page
            return uri
        if base := self.app.config.html_baseurl:
            here = self.app.builder.get_target_uri(self.page)
            return urljoin(urljoin(base.rstrip("/") + "/", here), uri)
        beside = Path(uri.partition("#")[0]).with_suffix(".ipynb").name
        return beside if (Path(self.app.srcdir) / Path(self.page).parent / beside).exists() else ""


def of_paper(fields: Any) -> str:
    """The address of a paper, from its entry."""
    if doi := fields.get("doi"):
        return f"https://doi.org/{doi}"
    number = fields.get("eprint")
    return f"https://arxiv.org/abs/{number}" if number else fields.get("url", "")


def write(app: Any, problem: Exception | None) -> None:
    """Write the notebooks, and in place of the source of each page the one that its button downloads."""
    if problem or app.builder.name != "html":
        return
    if Path(getattr(app.config, "external_toc_path", "_toc.yml")).name != "_toc.yml":
        return  # `make page`: a few pages, whose references to the others lead nowhere
    out = Path(app.outdir)
    folder = out.parent / FOLDER
    folder.mkdir(exist_ok=True)
    base, own = app.config.html_baseurl, app.config.own_address
    app.env.get_doctree = cache(app.env.get_doctree)  # each reference to a figure reads a page
    runs = get_cache(app.config.nb_execution_cache_path)
    names = set()
    for page in sorted(app.env.found_docs):
        if app.env.doc2path(page, base=False).endswith(".ipynb"):
            # Only the cache has what a run showed; MyST-NB writes that elsewhere where it just ran the page.
            source = nbformat.read(app.env.doc2path(page), as_version=4)
            _, run = runs.merge_match_into_notebook(source, cell_meta=())
            lookup = Built(app, page, glued(run))
            there = (
                urljoin(base.rstrip("/") + "/", app.builder.get_target_uri(page)) if base else ""
            )
            convert = Converter(lookup, there.rpartition("/")[0] + "/" if there else "")
            made = notebook(run, convert, own, note(app, page, base))
            text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
            name = f"{Path(page).name}.ipynb"
            names.add(name)
            (folder / name).write_text(text, "utf8")
            (out / "_sources" / f"{page}.ipynb").write_text(text, "utf8")
    del app.env.get_doctree
    for old in folder.glob("*.ipynb"):
        if old.name not in names:
            old.unlink()
    LOG.info(f"{len(names)} notebooks are in {FOLDER}")


def note(app: Any, page: str, base: str) -> str:
    """The line below the title: what this notebook is a copy of."""
    title = plain(app.config.html_title or app.config.project)
    if base:
        there = urljoin(base.rstrip("/") + "/", app.builder.get_target_uri(page))
        where = f"[this page]({there}) of the book “{title}”"
    else:
        where = f"a page of the book “{title}”"
    return f"*A copy of {where}. Numbers in the text are those of the book's own run.*"


def setup(app: Any) -> dict[str, bool]:
    # sphinxcontrib-bibtex looks for a plugin at each citation, among all packages: half a minute of a build.
    pybtex.plugin.find_plugin = cache(pybtex.plugin.find_plugin)
    app.connect("build-finished", write, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
