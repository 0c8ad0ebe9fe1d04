"""`fit`: one training loop for both pillars, resumable to the bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from mtlib.core import (
    Batch,
    Episode,
    Learner,
    Params,
    Stream,
    move,
    over,
    stale,
    take,
)
from mtlib.objective import Objective, count
from mtlib.run.checkpoint import as_path
from mtlib.run.copies import grad_mode_kept
from mtlib.run.devices import random_kept
from mtlib.run.processes import average, first_says, meet, part, rank, size, spread
from mtlib.run.progress import bar
from mtlib.run.threads import RANDOM
from mtlib.run.trainee import (
    Best,
    Keeper,
    Termination,
    Trainee,
    evidence,
    fingerprint,
    made,
    planned,
    settings,
    start_of,
    walk,
)
from mtlib.tasks import (
    above_zero,
    check_draw,
    check_shapes,
    finite,
    functions,
    positive,
    some_tasks,
    takes,
    whole,
    within,
)

MakeOptimizer = Callable[[list[Any]], Optimizer]
"""From φ's entries, or groups of them as torch's optimizers take them, to an optimizer."""

MakeSchedule = Callable[[Optimizer], LRScheduler]
"""From an optimizer to a schedule of its rates, which moves once per step."""

ADAM: MakeOptimizer = partial(torch.optim.Adam, lr=1e-3)


def cosine_adam(rate: float, steps: int, decay: float = 0.0) -> dict[str, Any]:
    """Adam whose rate falls from `rate` to 0 along half a cosine, for `fit(..., **cosine_adam(1e-3, steps))`.

    η_j = ½ η (1 + cos(π j / `steps`)) at step j. With a `decay` λ above 0 it is AdamW: each step first takes η_j λ φ off φ.
    Raises ValueError for a rate or a decay below 0, or no step.
    {cite}`kingma2015adam,loshchilov2017sgdr`

    ```pycon
    >>> sorted(cosine_adam(1e-3, steps=100))
    ['optimizer', 'schedule']

    ```
    """
    within(0, rate=rate, decay=decay)
    positive(steps=steps)
    adam = partial(torch.optim.AdamW, weight_decay=decay) if decay else torch.optim.Adam
    return {
        "optimizer": partial(adam, lr=rate),
        "schedule": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    }


def rising_adam(rate: float, steps: int, rise: float = 0.1) -> dict[str, Any]:
    """Adam whose rate rises to `rate` along half a cosine, and then falls: for `fit(..., **rising_adam(1e-3, steps))`.

    It rises from `rate`/25 for the share `rise` of the `steps`, and falls to nearly 0 for the rest. Raises
    ValueError for a rate of 0 or below, fewer than two steps, or a share outside of (0, 1].

    ```pycon
    >>> sorted(rising_adam(1e-3, steps=100))
    ['optimizer', 'schedule']

    ```
    """
    above_zero(rate=rate, rise=rise)
    whole(2, steps=steps)
    within(0, 1, rise=rise)
    schedule = partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=rate,
        total_steps=steps,
        pct_start=rise if rise * steps != 1 else 0.0,  # torch's rise of one step divides by 0
        cycle_momentum=False,
    )
    return {"optimizer": partial(torch.optim.Adam, lr=rate), "schedule": schedule}


class Run(NamedTuple):
    """What `fit` returns.

    `params` is φ after the last step, `losses` are the objective at each step before its update, `seconds` is the time
    spent in the loop over all resumptions. With early stopping, `params` is the best φ instead, and `best` says after how
    many steps of this run it stood, and how good it was.
    """

    params: Params
    losses: list[float]
    seconds: float
    best: Best | None = None


class Diverged(RuntimeError):
    """The objective or its gradient stopped being finite. `run` holds the parameters before that step."""

    def __init__(self, message: str, run: Run):
        super().__init__(message)
        self.run = run


Hook = Callable[[int, Params, float, Params], object]
"""`hook(step, phi, value, gradient)`, after the update of that step: copies of φ and of the gradient that moved it."""


class EarlyStopping(NamedTuple):
    """What `early_stopping` makes."""

    quality: Callable[[Params], Any]
    every: int
    patience: int

    def judge(self, t: Trainee) -> None:
        """Ask for the quality where it is due, in the first process for all of them, and keep the best φ."""
        done = len(t.losses)
        if done % self.every:
            return
        failed: Exception | None = None
        found: float | None = None
        copy = {k: v.detach().clone() for k, v in t.phi.items()}
        if rank() == 0:
            try:
                found = _number(self.quality({k: v.clone() for k, v in copy.items()}))
            except Exception as error:
                failed = error
        found = first_says(found, next(iter(copy.values())).device)
        if failed:
            raise failed
        if found is None:
            raise RuntimeError("quality(φ) failed in the first process: see its message")
        if not math.isnan(found) and (t.best is None or found > t.best.quality):
            t.best, t.best_params = Best(done, found), copy

    def ended(self, t: Trainee) -> bool:
        """Whether `patience` looks in a row brought nothing better."""
        best = t.best.step if t.best else 0
        return len(t.losses) // self.every - best // self.every >= self.patience


def early_stopping(
    quality: Callable[[Params], Any], every: int = 100, patience: int = 5
) -> EarlyStopping:
    """For `fit(..., stop=)`: end where `patience` looks in a row bring nothing better, and keep the best φ.

    `quality(phi)` is a number or a Score on validation data, the higher the better: `lambda phi: evaluate(learner, phi,
    validation, 100)`; of a loss, its negative. It is asked after every `every` steps, and only then: let `every` divide
    `steps`. Of equals the first is best; NaN is worse than any number. Of several processes the first one alone asks,
    for all of them. A checkpoint holds the best φ and goes on exactly; it cannot see another `quality`.
    """
    positive(every=every, patience=patience)
    functions(1, quality=quality)
    return EarlyStopping(quality, every, patience)


@grad_mode_kept
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
    every: int | timedelta = 100,
    progress: bool = True,
    *,
    rates: Mapping[str, float] | None = None,
    moves: Sequence[str] | None = None,
    first: int = 0,
    stop: EarlyStopping | None = None,
    hook: Hook | None = None,
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
    None stays where `params` are. These are copied, so that two entries that share memory train apart. Random draws
    inside the objective (dropout) follow (`seed`, step).

    **In pieces.** Each call begins at step `first` of the stream, of an objective that is a function of the step, of the
    seeds and of the schedule, and goes `steps` on: `fit(…, phi, …, 20, first=40)` takes the steps 40 to 59. Without
    `first` each piece sees the same draws again. With plain SGD the pieces equal one run bit for bit; an optimizer with a
    state (momentum, Adam) starts it afresh in each. A checkpoint is the exact way.

    **Checkpoint.** The state is written there every `every` steps (or after each `timedelta(minutes=10)`) and at the end,
    atomically, and an existing file is resumed: the result equals the uninterrupted run bit for bit. A SIGTERM lets
    the step end, saves, and then ends the process; "Stop" in Jupyter saves the last whole step. The file must be of the
    same run: ValueError where the network, the starting φ, stream, seed, first step, the settings of optimizer or
    schedule, or loss and gradient of the first step (computed anew) are others. `steps` may grow.

    `stop` is an `early_stopping`. `hook(step, phi, value, gradient)` is called after each update, in the first process.

    Raises `Diverged` where a number stops being finite, naming step and tasks (the checkpoint then still holds the last
    state written); ValueError or TypeError for a stream that gives `stream(first)` differently the second time, or
    something of another kind later on, for a loss that no gradient reaches, and for arguments of another kind.

    Under `torchrun`, inside `with mtlib.run.processes.processes()`, each process takes a part of the tasks of an objective
    that is separable, and one all_reduce per step averages value and gradient; another objective runs whole in every
    process, with a warning. A stream with `part`, as those of `episodes`, `mixture` and `rows`, draws each process's own
    tasks alone, but for the first draw, which all of them see. Each process must begin with the same φ and stream. The first one alone writes the
    checkpoint, and all of them read it: it must lie where all can see it. The number of processes may change from
    one resumption to the next. The result is that of one process up to rounding, except for random draws inside the
    objective: they follow (`seed`, step, rank).
    """
    _check_arguments(objective, steps, first, seed, every, stop)
    if hook is not None:
        functions(4, hook=hook)
    draws, phi = _Draws(stream, first), _placed(params, device)
    net = follow(objective, first, None).net
    if net is not None:
        check_shapes(net, phi)
    old = stale(net)  # running statistics that training makes old
    phi = {k: v for k, v in phi.items() if k not in old}
    make = partial(made, phi, groups(phi, rates, moves), optimizer, schedule)
    keeper = Keeper(as_path(checkpoint), every) if checkpoint is not None else None
    plan = planned(make, first, steps) if keeper and schedule else None
    trainee = Trainee(phi, *make(), plan)
    trainee.identity = settings(phi, trainee.rule, trainee.plan) if keeper else {}
    if trainee.plan:
        walk(trainee.plan, first)
    named = () if not isinstance(objective, Objective) else (*(rates or ()), *(moves or ()))
    job = _Job(objective, trainee, draws, first, first + steps, seed, keeper, stop, hook, named)
    now = job.begin()
    with (
        Termination(keeper is not None) as end,
        bar(steps, "fit", progress and rank() == 0, initial=len(trainee.losses)) as shown,
    ):
        try:
            job.train(now, shown, end)
        except BaseException as error:
            if keeper and trainee.whole and (end.asked or isinstance(error, KeyboardInterrupt)):
                job.save()
            raise
        finally:
            for p in phi.values():
                p.grad = None
    if keeper:
        meet(next(iter(phi.values())).device)  # no process goes on before the file is written
    if stop and trainee.best is None and len(trainee.losses) >= stop.every:
        raise Diverged("quality(φ) was NaN at every look: look at the validation data.", job.run())
    return job.run()._replace(params=trainee.best_params or phi)


