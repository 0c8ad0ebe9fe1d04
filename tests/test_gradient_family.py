"""Learners that go by gradients: identities, finite differences, torch's optimizers, another library."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from problems import (
    convolutional,
    half_mse,
    images,
    largest,
    moved,
    normal,
    slope_gap,
    vectors,
)
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import (
    annealed,
    bilevel,
    conjugate_gradient,
    first_order,
    implicit,
    multi_step,
    neumann,
    secant,
    unrolled,
)
from mtlib.core import Batch, Episode, below, features, over, parameters
from mtlib.data.linear import exact_stream, linear_tasks, resting
from mtlib.data.sinusoids import sinusoids
from mtlib.joint import joint
from mtlib.learners.context import cavia, protomaml
from mtlib.learners.gradient import (
    adam,
    anil,
    boil,
    constant,
    descend,
    maml,
    minibatches,
    momentum,
    part_of,
    step,
)
from mtlib.learners.metric import protonet
from mtlib.learners.preconditioned import (
    along,
    learned,
    meta_curvature,
    meta_sgd,
    per_step_rates,
)
from mtlib.nets import mlp
from mtlib.norm import Norm
from mtlib.train import cosine_adam, fit


def shared(params):
    """The entries of the network, without those a method adds."""
    return {k: v for k, v in params.items() if k.startswith(("body.", "head."))}


def smooth(outputs=2):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    net.head = nn.Linear(6, outputs)
    return net.double()


def smooth_convolutional():
    """Without max-pool and ReLU: at their kinks an inner step jumps, and with it the meta-objective."""
    torch.manual_seed(0)
    net, widths = nn.Sequential(), ((1, 4), (4, 4))
    blocks = [
        (nn.Conv2d(a, b, 3, padding=1, bias=False), Norm(b), nn.Tanh(), nn.AvgPool2d(4))
        for a, b in widths
    ]
    net.body = nn.Sequential(*(m for block in blocks for m in block), nn.Flatten())
    net.head = nn.Linear(4, 3)
    return net.double()


def classes(tasks=3, ways=3, rows=6, seed=0):
    """Vectors with one-hot labels."""
    x = vectors(tasks, rows, seed=seed)
    y = torch.eye(ways, dtype=torch.float64).repeat(rows // ways, 1).expand(tasks, -1, -1)
    return Episode(Batch(x.support.x, y), Batch(x.query.x, y))


def meta(learner, loss, episode, hypergradient=unrolled, phi=None):
    return bilevel(learner, loss, hypergradient).value_and_grad(phi or learner.init(), episode)


# Identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [meta_sgd, per_step_rates, meta_curvature])
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_learned_steps_at_their_first_values_are_maml(make, kind):
    """Meta-SGD and MAML++'s rates while constant, Meta-Curvature while the identity."""
    net, loss, episode = (
        (smooth(), mse_loss, vectors())
        if kind == "vectors"
        else (convolutional(), cross_entropy, images())
    )
    a = meta(make(net, loss, 0.1, 3), loss, episode)
    b = meta(maml(net, loss, 0.1, 3), loss, episode)
    assert abs(a[0] - b[0]) <= 1e-12 and largest(shared(a[1]), b[1]) <= 1e-12
    assert all(g.abs().max() > 0 for k, g in a[1].items() if k.startswith(("lr.", "curvature.")))


def test_maml_plus_plus_with_its_switches_off_is_maml():
    net, episode = smooth(), vectors()
    off = multi_step(annealed(3, progress=1.0))
    a = meta(per_step_rates(net, mse_loss, 0.1, 3), mse_loss, episode, off)
    b = meta(maml(net, mse_loss, 0.1, 3), mse_loss, episode)
    assert abs(a[0] - b[0]) <= 1e-12 and largest(shared(a[1]), b[1]) <= 1e-12


@pytest.mark.parametrize("make", [maml, anil, meta_sgd, cavia, meta_curvature])
def test_the_multi_step_loss_is_the_weighted_sum_of_shorter_learners(make):
    net, episode, weights = smooth(), vectors(), [0.2, 0.0, 0.8]
    torch.manual_seed(0)
    learner = make(net, mse_loss, 0.1, 3)
    phi = moved(learner.init(), 0.03, seed=5)
    value, grads = meta(learner, mse_loss, episode, multi_step(weights), phi)
    parts = [meta(make(net, mse_loss, 0.1, j), mse_loss, episode, phi=phi) for j in (1, 2, 3)]
    assert abs(value - sum(w * v for w, (v, _) in zip(weights, parts, strict=True))) <= 1e-12
    expected = {
        k: sum(w * g.get(k, 0) for w, (_, g) in zip(weights, parts, strict=True)) for k in phi
    }
    assert largest(grads, expected) <= 1e-12


