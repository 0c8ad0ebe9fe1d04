"""Law 4: streams are pure, and a task holds what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, over, parameters
from mtlib.data.linear import exact_stream, linear_tasks, samples
from mtlib.data.planted import planted
from mtlib.data.sinusoids import joint_optimum, risk_of, sinusoids
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.nets import two_halves
from mtlib.tasks import ClassSet, check_draw, episodes, mixture, one_hot, pool, quiz, uneven
from mtlib.train import fit


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


def test_uneven_questions_are_the_first_of_their_class():
    plain = episodes(numbered(9, 8), 3, 1, 6, 50, seed=0)
    draw, whole = uneven(plain, (4, 0, 1))(2), plain(2)
    assert equal(draw.support, whole.support)
    rows = [0, 1, 2, 3, 12]  # six questions of each class, in order
    assert equal(draw.query, over(lambda d: d[:, rows], whole.query))


def test_uneven_questions_with_random_counts():
    plain = episodes(numbered(9, 8), 3, 1, 6, 400, seed=0)
    stream = uneven(plain, lambda rng: rng.multinomial(6, rng.dirichlet([2.0] * 3)), seed=5)
    counts = stream(0).query.y.sum(1)
    assert (counts.sum(1) == 6).all() and equal(stream(0), stream(0))
    assert not torch.equal(counts, stream(1).query.y.sum(1))
    # a Dirichlet-multinomial count of 6 at 2, 4 has mean 2 and variance 6·(1/3)(2/3)(6 + 6)/(1 + 6)
    assert ((counts.mean(0) - 2).abs() < 0.35).all()
    assert counts.var(0).mean().item() == pytest.approx(6 * (2 / 9) * 12 / 7, rel=0.1)


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


# Integer items -----------------------------------------------------------------------------------


class Words(nn.Module):
    """The mean of the embeddings of a text's tokens."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, x):
        return self.table(x).mean(1)


class Bytes(nn.Module):
    def forward(self, x):
        return x.float().flatten(1) / 255


def test_tokens_go_to_an_embedding():
    g = torch.Generator().manual_seed(0)
    data = ClassSet(torch.randint(50, (6, 9, 7), generator=g), list("abcdef"), "texts")
    net = two_halves(Words(), nn.Linear(8, 3))
    stream = episodes(data, 3, 2, 2, tasks=2, seed=0)
    draw, phi = stream(0), parameters(net)
    assert draw.support.x.dtype == torch.int64 and draw.support.y.dtype == torch.float32
    plain = torch.stack([cross_entropy(net(x), y) for x, y in zip(*draw.query, strict=True)])
    assert torch.allclose(joint(net, cross_entropy)(phi, draw.query), plain.mean())
    learner = maml(net, cross_entropy, 0.5, 2)
    run = fit(bilevel(learner, cross_entropy), phi, stream, 3, progress=False)
    assert all(not torch.equal(run.params[k], phi[k]) for k in phi)
    assert evaluate(learner, phi, stream, 4, progress=False).values.shape == (4,)


def test_images_may_stay_bytes():
    g = torch.Generator().manual_seed(0)
    held = torch.randint(256, (5, 4, 1, 6, 6), generator=g, dtype=torch.uint8)
    data = ClassSet(held, list("abcde"), "images")
    net = two_halves(Bytes(), nn.Linear(36, 3))
    draw = episodes(data, 3, 1, 2, tasks=2, seed=0)(3)
    real = episodes(data._replace(items=held.float()), 3, 1, 2, tasks=2, seed=0)(3)
    assert draw.query.x.dtype == torch.uint8 and torch.equal(draw.query.x.float(), real.query.x)
    assert torch.equal(draw.support.y, real.support.y)
    plain = torch.stack(
        [cross_entropy(net.head(x.flatten(1) / 255), y) for x, y in zip(*real.query, strict=True)]
    )
    assert torch.allclose(joint(net, cross_entropy)(parameters(net), draw.query), plain.mean())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
def test_a_mixture_makes_rows_that_a_loss_takes(dtype):
    x, y = torch.arange(12).view(6, 2).to(dtype), torch.arange(6) % 3
    draw = mixture(Batch(x, y), batch=20, seed=0)(0)
    assert draw.x.dtype == dtype
    assert draw.y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert torch.equal(draw.y.argmax(-1), (draw.x[..., 0].long() // 2) % 3)
    assert torch.equal(draw.y.sum(-1), torch.ones(1, 20, dtype=draw.y.dtype))


def test_a_draw_may_hold_a_nest():
    x, y = (
        {"tokens": torch.ones(2, 3, 4).long(), "length": torch.ones(2, 3).long()},
        torch.ones(2, 3, 1),
    )
    check_draw(Batch(x, y))
    check_draw(Batch((x, torch.ones(2, 3, 4, dtype=torch.bool)), y))
    with pytest.raises(ValueError, match=r"expected x \(T, rows"):
        check_draw(Batch({**x, "length": torch.ones(2)}, y))
    with pytest.raises(TypeError, match=r"convert with torch\.from_numpy"):
        check_draw(Batch(x["tokens"].numpy(), y))


def test_classes_are_selected_by_number_or_mask():
    data = numbered()
    mask = torch.zeros(len(data.names), dtype=torch.bool)
    mask[[1, 4]] = True
    for keep in ([1, 4], torch.tensor([1, 4]), np.array([1, 4]), mask):
        kept = data.select(keep)
        assert kept.names == [data.names[1], data.names[4]]
        assert torch.equal(kept.items, data.items[[1, 4]])
    assert data.select([]).names == [] and data.select([-1]).names == data.names[-1:]
