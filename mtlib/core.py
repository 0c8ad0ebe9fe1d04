"""Tasks, learners, and a network as a function of its parameters.

Axis letters, here and everywhere: T tasks · N support · Q query · B batch · W ways (outputs) ·
D features · C classes.  `phi` is what tasks share, `theta` what one task adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
"""Names as in `net.named_parameters()`; a method's own entries travel along under their own prefix."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(prediction, y)` -> scalar, the mean over the batch; torch's own fit (weighted `cross_entropy` of one-hot rows: a sum over N, not Σw)."""


class Batch(NamedTuple):
    """Items `x` (B, *item) and their targets `y` (B, W), one-hot or real; a draw of a stream has an axis T before."""

    x: Any  # a tensor, or any nest of dicts, lists and tuples of tensors, which is one argument of the network
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
    `given(φ, S)` is φ as all steps see it, made once. `descent(φ, S)`, or None: the loss L(θ) they go down, and the rate.
    """

    begin: Callable[[Params, Batch], Point]
    step: Callable[[Params, Batch, int, Point], Point]
    steps: int
    given: Callable[[Params, Batch], Params] = lambda phi, support: phi
    alone: bool = False
    descent: Callable[[Params, Batch], tuple[Callable[[Params], Tensor], Any]] | None = None

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
    predict: Callable[[Params, Any], Tensor]
    vmap: bool = True  # False where only a loop over tasks runs (L-BFGS, for one)
    net: nn.Module | None = None  # the network in it: what `fixed(net)` names does not move
    settings: tuple[str, ...] = ()  # entries of φ that `adapt` alone reads: learned rates, for one


