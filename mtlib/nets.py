"""Networks: a `body` that makes features and a `head` that reads them.

They are plain `nn.Module`s; nothing here knows about tasks. Their norm is `mtlib.norm.Norm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import get_device_states, set_device_states

from mtlib.core import expect, half
from mtlib.norm import Norm, Statistics
from mtlib.run.convolution import convolution, convolves
from mtlib.run.copies import Called, before, copyable, evaluating, private, replaced
from mtlib.run.devices import random_kept
from mtlib.run.fast import as_stored, plain, untouched
from mtlib.tasks import above_zero, functions, positive


def two_halves(body: nn.Module, head: nn.Module) -> nn.Sequential:
    """A network of two named halves, head(body(x)): what every learner here takes."""
    for name, part in (("body", body), ("head", head)):
        if not isinstance(part, nn.Module):
            raise TypeError(f"expected the {name} to be an nn.Module, an instance, got {part!r}")
    return nn.Sequential(OrderedDict(body=body, head=head))


class Widths(nn.Module):
    """x ∘ exp(s_b): a width for each block of columns of x (…, D), `blocks` (D,) being the number of each column's block.

    All widths start at 1. As the body under a ridge head they are the head's prior, since a column of width exp(s) costs
    exp(−2s) as much to use: with a block for each column, automatic relevance determination. Raises ValueError unless the
    blocks are whole numbers from 0 without a gap.

    ```pycon
    >>> import math
    >>> body = Widths(torch.tensor([0, 0, 1]))
    >>> with torch.no_grad():
    ...     body.s[1] = math.log(2)
    >>> body(torch.ones(3)).detach()
    tensor([1., 1., 2.])

    ```
    """

    blocks: Tensor

    def __init__(self, blocks: Tensor):
        super().__init__()
        whole = isinstance(blocks, Tensor) and not (
            blocks.is_floating_point() or blocks.is_complex()
        )
        expect(whole and blocks.ndim == 1 and len(blocks) > 0, "blocks (D,), whole numbers", blocks)
        if blocks.unique().tolist() != list(range(int(blocks.max()) + 1)):
            raise ValueError(
                f"expected the numbers of blocks from 0 without a gap, got {blocks.unique().tolist()[:9]}"
            )
        self.s = nn.Parameter(torch.zeros(int(blocks.max()) + 1))
        self.register_buffer("blocks", blocks)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.blocks.shape:
            raise ValueError(
                f"expected {len(self.blocks)} columns, one for each number in blocks, got x of shape {tuple(x.shape)}"
            )
        return x * self.s.exp()[self.blocks]


class Harmonics(nn.Module):
    """x in sines and cosines: [ω₁ x, sin(ω₁ x), cos(ω₁ x), …, sin(ω_J x), cos(ω_J x)] for x (…, D), as (…, D(1 + 2J)).

    ω are the `frequencies`, in radians for one unit of x; all columns of x come by kind, sines together. There is nothing to
    train. Raises ValueError unless they are above 0, at least one, and where x has not a last axis.

    ```pycon
    >>> Harmonics((1.0, 2.0))(torch.tensor([[torch.pi]])).round(decimals=2).abs()
    tensor([[3.1400, 0.0000, 0.0000, 1.0000, 1.0000]])

    ```
    """

    omega: Tensor

    def __init__(self, frequencies: Sequence[float]):
        super().__init__()
        listed = isinstance(frequencies, Sequence) and not isinstance(frequencies, str)
        expect(listed and len(frequencies) > 0, "frequencies, at least one number", frequencies)
        for omega in frequencies:
            above_zero(frequencies=omega)
        self.register_buffer("omega", torch.tensor([float(w) for w in frequencies]))

    def forward(self, x: Tensor) -> Tensor:
        expect(x.ndim > 0 and x.is_floating_point(), "real x with columns, (…, D)", x)
        omega = self.omega.to(x)
        a = (x[..., None] * omega).flatten(-2)
        return torch.cat([omega[0] * x, a.sin(), a.cos()], -1)


def wrap(
    net: nn.Module,
    head: str | None = None,
    body: str | None = None,
    call: Callable[[Any, Any], Any] | None = None,
    x: Any = None,
) -> nn.Module:
    """A network made elsewhere as one of two named halves, head(body(x)) = call(net, x); by default call(net, x) = net(x).

    `head` is the name of its last module: "classifier", "fc", "classifier.out_proj". The body is the rest, the network with
    `nn.Identity` there: body(x) = call(that, x) (B, D). `call` takes the features through keywords, and the logits out of an
    object, and nothing else, as what it does after the head (a softmax, a temperature) is in neither half:

        wrap(BertForSequenceClassification(config), "classifier", call=lambda net, x: net(**x).logits)

    The body's parameters are `body.<name in net>`; with `body="bert"` they all stand under `bert` there, and the names do
    without it. Without `head` the network has no halves, its names stay, and `call` alone is used.

    ```pycon
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> ours = wrap(net, head="2")
    >>> [name for name, _ in ours.named_parameters()]
    ['body.0.weight', 'body.0.bias', 'head.weight', 'head.bias']

    ```

    The tensors are the network's own: `load(wrap(net, ...), params)` writes into `net`, which is not changed otherwise.
    Raises ValueError where there is no such head or body, where both use one tensor (a tied language-model head), and, at the
    first call or for the example `x`, where head(body(x)) is not call(net, x).
    """
    expect(isinstance(net, nn.Module), "a network, an nn.Module", net)
    call = _plainly if call is None else call
    functions(2, call=call)
    expect(not isinstance(call, nn.Module), "call, a function (net, x) -> prediction", call)
    if head is None:
        expect(body is None, "the name of the head, too, where the body is named", head)
        ours: Whole | Halves = Whole(net, net, call)
    else:
        last = _named(net, head, "head")
        whole, copies = replaced(net, head, nn.Identity())
        part = whole if body is None else _named(whole, body, "body")
        ours = Halves(Called(whole, part, call, copies), last, head)
        _check_apart(net, ours, head, body)
    copyable(ours, _state(ours))
    if x is not None:
        ours.first.look(ours, x)
    return ours


def _plainly(net: nn.Module, x: Any) -> Any:
    return net(x)


def _named(net: nn.Module, name: str, what: str) -> nn.Module:
    """The module of that name, with parameters, or an error that lists those that there are."""
    every: dict[str, nn.Module] = dict(net.named_modules(remove_duplicate=False))
    own = {k: m for k, m in every.items() if k and any(True for _ in m.parameters())}
    if name not in own:
        leaves = [k for k, m in own.items() if not any(True for _ in m.children())]
        last = [*dict.fromkeys([*(k for k in own if "." not in k), *leaves[-3:]])]
        raise ValueError(
            f"expected the name of the network's {what}, a module with parameters; {type(net).__name__} has none called "
            f"{name!r}. It has {', '.join(last[-12:])}"
        )
    return own[name]


def _check_apart(net: nn.Module, ours: Halves, head: str, body: str | None) -> None:
    """Raise ValueError unless each tensor of the network is in one of the halves."""
    names = {id(t): k for k, t in (*net.named_parameters(), *net.named_buffers())}
    inside = {id(t) for t in (*ours.body.parameters(), *ours.body.buffers())}
    held = {id(t) for t in (*ours.head.parameters(), *ours.head.buffers())}
    if tied := [names[i] for i in names if i in inside & held]:
        raise ValueError(
            f"expected a head with tensors of its own; {head} and the body share {tied[0]} (tied weights). Untie them: "
            f"head.weight = nn.Parameter(head.weight.detach().clone()); or wrap it without `head`, as one whole."
        )
    if left := [names[i] for i in names if i not in inside | held]:
        raise ValueError(
            f"expected all parameters and buffers but the head's under {body!r}; {left[:5]} are not. Without `body` the "
            "names are those in the network."
        )


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


class First:
    """The first calls of a wrapped network, at which it is looked at; its private copies share this."""

    def __init__(self) -> None:
        self.known = set[bool]()  # whether training was looked at, and evaluation

    @torch.no_grad()
    def look(self, net: Whole | Halves, x: Any) -> None:
        """Raise ValueError where the user's `call` does not do what `wrap` asks; torch's random state stays."""
        if torch.compiler.is_compiling():
            return
        for training in {False, net.training} - self.known:
            back = _random(net)
            with evaluating(not training):
                if net.agrees(x, back):
                    self.known.add(training)
            back()


def _random(net: nn.Module) -> Callable[[], None]:
    """What puts torch's random state back to where it is now."""
    state, (devices, states) = torch.get_rng_state(), get_device_states(*net.parameters())

    def back() -> None:
        torch.set_rng_state(state)
        set_device_states(devices, states)

    return back


