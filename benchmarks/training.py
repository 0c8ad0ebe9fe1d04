"""Seconds of training until a network is good, on Omniglot, 5-way 1-shot: other libraries' recipes beside mtlib's.

    python benchmarks/training.py                       # ProtoNet to 95 %, MAML to 90 %, as JSON
    python benchmarks/training.py --only ProtoNet --limit 90 --threads 2 --write

Counted is all that training does, the drawing of its data included; not counted is looking at the validation characters,
which each contender does after every six seconds of training: 60 episodes of 10 queries a class, the same for all,
from alphabets that training never sees, with statistics of the batch in the norm. The target is reached at the first look
that finds it. Contenders take turns of six seconds, in one process, each on a thread of its own.

All have the same network, the same start, and images in memory. The recipes are those of two examples, written out anew
in torch alone:

- easyfsl's notebook `my_first_few_shot_classifier.ipynb` (commit 0d38688): one episode a step, 5-way, 10 queries a class,
  Adam at 0.001, distances that are not squared. There a ResNet-18 is trained, here four blocks.
- learn2learn's `examples/vision/maml_omniglot.py` (commit 23568c6): 32 tasks a step, one inner step at 0.5, one query a
  class, Adam at 0.003, second order, one backward pass a task.

Both draw item by item, and stack. All prototypical networks here take easyfsl's distances: at equal recipes they train faster
than squared ones (validation, 24 s: .908 beside .876). Each recipe is run by torch alone and by mtlib, so that what the recipe brings and what
the package brings stand apart. "Our recipe" was chosen on the validation alphabets: more classes a step for ProtoNet, two
tasks a step for MAML, at a constant rate, and the mean of the parameters (`Average`) is what is looked at. "Drawn ahead"
draws its tasks in two other processes; a race of MAML has no such contender, as its two small tasks a step are soon drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from threading import Condition, Thread
from typing import Any, NamedTuple

import torch
from meta_gradient import keep, setting, slug
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from workloads import Case, workloads

from mtlib.bilevel import bilevel
from mtlib.book.results import provenance
from mtlib.core import Learner, Params, Stream
from mtlib.data.characters import characters
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.run.ahead import ahead
from mtlib.tasks import ClassSet, episodes
from mtlib.train import early_stopping, fit

SLICE = 6.0  # seconds of a turn
TARGETS = {"ProtoNet": 0.95, "MAML": 0.90}

Look = Callable[[Params], None]
"""What a contender calls after each turn, with its parameters; raises Done where it is over."""


class Done(Exception):
    """The target is reached, or the time is over."""


class Recipe(NamedTuple):
    """Settings of one way to train."""

    ways: int
    queries: int
    tasks: int
    rate: float  # Adam's
    lr: float = 0.0  # of the inner step
    test_steps: int = 1
    averaged: bool = False  # whether the parameters' mean is what comes out


EASYFSL = Recipe(ways=5, queries=10, tasks=1, rate=1e-3)
LEARN2LEARN = Recipe(ways=5, queries=1, tasks=32, rate=3e-3, lr=0.5)
OWN = {
    "ProtoNet": Recipe(ways=40, queries=2, tasks=1, rate=3e-3, averaged=True),
    "MAML": Recipe(ways=5, queries=5, tasks=2, rate=2e-3, lr=0.4, test_steps=10, averaged=True),
}


class Average:
    """The mean of the parameters so far, in which later ones count more: φ̄ += (η + 1)/(t + η) (φ − φ̄) at step t, η = 3."""

    def __init__(self) -> None:
        self.steps, self.params = 0, dict[str, Tensor]()

    def __call__(self, phi: Params) -> None:
        self.steps += 1
        share = 4 / (self.steps + 3)
        now = {k: v.detach() for k, v in phi.items()}
        before = self.params or now
        self.params = {k: torch.lerp(before[k], v, share) for k, v in now.items()}


class Contender(NamedTuple):
    recipe: Recipe
    train: Callable[[str, Recipe, ClassSet, nn.Module, Look, int], None]


CONTENDERS: dict[str, dict[str, Contender]]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--only", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    ask.add_argument("--limit", type=float, default=60, help="seconds of training of a contender")
    ask.add_argument("--threads", type=int, help="of one operation; torch's own choice otherwise")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--small", action="store_true", help="a moment each: whether all runs")
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    given = ask.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    data = characters("train", rotations=True), characters("val"), characters("test")
    report = {
        "setting": {
            **setting("cpu", given.small),
            "limit": given.limit,
            "seed": given.seed,
            "data": data[0].source,
        },
        "training": {m: race(m, data, given.limit, given.seed, given.small) for m in given.only},
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        keep(report, f"training-{slug('cpu')}-{torch.get_num_threads()}-threads", "training")


def race(
    method: str, data: tuple[ClassSet, ...], limit: float, seed: int, tiny: bool
) -> dict[str, Any]:
    """Name -> seconds until the target (None: not within the limit), steps, and accuracies look by look."""
    train, val, test = data
    turns, threads, found = Turns(list(CONTENDERS[method])), torch.get_num_threads(), {}

    def run(name: str) -> None:
        torch.set_num_threads(threads)
        recipe, begin = CONTENDERS[method][name]
        look = Looks(method, recipe, val, limit, turns, name, tiny)
        found[name] = look
        try:
            with turns.of(name):
                torch.manual_seed(seed)
                net = conv4(ways=5)
                look.began = time.perf_counter()
                begin(method, recipe, train, net, look, seed)
        except Done:
            pass

    all_of_them = [Thread(target=run, args=(name,)) for name in CONTENDERS[method]]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    return {name: found[name].report(test, tiny) for name in CONTENDERS[method]}


class Turns:
    """One contender at a time, in turn."""

    def __init__(self, names: list[str]):
        self.waiting, self.changed = list(names), Condition()

    def of(self, name: str) -> Turns:
        """`with turns.of(name)`: from its first turn on, to its end."""
        self.wait_for(name)
        self.last = name
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.waiting.pop(0)
            self.changed.notify_all()

    def wait_for(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def over(self, name: str) -> None:
        """To the end of the row, and back when it comes."""
        with self.changed:
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()
        self.wait_for(name)


class Looks:
    """What a contender calls with its parameters after each step: now and then it looks at the validation set."""

    def __init__(
        self,
        method: str,
        recipe: Recipe,
        val: ClassSet,
        limit: float,
        turns: Turns,
        name: str,
        tiny: bool,
    ):
        self.method, self.recipe, self.limit, self.turns, self.name = (
            method,
            recipe,
            limit,
            turns,
            name,
        )
        self.count, self.queries, self.slice = (4, 2, 0.2) if tiny else (60, 10, SLICE)
        self.stream = episodes(val, 5, 1, self.queries, tasks=2, seed=1)
        self.steps, self.seconds, self.seen = 0, 0.0, list[tuple[float, float]]()
        self.began, self.average = 0.0, Average()

    def __call__(self, phi: Callable[[], Params]) -> None:
        self.steps += 1
        if self.recipe.averaged:
            self.average(phi())
        spent = time.perf_counter() - self.began
        if spent < self.slice:
            return
        self.seconds += spent
        self.params = self.average.params or {k: v.detach().clone() for k, v in phi().items()}
        score = self.accuracy(self.params, self.stream, self.count)
        self.seen.append((self.seconds, score))
        print(
            f"{self.name}: {self.steps} steps, {self.seconds:.0f} s: {score:.3f}", file=sys.stderr
        )
        if score >= TARGETS[self.method] or self.seconds >= self.limit:
            raise Done
        self.turns.over(self.name)
        self.began = time.perf_counter()

    def accuracy(self, phi: Params, stream: Stream, count: int) -> float:
        learner = learned(self.method, conv4(ways=5), self.recipe, self.recipe.test_steps)
        known = learner.init()
        return evaluate(learner, {k: phi[k] for k in known}, stream, count, progress=False).mean

    def report(self, test: ClassSet, tiny: bool) -> dict[str, Any]:
        stream = episodes(test, 5, 1, 15, tasks=10, seed=2)
        reached = self.seen[-1][1] >= TARGETS[self.method]
        return {
            "recipe": self.recipe._asdict(),
            "seconds": self.seen[-1][0] if reached else None,
            "steps": self.steps,
            "validation": self.seen,
            "test": self.accuracy(self.params, stream, 10 if tiny else 100),
        }


def learned(method: str, net: nn.Module, recipe: Recipe, steps: int) -> Learner:
    return near(net) if method == "ProtoNet" else maml(net, cross_entropy, recipe.lr, steps)


def near(net: nn.Module) -> Learner:
    """A prototypical network by distances that are not squared: logit_k(x) = −‖z(x) − c_k‖."""
    squared = protonet(net)

    def predict(theta: Params, x: Tensor) -> Tensor:
        return -(-squared.predict(theta, x)).clamp_min(1e-12).sqrt()

    return squared._replace(predict=predict)


# mtlib ----------------------------------------------------------------------------------------


def with_mtlib(
    method: str, recipe: Recipe, data: ClassSet, net: nn.Module, look: Look, seed: int
) -> None:
    draw = episodes(data, recipe.ways, 1, recipe.queries, recipe.tasks, seed)
    fitted(method, recipe, draw, net, look)


def with_ahead(
    method: str, recipe: Recipe, data: ClassSet, net: nn.Module, look: Look, seed: int
) -> None:
    draw = episodes(data, recipe.ways, 1, recipe.queries, recipe.tasks, seed)
    with ahead(draw) as stream:
        fitted(method, recipe, stream, net, look)


def fitted(method: str, recipe: Recipe, stream: Stream, net: nn.Module, look: Look) -> None:
    learner = learned(method, net, recipe, steps=1)

    def watched(phi: Params) -> float:
        look(lambda: phi)
        return 0.0

    fit(
        bilevel(learner, cross_entropy),
        learner.init(),
        stream,
        steps=10**6,
        optimizer=partial(torch.optim.Adam, lr=recipe.rate),
        stop=early_stopping(watched, every=1, patience=10**6),
        progress=False,
    )


# The others' recipes, in torch alone -----------------------------------------------------------


def with_torch(
    method: str, recipe: Recipe, data: ClassSet, net: nn.Module, look: Look, seed: int
) -> None:
    rng = random.Random(seed)
    net = written_out(net)
    names = [k for k, _ in conv4(ways=5).named_parameters()]
    adam = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    step = proto_step if method == "ProtoNet" else maml_step
    while True:
        adam.zero_grad()
        for _ in range(recipe.tasks):
            step(net, recipe, *drawn(rng, data.items, recipe))
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(1 / recipe.tasks)
        adam.step()
        look(lambda: dict(zip(names, net.parameters(), strict=True)))


def written_out(net: nn.Module) -> nn.Module:
    """The network as `peers.plain` writes it, with a head, from these weights."""
    from peers import plain

    work = workloads()["W2, second order"]
    return plain(Case(work, net, cross_entropy, None))


def drawn(rng: random.Random, items: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """An episode, item by item: support and query images, and the queries' labels."""
    support, query = [], []
    for c in rng.sample(range(len(items)), recipe.ways):
        first, *others = rng.sample(range(items.shape[1]), 1 + recipe.queries)
        support.append(items[c, first])
        query += [items[c, i] for i in others]
    return (
        torch.stack(support),
        torch.arange(recipe.ways),
        torch.stack(query),
        torch.arange(recipe.ways).repeat_interleave(recipe.queries),
    )


