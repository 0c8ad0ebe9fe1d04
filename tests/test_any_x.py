"""Any x, and any network: nests of tensors go through everything, and networks made elsewhere are wrapped."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from problems import largest, normal, seeded
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, apply, features, fixed, load, net_state, parameters, take
from mtlib.learners.finetune import layers
from mtlib.learners.gradient import maml
from mtlib.nets import wrap
from mtlib.norm import calibrate
from mtlib.tasks import one_hot

# Networks of another library ------------------------------------------------------------------

SMALL = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
SHORT = {"vocab_size": 30, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
FEW = {"vocab_size": 30, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
CLASSIFIERS = {  # the head's name, and settings
    "Bert": ("classifier", SMALL),
    "DistilBert": ("classifier", {**SHORT, "max_position_embeddings": 16}),
    "Roberta": ("classifier.out_proj", SMALL),
    "GPT2": ("score", {**FEW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}


def logits(net, x):
    return net(**x).logits


def classifier(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        **CLASSIFIERS[name][1], num_labels=3, attn_implementation="eager"
    )
    return seeded(lambda: getattr(transformers, f"{name}ForSequenceClassification")(config)).eval()


@pytest.fixture(params=CLASSIFIERS)
def name(request):
    return request.param


def sentences(tasks=2, rows=6, length=7, seed=0):
    """Token ids with their attention masks, some shorter than others, and one-hot labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (tasks, rows, length), generator=g)
    mask = (
        torch.arange(length) < torch.tensor([length, 4, 5])[torch.arange(rows) % 3, None]
    ).long()
    mask = mask.expand(tasks, -1, -1)
    y = one_hot(torch.arange(rows) % 3, 3, torch.float64).expand(tasks, -1, -1)
    return Batch({"input_ids": ids * mask, "attention_mask": mask}, y)


def texts():
    return Episode(sentences(seed=0), sentences(seed=1))


def looped(objective, phi, data):
    """Value and gradient; a first call may warn that layer norms run in a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer_norm has an inexact")
        return objective.value_and_grad(phi, data)


def test_second_order_through_a_classifier_with_masks(name):
    """Against MAML by hand: torch.func.functional_call on the untouched network, and plain autograd."""
    net = classifier(name)
    ours = wrap(net, CLASSIFIERS[name][0], call=logits)
    learner, episode = maml(ours, cross_entropy, 0.1, 2), texts()
    value, grads = looped(bilevel(learner, cross_entropy), learner.init(), episode)

    start = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
    total = 0.0
    for t in range(2):
        support, query = take(episode, t)
        theta = start
        for _ in range(2):
            out = torch.func.functional_call(net, theta, (), support.x).logits
            loss = cross_entropy(out, support.y)
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {k: v - 0.1 * gk for (k, v), gk in zip(theta.items(), g, strict=True)}
        out = torch.func.functional_call(net, theta, (), query.x).logits
        total = total + cross_entropy(out, query.y) / 2
    right = torch.autograd.grad(total, list(start.values()))
    assert abs(value - total) <= 1e-12
    names = {id(p): k for k, p in ours.named_parameters()}
    right = {names[id(p)]: g for p, g in zip(net.parameters(), right, strict=True)}
    assert largest(grads, right) <= 1e-9
    assert max(g.abs().max() for g in right.values()) > 1e-3


def test_the_halves_are_the_network(name):
    net, head = classifier(name), CLASSIFIERS[name][0]
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    x = take(sentences(), 0).x
    ours = wrap(net, head, call=logits, x=x)
    assert torch.equal(ours(x), net(**x).logits)
    assert ours.body(x).shape == (6, 8) and ours.head is net.get_submodule(head)
    phi = parameters(ours)
    assert torch.equal(features(ours)(phi, x), ours.body(x))
    inner = {k.removeprefix("body.") for k, _ in ours.named_parameters() if k.startswith("body.")}
    assert inner == {k for k, _ in net.named_parameters() if not k.startswith(head)}
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in kept.items()
    }
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    assert isinstance(net.get_submodule(head), nn.Linear)

    moved = {k: v + 0.1 for k, v in phi.items()}
    load(ours, moved)
    assert torch.equal(net(**x).logits, apply(ours)(moved, x))
    assert not torch.equal(net.get_submodule(head).weight, kept[f"{head}.weight"])


def test_a_prefix_may_be_taken_away():
    net = classifier("Bert")
    ours = wrap(net, "classifier", "bert", logits)
    assert set(parameters(ours)) == {
        *(f"body.{k}" for k, _ in net.bert.named_parameters()),
        *("head.weight", "head.bias"),
    }
    x = take(sentences(), 0).x
    assert torch.equal(ours(x), net(**x).logits)
    net.train()
    assert ours.body.whole.dropout.training
    learner = maml(ours, cross_entropy, 0.1, 1)
    again = maml(wrap(net.eval(), "classifier", call=logits), cross_entropy, 0.1, 1)
    value, grads = looped(bilevel(learner, cross_entropy), learner.init(), texts())
    other, right = looped(bilevel(again, cross_entropy), again.init(), texts())
    assert value == other
    assert largest(grads, {k.replace("body.bert.", "body."): g for k, g in right.items()}) == 0
    with pytest.raises(ValueError, match=r"under 'distilbert'; \['pre_classifier.weight'"):
        wrap(classifier("DistilBert"), "classifier", "distilbert", logits)


# Networks of one's own ------------------------------------------------------------------------


class Tower(nn.Module):
    """Two inputs by keyword, a norm, dropout, and an answer in a tuple."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(2, 4)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)

    def forward(self, *, a, b):
        h = torch.cat([self.one(a), self.two(b)], -1)
        return self.fc(self.drop(self.norm(h).tanh())), h


