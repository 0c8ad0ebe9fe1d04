"""The page on image classification: its choices never see a test label, and two of its numbers without the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from machine import real
from pages import mix_test_characters, run_until
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from mtlib.book.pictures import lookalikes, task
from mtlib.book.results import recorded
from mtlib.data.characters import characters
from mtlib.learners.metric import protonet
from mtlib.models.efficientnet import has_efficientnet, pooled
from mtlib.nets import two_halves
from mtlib.plots import by_group, figure
from mtlib.tasks import ClassSet, episodes

there = real("omniglot")
EPISODES = 60


# Pictures of tasks ---------------------------------------------------------------------------


def marks():
    """Two alphabets: in one, two of the seven drawings of "x" look as "y" does; in the other all are alike by class."""
    items = torch.zeros(4, 8, 1, 4, 4)
    for k in range(4):
        items[k, :, 0, k, k] = 1
    items[0, 3:5] = items[1, 0]
    return ClassSet(items, ["A/x", "A/y", "B/x", "B/y"], "marks")


def test_what_looks_alike_is_found():
    pixels = two_halves(nn.Flatten(), nn.Linear(16, 2))
    learner, phi = protonet(pixels), {"none": torch.zeros(1)}
    first, second = lookalikes(learner, phi, marks())
    assert (first.group, first.times, first.of) == ("A", 2, 7) and first.share == 12 / 14
    assert torch.equal(first.images, marks().items[[0, 0, 1], [0, 3, 0], 0])
    assert (second.group, second.times, second.share) == ("B", 0, 1.0)
    with pytest.raises(ValueError, match="has one"):
        lookalikes(learner, phi, marks().select([0, 1, 2]))


def test_a_task_is_drawn_with_its_wrong_answers():
    with figure(ncols=2) as (_, (left, right)):
        images = torch.arange(6.0).view(6, 1, 1).expand(6, 4, 5) / 6
        task(left, images[:2], images[2:], torch.tensor([0, 1, 1, 1]))
        assert left.images[0].get_array().shape == (8, 15)
        (letter,) = left.texts
        assert letter.get_text() == "b" and letter.get_position() == pytest.approx((10.4, 1.2))
        by_group(right, {"ProtoNet": [3, 1], "joint": [0, 2]}, ["p", "q"], "points")
        assert [t.get_text() for t in right.get_yticklabels()] == ["q", "p"]
        assert right.lines[1].get_xdata().tolist() == [2, 0]


# The page ------------------------------------------------------------------------------------


def choices():
    """What the page chooses before it meets a test drawing, and after."""
    space = run_until("images", "found")
    taken = {k: way["setting"] for k, way in space["bodies"].found["ways"].items()}
    read = {k: way["setting"] for k, way in space["found"].found["ways"].items()}
    tests = space["asked"](space["drawings"](space["test"], "test", []))["1 label"](0)
    return taken, read, tests.query.x["drawing"]


def test_the_settings_are_chosen_without_test_labels(small):
    a, b, seen = choices()
    mix_test_characters(small)
    again, same, other = choices()
    assert a == again and b == same and len(a) == 2 and len(b) == 3
    assert not torch.equal(seen, other)


def found(name: str) -> dict:
    """What the record keeps of one contender."""
    return recorded("images").details["characters"]["ways"][name]


def by_scikit(items: np.ndarray, shots: int) -> float:
    """Nearest class mean on the page's test tasks, by scikit-learn: items (C, 20, D)."""
    number = np.arange(items.shape[0] * 20).reshape(-1, 20, 1)
    data = characters("test", size=16)._replace(items=torch.from_numpy(number))
    flat, right = items.reshape(-1, items.shape[-1]), []
    stream = episodes(data, 5, shots, 5, 10, seed=1)
    for step in range(EPISODES // 10):
        draw = stream(step)
        for t in range(10):
            (support, ys), (query, yq) = (
                (part.x[t, :, 0].numpy(), part.y[t].argmax(1).numpy()) for part in draw
            )
            means = [flat[support][ys == k].mean(0) for k in range(5)]
            model = KNeighborsClassifier(1).fit(means, range(5))
            right.append(np.mean(model.predict(flat[query]) == yq))
    return float(np.mean(right))


@there
@pytest.mark.parametrize(("column", "shots"), [("1 label", 1), ("5 labels", 5)])
def test_raw_pixels_by_scikit_learn(column, shots):
    items = characters("test", size=16).items.flatten(2).double().numpy()
    runs = found("raw inputs + class means")["columns"][column]["runs"]
    assert by_scikit(items, shots) == pytest.approx(runs[0], abs=2e-3)
    assert len(runs) == 5 and np.ptp(runs) == 0, "nothing is drawn"


@there
@pytest.mark.skipif(not has_efficientnet(), reason="the ImageNet weights are not installed")
def test_class_means_on_imagenet_by_scikit_learn(tmp_path, monkeypatch):
    """Features of the layer that validation took, centred on training drawings and scaled to length one."""
    held, layer = found("class means on ImageNet"), recorded("images").details["layers"]
    assert layer["ways"]["class means on ImageNet"]["setting"] == 16
    test, train = (characters(part, size=56).items for part in ("test", "train"))
    data = characters("test", size=16)
    number = torch.arange(len(data.names) * 20).view(-1, 20, 1)
    stream = episodes(data._replace(items=number), 5, 1, 5, 10, seed=1)
    used = torch.cat([torch.cat([p.x.flatten() for p in stream(s)]) for s in range(6)]).unique()
    z = torch.zeros(len(data.names) * 20, 448)
    z[used] = pooled(test.flatten(0, 1)[used], 56, 16, cells=2)
    if held["setting"] == "centred":
        z = z - pooled(train[:, 0], 56, 16, cells=2).mean(0)
        z = z / z.norm(dim=1, keepdim=True)
    items = z.view(-1, 20, 448).double().numpy()
    assert by_scikit(items, 1) == pytest.approx(held["columns"]["1 label"]["runs"][0], abs=2e-3)


def test_the_record_holds_what_validation_chose():
    held = recorded("images")
    ways = held.details["characters"]["ways"]
    kinds = {e.method: e.kind for e in held.entries}
    for kind, name in (("meta", held.versus.ours), ("transfer", held.versus.baseline)):
        best = {
            k: max(q for q in w["tuning"].values() if q is not None)
            for k, w in ways.items()
            if kinds[k] == kind
        }
        assert name == max(best, key=best.__getitem__)
    assert held.versus.n >= 5 and held.versus.unit in ("seeds", "alphabets")
