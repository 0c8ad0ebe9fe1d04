"""Sentences with a sentiment, from three sites {cite}`kotzias2015group`; drawn ones without file and network."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtlib.core import Batch, Episode, Stream
from mtlib.data.download import Remote, Unreachable, fetch
from mtlib.data.parsing import content, parsing
from mtlib.tasks import check_rows, check_seed, one_hot, positive, within

_AMAZON = (
    "https://raw.githubusercontent.com/wriazati/sentiment-analyzer/"
    "ba5251cfd3ab10847a32ebffb7152bae8e0b3847/data"
)
_OTHERS = (
    "https://raw.githubusercontent.com/stein-kim/sentiment_analysis/"
    "6850d5392de0703fb7ec7ea9a81b37d8098e4353/data"
)

FILES = {
    "Amazon": Remote(
        "sentiment/amazon_cells_labelled.txt",
        f"{_AMAZON}/amazon_cells_labelled.txt",
        ("47003fc0a0d4840b00e96e715b6189bad09e7443a3da41c4cbe12ffc79f86ae3",),
        size=58_226,
    ),
    "IMDb": Remote(
        "sentiment/imdb_labelled.txt",
        f"{_OTHERS}/imdb_labelled.txt",
        ("aef2e49e3da25714d61175e3a6e68eeef74a20a2f914318dc3be9947ea86512d",),
        size=85_285,
    ),
    "Yelp": Remote(
        "sentiment/yelp_labelled.txt",
        f"{_OTHERS}/yelp_labelled.txt",
        ("c76468b7b5c6e56a0804d728345c5f84aa2142ddb214420f61cc9cfd4c00d2ea",),
        size=61_320,
    ),
}
"""Phones and accessories, films, restaurants: 500 positive and 500 negative sentences each."""


class Site(NamedTuple):
    """The sentences of one site, each once."""

    texts: list[str]
    y: Tensor  # (n,) 1 for praise, 0 for blame
    repeated: int  # how many copies were dropped
    source: str


def sites() -> dict[str, Site]:
    """Amazon, IMDb and Yelp, or three drawn sites without file and network; each `source` says which.

    A sentence that occurs twice in a site is kept once, so that no split can separate two copies: "Great phone!." is a
    copy of "Great Phone.", as letters and digits alone count, and capitals do not. The first label stands.
    Raises `mtlib.data.download.Altered` for a file with the wrong digest.
    """
    try:
        return {name: read(fetch(remote), name) for name, remote in FILES.items()}
    except Unreachable:
        return {name: drawn(name) for name in FILES}


def read(path: Path, name: str) -> Site:
    """One file of `sentence TAB label` lines, which end in a line feed only (IMDb's sentences contain other line breaks).

    Raises ValueError for a line of another form, an empty sentence, and a label that is neither 0 nor 1.
    """
    texts, labels = [], []
    with parsing(path, "a file of labelled sentences"):
        for line in content(path).decode("utf8").split("\n"):
            if line:
                text, tab, label = line.rpartition("\t")
                if not tab or not text.strip() or label not in ("0", "1"):
                    raise ValueError(
                        f"expected `sentence TAB 0` or `sentence TAB 1`, got {line[-80:]!r}"
                    )
                texts.append(text.strip())
                labels.append(int(label))
        if not texts:
            raise ValueError("expected at least one sentence")
    return _once(texts, labels, name, "real")


def drawn(name: str, seed: int = 0, sentences: int = 400) -> Site:
    """A site's stand-in: sentences from templates, with words of praise and blame that all sites share and some of its own."""
    if name not in FILES:
        raise ValueError(f"expected a site of {list(FILES)}, got {name!r}")
    positive(sentences=sentences)
    check_seed(seed)
    rng = np.random.default_rng([seed, list(FILES).index(name)])
    things, own = _WORDS[name]
    texts, labels = [], []
    for i in range(sentences):
        good = i % 2
        words = own[good] if rng.random() < 0.4 else _SHARED[good]
        thing, word = rng.choice(things), rng.choice(words)
        if rng.random() < 0.1:  # what negation does to a bag of words
            word = f"not {rng.choice((own if rng.random() < 0.4 else _SHARED)[1 - good])}"
        texts.append(_TEMPLATES[rng.integers(len(_TEMPLATES))].format(thing=thing, word=word))
        labels.append(good)
    return _once(texts, labels, name, "stand-in")


def draws(z: Tensor, y: Tensor, labels: int, tasks: int, seed: int, fold: int = 0) -> Stream:
    """One site as many tasks: `stream(step)` -> Episode of `labels` rows to adapt to and the site's test rows.

    The test rows are one half of the site, chosen by `seed` alone, the same in every draw; `fold` 0 or 1 says which.
    The support rows are drawn from the other half, equally many of each class.
    z: (n, D), y: (n,) -> x (T, labels, D) and (T, Q, D).
    """
    if fold not in (0, 1):
        raise ValueError(f"expected fold 0 or 1, got {fold}")
    positive(tasks=tasks)
    check_seed(seed)
    check_rows(Batch(z, y), "the site")
    one_hot(y, 2)  # no other labels
    halves = np.split(tested(len(y), seed).numpy(), [len(y) // 2])
    held, rest = halves[fold], halves[1 - fold]
    of_class = [rest[y[rest].numpy() == c] for c in (0, 1)]
    if (
        not isinstance(labels, Integral)
        or labels % 2
        or not 2 <= labels <= 2 * min(map(len, of_class))
    ):
        raise ValueError(
            f"expected an even number of labels from 2 to {2 * min(map(len, of_class))}, got {labels}"
        )
    query = Batch(z[held].expand(tasks, -1, -1), one_hot(y[held], 2, z.dtype).expand(tasks, -1, -1))

    def stream(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        drawn = [
            np.concatenate([rng.choice(rows, labels // 2, replace=False) for rows in of_class])
            for _ in range(tasks)
        ]
        chosen = torch.from_numpy(np.stack(drawn))
        return Episode(Batch(z[chosen], one_hot(y[chosen], 2, z.dtype)), query)

    return stream


def tested(n: int, seed: int) -> Tensor:
    """The order in which the folds 0 and 1 of `draws` test the n rows of a site, one after the other: (n,) row numbers."""
    positive(n=n)
    check_seed(seed)
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


def with_share(y: Tensor, share: float, seed: int) -> Tensor:
    """Row numbers of n // 2 of n items, a `share` of them of class 1, in random order: a site where that share praises.

    y (n,) of 0 and 1, about as many of each. Raises ValueError where a class has too few items.
    """
    check_seed(seed)
    one_hot(y, 2)  # no other labels
    within(0, 1, share=share)
    rng, size = np.random.default_rng(seed), len(y) // 2
    ones = round(size * share)
    rows = [rng.permutation(np.flatnonzero(y.numpy() == c)) for c in (0, 1)]
    if len(rows[0]) < size - ones or len(rows[1]) < ones:
        raise ValueError(
            f"expected {size - ones} and {ones} items of the classes, got {[*map(len, rows)]}"
        )
    kept = np.concatenate([rows[0][: size - ones], rows[1][:ones]])
    return torch.from_numpy(rng.permutation(kept))


def _key(text: str) -> str:
    """Lower-case letters and digits alone, by which copies are told; a text without any, such as ":-)", is its own key."""
    return "".join(filter(str.isalnum, text.lower())) or text


def _once(texts: Sequence[str], labels: Sequence[int], name: str, kind: str) -> Site:
    kept: dict[str, tuple[str, int]] = {}
    for text, label in zip(texts, labels, strict=True):
        kept.setdefault(_key(text), (text, label))
    y = torch.tensor([label for _, label in kept.values()])
    source = f"sentences from {name}, {len(kept)} of {len(texts)} once copies are dropped ({kind})"
    return Site([text for text, _ in kept.values()], y, len(texts) - len(kept), source)


_TEMPLATES = (
    "the {thing} is {word}",
    "I found the {thing} {word}",
    "what a {word} {thing}",
    "{word} {thing}, that is all I say",
    "my friends call the {thing} {word}",
    "this {thing} was {word} from the first day",
)
_SHARED = (
    ("bad", "awful", "poor", "terrible", "disappointing", "useless"),
    ("good", "great", "excellent", "wonderful", "perfect", "lovely"),
)
_WORDS = {
    "Amazon": (
        ("phone", "battery", "charger", "headset", "case", "screen", "cable", "keyboard"),
        (("loose", "noisy", "flimsy", "dead"), ("sturdy", "predictable", "loud", "light")),
    ),
    "IMDb": (
        ("film", "plot", "acting", "script", "scene", "ending", "cast", "music"),
        (("predictable", "slow", "wooden", "loud"), ("moving", "gripping", "subtle", "funny")),
    ),
    "Yelp": (
        ("food", "waiter", "place", "burger", "service", "table", "soup", "menu"),
        (("cold", "greasy", "slow", "bland"), ("fresh", "tasty", "friendly", "warm")),
    ),
}
