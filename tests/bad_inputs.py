"""Everyday mistakes, by the function that meets them: what was called, and what its message must name.

`BAD[name] = (call, words)`: `call()` raises ValueError, TypeError or a Warning from our own code that matches `words`.
Where doing the right thing is possible, `words` is a check of the result instead. `OPEN` has what is not met so yet;
`python tests/bad_inputs.py` says what has changed.
"""

from __future__ import annotations

import copy
import re
import traceback
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import (
    annealed,
    at,
    bilevel,
    checkpointed,
    conjugate_gradient,
    first_order,
    implicit,
    multi_step,
    neumann,
    secant,
    sharpness,
    unrolled,
)
from mtlib.book import (
    arriving,
    cold_start,
    generalising,
    merging,
    pictures,
    sentences,
    training,
    yours,
)
from mtlib.book import directions as adaptation
from mtlib.book import tables as small_tables
from mtlib.book.across import Across, Rival
from mtlib.book.benchmarked import (
    fastest,
    gain,
    in_turns,
    reference,
    reports,
    spent_by_kind,
    straight,
)
from mtlib.book.checks import differences, error_and_cosine, gradient, gradients, hessian
from mtlib.book.choices import Tuning, over_units
from mtlib.book.contest import Trial, Way, alphabets, conclude, contest, measured
from mtlib.book.contest import folds as in_a_row
from mtlib.book.drawings import bowls, drawn_episodes
from mtlib.book.hand import End, Question, by_labels, inner_steps, path
from mtlib.book.heads import Heads, linear_net
from mtlib.book.launching import launched
from mtlib.book.page import claim, equal, glue, recorded_claim, scale, source, table
from mtlib.book.results import (
    Entry,
    Paired,
    Result,
    agrees,
    kept,
    made,
    paired,
    record,
    recorded,
    row,
)
from mtlib.book.results import write as write_result
from mtlib.book.ways import crossed, on_curves
from mtlib.book.weighing import noisy, questions, worlds
from mtlib.core import (
    Batch,
    Episode,
    apply,
    below,
    classify,
    features,
    half,
    load,
    move,
    net_state,
    over,
    parameters,
    require,
    risk,
    rows,
    start,
    take,
)
from mtlib.data import (
    bccd,
    characters,
    clinc,
    digits,
    grocery,
    heart,
    motifs,
    movietweetings,
    omniglot,
    own,
    tf_binding,
)
from mtlib.data import tables as made_up
from mtlib.data.crates import crates
from mtlib.data.download import Remote, digest_of, fetch, members
from mtlib.data.glyphs import glyphs
from mtlib.data.linear import (
    around,
    best_plane,
    directions,
    error_after,
    exact_stream,
    linear_tasks,
    losses_at_rest,
    planes,
    resting,
    samples,
    spanned,
)
from mtlib.data.navigation import best_return, every_draw, line_return, line_walks, navigation
from mtlib.data.planted import planted, turned
from mtlib.data.scenes import scenes
from mtlib.data.sentiment import drawn as drawn_site
from mtlib.data.sentiment import draws, with_share
from mtlib.data.sentiment import read as read_site
from mtlib.data.sentiment import tested as tested_rows
from mtlib.data.sinusoids import (
    best_linear,
    best_possible,
    named_sinusoids,
    noisy_sinusoids,
    risk_of,
    side_by_side,
    sinusoids,
    varied_sinusoids,
)
from mtlib.evaluate import (
    accuracy,
    answers,
    at_edge,
    best_of,
    compare,
    evaluate,
    interval,
    over_classes,
    over_clusters,
    over_seeds,
)
from mtlib.joint import joint, own_columns, risks, toward
from mtlib.learners import hyper, optimizer
from mtlib.learners.amortised import attentive_cnp, cnp, gaussian_nll, in_context, point
from mtlib.learners.closed_form import (
    alpaca,
    anil_at_once,
    bayesian,
    crammer_singer,
    head_matrix,
    heads_prior,
    metaoptnet,
    r2d2,
    ridge,
    ridge_on,
    ridge_prior,
    ridge_residual,
    ridge_solution,
    ridge_toward,
    shared_features,
)
from mtlib.learners.context import cavia, protomaml
from mtlib.learners.finetune import (
    as_is,
    bss,
    delta,
    discriminative,
    finetune,
    folds,
    fresh_head,
    gradual,
    l2_sp,
    layers,
    linear_probe,
    logistic_head,
    lowest,
    lp_ft,
    spectral_sum,
)
from mtlib.learners.gradient import (
    adam,
    anil,
    boil,
    descend,
    descending,
    descent,
    inner_loop,
    maml,
    minibatches,
    momentum,
    moving,
    part_of,
    proximal,
    proximity,
    step,
)
from mtlib.learners.lora import adapters, attach, lora, lora_net, merged, targeted
from mtlib.learners.metric import (
    above,
    baseline_plus_plus,
    body_of,
    centred,
    class_means,
    contrastive,
    cosine_head,
    cosines,
    feat,
    linear_head,
    matching,
    protonet,
    relation,
    set_to_set,
    simpleshot,
    squared_distances,
    whitening,
    width,
)
from mtlib.learners.policy import (
    Constant,
    log_normal,
    policy_gradient,
    with_sampling,
)
from mtlib.learners.preconditioned import along, learned, meta_curvature, meta_sgd, per_step_rates
from mtlib.learners.transductive import bd_cspn, entropy_finetune, laplacian_shot, nearest
from mtlib.metrics import auroc, macro_f1, ndcg, recall_at
from mtlib.models.backbones import ReadImages, pretrained, split
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
    feature_maps,
    find,
    flipped,
    judge,
    missed_by_size,
    resampled,
    targets,
)
from mtlib.models.detection import photographs as stream_of_photographs
from mtlib.models.efficientnet import EfficientNetLite0, before, last, pooled, seen
from mtlib.models.encoders import encoded, hashed, minilm, small_bert
from mtlib.nets import (
    Harmonics,
    Widths,
    conv2,
    conv4,
    expanded,
    mlp,
    normed,
    policy_net,
    residual,
    seeded,
    two_halves,
    wrap,
    zero_linear,
)
from mtlib.norm import Norm, calibrate, moments
from mtlib.objective import count, over_tasks, whole
from mtlib.plots import (
    against,
    band,
    bars,
    by_group,
    calibration,
    confusion,
    curves,
    decision,
    dots,
    figure,
    framed,
    lines,
    losses,
    roc,
    scores,
    style,
    styles,
)
from mtlib.run.ahead import ahead
from mtlib.run.checkpoint import load_params, read, save_params
from mtlib.run.checkpoint import write as write_checkpoint
from mtlib.run.cost import peak_memory
from mtlib.run.devices import double
from mtlib.run.processes import part, processes
from mtlib.run.progress import bar
from mtlib.run.replay import replay
from mtlib.run.threads import on_threads
from mtlib.tasks import (
    ClassSet,
    check_classes,
    check_draw,
    check_rows,
    check_seed,
    cut,
    episodes,
    finite,
    mixture,
    one_hot,
    pool,
    positive,
    quiz,
    relabelled,
    uneven,
    within,
)
from mtlib.train import Diverged, Run, cosine_adam, fit, groups, rising_adam
from mtlib.transfer import (
    align,
    averaging,
    critics,
    recalibration,
    selection,
    test_time,
    transferability,
    unseen,
    weights,
)
from mtlib.transfer.unseen import scale_slope

NAN, INF = float("nan"), float("inf")
DATA = planted(8, 6, seed=0)
NET = mlp(30, (8,), 5, seed=0)
OTHER = mlp(30, (6,), 5, seed=0)
STREAM = episodes(DATA, 5, 1, 2, tasks=2, seed=0)
DRAW = STREAM(0)
SUPPORT, QUERY = take(DRAW.support, 0), take(DRAW.query, 0)
BATCHES = quiz(STREAM)
BATCH = BATCHES(0)  # (2, 10, 30), (2, 10, 5)
LEARNER = maml(NET, cross_entropy, 0.1, 1)
PHI = parameters(NET)
OBJECTIVE = bilevel(LEARNER, cross_entropy)
JOINT = joint(NET, cross_entropy)
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 30)), 4)
DATASET = torch.utils.data.TensorDataset(torch.zeros(8, 30), torch.arange(8))
ROWS = Batch(torch.rand(8, 30), torch.arange(8) % 5)
Z = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(12) % 3
ONE_TABLE = {
    "one": small_tables.Table(np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2, "")
}
USERS = cold_start.Users(torch.ones(8, 1), torch.ones(8, 1), np.array([0]), np.array([8]))
LABELLED = (torch.eye(3).repeat(4, 1), np.arange(12) % 3)
SAID = sentences.Said(LABELS, LABELS == 0, torch.rand(12), torch.rand(12))
SENTENCES = sentences.Sentences(torch.rand(62, 4), torch.rand(62, 4), 5, 2, 6, {"val": 2}, 1, 4)
SCORE = interval(torch.tensor([0.5, 0.6, 0.7]), draw=1.0)


class Squared(nn.Module):
    """A weight and a bias of one shape, and no norm: (x w + b)²."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return (x * self.weight + self.bias) ** 2


NUMBERS = SUPPORT._replace(y=SUPPORT.y.argmax(1))
NO_BIAS = two_halves(NET.body, nn.Linear(8, 5, bias=False))
PICTURES = two_halves(
    nn.Sequential(nn.LayerNorm((2, 2, 2)), nn.Flatten()), nn.Linear(8, 5)
)  # (2, 2, 2) numbers each
DEEP = two_halves(NET.body, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)))
CRITIC = nn.Linear(8, 2)
RESULT = Result(
    "a", "A", "x", True, "l", "p", "d", (Entry("a", "meta", 0.1, 0.1),), Paired("a", "a", 0, 0, 0)
)
RUN = Run({}, [0.3, 0.2, 0.1], 1.0)


def fitted(stream=STREAM, objective=OBJECTIVE, phi=PHI, steps=2, **options):
    return fit(objective, phi, stream, steps, progress=False, **options)


def scored(learner=LEARNER, phi=PHI, stream=STREAM, n=4, **options):
    return evaluate(learner, phi, stream, n, progress=False, **options)


def changed(**parts):
    """A stream whose support set has one part replaced."""

    def stream(step):
        draw = STREAM(step)
        return draw._replace(support=replaced(draw.support, **parts))

    return stream


def replaced(batch, **parts):
    return batch._replace(**{k: f(getattr(batch, k)) for k, f in parts.items()})


def later(change, at=1, stream=STREAM):
    """A stream that is good until step `at`."""
    return lambda step: stream(step) if step < at else change(stream(step))


def with_items(f):
    return DATA._replace(items=f(DATA.items.clone()))


def put(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def gives(net, support=SUPPORT, make=None, phi=None, query=None):
    """A learner's prediction, from its own φ unless one is given."""
    learner = make(net)
    theta = learner.adapt(learner.init() if phi is None else phi, support)
    return learner.predict(theta, QUERY.x if query is None else query)


def on_axes(draw):
    import matplotlib

    matplotlib.use("Agg")
    with figure() as (_, axes):
        return draw(axes)


def backbone():
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 9),
        )
    )


def photographs(n=2):
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    found = [Detections(box, torch.tensor([0]), torch.tensor([0.9])) for _ in range(n)]
    return found, [box] * n, [torch.tensor([0])] * n


class Sum(nn.Module):
    """A network that takes two inputs."""

    def forward(self, a, b):
        return a + b


LEARNERS: dict[str, Callable[[Any], Any]] = {
    "maml": lambda net: maml(net, cross_entropy, 0.1, 1),
    "anil": lambda net: anil(net, cross_entropy, 0.1, 1),
    "boil": lambda net: boil(net, cross_entropy, 0.1, 1),
    "as_is": as_is,
    "finetune": lambda net: finetune(net, cross_entropy, 0.1, 1),
    "linear_probe": linear_probe,
    "lp_ft": lambda net: lp_ft(net, cross_entropy, 0.1, 1),
    "protonet": protonet,
    "matching": matching,
    "relation": relation,
    "baseline_plus_plus": lambda net: baseline_plus_plus(net, cross_entropy, 0.1, 1),
    "simpleshot": simpleshot,
    "feat": feat,
    "ridge": ridge,
    "r2d2": r2d2,
    "bayesian": bayesian,
    "alpaca": alpaca,
    "anil_at_once": lambda net: anil_at_once(net, 0.1, 2),
    "metaoptnet": metaoptnet,
    "cavia": lambda net: cavia(net, cross_entropy, 0.1, 1),
    "protomaml": lambda net: protomaml(net, cross_entropy, 0.1, 1),
    "lora": lambda net: lora(net, cross_entropy, 0.1, 1),
    "meta_sgd": lambda net: meta_sgd(net, cross_entropy, 0.1, 1),
    "per_step_rates": lambda net: per_step_rates(net, cross_entropy, 0.1, 1),
    "meta_curvature": lambda net: meta_curvature(net, cross_entropy, 0.1, 1),
    "entropy_finetune": lambda net: entropy_finetune(net, cross_entropy, 0.1, 1),
    "bd_cspn": bd_cspn,
    "laplacian_shot": laplacian_shot,
    "cnp": cnp,
    "attentive_cnp": attentive_cnp,
    "in_context": in_context,
    "weight_decay": lambda net: hyper.weight_decay(net, cross_entropy, 0.1, 1),
    "reweighted": lambda net: hyper.reweighted(net, cross_entropy, 0.1, 1, 5),
}
"""Each learner from a network alone."""


def fault(name: str) -> str:
    """What is wrong with how a bad input is met, or "" where nothing is."""
    call, expected = BAD[name]
    try:
        found = call()
    except Exception as error:
        text, last = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        got = f"{type(error).__name__}: {text[:200]}"
        if callable(expected) or not isinstance(error, ValueError | TypeError | Warning | Diverged):
            return got
        if "mtlib" not in last or "site-packages" in last:
            return f"not our own error: {got}"
        if not re.search("expect|cannot read|damaged|NaN or infinite", text):
            return f"not our own words: {got}"
        return "" if re.search(expected, text) else f"expected {expected!r} in {got}"
    if callable(expected):
        return "" if expected(found) else "another result"
    return "nothing was said"


BAD: dict[str, tuple[Callable[[], Any], str | Callable[[Any], bool]]] = {}
"""name -> (call, words)."""

# tasks -----------------------------------------------------------------------------------------

BAD |= {
    "episodes: too few items for the shots": (
        lambda: episodes(DATA, 5, 4, 3, 2, 0),
        r"expected shots \+ queries ≤ 6",
    ),
    "episodes: more ways than classes": (
        lambda: episodes(DATA, 9, 1, 1, 2, 0),
        "expected at most 8 ways",
    ),
    "episodes: no shots": (
        lambda: episodes(DATA, 5, 0, 1, 2, 0),
        "expected shots to be a whole number of at least 1",
    ),
    "episodes: a fraction of a way": (
        lambda: episodes(DATA, 2.5, 1, 1, 2, 0),
        "expected ways to be a whole number",
    ),
    "episodes: True tasks": (lambda: episodes(DATA, 5, 1, 1, True, 0), "whole number"),
    "episodes: no seed": (lambda: episodes(DATA, 5, 1, 1, 2, None), "seed"),
    "episodes: a negative seed": (lambda: episodes(DATA, 5, 1, 1, 2, -1), "seed"),
    "episodes: a seed with a fraction": (lambda: episodes(DATA, 5, 1, 1, 2, 0.5), "seed"),
    "episodes: a tensor for the class set": (
        lambda: episodes(DATA.items, 5, 1, 1, 2, 0),
        "expected a ClassSet",
    ),
    "episodes: a batch for the class set": (
        lambda: episodes(ROWS, 5, 1, 1, 2, 0),
        "expected a ClassSet",
    ),
    "episodes: a torch data set": (
        lambda: episodes(DATASET, 5, 1, 1, 2, 0),
        "expected a ClassSet",
    ),
    "episodes: numpy items": (
        lambda: episodes(with_items(lambda d: d.numpy()), 5, 1, 1, 2, 0),
        "torch.from_numpy|as_tensor",
    ),
    "episodes: NaN in the data": (
        lambda: episodes(with_items(lambda d: put(d, (3, 2, 1), NAN)), 5, 1, 1, 2, 0),
        r"1 are NaN or infinite, the first at \[3, 2, 1\]",
    ),
    "episodes: infinity in the data": (
        lambda: episodes(with_items(lambda d: put(d, (0, 0, 0), INF)), 5, 1, 1, 2, 0),
        "finite numbers",
    ),
    "episodes: complex items": (
        lambda: episodes(with_items(lambda d: d + 1j), 5, 1, 1, 2, 0),
        "real numbers|complex",
    ),
    "episodes: images of bytes": (
        lambda: episodes(with_items(lambda d: d.byte()), 5, 1, 1, 2, 0)(0),
        lambda draw: draw.support.x.dtype == torch.uint8 and draw.support.y.dtype == torch.float32,
    ),
    "episodes: integer tokens": (
        lambda: episodes(with_items(lambda d: d.long()), 5, 1, 1, 2, 0)(0),
        lambda draw: draw.query.x.dtype == torch.int64 and draw.query.y.dtype == torch.float32,
    ),
    "episodes: items without classes": (
        lambda: episodes(ClassSet(torch.zeros(9, 4), ["a"] * 9, "flat"), 5, 1, 1, 2, 0),
        "expected items of shape",
    ),
    "episodes: no classes at all": (
        lambda: episodes(ClassSet(torch.zeros(0, 4, 3), [], "none"), 5, 1, 1, 2, 0),
        "at least one class|at most 0 ways",
    ),
    "episodes: names that do not fit": (
        lambda: episodes(DATA._replace(names=["a"]), 5, 1, 1, 2, 0),
        "one name per class",
    ),
    "episodes: a class twice": (
        lambda: episodes(DATA._replace(names=["a"] * 8), 5, 1, 1, 2, 0),
        "different names",
    ),
    "ClassSet.select: a class that is not there": (
        lambda: DATA.select([0, 8]),
        "expected .*from 0 to 7",
    ),
    "ClassSet.select: names for numbers": (
        lambda: DATA.select(["planted0/class000"]),
        "expected .*indices",
    ),
    "ClassSet.select: a mask": (
        lambda: DATA.select(torch.arange(8) < 3),
        lambda data: len(data.items) == len(data.names) == 3,
    ),
    "ClassSet.select: one class twice": (
        lambda: episodes(DATA.select([1, 1]), 2, 1, 1, 2, 0),
        "different names",
    ),
    "mixture: no data": (lambda: mixture(batch=2, seed=0), "at least one data set"),
    "mixture: no batch": (lambda: mixture(ROWS, batch=0, seed=0), "whole number of at least 1"),
    "mixture: a fraction of an item": (lambda: mixture(ROWS, batch=2.5, seed=0), "whole number"),
    "mixture: no seed": (lambda: mixture(ROWS, batch=2, seed=None), "seed"),
    "mixture: a data loader": (lambda: mixture(LOADER, batch=2, seed=0), "expected .*Batch"),
    "mixture: a torch data set": (lambda: mixture(DATASET, batch=2, seed=0), "expected .*Batch"),
    "mixture: a list of data sets": (
        lambda: mixture([ROWS, ROWS], batch=2, seed=0),
        "expected .*Batch",
    ),
    "mixture: numpy arrays": (
        lambda: mixture(Batch(ROWS.x.numpy(), ROWS.y.numpy()), batch=2, seed=0),
        "torch.from_numpy|as_tensor",
    ),
    "mixture: labels in a list": (
        lambda: mixture(Batch(ROWS.x, ROWS.y.tolist()), batch=2, seed=0),
        "expected .*tensor",
    ),
    "mixture: mixed shapes of items": (
        lambda: mixture(ROWS, replaced(ROWS, x=lambda x: x[:, :2]), batch=2, seed=0),
        "expected items of the same shape",
    ),
    "mixture: mixed dtypes of items": (
        lambda: mixture(ROWS, replaced(ROWS, x=lambda x: x.double()), batch=2, seed=0)(0),
        "same dtype",
    ),
    "mixture: labels and items of two lengths": (
        lambda: mixture(Batch(torch.zeros(4, 3), torch.zeros(5, 1)), batch=2, seed=0),
        "as many labels as items",
    ),
    "mixture: regression targets without an axis": (
        lambda: mixture(Batch(torch.zeros(4, 3), torch.zeros(4)), batch=2, seed=0),
        r"write y\[:, None\]",
    ),
    "mixture: targets of two widths": (
        lambda: mixture(
            Batch(torch.zeros(4, 3), torch.zeros(4, 1)),
            Batch(torch.zeros(4, 3), torch.zeros(4, 2)),
            batch=2,
            seed=0,
        ),
        "targets of the same width",
    ),
    "mixture: class numbers mixed with targets": (
        lambda: mixture(
            Batch(torch.zeros(4, 3), torch.zeros(4, 1)),
            Batch(torch.zeros(4, 3), torch.zeros(4).long()),
            batch=2,
            seed=0,
        ),
        "or targets .* in every one; got both",
    ),
    "mixture: a label of −1": (
        lambda: mixture(replaced(ROWS, y=lambda y: put(y, 0, -1)), batch=2, seed=0),
        "class numbers .*from 0 on",
    ),
    "mixture: NaN in x": (
        lambda: mixture(replaced(ROWS, x=lambda x: put(x, (0, 1), NAN)), batch=2, seed=0),
        "finite numbers in x",
    ),
    "mixture: NaN in y": (
        lambda: mixture(Batch(torch.zeros(4, 3), torch.full((4, 1), NAN)), batch=2, seed=0),
        "finite numbers in y",
    ),
    "mixture: integer one-hot rows": (
        lambda: mixture(replaced(ROWS, y=lambda y: one_hot(y, 5).long()), batch=2, seed=0)(0),
        "floating-point y",
    ),
    "mixture: boolean one-hot rows": (
        lambda: mixture(replaced(ROWS, y=lambda y: one_hot(y, 5).bool()), batch=2, seed=0)(0),
        "floating-point y",
    ),
    "mixture: class numbers of 32 bits": (
        lambda: mixture(replaced(ROWS, y=lambda y: y.int()), batch=2, seed=0)(0),
        "int64",
    ),
    "mixture: integer tokens": (
        lambda: mixture(replaced(ROWS, x=lambda x: x.long()), batch=2, seed=0)(0),
        lambda draw: draw.y.dtype == torch.float32 and check_draw(draw) is None,
    ),
    "mixture: items without an axis": (
        lambda: mixture(Batch(torch.zeros(4), torch.zeros(4, 1)), batch=2, seed=0),
        r"x .*\(n, \*item\)",
    ),
    "mixture: no items": (
        lambda: mixture(Batch(torch.zeros(0, 3), torch.zeros(0, 1)), batch=2, seed=0),
        "0 items",
    ),
    "pool: a tensor": (lambda: pool(DATA.items), "expected a ClassSet"),
    "pool: numpy items": (
        lambda: pool(with_items(lambda d: d.numpy())),
        "torch.from_numpy|as_tensor",
    ),
    "one_hot: a class beyond the ways": (
        lambda: one_hot(torch.tensor([0, 5]), 5),
        "expected class numbers from 0 to 4",
    ),
    "one_hot: a label of −1": (
        lambda: one_hot(torch.tensor([0, -1]), 5),
        "expected class numbers from 0 to 4",
    ),
    "one_hot: real labels": (lambda: one_hot(torch.tensor([0.0, 1.0]), 2), "integers|int64"),
    "one_hot: a list": (lambda: one_hot([0, 1], 2), "expected .*tensor"),
    "one_hot: bytes": (
        lambda: one_hot(torch.tensor([1, 0], dtype=torch.uint8), 2),
        lambda y: y.tolist() == [[0, 1], [1, 0]],
    ),
    "one_hot: no ways": (lambda: one_hot(torch.tensor([0]), 0), "whole number of at least 1"),
    "quiz: an episode for the stream": (lambda: quiz(DRAW), "stream"),
    "quiz: a data loader": (lambda: quiz(LOADER), "stream"),
    "quiz: batches": (lambda: quiz(BATCHES)(0), "expected a stream of episodes"),
    "check_draw: an episode of lists": (
        lambda: check_draw(Episode(([1], [2]), ([1], [2]))),
        "to be a Batch of two tensors",
    ),
    "check_draw: numpy": (
        lambda: check_draw(Batch(BATCH.x.numpy(), BATCH.y.numpy())),
        "tensors.*numpy|ndarray",
    ),
    "check_draw: one task without its axis": (
        lambda: check_draw(take(DRAW, 0)),
        r"expected x \(T, rows",
    ),
    "check_draw: boolean masks for labels": (
        lambda: check_draw(replaced(BATCH, y=lambda y: y.bool())),
        "floating-point y",
    ),
    "check_draw: complex x": (lambda: check_draw(replaced(BATCH, x=lambda x: x + 1j)), "complex"),
    "check_draw: support and query of different tasks": (
        lambda: check_draw(
            DRAW._replace(query=replaced(DRAW.query, x=lambda x: x[:1], y=lambda y: y[:1]))
        ),
        "tasks",
    ),
    "check_draw: no rows": (
        lambda: check_draw(replaced(BATCH, x=lambda x: x[:, :0], y=lambda y: y[:, :0])),
        r"expected x \(T, rows",
    ),
}

# nets, norm -------------------------------------------------------------------------------------

