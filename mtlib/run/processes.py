"""Several processes over the axis of tasks, with torch.distributed: started by `torchrun`, used by `fit`.

The mean over T tasks is the mean over each process's part, weighted by its share of the tasks. So each process
takes a part, one all_reduce per step adds up value and gradient, and all of them take the same optimizer step. A
stream may have a method `part(step, tasks)` that gives take(stream(step), tasks): then each draws its own tasks alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtlib.core import Params
from mtlib.tasks import whole


class Group(NamedTuple):
    """The processes that train together, seen from one of them."""

    rank: int  # the number of this process, from 0
    size: int  # the number of processes
    device: torch.device  # where this process computes


@contextmanager
def processes(backend: str | None = None) -> Iterator[Group]:
    """Join the processes that `torchrun` started, and leave them at the end: `with processes() as group:`.

    `backend` is torch.distributed's; None is NCCL for tensors on CUDA and Gloo for those on a CPU. With CUDA, the
    process computes on the device LOCAL_RANK. Without `torchrun` there is one process, and nothing to
    join: the same script runs with `python script.py`. Raises ValueError if a machine has fewer CUDA devices
    than processes, or for a backend that this torch does not know.
    """
    _check_backend(backend)
    device = _device()
    if "WORLD_SIZE" not in os.environ:
        yield Group(0, 1, device)
        return
    if not dist.is_available():
        raise RuntimeError(
            "this build of torch has no torch.distributed: run `python script.py`, in one process"
        )
    dist.init_process_group(backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"))
    try:
        yield Group(rank(), size(), device)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 if there is only one."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def part(tasks: int) -> slice:
    """This process's part of an axis of T tasks: ⌊T/P⌋ or ⌈T/P⌉ for each of P processes, in order of rank.

    The part is empty if the rank is T or higher. Raises ValueError unless T is a whole number of at least 0.
    """
    whole(tasks=tasks)
    least, more = divmod(tasks, size())
    first = rank() * least + min(rank(), more)
    return slice(first, first + least + (rank() < more))


def average(value: Tensor, grads: Params, phi: Params, share: float) -> tuple[Tensor, Params]:
    """The mean over all tasks, from each process's mean over its part of them, in one all_reduce.

    Σ_p s_p · value_p  and  Σ_p s_p · grads_p,  with s_p = T_p/T the `share` of process p. An entry of φ that no
    process's gradient reaches stays absent. They exchange one vector of 1 + |φ| + n numbers, for |φ| entries of n
    numbers in all: value, flags of the entries reached, gradients. Its dtype is the widest in φ.
    """
    dtype = reduce(torch.promote_types, (p.dtype for p in phi.values()))
    like = next(iter(phi.values()))
    reached = torch.tensor([k in grads for k in phi], dtype=dtype, device=like.device)
    pieces = [grads[k] if k in grads else torch.zeros_like(p) for k, p in phi.items()]
    numbers = torch.cat([d.detach().to(dtype).reshape(-1) * share for d in (value, *pieces)])
    flat = torch.cat([numbers[:1], reached, numbers[1:]])
    dist.all_reduce(flat)
    mean, reached, gradients = flat.split([1, len(phi), len(flat) - 1 - len(phi)])
    split = gradients.split([p.numel() for p in phi.values()])
    return mean[0], {
        k: g.view(p.shape).to(p.dtype)
        for (k, p), g, r in zip(phi.items(), split, reached.tolist(), strict=True)
        if r
    }


def spread(
    numbers: Mapping[str, float], device: torch.device | str
) -> dict[str, tuple[float, float]]:
    """The numbers that differ between processes, by more than rounding: name -> (least, greatest)."""
    own = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device).nan_to_num()
    ends = torch.cat([-own, own])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    least, greatest = -ends[: len(own)], ends[len(own) :]
    same = torch.isclose(least, greatest, rtol=1e-9, atol=1e-9).tolist()
    pairs = zip(numbers, least.tolist(), greatest.tolist(), same, strict=True)
    return {k: (a, b) for k, a, b, equal in pairs if not equal}


def first_says(number: float | None, device: torch.device | str) -> float | None:
    """The first process's number, in all of them; None says that it has none."""
    if size() == 1:
        return number
    said = torch.tensor([number is not None, number or 0.0], dtype=torch.float64, device=device)
    dist.broadcast(said, 0)
    known, value = said.tolist()
    return value if known else None


def meet(device: torch.device | str) -> None:
    """Wait until every process is here."""
    if size() > 1:
        one = torch.ones((), device=device)
        dist.all_reduce(one)
        one.item()


def _device() -> torch.device:
    """The CUDA device with this process's number on its machine, made the current one; the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"expected at most {there} processes on this machine, one for each CUDA device; this is number {number}. "
            f"Start with --nproc-per-node={there}, or hide the devices with CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _check_backend(backend: str | None) -> None:
    """Raise ValueError for a backend that is no word of torch.distributed's, or a pair such as "cpu:gloo,cuda:nccl"."""
    if backend is None or not dist.is_available():
        return
    known = dist.Backend.backend_list
    words = backend.split(",") if isinstance(backend, str) else [""]
    if not all(word.rpartition(":")[2].lower() in known for word in words):
        raise ValueError(f"expected a backend among {known}, or None to choose, got {backend!r}")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
