"""A private copy of a network for each call: what happens to it there, neither the user nor another thread sees.

θ is put into the copy and never into the user's network, so that nothing has to be put back: not after Ctrl-C, not while
another thread trains on the same network.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from mtlib.core import Params, expect, lend, over, require, require_statistics, rows, ways
from mtlib.run.chain import chain
from mtlib.run.transformers import is_exact, own_forward

P = ParamSpec("P")
R = TypeVar("R")


class _Mode(threading.local):
    """What holds in one thread."""

    evaluating = False


_MODE = _Mode()
_LENT = threading.RLock()
_ORDINARY = frozenset(vars(nn.Module()))  # the attributes that every module has
_TENSORS = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(k for k in _ORDINARY if isinstance(vars(nn.Module())[k], dict) and k not in _TENSORS)


@contextmanager
def evaluating(on: bool = True) -> Iterator[None]:
    """Networks called in this thread are in evaluation mode: dropout is off, norms read the statistics that θ has.

    The user's network stays in its own mode. A norm whose statistics are not in θ takes them from its input, as in training.
    """
    before, _MODE.evaluating = _MODE.evaluating, on
    try:
        yield
    finally:
        _MODE.evaluating = before


def grad_mode_kept(f: Callable[P, R]) -> Callable[P, R]:
    """f, after which torch's gradients are on or off as they were before.

    Ctrl-C inside of the way out of `torch.no_grad()` would leave them off for all that comes after.
    """

    @wraps(f)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # where nobody interrupts
            return f(*args, **kwargs)
        on = torch.is_grad_enabled()
        try:
            return f(*args, **kwargs)
        finally:
            torch.set_grad_enabled(on)

    return kept


def is_evaluating() -> bool:
    """Whether `evaluating` holds in this thread."""
    return _MODE.evaluating


def call(net: nn.Module, theta: Params, x: Any) -> Tensor:
    """The network's answer to x, with θ's entries in the place of its parameters and buffers.

    Raises ValueError where it cannot read x, or its answer is no tensor, or tensors of x have not one number of rows.
    """
    nest = not isinstance(x, Tensor)
    if nest:
        rows(x)
    try:
        out: Any = _called(net, theta, x)
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        if any(word in str(error) for word in WORDS) or (
            nest and not isinstance(error, RuntimeError)
        ):
            raise ValueError(_unreadable(net, x, error)) from error
        raise
    if not isinstance(out, Tensor):
        part = "[0]" if isinstance(out, tuple | list) else ".logits"
        raise ValueError(
            f"expected {_name(net)} to give a tensor, got {type(out).__name__}: "
            f"`mtlib.nets.wrap(net, call=lambda net, x: net(x){part})` takes it out"
        )
    return out


def _called(net: nn.Module, theta: Params, x: Any) -> Any:
    if torch.compiler.is_compiling():
        return lend(net, theta, x)
    if (out := chain(net, theta, x)) is not None:
        return out
    try:
        copy = private(net, theta)
    except _Bound as reason:
        return _lent(net, theta, x, reason)
    out = copy.net(x)
    for kept in copy.buffers:
        kept.warn_if_written()
    return out


WORDS = (
    *("shape", "size", "channels", "dtype", "scalar type", "Input type", "be Tensor", "missing"),
    "must be a mapping",
)
"""What torch's messages say where a network cannot read x."""


def _unreadable(net: nn.Module, x: Any, error: Exception) -> str:
    shown = over(lambda d: f"{tuple(d.shape)}, {d.dtype}", x)
    more = ""
    if not isinstance(x, Tensor):
        more = (
            ". It is called with x as one argument; for keywords, "
            "`mtlib.nets.wrap(net, call=lambda net, x: net(**x))`"
        )
    elif "must be Tensor, not" in str(error):
        more = (
            ". A part of it that gives an object or a tuple is wrapped: "
            "`mtlib.nets.wrap(part, call=lambda part, x: part(x)[0])`"
        )
    elif x.dtype == torch.uint8:
        more = ". Bytes become 0 to 1 with cast=torch.float32 in `episodes` and `mixture`."
    said = str(error)
    if len(said) > 300:  # Python may begin with the whole network
        said = "… " + " ".join(said.split())[-200:]
    return f"{_name(net)} cannot read x of shape {shown}: {said}{more}"


