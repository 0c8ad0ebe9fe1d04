"""Classes that differ in a few of many dimensions: a few-shot problem whose best answer is known."""

from __future__ import annotations

import numpy as np
import torch

from mtlib.tasks import ClassSet, check_seed, positive, within


def planted(
    classes: int = 64,
    items: int = 100,
    informative: int = 5,
    nuisance: int = 25,
    noise: float = 2.0,
    seed: int = 0,
    world: int = 0,
) -> ClassSet:
    """Gaussian classes that differ in `informative` rotated dimensions, under `nuisance` loud ones.

    x = R [μ_c + ε, noise · η],  μ_c ~ N(0, 2² I),  ε, η ~ N(0, I). The rotation R is drawn from `world`, classes and
    items from `seed`: sets of one world with different seeds share what can be learned, but no class.
    """
    positive(classes=classes, items=items, informative=informative)
    if nuisance != 0:
        positive(nuisance=nuisance)
    within(0, noise=noise)
    check_seed(seed)
    check_seed(world)
    d = informative + nuisance
    rotation, _ = np.linalg.qr(np.random.default_rng([world, 17]).normal(size=(d, d)))
    rng = np.random.default_rng([world, seed, 29])
    means = np.zeros((classes, 1, d))
    means[:, 0, :informative] = 2 * rng.normal(size=(classes, informative))
    spread = np.concatenate([np.ones(informative), np.full(nuisance, noise)])
    x = (means + spread * rng.normal(size=(classes, items, d))) @ rotation.T
    return ClassSet(
        torch.from_numpy(x).float(),
        [f"planted{seed}/class{c:03d}" for c in range(classes)],
        f"planted classes drawn from seed {seed}",
    )
