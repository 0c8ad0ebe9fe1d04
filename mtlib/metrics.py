"""How good predictions are: one number from the outputs and labels of some items, of classes or of an order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtlib.run.fast import transforming

Metric = Callable[[Tensor, Tensor], Tensor]
"""`metric(prediction, y)` -> one number per episode."""


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest output is the labelled class; (B, W) and one-hot (B, W) -> scalar.

    NaN where a prediction is NaN: the largest output would be a class of no meaning. Raises ValueError for one column,
    where one output is always the largest, and for other labels than one-hot rows.
    """
    _check(prediction, y)
    right = prediction.argmax(-1) == y.argmax(-1)
    return _known(prediction, right.to(_wide(prediction.dtype)).mean())


def macro_f1(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean over classes of F₁ = 2TP / (2TP + FP + FN); (B, W) and one-hot (B, W) -> scalar.

    Each row counts for its largest output. A class that is neither labelled nor predicted is left out of the mean, as
    in scikit-learn. NaN and ValueError as for `accuracy`.
    """
    _check(prediction, y)
    classes = torch.arange(prediction.shape[-1], device=y.device)
    counts = _wide(prediction.dtype)
    said = (prediction.argmax(-1)[:, None] == classes).to(counts)  # (B, W)
    true = (y.argmax(-1)[:, None] == classes).to(counts)
    occurs = said.sum(0) + true.sum(0)  # 2TP + FP + FN
    f1 = 2 * (said * true).sum(0) / occurs.clamp(min=1)
    return _known(prediction, f1.sum() / (occurs > 0).sum())


def auroc(prediction: Tensor, y: Tensor) -> Tensor:
    """Area under the ROC curve: how often an item of a class gets more of that class than another item, ties one half.

    logits (B, W) and one-hot (B, W) -> scalar, the mean over classes, each against the rest by its softmax probability.
    With two classes this is the binary AUROC; so it is with one logit (B, 1) and y of 0 and 1. NaN where a class has no
    query item, or all of them: the curve is not defined; NaN too where a prediction is NaN. Raises ValueError for other
    labels. Compares every pair of items: B²W numbers.
    """
    _check(prediction, y, least=1)
    odds, y = prediction, y.to(_wide(prediction.dtype))
    if prediction.shape[-1] > 1:
        # log p_k / (1 − p_k), which has the order of p_k, also where it rounds to 1
        gaps = prediction[:, None] - prediction[..., None]  # (B, W, W), l_j − l_k
        own = torch.eye(prediction.shape[-1], dtype=torch.bool, device=prediction.device)
        odds = -torch.where(own, -torch.inf, gaps).sort(-1).values.logsumexp(-1)
    larger, equal = ((odds[:, None] > odds).to(y), (odds[:, None] == odds).to(y))
    pairs = y[:, None] * (1 - y)  # an item of the class, and one of the rest: (B, B, W)
    area = ((larger + 0.5 * equal) * pairs).sum((0, 1)) / pairs.sum((0, 1))
    return _known(prediction, area.mean())


def ndcg(prediction: Tensor, y: Tensor) -> Tensor:
    """How good an order is: normalised discounted cumulative gain; scores (B,) and gains (B,), or (B, 1) -> scalar.

    DCG / max DCG, DCG = Σ_i y_i / log₂(1 + rank of i), the highest score at rank 1. Equal scores share the mean discount of
    their ranks, so equal scores for all give what a random order has on average: compare with that, it is far above 0.
    Gains are linear, as in scikit-learn. NaN where all gains are 0, or a score is NaN. Raises ValueError for gains below 0.
    {cite}`jarvelin2002cumulated`
    """
    prediction, y = _ranked(prediction, y)
    ranks = torch.arange(1, len(y) + 1, device=y.device)
    discount = 1 / torch.log2(1 + ranks.to(y.dtype))
    got = (y * _shared(prediction, discount)).sum()
    return _known(prediction, got / (y.sort(descending=True).values * discount).sum())


def recall_at(prediction: Tensor, y: Tensor, n: int) -> Tensor:
    """Share of the wanted items among the n highest scores: scores (B,) and y of 0 and 1, or (B, 1) -> scalar.

    Equal scores share the places that are left to them, as if they were drawn by lot. NaN where nothing is wanted, or a
    score is NaN. Raises ValueError for other y. For an `evaluate` give `partial(recall_at, n=10)`.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"expected n to be a whole number of at least 1, got {n!r}")
    prediction, y = _ranked(prediction, y)
    if not transforming() and not bool(((y == 0) | (y == 1)).all()):
        raise ValueError(
            "expected y of 0 and 1: 1 for a wanted item, such as `(rating >= 8).float()`"
        )
    place = (torch.arange(len(y), device=y.device) < n).to(y.dtype)
    return _known(prediction, (y * _shared(prediction, place)).sum() / y.sum())


