"""Small networks, tasks and measures that several test files use."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import mse_loss

from mtlib.core import Batch, Episode
from mtlib.nets import conv4
from mtlib.tasks import one_hot


def seeded(make, seed=0):
    """The network that `make` makes after this seed, in float64."""
    torch.manual_seed(seed)
    return make().double()


def convolutional(channels=1, width=4):
    return seeded(lambda: conv4(3, channels, width=width, size=16))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(phi, scale=0.1, seed=0, prefix=""):
    """φ with every entry whose name starts so moved a little: equal entries would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: v + scale * torch.randn(v.shape, generator=g, dtype=v.dtype)
        if k.startswith(prefix)
        else v
        for k, v in phi.items()
    }


def vectors(tasks=4, rows=6, inputs=3, outputs=2, seed=0):
    """Episodes of regression."""
    g = torch.Generator().manual_seed(seed)

    def draw():
        x = torch.randn(tasks, rows, inputs, generator=g, dtype=torch.float64)
        return Batch(x, torch.randn(tasks, rows, outputs, generator=g, dtype=torch.float64))

    return Episode(draw(), draw())


def images(tasks=3, ways=3, rows=6, size=16, seed=0):
    """Episodes of images with one-hot labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.eye(ways, dtype=torch.float64).repeat(rows // ways, 1).expand(tasks, -1, -1)

    def draw():
        return Batch(torch.rand(tasks, rows, 1, size, size, generator=g, dtype=torch.float64), y)

    return Episode(draw(), draw())


def classified(make, sets=3, rows=8, inputs=4, outputs=3, seed=0):
    """A small network, and a batch of classification sets."""
    net = seeded(make, seed)
    x = torch.randn(sets, rows, inputs, dtype=torch.float64)
    return net, Batch(x, one_hot(torch.randint(outputs, (sets, rows)), outputs, torch.float64))


def half_mse(prediction, y):
    return 0.5 * mse_loss(prediction, y)


def largest(a, b):
    """The largest difference of an entry."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def assert_close(a, b, keys=None, atol=1e-12):
    """Both have these entries, b's if none are named, and they agree."""
    assert all(torch.allclose(a[k], b[k], atol=atol) for k in (b if keys is None else keys))


def directional(objective, phi, data, seed=0, eps=1e-5):
    """Central difference of the objective along a random unit direction, and that direction."""
    g = torch.Generator().manual_seed(seed)
    d = {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in phi.items()}
    norm = sum((v**2).sum() for v in d.values()).sqrt()
    d = {k: v / norm for k, v in d.items()}
    up = objective({k: phi[k] + eps * d[k] for k in phi}, data)
    down = objective({k: phi[k] - eps * d[k] for k in phi}, data)
    return float((up - down) / (2 * eps)), d


def slope_gap(objective, phi, data, grads, seed=0):
    """How far the gradient is from the central difference, along a random unit direction."""
    slope, d = directional(objective, phi, data, seed)
    return abs(slope - float(sum((grads[k] * d[k]).sum() for k in grads)))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(net):
    net[0].register_forward_hook(lambda module, args, out: 2 * out)


def other_forward(net):
    net[0].forward = lambda x: 2 * nn.functional.linear(x, net[0].weight, net[0].bias)


def of_another_class(net):
    net[0] = Doubled(2, 4).double()


def with_another_module(net):
    net.append(nn.Softplus())


OF_ITS_OWN = [hooked, other_forward, of_another_class, with_another_module]
"""What makes a row of linear layers, 2 -> 4 -> 1, another function than its layers say."""


def gap(a, b) -> float:
    """‖a − b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()
