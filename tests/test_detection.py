"""The centre-point detector, blood cells read from the real file where it is, and the scenes that stand in."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import zipfile

import numpy as np
import pytest
import torch
from machine import FOLDER, damage, files_of, real, served
from pages import run_until
from sklearn import metrics

from mtlib.book.results import agrees, recorded
from mtlib.core import Batch
from mtlib.data import bccd as module
from mtlib.data.bccd import ARCHIVE, CONTENT, bccd, blood_cells, content_digest
from mtlib.data.download import Altered, Unreachable, fetch
from mtlib.data.scenes import scenes
from mtlib.models.detection import (
    Detections,
    annotated,
    average_precision,
    by_photograph,
    caught,
    centre_head,
    centre_loss,
    decode,
    detector,
    find,
    flipped,
    judge,
    missed_by_size,
    photographs,
    precision_recall,
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


def scattered(n=6, classes=3):
    """Detections on n photographs of eight boxes of two classes each, moved from where the boxes are."""
    g = torch.Generator().manual_seed(0)
    corner = 100 * torch.rand(n, 8, 2, generator=g)
    boxes = [torch.cat([c, c + 20], 1) for c in corner]
    labels = list(torch.randint(2, (n, 8), generator=g))
    moved = [b + 4 * torch.randn(8, 4, generator=g).clamp(-2, 2) for b in boxes]
    scores = torch.rand(n, 8, generator=g).sort(1, descending=True).values
    return [Detections(*d) for d in zip(moved, labels, scores, strict=True)], boxes, labels


def test_one_number_a_photograph_is_the_jackknifes_and_its_bootstrap_that_of_the_photographs():
    found, boxes, labels = scattered(40)
    judged = judge(found, boxes, labels, 3)[0]
    each = by_photograph(judged)
    whole = average_precision(found, boxes, labels, 3)[0].item()
    less = average_precision(found[1:], boxes[1:], labels[1:], 3)[0].item()
    assert each[0].item() == pytest.approx(40 * whole - 39 * less) and each.shape == (40,)
    assert abs(each.mean().item() - whole) < 0.02
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(40, [1 / 40] * 40, size=4000))
    direct = resampled(judged, counts).std().item()
    weighed = (counts.double() @ each / 40).std().item()
    assert weighed == pytest.approx(direct, rel=0.15)
    with pytest.raises(ValueError, match="two photographs"):
        by_photograph(judge(found[:1], boxes[:1], labels[:1], 3)[0])


def test_precision_and_recall_by_hand_and_by_scikit_learn():
    box, far = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[50.0, 50, 60, 60]])
    zero = torch.tensor([0])
    hit = Detections(torch.cat([box, far]), torch.tensor([0, 0]), torch.tensor([0.9, 0.8]))
    miss = Detections(far, zero, torch.tensor([0.95]))
    recall, precision = precision_recall(judge([hit, miss], [box, box], [zero, zero], 1)[0])
    assert recall.tolist() == [0, 0.5, 0.5]
    assert precision.tolist() == pytest.approx([0, 1 / 2, 1 / 3])
    judged = judge(*scattered(), 3)[0]
    recall, precision = precision_recall(judged)
    k = len(judged.hits)
    known = metrics.precision_recall_curve(judged.hits.numpy(), -np.arange(k))
    share = (
        judged.hits.sum() / judged.truths.sum()
    ).item()  # there recall is of what was found at all
    np.testing.assert_allclose(precision, known[0][:-1][::-1][-k:])
    np.testing.assert_allclose(recall, share * known[1][:-1][::-1][-k:])
    best = precision.flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted(recall, torch.linspace(0, 1, 101, dtype=torch.float64))
    mean = torch.cat([best, best.new_zeros(1)])[at].mean()
    torch.testing.assert_close(mean, resampled(judged, torch.ones(1, 6))[0])


def test_what_was_caught_has_the_size_of_its_box_and_the_score_of_what_found_it():
    found, boxes, labels = scattered()
    rows = caught(found, boxes, labels, 3)
    assert [len(r) for r in rows] == torch.bincount(torch.cat(labels), minlength=3).tolist()
    torch.testing.assert_close(rows[0][:, 0], torch.full((len(rows[0]),), 20.0).double())
    for r, judged in zip(rows, judge(found, boxes, labels, 3), strict=True):
        assert (r[:, 1] > 0).sum() == judged.hits.sum()
    assert set(rows[0][:, 1].float().tolist()) - {0.0} <= {
        s for d in found for s in d.scores.tolist()
    }
    nothing = [Detections(b[:0], k[:0], b[:0, 0]) for b, k in zip(boxes, labels, strict=True)]
    empty = caught(nothing, boxes, labels, 3)
    assert [r[:, 1].sum() for r in empty] == [0, 0, 0]
    assert [r[:, 0].tolist() for r in empty] == [r[:, 0].tolist() for r in rows]


def test_missed_by_size_by_hand():
    rows = torch.tensor([[30.0, 0.9], [10, 0.2], [20, 0.3], [40, 0.0], [12, 0.8], [22, 0.1]])
    sizes, missed = missed_by_size(rows)
    assert sizes.tolist() == [11, 21, 35] and missed.tolist() == [0.5, 0.5, 0.5]
    assert missed_by_size(rows, 0.85, 2)[1].tolist() == pytest.approx([1, 2 / 3])


def test_what_nobody_annotated_has_a_map_of_minus_one():
    boxes, labels = [BOXES, BOXES[:1]], [LABELS, LABELS[:1]]
    y = annotated(boxes, labels, 3, 120, 160, (0,))
    assert y.shape == (2, 7, 30, 40) and (y[:, 1:3] == -1).all() and (y[:, 0] >= 0).all()
    assert (y[0, 3] > 0).sum() == 2, "sizes stand at the centres of what was annotated alone"
    whole = torch.stack([targets(*pair, 3, 120, 160) for pair in zip(boxes, labels, strict=True)])
    assert torch.equal(annotated(boxes, labels, 3, 120, 160), whole)


def test_the_head_fits_feature_maps_and_is_the_detectors():
    head, net = centre_head(5, 2, 8), detector(2, 8)
    assert head(torch.rand(3, 5, 10, 12)).shape == (3, 6, 10, 12)
    assert {k: v.shape for k, v in net.head.state_dict().items()} == {
        k: v.shape for k, v in centre_head(8, 2, 8, rows=True).state_dict().items()
    }
    x, plain = torch.rand(2, 3, 40, 48), detector(2, 8, seed=4)
    assert torch.equal(detector(2, 8, seed=4, rows=True)(x), plain(x).flatten(1))
    assert not torch.equal(plain[0][0][0].weight, detector(2, 8, seed=5)[0][0][0].weight)


def some_sets(n=12):
    """n photographs that hold their number, the last one alone with an object of class 1."""
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 40, 48)
    labels = [torch.tensor([int(i == n - 1)]) for i in range(n)]
    return Batch(x, annotated([BOXES[:1] / 2] * n, labels, 2, 40, 48))


def test_photographs_are_a_function_of_the_step_and_a_rare_class_is_seen_often():
    data = some_sets()
    plain = photographs(data, data, classes=2, batch=8, seed=3, vary=False)
    a, b = plain(5), plain(5)
    assert a.x.shape == (2, 8, 3, 40, 48) and a.y.shape == (2, 8, 6 * 10 * 12)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and not torch.equal(a.x, plain(6).x)
    drawn = torch.stack([plain(i).x[:, :, 0, 0, 0] for i in range(200)])
    assert (drawn == 11).float().mean() == pytest.approx(1 / 3 + 1 / 36, abs=0.03)
    y = data.y[a.x[0, :, 0, 0, 0].long()].flatten(1)
    assert torch.equal(a.y[0], y), "a photograph keeps its own targets"
    varied = photographs(data, classes=2, batch=8, seed=3)(5)
    gap = (varied.x - a.x[:1]).flatten(2)
    assert gap.abs().max() > 0 and not torch.equal(gap[0, 0], gap[0, 1])


def test_average_precision_of_resampled_photographs_is_that_of_the_photographs_drawn():
    found, boxes, labels = scattered()
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


def test_find_decodes_maps_or_their_rows():
    y = targets(BOXES, LABELS, 2, 120, 160)
    maps = perfect(y, 2).repeat(3, 1, 1, 1)
    for f in (lambda i: maps[i.long()], lambda i: maps[i.long()].flatten(1)):
        found = find(f, torch.arange(3.0), 2, (30, 40), batch=2)
        assert len(found) == 3
        for d in found:
            assert torch.equal(d.boxes, decode(maps[:1], 2)[0].boxes)


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


def test_the_settings_are_chosen_without_test_labels(small):
    """Test photographs' labels shuffled: the same qualities and settings of all ways that run; test scores change."""
    plain = {p: scenes(24, height=60, width=80, seed=s) for s, p in enumerate(module.PARTS)}

    def run(altered: bool):
        def cells(part, size):
            d = plain[part]
            if altered and part == "test":
                return d._replace(boxes=d.boxes[::-1], labels=[2 - k for k in d.labels[::-1]])
            return d

        small.setattr(module, "blood_cells", cells)
        return run_until("detection", "contest")

    before, after = run(False), run(True)
    ways = before["contest"].found["ways"]
    assert {*ways} == {*before["LIVE"]} >= {"from scratch", "fine-tuning", "first-order MAML"}
    assert all(len(held["tuning"]) == 2 for held in ways.values()), "there is something to choose"
    for way, held in after["contest"].found["ways"].items():
        assert (held["setting"], held["tuning"]) == (ways[way]["setting"], ways[way]["tuning"])
    for kind in ("meta", "transfer"):
        assert before["contest"].chosen(kind) == after["contest"].chosen(kind)
    said = [space["found"]("fine-tuning", 0.01, 0, 10) for space in (before, after)]
    for a, b in zip(*said, strict=True):
        assert torch.equal(a.scores, b.scores), "what is found does not depend on them"