BAD |= {
    "mlp: one hidden size, not a list": (lambda: mlp(3, 8, 2), r"expected hidden .*\(8,\)|sizes"),
    "mlp: no inputs": (lambda: mlp(0, (8,), 2), "expected inputs to be a whole number"),
    "mlp: no outputs": (lambda: mlp(3, (8,), 0), "expected outputs to be a whole number"),
    "mlp: an empty hidden layer": (lambda: mlp(3, (8, 0), 2), "hidden.* whole number"),
    "mlp: a fraction of a unit": (lambda: mlp(3, (8.5,), 2), "hidden.* whole number"),
    "mlp: words for sizes": (lambda: mlp("3", (8,), 2), "inputs to be a whole number"),
    "mlp: a seed that is no number": (lambda: mlp(3, (8,), 2, seed="a"), "seed"),
    "residual: no features": (lambda: residual(0, 4, 2), "features"),
    "residual: a hidden layer of none": (lambda: residual(4, 0, 2), "hidden"),
    "residual: a seed that is no number": (lambda: residual(4, 4, 2, seed="a"), "seed"),
    "conv4: images too small": (lambda: conv4(size=12), "at least 16 pixels"),
    "conv4: no ways": (lambda: conv4(0), "expected ways to be a whole number"),
    "conv4: a width of 0": (lambda: conv4(width=0), "expected width to be a whole number"),
    "conv4: a size of two numbers": (lambda: conv4(size=(28, 28)), "expected size to be a whole"),
    "conv4: no channels": (lambda: conv4(channels=0), "expected channels to be a whole number"),
    "conv4: unknown statistics": (lambda: conv4(statistics="running"), '"batch" or "stored"'),
    "conv4: True for statistics": (lambda: conv4(statistics=True), '"batch" or "stored"'),
    "conv4: a class for ways": (lambda: conv4(DATA), "expected ways to be a whole number"),
    "conv4: images without a channel": (
        lambda: conv4(seed=0)(torch.zeros(2, 28, 28)),
        r"\(B, 1, h, w\)|\(B, channels, h, w\)",
    ),
    "conv4: channels last": (
        lambda: apply(conv4(channels=3))(parameters(conv4(channels=3)), torch.zeros(2, 28, 28, 3)),
        r"cannot read x of shape \(2, 28, 28, 3\)|expected images",
    ),
    "conv4: colour images for a grey network": (
        lambda: apply(conv4())(parameters(conv4()), torch.zeros(2, 3, 28, 28)),
        r"\(2, 3, 28, 28\)",
    ),
    "conv4: images of bytes": (
        lambda: apply(conv4())(parameters(conv4()), torch.zeros(2, 1, 28, 28).byte()),
        "uint8",
    ),
    "conv2: images too small": (lambda: conv2(size=3), "at least 4 pixels"),
    "conv2: no ways": (lambda: conv2(0), "expected ways to be a whole number"),
    "conv2: half a filter": (lambda: conv2(width=0.5), "expected width to be a whole number"),
    "conv2: larger images than it was built for": (
        lambda: apply(conv2(size=16))(parameters(conv2(size=16)), torch.zeros(2, 1, 28, 28)),
        r"cannot read x of shape \(2, 1, 28, 28\)",
    ),
    "two_halves: a function": (lambda: two_halves(torch.relu, nn.Linear(3, 2)), "nn.Module"),
    "two_halves: no head": (lambda: two_halves(nn.Linear(3, 2), None), "nn.Module"),
    "two_halves: a class, not a module": (
        lambda: two_halves(nn.Identity, nn.Linear(3, 2)),
        "nn.Module",
    ),
    "seeded: a word": (lambda: seeded("a").__enter__(), "seed"),
    "seeded: a fraction": (lambda: seeded(0.5).__enter__(), "seed"),
    "Norm: no channels": (lambda: Norm(0), "channels"),
    "Norm: an unknown kind of statistics": (
        lambda: Norm(3, "running"),
        'expected statistics "batch" or "stored"',
    ),
    "Norm: an ε below 0": (lambda: Norm(3, eps=-1.0), "eps"),
    "Norm: other channels": (lambda: Norm(8)(torch.randn(2, 16, 6, 6)), r"\(B, 8, ...\)"),
    "Norm: no channels in x": (lambda: Norm(8)(torch.randn(8)), r"\(B, 8, ...\)"),
    "Norm: one row": (lambda: Norm(8)(torch.randn(1, 8)), "more than one|at least 2"),
    "Norm: double data": (lambda: Norm(8)(torch.randn(4, 8).double()), "float64"),
    "calibrate: inputs that are no images": (
        lambda: calibrate(conv4(), parameters(conv4()), [torch.zeros(1)]),
        "expected images",
    ),
    "calibrate: a network without norms": (lambda: calibrate(NET, PHI, [SUPPORT.x]), "found none"),
    "calibrate: one tensor for the batches": (
        lambda: calibrate(
            conv4(statistics="stored"),
            parameters(conv4(statistics="stored")),
            torch.zeros(4, 1, 28, 28),
        ),
        "batches",
    ),
    "calibrate: batches with labels": (
        lambda: calibrate(
            conv4(statistics="stored"),
            parameters(conv4(statistics="stored")),
            [Batch(torch.zeros(4, 1, 28, 28), torch.zeros(4, 5))],
        ),
        "inputs x|tensors",
    ),
    "calibrate: no batches": (
        lambda: calibrate(conv4(statistics="stored"), parameters(conv4(statistics="stored")), []),
        "at least one batch",
    ),
    "calibrate: NaN": (
        lambda: calibrate(
            conv4(statistics="stored"),
            parameters(conv4(statistics="stored")),
            [torch.full((4, 1, 28, 28), NAN)],
        ),
        "finite|NaN",
    ),
    "moments: a vector": (lambda: moments(torch.zeros(4)), r"\(B, channels, ...\)"),
}

# core -------------------------------------------------------------------------------------------

BAD |= {
    "double: a list": (lambda: double([1.0, 2.0]), "expected a tensor"),
    "double: φ": (lambda: double(PHI), "expected a tensor"),
    "apply: φ for the network": (lambda: apply(PHI), "nn.Module"),
    "apply: a class for the network": (lambda: apply(nn.Identity), "nn.Module"),
    "apply: the network for φ": (lambda: apply(NET)(NET, SUPPORT.x), "parameters"),
    "apply: a list for φ": (lambda: apply(NET)(list(PHI.values()), SUPPORT.x), "parameters"),
    "apply: numpy x": (
        lambda: apply(NET)(PHI, SUPPORT.x.numpy()),
        "got ndarray; torch.from_numpy converts",
    ),
    "apply: double data for a float network": (
        lambda: apply(NET)(PHI, SUPPORT.x.double()),
        "float64",
    ),
    "apply: float data for a double network": (
        lambda: apply(copy.deepcopy(NET).double())(
            parameters(copy.deepcopy(NET).double()), SUPPORT.x
        ),
        "float32",
    ),
    "apply: half data": (lambda: apply(NET)(PHI, SUPPORT.x.half()), "float16"),
    "apply: integer data": (lambda: apply(NET)(PHI, SUPPORT.x.long()), "int64"),
    "apply: complex data": (lambda: apply(NET)(PHI, SUPPORT.x + 0j), "complex64"),
    "apply: items of another width": (
        lambda: apply(NET)(PHI, SUPPORT.x[:, :9]),
        r"cannot read x of shape \(5, 9\)",
    ),
    "apply: φ of another network": (lambda: apply(NET)(parameters(OTHER), SUPPORT.x), "shape"),
    "apply: a network of two inputs": (
        lambda: apply(Sum())({}, SUPPORT.x),
        "missing 1 required positional argument",
    ),
    "features: no body": (lambda: features(nn.Linear(3, 2)), "two named halves"),
    "features: φ for the network": (lambda: features(PHI), "nn.Module|two named halves"),
    "classify: no head": (lambda: classify(nn.Sequential(nn.Linear(3, 2))), "two named halves"),
    "classify: features of another width": (
        lambda: classify(NET)(PHI, torch.zeros(2, 7)),
        "cannot read x of shape",
    ),
    "below: a list for φ": (lambda: below("body.", list(PHI)), "parameters"),
    "below: a prefix that is no word": (lambda: below(0, PHI), "prefix"),
    "parameters: φ for the network": (lambda: parameters(PHI), "nn.Module"),
    "parameters: a class": (lambda: parameters(nn.Linear), "nn.Module"),
    "parameters: a list of networks": (lambda: parameters([NET]), "nn.Module"),
    "net_state: φ and network exchanged": (lambda: net_state(PHI, NET), "nn.Module"),
    "net_state: nothing fits": (lambda: net_state(NET, {"x": torch.zeros(1)}), "expected"),
    "load: with parameters missing": (
        lambda: load(copy.deepcopy(NET), {"head.bias": torch.zeros(5)}),
        "expected parameters named",
    ),
    "load: φ and network exchanged": (lambda: load(PHI, NET), "nn.Module"),
    "load: another network's": (lambda: load(copy.deepcopy(NET), parameters(OTHER)), "shape"),
    "load: double into float": (
        lambda: load(copy.deepcopy(NET), {k: v.double() for k, v in PHI.items()}),
        lambda net: net.head.bias.dtype == torch.float32,
    ),
    "over: a string": (lambda: over(lambda d: d, "x"), "expected tensors in tuples"),
    "over: numpy": (lambda: over(lambda d: d, np.zeros(3)), "expected tensors in tuples"),
    "take: a task that is not there": (lambda: take(DRAW, 7), "expected a task|tasks"),
    "take: a word": (lambda: take(DRAW, "0"), "a task|index"),
    "move: an unknown device": (lambda: move(DRAW, "gpu"), "device"),
    "move: a network": (lambda: move(NET, "cpu"), "expected tensors in tuples"),
    "descend: negative steps": (
        lambda: descend(lambda p: p["a"].sum(), {"a": torch.ones(2)}, 0.1, -1),
        "steps",
    ),
    "descend: half a step": (
        lambda: descend(lambda p: p["a"].sum(), {"a": torch.ones(2)}, 0.1, 2.5),
        "steps",
    ),
    "descend: a rate of NaN": (
        lambda: descend(lambda p: p["a"].sum(), {"a": torch.ones(2)}, NAN, 1),
        "rate|lr",
    ),
    "descend: rates of other entries": (
        lambda: descend(lambda p: p["a"].sum(), {"a": torch.ones(2)}, {"b": torch.tensor(0.1)}, 1),
        "rate",
    ),
    "descend: a loss that is a vector": (
        lambda: descend(lambda p: p["a"] * 2, {"a": torch.ones(2)}, 0.1, 1),
        "a loss that is a scalar",
    ),
    "descend: an optimizer for the rule": (
        lambda: descend(
            lambda p: p["a"].sum(), {"a": torch.ones(2)}, 0.1, 1, torch.optim.Adam([torch.zeros(1)])
        ),
        "rule",
    ),
    "risk: predictions of another width": (
        lambda: risk(cross_entropy, torch.zeros(4, 3), torch.zeros(4, 5)),
        "one output for each class",
    ),
    "risk: class numbers": (
        lambda: risk(cross_entropy, torch.zeros(4, 3), torch.zeros(4).long()),
        "one-hot",
    ),
    "risk: a loss that is a vector": (
        lambda: risk(
            partial(cross_entropy, reduction="none"), torch.zeros(4, 3), torch.zeros(4, 3)
        ),
        "scalar",
    ),
    "risk: a loss class, not an instance": (
        lambda: risk(nn.CrossEntropyLoss, torch.zeros(4, 3), torch.zeros(4, 3)),
        "loss",
    ),
    "proximity: other entries": (lambda: proximity(PHI, parameters(nn.Linear(3, 2))), "expected"),
    "proximity: other shapes": (lambda: proximity(PHI, parameters(OTHER)), "shape"),
    "start: nothing to carry over": (
        lambda: start(as_is(NET), parameters(nn.Linear(3, 2))),
        "Was another network trained",
    ),
    "start: the network for the learner": (lambda: start(NET, PHI), "learner"),
    "start: the network for φ": (lambda: start(LEARNER, NET), "parameters"),
}

# objective, bilevel, joint ------------------------------------------------------------------------

BAD |= {
    "bilevel: batches": (lambda: fitted(BATCHES), "goes with `joint`"),
    "bilevel: the network for the learner": (lambda: bilevel(NET, cross_entropy), "learner"),
    "bilevel: a learner not yet made": (lambda: bilevel(maml, cross_entropy), "learner"),
    "bilevel: no loss": (lambda: bilevel(LEARNER, None), "loss"),
    "bilevel: a loss by name": (lambda: bilevel(LEARNER, "cross_entropy"), "loss"),
    "bilevel: a loss class": (
        lambda: bilevel(LEARNER, nn.CrossEntropyLoss)(PHI, DRAW),
        "loss",
    ),
    "bilevel: a loss that is a vector": (
        lambda: bilevel(LEARNER, partial(cross_entropy, reduction="none")).value_and_grad(
            PHI, DRAW
        ),
        "scalar",
    ),
    "bilevel: a hypergradient by name": (
        lambda: bilevel(LEARNER, cross_entropy, "first_order"),
        "hypergradient",
    ),
    "bilevel: implicit without its strength": (
        lambda: bilevel(LEARNER, cross_entropy, implicit),
        "hypergradient|implicit|strength",
    ),
    "bilevel: a chunk of no task": (
        lambda: bilevel(LEARNER, cross_entropy, chunk=0),
        "at least 1",
    ),
    "bilevel: a chunk of True": (lambda: bilevel(LEARNER, cross_entropy, chunk=True), "chunk"),
    "bilevel: a chunk of 2.5": (lambda: bilevel(LEARNER, cross_entropy, chunk=2.5), "chunk"),
    "bilevel: tasks of several counts": (
        lambda: OBJECTIVE(PHI, Episode(DRAW.support, Batch(*(d[:1] for d in DRAW.query)))),
        "one leading axis of tasks",
    ),
    "bilevel: φ of another network": (
        lambda: OBJECTIVE(parameters(OTHER), DRAW),
        "shape",
    ),
    "bilevel: the network for φ": (lambda: OBJECTIVE(NET, DRAW), "parameters"),
    "bilevel: numpy in the episode": (
        lambda: OBJECTIVE(PHI, over(lambda d: d.numpy(), DRAW)),
        "tensor",
    ),
    "first_order: θ is something else": (
        lambda: bilevel(protonet(NET), cross_entropy, first_order)(protonet(NET).init(), DRAW),
        "Use unrolled",
    ),
    "first_order: learned rates": (
        lambda: (
            lambda learner: bilevel(learner, cross_entropy, first_order).value_and_grad(
                learner.init(), DRAW
            )
        )(meta_sgd(NET, cross_entropy, 0.1, 1)),
        "lr\\.",
    ),
    "secant: θ is something else": (
        lambda: bilevel(protonet(NET), cross_entropy, secant)(protonet(NET).init(), DRAW),
        "Use unrolled",
    ),
    "unrolled: the network for the learner": (lambda: unrolled(NET, cross_entropy), "learner"),
    "checkpointed: no inner steps": (
        lambda: checkpointed(protonet(NET), cross_entropy),
        "inner steps",
    ),
    "checkpointed: the network for the learner": (
        lambda: checkpointed(NET, cross_entropy),
        "learner",
    ),
    "implicit: part of φ at rest": (
        lambda: bilevel(anil(NET, cross_entropy, 0.1, 1), cross_entropy, implicit(1.0))(PHI, DRAW),
        "moves every entry",
    ),
    "implicit: no pull": (lambda: implicit(0.0), "strength > 0"),
    "implicit: a pull of NaN": (lambda: implicit(NAN), "strength > 0"),
    "implicit: half an iteration": (lambda: implicit(1.0, 2.5), "iterations"),
    "multi_step: too many weights": (
        lambda: bilevel(LEARNER, cross_entropy, multi_step([0.5, 0.5])),
        "one for each inner step",
    ),
    "multi_step: a weight of NaN": (
        lambda: bilevel(LEARNER, cross_entropy, multi_step([NAN])),
        "weights",
    ),
    "multi_step: one number": (lambda: bilevel(LEARNER, cross_entropy, multi_step(1.0)), "weights"),
    "sharpness: a support set for the draw": (lambda: sharpness(LEARNER, PHI, SUPPORT), "episodes"),
    "sharpness: no iteration": (lambda: sharpness(LEARNER, PHI, DRAW, 0), "iterations"),
    "annealed: no steps": (lambda: annealed(0, 0.5), "steps"),
    "annealed: progress below 0": (lambda: annealed(3, -1.0), "progress"),
    "annealed: progress of NaN": (lambda: annealed(3, NAN), "progress"),
    "at: class numbers": (lambda: at(LEARNER, cross_entropy, PHI, NUMBERS), "one-hot"),
    "at: the network for the learner": (lambda: at(NET, cross_entropy, PHI, SUPPORT), "learner"),
    "conjugate_gradient: a matrix, not a map": (
        lambda: conjugate_gradient(torch.eye(2), {"a": torch.ones(2)}, 2),
        "matrix",
    ),
    "conjugate_gradient: negative iterations": (
        lambda: conjugate_gradient(lambda v: v, {"a": torch.ones(2)}, -1),
        "iterations",
    ),
    "neumann: a rate of 0": (
        lambda: neumann(lambda v: v, {"a": torch.ones(2)}, 2, rate=0.0),
        "rate",
    ),
    "neumann: negative iterations": (
        lambda: neumann(lambda v: v, {"a": torch.ones(2)}, -1),
        "iterations",
    ),
    "joint: episodes": (lambda: fitted(STREAM, JOINT), "goes with `bilevel`"),
    "joint: φ for the network": (lambda: joint(PHI, cross_entropy), "nn.Module"),
    "joint: a learner for the network": (lambda: joint(LEARNER, cross_entropy), "nn.Module"),
    "joint: no loss": (lambda: joint(NET, None), "loss"),
    "joint: two weights for three sets": (
        lambda: fitted(
            mixture(*[Batch(torch.zeros(4, 30), torch.zeros(4, 5))] * 3, batch=2, seed=0),
            joint(NET, mse_loss, (1, 0)),
        ),
        "2 weights, 3 tasks",
    ),
    "joint: a negative weight": (lambda: joint(NET, cross_entropy, (1, -1)), "weights"),
    "joint: a weight of NaN": (lambda: joint(NET, cross_entropy, (1, NAN)), "weights"),
    "joint: weights that are all 0": (lambda: joint(NET, cross_entropy, (0, 0)), "weights"),
    "joint: no weights": (lambda: joint(NET, cross_entropy, ()), "weights"),
    "joint: one number for the weights": (lambda: joint(NET, cross_entropy, 1.0), "weights"),
    "joint: words for weights": (lambda: joint(NET, cross_entropy, ("a", "b")), "weights"),
    "joint: one penalty, not a list": (
        lambda: joint(NET, cross_entropy, penalties=align.coral()),
        "penalties",
    ),
    "joint: a penalty not yet made": (
        lambda: joint(NET, cross_entropy, penalties=[align.coral])(PHI, BATCH),
        "penalt",
    ),
    "joint: a penalty and no halves": (
        lambda: joint(nn.Linear(30, 5), cross_entropy, penalties=[align.coral()]),
        "two named halves",
    ),
    "joint: a chunk of 0": (lambda: joint(NET, cross_entropy, chunk=0), "at least 1"),
    "joint: a chunk of 2.5": (lambda: joint(NET, cross_entropy, chunk=2.5), "chunk"),
    "joint: columns that overlap": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 3), slice(2, 5)])(PHI, BATCH),
        "overlap",
    ),
    "joint: columns out of range": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 3), slice(3, 9)])(PHI, BATCH),
        "columns",
    ),
    "joint: columns of one set": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 5)])(PHI, BATCH),
        "columns of each data set",
    ),
    "joint: empty columns": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 5), slice(5, 5)])(PHI, BATCH),
        "columns",
    ),
    "joint: widths for columns": (
        lambda: joint(NET, cross_entropy, columns=[2, 3])(PHI, BATCH),
        "slice|own_columns",
    ),
    "joint: class numbers": (
        lambda: JOINT(PHI, replaced(BATCH, y=lambda y: y.argmax(-1))),
        "one-hot",
    ),
    "joint: φ of another network": (lambda: JOINT(parameters(OTHER), BATCH), "shape"),
    "joint: one task without its axis": (lambda: JOINT(PHI, take(BATCH, 0)), r"\(T, "),
    "risks: episodes": (lambda: risks(NET, cross_entropy)(PHI, DRAW), "goes with"),
    "risks: φ for the network": (lambda: risks(PHI, cross_entropy), "nn.Module"),
    "own_columns: a width of 0": (lambda: own_columns([3, 0]), "width"),
    "own_columns: negative": (lambda: own_columns([3, -2]), "width"),
    "own_columns: half a column": (lambda: own_columns([1.5, 2]), "width"),
    "own_columns: none": (lambda: own_columns([]), "width"),
    "toward: a negative strength": (lambda: toward(PHI, -1.0), "strength"),
    "toward: the network for the anchor": (lambda: toward(NET, 1.0), "parameters"),
    "toward: another network's anchor": (
        lambda: joint(NET, cross_entropy, penalties=[toward(parameters(nn.Linear(3, 2)), 1.0)])(
            PHI, BATCH
        ),
        "anchor|parameters named",
    ),
    "over_tasks: two weights for three tasks": (
        lambda: over_tasks(lambda p, d: d.sum(), torch.ones(2))(PHI, torch.ones(3, 1)),
        "one weight per task",
    ),
    "over_tasks: a task that is a vector": (
        lambda: over_tasks(lambda p, d: p["a"] * d)({"a": torch.ones(2)}, torch.ones(3, 2)),
        "scalar",
    ),
    "whole: a value that is a vector": (
        lambda: whole(lambda p, d: p["a"]).value_and_grad({"a": torch.ones(2)}, None),
        "scalar",
    ),
    "whole: a value that is a number": (
        lambda: whole(lambda p, d: 1.0).value_and_grad({"a": torch.ones(2)}, None),
        "tensor|scalar",
    ),
    "count: no tasks": (lambda: count(take(DRAW, slice(0, 0))), "leading axis of tasks"),
    "count: tensors of several lengths": (
        lambda: count(Batch(torch.zeros(2), torch.zeros(3))),
        "leading axis of tasks",
    ),
}

# train ------------------------------------------------------------------------------------------

BAD |= {
    "fit: a data loader for the stream": (lambda: fitted(LOADER), "stream"),
    "fit: a draw for the stream": (lambda: fitted(DRAW), "stream"),
    "fit: a stream of something else": (
        lambda: fitted(lambda step: [1, 2]),
        "gives an Episode or a Batch",
    ),
    "fit: a stream of nothing": (lambda: fitted(lambda step: None), "gives an Episode or a Batch"),
    "fit: a class set for the stream": (lambda: fitted(DATA), "stream"),
    "fit: class numbers where one-hot is meant": (
        lambda: fitted(changed(y=lambda y: y.argmax(-1))),
        "Labels are one-hot rows",
    ),
    "fit: one-hot of integers": (lambda: fitted(changed(y=lambda y: y.long())), "floating-point y"),
    "fit: NaN in an episode": (
        lambda: fitted(changed(x=lambda x: x * NAN)),
        "finite numbers in x of the support set",
    ),
    "fit: an episode with rows missing": (
        lambda: fitted(changed(x=lambda x: x[:, 1:])),
        r"expected x \(T, rows",
    ),
    "fit: the wrong number of classes": (
        lambda: fitted(episodes(DATA, 3, 1, 2, 2, 0)),
        "one output for each class",
    ),
    "fit: items the network cannot read": (
        lambda: fitted(episodes(planted(8, 6, informative=4), 5, 1, 2, 2, 0)),
        r"cannot read x of shape \(5, 29\)",
    ),
    "fit: support and query of different ways": (
        lambda: fitted(changed(y=lambda y: y[..., :3])),
        "one output for each class",
    ),
    "fit: support and query of different items": (
        lambda: fitted(changed(x=lambda x: x[..., :3])),
        r"cannot read x of shape \(5, 3\)",
    ),
    "fit: images as a list": (
        lambda: fitted(changed(x=lambda x: x.tolist())),
        "x of the support set to be a tensor",
    ),
    "fit: double data": (
        lambda: fitted(lambda step: over(lambda d: d.double(), STREAM(step))),
        "float64",
    ),
    "fit: parameters of another network": (
        lambda: fitted(phi=parameters(nn.Linear(3, 2))),
        r"start\(learner, trained\)",
    ),
    "fit: parameters of another width": (lambda: fitted(phi=parameters(OTHER)), "shape"),
    "fit: the network for φ": (lambda: fitted(phi=NET), "parameters"),
    "fit: net.parameters() for φ": (lambda: fitted(phi=NET.parameters()), "parameters"),
    "fit: no φ": (lambda: fitted(phi={}), "parameters|entries"),
    "fit: φ with NaN": (
        lambda: fitted(phi={k: v * NAN for k, v in PHI.items()}),
        "finite numbers in φ",
    ),
    "fit: the network for the objective": (lambda: fitted(objective=NET), "Objective"),
    "fit: the learner for the objective": (lambda: fitted(objective=LEARNER), "Objective"),
    "fit: the loss for the objective": (lambda: fitted(objective=cross_entropy), "Objective"),
    "fit: objective and φ exchanged": (lambda: fitted(objective=PHI, phi=OBJECTIVE), "Objective"),
    "fit: an optimizer instance": (
        lambda: fitted(optimizer=torch.optim.Adam(NET.parameters())),
        "optimizer",
    ),
    "fit: an optimizer by name": (lambda: fitted(optimizer="adam"), "optimizer"),
    "fit: an optimizer that is none": (lambda: fitted(optimizer=lambda p: None), "optimizer"),
    "fit: L-BFGS": (lambda: fitted(optimizer=torch.optim.LBFGS), "closure|LBFGS"),
    "fit: a schedule instance": (
        lambda: fitted(
            schedule=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(NET.parameters(), 0.1), 1)
        ),
        "schedule",
    ),
    "fit: a schedule that wants the loss": (
        lambda: fitted(schedule=torch.optim.lr_scheduler.ReduceLROnPlateau),
        "ReduceLROnPlateau|schedule",
    ),
    "fit: a negative number of steps": (lambda: fitted(steps=-1), "steps ≥ 0"),
    "fit: half a step": (lambda: fitted(steps=2.5), "steps"),
    "fit: True steps": (lambda: fitted(steps=True), "steps"),
    "fit: every 0 steps": (lambda: fitted(every=0), "every ≥ 1"),
    "fit: no seed": (lambda: fitted(seed=None), "seed"),
    "fit: a seed with a fraction": (lambda: fitted(seed=0.5), "seed"),
    "fit: an unknown device": (lambda: fitted(device="gpu"), "device"),
    "fit: a negative rate": (lambda: fitted(rates={"body.": -0.1}), "rate"),
    "fit: a rate of NaN": (lambda: fitted(rates={"body.": NAN}), "expected .*rate"),
    "fit: a rate for an unknown prefix": (lambda: fitted(rates={"bodi.": 0.1}), r"named bodi\.\*"),
    "fit: an unknown prefix moves": (lambda: fitted(moves=("bodi.",)), r"named bodi\.\*"),
    "fit: nothing moves": (lambda: fitted(moves=()), "entries of φ that move"),
    "fit: one prefix, not a list": (lambda: fitted(moves="body."), "moves|prefixes"),
    "fit: rates that are no dict": (lambda: fitted(rates=0.1), "rates"),
    "fit: everything frozen": (
        lambda: (
            lambda net: fit(joint(net, cross_entropy), parameters(net), BATCHES, 1, progress=False)
        )(copy.deepcopy(NET).requires_grad_(False)),
        "move|frozen|gradient",
    ),
    "fit: a loss that ignores its input": (
        lambda: fitted(objective=bilevel(LEARNER, lambda p, y: torch.tensor(1.0))),
        "gradient",
    ),
    "fit: a loss behind a detach": (
        lambda: fitted(BATCHES, joint(NET, lambda p, y: cross_entropy(p.detach(), y))),
        "gradient",
    ),
    "fit: a loss that gives a float": (
        lambda: fitted(BATCHES, joint(NET, lambda p, y: cross_entropy(p, y).item())),
        "loss|scalar|tensor",
    ),
    "fit: a loss that is a vector": (
        lambda: fitted(BATCHES, joint(NET, partial(cross_entropy, reduction="none"))),
        "scalar",
    ),
    "fit: a stream that changes kind": (
        lambda: fitted(later(lambda draw: draw.query)),
        r"of one kind .*stream\(1\) Batch",
    ),
    "fit: a stream that turns to numpy": (
        lambda: fitted(later(lambda draw: over(lambda d: d.numpy(), draw))),
        "step 1|tensor",
    ),
    "fit: a stream that changes shape": (
        lambda: fitted(later(lambda draw: over(lambda d: d[..., :3], draw))),
        "step 1|cannot read",
    ),
    "fit: a stream that ends": (
        lambda: fitted(later(lambda draw: None)),
        "step 1|goes with `joint`|gives an Episode",
    ),
    "fit: a stream with NaN later": (
        lambda: fitted(later(lambda draw: over(lambda d: d * NAN, draw))),
        "step 1|NaN",
    ),
    "fit: an impure stream": (
        lambda: fitted(lambda step: over(lambda d: d + torch.rand(()), STREAM(step))),
        "same draw|pure",
    ),
    "fit: an iterator for the stream": (lambda: fitted(iter([DRAW, DRAW])), "stream"),
    "groups: a list for φ": (lambda: groups(list(PHI.values()), {"body.": 0.1}), "parameters"),
    "groups: an unknown prefix": (lambda: groups(PHI, {"bodi.": 0.1}), r"named bodi\.\*"),
    "cosine_adam: a negative rate": (lambda: cosine_adam(-1.0, 10), "rate"),
    "cosine_adam: no steps": (lambda: cosine_adam(0.1, 0), "steps"),
    "cosine_adam: a rate of NaN": (lambda: cosine_adam(NAN, 10), "rate"),
    "cosine_adam: a negative decay": (lambda: cosine_adam(0.1, 10, -1.0), "decay"),
    "crossed: nothing beside": (lambda: crossed([(1,)], []), "at least one setting"),
    "crossed: no cross": (lambda: crossed([], [()]), "at least one setting"),
    "on_curves: an unknown training": (lambda: on_curves("CNP", [()], 24, 2400, 6), "by to be one"),
    "on_curves: no curves": (lambda: on_curves("joint", [()], 0, 2400, 6), "curves"),
}

