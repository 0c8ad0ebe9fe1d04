"""Omniglot, read from the real files where they are, and its stand-in."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from mtlib import download
from mtlib.core import Batch
from mtlib.data import omniglot as module
from mtlib.data.characters import characters
from mtlib.data.glyphs import glyphs
from mtlib.data.omniglot import CONTENT, IMAGES, content_digest, omniglot
from mtlib.download import Altered, Unreachable, fetch
from mtlib.learners.metric import class_means, squared_distances
from mtlib.tasks import episodes

FOLDER = os.environ.get("MTLIB_DATA", "")
real = pytest.mark.skipif(
    not os.path.isdir(os.path.join(FOLDER, "omniglot")), reason="MTLIB_DATA names no folder with omniglot"
)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A machine with no data and no network."""
    monkeypatch.delenv("MTLIB_DATA", raising=False)
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    for place in (download, module):
        monkeypatch.setattr(place, "cache", lambda: tmp_path)
    return tmp_path


SIZES = {
    ("lake", "background"): 964,
    ("lake", "train"): 787,
    ("lake", "val"): 177,
    ("lake", "test"): 659,
    ("vinyals", "train"): 1028,
    ("vinyals", "val"): 172,
    ("vinyals", "test"): 423,
}


@real
@pytest.mark.parametrize(("split", "part"), SIZES)
def test_counts_shapes_and_ink(split, part):
    data = omniglot(split, part)
    assert data.items.shape == (SIZES[split, part], 20, 1, 28, 28) and len(set(data.names)) == len(data.names)
    assert data.items.dtype == torch.float32 and data.items.min() == 0 and 0.9 < data.items.max() <= 1
    assert 0.05 < data.items.mean() < 0.1 and data.source.endswith("(real)")


@real
def test_the_content_is_the_official_one():
    for half, remote in IMAGES.items():
        assert content_digest(fetch(remote)) == CONTENT[half]


@real
@pytest.mark.parametrize("split", ["lake", "vinyals"])
def test_the_parts_share_no_character(split):
    parts = [set(omniglot(split, p).names) for p in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    if split == "lake":
        background = set(omniglot("lake", "background").names)
        assert parts[0] | parts[1] == background
        alphabets = [{n.split("/")[0] for n in p} for p in parts]
        assert not alphabets[0] & alphabets[1] and not (alphabets[0] | alphabets[1]) & alphabets[2]
        assert len(alphabets[0] | alphabets[1]) == 30 and len(alphabets[2]) == 20


@real
def test_the_two_splits_mix_so_a_checkpoint_must_not_cross():
    assert set(omniglot("vinyals", "train").names) & set(omniglot("lake", "test").names)


@real
def test_rotations_are_turned_copies():
    data, turned = omniglot("vinyals", "val"), omniglot("vinyals", "val", rotations=True)
    assert len(turned.names) == 4 * 172 and turned.names[5] == data.names[1] + "/rot090"
    assert torch.equal(turned.items[4], data.items[1])
    assert torch.equal(turned.items[5], torch.rot90(data.items[1], 1, (-2, -1)))
    lines = fetch(module.SPLITS["val"]).read_text().split()
    assert set(lines) == set(turned.names)


@real
def test_size_is_the_readers_choice():
    assert omniglot("lake", "val", size=20).items.shape[-1] == 20


@real
def test_a_truncated_archive_is_refused_and_never_replaced_by_the_stand_in(tmp_path, monkeypatch):
    shutil.copytree(os.path.join(FOLDER, "omniglot"), tmp_path / "omniglot")
    for path in (tmp_path / "omniglot").glob("images_background*"):
        path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    with pytest.raises(Altered):
        characters("train")


@real
def test_a_damaged_decoded_copy_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache", lambda: tmp_path)
    before = omniglot("lake", "val", size=14).items
    (kept,) = (tmp_path / "omniglot").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert torch.equal(omniglot("lake", "val", size=14).items, before)


@pytest.mark.parametrize(
    "wrong", [{"split": "ravi"}, {"part": "holdout"}, {"split": "vinyals", "part": "background"}, {"size": 0}, {"size": 200}]
)
def test_unknown_parts_and_sizes_are_named(wrong):
    with pytest.raises(ValueError, match="expected a s"):
        omniglot(**wrong)


# The stand-in ------------------------------------------------------------------------------------


def test_without_data_and_network_omniglot_says_so_and_characters_stand_in(empty):
    with pytest.raises(Unreachable):
        omniglot()
    parts = {p: characters(p) for p in ("train", "val", "test")}
    for part, data in parts.items():
        assert data.source == f"glyphs drawn from seed 0, {part} alphabets (stand-in)"
        assert data.items.shape[1:] == (20, 1, 28, 28)
    assert [len(d.names) for d in parts.values()] == [816, 192, 336]
    alphabets = [{n.split("/")[0] for n in d.names} for d in parts.values()]
    assert not (alphabets[0] & alphabets[1] or alphabets[0] & alphabets[2] or alphabets[1] & alphabets[2])
    assert len(characters("val", rotations=True).names) == 4 * 192


@real
def test_where_the_data_are_there_they_are_used():
    assert characters("val").source.endswith("(real)")


def test_glyphs_are_a_function_of_the_seed():
    a = glyphs(30, 3)
    torch.manual_seed(5)
    assert torch.equal(a.items, glyphs(30, 3).items) and not torch.equal(a.items, glyphs(30, 3, seed=1).items)
    assert torch.equal(a.items[:24], glyphs(24, 3).items)
    assert a.items.shape == (30, 3, 1, 28, 28) and a.items.min() == 0 and a.items.max() == 1


def test_there_are_a_thousand_glyphs_and_they_can_be_told_apart():
    data = glyphs(1008, 8)
    assert len(set(data.names)) == 1008
    means = data.items.mean(1).flatten(1)
    gaps = torch.cdist(means, means).fill_diagonal_(9)
    assert gaps.min() > 0  # no class twice
    draw = episodes(data, 5, 1, 5, 200, seed=0)(0)
    right = []
    for t in range(200):
        (xs, ys), (xq, yq) = (Batch(p.x[t].flatten(1), p.y[t]) for p in draw)
        nearest = squared_distances(xq, class_means(xs, ys)).argmin(1)
        right.append((nearest == yq.argmax(1)).float().mean())
    accuracy = torch.stack(right).mean()
    assert 0.45 < accuracy < 0.7, "as hard in pixel space as Omniglot, and no harder"
