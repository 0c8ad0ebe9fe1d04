"""`fit`: one training loop for both pillars, resumable to the bit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlib.checkpoint import Checkpoint, read, write
from mtlib.core import Params, Stream, move, over, take
from mtlib.objective import Objective, count
from mtlib.progress import bar
from mtlib.tasks import check_draw

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
MakeSchedule = Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]


ADAM: MakeOptimizer = partial(torch.optim.Adam, lr=1e-3)


class Run(NamedTuple):
    params: Params  # φ after the last step
    losses: list[float]  # the objective at each step, before its update
    seconds: float  # time spent in the loop, over all resumptions


class Diverged(RuntimeError):
    """The objective or its gradient stopped being finite. `run` holds the parameters before that step."""

    def __init__(self, message: str, run: Run):
        super().__init__(message)
        self.run = run


def fit(
    objective: Objective | Callable[[int], Objective],
    params: Params,
    stream: Stream,
    steps: int,
    optimizer: MakeOptimizer = ADAM,
    schedule: MakeSchedule | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: Path | str | None = None,
    every: int = 100,
    progress: bool = True,
) -> Run:
    """Minimise an objective over φ: one draw of the stream and one optimizer step, `steps` times.

    An objective that changes as training goes on is given as a function of the step: `lambda step: joint(net, loss,
    (1, 0), [dann(critic, warm(step / steps))])`.

    `optimizer` and `schedule` are torch's, given as functions: `partial(torch.optim.SGD, lr=0.1)`,
    `lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)`; the schedule moves once a step.
    `device` takes the parameters and every draw there; None stays where `params` are. Random draws inside
    the objective (dropout) follow (`seed`, step).

    With `checkpoint`, the state is written there every `every` steps and at the end, atomically, and an
    existing file is resumed: the result equals the uninterrupted run bit for bit. Raises ValueError where
    the file belongs to another network, optimizer, stream or seed; `Diverged` where a number stops being finite,
    naming step and tasks (the checkpoint then still holds the last state written).
    """
    if steps < 0 or every < 1:
        raise ValueError(f"expected steps ≥ 0 and every ≥ 1, got {steps} and {every}")
    first = stream(0)
    check_draw(first)
    phi = {k: v.detach().to(device, copy=True) for k, v in params.items()}
    leaves = list(phi.values())
    rule = optimizer(leaves)
    plan = schedule(rule) if schedule else None
    trainee = _Trainee(phi, rule, plan, _fingerprint(first, seed))
    done, losses, seconds = trainee.resume(Path(checkpoint)) if checkpoint else (0, [], 0.0)

    began = time.perf_counter() - seconds
    with bar(steps, "fit", progress, initial=min(done, steps)) as shown:
        for step in range(done, steps):
            data = move(stream(step), leaves[0].device)
            now = objective if isinstance(objective, Objective) else objective(step)
            value, grads = _step(now, phi, data, seed, step)
            losses.append(value.item())
            if not (math.isfinite(losses[-1]) and _finite(grads)):
                run = Run(phi, losses[:-1], time.perf_counter() - began)
                raise Diverged(_diagnosis(now, phi, data, step, value, checkpoint), run)
            for k, p in phi.items():
                p.grad = grads.get(k)
            rule.step()
            if plan:
                plan.step()
            shown.update()
            shown.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if checkpoint and ((step + 1) % every == 0 or step + 1 == steps):
                trainee.save(Path(checkpoint), step + 1, losses, time.perf_counter() - began)
    for p in leaves:
        p.grad = None
    return Run(phi, losses, time.perf_counter() - began)


def _step(
    objective: Objective, phi: Params, data: Any, seed: int, step: int
) -> tuple[Tensor, Params]:
    """Value and gradient, with torch's random state set by (seed, step) and given back afterwards."""
    device = next(iter(phi.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + step)
        return objective.value_and_grad(phi, data)


def _finite(grads: Params) -> bool:
    return not grads or bool(torch.stack([torch.isfinite(g).all() for g in grads.values()]).all())


def _diagnosis(
    objective: Objective,
    phi: Params,
    data: Any,
    step: int,
    value: Tensor,
    checkpoint: Path | str | None,
) -> str:
    """What went wrong, and in which tasks: each task's own value decides."""
    bad = []
    for t in range(count(data)):
        try:
            one, grads = objective.value_and_grad(phi, take(data, slice(t, t + 1)))
            if not (math.isfinite(one.item()) and _finite(grads)):
                bad.append(t)
        except ValueError:  # weighted or coupled tasks have no value of their own
            bad = []
            break
    kept = f"The checkpoint {checkpoint} holds the last good state written." if checkpoint else ""
    what = "its gradient" if math.isfinite(value.item()) else "the objective"
    return (
        f"{what} is NaN or infinite at step {step}, tasks {bad or 'unknown'} of stream({step}). "
        f"Lower the learning rates, or look at stream({step}). {kept}"
    ).rstrip()


# Checkpoints ---------------------------------------------------------------------------------


class _Trainee(NamedTuple):
    """What training changes, and what it must not."""

    phi: Params
    rule: Optimizer
    plan: torch.optim.lr_scheduler.LRScheduler | None
    fingerprint: dict[str, Any]

    def save(self, path: Path, step: int, losses: list[float], seconds: float) -> None:
        state = self.rule.state_dict()
        tensors = {f"params/{k}": v for k, v in self.phi.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for i, entries in state["state"].items():
            for k, v in entries.items():
                if isinstance(v, Tensor):
                    tensors[f"optimizer/{i}/{k}"] = v
                else:
                    numbers.setdefault(str(i), {})[k] = v
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        facts = {
            **self._identity(),
            "step": step,
            "seconds": seconds,
            "groups": state["param_groups"],
            "numbers": numbers,
        }
        write(path, Checkpoint(tensors, facts))

    def resume(self, path: Path) -> tuple[int, list[float], float]:
        """Load `path` into parameters, optimizer and schedule; (steps done, losses, seconds)."""
        if not path.exists():
            return 0, [], 0.0
        tensors, facts = read(path)
        self._check(path, tensors, facts)
        with torch.no_grad():
            for k, v in self.phi.items():
                v.copy_(tensors[f"params/{k}"])
        state: dict[int, dict[str, Any]] = {int(i): dict(n) for i, n in facts["numbers"].items()}
        for name, v in tensors.items():
            if name.startswith("optimizer/"):
                _, i, k = name.split("/", 2)
                state.setdefault(int(i), {})[k] = v
        if (
            self.plan
        ):  # a schedule is a function of its steps: replay them (its state may hold functions)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # "step() before optimizer.step()": those were steps of old
                for _ in range(facts["step"]):
                    self.plan.step()
        self.rule.load_state_dict({"state": state, "param_groups": facts["groups"]})
        return facts["step"], tensors["losses"].tolist(), facts["seconds"]

    def _identity(self) -> dict[str, Any]:
        return {
            **self.fingerprint,
            "optimizer": type(self.rule).__name__,
            "schedule": type(self.plan).__name__ if self.plan else None,
        }

    def _check(self, path: Path, tensors: Params, facts: dict[str, Any]) -> None:
        saved = {
            k.removeprefix("params/"): v for k, v in tensors.items() if k.startswith("params/")
        }
        shapes = {k: (tuple(v.shape), v.dtype) for k, v in saved.items()}
        expected = {k: (tuple(v.shape), v.dtype) for k, v in self.phi.items()}
        if shapes != expected:
            odd = [k for k in {**expected, **shapes} if expected.get(k) != shapes.get(k)]
            k = odd[0]
            raise ValueError(
                f"{path} is a checkpoint of another network: {k} is {shapes.get(k, 'absent')} there, "
                f"{expected.get(k, 'absent')} here ({len(odd)} entries differ). Choose another file or delete it."
            )
        for k, here in self._identity().items():
            there = facts.get(k)
            if isinstance(here, float) and isinstance(there, float):
                same = math.isclose(here, there, rel_tol=1e-6, abs_tol=1e-6)
            else:
                same = here == there
            if not same:
                raise ValueError(
                    f"{path} was written by another run: {k} is {there} there, {here} here. "
                    "Continue with the same settings, choose another file, or delete it."
                )


def _fingerprint(draw: Any, seed: int) -> dict[str, Any]:
    """What identifies a stream: the shapes and the sum of its first draw (sums, as the last bits of sin differ by machine)."""
    shapes: list[list[int]] = []
    total = 0.0

    def add(d: Tensor) -> Tensor:
        nonlocal total
        shapes.append(list(d.shape))
        total += d.double().abs().sum().item()
        return d

    over(add, draw)
    return {"seed": seed, "stream shapes": shapes, "stream sum": total}
