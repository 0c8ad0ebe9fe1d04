"""Few-shot tasks as pictures: what was shown, what was asked, what was answered wrongly, and which classes look alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlib.book.page import device
from mtlib.core import Batch, Learner, Params, expect, move
from mtlib.plots import META, TRANSFER
from mtlib.tasks import ClassSet, check_classes, one_hot

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def task(axes: Any, shown: Tensor, asked: Tensor, said: Tensor) -> None:
    """One task, a row for each class: left of a line what was shown of it, right what was asked, dark on light.

    `shown` (W, h, w) has an image a class, `asked` (W·Q, h, w) sorted by class, 1 is ink; `said` (W·Q,) are the classes that
    were answered. A letter in an image is a wrong answer: the class that it was taken for.
    """
    right = shown.ndim == 3 == asked.ndim and len(asked) % max(1, len(shown)) == 0
    if not right or not 0 < len(shown) <= len(LETTERS) or said.shape != asked.shape[:1]:
        raise ValueError(
            f"expected images shown (W, h, w), asked (W·Q, h, w) and answers (W·Q,), got {tuple(shown.shape)}, "
            f"{tuple(asked.shape)} and {tuple(said.shape)}"
        )
    (ways, height, width), each = shown.shape, len(asked) // len(shown)
    both = torch.cat([shown[:, None], asked.unflatten(0, (ways, each))], 1)
    sheet = both.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    axes.imshow((1 - sheet).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    for i, answer in enumerate(said.tolist()):
        if answer != i // each:
            at = (width * (i % each + 1.08), height * (i // each + 0.3))
            axes.text(*at, LETTERS[answer], color=TRANSFER, weight="bold")
    axes.axvline(width - 0.5, color=META)
    axes.set_xticks([])
    axes.set_yticks([height * (i + 0.5) for i in range(ways)], [*LETTERS[:ways]])
    axes.grid(False)


def photographs(
    axes: Any, shown: Tensor, asked: Tensor, said: Tensor, names: Sequence[str]
) -> None:
    """One task of colour photographs, a row for each class: left of a line what was shown of it, right what was asked.

    `shown` (W, 3, h, w) has a photograph a class, `asked` (W·Q, 3, h, w) is sorted by class, bytes; `said` (W·Q,) are the
    classes that were answered. A letter on a photograph is a wrong answer, the class that it was taken for; the letter of
    each class stands before its name.
    """
    ways = len(shown)
    right = shown.ndim == 4 == asked.ndim and ways == len(names) and len(asked) % max(1, ways) == 0
    if not right or not 0 < ways <= len(LETTERS) or said.shape != asked.shape[:1]:
        raise ValueError(
            f"expected photographs shown (W, 3, h, w), asked (W·Q, 3, h, w), answers (W·Q,) and W names, got "
            f"{tuple(shown.shape)}, {tuple(asked.shape)}, {tuple(said.shape)} and {len(names)}"
        )
    height, width, each = *shown.shape[2:], len(asked) // ways
    both = torch.cat([shown[:, None], asked.unflatten(0, (ways, each))], 1)  # (W, 1 + Q, 3, h, w)
    sheet = both.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    axes.imshow(sheet.cpu().numpy())
    for i, answer in enumerate(said.tolist()):
        if answer != i // each:
            at = (width * (i % each + 1.06), height * (i // each + 0.24))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(*at, LETTERS[answer], color=TRANSFER, weight="bold", bbox=box)
    axes.axvline(width - 0.5, color=META, linewidth=2)
    labels = [f"{LETTERS[i]}  {name}" for i, name in enumerate(names)]
    axes.set_xticks([])
    axes.set_yticks([height * (i + 0.5) for i in range(ways)], labels)
    axes.grid(False)


class Lookalike(NamedTuple):
    """What the most frequent confusion of one group is."""

    group: str
    share: float  # of the group's queries that were answered rightly
    times: int  # how many of a class's `of` queries were taken for the other class
    of: int
    images: Tensor  # (3, h, w): the class's image that was shown, a misread one, the image shown of the other class


def lookalikes(
    learner: Learner, phi: Params, data: ClassSet, key: str | None = None
) -> list[Lookalike]:
    """For each group of classes, all of it as one task: the first item of a class is shown, all others are asked.

    Groups are what names have before their "/"; items are images (C, n, 1, h, w). With a `key` the learner gets x = {key:
    images}. The groups with the most frequent confusions come first. Raises ValueError for other items, or a group of one.
    """
    check_classes(data)
    expect(isinstance(learner, Learner), "a learner, such as protonet(net)", learner)
    items: Any = data.items
    if not isinstance(items, Tensor) or items.ndim != 5 or items.shape[1] < 2:
        raise ValueError("expected images (C, n, 1, h, w), two or more of each class")
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(data.names):
        groups.setdefault(name.partition("/")[0], []).append(i)
    found = []
    for group, rows in groups.items():
        n, x = len(rows), items[rows]
        if n < 2:
            raise ValueError(f"expected two classes or more in each group, {group!r} has one")
        first, rest = (move(part, device()) for part in (x[:, 0], x[:, 1:].flatten(0, 1)))
        y = torch.eye(n).to(first)
        with torch.no_grad():
            theta = learner.adapt(phi, Batch({key: first} if key else first, y))
            said = learner.predict(theta, {key: rest} if key else rest).argmax(1)
        taken = said.cpu().view(n, -1)
        times = one_hot(taken, n).sum(1)
        share = times.diagonal().sum().item() / taken.numel()
        a, b = divmod(int(times.fill_diagonal_(0).argmax()), n)
        misread = x[a, 1 + int((taken[a] == b).int().argmax()), 0]
        images = torch.stack([x[a, 0, 0], misread, x[b, 0, 0]])
        found.append(Lookalike(group, share, int(times[a, b]), taken.shape[1], images))
    return sorted(found, key=lambda one: -one.times)


def confused(axes: Sequence[Any], found: Sequence[Lookalike]) -> None:
    """Draw lookalikes, one in each of the axes: from top to bottom what was shown, misread, and shown of the other class."""
    if len(axes) > len(found):
        raise ValueError(f"expected at most {len(found)} axes, one a group, got {len(axes)}")
    for ax, one in zip(axes, found, strict=False):
        ax.imshow((1 - one.images.flatten(0, 1)).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], xlabel=f"{one.times} of {one.of}")
        ax.set_title(one.group.partition("_(")[0].replace("_", " ")[:11], fontsize=8)
        ax.grid(False)
