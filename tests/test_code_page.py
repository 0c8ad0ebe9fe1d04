"""The page on the text's two programs: what its solutions state, and what the programs are."""

from __future__ import annotations

import ast
import math

import pytest
import torch
from pages import code_cells, run_until
from torch.nn.functional import mse_loss as mse

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Episode, parameters
from mtlib.data.linear import samples
from mtlib.learners.gradient import maml

QUOTED = ("train", "optimize", "transfer")


@pytest.fixture(scope="module")
def page():
    """The page's variables at the small scale, up to the four linear tasks, which are drawn at their full size here."""
    from pages import at_small_scale

    with at_small_scale() as patch:
        patch.setattr("mtlib.book.page.is_full", lambda: True)
        return run_until("code", "shuffled")


def test_transfer_is_train_line_by_line():
    found = {}
    for text in code_cells("code"):
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name in QUOTED:
                found[node.name] = node
    assert found.keys() == {*QUOTED}
    plain = {k: ast.unparse(f.body).replace("target_tasks", "tasks") for k, f in found.items()}
    assert plain["transfer"] == plain["train"] != plain["optimize"]


def test_twenty_passes_forget_the_first_task_still_and_small_steps_do_not(page):
    model = page["fresh"]()
    for _ in range(20):
        page["train"](model, page["tasks"])
    found = page["errors"](model)
    assert found[0] > 5 * found[3]

    def slow(model, tasks, rate=0.01 / 30):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for x, y in (pair for task in tasks for pair in task):
            optimizer.zero_grad()
            mse(model(x), y).backward()
            optimizer.step()

    x, y = (d[:, : page["ROWS"]].flatten(0, 1) for d in page["four"])
    ones = torch.ones(len(x), 1)
    best = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution[:-1, 0]
    model = page["fresh"]()
    for _ in range(6):
        slow(model, page["tasks"])
    gap = (model.linear.weight[0] - best).norm() / best.norm()
    far = (page["forward"].linear.weight[0] - best).norm() / best.norm()
    assert gap < far / 3


def test_the_least_summed_loss_on_renumbered_labels():
    n = 20
    rows = torch.eye(n)
    assert math.log(n) == pytest.approx(3.00, abs=0.005)
    uniform = torch.zeros(n, n)
    assert torch.nn.functional.cross_entropy(uniform, rows).item() == pytest.approx(math.log(n))
    least = mse(torch.full((n, n), 1 / n), rows).item()
    assert least == pytest.approx(0.0475) == pytest.approx((1 - 1 / n) / n)


def rest(objective, net, data):
    """Where a gradient that is linear in φ is 0: the start at which training comes to rest."""
    names = {k: v.shape for k, v in parameters(net).items()}
    sizes = [s.numel() for s in names.values()]

    def gradient(v):
        parts = v.split(sizes)
        phi = {k: p.view(s) for (k, s), p in zip(names.items(), parts, strict=True)}
        g = objective.value_and_grad(phi, data)[1]
        return torch.cat([g[k].reshape(-1) for k in names])

    zero, unit = torch.zeros(sum(sizes)).double(), torch.eye(sum(sizes)).double()
    b = gradient(zero)
    return torch.linalg.solve(torch.stack([gradient(e) - b for e in unit], 1), -b)


def test_first_order_rests_elsewhere_mostly_where_tasks_are_loud_and_quiet(page):
    alike = samples(rows=120, tasks=60, noise=0.3, spread=0.5, seed=1)
    loud = (torch.arange(60) % 2 == 0)[:, None, None]
    x = torch.where(loud, 1.5 * alike.x, 0.5 * alike.x)
    y = torch.where(loud, 1.5 * alike.y, -0.5 * alike.y)
    worlds = {"alike": alike, "unlike": alike._replace(x=x, y=y)}
    worlds["rescaled"] = worlds["unlike"]._replace(x=x / x.square().mean((1, 2), True).sqrt())
    net, apart = page["Model"]().double(), {}
    for name, data in worlds.items():
        halves = [
            data._replace(x=data.x[:, part].double(), y=data.y[:, part].double())
            for part in (slice(60), slice(60, None))
        ]
        learner = maml(net, mse, 0.16, steps=5)
        exact, first = (
            rest(bilevel(learner, mse, way), net, Episode(*halves)) for way in (None, first_order)
        )
        apart[name] = ((exact - first).norm() / exact.norm()).item()
    assert 0.4 < apart["unlike"] < 0.6 and max(apart["alike"], apart["rescaled"]) < 0.2, apart


@pytest.mark.parametrize(("rows", "ideal"), [(60, 0.012), (12, 0.06)])
def test_the_ideal_pull(rows, ideal):
    """Ridge regression towards the centre of the tasks, over λ: the formula's λ is the best, on 2,000 tasks."""
    noise, spread, tasks = 0.3, 0.5, 2000
    assert 2 * noise**2 / (rows * spread**2) == pytest.approx(ideal)
    drawn = [samples(rows + 60, tasks=tasks, noise=n, spread=spread, seed=3) for n in (noise, 0)]
    data, clean = (d._replace(x=d.x.double(), y=d.y.double()) for d in drawn)
    centre = torch.linalg.lstsq(clean.x, clean.y).solution.mean(0)
    x, y = data.x[:, :rows], data.y[:, :rows] - data.x[:, :rows] @ centre

    def error(strength):
        a = x.mT @ x * 2 / rows + strength * torch.eye(10).double()
        w = torch.linalg.solve(a, x.mT @ y * 2 / rows) + centre
        return ((data.x[:, rows:] @ w - data.y[:, rows:]) ** 2).mean().item()

    found = {factor: error(factor * ideal) for factor in (0, 0.25, 0.5, 1, 2, 4)}
    assert min(found, key=found.__getitem__) == 1, found
    assert 0 < found[0] - found[1] < 0.01 if rows == 60 else found[1] < 0.5 * found[0], found
