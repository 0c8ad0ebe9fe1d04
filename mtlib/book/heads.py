"""Contenders with linear heads on fixed features, such as an encoder's: from domains with labels to one with few or none.

Each is an `ask` of `mtlib.book.across.Rival`. A setting is (kind of features, strength, …): what is done to the features is
a choice like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel
from mtlib.book.across import Ask
from mtlib.book.page import device
from mtlib.core import Batch, Episode, Learner, Loss, Params, expect, move, parameters
from mtlib.data.sentiment import draws, tested
from mtlib.learners.closed_form import ridge
from mtlib.learners.finetune import logistic_head
from mtlib.learners.gradient import descent, maml, proximal
from mtlib.nets import two_halves, zero_linear
from mtlib.tasks import ClassSet, episodes, one_hot, one_of, positive
from mtlib.train import cosine_adam, fit
from mtlib.transfer.align import recoloured

Answer = Callable[..., Tensor]
"""`answer(sources, target, few, run, kind, *setting)` -> logits (T, Q, 2) for the questions of T draws, `few`."""


def linear_net(width: int) -> nn.Module:
    """A head of two outputs, at zero, on features that stay as they are."""
    positive(width=width)
    return two_halves(nn.Identity(), zero_linear(width, 2))


def logits(phi: Params, z: Tensor) -> Tensor:
    """The head's answers to features (…, D): (…, 2)."""
    return z @ phi["head.weight"].mT + phi["head.bias"]


def drawn_back(net: nn.Module, strength: float, part: str = "head", steps: int = 60) -> Learner:
    """L2-SP on features of about unit length: θ descends on its few labels, and is drawn back to φ by ½λ‖θ − φ‖².

    `part` moves, "head" or "head.bias" alone. The rate 1 / (1 + λ) is safe there: the loss of two outputs bends by at most
    ½(‖z‖² + 1) + λ. {cite}`li2018l2sp`
    """
    return descent(net, cross_entropy, 1 / (1 + strength), steps, part, proximal(strength))


def joined(few: Episode, c: float, weight: float = 1.0, sources: Batch | None = None) -> Tensor:
    """Joint training: logistic regression on the sources, if any, and on each draw's labels, these with a weight."""
    z, y = few.support.x, few.support.y.argmax(2)
    own = z.new_full((z.shape[1],), weight)
    found = []
    for x, said, asked in zip(z, y, few.query.x, strict=True):
        if sources is None:
            phi = logistic_head(x, said, c, own)
        else:
            both = torch.cat([sources.x, x]), torch.cat([sources.y, said])
            phi = logistic_head(*both, c, torch.cat([torch.ones(len(sources.y)).to(own), own]))
        found.append(logits(phi, asked))
    return torch.stack(found)


def adapted(learner: Learner, phi: Params, few: Episode) -> Tensor:
    """The answers of a learner once it has adapted to each draw."""

    def one(support: Batch, query: Batch) -> Tensor:
        return learner.predict(learner.adapt(phi, support), query.x)

    with torch.no_grad():  # inner gradients are first derivatives alone
        found: Tensor = torch.vmap(one)(*few)
    return found


