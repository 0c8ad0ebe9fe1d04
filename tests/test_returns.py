"""Where the loss is a return: the stream, the best return, and the estimators against sums and integrals written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from problems import normal, seeded
from torch import nn

from mtlib.bilevel import bilevel, first_order, unrolled
from mtlib.book.checks import differences, gradients
from mtlib.core import Batch, Episode, apply, over, parameters
from mtlib.data.navigation import (
    beside,
    best_return,
    every_draw,
    line_return,
    line_walks,
    navigation,
    told,
    walk,
)
from mtlib.data.navigation import line as package_line
from mtlib.evaluate import interval
from mtlib.learners.policy import (
    act,
    baseline,
    cost,
    dice,
    log_normal,
    low_variance,
    mean_return,
    policy_gradient,
    reinforce,
    with_sampling,
)
from mtlib.nets import mlp, policy_net

SPREAD = 0.3


def policy():
    return seeded(lambda: mlp(2, (8,), 2))


def draw(tasks=2, trajectories=5, horizon=4):
    return over(lambda d: d.double(), navigation(trajectories, horizon, tasks, seed=3)(0))


# The stream and the world ---------------------------------------------------------------------


def test_the_stream_is_pure_and_its_halves_share_the_goal_alone():
    stream = navigation(trajectories=3, horizon=4, tasks=5, seed=1)
    a, b = stream(7), stream(7)
    assert all(torch.equal(x, y) for x, y in zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True))
    assert a.support.x.shape == (5, 3, 4, 4) and a.support.y.shape == (5, 3, 4)
    goals = a.support.x[..., 2:]
    assert torch.equal(goals, a.query.x[..., 2:]) and torch.equal(
        goals, goals[:, :1, :1].expand_as(goals)
    )
    assert (goals[0] != goals[1]).all() and goals.abs().max() <= 1
    assert (a.support.x[..., :2] != a.query.x[..., :2]).all()
    assert not torch.equal(stream(8).support.x, a.support.x)
    with pytest.raises(
        ValueError, match="expected horizon to be a whole number of at least 1, got 0"
    ):
        navigation(horizon=0)


def test_a_walk_by_hand():
    position, reward = walk(
        torch.tensor([[0.1, 0.0]]), torch.tensor([[0.1, -9.0]]), torch.tensor([[0.5, 0.2]])
    )
    torch.testing.assert_close(position, torch.tensor([[0.2, -0.2]]))
    torch.testing.assert_close(reward, torch.tensor([-(0.3**2) - 0.4**2]))


def test_a_policy_that_is_told_the_goal_sees_it_beside_its_place():
    goal = torch.tensor([[0.5, 0.2], [-0.3, 0.9]])
    action = torch.tensor([[0.1, -9.0], [0.05, 0.2]])
    state, reward = told(beside(goal), action, goal)
    position, expected = walk(torch.zeros(2, 2), action, goal)
    assert torch.equal(state, torch.cat([position, goal], 1)) and torch.equal(reward, expected)


# The best return ------------------------------------------------------------------------------


def test_the_best_return_without_noise_is_the_straight_walk():
    """Σ_h −(|g| − 0.2 h)₊² on each axis; its mean over goals in [−1, 1]² is −8/15."""
    goals = torch.tensor([[0.37, -0.81], [1.0, -1.0], [0.0, 0.0], [0.05, 0.6]])
    straight = sum(((goals.abs() - 0.2 * h).clamp_min(0) ** 2).sum(-1) for h in range(1, 11))
    assert (best_return(goals, spread=1e-4) + straight).abs().max() < 1e-3
    line = torch.linspace(-1, 1, 2001)
    mean = 2 * best_return(torch.stack([line, 0 * line], -1), spread=1e-4).mean()
    assert abs(mean + 8 / 15) < 2e-3


def test_the_best_return_of_one_step_is_a_sum_over_draws():
    """With one step and a near goal, no clip at all is at work: −2 spread²; else the best of many means is no better."""
    assert abs(best_return(torch.tensor([0.0, 0.0]), 1, 0.02) + 2 * 0.02**2) < 1e-5
    z = torch.special.ndtri((torch.arange(20000).double() + 0.5) / 20000)
    means = torch.linspace(0, 0.6, 121).double()[:, None]
    after = (means + 0.1 * z).clamp(-0.2, 0.2)
    expected = -((0.15 - after) ** 2).mean(1).min()
    assert abs(best_return(torch.tensor([0.15, 0.0]), 1, 0.1) - (expected - 0.01 * 0.91)) < 2e-3


def test_no_policy_that_knows_the_goal_is_above_the_best_return():
    """Walking straight, with noise: below the best, and by less than a tenth of it."""
    goals = torch.rand(40, 2, generator=torch.manual_seed(0)) * 2 - 1
    goal = goals[:, None].expand(40, 500, 2).reshape(-1, 2)
    noise, total = torch.randn(10, len(goal), 2, generator=torch.manual_seed(1)), 0.0
    position = torch.zeros_like(goal)
    for z in noise:
        position, reward = walk(position, goal - position + 0.1 * z, goal)
        total = total + reward
    best = best_return(goals).mean()
    assert best - 0.1 < total.mean() < best + 0.005
    with pytest.raises(ValueError, match="goals in"):
        best_return(torch.tensor([2.0, 0.0]))


# The estimators -------------------------------------------------------------------------------


def test_the_baseline_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    expected = torch.tensor([[(7 + 14) / 2, (4 + 9) / 2], [(3 + 14) / 2, (2 + 9) / 2], [5.0, 3.0]])
    torch.testing.assert_close(baseline(rewards), expected)
    assert (baseline(rewards[:1]) == 0).all()


def test_the_gradient_is_reinforce_with_a_baseline_written_out():
    """(1/N) Σ_n Σ_h ∇log π(a_nh | s_nh) (G_nh − b_nh), and its value is the mean return."""
    net, x = policy(), draw().support.x[0]
    f, phi = apply(net), parameters(net)
    states, actions, rewards = act(f, phi, walk, x, SPREAD, 2)
    learner = policy_gradient(net, walk, SPREAD, 0.1, 0)
    leaves = {k: v.requires_grad_() for k, v in phi.items()}
    value = -cost(learner.predict(leaves, x), torch.ones_like(rewards))
    assert abs(value - rewards.sum(1).mean()) <= 1e-12
    ours = torch.autograd.grad(value, list(leaves.values()))
    expected = [torch.zeros_like(v) for v in leaves.values()]
    for n in range(len(x)):
        for h in range(x.shape[1]):
            weight = rewards[n, h:].sum() - baseline(rewards)[n, h]
            mean = f(leaves, states[n, h][None])[0]
            log_p = torch.distributions.Normal(mean, SPREAD).log_prob(actions[n, h]).sum()
            for i, g in enumerate(torch.autograd.grad(log_p, list(leaves.values()))):
                expected[i] += g * weight / len(x)
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) <= 1e-10


@pytest.mark.parametrize("way", (reinforce, low_variance, dice))
def test_every_surrogate_has_the_value_and_the_first_derivative_of_the_return(way):
    rewards, log_p = normal(6, 3, seed=1), normal(6, 3, seed=2).requires_grad_()
    value = way(log_p, rewards)
    assert (value - rewards).abs().max() <= 1e-12
    (slope,) = torch.autograd.grad(value.sum(), log_p)
    for n, h in itertools.product(range(6), range(3)):
        weight = rewards[n, h:].sum() - baseline(rewards)[n, h]
        assert abs(slope[n, h] - weight) <= 1e-12


def test_the_second_derivative_per_draw():
    """One action: d²/dμ² = mean (r − b)((z/σ)² − 1/σ²)."""
    z = normal(40, 1)
    mean = torch.tensor(0.4).double()
    actions = mean + SPREAD * z
    rewards = -((actions - 1) ** 2)

    def curvature(way):
        def value(m):
            return way(log_normal(actions[..., None], m.expand(40, 1, 1), SPREAD), rewards).mean()

        return torch.func.grad(torch.func.grad(value))(mean)

    weight = rewards - baseline(rewards)
    expected = (weight * ((z / SPREAD) ** 2 - 1 / SPREAD**2)).mean()
    assert all(abs(curvature(way) - expected) <= 1e-10 for way in (dice, low_variance))
    assert abs(curvature(reinforce) + weight.mean() / SPREAD**2) <= 1e-10  # that of log π alone


def test_cross_terms_between_steps_are_there():
    """Two steps that share a mean: (r₁ + r₂) with scores s₁, s₂ -> r₁(s₁² − 1/σ²) + r₂((s₁ + s₂)² − 2/σ²), no baseline."""
    z, mean = normal(1, 2), torch.tensor(0.2).double()
    actions = mean + SPREAD * z
    rewards = torch.tensor([[0.7, -1.3]], dtype=torch.float64)

    def curvature(way):
        def value(m):
            log_p = log_normal(actions[..., None], m.expand(1, 2, 1), SPREAD)
            return way(log_p, rewards).sum()

        return torch.func.grad(torch.func.grad(value))(mean)

    s, v = z[0] / SPREAD, 1 / SPREAD**2
    expected = 0.7 * (s[0] ** 2 - v) - 1.3 * (s.sum() ** 2 - 2 * v)
    assert abs(curvature(dice) - expected) <= 1e-10
    assert abs(curvature(low_variance) - (expected + 1.3 * 2 * s[0] * s[1])) <= 1e-10


class Constant(nn.Module):
    """A bandit's policy: one mean, whatever the state."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean], dtype=torch.float64))

    def forward(self, x):
        return self.mean.expand(len(x), 1)


