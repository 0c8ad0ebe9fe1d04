"""Metric learners and the transductive ones, against formulas written out, scikit-learn and each other."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from problems import moved, seeded
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid, NearestNeighbors
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from mtlib.bilevel import bilevel, unrolled
from mtlib.core import Batch, Episode, features, parameters
from mtlib.joint import joint
from mtlib.learners.metric import (
    attend,
    baseline_plus_plus,
    centred,
    class_means,
    contrastive,
    cosine_head,
    feat,
    matching,
    protonet,
    relation,
    simpleshot,
    unit,
)
from mtlib.learners.transductive import bd_cspn, entropy, entropy_finetune, laplacian_shot, nearest
from mtlib.nets import mlp
from mtlib.tasks import one_hot

WAYS, SHOTS = 3, 4


@pytest.fixture
def net():
    return seeded(lambda: mlp(5, (8,), WAYS))


def draw(shots, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS).repeat_interleave(shots)
    x = torch.randn(len(labels), 5, generator=g, dtype=torch.float64) + labels[:, None]
    return Batch(x, one_hot(labels, WAYS, torch.float64))


SUPPORT, QUERY = draw(SHOTS, 1), draw(6, 2)


def answer(learner, phi=None, support=SUPPORT, x=QUERY.x):
    return learner.predict(learner.adapt(phi or learner.init(), support), x)


# Metric --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_matching_with_one_shot_is_a_softmax_over_cosines(net, scale):
    one, z = draw(1, 3), features(net)
    phi = matching(net).init()
    cosine = cosine_similarity(z(phi, QUERY.x).numpy(), z(phi, one.x).numpy())
    expected = torch.from_numpy(scale * cosine).softmax(1)
    ours = answer(matching(net, scale), support=one).exp()
    assert (ours - expected).abs().max() <= 1e-10


def test_matching_with_more_shots_adds_up_the_votes(net):
    z, phi = features(net), matching(net).init()
    cosine = cosine_similarity(z(phi, QUERY.x).numpy(), z(phi, SUPPORT.x).numpy())
    vote = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
    expected = np.stack([vote[:, SHOTS * k : SHOTS * (k + 1)].sum(1) for k in range(WAYS)], 1)
    assert np.abs(answer(matching(net)).exp().numpy() - expected).max() <= 1e-10
    assert np.abs(expected.sum(1) - 1).max() <= 1e-12


def test_relation_is_its_network_on_each_pair(net):
    learner = relation(net, hidden=7)
    phi, z = learner.init(), features(net)
    c, zq = class_means(z(phi, SUPPORT.x), SUPPORT.y), z(phi, QUERY.x)
    logits = answer(learner)
    for b in range(3):
        for k in range(WAYS):
            hidden = phi["relation.0.weight"] @ torch.cat([c[k], zq[b]]) + phi["relation.0.bias"]
            score = phi["relation.2.weight"] @ hidden.relu() + phi["relation.2.bias"]
            assert abs(logits[b, k] - score[0]) <= 1e-12


def test_the_papers_loss_for_the_relation_network_fits():
    torch.manual_seed(0)
    learner = relation(mlp(5, (8,), WAYS).double())
    episode = Episode(Batch(SUPPORT.x[None], SUPPORT.y[None]), Batch(QUERY.x[None], QUERY.y[None]))
    value, grads = bilevel(learner, lambda p, y: mse_loss(p.sigmoid(), y)).value_and_grad(
        learner.init(), episode
    )
    assert 0 < value < 1 and all(g.abs().max() > 0 for g in grads.values())


def test_baseline_plus_plus_is_a_scaled_cosine_and_moves_its_head_alone(net):
    learner = baseline_plus_plus(net, cross_entropy, 0.1, 3, scale=5.0)
    phi = learner.init()
    z = features(net)(phi, QUERY.x)
    expected = 5 * cosine_similarity(z.numpy(), phi["head.weight"].numpy())
    assert np.abs(learner.predict(phi, QUERY.x).numpy() - expected).max() <= 1e-9
    theta = learner.adapt(phi, SUPPORT)
    moved = {k for k in phi if not torch.equal(phi[k], theta[k])}
    assert moved == {"head.weight", "head.log_scale"}
    before, after = (cross_entropy(learner.predict(p, SUPPORT.x), SUPPORT.y) for p in (phi, theta))
    assert after < before
    # the length of a class's weight is of no consequence
    longer = {**theta, "head.weight": theta["head.weight"] * torch.tensor([[1.0], [3], [0.2]])}
    gap = learner.predict(theta, QUERY.x) - learner.predict(longer, QUERY.x)
    assert gap.abs().max() <= 1e-9


def test_the_cosine_head_is_trained_jointly_with_the_same_names(net):
    cosine = cosine_head(net)
    grads = joint(cosine, cross_entropy).value_and_grad(
        parameters(cosine), Batch(QUERY.x[None], QUERY.y[None])
    )[1]
    assert set(grads) == set(baseline_plus_plus(net, cross_entropy, 0.1, 1).init())


class Prepare(nn.Module):
    """z -> (z − μ)/‖z − μ‖, as a layer."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, z):
        return unit(z - self.mean)


