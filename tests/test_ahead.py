"""Draws ahead: the same stream bit for bit from other processes, which end, say what went wrong and hold little memory."""

from __future__ import annotations

import _thread
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from machine import ROOT
from test_own_data import numbered, same, table, write
from test_processes import launch

from mtlib.core import Batch, take
from mtlib.data.own import image_folder, rows
from mtlib.data.sinusoids import sinusoids
from mtlib.run.ahead import ahead
from mtlib.tasks import ClassSet, episodes, mixture, quiz, some_tasks

METHODS = ["spawn", "fork"]


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as in a terminal, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Odd:
    """A stream that is slow, fails or holds on to something at some steps."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, step):
        if step == 1:
            time.sleep(60)
        if step == 3:
            raise KeyError("no step three")
        if step == 5:
            raise Unsendable("words", print)
        if step == 66:
            os._exit(3)
        if step == 9:
            return lambda: None
        return self.stream(step)


class Unsendable(Exception):
    def __init__(self, words, needed):
        super().__init__(words)


def streams(folder):
    write(folder, [3, 4, 6], seed=1)
    data, images = numbered([5, 7, 6]), image_folder(folder, 8, lazy=True)
    return {
        "episodes": episodes(data, 2, 1, 2, 3, 0),
        "files": episodes(images, 2, 1, 2, 3, 0, cast=torch.float32),
        "mixture": mixture(images, batch=6, seed=0),
        "quiz": quiz(episodes(data, 2, 1, 2, 3, 0)),
        "rows": rows(table(), "user", ["a"], "y", shots=2, queries=1, tasks=3, seed=0),
    }


class All:
    """Step j of the stream named first, second, … in turn: one pair of processes serves several."""

    def __init__(self, named):
        self.named = named

    def __call__(self, step):
        return [*self.named.values()][step % len(self.named)](step)

    def part(self, step, tasks):
        return some_tasks([*self.named.values()][step % len(self.named)], step, tasks)


def workers():
    return sorted(one.pid for one in multiprocessing.active_children())


def gone(pids, patience=20.0):
    """Whether processes have ended (or wait to be collected by another than this one)."""
    end = time.monotonic() + patience

    def lives(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(lives, pids))


@pytest.mark.parametrize("method", METHODS)
def test_the_stream_bit_for_bit(tmp_path, method):
    """In order, twice, back and forth, in parts, and with another default dtype."""
    plain = All(streams(tmp_path))
    with ahead(plain, workers=2, method=method) as stream:
        pids = []
        for step in (0, 0, 1, 2, 3, 4, 9, 7, 5, 6, 0, 1000, 1001):
            assert same(stream(step), plain(step)), step
            pids = pids or workers()
            assert workers() == pids, step  # out of order, the same processes go on
        assert type(stream(5)) is type(plain(5)) and type(stream(2)) is Batch
        assert same(stream.part(5, slice(1, 2)), take(plain(5), slice(1, 2)))
        assert same(stream.part(6, slice(1, None)), take(plain(6), slice(1, None)))
        torch.set_default_dtype(torch.float64)
        try:
            assert same(stream(22), plain(22)) and stream(22).y.dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        stream(8).y.add_(1)  # a draw is the caller's own
        assert same(stream(8), plain(8))
    assert gone(pids)
    with pytest.raises(ValueError, match="open"):
        stream(0)


def test_an_error_comes_with_its_type_and_words():
    plain = episodes(numbered([5, 7, 6]), 2, 1, 2, 3, 0)
    with ahead(Odd(plain), workers=2, method="fork") as stream:
        assert same(stream(2), plain(2))  # step 3 fails meanwhile, and nobody has asked for it
        with pytest.raises(KeyError, match="no step three"):
            stream(3)
        with pytest.raises((RuntimeError, TypeError), match="words"):
            stream(5)
        with pytest.raises(RuntimeError, match="exit"):
            stream(66)
        with pytest.raises(TypeError, match="cannot be pickled"):
            stream(9)  # a draw that cannot travel is told, not waited for
        assert same(stream(10), plain(10))


@pytest.mark.parametrize("late", [0, 1])
def test_after_ctrl_c_it_goes_on(monkeypatch, late):
    """Also where a process has only begun when the signal comes."""
    module = sys.modules["mtlib.run.ahead"]
    begin = module._begin_worker
    monkeypatch.setattr(module, "_begin_worker", lambda i: (time.sleep(late * i), begin(i)))
    plain = episodes(numbered([5, 7, 6]), 2, 1, 2, 3, 0)
    with ahead(Odd(plain), workers=2, method="fork") as stream:
        assert same(stream(7), plain(7))
        pids = workers()
        for pid in pids:
            os.kill(pid, signal.SIGINT)  # a terminal sends it to all: they take no notice
        assert same(stream(8), plain(8))
        threading.Timer(0.5, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            stream(1)
        assert gone(pids)
        assert same(stream(2), plain(2)) and same(stream(0), plain(0))


def test_processes_end_with_the_stream():
    stream = ahead(episodes(numbered([5, 7, 6]), 2, 1, 2, 3, 0), workers=2, method="fork")
    stream(0)
    pids = workers()
    del stream
    gc.collect()
    assert gone(pids)


PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch
from mtlib.run.ahead import ahead
from mtlib.tasks import ClassSet, episodes

module = sys.modules["mtlib.run.ahead"]
begin = module._begin_worker

def late(i):
    time.sleep(i)
    begin(i)

if sys.argv[2].endswith("early"):
    module._begin_worker = late

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = ClassSet(torch.rand(4, 5, 2), list("abcd"), "noise")
    stream = ahead(episodes(data, 2, 1, 1, 2, 0), workers=2, method=sys.argv[1])
    stream(0)
    print(*(one.pid for one in multiprocessing.active_children()), flush=True)
    if sys.argv[2].startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "stopped":
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("spawn", "done"),
        ("fork", "killed"),
        ("fork", "killed early"),
        ("spawn", "killed early"),
        ("fork", "stopped"),
    ],
)
def test_processes_end_with_the_program(tmp_path, method, end):
    """At its end, killed, and by Ctrl-C in a terminal, which every process of the group gets."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM, "utf8")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-W", "error", str(script), method, end]
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2, process.stderr.read()
        if end == "stopped":
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert gone(pids)
    assert said.count("Traceback") == (end == "stopped"), said


