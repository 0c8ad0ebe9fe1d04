"""What the prose says exists: each `mtlib.` name in pages, READMEs, docstrings and messages, and each reference."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from machine import ROOT
from pages import NOTEBOOKS
from torch.nn.functional import cross_entropy

NAME = re.compile(r"(?<![\w/.])mtlib(?:\.[A-Za-z_]\w*)+")
CITE = re.compile(r"\{cite[\w:]*\}`([\w,\s-]+)`")
KEY = re.compile(r"(?m)^@\w+\{([^,\s]+),")
TERM = re.compile(r"\{term\}`(?:[^`<]*<)?([^`<>]+?)>?`")
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").rglob("*.md"))]
MODULES = sorted((ROOT / "mtlib").rglob("*.py"))


def texts(path: Path) -> list[str]:
    """A page's prose, or the docstrings and messages of a module."""
    text = path.read_text("utf8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    if path.suffix == ".py":
        nodes = ast.walk(ast.parse(text))
        return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [text]


def resolve(name: str) -> object:
    """The module, or what a module or class in it holds under this name."""
    found: object = importlib.import_module("mtlib")
    place = "mtlib"
    for part in name.split(".")[1:]:
        place += f".{part}"
        if not hasattr(found, part):
            importlib.import_module(place)  # ModuleNotFoundError where there is none
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", [*PROSE, *NOTEBOOKS, *MODULES], ids=lambda p: p.name)
def test_names_in_prose_exist(path):
    unknown = set()
    for name in {match[0] for text in texts(path) for match in NAME.finditer(text)}:
        try:
            resolve(name)
        except (ModuleNotFoundError, AttributeError):
            unknown.add(name)
    assert not unknown, f"{path.relative_to(ROOT)} names {sorted(unknown)}, which do not exist"


def test_a_name_that_is_wrong_is_found():
    assert resolve("mtlib.norm.calibrate").__name__ == "calibrate"
    assert NAME.findall("see `mtlib.nets.calibrate`, in mtlib.norm.") == [
        "mtlib.nets.calibrate",
        "mtlib.norm",
    ]
    with pytest.raises(ModuleNotFoundError):
        resolve("mtlib.nets.calibrate")


def test_the_faqs_weighted_cross_entropy_is_the_one_of_class_numbers():
    """The expression that the page gives, on rows, is torch's loss of the numbers."""
    text = (ROOT / "book" / "faq.md").read_text("utf8")
    (code,) = re.findall(r"`(lambda p, y: cross_entropy.+?)`", text)
    k, w, p = torch.tensor([0, 2, 2, 1, 2]), torch.tensor([1.0, 2.0, 5.0]), torch.randn(5, 3)
    given = eval(code, {"cross_entropy": cross_entropy, "w": w})(p, torch.eye(3)[k])
    assert torch.allclose(given, cross_entropy(p, k, weight=w))


def cited() -> set[str]:
    """The keys that pages and docstrings cite."""
    found = [m for p in (*PROSE, *NOTEBOOKS, *MODULES) for t in texts(p) for m in CITE.findall(t)]
    return {key.strip() for keys in found for key in keys.split(",")}


def test_every_reference_is_cited_and_every_citation_has_one():
    keys = KEY.findall((ROOT / "book" / "references.bib").read_text("utf8"))
    assert len(keys) == len(set(keys))
    assert cited() == set(keys)


def entries() -> set[str]:
    """What the glossary explains: the lines of its list that are not indented."""
    text = (ROOT / "book" / "glossary.md").read_text("utf8")
    listed = text.split(":::{glossary}\n")[1].split(":::")[0]
    return {line for line in listed.splitlines() if line and not line.startswith(" ")}


@pytest.mark.parametrize("path", [*PROSE, *NOTEBOOKS], ids=lambda p: p.name)
def test_every_term_stands_in_the_glossary(path):
    """The book's build would fail on it, half an hour later."""
    named = {" ".join(m.split()) for text in texts(path) for m in TERM.findall(text)}
    assert named <= entries()


def test_a_term_that_is_missing_is_found():
    assert TERM.findall("a {term}`brook` of {term}`pairs <paired\ncomparison>`") == [
        "brook",
        "paired\ncomparison",
    ]
    assert "brook" not in entries() and "paired comparison" in entries()
