"""Attack the package: kills, flipped bits, writers at once, Ctrl-C anywhere, threads on one network, hostile files.

    python tools/attack.py        # at full size, some minutes
    python tools/attack.py 0.1    # a tenth of it, as the tests do

Each attack returns how often it was made, and how often something gave way, which should be never.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, Learner, parameters
from mtlib.data.sinusoids import sinusoids
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4, mlp, two_halves
from mtlib.norm import calibrate
from mtlib.run.checkpoint import load_params, save_params
from mtlib.run.fast import transforming
from mtlib.tasks import one_hot
from mtlib.train import Run, fit


class Result(NamedTuple):
    """What an attack did."""

    made: int
    failed: int
    note: str = ""


# Kills ---------------------------------------------------------------------------------------


def kills(times: int, seed: int = 0, steps: int = 120) -> Result:
    """SIGKILL at a random moment of a run that writes after each step, until it is done: φ equals the unbroken run's."""
    rng, made, runs, wrong = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        began = time.monotonic()
        finish(_forked(lambda: _train(unbroken, steps)))
        length = time.monotonic() - began
        right = unbroken.read_bytes()
        while made < times:
            broken.unlink(missing_ok=True)
            while True:
                child = _forked(lambda: _train(broken, steps))
                if made < times and _killed(child, rng.uniform(0, length)):
                    made += 1
                    continue
                break
            finish(child)
            runs += 1
            wrong += _tensors(broken.read_bytes()) != _tensors(right)
            left = [p.name for p in Path(folder).iterdir() if p not in (unbroken, broken)]
            for name in left:  # a file that a killed writer left; nobody reads it
                (Path(folder) / name).unlink()
    return Result(made, wrong, f"{runs} runs finished")


def _train(path: Path, steps: int) -> Run:
    torch.set_num_threads(1)
    learner = maml(mlp(1, (20,), 1, seed=0), mse_loss, 0.01, 1)
    objective, stream = bilevel(learner, mse_loss), sinusoids(seed=0)
    return fit(objective, learner.init(), stream, steps, checkpoint=path, every=1, progress=False)


def _tensors(data: bytes) -> dict[str, bytes]:
    """The trained parameters and losses in a checkpoint, byte for byte: the seconds differ."""
    from safetensors.torch import load

    return {
        k: v.numpy().tobytes() for k, v in load(data).items() if k.startswith(("params/", "losses"))
    }


def _forked(work: Callable[[], Any]) -> int:
    """`work` in a process of its own, forked: starting Python anew would take most of the time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _killed(child: int, after: float) -> bool:
    """Whether the child was still at work when it was killed; one that had finished stays to be waited for."""
    time.sleep(after)
    if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def finish(child: int) -> None:
    """Wait for a child, which must end well."""
    try:
        _, status = os.waitpid(child, 0)
    except ChildProcessError:  # it ended between the look and the kill
        return
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("a run that nobody killed failed")


# Files ---------------------------------------------------------------------------------------


def flips(times: int, seed: int = 0) -> Result:
    """One bit of a file's tensors flipped: it must be refused."""
    rng, failed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save_params(path, parameters(mlp(3, (20,), 2, seed=0)))
        data = path.read_bytes()
        first = 8 + int.from_bytes(data[:8], "little")
        for _ in range(times):
            changed, place = bytearray(data), rng.randrange(8 * first, 8 * len(data))
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            try:
                load_params(path)
                failed += 1
            except ValueError:
                pass
    return Result(times, failed)


def writers(seconds: float) -> Result:
    """Two processes write one file as fast as they can, and it is always a whole file of one of them."""
    reads, failed = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path, end = Path(folder) / "file", time.monotonic() + seconds

        def write(number: int) -> None:
            phi = {f"w{k}": torch.full((5000,), float(number)) for k in range(3)}
            while time.monotonic() < end:
                save_params(path, phi, writer=number)

        children = [_forked(lambda n=n: write(n)) for n in (1, 2)]  # type: ignore[misc]
        while time.monotonic() < end:
            if path.exists():
                values = {v.item() for w in load_params(path).values() for v in (w.min(), w.max())}
                reads, failed = reads + 1, failed + (len(values) != 1)
        for child in children:
            finish(child)
        failed += [p.name for p in Path(folder).iterdir()] != ["file"]
    return Result(reads, failed, f"{seconds:g} s")


# The user's network --------------------------------------------------------------------------


def interrupts(times: int, seed: int = 0) -> Result:
    """Ctrl-C at a random moment of training, evaluation and calibration: the network is as it was before, and gradients are on."""
    rng, made, failed, calls = random.Random(seed), 0, 0, 0
    works = _works()
    lengths = {name: _length(work) for name, (_, work) in works.items()}
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        while made < times:
            name = rng.choice(list(works))
            net, work = works[name]
            held = held_by(net)
            try:
                _ARMED.append(True)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, lengths[name]))
                work()
                _ARMED.clear()
            except KeyboardInterrupt:
                made += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            calls += 1
            failed += not unchanged(held, held_by(net)) or transforming()
            failed += not torch.is_grad_enabled()
            torch.set_grad_enabled(True)
            net(_items(net))  # it still answers, and no watch is left behind
    finally:
        signal.signal(signal.SIGALRM, before)
    return Result(made, failed, f"{calls} calls")


