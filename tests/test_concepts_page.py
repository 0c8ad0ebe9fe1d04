"""The pages of words: what the concepts' figures and solutions say, computed anew; the glossary's form; the front page's numbers."""

from __future__ import annotations

import json
import math
import re

import matplotlib as mpl
import numpy as np
import pytest
import torch
from pages import BOOK, at_small_scale, run_until
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from test_prose import entries

from mtlib.book.drawings import drawn_episodes, shifts_drawn, three_shifts, two_trainings
from mtlib.core import Batch, Episode
from mtlib.tasks import ClassSet, episodes, one_hot

mpl.use("Agg")


# The figures ------------------------------------------------------------------------------------


def test_the_right_half_of_both_trainings_is_one(shown):
    two_trainings()
    words = [
        sorted(t.get_text() for t in ax.texts if t.get_position()[0] > 6) for ax in shown[0].axes
    ]
    assert len(words) == 2 and words[0] == words[1] and "adapt" in words[0]


def test_support_images_have_their_numbers_and_queries_none(shown):
    x = torch.rand(2, 4, 1, 5, 5)
    y = one_hot(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]), 2)
    drawn_episodes(Episode(Batch(x, y), Batch(x[:, :2], y[:, ::2])))
    for ax, numbers in zip(shown[0].axes, ("1122", "2211"), strict=True):
        under = sorted((t.get_position()[0], t.get_text()) for t in ax.texts)
        under = [words for _, words in under if len(words) == 1]
        assert "".join(under) == numbers + "??"
        assert len(ax.images) == 6
        np.testing.assert_allclose(ax.images[0].get_array(), 1 - x[shown[0].axes.index(ax), 0, 0])


def test_each_character_of_the_page_has_another_number_in_its_second_episode():
    with at_small_scale():
        episode = run_until("concepts", "episode")["episode"]
    first, second = episode.support
    means = first.unflatten(1, (3, 2)).mean(2)  # (tasks, numbers, ...)
    assert first.shape[:2] == (2, 6) and second.shape == (2, 6, 3)
    apart = (means[0][:, None] - means[1][None]).flatten(2).norm(dim=2)
    same = apart.argmin(1)  # of a character in the first episode: its number in the second
    assert sorted(same.tolist()) == [0, 1, 2] and all(i != k for i, k in enumerate(same.tolist()))


def wrong(threshold, below, above):
    """The share of class 0 above a threshold and of class 1 below it, from their densities P(x, y)."""
    return quad(below, threshold, 15, limit=200)[0] + quad(above, -15, threshold, limit=200)[0]


def logistic(v):
    return 1 / (1 + math.exp(-v))


def half(x):
    return 0.5 * (norm.pdf(x + 1) + norm.pdf(x - 1))


