"""What tests of pages share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def small(monkeypatch):
    """The small scale without a record, on one thread: networks this small gain nothing from a second one."""
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_RECORD", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fast(request, monkeypatch):
    """Tests of the fast paths themselves, marked `fast`, keep them where MTLIB_PLAIN=1 runs the rest without."""
    if request.node.get_closest_marker("fast"):
        monkeypatch.delenv("MTLIB_PLAIN", raising=False)
