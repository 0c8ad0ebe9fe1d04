"""Weights of joint objectives: hand cases, closed forms, and the plain sum where they are neutral."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from problems import assert_close, classified, half_mse, slope_gap
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, parameters, take
from mtlib.joint import joint, own_columns, risks
from mtlib.nets import mlp
from mtlib.objective import whole
from mtlib.tasks import mixture
from mtlib.train import fit
from mtlib.transfer.weights import (
    balances,
    best_alpha,
    best_weights,
    gradnorm,
    log_variances,
    pcgrad,
    uncertainty,
    without_conflict,
)


def drawn(sets=3, outputs=6):
    return classified(lambda: mlp(4, (5,), outputs), sets, outputs=outputs)


def double(params):
    return {k: v.double() for k, v in params.items()}


# Uncertainty -----------------------------------------------------------------------------------


def test_uncertainty_without_any_is_the_plain_sum():
    net, batch = drawn()
    phi = {**parameters(net), **double(log_variances(3))}
    value, grads = uncertainty(net, cross_entropy).value_and_grad(phi, batch)
    plain, expected = joint(net, cross_entropy, (1, 1, 1)).value_and_grad(parameters(net), batch)
    assert torch.isclose(value, plain)
    assert_close(grads, expected)


def test_uncertainty_is_stationary_where_the_variance_is_twice_the_risk():
    net, batch = drawn()
    values = risks(net, cross_entropy)(parameters(net), batch).detach()
    phi = {**parameters(net), "weight.log_variance": (2 * values).log()}
    value, grads = uncertainty(net, cross_entropy).value_and_grad(phi, batch)
    assert torch.isclose(value, (0.5 + 0.5 * (2 * values).log()).sum())
    assert grads["weight.log_variance"].abs().max() < 1e-12
    assert_close(grads, whole_of_logs(net, batch), parameters(net))


def whole_of_logs(net, batch):
    """At its best s, uncertainty weighting descends ½ Σ log L_t."""
    terms = risks(net, cross_entropy)
    log = whole(lambda phi, data: 0.5 * terms(phi, data).log().sum())
    return log.value_and_grad(parameters(net), batch)[1]


def test_uncertainty_gradient_equals_finite_differences():
    net, batch = drawn()
    phi = {**parameters(net), "weight.log_variance": torch.tensor([0.3, -0.5, 1.0]).double()}
    objective = uncertainty(net, cross_entropy)
    _, grads = objective.value_and_grad(phi, batch)
    assert slope_gap(objective, phi, batch, grads) < 1e-7


# GradNorm --------------------------------------------------------------------------------------


def two_scalars():
    """f(x) = c · b · x with b = 1 shared and c = 1; y = (2, 4) at x = 1: L = (½, 4½), dL/db = (−1, −3)."""
    parts = OrderedDict(body=nn.Linear(1, 1, bias=False), head=nn.Linear(1, 1, bias=False))
    net = nn.Sequential(parts).double()
    phi = {"body.weight": torch.ones(1, 1).double(), "head.weight": torch.ones(1, 1).double()}
    return net, phi, Batch(torch.ones(2, 1, 1).double(), torch.tensor([[[2.0]], [[4.0]]]).double())


def test_gradnorm_on_two_scalars_by_hand():
    net, phi, batch = two_scalars()
    initial = torch.tensor([1.0, 3.0]).double()
    value, grads = gradnorm(net, half_mse, strength=1.0).value_and_grad(
        {**phi, **balances(initial)}, batch
    )
    # w = (1, 1), G = (1, 3), mean 2; L/L(0) = (0.5, 1.5), r = (0.5, 1.5); targets (1, 3): at rest
    assert torch.isclose(value, torch.tensor(5.0).double())
    assert grads["weight.omega"].abs().max() == 0 and "weight.initial" not in grads
    assert torch.isclose(grads["body.weight"], torch.tensor(-4.0).double())

    _, grads = gradnorm(net, half_mse, strength=0.0).value_and_grad(
        {**phi, **balances(initial)}, batch
    )
    # targets (2, 2): signs (−1, +1). dw_t/dω_t = 2 q_t (1 − q_t) = ½, others −½:
    # dω_0 = −1·1·½ + 1·3·(−½) = −2, dω_1 = +2: the first gains weight, the second loses it
    assert torch.allclose(grads["weight.omega"], torch.tensor([-2.0, 2.0]).double())


def test_gradnorm_moves_omega_by_the_slope_with_a_constant_target():
    net, batch = drawn()
    start = risks(net, cross_entropy)(parameters(net), batch).detach() * torch.tensor([1, 2, 0.7])
    phi = {**parameters(net), **balances(start)}
    phi["weight.omega"] = torch.tensor([0.2, -0.4, 0.1]).double()
    _, grads = gradnorm(net, cross_entropy, strength=1.5).value_and_grad(phi, batch)

    inner = whole(lambda p, data: risks(net, cross_entropy)(p, data)[0])
    norms, values = [], []
    for t in range(3):
        v, g = inner.value_and_grad(parameters(net), take(batch, slice(t, t + 1)))
        norms.append(g["body.0.weight"].norm())
        values.append(v)
    norms, pace = torch.stack(norms), torch.stack(values) / start

    def unrest(omega, target=None):
        g = 3 * torch.softmax(omega, 0) * norms
        if target is None:
            target = g.mean() * (pace / pace.mean()) ** 1.5
        return (g - target).abs().sum(), target

    omega = phi["weight.omega"]
    _, target = unrest(omega)
    for t in range(3):
        step = torch.zeros(3).double()
        step[t] = 1e-6
        slope = (unrest(omega + step, target)[0] - unrest(omega - step, target)[0]) / 2e-6
        assert abs(slope - grads["weight.omega"][t]) < 1e-7


def test_gradnorm_with_equal_weights_is_the_plain_sum():
    net, batch = drawn()
    phi = {**parameters(net), **balances(torch.ones(3).double())}
    objective = gradnorm(net, cross_entropy)
    value, grads = objective.value_and_grad(phi, batch)
    plain, expected = joint(net, cross_entropy, (1, 1, 1)).value_and_grad(parameters(net), batch)
    assert torch.isclose(value, plain) and torch.isclose(objective(phi, batch), plain)
    assert_close(grads, expected)


def test_gradnorm_asks_for_a_shared_layer():
    with pytest.raises(ValueError, match="body"):
        gradnorm(nn.Linear(2, 2), cross_entropy)
    with pytest.raises(ValueError, match="above 0"):
        balances(torch.tensor([1.0, 0.0]))


def test_own_entries_are_asked_for():
    net, batch = drawn()
    with pytest.raises(ValueError, match="log_variances"):
        uncertainty(net, cross_entropy)(parameters(net), batch)
    with pytest.raises(ValueError, match="balances"):
        gradnorm(net, cross_entropy)({**parameters(net), **balances(torch.ones(2))}, batch)


# PCGrad ----------------------------------------------------------------------------------------


def test_pcgrad_on_two_vectors_by_hand():
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    # g0·g1 = −1: g0 + ½ g1 = (½, ½);  g1 + g0 = (0, 1)
    assert torch.equal(without_conflict(g), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_pcgrad_leaves_gradients_without_conflict_and_single_ones_alone():
    g = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(without_conflict(g), g)
    assert torch.equal(without_conflict(g[:1]), g[:1])


def test_pcgrad_ends_without_conflict_for_two():
    g = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double()
    g[1] -= 2 * g[0]
    assert (g[0] @ g[1]) < 0
    rows = without_conflict(g)
    assert abs(rows[0] @ g[1]) < 1e-12 and abs(rows[1] @ g[0]) < 1e-12


def test_pcgrad_as_an_objective_projects_the_gradients_of_the_sets():
    net, phi, batch = two_scalars()
    batch = Batch(batch.x, torch.tensor([[[2.0]], [[-1.0]]]).double())
    # residuals (−1, 2): g = (−1, −1) and (2, 2): opposed, each projects to nothing
    value, grads = pcgrad(net, half_mse).value_and_grad(phi, batch)
    assert torch.isclose(value, torch.tensor(1.25).double())
    assert all(g.abs().max() == 0 for g in grads.values())


def test_pcgrad_without_conflict_is_joint_training():
    net, phi, batch = two_scalars()
    value, grads = pcgrad(net, half_mse).value_and_grad(phi, batch)
    plain, expected = joint(net, half_mse).value_and_grad(phi, batch)
    assert torch.isclose(value, plain)
    assert_close(grads, expected)
    net, batch = drawn(sets=1)
    _, grads = pcgrad(net, cross_entropy).value_and_grad(parameters(net), batch)
    assert_close(grads, joint(net, cross_entropy).value_and_grad(parameters(net), batch)[1], grads)


def test_pcgrad_draws_its_order_from_the_state_that_fit_sets():
    torch.manual_seed(3)
    sets = [Batch(torch.randn(40, 4), torch.randint(6, (40,))) for _ in range(4)]
    stream = mixture(*sets, batch=8, seed=0)
    net = mlp(4, (5,), 6)
    sgd = partial(torch.optim.SGD, lr=0.5)
    runs = [
        fit(pcgrad(net, cross_entropy), parameters(net), stream, 20, sgd, seed=seed)
        for seed in (1, 1, 2)
    ]
    a, b, c = (run.params["head.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


# Own heads -------------------------------------------------------------------------------------


def test_own_heads_get_gradients_from_their_own_data_set_alone():
    columns = own_columns((3, 1, 2))
    net, batch = drawn()
    y = torch.zeros_like(batch.y)
    for t, c in enumerate(columns):
        y[t, :, c.start] = 1
    batch = Batch(batch.x, y)
    terms = risks(net, half_mse, columns)
    for t, own in enumerate(columns):
        _, g = whole(lambda p, d, t=t: terms(p, d)[t]).value_and_grad(parameters(net), batch)
        outside = [i for i in range(6) if not own.start <= i < own.stop]
        assert (
            g["head.weight"][outside].abs().max() == 0 and g["head.bias"][outside].abs().max() == 0
        )
        assert g["head.weight"][own].abs().min() > 0 and g["body.0.weight"].abs().max() > 0

    # and the surgery of PCGrad does not carry them over
    _, cut = pcgrad(net, half_mse, columns).value_and_grad(parameters(net), batch)
    _, plain = joint(net, half_mse, columns=columns).value_and_grad(parameters(net), batch)
    assert_close(cut, plain, ("head.weight", "head.bias"))


# α -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "source", "distance", "dimension"),
    [
        (50, 1000, 0.1, 10),
        (50, 1000, 0.3, 10),
        (100, 100, 0.2, 5),
        (20, 3000, 0.05, 30),
        (3, 9, 1, 8),
    ],
)
def test_best_alpha_is_the_lowest_point_of_the_bound(target, source, distance, dimension):
    m, beta = target + source, target / (target + source)
    a = np.linspace(0, 1, 200_001)
    spread = np.sqrt(a**2 / beta + (1 - a) ** 2 / (1 - beta))
    bound = np.sqrt(dimension / m) * spread + (1 - a) * distance
    found = best_alpha(target, source, distance, dimension)
    assert abs(found - a[bound.argmin()]) < 2e-5 and 0 < found < 1


def test_best_alpha_at_its_ends():
    assert best_alpha(50, 1000, 0.0, 10) == 50 / 1050  # equal domains: pool
    assert best_alpha(50, 1000, 0.5, 10) == 1.0  # 50 ≥ 10 / 0.25: the source is ignored
    assert best_alpha(50, 0, 0.1, 10) == 1.0
    with pytest.raises(ValueError, match="at least 1 target label"):
        best_alpha(0, 10, 0.1, 1)


def test_best_weights_of_one_source_are_the_lowest_point_of_the_error():
    a = np.linspace(0, 1, 200_001)
    for gap in (0.0, 0.2, 1.5):
        error = a**2 * 4 / 10 + (1 - a) ** 2 * (4 / 100 + gap**2)
        w = best_weights(torch.tensor([0.4, 0.04]).double(), torch.tensor([[0.0], [gap]]).double())
        assert abs(w[0] - a[error.argmin()]) < 1e-5 and w.sum() == pytest.approx(1)
    pooled = best_weights(torch.tensor([0.4, 0.04]).double(), torch.zeros(2, 3).double())
    assert pooled[0].item() == pytest.approx(10 / 110)


def test_no_other_weights_of_sum_one_have_a_smaller_error():
    """The error, written out: bias² + variance, which is convex in w; so its slope along each swap of weight is 0."""
    g = torch.Generator().manual_seed(0)
    v = torch.rand(4, dtype=torch.float64, generator=g) + 0.1
    offsets = torch.randn(4, 3, dtype=torch.float64, generator=g)
    offsets[0] = 0

    def error(w):
        bias = sum(w[t] * offsets[t] for t in range(4))
        return (bias**2).sum() + sum(w[t] ** 2 * v[t] for t in range(4))

    best = best_weights(v, offsets)
    slopes = torch.autograd.functional.jacobian(error, best)
    assert (slopes - slopes.mean()).abs().max() < 1e-12
    m = offsets @ offsets.T + torch.diag(v)
    assert error(best).item() == pytest.approx(1 / torch.linalg.inv(m).sum().item())


def test_two_sources_that_err_to_opposite_sides_share_a_weight_and_to_one_side_one_is_below_zero():
    v = torch.tensor([1.0, 0.01, 0.01]).double()
    w = best_weights(v, torch.tensor([[0.0], [1.0], [-1.0]]).double())
    assert w[1].item() == pytest.approx(w[2].item()) and w[1] > 0.49
    assert best_weights(v, torch.tensor([[0.0], [1.0], [2.0]]).double())[2] < 0
