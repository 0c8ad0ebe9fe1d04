"""Learners of transfer: keep the trained parameters, or continue from them on the target."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    Steps,
    apply,
    expect,
    features,
    half,
    parameters,
    risk,
)
from mtlib.learners.gradient import (
    Pull,
    Rate,
    Rule,
    at_least_zero,
    check_steps,
    descent,
    made,
    proximity,
    weights,
)
from mtlib.run.devices import random_kept
from mtlib.tasks import above_zero, check_rows


def as_is(net: nn.Module) -> Learner:
    """No adaptation: θ = φ. Under `bilevel` this is joint training, the hinge between the two objectives."""
    return Learner(lambda: parameters(net), lambda phi, support: phi, apply(net), net=net)


def finetune(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    pull: Pull | None = None,
    rule: Rule | None = None,
) -> Learner:
    """Fine-tuning: continue gradient descent on the target's support set, every parameter moving.

    θ ← θ − α ∇[ L^S(θ) + R(θ, φ, S) ] from θ₀ = φ. Inside a task this is what MAML does; the two differ in what
    trained φ, and in how far the steps go. R = `pull` is none, `l2_sp`, `delta` or `bss`; `lr` is one rate, or
    `discriminative` or `gradual`.
    """
    return descent(net, loss, lr, steps, adapted="", pull=pull, rule=rule)


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The grid of `linear_probe(net, strength=None)`; it grows by tens towards `LIMITS` while the best lies at its edge."""
LIMITS = (1e-6, 1e3)
UNCHOSEN = 1e-2  # where there are too few items to choose by


