"""What a user's network brings along: frozen entries, buffers, statistics, modes, odd modules. It is given back as it was."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections import OrderedDict
from functools import partial
from types import MethodType

import pytest
import torch
from machine import compiling
from problems import convolutional, images, seeded, vectors
from test_contract import ROWS
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations

from mtlib.bilevel import (
    bilevel,
    checkpointed,
    first_order,
    implicit,
    multi_step,
    secant,
    unrolled,
)
from mtlib.core import (
    Batch,
    Episode,
    apply,
    fixed,
    load,
    net_state,
    parameters,
    start,
    take,
)
from mtlib.evaluate import answers, evaluate
from mtlib.joint import joint, toward
from mtlib.learners.context import cavia
from mtlib.learners.finetune import as_is, finetune, linear_probe
from mtlib.learners.gradient import boil, maml
from mtlib.learners.lora import lora, merged
from mtlib.nets import conv4, mlp, two_halves
from mtlib.norm import Norm, calibrate
from mtlib.objective import InexactNorm, _watch_modules
from mtlib.run import unroll
from mtlib.run.copies import evaluating, is_evaluating
from mtlib.tasks import mixture, one_hot
from mtlib.train import fit
from mtlib.transfer.unseen import group_dro, group_weights, irm, vrex
from mtlib.transfer.weights import (
    balances,
    gradnorm,
    log_variances,
    pcgrad,
    uncertainty,
)

STRONG = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)


def frozen(net, prefix):
    """The network with the entries under a prefix frozen."""
    for k, p in net.named_parameters():
        p.requires_grad_(not k.startswith(prefix))
    return net


def small(seed=0, outputs=2):
    return seeded(lambda: mlp(3, (5, 4), outputs), seed)


# What may move -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_what_is_frozen_moves_in_neither_loop(name):
    row = ROWS[name]
    net = frozen(convolutional(), "body.1.")
    learner, data = row.make(net), images()
    phi, still = learner.init(), [k for k in parameters(net) if k.startswith("body.1.")]
    assert still and set(still) <= phi.keys()
    theta = learner.adapt(phi, take(data, 0).support)
    assert all(torch.equal(theta[k], phi[k]) for k in still if k in theta)
    objective = bilevel(learner, row.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(objective, phi, lambda step: data, 2, STRONG, progress=False)
    assert all(torch.equal(run.params[k], phi[k]) for k in still)
    assert any(not torch.equal(run.params[k], v) for k, v in phi.items())
    _, grads = objective.value_and_grad(phi, data)
    assert grads and not grads.keys() & set(still)


HYPERGRADIENTS = {
    "unrolled": unrolled,
    "first_order": first_order,
    "secant": secant,
    "checkpointed": checkpointed,
    "multi_step": multi_step([0.5, 0.5]),
    "implicit": implicit(2.0),
}


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_no_hypergradient_moves_what_is_frozen_or_a_buffer(name):
    net = frozen(seeded(lambda: conv4(3, width=4, size=16, statistics="stored")), "head.")
    learner, data = maml(net, cross_entropy, 0.1, 2, strength=2.0), images()
    phi, still = learner.init(), fixed(net)
    assert {"body.1.1.running_mean", "head.bias"} <= still
    objective = bilevel(learner, cross_entropy, HYPERGRADIENTS[name])
    run = fit(objective, phi, lambda step: data, 2, STRONG, progress=False)
    assert all(torch.equal(run.params[k], phi[k]) for k in still)
    moved = [k for k in phi if k not in still]
    assert all(not torch.equal(run.params[k], phi[k]) for k in moved)


def test_implicit_over_what_may_move_is_the_solution_of_that_problem():
    """Frozen entries are constants: the same gradient as for a network that has them built in."""
    net = frozen(small(), "body.0.")
    part = two_halves(nn.Sequential(*net.body[2:]), net.head)
    data, x = vectors(), {}
    inner = Episode(*(Batch(net.body[:2](b.x).detach(), b.y) for b in data))
    for key, n, d in (("whole", net, data), ("part", part, inner)):
        learner = maml(n, mse_loss, 0.1, 3, strength=1.0)
        x[key] = bilevel(learner, mse_loss, implicit(1.0, 20)).value_and_grad(learner.init(), d)
    assert torch.allclose(x["whole"][0], x["part"][0], atol=1e-12)
    for k, g in x["part"][1].items():
        there = k.replace("body.0.", "body.2.")
        assert torch.allclose(x["whole"][1][there], g, atol=1e-12)
    assert len(x["whole"][1]) == len(x["part"][1])


def test_frozen_is_read_when_it_is_asked():
    net, data = small(), vectors()
    learner = maml(net, mse_loss, 0.1, 1)
    objective, phi = bilevel(learner, mse_loss), learner.init()
    every = set(objective.value_and_grad(phi, data)[1])
    frozen(net, "body.")
    assert set(objective.value_and_grad(phi, data)[1]) == {"head.weight", "head.bias"}
    frozen(net, "nothing")
    assert set(objective.value_and_grad(phi, data)[1]) == every == set(phi)


@compiling
def test_a_compiled_objective_reads_frozen_entries_too(monkeypatch):
    monkeypatch.setattr(unroll, "_kernel", lambda dtype: None)  # which needs no program
    net, data = small(), vectors()
    learner = maml(net, mse_loss, 0.1, 1)
    objective, plain = bilevel(learner, mse_loss, compile=True), bilevel(learner, mse_loss)
    phi = learner.init()
    for prefix in ("body.0.", "body.0.", "body.0.", "none"):
        frozen(net, prefix)
        value, grads = objective.value_and_grad(phi, data)
        right, expected = plain.value_and_grad(phi, data)
        assert torch.allclose(value, right, atol=1e-12) and grads.keys() == expected.keys()
        assert all(torch.allclose(grads[k], g, atol=1e-10) for k, g in expected.items())


def test_nothing_left_to_move_is_an_error():
    net, data = frozen(small(), "head."), take(vectors(), 0)
    for prefix, learner in (("head.", finetune(net, mse_loss, 0.1, 1)),):
        assert not torch.equal(
            learner.adapt(learner.init(), data.support)["body.0.weight"], net.body[0].weight
        ), prefix
    frozen(net, "body.")
    with pytest.raises(ValueError, match=r"body\.\* that may move; all 4 are frozen"):
        boil(net, mse_loss, 0.1, 1).adapt(parameters(net), data.support)


def batch(outputs=2, sets=2):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sets, 8, 3, generator=g, dtype=torch.float64)
    return Batch(x, one_hot(torch.arange(8) % outputs, outputs, torch.float64).expand(sets, -1, -1))


JOINT = {
    "joint": lambda net: (joint(net, cross_entropy), {}),
    "toward": lambda net: (
        joint(
            net,
            cross_entropy,
            penalties=[toward({k: v + 1 for k, v in parameters(net).items()}, 1.0)],
        ),
        {},
    ),
    "irm": lambda net: (irm(net, cross_entropy, 1.0), {}),
    "vrex": lambda net: (vrex(net, cross_entropy, 1.0), {}),
    "group_dro": lambda net: (group_dro(net, cross_entropy), group_weights(2)),
    "uncertainty": lambda net: (uncertainty(net, cross_entropy), log_variances(2)),
    "gradnorm": lambda net: (gradnorm(net, cross_entropy), balances(torch.ones(2))),
    "pcgrad": lambda net: (pcgrad(net, cross_entropy), {}),
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_objectives_and_penalties_move_nothing_frozen(name):
    body = nn.Sequential(nn.Linear(3, 5), Norm(5, "stored"), nn.ReLU(), nn.Linear(5, 4))
    net = frozen(two_halves(body, nn.Linear(4, 2)).double(), "body.0.")
    objective, own = JOINT[name](net)
    phi = {**parameters(net), **{k: v.double() for k, v in own.items()}}
    run = fit(objective, phi, lambda step: batch(), 3, STRONG, progress=False)
    still = fixed(net)
    assert {"body.0.weight", "body.1.running_var"} <= still
    assert all(torch.equal(run.params[k], phi[k]) for k in still)
    assert all(not torch.equal(run.params[k], phi[k]) for k in ("body.3.weight", "head.weight"))


def test_lora_learns_beside_a_frozen_body():
    net, data = frozen(small(), "body."), vectors()
    learner = lora(net, mse_loss, 0.1, 2, rank=2, scale=2.0)
    phi, still = learner.init(), fixed(net)
    theta = learner.adapt(phi, take(data, 0).support)
    assert all(torch.equal(theta[k], phi[k]) for k in still)
    assert not torch.equal(theta["lora.body.0.weight.b"], phi["lora.body.0.weight.b"])
    run = fit(bilevel(learner, mse_loss), phi, lambda step: data, 3, STRONG, progress=False)
    assert all(torch.equal(run.params[k], phi[k]) for k in [*still, "lora.scale"])
    assert not torch.equal(run.params["lora.body.0.weight.b"], phi["lora.body.0.weight.b"])


def test_merged_knows_its_scale():
    net, data = small(), take(vectors(), 0)
    learner = lora(net, mse_loss, 0.1, 3, rank=2, scale=2.0)
    theta = learner.adapt(learner.init(), data.support)
    said = learner.predict(theta, data.query.x)
    assert torch.allclose(apply(net)(merged(theta), data.query.x), said, atol=1e-12)
    assert torch.allclose(apply(net)(merged(theta, 2.0), data.query.x), said, atol=1e-12)
    with pytest.raises(ValueError, match="expected θ's own scale, 2, got 1"):
        merged(theta, 1.0)
    alone = {k: v for k, v in theta.items() if k != "body.0.weight"}
    with pytest.raises(ValueError, match=r"body\.0\.weight"):
        merged(alone)
    assert merged(parameters(net)).keys() == parameters(net).keys()


# Running statistics --------------------------------------------------------------------------


def blobs(n=400):
    g = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(n, 4, generator=g)
    return x, (x[:, 0] + x[:, 1] > 10).long()


def normed(norm=None, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), norm or nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def trained(net, steps=400):
    x, y = blobs()
    adam = partial(torch.optim.Adam, lr=0.01)
    stream = mixture(Batch(x, y), batch=64, seed=0)
    return fit(
        joint(net, cross_entropy), parameters(net), stream, steps, adam, progress=False
    ).params


@pytest.mark.parametrize("before", ["fresh", "pretrained"])
def test_running_statistics_follow_training_or_are_missed(before):
    x, y = blobs()
    net = normed()
    if before == "pretrained":
        for _ in range(20):
            net(-x)  # statistics of other data
    phi = trained(net)
    assert not any("running" in k for k in phi)
    with pytest.raises(ValueError, match=r"1\.running_mean, of the norm BatchNorm1d.*calibrate"):
        load(net, phi)
    with pytest.raises(ValueError, match="calibrate"):
        apply(net.eval())(phi, x)
    net.train()
    full = calibrate(net, phi, x.split(100))
    assert net.training and not any("running" in k for k in phi)
    after = load(net, full).eval()
    assert (after(x).argmax(1) == y).float().mean() >= 0.97
    assert torch.allclose(apply(net)(full, x), after(x))


def test_calibrate_gives_torchs_norms_the_moments_of_all_items():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
    )
    net.double()
    x = 4 + torch.randn(23, 3, 8, 8, dtype=torch.float64)
    phi = calibrate(net, parameters(net), x.split([3, 15, 5]))
    with torch.no_grad():
        whole = net(x)  # in training mode every norm reads the moments of all items
        load(net, phi).eval()
        assert torch.allclose(net(x), whole, atol=1e-10)
    first = nn.Sequential(net[0])(x).transpose(0, 1).flatten(1)
    assert torch.allclose(net[1].running_var, first.var(1, correction=0))


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_a_norm_in_evaluation_mode_keeps_its_statistics(frozen_norm):
    x, _ = blobs()
    net = normed()
    for _ in range(50):
        net(x)
    net[1].eval().requires_grad_(not frozen_norm)
    phi = trained(net, 20)
    assert torch.equal(phi["1.running_mean"], net[1].running_mean)
    assert torch.equal(phi["1.weight"], net[1].weight) == frozen_norm
    load(net, phi)


def test_statistics_that_training_makes_old_are_left_out_of_phi():
    net = normed()
    phi = calibrate(net, parameters(net), [blobs()[0]])
    assert "1.running_mean" in phi
    x, y = blobs()
    stream = mixture(Batch(x, y), batch=64, seed=0)
    run = fit(joint(net, cross_entropy), phi, stream, 2, progress=False)
    assert "1.running_mean" not in run.params


@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, nn.SyncBatchNorm, lambda c: Norm(c, "stored"), Norm]
)
def test_start_does_not_lend_statistics_to_parameters_of_others(make):
    norm = make(16)
    net, other = normed(norm), normed(make(16), seed=1)
    phi = trained(net, 3) if not isinstance(norm, nn.SyncBatchNorm) else parameters(net)
    carried = start(as_is(other.eval()), {k: v for k, v in phi.items() if "running" not in k})
    assert not any("running" in k for k in (*carried.params, *carried.fresh))


def test_start_keeps_the_statistics_of_what_it_does_not_replace():
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = two_halves(body, nn.Linear(4, 2)).eval()
    carried = start(as_is(net), {"head.weight": torch.ones(2, 4), "head.bias": torch.zeros(2)})
    assert {"body.1.running_mean", "body.1.weight"} <= set(carried.fresh)


def test_start_puts_everything_where_the_trained_entries_are():
    learner = cavia(mlp(3, (5,), 2, seed=0), mse_loss, 0.1, 1)
    here = {k: v.to("meta", torch.float64) for k, v in parameters(mlp(3, (5,), 2, seed=1)).items()}
    carried = start(learner, here)
    assert carried.fresh == ("context.weight",)
    assert {(v.device.type, v.dtype) for v in carried.params.values()} == {("meta", torch.float64)}


def test_our_stored_statistics_are_torchs():
    ours, theirs = Norm(3, "stored"), nn.BatchNorm2d(3)
    phi = calibrate(nn.Sequential(ours), {}, [2 + torch.randn(9, 3, 4, 4)])
    load(nn.Sequential(ours), phi)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4, 4)
    assert torch.allclose(theirs.eval()(x), ours(x), atol=1e-5)


@pytest.mark.parametrize("statistics", ["batch", "stored"])
def test_a_convolutional_network_is_evaluated_inductively_in_one_call(statistics):
    """Each query item gets the answer that it gets alone."""
    net = seeded(lambda: conv4(3, width=4, size=16))
    phi, data = parameters(net), images()
    if statistics == "stored":
        net = seeded(lambda: conv4(3, width=4, size=16, statistics="stored"), 1)
        phi = start(as_is(net), phi).params
    full = calibrate(net, phi, [data.support.x.flatten(0, 1)])
    learner = as_is(net)
    together = answers(learner, full, data)
    alone = answers(
        learner, full, Episode(data.support, Batch(data.query.x[:, :1], data.query.y[:, :1]))
    )
    assert torch.allclose(together[:, :1], alone, atol=1e-12)
    if statistics == "batch":  # without: transductive, as trained
        assert not torch.allclose(answers(learner, phi, data), together)
    again = load(copy.deepcopy(net), full).eval()
    assert torch.allclose(again(data.query.x[0]), together[0], atol=1e-12)


def test_instance_norms_with_statistics_are_calibrated_as_torch_averages_them():
    norm = nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0, affine=True).double()
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    phi = calibrate(nn.Sequential(norm), {}, x.split([2, 5]))
    norm(x)  # sets them, with the unbiased variance
    assert torch.allclose(phi["0.running_mean"], norm.running_mean)
    assert torch.allclose(phi["0.running_var"] * 5 / 4, norm.running_var)


# Evaluation mode -----------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds noise in training mode, by its flag alone."""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


