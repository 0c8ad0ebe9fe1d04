"""Photographs with boxes, and a stand-in for them: scenes composed of glyphs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtlib.data.glyphs import glyphs
from mtlib.tasks import check_seed, chosen, positive


class Photographs(NamedTuple):
    """n photographs of one size, and the objects in them."""

    images: Tensor  # (n, 3, H, W) of uint8
    boxes: list[Tensor]  # n of (K, 4): x1, y1, x2, y2 in pixels
    labels: list[Tensor]  # n of (K,): class numbers
    names: list[str]  # n
    classes: list[str]
    source: str  # one line that says what this data is

    def select(self, keep: list[int] | Tensor) -> Photographs:
        """The photographs with these indices, or where a mask (n,) is true."""
        index = chosen(keep, len(self.names), "photographs").tolist()
        boxes, labels = [self.boxes[i] for i in index], [self.labels[i] for i in index]
        names = [self.names[i] for i in index]
        return self._replace(images=self.images[index], boxes=boxes, labels=labels, names=names)


def scenes(
    n: int = 100,
    classes: int = 3,
    most: int = 8,
    height: int = 120,
    width: int = 160,
    seed: int = 0,
    first: int = 0,
) -> Photographs:
    """`n` scenes of 1 to `most` glyphs each, drawn from `seed`: dark ink on a paper of uneven brightness.

    A glyph is 16 to 32 pixels wide and may not overlap another by more than its margin; its box bounds its ink.
    `first` is the number of the first alphabet: scenes of other alphabets share no class. Raises ValueError if the
    paper is smaller than a glyph.
    """
    if min(n, classes, most) < 1 or min(height, width) < 40:
        raise ValueError(
            f"expected at least 1 scene, class and glyph, and 40 pixels per side; "
            f"got {n=} {classes=} {most=} {height=} {width=}"
        )
    positive(n=n, classes=classes, most=most, height=height, width=width)
    check_seed(seed)
    drawn = glyphs(classes, items=20, size=32, seed=seed, first=first)
    rng = np.random.default_rng([seed, first, 71])
    shown = [_scene(rng, drawn.items, most, height, width) for _ in range(n)]
    images, boxes, labels = (list(part) for part in zip(*shown, strict=True))
    return Photographs(
        torch.stack(images),
        boxes,
        labels,
        [f"scene{i:04d}" for i in range(n)],
        drawn.names,
        f"scenes of {classes} glyphs drawn from seed {seed} (stand-in)",
    )


def _scene(
    rng: np.random.Generator, items: Tensor, most: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    ink = torch.zeros(height, width)
    used = torch.zeros(height, width, dtype=torch.bool)
    boxes, labels = [], []
    for _ in range(int(rng.integers(1, most + 1))):
        k, i, size = (
            rng.integers(len(items)),
            rng.integers(items.shape[1]),
            int(rng.integers(16, 33)),
        )
        glyph = torch.nn.functional.interpolate(items[k, i][None], size=(size, size), mode="area")[
            0, 0
        ]
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        at = (slice(top, top + size), slice(left, left + size))
        rows, columns = torch.where(glyph > 0.3)
        if used[at].any() or len(rows) == 0:
            continue  # the first glyph always fits, so no scene is empty unless its ink is
        used[at] = True
        ink[at] = glyph
        corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        boxes.append(
            [
                left + int(corners[0]),
                top + int(corners[1]),
                left + int(corners[2]),
                top + int(corners[3]),
            ]
        )
        labels.append(int(k))
    slope = torch.from_numpy(rng.uniform(-0.15, 0.15, 2)).float()
    paper = (
        0.8
        + slope[0] * torch.linspace(-1, 1, height)[:, None]
        + slope[1] * torch.linspace(-1, 1, width)
    )
    noise = torch.from_numpy(rng.normal(0, 0.02, (3, height, width))).float()
    colour = torch.from_numpy(rng.uniform(0.5, 0.8, (3, 1, 1))).float()
    image = (paper - colour * ink + noise).clamp(0, 1)
    return (
        (255 * image).round().to(torch.uint8),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
    )