def bandit(state, action, goal):
    return state, -0.5 * ((action - goal) ** 2)[:, 0]


def test_the_meta_gradient_of_a_bandit_agrees_with_its_closed_form():
    """J(μ) = −½((1−α)²(μ−g)² + σ²): dJ/dμ = −(1−α)²(μ−g); without the Hessian, −(1−α)(μ−g)."""
    alpha, mean, goal, batches = 0.4, 0.5, 1.5, 60
    learner = policy_gradient(Constant(mean), bandit, SPREAD, alpha, 1, dims=1)

    def half(seed):
        z = normal(batches, 2000, 1, 1, seed=seed)
        return Batch(torch.cat([z, torch.full_like(z, goal)], -1), torch.ones(batches, 2000, 1))

    episode, phi = Episode(half(1), half(2)), learner.init()
    for way, exact in ((None, (1 - alpha) ** 2), (first_order, 1 - alpha)):
        objective = bilevel(learner, cost, way)
        rows = [
            objective.value_and_grad(phi, over(lambda d, t=t: d[t : t + 1], episode))
            for t in range(batches)
        ]
        grads = interval(torch.stack([g["mean"][0] for _, g in rows]))
        assert abs(grads.mean - exact * (mean - goal)) <= 2 * grads.interval < 0.1
        values = interval(torch.stack([v for v, _ in rows]))
        true = 0.5 * ((1 - alpha) ** 2 * (mean - goal) ** 2 + SPREAD**2)
        assert abs(values.mean - true) <= 2 * values.interval + 1e-3


