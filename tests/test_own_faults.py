"""The table of faults on the page on one's own data: each row provoked, its words heard, its remedy tried."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_own_page import TEXT
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, checkpointed, first_order
from mtlib.book import yours
from mtlib.core import Batch, Episode, load, parameters, start, take
from mtlib.data.glyphs import glyphs
from mtlib.evaluate import LossRose, best_of, evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import maml
from mtlib.learners.lora import lora, merged
from mtlib.learners.metric import protonet
from mtlib.models.backbones import split
from mtlib.models.encoders import small_bert
from mtlib.nets import conv4, mlp, two_halves, wrap
from mtlib.norm import calibrate
from mtlib.tasks import ClassSet, episodes, mixture, one_hot
from mtlib.train import fit

TABLE = TEXT.partition("| what you see | why | what to do |")[2].partition("\n\n")[0]
SAID = [row.split(" | ")[0].lstrip("| ") for row in TABLE.splitlines()[2:]]
QUOTED = [re.findall(r'"(.+?)"', said)[0] for said in SAID if '"' in said]
TESTED = set(re.findall(r'heard\(\s*"(.+?)"', Path(__file__).read_text("utf8")))


def heard(words: str) -> str:
    """A pattern of the page's words; they must stand in the table."""
    assert words in QUOTED, words
    return re.escape(words)


def made(*shape: int, kind=torch.randn, classes: int = 8) -> ClassSet:
    """Twelve items of a shape for each of some classes that lie apart."""
    torch.manual_seed(0)
    return named([kind(12, *shape) + 2 * c for c in range(classes)])


def named(items: list) -> ClassSet:
    return ClassSet(items, [*map(str, range(len(items)))], "made")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 4, shape)


def drawn(data: ClassSet, **how):
    return episodes(data, 3, 2, 3, tasks=2, seed=0, **how)


def net(outputs: int = 3, inputs: int = 4) -> nn.Module:
    return mlp(inputs, (16,), outputs, seed=0)


def scored(net: nn.Module, stream, **how) -> float:
    learner = maml(net, cross_entropy, 0.1, 1)
    return evaluate(learner, parameters(net), stream, 4, progress=False, **how).mean


def learned(net: nn.Module, stream, steps: int = 2, **how):
    return fit(
        bilevel(maml(net, cross_entropy, 0.1, 1), cross_entropy, **how),
        parameters(net),
        stream,
        steps,
        progress=False,
    ).params


def test_running_statistics():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(400, 4)
    y = (x[:, 0] + x[:, 1] > 10).long()
    own = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    stream = mixture(Batch(x, y), batch=64, seed=0)
    adam = partial(torch.optim.Adam, lr=0.01)
    phi = fit(joint(own, cross_entropy), parameters(own), stream, 400, adam, progress=False).params
    with pytest.raises(ValueError, match=heard("expected 1.running_mean, of the norm BatchNorm1d")):
        load(own, phi)
    right = load(own, calibrate(own, phi, [x])).eval()(x).argmax(1) == y
    assert right.float().mean() > 0.95


def test_all_frozen_and_the_exercise():
    own, stream = net(), drawn(made(4))
    own.requires_grad_(False)
    words = heard("expected parameters named * that may move; all 4 are frozen")
    with pytest.raises(ValueError, match=words):
        learned(own, stream)
    own.head.requires_grad_(True)
    before, after = parameters(own), learned(own, stream)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"head.weight", "head.bias"}


def test_a_head_of_another_width():
    stream = drawn(made(4))
    for outputs in (1, 5):
        with pytest.raises(
            ValueError, match=heard("expected predictions and targets of one shape")
        ):
            scored(net(outputs), stream)
    phi = start(maml(net(3), cross_entropy, 0.1, 1), parameters(net(5))).params
    assert phi["head.weight"].shape == (3, 16)
    assert torch.equal(phi["body.0.weight"], parameters(net(5))["body.0.weight"])


def test_a_regression_without_a_metric():
    batch = Batch(torch.randn(2, 6, 4), torch.randn(2, 6, 1))
    learner = maml(net(1), mse_loss, 0.1, 1)
    asked = partial(evaluate, learner, learner.init(), lambda step: Episode(batch, batch), 2)
    with pytest.raises(ValueError, match=heard("expected at least two classes, y one-hot")):
        asked(progress=False)
    assert asked(metric=mse_loss, progress=False).mean > 0


def test_class_numbers():
    x, y = torch.randn(2, 6, 4), torch.arange(6).expand(2, -1) % 3
    wrong, right = Batch(x, y), Batch(x, torch.stack([one_hot(row, 3) for row in y]))
    asked = [Episode(right._replace(x=x + step), right) for step in range(2)]
    with pytest.raises(ValueError, match=heard("Labels are one-hot rows")):
        scored(net(), lambda step: Episode(wrong, wrong))
    assert 0 <= scored(net(), asked.__getitem__) <= 1


