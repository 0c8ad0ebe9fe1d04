"""Tasks, learners, and a network as a function of its parameters.

Axis letters, here and everywhere: T tasks · N support · Q query · B batch · W ways (outputs) ·
D features · C classes.  `phi` is what tasks share, `theta` what one task adapted.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad
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
    x: Tensor  # (B, *item)
    y: Tensor  # (B, W), one-hot or real


class Episode(NamedTuple):
    support: Batch  # what a task shows
    query: Batch  # what it asks


Point = tuple[Params, Any]
"""Where an inner loop stands: the entries that move, and the state of its rule."""

Stream = Callable[[int], Any]
"""`stream(step)` -> Episode or Batch with a leading axis T; the same step gives the same draw, always."""


class Inner(NamedTuple):
    """A way to θ in steps: θ_0 = begin(φ, S), θ_{j+1} = step(φ, S, j, θ_j) for j < `steps`."""

    begin: Callable[[Params, Batch], Point]
    step: Callable[[Params, Batch, int, Point], Point]
    steps: int


class Learner(NamedTuple):
    """What happens inside one task: three pure functions.

    `init() -> phi`, `adapt(phi, support) -> theta`, `predict(theta, x) -> (B, W)`.
    `x` is the whole query batch: a transductive learner may use all of it, and says so.
    """

    init: Callable[[], Params]
    adapt: Callable[[Params, Batch], Params]
    predict: Callable[[Params, Tensor], Tensor]
    vmap: bool = True  # False where only a loop over tasks runs (L-BFGS, for one)
    inner: Inner | None = None  # where `adapt` goes in steps

    def path(self, phi: Params, support: Batch) -> Iterator[Params]:
        """θ_0, …, θ_K, one at a time; none where the learner does not go in steps."""
        if self.inner:
            point = self.inner.begin(phi, support)
            yield {**phi, **point[0]}
            for j in range(self.inner.steps):
                point = self.inner.step(phi, support, j, point)
                yield {**phi, **point[0]}


def over(f: Callable[[Tensor], Tensor], data: Any) -> Any:
    """f on each tensor of a Batch or Episode."""
    return f(data) if isinstance(data, Tensor) else type(data)(*(over(f, d) for d in data))


def take(data: Any, tasks: int | slice) -> Any:
    """One task of a draw (an index), or a run of them (a slice)."""
    return over(lambda d: d[tasks], data)


def move(data: Any, device: torch.device | str) -> Any:
    """A Batch or Episode on another device."""
    return over(lambda d: d.to(device), data)


def plain() -> bool:
    """Whether the plain reference runs instead of the fast paths, everywhere: MTLIB_PLAIN=1. They agree to rounding."""
    return os.environ.get("MTLIB_PLAIN") == "1"


# A network as a function of its parameters ---------------------------------------------------


def apply(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """f(θ, x): the network with its parameters as an argument; entries of θ it does not know stay out."""

    tied, names = _tied(net), [k for k, _ in net.named_parameters()]

    def f(theta: Params, x: Tensor) -> Tensor:
        state, module = _state(net, names, theta), _own(net)
        try:
            return functional_call(module, state, (x,), tie_weights=tied)
        except RuntimeError as error:
            if any(word in str(error) for word in ("shape", "size", "channels", "dtype")):
                raise ValueError(
                    f"{type(net).__name__} cannot read x of shape {tuple(x.shape)}, {x.dtype}: {error}"
                ) from error
            raise

    return f


def features(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """z(θ, x) of shape (B, D): the network's `body` alone."""
    body = half(net, "body")
    f = apply(body)

    def z(theta: Params, x: Tensor) -> Tensor:
        return f(below("body.", theta), x)

    return z