class _Job(NamedTuple):
    """One call of `fit`."""

    objective: Objective | Callable[[int], Objective]
    trainee: Trainee
    draws: _Draws
    first: int
    last: int  # the step after the last one
    seed: int
    keeper: Keeper | None
    stop: EarlyStopping | None
    hook: Hook | None
    named: tuple[str, ...]  # prefixes under which a gradient must reach an entry

    def run(self) -> Run:
        t = self.trainee
        return Run(t.phi, list(t.losses), t.seconds, t.best)

    def begin(self) -> Objective:
        """The first step's objective, with the trainee where its file left it. Raises in every process, or in none."""
        failed: Exception | None = None
        now, t = follow(self.objective, self.first, None), self.trainee
        try:
            if self.keeper:
                t.identity = {
                    "seed": int(self.seed),
                    "first step": int(self.first),
                    **fingerprint(self.draws.start),
                    **t.identity,
                    "early stopping every": self.stop.every if self.stop else None,
                    **start_of(t.phi),
                }
                t.resume(self.keeper.path, partial(self.proof, now))
        except Exception as error:
            failed = error
        _check_processes(self, failed)
        if len(t.losses) > self.last - self.first:
            raise ValueError(
                f"{self.keeper and self.keeper.path} has {len(t.losses)} steps already, more than "
                f"steps={self.last - self.first}: choose another file, or ask for at least {len(t.losses)}"
            )
        if len(t.losses) < self.last - self.first:
            _warn_coupled(now)
        return now

    def proof(self, objective: Objective) -> dict[str, Any]:
        """Loss and gradient of the first step over all tasks, in figures."""
        draw = move(self.draws(self.first), next(iter(self.trainee.phi.values())).device)
        seed = self.seed * 1_000_003 + self.first
        return evidence(*_seeded(objective, self.trainee.phi, draw, seed))

    def train(self, now: Objective, shown: Any, end: Termination) -> None:
        """The steps that are left, until the last one or the end that early stopping sets."""
        t = self.trainee
        for step in range(self.first + len(t.losses), self.last):
            if self.stop and self.stop.ended(t):
                return
            now = now if step == self.first else follow(self.objective, step, now)
            mine = self.draws.own_part() if now.separable else None
            draw = self.draws(step, mine)
            work = partial(_step, now, t.phi, draw, self.seed, step, self.draws.tasks(mine))
            value, grads = self.draws.named(step, draw, work, mine)
            loss = value.item()
            if not (math.isfinite(loss) and _finite(grads)):
                every = draw if mine is None else self.draws(step)
                raise Diverged(self.diagnosis(now, every, step, value), self.run())
            if step == self.first:
                self.look(now, value, grads)
            seen = {k: g.clone() for k, g in grads.items()} if self.hook else {}
            t.update(loss, grads)
            if self.stop:
                self.stop.judge(t)
            t.whole = True
            if self.hook and rank() == 0:
                self.hook(step, {k: v.detach().clone() for k, v in t.phi.items()}, loss, seen)
            shown.update()
            shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.keep(step)
            if end.asked and (
                rank() == 0 or not now.separable
            ):  # the others wait for the first one
                self.save()
                end.pass_on()

    def look(self, objective: Objective, value: Tensor, grads: Params) -> None:
        """Raise unless the first gradient reaches what is to move, and keep figures of it for the file."""
        t = self.trainee
        moving = {id(p) for g in t.rule.param_groups for p in g["params"]}
        reached = [k for k in grads if id(t.phi[k]) in moving]
        lacking = [n for n in self.named if not any(k.startswith(n) for k in reached)]
        if not reached or lacking:
            what = f"the entries of φ named {lacking[0]}*" if lacking else "φ's entries that move"
            raise ValueError(
                f"no gradient reaches {what} at step {self.first}: expected an objective that depends on them, got a "
                f"gradient for {list(grads)[:5] or 'none'}. Are they used, or cut off by detach(), no_grad() or argmax()? "
                "Does φ belong to this network?"
            )
        if self.keeper and (size() == 1 or not objective.separable):
            t.evidence = evidence(value, grads)
        elif self.keeper and rank() == 0:
            t.evidence = self.proof(objective)

    def keep(self, step: int) -> None:
        """Save where it is due; raise where φ is not finite."""
        done, last = len(self.trainee.losses), step + 1 == self.last
        last = last or (self.stop is not None and self.stop.ended(self.trainee))
        due = self.keeper is not None and self.keeper.due(done)
        if not (last or due):
            return
        if _finite(self.trainee.phi):
            self.save()
        elif last or size() == 1 or not isinstance(self.keeper and self.keeper.every, timedelta):
            raise Diverged(f"φ is NaN or infinite after step {step}. {self.advice()}", self.run())

    def save(self) -> None:
        if self.keeper and _finite(self.trainee.phi):
            self.keeper.save(self.trainee)

    def diagnosis(self, objective: Objective, draw: Any, step: int, value: Tensor) -> str:
        """What went wrong, and in which tasks: each task's own value decides."""
        phi, bad = self.trainee.phi, list[int]()
        data = move(draw, next(iter(phi.values())).device)
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
            f"Look at stream({step}). {self.advice()}"
        )

    def advice(self) -> str:
        path = self.keeper and self.keeper.path
        kept = f" The checkpoint {path} holds the last good state written." if path else ""
        return f"Lower the learning rates.{kept}"


