"""Questions to test oneself: `{selftest}` on the pages, `{selftests}` and `{selftest-score}` on the quiz page.

A question is plain Markdown, legible where nothing renders it: one paragraph, then a task list. Each option has one
nested item, its reason; `[x]` marks what is right. Where several are right, the reader has to find them all.

    :::{selftest} gradient-order
    What does first-order MAML leave out?

    - [ ] The inner steps.
      - It takes the same steps: ...
    - [x] The second derivatives.
      - ...
    :::

The argument is the question's label, which no other question of the book may have. As HTML it becomes a form; a script
of ours, `selftest.js`, shows the reason for what is chosen. All answers stand below it in `<details>`: without the
script they are what is left, and on paper they are open. Question, options and reasons are nodes that `gettext` finds.
`{selftests}` shows again, where it stands, the questions whose labels it lists, one a line.
"""

from __future__ import annotations

import html
import re
from string import ascii_uppercase as LETTERS
from typing import Any

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LABEL = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+")
FEWEST, MOST = 2, 6  # options of one question
FILES = {"js": "selftest.js", "css": "selftest.css"}
WORDS = {
    "right": "Right.",
    "wrong": "No.",
    "several": "More than one is right.",
    "check": "Check",
    "none": "Choose an answer first.",
    "more": "So far so good; there is one more to find.",
    "answers": "Answers and reasons",
    "from": "From:",
    "score": "{right} of {all} right at the first try; {left} left.",
    "end": "Done: {right} of {all} right at the first try.",
    "again": "Begin again",
}
"""What the questions say of themselves; `selftest_words` of the configuration replaces any of them."""

log = logging.getLogger(__name__)


class Question(nodes.General, nodes.Element):
    """A question: its text, its choices, its answers. `label`, `several`; on another page `page` and `title` of its own."""


class Asked(nodes.paragraph):
    """One paragraph, the legend of the form."""


class Choices(nodes.General, nodes.Element):
    """The options."""


class Choice(nodes.paragraph):
    """One paragraph, the label of a button. `letter`."""


class Reasons(nodes.General, nodes.Element):
    """The reasons, in the order of the options."""


class Reason(nodes.General, nodes.Element):
    """Why an option is right or wrong. `letter`, `right`."""


class Place(nodes.General, nodes.Element):
    """A place for the questions of these `labels`."""


class Score(nodes.General, nodes.Element):
    """How many questions of the page were answered rightly at the first try."""


# Reading ---------------------------------------------------------------------------------------


def read(label: str, parsed: list[nodes.Node]) -> Question:
    """A question from the nodes of its Markdown. Errors: ValueError, which says what was expected and what came."""
    if not LABEL.fullmatch(label):
        raise ValueError(
            f"expected a label such as page-what-it-asks, in small letters; got {label!r}"
        )
    if [type(node) for node in parsed] != [nodes.paragraph, nodes.bullet_list]:
        came = ", ".join(node.tagname for node in parsed) or "nothing"
        raise ValueError(f"expected one paragraph, then a list of options; got {came}")
    asked, listed = parsed
    if not FEWEST <= len(listed) <= MOST:
        raise ValueError(f"expected {FEWEST} to {MOST} options; got {len(listed)}")
    found = [read_option(item, LETTERS[i]) for i, item in enumerate(listed)]
    right = sum(why["right"] for _, why in found)
    if not right:
        raise ValueError("expected at least one option marked [x]; all are marked [ ]")
    if right == len(found):
        raise ValueError("expected at least one option marked [ ]; all are marked [x]")
    return Question(
        "",
        moved(asked, Asked()),
        Choices("", *(named for named, _ in found)),
        Reasons("", *(why for _, why in found)),
        label=label,
        ids=[f"selftest-{label}"],
        several=right > 1,
    )


def read_option(item: nodes.Element, letter: str) -> tuple[Choice, Reason]:
    """One item of the list: `[x] what it says`, and its reason in a nested list of one item."""
    text = item.astext().splitlines()[0] if item.astext() else ""
    if "task-list-item" not in item["classes"]:
        raise ValueError(f"expected an option to begin with [ ] or [x]; got {text!r}")
    kinds = [type(node) for node in item]
    if kinds != [nodes.paragraph, nodes.bullet_list] or len(item[1]) != 1:
        raise ValueError(
            f"expected one paragraph and below it one item, its reason, for option {letter}; "
            f"got {', '.join(node.tagname for node in item)}"
        )
    box = item[0].pop(0)  # what the task list made of the brackets
    if not item[0].astext().strip() or not item[1].astext().strip():
        raise ValueError(f"expected words in option {letter} and in its reason; got none")
    if isinstance(said := item[0][0], nodes.Text):
        item[0].replace(said, nodes.Text(said.lstrip()))
    named = moved(item[0], Choice(letter=letter))
    return named, Reason("", *item[1][0].children, letter=letter, right="checked=" in box.astext())


