"""Law 3, and the objectives against written-out sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import convolutional, largest, seeded, vectors
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, secant
from mtlib.core import Batch, apply, features, load, net_state, over, parameters, start
from mtlib.joint import joint, own_columns, risks, toward
from mtlib.learners.closed_form import ridge, ridge_solution
from mtlib.learners.finetune import as_is, finetune, linear_probe
from mtlib.learners.gradient import anil, maml
from mtlib.learners.metric import class_means, protonet
from mtlib.nets import conv4, mlp
from mtlib.norm import calibrate
from mtlib.tasks import one_hot
from mtlib.train import fit
from mtlib.transfer.align import coral, covariance


@pytest.fixture
def net():
    return seeded(lambda: mlp(3, (8, 8), 2))


@pytest.fixture
def episode():
    return vectors()


def test_anil_is_maml_where_the_body_has_no_parameters(episode):
    net = nn.Sequential()
    net.body, net.head = nn.Identity(), seeded(lambda: nn.Linear(3, 2))
    a, b = (
        bilevel(m(net, mse_loss, 0.1, 3), mse_loss).value_and_grad(parameters(net), episode)
        for m in (anil, maml)
    )
    assert a[0] == b[0] and largest(a[1], b[1]) == 0


def test_reptile_with_one_step_is_joint_training(net, episode):
    learner = maml(net, mse_loss, 0.1, 1)
    a = bilevel(learner, mse_loss, secant).value_and_grad(learner.init(), episode)[1]
    b = joint(net, mse_loss).value_and_grad(learner.init(), episode.support)[1]
    assert largest(a, {k: 0.1 * g for k, g in b.items()}) <= 1e-12


def test_a_constant_rate_for_each_entry_is_maml(net, episode):
    """Meta-SGD's inner loop with equal rates."""
    rates = {k: torch.full_like(v, 0.1) for k, v in parameters(net).items()}
    a, b = (
        bilevel(maml(net, mse_loss, lr, 3), mse_loss).value_and_grad(parameters(net), episode)[1]
        for lr in (rates, 0.1)
    )
    assert largest(a, b) <= 1e-12


def test_fine_tuning_is_mamls_inner_loop_and_no_steps_are_none(net, episode):
    support = over(lambda d: d[0], episode.support)
    phi = parameters(net)
    a, b = (m(net, mse_loss, 0.1, 5).adapt(phi, support) for m in (finetune, maml))
    assert largest(a, b) == 0
    assert largest(maml(net, mse_loss, 0.1, 0).adapt(phi, support), phi) == 0


def test_l2_sp_of_strength_zero_is_fine_tuning_and_a_huge_one_stays(net, episode):
    phi = parameters(net)
    plain = joint(net, mse_loss).value_and_grad(phi, episode.support)
    zero = joint(net, mse_loss, penalties=[toward(phi, 0.0)]).value_and_grad(phi, episode.support)
    assert abs(plain[0] - zero[0]) <= 1e-12 and largest(plain[1], zero[1]) <= 1e-12
    moved = {k: v + 0.1 for k, v in phi.items()}
    objective = joint(net, mse_loss, penalties=[toward(phi, 3.0)])
    extra = objective(moved, episode.support) - joint(net, mse_loss)(moved, episode.support)
    assert extra.item() == pytest.approx(0.5 * 3.0 * 0.01 * sum(v.numel() for v in phi.values()))


def test_the_proximal_learner_solves_ridge_regression():
    """maml(strength=λ) run to the end: θ = argmin ½‖Xθ − y‖²/N + ½λ‖θ − φ‖², in closed form."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, 4), (9, 1)))
    net = nn.Linear(4, 1, bias=False).double()
    phi, strength = parameters(net), 0.7
    theta = maml(net, lambda p, t: 0.5 * mse_loss(p, t), 0.3, 2000, strength).adapt(
        phi, Batch(x, y)
    )
    a = x.T @ x / 9 + strength * torch.eye(4).double()
    exact = torch.linalg.solve(a, x.T @ y / 9 + strength * phi["weight"].T)
    assert (theta["weight"].T - exact).abs().max() <= 1e-10


def test_protonet_is_a_linear_classifier_and_lda(episode):
    """w = 2c, b = −‖c‖² up to a constant a row; and scikit-learn's LDA with a shared isotropic covariance."""
    net = seeded(lambda: mlp(3, (8,), 3))
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(3).repeat_interleave(5)
    x = torch.randn(15, 3, generator=g, dtype=torch.float64) + labels[:, None]
    query = torch.randn(20, 3, generator=g, dtype=torch.float64)
    learner = protonet(net)
    theta = learner.adapt(learner.init(), Batch(x, one_hot(labels, 3, torch.float64)))
    logits, c = learner.predict(theta, query), theta["prototypes"]
    z = features(net)(theta, query)
    linear = z @ (2 * c).T - (c**2).sum(1)
    assert (logits.log_softmax(1) - linear.log_softmax(1)).abs().max() <= 1e-12
    # LDA whose covariance is I/2 has the discriminant −‖z − c‖² (equal priors)
    zs = features(net)(theta, x)
    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=_Fixed(np.eye(8) / 2))
    lda.fit(zs.numpy(), labels.numpy())
    assert np.abs(lda.predict_proba(z.numpy()) - logits.softmax(1).numpy()).max() <= 1e-10


