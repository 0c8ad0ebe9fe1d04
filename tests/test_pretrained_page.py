"""The page on photographs and a pretrained backbone: its closed forms, its choices, and its numbers without the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from machine import real
from pages import run_until
from sklearn.covariance import shrunk_covariance
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from mtlib.book import contest
from mtlib.book import shop as module
from mtlib.book.pictures import photographs
from mtlib.book.results import recorded
from mtlib.core import Batch, parameters
from mtlib.data.grocery import groceries
from mtlib.evaluate import answers
from mtlib.learners.metric import centred, protonet, simpleshot, whitening
from mtlib.models import efficientnet
from mtlib.models.efficientnet import has_efficientnet, pooled, seen
from mtlib.nets import residual, two_halves
from mtlib.plots import figure
from mtlib.tasks import episodes

there = real("grocery")
weights = pytest.mark.skipif(not has_efficientnet(), reason="no ImageNet weights are installed")


# Closed forms --------------------------------------------------------------------------------


def rows(seed=0, n=120, d=6, classes=4):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    place = 5 * torch.randn(classes, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + place[y], y


def inside(u, y):
    means = torch.stack([u[y == k].mean(0) for k in y.unique()])
    gap = u - means[y.unique(return_inverse=True)[1]]
    return gap.mT @ gap / (len(u) - len(means))


def test_whitened_classes_are_round():
    z, y = rows()
    how = whitening(z, y, 0.0)
    u = z @ how["body.weight"].mT + how["body.bias"]
    assert torch.allclose(inside(u, y), torch.eye(6).double(), atol=1e-12)
    assert torch.allclose(u.mean(0), torch.zeros(6).double(), atol=1e-12)
    other = whitening(z, 7 * y + 3, 0.0)  # numbers are names
    assert torch.allclose(other["body.weight"], how["body.weight"], atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.1, 0.7])
def test_shrunk_as_scikit_learn_does(shrinkage):
    z, y = rows(1)
    m = whitening(z, y, shrinkage)["body.weight"].numpy()
    s = shrunk_covariance(inside(z, y).numpy(), shrinkage)
    assert np.allclose(m @ s @ m, np.eye(6), atol=1e-10)
    assert np.allclose(m, m.T) and (np.linalg.eigvalsh(m) > 0).all()


def test_shrunk_to_the_end_it_is_simpleshot():
    z, y = rows(2)
    net = two_halves(nn.Linear(6, 6).double(), nn.Linear(6, 4).double())
    flat = two_halves(nn.Flatten(), nn.Linear(6, 4).double())
    zero = {"centre.mean": torch.zeros(6).double()}
    support = Batch(z[:8], torch.eye(4).double()[y[:8]])
    one, two = simpleshot(net), simpleshot(flat)
    a = one.predict(one.adapt({**zero, **whitening(z, y, 1.0)}, support), z)
    b = two.predict(two.adapt(centred(flat, zero, z), support), z)
    assert torch.allclose(a, b, atol=1e-8)


def test_a_residual_head_begins_as_the_identity_and_every_part_of_it_moves():
    net = residual(6, 5, 3, seed=0).double()
    z = torch.randn(4, 6).double()
    assert torch.equal(net.body(z), z)
    learner, flat = protonet(net), protonet(two_halves(nn.Flatten(), nn.Linear(6, 3).double()))
    support = Batch(z, torch.eye(3).double()[[0, 1, 2, 0]])
    a = learner.predict(learner.adapt(learner.init(), support), z)
    b = flat.predict(flat.adapt({}, support), z)
    assert torch.equal(a, b)
    with torch.no_grad():
        net.body.second.weight.normal_()
    w1, b1, w2, b2 = (v.detach().numpy() for v in parameters(net.body).values())
    x = z.numpy()
    assert np.allclose(net.body(z).detach(), x + np.maximum(x @ w1.T + b1, 0) @ w2.T + b2)
    net.body(z).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.body.parameters())


def test_a_task_of_photographs_is_drawn_with_its_wrong_answers():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5) * 40
    with figure() as (_, ax):
        photographs(ax, images[:2], images[2:], torch.tensor([0, 1, 1, 1]), ["lime", "milk"])
        sheet = np.asarray(ax.images[0].get_array())
        assert sheet.shape == (8, 15, 3)
        assert sheet[::4, ::5, 0].tolist() == [[0, 80, 120], [40, 160, 200]]
        (letter,) = ax.texts
        assert letter.get_text() == "b"
        assert [t.get_text() for t in ax.get_yticklabels()] == ["a  lime", "b  milk"]


def test_random_weights_say_so():
    z, made_by = seen(torch.rand(2, 3, 16, 16), 32, pretrained=False)
    assert z.shape == (2, 1280) and made_by.endswith("(stand-in)") and "random" in made_by
    again, _ = seen(torch.rand(2, 3, 16, 16), 32, pretrained=False)
    assert again.shape == z.shape


# The page ------------------------------------------------------------------------------------


def test_support_and_queries_come_from_different_folders(small):
    space = run_until("pretrained", "found")
    draw, shown = space["asked"](space["test"], "5 labels")(0), space["shown"]
    for part, folder in zip(draw, shown, strict=True):
        own = folder.items.float().mean((3, 4)).flatten(0, 1) / 255
        gap = (part.x["colour"].flatten(0, 1)[:, None] - own).abs().amax(-1)
        assert gap.min(1).values.max() < 1e-4, "a photograph of another folder"
    twin = space["asked"](shown.numbered(), "5 labels")(0)
    classes = twin.query.x[..., 0].long()
    for t in range(len(classes)):
        for k in range(5):
            assert len(classes[t][draw.query.y[t].argmax(1) == k].unique()) == 1


def choices(space):
    return {
        (n, k): way["setting"]
        for n, c in space["found"].items()
        for k, way in c.found["ways"].items()
    }


def test_settings_are_chosen_with_as_many_labels_as_are_tested_with(small, monkeypatch):
    seen, plain = [], contest.contest

    def spy(page, name, ways, validation, tests, **how):
        seen.append((name, validation(0), *(s(0) for s in tests.values())))
        return plain(page, name, ways, validation, tests, **how)

    monkeypatch.setattr(contest, "contest", spy)
    run_until("pretrained", "moved")
    assert len(seen) == 6
    for name, judged, tested in seen:
        labels = int(name.split(", ")[1][0])
        assert judged.support.y.shape[1] == tested.support.y.shape[1] == 5 * labels, name
        assert judged.query.y.shape[1] == tested.query.y.shape[1] == 25


def test_the_settings_are_chosen_without_test_labels(small, monkeypatch):
    before = run_until("pretrained", "found")
    plain = module.groceries

    def other(part="train", size=128):
        data = plain(part, size)
        if part != "test":
            return data
        order = torch.randperm(len(data.support.names), generator=torch.manual_seed(0))
        return data._replace(support=data.support._replace(items=data.support.items[order]))

    monkeypatch.setattr(module, "groceries", other)
    after = run_until("pretrained", "found")
    assert choices(before) == choices(after) and len(choices(after)) == 10
    assert not torch.equal(
        before["shown"].support.items.float().mean(1), after["shown"].support.items.float().mean(1)
    )


def test_without_weights_the_page_says_so_and_judges_nothing(small, monkeypatch, capsys):
    monkeypatch.setattr(efficientnet, "has_efficientnet", lambda: False)
    space = run_until("pretrained", "found")
    assert space["shop"].made_by.endswith("random weights (stand-in)")
    one = space["found"]["1 label"]
    assert one.data.endswith("(stand-in)") and not one.kept
    assert "random weights" in capsys.readouterr().out
    one.judge("a claim", False)
    assert "not judged on stand-in data" in capsys.readouterr().out


LABELS = {"1 label": 1, "5 labels": 5}


def held(column="1 label", name="groceries"):
    return recorded("pretrained").details[f"{name}, {column}"]["ways"]


def by_scikit(reader, shots: int, number: int = 400) -> float:
    """Nearest class mean on the page's test tasks, by scikit-learn; `reader` gives the rows of both folders (C, 18, D)."""
    shop = groceries("test")
    index = torch.arange(23 * 18).view(23, 18, 1)
    data = [d._replace(items=index + i * index.numel()) for i, d in enumerate(shop)]
    stream = episodes(data[0], 5, shots, 5, 20, seed=1, queries_from=data[1])
    flat, right = np.concatenate([r.reshape(-1, r.shape[-1]) for r in reader]), []
    for step in range(number // 20):
        draw = stream(step)
        for t in range(20):
            (s, ys), (q, yq) = ((p.x[t, :, 0].numpy(), p.y[t].argmax(1).numpy()) for p in draw)
            means = [flat[s][ys == k].mean(0) for k in range(5)]
            model = KNeighborsClassifier(1).fit(means, range(5))
            right.append(np.mean(model.predict(flat[q]) == yq))
    return float(np.mean(right))


@there
@pytest.mark.parametrize(("column", "shots"), LABELS.items())
def test_mean_colour_by_scikit_learn(column, shots):
    colours = [d.items.double().mean((3, 4)).numpy() / 255 for d in groceries("test")]
    runs = held(column)["raw inputs, mean colour"]["columns"][column]["runs"]
    assert by_scikit(colours, shots) == pytest.approx(runs[0], abs=2e-3)
    assert len(runs) == 5 and np.ptp(runs) == 0, "nothing is drawn"


@there
@weights
@pytest.mark.parametrize(("column", "shots"), LABELS.items())
@pytest.mark.parametrize("name", ["class means", "SimpleShot", "whitened class means"])
def test_frozen_features_by_scikit_learn(name, column, shots):
    """Features from the cache or computed anew; the closed form with scikit-learn's covariance."""
    look = lambda x: pooled(x.float() / 255, 128).double()  # noqa: E731
    z = [d.items.numpy() for d in groceries("test").map(look)]
    if name != "class means":
        train = np.concatenate([d.items.numpy() for d in groceries("train").map(look)], 1)
        z = [v - train.mean((0, 1)) for v in z]
        if name != "SimpleShot":
            gap = train - train.mean(1, keepdims=True)
            gap = gap.reshape(-1, gap.shape[-1])
            shrinkage = held(column)[name]["setting"]
            s = shrunk_covariance(gap.T @ gap / (len(gap) - len(train)), shrinkage)
            values, vectors = np.linalg.eigh(s)
            z = [v @ (vectors / values**0.5 @ vectors.T) for v in z]
        z = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in z]
    runs = held(column)[name]["columns"][column]["runs"]
    assert by_scikit(z, shots) == pytest.approx(runs[0], abs=2e-3)
    if name == "SimpleShot":  # the same tasks, the first of them, where the last block is to move
        first = held(column, "moved")["class means before"]["columns"][column]["runs"]
        assert by_scikit(z, shots, 40) == pytest.approx(first[0], abs=2e-3)


