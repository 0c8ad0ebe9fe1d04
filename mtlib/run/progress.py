"""One progress bar for everything that takes long: plain tqdm, silent if MTLIB_PROGRESS=0."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def bar(total: int | None, label: str, show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on standard error. The book's build and the tests set MTLIB_PROGRESS=0."""
    hidden = not show or os.environ.get("MTLIB_PROGRESS") == "0"
    return tqdm(total=total, desc=label, disable=hidden, leave=False, **options)
