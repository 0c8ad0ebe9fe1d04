"""The page on an unseen domain: labels of the unseen domain choose nothing; what its exercises state holds."""

from __future__ import annotations

import numpy as np
import torch
from pages import run_until
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.book import generalising
from mtlib.book.generalising import exact_world
from mtlib.core import Batch, parameters
from mtlib.data import digits
from mtlib.joint import joint
from mtlib.nets import mlp
from mtlib.tasks import one_hot
from mtlib.transfer.align import coral
from mtlib.transfer.unseen import irm, vrex


def shuffled(plain, rows_of):
    """`scanners` with the labels of some rows of each domain reversed."""

    def other(*args, **options):
        domains = plain(*args, **options)
        for name, rows in rows_of(domains).items():
            y = domains[name].y.clone()
            y[rows] = y[rows].flip(0)
            assert not torch.equal(y, domains[name].y)
            domains[name] = domains[name]._replace(y=y)
        return domains

    return other


def rows_of_tests(domains):
    """Rows that `halves(domain, 780)` tests on."""
    return {
        n: torch.from_numpy(np.random.default_rng(9).permutation(len(d.y)))[: len(d.y) // 2][:780]
        for n, d in domains.items()
    }


def tunings(page, out=None):
    """Fold -> method -> quality of each trial; of one fold or of all."""
    return {
        n: {m: way["tuning"] for m, way in found.found["ways"].items()}
        for n, found in page["folds"].items()
        if out in (None, n)
    }


def test_trials_are_chosen_without_labels_of_the_unseen_domain(small):
    plain = digits.scanners
    before = run_until("unseen", "folds")
    sizes = {m: len(grid) for m, grid in before["GRIDS"].items()}
    assert set(sizes.values()) == {10, 4}  # one budget for all, four rates where there is no decay
    assert {m for m, n in sizes.items() if n == 4} == {"ERM, no decay", "Group DRO, no decay"}
    assert all(len(way.settings) == 8 for way in before["ROW_WAYS"].values())
    out = before["NAMES"][0]
    here, all_of = tunings(before, out), tunings(before)
    assert len(all_of) == 3 and all(here.values())

    # labels that test, of every scanner: no trial changes
    small.setattr(digits, "scanners", shuffled(plain, rows_of_tests))
    after = run_until("unseen", "folds")
    assert tunings(after) == all_of
    assert any(  # the change was seen
        after["folds"][n].here["ERM"][n].mean != before["folds"][n].here["ERM"][n].mean
        for n in before["NAMES"]
    )

    # all labels of the unseen scanner: no trial for it changes, those for others may
    everything = {out: torch.arange(len(plain()[out].y))}
    small.setattr(digits, "scanners", shuffled(plain, lambda domains: everything))
    after = run_until("unseen", "folds")
    assert tunings(after, out) == here and tunings(after) != all_of


def test_the_unseen_coloured_domain_chooses_nothing(small):
    plain = generalising.coloured
    before = run_until("unseen", "by_even")

    def other(seed, agreement, rows, part=0):
        data = plain(seed, agreement, rows, part)
        return data._replace(y=data.y.flip(1)) if agreement == 0.1 else data

    small.setattr(generalising, "coloured", other)
    after = run_until("unseen", "by_even")
    for name in ("by_mean", "by_even"):
        for m in ("ERM", "IRM"):
            assert before[name].tuning(m) == after[name].tuning(m)
        assert before[name].mean("ERM") != after[name].mean("ERM")


LINE = nn.Linear(2, 1, bias=False).double()


def half_mse(prediction, y):
    return 0.5 * ((prediction - y) ** 2).mean()


def lowest(objective, pair, start):
    def f(w):
        value, g = objective.value_and_grad({"weight": torch.from_numpy(w)[None]}, pair)
        return value.item(), g["weight"][0].numpy()

    return minimize(f, np.array(start), method="BFGS", jac=True, options={"gtol": 1e-8}).x


def test_irm_with_a_strong_penalty_from_small_weights_stays_near_zero():
    pair = Batch(*map(torch.stack, zip(exact_world(0.5, 1.0), exact_world(2.0, 1.0), strict=True)))
    w = lowest(irm(LINE, half_mse, 1e4), pair, (0.01, 0.01))
    assert np.abs(w).max() < 0.05


def test_vrex_where_only_the_cause_spreads_answers_one_half_each():
    sets = []
    for s in (0.5, 2.0):  # x1 = √s ε1, y = x1 + ε2, x2 = y + ε3
        moments = [[s, s, s], [s, s + 2, s + 1], [s, s + 1, s + 1]]
        root = torch.linalg.cholesky(torch.tensor(moments, dtype=torch.float64))
        rows = 3**0.5 * root.T
        assert torch.allclose(rows.T @ rows / 3, torch.tensor(moments, dtype=torch.float64))
        sets.append(Batch(rows[:, :2], rows[:, 2:]))
    pair = Batch(*map(torch.stack, zip(*sets, strict=True)))
    w = np.zeros(2)
    for strength in (0.0, 1.0, 10.0, 100.0, 1e3, 1e4):
        w = lowest(vrex(LINE, half_mse, strength), pair, w)
    assert np.abs(w - 0.5).max() < 0.01


def test_coral_between_training_domains_is_one_more_objective():
    net = mlp(4, (8,), 3, seed=0)
    torch.manual_seed(0)
    data = Batch(torch.randn(3, 6, 4), one_hot(torch.randint(3, (3, 6)), 3))
    weak, strong = (
        joint(net, cross_entropy, penalties=[coral(k)])(parameters(net), data) for k in (0.0, 5.0)
    )
    assert strong > weak == joint(net, cross_entropy)(parameters(net), data)
