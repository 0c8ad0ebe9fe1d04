"""Handwritten digits from three scanners in one format {cite}`lecun1998gradient`; altered copies without file and network."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, max_pool2d

from mtlib.core import Batch, Stream
from mtlib.data.download import Remote, Unreachable, fetch
from mtlib.data.parsing import MOST, content, parsing
from mtlib.tasks import check_rows, check_seed, check_tensor, one_hot, positive, whole

_MNIST = "https://raw.githubusercontent.com/fgnt/mnist/ae608a02b796c9ee908c082585a5f006fe05258e"

FILES = {
    "images": Remote(
        "mnist/t10k-images-idx3-ubyte.gz",
        f"{_MNIST}/t10k-images-idx3-ubyte.gz",
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",),
        size=1_648_877,
    ),
    "labels": Remote(
        "mnist/t10k-labels-idx1-ubyte.gz",
        f"{_MNIST}/t10k-labels-idx1-ubyte.gz",
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",),
        size=4_542,
    ),
    "semeion": Remote(
        "semeion/semeion.data",
        "https://raw.githubusercontent.com/claytonkb/basic_nn/"
        "ece06403dabc4d5458fb1a017ba75aef5cd0ae02/semeion.data",
        ("7c74222dd9beb6a5b30c7b41104e7486cabc274e013689db1cd62b1ca56d0dd4",),
        size=850_662,
    ),
}
"""MNIST's 10,000 test digits, and Semeion's 1,593; scikit-learn ships 1,797 digits of 8×8."""


class Domain(NamedTuple):
    """Digits from one scanner."""

    x: Tensor  # (n, 1, size, size) ink 1 on paper 0
    y: Tensor  # (n,) 0 to 9
    source: str


def scanners(size: int = 16, crop: bool = True) -> dict[str, Domain]:
    """MNIST, Semeion and Digits; without file and network, scikit-learn's digits in three parts, two of them altered.

    With `crop`, each image is cut to the box of its ink, then stretched to size × size.
    Raises `mtlib.data.download.Altered` for a file with the wrong digest.
    """
    positive(size=size)
    try:
        raw = {"MNIST": _mnist(), "Semeion": _semeion(), "Digits": _shipped()}
        kind = "real"
    except Unreachable:
        raw, kind = changed(), "stand-in"
    return {
        name: Domain(
            torch.from_numpy(np.stack([prepared(i, size, crop) for i in images]))[:, None],
            torch.from_numpy(y.astype(np.int64)),
            f"{name}: {len(y)} digits of {images.shape[1]}×{images.shape[2]} pixels ({kind})",
        )
        for name, (images, y) in raw.items()
    }


def halves(domain: Domain, tested: int) -> tuple[Batch, Batch]:
    """A domain's images that may be seen, and those that test: x (n, 1, size, size), y (n,) 0 to 9.

    The images are in one random order, always the same; of its first half at most `tested` test.
    Raises ValueError for less than one test image, or where a half would be empty.
    """
    if tested < 1 or len(domain.x) < 2:
        raise ValueError(
            f"expected at least two images and tested ≥ 1, got {len(domain.x)} images and {tested=}"
        )
    positive(tested=tested)
    check_rows(Batch(domain.x, domain.y), "the domain")
    order = torch.from_numpy(np.random.default_rng(9).permutation(len(domain.x)))
    middle = len(order) // 2
    test, seen = order[:middle][:tested], order[middle:]
    return Batch(domain.x[seen], domain.y[seen]), Batch(domain.x[test], domain.y[test])


def pairs(
    source: Batch,
    target: Batch,
    seed: int,
    batch: int = 64,
    labelled: bool = False,
    change: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
) -> Stream:
    """stream(step) -> Batch of `batch` source images and as many target images, with replacement.

    x (2, B, 1, size, size); y (2, B, 10), one-hot: the target's rows are zero unless `labelled` says that its labels
    may be read. `change(x, rng)` changes source images, (B, 1, size, size) to the same shape.
    Raises ValueError for an empty batch or domain.
    """
    if min(batch, len(source.x), len(target.x)) < 1:
        raise ValueError(
            f"expected images in both domains and batch ≥ 1, got {len(source.x)}, {len(target.x)} and {batch=}"
        )

    positive(batch=batch)
    check_seed(seed)
    check_rows(source, "the source")
    check_rows(target, "the target")

    def stream(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        i, j = (torch.from_numpy(rng.integers(len(d.x), size=batch)) for d in (source, target))
        x = change(source.x[i], rng) if change else source.x[i]
        y = one_hot(target.y[j], 10) if labelled else torch.zeros(batch, 10)
        return Batch(torch.stack([x, target.x[j]]), torch.stack([one_hot(source.y[i], 10), y]))

    return stream


def few(target: Batch, shots: int, seed: int, after: int = 0) -> Batch:
    """`shots` images of each digit, of those from number `after` on, without replacement; digit by digit, from 0 to 9.

    Fewer shots with the same seed are the first of these. Raises ValueError where a digit has fewer images.
    """
    positive(shots=shots)
    whole(after=after)
    check_seed(seed)
    check_rows(target, "the target")
    rng, rows = np.random.default_rng([seed, 3]), []
    for digit in range(10):
        own = after + np.flatnonzero(target.y[after:].cpu().numpy() == digit)
        if len(own) < shots:
            raise ValueError(
                f"expected {shots} images of each digit from number {after} on, got {len(own)} of the digit {digit}"
            )
        rows.append(rng.permutation(own)[:shots])
    index = torch.from_numpy(np.concatenate(rows)).to(target.y.device)
    return Batch(target.x[index], target.y[index])


def redrawn(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, 1, h, w), ink 1 on paper 0, as another hand and pen would have them: a `change` of `pairs`.

    Each is turned by up to .2, slanted by up to .3, stretched by up to 15 % and shifted by up to a twentieth of its size;
    then a quarter becomes thicker (halfway to the largest of 3×3 pixels), 15 % thinner, a fifth blurred.
    """
    check_tensor(x, "x")
    if x.ndim != 4 or x.shape[1] != 1 or not x.is_floating_point():
        raise ValueError(f"expected images (B, 1, h, w) of real numbers, got {tuple(x.shape)}")
    g = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    turn, slant, wide, high, right, down = (2 * torch.rand(6, len(x), generator=g) - 1).to(x)
    first = torch.stack([1 + 0.15 * wide, 0.3 * slant - 0.2 * turn, 0.1 * right], 1)
    second = torch.stack([0.2 * turn, 1 + 0.15 * high, 0.1 * down], 1)
    grid = affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    y = grid_sample(x, grid, align_corners=False)
    blurred = avg_pool2d(y, 3, 1, 1)
    blurred = blurred / blurred.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    thick, thin = (y + max_pool2d(y, 3, 1, 1)) / 2, (y - max_pool2d(-y, 3, 1, 1)) / 2
    u = torch.rand(len(x), 1, 1, 1, generator=g).to(x)
    return torch.where(
        u < 0.25, thick, torch.where(u < 0.4, thin, torch.where(u < 0.6, blurred, y))
    )


