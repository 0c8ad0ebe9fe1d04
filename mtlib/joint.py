"""Pillar II, transfer learning: one set of parameters for every source and target, trained jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Draw, Loss, Params, apply, classify, expect, features, require, risk
from mtlib.objective import Objective, over_tasks, whole
from mtlib.run.devices import double
from mtlib.tasks import positive, takes, within

Penalty = Callable[[Params, Tensor, Tensor], Tensor]
"""`penalty(theta, z, logits)` -> scalar; z: (T, B, D) features, logits: (T, B, W), T the number of data sets."""


def joint(
    net: nn.Module,
    loss: Loss,
    weights: Sequence[float] | None = None,
    penalties: Sequence[Penalty] = (),
    chunk: int | None = None,
    columns: Sequence[slice] | None = None,
) -> Objective:
    """min_θ Σ_t w_t L_t(f_θ) + Σ_r R_r(θ): sources and targets are the entries t of one batch.

    The weights are 1/T by default. Weights (1, 0) leave the target's labels unused: with an alignment penalty that is
    domain adaptation. (1 − α, α) is the α-weighted risk {cite}`bendavid2010theory`. If label spaces differ, `columns[t]`
    are the outputs of data set t (`own_columns`). Batches have a leading axis T (`mtlib.tasks.mixture`), and each data
    set goes through the network by itself, so that batch statistics are its own. `cross_entropy(weight=...)` divides a sum
    over one-hot rows by their number B; over class numbers it would divide by the sum of their weights (torch's rule).

    Raises ValueError unless the weights are finite, at least 0 and not all 0, or where columns are empty, lie beyond the
    head's outputs, or overlap in part (data sets may share all their columns), or no class of a data set is in its own.

    ```pycon
    >>> from mtlib.core import parameters
    >>> from mtlib.nets import mlp
    >>> net, data = mlp(4, (8,), 3, seed=0), Batch(torch.rand(2, 6, 4), torch.eye(3).repeat(2, 2, 1))
    >>> alone, both = (joint(net, nn.functional.cross_entropy, w) for w in ((1, 0), (0.5, 0.5)))
    >>> bool(alone(parameters(net), data) != both(parameters(net), data))
    True

    ```
    """
    w = None if weights is None else _weights(weights, bool(penalties))
    f = apply(net)
    _check(loss, columns)
    expect(not callable(penalties), "penalties, a list: [coral()]", penalties)
    for penalty in penalties:
        expect(takes(penalty, 3), "penalties(theta, z, logits), made by a call: [coral()]", penalty)

    def term(theta: Params, batch: Batch) -> Tensor:
        x, y = _batch(batch)
        expect(y.ndim > 1, "batches x (T, B, *item), y (T, B, W), T data sets, one-hot rows", y)
        return risk(loss, f(theta, x), y)

    if not penalties and columns is None:
        return over_tasks(term, w, chunk, net=net)
    z, head = features(net), classify(net)

    def value(theta: Params, batch: Batch) -> Tensor:
        zs = torch.stack([z(theta, x) for x in _batch(batch).x])  # (T, B, D)
        logits = torch.stack([head(theta, zt) for zt in zs])  # (T, B, W)
        terms = _own_risks(loss, logits, batch.y, columns)  # (T,)
        v = torch.full_like(terms, 1 / len(terms)) if w is None else w.to(terms)
        if len(v) != len(terms):
            raise ValueError(
                f"expected one weight per data set: {len(v)} weights, {len(terms)} data sets"
            )
        return v @ terms + sum(penalty(theta, zs, logits) for penalty in penalties)

    return whole(value, net)


def risks(
    net: nn.Module, loss: Loss, columns: Sequence[slice] | None = None
) -> Callable[[Params, Draw], Tensor]:
    """The risk L_t(f_θ) of each data set, (θ, batch) -> (T,), for weighted and other sums."""
    f = apply(net)
    _check(loss, columns)

    def terms(theta: Params, draw: Draw) -> Tensor:
        batch = _batch(draw)
        logits = torch.stack([f(theta, x) for x in batch.x])  # (T, B, W)
        return _own_risks(loss, logits, batch.y, columns)

    return terms


def own_columns(widths: Sequence[int]) -> list[slice]:
    """Separate heads as blocks of one head's outputs: widths (W_1, …, W_T) -> T slices of ΣW_t columns.

    The class numbers of data set t start at W_1 + … + W_{t−1}, so that `mtlib.tasks.mixture` makes targets of that width.
    Raises ValueError unless each width is a whole number of at least 1.
    """
    expect(len(widths) > 0, "widths, at least one", list(widths))
    positive(**{f"widths[{t}]": n for t, n in enumerate(widths)})
    ends = list(accumulate(widths, initial=0))
    return [slice(a, b) for a, b in pairwise(ends)]


def toward(anchor: Params, strength: float) -> Penalty:
    """L2-SP: λ · ½‖θ − anchor‖² over the anchor's entries, λ = `strength` ≥ 0 (else ValueError). {cite}`li2018l2sp`

    θ without one of them, or with one of another shape, raises ValueError, too.
    """
    expect(isinstance(anchor, dict), "an anchor, parameters {name: tensor}", anchor)
    within(0, strength=strength)

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        require(theta, anchor)
        for k, v in anchor.items():
            expect(theta[k].shape == v.shape, f"an anchor {k} of θ's shape", v)
        squares: Any = sum(
            ((theta[k] - v.to(theta[k].device)) ** 2).sum() for k, v in anchor.items()
        )
        return 0.5 * strength * squares  # type: ignore[no-any-return]

    return penalty


def _own_risks(loss: Loss, logits: Tensor, y: Tensor, columns: Sequence[slice] | None) -> Tensor:
    """Each data set's risk on its own columns of logits and targets (T, B, W) -> (T,)."""
    own = [slice(None)] * len(logits) if columns is None else columns
    if len(own) != len(logits):
        raise ValueError(
            f"expected the columns of each data set: got {len(own)} for {len(logits)} data sets"
        )
    if columns is not None:
        _check_columns(columns, logits.shape[-1], y)
    return torch.stack(
        [risk(loss, a[:, c], b[:, c]) for a, b, c in zip(logits, y, own, strict=True)]
    )


def _check_columns(columns: Sequence[slice], width: int, y: Tensor) -> None:
    """Raise ValueError where columns are empty, lie beyond the head, overlap in part, or no class of a data set is in its own."""
    places = [range(width)[c] for c in columns]
    for c, place in zip(columns, places, strict=True):
        ends = [abs(n) > width for n in (c.start, c.stop) if n is not None]
        if not place or any(ends):
            raise ValueError(
                f"expected columns among the head's {width} outputs, at least one; got {c}"
            )
    for t, (c, place, rows) in enumerate(zip(columns, places, y, strict=True)):
        if len(place) > 1 and not rows[:, c].any() and bool((rows.sum(1) == 1).all()):
            raise ValueError(
                f"expected the classes of data set {t} in its own columns {list(place)}, got them all in others: its class "
                f"numbers start at {place[0]}"
            )
    for a, b in combinations(places, 2):
        if a != b and set(a) & set(b):
            raise ValueError(
                f"expected columns of each data set alone, or shared as a whole; {list(a)} and {list(b)} overlap"
            )


def _check(loss: Loss, columns: Sequence[slice] | None) -> None:
    made = callable(loss) and not isinstance(loss, type)
    expect(made, "a loss, a function such as nn.functional.cross_entropy", loss)
    slices = columns is None or all(isinstance(c, slice) for c in columns)
    expect(slices, "columns as slices, such as own_columns([3, 2]) gives", columns)


def _weights(weights: Sequence[float], penalties: bool) -> Tensor:
    """The weights (T,); all 0 where penalties are all there is."""
    try:
        if isinstance(weights, Tensor):
            w = double(weights)
        else:
            w = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError):  # words, for one
        w = torch.empty(0)
    right = (
        w.ndim == 1 and bool((w.isfinite() & (w >= 0)).all()) and (penalties or bool((w > 0).any()))
    )
    expect(right, "weights, one for each data set: finite, at least 0, not all 0", weights)
    return w


def _batch(batch: Draw) -> Batch:
    if not isinstance(batch, Batch):
        raise TypeError(
            f"joint expects batches (x, y), got {type(batch).__name__}; a stream of episodes goes with "
            "`bilevel`, or through `mtlib.tasks.quiz`"
        )
    return batch