def classify(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """The network's `head` alone: (θ, z) -> (B, W)."""
    f = apply(half(net, "head"))

    def h(theta: Params, z: Tensor) -> Tensor:
        return f(below("head.", theta), z)

    return h


def half(net: nn.Module, name: str) -> nn.Module:
    """The submodule `body` or `head`, or an error that says what the network must have."""
    module = getattr(net, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"expected a network with two named halves, `body` and `head`; {type(net).__name__} has no "
            f"`{name}`. Give it one, e.g. nn.Sequential(OrderedDict(body=..., head=...))."
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


class _Worker(threading.local):
    """A thread that takes tasks (`mtlib.run.threads`) has networks of its own, for one call."""

    twins: dict[int, nn.Module] | None = None


worker = _Worker()


def _own(net: nn.Module) -> nn.Module:
    """The network; in a worker a copy with the same tensors: `functional_call` lends the module its θ for a while."""
    if torch.compiler.is_compiling() or worker.twins is None:
        return net
    if id(net) not in worker.twins:
        if any("forward" in vars(m) for m in net.modules()):
            raise RuntimeError(
                "a module whose `forward` was replaced cannot be copied for a thread"
            )
        same = {id(t): t for t in (*net.parameters(), *net.buffers())}
        worker.twins[id(net)] = copy.deepcopy(net, same)
    return worker.twins[id(net)]


def _tied(net: nn.Module) -> bool:
    """Whether a parameter stands under two names; looking for such at every call would cost a tenth of a MAML step."""
    names = net.named_parameters(remove_duplicate=False)
    return len(list(names)) > len(list(net.parameters()))


def _state(net: nn.Module, names: list[str], theta: Params) -> Params:
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
    """One prediction a target; where the loss says `loss.columns = 2`, two (a mean and a scale): (N, 2W) for (N, W)."""
    return prediction.shape == (*y.shape[:-1], getattr(loss, "columns", 1) * y.shape[-1])


# Two pieces most methods are made of ---------------------------------------------------------


def descend(
    loss: Callable[[Params], Tensor],
    theta: Params,
    lr: Rate,
    steps: int,
    rule: Rule | None = None,
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
    """One step, the one of that number: θ ← θ − α ∇L(θ), or along rule(∇L(θ))."""
    theta, state = point
    u = gradient(loss, theta)
    if rule:
        u, state = rule(u, state)
    a = lr(number) if callable(lr) else lr
    return {k: theta[k] - (a[k] if isinstance(a, dict) else a) * u[k] for k in theta}, state


def gradient(loss: Callable[[Params], Tensor], theta: Params) -> Params:
    """∇L(θ), differentiable in θ and in whatever else L reads, where gradients are enabled.

    `torch.func.grad`; or plain autograd, which costs a fifth less, outside of functorch's transforms and in one `vmap`,
    where the tasks' θ are stacked and ∂Σ_t L_t(θ_t)/∂θ_t is each task's own gradient.
    """
    outer, way = torch.is_grad_enabled(), _way_to_autograd()
    if way is None:
        return torch.func.grad(loss)(theta)
    down, up = way
    plain = {k: down(v) for k, v in theta.items()}
    if outer and not any(v.requires_grad for v in plain.values()):
        return torch.func.grad(loss)(theta)
    with torch.enable_grad():  # aliases: L may read the same tensors elsewhere, as an anchor
        point = {k: v.view_as(v) if outer else v.detach() for k, v in plain.items()}
        with enable_inplace_requires_grad(True):
            point = {k: v if v.requires_grad else v.requires_grad_() for k, v in point.items()}
        value = loss({k: up(v) for k, v in point.items()})
        if value.ndim:
            raise ValueError(f"expected a loss that is a scalar, got shape {tuple(value.shape)}")
        value = down(value).sum()
        if not value.requires_grad:  # it does not read θ
            return {k: torch.zeros_like(v) for k, v in theta.items()}
        g = torch.autograd.grad(
            value, list(point.values()), create_graph=outer, materialize_grads=True
        )
    return dict(zip(theta, map(up, g), strict=True))


def _way_to_autograd() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """How tensors go down to plain autograd, and up again: as they are, or out of one `vmap`, tasks first."""
    if torch.compiler.is_compiling() or plain() or torch.is_inference_mode_enabled():
        return None
    if not torch._C._are_functorch_transforms_active():
        return (lambda v: v), (lambda v: v)
    f = torch._C._functorch
    stack = f.get_interpreter_stack()
    if stack is None or len(stack) != 1 or stack[0].key() != f.TransformType.Vmap:
        return None
    level, size = stack[0].level(), f.CVmapInterpreterPtr(stack[0]).batchSize()

    def down(v: Tensor) -> Tensor:
        if f.is_batchedtensor(v):
            return f.get_unwrapped(v).movedim(f.maybe_get_bdim(v), 0)
        return v.expand(size, *v.shape)

    return down, lambda v: f._add_batch_dim(v, 0, level)


def proximity(theta: Params, anchor: Params) -> Tensor:
    """½ Σ ‖θ − anchor‖², over the entries of θ: L2-SP, iMAML and Reptile share it."""
    return 0.5 * sum(((theta[k] - anchor[k]) ** 2).sum() for k in theta)  # type: ignore[return-value]


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest output is the labelled class; (B, W) and one-hot (B, W) -> scalar."""
    return (prediction.argmax(-1) == y.argmax(-1)).to(prediction.dtype).mean()


# Carrying parameters from one learner to another ---------------------------------------------


class Start(NamedTuple):
    params: Params  # φ for the new learner
    copied: tuple[str, ...]  # entries taken from the trained parameters
    fresh: tuple[str, ...]  # entries the new learner drew itself: absent, or of another shape
    left: tuple[str, ...]  # trained entries that the new learner has no place for


def start(learner: Learner, trained: Params) -> Start:
    """Carry trained parameters under another learner: what fits is copied, the rest is fresh, all reported.

    Raises ValueError when nothing fits.
    """
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
