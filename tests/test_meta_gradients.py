"""Law 2 for every row of the contract: its meta-gradient against finite differences, in float64."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from test_contract import ROWS, WAYS
from torch import nn

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode

CONSTANT = dict.fromkeys(
    ("linear_probe", "lp_ft"), "the probe's solution is a constant to the outer gradient, by design"
)


def vectors(tasks=3, rows=9, inputs=4):
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % WAYS
    y = torch.eye(WAYS, dtype=torch.float64)[labels].expand(tasks, -1, -1)

    def draw():
        return torch.randn(tasks, rows, inputs, generator=g, dtype=torch.float64) + labels[:, None]

    return Episode(Batch(draw(), y), Batch(draw(), y))


@pytest.mark.parametrize("name", ROWS)
def test_the_meta_gradient_is_the_slope_of_the_value(name):
    """Along a random direction in each part of φ (body, head, own): central differences of the plain value."""
    if name in CONSTANT:
        pytest.skip(CONSTANT[name])
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    net = nn.Sequential(OrderedDict(body=body, head=nn.Linear(6, WAYS))).double()
    row, episode = ROWS[name], vectors()
    learner = row.make(net)
    objective = bilevel(learner, row.loss)
    g = torch.Generator().manual_seed(2)

    def noise(v):
        return torch.randn(v.shape, generator=g, dtype=v.dtype)

    phi = {k: v + 0.1 * noise(v) for k, v in learner.init().items()}
    grads = objective.value_and_grad(phi, episode)[1]
    for part in sorted({k.split(".")[0] for k in phi}):
        parts = {k: v for k, v in phi.items() if k.split(".")[0] == part and k not in row.constant}
        d = {k: noise(v) for k, v in parts.items()}
        ahead, behind = (
            objective({k: v + h * d[k] if k in d else v for k, v in phi.items()}, episode)
            for h in (1e-5, -1e-5)
        )
        slope = (ahead - behind) / 2e-5
        claimed = sum((grads[k] * d[k]).sum() for k in d)
        gap = abs(slope - claimed) / max(1.0, abs(slope))
        print(f"{name}, {part}: slope {slope:.6f}, gap {gap:.1e}")
        assert abs(slope) > 1e-6 and gap <= 1e-6
