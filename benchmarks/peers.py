"""The implementations that the meta-gradient is timed with: mtlib's ways of running it, and what else there is.

Each `make(case)` returns a function without arguments that computes the meta-gradient anew and returns it, tensor by
tensor in the order of the network's parameters. Peers run a plain `nn.Module` as their users write it, from the same
weights, and go as their documentation goes. learn2learn is not here, as it does not install on Python 3.11 and
later: `by_hand` is the loop that it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from with_jax import ways
from workloads import Case, Workload

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, take
from mtlib.learners.gradient import maml
from mtlib.learners.metric import protonet
from mtlib.objective import Objective

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import higher
    import torchopt

Run = Callable[[], list[Tensor]]
Make = Callable[[Case], Run]

HAND = "torch by hand"


def implementations(work: Workload, compiled: bool = False, device: str = "cpu") -> dict[str, Make]:
    """Name -> `make`, every implementation that does this workload; mtlib's names begin with "mtlib".

    A workload of another module brings its own. JAX takes part on a CPU, where it is installed.
    """
    if not isinstance(work, Workload):
        return work.implementations(compiled)
    return {**variants(work, compiled), **peers(work), **(ways(work) if device == "cpu" else {})}


def variants(work: Workload, compiled: bool = False) -> dict[str, Make]:
    """mtlib's ways of running it, with what `bilevel` is given; `compiled`: where torch's compiler works, and on W1.

    On W1 with a C compiler both are one function in C (`mtlib.run.unroll`), and torch's compiler has nothing to do.
    """
    found = {"mtlib": ours()}
    if compiled and not work.size:
        found["mtlib, compiled"] = ours(compile=True)
    return found


def peers(work: Workload) -> dict[str, Make]:
    """Those that are not mtlib. Batch norm under `vmap` has a wrong second order, so `vmap` is for W1 alone."""
    if work.method == "protonet":
        return {HAND: protonet_by_hand}
    found: dict[str, Make] = {HAND: by_hand, "higher": with_higher}
    if work.method == "second order":  # MetaSGD has no first order
        found["torchopt"] = with_torchopt
        if not work.size:
            found["torchopt, vmap"] = with_torchopt_and_vmap
    return found


# mtlib ---------------------------------------------------------------------------------------


def ours(**settings: Any) -> Make:
    """`bilevel(learner, loss, ...)` with these settings."""

    def make(case: Case) -> Run:
        objective, phi = problem(case, **settings)

        def run() -> list[Tensor]:
            grads = objective.value_and_grad(phi, case.episode)[1]
            return [grads[k] for k in phi]

        return run

    return make


def problem(case: Case, **settings: Any) -> tuple[Objective, dict[str, Tensor]]:
    """The objective, and φ."""
    work = case.work
    if work.method == "protonet":
        learner = protonet(case.net)
    else:
        learner = maml(case.net, case.loss, work.lr, work.steps)
    if work.method == "first order":
        settings = {"hypergradient": first_order, **settings}
    return bilevel(learner, case.loss, **settings), learner.init()


# What a user writes without it ----------------------------------------------------------------


def plain(case: Case) -> nn.Module:
    """The network as a user writes it: NCHW, conv-norm-relu-pool. Weights are the case's.

    Its convolutions have no bias, though many users leave it in: before batch norm it has no effect, and without it
    the gradients can be compared.
    """
    work, source = case.work, case.net
    if not work.size:
        net = nn.Sequential(
            nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        )
    else:
        blocks = [_block(c, work.width) for c in (work.channels, *[work.width] * 3)]
        net = nn.Sequential(*blocks, nn.Flatten())
        if work.method == "protonet":
            source = case.net.body
        else:
            net.append(nn.Linear(work.width * (work.size // 16) ** 2, work.ways))
    net.to(next(source.parameters()))
    with torch.no_grad():
        for mine, given in zip(net.parameters(), source.parameters(), strict=True):
            mine.copy_(given)
    return net


def _block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def each_task(case: Case) -> Iterator[tuple[Batch, Batch]]:
    for t in range(case.work.tasks):
        yield take(case.episode, t)


def by_hand(case: Case) -> Run:
    """MAML as a loop with torch alone, one backward pass a task."""
    net, work, loss = plain(case), case.work, case.loss
    start = dict(net.named_parameters())

    def run() -> list[Tensor]:
        net.zero_grad()
        for support, query in each_task(case):
            theta = start
            for _ in range(work.steps):
                inner = loss(functional_call(net, theta, (support.x,)), support.y)
                grads = torch.autograd.grad(
                    inner, list(theta.values()), create_graph=work.method == "second order"
                )
                theta = {k: v - work.lr * g for (k, v), g in zip(theta.items(), grads, strict=True)}
            outer = loss(functional_call(net, theta, (query.x,)), query.y)
            (outer / work.tasks).backward()
        return gradients(start.values())

    return run


def protonet_by_hand(case: Case) -> Run:
    """Prototypical network as a loop over episodes with torch alone, one backward pass an episode."""
    net, work, loss = plain(case), case.work, case.loss

    def run() -> list[Tensor]:
        net.zero_grad()
        for support, query in each_task(case):
            prototypes = net(support.x).view(work.ways, work.shots, -1).mean(1)
            distances = (net(query.x)[:, None] - prototypes[None]).pow(2).sum(2)
            (loss(-distances, query.y) / work.tasks).backward()
        return gradients(net.parameters())

    return run


def gradients(parameters: Any) -> list[Tensor]:
    return [p.grad for p in parameters]


# Libraries -----------------------------------------------------------------------------------


def with_higher(case: Case) -> Run:
    """`higher`, one backward pass a task; in first order the last θ's gradients are handed to the first."""
    net, work, loss = plain(case), case.work, case.loss
    sgd, second = torch.optim.SGD(net.parameters(), lr=work.lr), work.method == "second order"

    def run() -> list[Tensor]:
        net.zero_grad()
        for support, query in each_task(case):
            with higher.innerloop_ctx(
                net, sgd, copy_initial_weights=False, track_higher_grads=second
            ) as (f, optimizer):
                for _ in range(work.steps):
                    optimizer.step(loss(f(support.x), support.y))
                outer = loss(f(query.x), query.y) / work.tasks
                if second:
                    outer.backward()
                else:
                    for p, g in zip(
                        net.parameters(),
                        torch.autograd.grad(outer, list(f.parameters())),
                        strict=True,
                    ):
                        p.grad = g if p.grad is None else p.grad + g
        return gradients(net.parameters())

    return run


