"""Pretrained image classifiers as networks with two halves. torchvision is optional."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mtlib.run.fast import as_stored
from mtlib.tasks import positive, within

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's three channels, in [0, 1], as torchvision's weights expect."""


def pretrained(
    name: str = "resnet18", ways: int = 5, weights: str | None = "DEFAULT", size: int = 224
) -> nn.Sequential:
    """A classifier of torchvision with its published weights, and a fresh head of `ways` outputs.

    Images are normalised as the weights' own transforms do it.
    Raises ImportError if torchvision is not installed, and torchvision's own error for an unknown name.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"expected the name of a model of torchvision, got {type(name).__name__}; a model goes to `split`"
        )
    if not (weights is None or isinstance(weights, str)):
        raise TypeError(
            f'expected the name of weights, such as "DEFAULT", got {type(weights).__name__}'
        )
    positive(ways=ways, size=size)
    if find_spec("torchvision") is None:
        raise ImportError(
            "torchvision is not installed: `pip install torchvision`, in the build that matches your torch. "
            "Or pass your own network to `split`."
        )
    from torchvision import models

    model = models.get_model(name, weights=weights)
    own = None  # what the weights' own transforms do
    if weights is not None and hasattr(models, "get_model_weights"):
        known = models.get_model_weights(name)
        own = known[weights.rpartition(".")[2]].transforms()
    return split(model, ways, size, getattr(own, "mean", None), getattr(own, "std", None))


def split(
    model: nn.Module,
    ways: int,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A classifier as body and head: its last linear layer is replaced by a fresh one.

    The body reads images (B, 1 or 3, h, w) in [0, 1], brings them to three channels of `size` pixels, normalises
    them, (x − `mean`) / `std`, and stays in evaluation mode: its norms use the statistics stored with the weights.
    `mean` and `std` of the three channels are by default those of the model's own `pretrained_cfg` (timm's), where it
    has one, and otherwise ImageNet's, as for torchvision's weights.
    The model itself is changed. Raises ValueError if it has no linear layer; the body raises it for images outside [0, 1].
    """
    positive(ways=ways, size=size)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, an nn.Module, got {type(model).__name__}; `pretrained` makes one by its name"
        )
    mean = _configured(model, "mean", MEAN) if mean is None else mean
    std = _configured(model, "std", STD) if std is None else std
    read = ReadImages(size, mean, std)
    linear = [(n, m) for n, m in model.named_modules() if n and isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"expected a model with a linear layer, {type(model).__name__} has none")
    name, last = linear[-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    body = Evaluated(OrderedDict(read=read, model=model)).eval()
    return nn.Sequential(
        OrderedDict[str, nn.Module](body=body, head=nn.Linear(last.in_features, ways))
    )


def _configured(model: nn.Module, name: str, default: Sequence[float]) -> Sequence[float]:
    """What timm's configuration says of the weights' images."""
    found: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return default if value is None else tuple(value)


class ReadImages(nn.Module):
    """(B, 1 or 3, h, w) in [0, 1] -> (B, 3, size, size), normalised channel by channel; size None keeps h and w.

    Raises ValueError for images that are not in [0, 1]. A quarter beyond is let pass: a bicubic resize overshoots.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: int | None, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
    ) -> None:
        super().__init__()
        if size is not None:
            positive(size=size)
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"expected a mean and a std for each of 3 channels, got {mean}, {std}")
        within(-math.inf, **{f"mean[{i}]": v for i, v in enumerate(mean)})
        within(1e-6, **{f"std[{i}]": v for i, v in enumerate(std)})
        if not all(0 <= v <= 1 for v in mean) or max(std) > 1:
            raise ValueError(
                f"expected the mean and std of images in [0, 1], got {tuple(mean)} and {tuple(std)}; those of bytes divided by 255"
            )
        self.size, self.seen = size, False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
            got = tuple(x.shape) if isinstance(x, Tensor) else f"{type(x).__name__}, not a tensor"
            raise ValueError(f"expected images (B, 1 or 3, h, w), got {got}")
        if not x.is_floating_point():
            raise ValueError(f"expected images in [0, 1], got {x.dtype}; for bytes x.float() / 255")
        self.check(x)
        x = x.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = interpolate(
                x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return (x - self.mean) / self.std

    def check(self, x: Tensor) -> None:
        """Raises ValueError for numbers that no image has.

        Each call on a CPU, elsewhere the first: a look at the numbers would make the device's queue run dry.
        """
        stored = None if self.seen and x.device.type != "cpu" else as_stored(x)
        if stored is None or not stored.numel():
            return
        low, high = (float(v) for v in stored.aminmax())
        if not (low >= -0.25 and high <= 1.25):
            raise ValueError(
                f"expected images in [0, 1], got numbers from {low:.3g} to {high:.3g}. Divide bytes by 255, and "
                "give images that are not normalised yet: the body does that."
            )
        self.seen = True


class Evaluated(nn.Sequential):
    """Stays in evaluation mode, whatever `train()` asks of the network around it."""

    def train(self, mode: bool = True) -> Evaluated:
        super().train(False)
        return self
