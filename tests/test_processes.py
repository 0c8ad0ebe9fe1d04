"""Several processes equal one: what each computes, what travels, and what is refused. Gloo, two processes, one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtlib.run.checkpoint import load_params, read
from mtlib.run.processes import Group, part, processes

SCRIPT = '''
import json, sys, warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, mse_loss

from mtlib import train
from mtlib.bilevel import bilevel
from mtlib.run.checkpoint import save_params
from mtlib.core import Batch, parameters
from mtlib.data.sinusoids import sinusoids
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4, mlp
from mtlib.objective import over_tasks
from mtlib.run.processes import processes
from mtlib.tasks import ClassSet, episodes, quiz

fit = partial(train.fit, progress=False)


def waves(steps, tasks=25, seed=0, **options):
    """Sinusoid MAML."""
    torch.manual_seed(seed)
    learner = maml(mlp(1, (40, 40), 1), mse_loss, 0.01, 1)
    return fit(bilevel(learner, mse_loss), learner.init(), sinusoids(10, 10, tasks), steps, **options)


def images(steps, **options):
    """Conv4 in float64, three tasks."""
    torch.manual_seed(0)
    net = conv4(5, width=8, size=16).double()
    items = torch.randn(20, 4, 1, 16, 16, dtype=torch.float64)
    stream = episodes(ClassSet(items, [str(i) for i in range(20)], "noise"), 5, 1, 2, 3, seed=0)
    learner = maml(net, cross_entropy, 0.1, 1)
    return fit(bilevel(learner, cross_entropy), learner.init(), stream, steps, **options)


def unreached():
    """ProtoNet never asks its head; the weight decay must not shrink what no gradient reaches."""
    torch.manual_seed(0)
    net = mlp(6, (8,), 3)
    items = torch.randn(9, 5, 6)
    stream = episodes(ClassSet(items, [str(i) for i in range(9)], "noise"), 3, 1, 2, 3, seed=0)
    start = parameters(net)  # with the head, which ProtoNet's own φ leaves out
    decay = partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    run = fit(bilevel(protonet(net), cross_entropy), start, stream, 5, decay)
    assert torch.equal(run.params["head.weight"], start["head.weight"])
    assert not torch.equal(run.params["body.0.weight"], start["body.0.weight"])
    return run


def here_and_there():
    """Entries of several dtypes, one that the first task alone reaches, one the last, one none."""
    phi = {k: torch.full((2,), 1.0) for k in ("first", "last", "never")}
    phi["wide"] = torch.ones(3, 1, dtype=torch.float64)

    def task(phi, batch):
        t = int(batch.y[0, 0])
        names = ["wide"] + ["first"] * (t == 0) + ["last"] * (t == 4)
        return sum((phi[k] ** 2).sum() for k in names) * (t + 1.0)

    def stream(step):
        t = torch.arange(5.0)[:, None, None]
        return Batch(t, t)

    decay = partial(torch.optim.SGD, lr=0.01, weight_decay=0.5)
    return fit(over_tasks(task, vmap=False), phi, stream, 5, decay)


def coupled():
    """Weights of the data sets: no plain mean, so it runs whole."""
    torch.manual_seed(0)
    net = mlp(1, (8,), 1)
    return fit(joint(net, mse_loss, (0.7, 0.2, 0.1)), parameters(net), quiz(sinusoids(5, 5, 3)), 20)


def alone():
    """Runs that one process and several must agree on."""
    return {
        "waves": waves(100),
        "images": images(100),
        "waves checkpointed": waves(100, every=30),
        "three": waves(20, tasks=3),
        "one": waves(20, tasks=1),
        "unreached": unreached(),
        "here and there": here_and_there(),
    }


def caught(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def poisoned(step, task):
    """A stream with one NaN."""
    def stream(s):
        draw = sinusoids(5, 5, 5)(s)
        if s == step:
            draw.query.y[task, 0] = float("nan")
        return draw
    return stream


def small(stream, **options):
    torch.manual_seed(0)
    learner = maml(mlp(1, (8,), 1), mse_loss, 0.01, 1)
    return fit(bilevel(learner, mse_loss), learner.init(), stream, 9, **options)


def main(folder):
    with processes() as group:
        runs = alone()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            runs["coupled"] = coupled()
        runs["resumed"] = waves(100, checkpoint=folder / "by one")
        waves(50, checkpoint=folder / "by two")
        facts = {
            "group": [group.rank, group.size, str(group.device)],
            "warnings": [str(w.message) for w in told],
            "losses": runs["waves"].losses,
            "NaN": {t: caught(lambda t=t: small(poisoned(3, t))) for t in (0, 4)},
            "φ": caught(lambda: waves(3, seed=group.rank)),
            "stream": caught(lambda: small(sinusoids(5, 5, 4, seed=group.rank))),
            "seed": caught(lambda: small(sinusoids(5, 5, 4), seed=group.rank)),
            "step": caught(lambda: waves(60, checkpoint=folder / ("by two" if group.rank else "none"))),
        }

        sent, plain = [], dist.all_reduce
        def counted(tensor, *args, **options):
            sent.append(tensor.numel())
            return plain(tensor, *args, **options)
        dist.all_reduce = counted
        run = waves(6)
        facts["sent"] = sent
        facts["expected"] = 1 + len(run.params) + sum(v.numel() for v in run.params.values())
        (folder / f"facts{group.rank}.json").write_text(json.dumps(facts))
        for name, run in runs.items():
            save_params(folder / f"{name} {group.rank}", run.params)
    assert not dist.is_initialized()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
'''


def launch(script: Path, *arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """The script in `count` processes on the CPU, warnings as errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, f"--nproc_per_node={count}", str(script), *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same runs in one process, here, and in two; `folder` holds what the two wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT, "utf8")
    space: dict[str, Any] = {"__name__": "script"}
    exec(compile(SCRIPT, "script.py", "exec"), space)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    space["waves"](50, checkpoint=folder / "by one")
    done = launch(folder / "script.py", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {**space["alone"](), "coupled": space["coupled"]()}
    runs["resumed"] = space["waves"](100)
    facts = [json.loads((folder / f"facts{r}.json").read_text()) for r in (0, 1)]
    yield SimpleNamespace(folder=folder, runs=runs, facts=facts, waves=space["waves"])
    torch.set_num_threads(threads)


def distance(a, b):
    """The largest difference of an entry, over max(1, its size)."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs() / b[k].abs().clamp(min=1)).max().item() for k in a)


def of_two(both, name):
    first, second = (load_params(both.folder / f"{name} {r}") for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first), "the two processes differ"
    return first


BOUNDS = {
    "waves": 1e-6,
    "waves checkpointed": 1e-6,
    "images": 1e-12,
    "three": 1e-6,
    "one": 1e-6,
    "unreached": 1e-6,
    "here and there": 1e-6,
    "coupled": 0,
    "resumed": 1e-6,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_two_processes_equal_one(both, name):
    """Up to rounding. Conv4 stands in float64: in float32, Adam makes rounding grow until the runs differ."""
    assert distance(of_two(both, name), both.runs[name].params) <= BOUNDS[name]


def test_the_losses_are_those_of_all_tasks(both):
    first, second = (torch.tensor(f["losses"]) for f in both.facts)
    assert torch.equal(first, second)
    assert torch.allclose(first, torch.tensor(both.runs["waves"].losses), rtol=1e-5)


def test_a_checkpoint_knows_nothing_of_the_number_of_processes(both):
    """One to two is "resumed" above; here two to one."""
    assert read(both.folder / "by two").facts["step"] == 50
    resumed = both.waves(100, checkpoint=both.folder / "by two")
    assert distance(resumed.params, both.runs["waves"].params) <= 1e-6


def test_an_entry_that_no_process_reaches_is_left_alone(both):
    moved = of_two(both, "here and there")
    assert torch.equal(moved["never"], torch.ones(2)) and moved["wide"].dtype == torch.float64
    assert all((moved[k] < 1).all() for k in ("first", "last", "wide"))
    wide = both.runs["here and there"].params["wide"]
    assert torch.allclose(moved["wide"], wide, rtol=1e-12, atol=0)  # not by way of float32


def test_one_all_reduce_of_the_gradient_a_step(both):
    for facts in both.facts:
        long = [n for n in facts["sent"] if n > 20]
        assert long == 6 * [facts["expected"]]
        assert len(facts["sent"]) == 7  # and one check at the start


def test_an_objective_that_couples_its_tasks_says_that_it_gains_nothing(both):
    assert both.facts[1]["warnings"] == []
    (told,) = both.facts[0]["warnings"]
    assert "2 processes" in told and "one process" in told


@pytest.mark.parametrize("task", ["0", "4"])
def test_a_nan_in_one_part_is_told_in_all_processes(both, task):
    for facts in both.facts:
        assert facts["NaN"][task].startswith("Diverged: the objective is NaN")
        assert f"step 3, tasks [{task}] of stream(3)" in facts["NaN"][task]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("φ", ("sum of φ", "Seed before making the network")),
        ("stream", ("stream sum", "one seed")),
        ("seed", ("seed lies between 0 and 1", "one seed")),
        ("step", ("step lies between 0 and 50", "file system that they share")),
    ],
)
def test_processes_that_begin_apart_are_refused(both, what, words):
    for facts in both.facts:
        assert facts[what].startswith("ValueError: expected the 2 processes to begin alike")
        assert all(word in facts[what] for word in words)


def test_each_process_has_its_rank(both):
    assert [f["group"] for f in both.facts] == [[0, 2, "cpu"], [1, 2, "cpu"]]


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as group:
        assert group[:2] == (0, 1) and isinstance(group, Group)
        assert not torch.distributed.is_initialized()
        assert part(7) == slice(0, 7)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="one for each CUDA device"), processes():
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("tasks", [1, 2, 5, 16])
def test_the_parts_are_the_whole(monkeypatch, tasks, size):
    monkeypatch.setattr("mtlib.run.processes.size", lambda: size)
    parts = []
    for r in range(size):
        monkeypatch.setattr("mtlib.run.processes.rank", lambda r=r: r)
        parts.append(list(range(tasks))[part(tasks)])
    assert [t for p in parts for t in p] == list(range(tasks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_dropout_follows_the_rank(monkeypatch):
    """Two processes draw other masks; one process draws what it always did."""
    from mtlib import train

    seeds = []
    monkeypatch.setattr(train, "_seeded", lambda o, p, d, seed: (seeds.append(seed), {}))
    monkeypatch.setattr(train, "average", lambda *args: None)
    objective = SimpleNamespace(separable=True)
    draw = torch.zeros(4, 2, 2)
    for count, r in ((1, 0), (2, 0), (2, 1)):
        for module in ("mtlib.train", "mtlib.run.processes"):
            monkeypatch.setattr(f"{module}.size", lambda n=count: n)
            monkeypatch.setattr(f"{module}.rank", lambda r=r: r)
        train._step(objective, {"a": torch.zeros(1)}, draw, 3, 5)
    assert seeds[0] == seeds[1] == 3 * 1_000_003 + 5 != seeds[2]
