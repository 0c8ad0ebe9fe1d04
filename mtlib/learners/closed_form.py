"""Learners whose inner problem has a closed-form solution, or optimality conditions that can be differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Episode, Learner, Params, apply, features, parameters, require
from mtlib.learners.gradient import at_least_zero, check_steps
from mtlib.learners.metric import body_of, check_targets, linear_head, width
from mtlib.run.devices import double
from mtlib.tasks import above_zero, check_draw, positive, within


def ridge(net: nn.Module, strength: float = 1.0) -> Learner:
    """Ridge regression of the targets on the features, pulled towards φ's own head.

    V = argmin ‖Z V − Y‖² + λ ‖V − V_φ‖², Z = [z(φ, x), 1] (N, D+1), V = [Wᵀ; b] (D+1, W): in closed form
    V = V_φ + Zᵀ (Z Zᵀ + λI)⁻¹ (Y − Z V_φ). λ = exp(φ["ridge.log_strength"]) is learned along with the body and
    the head; it starts at `strength`. `r2d2` has V_φ = 0, and scales its answers. {cite}`bertinetto2019meta`
    Raises ValueError if `strength` ≤ 0, or the head is not one linear layer with a bias.
    """
    _check(net, strength=strength)
    names = ("head.weight", "head.bias", "ridge.log_strength")
    z, f = features(net), apply(net)

    def init() -> Params:
        phi = parameters(net)
        return {**phi, names[2]: phi[names[0]].new_tensor(strength).log()}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, names)
        zs, prior = with_one(z(phi, support.x)), head_matrix(phi)  # (N, D+1), (D+1, W)
        y = check_targets(zs, support.y, prior.shape[1])
        v = prior + ridge_solution(zs, y - zs @ prior, phi[names[2]].exp())
        return {**phi, "head.weight": v[:-1].mT, "head.bias": v[-1]}

    return Learner(init, adapt, f, net=net, settings=names[2:])


def r2d2(net: nn.Module, strength: float = 1.0, scale: float = 1.0) -> Learner:
    """R2-D2: ridge regression of one-hot labels on the features; its answers, scaled and shifted, are logits.

    V = argmin ‖Z V − Y‖² + λ ‖V‖² = Zᵀ (Z Zᵀ + λI)⁻¹ Y, Z = [z(φ, x), 1] (N, D+1), Y one-hot (N, W);
    logits(x) = α Vᵀ[z(φ, x), 1] + β. λ = exp(φ["r2d2.log_strength"]), α = exp(φ["r2d2.log_scale"]) and the number
    β = φ["r2d2.shift"] are learned with the body; they start at `strength`, `scale` and 0. A softmax does not see β,
    which is the same for all classes. The network's head is not used. θ carries V as `r2d2.head` (D+1, W).
    Raises ValueError if `strength` or `scale` ≤ 0. {cite}`bertinetto2019meta`
    """
    above_zero(strength=strength, scale=scale)
    names = ("r2d2.log_strength", "r2d2.log_scale", "r2d2.shift")
    z = features(net)

    def init() -> Params:
        body = body_of(net)
        first = next(net.parameters()).new_tensor([strength, scale, 1.0]).log()
        return {**body, **{k: v.clone() for k, v in zip(names, first, strict=True)}}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, names)
        zs = with_one(z(phi, support.x))
        return {**phi, "r2d2.head": ridge_solution(zs, support.y, phi[names[0]].exp())}

    def predict(theta: Params, x: Any) -> Tensor:
        alpha, beta = theta[names[1]].exp(), theta[names[2]]
        return alpha * with_one(z(theta, x)) @ theta["r2d2.head"] + beta

    return Learner(init, adapt, predict, net=net)


def bayesian(net: nn.Module, strength: float = 1.0, noise: float = 1.0) -> Learner:
    """Bayesian linear regression of the targets on the features: `ridge`, with its uncertainty.

    y = Vᵀz + ε, ε ~ N(0, σ²I), each column of V ~ N(its column of V_φ, σ²/λ I), z = [z(φ, x), 1] (D+1,). With
    A = ZᵀZ + λI:  V̂ = V_φ + A⁻¹Zᵀ(Y − Z V_φ), the mean;  y | x, S ~ N( V̂ᵀz, σ²(1 + zᵀA⁻¹z) I ).
    Predicts means and standard deviations side by side, (B, 2W): for a loss with two columns per target, such as
    `mtlib.learners.amortised.gaussian_nll`. λ = exp(φ["bayes.log_strength"]) and σ = exp(φ["bayes.log_noise"]) are
    learned too; θ carries A⁻¹ as `bayes.covariance`. `alpaca` has a matrix in the place of λI. Raises ValueError like
    `ridge`. {cite}`harrison2018alpaca`
    """
    _check(net, strength=strength, noise=noise)

    def precision(own: Tensor, like: Tensor) -> Tensor:
        return own.exp() * torch.eye(like.shape[1]).to(like)

    def first(like: Tensor) -> Tensor:
        return like.new_tensor(strength).log()

    return _posterior(net, "bayes.log_strength", first, noise, precision)


def alpaca(net: nn.Module, strength: float = 1.0, noise: float = 1.0) -> Learner:
    """ALPaCA: Bayesian linear regression whose prior on the head is learned whole, its mean and its precision matrix.

    Each column of V ~ N(its column of V_φ, σ² Λ₀⁻¹), Λ₀ = L Lᵀ; the rest as in `bayesian`, with A = ZᵀZ + Λ₀.
    L = φ["alpaca.factor"] (D+1, D+1) starts at √λ I, λ = `strength`, and then it is `bayesian`. σ =
    exp(φ["alpaca.log_noise"]) is learned here; the paper knows it, and its features have no constant one. θ carries A⁻¹ as
    `alpaca.covariance`. Raises ValueError like `ridge`. {cite}`harrison2018alpaca`
    """
    _check(net, strength=strength, noise=noise)

    def precision(own: Tensor, like: Tensor) -> Tensor:
        return own @ own.mT

    def first(like: Tensor) -> Tensor:
        return torch.eye(width(net) + 1).to(like) * math.sqrt(strength)

    return _posterior(net, "alpaca.factor", first, noise, precision)


def _posterior(
    net: nn.Module,
    prior: str,
    first: Callable[[Tensor], Tensor],
    noise: float,
    precision: Callable[[Tensor, Tensor], Tensor],
) -> Learner:
    """Bayesian linear regression with Λ₀ = precision(φ[prior], Z), φ[prior] = first(φ's head's weight) at first."""
    prefix = prior.split(".")[0]
    names = ("head.weight", "head.bias", prior, f"{prefix}.log_noise")
    z, f = features(net), apply(net)

    def init() -> Params:
        phi = parameters(net)
        like = phi[names[0]]
        return {**phi, prior: first(like), names[3]: like.new_tensor(noise).log()}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, names)
        zs, mean = with_one(z(phi, support.x)), head_matrix(phi)  # (N, D+1), (D+1, W)
        y = check_targets(zs, support.y, mean.shape[1])
        inverse = torch.linalg.inv(zs.mT @ zs + precision(phi[prior], zs))
        v = mean + inverse @ zs.mT @ (y - zs @ mean)
        head = {"head.weight": v[:-1].mT, "head.bias": v[-1]}
        return {**phi, **head, f"{prefix}.covariance": inverse}

    def predict(theta: Params, x: Any) -> Tensor:
        mean, zq = f(theta, x), with_one(z(theta, x))
        variance = 1 + ((zq @ theta[f"{prefix}.covariance"]) * zq).sum(1, keepdim=True)  # (B, 1)
        scale = theta[names[3]].exp() * variance.sqrt()
        return torch.cat([mean, scale.expand_as(mean)], 1)  # (B, 2W)

    return Learner(init, adapt, predict, net=net)


def metaoptnet(net: nn.Module, strength: float = 0.1, scale: float = 1.0) -> Learner:
    """MetaOptNet: a multi-class support vector machine on the features, solved for each task. The head is not used.

    w = argmin ½ Σ_k ‖w_k‖² + C Σ_n max_k ( w_kᵀz_n + 1[k ≠ y_n] − w_{y_n}ᵀz_n ),  z = z(φ, x), C = `strength`;
    logit_k(x) = s w_kᵀz(φ, x), s = exp(φ["svm.log_scale"]) learned, starting at `scale`. No bias, as in the paper. θ
    carries w as `svm.weight` (W, D). Solved and differentiated by `crammer_singer`.
    Raises ValueError if `strength` or `scale` ≤ 0. {cite}`lee2019metaoptnet,crammer2001algorithmic`
    """
    above_zero(strength=strength, scale=scale)
    z = features(net)

    def init() -> Params:
        return {**body_of(net), "svm.log_scale": next(net.parameters()).new_tensor(scale).log()}

    def adapt(phi: Params, support: Batch) -> Params:
        require(phi, ("svm.log_scale",))
        zs = z(phi, support.x)
        alpha = crammer_singer(zs @ zs.mT, support.y, strength)  # (N, W)
        return {**phi, "svm.weight": alpha.mT @ zs}

    def predict(theta: Params, x: Any) -> Tensor:
        return theta["svm.log_scale"].exp() * z(theta, x) @ theta["svm.weight"].mT

    return Learner(init, adapt, predict, net=net)


def anil_at_once(net: nn.Module, lr: float, steps: int) -> Learner:
    """ANIL under squared error, all its steps at once: no path, products of matrices as large as the support set.

    On features Z = [z(φ, x), 1] (N, D+1) a step on the head is V ← V − ρ Zᵀ(Z V − Y), ρ = 2α/(N W), α = `lr`, so K steps
    from φ's head give V = V_φ + Zᵀ S_K (Y − Z V_φ), S_K = ρ Σ_{j<K} (I − ρ Z Zᵀ)^j: as a ridge head's, with S_K in the
    place of (Z Zᵀ + λI)⁻¹. S_K takes about 2 log₂ K products. For the loss `mse_loss`, of which it is
    `mtlib.learners.gradient.anil` up to rounding. Raises ValueError as that does, and like `ridge`.
    {cite}`raghu2020rapid`
    """
    at_least_zero(rate=lr)
    check_steps(steps)
    _check(net)
    z, f = features(net), apply(net)

    def adapt(phi: Params, support: Batch) -> Params:
        zs, v = with_one(z(phi, support.x)), head_matrix(phi)
        y = check_targets(zs, support.y, v.shape[1])
        one, rho = torch.eye(len(zs)).to(zs), 2 * lr / y.numel()
        step = one - rho * zs @ zs.mT
        power, total = one, 0 * one  # of k steps; k grows by the binary digits of K
        for digit in f"{steps:b}":
            total, power = total + power @ total, power @ power
            if int(digit):
                total, power = rho * one + step @ total, step @ power
        v = v + zs.mT @ total @ (y - zs @ v)
        return {**phi, "head.weight": v[:-1].mT, "head.bias": v[-1]}

    return Learner(partial(parameters, net), adapt, f, net=net)


# Their solvers -------------------------------------------------------------------------------

solve: Callable[[Tensor, Tensor], Tensor] = torch.linalg.solve  # torch gives it no type


def ridge_solution(z: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """argmin_V ‖Z V − Y‖² + λ‖V‖²: (N, D), (N, W) -> (D, W), by the smaller of the two systems."""
    y = check_targets(z, y)
    n, d = z.shape
    if n <= d:
        return z.mT @ solve(z @ z.mT + strength * torch.eye(n).to(z), y)
    return solve(z.mT @ z + strength * torch.eye(d).to(z), z.mT @ y)


def ridge_toward(x: Tensor, y: Tensor, head: Tensor, widths: Tensor, strength: float) -> Tensor:
    """Ridge regression that starts at a known head, with a width for each column of x: w = h + D v.

    v = argmin_v ‖Y − X (h + D v)‖² + λ‖v‖²,  D = diag(`widths`), h = `head` and λ = `strength`. So w = argmin ‖Y − X w‖² +
    λ‖D⁻¹(w − h)‖²: a Gaussian prior of mean h, and of standard deviations proportional to the widths; where a width is 0,
    w stays at h. x: (N, D), y: (N, W), head: (D, W), widths: (D,) -> w (D, W). Raises ValueError for other shapes, or
    λ ≤ 0.
    """
    above_zero(strength=strength)
    if x.ndim != 2 or head.ndim != 2 or len(head) != x.shape[1] or widths.shape != x.shape[1:]:
        raise ValueError(
            "expected x (N, D), a head (D, W) and widths (D,), got "
            f"{tuple(x.shape)}, {tuple(head.shape)} and {tuple(widths.shape)}"
        )
    y = check_targets(x, y, head.shape[1])
    v = ridge_solution(x * widths, y - x @ head, x.new_tensor(strength))
    return head + widths[:, None] * v


def ridge_on(b: Tensor, data: Batch, strength: float) -> Tensor:
    """Each task's ridge regression on the features Bᵀx, as weights of x: B argmin_a ‖y − X B a‖² + λ‖a‖².

    b: (D, k), x: (T, n, D), y: (T, n, 1) -> (T, D, 1). With B = I it is a linear model that starts at 0.
    """
    within(0, strength=strength)
    if b.ndim != 2 or data.x.ndim != 3 or len(b) != data.x.shape[2]:
        raise ValueError(
            f"expected b (D, k) and x (T, n, D), got {tuple(b.shape)} and {tuple(data.x.shape)}"
        )
    lam = data.x.new_tensor(strength)
    return b @ torch.vmap(lambda z, y: ridge_solution(z, y, lam))(data.x @ b, data.y)


def ridge_prior(episode: Episode, strength: float) -> Tensor:
    """The prior that serves all tasks best after a ridge regression from it: (D, W), exactly.

    argmin_φ Σ_t ‖y_Q − X_Q A_λ(φ; S_t)‖²,  A_λ(φ; S) = argmin_w (1/|S|) ‖y_S − X_S w‖² + λ ‖w − φ‖². A_λ is linear in φ, so
    this is least squares: `bilevel`'s optimum for that learner. With the support set as query set it trains without a
    split. x: (T, rows, D), y: (T, rows, W). {cite}`bai2021how`
    """
    above_zero(strength=strength)
    left, moved = ridge_residual(episode, strength)
    phi: Tensor = torch.linalg.lstsq(moved.flatten(0, 1), left.flatten(0, 1)).solution
    return phi


def ridge_residual(episode: Episode, strength: float) -> tuple[Tensor, Tensor]:
    """c (T, Q, W) and M (T, Q, D) with y_Q − X_Q A_λ(φ; S_t) = c − M φ, A_λ as in `ridge_prior`."""
    above_zero(strength=strength)
    check_draw(episode)
    (xs, ys), (xq, yq) = episode
    lam = xs.new_tensor(strength * xs.shape[1])
    solve = torch.vmap(lambda x, y: ridge_solution(x, y, lam))
    return yq - xq @ solve(xs, ys), xq - xq @ solve(xs, xs)


def shared_features(data: Batch, k: int, rounds: int = 10) -> Tensor:
    """k linear features that serve all tasks: argmin over B of Σ_t min_a ‖y_t − X_t B a‖², B orthonormal (D, k).

    For fixed B it is least squares in the heads a_t, and the other way round: solved in turn, `rounds` times, from the
    largest eigenvectors of Σ y² x xᵀ. x: (T, n, D), y: (T, n, 1). Multi-task learning of a linear body, with n ≥ k.
    {cite}`tripuraneni2021provable`
    """
    positive(k=k, rounds=rounds)
    check_draw(data)
    rows, y = data.x.flatten(0, 1), data.y.flatten(0, 1)
    if y.shape[1] != 1 or k > rows.shape[1]:
        raise ValueError(
            f"expected y (T, n, 1) and k of at most {rows.shape[1]} features, got {tuple(data.y.shape)} and k={k}"
        )
    b: Tensor = torch.linalg.eigh((y * rows).mT @ (y * rows))[1][:, -k:]
    for _ in range(rounds):
        a = torch.linalg.lstsq(data.x @ b, data.y).solution  # (T, k, 1)
        z = (data.x[..., None] * a.mT[:, None]).flatten(2).flatten(0, 1)  # (T·n, D·k)
        b = torch.linalg.qr(solve(z.mT @ z, z.mT @ y).view(-1, k))[0]
    return b


def crammer_singer(gram: Tensor, y: Tensor, strength: float, steps: int = 40) -> Tensor:
    """The dual of the multi-class support vector machine: K = ZZᵀ (N, N), one-hot y (N, W) -> α (N, W), w = αᵀZ.

    α = argmin ½ tr(αᵀKα) − Σ y∘α  with  Σ_k α_nk = 0, α ≤ C y.  In β = C y − α:  β ≥ 0 with rows of sum C, and at the
    optimum s = y − Kα − ν1ᵀ ≥ 0 and β∘s = 0 for some ν (N,). `vanishing` finds, without a graph, which β are 0; with
    those fixed, the others solve one linear system, and its derivative is the optimum's {cite}`amos2017optnet`.
    K gets a ridge of about the dtype's rounding, to the power ⅔, so that the solution is unique even with equal items.
    NaN where a row of y does not sum to 1. Raises ValueError unless C = `strength` > 0 and y is (N, W).
    """
    above_zero(strength=strength)
    positive(steps=steps)
    y = check_targets(gram, y)
    y = torch.where((y.sum(1, keepdim=True) - 1).abs() < 1e-3, y, torch.nan)
    eps = torch.finfo(gram.dtype).eps
    k = gram + eps ** (2 / 3) * (gram.diagonal().mean() + eps) * torch.eye(len(gram)).to(gram)
    free = 1 - vanishing(double(k.detach()), double(y), strength, steps).to(k)
    return strength * y - saddle(k, free, strength * k @ y - y, strength)


def vanishing(k: Tensor, y: Tensor, strength: float, steps: int) -> Tensor:
    """Which β are 0 at the optimum (N, W): Newton steps on β∘s = τ as τ falls, a primal-dual interior point."""
    beta = torch.full_like(y, strength / y.shape[1])
    s = y - k @ (strength * y - beta)
    s = s - s.amin(1, keepdim=True) + 1
    for _ in range(steps):
        tau = 0.1 * (beta * s).mean()
        # (K + s/β) dβ − dν1ᵀ = τ/β − s and Σ_k dβ_nk = C − Σ_k β_nk: one class at a time, but for dν
        inverse = torch.linalg.inv(k + torch.diag_embed((s / beta).mT))  # (W, N, N)
        alone = (inverse @ (tau / beta - s).mT[..., None])[..., 0]  # (W, N)
        d_nu = solve(inverse.sum(0), strength - beta.sum(1) - alone.sum(0))
        d_beta = (alone + inverse @ d_nu).mT
        go = torch.stack([d_beta, (tau - s * (beta + d_beta)) / beta])  # of β and s, (2, N, W)
        room = torch.where(go < 0, -torch.stack([beta, s]) / go, torch.inf).amin()
        beta, s = torch.stack([beta, s]) + (0.99 * room).clamp(max=1) * go
    return beta < s


def saddle(k: Tensor, free: Tensor, target: Tensor, total: float) -> Tensor:
    """β (N, W): 0 where `free` is 0, elsewhere Kβ − ν1ᵀ = target, with rows of sum `total`, in one system of NW + N."""
    n, w = free.shape
    f, one = free.reshape(-1, 1), torch.eye(n).to(k)
    a = torch.kron(k, torch.eye(w).to(k)) * (f * f.mT) + torch.diag(1 - f[:, 0])
    rows = f * one.repeat_interleave(w, 0)  # (NW, N)
    system = torch.cat([torch.cat([a, -rows], 1), torch.cat([rows.mT, 0 * one], 1)])
    right = torch.cat([(free * target).flatten(), k.new_full((n,), total)])
    return solve(system, right)[: n * w].reshape(n, w)


def heads_prior(heads: Tensor, noise: float, jitter: float = 1e-6) -> Params:
    """The prior that known heads speak for, in `alpaca`'s entries: their mean, and their covariance as σ² Λ₀⁻¹.

    heads: (D+1, T), a column for each known task, as `head_matrix` gives them for a network with T outputs. Λ₀ = L Lᵀ =
    σ² (cov(heads) + `jitter` I)⁻¹, σ = `noise`. Empirical Bayes on pre-trained features: {"head.weight", "head.bias",
    "alpaca.factor", "alpaca.log_noise"}, for one output. Raises ValueError unless T ≥ 2, and both numbers are above 0.
    """
    above_zero(noise=noise, jitter=jitter)
    if heads.ndim != 2 or heads.shape[1] < 2:
        raise ValueError(
            f"expected heads (D+1, T) of at least two known tasks, got {tuple(heads.shape)}"
        )
    wide = double(heads)
    mean = heads.mean(1)
    spread = torch.cov(wide) + jitter * torch.eye(len(wide)).to(wide)
    factor = noise * torch.linalg.cholesky(torch.linalg.inv(spread))
    log_noise = heads.new_tensor(noise).log()
    head = {"head.weight": mean[None, :-1], "head.bias": mean[-1:]}
    return {**head, "alpaca.factor": factor.to(heads), "alpaca.log_noise": log_noise}


# What they share -----------------------------------------------------------------------------


def with_one(z: Tensor) -> Tensor:
    """[z, 1], for a head with a bias: (N, D) -> (N, D+1)."""
    return torch.cat([z, torch.ones_like(z[:, :1])], 1)


def head_matrix(phi: Params) -> Tensor:
    """V = [Wᵀ; b] (D+1, W): the head as the matrix that multiplies [z, 1]."""
    require(phi, ("head.weight", "head.bias"))
    return torch.cat([phi["head.weight"], phi["head.bias"][:, None]], 1).mT


def _check(net: nn.Module, **numbers: float) -> None:
    above_zero(**numbers)
    linear_head(net, bias=True)