def _name(net: nn.Module) -> str:
    """What a user calls a network; of a wrapped one, the class of what is in it."""
    return type(getattr(getattr(net, "body", net), "whole", net)).__name__


class Copy(NamedTuple):
    """A copy of a network, and the buffers in it whose change would be lost."""

    net: nn.Module
    buffers: list[Buffer]


class Buffer(NamedTuple):
    """A buffer of a copy, as it was before the call."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int

    def warn_if_written(self) -> None:
        """A forward pass that writes to a buffer: φ cannot learn of it, which for all but norms comes as a surprise."""
        now = vars(self.module)["_buffers"].get(self.name)
        if now is not self.tensor or now._version != self.version:
            warnings.warn(
                f"{type(self.module).__name__} writes to its buffer {self.name!r} in a forward pass: here this is lost, as "
                "φ alone holds what training changes. Call net.eval() before training if it should stay as it is.",
                stacklevel=2,
            )


def private(net: nn.Module, theta: Params) -> Copy:
    """A copy of a network with θ's entries in it; everything else is shared. Its buffers are copies that may be written to.

    Raises ValueError where θ lacks a parameter, or a statistic that a norm reads, or a parameter has another shape.
    """
    expect(isinstance(theta, dict), "parameters {name: tensor}", theta)
    work = _Copying(net, theta)
    whole = work.copied(net, "")
    for m in [*work.copies.values()]:
        _rebind(vars(m), work.copies)
    return Copy(whole, work.buffers)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a copy of a module has of it: all but a `forward` of ours, which would go on with the module that it is of."""
    own = vars(module)
    return {k: v for k, v in own.items() if k != "forward"} if is_exact(module) else own


