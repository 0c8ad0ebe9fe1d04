"""Any x, and any network: nests of tensors go through everything, and networks made elsewhere are wrapped."""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import images, largest, normal, seeded
from test_contract import ROWS, WAYS
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations, weight_norm

from mtlib.bilevel import (
    bilevel,
    checkpointed,
    first_order,
    implicit,
    multi_step,
    neumann,
    secant,
    unrolled,
)
from mtlib.core import (
    Batch,
    Episode,
    apply,
    features,
    fixed,
    lend,
    load,
    move,
    net_state,
    over,
    parameters,
    risk,
    rows,
    start,
    take,
)
from mtlib.evaluate import answers, evaluate
from mtlib.joint import joint, risks
from mtlib.learners.finetune import finetune, fresh_head, layers
from mtlib.learners.gradient import anil, maml
from mtlib.learners.hyper import weight_decay
from mtlib.learners.metric import protonet
from mtlib.nets import conv4, two_halves, wrap
from mtlib.norm import calibrate
from mtlib.tasks import check_draw, mixture, one_hot
from mtlib.train import fit
from mtlib.transfer.align import coral
from mtlib.transfer.critics import adda, adversary, dann
from mtlib.transfer.unseen import (
    domain_mixup,
    group_dro,
    group_weights,
    held_out,
    irm,
    mixup,
    mldg,
    vrex,
)
from mtlib.transfer.weights import balances, gradnorm, log_variances, pcgrad, uncertainty

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


IN_A_LOOP = pytest.mark.filterwarnings(  # transformers looks at the mask's values
    "ignore:tasks run in a loop", "ignore:an embedding with padding_idx"
)


@IN_A_LOOP
def test_second_order_through_a_classifier_with_masks(name):
    """Against MAML by hand: torch.func.functional_call on the untouched network, and plain autograd."""
    net = classifier(name)
    ours = wrap(net, CLASSIFIERS[name][0], call=logits)
    learner, episode = maml(ours, cross_entropy, 0.1, 2), texts()
    value, grads = bilevel(learner, cross_entropy).value_and_grad(learner.init(), episode)

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
    encoded = pytest.importorskip("transformers").BatchEncoding(x)
    assert torch.equal(apply(ours)(phi, encoded), ours(x))
    assert type(move(encoded, "cpu")) is dict and rows(encoded) == 6
    with pytest.raises(ValueError, match=r"ForSequenceClassification cannot read x.*a mapping"):
        apply(ours)(phi, x["input_ids"])
    assert start(protonet(ours), phi).left == tuple(k for k in phi if k.startswith("head."))
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


@IN_A_LOOP
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
    value, grads = bilevel(learner, cross_entropy).value_and_grad(learner.init(), texts())
    other, right = bilevel(again, cross_entropy).value_and_grad(again.init(), texts())
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


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_a_head_with_weight_norm(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), norm(nn.Linear(4, WAYS))).double()
    flat, _ = draws("dict")
    ours, plain = (maml(n, cross_entropy, 0.1, 2) for n in (wrap(net, "2"), net))
    value, grads = bilevel(ours, cross_entropy, chunk=1).value_and_grad(ours.init(), flat)
    right, wanted = bilevel(plain, cross_entropy, chunk=1).value_and_grad(plain.init(), flat)
    named = {k.replace("head.", "2.").removeprefix("body."): g for k, g in grads.items()}
    assert value == right and largest(named, wanted) <= 1e-12


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


# Every learner on a nest is the same learner on one tensor --------------------------------------


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Mapped(UserDict):
    """A Mapping that is no dict, as a tokenizer's answer is."""


NESTS = {  # six columns of a tensor in a nest of tensors
    "dict": lambda x: {"image": x[..., :2], "table": x[..., 2:]},
    "deep": lambda x: {"a": [x[..., :1], (x[..., 1:3],)], "b": {"c": x[..., 3:]}},
    "tuple": lambda x: (x[..., :2], x[..., 2:]),
    "named tuple": lambda x: Pair(x[..., :3], x[..., 3:]),
    "list": lambda x: [x[..., :5], x[..., 5:]],
    "mapping": lambda x: Mapped(image=x[..., :2], table=x[..., 2:]),
}


def leaves(x):
    found = []
    over(found.append, x)
    return found


class Joined(nn.Sequential):
    """The layers read the tensors of x side by side."""

    def forward(self, x):
        return super().forward(torch.cat(leaves(x), -1))


