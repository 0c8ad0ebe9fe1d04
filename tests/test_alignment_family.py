"""Alignment: each penalty, critic and schedule against its equation."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from problems import normal
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, parameters
from mtlib.joint import joint
from mtlib.nets import mlp
from mtlib.norm import Norm, calibrate, moments
from mtlib.objective import whole
from mtlib.train import cosine_adam, fit
from mtlib.transfer import selection
from mtlib.transfer.align import (
    WIDTHS,
    afn,
    bsp,
    coral,
    covariance,
    discrepancy,
    information,
    jan,
    kernel,
    mmd,
    recoloured,
)
from mtlib.transfer.critics import (
    CRITIC,
    adda,
    adversary,
    both_halves,
    cdan,
    dann,
    mcd,
    mdd,
    reverse,
    warm,
)
from mtlib.transfer.critics import critic as normed_critic

T, B, D, W = 2, 6, 4, 3


@pytest.fixture
def z():
    return normal(T, B, D)


@pytest.fixture
def logits():
    return normal(T, B, W, seed=1)


def critic(inputs, outputs):
    torch.manual_seed(2)
    return nn.Linear(inputs, outputs).double()


def log_softmax(a):
    return a - np.log(np.exp(a).sum(-1, keepdims=True))


def test_recoloured_features_have_the_other_covariance():
    """With NumPy: CORAL's map is A = (C_s + λI)^(−1/2) (C_t + λI)^(1/2), and Aᵀ (C_s + λI) A = C_t + λI."""
    z, like = normal(40, D) @ normal(D, D, seed=2), 3 + normal(30, D, seed=3)
    for strength in (1e-3, 1.0):
        a = np.linalg.lstsq(z.numpy(), recoloured(z, like, strength).numpy(), rcond=None)[0]
        c, other = (np.cov(v.numpy().T) + strength * np.eye(D) for v in (z, like))
        np.testing.assert_allclose(a.T @ c @ a, other, atol=1e-9)
        assert (np.linalg.eigvals(np.linalg.inv(c) @ other).real > 0).all()
    assert torch.allclose(recoloured(z, like, 1e9), z, atol=1e-6)  # a large λ does nothing
    torch.testing.assert_close(covariance(recoloured(z, like, 1e-12)), covariance(like))
    with pytest.raises(ValueError, match="columns"):
        recoloured(z, like[:, :2])


# Distances and spectra -----------------------------------------------------------------------


def test_the_kernel_is_scikit_learns_summed_over_widths(z):
    both = z.flatten(0, 1).numpy()
    squared = ((both[:, None] - both[None]) ** 2).sum(-1)
    mean = squared.sum() / (len(both) * (len(both) - 1))
    expected = sum(rbf_kernel(both, gamma=1 / (c * mean)) for c in WIDTHS)
    assert np.abs(kernel(z.flatten(0, 1)).numpy() - expected).max() <= 1e-12


def test_the_discrepancy_is_the_unbiased_estimator_written_out():
    k = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                total += (k[i, j] + k[4 + i, 4 + j]).item() / (4 * 3)
            total -= 2 * k[i, 4 + j].item() / 16
    assert discrepancy(k).item() == pytest.approx(total, abs=1e-14)


def test_collapsed_features_have_no_distance_and_a_finite_gradient():
    z = torch.ones(2, 5, 3, requires_grad=True)
    value = mmd()({}, z, z)
    assert value == 0 and torch.isfinite(torch.autograd.grad(value, z)[0]).all()


def test_jan_is_the_discrepancy_of_the_product_kernel(z, logits):
    p = torch.softmax(logits, -1)
    both = p.flatten(0, 1)
    gaussian = torch.exp(-(torch.cdist(both, both) ** 2) / (2 * 0.92**2))
    product = kernel(z.flatten(0, 1)) * gaussian
    assert jan(2.0)({}, z, logits).item() == pytest.approx(2 * discrepancy(product).item())


def test_jan_sees_a_pairing_that_its_parts_do_not():
    """Features alike, answers alike, and paired the other way round."""
    g = torch.Generator().manual_seed(0)
    z = torch.cat([torch.full((60, 1), -2.0), torch.full((60, 1), 2.0)])
    z = z + 0.1 * torch.randn(z.shape, generator=g)
    said = torch.cat(
        [torch.tensor([[4.0, -4.0]]).repeat(60, 1), torch.tensor([[-4.0, 4.0]]).repeat(60, 1)]
    )
    both, turned = torch.stack([z, z]), torch.stack([said, said.flip(0)])
    p = torch.softmax(turned, -1)
    assert mmd()({}, both, turned) < 0.02 and mmd()({}, p, p) < 0.02
    assert jan()({}, both, turned) > 1.0 > 0.1 > jan()({}, both, torch.stack([said, said]))


