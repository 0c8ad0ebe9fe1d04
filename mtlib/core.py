"""Tasks, learners, and a network as a function of its parameters.

Axis letters, here and everywhere: T tasks · N support · Q query · B batch · W ways (outputs) ·
D features · C classes.  `phi` is what tasks share, `theta` what one task adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]
"""Names as in `net.named_parameters()`; a method's own entries travel along under their own prefix."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(prediction, y)` -> scalar, the mean over the batch; torch's own losses fit."""

Rate = float | Tensor | Params | Callable[[int], Any]
"""One step size, or one per entry of θ, or a function of the step that gives either."""

Rule = Callable[[Params, Any], tuple[Params, Any]]
"""`rule(gradient, state)` -> (direction, state): how a step is made from a gradient; `state` is None at first."""


class Batch(NamedTuple):
    """Items `x` (B, *item) and their targets `y` (B, W), one-hot or real; a draw of a stream has an axis T before."""

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """One task: the `support` that it may learn from, and the `query` that it is asked."""

    support: Batch
    query: Batch


Point = tuple[Params, Any]
"""Where an inner loop stands: the entries that move, and the state of its rule."""

Draw = Episode | Batch
"""What a stream gives: an Episode or a Batch with a leading axis T of tasks."""

Stream = Callable[[int], Draw]
"""`stream(step)` -> a draw; the same step gives the same draw, always."""


class Steps(NamedTuple):
    """An `adapt` that goes in steps: θ_0 = begin(φ, S), θ_{j+1} = step(φ, S, j, θ_j) for j < `steps`.

    Called like any other: steps(φ, S) -> θ_K. θ has φ's entries and those that moved; with `alone`, these only.
    `given(φ, S)` is φ as all steps see it, computed once: with a fresh head, for one. `descent(φ, S)` gives the loss
    that they go down, L(θ) for the entries that move, and the rate; it is None where they need not go down.
    """

    begin: Callable[[Params, Batch], Point]
    step: Callable[[Params, Batch, int, Point], Point]
    steps: int
    given: Callable[[Params, Batch], Params] = lambda phi, support: phi
    alone: bool = False
    descent: Callable[[Params, Batch], tuple[Callable[[Params], Tensor], Rate]] | None = None

    def __call__(self, phi: Params, support: Batch) -> Params:
        for theta in self.path(phi, support):
            last = theta
        return last

    def path(self, phi: Params, support: Batch) -> Iterator[Params]:
        """θ_0, …, θ_K, one at a time."""
        phi = self.given(phi, support)
        point = self.begin(phi, support)
        yield self.theta(phi, point)
        for j in range(self.steps):
            point = self.step(phi, support, j, point)
            yield self.theta(phi, point)

    def theta(self, phi: Params, point: Point) -> Params:
        """θ at a point of the way, where φ is the given one."""
        return point[0] if self.alone else {**phi, **point[0]}


class Learner(NamedTuple):
    """What happens inside one task: three pure functions.

    `init() -> phi`, `adapt(phi, support) -> theta`, `predict(theta, x) -> (B, W)`. An `adapt` with inner steps is a
    value `Steps`. `x` is the whole query batch: a transductive learner may use all of it, and says so.
    """

    init: Callable[[], Params]
    adapt: Callable[[Params, Batch], Params] | Steps
    predict: Callable[[Params, Tensor], Tensor]
    vmap: bool = True  # False where only a loop over tasks runs (L-BFGS, for one)


def over(f: Callable[[Tensor], Tensor], data: Any) -> Any:
    """f on each tensor of a Batch, an Episode, or any nest of tuples, lists and dicts of tensors."""
    if isinstance(data, Tensor):
        return f(data)
    if isinstance(data, Mapping):
        return {k: over(f, d) for k, d in data.items()}
    if isinstance(data, tuple | list):
        parts = [over(f, d) for d in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    raise TypeError(f"expected tensors in tuples, lists or dicts, got {type(data).__name__}")


def take(data: Any, tasks: int | slice) -> Any:
    """One task of a draw (an index), or a run of them (a slice)."""
    return over(lambda d: d[tasks], data)


def move(data: Any, device: torch.device | str) -> Any:
    """The same on another device: a Batch, an Episode, parameters, or any nest of them."""
    return over(lambda d: d.to(device), data)


# A network as a function of its parameters ---------------------------------------------------


def apply(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """f(θ, x): the network with its parameters as an argument; entries of θ it does not know stay out."""
    tied, names = is_tied(net), [k for k, _ in net.named_parameters()]

    def f(theta: Params, x: Tensor) -> Tensor:
        state = state_of(net, names, theta)
        try:
            out: Tensor = functional_call(ways.module(net), state, (x,), tie_weights=tied)
        except RuntimeError as error:
            if any(word in str(error) for word in ("shape", "size", "channels", "dtype")):
                raise ValueError(
                    f"{type(net).__name__} cannot read x of shape {tuple(x.shape)}, {x.dtype}: {error}"
                ) from error
            raise
        return out

    return f


def features(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """z(θ, x) of shape (B, D): the network's `body` alone."""
    f = apply(half(net, "body"))
    return lambda theta, x: f(below("body.", theta), x)