# evaluate ----------------------------------------------------------------------------------------

BAD |= {
    "evaluate: no φ": (lambda: scored(phi={}), "parameters|entries"),
    "evaluate: the network for φ": (lambda: scored(phi=NET), "parameters"),
    "evaluate: the network for the learner": (lambda: scored(NET), "expected a Learner"),
    "evaluate: an objective for the learner": (lambda: scored(OBJECTIVE), "expected a Learner"),
    "evaluate: a head of another width": (
        lambda: scored(as_is(mlp(30, (8,), 3)), parameters(mlp(30, (8,), 3))),
        "the head has 3 outputs",
    ),
    "evaluate: φ of another network": (lambda: scored(phi=parameters(OTHER)), "shape"),
    "evaluate: one way": (
        lambda: scored(stream=episodes(DATA, 1, 2, 2, 2, 0), learner=protonet(NET)),
        "at least two classes",
    ),
    "evaluate: one episode": (lambda: scored(n=1), "at least 2 episodes"),
    "evaluate: half an episode": (lambda: scored(n=2.5), "episodes"),
    "evaluate: batches": (lambda: scored(stream=BATCHES), "evaluate expects episodes"),
    "evaluate: a draw for the stream": (lambda: scored(stream=DRAW), "stream"),
    "evaluate: a data loader": (lambda: scored(stream=LOADER), "stream"),
    "evaluate: a metric by name": (lambda: scored(metric="accuracy"), "metric"),
    "evaluate: a metric that is a vector": (
        lambda: scored(metric=lambda p, y: (p.argmax(-1) == y.argmax(-1)).float()),
        "one number for an episode",
    ),
    "evaluate: a metric that gives a float": (
        lambda: scored(metric=lambda p, y: 0.5),
        "tensor|one number",
    ),
    "evaluate: multi-hot labels": (
        lambda: scored(
            stream=lambda s: over(lambda d: d, STREAM(s))._replace(
                query=replaced(STREAM(s).query, y=lambda y: torch.ones_like(y))
            )
        ),
        "one-hot rows",
    ),
    "evaluate: soft labels": (
        lambda: scored(
            stream=lambda s: STREAM(s)._replace(
                query=replaced(STREAM(s).query, y=lambda y: y.softmax(-1))
            )
        ),
        "one-hot rows",
    ),
    "evaluate: multi-hot support": (
        lambda: scored(protonet(NET), protonet(NET).init(), changed(y=torch.ones_like)),
        "one-hot rows",
    ),
    "evaluate: φ with NaN": (
        lambda: scored(phi={k: v * NAN for k, v in PHI.items()}),
        "finite|NaN",
    ),
    "evaluate: a stream of one draw": (
        lambda: scored(stream=lambda s: DRAW),
        "only 2 of 4 tasks so far are different",
    ),
    "evaluate: a chunk of 0": (lambda: scored(chunk=0), "chunk"),
    "evaluate: a chunk of 2.5": (lambda: scored(chunk=2.5), "chunk"),
    "evaluate: a chunk of True": (lambda: scored(chunk=True), "chunk"),
    "answers: batches": (lambda: answers(LEARNER, PHI, BATCH), "episodes|Episode"),
    "answers: no φ": (lambda: answers(LEARNER, {}, DRAW), "parameters|entries"),
    "answers: a stream for the draw": (lambda: answers(LEARNER, PHI, STREAM), "episodes|Episode"),
    "accuracy: one column": (
        lambda: accuracy(torch.zeros(4, 1), torch.zeros(4, 1)),
        "at least two classes",
    ),
    "accuracy: class numbers": (
        lambda: accuracy(torch.zeros(4, 5), torch.arange(4)),
        "one-hot|shape",
    ),
    "accuracy: multi-hot": (lambda: accuracy(torch.zeros(4, 5), torch.ones(4, 5)), "one-hot"),
    "accuracy: predictions of NaN": (
        lambda: accuracy(put(torch.eye(5), (0, 1), NAN), torch.eye(5)),
        torch.isnan,
    ),
    "macro_f1: class numbers": (lambda: macro_f1(torch.zeros(4, 5), torch.arange(4)), "one-hot"),
    "macro_f1: multi-hot": (lambda: macro_f1(torch.zeros(4, 5), torch.ones(4, 5)), "one-hot"),
    "macro_f1: predictions of NaN": (
        lambda: macro_f1(put(torch.eye(5), (0, 1), NAN), torch.eye(5)),
        torch.isnan,
    ),
    "ndcg: a score too few": (lambda: ndcg(torch.ones(4), torch.ones(5)), "each item"),
    "ndcg: gains below 0": (lambda: ndcg(torch.ones(2), torch.tensor([1.0, -1])), "at least 0"),
    "recall_at: no places": (lambda: recall_at(torch.ones(2), torch.ones(2), 0), "at least 1"),
    "recall_at: ratings": (
        lambda: recall_at(torch.ones(2), torch.tensor([8.0, 3]), 1),
        "wanted item",
    ),
    "auroc: class numbers": (lambda: auroc(torch.zeros(4, 5), torch.arange(4)), "one-hot"),
    "auroc: multi-hot": (lambda: auroc(torch.zeros(4, 5), torch.ones(4, 5)), "one-hot"),
    "auroc: labels of −1 and 1": (
        lambda: auroc(torch.rand(4, 1), torch.tensor([[1.0], [-1], [1], [-1]])),
        "one-hot",
    ),
    "auroc: predictions of NaN": (
        lambda: auroc(put(torch.eye(5), (0, 1), NAN), torch.eye(5)),
        torch.isnan,
    ),
    "accuracy: labels in a list": (lambda: accuracy(torch.eye(4), [0, 1, 2, 3]), "tensor"),
    "accuracy: y of one row": (lambda: accuracy(torch.eye(4), torch.eye(4)[:1]), "same shape"),
    "accuracy: no rows": (lambda: accuracy(torch.eye(4)[:0], torch.eye(4)[:0]), "at least one"),
    "answers: φ of another network": (lambda: answers(LEARNER, parameters(OTHER), DRAW), "shape"),
    "interval: NaN": (lambda: interval(torch.tensor([1.0, NAN])), "1 of 2 are not"),
    "interval: a list": (lambda: interval([0.5, 0.6]), "tensor"),
    "interval: one number": (lambda: interval(torch.tensor([1.0])), "at least 2 numbers"),
    "interval: a table": (lambda: interval(torch.zeros(3, 2)), "in one row"),
    "compare: other episodes": (
        lambda: compare(SCORE, SCORE._replace(draw=2.0)),
        "the same episodes",
    ),
    "compare: means for scores": (lambda: compare(0.5, 0.6), "Score|scores"),
    "compare: a score and its values": (lambda: compare(SCORE, SCORE.values), "Score|scores"),
    "over_seeds: one number for the seeds": (lambda: over_seeds(lambda s: 0.5, 3), "seeds"),
    "over_seeds: one seed": (lambda: over_seeds(lambda s: 0.5, [0]), "at least 2"),
    "over_seeds: the same seed": (lambda: over_seeds(lambda s: 0.5, [0, 0, 0]), "each once"),
    "over_seeds: nothing returned": (lambda: over_seeds(lambda s: None, [0, 1]), "number|Score"),
    "best_of: no setting": (lambda: best_of([], lambda s: 1.0), "at least one setting"),
    "best_of: a number": (lambda: best_of(3, lambda s: 1.0), "settings"),
    "best_of: nothing returned": (lambda: best_of([1, 2, 3], lambda s: None), "number|Score"),
    "best_of: all diverge": (lambda: best_of([1, 2, 3], lambda s: NAN), "does not diverge"),
}

# learners -------------------------------------------------------------------------------------------


def _learner(name: str, make: Callable[[Any], Any]) -> None:
    """The mistakes that every learner meets."""
    BAD[f"{name}: φ for the network"] = (lambda: make(PHI), "nn.Module|network")
    if name != "as_is":
        BAD[f"{name}: class numbers as labels"] = (
            lambda: gives(NET, NUMBERS, make),
            r"one-hot|\(N, W\)",
        )
    BAD[f"{name}: φ of another network"] = (
        lambda: gives(NET, SUPPORT, make, parameters(nn.Linear(3, 2))),
        "expected parameters named",
    )


for _name, _make in LEARNERS.items():
    _learner(_name, _make)

_GRADIENT: dict[str, Callable[..., Any]] = {
    "maml": maml,
    "anil": anil,
    "boil": boil,
    "finetune": finetune,
    "lp_ft": lp_ft,
    "baseline_plus_plus": baseline_plus_plus,
    "cavia": cavia,
    "protomaml": protomaml,
    "lora": lora,
    "meta_sgd": meta_sgd,
    "per_step_rates": per_step_rates,
    "meta_curvature": meta_curvature,
    "entropy_finetune": entropy_finetune,
    "weight_decay": hyper.weight_decay,
}


def _gradient(name: str, make: Callable[..., Any]) -> None:
    """The mistakes of rates and steps."""
    BAD[f"{name}: a negative rate"] = (lambda: make(NET, cross_entropy, -0.1, 1), "lr|rate")
    BAD[f"{name}: a rate of NaN"] = (lambda: make(NET, cross_entropy, NAN, 1), "lr|rate")
    BAD[f"{name}: negative steps"] = (lambda: make(NET, cross_entropy, 0.1, -1), "steps")
    BAD[f"{name}: half a step"] = (lambda: make(NET, cross_entropy, 0.1, 2.5), "steps")
    BAD[f"{name}: rate and steps exchanged"] = (lambda: make(NET, cross_entropy, 5, 0.1), "steps")
    BAD[f"{name}: no loss"] = (lambda: make(NET, None, 0.1, 1), "loss")


for _name, _make in _GRADIENT.items():
    _gradient(_name, _make)

BAD |= {
    "maml: an optimizer for the rule": (
        lambda: gives(
            NET, make=lambda net: maml(net, cross_entropy, 0.1, 1, rule=torch.optim.Adam)
        ),
        "rule",
    ),
    "maml: a negative strength": (lambda: maml(NET, cross_entropy, 0.1, 1, -1.0), "strength"),
    "maml: numpy support": (
        lambda: gives(NET, over(lambda d: d.numpy(), SUPPORT), LEARNERS["maml"]),
        "got ndarray; torch.from_numpy converts",
    ),
    "maml: a tuple for the support set": (
        lambda: gives(NET, (SUPPORT.x, SUPPORT.y), LEARNERS["maml"]),
        "Batch",
    ),
    "maml: an episode for the support set": (
        lambda: gives(NET, take(DRAW, 0), LEARNERS["maml"]),
        "Batch",
    ),
    "maml: double data": (
        lambda: gives(NET, over(lambda d: d.double(), SUPPORT), LEARNERS["maml"]),
        "float64",
    ),
    "maml: no rows": (
        lambda: gives(NET, take(SUPPORT, slice(0, 0)), LEARNERS["maml"]),
        "rows|at least one",
    ),
    "maml: NaN in the support set": (
        lambda: gives(NET, replaced(SUPPORT, x=lambda x: x * NAN), LEARNERS["maml"]),
        lambda prediction: bool(torch.isnan(prediction).all()),
    ),
    "maml: rates of another network": (
        lambda: gives(NET, make=lambda net: maml(net, cross_entropy, {"a": torch.tensor(0.1)}, 1)),
        "rate",
    ),
    "anil: no head": (
        lambda: anil(nn.Linear(3, 2), mse_loss, 0.1, 1),
        r"parameters named head\.\*",
    ),
    "boil: no body": (
        lambda: boil(nn.Linear(3, 2), mse_loss, 0.1, 1),
        r"parameters named body\.\*",
    ),
    "descent: an unknown prefix": (
        lambda: descent(NET, cross_entropy, 0.1, 1, "bodi."),
        r"parameters named bodi\.\*",
    ),
    "descent: a list of prefixes": (
        lambda: descent(NET, cross_entropy, 0.1, 1, ["body."]),
        "adapted|prefix",
    ),
    "proximal: a negative strength": (lambda: proximal(-1.0), "strength"),
    "proximal: a strength of NaN": (lambda: proximal(NAN), "strength"),
    "momentum: μ above 1": (lambda: momentum(1.5), "mu"),
    "momentum: μ of NaN": (lambda: momentum(NAN), "mu"),
    "adam: a β of 1": (lambda: adam(1.0), "beta1"),
    "adam: a negative β": (lambda: adam(0.9, -0.1), "beta2"),
    "adam: an ε below 0": (lambda: adam(eps=-1.0), "eps"),
    "protonet: a network without halves": (lambda: protonet(nn.Linear(3, 2)), "two named halves"),
    "protonet: multi-hot labels": (
        lambda: gives(NET, replaced(SUPPORT, y=torch.ones_like), protonet),
        lambda prediction: bool(torch.isfinite(prediction).all()),
    ),
    "matching: a scale of 0": (lambda: matching(NET, 0.0), "scale > 0"),
    "matching: a negative scale": (lambda: matching(NET, -1.0), "scale > 0"),
    "matching: a scale of NaN": (lambda: matching(NET, NAN), "scale > 0"),
    "relation: no hidden units": (lambda: relation(NET, 0), "hidden"),
    "relation: a head of two layers": (lambda: relation(DEEP), "one linear layer"),
    "baseline_plus_plus: a scale of 0": (
        lambda: baseline_plus_plus(NET, cross_entropy, 0.1, 1, 0.0),
        "scale > 0",
    ),
    "cosine_head: a head of two layers": (lambda: cosine_head(DEEP), "one linear layer"),
    "cosine_head: a negative scale": (lambda: cosine_head(NET, -1.0), "scale > 0"),
    "simpleshot: another learner's φ": (
        lambda: gives(NET, SUPPORT, simpleshot, protonet(NET).init()),
        "centre.mean",
    ),
    "centred: a batch with labels": (lambda: centred(NET, PHI, SUPPORT), "tensor"),
    "centred: NaN": (lambda: centred(NET, PHI, SUPPORT.x * NAN), "finite|NaN"),
    "feat: a head of two layers": (lambda: feat(DEEP), "one linear layer"),
    "contrastive: a negative strength": (lambda: contrastive(NET, -1.0), "strength"),
    "contrastive: a scale of 0": (lambda: contrastive(NET, 1.0, 0.0), "scale > 0"),
    "contrastive: a learner without attention": (
        lambda: bilevel(protonet(NET), cross_entropy, contrastive(NET))(PHI, DRAW),
        "parameters named",
    ),
    "set_to_set: parameters without attention": (
        lambda: set_to_set(PHI, Z, torch.ones(len(Z), dtype=torch.bool)),
        "parameters named",
    ),
    "class_means: class numbers": (lambda: class_means(Z, LABELS), "one-hot"),
    "class_means: other rows": (lambda: class_means(Z, torch.eye(3).double()), "rows"),
    "ridge: a strength of 0": (lambda: ridge(NET, 0.0), "strength > 0"),
    "ridge: a strength of NaN": (lambda: ridge(NET, NAN), "strength > 0"),
    "ridge: a head without a bias": (lambda: ridge(NO_BIAS), "with a bias"),
    "r2d2: a strength of 0": (lambda: r2d2(NET, 0.0), "strength > 0"),
    "r2d2: a scale of NaN": (lambda: r2d2(NET, scale=NAN), "scale > 0"),
    "r2d2: another learner's φ": (lambda: gives(NET, make=r2d2, phi=PHI), "parameters named"),
    "heads_prior: one head": (lambda: heads_prior(Z[:, :1], 0.3), "two known tasks"),
    "heads_prior: no noise": (lambda: heads_prior(Z, 0.0), "noise > 0"),
    "anil_at_once: a rate of NaN": (lambda: anil_at_once(NET, NAN, 2), "rate of at least 0"),
    "anil_at_once: half a step": (lambda: anil_at_once(NET, 0.1, 0.5), "steps"),
    "anil_at_once: a head without a bias": (lambda: anil_at_once(NO_BIAS, 0.1, 2), "with a bias"),
    "alpaca: negative noise": (lambda: alpaca(NET, noise=-1.0), "noise > 0"),
    "alpaca: a head without a bias": (lambda: alpaca(NO_BIAS), "with a bias"),
    "bayesian: negative noise": (lambda: bayesian(NET, noise=-1.0), "noise > 0"),
    "bayesian: a head without a bias": (lambda: bayesian(NO_BIAS), "with a bias"),
    "metaoptnet: a strength of 0": (lambda: metaoptnet(NET, 0.0), "strength > 0"),
    "metaoptnet: infinite strength": (lambda: metaoptnet(NET, INF), "strength"),
    "metaoptnet: soft labels": (
        lambda: gives(NET, replaced(SUPPORT, y=lambda y: 5 * y), metaoptnet),
        lambda found: bool(found.isnan().all()),
    ),
    "ridge: targets of one column": (
        lambda: gives(NET, replaced(SUPPORT, y=lambda y: y[:, :1]), ridge),
        r"\(5, 5\)",
    ),
    "bayesian: targets of one column": (
        lambda: gives(NET, replaced(SUPPORT, y=lambda y: y[:, :1]), bayesian),
        r"\(5, 5\)",
    ),
    "cavia: no context": (lambda: cavia(NET, cross_entropy, 0.1, 1, dims=0), "dims"),
    "cavia: a head without a bias": (lambda: cavia(NO_BIAS, cross_entropy, 0.1, 1), "with a bias"),
    "cavia: no such layer": (
        lambda: cavia(NET, cross_entropy, 0.1, 1, layer="body.9"),
        "linear layer or of a norm",
    ),
    "cavia: a layer without a bias": (
        lambda: cavia(NO_BIAS, cross_entropy, 0.1, 1, layer="head"),
        "linear layer or of a norm",
    ),
    "cavia: a layer of one's own that is no norm": (
        lambda: cavia(two_halves(Squared(), nn.Linear(8, 5)), cross_entropy, 0.1, 1, layer="body"),
        "linear layer or of a norm",
    ),
    "cavia: a norm over pictures": (
        lambda: cavia(PICTURES, cross_entropy, 0.1, 1, layer="body.0"),
        "linear layer or of a norm",
    ),
    "minibatches: no inner steps": (lambda: minibatches(protonet(NET), 5), "inner steps"),
    "minibatches: no row": (lambda: minibatches(LEARNER, 0), "size"),
    "part_of: a tensor for the support set": (lambda: part_of(DRAW.support.x, 5, 0), "Batch"),
    "part_of: half a step": (lambda: part_of(SUPPORT, 5, 0.5), "step"),
    "protomaml: a head without a bias": (
        lambda: protomaml(NO_BIAS, cross_entropy, 0.1, 1),
        "with a bias",
    ),
    "logistic_head: a class that is absent": (
        lambda: logistic_head(torch.randn(4, 3), torch.tensor([0, 0, 2, 2])),
        "each with a row",
    ),
    "logistic_head: C of 0": (
        lambda: logistic_head(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), 0.0),
        "c > 0|above 0|c",
    ),
    "logistic_head: a label too few": (
        lambda: logistic_head(torch.randn(4, 3), torch.tensor([0, 0, 1])),
        "as many labels",
    ),
    "linear_probe: no regularisation": (
        lambda: linear_probe(NET, cross_entropy, 0.0),
        "strength > 0",
    ),
    "linear_probe: a strength of NaN": (
        lambda: linear_probe(NET, cross_entropy, NAN),
        "strength > 0",
    ),
    "linear_probe: no iterations": (lambda: linear_probe(NET, iterations=0), "iterations"),
    "linear_probe: a strength for the loss": (lambda: linear_probe(NET, 0.1), "loss"),
    "lp_ft: a head of two layers": (
        lambda: lp_ft(DEEP, cross_entropy, 0.1, 1),
        "one linear layer",
    ),
    "fresh_head: the network for the learner": (lambda: fresh_head(NET, NET), "learner"),
    "fresh_head: no head": (lambda: fresh_head(LEARNER, nn.Linear(3, 2)), "head"),
    "fresh_head: another network's head": (
        lambda: fresh_head(LEARNER, mlp(30, (6,), 5)).adapt(PHI, SUPPORT),
        "shape|head",
    ),
    "l2_sp: a negative strength": (lambda: l2_sp(-1.0), "strength"),
    "l2_sp: a head strength of NaN": (lambda: l2_sp(1.0, NAN), "head"),
    "delta: a negative strength": (lambda: delta(NET, -1.0), "strength"),
    "delta: no body": (lambda: delta(nn.Linear(3, 2), 1.0), "two named halves"),
    "bss: no directions": (
        lambda: bss(NET, 1.0, smallest=0)(PHI, PHI, SUPPORT.x),
        "from 1 to 5 singular values",
    ),
    "bss: a negative strength": (lambda: bss(NET, -1.0), "strength"),
    "discriminative: a factor of 0": (lambda: discriminative(NET, 0.1, 0.0), "factor"),
    "discriminative: a negative rate": (lambda: discriminative(NET, -0.1), "lr|rate"),
    "discriminative: φ for the network": (lambda: discriminative(PHI, 0.1), "nn.Module"),
    "gradual: every 0 steps": (lambda: gradual(NET, 0.1, 0), "every ≥ 1"),
    "gradual: a rate of NaN": (lambda: gradual(NET, NAN, 1), "lr|rate"),
    "weight_decay: no decay": (
        lambda: hyper.weight_decay(NET, cross_entropy, 0.1, 1, 0.0),
        "decay > 0",
    ),
    "weight_decay: a decay of NaN": (
        lambda: hyper.weight_decay(NET, cross_entropy, 0.1, 1, NAN),
        "decay > 0",
    ),
    "reweighted: other rows": (
        lambda: gives(NET, make=lambda n: hyper.reweighted(n, cross_entropy, 0.1, 1, 7)),
        "expected 7 support rows",
    ),
    "reweighted: no examples": (
        lambda: hyper.reweighted(NET, cross_entropy, 0.1, 1, 0),
        "examples",
    ),
    "reweighted: a negative decay": (
        lambda: hyper.reweighted(NET, cross_entropy, 0.1, 1, 5, -1.0),
        "decay",
    ),
    "weighted_ridge: names of groups": (
        lambda: hyper.weighted_ridge(["left", "right"], 5),
        "groups",
    ),
    "weighted_ridge: no group 0": (
        lambda: hyper.weighted_ridge(torch.tensor([1, 2]), 5),
        "groups",
    ),
    "weighted_ridge: no decay": (
        lambda: hyper.weighted_ridge(torch.tensor([0, 1]), 5, 0.0),
        "decay > 0",
    ),
    "new_networks: a network for its maker": (
        lambda: hyper.new_networks(NET, SUPPORT, 2, 3),
        "make|function",
    ),
    "new_networks: more rows than there are": (
        lambda: hyper.new_networks(lambda: mlp(4, (6,), 3), SUPPORT, 2, 999),
        "at most",
    ),
    "new_networks: no tasks": (
        lambda: hyper.new_networks(lambda: mlp(4, (6,), 3), SUPPORT, 0, 3),
        "tasks",
    ),
    "distilled: a tuple for the seeds": (
        lambda: hyper.distilled(NET, cross_entropy, 0.1, 1, (SUPPORT.x, SUPPORT.y)),
        "Batch",
    ),
    "distilled: a rate of 0": (
        lambda: hyper.distilled(NET, cross_entropy, 0.0, 1, SUPPORT),
        "lr",
    ),
    "distilled: another network's start": (
        lambda: gives(
            NET,
            Batch(hyper.flat(parameters(OTHER))[None], torch.zeros(1, 5)),
            lambda n: hyper.distilled(n, cross_entropy, 0.1, 1, SUPPORT),
        ),
        "another network's",
    ),
    "flat: no entries": (lambda: hyper.flat({}), "at least one|entries"),
    "flat: a network": (lambda: hyper.flat(NET), "parameters"),
    "unflat: too short": (lambda: hyper.unflat(torch.zeros(3), PHI), "another network's"),
    "unflat: a matrix": (lambda: hyper.unflat(torch.zeros(293, 2), PHI), r"one row|\(P,\)"),
    "one_rate: a rate of 0": (
        lambda: optimizer.one_rate(NET, cross_entropy, 0.0, 1),
        "lr > 0",
    ),
    "one_rate: a number for the schedule": (
        lambda: optimizer.one_rate(NET, cross_entropy, 0.1, 1, schedule=0.5),
        "schedule",
    ),
    "one_rate: a support set without a start": (
        lambda: gives(NET, make=lambda n: optimizer.one_rate(n, cross_entropy, 0.1, 1)),
        "with_starts",
    ),
    "cosine: no steps": (lambda: optimizer.cosine(0), "steps"),
    "learned_optimizer: one rate": (
        lambda: optimizer.learned_optimizer(NET, cross_entropy, 1, 0.1),
        "three rates",
    ),
    "learned_optimizer: a negative rate": (
        lambda: optimizer.learned_optimizer(NET, cross_entropy, 1, (0.0, 0.0, -0.1)),
        "rates",
    ),
    "learned_optimizer: no hidden units": (
        lambda: optimizer.learned_optimizer(NET, cross_entropy, 1, hidden=0),
        "hidden",
    ),
    "learned_optimizer: a scale of NaN": (
        lambda: optimizer.learned_optimizer(NET, cross_entropy, 1, scale=NAN),
        "scale",
    ),
    "learned_optimizer: a support set without a start": (
        lambda: gives(NET, make=lambda n: optimizer.learned_optimizer(n, cross_entropy, 1)),
        "with_starts",
    ),
    "update: directions of others": (
        lambda: optimizer.update({}, torch.zeros(9, 4), torch.zeros(3, 5), 0.1),
        "directions",
    ),
    "features: gradients of others": (
        lambda: optimizer.features(torch.zeros(4), torch.zeros(5), None, 0, torch.zeros(4).long()),
        "theta, g and tensor",
    ),
    "alike: numbers of other parameters": (
        lambda: optimizer.alike(torch.zeros(6, 4), torch.zeros(5).long()),
        "features",
    ),
    "with_starts: a network for its maker": (
        lambda: optimizer.with_starts(lambda step: DRAW, NET),
        "make|function",
    ),
    "with_starts: a stream of batches": (
        lambda: optimizer.with_starts(lambda step: SUPPORT, lambda: mlp(4, (6,), 3))(0),
        "episodes",
    ),
    "parts_of: more rows than there are": (
        lambda: training.parts_of(SUPPORT, 0, 999),
        "less than",
    ),
    "mislabelled: a share of 2": (lambda: training.mislabelled(SUPPORT.y, 2.0, 0), "share"),
    "three_numbers: all dropped": (
        lambda: training.three_numbers(torch.arange(5), 2, 0.5, 1.0, -5.0),
        "drop",
    ),
    "random_search: no trials": (
        lambda: training.random_search(lambda v: 0.0, torch.zeros(2), 0, 0),
        "trials",
    ),
    "Bowls: a flat one": (lambda: training.Bowls(torch.zeros(3), 2), "steepness"),
    "bowl_variance: a rate that diverges": (
        lambda: training.bowl_variance(torch.ones(2), torch.ones(2), 2.5, 3),
        "rate",
    ),
    "digit_trainings: an unknown part": (
        lambda: training.digit_trainings(SUPPORT.x, SUPPORT.y, [0], 3, 2),
        "part",
    ),
    "side_by_side: no inner steps": (
        lambda: training.side_by_side(ridge(NET), 2),
        "inner steps",
    ),
    "runs: no streams": (lambda: training.runs([]), "streams"),
    "tuned: one rate": (
        lambda: training.tuned(lambda: None, [0.1], DRAW, cross_entropy, 2),
        "at least three",
    ),
    "lora: no rank": (lambda: lora(NET, cross_entropy, 0.1, 1, rank=0), "rank of at least 1"),
    "lora: half a rank": (lambda: lora(NET, cross_entropy, 0.1, 1, rank=2.5), "rank"),
    "lora: a scale of NaN": (lambda: lora(NET, cross_entropy, 0.1, 1, scale=NAN), "scale"),
    "merged: nothing to merge": (
        lambda: merged(PHI),
        lambda theta: theta.keys() == PHI.keys(),
    ),
    "merged: the network": (lambda: merged(NET), "parameters"),
    "policy_gradient: no spread": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, 0.0, 0.1, 1),
        "spread",
    ),
    "policy_gradient: negative spread": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, -1.0, 0.1, 1),
        "spread",
    ),
    "policy_gradient: no dimensions": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, 1.0, 0.1, 1, dims=0),
        "dims",
    ),
    "learned: a network for the maker": (lambda: learned({"a": torch.ones(1)}, NET), "learner"),
    "learned: a maker that makes none": (
        lambda: learned({"a": torch.ones(1)}, lambda own: None),
        "learner",
    ),
    "bd_cspn: a scale of 0": (lambda: bd_cspn(NET, 0.0), "scale > 0"),
    "bd_cspn: a scale of NaN": (lambda: bd_cspn(NET, NAN), "scale > 0"),
    "laplacian_shot: no neighbours": (lambda: laplacian_shot(NET, neighbours=0), "neighbours"),
    "laplacian_shot: a negative strength": (lambda: laplacian_shot(NET, -1.0), "strength"),
    "laplacian_shot: half a round": (lambda: laplacian_shot(NET, steps=2.5), "steps"),
    "cnp: no hidden units": (lambda: cnp(NET, 0), "hidden"),
    "cnp: a negative floor": (lambda: cnp(NET, floor=-0.1), "floor"),
    "cnp: a floor above 1": (lambda: cnp(NET, floor=1.5), "floor"),
    "attentive_cnp: no hidden units": (lambda: attentive_cnp(NET, 0), "hidden"),
    "in_context: no hidden units": (lambda: in_context(NET, hidden=0), "hidden"),
    "in_context: a floor above 1": (lambda: in_context(NET, floor=1.5), "floor"),
    "in_context: no layers": (lambda: in_context(NET, layers=0), "layers"),
    "in_context: half a head": (lambda: in_context(NET, heads=0.5), "heads"),
    "in_context: heads that do not divide": (lambda: in_context(NET, heads=5), "divide hidden"),
    "in_context: no classes": (lambda: in_context(NET, 0), "ways"),
    "in_context: a word for the classes": (lambda: in_context(NET, "two"), "ways"),
    "in_context: more classes than it has": (
        lambda: gives(NET, make=lambda net: in_context(net, 2)),
        "2 to ways = 2",
    ),
    "in_context: real targets for classes": (
        lambda: gives(NET, Batch(SUPPORT.x, SUPPORT.y[:, :1]), lambda net: in_context(net, 3)),
        "ways=None",
    ),
    "in_context: class numbers": (
        lambda: gives(NET, Batch(SUPPORT.x, LABELS), lambda net: in_context(net, 3)),
        r"\(.*W\)|one-hot",
    ),
    "gaussian_nll: an odd number of columns": (
        lambda: gaussian_nll(torch.ones(4, 3), torch.ones(4, 1)),
        "two columns",
    ),
    "gaussian_nll: negative deviations": (
        lambda: gaussian_nll(-torch.ones(4, 2), torch.ones(4, 1)),
        torch.isnan,
    ),
    "gaussian_nll: more columns than targets": (
        lambda: gaussian_nll(torch.ones(4, 6), torch.ones(4, 1)),
        "two columns",
    ),
    "gaussian_nll: targets without an axis": (
        lambda: gaussian_nll(torch.ones(4, 2), torch.ones(4)),
        "two columns",
    ),
    "point: the network for the learner": (lambda: point(NET), "learner"),
    "point: predictions of one column": (
        lambda: gives(
            mlp(30, (8,), 1), Batch(SUPPORT.x, SUPPORT.y[:, :1]), lambda n: point(as_is(n))
        ),
        "even|two columns",
    ),
}

