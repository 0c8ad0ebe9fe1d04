"""The state of a run: what an update changes, what the file holds of it, and whether a file is of the same run."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from inspect import Parameter, signature
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mtlib.core import Params, over
from mtlib.run.checkpoint import Checkpoint, read, sha256, write
from mtlib.run.processes import rank

FORMAT = 2  # of a run's file: 1 had neither the start nor the first step in it


class Best(NamedTuple):
    """The φ that early stopping found best: after how many steps, and its quality."""

    step: int
    quality: float


class Trainee:
    """What training changes: φ, optimizer, schedule, and what was found on the way.

    `identity` holds what decides the numbers and must be equal on both sides of a resumption, `rates` those that the
    schedule gives from the first step on, `evidence` the first step's loss and gradient in a few figures.
    """

    def __init__(
        self, phi: Params, rule: Optimizer, plan: LRScheduler | None, rates: Tensor | None = None
    ):
        self.phi, self.rule, self.plan, self.rates = phi, rule, plan, rates
        self.identity: dict[str, Any] = {}
        self.evidence: dict[str, Any] | None = None
        self.losses: list[float] = []
        self.best: Best | None = None
        self.best_params: Params = {}
        self.whole = True  # False while a step is being taken
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def update(self, loss: float, grads: Params) -> None:
        """One step of the optimizer, then of the schedule. Raises ValueError at a rate that is no rate."""
        self.whole = False
        for k, p in self.phi.items():
            p.grad = grads.get(k)  # an entry that does not move is not the optimizer's
        if self.plan:
            check_rates(self.rule, len(self.losses))
        try:
            self.rule.step()
        except (TypeError, AssertionError, RuntimeError) as error:
            if self.losses or isinstance(error, torch.OutOfMemoryError):
                raise
            raise TypeError(
                f"expected an optimizer that takes its step from dense gradients alone, by step(); {type(self.rule).__name__} "
                f"cannot. Write `optimizer=partial(torch.optim.Adam, lr=1e-3)`. It says: {error}"
            ) from error
        if self.plan:
            self.plan.step()
        self.losses.append(loss)

    # Files ---------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state; of several processes the first one alone does."""
        if rank() > 0:
            return
        state = self.rule.state_dict()
        tensors = {f"params/{k}": v for k, v in self.phi.items()}
        tensors |= {f"best/{k}": v for k, v in self.best_params.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for i, entries in state["state"].items():
            for k, v in entries.items():
                if isinstance(v, Tensor):
                    tensors[f"optimizer/{i}/{k}"] = v
                else:
                    numbers.setdefault(str(i), {})[k] = v
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        if self.rates is not None:
            tensors["rates"] = self.rates
        facts = {
            "format": FORMAT,
            "tensors": shapes(tensors),
            "identity": self.identity,
            "evidence": self.evidence,
            "step": len(self.losses),
            "seconds": self.seconds,
            "groups": [plain(g) for g in state["param_groups"]],
            "numbers": numbers,
            "best": self.best,
        }
        write(path, Checkpoint(tensors, facts))

    def resume(self, path: Path, evidence: Callable[[], dict[str, Any]]) -> None:
        """Continue from `path`, if there is such a file and it is of this run; φ must be the start still.

        `evidence()` computes the first step anew; of several processes the first one alone does. Raises ValueError.
        """
        if not path.exists():
            return
        tensors, facts = read(path)
        check_form(path, tensors, facts)
        self._same_network(path, tensors)
        different = difference(facts["identity"], self.identity, facts["torch"])
        different = different or self._other_rates(tensors)
        if not different and rank() == 0 and facts["evidence"] is not None:
            different = other_evidence(facts["evidence"], evidence(), self.phi)
        if different:
            raise ValueError(
                f"{path} was written by another run: {different}. Continue with the same settings, choose another "
                "file, or delete it. To go on from its φ with these settings, give `load_params(path)` as params and "
                "a new file as checkpoint."
            )
        self._load(path, tensors, facts)

    def _load(self, path: Path, tensors: Params, facts: dict[str, Any]) -> None:
        done, state = facts["step"], dict[int, dict[str, Any]]()
        for i, numbers in facts["numbers"].items():
            state[int(i)] = dict(numbers)
        for name, v in tensors.items():
            if name.startswith("optimizer/"):
                _, i, k = name.split("/", 2)
                state.setdefault(int(i), {})[k] = v
        own = self.rule.state_dict()["param_groups"]
        entries = sum(len(g["params"]) for g in own)
        if len(facts["groups"]) != len(own) or any(not 0 <= i < entries for i in state):
            raise ValueError(
                damaged(path, "its optimizer has other groups or entries than this one")
            )
        groups = list[dict[str, Any]]()
        for g, saved in zip(own, facts["groups"], strict=True):
            if odd := other_kind(g, saved, facts["torch"]):
                raise ValueError(damaged(path, f"its optimizer's {odd}"))
            groups.append({**g, **saved, "params": g["params"]})
        with torch.no_grad():
            for k, v in self.phi.items():
                v.copy_(tensors[f"params/{k}"])
        if self.plan:  # a function of its steps: replay them (its state may hold functions)
            walk(self.plan, done)
        for mine, g in zip(self.rule.param_groups, groups, strict=True):
            for k, v in mine.items():
                if k != "params" and isinstance(v, Tensor) and isinstance(g[k], float):
                    g[k] = torch.full_like(v, g[k])
        self.rule.load_state_dict({"state": state, "param_groups": groups})
        check_rates(self.rule, done)
        self.losses, self.evidence = tensors["losses"].tolist(), facts["evidence"]
        self.began = time.perf_counter() - facts["seconds"]
        if facts["best"]:
            self.best = Best(*facts["best"])
            self.best_params = {k: tensors[f"best/{k}"].to(v.device) for k, v in self.phi.items()}

    def _same_network(self, path: Path, tensors: Params) -> None:
        expected = {k: (tuple(v.shape), v.dtype) for k, v in self.phi.items()}
        for prefix in ("params/", "best/"):
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            shapes = {k: (tuple(v.shape), v.dtype) for k, v in held.items()}
            odd = [k for k in {**expected, **shapes} if expected.get(k) != shapes.get(k)]
            if odd and (shapes or prefix == "params/"):
                raise ValueError(
                    f"{path} is a checkpoint of another network: {odd[0]} is {shapes.get(odd[0], 'absent')} there, "
                    f"{expected.get(odd[0], 'absent')} here ({len(odd)} entries differ). Choose another file or delete it."
                )

    def _other_rates(self, tensors: Params) -> str | None:
        """The first step at which the schedule gives another rate than it did, as far as both were planned."""
        there, here = tensors.get("rates"), self.rates
        if there is None or here is None:
            return None if there is here else "it has a schedule on one side alone"
        if there.ndim != 2 or there.shape[1] != here.shape[1]:
            return f"the schedule gave {list(there.shape)[1:]} rates a step there, {here.shape[1]} here"
        n = min(len(there), len(here))
        apart = ~torch.isclose(there[:n], here[:n], rtol=1e-9, atol=1e-15).all(1)
        if not apart.any():
            return None
        at = int(apart.nonzero()[0])
        return (
            f"the schedule's rate {at} steps on is {there[at].tolist()} there, {here[at].tolist()} here. Is it made for "
            "another number of steps?"
        )


# What a file must hold -----------------------------------------------------------------------


def shapes(tensors: Params) -> dict[str, list[Any]]:
    """Shape and dtype of each tensor, as JSON keeps them."""
    return {k: [list(v.shape), str(v.dtype)] for k, v in tensors.items()}


def damaged(path: Path, what: str) -> str:
    """A message for a file that holds together, but no run."""
    return f"{path} is damaged or was changed by hand: {what}. Delete it to start afresh."


def check_form(path: Path, tensors: Params, facts: dict[str, Any]) -> None:
    """Raise ValueError unless the file is a run's, in today's form, with every fact of the right type."""
    if "format" not in facts or facts["format"] != FORMAT:
        raise ValueError(
            f"{path} holds parameters, or a run of an older mtlib, which does not say what run it was (format "
            f"{facts.get('format')}, expected {FORMAT}). To go on from its φ, give `load_params(path)` as params and a new "
            "file as checkpoint."
        )
    kinds: dict[str, Callable[[Any], bool]] = {
        "step": lambda v: type(v) is int and v >= 0,
        "seconds": lambda v: isinstance(v, int | float) and v >= 0,
        "torch": lambda v: isinstance(v, str),
        "identity": lambda v: isinstance(v, dict),
        "evidence": lambda v: is_evidence(v) or (v is None and facts["step"] == 0),
        "groups": lambda v: isinstance(v, list) and all(isinstance(g, dict) for g in v),
        "numbers": lambda v: (
            isinstance(v, dict) and all(i.isdecimal() and isinstance(n, dict) for i, n in v.items())
        ),
        "tensors": lambda v: isinstance(v, dict),
        "best": lambda v: (
            v is None
            or (
                isinstance(v, list) and list(map(type, v)) == [int, float] and v[0] <= facts["step"]
            )
        ),
    }
    for name, fits in kinds.items():
        if name not in facts or not fits(facts[name]):
            raise ValueError(damaged(path, f"its {name} is {str(facts.get(name, 'absent'))[:60]}"))
    held = shapes(tensors)
    for k in {**facts["tensors"], **held}:
        here, there = held.get(k, "absent"), facts["tensors"].get(k, "absent")
        if here != there:
            raise ValueError(
                damaged(path, f"its tensor {k} is {here}, {there} when it was written")
            )
    if held.get("losses") != [[facts["step"]], "torch.float64"]:
        raise ValueError(
            damaged(path, f"its losses are {held.get('losses')} after {facts['step']} steps")
        )
    if facts["best"] and not any(k.startswith("best/") for k in tensors):
        raise ValueError(damaged(path, "the best φ is missing"))
    if any(k.startswith("optimizer/") and not k.split("/")[1].isdecimal() for k in tensors):
        raise ValueError(damaged(path, "its optimizer's state has no number of an entry"))


# Whether two runs are the same ---------------------------------------------------------------


def settings(phi: Params, rule: Optimizer, plan: LRScheduler | None) -> dict[str, Any]:
    """Class and settings of optimizer and schedule, and which entries each group has, before any step."""
    names = {id(p): k for k, p in phi.items()}
    groups = [
        {**plain({**g, "params": None}), "params": [names[id(p)] for p in g["params"]]}
        for g in rule.param_groups
    ]
    return {
        "optimizer": type(rule).__name__,
        "schedule": type(plan).__name__ if plan else None,
        "optimizer's group": groups,
        "schedule's setting": plain(plan.state_dict()) if plan else None,
    }


def other_kind(group: dict[str, Any], saved: dict[str, Any], version: str) -> str | None:
    """The first number of an optimizer's group that the saved one has not, or not as a number."""
    here, there = dict(flat(plain(group))), dict(flat(saved))
    for k, v in here.items():
        number = isinstance(v, int | float) and not k.startswith("params")
        known = k in there or version != torch.__version__
        if number and not (known and isinstance(there.get(k, v), int | float)):
            return f"{k} is {there.get(k, 'absent')!r}, expected a number"
    return None


def plain(value: Any) -> Any:
    """What JSON can keep of settings: numbers, words, and nests of them; what is neither is left out."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {str(k): p for k, v in value.items() if (p := plain(v)) is not Ellipsis}
    if isinstance(value, list | tuple):
        found = [plain(v) for v in value]
        return Ellipsis if Ellipsis in found else found
    return value if value is None or isinstance(value, bool | int | float | str) else Ellipsis


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and words of a nest, each under its full name: ("optimizer.groups[0].lr", 0.01)."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from flat(v, f"{name}.{k}" if name else k)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from flat(v, f"{name}[{i}]")
    else:
        yield name, value


def difference(there: dict[str, Any], here: dict[str, Any], version: str) -> str | None:
    """The first setting that is not the same; one that a torch of another version lacks does not count."""
    a, b = dict(flat(there)), dict(flat(here))
    for k in {**b, **a}:
        lacking = k not in a or k not in b
        if lacking and version != torch.__version__:
            continue
        x, y = a.get(k, "absent"), b.get(k, "absent")
        near = (
            k == "stream sum"
            and isinstance(x, float)
            and math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6)
        )
        if not (near or (x == y and type(x) is type(y)) or (x != x and y != y)):
            hint = START if k == "starting φ" else ""
            return f"{k} is {str(x)[:80]} there, {str(y)[:80]} here{hint}"
    return None


START = " (a digest; is the network drawn with a seed, and `params` the start, not what was trained since?)"


def evidence(value: Tensor, grads: Params) -> dict[str, Any]:
    """A step's loss and gradient in a few figures: for each entry its norm, and its product with one fixed direction."""

    def figures(g: Tensor) -> list[float]:
        g = g.detach().cpu().double().flatten()  # not every device has float64
        wave = torch.cos(torch.arange(1.0, len(g) + 1, dtype=torch.float64))
        return [g.norm().item(), (g @ wave).item()]

    return {
        "device": value.device.type,
        "loss": value.item(),
        "gradient": {k: figures(g) for k, g in grads.items()},
    }


def is_evidence(v: Any) -> bool:
    """Whether v has the form of `evidence`."""
    return (
        isinstance(v, dict)
        and isinstance(v.get("device"), str)
        and isinstance(v.get("loss"), float)
        and isinstance(v.get("gradient"), dict)
        and all(
            isinstance(f, list) and list(map(type, f)) == [float] * 2
            for f in v["gradient"].values()
        )
    )


def other_evidence(there: dict[str, Any], here: dict[str, Any], phi: Params) -> str | None:
    """What differs in loss or gradient of the first step: by 10⁻⁴, between kinds of device or in half precision by 10⁻²."""
    half = any(torch.finfo(v.dtype).eps > 1e-6 for v in phi.values())
    tolerance = 1e-2 if half or there.get("device") != here["device"] else 1e-4
    advice = (
        "The learner, its inner rate or hypergradient, the network or the data are others, or random numbers come from "
        "elsewhere than torch"
    )
    a, b = there["loss"], here["loss"]
    if not math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9):
        return f"the first step's loss is {a:.6g} there, {b:.6g} here. {advice}"
    old, new = there["gradient"], here["gradient"]
    whole = math.hypot(*(norm for norm, _ in old.values()))
    for k in {**old, **new}:
        if k not in old or k not in new:
            return f"the first step's gradient reaches {k} {'here' if k in new else 'there'} alone. {advice}"
        allowed = tolerance * (old[k][0] + 0.01 * whole)
        for what, x, y in zip(("norm", "direction"), old[k], new[k], strict=True):
            if not abs(x - y) <= allowed:  # NaN is another number, too
                return f"the first step's gradient of {k} has {what} {x:.6g} there, {y:.6g} here. {advice}"
    return None


