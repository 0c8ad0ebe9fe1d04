"""Memory of the meta-gradient and of evaluation: how far each raises the process's peak, in a fresh process each.

    python benchmarks/memory.py                  # every table; the result as JSON
    python benchmarks/memory.py --only steps --threads 2
    python benchmarks/memory.py --only tasks --rows mtlib --write   # keeps these lines with the package, beside others

Four blocks of 64 filters, 1×28×28, 5-way 1-shot. `grown` is how far the peak of resident memory rises above what is held
after a tiny warm-up; `counted` is `mtlib.run.cost.peak_memory`, which sees tensors alone; both in bytes. `seconds` is the
second of two calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from meta_gradient import clock, keep, made, setting, slug
from peers import Make, ours, with_higher, with_torchopt
from workloads import Case, Workload, case, images, small, workloads

from mtlib.bilevel import bilevel, checkpointed, implicit
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.run.cost import peak_memory
from mtlib.run.progress import bar

STRENGTH = 2.0  # iMAML's λ, which no memory depends on

Start = Callable[[Workload, int], Callable[[], Any]]
"""`start(workload, number of steps, tasks or episodes)` -> what is measured."""


class Configuration(NamedTuple):
    table: str
    name: str
    number: int


def main() -> None:
    given = options().parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.one:
        table, name, number = given.one
        print(json.dumps(measure(Configuration(table, name, int(number)), given.small)))
        return
    if given.list:
        print("\n".join(f"{table}/{row}" for table in TABLES for row in TABLES[table]))
        return
    report = suite(given.only, given.small, given.rows)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        name = f"memory-{slug('cpu')}-{torch.get_num_threads()}-threads"
        keep(report, name, "tables", depth=3)


def options() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--threads", type=int, help="of one operation; torch's own choice otherwise")
    ask.add_argument("--only", nargs="+", default=list(TABLES), choices=list(TABLES))
    ask.add_argument("--rows", nargs="+", help="of these tables, such as mtlib; all otherwise")
    ask.add_argument("--list", action="store_true", help="the tables' rows, and no more")
    ask.add_argument("--small", action="store_true", help="tiny tables: whether all runs")
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    ask.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a fresh process is told
    return ask


def suite(only: list[str], tiny: bool, rows: list[str] | None = None) -> dict[str, Any]:
    """Every configuration of the chosen tables, each in a process of its own."""
    named = {table: [n for n in TABLES[table] if rows is None or n in rows] for table in only}
    todo = [
        Configuration(table, name, number)
        for table in only
        for name in named[table]
        for number in ((2,) if tiny else NUMBERS[table])
    ]
    tables: dict[str, Any] = {t: {name: {} for name in found} for t, found in named.items()}
    with bar(len(todo), "memory") as shown:
        for c in todo:
            tables[c.table][c.name][str(c.number)] = apart(c, tiny)
            shown.update()
    return {"setting": setting("cpu", tiny), "tables": tables, "provenance": made()}


def apart(c: Configuration, tiny: bool) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", *map(str, c)]
    command += ["--threads", str(torch.get_num_threads()), *["--small"] * tiny]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(c: Configuration, tiny: bool) -> dict[str, float]:
    """Peak growth, counted tensors and seconds, after a tiny run that loads what the libraries load."""
    work, start = workloads()["W2, second order"], TABLES[c.table][c.name]
    start(small(work), 2)()
    run = start(small(work) if tiny else work, c.number)
    before = forget_peak()
    run()
    grown = max(0, peak_resident() - before)  # the kernel counts in batches: a peak may read low
    return {"grown": grown, "counted": peak_memory(run), "seconds": clock(run, "cpu")}


# What is measured -----------------------------------------------------------------------------


def by_steps(make: Make) -> Start:
    """One task, one query a class, and a number of inner steps."""
    return lambda work, n: make(case(work._replace(tasks=1, queries=1, steps=n)))


def by_tasks(make: Make) -> Start:
    """Five inner steps, five queries a class, and a number of tasks."""
    return lambda work, n: make(case(work._replace(tasks=n, queries=5)))


def with_implicit(given: Case) -> Callable[[], Any]:
    """iMAML, which keeps no graph of the inner steps."""
    work = given.work
    learner = maml(given.net, given.loss, work.lr, work.steps, strength=STRENGTH)
    objective = bilevel(learner, given.loss, implicit(STRENGTH))
    return partial(objective.value_and_grad, learner.init(), given.episode)


def evaluation(work: Workload, episodes: int) -> Callable[[], Any]:
    """MAML's accuracy on a number of episodes, drawn ten at a time."""
    draw = work._replace(tasks=10, queries=5)
    given = case(draw._replace(tasks=1))
    learner = maml(given.net, given.loss, work.lr, work.steps)
    return partial(
        evaluate, learner, learner.init(), partial(images, draw), episodes, progress=False
    )


TABLES: dict[str, dict[str, Start]] = {
    "steps": {
        "mtlib": by_steps(ours()),
        "mtlib, checkpointed": by_steps(ours(hypergradient=checkpointed)),
        "mtlib, implicit": by_steps(with_implicit),
        "higher": by_steps(with_higher),
    },
    "tasks": {
        "mtlib": by_tasks(ours()),
        "higher": by_tasks(with_higher),
        "torchopt, one backward pass": by_tasks(partial(with_torchopt, at_the_end=True)),
    },
    "episodes": {"mtlib": evaluation},
}
NUMBERS = {"steps": (1, 2, 5, 10, 20), "tasks": (1, 4, 16, 64), "episodes": (100, 500)}


# Resident memory ------------------------------------------------------------------------------


def forget_peak() -> int:
    """Bytes held now, from which the peak starts anew where the system lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    """The most bytes that this process held in memory, since `forget_peak` where the system lets it forget."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


if __name__ == "__main__":
    main()