def first(net, x):
    return net(**x)[0]


def tower():
    net = seeded(Tower)
    return net, wrap(net, "fc", call=first)


X = {"a": normal(6, 3), "b": normal(6, 2, seed=1)}


def test_dropout_statistics_and_what_is_frozen():
    net, ours = tower()
    net.eval()
    phi = parameters(wrap(net, "fc", call=first))
    assert {"body.norm.running_mean", "body.norm.running_var"} <= set(phi)
    net.train()
    assert "body.norm.running_mean" not in parameters(ours)
    full = calibrate(ours, parameters(ours), [X])
    h = torch.cat([net.one(X["a"]), net.two(X["b"])], -1)
    assert torch.allclose(full["body.norm.running_mean"], h.mean(0), atol=1e-12)
    assert torch.allclose(full["body.norm.running_var"], h.var(0, correction=0), atol=1e-12)
    load(ours, full)
    assert torch.allclose(net.norm.running_mean, h.mean(0), atol=1e-12)
    ours.eval()
    assert not any(m.training for m in (net.one, net.norm, net.drop, ours.body, ours.body.whole))
    assert torch.equal(ours(X), net.eval()(**X)[0])
    net.one.requires_grad_(False)
    assert {"body.one.weight", "body.one.bias"} <= fixed(ours)
    assert set(net_state(ours, full)) == set(ours.state_dict()) - {"body.norm.num_batches_tracked"}


def test_copies_and_files():
    net, ours = tower()
    ours.eval()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1.0)
        other.body.norm.running_mean.add_(1.0)
    assert not torch.equal(other(X), ours(X)) and not net.norm.running_mean.any()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), ours(X))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), ours(X))


def test_layers_are_the_networks_own():
    own = layers(tower()[1])
    assert [{k.rsplit(".", 1)[0] for k in names} for names in own] == [
        {"body.one"},
        {"body.two", "body.norm"},
        {"head"},
    ]


def test_without_a_head_a_network_is_called_as_a_whole():
    net = seeded(Tower)
    ours = wrap(net, call=first)
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in net.named_parameters()]
    phi = {k: v + 0.1 for k, v in parameters(ours.eval()).items()}
    right = torch.func.functional_call(net, phi, (), X)[0]
    assert torch.equal(apply(ours)(phi, X), right)


def test_what_the_call_does_after_the_head_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    nn.init.zeros_(net[2].weight)  # a temperature cannot be seen in a network that gives zeros
    nn.init.zeros_(net[2].bias)
    x, y = normal(4, 6, 3), one_hot(torch.arange(6) % 3, 3, torch.float64).expand(4, -1, -1)
    data = Batch(x, y)
    for call in (
        lambda net, x: net(x).softmax(-1),
        lambda net, x: net(x) / 2,
        lambda net, x: net(x)[:, :2],
        lambda net, x: net(x).roll(1, -1),
    ):
        with pytest.raises(ValueError, match="after the head"):
            wrap(net, "2", call=call, x=x[0])
        ours = wrap(net, "2", call=call)
        with pytest.raises(ValueError, match="after the head"):
            ours(x[0])
        learner = maml(wrap(net, "2", call=call), cross_entropy, 0.1, 1)
        for chunk in (1, 4):  # in a loop, and under vmap
            with pytest.raises(ValueError, match="after the head"):
                bilevel(learner, cross_entropy, chunk=chunk).value_and_grad(
                    learner.init(), Episode(data, data)
                )
    assert torch.equal(wrap(net, "2", call=lambda net, x: net(x + 1), x=x[0])(x[0]), net(x[0] + 1))


def test_what_cannot_be_wrapped_is_named():
    net = seeded(Tower)
    with pytest.raises(ValueError, match=r"none called 'classifier'. It has one, two, norm, fc"):
        wrap(net, "classifier")
    with pytest.raises(ValueError, match="none called 'drop'"):
        wrap(net, "drop")
    with pytest.raises(ValueError, match="the name of the head, too"):
        wrap(net, body="one")
    with pytest.raises(TypeError, match="call to be a function of 2 arguments"):
        wrap(net, "fc", call=lambda x: x)
    with pytest.raises(ValueError, match=r"a network, an nn.Module"):
        wrap(3)
    with pytest.raises(ValueError, match=r"refers to a module"):
        wrap(net, call=lambda _, x: net(**x)[0])
    with pytest.raises(ValueError, match="call its argument"):
        wrap(net, call=lambda _, x: x["a"], x=X)

    class Shaped(nn.Sequential):
        def forward(self, x):
            return super().forward(x).view(-1, self[1].out_features)

    with pytest.raises(ValueError, match=r"nn.Identity for its 1.*out_features"):
        wrap(Shaped(nn.Linear(3, 4), nn.Linear(4, 2)), "1", x=torch.zeros(1, 3))


def test_tied_weights():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.out.weight = self.words.weight

        def forward(self, ids):
            return self.out(self.words(ids).mean(1)), None

    net = seeded(Language)
    ids = torch.arange(12).reshape(3, 4) % 7
    with pytest.raises(ValueError, match=r"out and the body share words.weight"):
        wrap(net, "out", call=lambda net, x: net(x)[0])
    ours = wrap(net, call=lambda net, x: net(x)[0])
    phi = {k: v + 0.1 for k, v in parameters(ours).items()}
    right = torch.func.functional_call(net, phi, (ids,))[0]
    assert torch.equal(apply(ours)(phi, ids), right)
