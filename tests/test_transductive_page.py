"""The page on transductive learners: labels of test tasks choose nothing."""

from __future__ import annotations

import numpy as np
import torch
from pages import run_until

from mtlib.data import characters as letters


def test_settings_are_chosen_without_labels_of_test_tasks(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_RECORD", raising=False)
    plain = letters.characters

    def shuffled(part="train", **options):
        """Test drawings under each other's names."""
        data = plain(part, **options)
        if part != "test":
            return data
        flat = data.items.flatten(0, 1)
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(flat)))
        return data._replace(items=flat[rows].view(data.items.shape))

    before = run_until("transductive", "shown")
    monkeypatch.setattr(letters, "characters", shuffled)
    after = run_until("transductive", "shown")
    assert before["CHOSEN"] == after["CHOSEN"] and before["tried"] == after["tried"]
    runs = [{row: kept["runs"] for row, kept in page["table"].items()} for page in (before, after)]
    assert len(runs[0]) == 8 and runs[0] != runs[1]  # the change was seen
