"""The page on what to do after training: its record says what its prose says, and its exercise on swapped units."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlib.book.results import recorded, recorded_pages
from mtlib.core import apply, parameters
from mtlib.nets import mlp
from mtlib.transfer.averaging import interpolated

needs_record = pytest.mark.skipif("after" not in recorded_pages(), reason="not recorded yet")


def each(contest: str, way: str, column: str) -> np.ndarray:
    """(directions, seeds) as the record keeps them."""
    return np.array(recorded("after").details[contest]["ways"][way]["columns"][column]["each"])


def runs(contest: str, way: str, column: str = "all") -> np.ndarray:
    return np.array(recorded("after").details[contest]["ways"][way]["columns"][column]["runs"])


@needs_record
def test_the_record_has_six_directions_and_five_seeds():
    assert each("scanners", "line, both", "both").shape == (6, 5)
    assert each("pairs", "two starts", "barrier").shape == (3, 5)
    assert len(runs("6 tasks", "sum")) == 5


@needs_record
def test_both_is_the_mean_of_target_and_source_and_the_gain_is_of_both():
    for way in ("line, both", "fine-tuned, both", "uniform soup"):
        both, target, source = (each("scanners", way, c) for c in ("both", "target", "source"))
        np.testing.assert_allclose(both, (target + source) / 2, atol=1e-6)
    gap = each("scanners", "line, both", "both") - each("scanners", "fine-tuned, both", "both")
    assert recorded("after").gain.mean == pytest.approx(gap.mean(), abs=1e-9)


@needs_record
def test_the_line_keeps_the_source_and_its_target_rises_early():
    """Half of what the target wins is there at λ = 0.4, when less than a quarter of the source's loss is."""
    base, tuned = "source's network", "fine-tuned, target"
    for column, most in (("target", True), ("source", False)):
        start, end, at = (each("scanners", k, column).mean() for k in (base, tuned, "λ = 0.4"))
        share = (at - start) / (end - start)
        assert share > 0.5 if most else share < 0.25


@needs_record
def test_two_starts_have_a_barrier_and_one_start_has_none():
    barrier = {
        k: each("pairs", k, "barrier").mean() for k in recorded("after").details["pairs"]["ways"]
    }
    assert barrier["two starts"] > 10 * max(
        barrier[k] for k in ("5 steps in common", "fine-tuned, one start")
    )
    errors = [each("pairs", "two starts", s) for s in ("0", "0.25", "0.5", "0.75", "1")]
    line = [(1 - s) * errors[0] + s * errors[-1] for s in (0, 0.25, 0.5, 0.75, 1)]
    rise = (np.array(errors) - np.array(line)).max(0)
    np.testing.assert_allclose(rise, each("pairs", "two starts", "barrier"), atol=1e-6)
    stale = each("pairs", "two starts", "averaged statistics").mean()
    assert stale > barrier["two starts"]


@needs_record
def test_sums_fall_behind_joint_training_as_tasks_are_added():
    behind = [
        (runs(f"{n} tasks", "joint training") - runs(f"{n} tasks", "sum")).mean() for n in (2, 4, 6)
    ]
    assert behind[0] < behind[1] and behind[0] < behind[2]
    assert behind[2] > 0.05


def test_between_a_network_and_its_copy_with_two_units_exchanged_is_another_function():
    net = mlp(3, (4,), 2, seed=0).double()
    phi, f = parameters(net), apply(net)
    order = torch.tensor([1, 0, 2, 3])
    (weight, bias), out = [k for k in phi if k.startswith("body.")], "head.weight"
    swapped = {**phi, weight: phi[weight][order], bias: phi[bias][order], out: phi[out][:, order]}
    x = torch.randn(50, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(f(swapped, x), f(phi, x))
    middle = interpolated(phi, swapped, 0.5)
    assert not torch.allclose(f(middle, x), f(phi, x), atol=1e-3)
    assert torch.equal(middle[weight][0], middle[weight][1])
