"""The centre-point detector, blood cells read from the real file where it is, and the scenes that stand in."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import zipfile

import pytest
import torch
from machine import FOLDER, damage, files_of, real, served
from pages import run_until

from mtlib.data import bccd as module
from mtlib.data.bccd import ARCHIVE, CONTENT, bccd, blood_cells, content_digest
from mtlib.data.download import Altered, Unreachable, fetch
from mtlib.data.scenes import scenes
from mtlib.models.detection import (
    Detections,
    average_precision,
    centre_loss,
    decode,
    detector,
    flipped,
    judge,
    resampled,
    targets,
)

there = real("bccd")


# Blood cells -------------------------------------------------------------------------------------


@there
def test_counts_and_the_two_boxes_without_area():
    parts = {p: bccd(p, (160, 120)) for p in ("train", "val", "test")}
    assert [len(d.names) for d in parts.values()] == [205, 87, 72]
    assert len({n for d in parts.values() for n in d.names}) == 364, "no photograph in two parts"
    labels = torch.cat([k for d in parts.values() for k in d.labels])
    boxes = torch.cat([b for d in parts.values() for b in d.boxes])
    raw = module._files(fetch(ARCHIVE, local=True))
    told = [module.annotation(v) for k, v in raw.items() if k.endswith(".xml")]
    assert torch.bincount(torch.cat([k for _, k in told])).tolist() == [4155, 372, 361]
    assert len(labels) == len(boxes) == 4888 - 2
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for d in parts.values():
        assert d.images.shape[1:] == (3, 120, 160) and d.images.dtype == torch.uint8
        assert d.source.endswith("(real)")
        for b, k in zip(d.boxes, d.labels, strict=True):
            targets(b, k, 3, 120, 160)  # every centre lies on the map


@there
def test_the_content_is_the_listed_one():
    lines = (FOLDER / "bccd" / "SHA256SUMS").read_text().splitlines()
    listed = sorted(line.split(maxsplit=1)[::-1] for line in lines)
    total = hashlib.sha256()
    for name, digest in listed:
        if name.startswith("BCCD/"):
            total.update(f"{name}\0{digest}\n".encode())
    assert total.hexdigest() == CONTENT == content_digest(fetch(ARCHIVE, local=True))


@there
def test_an_altered_archive_is_refused_and_never_replaced_by_the_stand_in(offline, monkeypatch):
    (offline / "bccd").mkdir()
    copy = shutil.copyfile(FOLDER / "bccd" / "bccd.zip", offline / "bccd" / "bccd.zip")
    damage(copy)
    monkeypatch.setenv("MTLIB_DATA", str(offline))
    with pytest.raises(Altered):
        blood_cells("val")


def test_offline_scenes_stand_in(offline):
    with pytest.raises(Unreachable):
        bccd()
    a, b = blood_cells("val", (160, 120)), blood_cells("val", (160, 120))
    assert a.source.endswith("(stand-in)") and a.images.shape == (16, 3, 120, 160)
    assert torch.equal(a.images, b.images) and len(a.classes) == 3
    parts = [blood_cells(p, (160, 120)) for p in module.PARTS]
    assert all(p.classes == a.classes and p.source == a.source for p in parts)
    assert len({n for p in parts for n in p.names}) == 40 + 16 + 16, "no scene in two parts"


@contextlib.contextmanager
def archive_of(folder, monkeypatch):
    """`folder`/a.zip stands at the archive's address."""
    with served(files_of(folder)) as url:
        monkeypatch.setattr(module, "ARCHIVE", ARCHIVE._replace(url=f"{url}/a.zip"))
        yield


@there
def test_the_download_is_held_to_its_members_however_they_are_packed(home, monkeypatch):
    source = FOLDER / "bccd" / "bccd.zip"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(home / "a.zip", "w") as new:
        new.writestr("BCCD_Dataset-d272fb1/README.md", "not ours")
        for name in reversed(old.namelist()):
            new.writestr(f"BCCD_Dataset-d272fb1/{name}", old.read(name))
    with archive_of(home, monkeypatch):
        assert content_digest(fetch(module.ARCHIVE)) == CONTENT
    fetch(module.ARCHIVE)  # from the cache
    assert [p.name for p in (home / "cache" / "bccd").iterdir()] == ["bccd.zip"]


@pytest.mark.parametrize("what", ["no archive", "another archive"])
def test_a_download_of_something_else_is_refused(home, monkeypatch, what):
    (home / "a.zip").write_bytes(b"oops")
    if what == "another archive":
        with zipfile.ZipFile(home / "a.zip", "w") as new:
            new.writestr("x/BCCD/JPEGImages/a.jpg", b"not a photograph")
    with archive_of(home, monkeypatch), pytest.raises(Altered):
        blood_cells()
    assert not list((home / "cache" / "bccd").iterdir()), "nothing is kept"


@pytest.mark.parametrize("wrong", [{"part": "all"}, {"size": (0, 0)}, {"size": (999, 240)}])
def test_unknown_parts_and_sizes_are_named(wrong):
    with pytest.raises(ValueError, match="expected a"):
        blood_cells(**wrong)