def test_tokens():
    data = made(5, kind=tokens, classes=4)
    words = heard("must have the same dtype, but got Long and Float")
    with pytest.raises(ValueError, match=words):
        scored(net(inputs=5), drawn(data))
    with pytest.raises(ValueError, match=heard("Indices such as tokens stay as they are")):
        drawn(data, cast=torch.float32)(0)
    own = two_halves(nn.Sequential(nn.Embedding(20, 8), nn.Flatten()), nn.Linear(40, 3))
    assert 0 <= scored(own, drawn(data)) <= 1


def test_keywords_objects_and_names_of_heads():
    words = [*yours.ACTS, *yours.THINGS, *yours.OTHERS]
    own, read = yours.Stand(len(words) + 2, 3), yours.Words(words)
    texts = [read(said, max_length=10) for said in [*yours.requests().values()][:8]]
    stream = drawn(named(texts))
    with pytest.raises(ValueError, match=heard("It is called with x as one argument")):
        scored(own, stream)
    with pytest.raises(ValueError, match=heard("expected call(net, x) to give a tensor")):
        scored(wrap(own, "classifier", call=lambda net, x: net(**x)), stream)
    with pytest.raises(ValueError, match=heard("expected the name of the network's head")) as said:
        wrap(own, "fc", call=lambda net, x: net(**x).logits)
    assert "classifier" in str(said.value)
    right = wrap(own, "classifier", call=lambda net, x: net(**x).logits)
    assert 0 <= scored(right, stream) <= 1


def test_bytes():
    data = named([(255 * torch.rand(12, 3, 16, 16)).byte() for _ in range(8)])
    own = conv4(3, 3, 8, 16, seed=0)
    with pytest.raises(ValueError, match=heard("Bytes become 0 to 1 with cast")):
        scored(own, drawn(data))
    assert 0 <= scored(own, drawn(data, cast=torch.float32)) <= 1
    reading = split(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), ways=3, size=16)
    for wrong in (data, made(3, 16, 16)):
        with pytest.raises(ValueError, match=heard("expected images in [0, 1]")):
            scored(reading, drawn(wrong))
    assert 0 <= scored(reading, drawn(data, cast=torch.float32)) <= 1


