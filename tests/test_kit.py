"""What every page needs once: settings chosen, schedules, seeds, rates by prefix, rows, tables, differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import vectors
from torch import nn
from torch.nn.functional import mse_loss

from mtlib.bilevel import bilevel
from mtlib.book import page, results
from mtlib.core import apply, move, over, parameters
from mtlib.evaluate import NotFinite, best_of, compare, interval
from mtlib.learners.gradient import maml
from mtlib.nets import conv4, mlp, seeded, two_halves
from mtlib.train import Diverged, Run, cosine_adam, fit, groups


def net(seed=0):
    return mlp(3, (6,), 2, seed=seed).double()


# Choosing ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_the_best_is_the_first_of_the_highest(qualities):
    named = {f"setting {i}": q for i, q in enumerate(qualities)}
    found = best_of(named, lambda q: q, ordered=False)
    assert found.setting == max(named, key=named.get) and found.score == max(qualities)
    assert found.table == named and not found.at_edge


def test_what_diverges_is_the_worst():
    def quality(rate):
        if rate > 1:
            raise Diverged("too fast", Run({}, [], 0.0))
        if rate > 0.5:
            return interval(torch.tensor([float("nan"), 1.0]))  # raises NotFinite
        return float("nan") if rate == 0.4 else -rate

    found = best_of((0.1, 0.2, 0.4, 0.6, 2.0), quality, ordered=False)
    assert found.setting == 0.1
    assert [found.table[r] for r in (0.4, 0.6, 2.0)] == [-math.inf] * 3
    with pytest.raises(NotFinite, match="all did"):
        best_of((0.6, 2.0), quality)
    with pytest.raises(ValueError, match="at least one setting"):
        best_of({}, quality)


@pytest.mark.parametrize(
    ("settings", "best", "edge"),
    [
        ((0.1, 0.2, 0.3), 0.2, False),
        ((0.1, 0.2, 0.3), 0.3, True),
        ((0.3, 0.1, 0.2), 0.1, True),  # the least, wherever it stands
        ((0.1,), 0.1, False),
        (("small", "medium", "large"), "large", True),
        (("small", "medium", "large"), "medium", False),
        (((0.1, 1), (0.2, 1), (0.3, 1)), (0.2, 1), False),  # an axis of one value has no edge
        (tuple((r, k) for r in (1, 2, 3) for k in (1, 2, 3)), (2, 2), False),
        (tuple((r, k) for r in (1, 2, 3) for k in (1, 2, 3)), (2, 3), True),
        (tuple((r, c) for r in (1, 2, 3) for c in (False, True)), (2, True), False),
    ],
)
def test_an_optimum_at_the_edge_is_said(settings, best, edge):
    def quality(setting):
        return float(setting == best)

    if edge:
        with pytest.warns(UserWarning, match="edge of its grid"):
            assert best_of(settings, quality).at_edge
    else:
        assert not best_of(settings, quality).at_edge
    assert best_of(settings, quality, ordered=False).setting == best


def test_a_score_is_a_quality_and_errors_are_not_swallowed():
    scores = {k: interval(torch.tensor([k, k + 0.1])) for k in (0.3, 0.1, 0.2)}
    assert best_of(scores, lambda s: s, ordered=False).score is scores[0.3]
    assert best_of(scores, lambda s: -s, ordered=False).setting == 0.1
    with pytest.raises(ZeroDivisionError):
        best_of((1, 2), lambda s: 1 / 0)


# Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_cosine_adam_is_torchs(decay):
    learner, data = maml(net(), mse_loss, 0.01, 1), vectors()
    objective, phi = bilevel(learner, mse_loss), learner.init()
    ours = fit(objective, phi, lambda step: data, 7, **cosine_adam(0.01, 7, decay))
    theta = {k: v.clone() for k, v in phi.items()}
    adam = torch.optim.Adam(theta.values(), lr=0.01)
    for step in range(7):
        for group in adam.param_groups:
            group["lr"] = 0.005 * (1 + math.cos(math.pi * step / 7))
        _, grads = objective.value_and_grad(theta, data)
        for k, p in theta.items():
            p.grad = grads[k]
            p.mul_(1 - adam.param_groups[0]["lr"] * decay)
        adam.step()
    assert all(torch.allclose(theta[k], ours.params[k], atol=1e-12) for k in theta)


def sgd(lr):
    return lambda entries: torch.optim.SGD(entries, lr=lr)


def test_rates_and_what_moves_follow_prefixes():
    """One step of SGD: θ − rate · gradient, entry by entry; the longest prefix counts."""
    learner, data = maml(net(), mse_loss, 0.01, 1), vectors()
    objective, phi = bilevel(learner, mse_loss), learner.init()
    grads = objective.value_and_grad(phi, data)[1]

    def step(**options):
        after = fit(objective, phi, lambda step: data, 1, sgd(0.1), **options).params
        return {k: ((phi[k] - after[k]) / grads[k]).mean().item() for k in phi}

    rates = step(rates={"body.": 0.2, "body.0.bias": 0.4})
    assert rates == pytest.approx(
        {"body.0.weight": 0.2, "body.0.bias": 0.4, "head.weight": 0.1, "head.bias": 0.1}
    )
    rates = step(moves=("head.",), rates={"head.bias": 0.3})
    assert rates == pytest.approx(
        {"body.0.weight": 0, "body.0.bias": 0, "head.weight": 0.1, "head.bias": 0.3}
    )
    assert list(step()) == list(phi)


def test_prefixes_that_fit_nothing_are_refused():
    phi = parameters(net())
    with pytest.raises(ValueError, match=r"entries of φ named critic\.\*"):
        groups(phi, {"critic.": 0.1})
    with pytest.raises(ValueError, match=r"entries of φ named neck\.\*"):
        groups(phi, moves=("body.", "neck."))
    with pytest.raises(ValueError, match="that move"):
        groups(phi, moves=())


def test_a_run_with_rates_resumes_to_the_bit(tmp_path):
    learner, data = maml(net(), mse_loss, 0.01, 1), vectors()

    def run(steps, **options):
        given = {"rates": {"head.": 0.01}, "moves": ("head.", "body.0.bias")}
        objective = bilevel(learner, mse_loss)
        return fit(objective, learner.init(), lambda step: data, steps, **given, **options)

    run(3, checkpoint=tmp_path / "run.safetensors")
    resumed, whole = run(6, checkpoint=tmp_path / "run.safetensors"), run(6)
    assert all(torch.equal(resumed.params[k], v) for k, v in whole.params.items())


# Networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda **o: mlp(3, (4,), 2, **o), lambda **o: conv4(3, **o)])
def test_a_seed_draws_what_manual_seed_draws_and_leaves_torchs_state(make):
    torch.manual_seed(5)
    expected = parameters(make())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = parameters(make(seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    other = parameters(make(seed=6))
    assert not torch.equal(other["head.weight"], found["head.weight"])


def test_two_halves_are_a_body_and_a_head():
    with seeded(3):
        whole = two_halves(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.ones(5, 3)
    assert torch.equal(whole(x), whole.head(whole.body(x)))
    assert torch.equal(apply(whole)(parameters(whole), x), whole(x))


def test_parameters_and_nests_of_them_move():
    phi = parameters(net())
    assert {k: v.device.type for k, v in move(phi, "meta").items()} == dict.fromkeys(phi, "meta")
    there = move({"a": [phi, (phi["head.bias"],)]}, "meta")
    assert there["a"][1][0].is_meta and there["a"][0]["head.bias"].is_meta
    with pytest.raises(TypeError, match="expected tensors in tuples, lists or dicts, got int"):
        over(lambda d: d, {"a": 3})


# Scores and rows -----------------------------------------------------------------------------


def test_differences_and_ends_of_a_score():
    a = interval(torch.tensor([0.9, 0.8, 0.7]), draw=1.0)
    b = interval(torch.tensor([0.6, 0.7, 0.5]), draw=1.0)
    gain = a.minus(b)
    assert gain.mean == pytest.approx(0.2) and gain.interval == compare(a, b).interval
    assert gain.points() == f"+20.0 ± {100 * gain.interval:.1f}"
    assert (-gain).points().startswith("-20.0") and (-gain).interval == gain.interval
    assert (a.low, a.high) == (a.mean - a.interval, a.mean + a.interval)


def test_a_row_has_the_mean_and_interval_of_its_runs():
    runs = [0.7, 0.8, 0.9]
    score = interval(torch.tensor(runs, dtype=torch.float64))
    row = results.row("MAML", "meta", runs, score)
    assert row == results.Entry("MAML", "meta", pytest.approx(0.8), score.interval, score.interval)
    assert results.row("MAML", "meta", [0.7], 0.1) == ("MAML", "meta", 0.7, 0.1, None)
    assert results.row("MAML", "meta", torch.tensor(runs), 0.1, mean=0.7).mean == 0.7
    gain = results.paired("a", "b", score)
    assert (gain.mean, gain.low, gain.high) == (score.mean, score.low, score.high)


def test_a_run_on_another_processor_may_be_another_run():
    runs = [0.70, 0.72, 0.74]
    half = interval(torch.tensor(runs, dtype=torch.float64)).interval
    assert results.agrees(0.70 + 1.9 * half, runs) and not results.agrees(0.70 + 2.1 * half, runs)
    assert results.agrees(0.75, [0.70], cases=0.06) and not results.agrees(0.75, [0.70], cases=0.04)
    assert results.agrees(0.7005, [0.70]) and not results.agrees(0.702, [0.70])


def test_a_record_is_used_at_the_full_scale_on_real_data_only(monkeypatch):
    for name in ("MTLIB_SCALE", "MTLIB_RECORD"):
        monkeypatch.delenv(name, raising=False)
    assert results.kept("which") == results.recorded("which").details
    assert results.kept("which", real=False) == {} == results.kept("no such page")
    monkeypatch.setenv("MTLIB_RECORD", "1")
    assert results.kept("which") == {}
    monkeypatch.setenv("MTLIB_RECORD", "0")
    monkeypatch.setenv("MTLIB_SCALE", "small")
    assert results.kept("which") == {}


# Tables --------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    texts = []
    monkeypatch.setattr(page, "display", lambda markdown: texts.append(markdown.data))
    return texts


def test_a_table_is_markdown(shown):
    score = interval(torch.tensor([0.9, 0.8]))
    page.table({"MAML": {"accuracy": score, "steps": 5}, "R2|D2": {"steps": 0.5}}, corner="method")
    assert shown[0].splitlines() == [
        "| method | accuracy | steps |",
        "| :-- | --: | --: |",
        f"| MAML | {score} | 5 |",
        "| R2\\|D2 |  | 0.500 |",
    ]
    page.table({"a": [1.0, 2], "b": (torch.tensor(3.0), "x")}, ["u", "v"], form=".1f")
    assert shown[1].splitlines()[2:] == ["| a | 1.0 | 2 |", "| b | 3.0 | x |"]
    page.table([{"u": np.int64(1)}, {"u": np.str_("b")}, {"u": np.float32(0.25)}])
    assert shown[2].splitlines() == ["| u |", "| --: |", "| 1 |", "| b |", "| 0.250 |"]
    page.table({"a": score}, ["accuracy"])
    assert shown[3].splitlines()[-1] == f"| a | {score} |"
    with pytest.raises(ValueError, match="expected 2 cells in the row 'a', got 1"):
        page.table({"a": [1]}, ["u", "v"])
