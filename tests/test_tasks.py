"""Law 4: streams are pure, and a task holds what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtlib.core import Batch, Episode, over
from mtlib.data.linear import exact_stream, linear_tasks, samples
from mtlib.data.planted import planted
from mtlib.data.sinusoids import joint_optimum, risk_of, sinusoids
from mtlib.tasks import ClassSet, episodes, mixture, one_hot, pool, quiz


def numbered(classes=7, items=6):
    """Item i of class c is the pair (c, i): what a stream drew can be read off."""
    c, i = torch.meshgrid(torch.arange(classes), torch.arange(items), indexing="ij")
    return ClassSet(
        torch.stack([c, i], -1).float(), [f"class{c}" for c in range(classes)], "numbered"
    )


def equal(a, b):
    same = []
    over(lambda d: same.append(d) or d, a)
    other = []
    over(lambda d: other.append(d) or d, b)
    return all(torch.equal(x, y) for x, y in zip(same, other, strict=True))


STREAMS = {
    "episodes": lambda seed: episodes(numbered(), 3, 2, 3, 4, seed),
    "mixture": lambda seed: mixture(pool(numbered()), pool(numbered(5, 9)), batch=8, seed=seed),
    "sinusoids": lambda seed: sinusoids(5, 5, 4, seed),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_a_pure_function_of_seed_and_step(name):
    stream = STREAMS[name](3)
    kept = stream(17)
    [stream(i) for i in range(5)]
    torch.manual_seed(99)
    assert equal(stream(17), kept) and equal(STREAMS[name](3)(17), kept)
    assert not equal(stream(18), kept) and not equal(STREAMS[name](4)(17), kept)


def test_an_episode_holds_different_classes_and_different_items():
    ways, shots, queries = 4, 2, 3
    draw = episodes(numbered(), ways, shots, queries, tasks=50, seed=0)(0)
    assert draw.support.x.shape == (50, 8, 2) and draw.query.y.shape == (50, 12, 4)
    for t in range(50):
        support, query = over(lambda d, t=t: d[t], draw)
        for part, k in ((support, shots), (query, queries)):
            label = part.y.argmax(1)
            assert torch.equal(part.y.sum(1), torch.ones(len(part.y)))
            assert torch.equal(label.bincount(), torch.full((ways,), k))
            for w in range(ways):  # one class for each label
                assert len(part.x[label == w, 0].unique()) == 1
        classes = [support.x[support.y.argmax(1) == w, 0][0].item() for w in range(ways)]
        assert len(set(classes)) == ways
        assert classes == [query.x[query.y.argmax(1) == w, 0][0].item() for w in range(ways)]
        assert len({tuple(r) for r in torch.cat([support.x, query.x]).tolist()}) == ways * (
            shots + queries
        )


def test_every_class_and_item_is_drawn_equally_often():
    stream = episodes(numbered(), 3, 1, 1, tasks=2000, seed=1)
    drawn = torch.cat([stream(0).support.x, stream(0).query.x], 1).flatten(0, 1).long()
    counts = torch.bincount(drawn[:, 0] * 6 + drawn[:, 1], minlength=42).double()
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 41 + 5 * math.sqrt(2 * 41)


def test_a_mixture_draws_from_each_set_and_labels_over_all():
    a, b = pool(numbered(3, 4)), pool(numbered(6, 4))
    draw = mixture(a, b, batch=64, seed=0)(0)
    assert draw.x.shape == (2, 64, 2) and draw.y.shape == (2, 64, 6)
    assert torch.equal(draw.y.argmax(-1).float(), draw.x[..., 0])
    assert draw.x[0, :, 0].max() == 2 and draw.x[1, :, 0].max() == 5
    real = mixture(Batch(torch.randn(9, 2), torch.randn(9, 3)), batch=4, seed=0)(0)
    assert real.y.shape == (1, 4, 3)


def test_quiz_is_the_query_set():
    stream = sinusoids(5, 7, 4, 0)
    assert equal(quiz(stream)(3), stream(3).query)


def test_selecting_classes_keeps_names():
    kept = numbered().select([5, 2])
    assert kept.names == ["class5", "class2"] and kept.items[:, 0, 0].tolist() == [5, 2]


def test_sinusoids_are_sinusoids_of_the_stated_range():
    draw = sinusoids(20, 20, 500, 0, torch.float64)(0)
    x, y = (torch.cat([getattr(draw.support, k), getattr(draw.query, k)], 1)[..., 0] for k in "xy")
    basis = torch.stack([x.sin(), x.cos()], -1)  # A sin(x − φ) = A cos φ sin x − A sin φ cos x
    coefficients = torch.linalg.lstsq(basis, y[..., None]).solution
    assert (basis @ coefficients - y[..., None]).abs().max() < 1e-9
    amplitude = coefficients[:, :, 0].norm(dim=1)
    phase = torch.atan2(-coefficients[:, 1, 0], coefficients[:, 0, 0])
    assert 0.1 <= amplitude.min() < 0.2 and 4.9 < amplitude.max() <= 5.0
    assert 0 <= phase.min() < 0.1 and 3.0 < phase.max() <= math.pi
    assert x.abs().max() <= 5 and x.abs().max() > 4.9


def test_the_joint_optimum_of_the_sinusoids():
    """No function does better: its risk is 3.0057 (papers: −1.6234 cos x), and any shift adds its square."""
    assert float(-joint_optimum(torch.zeros(()))) == pytest.approx(1.6234, abs=1e-4)
    best = risk_of(joint_optimum)
    assert best == pytest.approx(3.0057, abs=1e-4)
    assert risk_of(lambda x: joint_optimum(x) + 0.5) == pytest.approx(best + 0.25, abs=1e-6)
    draw = sinusoids(1, 200, 20000, 0, torch.float64)(0).query
    assert ((joint_optimum(draw.x) - draw.y) ** 2).mean().item() == pytest.approx(best, rel=0.02)


def test_linear_tasks_are_episodes_with_the_population_loss():
    tasks = linear_tasks(6, 4, seed=0)
    episode = exact_stream(tasks)(0)
    w = torch.randn(4, dtype=torch.float64)
    half = 0.5 * ((episode.support.x @ w[:, None] - episode.support.y) ** 2).mean((1, 2))
    e = w - tasks.weights
    assert (half - 0.5 * torch.einsum("ti,tij,tj->t", e, tasks.covariances, e)).abs().max() < 1e-12
    alike = linear_tasks(3, 4, seed=0, alike=True)
    assert torch.equal(alike.covariances[0], alike.covariances[2])
    x, y = samples(200, dims=10, tasks=2, noise=0.0, seed=1)
    w = torch.linalg.lstsq(x, y).solution
    assert (x @ w - y).abs().max() < 1e-4 and not torch.allclose(w[0], w[1])


def test_planted_classes_share_a_world_and_no_class():
    a, b = planted(40, 200, seed=0), planted(40, 200, seed=1)
    assert a.items.shape == (40, 200, 30) and not torch.equal(a.items[0], b.items[0])
    for data in (
        a,
        b,
    ):  # between-class variance lies in the five informative dimensions of the world
        means = data.items.mean(1).numpy()
        share = np.linalg.eigvalsh(np.cov(means.T))[::-1]
        assert share[:5].sum() > 0.9 * share.sum()
    top = [np.linalg.eigh(np.cov(d.items.mean(1).numpy().T))[1][:, -5:] for d in (a, b)]
    assert np.linalg.svd(top[0].T @ top[1])[1].min() > 0.9  # the same five
    other = planted(40, 200, seed=0, world=1)
    away = np.linalg.eigh(np.cov(other.items.mean(1).numpy().T))[1][:, -5:]
    assert np.linalg.svd(top[0].T @ away)[1].min() < 0.7


def test_a_draw_is_where_the_data_are():
    draws = (
        episodes(numbered(), 3, 2, 3, 4, 0)(0),
        mixture(pool(numbered()), batch=4, seed=0)(0),
    )
    assert isinstance(draws[0], Episode) and isinstance(draws[1], Batch)
    assert {d.device for part in (*draws[0], draws[1]) for d in part} == {torch.device("cpu")}
    assert one_hot(torch.tensor([1]), 3, torch.float64).dtype == torch.float64
