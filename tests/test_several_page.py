"""The page on several sources and targets: labels of test images choose nothing."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.data import digits


def test_trials_are_chosen_without_labels_of_test_images(small):
    before = run_until("several", "runs")
    tested, plain = before["TESTED"], digits.scanners

    def shuffled(*args, **options):
        domains = plain(*args, **options)
        for name, rows in tested.items():
            y = domains[name].y.clone()
            y[rows] = y[rows].flip(0)
            assert not torch.equal(y, domains[name].y)
            domains[name] = domains[name]._replace(y=y)
        return domains

    small.setattr(digits, "scanners", shuffled)
    after = run_until("several", "runs")
    assert len(before["CHOSEN"]) == len(before["METHODS"]) == 7
    assert {len(trials) for trials in before["METHODS"].values()} == {6}  # one budget for all
    assert before["CHOSEN"] == after["CHOSEN"] and before["tuning"] == after["tuning"]
    assert before["runs"] != after["runs"]  # the change was seen
