"""Ways of weighing data sets: linear worlds in which the target chooses the weights by folds, and networks with heads of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.book.contest import Way
from mtlib.core import Batch, Episode, Learner, Params, apply, parameters
from mtlib.data.digits import Domain
from mtlib.joint import own_columns, risks
from mtlib.nets import mlp
from mtlib.objective import Objective
from mtlib.tasks import mixture, one_hot
from mtlib.train import cosine_adam, fit
from mtlib.transfer.weights import balances, gradnorm, log_variances, uncertainty

# Linear worlds -----------------------------------------------------------------------------------

Label = Callable[[Tensor, torch.Generator], Tensor]
"""`label(xᵀw, generator)` -> targets of the same shape."""

RIDGES = (0.001, 0.03, 0.1, 0.3, 1.0)


def noisy(clean: Tensor, g: torch.Generator) -> Tensor:
    """Targets of a regression: normal noise of deviation 1."""
    return clean + torch.randn(clean.shape, dtype=clean.dtype, generator=g)


def flipped(clean: Tensor, g: torch.Generator) -> Tensor:
    """Labels −1 and 1 on either side of a boundary, a tenth of them wrong."""
    return clean.sign() * (torch.rand(clean.shape, generator=g) - 0.1).sign()


def worlds(truth: Tensor, counts: Sequence[int], label: Label, seed: int) -> list[Batch]:
    """Draws of T linear data sets: x (R, n_t, d) normal, y (R, n_t) = label(xᵀ w_t), with `truth` (R, T, d) the w_t.

    Data set 0 is the target by convention, n_t = `counts`.
    """
    if truth.ndim != 3 or len(counts) != truth.shape[1]:
        raise ValueError(
            f"expected the weights (R, T, d) of T = {len(counts)} data sets, got {tuple(truth.shape)}"
        )
    g, sets = torch.Generator().manual_seed(seed), []
    for t, n in enumerate(counts):
        x = torch.randn(len(truth), n, truth.shape[2], dtype=torch.float64, generator=g)
        sets.append(Batch(x, label((x @ truth[:, t, :, None])[..., 0], g)))
    return sets


def lowest(sets: Sequence[Batch], weights: Tensor, ridges: Sequence[float] = RIDGES) -> Tensor:
    """argmin_θ Σ_t w_t · ½ mean (x_tᵀθ − y_t)² + ½ ridge ‖θ‖², for each row of `weights` (C, T) and each ridge: (R, C, K, d)."""
    gram = torch.stack([x.mT @ x / x.shape[1] for x, _ in sets], 1)  # (R, T, d, d)
    b = torch.stack([x.mT @ y[..., None] / x.shape[1] for x, y in sets], 1)  # (R, T, d, 1)
    a, c = (torch.einsum("ct,rt...->rc...", weights, m)[:, :, None] for m in (gram, b))
    pull = torch.tensor(ridges, dtype=torch.float64)[:, None, None] * torch.eye(a.shape[-1])
    found: Tensor = torch.linalg.solve(a + pull, c)[..., 0]
    return found


def by_folds(
    sets: Sequence[Batch],
    ways: Mapping[str, Tensor],
    error: Callable[[Tensor], Tensor],
    folds: int = 5,
    ridges: Sequence[float] = RIDGES,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each way of weighing ends with: way -> (its error (R,), and its error had the truth chosen).

    A way is the rows of weights (C, T) that it may choose from. Cross-validation on the target, data set 0, chooses row
    and ridge by squared error; then all data are used. `error(θ)` (R, C, K, d) -> (R, C, K) is what θ is worth.
    """
    (x, y), *others = sets
    every = torch.cat([*ways.values()])
    true, risk = error(lowest(sets, every, ridges)), torch.zeros(())
    for k in range(folds):
        held = torch.arange(y.shape[1]) % folds == k
        theta = lowest([Batch(x[:, ~held], y[:, ~held]), *others], every, ridges)
        answers = torch.einsum("rni,rcki->rckn", x[:, held], theta)
        risk = risk + (answers - y[:, None, None, held]).square().sum(-1)
    found = {}
    parts = [len(rows) for rows in ways.values()]
    for name, own, of in zip(ways, true.split(parts, 1), risk.split(parts, 1), strict=True):
        picked = of.flatten(1).argmin(1, keepdim=True)
        found[name] = own.flatten(1).gather(1, picked)[:, 0], own.flatten(1).amin(1)
    return found


