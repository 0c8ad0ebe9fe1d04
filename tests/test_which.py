"""The page that compares every learner: its catalogue is whole, its lines run, and test labels choose nothing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import torch
from pages import BOOK, mix_test_characters, mix_test_planted, run_until

import mtlib.learners
from mtlib.core import Learner, take
from mtlib.tasks import episodes

GENERAL = {"descent", "inner_loop", "learned", "minibatches", "point"}  # what learners are made of
ELSEWHERE = {
    "transductive",
    "policy",
    "hyper",
}  # modules whose protocol is another; each has its page


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
    # as_is is joint training without adaptation; lp_ft, a solver and a loop for each task, is measured in `adapting`,
    # and R2-D2 whole, ALPaCA and the steps of ANIL as one solution in `closed_form`; optimizers as learners in `problems`,
    # and the transformer in `in_context`
    elsewhere = {"as_is", "lp_ft", "r2d2", "alpaca", "anil_at_once"}
    elsewhere |= {"learned_optimizer", "one_rate", "in_context"}
    assert missing == elsewhere, "no line for these"


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


def test_settings_are_chosen_without_test_labels(small):
    before = run_until("which", "some")
    mix_test_characters(small)
    mix_test_planted(small)
    after = run_until("which", "some")
    for rows in ("rows", "some"):
        assert before[rows]
        for name, kept in before[rows].items():
            assert (
                kept["choice"] == after[rows][name]["choice"]
                and kept["tried"] == after[rows][name]["tried"]
            )
        assert any(kept["runs"] != after[rows][name]["runs"] for name, kept in before[rows].items())
