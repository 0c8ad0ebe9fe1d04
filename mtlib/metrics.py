"""How good predictions of classes are: one number from the outputs and one-hot labels of some items."""

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
