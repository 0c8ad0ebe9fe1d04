"""Training for an unseen domain: penalties by hand, gradients by differences, joint training at strength 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import assert_close, classified, half_mse, slope_gap
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, parameters
from mtlib.joint import joint, risks
from mtlib.nets import mlp
from mtlib.tasks import one_hot
from mtlib.train import fit
from mtlib.transfer.unseen import (
    domain_mixup,
    group_dro,
    group_weights,
    held_out,
    irm,
    mixup,
    mldg,
    scale_slope,
    vrex,
)


def smooth(inputs=4, outputs=3):
    parts = [nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return nn.Sequential(*parts).double()


def constant(batch):
    return lambda step: batch


def checked(objective, phi, data, tolerance=1e-7):
    """The gradient agrees with central differences along three directions."""
    _, grads = objective.value_and_grad(phi, data)
    for seed in range(3):
        assert slope_gap(objective, phi, data, grads, seed) < tolerance


def test_irm_on_a_linear_model_by_hand():
    # f(x) = 2x at x = 1, y = 1 and 3: L = (½, ½), dL/dw = (f − y) f = (2, −2), squares 4
    net, phi = nn.Linear(1, 1, bias=False).double(), {"weight": torch.full((1, 1), 2.0).double()}
    batch = Batch(torch.ones(2, 1, 1).double(), torch.tensor([[[1.0]], [[3.0]]]).double())
    value, grads = irm(net, half_mse, 10.0).value_and_grad(phi, batch)
    assert torch.isclose(value, torch.tensor(0.5 + 10 * 4).double())
    # d/dθ of mean_t [½(θ − y)² + λ (θ² − yθ)²] = mean[(θ − y) + 2λ (θ² − yθ)(2θ − y)]
    by_hand = ((2 - 1) + 20 * 2 * 3 + (2 - 3) + 20 * (-2) * 1) / 2
    assert torch.isclose(grads["weight"].squeeze(), torch.tensor(by_hand).double())


def test_irm_penalty_is_the_slope_by_scale():
    net, batch = classified(smooth)
    y = batch.y[0]
    prediction = net(batch.x[0]).detach()
    level, slope = scale_slope(cross_entropy, prediction, y)
    up, down = (cross_entropy(w * prediction, y) for w in (1 + 1e-6, 1 - 1e-6))
    assert torch.isclose(level, cross_entropy(prediction, y))
    assert abs(slope - (up - down) / 2e-6) < 1e-8


@pytest.mark.parametrize("make", [irm, vrex])
def test_penalties_have_the_right_gradient(make):
    net, batch = classified(smooth)
    checked(make(net, cross_entropy, 3.0), parameters(net), batch, 1e-6)


def test_vrex_value():
    net, batch = classified(smooth)
    values = risks(net, cross_entropy)(parameters(net), batch).detach()
    expected = values.mean() + 5 * ((values - values.mean()) ** 2).mean()
    assert torch.isclose(vrex(net, cross_entropy, 5.0)(parameters(net), batch), expected)


def test_group_dro_with_sgd_is_the_exponentiated_gradient():
    net, batch = classified(smooth)
    phi = {**parameters(net), "group.logits": torch.tensor([0.5, -0.2, 0.0]).double()}
    values = risks(net, cross_entropy)(phi, batch).detach()
    q = torch.softmax(phi["group.logits"], 0)
    eta = 0.3

    def sgd(leaves):
        *others, gamma = leaves
        groups = [{"params": others, "lr": 0.1}, {"params": [gamma], "lr": eta}]
        return torch.optim.SGD(groups)

    run = fit(group_dro(net, cross_entropy), phi, constant(batch), 1, sgd, progress=False)
    expected = q * (eta * values).exp()
    assert torch.allclose(torch.softmax(run.params["group.logits"], 0), expected / expected.sum())
    weighted = joint(net, cross_entropy, q.tolist()).value_and_grad(parameters(net), batch)[1]
    assert_close(run.params, {k: phi[k] - 0.1 * weighted[k] for k in weighted})


def test_group_dro_asks_for_its_entries():
    net, batch = classified(smooth)
    with pytest.raises(ValueError, match="group_weights"):
        group_dro(net, cross_entropy)({**parameters(net), **group_weights(2)}, batch)


def test_held_out_parts_the_domains():
    x = torch.arange(3.0)[:, None, None].expand(3, 2, 1)
    stream = held_out(constant(Batch(x, x)), seed=0)
    outs = set()
    for step in range(20):
        support, query = stream(step)
        assert support.x.shape == (1, 4, 1) and query.x.shape == (1, 2, 1)
        outs.add(query.x[0, 0, 0].item())
        assert query.x[0, 0, 0] not in support.x and torch.equal(query.x, query.y)
        assert torch.equal(stream(step).query.x, query.x)
    assert outs == {0.0, 1.0, 2.0}
    with pytest.raises(ValueError, match="at least 2 domains"):
        held_out(constant(Batch(x[:1], x[:1])), seed=0)(0)


def test_mldg_gradient_equals_finite_differences():
    net, batch = classified(smooth)
    episode = held_out(constant(batch), seed=0)(0)
    checked(mldg(net, cross_entropy, 0.3, 0.7), parameters(net), episode)


def test_mldg_is_its_taylor_expansion_to_first_order_in_the_rate():
    net, batch = classified(smooth)
    phi, strength = parameters(net), 0.7
    episode = held_out(constant(batch), seed=0)(0)
    f = joint(net, cross_entropy)

    def inner(p):  # ∇L^S · ∇L^Q
        g = [torch.func.grad(lambda q, part=part: f(q, part))(p) for part in episode]
        return sum((g[0][k] * g[1][k]).sum() for k in p)

    _, gs = f.value_and_grad(phi, episode.support)
    _, gq = f.value_and_grad(phi, episode.query)
    product = torch.func.grad(inner)(phi)

    def rest(lr):
        _, g = mldg(net, cross_entropy, lr, strength).value_and_grad(phi, episode)
        first = {k: gs[k] + strength * gq[k] - lr * strength * product[k] for k in phi}
        return max((g[k] - first[k]).abs().max().item() for k in phi)

    assert (
        rest(1e-2) < 1e-4 and 80 < rest(1e-2) / rest(1e-3) < 120
    )  # what is left is of second order


def test_mixup_by_hand_and_on_average():
    x = torch.tensor([[[0.0], [1.0]], [[4.0], [7.0]]]).double()
    batch = Batch(x, torch.cat([x, -x], -1))
    stream = mixup(constant(batch), strength=0.4, seed=0)
    draws = [stream(step) for step in range(4000)]
    for d in draws[:20]:
        assert torch.allclose(d.y, torch.cat([d.x, -d.x], -1))  # one share for x and y
    assert torch.equal(stream(7).x, draws[7].x) and not torch.equal(draws[7].x, draws[8].x)
    mean = torch.stack([d.x for d in draws]).mean(0)
    assert torch.allclose(mean, x / 2 + x.mean() / 2, atol=0.1)  # E λ = ½
    spread = torch.stack([d.x for d in draws]).flatten(1)
    rng = np.random.default_rng(1)
    share, j = rng.beta(0.4, 0.4, 100_000), rng.integers(4, size=100_000)
    by_hand = share * 7 + (1 - share) * x.flatten().numpy()[j]
    assert abs(spread[:, 3].std().item() - by_hand.std()) < 0.1
    with pytest.raises(ValueError, match="at least 0"):
        mixup(constant(batch), -1.0, 0)


def test_domain_mixup_mixes_two_domains_with_one_share_a_pair():
    one_hot_domains = torch.eye(3).double()[:, None].expand(3, 4, 3)  # x says of which domain it is
    stream = domain_mixup(constant(Batch(one_hot_domains, one_hot_domains)), 0.7, seed=0)
    partners, shares = set(), []
    for step in range(200):
        x, y = stream(step)
        assert torch.equal(x, y) and torch.equal(x, x[:, :1].expand_as(x))  # one share a pair
        own = x[:, 0].diagonal()
        assert ((x[:, 0] > 0).sum(1) == 2).all() and torch.allclose(x[:, 0].sum(1), own * 0 + 1)
        other = (x[:, 0] - own.diag()).argmax(1).tolist()
        assert sorted(other) == [0, 1, 2] and all(t != other[t] for t in range(3))
        partners.add(tuple(other))
        shares += own.tolist()
        assert torch.equal(stream(step).x, x)
    assert partners == {(1, 2, 0), (2, 0, 1)}  # both ways round the ring
    assert len({round(s, 9) for s in shares}) == len(shares)  # a share for each pair
    beta = np.random.default_rng(1).beta(0.7, 0.7, 100_000)
    assert abs(np.mean(shares) - 0.5) < 0.05 and abs(np.std(shares) - beta.std()) < 0.03


def test_domain_mixup_is_the_loss_that_domainbed_sums():
    # λ CE(f(x̃), y_i) + (1 − λ) CE(f(x̃), y_j), summed over the pairs and divided by T
    net, batch = classified(smooth)
    marked = Batch(
        batch.x, torch.cat([batch.y, torch.eye(3).double()[:, None].expand(3, 8, 3)], -1)
    )
    x, y = domain_mixup(constant(marked), 0.4, seed=1)(5)
    total = torch.zeros(()).double()
    for t in range(3):
        weights = y[t, 0, 3:]  # of the domains, read from the mark
        lam, other = weights[t], int((weights - weights[t] * torch.eye(3)[t]).argmax())
        mixed = lam * batch.x[t] + (1 - lam) * batch.x[other]
        assert torch.allclose(x[t], mixed)
        logits = net(mixed)
        total += lam * cross_entropy(logits, batch.y[t].argmax(1))
        total += (1 - lam) * cross_entropy(logits, batch.y[other].argmax(1))
    ours = joint(net, cross_entropy)(parameters(net), Batch(x, y[..., :3]))
    assert torch.isclose(ours, total / 3)


def test_all_are_joint_training_at_strength_zero():
    net, batch = classified(smooth)
    phi = parameters(net)
    value, plain = joint(net, cross_entropy).value_and_grad(phi, batch)
    for make in (irm, vrex):
        same, grads = make(net, cross_entropy, 0.0).value_and_grad(phi, batch)
        assert torch.isclose(same, value)
        assert_close(grads, plain)
    begin = {**phi, "group.logits": torch.zeros(3).double()}
    same, grads = group_dro(net, cross_entropy).value_and_grad(begin, batch)
    assert torch.isclose(same, value)
    assert_close(grads, plain)
    assert mixup(constant(batch), 0.0, 0)(0) is batch
    assert domain_mixup(constant(batch), 0.0, 0)(0) is batch
    episode = held_out(constant(batch), seed=0)(0)
    same, grads = mldg(net, cross_entropy, 0.5, 0.0).value_and_grad(phi, episode)
    value, plain = joint(net, cross_entropy).value_and_grad(phi, episode.support)
    assert torch.isclose(same, value)
    assert_close({k: grads[k] for k in plain}, plain)


def test_they_train_a_network():
    torch.manual_seed(0)
    net = mlp(4, (8,), 3)
    x = torch.randn(2, 30, 4)
    batch = Batch(x, one_hot(x[..., :3].argmax(-1), 3))
    plain = constant(batch)
    for objective, stream, entries in (
        (irm(net, cross_entropy, 0.1), plain, {}),
        (vrex(net, cross_entropy, 0.1), plain, {}),
        (group_dro(net, cross_entropy), plain, group_weights(2)),
        (mldg(net, cross_entropy, 0.1, 1.0), held_out(plain, 0), {}),
        (joint(net, cross_entropy), mixup(plain, 0.2, 0), {}),
        (joint(net, cross_entropy), domain_mixup(plain, 0.2, 0), {}),
    ):
        sgd = lambda leaves: torch.optim.SGD(leaves, lr=0.3)  # noqa: E731
        run = fit(objective, {**parameters(net), **entries}, stream, 40, sgd, progress=False)
        assert run.losses[-1] < 0.8 * run.losses[0]
