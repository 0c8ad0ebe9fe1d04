"""What contests on sentences need: episodes of one domain, heads on features that stay, a map that other domains trained.

A sentence is a row of features. Rows stand intent by intent, the intents domain by domain; then come the intents' names, a row
each, and the sentences that mean none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mtlib.bilevel import bilevel
from mtlib.book.page import device
from mtlib.core import Batch, features, move
from mtlib.joint import joint
from mtlib.learners.closed_form import ridge
from mtlib.learners.finetune import as_is, folds, linear_probe, logistic_head
from mtlib.learners.metric import protonet
from mtlib.nets import two_halves, zero_linear
from mtlib.tasks import ClassSet, episodes, mixture, one_hot, one_of, pool, positive
from mtlib.train import cosine_adam, fit

HEADS = ("logistic regression", "probe", "class means", "ridge")
VALIDATION = 3  # the domains after the target; all others are its sources


class Row(NamedTuple):
    """A way to answer: what it learned from other domains, its head, what it may choose from, and what it reads."""

    kind: str  # "baseline", "transfer" or "meta"
    head: str  # one of `HEADS`
    grid: Sequence[tuple[Any, ...]]  # settings: (strength, weight), of a trained map (rate, factor)
    names: bool = True  # whether a class's name is one more example
    by: str = ""  # "joint" or "episodes": what trained the map; "" is none
    base: str = ""  # the row whose strength and weight a trained map takes


class Said(NamedTuple):
    """Answers to the asked sentences, and after them numbers for those outside."""

    answer: Tensor  # (F,) class numbers
    fine: Tensor  # (F,) whether they are right
    sure: Tensor  # (F + outside,) the probability of the answer
    near: Tensor  # (F + outside,) −‖z − c‖², c the nearest class mean; empty where none outside is asked


@dataclass(frozen=True, eq=False)
class Sentences:
    """Features of all sentences, and how many there are of each kind.

    `embedded` (N, D) and `grams` (N, G) have the same rows: `domains` · `ways` · `each` sentences, `domains` · `ways` names,
    and what is `outside`, part -> how many. A domain is trained on for `steps` steps; an episode asks `asked` sentences of
    each class.
    """

    embedded: Tensor
    grams: Tensor
    domains: int
    ways: int
    each: int
    outside: dict[str, int]
    steps: int
    asked: int = 10

    def place(self, part: str) -> np.ndarray:
        """The rows of "names", or of a part of what is outside."""
        sizes = {"names": self.domains * self.ways, **self.outside}
        one_of(part=(part, tuple(sizes)))
        first = self.domains * self.ways * self.each
        before = [n for k, n in sizes.items() if list(sizes).index(k) < list(sizes).index(part)]
        return first + sum(before) + np.arange(sizes[part])

    def validation(self, target: int) -> list[int]:
        """The domains on which settings for a target are chosen."""
        return [(target + i) % self.domains for i in range(1, 1 + VALIDATION)]

    def sources(self, target: int) -> list[int]:
        """The domains that train a map for a target."""
        return [(target + i) % self.domains for i in range(1 + VALIDATION, self.domains)]

    def drawn(
        self, domains: Sequence[int], labels: int, draw: int, names: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of labelled sentences, their classes, and rows of sentences to ask about: class 0, 1, …, again and again.

        More labels keep those of fewer, and the asked sentences stay.
        """
        positive(labels=labels)
        if labels + self.asked > self.each:
            raise ValueError(
                f"expected at most {self.each - self.asked} labels of {self.each} sentences, {self.asked} of which are asked, "
                f"got {labels}"
            )
        own = np.concatenate([np.arange(self.ways * d, self.ways * (d + 1)) for d in domains])
        rng = np.random.default_rng([draw, *domains])
        mixed = np.stack([self.each * i + rng.permutation(self.each) for i in own])
        told = mixed[:, :labels].T.ravel()
        s = np.r_[told, self.place("names")[own]] if names else told
        return s, np.arange(len(s)) % len(own), mixed[:, -self.asked :].T.ravel()

    def ask(
        self,
        row: Row,
        domain: int,
        labels: int,
        draw: int,
        setting: Sequence[Any],
        learned: tuple[int, ...] = (),
        outside: str = "",
    ) -> Said:
        """What a row says in one episode of a domain, with a setting (strength, weight, and of a trained map rate, factor).

        It reads the embedding with √weight times the n-grams beside it, or with the weight None the n-grams alone. A trained
        map is that of `learned`, (target, seed).
        """
        strength, weight, *how = setting
        s, y, q = self.drawn((domain,), labels, draw, row.names)
        rows = np.r_[s, q, self.place(outside)] if outside else np.r_[s, q]
        x = self.grams[rows] if weight is None else self.embedded[rows]
        if row.by:
            with torch.no_grad():
                x = _trained(self, row.by, *learned, *how)(x)
        if weight:
            x = torch.cat([x, weight**0.5 * self.grams[rows]], 1)
        known, rest = x[: len(s)], x[len(s) :]
        scores = answers(row.head, known, y, rest, strength)
        near = answers("class means", known, y, rest).amax(1) if outside else scores.new_empty(0)
        answer = scores[: len(q)].argmax(1)
        fine = answer == torch.arange(self.ways).repeat(self.asked)
        return Said(answer, fine, scores.softmax(1).amax(1), near)

    def offered(
        self,
        head: str,
        strength: float | Sequence[float] | None,
        domains: Sequence[int],
        labels: int,
        draw: int,
    ) -> Tensor:
        """The share of right answers of each domain (domains,) where all their classes are offered at once, with names.

        The head reads the embedding alone. Of several strengths it takes that of `cross_validated`.
        """
        s, y, q = self.drawn(domains, labels, draw, names=True)
        x = self.embedded[s]
        if isinstance(strength, Sequence):
            strength = cross_validated(head, x, y, strength)
        said = answers(head, x, y, self.embedded[q], strength).argmax(1)
        fine = said.view(self.asked, -1) == torch.arange(len(domains) * self.ways)
        return fine.double().view(self.asked, len(domains), self.ways).mean((0, 2))