def network(body=nn.Sequential):
    return seeded(lambda: two_halves(body(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, WAYS)))


def twins(make):
    """The learner on one tensor and on nests: they draw the same entries of their own."""
    torch.manual_seed(1)
    plain = make(network())
    torch.manual_seed(1)
    return plain, make(network(Joined))


def vectors(tasks=3, rows=6, seed=0):
    x = normal(tasks, rows, 6, seed=seed)
    return Batch(x, one_hot(torch.arange(rows) % WAYS, WAYS, x.dtype).expand(tasks, -1, -1))


def draws(nest, step=0):
    """The same draw twice: on one tensor, and on a nest."""
    flat = Episode(vectors(seed=2 * step), vectors(rows=9, seed=2 * step + 1))
    return flat, Episode(*(b._replace(x=NESTS[nest](b.x)) for b in flat))


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("row", ROWS)
def test_a_learner_reads_nests(row, nest):
    plain, ours = twins(ROWS[row].make)
    phi = plain.init()
    assert largest(phi, ours.init()) == 0
    flat, nested = draws(nest)
    for t in range(2):
        a, b = take(flat, t), take(nested, t)
        theta = ours.adapt(phi, b.support)
        right = plain.predict(plain.adapt(phi, a.support), a.query.x)
        assert torch.equal(ours.predict(theta, b.query.x), right)


@pytest.mark.parametrize("row", ROWS)
def test_a_learners_gradient_is_the_same_on_nests(row, no_kernel):
    plain, ours = twins(ROWS[row].make)
    loss, phi = ROWS[row].loss, plain.init()
    flat, nested = draws("deep")
    for chunk in (1, None):
        value, grads = bilevel(ours, loss, chunk=chunk).value_and_grad(phi, nested)
        right, wanted = bilevel(plain, loss, chunk=chunk).value_and_grad(phi, flat)
        assert value == right and grads.keys() == wanted.keys()
        assert largest(grads, wanted) <= 1e-12


WAYS_TO_DIFFERENTIATE = {
    "unrolled": unrolled,
    "first_order": first_order,
    "secant": secant,
    "checkpointed": checkpointed,
    "multi_step": multi_step([0.5, 0.5]),
    "implicit": implicit(0.5),
    "neumann": implicit(0.5, solver=neumann),
}


@pytest.mark.parametrize("nest", ["mapping", "named tuple"])
@pytest.mark.parametrize("way", WAYS_TO_DIFFERENTIATE)
def test_every_hypergradient_is_the_same_on_nests(way, nest):
    plain, ours = twins(lambda net: maml(net, cross_entropy, 0.1, 2, strength=0.5))
    phi, (flat, nested) = plain.init(), draws(nest)
    objectives = [bilevel(m, cross_entropy, WAYS_TO_DIFFERENTIATE[way]) for m in (ours, plain)]
    (value, grads), (right, wanted) = (
        o.value_and_grad(phi, d) for o, d in zip(objectives, (nested, flat), strict=True)
    )
    assert value == right and largest(grads, wanted) <= 1e-12


