"""Law 5: the interval covers, pairs pair, memory stays flat."""

from __future__ import annotations

import math

import pytest
import torch
from machine import printed
from scipy import stats
from torch.nn.functional import cross_entropy

from mtlib.core import parameters
from mtlib.data.planted import planted
from mtlib.evaluate import compare, evaluate, interval, over_seeds
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.tasks import episodes


@pytest.fixture(scope="module")
def scored():
    torch.manual_seed(0)
    net = mlp(30, (16,), 5)
    stream = episodes(planted(20, 20, seed=2), 5, 1, 5, tasks=32, seed=9)
    learner = protonet(net)
    return learner, learner.init(), stream


@pytest.mark.parametrize("n", [5, 600])
def test_the_interval_covers_95_percent(n):
    g = torch.Generator().manual_seed(0)
    truth, hits, trials = 0.7, 0, 4000
    for _ in range(trials):
        s = interval(truth + 0.2 * torch.randn(n, generator=g, dtype=torch.float64))
        hits += abs(s.mean - truth) <= s.interval
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_the_interval_is_students_t():
    values = torch.tensor([0.2, 0.5, 0.9, 0.4], dtype=torch.float64)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    s = interval(values)
    assert (s.mean - s.interval, s.mean + s.interval) == pytest.approx((low, high))
    assert str(s) == "0.500 ± 0.468" and s.percent() == "50.0 ± 46.8"


def test_evaluate_scores_each_episode_by_hand(scored):
    learner, phi, stream = scored
    s = evaluate(learner, phi, stream, episodes=40, progress=False)
    assert len(s.values) == 40
    first = stream(0)
    for t in (0, 7):
        theta = learner.adapt(phi, type(first.support)(*(d[t] for d in first.support)))
        right = learner.predict(theta, first.query.x[t]).argmax(1) == first.query.y[t].argmax(1)
        assert s.values[t].item() == pytest.approx(right.double().mean().item())
    for chunk in (1, 7, 32):
        again = evaluate(learner, phi, stream, 40, chunk=chunk, progress=False)
        assert torch.equal(again.values, s.values)


def test_compare_pairs_the_same_episodes_and_refuses_others(scored):
    learner, phi, stream = scored
    worse = {
        k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
        for k, v in phi.items()
    }
    a, b = (evaluate(learner, p, stream, 200, progress=False) for p in (phi, worse))
    gap = compare(a, b)
    assert gap.mean == pytest.approx(a.mean - b.mean)
    assert gap.interval < math.hypot(a.interval, b.interval)  # what pairing is for
    other = episodes(planted(20, 20, seed=2), 5, 1, 5, tasks=32, seed=10)
    with pytest.raises(ValueError, match="same episodes"):
        compare(a, evaluate(learner, phi, other, 200, progress=False))


def test_over_seeds_is_an_interval_over_runs():
    runs = over_seeds(lambda seed: [0.1, 0.3, 0.5][seed], range(3))
    assert runs.mean == pytest.approx(0.3) and runs.interval == pytest.approx(
        4.3027 * 0.2 / math.sqrt(3), rel=1e-4
    )


def test_memory_does_not_grow_with_the_number_of_episodes():
    """Peak memory of 5,000 episodes of second-order-capable adaptation against that of 200, in fresh processes."""
    program = """
import resource, sys, torch
from torch.nn.functional import cross_entropy
from mtlib.core import Batch, Episode
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.nets import conv4
torch.manual_seed(0); torch.set_num_threads(1)
learner = maml(conv4(2, width=4, size=16), cross_entropy, 0.1, 1)
y = torch.eye(2).expand(10, 2, 2)
def stream(step):
    g = torch.Generator().manual_seed(step)
    draw = lambda: Batch(torch.rand(10, 2, 1, 16, 16, generator=g), y)
    return Episode(draw(), draw())
evaluate(learner, learner.init(), stream, int(sys.argv[1]), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (int(printed("-c", program, n)) for n in ("200", "5000"))
    assert many < few + 12_000, f"{few} KB at 200 episodes, {many} KB at 5,000"


def test_evaluation_leaves_no_graph(scored):
    _, _, stream = scored
    torch.manual_seed(0)
    net = mlp(30, (16,), 5)
    phi = {k: v.requires_grad_() for k, v in parameters(net).items()}
    s = evaluate(maml(net, cross_entropy, 0.1, 2), phi, stream, 64, progress=False)
    assert not s.values.requires_grad
