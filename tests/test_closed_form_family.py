"""Each head against another way to its numbers: scikit-learn's solvers, optimality, a Gaussian process, the papers' own formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, apply, features, over, parameters
from mtlib.learners.amortised import gaussian_nll
from mtlib.learners.closed_form import (
    alpaca,
    anil_at_once,
    bayesian,
    crammer_singer,
    head_matrix,
    heads_prior,
    metaoptnet,
    r2d2,
    ridge,
    ridge_solution,
    ridge_toward,
)
from mtlib.learners.gradient import anil
from mtlib.nets import Widths, mlp, two_halves
from mtlib.tasks import one_hot


def problem(rows, ways, dims, seed=0, apart=2.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % ways
    means = apart * torch.randn(ways, dims, generator=g, dtype=torch.float64)
    z = torch.randn(rows, dims, generator=g, dtype=torch.float64) + means[labels]
    return z, labels, one_hot(labels, ways, torch.float64)


def objective(w, z, y, strength):
    f = z @ w.T
    hinge = (f + 1 - y).amax(1) - (f * y).sum(1)
    return (0.5 * (w**2).sum() + strength * hinge.sum()).item()


# MetaOptNet ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "ways", "dims", "strength"),
    [(5, 5, 64, 0.1), (6, 3, 4, 0.1), (25, 5, 64, 0.1), (25, 5, 64, 1.0), (40, 5, 8, 0.1)],
)
def test_metaoptnets_solver_is_scikit_learns_crammer_singer(rows, ways, dims, strength):
    z, labels, y = problem(rows, ways, dims)
    w = crammer_singer(z @ z.T, y, strength).T @ z
    theirs = LinearSVC(
        multi_class="crammer_singer", C=strength, fit_intercept=False, tol=1e-12, max_iter=10**6
    ).fit(z.numpy(), labels.numpy())
    gap = np.abs(w.numpy() - theirs.coef_).max()
    print(f"{rows} items, {ways} ways, {dims} dims, C = {strength}: largest gap {gap:.1e}")
    assert gap <= 1e-8


def test_metaoptnet_predicts_as_scikit_learn_on_its_features():
    torch.manual_seed(0)
    net = mlp(4, (16,), 3).double()
    z, labels, y = problem(12, 3, 4, apart=1.0)
    learner = metaoptnet(net, strength=0.5, scale=3.0)
    theta = learner.adapt(learner.init(), Batch(z, y))
    query = problem(20, 3, 4, seed=1)[0]
    zs, zq = (features(net)(theta, x).numpy() for x in (z, query))
    theirs = LinearSVC(
        multi_class="crammer_singer", C=0.5, fit_intercept=False, tol=1e-12, max_iter=10**6
    ).fit(zs, labels.numpy())
    assert theta["svm.weight"].shape == (3, 16)
    gap = np.abs(learner.predict(theta, query).numpy() - 3 * theirs.decision_function(zq)).max()
    assert gap <= 1e-7


def test_the_dual_is_feasible_and_closes_the_gap_over_many_problems():
    """Primal = dual certifies an optimum without another solver. More rows than dimensions among them.

    The ridge ε on K moves scores by at most ε C, so each of N margins by 2 ε C: the gap is at most 2 ε N C².
    """
    shapes = [(6, 3, 4, 0.1), (10, 5, 64, 1.0), (20, 2, 3, 1.0), (30, 3, 4, 1.0), (6, 3, 4, 1e3)]
    worst = 0.0
    for seed in range(40):
        rows, ways, dims, strength = shapes[seed % 5]
        z, _, y = problem(rows, ways, dims, seed, apart=seed % 3)
        gram = z @ z.T
        alpha = crammer_singer(gram, y, strength)
        w = alpha.T @ z
        assert alpha.sum(1).abs().max() <= 1e-9 * max(1, strength)
        assert (strength * y - alpha).min() >= -1e-9 * max(1, strength)
        primal = objective(w, z, y, strength)
        gap = primal - ((y * alpha).sum() - 0.5 * (w**2).sum()).item()
        added = torch.finfo(torch.float64).eps ** (2 / 3) * gram.diagonal().mean().item()
        assert gap <= 2 * added * rows * strength**2 + 1e-9 * max(primal, 1)
        worst = max(worst, gap / max(primal, 1))
    print(f"largest relative duality gap {worst:.1e}")


def test_equal_items_and_dead_features_have_a_solution_and_a_gradient():
    z, _, y = problem(6, 3, 4)
    z[3], z[4] = z[0], 0.0
    for items in (z, torch.zeros_like(z), z.float()):
        x = items.clone().requires_grad_()
        w = crammer_singer(x @ x.T, y.to(x), 0.1).T @ x
        (g,) = torch.autograd.grad((w**2).sum(), x)
        assert bool(torch.isfinite(w).all() and torch.isfinite(g).all())


def test_single_precision_agrees_with_double():
    z, _, y = problem(25, 5, 64)
    w = crammer_singer(z @ z.T, y, 0.1).T @ z
    single = crammer_singer((z @ z.T).float(), y.float(), 0.1)
    assert single.dtype == torch.float32
    assert (single.double().T @ z - w).abs().max() <= 1e-4


# R2-D2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [6, 60], ids=["fewer items than features", "more"])
def test_r2d2_is_scikit_learns_ridge_scaled_and_shifted(rows):
    torch.manual_seed(0)
    net = mlp(4, (16,), 3).double()
    x, _, y = problem(rows, 3, 4)
    query = problem(20, 3, 4, seed=1)[0]
    learner = r2d2(net, strength=0.4, scale=2.5)
    phi = {**learner.init(), "r2d2.shift": torch.tensor(-0.7, dtype=torch.float64)}
    theta = learner.adapt(phi, Batch(x, y))
    z, zq = (np.c_[features(net)(phi, d).numpy(), np.ones(len(d))] for d in (x, query))
    theirs = Ridge(alpha=0.4, fit_intercept=False).fit(z, y.numpy()).predict(zq)
    gap = np.abs(learner.predict(theta, query).numpy() - (2.5 * theirs - 0.7)).max()
    assert theta["r2d2.head"].shape == (17, 3) and gap <= 1e-9
    assert not any(k.startswith("head.") for k in phi)


def test_r2d2_is_ridge_from_a_head_of_zeros(regression):
    net, x, y, query = regression
    a, b = r2d2(net, strength=0.7), ridge(net, strength=0.7)
    phi = {k: torch.zeros_like(v) if k.startswith("head.") else v for k, v in b.init().items()}
    ours = a.predict(a.adapt(a.init(), Batch(x, y)), query)
    assert (ours - b.predict(b.adapt(phi, Batch(x, y)), query)).abs().max() <= 1e-12


def test_a_softmax_sees_the_scale_and_not_the_shift():
    """So cross-entropy trains λ and α, and leaves β: it is for losses that look at one answer alone."""
    torch.manual_seed(0)
    learner = r2d2(mlp(4, (16,), 3).double())
    x, _, y = problem(12, 3, 4)
    episode = over(lambda d: d[None], Episode(Batch(x, y), Batch(x + 0.1, y)))
    grads = bilevel(learner, cross_entropy).value_and_grad(learner.init(), episode)[1]
    assert grads["r2d2.shift"].abs() <= 1e-15
    assert min(grads[f"r2d2.log_{k}"].abs() for k in ("strength", "scale")) > 1e-4


# The Bayesian head ---------------------------------------------------------------------------


@pytest.fixture
def regression():
    torch.manual_seed(0)
    net = mlp(3, (8, 8), 2).double()
    g = torch.Generator().manual_seed(2)
    return net, *(torch.randn(n, k, generator=g, dtype=torch.float64) for n, k in SHAPES)


SHAPES = ((12, 3), (12, 2), (7, 3))


def test_the_bayesian_heads_mean_is_ridge(regression):
    net, x, y, query = regression
    a, b = bayesian(net, strength=0.7, noise=0.3), ridge(net, strength=0.7)
    means, scales = a.predict(a.adapt(a.init(), Batch(x, y)), query).chunk(2, 1)
    expected = b.predict(b.adapt(b.init(), Batch(x, y)), query)
    assert (means - expected).abs().max() <= 1e-10
    assert (scales > 0.3).all() and torch.equal(scales[:, 0], scales[:, 1])


def test_the_bayesian_head_is_a_gaussian_process_with_a_linear_kernel(regression):
    """σ²/λ (z·z' + 1) and noise σ², on what φ's own head leaves over; scikit-learn's scale is the mean's alone."""
    net, x, y, query = regression
    learner = bayesian(net, strength=0.7, noise=0.3)
    phi = learner.init()
    means, scales = learner.predict(learner.adapt(phi, Batch(x, y)), query).chunk(2, 1)
    z, f = features(net), apply(net)
    kernel = ConstantKernel(0.3**2 / 0.7, "fixed") * DotProduct(1.0, "fixed")
    process = GaussianProcessRegressor(kernel, alpha=0.3**2, optimizer=None)
    process.fit(z(phi, x).numpy(), (y - f(phi, x)).numpy())
    mean, std = process.predict(z(phi, query).numpy(), return_std=True)
    assert np.abs(means.numpy() - f(phi, query).numpy() - mean).max() <= 1e-8
    assert np.abs(scales.numpy() - np.sqrt(std.reshape(7, -1)[:, :1] ** 2 + 0.3**2)).max() <= 1e-8


def test_the_bayesian_head_covers_what_it_says_under_its_own_model():
    """Tasks drawn from the prior: 95 % intervals hold 95 % of the answers."""
    torch.manual_seed(0)
    net = mlp(2, (6,), 1).double()
    learner = bayesian(net, strength=0.5, noise=0.2)
    phi, g = learner.init(), torch.Generator().manual_seed(3)
    head = torch.cat([phi["head.weight"], phi["head.bias"][:, None]], 1)
    inside = []
    for _ in range(400):
        x = torch.randn(15, 2, generator=g, dtype=torch.float64)
        z = torch.cat([features(net)(phi, x), torch.ones(15, 1)], 1)
        v = head + 0.2 / 0.5**0.5 * torch.randn(head.shape, generator=g, dtype=torch.float64)
        y = z @ v.T + 0.2 * torch.randn(15, 1, generator=g, dtype=torch.float64)
        theta = learner.adapt(phi, Batch(x[:5], y[:5]))
        mean, scale = learner.predict(theta, x[5:]).chunk(2, 1)
        inside.append(((y[5:] - mean).abs() <= 1.959964 * scale).double().mean())
    assert torch.stack(inside).mean().item() == pytest.approx(0.95, abs=0.015)


# ALPaCA --------------------------------------------------------------------------------------


def test_alpaca_begins_as_the_bayesian_head(regression):
    net, x, y, query = regression
    a, b = alpaca(net, strength=0.7, noise=0.3), bayesian(net, strength=0.7, noise=0.3)
    ours, theirs = (m.predict(m.adapt(m.init(), Batch(x, y)), query) for m in (a, b))
    assert (ours - theirs).abs().max() <= 1e-11


def drawn_prior(learner, seed=4):
    """φ whose prior's precision is a full matrix."""
    phi, g = learner.init(), torch.Generator().manual_seed(seed)
    factor = phi["alpaca.factor"]
    noise = torch.randn(factor.shape, generator=g, dtype=factor.dtype)
    return {**phi, "alpaca.factor": factor + 0.3 * noise}


def test_alpaca_is_the_papers_update(regression):
    """Λ = ΦᵀΦ + Λ₀, K = Λ⁻¹(ΦᵀY + Λ₀K₀), and the spread 1 + φᵀΛ⁻¹φ, as its equations stand."""
    net, x, y, query = regression
    learner = alpaca(net, noise=0.3)
    phi = drawn_prior(learner)
    means, scales = learner.predict(learner.adapt(phi, Batch(x, y)), query).chunk(2, 1)
    z, zq = (torch.cat([features(net)(phi, d), torch.ones(len(d), 1)], 1) for d in (x, query))
    k0 = torch.cat([phi["head.weight"].T, phi["head.bias"][None]])
    lambda0 = phi["alpaca.factor"] @ phi["alpaca.factor"].T
    after = torch.linalg.inv(z.T @ z + lambda0)
    k = after @ (z.T @ y + lambda0 @ k0)
    spread = 1 + torch.einsum("qi,ij,qj->q", zq, after, zq)
    assert (means - zq @ k).abs().max() <= 1e-10
    assert (scales - 0.3 * spread.sqrt()[:, None]).abs().max() <= 1e-10


def test_alpaca_is_conditioning_on_jointly_gaussian_numbers(regression):
    """The other way round, without a head: targets have the covariance σ²(Z Λ₀⁻¹ Zᵀ + I)."""
    net, x, y, query = regression
    learner = alpaca(net, noise=0.3)
    phi = drawn_prior(learner)
    means, scales = learner.predict(learner.adapt(phi, Batch(x, y)), query).chunk(2, 1)
    z = torch.cat([features(net)(phi, torch.cat([x, query])), torch.ones(19, 1)], 1)
    within = torch.linalg.inv(phi["alpaca.factor"] @ phi["alpaca.factor"].T)
    c = 0.3**2 * (z @ within @ z.T + torch.eye(19, dtype=torch.float64))
    gain = torch.linalg.solve(c[:12, :12], c[:12, 12:]).T
    prior = apply(net)(phi, torch.cat([x, query]))
    assert (means - prior[12:] - gain @ (y - prior[:12])).abs().max() <= 1e-9
    left = (c[12:, 12:] - gain @ c[:12, 12:]).diagonal().sqrt()
    assert (scales - left[:, None]).abs().max() <= 1e-9


def test_alpacas_prior_is_learned():
    """Tasks whose heads differ along one direction: the prior's variance grows there, and the loss falls."""
    torch.manual_seed(0)
    net = mlp(2, (2,), 1).double()
    learner, g = alpaca(net, noise=0.3), torch.Generator().manual_seed(0)
    objective = bilevel(learner, gaussian_nll)
    phi = learner.init()
    x = torch.randn(20, 8, 2, generator=g, dtype=torch.float64)
    y = x[..., :1] * torch.randn(20, 1, 1, generator=g, dtype=torch.float64)
    episode = Episode(Batch(x[:, :3], y[:, :3]), Batch(x[:, 3:], y[:, 3:]))
    before, grads = objective.value_and_grad(phi, episode)
    moved = {k: v - 1e-3 * grads[k] for k, v in phi.items()}
    step = 1e-6 * torch.ones_like(phi["alpaca.factor"])
    up, down = ({**phi, "alpaca.factor": phi["alpaca.factor"] + s * step} for s in (1, -1))
    slope = (objective(up, episode) - objective(down, episode)) / 2e-6
    assert grads["alpaca.factor"].sum() == pytest.approx(slope.item(), rel=1e-6)
    assert objective(moved, episode) < before


def test_the_prior_of_known_heads_is_their_mean_and_covariance(regression):
    net, x, y, query = regression
    heads = torch.randn(9, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    learner, one = alpaca(mlp(3, (8, 8), 1, seed=0).double()), y[:, :1]
    phi = {**learner.init(), **heads_prior(heads, 0.3)}
    means, scales = learner.predict(learner.adapt(phi, Batch(x, one)), query).chunk(2, 1)
    zs, zq = (torch.cat([features(net)(phi, d), torch.ones(len(d), 1)], 1) for d in (x, query))
    mean, c = heads.mean(1, keepdim=True), torch.cov(heads)
    gain = zq @ c @ zs.T @ torch.linalg.inv(zs @ c @ zs.T + 0.09 * torch.eye(12))
    assert (means - zq @ mean - gain @ (one - zs @ mean)).abs().max() <= 1e-4
    left = (zq @ c @ zq.T - gain @ zs @ c @ zq.T).diagonal() + 0.09
    assert (scales[:, 0] - left.sqrt()).abs().max() <= 1e-4


# ANIL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8, 13])
def test_anil_at_once_is_anil_and_so_is_its_gradient(regression, steps):
    net, x, y, query = regression
    episode = over(lambda d: d[None], Episode(Batch(x, y), Batch(query, torch.ones(7, 2).double())))
    phi = parameters(net)
    (a, da), (b, db) = (
        bilevel(learner, mse_loss).value_and_grad(phi, episode)
        for learner in (anil_at_once(net, 0.1, steps), anil(net, mse_loss, 0.1, steps))
    )
    assert abs(a - b) <= 1e-13
    assert max((da[k] - db[k]).abs().max() for k in phi) <= 1e-12


def test_each_step_shrinks_what_is_left_on_the_support_set(regression):
    """Z V_K − Y = (I − ρ Z Zᵀ)^K (Z V_φ − Y), ρ = 2α/(N W)."""
    net, x, y, _ = regression
    learner = anil_at_once(net, 0.1, 300)
    phi, f = learner.init(), apply(net)
    z = torch.cat([features(net)(phi, x), torch.ones(12, 1)], 1)
    shrinks = torch.linalg.matrix_power(torch.eye(12).double() - 0.2 / 24 * z @ z.T, 300)
    left = f(learner.adapt(phi, Batch(x, y)), x) - y
    assert (left - shrinks @ (f(phi, x) - y)).abs().max() <= 1e-12


# What the page's exercises say -----------------------------------------------------------------


def test_r2d2_with_a_large_strength_scores_by_the_sum_of_a_classs_features():
    torch.manual_seed(0)
    net = mlp(4, (16,), 3).double()
    x, _, y = problem(12, 3, 4)
    learner = r2d2(net, strength=1e9, scale=1e9)
    theta = learner.adapt(learner.init(), Batch(x, y))
    z = torch.cat([features(net)(theta, x), torch.ones(12, 1)], 1)
    assert (learner.predict(theta, x) - z @ (z.T @ y)).abs().max() <= 1e-3


def test_alpacas_matrix_is_one_more_linear_layer(regression):
    """z' = L⁻¹z, V' = LᵀV: ridge of strength 1 on z' from V'_φ gives the same answers."""
    net, x, y, query = regression
    learner = alpaca(net, noise=0.3)
    phi = drawn_prior(learner)
    means = learner.predict(learner.adapt(phi, Batch(x, y)), query).chunk(2, 1)[0]
    inverse = torch.linalg.inv(phi["alpaca.factor"])
    z, zq = (
        torch.cat([features(net)(phi, d), torch.ones(len(d), 1)], 1) @ inverse.T for d in (x, query)
    )
    first = phi["alpaca.factor"].T @ head_matrix(phi)
    v = first + ridge_solution(z, y - z @ first, torch.tensor(1.0).double())
    assert (means - zq @ v).abs().max() <= 1e-8


def test_leaving_one_item_out_has_a_closed_form():
    g = torch.Generator().manual_seed(0)
    z, y = (torch.randn(9, k, generator=g, dtype=torch.float64) for k in (5, 2))
    strength = torch.tensor(0.7).double()
    inverse = torch.linalg.inv(z @ z.mT + strength * torch.eye(9))
    quick = (inverse @ y) / inverse.diagonal()[:, None]
    for n in range(9):
        rest = [i for i in range(9) if i != n]
        error = y[n] - z[n] @ ridge_solution(z[rest], y[rest], strength)
        assert (error - quick[n]).abs().max() <= 1e-12


BAD = {
    "r2d2, no strength": lambda net: r2d2(net, strength=0.0),
    "r2d2, no scale": lambda net: r2d2(net, scale=-1.0),
    "alpaca, no strength": lambda net: alpaca(net, strength=0.0),
    "alpaca, no noise": lambda net: alpaca(net, noise=0.0),
    "bayesian, no strength": lambda net: bayesian(net, strength=0.0),
    "bayesian, no noise": lambda net: bayesian(net, noise=-1.0),
    "metaoptnet, no strength": lambda net: metaoptnet(net, strength=0.0),
    "metaoptnet, no scale": lambda net: metaoptnet(net, scale=float("nan")),
}


@pytest.mark.parametrize("name", BAD)
def test_numbers_that_make_no_sense_are_refused(name):
    with pytest.raises(ValueError, match="> 0"):
        BAD[name](mlp(3, (8,), 2))


def test_parameters_of_another_learner_are_refused():
    net = mlp(3, (8,), 2)
    with pytest.raises(ValueError, match="expected parameters named"):
        bayesian(net).adapt(parameters(net), Batch(torch.ones(4, 3), torch.ones(4, 2)))


def test_ridge_toward_a_head_is_scikit_learns_on_what_the_head_leaves():
    x, _, y = problem(9, 3, 6)
    g = torch.Generator().manual_seed(1)
    head, widths = torch.randn(6, 3, generator=g).double(), torch.rand(6, generator=g).double()
    widths[2] = 0
    found = ridge_toward(x, y, head, widths, 0.7)
    model = Ridge(alpha=0.7, fit_intercept=False).fit(x * widths, y - x @ head)
    expected = head + widths[:, None] * torch.from_numpy(model.coef_.T)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], head[2])
    torch.testing.assert_close(ridge_toward(x, y, head, widths, 1e12), head, atol=1e-8, rtol=0)


def test_ridge_toward_is_the_ridge_learner_on_a_body_of_widths():
    x, _, y = problem(9, 3, 6)
    blocks = torch.tensor([0, 0, 1, 1, 2, 2])
    learner = ridge(two_halves(Widths(blocks), torch.nn.Linear(6, 3)).double(), 0.3)
    phi = learner.init()
    phi["body.s"] = torch.tensor([0.5, -1.0, 0.2]).double()
    expected = learner.predict(learner.adapt(phi, Batch(x, y)), x)
    one = torch.ones(len(x), 1).double()
    widths = torch.cat([phi["body.s"].exp()[blocks], one[0]])
    head = widths[:, None] * head_matrix(phi)
    x = torch.cat([x, one], 1)
    torch.testing.assert_close(x @ ridge_toward(x, y, head, widths, 0.3), expected)
