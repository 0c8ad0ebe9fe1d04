"""How much two processes of one thread give over one process of one thread, data drawing included.

    python benchmarks/processes.py                # Conv4, MAML of 5 steps, 8 tasks a step; as JSON
    python benchmarks/processes.py --tasks 4 --steps 2 --rounds 5

Three kinds take turns: `one` trains on all tasks; `two` train together as under torchrun (each draws and computes its half,
one all_reduce a step); `apart` are two processes that train on half the tasks each and never meet, which is what the
machine has to give. Each is a process of its own that waits for its turn without computing. Seconds are those of `fit`'s
loop: draws, gradients, exchange and the optimizer. `exchange` is the part of them in which a process averages with the other
one, waiting for it included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

KINDS = {"one": 1, "two": 2, "apart": 2}
WARM_UP = 1


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--tasks", type=int, default=8)
    ask.add_argument("--inner", type=int, default=5, help="inner steps")
    ask.add_argument("--queries", type=int, default=15)
    ask.add_argument("--width", type=int, default=64)
    ask.add_argument("--steps", type=int, default=3, help="of training, in each turn")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    ask.add_argument("--kind", choices=list(KINDS), help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.kind:
        answer(given)
        return
    from meta_gradient import keep, made, setting, slug

    workers = {kind: [start(kind, r, port) for r in range(n)] for kind, n, port in _with_ports()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    exchange = list[float]()
    for i in range(WARM_UP + given.rounds):
        for kind in list(KINDS) if i % 2 else reversed(KINDS):
            spent = turn(workers[kind])
            if i >= WARM_UP:
                seconds[kind].append(max(s for s, _ in spent))
                exchange += [e / s for s, e in spent] if kind == "two" else []
    for of_kind in workers.values():
        for worker in of_kind:
            worker.stdin.close()
            worker.wait()

    def ratio(kind: str) -> dict[str, Any]:
        found = [a / b for a, b in zip(seconds["one"], seconds[kind], strict=True)]
        return {"median": statistics.median(found), "rounds": found}

    report = {
        "setting": {**vars(given), **setting("cpu", False), "threads": 1},
        "processes": {"two": ratio("two"), "apart": ratio("apart")},
        "seconds": {k: statistics.median(s) / given.steps for k, s in seconds.items()},
        "exchange": statistics.median(exchange),
        "provenance": made(),
    }
    print(json.dumps(report, indent=1))
    if given.write:
        keep(report, f"processes-{slug('cpu')}")


def _with_ports() -> list[tuple[str, int, int]]:
    found = []
    for kind, n in KINDS.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            found.append((kind, n, free.getsockname()[1]))
    return found


def start(kind: str, rank: int, port: int) -> subprocess.Popen[str]:
    """A process of this kind, on a core of its own where the system lets it choose."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "two":
        env |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, *sys.argv, "--kind", kind]
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=env)


def turn(workers: list[subprocess.Popen[str]]) -> list[list[float]]:
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return [json.loads(worker.stdout.readline()) for worker in workers]


def answer(given: Any) -> None:
    """In a process of a kind: train each time a line comes, and say the seconds of the loop and of the exchange."""
    from mtlib import train
    from mtlib.bilevel import bilevel
    from mtlib.data.characters import characters
    from mtlib.learners.gradient import maml
    from mtlib.nets import conv4
    from mtlib.run.processes import processes
    from mtlib.tasks import episodes

    torch.set_num_threads(1)
    tasks = given.tasks // (2 if given.kind == "apart" else 1)
    stream = episodes(characters("train", rotations=True), 5, 1, given.queries, tasks, seed=0)
    learner = maml(conv4(5, width=given.width, seed=0), cross_entropy, 0.1, given.inner)
    fit = partial(train.fit, bilevel(learner, cross_entropy), learner.init(), stream, given.steps)
    exchanged = 0.0
    average = train.average

    def timed(*arguments: Any) -> Any:
        nonlocal exchanged
        began = time.perf_counter()
        found = average(*arguments)
        exchanged += time.perf_counter() - began
        return found

    train.average = timed
    with processes():
        for _ in sys.stdin:
            exchanged = 0.0
            run = fit(progress=False)
            print(json.dumps([run.seconds, exchanged]), flush=True)


if __name__ == "__main__":
    main()