# transfer -------------------------------------------------------------------------------------------

_PENALTIES: dict[str, Callable[..., Any]] = {
    "coral": align.coral,
    "mcc": align.mcc,
    "mmd": align.mmd,
    "jan": align.jan,
    "entropy penalty": align.entropy,
    "information penalty": align.information,
    "afn": align.afn,
    "bsp": align.bsp,
    "dann": partial(critics.dann, CRITIC),
    "cdan": partial(critics.cdan, CRITIC),
    "mdd": partial(critics.mdd, CRITIC),
    "mcd": partial(critics.mcd, NET),
}
for _name, _make in _PENALTIES.items():
    BAD[f"{_name}: a negative strength"] = (partial(_make, -1.0), "strength")
    BAD[f"{_name}: a strength of NaN"] = (partial(_make, NAN), "strength")

_ZS, _LOGITS = torch.randn(1, 4, 3), torch.randn(1, 4, 5)
BAD |= {
    "coral: one domain": (lambda: align.coral()(PHI, _ZS, _LOGITS), "T ≥ 2 domains"),
    "recoloured: one row": (
        lambda: align.recoloured(torch.zeros(1, 3), torch.zeros(4, 3)),
        "B ≥ 2 rows",
    ),
    "recoloured: a strength of 0": (
        lambda: align.recoloured(torch.zeros(4, 3), torch.zeros(4, 3), 0.0),
        "strength > 0|above 0|strength",
    ),
    "mmd: one domain": (lambda: align.mmd()(PHI, _ZS, _LOGITS), "T ≥ 2 domains"),
    "jan: one domain": (lambda: align.jan()(PHI, _ZS, _LOGITS), "T ≥ 2 domains"),
    "coral: one item": (lambda: align.coral()(PHI, torch.zeros(2, 1, 3), None), "B ≥ 2 items"),
    "coral: features that are maps": (
        lambda: align.coral()(PHI, torch.zeros(2, 4, 3, 5, 5), None),
        r"features \(T, B, D\)",
    ),
    "mmd: no widths": (lambda: align.mmd(widths=()), "widths"),
    "mmd: a width of 0": (lambda: align.mmd(widths=(0.0,)), "width > 0"),
    "jan: a negative width": (lambda: align.jan(widths=(-1.0,)), "width > 0"),
    "jan: a bandwidth of 0": (lambda: align.jan(bandwidth=0.0), "bandwidth > 0"),
    "jan: a bandwidth of NaN": (lambda: align.jan(bandwidth=NAN), "bandwidth > 0"),
    "information penalty: one output": (
        lambda: align.information()(PHI, _ZS, _LOGITS[..., :1]),
        "at least two classes",
    ),
    "critic: no inputs": (lambda: critics.critic(0), "expected inputs to be a whole number"),
    "critic: half an output": (lambda: critics.critic(4, 1.5), "expected outputs to be a whole"),
    "critic: a seed that is none": (lambda: critics.critic(4, seed="one"), "seed"),
    "normed: no outputs": (lambda: normed(3, 0), "expected outputs to be a whole number"),
    "normed: a list": (lambda: normed([3], 2), "expected inputs to be a whole number"),
    "conv2: a word for the bottleneck": (lambda: conv2(bottleneck="none"), "bottleneck"),
    "mcc: a temperature of 0": (lambda: align.mcc(temperature=0.0), "temperature"),
    "mcc: a negative temperature": (lambda: align.mcc(temperature=-1.0), "temperature"),
    "bsp: no directions": (lambda: align.bsp(largest=0), "largest"),
    "bsp: half a direction": (lambda: align.bsp(largest=1.5), "largest"),
    "covariance: one row": (lambda: align.covariance(torch.zeros(1, 3)), "rows"),
    "covariance: a vector": (lambda: align.covariance(torch.zeros(3)), r"\(B, D\)"),
    "kernel: no widths": (lambda: align.kernel(Z, ()), "widths"),
    "discrepancy: an odd number of rows": (
        lambda: align.discrepancy(torch.zeros(5, 5)),
        r"\(2B, 2B\)|two samples",
    ),
    "adversary: parameters": (lambda: critics.adversary(PHI), "nn.Module"),
    "adversary: a class": (lambda: critics.adversary(nn.Linear), "nn.Module"),
    "reverse: a list": (lambda: critics.reverse([1.0]), "tensor"),
    "reverse: a strength of NaN": (lambda: critics.reverse(Z, NAN), "strength"),
    "warm: progress below 0": (lambda: critics.warm(-1.0), "progress"),
    "warm: progress of NaN": (lambda: critics.warm(NAN), "progress"),
    "dann: φ for the critic": (lambda: critics.dann(PHI), "nn.Module"),
    "dann: the critic's entries forgotten": (
        lambda: joint(NET, cross_entropy, penalties=[critics.dann(CRITIC)])(PHI, BATCH),
        "critic|adversary",
    ),
    "dann: a critic of other outputs": (
        lambda: joint(NET, cross_entropy, penalties=[critics.dann(nn.Linear(8, 3))])(
            {**PHI, **critics.adversary(nn.Linear(8, 3))}, BATCH
        ),
        "one output for each of 2 domains",
    ),
    "dann: a critic of other features": (
        lambda: joint(NET, cross_entropy, penalties=[critics.dann(nn.Linear(9, 2))])(
            {**PHI, **critics.adversary(nn.Linear(9, 2))}, BATCH
        ),
        "cannot read",
    ),
    "mdd: a margin of 0": (lambda: critics.mdd(CRITIC, margin=0.0), "margin"),
    "mdd: a margin of NaN": (lambda: critics.mdd(CRITIC, margin=NAN), "margin"),
    "mcd: a head of an odd width": (
        lambda: joint(NET, cross_entropy, penalties=[critics.mcd(NET)])(PHI, BATCH),
        "two halves|even",
    ),
    "both_halves: no loss": (lambda: critics.both_halves(None), "loss"),
    "both_halves: an odd number of columns": (
        lambda: critics.both_halves(cross_entropy)(torch.zeros(4, 5), torch.zeros(4, 5)),
        "two halves|even|2W",
    ),
    "adda: one domain": (
        lambda: critics.adda(NET, PHI, CRITIC)(
            {**PHI, **critics.adversary(CRITIC)}, take(BATCH, slice(0, 1))
        ),
        "a source and a target",
    ),
    "adda: the network for the anchor": (lambda: critics.adda(NET, NET, CRITIC), "parameters"),
    "selection.entropy: a vector": (
        lambda: selection.entropy(torch.zeros(4)),
        r"\(n, D\)|\(n, C\)",
    ),
    "selection.entropy: NaN": (lambda: selection.entropy(torch.full((4, 2), NAN)), "finite"),
    "information: class numbers": (lambda: selection.information(LABELS), r"\(n, "),
    "information: a list": (lambda: selection.information([[0.1, 0.9]]), "tensor"),
    "class_shares: probabilities": (
        lambda: selection.class_shares(torch.full((4, 2), 0.5)),
        "got probabilities",
    ),
    "class_shares: shares of other classes": (
        lambda: selection.class_shares(torch.randn(4, 2), torch.full((3,), 1 / 3)),
        "2 shares",
    ),
    "snd: a temperature of 0": (lambda: selection.snd(Z, 0.0), "temperature > 0"),
    "temperature: one-hot rows": (
        lambda: selection.temperature(torch.randn(4, 3), torch.eye(4, 3)),
        "class number",
    ),
    "temperature: one class": (
        lambda: selection.temperature(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)),
        "at least two classes",
    ),
    "temperature: a class that is none": (
        lambda: selection.temperature(torch.randn(4, 3), torch.tensor([0, 1, 2, 3])),
        "from 0 to 2",
    ),
    "temperature: all right": (
        lambda: selection.temperature(3 * torch.eye(3), torch.arange(3)),
        "some are wrong",
    ),
    "temperature: probabilities": (
        lambda: selection.temperature(torch.eye(3), torch.tensor([1, 1, 2])),
        "probabilities",
    ),
    "snd: one row": (lambda: selection.snd(Z[:1]), "n ≥ 2 rows"),
    "revised: a precision for one of four inputs": (
        lambda: recalibration.revised(Z, Z[:, 0], Z[:, 0] > 0, torch.ones(3)),
        r"precision \(…, D\)",
    ),
    "revised: an outcome too few": (
        lambda: recalibration.revised(Z, Z[:, 0], Z[1:, 0], torch.ones(4)),
        r"y and weight \(…, n\)",
    ),
    "revision: a precision of 0": (
        lambda: recalibration.revision(4, 0.0),
        "expected precision > 0",
    ),
    "revision: x without the logit": (
        lambda: recalibration.revision(4).adapt(
            recalibration.revision(4).init(), Batch(Z, (Z[:, :1] > 0).float())
        ),
        r"x \(B, 5\), 4 inputs and the model's logit",
    ),
    "in_the_large: all are ill": (
        lambda: recalibration.in_the_large(Z[:, 0], torch.ones(12)),
        "outcomes of both kinds.*12 ill of 12",
    ),
    "in_the_large: an outcome too few": (
        lambda: recalibration.in_the_large(Z[:, 0], LABELS[1:] > 0),
        "a logit and an outcome of each",
    ),
    "in_the_large: outcomes of three kinds": (
        lambda: recalibration.in_the_large(Z[:, 0], LABELS),
        "outcomes of 0 and 1",
    ),
    "in_the_large: a list": (
        lambda: recalibration.in_the_large([0.1, 0.2], torch.ones(2)),
        "expected logits, a tensor",
    ),
    "in_the_large: a negative precision": (
        lambda: recalibration.in_the_large(Z[:, 0], LABELS % 2, -1.0),
        "precisions of at least 0",
    ),
    "logistic_recalibration: one precision": (
        lambda: recalibration.logistic_recalibration(Z[:, 0], LABELS % 2, (1.0,)),
        "two precisions",
    ),
    "logistic_recalibration: separated by the logits": (
        lambda: recalibration.logistic_recalibration(Z[:, 0], Z[:, 0] > 0),
        "do not separate",
    ),
    "prior_shift: a share in percent": (
        lambda: recalibration.prior_shift(0.5, 70),
        "the target's share of the ill, between 0 and 1, got 70",
    ),
    "prior_shift: nobody is ill": (
        lambda: recalibration.prior_shift(0.0, 0.5),
        "the source's share",
    ),
    "density_ratio: other widths": (
        lambda: selection.density_ratio(Z, Z[:, :2], Z),
        "the same width",
    ),
    "density_ratio: numpy": (
        lambda: selection.density_ratio(Z.numpy(), Z.numpy(), Z.numpy()),
        "tensor",
    ),
    "dev: negative weights": (lambda: selection.dev(torch.ones(4), -torch.ones(4)), "weights ≥ 0"),
    "dev: other lengths": (lambda: selection.dev(torch.ones(4), torch.ones(3)), "each of n ≥ 2"),
    "h_score: one class": (lambda: transferability.h_score(Z, LABELS * 0), "at least 2 classes"),
    "h_score: one-hot labels": (
        lambda: transferability.h_score(Z, one_hot(LABELS, 3)),
        r"y.argmax\(1\)",
    ),
    "h_score: numpy": (lambda: transferability.h_score(Z.numpy(), LABELS.numpy()), "tensor"),
    "nce: other lengths": (lambda: transferability.nce(LABELS, LABELS[1:]), "as many z as y"),
    "nce: real labels": (lambda: transferability.nce(Z[:, 0], LABELS), "class numbers"),
    "leep: logits": (lambda: transferability.leep(Z, LABELS), "rows ≥ 0 that sum to 1"),
    "leep: probabilities of half precision": (
        lambda: transferability.leep(torch.softmax(5 * Z, 1).half(), LABELS),
        lambda value: abs(value - transferability.leep(torch.softmax(5 * Z, 1), LABELS)) < 1e-2,
    ),
    "logme: other lengths": (lambda: transferability.logme(Z, LABELS[1:]), "as many rows"),
    "logme: NaN": (lambda: transferability.logme(Z * NAN, LABELS), "finite"),
    "logme: class numbers as floats": (
        lambda: transferability.logme(Z, one_hot(LABELS, 3).long()),
        "class numbers",
    ),
    "evidence_maximum: all zero": (
        lambda: transferability.evidence_maximum(Z * 0, Z[:, 0]),
        "not all zero",
    ),
    "log_evidence: a negative precision": (
        lambda: transferability.log_evidence(Z, Z[:, 0], -1.0, 1.0),
        "positive precisions",
    ),
    "log_evidence: two columns": (
        lambda: transferability.log_evidence(Z, Z[:, :2], 1.0, 1.0),
        "one column",
    ),
    "transrate: an ε of 0": (lambda: transferability.transrate(Z, LABELS, 0.0), "eps > 0"),
    "transrate: one class": (
        lambda: transferability.transrate(Z, LABELS * 0),
        "at least 2 classes",
    ),
    "a_distance: other widths": (
        lambda: transferability.a_distance(Z, Z[:, :2]),
        "the same width",
    ),
    "a_distance: a strength of 0": (
        lambda: transferability.a_distance(Z, Z, strength=0.0),
        "strength",
    ),
    "a_distance: three items": (lambda: transferability.a_distance(Z[:3], Z), "≥ 4 items"),
    "irm: a negative strength": (lambda: unseen.irm(NET, cross_entropy, -1.0), "strength"),
    "irm: episodes": (lambda: unseen.irm(NET, cross_entropy, 1.0)(PHI, DRAW), "batches"),
    "vrex: a negative strength": (lambda: unseen.vrex(NET, cross_entropy, -1.0), "strength"),
    "vrex: episodes": (lambda: unseen.vrex(NET, cross_entropy, 1.0)(PHI, DRAW), "batches"),
    "group_dro: its weights forgotten": (
        lambda: unseen.group_dro(NET, cross_entropy)(PHI, BATCH),
        "group_weights",
    ),
    "group_dro: weights of another number": (
        lambda: unseen.group_dro(NET, cross_entropy)({**PHI, **unseen.group_weights(3)}, BATCH),
        "one number for each of 2",
    ),
    "group_weights: none": (lambda: unseen.group_weights(0), "domains"),
    "group_weights: half a domain": (lambda: unseen.group_weights(1.5), "domains"),
    "mldg: a negative rate": (lambda: unseen.mldg(NET, cross_entropy, -0.1, 1.0), "lr|rate"),
    "mldg: batches": (
        lambda: unseen.mldg(NET, cross_entropy, 0.1, 1.0)(PHI, BATCH),
        "held_out|episodes",
    ),
    "held_out: one domain": (
        lambda: unseen.held_out(lambda s: take(BATCH, slice(0, 1)), 0)(0),
        "at least 2 domains",
    ),
    "held_out: no seed": (lambda: unseen.held_out(BATCHES, None), "seed"),
    "held_out: episodes": (lambda: unseen.held_out(STREAM, 0)(0), "expects batches"),
    "mixup: a negative strength": (lambda: unseen.mixup(BATCHES, -1.0, 0), "strength"),
    "mixup: a strength of NaN": (lambda: unseen.mixup(BATCHES, NAN, 0), "strength"),
    "mixup: episodes": (lambda: unseen.mixup(STREAM, 1.0, 0)(0), "expects batches"),
    "described: of another length": (
        lambda: (
            lambda r: cold_start.described(
                r, movietweetings.known(r, np.ones(len(r.user), bool), 2.0), r.film[:3], r.time[:3]
            )
        )(movietweetings.drawn(users=5)),
        "each film and time",
    ),
    "Users.test: a user with too few ratings": (
        lambda: USERS.test(np.array([0]), 2, 9),
        "at least 10 ratings",
    ),
    "Users.practice: no users": (
        lambda: USERS.practice(np.array([], int), (2,), 3, 1, 0),
        "at least 4 ratings",
    ),
    "Users.pooled: more than a user has": (
        lambda: USERS.pooled(np.array([0]), 9, 0),
        "at least 9 ratings",
    ),
    "mean_absolute_error: another shape": (
        lambda: cold_start.mean_absolute_error(torch.ones(3), torch.ones(3, 1)),
        "shape",
    ),
    "biases: a negative shrinkage": (lambda: cold_start.biases(1.0, -1.0), "shrink"),
    "biases: no slope": (lambda: cold_start.biases(0.0, 1.0), "slope"),
    "boosting: one leaf": (lambda: cold_start.boosting(lambda n: None, 0.1, 1), "leaves"),
    "boosting: a rate of 0": (lambda: cold_start.boosting(lambda n: None, 0.0, 8), "rate"),
    "by_user: users missing": (
        lambda: cold_start.by_user([torch.ones(2)], [torch.ones(2), torch.ones(3)]),
        "each user",
    ),
    "recall: no shelves": (lambda: cold_start.recall([], [], lambda s, f: s), "one at least"),
    "shelves: no first ratings": (
        lambda: (lambda r: cold_start.shelves(r, np.ones(len(r.user), bool), np.arange(3), 0))(
            movietweetings.drawn(users=5)
        ),
        "shots",
    ),
    "folds: no contests": (lambda: in_a_row([], "users"), "at least one contest"),
    "exact_world: no spread": (lambda: generalising.exact_world(0.0, 1.0), "s"),
    "exact_world: a link of NaN": (lambda: generalising.exact_world(1.0, NAN), "c"),
    "coloured: an agreement above 1": (lambda: generalising.coloured(0, 1.2, 5), "agreement"),
    "coloured: no rows": (lambda: generalising.coloured(0, 0.9, 0), "rows"),
    "by_colour: a group without rows": (
        lambda: generalising.by_colour(generalising.coloured(0, 1.0, 50), 5, 0),
        "each colour",
    ),
    "by_colour: no batch": (
        lambda: generalising.by_colour(generalising.coloured(0, 0.5, 50), 0, 0),
        "batch",
    ),
    "even: no wrong colour": (
        lambda: generalising.even(generalising.coloured(0, 1.0, 50)),
        "wrong one",
    ),
    "even: numbers": (lambda: generalising.even(LABELS), "Batch"),
    "asked: more parts than items": (
        lambda: generalising.asked(generalising.coloured(0, 0.9, 5), parts=6),
        "at least 6 items",
    ),
    "asked: no part": (
        lambda: generalising.asked(generalising.coloured(0, 0.9, 5), parts=0),
        "parts",
    ),
    "plan: an unknown method": (
        lambda: generalising.plan("CORAL", 1.0, NET, BATCHES, 0),
        "method",
    ),
    "plan: a negative strength": (lambda: generalising.plan("IRM", -1.0, NET, BATCHES, 0), "0"),
    "generalising.train: a negative decay": (
        lambda: generalising.train("ERM", (0.1, -1.0, 0.0), NET, BATCHES, 1, 0, 0),
        "decay",
    ),
    "generalising.train: a setting of two numbers": (
        lambda: generalising.train("ERM", (0.1, 0.0), NET, BATCHES, 1, 0, 0),
        "three numbers",
    ),
    "sentences.answers: an unknown head": (
        lambda: sentences.answers("tree", *LABELLED, LABELLED[0]),
        "head",
    ),
    "sentences.answers: no strength of ridge": (
        lambda: sentences.answers("ridge", *LABELLED, LABELLED[0], 0.0),
        "strength",
    ),
    "cross_validated: one row of a class": (
        lambda: sentences.cross_validated("ridge", LABELLED[0][:3], np.arange(3), (1.0,)),
        "two labelled rows",
    ),
    "cross_validated: an unknown head": (
        lambda: sentences.cross_validated("tree", *LABELLED, (1.0,)),
        "head",
    ),
    "limit: no episode": (lambda: sentences.limit([]), "at least one episode"),
    "limit: nothing outside": (lambda: sentences.limit([SAID]), "outside"),
    "refusal: nothing outside": (lambda: sentences.refusal(SAID, 0.0), "outside"),
    "areas: nothing outside": (lambda: sentences.areas(SAID), "outside"),
    "Sentences: more labels than there are": (
        lambda: SENTENCES.drawn((0,), 3, 0, names=False),
        "at most 2 labels",
    ),
    "Sentences: no label": (lambda: SENTENCES.drawn((0,), 0, 0, names=False), "labels"),
    "Sentences: a part that is not there": (lambda: SENTENCES.place("train"), "part"),
    "Sentences: an unknown head": (
        lambda: SENTENCES.offered("tree", 1.0, (0,), 2, 0),
        "head",
    ),
    "sentences.trained: an unknown way": (
        lambda: sentences.trained(SENTENCES, "pooled", 0, 0, 0.1, 1.0),
        "by",
    ),
    "sentences.trained: no rate": (
        lambda: sentences.trained(SENTENCES, "joint", 0, 0, -0.1, 1.0),
        "rate|lr",
    ),
    "widest: one number": (lambda: adaptation.widest(torch.rand(1, 1)), "two directions"),
    "widest: a row": (lambda: adaptation.widest(torch.rand(5)), "directions, seeds"),
    "domain_mixup: a negative strength": (
        lambda: unseen.domain_mixup(BATCHES, -1.0, 0),
        "strength",
    ),
    "domain_mixup: one domain": (
        lambda: unseen.domain_mixup(lambda s: take(BATCH, slice(0, 1)), 1.0, 0)(0),
        "at least 2 domains",
    ),
    "domain_mixup: integer tokens": (
        lambda: unseen.domain_mixup(lambda s: replaced(BATCH, x=lambda x: x.long()), 1.0, 0)(0),
        "floating-point|integer",
    ),
    "domain_mixup: a draw for the stream": (
        lambda: unseen.domain_mixup(BATCH, 1.0, 0),
        "a stream",
    ),
    "domain_mixup: no seed": (lambda: unseen.domain_mixup(BATCHES, 1.0, None), "seed"),
    "mixup: integer tokens": (
        lambda: unseen.mixup(lambda s: replaced(BATCH, x=lambda x: x.long()), 1.0, 0)(0),
        "floating-point|integer",
    ),
    "uncertainty: its entries forgotten": (
        lambda: weights.uncertainty(NET, cross_entropy)(PHI, BATCH),
        "log_variances",
    ),
    "uncertainty: columns that overlap": (
        lambda: weights.uncertainty(NET, cross_entropy, [slice(0, 3), slice(2, 5)])(
            {**PHI, **weights.log_variances(2)}, BATCH
        ),
        "overlap",
    ),
    "log_variances: none": (lambda: weights.log_variances(0), "sets"),
    "log_variances: half a set": (lambda: weights.log_variances(1.5), "sets"),
    "gradnorm: no weights to balance": (
        lambda: weights.gradnorm(nn.Linear(30, 5), cross_entropy),
        "none",
    ),
    "gradnorm: an unknown layer": (
        lambda: weights.gradnorm(NET, cross_entropy, layer="body.7.weight"),
        "body.7.weight",
    ),
    "gradnorm: a strength of NaN": (lambda: weights.gradnorm(NET, cross_entropy, NAN), "strength"),
    "balances: a risk of 0": (lambda: weights.balances(torch.tensor([1.0, 0.0])), "above 0"),
    "balances: a list": (lambda: weights.balances([1.0, 2.0]), "tensor"),
    "pcgrad: episodes": (lambda: weights.pcgrad(NET, cross_entropy)(PHI, DRAW), "goes with"),
    "pcgrad: columns of one set": (
        lambda: weights.pcgrad(NET, cross_entropy, [slice(0, 5)])(PHI, BATCH),
        "columns of each data set",
    ),
    "without_conflict: a vector": (lambda: weights.without_conflict(torch.ones(3)), r"\(T, P\)"),
    "best_alpha: no target labels": (lambda: weights.best_alpha(0, 10, 1.0, 3.0), "target label"),
    "best_alpha: a distance of NaN": (lambda: weights.best_alpha(5, 10, NAN, 3.0), "distance"),
    "worlds: weights of other data sets": (
        lambda: worlds(torch.zeros(1, 3, 2), (5, 5), noisy, 0),
        r"\(R, T, d\)",
    ),
    "questions: two scanners": (lambda: questions({"a": None, "b": None}, 5), "three scanners"),
    "best_weights: a variance of 0": (
        lambda: weights.best_weights(torch.tensor([1.0, 0.0]), torch.zeros(2, 1)),
        "above 0",
    ),
    "best_weights: offsets as a vector": (
        lambda: weights.best_weights(torch.ones(2), torch.zeros(2)),
        r"\(T, d\)",
    ),
}

