"""Digits of three scanners, their one form, the penalties that draw domains together, and the page's choices."""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from machine import FOLDER, always, damage, real, served
from pages import run_until
from problems import normal
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, apply, parameters
from mtlib.data import digits as module
from mtlib.data.digits import (
    FILES,
    changed,
    few,
    halves,
    pairs,
    prepared,
    read_semeion,
    redrawn,
    scanners,
)
from mtlib.data.download import Altered, fetch
from mtlib.joint import joint
from mtlib.nets import conv2
from mtlib.transfer.align import coral, entropy, information, mcc, mmd
from mtlib.transfer.critics import adversary, dann

there = real("mnist", "semeion")


@there
def test_counts_and_one_form():
    found = scanners()
    assert {k: len(d.y) for k, d in found.items()} == {
        "MNIST": 10000,
        "Semeion": 1593,
        "Digits": 1797,
    }
    assert torch.bincount(found["MNIST"].y).tolist()[:3] == [980, 1135, 1032]
    for d in found.values():
        assert d.source.endswith("(real)") and d.x.shape == (len(d.y), 1, 16, 16)
        assert d.x.min() == 0 and d.x.max() == 1 and d.x.dtype == torch.float32
        assert d.y.min() == 0 and d.y.max() == 9
        touched = (d.x[:, 0, 0].amax(1) > 0.2).float().mean()
        assert touched > 0.95, "the ink does not reach the frame"
    assert set(scanners(crop=False)["Semeion"].x.unique().tolist()) == {0, 1}


