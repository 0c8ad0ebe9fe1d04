"""Contenders of contests on few-shot classes: networks practised on episodes, and networks pre-trained on names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.book.contest import Way
from mtlib.book.page import device
from mtlib.core import Learner, Params, move, parameters, start
from mtlib.joint import joint
from mtlib.learners.metric import centred, cosine_head
from mtlib.nets import seeded
from mtlib.norm import Norm, calibrate
from mtlib.tasks import ClassSet, episodes, mixture, pool
from mtlib.train import cosine_adam, fit

Make = Callable[..., Any]
"""(network, *settings) -> a learner, or for practice what `bilevel` takes: learner, loss and perhaps a hypergradient."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What ways of learning share: classes to train on, a network, and how long practice and pre-training are.

    `network(outputs, statistics, seed)` draws it, where `statistics` are those of its norms. `practise` are outer steps,
    `study` batches of 64 items.
    """

    data: ClassSet
    network: Callable[..., nn.Module]
    practise: int
    study: int


def ready(bench: Bench, make: Make, phi: Params, centre: bool = False) -> tuple[Learner, Params]:
    """The learner as the tests use it: statistics of its norms, and with `centre` a centre, stored from training items."""
    learner = make(bench.network(5, "stored").to(device()))
    phi, items = move(start(learner, phi).params, device()), bench.data.items
    some = [move(items[:, k].contiguous(), device()) for k in (0, 7, 14)]
    if any(isinstance(m, Norm) for m in learner.net.modules()):
        phi = calibrate(learner.net, phi, some)
    return learner, centred(learner.net, phi, some[0]) if centre else phi


@cache
def study(bench: Bench, head: str, rate: float, batch: int, seed: int) -> Params:
    """Pre-training: all classes named at once, by a "linear" or a "cosine" head. Runs once for the same arguments."""
    net = bench.network(len(bench.data.names), seed=seed)
    net = cosine_head(net) if head == "cosine" else net
    named = mixture(pool(bench.data), batch=batch, seed=seed)
    steps = max(1, bench.study * 64 // batch)
    how = {**cosine_adam(rate, steps), "device": device()}
    return fit(joint(net, cross_entropy), parameters(net), named, steps, **how).params


def studying(
    bench: Bench,
    make: Make,
    settings: Sequence[Any],
    head: str = "linear",
    centre: bool = False,
) -> Way:
    """Pre-training, and then the learner `make(net, *rest)`; a setting is (rate, batch, *rest), tried at full length."""

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        rate, batch, *rest = setting
        phi = study(bench, head, rate, batch, seed)
        return ready(bench, lambda net: make(net, *rest), phi, centre)

    return Way("transfer", train, settings, ordered=False)


def practising(
    bench: Bench,
    make: Make,
    settings: Sequence[Any],
    first: tuple[float, int] | None = None,
    ways: int = 20,
    whole: bool = False,
) -> Way:
    """Practice on one-shot episodes; a setting is (rate, *rest), and `make(net, *rest)` gives what `bilevel` takes.

    With `first`, rate and batch of pre-training, that goes before, and half the practice follows. With `whole` each
    setting is tried at full length. A grid of rates alone is ordered.
    """

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        rate, *rest = setting
        with seeded(seed):
            learner, *loss = make(bench.network(5), *rest)
            phi = learner.init()
        steps = max(1, bench.practise // (1 if whole else share))
        if first is not None:
            before = study(bench, "linear", *first, seed)
            phi, steps = start(learner, before).params, max(1, steps // 2)
        drawn = episodes(bench.data, ways, 1, 5, tasks=1, seed=seed)
        how = {**cosine_adam(rate, steps), "device": device()}
        phi = fit(bilevel(learner, *loss), phi, drawn, steps, **how).params
        return ready(bench, lambda net: make(net, *rest)[0], phi)

    return Way("meta", train, settings, ordered=all(len(s) == 1 for s in settings))