def test_only_what_is_known_reaches_the_source_and_only_drawn_platelets_the_target(small):
    page = run_until("detection", "found")
    masked = page["labelled"](page["TRAIN"], page["OLD"]).y[:, page["NEW"]]
    assert (masked == -1).all()
    for seed in range(3):
        twenty, five = page["drawn"](20, seed), page["drawn"](5, seed)
        assert twenty.names[:5] == five.names and min(page["count"](five)) > 0
    assert page["drawn"](5, 0).names != page["drawn"](5, 1).names


def average_precision_by_numpy(found, boxes, labels, k):
    """Class k's, written out: the surest first, each takes the true box that it overlaps most, if half and still free."""
    rows, truths = [], 0
    for d, box, label in zip(found, boxes, labels, strict=True):
        true = box[label == k].double().numpy()
        truths += len(true)
        free = np.ones(len(true), bool)
        for b, score in zip(
            d.boxes[d.labels == k].double().numpy(), d.scores[d.labels == k], strict=True
        ):
            low, high = np.maximum(b[:2], true[:, :2]), np.minimum(b[2:], true[:, 2:])
            both = np.clip(high - low, 0, None).prod(1)
            over = both / ((b[2:] - b[:2]).prod() + (true[:, 2:] - true[:, :2]).prod(1) - both)
            over = np.where(free, over, 0)
            hit = len(true) > 0 and over.max() >= 0.5
            if hit:
                free[over.argmax()] = False
            rows.append((float(score), hit))
    hits = np.array([hit for _, hit in sorted(rows, key=lambda r: -r[0])], float).cumsum()
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / truths
    return np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])


def test_average_precision_is_that_written_out():
    data = scattered(12)
    expected = average_precision(*data, 3)
    for k in (0, 1):
        assert average_precision_by_numpy(*data, k) == pytest.approx(expected[k].item(), abs=1e-9)


@there
def test_a_number_of_the_record_is_found_again_by_numpy(small):
    """AP50 of platelets after ten photographs from scratch, seed 0: trained anew, judged without pycocotools."""
    small.setenv("MTLIB_SCALE", "full")
    page, kept = run_until("detection", "found"), recorded("detection").details["ways"]
    held = kept["ways"]["from scratch"]
    found, test = page["found"]("from scratch", held["setting"], 0, 10), page["TEST"]
    here = average_precision_by_numpy(found, test.boxes, test.labels, page["NEW"])
    assert agrees(here, held["columns"]["platelets, 10"]["runs"])