def run(script, *arguments):
    command = [sys.executable, *arguments] if script is None else [sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_notebooks_own_stream_is_told_of_fork():
    """Its class stands nowhere that a new process could import it from."""
    program = """
from mtlib.run.ahead import ahead
class Own:
    def __call__(self, step):
        return step
if __name__ == "__main__":
    print(ahead(Own(), workers=1, method="fork")(3))
    ahead(Own(), workers=1)(3)
"""
    done = run(None, "-c", program)
    assert done.stdout == "3\n"
    assert "TypeError: expected a stream that another process can read" in done.stderr
    assert "can be imported" in done.stderr and 'method="fork"' in done.stderr


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ahead(sinusoids(5, 5, 4, 0)), r"function cannot be pickled: .*method=\"fork\""),
        (lambda: ahead(Odd(open(os.devnull))), "Odd cannot be pickled: .*TextIOWrapper"),  # noqa: SIM115
        (lambda: ahead(3), "expected a stream"),
        (lambda: ahead(sinusoids(5, 5, 4, 0), 0), "workers"),
        (lambda: ahead(sinusoids(5, 5, 4, 0), method="thread"), "method"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_drawn_ahead(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()
    gc.collect()


# Memory ------------------------------------------------------------------------------------------

STORED = '''
import multiprocessing, os, sys
import numpy as np, torch
from pathlib import Path
from torch.utils.data import Dataset
from torch.nn.functional import cross_entropy
from mtlib.bilevel import bilevel
from mtlib.data.own import from_dataset
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.run.ahead import ahead
from mtlib.tasks import episodes
from mtlib.train import fit


class Stored(Dataset):
    """Files 00000.npy, … of (84, 84, 3) bytes; 200 of each class."""

    def __init__(self, folder, n):
        self.folder, self.targets = folder, [i // 200 for i in range(n)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.from_numpy(np.load(f"{self.folder}/{i:05d}.npy")).permute(2, 0, 1), self.targets[i]


def private(pid):
    """Memory of one process alone, in megabytes."""
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(row[1]) for row in rows if row[0].startswith("Private_")) / 1024


def train(stream, steps):
    torch.manual_seed(0)
    learner = protonet(conv4(5, 3, width=8, size=84))
    return fit(bilevel(learner, cross_entropy), learner.init(), stream, steps, progress=False).losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, n, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stream = episodes(from_dataset(Stored(folder, n)), 5, 1, 5, tasks=2, seed=0, cast=torch.float32)
    with ahead(stream, workers=2) as quick:
        losses = train(quick, steps)
        held = [private(one) for one in [os.getpid(), *(c.pid for c in multiprocessing.active_children())]]
    assert losses == train(stream, steps)
    print(*(f"{m:.0f}" for m in held))
'''


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells of private memory"
)
def test_files_of_a_data_set_are_drawn_in_little_memory(tmp_path):
    """Losses equal those without workers; no process holds 500 MB of its own. 20,000 files give the same figures."""
    n, rng = 1200, np.random.default_rng(0)
    for i in range(n):
        np.save(tmp_path / f"{i:05d}.npy", rng.integers(256, size=(84, 84, 3), dtype=np.uint8))
    (tmp_path / "script.py").write_text(STORED, "utf8")
    command = [
        sys.executable,
        "-W",
        "error",
        str(tmp_path / "script.py"),
        str(tmp_path),
        str(n),
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(0 < float(m) <= 500 for m in done.stdout.split()), done.stdout


def private(pid):
    """Memory of one process alone, in megabytes."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        rows = [line.split() for line in file]
    return sum(int(row[1]) for row in rows if row[0].startswith("Private_")) / 1024


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells of private memory"
)
def test_items_in_memory_are_there_once():
    """A set of 300 MB is no process's own, and two thousand tensors need no two thousand open files."""
    big = ClassSet(torch.ones(10, 10, 750_000), [str(c) for c in range(10)], "ones")
    many = ClassSet(
        [torch.full((2, 1), float(c)) for c in range(2000)], [str(c) for c in range(2000)], "many"
    )
    plain = All({"big": episodes(big, 2, 1, 1, 1, 0), "many": episodes(many, 5, 1, 1, 3, 0)})
    with ahead(plain, workers=1) as stream:
        assert same(stream(0), plain(0)) and same(stream(1), plain(1))
        (worker,) = workers()
        assert len(os.listdir(f"/proc/{worker}/fd")) < 50
        assert private(worker) < 280


# Several processes -------------------------------------------------------------------------------

TORCHRUN = '''
import json, os, sys
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from mtlib.bilevel import bilevel
from mtlib.data.own import from_dataset
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.run.ahead import ahead
from mtlib.run.processes import processes
from mtlib.tasks import episodes
from mtlib.train import fit

STEPS = 6


class Counted(Dataset):
    """Sixty items of six classes, and how many were loaded."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.targets = [i % 6 for i in range(60)]
        self.items = torch.randn(60, 8, generator=g, dtype=torch.float64) + torch.tensor(self.targets)[:, None]
        self.loads = 0

    def __len__(self):
        return 60

    def __getitem__(self, i):
        self.loads += 1
        return self.items[i], self.targets[i]


def run(tasks, wrap=lambda stream: stream, **options):
    torch.manual_seed(0)
    dataset = Counted()
    stream = wrap(episodes(from_dataset(dataset), 3, 1, 2, tasks, seed=0))
    learner = protonet(mlp(8, (8,), 3).double())
    run = fit(bilevel(learner, cross_entropy), learner.init(), stream, STEPS, progress=False, **options)
    return run.losses, dataset.loads


def every(folder):
    found = {str(tasks): run(tasks) for tasks in (1, 4, 5)}
    found["kept"] = run(4, checkpoint=folder / f"kept {os.environ.get('WORLD_SIZE', 1)}", every=2)
    with ahead(episodes(from_dataset(Counted()), 3, 1, 2, 4, seed=0), 1, "fork") as stream:
        found["ahead"] = run(4, lambda _: stream)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with processes() as group:
        found = every(folder)
        (folder / f"found{group.rank}.json").write_text(json.dumps(found))
'''


def test_two_processes_load_half_each(tmp_path):
    """Nine items a task. The first draw is everybody's, as the check that all have one stream; then each loads its own."""
    (tmp_path / "script.py").write_text(TORCHRUN, "utf8")
    space = {"__name__": "script"}
    exec(compile(TORCHRUN, "script.py", "exec"), space)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = space["every"](tmp_path)
    finally:
        torch.set_num_threads(threads)
    done = launch(tmp_path / "script.py", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    both = [json.loads((tmp_path / f"found{r}.json").read_text()) for r in (0, 1)]
    steps, task = space["STEPS"], 3 * (1 + 2)
    for name, (losses, _) in alone.items():
        for found in both:
            assert found[name][0] == pytest.approx(losses, rel=1e-12), name
    for tasks in (1, 4, 5):
        assert alone[str(tasks)][1] == task * tasks * (1 + steps)
        own = [(tasks + 1) // 2, tasks // 2]  # of the tasks, in each process
        assert [found[str(tasks)][1] for found in both] == [task * (tasks + steps * n) for n in own]
    assert [found["ahead"][1] for found in both] == [0, 0]  # in the other process
