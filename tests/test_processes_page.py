"""The page on several processes: its ring, its model of a step, what its exercises say, and how its script starts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import code_cells

from mtlib.book.launching import launched
from mtlib.nets import conv4
from mtlib.run.processes import part

pytestmark = pytest.mark.fast


def run_cell(mark, **space):
    """The variables of the one cell that holds these words."""
    (text,) = [t for t in code_cells("processes") if mark in t]
    exec(compile(text, "processes.ipynb", "exec"), space)
    return space


@pytest.fixture(scope="module")
def ring():
    return run_cell("def ring", np=np, table=lambda *a, **k: None)["ring"]


@pytest.fixture(scope="module")
def model():
    """The page's model, for a task of 100 ms, 0.1 ms of reading and 0.01 ms of drawing."""
    measured = {"task": 0.1, "reading": 1e-4, "drawing": 1e-5, "WIDTH": 64, "PIXELS": 28}
    return run_cell("def parts", np=np, math=math, conv4=conv4, **measured)


@pytest.mark.parametrize("processes", [1, 2, 5, 9])
@pytest.mark.parametrize("length", [3, 24, 50])
def test_the_ring_gives_everyone_the_sum(ring, processes, length):
    vectors = np.random.default_rng(0).normal(size=(processes, length))
    sums, rounds, sent = ring(vectors)
    assert all(np.allclose(s, vectors.sum(0)) for s in sums)
    assert rounds == 2 * (processes - 1)
    assert sent.sum() == 2 * (processes - 1) * length, "each piece is sent on P − 1 times, twice"


def test_the_vector_has_the_bytes_that_average_sends(model):
    phi = dict(conv4(5, width=64, size=28).named_parameters())
    assert model["BYTES"] == 4 * (1 + len(phi) + sum(v.numel() for v in phi.values()))


def test_one_process_talks_to_nobody_and_the_parts_add_up(model):
    drawing, tasks, ring = model["parts"](1, 16, 0.1)
    assert ring == 0 and math.isclose(drawing, 16e-5) and math.isclose(tasks, 16 * 0.1001)
    assert model["speedup"](1, 16, 0.1) == 1


def test_the_speedup_stays_below_what_is_not_divided(model):
    limit = 1 + (0.1 + 1e-4) / 1e-5
    most = max(model["speedup"](P, 10**6, 0.1) for P in (10**3, 10**4, 10**5))
    assert 100 < most < limit


def test_more_processes_than_tasks_are_slower(model):
    speedup = model["speedup"]
    assert speedup(16, 16, 0.1) > speedup(17, 16, 0.1) > speedup(64, 16, 0.1)


def test_seventeen_tasks_on_sixteen_processes():
    assert [T / math.ceil(T / 16) for T in (16, 17)] == [16, 8.5]


def test_five_tasks_on_three_processes(monkeypatch):
    sizes = []
    monkeypatch.setattr("mtlib.run.processes.size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("mtlib.run.processes.rank", lambda r=rank: r)
        mine = part(5)
        sizes.append(mine.stop - mine.start)
    assert sizes == [2, 2, 1] and 5 / max(sizes) == 2.5


SCRIPT = """
import os, sys
from mtlib.run.processes import processes, size
with processes() as group:
    if group.rank == 0:
        open(sys.argv[1], "w").write(f"{size()} {sys.argv[2]} {os.environ['OMP_NUM_THREADS']}")
    assert sys.argv[2] != "wrong", "so it was asked"
"""


def test_a_script_runs_in_so_many_processes_however_they_start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    forked = launched(tmp_path / "script.py", (1, 2), ["a"], apart=False)
    assert [Path(f).read_text() for f in forked] == ["1 a 1", "2 a 1"]
    assert launched(tmp_path / "script.py", (2, 1), ["b"]) == forked[::-1]
    assert [Path(f).read_text() for f in forked] == ["1 b 1", "2 b 1"]


@pytest.mark.parametrize("apart", [True, False])
def test_a_script_that_fails_says_its_words(tmp_path, apart):
    (tmp_path / "script.py").write_text(SCRIPT)
    with pytest.raises(RuntimeError, match="so it was asked"):
        launched(tmp_path / "script.py", (1,), ["wrong"], apart)


def test_the_best_distance_of_checkpoints():
    """The solution on `speed`: least at m = √(Kp/g), with 2√(Kpg), where m may be any number."""
    K, p, g = 400, 1.0, 4.0
    m = torch.linspace(1, 40, 3901, dtype=torch.float64)
    memory = K * p / m + m * g
    assert math.isclose(m[memory.argmin()], math.sqrt(K * p / g), abs_tol=0.01)
    assert math.isclose(memory.min(), 2 * math.sqrt(K * p * g), rel_tol=1e-6)