_ARMED: list[bool] = []


def _interrupt(number: int, frame: Any) -> None:
    """Raise once, and only inside the call that is attacked."""
    if _ARMED:
        _ARMED.clear()
        raise KeyboardInterrupt


def _length(work: Callable[[], Any]) -> float:
    work()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _works() -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Networks, and what is done with each of them."""
    small, image = mlp(3, (5,), 2, seed=0), conv4(2, width=4, size=16, seed=0)
    torch.manual_seed(0)
    normed = two_halves(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 2)
    )
    layered = two_halves(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), nn.Linear(4, 2))

    def train(learner: Learner, data: Episode) -> Callable[[], Any]:
        objective, phi = bilevel(learner, cross_entropy), learner.init()
        return lambda: objective.value_and_grad(phi, data)

    def score(learner: Learner, data: Episode) -> Callable[[], Any]:
        phi, tasks = learner.init(), len(data.query.x)
        return lambda: evaluate(learner, phi, lambda step: data, tasks, progress=False)

    vectors, images = _episodes(3), _episodes(1, 16, 16)
    both = Batch(vectors.query.x, vectors.query.y)
    together = joint(normed, cross_entropy, chunk=1)
    return {
        "maml": (small, train(maml(small, cross_entropy, 0.1, 3), vectors)),
        "maml on images": (image, train(maml(image, cross_entropy, 0.1, 1), images)),
        "evaluate": (small, score(maml(small, cross_entropy, 0.1, 3), vectors)),
        "protonet": (image, score(protonet(image), images)),
        "joint with dropout": (normed, lambda: together.value_and_grad(parameters(normed), both)),
        "calibrate": (normed, lambda: calibrate(normed, parameters(normed), both.x.unbind())),
        "layer norm": (layered, _quiet(train(maml(layered, cross_entropy, 0.1, 1), vectors))),
    }


def _quiet(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same, after the first call has said that it takes a loop."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
    return work


def _episodes(*item: int, tasks: int = 4, rows: int = 6) -> Episode:
    g = torch.Generator().manual_seed(0)
    y = one_hot(torch.arange(rows) % 2, 2).expand(tasks, -1, -1)
    return Episode(*(Batch(torch.rand(tasks, rows, *item, generator=g), y) for _ in "sq"))


def _items(net: nn.Module) -> torch.Tensor:
    convolves = any(isinstance(m, nn.Conv2d) for m in net.modules())
    return torch.zeros(2, 1, 16, 16) if convolves else torch.zeros(2, 3)


def held_by(net: nn.Module) -> dict[tuple[str, str], tuple[int, Any]]:
    """Every tensor of a network, by place: which object, and its numbers; and every module's mode and hooks."""
    held: dict[tuple[str, str], tuple[int, Any]] = {}
    for place, m in net.named_modules():
        for k, t in (*m._parameters.items(), *m._buffers.items()):
            held[place, k] = (id(t), None if t is None else t.detach().clone())
        held[place, "mode"] = (id(m), (m.training, len(m._forward_pre_hooks), sorted(vars(m))))
    return held


def unchanged(a: dict[Any, tuple[int, Any]], b: dict[Any, tuple[int, Any]]) -> bool:
    """Whether the objects are the same ones, with the same numbers; what BatchNorm counts in a call of the user's is left out."""
    if a.keys() != b.keys():
        return False
    for k, (own, value) in a.items():
        other, now = b[k]
        same = torch.equal(value, now) if isinstance(value, torch.Tensor) else value == now
        if own != other or not same:
            return False
    return True


def threads(times: int) -> Result:
    """Two threads train on one network, each with a rate of its own: both get what each gets alone."""
    failed = 0
    torch.manual_seed(0)
    net = two_halves(nn.Sequential(nn.Linear(1, 10), nn.Dropout(0.2), nn.Tanh()), nn.Linear(10, 1))

    def losses(rate: float) -> list[float]:
        learner = maml(net, mse_loss, rate, 2)
        return fit(
            bilevel(learner, mse_loss), learner.init(), sinusoids(seed=0), 12, progress=False
        ).losses

    rates = (0.01, 0.05)
    alone = [losses(rate) for rate in rates]
    for _ in range(times):
        found: dict[float, list[float]] = {}
        pair = [
            threading.Thread(target=lambda r=r, found=found: found.update({r: losses(r)}))  # type: ignore[misc]
            for r in rates
        ]
        for t in pair:
            t.start()
        for t in pair:
            t.join()
        failed += [found.get(rate) for rate in rates] != alone
    return Result(times, failed)


def attack(scale: float = 1.0, seed: int = 0) -> dict[str, Result]:
    """Every attack, at a share of its full size."""
    return {
        "kills": kills(round(100 * scale), seed),
        "flipped bits": flips(round(200 * scale), seed),
        "two writers": writers(20 * scale),
        "interrupts": interrupts(round(3000 * scale), seed),
        "threads": threads(round(20 * scale)),
    }


if __name__ == "__main__":
    results = attack(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    for name, result in results.items():
        print(f"{name:14} {result.made:6} made  {result.failed} failed  {result.note}")
    sys.exit(any(r.failed for r in results.values()))
