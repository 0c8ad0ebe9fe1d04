"""Made-up pictures of goods in crates: an offline stand-in for photographs of groceries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mtlib.tasks import ClassSet, check_seed, positive, within

COARSE = 32  # pixels a side in which a picture is drawn
BURST = 3  # pictures of one crate, seconds apart
GOODS = {"fruit": (1.0, 1.0), "vegetables": (2.2, 0.7), "cartons": (1.0, 1.5)}  # width and height


def crates(
    classes: int, pictures: int = 18, size: int = 128, seed: int = 0, first: int = 0, visit: int = 0
) -> ClassSet:
    """Pictures (C, pictures, 3, size, size) of uint8, in bursts of three that show one crate and differ by noise alone.

    A class has a colour, a second colour and a form; a crate its light and the places of its goods; a `visit` its own
    light. Kinds of goods take turns: fruit, vegetables, cartons. Names are "fruit/kind07/good07"; `first` is the number of
    the first class, so that sets of other numbers share no class. Two visits show the same classes, and no crate in common.
    """
    positive(classes=classes, pictures=pictures, size=size)
    check_seed(seed)
    within(0, first=first, visit=visit)
    kinds, items, names = list(GOODS), [], []
    for c in range(first, first + classes):
        kind = kinds[c % len(kinds)]
        items.append(_good(kind, pictures, size, [seed, c], visit))
        names.append(f"{kind}/kind{c:02d}/good{c:02d}")
    return ClassSet(torch.stack(items), names, f"crates drawn from seed {seed}")


def _good(kind: str, pictures: int, size: int, seed: list[int], visit: int) -> Tensor:
    """The pictures of one class at one visit: (pictures, 3, size, size)."""
    rng = np.random.default_rng([*seed, 31])
    skin, mark = rng.uniform(0.1, 0.95, (2, 3, 1, 1))
    wave, radius = rng.uniform(0.5, 2.0), rng.uniform(4.0, 7.0)
    rng = np.random.default_rng([*seed, 1 + visit])
    light = 1 + 0.12 * rng.normal(size=(3, 1, 1))
    y, x = np.mgrid[:COARSE, :COARSE]
    wide, high = GOODS[kind]
    shown = []
    for _ in range(-(-pictures // BURST)):
        picture = 0.35 + 0.1 * rng.normal(size=(3, 1, 1)) + np.zeros((3, COARSE, COARSE))
        for cx, cy in rng.uniform(0, COARSE, (9, 2)):
            u, v = (x - cx) / (radius * wide), (y - cy) / (radius * high)
            inside = np.maximum(abs(u), abs(v)) < 0.8 if kind == "cartons" else u**2 + v**2 < 1
            stripe = 0.5 + 0.5 * np.sin(wave * (y - cy) + rng.uniform(0, 1))
            surface = skin * stripe + mark * (1 - stripe)
            picture = np.where(inside, surface * (1 - 0.3 * (u**2 + v**2)), picture)
        dim = light * (1 + 0.15 * rng.normal())
        noise = 0.03 * rng.normal(size=(BURST, 3, COARSE, COARSE))
        shown.append(np.clip(picture * dim + noise, 0, 1))
    drawn = torch.from_numpy(np.concatenate(shown)[:pictures]).float()
    return (255 * interpolate(drawn, (size, size), mode="nearest")).round().to(torch.uint8)