def dropping(convolves=False, noise=True):
    if convolves:
        body = [nn.Conv2d(1, 3, 3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(588, 4)]
        return two_halves(nn.Sequential(*body), nn.Linear(4, 3)).double()
    body = nn.Sequential(
        nn.Linear(3, 40), nn.Dropout(0.5), Noisy() if noise else nn.Tanh(), nn.ReLU()
    )
    return two_halves(body, nn.Linear(40, 2)).double()


@pytest.mark.parametrize("convolves", [False, True])
@pytest.mark.parametrize("make", [as_is, lambda net: maml(net, cross_entropy, 0.1, 2)])
def test_evaluate_is_in_evaluation_mode(convolves, make):
    net = dropping(convolves)
    data = images(8) if convolves else classes(8)
    learner = make(net)
    phi = learner.init()
    first, second = (evaluate(learner, phi, lambda step: data, 8, progress=False) for _ in "12")
    assert net.training and all(m.training for m in net.modules()) and not is_evaluating()
    off = make(copy.deepcopy(net).eval())
    right = evaluate(off, phi, lambda step: data, 8, progress=False)
    assert torch.equal(first.values, second.values) and torch.equal(first.values, right.values)
    assert torch.equal(answers(learner, phi, data), answers(off, phi, data))
    assert not torch.equal(
        learner.predict(phi, data.query.x[0]), learner.predict(phi, data.query.x[0])
    )


def classes(tasks=4, rows=6):
    g = torch.Generator().manual_seed(0)
    y = one_hot(torch.arange(rows) % 2, 2, torch.float64).expand(tasks, -1, -1)
    return Episode(
        *(Batch(torch.randn(tasks, rows, 3, generator=g, dtype=torch.float64), y) for _ in "sq")
    )


@pytest.mark.fast
def test_a_norm_without_statistics_goes_on_taking_them_from_its_input():
    net = two_halves(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)).double()
    phi, data = parameters(net), classes()
    with torch.no_grad():
        right = net(data.query.x[0])
    with pytest.warns(UserWarning, match="tasks run in a loop"):
        assert torch.allclose(answers(as_is(net), phi, data)[0], right)
    full = calibrate(net, phi, [data.support.x.flatten(0, 1)])
    assert torch.allclose(
        answers(as_is(net), full, data)[0], load(copy.deepcopy(net), full).eval()(data.query.x[0])
    )


