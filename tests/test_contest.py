"""Contests: tuned on validation, the same seeds and tests for all, resumed where they stopped, and held to their record."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mtlib.book import contest as room
from mtlib.book import results
from mtlib.book.contest import (
    Contest,
    Gap,
    Trial,
    Way,
    alphabets,
    conclude,
    contest,
    folds,
    measured,
)
from mtlib.core import Learner, apply, parameters
from mtlib.data.planted import planted
from mtlib.data.sinusoids import best_possible, noisy_sinusoids
from mtlib.evaluate import NotFinite, answers, evaluate, interval
from mtlib.learners.metric import protonet
from mtlib.nets import mlp
from mtlib.tasks import ClassSet, episodes

NET = mlp(30, (16,), 5)
DATA = "planted classes (real)"
TOLD = dict(field="Botany", protocol="trees", gain=("ProtoNet", "chance"), labels="5 leaves")


class Stop(Exception):
    pass


def ways(calls, stop=None):
    def train(setting, seed, share):
        if len(calls) == stop:
            raise Stop
        calls.append((setting, seed, share))
        g = torch.Generator().manual_seed(seed)
        phi = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in parameters(NET).items()}
        return protonet(NET), {k: setting * v for k, v in phi.items()}

    def chance(setting, seed, share):
        return Learner(dict, lambda phi, s: phi, lambda theta, x: x[:, :5] * 0), {}

    return {
        "ProtoNet": Way("meta", train, (0.01, 0.1, 1.0, 10.0)),
        "chance": Way("baseline", chance, ("one",)),
    }


def cut(data, seed):
    return episodes(data, 5, 1, 6, 10, seed)


def named(classes=12, seed=1):
    data = planted(classes=classes, seed=seed)
    return data._replace(names=[f"letters{i // 3}/{i}" for i in range(classes)])


def run(calls, live=("ProtoNet",), stop=None, **more):
    test = named()
    tests = {"1 label": cut(test, 1), "again": cut(test, 3)}
    of = {"1 label": cut(alphabets(test), 1), "again": cut(alphabets(test), 3)}
    more = {"seeds": 3, "choose": 20, "episodes": 30, "of": of, **more}
    return contest(
        "trees", "leaves", ways(calls, stop), cut(named(seed=2), 2), tests, DATA, live, **more
    )


def test_without_a_record_the_live_ways_are_tuned_and_run_once(full):
    calls = []
    found = run(calls)
    assert [c for c in calls if c[2] == 3] == [
        (s, room.TUNING_SEED, 3) for s in (0.01, 0.1, 1.0, 10.0)
    ]
    assert [c[1:] for c in calls if c[2] == 1] == [(0, 1)]
    assert not found.kept and "chance" not in found and len(found.tuning("ProtoNet")) == 4
    assert found.minus("ProtoNet", "chance").points() == "not run" == found.told("chance")
    with pytest.raises(KeyError, match="no way"):
        found.mean("MAML")
    best = max(found.tuning("ProtoNet"), key=found.tuning("ProtoNet").get)
    assert float(best) == found.setting("ProtoNet") == calls[-1][0]


def test_a_setting_is_chosen_by_the_mean_of_several_runs(full):
    calls = []
    found = run(calls, tries=2)
    tried = [c for c in calls if c[2] == 3]
    assert [c[1] - room.TUNING_SEED for c in tried] == [0, 1] * 4
    judge = room._Judge(room.accuracy, True, 20, 30)
    way, setting = ways([])["ProtoNet"], tried[0][0]
    each = [
        judge.quality(way, setting, 3, cut(named(seed=2), 2), room.TUNING_SEED + i) for i in (0, 1)
    ]
    assert found.tuning("ProtoNet")[f"{setting:g}"] == pytest.approx(sum(each) / 2)


def test_the_score_is_evaluates_own_and_groups_are_its_alphabets(full):
    found = run([])
    learner, phi = ways([])["ProtoNet"].train(found.setting("ProtoNet"), 0, 1)
    whole = evaluate(learner, phi, cut(named(), 1), 30)
    said = [
        (answers(learner, phi, cut(named(), 1)(j)), cut(named(), 1)(j).query.y) for j in range(3)
    ]
    right = sum(int((a.argmax(-1) == y.argmax(-1)).sum()) for a, y in said)
    assert found.mean("ProtoNet") == pytest.approx(right / (30 * 5 * 6), abs=1e-12)
    assert whole.mean == pytest.approx(right / (30 * 5 * 6), abs=1e-7)  # it counts in float32
    at, sizes = found._at("ProtoNet", None)["groups"], found.found["sizes"]["1 label"]
    assert len(at) == len(sizes) == 4 and sum(sizes) == 30 * 5 * 6
    total = sum(a * n for a, n in zip(at, sizes, strict=True)) / sum(sizes)
    assert total == pytest.approx(whole.mean, abs=1e-4)


def test_alphabets_are_those_of_the_drawn_items():
    data = named()
    marked = ClassSet(torch.arange(12.0)[:, None, None].expand(12, 100, 1), data.names, "numbers")
    for step in range(3):
        one, twin = (cut(d, 5)(step) for d in (marked, alphabets(data)))
        for a, b in zip((one.support.x, one.query.x), (twin.support.x, twin.query.x), strict=True):
            assert torch.equal(a.long() // 3, b.long())


def test_a_record_has_all_ways_and_holds_a_later_run(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    calls = []
    found = run(calls)
    assert len([c for c in calls if c[2] == 1]) == 3 and not found.kept
    assert conclude("trees", contests=[found], **TOLD) == "recorded as trees.json"
    monkeypatch.delenv("MTLIB_RECORD")
    calls.clear()
    again = run(calls)
    assert calls == [(found.setting("ProtoNet"), 0, 1)]  # no tuning, one seed
    assert again.kept and again.rows() == found.rows() and "chance" in again
    assert again.minus("ProtoNet", "chance") == found.minus("ProtoNet", "chance")
    assert "agree" in conclude("trees", contests=[again], **TOLD)
    path = full / "records" / "trees.json"
    held = json.loads(path.read_text("utf8"))
    held["details"]["leaves"]["ways"]["ProtoNet"]["columns"]["1 label"]["runs"] = [0.1, 0.11, 0.12]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"ProtoNet, 1 label: .* record anew"):
        run([])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["ways"]["ProtoNet"]["tuning"].pop("0.1"), "other settings of 'ProtoNet'"),
        (
            lambda d: d["ways"]["chance"].update(setting="two", tuning={}),
            "other settings of 'chance'",
        ),
        (lambda d: d["ways"].pop("chance"), "other ways"),
        (lambda d: d["ways"].update(MAML=d["ways"]["chance"]), "other ways"),
        (lambda d: d["sizes"].pop("again"), "other tests"),
        (lambda d: d.clear(), "other ways"),  # a contest that the record does not have
    ],
)
def test_a_record_of_other_ways_grids_or_tests_is_refused(full, monkeypatch, change, said):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    conclude("trees", contests=[run([])], **TOLD)
    monkeypatch.delenv("MTLIB_RECORD")
    assert run([]).kept
    path = full / "records" / "trees.json"
    held = json.loads(path.read_text("utf8"))
    change(held["details"]["leaves"])
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"{said}.*record anew"):
        run([])


def test_answers_with_a_spread_beside_them_are_no_classes(full):
    net = mlp(30, (8,), 10)
    wide = Learner(lambda: parameters(net), lambda phi, s: phi, apply(net))
    two = {"wide": Way("meta", lambda setting, seed, share: (wide, wide.init()), (1,))}
    test = named()
    where = {"tests": {"c": cut(test, 1)}, "of": {"c": cut(alphabets(test), 1)}}
    with pytest.raises(ValueError, match=r"\(10, 30, 5\).*\(10, 30, 10\)"):
        contest("trees", "x", two, cut(test, 2), data=DATA, live=["wide"], episodes=20, **where)


def test_a_stopped_recording_goes_on_where_it_stopped(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    whole = run([]).found
    for piece in (full / "cache" / "recordings").rglob("*.json"):
        piece.unlink()
    calls, rest = [], []
    with pytest.raises(Stop):
        run(calls, stop=5)
    assert run(rest).found == whole and len(rest) == 2 and len(calls) == 5


def test_where_nothing_is_drawn_one_run_stands_for_all_seeds(full, monkeypatch):
    """What the record keeps is what runs of all seeds give, and the name of the groups is the caller's."""
    monkeypatch.setenv("MTLIB_RECORD", "1")
    calls = []
    plain = ways(calls)["ProtoNet"]
    still = plain._replace(
        train=lambda how, seed, share: plain.train(how, 7, share), settings=(1.0,), drawn=False
    )
    test = named()
    args = (cut(test, 2), {"c": cut(test, 1)}, DATA)
    how = {"of": {"c": cut(alphabets(test), 1)}, "seeds": 3, "episodes": 20, "groups": "shelves"}
    one = contest("trees", "still", {"a": still}, *args, **how)
    assert len([c for c in calls if c[2] == 1]) == 1
    all_three = contest("trees", "drawn", {"a": still._replace(drawn=True)}, *args, **how)
    assert len([c for c in calls if c[2] == 1]) == 4
    assert one.found["ways"]["a"]["columns"] == all_three.found["ways"]["a"]["columns"]
    assert len(one.runs("a")) == 3 and one.found["groups"] == "shelves"
    assert "± shelves" in one.rows()["a"]


