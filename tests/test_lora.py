"""LoRA that one can use: targets, inner rules, W₀x + sB(Ax), minibatches, files of a few kB.

The right values: the network with W₀ + s B A multiplied out by hand, in float64.
"""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, first_order, unrolled
from mtlib.core import Batch, Episode, apply, fixed, load, parameters, take
from mtlib.joint import joint
from mtlib.learners.finetune import linear_probe
from mtlib.learners.gradient import adam, maml
from mtlib.learners.lora import _Linear, adapters, attach, lora, lora_net, merged, targeted
from mtlib.learners.metric import protonet
from mtlib.nets import mlp, two_halves
from mtlib.norm import Norm
from mtlib.run.checkpoint import load_params, save_params
from mtlib.run.copies import evaluating
from mtlib.run.fast import vmapping
from mtlib.tasks import mixture, one_hot
from mtlib.train import fit

EXACT = {"rtol": 0, "atol": 1e-12}


class Attention(nn.Module):
    """Weights that are read and not called: in_proj_weight, and the weight of out_proj."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x.view(len(x), 3, 6)
        return self.inner(x, x, x, need_weights=False)[0].flatten(1)


class Tied(nn.Module):
    """One weight in two places: tokens in, and back out of them."""

    def __init__(self):
        super().__init__()
        self.tokens, self.back = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.back.weight = self.tokens.weight

    def forward(self, x):
        return self.back(torch.tanh(self.tokens(x).mean(1)))


class Reader(nn.Module):
    """A linear layer that is called, and whose weight is read beside that."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x):
        return self.one(x) + x @ self.one.weight


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x):
        h = None
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h


def floats(*shape):
    return lambda n: torch.randn(n, *shape)


def tokens(n):
    return torch.randint(0, 7, (n, 4))


BODIES = {  # name: (body, its features, items)
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)),
        5,
        floats(4),
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten()),
        18,
        floats(3, 4),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.Tanh(),
            nn.Conv2d(4, 5, 3, 2, 1, bias=False),
            nn.Flatten(),
        ),
        5 * 9,
        floats(2, 6, 6),
    ),
    "a convolution in groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), nn.Flatten()),
        8 * 9,
        floats(4, 5, 5),
    ),
    "reflected borders": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(), nn.Flatten()
        ),
        4 * 6,
        floats(2, 6),
    ),
    "a volume": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2, dilation=2), nn.Flatten()),
        3 * 8,
        floats(1, 4, 4, 4),
    ),
    "a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Tanh(), nn.Flatten()),
        3 * 25,
        floats(2, 3, 3),
    ),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Flatten(), nn.Tanh()),
        20,
        tokens,
    ),
    "tied weights": (Tied, 7, tokens),
    "attention": (Attention, 18, floats(18)),
    "a weight that is read": (Reader, 4, floats(4)),
    "recurrent weights": (Recurrent, 4, floats(5, 3)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))),
        5,
        floats(4),
    ),
}


def case(name, ways=3, tasks=2):
    torch.manual_seed(0)
    body, features, items = BODIES[name]
    net = two_halves(body(), nn.Linear(features, ways)).double()

    def batch(n):
        y = torch.eye(ways, dtype=torch.float64).repeat(n // ways, 1)
        x = torch.stack([items(n) for _ in range(tasks)])
        return Batch(x.double() if x.is_floating_point() else x, y.expand(tasks, -1, -1))

    return net, Episode(batch(6), batch(9))


def by_hand(phi, theta):
    """W₀ + s B A, written out anew."""
    whole = {k: v for k, v in theta.items() if not k.startswith("lora.")}
    for k in phi:
        if k.startswith("lora.") and k.endswith(".a"):
            name = k[5:-2]
            a, b = theta[k], theta[f"lora.{name}.b"]
            whole[name] = whole[name] + phi["lora.scale"] * torch.mm(b, a).reshape(
                whole[name].shape
            )
    return whole


def off_zero(phi):
    """φ with B somewhere else than at zero, where A has a gradient, too."""
    g = torch.Generator().manual_seed(5)
    noise = {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in phi.items()}
    return {k: v + 0.3 * noise[k] if k.endswith(".b") else v for k, v in phi.items()}


@pytest.mark.parametrize("name", BODIES)
def test_beside_and_multiplied_out_are_one_function_with_one_gradient(name):
    net, data = case(name)
    learner = lora(net, cross_entropy, 0.2, 1, rank=2, scale=1.5)
    phi, one = off_zero(learner.init()), take(data, 0)
    f = apply(net)
    said = learner.predict(phi, one.query.x)
    assert torch.allclose(said, f(by_hand(phi, phi), one.query.x), **EXACT)
    assert torch.allclose(said, f(merged(phi), one.query.x), **EXACT)
    grads = {}
    for how, g in (("beside", learner.predict), ("by hand", lambda p, x: f(by_hand(phi, p), x))):
        leaves = {k: v.clone().requires_grad_() for k, v in phi.items() if k != "lora.scale"}
        loss = cross_entropy(g({**phi, **leaves}, one.support.x), one.support.y)
        grads[how] = dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
        )
    for k, v in grads["by hand"].items():
        assert torch.allclose(grads["beside"][k], v, **EXACT), k