class _Draws:
    """A stream whose draws are looked at: stream(first) is the same twice, and all are of one kind."""

    def __init__(self, stream: Stream, first: int):
        if isinstance(stream, nn.Module) or not takes(stream, 1):
            raise TypeError(
                f"expected a stream, a function of the step, got a {type(stream).__name__}. {_stream_line(stream)}"
            )
        self.stream, self.first, self.start = stream, first, stream(first)
        check_draw(self.start)
        self.kind = _kind(self.start)

    def own_part(self) -> slice | None:
        """Of several processes, the tasks that this one draws, where the stream can draw them alone."""
        return part(count(self.start)) if size() > 1 and hasattr(self.stream, "part") else None

    def tasks(self, mine: slice | None) -> int | None:
        """How many tasks the whole has of which a part is drawn."""
        return None if mine is None else count(self.start)

    def __call__(self, step: int, mine: slice | None = None) -> Any:
        if mine is not None and mine.start == mine.stop:
            return take(self.start, mine)  # no task at all
        draw = self.stream(step) if mine is None else some_tasks(self.stream, step, mine)
        start = self.start if mine is None else take(self.start, mine)
        try:
            check_draw(draw, numbers=step == self.first)
        except (TypeError, ValueError) as error:
            raise type(error)(f"stream({step}): {error}") from error
        if _kind(draw) != self.kind:
            raise ValueError(
                f"expected draws of one kind from the stream: stream({self.first}) gave {_said(self.start)}, "
                f"stream({step}) {_said(draw)}"
            )
        if step == self.first and not all(map(torch.equal, _tensors(start), _tensors(draw))):
            raise ValueError(
                f"expected a pure stream, got two different draws from stream({step}): draw the random numbers from a "
                "generator made of the step, np.random.default_rng([seed, step]), and keep no counter or iterator."
            )
        return draw

    def named(
        self,
        step: int,
        draw: Any,
        work: Callable[[], tuple[Tensor, Params]],
        mine: slice | None = None,
    ) -> tuple[Tensor, Params]:
        """work(), whose error names the step where the draw has not the shapes of the first, or says what torch means."""
        try:
            return work()
        except (ValueError, RuntimeError) as error:
            start = self.start if mine is None else take(self.start, mine)
            here, there = ([tuple(d.shape) for d in _tensors(x)] for x in (draw, start))
            if here == there:
                advice = next((v for k, v in MEANT.items() if k in str(error)), None)
                if advice is None or not isinstance(error, RuntimeError):
                    raise
                raise ValueError(
                    f"{advice}; step {step} of a stream of {_said(draw)} ends with: {error}"
                ) from error
            raise ValueError(
                f"stream({step}) has shapes {here}, stream({self.first}) had {there}, and the objective cannot use them: "
                f"{error}"
            ) from error