# Laws of a learner ----------------------------------------------------------------------------


def test_vmap_equals_the_loop_and_inputs_stay():
    learner, episode = policy_gradient(policy(), walk, SPREAD, 0.01, 2), draw(3)
    phi = learner.init()
    kept = [v.clone() for v in (*phi.values(), *episode.support, *episode.query)]
    one, many = (bilevel(learner, cost, chunk=c).value_and_grad(phi, episode) for c in (1, 3))
    assert abs(one[0] - many[0]) <= 1e-10
    assert all((one[1][k] - many[1][k]).abs().max() <= 1e-10 for k in phi)
    for a, b in zip(kept, (*phi.values(), *episode.support, *episode.query), strict=True):
        assert torch.equal(a, b)


def test_the_order_of_the_trajectories_of_a_step_does_not_matter():
    learner, episode = policy_gradient(policy(), walk, SPREAD, 0.01, 1), draw()
    phi, support = learner.init(), over(lambda d: d[0], episode.support)
    turned = over(lambda d: d[torch.tensor([3, 1, 0, 4, 2])], support)
    a, b = learner.adapt(phi, support), learner.adapt(phi, turned)
    assert all((a[k] - b[k]).abs().max() <= 1e-10 for k in phi)


def test_the_world_is_not_differentiated():
    """Rounding has derivative zero everywhere; the estimator does not notice."""

    def rounded(state, action, goal):
        position, reward = walk(state, action, goal)
        return position, (reward * 10).round() / 10

    learner, episode = policy_gradient(policy(), rounded, SPREAD, 0.01, 1), draw()
    grads = bilevel(learner, cost).value_and_grad(learner.init(), episode)[1]
    assert all(g.abs().max() > 0 for g in grads.values())


def test_zero_steps_are_joint_training():
    learner, episode = policy_gradient(policy(), walk, SPREAD, 0.1, 0), draw()
    phi = learner.init()
    a = bilevel(learner, cost).value_and_grad(phi, episode)
    other = Episode(over(lambda d: d + 1, episode.support), episode.query)
    b = bilevel(learner, cost).value_and_grad(phi, other)
    assert a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in phi)


def test_steps_share_the_trajectories_out():
    """Step j of k takes trajectories j, j + k, …: two steps of one learner are one step of two, one after the other."""
    support = over(lambda d: d[0], draw(trajectories=6).support)

    def make(steps):
        return policy_gradient(policy(), walk, SPREAD, 0.01, steps)

    phi = make(1).init()
    first, second = (over(lambda d, j=j: d[j::2], support) for j in (0, 1))
    by_hand = make(1).adapt(make(1).adapt(phi, first), second)
    ours = make(2).adapt(phi, support)
    assert all((ours[k] - by_hand[k]).abs().max() <= 1e-12 for k in phi)
    with pytest.raises(ValueError, match="a trajectory for each of 7 steps"):
        make(7).adapt(phi, support)


