"""Networks: a `body` that makes features and a `head` that reads them.

They are plain `nn.Module`s; nothing here knows about tasks. Their norm is `mtlib.norm.Norm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mtlib.norm import Norm, Statistics
from mtlib.run.devices import random_kept
from mtlib.run.fast import plain
from mtlib.tasks import positive


def two_halves(body: nn.Module, head: nn.Module) -> nn.Sequential:
    """A network of two named halves, head(body(x)): what every learner here takes."""
    for name, part in (("body", body), ("head", head)):
        if not isinstance(part, nn.Module):
            raise TypeError(f"expected the {name} to be an nn.Module, an instance, got {part!r}")
    return nn.Sequential(OrderedDict(body=body, head=head))


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
        return nn.Sequential(conv, Norm(width, statistics), nn.MaxPool2d(2), nn.ReLU())

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
) -> nn.Sequential:
    """Two blocks of 3×3 convolution, norm, 2×2 max-pool, ReLU, a layer of 64 features, and a linear head.

    (B, channels, size, size) -> (B, ways), with `width` filters in the first block and twice as many in the second.
    Without `norm` the convolutions have a bias in its place. `seed` as in `mlp`. Raises ValueError if two pools
    leave nothing of an image.
    """
    positive(ways=ways, channels=channels, width=width, size=size)
    if not isinstance(norm, bool):
        raise TypeError(f"expected norm to be True or False, got {norm!r}")
    if size < 4:
        raise ValueError(f"expected images of at least 4 pixels for two 2×2 pools, got size={size}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
        return [conv, *([Norm(outputs)] if norm else []), nn.MaxPool2d(2), nn.ReLU()]

    with seeded(seed):
        blocks = [*block(channels, width), *block(width, 2 * width), nn.Flatten()]
        hidden = nn.Linear(2 * width * (size // 4) ** 2, 64)
        return two_halves(
            nn.Sequential(ChannelsLast(), *blocks, hidden, nn.ReLU()), nn.Linear(64, ways)
        )


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