@there
@pytest.mark.parametrize("key", FILES)
def test_an_altered_file_is_refused_and_no_stand_in_taken(key, tmp_path, monkeypatch):
    for remote in FILES.values():
        (tmp_path / remote.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(FOLDER / remote.name, tmp_path / remote.name)
    damage(tmp_path / FILES[key].name)
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    with pytest.raises(Altered, match=FILES[key].name):
        scanners()


LINES = "".join(" ".join("1.0" if (i * j) % 3 else "0.0" for j in range(256)) + one for i, one in enumerate(
    (" 0 0 0 0 0 0 0 1 0 0\n", " 1 0 0 0 0 0 0 0 0 0\n")
)).encode()  # fmt: skip


def test_a_download_is_what_the_loader_reads(home):
    with served(always(LINES)) as url:
        digest = hashlib.sha256(LINES).hexdigest()
        remote = FILES["semeion"]._replace(url=f"{url}/semeion.data", sha256=(digest,))
        images, y = read_semeion(fetch(remote))
        with pytest.raises(Altered, match="truncated or altered"):
            fetch(FILES["semeion"]._replace(name="semeion/other.data", url=remote.url))
    assert images.shape == (2, 16, 16) and y.tolist() == [7, 0]
    assert images[1, 0, :4].tolist() == [0, 1, 1, 0]


def test_addresses_are_pinned():
    for remote in FILES.values():
        assert len(remote.url.split("/")[5]) == 40, remote.url


def test_an_image_is_cut_to_its_ink():
    image = np.zeros((28, 28))
    image[5:15, 10:12] = 0.5
    image[3, 3] = 0.1  # dust
    out = prepared(image, 16, crop=True)
    assert out.shape == (16, 16) and (out == 1).all()
    assert prepared(image, 16, crop=False).mean() < 0.2
    with pytest.raises(ValueError, match="with ink"):
        prepared(np.zeros((8, 8)), 16, crop=True)


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
    a, b = scanners(), scanners()
    assert len(a) == 3 and sum(len(d.y) for d in a.values()) == 1797
    for name, d in a.items():
        assert d.source.endswith("(stand-in)") and torch.equal(d.x, b[name].x)
    gap = a["slanted"].x.mean(0) - a["thick"].x.mean(0)
    assert gap.abs().max() > 0.1, "the domains look alike"


def numbered(n=41):
    """A domain whose images hold their own number, and as labels its last digit."""
    rows = torch.arange(n)
    return module.Domain(rows.float().view(-1, 1, 1, 1).expand(-1, 1, 16, 16), rows % 10, "numbers")


def test_the_halves_share_no_image_and_are_always_the_same():
    seen, test = halves(numbered(), 15)
    a, b = (set(part.x[:, 0, 0, 0].tolist()) for part in (seen, test))
    assert len(a) == 21 and len(b) == 15 and not a & b
    assert all(torch.equal(part.x[:, 0, 0, 0].long() % 10, part.y) for part in (seen, test))
    assert torch.equal(halves(numbered(), 99)[0].x, seen.x)
    assert len(halves(numbered(), 99)[1].x) == 20
    for domain, tested in ((numbered(), 0), (numbered(1), 5)):
        with pytest.raises(ValueError, match="at least two images and tested ≥ 1"):
            halves(domain, tested)


def test_pairs_are_the_same_each_time_and_hide_the_labels_of_the_target():
    source, target = halves(numbered(), 15)
    hidden, shown = (pairs(source, target, 3, 8, labelled=known)(17) for known in (False, True))
    assert hidden.x.shape == (2, 8, 1, 16, 16) and hidden.y.shape == (2, 8, 10)
    assert torch.equal(hidden.x, shown.x) and torch.equal(hidden.y[0], shown.y[0])
    assert (hidden.y[1] == 0).all() and (hidden.y[0].sum(-1) == 1).all()
    assert torch.equal(shown.y.argmax(-1), shown.x[:, :, 0, 0, 0].long() % 10)
    again = pairs(source, target, 3, 8, change=lambda x, rng: -x)(17)
    assert torch.equal(again.x, torch.stack([-hidden.x[0], hidden.x[1]]))
    assert not torch.equal(pairs(source, target, 4, 8)(17).x, hidden.x)
    with pytest.raises(ValueError, match="images in both domains and batch ≥ 1"):
        pairs(source, Batch(target.x[:0], target.y[:0]), 3)


@pytest.mark.parametrize("norm", [True, False])
def test_the_small_network_follows_its_seed(norm):
    nets = [conv2(7, 3, width=2, size=20, norm=norm, seed=seed) for seed in (1, 1, 2)]
    a, b, c = (parameters(net) for net in nets)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(
        a["head.weight"], c["head.weight"]
    )
    assert apply(nets[0])(a, torch.rand(4, 3, 20, 20)).shape == (4, 7)
    assert nets[0].body(torch.rand(4, 3, 20, 20)).shape == (4, 64)
    with pytest.raises(ValueError, match="at least 4 pixels"):
        conv2(size=3)


def logits(domains=2, rows=7, ways=4):
    return normal(domains, rows, ways)


def test_mcc_is_its_equation_written_out():
    a = logits()
    p = np.exp(a[-1].numpy() / 2.5)
    p /= p.sum(1, keepdims=True)
    certain = [1 + np.exp(sum(q * np.log(q) for q in row)) for row in p]
    w = [len(p) * c / sum(certain) for c in certain]
    confusion = np.array(
        [[sum(w[i] * p[i, j] * p[i, k] for i in range(7)) for k in range(4)] for j in range(4)]
    )
    confusion = confusion / confusion.sum(1, keepdims=True)
    expected = 0.3 * (confusion.sum() - np.trace(confusion)) / 4
    assert abs(mcc(0.3)({}, a, a).item() - expected) <= 1e-12


def test_mcc_is_least_for_sure_and_varied_answers_and_reads_the_target_alone():
    sure = 50 * torch.eye(4, dtype=torch.float64).repeat(2, 1)
    torn = torch.zeros(8, 4, dtype=torch.float64)
    value = [mcc()({}, x[None], torch.stack([torn, x])).item() for x in (sure, torn)]
    assert value[0] < 1e-6 and abs(value[1] - 0.75) < 1e-12
    a = logits().requires_grad_()
    (g,) = torch.autograd.grad(mcc()({}, a, a), a)
    assert (g[0] == 0).all() and (g[1] != 0).any()


def test_mmd_is_its_estimator_written_out():
    z = logits(rows=5, ways=3)
    both = torch.cat([*z]).numpy()
    squared = ((both[:, None] - both[None]) ** 2).sum(-1)
    mean = squared.sum() / (10 * 9)

    def kernel(a, b):
        return sum(np.exp(-((a - b) ** 2).sum() / (c * mean)) for c in (0.5, 2.0))

    s, t = z.numpy()
    within = [
        np.mean([kernel(d[i], d[j]) for i in range(5) for j in range(5) if i != j]) for d in (s, t)
    ]
    between = np.mean([kernel(a, b) for a in s for b in t])
    expected = 2.0 * (sum(within) - 2 * between)
    assert abs(mmd(2.0, (0.5, 2.0))({}, z, z).item() - expected) <= 1e-12


def test_mmd_is_zero_on_average_between_equal_distributions_and_not_otherwise():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(400, 2, 16, 3, generator=g, dtype=torch.float64)
    same = torch.stack([mmd()({}, d, d) for d in z])
    assert abs(same.mean()) < 3 * same.std() / 20, "biased"
    z[:, 1] += 1
    other = torch.stack([mmd()({}, d, d) for d in z])
    assert other.mean() > 20 * other.std() / 20


def test_entropy_is_its_equation_and_least_for_one_class_throughout():
    a = logits()
    p = np.exp(a[-1].numpy())
    p /= p.sum(1, keepdims=True)
    expected = -0.3 * np.mean([sum(q * np.log(q) for q in row) for row in p])
    assert abs(entropy(0.3)({}, a, a).item() - expected) <= 1e-12
    one = torch.zeros(1, 6, 4, dtype=torch.float64)
    one[..., 2] = 50
    assert entropy()({}, one, one) < 1e-6 and mcc()({}, one, one) > 0.2, "MCC minds a collapse"


def adversarial(strength):
    """A tiny body, head and critic, and the objective's gradient at a draw of two domains."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), head=nn.Linear(2, 2))).double()
    critic = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    batch = Batch(x, torch.eye(2, dtype=torch.float64).repeat(2, 3, 1))
    phi = {**parameters(net), **adversary(critic)}
    objective = joint(net, cross_entropy, (0, 0), [dann(critic, strength)])
    return net, critic, batch, objective.value_and_grad(phi, batch)


def test_dann_is_the_critics_cross_entropy_and_turns_the_bodys_gradient_around():
    net, critic, batch, (value, grads) = adversarial(0.7)
    said = critic(net.body(batch.x.flatten(0, 1)))
    domain = torch.tensor([0] * 6 + [1] * 6)
    plain = cross_entropy(said, domain)
    assert abs(value - plain) <= 1e-12
    plain.backward()
    for k, p in critic.named_parameters():
        torch.testing.assert_close(grads[f"critic.{k}"], p.grad)
    for k, p in net.body.named_parameters():
        torch.testing.assert_close(grads[f"body.{k}"], -0.7 * p.grad)
    assert (grads["critic.0.weight"] != 0).any() and (grads["body.weight"] != 0).any()


def test_dann_asks_for_an_output_a_domain_and_for_the_critics_parameters():
    z = logits(ways=2)
    critic = nn.Linear(2, 3).double()
    with pytest.raises(ValueError, match="one output for each of 2 domains, got 3"):
        dann(critic)(adversary(critic), z, z)
    with pytest.raises(ValueError, match="expected the critic's parameters in θ"):
        dann(nn.Linear(2, 2).double())({}, z, z)


@pytest.mark.parametrize("penalty", [mmd, coral])
def test_alignment_asks_for_two_domains(penalty):
    with pytest.raises(ValueError, match="T ≥ 2"):
        penalty()({}, logits(domains=1), logits(domains=1))


def test_few_are_of_each_digit_and_fewer_are_the_first_of_them():
    seen = halves(numbered(400), 15)[0]
    five, one = (few(seen, shots, 3, after=50) for shots in (5, 1))
    assert five.y.tolist() == [d for d in range(10) for _ in range(5)]
    assert len(set(five.x[:, 0, 0, 0].tolist())) == 50, "an image twice"
    assert torch.equal(one.x, five.x[::5]) and torch.equal(one.y, five.y[::5])
    assert torch.equal(five.x[:, 0, 0, 0].long() % 10, five.y)
    assert not set(five.x[:, 0, 0, 0].tolist()) & set(seen.x[:50, 0, 0, 0].tolist())
    assert not torch.equal(few(seen, 5, 4, after=50).x, five.x)
    with pytest.raises(ValueError, match="expected 5 images of each digit from number 190 on"):
        few(seen, 5, 3, after=190)


def test_redrawn_images_are_still_near_and_follow_the_generator():
    x = torch.zeros(200, 1, 16, 16)
    x[:, :, 4:12, 6:10] = 1
    a, b, c = (redrawn(x, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert a.shape == x.shape and torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 1 + 1e-6
    flat = a.flatten(1)
    assert len(torch.unique(flat, dim=0)) == 200, "each is drawn by itself"
    overlap = (flat * x.flatten(1)).sum(1) / x[0].sum()
    assert 0.5 < overlap.mean() < 1 and overlap.min() > 0.3
    ink = flat.sum(1) / x[0].sum()
    assert ink.min() < 0.8 and ink.max() > 1.2, "thinner and thicker ones"


def test_no_label_of_the_target_reaches_rows_without_labels(small):
    raw = changed()

    def run(shuffled: bool):
        found = {}
        for name, (images, y) in raw.items():
            x = torch.from_numpy(np.stack([prepared(i, 16, True) for i in images]))[:, None]
            y = np.random.default_rng(0).permutation(y) if shuffled and name != "Digits" else y
            found[name] = module.Domain(x, torch.from_numpy(y.astype(np.int64)), "x (stand-in)")
        small.setattr(module, "scanners", lambda **_: found)
        page = run_until("digits", "found")
        logits = {k: page["answers"](k, "Digits", "slanted", 0, 3e-3) for k in page["ROWS"]}
        return page, logits

    (page, before), (other, after) = run(False), run(True)
    free = [k for k in page["ROWS"] if "labels" not in k and "home" not in k and k != "ceiling"]
    assert len(free) > 12 and {"MCC", "SHOT", "DANN, not redrawn"} <= {*free}

    def alike(k):
        return all(torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True))

    assert all(alike(k) for k in free), [k for k in free if not alike(k)]
    assert not any(alike(k) for k in before if "labels" in k)
    assert page["found"].mean("SHOT", "information") == other["found"].mean("SHOT", "information")
    assert page["found"].mean("SHOT") != other["found"].mean("SHOT")


def test_a_rate_is_chosen_without_labels_of_the_target(small):
    page = run_until("digits", "found")
    chosen, between = page["chosen"], page["BETWEEN"]
    b, grid = between[0][1], page["GRIDS"]["source"][1]
    best = [0.9 if to == b else 0.1 for _, to in between]  # the first rate is best on b alone
    page["QUALITY"]["source"] = [best, [0.2] * 6, [0.3] * 6, [0.2] * 6]
    chosen.cache_clear()
    assert chosen("source", b) == grid[2]
    assert all(chosen("source", to) != grid[2] for to in {*page["DOMAINS"]} - {b})


def test_missing_classes_lower_the_value_of_right_answers():
    """The numbers of a solution: all sure, five digits in equal shares, and ten."""
    sure = 1e3 * torch.eye(10, dtype=torch.float64)

    def value(rows):
        return information()({}, sure[None, rows], sure[None, rows]).item()

    assert value(torch.arange(5).repeat(2)) == pytest.approx(-np.log(5))
    assert value(torch.arange(10)) == pytest.approx(-np.log(10))
    assert (round(-np.log(5), 2), round(-np.log(10), 2)) == (-1.61, -2.3)
