"""The benchmarks run, what they time reaches the same end, and a wrong gradient stops them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

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
    from meta_gradient import MAY_BE_WRONG
    from peers import implementations
    from workloads import workloads

    options = ["--small", "--repeats", "2", "--threads", "1", "--without", "JAX"]
    found = report("meta_gradient.py", *options)
    assert list(found["workloads"]) == list(workloads())
    for name, work in workloads().items():
        result = found["workloads"][name]
        rows = result["implementations"]
        untimed = {"JAX", *result["wrong"]}
        assert set(result["wrong"]) <= set(MAY_BE_WRONG)
        assert list(rows) == [n for n in implementations(work) if n not in untimed]
        assert rows[result["fastest peer"]]["ratio"] == 1
        assert not result["fastest peer"].startswith("mtlib") and result["floor"] > 0
        for row in rows.values():
            assert row["float64 discrepancy"] <= 1e-9
            assert 0 < row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
            assert row["ratio"] > 0 and row["floors"] > 0
    assert found["setting"]["threads"] == 1 and found["setting"]["absent"] == ["JAX"]
    assert found["setting"]["peak GFLOP/s"] > 0 and found["setting"]["peak GB/s"] > 0
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
    assert waits == 2 * ["wait", "run", "wait"] and seconds > 0  # a short call is made twice
    meta_gradient.clock(lambda: waits.append("run"), "cpu")
    assert waits[6:] == ["run", "run"]
    waits.clear()
    meta_gradient.clock(lambda: waits.append("run") or time.sleep(0.06), "cuda")
    assert waits == ["wait", "run", "wait"]
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


def test_new_workloads_go_into_the_file_that_is_there(benchmarks, monkeypatch, tmp_path):
    import meta_gradient

    monkeypatch.setattr(meta_gradient, "FOLDER", tmp_path)

    def kept(commit, small=False, part="workloads", depth=1, **found):
        made = {"setting": {"small": small}, part: found, "provenance": {"commit": commit}}
        meta_gradient.keep(made, part, part, depth)
        return json.loads((tmp_path / "benchmarks" / f"{part}.json").read_text("utf8"))

    kept("a", W1=1, W2=2, W3=3)
    found = kept("b", W2=4, W4=5)
    assert list(found["workloads"].items()) == [("W1", 1), ("W2", 4), ("W3", 3), ("W4", 5)]
    assert found["commits"] == {"W1": "a", "W2": "b", "W3": "a", "W4": "b"}
    assert found["provenance"]["commit"] == "b"
    assert kept("c", W3=6)["commits"] == {"W1": "a", "W2": "b", "W3": "c", "W4": "b"}
    assert kept("d", small=True, W1=7)["workloads"] == {"W1": 7}  # a trial keeps nothing of it
    kept("a", part="tables", depth=3, steps={"mtlib": {"1": 1, "2": 2}})
    found = kept("b", part="tables", depth=3, steps={"mtlib": {"2": 3}, "higher": {"1": 4}})
    assert found["tables"] == {"steps": {"mtlib": {"1": 1, "2": 3}, "higher": {"1": 4}}}


BROUGHT = """
from typing import NamedTuple
import torch
from peers import HAND

class Line(NamedTuple):
    what: str = "a line"
    method: str = "first order"
    tasks: int = 2
    slope: float = 1.0

    def case(self, seed, dtype, device):
        return self.slope * torch.ones(3, 1, dtype=dtype, device=device, requires_grad=True)

    def reduced(self):
        return self

    def small(self):
        return self._replace(tasks=1)

    def implementations(self, compiled):
        def make(case):
            return lambda: [torch.autograd.grad((torch.eye(3).to(case) @ case).sum(), case)[0]]
        return {"mtlib": make, HAND: make}

def brings(device):
    return {"L1": Line()}
