"""Runs that are the same run: a file of another is refused, pieces are the whole, signals lose no step, the best φ is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from mtlib import train
from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode, parameters
from mtlib.data.sinusoids import sinusoids
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.objective import whole
from mtlib.run.checkpoint import Checkpoint, load_params, read, save_params, write
from mtlib.run.trainee import Termination
from mtlib.tasks import quiz
from mtlib.train import Diverged, cosine_adam, early_stopping

fit = partial(train.fit, progress=False)
SLOW = partial(SGD, lr=0.01)


def net(seed=0):
    return mlp(1, (8,), 1, seed=seed)


STREAM = sinusoids(5, 5, 4, 0)
PHI = parameters(net())


def goal(rate=0.01, steps=1, way=None, loss=mse_loss):
    return bilevel(maml(net(), loss, rate, steps), loss, way)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What is another run ------------------------------------------------------------------------------


def run(path, steps, **changed):
    given = {
        "objective": goal(),
        "params": PHI,
        "stream": STREAM,
        "optimizer": partial(Adam, lr=1e-2),
    }
    return fit(steps=steps, checkpoint=path, **{**given, **changed})


def nudged(step):
    draw = STREAM(step)
    return draw._replace(query=Batch(draw.query.x, draw.query.y.flip(1)))  # the same sums


OTHER = {
    "inner rate": ({"objective": goal(0.02)}, "first step's loss"),
    "inner steps": ({"objective": goal(steps=2)}, "first step's loss"),
    "hypergradient": ({"objective": goal(way=first_order)}, "first step's gradient of"),
    "loss": ({"objective": goal(loss=l1_loss)}, "first step's loss"),
    "objective of the step": ({"objective": lambda step: goal(0.02)}, "first step's loss"),
    "labels": ({"stream": nudged}, "first step's loss"),
    "start": ({"params": parameters(net(1))}, r"starting φ is [0-9a-f]+ there.*seed"),
    "outer rate": (
        {"optimizer": partial(Adam, lr=2e-2)},
        r"optimizer's group\[0\]\.lr is 0\.01 there, 0\.02 here",
    ),
    "betas": ({"optimizer": partial(Adam, lr=1e-2, betas=(0.5, 0.999))}, r"group\[0\]\.betas\[0\]"),
    "decay": ({"optimizer": partial(Adam, lr=1e-2, weight_decay=0.1)}, r"group\[0\]\.weight_decay"),
    "rates": ({"rates": {"head.": 0.1}}, r"optimizer's group"),
    "moves": ({"moves": ("head.",)}, r"optimizer's group\[0\]\.params\[0\]"),
    "first": ({"first": 3}, "first step is 0 there, 3 here"),
    "stop": ({"stop": early_stopping(lambda phi: 0.0)}, "early stopping"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run(path, 4)
    return path


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_and_the_file_stays(kept, name):
    changed, words = OTHER[name]
    before = kept.read_bytes()
    for steps in (4, 6):  # even if all its steps are done
        with pytest.raises(ValueError, match=f"another run: .*{words}.*load_params"):
            run(kept, steps, **changed)
    assert kept.read_bytes() == before


def test_a_sweep_on_one_file_does_not_print_one_loss_thrice(tmp_path):
    run(tmp_path / "one", 3, objective=goal(0.1))
    for rate in (0.01, 0.001):
        with pytest.raises(ValueError, match="another run"):
            run(tmp_path / "one", 3, objective=goal(rate))


PLANS = {
    "cosine": (
        lambda n: lambda o: CosineAnnealingLR(o, n),
        r"schedule's setting\.T_max is 10 there, 20 here",
    ),
    "stairs": (lambda n: lambda o: StepLR(o, n), "schedule's setting.step_size"),
    "a function": (
        lambda n: lambda o: LambdaLR(o, lambda j: 1 - j / n),
        "schedule's rate 1 steps on",
    ),
    "later alone": (
        lambda n: lambda o: LambdaLR(o, lambda j: 1.0 if j < 8 else 1 / n),
        "rate 8 steps on",
    ),
    "one cycle": (lambda n: lambda o: OneCycleLR(o, 0.1, total_steps=n), "another run"),
}


@pytest.mark.parametrize("name", PLANS)
def test_another_schedule_is_seen_also_before_it_differs(tmp_path, name):
    make, words = PLANS[name]
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(path, 10, schedule=make(10), stream=interrupted(4))
    assert read(path).facts["step"] == 4
    with pytest.raises(ValueError, match=words):
        run(path, 10, schedule=make(20))
    whole_run = run(None, 10, schedule=make(10))
    resumed = run(path, 10, schedule=make(10))
    assert same(resumed.params, whole_run.params) and resumed.losses == whole_run.losses


def interrupted(at, error=KeyboardInterrupt):
    """STREAM until a step at which someone presses "Stop"."""

    def stream(step):
        if step == at:
            raise error
        return STREAM(step)

    return stream


def test_more_steps_are_the_same_run_unless_the_schedule_counts_them(tmp_path):
    path = tmp_path / "run"
    run(path, 5)
    assert same(run(path, 9).params, run(None, 9).params)
    fading = tmp_path / "fading"
    fit(goal(), PHI, STREAM, 5, checkpoint=fading, **cosine_adam(1e-2, 5))
    with pytest.raises(ValueError, match="T_max"):
        fit(goal(), PHI, STREAM, 9, checkpoint=fading, **cosine_adam(1e-2, 9))


def test_going_on_with_other_settings_is_said_in_so_many_words(kept, tmp_path):
    on = run(tmp_path / "new", 3, params=load_params(kept), objective=goal(0.02), first=4)
    assert same(
        on.params, run(None, 3, params=run(None, 4).params, objective=goal(0.02), first=4).params
    )


def test_dropout_is_computed_anew_exactly_and_foreign_randomness_is_named(tmp_path):
    drop = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    stream = quiz(STREAM)
    go = partial(fit, joint(drop, mse_loss), parameters(drop), stream)
    go(3, checkpoint=tmp_path / "run")
    assert same(go(6, checkpoint=tmp_path / "run").params, go(6).params)
    noise = np.random.default_rng(0)
    noisy = whole(lambda phi, b: (phi["w"] * b.x * (1 + noise.random())).square().sum())
    go = partial(fit, noisy, {"w": torch.ones(1)}, stream, checkpoint=tmp_path / "noise")
    go(2)
    with pytest.raises(ValueError, match="random numbers come from elsewhere than torch"):
        go(4)


def test_the_check_costs_one_gradient_and_a_fresh_run_none(tmp_path):
    objective, asked = goal(), []

    def counted(phi, data):
        asked.append(1)
        return objective.value_and_grad(phi, data)

    counting = objective._replace(value_and_grad=counted)
    run(tmp_path / "run", 4, objective=counting)
    assert len(asked) == 4
    run(tmp_path / "run", 7, objective=counting)
    assert len(asked) == 4 + 1 + 3


# Files that were changed -------------------------------------------------------------------------


CHANGES = {
    "no step": lambda t, f: f.pop("step"),
    "step of a word": lambda t, f: f.update(step="4"),
    "half a step": lambda t, f: f.update(step=4.5),
    "a step that is true": lambda t, f: f.update(step=True),
    "negative": lambda t, f: f.update(step=-1),
    "more steps than losses": lambda t, f: f.update(step=7),
    "losses cut": lambda t, f: t.update(losses=t["losses"][:2]),
    "no losses": lambda t, f: t.pop("losses"),
    "no seconds": lambda t, f: f.pop("seconds"),
    "no identity": lambda t, f: f.pop("identity"),
    "identity of a word": lambda t, f: f.update(identity="mine"),
    "empty identity": lambda t, f: f.update(identity={}),
    "no evidence": lambda t, f: f.pop("evidence"),
    "evidence of nothing": lambda t, f: f.update(evidence=None),
    "evidence of another form": lambda t, f: f.update(evidence={"loss": 1.0, "gradient": [1]}),
    "evidence without a loss": lambda t, f: f["evidence"].pop("loss"),
    "evidence without a device": lambda t, f: f["evidence"].pop("device"),
    "no groups": lambda t, f: f.pop("groups"),
    "fewer groups": lambda t, f: f.update(groups=[]),
    "groups of words": lambda t, f: f.update(groups=["a"]),
    "group without a rate": lambda t, f: f["groups"][0].pop("lr"),
    "group with a word as rate": lambda t, f: f["groups"][0].update(lr="fast"),
    "group with a word in betas": lambda t, f: f["groups"][0].update(betas=[0.9, "b"]),
    "group with fewer betas": lambda t, f: f["groups"][0].update(betas=[0.9]),
    "group with no rate": lambda t, f: f["groups"][0].update(lr=math.nan),
    "numbers of a list": lambda t, f: f.update(numbers=[]),
    "numbers of words": lambda t, f: f.update(numbers={"a": {}}),
    "numbers of no entry": lambda t, f: f.update(numbers={"99": {}}),
    "no optimizer state": lambda t, f: [t.pop(k) for k in list(t) if k.startswith("optimizer/")],
    "one state missing": lambda t, f: t.pop("optimizer/1/exp_avg"),
    "a state of another shape": lambda t, f: t.update({"optimizer/0/exp_avg": torch.zeros(3)}),
    "a state of no entry": lambda t, f: t.update({"optimizer/x/exp_avg": torch.zeros(3)}),
    "a parameter missing": lambda t, f: t.pop("params/head.bias"),
    "best without φ": lambda t, f: f.update(best=[2, 0.5]),
    "best of words": lambda t, f: f.update(best="good"),
    "an older form": lambda t, f: [f.pop("format"), f.pop("evidence"), f.pop("identity")],
    "format": lambda t, f: f.update(format=[1]),
    "torch": lambda t, f: f.update(torch=None),
    "no list of tensors": lambda t, f: f.update(tensors=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_facts_changed_by_hand_are_a_value_error(kept, tmp_path, name):
    tensors, facts = read(kept)
    CHANGES[name](tensors, facts)
    write(tmp_path / "run", Checkpoint(tensors, facts))
    with pytest.raises(ValueError, match=r"run (is|was|holds)|learning rates"):
        run(tmp_path / "run", 6)


def test_a_file_of_parameters_is_no_run(tmp_path):
    save_params(tmp_path / "phi", PHI)
    with pytest.raises(ValueError, match=r"holds parameters.*load_params"):
        run(tmp_path / "phi", 6)
    with pytest.raises(ValueError, match="a folder"):
        run(tmp_path, 6)
    with pytest.raises(ValueError, match="a folder"):
        run("", 6)


# In pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [None, lambda o: StepLR(o, 7, 0.5)])
def test_pieces_with_sgd_are_one_run_to_the_bit(plan):
    drop = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def objective(step):  # of the step, with random numbers of (seed, step)
        return joint(drop, mse_loss, (0.1 + 0.01 * step, 0.1, 0.1, 0.1))

    go = partial(fit, objective, stream=quiz(STREAM), optimizer=SLOW, schedule=plan)
    one, phi, losses = go(parameters(drop), steps=20), parameters(drop), []
    for k in range(4):
        piece = go(phi, steps=5, first=5 * k)
        phi, losses = piece.params, losses + piece.losses
    assert same(phi, one.params) and losses == one.losses


def test_pieces_see_other_items_and_without_first_the_same():
    seen = []

    def stream(step):
        seen.append(step)
        return STREAM(step)

    for k in range(3):
        fit(goal(), PHI, stream, 4, first=4 * k)
    assert set(seen) == set(range(12))


def test_a_piece_resumes_as_it_began(tmp_path):
    go = partial(run, first=7, schedule=lambda o: CosineAnnealingLR(o, 30))
    go(tmp_path / "run", 3)
    resumed, one = go(tmp_path / "run", 8), go(None, 8)
    assert (
        same(resumed.params, one.params) and resumed.losses == one.losses and len(one.losses) == 8
    )


# Saving ------------------------------------------------------------------------------------------


def test_saving_by_time(tmp_path, monkeypatch):
    path, saved = tmp_path / "run", []
    plain = train.Trainee.save
    monkeypatch.setattr(
        train.Trainee, "save", lambda self, p: (saved.append(len(self.losses)), plain(self, p))
    )
    slow = lambda step: (time.sleep(0.02), STREAM(step))[1]  # noqa: E731
    run(path, 12, stream=slow, every=timedelta(seconds=0.1))
    assert 2 <= len(saved) <= 5 and saved[-1] == 12 and read(path).facts["step"] == 12
    saved.clear()
    run(tmp_path / "two", 5, every=timedelta(hours=1))
    assert saved == [5]


def test_stop_in_jupyter_saves_the_last_whole_step(tmp_path):
    for at in (1, 5, 9):
        path = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            run(path, 20, stream=interrupted(at))
        assert read(path).facts["step"] == at
        assert same(load_params(path), run(None, at).params)
        assert same(run(path, 20).params, run(None, 20).params)


def test_an_interrupted_update_is_not_saved(tmp_path):
    class Torn(SGD):
        taken = 0

        def step(self, closure=None):
            Torn.taken += 1
            if Torn.taken == 8:
                self.param_groups[0]["params"][0].data.add_(1.0)
                raise KeyboardInterrupt
            return super().step()

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(path, 20, optimizer=partial(Torn, lr=0.01), every=5)
    assert read(path).facts["step"] == 5
    Torn.taken = 100
    torn = partial(Torn, lr=0.01)
    assert same(run(path, 20, optimizer=torn).params, run(None, 20, optimizer=torn).params)


def test_other_errors_save_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", 20, stream=interrupted(3, ZeroDivisionError))
    assert not (tmp_path / "run").exists()


def terminated(at):
    def stream(step):
        if step == at and not terminated.sent:
            terminated.sent = True
            signal.raise_signal(signal.SIGTERM)
        return STREAM(step)

    terminated.sent = False
    return stream


class Ended(BaseException):
    pass


def test_sigterm_ends_the_step_saves_and_goes_to_the_handler_from_before(tmp_path):
    path, seen = tmp_path / "run", []

    def handler(number, frame):
        seen.append(read(path).facts["step"])
        if len(seen) == 1:
            raise Ended

    old = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Ended):
            run(path, 20, stream=terminated(6))
        assert seen == [7] and signal.getsignal(signal.SIGTERM) is handler
        resumed = run(
            path, 20, stream=terminated(12)
        )  # this time the handler returns: training goes on
        assert seen == [7, 13] and same(resumed.params, run(None, 20).params)
        assert signal.getsignal(signal.SIGTERM) is handler
        fit(goal(), PHI, STREAM, 2)
    finally:
        signal.signal(signal.SIGTERM, old)


def test_in_another_thread_signals_are_left_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "run", 4)))
    thread.start()
    thread.join()
    assert len(found[0].losses) == 4
    assert not Termination(False).here


TERMINATED = """
import sys, time
from datetime import timedelta
from functools import partial
import torch
from torch.nn.functional import mse_loss
from mtlib.bilevel import bilevel
from mtlib.core import parameters
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.gradient import maml
from mtlib.nets import mlp
from mtlib.run.processes import processes
from mtlib.train import fit
torch.set_num_threads(1)
net, stream = mlp(1, (8,), 1, seed=0), sinusoids(5, 5, 4, 0)
tell = lambda step, phi, value, gradient: print(step, flush=True)
with processes():
    fit(bilevel(maml(net, mse_loss, 0.01, 1), mse_loss), parameters(net), stream, 100000, checkpoint=sys.argv[1],
        optimizer=partial(torch.optim.Adam, lr=1e-2), every=timedelta(hours=1), hook=tell, progress=False)
