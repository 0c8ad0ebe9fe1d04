"""Peak memory against sizes counted by hand."""

from __future__ import annotations

import torch

from mtlib.bilevel import bilevel, first_order, unrolled
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.gradient import maml
from mtlib.nets import mlp
from mtlib.run.cost import peak_memory

SIZE = 4 * 1000  # bytes of the vector below


def deep(x):
    for _ in range(10):
        x = x.sin()
    return x


def test_a_chain_without_a_graph_holds_two_at_a_time():
    assert peak_memory(deep, torch.ones(1000)) == 2 * SIZE


def test_a_chain_with_a_graph_holds_all_of_it():
    assert peak_memory(deep, torch.ones(1000, requires_grad=True)) == 10 * SIZE


def test_a_view_costs_nothing_and_neither_does_what_was_there():
    x = torch.ones(1000)
    assert peak_memory(lambda: x.view(10, 100).t()) == 0
    assert peak_memory(lambda: x.add_(1)) == 0
    assert peak_memory(lambda: x.exp().view(10, 100)) == SIZE


def test_tensors_below_vmap_and_grad_are_seen():
    def slopes(x):
        return torch.vmap(torch.func.grad(lambda v: v.exp().sum()))(x)

    assert peak_memory(slopes, torch.ones(10, 100)) >= 2 * SIZE  # the exponential, and the slope


def test_a_first_order_step_holds_no_graph_of_the_inner_steps():
    net, stream = mlp(1, (40, 40), 1), sinusoids()
    loss = torch.nn.functional.mse_loss

    def step(hypergradient, steps):
        learner = maml(net, loss, 0.01, steps)
        objective = bilevel(learner, loss, hypergradient)
        return peak_memory(objective.value_and_grad, learner.init(), stream(0))

    assert step(unrolled, 20) > 4 * step(unrolled, 2)
    assert step(first_order, 20) < 1.1 * step(first_order, 2)
