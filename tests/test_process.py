"""Neural processes: the likelihood as a Gaussian written out, the networks as their formulas, and what they learn."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from pages import at_small_scale, run_until
from problems import seeded
from scipy import stats
from torch.nn.functional import cross_entropy, mse_loss, softplus

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, features, over, take
from mtlib.data.sinusoids import AMPLITUDE, noisy_sinusoids, sinusoids
from mtlib.evaluate import answers, evaluate
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


def test_with_one_support_item_attention_is_the_mean(net):
    """A softmax over one item is 1, whatever is asked: at one point the two are one family of functions."""
    a, b = attentive_cnp(net, hidden=5), cnp(net, hidden=5)
    phi = {k: 10 * v for k, v in a.init().items()}
    one, x = draw(1, 1), draw(3, 2).x
    theirs = b.predict(b.adapt({k: phi[k] for k in b.init()}, one), x)
    assert (a.predict(a.adapt(phi, one), x) - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_the_best_gaussian_has_the_mean_and_the_spread_of_what_it_predicts():
    """Of a mixture of two Gaussians, which is none: no other (μ, σ) has a lower expected −log N."""
    share, means, own = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0]), 0.3
    mean = (share * means).sum()
    spread = ((share * (means - mean) ** 2).sum() + own**2).sqrt()

    def expected(mu, sigma):
        return sigma.log() + (share * ((means - mu) ** 2 + own**2)).sum() / (2 * sigma**2)

    best = expected(mean, spread)
    for mu in (mean - 0.1, mean, mean + 0.1):
        for sigma in (0.9 * spread, spread, 1.1 * spread):
            assert expected(mu, sigma) >= best
    assert expected(mean, spread * 1.1) - best > 1e-3 and expected(mean + 0.1, spread) - best > 1e-3


def test_the_page_knows_the_exact_spread():
    """Its closed form against a sum over a fine grid of amplitudes and phases."""
    with at_small_scale():
        page = run_until("amortised", "BAND")
    band = page["BAND"]
    draw = noisy_sinusoids(3, 20, 4, seed=8)(0)
    a = AMPLITUDE[0] + (AMPLITUDE[1] - AMPLITUDE[0]) * (torch.arange(400).double() + 0.5) / 400
    phase = torch.pi * (torch.arange(400).double() + 0.5) / 400
    a, phase = (v.flatten() for v in torch.meshgrid(a, phase, indexing="ij"))
    for ours, t in zip(answers(band, {}, draw), range(4), strict=True):
        (x, y), xq = (over(torch.Tensor.double, take(draw.support, t))), draw.query.x[t].double()
        off = y - a * torch.sin(x - phase)
        weight = torch.softmax(-(off**2).sum(0) / (2 * page["NOISE"] ** 2), 0)
        curves = a * torch.sin(xq - phase)
        mean = curves @ weight
        spread = ((curves - mean[:, None]) ** 2 @ weight + page["NOISE"] ** 2).sqrt()
        theirs = torch.stack([mean, spread], 1)
        assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()


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
