"""Learners that compare a query with the support set in feature space.

A class of which the support set has no item cannot be predicted: its logit is `lowest`, and the others are those of the
same episode without that class. Query items of such a class count as wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Episode,
    Learner,
    Loss,
    Params,
    apply,
    below,
    features,
    half,
    over,
    parameters,
    require,
    risk,
)
from mtlib.learners.gradient import Rate, anil
from mtlib.run.devices import double
from mtlib.tasks import above_zero, finite, one_hot, positive, within


def protonet(net: nn.Module) -> Learner:
    """Prototypical network: the nearest class mean in feature space. The head is not used.

    c_k = mean of z(φ, x) over the support items of class k;  logit_k(x) = −‖z(φ, x) − c_k‖².
    θ carries the means as `prototypes` (W, D). {cite}`snell2017prototypical`
    """
    z = features(net)

    def init() -> Params:
        return body_of(net)

    def adapt(phi: Params, support: Batch) -> Params:
        return {**phi, **prototypes(z(phi, support.x), support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        return nearness(theta, z(theta, x))

    return Learner(init, adapt, predict, net=net)


def matching(net: nn.Module, scale: float = 1.0) -> Learner:
    """Matching network: a vote of the support items, each weighted by its cosine with the query.

    a_i(x) = softmax_i( s · cos(z(φ, x), z(φ, x_i)) );  logit(x) = log Σ_i a_i(x) y_i, so its softmax is the vote.
    s = `scale` is 1 in the paper, so that with five classes and one shot no class gets more than e²/(e² + 4) = 65 %.
    Each item is embedded by itself, without the paper's "full context embeddings". θ carries the support set as
    `support.z` (N, D), `support.y` (N, W). Raises ValueError unless s > 0. {cite}`vinyals2016matching`
    """
    above_zero(scale=scale)
    z = features(net)

    def adapt(phi: Params, support: Batch) -> Params:
        zs = z(phi, support.x)
        return {**phi, "support.z": zs, "support.y": check_targets(zs, support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        log_a = (scale * cosines(z(theta, x), theta["support.z"])).log_softmax(1)  # (B, N)
        votes, known = log_a[:, :, None] + theta["support.y"].log(), seen(theta["support.y"])
        return among(known, torch.where(known, votes, 0.0).logsumexp(1))  # (B, W)

    return Learner(lambda: body_of(net), adapt, predict, net=net)


def relation(net: nn.Module, hidden: int = 64) -> Learner:
    """Relation network: a small network, not a formula, scores how well a query fits a class.

    logit_k(x) = g([c_k, z(φ, x)]), c_k the mean of class k, g a network with one hidden layer under `relation.`.
    The paper's g is convolutional, its c_k a sum, and it squashes g by a sigmoid and trains with squared error:
    loss(p, y) = mse_loss(p.sigmoid(), y). All pairs are in memory at once, B·W·2D numbers and B·W·`hidden` more.
    Raises ValueError like `width`. {cite}`sung2018relation`
    """
    positive(hidden=hidden)
    z, d = features(net), width(net)
    g = nn.Sequential(nn.Linear(2 * d, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    g.to(next(net.parameters()))
    score = apply(g)

    def init() -> Params:
        return {**body_of(net), **above("relation.", parameters(g))}

    def adapt(phi: Params, support: Batch) -> Params:
        return {**phi, **prototypes(z(phi, support.x), support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        known, c = defined(theta)
        pairs = every_pair(c, z(theta, x))  # (B, W, 2D)
        return among(known, score(below("relation.", theta), pairs)[..., 0])

    return Learner(init, adapt, predict, net=net)


def baseline_plus_plus(
    net: nn.Module, loss: Loss, lr: Rate, steps: int, scale: float = 10.0
) -> Learner:
    """Baseline++: a cosine head on shared features, adapted by gradient steps on the head alone.

    logit_k(x) = s_k cos(z(φ, x), w_k);  (w, s) ← (w, s) − α ∇ L^S(w, s). It is `anil` on `cosine_head(net, scale)`, the
    network to train jointly; the paper then starts w afresh for each task. {cite}`chen2019closer`
    """
    return anil(cosine_head(net, scale), loss, lr, steps)


def cosine_head(net: nn.Module, scale: float = 10.0) -> nn.Module:
    """The network with a cosine head in place of its linear one, from the same weights; the body is the same module.

    Raises ValueError unless `scale` > 0, or if the head is not one linear layer.
    """
    above_zero(scale=scale)
    head = CosineHead(linear_head(net), scale)
    return nn.Sequential(OrderedDict(body=half(net, "body"), head=head))


class CosineHead(nn.Module):
    """logit_k = s_k cos(z, w_k): (B, D) -> (B, W). Each class's scale is learned, as log s_k; it starts at `scale`."""

    def __init__(self, linear: nn.Linear, scale: float):
        super().__init__()
        w = linear.weight.detach().clone()
        self.weight = nn.Parameter(w)
        self.log_scale = nn.Parameter(w.new_full((len(w),), scale).log())

    def forward(self, z: Tensor) -> Tensor:
        return self.log_scale.exp() * cosines(z, self.weight)


