"""Any data: classes of unequal sizes, nests, bytes, sessions, folders, torch's data sets, tables; splits that never meet."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine import printed
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from mtlib.bilevel import bilevel
from mtlib.core import Batch, move, over, parameters, take
from mtlib.data.own import from_dataset, image_folder, rows, split_rows
from mtlib.evaluate import evaluate, over_classes
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import two_halves
from mtlib.tasks import ClassSet, Rows, check_classes, episodes, mixture, pool, quiz, some_tasks
from mtlib.train import fit


def leaves(nest):
    found = []
    over(lambda d: found.append(d) or d, nest)
    return found


def same(a, b):
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def numbered(sizes, dtype=torch.float32):
    """Item i of class c is the pair (c, i)."""
    items = [torch.tensor([[c, i] for i in range(n)]).to(dtype) for c, n in enumerate(sizes)]
    return ClassSet(items, [f"class {c}" for c in range(len(sizes))], "numbered")


def rectangle(classes, items, *shape, dtype=torch.float32):
    n = classes * items * math.prod(shape)
    values = (torch.arange(n) * 7919 % 251).view(classes, items, *shape).to(dtype)
    return ClassSet(values, [f"c{i}" for i in range(classes)], "numbers")


# Draws of a rectangle ----------------------------------------------------------------------------


def digest(draw):
    h = hashlib.blake2b(digest_size=8)
    for d in leaves(draw):
        h.update(str((d.dtype, tuple(d.shape))).encode())
        h.update(d.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@pytest.mark.parametrize(
    ("arguments", "shape", "dtype", "digests"),
    [
        ((5, 1, 3, 4, 0), (20, 15, 8), torch.float32, ["a64f95a54bcc5ce7", "c5157c3d69d0589c"]),
        ((5, 1, 3, 4, 0), (20, 15, 8), torch.uint8, ["c1fb46459faee3d1", "7227881054759c3b"]),
        ((5, 1, 3, 4, 0), (20, 15, 8), torch.int64, ["243d4f533e94e112", "580a4b55f0cd127d"]),
        ((3, 2, 2, 2, 7), (4, 4, 2, 3), torch.float64, ["f3ae69fcb39501f6", "56f8c6e1a24c959f"]),
        ((1, 1, 1, 1, 1), (2, 3, 1), torch.float32, ["f65cb4d94a8540aa", "53324d5f5821bd78"]),
    ],
)
def test_a_rectangle_is_drawn_as_ever(arguments, shape, dtype, digests):
    """Digests of the draws before lists came; a list of as many items in each class is drawn like it."""
    data = rectangle(*shape, dtype=dtype)
    for items in (data.items, list(data.items), tuple(data.items)):
        stream = episodes(data._replace(items=items), *arguments)
        assert [digest(stream(i)) for i in (0, 17)] == digests


def test_a_mixture_is_drawn_as_ever():
    a, b = rectangle(5, 6, 3), rectangle(3, 4, 3)
    stream = mixture(pool(a), pool(b), batch=9, seed=3)
    assert [digest(stream(0)), digest(stream(5))] == ["429fe6cdd5797552", "76ce00940fb273b9"]
    assert digest(pool(a)) == "8a5f612295334ceb"
    assert [digest(mixture(a, b, batch=9, seed=3)(i)) for i in (0, 5)] == [
        digest(stream(i)) for i in (0, 5)
    ]


# Unequal classes ---------------------------------------------------------------------------------


@st.composite
def unequal(draw):
    """Sizes of classes and a task that all of them are large enough for."""
    shots, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(shots + queries, 12), min_size=1, max_size=6))
    return sizes, draw(st.integers(1, len(sizes))), shots, queries, draw(st.integers(1, 3))


@given(unequal(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_tasks_of_unequal_classes(made, seed, step):
    """No item twice in a task, support and query apart, one class for each label, every task of its own right."""
    sizes, ways, shots, queries, tasks = made
    stream = episodes(numbered(sizes), ways, shots, queries, tasks, seed)
    draw = stream(step)
    assert same(draw, stream(step)) and draw.support.x.shape == (tasks, ways * shots, 2)
    for t in range(tasks):
        assert same(stream.part(step, slice(t, t + 1)), take(draw, slice(t, t + 1)))
        support, query = take(draw, t)
        items = [tuple(r) for r in torch.cat([support.x, query.x]).tolist()]
        assert len(set(items)) == ways * (shots + queries)
        assert all(i < sizes[int(c)] for c, i in items)
        a, b = support.x[:, 0].view(ways, shots), query.x[:, 0].view(ways, queries)
        assert (
            (a == a[:, :1]).all() and (b == a[:, :1]).all() and len(set(a[:, 0].tolist())) == ways
        )
        assert torch.equal(support.y, torch.eye(ways).repeat_interleave(shots, 0))


def test_every_item_of_a_class_is_drawn_equally_often():
    """χ² of the counts of items, given their class, and of classes: within five deviations."""
    sizes = [4, 7, 13, 30]
    draw = episodes(numbered(sizes), 2, 1, 3, tasks=6000, seed=1)(0)
    drawn = torch.cat([draw.support.x, draw.query.x], 1).flatten(0, 1).long()
    classes = drawn[:, 0].bincount(minlength=4).double()
    assert ((classes - classes.mean()) ** 2 / classes.mean()).sum() < 3 * 8 + 5 * 8 * math.sqrt(6)
    for c, n in enumerate(sizes):
        counts = drawn[drawn[:, 0] == c, 1].bincount(minlength=n).double()
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert (counts > 0).all() and chi2 < (n - 1) + 5 * math.sqrt(2 * (n - 1))


def test_small_classes_are_named_or_left_out():
    data = numbered([3, 8, 4, 9, 2])
    with pytest.raises(
        ValueError,
        match=r"got 2 \+ 3 = 5\. 3 of 5 .* 'class 0' has 3, 'class 2' has 4, 'class 4' has 2",
    ):
        episodes(data, 2, 2, 3, 2, 0)
    draw = episodes(data, 2, 2, 3, 2, 0, small="leave out")(0)
    assert set(draw.support.x[..., 0].flatten().tolist()) == {1.0, 3.0}
    with pytest.raises(ValueError, match=r"at most 2 ways.* with enough items"):
        episodes(data, 3, 2, 3, 2, 0, small="leave out")


def test_everything_reads_a_list():
    data = numbered([3, 8, 4])
    assert check_classes(data) == [3, 8, 4]
    x, y = pool(data)
    assert torch.equal(x[:, 0].long(), y) and y.bincount().tolist() == [3, 8, 4]
    kept = data.select([2, 0])
    assert kept.names == ["class 2", "class 0"] and [len(i) for i in kept.items] == [4, 3]
    assert data.select(torch.tensor([True, False, True])).names == ["class 0", "class 2"]
    draw = mixture(data, batch=300, seed=0)(0)
    assert torch.equal(draw.y[0].argmax(1), draw.x[0, :, 0].long())
    assert same(draw, mixture(pool(data), batch=300, seed=0)(0))
    score = over_classes(lambda some: float(sum(len(i) for i in some.items)), data)
    assert score.mean == pytest.approx(15)
    net = two_halves(nn.Linear(2, 4), nn.Linear(4, 2))
    learner = protonet(net)
    stream = episodes(data, 2, 1, 2, 2, 0)
    run = fit(bilevel(learner, cross_entropy), learner.init(), stream, 2, progress=False)
    assert evaluate(learner, run.params, stream, 4, progress=False).mean >= 0


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "at least one class"),
        ([torch.rand(3, 2), torch.rand(0, 2)], "none in class 'b' of 'two'"),
        ([torch.rand(3, 2), torch.rand(3, 4)], "one shape and dtype"),
        ([torch.rand(3, 2), torch.ones(3, 2).long()], "one shape and dtype"),
        ([torch.rand(3, 2), torch.rand(3)], r"x\[:, None\]"),
        ([torch.rand(3, 2), torch.full((3, 2), torch.nan)], "class 'b'.*NaN"),
        ([torch.rand(3, 2), np.zeros((3, 2))], "from_numpy"),
        ([torch.rand(3, 2)], "one name per class"),
        ([{"a": torch.rand(3, 2)}, {"b": torch.rand(3, 2)}], "one shape and dtype"),
        ([{"a": torch.rand(3, 2), "b": torch.rand(4)}] * 2, r"expected items \(n, \*item\)"),
        ({"a": torch.rand(2, 3, 2), "b": torch.rand(2, 4)}, "expected items of shape"),
        ("ab", "a list with one for each class"),
    ],
)
def test_lists_that_are_none_are_named(items, words):
    with pytest.raises((ValueError, TypeError), match=words):
        episodes(ClassSet(items, ["a", "b"], "two"), 2, 1, 1, 2, 0)


# Splits of classes -------------------------------------------------------------------------------


@given(st.integers(3, 60), st.integers(0, 99), st.data())
def test_classes_of_a_split_never_meet(classes, seed, data):
    a = data.draw(st.integers(1, classes - 2))
    b = data.draw(st.integers(1, classes - a - 1))
    whole = numbered([2] * classes)
    parts = whole.split(train=a, validation=b, test=classes - a - b, seed=seed)
    names = [set(p.names) for p in parts]
    assert [len(n) for n in names] == [a, b, classes - a - b] and len(set.union(*names)) == classes
    for p in parts:
        assert p.names == [f"class {int(i[0, 0])}" for i in p.items]
    again = whole.split(train=a, validation=b, test=classes - a - b, seed=seed)
    assert [p.names for p in parts] == [p.names for p in again]


def test_shares_of_classes():
    data = rectangle(10, 3, 2)
    train, test = data.split(train=0.8, test=0.2, seed=4)
    assert len(train.names) == 8 and len(test.names) == 2 and train.source == "numbers, train"
    assert all(
        torch.equal(i, data.items[int(n[1:])])
        for p in (train, test)
        for i, n in zip(p.items, p.names, strict=True)
    )
    thirds = rectangle(100, 1, 1).split(a=1 / 3, b=1 / 3, c=1 / 3)
    assert sum(len(p.names) for p in thirds) == 100
    assert data.split(train=0.8, test=0.2, seed=5)[1].names != test.names


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "got none"),
        ({"train": 8, "test": 3}, "at most 10 in all"),
        ({"train": 0.8, "test": 0.3}, "sum to at most 1"),
        ({"train": 8, "test": 0.2}, "all as shares"),
        ({"train": 8, "test": 0}, "at least one"),
        ({"train": 0.97, "test": 0.03}, "test 0"),
        ({"train": -1, "test": 3}, "at least one"),
        ({"train": True}, "numbers of classes"),
        ({"train": "all"}, "numbers of classes"),
        ({"train": float("nan")}, "finite"),
        ({"train": 3, "seed": -1}, "seed"),
    ],
)
def test_splits_that_are_none(parts, words):
    with pytest.raises(ValueError, match=words):
        rectangle(10, 3, 2).split(**parts)


# cast, integers and nests ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bytes_become_numbers_at_the_draw(dtype):
    held = rectangle(5, 4, 1, 3, dtype=torch.uint8)
    plain = episodes(held, 3, 1, 2, 2, 0)(3)
    draw = episodes(held, 3, 1, 2, 2, 0, cast=dtype)(3)
    assert torch.equal(draw.query.x, plain.query.x.to(dtype) / 255) and draw.query.y.dtype == dtype
    assert held.items.dtype == torch.uint8 and plain.query.x.dtype == torch.uint8
    assert torch.equal(
        mixture(held, batch=9, seed=0, cast=dtype)(0).x,
        mixture(held, batch=9, seed=0)(0).x.to(dtype) / 255,
    )
    white = ClassSet(torch.full((2, 2, 1), 255, dtype=torch.uint8), ["a", "b"], "white")
    assert (episodes(white, 2, 1, 1, 1, 0, cast=dtype)(0).support.x == 1).all()
    real = rectangle(5, 4, 2)
    assert torch.equal(
        episodes(real, 3, 1, 2, 2, 0, cast=dtype)(3).support.x,
        episodes(real, 3, 1, 2, 2, 0)(3).support.x.to(dtype),
    )


def test_a_cast_that_has_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="floating dtype"):
        episodes(rectangle(5, 4, 2), 3, 1, 2, 2, 0, cast=torch.uint8)
    with pytest.raises(ValueError, match="Indices such as tokens stay"):
        episodes(rectangle(5, 4, 2, dtype=torch.int64), 3, 1, 2, 2, 0, cast=torch.float32)(0)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()),
        nn.Sequential(nn.Conv2d(1, 3, 8, bias=False), nn.Flatten()),
    ],
)
def test_bytes_for_a_network_of_floats_name_the_cast(net):
    data = rectangle(5, 4, 1, 8, 8, dtype=torch.uint8)
    batches = quiz(episodes(data, 3, 1, 2, 2, 0))
    with pytest.raises(ValueError, match=r"uint8.*cast=torch\.float32"):
        fit(joint(net, cross_entropy), parameters(net), batches, 2, progress=False)
    good = quiz(episodes(data, 3, 1, 2, 2, 0, cast=torch.float32))
    assert len(fit(joint(net, cross_entropy), parameters(net), good, 2, progress=False).losses) == 2


def test_tokens_are_indices():
    data = rectangle(4, 5, 7, dtype=torch.int64)
    assert episodes(data, 2, 1, 1, 1, 0)(0).support.x.dtype == torch.int64
    draw = mixture(pool(data), batch=4, seed=0)(0)
    assert draw.x.dtype == torch.int64 and draw.y.dtype == torch.float32


def nested(sizes=None):
    """Tokens (c, i, …) and their masks; a rectangle of 4 classes of 5, or a list."""
    g = torch.Generator().manual_seed(0)

    def some(*shape):
        return {
            "tokens": torch.randint(30, (*shape, 7), generator=g),
            "mask": torch.rand(*shape, 7, generator=g) < 0.7,
            "length": torch.arange(math.prod(shape)).view(shape),
        }

    items = some(4, 5) if sizes is None else [some(n) for n in sizes]
    return ClassSet(items, list("abcdefgh")[: 4 if sizes is None else len(sizes)], "texts")


@pytest.mark.parametrize("sizes", [None, [3, 5, 4]])
def test_a_nest_is_drawn_leaf_by_leaf(sizes):
    data = nested(sizes)
    draw = episodes(data, 2, 1, 2, 3, 0)(0)
    assert {k: v.shape[:2] for k, v in draw.query.x.items()} == dict.fromkeys(draw.query.x, (3, 4))
    for k in ("tokens", "mask"):  # each leaf as if it were alone
        alone = over(lambda d: d, [d[k] for d in data.items]) if sizes else data.items[k]
        alone = [a.int() for a in alone] if sizes else alone.int()
        one = episodes(data._replace(items=alone), 2, 1, 2, 3, 0)(0)
        assert torch.equal(one.query.x, draw.query.x[k].int())
    x, y = pool(data)
    assert len(x["length"]) == len(y)
    assert same(mixture(Batch(x, y), batch=5, seed=0)(2), mixture(data, batch=5, seed=0)(2))
    assert [*data.select([1]).names] == ["b"]


def test_a_cast_leaves_indices_and_masks_of_a_nest():
    data = nested()
    images = {**data.items, "image": torch.full((4, 5, 2), 255, dtype=torch.uint8)}
    x = episodes(data._replace(items=images), 2, 1, 2, 3, 0, cast=torch.float64)(0).support.x
    assert (x["image"] == 1).all() and x["image"].dtype == torch.float64
    assert x["tokens"].dtype == torch.int64 and x["mask"].dtype == torch.bool


# Two sessions ------------------------------------------------------------------------------------


def sessions():
    """The same classes in another order, items (c, i); those of the second session are negative."""
    first = numbered([4, 6, 5])
    order = [2, 0, 1]
    items = [-1 - torch.tensor([[c, i] for i in range(3 + c)]).float() for c in order]
    return first, ClassSet(items, [f"class {c}" for c in order], "evening")


def test_queries_come_from_the_other_session():
    first, second = sessions()
    draw = episodes(first, 2, 4, 3, 200, 0, queries_from=second)(0)
    assert (draw.support.x >= 0).all() and (draw.query.x < 0).all()
    a, b = draw.support.x[:, ::4, 0], -1 - draw.query.x[:, ::3, 0]
    assert torch.equal(a, b)  # class by class
    seen = {tuple(r) for r in (-1 - draw.query.x.flatten(0, 1)).tolist()}
    assert seen == {(c, i) for c in range(3) for i in range(3 + c)}
    stream = episodes(first, 2, 4, 3, 5, 0, queries_from=second)
    assert same(stream.part(9, slice(1, 3)), take(stream(9), slice(1, 3)))


def test_sessions_that_do_not_fit_are_named():
    first, second = sessions()
    with pytest.raises(ValueError, match=r"1 of 3 are not in 'evening': \['class 0'\]"):
        episodes(first, 2, 1, 1, 2, 0, queries_from=second.select([0, 2]))
    with pytest.raises(ValueError, match="could be a support item"):
        episodes(first, 2, 1, 1, 2, 0, queries_from=first)
    with pytest.raises(ValueError, match="could be a support item"):
        episodes(first, 2, 1, 1, 2, 0, queries_from=first.select([2, 1, 0]))
    with pytest.raises(ValueError, match=r"expected queries ≤ 3.*'evening'.*'class 0' has 3"):
        episodes(first, 2, 1, 4, 2, 0, queries_from=second)
    with pytest.raises(ValueError, match=r"expected shots ≤ 4.*'class 0' has 4"):
        episodes(first, 2, 5, 1, 2, 0, queries_from=second)
    draw = episodes(first, 2, 1, 4, 9, 0, queries_from=second, small="leave out")(0)
    assert set(draw.support.x[..., 0].flatten().tolist()) == {1.0, 2.0}


def test_several_class_sets_are_one_by_their_names():
    first, second = sessions()
    draw = mixture(first, second, batch=50, seed=0)(0)
    assert torch.equal(draw.y[0].argmax(1), draw.x[0, :, 0].long())
    assert torch.equal(draw.y[1].argmax(1), -1 - draw.x[1, :, 0].long())
    with pytest.raises(TypeError, match="every one a Batch"):
        mixture(first, pool(second), batch=5, seed=0)


# Rows of one's own -------------------------------------------------------------------------------


class Squares(Rows):
    def __init__(self, first, n, wrong=False):
        self.first, self.n, self.wrong = first, n, wrong

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return (self.first + index[: len(index) - self.wrong, None].float()) ** 2


def test_rows_are_read_when_drawn():
    data = ClassSet([Squares(0, 3), Squares(10, 5)], ["a", "b"], "squares")
    held = ClassSet(
        [Squares(0, 3)[torch.arange(3)], Squares(10, 5)[torch.arange(5)]], ["a", "b"], "squares"
    )
    assert same(episodes(data, 2, 1, 2, 3, 0)(0), episodes(held, 2, 1, 2, 3, 0)(0))
    assert same(pool(data), pool(held))
    with pytest.raises(ValueError, match=r"one item for each of \d indices"):
        episodes(data._replace(items=[Squares(0, 3, True)] * 2), 2, 1, 2, 3, 0)(0)


# Parts of a draw ---------------------------------------------------------------------------------

STREAMS = {
    "episodes": lambda: episodes(rectangle(6, 5, 2), 3, 1, 2, 5, 0),
    "list": lambda: episodes(numbered([5, 4, 7]), 3, 1, 2, 5, 0),
    "mixture": lambda: mixture(*[pool(rectangle(3, 4 + i, 2)) for i in range(5)], batch=6, seed=0),
    "quiz": lambda: quiz(episodes(rectangle(6, 5, 2), 3, 1, 2, 5, 0)),
    "rows": lambda: rows(table(), "user", ["a", "b"], "y", shots=2, queries=1, tasks=5, seed=0),
    "plain": lambda: lambda step: episodes(rectangle(6, 5, 2), 3, 1, 2, 5, 0)(step),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_part_is_the_part_of_the_whole(name):
    stream = STREAMS[name]()
    for step in (0, 3):
        for part in (slice(0, 2), slice(2, 5), slice(4, 5)):
            assert same(some_tasks(stream, step, part), take(stream(step), part))


# Folders of images -------------------------------------------------------------------------------


def write(folder, sizes, side=(9, 20), seed=0):
    """Folders k00, … of so many images of random sizes, in PNG."""
    rng = np.random.default_rng(seed)
    for c, n in enumerate(sizes):
        (folder / f"k{c:02d}").mkdir(parents=True)
        for i in range(n):
            shape = (*rng.integers(*side, size=2), 3)
            image = (rng.integers(0, 60, shape) + 5 * c).astype(np.uint8)
            Image.fromarray(image).save(folder / f"k{c:02d}" / f"{i:03d}.png")
    return folder


def test_a_folder_is_a_class_set(tmp_path):
    write(tmp_path, [3, 5, 4])
    (tmp_path / "k01" / "notes.txt").write_text("seen in June")
    (tmp_path / "k01" / ".hidden.png").write_text("no image")
    (tmp_path / "k01" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "k01" / "000.png", tmp_path / "k01" / ".ipynb_checkpoints" / "copy.png")
    for channels in (1, 3):
        data = image_folder(tmp_path, (8, 6), channels)
        assert data.names == ["k00", "k01", "k02"]
        assert [tuple(i.shape) for i in data.items] == [(n, channels, 8, 6) for n in (3, 5, 4)]
        assert all(i.dtype == torch.uint8 for i in data.items) and "3 to 5" in data.source
        assert "1 other file" in data.source
        lazy = image_folder(tmp_path, (8, 6), channels, lazy=True)
        assert same(pool(lazy), pool(data))
        a, b = (episodes(d, 2, 1, 2, 3, 0, cast=torch.float32) for d in (data, lazy))
        assert same(a(4), b(4)) and same(b.part(4, slice(1, 2)), take(a(4), slice(1, 2)))


def test_the_middle_keeps_its_proportions(tmp_path):
    """A wide image, red in its middle square, blue at both sides: the square is what is kept."""
    (tmp_path / "a").mkdir()
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[..., 2], wide[:, 10:20] = 255, (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    (one,) = image_folder(tmp_path, 10).items[0]
    assert torch.equal(
        one, torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 10, 10)
    )


def test_an_image_stands_upright(tmp_path):
    """Every EXIF orientation shows the same scene."""
    (tmp_path / "a").mkdir()
    scene = np.zeros((16, 16, 3), dtype=np.uint8)
    scene[:8, :8], scene[:8, 8:], scene[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, turn in back.items():
        image = Image.fromarray(scene) if turn is None else Image.fromarray(scene).transpose(turn)
        exif = Image.Exif()
        exif[274] = orientation
        image.save(tmp_path / "a" / f"{orientation}.png", exif=exif)
    (seen,) = image_folder(tmp_path, 16).items
    assert (seen == torch.from_numpy(scene).permute(2, 0, 1)).all()


def grey(mode):
    """A 4 × 4 image of the grey value 128 (of 255) in a mode, and what it becomes."""
    if mode == "I;16":
        return Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)), 128
    if mode == "1":
        return Image.new("1", (4, 4), 1), 255
    return Image.new("L", (4, 4), 128).convert(mode), 128


@pytest.mark.parametrize(
    ("mode", "ending"),
    [(m, "png") for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [
        ("CMYK", "tif"),
        ("RGB", "bmp"),
        ("L", "jpg"),
        ("RGB", "JPEG"),
        ("P", "gif"),
        ("RGB", "webp"),
        ("I;16", "tif"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read(tmp_path, mode, ending, channels):
    (tmp_path / "a").mkdir()
    image, value = grey(mode)
    image.save(tmp_path / "a" / f"one.{ending}")
    (seen,) = image_folder(tmp_path, 2, channels).items
    assert (seen.int() - value).abs().max() <= 2, seen


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    (tmp_path / "a").mkdir()
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.save(tmp_path / "a" / "one.png", transparency=0)
    else:
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).convert("LA" if mode == "LA" else "RGBA").save(
            tmp_path / "a" / "one.png"
        )
    assert (image_folder(tmp_path, 2).items[0] == 255).all()


def test_broken_files_are_named(tmp_path):
    write(tmp_path, [3, 3])
    (tmp_path / "k00" / "empty.png").write_bytes(b"")
    whole = (tmp_path / "k01" / "000.png").read_bytes()
    (tmp_path / "k01" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "k01" / "text.jpg").write_text("no image at all")
    with pytest.raises(
        ValueError, match=r"3 of 9 files are not: .*empty\.png.*cut\.png.*text\.jpg"
    ):
        image_folder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"2 of 9 files are not: .*empty\.png.*text\.jpg"):
        image_folder(tmp_path, 8, lazy=True)
    (tmp_path / "k00" / "empty.png").unlink()
    (tmp_path / "k01" / "text.jpg").unlink()
    lazy = image_folder(tmp_path, 8, lazy=True)
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        pool(lazy)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(
        tmp_path / "k01" / "cut.png".replace("png", "tiff")
    )
    with pytest.raises(ValueError, match=r"2 of 8 .*mode F"):
        image_folder(tmp_path, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: image_folder(p / "nowhere", 8), "folder for each class"),
        (lambda p: image_folder(p / "k00", 8), "found none"),
        (lambda p: image_folder(3, 8), "path of a folder"),
        (lambda p: image_folder(p, 0), "height"),
        (lambda p: image_folder(p, (8, 8, 3)), r"\(height, width\)"),
        (lambda p: image_folder(p, "8"), "height"),
        (lambda p: image_folder(p, 8, 2), "1 channel"),
        (lambda p: (p / "none").mkdir() or image_folder(p, 8), r"none in \['none'\]"),
    ],
)
def test_folders_that_are_none(tmp_path, call, words):
    write(tmp_path, [2])
    with pytest.raises((ValueError, TypeError), match=words):
        call(tmp_path)


# torch's data sets -------------------------------------------------------------------------------


class Counted(Dataset):
    """Item i is (i, label i % 3), and counts how often it is loaded."""

    def __init__(self, n=12, known=True, shift=0):
        self.n, self.shift, self.loads = n, shift, Counter()
        if known:
            self.targets = torch.arange(n) % 3

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.loads[int(i)] += 1
        return torch.tensor([float(i)]), (int(i) + self.shift) % 3


def test_items_of_a_data_set_are_loaded_when_drawn():
    dataset = Counted()
    dataset.classes = ["red", "green", "blue"]
    data = from_dataset(dataset)
    stream = episodes(data, 2, 1, 2, 5, 0)
    assert not dataset.loads and data.names == ["red", "green", "blue"]
    assert check_classes(data) == [4, 4, 4] and "12 items" in data.source
    draw = stream(0)
    assert sum(dataset.loads.values()) == 5 * 2 * 3
    held = data._replace(items=[torch.arange(float(c), 12, 3)[:, None] for c in range(3)])
    assert same(draw, episodes(held, 2, 1, 2, 5, 0)(0))
    dataset.loads.clear()
    stream.part(0, slice(0, 1))
    assert sum(dataset.loads.values()) == 2 * 3
    assert {d.device.type for d in leaves(draw)} == {"cpu"}


def test_labels_are_found_or_read_in_one_pass():
    dataset = Counted(known=False)
    assert from_dataset(dataset).names == ["0", "1", "2"] and set(dataset.loads.values()) == {1}
    for labels in ([i % 3 for i in range(12)], torch.arange(12) % 3, np.arange(12) % 3):
        dataset.loads.clear()
        assert check_classes(from_dataset(dataset, labels)) == [4, 4, 4] and not dataset.loads
    words = from_dataset(dataset, [("even", "odd")[i % 2] for i in range(12)])
    assert words.names == ["even", "odd"] and pool(words).x[:6, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_labels_are_found_through_subsets():
    whole = Counted()
    some = ConcatDataset([Subset(whole, [1, 2, 4]), Subset(Subset(whole, [3, 6, 7, 8]), [1, 3])])
    data = from_dataset(some)
    assert data.names == ["0", "1", "2"] and not whole.loads
    assert [i[torch.arange(len(i))][:, 0].tolist() for i in data.items] == [[6], [1, 4], [2, 8]]


def test_items_may_be_dicts_tensors_and_arrays():
    texts = [
        {"ids": [i, i + 1], "mask": np.array([True, False]), "label": "ab"[i % 2]} for i in range(6)
    ]
    data = from_dataset(texts)
    draw = episodes(data, 2, 1, 2, 1, 0)(0)
    assert data.names == ["a", "b"] and set(draw.support.x) == {"ids", "mask"}
    assert draw.support.x["ids"].dtype == torch.int64
    parity = draw.support.x["ids"][0, :, 0] % 2
    assert torch.equal(draw.query.x["ids"][0, :, 0] % 2, parity.repeat_interleave(2))
    named = from_dataset([{"v": torch.ones(2), "kind": i % 2} for i in range(4)], labels="kind")
    assert set(pool(named).x) == {"v"}
    bare = from_dataset([torch.ones(2) * i for i in range(4)], labels=[0, 0, 1, 1])
    assert pool(bare).x[:, 0].tolist() == [0, 1, 2, 3]
    arrays = from_dataset(TensorDataset(torch.rand(6, 2), torch.arange(6) % 2))
    assert check_classes(arrays) == [3, 3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: from_dataset(Counted(shift=1)), "item itself says"),
        (lambda: from_dataset([torch.ones(2)] * 4), "item 0 has none"),
        (lambda: from_dataset([(torch.ones(2), torch.ones(3))] * 4), "shape"),
        (lambda: from_dataset([(torch.ones(2), 0.5)] * 4), "whole number or a word"),
        (lambda: from_dataset([(torch.ones(2), None)] * 4), "has none"),
        (lambda: from_dataset(Counted(), [0, 1]), "each of 12 items, got 2"),
        (lambda: from_dataset(Counted(), [0, "a"] * 6), "all numbers or all words"),
        (lambda: from_dataset(Counted(), [-1, 0, 1] * 4), "got 4 of -1"),
        (lambda: from_dataset(Counted(), 3), "labels in a list"),
        (
            lambda: from_dataset(Counted(), "kind"),
            "items that are dicts",
        ),
        (lambda: from_dataset([(torch.ones(2), torch.ones(2), 1)] * 4), "3 parts"),
        (lambda: from_dataset([({"x": "text"}, i % 2) for i in range(4)]), "transform"),
        (lambda: from_dataset([(Image.new("L", (2, 2)), i % 2) for i in range(4)]), "got Image"),
        (lambda: from_dataset([(torch.ones(2 + i), i % 2) for i in range(4)]), "one shape"),
        (
            lambda: from_dataset([(torch.full((2,), torch.nan), i % 2) for i in range(4)]),
            "item 0.*NaN|NaN.*item 0|finite",
        ),
        (lambda: from_dataset([(torch.ones(()), i % 2) for i in range(4)]), "with an axis"),
        (lambda: from_dataset([{"label": 0}, {"label": 1}] * 2), "more than a label"),
        (lambda: from_dataset([]), "at least one item"),
        (lambda: from_dataset(torch.ones(4, 2)), "map-style"),
        (lambda: from_dataset({"a": 1}), "map-style"),
        (lambda: from_dataset(torch.utils.data.DataLoader(Counted())), r"\.dataset"),
    ],
)
def test_data_sets_that_do_not_fit_are_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        episodes(make(), 2, 1, 1, 2, 0)(0)


def test_random_transforms_are_refused():
    class Random(Counted):
        def __getitem__(self, i):
            return torch.rand(2), i % 3

    net = two_halves(nn.Linear(2, 3), nn.Linear(3, 2))
    learner = protonet(net)
    with pytest.raises(ValueError, match="pure stream"):
        fit(
            bilevel(learner, cross_entropy),
            learner.init(),
            episodes(from_dataset(Random()), 2, 1, 1, 2, 0),
            2,
            progress=False,
        )


# Tables ------------------------------------------------------------------------------------------


def table(groups=6, seed=0):
    """Group g has 3 + 2g rows; y = 10 g + a."""
    user = np.repeat(np.arange(groups), 3 + 2 * np.arange(groups))
    user = np.random.default_rng(seed).permutation(user)
    a = np.arange(len(user)) / 7
    return {
        "user": user,
        "a": a,
        "b": user.astype(np.float32),
        "y": 10 * user + a,
        "kind": np.where(a > 3, "hot", "cold"),
    }


def structured(columns):
    made = np.zeros(len(columns["user"]), dtype=[(k, v.dtype) for k, v in columns.items()])
    for k, v in columns.items():
        made[k] = v
    return made


class Frame:
    """What a DataFrame has: `columns`, and columns that turn into arrays."""

    def __init__(self, columns):
        self._columns, self.columns = columns, list(columns)

    def __getitem__(self, name):
        return memoryview_of(self._columns[name])


def memoryview_of(column):
    class Series:
        def __array__(self, dtype=None, copy=None):
            return np.asarray(column, dtype=dtype)

    return Series()


@pytest.mark.parametrize("form", [dict, structured, Frame])
def test_a_task_for_each_user(form):
    columns = table()
    stream = rows(
        form(columns), by="user", x=["a", "b"], y="y", shots=2, queries=1, tasks=4, seed=0
    )
    assert stream.names == list(range(6))
    draw = stream(3)
    assert draw.support.x.shape == (4, 2, 2) and draw.query.y.shape == (4, 1, 1)
    assert draw.support.x.dtype == torch.float32
    both = [torch.cat(p, 1) for p in zip(*draw, strict=True)]
    users = both[0][..., 1]
    assert (users == users[:, :1]).all() and len(set(users[:, 0].tolist())) == 4
    assert torch.allclose(both[1], 10 * users[..., None] + both[0][..., :1])
    assert all(len(set(t.tolist())) == 3 for t in both[0][..., 0])  # no row twice
    assert same(draw, stream(3)) and not same(draw, stream(4))
    assert rows(columns, "user", "a", ["y", "b"], shots=2, queries=1, tasks=1, seed=0)(
        0
    ).query.y.shape == (1, 1, 2)


def test_users_and_their_rows_are_equally_likely():
    stream = rows(table(), "user", ["a", "b"], "y", shots=2, queries=1, tasks=3, seed=0)
    drawn = torch.cat(
        [torch.cat([d.support.x, d.query.x], 1).flatten(0, 1) for d in map(stream, range(3000))]
    )
    users = drawn[:, 1].long().bincount().double()
    assert ((users - users.mean()) ** 2 / users.mean()).sum() < 3 * (5 + 5 * math.sqrt(10))
    counts = Counter(drawn[drawn[:, 1] == 5][:, 0].tolist())
    mean = sum(counts.values()) / 13
    assert len(counts) == 13 and sum(
        (n - mean) ** 2 / mean for n in counts.values()
    ) < 12 + 5 * math.sqrt(24)


def test_classes_of_a_table_are_in_the_order_given():
    for classes in (["cold", "hot"], np.array(["hot", "cold"])):
        draw = rows(
            table(), "user", ["a"], "kind", shots=2, queries=1, tasks=4, seed=0, classes=classes
        )(0)
        expected = (draw.support.x[..., 0] > 3).long() == (0 if next(iter(classes)) == "hot" else 1)
        assert torch.equal(draw.support.y.argmax(-1), expected.long()) and draw.support.y.shape == (
            4,
            2,
            2,
        )
    wide = rows(
        table(),
        "user",
        ["a"],
        "kind",
        shots=2,
        queries=1,
        tasks=4,
        seed=0,
        classes=["cold", "warm", "hot"],
    )
    assert wide(0).query.y.shape == (4, 1, 3)


@given(st.integers(2, 12), st.integers(0, 99), st.data())
def test_groups_of_a_split_never_meet(groups, seed, data):
    n = data.draw(st.integers(1, groups - 1))
    whole = table(groups)
    train, test = split_rows(whole, "user", train=n, test=groups - n, seed=seed)
    a, b = set(train["user"].tolist()), set(test["user"].tolist())
    assert len(a) == n and a | b == set(range(groups)) and not a & b
    assert len(train["a"]) + len(test["a"]) == len(whole["a"])
    for part in (train, test):
        assert np.array_equal(part["y"], 10 * part["user"] + part["a"])


def test_a_split_of_a_table_takes_shares_and_forms():
    for form in (dict, structured, Frame):
        train, test = split_rows(form(table(10)), by="user", train=0.8, test=0.2)
        assert len(set(train["user"])) == 8 and len(set(test["user"])) == 2
        rows(test, "user", ["a"], "y", shots=1, queries=1, tasks=2, seed=0)(0)


def test_small_groups_are_named_or_left_out():
    with pytest.raises(ValueError, match="2 of 6 have fewer: 0 has 3, 1 has 5"):
        rows(table(), "user", ["a"], "y", shots=3, queries=3, tasks=2, seed=0)
    stream = rows(
        table(), "user", ["a"], "y", shots=3, queries=3, tasks=2, seed=0, small="leave out"
    )
    assert stream.names == [2, 3, 4, 5]
    hole = {**table(), "a": np.where(table()["user"] == 0, np.nan, table()["a"])}
    rows(hole, "user", ["a"], "y", shots=3, queries=3, tasks=2, seed=0, small="leave out")


class NA:
    def __eq__(self, other):
        return self

    __ne__ = __eq__
    __hash__ = None

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def with_column(name, column):
    return {**table(), name: column}


def put(name, value, dtype=object):
    column = table()[name].astype(dtype)
    column[7] = value
    return with_column(name, column)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: put("a", np.nan, float), "'a'; 1 are missing or infinite, the first in row 7"),
        (lambda: put("a", np.inf, float), "'a'; 1 are missing"),
        (lambda: put("a", None), "'a'; 1 are missing"),
        (lambda: put("a", NA()), "'a'; 1 are missing"),
        (lambda: with_column("a", np.ma.masked_greater(table()["a"], 3)), "'a'; .* are missing"),
        (lambda: put("a", "3.5"), "numbers in the column 'a', got object such as '3.5'"),
        (lambda: with_column("a", table()["kind"]), "numbers in the column 'a'"),
        (
            lambda: with_column("a", table()["a"].astype("datetime64[s]")),
            "numbers in the column 'a'",
        ),
        (lambda: with_column("a", table()["a"] + 1j), "numbers in the column 'a'"),
        (lambda: put("user", None), "'user'; 1 are missing"),
        (lambda: put("user", np.nan, float), "'user'; 1 are missing"),
        (lambda: put("y", np.nan, float), "'y'; 1 are missing"),
        (lambda: with_column("y", table()["kind"]), "classes="),
        (lambda: with_column("y", table()["a"] > 3), "classes="),
        (lambda: with_column("a", table()["a"][:-1]), "one length"),
        (lambda: with_column("a", np.zeros((48, 2, 2))), r"\(n, d\)"),
        (lambda: {k: v[:0] for k, v in table().items()}, "rows"),
        (lambda: {"user": table()["user"]}, r"expected columns \['a', 'y'\]"),
        (lambda: [1, 2], "expected a table"),
        (lambda: np.zeros((3, 2)), "expected a table"),
        (lambda: put("a", 1e39, float), "finite numbers in the column 'a'"),
    ],
)
def test_tables_that_do_not_fit_are_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        rows(make(), "user", ["a"], "y", shots=2, queries=1, tasks=2, seed=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": ["a", "y"]}, "other columns y"),
        ({"x": []}, "other columns y"),
        ({"tasks": 7}, "at most 6 tasks"),
        ({"shots": 0}, "shots"),
        ({"small": "drop"}, "small"),
        ({"dtype": torch.int64}, "floating dtype"),
        ({"y": "kind", "classes": ["hot"]}, "at least two classes"),
        ({"y": "kind", "classes": ["hot", "warm"]}, "has \\['cold'\\], too"),
        ({"y": "kind", "classes": "hot"}, "list of values"),
        ({"y": ["kind", "b"], "classes": ["hot", "cold"]}, "one column y"),
    ],
)
def test_settings_of_a_table_that_do_not_fit(change, words):
    settings = {
        "by": "user",
        "x": ["a"],
        "y": "y",
        "shots": 2,
        "queries": 1,
        "tasks": 2,
        "seed": 0,
        **change,
    }
    with pytest.raises((ValueError, TypeError), match=words):
        rows(table(), **settings)


def test_a_machine_learns_its_own_line():
    """y = slope of the machine · x: MAML meets new machines better than the start does."""
    rng = np.random.default_rng(0)
    machine = np.repeat(np.arange(40), 20)
    x = rng.normal(size=800)
    data = {"machine": machine, "x": x, "y": (1 + machine % 5) * x}
    train, test = split_rows(data, "machine", train=0.75, test=0.25)
    draws = [
        rows(t, "machine", ["x"], "y", shots=5, queries=10, tasks=10, seed=0) for t in (train, test)
    ]
    learner = maml(two_halves(nn.Linear(1, 1), nn.Identity()), mse_loss, 0.2, 3)
    run = fit(
        bilevel(learner, mse_loss),
        learner.init(),
        draws[0],
        60,
        partial(torch.optim.Adam, lr=0.05),
        progress=False,
    )
    scores = [
        evaluate(
            learner, phi, draws[1], 20, lambda p, y: -((p - y) ** 2).mean(), progress=False
        ).mean
        for phi in (learner.init(), run.params)
    ]
    assert scores[1] > scores[0]


# The device --------------------------------------------------------------------------------------


def test_a_draw_is_where_the_items_are():
    meta = ClassSet([torch.ones(3, 2, device="meta")], ["a"], "elsewhere")
    assert move(meta.items, "meta")[0].device.type == "meta"
    data = numbered([3, 4])
    for draw in (episodes(data, 2, 1, 1, 2, 0)(0), mixture(data, batch=2, seed=0)(0)):
        assert {d.device.type for d in leaves(draw)} == {"cpu"}


# A program of a user's ---------------------------------------------------------------------------

PROGRAM = """
from torch.nn.functional import cross_entropy
from mtlib.bilevel import bilevel
from mtlib.data.own import image_folder
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.tasks import episodes
from mtlib.train import fit
import torch
parts = image_folder("photographs", size=16).split(train=0.6, test=0.4, seed=0)
train, test = (episodes(p, 5, 1, 5, tasks=4, seed=0, cast=torch.float32) for p in parts)
for name, learner in {"ProtoNet": protonet(conv4(5, 3, width=8, size=16)), "MAML": maml(conv4(5, 3, width=8, size=16), cross_entropy, 0.1, 2)}.items():
    run = fit(bilevel(learner, cross_entropy), learner.init(), train, STEPS)
    print(name, evaluate(learner, run.params, test, EPISODES))
