"""The central comparison: the oracle and the turned tasks are what they claim, and test labels choose nothing."""

from __future__ import annotations

import pytest
import torch
from pages import mix_test_planted, run_until

from mtlib.evaluate import evaluate


@pytest.fixture
def page(small):
    return run_until("meta_or_transfer", "tasks")


@pytest.mark.parametrize("degrees", [0, 30, 90])
def test_turning_moves_the_tasks_and_not_their_difficulty(page, degrees):
    """The turn is a rotation that takes the hidden directions to an angle with themselves; the oracle follows it."""
    data = page["turned"](page["test"], degrees)
    before, after = page["test"].items, data.items
    assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), atol=1e-3)
    c = torch.tensor(degrees).deg2rad()
    seen = c.cos() * page["HIDDEN"] + c.sin() * page["LOUD"]
    assert torch.allclose(after @ seen, before @ page["HIDDEN"], atol=1e-3)
    scores = [
        evaluate(page["oracle"](d), page["oracle"](d).init(), page["tasks"](x, 5), 40)
        for d, x in ((0, page["test"]), (degrees, data))
    ]
    assert torch.allclose(scores[0].values, scores[1].values, atol=0.02)


def test_the_oracle_knows_what_classes_differ_in(page):
    known = evaluate(
        page["oracle"](0), page["oracle"](0).init(), page["tasks"](page["test"], 5), 100
    )
    wrong = evaluate(
        page["oracle"](90), page["oracle"](90).init(), page["tasks"](page["test"], 5), 100
    )
    assert known.mean > 0.9 and abs(wrong.mean - 0.2) < 0.05, "the loud directions tell nothing"


def test_settings_are_chosen_without_labels_of_test_classes(small):
    def run():
        made = run_until("meta_or_transfer", "phis")
        asked, plain = [], made["best_setting"]

        def choose(*arguments):
            asked.append(plain(*arguments))
            return asked[-1]

        made["best_setting"] = choose
        phi = made["phis"][0]
        scores = {}
        for name, (way, column) in {
            "scratch": ("nothing", "fine-tuning"),
            "MAML": ("MAML", "MAML's steps"),
        }.items():
            setting = choose(phi[way], column, 64, 1)
            scores[name] = made["cell"](phi[way], column, setting, 64, made["test"], 1, 20).values
        return asked, scores

    chosen, scores = run()
    mix_test_planted(small)
    again, other = run()
    assert chosen and chosen == again
    assert any(not torch.equal(scores[k], other[k]) for k in scores)
