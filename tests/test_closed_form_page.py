"""The page on closed-form heads: labels of test tasks choose nothing."""

from __future__ import annotations

import numpy as np
import torch
from pages import run_until

from mtlib.core import Batch, Episode
from mtlib.data import characters as letters
from mtlib.data import sinusoids as sines


def test_rates_and_strengths_are_chosen_without_labels_of_test_tasks(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_RECORD", raising=False)
    plain_characters, plain_sinusoids = letters.characters, sines.sinusoids

    def shuffled_characters(part="train", **options):
        """Test drawings under each other's names."""
        data = plain_characters(part, **options)
        if part != "test":
            return data
        flat = data.items.flatten(0, 1)
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(flat)))
        return data._replace(items=flat[rows].view(data.items.shape))

    def other_sinusoids(*args, **options):
        """Query points of the page's test seed with the wrong sign."""
        stream = plain_sinusoids(*args, **options)

        def wrong(step):
            support, query = stream(step)
            return Episode(support, Batch(query.x, -query.y))

        seed = options.get("seed", args[3] if len(args) > 3 else 0)
        return wrong if seed == 1002 else stream

    before = run_until("closed_form", "shown_chars")
    monkeypatch.setattr(letters, "characters", shuffled_characters)
    monkeypatch.setattr(sines, "sinusoids", other_sinusoids)
    after = run_until("closed_form", "shown_chars")
    assert before["TEST"] == 1002 and len(before["chosen"]) == len(before["WAYS"])
    assert before["chosen"] == after["chosen"]
    assert before["settings"] == after["settings"] and before["qualities"] == after["qualities"]
    for name, kept in before["curves"].items():
        assert kept["runs"] != after["curves"][name]["runs"]  # the change was seen