"""


def test_sigterm_kills_as_it_would_and_no_step_is_lost(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", TERMINATED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(8):
            process.stdout.readline()
        process.terminate()
        rest = process.stdout.read().split()
    assert process.returncode == -signal.SIGTERM
    done = read(path).facts["step"]
    assert done == (int(rest[-1]) + 1 if rest else 8)
    assert same(load_params(path), run(None, done).params)


# Early stopping ----------------------------------------------------------------------------------


def distance(phi):
    """Higher is better: least at a φ that training passes by."""
    return -abs(phi["head.bias"].item() - TARGET)


TARGET = fit(goal(), PHI, STREAM, 12, partial(Adam, lr=1e-2)).params["head.bias"].item()


def path_of(steps):
    """φ after each step."""
    found = []
    fit(
        goal(),
        PHI,
        STREAM,
        steps,
        partial(Adam, lr=1e-2),
        hook=lambda s, phi, v, g: found.append(phi),
    )
    return found


def test_the_best_phi_is_kept_and_patience_ends_the_run():
    looks = {4 * (k + 1): distance(phi) for k, phi in enumerate(path_of(60)[3::4])}
    best = max(looks, key=looks.get)
    found = run(None, 60, stop=early_stopping(distance, every=4, patience=3))
    assert best == 12 and found.best == (best, looks[best])
    assert len(found.losses) == best + 12
    assert same(found.params, run(None, best).params)
    assert found.losses == run(None, best + 12).losses
    never = run(None, 3, stop=early_stopping(distance, every=4))
    assert never.best is None and same(never.params, run(None, 3).params)


@pytest.mark.parametrize("cut", [3, 4, 9, 12, 16, 24])
def test_early_stopping_resumes_exactly(tmp_path, cut):
    path = tmp_path / "run"
    go = partial(run, stop=early_stopping(distance, every=4, patience=3))
    one = go(None, 60)
    go(path, cut)
    resumed = go(path, 60)
    assert resumed.best == one.best and resumed.losses == one.losses
    assert same(resumed.params, one.params) and same(load_params(path), one.params)
    assert same(go(path, 60).params, one.params)
    more = run(path, 60, stop=early_stopping(distance, every=4, patience=20))
    assert len(more.losses) == 60 and more.losses == run(None, 60).losses


def test_nan_is_never_best_and_a_score_is_a_quality():
    said = iter([math.nan, 1.0, math.nan, 2.0, math.nan, math.nan, math.nan, 9.0])
    found = run(None, 80, stop=early_stopping(lambda phi: next(said), every=2, patience=3))
    assert found.best == (8, 2.0) and len(found.losses) == 14
    with pytest.raises(Diverged, match="NaN at every look") as caught:
        run(None, 80, stop=early_stopping(lambda phi: math.nan, every=2, patience=3))
    assert len(caught.value.run.losses) == 6
    learner = maml(net(), mse_loss, 0.01, 1)

    def error(phi):
        return -evaluate(
            learner, phi, STREAM, 8, lambda p, y: (p - y).square().mean(), progress=False
        )

    found = run(None, 8, stop=early_stopping(error, every=4))
    assert found.best.quality == error(found.params).mean
    with pytest.raises(TypeError, match="a number or a Score"):
        run(None, 8, stop=early_stopping(lambda phi: "good", every=4))


# Several processes -------------------------------------------------------------------------------

TWO = """
import json, sys
from datetime import timedelta
from pathlib import Path
from test_runs import *
from mtlib.run.processes import processes, rank

