"""What the pages read of the benchmarks' files, and how they time an idea: from files that are made here, and clocks that are known."""

from __future__ import annotations

import itertools
import json

import matplotlib as mpl
import pytest
import torch
from torch import nn

import mtlib.book.results
from mtlib.book import benchmarked
from mtlib.book.benchmarked import (
    NOTHING,
    cases,
    columns,
    discrepancy,
    fastest,
    gain,
    in_turns,
    megabytes,
    minutes,
    origins,
    plainly,
    ratios,
    reached,
    reference,
    reports,
    shapes,
    shown,
    spent_by_kind,
    straight,
    swapped,
    told,
    told_memory,
    told_pages,
    told_processes,
    told_shares,
    told_training,
)
from mtlib.nets import ChannelsLast, conv4
from mtlib.norm import Norm
from mtlib.plots import figure
from mtlib.run.fast import plain

pytestmark = pytest.mark.fast
mpl.use("Agg")


def row(ratio, off=1e-15):
    return {
        "ratio": ratio,
        "ratio quartiles": [0.9 * ratio, 1.1 * ratio],
        "floors": 3.0,
        "float64 discrepancy": off,
    }


def times(**rows):
    """A file of times with one workload; ratios by implementation, of which the fastest peer's is 1."""
    found = {name.replace("_", ", "): row(ratio) for name, ratio in rows.items()}
    what = {"workload": {"what": "curves"}, "fastest peer": "torchopt", "implementations": found}
    return {"workloads": {"W1, 5 steps": what}}


ALL = {"cpu": times(mtlib=0.9, mtlib_compiled=1.5, torchopt=1.0, JAX=3.0)}


def test_a_kind_is_read_by_its_key_and_trials_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(mtlib.book.results, "FOLDER", tmp_path)
    assert reports("workloads") == {}
    (tmp_path / "benchmarks").mkdir()
    files = {"b": {"pages": {}}, "a": {"pages": {}}, "t": {"pages": {}, "setting": {"small": True}}}
    for name, content in {**files, "c": {"tables": {}}}.items():
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(content), "utf8")
    assert list(reports("pages")) == ["a", "b"]
    assert list(reports("tables")) == ["c"]


def test_the_committed_files_are_of_kinds_that_somebody_reads():
    kinds = ("workloads", "training", "methods", "columns", "processes", "tables", "kinds", "pages")
    read = {name for kind in kinds for name in reports(kind)}
    folder = mtlib.book.results.FOLDER / "benchmarks"
    assert read == {path.stem for path in folder.glob("*.json")}


def test_what_is_said_of_cases_is_what_their_ratios_say():
    (case,) = cases(ALL)
    assert (case.default, case.best) == (0.9, 1.5)
    assert case.ahead() == {"JAX": 2.0} and case.ahead(others=["JAX"]) == {}
    said = told([case])
    assert said["faster"], said["workloads"] == ("0", "1")
    assert said["behind"] == "W1, 5 steps (0.90)"
    assert said["ahead"] == "JAX, 2.0 times as fast on W1, 5 steps"
    assert case.cells()["compiled"] == "1.50" and shapes([case]) == {"W1": ["curves"]}


def test_with_several_files_a_name_says_its_device():
    named = cases({**ALL, "gpu": times(mtlib=2.0, torchopt=1.0)})
    assert [c.name for c in named] == ["W1, 5 steps, cpu", "W1, 5 steps, gpu"]
    assert told(named)["most"] == "2.00 (W1, 5 steps, gpu)"
    assert named[1].cells()["compiled"] == ""


def test_a_workload_of_which_mtlib_has_one_way_with_an_argument():
    (case,) = cases({"cpu": times(mtlib_compiled=1.2, torchopt=1.0)})
    assert case.default == case.best == 1.2


def test_a_peer_with_a_wrong_gradient_is_named_and_has_no_time():
    report = times(mtlib=1.0, higher=1.0)
    report["workloads"]["W1, 5 steps"]["wrong"] = {"JAX": 4.3e-3, "other": None}
    assert told(cases({"cpu": report}))["untimed"] == (
        "JAX on W1, 5 steps (off by 4e-03); other on W1, 5 steps (off by no finite number)"
    )
    assert told(cases(ALL))["untimed"] == "nobody"


