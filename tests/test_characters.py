"""Omniglot, read from the real files where they are, and its stand-in."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from machine import FOLDER, always, real, served

from mtlib.core import Batch
from mtlib.data import omniglot as module
from mtlib.data.characters import characters
from mtlib.data.download import Altered, Unreachable, fetch
from mtlib.data.glyphs import glyphs
from mtlib.data.omniglot import CONTENT, IMAGES, content_digest, omniglot
from mtlib.tasks import episodes

there = real("omniglot")


SIZES = {
    ("lake", "background"): 964,
    ("lake", "train"): 787,
    ("lake", "val"): 177,
    ("lake", "test"): 659,
    ("vinyals", "train"): 1028,
    ("vinyals", "val"): 172,
    ("vinyals", "test"): 423,
}


@there
@pytest.mark.parametrize(("split", "part"), SIZES)
def test_counts_shapes_and_ink(split, part):
    data = omniglot(split, part)
    assert data.items.shape == (SIZES[split, part], 20, 1, 28, 28) and len(set(data.names)) == len(
        data.names
    )
    assert (
        data.items.dtype == torch.float32 and data.items.min() == 0 and 0.9 < data.items.max() <= 1
    )
    assert 0.05 < data.items.mean() < 0.1 and data.source.endswith("(real)")


@there
def test_the_content_is_the_official_one():
    for half, remote in IMAGES.items():
        assert content_digest(fetch(remote)) == CONTENT[half]


@there
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


@there
def test_the_two_splits_mix_so_a_checkpoint_must_not_cross():
    assert set(omniglot("vinyals", "train").names) & set(omniglot("lake", "test").names)


@there
def test_rotations_are_turned_copies():
    data, turned = omniglot("vinyals", "val"), omniglot("vinyals", "val", rotations=True)
    assert len(turned.names) == 4 * 172 and turned.names[5] == data.names[1] + "/rot090"
    assert torch.equal(turned.items[4], data.items[1])
    assert torch.equal(turned.items[5], torch.rot90(data.items[1], 1, (-2, -1)))
    lines = fetch(module.SPLITS["val"]).read_text().split()
    assert set(lines) == set(turned.names)


@there
def test_size_is_the_readers_choice():
    assert omniglot("lake", "val", size=20).items.shape[-1] == 20


@there
def test_a_truncated_archive_is_refused_and_never_replaced_by_the_stand_in(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "omniglot", tmp_path / "omniglot")
    for path in (tmp_path / "omniglot").glob("images_background*"):
        path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    for offline in ("0", "1"):
        monkeypatch.setenv("MTLIB_OFFLINE", offline)
        with pytest.raises(Altered):
            characters("train")


def test_a_download_that_breaks_off_is_never_replaced_by_the_stand_in(offline, monkeypatch):
    monkeypatch.delenv("MTLIB_OFFLINE")
    with served(always(b"the first bytes", length=9464212)) as url:
        there = IMAGES["background"]._replace(url=f"{url}/a.zip")
        monkeypatch.setitem(IMAGES, "background", there)
        with pytest.raises(Altered, match="truncated"):
            characters("train")


def test_a_data_folder_that_is_none_is_never_replaced_by_the_stand_in(offline, monkeypatch):
    monkeypatch.setenv("MTLIB_DATA", "data")
    with pytest.raises(NotADirectoryError):
        characters("train")


@there
def test_a_damaged_decoded_copy_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache", lambda: tmp_path)
    path = fetch(IMAGES["background"])
    monkeypatch.setattr(module, "_decode", lambda path, size: made.append(path) or fresh)
    made, fresh = [], {"Greek/character01": np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)}

    def read():
        drawn = module._drawings("background", 4)
        assert drawn.keys() == fresh.keys() and np.array_equal(
            drawn["Greek/character01"], fresh["Greek/character01"]
        )

    read()
    read()
    assert made == [path], "decoded once"
    (kept,) = (tmp_path / "omniglot").iterdir()
    whole = kept.read_bytes()
    for n, damage in enumerate(
        [b"", whole[:10], whole[:-100], whole[:200] + b"x" * 9 + whole[209:], b"x" * 999]
    ):
        kept.write_bytes(damage)
        read()
        again = module._kept(kept, 4)["Greek/character01"]
        assert len(made) == n + 2 and np.array_equal(again, fresh["Greek/character01"])
    with open(kept, "wb") as file:
        np.save(file, np.zeros(3))  # another kind of file
    read()
    with open(kept, "wb") as file:
        np.savez(
            file, names=np.array(["Greek/character01"]), items=np.zeros((1, 20, 4, 4), np.uint8)
        )  # and another
    read()
    module._keep(kept, {"Greek/character01": np.zeros((20, 5, 5), np.uint8)})
    read()
    assert len(made) == 9


@there
def test_a_cache_that_cannot_be_written_does_not_matter_to_decoded_copies(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "cache", lambda: tmp_path / "file")
    monkeypatch.setattr(
        module, "_decode", lambda path, size: {"a/b": np.zeros((20, 4, 4), np.uint8)}
    )
    assert list(module._drawings("background", 4)) == ["a/b"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "ravi"},
        {"part": "holdout"},
        {"split": "vinyals", "part": "background"},
        {"size": 0},
        {"size": 200},
        {"size": 28.0},
    ],
)
def test_unknown_parts_and_sizes_are_named(wrong):
    with pytest.raises(ValueError, match="expected a s"):
        omniglot(**wrong)


# The stand-in ------------------------------------------------------------------------------------


def test_without_data_and_network_omniglot_says_so_and_characters_stand_in(offline):
    with pytest.raises(Unreachable):
        omniglot()
    parts = {p: characters(p) for p in ("train", "val", "test")}
    for part, data in parts.items():
        assert data.source == f"glyphs drawn from seed 0, {part} alphabets (stand-in)"
        assert data.items.shape[1:] == (20, 1, 28, 28)
    assert [len(d.names) for d in parts.values()] == [816, 192, 336]
    alphabets = [{n.split("/")[0] for n in d.names} for d in parts.values()]
    assert not (
        alphabets[0] & alphabets[1] or alphabets[0] & alphabets[2] or alphabets[1] & alphabets[2]
    )
    assert len(characters("val", rotations=True).names) == 4 * 192


@there
def test_where_the_data_are_there_they_are_used():
    assert characters("val").source.endswith("(real)")


def test_glyphs_are_a_function_of_the_seed():
    a = glyphs(30, 3)
    torch.manual_seed(5)
    assert torch.equal(a.items, glyphs(30, 3).items) and not torch.equal(
        a.items, glyphs(30, 3, seed=1).items
    )
    assert torch.equal(a.items[:24], glyphs(24, 3).items)
    assert a.items.shape == (30, 3, 1, 28, 28) and a.items.min() == 0 and a.items.max() == 1


def test_there_are_a_thousand_glyphs_and_they_can_be_told_apart():
    data = glyphs(1008, 8)
    assert len(set(data.names)) == 1008 and data.names == sorted(data.names)
    means = data.items.mean(1).flatten(1)
    gaps = torch.cdist(means, means).fill_diagonal_(9)
    assert gaps.min() > 0.5, "no class twice"
    items = data.items.flatten(2)
    within = torch.cdist(items, items).sum((1, 2)).mean() / (8 * 7)
    between = torch.cdist(items[:, 0], items[:, 1])
    between = (between.sum() - between.trace()) / (1008 * 1007)
    assert within < 0.95 * between  # 0.906 here, 1 where a class means nothing


def nearest_mean(data, shots):
    """Accuracy of the nearest class mean of raw pixels, 5 ways, 400 tasks."""
    draw = episodes(data, 5, shots, 5, 400, seed=0)(0)
    (xs, ys), (xq, yq) = (Batch(p.x.flatten(2), p.y) for p in draw)
    means = ys.mT @ xs / shots
    return (torch.cdist(xq, means).argmin(2) == yq.argmax(2)).float().mean().item()


def test_glyphs_are_as_hard_in_pixel_space_as_omniglot():
    data = glyphs(480)
    assert 0.39 < nearest_mean(data, 1) < 0.49 and 0.66 < nearest_mean(data, 5) < 0.78


@there
def test_omniglot_is_as_hard_in_pixel_space_as_glyphs():
    data = omniglot("lake", "train")
    assert 0.39 < nearest_mean(data, 1) < 0.49 and 0.66 < nearest_mean(data, 5) < 0.78
