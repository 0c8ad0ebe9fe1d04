"""`directions`: methods of adaptation in all directions, recorded and held to the record."""

from __future__ import annotations

import json

import pytest
import torch

from mtlib.book.contest import conclude
from mtlib.book.directions import Method, directions, widest
from mtlib.evaluate import interval

BETWEEN = [("a", "b"), ("b", "a"), ("a", "c")]
TOLD = {"field": "Trees", "protocol": "drawn", "gain": ("pull", "as is"), "labels": "none"}


def right(source, target, seed, better=0.0, n=200):
    """Drawn answers, right with a share that the direction and the method set."""
    g = torch.Generator().manual_seed(100 * BETWEEN.index((source, target)) + seed)
    share = 0.5 + 0.1 * BETWEEN.index((source, target)) + better
    return (torch.rand(n, generator=g) < share).double()


def methods(calls):
    def adapting(name, better):
        def adapt(source, target, seed):
            calls.append((name, source, target, seed))
            return {
                "accuracy": right(source, target, seed, better),
                "sure": torch.tensor(better + seed),
            }

        return adapt

    return {
        "as is": Method("baseline", adapting("as is", 0.0)),
        "pull": Method("transfer", adapting("pull", 0.2)),
    }


def run(calls=None, live=("pull",), between=BETWEEN, data="trees (real)", **more):
    calls = [] if calls is None else calls
    return directions("trees", "leaves", methods(calls), between, data, live, seeds=3, **more)


def recorded(monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    found = run()
    assert conclude("trees", contests=[found], **TOLD) == "recorded as trees.json"
    monkeypatch.delenv("MTLIB_RECORD")
    return found


def test_the_widest_interval_is_students_over_directions_or_seeds():
    each = torch.tensor([[0.7, 0.72, 0.71], [0.9, 0.91, 0.93]], dtype=torch.float64)
    assert widest(each).interval == interval(each.mean(1)).interval
    assert widest(each.T).interval == interval(each.mean(1)).interval
    assert widest(each[:, :1]).mean == pytest.approx(0.8)
    assert widest(each - each).interval == 0.0


def test_without_a_record_live_methods_go_the_first_directions_once(full):
    calls = []
    found = run(calls)
    assert calls == [("pull", "a", "b", 0), ("pull", "b", "a", 0)]
    assert not found.kept and found.told("as is") == "not run"
    both = [interval(right(a, b, 0, 0.2)) for a, b in BETWEEN[:2]]
    assert found.mean("pull") == pytest.approx(sum(s.mean for s in both) / 2)
    # two independent shares of n images each: half-widths add in squares, over two
    half = (both[0].interval ** 2 + both[1].interval ** 2) ** 0.5 / 2
    assert found.here["pull"]["accuracy"].interval == pytest.approx(half)
    assert "not recorded" in conclude("trees", contests=[found], **TOLD)


def test_a_record_has_each_run_and_its_means(full, monkeypatch):
    found = recorded(monkeypatch)
    shares = [[right(a, b, s, 0.2).mean().item() for s in range(3)] for a, b in BETWEEN]
    each = torch.tensor(shares, dtype=torch.float64)
    assert torch.allclose(found.each("pull"), each)
    assert found.mean("pull") == pytest.approx(each.mean().item())
    assert torch.allclose(
        found.each("pull", "sure"), torch.tensor([[0.2, 1.2, 2.2]] * 3, dtype=torch.float64)
    )
    gap = found.minus("pull", "as is")
    seeds = each.mean(0) - found.each("as is").mean(0)
    assert gap.seeds == pytest.approx(interval(seeds).interval)
    assert list(found.rows()["pull"]) == ["accuracy, %", "± seeds", "± directions"]


def test_a_later_run_is_held_to_the_record_direction_by_direction(full, monkeypatch):
    found = recorded(monkeypatch)
    calls = []
    again = run(calls)
    assert len(calls) == 2 and again.kept and again.rows() == found.rows()
    assert "1 of 2 ways ran, and agree" in conclude("trees", contests=[again], **TOLD)
    path = full / "records" / "trees.json"
    held = json.loads(path.read_text("utf8"))
    at = held["details"]["leaves"]["ways"]["pull"]["columns"]["accuracy"]["each"]
    at[1] = [0.2, 0.21, 0.2]  # the second direction alone
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"pull, b to a, accuracy: .* record anew"):
        run()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"between": BETWEEN[:2]}, "other directions"),
        ({"between": BETWEEN[::-1]}, "other directions"),
    ],
)
def test_a_record_of_other_directions_is_refused(full, monkeypatch, more, said):
    recorded(monkeypatch)
    with pytest.raises(ValueError, match=said):
        run(**more)


def test_a_record_of_other_methods_is_refused(full, monkeypatch):
    recorded(monkeypatch)
    some = {"pull": methods([])["pull"]}
    with pytest.raises(ValueError, match="other methods"):
        directions("trees", "leaves", some, BETWEEN, "trees (real)")


def test_a_stopped_recording_goes_on_where_it_stopped(full, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    calls = []
    run(calls)
    assert len(calls) == 2 * 3 * 3
    calls.clear()
    run(calls)
    assert calls == []


def test_methods_with_other_columns_are_refused(full):
    odd = {**methods([]), "odd": Method("transfer", lambda a, b, s: {"other": torch.ones(3)})}
    with pytest.raises(ValueError, match=r"odd.* have others"):
        directions("trees", "leaves", odd, BETWEEN, "trees", ("as is", "odd"))
