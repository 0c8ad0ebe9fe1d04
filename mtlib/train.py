"""`fit`: one training loop for both pillars, resumable to the bit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlib.core import Params, Stream, move, over, stale, take
from mtlib.objective import Objective, count
from mtlib.run.checkpoint import Checkpoint, read, write
from mtlib.run.processes import average, meet, part, rank, size, spread
from mtlib.run.progress import bar
from mtlib.tasks import check_draw

MakeOptimizer = Callable[[list[Any]], Optimizer]
"""From φ's entries, or groups of them as torch's optimizers take them, to an optimizer."""

MakeSchedule = Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""From an optimizer to a schedule of its rates, which moves once per step."""

ADAM: MakeOptimizer = partial(torch.optim.Adam, lr=1e-3)


def cosine_adam(rate: float, steps: int) -> dict[str, Any]:
    """Adam whose rate falls from `rate` to 0 along half a cosine, for `fit(..., **cosine_adam(1e-3, steps))`.

    η_j = ½ η (1 + cos(π j / `steps`)) at step j. {cite}`kingma2015adam,loshchilov2017sgdr`

    ```pycon
    >>> sorted(cosine_adam(1e-3, steps=100))
    ['optimizer', 'schedule']

    ```
    """
    return {
        "optimizer": partial(torch.optim.Adam, lr=rate),
        "schedule": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    }


class Run(NamedTuple):
    """What `fit` returns.

    `params` is φ after the last step, `losses` are the objective at each step before its update, `seconds` is the time
    spent in the loop over all resumptions.
    """

    params: Params
    losses: list[float]
    seconds: float


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
    *,
    rates: Mapping[str, float] | None = None,
    moves: Sequence[str] | None = None,
) -> Run:
    """Minimise an objective over φ: one draw of the stream and one optimizer step, `steps` times.

    ```pycon
    >>> from mtlib.core import Batch, parameters
    >>> from mtlib.joint import joint
    >>> from mtlib.nets import mlp
    >>> from mtlib.tasks import mixture
    >>> net, x = mlp(1, (8,), 1, seed=0), torch.linspace(-1, 1, 50)[:, None]
    >>> stream = mixture(Batch(x, 2 * x), batch=20, seed=0)
    >>> run = fit(joint(net, torch.nn.functional.mse_loss), parameters(net), stream, steps=50)
    >>> run.losses[-1] < run.losses[0]
    True

    ```

    An objective that changes as training goes on is given as a function of the step: `lambda step: joint(net, loss,
    (1, 0), [dann(critic, warm(step / steps))])`.

    `optimizer` and `schedule` are torch's, given as functions: `partial(torch.optim.SGD, lr=0.1)`,
    `lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)`; the schedule moves once per step. `cosine_adam`
    gives both. `rates` are rates for the entries of φ under a prefix, `{"critic.": 1e-3}`, the longest that fits; the
    others have the optimizer's. `moves` are prefixes of the entries that move, `("body.",)`; None moves all.
    `device` takes φ and every draw there, and the trained φ is there, too, so that `evaluate` runs where it was trained;
    None stays where `params` are. Random draws inside the objective (dropout) follow (`seed`, step).

    With `checkpoint`, the state is written there every `every` steps and at the end, atomically, and an
    existing file is resumed: the result equals the uninterrupted run bit for bit. Raises ValueError if
    the file belongs to another network, optimizer, stream or seed; `Diverged` where a number stops being finite,
    naming step and tasks (the checkpoint then still holds the last state written).

    Under `torchrun`, inside `with mtlib.run.processes.processes()`, each process takes a part of the tasks of an objective
    that is separable, and one all_reduce per step averages value and gradient; another objective runs whole in every
    process, with a warning. Each process must begin with the same φ and stream. The first one alone writes the
    checkpoint, and all of them read it: it must lie where all can see it. The number of processes may change from
    one resumption to the next. The result is that of one process up to rounding, except for random draws inside the
    objective: they follow (`seed`, step, rank).
    """
    if steps < 0 or every < 1:
        raise ValueError(f"expected steps ≥ 0 and every ≥ 1, got {steps} and {every}")
    first = stream(0)
    check_draw(first)
    old = stale(follow(objective, 0, None).net)  # running statistics that training makes old
    phi = {k: v.detach().to(device, copy=True) for k, v in params.items() if k not in old}
    rule = optimizer(groups(phi, rates, moves))
    plan = schedule(rule) if schedule else None
    trainee = _Trainee(phi, rule, plan, _fingerprint(first, seed))
    done, losses, seconds = trainee.resume(Path(checkpoint)) if checkpoint else (0, [], 0.0)
    trainee.check_processes(done, checkpoint)
    if done > steps:
        raise ValueError(
            f"{checkpoint} has {done} steps already, more than steps={steps}: choose another file, or ask for at least "
            f"{done}"
        )

    began, now = time.perf_counter() - seconds, None
    with bar(steps, "fit", progress and rank() == 0, initial=min(done, steps)) as shown:
        for step in range(done, steps):
            draw = stream(step)
            now = follow(objective, step, now)
            if step == done:
                _warn_coupled(now)
            value, grads = _step(now, phi, draw, seed, step)
            losses.append(value.item())
            if not (math.isfinite(losses[-1]) and _finite(grads)):
                run = Run(phi, losses[:-1], time.perf_counter() - began)
                raise Diverged(_diagnosis(now, phi, draw, step, value, checkpoint), run)
            trainee.update(grads)
            shown.update()
            shown.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            last = step + 1 == steps
            if (last or (checkpoint and (step + 1) % every == 0)) and not _finite(phi):
                run = Run(phi, losses, time.perf_counter() - began)
                raise Diverged(
                    f"φ is NaN or infinite after step {step}. {_advice(checkpoint)}", run
                )
            if checkpoint and ((step + 1) % every == 0 or last):
                trainee.save(Path(checkpoint), step + 1, losses, time.perf_counter() - began)
    if checkpoint:
        meet(next(iter(phi.values())).device)  # no process goes on before the file is written
    for p in phi.values():
        p.grad = None
    return Run(phi, losses, time.perf_counter() - began)