# models -----------------------------------------------------------------------------------------------

BAD |= {
    "pretrained: a size of 0": (lambda: pretrained(size=0), "expected size to be a whole number"),
    "pretrained: no ways": (lambda: pretrained(ways=0, weights=None), "ways"),
    "pretrained: a model for the name": (lambda: pretrained(backbone(), weights=None), "split"),
    "split: no ways": (lambda: split(backbone(), 0), "ways"),
    "split: half a way": (lambda: split(backbone(), 2.5), "ways"),
    "split: φ for the model": (lambda: split(PHI, 5), "nn.Module"),
    "split: a model's name": (lambda: split("resnet18", 5), "nn.Module|pretrained"),
    "split: no linear layer": (lambda: split(nn.Conv2d(3, 4, 3), 5), "linear layer"),
    "split: a size of 0": (lambda: split(backbone(), 5, size=0), "size"),
    "split: images of bytes": (
        lambda: split(backbone(), 5, size=8)(torch.full((2, 3, 8, 8), 200).byte()),
        r"\[0, 1\]",
    ),
    "split: images from 0 to 255": (
        lambda: split(backbone(), 5, size=8)(torch.rand(2, 3, 8, 8) * 255),
        r"\[0, 1\]",
    ),
    "split: images that are normalised already": (
        lambda: split(backbone(), 5, size=8)(torch.randn(2, 3, 8, 8)),
        r"\[0, 1\]",
    ),
    "split: images of NaN": (
        lambda: split(backbone(), 5, size=8)(torch.full((2, 3, 8, 8), NAN)),
        r"\[0, 1\]",
    ),
    "split: channels last": (
        lambda: split(backbone(), 5, size=8)(torch.rand(2, 8, 8, 3)),
        r"\(B, 1 or 3, h, w\)",
    ),
    "split: images without a channel": (
        lambda: split(backbone(), 5, size=8)(torch.rand(2, 8, 8)),
        r"\(B, 1 or 3, h, w\)",
    ),
    "split: numpy images": (
        lambda: split(backbone(), 5, size=8)(np.zeros((2, 3, 8, 8), np.float32)),
        "tensor",
    ),
    "split: a deviation of 0": (lambda: split(backbone(), 5, std=(0.0, 1.0, 1.0)), "std"),
    "split: two means": (lambda: split(backbone(), 5, mean=(0.5, 0.5)), "mean"),
    "ReadImages: a size of 0": (lambda: ReadImages(0), "size"),
    "ReadImages: five channels": (lambda: ReadImages(8)(torch.rand(2, 5, 8, 8)), "1 or 3"),
    "EfficientNetLite0: no classes": (lambda: EfficientNetLite0(0), "classes"),
    "EfficientNetLite0: normalised images": (
        lambda: EfficientNetLite0(2)(2 * torch.rand(2, 3, 32, 32) - 1),
        r"\[0, 1\]",
    ),
    "EfficientNetLite0: channels last": (
        lambda: EfficientNetLite0(2).features(torch.rand(2, 32, 32, 3)),
        r"\(B, 1 or 3, h, w\)",
    ),
    "EfficientNetLite0: a stride that has no map": (
        lambda: EfficientNetLite0(2).stages(torch.rand(2, 3, 32, 32), 12),
        "stride",
    ),
    "before: more blocks than there are": (lambda: before(17, torch.rand(2, 3, 8, 8)), "blocks"),
    "before: images from 0 to 255": (lambda: before(1, torch.rand(2, 3, 8, 8) * 255), r"\[0, 1\]"),
    "last: no blocks": (lambda: last(0, EfficientNetLite0(2)), "blocks"),
    "last: another network": (lambda: last(1, backbone()), "EfficientNetLite0"),
    "seen: images of bytes": (
        lambda: seen(torch.full((2, 3, 8, 8), 200).byte(), 32, pretrained=False),
        r"\[0, 1\]",
    ),
    "seen: a size of 0": (lambda: seen(torch.rand(2, 3, 8, 8), 0, pretrained=False), "size"),
    "pooled: no image": (lambda: pooled(torch.rand(0, 1, 8, 8)), "at least one"),
    "pooled: one image": (lambda: pooled(torch.rand(1, 8, 8)), r"\(B, 1 or 3, h, w\)"),
    "pooled: numpy images": (lambda: pooled(np.zeros((2, 3, 8, 8), np.float32)), "tensor"),
    "pooled: images of bytes": (
        lambda: pooled(torch.full((2, 3, 8, 8), 200).byte()),
        r"\[0, 1\]",
    ),
    "pooled: images from 0 to 255": (lambda: pooled(torch.rand(2, 3, 8, 8) * 255), r"\[0, 1\]"),
    "pooled: a stride that has no map": (
        lambda: pooled(torch.rand(2, 3, 8, 8), stride=3),
        "stride",
    ),
    "pooled: cells of a vector": (lambda: pooled(torch.rand(2, 3, 8, 8), cells=2), "stride"),
    "pooled: a size of 0": (lambda: pooled(torch.rand(2, 3, 8, 8), size=0), "size"),
    "detector: no classes": (lambda: detector(0), "classes"),
    "detector: a width that groups do not divide": (lambda: detector(3, 10), "width"),
    "detector: grey images": (
        lambda: (lambda net: apply(net)(parameters(net), torch.rand(1, 1, 32, 32)))(detector(2, 8)),
        "cannot read",
    ),
    "targets: boxes without an area": (
        lambda: targets(torch.tensor([[5.0, 5.0, 5.0, 9.0]]), torch.tensor([0]), 2, 32, 32),
        "boxes with an area",
    ),
    "targets: a box outside": (
        lambda: targets(torch.tensor([[50.0, 5.0, 60.0, 9.0]]), torch.tensor([0]), 2, 32, 32),
        "centres inside",
    ),
    "targets: a label beyond the classes": (
        lambda: targets(torch.tensor([[5.0, 5.0, 9.0, 9.0]]), torch.tensor([2]), 2, 32, 32),
        "class numbers from 0 to 1",
    ),
    "targets: a label of −1": (
        lambda: targets(torch.tensor([[5.0, 5.0, 9.0, 9.0]]), torch.tensor([-1]), 2, 32, 32),
        "class numbers from 0 to 1",
    ),
    "targets: a box without a label": (
        lambda: targets(torch.tensor([[5.0, 5.0, 9.0, 9.0]]), torch.zeros(0).long(), 2, 32, 32),
        "one label per box",
    ),
    "targets: boxes of NaN": (
        lambda: targets(torch.full((1, 4), NAN), torch.tensor([0]), 2, 32, 32),
        "boxes",
    ),
    "targets: one box without its axis": (
        lambda: targets(torch.tensor([5.0, 5.0, 9.0, 9.0]), torch.tensor([0]), 2, 32, 32),
        r"\(K, 4\)",
    ),
    "centre_loss: no classes": (lambda: centre_loss(0), "classes"),
    "centre_loss: a negative weight": (lambda: centre_loss(2, -1.0), "size_weight"),
    "centre_loss: maps of other classes": (
        lambda: centre_loss(3)(torch.zeros(1, 6, 8, 8), torch.zeros(1, 6, 8, 8)),
        r"C \+ 4|7",
    ),
    "decode: maps of other classes": (
        lambda: decode(torch.zeros(1, 6, 8, 8), 3),
        r"\(B, C \+ 4, h, w\)|7",
    ),
    "decode: one photograph without its axis": (
        lambda: decode(torch.zeros(6, 8, 8), 2),
        r"\(B, C \+ 4, h, w\)|\(B, 6, h, w\)",
    ),
    "decode: no detections": (lambda: decode(torch.zeros(1, 6, 8, 8), 2, most=0), "most"),
    "flipped: the channels": (
        lambda: flipped(torch.zeros(1, 3, 32, 32), torch.zeros(1, 6, 8, 8), 2, 1),
        "axis",
    ),
    "flipped: the last axis as −1": (
        lambda: flipped(torch.zeros(1, 3, 32, 32), torch.zeros(1, 6, 8, 8), 2, -1),
        "axis",
    ),
    "average_precision: photographs missing": (
        lambda: average_precision(photographs(1)[0], *photographs(2)[1:], 2),
        "one entry per photograph",
    ),
    "average_precision: an IoU of 50": (
        lambda: average_precision(*photographs(), 2, iou=50),
        "iou",
    ),
    "average_precision: a label beyond the classes": (
        lambda: average_precision(*photographs()[:2], [torch.tensor([3])] * 2, 2),
        "class numbers from 0 to 1",
    ),
    "judge: labels missing": (
        lambda: judge(*photographs()[:2], [torch.tensor([0])], 2),
        "one entry per photograph",
    ),
    "judge: an IoU of 0": (lambda: judge(*photographs(), 2, iou=0.0), "iou"),
    "annotated: a class that there is not": (
        lambda: annotated([torch.zeros(0, 4)], [torch.zeros(0).long()], 2, 32, 32, (2,)),
        "from 0 to 1",
    ),
    "annotated: labels missing": (
        lambda: annotated([torch.zeros(1, 4)], [torch.zeros(0).long()], 2, 32, 32),
        "one label per box",
    ),
    "by_photograph: one photograph": (
        lambda: by_photograph(judge(*photographs(1), 2)[0]),
        "two photographs",
    ),
    "caught: labels missing": (
        lambda: caught(*photographs()[:2], [torch.tensor([0])], 2),
        "one entry per photograph",
    ),
    "centre_head: a width of 6": (lambda: centre_head(5, 2, 6), "multiple of 4"),
    "centre_head: no inputs": (lambda: centre_head(0, 2), "inputs"),
    "find: maps of other classes": (
        lambda: find(detector(2, 8), torch.zeros(1, 3, 32, 32), 3, (8, 8)),
        r"3 \+ 4 channels",
    ),
    "find: no cells": (lambda: find(detector(2, 8), torch.zeros(1, 3, 32, 32), 2, (0, 8)), "h"),
    "missed_by_size: fewer boxes than parts": (
        lambda: missed_by_size(torch.ones(2, 2)),
        "at least 3 boxes",
    ),
    "missed_by_size: a score of 30": (lambda: missed_by_size(torch.ones(5, 2), 30), "least"),
    "photographs: no set": (lambda: stream_of_photographs(classes=2), "at least one"),
    "photographs: targets of other classes": (
        lambda: stream_of_photographs(
            Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, 6, 8, 8)), classes=3
        ),
        r"3 \+ 4 channels",
    ),
    "photographs: no batch": (
        lambda: stream_of_photographs(
            Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, 6, 8, 8)), classes=2, batch=0
        ),
        "batch",
    ),
    "feature_maps: grey photographs": (
        lambda: feature_maps(torch.zeros(1, 1, 32, 32)),
        "whole cells",
    ),
    "feature_maps: half a cell": (lambda: feature_maps(torch.zeros(1, 3, 30, 32)), "whole cells"),
    "resampled: counts of other photographs": (
        lambda: resampled(judge(*photographs(), 2)[0], torch.ones(5, 3)),
        "photographs",
    ),
    "resampled: one row without its axis": (
        lambda: resampled(judge(*photographs(), 2)[0], torch.ones(2)),
        r"\(R, n\)",
    ),
    "zero_linear: no inputs": (lambda: zero_linear(0, 2), "inputs"),
    "zero_linear: half an output": (lambda: zero_linear(2, 0.5), "outputs"),
    "at_edge: no setting of the grid": (lambda: at_edge(5, [1, 2, 3]), "one of the settings"),
    "at_edge: a tuple for a number": (lambda: at_edge((1,), [1, 2, 3]), "one of the settings"),
    "minilm: one text": (lambda: minilm("hello"), "list of texts"),
    "minilm: no text": (lambda: minilm([]), "list of texts"),
    "minilm: numbers": (lambda: minilm([1, 2]), "list of texts"),
    "minilm: no batch": (lambda: minilm(["a"], batch=0), "batch"),
    "small_bert: one text": (lambda: small_bert("hello", 2), "list of texts"),
    "small_bert: no word": (lambda: small_bert([], 2), "at least one"),
    "small_bert: no class": (lambda: small_bert(["hello"], 0), "ways"),
    "photos: no class": (lambda: yours.photos(0), "classes"),
    "photos: half a class": (lambda: yours.photos(2.5), "classes"),
    "reader: no class": (lambda: yours.reader(0), "ways"),
    "machines: none": (lambda: yours.machines(0), "number"),
    "machines: no reading": (lambda: yours.machines(3, 0), "readings"),
    "recordings: none": (lambda: yours.recordings(0), "items"),
    "recordings: half of one": (lambda: yours.recordings(0.5), "items"),
    "hashed: one text": (lambda: hashed("hello"), "list of texts"),
    "hashed: no text": (lambda: hashed([]), "at least one"),
    "hashed: numbers": (lambda: hashed([1, 2]), "holds int"),
    "hashed: another kind": (lambda: hashed(["a"], "letters"), "kind"),
    "hashed: from long to short": (lambda: hashed(["a"], sizes=(5, 3)), "shortest"),
    "hashed: no columns": (lambda: hashed(["a"], columns=0), "columns"),
    "encoded: one text": (lambda: encoded("hello", pretrained=False), "list of texts"),
}

# plots, run, book -----------------------------------------------------------------------------------------

