"""A tenth of every attack in `tools/attack.py`; hostile files have a test of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import attack

ATTACKS = {
    "kills": lambda: attack.kills(10),
    "flipped bits": lambda: attack.flips(20),
    "two writers": lambda: attack.writers(2),
    "interrupts": lambda: attack.interrupts(300),
    "threads": lambda: attack.threads(2),
}


# Ctrl-C in a destructor is one that Python itself cannot pass on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_gives_way(name):
    result = ATTACKS[name]()
    assert result.made > 0 and result.failed == 0, result