def caught(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"

def fails(phi):
    raise ZeroDivisionError("no validation data")

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with processes():
    wait = partial(run, stop=early_stopping(distance, every=4, patience=3))
    wait(folder / "stopped", 9, every=timedelta(seconds=0.001))
    one = wait(folder / "stopped", 60)
    torch.manual_seed(0)
    drop = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    dropping = partial(fit, joint(drop, mse_loss), parameters(drop), quiz(STREAM))
    dropping(3, checkpoint=folder / "drop")
    hooked = []
    run(folder / "alone", 6, hook=lambda *step: hooked.append(step[0]))
    said = {
        "best": one.best, "steps": len(one.losses), "hooked": hooked,
        "other": caught(lambda: run(folder / "alone", 8, objective=goal(0.02))),
        "missing": caught(lambda: run(folder / ("alone" if rank() else "none"), 8)),
        "damaged": caught(lambda: run(folder / ("damaged" if rank() else "none"), 8)),
        "quality": caught(lambda: run(None, 8, stop=early_stopping(fails, every=2))),
        "first": caught(lambda: run(None, 8, first=rank())),
        "again": len(run(folder / "alone", 8).losses),
    }
    (folder / f"said{rank()}").write_text(json.dumps(said))
    save_params(folder / f"phi{rank()}", one.params)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "damaged").write_bytes(b"nothing")
    assert launch(TWO, folder).wait(timeout=240) == 0
    return folder, [json.loads((folder / f"said{r}").read_text()) for r in (0, 1)]