"""


def test_photographs_in_folders(tmp_path):
    """30 classes of 7 to 40 images: ProtoNet and MAML on new classes, in fewer than 15 lines."""
    sizes = np.random.default_rng(0).integers(7, 41, size=30)
    sizes[:2] = 7, 40
    write(tmp_path / "photographs", sizes.tolist())
    own = [line for line in PROGRAM.strip().splitlines() if not line.startswith(("from", "import"))]
    assert len(own) + 2 < 15
    said = printed(
        "-W", "error", "-c", PROGRAM.replace("STEPS", "10").replace("EPISODES", "20"), cwd=tmp_path
    )
    found = re.findall(r"^(ProtoNet|MAML) (\d\.\d+) ± (\d\.\d+)$", said, re.MULTILINE)
    assert [name for name, *_ in found] == ["ProtoNet", "MAML"]
    assert all(0 < float(mean) <= 1 for _, mean, _ in found)


def test_every_image_is_drawn(tmp_path):
    """Within 2,000 tasks each of about 700 items: an item is missed with probability (1 − 5/30 · 6/40)²⁰⁰⁰ < 1e-21."""
    sizes = np.random.default_rng(0).integers(7, 41, size=30).tolist()
    seen = set()
    stream = episodes(numbered(sizes), 5, 1, 5, tasks=100, seed=0)
    for step in range(20):
        draw = stream(step)
        seen |= {tuple(r) for p in draw for r in p.x.flatten(0, 1).tolist()}
    assert len(seen) == sum(sizes)


def test_nothing_warns_about_palettes(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("P", (4, 4), 0).save(tmp_path / "a" / "one.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_folder(tmp_path, 2)
