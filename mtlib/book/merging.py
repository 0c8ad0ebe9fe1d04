"""Digits of several scanners, each seen in one way, for a page that merges networks which were trained on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mtlib.book.contest import TUNING_SEED, Contest, Trial
from mtlib.book.directions import widest
from mtlib.book.page import device
from mtlib.core import Batch, Params, apply, expect, move
from mtlib.data.digits import Domain, few, halves, redrawn
from mtlib.joint import Penalty, joint
from mtlib.norm import calibrate
from mtlib.plots import COLOURS, GREYS, REFERENCE, band
from mtlib.tasks import check_seed, functions, one_hot, one_of, positive, whole
from mtlib.train import cosine_adam, fit
from mtlib.transfer.averaging import added, barrier, interpolated, task_vector, ties

View = Callable[[Tensor], Tensor]
"""What is done to images (B, 1, h, w) before a network reads them; the digits stay what they are."""


class Reading(NamedTuple):
    """A scanner's digits, seen in one way."""

    labelled: Batch  # what training reads: x (n, 1, size, size) before the view, y (n,) 0 to 9
    held: Batch  # labelled images to choose on, in the view
    tested: Batch  # in the view
    images: Tensor  # without labels, in the view: the norms' statistics are taken from them
    view: View


def reading(
    domain: Domain,
    view: View = torch.clone,
    shots: int | None = None,
    held: int = 5,
    seed: int = 0,
    tested: int = 750,
    seen: int = 500,
) -> Reading:
    """Half of a scanner's images tests, at most `tested`; of the other half the first `seen` are for the norms.

    With `shots`, training has that many labels of each digit, from behind the first `seen`, and `held` others of each digit
    choose; both are drawn by the seed. Without, training has the labels of all seen images but the first 10 · `held`, which
    choose. Raises ValueError where there are not so many images.
    """
    expect(isinstance(domain, Domain), "a domain of `scanners()`", domain)
    functions(1, view=view)
    positive(held=held, seen=seen)
    check_seed(seed)
    own, test = halves(domain, tested)
    if shots is None:
        first, rest = 10 * held, len(own.x)
        expect(first < rest, f"more than {first} images that may be seen", own.x)
        chosen, trained = (Batch(own.x[s], own.y[s]) for s in (slice(first), slice(first, None)))
    else:
        positive(shots=shots)
        some = few(own, shots + held, seed, after=seen)
        place = torch.arange(len(some.x)) % (shots + held)
        trained, chosen = (Batch(some.x[p], some.y[p]) for p in (place < shots, place >= shots))
    looks = [Batch(view(b.x), b.y) for b in (chosen, test)]
    return Reading(trained, looks[0], looks[1], view(own.x[:seen]), view)


