"""JAX among the peers: in a process of its own, as its threads and torch's disturb each other.

While it computes, this process waits. It has as many threads as torch has here, and says its own seconds: what crosses
between the processes is not counted. JAX is optional, `pip install "mtlib-book[bench]"`; without it there is no row.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import Case, Workload

from mtlib.core import over

WORKER = Path(__file__).with_name("jax_worker.py")


def is_here() -> bool:
    """Whether JAX is installed."""
    return find_spec("jax") is not None


def ways(work: Workload) -> dict[str, Any]:
    """Name -> `make`, where JAX is here and the workload is one of its."""
    return {"JAX": Apart} if is_here() and work.jax else {}


class Apart:
    """The meta-gradient of a case in JAX's process; `seconds()` is the time of one call, as that process says."""

    def __init__(self, case: Case):
        self.case, net = case, case.net
        problem = {
            "work": case.work._asdict(),
            "parameters": [p.detach().numpy() for p in net.parameters()],
            "episode": tuple(tuple(batch) for batch in over(Tensor.numpy, case.episode)),
            "double": next(net.parameters()).dtype == torch.float64,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        weakref.finalize(self, _end, self.process)
        pickle.dump(problem, self.process.stdin)

    def __call__(self) -> list[Tensor]:
        return [torch.from_numpy(g.copy()) for g in self._ask("gradient")]

    def seconds(self) -> float:
        return self._ask("seconds")

    def _ask(self, what: str) -> Any:
        pickle.dump(what, self.process.stdin)
        self.process.stdin.flush()
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError("JAX's process ended; what it printed stands above") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.stdin.close()
    process.wait()
    process.stdout.close()
