"""A residual network with batch norms through the whole way, against the same recipe in plain torch."""

from __future__ import annotations

import copy
from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.core import Batch, Episode, load, parameters
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.finetune import as_is
from mtlib.nets import two_halves
from mtlib.norm import calibrate
from mtlib.tasks import mixture, one_hot
from mtlib.train import fit

STEPS, TESTED = 60, 360
STEM = ("body.conv1.", "body.bn1.")
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)


class Block(nn.Module):
    """timm's basic block: two convolutions with their norms, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class Body(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2))
        self.layer3 = nn.Sequential(Block(16, 32, 2))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.drop(x.mean((2, 3)))


@cache
def digits():
    """Train and test: x (n, 1, 8, 8) in [0, 1], y (n,)."""
    held = load_digits()
    order = np.random.default_rng(0).permutation(len(held.target))
    x = torch.from_numpy(held.images[order] / 16).float()[:, None]
    y = torch.from_numpy(held.target[order])
    return Batch(x[TESTED:], y[TESTED:]), Batch(x[:TESTED], y[:TESTED])


def network(kind, seed):
    torch.manual_seed(seed)
    net = two_halves(Body(0.2 if kind == "dropout" else 0.0), nn.Linear(32, 10))
    if kind == "frozen stem":
        with torch.no_grad():
            net.train()(digits()[0].x[:256])  # the stem's norm has seen images
        net.body.conv1.requires_grad_(False)
        net.body.bn1.requires_grad_(False)
    return training(net, kind)


def training(net, kind):
    net.train()
    if kind == "frozen stem":
        net.body.bn1.eval()
    return net


def accuracy(net, data):
    with torch.no_grad():
        return float((net.eval()(data.x).argmax(1) == data.y).float().mean())


def in_plain_torch(net, kind, stream):
    """The trained network, with the running statistics that torch keeps."""
    net = training(copy.deepcopy(net), kind)
    optimizer = SGD([p for p in net.parameters() if p.requires_grad])
    for step in range(STEPS):
        x, y = (d[0] for d in stream(step))
        torch.manual_seed(step)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def quizzes(step):
    """The test set as twelve episodes of thirty queries."""
    train, test = digits()
    own, rows = slice(10 * step, 10 * step + 10), slice(30 * step, 30 * step + 30)
    return Episode(
        Batch(train.x[own][None], one_hot(train.y[own], 10)[None]),
        Batch(test.x[rows][None], one_hot(test.y[rows], 10)[None]),
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "dropout", "frozen stem"])
def test_a_resnet_is_as_accurate_as_in_plain_torch(kind, seed):
    train, test = digits()
    net, stream = network(kind, seed), mixture(train, batch=64, seed=seed)
    reference = in_plain_torch(net, kind, stream)
    phi = parameters(net)
    trained = fit(
        joint(net, cross_entropy), phi, stream, STEPS, SGD, seed=seed, progress=False
    ).params
    if kind != "dropout":  # whose masks are others
        for k, p in reference.named_parameters():
            torch.testing.assert_close(trained[k], p.detach(), rtol=1e-2, atol=2e-3)
    if kind == "frozen stem":
        assert all(torch.equal(trained[k], phi[k]) for k in phi if k.startswith(STEM))

    place = r"body\.layer1\.0\.bn1" if kind == "frozen stem" else r"body\.bn1"
    with pytest.raises(ValueError, match=rf"{place}\.running_mean.*BatchNorm2d.*calibrate"):
        load(copy.deepcopy(net), trained)

    whole = calibrate(net, trained, train.x.split(256))
    if kind == "frozen stem":  # whose statistics it was trained with
        assert torch.equal(whole["body.bn1.running_var"], net.body.bn1.running_var)
    loaded = load(copy.deepcopy(net), whole)
    ours, theirs = accuracy(loaded, test), accuracy(reference, test)
    assert theirs > 0.9 and ours >= theirs - 0.02
    # Torch's own statistics are those of the last batches: with the same ones, of all rows, the two are as accurate.
    alike = load(copy.deepcopy(net), {**whole, **dict(reference.named_parameters())})
    assert abs(ours - accuracy(alike, test)) <= 0.02
    score = evaluate(as_is(net), whole, quizzes, 12, progress=False)
    assert score.mean == pytest.approx(ours, abs=1e-6)
