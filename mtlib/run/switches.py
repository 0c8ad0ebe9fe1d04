"""Settings from the environment, which refuse what they do not know: `MTLIB_OFFLINE=true` must not go online."""

from __future__ import annotations

import os


def is_on(name: str, default: bool = False) -> bool:
    """Whether the variable `name` is "1"; "0" is off, and unset or empty is the default. Raises ValueError otherwise."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"expected {name} to be 0 or 1, got {value!r}")
    return value == "1" if value else default
