"""Every learner on one bench: how the page of all methods trains each of them, with as many settings, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.bilevel import bilevel, implicit, unrolled
from mtlib.book.contest import Contest, Gap, Pieces, Way
from mtlib.book.page import device, scale
from mtlib.book.results import kept, recording
from mtlib.book.ways import Bench, ready, study
from mtlib.core import Learner, Params, expect, half, move, parameters
from mtlib.data.characters import characters
from mtlib.joint import joint
from mtlib.learners.metric import cosine_head
from mtlib.nets import Residual, mlp, seeded, two_halves
from mtlib.run.cost import peak_memory
from mtlib.tasks import ClassSet, episodes, mixture, one_of, pool, positive, quiz
from mtlib.train import cosine_adam, fit

FAMILIES = {
    "baseline": "baseline",
    "transfer": "transfer",
    "gradient": "meta",
    "metric": "meta",
    "closed form": "meta",
    "amortised": "meta",
}
"""A family of methods -> the kind of contender that its members are."""

FIRST = ("nothing", "names", "cosine names", "episodes", "names, then episodes")
"""How a method's network is trained before it meets a task."""

PRACTICE = ((1, 5, 8), (5, 3, 6))
"""Episodes of practice, in turn: labels and queries a class, and how many an outer step sees: 240 drawings of five classes."""

RATE = 3e-3  # Adam's rate outside, where a method searches another number


class Line(NamedTuple):
    """A line of the catalogue.

    `make(net, *numbers)` gives the learner; each entry of `grid` is the numbers. With `rate` an entry
    is Adam's rate outside, and `make(net)` takes none. With `inner` = (in training, at test), `make`
    takes that many inner steps as its last argument. `trained` is one of `FIRST`. A learner for
    practice has a `loss` and a `gradient`, or, with `iterations` of conjugate gradients, iMAML's at
    the strength that is its number. `residual` puts a residual layer on the pre-trained body, and it
    alone moves. `later` makes the learner of the tests, where it is another, and `centre` gives it
    the mean feature of the training items.
    """

    family: str
    trained: str
    make: Callable[..., Learner]
    grid: Sequence[Any]
    rate: bool = False
    inner: tuple[int, int] | None = None
    later: Callable[..., Learner] | None = None
    loss: Callable[..., Any] = cross_entropy
    gradient: Callable[..., Any] = unrolled
    iterations: int = 0
    residual: bool = False
    centre: bool = False


def flat_characters(part: str, size: int = 14) -> ClassSet:
    """`characters` in `size` × `size` pixels in a row, (C, N, size²), less the mean training drawing, in units of its spread."""
    data = characters(part, size=size)
    train = data if part == "train" else characters("train", size=size)
    mean, spread = train.items.mean((0, 1)), train.items.std()
    return data._replace(items=((data.items - mean) / spread).flatten(2))