def ways_to_weigh(counts: Sequence[int], alphas: Tensor) -> dict[str, Tensor]:
    """Way -> rows of weights (C, T) to choose from, for a target and T − 1 sources with `counts` labels each.

    "pooled" weighs each example alike, "one source" pools the target with one of them, "which sources" with any subset;
    "one weight" gives the target α and the sources (1 − α)/(T − 1) each, "a weight each" has all sixths of sum 1.
    """
    n, last = torch.tensor(counts, dtype=torch.float64), len(counts) - 1
    some = [(1, *keep) for keep in product((0, 1), repeat=last)]
    kept = torch.stack([n * torch.tensor(keep) for keep in some])
    kept = kept / kept.sum(1, keepdim=True)
    sixths = [p for p in product(range(7), repeat=last + 1) if sum(p) == 6]
    return {
        "target alone": kept[:1],
        "pooled": kept[-1:],
        "equal weights": torch.full_like(kept[:1], 1 / (last + 1)),
        "one source": kept[[sum(keep) == 2 for keep in some]],
        "which sources": kept,
        "one weight": torch.stack([alphas, *[(1 - alphas) / last] * last], 1),
        "a weight each": torch.tensor(sixths, dtype=torch.float64) / 6,
    }


# Networks with heads of their own ------------------------------------------------------------------

Make = Callable[..., tuple[Objective, Params, float]]
"""`make(on, batch, *setting)` -> objective, entries of φ that it adds, and their rate; `on` has net, loss and columns."""


def _one(sets: Sequence[Batch]) -> Tensor:
    return torch.ones(1)


class Setup(NamedTuple):
    """What all ways of weighing share: a network of one hidden layer (inputs, hidden units, outputs), and its training."""

    sizes: tuple[int, int, int]
    loss: Callable[[Tensor, Tensor], Tensor]
    columns: Sequence[slice]  # the outputs of each data set
    draw: Callable[[int], Sequence[Batch]]  # a seed -> data sets
    steps: int
    rates: Sequence[float]  # of AdamW; a grid
    decays: Sequence[float] = (0.0,)  # its weight decay; a grid
    empty: float = 0.0  # the answer of outputs that are not asked
    unit: Callable[[Sequence[Batch]], Tensor] = _one  # (W,), by which targets are divided


def weighing(
    setup: Setup,
    make: Make,
    own: Sequence[tuple[Any, ...]] = ((),),
    kind: str = "transfer",
) -> Way:
    """A contender: an objective, in each rate, each decay and each of its `own` settings; the decay spares its own entries."""

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        (rate, decay, *more), (inputs, hidden, outputs) = setting, setup.sizes
        net, sets = mlp(inputs, (hidden,), outputs, seed=seed), setup.draw(seed)
        unit = setup.unit(sets)
        stream = mixture(*(Batch(x, y / unit) for x, y in sets), batch=32, seed=seed)
        on = {"net": net, "loss": setup.loss, "columns": setup.columns}
        objective, entries, pace = make(on, stream(0), *more)
        trained = fit(
            objective,
            {**parameters(net), **entries},
            stream,
            setup.steps,
            partial(_adamw, rate, decay),
            cosine_adam(rate, setup.steps)["schedule"],
            rates={"weight.": pace} if entries else None,
            seed=seed,
        ).params
        phi = {k: trained[k] for k in parameters(net)}
        phi["head.weight"] = phi["head.weight"] * unit[:, None]
        phi["head.bias"] = phi["head.bias"] * unit
        return own_block(net, setup.empty), phi

    rows = product(product(setup.rates, setup.decays), own)
    return Way(kind, train, [(*a, *b) for a, b in rows])


def uncertain(on: Mapping[str, Any], batch: Batch, pace: float) -> tuple[Objective, Params, float]:
    """`uncertainty`, its log variances learned at the rate `pace`."""
    return uncertainty(**on), log_variances(len(batch.x)), pace


def balanced(
    on: Mapping[str, Any], batch: Batch, strength: float, pace: float
) -> tuple[Objective, Params, float]:
    """`gradnorm`, its weights learned at the rate `pace`."""
    before = risks(**on)(parameters(on["net"]), batch).detach()
    return gradnorm(**on, strength=strength), balances(before), pace


