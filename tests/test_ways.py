"""Contenders of contests: practice and pre-training of a bench, and what is stored for the tests."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.book import ways
from mtlib.book.ways import Bench, crossed, on_curves, practising, probed, study, studying
from mtlib.core import Learner, features, parameters, start, take
from mtlib.data.glyphs import glyphs
from mtlib.data.sinusoids import noisy_sinusoids
from mtlib.learners.finetune import as_is, finetune, lp_ft
from mtlib.learners.lora import lora
from mtlib.learners.metric import contrastive, feat, protonet, relation, simpleshot
from mtlib.nets import conv4, mlp, seeded, two_halves
from mtlib.norm import calibrate
from mtlib.tasks import episodes
from mtlib.train import cosine_adam, fit


@pytest.fixture(scope="module")
def bench():
    def network(outputs, statistics="batch", seed=None):
        return conv4(outputs, 1, 4, 16, statistics, seed)

    return Bench(glyphs(30, size=16), network, practise=4, study=6)


def means(net):
    return protonet(net), cross_entropy


def test_practice_is_the_bilevel_objective_on_episodes(bench):
    learner, phi = practising(bench, means, [(1e-2,)]).train((1e-2,), 3, 2)
    net = conv4(5, 1, 4, 16, seed=3)
    stream = episodes(bench.data, 20, 1, 5, tasks=1, seed=3)
    plain = protonet(net)
    ours = fit(bilevel(plain, cross_entropy), plain.init(), stream, 2, **cosine_adam(1e-2, 2))
    some = [bench.data.items[:, k] for k in (0, 7, 14)]
    expected = calibrate(learner.net, start(learner, ours.params).params, some)
    assert phi.keys() == expected.keys()
    assert all(torch.equal(phi[k], expected[k]) for k in phi if not k.startswith("head."))


def test_pre_training_runs_once_and_whole_whatever_the_share(bench):
    way = studying(bench, protonet, [(1e-2, 64), (1e-2, 32)])
    assert not way.ordered and way.kind == "transfer"
    (_, a), (_, b) = (way.train((1e-2, 64), 0, share) for share in (1, 3))
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("head."))  # which is unused
    held = study.cache_info().hits
    assert study(bench, "linear", 1e-2, 64, 0) is study(bench, "linear", 1e-2, 64, 0)
    assert study.cache_info().hits == held + 2
    assert set(study(bench, "cosine", 1e-2, 64, 0)) > {"head.log_scale"}


def test_a_centre_is_stored_where_it_is_asked_for(bench):
    at = [
        studying(bench, simpleshot, [(1e-2, 64)], centre=c).train((1e-2, 64), 0, 1)[1]
        for c in (False, True)
    ]
    assert at[0]["centre.mean"].abs().max() == 0 < at[1]["centre.mean"].abs().max()


def test_practice_after_pre_training_begins_there(bench):
    """With a rate of almost nothing it stays where pre-training ended."""
    way = practising(bench, means, [(1e-12,)], first=(1e-2, 64))
    phi, before = way.train((1e-12,), 0, 1)[1], study(bench, "linear", 1e-2, 64, 0)
    bodies = [k for k in before if k.startswith("body.")]
    assert bodies and all(torch.allclose(phi[k], before[k], atol=1e-9) for k in bodies)


def test_a_members_own_weights_follow_the_seed_and_its_term_is_used(bench):
    def full(net, strength):
        return feat(net), cross_entropy, contrastive(net, strength, 0.1)

    grid = [(1e-2, 0.0), (1e-2, 1.0)]
    with_term, without = (practising(bench, full, grid).train(s, 0, 1)[1] for s in reversed(grid))
    again = practising(bench, full, grid).train(grid[0], 0, 1)[1]
    used = [k for k in without if not k.startswith("head.")]
    assert all(torch.equal(without[k], again[k]) for k in used)
    assert any(not torch.equal(without[k], with_term[k]) for k in used)
    assert practising(bench, means, [(1e-2,)]).ordered and not practising(bench, full, grid).ordered


def test_a_network_without_norms_needs_no_statistics():
    from mtlib.data.planted import planted
    from mtlib.nets import mlp

    data = planted(24, 20)
    flat = Bench(data, lambda n, statistics="batch", seed=None: mlp(30, (8,), n, seed), 2, 2)
    phi = practising(flat, lambda net: (relation(net), cross_entropy), [(1e-2,)]).train(
        (1e-2,), 0, 1
    )
    with seeded(0):
        own = parameters(mlp(30, (8,), 5))
    assert set(phi[1]) > {"relation.0.weight"} and set(own) >= {k for k in phi[1] if "body" in k}


def test_a_setting_is_tried_at_a_share_of_the_length_or_at_the_whole_of_it(bench):
    """A third of the steps is another run; with `whole` it is the whole run, to the last bit."""
    short, whole = (practising(bench, means, [(1e-2,)], whole=w) for w in (False, True))
    runs = [way.train((1e-2,), 0, share)[1] for way in (short, whole) for share in (3, 1)]
    third, full, tried, again = (run["body.1.0.weight"] for run in runs)
    assert torch.equal(full, again) and torch.equal(full, tried)
    assert not torch.equal(full, third)


def test_a_cross_changes_one_thing_at_a_time():
    assert crossed([(1, 2), (3, 2)], [(5,), (6,)]) == [(1, 2, 5), (3, 2, 5), (1, 2, 6)]
    assert crossed([(1,)], [()]) == [(1,)]


def spied(monkeypatch, by, curves, setting=(1e-2, 0.1, 0.3), points=2400, share=1):
    """What `on_curves` trains on: objective, φ at the start, a draw, and the steps."""
    found = []

    def spy(objective, phi, draws, steps, **how):
        found.append((objective, phi, draws(0), steps))
        return fit(objective, phi, draws, 1, progress=False)

    monkeypatch.setattr(ways, "fit", spy)
    ways._trained_on_curves.cache_clear()
    on_curves(by, [setting], curves, points, 6).train(setting, 0, share)
    ways._trained_on_curves.cache_clear()
    return found


@pytest.mark.parametrize("by", ["joint", "own heads", "MAML", "ridge head"])
@pytest.mark.parametrize("curves", [24, 300, 400])
def test_every_way_sees_as_many_points_of_the_same_curves(monkeypatch, by, curves):
    rest = {"joint": (0.01, 1), "own heads": (0.3,), "MAML": (0.01, 0.01, 1), "ridge head": (1.0,)}
    ((_objective, _phi, draw, steps),) = spied(monkeypatch, by, curves, (1e-2, 0.1, *rest[by]))
    parts = draw if hasattr(draw, "support") else (draw,)
    assert abs(sum(p.x.shape[0] * p.x.shape[1] for p in parts) - 375) <= 10
    assert steps == (12 if by in ("joint", "own heads") else 6)
    data = noisy_sinusoids(2400 // curves, 1, curves, 10)(0).support
    known = {round(v, 5) for v in data.y.flatten().tolist()}
    seen = {round(v, 5) for p in parts for v in p.y[p.y != 0].flatten().tolist()}
    assert seen <= known
    assert parts[0].x.shape[1] == 5 or by in ("joint", "own heads")


def test_own_heads_learn_their_own_curve_alone(monkeypatch):
    """The loss of many outputs is the squared error of the one that a row belongs to."""
    ((objective, phi, draw, _),) = spied(monkeypatch, "own heads", 24)
    x, y = draw.x[0], draw.y[0]
    assert ((y != 0).sum(1) == 1).all()
    prediction = as_is(mlp(1, (40, 40), 24)).predict(phi, x)
    column = y.abs().argmax(1)
    own = (prediction - y)[torch.arange(len(y)), column]
    assert torch.allclose(objective(phi, draw), own.square().mean(), rtol=1e-5)


def test_curves_that_nothing_was_learned_from_are_fine_tuned_from_scratch():
    way = on_curves("untrained", [(0.01, 3)], 24, 2400, 6)
    _learner, phi = way.train((0.01, 3), 5, 1)
    assert way.kind == "baseline"
    fresh = parameters(mlp(1, (40, 40), 1, seed=5))
    assert all(torch.equal(phi[k].cpu(), fresh[k]) for k in fresh)
    kinds = {by: on_curves(by, [()], 24, 2400, 6).kind for by in ways.TRAINED}
    assert kinds == {
        "untrained": "baseline",
        "joint": "transfer",
        "own heads": "transfer",
        "MAML": "meta",
        "ridge head": "meta",
    }


@pytest.fixture(scope="module")
def few():
    """A network, and two tasks of four drawings of three classes."""
    data = glyphs(30, size=8)
    data = data._replace(items=data.items.flatten(2))
    return mlp(64, (24, 16), 3, seed=0), episodes(data, 3, 4, 5, tasks=2, seed=0)(0)


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0, 100.0])
def test_the_probes_head_is_where_its_objective_has_no_slope(few, strength):
    net, draw = few
    learner = probed(as_is(net), strength, iterations=1000)
    task = take(draw.support, 0)
    theta = learner.adapt(learner.init(), task)
    w, b = (theta[f"head.{k}"].double().requires_grad_() for k in ("weight", "bias"))
    z = features(net)(parameters(net), task.x).double()
    value = cross_entropy(z @ w.mT + b, task.y.double()) + strength / 2 * (w**2).sum()
    assert all(g.norm() < 1e-5 for g in torch.autograd.grad(value, (w, b)))


def test_fine_tuning_from_the_probes_head_is_lp_ft_on_all_tasks_at_once(few):
    net, draw = few
    ours, theirs = (
        probed(finetune(net, cross_entropy, 0.1, 3), 0.1),
        lp_ft(net, cross_entropy, 0.1, 3, 0.1),
    )
    assert ours.vmap and not theirs.vmap and set(ours.init()) == set(theirs.init())
    phi = start(ours, parameters(net)).params
    with torch.no_grad():
        both = torch.vmap(ours.adapt, (None, 0))(phi, draw.support)
        for i in range(2):
            alone = theirs.adapt(phi, take(draw.support, i))
            for k, v in alone.items():
                assert torch.allclose(both[k][i], v, atol=1e-3), k


def test_whatever_begins_with_a_head_can_begin_with_the_probes(few):
    net, draw = few
    task = take(draw.support, 0)
    with seeded(0):
        learner = probed(lora(net, cross_entropy, 0.1, 0, rank=2), 0.1)
        phi = start(learner, parameters(net)).params
    plain = probed(as_is(net), 0.1)
    expected = plain.predict(plain.adapt(plain.init(), task), task.x)
    assert torch.allclose(learner.predict(learner.adapt(phi, task), task.x), expected, atol=1e-5)


def test_the_probes_head_needs_a_learner_with_a_network_and_a_strength(few):
    net, _ = few
    without = Learner(dict, lambda phi, s: phi, lambda theta, x: x)
    for learner, strength, message in (
        (net, 0.1, "a learner, such as"),
        (without, 0.1, "a learner with a network"),
        (as_is(net), 0.0, "strength"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            probed(learner, strength)
    with pytest.raises(ValueError, match="iterations of at least 1"):
        probed(as_is(net), 0.1, iterations=0)


def test_a_probe_that_is_not_solved_says_so(few):
    """Features of a thousand times the size, and a small λ: no number, in place of a wrong one."""
    net, draw = few
    task = take(draw.support, 0)
    phi = {k: 100 * v if k.startswith("body") else v for k, v in parameters(net).items()}
    theta = probed(as_is(net), 1e-4, iterations=20).adapt(phi, task)
    assert torch.isnan(theta["head.weight"]).all()
    solved = probed(as_is(net), 1.0).adapt(parameters(net), task)
    assert torch.isfinite(solved["head.weight"]).all()


def test_the_probes_head_needs_one_linear_layer_and_rows_of_targets(few):
    net, draw = few
    task = take(draw.support, 0)
    bare = two_halves(net.body, torch.nn.Linear(16, 3, bias=False))
    deep = two_halves(net.body, torch.nn.Sequential(torch.nn.Linear(16, 3), torch.nn.ReLU()))
    for other in (bare, deep):
        with pytest.raises(ValueError, match="one linear layer with a bias"):
            probed(as_is(other), 0.1)
        with pytest.raises(ValueError, match="one linear layer with a bias"):
            lp_ft(other, cross_entropy, 0.1, 1)
    with pytest.raises((TypeError, ValueError), match="targets y"):
        probed(as_is(net), 0.1).adapt(parameters(net), task._replace(y=task.y.argmax(1)))
