"""Low-rank adaptation: a thin product beside each weight matrix moves in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    apply,
    expect,
    fixed,
    parameters,
    require,
    stale,
)
from mtlib.learners.gradient import Rate, Rule, at_least_zero, check_steps, inner_loop, weights
from mtlib.run.copies import changed
from mtlib.run.fast import plain
from mtlib.run.transformers import is_exact

PREFIX = "lora."
SCALE = f"{PREFIX}scale"
BASE = f"{PREFIX}base"


def lora(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    rank: int = 4,
    scale: float = 1.0,
    targets: Sequence[str] | None = None,
    rule: Rule | None = None,
) -> Learner:
    """LoRA: W = W₀ + s B A beside weights of the body; A, B and the head move, W₀ stays.

    W₀ (m, n) is φ's, kernels flattened to (m, n); A (r, n) and B (m, r), r = min(`rank`, m, n), are φ's entries
    `lora.<name>.a` and `.b`. B starts at zero, so that θ₀ predicts as φ does; A is drawn, uniform in ±1/√n.
    s = φ["lora.scale"] = `scale` > 0, the paper's α/r, stays. {cite}`hu2022lora`

    `targets` are the ends of names, ("query", "value"): of modules, or of their weights, in whole words between the dots.
    None is each weight of the body with two axes or more. `rule` is another way of stepping: `momentum()`, `adam()`.

    A linear layer computes W₀x + s B(Ax), and so does an embedding: no task has an (m, n) of its own. W₀ + s B A is
    multiplied out where a weight is read in another way (attention's, tied and recurrent ones), and in a convolution,
    where two were measured to take as long. The two agree up to rounding; `merged` multiplies all out, for good.

    For minibatches in place of tasks, `lora_net`. Raises ValueError for a target that fits no weight.
    """
    own = {**parameters(net), **_drawn(net, rank, scale, targets)}

    def init() -> Params:
        return {k: v.clone() for k, v in own.items()}

    def begin(phi: Params, support: Batch) -> Params:
        require(phi, own)
        still = fixed(net) | {SCALE}
        return {k: phi[k] for k in own if k.startswith((PREFIX, "head.")) and k not in still}

    return inner_loop(init, begin, _beside(net), loss, lr, steps, rule=rule, net=net)


def lora_net(
    net: nn.Module, rank: int = 4, scale: float = 1.0, targets: Sequence[str] | None = None
) -> LoRANet:
    """The network with LoRA in it, for whatever trains networks: A, B and the head move, all else is frozen.

    A big network on minibatches:

        low = lora_net(net, rank=8, targets=("query", "value"))
        run = fit(joint(low, cross_entropy), parameters(low), mixture(batch, 32, seed=0), 1000, partial(AdamW, lr=1e-3))
        save_params("mine.safetensors", adapters(run.params))  # a few kB
        theta = attach(parameters(low), load_params("mine.safetensors"))
        load(net, merged(theta))  # the plain network, at no further cost

    Its parameters have the names and values that φ of `lora` has, and `evaluate(as_is(low), ...)` predicts with them. W₀
    and the head are the network's own tensors: they are not copied. Learners that take features and head apart
    (`protonet`, `linear_probe`) want `merged` parameters. `rank`, `scale`, `targets` and errors as in `lora`.
    """
    return LoRANet(net, _drawn(net, rank, scale, targets))


class LoRANet(nn.Module):
    """What `lora_net` makes: the network's own modules, and a module `lora` that has A and B under the weights' names."""

    original: tuple[nn.Module]
    undivided = (
        "its adapters are in neither; take features with `merged` parameters of the plain network"
    )

    def __init__(self, net: nn.Module, own: Params):
        super().__init__()
        self.original = (net,)  # in a tuple it is no child
        for held in ("_parameters", "_buffers", "_modules"):
            vars(self)[held].update(vars(net)[held])
        self._non_persistent_buffers_set |= net._non_persistent_buffers_set
        for name, v in own.items():
            *way, last = name.split(".")
            place: nn.Module = self
            for part in way:
                place = place._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            if name == SCALE:
                place.register_buffer(last, v)
            else:
                place.register_parameter(last, nn.Parameter(v))
        self.training = net.training

    def forward(self, x: Any) -> Any:
        old = stale(self)
        buffers = {k: v for k, v in self.named_buffers() if k not in old}
        return _beside(self.original[0])({**dict(self.named_parameters()), **buffers}, x)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; what does not move comes detached, as the network itself is not to be frozen."""
        for name, p in super().named_parameters(prefix, recurse, remove_duplicate):
            moves = name.removeprefix(prefix).lstrip(".").startswith((PREFIX, "head."))
            yield name, p if moves else p.detach()  # type: ignore[misc]


def _drawn(
    net: nn.Module, rank: int, scale: float, targets: Sequence[str] | None
) -> dict[str, Tensor]:
    """The entries that LoRA adds to φ."""
    check_steps(rank, "a rank", 1)
    at_least_zero(scale=scale)
    names = [k for k in weights(net) if k.startswith(PREFIX)]
    expect(not names, "a network without entries named lora.*: one LoRA is enough", names)
    expect(scale > 0, "scale > 0: without one the adapters do nothing", scale)
    wide, own = targeted(net, targets), Params()
    for k, v in wide.items():
        m, n = v.flatten(1).shape
        r = min(rank, m, n)
        own[f"{PREFIX}{k}.a"] = (2 * torch.rand(r, n).to(v) - 1) / n**0.5
        own[f"{PREFIX}{k}.b"] = v.new_zeros(m, r)
    own[SCALE] = next(iter(wide.values())).new_tensor(scale)
    return own


def targeted(net: nn.Module, targets: Sequence[str] | None = None) -> Params:
    """The body's weights with two axes or more that `targets` name, as `lora` takes them; None names all.

    Raises TypeError for what are no names, ValueError where one fits no weight, or there is none at all.
    """
    wide = {k: v for k, v in weights(net).items() if k.startswith("body.") and v.ndim > 1}
    if not wide:
        raise ValueError(
            f"expected a body with weights of two axes or more, got {list(weights(net))}"
        )
    if targets is None:
        return wide
    if (
        isinstance(targets, str)
        or not isinstance(targets, Sequence)
        or not all(isinstance(t, str) for t in targets)
    ):
        raise TypeError(
            f'expected targets as a tuple of names, ("query", "value"), got {targets!r}'
        )
    first = {id(p): k for k, p in reversed([*net.named_parameters()])}
    names = {k: first[id(p)] for k, p in net.named_parameters(remove_duplicate=False)}
    found = set[str]()
    for t in targets:
        hits = {
            own
            for k, own in names.items()
            if own in wide and any(f".{n}".endswith(f".{t}") for n in (k, k.rpartition(".")[0]))
        }
        if not hits or not t:
            ends = {k.rpartition(".")[0].split(".")[-1] for k in wide}
            raise ValueError(
                f"expected targets that are ends of the names of the body's weights, or of their modules; {t!r} fits none "
                f"of {list(wide)[:3]}. There are modules named {', '.join(sorted(ends))[:300]}"
            )
        found |= hits
    expect(bool(found), "targets, at least one", targets)
    return {k: v for k, v in wide.items() if k in found}


def merged(theta: Params, scale: float | None = None) -> Params:
    """The plain network's parameters, W₀ + s B A multiplied out, s = θ["lora.scale"]: LoRA then costs nothing.

    `scale` is needed only where θ has none. Raises ValueError where the two differ, where an adapter has no weight beside
    it, or its other half is missing.
    """
    expect(isinstance(theta, dict), "parameters {name: tensor}", theta)
    if (
        scale is not None
        and SCALE in theta
        and abs(theta[SCALE].item() - scale) > 1e-6 * abs(scale)
    ):
        raise ValueError(f"expected θ's own scale, {theta[SCALE].item():g}, got {scale}")
    whole = {k: v for k, v in theta.items() if not k.startswith(PREFIX)}
    for k, thin in _pairs(theta, scale).items():
        whole[k] = thin.added(whole[k])
    return whole


def adapters(theta: Params) -> Params:
    """What LoRA trained, to keep by itself: θ's entries `lora.*` and `head.*`, and a SHA-256 of the others, `lora.base`.

    Raises ValueError where θ has no adapters. `attach` puts them back.
    """
    expect(isinstance(theta, dict), "parameters {name: tensor}", theta)
    _pairs(theta)
    if not any(k.startswith(PREFIX) and k != SCALE for k in theta):
        raise ValueError(
            f"expected parameters with LoRA's entries, such as lora.<name>.a, got {list(theta)[:5]}"
        )
    own = {k: v.detach().clone() for k, v in theta.items() if k.startswith((PREFIX, "head."))}
    return {**own, BASE: _digest(theta)}


def attach(phi: Params, trained: Params) -> Params:
    """θ = `phi`, the base, with what `adapters` kept in the place of its head and of its own adapters.

    All of it is then where φ is. Raises ValueError where an adapter has no weight of its shape in φ, or where the base is
    not the one that they were trained beside, bit for bit: there they would mean nothing.
    """
    expect(isinstance(phi, dict), "parameters {name: tensor}", phi)
    expect(isinstance(trained, dict), "what `adapters` kept, {name: tensor}", trained)
    require(trained, (BASE, SCALE))
    base = _base(phi)
    device = next((v.device for v in base.values()), None)
    own = {k: v.to(device) for k, v in trained.items() if k != BASE}
    if not any(k.startswith("head.") for k in own):
        own = {**{k: v for k, v in phi.items() if k.startswith("head.")}, **own}
    theta = {**base, **{k: v for k, v in phi.items() if _of_norm(k)}, **own}
    for k, thin in _pairs(theta).items():
        shape = (len(thin.b), thin.a.shape[1])
        expect(theta[k].flatten(1).shape == shape, f"{k} with {shape} as a matrix", theta[k])
    if not torch.equal(trained[BASE].cpu(), _digest(phi).cpu()):
        raise ValueError(
            "expected the parameters that these adapters were trained beside; the names and shapes of φ fit, but it has "
            "other numbers in the body, or another dtype. Load the weights that training began with."
        )
    return theta


def _of_norm(name: str) -> bool:
    """A running statistic: of the data, and not of the network that the adapters belong to."""
    return name.endswith(("running_mean", "running_var"))


def _base(theta: Params) -> Params:
    return {
        k: v for k, v in theta.items() if not k.startswith((PREFIX, "head.")) and not _of_norm(k)
    }


def _digest(theta: Params) -> Tensor:
    """SHA-256 of names, dtypes, shapes and numbers of the base: (32,) bytes."""
    found = hashlib.sha256()
    for k, v in sorted(_base(theta).items()):
        found.update(f"{k} {v.dtype} {tuple(v.shape)}\n".encode())
        found.update(v.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


# W₀x + s B(Ax) -------------------------------------------------------------------------------


class Thin(NamedTuple):
    """s B A, unmultiplied."""

    a: Tensor  # (r, n)
    b: Tensor  # (m, r)
    s: Tensor | float

    def added(self, w: Tensor) -> Tensor:
        """W₀ + s B A."""
        return w + self.s * (self.b @ self.a).view_as(w)


def _pairs(theta: Params, scale: float | None = None) -> dict[str, Thin]:
    """Each adapter under its weight's name. Raises ValueError where a half of one, its weight or the scale is missing."""
    names = [k[len(PREFIX) : -2] for k in theta if k.startswith(PREFIX) and k[-2:] in (".a", ".b")]
    if names and scale is None:
        require(theta, (SCALE,))
    own = theta[SCALE].detach() if scale is None and names else scale
    pairs: dict[str, Thin] = {}
    for k in dict.fromkeys(names):
        require(theta, (k, a := f"{PREFIX}{k}.a", b := f"{PREFIX}{k}.b"))
        pairs[k] = Thin(theta[a], theta[b], own)  # type: ignore[arg-type]
    return pairs


def _beside(net: nn.Module) -> Callable[[Params, Any], Any]:
    """f(θ, x): the network with θ's adapters beside its weights."""
    f = apply(net)

    def predict(theta: Params, x: Any) -> Any:
        if torch.compiler.is_compiling() or plain():
            return f(merged(theta), x)
        try:
            out = changed(net, theta, x, partial(_put, net, theta))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            out = None
        return out if isinstance(out, Tensor) else f(merged(theta), x)  # or finds the words for it

    return predict


def _put(net: nn.Module, theta: Params, copy: nn.Module) -> None:
    """Put the adapters into a private copy of the network: beside what is called, into what is read."""
    pairs = _pairs(theta)
    first = {id(p): k for k, p in reversed([*net.named_parameters()])}
    multiplied = dict[str, Tensor]()
    for module, twin in zip(net.modules(), copy.modules(), strict=True):
        for name, p in module._parameters.items():
            k = first.get(id(p), "")
            if k not in pairs:
                continue
            form = _form(module) if name == "weight" else None
            if form:
                vars(twin)["thin"] = pairs[k]
                twin.__class__ = _twin(type(module), form)
                if is_exact(twin):  # it would multiply the two out
                    del vars(twin)["forward"]
            else:
                if k not in multiplied:
                    multiplied[k] = pairs[k].added(theta[k])
                vars(twin)["_parameters"][name] = multiplied[k]


class Beside(nn.Module):
    """A module of a private copy that computes W₀x + s B(Ax) where it is called; its weight reads W₀ + s B A."""

    thin: Thin

    @property
    def weight(self) -> Tensor:
        return self.thin.added(self.fixed)

    @property
    def fixed(self) -> Tensor:
        w: Any = self._parameters["weight"]
        return w  # type: ignore[no-any-return]


class _Linear(Beside):
    def forward(self, x: Tensor) -> Tensor:
        a, b, s = self.thin
        return F.linear(x, self.fixed, self._parameters["bias"]) + F.linear(s * F.linear(x, a), b)


class _Embedding(Beside):
    def forward(self, x: Tensor) -> Tensor:
        a, b, s = self.thin
        blank: Any = self.padding_idx  # its gradient is zero, as that of the weight's row is
        low = F.embedding(x, b, blank) @ (s * a)
        if blank is not None:
            low = torch.where(torch.eq(x, blank)[..., None], low.detach(), low)
        return F.embedding(x, self.fixed, blank) + low


def _form(module: nn.Module) -> type[Beside] | None:
    """How a module that is called can keep the two apart; None where it cannot, or would gain nothing."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _Linear
    if forward is nn.Embedding.forward:
        m: Any = module
        limits = m.max_norm is not None or m.scale_grad_by_freq or m.sparse
        return None if limits else _Embedding
    return None


def _twin(kind: type[nn.Module], form: type[Beside]) -> type[nn.Module]:
    """The class of a module of that kind in a private copy."""
    if (kind, form) not in _TWINS:
        _TWINS[kind, form] = type(kind.__name__, (form, kind), {})
    return _TWINS[kind, form]


_TWINS = dict[tuple[type[nn.Module], type[Beside]], type[nn.Module]]()