def simpleshot(net: nn.Module) -> Learner:
    """SimpleShot: the nearest class mean of features that are centred and of length 1.

    u(x) = (z(φ, x) − μ) / ‖z(φ, x) − μ‖;  c_k = mean of u over class k;  logit_k(x) = −‖u(x) − c_k‖².
    μ = φ["centre.mean"] (D,) is zero at first; `centred` sets it to the mean feature of the training items. Without
    centring and scaling it is `protonet`. Raises ValueError like `width`. {cite}`wang2019simpleshot`
    """
    init, u = normalised(net)

    def adapt(phi: Params, support: Batch) -> Params:
        return {**phi, **prototypes(u(phi, support.x), support.y)}

    def predict(theta: Params, x: Any) -> Tensor:
        return nearness(theta, u(theta, x))

    return Learner(init, adapt, predict, net=net)


def normalised(net: nn.Module) -> tuple[Callable[[], Params], Callable[[Params, Any], Tensor]]:
    """The first φ, and u(φ, x) = (z(φ, x) − μ) / ‖z(φ, x) − μ‖ with μ = φ["centre.mean"] (D,), zero at first.

    What `simpleshot` and `laplacian_shot` compare; `centred` sets μ. Raises ValueError like `width`.
    """
    z, d = features(net), width(net)

    def init() -> Params:
        return {**body_of(net), "centre.mean": next(net.parameters()).new_zeros(d)}

    def u(phi: Params, x: Any) -> Tensor:
        require(phi, ("centre.mean",))
        if phi["centre.mean"].shape != (d,):
            raise ValueError(
                f"expected φ's centre.mean of shape ({d},), got {tuple(phi['centre.mean'].shape)}: `centred` computes it"
            )
        return unit(z(phi, x) - phi["centre.mean"])

    return init, u


@torch.no_grad()
def centred(net: nn.Module, phi: Params, x: Any) -> Params:
    """φ for `simpleshot` with μ the mean feature of the training items x: (B, *item), or a nest. Returns a new φ.

    Raises TypeError or ValueError where x has no tensor, or other than finite numbers, or the mean is not finite.
    """
    if isinstance(x, Batch):
        raise TypeError(
            "expected the training items x, a tensor or a nest of them, got a Batch: give its x"
        )
    over(lambda d: finite(d, "the training items x"), x)
    mean = features(net)(phi, x).mean(0)
    finite(mean, "the mean feature")
    return {**phi, "centre.mean": mean}