# Scenes ------------------------------------------------------------------------------------------


def test_scenes_are_a_function_of_the_seed_and_their_boxes_hold_ink():
    a, b = scenes(8), scenes(8)
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, scenes(8, seed=1).images)
    for image, boxes in zip(a.images, a.boxes, strict=True):
        assert len(boxes) >= 1 and boxes.min() >= 0
        assert (boxes[:, 2] <= 160).all() and (boxes[:, 3] <= 120).all()
        for x1, y1, x2, y2 in boxes.int().tolist():
            assert image[:, y1:y2, x1:x2].min() < image.float().median() - 40
    assert not set(scenes(2, first=3).classes) & set(a.classes)


# The detector ------------------------------------------------------------------------------------

BOXES = torch.tensor([[8.0, 10, 40, 50], [60, 20, 90, 44], [100, 60, 130, 100]])
LABELS = torch.tensor([0, 1, 0])


def perfect(y, classes):
    """The prediction that says exactly the target."""
    heat = torch.where(y[:classes] == 1, 12.0, -12.0)
    return torch.cat([heat, y[classes:]])[None]


def test_decoding_the_target_gives_the_boxes_back():
    y = targets(BOXES, LABELS, 2, 120, 160)
    assert y.shape == (6, 30, 40) and (y[:2] == 1).sum() == 3
    (found,) = decode(perfect(y, 2), 2, most=3)
    order = found.boxes[:, 0].argsort()
    torch.testing.assert_close(found.boxes[order], BOXES)
    assert found.labels[order].tolist() == LABELS.tolist()


def test_the_bump_is_the_stated_gaussian():
    y = targets(BOXES[:1], LABELS[:1], 1, 120, 160)
    # centre (24, 30) px: cell (6, 7); sigma .12 · 8 and .12 · 10 cells
    assert y[0, 7, 7].item() == pytest.approx(torch.exp(torch.tensor(-1 / (2 * 0.96**2))).item())
    assert y[0, 8, 6].item() == pytest.approx(torch.exp(torch.tensor(-1 / (2 * 1.2**2))).item())
    assert y[1:, 7, 6].tolist() == [8.0, 10.0, 0.0, 0.5]
    small = targets(BOXES[:1] / 8, LABELS[:1], 1, 40, 40)  # a cell wide: the least spread holds
    assert small[0, 0, 1].item() == pytest.approx(torch.exp(torch.tensor(-1 / (2 * 0.6**2))).item())


def test_the_loss_is_the_equation_by_hand():
    y = torch.tensor([1.0, 0.5, 0.0]).reshape(1, 1, 1, 3)
    rest = torch.zeros(1, 4, 1, 3)
    rest[0, :, 0, 0] = torch.tensor([4.0, 2.0, 0.5, 0.25])
    said = torch.zeros(1, 5, 1, 3)
    log2 = torch.log(torch.tensor(2.0))
    focal = 0.25 * log2 * (1 + 0.5**4 + 1)
    expected = focal + 0.1 * 6 + 0.75
    torch.testing.assert_close(centre_loss(1)(said, torch.cat([y, rest], 1)), expected)


def test_a_class_that_nobody_annotated_counts_for_nothing():
    torch.manual_seed(0)
    y = targets(BOXES, LABELS, 3, 120, 160)[None]
    y[:, 2] = -1
    said = torch.randn_like(y).requires_grad_()
    loss = centre_loss(3)
    (g,) = torch.autograd.grad(loss(said, y), said)
    assert (g[:, 2] == 0).all() and (g[:, :2] != 0).all()
    two, kept = [0, 1, 3, 4, 5, 6], loss(said, y)
    torch.testing.assert_close(kept, centre_loss(2)(said[:, two], y[:, two]))
    torch.testing.assert_close(kept, loss(said.flatten(1), y.flatten(1)))  # maps as rows


@pytest.mark.parametrize("axis", [2, 3])
def test_targets_of_a_mirrored_photograph_are_the_mirrored_targets(axis):
    first, second = (1, 3) if axis == 2 else (0, 2)
    boxes, side = BOXES.clone() + 0.3, (120, 160)[axis - 2]
    boxes[:, first], boxes[:, second] = side - boxes[:, second], side - boxes[:, first]
    x = torch.arange(3 * 120 * 160.0).reshape(1, 3, 120, 160)
    y = targets(BOXES + 0.3, LABELS, 2, 120, 160)[None]
    image, maps = flipped(x, y, 2, axis)
    torch.testing.assert_close(maps[0], targets(boxes, LABELS, 2, 120, 160))
    assert image[0, 0, 0, 0] == (x[0, 0, -1, 0] if axis == 2 else x[0, 0, 0, -1])
    again = flipped(image, maps, 2, axis)
    torch.testing.assert_close(again, (x, y))


def test_boxes_without_area_or_outside_are_refused():
    with pytest.raises(ValueError, match="area"):
        targets(torch.tensor([[5.0, 5, 5, 9]]), torch.tensor([0]), 1, 120, 160)
    with pytest.raises(ValueError, match="inside"):
        targets(torch.tensor([[500.0, 5, 520, 9]]), torch.tensor([0]), 1, 120, 160)


