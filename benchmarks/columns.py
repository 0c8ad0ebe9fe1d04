"""Omniglot's four columns, 5- and 20-way, 1- and 5-shot, for ProtoNet, MAML, ANIL and Reptile, after a time that is equal.

    python benchmarks/columns.py --device cuda --seconds 200 --write   # all of it within 200 seconds
    python benchmarks/columns.py --methods MAML --seeds 0 --seconds 60

The seconds are divided among all trainings, seed by seed, so that what ends early has whole columns of the first seeds.
Each training has as many steps as fit into its share, by the time of a few, with the rate along a cosine; its test takes
what it takes, of which a quarter of each share is set aside. Lake's split: training on four rotations of 964 characters
less the validation alphabets, 300 test episodes of 15 queries a class. Norms take the statistics of the batch. Settings
are those that the book's pages chose on validation alphabets; these are results of short trainings, not of the papers'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from devices import loaded
from meta_gradient import keep, setting, slug
from torch.nn.functional import cross_entropy

from mtlib.bilevel import Hypergradient, bilevel, secant
from mtlib.book.results import provenance
from mtlib.core import Learner, Params, move
from mtlib.data.characters import characters
from mtlib.evaluate import Score, evaluate, interval
from mtlib.learners.gradient import anil, maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.tasks import ClassSet, episodes
from mtlib.train import cosine_adam, fit

COLUMNS = tuple(product((5, 20), (1, 5)))  # ways, shots


class Recipe(NamedTuple):
    """How a method trains: the learner that trains and the one that is tested, tasks a step, and Adam's rate."""

    learner: Callable[[Any], Learner]
    tested: Callable[[Any], Learner]
    rate: float
    tasks: int
    more_ways: int = 1  # times as many classes in training
    least_shots: int = 1  # in training
    hypergradient: Hypergradient | None = None


def gradient(make: Callable[..., Learner], lr: float, steps: int) -> Callable[[Any], Learner]:
    return lambda net: make(net, cross_entropy, lr, steps)


RECIPES = {
    "ProtoNet": Recipe(protonet, protonet, 1e-3, tasks=1, more_ways=4),
    "MAML": Recipe(gradient(maml, 0.4, 1), gradient(maml, 0.4, 5), 2e-3, tasks=4),
    "ANIL": Recipe(gradient(anil, 0.2, 5), gradient(anil, 0.2, 10), 2e-3, tasks=4),
    "Reptile": Recipe(
        gradient(maml, 0.2, 5),
        gradient(maml, 0.2, 10),
        2e-3,
        tasks=4,
        least_shots=5,
        hypergradient=secant,
    ),
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--device", default="cpu", help="cpu, cuda, or the tests' second")
    ask.add_argument("--seconds", type=float, default=600, help="of all trainings and tests")
    ask.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--small", action="store_true", help="a moment each: whether all runs")
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    given = ask.parse_args()
    device = loaded(given.device)
    train, test = characters("train", rotations=True), characters("test")
    if given.small:
        train, test = (d.select(torch.arange(len(d.names)) < 100) for d in (train, test))
    train, test = (d._replace(items=d.items.to(device)) for d in (train, test))
    ends = time.perf_counter() + given.seconds
    todo = list(product(given.seeds, given.methods, COLUMNS))
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for number, (seed, method, (ways, shots)) in enumerate(todo):
        share = max(0.0, ends - time.perf_counter()) / (len(todo) - number)
        found = column(method, ways, shots, seed, share, (train, test), device, given.small)
        row = runs.setdefault(method, {}).setdefault(f"{ways}-way {shots}-shot", {})
        row[str(seed)] = found
    report = {
        "setting": {**vars(given), **setting(device, given.small), "data": test.source},
        "columns": {m: {c: summary(r) for c, r in row.items()} for m, row in runs.items()},
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        keep(report, f"columns-{slug(device)}", "columns", depth=2)


def column(
    method: str,
    ways: int,
    shots: int,
    seed: int,
    seconds: float,
    data: tuple[ClassSet, ClassSet],
    device: str,
    tiny: bool,
) -> dict[str, float]:
    """One training, for three quarters of the seconds, and its test."""
    recipe = RECIPES[method]
    net = conv4(ways, width=4 if tiny else 64, seed=seed)
    learner = recipe.learner(net)
    draw = partial(episodes, queries=2 if tiny else 5, tasks=recipe.tasks, seed=seed)
    stream = draw(data[0], recipe.more_ways * ways, max(shots, recipe.least_shots))
    objective = bilevel(learner, cross_entropy, recipe.hypergradient)
    phi = move(learner.init(), device)
    began = time.perf_counter()

    def trained(steps: int) -> Params:
        return fit(
            objective, phi, stream, steps, progress=False, **cosine_adam(recipe.rate, steps)
        ).params

    trained(1)
    first = time.perf_counter()
    trained(few := 1 if tiny else 5)
    pace = (time.perf_counter() - first) / few
    steps = max(2, int((0.75 * seconds - (time.perf_counter() - began)) / pace))
    phi = trained(2 if tiny else steps)
    spent = time.perf_counter() - began
    asked = episodes(data[1], ways, shots, 2 if tiny else 15, tasks=10, seed=1)
    score = evaluate(recipe.tested(net), phi, asked, 10 if tiny else 300, progress=False)
    return {
        "accuracy": score.mean,
        "episodes": score.interval,
        "steps": 2 if tiny else steps,
        "seconds": spent,
    }


def summary(runs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds, and the runs."""
    values = [r["accuracy"] for r in runs.values()]
    score: Score | None = interval(torch.tensor(values)) if len(values) > 1 else None
    return {
        "mean": sum(values) / len(values),
        "seeds": score.interval if score else None,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
