"""The next draws of a stream, made in other processes while this one computes: torch's DataLoader, as a stream."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import traceback
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from multiprocessing import get_all_start_methods, parent_process, resource_tracker
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtlib.core import Stream
from mtlib.tasks import check_stream, one_of, positive, some_tasks

Key = tuple[int, slice | None, torch.dtype]
"""What is drawn: a step, a slice of its tasks (None: all), and the default dtype."""


class Ahead(AbstractContextManager["Ahead"]):
    """What `ahead` makes: a stream, which `close` or the end of `with` ends."""

    def __init__(self, stream: Stream, workers: int, method: str):
        self.source, self.workers, self.method = _Source(stream), workers, method
        self.held: dict[str, Any] = {}  # the loader, and its draws in their order
        self.next: Key | None = None
        self.closed = False
        weakref.finalize(
            self, self.held.clear
        )  # also at the end of the program, before its processes are ended

    def __call__(self, step: int) -> Any:
        return self.part(step, None)

    def part(self, step: int, tasks: slice | None) -> Any:
        """A slice of the tasks of stream(step); the next steps are drawn in the same slice."""
        if self.closed:
            raise ValueError(
                "expected a stream that is open; close() or the end of `with` ended its processes"
            )
        key = (step, tasks, torch.get_default_dtype())
        try:
            if key != self.next:
                self._begin(key)
            found = next(self.held["draws"])
        except BaseException as error:  # Ctrl-C amid a message: the next call starts anew
            self._end()
            traceback.clear_frames(error.__traceback__)  # which hold the processes, too
            raise
        self.next = (step + 1, tasks, key[2])
        return found

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        self._end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, key: Key) -> None:
        """Count on from there. Processes that run go on, and drop what they drew."""
        self.source.first = key
        with torch.device("cpu"), _quiet(), _no_interrupt():
            if "loader" not in self.held:
                self.held["loader"] = DataLoader(
                    self.source,
                    batch_size=None,
                    sampler=self.source,
                    collate_fn=_as_it_is,
                    num_workers=self.workers,
                    multiprocessing_context=self.method,
                    worker_init_fn=_begin_worker,
                    persistent_workers=True,
                    generator=torch.Generator(),  # a seed is drawn: not from the caller's numbers
                )
            self.held["draws"] = iter(self.held["loader"])

    def _end(self) -> None:
        """Let the processes go."""
        self.next = None
        self.held.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of more workers than cores, nor of forks beside threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits; a process begun here never hears of it, from its first moment (not on Windows)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which takes the block away as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ahead(stream: Stream, workers: int = 2, method: str = "spawn") -> Ahead:
    """The same stream, bit for bit, whose next steps are drawn in other processes while this one computes.

        with ahead(episodes(image_folder("photographs", 84, lazy=True), 5, 1, 15, 4, seed=0)) as stream:
            run = fit(objective, phi, stream, 10_000)

    torch's `DataLoader` does the work; each of the `workers` draws two steps ahead. Any step may be asked at any time: one
    out of order is drawn while you wait, after those that are under way. It is worth it where a draw takes long (files are
    read), not where items lie in memory. Draws are on the CPU, in memory that processes share (in a container,
    `--shm-size` says how much). An error in a draw is raised here, with its type and its words, when its step is asked
    for. The processes start with the first draw, and end with `with`, with `close()`, with the stream, or within seconds
    of this process, however it ends; after an error or Ctrl-C the next call starts new ones.

    `method` is how a process starts. "spawn" starts Python anew: the stream must be one that can be pickled, as those
    of `episodes`, `mixture`, `rows` and `quiz` can, of data whose classes stand in a file; its tensors move to memory that
    all share, its arrays are copied; and a script does its own work below `if __name__ == "__main__":`. "fork" copies
    this process as it is, with functions of a notebook, too; not on Windows, and not once other threads run. Raises
    TypeError for a stream that cannot be pickled, which names what in it cannot.
    """
    check_stream(stream)
    positive(workers=workers)
    one_of(method=(method, tuple(get_all_start_methods())))
    if isinstance(stream, Ahead):
        raise TypeError("expected a stream to draw ahead, got one that is drawn ahead already")
    if method != "fork":
        _check_pickle(stream, "a stream that another process can be given", f". {FORK}")
    return Ahead(stream, workers, method)


FORK = 'Put what it is made of into a file that can be imported, or ahead(stream, method="fork")'


class _Source(Dataset[Any]):
    """The stream as a data set, indexed by keys; and their order, on from the first."""

    first: Key

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator[Key]:
        step, tasks, dtype = self.first
        return ((i, tasks, dtype) for i in count(step))

    def __getitem__(self, key: Key) -> Any:
        step, tasks, dtype = key
        torch.set_default_dtype(dtype)
        try:
            found = self.stream(step) if tasks is None else some_tasks(self.stream, step, tasks)
            _check_pickle(found, "a draw that another process can be given")
            return found
        except Exception as error:
            pickle.dumps(type(error))  # what cannot travel would be waited for without end
            raise

    def __reduce__(self) -> Any:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")  # no open file for each tensor
        try:
            return _arrive, (bytes(ForkingPickler.dumps(self.stream)),)
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


def _arrive(parcel: bytes) -> _Source:
    """The data set in a new process; where its classes cannot be imported there, each draw says so."""
    try:
        return _Source(pickle.loads(parcel))
    except Exception as error:
        return _Source(partial(_unread, f"{type(error).__name__}: {error}"))


def _unread(why: str, step: int) -> Any:
    raise TypeError(f"expected a stream that another process can read, got {why}. {FORK}")


def _begin_worker(_: int) -> None:
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    atexit.register(os._exit, 0)  # torch's own threads may abort a spawned Python that ends


def _end_with(parent: Any) -> None:
    """torch looks who its parent is once it runs: too late where the parent died before."""
    parent.join()
    os._exit(1)


def _as_it_is(draw: Any) -> Any:
    return draw


class _Check(pickle.Pickler):
    """Pickles all but the numbers."""

    def persistent_id(self, found: Any) -> bool | None:
        if isinstance(found, Tensor) and (found.grad_fn is not None or found.device.type != "cpu"):
            raise TypeError(f"a tensor on {found.device}, or with a gradient; .detach().cpu()")
        return True if isinstance(found, Tensor | np.ndarray) and found.dtype != object else None


def _check_pickle(found: object, wanted: str, more: str = "") -> None:
    try:
        with open(os.devnull, "wb") as nowhere:
            _Check(nowhere).dump(found)
    except Exception as error:
        kind = type(found).__name__
        raise TypeError(f"expected {wanted}; {kind} cannot be pickled: {error}{more}") from error
