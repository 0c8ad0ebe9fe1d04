"""`fit`: learns, resumes to the bit, survives being killed, and says what diverged."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, over, parameters
from mtlib.data.planted import planted
from mtlib.data.sinusoids import sinusoids
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.run.checkpoint import load_params, read, save_params, write
from mtlib.tasks import episodes, quiz
from mtlib.train import Diverged, fit

fit = partial(fit, progress=False)


@pytest.fixture
def task():
    torch.manual_seed(0)
    learner = maml(mlp(1, (8,), 1), mse_loss, 0.01, 1)
    return bilevel(learner, mse_loss), learner.init(), sinusoids(5, 5, 4, 0)


OPTIMIZERS = {
    "adam": (partial(torch.optim.Adam, lr=1e-2), None),
    "sgd": (partial(torch.optim.SGD, lr=1e-2), None),
    "momentum, cosine": (
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=1e-3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    ),
    "adamw, amsgrad, steps": (
        partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 30], 0.1),
    ),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_step_of_sgd_is_the_equation(task):
    objective, phi, stream = task
    run = fit(objective, phi, stream, 1, partial(torch.optim.SGD, lr=0.1))
    value, grads = objective.value_and_grad(phi, stream(0))
    assert run.losses == [value.item()]
    assert all(torch.allclose(run.params[k], phi[k] - 0.1 * grads[k], atol=1e-7) for k in phi)


def test_an_objective_may_follow_the_step(task):
    _, phi, stream = task
    net = mlp(1, (8,), 1)
    plain, batches = joint(net, mse_loss, (1.0, 1.0, 1.0, 1.0)), quiz(stream)
    halved = joint(net, mse_loss, (0.5, 0.5, 0.5, 0.5))
    sgd = partial(torch.optim.SGD, lr=0.1)
    run = fit(lambda step: plain if step == 0 else halved, phi, batches, 2, sgd)
    first = fit(plain, phi, batches, 1, sgd)
    value, grads = halved.value_and_grad(first.params, batches(1))
    assert run.losses == [first.losses[0], value.item()]
    assert all(
        torch.allclose(run.params[k], first.params[k] - 0.1 * grads[k], atol=1e-7) for k in phi
    )


def test_params_are_not_changed_in_place(task):
    objective, phi, stream = task
    before = {k: v.clone() for k, v in phi.items()}
    run = fit(objective, phi, stream, 3)
    assert same(phi, before) and not same(phi, run.params)
    assert all(not v.requires_grad and v.grad is None for v in run.params.values())


def test_protonet_learns_planted_classes():
    torch.manual_seed(0)
    learner = protonet(mlp(30, (64, 32), 5))
    stream = episodes(planted(64, 40, seed=0), 5, 1, 5, tasks=8, seed=0)
    test = episodes(planted(40, 40, seed=1), 5, 1, 10, tasks=50, seed=1)
    phi = learner.init()
    run = fit(bilevel(learner, cross_entropy), phi, stream, 300)
    before, after = (evaluate(learner, p, test, 200, progress=False) for p in (phi, run.params))
    assert after.mean > before.mean + 0.2 and after.mean > 0.75


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cut", [1, 17])
def test_resuming_equals_the_uninterrupted_run(task, tmp_path, name, cut):
    objective, phi, stream = task
    optimizer, schedule = OPTIMIZERS[name]
    go = partial(fit, objective, phi, stream, optimizer=optimizer, schedule=schedule, every=5)
    whole, path = go(steps=40), tmp_path / "run.safetensors"
    go(steps=cut, checkpoint=path)
    assert read(path).facts["step"] == cut
    resumed = go(steps=40, checkpoint=path)
    assert same(whole.params, resumed.params) and whole.losses == resumed.losses
    assert same(
        go(steps=40, checkpoint=path).params, whole.params
    )  # already done: read, not trained


def test_random_draws_of_the_network_resume_too(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    objective, stream = joint(net, mse_loss), quiz(sinusoids(5, 5, 4, 0))
    go = partial(fit, objective, parameters(net), stream)
    state = torch.get_rng_state()
    whole = go(30)
    assert torch.equal(torch.get_rng_state(), state)  # given back
    go(12, checkpoint=tmp_path / "run.safetensors")
    torch.manual_seed(123)
    assert same(go(30, checkpoint=tmp_path / "run.safetensors").params, whole.params)
    assert not same(go(30, seed=1).params, whole.params)


KILLED = """
import os, signal, sys, torch
from torch.nn.functional import mse_loss
from mtlib.bilevel import bilevel
from mtlib.run.checkpoint import save_params
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.gradient import maml
from mtlib.nets import mlp
from mtlib.train import fit
torch.set_num_threads(1)

def train(steps, checkpoint):
    torch.manual_seed(0)
    learner = maml(mlp(1, (40, 40), 1), mse_loss, 0.01, 1)
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2000)
    return fit(bilevel(learner, mse_loss), learner.init(), sinusoids(10, 10, 4, 0), steps, schedule=schedule,
               checkpoint=checkpoint, every=3, progress=False)

