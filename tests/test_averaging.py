"""Arithmetic on weights: ends of the line, means, sums and TIES in closed form, and what has to be refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlib.core import apply, parameters
from mtlib.nets import conv2, mlp
from mtlib.norm import calibrate
from mtlib.transfer.averaging import (
    added,
    barrier,
    greedy_soup,
    interpolated,
    task_vector,
    ties,
    uniform_soup,
)


def drawn(seed: int, n: int = 1) -> list[dict[str, torch.Tensor]]:
    return [parameters(mlp(3, (5,), 2, seed=seed + i).double()) for i in range(n)]


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tolerance, atol=tolerance)


def test_the_line_ends_at_its_ends_to_the_bit_and_goes_on_beyond_them():
    a, b = drawn(0, 2)
    same(interpolated(a, b, 0.0), a)
    same(interpolated(a, b, 1.0), b)
    same(interpolated(a, b, 0.25), {k: 0.75 * a[k] + 0.25 * b[k] for k in a}, 1e-14)
    same(interpolated(a, b, 2), {k: 2 * b[k] - a[k] for k in a}, 1e-14)
    assert all(interpolated(a, b, 0)[k].data_ptr() != a[k].data_ptr() for k in a)


def test_the_loss_of_a_linear_model_along_the_line_is_a_parabola():
    """f_θ is linear in θ, so that its squared error is a₀ + a₁ λ + a₂ λ², and the barrier of a convex loss is 0."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(20, d, generator=g, dtype=torch.double) for d in (4, 2))
    nets = [nn.Linear(4, 2).double() for _ in range(2)]
    (a, b), f = map(parameters, nets), apply(nets[0])
    shares = [i / 10 for i in range(11)]
    losses = torch.stack([(f(interpolated(a, b, s), x) - y).square().mean() for s in shares])
    second = losses.diff().diff()
    torch.testing.assert_close(second, second[:1].expand(9), rtol=1e-8, atol=1e-12)
    curve = (f(b, x) - f(a, x)).square().mean()  # half the second derivative
    torch.testing.assert_close(second[0], 2 * curve * 0.01, rtol=1e-8, atol=1e-12)
    assert barrier(losses, shares) == pytest.approx(0, abs=1e-6)


def test_the_barrier_is_the_highest_rise_above_the_straight_line():
    assert barrier([1.0, 4.0, 3.0], [0.0, 0.5, 1.0]) == pytest.approx(2.0)
    assert barrier(torch.tensor([0.0, 1.0, 2.0, 3.0]), [0.0, 0.2, 0.9, 1.0]) == pytest.approx(0.4)


def test_a_uniform_soup_is_the_mean_and_of_equal_members_is_the_member_to_the_bit():
    members = drawn(3, 3)
    mean = {k: sum(m[k] for m in members) / 3 for k in members[0]}
    same(uniform_soup(members), mean, 1e-14)
    third = {"w": torch.full((7,), 0.1)}  # 0.1 + 0.1 + 0.1 is not three times 0.1 in floating point
    same(uniform_soup([third] * 3), third)
    same(uniform_soup(members[:1]), members[0])


def test_a_greedy_soup_takes_in_what_does_not_make_it_worse():
    """With quality −(w − 2)², members 1, 3.5 and 10: 1 first, the mean 2.25 is better, 4.83 is worse."""
    members = [{"w": torch.tensor([v])} for v in (10.0, 1.0, 3.5)]
    asked = []

    def quality(phi):
        asked.append(float(phi["w"]))
        return -((phi["w"] - 2) ** 2)

    soup = greedy_soup(members, quality)
    assert soup.kept == (1, 2) and soup.params["w"] == 2.25
    assert soup.quality == pytest.approx(-0.0625)
    assert soup.alone == (-64.0, -1.0, -2.25) and len(asked) == 5


def test_a_greedy_soup_keeps_a_member_that_changes_nothing_and_the_first_of_equals_comes_first():
    members = [{"w": torch.tensor([v])} for v in (1.0, 1.0, 3.0)]
    assert greedy_soup(members, lambda phi: 0.5).kept == (0, 1, 2)


def test_task_vectors_give_back_what_they_were_taken_from():
    start, one, two = drawn(5, 3)
    vectors = [task_vector(start, t) for t in (one, two)]
    same(added(start, vectors[:1]), one, 1e-14)
    same(added(start, vectors[:1], 0.3), interpolated(start, one, 0.3), 1e-14)
    same(added(start, vectors, 0.5), uniform_soup([one, two]), 1e-14)
    same(added(one, vectors[:1], -1.0), start, 1e-14)
    part = [{k: v for k, v in t.items() if k.startswith("body.")} for t in vectors]
    for k, v in added(start, part).items():
        assert k.startswith("body.") or torch.equal(v, start[k])


