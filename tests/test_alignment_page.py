"""The page on alignment: no label of the target chooses anything, and none of the seen ones reaches training."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.data import digits


def mix_labels(monkeypatch, domain_at: int) -> None:
    """The labels of one scanner stand with other images from here on."""
    plain = digits.scanners

    def other(**options):
        held = plain(**options)
        name = list(held)[domain_at]
        g = torch.Generator().manual_seed(0)
        y = held[name].y[torch.randperm(len(held[name].y), generator=g)]
        return {**held, name: held[name]._replace(y=y)}

    monkeypatch.setattr(digits, "scanners", other)


def test_methods_are_chosen_without_a_label_of_the_target(small):
    before = run_until("alignment", "TABLE")
    assert len(before["informed"]) == 14 and before["DIRECTIONS"][0] == tuple(before["DOMAINS"])[:2]
    mix_labels(small, 1)
    after = run_until("alignment", "TABLE")
    assert before["informed"] == after["informed"] and before["CHOSEN"] == after["CHOSEN"]
    assert any(
        not torch.equal(rows, after["right"][key]) for key, rows in before["right"].items()
    ), "the mixed labels are those that judge"


def test_labels_of_the_source_do_reach_training(small):
    before = run_until("alignment", "informed")
    mix_labels(small, 0)
    assert before["informed"] != run_until("alignment", "informed")["informed"]