def test_evaluation_mode_ends_with_its_block():
    with pytest.raises(KeyError), evaluating():
        raise KeyError
    assert not is_evaluating()
    seen = []
    with evaluating():
        other = threading.Thread(target=lambda: seen.append(is_evaluating()))
        other.start()
        other.join()
    assert seen == [False]


# A private copy ------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Keeps what it saw, in an attribute, a list and a count; uses a module that is registered elsewhere."""

    def __init__(self, other):
        super().__init__()
        self.last, self.seen, self.calls = None, [], 0
        self.hidden = [other]
        self.table = {"other": other}

    def forward(self, x):
        self.last = x
        self.seen.append(x)
        self.calls += 1
        return self.hidden[0](x) + self.table["other"].weight.sum()


def keeps():
    linear = nn.Linear(3, 3)
    return nn.Sequential(linear, Keeps(linear), nn.Linear(3, 2))


class Shared(nn.Module):
    """One layer used twice, and a matrix tied to another."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.again = self.a
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.again(self.a(x)).tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, -1]


class Replaced(nn.Module):
    """Its forward is another function, of one of four kinds."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        if kind == "method":
            self.forward = MethodType(lambda self, x: self.b(self.a(x).tanh()), self)
        elif kind == "partial":
            self.forward = partial(Replaced.other, self)
        elif kind == "closure":
            self.forward = lambda x: self.b(self.a(x).tanh())
        else:
            self.act = lambda x: self.b(x.tanh())

    def other(self, x):
        return self.b(self.a(x).tanh())

    def forward(self, x):
        return self.act(self.a(x))


