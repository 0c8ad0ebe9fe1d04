"""The page on an unseen domain: labels of the unseen domain choose nothing."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.data import digits


def shuffled(plain, rows_of):
    """`scanners` with the labels of some rows of each domain reversed."""

    def other(*args, **options):
        domains = plain(*args, **options)
        for name, rows in rows_of(domains).items():
            y = domains[name].y.clone()
            y[rows] = y[rows].flip(0)
            assert not torch.equal(y, domains[name].y)
            domains[name] = domains[name]._replace(y=y)
        return domains

    return other


def test_trials_are_chosen_without_labels_of_the_unseen_domain(small):
    plain = digits.scanners
    before = run_until("unseen", "runs")
    assert {len(t) for t in before["TRIALS"].values()} == {6}  # one budget for all
    assert {len(k) for k in before["COLOURED"].values()} == {6}
    out = before["NAMES"][0]
    here = [at for at in before["CHOSEN"] if at.endswith(f", {out}")]
    assert len(here) == len(before["TRIALS"])

    # labels that test, of every scanner: no choice changes
    small.setattr(digits, "scanners", shuffled(plain, lambda domains: before["TESTED"]))
    after = run_until("unseen", "runs")
    assert before["tuning"] == after["tuning"] and before["CHOSEN"] == after["CHOSEN"]
    assert before["runs"] != after["runs"]  # the change was seen

    # all labels of the unseen scanner: no choice for it changes, those of others may
    everything = {out: torch.arange(len(plain()[out].y))}
    small.setattr(digits, "scanners", shuffled(plain, lambda domains: everything))
    after = run_until("unseen", "CHOSEN")
    assert all(before["tuning"][at] == after["tuning"][at] for at in here)
    assert before["tuning"] != after["tuning"]

    # the coloured domains: the column of held-out training rows chooses
    for method, table in before["table"].items():
        assert torch.equal(before["chosen_trial"][method], table[:, :, 0].argmax(1))
