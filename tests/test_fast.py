"""Every fast path equals the plain reference in float64, and torch's settings are as they were."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import pytest
import torch
from machine import compiling
from problems import convolutional, seeded
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib import objective as objective_module
from mtlib.bilevel import (
    annealed,
    bilevel,
    checkpointed,
    first_order,
    implicit,
    multi_step,
    secant,
)
from mtlib.core import Batch, Episode, apply, over, parameters
from mtlib.evaluate import evaluate
from mtlib.learners.gradient import adam, anil, maml, momentum
from mtlib.learners.metric import protonet
from mtlib.learners.preconditioned import meta_sgd
from mtlib.nets import mlp
from mtlib.objective import Objective, alike, default_threads, over_tasks
from mtlib.run.cost import peak_memory
from mtlib.run.replay import replay
from mtlib.run.threads import on_threads
from mtlib.tasks import one_hot
from mtlib.train import fit

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def images(tasks=5, channels=1, dtype=torch.float64) -> Episode:
    def batch(n):
        x = torch.randn(tasks, n, channels, 16, 16, dtype=dtype)
        return Batch(x, one_hot(torch.arange(n) % 3, 3).to(dtype).expand(tasks, n, 3))

    torch.manual_seed(1)
    return Episode(batch(3), batch(6))


def points(tasks=5) -> Episode:
    torch.manual_seed(1)
    x = torch.randn(2, tasks, 7, 3, dtype=torch.float64)
    return Episode(Batch(x[0], x[0].sin()[..., :2]), Batch(x[1], x[1].sin()[..., :2]))


def layered():
    return seeded(lambda: mlp(3, (8, 8), 2))


IMAGES = {
    "maml": lambda net: bilevel(maml(net, cross_entropy, 0.1, 3), cross_entropy),
    "first order": lambda net: bilevel(
        maml(net, cross_entropy, 0.1, 3), cross_entropy, first_order
    ),
    "anil": lambda net: bilevel(anil(net, cross_entropy, 0.1, 3), cross_entropy),
    "protonet": lambda net: bilevel(protonet(net), cross_entropy),
}
POINTS = {
    "maml": lambda net: bilevel(maml(net, mse_loss, 0.1, 3), mse_loss),
    "first order": lambda net: bilevel(maml(net, mse_loss, 0.1, 3), mse_loss, first_order),
    "secant": lambda net: bilevel(maml(net, mse_loss, 0.1, 3), mse_loss, secant),
    "every step": lambda net: bilevel(
        maml(net, mse_loss, 0.1, 2), mse_loss, multi_step([0.5, 0.5])
    ),
    "implicit": lambda net: bilevel(maml(net, mse_loss, 0.1, 3, 2.0), mse_loss, implicit(2.0)),
}


def both_ways(objective: Objective, phi, data, monkeypatch):
    """((value, gradient) of the plain reference, (value, gradient) of the fast paths)."""
    monkeypatch.setenv("MTLIB_PLAIN", "1")
    plain = objective.value_and_grad(phi, data)
    monkeypatch.delenv("MTLIB_PLAIN")
    return plain, objective.value_and_grad(phi, data)


def agree(a, b, tolerance=1e-10):
    assert abs(a[0] - b[0]) <= tolerance
    assert a[1].keys() == b[1].keys()
    assert max((a[1][k] - b[1][k]).abs().max().item() for k in a[1]) <= tolerance
    assert max(g.abs().max().item() for g in a[1].values()) > 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_convolutions_on_threads_equal_the_plain_reference(make, channels, monkeypatch):
    net, data = convolutional(channels, width=6), images(channels=channels)
    phi = parameters(net)
    assert default_threads(phi, data, 1) == 2
    agree(*both_ways(make(net), phi, data, monkeypatch))


@pytest.mark.parametrize("make", POINTS.values(), ids=POINTS)
def test_stacked_tasks_equal_the_plain_reference(make, monkeypatch):
    net = layered()
    agree(*both_ways(make(net), parameters(net), points(), monkeypatch))


def test_threads_and_one_thread_evaluate_alike(monkeypatch):
    net = convolutional(width=6)
    learner = maml(net, cross_entropy, 0.1, 3)
    on_two = evaluate(learner, parameters(net), lambda step: images(10), 10)
    torch.set_num_threads(1)
    on_one = evaluate(learner, parameters(net), lambda step: images(10), 10)
    torch.set_num_threads(2)
    assert torch.equal(on_two.values, on_one.values)


def test_tasks_run_on_other_threads_only_where_it_pays():
    net, data = convolutional(width=6), images()
    phi = parameters(net)
    assert default_threads(phi, data, 5) == 1  # vmap was asked for
    assert default_threads(parameters(layered()), points(), 1) == 1  # no convolution
    large = over(lambda d: d[:1].expand(5, *d.shape[1:]).repeat_interleave(2000, 1), data)
    assert default_threads(phi, large, 1) == 1
    assert default_threads(phi, over(lambda d: d[:1], data), 1) == 1


def test_each_thread_has_its_share_of_torchs_threads_and_later_threads_have_all():
    seen = on_threads([torch.get_num_threads] * 2, 2)
    assert seen == [1, 1]
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2] and torch.get_num_threads() == 2


def test_an_error_of_a_thread_is_raised_here_and_gradients_are_as_enabled():
    with pytest.raises(ZeroDivisionError):
        on_threads([lambda: 1, lambda: 1 // 0], 2)
    with torch.no_grad():
        assert on_threads([torch.is_grad_enabled] * 2, 2) == [False, False]
    assert on_threads([torch.is_grad_enabled] * 2, 2) == [True, True]


def test_what_draws_random_numbers_runs_in_order_on_one_thread():
    """Dropout on threads would draw in an order of chance, and no run could be resumed to the bit."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 14 * 14, 3))
    net = net.double()
    f, data, names = apply(net), images(), set()

    def task(phi, episode):
        names.add(threading.current_thread().name)
        return cross_entropy(f(phi, episode.query.x), episode.query.y)

    objective, alone = over_tasks(task), over_tasks(task)
    torch.manual_seed(3)
    first = objective.value_and_grad(parameters(net), data)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    one = alone.value_and_grad(parameters(net), data)
    torch.set_num_threads(2)
    assert torch.equal(first[0], one[0])
    assert all(torch.equal(first[1][k], one[1][k]) for k in one[1])
    names.clear()
    objective.value_and_grad(parameters(net), data)
    assert names == {threading.current_thread().name}


