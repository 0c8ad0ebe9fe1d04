"""The page on several sources and tasks, and its room: the weighted sum, the choice by folds, heads of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mtlib.book.weighing import (
    Setup,
    asking,
    by_folds,
    flipped,
    lowest,
    noisy,
    own_block,
    questions,
    two_units,
    ways_to_weigh,
    weighing,
    worlds,
)
from mtlib.core import Batch, parameters
from mtlib.data.digits import Domain
from mtlib.joint import joint
from mtlib.nets import mlp
from mtlib.transfer.weights import best_alpha, best_weights, without_conflict

ALPHAS = torch.linspace(0, 1, 5, dtype=torch.float64)


def apart(far, draws, seed=0, dims=10):
    """Weights (R, T, d) of a target of length 1 and sources at distances `far` from it, and the offsets."""
    g = torch.Generator().manual_seed(seed)
    away = normalize(
        torch.randn(draws, len(far) + 1, dims, dtype=torch.double, generator=g), dim=-1
    )
    off = away * torch.tensor((0.0, *far)).double()[:, None]
    return away[:, :1] + off, off


def test_the_lowest_point_is_weighted_least_squares():
    sets = worlds(apart((0.5, 2.0), 2)[0], (12, 30, 50), noisy, 3)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]).double()
    found = lowest(sets, weights, (0.0, 0.4))
    assert found.shape == (2, 2, 2, 10)
    for r, (c, w) in ((0, (0, weights[0])), (1, (1, weights[1]))):
        rows, y = [], []
        for wt, (x, target) in zip(w, sets, strict=True):
            scale = (wt / x.shape[1]).sqrt()
            rows.append(scale * x[r])
            y.append(scale * target[r])
        a, b = torch.cat(rows).numpy(), torch.cat(y).numpy()
        for k, ridge in enumerate((0.0, 0.4)):
            more = np.r_[a, ridge**0.5 * np.eye(10)], np.r_[b, np.zeros(10)]
            assert np.allclose(found[r, c, k], np.linalg.lstsq(*more, rcond=None)[0])


def test_folds_choose_by_the_targets_held_out_labels_alone():
    truth, _ = apart((3.0,), 4)
    sets = worlds(truth, (20, 60), noisy, 1)

    def error(theta):
        return (theta - truth[:, :1, None]).square().sum(-1)

    rows = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double()
    found, best = by_folds(sets, {"two": rows}, error, folds=5, ridges=(0.1,))["two"]
    for r in range(4):
        risk = []
        for w in rows:
            loss = 0.0
            for k in range(5):
                held = torch.arange(20) % 5 == k
                kept = Batch(sets[0].x[r : r + 1, ~held], sets[0].y[r : r + 1, ~held])
                source = Batch(sets[1].x[r : r + 1], sets[1].y[r : r + 1])
                theta = lowest([kept, source], w[None], (0.1,))[0, 0, 0]
                loss += (sets[0].x[r, held] @ theta - sets[0].y[r, held]).square().sum().item()
            risk.append(loss)
        whole = [Batch(x[r : r + 1], y[r : r + 1]) for x, y in sets]
        theta = lowest(whole, rows[None, int(np.argmin(risk))], (0.1,))[0, 0, 0]
        assert found[r].item() == pytest.approx((theta - truth[r, 0]).square().sum().item())
        assert best[r] <= found[r] + 1e-12
    one = by_folds(sets, {"one": rows[:1]}, error, ridges=(0.1,))["one"]
    assert torch.allclose(*one)  # nothing to choose


def test_the_ways_to_weigh_are_what_they_are_called():
    ways = ways_to_weigh((30, 100, 100, 100), ALPHAS)
    assert {k: len(v) for k, v in ways.items()} == {
        "target alone": 1,
        "pooled": 1,
        "equal weights": 1,
        "one source": 3,
        "which sources": 8,
        "one weight": 5,
        "a weight each": 84,
    }
    for rows in ways.values():
        assert torch.allclose(rows.sum(1), torch.ones(len(rows)).double()) and (rows >= 0).all()
    assert torch.allclose(ways["pooled"][0] * 330, torch.tensor([30.0, 100, 100, 100]).double())
    assert torch.equal(ways["target alone"][0], torch.tensor([1.0, 0, 0, 0]).double())
    assert ((ways["one source"][:, 1:] > 0).sum(1) == 1).all()


def test_the_exact_weights_have_the_error_that_the_closed_form_says():
    """Several sources of linear regression: least squares at the best weights against bias² + variance."""
    counts, draws = (120, 200, 200, 200), 200
    truth, off = apart((0.3, 0.8, 2.0), draws)
    sets = worlds(truth, counts, noisy, 5)
    v = 10 / torch.tensor(counts).double()
    predicted, seen = [], []
    for r in range(draws):
        w = best_weights(v, off[r])
        predicted.append(((w @ off[r]) ** 2).sum() + (w**2) @ v)
        own = [Batch(x[r : r + 1], y[r : r + 1]) for x, y in sets]
        seen.append((lowest(own, w[None], (0.0,))[0, 0, 0] - truth[r, 0]).square().sum())
    expected = torch.stack(predicted).mean().item()
    assert torch.stack(seen).mean().item() == pytest.approx(expected, rel=0.2)


def test_a_tenth_of_the_labels_is_wrong():
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(20_000, dtype=torch.float64, generator=g)
    assert (flipped(clean, g) != clean.sign()).double().mean() == pytest.approx(0.1, abs=0.01)


# Heads of their own ------------------------------------------------------------------------------


def scanned(n=160):
    g = torch.Generator().manual_seed(0)
    return {
        name: Domain(torch.rand(n, 1, 16, 16, generator=g), torch.arange(n) % 10, f"{name} (real)")
        for name in ("one", "two", "three")
    }


def test_images_are_labelled_held_or_tested_never_two_of_them():
    found = questions(scanned(), 20)

    def rows(x):
        return {tuple(row.tolist()) for row in x.reshape(-1, 256)}

    held, tested = rows(found.held.query.x), rows(found.tested.query.x)
    assert not held & tested
    for seed in range(3):
        source, *targets = found.draw(seed)
        assert [len(t.x) for t in targets] == [20, 20] and len(source.x) == 40
        assert all(not rows(t.x) & (held | tested) for t in targets)
    for t, c in zip(found.draw(0), found.columns, strict=True):
        assert torch.equal(t.y.sum(1), t.y[:, c].sum(1)) and t.y.sum() == len(t.y)


def test_an_answer_is_one_of_those_that_are_asked():
    net = mlp(3, (4,), 5, seed=0)
    learner, own = own_block(net, -1e4), torch.eye(5)[2:4]
    episode = asking([Batch(torch.rand(6, 3), torch.eye(5)[[2, 3] * 3])], [own], 3)
    assert episode.query.x.shape == (2, 3, 3) and episode.support.y.shape == (2, 2, 5)
    support = Batch(episode.support.x[0], episode.support.y[0])
    phi = parameters(net)
    answers = learner.predict(learner.adapt(phi, support), episode.query.x[0])
    plain = learner.predict(phi, episode.query.x[0])
    assert torch.allclose(answers[:, 2:4], plain[:, 2:4])
    assert (answers[:, [0, 1, 4]] == -1e4).all()


def test_targets_that_were_divided_by_their_unit_are_answered_in_it():
    """One step with a rate of 0: the network is as it began, but for the unit at its head."""
    setup = Setup(
        sizes=(10, 4, 2),
        loss=lambda p, y: (p - y).square().mean(),
        columns=[slice(0, 1), slice(1, 2)],
        draw=two_units,
        steps=1,
        rates=(0.0,),
        unit=lambda sets: torch.tensor([1.0, 100.0]),
    )
    way = weighing(setup, lambda on, batch: (joint(**on), {}, 0.0))
    assert way.settings == [(0.0, 0.0)]
    _, phi = way.train((0.0, 0.0), 3, 1)
    start = parameters(mlp(10, (4,), 2, seed=3))
    unit = torch.tensor([1.0, 100.0])
    assert torch.allclose(phi["head.weight"], start["head.weight"] * unit[:, None])
    assert torch.allclose(phi["head.bias"], start["head.bias"] * unit)


def test_two_units_are_one_problem_in_two_units():
    sets = two_units(0, 4000)
    power = [d.y.square().mean(0) for d in sets]
    assert power[0][1] == power[1][0] == 0
    assert power[1][1] / power[0][0] == pytest.approx(1e4, rel=0.5)


def test_every_setting_is_in_the_grid():
    setup = Setup((4, 4, 4), cross_entropy, [slice(0, 4)], lambda seed: [], 1, (0.1, 1), (0, 2))
    settings = weighing(setup, joint, [(5,), (6,), (7,)]).settings
    assert len(settings) == 12 and (1, 2, 7) in settings


# Exercises ---------------------------------------------------------------------------------------


def test_sources_that_err_to_opposite_sides_get_more_weight():
    v = torch.tensor([0.1, 0.01, 0.01]).double()
    apart = best_weights(v, torch.tensor([[0.0], [0.6], [-0.6]]).double())
    alike = best_weights(v, torch.tensor([[0.0], [0.6], [0.6]]).double())
    assert apart.tolist() == pytest.approx([0.05, 0.48, 0.48], abs=0.005)
    assert alike.tolist() == pytest.approx([0.78, 0.11, 0.11], abs=0.005)


def test_the_bound_ignores_the_source_from_a_distance_on_without_a_jump():
    edge = (10 / 50) ** 0.5
    assert edge == pytest.approx(0.45, abs=0.005) and best_alpha(50, 1000, edge, 10) == 1
    assert best_alpha(50, 1000, edge - 1e-4, 10) > 0.98
    assert best_alpha(50, 1000, 0, 10) == pytest.approx(50 / 1050)


def test_two_gradients_in_conflict_both_gain_weight():
    g = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])
    product = g[0] @ g[1]
    weights = torch.stack([1 - product / (g[0] @ g[0]), 1 - product / (g[1] @ g[1])]) / 2
    assert torch.allclose(without_conflict(g).mean(0), weights @ g)
    assert weights[0] > weights[1] > 0.5
    assert without_conflict(torch.stack([g[0], -g[0]])).abs().max() == 0
