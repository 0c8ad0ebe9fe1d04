"""A script in one process and in several: started as a reader would, or all forked from one start."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from mtlib.core import expect
from mtlib.tasks import positive

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENV = {"MTLIB_PROGRESS": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
LOADED = ("mtlib.train", "mtlib.nets", "mtlib.learners.gradient")
"""What a script would import; imported once before forks."""


def launched(
    script: Path, counts: Sequence[int], arguments: Sequence[object] = (), apart: bool = True
) -> list[str]:
    """Run a script in so many processes, count by count -> the files that it wrote, beside the script.

    Each process has one thread and the CPU. The script's arguments are its file and `arguments`. `apart`: one after the other
    by `python` or `torchrun`. Otherwise all at once, forked from one Python that has imported torch, where the system
    can fork: it takes less than half of the time. Raises RuntimeError with the script's words where it fails.
    """
    script = Path(script)
    expect(script.is_file(), "a script", str(script))
    expect(bool(counts), "numbers of processes, such as (1, 2)", counts)
    for n in counts:
        positive(processes=n)
    outs = [str(script.with_suffix(f".{n}")) for n in counts]
    if not apart and hasattr(os, "fork"):
        orders = json.dumps([str(script), list(counts), outs, [str(a) for a in arguments]])
        _run("-m", "mtlib.book.launching", orders)
        return outs
    for n, out in zip(counts, outs, strict=True):
        several = [*TORCHRUN, str(n)] if n > 1 else []
        _run(*several, str(script), out, *map(str, arguments))
    return outs


def _run(*arguments: str) -> None:
    env = {**os.environ, **ENV}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the script failed, with the words:\n{done.stderr}")


def _forked(script: str, counts: list[int], outs: list[str], arguments: list[str]) -> int:
    """How many of the processes failed."""
    for name in LOADED:
        import_module(name)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler
    children = [
        _child(env, script, out, *arguments)
        for n, out in zip(counts, outs, strict=True)
        for env in _ranks(n)
    ]
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def _ranks(number: int) -> list[dict[str, str]]:
    """What `torchrun` would tell each process; nothing to a single one."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    every = {**meet, "WORLD_SIZE": str(number)}
    return [{**every, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(number)]


def _child(env: dict[str, str], *argv: str) -> int:
    """A process that runs the script and ends."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ.update(env)
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except BaseException:  # it would go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(_forked(*json.loads(sys.argv[1])))