def test_ties_in_a_case_by_hand():
    """Two of four entries stay in each row. Signs: +, −, none, −. Means of those that agree."""
    first = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[0.5], [-2.0]])}
    second = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([[0.2], [5.0]])}
    third = {"a": torch.tensor([-1.0, 0.3]), "b": torch.tensor([[0.1], [-4.0]])}
    # trimmed: (3, 0, 0, −2), (0, −4, 0, 5), (−1, 0, 0, −4); sums (2, −4, 0, −1)
    found = ties([first, second, third], keep=0.5)
    assert torch.equal(found["a"], torch.tensor([3.0, -4.0]))
    assert torch.equal(found["b"], torch.tensor([[0.0], [-3.0]]))


def test_ties_with_all_entries_of_one_vector_is_the_vector_and_where_signs_agree_the_mean():
    vectors = [{k: v.abs() + 0.1 for k, v in t.items()} for t in drawn(7, 3)]
    same(ties(vectors[:1], 1.0), vectors[0])
    same(ties(vectors, 1.0), uniform_soup(vectors), 1e-14)


def test_ties_against_its_definition_entry_by_entry():
    start, *tuned = drawn(11, 5)
    vectors = [task_vector(start, t) for t in tuned]
    flat = torch.stack([torch.cat([v.flatten() for v in t.values()]) for t in vectors])
    n = flat.shape[1]
    expected = torch.zeros(n).double()
    kept = [set(row.abs().argsort(descending=True)[: -(-3 * n // 10)].tolist()) for row in flat]
    for j in range(n):
        column = [flat[t, j].item() if j in kept[t] else 0.0 for t in range(len(flat))]
        sign = (sum(column) > 0) - (sum(column) < 0)
        agree = [v for v in column if v * sign > 0]
        expected[j] = sum(agree) / len(agree) if agree else 0.0
    found = torch.cat([v.flatten() for v in ties(vectors, 0.3).values()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def with_norms(seed: int):
    x = torch.rand(9, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    net = conv2(width=4, seed=seed)
    return net, parameters(net), x


def test_statistics_that_differ_are_left_out_and_calibrate_puts_them_back():
    net, a, x = with_norms(0)
    _, b, _ = with_norms(1)
    ends = [calibrate(net, phi, [x]) for phi in (a, b)]
    middle = interpolated(*ends, 0.5)
    assert middle.keys() == a.keys() != ends[0].keys()
    same(middle, interpolated(a, b, 0.5))
    assert uniform_soup(ends).keys() == a.keys() == task_vector(*ends).keys()
    assert added(ends[0], [task_vector(*ends)]).keys() == a.keys()
    whole = calibrate(net, middle, [x])
    out = apply(net.eval())(whole, x)
    torch.testing.assert_close(out, apply(net.train())(middle, x), rtol=1e-4, atol=1e-5)


def test_what_is_the_same_in_all_members_stays_whole_numbers_and_statistics_too():
    shared = {
        "norm.running_mean": torch.rand(3),
        "norm.num_batches_tracked": torch.tensor(7),
        "blocks": torch.tensor([0, 0, 1]),
        "frozen": torch.rand(2),
    }
    a, b = ({**shared, "w": torch.rand(4)} for _ in range(2))
    for made in (interpolated(a, b, 0.3), uniform_soup([a, b, a])):
        assert all(torch.equal(made[k], shared[k]) for k in shared)
    vector = task_vector(a, b)
    assert vector.keys() == {"frozen", "w"} and not vector["frozen"].any()
    counted = {**b, "norm.num_batches_tracked": torch.tensor(8)}
    assert "norm.num_batches_tracked" not in uniform_soup([a, counted])
    with pytest.raises(ValueError, match=r"whole numbers 'blocks'"):
        uniform_soup([a, {**b, "blocks": torch.tensor([0, 1, 1])}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_the_dtype_and_half_precision_is_summed_in_float32(dtype):
    members = [{"w": torch.tensor([v], dtype=dtype)} for v in (256.0, 1.0, 1.0)]
    found = uniform_soup(members)["w"]
    assert found.dtype == dtype and found == torch.tensor([86.0], dtype=dtype)
    vectors = [task_vector(members[1], m) for m in members]
    assert added(members[1], vectors)["w"] == 256.0 and ties(vectors, 1.0)["w"].dtype == dtype
