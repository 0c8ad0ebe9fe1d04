"""Items that arrive one after the other without labels: in which order, how a network that adapts fares, who notices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.book.contest import Contest
from mtlib.book.directions import Direction
from mtlib.core import Batch, Params, apply, expect
from mtlib.norm import calibrate
from mtlib.run.copies import evaluating
from mtlib.tasks import check_seed, check_tensor, positive
from mtlib.transfer.selection import check_logits
from mtlib.transfer.test_time import alarm, changes, least_variety, tent, varieties

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


class Frozen(NamedTuple):
    """A trained network as it stays: what one that adapts is compared with, without a label."""

    net: nn.Module
    params: Params  # with the norms' statistics of unlabelled images of the target
    least: float  # variety below which one window in a hundred of the source's held-out images lies


def frozen(
    net: nn.Module, phi: Params, seen: Tensor, own: Tensor, held: Tensor, window: int
) -> Frozen:
    """The network with the statistics of the target's `seen` images; `own` and `held` are the source's, seen and held out."""
    at_home = calibrate(net, phi, [own])
    answers = _read(net, at_home, held)
    return Frozen(net, calibrate(net, phi, [seen]), least_variety(answers, window))


def arriving(
    twin: Frozen,
    data: Batch,
    order: str,
    size: int,
    rate: float,
    seed: int,
    window: int,
    **how: Any,
) -> dict[str, Tensor]:
    """`watched` of `tent(..., rate, **how)` on the items of `data` in batches of `size` in an order, beside the frozen twin.

    With `reset=True` it goes back to where it began as soon as more than a fifth of the answers of a window are not the
    twin's.
    """
    positive(size=size)
    i = arrivals(data.y, order, seed)
    x, y = data.x[i], data.y[i]
    before = _read(twin.net, twin.params, x)

    def watch(answers: Tensor, first: int) -> bool:
        n, most = len(answers), CHANGED[-1]
        if n < window:
            return False
        last = slice(first + n - window, first + n)
        return bool(changes(answers[-window:], before[last], window)[-1] > most)

    how["watch"] = watch if how.pop("reset", False) else None
    found = tent(twin.net, twin.params, x.split(size), rate, **how)
    return watched(found.logits, before, y, twin.least, window)


@torch.no_grad()
def _read(net: nn.Module, phi: Params, x: Tensor) -> Tensor:
    with evaluating():
        return apply(net)(phi, x)


def rate_for(
    target: str, between: Sequence[Direction], found: Mapping[float, Sequence[float]]
) -> float:
    """The rate that is best on the directions to the other targets: `found` is rate -> its quality in each direction."""
    others = [i for i, (_, b) in enumerate(between) if b != target]
    expect(bool(others) and bool(found), "qualities in directions to other targets", between)
    return max(found, key=lambda rate: float(np.mean([found[rate][i] for i in others])))


def watched(
    logits: Tensor, before: Tensor, y: Tensor, least: float, window: int
) -> dict[str, Tensor]:
    """Who is right, (n,) twice, and after how many items something happened, −1 for never: a run as a record keeps it.

    "fell 5" and "fell 10": a window in which the adapting network has so many points fewer right than the frozen one, of the
    same items. "variety": `varieties` below `least`. "entropy": the mean entropy of a window below 0.2. "changed 10" and
    "changed 20": `changes` above a tenth, above a fifth.
    """
    a, b = check_logits(logits), check_logits(before)
    positive(window=window)
    expect(a.shape == b.shape and y.shape == a.shape[:1], "answers (n, C) twice, y (n,)", y)
    right, other = ((v.argmax(1) == y).double() for v in (a, b))
    behind = (other - right).unfold(0, window, 1).mean(1)
    entropy = torch.special.entr(torch.softmax(a, 1)).sum(1).unfold(0, window, 1).mean(1)
    moved, varied = changes(a, b, window), varieties(a, window)
    told: dict[str, int | None] = {
        **{f"fell {100 * k:.0f}": alarm(behind, window, above=k) for k in FALLEN},
        "variety": alarm(varied, window, below=least),
        "entropy": alarm(entropy, window, below=SURE),
        **{f"changed {100 * k:.0f}": alarm(moved, window, above=k) for k in CHANGED},
    }
    items = {k: torch.tensor(-1.0 if n is None else float(n)) for k, n in told.items()}
    return {"accuracy": right, "frozen": other, **items}


def noticed(found: Contest, column: str, among: list[str], fell: str = "fell 10") -> dict[str, Any]:
    """What an alarm of `watched` did over all runs of the methods `among`, as a row of a table: runs that fell, and that did not.

    In time is before the fall, or with it, on the same window. "Items ahead" is the median over those in time. An alarm
    after which no fall comes is false.
    """
    _check_contest(found)
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
    _check_contest(found)
    runs = {c: found.each(k, fell).flatten() for c, k in methods.items()}
    return {c: f"{int((v > 0).sum())} of {len(v)}" for c, v in runs.items()}


def _check_contest(found: object) -> None:
    expect(isinstance(found, Contest), "a contest of directions, as `directions` gives it", found)