def whitening(z: Tensor, y: Tensor, shrinkage: float) -> Params:
    """The linear map that makes classes round: {"body.weight" (D, D), "body.bias" (D,)} of z's dtype and device.

    u = M (z − μ),  M = Σ^(−1/2),  Σ = (1 − λ) S + λ (tr S / D) I,  S = Σ_i (z_i − c(i)) (z_i − c(i))ᵀ / (N − C),
    with μ the mean of the rows and c(i) that of row i's class, so that S is the covariance within classes. λ = `shrinkage` in
    [0, 1]: at 0 the covariance of u within classes is the identity, at 1 u is z − μ times a number. It stands in
    `two_halves(nn.Linear(D, D), head)` before class means, `protonet` or `simpleshot`, which then compare features in the
    metric of linear discriminant analysis. Solved in float64.

    z (N, D), y (N,) class numbers, N > C. Raises ValueError for rows that do not fit or are not finite, and for a Σ without
    an inverse: shrink more. {cite}`ledoit2004well`
    """
    within(0, 1, shrinkage=shrinkage)
    finite(z, "the features")
    if z.ndim != 2 or not isinstance(y, Tensor) or y.shape != z.shape[:1] or y.is_floating_point():
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"expected features z (N, D) and class numbers y (N,), got {tuple(z.shape)} and {got}"
        )
    (n, d), x = z.shape, double(z.detach())
    classes, number = y.to(x.device).unique(return_inverse=True)
    if n <= len(classes):
        raise ValueError(f"expected more rows than the {len(classes)} classes, got {n}")
    mean, c = x.mean(0), class_means(x, one_hot(number, len(classes), x.dtype))
    inside = x - c[number]
    s = inside.mT @ inside / (n - len(classes))
    s = (1 - shrinkage) * s + shrinkage * s.trace() / d * torch.eye(d).to(s)
    values, vectors = torch.linalg.eigh(s)
    if values[0] <= 1e-10 * values[-1]:
        raise ValueError(
            f"expected a covariance with an inverse, its least eigenvalue is {values[0].item():.2g} and its largest "
            f"{values[-1].item():.2g}: take a larger shrinkage than {shrinkage}"
        )
    m = vectors * values.rsqrt() @ vectors.mT
    return {"body.weight": m.to(z), "body.bias": (-m @ mean).to(z)}


def feat(net: nn.Module) -> Learner:
    """FEAT: the class means look at each other before they are compared with a query.

    c_k as in `protonet`, C (W, D) its rows;  C' = `set_to_set`(φ, C);  logit_k(x) = −‖z(φ, x) − c'_k‖². The four matrices
    are in φ, under `attention.`; A_o starts at zero, where FEAT is `protonet`. One attention head, as in the authors' code,
    without its layer norm and dropout. The paper starts from a pre-trained body, and adds `contrastive` to the loss; with
    neither this is set-to-set attention over class means. Raises ValueError like `width`. {cite}`ye2020feat`
    """
    z, d = features(net), width(net)
    attention = nn.ModuleDict({k: nn.Linear(d, d, bias=False) for k in ATTENTION})
    nn.init.zeros_(attention.get_parameter("output.weight"))
    attention.to(next(net.parameters()))

    def init() -> Params:
        return {**body_of(net), **above("attention.", parameters(attention))}

    def adapt(phi: Params, support: Batch) -> Params:
        own = prototypes(z(phi, support.x), support.y)
        known, c = defined(own)  # (W,), (W, D)
        moved = set_to_set(phi, c, known)
        return {**phi, **own, "prototypes": torch.where(known[:, None], moved, torch.nan)}

    def predict(theta: Params, x: Any) -> Tensor:
        return nearness(theta, z(theta, x))

    return Learner(init, adapt, predict, net=net)


ATTENTION = ("query", "key", "value", "output")


def set_to_set(phi: Params, c: Tensor, known: Tensor) -> Tensor:
    """FEAT's function of a set: each row of it moves by what it attends to, (N, D) -> (N, D).

    C + softmax(C A_q (C A_k)ᵀ / √D) C A_v A_o, over the rows that are `known`: (N,), or (N, N), row i's own choice.
    Raises ValueError where φ has no `attention.`. {cite}`ye2020feat`
    """
    require(phi, (f"attention.{name}.weight" for name in ATTENTION))
    q, k, v, o = (phi[f"attention.{name}.weight"].mT for name in ATTENTION)
    return c + attend(c @ q, c @ k, c @ v, known) @ o