def test_a_policy_that_starts_at_the_goal_s_name_is_told_it():
    net = seeded(lambda: mlp(4, (8,), 2))
    learner = policy_gradient(net, told, SPREAD, 0.1, 0, start=beside)
    x = draw().query.x[0]
    states, actions, rewards = act(apply(net), learner.init(), told, x, SPREAD, 2, beside)
    assert states.shape == (5, 4, 4) and torch.equal(states[..., 2:], x[..., 2:])
    assert torch.equal(learner.predict(learner.init(), x), rewards)
    assert actions.shape == (5, 4, 2)


# Exact expectations: two steps on a line, integrated over the draws -----------------------------

MEAN, GOAL, RATE, SIGMA = 0.1, 1.5, 0.1, 0.5


def line(state, action, goal):
    state = state + action
    return state, -0.5 * ((state - goal) ** 2)[:, 0]


def returns(theta):
    """J(μ) = −½ Σ_{h=1,2} ((hμ − g)² + hσ²)."""
    m = theta["mean"][0]
    return -0.5 * ((m - GOAL) ** 2 + (2 * m - GOAL) ** 2 + 3 * SIGMA**2)


def outcomes(walks, nodes=5):
    """All draws of Gauss and Hermite's rule for two steps of each walk, as support sets, and their weights."""
    z, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    draws = torch.cartesian_prod(*[z] * 2 * walks).view(-1, walks, 2, 1)
    weights = torch.cartesian_prod(*[w / w.sum()] * 2 * walks).prod(-1)
    batch = Batch(torch.cat([draws, torch.full_like(draws, GOAL)], -1), torch.ones(draws.shape[:3]))
    return batch, weights


@pytest.fixture(scope="module")
def exact():
    support, weights = outcomes(2)
    episode = over(lambda d: d.double(), Episode(support, support))
    found = {}
    for way in (reinforce, low_variance, dice):
        net = Constant(MEAN)
        learner = policy_gradient(net, line, SIGMA, RATE, 1, dims=1, surrogate=way)
        learner = learner._replace(predict=lambda theta, x: returns(theta).expand(x.shape[:2]))

        def loss(prediction, y):
            return -prediction.mean()

        ways = (unrolled, first_order, with_sampling(net, line, SIGMA, 1))
        for name, hyper in zip(("through", "first", "sampling"), ways, strict=True):
            rows = gradients(hyper(learner, loss), learner.init(), episode)[:, 0]
            found[way.__name__, name] = -(weights * rows).sum().item()

    def expected_return(theta):
        each = torch.vmap(lambda s: returns(learner.adapt(theta, s)))(episode.support)
        return (weights * each).sum()

    return found, differences(expected_return, learner.init()).item()


def test_the_sampling_term_makes_the_naive_gradient_exact(exact):
    """The expected return after a step on two walks, by differences in μ: the draws stay, and the walks move with μ."""
    found, by_differences = exact
    assert abs(found["reinforce", "sampling"] - by_differences) < 1e-8
    for name in ("reinforce", "low_variance", "dice"):
        assert abs(found[name, "through"] - by_differences) > 0.4
    assert abs(found["dice", "sampling"] - by_differences) > 1  # part of it twice


def test_the_naive_second_derivative_is_nothing_where_the_mean_is_the_parameter(exact):
    """∇²log π = −1/σ², and E[G − b] = 0: what is left is ∇J after an average step, J′(μ + α J′(μ)) = 2."""
    found, _ = exact
    assert abs(found["reinforce", "through"] - 2) < 1e-10
    assert all(abs(found[k, "first"] - 2) < 1e-10 for k in ("reinforce", "low_variance", "dice"))


def test_the_expected_second_derivatives():
    """Of J″ = −5 DiCE has all, the low-variance one all but the product of two steps' scores, the usual one nothing.

    The product is 2 E[s_1 s_2 (r_2 − …)] = 2 ∂²(−½(a_1 + a_2 − g)²)/∂a_1∂a_2 = −2.
    """
    support, weights = over(lambda d: d.double(), outcomes(2)[0]), outcomes(2)[1]
    for way, hessian in ((reinforce, 0), (low_variance, -3), (dice, -5)):
        learner = policy_gradient(Constant(MEAN), line, SIGMA, 1.0, 1, dims=1, surrogate=way)
        slope = torch.func.jacrev(lambda phi, s, f=learner.adapt: f(phi, s)["mean"])
        moved = torch.vmap(slope, (None, 0))(learner.init(), support)["mean"][:, 0, 0]
        assert abs((weights * moved).sum() - (1 + hessian)) < 1e-9, way
        assert math.isclose(weights.sum(), 1, rel_tol=1e-12)


