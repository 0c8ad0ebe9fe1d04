"""Where the loss is a return: the stream, the estimators against sums written out and closed forms, the page's choices."""

from __future__ import annotations

import pytest
import torch
from pages import run_until
from problems import normal, seeded
from torch import nn

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode, apply, over, parameters
from mtlib.data import navigation as module
from mtlib.data.navigation import navigation, walk
from mtlib.evaluate import interval
from mtlib.learners.policy import (
    act,
    baseline,
    cost,
    log_normal,
    policy_gradient,
    surrogate,
)
from mtlib.nets import mlp

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


def test_the_second_derivative_per_draw():
    """One action: d²/dμ² = mean (r − b)((z/σ)² − 1/σ²)."""
    z = normal(40, 1)
    mean = torch.tensor(0.4).double()
    actions = mean + SPREAD * z
    rewards = -((actions - 1) ** 2)

    def value(m):
        return surrogate(log_normal(actions[..., None], m.expand(40, 1, 1), SPREAD), rewards).mean()

    ours = torch.func.grad(torch.func.grad(value))(mean)
    expected = ((rewards - baseline(rewards)) * ((z / SPREAD) ** 2 - 1 / SPREAD**2)).mean()
    assert abs(ours - expected) <= 1e-10


def test_cross_terms_between_steps_are_there():
    """Two steps that share a mean: (r₁ + r₂) with scores s₁, s₂ -> r₁(s₁² − 1/σ²) + r₂((s₁ + s₂)² − 2/σ²), no baseline."""
    z, mean = normal(1, 2), torch.tensor(0.2).double()
    actions = mean + SPREAD * z
    rewards = torch.tensor([[0.7, -1.3]], dtype=torch.float64)

    def value(m):
        log_p = log_normal(actions[..., None], m.expand(1, 2, 1), SPREAD)
        return surrogate(log_p, rewards).sum()

    s, v = z[0] / SPREAD, 1 / SPREAD**2
    expected = 0.7 * (s[0] ** 2 - v) - 1.3 * (s.sum() ** 2 - 2 * v)
    assert abs(torch.func.grad(torch.func.grad(value))(mean) - expected) <= 1e-10


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


def test_the_order_of_trajectories_does_not_matter():
    learner, episode = policy_gradient(policy(), walk, SPREAD, 0.01, 2), draw()
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


# The page -------------------------------------------------------------------------------------


def test_rates_are_chosen_without_the_test_tasks(small):
    def run(changed):
        def other(*arguments, seed=0, **more):
            stream = navigation(*arguments, seed=seed, **more)
            return (lambda step: over(lambda d: -d, stream(step))) if seed in changed else stream

        small.setattr(module, "navigation", other)
        page = run_until("returns", "CHOSEN")
        return (page["CHOSEN"], page["VALIDATED"]), page["TEST"], page["CHOICE"]

    chosen, test, choice = run(())
    assert chosen[0] and run((test,))[0] == chosen
    assert run((choice,))[0][1] != chosen[1]
