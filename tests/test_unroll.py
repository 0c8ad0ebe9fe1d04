"""MAML's gradient in C equals the plain reference's, and steps aside where something of its own is asked for."""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise

import pytest
import torch
from problems import OF_ITS_OWN, gap
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss

from mtlib.bilevel import bilevel, first_order, unrolled
from mtlib.core import Batch, Episode, over, take
from mtlib.learners.gradient import adam, anil, boil, maml, minibatches
from mtlib.learners.preconditioned import meta_sgd
from mtlib.nets import mlp
from mtlib.objective import alike
from mtlib.run import compiled, unroll

T = 5
KERNEL = unroll._kernel(torch.float64)
kernels = pytest.mark.skipif(KERNEL is None, reason="no C compiler here")
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid)


def row(widths, activation=nn.Tanh, bias=True, last=False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b, bias), activation())]
    return nn.Sequential(*(layers if last else layers[:-1])).double()


def points(d, w, n=6, q=4, dtype=torch.float64, classes=False) -> Episode:
    g = torch.Generator().manual_seed(1)

    def batch(rows):
        x, y = (torch.randn(T, rows, k, generator=g, dtype=torch.float64) for k in (d, w))
        return Batch(x.to(dtype), (y.softmax(2) if classes else y).to(dtype))

    return Episode(batch(n), batch(q))


@pytest.fixture(autouse=True)
def not_plain(monkeypatch):
    """The reference is asked for by name here."""
    monkeypatch.setenv("MTLIB_PLAIN", "0")


@pytest.fixture
def used(monkeypatch):
    """How often the kernel answers."""
    found = []

    def counted(self, phi, data, w):
        out = answer(self, phi, data, w)
        found.append(out is not None)
        return out

    answer = unroll.AtOnce.__call__
    monkeypatch.setattr(unroll.AtOnce, "__call__", counted)
    return found


def apart(objective, phi, data, monkeypatch) -> float:
    """The largest relative distance of a value or gradient to the plain reference's."""
    value, grads = objective.value_and_grad(phi, data)
    with monkeypatch.context() as m:
        m.setenv("MTLIB_PLAIN", "1")
        right, reference = objective.value_and_grad(phi, data)
    assert list(grads) == list(reference) and not value.requires_grad
    assert all(grads[k].shape == v.shape for k, v in reference.items())
    return max(gap(value, right), *(gap(grads[k], reference[k]) for k in reference))


