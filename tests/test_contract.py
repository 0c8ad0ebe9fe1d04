"""Law 1: every learner against every law, one table. A new learner adds one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, Learner, over
from mtlib.learners.closed_form import ridge
from mtlib.learners.finetune import as_is, finetune, linear_probe
from mtlib.learners.gradient import anil, maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4

WAYS = 3


class Row(NamedTuple):
    make: Callable[[nn.Module], Learner]
    reached: str  # "body", "head" or "both": the entries of φ that an outer gradient reaches
    own: str = ""  # the prefix of entries of its own, which it reaches too
    head: bool = True  # its answers depend on which output of φ's head a class is given
    vmap: bool = True


ROWS = {
    "maml": Row(lambda net: maml(net, cross_entropy, 0.1, 2), "both"),
    "maml, proximal": Row(lambda net: maml(net, cross_entropy, 0.1, 2, strength=0.5), "both"),
    "anil": Row(lambda net: anil(net, cross_entropy, 0.1, 2), "both"),
    "finetune": Row(lambda net: finetune(net, cross_entropy, 0.05, 4), "both"),
    "as_is": Row(as_is, "both"),
    "protonet": Row(protonet, "body", head=False),
    "ridge": Row(ridge, "both", own="ridge"),
    "linear_probe": Row(linear_probe, "body", head=False, vmap=False),
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture
def learner(row):
    torch.manual_seed(0)
    return row.make(conv4(WAYS, width=4, size=16).double())


@pytest.fixture
def episode():
    g = torch.Generator().manual_seed(1)
    y = torch.eye(WAYS, dtype=torch.float64).repeat(2, 1)

    def draw(rows):
        x = torch.rand(2, rows, 1, 16, 16, generator=g, dtype=torch.float64)
        return Batch(x, y[torch.arange(rows) % WAYS].expand(2, -1, -1))

    return Episode(draw(6), draw(9))


def one(episode, t=0):
    return over(lambda d: d[t], episode)


def answer(learner, phi, support, x):
    return learner.predict(learner.adapt(phi, support), x)


def test_predictions_have_one_row_an_item_and_one_column_a_class(learner, episode):
    support, query = one(episode)
    assert answer(learner, learner.init(), support, query.x).shape == (9, WAYS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(row, episode, dtype):
    learner = row.make(conv4(WAYS, width=4, size=16).to(dtype))
    support, query = over(lambda d: d[0].to(dtype), episode)
    theta = learner.adapt(learner.init(), support)
    assert {v.dtype for v in theta.values()} == {dtype}
    assert learner.predict(theta, query.x).dtype == dtype


def test_inputs_stay_unchanged(learner, episode):
    phi = learner.init()
    support, query = one(episode)
    kept = [v.clone() for v in (*phi.values(), *support, *query)]
    answer(learner, phi, support, query.x)
    for before, after in zip(kept, (*phi.values(), *support, *query), strict=True):
        assert torch.equal(before, after)
    assert not any(v.requires_grad for v in phi.values())


def test_init_gives_fresh_parameters_each_time(learner):
    a, b = learner.init(), learner.init()
    next(iter(a.values())).add_(1.0)
    assert not torch.equal(*(next(iter(p.values())) for p in (a, b)))


def test_vmap_over_tasks_equals_the_loop(row, learner, episode):
    if not row.vmap:
        assert not learner.vmap
        pytest.skip("runs in a loop only, and says so: Learner.vmap is False")
    phi = learner.init()
    many = torch.vmap(lambda e: answer(learner, phi, e.support, e.query.x))(episode)
    for t in range(2):
        support, query = one(episode, t)
        assert (many[t] - answer(learner, phi, support, query.x)).abs().max() <= 1e-10


def test_the_order_of_the_support_set_does_not_matter(learner, episode):
    phi = learner.init()
    support, query = one(episode)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    turned = Batch(support.x[order], support.y[order])
    gap = answer(learner, phi, support, query.x) - answer(learner, phi, turned, query.x)
    assert gap.abs().max() <= 1e-8


def test_renaming_the_classes_renames_the_answers(row, learner, episode):
    """Where φ's head has an output for each class, its outputs are renamed along."""
    phi = learner.init()
    support, query = one(episode)
    order = torch.tensor([2, 0, 1])
    renamed = {k: v[order] if k.startswith("head.") else v for k, v in phi.items()}
    assert row.head == any(k.startswith("head.") for k in phi)
    gap = answer(learner, phi, support, query.x)[:, order] - answer(
        learner, renamed, Batch(support.x, support.y[:, order]), query.x
    )
    assert gap.abs().max() <= 1e-7


def test_the_outer_gradient_reaches_exactly_the_expected_entries(row, learner, episode):
    phi = learner.init()
    grads = bilevel(learner, cross_entropy).value_and_grad(phi, episode)[1]
    halves = {k.split(".")[0] for k, g in grads.items() if g.abs().max() > 0}
    expected = {"body", "head"} if row.reached == "both" else {row.reached}
    assert halves == expected | ({row.own} if row.own else set())
    assert {k for k in phi if k not in grads} == set()


def test_a_learner_that_adapts_uses_the_support_labels(row, learner, episode):
    phi = learner.init()
    support, query = one(episode)
    other = Batch(support.x, support.y.roll(1, dims=1))
    gap = (
        (answer(learner, phi, support, query.x) - answer(learner, phi, other, query.x)).abs().max()
    )
    assert gap == 0 if row.make is as_is else gap > 1e-3


def test_what_each_adapts(episode):
    """ANIL leaves the body, MAML moves both, as_is neither."""
    torch.manual_seed(0)
    net = conv4(WAYS, width=4, size=16).double()
    moved = {}
    for name in ("maml", "anil", "finetune", "as_is"):
        learner = ROWS[name].make(net)
        phi = learner.init()
        theta = learner.adapt(phi, one(episode).support)
        moved[name] = {k.split(".")[0] for k in phi if not torch.equal(phi[k], theta[k])}
    both = {"body", "head"}
    assert moved == {"maml": both, "anil": {"head"}, "finetune": both, "as_is": set()}