def own_block(net: nn.Module, empty: float) -> Learner:
    """A learner with no steps: the outputs of which no support target is other than 0 answer `empty`, always."""

    def adapt(phi: Params, support: Batch) -> Params:
        used = (support.y != 0).any(0)
        w, b = phi["head.weight"], phi["head.bias"]
        w, b = torch.where(used[:, None], w, 0.0), torch.where(used, b, empty)
        return {**phi, "head.weight": w, "head.bias": b}

    return Learner(partial(parameters, net), adapt, apply(net), net=net)


def asking(sets: Sequence[Batch], answers: Sequence[Tensor], size: int) -> Episode:
    """Packs of `size` items of each data set, in turn, as tasks whose support set says which answers (k, W) there are."""
    cut = [[d.unflatten(0, (-1, size)) for d in data] for data in sets]
    x, y = (torch.cat(parts) for parts in zip(*cut, strict=True))
    told = [a.expand(len(c[0]), *a.shape) for a, c in zip(answers, cut, strict=True)]
    support = torch.cat(told)
    return Episode(Batch(torch.zeros(*support.shape[:2], x.shape[-1]), support), Batch(x, y))


class Questions(NamedTuple):
    """Three scanners and three questions: which digit, is it odd, is it below five."""

    columns: Sequence[slice]  # of 14 outputs
    draw: Callable[[int], list[Batch]]  # a seed -> labelled images of each scanner
    held: Episode  # packs of 20 images of both targets, to choose on
    tested: Episode


def questions(domains: Mapping[str, Domain], shots: int) -> Questions:
    """The first scanner gives 600 labelled images, the others `shots`, out of the first quarter of each.

    The second quarter has up to 140 images of each target to choose on, the second half up to 780 to test on.
    """
    if len(domains) != 3:
        raise ValueError(f"expected three scanners, got {list(domains)}")
    asks: list[Callable[[Tensor], Tensor]] = [
        lambda y: y,
        lambda y: y % 2,
        lambda y: (y < 5).long(),
    ]
    columns, parts = own_columns((10, 2, 2)), list[Batch]()
    for t, (domain, ask) in enumerate(zip(domains.values(), asks, strict=True)):
        order = torch.from_numpy(np.random.default_rng(9).permutation(len(domain.x)))
        y = one_hot(columns[t].start + ask(domain.y[order]), 14)
        parts.append(Batch(domain.x[order].flatten(1), y))

    def draw(seed: int) -> list[Batch]:
        drawn = []
        for t, (x, y) in enumerate(parts):
            order = np.random.default_rng([seed, t]).permutation(len(x) // 4)
            rows = torch.from_numpy(order[: shots if t else 600])
            drawn.append(Batch(x[rows], y[rows]))
        return drawn

    def packs(quarter: int, most: int) -> Episode:
        targets = []
        for x, y in parts[1:]:
            rows = slice(start := quarter * len(x) // 4, start + most)
            targets.append(Batch(x[rows], y[rows]))
        return asking(targets, [torch.eye(14)[c] for c in columns[1:]], 20)

    most = min(780, *(len(x) // 2 for x, _ in parts[1:])) // 20 * 20
    choose = min(140, *(len(x) // 4 for x, _ in parts[1:])) // 20 * 20
    return Questions(columns, draw, packs(1, choose), packs(2, most))


def two_units(seed: int, rows: int = 200, units: tuple[float, float] = (1.0, 100.0)) -> list[Batch]:
    """Two regressions y = tanh(2 xᵀ w_t) + 0.1 ε of the same two directions w_t, each in a unit and a column of its own."""
    directions = np.random.default_rng(7).normal(size=(10, 2)) / 10**0.5
    g, sets = np.random.default_rng([seed, 7]), []
    for t, unit in enumerate(units):
        x = g.normal(size=(rows, 10))
        y = np.zeros((rows, 2))
        y[:, t] = unit * (np.tanh(2 * x @ directions[:, t]) + 0.1 * g.normal(size=rows))
        sets.append(Batch(torch.from_numpy(x).float(), torch.from_numpy(y).float()))
    return sets


def _adamw(rate: float, decay: float, parts: Any) -> torch.optim.Optimizer:
    rule = torch.optim.AdamW(parts, lr=rate, weight_decay=decay)
    for own in rule.param_groups[1:]:
        own["weight_decay"] = 0.0
    return rule
