"""The examples in docstrings, run as they stand."""

from __future__ import annotations

import doctest
import importlib

import pytest

HOMES = ("bilevel", "evaluate", "joint", "learners.gradient", "nets", "tasks", "train")
FIRST = {"maml", "bilevel", "joint", "fit", "cosine_adam", "evaluate", "compare", "interval"}
FIRST |= {"over_seeds", "best_of", "episodes", "mixture", "one_hot", "mlp", "conv4"}


@pytest.mark.parametrize("home", HOMES)
def test_examples_give_what_they_show(home, monkeypatch):
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    done = doctest.testmod(importlib.import_module(f"mtlib.{home}"))
    assert done.attempted and not done.failed


def test_the_names_a_user_meets_first_have_one():
    modules = [importlib.import_module(f"mtlib.{home}") for home in HOMES]
    shown = {k for m in modules for k in FIRST if ">>>" in (getattr(m, k, None).__doc__ or "")}
    assert shown == FIRST
