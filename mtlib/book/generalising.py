"""What the page on unseen domains needs: two worlds in which a cue is false elsewhere, and one way to train them all."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from mtlib.core import Batch, Episode, Learner, Params, Stream, over, parameters
from mtlib.joint import joint
from mtlib.learners.finetune import as_is
from mtlib.objective import count
from mtlib.tasks import (
    above_zero,
    check_rows,
    check_seed,
    mixture,
    one_hot,
    one_of,
    positive,
    whole,
    within,
)
from mtlib.train import Diverged, fit
from mtlib.transfer.unseen import (
    domain_mixup,
    group_dro,
    group_weights,
    held_out,
    irm,
    mixup,
    mldg,
    vrex,
)

METHODS = ("ERM", "IRM", "VREx", "Group DRO", "Mixup", "inter-domain Mixup", "MLDG")
FEATURES = 10  # of coloured rows, beside the colour


def exact_world(s: float, c: float) -> Batch:
    """Three rows (x1, x2), y whose mean squares and products are those of the world (s, c), in float64.

    x1 = √s ε1, y = x1 + √s ε2, x2 = c y + ε3 with standard normal ε: a cause, what it makes, and an effect of that.
    x: (3, 2), y: (3, 1). Raises ValueError unless s > 0. {cite}`arjovsky2019invariant`
    """
    above_zero(s=s)
    within(-1e6, 1e6, c=c)
    moments = [[s, c * s, s], [c * s, 2 * s * c**2 + 1, 2 * s * c], [s, 2 * s * c, 2 * s]]
    values, vectors = torch.linalg.eigh(torch.tensor(moments, dtype=torch.float64))
    rows = 3**0.5 * (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return Batch(rows[:, :2], rows[:, 2:])


def coloured(seed: int, agreement: float, rows: int, part: int = 0) -> Batch:
    """Rows of ten normal features and a colour ±1; the label is the first one's sign, reversed in a quarter of rows.

    The colour is that of the label in a share `agreement` of rows. x: (rows, 11), y: (rows, 2) one-hot. Another `part` is
    another draw. After the coloured digits of {cite}`arjovsky2019invariant`.
    """
    check_seed(seed)
    within(0, 1, agreement=agreement)
    positive(rows=rows)
    whole(part=part)
    rng = np.random.default_rng([seed, round(100 * agreement), part])
    x = rng.normal(size=(rows, FEATURES))
    y = (x[:, 0] > 0) ^ (rng.random(rows) < 0.25)
    colour = y ^ (rng.random(rows) > agreement)
    x = np.concatenate([x, 2.0 * colour[:, None] - 1], 1)
    return Batch(torch.from_numpy(x).float(), one_hot(torch.from_numpy(y.astype(np.int64)), 2))


def by_colour(data: Batch, batch: int, seed: int) -> Stream:
    """Batches (4, `batch`, ...) of coloured rows by label and colour, each of the four groups with as many rows.

    x: (n, 11), y: (n, 2). Raises ValueError for a group without rows.
    """
    check_rows(data, "coloured rows")
    group = 2 * data.y[:, 1] + (data.x[:, FEATURES] > 0)
    sets = [Batch(data.x[group == g], data.y[group == g]) for g in range(4)]
    if not all(len(d.y) for d in sets):
        raise ValueError("expected rows of each label with each colour, one of the four has none")
    return mixture(*sets, batch=batch, seed=seed)


def even(data: Batch) -> list[Batch]:
    """Coloured rows whose colour is wrong, and as many whose colour is right. ValueError where one kind has none."""
    check_rows(data, "coloured rows")
    right = (data.x[:, FEATURES] > 0) == (data.y[:, 1] > 0)
    n = min(int(right.sum()), int((~right).sum()))
    if not n:
        raise ValueError("expected rows with a right colour and rows with a wrong one")
    return [Batch(data.x[kind][:n], data.y[kind][:n]) for kind in (~right, right)]


def asked(*sets: Batch, parts: int = 20) -> Stream:
    """A stream that asks for all items of some sets, in `parts` tasks of one size; there is nothing to adapt to.

    x: (n, ...), y: (n, W). The last items are left out where n is no multiple. Raises ValueError for n < `parts`.
    """
    positive(parts=parts)
    for data in sets:
        check_rows(data, "a set")
    items = Batch(*map(torch.cat, zip(*sets, strict=True))) if sets else None
    if items is None or len(items.y) < parts:
        raise ValueError(
            f"expected at least {parts} items, got {0 if items is None else len(items.y)}"
        )
    whole_parts = len(items.y) // parts * parts
    data = over(lambda d: d[:whole_parts].unflatten(0, (parts, -1)), items)
    return lambda step: Episode(over(lambda d: d[:, :1], data), data)


def plan(
    method: str, k: float, net: nn.Module, stream: Stream, seed: int
) -> tuple[Any, Any, Stream]:
    """One method with its dial k: the objective in the warm-up, the one after it, and the stream.

    `method` begins with one of `METHODS`; what follows a comma says what it is trained on. Raises ValueError for others.
    """
    name, on = method.partition(",")[0], (net, cross_entropy)
    one_of(method=(name, METHODS))
    erm, low = joint(*on), min(1.0, k)
    both = {
        "IRM": lambda: (irm(*on, low), irm(*on, k)),
        "VREx": lambda: (vrex(*on, low), vrex(*on, k)),
        "Group DRO": lambda: 2 * (group_dro(*on),),
        "MLDG": lambda: 2 * (mldg(*on, k, 1.0),),
    }
    streams = {
        "Mixup": lambda: mixup(stream, k, seed),
        "inter-domain Mixup": lambda: domain_mixup(stream, k, seed),
        "MLDG": lambda: held_out(stream, seed),
    }
    objectives = both.get(name, lambda: (erm, erm))()
    return *objectives, streams.get(name, lambda: stream)()


def train(
    method: str,
    setting: tuple[float, float, float],
    net: nn.Module,
    stream: Stream,
    steps: int,
    warm: int,
    seed: int,
    falls: bool = False,
) -> tuple[Learner, Params]:
    """The learner without adaptation, and φ after `steps`; a setting is (rate, weight decay, dial k).

    SGD with momentum. A penalty has strength min(1, k) for `warm` steps, then k, and from there on the objective is
    divided by max(1, k). Group DRO's weights have rate k and plain SGD. With `falls` the rate follows half a cosine.
    A run that diverges counts as an untrained network.
    """
    if len(setting) != 3:
        raise ValueError(
            f"expected a setting of three numbers, rate, weight decay and dial, got {setting}"
        )
    rate, decay, k = setting
    within(0, rate=rate, decay=decay, k=k)
    first, last, stream = plan(method, k, net, stream, seed)
    robust, strong = method.startswith("Group"), method.startswith(("IRM", "VREx"))
    weights = group_weights(count(stream(0))) if robust else {}

    def sgd(groups: list[Any]) -> torch.optim.Optimizer:
        rule = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=decay)
        for own in rule.param_groups[1:]:
            own.update(momentum=0.0, weight_decay=0.0)
        return rule

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + np.cos(np.pi * step / steps)) if falls else 1.0
        return float(cosine / max(1.0, k * strong * (step >= warm)))

    phi = {**parameters(net), **weights}
    with contextlib.suppress(Diverged):
        phi = fit(
            lambda step: last if step >= warm else first,
            phi,
            stream,
            steps,
            sgd,
            partial(LambdaLR, lr_lambda=factor),
            seed=seed,
            rates={"group.": k} if robust else None,
        ).params
    return as_is(net), {n: phi[n] for n in parameters(net)}