def test_simpleshot_is_protonet_on_centred_features_of_length_one(net):
    """So with neither, it is ProtoNet."""
    learner = simpleshot(net)
    train = draw(30, 5).x
    phi = centred(net, learner.init(), train)
    mean = features(net)(phi, train).mean(0)
    assert torch.equal(phi["centre.mean"], mean) and mean.abs().max() > 0.1
    body = nn.Sequential(OrderedDict({"0": net.body[0], "1": net.body[1], "2": Prepare(mean)}))
    other = protonet(nn.Sequential(OrderedDict(body=body, head=net.head)))
    assert (answer(learner, phi) - answer(other)).abs().max() <= 1e-12
    assert (answer(learner) - answer(protonet(net))).abs().max() > 1e-3
    u = unit(features(net)(phi, torch.cat([SUPPORT.x, QUERY.x])) - mean).numpy()
    n, labels = len(SUPPORT.x), SUPPORT.y.argmax(1).numpy()
    expected = NearestCentroid().fit(u[:n], labels).predict(u[n:])
    assert (answer(learner, phi).argmax(1).numpy() == expected).all()


def test_feat_with_no_output_of_its_attention_is_protonet(net):
    learner = feat(net)
    phi = moved(learner.init(), 1.0, prefix="attention.")
    plain = answer(protonet(net))
    assert torch.equal(answer(learner), plain)  # as it starts
    silent = {**phi, "attention.output.weight": torch.zeros(8, 8).double()}
    assert torch.equal(answer(learner, silent), plain)
    assert (answer(learner, phi) - plain).abs().max() > 0.1


def within_classes(phi, z, labels):
    """z' of each item, one class after the other: z + softmax(z A_q (Z A_k)ᵀ / √D) Z A_v A_o over the items of its class."""
    q, k, v, o = (phi[f"attention.{n}.weight"].numpy() for n in ("query", "key", "value", "output"))
    moved = np.empty_like(z)
    for i, own in enumerate(labels):
        same = z[labels == own]
        score = np.array([(q @ z[i]) @ (k @ other) for other in same]) / np.sqrt(z.shape[1])
        share = np.exp(score) / np.exp(score).sum()
        moved[i] = z[i] + o @ sum(a * (v @ other) for a, other in zip(share, same, strict=True))
    return moved


