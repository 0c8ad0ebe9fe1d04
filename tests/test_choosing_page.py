"""The page on choosing: test labels of the target reach the bad habit's column and no other."""

from __future__ import annotations

import numpy as np
import torch
from pages import run_until

from mtlib.data import digits as module
from mtlib.data.digits import changed, prepared


def stand_in(wrong: bool):
    """The stand-in's scanners; where `wrong`, the labels of each one's test half are those of other images."""
    found = {}
    for name, (images, y) in changed().items():
        x = torch.from_numpy(np.stack([prepared(i, 16, True) for i in images]))[:, None]
        y = y.copy()
        if wrong:
            tested = np.random.default_rng(9).permutation(len(y))[: len(y) // 2]
            y[tested] = np.random.default_rng(0).permutation(y[tested])
        found[name] = module.Domain(x, torch.from_numpy(y.astype(np.int64)), "x (stand-in)")
    return found


def test_test_labels_choose_nothing_but_the_bad_habits_column(small):
    def run(wrong: bool):
        held = stand_in(wrong)
        small.setattr(module, "scanners", lambda **_: held)
        return run_until("choosing", "CHOSEN")

    a, b = run(False), run(True)
    assert a["scores"] == b["scores"] and a["distance"] == b["distance"]
    for key, choice in a["CHOSEN"].items():
        if key[0] != "test labels":
            assert choice == b["CHOSEN"][key], key
    habit = [key for key in a["CHOSEN"] if key[0] == "test labels"]
    assert any(a["CHOSEN"][key] != b["CHOSEN"][key] for key in habit), "the change was not seen"
    assert {key[0] for key in a["CHOSEN"]} == set(a["COLUMNS"])
    best = max(a["right"][c] for c in a["right"] if c[:3] == (*a["DIRECTIONS"][0], 0))
    assert a["right"][a["CHOSEN"]["test labels", "all methods", *a["DIRECTIONS"][0], 0]] == best
