"""Pretrained image classifiers as networks with two halves. torchvision is optional."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's three channels, in [0, 1], as torchvision's weights expect."""


def pretrained(
    name: str = "resnet18", ways: int = 5, weights: str | None = "DEFAULT", size: int = 224
) -> nn.Sequential:
    """A classifier of torchvision with its published weights, and a fresh head of `ways` outputs.

    Raises ImportError if torchvision is not installed, and torchvision's own error for an unknown name.
    """
    if find_spec("torchvision") is None:
        raise ImportError(
            "torchvision is not installed: `pip install torchvision`, in the build that matches your torch. "
            "Or pass your own network to `split`."
        )
    from torchvision.models import get_model

    return split(get_model(name, weights=weights), ways, size)


def split(model: nn.Module, ways: int, size: int = 224) -> nn.Sequential:
    """A classifier as body and head: its last linear layer is replaced by a fresh one.

    The body reads images (B, 1 or 3, h, w) in [0, 1], brings them to three channels of `size` pixels, normalises
    as torchvision does, and stays in evaluation mode: its norms use the statistics stored with the weights.
    The model itself is changed. Raises ValueError if it has no linear layer.
    """
    if ways < 1:
        raise ValueError(f"expected at least 1 way, got {ways}")
    linear = [(n, m) for n, m in model.named_modules() if n and isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"expected a model with a linear layer, {type(model).__name__} has none")
    name, last = linear[-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    body = _Evaluated(OrderedDict(read=ReadImages(size), model=model)).eval()
    return nn.Sequential(
        OrderedDict[str, nn.Module](body=body, head=nn.Linear(last.in_features, ways))
    )


class ReadImages(nn.Module):
    """(B, 1 or 3, h, w) in [0, 1] -> (B, 3, size, size), normalised channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"expected images (B, 1 or 3, h, w), got {tuple(x.shape)}")
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-2:] != (self.size, self.size):
            x = interpolate(
                x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return (x - self.mean) / self.std


class _Evaluated(nn.Sequential):
    """Stays in evaluation mode, whatever `train()` asks of the network around it."""

    def train(self, mode: bool = True) -> _Evaluated:
        super().train(False)
        return self
