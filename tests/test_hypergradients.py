"""Law 2: hypergradients against closed forms, finite differences, another library; `vmap` against the loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from problems import convolutional, half_mse, images, largest, normal, seeded, slope_gap, vectors
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, conjugate_gradient, first_order, implicit, secant, unrolled
from mtlib.core import Learner, over
from mtlib.data.linear import exact_stream, linear_tasks
from mtlib.learners.closed_form import ridge
from mtlib.learners.finetune import as_is
from mtlib.learners.gradient import anil, maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.objective import over_tasks
from mtlib.run.fast import by_reference

HYPERGRADIENTS = {
    "unrolled": unrolled,
    "first_order": first_order,
    "secant": secant,
    "implicit": implicit(2.0, iterations=3),
}


# Closed forms on a quadratic: task t has the loss ½ (w − w_t)ᵀ Σ_t (w − w_t) ------------------


class Linear(nn.Module):
    """w, as a network x -> x w, with the two halves a network of this package has."""

    def __init__(self, dims):
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(dims, 1, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def quadratic():
    tasks = linear_tasks(tasks=7, dims=4, seed=3)
    net = Linear(4).double()
    w = normal(4, seed=1)
    return tasks, exact_stream(tasks)(0), net, {"head.weight": w[None]}, w


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7])
def test_maml_equals_its_closed_form(quadratic, steps, chunk):
    tasks, episode, net, phi, w = quadratic
    m = torch.linalg.matrix_power(torch.eye(4).double() - 0.3 * tasks.covariances, steps)
    e = (w - tasks.weights)[..., None]
    exact = (m.mT @ tasks.covariances @ m @ e).mean(0)[:, 0]
    objective = bilevel(maml(net, half_mse, 0.3, steps), half_mse, chunk=chunk)
    value, grads = objective.value_and_grad(phi, episode)
    assert (grads["head.weight"][0] - exact).abs().max() <= 1e-9
    expected = 0.5 * ((m @ e).mT @ tasks.covariances @ (m @ e)).mean()
    assert abs(value - expected) <= 1e-9


@pytest.mark.parametrize("steps", [1, 3])
def test_fomaml_equals_its_closed_form(quadratic, steps):
    tasks, episode, net, phi, w = quadratic
    m = torch.linalg.matrix_power(torch.eye(4).double() - 0.3 * tasks.covariances, steps)
    exact = (tasks.covariances @ m @ (w - tasks.weights)[..., None]).mean(0)[:, 0]
    objective = bilevel(maml(net, half_mse, 0.3, steps), half_mse, first_order)
    assert (objective.value_and_grad(phi, episode)[1]["head.weight"][0] - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("steps", [1, 4])
def test_reptile_equals_its_closed_form(quadratic, steps):
    tasks, episode, net, phi, w = quadratic
    eye = torch.eye(4).double()
    m = torch.linalg.matrix_power(eye - 0.3 * tasks.covariances, steps)
    exact = ((eye - m) @ (w - tasks.weights)[..., None]).mean(0)[:, 0]
    objective = bilevel(maml(net, half_mse, 0.3, steps), half_mse, secant)
    assert (objective.value_and_grad(phi, episode)[1]["head.weight"][0] - exact).abs().max() <= 1e-9


def test_implicit_equals_its_closed_form(quadratic):
    tasks, episode, net, phi, w = quadratic
    strength, eye = 1.5, torch.eye(4).double()
    a = torch.linalg.inv(eye + tasks.covariances / strength)  # dθ*/dφ
    exact = (a @ tasks.covariances @ a @ (w - tasks.weights)[..., None]).mean(0)[:, 0]
    learner = maml(net, half_mse, 0.4, 300, strength=strength)
    objective = bilevel(learner, half_mse, implicit(strength, iterations=4))
    assert (objective.value_and_grad(phi, episode)[1]["head.weight"][0] - exact).abs().max() <= 1e-9


def test_implicit_approaches_the_unrolled_gradient_as_steps_grow(quadratic):
    _, episode, net, phi, _ = quadratic
    gaps = []
    for steps in (5, 20, 80):
        learner = maml(net, half_mse, 0.2, steps, strength=1.0)
        a = bilevel(learner, half_mse, implicit(1.0, iterations=4)).value_and_grad(phi, episode)[1]
        b = bilevel(learner, half_mse, unrolled).value_and_grad(phi, episode)[1]
        gaps.append(largest(a, b))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] < 1e-9


def test_conjugate_gradient_solves_and_rests_at_the_solution():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=g, dtype=torch.float64)
    a = a @ a.T + torch.eye(5).double()
    b = torch.randn(5, generator=g, dtype=torch.float64)
    for iterations in (5, 50):  # far past the solution: no 0/0
        x = conjugate_gradient(lambda v: {"x": a @ v["x"]}, {"x": b}, iterations)["x"]
        assert (a @ x - b).abs().max() < 1e-9


# Finite differences ---------------------------------------------------------------------------


CASES = {
    "maml, mlp": (
        lambda: seeded(lambda: mlp(3, (8, 8), 2)),
        partial(maml, loss=mse_loss, lr=0.1, steps=3),
        mse_loss,
        vectors,
    ),
    "anil, mlp": (
        lambda: seeded(lambda: mlp(3, (8, 8), 2)),
        partial(anil, loss=mse_loss, lr=0.1, steps=3),
        mse_loss,
        vectors,
    ),
    "maml, conv4": (
        convolutional,
        partial(maml, loss=cross_entropy, lr=0.1, steps=2),
        cross_entropy,
        images,
    ),
    "ridge, mlp": (
        lambda: seeded(lambda: mlp(3, (8, 8), 2)),
        ridge,
        mse_loss,
        vectors,
    ),
    "protonet, conv4": (
        convolutional,
        protonet,
        cross_entropy,
        images,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unrolled_agrees_with_finite_differences(case):
    make_net, make_learner, loss, data = CASES[case]
    learner, episode = make_learner(make_net()), data()
    objective, phi = bilevel(learner, loss), learner.init()
    grads = objective.value_and_grad(phi, episode)[1]
    for seed in range(3):
        assert slope_gap(objective, phi, episode, grads, seed) <= 1e-6


def test_first_order_differs_from_the_exact_gradient():
    net = seeded(lambda: mlp(3, (8, 8), 2))
    learner, episode = maml(net, mse_loss, 0.1, 3), vectors()
    exact, short = (
        bilevel(learner, mse_loss, h).value_and_grad(learner.init(), episode)
        for h in (unrolled, first_order)
    )
    assert (
        exact[0] == pytest.approx(float(short[0]), abs=1e-12) and largest(exact[1], short[1]) > 1e-3
    )


def test_first_order_keeps_no_graph_of_the_inner_steps():
    """The number of autograd nodes behind the value does not grow with the inner steps."""

    def nodes(tensor):
        seen, todo = set(), [tensor.grad_fn]
        while todo:
            n = todo.pop()
            if n is not None and n not in seen:
                seen.add(n)
                todo += [m for m, _ in n.next_functions]
        return len(seen)

    net, episode = seeded(lambda: mlp(3, (8,), 2)), over(lambda d: d[0], vectors())
    phi = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
    sizes = [
        nodes(h(maml(net, mse_loss, 0.1, n), mse_loss)(phi, episode))
        for h in (first_order, unrolled)
        for n in (1, 8)
    ]
    assert sizes[0] == sizes[1] and sizes[3] > 3 * sizes[2]


# vmap = loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYPERGRADIENTS)
@pytest.mark.parametrize("chunk", [2, 3])
def test_vmap_equals_the_loop_on_conv4(name, chunk):
    net = convolutional(width=8)
    learner, episode = maml(net, cross_entropy, 0.2, 3, strength=0.5), images(tasks=3)
    one = bilevel(learner, cross_entropy, HYPERGRADIENTS[name], chunk=1).value_and_grad(
        learner.init(), episode
    )
    many = bilevel(learner, cross_entropy, HYPERGRADIENTS[name], chunk=chunk).value_and_grad(
        learner.init(), episode
    )
    assert abs(one[0] - many[0]) <= 1e-10 and largest(one[1], many[1]) <= 1e-10


def test_the_reference_equals_value_and_grad():
    net = convolutional()
    learner, episode = maml(net, cross_entropy, 0.2, 2), images(tasks=3)
    objective, phi = bilevel(learner, cross_entropy, chunk=2), learner.init()
    leaves = {k: v.requires_grad_() for k, v in phi.items()}
    value = objective(leaves, episode)
    grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    fast = objective.value_and_grad(phi, episode)
    assert abs(value - fast[0]) <= 1e-12 and largest(grads, fast[1]) <= 1e-12


def halves(body, width, outputs=2):
    net = nn.Sequential()
    net.body, net.head = body, nn.Linear(width, outputs)
    return net


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.layer_norm(x, (8,))


INEXACT = {
    "LayerNorm": lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh()),
    "F.layer_norm": lambda: nn.Sequential(nn.Linear(3, 8), Functional(), nn.Tanh()),
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh()),
    "BatchNorm1d, no running statistics": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh()
    ),
    "InstanceNorm1d": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten(), nn.Tanh()
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("norm", [n for n in INEXACT if "ayer" not in n])
def test_a_norm_that_is_inexact_under_vmap_runs_in_the_loop_and_says_so(norm):
    """Where functorch takes the inner gradients, as in a learner that a user writes with `torch.func.grad`."""
    net = seeded(lambda: halves(INEXACT[norm](), 8))
    learner, episode = maml(net, mse_loss, 0.1, 2), vectors()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loop = bilevel(learner, mse_loss, chunk=1).value_and_grad(learner.init(), episode)[1]
    objective = bilevel(learner, mse_loss, chunk=4)
    with by_reference():
        with pytest.warns(UserWarning, match="inexact second-order gradient"):
            asked = objective.value_and_grad(learner.init(), episode)[1]
        again = objective.value_and_grad(learner.init(), episode)[1]  # quietly, in the loop
    assert largest(loop, asked) <= 1e-10 and largest(loop, again) <= 1e-10
    assert slope_gap(objective, learner.init(), episode, asked) <= 1e-6
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # no state written


@pytest.mark.fast
@pytest.mark.parametrize("hypergradient", [unrolled, first_order, implicit(2.0)])
@pytest.mark.parametrize("norm", [n for n in INEXACT if n != "BatchNorm1d"])
def test_norms_run_under_vmap_where_that_is_exact(norm, hypergradient, monkeypatch):
    """Our own steps take plain autograd on stacked tasks, to any order; a first derivative is exact in any way."""
    net = seeded(lambda: halves(INEXACT[norm](), 8))
    learner, episode = maml(net, mse_loss, 0.1, 2, 2.0), vectors()
    loop = bilevel(learner, mse_loss, hypergradient, chunk=1)
    right = loop.value_and_grad(learner.init(), episode)
    monkeypatch.setattr("mtlib.objective.Batched.loop", None)
    objective = bilevel(learner, mse_loss, hypergradient, chunk=4)
    for _ in range(2):  # the first call looks at functions, the later ones at modules
        value, grads = objective.value_and_grad(learner.init(), episode)
        assert abs(value - right[0]) <= 1e-14 and largest(grads, right[1]) <= 1e-12


def test_torchs_own_norm_under_vmap_is_wrong_which_is_why(monkeypatch):
    """The day this fails, torch is mended and the guard can go.

    It shows where an inner step takes `torch.func.grad` under `vmap`. Our own steps take plain autograd on stacked tasks,
    which is exact with any norm; a learner may take its gradients otherwise.
    """
    monkeypatch.setattr("mtlib.run.fast.way_to_autograd", lambda: None)
    net = seeded(lambda: halves(INEXACT["BatchNorm1d, no running statistics"](), 8))
    learner, episode = maml(net, mse_loss, 0.1, 2), vectors()
    task = unrolled(learner, mse_loss)
    phi = {k: v.requires_grad_() for k, v in learner.init().items()}

    def grad(values):
        return dict(zip(phi, torch.autograd.grad(values.mean(), list(phi.values())), strict=True))

    bare = grad(torch.vmap(task, in_dims=(None, 0))(phi, episode))
    right = grad(torch.stack([task(phi, over(lambda d, t=t: d[t], episode)) for t in range(4)]))
    assert largest(bare, right) > 1e-6


@pytest.mark.fast
def test_a_norm_switched_over_after_the_first_call_is_noticed():
    net = seeded(lambda: halves(INEXACT["BatchNorm1d"](), 8)).eval()
    learner, episode = maml(net, mse_loss, 0.1, 2), vectors()
    objective = bilevel(learner, mse_loss, chunk=4)
    exact = objective.value_and_grad(learner.init(), episode)[1]  # evaluation mode: vmap is exact
    loop = bilevel(learner, mse_loss, chunk=1)
    assert largest(exact, loop.value_and_grad(learner.init(), episode)[1]) <= 1e-10
    net.train()
    with pytest.warns(UserWarning, match="BatchNorm1d"):
        switched = objective.value_and_grad(learner.init(), episode)[1]
    assert largest(switched, loop.value_and_grad(learner.init(), episode)[1]) <= 1e-10


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 8), lambda: nn.RMSNorm(8)], ids=["group", "rms"]
)
def test_norms_that_are_exact_run_under_vmap(norm):
    net = seeded(lambda: halves(nn.Sequential(nn.Linear(3, 8), norm(), nn.Tanh()), 8))
    learner, episode = maml(net, mse_loss, 0.1, 2), vectors()
    a, b = (
        bilevel(learner, mse_loss, chunk=c).value_and_grad(learner.init(), episode)[1]
        for c in (1, 4)
    )
    assert largest(a, b) <= 1e-10


@pytest.mark.fast
def test_vmap_is_really_used():
    seen = []

    def task(phi, x):
        seen.append(torch._C._functorch.is_batchedtensor(x))
        return (phi["w"] * x).sum()

    objective = over_tasks(task)
    objective.value_and_grad({"w": torch.ones(2)}, torch.ones(3, 2))
    over_tasks(task, chunk=1).value_and_grad({"w": torch.ones(2)}, torch.ones(3, 2))
    assert seen == [True, False, False, False]


# Another library ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_higher_gives_the_same_meta_gradient(kind, order):
    higher = pytest.importorskip("higher")
    if kind == "mlp":
        net, loss, episode = seeded(lambda: mlp(3, (8, 8), 2)), mse_loss, vectors()
    else:
        net, loss, episode = convolutional(width=8), cross_entropy, images()
    learner = maml(net, loss, 0.1, 3)
    ours = bilevel(learner, loss, unrolled if order == "second" else first_order).value_and_grad(
        learner.init(), episode
    )[1]

    theirs = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    tasks = len(episode.query.y)
    for t in range(tasks):
        (xs, ys), (xq, yq) = over(lambda d, t=t: d[t], episode)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(
            net, sgd, copy_initial_weights=False, track_higher_grads=order == "second"
        ) as (f, opt):
            for _ in range(3):
                opt.step(loss(f(xs), ys))
            outer = loss(f(xq), yq)
            variables = list(net.parameters()) if order == "second" else list(f.parameters())
            for k, g in zip(theirs, torch.autograd.grad(outer, variables), strict=True):
                theirs[k] += g / tasks
    assert largest(ours, theirs) <= 1e-10


def test_the_hinge_as_is_under_bilevel_is_joint_training():
    from mtlib.joint import joint

    net, episode = convolutional(), images()
    phi = as_is(net).init()
    a = bilevel(as_is(net), cross_entropy).value_and_grad(phi, episode)
    b = joint(net, cross_entropy).value_and_grad(phi, episode.query)
    assert abs(a[0] - b[0]) == 0 and largest(a[1], b[1]) == 0


def test_a_learner_written_by_a_user_needs_no_class():
    """Three functions are a learner."""
    episode = over(lambda d: d[..., :1], vectors(inputs=1, outputs=1))
    shift = Learner(
        lambda: {"scale": torch.ones(1, dtype=torch.float64)},
        lambda phi, s: {**phi, "shift": (s.y - phi["scale"] * s.x).mean(0)},
        lambda theta, x: theta["scale"] * x + theta["shift"],
    )
    objective, phi = bilevel(shift, mse_loss), shift.init()
    grads = objective.value_and_grad(phi, episode)[1]
    assert slope_gap(objective, phi, episode, grads) <= 1e-6