WORLDS = {
    "inputs": (
        lambda x: norm.pdf(x - 1.5) * logistic(-2 * x),
        lambda x: norm.pdf(x - 1.5) * logistic(2 * x),
    ),
    "shares": (lambda x: 0.1 * norm.pdf(x + 1), lambda x: 0.9 * norm.pdf(x - 1)),
    "rule": (lambda x: half(x) * logistic(3 - 2 * x), lambda x: half(x) * logistic(2 * x - 3)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_three_shifts_are_what_they_say(name):
    found, densities = three_shifts()[name], WORLDS[name]
    best = minimize_scalar(lambda t: wrong(t, *densities), bounds=(-3, 3), method="bounded")
    assert found.best == pytest.approx(best.x, abs=2e-3)
    assert found.least == pytest.approx(best.fun, abs=1e-4)
    assert found.carried == pytest.approx(wrong(0, *densities), abs=2e-4)
    step = found.x[1] - found.x[0]
    assert step * found.both.sum() == pytest.approx(1, abs=1e-9)


def test_the_shifts_change_the_part_they_name_and_no_other():
    found = three_shifts()
    x = found["inputs"].x
    one = {name: s.both[1] / s.both.sum(0) for name, s in found.items()}
    near = np.abs(x) < 6
    at_source = 1 / (1 + np.exp(-2 * x))
    assert np.allclose(one["inputs"][near], at_source[near])  # P(y | x)
    for k, centre in enumerate((-1, 1)):  # P(x | y)
        mine = found["shares"].both[k]
        assert np.allclose(mine / (mine.sum() * (x[1] - x[0])), norm.pdf(x - centre))
    assert np.allclose(found["rule"].both.sum(0), [half(v) for v in x])  # P(x)


def test_the_figure_of_shifts_has_both_thresholds(shown):
    shifts_drawn()
    for ax, shift in zip(shown[0].axes, three_shifts().values(), strict=True):
        upright = [
            line.get_xdata()[0] for line in ax.get_lines() if len(set(line.get_xdata())) == 1
        ]
        assert sorted(upright) == sorted([0, shift.best])


# The solutions ----------------------------------------------------------------------------------


def solution(name):
    cells = json.loads((BOOK / "concepts.ipynb").read_text("utf8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    return re.search(rf"{{solution}} ex-concepts-{name}\n(.+?)\n```+(?:\n|$)", text, re.S)[1]


def test_thirty_classes_make_many_tasks_but_no_large_ones():
    assert f"{math.comb(30, 5):,}".replace(",", "{,}") in solution("episode")
    mine = ClassSet(torch.rand(30, 20, 8), [str(c) for c in range(30)], "mine")
    with pytest.raises(ValueError, match="20"):
        episodes(mine, ways=5, shots=10, queries=15, tasks=1, seed=0)
    draw = episodes(mine, ways=5, shots=10, queries=10, tasks=1, seed=0)(0)
    assert draw.support.x.shape == draw.query.x.shape == (1, 50, 8)


def test_shares_move_the_threshold_by_half_their_log_odds():
    best = minimize_scalar(
        lambda t: wrong(t, lambda x: 0.3 * norm.pdf(x + 1), lambda x: 0.7 * norm.pdf(x - 1)),
        bounds=(-3, 3),
        method="bounded",
    ).x
    assert best == pytest.approx(-0.5 * math.log(0.7 / 0.3), abs=1e-4)
    assert f"−{-best:.2f}" in solution("shares")
    assert three_shifts()["shares"].best == pytest.approx(-0.5 * math.log(9), abs=1e-3)


# The glossary and the front page -------------------------------------------------------------------


def test_the_glossary_is_in_order_and_names_each_term_in_chinese():
    text = (BOOK / "glossary.md").read_text("utf8").split(":::{glossary}\n")[1].split(":::")[0]
    blocks = [b.splitlines() for b in text.strip().split("\n\n")]
    names = [b[0] for b in blocks]
    assert names == sorted(names, key=str.lower) and len(set(names)) == len(names) >= 100
    assert all(re.match(r"  \([^)]*[\u4e00-\u9fff][^)]*\) \S", b[-1]) for b in blocks)
    assert {line for b in blocks for line in b[:-1]} == entries()


PAGES = ["index.md", "glossary.md", "concepts.ipynb"]


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_words_lead_to_pages_that_exist(name):
    found = re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`", (BOOK / name).read_text("utf8"))
    assert len(found) > 20
    assert not {
        d for d in found if not any((BOOK / d).with_suffix(s).is_file() for s in (".md", ".ipynb"))
    }


def test_the_front_page_shows_numbers_that_other_pages_keep():
    """`{glue:text}` of another page: the build takes them from there, and fails where one is missing."""
    found = re.findall(r"\{glue:text\}`([^`]+)`", (BOOK / "index.md").read_text("utf8"))
    assert len(found) >= 5
    for text in found:
        page, key = re.fullmatch(r"(\w+\.ipynb)::([\w-]+):s", text).groups()
        cells = json.loads((BOOK / page).read_text("utf8"))["cells"]
        code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert f'glue("{key}"' in code, f"{page} keeps no {key}"