def contrastive(
    net: nn.Module, strength: float = 1.0, scale: float = 1.0
) -> Callable[[Learner, Loss], Callable[[Params, Episode], Tensor]]:
    """FEAT's objective: beside the query loss, each item is to be near its own class after attention within classes.

    L^Q(adapt(φ, S)) + λ (1/M) Σ_i ℓ(logit(i), y_i),  logit_k(i) = −s ‖z'_i − c_k‖²,  c_k the mean of class k's z'.
    The sum is over all M support and query items; z' is `set_to_set` of their features, where each attends to the items of
    its own class alone. λ = `strength` ≥ 0, s = `scale` > 0, else ValueError. It stands where a hypergradient does:
    bilevel(feat(net), loss, contrastive(net)). This is the paper's; the authors' code compares c_k with z_i, the features
    before attention. {cite}`ye2020feat`
    """
    within(0, strength=strength)
    above_zero(scale=scale)
    z = features(net)

    def hypergradient(learner: Learner, loss: Loss) -> Callable[[Params, Episode], Tensor]:
        def task(phi: Params, episode: Episode) -> Tensor:
            theta = learner.adapt(phi, episode.support)
            value = risk(loss, learner.predict(theta, episode.query.x), episode.query.y)
            zs = torch.cat([z(phi, part.x) for part in episode])  # (M, D)
            y = check_targets(zs, torch.cat([part.y for part in episode]))  # (M, W)
            own = (y @ y.mT > 0) | torch.eye(len(y), dtype=torch.bool, device=y.device)
            moved = set_to_set(phi, zs, own)
            logits = scale * nearness(prototypes(moved, y), moved)
            return value + strength * risk(loss, logits, y)

        return task

    return hypergradient


# What they share -----------------------------------------------------------------------------


def body_of(net: nn.Module) -> Params:
    """φ of a learner that does not use the head. Raises ValueError for a network without a `body`."""
    half(net, "body")
    return {k: v for k, v in parameters(net).items() if k.startswith("body.")}