def _shared(scores: Tensor, worth: Tensor) -> Tensor:
    """What the place of each item is `worth` (B,), the highest score first; equal scores share the mean of theirs."""
    rising = scores.sort().values
    upto = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
    first, last = (
        len(scores) - torch.searchsorted(rising, scores.contiguous(), right=right)
        for right in (True, False)
    )
    return (upto[last] - upto[first]) / (last - first).clamp(min=1)


def _ranked(prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and gains (B,), each of a wide dtype. Raises unless they are of one shape and no gain is below 0."""
    for name, found in (("scores", prediction), ("gains y", y)):
        if not isinstance(found, Tensor):
            raise TypeError(f"expected {name} in a tensor, got {type(found).__name__}")
    if y.shape != prediction.shape or not y.numel() or y.numel() != len(y):
        raise ValueError(
            "expected a score and a gain for each item, (B,) or (B, 1), at least one, got "
            f"{tuple(prediction.shape)} and {tuple(y.shape)}"
        )
    prediction, y = (v.flatten().to(_wide(v.dtype)) for v in (prediction, y))
    if not transforming() and not bool((y >= 0).all()):
        raise ValueError("expected gains of at least 0, such as ratings from 0 to 10")
    return prediction, y


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Where counts are exact: float32, or the dtype if it is wider."""
    return torch.promote_types(dtype, torch.float32)


OF_CLASSES: tuple[Metric, ...] = (accuracy, macro_f1, auroc)
"""The metrics above: they need one-hot rows."""


def is_one_hot(y: Tensor) -> bool:
    """Whether each row (…, W) has one 1 and 0 elsewhere; of a single column whether it has 0 and 1."""
    return bool(((y == 0) | (y == 1)).all() and (y.shape[-1] == 1 or (y.sum(-1) == 1).all()))


def _known(prediction: Tensor, value: Tensor) -> Tensor:
    """The value, or NaN where a prediction is NaN."""
    return torch.where(torch.isnan(prediction).any(), torch.nan, value)


def _check(prediction: Tensor, y: Tensor, least: int = 2) -> None:
    """Raise unless y is one-hot and of the predictions' shape, `least` columns wide. Under `vmap` the shapes alone tell."""
    for name, found in (("predictions", prediction), ("y", y)):
        if not isinstance(found, Tensor):
            raise TypeError(f"expected {name} (B, W) in a tensor, got {type(found).__name__}")
    if min(*prediction.shape[-1:], *y.shape[-1:], least) < least:
        raise ValueError(
            f"expected at least two classes, y one-hot (B, W), got predictions {tuple(prediction.shape)} and y "
            f"{tuple(y.shape)}. For regression give a metric, e.g. evaluate(..., metric=mse_loss); for one logit "
            "a metric of your own."
        )
    if y.ndim < 2 or y.shape != prediction.shape or y.numel() == 0:
        raise ValueError(
            "expected predictions (B, W) and one-hot rows y of the same shape, at least one, got "
            f"{tuple(prediction.shape)} and {tuple(y.shape)}: `mtlib.tasks.one_hot(y, ways)` makes them of class numbers"
        )
    if not transforming() and not is_one_hot(y):
        raise ValueError(
            "expected one-hot rows y, one 1 in each row and 0 elsewhere. For several labels per item, or real targets, "
            "take another metric."
        )