def test_annealing_goes_from_all_steps_alike_to_the_last_alone():
    assert annealed(4, 0.0) == [0.25] * 4
    assert annealed(4, 0.5) == [0.125, 0.125, 0.125, 0.625]
    assert annealed(4, 1.0) == annealed(4, 3.0) == [0.0, 0.0, 0.0, 1.0]


def test_what_boil_and_anil_move_are_the_two_parts_of_what_maml_moves():
    net, support = smooth(), over(lambda d: d[0], vectors().support)
    moved = []
    for make in (boil, anil, maml):
        phi = parameters(net)
        theta = make(net, mse_loss, 0.1, 2).adapt(phi, support)
        moved.append({k for k in phi if not torch.equal(phi[k], theta[k])})
    body, head, every = moved
    assert body | head == every == set(phi) and not body & head


def test_boil_with_a_frozen_body_rate_is_the_network_itself():
    """A rate for each entry is read by every one of them: BOIL with rates 0 adapts nothing."""
    net, support = smooth(), over(lambda d: d[0], vectors().support)
    rates = {k: torch.zeros_like(v) for k, v in parameters(net).items()}
    phi = parameters(net)
    assert largest(boil(net, mse_loss, rates, 2).adapt(phi, support), phi) == 0


def test_cavia_without_steps_is_joint_training():
    net, episode = smooth(), vectors()
    learner = cavia(net, mse_loss, 1.0, 0)
    value, grads = meta(learner, mse_loss, episode)
    expected = joint(net, mse_loss).value_and_grad(parameters(net), episode.query)
    assert abs(value - expected[0]) <= 1e-12 and largest(shared(grads), expected[1]) <= 1e-12
    assert grads["context.weight"].abs().max() == 0  # c = 0 is the network itself


def test_cavias_first_step_is_its_equation():
    """c₁ = −α Σ_out ∂L/∂f · head(A_c ⊙ z, B_c): by hand for one output and the squared loss."""
    net, support = smooth(1), over(lambda d: d[0], vectors(outputs=1).support)
    learner = cavia(net, mse_loss, 0.7, 1, dims=2)
    phi = learner.init()
    z, (a, b) = features(net)(phi, support.x), phi["context.weight"].chunk(2)
    w = phi["head.weight"][0]
    residual = z @ w + phi["head.bias"] - support.y[:, 0]
    slope = (z * w) @ a + w @ b  # ∂f/∂c at c = 0: (N, dims)
    theta = learner.adapt(phi, support)
    assert (theta["context"] + 0.7 * 2 * (residual[:, None] * slope).mean(0)).abs().max() <= 1e-12
    assert largest({k: theta[k] for k in phi}, phi) == 0


def test_a_context_beside_the_input_is_a_wider_first_layer():
    """W [x; c] + b written out as a network of its own, and c by torch's SGD from zero."""
    net, support = smooth(), over(lambda d: d[0], vectors().support)
    learner = cavia(net, mse_loss, 0.7, 3, dims=2, layer="body.0")
    phi = moved(learner.init(), 0.03, seed=5)
    wide = nn.Linear(3 + 2, 8).double()
    wide.load_state_dict(
        {
            "weight": torch.cat([phi["body.0.weight"], phi["context.weight"]], 1),
            "bias": phi["body.0.bias"],
        }
    )
    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def f(x):
        z = torch.tanh(wide(torch.cat([x, c.expand(len(x), 2)], 1)))
        z = torch.tanh(z @ phi["body.2.weight"].mT + phi["body.2.bias"])
        return z @ phi["head.weight"].mT + phi["head.bias"]

    sgd = torch.optim.SGD([c], lr=0.7)
    for _ in range(3):
        sgd.zero_grad()
        mse_loss(f(support.x), support.y).backward()
        sgd.step()
    theta = learner.adapt(phi, support)
    assert c.abs().max() > 1e-2
    assert (theta["context"] - c).abs().max() <= 1e-12
    assert (learner.predict(theta, support.x) - f(support.x)).abs().max() <= 1e-12


