"""The adapter for pretrained classifiers, on a stand-in for torchvision."""

from __future__ import annotations

import copy
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode
from mtlib.learners.finetune import finetune, linear_probe
from mtlib.learners.metric import protonet
from mtlib.models import backbones
from mtlib.models.backbones import MEAN, STD, pretrained, split


def classifier() -> nn.Module:
    """The shape of torchvision's: features, then `classifier` whose last layer names 1000 classes."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU())
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1000)
    )
    model = nn.Sequential(OrderedDict(features=features, classifier=head))
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32) + 1)  # statistics to be kept
    return model


@pytest.fixture
def episode():
    g = torch.Generator().manual_seed(0)
    y = torch.eye(3).repeat(2, 1)[None]
    return Episode(*(Batch(torch.rand(1, 6, 1, 28, 28, generator=g), y) for _ in range(2)))


def test_the_body_gives_what_went_into_the_last_layer():
    model = classifier().eval()
    x = torch.rand(4, 3, 32, 32)
    shown = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = model.classifier[:-1](model.features(shown))
    net = split(model, ways=3, size=32)
    assert torch.allclose(net.body(x), expected, atol=1e-6)
    assert net(x).shape == (4, 3) and net.head.in_features == 7


def test_stored_statistics_are_used_and_stay(episode):
    net = split(classifier(), ways=3, size=32).train()
    one, many = net(episode.query.x[0, :1]), net(episode.query.x[0])
    assert torch.allclose(one, many[:1], atol=1e-6), "an answer depends on the batch around it"
    learner = finetune(net, cross_entropy, 0.1, 2)
    phi = learner.init()
    before = {k: v.clone() for k, v in net.named_buffers()}
    theta = learner.adapt(phi, Batch(*(d[0] for d in episode.support)))
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert not torch.equal(theta["head.weight"], phi["head.weight"])


@pytest.mark.parametrize("make", [protonet, linear_probe])
def test_learners_run_on_it(make, episode):
    learner = make(split(classifier(), ways=3, size=32))
    value, grads = bilevel(learner, cross_entropy).value_and_grad(learner.init(), episode)
    assert torch.isfinite(value) and any(g.abs().max() > 0 for g in grads.values())


def test_grey_images_of_any_size_are_read():
    net = split(classifier(), ways=3, size=32)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(net(x), net(x.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="images"):
        net(torch.rand(2, 4, 28, 28))


def as_seen(model, x, mean, std):
    """What the model's features are of images normalised by hand."""
    shown = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return copy.deepcopy(model).eval().classifier[:-1](model.eval().features(shown))


@pytest.mark.parametrize("name", ["pretrained_cfg", "default_cfg"])
@pytest.mark.parametrize("kind", [dict, lambda **held: types.SimpleNamespace(**held)])
def test_the_models_own_mean_and_deviation_are_taken(name, kind):
    """timm's vision transformers, for one, were trained with 0.5 and 0.5."""
    model, x = classifier(), torch.rand(4, 3, 32, 32)
    setattr(model, name, kind(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7)))
    expected = as_seen(model, x, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    assert torch.allclose(split(model, ways=3, size=32).body(x), expected, atol=1e-6)


def test_the_mean_and_deviation_can_be_given():
    model, x = classifier(), torch.rand(4, 3, 32, 32)
    model.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": None}
    expected = as_seen(model, x, (0.1, 0.2, 0.3), STD)
    net = split(model, ways=3, size=32, mean=(0.1, 0.2, 0.3))
    assert torch.allclose(net.body(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: 255 * x,
        lambda x: 2 * x - 1,
        lambda x: (x - 0.45) / 0.22,
        lambda x: x * float("nan"),
        lambda x: x.byte(),
    ],
)
def test_images_outside_0_1_are_refused_wherever_they_come(spoil):
    net, x = split(classifier(), ways=3, size=32), torch.rand(2, 4, 3, 32, 32)
    params = dict(net.named_parameters())

    def loss(params, x):
        return functional_call(net, params, (x,)).sum()

    ways = (
        lambda x: net(x[0]),
        torch.vmap(net),
        lambda x: torch.vmap(net, in_dims=1)(x.transpose(0, 1)),
        torch.vmap(torch.func.grad(loss), in_dims=(None, 0)).__get__(params),
    )
    for way in ways:
        way(1.2 * x - 0.1)  # what a resize may overshoot
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
            way(spoil(x))


def test_vmap_export_and_compilation_give_the_same():
    net, x = split(classifier(), ways=3, size=32).eval(), torch.rand(2, 4, 3, 32, 32)
    expected = torch.stack([net(v) for v in x])
    assert torch.allclose(torch.vmap(net)(x), expected, atol=1e-6)
    program = torch.export.export(net, (x[0],)).module()
    assert torch.allclose(program(x[0]), expected[0], atol=1e-6)


def test_torchvision_is_asked_for_the_model(monkeypatch):
    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return classifier()

    fake = types.ModuleType("torchvision")
    fake.models = types.ModuleType("torchvision.models")
    fake.models.get_model = get_model
    preset = types.SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    weights = types.SimpleNamespace(transforms=lambda: preset)
    fake.models.get_model_weights = lambda name: {"DEFAULT": weights, "V2": weights}
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.models", fake.models)
    monkeypatch.setattr(backbones, "find_spec", lambda name: object())
    assert pretrained("resnet18", ways=4, size=32)(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert asked == [("resnet18", "DEFAULT")]
    for name in ("DEFAULT", "Weights.V2"):
        read = pretrained("resnet18", weights=name, size=32).body.read
        assert torch.equal(read.mean.flatten(), torch.tensor(preset.mean))
        assert torch.equal(read.std.flatten(), torch.tensor(preset.std))
    plain = pretrained("resnet18", weights=None, size=32).body.read
    assert torch.equal(plain.mean.flatten(), torch.tensor(MEAN))
    with pytest.raises(TypeError, match="name of weights"):
        pretrained("resnet18", weights=weights)
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchvision"):
        pretrained()


def test_the_mean_of_bytes_is_no_mean_of_images_in_0_to_1():
    """Subtracted from images in [0, 1] it leaves next to nothing of them."""
    for mean, std in (((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), ((0.5, 0.5, 0.5), (58, 57, 57))):
        with pytest.raises(ValueError, match="divided by 255"):
            split(classifier(), 3, mean=mean, std=std)
    read = split(classifier(), 3, 8, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)).body.read
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(read(x), 255 * x)


def test_what_cannot_be_split_is_said():
    with pytest.raises(ValueError, match="linear layer"):
        split(nn.Sequential(nn.Conv2d(1, 2, 3)), ways=3)
    with pytest.raises(ValueError, match="ways to be a whole number of at least 1"):
        split(classifier(), ways=0)
