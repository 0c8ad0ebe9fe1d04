"""Omniglot, 5-way 1-shot, after a minute of training a method: accuracy on test characters never seen.

    python benchmarks/omniglot.py                       # 60 s of training each, one seed, on this machine
    python benchmarks/omniglot.py --only MAML --processes 2 --seeds 0 1 2 --write
    python benchmarks/omniglot.py --precision bfloat16  # ProtoNet's convolutions in half precision, weights in float32

Training ends with its time, whatever else the machine does. ProtoNet's rate falls to zero along a cosine of the time that is
spent; MAML's rises first, for a tenth of it, and the mean of its parameters is tested. Settings were chosen on
validation alphabets. Lake's split, rotations as classes in training, transductive norm. With `--processes` so many, of one
thread each, share the tasks of a step. `--write` keeps each seed's run beside those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from meta_gradient import keep, slug
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from training import Average

from mtlib.bilevel import bilevel
from mtlib.book.results import provenance
from mtlib.core import Learner, Params
from mtlib.data.characters import characters
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.run.processes import first_says, processes, rank
from mtlib.tasks import episodes
from mtlib.train import fit

TEST_STEPS = 20  # inner steps of MAML at test; it trains with one


class Autocast(nn.Module):
    """A body whose convolutions run in bfloat16; features, parameters and gradients are float32."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.body(x).float()


class Way(NamedTuple):
    """How a method trains."""

    learner: Callable[[nn.Module, int], Learner]
    ways: int
    tasks: int  # a step
    rate: float  # Adam's, at its highest
    rule: Callable[[float], float]  # share of the time that is spent -> share of that rate
    averaged: bool = False  # whether the parameters' mean is tested


def main() -> None:
    given = options().parse_args()
    if given.processes > 1 and "WORLD_SIZE" not in os.environ:
        raise SystemExit(started(given.processes))
    with processes() as group:
        if given.processes > 1:
            torch.set_num_threads(1)
        found = {
            label(name, given): {str(seed): trained(name, seed, given) for seed in given.seeds}
            for name in given.only
        }
    if group.rank > 0:
        return
    setting = {
        **vars(given),
        "threads": torch.get_num_threads(),
        "data": characters(given.part).source,
        "small": False,
    }
    report = {"setting": setting, "methods": found, "provenance": provenance()}
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        keep(report, f"omniglot-{slug('cpu')}", "methods", depth=2)


def options() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seconds", type=float, default=60, help="of training, for each method")
    ask.add_argument("--episodes", type=int, default=600, help="of the test")
    ask.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    ask.add_argument("--part", choices=["val", "test"], default="test")
    ask.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    ask.add_argument("--processes", type=int, default=1, help="each of one thread")
    ask.add_argument("--seeds", nargs="+", type=int, default=[0])
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    return ask


def started(number: int) -> int:
    """This script's exit status in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *torchrun, *sys.argv], env=env).returncode


def label(name: str, given: argparse.Namespace) -> str:
    """A method with what its training is like: "MAML, float32, 2 processes"."""
    several = f", {given.processes} processes" if given.processes > 1 else ""
    return f"{name}, {precision(name, given)}{several}"


def precision(name: str, given: argparse.Namespace) -> str:
    return given.precision if name == "ProtoNet" else "float32"


def trained(name: str, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """One training, and its test in the first process."""
    way = WAYS[name]
    net = conv4(ways=5, seed=seed)
    if precision(name, given) == "bfloat16":
        net.body = Autocast(net.body)
    stream = episodes(characters("train", rotations=True), way.ways, 1, 5, way.tasks, seed)
    clock, average, last = Clock(given.seconds, way.rule), Average(), Params()

    def seen(step: int, phi: Params, *_: object) -> None:
        last.update(phi)
        average(phi)

    learner = way.learner(net, 1)
    train = partial(fit, bilevel(learner, cross_entropy), learner.init(), stream, progress=False)
    train(2)  # warms up
    with contextlib.suppress(Over):
        adam = partial(torch.optim.Adam, lr=way.rate)
        train(10**6, adam, partial(LambdaLR, lr_lambda=clock), hook=seen)
    found = {"steps": clock.steps, "seconds": clock.spent}
    if rank() == 0:
        test = episodes(characters(given.part), 5, 1, queries=15, tasks=10, seed=1)
        phi = average.params if way.averaged else last
        score = evaluate(way.learner(net, TEST_STEPS), phi, test, given.episodes)
        found |= {"accuracy": score.mean, "episodes": score.interval}
    return found


def with_protonet(net: nn.Module, steps: int) -> Learner:
    return protonet(net)


def with_maml(net: nn.Module, steps: int) -> Learner:
    return maml(net, cross_entropy, lr=0.4, steps=steps)


class Over(Exception):
    """The time is."""


class Clock:
    """The rate of each step by the time that the first process has spent; raises Over in all of them once it is over."""

    def __init__(self, seconds: float, rule: Callable[[float], float]):
        self.seconds, self.rule = seconds, rule
        self.began = self.spent = 0.0
        self.steps = 0

    def __call__(self, step: int) -> float:
        if step == 0:
            self.began = time.perf_counter()
        self.steps = step
        self.spent = first_says(time.perf_counter() - self.began, "cpu")
        if step > 1 and self.spent >= self.seconds:
            raise Over
        return self.rule(self.spent / self.seconds)


def falling(share: float) -> float:
    """From 1 to 0, along half a cosine."""
    return (1 + math.cos(math.pi * min(share, 1.0))) / 2


def rising(share: float, rise: float = 0.1) -> float:
    """From 1/25 up to 1 within `rise`, then falling."""
    if share < rise:
        return 1 - 24 / 25 * falling(share / rise)
    return falling((share - rise) / (1 - rise))


WAYS = {
    "ProtoNet": Way(with_protonet, 20, 1, 1e-3, falling),
    "MAML": Way(with_maml, 5, 2, 5e-3, rising, averaged=True),
}


if __name__ == "__main__":
    main()
