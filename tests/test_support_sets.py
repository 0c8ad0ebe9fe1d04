"""Every learner of the contract on support sets nobody would pick: uneven, with copies, with an item under two labels."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import normal, seeded
from test_contract import ROWS, WAYS
from torch import nn

from mtlib.core import Batch
from mtlib.tasks import one_hot

ITEMS, QUERY = normal(4, 2), normal(5, 2, seed=1)


@st.composite
def support_sets(draw):
    """Each class has an item; few items to draw from, so copies are common."""
    labels = draw(st.permutations(range(WAYS))) + draw(
        st.lists(st.integers(0, WAYS - 1), max_size=5)
    )
    rows = draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)))
    return Batch(ITEMS[rows], one_hot(torch.tensor(labels), WAYS, torch.float64))


def network():
    body = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(4, WAYS)))


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=7)
@given(support=support_sets(), data=st.data())
def test_any_support_set_gives_finite_answers_in_whatever_order(name, support, data):
    learner = ROWS[name].make(seeded(network))
    phi = learner.init()
    theta = learner.adapt(phi, support)
    said = learner.predict(theta, QUERY)
    assert all(bool(v.isfinite().all()) for v in (*theta.values(), said))
    order = data.draw(st.permutations(range(len(support.x))))
    turned = learner.predict(learner.adapt(phi, Batch(support.x[order], support.y[order])), QUERY)
    assert (said - turned).abs().max() <= 1e-6