BAD |= {
    "figure: no width": (lambda: figure(0.0).__enter__(), "width"),
    "figure: a height of NaN": (lambda: figure(3.0, NAN).__enter__(), "height"),
    "losses: one run, not a dict": (
        lambda: on_axes(lambda axes: losses(axes, [0.1, 0.2])),
        "name",
    ),
    "losses: a run without steps": (
        lambda: on_axes(lambda axes: losses(axes, {"a": fitted(steps=0)})),
        "steps",
    ),
    "scores: means for scores": (
        lambda: on_axes(lambda axes: scores(axes, {"a": 0.5}, "accuracy")),
        "Score",
    ),
    "scores: nothing": (lambda: on_axes(lambda axes: scores(axes, {}, "accuracy")), "at least one"),
    "scores: a list": (lambda: on_axes(lambda axes: scores(axes, [SCORE], "accuracy")), "name"),
    "against: scores and x of two lengths": (
        lambda: on_axes(lambda axes: against(axes, [1, 2], {"a": [SCORE]}, "x", "y")),
        "as many",
    ),
    "against: means for scores": (
        lambda: on_axes(lambda axes: against(axes, [1], {"a": [0.5]}, "x", "y")),
        "Score",
    ),
    "lines: other lengths": (
        lambda: on_axes(lambda axes: lines(axes, [1, 2], {"a": [0.5]}, "x", "y")),
        "for each x",
    ),
    "lines: no methods": (
        lambda: on_axes(lambda axes: lines(axes, [1], {}, "x", "y")),
        "at least one",
    ),
    "band: other lengths": (
        lambda: on_axes(lambda axes: band(axes, [1, 2], [0.1, 0.2], [0.1])),
        "as many",
    ),
    "band: a negative half-width": (
        lambda: on_axes(lambda axes: band(axes, [1, 2], [0.1, 0.2], [0.1, -0.1])),
        "half",
    ),
    "bars: other lengths": (
        lambda: on_axes(lambda axes: bars(axes, [1, 2], [0.1], [0.1])),
        "as many",
    ),
    "bars: a negative half-width": (
        lambda: on_axes(lambda axes: bars(axes, [1], [0.1], [-0.1])),
        "half",
    ),
    "curves: x and y of two lengths": (
        lambda: on_axes(lambda axes: curves(axes, {"a": ([0, 1], [1])}, "x", "y")),
        "one length",
    ),
    "curves: y alone": (
        lambda: on_axes(lambda axes: curves(axes, {"a": [1.0, 2.0, 3.0]}, "x", "y")),
        "x and y",
    ),
    "framed: a label beyond the classes": (
        lambda: on_axes(
            lambda axes: framed(
                axes, torch.zeros(3, 8, 8), torch.ones(1, 4), torch.tensor([1]), ["x"]
            )
        ),
        "class numbers below 1",
    ),
    "framed: channels last": (
        lambda: on_axes(
            lambda axes: framed(
                axes, torch.zeros(8, 8, 3), torch.ones(1, 4), torch.tensor([0]), ["x"]
            )
        ),
        "an image",
    ),
    "by_group: a number too few": (
        lambda: on_axes(lambda axes: by_group(axes, {"MAML": [1.0]}, ["a", "b"], "points")),
        "each of 2 groups",
    ),
    "by_group: no method": (
        lambda: on_axes(lambda axes: by_group(axes, {}, ["a"], "points")),
        "dict",
    ),
    "task: images with a channel": (
        lambda: pictures.task(None, torch.rand(5, 1, 8, 8), torch.rand(25, 8, 8), torch.zeros(25)),
        r"images shown \(W, h, w\)",
    ),
    "task: an answer too few": (
        lambda: pictures.task(None, torch.rand(5, 8, 8), torch.rand(25, 8, 8), torch.zeros(24)),
        "answers",
    ),
    "photographs: grey ones": (
        lambda: pictures.photographs(
            None, torch.rand(2, 8, 8), torch.rand(4, 8, 8), torch.zeros(4), ["a", "b"]
        ),
        r"shown \(W, 3, h, w\)",
    ),
    "photographs: a name too few": (
        lambda: pictures.photographs(
            None, torch.rand(2, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.zeros(4), ["a"]
        ),
        "names",
    ),
    "lookalikes: a network": (lambda: pictures.lookalikes(backbone(), PHI, DATA), "learner"),
    "lookalikes: items that are no images": (
        lambda: pictures.lookalikes(protonet(NET), PHI, DATA),
        "images",
    ),
    "confused: more axes than groups": (lambda: pictures.confused([None], []), "at most 0"),
    "dots: runs without groups": (
        lambda: on_axes(lambda axes: dots(axes, {"a": [0.5]}, ["x"], "%")),
        "groups, runs",
    ),
    "dots: more groups than names": (
        lambda: on_axes(lambda axes: dots(axes, {"a": [[0.5], [0.6]]}, ["x"], "%")),
        "at most 1 groups",
    ),
    "roc: numbers for other items": (
        lambda: on_axes(lambda axes: roc(axes, [True, False], [[0.5]])),
        "inside or not",
    ),
    "roc: one kind": (
        lambda: on_axes(lambda axes: roc(axes, [True, True], [[0.5, 0.6]])),
        "both kinds",
    ),
    "confusion: other lengths": (
        lambda: on_axes(lambda axes: confusion(axes, [0, 1], [0], "ab")),
        "for each item",
    ),
    "confusion: a class that is not there": (
        lambda: on_axes(lambda axes: confusion(axes, [0, 2], [0, 1], "ab")),
        "from 0 to 1",
    ),
    "calibration: logits": (
        lambda: on_axes(lambda axes: calibration(axes, {"a": [-1.0, 2.0]}, [0, 1])),
        "risks from 0 to 1 of 'a'",
    ),
    "calibration: outcomes of three kinds": (
        lambda: on_axes(lambda axes: calibration(axes, {"a": [0.1, 0.2, 0.3]}, [0, 1, 2])),
        r"outcomes y \(n,\) of 0 and 1",
    ),
    "calibration: no groups": (
        lambda: on_axes(lambda axes: calibration(axes, {"a": [0.1, 0.2]}, [0, 1], 0)),
        "groups",
    ),
    "decision: a risk too few": (
        lambda: on_axes(lambda axes: decision(axes, {"a": [0.1]}, [0, 1])),
        "one for each of 2 outcomes",
    ),
    "decision: a threshold of 1": (
        lambda: on_axes(lambda axes: decision(axes, {"a": [0.1, 0.2]}, [0, 1], [0.5, 1.0])),
        "thresholds between 0 and 1",
    ),
    "peak_memory: a result, not a function": (lambda: peak_memory(torch.zeros(3)), "function"),
    "peak_memory: a name": (lambda: peak_memory("f"), "function"),
    "bar: a total below 0": (lambda: bar(-1, "x"), "total"),
    "bar: a total that is no number": (lambda: bar("10", "x"), "total"),
    "replay: a result, not a function": (
        lambda: replay(torch.zeros(3), torch.zeros(3)),
        "function",
    ),
    "replay: a function that gives no tensor": (
        lambda: replay(lambda d: 1.0, torch.ones(2, requires_grad=True)),
        lambda found: found == 1.0,
    ),
    "on_threads: no workers": (lambda: on_threads([lambda: 1], 0), "workers"),
    "on_threads: half a worker": (lambda: on_threads([lambda: 1], 1.5), "workers"),
    "on_threads: results, not functions": (lambda: on_threads([1, 2], 2), "function"),
    "part: no tasks": (lambda: part(-1), "tasks"),
    "part: half a task": (lambda: part(2.5), "tasks"),
    "processes: an unknown backend": (lambda: processes("gpu").__enter__(), "backend"),
    "read: a folder": (lambda: read("."), "file"),
    "load_params: a folder": (lambda: load_params("."), "file"),
    "save_params: the network": (lambda: save_params("x.safetensors", NET), "parameters"),
    "save_params: facts that are no JSON": (
        lambda: save_params("x.safetensors", PHI, net=NET),
        "JSON",
    ),
    "claim: a tensor of several truths": (
        lambda: claim("it holds", torch.tensor([True, False])),
        "one truth value",
    ),
    "recorded_claim: several truths": (
        lambda: recorded_claim("it holds", torch.tensor([True, False])),
        "one truth value",
    ),
    "recorded_claim: a number": (lambda: recorded_claim("it holds", 0.3), "bool|truth"),
    "equal: two shapes": (lambda: equal("a = b", torch.ones(2), torch.ones(2, 1)), "one shape"),
    "equal: words": (lambda: equal("a = b", "a", "b"), "number"),
    "gradient: the loss's value": (lambda: gradient(torch.ones(()), PHI), "function"),
    "gradient: no entry": (lambda: gradient(lambda theta: torch.ones(()), {}), "at least one"),
    "hessian: the loss's value": (lambda: hessian(torch.ones(()), PHI), "function"),
    "hessian: no entry": (lambda: hessian(lambda theta: torch.ones(()), {}), "at least one"),
    "gradients: a learner in place of its task": (
        lambda: gradients(LEARNER, LEARNER.init(), DRAW),
        "task",
    ),
    "gradients: no draw": (lambda: gradients(lambda phi, e: phi, PHI, None), "draw"),
    "differences: no step": (
        lambda: differences(lambda theta: theta["a"].sum(), {"a": torch.ones(2)}, 0.0),
        "above 0",
    ),
    "differences: the value": (lambda: differences(torch.ones(()), PHI), "function"),
    "error_and_cosine: one row and many": (
        lambda: error_and_cosine(torch.ones(3), torch.ones(2, 3)),
        "one shape",
    ),
    "error_and_cosine: no matrix": (lambda: error_and_cosine(None, torch.ones(2)), "matrices"),
    "resting: no tasks": (lambda: resting(torch.eye(3), 0.1), "LinearTasks"),
    "resting: no step": (lambda: resting(linear_tasks(3), 0.1, steps=0), "steps"),
    "bowls: five dimensions": (
        lambda: bowls(linear_tasks(3), {"w": torch.ones(5)}, 0.1),
        "two dim",
    ),
    "drawn_episodes: a batch": (lambda: drawn_episodes(DRAW.support), "an Episode of images"),
    "drawn_episodes: no images": (lambda: drawn_episodes(DRAW), "an Episode of images"),
    "bowls: no point": (lambda: bowls(linear_tasks(3, dims=2), {}, 0.1), "at least one"),
    "losses_at_rest: no tasks": (lambda: losses_at_rest(None, [0.1], 1), "LinearTasks"),
    "losses_at_rest: half a step": (lambda: losses_at_rest(linear_tasks(3), [0.1], 0.5), "steps"),
    "losses_at_rest: no rates": (lambda: losses_at_rest(linear_tasks(3), [], 1), "at least one"),
    "style: no name": (lambda: style(3), "name"),
    "styles: one name": (lambda: styles("MAML"), "several"),
    "claim: a number": (lambda: claim("it holds", 0.3), "bool|truth"),
    "claim: text and condition exchanged": (lambda: claim(True, "it holds"), "text"),
    "glue: a form that does not fit": (lambda: glue("a", "word", ".3f"), "form"),
    "glue: no name": (lambda: glue("", 1.0), "name"),
    "scale: small larger than full": (
        lambda: scale(10, 5),
        lambda chosen: chosen in (10, 5),
    ),
    "table: cells missing": (lambda: table({"a": [1.0]}, ["x", "y"]), "expected 2 cells"),
    "table: a number": (lambda: table(3.0), "rows"),
    "table: no rows": (lambda: table({}), "at least one row"),
    "table: an unknown form": (lambda: table({"a": [1.0]}, ["x"], form="3 digits"), "form"),
    "source: a string": (lambda: source("maml"), "function"),
    "source: what Python wrote in C": (lambda: source(torch.relu), "function"),
    "row: an unknown kind": (lambda: row("a", "ours", [0.5, 0.6], 0.1), "baseline.*transfer.*meta"),
    "row: no runs": (lambda: row("a", "meta", [], 0.1), "at least one"),
    "row: NaN": (lambda: row("a", "meta", [NAN, 0.5], 0.1), "finite"),
    "row: a negative interval": (lambda: row("a", "meta", [0.5], -0.1), "cases"),
    "paired: a mean": (lambda: paired("a", "b", 0.5), "Score"),
    "paired: a method with itself": (lambda: paired("a", "a", SCORE), "two methods"),
    "agrees: no runs": (lambda: agrees(0.5, []), "at least one"),
    "agrees: NaN": (lambda: agrees(NAN, [0.5, 0.6]), "finite"),
    "record: one method twice": (
        lambda: record(
            Result(
                "a",
                "A",
                "x",
                True,
                "l",
                "p",
                "d",
                (Entry("a", "meta", 0.1, 0.1),) * 2,
                Paired("a", "a", 0.0, 0.0, 0.0),
            )
        ),
        "one entry per method",
    ),
    "record: a dict": (lambda: record({"page": "a"}), "Result"),
    "recorded: a path": (lambda: recorded("../page"), "page"),
    "recorded: a number": (lambda: recorded(3), "page"),
}

# the pieces that methods share -----------------------------------------------------------------------


def written(name: str, text: str) -> Path:
    """A file of the user's own, in the folder of the test."""
    Path(name).write_text(text, "utf8")
    return Path(name)


BAD |= {
    "half: φ for the network": (lambda: half(PHI, "body"), "two named halves|nn.Module"),
    "half: a body that is no module": (
        lambda: half(OrderedDict(body=3), "body"),
        "two named halves|nn.Module",
    ),
    "require: a name missing": (lambda: require(PHI, ["neck.weight"]), "expected parameters named"),
    "require: the network for φ": (lambda: require(NET, ["head.bias"]), "parameters"),
    "step: a rate of NaN": (
        lambda: step(lambda p: p["a"].sum(), ({"a": torch.ones(2)}, None), NAN, 0),
        "rate|lr",
    ),
    "step: rates of other entries": (
        lambda: step(
            lambda p: p["a"].sum(), ({"a": torch.ones(2)}, None), {"b": torch.tensor(0.1)}, 0
        ),
        "rate",
    ),
    "unrolled: a loss by name": (
        lambda: unrolled(LEARNER, "mse")(PHI, take(DRAW, 0)),
        "loss",
    ),
    "secant: the network for the learner": (
        lambda: bilevel(NET, cross_entropy, secant),
        "learner",
    ),
    "linear_head: no head": (lambda: linear_head(nn.Linear(3, 2)), "two named halves"),
    "linear_head: no bias": (lambda: linear_head(NO_BIAS, bias=True), "with a bias"),
    "width: a head of two layers": (lambda: width(DEEP), "one linear layer"),
    "width: φ for the network": (lambda: width(PHI), "two named halves|nn.Module"),
    "body_of: no body": (lambda: body_of(nn.Linear(3, 2)), "two named halves|body"),
    "body_of: φ for the network": (lambda: body_of(PHI), "nn.Module|two named halves"),
    "above: a list for φ": (lambda: above("critic.", list(PHI)), "parameters"),
    "layers: φ for the network": (lambda: layers(PHI), "nn.Module"),
    "layers: a class": (lambda: layers(nn.Linear), "nn.Module"),
    "moving: an unknown prefix": (lambda: moving(NET, "bodi."), r"parameters named bodi\.\*"),
    "moving: φ for the network": (lambda: moving(PHI), "nn.Module"),
    "inner_loop: negative steps": (
        lambda: inner_loop(lambda: PHI, moving(NET), apply(NET), cross_entropy, 0.1, -1),
        "steps",
    ),
    "inner_loop: the network for f": (
        lambda: inner_loop(lambda: PHI, moving(NET), 3, cross_entropy, 0.1, 1),
        "function",
    ),
    "descending: half a step": (
        lambda: descending(moving(NET), lambda phi, support: None, lambda phi: 0.1, 2.5),
        "steps",
    ),
    "descending: a rate for the function of φ": (
        lambda: descending(moving(NET), lambda phi, support: None, 0.1, 1),
        "lr|rate|function",
    ),
    "crammer_singer: a strength of 0": (
        lambda: crammer_singer(Z @ Z.mT, one_hot(LABELS, 3, Z.dtype), 0.0),
        "strength > 0",
    ),
    "crammer_singer: class numbers": (lambda: crammer_singer(Z @ Z.mT, LABELS, 1.0), "one-hot"),
    "ridge_solution: other rows": (
        lambda: ridge_solution(Z, Z[1:], torch.tensor(1.0)),
        "rows",
    ),
    "ridge_on: a negative strength": (
        lambda: ridge_on(torch.eye(3), Batch(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1)), -1.0),
        "strength",
    ),
    "ridge_on: features of another width": (
        lambda: ridge_on(torch.eye(2), Batch(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1)), 1.0),
        r"\(D, k\)",
    ),
    "ridge_prior: no strength": (lambda: ridge_prior(sinusoids(3)(0), 0.0), "strength"),
    "ridge_prior: a batch's parts": (
        lambda: ridge_prior((Batch(Z, Z), Batch(Z, Z)), 1.0),
        "Episode",
    ),
    "ridge_residual: a strength of NaN": (
        lambda: ridge_residual(sinusoids(3)(0), NAN),
        "strength",
    ),
    "ridge_residual: a stream": (lambda: ridge_residual(sinusoids(3), 1.0), "Episode"),
    "shared_features: no features": (
        lambda: shared_features(sinusoids(3)(0).support, 0),
        "expected k",
    ),
    "shared_features: more than there are inputs": (
        lambda: shared_features(sinusoids(3)(0).support, 2),
        "at most 1",
    ),
    "ridge_solution: class numbers": (
        lambda: ridge_solution(Z, LABELS.double(), torch.tensor(1.0)),
        r"\(N, W\)|one-hot",
    ),
    "head_matrix: another learner's φ": (
        lambda: head_matrix(protonet(NET).init()),
        "expected parameters named",
    ),
    "nearest: no neighbours": (lambda: nearest(Z, 0), "neighbours"),
    "nearest: half a neighbour": (lambda: nearest(Z, 1.5), "neighbours"),
    "squared_distances: other widths": (
        lambda: squared_distances(Z, Z[:, :2]),
        "width|features",
    ),
    "squared_distances: one column": (lambda: squared_distances(Z, Z[:, :1]), "width"),
    "class_means: integer one-hot rows": (
        lambda: class_means(Z, one_hot(LABELS, 3).long()),
        "floating-point",
    ),
    "cosines: other widths": (lambda: cosines(Z, Z[:, :2]), "width|features"),
    "along: one matrix too many": (
        lambda: along(torch.zeros(2), [torch.eye(2), torch.eye(2)]),
        "axis|axes|matri",
    ),
    "log_normal: no spread": (lambda: log_normal(Z, Z, 0.0), "spread"),
    "log_normal: negative spread": (lambda: log_normal(Z, Z, -1.0), "spread"),
    "scale_slope: class numbers": (
        lambda: scale_slope(cross_entropy, torch.zeros(4, 3), torch.zeros(4).long()),
        "one-hot",
    ),
    "scale_slope: a loss that is a vector": (
        lambda: scale_slope(
            partial(cross_entropy, reduction="none"),
            torch.zeros(4, 3),
            torch.eye(3)[:1].expand(4, 3),
        ),
        "scalar",
    ),
    "rows: a list": (lambda: transferability.rows([[1.0]]), "tensor"),
    "rows: no rows": (lambda: transferability.rows(torch.zeros(0, 3)), r"\(n, D\)"),
    "evidence_maximum: other lengths": (
        lambda: transferability.evidence_maximum(Z, Z[1:, 0]),
        "one target per item",
    ),
    "check_classes: a list": (lambda: check_classes([1, 2]), "expected a ClassSet"),
    "check_classes: boolean items": (
        lambda: check_classes(with_items(lambda d: d > 0)),
        "torch.bool",
    ),
    "check_rows: a tuple": (lambda: check_rows((ROWS.x, ROWS.y), "it"), r"to be a Batch\(x, y\)"),
    "check_rows: complex items": (
        lambda: check_rows(replaced(ROWS, x=lambda x: x + 1j), "it"),
        "complex",
    ),
    "finite: infinity": (lambda: finite(torch.tensor([1.0, INF]), "it"), "finite numbers in it"),
    "finite: an array": (lambda: finite(np.zeros(3), "it"), "tensor"),
    "positive: a tensor": (lambda: positive(shots=torch.tensor(2.0)), "expected shots"),
    "positive: a word": (lambda: positive(shots="5"), "expected shots"),
    "within: NaN": (lambda: within(0, noise=NAN), "expected noise to be a finite number"),
    "within: a word": (lambda: within(0, noise="a"), "expected noise to be a finite number"),
    "within: True": (lambda: within(0, noise=True), "expected noise to be a finite number"),
    "check_seed: a word": (lambda: check_seed("a"), "expected the seed"),
    "check_seed: a pair": (lambda: check_seed((0, 1)), "expected the seed"),
    "contest: no way": (lambda: contest("a", "b", {}, STREAM, {"c": STREAM}, "d"), "at least one"),
    "contest: a function for a Way": (
        lambda: contest("a", "b", {"x": lambda: 0}, STREAM, {"c": STREAM}, "d"),
        "a Way for 'x'",
    ),
    "contest: an unknown kind": (
        lambda: contest("a", "b", {"x": Way("ours", max, (1,))}, STREAM, {"c": STREAM}, "d"),
        "kind of 'x'",
    ),
    "contest: a live way that is none": (
        lambda: contest(
            "a",
            "b",
            {"x": Way("meta", lambda a, b, c: 0, (1,))},
            STREAM,
            {"c": STREAM},
            "d",
            ("y",),
        ),
        "live",
    ),
    "alphabets: a stream": (lambda: alphabets(STREAM), "ClassSet"),
    "alphabets: names without an alphabet": (lambda: alphabets(planted(classes=5)), "alphabet"),
    "directions: no method": (
        lambda: adaptation.directions("a", "b", {}, [("c", "d")], "d"),
        "at least one",
    ),
    "directions: a function for a Method": (
        lambda: adaptation.directions("a", "b", {"x": lambda: 0}, [("c", "d")], "d"),
        "Method",
    ),
    "directions: an unknown kind": (
        lambda: adaptation.directions(
            "a", "b", {"x": adaptation.Method("ours", max)}, [("c", "d")], "d"
        ),
        "kind",
    ),
    "directions: a live method that is none": (
        lambda: adaptation.directions(
            "a",
            "b",
            {"x": adaptation.Method("meta", lambda a, b, s: {})},
            [("c", "d")],
            "d",
            live=("y",),
        ),
        "live",
    ),
    "across: no way": (lambda: Across("a", {}, "abc", "d"), "at least one"),
    "across: a function for a Rival": (
        lambda: Across("a", {"x": lambda: 0}, "abc", "d"),
        "Rival",
    ),
    "across: an unknown kind": (
        lambda: Across("a", {"x": Rival("ours", max, [1])}, "abc", "d"),
        "kind",
    ),
    "across: nothing to choose from": (
        lambda: Across("a", {"x": Rival("meta", max, [])}, "abc", "d"),
        "settings",
    ),
    "across: two domains": (
        lambda: Across("a", {"x": Rival("meta", max, [1])}, "ab", "d"),
        "three domains",
    ),
    "across: answers without draws": (
        lambda: Across("a", {"x": Rival("meta", lambda *a: torch.zeros(4), [1])}, "abc", "d").asked(
            "x", "a"
        ),
        "draws",
    ),
    "across: answers that are shares": (
        lambda: Across(
            "a", {"x": Rival("meta", lambda *a: torch.full((2, 4), 0.5), [1])}, "abc", "d"
        ).asked("x", "a"),
        "0 or 1",
    ),
    "heads: a strength that is none": (
        lambda: Heads({}, {}, 1.0),
        "strength",
    ),
    "heads: an unknown meta-learner": (
        lambda: Heads({}, {}, max).practising(10, "Reptile"),
        "MAML",
    ),
    "linear_net: no features": (lambda: linear_net(0), "width"),
    "measured: no trial": (lambda: measured("a", "b", {}, "photographs", "d"), "at least one"),
    "measured: a Way for a Trial": (
        lambda: measured("a", "b", {"x": Way("meta", max, (1,))}, "photographs", "d"),
        "a Trial",
    ),
    "measured: a live trial that is none": (
        lambda: measured(
            "a", "b", {"x": Trial("meta", max, abs, (1,))}, "photographs", "d", ("MAML",)
        ),
        "MAML",
    ),
    "conclude: no contest": (
        lambda: conclude("a", "b", "c", [], ("x", "y"), "5 labels"),
        "contest",
    ),
    "conclude: a dict": (lambda: conclude("a", "b", "c", [{}], ("x", "y"), "5 labels"), "contest"),
    "kept: a path": (lambda: kept("../page"), "page"),
    "kept: a number": (lambda: kept(3), "page"),
    "made: a path": (lambda: made("../page"), "page"),
    "made: a number": (lambda: made(3), "page"),
    "results.write: NaN": (lambda: write_result(Path("a.json"), {"mean": NAN}), "finite|NaN"),
    "results.write: a tensor": (
        lambda: write_result(Path("a.json"), {"mean": torch.zeros(2)}),
        "JSON",
    ),
    "record: a kind that is none": (
        lambda: record(RESULT._replace(entries=(Entry("a", "ours", 0.1, 0.1),))),
        "to be one of",
    ),
    "record: a gain on nothing": (
        lambda: record(RESULT._replace(gain=Paired("a", "c", 0.0, 0.0, 0.0))),
        "between two entries",
    ),
    "record: a mean of NaN": (
        lambda: record(RESULT._replace(entries=(Entry("a", "meta", NAN, 0.1),))),
        "finite numbers",
    ),
    "record: tolerance below 0": (lambda: record(RESULT, tolerance=-1.0), "tolerance"),
    "record: a page that is a path": (lambda: record(RESULT._replace(page="../a")), "page"),
    "losses: losses for a run": (
        lambda: on_axes(lambda axes: losses(axes, {"a": [0.1, 0.2]})),
        "a Run for 'a'",
    ),
    "losses: a window of 0": (
        lambda: on_axes(lambda axes: losses(axes, {"a": RUN}, window=0)),
        "window",
    ),
    "whitening: one-hot rows": (lambda: whitening(Z, torch.eye(len(Z)), 0.5), "class numbers"),
    "whitening: more than all": (lambda: whitening(Z, LABELS, 1.5), "shrinkage"),
    "whitening: a row for each class": (
        lambda: whitening(torch.rand(3, 2), torch.arange(3), 0.5),
        "more rows than the 3 classes",
    ),
    "whitening: fewer rows than features": (
        lambda: whitening(torch.rand(6, 9), torch.arange(6) % 2, 0.0),
        "larger shrinkage",
    ),
    "whitening: features of NaN": (lambda: whitening(Z * torch.nan, LABELS, 0.5), "finite"),
    "centred: images for rows": (lambda: centred(NET, PHI, torch.zeros(2, 3)), "cannot read"),
    "heart.read: a text": (lambda: heart.read(written("a.data", "hello, world"), "A"), "a.data"),
    "heart.read: columns missing": (lambda: heart.read(written("a.data", "1,2,3"), "A"), "a.data"),
    "heart.read: an empty file": (lambda: heart.read(written("a.data", ""), "A"), "a.data"),
    "sentiment.read: no labels": (lambda: read_site(written("a.txt", "good\n"), "A"), "a.txt"),
    "sentiment.read: a label of 7": (
        lambda: read_site(written("a.txt", "good\t7\n"), "A"),
        "a.txt",
    ),
    "movietweetings.read: a text": (
        lambda: movietweetings.read(written("a.dat", "hello"), written("b.dat", "1::A (2000)::X")),
        "a.dat",
    ),
    "movietweetings.read: a rating of 99": (
        lambda: movietweetings.read(
            written("a.dat", "1::1::99::5"), written("b.dat", "1::A (2000)::X")
        ),
        "a.dat",
    ),
    "tf_binding.read: a text": (lambda: tf_binding.read(written("a.txt", "hello")), "a.txt"),
    "tf_binding.read: two columns": (
        lambda: tf_binding.read(
            written("a.txt", "8-mer\t8-mer\tE-score\tMedian\tZ-score\nAAAAAAAA\tTTTTTTTT")
        ),
        "a.txt",
    ),
    "read_semeion: a text": (lambda: digits.read_semeion(written("a.data", "hello")), "a.data"),
    "read_semeion: columns missing": (
        lambda: digits.read_semeion(written("a.data", "0 1 0")),
        "a.data",
    ),
    "members: a text": (lambda: members(written("a.zip", "hello")), "a.zip"),
    "read_archive: a text": (lambda: tf_binding.read_archive(written("a.npz", "hello")), "a.npz"),
    "checkpoint.read: a text": (lambda: read(written("a.safetensors", "hello")), "damaged"),
    "checkpoint.write: a dict for the checkpoint": (
        lambda: write_checkpoint("a.safetensors", PHI),
        "Checkpoint",
    ),
    "load_params: a text": (lambda: load_params(written("a.safetensors", "hello")), "damaged"),
    "known: a mask of another length": (
        lambda: movietweetings.known(movietweetings.drawn(users=5), np.ones(3, bool), 1.0),
        "training",
    ),
    "past: a mask of another length": (
        lambda: movietweetings.past(movietweetings.drawn(users=5), np.ones(3, bool), 1.0),
        "training",
    ),
    "past: a question before the first rating": (
        lambda: (
            lambda r: movietweetings.past(
                r, np.ones(len(r.user), bool), 1.0, r.film, r.time - 10**9
            )
        )(movietweetings.drawn(users=5)),
        "before the first rating",
    ),
    "rated_before: films without times": (
        lambda: (
            lambda r: movietweetings.rated_before(r, np.ones(len(r.user), bool), r.film, r.time[:3])
        )(movietweetings.drawn(users=5)),
        "as many films as times",
    ),
    "factors: NaN for a rating": (
        lambda: movietweetings.factors(
            np.arange(3), np.arange(3), np.array([1.0, NAN, 0.0]), np.ones((3, 2)), 1.0
        ),
        "finite",
    ),
    "factors: more films than there are": (
        lambda: movietweetings.factors(
            np.arange(3), np.arange(3), np.ones(3), np.ones((2, 2)), 1.0
        ),
        "films from 0 to 1",
    ),
    "factors_in_time: too few numbers": (
        lambda: (
            lambda r: movietweetings.factors_in_time(
                r, np.ones(len(r.user), bool), np.ones(2), 3, 1.0
            )
        )(movietweetings.drawn(users=5)),
        "each of",
    ),
    "factors_in_time: no rank": (
        lambda: (
            lambda r: movietweetings.factors_in_time(
                r, np.ones(len(r.user), bool), r.rating, 0, 1.0
            )
        )(movietweetings.drawn(users=5)),
        "rank",
    ),
    "known: a negative shrinkage": (
        lambda: (lambda r: movietweetings.known(r, np.ones(len(r.user), bool), -1.0))(
            movietweetings.drawn(users=5)
        ),
        "shrink",
    ),
}

# numbers, kinds and shapes: the same kinds, other members -----------------------------------------


def _steps(name: str, make: Callable[..., Any]) -> None:
    BAD[f"{name}: True steps"] = (lambda: make(NET, cross_entropy, 0.1, True), "steps")
    BAD[f"{name}: a loss class"] = (lambda: make(NET, nn.CrossEntropyLoss, 0.1, 1), "loss")
    BAD[f"{name}: a loss by name"] = (lambda: make(NET, "mse", 0.1, 1), "loss")
    BAD[f"{name}: no rate"] = (lambda: make(NET, cross_entropy, None, 1), "lr|rate")
    BAD[f"{name}: a rate in words"] = (lambda: make(NET, cross_entropy, "0.1", 1), "lr|rate")
    BAD[f"{name}: a negative rate of numpy's"] = (
        lambda: make(NET, cross_entropy, np.float32(-0.1), 1),
        "lr|rate",
    )


for _name, _make in _GRADIENT.items():
    if _name != "entropy_finetune":
        _steps(_name, _make)


def _squared_slope(a):
    value = nn.functional.hardsigmoid(a).sum()
    return (torch.autograd.grad(value, a, create_graph=True)[0] ** 2).sum()


_TWO_SETS = Batch(
    BATCH.x, one_hot(torch.arange(10).expand(2, -1) % 2, 5)
)  # classes 0 and 1 in both
BAD |= {
    "maml: a strength of NaN": (lambda: maml(NET, cross_entropy, 0.1, 1, NAN), "strength"),
    "maml: a negative rate of one entry": (
        lambda: maml(NET, cross_entropy, {"head.bias": -0.1}, 1),
        "rate of 'head.bias'",
    ),
    "maml: a rule by name": (lambda: maml(NET, cross_entropy, 0.1, 1, rule="adam"), "rule"),
    "maml: a rule class": (lambda: maml(NET, cross_entropy, 0.1, 1, rule=torch.optim.SGD), "rule"),
    "momentum: a negative μ": (lambda: momentum(-0.1), "mu"),
    "adam: a β of NaN": (lambda: adam(NAN), "beta1"),
    "adam: an ε of NaN": (lambda: adam(eps=NAN), "eps"),
    "proximity: a number for a matrix": (
        lambda: proximity({"a": torch.ones(3, 2)}, {"a": torch.ones(1)}),
        "shape",
    ),
    "step: a rate in words": (
        lambda: step(lambda p: p["a"].sum(), ({"a": torch.ones(2)}, None), "0.1", 0),
        "rate",
    ),
    "step: no rate": (
        lambda: step(lambda p: p["a"].sum(), ({"a": torch.ones(2)}, None), None, 0),
        "rate",
    ),
    "learned: a class for the maker": (lambda: learned({"a": torch.ones(1)}, dict), "learner"),
    "weight_decay: an infinite decay": (
        lambda: hyper.weight_decay(NET, cross_entropy, 0.1, 1, INF),
        "decay",
    ),
    "reweighted: half an example": (
        lambda: hyper.reweighted(NET, cross_entropy, 0.1, 1, 2.5),
        "examples",
    ),
    "distilled: a rate of NaN": (
        lambda: hyper.distilled(NET, cross_entropy, NAN, 1, SUPPORT),
        "rate|lr",
    ),
    "distilled: half a step": (
        lambda: hyper.distilled(NET, cross_entropy, 0.1, 2.5, SUPPORT),
        "steps",
    ),
    "distilled: no loss": (lambda: hyper.distilled(NET, None, 0.1, 1, SUPPORT), "loss"),
    "lora: a scale of 0": (lambda: lora(NET, cross_entropy, 0.1, 1, scale=0.0), "scale > 0"),
    "lora: a negative scale": (lambda: lora(NET, cross_entropy, 0.1, 1, scale=-1.0), "scale"),
    "lora: True for the rank": (lambda: lora(NET, cross_entropy, 0.1, 1, rank=True), "rank"),
    "policy_gradient: infinite spread": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, INF, 0.1, 1),
        "spread",
    ),
    "policy_gradient: no world": (
        lambda: gives(
            mlp(2, (8,), 2),
            Batch(torch.zeros(3, 4, 2), torch.ones(3, 4)),
            lambda net: policy_gradient(net, None, 1.0, 0.1, 1),
        ),
        "world",
    ),
    "policy_gradient: a word for the surrogate": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, 1.0, 0.1, 1, surrogate="dice"),
        "a function such as dice",
    ),
    "policy_gradient: a place to start from": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, 1.0, 0.1, 1, start=torch.zeros(2)),
        "a function; got Tensor",
    ),
    "policy_gradient: more steps than walks": (
        lambda: gives(
            mlp(2, (8,), 2),
            Batch(torch.zeros(3, 4, 2), torch.ones(3, 4)),
            lambda net: policy_gradient(net, lambda s, a, h: (s, s[:, 0]), 1.0, 0.1, 4),
        ),
        "a trajectory for each of 4 steps",
    ),
    "with_sampling: no spread": (
        lambda: with_sampling(mlp(2, (8,), 2), lambda *a: a, 0.0),
        "spread",
    ),
    "with_sampling: a level of NaN": (
        lambda: with_sampling(mlp(2, (8,), 2), lambda *a: a, 1.0, level=NAN),
        "level",
    ),
    "Constant: a mean of NaN": (lambda: Constant(NAN), "finite mean"),
    "Constant: an infinite mean": (lambda: Constant(INF), "finite mean"),
    "policy_net: no head": (lambda: policy_net(small=0.0), "small"),
    "policy_net: a negative share": (lambda: policy_net(small=-1.0), "small"),
    "policy_gradient: half a step": (
        lambda: policy_gradient(mlp(2, (8,), 2), lambda *a: a, 1.0, 0.1, 2.5),
        "steps",
    ),
    "log_normal: a spread of NaN": (lambda: log_normal(Z, Z, NAN), "spread"),
    "cavia: half a dimension": (lambda: cavia(NET, cross_entropy, 0.1, 1, dims=2.5), "dims"),
    "linear_probe: half an iteration": (lambda: linear_probe(NET, iterations=2.5), "iterations"),
    "linear_probe: infinite strength": (
        lambda: linear_probe(NET, cross_entropy, INF),
        "strength > 0",
    ),
    "linear_probe: a loss class": (lambda: linear_probe(NET, nn.MSELoss), "loss"),
    "fresh_head: φ for the network": (lambda: fresh_head(LEARNER, PHI), "nn.Module"),
    "bss: half a direction": (lambda: bss(NET, 1.0, smallest=1.5), "smallest"),
    "spectral_sum: half a direction": (lambda: spectral_sum(Z, 1.5), "whole number"),
    "discriminative: a factor of NaN": (lambda: discriminative(NET, 0.1, NAN), "factor"),
    "discriminative: an infinite factor": (lambda: discriminative(NET, 0.1, INF), "factor"),
    "gradual: half a step": (lambda: gradual(NET, 0.1, 2.5), "every"),
    "risk: cross-entropy of one column": (
        lambda: risk(cross_entropy, torch.randn(3, 1), torch.randn(3, 1)),
        "W ≥ 2 for cross-entropy",
    ),
    "risk: cross-entropy of one column, smoothed": (
        lambda: risk(nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(3, 1), torch.ones(3, 1)),
        "W ≥ 2 for cross-entropy",
    ),
    "evaluate: cross-entropy of one column": (
        lambda: evaluate(
            protonet(mlp(3, (4,), 1, seed=0)),
            parameters(mlp(3, (4,), 1, seed=0)),
            lambda step: Episode(*[Batch(torch.randn(2, 5, 3), torch.randn(2, 5, 1))] * 2),
            2,
            cross_entropy,
        ),
        "W ≥ 2 for cross-entropy",
    ),
    "risk: no rows": (lambda: risk(mse_loss, torch.zeros(0, 3), torch.zeros(0, 3)), "one row"),
    "risk: a loss that gives a float": (
        lambda: risk(lambda p, y: 0.5, torch.zeros(4, 3), torch.zeros(4, 3)),
        "scalar",
    ),
    "apply: φ of a network with a head of one column": (
        lambda: apply(NET)({**PHI, "head.bias": torch.zeros(1)}, SUPPORT.x),
        r"head.bias of shape \(5,\)",
    ),
    "protomaml: a network of another number of outputs": (
        lambda: gives(mlp(30, (8,), 2), SUPPORT, LEARNERS["protomaml"]),
        lambda prediction: prediction.shape == (10, 5),
    ),
    "lp_ft: a network of another number of outputs": (
        lambda: gives(mlp(30, (8,), 2), SUPPORT, LEARNERS["lp_ft"]),
        lambda prediction: prediction.shape == (10, 5),
    ),
    "evaluate: φ with a bias of one number": (
        lambda: scored(phi={**PHI, "head.bias": torch.zeros(1)}),
        r"head.bias of the network.s shape \(5,\)",
    ),
    "bilevel: one task without its axis": (
        lambda: OBJECTIVE(PHI, Episode(SUPPORT, take(QUERY, slice(0, 5)))),
        r"\(T, ",
    ),
    "bilevel: a task with no rows": (
        lambda: OBJECTIVE(PHI, DRAW._replace(support=over(lambda d: d[:, :0], DRAW.support))),
        "one row",
    ),
    "bilevel: the loss for the hypergradient": (
        lambda: bilevel(LEARNER, cross_entropy, 3),
        "hypergradient",
    ),
    "implicit: an infinite pull": (lambda: implicit(INF), "strength > 0"),
    "multi_step: a negative weight": (lambda: multi_step([1.0, -1.0]), "weights"),
    "multi_step: weights that are all 0": (lambda: multi_step([0.0, 0.0]), "weights"),
    "annealed: half a step": (lambda: annealed(2.5, 0.5), "steps"),
    "conjugate_gradient: half an iteration": (
        lambda: conjugate_gradient(lambda v: v, {"a": torch.ones(2)}, 2.5),
        "iterations",
    ),
    "neumann: a rate of NaN": (
        lambda: neumann(lambda v: v, {"a": torch.ones(2)}, 2, rate=NAN),
        "rate",
    ),
    "neumann: a matrix, not a map": (
        lambda: neumann(torch.eye(2), {"a": torch.ones(2)}, 2),
        "matrix",
    ),
    "joint: an infinite weight": (lambda: joint(NET, cross_entropy, (1, INF)), "weights"),
    "joint: a matrix of weights": (lambda: joint(NET, cross_entropy, torch.ones(2, 2)), "weights"),
    "joint: a loss class": (lambda: joint(NET, nn.CrossEntropyLoss), "loss"),
    "joint: columns before the first": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 3), slice(-9, -5)])(PHI, BATCH),
        "columns",
    ),
    "joint: columns from right to left": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 3), slice(5, 3)])(PHI, BATCH),
        "columns",
    ),
    "joint: columns that are shared": (
        lambda: joint(NET, cross_entropy, columns=[slice(0, 5), slice(0, 5)])(PHI, BATCH),
        lambda value: torch.allclose(value, JOINT(PHI, BATCH)),
    ),
    "joint: classes in another set's columns": (
        lambda: joint(NET, cross_entropy, columns=own_columns([2, 3]))(PHI, _TWO_SETS),
        "class numbers start at 2",
    ),
    "joint: no rows": (lambda: JOINT(PHI, over(lambda d: d[:, :0], BATCH)), "one row"),
    "risks: no loss": (lambda: risks(NET, None), "loss"),
    "risks: columns that overlap": (
        lambda: risks(NET, cross_entropy, [slice(0, 3), slice(2, 5)])(PHI, BATCH),
        "overlap",
    ),
    "toward: an anchor of another shape": (
        lambda: joint(NET, cross_entropy, penalties=[toward({"head.bias": torch.zeros(1)}, 1.0)])(
            PHI, BATCH
        ),
        "shape",
    ),
    "toward: a strength in words": (lambda: toward(PHI, "1"), "strength"),
    "over_tasks: a task that gives a float": (
        lambda: over_tasks(lambda p, d: 0.5)({"a": torch.ones(2)}, torch.ones(3, 2)),
        "tensor",
    ),
    "over_tasks: a number for the task": (lambda: over_tasks(3), "task"),
    "over_tasks: an operation without second derivatives": (
        lambda: over_tasks(lambda p, d: _squared_slope(p["a"])).value_and_grad(
            {"a": torch.ones(2)}, torch.ones(3, 2)
        ),
        "differentiated twice; torch has no derivative of hardsigmoid_backward.*first_order",
    ),
    "whole: an operation without second derivatives": (
        lambda: whole(lambda p, d: _squared_slope(p["a"])).value_and_grad(
            {"a": torch.ones(2)}, torch.ones(3, 2)
        ),
        "relu6",
    ),
    "Norm: True channels": (lambda: Norm(True), "channels"),
    "Norm: an ε of NaN": (lambda: Norm(3, eps=NAN), "eps"),
    "Norm: one image of one pixel": (lambda: Norm(8)(torch.randn(1, 8, 1, 1)), "more than one"),
    "calibrate: an episode": (
        lambda: calibrate(conv4(), parameters(conv4()), take(DRAW, 0)),
        "batches",
    ),
}

