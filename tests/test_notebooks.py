"""The notebooks that the build makes of pages: each role and directive in plain Markdown, on a book without Sphinx.

`tests/test_book_built.py` reads the notebooks of the real one.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine import ROOT
from pages import NOTEBOOKS

pytest.importorskip("sphinx", reason="the extra `book` is not installed")
OWN = "https://github.com/someone/mtlib-book"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The extension, imported as Sphinx does."""
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        return importlib.import_module("notebooks")
    finally:
        sys.path.remove(str(ROOT / "book" / "_ext"))


class Shelf:
    """A lookup that says what it was asked."""

    def role(self, role: str, text: str) -> str:
        return f"<{role} {text}>"

    def link(self, text: str, target: str) -> str:
        return f"<link {text} {target}>"

    def number(self, label: str) -> str:
        return "(2.1)" if label.startswith("eq") else f"No. {label}"

    def picture(self, name: str) -> str:
        return f"data:{name}"


@pytest.fixture
def convert(made: ModuleType) -> Any:
    return made.Converter(Shelf())


@pytest.mark.parametrize(
    "source",
    [
        "A paragraph of $x_i * y_i$, `code`, **words**.\n\n- a list\n- of two",
        "| a | b |\n|:--|--:|\n| $\\lVert x \\rVert$ | 2 |",
        "```python\nx = {'a': 1}  # {doc}`no role`\n```",
        "`` {doc}`x` `` is how a role is written, and `$$` begins an equation",
        "[a page](https://example.org/a_(b)) and a price of \\$5",
        '```python\ndef f():\n    """A docstring.\n\n    ```pycon\n    >>> f()  # {doc}`a`\n    ```\n    """\n```',
        "    indented\n\n<details>\nhtml\n</details>",
        "text with a dollar in `$HOME` and one in `$PATH`, {curly} and [square]",
    ],
)
def test_plain_markdown_stays_as_it_is(convert, source):
    assert convert(source) == source


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("the error {glue:text}`a-b`.", "the error <glue:text a-b>."),
        ("{doc}`a`, {ref}`b <c>`; *{term}`d`*", "<doc a>, <ref b <c>>; *<term d>*"),
        ("({eq}`eq-a`) {numref}`fig-a`", "(<eq eq-a>) <numref fig-a>"),
        ("{cite}`a,b` {cite:t}`c`", "<cite a,b> <cite:t c>"),
        ("{doc}`two\nlines <a>`", "<doc two\nlines <a>>"),
        ("| {doc}`a` | {cite}`b` |\n|--|--|", "| <doc a> | <cite b> |\n|--|--|"),
        (
            "[the table](fails-table), [here](a.ipynb)",
            "<link the table fails-table>, <link here a.ipynb>",
        ),
        ("(a-place)=\n## Title", "## Title"),
        ("% a comment\ntext", "text"),
    ],
)
def test_roles_and_links(convert, source, expected):
    assert convert(source) == expected


def test_an_equation_gets_its_number(convert):
    source = (
        "Then\n\n$$\n\\begin{aligned}\na &= b \\\\\nc &= d.\n\\end{aligned}\n$$ (eq-a)\n\nso $a$."
    )
    expected = "Then\n\n$$\n\\begin{aligned}\na &= b \\\\\nc &= d.\n\\end{aligned} \\tag{2.1}\n$$\n\nso $a$."
    assert convert(source) == expected
    assert convert("$$ a = b $$ (eq-a)") == "$$\na = b \\tag{2.1}\n$$"
    assert convert("$$\na = b\n$$") == "$$\na = b\n$$"
    with pytest.raises(ValueError, match="expected"):
        convert("$$\na = b")


def test_exercises_and_solutions(convert):
    source = (
        "## Exercises\n\n```{exercise} On rates\n:label: ex-a\n\n*To run.* Try {doc}`a`:\n\n$$\nx\n$$\n```\n\n"
        "````{solution} ex-a\n:class: dropdown\n\nSo:\n\n```python\nrun()\n```\n````"
    )
    assert convert(source) == (
        "## Exercises\n\n**No. ex-a (On rates).** *To run.* Try <doc a>:\n\n$$\nx\n$$\n\n"
        "<details>\n<summary>Solution to No. ex-a</summary>\n\nSo:\n\n```python\nrun()\n```\n\n</details>"
    )


def test_a_title_stands_above_a_list(convert):
    assert (
        convert("```{exercise}\n:label: a\n\n1. One\n2. Two\n```") == "**No. a.**\n\n1. One\n2. Two"
    )


def test_a_lone_dollar_swallows_no_role(convert):
    assert convert("It costs $5.\n\nSee {doc}`a`, $x$.") == "It costs $5.\n\nSee <doc a>, $x$."
    assert convert("a ` alone\n\n{doc}`a`") == "a ` alone\n\n<doc a>"