def test_a_context_at_a_norm_scales_and_shifts_what_it_gives():
    net, support = smooth_convolutional(), over(lambda d: d[0], images().support)
    learner = cavia(net, cross_entropy, 0.7, 2, dims=3, layer="body.1")
    phi = moved(learner.init(), 0.03, seed=5)
    theta = learner.adapt(phi, support)
    assert theta["context"].abs().max() > 1e-3
    scale, shift = (phi["context.weight"] @ theta["context"]).chunk(2)
    net.load_state_dict(shared(phi))
    film = net.body[1].register_forward_hook(
        lambda norm, x, y: y * (1 + scale[:, None, None]) + shift[:, None, None]
    )
    by_hand = net(support.x)
    film.remove()
    assert (learner.predict(theta, support.x) - by_hand).abs().max() <= 1e-12


@pytest.mark.parametrize("layer", ["body.0", "body.1"])
def test_a_context_that_did_not_move_is_the_network_itself(layer):
    net = smooth_convolutional() if layer == "body.1" else smooth()
    support = over(lambda d: d[0], (images if layer == "body.1" else vectors)().support)
    learner = cavia(net, mse_loss, 1.0, 0, layer=layer)
    theta = learner.adapt(learner.init(), support)
    assert (learner.predict(theta, support.x) - net(support.x)).abs().max() <= 1e-12


def test_protomaml_without_steps_is_protonets_linear_classifier():
    net, episode = smooth(3), classes()
    a, b = (
        meta(m, cross_entropy, episode)
        for m in (protomaml(net, cross_entropy, 0.1, 0), protonet(net))
    )
    assert abs(a[0] - b[0]) <= 1e-12 and largest(a[1], b[1]) <= 1e-12
    support = over(lambda d: d[0], episode.support)
    theta = protomaml(net, cross_entropy, 0.1, 0).adapt(parameters(net), support)
    c = protonet(net).adapt(parameters(net), support)["prototypes"]
    assert torch.equal(theta["head.weight"], 2 * c)
    assert torch.equal(theta["head.bias"], -(c**2).sum(1))


def test_protomaml_answers_for_any_number_of_classes():
    """The head is made in the task: the network's own number of outputs does not matter."""
    learner, episode = protomaml(smooth(2), cross_entropy, 0.1, 2), classes(ways=3)
    theta = learner.adapt(learner.init(), over(lambda d: d[0], episode.support))
    assert learner.predict(theta, episode.query.x[0]).shape == (6, 3)


def test_each_step_has_its_own_rate_and_the_last_one_stays():
    net, support = smooth(), over(lambda d: d[0], vectors().support)
    trained = moved(per_step_rates(net, mse_loss, 0.1, 2).init(), 0.03, seed=5)
    theta = shared(trained)
    for j in (0, 1, 1, 1):
        rates = {k: a[j] for k, a in below("lr.", trained).items()}
        theta = maml(net, mse_loss, rates, 1).adapt(theta, support)
    longer = per_step_rates(net, mse_loss, 0.1, 4).adapt(trained, support)
    assert largest(shared(longer), theta) <= 1e-12


def test_any_setting_can_be_learned():
    """`learned` is general: here one rate for the whole of ANIL, and the strength of momentum."""
    net, episode = smooth(), vectors()
    own = {
        "lr.all": torch.tensor(0.1, dtype=torch.float64),
        "mu.all": torch.tensor(0.5, dtype=torch.float64),
    }

    def make(phi):
        return anil(net, mse_loss, phi["lr.all"], 3, rule=momentum(phi["mu.all"]))

    a = meta(learned(own, make), mse_loss, episode)
    b = meta(anil(net, mse_loss, 0.1, 3, rule=momentum(0.5)), mse_loss, episode)
    assert largest(shared(a[1]), b[1]) <= 1e-12
    assert a[1]["lr.all"].abs() > 1e-3 and a[1]["mu.all"].abs() > 1e-3


def test_a_matrix_along_each_axis_is_the_sum_written_out():
    g = torch.Generator().manual_seed(0)
    t, a, b, c = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in ((2, 3, 4), (2, 2), (3, 3), (4, 4))
    )
    expected = torch.einsum("ai,bj,ck,ijk->abc", a, b, c, t)
    assert (along(t, [a, b, c]) - expected).abs().max() <= 1e-12


# Mini-batches ----------------------------------------------------------------------------------