# data -------------------------------------------------------------------------------------------------

BAD |= {
    "tables: one column": (lambda: made_up.tables(columns=1), "at least 2 columns"),
    "tables: an unknown kind": (lambda: made_up.tables(kinds=["forest"]), "kinds out of"),
    "tables: a kind without a list": (lambda: made_up.tables(kinds="linear"), "kinds out of"),
    "tables: rows from many to few": (lambda: made_up.tables(rows=(50, 5)), "from at least 2"),
    "tables: rows as one number": (lambda: made_up.tables(rows=50), "rows as"),
    "tables: no seed": (lambda: made_up.tables(seed=None), "seed"),
    "tables: no queries": (lambda: made_up.tables(queries=0), "queries"),
    "prepared: more columns than the network has": (
        lambda: made_up.prepared(np.ones((5, 9)), 3, 4),
        "d from 1 to 4",
    ),
    "prepared: no support row": (lambda: made_up.prepared(np.ones((5, 3)), 0, 4), "learn from"),
    "prepared: an infinite value": (
        lambda: made_up.prepared(np.full((5, 3), np.inf), 2, 4),
        "finite",
    ),
    "standardised: one row": (lambda: made_up.standardised(np.ones(5), 2), "a table"),
    "standardised: no support row": (
        lambda: made_up.standardised(np.ones((5, 2)), 0),
        "learn from",
    ),
    "scored: no table": (
        lambda: small_tables.scored(small_tables.majority, {}, (10,)),
        "at least one table",
    ),
    "scored: answers that are no probabilities": (
        lambda: small_tables.scored(lambda x, y, q: 2 * np.ones(len(q)), ONE_TABLE, (10,), 1),
        "a probability",
    ),
    "scored: an answer for all rows": (
        lambda: small_tables.scored(lambda x, y, q: np.ones(1), ONE_TABLE, (10,), 1),
        "a probability",
    ),
    "scored: more rows than there are": (
        lambda: small_tables.scored(small_tables.majority, ONE_TABLE, (99,), 1),
        "labels",
    ),
    "logistic: one class": (
        lambda: small_tables.logistic(np.ones((4, 2)), np.zeros(4, int), np.ones((1, 2))),
        "both classes",
    ),
    "boosting of a table: one class": (
        lambda: small_tables.boosting(np.ones((4, 2)), np.zeros(4, int), np.ones((1, 2))),
        "both classes",
    ),
    "majority: one-hot rows": (
        lambda: small_tables.majority(np.ones((4, 2)), np.eye(4, 2), np.ones((1, 2))),
        "both classes",
    ),
    "reading: no order": (
        lambda: small_tables.reading(protonet(NET), PHI, 30, 0),
        "orders",
    ),
    "reading of a table: one class": (
        lambda: small_tables.reading(protonet(NET), PHI, 30)(
            np.ones((4, 2)), np.zeros(4, int), np.ones((1, 2))
        ),
        "both classes",
    ),
    "trained: no steps": (lambda: small_tables.trained(1e-3, 0, 0), "steps"),
    "trained: a negative rate": (lambda: small_tables.trained(-1e-3, 0, 1), "rate"),
    "contenders: no steps": (lambda: small_tables.contenders(ONE_TABLE, steps=0), "steps"),
    "lengths: no steps": (lambda: small_tables.lengths(ONE_TABLE, 1e-3, (0, 1)), "steps"),
    "lengths: a negative rate": (lambda: small_tables.lengths(ONE_TABLE, -1.0, (1, 1)), "rate"),
    "source_of: no table": (lambda: small_tables.source_of({}), "at least one table"),
    "on_made_up: no table": (lambda: small_tables.on_made_up(small_tables.majority, 0, 0), "drawn"),
    "sinusoids: no shots": (lambda: sinusoids(shots=0), "expected shots to be a whole number"),
    "sinusoids: no seed": (lambda: sinusoids(seed=None), "seed"),
    "best_possible: no noise": (lambda: best_possible(0.0), "noise > 0"),
    "best_possible: no points": (lambda: best_possible(points=0), "points"),
    "noisy_sinusoids: negative noise": (lambda: noisy_sinusoids(noise=-1.0), "noise"),
    "noisy_sinusoids: noise of NaN": (lambda: noisy_sinusoids(noise=NAN), "noise"),
    "varied_sinusoids: no shots": (lambda: varied_sinusoids(shots=0), "expected shots"),
    "varied_sinusoids: half a task": (lambda: varied_sinusoids(tasks=2.5), "expected tasks"),
    "risk_of: a network of another width": (lambda: risk_of(NET), r"\(n, 1\)"),
    "risk_of: no points": (lambda: risk_of(lambda x: x, 0), "points"),
    "planted: no classes": (lambda: planted(0), "expected classes"),
    "planted: negative noise": (lambda: planted(noise=-1.0), "noise"),
    "planted: half a class": (lambda: planted(2.5), "classes"),
    "turned: items of another width": (
        lambda: turned(planted(8, 6, nuisance=3), 30),
        "30 dimensions",
    ),
    "turned: too few loud dimensions": (
        lambda: turned(planted(8, 6, nuisance=3), 30, nuisance=3),
        "nuisance",
    ),
    "turned: an angle of NaN": (lambda: turned(DATA, NAN), "degrees"),
    "turned: items alone": (lambda: turned(DATA.items, 30), "ClassSet"),
    "glyphs: no items": (lambda: glyphs(items=0), "expected items"),
    "glyphs: half a pixel": (lambda: glyphs(24, 1, size=8.5), "size"),
    "glyphs: a negative seed": (lambda: glyphs(24, 1, seed=-1), "seed"),
    "scenes: paper smaller than a glyph": (lambda: scenes(1, height=10), "40 pixels"),
    "scenes: no scenes": (lambda: scenes(0), "at least 1 scene"),
    "navigation: no horizon": (lambda: navigation(horizon=0), "expected horizon"),
    "best_return: a goal outside": (lambda: best_return(torch.tensor([2.0, 0.0])), "goals in"),
    "best_return: no spread": (lambda: best_return(torch.zeros(2), spread=0.0), "spread"),
    "line_return: no steps": (lambda: line_return(torch.zeros(1), 1.0, 0.5, 0), "horizon"),
    "line_return: no spread": (lambda: line_return(torch.zeros(1), 1.0, 0.0), "spread"),
    "line_walks: no steps": (lambda: line_walks(torch.zeros(2, 3), 1.0), "draws"),
    "line_walks: a list": (lambda: line_walks([[[0.0]]], 1.0), "a tensor"),
    "every_draw: no walks": (lambda: every_draw(0), "walks"),
    "every_draw: half a point": (lambda: every_draw(1, points=2.5), "points"),
    "navigation: no seed": (lambda: navigation(seed=None), "seed"),
    "linear_tasks: no tasks": (lambda: linear_tasks(0), "tasks"),
    "linear_tasks: half a dimension": (lambda: linear_tasks(2, 2.5), "dims"),
    "exact_stream: a tensor": (lambda: exact_stream(torch.zeros(2, 3)), "LinearTasks"),
    "directions: more than dimensions": (lambda: directions(3, 4), "at most 3"),
    "directions: half a dimension": (lambda: directions(2.5, 1), "dims"),
    "spanned: too few tasks to be even": (
        lambda: spanned(torch.eye(4), 3, 5, even=True),
        "at least 4 tasks",
    ),
    "spanned: negative noise": (lambda: spanned(torch.eye(4), 3, 5, noise=-1.0), "noise"),
    "around: a row": (lambda: around(torch.zeros(4), 3, 5), r"\(D, 1\)"),
    "around: a bend of NaN": (lambda: around(torch.zeros(4, 1), 3, 5, bend=NAN), "bend"),
    "error_after: a gap of another width": (
        lambda: error_after(torch.ones(4, 3), torch.ones(2), 1.0, 0.1, 5),
        r"\(n, D\)",
    ),
    "error_after: half a step": (
        lambda: error_after(torch.ones(4, 3), torch.ones(3), 1.0, 0.1, 2.5),
        "steps",
    ),
    "cut: nothing left to ask": (lambda: cut(sinusoids(3)(0).support, 3), "below 3"),
    "cut: an episode": (lambda: cut(sinusoids(3)(0), 1), "Batch"),
    "relabelled: a draw": (lambda: relabelled(sinusoids(3)(0), torch.neg), "stream"),
    "relabelled: no function": (lambda: relabelled(sinusoids(3), 1), "change"),
    "uneven: a draw": (lambda: uneven(episodes(DATA, 2, 1, 3, 1, 0)(0), (1, 2)), "stream"),
    "uneven: one number": (lambda: uneven(episodes(DATA, 2, 1, 3, 1, 0), 2), "counts"),
    "uneven: more than there are": (
        lambda: uneven(episodes(DATA, 2, 1, 3, 1, 0), (1, 4))(0),
        r"at most \[3, 3\]",
    ),
    "uneven: nothing is asked": (
        lambda: uneven(episodes(DATA, 2, 1, 3, 1, 0), (0, 0))(0),
        "above 0",
    ),
    "uneven: other sums in other tasks": (
        lambda: uneven(episodes(DATA, 2, 1, 3, 20, 0), lambda rng: rng.integers(4, size=2))(0),
        "one sum",
    ),
    "episodes: unknown numbers": (
        lambda: episodes(DATA, 2, 1, 1, 1, seed=0, numbers="new"),
        "numbers",
    ),
    "best_linear: no noise": (lambda: best_linear(0.0), "noise > 0"),
    "best_linear: noise of NaN": (lambda: best_linear(NAN), "noise > 0"),
    "side_by_side: no curves": (lambda: side_by_side(0), "curves"),
    "side_by_side: negative noise": (lambda: side_by_side(noise=-1.0), "noise"),
    "named_sinusoids: no curves": (lambda: named_sinusoids(0), "curves"),
    "named_sinusoids: a name of half a number": (lambda: named_sinusoids(name=0.5), "name"),
    "samples: negative noise": (lambda: samples(4, noise=-1.0), "noise"),
    "samples: no rows": (lambda: samples(0), "rows"),
    "characters: an unknown part": (lambda: characters.characters("valid"), "expected"),
    "characters: an unknown split": (lambda: characters.characters("train", "mine"), "expected"),
    "omniglot: an unknown split": (lambda: omniglot.omniglot("mine"), "expected a split and part"),
    "omniglot: half a pixel": (lambda: omniglot.omniglot(size=28.5), "a size of 1 to 105"),
    "turned: a tensor": (lambda: omniglot.turned(DATA.items), "ClassSet"),
    "turned: items that are no images": (lambda: omniglot.turned(DATA), "images"),
    "intents: no sentences": (lambda: clinc.intents(0), "from 2 to 130"),
    "intents: half a sentence": (lambda: clinc.intents(2.5), "whole number|from 2 to 130"),
    "scanners: no pixels": (lambda: digits.scanners(size=0), "size"),
    "halves: no test images": (
        lambda: digits.halves(digits.Domain(torch.zeros(4, 1, 2, 2), LABELS[:4], "x"), 0),
        "tested ≥ 1",
    ),
    "few: more than there are": (
        lambda: digits.few(Batch(Z, LABELS), 9, 0),
        "9 images of each digit",
    ),
    "few: no shots": (lambda: digits.few(Batch(Z, LABELS), 0, 0), "shots"),
    "redrawn: one image": (
        lambda: digits.redrawn(torch.zeros(1, 8, 8), np.random.default_rng(0)),
        r"\(B, 1, h, w\)",
    ),
    "redrawn: bytes": (
        lambda: digits.redrawn(torch.zeros(2, 1, 8, 8).byte(), np.random.default_rng(0)),
        "real numbers",
    ),
    "pairs: no batch": (
        lambda: digits.pairs(Batch(Z, LABELS), Batch(Z, LABELS), 0, batch=0),
        "batch ≥ 1",
    ),
    "pairs: one-hot labels": (
        lambda: digits.pairs(Batch(Z, one_hot(LABELS, 10)), Batch(Z, LABELS), 0)(0),
        "class numbers",
    ),
    "prepared: an image of bytes": (
        lambda: digits.prepared(np.full((8, 8), 200.0), 8, False),
        r"\[0, 1\]",
    ),
    "prepared: an empty image": (
        lambda: digits.prepared(np.zeros((8, 8)), 8, True),
        "an image with ink",
    ),
    "pooled: no source": (
        lambda: heart.pooled({}, heart.drawn()["Cleveland"]),
        "at least one source",
    ),
    "pooled: a limit of 0": (
        lambda: heart.pooled(
            {"A": heart.drawn()["Cleveland"]}, heart.drawn()["Hungarian"], limit=0.0
        ),
        "a limit above 0",
    ),
    "pooled: measurements of another width": (
        lambda: heart.pooled(
            {"A": heart.drawn()["Cleveland"]}, heart.drawn()["Hungarian"], lambda h: h.x[:, 0]
        ),
        r"patients \(n, D\)",
    ),
    "encode: columns missing": (lambda: heart.encode(np.zeros((3, 5))), r"\(n, 13\)"),
    "encode: one patient without an axis": (lambda: heart.encode(np.zeros(13)), r"\(n, 13\)"),
    "prepare: no patients": (lambda: heart.prepare(np.zeros((0, 18))), "at least one patient"),
    "labelled: too many labels": (
        lambda: heart.labelled(np.array([0, 1] * 5), 9, 1, 0),
        "expected from 2 to 6 labels",
    ),
    "labelled: labels of four kinds": (
        lambda: heart.labelled(np.array([0, 1, 2, 3] * 5), 4, 1, 0),
        "0 and 1|0 or 1",
    ),
    "reverse_complement: a letter that is no base": (
        lambda: motifs.reverse_complement("ACGU"),
        "ACGT",
    ),
    "canonical: no letters": (lambda: motifs.canonical(0), "length"),
    "counts: words longer than the sequences": (lambda: motifs.counts(["ACG"], [4]), "length"),
    "counts: a letter that is no base": (lambda: motifs.counts(["ACGN"], [2]), "ACGT"),
    "log_odds: shares": (lambda: motifs.log_odds(torch.tensor([0.9])), "0.5"),
    "movietweetings.drawn: no users": (lambda: movietweetings.drawn(users=0), "users"),
    "draws: an unknown fold": (lambda: draws(Z, LABELS % 2, 2, 1, 0, fold=2), "fold 0 or 1"),
    "draws: an odd number of labels": (lambda: draws(Z, LABELS % 2, 3, 1, 0), "even number"),
    "draws: labels of three classes": (
        lambda: draws(Z, LABELS, 2, 1, 0),
        "class numbers from 0 to 1",
    ),
    "tested: a negative seed": (lambda: tested_rows(4, -1), "seed"),
    "with_share: more than all": (lambda: with_share(torch.arange(8) % 2, 1.5, 0), "share"),
    "with_share: a class too few": (lambda: with_share(torch.zeros(8).long(), 0.5, 0), "items"),
    "sentiment.drawn: an unknown site": (lambda: drawn_site("Google"), "Amazon"),
    "groceries: an unknown part": (lambda: grocery.groceries("validation"), "expected a part"),
    "groceries: a size of none": (lambda: grocery.groceries("val", size=0), "size"),
    "grocery.reduced: a text": (lambda: grocery.reduced(written("a.jpg", "hello")), "a.jpg"),
    "Folders.map: no function": (lambda: grocery.Folders(DATA, DATA).map(3), "function"),
    "crates: no classes": (lambda: crates(0), "classes"),
    "crates: a visit before the first": (lambda: crates(1, visit=-1), "visit"),
    "bccd: an unknown part": (lambda: bccd.bccd("valid"), "expected a part"),
    "blood_cells: a size of one number": (lambda: bccd.blood_cells(size=320), "size"),
    "annotation: no XML": (lambda: bccd.annotation(b"hello"), "XML|annotation"),
    "fetch: an address": (lambda: fetch("https://example.org/file"), "Remote"),
    "fetch: no digest": (
        lambda: fetch(Remote("a/b.zip", "http://127.0.0.1:9/b.zip", ())),
        "sha256|SHA-256",
    ),
    "members: a folder": (lambda: members("."), "archive|file"),
    "digest_of: names alone": (lambda: digest_of(["a", "b"]), "bytes"),
    "check_seed: True": (lambda: check_seed(True), "expected the seed"),
    "mmd: one number for the widths": (lambda: align.mmd(widths=1.0), "widths"),
    "mmd: words for the widths": (lambda: align.mmd(widths=("a",)), "width > 0"),
    "mmd: an infinite width": (lambda: align.mmd(widths=(INF,)), "width > 0"),
    "mcc: one output": (lambda: align.mcc()(PHI, Z[None], Z[None, :, :1]), "at least two classes"),
    "entropy penalty: one output": (
        lambda: align.entropy()(PHI, Z[None], Z[None, :, :1]),
        "at least two classes",
    ),
    "afn: a negative step": (lambda: align.afn(step=-1.0), "step"),
    "afn: a step of NaN": (lambda: align.afn(step=NAN), "step"),
    "kernel: one row": (lambda: align.kernel(Z[:1]), "two rows"),
    "discrepancy: one row of each": (lambda: align.discrepancy(torch.ones(2, 2)), r"\(2B, 2B\)"),
    "discrepancy: features for the kernel": (lambda: align.discrepancy(Z), r"\(2B, 2B\)"),
    "warm: the step for the progress": (lambda: critics.warm(500), "progress"),
    "mcd: a head of one class": (
        lambda: critics.mcd(mlp(30, (8,), 2, seed=0))(
            parameters(mlp(30, (8,), 2, seed=0)), torch.zeros(2, 4, 8), torch.zeros(2, 4, 2)
        ),
        "at least two classes",
    ),
    "adda: a critic of three outputs": (
        lambda: critics.adda(NET, PHI, nn.Linear(8, 3))(
            {**PHI, **critics.adversary(nn.Linear(8, 3))}, BATCH
        ),
        "one output for each of 2 domains",
    ),
    "adda: the critic's entries forgotten": (
        lambda: critics.adda(NET, PHI, CRITIC)(PHI, BATCH),
        "the critic's parameters",
    ),
    "adda: episodes": (lambda: critics.adda(NET, PHI, CRITIC)(PHI, DRAW), "expects batches"),
    "dev: lists": (lambda: selection.dev([1.0, 2.0], [1.0, 1.0]), "tensor"),
    "nce: lists": (lambda: transferability.nce([0, 1], [0, 1]), "tensor"),
    "leep: numpy": (lambda: transferability.leep(Z.softmax(1).numpy(), LABELS), "tensor"),
    "logme: numpy labels": (lambda: transferability.logme(Z, LABELS.numpy()), "tensor"),
    "log_evidence: a list": (
        lambda: transferability.log_evidence(Z, Z[:, 0].tolist(), 1.0, 1.0),
        "tensor",
    ),
    "log_evidence: an infinite precision": (
        lambda: transferability.log_evidence(Z, Z[:, 0], INF, 1.0),
        "positive precisions",
    ),
    "transrate: an infinite ε": (lambda: transferability.transrate(Z, LABELS, INF), "eps > 0"),
    "rows: complex numbers": (lambda: transferability.rows(Z + 1j), "real numbers"),
    "a_distance: no seed": (lambda: transferability.a_distance(Z, Z, seed=None), "seed"),
    "held_out: a draw for the stream": (lambda: unseen.held_out(BATCH, 0), "a stream"),
    "mixup: a draw for the stream": (lambda: unseen.mixup(BATCH, 1.0, 0), "a stream"),
    "mixup: no seed": (lambda: unseen.mixup(BATCHES, 1.0, None), "seed"),
    "balances: risks that are whole numbers": (
        lambda: weights.balances(torch.tensor([1, 2])),
        "int64",
    ),
    "balances: an infinite risk": (
        lambda: weights.balances(torch.tensor([1.0, INF])),
        "before training",
    ),
    "best_weights: an infinite offset": (
        lambda: weights.best_weights(torch.ones(1), torch.full((1, 1), INF)),
        "finite offsets",
    ),
    "best_weights: an infinite variance": (
        lambda: weights.best_weights(torch.full((1,), INF), torch.zeros(1, 1)),
        "finite variances",
    ),
    "sinusoids: whole numbers": (lambda: sinusoids(dtype=torch.int64), "floating-point"),
    "risk_of: a network of five outputs": (lambda: risk_of(nn.Linear(1, 5)), r"\(n, 1\)"),
    "planted: a negative seed": (lambda: planted(seed=-1), "seed"),
    "exact_stream: a covariance that is none": (
        lambda: exact_stream(linear_tasks(2)._replace(covariances=-torch.eye(5).expand(2, 5, 5))),
        "negative eigenvalues",
    ),
    "exact_stream: weights of another width": (
        lambda: exact_stream(linear_tasks(2)._replace(weights=torch.zeros(2, 4))),
        r"\(T, D, D\)",
    ),
    "samples: a spread of NaN": (lambda: samples(4, spread=NAN), "spread"),
    "reverse_complement: small letters": (lambda: motifs.reverse_complement("acgt"), "ACGT"),
    "counts: sequences of several lengths": (lambda: motifs.counts(["ACG", "ACGT"], [2]), "length"),
    "counts: no sequences": (lambda: motifs.counts([], [2]), "length"),
    "log_odds: NaN": (lambda: motifs.log_odds(torch.tensor([NAN])), "0.5"),
    "log_odds: no margin": (lambda: motifs.log_odds(torch.tensor([0.5]), 0.0), "margin"),
    "motifs.drawn: sequences shorter than a motif": (lambda: motifs.drawn(length=5), "at least 6"),
    "known: indices for the mask": (
        lambda: movietweetings.known(movietweetings.drawn(users=5), np.arange(3), 1.0),
        "mask",
    ),
    "clinc.drawn: more than there are": (lambda: clinc.drawn(5000), "at most 1000"),
    "prepared: NaN": (lambda: digits.prepared(np.full((8, 8), NAN), 8, False), r"\[0, 1\]"),
    "halves: half a test image": (
        lambda: digits.halves(digits.Domain(torch.zeros(4, 1, 2, 2), LABELS[:4], "x"), 1.5),
        "expected tested",
    ),
    "pairs: fewer labels than images": (
        lambda: digits.pairs(Batch(Z, LABELS[1:]), Batch(Z, LABELS), 0),
        "as many labels as items",
    ),
    "prepare: infinity": (lambda: heart.prepare(np.full((3, 18), INF)), "finite"),
    "Preparation: one column": (
        lambda: heart.prepare(np.ones((3, 18)))(np.ones((3, 1))),
        r"\(n, 18\)",
    ),
    "labelled: one-hot": (lambda: heart.labelled(np.eye(2)[[0, 1] * 9], 4, 1, 0), r"y \(n,\)"),
    "draws: fewer labels than rows": (
        lambda: draws(Z, LABELS[1:] % 2, 2, 1, 0),
        "as many labels as items",
    ),
    "draws: half a label": (lambda: draws(Z, LABELS % 2, 2.0, 1, 0), "even number"),
    "sentiment.drawn: no sentences": (lambda: drawn_site("Yelp", sentences=0), "sentences"),
    "blood_cells: half a pixel": (lambda: bccd.blood_cells(size=(80.5, 60)), "size"),
    "fetch: a text for the digests": (
        lambda: fetch(Remote("a/b.zip", "http://127.0.0.1:9/b.zip", "0" * 64)),
        "SHA-256",
    ),
    "Photographs.select: a mask": (
        lambda: scenes(3, seed=0).select(torch.tensor([True, False, True])).names,
        lambda names: names == ["scene0000", "scene0002"],
    ),
    "Photographs.select: out of range": (lambda: scenes(2).select([2]), "from 0 to 1"),
    "decode: NaN": (lambda: decode(torch.full((1, 5, 4, 4), NAN), 1), "finite"),
    "flipped: other classes": (
        lambda: flipped(torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 2, 2), 2, 3),
        r"2 \+ 4 channels",
    ),
}

# what these rooms take for functions, prefixes, paths and sets ----------------------------------

EMPTY = over(lambda d: d[:0], SUPPORT)