def _stream_line(found: Any) -> str:
    """What to write in the place of what is no stream."""
    what = "Write `lambda step: ...` that gives a Batch of x (T, rows, *item) and y (T, rows, W), the same for the same step"
    if isinstance(found, DataLoader | Dataset):
        data = "loader.dataset" if isinstance(found, DataLoader) else "dataset"
        return (
            f"It gives its items in an order of its own, and ends. Write `x, y = zip(*{data})` and then "
            "`mixture(Batch(torch.stack(x), torch.as_tensor(y)), batch=64, seed=0)` (mtlib.tasks), or a "
            "function of your own, `lambda step: ...`."
        )
    if isinstance(found, Batch):
        return "It is data. Write `mixture(data, batch=64, seed=0)` (mtlib.tasks), which draws from it."
    return f"{what}; `mtlib.tasks.mixture` and `episodes` make such streams from data."


MEANT = {
    "scalar type": "expected data and φ of one dtype: convert with .float(), or φ with .double()",
    "same dtype": "expected data and φ of one dtype: convert with .float(), or φ with .double()",
    "scalar outputs": "expected a loss that is a scalar tensor, the mean over the batch: reduction='mean'",
}
"""What torch's words mean, by a part of them."""


def _tensors(draw: Any) -> list[Tensor]:
    found = list[Tensor]()

    def add(d: Tensor) -> Tensor:
        found.append(d)
        return d

    over(add, draw)
    return found


