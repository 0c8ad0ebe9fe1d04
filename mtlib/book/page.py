"""What a page of the book needs besides mathematics: its scale, its device, and claims that can fail."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

try:
    from IPython.display import Markdown, display
except ModuleNotFoundError as missing:
    get = 'pip install "mtlib-book[pages] @ git+https://github.com/OWNER/mtlib-book@main"'
    raise ModuleNotFoundError(f"{missing}, which pages need: {get}") from missing

T = TypeVar("T")


def is_full() -> bool:
    """True unless MTLIB_SCALE=small: the tests run every page small, the book and a reader run it full."""
    chosen = os.environ.get("MTLIB_SCALE", "full")
    if chosen not in ("small", "full"):
        raise ValueError(f'expected MTLIB_SCALE to be "small" or "full", got {chosen!r}')
    return chosen == "full"


def scale(small: T, full: T) -> T:
    """One setting of a page at its two scales. With a GPU, raise `full` in the page: that is the switch."""
    return full if is_full() else small


def device() -> torch.device:
    """CUDA whenever there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def claim(text: str, holds: bool) -> None:
    """State a claim; at the full scale a claim that does not hold stops the page."""
    if not is_full():
        print(f"not judged at the small scale: {text}")
        return
    if not bool(holds):
        raise AssertionError(f"the claim fails: {text}")
    print(f"holds: {text}")


def glue(name: str, value: Any, form: str = "") -> None:
    """Keep a computed value for the prose, which shows it with the `glue` role.

    What `myst_nb.glue` writes, through IPython alone, so that pages also run where MyST-NB is absent.
    """
    text = format(value, form)
    meta = {"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}}
    display({"application/papermill.record/text/plain": text}, metadata=meta, raw=True)


def source(*functions: Callable[..., Any]) -> None:
    """Show functions as they stand in the package, so that no page retypes them."""
    text = "\n\n\n".join(inspect.getsource(f).rstrip() for f in functions)
    display(Markdown(f"```python\n{text}\n```"))
