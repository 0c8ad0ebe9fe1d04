"""Readings of scanners and what is made of networks that were trained on them: `mtlib.book.merging`."""

from __future__ import annotations

import pytest
import torch

from mtlib.book.contest import TUNING_SEED
from mtlib.book.merging import (
    answers,
    both_ways,
    by_digit,
    connected,
    merging,
    onward,
    reading,
    right,
    summing,
    with_statistics,
)
from mtlib.core import parameters
from mtlib.data.digits import Domain
from mtlib.nets import conv2
from mtlib.norm import calibrate
from mtlib.transfer.averaging import added, interpolated, task_vector


def domain(seed: int = 0, n: int = 400) -> Domain:
    g = torch.Generator().manual_seed(seed)
    return Domain(torch.rand(n, 1, 16, 16, generator=g), torch.arange(n) % 10, "drawn")


NET = conv2(width=4, seed=0)
PHI = parameters(NET)
DATA = reading(domain(), held=2, tested=100, seen=60)
FEW = reading(domain(), shots=3, held=2, seed=1, tested=100, seen=60)


def numbers(x: torch.Tensor) -> set[bytes]:
    """Each image by its bytes."""
    return {image.numpy().tobytes() for image in x}


@pytest.mark.parametrize("data", [DATA, FEW])
def test_no_image_that_trains_or_chooses_is_tested_and_none_does_both(data):
    trained, held, tested = (numbers(b.x) for b in (data.labelled, data.held, data.tested))
    assert not trained & held and not tested & (trained | held | numbers(data.images))
    assert len(tested) == 100 and len(data.images) == 60


def test_few_labels_are_as_many_of_each_digit_and_not_among_what_norms_read():
    assert torch.bincount(FEW.labelled.y).tolist() == [3] * 10
    assert torch.bincount(FEW.held.y).tolist() == [2] * 10
    assert not numbers(FEW.images) & numbers(FEW.labelled.x)
    other = reading(domain(), shots=3, held=2, seed=2, tested=100, seen=60)
    assert not torch.equal(other.labelled.x, FEW.labelled.x)


def test_a_view_is_what_the_network_reads_everywhere():
    seen = reading(domain(), lambda x: 1 - x, held=2, tested=100, seen=60)
    torch.testing.assert_close(seen.images, 1 - DATA.images)
    torch.testing.assert_close(seen.tested.x, 1 - DATA.tested.x)
    assert torch.equal(seen.labelled.x, DATA.labelled.x)  # redrawn first, then seen
    drawn = []
    onward(NET, PHI, [seen._replace(view=lambda x: drawn.append(x) or 1 - x)], 0.01, 1, 0)
    assert drawn[0].shape == (32, 1, 16, 16)


def test_orders_part_after_the_steps_that_they_share():
    ran = [onward(NET, PHI, [DATA], 0.01, 3, order, shared) for order, shared in ((0, 3), (1, 3))]
    assert all(torch.equal(ran[0][k], ran[1][k]) for k in PHI)
    apart = onward(NET, PHI, [DATA], 0.01, 3, 1, 2)
    assert not torch.equal(apart["head.weight"], ran[0]["head.weight"])


def test_answers_read_the_readings_own_statistics_or_those_that_are_given():
    own = with_statistics(NET, PHI, DATA)
    assert own.keys() > PHI.keys()
    torch.testing.assert_close(
        answers(NET, PHI, DATA), answers(NET, own, DATA, stored=True), rtol=0, atol=0
    )
    other = calibrate(NET, PHI, [DATA.images + 1])
    assert not torch.allclose(answers(NET, other, DATA, stored=True), answers(NET, PHI, DATA))
    assert answers(NET, PHI, DATA, "held").shape == (20, 10) and NET.training
    hits = right(NET, PHI, DATA)
    assert hits.mean() == (answers(NET, PHI, DATA).argmax(1) == DATA.tested.y).float().mean()


def test_accuracy_by_digit_is_the_mean_over_readings():
    found = by_digit(NET, [PHI, PHI], [DATA, FEW])
    hits = right(NET, PHI, DATA)
    expected = torch.stack([hits[DATA.tested.y == k].mean() for k in range(10)])
    torch.testing.assert_close(found, expected)


def test_a_method_of_several_networks_asks_their_mean():
    other = parameters(conv2(width=4, seed=1))
    method = both_ways(NET, lambda a, b, s: (DATA, FEW), lambda a, b, s: ([PHI, other], 0.3))
    found = method("a", "b", 0)
    p = (answers(NET, PHI, DATA) + answers(NET, other, DATA)) / 2
    assert torch.equal(found["target"], (p.argmax(1) == DATA.tested.y).float())
    assert list(found) == ["both", "target", "source", "setting"]
    assert found["both"] == (found["target"].mean() + found["source"].mean()) / 2
    assert found["setting"] == torch.tensor(0.3)


def test_the_line_between_a_network_and_itself_has_no_barrier():
    shares = (0.0, 0.5, 1.0)
    other = parameters(conv2(width=4, seed=1))
    along = connected(NET, lambda *d: DATA, lambda *d: (PHI, PHI), shares)("a", "b", 0)
    assert along["barrier"] == along["averaged statistics"] == 0
    along = connected(NET, lambda *d: DATA, lambda *d: (PHI, other), shares)("a", "b", 0)
    middle = right(NET, interpolated(PHI, other, 0.5), DATA)
    torch.testing.assert_close(along["0.5"], 1 - middle.mean())
    rise = along["0.5"] - (along["0"] + along["1"]) / 2
    torch.testing.assert_close(along["barrier"], rise.clamp(min=0))


def test_a_trial_chooses_with_a_seed_that_no_test_has():
    asked = []
    trial = merging(
        "transfer", NET, lambda seed: asked.append(seed) or [DATA, FEW], lambda s, _: [PHI] * 2, [1]
    )
    trial.quality(1)
    assert asked == [TUNING_SEED]
    found = trial.test(1, 0)
    assert asked[-1] == 0 and list(found) == ["all", "first two"]
    number, parts = found["all"]
    assert number == pytest.approx(float(parts.mean())) and parts.shape == (10,)


def test_sums_of_tasks_are_those_of_the_package():
    tuned = {k: parameters(conv2(width=4, seed=s)) for s, k in enumerate("ab", 1)}
    trials = summing(
        NET,
        "ab",
        lambda name, seed: DATA,
        lambda seed: PHI,
        lambda name, rate, seed: tuned[name],
        1,
        (0.01,),
        (0.5,),
        (1.0,),
    )
    vectors = [task_vector(PHI, t) for t in tuned.values()]
    expected = by_digit(NET, [added(PHI, vectors, 0.5)], [DATA])
    torch.testing.assert_close(trials["sum"].test((0.01, 0.5), 0)["all"][1], expected)
    own = by_digit(NET, list(tuned.values()), [DATA] * 2)
    torch.testing.assert_close(trials["a network each"].test(0.01, 0)["all"][1], own)
    assert list(trials["TIES"].settings) == [(1.0, 0.01, 0.5)]
    assert trials["not trained on"].kind == trials["a network each"].kind == "baseline"