LOOPS = ("recurrent weights", "weight norm")  # torch has no rule of `vmap` for these


@pytest.mark.filterwarnings("ignore:an embedding with padding_idx")
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("chunk", [1, None])
def test_second_order_by_loop_and_by_vmap_is_that_of_the_multiplied_form(name, chunk):
    chunk = 1 if name in LOOPS else chunk
    net, data = case(name)
    learner = lora(net, cross_entropy, 0.2, 2, rank=2, scale=1.5)
    phi, f = off_zero(learner.init()), apply(net)
    value, grads = bilevel(learner, cross_entropy, unrolled, chunk=chunk).value_and_grad(phi, data)
    names = [k for k in phi if k.startswith(("lora.body", "head."))]
    leaves = {k: v.clone().requires_grad_(k != "lora.scale") for k, v in phi.items()}
    moving = [k for k in leaves if k != "lora.scale"]
    total = 0.0
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        for t in range(2):
            one, theta = take(data, t), dict(leaves)
            for _ in range(2):
                loss = cross_entropy(f(by_hand(phi, theta), one.support.x), one.support.y)
                g = torch.autograd.grad(loss, [theta[k] for k in names], create_graph=True)
                theta |= {k: theta[k] - 0.2 * u for k, u in zip(names, g, strict=True)}
            total = total + cross_entropy(f(by_hand(phi, theta), one.query.x), one.query.y) / 2
        right = torch.autograd.grad(total, [leaves[k] for k in moving])
    assert torch.allclose(value, total.detach(), **EXACT)
    assert grads.keys() == set(moving)
    for k, v in zip(moving, right, strict=True):
        assert torch.allclose(grads[k], v, rtol=0, atol=1e-11), k


@pytest.mark.fast
def test_the_two_stay_apart_under_vmap_too(monkeypatch):
    """Multiplied out they give the same numbers, and take longer."""
    net = two_halves(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 1)).double()
    learner, calls = lora(net, mse_loss, 0.1, 1, rank=1), []
    forward = _Linear.forward
    monkeypatch.setattr(
        _Linear, "forward", lambda self, x: calls.append(vmapping()) or forward(self, x)
    )
    data = Episode(*[Batch(torch.randn(3, 5, 4).double(), torch.randn(3, 5, 1).double())] * 2)
    bilevel(learner, mse_loss).value_and_grad(learner.init(), data)
    assert calls == [True, True]  # an inner step and the query


def test_a_rule_is_the_inner_loops_own_way_of_stepping():
    """Adam, written out: m̂ / (√v̂ + ε)."""
    net, data = case("linear layers")
    one, f = take(data, 0), apply(net)
    learner = lora(net, cross_entropy, 0.01, 3, rank=2, rule=adam())
    phi = off_zero(learner.init())
    names = [k for k in phi if k.startswith(("lora.body", "head."))]
    theta, m, v = dict(phi), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for t in (1, 2, 3):
        leaves = {k: theta[k].clone().requires_grad_() for k in names}
        loss = cross_entropy(f(by_hand(phi, {**theta, **leaves}), one.support.x), one.support.y)
        for k, g in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            up, down = m[k] / (1 - 0.9**t), (v[k] / (1 - 0.999**t)).sqrt() + 1e-8
            theta[k] = theta[k] - 0.01 * up / down
    found = learner.adapt(phi, one.support)
    for k in phi:
        assert torch.allclose(found[k], theta[k], **EXACT), k


