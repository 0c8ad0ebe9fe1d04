"""What all readers of files share: a limit on size, strict numbers, and one kind of error."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = 2**26
"""No file, and no member of an archive, may hold more bytes than these: 64 MiB."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@contextmanager
def parsing(path: Path | str, kind: str) -> Iterator[None]:
    """Whatever goes wrong in the block becomes ValueError: `path` is not `kind`, and why.

    What the machine has to say about a file stays as it is: that there is none, or that it may not be read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        why = f"it has no {error.args[0]!r}" if type(error) is KeyError and error.args else why
        raise ValueError(f"{path} is not {kind}: {why}") from error


def content(path: Path, most: int = MOST) -> bytes:
    """The bytes of a file. Raises ValueError for one of more than `most` bytes, which is not read."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"expected at most {most:,} bytes")
    return data


def whole(text: str, low: int, high: int, what: str) -> int:
    """A whole number from `low` to `high`, in digits. Raises ValueError otherwise, and names `what` it should be."""
    if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"expected {what} to be a whole number from {low} to {high}, got {text!r}")
    return int(text)


def number(text: str, low: float, high: float, what: str) -> float:
    """A number from `low` to `high`, in digits. Raises ValueError otherwise, and names `what` it should be."""
    if not _NUMBER.fullmatch(text) or not low <= float(text) <= high:
        raise ValueError(f"expected {what} to be a number from {low:g} to {high:g}, got {text!r}")
    return float(text)