def test_jan_is_zero_on_average_between_equal_distributions():
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(400):
        z = torch.randn(2, 8, 2, generator=g, dtype=torch.float64)
        values.append(jan()({}, z, z.sin() + 0.3 * torch.randn(z.shape, generator=g)).item())
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert abs(mean) < 3 * error and min(values) < 0


def test_afn_pushes_each_norm_by_its_step(z, logits):
    z.requires_grad_()
    value = afn(0.5, step=2.0)({}, z, logits)
    assert value.item() == pytest.approx(0.5 * 4.0)  # (‖z‖ − ‖z‖₀ − Δ)² = Δ² at ‖z‖ = ‖z‖₀
    (g,) = torch.autograd.grad(value, z)
    outwards = z / z.norm(dim=-1, keepdim=True)
    assert torch.allclose(g, 0.5 * 2 * -2.0 * outwards / (T * B))  # λ · 2 · (−Δ) · z/‖z‖, a mean


@pytest.mark.parametrize("rows", [3, 6])  # fewer items than features, and more
def test_bsp_is_the_largest_singular_values_squared(z, logits, rows):
    for k in (1, 2):
        expected = sum(
            (np.linalg.svd(zt[:rows].numpy(), compute_uv=False)[:k] ** 2).sum() for zt in z
        )
        assert bsp(0.5, largest=k)({}, z[:, :rows], logits).item() == pytest.approx(0.5 * expected)


@pytest.mark.parametrize("penalty", [mmd, coral, jan])
def test_a_distance_asks_for_two_domains(penalty, z, logits):
    with pytest.raises(ValueError, match="T ≥ 2 domains"):
        penalty()({}, z[:1], logits[:1])


def test_adabn_gives_the_target_the_moments_of_its_own():
    net = nn.Sequential(OrderedDict(body=Norm(D, "stored"), head=nn.Linear(D, W))).double()
    x = 3 + 2 * normal(64, D)
    phi = calibrate(net, parameters(net), [x])
    mean, var = moments(net.body.forward(x))  # as the net came, mean 0 and variance 1 stored
    normalised = torch.func.functional_call(
        net.body,
        {k.removeprefix("body."): v for k, v in phi.items() if k.startswith("body.")},
        (x,),
    )
    assert mean.min() > 1 and var.min() > 1
    mean, var = moments(normalised)
    assert mean.abs().max() < 1e-12 and (var - 1).abs().max() < 1e-4


# Critics -------------------------------------------------------------------------------------


def test_reversal_is_the_identity_with_the_gradient_turned_around():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = reverse(x, 0.7)
    assert torch.allclose(y, x)
    (g,) = torch.autograd.grad((y**3).sum(), x)
    assert torch.allclose(g, -0.7 * 3 * x**2)


def test_the_schedule_is_the_published_one():
    assert warm(0.0) == 0 and warm(0.5) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    assert warm(1.0) == pytest.approx(math.tanh(5.0))


def test_cdan_is_the_weighted_cross_entropy_of_the_product(z, logits):
    q = critic(D * W, T)
    p = np.exp(log_softmax(logits.numpy()))
    for by_entropy in (True, False):
        total = 0.0
        for t in range(T):
            outer = np.einsum("bd,bw->bdw", z[t].numpy(), p[t]).reshape(B, -1)
            said = log_softmax(outer @ q.weight.detach().numpy().T + q.bias.detach().numpy())[:, t]
            h = -(p[t] * np.log(p[t])).sum(-1)
            w = 1 + np.exp(-h) if by_entropy else np.ones(B)
            total -= (w / w.sum() * said).sum() / T
        value = cdan(q, by_entropy=by_entropy)(adversary(q), z, logits).item()
        assert value == pytest.approx(total, rel=1e-12)