def test_the_largest_distance_counts():
    report = times(mtlib=1.0, mtlib_compiled=1.0, higher=1.0)
    rows = report["workloads"]["W1, 5 steps"]["implementations"]
    rows["mtlib, compiled"], rows["higher"] = row(1.0, 1e-6), row(1.0, 1.0)
    assert discrepancy(cases({"cpu": report})) == 1e-6
    assert discrepancy([]) == 0.0


def test_the_figure_has_a_mark_for_each_row_and_the_peer_at_one():
    with figure() as (_, axes):
        ratios(axes, cases(ALL))
        marks = {c.get_label(): float(c.lines[0].get_xdata()[0]) for c in axes.containers}
        assert marks == {"mtlib": 0.9, "mtlib, compiled": 1.5, "torchopt": 1.0, "JAX": 3.0}
        assert axes.get_xscale() == "log"
    with figure() as (_, axes):
        ratios(axes, [])


def test_where_nothing_is_recorded_every_sentence_says_so(capsys):
    assert set(told([]).values()) <= {NOTHING, "0", "0e+00"}
    assert set(told_pages({}).values()) == set(told_processes({}).values()) == {NOTHING}
    assert told_training({}) == NOTHING
    assert not (origins({}) or reached({}) or columns({}) or minutes({}))
    shown({}, corner="record")
    assert capsys.readouterr().out == f"record: {NOTHING}\n"


def race(**seconds):
    """A file of a race to a target within 60 s; names have "_" for ", "."""
    runs = {
        name.replace("_", ", ").replace("own", "our recipe"): {
            "seconds": s,
            "steps": 1200,
            "test": 0.951,
        }
        for name, s in seconds.items()
    }
    return {"x": {"setting": {"limit": 60}, "training": {"MAML": runs}}}


def test_training_is_told_with_its_limit():
    files = race(theirs_torch=None, theirs_mtlib=58.0, own_torch=42.8, own_mtlib=21.4)
    assert told_training(files) == (
        "MAML 21 s, in torch alone over 60 s by theirs and 43 s by the same recipe"
    )
    assert told_shares(files) == (
        "MAML: our recipe in the place of theirs brought at least 1.4 times the speed, "
        "and mtlib in the place of torch brought 2.0 times the speed"
    )
    last = {"seconds": "21", "steps": "1,200", "test, %": "95.1"}
    assert reached(files)["MAML, our recipe, mtlib"] == last


def test_a_training_that_did_not_arrive_is_no_gain():
    files = race(theirs_torch=50.0, own_torch=None, own_mtlib=None)
    assert told_training(files).startswith("MAML over 60 s, in torch alone 50 s by theirs")
    assert "theirs was slower" in told_shares(files)
    assert "did not arrive in time, either" in told_shares(files)
    assert told_shares({}) == ""


def test_columns_minutes_memory_pages_and_processes():
    cell = {"mean": 0.981, "seeds": 0.002, "runs": {}}
    files = {"x": {"columns": {"MAML": {"5-way 1-shot": cell, "20": {**cell, "seeds": None}}}}}
    assert columns(files) == {"MAML": {"5-way 1-shot": "98.1 ± 0.2", "20": "98.1"}}
    run = {"accuracy": 0.96, "episodes": 0.004, "steps": 1500, "seconds": 60.2}
    other = {**run, "accuracy": 0.97, "steps": 1600}
    methods = {"MAML": {"0": run}, "ProtoNet": {"0": run, "1": other}}
    found = minutes({"x": {"methods": methods}})
    one = {"accuracy, %": "96.0", "seeds": "1", "steps": "1,500", "seconds": "60"}
    assert found["MAML"] == one
    assert found["ProtoNet"] == {  # Student's t for one degree of freedom: 12.7 · 0.5
        "accuracy, %": "96.5 ± 6.4",
        "seeds": "2",
        "steps": "1,550",
        "seconds": "60",
    }
    held = {"tables": {"steps": {"mtlib": {"1": {"grown": 19e6}, "2": {"grown": 25e6}}}}}
    assert megabytes(held, "steps") == {"mtlib": {"1": "19", "2": "25"}}
    assert told_memory({"x": held}) == told_memory({}) == NOTHING
    held["tables"]["steps"]["higher"] = {"1": {"grown": 19e6}, "2": {"grown": 75e6}}
    assert told_memory({"x": held}) == "for 2 steps higher took 3.0 times as much"
    pages = {"pages": {"book/a": 30.0, "book/b": 90.0, "book/c": 60.0}, "jobs": 2}
    assert told_pages({"x": pages}) == {"pages": "3", "total": "3", "jobs": "2"}
    rows = {
        p: {"imports": 2.0, "the rest": r, "in all": r + 2}
        for p, r in zip("ab", (8.0, 6.0), strict=True)
    }
    by_kind = spent_by_kind({"kinds": rows}, 1)
    assert by_kind["a"] == {"imports": "2", "the rest": "8", "in all": "10"}
    assert by_kind["all 2 pages"] == {"imports": "4", "the rest": "14", "in all": "18"}
    assert len(by_kind) == 2
    two = {"processes": {"two": {"median": 1.871}, "apart": {"median": 1.95}}, "exchange": 0.012}
    assert told_processes({"x": two}) == {"two": "1.87", "apart": "1.95", "exchange": "1.2"}


