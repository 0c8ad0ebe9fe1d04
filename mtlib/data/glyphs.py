"""Procedural characters: strokes drawn from a seed, an offline stand-in for Omniglot.

An alphabet has a style, a character a few strokes, and each drawing its own wobble. The wobble is chosen so
that raw pixels tell these characters apart as well as Omniglot's: nearest class mean, 5 ways, about 44 % from
one drawing and 72 % from five, on both.
"""

from __future__ import annotations

import numpy as np
import torch

from mtlib.tasks import ClassSet, check_seed, positive

ALPHABET = 24  # characters in each
POINTS = 40  # sample points along a stroke
STROKES = 4  # the most that a character has
EXTENT = 2.4  # side of the paper; characters fill about -1 to 1
SOFT = 0.02  # how far the pen bleeds


def glyphs(
    classes: int = 1200, items: int = 20, size: int = 28, seed: int = 0, first: int = 0
) -> ClassSet:
    """Items (C, items, 1, size, size), ink 1 on paper 0, of `classes` characters drawn from `seed`.

    A stroke is a quadratic Bézier curve between places of a coarse grid; a drawing moves its control points,
    turns, shears, scales and shifts the character, and picks a pen. Names are "alphabet07/character12";
    24 characters make an alphabet, and `first` is the number of the first one. The same arguments give the
    same drawings, up to rounding of the last digits between machines; no global random state is used or touched.
    """
    positive(classes=classes, items=items, size=size)
    check_seed(seed)
    if first != 0:
        positive(first=first)
    if size < 8:
        raise ValueError(f"expected a size of at least 8 pixels, got {size}")
    alphabets = range(first, first - (-classes // ALPHABET))
    drawn = [_alphabet(np.random.default_rng([seed, a, 53]), items, size) for a in alphabets]
    names = [f"alphabet{a:02d}/character{c + 1:02d}" for a in alphabets for c in range(ALPHABET)]
    return ClassSet(
        torch.from_numpy(np.concatenate(drawn)[:classes]),
        names[:classes],
        f"glyphs drawn from seed {seed}",
    )


def _alphabet(rng: np.random.Generator, items: int, size: int) -> np.ndarray:
    """(24, items, 1, size, size): characters that share curvature, grid and pen."""
    curl, pen = rng.uniform(0.1, 0.6), rng.uniform(0.03, 0.045)
    chance = rng.dirichlet([0.3, 2.0, 2.0, 1.0])  # of 1, 2, 3, 4 strokes in its characters
    counts = rng.choice(STROKES, size=ALPHABET, p=chance) + 1
    places = rng.permuted(np.tile(np.arange(16), (ALPHABET, STROKES, 1)), axis=-1)[..., :3]
    control = np.stack([places % 4, places // 4], -1) * 0.45 - 0.675  # (C, S, start-bend-end, xy)
    joined = rng.random((ALPHABET, STROKES)) < 0.5  # a stroke begins where the one before it ended
    for s in range(1, STROKES):
        control[:, s, 0] = np.where(joined[:, s, None], control[:, s - 1, 2], control[:, s, 0])
    middle = (control[:, :, 0] + control[:, :, 2]) / 2
    control[:, :, 1] = middle + 2 * curl * (control[:, :, 1] - middle)

    hand = control[:, None] + 0.06 * rng.normal(size=(ALPHABET, items, STROKES, 3, 2))
    t = np.linspace(0, 1, POINTS)[:, None]
    curve = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])[..., 0]  # (3, P)
    points = np.einsum("cisbx,bp->cispx", hand, curve)  # (C, I, S, P, xy)

    turn, shear = 0.14 * rng.normal(size=(2, ALPHABET, items))
    larger, wider = rng.normal(size=(ALPHABET, items, 1)), rng.normal(size=(ALPHABET, items, 2))
    scale = np.exp(0.16 * larger + 0.12 * wider)
    cos, sin = np.cos(turn), np.sin(turn)
    affine = np.stack(
        [np.stack([cos, -sin + shear], -1), np.stack([sin, cos], -1)], -2
    )  # (C, I, 2, 2)
    points = np.einsum("cixy,cispy->cispx", affine * scale[..., None, :], points)
    points += 0.14 * rng.normal(size=(ALPHABET, items, 1, 1, 2))

    visible = np.arange(STROKES) < counts[:, None]  # (C, S)
    points = np.where(visible[:, None, :, None, None], points, 9.0)  # unused strokes lie outside
    width = pen * np.exp(0.15 * rng.normal(size=(ALPHABET, items)))
    return _render(points.reshape(ALPHABET * items, -1, 2), width.ravel(), size).reshape(
        ALPHABET, items, 1, size, size
    )


def _render(points: np.ndarray, width: np.ndarray, size: int) -> np.ndarray:
    """Ink where a pixel is nearer than `width` to a point of the curve, softened over a pixel: (n, size, size).

    points (n, P, xy), width (n,). A point reaches only the few pixels around it, so only those are visited.
    """
    pixel = EXTENT / size
    reach = int(np.ceil((width.max() + SOFT) / pixel + 0.5))
    place = torch.from_numpy((points + EXTENT / 2) / pixel - 0.5).float()  # (n, P, xy) in pixels
    corner = place.floor()
    steps = torch.arange(1 - reach, reach + 1)
    near = corner.long()[..., None] + steps  # (n, P, xy, 2·reach)
    near = near.where((near >= 0) & (near < size), size)  # what falls outside goes to a margin
    square = (steps - (place - corner)[..., None]) ** 2
    cell = near[:, :, 1, :, None] * (size + 1) + near[:, :, 0, None, :]  # (n, P, rows, columns)
    square = square[:, :, 1, :, None] + square[:, :, 0, None, :]
    nearest = torch.full((len(points), (size + 1) ** 2), float(size) ** 2)
    nearest.scatter_reduce_(1, cell.flatten(1), square.flatten(1), "amin")
    nearest = nearest.view(-1, size + 1, size + 1)[:, :size, :size]
    ink = 0.5 + (torch.from_numpy(width).float()[:, None, None] + SOFT) / pixel - nearest.sqrt()
    return ink.clamp(0, 1).numpy()