def fingerprint(draw: Any) -> dict[str, Any]:
    """What identifies a stream: the shapes and the sum of its first draw (sums, as the last bits of sin differ by machine)."""
    found: list[list[int]] = []
    total = 0.0

    def add(d: Tensor) -> Tensor:
        nonlocal total
        found.append(list(d.shape))
        total += d.detach().cpu().double().abs().sum().item()
        return d

    over(add, draw)
    return {"stream shapes": found, "stream sum": total}


def start_of(params: Params) -> dict[str, str]:
    """What identifies the starting φ: a digest of its names, shapes and bytes."""
    return {
        "starting φ": sha256("", {k: v.detach().cpu().contiguous() for k, v in params.items()})[:16]
    }


# Optimizer and schedule ----------------------------------------------------------------------


def made(
    phi: Params, entries: list[Any], optimizer: Any, schedule: Any
) -> tuple[Optimizer, LRScheduler | None]:
    """The optimizer over φ's entries that move, and its schedule. Raises TypeError or ValueError for what is none."""
    if isinstance(optimizer, type | Optimizer) or not callable(optimizer):
        name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"expected optimizer= as a function of φ's entries that says the rate, `partial(torch.optim.SGD, lr=0.1)`; "
            f"got {name} {'without a rate' if isinstance(optimizer, type) else 'itself'}. {_line(optimizer)}"
        )
    try:
        rule = optimizer(entries)
    except (TypeError, ValueError) as error:
        raise type(error)(f"optimizer= gives no optimizer: {error}") from error
    if not isinstance(rule, Optimizer):
        raise TypeError(
            f"expected optimizer= to give a torch Optimizer, got a {type(rule).__name__}"
        )
    closure = signature(rule.step).parameters.get("closure")
    if closure and closure.default is Parameter.empty:
        raise TypeError(
            f"expected an optimizer whose step takes no closure, got {type(rule).__name__}: `fit` gives it one gradient a "
            "step, and it would compute the loss anew. Write `optimizer=partial(torch.optim.Adam, lr=1e-3)`."
        )
    own = {id(p) for p in phi.values()}
    if any(id(p) not in own for g in rule.param_groups for p in g["params"]):
        raise ValueError(
            "expected an optimizer over the entries that it is given, `lambda entries: SGD(entries, lr=0.1)`; got one "
            "over other tensors, which `fit` does not train"
        )
    check_rates(rule, 0)
    return rule, None if schedule is None else plan_of(rule, schedule)