def test_average_precision_by_hand(capsys):
    box = torch.tensor([[0.0, 0, 10, 10]])
    far = torch.tensor([[50.0, 50, 60, 60]])
    zero = torch.tensor([0])
    hit = Detections(torch.cat([box, far]), torch.tensor([0, 0]), torch.tensor([0.9, 0.8]))
    miss = Detections(far, zero, torch.tensor([0.95]))
    ap = average_precision([hit, miss], [box, box], [zero, zero], 2)
    # ranked: wrong .95, right .9, wrong .8: precision 1/2 up to recall 1/2, 51 of 101 points
    assert ap[0].item() == pytest.approx(0.5 * 51 / 101) and ap[1].isnan()
    nothing = Detections(box[:0], zero[:0], torch.zeros(0))
    assert average_precision([nothing], [box], [zero], 2)[0] == 0
    assert capsys.readouterr().out == ""


def test_average_precision_of_resampled_photographs_is_that_of_the_photographs_drawn():
    g = torch.Generator().manual_seed(0)
    corner = 100 * torch.rand(6, 8, 2, generator=g)
    boxes = [torch.cat([c, c + 20], 1) for c in corner]
    labels = list(torch.randint(2, (6, 8), generator=g))
    moved = [b + 6 * torch.randn(8, 4, generator=g) for b in boxes]
    scores = torch.rand(6, 8, generator=g).sort(1, descending=True).values
    found = [Detections(*d) for d in zip(moved, labels, scores, strict=True)]
    judged = judge(found, boxes, labels, 3)
    plain = torch.stack([resampled(j, torch.ones(1, 6))[0] for j in judged])
    expected = average_precision(found, boxes, labels, 3)
    torch.testing.assert_close(plain, expected, equal_nan=True)
    assert plain[2].isnan() and 0.1 < plain[0] < 0.9
    rows = [0, 0, 3, 5, 5, 5]
    again = average_precision(*([part[i] for i in rows] for part in (found, boxes, labels)), 3)
    counts = torch.bincount(torch.tensor(rows), minlength=6)[None]
    drawn = torch.stack([resampled(j, counts)[0] for j in judged])
    torch.testing.assert_close(drawn, again, equal_nan=True)
    nothing = [Detections(b[:0], k[:0], b[:0, 0]) for b, k in zip(boxes, labels, strict=True)]
    assert resampled(judge(nothing, boxes, labels, 3)[0], counts).item() == 0


def test_photographs_do_not_depend_on_each_other():
    torch.manual_seed(0)
    net, x = detector(2, 8), torch.rand(3, 3, 40, 48)
    assert net(x).shape == (3, 6, 10, 12)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_a_few_steps_find_the_objects_of_one_scene():
    data = scenes(2, classes=1, most=2, height=48, width=64)
    torch.manual_seed(0)
    net = detector(1, 16)
    x = data.images.float() / 255
    y = torch.stack(
        [targets(b, k, 1, 48, 64) for b, k in zip(data.boxes, data.labels, strict=True)]
    )
    rule, loss = torch.optim.Adam(net.parameters(), lr=3e-3), centre_loss(1)
    first = loss(net(x), y).item()
    for _ in range(150):
        rule.zero_grad()
        loss(net(x), y).backward()
        rule.step()
    with torch.no_grad():
        ap = average_precision(decode(net(x), 1), data.boxes, data.labels, 1)
    assert loss(net(x), y).item() < 0.2 * first and ap[0] > 0.9


# The page ----------------------------------------------------------------------------------------


def test_the_settings_are_chosen_without_test_labels_and_without_the_new_class(small):
    """Test photographs' labels shuffled, platelets of all parts moved: the same settings; test scores change."""
    plain = {p: scenes(24, height=60, width=80, seed=s) for s, p in enumerate(module.PARTS)}

    def run(altered: bool, until: str):
        def cells(part, size):
            d = plain[part]
            if altered and part == "test":
                return d._replace(boxes=d.boxes[::-1], labels=[2 - k for k in d.labels[::-1]])
            if altered:
                moved = [
                    b.where(k[:, None] < 2, b * 0.9) for b, k in zip(d.boxes, d.labels, strict=True)
                ]
                return d._replace(boxes=moved)
            return d

        small.setattr(module, "blood_cells", cells)
        return run_until("detection", until)

    before, after = run(False, "CHOSEN"), run(True, "CHOSEN")
    assert set(before["CHOSEN"]) == {"from scratch", "last layers", "fine-tuning", "joint"}
    assert before["CHOSEN"] == after["CHOSEN"]
    assert len(before["CHOICE"]["fine-tuning"]) > 1, "there is something to choose"
    assert before["CHOICE"] == after["CHOICE"], "what it was chosen by is the same number"
    net, phi = before["NET"], before["LEARNED"][0]
    scored = [space["precision"](net, phi, space["TEST"]).tolist() for space in (before, after)]
    assert scored[0] != scored[1]
