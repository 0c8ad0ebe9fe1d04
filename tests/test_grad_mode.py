"""Ctrl-C inside of torch's own switch of gradients: afterwards they are on or off as before."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import parameters
from mtlib.data.planted import planted
from mtlib.evaluate import answers, evaluate
from mtlib.joint import joint
from mtlib.learners.metric import protonet
from mtlib.nets import mlp, two_halves
from mtlib.norm import Norm, calibrate
from mtlib.objective import whole
from mtlib.tasks import episodes
from mtlib.train import fit

NET = mlp(30, (8,), 5, seed=0)
LEARNER = protonet(NET)
STREAM = episodes(planted(), ways=5, shots=1, queries=2, tasks=2, seed=0)
NORMED = two_halves(torch.nn.Sequential(torch.nn.Linear(30, 4), Norm(4)), torch.nn.Linear(4, 5))
PHI, DRAW = LEARNER.init(), STREAM(0)
ASCENT = bilevel(LEARNER, cross_entropy)
CALLS = {
    "evaluate": lambda: evaluate(LEARNER, PHI, STREAM, 2, progress=False),
    "answers": lambda: answers(LEARNER, PHI, DRAW),
    "fit": lambda: fit(ASCENT, PHI, STREAM, 2, progress=False),
    "bilevel": lambda: ASCENT.value_and_grad(PHI, DRAW),
    "joint": lambda: joint(NET, cross_entropy).value_and_grad(parameters(NET), DRAW.query),
    "whole": lambda: whole(lambda phi, data: phi["body.0.weight"].sum()).value_and_grad(PHI, DRAW),
    "calibrate": lambda: calibrate(NORMED, parameters(NORMED), [DRAW.query.x[0]]),
}


def interrupted(*_):
    """Ctrl-C falls into the way out of torch's switch, before it is back."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_as_they_were_before(name, on, monkeypatch):
    torch.set_grad_enabled(on)
    try:
        with monkeypatch.context() as patch:
            for switch in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled):
                patch.setattr(switch, "__exit__", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                CALLS[name]()
        assert torch.is_grad_enabled() is on
    finally:
        torch.set_grad_enabled(True)
