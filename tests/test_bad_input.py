"""What is wrong with it, what was expected, what to do: for each kind of bad input, from our own code."""

from __future__ import annotations

import pytest
from bad_inputs import BAD, OPEN, fault

from mtlib.book.page import is_full


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Without a network, in an empty folder, at the full scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_SCALE", raising=False)
    monkeypatch.delenv("MTLIB_RECORD", raising=False)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_by_our_own_code(name):
    found = fault(name)
    if found and name in OPEN:
        pytest.xfail(f"{OPEN[name]}: {found}")
    assert not found, found


def test_an_unknown_scale_is_named(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "medium")
    with pytest.raises(ValueError, match="medium"):
        is_full()


def test_what_is_open_is_in_the_table():
    assert set(OPEN) <= set(BAD)
