"""A score is a score: classes without support, intervals that cover, draws that do not come twice, steps that go down."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from problems import normal, seeded
from test_contract import ROWS, WAYS
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, over, take
from mtlib.evaluate import evaluate
from mtlib.learners.context import protomaml
from mtlib.learners.metric import (
    class_means,
    feat,
    lowest,
    matching,
    protonet,
    relation,
    simpleshot,
)
from mtlib.learners.transductive import bd_cspn, entropy_finetune, laplacian_shot
from mtlib.objective import over_tasks
from mtlib.tasks import one_hot

# A class with no support item ----------------------------------------------------------------

FROM_SUPPORT = {  # learners that know a class from its support items alone
    "protonet": protonet,
    "matching": matching,
    "relation": relation,
    "simpleshot": simpleshot,
    "feat": feat,
    "protomaml": lambda net: protomaml(net, cross_entropy, 0.05, 3),
    "entropy_finetune": lambda net: entropy_finetune(net, cross_entropy, 0.1, 2),
    "bd_cspn": bd_cspn,
    "laplacian_shot": laplacian_shot,
}
LABELS, ABSENT, KEPT = torch.tensor([0, 2, 3, 0, 2, 2, 3]), 1, [0, 2, 3]
SUPPORT_X, QUERY_X = normal(7, 5), normal(8, 5, seed=1)


def network(ways=4):
    body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(6, ways)))


def uneven(tasks=1, ways=4) -> Episode:
    """Episodes whose class 1 of four has query items and no support item."""
    support = Batch(SUPPORT_X, one_hot(LABELS, ways, torch.float64))
    query = Batch(QUERY_X, one_hot(torch.arange(8) % ways, ways, torch.float64))
    scales = torch.linspace(1, 2, tasks, dtype=torch.float64)[:, None, None]
    return Episode(*(Batch(scales * b.x, b.y.expand(tasks, -1, -1)) for b in (support, query)))


def off_its_start(phi):
    return {k: v + 0.1 * normal(*v.shape, seed=i) for i, (k, v) in enumerate(phi.items())}


@pytest.fixture(params=FROM_SUPPORT)
def made(request):
    """A learner with four outputs, one with three, and φ for both."""
    make = FROM_SUPPORT[request.param]
    wide, narrow = (make(seeded(lambda w=w: network(w))) for w in (4, 3))
    return wide, narrow, off_its_start(wide.init())


def test_a_class_without_support_is_never_predicted_and_changes_nothing_else(made):
    wide, narrow, phi = made
    support, query = take(uneven(), 0)
    said = wide.predict(wide.adapt(phi, support), query.x)
    alone = narrow.predict(narrow.adapt(phi, Batch(support.x, support.y[:, KEPT])), query.x)
    assert (said[:, KEPT] - alone).abs().max() <= 1e-12
    assert (said[:, ABSENT] == lowest(torch.float64)).all()
    assert (said.softmax(1)[:, ABSENT] == 0).all()


def test_a_task_with_a_class_without_support_trains(made):
    wide, narrow, phi = made
    episode = uneven(tasks=3)
    asked = episode.query.y[0].argmax(1) != ABSENT  # and the same without the class
    known = Episode(episode.support, over(lambda d: d[:, asked], episode.query))
    less = Episode(*(Batch(b.x, b.y[..., KEPT]) for b in known))
    value, grads = bilevel(wide, cross_entropy).value_and_grad(phi, episode)
    assert value.isfinite() and all(g.isfinite().all() for g in grads.values())
    if "transductive" not in wide.predict.__module__:
        some = bilevel(wide, cross_entropy).value_and_grad(phi, known)
        other = bilevel(narrow, cross_entropy).value_and_grad(phi, less)
        assert abs(some[0] - other[0]) <= 1e-12
        assert all((some[1][k] - g).abs().max() <= 1e-10 for k, g in other[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_loss_and_gradient_are_finite_in_every_precision(made, dtype):
    wide, _, phi = made
    cast = {k: v.to(dtype) for k, v in phi.items()}
    episode = over(lambda d: d.to(dtype), uneven(tasks=3))
    for chunk in (1, 3):
        value, grads = bilevel(wide, cross_entropy, chunk=chunk).value_and_grad(cast, episode)
        assert value.isfinite() and value.dtype == dtype
        assert all(g.isfinite().all() for g in grads.values())


def test_evaluate_counts_its_query_items_as_wrong(made):
    wide, _, phi = made
    episode = uneven(tasks=3)
    scores = [evaluate(wide, phi, lambda step: episode, 3, chunk=c).values for c in (1, 3)]
    assert torch.equal(*scores)
    for t, value in enumerate(scores[0]):
        support, query = take(episode, t)
        said = wide.predict(wide.adapt(phi, support), query.x).argmax(1)
        assert ABSENT not in said
        assert value == (said == query.y.argmax(1)).double().mean()


def test_a_support_set_without_labels_is_no_score(made):
    wide, _, phi = made
    support, query = uneven(tasks=3)
    empty = Episode(Batch(support.x, 0 * support.y), query)
    with pytest.raises(ValueError, match="have no labels"):
        evaluate(wide, phi, lambda step: empty, 3)


@pytest.mark.parametrize("name", ROWS)
def test_every_learner_answers_where_a_class_has_no_support(name):
    row = ROWS[name]
    learner = row.make(seeded(lambda: network(WAYS)))
    support = Batch(SUPPORT_X[:4], one_hot(torch.tensor([0, 2, 0, 2]), WAYS, torch.float64))
    query = Batch(QUERY_X, one_hot(torch.arange(8) % WAYS, WAYS, torch.float64))
    data = over(lambda d: d[None], Episode(support, query))
    value, grads = bilevel(learner, row.loss).value_and_grad(learner.init(), data)
    assert value.isfinite() and all(g.isfinite().all() for g in grads.values())


def test_an_item_without_label_counts_for_no_class_and_soft_labels_are_weights():
    z = normal(5, 3).requires_grad_()
    y = torch.tensor([[1, 0, 0], [0.25, 0, 0.75], [0, 0, 0], [0, 0, 1], [1, 0, 0.0]]).double()
    c = class_means(z, y)
    by_hand = [(w[:, None] * z).sum(0) / w.sum() for w in y.T[[0, 2]]]
    assert (c[[0, 2]] - torch.stack(by_hand)).abs().max() <= 1e-15 and c[1].isnan().all()
    (slope,) = torch.autograd.grad(c[[0, 2]].sum(), z)
    assert slope.isfinite().all() and (slope[2] == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_a_compiled_task_may_lack_a_class():
    learner, data = protonet(seeded(network)), uneven(tasks=3)

    def task(phi, episode):
        theta = learner.adapt(phi, episode.support)
        return cross_entropy(learner.predict(theta, episode.query.x), episode.query.y)

    phi = learner.init()
    plain, fast = over_tasks(task), over_tasks(task, compile=True)
    fast.value_and_grad(phi, data)
    value, grads = fast.value_and_grad(phi, data)
    expected, slopes = plain.value_and_grad(phi, data)
    assert abs(value / expected - 1) <= 1e-12
    assert all((grads[k] - g).abs().max() <= 1e-10 for k, g in slopes.items())
