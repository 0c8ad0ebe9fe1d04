"""Figures that answer the hand: sliders over computed curves, a matrix by its labels, a path of questions.

Each is one piece of HTML with its numbers, style and script inside, so that it needs no server and no other file: in the
book, in Jupyter and in Colab. Where no script runs, as in GitHub's viewer, a table or a nested list says the same.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlib.book.contest import PERCENT, Contest, of_page
from mtlib.book.results import Paired, recorded
from mtlib.core import Episode, Loss, Params, Steps, apply, expect, move
from mtlib.learners.finetune import finetune
from mtlib.plots import BASELINE, BLUES, META, ORANGES, TRANSFER, style
from mtlib.tasks import positive

KINDS = ("sliders", "matrix", "path")
FAMILY = {META: "meta", TRANSFER: "transfer", BASELINE: "baseline"}
WORDS = {"yes": "Yes", "no": "No", "back": "Back", "again": "Start again"}
MOST = 1e4  # an error above this, or one that is no number, is told in words
BEYOND = f"above {MOST:,.0f}"
FAR = 999.0  # where curves are cut


@dataclass(frozen=True)
class Hand:
    """A figure that answers the hand: HTML with a script where one runs, and words where none does.

    `kind` is one of `KINDS`, `data` are its numbers as plain JSON, `plain` is HTML that says the same without a script, and
    `text` says it where there is no HTML: it is what `print` shows.
    """

    kind: str
    data: Mapping[str, Any]
    plain: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        held = json.dumps(self.data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for sign in "<>&":  # a script ends at its closing tag, wherever that stands
            held = held.replace(sign, f"\\u{ord(sign):04x}")
        key = blake2b(held.encode(), digest_size=6).hexdigest()
        begin = (
            f"for (const root of document.querySelectorAll('[data-hand=\"{key}\"]:not([data-ready])'))"
            " hand(root);"
        )
        return (
            f'<div class="mtlib-hand" data-hand="{key}" data-kind="{self.kind}">\n'
            f"<style>\n{_file('hand.css')}</style>\n"
            f'<div class="hand-live"></div>\n<div class="hand-plain">{self.plain}</div>\n'
            f'<script type="application/json">{held}</script>\n'
            f"<script>\n(() => {{\n{_file('hand.js')}{begin}\n}})();\n</script>\n</div>"
        )


# Sliders ---------------------------------------------------------------------------------------


def inner_steps(
    net: nn.Module,
    loss: Loss,
    ways: Mapping[str, Params],
    episode: Episode,
    truth: tuple[Tensor, Tensor],
    rates: Sequence[float],
    steps: int,
    start: tuple[float, int],
) -> Hand:
    """A new curve, and networks after 0 to `steps` gradient steps on a few of its points, at each of the `rates`: two sliders.

    θ₀ = φ, θ_{k+1} = θ_k − α ∇L^S(θ_k), for each φ of `ways`, name -> φ; all rates α and steps k are computed here. `episode` is
    one task with one input and one target, x and y (N, 1); its query loss at θ_k is shown beside the curve. `truth` are x and y
    (X, 1) of the true curve, and x is where curves are drawn; `start` = (rate, step) is shown first.

    Raises ValueError for an episode of several tasks, or inputs of more than one number, and for a start that is not there.
    """
    _check_steps(ways, episode, truth, rates, steps, start)
    ways, episode, (x, y) = move((dict(ways), episode, tuple(truth)), "cpu")  # small: any device
    drawn: list[dict[str, Any]] = []
    for name, phi in ways.items():
        paths = [_descent(net, loss, phi, episode, x, rate, steps) for rate in rates]
        curves = [[_hundredths(curve) for curve, _ in path] for path in paths]
        errors = [[error if error <= MOST else None for _, error in path] for path in paths]
        look = {"name": name, "colour": _colour(name), "family": FAMILY[_colour(name)]}
        drawn.append({**look, "curves": curves, "errors": errors})
    at = [list(rates).index(start[0]), start[1]]
    n = len(episode.support.x)
    axes = (
        ("inner rate", [f"{r:g}" for r in rates]),
        ("gradient steps", [*map(str, range(steps + 1))]),
    )
    alt = (
        f"A curve, dashed, {n} points of it, and {len(ways)} networks after so many gradient steps on these points, at so large "
        "a rate, as the two sliders say"
    )
    data = {
        "axes": [{"name": name, "values": values, "unit": ""} for name, values in axes],
        "start": at,
        "x": _hundredths(x),
        "truth": {"name": "the curve", "y": _hundredths(y)},
        "points": {
            "name": f"{n} points of it",
            "x": _hundredths(episode.support.x),
            "y": _hundredths(episode.support.y),
        },
        "ways": drawn,
        "error": "Mean squared error on other points" if _is_mse(loss) else "Loss on other points",
        "beyond": BEYOND,
        "alt": alt,
        "plain": "Its numbers as a table",
        **_frame(x, y),
    }
    heads = ["inner rate, steps", *ways]
    places = [(i, k) for i in range(len(rates)) for k in sorted({1, steps})]
    lines = [["any, 0 steps", *(_error(way["errors"][0][0]) for way in drawn)]] + [
        [f"{rates[i]:g}, {_steps(k)}", *(_error(way["errors"][i][k]) for way in drawn)]
        for i, k in places
    ]
    caption = f"{data['error']} of one task"
    return Hand("sliders", data, _table(caption, heads, lines), _lines(caption, heads, lines))


def _descent(
    net: nn.Module, loss: Loss, phi: Params, episode: Episode, x: Tensor, rate: float, steps: int
) -> list[tuple[Tensor, float]]:
    """The curve on x, and the query loss, after 0 to `steps` steps."""
    learner = finetune(net, loss, rate, steps)
    f = apply(net)
    found = []
    assert isinstance(learner.adapt, Steps)
    for theta in learner.adapt.path(phi, episode.support):
        theta = {k: v.detach() for k, v in theta.items()}
        with torch.no_grad():
            error = loss(f(theta, episode.query.x), episode.query.y)
            found.append((f(theta, x), float(error)))
    return found


def _frame(x: Tensor, y: Tensor) -> dict[str, Any]:
    """The axes: whole numbers about the curve, with room above and below."""
    high = math.ceil(1.3 * float(y.abs().max())) + 1
    low, top = math.floor(float(x.min())), math.ceil(float(x.max()))
    return {
        "xlim": [low, top],
        "ylim": [-high, high],
        "xticks": _ticks(low, top),
        "yticks": _ticks(-high, high),
    }


def _ticks(low: int, high: int) -> list[int]:
    """Whole numbers of equal distance, five or a few more, 0 among them where it lies between."""
    by = max(1, (high - low) // 5)
    return [k * by for k in range(math.ceil(low / by), high // by + 1)]


def _hundredths(values: Tensor) -> list[float | None]:
    """Numbers to two digits behind the point, cut far outside of any frame; None where there is none."""
    held = values.flatten().clamp(-FAR, FAR).tolist()
    return [round(v, 2) if math.isfinite(v) else None for v in held]


def _error(value: float | None) -> str:
    return BEYOND if value is None else f"{value:.2f}"


def _steps(k: int) -> str:
    return "1 step" if k == 1 else f"{k} steps"


def _is_mse(loss: Loss) -> bool:
    return getattr(loss, "__name__", "") == "mse_loss"


def _check_steps(ways: Any, episode: Any, truth: Any, rates: Any, steps: int, start: Any) -> None:
    expect(isinstance(ways, Mapping) and bool(ways), "ways, name -> φ, at least one", ways)
    positive(steps=steps)
    expect(isinstance(episode, Episode), "an Episode, one task", episode)
    held = [episode.support.x, episode.support.y, episode.query.x, episode.query.y, *truth]
    if not all(isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == 1 for v in held):
        raise ValueError(
            "expected one task, such as take(draw, 0), and a true curve, with one input and one target, x and y (N, 1), got "
            f"{[tuple(getattr(v, 'shape', ())) for v in held]}"
        )
    if len(truth) != 2 or truth[0].shape != truth[1].shape:
        raise ValueError(f"expected x and y of the true curve, two of one shape, got {held[4:]}")
    numbers = isinstance(rates, Sequence) and not isinstance(rates, str) and len(rates)
    if not numbers or not all(isinstance(r, float | int) and 0 < r < math.inf for r in rates):
        raise ValueError(f"expected rates above 0, at least one, got {rates!r}")
    if list(rates) != sorted(set(rates)):
        raise ValueError(f"expected rates that rise, as a slider goes, got {rates}")
    if len(start) != 2 or start[0] not in rates or start[1] not in range(steps + 1):
        raise ValueError(
            f"expected a start of one of the rates {list(rates)} and a step from 0 to {steps}, got {start}"
        )


# The matrix ------------------------------------------------------------------------------------


def by_labels(contests: Mapping[int, Contest], rows: Sequence[str], columns: Sequence[str]) -> Hand:
    """The matrix of trained by (`rows`) and adapted by (`columns`), for each number of labels: one table, and a button for each.

    `contests` are number of labels a class -> a contest with a way for each cell, f"{row} + {column}". A cell has the mean and
    the wider of its intervals. The best one of a matrix is marked, and so are those that it is not clearly ahead of: the
    paired difference's wider interval holds 0.
    """
    expect(
        isinstance(contests, Mapping) and bool(contests),
        "contests, labels -> Contest, at least one",
        contests,
    )
    for c in contests.values():
        expect(isinstance(c, Contest), "a Contest for each number of labels", c)
    expect(bool(rows) and bool(columns), "rows and columns, at least one of each", (rows, columns))
    levels = [_level(k, c, rows, columns) for k, c in contests.items()]
    first = next(iter(contests.values()))
    data: dict[str, Any] = {
        "corner": "trained by",
        "axis": "labels a class",
        "measure": f"{first.metric}, %" if first.metric in PERCENT else first.metric,
        "columns": [*columns],
        "rows": [{"name": r, "colour": _colour(r)} for r in rows],
        "levels": levels,
        "plain": "All tables below each other",
    }
    tables, texts = [], []
    for level in levels:
        caption = f"{data['measure']}, {data['axis']}: {level['name']}. {level['plain']}"
        heads = [data["corner"], *columns]
        lines = [
            [row, *(f"{c['text']} {c['half']}".strip() for c in cells)]
            for row, cells in zip(rows, level["cells"], strict=True)
        ]
        tables.append(_table(caption, heads, lines))
        texts.append(_lines(caption, heads, lines))
    return Hand("matrix", data, "\n".join(tables), "\n\n".join(texts))


def _level(
    labels: int, contest: Contest, rows: Sequence[str], columns: Sequence[str]
) -> dict[str, Any]:
    """One number of labels: the cells with their marks, and which is best, in words."""
    names = [f"{row} + {column}" for row in rows for column in columns]
    means = {name: contest.mean(name) for name in names}
    ran = {name: m for name, m in means.items() if math.isfinite(m)}
    sign = 1 if contest.higher else -1
    best = max(ran, key=lambda name: sign * ran[name], default="")
    level = [n for n in ran if n != best and _not_ahead(contest, best, n)]
    percent = contest.metric in PERCENT
    cells = []
    for row in rows:
        line = []
        for column in columns:
            name = f"{row} + {column}"
            text, _, half = contest.told(name).partition(" ± ")
            line.append(
                {
                    "text": text,
                    "half": half and f"± {half}",
                    "is": "best" if name == best else "level" if name in level else "",
                    "share": round(ran[name], 3) if percent and name in ran else None,
                }
            )
        cells.append(line)
    told = contest.told(best) if best else ""
    said, plain = (
        _best(best, told, level, marks) for marks in ((", framed", ", dotted"), ("", ""))
    )
    return {"name": str(labels), "cells": cells, "said": said, "plain": plain}


def _best(best: str, told: str, level: Sequence[str], marks: tuple[str, str]) -> str:
    """Which cell is best, in words, and how each kind of cell is marked."""
    if not best:
        return "Not run."
    others = f" Not clearly behind it{marks[1]}: {', '.join(level)}." if level else ""
    return f"The best cell{marks[0]}: {best}, {told}.{others}"


def _not_ahead(contest: Contest, best: str, other: str) -> bool:
    gap = contest.minus(best, other)
    return gap.low <= 0 <= gap.high


# The path --------------------------------------------------------------------------------------


class End(NamedTuple):
    """Where a path ends: what to do, with its number, and the page that measures it.

    `page` is its file's name without the suffix, `title` the text of the link; `section` is one of its anchors in the book.
    """

    text: str
    page: str
    title: str
    section: str = ""


class Question(NamedTuple):
    """A question of a path, and where its two answers lead."""

    text: str
    yes: Question | End
    no: Question | End


def path(root: Question) -> Hand:
    """Questions to be answered with yes or no, the path so far, and a page at its end; as a nested list without a script."""
    expect(isinstance(root, Question), "a Question to begin with", root)
    data = {"root": _node(root), "words": WORDS, "plain": "All questions as a list"}
    return Hand("path", data, f"<p>{html.escape(root.text)}</p>\n{_branches(root)}", _outline(root))


def nearest_case() -> Hand:
    """Meta or transfer? The path from what is known of the data to the case in the book that is nearest to it.

    Its numbers are read from the pages' records. What follows ± is half a 95 % interval.
    """
    shape = partial(of_page, "meta_or_transfer")
    naming, practice = "pre-training + class means", "ProtoNet"
    digits, bench = of_page("digits", "scanners"), of_page("which", "characters")
    new_place = Question(
        "Do you have labels there, a few of each class?",
        End(
            "Transfer. Train on the old place and the new labels together. With fifty labels of another scanner, ProtoNet minus "
            f"joint training: {digits.minus('ProtoNet, 50 labels', 'joint, 50 labels').points()} points.",
            "digits",
            "Digits across scanners",
        ),
        End(
            "Transfer. Prepare both places alike, take the norms' statistics from the new one, then SHOT. It gains "
            f"{_points('digits', 'gain')} on the source's network.",
            "digits",
            "Digits across scanners",
        ),
    )
    pretrained = Question(
        "Do you also have many classes of your own to practise on, dozens or more?",
        Question(
            "Are your data unlike what it was trained on, as drawings are to a network of photographs?",
            End(
                "Meta-learning, on top of the frozen features. On drawings and ImageNet's features, ProtoNet minus class means: "
                f"{_points('images')}.",
                "images",
                "Image classification",
            ),
            End(
                "Transfer: freeze it, and take whitened class means. On photographs, a practised head minus these: "
                f"{_points('pretrained')}.",
                "pretrained",
                "Photographs and a pretrained backbone",
            ),
        ),
        End(
            "Transfer: freeze it, and fit a logistic regression on its features. On sentences, with the classes' names as "
            f"examples, minus class means: {_points('intents', 'gain')}.",
            "intents",
            "Text classification: intents",
        ),
    )
    many = Question(
        "Are these tasks classes to be told apart?",
        End(
            "Meta-learning: practise on episodes. On characters of new alphabets, ProtoNet minus class means of a pre-trained "
            f"network: {_points('metric', 'gain')} with four convolutions. With the small network that all methods share, "
            f"{bench.minus(practice, naming).points()}: try both.",
            "metric",
            "Metric-based meta-learning",
        ),
        Question(
            "Are all tasks measured at the same points, as genes are at the same words?",
            End(
                "Meta-learning: a ridge regression that reads what other tasks have there. Meta-learned minus transferred: "
                f"{_gap('genes').told()} in rank correlation, over {_gap('genes').over}.",
                "genes",
                "Gene sequences: what a protein binds",
            ),
            End(
                "Meta-learning: a ridge regression on features that were trained through it. On users who rate films it saves "
                f"{_gap('films').told()} of the mean error on transfer, over {_gap('films').over}.",
                "films",
                "Recommendation, cold start",
            ),
        ),
    )
    few = Question(
        "Are these tasks classes to be told apart?",
        End(
            "Either: name the classes, pre-train, take class means, which is simpler. With 16 classes of 160 examples, ProtoNet "
            f"minus class means: {shape('16 classes').minus(practice, naming).points()} points.",
            "meta_or_transfer",
            "Meta or transfer?",
            "the-same-examples-in-few-classes-or-in-many",
        ),
        End(
            "Transfer: one body with a head for each old task, whose mean and spread are the new head's prior. With 24 curves, "
            f"squared error of a meta-learned ridge head minus this: {shape('24 curves').minus('ridge head', 'pre-training + own heads')}.",
            "meta_or_transfer",
            "Meta or transfer?",
            "the-second-experiment-curves",
        ),
    )
    turned = shape("classes").minus("from scratch", naming, "turned by 60")
    return path(
        Question(
            "Is there a network, trained by others, that reads your kind of data?",
            pretrained,
            Question(
                "Does the new task have the old classes, from another scanner, site or hospital?",
                new_place,
                Question(
                    "Will new tasks differ in other ways than the old ones did?",
                    End(
                        "Neither, to begin with: train on the new task alone, and compare. On classes that differ in other "
                        f"directions, turned by 60 degrees, this minus class means: {turned.points()} points.",
                        "meta_or_transfer",
                        "Meta or transfer?",
                        "new-tasks-of-another-kind",
                    ),
                    Question(
                        "Are the old tasks, or classes, many (hundreds), with few examples of each (twenty or fewer)?",
                        many,
                        few,
                    ),
                ),
            ),
        )
    )


def _gap(page: str, of: str = "versus") -> Paired:
    gap: Paired = getattr(recorded(page), of)
    return gap


def _points(page: str, of: str = "versus") -> str:
    """A recorded paired difference, and what it is over: '+5.1 ± 1.4 points, over 20 alphabets'."""
    gap = _gap(page, of)
    return f"{gap.told(100, 1)} points" + (f", over {gap.over}" if gap.over else "")


def _node(node: Any) -> dict[str, Any]:
    if isinstance(node, End):
        words = all(isinstance(word, str) for word in node) and all(node[:3])
        expect(words and Path(node.page).name == node.page, "an End of texts, and a page", node)
        return node._asdict()
    expect(isinstance(node, Question), "a Question or an End", node)
    expect(isinstance(node.text, str) and bool(node.text), "a question, a text", node.text)
    return {"text": node.text, "yes": _node(node.yes), "no": _node(node.no)}


def _branches(node: Question) -> str:
    return f"<ul>{_branch('Yes', node.yes)}{_branch('No', node.no)}</ul>"


def _branch(answer: str, node: Question | End) -> str:
    text = html.escape(node.text)
    if isinstance(node, Question):
        return f"<li><strong>{answer}.</strong> {text}{_branches(node)}</li>"
    page, title = html.escape(node.page), html.escape(node.title)
    at = html.escape(f"#{node.section}" if node.section else "")
    link = f'<a href="{page}.html{at}" data-page="{page}" data-at="{at}">{title}</a>'
    return f"<li><strong>{answer}.</strong> {text} {link}</li>"


def _outline(node: Question, depth: int = 0) -> str:
    lines = [] if depth else [node.text]
    for answer, after in (("Yes", node.yes), ("No", node.no)):
        begin = f"{'  ' * depth}- {answer}. {after.text}"
        if isinstance(after, Question):
            lines += [begin, _outline(after, depth + 1)]
        else:
            lines.append(f"{begin} ({after.title})")
    return "\n".join(lines)


# What they share -------------------------------------------------------------------------------


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf8")


def _colour(name: str) -> str:
    """Blue for a meta-learner, orange for transfer, grey for the rest: the family alone, which stands out on any ground."""
    shade = style(name).get("color")
    return META if shade in BLUES else TRANSFER if shade in ORANGES else BASELINE


def _table(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as HTML; the first cell of each line is its head."""
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in lines
    )
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _lines(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as lines of text."""
    return "\n".join([caption, *("; ".join(line) for line in ([*heads], *lines))])
