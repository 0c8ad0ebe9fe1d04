"""Items that arrive one after the other without labels: in which order, how a network that adapts fares, who notices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mtlib.book.contest import TUNING_SEED, Contest, Pieces
from mtlib.book.directions import Direction, Method, widest
from mtlib.book.page import device
from mtlib.book.results import kept, recording
from mtlib.core import Batch, Params, apply, expect, half, move, take
from mtlib.data.digits import pairs
from mtlib.joint import Penalty, joint
from mtlib.norm import calibrate
from mtlib.plots import BASELINE, ORANGES, TRANSFER
from mtlib.run.copies import evaluating
from mtlib.tasks import check_seed, check_tensor, positive
from mtlib.train import cosine_adam, fit
from mtlib.transfer.align import entropy, information
from mtlib.transfer.selection import check_logits
from mtlib.transfer.test_time import alarm, at_test, changes, least_variety, tent, varieties

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


def trained(
    net: nn.Module,
    phi: Params,
    data: Batch,
    rate: float,
    steps: int,
    seed: int,
    terms: Sequence[Penalty] = (),
    change: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
) -> Params:
    """φ after some steps of Adam on one scanner's images in batches of 32: by their labels, or by penalties without them."""
    both = pairs(data, data, seed, 32, change=change)
    objective = joint(net, cross_entropy, (int(not terms),), terms)
    how = {**cosine_adam(rate, steps), "device": device()}
    run = fit(objective, phi, lambda step: take(both(step), slice(1)), steps, **how)
    return move(run.params, "cpu")  # type: ignore[no-any-return]


STATISTICS = ("source statistics", "target statistics", "batch statistics")
"""Ways that learn nothing: where the norms' mean and variance come from."""


class Senders(NamedTuple):
    """Networks that were trained on one scanner each, and ways to adapt them to another one without labels."""

    network: Callable[[int], nn.Module]  # of a seed
    sent: Callable[[str, int], Params]  # φ of a scanner and a seed
    held: Mapping[
        str, tuple[Batch, Batch]
    ]  # scanner -> images that may be seen, and those that test
    between: Sequence[Direction]
    tried: Mapping[str, Sequence[float]]  # way -> its rates
    steps: int  # of the ways that make many passes
    read: int  # seen images that give the norms their statistics
    quality: Mapping[str, Any] = {}  # way -> rate -> direction, of `tuned`

    def answers(self, way: str, a: str, b: str, seed: int, rate: float) -> list[Tensor]:
        """Logits for as many seen images of b as test, and for its test images.

        TENT answers batches of 64 as they come. The other ways that learn have seen images for some steps, and read the
        statistics of some of them; "SHOT" is `information` with a frozen head, "SHOT without variety" `entropy`.
        """
        net, phi, (seen, tested) = self.network(seed), self.sent(a, seed), self.held[b]
        sets = (seen.x[: len(tested.x)], tested.x)
        if way in ("TENT", "batch statistics"):
            return [tent(net, phi, x.split(64), rate).logits for x in sets]
        if way in self.tried:
            moves = at_test(net) if "passes" in way else net
            half(moves, "head").requires_grad_(False)
            term = information() if way == "SHOT" else entropy()
            phi = trained(moves, phi, seen, rate, self.steps, seed, [term])
        whose = self.held[a if "source" in way else b][0].x[: self.read]
        phi = calibrate(net, phi, [whose])
        return [_read(net, phi, x) for x in sets]

    def tuned(self, page: str, name: str, real: bool) -> Senders:
        """The same with the accuracy on seen images for every rate that was tried, of the record, or of a recording."""
        found = kept(page, real).get(name, {})
        pieces = Pieces(page, name)

        def on_seen(way: str, rate: float) -> list[float]:
            said = [self.answers(way, a, b, TUNING_SEED, rate)[0] for a, b in self.between]
            truth = [self.held[b][0].y for _, b in self.between]
            return [
                (z.argmax(1) == y[: len(z)]).double().mean().item()
                for z, y in zip(said, truth, strict=True)
            ]

        if recording():
            found = {
                w: [pieces.keep([w, r], partial(on_seen, w, r)) for r in rates]
                for w, rates in self.tried.items()
            }
        return self._replace(quality=found)

    def methods(self) -> dict[str, Method]:
        """All ways, at the rate that was best on the directions to other targets; without a record, at the third."""
        return {
            way: Method("baseline" if way in STATISTICS else "transfer", partial(self._moved, way))
            for way in (*STATISTICS, *self.tried)
        }

    def _moved(self, way: str, a: str, b: str, seed: int) -> dict[str, Tensor]:
        rates = self.tried.get(way, (0.0,))
        known = dict(zip(rates, self.quality.get(way, ()), strict=False))
        rate = rate_for(b, self.between, known) if known else rates[-2:][0]
        logits = self.answers(way, a, b, seed, rate)[1]
        return {"accuracy": (logits.argmax(1) == self.held[b][1].y).double()}


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


