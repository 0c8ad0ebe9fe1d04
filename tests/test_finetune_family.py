"""Adapting a trained model: each learner, pull and rate against its equation."""

from __future__ import annotations

import numpy as np
import problems
import pytest
import torch
from problems import normal, seeded
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.core import Batch, apply, features, load, parameters, risk
from mtlib.learners.finetune import (
    bss,
    delta,
    discriminative,
    finetune,
    fresh_head,
    gradual,
    l2_sp,
    layers,
    linear_probe,
    logistic_head,
    lp_ft,
)
from mtlib.learners.lora import lora, merged
from mtlib.nets import conv4, mlp


@pytest.fixture
def net():
    return seeded(lambda: mlp(4, (8, 6), 3))


@pytest.fixture
def support():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=g, dtype=torch.float64)
    return Batch(x, torch.eye(3, dtype=torch.float64).repeat(4, 1))


@pytest.fixture
def moved(net):
    return problems.moved(parameters(net), seed=2)


# Pulls ---------------------------------------------------------------------------------------


def test_l2_sp_is_the_formula_of_the_paper(net, moved, support):
    phi = parameters(net)
    body = sum(((moved[k] - phi[k]) ** 2).sum() for k in phi if k.startswith("body."))
    head = sum((moved[k] ** 2).sum() for k in phi if k.startswith("head."))
    value = l2_sp(0.7, head=0.3)(moved, phi, support.x)
    assert value.item() == pytest.approx((0.35 * body + 0.15 * head).item(), rel=1e-12)


def test_delta_measures_features(net, moved, support):
    z, phi = features(net), parameters(net)
    rows = ((z(moved, support.x) - z(phi, support.x)) ** 2).sum(1)
    assert delta(net, 3.0)(moved, phi, support.x).item() == pytest.approx(
        1.5 * rows.mean().item(), rel=1e-12
    )
    assert delta(net, 3.0)(phi, phi, support.x) == 0