def prepared(image: np.ndarray, size: int, crop: bool) -> np.ndarray:
    """One image (h, w) in [0, 1] -> (size, size): cut to the ink, stretched, lightest 0 and darkest 1."""
    if image.ndim != 2 or not image.size or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"expected one image (h, w) in [0, 1], got {image.shape}, from {image.min(initial=np.inf):g} to "
            f"{image.max(initial=-np.inf):g}; divide bytes by 255"
        )
    if crop:
        ink = image > 0.25
        if not ink.any():
            raise ValueError("expected an image with ink, got an empty one")
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
    small = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    scaled: np.ndarray = small / max(small.max(), 1.0)
    return scaled


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    return read_mnist(fetch(FILES["images"]), fetch(FILES["labels"]))


def read_mnist(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) in [0, 1] and their digits (n,), from two gzipped IDX files {cite}`lecun1998gradient`.

    Raises ValueError for another form, sizes that do not fit the bytes or each other, and a label above 9.
    """
    with parsing(images, "a gzipped IDX file of 28×28 images"):
        pixels = _idx(images, 3)
        if pixels.shape[1:] != (28, 28):
            raise ValueError(f"expected images of 28×28 pixels, got {pixels.shape[1:]}")
    with parsing(labels, "a gzipped IDX file of digits"):
        y = _idx(labels, 1)
        if len(y) != len(pixels) or not len(y) or y.max() > 9:
            raise ValueError(
                f"expected {len(pixels)} digits from 0 to 9, got {len(y)} up to {y.max(initial=0)}"
            )
    return pixels / 255, y


def _idx(path: Path, axes: int) -> np.ndarray:
    """An array of bytes: 0, 0, 8, the number of axes, the size of each as four bytes, then the values."""
    with gzip.GzipFile(fileobj=io.BytesIO(content(path))) as file:
        data = file.read(MOST + 1)
    start = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) != start + math.prod(shape):
        raise ValueError(f"its head says {shape}, which is not what follows in {len(data):,} bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _semeion() -> tuple[np.ndarray, np.ndarray]:
    return read_semeion(fetch(FILES["semeion"]))


def read_semeion(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """256 pixels and ten one-hot columns per line, all 0 or 1. Raises ValueError for anything else."""
    with parsing(path, "a file of Semeion's digits"):
        lines = content(path).decode("ascii").splitlines()
        words = [line.split() for line in lines if line.strip()]
        if not words or {len(row) for row in words} != {266}:
            raise ValueError(
                f"expected lines of 266 numbers, got {sorted({len(r) for r in words})}"
            )
        values = {word: float(word) for row in words for word in set(row)}
        if not set(values.values()) <= {0.0, 1.0}:
            raise ValueError(f"expected 0 and 1, got {sorted(values)[:10]}")
        table = np.array([[values[word] for word in row] for row in words])
        if (table[:, 256:].sum(1) != 1).any():
            raise ValueError("expected one digit to be marked in each line")
    return table[:, :256].reshape(-1, 16, 16), table[:, 256:].argmax(1)


def _shipped() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    held = load_digits()
    return held.images / 16, held.target


def changed(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits in three parts: as they are; slanted and thin; thick, noisy and of lower contrast."""
    from scipy import ndimage

    check_seed(seed)
    images, y = _shipped()
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(y)), 3)
    large = np.stack([np.clip(ndimage.zoom(i, 2, order=1), 0, 1) for i in images])
    slant = np.array([[1, 0], [0.45, 1]])
    thin = [
        np.clip(ndimage.affine_transform(i, slant, offset=(0, -3.5), order=1) * 1.6 - 0.6, 0, 1)
        for i in large[parts[1]]
    ]
    thick = [ndimage.grey_dilation(i, (3, 3)) for i in large[parts[2]]]
    noisy = np.clip(np.stack(thick) * 0.8 + 0.12 * rng.normal(size=(len(parts[2]), 16, 16)), 0, 1)
    return {
        "Digits": (images[parts[0]], y[parts[0]]),
        "slanted": (np.stack(thin), y[parts[1]]),
        "thick": (noisy, y[parts[2]]),
    }