def test_the_contrastive_term_is_the_papers_formula(net):
    """All support and query items, each class attending within itself, and compared with its mean afterwards."""
    learner, uneven = feat(net), Batch(QUERY.x[1:], QUERY.y[1:])
    phi = moved(learner.init(), 0.5, prefix="attention.")
    both = [torch.cat([SUPPORT[j], uneven[j]]) for j in range(2)]
    z, labels = features(net)(phi, both[0]).numpy(), both[1].argmax(1).numpy()
    after = within_classes(phi, z, labels)
    centres = np.stack([after[labels == k].mean(0) for k in range(WAYS)])
    logits = [[-0.3 * ((a - c) ** 2).sum() for c in centres] for a in after]
    terms = [
        np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)
    ]
    plain, whole = (
        contrastive(net, strength, 0.3)(learner, cross_entropy)(phi, Episode(SUPPORT, uneven))
        for strength in (0.0, 2.0)
    )
    assert (
        plain == unrolled(learner, cross_entropy)(phi, Episode(SUPPORT, uneven))
        and abs(whole - plain - 2.0 * np.mean(terms)) <= 1e-10
    )


def test_the_contrastive_term_trains_the_attention_as_it_says(net):
    """Its slope along a direction is that of finite differences, also through `bilevel`, for several tasks at once."""
    learner = feat(net)
    phi = moved(learner.init(), 0.5, prefix="attention.")
    episode = Episode(
        *(Batch(b.x.expand(2, -1, -1), b.y.expand(2, -1, -1)) for b in (SUPPORT, QUERY))
    )
    objective = bilevel(learner, cross_entropy, contrastive(net, 3.0, 0.1))
    value, grads = objective.value_and_grad(phi, episode)
    g = torch.Generator().manual_seed(0)
    way = {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in phi.items()}
    ends = [objective({k: phi[k] + e * way[k] for k in phi}, episode).item() for e in (1e-6, -1e-6)]
    slope = sum((grads[k] * way[k]).sum() for k in phi).item()
    assert abs((ends[0] - ends[1]) / 2e-6 - slope) <= 1e-6 * abs(slope)
    assert all(g.abs().max() > 0 for g in grads.values()) and torch.isfinite(value)


def test_an_item_without_label_has_no_contrastive_term(net):
    learner, strong = feat(net), contrastive(net, 1.0)
    phi = moved(learner.init(), 0.5, prefix="attention.")
    y = torch.cat([QUERY.y, torch.zeros(1, WAYS).double()])
    more = Batch(torch.cat([QUERY.x, QUERY.x[:1] + 9]), y)
    values = [strong(learner, cross_entropy)(phi, Episode(SUPPORT, q)) for q in (QUERY, more)]
    queries = [unrolled(learner, cross_entropy)(phi, Episode(SUPPORT, q)) for q in (QUERY, more)]
    terms = [
        (v - u) * (len(SUPPORT.x) + len(q.x))
        for v, u, q in zip(values, queries, (QUERY, more), strict=True)
    ]
    assert abs(terms[0] - terms[1]) <= 1e-10


def test_our_attention_has_torchs_values():
    q, k, v = (
        torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).double() for n in (4, 5, 5)
    )
    torchs = scaled_dot_product_attention(*(t[None] for t in (q, k, v)))[0]
    assert (attend(q, k, v) - torchs).abs().max() <= 1e-12


def test_a_length_has_derivatives_at_zero():
    """Where a ReLU network sends an item to 0, ‖z‖ has none."""
    zero = torch.zeros(1, 3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: unit(z).sum())
    assert bool(torch.isfinite(torch.func.jacrev(jacobian)(zero)).all())
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert (unit(z) - z / 5).abs().max() <= 1e-13


@pytest.mark.parametrize("make", [relation, simpleshot, feat, cosine_head])
def test_a_head_that_hides_the_width_is_refused(make):
    net = nn.Sequential(OrderedDict(body=nn.Linear(5, 4), head=nn.Sequential(nn.Linear(4, 3))))
    with pytest.raises(ValueError, match="expected a head of one linear layer"):
        make(net)


# Transductive --------------------------------------------------------------------------------