def bench_of(data: ClassSet, steps: int, drawings: int = 240, batch: int = 64) -> Bench:
    """A perceptron without a norm on flat drawings, `steps` of practice, and as many drawings of names in batches."""
    positive(steps=steps, drawings=drawings, batch=batch)
    expect(data.items.ndim == 3, "a ClassSet of flat drawings (C, N, D)", data.items)
    size = data.items.shape[-1]
    return Bench(
        data,
        lambda outputs, statistics="", seed=None: mlp(size, (128, 64), outputs, seed),
        steps,
        max(1, steps * drawings // batch),
    )


def ways_of(bench: Bench, lines: Mapping[str, Line]) -> dict[str, Way]:
    """The contenders of a catalogue: name -> `Way`. Each training runs once for the same arguments.

    Practice sees episodes with one and with five labels a class in turn. Where a line has two trainings, half the names come
    first and half the episodes after them. Raises ValueError for a family or a training that there is not.
    """
    return {name: _way(bench, line) for name, line in lines.items()}


def costs(
    page: str, bench: Bench, lines: Mapping[str, Line], found: Contest, repeats: int = 2
) -> dict[str, list[float]]:
    """Method -> [processor seconds of its whole training on one thread, most bytes that an outer step holds].

    Of the record where it has them, and measured in a recording: the least of `repeats` for a few steps, times their number.
    A method that trains nothing, or was not measured, is left out.
    """
    old: dict[str, list[float]] = kept(page, found.data.endswith("(real)")).get("costs", {})
    if old or not recording():
        return old
    pieces = Pieces(page, "costs")
    measured = {
        name: pieces.keep([name], partial(_cost, bench, line, found.setting(name), repeats))
        for name, line in lines.items()
        if line.trained != "nothing"
    }
    return {name: cost for name, cost in measured.items() if cost[0] > 0}


class Answer(NamedTuple):
    """A line of the checklist: the question, the number that answers it, and whether the answer is yes."""

    question: str
    number: str
    yes: bool | None


def worth(
    found: Contest,
    meta: str,
    alone: str,
    means: str,
    best: str,
    seconds: Mapping[str, float],
) -> list[Answer]:
    """Is meta-learning worth its cost? The checklist, by the paired differences of a contest; None where nothing ran.

    `meta` is held against the target `alone`, pre-training with class `means`, and the `best` transfer; each lower end of the
    wider 95 % interval, over seeds and over groups, is above zero for a yes. Then both were tuned alike where they tried as
    many settings, and the times of training are compared.
    """
    rows = [
        _beyond(f"More than {other}, beyond both intervals?", found.minus(meta, other))
        for other in dict.fromkeys((alone, means, best))
    ]
    tried = [len(found.tuning(way)) for way in (meta, best)]
    there = meta in found and best in found
    rows.append(
        Answer(
            "As many settings tried for both?",
            f"{tried[0]} and {tried[1]}" if there else "not run",
            tried[0] == tried[1] if there else None,
        )
    )
    times = [seconds.get(way) for way in (meta, best)]
    if None in times:
        return [*rows, Answer("Trained in no more seconds?", "not run", None)]
    mine, theirs = (float(t or 0) for t in times)
    rows.append(
        Answer("Trained in no more seconds?", f"{mine:.1f} and {theirs:.1f}", mine <= theirs)
    )
    return rows


def _beyond(question: str, gap: Gap) -> Answer:
    ran = gap.mean == gap.mean
    return Answer(question, gap.points(), gap.low > 0 if ran else None)


def _way(bench: Bench, line: Line) -> Way:
    """One line as a contender: its grid, and how it trains."""
    one_of(family=(line.family, tuple(FAMILIES)), trained=(line.trained, FIRST))
    kind = FAMILIES[line.family]
    practises = kind == "meta"

    @cache
    def trained(setting: Any, seed: int, share: int) -> Params:
        return _trained(bench, line, setting, seed, share)

    def train(setting: Any, seed: int, share: int) -> tuple[Learner, Params]:
        numbers = _numbers(line, setting, 1)
        # in transfer a head, or a rate of the adaptation, does not change what came before it
        before = (setting, seed, share) if practises else (setting if line.rate else None, seed, 1)
        with seeded(seed):
            return ready(
                bench,
                lambda net: (line.later or line.make)(_network(net, line), *numbers),
                trained(*before),
                line.centre,
            )

    return Way(kind, train, line.grid)


def _numbers(line: Line, setting: Any, at: int) -> tuple[Any, ...]:
    """What `make` takes beside the network, in training (`at` = 0) or at test (1)."""
    own = () if line.rate else tuple(setting) if isinstance(setting, tuple | list) else (setting,)
    return own if line.inner is None else (*own, line.inner[at])


def _network(net: nn.Module, line: Line) -> nn.Module:
    """The bench's network, or its body under a residual layer."""
    if not line.residual:
        return net
    body, head = half(net, "body"), half(net, "head")
    d = int(head.in_features)  # type: ignore[arg-type]
    return two_halves(nn.Sequential(body, Residual(d, d)), nn.Linear(d, int(head.out_features)))  # type: ignore[arg-type]


def _trained(bench: Bench, line: Line, setting: Any, seed: int, share: int) -> Params:
    """φ after all that a line does before the tests, 1/`share` of the practice."""
    if FAMILIES[line.family] == "meta":
        return _practised(bench, line, setting, seed, share)
    if line.trained == "nothing":
        return parameters(bench.network(5, seed=seed).to(device()))
    rate = float(setting) if line.rate else RATE
    if line.trained == "episodes":
        return _summed(bench, rate, seed)
    return study(bench, "cosine" if line.trained.startswith("cosine") else "linear", rate, 64, seed)


def _objective(bench: Bench, line: Line, setting: Any, seed: int) -> tuple[Any, Params, Any, float]:
    """Practice as `fit` takes it: objective, first φ, stream and rate."""
    with seeded(seed):  # the learner's own weights come after the network's
        net = _network(bench.network(5), line)
        learner = line.make(net, *_numbers(line, setting, 0))
        phi = learner.init()
    parts = [episodes(bench.data, 5, *sizes, seed=seed) for sizes in PRACTICE]
    rate = float(setting) if line.rate else RATE
    way = implicit(float(setting), line.iterations) if line.iterations else line.gradient
    return bilevel(learner, line.loss, way), phi, lambda step: parts[step % 2](step), rate


def _practised(bench: Bench, line: Line, setting: Any, seed: int, share: int) -> Params:
    objective, phi, drawn, rate = _objective(bench, line, setting, seed)
    steps = max(1, bench.practise // share)
    if line.trained.startswith("names"):
        before = study(_halved(bench), "linear", RATE, 64, seed)
        if line.residual:
            before = {k.replace("body.", "body.0.", 1): v for k, v in before.items()}
        phi = {**phi, **{k: before[k] for k in phi if k in before and not k.startswith("head.")}}
        steps = max(1, steps // 2)
    slow = {"rates": {"lr.": rate / 10}} if any(k.startswith("lr.") for k in phi) else {}
    still = {"moves": [k for k in phi if not k.startswith("body.0.")]} if line.residual else {}
    how: dict[str, Any] = {**cosine_adam(rate, steps), "device": device(), **slow, **still}
    return fit(objective, phi, drawn, steps, **how).params


@cache
def _halved(bench: Bench) -> Bench:
    """The bench with half the names, for lines that practise afterwards."""
    return Bench(bench.data, bench.network, bench.practise, max(1, bench.study // 2))


@cache
def _summed(bench: Bench, rate: float, seed: int) -> Params:
    """Joint training on the episodes as they come, their classes numbered anew in each."""
    net, (shots, queries, tasks) = bench.network(5, seed=seed), PRACTICE[0]
    drawn = quiz(episodes(bench.data, 5, shots, queries, tasks, seed))
    how = {**cosine_adam(rate, bench.practise), "device": device()}
    objective = joint(net, cross_entropy)
    return fit(objective, parameters(net), drawn, bench.practise, **how).params


def _cost(bench: Bench, line: Line, setting: Any, repeats: int) -> list[float]:
    """[seconds, bytes] of a line's training."""
    setting = tuple(setting) if isinstance(setting, list) else setting
    meta, both = FAMILIES[line.family] == "meta", line.trained == "names, then episodes"
    parts = []
    if meta:
        objective, phi, drawn, _ = _objective(bench, line, setting, 0)
        parts.append((objective, phi, drawn, bench.practise // (2 if both else 1)))
    if line.trained == "episodes" and not meta:
        net, (shots, queries, tasks) = bench.network(5, seed=0), PRACTICE[0]
        drawn = quiz(episodes(bench.data, 5, shots, queries, tasks, 0))
        parts.append((joint(net, cross_entropy), parameters(net), drawn, bench.practise))
    if "names" in line.trained:
        net = bench.network(len(bench.data.names), seed=0)
        net = cosine_head(net) if line.trained.startswith("cosine") else net
        named = mixture(pool(bench.data), batch=64, seed=0)
        steps = bench.study // (2 if both else 1)
        parts.append((joint(net, cross_entropy), parameters(net), named, steps))
    found = [_measured(*part, repeats) for part in parts]
    return [sum(s for s, _ in found), float(max(b for _, b in found))]


def _measured(
    objective: Any, phi: Params, drawn: Any, steps: int, repeats: int
) -> tuple[float, int]:
    """Processor seconds of `steps` outer steps, from a few of them, and the most bytes that one holds."""
    few = scale(small=1, full=10)
    phi = move(phi, device())
    how: dict[str, Any] = {**cosine_adam(1e-5, few), "device": device(), "progress": False}
    fit(objective, phi, drawn, few, **how)  # what is made once
    times = []
    for _ in range(repeats):
        began = time.process_time()
        fit(objective, phi, drawn, few, **how)
        times.append(time.process_time() - began)
    held = peak_memory(objective.value_and_grad, phi, move(drawn(0), device()))
    return min(times) / few * steps, held
