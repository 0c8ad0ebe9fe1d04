"""Peak memory against sizes counted by hand, and the number of tasks that run together by it."""

from __future__ import annotations

import pytest
import torch

from mtlib.bilevel import bilevel, first_order, unrolled
from mtlib.core import Batch, take
from mtlib.data.sinusoids import sinusoids
from mtlib.learners.gradient import maml
from mtlib.nets import mlp
from mtlib.objective import over_tasks
from mtlib.run import cost
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


# How many tasks run together -----------------------------------------------------------------


def wide(seen):
    """The mean over tasks of a network with an intermediate result of 1 MB; `seen` gets how many run in a chunk."""

    def task(phi, batch):
        noise = torch.rand_like(batch.x)
        return ((phi["w"] * batch.x[..., None] + noise[..., None]).sin() ** 2).mean()

    run = over_tasks(task)
    first = run.run.vmap
    run.run.vmap = lambda phi, data: seen.append(len(data.y)) or first(phi, data)
    phi = {"w": torch.linspace(0, 1, 250, dtype=torch.float64)}
    x = torch.rand(10, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return run, phi, Batch(x, x)


@pytest.fixture
def little(monkeypatch):
    """`little(bytes)`: that is all the memory the device has."""
    yield lambda size: monkeypatch.setattr(cost, "memory", lambda device: float(size))


@pytest.mark.fast
def test_as_many_tasks_run_together_as_half_of_the_memory_holds(little):
    seen = []
    objective, phi, data = wide(seen)
    objective.value_and_grad(phi, data)
    assert seen == [10]
    one = peak_memory(objective.value_and_grad, phi, take(data, slice(0, 1)))
    assert one > 1e6
    little(2 * 4.5 * one)  # 4 of 10 fit: three chunks, as even as they can be
    seen.clear()
    objective, phi, data = wide(seen)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    objective.value_and_grad(phi, data)
    assert seen == [4, 4, 2]
    little(2 * 0.5 * one)  # decided once for tasks of these shapes
    objective.value_and_grad(phi, data)
    assert seen[3:] == [4, 4, 2]
    seen.clear()
    objective, phi, data = wide(seen)
    torch.set_rng_state(state)
    objective.value_and_grad(phi, data)
    after = torch.get_rng_state()
    assert not seen  # one after the other
    torch.set_rng_state(state)
    over_tasks(objective.run.task, chunk=1).value_and_grad(phi, data)
    assert torch.equal(torch.get_rng_state(), after)  # the look at one task drew nothing


def test_the_number_that_runs_together_changes_the_result_by_rounding_alone(little):
    net, stream = mlp(1, (40, 40), 1, seed=0).double(), sinusoids(dtype=torch.float64)
    learner, loss = maml(net, torch.nn.functional.mse_loss, 0.01, 3), torch.nn.functional.mse_loss
    value, grads = bilevel(learner, loss).value_and_grad(learner.init(), stream(0))
    little(4e6)
    few, others = bilevel(learner, loss).value_and_grad(learner.init(), stream(0))
    assert torch.allclose(value, few, rtol=1e-12)
    for k, g in grads.items():
        assert (g - others[k]).norm() <= 1e-12 * g.norm()


@pytest.mark.fast
def test_a_chunk_that_is_asked_for_is_taken(little):
    little(1)
    seen = []
    objective, phi, data = wide(seen)
    asked = over_tasks(objective.run.task, chunk=10)
    asked.run.vmap = objective.run.vmap
    asked.value_and_grad(phi, data)
    assert seen == [10]


def test_small_tasks_are_not_counted(monkeypatch):
    monkeypatch.setattr(cost, "peak_memory", lambda *_: pytest.fail("counted"))
    learner = maml(mlp(1, (40, 40), 1), torch.nn.functional.mse_loss, 0.01, 1)
    bilevel(learner, torch.nn.functional.mse_loss).value_and_grad(learner.init(), sinusoids()(0))


def test_a_container_has_the_memory_it_is_given(monkeypatch, tmp_path):
    own = cost.memory(torch.device("cpu"))
    assert 1e8 < own < 1e14
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1048576\n")
    monkeypatch.setattr(cost, "LIMITS", (tmp_path / "max", tmp_path / "none", tmp_path / "limit"))
    cost.memory.cache_clear()
    assert cost.memory(torch.device("cpu")) == 2**20
    cost.memory.cache_clear()
    assert cost.memory(torch.device("meta")) == float("inf")