class _Copying:
    """One network being copied. (Functions that call themselves would hold θ until Python's collector comes.)"""

    def __init__(self, net: nn.Module, theta: Params):
        self.net, self.theta = net, theta
        self.copies, self.given = dict[int, nn.Module](), dict[int, Tensor]()
        self.buffers = list[Buffer]()
        like = next(iter(theta.values()), None)
        self.device = None if like is None else like.device

    def copied(self, module: nn.Module, place: str) -> nn.Module:
        """The copy of a module and of those below it, each once."""
        if id(module) in self.copies:
            return self.copies[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            raise _Bound("it is TorchScript")
        own = attributes(module)
        new = self.copies[id(module)] = object.__new__(type(module))
        now = vars(new)
        now.update(own)
        if "forward" not in own and (forward := own_forward(new)):
            now["forward"] = forward
        follows = own.get("track_running_stats", False) and own["training"]
        now["_parameters"] = {
            k: self.parameter(p, module, place, k) for k, p in own["_parameters"].items()
        }
        if own["_buffers"]:
            held = own["_buffers"].items()
            now["_buffers"] = {k: self.buffer(new, b, k, place, follows) for k, b in held}
        if _MODE.evaluating and own["training"]:
            now["training"] = bool(
                follows
                and own["_buffers"].get("running_mean") is not None
                and f"{place}running_mean" not in self.theta
            )
        now["_modules"] = {
            k: None if m is None else self.copied(m, f"{place}{k}.")
            for k, m in own["_modules"].items()
        }
        if isinstance(module, Called):
            twin = self.copies[id(module.part)] = object.__new__(type(module.part))
            vars(twin).update(
                attributes(module.part), **{k: now[k] for k in (*_TENSORS, "training")}
            )
            self.copied(module.whole, place)
            for original, copy in module.copies:
                self.copies[id(original)] = self.copies[id(copy)]
        return new

    def parameter(self, p: Tensor | None, module: nn.Module, place: str, k: str) -> Tensor | None:
        """θ's entry for a parameter; of tied ones, that of the first."""
        if p is None:
            return None
        if id(p) not in self.given:
            name = place + k
            if name not in self.theta:
                require(self.theta, (k for k, _ in self.net.named_parameters()))
            self.given[id(p)] = self.theta[name]
            if self.theta[name].shape != p.shape:
                _check_outputs(module, place, k, self.theta)
        return self.given[id(p)]

    def buffer(
        self, module: nn.Module, b: Tensor | None, k: str, place: str, follows: bool
    ) -> Tensor | None:
        """A copy of θ's entry for a buffer, or of the module's own."""
        name = place + k
        held = self.theta.get(name, b)
        if held is None:
            return None
        if name not in self.theta and k in ("running_mean", "running_var") and not follows:
            require_statistics(self.theta, {name: module})
        new = held.detach().to(self.device, copy=True)
        if not hasattr(module, "track_running_stats"):
            self.buffers.append(Buffer(module, k, new, new._version))
        return new


class Called(nn.Module):
    """call(whole, x) as a module: it has the tensors of `part`, a module of `whole` or `whole` itself, under their names there.

    The two share the dicts of their tensors and children, so that what is put into the one is in the other. Where `whole`
    has `copies` of modules, pairs of the original and its copy, what refers to the original means the copy.
    """

    whole: nn.Module
    part: nn.Module
    call: Callable[[nn.Module, Any], Any]
    copies: Sequence[tuple[nn.Module, nn.Module]]

    def __init__(
        self,
        whole: nn.Module,
        part: nn.Module,
        call: Callable[[nn.Module, Any], Any],
        copies: Sequence[tuple[nn.Module, nn.Module]] = (),
    ):
        super().__init__()
        shared = (*_TENSORS, "_non_persistent_buffers_set", "training")
        vars(self).update(
            {k: vars(part)[k] for k in shared}, whole=whole, part=part, call=call, copies=copies
        )

    def forward(self, x: Any) -> Any:
        return self.call(self.whole, x)

    def train(self, mode: bool = True) -> Called:
        """The mode of both; what has no tensors, such as a dropout, may be in the whole alone."""
        self.whole.train(mode)
        return super().train(mode)


def replaced(
    net: nn.Module, place: str, new: nn.Module
) -> tuple[nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """The network with another module in one place: the modules on the way there are copies, all else is shared.

    With it the pairs of an original and its copy. Raises ValueError where one of them cannot be copied.
    """
    copies, pairs = dict[int, nn.Module](), list[tuple[nn.Module, nn.Module]]()

    def copied(module: nn.Module, way: list[str]) -> nn.Module:
        if not way:
            return new
        if isinstance(module, torch.jit.ScriptModule):
            raise _Bound("it is TorchScript")
        twin = copies[id(module)] = object.__new__(type(module))
        pairs.append((module, twin))
        child = copied(module.get_submodule(way[0]), way[1:])
        vars(twin).update(attributes(module), _modules={**module._modules, way[0]: child})
        return twin

    try:
        whole = copied(net, place.split("."))
        for m in copies.values():
            _rebind(vars(m), copies)
    except _Bound as reason:
        raise ValueError(
            f"expected a network that can be copied, got {type(net).__name__}; {reason}"
        ) from reason
    return whole, pairs


def copyable(net: nn.Module, theta: Params) -> None:
    """Raise ValueError where there can be no private copy of a network."""
    try:
        private(net, theta)
    except _Bound as reason:
        raise ValueError(
            f"expected a network that can be copied, got {type(net).__name__}; {reason}"
        ) from reason


def _check_outputs(module: nn.Module, place: str, k: str, theta: Params) -> None:
    """Raise ValueError where an entry has another shape, unless it is a linear layer with another number of outputs.

    Such is a head that a learner makes in the task, one output for each of its classes.
    """
    w, b = theta.get(f"{place}weight"), theta.get(f"{place}bias")
    if (
        isinstance(module, nn.Linear)
        and w is not None
        and w.shape[1:] == module.weight.shape[1:]
        and (module.bias is None or (b is not None and b.shape == w.shape[:1]))
    ):
        return
    raise ValueError(
        f"expected {place}{k} of shape {tuple(getattr(module, k).shape)}, as the network has it; got "
        f"{tuple(theta[place + k].shape)}. Were the parameters trained for another network? `start(learner, trained)` "
        "carries them over."
    )


def before(module: nn.Module, look: Callable[[nn.Module, tuple[Any, ...]], Any]) -> None:
    """look(module, args) before each call of a module of a copy; the original gets no hook."""
    vars(module)["_forward_pre_hooks"] = vars(module)["_forward_pre_hooks"].copy()
    module.register_forward_pre_hook(look)


class _Bound(Exception):
    """A module holds a function or an object that means the original network, where no copy can be put in its place."""


_SIMPLE = (int, float, str, bool, type(None), torch.dtype, torch.device, Tensor, nn.Parameter)


def _rebind(own: dict[str, Any], copies: dict[int, nn.Module]) -> None:
    """Let a copy's other attributes, and its hooks, mean the copies where they mean modules of the original."""
    for k in _HOOKS:
        if own[k]:
            own[k] = _meant(own[k], copies)
    if len(own) > len(_ORDINARY):
        for k, v in own.items():
            if k not in _ORDINARY and type(v) not in _SIMPLE:
                if k == "forward" and isinstance(v, FunctionType):
                    raise _Bound("`forward` was replaced by a function")
                own[k] = _meant(v, copies)


def _meant(v: Any, copies: dict[int, nn.Module], depth: int = 3) -> Any:
    """The same value, for the copies; a list, dict or set is a new one, so that a forward pass may write to it."""
    if type(v) in _SIMPLE:
        return v
    if isinstance(v, nn.Module):
        return copies.get(id(v), v)
    if isinstance(v, MethodType):
        return MethodType(v.__func__, _meant(v.__self__, copies, depth))
    if type(v) is partial:
        parts = (_meant(p, copies, depth) for p in (v.func, v.args, v.keywords))
        func, args, keywords = parts
        return partial(func, *args, **keywords)
    if type(v) in (list, tuple, set):
        long = len(v) > 1000 or not depth
        return type(v)(v if long else [_meant(e, copies, depth - 1) for e in v])
    if isinstance(v, deque):
        return v.copy()
    if isinstance(v, dict):
        new = v.copy()
        if depth and len(v) <= 1000:
            new.update((k, _meant(e, copies, depth - 1)) for k, e in v.items())
        return new
    for part in _parts(v):
        if id(getattr(part, "__self__", part)) in copies:
            raise _Bound(
                f"its {getattr(v, '__qualname__', type(v).__name__)} refers to a module of it"
            )
    return v


def _parts(v: Any) -> list[Any]:
    """What a function holds in its closure, an object in its attributes, or what a weak reference means."""
    if isinstance(v, ReferenceType):
        return [v()]
    if isinstance(v, FunctionType):
        full = [c for c in v.__closure__ or () if c != CellType()]
        return [c.cell_contents for c in full]
    return list(getattr(v, "__dict__", {}).values()) if not isinstance(v, type) else []


def _lent(net: nn.Module, theta: Params, x: Any, reason: Exception) -> Any:
    """θ put into the user's own network, one thread at a time: where it cannot be copied. (The attempt has looked at θ.)"""
    if _MODE.evaluating and any(m.training for m in net.modules()):
        raise ValueError(
            f"expected a network that can be copied for an evaluation; {reason}. Call net.eval() first: dropout is then "
            "off, and norms read their stored statistics."
        )
    with _LENT:
        return lend(net, theta, x)


def changed(net: nn.Module, theta: Params, x: Any, change: Callable[[nn.Module], None]) -> Any:
    """As `call`, of a copy that `change(copy)` was done to. Raises ValueError where there can be no copy."""
    if not isinstance(x, Tensor):
        rows(x)
    try:
        copy = private(net, theta)
    except _Bound as reason:
        raise ValueError(f"expected a network that can be copied; {reason}") from reason
    change(copy.net)
    out = copy.net(x)
    for kept in copy.buffers:
        kept.warn_if_written()
    return out


ways.call = call