def launch(script, folder, **options):
    (folder / "script.py").write_text(script, "utf8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": here}
    command += [str(folder / "script.py"), str(folder)]
    return subprocess.Popen(command, env={**os.environ, **settings}, text=True, **options)


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_two_processes_stop_where_one_does_and_agree(two):
    folder, said = two
    one = run(None, 60, stop=early_stopping(distance, every=4, patience=3))
    for r in (0, 1):
        assert said[r]["best"] == pytest.approx(list(one.best), abs=1e-6)
        assert said[r]["steps"] == len(one.losses)
        assert close(load_params(folder / f"phi{r}"), one.params)
    assert close(load_params(folder / "stopped"), one.params)
    assert said[0]["hooked"] == [0, 1, 2, 3, 4, 5] and said[1]["hooked"] == []


def test_two_processes_refuse_together(two):
    _, (first, second) = two
    assert "another run: the first step's loss" in first["other"]
    for name in ("missing", "damaged", "other"):
        assert all(s[name].startswith("ValueError") for s in (first, second)), (first, second)
    assert "failed" in second["other"] and "failed" in first["damaged"]
    assert "step lies between" in first["missing"] and "is damaged" in second["damaged"]
    assert first["quality"] == "ZeroDivisionError: no validation data"
    assert second["quality"].startswith("RuntimeError: quality")
    assert "first step lies between" in first["first"]
    assert first["again"] == second["again"] == 8