def test_what_stands_apart_becomes_a_quotation(convert):
    """Its equations lie in one line: `>` at the beginning of a line would be read as a part of them."""
    source = ":::{prf:theorem} The hinge\n:label: thm\n\nIf\n\n$$\na\nb\n$$ (eq-a)\n:::"
    assert convert(source) == "> **No. thm (The hinge).** If\n>\n> $$a b \\tag{2.1}$$"
    assert convert(":::{prf:proof}\nClear. $\\square$\n:::") == "> **Proof.** Clear. $\\square$"
    assert convert("```{admonition} A {doc}`b`\nText\n```") == "> **A <doc b>**\n>\n> Text"
    assert convert("```{tip} Text\nmore\n```") == "> **Tip**\n>\n> Text\n> more"
    assert (
        convert("- item\n\n  ```{note}\n  Text\n  ```") == "- item\n\n  > **Note**\n  >\n  > Text"
    )


def test_a_glued_figure_lies_in_the_text(convert):
    source = "```{glue:figure} a-b\n:name: fig\n:alt: Two lines [of which] one\n\nA caption, {doc}`c`.\n```"
    assert (
        convert(source) == "![Two lines (of which) one](data:a-b)\n\n*No. fig.* A caption, <doc c>."
    )


def test_a_question_hides_what_is_right(convert):
    source = (
        ":::{selftest} a-b\nWhich {term}`c`?\n\n- [ ] The one.\n  - It is not,\n    see {doc}`d`.\n"
        "- [x] The other.\n  - It is.\n:::"
    )
    assert convert(source) == (
        "Which <term c>?\n\n- A. The one.\n- B. The other.\n\n<details>\n<summary>Answers and reasons</summary>\n\n"
        "- A. **No.** It is not, see <doc d>.\n- B. **Right.** It is.\n\n</details>"
    )


def test_a_figure_for_the_hand_leads_to_the_published_pages(made, convert):
    shown = '<div class="mtlib-hand" data-kind="path"><a href="films.html#when" data-page="films">Films</a> <a href="#x">x</a></div>'
    convert.base = "https://someone.github.io/book/"
    assert convert.by_hand(shown) == (
        '<div data-base="https://someone.github.io/book/" class="mtlib-hand" data-kind="path">'
        '<a href="https://someone.github.io/book/films.html#when" data-page="films">Films</a> <a href="#x">x</a></div>'
    )
    convert.base = ""
    assert convert.by_hand(shown) == shown


def test_the_line_above_questions_speaks_of_no_button(convert):
    assert "button" not in convert(
        "Choose an answer, and check it by the button or with Enter. Each answer has its reason."
    )


def test_what_is_not_known_is_an_error(convert):
    with pytest.raises(ValueError, match="'unheard-of'"):
        convert("```{unheard-of}\ntext\n```")
    with pytest.raises(ValueError, match="to close"):
        convert("```{note}\ntext")


def test_values_are_shown_as_they_are(made):
    assert made.plain("0.5 ± 0.1 × 10⁻³") == "0.5 ± 0.1 × 10⁻³"
    assert made.plain("a*b_c | $5") == "a\\*b\\_c \\| \\$5"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"doi": "10.1/a", "eprint": "1703.03400"}, "https://doi.org/10.1/a"),
        (
            {"eprint": "1703.03400", "url": "https://example.org"},
            "https://arxiv.org/abs/1703.03400",
        ),
        ({"url": "https://example.org"}, "https://example.org"),
        ({}, ""),
    ],
)
def test_the_address_of_a_paper(made, fields, expected):
    assert made.of_paper(fields) == expected


# A notebook -----------------------------------------------------------------------------------

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def cell(
    name: str, source: str, outputs: list[dict] | None = None, **metadata: Any
) -> dict[str, Any]:
    kind = "markdown" if outputs is None else "code"
    made = {"cell_type": kind, "id": name, "metadata": metadata, "source": source}
    return made if outputs is None else {**made, "outputs": outputs, "execution_count": 1}


