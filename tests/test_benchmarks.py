"""The benchmarks run, what they time reaches the same end, and a wrong gradient stops them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from machine import ROOT, printed


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks can be imported, and run on one thread."""
    pytest.importorskip("higher")
    pytest.importorskip("torchopt")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def report(script, *options):
    """What a benchmark prints when it runs alone."""
    return json.loads(printed(f"benchmarks/{script}", *options, cwd=ROOT))


def test_the_probes_objective_is_no_worse_than_that_of_epochs():
    found = report(
        "linear_probe.py", "--images", "40", "--epochs", "3", "--repeats", "1", "--batch", "20"
    )
    assert found["objective"]["probe"] <= found["objective"]["epochs"]
    assert min(found["seconds"].values()) > 0
    assert found["setting"]["images"] == 40 and found["provenance"]["versions"]["torch"]


# The meta-gradient ---------------------------------------------------------------------------


def test_every_implementation_of_every_workload_agrees_and_is_timed(benchmarks):
    from peers import implementations
    from workloads import workloads

    found = report("meta_gradient.py", "--small", "--repeats", "2", "--threads", "1")
    assert list(found["workloads"]) == list(workloads())
    for name, work in workloads().items():
        result = found["workloads"][name]
        rows = result["implementations"]
        assert list(rows) == list(implementations(work))
        assert rows[result["fastest peer"]]["ratio"] == 1
        assert not result["fastest peer"].startswith("mtlib") and result["floor"] > 0
        for row in rows.values():
            assert row["float64 discrepancy"] <= 1e-9
            assert 0 < row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
            assert row["ratio"] > 0 and row["floors"] > 0
    assert found["setting"]["threads"] == 1 and found["setting"]["peak GFLOP/s"] > 0
    assert {"torch", "higher", "torchopt"} <= set(found["provenance"]["versions"])


def test_a_wrong_gradient_is_named_and_nothing_is_timed(benchmarks):
    from meta_gradient import Disagreement, check
    from peers import HAND, by_hand, ours
    from workloads import small, workloads

    def wrong(case):
        run = by_hand(case)
        return lambda: [1.001 * g for g in run()]

    work = small(workloads()["W2, second order"])
    with pytest.raises(Disagreement, match=f"'scaled' and '{HAND}' differ by 1.0e-03"):
        check(work, {"mtlib": ours(), HAND: by_hand, "scaled": wrong})


def test_a_gradient_that_is_not_finite_is_wrong(benchmarks):
    from meta_gradient import Disagreement, check
    from peers import HAND, by_hand
    from workloads import small, workloads

    def broken(case):
        run = by_hand(case)
        return lambda: [g * torch.nan for g in run()]

    with pytest.raises(Disagreement, match="broken"):
        check(small(workloads()["W1, 1 step"]), {HAND: by_hand, "broken": broken})


def test_first_order_is_another_gradient(benchmarks):
    """Or the rows of the two orders would say the same."""
    from meta_gradient import flat
    from peers import by_hand
    from workloads import case, small, workloads

    a, b = (
        flat(by_hand(case(small(workloads()[f"W2, {order} order"]), dtype=torch.float64))())
        for order in ("first", "second")
    )
    assert (a - b).norm() / b.norm() > 1e-3


def test_a_device_other_than_the_cpu_is_waited_for(benchmarks, monkeypatch):
    """No such device is needed: what is waited for is replaced by a count."""
    import meta_gradient
    from workloads import workloads

    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    seconds = meta_gradient.clock(lambda: waits.append("run"), "cuda")
    assert waits == ["wait", "run", "wait"] and seconds > 0
    meta_gradient.clock(lambda: waits.append("run"), "cpu")
    assert len(waits) == 4
    assert workloads("cuda")["W2, second order"].tasks == 32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert meta_gradient.slug("cuda") == "nvidia-h100-80gb-hbm3"


def test_a_result_is_kept_under_its_device(benchmarks, monkeypatch, tmp_path):
    import meta_gradient

    monkeypatch.setattr(meta_gradient, "FOLDER", tmp_path)
    options = ["--only", "W5", "--small", "--repeats", "2", "--threads", "1", "--write"]
    monkeypatch.setattr(sys, "argv", ["meta_gradient.py", *options])
    meta_gradient.main()
    (path,) = (tmp_path / "benchmarks").iterdir()
    assert path.name == f"{meta_gradient.slug('cpu')}-1-threads.json"
    assert list(json.loads(path.read_text("utf8"))["workloads"]) == ["W5"]


def test_an_unknown_workload_is_refused(benchmarks):
    from meta_gradient import suite

    with pytest.raises(SystemExit, match="W9"):
        suite("cpu", 2, ["W9"], True)


def test_what_is_compiled_takes_part_where_torch_compiles(benchmarks, monkeypatch):
    from meta_gradient import compiles
    from peers import implementations
    from workloads import workloads

    compiled = [
        name for name, w in workloads().items() if "mtlib, compiled" in implementations(w, True)
    ]
    assert compiled == ["W1, 1 step", "W1, 5 steps"]

    def broken(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compiles("cpu")


# Memory --------------------------------------------------------------------------------------


def test_memory_is_measured_in_a_fresh_process(benchmarks, monkeypatch, capsys):
    import memory

    options = ["--small", "--only", "episodes", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    memory.main()
    found = json.loads(capsys.readouterr().out)
    row = found["tables"]["episodes"]["mtlib"]["2"]
    assert row["grown"] >= 0 and row["counted"] > 0 and row["seconds"] > 0


def test_every_line_of_the_memory_tables_runs(benchmarks):
    from memory import TABLES, Configuration, measure

    for table in TABLES:
        for name in TABLES[table]:
            row = measure(Configuration(table, name, 2), tiny=True)
            assert row["grown"] >= 0 and row["counted"] > 0 and row["seconds"] > 0


PEAK = """
import sys, torch
sys.path.insert(0, "benchmarks")
from memory import forget_peak, peak_resident
before = forget_peak()
block = torch.ones(64 * 2**20, dtype=torch.uint8)
del block
print(peak_resident() - before, forget_peak() - before)
"""


def test_the_peak_of_resident_memory_is_seen_and_forgotten():
    """In a fresh process, as `memory.py` measures: an old one may hold freed memory, and use it again."""
    seen, left = map(int, printed("-c", PEAK, cwd=ROOT).split())
    size = 64 * 2**20
    assert 0.9 * size < seen < 1.5 * size
    assert left < 0.5 * size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_moments_training_on_omniglot_is_above_chance(precision):
    options = ["--seconds", "3", "--episodes", "40", "--part", "val", "--precision", precision]
    found = report("omniglot.py", *options)["methods"]
    proto = found["ProtoNet"]
    assert proto["accuracy"] - proto["interval over episodes"] > 0.3  # chance is .2
    assert proto["precision"] == precision and found["MAML"]["precision"] == "float32"
    assert all(m["steps"] >= 2 for m in found.values())