class Aliased(nn.Module):
    """Reaches its own modules in ways of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.line = nn.Conv2d(1, 4, 3), nn.Linear(4 * 14 * 14, 3)
        self.way, self.parts = self._way, [self.line]

    def _way(self, x):
        return self.conv(x).relu().flatten(1)

    def forward(self, x):
        return self.parts[0](self.way(x))


def wrapped():
    net = Aliased()
    old = net.conv.forward
    net.conv.forward = lambda x: old(x)
    return net


@pytest.mark.parametrize("make", [Aliased, wrapped])
def test_networks_with_ways_of_their_own_compute_with_theta_on_threads(make, monkeypatch):
    torch.manual_seed(0)
    net, data = make().double(), images()
    phi = {k: v + 0.1 for k, v in parameters(net).items()}
    objective = bilevel(maml(net, cross_entropy, 0.1, 2), cross_entropy)
    agree(*both_ways(objective, phi, data, monkeypatch))


def test_what_fails_on_threads_runs_on_one():
    def task(phi, x):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("not here")
        return (phi["w"] * x.mean()).sum()

    phi, x = {"w": torch.ones(2, 1, 1, 1, dtype=torch.float64)}, torch.ones(4, 3)
    assert default_threads(phi, x, 1) == 2
    assert over_tasks(task).value_and_grad(phi, x.double())[0] == 2


def test_autocast_holds_for_every_task():
    net, data, seen = convolutional(width=6).float(), images(dtype=torch.float32), set()
    f = apply(net)

    def task(phi, episode):
        out = f(phi, episode.query.x)
        seen.add(out.dtype)
        return cross_entropy(out.float(), episode.query.y)

    with torch.autocast("cpu", torch.bfloat16):
        over_tasks(task).value_and_grad(parameters(net), data)
    assert seen == {torch.bfloat16}


def test_a_watch_on_this_thread_sees_every_task():
    net, data = convolutional(width=6), images()
    objective, phi = IMAGES["protonet"](net), parameters(net)
    on_two = peak_memory(objective.value_and_grad, phi, data)
    torch.set_num_threads(1)
    on_one = peak_memory(objective.value_and_grad, phi, data)
    torch.set_num_threads(2)
    assert on_two == on_one > 0


def test_the_plain_reference_takes_one_task_at_a_time(monkeypatch):
    seen = []

    def task(phi, x):
        seen.append(torch._C._functorch.is_batchedtensor(x))
        return (phi["w"] * x).sum()

    monkeypatch.setenv("MTLIB_PLAIN", "1")
    over_tasks(task, chunk=3).value_and_grad({"w": torch.ones(2)}, torch.ones(3, 2))
    assert seen == [False] * 3


def test_norms_of_torch_are_exact_where_steps_are_ours():
    """Tasks are stacked below `vmap`, and so is the norm's backward pass."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh())
    net = nn.Sequential()
    net.add_module("body", body)
    net.add_module("head", nn.Linear(8, 2))
    net = net.double()
    f, learner = apply(net), maml(net, mse_loss, 0.1, 2)

    def task(phi, episode):
        theta = learner.adapt(phi, episode.support)
        return mse_loss(f(theta, episode.query.x), episode.query.y)

    phi, data = {k: v.requires_grad_() for k, v in parameters(net).items()}, points()
    stacked = torch.vmap(task, in_dims=(None, 0))(phi, data).mean()
    alone = torch.stack([task(phi, over(lambda d, t=t: d[t], data)) for t in range(5)]).mean()
    a, b = (torch.autograd.grad(v, list(phi.values())) for v in (stacked, alone))
    assert max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) <= 1e-12