def test_mini_batches_have_one_item_of_each_class_and_pass_through_all():
    y = torch.eye(3).repeat_interleave(4, 0)  # 3 ways, 4 shots, sorted by class as episodes are
    support = Batch(torch.arange(12.0)[:, None], y)
    parts = [part_of(support, 3, j) for j in range(8)]
    assert all(torch.equal(part.y, torch.eye(3)) for part in parts)
    assert sorted(torch.cat([part.x for part in parts[:4]])[:, 0].tolist()) == list(range(12))
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts[:4], parts[4:], strict=True))
    assert [len(part_of(support, 5, j).y) for j in range(3)] == [6, 6, 6]  # 12 rows in two parts
    assert len(part_of(support, 100, 3).y) == 12


def test_inner_steps_on_mini_batches_are_torchs_sgd_on_them():
    net, episode = smooth(3), classes()
    support = over(lambda d: d[0], episode.support)
    learner = minibatches(maml(net, cross_entropy, 0.1, 5), 3)
    path = list(learner.adapt.path(parameters(net), support))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for j in range(5):
        rows = [[0, 2, 4], [1, 3, 5]][j % 2]
        sgd.zero_grad()
        cross_entropy(net(support.x[rows]), support.y[rows]).backward()
        sgd.step()
        assert largest(path[j + 1], parameters(net)) <= 1e-12
    assert len(path) == 6


def test_one_batch_of_all_rows_is_the_learner_itself(no_kernel):
    net, episode = smooth(), vectors()
    for size in (4, 6, 100):
        a = meta(minibatches(maml(net, mse_loss, 0.1, 3), size), mse_loss, episode)
        b = meta(maml(net, mse_loss, 0.1, 3), mse_loss, episode)
        assert a[0] == b[0] and largest(a[1], b[1]) == 0


def test_reptiles_outer_update_is_its_equation():
    """φ + ε (1/T) Σ (θ_i − φ) is a step of SGD along `secant` at the rate ε."""
    net, episode = smooth(), vectors()
    learner, phi = minibatches(maml(net, mse_loss, 0.1, 4), 2), parameters(net)
    ends = [learner.adapt(phi, over(lambda d, t=t: d[t], episode.support)) for t in range(4)]
    update = {k: v + 0.3 * sum(e[k] - v for e in ends) / 4 for k, v in phi.items()}
    g = meta(learner, mse_loss, episode, secant)[1]
    assert largest({k: phi[k] - 0.3 * g[k] for k in phi}, update) <= 1e-12


# The gradient of the inner steps as a constant --------------------------------------------------


def test_the_rule_constant_is_first_order_and_reaches_the_rates():
    """FOMAML either way on φ's network; dL^Q/dα = −∇L^Q(θ₁) ⊙ ∇L^S(φ) after one step."""
    net, episode = smooth(), vectors(tasks=1)
    a = meta(maml(net, mse_loss, 0.1, 3, rule=constant), mse_loss, episode)
    b = meta(maml(net, mse_loss, 0.1, 3), mse_loss, episode, first_order)
    assert abs(a[0] - b[0]) <= 1e-12 and largest(a[1], b[1]) <= 1e-12
    short = meta(meta_sgd(net, mse_loss, 0.1, 1, rule=constant), mse_loss, episode)[1]
    inner = joint(net, mse_loss).value_and_grad(parameters(net), episode.support)[1]
    expected = {f"lr.{k}": -short[k] * inner[k] for k in inner}
    assert largest({k: short[k] for k in expected}, expected) <= 1e-12
    for hypergradient in (first_order, secant):
        with pytest.raises(ValueError, match=r"\['lr\..* would never be trained"):
            meta(meta_sgd(net, mse_loss, 0.1, 1), mse_loss, episode, hypergradient)


def test_hypergradients_that_need_the_entries_of_phi_say_so():
    learner, episode = cavia(smooth(), mse_loss, 1.0, 2), vectors()
    for hypergradient in (first_order, secant, implicit(1.0)):
        with pytest.raises(ValueError, match=r"this one adds \['context'\]. Use unrolled"):
            meta(learner, mse_loss, episode, hypergradient)
    with pytest.raises(
        ValueError, match=r"moves every entry of φ but the frozen ones and buffers; \['lr\."
    ):
        meta(meta_sgd(smooth(), mse_loss, 0.1, 2), mse_loss, episode, implicit(1.0))