@pytest.mark.parametrize("rows", [4, 12])  # fewer rows than features, and more
def test_bss_is_the_smallest_singular_values_squared(net, moved, support, rows):
    x = support.x[:rows]
    sigma = np.linalg.svd(features(net)(moved, x).numpy(), compute_uv=False)
    for k in (1, 2):
        value = bss(net, 2.0, smallest=k)(moved, parameters(net), x).item()
        assert value == pytest.approx(2 * (np.sort(sigma)[:k] ** 2).sum(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("make", [lambda net, s: l2_sp(s, head=0.0), delta, bss])
def test_a_pull_of_strength_zero_is_fine_tuning(net, support, make):
    phi = parameters(net)
    plain = finetune(net, cross_entropy, 0.1, 5).adapt(phi, support)
    held = finetune(net, cross_entropy, 0.1, 5, make(net, 0.0)).adapt(phi, support)
    assert all(torch.allclose(plain[k], held[k], rtol=0, atol=1e-14) for k in phi)


def test_a_pull_does_what_it_is_for(net, support):
    """The stronger, the nearer: parameters for L2-SP, features for DELTA; BSS shrinks the smallest σ."""
    phi, z = parameters(net), features(net)

    def after(pull):
        return finetune(net, cross_entropy, 0.05, 60, pull).adapt(phi, support)

    def distance(theta):
        return sum(((theta[k] - phi[k]) ** 2).sum() for k in phi if k.startswith("body.")).item()

    def drift(theta):
        return ((z(theta, support.x) - z(phi, support.x)) ** 2).sum().item()

    def smallest(theta):
        return torch.linalg.svdvals(z(theta, support.x))[-1].item()

    free = after(None)
    assert distance(after(l2_sp(2.0))) < distance(free) / 10
    assert drift(after(delta(net, 2.0))) < drift(free) / 10
    assert smallest(after(bss(net, 1.0))) < smallest(free)


# Heads ---------------------------------------------------------------------------------------


def test_lp_ft_without_steps_is_the_linear_probe_and_with_steps_goes_on_from_it(net, support):
    phi = parameters(net)
    probe = linear_probe(net, strength=0.1)
    said = probe.predict(probe.adapt(phi, support), support.x)
    still = lp_ft(net, cross_entropy, 0.1, 0, strength=0.1)
    assert torch.equal(still.predict(still.adapt(phi, support), support.x), said)
    on = lp_ft(net, cross_entropy, 0.1, 20, strength=0.1)
    theta = on.adapt(phi, support)
    assert risk(cross_entropy, on.predict(theta, support.x), support.y) < risk(
        cross_entropy, said, support.y
    )
    assert not torch.equal(theta["body.0.weight"], phi["body.0.weight"])


def test_lp_ft_needs_a_linear_head(net):
    net.head = nn.Linear(6, 3, bias=False)
    with pytest.raises(ValueError, match="one linear layer with a bias"):
        lp_ft(net, cross_entropy, 0.1, 1)


def test_with_a_zero_head_the_body_stands_still_in_the_first_step(net, support):
    phi = parameters(net)

    def body_moved(steps):
        learner = fresh_head(finetune(net, cross_entropy, 0.1, steps), net)
        theta = learner.adapt(learner.init(), support)
        return max((theta[k] - phi[k]).abs().max().item() for k in phi if k.startswith("body."))

    assert body_moved(1) == 0 < body_moved(2)


def test_a_fresh_head_forgets_phis_and_its_seed_decides(net, support):
    phi = parameters(net)
    other = {k: v + 1 if k.startswith("head.") else v for k, v in phi.items()}
    drawn = parameters(net)

    def answer(seed, start):
        learner = fresh_head(finetune(net, cross_entropy, 0.1, 2), net, seed)
        return learner.predict(learner.adapt(start, support), support.x)

    for seed in (None, 3):
        assert torch.equal(answer(seed, phi), answer(seed, other))
    assert not torch.equal(answer(3, phi), answer(4, phi))
    assert torch.equal(answer(3, phi), answer(3, phi))
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(net).values(), drawn.values(), strict=True)
    )


# Rates ---------------------------------------------------------------------------------------


def test_layers_run_from_the_first_to_the_head(net):
    assert layers(net) == [
        ["body.0.weight", "body.0.bias"],
        ["body.2.weight", "body.2.bias"],
        ["head.weight", "head.bias"],
    ]


def test_discriminative_rates_fall_by_the_factor(net, support):
    rates = discriminative(net, 0.1, factor=2.0)
    expected = {"body.0": 0.025, "body.2": 0.05, "head": 0.1}
    assert {k.rpartition(".")[0]: round(v.item(), 6) for k, v in rates.items()} == expected
    phi = parameters(net)
    once = finetune(net, cross_entropy, 1.0, 1).adapt(phi, support)
    slow = finetune(net, cross_entropy, rates, 1).adapt(phi, support)
    for k in phi:
        assert torch.allclose(slow[k] - phi[k], rates[k].double() * (once[k] - phi[k]), atol=1e-9)


def test_gradual_unfreezing_opens_a_layer_at_a_time_from_the_top(net, support):
    phi = parameters(net)
    rate = gradual(net, 0.1, every=2)
    moving = []
    for steps in (1, 2, 3, 4, 5):
        theta = finetune(net, cross_entropy, rate, steps).adapt(phi, support)
        moving.append({k.rpartition(".")[0] for k in phi if not torch.equal(theta[k], phi[k])})
    head, two = {"head"}, {"head", "body.2"}
    assert moving == [head, head, two, two, two | {"body.0"}]
    with pytest.raises(ValueError, match="every ≥ 1"):
        gradual(net, 0.1, 0)


# LoRA ----------------------------------------------------------------------------------------