def _kind(draw: Episode | Batch) -> tuple[Any, ...]:
    """What all draws of a stream share: type, dtypes, numbers of axes."""
    return type(draw), over(lambda d: (d.dtype, d.ndim), draw)


def _said(draw: Any) -> str:
    """The same in words: "Batch of float32 with 3 axes, …"."""
    each = (f"{str(d.dtype).removeprefix('torch.')} with {d.ndim} axes" for d in _tensors(draw))
    return f"{type(draw).__name__} of " + ", ".join(each)


def _number(quality: Any) -> float:
    """A quality as a number: a Score's is its mean."""
    if not isinstance(quality, Tensor):
        quality = getattr(quality, "mean", quality)
    try:
        return float(quality)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected a number or a Score from quality(φ), got {quality!r}") from error


def _check_arguments(
    objective: Any, steps: Any, first: Any, seed: Any, every: Any, stop: Any
) -> None:
    for name, n in (("steps", steps), ("first", first), ("seed", seed)):
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise TypeError(f"expected {name} to be a whole number, got {n!r}")
        if not 0 <= int(n) < 2**43:
            raise ValueError(f"expected {name} ≥ 0 (and below 2⁴³), got {n}")
    if isinstance(every, timedelta):
        if every <= timedelta():
            raise ValueError(f"expected every to be longer than 0 seconds, got {every}")
    elif not isinstance(every, Integral) or isinstance(every, bool):
        raise TypeError(f"expected every to be a number of steps or a timedelta, got {every!r}")
    elif int(every) < 1:
        raise ValueError(f"expected every ≥ 1, got {every}")
    if stop is not None and not isinstance(stop, EarlyStopping):
        raise TypeError(
            f"expected stop=early_stopping(quality, every=100, patience=5), got a {type(stop).__name__}"
        )
    if not isinstance(objective, Objective) and (
        isinstance(objective, Learner | nn.Module) or not takes(objective, 1)
    ):
        raise TypeError(
            "expected an Objective, or a function of the step that gives one; got a "
            f"{type(objective).__name__}. `bilevel(learner, loss)` or `joint(net, loss)` makes one."
        )


