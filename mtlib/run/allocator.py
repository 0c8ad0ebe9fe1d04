"""One setting of the C library's allocator, only for those who call it."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep the memory that tensors free, and hand it out again; True if the setting was accepted.

    glibc gives blocks above 32 MB back to the system as they are freed, and fetches fresh, zeroed pages for the next
    tensor: with images of 84×84 that is a good part of a step. After this call the process keeps what it freed, for
    the rest of its life, and its resident memory stays at its peak. As this affects the whole process, mtlib never
    calls it by itself; with other C libraries it does nothing and returns False. The same without code:
    `MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (M_MMAP_THRESHOLD, 1 << 30),
        (M_TRIM_THRESHOLD, (1 << 31) - 1),
        (M_TOP_PAD, 64 << 20),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)
