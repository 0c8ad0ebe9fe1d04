"""Bi-level problems beside meta-learning: closed forms, finite differences, identities, the page's choices."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import sklearn.datasets
import torch
from pages import run_until
from problems import normal, seeded
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.book.checks import gradient, hessian
from mtlib.core import Batch, Episode, load, over, parameters
from mtlib.evaluate import accuracy, best_of
from mtlib.learners.finetune import finetune
from mtlib.learners.gradient import descend
from mtlib.learners.hyper import (
    distilled,
    flat,
    new_networks,
    reweighted,
    unflat,
    weight_decay,
    weighted_ridge,
)
from mtlib.nets import mlp
from mtlib.tasks import one_hot
from mtlib.train import cosine_adam, fit


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


# Solved exactly ---------------------------------------------------------------------------------

GROUPS = torch.tensor([0, 0, 1, 2])


def solved(rows=8, groups=GROUPS):
    """`weighted_ridge` whose φ begins in float64."""
    learner = weighted_ridge(groups, rows, 0.1)
    return learner._replace(init=lambda: over(torch.Tensor.double, learner.init()))


def objective_of(phi, data):
    """G(θ): the weighted error and half the decays times the squared weights, written out."""
    w, decay = phi["example.logit"].softmax(0), phi["decay.group"].exp()[GROUPS]

    def g(theta):
        error = data.x @ theta["weight"].mT + theta["bias"] - data.y
        return w @ (error**2).mean(1) + 0.5 * (decay * theta["weight"] ** 2).sum()

    return g


def some_phi():
    return {"decay.group": normal(3, seed=4), "example.logit": normal(8, seed=5)}


def test_weighted_ridge_ends_where_the_gradient_of_its_objective_is_zero():
    support = over(lambda d: d[0], classes().support)
    theta = solved().adapt(some_phi(), support)
    assert gradient(objective_of(some_phi(), support), theta).abs().max() <= 1e-12


def test_its_hypergradient_is_the_implicit_formula():
    """dF/dφ = −∂²G/∂φ∂θ (∂²G/∂θ²)⁻¹ ∇L^Q(θ*)."""
    episode, phi = classes(), some_phi()
    support, query = over(lambda d: d[0], episode)
    theta = solved().adapt(phi, support)
    outer = gradient(lambda th: mse_loss(query.x @ th["weight"].mT + th["bias"], query.y), theta)
    mixed = torch.func.jacrev(lambda p: gradient(objective_of(p, support), theta))(phi)
    back = torch.linalg.solve(hessian(objective_of(phi, support), theta), outer)
    grads = bilevel(solved(), mse_loss).value_and_grad(phi, episode)[1]
    for k in phi:
        assert (grads[k] + back @ mixed[k]).abs().max() <= 1e-12 < grads[k].abs().max()


def test_with_one_group_and_equal_weights_it_is_the_end_of_weight_decay():
    support = over(lambda d: d[0], classes().support)
    linear = nn.Linear(4, 3).double()
    far = weight_decay(linear, mse_loss, 0.5, 2000, 0.3)
    theta, ridge = far.adapt(far.init(), support), weighted_ridge(torch.zeros(4).long(), 8, 0.3)
    exact = ridge.adapt(over(torch.Tensor.double, ridge.init()), support)
    assert max((theta[k] - exact[k]).abs().max() for k in exact) <= 1e-7  # log 0.3 is in float32


def test_data_of_other_sizes_are_refused():
    support = over(lambda d: d[0], classes().support)
    with pytest.raises(ValueError, match=r"expected x of 7 examples and 4 inputs; got \(8, 4\)"):
        solved(7).adapt({"decay.group": normal(3), "example.logit": normal(7)}, support)


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


def test_new_networks_are_drawn_by_seed_and_step_and_judged_on_rows_of_the_data():
    data = over(lambda d: d[0], classes().query)
    draw = partial(new_networks, lambda: mlp(4, (6,), 3), data, 3, 5)
    one, again, later, other = draw(seed=1)(0), draw(seed=1)(0), draw(seed=1)(1), draw(seed=2)(0)
    assert one.support.x.shape == (3, 1, 51) and one.query.x.shape == (3, 5, 4)
    for a, b in zip((*one.support, *one.query), (*again.support, *again.query), strict=True):
        assert torch.equal(a, b)
    starts = torch.cat([d.support.x[:, 0] for d in (one, later, other)])
    assert len(starts.unique(dim=0)) == 9
    for x, y in zip(*one.query, strict=True):
        rows = [int((data.x == row).all(1).nonzero()) for row in x]
        assert len(set(rows)) == 5 and torch.equal(y, data.y[rows])
    with pytest.raises(ValueError, match="at most 8 rows"):
        new_networks(lambda: mlp(4, (6,), 3), data, 3, 9)


def test_a_new_network_is_what_distilled_begins_with():
    learner, _, seeds = distilling()
    data = over(lambda d: d[0], classes().query)
    support = new_networks(lambda: net(3), data, 1, 2)(0).support
    bare = finetune(net(), cross_entropy, 0.2, 4).adapt(parameters(net(3)), seeds)
    theta = learner.adapt(learner.init(), over(lambda d: d[0], support))
    assert (flat(theta) - flat(bare)).abs().max() <= 1e-6


def test_flat_and_unflat_are_inverse_and_a_wrong_length_is_refused():
    params = parameters(net())
    again = unflat(flat(params), params)
    assert all(torch.equal(again[k], params[k]) for k in params) and list(again) == list(params)
    with pytest.raises(ValueError, match=r"expected a start of 51 numbers.*got 50"):
        unflat(flat(params)[1:], params)


# All of them ------------------------------------------------------------------------------------

EVERY = {
    "weight_decay": lambda t: (weight_decay(net(), cross_entropy, 0.1, 4, 0.1), classes(t)),
    "reweighted": lambda t: (reweighted(net(), cross_entropy, 0.1, 4, 8, decay=0.1), classes(t)),
    "distilled": lambda t: distilling(t)[:2],
    "weighted_ridge": lambda t: (solved(), classes(t)),
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
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng([1, 77]).permutation(len(y))  # the last split of the page

    def run(used):
        labels = y.copy()
        labels[order[used:]] = (labels[order[used:]] + 3) % 10
        small.setattr(sklearn.datasets, "load_digits", lambda **_: (x.copy(), labels))
        page = run_until("problems", "reach")
        losses = [rows[1][1] for rows in page["decays"].values()]  # on validation images
        phis = [v for phi in page["found"][40, 1].values() for v in phi.values()]
        images = [torch.as_tensor(v) for made in page["ways"].values() for v in made]
        return [torch.tensor(losses), *phis, *images]

    before, after = run(len(y)), run(1200)  # no problem trains or validates on more than 1200
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    changed = run(50)  # labels of training images do count
    assert not all(torch.equal(a, b) for a, b in zip(before, changed, strict=True))


# The solutions of its exercises -----------------------------------------------------------------


def test_ten_times_the_trainings_bring_the_search_nearer_and_not_there(small):
    """ex-problems-search"""
    page = run_until("problems", "learned")
    images, found = page["IMAGES"], []
    for seed in (0, 1):
        strangers = np.random.default_rng([seed, 78]).permutation(images)
        beside = torch.cat([images, torch.from_numpy(strangers)], 1)
        train, held, _ = page["split"](seed, 100, 200, x=beside)
        learner, task = weighted_ridge(torch.arange(128), 100), page["one_task"](train, held)
        phi, objective = over(torch.Tensor.double, learner.init()), bilevel(learner, mse_loss)

        def value(logs, phi=phi, objective=objective, task=task):
            return objective({**phi, "decay.group": logs}, task).item()

        grid = {log: torch.full((128,), float(log)).double() for log in range(-9, 1)}
        phi["decay.group"] = grid[best_of(grid, lambda v, value=value: -value(v)).setting]
        short, long = (page["search"](value, phi["decay.group"], n, seed) for n in (240, 2400))
        rule = cosine_adam(0.3, 60)
        ours = fit(objective, phi, lambda step, t=task: t, 60, moves=["decay.group"], **rule).params
        found.append([value(short), value(long), value(ours["decay.group"])])
    short, long, ours = np.mean(found, 0)
    assert abs(short - 0.044) < 1e-3 and abs(long - 0.039) < 1e-3 and ours < long - 2e-4


def test_the_gradient_of_the_start_vanishes_as_the_solution_says():
    """ex-problems-start"""
    x, y = 0.3 * normal(6, 5), normal(6, 1, seed=1)

    def judged(start, steps):
        inner = lambda th: ((x @ th["w"] - y) ** 2).mean() + np.exp(-4) / 2 * (th["w"] ** 2).sum()  # noqa: E731
        return ((normal(9, 5, seed=2) @ descend(inner, {"w": start}, 0.8, steps)["w"]) ** 2).mean()

    factor = 1 - 0.8 * np.exp(-4)
    assert abs(factor - 0.985) < 5e-4 and factor**1000 < 1e-6
    size = [torch.func.grad(judged)(normal(5, 1, seed=3), k).norm() for k in (300, 301, 600)]
    assert size[1] <= (factor + 1e-3) * size[0] and size[2] <= factor**290 * size[0]


def test_a_softmax_gains_from_learned_weights():
    """ex-problems-softmax"""
    x, y = (torch.from_numpy(v) for v in sklearn.datasets.load_digits(return_X_y=True))
    x, y = x.float() / 16, one_hot(y, 10)
    found = []
    for seed in (100, 101, 102):
        order = np.random.default_rng([seed, 77]).permutation(len(x))
        parts = np.split(order, [700, 900])
        train, held, test = (Batch(x[i], y[i].clone()) for i in parts)
        rng = np.random.default_rng([seed, 79])
        wrong = np.flatnonzero(rng.random(500) < 0.4)
        for i, by in zip(wrong, rng.integers(1, 10, len(wrong)), strict=True):
            train.y[i] = train.y[i].roll(int(by))
        rows = len(train.x)
        learner = reweighted(mlp(64, (), 10, seed=seed), cross_entropy, 1.0, 60, rows, 1e-3)

        @torch.no_grad()
        def judged(logits, data, learner=learner, train=train):
            def one(logit):
                said = learner.predict(learner.adapt({"example.logit": logit}, train), data.x)
                return torch.stack([cross_entropy(said, data.y), accuracy(said, data.y)])

            return torch.vmap(one)(logits).mT

        theta = learner.adapt(learner.init(), train)
        said = learner.predict(theta, train.x).detach()
        rank = torch.vmap(cross_entropy)(said[:, None], train.y[:, None])[:500].argsort().argsort()
        grid = []
        for share in (1e-6, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95):
            for drop in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6):
                kept = (1 - drop) * 500
                noisy = np.log(share / kept) - 5.0 * (rank >= kept)
                sure = torch.full((rows - 500,), np.log((1 - share) / (rows - 500)))
                grid.append(torch.cat([noisy.float(), sure]))
        grid = torch.stack(grid)
        best = grid[judged(grid, held)[0].argmin()]
        task = Episode(*(over(lambda v: v[None], b) for b in (train, held)))
        rule = cosine_adam(0.3, 15)
        ours = fit(
            bilevel(learner, cross_entropy), learner.init(), lambda step, t=task: t, 15, **rule
        )
        both = torch.stack([ours.params["example.logit"], best])
        found.append(judged(both, test)[1])
    ours, two = (100 * torch.stack(found).mean(0)).tolist()
    assert abs(ours - 93.5) < 0.4 and abs(two - 92.5) < 0.4