class _Fixed:
    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, x):
        return self


def test_class_means_with_unequal_shots():
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    means = class_means(z, torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert means.tolist() == [[1.0, 0.0], [5.0, 5.0]]


def test_the_linear_probe_is_scikit_learns_logistic_regression():
    net = seeded(lambda: mlp(3, (8,), 3))
    g = torch.Generator().manual_seed(4)
    labels = torch.arange(3).repeat_interleave(8)
    x = torch.randn(24, 3, generator=g, dtype=torch.float64) + labels[:, None]
    learner = linear_probe(net, cross_entropy, strength=0.1, iterations=500)
    theta = learner.adapt(learner.init(), Batch(x, one_hot(labels, 3, torch.float64)))
    z = features(net)(theta, x).numpy()
    reference = LogisticRegression(C=1 / (0.1 * 24), tol=1e-12, max_iter=5000).fit(
        z, labels.numpy()
    )
    ours = learner.predict(theta, x).softmax(1).numpy()
    assert np.abs(ours - reference.predict_proba(z)).max() <= 1e-5


# The joint objective --------------------------------------------------------------------------


def test_joint_is_the_weighted_sum_of_its_parts(net, episode):
    phi, batch, f = parameters(net), episode.query, apply(net)
    parts = torch.stack([mse_loss(f(phi, batch.x[t]), batch.y[t]) for t in range(4)])
    assert joint(net, mse_loss)(phi, batch) == pytest.approx(parts.mean().item())
    weights = [0.5, 0.0, 2.0, 1.0]
    expected = torch.tensor(weights).double() @ parts
    for chunk in (1, 3, None):
        value, grads = joint(net, mse_loss, weights, chunk=chunk).value_and_grad(phi, batch)
        assert value == pytest.approx(expected.item())
        reference = joint(
            net, mse_loss, weights, penalties=[lambda th, z, a: 0 * z.sum()]
        ).value_and_grad(phi, batch)
        assert largest(grads, reference[1]) <= 1e-12


def test_risks_are_the_parts_and_own_columns_are_heads_of_their_own(episode):
    net = seeded(lambda: mlp(3, (8,), 2 + 3))
    g = torch.Generator().manual_seed(0)
    first = one_hot(torch.randint(2, (6,), generator=g), 5, torch.float64)
    second = one_hot(2 + torch.randint(3, (6,), generator=g), 5, torch.float64)
    batch = Batch(episode.query.x[:2], torch.stack([first, second]))
    columns = own_columns((2, 3))
    assert columns == [slice(0, 2), slice(2, 5)]
    phi, f = parameters(net), apply(net)
    parts = [
        cross_entropy(f(phi, x)[:, c], y[:, c]) for x, y, c in zip(*batch, columns, strict=True)
    ]
    assert torch.allclose(risks(net, cross_entropy, columns)(phi, batch), torch.stack(parts))
    objective = joint(net, cross_entropy, (0.3, 0.7), columns=columns)
    value, grads = objective.value_and_grad(phi, batch)
    assert value.item() == pytest.approx((0.3 * parts[0] + 0.7 * parts[1]).item())
    alone = joint(net, cross_entropy, (0.3, 0.0), columns=columns).value_and_grad(phi, batch)[1]
    assert alone["head.weight"][2:].abs().max() == 0 < grads["head.weight"][2:].abs().max()
    with pytest.raises(ValueError, match="columns of each data set"):
        joint(net, cross_entropy, columns=columns[:1])(phi, batch)


def test_coral_is_the_formula_of_the_paper():
    """C = (DᵀD − (1ᵀD)ᵀ(1ᵀD)/n)/(n − 1); ‖C_s − C_t‖²_F / (4d²)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 7, 3, generator=g, dtype=torch.float64)

    def c(d):
        one = torch.ones(1, len(d), dtype=torch.float64)
        return (d.T @ d - (one @ d).T @ (one @ d) / len(d)) / (len(d) - 1)

    expected = ((c(z[0]) - c(z[1])) ** 2).sum() / (4 * 9)
    assert coral()(None, z, None).item() == pytest.approx(expected.item(), rel=1e-12)
    assert coral(2.5)(None, z, None).item() == pytest.approx(2.5 * expected.item(), rel=1e-12)
    assert np.abs(covariance(z[0]).numpy() - np.cov(z[0].numpy().T)).max() <= 1e-12
    assert (
        coral()(None, torch.stack([z[0], z[0] + 5]), None).abs() <= 1e-20
    )  # a shift of the mean is not seen


def test_coral_draws_two_domains_together():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 4, generator=g) * torch.tensor([1.0, 3.0])[:, None, None]
    y = one_hot((x[..., 0] > 0).long(), 2)
    torch.manual_seed(0)
    net = mlp(4, (8,), 2)
    gaps = []
    for strength in (0.0, 100.0):
        objective = joint(net, cross_entropy, (1, 0), [coral(strength)])
        run = fit(objective, parameters(net), lambda step: Batch(x, y), 400, progress=False)
        z = torch.stack([features(net)(run.params, d) for d in x])
        gaps.append(coral()(None, z, None).item())
    assert gaps[1] < gaps[0] / 5


# Networks -------------------------------------------------------------------------------------


def test_relu_after_the_pool_and_no_bias_change_nothing():
    net = convolutional()
    x = torch.rand(5, 1, 16, 16, dtype=torch.float64)
    z = x
    for conv, norm, pool, relu in list(net.body)[1:5]:
        w = nn.functional.conv2d(z, conv.weight, torch.full((4,), 0.7).double(), padding=1)
        z = pool(relu(norm(w)))
    assert (z.flatten(1) - features(net)(parameters(net), x)).abs().max() <= 1e-12


def test_stored_statistics_are_written_by_calibrate_alone_and_free_an_image_from_its_batch():
    torch.manual_seed(0)
    net = conv4(3, width=4, size=16, statistics="stored").double()
    batches = [torch.rand(8, 1, 16, 16, dtype=torch.float64) for _ in range(3)]
    phi = parameters(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ready = calibrate(net, phi, batches)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(phi["body.1.1.running_mean"], torch.zeros(4).double())
    f, x = apply(net), batches[0]
    assert (f(ready, x)[:1] - f(ready, x[:1])).abs().max() <= 1e-12
    # one batch: the same numbers as that batch's own statistics
    alone, batch = calibrate(net, phi, batches[:1]), conv4(3, width=4, size=16).double()
    assert (f(alone, x) - apply(batch)(phi, x)).abs().max() <= 1e-10


def test_trained_parameters_load_back_into_the_plain_module(net):
    phi = {k: v + 1 for k, v in parameters(net).items()}
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = apply(net)(phi, x)
    assert not torch.equal(net(x), expected)
    assert torch.equal(load(net, phi)(x), expected)
    trained = phi | {"critic.weight": torch.ones(2)}
    assert set(net_state(net, trained)) == set(net.state_dict())
    with pytest.raises(ValueError, match=r"\['critic.weight'\] have no place"):
        load(net, trained)


def test_start_carries_the_body_and_reports_everything():
    torch.manual_seed(0)
    big, small = mlp(3, (8,), 50), mlp(3, (8,), 5)
    trained = {k: v + 1 for k, v in parameters(big).items()}
    begun = start(as_is(small), trained)
    assert begun.copied == ("body.0.weight", "body.0.bias") and begun.fresh == (
        "head.weight",
        "head.bias",
    )
    assert begun.left == ("head.weight", "head.bias")
    assert all(torch.equal(begun.params[k], trained[k]) for k in begun.copied)
    assert begun.params["head.weight"].shape == (5, 8)
    assert start(protonet(small), trained).fresh == ()


@pytest.mark.parametrize("rows", [5, 40])
def test_ridge_is_scikit_learns_on_what_the_head_leaves_over(rows):
    net = seeded(lambda: mlp(3, (8, 8), 2))
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (3, 2))
    learner = ridge(net, strength=0.7)
    phi = learner.init()
    theta = learner.adapt(phi, Batch(x, y))
    z = features(net)(phi, x)
    z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    left = y - apply(net)(phi, x)
    solver = Ridge(alpha=0.7, fit_intercept=False, tol=1e-12).fit(z.numpy(), left.numpy())
    expected = apply(net)(phi, x) + torch.from_numpy(z.numpy() @ solver.coef_.T)
    assert (learner.predict(theta, x) - expected).abs().max() <= 1e-10
    assert (
        largest({k: theta[k] for k in phi if "body" in k}, {k: phi[k] for k in phi if "body" in k})
        == 0
    )


def test_ridge_stays_at_phi_where_its_strength_is_large(episode):
    net = seeded(lambda: mlp(3, (8, 8), 2))
    a = bilevel(ridge(net, strength=1e14), mse_loss)(ridge(net, 1e14).init(), episode)
    b = bilevel(as_is(net), mse_loss)(parameters(net), episode)
    assert abs(a - b) <= 1e-10


@pytest.mark.parametrize("columns", [3, 7])
def test_ridge_solves_its_normal_equations(columns):
    """Fewer columns than rows, and more: (ZᵀZ + λI) V = ZᵀY."""
    g = torch.Generator().manual_seed(3)
    z, y = (torch.randn(5, k, generator=g, dtype=torch.float64) for k in (columns, 2))
    v = ridge_solution(z, y, torch.tensor(0.3, dtype=torch.float64))
    assert (z.mT @ (z @ v) + 0.3 * v - z.mT @ y).abs().max() <= 1e-12