@kernels
@pytest.mark.parametrize("widths", [(1, 9, 6, 1), (3, 5, 2), (4, 1, 3), (2, 2), (6, 33, 21, 8, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", [None, first_order])
def test_value_and_gradient_are_the_reference_s(widths, activation, way, used, monkeypatch):
    for bias, last, steps in ((True, False, 3), (False, True, 1), (True, True, 0)):
        net = row(widths, activation, bias, last)
        for loss in (mse_loss, cross_entropy)[: 1 + (widths[-1] > 1)]:
            data = points(widths[0], widths[-1], classes=loss is cross_entropy)
            learner = maml(net, loss, 0.1, steps)
            objective = bilevel(learner, loss, way)
            assert apart(objective, learner.init(), data, monkeypatch) < 1e-10
            assert used == [True, False]  # MTLIB_PLAIN=1 runs without
            used.clear()


@kernels
def test_the_gradient_is_that_of_finite_differences(used):
    net, data = row((2, 5, 1)), points(2, 1)
    objective = bilevel(maml(net, mse_loss, 0.2, 3), mse_loss)
    phi = {k: v.detach().clone() for k, v in net.named_parameters()}
    _, grads = objective.value_and_grad(phi, data)
    for k, v in phi.items():
        for i in range(v.numel()):
            values = []
            for h in (1e-5, -1e-5):
                moved = v.clone()
                moved.view(-1)[i] += h
                values.append(objective.value_and_grad({**phi, k: moved}, data)[0])
            assert abs((values[0] - values[1]) / 2e-5 - grads[k].view(-1)[i]) < 1e-8
    assert all(used)


@kernels
def test_rates_of_entries_and_steps_parts_that_move_and_frozen_ones(used, monkeypatch):
    net = mlp(2, (6, 5), 3, seed=0).double()
    own = {k: 0.02 * (i + 1) for i, (k, _) in enumerate(net.named_parameters())}
    learners = [
        maml(net, mse_loss, own, 2),
        maml(net, mse_loss, lambda j: 0.1 / (j + 1), 3),
        maml(net, mse_loss, lambda j: {k: a * (j + 1) for k, a in own.items()}, 3),
        anil(net, mse_loss, 0.1, 2),
        boil(net, mse_loss, 0.1, 2),
    ]
    data = points(2, 3)
    for frozen in (None, net.body[0].weight, net.head.bias):
        if frozen is not None:
            frozen.requires_grad_(False)
        for learner in learners:
            for way in (None, first_order):
                objective = bilevel(learner, mse_loss, way)
                assert apart(objective, learner.init(), data, monkeypatch) < 1e-10
    assert used == [True, False] * 30


@kernels
def test_another_loss_for_the_query_set_than_for_the_steps(used, monkeypatch):
    learner, data = maml(row((3, 5, 2)), mse_loss, 0.1, 2), points(3, 2, classes=True)
    assert apart(bilevel(learner, cross_entropy), learner.init(), data, monkeypatch) < 1e-10
    assert used[0]


@kernels
def test_cross_entropy_of_large_scores_and_of_labels(used, monkeypatch):
    net = row((3, 5, 4))
    with torch.no_grad():
        net[-1].weight *= 300
    x, hot = points(3, 4)[0].x, torch.eye(4).double()[torch.arange(6) % 4].expand(T, 6, 4)
    data = Episode(Batch(x, hot), Batch(x, hot))
    learner = maml(net, cross_entropy, 1e-3, 2)
    assert apart(bilevel(learner, cross_entropy), learner.init(), data, monkeypatch) < 1e-10
    assert used[0]


@kernels
def test_single_precision_is_as_close_to_double_as_torch_s(used, monkeypatch):
    net, data = row((1, 40, 40, 1), nn.ReLU), points(1, 1, 10, 10)
    exact = bilevel(maml(net, mse_loss, 0.01, 5), mse_loss).value_and_grad(
        dict(net.named_parameters()), data
    )[1]
    net.float()
    objective, single = (
        bilevel(maml(net, mse_loss, 0.01, 5), mse_loss),
        over(torch.Tensor.float, data),
    )
    phi, found = dict(net.named_parameters()), []
    for plain in ("0", "1"):
        monkeypatch.setenv("MTLIB_PLAIN", plain)
        grads = objective.value_and_grad(phi, single)[1]
        assert all(g.dtype == torch.float32 for g in grads.values())
        found.append(max(gap(grads[k].double(), exact[k]) for k in exact))
    assert found[0] <= 3 * found[1] + 1e-6 and used[:2] == [True, True]


@kernels
def test_weights_of_tasks_and_layouts(used, monkeypatch):
    net, data = row((3, 5, 2)), points(3, 2)
    learner = maml(net, mse_loss, 0.1, 2)
    phi = learner.init()
    right = bilevel(learner, mse_loss).value_and_grad(phi, data)
    turned = over(lambda v: v.transpose(0, 2).contiguous().transpose(0, 2), data)
    other = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in phi.items()}
    found = bilevel(learner, mse_loss).value_and_grad(other, turned)
    assert torch.equal(found[0], right[0])
    assert all(torch.equal(found[1][k], right[1][k]) for k in phi)
    by_chunks = bilevel(learner, mse_loss, chunk=2).value_and_grad(phi, data)  # the plain way
    assert max(gap(right[1][k], by_chunks[1][k]) for k in phi) < 1e-10
    assert used == [True, True]


@kernels
def test_nan_and_infinity_come_through(used):
    net, data = row((3, 5, 2), nn.ReLU), points(3, 2)
    objective = bilevel(maml(net, mse_loss, 0.1, 2), mse_loss)
    phi = {k: v.detach() for k, v in net.named_parameters()}
    for bad in (float("nan"), float("inf")):
        for part in range(2):
            for field in range(2):
                broken = over(torch.Tensor.clone, data)
                broken[part][field][1, 2, 0] = bad
                value, grads = objective.value_and_grad(phi, broken)
                assert not value.isfinite() and not grads["2.weight"].isfinite().all()
    assert all(used)


@kernels
def test_the_number_of_threads_changes_no_digit_and_threads_do_not_meet(used):
    net, data = row((2, 33, 40, 2), nn.ReLU), points(2, 2, 30, 30)
    objective = bilevel(maml(net, mse_loss, 0.1, 5), mse_loss)
    phi, before = {k: v.detach() for k, v in net.named_parameters()}, torch.get_num_threads()
    found = {}
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found[n] = objective.value_and_grad(phi, data)[1]
    finally:
        torch.set_num_threads(before)

    def run(i):
        found[i] = objective.value_and_grad(phi, data)[1]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3, 7)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 6 and all(used)
    assert all(torch.equal(found[1][k], g[k]) for g in found.values() for k in phi)


def wide(net):
    net[0], net[2] = nn.Linear(2, 300).double(), nn.Linear(300, 1).double()


def with_gelu(net):
    net[1] = nn.GELU()


@pytest.mark.parametrize("change", [*OF_ITS_OWN, wide, with_gelu])
def test_it_steps_aside_for_what_a_network_has_of_its_own(change, used, monkeypatch):
    net = row((2, 4, 1))
    change(net)
    learner = maml(net, mse_loss, 0.1, 2)
    assert apart(bilevel(learner, mse_loss), learner.init(), points(2, 1), monkeypatch) < 1e-10
    assert not any(used)


def other_predict(learner):
    return learner._replace(predict=lambda theta, x: 2 * learner.predict(theta, x))


def other_step(learner):
    adapt = learner.adapt

    def step(phi, support, number, point):
        theta, state = adapt.step(phi, support, number, point)
        return {k: 0.9 * v for k, v in theta.items()}, state

    return learner._replace(adapt=adapt._replace(step=step))


def other_begin(learner):
    def begin(phi, support):
        return {k: 0.5 * v for k, v in phi.items()}, None

    return learner._replace(adapt=learner.adapt._replace(begin=begin))


def other_given(learner):
    def given(phi, support):
        return {k: 0.5 * v for k, v in phi.items()}

    return learner._replace(adapt=learner.adapt._replace(given=given))


def in_batches(learner):
    return minibatches(learner, 3)


LEARNERS = {
    "a rule": lambda net: maml(net, mse_loss, 0.1, 2, rule=adam()),
    "a pull": lambda net: maml(net, mse_loss, 0.1, 2, strength=0.5),
    "a rate that is a tensor": lambda net: maml(net, mse_loss, torch.tensor(0.1).double(), 2),
    "a rate of 0": lambda net: maml(net, mse_loss, 0.0, 2),
    "learned rates": lambda net: meta_sgd(net, mse_loss, 0.1, 2),
    "another loss": lambda net: maml(net, smooth_l1_loss, 0.1, 2),
    "settings of a loss": lambda net: maml(net, partial(mse_loss, reduction="sum"), 0.01, 2),
    **{
        f.__name__: lambda net, f=f: f(maml(net, mse_loss, 0.1, 2))
        for f in (other_predict, other_step, other_begin, other_given, in_batches)
    },
}


@pytest.mark.parametrize("name", LEARNERS)
def test_it_steps_aside_for_what_a_learner_has_of_its_own(name, used, monkeypatch):
    learner = LEARNERS[name](row((2, 4, 1)))
    assert apart(bilevel(learner, mse_loss), learner.init(), points(2, 1), monkeypatch) < 1e-10
    assert not any(used)


def test_it_steps_aside_for_what_looks_on_and_for_other_numbers(used):
    net, data = row((2, 4, 1), nn.ReLU), points(2, 1)
    learner = maml(net, mse_loss, 0.1, 2)
    objective, phi = bilevel(learner, mse_loss), learner.init()

    def run(phi=phi, data=data):
        objective.value_and_grad(phi, data)
        return used.pop()

    assert run() == (KERNEL is not None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not run()
    with torch.overrides.BaseTorchFunctionMode():
        assert not run()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not run()
    finally:
        hook.remove()
    assert not run(data=over(lambda v: v[:, :, None], data)._replace(query=data.query))
    short = over(lambda v: v.to(torch.bfloat16), (phi, data))
    assert not run(*short)
    with torch.no_grad():
        assert run() == (KERNEL is not None)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        objective.value_and_grad(phi, data)


BAD = {
    "rows": lambda d: d._replace(support=Batch(d.support.x[:, 1:], d.support.y)),
    "targets": lambda d: d._replace(query=Batch(d.query.x, d.query.y[..., :1])),
    "features": lambda d: d._replace(query=Batch(d.query.x[..., :1], d.query.y)),
    "tasks": lambda d: d._replace(query=over(lambda v: v[1:], d.query)),
    "no rows": lambda d: d._replace(query=over(lambda v: v[:, :0], d.query)),
    "no axis": lambda d: d._replace(query=Batch(d.query.x, d.query.y[:, 0, 0])),
    "a batch": lambda d: d.query,
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_plain_way(name, monkeypatch):
    net, data = row((2, 4, 2)), BAD[name](points(2, 2))
    learner, said = maml(net, mse_loss, 0.1, 2), []
    for plain in ("0", "1"):
        monkeypatch.setenv("MTLIB_PLAIN", plain)
        with pytest.raises((ValueError, TypeError)) as error:
            bilevel(learner, mse_loss).value_and_grad(learner.init(), data)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@kernels
def test_compile_asks_for_no_compiler_of_torch_s_where_the_kernel_goes(used, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    learner = maml(row((2, 4, 1)), mse_loss, 0.1, 2)
    objective = bilevel(learner, mse_loss, compile=True)
    for _ in range(3):
        objective.value_and_grad(learner.init(), points(2, 1))
    assert used == [True] * 3


@kernels
def test_a_kernel_that_is_wrong_is_not_taken():
    assert unroll._right(KERNEL)

    def wrong(*args):
        value, grads = KERNEL(*args)
        return value, {k: 1.001 * g for k, g in grads.items()}

    wrong.dtype = torch.float64
    assert not unroll._right(wrong)


def test_without_a_compiler_all_is_as_before(used, monkeypatch):
    unroll._kernel.cache_clear()
    monkeypatch.setattr(compiled, "library", lambda *_, **__: None)
    try:
        learner = maml(row((2, 4, 1)), mse_loss, 0.1, 2)
        assert apart(bilevel(learner, mse_loss), learner.init(), points(2, 1), monkeypatch) < 1e-10
    finally:
        unroll._kernel.cache_clear()
    assert not any(used)


def test_learners_that_differ_in_numbers_alone_are_known_as_such():
    net = row((2, 4, 1))
    one, two, three = (maml(net, mse_loss, a, k) for a, k in ((0.1, 2), (0.2, 2), (0.1, 3)))
    assert alike(one, two) and not alike(one, three)


def test_the_task_itself_is_a_function_of_phi_and_an_episode():
    learner, one = maml(row((2, 4, 1)), mse_loss, 0.1, 2), take(points(2, 1), 0)
    phi = learner.init()
    for way in (unrolled, first_order):
        task = way(learner, mse_loss)
        assert torch.equal(partial(task, episode=one)(phi), task(phi, one))
