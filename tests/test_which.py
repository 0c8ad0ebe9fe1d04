"""The page that compares every learner: its catalogue is whole, its lines run, and test labels choose nothing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import run_until

import mtlib.data.characters as letters
import mtlib.data.planted as clouds
import mtlib.learners
from mtlib.core import Learner, take
from mtlib.tasks import episodes

BOOK = Path(__file__).resolve().parent.parent / "book"
GENERAL = {"descent", "inner_loop", "learned", "point"}  # what learners are made of
ELSEWHERE = {
    "transductive",
    "policy",
    "hyper",
}  # modules whose protocol is another; each has its page


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_RECORD", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def public_learners():
    """Names of the functions of `mtlib.learners` that return a Learner."""
    for module in pkgutil.iter_modules(mtlib.learners.__path__):
        room = importlib.import_module(f"mtlib.learners.{module.name}")
        for name, f in inspect.getmembers(room, inspect.isfunction):
            own = f.__module__ == room.__name__ and not name.startswith("_")
            if own and inspect.signature(f).return_annotation in (Learner, "Learner"):
                yield module.name, name


def test_the_catalogue_has_every_learner():
    text = (BOOK / "which.ipynb").read_text("utf8")
    lines = [line for line in text.splitlines() if "Way(" in line or "lambda net" in line]
    code = "\n".join(lines)
    found = {(room, name) for room, name in public_learners() if name not in GENERAL}
    assert len(found) > 25
    learners = {name for room, name in found if room not in ELSEWHERE}
    missing = {name for name in learners if not re.search(rf"\b{name}\b", code)}
    assert missing == {"as_is"}, "no line for these"  # as_is is joint training without adaptation


def test_every_line_of_the_catalogue_adapts_and_answers(small):
    page = run_until("which", "PLANTED")
    problem = page["PLANTED"]
    task = take(episodes(problem.held, 5, 2, 3, tasks=1, seed=0)(0), 0)
    for name, way in page["EVERY"].items():
        net = problem.network(5)
        learner = way.make(net, way.settings[0], 2)
        theta = learner.adapt(learner.init(), task.support)
        prediction = learner.predict(theta, task.query.x)
        assert prediction.shape == (15, 5 * getattr(way.loss, "columns", 1)), name
        assert torch.isfinite(prediction).all(), name


def test_settings_are_chosen_without_test_labels(small, monkeypatch):
    plain, drawn = clouds.planted, letters.characters

    def mixed(data):
        """Items under each other's names."""
        flat = data.items.flatten(0, 1)
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(flat)))
        return data._replace(items=flat[rows].view(data.items.shape))

    before = run_until("which", "some")
    monkeypatch.setattr(
        clouds,
        "planted",
        lambda *a, seed=0, **k: (
            mixed(plain(*a, seed=seed, **k)) if seed == 2 else plain(*a, seed=seed, **k)
        ),
    )
    monkeypatch.setattr(
        letters,
        "characters",
        lambda part="train", **k: mixed(drawn(part, **k)) if part == "test" else drawn(part, **k),
    )
    after = run_until("which", "some")
    for rows in ("rows", "some"):
        assert before[rows]
        for name, kept in before[rows].items():
            assert (
                kept["choice"] == after[rows][name]["choice"]
                and kept["tried"] == after[rows][name]["tried"]
            )
        assert any(kept["runs"] != after[rows][name]["runs"] for name, kept in before[rows].items())
