"""What a computation costs besides time: the memory of the tensors that it makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlib.run.fast import DispatchMode
from mtlib.run.replay import each


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