def answers(
    head: str,
    x: Tensor,
    y: np.ndarray,
    asked: Tensor,
    strength: float | None = None,
) -> Tensor:
    """Scores (Q, W) of asked rows (Q, D) by a head that read labelled rows.

    These are x (N, D) of classes y (N,), 0 to W − 1. The head is one of
    "logistic regression", scikit-learn's, with C = `strength`; "probe",
    `linear_probe`, and "ridge", with theirs; "class means", `protonet`,
    which has none. Raises ValueError for another head.
    """
    one_of(head=(head, HEADS))
    ways = int(y.max()) + 1
    if head == "logistic regression":
        # it reads inner products with labelled rows alone: those stay
        span = torch.linalg.qr(x.double().T).Q
        c = 1.0 if strength is None else strength
        phi = logistic_head(x.double() @ span, torch.from_numpy(y), c, tol=1e-6)
        return torch.addmm(phi["head.bias"], asked.double() @ span, phi["head.weight"].mT)
    flat = two_halves(nn.Identity(), zero_linear(x.shape[1], ways))
    learner = protonet(flat)
    if head == "probe":
        many = 500 if strength else 100
        learner = linear_probe(flat, strength=strength, iterations=many)
    if head == "ridge":
        learner = ridge(flat, 1.0 if strength is None else strength)
    labels = one_hot(torch.from_numpy(y), ways)
    theta = learner.adapt(learner.init(), Batch(x, labels))
    with torch.no_grad():
        found: Tensor = learner.predict(theta, asked)
    return found


def cross_validated(head: str, x: Tensor, y: np.ndarray, strengths: Sequence[float]) -> float:
    """The strength that answers most held-out labelled rows rightly, the first of equal ones; folds as in `linear_probe`.

    Raises ValueError where a class has one row.
    """
    fold = folds(one_hot(torch.from_numpy(y), int(y.max()) + 1))
    if fold is None:
        raise ValueError(f"expected two labelled rows of each class, got {np.bincount(y).min()}")
    k = fold.numpy()

    def right(strength: float) -> int:
        said = [answers(head, x[k != i], y[k != i], x[k == i], strength) for i in set(k.tolist())]
        return sum(
            int((s.argmax(1).numpy() == y[k == i]).sum())
            for s, i in zip(said, set(k.tolist()), strict=True)
        )

    return max(strengths, key=right)


