"""Neural processes: the likelihood as a Gaussian written out, the networks as their formulas, and what they learn."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from problems import seeded
from scipy import stats
from torch.nn.functional import cross_entropy, mse_loss, softplus

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, features, over
from mtlib.data.sinusoids import sinusoids
from mtlib.evaluate import evaluate
from mtlib.learners.amortised import attentive_cnp, cnp, gaussian_nll, point
from mtlib.nets import mlp
from mtlib.train import fit


@pytest.fixture
def net():
    return seeded(lambda: mlp(1, (6,), 2))


def draw(rows, seed, ways=2):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (1, ways))
    return Batch(x, y)


def test_the_likelihood_is_a_gaussian_written_out():
    g = torch.Generator().manual_seed(0)
    mean, y = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(2))
    scale = 0.1 + torch.rand(5, 2, generator=g, dtype=torch.float64)
    ours = gaussian_nll(torch.cat([mean, scale], 1), y).item()
    density = torch.exp(-((y - mean) ** 2) / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi))
    torchs = -torch.distributions.Normal(mean, scale).log_prob(y).mean().item()
    scipys = -stats.norm.logpdf(y.numpy(), mean.numpy(), scale.numpy()).mean()
    for other in (-density.log().mean().item(), torchs, scipys):
        assert abs(ours - other) <= 1e-12


def test_cnp_is_its_formula(net):
    learner = cnp(net, hidden=5, floor=0.2)
    phi, z = learner.init(), features(net)
    support, x = draw(4, 1), draw(3, 2).x
    ours = learner.predict(learner.adapt(phi, support), x)

    def perceptron(name, v):
        w = {k.removeprefix(f"process.{name}."): p for k, p in phi.items()}
        return w["2.weight"] @ (w["0.weight"] @ v + w["0.bias"]).relu() + w["2.bias"]

    zs, zq = z(phi, support.x), z(phi, x)
    for w in range(2):
        said = [
            perceptron("encoder", torch.cat([zs[i], support.y[i, w : w + 1]])) for i in range(4)
        ]
        r = torch.stack(said).mean(0)
        for b in range(3):
            mean, a = perceptron("decoder", torch.cat([zq[b], r]))
            assert abs(ours[b, w] - mean) <= 1e-12
            assert abs(ours[b, 2 + w] - (0.2 + 0.8 * softplus(a))) <= 1e-12


def test_the_attentive_process_that_asks_nothing_is_cnp(net):
    a, b = attentive_cnp(net, hidden=5), cnp(net, hidden=5)
    phi = a.init()
    support, x = draw(4, 1), draw(3, 2).x
    silent = {**phi, "process.query.weight": 0 * phi["process.query.weight"]}
    plain = {k: phi[k] for k in b.init()}
    expected = b.predict(b.adapt(plain, support), x)
    assert (a.predict(a.adapt(silent, support), x) - expected).abs().max() <= 1e-12
    asking = {**phi, "process.query.weight": 1000 * phi["process.query.weight"]}
    assert (a.predict(a.adapt(asking, support), x) - expected).abs().max() > 1e-4


def test_point_gives_the_means(net):
    learner = cnp(net)
    theta = learner.adapt(learner.init(), draw(4, 1))
    x = draw(3, 2).x
    assert torch.equal(point(learner).predict(theta, x), learner.predict(theta, x)[:, :2])


def test_a_loss_of_one_column_is_refused(net):
    learner, episode = cnp(net), Episode(draw(4, 1), draw(3, 2))
    many = over(lambda d: d[None], episode)
    with pytest.raises(ValueError, match=r"the learner predicts \(3, 4\)"):
        bilevel(learner, mse_loss)(learner.init(), many)
    with pytest.raises(ValueError, match="expected predictions and targets of one shape"):
        bilevel(point(learner), gaussian_nll)(learner.init(), many)
    with pytest.raises(ValueError, match="expected predictions of the targets' shape"):
        evaluate(learner, learner.init(), lambda step: many, 2, cross_entropy, progress=False)


@pytest.mark.parametrize("make", [cnp, attentive_cnp])
def test_it_learns_sinusoids_and_knows_how_well(make):
    """Below the best Gaussian that ignores the support set, and its 95 % intervals hold about that many answers."""
    torch.manual_seed(0)
    learner = make(mlp(1, (40, 40), 1), hidden=40)
    objective, fast = bilevel(learner, gaussian_nll), partial(torch.optim.Adam, lr=3e-3)
    run = fit(objective, learner.init(), sinusoids(seed=0), 400, fast, progress=False)
    test = sinusoids(seed=1)
    score = evaluate(learner, run.params, test, 200, gaussian_nll, progress=False)

    def covered(prediction, y):
        mean, scale = prediction.chunk(2, -1)
        return ((y - mean).abs() <= 1.959964 * scale).float().mean()

    covered.columns = 2
    share = evaluate(learner, run.params, test, 200, covered, progress=False)
    ignoring = 0.5 * np.log(2 * np.pi * np.e * 3.0057)  # N(joint optimum, its risk)
    print(f"{make.__name__}: NLL {score}, ignoring the support {ignoring:.3f}, ", end="")
    print(f"95 % intervals hold {share}")
    assert score.mean + score.interval < ignoring - 0.3
    assert 0.9 <= share.mean <= 0.99