def test_lora_starts_where_phi_is_and_moves_by_low_rank(support):
    torch.manual_seed(0)
    net = mlp(4, (8, 6), 3).double()
    learner = lora(net, cross_entropy, 0.5, 5, rank=2)
    phi = learner.init()
    f = apply(net)
    assert torch.equal(learner.predict(phi, support.x), f(parameters(net), support.x))
    theta = learner.adapt(phi, support)
    for k in ("body.0.weight", "body.2.weight"):
        assert torch.equal(theta[k], phi[k])
        change = merged(theta)[k] - phi[k]
        assert torch.linalg.matrix_rank(change) == 2
    assert torch.equal(theta["body.0.bias"], phi["body.0.bias"])
    assert not torch.equal(theta["head.weight"], phi["head.weight"])


def test_loras_first_step_is_the_gradient_through_the_projection(support):
    """B₁ = −α s G Aᵀ with G = ∂L/∂W, so that ΔW = −α s² G Aᵀ A, and A stands still."""
    torch.manual_seed(0)
    net = mlp(4, (8,), 3).double()
    learner = lora(net, cross_entropy, 0.3, 1, rank=2, scale=1.5)
    phi = learner.init()
    plain = parameters(net)
    step = finetune(net, cross_entropy, 1.0, 1).adapt(plain, support)
    g = plain["body.0.weight"] - step["body.0.weight"]
    theta = learner.adapt(phi, support)
    a = phi["lora.body.0.weight.a"]
    assert torch.equal(theta["lora.body.0.weight.a"], a)
    expected = plain["body.0.weight"] - 0.3 * 1.5**2 * g @ a.mT @ a
    assert torch.allclose(merged(theta, 1.5)["body.0.weight"], expected, rtol=0, atol=1e-12)


def test_merged_parameters_load_into_the_plain_network():
    torch.manual_seed(0)
    net = conv4(3, width=4, size=16)
    learner = lora(net, cross_entropy, 0.5, 3, rank=2)
    g = torch.Generator().manual_seed(1)
    support = Batch(torch.rand(6, 1, 16, 16, generator=g), torch.eye(3).repeat(2, 1))
    theta = learner.adapt(learner.init(), support)
    said = learner.predict(theta, support.x)
    assert torch.allclose(load(net, merged(theta))(support.x), said, atol=1e-5)


def test_lora_refuses_what_it_cannot_thin():
    net = nn.Sequential()
    net.body, net.head = nn.Identity(), nn.Linear(3, 2)
    with pytest.raises(ValueError, match="weights of two axes"):
        lora(net, mse_loss, 0.1, 1)
    with pytest.raises(ValueError, match="rank of at least 1"):
        lora(mlp(4, (8,), 2), mse_loss, 0.1, 1, rank=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_logistic_head_is_scikit_learns(classes):
    """Its probabilities are those of scikit-learn; weights of two are rows that stand twice."""
    z, y = normal(60, 4), torch.arange(60) % classes
    z = z + y[:, None]
    phi = logistic_head(z, y, 0.5)
    model = LogisticRegression(C=0.5, max_iter=5000).fit(z.numpy(), y.numpy())
    p = torch.softmax(z @ phi["head.weight"].mT + phi["head.bias"], 1)
    np.testing.assert_allclose(p.numpy(), model.predict_proba(z.numpy()), atol=1e-10)
    twice = logistic_head(torch.cat([z, z[:9]]), torch.cat([y, y[:9]]), 0.5)
    weight = torch.ones(60, dtype=torch.float64)
    weight[:9] = 2
    weighed = logistic_head(z, y, 0.5, weight)
    torch.testing.assert_close(weighed["head.weight"], twice["head.weight"], atol=1e-3, rtol=1e-3)
    assert logistic_head(z.float(), y)["head.bias"].dtype == torch.float32
    with pytest.raises(ValueError, match="each with a row"):
        logistic_head(z, y + 1)
