"""The page on the gradient-based family: labels of test tasks choose nothing."""

from __future__ import annotations

import numpy as np
import torch
from pages import run_until

from mtlib.core import Batch, Episode
from mtlib.data import characters as letters
from mtlib.data import sinusoids as sines


def test_rates_and_steps_are_chosen_without_labels_of_test_tasks(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_RECORD", raising=False)
    plain_characters, plain_sinusoids = letters.characters, sines.sinusoids

    def shuffled_characters(part="train", **options):
        """Test drawings under each other's names."""
        data = plain_characters(part, **options)
        if part != "test":
            return data
        rows = torch.from_numpy(
            np.random.default_rng(0).permutation(data.items[..., 0, 0, 0].numel())
        )
        items = data.items.flatten(0, 1)[rows].view(data.items.shape)
        return data._replace(items=items)

    def other_sinusoids(*args, seed=0, **options):
        """Query points of the page's test seed with the wrong sign."""
        stream = plain_sinusoids(*args, seed=seed, **options)

        def wrong(step):
            support, query = stream(step)
            return Episode(support, Batch(query.x, -query.y))

        return wrong if seed == 1002 else stream

    before = run_until("gradient", "table")
    monkeypatch.setattr(letters, "characters", shuffled_characters)
    monkeypatch.setattr(sines, "sinusoids", other_sinusoids)
    after = run_until("gradient", "table")
    assert before["TEST"] == 1002 and len(before["RATES"]) == len(before["MEMBERS"])
    for name in ("RATES", "CHOSEN", "settings"):
        assert before[name] and before[name] == after[name]
    for name, kept in before["sines"].items():
        assert kept["steps"] == after["sines"][name]["steps"]
        assert kept["tuning"] == after["sines"][name]["tuning"]
        assert kept["runs"] != after["sines"][name]["runs"]  # the change was seen