def linear_probe(
    net: nn.Module,
    loss: Loss = nn.functional.cross_entropy,
    strength: float | None = UNCHOSEN,
    iterations: int = 100,
) -> Learner:
    """Linear probe: a new linear head on frozen features, solved by L-BFGS.

    W*, b* = argmin L(z Wᵀ + b, y) + ½λ‖W‖², z = body(φ, x), λ = `strength` > 0; starts from zero, so φ's
    head is not used. The solution is a constant to the outer gradient. Runs in a loop over tasks only.

    With `strength=None` each task chooses its λ, by the loss of held-out items in cross-validation on the support set:
    k folds, k = 5 or the number of items of the rarest class if that is less, the i-th item of its class in fold i mod k
    (real targets: the i-th item); nothing is drawn. The grid is `STRENGTHS`, and goes on by tens where the best lies at
    its edge; at `LIMITS` it warns. θ["probe.strength"] says which. Below two items a class, or three real targets, λ = 0.01.
    It takes k times as long for each λ tried.
    """
    expect(made(loss), "a loss, a function such as nn.functional.cross_entropy", loss)
    check_steps(iterations, "iterations", 1)
    if strength is not None and not 0 < strength < float("inf"):
        raise ValueError(
            f"expected a finite strength > 0 (a probe on separable features has no optimum without), got {strength}"
        )
    z = features(net)

    def init() -> Params:
        return {k: v for k, v in parameters(net).items() if k.startswith("body.")}

    def solve(zs: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        w = zs.new_zeros(y.shape[1], zs.shape[1]).requires_grad_()
        b = zs.new_zeros(y.shape[1]).requires_grad_()
        solver = torch.optim.LBFGS(
            [w, b],
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=min(
                1e-12, 4 * torch.finfo(zs.dtype).eps
            ),  # √(2 · it / λ) is W's error
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            value = risk(loss, zs @ w.mT + b, y) + 0.5 * strength * (w * w).sum()
            value.backward()
            return value

        with torch.enable_grad():
            solver.step(closure)
        return w.detach(), b.detach()

    def choose(zs: Tensor, y: Tensor) -> float:
        fold = folds(y)
        if fold is None:
            return UNCHOSEN

        def held_out(strength: float) -> float:
            total = 0.0
            for k in fold.unique():
                w, b = solve(zs[fold != k], y[fold != k], strength)
                part = zs[fold == k] @ w.mT + b
                total += risk(loss, part, y[fold == k]).item() * len(part)
            return total / len(y)

        return lowest(held_out)

    def adapt(phi: Params, support: Batch) -> Params:
        y = support.y
        expect(y.ndim == 2, "targets y (N, W): `mtlib.tasks.one_hot(y, ways)`, or real ones", y)
        with torch.inference_mode(False), torch.no_grad():
            zs, y = (v.clone() if v.is_inference() else v for v in (z(phi, support.x), y))
            chosen = choose(zs, y) if strength is None else strength
            w, b = solve(zs, y, chosen)
        theta = {**phi, "probe.weight": w, "probe.bias": b}
        return theta if strength else {**theta, "probe.strength": w.new_tensor(chosen)}

    def predict(theta: Params, x: Tensor) -> Tensor:
        return z(theta, x) @ theta["probe.weight"].mT + theta["probe.bias"]

    return Learner(init, adapt, predict, vmap=False, net=net)


def folds(y: Tensor) -> Tensor | None:
    """The fold of each item (N,) in a cross-validation, the same share of every class in each; None where there are too few."""
    expect(
        isinstance(y, Tensor) and y.ndim == 2,
        "targets y (N, W): `mtlib.tasks.one_hot(y, ways)`, or real ones",
        y,
    )
    onehot = bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
    if not onehot:
        return torch.arange(len(y), device=y.device) % min(5, len(y)) if len(y) > 2 else None
    counts = y.sum(0)
    k = min(5, int(counts[counts > 0].min()))
    number = ((y.cumsum(0) - 1) * y).sum(1).long()  # 0, 1, … within its class
    return number % k if k > 1 else None


def lowest(loss: Callable[[float], float]) -> float:
    """The strength with the lowest loss, of `STRENGTHS` and as far beyond as it falls; the largest of equal ones.

    Warns where it still falls at one of `LIMITS`. Raises ValueError where a loss is no number.
    """
    expect(made(loss), "a loss, a function of the strength", loss)
    tried = {s: loss(s) for s in STRENGTHS}
    while True:
        odd = {s: v for s, v in tried.items() if v != v}
        expect(not odd, "a held-out loss that is a number at each strength", odd)
        best = max(tried, key=lambda s: (-tried[s], s))
        if min(tried) < best < max(tried):
            return best
        beyond = float(f"{best * (10 if best == max(tried) else 0.1):.0e}")
        if not LIMITS[0] <= beyond <= LIMITS[1]:
            warnings.warn(
                f"the loss of held-out items still falls at the strength {best:g}, the last that is tried: "
                f"{'the features determine y' if best < 1 else 'they tell nothing about y'}; "
                "strength=... fixes one.",
                stacklevel=4,
            )
            return best
        tried[beyond] = loss(beyond)


def lp_ft(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    strength: float | None = UNCHOSEN,
    pull: Pull | None = None,
) -> Learner:
    """Linear probing, then fine-tuning: the new head is solved first, so that it does not distort the pretrained features.

    θ₀ = (φ_body, W*, b*) with the solution of `linear_probe`, a constant to the outer gradient; then `finetune`. With
    `strength=None` each task chooses the probe's, as there. Runs in a loop over tasks only.
    Raises ValueError if the head is not one linear layer. {cite}`kumar2022finetuning`
    """
    probe, tune = linear_probe(net, loss, strength), finetune(net, loss, lr, steps, pull)
    check_linear_head(net)

    def given(phi: Params, support: Batch) -> Params:
        solved = probe.adapt(phi, support)
        return {**phi, "head.weight": solved["probe.weight"], "head.bias": solved["probe.bias"]}

    return Learner(probe.init, from_there(tune.adapt, given), tune.predict, vmap=False, net=net)


def logistic_head(
    z: Tensor, y: Tensor, c: float = 1.0, weight: Tensor | None = None, tol: float = 1e-4
) -> Params:
    """Logistic regression on features, as a head: {"head.weight" (W, D), "head.bias" (W,)} of z's dtype and device.

    argmin C Σ_i w_i ℓ(z_i, y_i) + ½‖w‖², by scikit-learn in float64; the bias is free. z (N, D), y (N,) class numbers from 0,
    each there, w_i = `weight`, 1 unless given; `tol` is the solver's. Of two classes w is the difference of the two rows, which are ± w/2: so the
    logits are those of a network with two outputs. Raises ValueError for c ≤ 0, classes that are absent, or rows that do not
    fit.
    """
    from sklearn.linear_model import LogisticRegression  # here alone, as it takes a second

    above_zero(c=c, tol=tol)
    check_rows(Batch(z, y), "the features")
    expect(z.ndim == 2 and y.ndim == 1, "features z (N, D) and class numbers y (N,)", z)
    classes = y.unique().tolist()
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise ValueError(f"expected classes 0, 1, … each with a row, got {classes}")
    own = None if weight is None else weight.cpu().double().numpy()
    model = LogisticRegression(C=c, tol=tol, max_iter=5000)
    model.fit(z.detach().cpu().double().numpy(), y.cpu().numpy(), own)
    w, b = (torch.from_numpy(v).to(z) for v in (model.coef_, model.intercept_))
    if len(classes) == 2:
        w, b = torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2
    return {"head.weight": w, "head.bias": b}


def check_linear_head(net: nn.Module) -> None:
    """Raise ValueError unless the network's head is one linear layer with a bias."""
    heads = {k for k in parameters(net) if k.startswith("head.")}
    if heads != {"head.weight", "head.bias"} or not isinstance(half(net, "head"), nn.Linear):
        raise ValueError(
            f"expected a head of one linear layer with a bias, got {sorted(heads)} in a {type(half(net, 'head')).__name__}"
        )


def fresh_head(learner: Learner, net: nn.Module, seed: int | None = None) -> Learner:
    """Head re-initialisation: adapt from φ's body and another head, zeros or, with a `seed`, drawn as the net draws.

    The source's class numbers mean nothing on the target. With zeros the body does not move in the first step:
    ∂L/∂z = Wᵀ ∂L/∂ŷ = 0.
    """
    expect(isinstance(learner, Learner), "a learner, such as finetune(net, ...)", learner)
    head = {k: torch.zeros_like(v) for k, v in parameters(net).items() if k.startswith("head.")}
    expect(bool(head), "a network with parameters named head.*", list(weights(net)))
    if seed is not None:
        other = deepcopy(half(net, "head"))
        with random_kept():
            torch.manual_seed(seed)
            other.apply(_redraw)
        head = {f"head.{k}": v for k, v in parameters(other).items()}

    def init() -> Params:
        return {k: v for k, v in learner.init().items() if k not in head}

    def given(phi: Params, support: Batch) -> Params:
        return {**phi, **{k: v.to(next(iter(phi.values()), v)) for k, v in head.items()}}

    return learner._replace(init=init, adapt=from_there(learner.adapt, given))


def from_there(
    adapt: Callable[[Params, Batch], Params] | Steps, given: Callable[[Params, Batch], Params]
) -> Callable[[Params, Batch], Params] | Steps:
    """`adapt` from given(φ, S) instead of φ; an `adapt` with inner steps keeps them."""
    if not isinstance(adapt, Steps):
        return lambda phi, support: adapt(given(phi, support), support)
    then = adapt.given
    return adapt._replace(given=lambda phi, support: then(given(phi, support), support))


def _redraw(module: nn.Module) -> None:
    getattr(module, "reset_parameters", lambda: None)()


# What holds θ back ---------------------------------------------------------------------------


def l2_sp(strength: float, head: float = 1e-2) -> Pull:
    """L2-SP: ½λ‖θ_body − φ_body‖² + ½β‖θ_head‖², λ = `strength`, β = `head`: the head has nothing to stay near.

    Raises ValueError if a strength is negative, or θ has no entry named body.*. {cite}`li2018l2sp`
    """
    at_least_zero(strength=strength, head=head)

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        body = {k: v for k, v in theta.items() if k.startswith("body.")}
        if not body:
            raise ValueError(
                f"l2_sp expects entries named body.*, which it holds near φ's; got {list(theta)[:5]}. "
                "`mtlib.nets.two_halves(body, head)` names them so."
            )
        norm = sum((v**2).sum() for k, v in theta.items() if k.startswith("head."))
        return strength * proximity(body, anchor) + 0.5 * head * norm

    return pull


def delta(net: nn.Module, strength: float) -> Pull:
    """Features, not parameters, stay: ½λ (1/N) Σ_i ‖z_θ(x_i) − z_φ(x_i)‖², z the body's output.

    DELTA {cite}`li2019delta` without its per-channel weights, which it learns on the target first. Raises ValueError
    if λ = `strength` < 0.
    """
    at_least_zero(strength=strength)
    z = features(net)

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        gap = z(theta, x) - z(anchor, x)
        return 0.5 * strength * (gap**2).sum() / len(gap)

    return pull


def bss(net: nn.Module, strength: float, smallest: int = 1) -> Pull:
    """Batch spectral shrinkage: λ Σ_{i ≤ k} σ₋ᵢ², the k = `smallest` singular values of the features z (N, D).

    Directions that the support set barely uses carry nothing to the target; they are shrunk away. Differentiated as in
    `spectral_sum`. Raises ValueError unless 1 ≤ k ≤ min(N, D), or if λ = `strength` < 0. {cite}`chen2019bss`
    """
    at_least_zero(strength=strength)
    expect(isinstance(smallest, int), "smallest, a whole number", smallest)
    z = features(net)

    def pull(theta: Params, anchor: Params, x: Tensor) -> Tensor:
        return strength * spectral_sum(z(theta, x), smallest)

    return pull


def spectral_sum(z: Tensor, k: int, largest: bool = False) -> Tensor:
    """The sum of the k smallest, or `largest`, squared singular values of z: (..., N, D) -> (...).

    They are eigenvalues λ_i of G = zzᵀ, or zᵀz if that is smaller, with vectors u_i. With S the k chosen,
    Σ_{i∈S} λ_i(G + E) = Σ_{i∈S} (λ_i + u_iᵀEu_i) + Σ_{i∈S, j∉S} (u_iᵀEu_j)² / (λ_i − λ_j) + O(E³):
    this is what is differentiated, at E = 0. So the derivatives of first and second order are exact, and those of
    higher order are not. Terms with λ_i = λ_j up to rounding are left out (equal items, units that are always zero):
    there the sum has one slope in each direction, but no second derivative. NaN where z is not finite. Raises
    ValueError unless 1 ≤ k ≤ min(N, D).
    """
    n, d = z.shape[-2:]
    if not isinstance(k, int) or not 1 <= k <= min(n, d):
        raise ValueError(
            f"expected a whole number, from 1 to {min(n, d)} singular values of features ({n}, {d}), got {k}"
        )
    gram = z @ z.mT if n <= d else z.mT @ z
    held = gram.detach()
    known = held.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    squares, u = torch.linalg.eigh(torch.where(known, held, 0.0))  # in ascending order
    place = torch.arange(min(n, d), device=z.device)
    chosen = place >= len(place) - k if largest else place < k
    gap = squares[..., :, None] - squares[..., None, :]
    rounding = len(place) * torch.finfo(z.dtype).eps * squares[..., -1:, None]
    apart = chosen[:, None] & ~chosen & (gap.abs() > rounding)
    e = u.mT @ (gram - held) @ u  # 0, for its derivatives
    first = squares + e.diagonal(dim1=-2, dim2=-1)
    second = torch.where(apart, e**2 / torch.where(apart, gap, 1.0), 0.0)
    total: Tensor = (first * chosen).sum(-1) + second.sum((-2, -1))
    return total


# How fast which layer goes -------------------------------------------------------------------


Groups = Sequence[str | Sequence[str]]
"""A network's parts from the first to the head: for each the beginning of its parameters' names, or several."""

LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward pass: their members are layers


def layers(net: nn.Module, groups: Groups | None = None) -> list[list[str]]:
    """The parameters' names, layer by layer from the first to the head.

    With `groups` a layer has the names under one of its prefixes: ("body.stem", ("body.a", "body.b"), "head"). By
    default each child of the body is a layer, and the head is the last:

    - a body with one child that owns parameters stands for that child, down to where there are several;
    - an `nn.ModuleList` or `nn.ModuleDict`, or a child with such a list and norms, stands for the members;
    - a child that owns vectors only, as a norm does, belongs to the child before it;
    - an entry in none of these belongs to the first layer; what is outside of body and head, to the head.

    So a residual network has a layer for each stage, and blocks inside one `nn.Sequential` are one layer: name groups
    to part them. Without `body` and `head` the network's own children are the layers. Raises ValueError if a prefix
    fits no name, or a name is in no group or in two.
    """
    params = weights(net)
    named = _children(net, params) if groups is None else groups
    parts = [(g,) if isinstance(g, str) else tuple(g) for g in named]
    for prefix in (p for part in parts for p in part):
        if not any(_under(k, prefix) for k in params):
            raise ValueError(
                f"expected groups of this network's parameters; none is under {prefix!r}. It has "
                f"{sorted({'.'.join(k.split('.')[:2]) for k in params})}"
            )
    found = [[k for k in params if any(_under(k, p) for p in part)] for part in parts]
    times = Counter(k for names in found for k in names)
    for problem, wrong in {
        "in no group": [k for k in params if not times[k]],
        "in two groups or more": [k for k in params if times[k] > 1],
    }.items():
        if wrong:
            raise ValueError(f"expected each parameter in one group; {problem}: {wrong[:5]}")
    return found


def discriminative(
    net: nn.Module, lr: float, factor: float = 2.6, groups: Groups | None = None
) -> Params:
    """A rate for each layer: the head's is `lr`, and each layer before it has a rate `factor` times smaller: η_{l−1} = η_l / factor.

    What counts as a layer, and `groups`: as in `layers`. Warns where the first layer's rate is below 10⁻⁸ η, and so
    stands still. Raises ValueError if `lr` < 0 or `factor` ≤ 0, and like `layers`. {cite}`howard2018ulmfit`
    """
    at_least_zero(lr=lr)
    if not 0 < factor < float("inf"):
        raise ValueError(f"expected a finite factor > 0, got {factor}")
    order = list(reversed(layers(net, groups)))
    if factor ** (len(order) - 1) > 1e8:
        warnings.warn(
            f"with {len(order)} layers and a factor of {factor} the first has the rate {lr / factor ** (len(order) - 1):.0e}: "
            "it stands still. Name fewer groups, or give a smaller factor.",
            stacklevel=2,
        )
    rates: Params = {}
    for depth, names in enumerate(order):
        rates |= {k: torch.tensor(lr / factor**depth) for k in names}
    return rates


def gradual(
    net: nn.Module, lr: float, every: int, groups: Groups | None = None
) -> Callable[[int], Params]:
    """Gradual unfreezing: the head moves first, and one more layer, from the top, after each `every` steps.

    A rate for `finetune` that follows the step. What counts as a layer, and `groups`: as in `layers`. Raises ValueError
    if `lr` < 0 or `every` < 1, and like `layers`. {cite}`howard2018ulmfit`
    """
    at_least_zero(lr=lr)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"expected every ≥ 1, a whole number, got {every}")
    order = list(reversed(layers(net, groups)))

    def rate(step: int) -> Params:
        open_ = 1 + step // every
        return {
            k: torch.tensor(lr if depth < open_ else 0.0)
            for depth, names in enumerate(order)
            for k in names
        }

    return rate


def _under(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")


def _children(net: nn.Module, params: Params) -> list[list[str]]:
    """The groups that `layers` takes by default."""

    def vector(prefix: str) -> bool:
        return all(v.ndim < 2 for k, v in params.items() if _under(k, prefix))

    top = "body" if isinstance(getattr(net, "body", None), nn.Module) else ""
    found = _parts(top, net.get_submodule(top), params)
    while len(found) == 1 and (inside := _parts(*found[0], params)):
        found = inside
    groups: list[list[str]] = []
    for prefix, _ in found:
        if groups and (vector(prefix) or all(map(vector, groups[-1]))):
            groups[-1].append(prefix)
        else:
            groups.append([prefix])
    ours = [k for k in params if not top or _under(k, top)]
    own = [k for k in ours if not any(_under(k, p) for group in groups for p in group)]
    groups = [
        [*own, *(groups[0] if groups else [])],
        *groups[1:],
        [k for k in params if k not in ours],
    ]
    return [group for group in groups if group]


def _parts(path: str, module: nn.Module, params: Params) -> list[tuple[str, nn.Module]]:
    """The children that own parameters, with their names, and in place of a list its members."""
    found = []
    for name, child in module.named_children():
        at = f"{path}.{name}".lstrip(".")
        wide = [m for m in child.children() if any(p.ndim > 1 for p in m.parameters())]
        if isinstance(child, LISTS) or (len(wide) == 1 and isinstance(wide[0], LISTS)):
            found += _parts(at, child, params)
        elif any(_under(k, at) for k in params):
            found.append((at, child))
    return found
