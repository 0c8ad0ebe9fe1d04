"""The next draws of a stream, made in other processes while this one computes."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
import traceback
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from mtlib.core import Stream
from mtlib.tasks import check_stream, one_of, positive, some_tasks

Key = tuple[int, tuple[int | None, int | None, int | None] | None]
"""What is drawn: a step, and which slice of its tasks, or all."""


class Ahead:
    """What `ahead` makes: a stream, which `close` or the end of `with` ends."""

    def __init__(self, stream: Stream, workers: int, method: str):
        self.stream, self.count, self.method = stream, workers, method
        self.workers: list[_Worker] = []
        self.closed = False
        weakref.finalize(self, _end, self.workers)
        self._start()

    def __call__(self, step: int) -> Any:
        return self._draw(step, None)

    def part(self, step: int, tasks: slice) -> Any:
        """A slice of the tasks of stream(step); the next steps are drawn in the same slice."""
        return self._draw(step, (tasks.start, tasks.stop, tasks.step))

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        _end(self.workers)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("expected the stream itself, which ahead(stream, workers) cannot stand for")

    def _start(self) -> None:
        given = self.stream if self.method == "fork" else _Parcel(self.stream)
        try:
            for _ in range(self.count):
                self.workers.append(_Worker(given, self.method))
        except BaseException:
            _end(self.workers)
            raise

    def _draw(self, step: int, tasks: Any) -> Any:
        if self.closed:
            raise ValueError(
                "expected a stream that is open; close() or the end of `with` ended its processes"
            )
        try:
            if not self.workers:
                self._start()
            one = self._asked((step, tasks))
            found = one.receive()
            self._ask_next(step, tasks)
        except BaseException:  # Ctrl-C in the midst of a message: the next call starts anew
            _end(self.workers)
            raise
        return found()

    def _asked(self, key: Key) -> _Worker:
        """The worker that draws it; if none does, one is asked: a free one, or the one that is furthest from it."""
        for one in self.workers:
            if one.key == key:
                return one
        free = next((one for one in self.workers if one.key is None), None)
        if free is None:
            free = max(self.workers, key=lambda one: abs(one.key[0] - key[0]) if one.key else 0)
            free.receive()
        free.ask(key)
        return free

    def _ask_next(self, step: int, tasks: Any) -> None:
        """Give what comes next to those that are free, or have drawn in vain."""
        wanted: list[Key] = [(step + i, tasks) for i in range(1, self.count + 1)]
        held = {one.key for one in self.workers}
        free = [one for one in self.workers if one.key is None]
        for one in self.workers:
            if one.key is not None and one.key not in wanted and one.pipe.poll():
                one.receive()
                free.append(one)
        for one, key in zip(free, [k for k in wanted if k not in held], strict=False):
            one.ask(key)


def ahead(stream: Stream, workers: int = 2, method: str = "spawn") -> Ahead:
    """The same stream, bit for bit, whose next steps are drawn in other processes while this one computes.

        with ahead(episodes(image_folder("photographs", 84, lazy=True), 5, 1, 15, 4, seed=0)) as stream:
            run = fit(objective, phi, stream, 10_000)

    Each of the `workers` has one draw ready, so that many steps lie ahead. Any step may be asked at any time: one that
    nobody drew yet is waited for. It is worth it where a draw takes long (files are read), not where items lie in memory.
    An error in a draw is raised here, as it is, when its step is asked for. Draws come as bytes over a pipe, and are on
    the CPU. The processes end with `with`, with `close()`, with the stream, or with this process, however it ends;
    after Ctrl-C the next call starts new ones.

    `method` is how a process starts. "spawn" starts Python anew: the stream must be one that can be pickled, as those
    of `episodes`, `mixture`, `rows` and `quiz` can, of data whose classes stand in a file; its tensors and arrays are copied
    once, to memory that all share; and a script does its own work below `if __name__ == "__main__":`. "fork" copies this process as it
    is, with functions of a notebook, too; not on Windows, and not once other threads run. Raises TypeError for a stream
    that cannot be pickled, which names what in it cannot.
    """
    check_stream(stream)
    positive(workers=workers)
    one_of(method=(method, tuple(multiprocessing.get_all_start_methods())))
    if isinstance(stream, Ahead):
        raise TypeError("expected a stream to draw ahead, got one that is drawn ahead already")
    return Ahead(stream, workers, method)


class _Worker:
    """One process, and what it draws."""

    def __init__(self, given: Any, method: str):
        context: Any = multiprocessing.get_context(method)
        self.key: Key | None = None
        self.pipe, there = context.Pipe()
        mine = self.pipe if method == "fork" else None
        self.process = context.Process(target=_work, args=(given, there, mine), daemon=True)
        try:
            with _without_interrupts(), warnings.catch_warnings():
                # Python's own warning, of forks beside threads
                warnings.simplefilter("ignore", DeprecationWarning)
                self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            there.close()

    def ask(self, key: Key) -> None:
        self.key = key
        with suppress(BrokenPipeError, ConnectionResetError):  # receive says what became of it
            self.pipe.send((key, torch.get_default_dtype()))

    def receive(self) -> Any:
        """What was asked for, as a function that returns it, or raises what its draw raised."""
        key, self.key = self.key, None
        try:
            sizes, message = self.pipe.recv()
            buffers = [np.empty(n, dtype=np.uint8) for n in sizes or ()]
            for held in buffers:
                if held.nbytes:
                    self.pipe.recv_bytes_into(held)
        except (EOFError, ConnectionResetError) as error:
            self.process.join(5)
            raise RuntimeError(
                f"a process that draws ahead ended, with code {self.process.exitcode}, before it had drawn step {key and key[0]}. Was it "
                'killed, for its memory perhaps? Does the script do its own work below `if __name__ == "__main__":`?'
            ) from error

        def result() -> Any:
            if sizes is not None:
                return pickle.loads(message, buffers=buffers)
            error, text = message
            raise error from _There(text)

        return result


class _Parcel:
    """A stream on its way to new processes: a pickle, and the numbers of its tensors and arrays in memory that all share."""

    def __init__(self, stream: Stream):
        try:
            self.header, buffers = packed(stream)
        except Exception as error:
            raise TypeError(
                f"expected a stream that another process can be given; {type(stream).__name__} cannot be pickled: {error}. "
                "`episodes`, `mixture`, `rows` and `quiz` make such streams; functions inside functions are none. "
                'ahead(stream, method="fork") pickles nothing.'
            ) from error
        sizes = np.array([held.nbytes for held in buffers], dtype=np.int64)
        self.ends = (-(-sizes // ALIGNED) * ALIGNED).cumsum()
        self.sizes, self.block = sizes, None
        if total := int(self.ends[-1]) if len(sizes) else 0:
            self.block = _shared(total)
            for to, held in zip(self.places(), buffers, strict=True):
                to[:] = np.frombuffer(held, dtype=np.uint8)

    def places(self) -> list[np.ndarray]:
        """The bytes of each tensor and array."""
        if self.block is None:
            return [np.empty(0, dtype=np.uint8) for _ in self.sizes]
        block, starts = self.block.numpy(), [0, *self.ends[:-1]]
        return [block[a : a + n] for a, n in zip(starts, self.sizes, strict=True)]

    def open(self) -> Any:
        """The stream, in the new process."""
        return pickle.loads(self.header, buffers=self.places())


ALIGNED = 64  # bytes: where the numbers of a tensor begin


def _shared(total: int) -> Tensor:
    """So many bytes that several processes share."""
    block = torch.empty(total, dtype=torch.uint8)
    try:
        block.share_memory_()
    except RuntimeError as error:
        raise ValueError(
            f"expected {total / 2**20:.0f} MB of shared memory for the items of the stream: {error}. Enlarge it (in a "
            'container, --shm-size), leave items on the disk (`image_folder(..., lazy=True)`), or method="fork".'
        ) from error
    return block


class _There(Exception):
    """The traceback of an error in another process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _end(workers: list[_Worker]) -> None:
    """End processes, and forget them."""
    for one in workers:
        one.pipe.close()  # who waits for a question, or writes an answer, ends by this
    for one in reversed(workers):  # with "fork" a later one holds the ends of those before
        one.process.join(0.2)
        if one.process.is_alive():
            one.process.terminate()
            one.process.join(2)
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
        one.process.close()
    workers.clear()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches no process that is started here; in this one it waits until the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(given: Any, pipe: Connection, other: Connection | None) -> None:
    """Draw what is asked for, until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if other is not None:
        other.close()
    stream, unread = given, None
    if isinstance(given, _Parcel):
        try:
            stream = given.open()
        except Exception as error:
            unread = f"{type(error).__name__}: {error}"
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            (step, tasks), dtype = pipe.recv()
            torch.set_default_dtype(dtype)
            try:
                if unread is not None:
                    raise TypeError(UNREAD.format(unread))
                draw = stream(step) if tasks is None else some_tasks(stream, step, slice(*tasks))
                header, buffers = packed(draw)
            except Exception as error:
                pipe.send((None, (_sendable(error), traceback.format_exc())))
                continue
            pipe.send(([held.nbytes for held in buffers], header))
            for held in buffers:
                if held.nbytes:
                    pipe.send_bytes(held)


UNREAD = (
    "expected a stream that another process can read, got {}. Put what it is made of into a file that can be imported, or "
    'ahead(stream, method="fork").'
)
"""What is said of a stream whose classes stand nowhere that a new process could import them from."""


def packed(draw: Any) -> tuple[bytes, list[memoryview]]:
    """A draw as a pickle, and beside it the bytes of its tensors."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, 5, buffer_callback=buffers.append).dump(draw)
    return file.getvalue(), [b.raw() for b in buffers]


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors out: they travel beside it."""

    def reducer_override(self, found: Any) -> Any:
        if type(found) is not Tensor or found.layout != torch.strided:
            return NotImplemented
        plain = found.detach().cpu().contiguous()
        held = plain.reshape(-1).view(torch.uint8).numpy()
        return tensor_of, (pickle.PickleBuffer(held.data), plain.dtype, tuple(plain.shape))


def tensor_of(held: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this dtype and shape that owns these bytes."""
    plain = torch.from_numpy(np.asarray(held))
    return plain.view(dtype).view(shape) if plain.numel() else torch.empty(shape, dtype=dtype)


def _sendable(error: Exception) -> Exception:
    """The error, or where it cannot be pickled its words."""
    try:
        again = pickle.loads(pickle.dumps(error))
        same = type(again) is type(error) and again.args == error.args
    except Exception:
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")