def test_processes_that_record_together_find_each_others_pieces(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    one, other = room.Pieces("trees", "leaves"), room.Pieces("trees", "leaves")
    assert one.keep(["a"], lambda: 1.5) == 1.5 and other.keep(["b", 0], lambda: [2, 3]) == [2, 3]
    assert one.keep(["b", 0], pytest.fail) == [2, 3] and other.keep(["a"], pytest.fail) == 1.5
    assert math.isnan(one.keep(["c"], lambda: float("nan"))) and math.isnan(
        other.keep(["c"], pytest.fail)
    )
    assert room.Pieces("trees", "roots").keep(["a"], lambda: 7) == 7  # another contest


def test_a_recording_of_another_commit_starts_anew(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    run([])
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    calls = []
    run(calls)
    assert len(calls) == 7
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210-dirty")
    with pytest.raises(ValueError, match="commit first"):
        run([])


def test_a_gap_is_paired_over_seeds_and_groups():
    def at(runs, groups):
        column = {"c": {"runs": runs, "groups": groups, "cases": 0.1}}
        return {"setting": 1, "edge": False, "tuning": {}, "columns": column}

    rng = torch.Generator().manual_seed(0)
    base = torch.rand(40, generator=rng).tolist()
    found = {
        "groups": "classes",
        "sizes": {"c": [1.0] * 40},
        "ways": {
            "a": at([0.5, 0.7, 0.9], [b + 0.2 for b in base]),
            "b": at([0.4, 0.6, 0.8], base),
            "z": at([0.5, 0.5, 0.5], torch.rand(40, generator=rng).tolist()),
        },
    }
    rest = {"kept": True, "here": {}, "metric": "accuracy", "higher": True, "data": DATA}
    assert Gap(0.1, None, 0.02).points() == "+10.0 ± 2.0"
    held = Contest("x", dict.fromkeys("abz"), found, **rest)
    gap = held.minus("a", "b")
    assert gap.mean == pytest.approx(0.1) and gap.seeds == pytest.approx(0, abs=1e-7)
    assert gap.groups == pytest.approx(0, abs=1e-6)
    assert held.minus("a", "a")[:2] == (0.0, 0.0)  # no share of 0, whose interval would be wide
    wide = held.minus("a", "z")
    d = torch.tensor(found["ways"]["a"]["columns"]["c"]["groups"]) - torch.tensor(
        found["ways"]["z"]["columns"]["c"]["groups"]
    )
    assert wide.groups == pytest.approx(1.96 * d.std().item() / 40**0.5, rel=0.1)
    assert wide.seeds == wide.widest == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert Gap(0.1, None, 0.02).points() == "+10.0 ± 2.0" and Gap(-0.1, 0.3, 0.02).low == -0.4
    held.judge("a is above b", gap.low > 0)
    with pytest.raises(AssertionError, match="in the record"):
        held.judge("a is below b", gap.low < 0)


def test_folds_stand_in_a_row_and_a_seeds_number_is_the_mean_over_all_tasks():
    def part(runs, groups, here, unit="tasks"):
        held = {"runs": runs, "groups": groups, "cases": 0.1}
        way = {"setting": 1, "edge": False, "tuning": {"1": 0.5}, "columns": {"c": held}}
        found = {"groups": unit, "sizes": {"c": [1.0] * len(groups)}, "ways": {"a": way}}
        score = {"a": {"c": evaluate_like(here)}}
        return Contest("x", {"a": Way("meta", print, (1,))}, found, True, score, "MAE", False, DATA)

    def evaluate_like(values):
        return interval(torch.tensor(values))

    one, two = (
        part([0.4, 0.6], [0.4, 0.6, 0.5], [0.3, 0.4, 0.5]),
        part([1.0, 2.0], [1.5], [1.0, 1.2]),
    )
    found = folds([one, two], "users")
    assert found.runs("a") == pytest.approx([(3 * 0.4 + 1.0) / 4, (3 * 0.6 + 2.0) / 4])
    assert found.found["ways"]["a"]["columns"]["c"]["groups"] == [0.4, 0.6, 0.5, 1.5]
    assert found.found["groups"] == found.name == "users" and found.setting("a") is None
    assert found.here["a"]["c"].mean == pytest.approx((0.3 + 0.4 + 0.5 + 1.0 + 1.2) / 5)
    with pytest.raises(ValueError, match="over tasks"):
        folds([one, part([0.4, 0.6], [0.4], [0.3, 0.1], "alphabets")], "users")
    with pytest.raises(ValueError, match="same seeds"):
        folds([one, part([0.4], [0.4], [0.3, 0.1])], "users")


def test_curves_are_scored_over_tasks_and_less_is_better(full):
    def mse(prediction, y):
        return ((prediction - y) ** 2).mean()

    def exact(setting, seed, share):
        return best_possible(setting, points=50), {}

    ways = {"exact": Way("baseline", exact, (0.05, 0.3, 2.0, 9.0))}
    found = contest(
        "trees", "curves", ways, noisy_sinusoids(5, 50, 20, 1), {"5": noisy_sinusoids(5, 50, 20, 2)}, DATA,
        live=("exact",), metric=mse, higher=False, choose=100, episodes=40,
    )  # fmt: skip
    assert found.setting("exact") == 0.3 and not found.edges and found.found["groups"] == "tasks"
    assert "error" in found.rows()["exact"]


def test_a_setting_that_diverges_is_never_chosen_and_stands_as_nothing(full):
    def train(setting, seed, share):
        if setting > 1:
            raise NotFinite("too far")
        return ways([])["ProtoNet"].train(setting, seed, share)

    test = cut(named(), 1)
    two = {"ProtoNet": Way("meta", train, (0.1, 1.0, 3.0, 9.0))}
    found = contest(
        "trees", "x", two, test, {"c": test}, DATA, ("ProtoNet",), choose=20, episodes=20
    )
    assert found.tuning("ProtoNet")["3"] is None and found.tuning("ProtoNet")["9"] is None
    assert found.setting("ProtoNet") in (0.1, 1.0)


def test_the_small_scale_tries_two_settings(full, monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    calls = []
    found = run(calls)
    assert len(calls) == 3 and not found.kept and math.isfinite(found.mean("ProtoNet"))


def test_two_ways_that_answer_alike_differ_by_exactly_nothing(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    found = run([])
    gap = found.minus("ProtoNet", "ProtoNet")
    assert (gap.mean, gap.seeds, gap.groups) == (0.0, 0.0, 0.0)
    assert found.minus("ProtoNet", "chance").seeds > 0


def test_what_a_gap_is_over_stands_in_the_record(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    found = run([])
    gap, row = found.minus("ProtoNet", "chance"), found.gain("ProtoNet", "chance")
    wide = "alphabets" if gap.groups >= (gap.seeds or 0) else "seeds"
    assert (row.unit, row.n) == (wide, {"alphabets": 4, "seeds": 3}[wide])
    assert (row.mean, row.low, row.high) == (gap.mean, gap.low, gap.high)
    errors = run([], higher=False, of=None)
    assert errors.gain("ProtoNet", "chance").mean == -errors.minus("ProtoNet", "chance").mean
    assert errors.gain("ProtoNet", "chance").unit in ("tasks", "seeds")
    assert errors.gain("ProtoNet", "chance").low < errors.gain("ProtoNet", "chance").high


def test_a_kinds_best_is_named_by_validation_tasks(full, monkeypatch):
    with pytest.raises(ValueError, match="judged on validation"):
        run([], live=("ProtoNet", "chance")).chosen("baseline")  # one setting: nothing was judged
    monkeypatch.setenv("MTLIB_RECORD", "1")
    found = run([])
    assert found.chosen("meta") == "ProtoNet" and found.chosen("baseline") == "chance"
    with pytest.raises(ValueError, match="transfer"):
        found.chosen("transfer")
    ahead = found.found["ways"]["chance"]["tuning"]
    found.ways["chance"] = found.ways["chance"]._replace(kind="meta")
    ahead["one"] = 2.0
    assert found.chosen("meta") == "chance"


def test_labels_of_test_tasks_choose_nothing(full, monkeypatch):
    """With the test classes' items in other classes, the settings and the best of a kind stay; the scores do not."""
    monkeypatch.setenv("MTLIB_RECORD", "1")
    before, original = run([]), named

    def stirred(seed=1):
        data = original(seed=seed)
        if seed == 2:
            return data
        mixed = torch.randperm(
            data.items.shape[0] * 100, generator=torch.Generator().manual_seed(0)
        )
        return data._replace(items=data.items.flatten(0, 1)[mixed].view_as(data.items))

    monkeypatch.setitem(run.__globals__, "named", stirred)
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    after = run([])
    for way in ("ProtoNet", "chance"):
        assert after.setting(way) == before.setting(way)
        assert after.tuning(way) == before.tuning(way)
    assert after.chosen("meta") == before.chosen("meta")
    assert after.mean("ProtoNet") != before.mean("ProtoNet")


# A measure that is no mean over tasks -----------------------------------------------------------


def ranks(setting, seed, shift=0.0):
    """Two columns: a number that is no mean of its parts, and twenty parts of it."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.rand(20, generator=g) / 10 + setting + shift
    return {c: (parts.mean().item() + 0.01, parts) for c in ("first", "second")}


def trials(calls):
    def test(setting, seed, shift=0.0):
        calls.append((setting, seed))
        return ranks(setting, seed, shift)

    def quality(setting):
        calls.append((setting, "quality"))
        return -abs(setting - 0.3)

    return {
        "ProtoNet": Trial("meta", test, quality, (0.1, 0.2, 0.3, 0.4)),
        "joint": Trial("transfer", lambda *how: test(*how, -0.1), quality, (0.1, 0.3, 0.4, 0.5)),
        "chance": Trial("baseline", test, quality, (0.0,)),
    }


def weigh(calls, live=("ProtoNet",), **more):
    about = {"groups": "photographs", "seeds": 3, "metric": "AP50", **more}
    return measured("trees", "leaves", trials(calls), data=DATA, live=live, **about)


def test_a_measure_of_ones_own_is_tuned_run_and_held_to_its_record(full, monkeypatch):
    calls = []
    found = weigh(calls)
    assert calls == [*((s, "quality") for s in (0.1, 0.2, 0.3, 0.4)), (0.3, 0)]
    assert not found.kept and found.setting("ProtoNet") == 0.3 and "joint" not in found
    assert found.mean("ProtoNet") == pytest.approx(ranks(0.3, 0)["first"][0])
    monkeypatch.setenv("MTLIB_RECORD", "1")
    calls.clear()
    found = weigh(calls)
    assert len(calls) == 9 + 9 and found.columns() == ["first", "second"]
    assert (found.chosen("meta"), found.chosen("transfer")) == ("ProtoNet", "joint")
    each = [ranks(0.3, seed)["first"] for seed in range(3)]
    assert found.runs("ProtoNet") == pytest.approx([number for number, _ in each])
    parts = torch.stack([p for _, p in each]).mean(0).double()
    gap = found._gap(found._at("ProtoNet", None), None, None)
    assert gap.groups == pytest.approx(1.96 * parts.std().item() / 20**0.5, rel=0.15)
    versus = found.gain("ProtoNet", "joint")
    assert versus.mean == pytest.approx(0.1, abs=1e-6) and versus.n in (3, 20)
    assert found.told("ProtoNet").startswith("36.") and "AP50, %" in found.rows()["joint"]
    told = {**TOLD, "gain": ("joint", "chance"), "versus": ("ProtoNet", "joint")}
    assert conclude("trees", contests=[found], **told) == "recorded as trees.json"
    assert results.recorded("trees").metric == "AP50"
    monkeypatch.delenv("MTLIB_RECORD")
    calls.clear()
    again = weigh(calls)
    assert calls == [(0.3, 0)] and again.kept and again.rows() == found.rows()
    path = full / "records" / "trees.json"
    held = json.loads(path.read_text("utf8"))
    held["details"]["leaves"]["ways"]["ProtoNet"]["columns"]["second"]["runs"] = [0.1, 0.11, 0.12]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"ProtoNet, second: .* record anew"):
        weigh([])
    held["details"]["leaves"]["ways"].pop("joint")
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="other trials"):
        weigh([])


def test_a_stopped_recording_of_ones_own_measure_goes_on(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    whole, calls = weigh([]).found, []
    assert weigh(calls).found == whole and calls == []


@pytest.mark.parametrize("parts", [torch.ones(1), torch.ones(3, 2), torch.tensor([1.0, math.nan])])
def test_parts_of_a_measure_are_a_row_of_finite_numbers(full, parts):
    odd = {"a": Trial("meta", lambda setting, seed: {"c": (1.0, parts)}, lambda s: 0.0, (1, 2))}
    with pytest.raises(ValueError, match="finite part of 'c'"):
        measured("trees", "leaves", odd, "photographs", DATA, ["a"])


@pytest.mark.parametrize("n", [3, 6, 10, 20, 200])
def test_intervals_over_few_groups_are_students(n):
    """Of equal sizes: `interval`'s own, within what a bootstrap of a mean scatters; that alone was a third too short of six."""
    parts = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    own = room._over_groups(parts, torch.ones(n))
    assert own == pytest.approx(interval(parts).interval, rel=0.1 if n > 3 else 0.25)


def test_intervals_of_few_groups_hold_the_truth_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(300, 6, generator=g, dtype=torch.float64)
    held = [abs(d.mean().item()) <= room._over_groups(d, torch.ones(6)) for d in draws]
    assert 0.91 <= sum(held) / len(held) <= 0.98
