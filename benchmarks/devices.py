"""The devices of the benchmarks: a CPU, a GPU, or the one that the tests call second."""

from __future__ import annotations

import sys
from pathlib import Path

SECOND = Path(__file__).resolve().parents[1] / "tests" / "second_device"


def loaded(device: str) -> str:
    """The device's name, once torch knows it: "second" is made by the tests' own backend, which stays in this process."""
    if device != "second":
        return device
    sys.path.append(str(SECOND))
    from device import name

    return name()