def _placed(params: Any, device: torch.device | str | None) -> Params:
    """φ to train: copies of the entries, on the device. Raises for what cannot be trained."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"expected φ as a dict of tensors, got a {type(params).__name__}: `parameters(net)` of a network, "
            "`learner.init()` of a learner"
        )
    if not params:
        raise ValueError("expected φ with entries to train, got an empty dict")
    for k, v in params.items():
        if not isinstance(k, str) or not isinstance(v, Tensor):
            raise TypeError(f"expected φ as {{name: tensor}}, got {k!r}: {type(v).__name__}")
        if not v.is_floating_point() or v.layout != torch.strided:
            raise TypeError(
                f"expected dense floating-point entries in φ, got {k} of {v.dtype}, {v.layout}: leave it in the network"
            )
        finite(v, f"φ's entry {k}")
    if not (device is None or isinstance(device, str | int | torch.device)):
        raise TypeError(f"expected a device such as 'cuda', or None, got {device!r}")
    if device is None and len({v.device for v in params.values()}) > 1:
        raise ValueError("expected φ on one device: move(phi, device), or fit(..., device=)")
    try:
        return {k: v.detach().to(device, copy=True) for k, v in params.items()}
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a device that is here, got {device!r}: {error}") from error


def _check_processes(job: _Job, failed: Exception | None) -> None:
    """Raise, in every process, if one of them failed, or unless all are at one step with the same φ and stream."""
    t, device = job.trainee, next(iter(job.trainee.phi.values())).device
    if size() > 1:
        numbers = {
            "failed": float(failed is not None),
            "step": len(t.losses),
            "parameters": sum(v.numel() for v in t.phi.values()),
            "sum of φ": sum(v.detach().cpu().double().sum().item() for v in t.phi.values()),
            "seed": job.seed,
            "first step": job.first,
            "stream sum": fingerprint(job.draws.start)["stream sum"],
        }
        path = job.keeper and job.keeper.path
        advice = {
            "failed": "See the message of the one that did.",
            "step": f"Does each of them see the file {path}? Put it on a file system that they share.",
            "seed": "Give `fit` one seed in all of them.",
            "first step": "Give `fit` one first= in all of them.",
            "stream sum": "Make the stream with one seed and the same data in all of them; `fit` divides its tasks.",
        }
        seeding = "Seed before making the network, in all of them: torch.manual_seed(0)."
        apart = spread(numbers, device)
        if failed:
            raise failed
        for name, (least, greatest) in apart.items():
            raise ValueError(
                f"expected the {size()} processes to begin alike; {name} lies between {least:.9g} and {greatest:.9g}. "
                + advice.get(name, seeding)
            )
    if failed:
        raise failed


def groups(
    phi: Params, rates: Mapping[str, float] | None = None, moves: Sequence[str] | None = None
) -> list[Any]:
    """φ's entries as an optimizer takes them: those that move, in groups where some have a rate of their own.

    Raises ValueError if a prefix fits no entry, if none is left to move, or for a rate that is none.
    """
    if not isinstance(phi, Mapping):
        raise TypeError(
            f"expected parameters, a dict of tensors such as `parameters(net)`, got {type(phi).__name__}"
        )
    rates = {} if rates is None else rates
    if not isinstance(rates, Mapping) or not all(isinstance(k, str) for k in rates):
        raise TypeError(
            f"expected rates as a dict of prefixes, {{'critic.': 1e-3}}, got {rates!r}; the rate of all entries is the "
            "optimizer's"
        )
    if moves is not None and (
        isinstance(moves, str)
        or not isinstance(moves, Iterable)
        or not all(isinstance(k, str) for k in moves)
    ):
        wanted = (moves,) if isinstance(moves, str) else ("body.",)
        raise TypeError(f"expected moves as prefixes, {wanted!r}, got {moves!r}")
    for prefix, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise ValueError(f"expected rates of at least 0, got {rate!r} for {prefix}*")
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
    if not isinstance(now, Objective):
        raise TypeError(
            f"expected an Objective from objective({step}), got a {type(now).__name__}: a function of the step gives what "
            "`bilevel(learner, loss)` or `joint(net, loss)` makes"
        )
    if before and now is not before and now.run and before.run:
        if now.run.compiled:
            raise ValueError(
                "expected compile=False in an objective that changes from step to step: each would be compiled anew. "
                "Give `fit` one objective, or return the same one for as long as nothing changes."
            )
        now.run.learn_from(before.run)
    return now


def _step(
    objective: Objective, phi: Params, draw: Any, seed: int, step: int, tasks: int | None = None
) -> tuple[Tensor, Params]:
    """Value and gradient over all tasks of a draw, of which each process takes a part where that is exact.

    With `tasks`, the draw is this process's part already, of so many. torch's random state is set by (seed, step, rank) and given back afterwards.
    """
    device = next(iter(phi.values())).device
    if size() == 1 or not objective.separable:
        return _seeded(objective, phi, move(draw, device), seed * 1_000_003 + step)
    drawn_alone = tasks is not None
    tasks = count(draw) if tasks is None else tasks
    mine = part(tasks)
    share = (mine.stop - mine.start) / tasks
    value, grads = torch.zeros((), device=device), dict[str, Tensor]()
    if share:
        data = move(draw if drawn_alone else take(draw, mine), device)
        value, grads = _seeded(
            objective, phi, data, seed * 1_000_003 + step + rank() * 2_654_435_761
        )
    return average(value, grads, phi, share)


def _seeded(objective: Objective, phi: Params, data: Any, seed: int) -> tuple[Tensor, Params]:
    device = next(iter(phi.values())).device
    with RANDOM, torch.random.fork_rng([]) if device.type == "cpu" else random_kept():
        if (
            device.type == "cpu"
        ):  # the same, without the stack that torch.manual_seed formats thrice
            torch.default_generator.manual_seed(seed)
        else:
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
