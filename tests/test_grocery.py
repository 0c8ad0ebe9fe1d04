"""The photographs of groceries: their parts and folders, what a reader downloads, and the drawn stand-in."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from machine import FOLDER, damage, files_of, served
from PIL import Image

from mtlib.data import grocery as module
from mtlib.data.crates import BURST, crates
from mtlib.data.download import Altered, Unreachable, contents, fetch
from mtlib.data.grocery import (
    ARCHIVE,
    FOLDERS,
    PARTS,
    Folders,
    Group,
    check,
    groceries,
    groups,
    paths,
    reduced,
    sources,
)
from mtlib.tasks import ClassSet, episodes

there = pytest.mark.skipif(
    not (FOLDER / ARCHIVE.name).is_file(), reason=f"MTLIB_DATA names no folder with {ARCHIVE.name}"
)


@pytest.fixture
def empty(home, monkeypatch):
    monkeypatch.setattr(module, "cache", lambda: home / "cache")
    return home


# The list ------------------------------------------------------------------------------------


def test_classes_are_parted_by_their_coarse_class():
    known = groups()
    assert len(known) == 148 and all(len(g.files) == 18 for g in known)
    for part, classes in zip(PARTS, (37, 14, 23), strict=True):
        for folder in FOLDERS:
            assert sum(g.part == part and g.folder == folder for g in known) == classes
    coarse = {p: {g.coarse for g in known if g.part == p} for p in PARTS}
    assert not coarse["train"] & coarse["val"] and not coarse["train"] & coarse["test"]
    assert not coarse["val"] & coarse["test"]
    cartons = {g.name for g in known if (g.part, g.kind) == ("test", "cartons")}
    assert len(cartons) == 11


def test_every_source_is_pinned_and_no_file_is_listed_twice():
    every = [r for g in groups() for r in sources(g)]
    assert len(every) == len({r.name for r in every}) == 2664
    assert len({r.sha256 for r in every}) > 2600  # the authors have a few photographs twice
    for r in every[::100]:
        assert "/fc80ba90f803d79d0383df52c5a4ac5de99ff6fc/dataset/" in r.url
        assert re.fullmatch("[0-9a-f]{64}", r.sha256[0]) and r.url.endswith(".jpg")


@there
def test_the_list_is_the_archives():
    held = dict(contents(FOLDER / ARCHIVE.name))
    rows = {r["path"]: r for r in csv.DictReader(io.StringIO(held["items.csv"].decode()))}
    assert len(rows) == 2664 and held.keys() == {"items.csv", *rows}
    for g in groups():
        for path, source in zip(paths(g), sources(g), strict=True):
            r = rows[path]
            assert (r["class"], r["coarse"], r["part"], r["folder"]) == (
                g.name,
                g.coarse,
                g.part,
                g.folder,
            )
            assert source.url.endswith("/dataset/" + r["source"])
            assert source.sha256 == (r["source_sha256"],)


# The archive ---------------------------------------------------------------------------------


@there
@pytest.mark.parametrize(("part", "classes"), [("train", 37), ("val", 14), ("test", 23)])
def test_a_part_has_both_folders_in_the_same_order(part, classes, monkeypatch):
    monkeypatch.setenv("MTLIB_DATA", str(FOLDER))
    data = groceries(part)
    assert data.support.names == data.query.names and len(data.support.names) == classes
    for folder, one in zip(FOLDERS, data, strict=True):
        assert one.items.shape == (classes, 18, 3, 128, 128) and one.items.dtype == torch.uint8
        assert one.source == f"groceries, {part} classes, {folder} folder (real)"
    c = classes - 1
    path = f"{data.query.names[c].split('/')[-1]}/test_"
    found = list(contents(FOLDER / ARCHIVE.name, path))
    with Image.open(io.BytesIO(found[0][1])) as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(data.query.items[c, 0], expected)


@there
def test_an_archive_zipped_again_is_taken_and_an_altered_one_refused(tmp_path, monkeypatch):
    place = tmp_path / ARCHIVE.name
    place.parent.mkdir()
    held = list(contents(FOLDER / ARCHIVE.name))
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name, data in reversed(held):
            archive.writestr(name, data)
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    check(place)
    assert fetch(ARCHIVE) == place
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name, data in held[1:]:
            archive.writestr(name, data)
    with pytest.raises(Altered, match="content digest"):
        groceries("val")
    shutil.copyfile(FOLDER / ARCHIVE.name, place)
    damage(place)
    with pytest.raises(Altered):
        groceries("val")


@there
def test_support_and_queries_never_share_a_folder(monkeypatch):
    """Each photograph is replaced by the number of its folder; the trap's tasks show both in both."""
    monkeypatch.setenv("MTLIB_DATA", str(FOLDER))
    data = groceries("val")
    numbered = Folders(
        *(
            d._replace(items=torch.full((*d.items.shape[:2], 1), float(i)))
            for i, d in enumerate(data)
        )
    )
    how = {"ways": 5, "shots": 3, "queries": 5, "tasks": 8, "seed": 0}
    stream = numbered.draw(**how)
    for step in range(5):
        draw = stream(step)
        assert not draw.support.x.any() and bool((draw.query.x == 1).all())
    draw = episodes(numbered.mixed(), **how)(0)
    assert 0 < draw.support.x.mean() < 1 and 0 < draw.query.x.mean() < 1