def hooked():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].register_forward_hook(lambda module, args, out: 2 * out + module.bias)
    return net


def bound_hook():
    net = keeps()
    net[0].register_forward_hook(lambda module, args, out: None)
    net[1].register_forward_pre_hook(
        net[1].forward.__class__(lambda self, m, a: setattr(self, "pre", a), net[1])
    )
    return net


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


ODD = {
    "keeps its input": keeps,
    "shared and tied": Shared,
    "LSTM": Recurrent,
    "a method for forward": lambda: Replaced("method"),
    "a partial for forward": lambda: Replaced("partial"),
    "a closure for forward": lambda: Replaced("closure"),
    "a closure inside": lambda: Replaced("inside"),
    "hooks": hooked,
    "a hook that is a method": bound_hook,
    "old weight norm": old_weight_norm,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)
    ),
    "embedding bag of lists": lambda: nn.Sequential(
        OrderedDict(a=nn.Linear(3, 4), rest=nn.ModuleList([nn.Linear(4, 2)])[0])
    ),
}


def everything(net):
    """All that a network holds, by module: what a call could leave behind."""
    kept = {}
    for place, m in net.named_modules():
        for k, v in vars(m).items():
            if k in ("_parameters", "_buffers"):
                kept |= {
                    (place, k, n): (id(t), None if t is None else t.detach().clone())
                    for n, t in v.items()
                }
            elif isinstance(v, list | dict):
                kept[place, k] = (id(v), repr(v))
            else:
                kept[place, k] = (id(v), None)
    return kept