def _line(optimizer: Any) -> str:
    """What to write in the place of an optimizer that is made, or of its class."""
    made = isinstance(optimizer, Optimizer)
    kind = (
        type(optimizer) if made else optimizer if isinstance(optimizer, type) else torch.optim.Adam
    )
    name = f"torch.optim.{kind.__name__}" if hasattr(torch.optim, kind.__name__) else kind.__name__
    rate = float(optimizer.defaults.get("lr", 1e-3)) if made else 1e-3
    why = "It is of other tensors than φ's. " if made else ""
    return f"{why}Write `optimizer=partial({name}, lr={rate:g})`."


def planned(
    make: Callable[[], tuple[Optimizer, LRScheduler | None]], first: int, steps: int
) -> Tensor | None:
    """The rates of all steps to come, from a schedule of its own."""
    plan = make()[1]
    return walk(plan, first + steps)[first:] if plan else None


def plan_of(rule: Optimizer, schedule: Any) -> LRScheduler:
    """The schedule of an optimizer. Raises TypeError or ValueError for what is none."""
    made = isinstance(schedule, LRScheduler)
    if isinstance(schedule, nn.Module) or not (made or callable(schedule)):
        raise TypeError(
            "expected schedule= as a function of the optimizer, `lambda o: CosineAnnealingLR(o, steps)`; got a "
            f"{type(schedule).__name__}"
        )
    try:
        plan = schedule if made else schedule(rule)
    except TypeError as error:
        raise TypeError(
            f"schedule= gives no schedule of an optimizer: {error}. Write `schedule=lambda o: StepLR(o, step_size=10)`, or "
            "`partial(StepLR, step_size=10)`."
        ) from error
    if isinstance(plan, ReduceLROnPlateau):
        raise TypeError(
            "expected a schedule that is a function of the step; ReduceLROnPlateau waits for a metric, which `fit` has not. "
            "Write `schedule=lambda o: CosineAnnealingLR(o, steps)`; to end where a metric on validation data no longer "
            "rises, `stop=early_stopping(quality)`."
        )
    if made:
        name = type(schedule).__name__
        raise TypeError(
            "expected schedule= as a function of the optimizer, `lambda o: CosineAnnealingLR(o, steps)`; got a "
            f"{name}, which belongs to another optimizer. Write `schedule=lambda o: {name}(o, ...)` with the same settings."
        )
    if not isinstance(plan, LRScheduler):
        raise TypeError(
            f"expected schedule= to give a torch LRScheduler, got a {type(plan).__name__}"
        )
    if plan.optimizer is not rule:
        raise ValueError(
            "expected a schedule of the optimizer that it is given, `lambda o: CosineAnnealingLR(o, steps)`; got one of "
            "another optimizer"
        )
    check_rates(rule, 0)
    return plan


