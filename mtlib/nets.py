"""Networks: a `body` that makes features and a `head` that reads them.

They are plain `nn.Module`s; nothing here knows about tasks. `Norm` stands in for torch's batch norm,
whose second-order gradient is silently wrong under `vmap`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from mtlib.core import Params, apply, parameters

Statistics = Literal["batch", "stored"]


class Norm(nn.Module):
    """Batch normalisation written out, exact under `vmap` to second order.

    y = γ (x − μ) / √(σ² + ε) + β, with μ and σ² per channel over every other axis of x: (B, channels, ...).

    `statistics="batch"` takes μ, σ² from x itself. It is transductive: a query batch sees itself.
    `statistics="stored"` reads them from the buffers `mean` and `var`, which only `calibrate` writes.
    """

    def __init__(self, channels: int, statistics: Statistics = "batch", eps: float = 1e-5):
        super().__init__()
        if statistics not in ("batch", "stored"):
            raise ValueError(f'expected statistics "batch" or "stored", got {statistics!r}')
        self.statistics, self.eps = statistics, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if statistics == "stored":
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))  # (channels, 1, ...)
        if self.statistics == "batch":
            mean, var = moments(x)
        else:
            mean, var = self.mean.detach(), self.var.detach()
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, statistics={self.statistics!r}"


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel of x: (B, channels, ...)."""
    var, mean = torch.var_mean(x, [i for i in range(x.ndim) if i != 1], correction=0)
    return mean, var


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


@torch.no_grad()
def calibrate(net: nn.Module, phi: Params, batches: Iterable[Tensor]) -> Params:
    """φ with the stored statistics of each `Norm` set to the moments of its input, averaged over `batches`.

    Layer by layer, so that each norm sees the inputs it will see when the norms before it are stored.
    `net` is built with `statistics="stored"`; `batches` are inputs x: (B, *item). Calling it with
    batches of another domain is AdaBN. Returns a new φ; neither `net` nor φ changes.
    """
    batches = list(batches)
    norms = [(k, m) for k, m in net.named_modules() if isinstance(m, Norm)]
    stored = [(k, m) for k, m in norms if m.statistics == "stored"]
    if not stored:
        raise ValueError(
            'expected a network with norms of statistics="stored", found none; '
            'build it with, e.g., conv4(statistics="stored")'
        )
    if not batches:
        raise ValueError("expected at least one batch of inputs to calibrate on, got none")
    phi = {**parameters(net), **phi}
    for name, norm in stored:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = norm.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(moments(args[0])))
        try:
            for x in batches:
                apply(net)(phi, x)
        finally:
            hook.remove()
        mean = torch.stack([m for m, _ in seen]).mean(0)
        second = torch.stack([v + m * m for m, v in seen]).mean(0)
        phi |= {f"{name}.mean": mean, f"{name}.var": second - mean * mean}
    return phi