def moved(paragraph: nodes.Element, to: Any) -> Any:
    """The same words, with their place in the source, as another node."""
    to.source, to.line, to.rawsource = paragraph.source, paragraph.line, paragraph.rawsource.strip()
    to.extend(paragraph.children)
    return to


class SelfTest(SphinxDirective):
    """A question with its options and reasons."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        label, parsed = self.arguments[0], nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, parsed)
        try:
            node = read(label, parsed.children)
        except ValueError as error:
            raise self.error(f"selftest {label!r}: {error}") from error
        held = labels(self.env)
        if label in held:
            raise self.error(
                f"selftest: expected a label of its own; {label!r} stands on {held[label]}, too"
            )
        held[label] = self.env.docname
        self.set_source_info(node)
        return [node]


class SelfTests(SphinxDirective):
    """Questions of other pages, by their labels."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        names = [line.strip() for line in self.content if line.strip()]
        if not names or len(names) != len(set(names)):
            raise self.error(f"selftests: expected labels, one a line, each once; got {names}")
        node = Place("", labels=names)
        self.set_source_info(node)
        return [node]


class ScoreHere(SphinxDirective):
    """The place of the score."""

    def run(self) -> list[nodes.Node]:
        return [Score()]


def labels(env: Any) -> dict[str, str]:
    """The page of each question."""
    if not hasattr(env, "selftests"):
        env.selftests = {}
    return env.selftests


def forget(app: Any, env: Any, page: str) -> None:
    env.selftests = {label: at for label, at in labels(env).items() if at != page}


def merge(app: Any, env: Any, pages: Any, other: Any) -> None:
    labels(env).update({label: at for label, at in labels(other).items() if at in pages})


# Questions of other pages ----------------------------------------------------------------------


def collecting(app: Any, env: Any) -> list[str]:
    """Pages to write anew whenever any page changed."""
    return [page for page in env.found_docs if env.metadata.get(page, {}).get("selftests")]


def mark(app: Any, tree: nodes.document) -> None:
    if any(True for _ in tree.findall(Place)):
        app.env.metadata[app.env.docname]["selftests"] = "yes"


def collect(app: Any, tree: nodes.document, page: str) -> None:
    """Put the questions where `selftests` stands. In text, LaTeX and the like all of them become plain lists.

    `gettext` and `linkcheck`, which have no format, take them as they are, each on its own page.
    """
    if "part" in tree or not app.builder.format:  # a part is made by `of_pages`
        return
    places = list(tree.findall(Place))
    for place in places:
        known = labels(app.env)
        for label in set(place["labels"]) - set(known):
            log.warning("selftests: no question has the label %r", label, location=place)
        found = of_pages(app, page, [label for label in place["labels"] if label in known])
        place.replace_self([found[label] for label in place["labels"] if label in known])
    if places and any(True for _ in tree.findall(nodes.math)):  # else nothing would typeset them
        app.env.get_domain("math").data["has_equations"][page] = True
    if app.builder.format != "html":
        words = app.config.selftest_words
        for node in list(tree.findall(Question)):
            node.replace_self(plain(node, WORDS | words))
        for node in list(tree.findall(Score)):
            node.parent.remove(node)


def of_pages(app: Any, page: str, wanted: list[str]) -> dict[str, Question]:
    """Questions as they read on their own pages: numbers filled in, links from here."""
    found: dict[str, Question] = {}
    known = labels(app.env)
    for origin in dict.fromkeys(known[label] for label in wanted):
        whole = app.env.get_doctree(origin)
        alone = whole.copy()
        alone["part"] = True
        alone.extend(node.deepcopy() for node in whole.findall(Question) if node["label"] in wanted)
        app.env.apply_post_transforms(alone, origin)
        for node in alone.findall(Question):
            for link in node.findall(nodes.reference):
                lead_from(link, app.builder.get_relative_uri(page, origin))
            node["page"] = app.builder.get_relative_uri(page, origin)
            node["title"] = app.env.titles[origin].astext()
            found[node["label"]] = node
    return found


def lead_from(link: nodes.reference, origin: str) -> None:
    """A link within its own page leads there from another one in the same folder."""
    at = link.attributes.pop("refid", None) or (
        link["refuri"][1:] if link.get("refuri", "").startswith("#") else None
    )
    if at:
        link.update_all_atts({"refuri": f"{origin}#{at}", "internal": True}, replace=True)


def plain(node: Question, words: dict[str, str]) -> list[nodes.Node]:
    """A question as a paragraph and two lists."""
    asked, offered, reasons = node.children
    first, second = (nodes.enumerated_list(enumtype="upperalpha", suffix=".") for _ in range(2))
    first.extend(nodes.list_item("", nodes.paragraph("", "", *one.children)) for one in offered)
    for why in reasons:
        word = nodes.paragraph("", "", nodes.strong("", words[verdict(why)]))
        second.append(nodes.list_item("", word, *why.children))
    return [nodes.paragraph("", "", *asked.children), first, second]