def test_a_function_takes_the_place_of_the_photographs():
    items = torch.arange(2 * 3 * 3 * 4 * 4).reshape(2, 3, 3, 4, 4)
    data = Folders(*(ClassSet(items + k, ["a", "b"], "x") for k in range(2)))
    means = data.map(lambda x: x.float().mean((2, 3)))
    assert means.support.items.shape == (2, 3, 3) and means.query.names == ["a", "b"]
    assert torch.equal(means.query.items[1, 2], data.query.items[1, 2].float().mean((1, 2)))
    with pytest.raises(ValueError, match="expected f to give 6 rows"):
        data.map(lambda x: x[:3])


# What a reader downloads ---------------------------------------------------------------------


@pytest.fixture
def authors(empty, monkeypatch):
    """A server with two classes' made-up photographs in the authors' form, and the list of them."""
    rng, found = np.random.default_rng(0), []
    for part in PARTS:
        for name in ("Red", "Green"):
            for folder in FOLDERS:
                files, top = {}, f"{folder}/Fruit/{part}/{name}"
                (empty / "web" / top).mkdir(parents=True)
                for i in range(2):
                    path = empty / "web" / top / f"{name}{part}_{i:03d}.jpg"
                    colours = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                    Image.fromarray(colours).resize((348, 348)).save(path, "JPEG")
                    files[f"{i:03d}"] = hashlib.sha256(path.read_bytes()).hexdigest()
                found.append(Group(part, "fruit", part, f"{name}{part}", folder, top, files))
    monkeypatch.setattr(module, "groups", lambda: tuple(found))
    with served(files_of(empty / "web")) as url:
        monkeypatch.setattr(module, "_FOLDER", url)
        yield empty


def test_a_reader_downloads_the_authors_files(authors):
    data = groceries("val")
    assert data.support.items.shape == (2, 2, 3, 128, 128) and data.query.source.endswith("(real)")
    assert data.support.names == ["fruit/val/Redval", "fruit/val/Greenval"]
    path = authors / "web" / "test/Fruit/val/Green/Greenval_001.jpg"
    with Image.open(io.BytesIO(reduced(path))) as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(data.query.items[1, 1], expected)
    shutil.rmtree(authors / "web")  # what is kept is not asked for again
    again = groceries("val")
    assert torch.equal(again.support.items, data.support.items)
    kept = next((authors / "cache" / "grocery").glob("*.safetensors"))
    damage(kept)
    shutil.rmtree(authors / "cache" / "grocery" / "train")
    with pytest.raises(OSError):
        groceries("val")


def test_an_altered_source_is_an_error_and_no_stand_in(authors):
    damage(authors / "web" / "train/Fruit/test/Red/Redtest_000.jpg")
    with pytest.raises(Altered, match="Redtest_000"):
        groceries("train")
    assert not list((authors / "cache" / "grocery").glob("*.safetensors"))


@there
def test_the_authors_photographs_are_reduced_as_the_archive_has_them(tmp_path):
    """Of a photograph that is one already: what is kept is a JPEG of the same form."""
    _, data = next(contents(FOLDER / ARCHIVE.name, ".jpg"))
    with Image.open(io.BytesIO(data)) as image:
        tables = image.quantization
        image.resize((348, 348)).save(tmp_path / "a.jpg", "JPEG", quality=95)
    with Image.open(io.BytesIO(reduced(tmp_path / "a.jpg"))) as image:
        assert image.size == (128, 128) and image.quantization == tables
    with pytest.raises(ValueError, match="348×348"):
        (tmp_path / "b.jpg").write_bytes(data)
        reduced(tmp_path / "b.jpg")


# The stand-in --------------------------------------------------------------------------------


def test_without_file_and_network_it_is_drawn_and_says_so(offline, empty):
    data = groceries("val", size=64)
    assert data.support.items.shape == (14, 18, 3, 64, 64)
    assert all(d.source.endswith("(stand-in)") for d in data)
    assert data.support.names == data.query.names
    names = {p: set(groceries(p, size=32).support.names) for p in PARTS}
    assert [len(names[p]) for p in PARTS] == [37, 14, 23]
    assert len(set.union(*names.values())) == 74


def test_bursts_are_near_duplicates_and_visits_share_no_crate():
    one, two = (crates(3, 6, 32, visit=v).items.float() for v in range(2))
    assert torch.equal(one, crates(3, 6, 32).items.float())

    def apart(a, b):
        return (a - b).abs().mean()

    within = apart(one[:, 0], one[:, 1])
    assert BURST == 3 and within < 15
    assert apart(one[:, 0], one[:, 3]) > 1.5 * within < apart(one[:, 0], two[:, 0])


def test_what_is_no_part_is_refused():
    with pytest.raises(ValueError, match="expected a part"):
        groceries("validation")
    with pytest.raises(ValueError, match="size"):
        groceries("val", size=0)


def test_nothing_to_reach_is_unreachable(empty, monkeypatch):
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    with pytest.raises(Unreachable):
        fetch(sources(groups()[0])[0])
