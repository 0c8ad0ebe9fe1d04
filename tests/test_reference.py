"""The reference: every public name of `mtlib` has a docstring, and a place on a page of the book."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from autodoc2.analysis import analyse_module
from autodoc2.config import Config
from autodoc2.db import InMemoryDb
from autodoc2.utils import yield_modules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mtlib"
PAGES = ROOT / "book" / "reference"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = re.findall(
    r"`(\w+)`:", ast.get_docstring(ast.parse(MODULES["mtlib"].read_text("utf8"))) or ""
)
FIELDS = {  # of these each field has a word said about it in a docstring, where `help` finds it, too
    "mtlib.core": ("Batch", "Episode"),
    "mtlib.evaluate": ("Score",),
    "mtlib.train": ("Run",),
    "mtlib.book.results": ("Result",),
}


def documented(body: list[ast.stmt]) -> dict[str, str]:
    """Public names that a module or class defines -> their docstrings, "" where one is missing."""
    found = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            said = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                said = str(following.value.value)
            found |= {t.id: said for t in targets if isinstance(t, ast.Name)}
    return {name: said for name, said in found.items() if not name.startswith("_")}


def is_constant(name: str, body: list[ast.stmt]) -> bool:
    """A value, as MINILM and `worker`; types are written as `Params`, and must be explained."""
    defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return name not in defined and (name.isupper() or name.islower())


@pytest.fixture(scope="module")
def pages() -> str:
    """What the renderer of the book writes out, for all rooms."""
    path = ROOT / "book" / "_ext" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["sphinx"]["config"]
    db = InMemoryDb()
    for path, name in yield_modules(PACKAGE, root_module="mtlib"):
        for item in analyse_module(path, name):
            db.add(item)
    config = Config(hidden_objects=set(settings["autodoc2_hidden_objects"]))
    renderer = extension.Renderer(db, config)
    return "\n".join(line for room in ROOMS for line in renderer.render_item(f"mtlib.{room}"))


def test_every_room_has_its_page_in_the_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    (chapter,) = next(part for part in toc["parts"] if part.get("caption") == "Reference")[
        "chapters"
    ]
    assert chapter["file"] == "book/reference/index"
    assert [page["file"] for page in chapter["sections"]] == [f"book/reference/{r}" for r in ROOMS]
    assert {f"mtlib.{room}" for room in ROOMS} == {m for m in MODULES if m.count(".") == 1}
    for room in ROOMS:
        assert f"{{autodoc2-object}} mtlib.{room}\n" in (PAGES / f"{room}.md").read_text("utf8")
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *ROOMS}
    assert "{autodoc2-docstring} mtlib\n" in (PAGES / "index.md").read_text("utf8")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring_and_a_place(module: str, pages: str):
    tree = ast.parse(MODULES[module].read_text("utf8"))
    assert ast.get_docstring(tree)
    names = documented(tree.body)
    bare = [n for n, said in names.items() if not said and not is_constant(n, tree.body)]
    assert not bare, f"{module}: {bare} have no docstring"
    if module != "mtlib":
        heading = re.compile(rf"^##? {re.escape(module)}$", re.MULTILINE)
        assert len(heading.findall(pages)) == 1
    shown = set(re.findall(r"^`+\{autodoc2-docstring\} ([\w.]+)$", pages, re.MULTILINE))
    hidden = [n for n, said in names.items() if said and f"{module}.{n}" not in shown]
    assert not hidden, f"{module}: {hidden} are on no page"


def test_private_names_stay_out(pages: str):
    assert not re.findall(r"\{py:\w+\} _\w+", pages)


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in FIELDS.items() for name in names]
)
def test_fields_are_explained(module: str, name: str, pages: str):
    tree = ast.parse(MODULES[module].read_text("utf8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    said = documented(node.body)
    whole = ast.get_docstring(node) or ""
    bare = [f for f in sorted(fields) if not said[f] and f"`{f}`" not in whole]
    assert fields and not bare, f"{name}: nothing is said about {bare}"
    for field in fields:
        assert f"{{py:attribute}} {field}\n" in pages
