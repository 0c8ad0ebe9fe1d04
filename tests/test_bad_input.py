"""What is wrong with it, what was expected, what to do: for each kind of bad input, from our own code."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, first_order, implicit
from mtlib.book.page import is_full
from mtlib.core import Batch, Episode, apply, load, parameters, start
from mtlib.data.planted import planted
from mtlib.data.sinusoids import sinusoids
from mtlib.evaluate import evaluate, interval
from mtlib.joint import joint
from mtlib.learners.finetune import as_is, linear_probe
from mtlib.learners.gradient import anil, maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4, mlp
from mtlib.norm import Norm, calibrate
from mtlib.tasks import ClassSet, episodes, mixture, quiz
from mtlib.train import fit
from mtlib.transfer.align import coral

DATA = planted(8, 6, seed=0)
NET = mlp(30, (8,), 5)
STREAM = episodes(DATA, 5, 1, 2, tasks=2, seed=0)
LEARNER = maml(NET, cross_entropy, 0.1, 1)
PHI = LEARNER.init()
OBJECTIVE = bilevel(LEARNER, cross_entropy)


def fitted(stream, objective=OBJECTIVE, phi=PHI):
    return fit(objective, phi, stream, 2, progress=False)


def changed(**parts):
    """A stream whose support set has one part replaced."""

    def stream(step):
        draw = STREAM(step)
        return draw._replace(
            support=draw.support._replace(
                **{k: f(getattr(draw.support, k)) for k, f in parts.items()}
            )
        )

    return stream


def with_nan():
    items = DATA.items.clone()
    items[3, 2, 1] = float("nan")
    return DATA._replace(items=items)


BAD = {
    "too few items for the shots": (
        lambda: episodes(DATA, 5, 4, 3, 2, 0),
        r"expected shots \+ queries ≤ 6",
    ),
    "more ways than classes": (lambda: episodes(DATA, 9, 1, 1, 2, 0), "expected at most 8 ways"),
    "no shots": (
        lambda: episodes(DATA, 5, 0, 1, 2, 0),
        "expected shots to be a whole number of at least 1",
    ),
    "a fraction of a way": (
        lambda: episodes(DATA, 2.5, 1, 1, 2, 0),
        "expected ways to be a whole number",
    ),
    "NaN in the data": (
        lambda: episodes(with_nan(), 5, 1, 1, 2, 0),
        r"1 are NaN or infinite, the first at \[3, 2, 1\]",
    ),
    "images of bytes": (
        lambda: episodes(DATA._replace(items=DATA.items.byte()), 5, 1, 1, 2, 0),
        "expected floating-point items",
    ),
    "items without classes": (
        lambda: episodes(ClassSet(torch.zeros(9, 4), ["a"] * 9, "flat"), 5, 1, 1, 2, 0),
        "expected items of shape",
    ),
    "names that do not fit": (
        lambda: episodes(DATA._replace(names=["a"]), 5, 1, 1, 2, 0),
        "one name per class",
    ),
    "mixed shapes of items": (
        lambda: mixture(
            Batch(torch.zeros(4, 3), torch.zeros(4, 1)),
            Batch(torch.zeros(4, 2), torch.zeros(4, 1)),
            batch=2,
            seed=0,
        ),
        "expected items of the same shape",
    ),
    "labels and items of two lengths": (
        lambda: mixture(Batch(torch.zeros(4, 3), torch.zeros(5, 1)), batch=2, seed=0),
        "as many labels as items",
    ),
    "regression targets without an axis": (
        lambda: mixture(Batch(torch.zeros(4, 3), torch.zeros(4)), batch=2, seed=0),
        r"write y\[:, None\]",
    ),
    "class numbers mixed with targets": (
        lambda: mixture(
            Batch(torch.zeros(4, 3), torch.zeros(4, 1)),
            Batch(torch.zeros(4, 3), torch.zeros(4).long()),
            batch=2,
            seed=0,
        ),
        "or targets .* in every one; got both",
    ),
    "class numbers where one-hot is meant": (
        lambda: fitted(changed(y=lambda y: y.argmax(-1))),
        r"Labels are one-hot rows",
    ),
    "one-hot of integers": (lambda: fitted(changed(y=lambda y: y.long())), "not class numbers"),
    "NaN in an episode": (
        lambda: fitted(changed(x=lambda x: x * float("nan"))),
        "finite numbers in x of the support set",
    ),
    "an episode with rows missing": (
        lambda: fitted(changed(x=lambda x: x[:, 1:])),
        r"expected x \(T, rows",
    ),
    "a stream of something else": (
        lambda: fitted(lambda step: [1, 2]),
        "gives an Episode or a Batch",
    ),
    "the wrong number of classes": (
        lambda: fitted(episodes(DATA, 3, 1, 2, 2, 0)),
        "one output for each class",
    ),
    "items the network cannot read": (
        lambda: fitted(episodes(planted(8, 6, informative=4), 5, 1, 2, 2, 0)),
        r"cannot read x of shape \(5, 29\)",
    ),
    "colour images for a grey network": (
        lambda: apply(conv4())(parameters(conv4()), torch.zeros(2, 3, 28, 28)),
        r"cannot read x of shape \(2, 3, 28, 28\)",
    ),
    "images too small": (lambda: conv4(size=12), "at least 16 pixels"),
    "double data for a float network": (
        lambda: apply(NET)(PHI, torch.zeros(2, 30, dtype=torch.float64)),
        "float64",
    ),
    "batches for bilevel": (lambda: fitted(quiz(STREAM)), "goes with `joint`"),
    "episodes for joint": (
        lambda: fitted(STREAM, joint(NET, cross_entropy)),
        "goes with `bilevel`",
    ),
    "two weights for three sets": (
        lambda: fitted(
            mixture(*[Batch(torch.zeros(4, 30), torch.zeros(4, 5))] * 3, batch=2, seed=0),
            joint(NET, mse_loss, (1, 0)),
        ),
        "2 weights, 3 tasks",
    ),
    "CORAL with one domain": (
        lambda: coral()(PHI, torch.zeros(1, 4, 3), torch.zeros(1)),
        "T ≥ 2 domains",
    ),
    "parameters of another network": (
        lambda: fitted(STREAM, phi=parameters(nn.Linear(3, 2))),
        r"start\(learner, trained\)",
    ),
    "nothing to carry over": (
        lambda: start(as_is(NET), parameters(nn.Linear(3, 2))),
        "Was another network trained",
    ),
    "loading with parameters missing": (
        lambda: load(NET, {"head.bias": torch.zeros(5)}),
        r"expected parameters named",
    ),
    "a network without halves": (lambda: protonet(nn.Linear(3, 2)), "two named halves"),
    "ANIL without a head": (
        lambda: anil(nn.Linear(3, 2), mse_loss, 0.1, 1),
        r"parameters named head\.\*",
    ),
    "a negative number of steps": (lambda: maml(NET, mse_loss, 0.1, -1), "at least 0"),
    "first order where θ is something else": (
        lambda: bilevel(protonet(NET), cross_entropy, first_order)(protonet(NET).init(), STREAM(0)),
        "Use unrolled",
    ),
    "implicit with part of φ at rest": (
        lambda: bilevel(anil(NET, cross_entropy, 0.1, 1), cross_entropy, implicit(1.0))(
            PHI, STREAM(0)
        ),
        "moves every entry",
    ),
    "implicit without a pull": (lambda: implicit(0.0), "strength > 0"),
    "a probe without regularisation": (
        lambda: linear_probe(NET, cross_entropy, 0.0),
        "strength > 0",
    ),
    "a chunk of no task": (lambda: bilevel(LEARNER, cross_entropy, chunk=0), "at least 1 task"),
    "an unknown kind of statistics": (
        lambda: Norm(3, "running"),
        'expected statistics "batch" or "stored"',
    ),
    "calibrating what stores nothing": (
        lambda: calibrate(NET, parameters(NET), [torch.zeros(1)]),
        "found none",
    ),
    "evaluating a head of another width": (
        lambda: evaluate(
            as_is(mlp(30, (8,), 3)), parameters(mlp(30, (8,), 3)), STREAM, 4, progress=False
        ),
        "the head has 3 outputs",
    ),
    "one episode": (lambda: evaluate(LEARNER, PHI, STREAM, 1), "at least 2 episodes"),
    "scores that are NaN": (lambda: interval(torch.tensor([1.0, float("nan")])), "1 of 2 are not"),
    "no sinusoids": (
        lambda: sinusoids(shots=0),
        "expected shots to be a whole number of at least 1",
    ),
    "tasks of several counts": (
        lambda: OBJECTIVE(
            PHI, Episode(STREAM(0).support, Batch(*(d[:1] for d in STREAM(0).query)))
        ),
        "one leading axis of tasks",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_by_our_own_code(kind):
    call, words = BAD[kind]
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "mtlib" in last and "site-packages" not in last


def test_an_unknown_scale_is_named(monkeypatch):
    monkeypatch.setenv("MTLIB_SCALE", "medium")
    with pytest.raises(ValueError, match="medium"):
        is_full()