# Inner loops with other rules ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (None, partial(torch.optim.SGD, lr=0.05)),
        (momentum(0.9), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
        (adam(), partial(torch.optim.Adam, lr=0.05)),
        (adam(0.0, 0.9, 1e-3), partial(torch.optim.Adam, lr=0.05, betas=(0.0, 0.9), eps=1e-3)),
    ],
    ids=["sgd", "momentum", "adam", "adam without its first moment"],
)
def test_inner_steps_are_torchs(rule, optimizer):
    torch.manual_seed(0)
    net = mlp(3, (8, 8), 2).double()  # ReLU: some gradients are exactly 0
    support = over(lambda d: d[0], vectors().support)
    points = list(maml(net, mse_loss, 0.05, 12, rule=rule).adapt.path(parameters(net), support))
    torchs = optimizer(net.parameters())
    for theta in points:
        assert largest(theta, parameters(net)) <= 1e-10
        torchs.zero_grad()
        mse_loss(net(support.x), support.y).backward()
        torchs.step()
    assert len(points) == 13


def test_descend_goes_step_by_step_with_a_rate_for_each():
    """By hand on ½θ² (g = θ): momentum ½ with rates 0.5, then 0.1 from θ = 2."""

    def loss(theta):
        return 0.5 * (theta["w"] ** 2).sum()

    theta = {"w": torch.tensor([2.0], dtype=torch.float64)}
    rates, rule = [0.5, 0.1], momentum(0.5)
    one = step(loss, (theta, None), rates.__getitem__, 0, rule)
    two = step(loss, one, rates.__getitem__, 1, rule)
    assert one[0]["w"].item() == 1.0
    assert two[0]["w"].item() == pytest.approx(0.8, abs=1e-15)  # m: 2, then ½·2 + 1 = 2
    assert descend(loss, theta, rates.__getitem__, 2, rule)["w"].item() == two[0]["w"].item()
    assert descend(loss, theta, 0.5, 2)["w"].item() == 0.5


def test_adams_meta_gradient_is_finite_where_units_are_dead():
    """The slope of √v at v = 0 is infinite; a ReLU unit that is always off has v = 0."""
    torch.manual_seed(0)
    net = mlp(3, (8,), 2).double()
    with torch.no_grad():
        net.body[0].bias[:4] = -100.0
    grads = meta(maml(net, mse_loss, 0.01, 2, rule=adam()), mse_loss, vectors())[1]
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert grads["body.0.weight"][4:].abs().max() > 0


# Finite differences -------------------------------------------------------------------------------


MAKERS = {
    "maml": partial(maml, lr=0.1, steps=3),
    "maml, momentum": partial(maml, lr=0.1, steps=3, rule=momentum()),
    "maml, adam": partial(maml, lr=0.02, steps=3, rule=adam()),
    "anil": partial(anil, lr=0.1, steps=3),
    "anil, adam": partial(anil, lr=0.02, steps=3, rule=adam()),
    "boil": partial(boil, lr=0.1, steps=3),
    "meta_sgd": partial(meta_sgd, lr=0.1, steps=3),
    "meta_sgd, momentum": partial(meta_sgd, lr=0.1, steps=3, rule=momentum()),
    "per_step_rates": partial(per_step_rates, lr=0.1, steps=3),
    "meta_curvature": partial(meta_curvature, lr=0.1, steps=3),
    "maml, mini-batches": lambda net, loss: minibatches(maml(net, loss, 0.1, 3), 3),
    "cavia": partial(cavia, lr=0.5, steps=3),
    "protomaml": partial(protomaml, lr=0.05, steps=3),
}
DATA = {
    "regression": (smooth, mse_loss, vectors),
    "classification": (lambda: smooth(3), cross_entropy, classes),
    "images": (smooth_convolutional, cross_entropy, images),
}
CASES = [(m, d) for m in MAKERS for d in DATA if (m, d) != ("protomaml", "regression")]


@pytest.mark.parametrize(
    "hypergradient", [unrolled, multi_step([0.2, 0.3, 0.5])], ids=["unrolled", "multi_step"]
)
@pytest.mark.parametrize(("maker", "data"), CASES)
def test_meta_gradients_agree_with_finite_differences(maker, data, hypergradient):
    net, loss, draw = DATA[data]
    learner, episode = MAKERS[maker](net(), loss), draw()
    phi = moved(learner.init(), 0.03, seed=5)
    objective = bilevel(learner, loss, hypergradient)
    grads = objective.value_and_grad(phi, episode)[1]
    assert grads.keys() == phi.keys()
    for seed in range(3):
        assert slope_gap(objective, phi, episode, grads, seed) <= 1e-6