def same(a, b):
    assert a.keys() == b.keys()
    for k, (own, value) in a.items():
        assert own == b[k][0], k
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[k][1]), k
        else:
            assert value == b[k][1], k


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_compute_with_theta_and_stay_as_they_were(name):
    torch.manual_seed(0)
    net = ODD[name]().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    theta = {k: v + 0.1 * torch.randn_like(v) for k, v in parameters(net).items()}
    with torch.no_grad():
        own = dict(net.named_parameters())
        before = {k: v.clone() for k, v in own.items()}
        for k, v in theta.items():
            own[k].copy_(v)
        right = net(x)
        for k, v in before.items():
            own[k].copy_(v)
        net(x)  # what it keeps is what this call left
    held = everything(net)
    leaves = {k: v.requires_grad_() for k, v in theta.items()}
    out = apply(net)(leaves, x)
    assert torch.allclose(out, right, atol=1e-12)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    assert all(g is not None for g in grads)
    same(held, everything(net))


def test_a_buffer_that_a_forward_pass_writes_is_said_to_be_lost():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += 1
            return x

    net = nn.Sequential(nn.Linear(3, 2), Counts())
    phi = parameters(net)
    with pytest.warns(UserWarning, match="Counts writes to its buffer 'seen'"):
        apply(net)(phi, torch.ones(1, 3))
    assert net[1].seen == 0 and phi["1.seen"] == 0
    apply(net.eval())(phi, torch.ones(1, 3))


