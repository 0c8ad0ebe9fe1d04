"""Workloads of transformers for `meta_gradient.py`: `brings` has them.

W6: MAML on a small transformer that reads sequences of pairs, as in-context learners do. W7: MAML of LoRA on the last two
blocks of an encoder of MiniLM's size; what the frozen blocks give is computed once, for everybody. torch's own layer norm is
wrong under `vmap` in second order: that peer is listed with its error and not timed, another has its layer norm written out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, mse_loss

from mtlib.bilevel import bilevel, first_order
from mtlib.core import Batch, Episode, move, take
from mtlib.learners.gradient import maml
from mtlib.learners.lora import lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import higher
    import torchopt

Run = Callable[[], list[Tensor]]


class Work(NamedTuple):
    """One meta-gradient of tasks of `rows` support and as many query sequences."""

    what: str
    method: Literal["second order", "first order"]
    tasks: int
    width: int
    heads: int
    hidden: int
    blocks: int
    frozen: int = 0  # blocks before them; above 0: LoRA on the others
    rows: int = 5
    length: int = 16
    steps: int = 2
    lr: float = 0.05

    @property
    def second(self) -> bool:
        return self.method == "second order"

    def reduced(self) -> Work:
        """Few tasks and narrow layers, on which gradients are compared."""
        return self._replace(tasks=2, width=4 * self.heads, hidden=32, length=5, rows=2)

    def small(self) -> Work:
        return self.reduced()

    def case(self, seed: int, dtype: torch.dtype, device: str) -> Case:
        return case(self, seed, dtype, device)

    def implementations(self, compiled: bool = False) -> dict[str, Callable[[Case], Run]]:
        return implementations(self)


def brings(device: str) -> dict[str, Work]:
    """Name -> workload."""
    so: Any = "second order"
    small = Work("in-context regression, 4 blocks of 64", so, 16, 64, 4, 128, 4)
    large = Work("LoRA on 2 of 6 blocks of 384", so, 32, 384, 12, 1536, 2, frozen=4, rows=2)
    first: Any = "first order"
    return {
        f"{name}, {order}": work._replace(method=order)
        for name, work in (("W6", small), ("W7", large))
        for order in (so, first)
    }


class WrittenNorm(nn.LayerNorm):
    """Layer norm in torch's elementary operations: right under vmap."""

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        hat = apart * (apart.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return hat * self.weight + self.bias


class LowRank(nn.Linear):
    """A linear layer with LoRA beside it, as a user of torch writes it: W₀x + B(Ax)."""

    def __init__(self, whole: nn.Linear, a: Tensor, b: Tensor):
        nn.Module.__init__(self)
        self.weight, self.bias = whole.weight, whole.bias
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) + linear(linear(x, self.a), self.b)


def encoder(work: Work, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                *(work.width, work.heads, work.hidden, 0.0, "gelu"),
                batch_first=True,
                norm_first=not work.frozen,
            )
            for _ in range(blocks)
        )
    )


class Net(nn.Module):
    """Sequences (N, L, width, or 2 numbers a token) -> (N, 1), from the last token."""

    def __init__(self, work: Work):
        super().__init__()
        read = nn.Identity() if work.frozen else nn.Linear(2, work.width)
        self.body = nn.Sequential(read, encoder(work, work.blocks), nn.LayerNorm(work.width))
        self.head = nn.Linear(work.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, -1])


class Case(NamedTuple):
    work: Work
    learner: Any
    phi: dict[str, Tensor]
    net: nn.Module
    base: nn.Module | None  # the frozen blocks
    episode: Episode

    def read(self) -> Episode:
        """What the network reads: features of the frozen blocks, of all tasks at once."""
        if self.base is None:
            return self.episode
        (xs, ys), (xq, yq) = self.episode
        with torch.no_grad():
            z = self.base(torch.cat([xs, xq]).flatten(0, 1)).unflatten(0, (-1, xs.shape[1]))
        return Episode(Batch(z[: len(xs)], ys), Batch(z[len(xs) :], yq))


TARGETS = ("linear1", "linear2")


def case(work: Work, seed: int, dtype: torch.dtype, device: str) -> Case:
    """The workload's network, with weights from the seed, and its data, on the device."""
    torch.manual_seed(seed)
    base = encoder(work, work.frozen).to(device, dtype).eval() if work.frozen else None
    net, g = Net(work).to(device, dtype), torch.Generator().manual_seed(seed)

    def batch() -> Batch:
        shape = (work.tasks, work.rows, work.length, work.width if base else 2)
        x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return Batch(x, x[:, :, 0, :1].sin())

    episode = move(Episode(batch(), batch()), device)
    if base is None:
        learner = maml(net, mse_loss, work.lr, work.steps)
        return Case(work, learner, learner.init(), net, base, episode)
    for p in net.body.parameters():
        p.requires_grad_(False)
    learner = lora(net, mse_loss, work.lr, work.steps, targets=TARGETS)
    phi = learner.init()
    for k in phi:
        if k.startswith("lora.") and k.endswith(".b"):  # not where A has no gradient
            phi[k] = torch.randn(phi[k].shape, generator=g).to(phi[k]) / 20
    return Case(work, learner, phi, net, base, episode)