def check_rates(rule: Optimizer, step: int) -> None:
    """Raise ValueError unless each group's rate is a number of at least 0 (but for rounding)."""
    for g in rule.param_groups:
        if not -1e-12 <= g.get("lr", 0.0) < math.inf:
            raise ValueError(
                f"expected learning rates of at least 0, got {float(g['lr']):.6g} after {step} steps: is the schedule "
                "made for fewer steps?"
                if step
                else f"expected learning rates of at least 0, got {float(g['lr']):.6g}"
            )


def walk(plan: LRScheduler, steps: int) -> Tensor:
    """The rates (steps, groups) that a schedule gives, as it goes on by so many steps."""
    found = list[list[float]]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()": those are no steps
        for _ in range(steps):
            found.append([float(g["lr"]) for g in plan.optimizer.param_groups])
            plan.step()
    return torch.tensor(found, dtype=torch.float64).reshape(steps, len(plan.optimizer.param_groups))


# When to save --------------------------------------------------------------------------------


class Keeper:
    """Saves a trainee to a file: every so many steps, or after a time, of which the first process alone decides."""

    def __init__(self, path: Path, every: int | timedelta):
        self.path, self.every, self.saved = path, every, time.perf_counter()

    def due(self, done: int) -> bool:
        if isinstance(self.every, timedelta):
            return rank() == 0 and time.perf_counter() - self.saved >= self.every.total_seconds()
        return done % self.every == 0

    def save(self, trainee: Trainee) -> None:
        trainee.save(self.path)
        self.saved = time.perf_counter()


class Termination:
    """`with Termination(path is not None) as end:` a SIGTERM waits until `end.pass_on()`, or the end of the block.

    It only sets `end.asked`. Then the handler from before has it: by default the process dies of the signal. Outside of
    the main thread, or where SIGTERM is ignored, nothing changes.
    """

    def __init__(self, wanted: bool = True):
        self.asked = False
        self.before = signal.getsignal(signal.SIGTERM)
        main = threading.current_thread() is threading.main_thread()
        self.here = wanted and main and self.before not in (None, signal.SIG_IGN)

    def __enter__(self) -> Termination:
        if self.here:
            signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.here:
            return
        signal.signal(signal.SIGTERM, self.before)
        if self.asked:
            self.asked = False
            if callable(self.before):
                self.before(signal.SIGTERM, None)
            else:
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def pass_on(self) -> None:
        """Let the handler from before have the signal; where that returns, training goes on."""
        self.__exit__(None, None, None)
        self.__enter__()