@pytest.fixture
def page() -> dict[str, Any]:
    """A page as it is after its run, with one cell of each kind."""
    install = json.loads(NOTEBOOKS[0].read_text("utf8"))["cells"][0]
    assert "remove-cell" in install["metadata"]["tags"]
    image = {
        "output_type": "display_data",
        "data": {"image/png": "iVBO", "text/plain": "<F>"},
        "metadata": {},
    }
    kept = {
        "output_type": "display_data",
        "data": {"application/papermill.record/text/plain": "0.5"},
    }
    kept["metadata"] = {
        "scrapbook": {"name": "a-b", "mime_prefix": "application/papermill.record/"}
    }
    told = {"output_type": "stream", "name": "stdout", "text": "Data: real\n"}
    noise = {"output_type": "stream", "name": "stderr", "text": "fit: 100%"}
    table = {
        "output_type": "display_data",
        "data": {"text/markdown": "| {doc}`a` |\n|--|"},
        "metadata": {},
    }
    figure = {
        "figure": {"name": "fig-a", "caption": "As {eq}`eq-a` says."},
        "image": {"alt": "A line."},
    }
    return {
        "cells": [
            cell("install", "".join(install["source"]), [], tags=["remove-cell"]),
            cell("title", "# Title\n\nThe question."),
            cell("draw", "draw()", [image, noise, told], tags=["hide-input"], mystnb=figure),
            cell("keep", "glue('a-b', 0.5)", [kept, told], tags=["remove-cell"]),
            cell("show", "table(x)", [table]),
        ],
        "metadata": {"kernelspec": KERNEL, "mystnb": {}},
    }


def test_a_notebook_has_all_that_the_page_shows(made, convert, page):
    book = made.notebook(page, convert, OWN, "*A copy.*")
    assert [c["id"] for c in book["cells"]] == [
        "install",
        "title",
        "draw",
        "draw-caption",
        "keep",
        "show",
    ]
    install, title, draw, caption, keep, show = book["cells"]
    assert install["metadata"] == {} and f"git+{OWN}@main" in install["source"]
    assert title["source"] == "# Title\n\n*A copy.*\n\nThe question."
    assert (
        draw["outputs"][0]["data"]["image/png"] == "iVBO" and draw["outputs"][1]["name"] == "stdout"
    )
    assert draw["outputs"][0]["metadata"] == {"image/png": {"alt": "A line."}}
    assert draw["metadata"] == {"jupyter": {"source_hidden": True}}
    assert caption["source"] == "*No. fig-a.* As <eq eq-a> says."
    assert keep["source"] == "glue('a-b', 0.5)" and keep["outputs"] == []
    assert show["outputs"][0]["data"]["text/markdown"] == "| <doc a> |\n|--|"
    assert made.glued(page) == {"a-b": {"text/plain": "0.5"}}
    assert book["metadata"] == {"kernelspec": KERNEL}


def test_a_notebook_is_valid(made, convert, page):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(made.notebook(page, convert, OWN, "*A copy.*")))


def test_without_an_address_the_first_cell_says_what_to_do(made, convert, page):
    first = made.notebook(page, convert, "", "")["cells"][0]["source"]
    assert "OWNER" not in first and 'pip install ".[' in first and "%pip" not in first
    compile(first, "cell", "exec")


# The sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_page_can_be_turned(made, convert, path):
    """No directive is unknown, and no role, label or address without an entry is left."""
    for source in json.loads(path.read_text("utf8"))["cells"]:
        if source["cell_type"] == "markdown":
            left = convert("".join(source["source"]))
            bare = re.sub(r"(?s)```.*?```|`[^`\n]+`", "", left)
            assert not re.search(
                r"\{[\w:]+\}`|^[`:]{3,}\{|^\([\w-]+\)=|\$\$ \(", bare, re.MULTILINE
            ), left


# A small book, built ----------------------------------------------------------------------------

FIRST = r"""# First

The value is {glue:text}`a-value`, by {cite:t}`finn2017maml` and others {cite}`finn2017maml,pan2010survey`.
See {eq}`eq-one`, {eq}`eq-two`, {numref}`fig-one`, {doc}`second`, {doc}`here <second>`, {ref}`a place <place>`, {ref}`ex-one`,
{prf:ref}`thm-one`, {term}`Task`, {term}`tasks <task>`, [a page](second.ipynb), [the words](words.md#place), [below](#first).

$$
a = b
$$ (eq-one)

:::{prf:theorem} The hinge
:label: thm-one

It holds.
:::

```{exercise}
:label: ex-one

Try.
```

```{solution} ex-one
Done.
```"""
SECOND = "# Second\n\n$$\nc\n$$ (eq-two)"
WORDS = "# Words\n\n(place)=\n## A place\n\n```{glossary}\ntask\n  What is learned.\n```\n\n```{bibliography}\n```"
INDEX = "# Index\n\n```{toctree}\n:numbered:\nfirst\nsecond\nwords\n```"
ENTRIES = """@inproceedings{finn2017maml, author = {Finn, Chelsea and Abbeel, Pieter and Levine, Sergey},
  title = {MAML}, booktitle = {ICML}, year = {2017}, eprint = {1703.03400}}
@article{pan2010survey, author = {Pan, Sinno and Yang, Qiang}, title = {A Survey}, journal = {TKDE}, year = {2010}}"""
CODE = """from IPython.display import display
form = "application/papermill.record/"
kept = {"scrapbook": {"name": "a-value", "mime_prefix": form}}
display({form + "text/plain": "0.5 ± 0.1"}, metadata=kept, raw=True)
dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
display({"image/png": dot}, raw=True)
print("ran")"""


