"""Pillar II, transfer learning: one set of parameters for every source and target, trained jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from mtlib.core import Batch, Draw, Loss, Params, apply, classify, features, risk
from mtlib.objective import Objective, over_tasks, whole

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
    set goes through the network by itself, so that batch statistics are its own.

    ```pycon
    >>> from mtlib.core import parameters
    >>> from mtlib.nets import mlp
    >>> net, data = mlp(4, (8,), 3, seed=0), Batch(torch.rand(2, 6, 4), torch.eye(3).repeat(2, 2, 1))
    >>> alone, both = (joint(net, nn.functional.cross_entropy, w) for w in ((1, 0), (0.5, 0.5)))
    >>> bool(alone(parameters(net), data) != both(parameters(net), data))
    True

    ```
    """
    w = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    f = apply(net)

    def term(theta: Params, batch: Batch) -> Tensor:
        return risk(loss, f(theta, _batch(batch).x), batch.y)

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

    def terms(theta: Params, draw: Draw) -> Tensor:
        batch = _batch(draw)
        logits = torch.stack([f(theta, x) for x in batch.x])  # (T, B, W)
        return _own_risks(loss, logits, batch.y, columns)

    return terms


def own_columns(widths: Sequence[int]) -> list[slice]:
    """Separate heads as blocks of one head's outputs: widths (W_1, …, W_T) -> T slices of ΣW_t columns.

    The class numbers of data set t start at W_1 + … + W_{t−1}, so that `mtlib.tasks.mixture` makes targets of that width.
    """
    ends = list(accumulate(widths, initial=0))
    return [slice(a, b) for a, b in pairwise(ends)]


def toward(anchor: Params, strength: float) -> Penalty:
    """L2-SP: λ · ½‖θ − anchor‖² over the anchor's entries, λ = `strength` ≥ 0 (else ValueError). {cite}`li2018l2sp`"""
    if not 0 <= strength < float("inf"):
        raise ValueError(f"expected a finite strength of at least 0, got {strength}")

    def penalty(theta: Params, z: Tensor, logits: Tensor) -> Tensor:
        return 0.5 * strength * sum(((theta[k] - v) ** 2).sum() for k, v in anchor.items())  # type: ignore[return-value]

    return penalty


def _own_risks(loss: Loss, logits: Tensor, y: Tensor, columns: Sequence[slice] | None) -> Tensor:
    """Each data set's risk on its own columns of logits and targets (T, B, W) -> (T,)."""
    own = [slice(None)] * len(logits) if columns is None else columns
    if len(own) != len(logits):
        raise ValueError(
            f"expected the columns of each data set: got {len(own)} for {len(logits)} data sets"
        )
    return torch.stack(
        [risk(loss, a[:, c], b[:, c]) for a, b, c in zip(logits, y, own, strict=True)]
    )


def _batch(batch: Draw) -> Batch:
    if not isinstance(batch, Batch):
        raise TypeError(
            f"joint expects batches (x, y), got {type(batch).__name__}; a stream of episodes goes with "
            "`bilevel`, or through `mtlib.tasks.quiz`"
        )
    return batch