def test_the_world_on_a_line_is_the_one_above():
    support, weights = outcomes(2)
    draws, ours = every_draw(walks=2)
    episode = line_walks(draws, GOAL)
    assert (draws - support.x[..., 0]).abs().max() == 0 and (weights - ours).abs().max() < 1e-15
    assert torch.equal(episode.support.x, support.x.double()) and episode.support is episode.query
    theta = Constant(MEAN).mean.detach()
    assert abs(line_return(theta, GOAL, SIGMA) - returns({"mean": theta})) < 1e-12
    x = episode.support.x[7]
    for world in (line, package_line):
        found = act(apply(Constant(MEAN)), {"mean": theta}, world, x, SIGMA, 1)
        expected = act(apply(Constant(MEAN)), {"mean": theta}, line, x, SIGMA, 1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    value = act(
        apply(Constant(MEAN)), {"mean": theta}, line, episode.support.x.flatten(0, 1), SIGMA, 1
    )
    mean = (value[2].sum(1).view(-1, 2).mean(1) * ours).sum()
    assert abs(mean - line_return(theta, GOAL, SIGMA)) < 1e-12


def test_the_small_policy_and_the_mean_return():
    small, whole = (policy_net(small=share, seed=3) for share in (0.1, 1.0))
    x = normal(5, 2).float()
    assert torch.allclose(small(x), 0.1 * whole(x), atol=1e-7)
    rewards, y = normal(3, 4), normal(3, 4, seed=1)
    assert abs(mean_return(rewards, y) - (rewards * y).sum() / 3) < 1e-12
    assert cost(rewards, y) == -mean_return(rewards, y)


# Numbers that the page's solutions state --------------------------------------------------------


def test_without_a_baseline_the_usual_second_derivative_has_the_wrong_sign():
    """One action: −E[r]/σ² = 4.42, where J″ = −1."""
    draws, weights = every_draw(walks=1, horizon=1)
    mu = torch.tensor(MEAN).double()
    actions = (mu + SIGMA * draws)[..., 0]
    rewards = -0.5 * (actions - GOAL) ** 2

    def value(m):
        log_p = log_normal(actions[..., None, None], m.expand(len(actions), 1, 1, 1), SIGMA)
        return (weights[:, None] * (log_p[..., 0] - log_p[..., 0].detach()) * rewards).sum()

    found = torch.func.grad(torch.func.grad(value))(mu)
    assert abs(found - 4.42) < 1e-6
    assert abs(((MEAN - GOAL) ** 2 + SIGMA**2) / (2 * SIGMA**2) - 4.42) < 1e-12


def test_the_score_function_has_18_times_the_variance_of_the_path():
    """One action and the best constant baseline: 2d² + 2.5σ² against σ², with d = μ − g."""
    draws, weights = every_draw(walks=1, horizon=1, points=9)
    z = draws.flatten()
    d = MEAN - GOAL
    rewards = -0.5 * (d + SIGMA * z) ** 2
    score = (rewards + 0.5 * (d**2 + SIGMA**2)) * z / SIGMA
    path = -(d + SIGMA * z)
    first, second = ((weights * v).sum() for v in (score, path))
    assert abs(first + d) < 1e-9 and abs(second + d) < 1e-9
    ratio = (weights * (score + d) ** 2).sum() / (weights * (path + d) ** 2).sum()
    assert abs(ratio - (2 * d**2 + 2.5 * SIGMA**2) / SIGMA**2) < 1e-9 and round(ratio.item()) == 18


def test_three_rewards_of_one_walk_tell_the_goal():
    """r + ‖p‖² = 2 p·g − ‖g‖²: three linear equations, to 10⁻⁴ in float32."""
    net, off = policy_net(seed=0), 0.0
    x = navigation(20, 10, 200, 30_000)(0).support.x
    for task in x:
        states, _, rewards = act(apply(net), parameters(net), walk, task, 0.1, 2)
        place, r = states[0, 1:4].double(), rewards[0, :3].double()
        rows = torch.cat([2 * place, -torch.ones(3, 1, dtype=torch.float64)], 1)
        goal = torch.linalg.solve(rows, r + (place**2).sum(1))[:2]
        off = max(off, (goal - task[0, 0, 2:]).abs().max().item())
    assert off < 1e-3
