"""The adapter for pretrained classifiers, on a stand-in for torchvision."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn
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


def test_torchvision_is_asked_for_the_model(monkeypatch):
    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return classifier()

    fake = types.ModuleType("torchvision")
    fake.models = types.ModuleType("torchvision.models")
    fake.models.get_model = get_model
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.models", fake.models)
    monkeypatch.setattr(backbones, "find_spec", lambda name: object())
    assert pretrained("resnet18", ways=4, size=32)(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert asked == [("resnet18", "DEFAULT")]
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchvision"):
        pretrained()


def test_what_cannot_be_split_is_said():
    with pytest.raises(ValueError, match="linear layer"):
        split(nn.Sequential(nn.Conv2d(1, 2, 3)), ways=3)
    with pytest.raises(ValueError, match="ways to be a whole number of at least 1"):
        split(classifier(), ways=0)
