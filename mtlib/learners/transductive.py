"""TRANSDUCTIVE learners: the prediction for one query item depends on the other query items.

The protocol differs from every other learner's: all query items of a task come at once, without their labels, and each
prediction may use them all. Report their scores apart from those of learners that see one item at a time. They adapt to
the query in `predict`, which gets the whole query batch; θ carries what they need from the support set. A class without
a support item cannot be predicted, as in `mtlib.learners.metric`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Learner, Loss, Params, apply, features, fixed, risk
from mtlib.learners.gradient import Rate, check_rate, descend
from mtlib.learners.metric import (
    among,
    body_of,
    check_targets,
    cosines,
    defined,
    normalised,
    prototypes,
    squared_distances,
    unit,
    width,
)
from mtlib.tasks import above_zero, functions, positive, whole, within


def entropy_finetune(net: nn.Module, loss: Loss, lr: Rate, steps: int) -> Learner:
    """Transductive fine-tuning: fit the support labels, and predict confidently on the query items, whatever they are.

    θ ← θ − α ∇[ L^S(θ) + (1/B) Σ_x H(p_θ(·|x)) ] for `steps` steps over the query items x, every parameter moving,
    H(p) = −Σ_k p_k log p_k. It starts from φ's body and a head of class means: w_k = c_k/‖c_k‖, c_k the mean of
    z/‖z‖ over class k, b = 0. In the paper the head reads the logits of pre-training, scaled to length 1, and Adam takes
    the steps. Raises ValueError like `width`. {cite}`dhillon2020baseline`
    """
    whole(steps=steps)
    functions(2, loss=loss)
    if not callable(lr):
        check_rate(lr)
    width(net)
    z, f = features(net), apply(net)

    def adapt(phi: Params, support: Batch) -> Params:
        known, c = defined(prototypes(unit(z(phi, support.x)), support.y))
        w = unit(c)
        bias = among(known, w.new_zeros(len(w)))  # the lowest logit has no gradient: it stays
        head = {"head.weight": w, "head.bias": bias}
        return {**phi, **head, "support.x": support.x, "support.y": support.y}

    def predict(theta: Params, x: Any) -> Tensor:
        def inner(moving: Params) -> Tensor:
            now = {**theta, **moving}
            fit = risk(loss, f(now, theta["support.x"]), theta["support.y"])
            return fit + entropy(f(now, x)).mean()

        still = fixed(net)
        moving = {k: theta[k] for k, _ in net.named_parameters() if k not in still}
        return f({**theta, **descend(inner, moving, lr, steps)}, x)

    return Learner(lambda: body_of(net), adapt, predict, net=net)


def bd_cspn(net: nn.Module, scale: float = 10.0, shift: bool = True) -> Learner:
    """BD-CSPN: shift the query features onto the support's, then let them move the class means.

    z_q ← z_q + (mean z_s − mean z_q), where `shift`; each query item is labelled with the class of the largest cosine; over
    the items i of class k, of the support and the query, c'_k = Σ_i w_i z_i, w_i = softmax_i( ε cos(z_i, c_k) );
    logit_k(x) = ε cos(z_q, c'_k), ε = `scale`. The labels given to the query are constants to the outer gradient. All
    query items take part, with features as they are; the paper also pre-trains with a cosine head. Raises ValueError unless
    ε > 0. {cite}`liu2020prototype`
    """
    above_zero(scale=scale)
    z = features(net)

    def adapt(phi: Params, support: Batch) -> Params:
        zs = z(phi, support.x)
        return {**phi, "support.z": zs, "support.y": check_targets(zs, support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        zs, ys, zq = theta["support.z"], theta["support.y"], z(theta, x)
        zq = zq + zs.mean(0) - zq.mean(0) if shift else zq
        known, c = defined(prototypes(zs, ys))  # (W,), (W, D)
        every, y = with_guesses(zs, ys, zq, known, c)
        w = torch.where(known, scale * cosines(every, c) + y.log(), 0.0).softmax(0)
        return among(known, scale * cosines(zq, w.mT @ every))

    return Learner(lambda: body_of(net), adapt, predict, net=net)


def laplacian_shot(
    net: nn.Module,
    strength: float = 0.7,
    neighbours: int = 3,
    steps: int = 20,
    normalise: bool = True,
    rectify: bool = True,
    shift: bool = True,
) -> Learner:
    """LaplacianShot: rectified class means, and neighbouring query items should get the same class.

    1. `normalise`: u(x) = (z(φ, x) − μ) / ‖z(φ, x) − μ‖, where μ = φ["centre.mean"] is zero at first; `metric.centred`
       sets it to the mean feature of the training items.
    2. `shift`: u_q ← u_q + (mean u_s − mean u_q).
    3. `rectify`: m_k = (1/n_k) Σ_i p_ik u_i over the n_k items i of class k: its support items, and the query items
       whose u has the largest cosine with c_k; c_k is the mean of the support items, p_i = softmax_k( 10 cos(u_i, c_k) ).
       Else m_k = c_k.
    4. y_q ← softmax_k( −‖u_q − m_k‖² + λ Σ_p w_qp y_p ) for `steps` rounds, from λ = 0; w_qp = 1 where p is one of the
       `neighbours` query items nearest to q, else 0; λ = `strength`. The logits are the last round's exponents.

    The authors' code counts q among its own neighbours, so its k is `neighbours` + 1, and guesses the class of support
    items, too. With `strength` 0 and without `shift` and `rectify` it is `simpleshot`, and without `normalise`, too,
    `protonet`. Which items are neighbours, and which class a
    query item is guessed to be of in 3, are constants to the outer gradient. Raises ValueError for a negative λ, no
    neighbour, or half a round, and with `normalise` like `width`. {cite}`ziko2020laplacian`
    """
    within(0, strength=strength)
    positive(neighbours=neighbours)
    whole(steps=steps)
    init, u = normalised(net) if normalise else (partial(body_of, net), features(net))

    def adapt(phi: Params, support: Batch) -> Params:
        us = u(phi, support.x)
        return {**phi, "support.z": us, "support.y": check_targets(us, support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        us, ys, uq = theta["support.z"], theta["support.y"], u(theta, x)
        uq = uq + us.mean(0) - uq.mean(0) if shift else uq
        known, m = defined(prototypes(us, ys))  # (W,), (W, D)
        if rectify:
            every, y = with_guesses(us, ys, uq, known, m)
            p = y * among(known, 10 * cosines(every, m)).softmax(1)
            n = y.sum(0)[:, None]
            m = (p.mT @ every) / torch.where(n != 0, n, 1.0)
        alone = among(known, -squared_distances(uq, m))
        w = nearest(uq, neighbours)  # (B, B)
        logit = alone
        for _ in range(steps):
            logit = alone + strength * w @ logit.softmax(1)
        return logit

    return Learner(init, adapt, predict, net=net)


# What they share -----------------------------------------------------------------------------


def with_guesses(
    zs: Tensor, ys: Tensor, zq: Tensor, known: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Support and query features (N+B, D), and labels (N+B, W): a query item's class has the mean c of largest cosine."""
    guess = hardened(among(known, cosines(zq, c)))  # (B, W)
    return torch.cat([zs, zq]), torch.cat([ys, guess])


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ_k p_k log p_k of p = softmax(logits): (B, W) -> (B,)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def hardened(scores: Tensor) -> Tensor:
    """One-hot rows of the largest score, as constants: (B, W) -> (B, W)."""
    return (scores == scores.amax(1, keepdim=True)).to(scores.dtype)


def nearest(z: Tensor, neighbours: int) -> Tensor:
    """w_qp = 1 where p ≠ q is one of the rows nearest to q, as constants: (B, D) -> (B, B)."""
    positive(neighbours=neighbours)
    d = squared_distances(z, z).detach() + torch.diag(z.new_full((len(z),), torch.inf))
    rank = d.argsort(1).argsort(1)  # of p among q's neighbours; q itself comes last
    return (rank < min(neighbours, len(z) - 1)).to(z.dtype)
