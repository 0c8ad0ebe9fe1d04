"""The page on alignment: no label of the target reaches training, and what its text and its solutions state."""

from __future__ import annotations

import math

import pytest
import torch
from pages import at_small_scale, run_until

from mtlib.data import digits
from mtlib.data.digits import halves
from mtlib.transfer import align
from mtlib.transfer.selection import information


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("alignment", "METHODS")


def mix_labels(monkeypatch, domain_at: int) -> None:
    """The labels of one scanner stand with other images from here on."""
    plain = digits.scanners

    def other(**options):
        held = plain(**options)
        name = list(held)[domain_at]
        g = torch.Generator().manual_seed(0)
        y = held[name].y[torch.randperm(len(held[name].y), generator=g)]
        return {**held, name: held[name]._replace(y=y)}

    monkeypatch.setattr(digits, "scanners", other)


def trained(page, method):
    """The parameters that a method ends with, in the first direction."""
    _, adapt, _ = page["METHODS"][method]
    return adapt(*page["BETWEEN"][0], 0, page["SHORT"])[1]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def test_no_label_of_the_target_reaches_training(page, small):
    before = {m: trained(page, m) for m in page["METHODS"]}
    mix_labels(small, 1)
    after = run_until("alignment", "METHODS")
    assert not torch.equal(
        page["TESTED"][page["BETWEEN"][0][1]].y, after["TESTED"][page["BETWEEN"][0][1]].y
    )
    for method, phi in before.items():
        assert equal(phi, trained(after, method)) == (method != "ceiling"), method


def test_labels_of_the_source_do_reach_training(page, small):
    before = {m: trained(page, m) for m in page["METHODS"]}
    mix_labels(small, 0)
    after = run_until("alignment", "METHODS")
    for method, phi in before.items():
        assert equal(phi, trained(after, method)) == (method == "ceiling"), method


def test_images_that_test_are_seen_by_nothing(page):
    for name, domain in page["DOMAINS"].items():
        seen, tested = halves(domain, page["TESTS"])
        assert torch.equal(page["SEEN"][name].x, seen.x)
        assert torch.equal(page["TESTED"][name].x, tested.x)


def test_source_and_own_statistics_are_one_network(page):
    both = [page["METHODS"][f"{whose} statistics"] for whose in ("source's", "own")]
    assert equal(
        *(adapt("Digits", b, 0, 2)[1] for (_, adapt, _), b in zip(both, ("x", "y"), strict=True))
    )
    assert [of for *_, of in both] == [0, 1]


def test_what_moves(page):
    """The head of ADDA and SHOT is the source's, and all of the body moves."""
    begun = trained(page, "own statistics")
    for method in ("ADDA", "SHOT"):
        phi = trained(page, method)
        for k, v in begun.items():
            assert torch.equal(v, phi[k]) == k.startswith("head."), (method, k)


def test_norms_read_the_images_they_should(page):
    """Test images are answered one by one: with others beside them the answers stay."""
    a, b = page["BETWEEN"][0]
    adapt = page["METHODS"]["own statistics"][1]
    whole = page["right"](adapt, 2, 1, a, b, 0)["accuracy"]
    tested = page["TESTED"][b]
    page["TESTED"][b] = type(tested)(tested.x[:7], tested.y[:7])
    try:
        assert torch.equal(page["right"](adapt, 2, 1, a, b, 0)["accuracy"], whole[:7])
    finally:
        page["TESTED"][b] = tested


def test_the_shift_in_closed_form():
    """A million draws of the page's two classes against its formulas."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (1_000_000,), generator=g)
    x = torch.randn(len(y), 2, generator=g, dtype=torch.float64)
    x[:, 0] += 4 * y - 2
    target = x + torch.tensor([2.5, 3.0])
    normal = torch.special.ndtr(torch.tensor([-0.5, 4.5, 6 / 15.25**0.5], dtype=torch.float64))
    cut, best = normal[:2].mean().item(), normal[2].item()
    assert (f"{cut:.3f}", f"{best:.3f}") == ("0.654", "0.938")
    assert ((target[:, 0] > 0) == (y == 1)).double().mean().item() == pytest.approx(cut, abs=2e-3)
    across = torch.tensor([3.0, -2.5], dtype=torch.float64)  # the move has no part of it
    assert torch.allclose(x @ across, target @ across)
    assert ((target @ across > 0) == (y == 1)).double().mean().item() == pytest.approx(
        best, abs=1e-3
    )


# Solutions -------------------------------------------------------------------------------------


def test_classes_that_are_missing():
    """From 97.7 to 50 %: the target's one class is put onto the boundary."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(1_000_000, generator=g, dtype=torch.float64) - 2
    aligned = target - target.mean()  # the mean of the source's two classes
    assert (target < 0).double().mean().item() == pytest.approx(0.977, abs=1e-3)
    assert (aligned < 0).double().mean().item() == pytest.approx(0.5, abs=2e-3)


def test_only_the_product_of_afn_counts():
    z = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(align.afn(*at)({}, z, z), z)[0] for at in ((0.05, 1.0), (0.1, 0.5))
    ]
    assert torch.allclose(*found, atol=1e-15)
    by_hand = -2 * 0.05 * z / z.norm(dim=-1, keepdim=True) / (2 * 8)
    assert torch.allclose(found[0], by_hand, atol=1e-15)


def test_varied_answers_that_are_wrong():
    """−1.61 where all is right, −2.30 where wrong answers are spread over classes that are not there."""

    def sure(classes):
        return 1e3 * torch.eye(10, dtype=torch.float64)[torch.arange(100) % classes]

    five, ten = (
        align.information()({}, torch.zeros(1, 100, 1), sure(n)[None]).item() for n in (5, 10)
    )
    assert (round(five, 2), round(ten, 2)) == (-1.61, -2.3)
    assert five == pytest.approx(-math.log(5)) == -information(sure(5))


def test_a_penalty_beside_another(page, small):
    """The solution's row of CDAN with BSP runs, and its penalty is the sum."""
    critics, warm = page["critics"], page["warm"]

    def cdan_bsp(net, q, p):
        terms = critics.cdan(q, warm(p)), align.bsp(1e-4)
        return lambda *at: sum(term(*at) for term in terms)

    page["PENALTIES"]["CDAN + BSP"] = ((640, 2), cdan_bsp)
    row = page["partial"](page["aligned"], name="CDAN + BSP")
    found = page["right"](row, page["SHORT"], 1, *page["BETWEEN"][0], 0)["accuracy"]
    assert len(found) == len(page["TESTED"][page["BETWEEN"][0][1]].y)
    q, z = page["critic"](640, 2, seed=0), torch.randn(2, 8, 64)
    at = critics.adversary(q), z, torch.randn(2, 8, 10)
    total = cdan_bsp(None, q, 0.5)(*at)
    assert torch.allclose(total, critics.cdan(q, warm(0.5))(*at) + align.bsp(1e-4)(*at))
