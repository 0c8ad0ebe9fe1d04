"""Switches for how torch computes attention.

Its fused kernels have no second derivatives, and on a CPU no rule for `vmap`; its math kernel, made of products and a
softmax, has both, and equals them to rounding (`mtlib.run.fast.MATH`). Which of them may run is a setting of the whole
process. Two switches, each set and put back by itself, would interleave and leave the fused kernels off for good: here
they are counted, the first in saves and the last out restores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.backends import cudnn, mha

Setting = tuple[Callable[[], bool], Callable[[bool], Any], bool]
"""(read it, write it, what it shall be)"""


class Switch:
    """Settings of the process that are as they shall be while somebody holds the switch, in whatever thread."""

    def __init__(self, settings: Sequence[Setting]):
        self.settings = settings
        self._lock = threading.RLock()
        self._holders = set[int]()
        self._saved: list[bool] | None = None

    def held(self) -> Held:
        """`with switch.held():`"""
        return Held(self)

    def take(self, holder: int) -> None:
        with self._lock:
            if not self._holders:
                if self._saved is None:  # else Ctrl-C has stopped the last one from restoring
                    self._saved = [read() for read, _, _ in self.settings]
                for _, write, value in self.settings:
                    write(value)
            self._holders.add(holder)

    def give(self, holder: int) -> None:
        with self._lock:
            self._holders.discard(holder)
            if not self._holders and self._saved is not None:
                for (_, write, _), value in zip(self.settings, self._saved, strict=True):
                    write(value)
                self._saved = None


class Held:
    """One who holds a switch, until the end of the block; an exception or Ctrl-C anywhere lets go of it, too."""

    __slots__ = ("_in", "_switch")

    def __init__(self, switch: Switch):
        self._switch, self._in = switch, False

    def __enter__(self) -> None:
        self._in = True
        try:
            self._switch.take(id(self))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self._switch.give(id(self))
        self._in = False

    def __del__(self) -> None:
        if self._in:  # Ctrl-C came on the way out
            self.__exit__()


NO_FASTPATH = Switch([(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False)])
"""Held under `vmap`, where `nn.MultiheadAttention` cannot see that a gradient is asked of it."""
NO_CUDNN = Switch([(lambda: cudnn.enabled, partial(setattr, cudnn, "enabled"), False)])
"""Held where recurrent networks are differentiated twice: cuDNN's cannot be."""