def best(way):
    """What a way's best setting had on validation tasks."""
    return max(q for q in way["tuning"].values() if q is not None)


def test_the_record_holds_what_validation_chose():
    kept = recorded("pretrained")
    kinds = {e.method: e.kind for e in kept.entries}
    for kind, name in (("meta", kept.versus.ours), ("transfer", kept.versus.baseline)):
        judged = {k: best(w) for k, w in held().items() if kinds[k] == kind}
        assert name == max(judged, key=judged.__getitem__)
    for column in LABELS:  # nor would one of the ways that only the record has be chosen
        slow = max(best(w) for w in held(column, "slow").values())
        assert slow < best(held(column)["ProtoNet head"])
    assert kept.versus.unit in ("seeds", "classes") and kept.versus.n in (5, 23)
    assert kept.data.endswith("(real)") and len(kept.entries) == 8


@pytest.mark.parametrize("column", LABELS)
@pytest.mark.parametrize("name", ["groceries", "slow", "moved"])
def test_no_edge_is_unnoticed(name, column):
    for called, way in held(column, name).items():
        tried = {float(s): q for s, q in way["tuning"].items() if s != "as it is"}
        if tried:
            assert len(tried) >= 4, called
            assert tried[float(way["setting"])] == best(way), called
            assert way["edge"] == (way["setting"] in (min(tried), max(tried))), called