def test_mdd_is_its_two_terms(z, logits):
    q = critic(D, W)
    said = z.numpy() @ q.weight.detach().numpy().T + q.bias.detach().numpy()
    sigma = np.exp(log_softmax(said))
    chosen = logits.argmax(-1).numpy()
    own = np.take_along_axis(sigma, chosen[..., None], -1)[..., 0]
    expected = 3.0 * -np.log(own[0]).mean() - np.log(1 - own[1]).mean()
    assert mdd(q, margin=3.0)(adversary(q), z, logits).item() == pytest.approx(expected, rel=1e-12)


def test_mdd_stays_finite_where_the_second_head_is_sure(z, logits):
    q = critic(D, W)
    own = {k: 1e4 * v for k, v in adversary(q).items()}
    z.requires_grad_()
    value = mdd(q)(own, z, logits)
    assert torch.isfinite(value) and value > 100
    assert torch.isfinite(torch.autograd.grad(value, z)[0]).all()


@pytest.mark.parametrize(
    ("make", "inputs", "outputs"), [(dann, D, T), (cdan, D * W, T), (mdd, D, W)]
)
def test_a_critic_descends_while_the_body_ascends(z, logits, make, inputs, outputs, monkeypatch):
    """∂/∂z has the sign of R and its strength; ∂/∂critic has not."""
    q = critic(inputs, outputs)
    own = {k: v.requires_grad_() for k, v in adversary(q).items()}
    z.requires_grad_()

    def gradients(strength):
        value = make(q, strength)(own, z, logits)
        return torch.autograd.grad(value, [z, *own.values()])

    other = gradients(0.5)
    monkeypatch.setattr("mtlib.transfer.critics.reverse", lambda z, strength: z)
    plain = gradients(0.5)
    assert torch.allclose(other[0], -0.5 * plain[0])
    assert all(torch.allclose(a, b) for a, b in zip(plain[1:], other[1:], strict=True))
    assert plain[0].abs().max() > 1e-3


@pytest.mark.parametrize(("make", "inputs"), [(dann, D), (cdan, D * W), (mdd, D)])
def test_a_critic_of_another_width_is_refused(z, logits, make, inputs):
    q = critic(inputs, 7)
    with pytest.raises(ValueError, match="one output for each of"):
        make(q)(adversary(q), z, logits)


@pytest.mark.parametrize("make", [dann, cdan, mdd])
def test_a_critic_sees_all_domains_as_one_batch(make):
    """Its norms take their statistics from all of them, as its equation over T·B rows has them."""
    torch.manual_seed(0)
    outputs = W if make is mdd else 2
    q = normed_critic(D * W if make is cdan else D, outputs, width=8, seed=1).double()
    z = torch.randn(2, B, D, dtype=torch.float64)
    z[1] += 3.0
    logits = torch.randn(2, B, W, dtype=torch.float64)
    with torch.no_grad():
        seen = z
        if make is cdan:
            seen = (z[..., None] * torch.softmax(logits, -1)[..., None, :]).flatten(2)
        together = q(seen.flatten(0, 1)).view(2, B, outputs)
        apart = torch.stack([q(part) for part in seen])
        constant = {"critic.fixed": torch.zeros(1)}

    def value(found):
        class Fixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.fixed = nn.Parameter(constant["critic.fixed"])

            def forward(self, rows):
                return found.flatten(0, 1) + 0 * self.fixed

        fixed = Fixed()
        return make(fixed)(adversary(fixed), z, logits).item()

    right = make(q)(adversary(q), z, logits).item()
    assert right == pytest.approx(value(together), abs=1e-12)
    assert abs(right - value(apart)) > 1e-3


def test_domain_by_domain_a_norm_would_hide_a_shift():
    """Why `_outputs` flattens: a critic with norms learns to tell shifted domains apart."""
    torch.manual_seed(0)
    z = torch.randn(2, 64, 3)
    z[1] += 2.0
    q = normed_critic(3, seed=0)
    phi, penalty = adversary(q), dann(q, 0.0)
    objective = whole(lambda theta, batch: penalty(theta, z, z))
    run = fit(objective, phi, lambda step: Batch(z, z), 60, **cosine_adam(1e-2, 60), progress=False)
    assert run.losses[-1] < 0.2 < 0.6 < run.losses[0]


def test_information_is_the_criterion_that_chooses_with_its_sign_turned(z, logits):
    value = information(0.5)({}, z, logits)
    assert value.item() == pytest.approx(-0.5 * selection.information(logits[-1]))
    assert torch.equal(
        value, information(0.5)({}, z, logits + torch.tensor([1.0, 0.0])[:, None, None])
    )