def test_what_two_wrote_one_goes_on_with(two):
    folder, _ = two
    assert close(run(folder / "alone", 12).params, run(None, 12).params)
    torch.manual_seed(0)
    drop = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    dropping = partial(fit, joint(drop, mse_loss), parameters(drop), quiz(STREAM))
    assert len(dropping(5, checkpoint=folder / "drop").losses) == 5  # rank 0's seed, all tasks


def test_sigterm_to_two_processes_loses_no_step(tmp_path):
    script = TERMINATED.replace("sys.argv[1]", "sys.argv[1] + '/run'")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with launch(script, tmp_path, **options) as process:
        for _ in range(8):
            process.stdout.readline()
        process.terminate()  # torchrun passes it on
        rest = process.stdout.read().split()
    assert process.returncode != 0
    done = read(tmp_path / "run").facts["step"]
    assert done == (int(rest[-1]) + 1 if rest else 8)
    assert close(load_params(tmp_path / "run"), run(None, done).params)


# Each step ---------------------------------------------------------------------------------------


def test_a_hook_sees_each_step_and_changes_nothing():
    seen, kept_gradients = [], []

    def hook(step, phi, value, gradient):
        seen.append((step, phi, value))
        kept_gradients.append(gradient)
        for v in (*phi.values(), *gradient.values()):
            assert not v.requires_grad
        return True

    one = fit(goal(), PHI, STREAM, 5, SLOW, hook=hook, first=2)
    assert [s for s, _, _ in seen] == [2, 3, 4, 5, 6] and [v for _, _, v in seen] == one.losses
    assert same(seen[-1][1], one.params) and not same(seen[0][1], seen[1][1])
    value, gradient = goal().value_and_grad(seen[0][1], STREAM(3))
    assert value.item() == seen[1][2] and same(gradient, kept_gradients[1])

    def spoil(step, phi, value, gradient):
        for v in (*phi.values(), *gradient.values()):
            v.fill_(7.0)

    assert same(fit(goal(), PHI, STREAM, 5, SLOW, hook=spoil, first=2).params, one.params)