def test_the_first_derivative_alone_and_a_frozen_base():
    net, data = case("linear layers")
    net.body.requires_grad_(False)
    learner = lora(net, cross_entropy, 0.2, 2, rank=2)
    phi = learner.init()
    for hypergradient in (unrolled, first_order):
        _, grads = bilevel(learner, cross_entropy, hypergradient).value_and_grad(phi, data)
        moving = {k for k in phi if k.startswith(("lora.body", "head."))}
        assert set(grads) == moving
        assert all(bool(grads[k].any()) for k in moving if not k.endswith(".a"))


def test_two_threads_that_train_on_one_network():
    net, data = case("linear layers")
    learner = lora(net, cross_entropy, 0.2, 2, rank=2)
    objective = bilevel(learner, cross_entropy, unrolled)
    starts = [off_zero(learner.init()) for _ in range(4)]
    starts = [{k: v + i * 0.01 for k, v in phi.items()} for i, phi in enumerate(starts)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    alone = [objective.value_and_grad(phi, data)[0] for phi in starts]
    together = {}

    def work(i):
        for _ in range(10):
            together[i] = objective.value_and_grad(starts[i], data)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together[i] for i in range(4)] == alone
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(net.body[0]) is nn.Linear and "thin" not in vars(net.body[0])


def test_buffers_are_no_weights():
    body = nn.Sequential(nn.Linear(4, 5))
    body.register_buffer("mean", torch.zeros(5, 1))
    net = two_halves(body, nn.Linear(5, 2))
    assert [k for k in lora(net, mse_loss, 0.1, 1).init() if k.startswith("lora.")] == [
        "lora.body.0.weight.a",
        "lora.body.0.weight.b",
        "lora.scale",
    ]


# Targets -------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.dense = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.dense(torch.tanh(self.query(x)) * self.value(x))


def deep():
    torch.manual_seed(0)
    net = two_halves(nn.Sequential(Layer(), Layer()), nn.Linear(4, 2)).double()
    return net


