"""What several tests begin with."""

from __future__ import annotations

import sys

import pytest
import torch
from browser import browser, built, paper, phone, site, tab  # noqa: F401 - fixtures of test_*_built.py
from hypothesis import settings
from pages import at_small_scale

from mtlib.data import download, omniglot

# The same examples each time, and no time limit for one of them on a busy machine.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("tests")


@pytest.fixture
def small(monkeypatch):
    with at_small_scale(monkeypatch) as patch:
        yield patch


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with an empty cache, and neither a data folder nor another network than this machine's."""
    for name in ("MTLIB_DATA", "MTLIB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for place in (download, omniglot):
        monkeypatch.setattr(place, "cache", lambda: tmp_path / "cache")
    return tmp_path


@pytest.fixture
def offline(home, monkeypatch):
    """The same on a machine without a network."""
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    return home


@pytest.fixture
def full(tmp_path, monkeypatch):
    """The full scale, with a folder of records and a cache of its own, at a commit that is clean."""
    from mtlib.book import contest, results

    monkeypatch.setenv("MTLIB_SCALE", "full")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "records")
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(contest, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    return tmp_path


@pytest.fixture
def no_kernel(monkeypatch):
    """A row of linear layers goes the way of all other networks, whose rounding is another than that of the gradient in C."""
    monkeypatch.setattr("mtlib.run.unroll._kernel", lambda dtype: None)


@pytest.fixture(autouse=True)
def _fast(request, monkeypatch):
    """Tests of the fast paths themselves, marked `fast`, keep them where MTLIB_PLAIN=1 runs the rest without."""
    if request.node.get_closest_marker("fast"):
        monkeypatch.delenv("MTLIB_PLAIN", raising=False)


@pytest.fixture(autouse=True)
def _gradients_left_on():
    """A test that leaves gradients off would make another one fail, far from here."""
    yield
    on = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert on, "this test left torch's gradients off"


@pytest.fixture(autouse=True)
def _no_figure_left():
    """Matplotlib warns at the 21st open figure, whichever tests opened the others."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def shown(monkeypatch):
    """The figures that are shown, open until the test ends."""
    import matplotlib.pyplot as plt

    found = []
    monkeypatch.setattr(plt, "show", lambda: found.append(plt.gcf()))
    return found
