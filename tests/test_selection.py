"""Criteria without target labels: each by hand, and the one that is an estimate against what it estimates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mtlib.transfer.selection import (
    class_shares,
    density_ratio,
    dev,
    entropy,
    information,
    snd,
    temperature,
)


def test_entropy_and_information_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64))
    each = [stats.entropy([0.5, 0.5]), stats.entropy([0.9, 0.1])]
    assert abs(entropy(logits) - np.mean(each)) <= 1e-12
    assert abs(information(logits) - (stats.entropy([0.7, 0.3]) - np.mean(each))) <= 1e-12


def test_probabilities_are_no_logits():
    """Softmax over them once more: .69 where the entropy is .33."""
    p = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)
    assert abs(entropy(p.log()) - stats.entropy([0.1, 0.9])) <= 1e-12
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rows = torch.softmax(torch.randn(30, 7, dtype=torch.float64), 1).to(dtype)
        for criterion in (entropy, information):
            with pytest.raises(ValueError, match="got probabilities"):
                criterion(rows)
            criterion(rows.log())


def test_entropy_likes_a_collapse_and_information_does_not():
    one = torch.zeros(40, 10)
    one[:, 3] = 50
    varied = 50 * torch.eye(10).repeat(4, 1)
    torn = torch.zeros(40, 10)
    assert entropy(one) < 1e-12 and entropy(varied) < 1e-12
    assert abs(entropy(torn) - math.log(10)) <= 1e-12
    assert information(one) < 1e-12 and abs(information(torn)) <= 1e-12
    assert abs(information(varied) - math.log(10)) <= 1e-9


def test_snd_by_hand_on_three_points():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    # ⟨1,2⟩ = 0, ⟨1,3⟩ = 0.6, ⟨2,3⟩ = 0.8; each point has two neighbours.
    rows = [(0.0, 0.6), (0.0, 0.8), (0.6, 0.8)]
    expected = 0.0
    for a, b in rows:
        p = 1 / (1 + math.exp((b - a) / 0.5))
        expected += stats.entropy([p, 1 - p]) / 3
    assert abs(snd(x, temperature=0.5) - expected) <= 1e-12
    scaled = x * torch.tensor([[3.0], [0.1], [7.0]])
    assert abs(snd(scaled, temperature=0.5) - expected) <= 1e-12


def test_snd_counts_near_neighbours_and_is_largest_for_one_point():
    tight = torch.eye(4).repeat_interleave(5, 0)  # four clusters of five
    loose = torch.eye(20)
    assert abs(snd(tight) - math.log(4)) < 1e-3  # the four others of its cluster
    assert abs(snd(loose) - math.log(19)) <= 1e-9
    assert abs(snd(torch.ones(20, 3)) - math.log(19)) <= 1e-9


def test_dev_is_its_formula_by_hand():
    losses = torch.tensor([1.0, 0.0, 2.0])
    weights = torch.tensor([0.5, 1.0, 3.0])
    # wℓ = (0.5, 0, 6), mean 13/6; w = (0.5, 1, 3), mean 3/2. Deviations (−5/3, −13/6, 23/6) and
    # (−1, −1/2, 3/2): their products sum to 17/2, the squares of the second to 7/2, so η = −17/7.
    assert abs(dev(losses, weights) - (13 / 6 - 17 / 7 * 3 / 2 + 17 / 7)) <= 1e-12


def test_dev_with_equal_weights_is_the_mean_and_with_equal_losses_the_loss():
    losses = torch.tensor([1.0, 0.0, 2.0])
    assert dev(losses, torch.ones(3)) == 1.0
    weights = torch.tensor([0.2, 0.9, 4.0], dtype=torch.float64)
    assert abs(dev(torch.full((3,), 0.7, dtype=torch.float64), weights) - 0.7) <= 1e-12


def test_dev_is_unbiased_and_steadier_than_plain_weighting_under_the_true_ratio():
    # Source N(0, 1), target N(0.5, 1), loss x²: the target's risk is 1.25.
    rng = np.random.default_rng(0)
    estimates, plain = [], []
    for _ in range(600):
        x = rng.normal(size=400)
        w = stats.norm.pdf(x, 0.5) / stats.norm.pdf(x)
        estimates.append(dev(torch.from_numpy(x**2), torch.from_numpy(w)))
        plain.append((w * x**2).mean())
    error = np.std(estimates) / np.sqrt(600)
    assert abs(np.mean(estimates) - 1.25) < 4 * error + 0.01
    assert abs(np.mean(estimates) - 1) > 10 * error, "the source's risk"
    assert np.std(estimates) < 0.8 * np.std(plain)


def test_the_density_ratio_of_two_normals_is_found():
    rng = np.random.default_rng(0)
    source = torch.from_numpy(rng.normal(size=(30_000, 1)))
    target = torch.from_numpy(rng.normal(0.7, 1, size=(10_000, 1)))
    at = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    exact = np.exp(0.7 * at[:, 0].numpy() - 0.245)
    assert np.allclose(density_ratio(source, target, at).numpy(), exact, rtol=0.07)


def test_bad_input_is_named():
    x = torch.randn(5, 3)
    for criterion in (entropy, information, snd):
        with pytest.raises(ValueError, match="shape"):
            criterion(x[0])
        with pytest.raises(ValueError, match="finite"):
            criterion(x * torch.nan)
    with pytest.raises(ValueError, match="n ≥ 2"):
        snd(x[:1])
    with pytest.raises(ValueError, match="temperature > 0"):
        snd(x, temperature=0.0)
    with pytest.raises(ValueError, match="a loss and a weight"):
        dev(x[:, 0], x[:2, 0].abs())
    with pytest.raises(ValueError, match="weights ≥ 0"):
        dev(x[:, 0], -torch.ones(5))
    with pytest.raises(ValueError, match="the same width"):
        density_ratio(x, x, x[:, :2])


# Temperature ----------------------------------------------------------------------------------


def drawn(scale, n=4000, seed=0):
    """Logits whose softmax are the true probabilities, made `scale` times too sure; labels drawn from them."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = torch.multinomial(torch.softmax(z, 1), 1, generator=g)[:, 0]
    return scale * z, y


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_what_made_logits_too_sure(scale):
    z, y = drawn(scale)
    found = temperature(z, y)
    assert found == pytest.approx(scale, rel=0.05)
    # another library's minimum of the same cross-entropy
    from scipy.optimize import minimize_scalar

    def risk(t):
        return torch.nn.functional.cross_entropy(z / t, y).item()

    best = minimize_scalar(risk, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(best.x, rel=1e-5)
    p = torch.softmax(z / found, 1)
    own = z.gather(1, y[:, None]).sum().item()
    assert (p * z).sum().item() == pytest.approx(own, rel=1e-8)


def test_calibrated_information_does_not_see_inflated_logits():
    z, y = drawn(1.0)
    target = drawn(1.0, seed=1)[0]
    assert information(2 * target) > information(target) + 0.1
    plain, inflated = (information(k * target / temperature(k * z, y)) for k in (1.0, 2.0))
    assert inflated == pytest.approx(plain, abs=1e-8)


def test_no_temperature_where_the_labels_do_not_tell_one():
    sure = 3 * torch.eye(4)
    with pytest.raises(ValueError, match="some are wrong"):
        temperature(sure, torch.arange(4))
    with pytest.raises(ValueError, match="follow their labels"):
        temperature(sure, torch.arange(4).roll(1))


def test_class_shares_find_a_change_of_shares_and_nothing_else():
    """Two normals with exact posteriors: EM finds 80 %. At its end the mean corrected answer is the share itself."""
    rng = np.random.default_rng(0)
    y = rng.random(20_000) < 0.8
    x = torch.from_numpy(rng.normal(size=y.size) + np.where(y, 1.0, -1.0))
    logits = torch.stack([-x, x], 1)  # log p(y | x) for equal shares
    found = class_shares(logits, steps=300)
    assert abs(found[1] - 0.8) < 0.01 and abs(found.sum() - 1) < 1e-12
    corrected = torch.softmax(logits + found.log(), 1)
    torch.testing.assert_close(corrected.mean(0), found, atol=1e-6, rtol=0)
    again = class_shares(logits + torch.tensor([0.3, 0.7]).log(), torch.tensor([0.3, 0.7]), 300)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)
    moved = class_shares(
        torch.stack([-(x - 1), x - 1], 1)
    )  # a shift of x is taken for one of shares
    assert moved[1] < 0.6
    with pytest.raises(ValueError, match="sum to 1"):
        class_shares(logits, torch.tensor([0.5, 0.6]))
