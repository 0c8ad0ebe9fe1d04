"""What is wrong with it, what was expected, what to do: for each kind of bad input, from our own code."""

from __future__ import annotations

import re
import traceback

import pytest
from bad_inputs import BAD, OPEN

from mtlib.book.page import is_full
from mtlib.train import Diverged


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Without a network, in an empty folder, at the full scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.delenv("MTLIB_SCALE", raising=False)


@pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=pytest.mark.xfail(reason=OPEN[k])) if k in OPEN else k for k in BAD],
)
def test_bad_input_is_named_by_our_own_code(name):
    call, expected = BAD[name]
    if callable(expected):
        assert expected(call())
        return
    with pytest.raises((ValueError, TypeError, Warning, Diverged), match=expected) as caught:
        call()
    assert re.search("expect|cannot read|damaged|NaN or infinite", str(caught.value)), "Python's words"
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "mtlib" in last and "site-packages" not in last


def test_an_unknown_scale_is_named(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "medium")
    with pytest.raises(ValueError, match="medium"):
        is_full()


def test_what_is_open_is_in_the_table():
    assert set(OPEN) <= set(BAD)