# What is no input --------------------------------------------------------------------------------


def of(**changed):
    given = {"objective": goal(), "params": PHI, "stream": STREAM, "steps": 3, "optimizer": SLOW}
    return lambda: fit(**{**given, **changed})


def at(step, change):
    return lambda s: change(STREAM(s)) if s == step else STREAM(s)


def impure():
    rng = np.random.default_rng(0)
    return lambda step: sinusoids(5, 5, 4, int(rng.integers(100)))(step)


class NeedsClosure(SGD):
    def step(self, closure):
        closure()


GIVEN = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
LOADER = torch.utils.data.DataLoader(torch.zeros(4, 1))
CONSTANT = whole(lambda phi, data: data.query.y.square().mean())
CUT = whole(lambda phi, data: sum(v.detach().sum() for v in phi.values()))
BAD = {
    "a loss of no φ": (of(objective=CONSTANT), ValueError, "no gradient reaches φ's entries"),
    "a loss cut off": (of(objective=CUT), ValueError, "no gradient reaches φ's entries"),
    "moves that nothing reaches": (
        of(objective=bilevel(protonet(net()), mse_loss), moves=("head.",)),
        ValueError,
        r"no gradient reaches the entries of φ named head\.\*",
    ),
    "rates that nothing reaches": (
        of(objective=bilevel(protonet(net()), mse_loss), rates={"head.": 0.1}),
        ValueError,
        r"no gradient reaches the entries of φ named head\.\*",
    ),
    "a word as moves": (of(moves="head."), TypeError, r"moves as prefixes, \('head\.',\)"),
    "a negative rate": (of(rates={"head.": -0.1}), ValueError, "rates of at least 0, got -0.1"),
    "a rate of NaN": (of(rates={"head.": math.nan}), ValueError, "rates of at least 0, got nan"),
    "a negative outer rate": (
        of(optimizer=partial(SGD, lr=-1.0)),
        ValueError,
        "optimizer= gives no",
    ),
    "an infinite outer rate": (
        of(optimizer=partial(SGD, lr=math.inf)),
        ValueError,
        "rates of at least 0",
    ),
    "a schedule below 0": (
        of(schedule=lambda o: LambdaLR(o, lambda j: 1.0 - j), steps=9),
        ValueError,
        "rates of at least 0, got -0.01 after 2 steps",
    ),
    "an impure stream": (of(stream=impure()), ValueError, "expected a pure stream"),
    "numpy at step 2": (
        of(stream=at(2, lambda d: d._replace(query=Batch(*(v.numpy() for v in d.query))))),
        TypeError,
        r"stream\(2\): expected x of the query set to be a tensor",
    ),
    "a batch at step 2": (of(stream=at(2, lambda d: d.query)), ValueError, r"stream\(2\) Batch of"),
    "a tuple at step 2": (
        of(stream=at(2, tuple)),
        TypeError,
        r"stream\(2\): expected a stream that",
    ),
    "float64 at step 2": (
        of(stream=at(2, lambda d: Episode(*(Batch(p.x.double(), p.y.double()) for p in d)))),
        ValueError,
        r"stream\(2\) Episode of float64",
    ),
    "an axis more at step 2": (
        of(stream=at(2, lambda d: Episode(*(Batch(p.x[..., None], p.y) for p in d)))),
        ValueError,
        r"stream\(2\) Episode of float32 with 4 axes",
    ),
    "wider items at step 2": (
        of(stream=at(2, lambda d: Episode(*(Batch(p.x.repeat(1, 1, 2), p.y) for p in d)))),
        ValueError,
        r"stream\(2\) has shapes .*\(4, 5, 2\).*stream\(0\) had",
    ),
    "wider targets at step 2": (
        of(stream=at(2, lambda d: Episode(*(Batch(p.x, p.y.repeat(1, 1, 2)) for p in d)))),
        ValueError,
        r"stream\(2\) has shapes .*\(4, 5, 2\).*stream\(0\) had",
    ),
    "rows that do not fit at step 2": (
        of(stream=at(2, lambda d: Episode(*(Batch(p.x, p.y[:, :1]) for p in d)))),
        ValueError,
        r"stream\(2\): expected x \(T, rows",
    ),
    "a loader": (of(stream=LOADER), TypeError, r"got a DataLoader.*`lambda step: \.\.\.`"),
    "a list": (of(stream=[STREAM(0)]), TypeError, r"got a list.*`lambda step: \.\.\.`"),
    "a module as φ": (of(params=net()), TypeError, r"parameters\(net\)"),
    "a list as φ": (of(params=list(PHI.values())), TypeError, "a dict of tensors, got a list"),
    "an empty φ": (of(params={}), ValueError, "an empty dict"),
    "whole numbers in φ": (
        of(params={**PHI, "n": torch.ones(2, dtype=torch.int64)}),
        TypeError,
        "n of torch.int64",
    ),
    "complex numbers in φ": (
        of(params={**PHI, "z": torch.ones(2, dtype=torch.complex64)}),
        TypeError,
        "z of",
    ),
    "numbers in φ": (of(params={**PHI, "a": 1.0}), TypeError, "'a': float"),
    "numbers as names": (of(params={0: torch.ones(1)}), TypeError, "0: Tensor"),
    "NaN in φ": (of(params={**PHI, "a": torch.tensor([1.0, math.nan])}), ValueError, "φ's entry a"),
    "steps of a half": (of(steps=2.5), TypeError, "steps to be a whole number, got 2.5"),
    "true steps": (of(steps=True), TypeError, "steps to be a whole number"),
    "negative steps": (of(steps=-1), ValueError, "steps ≥ 0"),
    "a negative first": (of(first=-1), ValueError, "first ≥ 0"),
    "a true seed": (of(seed=True), TypeError, "seed to be a whole number"),
    "no seed": (of(seed=None), TypeError, "seed to be a whole number"),
    "a negative seed": (of(seed=-1), ValueError, "seed ≥ 0"),
    "a seed of a half": (of(seed=1.5), TypeError, "seed to be a whole number"),
    "a huge seed": (of(seed=2**60), ValueError, "below 2⁴³"),
    "every 0": (of(every=0), ValueError, "every ≥ 1"),
    "every half": (of(every=0.5), TypeError, "a timedelta"),
    "every 0 seconds": (of(every=timedelta(0)), ValueError, "longer than 0"),
    "an optimizer": (
        of(optimizer=GIVEN),
        TypeError,
        r"partial\(torch.optim.SGD, lr=0.1\).*SGD itself",
    ),
    "a class": (of(optimizer=SGD), TypeError, "SGD without a rate"),
    "a word": (of(optimizer="adam"), TypeError, "function of φ's entries"),
    "L-BFGS": (
        of(optimizer=partial(torch.optim.LBFGS, lr=0.1)),
        TypeError,
        "takes no closure, got LBFGS",
    ),
    "a closure": (of(optimizer=partial(NeedsClosure, lr=0.1)), TypeError, "takes no closure"),
    "other parameters": (of(optimizer=lambda entries: GIVEN), ValueError, "over other tensors"),
    "no optimizer": (
        of(optimizer=lambda entries: None),
        TypeError,
        "a torch Optimizer, got a NoneType",
    ),
    "a plateau": (of(schedule=ReduceLROnPlateau), TypeError, "waits for a metric"),
    "a schedule": (of(schedule=StepLR(GIVEN, 3)), TypeError, "function of the optimizer"),
    "another's schedule": (
        of(schedule=lambda o: StepLR(GIVEN, 3)),
        ValueError,
        "another optimizer",
    ),
    "no schedule": (of(schedule=lambda o: 0.1), TypeError, "a torch LRScheduler, got a float"),
    "a loss": (of(objective=mse_loss), TypeError, r"`bilevel\(learner, loss\)`"),
    "a learner": (of(objective=maml(net(), mse_loss, 0.1, 1)), TypeError, "got a Learner"),
    "a network": (of(objective=net()), TypeError, r"`joint\(net, loss\)`"),
    "a function of the step that gives a loss": (
        of(objective=lambda step: mse_loss),
        TypeError,
        r"from objective\(0\), got a function",
    ),
    "a device": (of(device="gpu"), ValueError, "a device that is here, got 'gpu'"),
    "a function to stop": (of(stop=lambda phi: 1.0), TypeError, "stop=early_stopping"),
    "patience": (lambda: early_stopping(len, patience=0), ValueError, "patience"),
    "quality": (lambda: early_stopping(0.5), TypeError, "quality"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    work, kind, words = BAD[name]
    with pytest.raises(kind, match=f"(?s){words}") as caught:
        work()
    assert caught.type in (TypeError, ValueError)


def test_what_may_change_from_draw_to_draw():
    """The number of tasks and of rows may; the objective is a mean over them."""

    def stream(step):
        return sinusoids(3 + step, 4, 2 + step, 0)(step)

    assert len(fit(goal(), PHI, stream, 4).losses) == 4


def test_what_may_be_given_as_phi():
    wanted = fit(goal(), PHI, STREAM, 3).params
    entries = {k: nn.Parameter(v.clone()) for k, v in PHI.items()}
    assert same(fit(goal(), entries, STREAM, 3).params, wanted)
    flat = torch.cat([v.flatten() for v in PHI.values()])
    views = flat.split([v.numel() for v in PHI.values()])
    views = {k: p.view(v.shape) for (k, v), p in zip(PHI.items(), views, strict=True)}
    assert same(fit(goal(), views, STREAM, 3).params, wanted)
    assert torch.equal(flat, torch.cat([v.flatten() for v in PHI.values()]))
    spread = {**PHI, "head.weight": torch.ones(1, 1).expand(1, 8)}
    dense = {**PHI, "head.weight": torch.ones(1, 8)}
    assert same(fit(goal(), spread, STREAM, 3).params, fit(goal(), dense, STREAM, 3).params)


def test_decay_moves_no_entry_without_a_gradient():
    decayed = partial(SGD, lr=0.1, weight_decay=0.5, momentum=0.9)
    phi = {**PHI, "unused": torch.ones(3)}
    assert torch.equal(fit(goal(), phi, STREAM, 3, decayed).params["unused"], torch.ones(3))


# Parameters alone --------------------------------------------------------------------------------


def test_parameters_come_back_as_they_were(tmp_path):
    w = torch.randn(4, 6)
    phi = {
        "transposed": w.T,
        "strided": w[:, ::2],
        "tied": w,
        "tied again": w,
        "expanded": torch.ones(1).expand(5),
        "leaf": nn.Parameter(torch.randn(2)),
        "half": torch.randn(3).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "numbers": torch.arange(4),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "negated": torch.randn(2, dtype=torch.complex64).conj().imag,
        "odd/name. α\n\"'{}": torch.ones(2),
        "": torch.ones(1),
        "params/x": torch.ones(1),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
    }
    save_params(tmp_path / "phi", phi, best=0.5, note="ö")
    found = load_params(tmp_path / "phi")
    assert set(found) == set(phi) and read(tmp_path / "phi").facts["best"] == 0.5
    for k, v in phi.items():
        assert (
            found[k].dtype == v.dtype and found[k].shape == v.shape and not found[k].requires_grad
        )
        assert torch.equal(found[k].nan_to_num(7), v.detach().nan_to_num(7)), k
    found["tied"].zero_()
    assert torch.equal(found["tied again"], w)


@pytest.mark.parametrize(
    ("params", "facts", "kind", "words"),
    [
        ({"a": 1.0}, {}, TypeError, "a tensor for params/a, got float"),
        ({"a": np.ones(2)}, {}, TypeError, "got ndarray"),
        ({1: torch.ones(2)}, {}, ValueError, "words as names"),
        ({}, {}, ValueError, "words as names, got"),
        ([torch.ones(2)], {}, TypeError, "got a list"),
        (net(), {}, TypeError, r"parameters\(net\)"),
        ({"a": torch.eye(2).to_sparse()}, {}, ValueError, "a dense tensor for params/a"),
        ({"a": torch.ones(2, device="meta")}, {}, ValueError, "no data"),
        ({"a\ud800": torch.ones(2)}, {}, ValueError, "cannot keep"),
        ({"a": torch.ones(2)}, {"made": object()}, TypeError, "facts that JSON can hold"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, params, facts, kind, words):
    with pytest.raises(kind, match=words):
        save_params(tmp_path / "phi", params, **facts)
    assert not (tmp_path / "phi").exists()


def test_a_file_without_parameters_is_none(tmp_path):
    write(tmp_path / "file", Checkpoint({"w": torch.ones(2)}, {}))
    with pytest.raises(ValueError, match="expected parameters in"):
        load_params(tmp_path / "file")
    with pytest.raises(ValueError, match="the folder"):
        save_params(tmp_path, PHI)
    with pytest.raises(ValueError, match="a folder"):
        load_params(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_run_moves_between_devices(tmp_path):
    run(tmp_path / "run", 4)
    there = run(tmp_path / "run", 8, device="cuda")
    assert all(
        torch.allclose(there.params[k].cpu(), v, atol=1e-4) for k, v in run(None, 8).params.items()
    )
    assert all(not v.is_cuda for v in load_params(tmp_path / "run").values())
    with pytest.raises(ValueError, match="first step's loss"):
        run(tmp_path / "run", 9, device="cuda", objective=goal(0.1))