def test_entropy_is_that_of_the_class_probabilities():
    logits = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]], dtype=torch.float64)
    assert entropy(logits).tolist() == pytest.approx([np.log(3), 0], abs=1e-12)


def test_entropy_fine_tuning_starts_at_class_means_and_grows_sure(net):
    z = features(net)
    phi = entropy_finetune(net, cross_entropy, 0.1, 0).init()
    w = unit(class_means(unit(z(phi, SUPPORT.x)), SUPPORT.y))
    start = answer(entropy_finetune(net, cross_entropy, 0.1, 0))
    assert (start - z(phi, QUERY.x) @ w.T).abs().max() <= 1e-12
    end = answer(entropy_finetune(net, cross_entropy, 0.1, 20))
    assert entropy(end).mean() < 0.7 * entropy(start).mean()
    # one step, written out: every parameter moves along −∇(fit + entropy)
    learner = entropy_finetune(net, cross_entropy, 0.1, 1)
    names = ("body.0.weight", "body.0.bias", "head.weight", "head.bias")
    leaves = [learner.adapt(phi, SUPPORT)[k].detach().requires_grad_() for k in names]

    def f(p, x):
        return (x @ p[0].T + p[1]).relu() @ p[2].T + p[3]

    value = cross_entropy(f(leaves, SUPPORT.x), SUPPORT.y) + entropy(f(leaves, QUERY.x)).mean()
    moved = [p - 0.1 * g for p, g in zip(leaves, torch.autograd.grad(value, leaves), strict=True)]
    assert (answer(learner) - f(moved, QUERY.x)).abs().max() <= 1e-12


def scaled(z, mean):
    """Centred and of length 1, by numpy."""
    return (z - mean) / np.linalg.norm(z - mean, axis=1, keepdims=True)


@pytest.mark.parametrize("shift", [True, False])
def test_bd_cspn_is_its_formula(net, shift):
    z, phi = features(net), bd_cspn(net).init()
    zs, zq = (z(phi, b.x).numpy() for b in (SUPPORT, QUERY))
    labels = SUPPORT.y.argmax(1).numpy()
    c = np.stack([zs[labels == k].mean(0) for k in range(WAYS)])
    zq = zq + (zs.mean(0) - zq.mean(0)) if shift else zq
    guess = cosine_similarity(zq, c).argmax(1)
    rectified = []
    for k in range(WAYS):
        items = np.concatenate([zs[labels == k], zq[guess == k]])
        w = np.exp(10 * cosine_similarity(items, c[k : k + 1])[:, 0])
        rectified.append((w / w.sum()) @ items)
    expected = 10 * cosine_similarity(zq, np.stack(rectified))
    assert np.abs(answer(bd_cspn(net, shift=shift)).numpy() - expected).max() <= 1e-8


def test_bd_cspn_does_not_see_a_shift_of_all_query_features():
    """What the shift is for: a domain whose features are all displaced."""
    net = nn.Sequential(OrderedDict(body=nn.Identity(), head=nn.Linear(5, WAYS))).double()
    learner = bd_cspn(net)
    phi = parameters(net)
    theta = learner.adapt(phi, SUPPORT)
    gap = learner.predict(theta, QUERY.x + 7) - learner.predict(theta, QUERY.x)
    assert gap.abs().max() <= 1e-9


def test_the_nearest_items_are_scikit_learns():
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    index = NearestNeighbors(n_neighbors=3).fit(z.numpy()).kneighbors(return_distance=False)
    w = nearest(z, 3)
    assert (w.sum(1) == 3).all() and (w.diagonal() == 0).all()
    assert all(w[q, index[q]].tolist() == [1, 1, 1] for q in range(9))
    assert (nearest(z, 20).sum(1) == 8).all() and nearest(z[:1], 3).tolist() == [[0.0]]


PLAIN = {"normalise": False, "rectify": False, "shift": False}