class Whole(Called):
    """A network called in the user's way, without halves."""

    def __init__(self, whole: nn.Module, part: nn.Module, call: Callable[[Any, Any], Any]):
        super().__init__(whole, part, call)
        self.first = First()

    def forward(self, x: Any) -> Any:
        self.first.look(self, x)
        return super().forward(x)

    def agrees(self, x: Any, back: Callable[[], None]) -> bool:
        """Raise ValueError where `call` uses another network than its argument."""
        copy: Any = private(self, _state(self)).net
        seen = list[nn.Module]()
        for module in copy.whole.modules():
            before(module, lambda module, args: seen.append(module))
        copy.call(copy.whole, x)
        expect(bool(seen), "call(net, x) to call its argument `net`, or a module of it", self.call)
        return True


FAULTS = (RuntimeError, TypeError, AttributeError, ValueError, LookupError)


class Halves(nn.Module):
    """What `wrap` makes of a network: its last module, and the rest called in the user's way."""

    def __init__(self, body: Called, head: nn.Module, place: str):
        super().__init__()
        self.body, self.head, self.place, self.first = body, head, place, First()
        self.training = body.training

    def forward(self, x: Any) -> Any:
        self.first.look(self, x)
        return self.head(self.body(x))

    def agrees(self, x: Any, back: Callable[[], None]) -> bool:
        """Whether head(body(x)) is call(net, x), for a head off its values (one of zeros hides what follows it).

        False where the numbers are NaN and tell nothing; else ValueError. `back` makes random numbers come again.
        """
        copy: Any = private(self, {**_state(self), **_moved(self.head)}).net
        full, _ = replaced(copy.body.whole, self.place, copy.head)
        right = copy.body.call(full, x)
        real = isinstance(right, Tensor) and right.is_floating_point()
        expect(real, "call(net, x) to give a tensor of real numbers", right)
        back()
        try:
            z = copy.body(x)
        except FAULTS as error:
            raise ValueError(
                f"expected a network that runs with nn.Identity for its {self.place}, which its features (B, D) come "
                f"from; it says: {error}"
            ) from error
        try:
            found = copy.head(z)
        except FAULTS as error:
            raise ValueError(_apart(self.place, f"no answer ({error})")) from error
        if not isinstance(found, Tensor) or found.shape != right.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(_apart(self.place, f"{got}, and it is {tuple(right.shape)}"))
        if not right.numel():
            return False
        both = [as_stored(v) for v in ((found - right).abs().max(), right.abs().max())]
        gap, size = (torch.nan if v is None else v.amax().item() for v in both)
        if gap > min(1e3 * torch.finfo(right.dtype).eps, 0.05) * size:
            far = f"other numbers, {gap:.2g} apart where the largest is {size:.2g}"
            raise ValueError(_apart(self.place, far))
        return gap == gap