def test_mcd_is_the_mean_gap_of_two_heads_and_plays_them_against_the_body():
    torch.manual_seed(0)
    net = mlp(3, (D,), 2 * W).double()
    theta = {k: v.requires_grad_() for k, v in parameters(net).items()}
    x = torch.randn(2, B, 3, dtype=torch.float64)
    z = torch.stack([net.body(xt) for xt in x]).detach().requires_grad_()
    first, second = net.head(z[1]).chunk(2, -1)
    gap = (torch.softmax(first, -1) - torch.softmax(second, -1)).abs().mean()
    value = mcd(net, 0.5)(theta, z, None)
    assert value.item() == pytest.approx(-gap.item())
    to_z, to_head = torch.autograd.grad(value, [z, theta["head.weight"]])
    plain_z, plain_head = torch.autograd.grad(gap, [z, net.head.weight])
    assert torch.allclose(to_z, 0.5 * plain_z) and torch.allclose(to_head, -plain_head)


def test_both_halves_learn(logits):
    y = torch.eye(W, dtype=torch.float64).repeat(2, 1)
    both = both_halves(cross_entropy)
    total = cross_entropy(logits[0], y) + cross_entropy(logits[1], y)
    assert both(torch.cat(list(logits), 1), y).item() == pytest.approx(total.item())
    assert both.columns == 2


def test_adda_moves_the_targets_body_alone_and_never_the_head():
    torch.manual_seed(0)
    net = mlp(3, (D,), W).double()
    anchor, q = parameters(net), critic(D, 2)
    phi = {**anchor, **adversary(q)}
    x = torch.randn(2, B, 3, dtype=torch.float64)
    batch = Batch(x, torch.zeros(2, B, W, dtype=torch.float64))
    value, grads = adda(net, anchor, q).value_and_grad(phi, batch)
    said = torch.log_softmax(q(net.body(x.flatten(0, 1))), -1)
    tells = -said[:B, 0].mean() - said[B:, 1].mean()
    fools = -said[B:, 0].mean()
    assert value.item() == pytest.approx((tells + fools).item())
    own = dict(
        zip(
            q.state_dict(),
            torch.autograd.grad(tells, list(q.parameters()), retain_graph=True),
            strict=True,
        )
    )
    body = torch.autograd.grad(fools, list(net.body.parameters()))
    assert not any(k.startswith("head.") for k in grads)
    assert all(torch.allclose(grads[f"{CRITIC}{k}"], g) for k, g in own.items())
    assert all(
        torch.allclose(grads[f"body.{k}"], g)
        for (k, _), g in zip(net.body.named_parameters(), body, strict=True)
    )
    with pytest.raises(ValueError, match="a source and a target"):
        adda(net, anchor, q)(phi, Batch(x[:1], batch.y[:1]))


def shifted(seed=0):
    """Two classes; the target's inputs are the source's, moved along a direction that tells nothing."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (2, 256), generator=g)
    x = torch.randn(2, 256, 4, generator=g)
    x[..., 0] += 4.0 * y - 2
    x[1, :, 1] += 3.0
    x[1, :, 0] += 2.0
    return Batch(x, torch.nn.functional.one_hot(y, 2).float())


@pytest.mark.parametrize("name", ["dann", "cdan", "jan"])
def test_alignment_helps_where_a_shift_is_all_there_is(name):
    data = shifted()
    torch.manual_seed(0)
    net = mlp(4, (16,), 2)
    q = nn.Sequential(nn.Linear(32 if name == "cdan" else 16, 16), nn.ReLU(), nn.Linear(16, 2))
    make = {"dann": lambda s: dann(q, s), "cdan": lambda s: cdan(q, s), "jan": lambda s: jan(s)}[
        name
    ]
    phi = {**parameters(net), **adversary(q)}
    adam = torch.optim.Adam

    def right(strength):
        def objective(step):
            penalty = make(strength * warm(step / 300))
            return joint(net, cross_entropy, (1, 0), [penalty])

        run = fit(
            objective, phi, lambda step: data, 300, lambda p: adam(p, lr=3e-3), progress=False
        )
        said = torch.func.functional_call(
            net, {k: v for k, v in run.params.items() if not k.startswith(CRITIC)}, (data.x[1],)
        )
        return (said.argmax(1) == data.y[1].argmax(1)).float().mean().item()

    assert right(1.0) > right(0.0) + 0.03
