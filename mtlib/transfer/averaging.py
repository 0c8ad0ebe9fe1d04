"""Arithmetic on trained weights: lines between two φ, means of several, sums of what training changed.

All of it assumes that the members were trained on from one start: the loss between two networks of different starts is high
{cite}`frankle2020linear`, as their features stand in different places {cite}`ainsworth2023git`. Running statistics of norms
(`running_mean`, `running_var`, `num_batches_tracked`) are no weights: those of an average are not the average of theirs
{cite}`jordan2023repair`. Where members differ in them they are left out, and `mtlib.norm.calibrate(net, φ, [x])` puts back
what belongs there. What is the same in all members stays as it is, to the bit, whole numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlib.core import Params, expect
from mtlib.tasks import finite, functions, within

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How the entries of φ end that describe what a norm has read, and are no weights."""


def interpolated(a: Params, b: Params, share: float) -> Params:
    """The point at λ = `share` between two networks: (1 − λ) a + λ b. {cite}`wortsman2022robust`

    λ = 0 is a, λ = 1 is b, to the bit; with the pretrained network for a and the fine-tuned one for b it is WiSE-FT. Beyond
    0 and 1 the line goes on. Raises ValueError unless both have the same entries, of the same shapes and dtypes, finite.
    """
    within(-math.inf, share=share)
    if share in (0, 1):
        return _each((a, b), lambda u, v: (v if share else u).clone())
    return _each((a, b), lambda u, v: u + share * (v - u))


def uniform_soup(members: Sequence[Params]) -> Params:
    """The mean of n networks, 1/n Σ_i θ_i. {cite}`wortsman2022soups`

    Raises ValueError unless all have the same entries, of the same shapes and dtypes, finite.
    """
    return _each(members, lambda *parts: torch.stack(parts).mean(0))


class Soup(NamedTuple):
    """What `greedy_soup` made."""

    params: Params  # the mean of the members that were kept
    kept: tuple[int, ...]  # their numbers, in the order in which they came in
    quality: float  # of the mean, on validation data
    alone: tuple[float, ...]  # of each member alone


def greedy_soup(members: Sequence[Params], quality: Callable[[Params], float]) -> Soup:
    """The mean of those members that do not make it worse: from the best on, each joins if quality(mean) does not fall. {cite}`wortsman2022soups`

    `quality(φ)` judges on validation data, higher for better, never on test data: n + n − 1 calls for n members. Of equally
    good members the first comes first. A network with norms is calibrated there: `lambda φ: right(calibrate(net, φ, [x]))`.
    Raises ValueError for members that do not fit, or a quality that is no finite number.
    """
    functions(1, quality=quality)
    _check(members)
    alone = tuple(_number(quality(dict(m))) for m in members)
    order = sorted(range(len(members)), key=lambda i: -alone[i])
    kept, soup, best = [order[0]], members[order[0]], alone[order[0]]
    for i in order[1:]:
        tried = uniform_soup([members[k] for k in (*kept, i)])
        if (found := _number(quality(dict(tried)))) >= best:
            kept, soup, best = [*kept, i], tried, found
    return Soup({k: v.clone() for k, v in soup.items()}, tuple(kept), best, alone)


def task_vector(start: Params, tuned: Params) -> Params:
    """What training changed: τ = θ − θ₀, for every entry that is a weight. {cite}`ilharco2023editing`

    Entries that both have and that are no floating-point numbers, or statistics of norms, are left out. Raises ValueError
    unless both have the same entries, of the same shapes and dtypes, finite, and where whole numbers differ.
    """
    moved = _each((start, tuned), lambda u, v: v - u, same=lambda u: torch.zeros_like(u))
    return {k: v for k, v in moved.items() if v.is_floating_point() and not _statistic(k)}


def added(start: Params, vectors: Sequence[Params], scale: float = 1.0) -> Params:
    """Task arithmetic: θ₀ + λ Σ_t τ_t, λ = `scale`; with λ < 0 the tasks are taken away. {cite}`ilharco2023editing`

    Entries of θ₀ that no vector has stay, but statistics of norms, which are left out: `mtlib.norm.calibrate`. λ = 1/T gives
    the mean of T networks. Raises ValueError for a λ that is not finite, vectors that differ in their entries, or entries that
    θ₀ has not, or has in another shape.
    """
    within(-math.inf, scale=scale)
    _entries(start, "start")
    _check(vectors, "task vectors")
    if strange := [k for k in vectors[0] if k not in start]:
        raise ValueError(
            f"expected task vectors with entries of the start, {list(start)[:3]} and so on; it has no {strange[:3]}. Were they "
            "taken from another network?"
        )
    _alike({k: start[k] for k in vectors[0]}, vectors[0], "the start and the task vectors")
    sums = {k: torch.stack([_wide(t[k]) for t in vectors]).sum(0) for k in vectors[0]}
    return {
        k: (_wide(v) + scale * sums[k]).to(v.dtype) if k in sums else v.clone()
        for k, v in start.items()
        if not _statistic(k)
    }