# torch.compile -------------------------------------------------------------------------------


def test_where_the_compiler_fails_a_warning_says_so_and_the_result_is_the_same(
    monkeypatch, no_kernel
):
    def broken(f, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler was found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net, data = layered(), points()
    objective = bilevel(maml(net, mse_loss, 0.1, 2), mse_loss, compile=True)
    phi = parameters(net)
    first = objective.value_and_grad(phi, data)
    with pytest.warns(UserWarning, match="torch.compile failed.*no C"):
        second = objective.value_and_grad(phi, data)
    agree(first, second, 1e-15)  # the first takes its gradients as a program would
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(second, objective.value_and_grad(phi, data), 0)


def test_an_objective_that_follows_the_step_keeps_what_was_found_out(monkeypatch):
    """Only the first of six steps looks at every torch function; a compiled one is refused."""
    net, data = layered(), points()
    learner = maml(net, mse_loss, 0.1, 2)
    slow = []
    plain = objective_module._WatchFunctions
    monkeypatch.setattr(objective_module, "_WatchFunctions", lambda: slow.append(1) or plain())

    def following(step):
        return bilevel(learner, mse_loss, multi_step(annealed(2, step / 5)))

    run = fit(following, parameters(net), lambda step: data, 6)
    assert len(slow) == 1
    monkeypatch.setattr(objective_module.Batched, "learn_from", lambda self, other: None)
    assert fit(following, parameters(net), lambda step: data, 6).losses == run.losses
    with pytest.raises(ValueError, match="changes from step to step"):
        fit(
            lambda step: bilevel(
                learner, mse_loss, multi_step(annealed(2, step / 5)), compile=True
            ),
            *(parameters(net), lambda step: data, 3),
        )


def test_functions_are_alike_where_only_real_numbers_differ():
    def made(a, f=torch.sin):
        return lambda x: a * f(x)

    assert alike(made(1.0), made(2.0)) and alike(made(torch.ones(2)), made(torch.zeros(3)))
    assert alike(partial(made, 1.0), partial(made, 3.0))
    assert not alike(made(1.0), made(1.0, torch.cos)) and not alike(made(1), made(2))
    assert not alike(made(1.0), lambda x: x) and not alike(made(1.0), made(None))

    def named(f):
        return lambda x, *, g=f: g(x)

    assert alike(named(torch.sin), named(torch.sin)) and not alike(
        named(torch.sin), named(torch.cos)
    )


def test_a_task_that_holds_itself_learns_nothing_and_still_runs():
    def made():
        def task(phi, x, depth=1):
            return task(phi, x, depth - 1) if depth else (phi["w"] * x).sum()

        return objective_module.Batched(task)

    before, now = made(), made()
    before.first = False
    now.learn_from(before)
    assert now.first


@compiling
def test_the_compiled_gradient_equals_the_plain_one(no_kernel):
    net, data = mlp(3, (4,), 2).double(), points()
    phi = {**parameters(net), "unused": torch.ones(2, dtype=torch.float64)}
    learner = maml(net, mse_loss, 0.1, 1)
    plain = bilevel(learner, mse_loss).value_and_grad(phi, data)
    objective = bilevel(learner, mse_loss, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        for _ in range(3):
            agree(plain, objective.value_and_grad(phi, data))
    assert "unused" not in plain[1]


@compiling
def test_a_second_objective_of_other_sizes_is_traced_too(monkeypatch, no_kernel):
    """Traced, not translated: torch keeps one cache for all objectives, and takes sizes that differ for ones that change."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, backend="eager", **options)
    )
    torch.compiler.reset()
    for rows, ways in ((6, 3), (8, 2)):
        x = torch.randn(4, rows, 3, dtype=torch.float64)
        y = one_hot(torch.arange(rows) % ways, ways).double().expand(4, -1, -1)
        data, net = Episode(Batch(x, y), Batch(x, y)), mlp(3, (4,), ways, seed=0).double()
        learner = maml(net, cross_entropy, 0.1, 1)
        plain = bilevel(learner, cross_entropy).value_and_grad(learner.init(), data)
        objective = bilevel(learner, cross_entropy, compile=True)
        for _ in range(2):
            agree(plain, objective.value_and_grad(learner.init(), data))


# Checkpoints of the inner loop ---------------------------------------------------------------


STEPPERS = {
    "maml": lambda net: maml(net, cross_entropy, 0.1, 4),
    "held near its start": lambda net: maml(net, cross_entropy, 0.1, 4, strength=0.5),
    "with momentum": lambda net: maml(net, cross_entropy, 0.1, 4, rule=momentum(0.5)),
    "with adam": lambda net: maml(net, cross_entropy, 0.01, 4, rule=adam()),
    "a rate for each step": lambda net: maml(net, cross_entropy, (0.1, 0.05, 0.2).__getitem__, 3),
    "anil": lambda net: anil(net, cross_entropy, 0.1, 4),
    "learned rates": lambda net: meta_sgd(net, cross_entropy, 0.1, 3),
    "no step": lambda net: maml(net, cross_entropy, 0.1, 0),
}


@pytest.mark.parametrize("make", STEPPERS.values(), ids=STEPPERS)
def test_checkpoints_give_the_gradient_of_unrolled(make):
    learner, data = make(convolutional(width=6)), images(tasks=2)
    phi = {**learner.init(), "unused": torch.ones(2, dtype=torch.float64)}
    unrolled = bilevel(learner, cross_entropy).value_and_grad(phi, data)
    agree(unrolled, bilevel(learner, cross_entropy, checkpointed).value_and_grad(phi, data), 1e-12)


def test_checkpoints_on_a_small_network_run_in_a_loop_and_agree():
    learner, data = maml(layered(), mse_loss, 0.1, 5), points()
    phi = learner.init()
    unrolled = bilevel(learner, mse_loss).value_and_grad(phi, data)
    agree(unrolled, bilevel(learner, mse_loss, checkpointed).value_and_grad(phi, data), 1e-12)


def test_checkpoints_of_twenty_steps_take_a_third_of_the_memory():
    net, data = convolutional(width=6), images(tasks=1)
    learner = maml(net, cross_entropy, 0.01, 20)
    whole, kept = (
        peak_memory(bilevel(learner, cross_entropy, h).value_and_grad, learner.init(), data)
        for h in (None, checkpointed)
    )
    assert kept <= 0.35 * whole


def test_checkpoints_say_where_there_are_no_steps_and_have_no_second_gradient():
    net, data = convolutional(width=6), images(tasks=2)
    with pytest.raises(ValueError, match="expects a learner with inner steps"):
        bilevel(protonet(net), cross_entropy, checkpointed).value_and_grad(parameters(net), data)
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(replay(lambda v: v[0] ** 3, (x,)), x, create_graph=True)
    assert slope == 3
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(slope, x)


def test_checkpoints_draw_the_same_random_numbers_again():
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    learner, data = maml(net, mse_loss, 0.1, 3), points(tasks=1)
    gradients = []
    for hypergradient in (None, checkpointed):
        objective = bilevel(learner, mse_loss, hypergradient, chunk=1)
        torch.manual_seed(5)
        gradients.append(objective.value_and_grad(learner.init(), data))
    torch.set_num_threads(2)
    agree(*gradients, 1e-12)


# What a loss may be --------------------------------------------------------------------------


def test_a_loss_that_is_no_scalar_is_refused():
    learner, data = maml(layered(), nn.MSELoss(reduction="none"), 0.1, 1), points()
    with pytest.raises(ValueError, match="a loss that is a scalar"):
        bilevel(learner, mse_loss).value_and_grad(learner.init(), data)


def test_a_loss_that_reads_no_parameter_moves_none():
    net, data = layered(), points()
    learner = maml(net, lambda prediction, y: (y**2).mean(), 0.1, 2)
    theta = learner.adapt(learner.init(), over(lambda d: d[0], data.support))
    assert all(torch.equal(theta[k], v) for k, v in learner.init().items())
    still = evaluate(learner, learner.init(), lambda step: data, 5, mse_loss)
    as_is = evaluate(maml(net, mse_loss, 0.1, 0), learner.init(), lambda step: data, 5, mse_loss)
    assert torch.allclose(still.values, as_is.values, atol=1e-12)


def test_learners_adapt_in_inference_mode():
    learner, support = maml(layered(), mse_loss, 0.1, 2), over(lambda d: d[0], points().support)
    with torch.inference_mode():
        inside = learner.adapt(learner.init(), support)
    outside = learner.adapt(learner.init(), support)
    assert all(torch.allclose(inside[k], outside[k], atol=1e-14) for k in outside)
