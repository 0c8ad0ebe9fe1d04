"""The central comparison: turned tasks are what they claim, data are equal, test labels choose nothing."""

from __future__ import annotations

from itertools import combinations, permutations
from math import comb, cos, radians

import pytest
import torch
from pages import at_small_scale, mix_test_planted, run_until

from mtlib.book.results import recorded
from mtlib.data.planted import best_possible, planted, turned
from mtlib.evaluate import evaluate
from mtlib.learners.metric import protonet
from mtlib.nets import two_halves
from mtlib.tasks import episodes
from mtlib.train import Run


def axes(world: int = 0) -> torch.Tensor:
    """R's columns: those that tell classes apart, then the loud ones, (30, 30)."""
    from mtlib.data.planted import _rotation

    return torch.from_numpy(_rotation(30, world).copy()).float()


@pytest.mark.parametrize("degrees", [0, 30, 90, -45])
def test_turning_moves_the_tasks_and_not_their_difficulty(degrees):
    data, r = planted(20, 10, seed=2), axes()
    other = turned(data, degrees)
    assert torch.allclose(data.items.norm(dim=-1), other.items.norm(dim=-1), atol=1e-3)
    a = torch.tensor(degrees).deg2rad()
    seen = a.cos() * r[:, :5] + a.sin() * r[:, 5:10]
    assert torch.allclose(other.items @ seen, data.items @ r[:, :5], atol=1e-3)
    assert torch.allclose(other.items @ r[:, 10:], data.items @ r[:, 10:], atol=1e-3)
    plain = protonet(two_halves(torch.nn.Identity(), torch.nn.Linear(30, 5)))
    scores = [
        evaluate(plain, plain.init() or {"none": torch.zeros(1)}, episodes(d, 5, 1, 5, 5, 1), 10)
        for d in (data, other)
    ]
    assert torch.allclose(scores[0].values, scores[1].values, atol=0.05)


def test_at_a_right_angle_what_training_saw_tells_nothing():
    new = planted(100, 20, seed=2)
    means = []
    for degrees in (0, 60, 90):
        stream = episodes(turned(new, degrees), 5, 1, 15, tasks=20, seed=1)
        means.append(evaluate(best_possible(), {}, stream, 200).mean)
    assert means[0] > 0.8 and means[0] > means[1] + 0.2 and abs(means[2] - 0.2) < 0.05


def test_turned_refuses_items_of_another_width():
    with pytest.raises(ValueError, match="30 dimensions"):
        turned(planted(8, 6, nuisance=3), 30)
    with pytest.raises(ValueError, match="nuisance"):
        turned(planted(8, 6, nuisance=3), 30, nuisance=3)


def test_the_overlap_of_old_and_new_directions():
    """The numbers of the solution on the overlap: cos² of the angle."""
    assert round(cos(radians(45)) ** 2, 12) == 0.5 and round(cos(radians(60)) ** 2, 12) == 0.25


def test_how_many_episodes_there_are():
    """Five of the classes, and of each one example to learn from and one to ask."""
    few = sum(1 for _ in combinations(range(6), 5)) * sum(1 for _ in permutations(range(2), 2)) ** 5
    assert few == comb(6, 5) * 2**5
    assert f"{comb(1280, 5) * 2**5:.1e}" == "9.1e+14"
    assert 1280 * 2 == 64 * 40 == 2560


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("meta_or_transfer", "compete")


def test_every_training_sees_as_many_labelled_examples_in_a_step(page, monkeypatch):
    """440, give or take rounding to whole episodes, however they are spread."""
    seen = []

    def spy(objective, phi, draws, steps, **how):
        draw = draws(0)
        parts = draw if hasattr(draw, "support") else (draw,)
        seen.append(sum(part.y.shape[0] * part.y.shape[1] for part in parts))
        return Run(phi, [], 0.0)

    monkeypatch.setitem(page["trained"].__wrapped__.__globals__, "fit", spy)
    for by, rest in (("pre-training", ()), ("ProtoNet", ()), ("MAML", (0.1,))):
        for world in ({}, {"shots": 20}, {"classes": 1280}, {"classes": 8}):
            page["trained"].__wrapped__(by, (1e-2, 0.0, *rest), 0, 1, **world)
    assert len(seen) == 12 and all(abs(n - 440) <= 10 for n in seen), seen


def test_training_validation_and_test_share_no_class(page):
    names = {n for seed in (0, 1, 2, 3, 4, 1000) for n in planted(8, 2, seed=10 + seed).names}
    assert not names & {*page["held"].names, *page["new"].names}


def test_settings_are_chosen_without_labels_of_test_classes(small):
    def run():
        base = run_until("meta_or_transfer", "base")["base"]
        return {w: base.setting(w) for w in base.ways}, {w: base.runs(w) for w in base.ways}

    chosen, scores = run()
    mix_test_planted(small)
    again, other = run()
    assert chosen == again and any(scores[k] != other[k] for k in scores)


def test_the_matrix_at_one_label_is_the_contest_of_its_contenders():
    """The same training, setting and tests under two names give the same runs."""
    details = recorded("meta_or_transfer").details
    cells, base = details["matrix, 1 labels"]["ways"], details["classes"]["ways"]
    for cell, way in {
        "untrained + fine-tuning": "from scratch",
        "MAML + MAML's steps": "MAML",
        "ProtoNet + class means": "ProtoNet",
        **{w: w for w in base if w.startswith(("pre-training +", "ProtoNet +"))},
    }.items():
        runs = [
            w["columns"][c]["runs"]
            for w, c in ((cells[cell], "new classes"), (base[way], "labels: 1"))
        ]
        assert runs[0] == pytest.approx(runs[1], abs=1e-6), cell


def test_what_the_page_says_of_more_labels():
    """The best cell in name at each number of labels; columns that come together; training that is worth less."""
    details = recorded("meta_or_transfer").details
    spread, worth = [], []
    for labels in (1, 5, 10, 20):
        ways = details[f"matrix, {labels} labels"]["ways"]
        means = {
            w: sum(r) / len(r)
            for w, h in ways.items()
            for r in [h["columns"]["new classes"]["runs"]]
        }
        best = max(means, key=lambda w: means[w])
        assert best == "ProtoNet + class means"
        trained = {w: m for w, m in means.items() if w.startswith(("pre", "MAML +", "Proto"))}
        rows = [
            [m for w, m in trained.items() if w.startswith(by)] for by in ("pre", "MAML", "Proto")
        ]
        assert [len(row) for row in rows] == [4, 4, 4]
        spread.append(max(max(row) - min(row) for row in rows))
        worth.append(means[best] - means["untrained + fine-tuning"])
    assert spread == sorted(spread, reverse=True) and worth == sorted(worth, reverse=True)
