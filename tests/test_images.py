"""The page on image classification: its choices never see a test label."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.data import characters as module
from mtlib.data.glyphs import glyphs


def choices(patch, shuffled: bool):
    """What the page chooses on glyphs; with `shuffled`, the test characters' drawings change classes."""

    def characters(part="train", **_):
        first = {"train": 0, "val": 1, "test": 2}[part]
        data = glyphs(24, first=first)
        if part == "test" and shuffled:
            flat = data.items.flatten(0, 1)
            order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
            data = data._replace(items=flat[order].view_as(data.items))
        return data

    patch.setattr(module, "characters", characters)
    space = run_until("images", "CHOSEN")
    streams = space["validation_stream"](0).support.x, space["test_stream"](0).support.x
    return space["CHOSEN"], streams


def test_the_settings_are_chosen_without_test_labels(small):
    (a, seen), (b, again) = (choices(small, shuffled) for shuffled in (False, True))
    assert a == b and len(a) == 4
    assert torch.equal(seen[0], again[0]) and not torch.equal(seen[1], again[1])