def test_laplacian_shot_without_its_parts_is_protonet_or_simpleshot(net):
    assert torch.equal(answer(laplacian_shot(net, 0.0, **PLAIN)), answer(protonet(net)))
    learner = laplacian_shot(net, 0.0, rectify=False, shift=False)
    phi = centred(net, learner.init(), SUPPORT.x)
    assert torch.equal(answer(learner, phi), answer(simpleshot(net), phi))


def test_laplacian_shot_ends_at_its_fixed_point(net):
    plain = answer(protonet(net))
    logit = answer(laplacian_shot(net, strength=0.5, steps=200, **PLAIN))
    w = nearest(features(net)(protonet(net).init(), QUERY.x), 3)
    assert (logit - (plain + 0.5 * w @ logit.softmax(1))).abs().max() <= 1e-10
    apart, drawn = ((w * (p @ p.T)).sum() for p in (plain.softmax(1), logit.softmax(1)))
    assert drawn > apart  # neighbours agree more


@pytest.mark.parametrize("rounds", [0, 1, 20])
@pytest.mark.parametrize("shift", [True, False])
def test_laplacian_shot_is_its_authors_steps(net, shift, rounds):
    """Item by item, by numpy and scikit-learn."""
    learner = laplacian_shot(net, 0.7, 2, rounds, shift=shift)
    phi = centred(net, learner.init(), QUERY.x[:5])
    z, mean = features(net), phi["centre.mean"].numpy()
    us, uq = (scaled(z(phi, b.x).numpy(), mean) for b in (SUPPORT, QUERY))
    if shift:
        uq = uq + us.mean(0) - uq.mean(0)
    labels = SUPPORT.y.argmax(1).numpy()
    c = np.stack([us[labels == k].mean(0) for k in range(WAYS)])
    every = np.concatenate([us, uq])
    cosine = cosine_similarity(every, c)
    of = np.concatenate([labels, cosine[len(us) :].argmax(1)])
    p = np.exp(10 * cosine) / np.exp(10 * cosine).sum(1, keepdims=True)
    m = np.stack(
        [np.mean([p[i, k] * every[i] for i in np.flatnonzero(of == k)], 0) for k in range(WAYS)]
    )
    a = np.array([[np.sum((q - k) ** 2) for k in m] for q in uq])
    near = NearestNeighbors(n_neighbors=2).fit(uq).kneighbors(return_distance=False)
    logit = -a
    for _ in range(rounds):
        y = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
        logit = np.stack([-a[q] + 0.7 * y[near[q]].sum(0) for q in range(len(uq))])
    assert np.abs(answer(learner, phi).numpy() - logit).max() <= 1e-8


def test_a_round_of_laplacian_shot_does_not_raise_its_objective(net):
    """The exercise: for symmetric positive semi-definite w."""
    g = torch.Generator().manual_seed(0)
    root = torch.rand(6, 6, generator=g).double()
    w, a = root @ root.T, torch.rand(6, 3, generator=g).double()

    def objective(y):
        return (y * a).sum() - 0.35 * (w * (y @ y.T)).sum() + (y * y.log()).sum()

    y = (-a).softmax(1)
    values = [objective(y)]
    for _ in range(30):
        y = (-a + 0.7 * w @ y).softmax(1)
        values.append(objective(y))
    steps = torch.stack(values).diff()
    assert steps.max() <= 1e-12 and steps[0] < -1e-3


def test_what_a_single_query_is_told(net):
    """The exercise: with the shift the answer is the support set's mean's, whatever is asked; without, its own."""
    for make in (bd_cspn, laplacian_shot):
        learner = make(net)
        theta = learner.adapt(learner.init(), SUPPORT)
        said = torch.cat([learner.predict(theta, x[None]) for x in QUERY.x])
        assert (said - said[:1]).abs().max() <= 1e-10
        learner = make(net, shift=False)
        said = torch.cat([learner.predict(theta, x[None]) for x in QUERY.x])
        assert len(set(said.argmax(1).tolist())) == WAYS
