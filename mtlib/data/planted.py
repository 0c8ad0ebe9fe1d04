"""Classes that differ in a few of many dimensions: a few-shot problem whose best answer is known."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Learner, Params
from mtlib.tasks import ClassSet, check_seed, positive, within

SPREAD = 2.0  # of the class means, where the items of a class have 1


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
    rotation = _rotation(d, world)
    rng = np.random.default_rng([world, seed, 29])
    means = np.zeros((classes, 1, d))
    means[:, 0, :informative] = SPREAD * rng.normal(size=(classes, informative))
    spread = np.concatenate([np.ones(informative), np.full(nuisance, noise)])
    x = (means + spread * rng.normal(size=(classes, items, d))) @ rotation.T
    return ClassSet(
        torch.from_numpy(x).float(),
        [f"planted{seed}/class{c:03d}" for c in range(classes)],
        f"planted classes drawn from seed {seed}",
    )


def turned(
    data: ClassSet, degrees: float, informative: int = 5, nuisance: int = 25, world: int = 0
) -> ClassSet:
    """`planted` classes of that world, each informative dimension turned towards a loud one of its own.

    x ↦ Tx: the rotation T takes column i of R to cos(α) r_i + sin(α) r_{d+i}, i < d = `informative`, α = `degrees`, and
    leaves what is orthogonal to the 2d columns. The tasks are as hard as before, but what tells their classes apart
    overlaps with what did by cos² α: at 90 degrees nothing is left. Raises ValueError unless `nuisance` ≥ `informative`
    and the items have `informative` + `nuisance` dimensions.
    """
    positive(informative=informative)
    within(informative, nuisance=nuisance)
    within(-math.inf, degrees=degrees)
    check_seed(world)
    if not isinstance(data, ClassSet):
        raise TypeError(f"expected a ClassSet, got {type(data).__name__}")
    d = informative + nuisance
    if data.items.shape[-1] != d:
        raise ValueError(f"expected items of {d} dimensions, got {tuple(data.items.shape)}")
    read = torch.from_numpy(_rotation(d, world)).to(data.items)
    quiet, loud = read[:, :informative], read[:, informative : 2 * informative]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    both = quiet @ quiet.mT + loud @ loud.mT
    turn = torch.eye(d).to(read) + (c - 1) * both + s * (loud @ quiet.mT - quiet @ loud.mT)
    return data._replace(items=data.items @ turn.mT)


def best_possible(informative: int = 5, nuisance: int = 25, world: int = 0) -> Learner:
    """Bayes' rule for `planted` classes of that world: no learner has a higher expected accuracy on them.

    With z = Rᵀx in the informative dimensions, and n_k support items of class k that sum to s_k, the class's mean is
    N(4 s_k / (4 n_k + 1), 4 / (4 n_k + 1) I) after them, and a query of it has one unit of variance more:

        logit_k(x) = −½ ‖z − 4 s_k / (4 n_k + 1)‖² / v_k − (d/2) log v_k,   v_k = 1 + 4 / (4 n_k + 1),

    d = `informative`, so that softmax gives the posterior where all classes are as frequent. A class without support
    items has its prior. There is nothing to train: φ is empty. θ["means"] (W, d), θ["variances"] (W,). Raises ValueError
    unless the numbers of dimensions are whole, `informative` ≥ 1 and `nuisance` ≥ 0.
    """
    positive(informative=informative, **({} if nuisance == 0 else {"nuisance": nuisance}))
    check_seed(world)
    read = torch.from_numpy(_rotation(informative + nuisance, world)[:, :informative].copy())

    def adapt(phi: Params, support: Batch) -> Params:
        x, y = support
        y = y.to(x)
        after = SPREAD**2 / (SPREAD**2 * y.sum(0) + 1)  # variance of each class's mean, (W,)
        return {**phi, "means": after[:, None] * (y.mT @ (x @ read.to(x))), "variances": 1 + after}

    def predict(theta: Params, x: Tensor) -> Tensor:
        gap = (x @ read.to(x))[:, None] - theta["means"]  # (B, W, d)
        v = theta["variances"]
        return -0.5 * (gap**2).sum(-1) / v - 0.5 * informative * v.log()

    return Learner(dict, adapt, predict)


def _rotation(d: int, world: int) -> np.ndarray:
    rotation: np.ndarray = np.linalg.qr(np.random.default_rng([world, 17]).normal(size=(d, d)))[0]
    return rotation