def onward(
    net: nn.Module,
    phi: Params,
    readings: Sequence[Reading],
    rate: float,
    steps: int,
    order: int,
    shared: int = 0,
    penalties: Sequence[Penalty] = (),
    batch: int = 32,
) -> Params:
    """φ after `steps` of Adam, its rate falling from `rate` to 0, on redrawn images of all readings alike.

    A batch has `batch` images of each. `order` says which images come when, and how they are redrawn; for the first `shared`
    steps all orders are one.
    """
    expect(not isinstance(readings, Reading), "readings, a list: [reading(...)]", readings)
    expect(len(readings) > 0, "at least one reading", readings)
    positive(batch=batch)
    whole(order=order, shared=shared)

    def stream(step: int) -> Batch:
        rng = np.random.default_rng([1 if step < shared else order + 2, step])
        drawn = []
        for r in readings:
            i = torch.from_numpy(rng.integers(len(r.labelled.x), size=batch))
            x = r.view(redrawn(r.labelled.x[i], rng))
            drawn.append(Batch(x, one_hot(r.labelled.y[i], 10)))
        return Batch(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    objective = joint(net, cross_entropy, None, penalties)
    how: dict[str, Any] = {**cosine_adam(rate, steps), "device": device(), "progress": False}
    return move(fit(objective, phi, stream, steps, **how).params, "cpu")  # type: ignore[no-any-return]


def with_statistics(net: nn.Module, phi: Params, data: Reading) -> Params:
    """φ with the norms' statistics of the reading's own images, none of them labelled."""
    return calibrate(net, phi, [data.images])


def answers(
    net: nn.Module, phi: Params, data: Reading, part: str = "tested", stored: bool = False
) -> Tensor:
    """Class probabilities (n, 10) of a part of a reading, "tested" or "held".

    The norms' statistics are taken anew, from the reading's images, or with `stored` they are φ's.
    """
    one_of(part=(part, ("tested", "held")))
    phi = phi if stored else with_statistics(net, phi, data)
    was = net.training
    with torch.no_grad():
        logits = apply(net.eval())(phi, getattr(data, part).x)
    net.train(was)
    return logits.softmax(1)


def right(
    net: nn.Module, phi: Params, data: Reading, part: str = "tested", stored: bool = False
) -> Tensor:
    """Which items of a part of a reading are read right, (n,) 0 or 1; as `answers`."""
    said = answers(net, phi, data, part, stored)
    hits: Tensor = said.argmax(1) == getattr(data, part).y
    return hits.float()


def by_digit(
    net: nn.Module, networks: Sequence[Params], readings: Sequence[Reading], part: str = "tested"
) -> Tensor:
    """Accuracy on each digit, (10,), a mean over readings, where each reading has its own network out of `networks`.

    Raises ValueError unless there are as many networks as readings, or where a reading lacks a digit.
    """
    if len(networks) != len(readings) or not readings:
        raise ValueError(
            f"expected a network for each reading, got {len(networks)} for {len(readings)}; one for all is [phi] * "
            f"{len(readings)}"
        )
    rows = []
    for phi, data in zip(networks, readings, strict=True):
        hit, y = right(net, phi, data, part), getattr(data, part).y
        counts = torch.bincount(y, minlength=10)
        expect(bool((counts > 0).all()), "items of each digit", counts.tolist())
        rows.append(torch.zeros(10).index_add(0, y, hit) / counts)
    return torch.stack(rows).mean(0)


def merging(
    kind: str,
    net: nn.Module,
    readings: Callable[[int], Sequence[Reading]],
    make: Callable[[Any, int], Sequence[Params]],
    settings: Mapping[Any, Any] | Sequence[Any],
) -> Trial:
    """A trial of `measured`: `make(setting, seed)` gives a network for each of `readings(seed)`.

    Its columns are accuracy on "all" readings and on the "first two", its groups are digits. The setting is chosen by the held
    labels of all readings, with a seed that no test has.
    """
    functions(1, readings=readings)
    functions(2, make=make)

    def test(setting: Any, seed: int) -> dict[str, tuple[float, Tensor]]:
        read, made = readings(seed), make(setting, seed)
        each = {k: by_digit(net, made[:n], read[:n]) for k, n in COLUMNS.items()}
        return {k: (float(v.mean()), v) for k, v in each.items()}

    def quality(setting: Any) -> float:
        return float(
            by_digit(net, make(setting, TUNING_SEED), readings(TUNING_SEED), "held").mean()
        )

    return Trial(kind, test, quality, settings)


COLUMNS: dict[str, int | None] = {"all": None, "first two": 2}


def summing(
    net: nn.Module,
    among: Sequence[str],
    task: Callable[[str, int], Reading],
    base: Callable[[int], Params],
    own: Callable[[str, float, int], Params],
    steps: int,
    rates: Sequence[float],
    scales: Sequence[float],
    keeps: Sequence[float],
) -> dict[str, Trial]:
    """Ways to one network for some tasks, each a trial of `measured`, and two references: the start, and a network each.

    `task(name, seed)` is a reading, `base(seed)` the network that all start from, `own(name, rate, seed)` that network trained
    on at one task. The sum of task vectors chooses rate and scale, TIES the share that it keeps, too, and joint training, with
    as many images of each task, its rate.
    """
    functions(2, task=task)
    functions(1, base=base)
    functions(3, own=own)
    expect(len(among) > 1, "two tasks or more", among)

    def tasks(seed: int) -> list[Reading]:
        return [task(name, seed) for name in among]

    def trial(kind: str, make: Callable[[Any, int], Params], settings: Sequence[Any]) -> Trial:
        return merging(kind, net, tasks, lambda s, seed: [make(s, seed)] * len(among), settings)

    def vectors(rate: float, seed: int) -> list[Params]:
        return [task_vector(base(seed), own(name, rate, seed)) for name in among]

    @cache
    def one(keep: float, rate: float, seed: int) -> Params:
        return ties(vectors(rate, seed), keep)

    def summed(how: Any, seed: int) -> Params:
        rate, scale = how
        return added(base(seed), vectors(rate, seed), scale)

    def elected(how: Any, seed: int) -> Params:
        return added(base(seed), [one(*how[:2], seed)], how[2])

    def jointly(rate: float, seed: int) -> Params:
        return onward(net, base(seed), tasks(seed), rate, steps, 0)

    def each(rate: float, seed: int) -> list[Params]:
        return [own(name, rate, seed) for name in among]

    return {
        "not trained on": trial("baseline", lambda _, seed: base(seed), [0]),
        "a network each": merging("baseline", net, tasks, each, rates),
        "joint training": trial("transfer", jointly, rates),
        "sum": trial("transfer", summed, [*product(rates, scales)]),
        "TIES": trial("transfer", elected, [*product(keeps, rates, scales)]),
    }


Two = Callable[[str, str, int], tuple[Reading, Reading]]
"""`readings(source, target, seed)` -> the target's reading and the source's."""


def both_ways(
    net: nn.Module, readings: Two, made: Callable[[str, str, int], tuple[Sequence[Params], float]]
) -> Callable[[str, str, int], Mapping[str, Tensor]]:
    """For a `Method` of `directions`: accuracy on "both", what is read right of the "target" and the "source", a "setting".

    `made(source, target, seed)` gives networks and the number of the setting that they took. The mean of the networks'
    probabilities answers: of several, they are an ensemble.
    """
    functions(3, readings=readings, made=made)

    def adapt(a: str, b: str, seed: int) -> Mapping[str, Tensor]:
        networks, setting = made(a, b, seed)
        hits = {}
        for name, data in zip(("target", "source"), readings(a, b, seed), strict=True):
            p = torch.stack([answers(net, phi, data) for phi in networks]).mean(0)
            hits[name] = (p.argmax(1) == data.tested.y).float()
        both = torch.stack([v.mean() for v in hits.values()]).mean()
        return {"both": both, **hits, "setting": torch.tensor(float(setting))}

    return adapt


def connected(
    net: nn.Module,
    readings: Callable[[str, str, int], Reading],
    pair: Callable[[str, str, int], tuple[Params, Params]],
    shares: Sequence[float],
) -> Callable[[str, str, int], Mapping[str, Tensor]]:
    """For a `Method` of `directions`: the error along the line between the two networks that `pair` gives, on a reading.

    Its columns are the errors at the shares, as text, the "barrier", and the barrier with "averaged statistics": where the
    norms read the same average of the two networks' statistics as of their weights, in place of the average network's own.
    """
    functions(3, readings=readings, pair=pair)

    def adapt(a: str, b: str, seed: int) -> Mapping[str, Tensor]:
        data, (one, two) = readings(a, b, seed), pair(a, b, seed)
        ends = [with_statistics(net, phi, data) for phi in (one, two)]
        own = {k: [end[k] for end in ends] for k in ends[0] if k not in one}
        errors = []
        for share in shares:
            phi = interpolated(one, two, share)
            mixed = {k: torch.lerp(u, v, share) for k, (u, v) in own.items()}
            hits = [right(net, phi, data), right(net, {**phi, **mixed}, data, stored=True)]
            errors.append([1 - float(h.mean()) for h in hits])
        along, averaged = torch.tensor(errors).unbind(1)
        barriers = {
            "barrier": torch.tensor(barrier(along, shares)),
            "averaged statistics": torch.tensor(barrier(averaged, shares)),
        }
        return {**{f"{s:g}": e for s, e in zip(shares, along, strict=True)}, **barriers}

    return adapt


def along(axes: Any, found: Contest, ways: Sequence[str], shares: Sequence[float]) -> None:
    """Accuracy of `ways`, which stand at the `shares` of a line, minus that of the first: target, source and both, in points."""
    expect(len(ways) == len(shares) > 1, "a way for each of two shares or more", list(ways))
    for colour, column in zip(COLOURS, ("target", "source", "both"), strict=False):
        first = found.each(ways[0], column)
        rows = [widest(found.each(k, column) - first) for k in ways[1:]]
        mean, half = (
            [0.0, *(100 * v for v in part)] for part in zip(*(r[:2] for r in rows), strict=True)
        )
        band(axes, shares, mean, half, column, colour)
    axes.axhline(0, color=REFERENCE, linestyle="--", linewidth=1)
    axes.set(xlabel="share λ of the second network", ylabel="accuracy, minus the first's")
    axes.legend()


def hills(axes: Sequence[Any], found: Contest, shares: Sequence[float]) -> None:
    """Errors along the line of each pair that ran (left), and its barrier with both kinds of statistics (right), in points."""
    ran = [k for k in found.ways if k in found]
    for colour, name in zip(cycle(COLOURS), ran, strict=False):
        errors = [100 * found.mean(name, f"{s:g}") for s in shares]
        axes[0].plot(shares, errors, color=colour, marker=".", label=name)
    for i, (column, label) in enumerate(
        {"barrier": "taken anew", "averaged statistics": "averaged"}.items()
    ):
        places = [j + 0.4 * i for j in range(len(ran))]
        axes[1].barh(
            places,
            [100 * found.mean(k, column) for k in ran],
            0.4,
            color=GREYS[i],
            label=f"statistics {label}",
        )
    axes[0].set(xlabel="share λ of the second network", ylabel="error, %")
    axes[1].set(yticks=range(len(ran)), yticklabels=ran, xlabel="barrier, points of error")
    axes[0].legend()
    axes[1].legend()


def differences(gaps: Mapping[str, tuple[Contest, str, str, str]]) -> dict[str, str]:
    """Name -> (contest, one way, another, column) as name -> their paired difference in points, or that they did not run."""
    return {
        name: c.minus(one, other, column).points().removeprefix("+")
        if c.found["ways"] and one in c and other in c
        else "not run"
        for name, (c, one, other, column) in gaps.items()
    }