Setting = tuple[str, int, float, Mapping[str, Any]]
"""The order, the size of a batch, the rate, and what else `tent` takes, or `reset=True` (`streamed`)."""


def streams(
    settings: Mapping[str, Setting],
    twin: Callable[[str, str, int], Frozen],
    held: Mapping[str, tuple[Batch, Batch]],
    window: int,
) -> dict[str, Method]:
    """What was `watched` on each target's test images, a method for each setting; `twin(source, target, seed)` is the frozen one."""

    def run(setting: Setting, a: str, b: str, seed: int) -> dict[str, Tensor]:
        still = twin(a, b, seed)
        return watched(*streamed(still, held[b][1], setting, seed, window), still.least, window)

    return {k: Method("transfer", partial(run, v)) for k, v in settings.items()}


def draw_traces(ax: Any, curves: Mapping[str, Tensor], window: int, classes: int = 10) -> None:
    """`traces` over the number of items so far; variety as a share of its most, log C."""
    looks = {
        "adapting": (TRANSFER, "-", 1.0),
        "frozen twin": (BASELINE, "-", 1.0),
        "changed": (ORANGES[1], "-.", 1.0),
        "variety": (ORANGES[2], "--", math.log(classes)),
    }
    for name, (colour, line, most) in looks.items():
        x = window + np.arange(len(curves[name]))
        label = "variety / its most" if name == "variety" else name
        ax.plot(x, curves[name] / most, color=colour, linestyle=line, label=label)


def traces(logits: Tensor, before: Tensor, y: Tensor, window: int) -> dict[str, Tensor]:
    """What `streamed` gave as curves over its windows: the two accuracies, `varieties` and `changes`, each (n − window + 1,)."""
    seen = {"variety": varieties(logits, window), "changed": changes(logits, before, window)}
    right, other = (
        (v.argmax(1) == y).double().unfold(0, window, 1).mean(1) for v in (logits, before)
    )
    return {"adapting": right, "frozen twin": other, **seen}


def streamed(
    twin: Frozen, data: Batch, setting: Setting, seed: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The items of `data` as they come, by `tent` beside the frozen twin: both networks' answers (n, C), and the classes (n,).

    With `reset=True` it goes back to where it began as soon as more than a fifth of the answers of a window are not the
    twin's.
    """
    order, size, rate, rest = setting
    how = dict(rest)
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
    return found.logits, before, y


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


def noticed(found: Contest, column: str, among: Sequence[str], window: int) -> dict[str, int | str]:
    """What an alarm of `watched` did over all runs of the methods `among`, as a row of a table.

    In time is in or before the window in which a run fell by ten points; "before 5" the same of five points, in runs that
    fell by ten. "Items ahead" is the median in those that fell after the first window, where nothing could be earlier. An
    alarm in a run that does not fall is false.
    """
    _check_contest(found)
    positive(window=window)
    ran = [k for k in among if k in found]
    if not ran:
        return {"fell": "not run"}
    at, down, five = (
        torch.cat([found.each(k, c).flatten() for k in ran]) for c in (column, "fell 10", "fell 5")
    )
    falls, rang = down > 0, at > 0
    soon = falls & rang & (at <= down)
    ahead = (down - at)[soon & (down > window)]
    return {
        "fell": int(falls.sum()),
        "in time": int(soon.sum()),
        "before 5": int((soon & (at <= five)).sum()),
        "late": int((falls & rang & ~soon).sum()),
        "missed": int((falls & ~rang).sum()),
        "items ahead": f"{ahead.median().item():.0f}" if len(ahead) else "",
        "did not fall": int((~falls).sum()),
        "false alarms": int((~falls & rang).sum()),
    }


def fell(found: Contest, method: str) -> str:
    """How many runs of `watched` fell by ten points, '7 of 30'."""
    _check_contest(found)
    if method not in found:
        return "not run"
    runs = found.each(method, "fell 10").flatten()
    return f"{int((runs > 0).sum())} of {len(runs)}"


def beside(found: Contest, method: str) -> str:
    """What a run of `watched` has more than its frozen twin, in points, and how many of its runs fell by ten: '−3.1 ± 2.0 (4)'."""
    _check_contest(found)
    if method not in found:
        return "not run"
    gap = found.each(method, "accuracy") - found.each(method, "frozen")
    score = widest(gap) if max(gap.shape) > 1 else None
    half = f" ± {100 * score.interval:.1f}" if score else ""
    many = int((found.each(method, "fell 10") > 0).sum())
    return f"{100 * gap.mean().item():+.1f}{half} ({many})".replace("-", "−")


def _check_contest(found: object) -> None:
    expect(isinstance(found, Contest), "a contest of directions, as `directions` gives it", found)