def _moved(head: nn.Module) -> dict[str, Tensor]:
    """The head's parameters, each number a little off."""
    waves = {
        k: torch.arange(v.numel(), device=v.device).cos().to(v).view_as(v) / 10
        for k, v in head.named_parameters()
    }
    return {f"head.{k}": v + waves[k] for k, v in head.named_parameters()}


def _apart(place: str, gap: str) -> str:
    return (
        f"expected call(net, x) to be head(body(x)), with {place} as the head; that gives {gap}. What comes after the head "
        "(a softmax, a temperature, a dropout, a choice of columns) belongs in the loss or in `predict`, and `head` names "
        "the last module."
    )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Weights drawn inside follow `seed`, and torch's random state is as before afterwards; None changes nothing.

    The weights are those after `torch.manual_seed(seed)`.
    """
    if not (seed is None or isinstance(seed, Integral)):
        raise ValueError(f"expected the seed to be a whole number or None, got {seed!r}")
    if seed is None:
        yield
        return
    with random_kept():
        torch.manual_seed(seed)
        yield


def mlp(inputs: int, hidden: Iterable[int], outputs: int, seed: int | None = None) -> nn.Sequential:
    """Fully connected ReLU network; the last linear layer is the head. (B, inputs) -> (B, outputs).

    With a `seed` the weights follow it; None draws them from torch's random state.

    ```pycon
    >>> mlp(1, (40, 40), 1, seed=0)(torch.zeros(5, 1)).shape
    torch.Size([5, 1])

    ```
    """
    if not isinstance(hidden, Iterable) or isinstance(hidden, str):
        raise TypeError(f"expected hidden to be the layers' sizes, such as (8,), got {hidden!r}")
    sizes = [inputs, *hidden]
    positive(inputs=inputs, outputs=outputs, **{f"hidden[{i}]": n for i, n in enumerate(sizes[1:])})
    with seeded(seed):
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return two_halves(nn.Sequential(*layers), nn.Linear(sizes[-1], outputs))


def expanded(net: nn.Module, first: nn.Module) -> nn.Sequential:
    """head(body(first(x))): the network on x as `first` shows it, in `Harmonics` for one. Its halves are the network's own.

    ```pycon
    >>> expanded(mlp(5, (40,), 1), Harmonics((0.5, 1.0)))(torch.zeros(3, 1)).shape
    torch.Size([3, 1])

    ```
    Raises ValueError for a network without halves, TypeError unless `first` is a module.
    """
    if not isinstance(first, nn.Module):
        raise TypeError(f"expected first to be an nn.Module, an instance, got {first!r}")
    return two_halves(nn.Sequential(first, half(net, "body")), half(net, "head"))


class Residual(nn.Module):
    """z + W₂ relu(W₁ z + b₁) + b₂: (B, D) -> (B, D). W₂ and b₂ start at zero, so that it begins as the identity."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        positive(features=features, hidden=hidden)
        self.first, self.second = nn.Linear(features, hidden), zero_linear(hidden, features)

    def forward(self, z: Tensor) -> Tensor:
        h: Tensor = z + self.second(torch.relu(self.first(z)))
        return h