def limit(seen: Sequence[Said]) -> float:
    """The nearness below which a sentence is refused, from answers in episodes with sentences outside.

    Out of 99 quantiles of the nearness it is the one with the greatest sum of two shares: the asked sentences that are
    answered rightly, and those outside that are refused; the first of equal ones. Raises ValueError without sentences outside.
    """
    if not seen:
        raise ValueError("expected answers in at least one episode, got none")
    near = torch.cat([s.near for s in seen]).double()
    levels = torch.quantile(near, torch.linspace(0.01, 0.99, 99).double())

    def quality(level: float) -> float:
        found = [refusal(s, level) for s in seen]
        return sum(f["inside, right"] + f["outside, refused"] for f in found)

    found: float = max(levels.tolist(), key=quality)
    return found


def _inside(said: Said) -> int:
    """How many sentences are of the domain. Raises ValueError without sentences outside."""
    n = len(said.fine)
    if len(said.near) <= n:
        raise ValueError(f"expected sentences outside beside the {n} asked ones, got none")
    return n


def refusal(said: Said, level: float) -> dict[str, float]:
    """The two shares of `limit` at a level of nearness. Raises ValueError without sentences outside."""
    n, kept = _inside(said), said.near >= level
    return {
        "inside, right": (said.fine & kept[:n]).double().mean().item(),
        "outside, refused": 1 - kept[n:].double().mean().item(),
    }


def areas(said: Said) -> dict[str, float]:
    """The area under the ROC curve of sentences inside against those outside, by each of the two numbers.

    Raises ValueError without sentences outside.
    """
    kinds = np.arange(len(said.near)) < _inside(said)
    found = {"area, probability": said.sure, "area, nearness": said.near}
    return {k: float(roc_auc_score(kinds, v)) for k, v in found.items()}


class Turned(nn.Module):
    """x ↦ Wx / ‖Wx‖; W starts at the identity."""

    def __init__(self, inputs: int):
        super().__init__()
        self.map = nn.Linear(inputs, inputs, bias=False)
        nn.init.eye_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.map(x), dim=-1)


def trained(
    data: Sentences, by: str, target: int, seed: int, rate: float, factor: float
) -> Callable[[Tensor], Tensor]:
    """The map of the embedding that a target's source domains trained, by "joint" training or by "episodes".

    Joint: all their classes are those of one classifier. Episodes: class means of five sentences a class answer five others
    of one domain, as in `protonet`. Scores are multiplied by the `factor` before the softmax; Adam's rate falls to zero.
    """
    one_of(by=(by, ("joint", "episodes")))
    among, ways = data.sources(target), data.ways
    own = data.embedded[: data.domains * ways * data.each]
    items = own.view(data.domains, ways, data.each, -1)[among]
    classes = len(among) * ways if by == "joint" else ways
    net = two_halves(Turned(own.shape[1]), zero_linear(own.shape[1], classes))

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(factor * scores, y)

    called = [str(i) for i in range(classes)]
    if by == "joint":
        learner, objective = as_is(net), joint(net, loss)
        every = ClassSet(items.flatten(0, 1), called, "sentences")
        stream: Any = mixture(pool(every), batch=128, seed=seed)
    else:
        learner = protonet(net)
        objective = bilevel(learner, loss)
        parts = [
            episodes(ClassSet(part, called, "sentences"), ways, 5, 5, 1, seed) for part in items
        ]
        turn = np.random.default_rng(seed).integers(len(parts), size=data.steps)

        def stream(step: int) -> Any:
            return parts[turn[step]](step)

    how = {**cosine_adam(rate, data.steps), "device": device()}
    run = fit(objective, learner.init(), stream, data.steps, **how)
    return partial(features(net), move(run.params, "cpu"))


_trained = cache(trained)