class Last(nn.Module):
    """What an LSTM says at the end."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


@pytest.mark.fast
def test_a_layer_without_a_rule_runs_in_a_loop_with_the_same_result():
    torch.manual_seed(0)
    own, stream = two_halves(Last(), nn.Linear(8, 3)), drawn(made(5, 4))
    with pytest.warns(UserWarning, match=heard("tasks run in a loop")):
        one = learned(own, stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = learned(own, stream, chunk=1)
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def test_an_inner_rate_too_high():
    stream, own = drawn(made(4)), net()

    def quality(rate: float):
        return evaluate(maml(own, cross_entropy, rate, 3), phi, stream, 20, progress=False)

    phi = parameters(own)
    with pytest.warns(LossRose, match=heard("the inner steps end above where they began")):
        quality(50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best may lie at an edge of so short a grid
        assert best_of((0.1, 1.0, 50.0), quality).setting < 50


def test_entries_of_lora():
    torch.manual_seed(0)
    own, stream = net(), drawn(made(4))
    learner = lora(own, cross_entropy, 0.1, 2, rank=2)
    task = take(stream(0), 0)
    theta = learner.adapt(start(learner, parameters(own)).params, task.support)
    with pytest.raises(ValueError, match=heard("Multiply LoRA's out")):
        load(own, theta)
    said = learner.predict(theta, task.query.x)
    assert torch.allclose(load(own, merged(theta))(task.query.x), said, atol=1e-5)


def test_a_class_with_too_few_items():
    data = made(4)
    with pytest.raises(ValueError, match=heard("expected shots + queries ≤ 12")):
        episodes(data, 3, 8, 8, tasks=2, seed=0)
    mixed = named([*data.items[:-3], *torch.randn(3, 40, 4)])
    kept = episodes(mixed, 3, 8, 8, tasks=2, seed=0, small="leave out")(0)
    assert kept.support.x.shape == (2, 24, 4)


def test_ways_to_less_memory_find_the_same_or_nearly():
    """`checkpointed` and `chunk=1` give the whole gradient; `first_order` drops a part of it and runs."""
    stream, own = drawn(made(4)), net()
    whole, first = learned(own, stream), learned(own, stream, hypergradient=first_order)
    for how in ({"chunk": 1}, {"hypergradient": checkpointed}):
        same = learned(own, stream, **how)
        assert all(torch.allclose(whole[k], same[k], atol=1e-5) for k in whole)
    assert all(torch.isfinite(v).all() for v in first.values())


def test_a_burst_in_support_and_query_is_too_good():
    """Near-copies of two bursts a class: within a burst the score is higher than between two."""
    torch.manual_seed(0)
    bursts = [torch.randn(20, 4) + 2 * torch.randn(20, 4) for _ in range(2)]
    one, two = (named([b + 0.05 * torch.randn(12, 4) for b in burst]) for burst in bursts)
    own = two_halves(nn.Identity(), nn.Linear(4, 3))
    learner = protonet(own)

    def score(stream):
        return evaluate(learner, parameters(own), stream, 40, progress=False)

    assert score(drawn(one)).low > score(drawn(one, queries_from=two)).high


def test_every_row_is_provoked():
    assert set(QUOTED) == TESTED
    others = {said for said in SAID if '"' not in said}
    assert others == {"memory runs out", "a score that is too good"}


# What is taken care of -----------------------------------------------------------------------


def test_dropout_is_off_in_evaluate():
    own = two_halves(nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5)), nn.Linear(16, 3)).train()
    asked = partial(evaluate, protonet(own), parameters(own), drawn(made(4)), 40, progress=False)
    assert torch.equal(asked().values, asked().values)
    without = two_halves(nn.Sequential(own.body[0]), own.head)
    bare = evaluate(protonet(without), parameters(without), drawn(made(4)), 40, progress=False)
    assert torch.equal(asked().values, bare.values)


def test_attention_has_its_second_derivative():
    """The gradient of MAML through attention beside plain torch with the math kernel."""
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    own = two_halves(Attends(), nn.Linear(4, 3)).double()
    stream = drawn(made(5, 4), cast=torch.float64)
    phi = {k: v.requires_grad_() for k, v in parameters(own).items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = []
        for task in (take(stream(0), t) for t in range(2)):
            call = partial(torch.func.functional_call, own)
            inner = cross_entropy(call(phi, task.support.x), task.support.y)
            grads = torch.autograd.grad(inner, [*phi.values()], create_graph=True)
            theta = {k: v - 0.1 * g for (k, v), g in zip(phi.items(), grads, strict=True)}
            losses.append(cross_entropy(call(theta, task.query.x), task.query.y))
        wanted = torch.autograd.grad(torch.stack(losses).mean(), [*phi.values()])
    objective = bilevel(maml(own, cross_entropy, 0.1, 1), cross_entropy)
    descent = partial(torch.optim.SGD, lr=1.0)  # one step: φ minus the gradient
    begin = parameters(own)
    after = fit(objective, begin, stream, 1, descent, progress=False).params
    for (k, v), g in zip(begin.items(), wanted, strict=True):
        assert torch.allclose(v - after[k], g, atol=1e-12), k


# The room ------------------------------------------------------------------------------------


def test_the_stand_in_is_called_as_a_bert_is(monkeypatch):
    """Both answer to the page's `read`; padding changes nothing."""
    monkeypatch.setattr("mtlib.models.encoders.find_spec", lambda name: None)
    read, own, by = yours.reader(5)
    assert isinstance(own, yours.Stand) and "stand-in" in by
    fixed = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    short, long = (read(["move my parcel"], max_length=n, **fixed) for n in (4, 10))
    assert torch.allclose(own(**short).logits, own(**long).logits, atol=1e-6)
    assert isinstance(own(**short), SimpleNamespace) and own(**long).logits.shape == (1, 5)
    assert {name.split(".")[0] for name, _ in own.named_parameters()} >= {"query", "value"}


def test_the_small_bert_knows_its_words():
    pytest.importorskip("transformers")
    read, own = small_bert(["move", "my", "parcel"], 5)
    said = read(["move my door"], max_length=6, padding="max_length", return_tensors="pt")
    assert said["input_ids"].tolist() == [[2, 5, 6, 1, 3, 0]]
    logits = own(input_ids=said["input_ids"], attention_mask=said["attention_mask"]).logits
    assert logits.shape == (1, 5)
    again = small_bert(["move", "my", "parcel"], 5)[1]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))


def test_the_table_of_machines_is_its_equation():
    """Least squares for each machine leaves the noise, 0.1."""
    columns = yours.machines(10, 200)
    for m in range(10):
        own = {k: torch.tensor(v[columns["machine"] == m]) for k, v in columns.items()}
        x = torch.stack([own["load"], own["heat"], torch.ones(200).double()], 1)
        solved = torch.linalg.lstsq(x, own["wear"][:, None]).solution
        left = (x @ solved).squeeze(1) - own["wear"]
        assert 0.08 < left.std() < 0.12


def test_photos_are_glyphs_in_folders():
    folder = yours.photos(6)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(n.replace("/", "-") for n in glyphs(6).names)
    assert sorted(len([*p.iterdir()]) for p in folder.iterdir()) == [8, 9, 10, 11, 12, 13]