@pytest.mark.parametrize("column", LABELS)
def test_both_heads_had_the_same_chances(column):
    tables = [list(held(column)[k]["tuning"]) for k in ("joint head", "ProtoNet head")]
    assert tables[0] == tables[1] and len(tables[0]) >= 4
    ways = [held(column)[k]["columns"][column] for k in ("joint head", "ProtoNet head")]
    assert all(len(w["runs"]) == 5 and np.ptp(w["runs"]) > 0 for w in ways)


@weights
def test_the_last_block_begins_where_the_frozen_features_are_and_practice_moves_it():
    own = module.Shop({p: module.few(p, 6, 11) for p in module.PARTS}, 32, 16, 2, 5, 8)
    draw = dict(ways=5, shots=1, queries=5, tasks=2, seed=0)
    before, theta = own.practising_last(["as it is"], steps=0).train("as it is", 0, 1)
    frozen = own.still("level", lambda net, how: simpleshot(net)).train("as it is", 0, 1)
    a = answers(before, theta, own.inputs["test"].draw(**draw)(0))
    b = answers(*frozen, own.data["test"].draw(**draw)(0))
    assert torch.allclose(a, b, atol=1e-4)
    _, moved = own.practising_last([1e-4], steps=2).train(1e-4, 0, 1)
    still = {k for k, v in moved.items() if torch.equal(v, theta[k])}
    assert still == {k for k in theta if "running" in k}, "the norms' statistics alone stay"
