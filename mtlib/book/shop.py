"""Contenders on photographs of groceries: frozen features of a pretrained network, a head on them, its last block, none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from mtlib.bilevel import bilevel
from mtlib.book.contest import Way
from mtlib.book.page import device
from mtlib.core import Batch, Learner, Params, move, parameters
from mtlib.data.grocery import Folders, groceries
from mtlib.joint import joint
from mtlib.learners.finetune import from_there, linear_probe
from mtlib.learners.metric import protonet, simpleshot, whitening
from mtlib.models.backbones import ReadImages
from mtlib.models.efficientnet import before, efficientnet_lite0, last, seen
from mtlib.nets import conv4, residual, seeded, two_halves
from mtlib.norm import calibrate
from mtlib.tasks import ClassSet, mixture, pool
from mtlib.train import cosine_adam, fit

PARTS = ("train", "val", "test")


def few(part: str, classes: int | None = None, pictures: int | None = None) -> Folders:
    """`groceries(part)`, or the first classes and photographs of it."""

    def first(data: ClassSet) -> ClassSet:
        data = data.select([*range(len(data.names))][:classes])
        return data._replace(items=data.items[:, :pictures])

    return Folders(*map(first, groceries(part)))


@dataclass(frozen=True, eq=False)
class Shop:
    """What contenders share: photographs, the sizes at which they are read, and how long training is.

    `photos` are part -> folders of bytes. The backbone reads `size` pixels a side, a network from scratch `small`. Practice
    takes `steps` steps of two tasks with `ways` classes, five labels and five queries of each; naming as many steps of as
    many photographs. A head has `hidden` units.
    """

    photos: Mapping[str, Folders]
    size: int
    small: int
    steps: int
    ways: int
    hidden: int

    @cached_property
    def _seen(self) -> tuple[dict[str, Folders], str]:
        made_by = [""]

        def features(x: Tensor) -> Tensor:
            z, made_by[0] = self.features(x)
            return z

        found = {part: self.photos[part].map(features) for part in PARTS}
        return found, made_by[0]

    def features(self, x: Tensor) -> tuple[Tensor, str]:
        """Frozen features (N, D) of photographs (N, 3, h, w) of bytes, and what made them."""
        return seen(x.float() / 255, self.size)

    @property
    def z(self) -> dict[str, Folders]:
        """Part -> the frozen features of its photographs."""
        return self._seen[0]

    @property
    def made_by(self) -> str:
        """What made the features, in words that end in "(stand-in)" for random weights."""
        return self._seen[1]

    @property
    def source(self) -> str:
        """The test data's source, or that the weights are none: then no claim is judged."""
        return (
            self.made_by
            if self.made_by.endswith("(stand-in)")
            else self.photos["test"].query.source
        )

    @property
    def width(self) -> int:
        """D."""
        return int(self.z["train"].support.items.shape[-1])

    @cached_property
    def data(self) -> dict[str, Folders]:
        """Part -> folders whose items are a photograph in each form in which somebody reads it.

        "colour" (3,), its mean; "small" (3, s, s); "z" (D,), frozen features; "level" (D,), these centred on the training
        photographs and of length √D.
        """
        centre = self.z["train"].mixed().items.mean((0, 1))

        def forms(photos: ClassSet, z: Tensor) -> ClassSet:
            x = photos.items.float().flatten(0, 1) / 255
            small = interpolate(x, (self.small, self.small), mode="area")
            own = {"colour": x.mean((2, 3)), "small": small}
            own = {k: v.unflatten(0, z.shape[:2]) for k, v in own.items()}
            near = z - centre
            level = self.width**0.5 * near / near.norm(dim=-1, keepdim=True)
            return photos._replace(items={**own, "z": z, "level": level})

        return {
            part: Folders(
                *(forms(p, f.items) for p, f in zip(self.photos[part], self.z[part], strict=True))
            )
            for part in PARTS
        }

    def only(self, key: str, part: str = "train") -> Folders:
        """A part with one form of its photographs alone."""
        return Folders(*(d._replace(items=d.items[key]) for d in self.data[part]))

    # Ways ------------------------------------------------------------------------------------

    def still(
        self,
        key: str,
        make: Callable[[nn.Module, Any], Learner],
        settings: Sequence[Any] = ("as it is",),
        kind: str = "transfer",
    ) -> Way:
        """A learner on one form of the photographs that needs no training: `make(network, setting)`; its body is the identity."""

        def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
            columns = self.data["test"].support.items[key].shape[-1]
            flat = two_halves(nn.Flatten(), nn.Linear(columns, 5))
            return ready(key, make(flat, setting), {"centre.mean": torch.zeros(columns)})

        return Way(kind, train, settings, drawn=False)

    def whitened(self, settings: Sequence[float]) -> Way:
        """SimpleShot after `whitening` of the training photographs' features; a setting is the shrinkage."""

        @cache
        def solved(shrinkage: float) -> Params:
            return whitening(*pool(self.z["train"].mixed()), shrinkage)

        def train(setting: float, seed: int, share: int) -> tuple[Learner, Params]:
            net = two_halves(nn.Linear(self.width, self.width), nn.Linear(self.width, 5))
            return ready("z", simpleshot(net), {**self.centre, **solved(setting)})

        return Way("transfer", train, settings, drawn=False)

    @property
    def centre(self) -> Params:
        """SimpleShot's centre of features that have none to take off."""
        return {"centre.mean": torch.zeros(self.width)}

    def practising(
        self,
        make: Callable[[nn.Module], Learner],
        sharp: float,
        settings: Sequence[float],
        head: bool,
    ) -> Way:
        """Practice on episodes of "level" features, with a `residual` head or none; logits are `sharp` times the learner's."""

        @cache
        def train(setting: float, seed: int, share: int) -> tuple[Learner, Params]:
            net = (
                residual(self.width, self.hidden, 5, seed=seed)
                if head
                else two_halves(nn.Flatten(), nn.Linear(self.width, 5))
            )
            with seeded(seed):
                learner = make(net)
            drawn = self.only("level").draw(ways=self.ways, shots=5, queries=5, tasks=2, seed=seed)
            return ready(
                "level",
                learner,
                _fitted(
                    bilevel(learner, _sharp(sharp)),
                    learner.init(),
                    drawn,
                    setting,
                    self.steps // share,
                ),
            )

        return Way("meta", train, settings)

    def naming(self, settings: Sequence[float]) -> Way:
        """The same head, trained to name the training classes, then read by SimpleShot."""

        @cache
        def train(setting: float, seed: int, share: int) -> tuple[Learner, Params]:
            both = self.only("level")
            net = residual(self.width, self.hidden, len(both.support.names), seed=seed)
            drawn = mixture(
                pool(both.support), pool(both.query), batch=2 * self.ways * 5, seed=seed
            )
            phi = _fitted(
                joint(net, cross_entropy), parameters(net), drawn, setting, self.steps // share
            )
            body = {k: v for k, v in phi.items() if k.startswith("body.")}
            reader = simpleshot(residual(self.width, self.hidden, 5, seed=seed))
            return ready("level", reader, {**self.centre, **body})

        return Way("transfer", train, settings)

    def from_scratch(self, settings: Sequence[float], steps: int, filters: int) -> Way:
        """ProtoNet of four convolutions on the small copies: practice alone, `steps` episodes of five ways."""

        @cache
        def train(setting: float, seed: int, share: int) -> tuple[Learner, Params]:
            net = conv4(5, 3, filters, self.small, "batch", seed=seed)
            learner, own = protonet(net), self.only("small")
            drawn = own.draw(ways=5, shots=5, queries=5, tasks=1, seed=seed)
            phi = _fitted(
                bilevel(learner, _sharp(0.3)), learner.init(), drawn, setting, steps // share
            )
            frozen = conv4(5, 3, filters, self.small, "stored", seed=seed).to(device())
            some = [move(own.support.items[:, k].contiguous(), device()) for k in (0, 5, 10)]
            return ready("small", protonet(frozen), calibrate(frozen, phi, some))

        return Way("meta", train, settings)

    @cached_property
    def inputs(self) -> dict[str, Folders]:
        """Part -> what the backbone's last block reads of each photograph; kept, as the features are."""
        look = partial(before, 1, size=self.size)
        return {part: self.photos[part].map(lambda x: look(x.float() / 255)) for part in PARTS}

    def _end(self) -> nn.Module:
        return two_halves(last(1, efficientnet_lite0()), nn.Linear(self.width, 5)).to(device())

    def practising_last(self, settings: Sequence[float], steps: int) -> Way:
        """SimpleShot on `inputs` after `steps` episodes of five ways that moved the last block; no steps, where it is.

        Centred on the training photographs' frozen features; the centre moves with the block.
        """

        @cache
        def train(setting: float, seed: int, share: int) -> tuple[Learner, Params]:
            learner = simpleshot(self._end())
            phi = {**learner.init(), "centre.mean": self.z["train"].mixed().items.mean((0, 1))}
            phi = move(phi, device())
            if not steps:
                return learner, phi
            drawn = self.inputs["train"].draw(ways=5, shots=5, queries=5, tasks=1, seed=seed)
            objective = bilevel(learner, _sharp(10.0))
            return learner, _fitted(objective, phi, drawn, setting, steps // share)

        return Way("meta" if steps else "transfer", train, settings, drawn=steps > 0)

    def moving(
        self, tune: Callable[[nn.Module, float], Learner] | None, settings: Sequence[Any]
    ) -> Way:
        """The probe's head on `inputs`, and from there `tune(network, rate)`, which moves the last block, too."""

        def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
            net = self._end()
            probe = linear_probe(net, strength=1.0)
            if tune is None:
                return probe, probe.init()
            with seeded(seed):
                learner = tune(net, setting)

            def given(phi: Params, support: Batch) -> Params:
                new = probe.adapt(phi, support)
                return {**phi, "head.weight": new["probe.weight"], "head.bias": new["probe.bias"]}

            adapt = from_there(learner.adapt, given)
            return learner._replace(adapt=adapt, vmap=False), learner.init()

        return Way("transfer", train, settings, drawn=False)

    def misread(self, part: str) -> Folders:
        """A part's features, as {"z": …}, where photographs are normalised by ImageNet's mean and deviation instead."""
        net = efficientnet_lite0()
        net.read = ReadImages(self.size)

        def look(x: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"z": torch.cat([net.features(p.float() / 255) for p in x.split(32)])}

        return self.photos[part].map(look)


def ready(key: str, learner: Learner, phi: Params) -> tuple[Learner, Params]:
    """The learner as tests use it, given one form of the photographs, and its φ."""

    def adapt(phi: Params, support: Batch) -> Params:
        return learner.adapt(phi, support._replace(x=support.x[key]))

    def predict(theta: Params, x: Any) -> Tensor:
        return learner.predict(theta, x[key])

    return learner._replace(adapt=adapt, predict=predict), move(phi, device())


def _sharp(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: cross_entropy(scale * logits, y)


def _fitted(objective: Any, phi: Params, drawn: Any, rate: float, steps: int) -> Params:
    steps = max(1, steps)
    how = {**cosine_adam(rate, steps), "device": device()}
    return fit(objective, phi, drawn, steps, **how).params
