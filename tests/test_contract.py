"""Law 1: every learner against every law, one table. A new learner adds one row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, Learner, Loss, over
from mtlib.learners.amortised import attentive_cnp, cnp, gaussian_nll, in_context
from mtlib.learners.closed_form import alpaca, anil_at_once, bayesian, metaoptnet, r2d2, ridge
from mtlib.learners.context import cavia, protomaml
from mtlib.learners.finetune import (
    as_is,
    bss,
    delta,
    discriminative,
    finetune,
    fresh_head,
    gradual,
    l2_sp,
    linear_probe,
    lp_ft,
)
from mtlib.learners.gradient import adam, anil, boil, maml, minibatches, momentum
from mtlib.learners.lora import lora
from mtlib.learners.metric import (
    baseline_plus_plus,
    feat,
    matching,
    protonet,
    relation,
    simpleshot,
)
from mtlib.learners.preconditioned import meta_curvature, meta_sgd, per_step_rates
from mtlib.learners.transductive import bd_cspn, entropy_finetune, laplacian_shot
from mtlib.nets import conv4
from mtlib.norm import Norm

WAYS = 3


class Row(NamedTuple):
    make: Callable[[nn.Module], Learner]
    reached: str  # "body", "head" or "both": the entries of φ that an outer gradient reaches
    own: str = ""  # the prefix of entries of its own, which it reaches too
    head: bool = True  # its answers depend on which output of φ's head a class is given
    vmap: bool = True
    loss: Loss = cross_entropy  # with `columns` = 2 where its answers are means and scales
    transductive: bool = False  # its answer to one item depends on the others
    constant: frozenset[str] = frozenset()  # entries that stay as they are
    classes: dict[str, tuple[int, ...]] | None = None  # own entries with axes of classes, and which


def first(net: nn.Module) -> str:
    """The name of a network's first norm or linear layer."""
    return next(k for k, m in net.named_modules() if isinstance(m, Norm | nn.Linear))