def build(folder: Path, own: str | None, module: ModuleType) -> dict[str, str]:
    """The Markdown of the first page's notebook, by the name of its cell."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    used = ["myst_nb", "sphinx_exercise", "sphinx_proof", "sphinxcontrib.bibtex"]
    settings = {
        "extensions": [*used, "own_address", "notebooks"],
        "project": "A book",
        "html_theme": "basic",
        "bibtex_bibfiles": ["a.bib"],
        "bibtex_reference_style": "author_year",
        "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence"],
        "nb_execution_mode": "cache",
        "nb_execution_cache_path": str(folder / "cache"),
        "numfig": True,
        "math_numfig": True,
        "suppress_warnings": ["myst.xref_missing"],
    }
    with pytest.MonkeyPatch.context() as patch, patch_docutils(), docutils_namespace():
        patch.setattr(module.address, "known", lambda root: own)
        out, kept = folder / "_build" / "html", folder / "_build" / ".doctrees"
        app = Sphinx(folder / "pages", None, out, kept, "html", settings, status=None)
        app.build()
    made = json.loads((folder / "_build/notebooks/first.ipynb").read_text("utf8"))
    assert made == json.loads((out / "_sources/first.ipynb").read_text("utf8"))
    (run,) = (c for c in made["cells"] if c["id"] == "run")
    assert [o["output_type"] for o in run["outputs"]] == ["display_data", "stream"]
    return {c["id"]: c["source"] for c in made["cells"]}


@pytest.fixture(scope="module")
def small_book(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    pages = folder / "pages"
    pages.mkdir()
    install = "".join(json.loads(NOTEBOOKS[0].read_text("utf8"))["cells"][0]["source"])
    kernel = {"kernelspec": KERNEL}
    for name, text in {"first": FIRST, "second": SECOND}.items():
        figure = {"figure": {"name": "fig-one", "caption": "A line, {eq}`eq-one`."}}
        cells = [
            cell("install", install, [], tags=["remove-cell"]),
            cell("text", text),
            cell("run", CODE, [], mystnb=figure if name == "first" else {}),
        ]
        for one in cells:
            one.update({"execution_count": None} if one["cell_type"] == "code" else {})
        book = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (pages / f"{name}.ipynb").write_text(json.dumps(book), "utf8")
    (pages / "words.md").write_text(WORDS, "utf8")
    (pages / "index.md").write_text(INDEX, "utf8")
    (pages / "a.bib").write_text(ENTRIES, "utf8")
    return folder


def test_roles_become_what_the_page_says(made, small_book):
    """Numbers and names are Sphinx's own; another page's are links to the published one."""
    text = build(small_book, OWN, made)["text"]
    page = "https://someone.github.io/mtlib-book"
    maml = "https://arxiv.org/abs/1703.03400"
    for expected in (
        "# First\n\n*A copy of [this page](https://someone.github.io/mtlib-book/first.html)",
        f"The value is 0.5 ± 0.1, by Finn *et al.* ([2017]({maml}))",
        f"([Finn *et al.*, 2017]({maml}), [Pan and Yang, 2010]({page}/words.html#id",
        f"See (1.1), [(2.1)]({page}/second.html#equation-eq-two), Fig. 1.1, [Second]({page}/second.html)",
        f"[here]({page}/second.html), [a place]({page}/words.html#place), Exercise 1.1",
        f"Theorem 1.1, [Task]({page}/words.html#term-task), [tasks]({page}/words.html#term-task)",
        f"[a page]({page}/second.html), [the words]({page}/words.html#place), below.",
        "$$\na = b \\tag{1.1}\n$$",
        "> **Theorem 1.1 (The hinge).** It holds.",
        "**Exercise 1.1.** Try.",
        "<details>\n<summary>Solution to Exercise 1.1</summary>\n\nDone.\n\n</details>",
    ):
        assert expected in text, f"{expected}\nis not in\n{text}"


def test_without_an_address_links_lead_to_what_lies_beside(made, small_book):
    cells = build(small_book, None, made)
    assert "[Second](second.ipynb)" in cells["text"] and "github.io" not in cells["text"]
    assert "a place, Exercise 1.1" in cells["text"]  # a page of words has no notebook
    assert cells["run-caption"] == "*Fig. 1.1.* A line, (1.1)."
    assert "version(" in cells["install"] and "%pip" not in cells["install"]
