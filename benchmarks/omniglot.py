"""Omniglot, 5-way 1-shot, after a minute of training a method: accuracy on test characters never seen.

    python benchmarks/omniglot.py                       # 60 s of training each, one seed, on this machine
    python benchmarks/omniglot.py --only MAML --processes 2 --seeds 0 1 2 --write
    python benchmarks/omniglot.py --precision bfloat16  # ProtoNet's convolutions in half precision, weights in float32

The number of steps is what fits into the time, by the seconds of forty steps. ProtoNet's rate falls to zero along a
cosine; MAML's rises first, for a tenth of the steps, and the mean of its parameters is tested. Settings were chosen on
validation alphabets. Lake's split, rotations as classes in training, transductive norm. With `--processes` so many, of one
thread each, share the tasks of a step. `--write` keeps each seed's run beside those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from meta_gradient import keep, slug
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Average

from mtlib.bilevel import bilevel
from mtlib.book.results import provenance
from mtlib.core import Learner, Stream
from mtlib.data.characters import characters
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.run.processes import first_says, processes, rank
from mtlib.tasks import episodes
from mtlib.train import Run, cosine_adam, fit, rising_adam

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
    rule: Callable[[int], dict[str, Any]]  # number of steps -> optimizer and schedule
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
    average = Average()
    run = within(given.seconds, way.learner(net, 1), stream, way.rule, average)
    found = {"steps": len(run.losses), "seconds": run.seconds}
    if rank() == 0:
        test = episodes(characters(given.part), 5, 1, queries=15, tasks=10, seed=1)
        phi = average.params if way.averaged else run.params
        score = evaluate(way.learner(net, TEST_STEPS), phi, test, given.episodes)
        found |= {"accuracy": score.mean, "episodes": score.interval}
    return found


def with_protonet(net: nn.Module, steps: int) -> Learner:
    return protonet(net)


def with_maml(net: nn.Module, steps: int) -> Learner:
    return maml(net, cross_entropy, lr=0.4, steps=steps)


def within(
    seconds: float,
    learner: Learner,
    stream: Stream,
    rule: Callable[[int], dict[str, Any]],
    average: Average,
) -> Run:
    """Training for that long: as many steps as fit."""
    objective, phi = bilevel(learner, cross_entropy), learner.init()
    fit(objective, phi, stream, 2, progress=False)
    pace = fit(objective, phi, stream, 40, progress=False).seconds / 40
    steps = max(2, int(seconds / first_says(pace, "cpu")))
    return fit(
        objective, phi, stream, steps, hook=lambda step, phi, *_: average(phi), **rule(steps)
    )


WAYS = {
    "ProtoNet": Way(with_protonet, 20, 1, partial(cosine_adam, 1e-3)),
    "MAML": Way(with_maml, 5, 2, partial(rising_adam, 5e-3), averaged=True),
}


if __name__ == "__main__":
    main()