def classify(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """The network's `head` alone: (θ, z) -> (B, W)."""
    f = apply(half(net, "head"))
    return lambda theta, z: f(below("head.", theta), z)


def half(net: nn.Module, name: str) -> nn.Module:
    """The submodule `body` or `head`, or an error that says what the network must have."""
    module = getattr(net, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"expected a network with two named halves, `body` and `head`; {type(net).__name__} has no "
            f"`{name}`. Give it one: `mtlib.nets.two_halves(body, head)`."
        )
    return module


def below(prefix: str, params: Params) -> Params:
    """The entries under a prefix, with the prefix taken off."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def parameters(net: nn.Module) -> Params:
    """φ of a plain module: detached copies of its parameters and floating-point buffers."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {k: v.detach().clone() for k, v in state.items() if v.is_floating_point()}


def net_state(net: nn.Module, params: Params) -> Params:
    """The entries of `params` that belong to `net`: what `net.load_state_dict` takes."""
    return {k: params[k].detach() for k in net.state_dict() if k in params}


def load(net: nn.Module, params: Params) -> nn.Module:
    """Write trained parameters back into the plain module, and return it. Raises if one is missing."""
    require(params, (k for k, _ in net.named_parameters()))
    net.load_state_dict(net_state(net, params), strict=False)
    return net


def require(theta: Params, names: Iterable[str]) -> None:
    """Raise ValueError where `theta` lacks one of the names."""
    missing = [k for k in names if k not in theta]
    if missing:
        raise ValueError(
            f"expected parameters named {missing[:5]}; got {list(theta)[:5]}. Were they trained for another network? "
            "`start(learner, trained)` carries them over."
        )


def is_tied(net: nn.Module) -> bool:
    """Whether a parameter stands under two names; looking for such at every call would cost a tenth of a MAML step."""
    return len(list(net.named_parameters(remove_duplicate=False))) > len(list(net.parameters()))


def state_of(net: nn.Module, names: list[str], theta: Params) -> Params:
    """θ's entries for `net`; buffers as constant copies, so that a forward pass writes to nothing of ours."""
    require(theta, names)
    device = theta[names[0]].device if names else torch.device("cpu")
    state = {k: theta[k] for k in names}
    for k, buffer in net.named_buffers():
        state[k] = theta.get(k, buffer).detach().to(device, copy=True)
    return state


def risk(loss: Loss, prediction: Tensor, y: Tensor) -> Tensor:
    """loss(ŷ, y), once the two are known to fit (torch would broadcast, or fail far from here)."""
    if not fits(loss, prediction, y):
        raise ValueError(
            f"expected predictions and targets of one shape (N, W); the learner predicts {tuple(prediction.shape)}, "
            f"y is {tuple(y.shape)}. Does the head have one output for each class, and is y one-hot or (N, 1)?"
        )
    return loss(prediction, y)


def fits(loss: Loss, prediction: Tensor, y: Tensor) -> bool:
    """One prediction per target; where the loss says `loss.columns = 2`, two (a mean and a scale): (N, 2W) for (N, W)."""
    return prediction.shape == (*y.shape[:-1], getattr(loss, "columns", 1) * y.shape[-1])


# Two pieces most methods are made of ---------------------------------------------------------


def descend(
    loss: Callable[[Params], Tensor], theta: Params, lr: Rate, steps: int, rule: Rule | None = None
) -> Params:
    """Gradient descent, differentiable in everything: θ ← θ − α ∇L(θ), `steps` times.

    `lr` is one rate, or a rate per entry of θ (a dict: discriminative rates, Meta-SGD), or a function of
    the step that gives either. With a `rule`, θ ← θ − α rule(∇L(θ)): momentum, Adam, a curvature.
    """
    point: Point = (theta, None)
    for number in range(steps):
        point = step(loss, point, lr, number, rule)
    return point[0]


def step(
    loss: Callable[[Params], Tensor], point: Point, lr: Rate, number: int, rule: Rule | None = None
) -> Point:
    """Inner step `number`: θ ← θ − α ∇L(θ), or along rule(∇L(θ))."""
    theta, state = point
    u = ways.gradient(loss, theta)
    if rule:
        u, state = rule(u, state)
    a = lr(number) if callable(lr) else lr
    return {k: theta[k] - (a[k] if isinstance(a, dict) else a) * u[k] for k in theta}, state


def reference(loss: Callable[[Params], Tensor], theta: Params) -> Params:
    """∇L(θ), differentiable in θ and in whatever else L reads, where gradients are enabled."""
    grad: Callable[[Params], Params] = torch.func.grad(loss)
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return grad(theta)
    with torch.inference_mode(False), torch.no_grad():  # before torch 2.12 it gives zeros inside
        return grad(theta)


@dataclass
class Ways:
    """Two places where `mtlib.run.fast` puts faster ways to the same numbers."""

    gradient: Callable[[Callable[[Params], Tensor], Params], Params]
    module: Callable[[nn.Module], nn.Module]  # the network to call, with the same tensors


ways = Ways(reference, lambda net: net)


def proximity(theta: Params, anchor: Params) -> Tensor:
    """½ Σ ‖θ − anchor‖², over the entries of θ: L2-SP, iMAML and Reptile share it."""
    return 0.5 * sum(((theta[k] - anchor[k]) ** 2).sum() for k in theta)  # type: ignore[return-value]


# Carrying parameters from one learner to another ---------------------------------------------


class Start(NamedTuple):
    """What `start` carried over."""

    params: Params  # φ for the new learner
    copied: tuple[str, ...]  # entries taken from the trained parameters
    fresh: tuple[str, ...]  # entries the new learner drew itself: absent, or of another shape
    left: tuple[str, ...]  # trained entries that the new learner has no place for


def start(learner: Learner, trained: Params) -> Start:
    """Carry trained parameters under another learner: what fits is copied, the rest fresh; ValueError if none."""
    phi = learner.init()
    copied = tuple(k for k in phi if k in trained and trained[k].shape == phi[k].shape)
    if not copied:
        raise ValueError(
            f"expected trained parameters that fit this learner, with entries such as {list(phi)[:3]}; "
            f"got {list(trained)[:3]}. Was another network trained?"
        )
    params = {k: trained[k].detach().clone() if k in copied else v for k, v in phi.items()}
    fresh = tuple(k for k in phi if k not in copied)
    return Start(params, copied, fresh, tuple(k for k in trained if k not in copied))