def test_joint_training_is_the_same_on_nests():
    nets, phi = (network(), network(Joined)), parameters(network())
    flat, nested = (d.query for d in draws("deep"))
    critic = seeded(lambda: nn.Linear(5, 3))
    phi |= adversary(critic)
    for options in (
        {},
        {"weights": (0.2, 0.3, 0.5)},
        {"penalties": [coral(0.5), dann(critic)]},
        {"columns": [slice(0, 3)] * 3},
    ):
        right, ours = (joint(net, cross_entropy, **options) for net in nets)
        value, grads = ours.value_and_grad(phi, nested)
        wanted, others = right.value_and_grad(phi, flat)
        assert value == wanted and largest(grads, others) <= 1e-12
    both = [risks(net, cross_entropy)(phi, d) for net, d in zip(nets, (flat, nested), strict=True)]
    assert torch.equal(*both)
    two = [take(d, slice(2)) for d in (flat, nested)]
    phi = {**parameters(nets[0]), **adversary(seeded(lambda: nn.Linear(5, 2)))}
    values = [
        adda(net, parameters(net), nn.Linear(5, 2).double())(phi, d)
        for net, d in zip(nets, two, strict=True)
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("nest", ["dict", "mapping"])
def test_training_resuming_and_scores_are_the_same_on_nests(nest, tmp_path, no_kernel):
    plain, ours = twins(lambda net: maml(net, cross_entropy, 0.1, 2))

    def trained(learner, which, steps, name):
        return fit(
            bilevel(learner, cross_entropy),
            learner.init(),
            lambda step: draws(nest, step)[which],
            steps,
            checkpoint=tmp_path / name,
        )

    right = trained(plain, 0, 6, "flat")
    trained(ours, 1, 3, "nested")
    run = trained(ours, 1, 6, "nested")
    assert run.losses == right.losses and largest(run.params, right.params) == 0
    with pytest.raises(ValueError, match="stream"):  # another draw at the first step
        fit(
            bilevel(ours, cross_entropy),
            ours.init(),
            lambda step: draws(nest, step + 1)[1],
            6,
            checkpoint=tmp_path / "nested",
        )
    scores = [
        evaluate(m, run.params, lambda step, w=w: draws(nest, step)[w], 9, mse_loss)
        for w, m in enumerate((plain, ours))
    ]
    assert torch.equal(scores[0].values, scores[1].values)
    both = [answers(m, run.params, d) for m, d in zip((plain, ours), draws(nest), strict=True)]
    assert torch.equal(*both)


def test_threads_share_nests():
    """Convolutions run in a loop, on several threads."""
    halves = conv4(WAYS, width=4, size=16, seed=0).double()

    class Sum(nn.Sequential):
        def forward(self, x):
            return super().forward(x["image"] + x["noise"])

    net = two_halves(Sum(*halves.body), halves.head)
    flat = images()
    nested = Episode(
        *(b._replace(x={"image": b.x - 0.5, "noise": torch.full_like(b.x, 0.5)}) for b in flat)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        results = []
        for network_, data in ((halves, flat), (net, nested)):
            learner = maml(network_, cross_entropy, 0.1, 2)
            results.append(bilevel(learner, cross_entropy).value_and_grad(learner.init(), data))
    finally:
        torch.set_num_threads(before)
    assert abs(results[0][0] - results[1][0]) <= 1e-12
    assert largest(results[0][1], results[1][1]) <= 1e-9


# Hypothesis: nests of any form ----------------------------------------------------------------

NESTED = st.recursive(
    st.lists(st.integers(1, 3), max_size=2).map(lambda shape: torch.zeros(4, 3, *shape)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(Mapped),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=5,
)


@given(NESTED, st.integers(0, 3))
def test_any_nest_is_taken_moved_and_counted(x, t):
    part = take(x, t)
    assert [d.shape for d in leaves(part)] == [d.shape[1:] for d in leaves(x)]
    assert all(d.dtype == torch.float64 for d in leaves(over(lambda d: d.double(), part)))
    assert (rows(x), rows(part)) == (4, 3)
    assert [d.device.type for d in leaves(move(x, "cpu"))] == ["cpu"] * len(leaves(x))
    check_draw(Batch({"x": x}, torch.zeros(4, 3, 2)))
    with pytest.raises(ValueError, match=r"one number of rows.*\(2,\)"):
        rows({"x": x, "short": torch.zeros(2)})


# What is refused, and how -----------------------------------------------------------------------


def test_tensors_with_other_numbers_of_rows_are_named():
    learner = protonet(network(Joined))
    x = {"image": normal(6, 2), "table": normal(5, 4)}
    with pytest.raises(
        ValueError, match=r"one number of rows.*'image': \(6, 2\), 'table': \(5, 4\)"
    ):
        learner.adapt(learner.init(), Batch(x, torch.eye(WAYS).repeat(2, 1)))
    draw = Batch(over(lambda d: d[None], x), torch.zeros(1, 6, WAYS))
    with pytest.raises(ValueError, match=r"'image': \(1, 6, 2\), 'table': \(1, 5, 4\)"):
        fit(joint(network(Joined), cross_entropy), parameters(network()), lambda step: draw, 1)
    uneven = Batch({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, torch.zeros(2, 3, WAYS))
    with pytest.raises(ValueError, match="'a': 2, 'b': 3"):
        joint(network(Joined), cross_entropy).value_and_grad(parameters(network()), uneven)


class Answer(dict):
    """An object with logits, as networks of other libraries give it."""


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (
            lambda out: (out, out),
            r"got tuple: `mtlib.nets.wrap\(net, call=lambda net, x: net\(x\)\[0\]\)",
        ),
        (lambda out: Answer(logits=out), r"got Answer: .*net\(x\).logits"),
    ],
)
def test_a_network_that_gives_no_tensor(answer, advice):
    class Object(nn.Linear):
        def forward(self, x):
            return answer(super().forward(x))

    net = Object(6, WAYS).double()
    learner, (flat, _) = maml(net, cross_entropy, 0.1, 1), draws("dict")
    for call in (
        lambda: bilevel(learner, cross_entropy).value_and_grad(learner.init(), flat),
        lambda: joint(net, cross_entropy).value_and_grad(learner.init(), flat.query),
        lambda: evaluate(learner, learner.init(), lambda step: flat, 2, mse_loss),
    ):
        with pytest.raises(ValueError, match=advice):
            call()


def test_a_network_that_wants_keywords():
    net, learner = classifier("Bert"), None
    learner = maml(net, cross_entropy, 0.1, 1)
    for call in (
        lambda: bilevel(learner, cross_entropy).value_and_grad(learner.init(), texts()),
        lambda: apply(seeded(Tower))(parameters(seeded(Tower)), X),
    ):
        with pytest.raises(ValueError, match=r"for keywords.*net\(\*\*x\)"):
            call()


def test_numpy_is_named():
    learner, (flat, _) = maml(network(), cross_entropy, 0.1, 1), draws("dict")
    support = take(flat, 0).support
    for x in (support.x.numpy(), {"a": support.x.numpy()}):
        with pytest.raises(TypeError, match=r"ndarray; torch.from_numpy converts"):
            learner.adapt(learner.init(), Batch(x, support.y))
    for part in ("x", "y"):
        batch = flat.query._replace(**{part: getattr(flat.query, part).numpy()})
        with pytest.raises(
            TypeError, match=f"{part} of the batch.*ndarray; convert with torch.from_numpy"
        ):
            fit(joint(network(), cross_entropy), learner.init(), lambda step, b=batch: b, 1)
        with pytest.raises(
            TypeError, match=f"{part} of the query.*ndarray; convert with torch.from_numpy"
        ):
            evaluate(learner, learner.init(), lambda step, b=batch: Episode(flat.support, b), 2)


# Targets: their dtype, and class numbers --------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_labels_take_the_networks_dtype(row):
    """A float64 network with float32 one-hot rows: the numbers are those of float64 rows, exactly."""
    learner = twins(ROWS[row].make)[0]
    loss, phi, (flat, _) = ROWS[row].loss, learner.init(), draws("dict")
    short = Episode(*(b._replace(y=b.y.float()) for b in flat))
    value, grads = bilevel(learner, loss).value_and_grad(phi, short)
    right, wanted = bilevel(learner, loss).value_and_grad(phi, flat)
    assert value == right and value.dtype == torch.float64 and largest(grads, wanted) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_of_single_precision(dtype):
    prediction, y = normal(6, 3).to(dtype), torch.eye(3).repeat(2, 1)
    for loss in (cross_entropy, mse_loss):
        assert torch.equal(risk(loss, prediction, y), loss(prediction.float(), y))
    assert risk(mse_loss, prediction, y.to(dtype)).dtype == dtype
    assert risk(mse_loss, prediction.float(), y.double()).dtype == torch.float32


@pytest.mark.parametrize("row", ROWS)
def test_class_numbers_are_refused_with_advice(row):
    learner = twins(ROWS[row].make)[0]
    loss, (flat, _) = ROWS[row].loss, draws("dict")
    numbers = Episode(*(b._replace(y=b.y.argmax(-1)) for b in flat))
    one = take(numbers, 0)
    if row != "as_is":
        with pytest.raises(ValueError, match=r"one_hot\(y, ways\)"):
            learner.predict(learner.adapt(learner.init(), one.support), one.query.x)
    for draw in (numbers, flat._replace(query=numbers.query)):
        with pytest.raises(ValueError, match=r"one_hot\(y, ways\)"):
            bilevel(learner, loss).value_and_grad(learner.init(), draw)
        with pytest.raises(ValueError, match=r"one_hot\(y, ways\)|one-hot rows"):
            evaluate(learner, learner.init(), lambda step, d=draw: d, 2)
        with pytest.raises(ValueError, match=r"one_hot\(y, ways\)"):
            fit(bilevel(learner, loss), learner.init(), lambda step, d=draw: d, 1)


def test_labels_that_are_missing_are_any_with_weight_0():
    x, known = normal(2, 6, 6), vectors(2).y
    net = network()
    options = [{}, {"penalties": [coral(0.5)]}, {"weights": (1, 0)}]
    for y in (torch.full_like(known, torch.nan), None):
        for given_ in options:
            with pytest.raises((ValueError, TypeError), match=r"any label, with weight 0"):
                fit(
                    joint(net, cross_entropy, **given_),
                    parameters(net),
                    lambda s, y=y: Batch(x, y),
                    1,
                )
    with pytest.raises(TypeError, match="got NoneType"):
        joint(net, cross_entropy)(parameters(net), Batch(x, None))
    for y in (torch.full((6,), -1), torch.full((6,), torch.nan), None):
        with pytest.raises((ValueError, TypeError), match="any label, with weight 0"):
            mixture(Batch(x[0], known[0].argmax(1)), Batch(x[1], y), batch=4, seed=0)
    for numbers in (
        {"weights": (1, 0)},
        {"penalties": [coral(0.5)]},
        {"columns": [slice(0, 3)] * 2},
    ):
        objective = joint(net, cross_entropy, **numbers)
        with pytest.raises(ValueError, match=r"one_hot\(y, ways\)"):
            objective(parameters(net), Batch(x, known.argmax(-1)))
    any_label = torch.stack([known[0], known[1].roll(1, -1)])
    objective = joint(net, cross_entropy, (1, 0))
    assert objective(parameters(net), Batch(x, any_label)) == cross_entropy(net(x[0]), known[0])


# The same learners on a classifier of another library ------------------------------------------


class Halved(nn.Module):
    """A BERT classifier's body, written by hand."""

    def __init__(self, net):
        super().__init__()
        self.bert, self.dropout = net.bert, net.dropout

    def forward(self, x):
        return self.dropout(self.bert(**x)[1])


LEARNERS = (
    "anil",
    "boil",
    "protonet",
    "lora",
    "finetune",
    "discriminative",
    "ridge",
    "cnp",
    "maml",
)


@IN_A_LOOP
@pytest.mark.parametrize("row", LEARNERS)
def test_a_wrapped_classifier_is_its_halves_by_hand(row):
    net = classifier("Bert")
    learners = []
    for halves in (two_halves(Halved(net), net.classifier), wrap(net, "classifier", call=logits)):
        torch.manual_seed(0)
        learners.append(ROWS[row].make(halves))
    plain, ours = learners
    phi, loss = plain.init(), ROWS[row].loss
    assert largest(phi, ours.init()) == 0
    right, wanted = bilevel(plain, loss).value_and_grad(phi, texts())
    value, grads = bilevel(ours, loss).value_and_grad(phi, texts())
    assert value == right and largest(grads, wanted) <= 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = [answers(m, phi, texts()) for m in learners]
    assert torch.equal(*both)


@IN_A_LOOP
def test_a_wrapped_classifier_trains_and_is_scored(tmp_path):
    """The user's network has dropout on; scores are taken without, and what is frozen stays."""
    net = classifier("Bert").train()
    net.bert.embeddings.requires_grad_(False)
    ours = wrap(net, "classifier", "bert", logits)
    learner = anil(ours, cross_entropy, 0.1, 2)

    def stream(step):
        return Episode(sentences(seed=2 * step), sentences(seed=2 * step + 1))

    run = fit(bilevel(learner, cross_entropy), learner.init(), stream, 3)
    for steps in (2, 3):
        objective = bilevel(learner, cross_entropy)
        again = fit(objective, learner.init(), stream, steps, checkpoint=tmp_path / "a")
    scores = [evaluate(learner, run.params, stream, 4, cross_entropy) for _ in range(2)]
    assert again.losses == run.losses and largest(run.params, again.params) == 0
    moved = {k for k, v in run.params.items() if not torch.equal(v, parameters(ours)[k])}
    assert "body.pooler.dense.weight" in moved and "head.weight" in moved
    assert not any(k.startswith("body.embeddings") for k in moved)
    assert torch.equal(scores[0].values, scores[1].values) and net.training

    load(ours, run.params).eval()
    support, query = take(stream(0), 0)
    out = cross_entropy(net(**query.x).logits, query.y)  # the network itself, before any adaptation
    theta = run.params
    assert torch.equal(out, risk(cross_entropy, apply(ours)(theta, query.x), query.y))
    adapted = learner.adapt(theta, support)
    load(ours, adapted)
    assert torch.equal(net(**query.x).logits, learner.predict(adapted, query.x))


def test_a_part_may_be_wrapped():
    """A recurrent body gives a tuple, another library's body an object."""
    recurrent = seeded(lambda: nn.LSTM(2, 5, batch_first=True))
    x, y = normal(3, 6, 4, 2), vectors().y
    episode = Episode(Batch(x, y), Batch(x.flip(0), y))
    head = seeded(lambda: nn.Linear(5, WAYS))
    learner = maml(two_halves(recurrent, head), cross_entropy, 0.1, 2)
    with pytest.raises(ValueError, match=r"must be Tensor, not tuple.*wrap\(part"):
        bilevel(learner, cross_entropy, chunk=1).value_and_grad(learner.init(), episode)
    with pytest.raises(ValueError, match=r"expected LSTM to give a tensor, got tuple"):
        protonet(two_halves(recurrent, head)).adapt(learner.init(), take(episode, 0).support)

    body = wrap(recurrent, call=lambda net, x: net(x)[0][:, -1])
    learner = maml(two_halves(body, head), cross_entropy, 0.1, 2)
    assert set(learner.init()) == {
        *(f"body.{k}" for k, _ in recurrent.named_parameters()),
        *("head.weight", "head.bias"),
    }
    value, _ = bilevel(learner, cross_entropy, chunk=1).value_and_grad(learner.init(), episode)
    total = 0.0
    for t in range(3):
        theta = {k: v.detach().requires_grad_() for k, v in learner.init().items()}
        (sx, sy), (qx, qy) = take(episode, t)

        def loss(theta, x, y):
            of_body = {k[5:]: v for k, v in theta.items() if k.startswith("body.")}
            z = torch.func.functional_call(recurrent, of_body, (x,))[0][:, -1]
            return cross_entropy(z @ theta["head.weight"].mT + theta["head.bias"], y)

        for _ in range(2):
            g = torch.autograd.grad(loss(theta, sx, sy), list(theta.values()))
            theta = {k: v - 0.1 * gk for (k, v), gk in zip(theta.items(), g, strict=True)}
        total += loss(theta, qx, qy).item() / 3
    assert abs(value - total) <= 1e-12

    bert = classifier("Bert").bert
    body = wrap(bert, call=lambda net, x: net(**x).pooler_output)
    learner = protonet(two_halves(body, nn.Linear(8, WAYS).double()))
    support = take(sentences(), 0)
    theta = learner.adapt(learner.init(), support)
    z = bert(**support.x).pooler_output
    assert torch.allclose(theta["prototypes"], support.y.mT @ z / 2, atol=1e-12)


def test_features_of_more_axes_are_refused():
    images = nn.Sequential(nn.Conv2d(1, 2, 3)).double()
    net = two_halves(images, nn.Sequential(nn.Flatten(), nn.Linear(8, WAYS).double()))
    learner = protonet(net)
    x = normal(6, 1, 4, 4)
    with pytest.raises(ValueError, match=r"features \(N, D\).*got \(6, 2, 2, 2\)"):
        learner.adapt(learner.init(), Batch(x, torch.eye(WAYS).double().repeat(2, 1)))


def test_tokens_and_masks_go_as_they_are():
    """Integers and truth values: as leaves of x, through training and scores."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, 5)

        def forward(self, x):
            mask = x["mask"]
            assert mask.dtype == torch.bool and x["ids"].dtype == torch.int64
            z = self.words(x["ids"]) * mask[..., None]
            return z.sum(1) / mask.sum(1, keepdim=True)

    def stream(step):
        def batch(seed):
            ids, mask = sentences(seed=seed).x.values()
            return Batch({"ids": ids, "mask": mask.bool()}, sentences(seed=seed).y)

        return Episode(batch(2 * step), batch(2 * step + 1))

    net = seeded(lambda: two_halves(Bag(), nn.Linear(5, WAYS)))
    for learner in (
        maml(net, cross_entropy, 0.1, 1),
        fresh_head(finetune(net, cross_entropy, 0.1, 2), net),
    ):
        run = fit(bilevel(learner, cross_entropy), learner.init(), stream, 2)
        assert torch.isfinite(torch.tensor(run.losses)).all()
        assert all(v.dtype == torch.float64 for v in run.params.values())
        theta = learner.adapt(run.params, take(stream(0), 0).support)
        assert theta["head.weight"].dtype == torch.float64
        evaluate(learner, run.params, stream, 4)
    z = torch.stack([net.body(take(stream(0).query, t).x).mean(0) for t in range(2)])
    assert z.shape == (2, 5)
    decay = weight_decay(net, cross_entropy, 0.1, 1)
    assert (
        decay.adapt(decay.init(), take(stream(0), 0).support)["head.weight"].dtype == torch.float64
    )


def test_a_network_without_parameters_reads_nests():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(2))

        def forward(self, x):
            return x["a"] + x["b"] + self.shift

    x = {"a": normal(3, 2), "b": normal(3, 2, seed=1)}
    assert torch.equal(apply(Sum())({}, x), x["a"] + x["b"] + 1)
    assert torch.equal(lend(Sum(), {}, x), x["a"] + x["b"] + 1)


def test_a_metric_gets_labels_of_the_networks_dtype():
    learner, (flat, _) = protonet(network()), draws("dict")
    short = Episode(*(b._replace(y=b.y.float()) for b in flat))
    scores = [
        evaluate(learner, learner.init(), lambda step, d=d: d, 3, cross_entropy).values
        for d in (flat, short)
    ]
    assert torch.equal(*scores)


def test_a_dropout_after_the_head_is_refused_where_it_drops():
    class Late(nn.Sequential):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    net, x = Late(nn.Dropout(0.5), nn.Linear(3, 4)).double(), normal(6, 3)
    ours = wrap(net.eval(), "1", x=x)
    assert torch.equal(ours(x), net(x))
    ours.train()
    with pytest.raises(ValueError, match="a dropout"):
        ours(x)
    plain = wrap(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4)).double(), "1")
    torch.manual_seed(0)
    first_call = plain(x)  # the look takes no random numbers
    torch.manual_seed(0)
    assert torch.equal(first_call, plain(x))


def test_a_child_that_knows_its_parent():
    class Child(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.parent[0].scale

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.child, self.fc = Child(3, 4), nn.Linear(4, 2)
            self.child.parent = [self]

        def forward(self, x):
            return self.fc(self.child(x))

    net, x = seeded(Parent), normal(5, 3)
    ours = wrap(net, "fc", x=x)
    phi = parameters(ours)
    phi["body.scale"] += 1
    assert torch.allclose(apply(ours)(phi, x), net.fc(net.child(x) * 3 / 2), atol=1e-12)
    net.child.parent = weakref.ref(net)
    with pytest.raises(ValueError, match="refers to a module"):
        wrap(net, "fc")


OBJECTIVES = {  # of several domains or data sets: (network) -> objective, and what φ has besides
    "irm": (lambda net: irm(net, cross_entropy, 1.0), dict),
    "vrex": (lambda net: vrex(net, cross_entropy, 1.0), dict),
    "group_dro": (lambda net: group_dro(net, cross_entropy), lambda: group_weights(3)),
    "uncertainty": (lambda net: uncertainty(net, cross_entropy), lambda: log_variances(3)),
    "gradnorm": (lambda net: gradnorm(net, cross_entropy), lambda: balances(torch.ones(3))),
    "pcgrad": (lambda net: pcgrad(net, cross_entropy), dict),
}


@pytest.mark.parametrize("nest", ["deep", "tuple"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_several_domains_are_the_same_on_nests(name, nest):
    make, extra = OBJECTIVES[name]
    phi = {**parameters(network()), **move(extra(), "cpu")}
    both = [
        make(net).value_and_grad(phi, draw.query)
        for net, draw in zip((network(), network(Joined)), draws(nest), strict=True)
    ]
    assert both[0][0] == both[1][0] and largest(both[0][1], both[1][1]) <= 1e-12


def test_domains_held_out_and_mixed_may_be_nests():
    flat, nested = (d.query for d in draws("deep"))
    episodes = [held_out(lambda step, d=d: d, 0)(0) for d in (flat, nested)]
    both = [
        mldg(net, cross_entropy, 0.1, 1.0).value_and_grad(parameters(network()), e)
        for net, e in zip((network(), network(Joined)), episodes, strict=True)
    ]
    assert both[0][0] == both[1][0] and largest(both[0][1], both[1][1]) <= 1e-12
    for mix in (mixup, domain_mixup):
        mixed = [mix(lambda step, d=d: d, 1.0, 0)(0) for d in (flat, nested)]
        assert torch.equal(mixed[0].x, torch.cat(leaves(mixed[1].x), -1))
