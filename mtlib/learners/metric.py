"""Learners that compare a query with the support set in feature space."""

from __future__ import annotations

from torch import Tensor, nn

from mtlib.core import Batch, Learner, Params, features, parameters


def protonet(net: nn.Module) -> Learner:
    """Prototypical network: the nearest class mean in feature space. The head is not used.

    c_k = mean of z(φ, x) over the support items of class k;  logit_k(x) = −‖z(φ, x) − c_k‖².
    θ carries the means as `prototypes` (W, D). {cite}`snell2017prototypical`
    """
    z = features(net)

    def init() -> Params:
        return {k: v for k, v in parameters(net).items() if k.startswith("body.")}

    def adapt(phi: Params, support: Batch) -> Params:
        return {**phi, "prototypes": class_means(z(phi, support.x), support.y)}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return -squared_distances(z(theta, x), theta["prototypes"])

    return Learner(init, adapt, predict)


def class_means(z: Tensor, y: Tensor) -> Tensor:
    """(N, D) features and one-hot (N, W) labels -> the W class means (W, D)."""
    return (y.mT @ z) / y.sum(0)[:, None]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² for each pair: (B, D), (W, D) -> (B, W)."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)