def ties(vectors: Sequence[Params], keep: float = 0.2) -> Params:
    """TIES: one task vector out of several, without what is small or at odds. {cite}`yadav2023ties`

    Trim: of each τ_t the share `keep` of entries that are largest in absolute value, over all its tensors together, stay, and
    the others become 0: τ̂_t. Elect: each entry has the sign of Σ_t τ̂_t. Merge: the mean of those τ̂_t that are not 0 and have
    this sign; 0 where there are none. Use `added(start, [ties(vectors)], scale)`. Equal entries at the margin all stay.

    Raises ValueError unless 0 < `keep` ≤ 1, or for vectors that differ in their entries.
    """
    within(0, 1, keep=keep)
    expect(keep > 0, "a share of entries to keep above 0", keep)
    _check(vectors, "task vectors")
    flat = torch.stack([torch.cat([_wide(v).flatten() for v in t.values()]) for t in vectors])
    most = math.ceil(keep * flat.shape[1])
    least = flat.abs().topk(most, 1).values[:, -1:]  # the smallest that stays
    trimmed = torch.where(flat.abs() >= least, flat, 0.0)
    agree = torch.where(trimmed * trimmed.sum(0).sign() > 0, trimmed, 0.0)
    merged = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    sizes = [v.numel() for v in vectors[0].values()]
    parts = zip(vectors[0].items(), merged.split(sizes), strict=True)
    return {k: part.view_as(v).to(v.dtype) for (k, v), part in parts}


def barrier(losses: Sequence[float] | Tensor, shares: Sequence[float] | Tensor) -> float:
    """How high the loss rises above the straight line between its two ends: max_λ L(λ) − ((1 − λ) L(0) + λ L(1)). {cite}`frankle2020linear`

    `losses` (n,) stand at `shares` λ (n,), which begin with 0 and end with 1. It is at least 0; of errors in place of losses it
    is the barrier in error. Raises ValueError for other ends, fewer than three points, or numbers that are not finite.
    """
    values, at = (torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in (losses, shares))
    right = at.ndim == 1 and values.shape == at.shape and len(at) > 2
    if not right or at[0] != 0 or at[-1] != 1:
        raise ValueError(
            f"expected a loss for each of three shares or more, the first 0 and the last 1, got {tuple(values.shape)} losses at "
            f"{at.tolist()}"
        )
    expect(bool(values.isfinite().all()), "finite losses", values.tolist())
    return float((values - ((1 - at) * values[0] + at * values[-1])).max())


# Helpers -----------------------------------------------------------------------------------------


def _each(
    members: Sequence[Params],
    f: Callable[..., Tensor],
    same: Callable[[Tensor], Tensor] = torch.clone,
) -> Params:
    """f of each entry of all members; `same` of those in which they do not differ; no statistics in which they do."""
    _check(members)
    found: Params = {}
    for k, v in members[0].items():
        parts = [m[k].detach() for m in members]
        if all(torch.equal(p, parts[0]) for p in parts[1:]):
            found[k] = same(parts[0])
        elif not _statistic(k):
            expect(v.is_floating_point(), f"whole numbers {k!r} that are the same in all", v)
            found[k] = f(*map(_wide, parts)).to(v.dtype)
    return found


def _check(members: Any, what: str = "members") -> None:
    """Raise unless they are one φ or more with the same entries."""
    if isinstance(members, dict | Tensor | str) or not isinstance(members, Sequence):
        raise TypeError(
            f"expected a list of {what}, each {{name: tensor}}, got {type(members).__name__}"
        )
    expect(len(members) > 0, f"{what}, at least one", members)
    for m in members:
        _entries(m, what)
        _alike(members[0], m, what)


def _entries(phi: Any, what: str) -> None:
    right = isinstance(phi, dict) and len(phi) > 0
    expect(right and all(isinstance(v, Tensor) for v in phi.values()), f"{what} as φ, {{name: tensor}}", phi)  # fmt: skip
    for k, v in phi.items():
        if v.is_floating_point():
            finite(v, f"{k!r} of {what}", "Did its training diverge? Leave that member out.")


def _alike(one: Params, other: Params, what: str) -> None:
    """Raise ValueError where the names, shapes, dtypes or devices of two φ differ."""
    if differ := sorted(one.keys() ^ other.keys()):
        raise ValueError(
            f"expected {what} with the same entries, got {differ[:3]} in one of them alone. Give entries of their own, such as "
            "heads, or statistics that one norm has, apart: {k: v for k, v in phi.items() if k.startswith('body.')}"
        )
    for k, v in one.items():
        u = other[k]
        a, b = ((tuple(t.shape), t.dtype, str(t.device)) for t in (v, u))
        if a != b:
            raise ValueError(
                f"expected {k!r} of the same shape, dtype and device in {what}, got {a} and {b}. Heads for other classes stay "
                "apart; `mtlib.core.move(phi, device)` moves the rest"
            )


def _statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def _wide(v: Tensor) -> Tensor:
    """Half precision in float32, as sums of it are coarse."""
    return v.to(torch.promote_types(v.dtype, torch.float32)) if v.is_floating_point() else v


def _number(found: Any) -> float:
    """A quality as a finite number, or an error that says what came."""
    try:
        number = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected quality(φ) to give a number, such as score.mean, got {type(found).__name__}: {error}"
        ) from error
    expect(math.isfinite(number), "a finite quality of each member: leave out those that diverged", number)  # fmt: skip
    return number