@pytest.mark.parametrize("maker", MAKERS)
def test_vmap_equals_the_loop_with_second_order(maker):
    net, loss, episode = convolutional(), cross_entropy, images()
    learner = MAKERS[maker](net, loss)
    phi = moved(learner.init(), 0.03, seed=5)
    a, b = (bilevel(learner, loss, chunk=c).value_and_grad(phi, episode) for c in (1, 3))
    assert abs(a[0] - b[0]) <= 1e-10 and largest(a[1], b[1]) <= 1e-9


# Implicit gradients -------------------------------------------------------------------------------


SOLVERS = {
    "conjugate gradient": (conjugate_gradient, 30),
    "neumann": (neumann, 400),
    "neumann, half rate": (partial(neumann, rate=0.5), 400),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_equals_its_closed_form_with_each_solver(solver):
    tasks = linear_tasks(tasks=7, dims=4, seed=3)
    episode, eye, strength = exact_stream(tasks)(0), torch.eye(4).double(), 6.0
    assert torch.linalg.eigvalsh(tasks.covariances).max() < strength  # the series converges
    net = nn.Sequential()
    net.body, net.head = nn.Identity(), nn.Linear(4, 1, bias=False)
    net = net.double()
    w = normal(4, seed=1)
    a = torch.linalg.inv(eye + tasks.covariances / strength)  # dθ*/dφ
    exact = (a @ tasks.covariances @ a @ (w - tasks.weights)[..., None]).mean(0)[:, 0]
    learner = maml(net, half_mse, 0.1, 300, strength=strength)
    solve, iterations = SOLVERS[solver]
    grads = meta(
        learner, half_mse, episode, implicit(strength, iterations, solve), {"head.weight": w[None]}
    )[1]
    assert (grads["head.weight"][0] - exact).abs().max() <= 1e-9


def test_neumanns_series_is_its_partial_sum():
    """x_n = α Σ_{j ≤ n} (I − αA)ʲ b, term by term, and A⁻¹b in the end."""
    g = torch.Generator().manual_seed(0)
    m = torch.randn(5, 5, generator=g, dtype=torch.float64)
    a = m @ m.T / 10 + 0.3 * torch.eye(5).double()
    b = torch.randn(5, generator=g, dtype=torch.float64)
    rate = 0.4
    power, total = b, torch.zeros_like(b)
    for n in range(6):
        total = total + rate * power
        x = neumann(lambda v: {"x": a @ v["x"]}, {"x": b}, n, rate)["x"]
        assert (x - total).abs().max() <= 1e-12
        power = power - rate * a @ power
    x = neumann(lambda v: {"x": a @ v["x"]}, {"x": b}, 2000, rate)["x"]
    assert (x - torch.linalg.solve(a, b)).abs().max() <= 1e-9


@pytest.mark.parametrize("solver", ["conjugate gradient", "neumann, half rate"])
def test_implicit_approaches_mamls_unrolled_gradient_on_a_network(solver):
    """The inner problem is not quadratic; the proximal term makes it convex enough to be solved."""
    net, episode, strength = smooth(), vectors(), 4.0
    solve, iterations = SOLVERS[solver]
    gaps = []
    for steps in (5, 20, 80):
        learner = maml(net, mse_loss, 0.1, steps, strength=strength)
        a = meta(learner, mse_loss, episode, implicit(strength, iterations, solve))[1]
        b = meta(learner, mse_loss, episode)[1]
        gaps.append(largest(a, b))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] <= 1e-9, gaps


# The page's exercises -------------------------------------------------------------------------------


def test_where_all_bowls_are_alike_all_methods_rest_at_the_mean():
    plane = linear_tasks(tasks=4, dims=2, alike=True)
    for at in resting(plane, 0.5).values():
        assert (at - plane.weights.mean(0)).abs().max() <= 1e-12


def test_reptile_on_whole_sets_goes_from_joint_training_to_the_plain_mean():
    plane = linear_tasks(tasks=4, dims=2, seed=0)
    ends = [resting(plane, 0.5, reptile_steps=k) for k in (1, 400)]
    first, last = (e[f"Reptile, {k} steps"] for e, k in zip(ends, (1, 400), strict=True))
    assert (first - ends[0]["joint training"]).abs().max() <= 1e-12
    assert (last - plane.weights.mean(0)).abs().max() <= 1e-12
    assert (first - last).abs().max() > 0.1