ROWS = {
    "maml": Row(lambda net: maml(net, cross_entropy, 0.1, 2), "both"),
    "maml, proximal": Row(lambda net: maml(net, cross_entropy, 0.1, 2, strength=0.5), "both"),
    "anil": Row(lambda net: anil(net, cross_entropy, 0.1, 2), "both"),
    "maml, momentum": Row(lambda net: maml(net, cross_entropy, 0.1, 2, rule=momentum()), "both"),
    "maml, adam": Row(lambda net: maml(net, cross_entropy, 0.01, 2, rule=adam()), "both"),
    "boil": Row(lambda net: boil(net, cross_entropy, 0.1, 2), "both"),
    "meta_sgd": Row(
        lambda net: meta_sgd(net, cross_entropy, 0.1, 2),
        "both",
        own="lr",
        classes={"lr.head.weight": (0,), "lr.head.bias": (0,)},
    ),
    "per_step_rates": Row(lambda net: per_step_rates(net, cross_entropy, 0.1, 2), "both", own="lr"),
    "meta_curvature": Row(
        lambda net: meta_curvature(net, cross_entropy, 0.1, 2),
        "both",
        own="curvature",
        classes={"curvature.head.weight.0": (0, 1), "curvature.head.bias.0": (0, 1)},
    ),
    "cavia": Row(lambda net: cavia(net, cross_entropy, 1.0, 2), "both", own="context"),
    "cavia, inside": Row(
        lambda net: cavia(net, cross_entropy, 1.0, 2, layer=first(net)), "both", own="context"
    ),
    "minibatches": Row(lambda net: minibatches(maml(net, cross_entropy, 0.1, 2), 5), "both"),
    "protomaml": Row(lambda net: protomaml(net, cross_entropy, 0.05, 2), "body", head=False),
    "finetune": Row(lambda net: finetune(net, cross_entropy, 0.05, 4), "both"),
    "l2_sp": Row(lambda net: finetune(net, cross_entropy, 0.05, 4, l2_sp(0.5)), "both"),
    "delta": Row(lambda net: finetune(net, cross_entropy, 0.05, 4, delta(net, 0.5)), "both"),
    "bss": Row(lambda net: finetune(net, cross_entropy, 0.05, 2, bss(net, 0.01)), "both"),
    "discriminative": Row(
        lambda net: finetune(net, cross_entropy, discriminative(net, 0.1), 2), "both"
    ),
    "gradual": Row(lambda net: finetune(net, cross_entropy, gradual(net, 0.1, 1), 3), "both"),
    "fresh_head": Row(
        lambda net: fresh_head(finetune(net, cross_entropy, 0.1, 3), net), "body", head=False
    ),
    "lp_ft": Row(lambda net: lp_ft(net, cross_entropy, 0.05, 2), "body", head=False, vmap=False),
    "lora": Row(
        lambda net: lora(net, cross_entropy, 0.5, 3),
        "both",
        own="lora",
        constant=frozenset({"lora.scale"}),
    ),
    "as_is": Row(as_is, "both"),
    "protonet": Row(protonet, "body", head=False),
    "matching": Row(matching, "body", head=False),
    "relation": Row(relation, "body", own="relation", head=False),
    "baseline++": Row(lambda net: baseline_plus_plus(net, cross_entropy, 0.1, 2), "both"),
    "simpleshot": Row(simpleshot, "body", own="centre", head=False),
    "feat": Row(feat, "body", own="attention", head=False),
    "entropy_finetune": Row(
        lambda net: entropy_finetune(net, cross_entropy, 0.1, 2),
        "body",
        head=False,
        transductive=True,
    ),
    "bd_cspn": Row(bd_cspn, "body", head=False, transductive=True),
    "laplacian_shot": Row(laplacian_shot, "body", own="centre", head=False, transductive=True),
    "ridge": Row(ridge, "both", own="ridge"),
    "r2d2": Row(r2d2, "body", own="r2d2", head=False),
    "bayesian": Row(bayesian, "both", own="bayes", loss=gaussian_nll),
    "alpaca": Row(alpaca, "both", own="alpaca", loss=gaussian_nll),
    "anil_at_once": Row(lambda net: anil_at_once(net, 0.1, 3), "both"),
    "metaoptnet": Row(metaoptnet, "body", own="svm", head=False),
    "cnp": Row(cnp, "body", own="process", head=False, loss=gaussian_nll),
    "attentive_cnp": Row(attentive_cnp, "body", own="process", head=False, loss=gaussian_nll),
    "in_context": Row(
        lambda net: in_context(net, hidden=8, layers=2, heads=2),
        "body",
        own="process",
        head=False,
        loss=gaussian_nll,
    ),
    "in_context_classes": Row(
        lambda net: in_context(net, WAYS, hidden=8, layers=2, heads=2),
        "body",
        own="process",
        head=False,
        classes={
            "process.target.weight": (1,),
            "process.answer.weight": (0,),
            "process.answer.bias": (0,),
        },
    ),
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


def columns(row):
    """Columns of an answer for each class: 2 where it is a mean and a scale."""
    return getattr(row.loss, "columns", 1)


def test_predictions_have_one_row_an_item_and_one_column_a_class(row, learner, episode):
    support, query = one(episode)
    assert answer(learner, learner.init(), support, query.x).shape == (9, columns(row) * WAYS)


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
    """Where φ has axes of classes (its head's outputs, entries of the learner's own), they are renamed along."""
    g = torch.Generator().manual_seed(2)
    phi = {  # entries of its own, off their first values: equal rates would be renamed unseen
        k: v + 0.05 * torch.randn(v.shape, generator=g, dtype=v.dtype)
        if row.own and k.startswith(row.own)
        else v
        for k, v in learner.init().items()
    }
    classes = row.classes or {}
    assert set(classes) <= set(phi)
    support, query = one(episode)
    order = torch.tensor([2, 0, 1])

    def rename(k, v):
        for axis in classes.get(k, (0,) if k.startswith("head.") else ()):
            v = v.index_select(axis, order)
        return v

    renamed = {k: rename(k, v) for k, v in phi.items()}
    assert row.head == any(k.startswith("head.") for k in phi)
    every = torch.cat([order + i * WAYS for i in range(columns(row))])
    gap = answer(learner, phi, support, query.x)[:, every] - answer(
        learner, renamed, Batch(support.x, support.y[:, order]), query.x
    )
    assert gap.abs().max() <= 1e-7


def test_the_outer_gradient_reaches_exactly_the_expected_entries(row, learner, episode):
    phi = learner.init()
    grads = bilevel(learner, row.loss).value_and_grad(phi, episode)[1]
    halves = {k.split(".")[0] for k, g in grads.items() if g.abs().max() > 0}
    expected = {"body", "head"} if row.reached == "both" else {row.reached}
    assert halves == expected | ({row.own} if row.own else set())
    assert {k for k in phi if k not in grads} == row.constant


def test_a_learner_that_adapts_uses_the_support_labels(row, learner, episode):
    phi = learner.init()
    support, query = one(episode)
    other = Batch(support.x, support.y.roll(1, dims=1))
    gap = (
        (answer(learner, phi, support, query.x) - answer(learner, phi, other, query.x)).abs().max()
    )
    assert gap == 0 if row.make is as_is else gap > 1e-3


def test_only_a_transductive_learner_reads_the_other_query_items(row, episode):
    """On a network without batch statistics, which would make any learner transductive."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh())
    net = nn.Sequential(OrderedDict(body=body, head=nn.Linear(8, WAYS))).double()
    learner = row.make(net)
    support, query = one(episode)
    theta = learner.adapt(learner.init(), support)
    gap = (learner.predict(theta, query.x)[:1] - learner.predict(theta, query.x[:1])).abs().max()
    assert gap > 1e-4 if row.transductive else gap <= 1e-12


def test_what_each_adapts(episode):
    """ANIL leaves the body, BOIL the head; MAML moves both, as_is and CAVIA (its context alone) neither."""
    torch.manual_seed(0)
    net = conv4(WAYS, width=4, size=16).double()
    moved = {}
    for name in ("maml", "anil", "boil", "meta_sgd", "cavia", "finetune", "as_is"):
        learner = ROWS[name].make(net)
        phi = learner.init()
        theta = learner.adapt(phi, one(episode).support)
        moved[name] = {k.split(".")[0] for k in phi if not torch.equal(phi[k], theta[k])}
    both = {"body", "head"}
    none = set[str]()
    assert moved == {
        "maml": both,
        "anil": {"head"},
        "boil": {"body"},
        "meta_sgd": both,
        "cavia": none,
        "finetune": both,
        "as_is": none,
    }
