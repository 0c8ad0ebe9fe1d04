"""Tasks on threads: where one task's operations are too small to keep every core busy, each core takes a task.

torch splits one operation over its threads; here each of several threads runs whole tasks, with its share of torch's
threads for each operation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch

from mtlib.run.copies import evaluating, is_evaluating
from mtlib.tasks import positive

RANDOM = threading.RLock()
"""Held by who sets torch's random state and needs it to stay: all threads share one generator."""

Share = Callable[[Callable[[Sequence[int]], Any], Sequence[int], int], list[Any]]
"""`share(f, items, workers)` -> [f(block), …]: the items in contiguous blocks, one per worker."""


def sharing() -> Share:
    """A `share` that stays on one thread, for good, once `f` has failed or drawn random numbers on several.

    torch has one generator for all threads, and the order of their draws would be chance: the state before them is put
    back, and `f` runs anew.
    """
    alone = False

    def share(f: Callable[[Sequence[int]], Any], items: Sequence[int], workers: int) -> list[Any]:
        nonlocal alone
        if workers < 2 or alone:
            return [f(items)]
        each = -(-len(items) // workers)
        blocks = [items[a : a + each] for a in range(0, len(items), each)]
        with RANDOM:
            before = torch.get_rng_state()
            try:
                results = on_threads([partial(f, block) for block in blocks], workers)
            except Exception:  # on one thread it comes again, if it was not for the threads
                alone = True
            alone = alone or not torch.equal(before, torch.get_rng_state())
            if alone:
                torch.set_rng_state(before)
                return [f(items)]
        return results

    return share


def on_threads(calls: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """The results of `calls` in their order, each on one of `workers` threads; an error in one is raised here.

    Gradients are as enabled there as in the thread that asks, and networks in its mode.
    """
    positive(workers=workers)
    if not isinstance(calls, Sequence) or not all(map(callable, calls)):
        raise TypeError(
            "expected functions to call, without arguments, in a list, got something else"
        )
    grad, evaluation = torch.is_grad_enabled(), is_evaluating()

    def run(call: Callable[[], Any]) -> Any:
        with torch.set_grad_enabled(grad), evaluating(evaluation):
            return call()

    pool = _pool(os.getpid(), workers, torch.get_num_threads())
    futures = [pool.submit(run, call) for call in calls]
    try:
        for future in futures:
            future.exception()  # all of them are done before one's error is raised
    except BaseException:  # Ctrl-C: these workers go on for a while, the next call has others
        for future in futures:
            future.cancel()
        _pool.cache_clear()
        raise
    return [future.result() for future in futures]


@cache
def _pool(process: int, workers: int, threads: int) -> ThreadPoolExecutor:
    """Workers with threads // workers of torch's threads each, kept for the next call; torch's own setting stays."""
    ready = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(max(1, threads // workers))
        torch.get_num_threads()  # the first look would otherwise come later, and take the setting of then
        ready.wait()

    pool = ThreadPoolExecutor(workers, "mtlib-tasks", begin)
    for _ in range(workers):
        pool.submit(lambda: None)
    try:
        ready.wait()
    except BaseException:  # Ctrl-C: let the workers go, too
        ready.abort()
        raise
    torch.set_num_threads(threads)  # the last setting is what a new thread begins with
    return pool
