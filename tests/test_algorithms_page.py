"""The first comparison: what its solutions state, and what its helpers do."""

from __future__ import annotations

from functools import partial
from itertools import permutations
from math import log

import pytest
import torch
from pages import code_cells, mix_test_characters, run_until
from scipy.integrate import quad
from scipy.stats import norm
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel
from mtlib.core import Batch, start
from mtlib.data.glyphs import glyphs
from mtlib.data.omniglot import turned
from mtlib.learners.closed_form import ridge
from mtlib.learners.finetune import finetune, fresh_head
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.nets import conv4
from mtlib.tasks import ClassSet, episodes
from mtlib.train import fit

DATA = glyphs(30, size=16)


@pytest.fixture
def net():
    return conv4(ways=5, width=8, size=16, seed=0)


def test_an_answer_that_ignores_the_support_set_is_at_chance():
    """Over all numberings of five classes any logits have an accuracy of 1/5 and at least log 5; equal ones reach it."""
    orders = torch.tensor(list(permutations(range(5))))  # (120, 5)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=g).double()  # of one drawing of each class
    every = logits.expand(120, 5, 5)
    loss = cross_entropy(every.flatten(0, 1), orders.flatten())
    assert ((every.argmax(-1) == orders).double().mean() - 0.2).abs() < 1e-12
    equal = cross_entropy(torch.zeros(600, 5).double(), orders.flatten())
    assert loss > equal and abs(equal.item() - log(5)) < 1e-12 and round(log(5), 3) == 1.609


def test_the_best_of_four_equal_settings_looks_too_good():
    """The mean of the largest of four standard normal numbers, by its density."""
    mean, _ = quad(lambda x: x * 4 * norm.pdf(x) * norm.cdf(x) ** 3, -9, 9)
    assert round(mean, 2) == 1.03


def test_turned_drawings_keep_the_name_of_their_character():
    quarters = turned(DATA).items.unflatten(0, (-1, 4)).flatten(1, 2)
    n = DATA.items.shape[1]
    assert quarters.shape == (30, 4 * n, 1, 16, 16)
    for k in range(4):
        part = quarters[:, k * n : (k + 1) * n]
        assert torch.equal(part, torch.rot90(DATA.items, k, (-2, -1)))


def test_a_stream_of_alphabet_numbers_has_the_classes_of_the_drawings():
    """One seed draws the same classes whatever the items are."""
    numbers = torch.arange(30.0)[:, None, None].expand(-1, DATA.items.shape[1], 1)
    cut = partial(episodes, ways=5, shots=1, queries=2, tasks=3, seed=1)
    drawn, twin = cut(DATA), cut(ClassSet(numbers, DATA.names, "their numbers"))
    for step in range(3):
        x, k = drawn(step).support.x, twin(step).support.x[..., 0].long()
        mine = DATA.items[k.flatten()]  # (15, drawings, ...)
        assert (mine == x.flatten(0, 1)[:, None]).flatten(2).all(-1).any(-1).all()


def test_fine_tuning_is_mamls_step_from_other_parameters(net):
    """From a head of zeros, `finetune` with a fresh head and `maml` end in the same place."""
    draw = episodes(DATA, 5, 1, 2, 1, seed=0)(0)
    support = Batch(draw.support.x[0], draw.support.y[0])
    phi = maml(net, cross_entropy, 0.1, 3).init()
    zero = {k: torch.zeros_like(v) for k, v in phi.items() if k.startswith("head.")}
    one = maml(net, cross_entropy, 0.1, 3).adapt({**phi, **zero}, support)
    other = fresh_head(finetune(net, cross_entropy, 0.1, 3), net).adapt(phi, support)
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("make", [protonet, lambda net: maml(net, cross_entropy, 0.1, 1)])
def test_alone_shows_a_query_no_other_query(net, make):
    """Each answer is the one in a batch with the support set, whatever the other queries are."""
    (cell,) = [text for text in code_cells("algorithms") if text.startswith("def alone")]
    space = {"torch": torch}
    exec(cell, space)
    learner, single = make(net), space["alone"](make(net))
    draw = episodes(DATA, 5, 1, 2, 1, seed=0)(0)
    support, x = Batch(draw.support.x[0], draw.support.y[0]), draw.query.x[0]
    phi = learner.init()
    found = single.predict(single.adapt(phi, support), x)
    theta = learner.adapt(phi, support)
    expected = [learner.predict(theta, torch.cat([support.x, x[i : i + 1]]))[-1] for i in range(10)]
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    fewer = single.predict(single.adapt(phi, support), x[:3])
    assert torch.allclose(fewer, found[:3], atol=1e-4)
    together = learner.predict(theta, x)
    assert not torch.allclose(together, found, atol=1e-2), "batch statistics make no difference"


def test_a_third_way_of_practising_takes_the_lines_of_the_solution(net):
    stream = episodes(DATA, 5, 1, queries=5, tasks=1, seed=0)
    learner = ridge(net)
    run = fit(bilevel(learner, cross_entropy), learner.init(), stream, 3, progress=False)
    assert start(learner, run.params).left == () and len(run.losses) == 3


@pytest.mark.filterwarnings("ignore:the best setting", "ignore:the inner steps")
def test_test_characters_choose_nothing(small):
    """With test drawings under each other's names, the same settings are chosen and the same networks trained."""
    plain = run_until("algorithms", "base")
    mix_test_characters(small)
    mixed = run_until("algorithms", "base")
    assert not torch.equal(plain["test"].items, mixed["test"].items)
    assert plain["named"] == mixed["named"] and plain["jobs"] == mixed["jobs"]
    for name, phi in plain["params"].items():
        assert all(torch.equal(phi[k], mixed["params"][name][k]) for k in phi)
    assert {k: row[1:] for k, row in plain["rows"].items()} == {
        k: row[1:] for k, row in mixed["rows"].items()
    }
