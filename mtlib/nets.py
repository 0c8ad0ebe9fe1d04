"""Networks: a `body` that makes features and a `head` that reads them.

They are plain `nn.Module`s; nothing here knows about tasks. Their norm is `mtlib.norm.Norm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import nn

from mtlib.norm import Norm, Statistics

def _two_halves(body: nn.Module, head: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=body, head=head))


def mlp(inputs: int, hidden: Iterable[int], outputs: int) -> nn.Sequential:
    """Fully connected ReLU network; the last linear layer is the head. (B, inputs) -> (B, outputs)."""
    sizes = [inputs, *hidden]
    layers = [
        m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())
    ]
    return _two_halves(nn.Sequential(*layers), nn.Linear(sizes[-1], outputs))


def conv4(
    ways: int = 5,
    channels: int = 1,
    width: int = 64,
    size: int = 28,
    statistics: Statistics = "batch",
) -> nn.Sequential:
    """Four blocks of 3×3 convolution, norm, 2×2 max-pool, ReLU, and a linear head.

    (B, channels, size, size) -> (B, ways). The few-shot literature's `Conv4-64`
    {cite}`vinyals2016matching,snell2017prototypical`. ReLU after the pool gives the same values and
    gradients as before it; a bias before the norm would have no effect and is left out.
    """
    if size < 16:
        raise ValueError(f"expected images of at least 16 pixels for four 2×2 pools, got size={size}")

    def block(inputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        return nn.Sequential(conv, Norm(width, statistics), nn.MaxPool2d(2), nn.ReLU())

    blocks = [block(channels), *(block(width) for _ in range(3))]
    return _two_halves(
        nn.Sequential(*blocks, nn.Flatten()), nn.Linear(width * (size // 16) ** 2, ways)
    )