TARGETS = {
    "modules": (("query", "value"), {"0.query", "0.value", "1.query", "1.value"}),
    "one module": (("body.1.query",), {"1.query"}),
    "its end": (["1.dense"], {"1.dense"}),
    "a weight": (("0.dense.weight",), {"0.dense"}),
    "all weights": (("weight",), {f"{i}.{n}" for i in "01" for n in ("query", "value", "dense")}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_ends_of_names(name):
    targets, right = TARGETS[name]
    learner = lora(deep(), mse_loss, 0.1, 2, rank=2, targets=targets)
    phi = learner.init()
    assert {k for k in phi if k.endswith((".a", ".b"))} == {
        f"lora.body.{k}.weight.{half}" for k in right for half in "ab"
    }
    data = Batch(torch.randn(6, 4).double(), torch.randn(6, 2).double())
    theta = learner.adapt(phi, data)
    moved = {k for k in merged(theta) if not torch.equal(merged(theta)[k], phi[k])}
    assert moved == {f"body.{k}.weight" for k in right} | {"head.weight", "head.bias"}


def test_the_second_name_of_a_tied_weight_is_a_name_of_it():
    net, _ = case("tied weights")
    assert (
        list(targeted(net, ("back",))) == list(targeted(net, ("tokens",))) == ["body.tokens.weight"]
    )


@pytest.mark.parametrize("wrong", [("uery",), ("query", "key"), ("",), ("layer",), ("head",)])
def test_a_target_that_fits_nothing_is_refused_with_those_that_there_are(wrong):
    with pytest.raises(ValueError, match=r"fits none of .* modules named dense, query, value"):
        lora(deep(), mse_loss, 0.1, 1, targets=wrong)


@pytest.mark.parametrize("wrong", ["query", b"query", (1,), 3, {"query": 1}])
def test_targets_that_are_no_names_are_refused(wrong):
    with pytest.raises(TypeError, match="expected targets as a tuple of names"):
        lora(deep(), mse_loss, 0.1, 1, targets=wrong)


# Minibatches ---------------------------------------------------------------------------------


def minibatches():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 4, generator=g).double()
    return Batch(x, (x[:, 0] + x[:, 1] > 0).long())


def test_on_minibatches_it_is_plain_torch_on_a_b_and_the_head():
    net, data = deep(), minibatches()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    low = lora_net(net, rank=2, scale=2.0, targets=("query", "value"))
    phi, stream = parameters(low), mixture(data, batch=16, seed=0)
    run = fit(
        joint(low, cross_entropy),
        phi,
        stream,
        25,
        partial(torch.optim.AdamW, lr=0.01),
        progress=False,
    )

    mine = {
        k: v.clone().requires_grad_(k.startswith(("lora.body", "head."))) for k, v in phi.items()
    }
    rule = torch.optim.AdamW([v for v in mine.values() if v.requires_grad], lr=0.01)
    f = apply(net)
    for step in range(25):
        rule.zero_grad()
        cross_entropy(f(by_hand(phi, mine), stream(step).x[0]), stream(step).y[0]).backward()
        rule.step()
    for k, v in mine.items():
        assert torch.allclose(run.params[k], v, rtol=0, atol=1e-10), k
        assert k.startswith(("lora.body", "head.")) or torch.equal(run.params[k], phi[k])
    assert any(bool(run.params[k].any()) for k in phi if k.endswith(".b"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    said = apply(low)(run.params, data.x)
    assert torch.allclose(load(deep(), merged(run.params))(data.x), said, **EXACT)
    assert torch.allclose(lora(net, mse_loss, 0.1, 0).predict(run.params, data.x), said, **EXACT)


def test_plain_torch_trains_it_too():
    net, data = deep(), minibatches()
    before = {k: v.clone() for k, v in net.body.state_dict().items()}
    low = lora_net(net, rank=2)
    assert low(data.x).shape == (40, 2) and torch.equal(low(data.x), net(data.x))
    rule = torch.optim.SGD([p for p in low.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        rule.zero_grad()
        cross_entropy(low(data.x), data.y).backward()
        rule.step()
    assert not torch.equal(
        low.state_dict()["lora.body.0.query.weight.b"], torch.zeros(4, 2).double()
    )
    assert all(torch.equal(v, before[k]) for k, v in net.body.state_dict().items())
    by = by_hand(parameters(low), parameters(low))
    assert torch.allclose(low(data.x), apply(net)(by, data.x), **EXACT)


def test_under_maml_the_adapters_move_and_the_base_stands():
    net, data = deep(), minibatches()
    low = lora_net(net, rank=2)
    task = Batch(data.x, one_hot(data.y, 2).double())
    theta = maml(low, cross_entropy, 0.1, 3).adapt(phi := parameters(low), task)
    inside = lora(net, cross_entropy, 0.1, 3, rank=2).adapt(phi, task)
    assert all(torch.allclose(theta[k], inside[k], **EXACT) for k in phi)
    assert {k for k in phi if torch.equal(theta[k], phi[k])} == fixed(low)


def test_norms_keep_their_mode_and_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), Norm(6), nn.Dropout(0.5))
    net, x = two_halves(body, nn.Linear(6, 2)).double(), minibatches().x
    low, f = lora_net(net, rank=2), apply(net)
    phi = off_zero(parameters(low))
    assert "body.1.running_mean" not in phi
    for theta in (
        phi,
        {
            **phi,
            "body.1.running_mean": 1 + torch.rand(6).double(),
            "body.1.running_var": torch.ones(6).double(),
        },
    ):
        with evaluating():
            said, right = apply(low)(theta, x), f(by_hand(theta, theta), x)
        assert torch.allclose(said, right, **EXACT)
    net.eval()
    assert "body.1.running_mean" in parameters(low)
    assert torch.allclose(apply(low)(parameters(low), x), net(x), **EXACT)


def test_what_takes_body_and_head_apart_is_refused():
    low = lora_net(deep())
    for make in (protonet, linear_probe):
        with pytest.raises(ValueError, match="merged"):
            make(low)
    with pytest.raises(ValueError, match="one LoRA is enough"):
        lora_net(low)


# Files ---------------------------------------------------------------------------------------


def trained():
    net, data = deep(), minibatches()
    learner = lora(net, cross_entropy, 0.1, 5, rank=2, scale=2.0, targets=("query",))
    phi = learner.init()
    return net, learner, phi, learner.adapt(phi, Batch(data.x, one_hot(data.y, 2).double())), data


def test_adapters_are_kept_alone_in_a_small_file(tmp_path):
    net, learner, phi, theta, data = trained()
    save_params(tmp_path / "mine.safetensors", adapters(theta))
    kept = load_params(tmp_path / "mine.safetensors")
    assert all(k.startswith(("lora.", "head.")) for k in kept)
    assert (tmp_path / "mine.safetensors").stat().st_size < 4096
    for base in (parameters(net), phi, parameters(lora_net(net))):
        again = attach(base, kept)
        assert again.keys() == theta.keys()
        assert all(torch.equal(again[k], v) for k, v in theta.items())
    said = learner.predict(theta, data.x)
    assert torch.equal(learner.predict(attach(parameters(net), kept), data.x), said)
    assert torch.allclose(
        load(deep(), merged(attach(parameters(net), kept)))(data.x), said, **EXACT
    )


def test_the_head_of_the_file_takes_the_place_of_another():
    net, _, _, theta, _ = trained()
    phi = {
        **parameters(net),
        "head.weight": torch.randn(9, 4).double(),
        "head.bias": torch.zeros(9).double(),
    }
    assert torch.equal(attach(phi, adapters(theta))["head.weight"], theta["head.weight"])


def test_running_statistics_are_no_part_of_the_base():
    torch.manual_seed(0)
    net = two_halves(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, 2))
    theta = lora(net, mse_loss, 0.1, 0).init()
    calibrated = {
        **parameters(net),
        "body.1.running_mean": torch.ones(6),
        "body.1.running_var": torch.ones(6),
    }
    assert torch.equal(attach(calibrated, adapters(theta))["body.1.running_mean"], torch.ones(6))


def test_another_base_is_refused():
    net, _, _, theta, _ = trained()
    kept, phi = adapters(theta), parameters(net)
    off = {**phi, "body.1.value.bias": phi["body.1.value.bias"] + 1e-15}
    with pytest.raises(ValueError, match="beside; the names and shapes of φ fit"):
        attach(off, kept)
    with pytest.raises(ValueError, match="another dtype"):
        attach({k: v.float() for k, v in phi.items()}, kept)
    with pytest.raises(ValueError, match=r"body\.0\.query\.weight"):
        attach(parameters(mlp(4, (4,), 2)), kept)
    wide = {**phi, "body.0.query.weight": torch.zeros(5, 4).double()}
    with pytest.raises(ValueError, match=r"body\.0\.query\.weight with \(4, 4\) as a matrix"):
        attach(wide, kept)
    with pytest.raises(ValueError, match=r"lora\.base"):
        attach(phi, theta)
    with pytest.raises(ValueError, match="LoRA's entries"):
        adapters(phi)
    half = {k: v for k, v in theta.items() if k != "lora.body.0.query.weight.b"}
    with pytest.raises(ValueError, match=r"lora\.body\.0\.query\.weight\.b"):
        adapters(half)


def test_a_head_without_bias_and_none_at_all():
    for head in (nn.Linear(4, 2, bias=False), nn.Identity()):
        net = two_halves(nn.Sequential(nn.Linear(4, 4, bias=False)), head).double()
        learner = lora(net, mse_loss, 0.1, 2, rank=2)
        phi = off_zero(learner.init())
        x = torch.randn(5, 4).double()
        theta = learner.adapt(phi, Batch(x, torch.zeros_like(net(x))))
        again = attach(parameters(net), adapters(theta))
        said = apply(net)(by_hand(phi, theta), x)
        assert torch.allclose(learner.predict(again, x), said, **EXACT)


def test_a_transformer_made_elsewhere():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        num_labels=2,
        attn_implementation="eager",
    )

    class Sentences(nn.Module):
        def __init__(self):
            super().__init__()
            whole = transformers.BertForSequenceClassification(config)
            self.body, self.head = whole.bert, whole.classifier

        def forward(self, x):
            return self.head(self.body(x).pooler_output)

    net = Sentences().double().eval()
    ids, f = torch.randint(0, 20, (1, 6, 5)), apply(net)
    batch = Batch(ids, torch.eye(2).repeat(3, 1).double()[None])
    for targets in (("query", "value"), ("word_embeddings", "dense")):
        low = lora_net(net, rank=2, targets=targets)
        phi = off_zero(parameters(low))
        value, grads = joint(low, cross_entropy).value_and_grad(phi, batch)
        mine = {k: v.clone().requires_grad_(k in grads) for k, v in phi.items()}
        loss = cross_entropy(f(by_hand(phi, mine), ids[0]), batch.y[0])
        names = [k for k in phi if k.startswith(("lora.body", "head."))]
        assert set(grads) == set(names)
        for k, g in zip(names, torch.autograd.grad(loss, [mine[k] for k in names]), strict=True):
            assert torch.allclose(grads[k], g, **EXACT), k
        assert torch.allclose(value, loss.detach(), **EXACT)


def test_a_deep_copy_is_a_network_of_its_own():
    low, x = lora_net(deep(), rank=2), minibatches().x
    twin = copy.deepcopy(low)
    with torch.no_grad():
        twin.original[0].body[0].query.weight.zero_()
    assert not torch.equal(twin(x), low(x))
