"""A centre-point detector: objects as peaks of a heat-map, with no anchors and no suppression {cite}`zhou2019objects`.

Boxes are (x1, y1, x2, y2) in pixels. A map cell is `STRIDE` pixels wide. Prediction and target share one layout,
(B, C + 4, h, w): a heat-map for each of C classes (logits in the prediction), then at each centre the width and
height in cells and the offset (x, y) of the centre inside its cell. The target's width is 0 where no centre is, and a
heat-map of −1 marks a class that was not annotated.
"""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import Batch, Loss
from mtlib.models.efficientnet import efficientnet_lite0
from mtlib.nets import seeded
from mtlib.tasks import check_seed, finite, positive, within

STRIDE = 4
SPREAD = 0.12  # the standard deviation of a target's bump, in widths and heights of its box
LEAST = 0.6  # and at least this many cells


class Detections(NamedTuple):
    """The K objects found in one photograph, highest score first."""

    boxes: Tensor  # (K, 4) in pixels
    labels: Tensor  # (K,) class numbers
    scores: Tensor  # (K,) in (0, 1), highest first


class Judged(NamedTuple):
    """One class's detections at one IoU, over all photographs, highest score first."""

    photographs: Tensor  # (K,) where each detection was made
    hits: Tensor  # (K,) whether it found a box that none before it had found
    truths: Tensor  # (n,) boxes in each photograph


def detector(
    classes: int, width: int = 32, seed: int | None = None, rows: bool = False
) -> nn.Sequential:
    """A compact network: (B, 3, H, W) -> (B, C + 4, H/4, W/4). Its `head` is two layers, its `body` the rest.

    Group norm sees one photograph at a time, so that no prediction depends on its neighbours in the batch. With a `seed` it
    is drawn from that alone; with `rows` the maps of a photograph are one row, (B, (C + 4)·h·w), as `fit` takes them. Raises ValueError unless `width` is a multiple of 8.
    """
    positive(classes=classes, width=width)
    if width % 8:
        raise ValueError(f"expected a width that is a multiple of 8, for groups of 4, got {width}")

    half = width // 2
    with seeded(seed):
        strides = (_block(3, half, 2), _block(half, width, 2))
        context = (_block(width, width, dilation=d) for d in (1, 2, 4))
        body = nn.Sequential(*strides, *context)
        return nn.Sequential(
            OrderedDict(body=body, head=centre_head(width, classes, width, rows=rows))
        )


def centre_head(
    inputs: int, classes: int, width: int = 32, seed: int | None = None, rows: bool = False
) -> nn.Sequential:
    """The last two layers of `detector`, for feature maps made elsewhere: (B, `inputs`, h, w) -> (B, C + 4, h, w).

    A convolution of 3 × 3 with a group norm, and one of 1 × 1 whose biases begin at rare objects of three cells. Raises
    ValueError unless `width` is a multiple of 4.
    """
    positive(inputs=inputs, classes=classes, width=width)
    if width % 4:
        raise ValueError(f"expected a width that is a multiple of 4, for groups of 4, got {width}")
    with seeded(seed):
        block, last = _block(inputs, width), nn.Conv2d(width, classes + 4, 1)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        assert last.bias is not None
        last.bias.copy_(torch.tensor([-4.0] * classes + [3.0, 3.0, 0.5, 0.5]))
    return nn.Sequential(block, last, *[nn.Flatten()] * rows)


def _block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(4, outputs), nn.ReLU())