BAD |= {
    "fit: a number for the hook": (lambda: fitted(hook=3), "hook .*4 arguments"),
    "fit: a hook of two arguments": (lambda: fitted(hook=lambda a, b: 0), "hook .*4 arguments"),
    "fit: a number for the checkpoint": (lambda: fitted(checkpoint=3), "path of a file"),
    "fit: a number that moves": (lambda: fitted(moves=3), "moves as prefixes"),
    "fit: moves that are no words": (lambda: fitted(moves=(3,)), "moves as prefixes"),
    "fit: rates of no words": (lambda: fitted(rates={3: 0.1}), "rates as a dict of prefixes"),
    "fit: a real number for the device": (lambda: fitted(device=3.5), "device"),
    "evaluate: a metric of one argument": (
        lambda: scored(metric=lambda p: p.mean()),
        "metric .*2 arguments",
    ),
    "evaluate: a loss class for the metric": (
        lambda: scored(metric=nn.CrossEntropyLoss),
        "metric .*2 arguments",
    ),
    "best_of: a number for the quality": (lambda: best_of([1, 2], 0.5), "quality .*a function"),
    "over_clusters: one cluster": (
        lambda: over_clusters(torch.rand(3), [1, 1, 1]),
        "at least 2 clusters",
    ),
    "over_clusters: a cluster too few": (
        lambda: over_clusters(torch.rand(3), [0, 1]),
        "whole number for each of 3",
    ),
    "over_clusters: half a cluster": (
        lambda: over_clusters(torch.rand(3), torch.rand(3)),
        "whole number for each of 3",
    ),
    "Tuning.choose: no setting": (
        lambda: Tuning("a").choose("x", "p", [], list),
        "at least one setting",
    ),
    "Tuning.choose: numbers for the trial": (
        lambda: Tuning("a").choose("x", "p", [1], [[0.5]]),
        "trial .*a function",
    ),
    "over_units: scores": (lambda: over_units({"a": 0.5}, "a"), "a contest"),
    "over_units: a number for the contest": (lambda: over_units(0.5, "a"), "a contest"),
    "expanded: a function": (lambda: expanded(NET, torch.sin), "nn.Module"),
    "expanded: a network without halves": (
        lambda: expanded(torch.nn.Linear(2, 2), Harmonics((1.0,))),
        "two named halves",
    ),
    "rising_adam: a rate of 0": (lambda: rising_adam(0.0, 10), "rate > 0"),
    "rising_adam: one step": (lambda: rising_adam(0.1, 1), "steps"),
    "rising_adam: more than all steps": (lambda: rising_adam(0.1, 10, 1.5), "rise"),
    "varied_sinusoids: few that are many": (lambda: varied_sinusoids(5, few=6), "at most shots"),
    "varied_sinusoids: few that are none": (lambda: varied_sinusoids(5, few=0), "few"),
    "sinusoids: a frequency of 0": (lambda: sinusoids(frequency=0.0), "frequency > 0"),
    "best_possible: a frequency of NaN": (
        lambda: best_possible(frequency=NAN),
        "frequency > 0",
    ),
    "Harmonics: no frequency": (lambda: Harmonics(()), "at least one"),
    "Harmonics: a number": (lambda: Harmonics(2.0), "frequencies"),
    "Harmonics: a frequency of 0": (lambda: Harmonics((1.0, 0.0)), "frequencies > 0"),
    "Harmonics: a frequency of NaN": (lambda: Harmonics((NAN,)), "frequencies > 0"),
    "Harmonics: class numbers": (lambda: Harmonics((1.0,))(LABELS), "real x"),
    "planes: negative noise": (lambda: planes(noise=-1.0), "noise"),
    "planes: no dimensions": (lambda: planes(dims=0), "dims"),
    "planes: half a task": (lambda: planes(tasks=2.5), "tasks"),
    "planes: a word for the seed": (lambda: planes(seed="a"), "seed"),
    "best_plane: no noise": (lambda: best_plane(0.0), "noise > 0"),
    "Widths: a gap in the blocks": (lambda: Widths(torch.tensor([0, 2])), "without a gap"),
    "Widths: real numbers": (lambda: Widths(torch.rand(3)), "whole numbers"),
    "Widths: x of another width": (
        lambda: Widths(torch.tensor([0, 0, 1]))(torch.rand(4, 2)),
        "3 columns",
    ),
    "ridge_toward: a head of another width": (
        lambda: ridge_toward(
            torch.rand(4, 3), torch.rand(4, 1), torch.rand(2, 1), torch.ones(3), 1.0
        ),
        "a head",
    ),
    "ridge_toward: no strength": (
        lambda: ridge_toward(
            torch.rand(4, 3), torch.rand(4, 1), torch.rand(3, 1), torch.ones(3), 0.0
        ),
        "strength",
    ),
    "looked_up: numbers for kin": (
        lambda: motifs.looked_up(torch.rand(2, 5), torch.rand(2), [0, 1], 3),
        "whether it is kin",
    ),
    "looked_up: one place twice": (
        lambda: motifs.looked_up(torch.rand(2, 5), torch.tensor([True, False]), [1, 1], 3),
        "different places",
    ),
    "over_classes: a number for the measure": (
        lambda: over_classes(0.5, DATA),
        "measure .*a function",
    ),
    "over_seeds: letters": (lambda: over_seeds(lambda s: 0.5, "abc"), "seed"),
    "over_seeds: half a seed": (lambda: over_seeds(lambda s: 0.5, [0.5, 1.5]), "seed"),
    "over_seeds: arguments exchanged": (
        lambda: over_seeds(range(3), lambda s: 0.5),
        "seeds|measure",
    ),
    "simpleshot: a centre of another width": (
        lambda: gives(
            NET,
            make=simpleshot,
            phi={**simpleshot(NET).init(), "centre.mean": torch.zeros(1)},
        ),
        r"centre.mean of shape \(8,\)",
    ),
    "centred: no items": (lambda: centred(NET, PHI, SUPPORT.x[:0]), "finite"),
    "feat: another learner's φ": (lambda: gives(NET, make=feat, phi=PHI), "parameters named"),
    "metaoptnet: another learner's φ": (
        lambda: gives(NET, make=metaoptnet, phi=PHI),
        "parameters named",
    ),
    "relation: half a hidden unit": (lambda: relation(NET, 2.5), "hidden"),
    "cnp: a floor of NaN": (lambda: cnp(NET, floor=NAN), "floor"),
    "ridge: True for the strength": (lambda: ridge(NET, True), "strength > 0"),
    "crammer_singer: negative steps": (
        lambda: crammer_singer(Z @ Z.mT, one_hot(LABELS, 3, Z.dtype), 1.0, steps=-1),
        "steps",
    ),
    "laplacian_shot: a strength of NaN": (lambda: laplacian_shot(NET, NAN), "strength"),
    "laplacian_shot: negative rounds": (lambda: laplacian_shot(NET, steps=-1), "steps"),
    "laplacian_shot: another learner's φ": (
        lambda: gives(NET, SUPPORT, laplacian_shot, protonet(NET).init()),
        "centre.mean",
    ),
    "laplacian_shot: a centre of another width": (
        lambda: gives(
            NET,
            make=laplacian_shot,
            phi={**simpleshot(NET).init(), "centre.mean": torch.zeros(1)},
        ),
        r"centre.mean of shape \(8,\)",
    ),
    "laplacian_shot: a head of two layers": (lambda: laplacian_shot(DEEP), "one linear layer"),
    "entropy_finetune: a loss class": (
        lambda: entropy_finetune(NET, nn.CrossEntropyLoss, 0.1, 1),
        "loss .*2 arguments",
    ),
    "on_threads: a number": (lambda: on_threads(3, 2), "functions to call"),
    "save_params: a number for the path": (lambda: save_params(3, PHI), "path of a file"),
    "load_params: a number for the path": (lambda: load_params(3), "path of a file"),
    "part: a word": (lambda: part("3"), "tasks"),
    "conv2: a word for the norm": (lambda: conv2(norm="none"), "norm"),
    "against: no methods": (
        lambda: on_axes(lambda axes: against(axes, [1], {}, "x", "y")),
        "at least one",
    ),
    "wrap: an unknown head": (lambda: wrap(NET, "classifier"), "none called 'classifier'. It has"),
    "rows: an x with no tensor": (lambda: rows({}), "one number of rows"),
    "rows: a number for x": (lambda: rows({"a": 3}), "expected tensors in tuples"),
    "wrap: a softmax in the call": (
        lambda: wrap(NET, "head", call=lambda net, x: net(x).softmax(1))(torch.rand(4, 30)),
        "after the head",
    ),
    "lora: a word for the targets": (
        lambda: lora(NET, cross_entropy, 0.1, 1, targets="query"),
        "tuple of names",
    ),
    "lora: a rule class": (
        lambda: lora(NET, cross_entropy, 0.1, 1, rule=torch.optim.Adam),
        "rule",
    ),
    "lora_net: half a rank": (lambda: lora_net(NET, rank=2.5), "rank"),
    "lora_net: a function": (lambda: lora_net(apply(NET)), "a network"),
    "targeted: a name that fits nothing": (lambda: targeted(NET, ("query",)), "fits none"),
    "targeted: no names": (lambda: targeted(NET, ()), "at least one"),
    "adapters: nothing to keep": (lambda: adapters(PHI), "LoRA's entries"),
    "adapters: the network": (lambda: adapters(NET), "parameters"),
    "attach: a path": (lambda: attach(PHI, "mine.safetensors"), "adapters"),
    "attach: parameters without adapters": (lambda: attach(PHI, PHI), r"lora\.base"),
    "folds: class numbers": (lambda: folds(LABELS), r"\(N, W\)"),
    "folds: the learner's support set": (lambda: folds(SUPPORT), r"\(N, W\)"),
    "lowest: no number": (lambda: lowest(lambda s: NAN), "a number at each strength"),
    "lowest: a loss": (lambda: lowest(0.1), "a function"),
} | {
    f"{name}: no support items": (
        partial(gives, NET, EMPTY, LEARNERS[name]),
        "at least one item",
    )
    for name in (
        *("protonet", "matching", "relation", "simpleshot", "feat", "ridge", "r2d2"),
        *(
            "bayesian",
            "alpaca",
            "metaoptnet",
            "cnp",
            "attentive_cnp",
            "in_context",
            "entropy_finetune",
            "bd_cspn",
            "laplacian_shot",
        ),
    )
}

# data of one's own -------------------------------------------------------------------------------

TABLE = {
    "user": torch.arange(12) % 3,
    "a": torch.rand(12),
    "y": torch.rand(12),
    "word": ["x", "y"] * 6,
}
BY_USER = partial(own.rows, by="user", x=["a"], y="y", shots=1, queries=1, tasks=2, seed=0)
LAZY = own.from_dataset(DATASET, [0, 1] * 4)

BAD |= {
    "episodes: a cast to bytes": (
        lambda: episodes(DATA, 5, 1, 1, 2, 0, cast=torch.uint8),
        "floating dtype",
    ),
    "episodes: a word for the cast": (lambda: episodes(DATA, 5, 1, 1, 2, 0, cast="f"), "cast"),
    "episodes: a cast of tokens": (
        lambda: episodes(with_items(lambda d: d.long()), 5, 1, 1, 2, 0, cast=torch.float32)(0),
        "tokens stay as they are",
    ),
    "episodes: queries from the data themselves": (
        lambda: episodes(DATA, 5, 1, 1, 2, 0, queries_from=DATA),
        "could be a support item",
    ),
    "episodes: queries from a tensor": (
        lambda: episodes(DATA, 5, 1, 1, 2, 0, queries_from=DATA.items),
        "expected a ClassSet",
    ),
    "episodes: queries of other classes": (
        lambda: episodes(DATA, 5, 1, 1, 2, 0, queries_from=planted(8, 6, seed=1)),
        "classes of data, by name",
    ),
    "episodes: True for small": (lambda: episodes(DATA, 5, 1, 1, 2, 0, small=True), "small"),
    "ClassSet.split: no parts": (lambda: DATA.split(), "parts as numbers"),
    "ClassSet.split: more than there are": (lambda: DATA.split(a=8, b=1), "at most 8"),
    "ClassSet.split: numbers and shares": (lambda: DATA.split(a=3, b=0.5), "all as shares"),
    "mixture: a class set and a batch": (
        lambda: mixture(DATA, ROWS, batch=2, seed=0),
        "every one a Batch",
    ),
    "mixture: a cast to integers": (
        lambda: mixture(ROWS, batch=2, seed=0, cast=torch.int64),
        "floating dtype",
    ),
    "pool: rows read from a data set": (lambda: pool(LAZY), lambda found: found.x.shape == (8, 30)),
    "image_folder: a folder that is not there": (
        lambda: own.image_folder("nowhere", 8),
        "folder for each class",
    ),
    "image_folder: two channels": (lambda: own.image_folder(".", 8, 2), "1 channel"),
    "read_image: a number": (lambda: own.read_image(3.5, (1, 8, 8)), "readable image, as expected"),
    "read_image: no image": (
        lambda: own.read_image(__file__, (1, 8, 8)),
        "is not a readable image, as expected: .*",
    ),
    "from_dataset: a loader": (lambda: own.from_dataset(LOADER), "map-style"),
    "from_dataset: a tensor": (lambda: own.from_dataset(DATA.items), "map-style"),
    "from_dataset: too few labels": (lambda: own.from_dataset(DATASET, [0, 1]), "each of 8 items"),
    "from_dataset: real labels": (
        lambda: own.from_dataset(DATASET, torch.rand(8)),
        "whole number or a word",
    ),
    "rows: a list": (lambda: BY_USER([1, 2]), "expected a table"),
    "rows: a column of words": (lambda: BY_USER(TABLE, x=["word"]), "numbers in the column 'word'"),
    "rows: a column that is not there": (lambda: BY_USER(TABLE, x=["b"]), "expected columns"),
    "rows: y among x": (lambda: BY_USER(TABLE, x=["a", "y"]), "other columns y"),
    "rows: groups that are too small": (
        lambda: BY_USER(TABLE, shots=4),
        "3 of 3 have fewer",
    ),
    "split_rows: a tensor": (lambda: own.split_rows(DATA.items, "user", a=1), "expected a table"),
    "split_rows: more groups than there are": (
        lambda: own.split_rows(TABLE, "user", a=4),
        "at most 3",
    ),
    "split_rows: no such column": (
        lambda: own.split_rows(TABLE, "machine", a=1),
        r"expected columns \['machine'\]",
    ),
    "ahead: a data loader": (lambda: ahead(LOADER), "stream"),
    "ahead: no workers": (lambda: ahead(STREAM, 0), "workers"),
    "ahead: a function inside a function": (lambda: ahead(lambda step: DRAW), "cannot be pickled"),
}

# averaging, and its page -------------------------------------------------------------------------

AVERAGED = [{"w": torch.rand(3), "b": torch.rand(1)} for _ in range(2)]
OTHER_SHAPE = {"w": torch.rand(4), "b": torch.rand(1)}
DIGITS = digits.Domain(torch.rand(400, 1, 16, 16), torch.arange(400) % 10, "drawn")
READING = merging.reading(DIGITS, held=2, tested=20, seen=40)
MAKE1, MAKE2, MAKE3 = (lambda a: PHI), (lambda a, b: READING), (lambda a, b, c: PHI)
BAD |= {
    "interpolated: heads of other sizes": (
        lambda: averaging.interpolated(AVERAGED[0], OTHER_SHAPE, 0.5),
        "'w' of the same shape.*apart",
    ),
    "interpolated: a member that diverged": (
        lambda: averaging.interpolated(
            AVERAGED[0], {**AVERAGED[1], "w": torch.full((3,), NAN)}, 0.5
        ),
        "diverge",
    ),
    "interpolated: a share of NaN": (lambda: averaging.interpolated(*AVERAGED, NAN), "share"),
    "interpolated: a share as a word": (lambda: averaging.interpolated(*AVERAGED, "half"), "share"),
    "interpolated: two dtypes": (
        lambda: averaging.interpolated(
            AVERAGED[0], {k: v.double() for k, v in AVERAGED[1].items()}, 0.5
        ),
        "dtype",
    ),
    "interpolated: a network": (lambda: averaging.interpolated(NET, NET, 0.5), "φ"),
    "uniform_soup: one φ": (lambda: averaging.uniform_soup(AVERAGED[0]), "list of members"),
    "uniform_soup: no member": (lambda: averaging.uniform_soup([]), "at least one"),
    "uniform_soup: other entries": (
        lambda: averaging.uniform_soup([AVERAGED[0], {"w": torch.rand(3)}]),
        "'b'.*alone",
    ),
    "greedy_soup: a member of another network": (
        lambda: averaging.greedy_soup([AVERAGED[0], OTHER_SHAPE], lambda phi: 0.0),
        "same shape",
    ),
    "greedy_soup: a quality of NaN": (
        lambda: averaging.greedy_soup(AVERAGED, lambda phi: NAN),
        "finite quality",
    ),
    "greedy_soup: a Score for a number": (
        lambda: averaging.greedy_soup(AVERAGED, lambda phi: interval(torch.rand(5))),
        "score.mean",
    ),
    "greedy_soup: a quality of two arguments": (
        lambda: averaging.greedy_soup(AVERAGED, lambda net, phi: 0.0),
        "quality",
    ),
    "task_vector: heads of other sizes": (
        lambda: averaging.task_vector(AVERAGED[0], OTHER_SHAPE),
        "same shape",
    ),
    "task_vector: another network": (
        lambda: averaging.task_vector(AVERAGED[0], {"v": torch.rand(3)}),
        "same entries",
    ),
    "added: one vector for a list": (
        lambda: averaging.added(AVERAGED[0], AVERAGED[1]),
        "list of task vectors",
    ),
    "added: a vector of another network": (
        lambda: averaging.added(AVERAGED[0], [{"v": torch.rand(3)}]),
        "another network",
    ),
    "added: no scale": (lambda: averaging.added(AVERAGED[0], [AVERAGED[1]], NAN), "scale"),
    "ties: nothing to keep": (lambda: averaging.ties(AVERAGED, 0.0), "keep"),
    "ties: percent for a share": (lambda: averaging.ties(AVERAGED, 20), "keep"),
    "ties: vectors of two networks": (
        lambda: averaging.ties([AVERAGED[0], OTHER_SHAPE]),
        "same shape",
    ),
    "barrier: no end": (lambda: averaging.barrier([1.0, 2.0, 1.0], [0.0, 0.5, 0.9]), "the last 1"),
    "barrier: the middle alone": (lambda: averaging.barrier([1.0], [0.5]), "three shares"),
    "barrier: a loss of NaN": (
        lambda: averaging.barrier([1.0, NAN, 1.0], [0.0, 0.5, 1.0]),
        "finite losses",
    ),
    "reading: images for a domain": (lambda: merging.reading(DATA.items), "domain"),
    "reading: more labels than there are": (
        lambda: merging.reading(DIGITS, shots=500, seen=10),
        "500|505",
    ),
    "onward: one reading for a list": (
        lambda: merging.onward(NET, PHI, READING, 0.01, 1, 0),
        "a list",
    ),
    "onward: no reading": (lambda: merging.onward(NET, PHI, [], 0.01, 1, 0), "at least one"),
    "answers: a part that is not there": (
        lambda: merging.answers(NET, PHI, READING, "train"),
        "part",
    ),
    "by_digit: one network for two readings": (
        lambda: merging.by_digit(NET, [PHI], [READING] * 2),
        "a network for each",
    ),
    "merging: a setting alone": (
        lambda: merging.merging("transfer", NET, lambda seed: [READING], lambda s: [PHI], [1]),
        "make",
    ),
    "along: one end of a line": (
        lambda: merging.along(None, None, ["start"], (0.0,)),
        "two shares",
    ),
    "along: a way without a share": (
        lambda: merging.along(None, None, ["start", "end"], (0.0, 0.5, 1.0)),
        "two shares",
    ),
    "summing: one task": (
        lambda: merging.summing(NET, ["a"], MAKE2, MAKE1, MAKE3, 1, (0.1,), (1.0,), (0.2,)),
        "two tasks",
    ),
    "summing: φ for the start": (
        lambda: merging.summing(NET, ["a", "b"], MAKE2, PHI, MAKE3, 1, (0.1,), (1.0,), (0.2,)),
        "base",
    ),
    "both_ways: φ for a function": (
        lambda: merging.both_ways(NET, MAKE3, PHI),
        "made",
    ),
    "connected: a pair that is no function": (
        lambda: merging.connected(NET, MAKE3, (PHI, PHI), (0.0, 0.5, 1.0)),
        "pair",
    ),
}

# still open --------------------------------------------------------------------------------------

_OPEN: dict[str, str] = {
    "core.py": """
        below: a list for φ; a prefix that is no word
        take: a task that is not there; a word
        move: an unknown device
    """,
}
"""By the file where it is to be mended: function, colon, and what of the table is not named there yet."""

CURVE, X = mlp(1, (4,), 1, seed=0), torch.linspace(-1, 1, 5)[:, None]
FLAT, WAVE = {"MAML": parameters(CURVE)}, Episode(Batch(X, X), Batch(X, X))
ANSWERS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
NORMED = two_halves(nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8)), nn.Linear(8, 5))
BAD |= {
    "scales: no norm": (lambda: test_time.scales(NET), "norms"),
    "scales: parameters for the network": (lambda: test_time.scales(PHI), "network"),
    "at_test: other statistics": (
        lambda: test_time.at_test(NORMED, "target"),
        r'"batch" or "stored"',
    ),
    "at_test: no norm": (lambda: test_time.at_test(NET), "norms"),
    "mean_entropy: class numbers": (lambda: test_time.mean_entropy(LABELS), r"logits \(B, C\)"),
    "mean_entropy: one class": (lambda: test_time.mean_entropy(torch.zeros(3, 1)), "two classes"),
    "mean_entropy: nothing is below": (
        lambda: test_time.mean_entropy(ANSWERS, below=0.0),
        "below > 0",
    ),
    "tent: no batch": (lambda: test_time.tent(NORMED, parameters(NORMED), [], 0.1), "one batch"),
    "tent: a negative rate": (
        lambda: test_time.tent(NORMED, parameters(NORMED), [torch.zeros(4, 30)], -0.1),
        "rate",
    ),
    "tent: another network's parameters": (
        lambda: test_time.tent(NORMED, PHI, [torch.zeros(4, 30)], 0.1),
        "parameters named|entries",
    ),
    "tent: no statistics to be read": (
        lambda: test_time.tent(
            NORMED, parameters(NORMED), [torch.zeros(4, 30)], 0.1, statistics="stored"
        ),
        "calibrate",
    ),
    "tent: NaN": (
        lambda: test_time.tent(NORMED, parameters(NORMED), [torch.full((4, 30), NAN)], 0.1),
        "finite loss",
    ),
    "tent: a loss of two arguments": (
        lambda: test_time.tent(
            NORMED, parameters(NORMED), [torch.zeros(4, 30)], 0.1, loss=cross_entropy
        ),
        "loss to be a function of 1 argument",
    ),
    "online: NaN": (
        lambda: list(
            test_time.online(
                NORMED, torch.optim.SGD(NORMED.parameters(), lr=0.0), [torch.full((4, 30), NAN)]
            )
        ),
        "finite loss",
    ),
    "varieties: probabilities": (
        lambda: test_time.varieties(torch.full((12, 4), 0.25), 6),
        "got probabilities",
    ),
    "varieties: a window of more than there are": (
        lambda: test_time.varieties(ANSWERS, 13),
        "at least a window of 13",
    ),
    "changes: answers to other items": (
        lambda: test_time.changes(ANSWERS, ANSWERS[:8], 6),
        "the same items",
    ),
    "changes: class numbers": (lambda: test_time.changes(ANSWERS, LABELS, 6), r"\(n, "),
    "least_variety: no window": (lambda: test_time.least_variety(ANSWERS, 0), "window"),
    "least_variety: percent": (
        lambda: test_time.least_variety(ANSWERS, 6, chance=5),
        "chance.*from 0 to 1",
    ),
    "alarm: no bound": (lambda: test_time.alarm(torch.zeros(3), 6), "one bound"),
    "alarm: logits": (lambda: test_time.alarm(ANSWERS, 6, below=1.0), "one for each window"),
    "reports: no kind": (lambda: reports(""), "workloads"),
    "spent by kind: no pages": (lambda: spent_by_kind({"kinds": {}}, 0), "count"),
    "straight: one number": (lambda: straight([1], [1.0]), "at least two"),
    "straight: other lengths": (lambda: straight([1, 2], [1.0]), "as many numbers"),
    "reference: a room without one": (lambda: reference("core").__enter__(), "reference"),
    "in_turns: no ways": (lambda: in_turns({}), "functions to call"),
    "in_turns: results": (lambda: in_turns({"a": 1.0}), "functions to call"),
    "in_turns: no rounds": (lambda: in_turns({"a": float}, 0), "rounds"),
    "fastest: no repeats": (lambda: fastest(float, 0), "repeats"),
    "launched: no script": (lambda: launched(Path("none.py"), (1,)), "a script"),
    "launched: no process": (lambda: launched(Path(__file__), (0,)), "processes"),
    "launched: not even that": (lambda: launched(Path(__file__), ()), "numbers of processes"),
    "gain: a result": (lambda: gain("idea", 1.0, float), "functions of a dtype"),
    "arrivals: an unknown order": (lambda: arriving.arrivals(LABELS, "random", 0), "mixed"),
    "arrivals: one-hot rows": (lambda: arriving.arrivals(ANSWERS, "mixed", 0), "classes y"),
    "watched: labels of other items": (
        lambda: arriving.watched(ANSWERS, ANSWERS, LABELS[:5], 1.0, 6),
        r"y \(n,\)",
    ),
    "watched: a window of none": (
        lambda: arriving.watched(ANSWERS, ANSWERS, LABELS, 1.0, 0),
        "window",
    ),
    "rate_for: no other target": (
        lambda: arriving.rate_for("b", [("a", "b")], {0.1: [1.0]}),
        "other targets",
    ),
    "rate_for: no rate": (
        lambda: arriving.rate_for("b", [("a", "b"), ("b", "a")], {}),
        "other targets",
    ),
    "streamed: batches of none": (
        lambda: arriving.streamed(None, Batch(ANSWERS, LABELS), ("mixed", 0, 0.1, {}), 0, 6),
        "size",
    ),
    "frozen: a window of more than is held out": (
        lambda: arriving.frozen(
            NORMED,
            parameters(NORMED),
            torch.randn(9, 30),
            torch.randn(9, 30),
            torch.randn(9, 30),
            10,
        ),
        "at least a window of 10",
    ),
    "noticed: a mean for a contest": (lambda: arriving.noticed({}, "variety", ["a"], 6), "contest"),
    "beside: a mean for a contest": (lambda: arriving.beside({}, "a"), "contest"),
    "fell: a mean for a contest": (lambda: arriving.fell({}, "a"), "contest"),
    "streamed: an unknown order": (
        lambda: arriving.streamed(None, Batch(ANSWERS, LABELS), ("random", 4, 0.1, {}), 0, 6),
        "mixed",
    ),
    "traces: a window of more than came": (
        lambda: arriving.traces(ANSWERS, ANSWERS, LABELS, len(LABELS) + 1),
        "window",
    ),
    "inner_steps: several tasks": (
        lambda: inner_steps(NET, mse_loss, {"MAML": PHI}, DRAW, (Z, Z), (0.1,), 2, (0.1, 0)),
        "one task",
    ),
    "inner_steps: rates in no order": (
        lambda: inner_steps(CURVE, mse_loss, FLAT, WAVE, (X, X), (0.1, 0.01), 2, (0.1, 0)),
        "rates that rise",
    ),
    "inner_steps: a start that is no rate": (
        lambda: inner_steps(CURVE, mse_loss, FLAT, WAVE, (X, X), (0.01, 0.1), 2, (0.05, 0)),
        "start of one of the rates",
    ),
    "inner_steps: a step beyond the last": (
        lambda: inner_steps(CURVE, mse_loss, FLAT, WAVE, (X, X), (0.01, 0.1), 2, (0.1, 3)),
        "step from 0 to 2",
    ),
    "inner_steps: a true curve of another length": (
        lambda: inner_steps(CURVE, mse_loss, FLAT, WAVE, (X, X[1:]), (0.1,), 2, (0.1, 0)),
        "one shape",
    ),
    "by_labels: means for contests": (
        lambda: by_labels({1: {"a + b": 0.5}}, ["a"], ["b"]),
        "Contest",
    ),
    "by_labels: no contest": (lambda: by_labels({}, ["a"], ["b"]), "at least one"),
    "path: an end to begin with": (lambda: path(End("Stop.", "own", "Own")), "Question"),
    "path: an answer that leads nowhere": (
        lambda: path(Question("Is it?", End("Stop.", "own", "Own"), None)),
        "a Question or an End",
    ),
    "path: an end without a page": (
        lambda: path(Question("Is it?", End("Stop.", "", "Own"), End("Go.", "own", "Own"))),
        "page",
    ),
    "path: a page in a folder": (
        lambda: path(Question("Is it?", End("Stop.", "a/own", "Own"), End("Go.", "own", "Own"))),
        "page",
    ),
    "arriving.trained: no rate": (
        lambda: arriving.trained(NORMED, parameters(NORMED), Batch(ANSWERS, LABELS), -1.0, 3, 0),
        "rate",
    ),
}

OPEN = {
    f"{function}: {kind}": file
    for file, lines in _OPEN.items()
    for function, _, kinds in (line.strip().partition(": ") for line in lines.strip().split("\n"))
    for kind in kinds.split("; ")
}
"""Name -> the file that does not name it yet."""

if __name__ == "__main__":
    import os
    import tempfile
    import warnings

    os.environ |= {"MTLIB_OFFLINE": "1", "MTLIB_PROGRESS": "0"}
    os.chdir(tempfile.mkdtemp())
    warnings.simplefilter("error")
    for name in BAD:
        if bool(found := fault(name)) != (name in OPEN):
            print(f"{name}: {found}" if found else f"{name}: named now, take it out of OPEN")