def groups(
    phi: Params, rates: Mapping[str, float] | None = None, moves: Sequence[str] | None = None
) -> list[Any]:
    """φ's entries as an optimizer takes them: those that move, in groups where some have a rate of their own.

    Raises ValueError if a prefix fits no entry, or if none is left to move.
    """
    rates = rates or {}
    for prefix in (*rates, *(moves or ())):
        if not any(k.startswith(prefix) for k in phi):
            raise ValueError(f"expected entries of φ named {prefix}*, got {list(phi)[:5]}")
    moving = [k for k in phi if moves is None or k.startswith(tuple(moves))]
    if not moving:
        raise ValueError(f"expected entries of φ that move, got moves={moves} and {list(phi)[:5]}")
    if not rates:
        return [phi[k] for k in moving]
    found: dict[str | None, list[Tensor]] = {}
    for k in moving:
        fitting = [prefix for prefix in rates if k.startswith(prefix)]
        found.setdefault(max(fitting, key=len, default=None), []).append(phi[k])
    return [
        {"params": entries} if prefix is None else {"params": entries, "lr": rates[prefix]}
        for prefix, entries in found.items()
    ]


def follow(
    objective: Objective | Callable[[int], Objective], step: int, before: Objective | None
) -> Objective:
    """The objective at this step, which keeps what the one before found out about how the tasks run.

    Raises ValueError if it is another one at each step and compiled: its program would hold the old numbers.
    """
    if isinstance(objective, Objective):
        return objective
    now = objective(step)
    if before and now is not before and now.run and before.run:
        if now.run.compiled:
            raise ValueError(
                "expected compile=False in an objective that changes from step to step: each would be compiled anew. "
                "Give `fit` one objective, or return the same one for as long as nothing changes."
            )
        now.run.learn_from(before.run)
    return now


