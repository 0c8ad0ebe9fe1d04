"""One progress bar for everything that takes long: plain tqdm, silent if MTLIB_PROGRESS=0."""

from __future__ import annotations

import threading
from numbers import Real
from typing import Any

from tqdm import tqdm

from mtlib.run.switches import is_on


class Bar(tqdm):  # type: ignore[misc]
    """tqdm with a lock that Ctrl-C cannot leave closed: its own is taken in several steps, and the next bar waits for good."""


Bar.set_lock(threading.RLock())


def bar(total: int | None, label: str, show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on standard error. The book's build and the tests set MTLIB_PROGRESS=0."""
    if not (total is None or (isinstance(total, Real) and total >= 0)):
        raise ValueError(f"expected the total to be a number of at least 0, or None, got {total!r}")
    hidden = not (show and is_on("MTLIB_PROGRESS", default=True))
    return Bar(total=total, desc=label, disable=hidden, leave=False, **options)