def above(prefix: str, params: Params) -> Params:
    """The entries with a prefix added: `core.below` undoes it."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"expected parameters, a dict of tensors such as `parameters(net)`, got {type(params).__name__}"
        )
    return {prefix + k: v for k, v in params.items()}


def width(net: nn.Module) -> int:
    """D, as the head has it. Raises ValueError if the head is not one linear layer."""
    return linear_head(net).in_features


def linear_head(net: nn.Module, bias: bool = False) -> nn.Linear:
    """The head. Raises ValueError if it is not one linear layer, or has no bias and needs one."""
    head = half(net, "head")
    if not isinstance(head, nn.Linear) or (bias and head.bias is None):
        wanted = "one linear layer with a bias" if bias else "one linear layer"
        lacks = " without one" if isinstance(head, nn.Linear) else ""
        raise ValueError(f"expected a head of {wanted}, got {type(head).__name__}{lacks}")
    return head


def class_means(z: Tensor, y: Tensor) -> Tensor:
    """(N, D) features and one-hot (N, W) labels -> the W class means (W, D); NaN where a class has no item."""
    y = check_targets(z, y)
    n = y.sum(0)[:, None]
    return torch.where(n != 0, (y.mT @ z) / torch.where(n != 0, n, 1.0), torch.nan)


def check_targets(z: Tensor, y: Tensor, width: int | None = None) -> Tensor:
    """y in the dtype of the features z: (N, W), W = `width` if given.

    Raises ValueError unless it has a row of floating-point numbers for each of N features: class numbers would be
    broadcast, or taken for targets. It looks at shapes alone, so that it also runs under `vmap`.
    """
    if z.ndim != 2:
        raise ValueError(
            f"expected features (N, D) from the network's body, a row for each item, got {tuple(z.shape)}: flatten or pool them"
        )
    if len(z) == 0:
        raise ValueError("expected at least one item in the support set, got none")
    fits = y.ndim == 2 and len(y) == len(z) and y.is_floating_point()
    if not fits or (width is not None and y.shape[1] != width):
        wanted = f"({len(z)}, {width or 'W'})"
        raise ValueError(
            f"expected y as rows of floating-point numbers (N, W), here {wanted}, one for each item: one-hot rows of "
            f"classes, `mtlib.tasks.one_hot(y, ways)`, or real targets; got {tuple(y.shape)} of {y.dtype}"
        )
    return y.to(z.dtype)


def same_width(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless the rows of a (B, D) and b (W, D) are of one width."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"expected features of one width, got {tuple(a.shape)} and {tuple(b.shape)}: are both of one network?"
        )


def prototypes(z: Tensor, y: Tensor) -> Params:
    """What θ carries of the class means: `prototypes` (W, D), and which are defined, `support.seen` (W,), 1 or 0."""
    return {"prototypes": class_means(z, y), "support.seen": seen(y).to(z.dtype)}


def defined(theta: Params) -> tuple[Tensor, Tensor]:
    """Which classes have a mean (W,), and the means (W, D), 0 where there is none: no NaN may meet a derivative."""
    known = theta["support.seen"] != 0
    return known, torch.where(known[:, None], theta["prototypes"], 0.0)


def nearness(theta: Params, z: Tensor) -> Tensor:
    """−‖z − c_k‖² to each class mean that there is: (B, D) -> (B, W)."""
    known, c = defined(theta)
    return among(known, -squared_distances(z, c))


def seen(y: Tensor) -> Tensor:
    """Which classes have a support item: (N, W) -> (W,)."""
    return y.sum(0) != 0


def among(known: Tensor, logits: Tensor) -> Tensor:
    """The logits (B, W) of the known classes (W,), and `lowest` for the others; NaN if there is no known class."""
    none = logits.new_full((), lowest(logits.dtype))
    return torch.where(known, logits, torch.where(known.any(), none, torch.nan))


def lowest(dtype: torch.dtype) -> float:
    """The logit of what cannot be predicted: finite, so that its softmax is 0 and no derivative is NaN.

    −∞ makes torch's cross-entropy of one-hot rows 0 · ∞ = NaN. The smallest number itself overflows as soon as the
    losses of two items are added; 2⁻¹⁶ of it leaves room for the items of an episode. float16 has no such room: there
    it is the smallest.
    """
    info = torch.finfo(dtype)
    return info.min / 2**16 if info.max > 2**32 else info.min


PAIRS = (
    2**20
)  # numbers in the differences of all pairs, B·W·D, up to which `squared_distances` writes them out


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² for each pair: (B, D), (W, D) -> (B, W).

    Where all differences are more than `PAIRS` numbers, as ‖a'_i‖² + ‖b'_j‖² − 2 a'_i·b'_j with a' = a − c, b' = b − c
    and c the mean of b, in memory for B·W + (B + W) D numbers: what all items share costs no digits, and rounding is that
    of the largest ‖a'‖² and ‖b'‖². A value that rounds below 0 is 0, with its derivatives.
    """
    same_width(a, b)
    if len(a) * len(b) * a.shape[-1] <= PAIRS:
        return ((a[:, None] - b[None]) ** 2).sum(-1)
    c = b.detach().mean(0)  # distances do not depend on it
    a, b = a - c, b - c
    d = (a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * a @ b.mT
    return d + (d.clamp(min=0) - d).detach()


def unit(z: Tensor) -> Tensor:
    """z / ‖z‖, and 0 where z = 0, with derivatives of every order there (‖·‖ has none): (B, D) -> (B, D)."""
    return z * ((z * z).sum(-1, keepdim=True) + 1e-12).rsqrt()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_j) for each pair: (B, D), (W, D) -> (B, W)."""
    same_width(a, b)
    return unit(a) @ unit(b).mT


def every_pair(a: Tensor, b: Tensor) -> Tensor:
    """[a_j, b_i] for each pair: (W, D), (B, E) -> (B, W, D+E)."""
    shape = (len(b), len(a))
    return torch.cat([a.expand(*shape, -1), b[:, None].expand(*shape, -1)], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, known: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v: (B, D), (N, D), (N, E) -> (B, E), written out because torch's own has no second derivative on a CPU.

    With `known` (N,), over those rows of k and v alone.
    """
    scale: float = k.shape[-1] ** 0.5
    scores = q @ k.mT / scale
    if known is not None:
        scores = torch.where(known, scores, -torch.inf)
    return scores.softmax(-1) @ v
