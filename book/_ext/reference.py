"""The pages of `book/reference`: how a module of `mtlib` is written out, from its docstrings.

`Renderer` is the `autodoc2_render_plugin` of `_config.yml`. The page of a room holds one directive, `autodoc2-object`;
where the room is a folder, its modules follow by themselves. `link` turns names in backticks into links.
"""

from __future__ import annotations

import ast
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autodoc2.render.myst_ import MystRenderer
from docutils import nodes
from sphinx.addnodes import desc, desc_name, desc_parameter, desc_sig_name, pending_xref
from sphinx.util.nodes import make_refnode

FOLDER = "book/reference/"
LONG = 80  # of a constant's value, in characters


class Renderer(MystRenderer):
    """A room, its modules one after the other, and of each all that is public, in the order of the source."""

    def render_package(self, item: Any) -> Iterator[str]:
        yield from self.render_module(item)
        modules = self.get_children(item, {"package", "module"})
        for name in sorted(module["full_name"] for module in modules):
            yield from self.render_item(name)

    def render_module(self, item: Any) -> Iterator[str]:
        name = item["full_name"]
        yield from ("", f"{'#' if name.count('.') == 1 else '##'} {name}", "")
        yield from (f"```{{py:module}} {name}", "```", "", *self.docstring(item))
        for child in self.get_children(item):
            if child["type"] not in ("package", "module"):
                yield from self.render_item(child["full_name"])

    def render_data(self, item: Any) -> Iterator[str]:
        """A type, a constant or a field: what it is, and its docstring or the comment beside it."""
        source = self.source(item)
        yield f"````{{py:{item['type']}}} {item['full_name'].rpartition('.')[2]}"
        if item.get("annotation"):
            yield f":type: {quoted(self.format_annotation(item['annotation']))}"
        if text := value(source):
            yield f":value: {quoted(textwrap.shorten(text, LONG, placeholder=' …'))}"
        yield from ("", *(self.docstring(item) if item["doc"] else [comment(source)]), "````", "")

    def docstring(self, item: Any) -> list[str]:
        return [f"```{{autodoc2-docstring}} {item['full_name']}", "```", ""]

    def source(self, item: Any) -> str:
        """The lines of the package in which an item stands."""
        above = self._db.get_ancestors(item["full_name"], include_self=False)
        path = next(a["file_path"] for a in above if a and a.get("file_path"))
        first, last = item["range"]
        return textwrap.dedent(
            "\n".join(Path(path).read_text("utf8").splitlines()[first - 1 : last])
        )

    def is_hidden(self, item: Any) -> bool:
        """Private names; and constants and methods of which nothing is said."""
        said = item["doc"] and not item.get("doc_inherited")
        if item["type"] == "data":
            said = said or comment(self.source(item))
        return super().is_hidden(item) or (item["type"] in ("data", "method") and not said)

    def format_annotation(self, annotation: str | None) -> str:
        """`~torch.Tensor` is shown as `Tensor`; a type of ours that has no entry must not look for one."""

        def short(name: re.Match[str]) -> str:
            item = self.get_item(name[0])
            return name[0].rpartition(".")[2] if item and self.is_hidden(item) else f"~{name[0]}"

        return re.sub(r"(?<![\w.])[a-zA-Z_][\w.]*\.\w+", short, annotation or "")


def value(source: str) -> str:
    """The right-hand side of an assignment."""
    node = getattr(ast.parse(source).body[0], "value", None)
    return ast.unparse(node) if node else ""


def quoted(text: str) -> str:
    """The value of a directive's option: YAML reads what JSON writes."""
    return json.dumps(text, ensure_ascii=False)


def comment(source: str) -> str:
    """The comment that ends a statement; none where it speaks to a tool, as `noqa` does."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]
    return re.sub(r"^(noqa|type):\s*[\w\[\]-]+(\s*[-#]\s*)?", "", said[-1]) if said else ""


def find_types(app: Any, tree: nodes.document) -> None:
    """Sphinx looks for the types of a signature among classes; many of ours, `Params` for one, are plain names."""
    for reference in tree.findall(pending_xref):
        if (reference["refdomain"], reference["reftype"]) == ("py", "class"):
            reference["reftype"] = "obj"


def link(app: Any, tree: nodes.document, page: str) -> None:
    """`quiz` -> a link to its entry in the same module; `mtlib.tasks.quiz`, `tasks.quiz` -> from anywhere."""
    if not page.startswith(FOLDER):
        return
    known = app.env.domains["py"].objects
    for literal in list(tree.findall(nodes.literal)):
        text, above = literal.astext(), list(ancestors(literal))
        module = next(n[0].astext() for n in above if isinstance(n, nodes.section))  # its heading
        names = [text, f"{module}.{text}"]
        if "." in text or page == f"{FOLDER}index":
            names.append(f"mtlib.{text}")
        entries = [n for n in above if isinstance(n, desc)]
        found = [known[name] for name in names if name in known]
        if found and not (entries and text in explained(entries[-1])):
            at = (found[0].docname, found[0].node_id)
            literal.replace_self(make_refnode(app.builder, page, *at, literal.deepcopy()))


def ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    while node := node.parent:
        yield node


def explained(entry: desc) -> set[str]:
    """Names that an entry itself explains, and that mean nothing else there: its own, its parameters and its fields."""
    parameters = {
        n.astext() for p in entry.findall(desc_parameter) for n in p.findall(desc_sig_name)
    }
    return parameters | {n.astext() for n in entry.findall(desc_name)}


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-read", find_types)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
