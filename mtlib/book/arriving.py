"""Items that arrive one after the other without labels: in which order, how a network that adapts fares, who notices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtlib.book.contest import Contest
from mtlib.core import expect
from mtlib.tasks import check_seed, check_tensor, positive
from mtlib.transfer.selection import check_logits
from mtlib.transfer.test_time import alarm, changes, varieties

ORDERS = ("mixed", "uneven", "sorted")
"""How items arrive: in random order; with classes of unequal shares, 0.6ᵏ as many of the k-th; one class after the other."""
FALLEN = (0.05, 0.10)  # behind the frozen network, on the same items
CHANGED = (0.10, 0.20)  # shares of answers changed at which an alarm fires
SURE = 0.2  # SAR goes back where a moving average of the entropy is below


def arrivals(y: Tensor, order: str, seed: int) -> Tensor:
    """The numbers of n items in the order in which they arrive, from their classes y (n,) -> (n,).

    Mixed and sorted hold each item once; uneven draws n of them with replacement. Which class is first, or most frequent,
    follows the seed.
    """
    check_tensor(y, "y")
    expect(order in ORDERS, f"an order, one of {ORDERS}", order)
    whole = y.ndim == 1 and len(y) > 0 and not y.is_floating_point()
    expect(whole, "classes y (n,), whole numbers", y)
    check_seed(seed)
    rng, classes = np.random.default_rng([seed, 11]), y.cpu().numpy()
    shuffled, place = rng.permutation(len(classes)), rng.permutation(int(classes.max()) + 1)
    if order == "sorted":
        shuffled = shuffled[np.argsort(place[classes[shuffled]], kind="stable")]
    if order == "uneven":
        weight = 0.6 ** place[classes] / np.bincount(classes)[classes]
        shuffled = rng.choice(len(classes), len(classes), p=weight / weight.sum())
    return torch.from_numpy(shuffled)


def watched(
    logits: Tensor, frozen: Tensor, y: Tensor, least: float, window: int
) -> dict[str, Tensor]:
    """Who is right, (n,) twice, and after how many items something happened, −1 for never: a run as a record keeps it.

    "fell 5" and "fell 10": a window in which the adapting network has so many points fewer right than the frozen one, of the
    same items. "variety": `varieties` below `least`. "entropy": the mean entropy of a window below 0.2. "changed 10" and
    "changed 20": `changes` above a tenth, above a fifth.
    """
    a, b = check_logits(logits), check_logits(frozen)
    positive(window=window)
    expect(a.shape == b.shape and y.shape == a.shape[:1], "answers (n, C) twice, y (n,)", y)
    right, before = ((v.argmax(1) == y).double() for v in (a, b))
    behind = (before - right).unfold(0, window, 1).mean(1)
    entropy = torch.special.entr(torch.softmax(a, 1)).sum(1).unfold(0, window, 1).mean(1)
    moved, varied = changes(a, b, window), varieties(a, window)
    told: dict[str, int | None] = {
        **{f"fell {100 * k:.0f}": alarm(behind, window, above=k) for k in FALLEN},
        "variety": alarm(varied, window, below=least),
        "entropy": alarm(entropy, window, below=SURE),
        **{f"changed {100 * k:.0f}": alarm(moved, window, above=k) for k in CHANGED},
    }
    items = {k: torch.tensor(-1.0 if n is None else float(n)) for k, n in told.items()}
    return {"accuracy": right, "frozen": before, **items}


def noticed(found: Contest, column: str, among: list[str], fell: str = "fell 10") -> dict[str, Any]:
    """What an alarm of `watched` did over all runs of the methods `among`, as a row of a table: runs that fell, and that did not.

    In time is before the fall, or with it, on the same window. "Items ahead" is the median over those in time. An alarm
    after which no fall comes is false.
    """
    at, down = (torch.cat([found.each(k, c).flatten() for k in among]) for c in (column, fell))
    falls, rang = down > 0, at > 0
    soon = falls & rang & (at <= down)
    ahead = (down - at)[soon]
    return {
        "fell": int(falls.sum()),
        "in time": int(soon.sum()),
        "late": int((falls & rang & ~soon).sum()),
        "missed": int((falls & ~rang).sum()),
        "items ahead": f"{float(ahead.median()):.0f}" if len(ahead) else "",
        "did not fall": int((~falls).sum()),
        "false alarms": int((~falls & rang).sum()),
    }


def fallen(found: Contest, methods: Mapping[str, str], fell: str = "fell 10") -> dict[str, str]:
    """Method's column -> how many of its runs fell, '7 of 30'."""
    runs = {c: found.each(k, fell).flatten() for c, k in methods.items()}
    return {c: f"{int((v > 0).sum())} of {len(v)}" for c, v in runs.items()}