def plain(case: Case, norm: bool = False) -> nn.Module:
    """The network as a user of torch has it; `norm`: with layer norm written out."""
    net = Net(case.work).to(case.episode.query.y)
    net.load_state_dict(case.net.state_dict())
    if case.base is not None:
        for p in net.body.parameters():
            p.requires_grad_(False)
        for place, m in list(net.named_modules()):
            if place.endswith(TARGETS):
                a, b = (case.phi[f"lora.{place}.weight.{k}"] for k in "ab")
                net.set_submodule(place, LowRank(m, a, b))
    if norm:
        for m in net.modules():
            if isinstance(m, nn.LayerNorm):
                m.__class__ = WrittenNorm
    return net


def moving(net: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def kernel(case: Case) -> Any:
    return sdpa_kernel(SDPBackend.MATH) if case.work.second else nullcontext()


def ours(case: Case) -> Run:
    way = None if case.work.second else first_order
    objective = bilevel(case.learner, mse_loss, way)
    names = [k for k, _ in case.net.named_parameters()]

    def run() -> list[Tensor]:
        found = objective.value_and_grad(case.phi, case.read())[1]
        return [found[k] for k in (names if case.base is None else sorted(found))]

    return run


def by_hand(case: Case) -> Run:
    """A loop with torch alone, one backward pass a task."""
    net, work = plain(case), case.work
    start = moving(net)

    def run() -> list[Tensor]:
        net.zero_grad()
        episode = case.read()
        with kernel(case):
            for t in range(work.tasks):
                support, query = take(episode, t)
                theta: dict[str, Tensor] = dict(start)
                for _ in range(work.steps):
                    inner = mse_loss(functional_call(net, theta, (support.x,)), support.y)
                    grads = torch.autograd.grad(
                        inner, list(theta.values()), create_graph=work.second
                    )
                    pairs = zip(theta.items(), grads, strict=True)
                    theta = {k: v - work.lr * g for (k, v), g in pairs}
                outer = mse_loss(functional_call(net, theta, (query.x,)), query.y)
                (outer / work.tasks).backward()
        return ordered(case, start)

    return run


def ordered(case: Case, start: dict[str, nn.Parameter]) -> list[Tensor]:
    """Gradients in the order of ours: of LoRA's names there."""

    def name(k: str) -> str:
        return f"lora.{k[:-2]}.weight{k[-2:]}" if k.endswith((".a", ".b")) else k

    found = {name(k): p.grad for k, p in start.items()}
    return [found[k] for k in (found if case.base is None else sorted(found))]


def by_vmap(case: Case, norm: bool = True) -> Run:
    """torch.func: all tasks as one program; in first order its inner steps keep no graph."""
    net, work = plain(case, norm), case.work
    start = moving(net)

    def risk(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(net, theta, (x,)), y)

    def task(support: Batch, query: Batch) -> Tensor:
        theta: Any = start if work.second else {k: v.detach() for k, v in start.items()}
        with nullcontext() if work.second else torch.no_grad():
            for _ in range(work.steps):
                g = torch.func.grad(risk)(theta, support.x, support.y)
                theta = {k: v - work.lr * g[k] for k, v in theta.items()}
        if not work.second:
            theta = {k: v + (theta[k] - v).detach() for k, v in start.items()}
        return risk(theta, query.x, query.y)

    def run() -> list[Tensor]:
        net.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            torch.vmap(task)(*case.read()).mean().backward()
        return ordered(case, start)

    return run


def by_vmap_native(case: Case) -> Run:
    """The same with torch's own layer norm."""
    return by_vmap(case, norm=False)


def with_higher(case: Case) -> Run:
    net, work = plain(case), case.work
    start = moving(net)
    sgd = torch.optim.SGD(start.values(), lr=work.lr)

    def run() -> list[Tensor]:
        net.zero_grad()
        episode = case.read()
        with kernel(case):
            for t in range(work.tasks):
                support, query = take(episode, t)
                with higher.innerloop_ctx(
                    net, sgd, copy_initial_weights=False, track_higher_grads=work.second
                ) as (f, optimizer):
                    for _ in range(work.steps):
                        optimizer.step(mse_loss(f(support.x), support.y))
                    outer = mse_loss(f(query.x), query.y) / work.tasks
                    if work.second:
                        outer.backward()
                        continue
                    last = [p for p in f.parameters() if p.requires_grad]
                    grads = torch.autograd.grad(outer, last)
                    for p, g in zip(start.values(), grads, strict=True):
                        p.grad = g if p.grad is None else p.grad + g
        return ordered(case, start)

    return run


def with_torchopt(case: Case) -> Run:
    net, work = plain(case), case.work
    start = moving(net)
    optimizer = torchopt.MetaSGD(net, lr=work.lr)

    def run() -> list[Tensor]:
        net.zero_grad()
        state = torchopt.extract_state_dict(net, by="reference")
        own = torchopt.extract_state_dict(optimizer, by="reference")
        episode = case.read()
        with kernel(case):
            for t in range(work.tasks):
                support, query = take(episode, t)
                for _ in range(work.steps):
                    optimizer.step(mse_loss(net(support.x), support.y))
                (mse_loss(net(query.x), query.y) / work.tasks).backward()
                torchopt.recover_state_dict(net, state)
                torchopt.recover_state_dict(optimizer, own)
        return ordered(case, start)

    return run


def implementations(work: Work) -> dict[str, Callable[[Case], Run]]:
    found = {
        "mtlib": ours,
        "torch by hand": by_hand,
        "higher": with_higher,
        "torch.func, norm written out": by_vmap,
        "torch.func, torch's norm": by_vmap_native,
    }
    if work.second and not work.frozen:
        found["torchopt"] = with_torchopt
    return found