train(3, None)  # what torch loads on first use
for line in sys.stdin:  # one line, one process, so that torch is loaded once
    checkpoint, out = line.split()
    pid = os.fork()
    if pid == 0:
        run = train(2000, None if checkpoint == "none" else checkpoint)
        if out == "none":
            signal.pause()  # whoever is to be killed waits for it
        save_params(out, run.params, losses=run.losses)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """SIGKILL, twenty times, wherever it hits; the checkpoint is readable after each, and the end is the same."""
    path, out, whole = (tmp_path / name for name in ("run.safetensors", "out", "whole"))
    rng, seen = random.Random(0), []
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def begin(checkpoint, result):
            nursery.stdin.write(f"{checkpoint} {result}\n")
            nursery.stdin.flush()
            return int(nursery.stdout.readline())

        def uninterrupted(checkpoint, result):
            began = time.perf_counter()
            begin(checkpoint, result)
            assert int(nursery.stdout.readline()) == 0
            return time.perf_counter() - began

        seconds = uninterrupted("none", whole)
        for _ in range(20):
            pid = begin(path, "none")
            time.sleep(rng.uniform(0, seconds / 12))  # most of the way in all
            os.kill(pid, signal.SIGKILL)
            assert int(nursery.stdout.readline()) == signal.SIGKILL
            seen.append(
                read(path).facts["step"] if path.exists() else 0
            )  # a write is whole, or absent
        assert len(set(seen)) > 5 and seen == sorted(seen)
        uninterrupted(path, out)
    assert same(load_params(out), load_params(whole))
    assert read(out).facts["losses"] == read(whole).facts["losses"]


# What stops being finite -------------------------------------------------------------------------


def test_a_nan_names_step_and_task_and_keeps_the_checkpoint(task, tmp_path):
    objective, phi, stream = task

    def poisoned(step):
        draw = stream(step)
        if step == 13:
            draw.query.y[2] = float("nan")
        return draw

    path = tmp_path / "run.safetensors"
    with pytest.raises(
        Diverged, match=r"step 13, tasks \[2\] of stream\(13\).*last good state"
    ) as caught:
        fit(objective, phi, poisoned, 40, checkpoint=path, every=5)
    assert read(path).facts["step"] == 10
    assert same(caught.value.run.params, fit(objective, phi, stream, 13).params)
    mended = fit(objective, phi, stream, 40, checkpoint=path, every=5)
    assert same(mended.params, fit(objective, phi, stream, 40).params)


def test_a_rate_far_too_high_is_reported_as_such(task):
    objective, phi, stream = task
    with pytest.raises(Diverged, match="Lower the learning rates"):
        fit(objective, phi, stream, 200, partial(torch.optim.SGD, lr=1e6))


# Checkpoints of something else -------------------------------------------------------------------


@pytest.fixture
def kept(task, tmp_path):
    objective, phi, stream = task
    fit(objective, phi, stream, 5, checkpoint=tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def test_a_checkpoint_of_another_network_is_refused(kept):
    learner = maml(mlp(1, (9,), 1), mse_loss, 0.01, 1)
    with pytest.raises(ValueError, match=r"another network: body\.0\.weight"):
        fit(bilevel(learner, mse_loss), learner.init(), sinusoids(5, 5, 4, 0), 9, checkpoint=kept)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stream": sinusoids(5, 5, 4, 1)}, "stream sum"),
        ({"stream": sinusoids(6, 5, 4, 0)}, "stream shapes"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer"),
        ({"schedule": lambda o: torch.optim.lr_scheduler.ConstantLR(o)}, "schedule"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(task, kept, change, word):
    objective, phi, stream = task
    with pytest.raises(ValueError, match=f"another run: {word}"):
        fit(objective, phi, **{"stream": stream, **change}, steps=9, checkpoint=kept)


def test_a_damaged_checkpoint_is_refused(task, kept):
    objective, phi, stream = task
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged.*Delete it"):
        fit(objective, phi, stream, 9, checkpoint=kept)
    kept.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        read(kept)


def test_nothing_is_pickled(kept):
    data = kept.read_bytes()
    assert (
        data[8:9] == b"{"
        and b"pickle" not in data
        and not (kept.parent / (kept.name + ".part")).exists()
    )
    checkpoint = read(kept)
    write(kept, checkpoint)
    assert same(read(kept).tensors, checkpoint.tensors) and read(kept).facts == checkpoint.facts


def test_parameters_can_be_kept_alone(tmp_path):
    phi = {"body.0.weight": torch.randn(3, 2)}
    save_params(tmp_path / "phi.safetensors", phi, seed=3)
    assert same(load_params(tmp_path / "phi.safetensors"), phi)
    assert read(tmp_path / "phi.safetensors").facts["seed"] == 3


# Devices -------------------------------------------------------------------------------------------


def test_the_device_argument_reaches_every_tensor(monkeypatch):
    """On the meta device any operation that mixes it with the CPU fails; no GPU is needed to see that."""
    torch.manual_seed(0)
    net = mlp(30, (16,), 5)
    stream = episodes(planted(20, 20), 5, 1, 5, tasks=4, seed=0)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr("mtlib.train._finite", lambda grads: True)
    for learner in (maml(net, cross_entropy, 0.1, 2), protonet(net)):
        run = fit(bilevel(learner, cross_entropy), learner.init(), stream, 2, device="meta")
        assert {v.device.type for v in run.params.values()} == {"meta"}
    run = fit(joint(net, cross_entropy), parameters(net), quiz(stream), 2, device="meta")
    assert {v.device.type for v in run.params.values()} == {"meta"}
    draw = over(lambda d: d.to("meta"), stream(0))
    theta = learner.adapt(
        {k: v.to("meta") for k, v in learner.init().items()}, Batch(*(d[0] for d in draw.support))
    )
    assert {v.device.type for v in theta.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_training_on_the_gpu_equals_the_cpu(task):
    objective, phi, stream = task
    a, b = (fit(objective, phi, stream, 20, device=d) for d in ("cpu", "cuda"))
    assert all(v.is_cuda for v in b.params.values())
    assert all(torch.allclose(a.params[k], b.params[k].cpu(), atol=1e-5) for k in a.params)