"""


def test_another_module_brings_its_own_workloads(benchmarks, monkeypatch, tmp_path):
    import meta_gradient
    import workloads

    (tmp_path / "lines.py").write_text(BROUGHT)
    monkeypatch.setattr(workloads, "MODULES", ("lines", "none"))
    monkeypatch.setattr(workloads, "__file__", str(tmp_path / "workloads.py"))
    found = meta_gradient.suite("cpu", 2, ["L"], True)["workloads"]["L1"]
    assert found["workload"] == {"what": "a line", "method": "first order", "tasks": 1, "slope": 1}
    assert found["fastest peer"] == "torch by hand" and found["floor"] > 0
    (tmp_path / "needy.py").write_text("import no_such_package")
    monkeypatch.setattr(workloads, "MODULES", ("needy",))
    assert next(iter(workloads.workloads())) == "W1, 1 step"


# JAX, in another process ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W1, 5 steps", "W2, second order", "W2, first order"])
def test_jax_agrees_and_says_its_own_seconds(benchmarks, name):
    pytest.importorskip("jax")
    from meta_gradient import check, clock
    from peers import HAND, by_hand
    from with_jax import ways
    from workloads import case, reduced, small, workloads

    work = small(workloads()[name])
    makes = ways(work)
    assert check(work, {HAND: by_hand, **makes})["JAX"] <= 1e-9
    if name.startswith("W1"):
        run = makes["JAX"](case(reduced(work)))
        assert 0 < clock(run, "cpu") < 60
        assert [g.shape for g in run()] == [p.shape for p in run.case.net.parameters()]
        process = run.process
        del run
        assert process.poll() is not None


def test_jax_is_no_row_where_it_is_not_installed(benchmarks, monkeypatch):
    import with_jax
    from peers import implementations
    from workloads import workloads

    monkeypatch.setattr(with_jax, "find_spec", lambda name: None)
    assert "JAX" not in implementations(workloads()["W1, 1 step"])


def test_what_jax_gets_wrong_is_listed_and_not_timed(benchmarks, monkeypatch):
    import meta_gradient
    from peers import HAND, by_hand, ours

    def wrong(case):
        run = by_hand(case)
        return lambda: [2 * g for g in run()]

    makes = {"mtlib": ours(), HAND: by_hand, "JAX": wrong}
    monkeypatch.setattr(meta_gradient, "implementations", lambda *_: dict(makes))
    found = meta_gradient.suite("cpu", 2, ["W1, 1"], True)["workloads"]["W1, 1 step"]
    assert list(found["implementations"]) == ["mtlib", HAND]
    assert found["wrong"] == {"JAX": pytest.approx(1)}
    assert "JAX" in meta_gradient.table("W1", found)


def test_a_process_of_jax_that_ends_is_named(benchmarks, monkeypatch, tmp_path):
    import with_jax
    from workloads import case, small, workloads

    (tmp_path / "worker.py").write_text("")
    monkeypatch.setattr(with_jax, "WORKER", tmp_path / "worker.py")
    run = with_jax.Apart(case(small(workloads()["W1, 1 step"])))
    with pytest.raises(RuntimeError, match="process ended"):
        run()


# Training whole, two processes, columns, a GPU ------------------------------------------------


def test_a_moments_race_on_omniglot_looks_at_each_contender(benchmarks):
    import training

    found = report("training.py", "--small", "--limit", "0.3", "--threads", "1")["training"]
    assert list(found) == ["ProtoNet", "MAML"]
    for method, rows in found.items():
        assert list(rows) == list(training.CONTENDERS[method])
        for row in rows.values():
            assert row["steps"] >= 1 and 0 <= row["test"] <= 1
            last, accuracy = row["validation"][-1]
            reached = accuracy >= training.TARGETS[method]
            assert row["seconds"] == (last if reached else None)
            assert reached or last >= 0.3


@pytest.mark.parametrize("method", ["ProtoNet", "MAML"])
def test_a_recipe_in_torch_takes_the_step_that_mtlibs_takes(benchmarks, method):
    """On the same episodes: its items are drawn by mtlib's stream here."""
    import training
    from torch.nn.functional import cross_entropy

    from mtlib.bilevel import bilevel
    from mtlib.nets import conv4
    from mtlib.tasks import ClassSet, episodes

    data = ClassSet(torch.rand(20, 8, 1, 28, 28).double(), [str(i) for i in range(20)], "noise")
    recipe = training.Recipe(5, 2, 2, 0.001, 0.1)
    draw = episodes(data, 5, 1, 2, 2, 0)(0)
    net = conv4(5, width=64, seed=0).double()
    learner = training.learned(method, net, recipe, 1)
    phi = learner.init()
    grads = bilevel(learner, cross_entropy).value_and_grad(phi, draw)[1]
    plain = training.written_out(net)
    step = training.proto_step if method == "ProtoNet" else training.maml_step
    for t in range(2):
        (xs, ys), (xq, yq) = ((b.x[t], b.y[t].argmax(-1)) for b in draw)
        step(plain, recipe, xs, ys, xq, yq)
    for (k, g), p in zip(grads.items(), plain.parameters(), strict=False):
        assert torch.allclose(g, p.grad / 2, rtol=1e-9, atol=1e-12), k


