"""What users met: a wrong number without a word is an error that says what to do, or the right number."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import convolutional, vectors
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, apply, parameters
from mtlib.evaluate import NotFinite, accuracy, evaluate
from mtlib.learners.finetune import as_is
from mtlib.learners.gradient import maml
from mtlib.nets import mlp, two_halves
from mtlib.norm import Norm, calibrate
from mtlib.run.checkpoint import Checkpoint, read, save_params, write
from mtlib.run.switches import is_on
from mtlib.tasks import one_hot
from mtlib.train import Diverged, fit
from mtlib.transfer.align import mcc

# Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["batch", "stored"])
@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (2, 4, 6, 6), (5, 7), (8,)])
def test_a_norm_reads_nothing_past_its_weights(statistics, shape):
    with pytest.raises(ValueError, match=r"x of shape \(B, 8, \.\.\.\)"):
        Norm(8, statistics)(torch.randn(*shape))
    assert Norm(8, statistics)(torch.randn(3, 8, 2)).isfinite().all()


def stored(width=3):
    return two_halves(Norm(width, "stored"), nn.Linear(width, 2))


@pytest.mark.parametrize(("mean", "spread", "dtype"), [(0, 1, 64), (3e3, 0.1, 32), (-1e5, 2, 32)])
def test_calibrated_statistics_are_those_of_all_items(mean, spread, dtype):
    """Batches of unequal sizes count by their items, and a large mean cancels nothing."""
    kind = torch.float64 if dtype == 64 else torch.float32
    g = torch.Generator().manual_seed(0)
    x = (mean + spread * torch.randn(40, 3, 5, generator=g, dtype=torch.float64)).to(kind)
    net = stored().to(kind)
    with torch.no_grad():
        phi = calibrate(nn.Sequential(net.body), {}, x.split([7, 1, 32]))
    right = x.double().transpose(0, 1).flatten(1)
    tolerance = 1e-12 if dtype == 64 else 1e-2
    assert torch.allclose(phi["0.running_mean"].double(), right.mean(1), rtol=1e-6, atol=1e-6)
    assert torch.allclose(phi["0.running_var"].double(), right.var(1, correction=0), rtol=tolerance)


def test_mcc_is_finite_where_a_class_is_never_predicted():
    logits = torch.tensor([[9.0, 0.0, -1e4], [0.0, 9.0, -1e4]]).requires_grad_()
    value = mcc()({}, torch.zeros(1, 2, 1), logits[None])
    (slope,) = torch.autograd.grad(value, logits)
    two = mcc()({}, torch.zeros(1, 2, 1), logits[None, :, :2])
    assert value.item() == pytest.approx(
        2 / 3 * two.item(), rel=1e-5
    )  # the same sum over three classes
    assert slope.isfinite().all()


# Scores --------------------------------------------------------------------------------------


def test_accuracy_of_one_column_is_refused():
    for columns in ((1, 1), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match="at least two classes"):
            accuracy(*(torch.randn(5, c) for c in columns))
    learner, data = maml(mlp(3, (4,), 1, seed=0).double(), mse_loss, 0.1, 1), vectors(outputs=1)
    with pytest.raises(ValueError, match=r"metric=mse_loss"):
        evaluate(learner, learner.init(), lambda step: data, 4)
    assert evaluate(learner, learner.init(), lambda step: data, 4, mse_loss).mean > 0


def test_accuracy_of_several_labels_per_item_is_refused():
    learner, data = as_is(mlp(3, (4,), 2, seed=0).double()), two_classes()
    for wrong in (torch.ones_like(data.query.y), 0.5 * torch.ones_like(data.query.y)):
        other = data._replace(query=Batch(data.query.x, wrong))
        with pytest.raises(ValueError, match="one-hot rows"):
            evaluate(learner, learner.init(), lambda step, other=other: other, 4)


def two_classes(tasks=4, rows=6) -> Episode:
    g = torch.Generator().manual_seed(0)
    y = one_hot(torch.arange(rows) % 2, 2, torch.float64).expand(tasks, -1, -1)
    return Episode(
        *(Batch(torch.randn(tasks, rows, 3, generator=g, dtype=torch.float64), y) for _ in "sq")
    )


@pytest.mark.parametrize("chunk", [None, 1])
def test_predictions_that_are_nan_are_no_score(chunk):
    net, data = mlp(3, (4,), 2, seed=0).double(), two_classes()
    fast = maml(net, cross_entropy, 1e200, 3)  # diverges
    with pytest.raises(NotFinite, match="4 of 4 are not"):
        evaluate(fast, fast.init(), lambda step: data, 4, chunk=chunk)
    learner = as_is(net)
    broken = learner._replace(predict=lambda theta, x: learner.predict(theta, x) * torch.nan)
    with pytest.raises(NotFinite):
        evaluate(broken, learner.init(), lambda step: data, 4, chunk=chunk)
    assert 0 <= evaluate(learner, learner.init(), lambda step: data, 4, chunk=chunk).mean <= 1


# Runs ----------------------------------------------------------------------------------------


def short_run(path, steps, **options):
    learner, data = maml(mlp(3, (4,), 2, seed=0).double(), mse_loss, 0.1, 1), vectors()
    objective, phi = bilevel(learner, mse_loss), learner.init()
    return fit(objective, phi, lambda step: data, steps, checkpoint=path, **options)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    short_run(path, 5)
    with pytest.raises(ValueError, match="5 steps already, more than steps=3"):
        short_run(path, 3)
    assert len(short_run(path, 5).losses) == 5


def test_parameters_that_stop_being_finite_are_neither_saved_nor_returned(tmp_path):
    """The gradient is finite and the update is not: a rate so large that θ overflows."""
    path = tmp_path / "run.safetensors"
    short_run(path, 2)
    before = path.read_bytes()

    class Overflow(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(torch.inf)

    with pytest.raises(Diverged, match="φ is NaN or infinite after step 0"):
        short_run(None, 1, optimizer=partial(Overflow, lr=0.1))
    with pytest.raises(Diverged, match=r"after step 0\. Lower the learning rates\. The checkpoint"):
        short_run(tmp_path / "other", 9, optimizer=partial(Overflow, lr=0.1), every=1)
    assert not (tmp_path / "other").exists() and path.read_bytes() == before


# Files ---------------------------------------------------------------------------------------


def kept(path):
    phi = {**parameters(mlp(3, (4,), 2, seed=0)), "half": torch.ones(3, dtype=torch.bfloat16)}
    phi["alone"] = torch.tensor(2, dtype=torch.int64)
    write(path, Checkpoint({**phi, "none": torch.zeros(0)}, {"step": 3, "name": "α"}))
    return phi


def test_every_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "file"
    phi = kept(path)
    assert all(torch.equal(read(path).tensors[k], v) for k, v in phi.items())
    data, g = path.read_bytes(), torch.Generator().manual_seed(0)
    places = torch.randint(8 * len(data), (400,), generator=g).tolist()
    for place in places:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # white space of the header may change and mean the same
            assert found.facts["step"] == 3
            assert all(torch.equal(found.tensors[k], v) for k, v in phi.items())
    for cut in (0, 3, 8, 40, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
            read(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="not a checkpoint of mtlib"):
        read(tmp_path / "plain")
    save_file({"a": torch.ones(2)}, tmp_path / "old", metadata={"mtlib": "{}"})
    with pytest.raises(ValueError, match="SHA-256"):
        read(tmp_path / "old")


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "file"
    phi = kept(path)
    found = read(path).tensors
    with open(path, "r+b") as file:  # overwritten in place
        file.write(b"\0" * os.path.getsize(path))
    path.write_bytes(b"")
    assert all(torch.equal(found[k], v) for k, v in phi.items())


def test_two_writers_leave_a_whole_file_and_nothing_else(tmp_path):
    path, failed = tmp_path / "file", []

    def writer(number):
        try:
            for _ in range(60):
                save_params(path, {"w": torch.full((2000,), float(number))}, writer=number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        if path.exists():
            tensors, facts = read(path)
            assert (tensors["params/w"] == facts["writer"]).all()
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_params(path, {"w": torch.ones(2)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_params(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


# Switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("MTLIB_OFFLINE", "from mtlib.data.download import offline; offline()"),
        ("MTLIB_PLAIN", "from mtlib.run.fast import plain; plain()"),
        ("MTLIB_RECORD", "from mtlib.book.results import recording; recording()"),
        ("MTLIB_PROGRESS", "from mtlib.run.progress import bar; bar(1, 'x')"),
    ],
)
def test_a_switch_refuses_what_it_does_not_know(name, ask, monkeypatch):
    for value in ("true", "yes", "2", " 1"):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"expected {name} to be 0 or 1"):
            exec(ask, {})
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, value)
        exec(ask, {})
        assert is_on(name) is on
    monkeypatch.delenv(name)
    assert is_on(name, default=True) and not is_on(name)


def test_no_other_switch_reads_the_environment_by_itself():
    root = Path(__file__).resolve().parent.parent / "mtlib"
    texts = {p: p.read_text("utf8") for p in root.rglob("*.py") if p.name != "switches.py"}
    assert not [p.name for p, t in texts.items() if '== "1"' in t or '== "0"' in t]


def test_a_network_with_norms_still_computes():
    net = convolutional()
    assert apply(net)(parameters(net), torch.rand(2, 1, 16, 16).double()).shape == (2, 3)