def residual(features: int, hidden: int, outputs: int, seed: int | None = None) -> nn.Sequential:
    """A `Residual` body on features that are there already, and a linear head: (B, features) -> (B, outputs).

    What a frozen backbone gives is where its training begins: an untrained body leaves every distance as it is. `seed` as
    in `mlp`.

    ```pycon
    >>> net, z = residual(6, 4, outputs=3, seed=0), torch.rand(2, 6)
    >>> torch.equal(net.body(z), z)
    True

    ```
    """
    with seeded(seed):
        return two_halves(Residual(features, hidden), nn.Linear(features, outputs))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros: as a head it says the same of everything until it is trained."""
    positive(inputs=inputs, outputs=outputs)
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def policy_net(
    inputs: int = 2, actions: int = 2, width: int = 32, small: float = 0.1, seed: int = 0
) -> nn.Module:
    """An `mlp` with one hidden layer whose head is `small` times what it would be, so that its first actions are small."""
    above_zero(small=small)
    net = mlp(inputs, (width,), actions, seed=seed)
    with torch.no_grad():
        for entry in net.get_submodule("head").parameters():
            entry.mul_(small)
    return net


def conv4(
    ways: int = 5,
    channels: int = 1,
    width: int = 64,
    size: int = 28,
    statistics: Statistics = "batch",
    seed: int | None = None,
) -> nn.Sequential:
    """Four blocks of 3×3 convolution, norm, 2×2 max-pool, ReLU, and a linear head.

    (B, channels, size, size) -> (B, ways). The few-shot literature's `Conv4-64`
    {cite}`vinyals2016matching,snell2017prototypical`. ReLU after the pool gives the same values and
    gradients as before it; a bias before the norm would have no effect and is left out. `seed` as in `mlp`.

    ```pycon
    >>> conv4(ways=5, seed=0)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 5])

    ```
    """
    positive(ways=ways, channels=channels, width=width, size=size)
    if size < 16:
        raise ValueError(
            f"expected images of at least 16 pixels for four 2×2 pools, got size={size}"
        )

    def block(inputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        return Blocks(conv, Norm(width, statistics), nn.MaxPool2d(2), nn.ReLU())

    with seeded(seed):
        blocks = [block(channels), *(block(width) for _ in range(3))]
        body = nn.Sequential(ChannelsLast(), *blocks, nn.Flatten())
        return two_halves(body, nn.Linear(width * (size // 16) ** 2, ways))


def conv2(
    ways: int = 10,
    channels: int = 1,
    width: int = 16,
    size: int = 16,
    norm: bool = True,
    seed: int | None = None,
    bottleneck: bool = True,
) -> nn.Sequential:
    """Two blocks of 3×3 convolution, norm, 2×2 max-pool, ReLU, a `bottleneck` of 64 features, and a linear head.

    (B, channels, size, size) -> (B, ways), with `width` filters in the first block and twice as many in the second.
    The bottleneck is linear, norm, ReLU, or with `bottleneck=False` linear, ReLU: then nothing holds the scale of the
    features, which the penalties of `mtlib.transfer` change. Without `norm` there is none anywhere, and layers have a
    bias in its place. `seed` as in `mlp`. Raises ValueError if two pools leave nothing of an image.
    """
    positive(ways=ways, channels=channels, width=width, size=size)
    for name, value in (("norm", norm), ("bottleneck", bottleneck)):
        if not isinstance(value, bool):
            raise TypeError(f"expected {name} to be True or False, got {value!r}")
    if size < 4:
        raise ValueError(f"expected images of at least 4 pixels for two 2×2 pools, got size={size}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
        return [conv, *([Norm(outputs)] if norm else []), nn.MaxPool2d(2), nn.ReLU()]

    with seeded(seed):
        blocks = [*block(channels, width), *block(width, 2 * width), nn.Flatten()]
        inputs = 2 * width * (size // 4) ** 2
        last = normed(inputs, 64) if norm and bottleneck else [nn.Linear(inputs, 64), nn.ReLU()]
        return two_halves(Blocks(ChannelsLast(), *blocks, *last), nn.Linear(64, ways))


def normed(inputs: int, outputs: int) -> list[nn.Module]:
    """Linear, norm, ReLU: (B, inputs) -> (B, outputs). A bias before the norm would have no effect."""
    positive(inputs=inputs, outputs=outputs)
    return [nn.Linear(inputs, outputs, bias=False), Norm(outputs), nn.ReLU()]


class Blocks(nn.Sequential):
    """Modules one after the other; a norm, its 2×2 max-pool and ReLU run as one, `Norm.pooled`, unless hooks look between."""

    def forward(self, x: Tensor) -> Tensor:
        modules = [*self]
        while modules:
            first: Any = modules[0]
            if together(*modules[:3]):
                x = first.pooled(x)
                del modules[:3]
            elif together(*modules[1:4]) and untouched(first) and convolves(first, x):
                x = convolution(modules.pop(0), x)
            else:
                x = modules.pop(0)(x)
        return x


def together(*three: nn.Module) -> bool:
    """Whether modules are a `Norm`, a 2×2 max-pool and a ReLU that nobody has changed, or looks at."""
    if tuple(map(type, three)) != (Norm, nn.MaxPool2d, nn.ReLU):
        return False
    pool: Any = three[1]
    plain_pool = (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (2, 2, 0, 1)
    return plain_pool and not (pool.return_indices or pool.ceil_mode) and all(map(untouched, three))


class ChannelsLast(nn.Module):
    """The same images (B, channels, h, w), laid out with the channels last in memory.

    Norm and pooling are several times faster so on a CPU. For one channel `x.contiguous(memory_format=...)` gives back
    the same tensor, as the two layouts coincide; the strides say which is meant.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(
                f"expected images (B, channels, h, w), got x of shape {tuple(x.shape)}"
            )
        return x if plain() else _Relaid.apply(x)


class _Relaid(Function):
    """The identity, on another layout."""

    apply: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        return x.contiguous(memory_format=torch.channels_last).as_strided(
            x.shape, (c * h * w, 1, c * w, c)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Relaid.apply(g)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> Any:
        return x, dims[0]
