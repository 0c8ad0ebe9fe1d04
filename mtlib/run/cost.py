"""What a computation costs besides time: the memory of the tensors that it makes, and how many tasks a device has it for."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtlib.core import Params
from mtlib.run.devices import random_kept
from mtlib.run.fast import DispatchMode
from mtlib.run.replay import each

SHARE = 0.5  # of a device's memory that tasks may take together
AT_MOST = 1000  # a task's gradient is taken to need no more than so many times its data and φ

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container has."""


def peak_memory(f: Callable[..., Any], *args: Any) -> int:
    """The most bytes that tensors made during `f(*args)` hold at one time, on any device.

    Counted storage by storage, so that a view costs nothing and a graph costs what it saves. Memory held
    before does not count, nor does an operation's own workspace.
    """
    if not callable(f):
        raise TypeError(
            f"expected a function and its arguments, got the result {type(f).__name__}: peak_memory(f, x), not "
            "peak_memory(f(x))"
        )
    ledger = _Ledger()
    with ledger:
        f(*args)
    return ledger.peak


def affordable(
    tasks: int,
    one: Callable[[slice], Any],
    phi: Params,
    data: Any,
    known: dict[Hashable, int],
) -> int:
    """At most `tasks`: as many as may run together in half of the memory that the device has in all, in equal parts.

    Decided the first time that data of these shapes come (`known`). Where many times their data and φ would fit,
    they all run. Else `one(slice(0, 1))` runs once more, and its bytes are counted; torch's random states stay. What is free
    at the moment does not count, so that a machine always decides alike.
    """
    key = _shapes(data)
    if key not in known:
        known[key] = _affordable(tasks, one, phi, data)
    return known[key]


def _affordable(tasks: int, one: Callable[[slice], Any], phi: Params, data: Any) -> int:
    limit = SHARE * memory(next(iter(phi.values())).device)
    least = sum(v.nbytes for v in _tensors(phi)) + sum(v.nbytes for v in _tensors(data)) / tasks
    if tasks == 1 or tasks * least * AT_MOST <= limit:
        return tasks
    try:
        with random_kept():
            most = limit // max(1, peak_memory(one, slice(0, 1)))
    except Exception:  # it comes again, where it is told in words
        return tasks
    parts = math.ceil(tasks / min(tasks, max(1, most)))
    return math.ceil(tasks / parts)


def _shapes(nest: Any) -> Hashable:
    return tuple([v.shape for v in _tensors(nest)])


@cache
def memory(device: torch.device) -> float:
    """Bytes that a device has in all; infinitely many where it does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return float("inf")
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(float(Path(path).read_text()))
    return min(found)


class _Ledger(DispatchMode):  # type: ignore[misc]
    """Sees every operation below autograd and vmap, counts new storages and takes off freed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {id(_storage(t)) for t in _tensors((args, kwargs))}
        out = operation(*args, **(kwargs or {}))
        for t in _tensors(out):
            if id(_storage(t)) not in before:
                self._enter(_storage(t))
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._strike, storage.nbytes()).atexit = False

    def _strike(self, size: int) -> None:
        self.live -= size


def _storage(t: Tensor) -> torch.UntypedStorage:
    return t.untyped_storage()


def _tensors(nest: Any) -> list[Tensor]:
    found: list[Any] = []
    each(found.append, nest)
    return [v for v in found if isinstance(v, Tensor)]