def with_torchopt(case: Case, at_the_end: bool = False) -> Run:
    """torchopt's MetaSGD, one backward pass a task, or one `at_the_end` for all of them as in its MAML example."""
    net, work, loss = plain(case), case.work, case.loss
    optimizer, start = torchopt.MetaSGD(net, lr=work.lr), list(net.parameters())

    def run() -> list[Tensor]:
        net.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference")
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        losses = []
        for support, query in each_task(case):
            for _ in range(work.steps):
                optimizer.step(loss(net(support.x), support.y))
            outer = loss(net(query.x), query.y) / work.tasks
            losses.append(outer) if at_the_end else outer.backward()
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        if at_the_end:
            torch.stack(losses).sum().backward()
        return gradients(start)

    return run


def with_torchopt_and_vmap(case: Case) -> Run:
    """torchopt's functional SGD under torch.func, all tasks as one program: for networks without batch norm."""
    net, work, loss = plain(case), case.work, case.loss
    start, sgd = dict(net.named_parameters()), torchopt.sgd(lr=work.lr)
    (xs, ys), (xq, yq) = case.episode

    def risk(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(net, theta, (x,)), y)

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        theta, state = start, sgd.init(start)
        for _ in range(work.steps):
            grads = torch.func.grad(risk)(theta, xs, ys)
            updates, state = sgd.update(grads, state, inplace=False)
            theta = torchopt.apply_updates(theta, updates, inplace=False)
        return risk(theta, xq, yq)

    def run() -> list[Tensor]:
        net.zero_grad()
        torch.vmap(task)(xs, ys, xq, yq).mean().backward()
        return gradients(start.values())

    return run