def test_the_annealed_loss_trains_learned_rates():
    """The exercise's program: an objective that is a function of the step, and a rate of their own for the rates."""
    learner = per_step_rates(mlp(1, (8,), 1, seed=0), mse_loss, 0.03, 3)

    def objective(step):
        return bilevel(learner, mse_loss, multi_step(annealed(3, 2 * step / 6)))

    how = {"rates": {"lr.": 3e-4}, "progress": False, **cosine_adam(3e-3, 6)}
    phi = fit(objective, learner.init(), sinusoids(10, 10, 4, 0), 6, **how).params
    before = learner.init()
    assert all((phi[k] - v).abs().max() > 0 for k, v in before.items())
    assert max((phi[k] - v).abs().max() for k, v in before.items() if k[:3] == "lr.") <= 6 * 3e-4


# Another library ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("anil", "boil", "meta_sgd", "momentum") for k in ("mlp", "conv4")]
    + [("adam", "mlp")],
)
def test_higher_gives_the_same_meta_gradient(name, kind):
    """Adam without its ε: higher adds it to the root before its correction for the start, torch after."""
    higher = pytest.importorskip("higher")
    net, loss, episode = (
        (smooth(), mse_loss, vectors())
        if kind == "mlp"
        else (convolutional(), cross_entropy, images())
    )
    make = {
        "anil": partial(anil, lr=0.1),
        "boil": partial(boil, lr=0.1),
        "meta_sgd": partial(meta_sgd, lr=0.1),
        "momentum": partial(maml, lr=0.1, rule=momentum(0.9)),
        "adam": partial(maml, lr=0.01, rule=adam(eps=0.0)),
    }[name]
    learner = make(net, loss, steps=3)
    phi = moved(learner.init(), 0.03, seed=5)
    value, ours = meta(learner, loss, episode, phi=phi)

    net.load_state_dict(shared(phi))
    rates = {k: v.clone().requires_grad_() for k, v in phi.items() if k.startswith("lr.")}
    optimizer = {
        "anil": lambda: torch.optim.SGD(net.head.parameters(), lr=0.1),
        "boil": lambda: torch.optim.SGD(net.body.parameters(), lr=0.1),
        "meta_sgd": lambda: torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1),
        "momentum": lambda: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(net.parameters(), lr=0.01, eps=0.0),
    }[name]()
    override = (
        {"lr": [rates[f"lr.{k}"] for k, _ in net.named_parameters()]}
        if name == "meta_sgd"
        else None
    )
    variables = {**dict(net.named_parameters()), **rates}
    theirs, total = {k: torch.zeros_like(p) for k, p in variables.items()}, 0.0
    tasks = len(episode.query.y)
    for t in range(tasks):
        (xs, ys), (xq, yq) = over(lambda d, t=t: d[t], episode)
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (f, inner):
            for _ in range(3):
                inner.step(loss(f(xs), ys), override=override)
            outer = loss(f(xq), yq)
            total += outer.item() / tasks
            grads = torch.autograd.grad(outer, list(variables.values()))
            for k, g in zip(theirs, grads, strict=True):
                theirs[k] += g / tasks
    assert abs(value - total) <= 1e-9 and largest(ours, theirs) <= 1e-9


# Errors -------------------------------------------------------------------------------------------


def test_errors_say_what_was_expected():
    net, episode = smooth(), vectors()
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cavia(net, mse_loss, 0.1, -1)
    with pytest.raises(ValueError, match=r"multi_step got 2 weights.*takes 3"):
        meta(maml(net, mse_loss, 0.1, 3), mse_loss, episode, multi_step([0.5, 0.5]))
    with pytest.raises(ValueError, match="with inner steps"):
        meta(protonet(smooth(3)), cross_entropy, classes(), multi_step([1.0]))
    with pytest.raises(ValueError, match=r"parameters named \['lr\."):
        meta(meta_sgd(net, mse_loss, 0.1, 1), mse_loss, episode, phi=parameters(net))
    net.head = nn.Sequential(nn.Linear(6, 2))
    for make in (cavia, protomaml):
        with pytest.raises(ValueError, match="one linear layer with a bias, got Sequential"):
            make(net, mse_loss, 0.1, 1)
