"""Laws that hold for every input of a kind: streams, parts of an axis, archives, nests of tensors."""

from __future__ import annotations

import io
import ntpath
import posixpath
import zipfile
from itertools import count

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mtlib.core import Batch, Episode, move, over, take
from mtlib.data.download import members
from mtlib.run import processes
from mtlib.run.replay import replay
from mtlib.tasks import ClassSet, episodes

# Episodes ------------------------------------------------------------------------------------


@st.composite
def streams(draw):
    """(ways, shots, queries, tasks, and the stream), of items (c, i): class c, item i."""
    classes, items = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    ways, shots = draw(st.integers(1, classes)), draw(st.integers(1, items - 1))
    queries, tasks = draw(st.integers(1, items - shots)), draw(st.integers(1, 3))
    pairs = torch.cartesian_prod(torch.arange(classes), torch.arange(items)).float()
    names = [str(c) for c in range(classes)]
    data = ClassSet(pairs.view(classes, items, 2), names, "numbered")
    seed = draw(st.integers(0, 2**32))
    return ways, shots, queries, tasks, episodes(data, ways, shots, queries, tasks, seed)


@given(streams(), st.integers(0, 2**32))
def test_an_episode_has_distinct_items_sorted_labels_and_is_drawn_again(made, step):
    ways, shots, queries, tasks, stream = made
    draw = stream(step)
    stream(step + 1)
    for part, again, k in zip(draw, stream(step), (shots, queries), strict=True):
        assert torch.equal(part.x, again.x) and torch.equal(part.y, again.y)
        labels = torch.eye(ways).repeat_interleave(k, 0)
        assert torch.equal(part.y, labels.expand(tasks, -1, -1))
    for task in range(tasks):
        support, query = take(draw, task)
        rows = [tuple(row) for row in torch.cat([support.x, query.x]).tolist()]
        assert len(set(rows)) == ways * (shots + queries), "an item twice"
        classes = [
            c.unique()
            for x, k in ((support.x, shots), (query.x, queries))
            for c in x[:, 0].split(k)
        ]
        assert all(len(c) == 1 for c in classes), "two classes under one label"
        named = torch.cat(classes).tolist()
        assert len(set(named[:ways])) == ways and named[:ways] == named[ways:]


# Parts of an axis ----------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 40))
def test_the_parts_of_an_axis_are_even_and_leave_nothing_out(tasks, size):
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "size", lambda: size)
        for rank in range(size):
            patch.setattr(processes, "rank", lambda rank=rank: rank)
            parts.append(range(tasks)[processes.part(tasks)])
    assert [t for part in parts for t in part] == list(range(tasks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Archives ------------------------------------------------------------------------------------

PIECES = st.sampled_from(["..", ".", "", "a", "b.txt", "...", "C:", "~", "/", "\\", "a\\..", " "])
NAMES = st.lists(PIECES, min_size=1, max_size=5).map("/".join).filter(bool)


def archive(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            info = zipfile.ZipInfo()
            info.filename = name  # as it stands, however odd
            made.writestr(info, "content")
    return file


@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
@example(["a/../../b"])
@example(["a", "C:b"])
def test_no_member_leaves_its_folder_on_any_system(names):
    try:
        found = [m.filename for m in members(archive(names))]
    except ValueError as error:
        assert "outside its folder" in str(error)
        assert any(
            name[0] == "/" or {"..", ":", "\\"} & {*name, *name.split("/")} for name in names
        )
        return
    assert found == sorted(n for n in names if not n.endswith("/"))
    for name in found:
        for system, folder in ((posixpath, "/folder"), (ntpath, "X:\\folder")):
            end = system.normpath(system.join(folder, name))
            assert system.commonpath([folder, end]) == folder


# Nests of tensors ----------------------------------------------------------------------------

TENSORS = st.builds(
    lambda rows, seed: torch.randn(
        3, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ),
    st.integers(0, 3),
    st.integers(0, 9),
)
DRAWS = st.recursive(
    TENSORS,
    lambda inner: st.builds(Batch, inner, inner) | st.builds(Episode, inner, inner),
    max_leaves=6,
)


def leaves(nest):
    if isinstance(nest, dict):
        return [leaf for v in nest.values() for leaf in leaves(v)]
    return [leaf for v in nest for leaf in leaves(v)] if isinstance(nest, tuple) else [nest]


def form(nest):
    """The nest with each tensor's shape in its place."""
    if isinstance(nest, dict):
        return {k: form(v) for k, v in nest.items()}
    if isinstance(nest, tuple):
        return type(nest), [form(v) for v in nest]
    return tuple(nest.shape) if isinstance(nest, Tensor) else nest


def equal(a, b):
    return form(a) == form(b) and all(
        torch.equal(x, y)
        for x, y in zip(leaves(a), leaves(b), strict=True)
        if isinstance(x, Tensor)
    )


@given(DRAWS)
def test_a_draw_is_taken_apart_and_keeps_its_form(data):
    seen = []
    assert equal(over(lambda d: seen.append(d) or d, data), data)
    assert all(a is b for a, b in zip(seen, leaves(data), strict=True))
    assert equal(move(data, "cpu"), data)
    for t in range(3):
        assert equal(take(data, t), over(lambda d, t=t: d[t], data))
        assert equal(take(take(data, slice(t, t + 1)), 0), take(data, t))


NESTS = st.recursive(
    TENSORS | st.integers(),
    lambda inner: (
        st.tuples(inner, inner) | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
    ),
    max_leaves=6,
)


def squared(nest, places=None):
    """Each tensor's square times its place, 1, 2, ..., and the nest's form; what is no tensor stays."""
    places = places or count(1)
    if isinstance(nest, dict):
        return {k: squared(v, places) for k, v in nest.items()}
    if isinstance(nest, tuple):
        return tuple(squared(v, places) for v in nest)
    return next(places) * nest**2 if isinstance(nest, Tensor) else nest


@given(NESTS)
def test_a_replayed_function_keeps_the_nest_its_values_and_its_gradient(nest):
    inputs = [v.requires_grad_() for v in leaves(nest) if isinstance(v, Tensor)]
    plain, again = squared(nest), replay(squared, nest)
    assert equal(plain, again)
    if inputs:
        a, b = (
            torch.autograd.grad(sum(v.sum() for v in leaves(out) if isinstance(v, Tensor)), inputs)
            for out in (plain, again)
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