def over(f: Callable[[Tensor], Any], data: Any) -> Any:
    """f on each tensor of a Batch, an Episode, or any nest of tuples, lists and dicts of tensors."""
    if isinstance(data, Tensor):
        return f(data)
    if isinstance(data, Mapping):
        return {k: over(f, d) for k, d in data.items()}
    if isinstance(data, tuple | list):
        parts = [over(f, d) for d in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    more = "; torch.from_numpy converts" * hasattr(data, "__array__")
    raise TypeError(f"expected tensors in tuples, lists or dicts, got {type(data).__name__}{more}")


def rows(x: Any) -> int:
    """B, the number of rows that each tensor of x has. ValueError shows all shapes where it is not one number."""
    found: set[tuple[int, ...]] = set()
    shapes = over(lambda d: found.add(d.shape[:1]) or tuple(d.shape), x)  # type: ignore[func-returns-value]
    if len(found) == 1 and () not in found:
        return found.pop()[0]
    raise ValueError(f"expected tensors of x with one number of rows, got shapes {shapes}")


def take(data: Any, tasks: int | slice) -> Any:
    """One task of a draw (an index), or a run of them (a slice)."""
    return over(lambda d: d[tasks], data)


def move(data: Any, device: torch.device | str) -> Any:
    """The same on another device: a Batch, an Episode, parameters, or any nest of them."""
    return over(lambda d: d.to(device), data)


def apply(net: nn.Module) -> Callable[[Params, Any], Tensor]:
    """f(θ, x): the network with its parameters as an argument; entries of θ it does not know stay out."""
    expect(isinstance(net, nn.Module), "a network, an nn.Module", net)
    return lambda theta, x: ways.call(net, theta, x)


def features(net: nn.Module) -> Callable[[Params, Any], Tensor]:
    """z(θ, x) of shape (B, D): the network's `body` alone."""
    f = apply(half(net, "body"))
    return lambda theta, x: f(below("body.", theta), x)


def classify(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """The network's `head` alone: (θ, z) -> (B, W)."""
    f = apply(half(net, "head"))
    return lambda theta, z: f(below("head.", theta), z)


def half(net: nn.Module, name: str) -> nn.Module:
    """The submodule `body` or `head`, or an error that says what the network must have."""
    why = getattr(net, "undivided", None)
    expect(why is None, f"a network whose body and head can be taken apart; {why}", net)
    if isinstance(module := getattr(net, name, None), nn.Module):
        return module
    kind = f"expected a network with two named halves, `body` and `head`; {type(net).__name__} has no `{name}`. "
    raise ValueError(f"{kind}`mtlib.nets.wrap` and `two_halves` make them.")


def below(prefix: str, params: Params) -> Params:
    """The entries under a prefix, with the prefix taken off."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def parameters(net: nn.Module) -> Params:
    """φ of a plain module: detached copies of its parameters and floating-point buffers.

    Without the running statistics of norms in training mode, soon out of date: `mtlib.norm.calibrate` adds them.
    """
    old, own = stale(net), {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {k: v.detach().clone() for k, v in own.items() if v.is_floating_point() and k not in old}


def fixed(net: nn.Module | None) -> frozenset[str]:
    """The entries of φ that may not move, as the network is now: frozen parameters (`requires_grad`) and buffers."""
    net = nn.Identity() if net is None else net  # which may have a length, and be 0 long
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    return frozenset((*frozen, *dict(net.named_buffers()), *norms(net)))


def norms(net: nn.Module | None) -> dict[str, nn.Module]:
    """The names of running statistics, held or not, each with its norm."""
    expect(net is None or isinstance(net, nn.Module), "a network, an nn.Module", net)
    places = [(p + "." if p else "", m) for p, m in net.named_modules()] if net is not None else []
    names = ("running_mean", "running_var")
    return {p + k: m for p, m in places for k in names if k in m._buffers}


def stale(net: nn.Module | None) -> frozenset[str]:
    """Running statistics of norms in training mode: a forward pass does not read them, and here does not set them."""
    every = norms(net).items()
    return frozenset(k for k, m in every if m.training and getattr(m, "track_running_stats", False))


def net_state(net: nn.Module, params: Params) -> Params:
    """The entries of `params` that belong to `net`: what `net.load_state_dict` takes."""
    own = norms(net).keys() | net.state_dict().keys()
    expect(not own or not own.isdisjoint(params), f"entries such as {[*own][:3]}", [*params][:3])
    return {k: params[k].detach() for k in own if k in params}


def load(net: nn.Module, params: Params) -> nn.Module:
    """Write φ back into the plain module, and return it. Raises ValueError if an entry is missing, misshapen or left over."""
    places, here = norms(net), {**dict(net.named_parameters()), **dict(net.named_buffers())}
    require(params, dict(net.named_parameters()))
    require_statistics(params, {k: m for k, m in places.items() if m.running_mean is not None})
    if left := [k for k in params if k not in here and k not in places]:
        raise ValueError(
            f"expected entries of {type(net).__name__} alone; {left[:5]} have no place in it. Multiply LoRA's out with "
            "`mtlib.learners.lora.merged`; load(net, net_state(net, params)) leaves behind what a method added."
        )
    for k in params.keys() & here.keys():
        expect(params[k].shape == here[k].shape, f"{k} of shape {tuple(here[k].shape)}", params[k])
    for k in params.keys() & here.keys():
        here[k].data.copy_(params[k])
    for k in params.keys() - here:  # a norm's place for statistics, empty until now
        setattr(places[k], k.rpartition(".")[2], params[k].detach().clone())
    return net


def require(theta: Params, names: Iterable[str]) -> None:
    """Raise ValueError where `theta` lacks one of the names."""
    missing = [k for k in names if k not in theta]
    other = "another network's? `start(learner, trained)` carries them over"
    expect(not missing, f"parameters named {missing[:5]} ({other})", list(theta)[:5])


def require_statistics(theta: Params, wanted: dict[str, nn.Module]) -> None:
    """Raise ValueError where `theta` lacks a running statistic of one of these norms."""
    if missing := [k for k in wanted if k not in theta]:
        raise ValueError(
            f"expected {missing[0]}, of the norm {type(wanted[missing[0]]).__name__}: a norm that trained in training mode has none. "
            "`mtlib.norm.calibrate(net, params, batches)` computes them; for a norm that keeps its own, call net.eval() before `parameters(net)`."
        )


def risk(loss: Loss, prediction: Tensor, y: Tensor) -> Tensor:
    """loss(ŷ, y), once the two are known to fit (torch would broadcast, or fail far from here), y in the dtype of ŷ."""
    if not fits(loss, prediction, y) or 0 in y.shape:
        raise ValueError(
            f"expected predictions and targets of one shape (N, W), at least one row, W ≥ 2 for cross-entropy; the learner predicts {tuple(prediction.shape)}, y is "
            f"{tuple(y.shape)}. Does the head have one output for each class, and is y one-hot, `mtlib.tasks.one_hot(y, ways)`, or (N, 1)?"
        )
    expect(not isinstance(loss, type), "a loss(prediction, y), not yet its class", loss)
    if y.dtype != prediction.dtype and y.is_floating_point() and prediction.is_floating_point():
        wide = torch.promote_types(prediction.dtype, torch.float32)  # half precision is coarse
        prediction, y = prediction.to(wide), y.to(wide)
    value = loss(prediction, y)
    expect(isinstance(value, Tensor) and not value.ndim, "a loss that is a scalar tensor", value)
    return value


def expect(right: bool, what: str, found: Any) -> None:
    """Raise ValueError unless it is right: what was expected, and what came."""
    if not right:
        shown = tuple(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(f"expected {what}; got {type(found).__name__}: {str(shown)[:60]}")


def fits(loss: Loss, prediction: Tensor, y: Tensor) -> bool:
    """A prediction per target, or `loss.columns` = 2 of them, (N, 2W) for (N, W); no softmax of one column, whose loss is 0."""
    own = getattr(loss, "func", loss)  # of a `partial`
    softmax = own is nn.functional.cross_entropy or isinstance(own, nn.CrossEntropyLoss)
    width = getattr(loss, "columns", 1) * y.shape[-1]
    return prediction.shape == (*y.shape[:-1], width) and y.shape[-1] > int(softmax)


def reference(loss: Callable[[Params], Tensor], theta: Params) -> Params:
    """∇L(θ), differentiable in θ and in whatever else L reads, where gradients are enabled."""
    return torch.func.grad(loss)(theta)  # type: ignore[no-any-return]


def lend(net: nn.Module, theta: Params, x: Any) -> Tensor:
    """The network called with θ in the place of its parameters, and with copies of its buffers: a call writes to them."""
    require(theta, own := [k for k, _ in net.named_parameters()])
    held = {**dict(net.named_buffers()), **{k: theta[k] for k in norms(net) if k in theta}}
    device = next((v.device for v in theta.values()), None)
    copies = {k: theta.get(k, b).detach().to(device, copy=True) for k, b in held.items()}
    return torch.func.functional_call(net, {**{k: theta[k] for k in own}, **copies}, (x,))  # type: ignore[no-any-return]


class Ways:
    """Three places where `mtlib.run` puts faster and safer ways to the same numbers."""

    gradient: Callable[[Callable[[Params], Tensor], Params], Params] = staticmethod(reference)
    call: Callable[[nn.Module, Params, Any], Tensor] = staticmethod(lend)
    along: Any = staticmethod(lambda theta, a, u: {k: v - a[k] * u[k] for k, v in theta.items()})


ways = Ways()


class Start(NamedTuple):
    """What `start` carried over."""

    params: Params  # φ for the new learner
    copied: tuple[str, ...]  # entries taken from the trained parameters
    fresh: tuple[str, ...]  # entries the new learner drew itself: absent, or of another shape
    left: tuple[str, ...]  # trained entries that the new learner has no place for


def start(learner: Learner, trained: Params) -> Start:
    """Carry trained parameters under another learner: what fits is copied, the rest is fresh, all reported.

    All of it is then where the trained entries are, in their dtype, without running statistics of what was replaced
    (`mtlib.norm.calibrate`). Raises ValueError when nothing fits.
    """
    expect(isinstance(learner, Learner), "a learner, such as protonet(net)", learner)
    expect(isinstance(trained, dict), "trained parameters, {name: tensor}", trained)
    phi, places = learner.init(), norms(learner.net).keys()
    phi |= {k: v for k, v in trained.items() if k in places}
    copied = tuple(k for k in phi if k in trained and trained[k].shape == phi[k].shape)
    fit = f"parameters that fit, such as {list(phi)[:3]}. Was another network trained?"
    expect(bool(copied), fit, list(trained)[:3])
    old = {k for k in places - trained.keys() if any(c.startswith(k.split(".")[0]) for c in copied)}
    own, like = {k: v for k, v in phi.items() if k not in old}, trained[copied[0]]
    params = {k: trained[k].detach().clone() if k in copied else v.to(like) for k, v in own.items()}
    fresh, left = ([k for k in d if k not in copied] for d in (params, trained))
    return Start(params, copied, tuple(fresh), tuple(left))