def test_drawn_items_are_of_different_classes(benchmarks):
    import random

    import training

    items = torch.arange(20.0)[:, None, None].expand(20, 6, 1)
    recipe = training.Recipe(5, 3, 1, 0.1)
    xs, ys, xq, yq = training.drawn(random.Random(0), items, recipe)
    assert len(xs.unique()) == 5 and torch.equal(xs[ys], xs) and torch.equal(xs[yq], xq)


def test_the_columns_are_four_for_each_method(benchmarks):
    found = report("columns.py", "--small", "--seconds", "1", "--seeds", "0", "1")
    names = [f"{ways}-way {shots}-shot" for ways in (5, 20) for shots in (1, 5)]
    assert all(list(row) == names for row in found["columns"].values())
    for row in found["columns"].values():
        for cell in row.values():
            runs = [r["accuracy"] for r in cell["runs"].values()]
            assert cell["mean"] == pytest.approx(sum(runs) / 2) and cell["seeds"] >= 0


def test_two_processes_take_turns_with_one(benchmarks):
    options = ["--tasks", "2", "--inner", "1", "--queries", "1", "--width", "4", "--steps", "1"]
    found = report("processes.py", *options, "--rounds", "2")
    assert (
        found["processes"]["two"]["median"] > 0 and len(found["processes"]["apart"]["rounds"]) == 2
    )
    assert 0 < found["exchange"] < 1 and min(found["seconds"].values()) > 0


def gpu(*options, **environment):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command_for_a_gpu_says_its_steps_which_take_ten_minutes_at_most(benchmarks):
    import columns

    status, said = gpu("--dry")
    limits = [int(n) for n in re.findall(r"at most (\d+) s", said)]
    assert status == 0 and len(limits) == 4 and sum(limits) <= 600
    for what in ("meta_gradient.py", "columns.py", "second_device/laws.py", "notebooks.py"):
        assert said.count(what) == 1, what
    assert "--methods" not in said and "--seeds" not in said and "--only" not in said  # all of them
    assert list(columns.RECIPES) == ["ProtoNet", "MAML", "ANIL", "Reptile"]
    assert said.count("--device cuda") == said.count("--write") == 2
    small = gpu("--dry", "--small", "--device", "second")[1]
    assert small.count("--device second") == 2 and "--write" not in small
    assert sum(map(int, re.findall(r"at most (\d+) s", small))) <= 900
    assert gpu("--fast")[0] == 64


def test_a_step_that_fails_stops_no_other_and_counts():
    status, said = gpu("--small", "--device", "none", PYTHON="false")
    assert status == 4 and said.count("FAILED") == 4


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
    assert list(found) == [f"ProtoNet, {precision}", "MAML, float32"]
    proto = found[f"ProtoNet, {precision}"]["0"]
    assert proto["accuracy"] - proto["episodes"] > 0.3  # chance is .2
    assert all(m["0"]["steps"] >= 2 for m in found.values())


def test_two_processes_train_on_omniglot_together():
    options = ["--seconds", "1", "--episodes", "10", "--part", "val", "--seeds", "0", "1"]
    found = report("omniglot.py", *options, "--only", "MAML", "--processes", "2")["methods"]
    runs = found["MAML, float32, 2 processes"]
    assert list(runs) == ["0", "1"] and all(r["steps"] >= 2 for r in runs.values())


def test_a_rate_goes_by_the_time_that_is_spent_and_ends_with_it(benchmarks, monkeypatch):
    import omniglot

    assert omniglot.rising(0) == pytest.approx(1 / 25) and omniglot.rising(0.1) == 1
    assert omniglot.rising(1) == 0 == omniglot.falling(1.5)
    now = iter([10.0, 10.0, 10.0, 13.0, 16.0])  # it begins, and looks at each step
    monkeypatch.setattr(omniglot.time, "perf_counter", lambda: next(now))
    clock = omniglot.Clock(6.0, omniglot.falling)
    assert [clock(0), clock(1), clock(2)] == pytest.approx([1, 1, 0.5])
    with pytest.raises(omniglot.Over):
        clock(3)
    assert (clock.steps, clock.spent) == (3, 6.0)
