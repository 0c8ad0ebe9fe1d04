"""The allocator's setting does what it says: large tensors come from memory that was freed, not from fresh pages."""

from __future__ import annotations

import platform

import pytest
from machine import printed

SCRIPT = """
import resource, sys, torch
from mtlib.run.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(16 << 20)  # 64 MB
before = faults()
for _ in range(30):
    torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_and_used_again():
    kept, given_back = (int(printed("-c", SCRIPT, way)) for way in ("keep", "leave"))
    assert (
        kept <= 100
    )  # page faults; a fresh tensor of 64 MB takes 16,384 pages of 4 kB, or 32 huge ones
    assert given_back >= 10 * max(kept, 1)