def test_a_network_that_cannot_be_copied_says_so_in_an_evaluation():
    net, data = (
        two_halves(nn.Sequential(Replaced("closure"), nn.Dropout()), nn.Linear(2, 2)),
        classes(),
    )
    net.double()
    learner = as_is(net)
    with pytest.raises(ValueError, match=r"net\.eval\(\) first"):
        evaluate(learner, learner.init(), lambda step: data, 4, progress=False)
    net.eval()
    assert evaluate(learner, learner.init(), lambda step: data, 4, progress=False).mean >= 0


def test_a_call_leaves_nothing_for_pythons_collector():
    """Copies go with their call: θ of a step before is not held."""
    net = small()
    phi, x = parameters(net), torch.ones(2, 3, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        theta = {k: v.clone() for k, v in phi.items()}
        seen = [weakref.ref(v) for v in theta.values()]
        with torch.no_grad():
            apply(net)(theta, x)
        del theta
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_norms_of_other_threads_are_not_looked_at():
    net = two_halves(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    failed = []

    def other():
        try:
            net(torch.ones(2, 3))
        except Exception as error:
            failed.append(error)

    with _watch_modules():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(InexactNorm):
            net(torch.ones(2, 3))
    assert not failed
    net(torch.ones(2, 3))


@pytest.mark.parametrize("make", [small, lambda: dropping(noise=False)])
def test_threads_that_train_on_one_network_get_what_each_gets_alone(make):
    """With dropout, too, though torch has one generator for all threads."""
    net, data = make(), vectors()

    def train(seed):
        learner = maml(net, mse_loss, 0.05 * (1 + seed), 2)
        return fit(
            bilevel(learner, mse_loss), learner.init(), lambda step: data, 6, progress=False
        ).losses

    alone, together = [train(seed) for seed in range(4)], {}
    threads = [
        threading.Thread(target=lambda s=s: together.update({s: train(s)})) for s in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together[s] for s in range(4)] == alone


# Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lora, cavia])
def test_loading_names_what_has_no_place(make):
    net, data = small(), take(vectors(), 0)
    learner = make(net, mse_loss, 0.1, 1)
    theta = learner.adapt(learner.init(), data.support)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"have no place in it.*net_state"):
        load(net, theta)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    load(net, net_state(net, theta))


def test_loading_a_probe_or_another_shape_changes_nothing():
    net, data = small(), take(vectors(), 0)
    probe = linear_probe(net, mse_loss)
    theta = {**parameters(net), **probe.adapt(probe.init(), data.support)}
    with pytest.raises(ValueError, match=r"probe\.weight"):
        load(net, theta)
    with pytest.raises(ValueError, match=r"head\.bias of shape \(2,\); got Tensor: \(7,\)"):
        load(net, {**parameters(net), "head.bias": torch.zeros(7)})


def test_loading_writes_buffers_that_no_state_dict_has():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

        def forward(self, x):
            return self.scale * x

    one, other = (nn.Sequential(Scaled(s), nn.Linear(3, 2)) for s in (2.0, 5.0))
    load(other, parameters(one))
    x = torch.ones(4, 3)
    assert other[0].scale == 2 and torch.equal(one(x), other(x))


def test_a_norm_that_no_batch_reaches_keeps_its_statistics():
    """An auxiliary branch that this forward pass does not take."""
    torch.manual_seed(0)
    net = two_halves(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    net.aside = nn.BatchNorm1d(7)
    net.forward = MethodType(lambda self, x: self.head(self.body(x)), net)
    phi = calibrate(net, parameters(net), [torch.randn(9, 3)])
    assert torch.equal(phi["aside.running_mean"], net.aside.running_mean)
    assert not torch.equal(phi["body.1.running_mean"], net.body[1].running_mean)


def test_a_network_that_counts_as_false_keeps_what_is_frozen():
    """A module may have a length, and be 0 long."""

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def __len__(self):
            return 0

    net = Memory()
    net.linear.weight.requires_grad_(False)
    assert {"linear.weight", "norm.running_mean"} <= fixed(net)
    assert not any("running" in k for k in parameters(net))


def test_statistics_of_another_domain_are_computed_where_a_norm_stands_aside():
    """That one never gets any; the others are not taken for frozen."""
    net = two_halves(nn.Sequential(nn.Linear(3, 4), Norm(4)), nn.Linear(4, 2))
    net.aside = Norm(7)
    net.forward = MethodType(lambda self, x: self.head(self.body(x)), net)
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(9, 3, generator=g), 5 + torch.randn(9, 3, generator=g)
    first = calibrate(net, parameters(net), [one])
    again = calibrate(net, first, [other])
    right = calibrate(net, parameters(net), [other])
    assert torch.equal(again["body.1.running_mean"], right["body.1.running_mean"])
    assert not torch.equal(again["body.1.running_mean"], first["body.1.running_mean"])
    net.forward = MethodType(lambda self, x: self.head(self.body[0](x)), net)
    with pytest.raises(ValueError, match="they reach none"):
        calibrate(net, first, [other])


def test_an_error_while_ctrl_c_is_handled_is_that_error():
    """What a user does on Ctrl-C may fail for a reason of its own."""

    def broken(theta, x):
        raise LookupError("of the user's own")

    learner = as_is(small())._replace(predict=broken)
    with pytest.raises(LookupError, match="of the user's own"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            answers(learner, learner.init(), vectors())


def test_a_program_compiled_elsewhere_sees_what_is_frozen_later():
    """Nothing marks `fixed` as a constant for all of torch.compile."""
    bilevel(maml(small(), mse_loss, 0.1, 1), mse_loss, compile=True)
    assert not getattr(fixed, "_dynamo_marked_constant", False)
