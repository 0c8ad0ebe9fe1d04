"""Bi-level problems beside meta-learning: closed forms, finite differences, identities, the page's choices."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.datasets
import torch
from pages import run_until
from problems import normal, seeded
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, load, over, parameters
from mtlib.learners.finetune import finetune
from mtlib.learners.hyper import distilled, flat, reweighted, unflat, weight_decay
from mtlib.nets import mlp


class Blocks(nn.Module):
    """x -> left(x[:2]) + right(x[2:])"""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self.left(x[:, :2]) + self.right(x[:, 2:])


def regression(tasks=1, rows=12, inputs=5):
    x, y = normal(tasks, 2 * rows, inputs), normal(tasks, 2 * rows, 1, seed=1)
    return Episode(Batch(x[:, :rows], y[:, :rows]), Batch(x[:, rows:], y[:, rows:]))


def classes(tasks=1, rows=8):
    x, y = normal(tasks, 2 * rows, 4), torch.eye(3).double()[torch.arange(2 * rows) % 3]
    y = y.expand(tasks, -1, -1)
    return Episode(Batch(x[:, :rows], y[:, :rows]), Batch(x[:, rows:], y[:, rows:]))


def net(seed=0):
    return seeded(lambda: mlp(4, (6,), 3), seed)


def slopes(objective, phi, data, eps=1e-5):
    """Central differences, one entry at a time."""
    found = {}
    for k, v in phi.items():
        rows = []
        for i in range(v.numel()):
            step = torch.zeros(v.numel(), dtype=v.dtype)
            step[i] = eps
            step = step.view_as(v)
            up, down = (objective({**phi, k: v + s}, data) for s in (step, -step))
            rows.append((up - down) / (2 * eps))
        found[k] = torch.stack(rows).view_as(v)
    return found


# A decay for each layer -----------------------------------------------------------------------


def test_the_hypergradient_of_the_decays_equals_its_closed_form():
    """θ* = A⁻¹ 2Xᵀy/N, A = 2XᵀX/N + Λ;  dF/d log λ_k = −λ_k θ_kᵀ (A⁻¹ ∇L^Q)_k."""
    episode = regression()
    (x, y), (xq, yq) = over(lambda d: d[0], episode)
    phi = {
        "decay.left.weight": torch.tensor(-0.7).double(),
        "decay.right.weight": torch.tensor(-1.9).double(),
    }
    decay = torch.cat([v.exp().expand(n) for v, n in zip(phi.values(), (2, 3), strict=True)])
    a = 2 * x.mT @ x / len(x) + torch.diag(decay)
    w = torch.linalg.solve(a, 2 * x.mT @ y / len(x))
    outer = torch.linalg.solve(a, 2 * xq.mT @ (xq @ w - yq) / len(xq))
    each = -(decay * w[:, 0] * outer[:, 0])
    learner = weight_decay(Blocks().double(), mse_loss, 0.15, 800)
    value, grads = bilevel(learner, mse_loss).value_and_grad(phi, episode)
    assert abs(value - ((xq @ w - yq) ** 2).mean()) <= 1e-9
    assert abs(grads["decay.left.weight"] - each[:2].sum()) <= 1e-9
    assert abs(grads["decay.right.weight"] - each[2:].sum()) <= 1e-9


def test_a_vanishing_decay_is_fine_tuning_from_the_same_start():
    network, (support, query) = net(), over(lambda d: d[0], classes())
    plain, bare = (
        weight_decay(network, cross_entropy, 0.1, 5, 1e-30),
        finetune(network, cross_entropy, 0.1, 5),
    )
    a = plain.predict(plain.adapt(plain.init(), support), query.x)
    b = bare.predict(bare.adapt(parameters(network), support), query.x)
    assert (a - b).abs().max() <= 1e-12


def test_biases_have_no_decay_and_the_result_loads_into_the_module():
    network, support = net(), over(lambda d: d[0], classes().support)
    learner = weight_decay(network, cross_entropy, 0.1, 3)
    assert set(learner.init()) == {"decay.body.0.weight", "decay.head.weight"}
    theta = learner.adapt(learner.init(), support)
    said = learner.predict(theta, support.x)
    assert (load(network, theta)(support.x) - said).abs().max() <= 1e-12


# A weight for each example --------------------------------------------------------------------


def test_weights_give_weighted_ridge():
    """θ* = (2 Xᵀ diag(w) X + λI)⁻¹ 2 Xᵀ diag(w) y."""
    (x, y), _ = over(lambda d: d[0], regression())
    learner = reweighted(Blocks().double(), mse_loss, 0.1, 3000, len(x), decay=0.3)
    phi = {"example.logit": normal(len(x), seed=5)}
    w = torch.diag(phi["example.logit"].softmax(0))
    exact = torch.linalg.solve(2 * x.mT @ w @ x + 0.3 * torch.eye(5).double(), 2 * x.mT @ w @ y)
    theta = learner.adapt(phi, Batch(x, y))
    assert (flat(theta) - exact[:, 0]).abs().max() <= 1e-9


def test_uniform_weights_are_the_plain_mean():
    network, (support, query) = net(), over(lambda d: d[0], classes())
    ours = reweighted(network, cross_entropy, 0.1, 5, len(support.y))
    bare = finetune(network, cross_entropy, 0.1, 5)
    a = ours.predict(ours.adapt(ours.init(), support), query.x)
    b = bare.predict(bare.adapt(parameters(network), support), query.x)
    assert (a - b).abs().max() <= 1e-12


def test_rows_and_weights_may_be_reordered_together():
    support = over(lambda d: d[0], classes().support)
    learner = reweighted(net(), cross_entropy, 0.1, 3, len(support.y))
    logit, order = normal(len(support.y), seed=3), torch.randperm(len(support.y))
    a = learner.adapt({"example.logit": logit}, support)
    b = learner.adapt({"example.logit": logit[order]}, over(lambda d: d[order], support))
    assert (flat(a) - flat(b)).abs().max() <= 1e-12


# Distilled examples ---------------------------------------------------------------------------


def distilling(tasks=1):
    """A learner of six distilled examples, and episodes of networks."""
    g = torch.Generator().manual_seed(7)
    count = flat(parameters(net())).numel()
    begin = 0.3 * torch.randn(tasks, 1, count, generator=g, dtype=torch.float64)
    support = Batch(begin, torch.zeros(tasks, 1, 1).double())
    seeds = Batch(normal(6, 4, seed=8), torch.eye(3).double().repeat(2, 1))
    learner = distilled(net(), cross_entropy, 0.2, 4, seeds)
    return learner, Episode(support, classes(tasks).query), seeds


def test_examples_not_moved_are_fine_tuning_on_them():
    learner, episode, seeds = distilling()
    begin = unflat(episode.support.x[0, 0], parameters(net()))
    bare = finetune(net(), cross_entropy, 0.2, 4)
    a = learner.adapt(learner.init(), over(lambda d: d[0], episode.support))
    assert (flat(a) - flat(bare.adapt(begin, seeds))).abs().max() <= 1e-12


def test_flat_and_unflat_are_inverse_and_a_wrong_length_is_refused():
    params = parameters(net())
    again = unflat(flat(params), params)
    assert all(torch.equal(again[k], params[k]) for k in params) and list(again) == list(params)
    with pytest.raises(ValueError, match=r"expected a start of 51 numbers.*got 50"):
        unflat(flat(params)[1:], params)


# All three ------------------------------------------------------------------------------------

EVERY = {
    "weight_decay": lambda t: (weight_decay(net(), cross_entropy, 0.1, 4, 0.1), classes(t)),
    "reweighted": lambda t: (reweighted(net(), cross_entropy, 0.1, 4, 8, decay=0.1), classes(t)),
    "distilled": lambda t: distilling(t)[:2],
}


@pytest.mark.parametrize("name", EVERY)
def test_hypergradients_agree_with_finite_differences(name):
    learner, episode = EVERY[name](2)
    objective, phi = bilevel(learner, cross_entropy), learner.init()
    grads = objective.value_and_grad(phi, episode)[1]
    expected = slopes(objective, phi, episode)
    assert grads.keys() == phi.keys()
    for k in phi:
        assert (grads[k] - expected[k]).abs().max() <= 1e-6 and grads[k].abs().max() > 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_vmap_equals_the_loop_and_inputs_stay(name):
    learner, episode = EVERY[name](3)
    phi = learner.init()
    kept = [v.clone() for v in (*phi.values(), *episode.support, *episode.query)]
    one, many = (
        bilevel(learner, cross_entropy, chunk=c).value_and_grad(phi, episode) for c in (1, 3)
    )
    assert abs(one[0] - many[0]) <= 1e-12
    assert all((one[1][k] - many[1][k]).abs().max() <= 1e-12 for k in phi)
    for before, after in zip(kept, (*phi.values(), *episode.support, *episode.query), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtype(name, dtype):
    learner, episode = EVERY[name](1)
    phi = {k: v.to(dtype) for k, v in learner.init().items()}
    support, query = over(lambda d: d[0].to(dtype), episode)
    said = learner.predict(learner.adapt(phi, support), query.x)
    assert said.shape == query.y.shape and said.dtype == dtype


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="expected decay > 0"):
        weight_decay(net(), cross_entropy, 0.1, 1, decay=0.0)
    learner = reweighted(net(), cross_entropy, 0.1, 1, 5)
    with pytest.raises(ValueError, match="expected 5 support rows"):
        learner.adapt(learner.init(), over(lambda d: d[0], classes().support))
    with pytest.raises(ValueError, match="expected parameters named"):
        weight_decay(net(), cross_entropy, 0.1, 1).adapt({}, classes().support)


# The page -------------------------------------------------------------------------------------


def test_nothing_on_the_page_is_chosen_with_test_labels(small):
    plain = sklearn.datasets.load_digits()

    def run(used):
        raw = sklearn.utils.Bunch(**plain)
        raw.target = plain.target.copy()
        order = np.random.default_rng([0, 77]).permutation(len(raw.target))
        raw.target[order[used:]] = (raw.target[order[used:]] + 3) % 10
        small.setattr(sklearn.datasets, "load_digits", lambda: raw)
        page = run_until("problems", "DISTILLED")
        single, phi = page["CHOSEN"]["alone", 0]
        learned = page["LEARNED"][page["CLEAN"][1], 0]
        images = page["DISTILLED"][0]
        return single, [*phi.values(), *learned.values(), *images.values()]

    whole = len(plain.target)
    before, after = run(whole), run(1200)  # no problem trains or validates on more than 1200
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    changed = run(50)  # labels of training images do count
    assert not all(torch.equal(a, b) for a, b in zip(before[1], changed[1], strict=True))