def feature_maps(images: Tensor, enlarged: int = 2, batch: int = 8) -> Tensor:
    """Frozen maps of photographs on the detector's cells, by EfficientNet-Lite0 with its ImageNet weights, for `centre_head`.

    (n, 3, H, W) in [0, 1] -> (n, 152, H/4, W/4): each photograph is `enlarged`, bilinearly; the network's maps of strides 8
    and 16, 40 and 112 channels, are brought to the cells, `STRIDE` pixels of the photograph as it was. Enlarged twice, a
    cell of the first is a cell of the detector. Raises what `efficientnet_lite0` raises where the weights are not there, and
    ValueError for images outside [0, 1] or of no whole number of cells.
    """
    positive(enlarged=enlarged, batch=batch)
    if images.ndim != 4 or images.shape[1] != 3 or any(n % STRIDE for n in images.shape[2:]):
        raise ValueError(
            f"expected photographs (n, 3, H, W) of whole cells of {STRIDE} pixels, got {tuple(images.shape)}"
        )
    net = efficientnet_lite0().to(images.device)
    cells = [n // STRIDE for n in images.shape[2:]]
    large = [n * enlarged for n in images.shape[2:]]
    parts = []
    with torch.no_grad():
        for part in images.split(batch):
            found = net.stages(_resized(part, large).clamp(0, 1), 16)
            parts.append(torch.cat([_resized(found[s], cells) for s in (8, 16)], 1))
    return torch.cat(parts)


def _resized(x: Tensor, size: list[int]) -> Tensor:
    same = list(x.shape[2:]) == size
    return x if same else nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def targets(boxes: Tensor, labels: Tensor, classes: int, height: int, width: int) -> Tensor:
    """The network's target for one photograph: (K, 4), (K,) -> (C + 4, H/4, W/4).

    Each box is a bump exp(−dx²/2σ_x² − dy²/2σ_y²) around its centre's cell, σ = `SPREAD` · width and height, no less
    than `LEAST` cells; where bumps of one class overlap the larger value counts. Raises ValueError for a box with no
    area or its centre outside, and for a label that is no class number.
    """
    _check_boxes([boxes], [labels], classes)
    size = boxes[:, 2:] - boxes[:, :2]
    if len(boxes) and not float(size.min()) > 0:
        raise ValueError(
            f"expected boxes with an area, got {boxes[~(size > 0).all(1)].tolist()}; drop them"
        )
    h, w = height // STRIDE, width // STRIDE
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE
    cell = centre.floor().long()
    if len(boxes) and not bool(((cell >= 0) & (cell < cell.new_tensor([w, h]))).all()):
        raise ValueError(
            f"expected centres inside {width}×{height} pixels, got boxes {boxes.tolist()[:3]}"
        )
    y = torch.zeros(classes + 4, h, w, device=boxes.device)
    rows, columns = (torch.arange(n, device=boxes.device) for n in (h, w))
    rows, columns = rows[:, None], columns[None]
    for (cx, cy), (bw, bh), k in zip(
        cell.tolist(), (size / STRIDE).tolist(), labels.tolist(), strict=True
    ):
        sx, sy = max(SPREAD * bw, LEAST), max(SPREAD * bh, LEAST)
        bump = torch.exp(-((columns - cx) ** 2) / (2 * sx**2) - (rows - cy) ** 2 / (2 * sy**2))
        y[k] = torch.maximum(y[k], bump)
    y[classes : classes + 2, cell[:, 1], cell[:, 0]] = size.mT / STRIDE
    y[classes + 2 :, cell[:, 1], cell[:, 0]] = (centre - cell).mT
    return y


def annotated(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    height: int,
    width: int,
    shown: Sequence[int] | None = None,
) -> Tensor:
    """`targets` of n photographs, (n, C + 4, h, w), on which only the classes `shown` were annotated; all, unless given.

    The heat-maps of the others are −1, which `centre_loss` leaves out: what nobody annotated is not absent. Raises
    ValueError for a class that there is not.
    """
    known = list(range(classes) if shown is None else shown)
    if not all(k in range(classes) for k in known):
        raise ValueError(f"expected classes from 0 to {classes - 1} to be shown, got {known}")
    _check_boxes(boxes, labels, classes)
    rows = []
    for b, k in zip(boxes, labels, strict=True):
        keep = torch.isin(k, torch.tensor(known, device=k.device))
        rows.append(targets(b[keep], k[keep], classes, height, width))
    y = torch.stack(rows)
    y[:, [k for k in range(classes) if k not in known]] = -1
    return y


def photographs(
    *sets: Batch, classes: int, batch: int = 4, seed: int = 0, vary: bool = True
) -> Photographs:
    """Batches of photographs from several annotated sets at once: `stream(step)` -> Batch of x (T, B, 3, H, W).

    A set has x (n, 3, H, W) and y (n, C + 4, h, w), as `annotated` makes it; the stream's y are their rows,
    (T, B, (C + 4)·h·w), as `fit` takes them and a detector with `rows=True` gives them. Two of three photographs are drawn
    because they show a class, each
    class in turn, so that a rare one is seen often; the others are drawn alike. With `vary` each batch of a set is mirrored
    at random, and each photograph's contrast and brightness change a little; feature maps go without. Raises ValueError for
    no set, or one whose targets do not fit.
    """
    positive(classes=classes, batch=batch)
    check_seed(seed)
    if not sets:
        raise ValueError("expected at least one set of photographs, got none")
    for x, y in sets:
        if x.ndim != 4 or y.ndim != 4 or y.shape[1] != classes + 4 or len(x) != len(y):
            raise ValueError(
                f"expected photographs (n, 3, H, W) and targets (n, C + 4, h, w) of {classes} + 4 channels, got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
    showing = []
    for _, y in sets:
        at = (y[:, :classes] == 1).nonzero()  # photograph, class, row, column: one for each object
        showing.append([at[at[:, 1] == k, 0] for k in at[:, 1].unique()])
    return Photographs(sets, showing, classes, batch, seed, vary)


@dataclass(frozen=True, eq=False)
class Photographs:
    """What `photographs` makes."""

    sets: tuple[Batch, ...]
    showing: list[list[Tensor]]  # for each set and class: the photograph of every object
    classes: int
    batch: int
    seed: int
    vary: bool

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        drawn = [self._some(*pair, rng) for pair in zip(self.sets, self.showing, strict=True)]
        x, y = (torch.stack(part) for part in zip(*drawn, strict=True))
        return Batch(x, y.flatten(2))

    def _some(
        self, data: Batch, showing: list[Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(rng.integers(len(data.x), size=self.batch))
        for b in np.flatnonzero(rng.random(self.batch) < 2 / 3) if showing else ():
            of = showing[b % len(showing)]
            rows[b] = of[rng.integers(len(of))]
        x, y = data.x[rows], data.y[rows]
        if not self.vary:
            return x, y
        for axis in (2, 3):
            if rng.random() < 0.5:
                x, y = flipped(x, y, self.classes, axis)
        gain, shift = (
            torch.from_numpy(rng.normal(scale=0.1, size=(self.batch, 3, 1, 1))).to(x)
            for _ in range(2)
        )
        return x * (1 + gain) + shift, y


def centre_loss(classes: int, size_weight: float = 0.1) -> Loss:
    """The centre-point objective, on (B, C + 4, h, w) -> scalar: focal + `size_weight` · |size| + |offset|.

    Focal, with p = sigmoid(logit), summed over a class's cells, divided by its number of centres (at least 1) and
    summed over classes, so that a rare class counts as much as an abundant one: −(1 − p)² log p where the target is
    1, −(1 − y)⁴ p² log(1 − p) elsewhere, 0 where it is −1 (not annotated). Sizes and offsets: L1, mean over centres.
    Maps may also come as rows, (B, (C + 4)·h·w): no term looks at a neighbour.
    """

    positive(classes=classes)
    within(0, size_weight=size_weight)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        channels = {d.shape[1] for d in (prediction, y) if d.ndim > 2}
        if prediction.shape != y.shape or channels - {classes + 4} or y[0].numel() % (classes + 4):
            raise ValueError(
                f"expected maps (B, C + 4, h, w) of {classes} + 4 channels, or their rows, got "
                f"{tuple(prediction.shape)} and {tuple(y.shape)}"
            )
        prediction, y = (a.reshape(len(a), classes + 4, -1) for a in (prediction, y))
        logit, heat = prediction[:, :classes], y[:, :classes]
        p = torch.sigmoid(logit)
        here = heat == 1
        found = (1 - p) ** 2 * nn.functional.logsigmoid(logit)
        empty = (1 - heat) ** 4 * p**2 * nn.functional.logsigmoid(-logit) * (heat >= 0)
        n = here.sum((0, 2)).clamp(min=1)  # (C,)
        focal = -(torch.where(here, found, empty).sum((0, 2)) / n).sum()
        centre = (y[:, classes : classes + 1] > 0).to(y)
        gap = (prediction[:, classes:] - y[:, classes:]).abs() * centre
        return focal + (size_weight * gap[:, :2].sum() + gap[:, 2:].sum()) / centre.sum().clamp(
            min=1
        )

    return loss


def decode(prediction: Tensor, classes: int, most: int = 100) -> list[Detections]:
    """Peaks of the heat-maps as boxes: (B, C + 4, h, w) -> at most `most` detections per photograph.

    A cell is a peak where none of its eight neighbours is higher; this replaces non-maximum suppression.
    """
    positive(classes=classes, most=most)
    if prediction.ndim != 4 or prediction.shape[1] != classes + 4:
        raise ValueError(
            f"expected maps (B, C + 4, h, w) with {classes} + 4 channels, got {tuple(prediction.shape)}"
        )
    finite(prediction, "the maps")
    heat = torch.sigmoid(prediction[:, :classes])
    peaks = heat * (nn.functional.max_pool2d(heat, 3, 1, 1) == heat)
    _, _, h, w = peaks.shape
    scores, at = peaks.flatten(1).topk(min(most, classes * h * w))
    found = []
    for maps, score, index in zip(prediction, scores, at, strict=True):
        label, place = index // (h * w), index % (h * w)
        row, column = place // w, place % w
        size = maps[classes : classes + 2, row, column].clamp(min=0.1)
        offset = maps[classes + 2 :, row, column]
        centre = torch.stack([column, row]) + offset
        boxes = STRIDE * torch.cat([centre - size / 2, centre + size / 2]).mT
        keep = score > 0
        found.append(Detections(boxes[keep], label[keep], score[keep]))
    return found


def find(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    classes: int,
    cells: tuple[int, int],
    batch: int = 12,
) -> list[Detections]:
    """What a detector finds on each of n photographs, or on their feature maps: `decode` of f(x), without a gradient.

    `f` gives maps (B, C + 4, h, w) or their rows, such as `partial(learner.predict, theta)` or a network; `cells` are (h, w).
    Raises ValueError where it gives other maps.
    """
    positive(batch=batch, h=cells[0], w=cells[1])
    found: list[Detections] = []
    with torch.no_grad():
        for part in x.split(batch):
            maps = f(part)
            if maps[0].numel() != (classes + 4) * cells[0] * cells[1]:
                raise ValueError(
                    f"expected maps of {classes} + 4 channels and {cells[0]}×{cells[1]} cells, got {tuple(maps.shape)}"
                )
            found += decode(maps.reshape(len(part), classes + 4, *cells).cpu(), classes)
    return found


def flipped(x: Tensor, y: Tensor, classes: int, axis: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and their targets (B, C + 4, h, w), mirrored along `axis`: 2 the rows, 3 the columns.

    A centre at offset o in its cell moves to 1 − o. H and W are whole numbers of cells.
    """
    if axis not in (2, 3):
        raise ValueError(f"expected axis 2 (the rows) or 3 (the columns), got {axis!r}")
    if x.ndim != 4 or y.ndim != 4 or y.shape[1] != classes + 4 or len(x) != len(y):
        raise ValueError(
            f"expected images (B, 3, H, W) and targets (B, C + 4, h, w) with {classes} + 4 channels, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.flip(axis), y.flip(axis)
    offset = classes + (3 if axis == 2 else 2)
    y[:, offset] = torch.where(y[:, classes] > 0, 1 - y[:, offset], 0)
    return x, y


def average_precision(
    found: list[Detections],
    boxes: list[Tensor],
    labels: list[Tensor],
    classes: int,
    iou: float = 0.5,
) -> Tensor:
    """Average precision of each class at one IoU, by pycocotools: (C,), NaN for a class with no box.

    `found`, `boxes` and `labels` have one entry per photograph. A box counts as found once; at most 100 detections
    per photograph count.
    """
    _check_photographs(found, boxes, labels, classes, iou)
    judge = _evaluated(found, boxes, labels, classes, iou)
    if judge is None:
        counts = torch.bincount(torch.cat(labels).cpu(), minlength=classes)
        return torch.where(counts > 0, 0.0, torch.nan)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        judge.accumulate()
    precision = torch.as_tensor(judge.eval["precision"])[0, :, :, 0, -1]  # (recalls, C)
    return torch.where(precision[0] < 0, torch.nan, precision.mean(0))


def judge(
    found: list[Detections],
    boxes: list[Tensor],
    labels: list[Tensor],
    classes: int,
    iou: float = 0.5,
) -> list[Judged]:
    """Which detections pycocotools counts as hits, class by class: what `resampled` needs of the photographs."""
    _check_photographs(found, boxes, labels, classes, iou)
    truths = torch.stack([torch.bincount(k.cpu(), minlength=classes) for k in labels])  # (n, C)
    held = _evaluated(found, boxes, labels, classes, iou)
    judged = []
    for k in range(classes):
        rows = [e for e in held.evalImgs if e and e["category_id"] == k] if held else []
        scores = np.concatenate([e["dtScores"] for e in rows] or [[]])
        hits = np.concatenate([e["dtMatches"][0] > 0 for e in rows] or [[]])
        at = np.repeat([e["image_id"] for e in rows], [len(e["dtScores"]) for e in rows])
        order = np.argsort(-scores, kind="stable")
        at, hits = (np.asarray(a, int)[order] for a in (at, hits))
        judged.append(Judged(torch.from_numpy(at), torch.from_numpy(hits), truths[:, k]))
    return judged


def resampled(judged: Judged, counts: Tensor) -> Tensor:
    """Average precision where photograph i counts `counts[r, i]` times: (R, n) -> (R,); NaN where no box is left.

    With counts of 1 it is `average_precision`; with those of a bootstrap, its distribution over photographs. As
    there, the precision at each of 101 recalls is the best at that recall or a higher one.
    """
    if counts.ndim != 2 or counts.shape[1] != len(judged.truths):
        raise ValueError(
            f"expected counts (R, n) of n = {len(judged.truths)} photographs, got {tuple(counts.shape)}"
        )
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(
            f"expected counts of at least 0, got {counts.min().item():g} for the smallest"
        )
    counts = counts.cpu().double()
    weight = counts[:, judged.photographs]  # (R, K)
    hits, all_ = (weight * judged.hits).cumsum(1), weight.cumsum(1)
    truths = counts @ judged.truths.double()  # (R,)
    recall = hits / truths[:, None]
    precision = hits / all_.clamp(min=1)
    best = precision.flip(1).cummax(1).values.flip(1) if precision.shape[1] else precision
    best = torch.cat([best, best.new_zeros(len(best), 1)], 1)  # beyond the last recall: 0
    levels = torch.from_numpy(np.tile(np.linspace(0, 1, 101), (len(recall), 1)))
    at = torch.searchsorted(recall.nan_to_num().contiguous(), levels)
    return torch.where(truths > 0, best.gather(1, at).mean(1), torch.nan)


def by_photograph(judged: Judged) -> Tensor:
    """Average precision as one number a photograph, (n,), for intervals and paired differences over photographs.

    The jackknife's pseudo-values, n A − (n − 1) A₋ᵢ, where A₋ᵢ is the average precision without photograph i. For a mean
    they are its terms; here a bootstrap of their mean is one of the average precision, to first order, and two detectors
    are compared photograph by photograph. Raises ValueError for fewer than two photographs. {cite}`efron1981jackknife`
    """
    n = len(judged.truths)
    if n < 2:
        raise ValueError(f"expected at least two photographs, got {n}")
    whole, without = resampled(judged, torch.cat([torch.ones(1, n), 1 - torch.eye(n)])).split(
        [1, n]
    )
    each: Tensor = n * whole - (n - 1) * without
    return each


def precision_recall(judged: Judged) -> tuple[Tensor, Tensor]:
    """Recall and precision after each detection, the surest first: (K,), (K,). What `resampled` averages.

    Precision is as found, not yet the best at that recall or a higher one.
    """
    hits = judged.hits.double().cumsum(0)
    tried = torch.arange(1, len(hits) + 1, dtype=hits.dtype)
    return hits / judged.truths.sum().clamp(min=1), hits / tried


def caught(
    found: list[Detections],
    boxes: list[Tensor],
    labels: list[Tensor],
    classes: int,
    iou: float = 0.5,
) -> list[Tensor]:
    """For each class, a row for each of its boxes, (n, 2): its size, and the score of the detection that found it.

    The size is √(width · height) in pixels; the score is 0 where nothing found the box. What is missed, by size: rows
    whose score is below the one at which detections are shown. Matched by pycocotools, as in `average_precision`.
    """
    _check_photographs(found, boxes, labels, classes, iou)
    held = _evaluated(found, boxes, labels, classes, iou)
    rows: list[list[list[float]]] = [[] for _ in range(classes)]
    if held is None:
        for b, k in zip(boxes, labels, strict=True):
            for box, label in zip(b, k.tolist(), strict=True):
                rows[label].append([_area(box) ** 0.5, 0.0])
    for e in (e for e in held.evalImgs if e) if held else ():
        score = dict(zip(e["dtIds"], e["dtScores"], strict=True))
        for truth, by in zip(e["gtIds"], e["gtMatches"][0], strict=True):
            size = held.cocoGt.anns[truth]["area"] ** 0.5
            rows[e["category_id"]].append([size, score.get(int(by), 0.0)])
    return [torch.tensor(r, dtype=torch.float64).reshape(-1, 2) for r in rows]


def missed_by_size(caught: Tensor, least: float = 0.3, parts: int = 3) -> tuple[Tensor, Tensor]:
    """The boxes of one class in `parts` groups from small to large: their mean sizes, and the share that was missed.

    `caught` (n, 2) has each box's size and the score of what found it; a box is missed below the score `least`. Groups are
    of equal numbers, up to one. Raises ValueError for fewer boxes than parts.
    """
    positive(parts=parts)
    within(0, 1, least=least)
    if caught.ndim != 2 or caught.shape[1] != 2 or len(caught) < parts:
        raise ValueError(
            f"expected sizes and scores (n, 2) of at least {parts} boxes, got {tuple(caught.shape)}"
        )
    groups = caught[caught[:, 0].argsort(stable=True)].tensor_split(parts)
    sizes = torch.stack([g[:, 0].mean() for g in groups])
    return sizes, torch.stack([(g[:, 1] < least).to(g).mean() for g in groups])


def _evaluated(
    found: list[Detections],
    boxes: list[Tensor],
    labels: list[Tensor],
    classes: int,
    iou: float,
) -> Any:
    """pycocotools' evaluation, matched and not yet accumulated; None if nothing was detected."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [
        {"image_id": i, "category_id": int(k), "bbox": _xywh(b), "area": _area(b), "iscrowd": 0}
        for i, pair in enumerate(zip(boxes, labels, strict=True))
        for b, k in zip(*pair, strict=True)
    ]
    predicted = [
        {"image_id": i, "category_id": int(k), "bbox": _xywh(b), "score": float(s)}
        for i, d in enumerate(found)
        for b, k, s in zip(*d, strict=True)
    ]
    if not predicted:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(boxes))],
            "annotations": [{"id": n, **t} for n, t in enumerate(truth, start=1)],
            "categories": [{"id": k} for k in range(classes)],
        }
        coco.createIndex()
        held: Any = COCOeval(coco, coco.loadRes(predicted), "bbox")
        held.params.iouThrs, held.params.maxDets = [iou], [100]
        held.params.areaRng, held.params.areaRngLbl = held.params.areaRng[:1], ["all"]
        held.evaluate()
    return held


def _check_photographs(
    found: list[Detections],
    boxes: list[Tensor],
    labels: list[Tensor],
    classes: int,
    iou: float,
) -> None:
    within(1e-6, 1, iou=iou)
    if not len(found) == len(boxes) == len(labels) or not boxes:
        raise ValueError(
            f"expected one entry per photograph, at least one, got {len(found)} of found, {len(boxes)} of boxes and "
            f"{len(labels)} of labels"
        )
    _check_boxes(boxes, labels, classes)


def _check_boxes(boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int) -> None:
    """Raise unless each photograph has finite boxes (K, 4) and as many class numbers (K,)."""
    positive(classes=classes)
    for b, k in zip(boxes, labels, strict=True):
        if b.ndim != 2 or b.shape[1] != 4 or k.shape != (len(b),):
            raise ValueError(
                f"expected boxes (K, 4) and one label per box (K,), got {tuple(b.shape)} and {tuple(k.shape)}"
            )
        if not bool(torch.isfinite(b).all()):
            raise ValueError(f"expected boxes of finite numbers, got {b.tolist()}")
        if k.is_floating_point() or not bool(((k >= 0) & (k < classes)).all()):
            raise ValueError(f"expected class numbers from 0 to {classes - 1}, got {k.tolist()}")


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _area(box: Tensor) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
