"""Adaptation at test time: a trained network, items that come without labels, and alarms for when it goes wrong.

n items · B items of a batch · C classes. Neither the source's data nor a label of the target takes part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlib.core import Params, expect, fixed, load, norms, require_statistics
from mtlib.tasks import check_seed, functions, positive, within
from mtlib.transfer.selection import check_logits

OTHERS = (nn.LayerNorm, nn.GroupNorm)
"""Norms that read each item by itself."""


def scales(net: nn.Module) -> tuple[str, ...]:
    """The names of each norm's scale γ and shift β, its `weight` and `bias`, but for those that are frozen.

    Of `mtlib.norm.Norm`, and of torch's batch, instance, layer and group norms. Raises ValueError where none may move.
    """
    held, still = [*norms(net).values()], fixed(net)
    own = [(k, m) for k, m in net.named_modules() if m in held or isinstance(m, OTHERS)]
    names = [f"{k}.{p}".lstrip(".") for k, m in own for p, _ in m.named_parameters(recurse=False)]
    found = tuple(k for k in names if k not in still)
    expect(bool(found), "a network with norms whose scales or shifts may move", type(net).__name__)
    return found


def at_test(net: nn.Module, statistics: str = "batch") -> nn.Module:
    """A copy of the network as TENT uses it: the scales and shifts of its norms may move, all else is frozen, dropout is off.

    Its batch norms take mean and variance from the batch that they read. With `statistics="stored"` they read those in φ,
    which `mtlib.norm.calibrate` puts there. As an objective's network it says what moves:
    `fit(joint(at_test(net), loss, (0,), [entropy()]), phi, images, steps)` is TENT over many passes.
    """
    expect(statistics in ("batch", "stored"), 'statistics, "batch" or "stored"', statistics)
    moving, own = scales(net), copy.deepcopy(net).eval()
    for norm in norms(own).values():
        norm.train(statistics == "batch")
    for name, p in own.named_parameters():
        p.requires_grad_(name in moving)
    return own


def mean_entropy(logits: Tensor, below: float = math.inf) -> Tensor:
    """(1/|K|) Σ_{i ∈ K} H(p_i), p = softmax(logits), K the items with H(p_i) < `below`; 0 where there is none.

    logits: (B, C). Of all items it is TENT's {cite}`wang2021tent`. With below = 0.4 log C the unsure are left out, as EATA
    and SAR do {cite}`niu2022eata,niu2023sar`; EATA also weights what is left, and SAR takes sharpness-aware steps.
    """
    real = isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point()
    expect(real and logits.shape[1] > 1, "logits (B, C) of two classes or more", logits)
    expect(not isinstance(below, bool) and below > 0, "below > 0, in nats", below)
    log_p = torch.log_softmax(logits, -1).clamp(min=torch.finfo(logits.dtype).min)
    h = -(log_p.exp() * log_p).sum(-1)
    kept = (h.detach() < below).to(h)
    found: Tensor = (h * kept).sum() / kept.sum().clamp(min=1)
    return found


def online(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Callable[[Tensor], Tensor] = mean_entropy,
) -> Iterator[Tensor]:
    """The loop of TENT: each batch is answered as it comes; then one step lowers the loss of these answers, which it yields."""
    for x in batches:
        logits = net(x)
        optimizer.zero_grad()
        _finite(loss(logits)).backward()
        optimizer.step()
        yield logits.detach()


class Online(NamedTuple):
    """What `tent` found."""

    logits: Tensor  # (n, C): each item's answer as it came, before the step on its batch
    params: Params  # φ after the last batch
    resets: list[int]  # how many items had been answered when φ went back to the first


def tent(
    net: nn.Module,
    phi: Params,
    batches: Iterable[Any],
    rate: float,
    loss: Callable[[Tensor], Tensor] = mean_entropy,
    statistics: str = "batch",
    watch: Callable[[Tensor, int], bool] | None = None,
) -> Online:
    """TENT: each batch is answered as it comes; then one step of Adam makes these answers surer. {cite}`wang2021tent`

    min over γ, β of (1/B) Σ_i H(softmax f(x_i)), γ and β the scales and shifts of the norms (`scales`). All else stays, and
    norms read the batch (`at_test`). `batches` are inputs x (B, *item). At `rate` 0 nothing is learned: what is left is
    what each batch's statistics do. `loss(logits)` may be another one.

    `watch(answers, first)` sees the answers (m, C) since φ was last the first, and the number of the first of these items;
    where it is true, φ and Adam go back to where they began: {cite}`niu2023sar` does so by an alarm,
    {cite}`press2023rdumb` after a number of steps. Raises ValueError for no batch, or a loss that is not finite.
    """
    within(0, rate=rate)
    functions(1, loss=loss)
    own, held = at_test(net, statistics), norms(net)
    if statistics == "stored":
        require_statistics(phi, held)
    unread = {k: v for k, v in own.named_buffers() if k in held and k not in phi}
    start = {**unread, **phi}
    moving = {k: p for k, p in own.named_parameters() if p.requires_grad}
    own = own.to(phi[next(iter(moving))].device) if moving.keys() <= phi.keys() else own
    optimizer = torch.optim.Adam(moving.values(), lr=rate)
    load(own, start)
    said: list[Tensor] = []
    resets: list[int] = []
    for logits in online(own, optimizer, batches, loss):
        said.append(logits)
        first = resets[-1] if resets else 0
        if watch is not None and watch(torch.cat(said)[first:], first):
            load(own, start)
            optimizer.state.clear()
            resets.append(sum(map(len, said)))
    expect(bool(said), "at least one batch of inputs", batches)
    found = {k: p.detach().clone() for k, p in moving.items()}
    return Online(torch.cat(said), {**phi, **found}, resets)


def varieties(logits: Tensor, window: int) -> Tensor:
    """H(p̄) in nats for each run of `window` answers, p̄ the mean of their softmax(logits): (n, C) -> (n − window + 1,).

    log C where all classes are foretold equally often, 0 where one is: so a collapse shows. It also falls where the items
    themselves are of fewer classes.
    """
    means = _means(torch.softmax(_answers(logits, window), 1), window)
    found: Tensor = torch.special.entr(means).sum(1)
    return found


def changes(logits: Tensor, frozen: Tensor, window: int) -> Tensor:
    """The share of answers that are not those of the network before it adapted, for each run: (n, C) twice -> (n − window + 1,).

    |accuracy − accuracy before| ≤ this share on the same items, whatever the labels: where one answer differs, at most one
    more or one fewer is right. So an alarm at the loss that one can bear is never late; it cannot tell a loss from a gain.
    """
    a, b = _answers(logits, window), _answers(frozen, window)
    expect(a.shape == b.shape, f"the answers {tuple(a.shape)} to the same items", frozen)
    return _means((a.argmax(1) != b.argmax(1)).double()[:, None], window)[:, 0]


def least_variety(
    logits: Tensor, window: int, chance: float = 0.01, draws: int = 1000, seed: int = 0
) -> float:
    """The quantile `chance` of H(p̄) over `draws` windows of held-out answers on the source, (n, C), drawn without replacement.

    A variety below it comes about by chance once in 1/`chance` windows, where nothing has changed.
    """
    answers = torch.softmax(_answers(logits, window), 1)
    within(0, 1, chance=chance)
    positive(draws=draws)
    check_seed(seed)
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(answers), generator=g)[:window] for _ in range(draws)]
    means = torch.stack([answers[i.to(answers.device)].mean(0) for i in drawn])
    return float(torch.special.entr(means).sum(1).quantile(chance))


def alarm(
    values: Tensor, window: int, below: float | None = None, above: float | None = None
) -> int | None:
    """How many items had been answered when a value of `varieties` or `changes` was first below, or above, a bound; None if never.

    values: (n − window + 1,); the first stands for items 1 to `window`. Raises ValueError unless one bound is given.
    """
    positive(window=window)
    right = isinstance(values, Tensor) and values.ndim == 1 and not bool(values.isnan().any())
    expect(right, "values, one for each window, none NaN", values)
    expect((below is None) != (above is None), "one bound, below= or above=", (below, above))
    over = values < below if below is not None else values > (above or 0.0)
    return window + int(over.to(torch.uint8).argmax()) if bool(over.any()) else None


def _finite(value: Tensor) -> Tensor:
    expect(bool(value.isfinite()), "a finite loss of each batch's logits", value)
    return value


def _answers(logits: Tensor, window: int) -> Tensor:
    """Logits in float64, at least a window of them."""
    positive(window=window)
    found = check_logits(logits)
    expect(len(found) >= window, f"at least a window of {window} answers (n, C)", logits)
    return found


def _means(values: Tensor, window: int) -> Tensor:
    """The mean of each run of rows, (n, D) -> (n − window + 1, D)."""
    found: Tensor = values.unfold(0, window, 1).mean(-1)
    return found
