"""What the benchmarks time: meta-batches of the literature's shapes, filled with random data from a seed.

A module beside this one may bring workloads of its own: it stands in `MODULES`, and has `brings(device)` -> name ->
workload; without that function it is left alone. Such a workload is a NamedTuple with `what`, `method` and `tasks`, and
with methods: `case(seed, dtype, device)`, `reduced()`, `small()`, and `implementations(compiled)` -> name -> make, "torch
by hand" among them. A module that is not there, or has not what it needs (ImportError), brings none.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.core import Batch, Episode, Loss, move, over
from mtlib.data.sinusoids import sinusoids
from mtlib.nets import conv4, mlp

MODULES = ("transformer",)


class Workload(NamedTuple):
    """One meta-gradient: of MAML in second or first order, or of a prototypical network."""

    what: str
    method: Literal["second order", "first order", "protonet"]
    tasks: int
    shots: int  # support items a class, or support points
    queries: int  # query items a class, or query points
    steps: int = 5  # of the inner loop
    lr: float = 0.1  # of the inner loop
    ways: int = 5
    channels: int = 1
    size: int = 28  # pixels a side; 0: points of a curve
    width: int = 64
    jax: bool = False  # whether JAX takes part, which compiles for long


class Case(NamedTuple):
    """A workload with its network, weights and data: what every implementation starts from."""

    work: Workload
    net: nn.Module
    loss: Loss
    episode: Episode


def workloads(device: str = "cpu") -> dict[str, Workload]:
    """Name -> workload. W2 has 8 tasks on a CPU and 32 on another device, which 8 would not fill."""
    so: Any = "second order"
    sinusoid = Workload(
        "sinusoid, MLP 1-40-40-1", so, 25, 10, 10, lr=0.01, ways=1, size=0, jax=True
    )
    omniglot = Workload(
        "Omniglot shape, 5-way 1-shot", so, 8 if device == "cpu" else 32, shots=1, queries=15
    )
    twenty = omniglot._replace(what="Omniglot shape, 20-way 1-shot", tasks=2, ways=20)
    imagenet = omniglot._replace(
        what="mini-ImageNet shape, 5-way 1-shot", tasks=4, channels=3, size=84, width=32
    )
    protonet = Workload("ProtoNet, Omniglot shape, 5-way 5-shot", "protonet", 4, 5, 15, steps=0)
    return {
        "W1, 1 step": sinusoid._replace(steps=1),
        "W1, 5 steps": sinusoid,
        **_both_orders("W2", omniglot._replace(jax=True)),
        **_both_orders("W3", twenty),
        **_both_orders("W4", imagenet),
        "W5": protonet,
        **{k: w for module in _brought() for k, w in module.brings(device).items()},
    }


def _brought() -> list[ModuleType]:
    """The modules that bring workloads, under names that no package has."""
    found = []
    for name in MODULES:
        path, own = Path(__file__).with_name(f"{name}.py"), f"benchmarks_{name}"
        if own not in sys.modules and path.exists():
            spec = spec_from_file_location(own, path)
            module = module_from_spec(spec)
            sys.modules[own] = module
            try:
                spec.loader.exec_module(module)
            except ImportError:
                del sys.modules[own]
        if hasattr(sys.modules.get(own), "brings"):
            found.append(sys.modules[own])
    return found


def _both_orders(name: str, work: Workload) -> dict[str, Workload]:
    return {
        f"{name}, second order": work,
        f"{name}, first order": work._replace(method="first order"),
    }


def reduced(work: Workload) -> Workload:
    """The same structure with two tasks and few queries, on which gradients are compared."""
    if not isinstance(work, Workload):
        return work.reduced()
    return work._replace(tasks=2, queries=min(work.queries, 2))


def small(work: Workload) -> Workload:
    """A tiny version for tests: it says that things run, and nothing about their speed."""
    if not isinstance(work, Workload):
        return work.small()
    images = {"size": 16, "width": 4, "ways": 3} if work.size else {}
    return reduced(work)._replace(**images)


def case(
    work: Workload, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Case:
    """The workload's network, with weights from the seed, and its data, on the device."""
    if not isinstance(work, Workload):
        return work.case(seed, dtype, device)
    torch.manual_seed(seed)
    if work.size:
        net = conv4(work.ways, work.channels, work.width, work.size)
        loss, episode = cross_entropy, images(work, seed)
    else:
        net = mlp(1, (40, 40), 1)
        loss, episode = mse_loss, sinusoids(work.shots, work.queries, work.tasks, seed)(0)
    episode = move(over(lambda d: d.to(dtype), episode), device)
    return Case(work, net.to(device, dtype), loss, episode)


def images(work: Workload, seed: int) -> Episode:
    """Noise in [0, 1) with one-hot labels, class after class: x (T, N, channels, size, size), y (T, N, ways)."""
    g = torch.Generator().manual_seed(seed)

    def batch(a_class: int) -> Batch:
        labels = torch.arange(work.ways).repeat_interleave(a_class)
        x = torch.rand(work.tasks, len(labels), work.channels, work.size, work.size, generator=g)
        return Batch(x, torch.eye(work.ways)[labels].repeat(work.tasks, 1, 1))

    return Episode(batch(work.shots), batch(work.queries))
