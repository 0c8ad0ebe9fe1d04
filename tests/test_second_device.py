"""The package on a device that is not the CPU. What holds there is in `second_device/laws.py`, run in another process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from machine import ROOT

NOTHING_RAN = 5  # pytest's exit status


def test_the_laws_hold_on_a_device_that_is_not_the_cpu():
    """The device stays in the process that loads it."""
    laws = ROOT / "tests" / "second_device" / "laws.py"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", str(laws)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == NOTHING_RAN:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