def _step(
    objective: Objective, phi: Params, draw: Any, seed: int, step: int
) -> tuple[Tensor, Params]:
    """Value and gradient over all tasks of a draw, of which each process takes a part where that is exact.

    torch's random state is set by (seed, step, rank) and given back afterwards.
    """
    device = next(iter(phi.values())).device
    if size() == 1 or not objective.separable:
        return _seeded(objective, phi, move(draw, device), seed * 1_000_003 + step)
    tasks = count(draw)
    mine = part(tasks)
    share = (mine.stop - mine.start) / tasks
    value, grads = torch.zeros((), device=device), dict[str, Tensor]()
    if share:
        data = move(take(draw, mine), device)
        value, grads = _seeded(
            objective, phi, data, seed * 1_000_003 + step + rank() * 2_654_435_761
        )
    return average(value, grads, phi, share)


def _seeded(objective: Objective, phi: Params, data: Any, seed: int) -> tuple[Tensor, Params]:
    device = next(iter(phi.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return objective.value_and_grad(phi, data)


def _warn_coupled(objective: Objective) -> None:
    if size() > 1 and rank() == 0 and not objective.separable:
        warnings.warn(
            "this objective is not a plain mean over tasks (it couples or weights them), so each of the "
            f"{size()} processes computes all of it and they gain nothing. Run it in one process.",
            stacklevel=3,
        )


def _finite(grads: Params) -> bool:
    return not grads or bool(torch.stack([torch.isfinite(g).all() for g in grads.values()]).all())


def _diagnosis(
    objective: Objective,
    phi: Params,
    draw: Any,
    step: int,
    value: Tensor,
    checkpoint: Path | str | None,
) -> str:
    """What went wrong, and in which tasks: each task's own value decides."""
    bad, data = [], move(draw, next(iter(phi.values())).device)
    for t in range(count(data)):
        try:
            one, grads = objective.value_and_grad(phi, take(data, slice(t, t + 1)))
            if not (math.isfinite(one.item()) and _finite(grads)):
                bad.append(t)
        except ValueError:  # weighted or coupled tasks have no value of their own
            bad = []
            break
    what = "its gradient" if math.isfinite(value.item()) else "the objective"
    return (
        f"{what} is NaN or infinite at step {step}, tasks {bad or 'unknown'} of stream({step}). "
        f"Look at stream({step}). {_advice(checkpoint)}"
    )


def _advice(checkpoint: Path | str | None) -> str:
    kept = f" The checkpoint {checkpoint} holds the last good state written." if checkpoint else ""
    return f"Lower the learning rates.{kept}"


# Checkpoints ---------------------------------------------------------------------------------


class _Trainee(NamedTuple):
    """What training changes, and what it must not."""

    phi: Params
    rule: Optimizer
    plan: torch.optim.lr_scheduler.LRScheduler | None
    fingerprint: dict[str, Any]

    def update(self, grads: Params) -> None:
        for k, p in self.phi.items():
            p.grad = grads.get(k)  # an entry that does not move is not the optimizer's
        self.rule.step()
        if self.plan:
            self.plan.step()

    def check_processes(self, step: int, path: Path | str | None) -> None:
        """Raise, in every process, unless all of them are at one step, with the same φ and the same stream."""
        if size() == 1:
            return
        numbers = {
            "step": step,
            "parameters": sum(v.numel() for v in self.phi.values()),
            "sum of φ": sum(v.double().sum().item() for v in self.phi.values()),
            "seed": self.fingerprint["seed"],
            "stream sum": self.fingerprint["stream sum"],
        }
        advice = {
            "step": f"Does each of them see the file {path}? Put it on a file system that they share.",
            "seed": "Give `fit` one seed in all of them.",
            "stream sum": "Make the stream with one seed and the same data in all of them; `fit` divides its tasks.",
        }
        for name, (least, greatest) in spread(
            numbers, next(iter(self.phi.values())).device
        ).items():
            raise ValueError(
                f"expected the {size()} processes to begin alike; {name} lies between {least:.9g} and {greatest:.9g}. "
                + advice.get(
                    name, "Seed before making the network, in all of them: torch.manual_seed(0)."
                )
            )

    def save(self, path: Path, step: int, losses: list[float], seconds: float) -> None:
        """Write the state; of several processes the first one alone does."""
        if rank() > 0:
            return
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
