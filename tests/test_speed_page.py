"""The page on speed: a fast path that is wrong, and a record that is worse than it says, stop it."""

from __future__ import annotations

import json

import pytest
from pages import run_until

import mtlib.bilevel
import mtlib.book.results
import mtlib.nets
import mtlib.norm
import mtlib.run.fast
from mtlib.book.benchmarked import told
from mtlib.norm import _Twice

pytestmark = pytest.mark.fast


def wrong_second_derivative(patch):
    right = _Twice.forward
    patch.setattr(_Twice, "forward", staticmethod(lambda *a: tuple(1.01 * t for t in right(*a))))


def wrong_layout(patch):
    relaid = mtlib.nets._Relaid.apply
    patch.setattr(mtlib.nets._Relaid, "apply", lambda x: relaid(x.transpose(2, 3)))


def wrong_stacking(patch):
    """Each task gets the mean of all tasks' gradients."""
    right = mtlib.run.fast.way_to_autograd

    def way():
        found = right()
        if found is None or not mtlib.run.fast.vmapping():
            return found
        down, up = found
        return down, lambda v: up(v.mean(0, keepdim=True).expand_as(v))

    patch.setattr(mtlib.run.fast, "way_to_autograd", way)


BROKEN = {  # what is broken -> names of the last cell that still runs, and of the one that stops
    wrong_layout: ("curves", "gains"),
    wrong_second_derivative: ("curves", "gains"),
    wrong_stacking: ("gains", "four"),
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_a_fast_path_that_is_wrong_stops_the_page(small, breaks):
    breaks(small)
    before, there = BROKEN[breaks]
    run_until("speed", before)
    with pytest.raises(AssertionError):
        run_until("speed", there)


def test_a_checkpoint_that_loses_a_step_is_seen(small):
    """Steps count as constants: the gradient of first order, under the name of the exact one."""

    def forgets(f, at):
        phi, (theta, state) = at
        moved, state = f((phi, ({k: v.detach() for k, v in theta.items()}, state)))
        return {k: theta[k] + (moved[k] - theta[k]).detach() for k in moved}, state

    small.setattr(mtlib.bilevel, "replay", forgets)
    with pytest.raises(AssertionError):
        run_until("speed", "share")


# What is recorded ----------------------------------------------------------------------------


def report(ratio=1.5, discrepancy=1e-15, device="cpu-avx512", trial=False, compiled=None):
    """A file of benchmarks/meta_gradient.py, with one workload."""

    def row(ratio, off):
        return {
            "median": 0.01,
            "quartiles": [0.009, 0.011],
            "ratio": ratio,
            "ratio quartiles": [0.9 * ratio, 1.1 * ratio],
            "floors": 3.0,
            "float64 discrepancy": off,
        }

    setting = {"device": device, "threads": 2, "small": trial, "dtype": "float32", "repeats": 3}
    rows = {"mtlib": row(ratio, discrepancy), "torch by hand": row(1.0, 0.0)}
    if compiled:
        rows["mtlib, compiled"] = row(compiled, discrepancy)
    return {
        "setting": {**setting, "warm-up": 2},
        "workloads": {
            "W1": {
                "workload": {"what": "curves"},
                "fastest peer": "torch by hand",
                "implementations": rows,
            }
        },
        "provenance": mtlib.book.results.provenance(),
    }


@pytest.fixture
def recorded(small, tmp_path):
    """`recorded(name=report)` -> the page's variables once it has read these files and no others."""

    def read(**files):
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        for name, content in files.items():
            (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(content), "utf8")
        return run_until("speed", "spent")

    small.setattr(mtlib.book.results, "FOLDER", tmp_path)
    return read


def test_the_page_reads_what_is_there(recorded, capsys):
    page = recorded(
        cpu=report(),
        trial=report(discrepancy=1.0, trial=True),
        gpu=report(2.0, device="nvidia"),
        book={"pages": {"book/a": 1.0}, "jobs": 2, "provenance": {}},
    )
    assert list(page["TIMES"]) == ["cpu", "gpu"] and list(page["PAGES"]) == ["book"]
    assert [c.name for c in page["CASES"]] == ["W1, cpu", "W1, gpu"]


def test_the_page_says_where_nothing_is_recorded(recorded, capsys):
    assert not recorded()["CASES"]
    assert "record: (nothing is recorded yet)" in capsys.readouterr().out


def test_a_recorded_gradient_that_is_off_stops_the_page(recorded):
    with pytest.raises(AssertionError, match="to 1e-9"):
        recorded(cpu=report(discrepancy=1e-6))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_a_recorded_time_behind_a_peer_in_torch_stops_the_page(recorded, monkeypatch, scale):
    monkeypatch.setenv("MTLIB_SCALE", scale)
    with pytest.raises(AssertionError, match="no slower than every peer in torch"):
        recorded(cpu=report(ratio=0.9))


def test_a_default_behind_a_peer_is_named_where_the_compiled_way_is_not(recorded):
    page = recorded(cpu=report(ratio=0.9, compiled=2.0), gpu=report())
    said = told(page["CASES"])
    assert said["behind"] == "W1, cpu (0.90)" and said["faster"] == "1"
    assert {c.name: c.best for c in page["CASES"]} == {"W1, cpu": 2.0, "W1, gpu": 1.5}


def test_a_peer_that_is_not_torchs_may_win_and_is_named(recorded):
    held = report()
    rows = held["workloads"]["W1"]["implementations"]
    rows["JAX"] = {**rows["mtlib"], "ratio": 3.0}
    page = recorded(cpu=held)
    assert told(page["CASES"])["ahead"] == "JAX, 2.0 times as fast on W1"
