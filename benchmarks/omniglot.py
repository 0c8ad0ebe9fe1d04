"""Omniglot, 5-way 1-shot, after a minute of training a method: accuracy on test characters never seen.

    python benchmarks/omniglot.py                       # 60 s of training each, on this machine
    python benchmarks/omniglot.py --precision bfloat16  # ProtoNet's convolutions in half precision, weights in float32

The number of steps is what fits into the time, by the seconds of twenty steps. ProtoNet's rate falls to zero along a
cosine; MAML's rises first, for a tenth of the steps. Settings were chosen on validation alphabets. Lake's split, rotations
as classes in training, transductive norm.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from meta_gradient import keep, slug
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.book.results import provenance
from mtlib.core import Learner, Stream
from mtlib.data.characters import characters
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
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


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seconds", type=float, default=60, help="of training, for each method")
    ask.add_argument("--episodes", type=int, default=600, help="of the test")
    ask.add_argument("--only", nargs="+", default=["ProtoNet", "MAML"])
    ask.add_argument("--part", choices=["val", "test"], default="test")
    ask.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    given = ask.parse_args()

    train, asked = characters("train", rotations=True), characters(given.part)
    test = episodes(asked, ways=5, shots=1, queries=15, tasks=10, seed=1)
    draw = partial(episodes, train, shots=1, queries=5, seed=given.seed)
    methods = {
        "ProtoNet": (
            with_protonet,
            draw(ways=20, tasks=1),
            partial(cosine_adam, 1e-3),
            given.precision,
        ),
        "MAML": (with_maml, draw(ways=5, tasks=2), partial(rising_adam, 5e-3), "float32"),
    }
    found = {}
    for name in given.only:
        make, stream, rule, precision = methods[name]
        torch.manual_seed(given.seed)
        net = conv4(ways=5)
        if precision == "bfloat16":
            net.body = Autocast(net.body)
        run = within(given.seconds, make(net, 1), stream, rule)
        score = evaluate(make(net, TEST_STEPS), run.params, test, given.episodes)
        found[name] = {
            "accuracy": score.mean,
            "interval over episodes": score.interval,
            "seconds": run.seconds,
            "steps": len(run.losses),
            "precision": precision,
        }
    setting = {
        **vars(given),
        "threads": torch.get_num_threads(),
        "data": asked.source,
        "small": False,
    }
    report = {"setting": setting, "methods": found, "provenance": provenance()}
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        keep(report, f"omniglot-{slug('cpu')}-{given.precision}", "methods")


def with_protonet(net: nn.Module, steps: int) -> Learner:
    return protonet(net)


def with_maml(net: nn.Module, steps: int) -> Learner:
    return maml(net, cross_entropy, lr=0.4, steps=steps)


def within(
    seconds: float, learner: Learner, stream: Stream, rule: Callable[[int], dict[str, Any]]
) -> Run:
    """Training for that long, on one machine: as many steps as fit."""
    objective, phi = bilevel(learner, cross_entropy), learner.init()
    fit(objective, phi, stream, 2, progress=False)
    began = time.perf_counter()
    fit(objective, phi, stream, 20, progress=False)
    steps = max(2, int(20 * seconds / (time.perf_counter() - began)))
    return fit(objective, phi, stream, steps, **rule(steps))


if __name__ == "__main__":
    main()