class Heads:
    """Ways to a new domain on fixed features. `sets` are kind -> domain -> z (n, D), `y` domain -> labels, 0 or 1, (n,).

    `strength(sources, target)` is C of the sources' classifier, from which others start; `steps` are those of practice. An
    `ask` draws labels in balance from one half of the target and is tested on the other, then the reverse, with 1 to 9 `draws`
    a run (`mtlib.data.sentiment.draws`).
    """

    def __init__(
        self,
        sets: Mapping[str, Mapping[str, Tensor]],
        y: Mapping[str, Tensor],
        strength: Callable[[Sequence[str], str], float],
        draws: int = 4,
        steps: int = 60,
    ):
        expect(callable(strength), "strength, a function (sources, target) -> C", strength)
        positive(draws=draws, steps=steps)
        for kind, held in sets.items():
            if {k: len(z) for k, z in held.items()} != {k: len(v) for k, v in y.items()}:
                raise ValueError(
                    f"expected features {kind!r} of each domain's items, as many as labels"
                )
        self.sets, self.y, self.strength = sets, y, strength
        self.draws, self.steps = draws, steps
        self.start = cache(self._start)
        self.coloured = cache(self._coloured)
        self.practised = cache(self._practised)

    def rows(self, kind: str, sources: Sequence[str]) -> Batch:
        """The labelled items of several domains."""
        parts = [self.sets[kind][s] for s in sources], [self.y[s] for s in sources]
        return Batch(*map(torch.cat, parts))

    def asking(self, answer: Answer, labels: int = 2) -> Ask:
        """A way's `ask`, from its answers to both halves of a target with so many labels."""

        def ask(sources: Sequence[str], target: str, run: int, setting: Any) -> Tensor:
            z, y, right = self.sets[setting[0]][target], self.y[target], []
            for fold in (0, 1):
                few = draws(z, y, labels, self.draws, seed=7, fold=fold)(run)
                assert isinstance(few, Episode)
                said = answer(tuple(sources), target, few, run, *setting)
                right.append(said.argmax(2) == few.query.y.argmax(2))
            return torch.cat(right, 1)[:, tested(len(y), seed=7).argsort()]

        return ask

    def source_only(self) -> Ask:
        """The sources' classifier. A setting is (kind, C)."""
        return self.asking(
            lambda sources, target, few, run, kind, c: logits(
                self.start(kind, sources, c), few.query.x
            )
        )

    def coral(self) -> Ask:
        """The same, on each source's features recoloured as the target's. A setting is (kind, λ). See `recoloured`."""
        return self.asking(
            lambda sources, target, few, run, kind, lam: logits(
                self.coloured(kind, sources, target, lam), few.query.x
            )
        )

    def target_only(self, labels: int) -> Ask:
        """The target's few labels alone. A setting is (kind, C)."""
        return self.asking(
            lambda sources, target, few, run, kind, c: joined(few, c),
            labels,
        )

    def pooled(self, labels: int) -> Ask:
        """The sources and the few labels, which count as any other. A setting is (kind, C)."""
        return self.asking(
            lambda sources, target, few, run, kind, c: joined(
                few, c, 1.0, self.rows(kind, sources)
            ),
            labels,
        )

    def joint(self, labels: int) -> Ask:
        """The sources and the few labels. A setting is (kind, weight of a label)."""
        return self.asking(
            lambda sources, target, few, run, kind, weight: joined(
                few, self.strength(sources, target), weight, self.rows(kind, sources)
            ),
            labels,
        )

    def onward(self, labels: int, make: Callable[..., Learner]) -> Ask:
        """On from the sources' classifier, by the learner `make(*rest)`. A setting is (kind, *rest)."""
        return self.asking(
            lambda sources, target, few, run, kind, *rest: adapted(
                make(*rest), self.start(kind, sources, self.strength(sources, target)), few
            ),
            labels,
        )

    def practising(self, labels: int, name: str) -> Ask:
        """A meta-learner after practice on the sources with so many labels. A setting is (kind, rate, inner).

        "MAML" practises the start of five steps of rate `inner`, and sets out from the sources' classifier. "ridge head"
        practises what a ridge regression is drawn to, and how strongly, at first λ = `inner`; it sets out from the sources'
        own ridge regression with λ = 4/C, as strict as their classifier. A run's number is the seed.
        """
        one_of(name=(name, ("MAML", "ridge head")))

        def answer(sources: Any, target: str, few: Episode, run: int, *setting: Any) -> Tensor:
            c = self.strength(sources, target)
            learner, phi = self.practised(name, sources, c, labels, run, *setting)
            return adapted(learner, phi, few)

        return self.asking(answer, labels)

    def _start(self, kind: str, sources: tuple[str, ...], c: float) -> Params:
        return logistic_head(*self.rows(kind, sources), c)

    def _coloured(self, kind: str, sources: tuple[str, ...], target: str, lam: float) -> Params:
        like = self.sets[kind][target]
        z = torch.cat([recoloured(self.sets[kind][s], like, lam) for s in sources])
        return logistic_head(z, self.rows(kind, sources).y, self.strength(sources, target))

    def _practised(
        self,
        name: str,
        sources: tuple[str, ...],
        c: float,
        labels: int,
        run: int,
        kind: str,
        rate: float,
        inner: float,
    ) -> tuple[Learner, Params]:
        z, y = self.rows(kind, sources)
        net = linear_net(z.shape[1])
        loss: Loss = mse_loss
        if name == "MAML":
            learner, loss = maml(net, cross_entropy, inner, 5), cross_entropy
            phi = self.start(kind, sources, c)
        else:
            learner = ridge(net, inner)
            first = ridge(net, 4 / c)  # as the logistic loss bends by C/4 where it is undecided
            solved = first.adapt(first.init(), Batch(z, one_hot(y, 2, z.dtype)))
            phi = learner.init() | {k: solved[k] for k in parameters(net)}
        parts = []
        for s in sources:
            classes = [self.sets[kind][s][self.y[s] == v] for v in (0, 1)]
            data = ClassSet(classes, ["0", "1"], s)
            parts.append(episodes(data, 2, labels // 2, 32, 4, seed=run, numbers="fixed"))

        def stream(step: int) -> Episode:
            found = parts[step % len(parts)](step)
            assert isinstance(found, Episode)
            return found

        how = {**cosine_adam(rate, self.steps), "device": device()}
        run_ = fit(bilevel(learner, loss), phi, stream, self.steps, **how)
        return learner, move(run_.params, "cpu")