def proto_step(
    net: nn.Module, recipe: Recipe, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor
) -> None:
    """Support and query pass one after the other."""
    body = net[:-1]
    prototypes = body(xs)  # of one shot
    cross_entropy(-torch.cdist(body(xq), prototypes), yq).backward()


def maml_step(
    net: nn.Module, recipe: Recipe, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor
) -> None:
    start = dict(net.named_parameters())
    inner = cross_entropy(net(xs), ys)
    slopes = torch.autograd.grad(inner, list(start.values()), create_graph=True)
    theta = {k: p - recipe.lr * g for (k, p), g in zip(start.items(), slopes, strict=True)}
    cross_entropy(functional_call(net, theta, (xq,)), yq).backward()


PUBLISHED = {
    "ProtoNet": ("easyfsl's recipe", EASYFSL),
    "MAML": ("learn2learn's recipe", LEARN2LEARN),
}
CONTENDERS = {
    method: {
        f"{name}, torch": Contender(recipe, with_torch),
        f"{name}, mtlib": Contender(recipe, with_mtlib),
        "our recipe, torch": Contender(OWN[method], with_torch),
        "our recipe, mtlib": Contender(OWN[method], with_mtlib),
    }
    for method, (name, recipe) in PUBLISHED.items()
}
CONTENDERS["ProtoNet"]["our recipe, mtlib, drawn ahead"] = Contender(OWN["ProtoNet"], with_ahead)


if __name__ == "__main__":
    main()