def verdict(why: nodes.Element) -> str:
    return "right" if why["right"] else "wrong"


# HTML ------------------------------------------------------------------------------------------


def words_of(writer: Any) -> dict[str, str]:
    """The words, safe within HTML."""
    words = WORDS | writer.config.selftest_words
    return {key: html.escape(text) for key, text in words.items()}


def visit_question(writer: Any, node: Question) -> None:
    words = words_of(writer)
    told = "".join(f' data-{key}="{words[key]}"' for key in ("none", "more"))
    writer.body.append(
        f'<form class="selftest" id="selftest-{node["label"]}" autocomplete="off"{told}>\n'
    )


def depart_question(writer: Any, node: Question) -> None:
    if "page" in node:
        link = f'<a href="{html.escape(node["page"])}">{html.escape(node["title"])}</a>'
        writer.body.append(f'<p class="selftest-from">{words_of(writer)["from"]} {link}</p>\n')
    writer.body.append("</form>\n")


def visit_asked(writer: Any, node: Asked) -> None:
    writer.body.append("<fieldset>\n<legend>")


def depart_asked(writer: Any, node: Asked) -> None:
    if node.parent["several"]:
        writer.body.append(f' <span class="selftest-several">{words_of(writer)["several"]}</span>')
    writer.body.append("</legend>\n")


def visit_choices(writer: Any, node: Choices) -> None:
    pass


def depart_choices(writer: Any, node: Choices) -> None:
    writer.body.append(
        "</fieldset>\n"
        f'<button type="submit" disabled hidden>{words_of(writer)["check"]}</button>\n'
        '<div class="selftest-verdict" role="status"></div>\n'
    )


def visit_choice(writer: Any, node: Choice) -> None:
    held, letter = node.parent.parent, node["letter"]
    kind, name = "checkbox" if held["several"] else "radio", f"selftest-{held['label']}"
    writer.body.append(
        f'<div class="selftest-option"><input type="{kind}" name="{name}" id="{name}-{letter}" value="{letter}">'
        f'<label for="{name}-{letter}"><span class="selftest-letter">{letter}.</span> <span>'
    )


def depart_choice(writer: Any, node: Choice) -> None:
    writer.body.append("</span></label></div>\n")


def visit_reasons(writer: Any, node: Reasons) -> None:
    writer.body.append(
        f'<details class="selftest-answers">\n<summary>{words_of(writer)["answers"]}</summary>\n'
        '<ol type="A">\n'
    )


def depart_reasons(writer: Any, node: Reasons) -> None:
    writer.body.append("</ol>\n</details>\n")


def visit_reason(writer: Any, node: Reason) -> None:
    kind = verdict(node)
    word = words_of(writer)[kind]
    writer.body.append(
        f'<li class="selftest-{kind}" data-letter="{node["letter"]}">'
        f'<strong class="selftest-word">{word}</strong> '
    )


def depart_reason(writer: Any, node: Reason) -> None:
    writer.body.append("</li>\n")


def visit_score(writer: Any, node: Score) -> None:
    words = words_of(writer)
    writer.body.append(
        f'<div class="selftest-score" data-score="{words["score"]}" data-end="{words["end"]}" hidden>\n'
        '<p class="selftest-count"></p>\n<p class="selftest-end" role="status"></p>\n'
        f'<button type="button">{words["again"]}</button>\n</div>\n'
    )


def depart_score(writer: Any, node: Score) -> None:
    pass


def add_files(app: Any, page: str, template: str, context: Any, tree: Any) -> None:
    """The script and the styles, on pages with questions alone."""
    if tree is not None and any(True for _ in tree.findall(Question)):
        app.add_js_file(FILES["js"], loading_method="defer")
        app.add_css_file(FILES["css"])


def setup(app: Any) -> dict[str, Any]:
    app.add_config_value("selftest_words", {}, "env", dict)
    for name, directive in (
        ("selftest", SelfTest),
        ("selftests", SelfTests),
        ("selftest-score", ScoreHere),
    ):
        app.add_directive(name, directive)
    for kind in (
        Question,
        Asked,
        Choices,
        Choice,
        Reasons,
        Reason,
        Score,
    ):
        visit, depart = (globals()[f"{way}_{kind.__name__.lower()}"] for way in ("visit", "depart"))
        app.add_node(kind, html=(visit, depart))
    app.add_node(Place)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("doctree-read", mark)
    app.connect("env-updated", collecting)
    app.connect("doctree-resolved", collect)
    app.connect("html-page-context", add_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