def test_where_a_file_comes_from_stands_in_its_column():
    made = {
        "date": "2026-11-24",
        "commit": "d76f70ca0f1d",
        "versions": {"torch": "2.13", "jax": "0.10"},
    }
    ceilings = {"peak GFLOP/s": 1234.5, "peak GB/s": 21.6}
    setting = {"threads": 2, "repeats": 7, "absent": ["JAX"], **ceilings}
    whole = {"provenance": made, "setting": setting}
    rows = origins({"cpu": whole, "bare": {}})
    assert rows["commit"] == {"cpu": "d76f70c", "bare": ""}
    assert rows["versions"]["cpu"] == "torch 2.13, jax 0.10"
    assert rows["not installed"] == {"cpu": "JAX", "bare": ""}
    assert list(rows["rounds"].values()) == ["7", ""]
    assert rows["ceilings"] == {"cpu": "1,234 GFLOP/s, 22 GB/s", "bare": ""}


# Ideas -----------------------------------------------------------------------------------------


def test_the_reference_runs_in_one_room_alone_and_is_over_afterwards():
    import mtlib.norm

    with reference("nets"):
        assert mtlib.nets.plain() and not mtlib.norm.plain() and not plain()
    with reference():
        assert plain()
    assert not (mtlib.nets.plain() or plain())


def test_plainly_is_the_same_function_by_the_reference():
    x = torch.rand(2, 1, 16, 16)
    laid = plainly(lambda: lambda: ChannelsLast()(x).stride(), "nets")
    assert laid()() == x.stride() != ChannelsLast()(x).stride()


def test_layers_of_a_kind_are_swapped():
    net = swapped(conv4(5, width=4, size=16), Norm, lambda n: nn.GroupNorm(2, len(n.weight)))
    kinds = [type(m) for m in net.modules()]
    assert Norm not in kinds and kinds.count(nn.GroupNorm) == 4


def test_ways_take_turns_forwards_and_backwards_and_the_first_round_does_not_count(monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr(benchmarked.time, "perf_counter", lambda: clock[0])
    waits = {"a": itertools.chain([100], itertools.repeat(1)), "b": itertools.cycle([3])}

    def call(name):
        turns.append(name)
        clock[0] += next(waits[name])

    spent = in_turns({n: lambda n=n: call(n) for n in "ab"}, rounds=3)
    assert spent == {"a": 1, "b": 3}
    assert "".join(turns) == "baabbaab"


def test_the_fastest_call_counts(monkeypatch):
    clock, waits = [0.0], iter([9, 5, 9, 2, 9, 7])
    monkeypatch.setattr(benchmarked.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += next(waits)

    assert fastest(call, 3) == 2


def test_a_gain_is_of_equal_gradients_or_none():
    def way(factor):
        return lambda dtype: (
            lambda: (torch.ones((), dtype=dtype), {"w": factor * torch.ones(3, dtype=dtype)})
        )

    found = gain("nothing", way(1.0), way(1.0), 1)
    assert found.factor == found.slow / found.fast > 0
    assert set(found.cells()) == {"with, ms", "without, ms", "times as fast"}
    with pytest.raises(AssertionError, match="wrong"):
        gain("wrong", way(1.0), way(1 + 1e-9), 1)


def test_a_line_has_its_slope_and_a_curve_has_none():
    assert straight([1, 2, 5], [3.0, 5.0, 11.0]) == 2
    with pytest.raises(AssertionError, match="straight"):
        straight([1, 2, 3], [1.0, 4.0, 9.0])
