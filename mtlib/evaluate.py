"""Scores over many episodes, with the interval they deserve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import torch
from scipy import special
from torch import Tensor

from mtlib.core import Episode, Learner, Params, Steps, Stream, fits, move, over, take
from mtlib.metrics import OF_CLASSES, Metric, accuracy, auroc, is_one_hot
from mtlib.metrics import macro_f1 as macro_f1
from mtlib.objective import Batched, in_chunks
from mtlib.run.copies import evaluating, grad_mode_kept
from mtlib.run.progress import bar
from mtlib.tasks import (
    ClassSet,
    check_classes,
    check_draw,
    check_seed,
    check_shapes,
    functions,
    positive,
)
from mtlib.train import Diverged

_Setting = TypeVar("_Setting")

# Scores --------------------------------------------------------------------------------------


class NotFinite(ValueError):
    """Some of the numbers that should give a score are NaN or infinite."""


class LossRose(UserWarning):
    """The inner steps ended above where they began."""


class Score(NamedTuple):
    """A `mean` and half the width of its 95 % `interval`, over episodes or over seeds.

    `values` (E,) has one number for each of them. `draw` identifies the episodes, so that scores can be paired: two
    scores with one `draw` are of the same tasks in the same order. `ends` are there where the interval is not alike to
    both sides; `interval` is then the longer arm.
    """

    mean: float
    interval: float
    values: Tensor
    draw: str | None = None
    ends: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f}"

    def __neg__(self) -> Score:
        ends = (-self.high, -self.low) if self.ends else None
        return Score(-self.mean, self.interval, -self.values, self.draw, ends)

    def percent(self) -> str:
        """As a percentage with one decimal: '94.6 ± 0.4'."""
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f}"

    def points(self) -> str:
        """A difference of two shares, in percentage points and with its sign: '+1.3 ± 0.4'."""
        return f"{100 * self.mean:+.1f} ± {100 * self.interval:.1f}"

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.ends[0] if self.ends else self.mean - self.interval

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.ends[1] if self.ends else self.mean + self.interval

    def minus(self, other: Score) -> Score:
        """This score less another on the same episodes, paired: `compare(self, other)`."""
        return compare(self, other)


@grad_mode_kept
def evaluate(
    learner: Learner,
    params: Params,
    stream: Stream,
    episodes: int = 600,
    metric: Metric = accuracy,
    chunk: int | None = None,
    progress: bool = True,
) -> Score:
    """Adapt to each episode's support set and score its query set: mean and 95 % interval over episodes.

    ```pycon
    >>> from mtlib.data.planted import planted
    >>> from mtlib.learners.metric import protonet
    >>> from mtlib.nets import mlp
    >>> from mtlib.tasks import episodes
    >>> learner = protonet(mlp(30, (32,), 5, seed=0))
    >>> stream = episodes(planted(), ways=5, shots=5, queries=10, tasks=10, seed=1)
    >>> score = evaluate(learner, learner.init(), stream, episodes=50)
    >>> score.mean > 0.2, len(score.values)
    (True, 50)

    ```

    The interval is one over episodes *of these classes*, given these parameters: of ten classes it holds the mean over
    new ones in one case of five. `over_classes` tells what other classes would give, `over_seeds` another training run.
    Like `interval`'s it is exact near 0 and 1, also where nearly all episodes score 0 or 1.

    Draws stream(0), stream(1), … until `episodes` are scored; memory does not grow with their number. Runs where
    `params` are. Networks adapt and predict in evaluation mode, whatever mode they are in: without dropout, and with
    norms that read their running statistics if `params` has them (`mtlib.norm.calibrate`).

    Raises ValueError where the stream gives its tasks again (one that comes twice by chance may), `NotFinite` where a prediction or score is NaN. Warns (`LossRose`) where the inner loss, with its pull, ends above
    where it began, as a mean over the first draw: the steps diverged.
    """
    device = _device(learner, params)
    _check(stream, episodes, metric, chunk)
    task, tasks = _Scored(learner, metric), _Tasks(stream)
    run = Batched(task, learner.vmap)
    parts = list[Tensor]()
    with torch.no_grad(), evaluating(), bar(episodes, "evaluate", progress) as shown:
        while sum(map(len, parts)) < episodes:
            data = move(tasks.draw(len(parts), metric), device)

            def scores(part: slice, data: Episode = data) -> Tensor:
                return run(params, take(data, part))

            parts.append(in_chunks(scores, _joined, params, data, chunk, run.share).cpu())
            if task.looks:
                parts[0] = task.look(parts[0], params, take(data.support, 0))
            shown.update(len(parts[-1]))
    return _score(torch.cat(parts)[:episodes], tasks.name(episodes), shares=True)


class _Scored:
    """One task's score; while it `looks`, the loss at both ends of its inner steps beside it: () or (3,)."""

    def __init__(self, learner: Learner, metric: Metric):
        self.learner, self.metric = learner, metric
        adapt = learner.adapt
        self.looks = isinstance(adapt, Steps) and adapt.steps > 0 and adapt.descent is not None

    def __call__(self, phi: Params, episode: Episode) -> Tensor:
        if not self.looks:
            return self.score(self.learner.adapt(phi, episode.support), episode)
        theta, ends = self.descend(phi, episode)
        score = self.score(theta, episode)
        return torch.stack([score, *(loss.to(score.dtype) for loss in ends)])

    def score(self, theta: Params, episode: Episode) -> Tensor:
        prediction, y = self.learner.predict(theta, episode.query.x), episode.query.y
        if not fits(self.metric, prediction, y):
            raise ValueError(
                f"expected predictions of the targets' shape {tuple(y.shape)}, W ≥ 2 for cross-entropy; got {tuple(prediction.shape)}: "
                f"the head has {prediction.shape[-1]} outputs. `start(learner, trained)` gives a learner of the right width, "
                "`mtlib.tasks.one_hot(y, ways)` rows of class numbers."
            )
        if y.dtype != prediction.dtype and y.is_floating_point():
            wide = torch.promote_types(prediction.dtype, torch.float32)
            prediction, y = prediction.to(wide), y.to(wide)  # as `mtlib.core.risk` does
        value = self.metric(prediction, y)
        if not isinstance(value, Tensor):
            raise TypeError(
                "expected a metric that gives one number for an episode as a tensor, got "
                f"{type(value).__name__}: compute it with torch, or give torch.as_tensor(value)"
            )
        if value.shape != ():
            raise ValueError(
                f"expected a metric that gives one number for an episode, got shape {tuple(value.shape)}; "
                "take its mean"
            )
        known = ~torch.isnan(prediction).any()  # argmax would make a class of NaN
        return torch.where(known, value, torch.nan)

    def descend(self, phi: Params, episode: Episode) -> tuple[Params, list[Tensor]]:
        """θ_K, and the inner loss at θ_0 and θ_K."""
        adapt, support = self.learner.adapt, episode.support
        assert isinstance(adapt, Steps) and adapt.descent is not None
        phi = adapt.given(phi, support)
        loss, _ = adapt.descent(phi, support)
        first = last = adapt.begin(phi, support)
        for j in range(adapt.steps):
            last = adapt.step(phi, support, j, last)
        return adapt.theta(phi, last), [loss(first[0]), loss(last[0])]

    def look(self, found: Tensor, params: Params, support: Any) -> Tensor:
        """The scores alone; warns where the mean loss rose by more than rounding. Looks no more."""
        self.looks = False
        values, before, after = found.unbind(1)
        rise = (after - before).mean()
        if bool(values.isfinite().all()) and not bool(rise <= 1e-3 * before.mean().abs() + 1e-6):
            adapt = self.learner.adapt
            assert isinstance(adapt, Steps) and adapt.descent is not None
            rate = _told(adapt.descent(adapt.given(params, support), support)[1])
            warnings.warn(
                f"the inner steps end above where they began: a mean support loss of {before.mean():.4g} became "
                f"{after.mean():.4g}, and rose in {int((after > before).sum())} of {len(found)} tasks. The inner "
                f"rate is {rate}: try a smaller one.",
                LossRose,
                stacklevel=4,  # who called `evaluate`
            )
        return values


def _told(rate: Any) -> str:
    """A rate, or between which numbers its entries are; of a function of the step, the first."""
    rate = rate(0) if callable(rate) else rate
    parts = rate.values() if isinstance(rate, Mapping) else [rate]
    numbers = torch.cat([torch.as_tensor(r).detach().cpu().double().flatten() for r in parts])
    low, high = numbers.min().item(), numbers.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


class _Tasks:
    """The tasks of a stream, each known by a hash of all its numbers, and whether they come again."""

    def __init__(self, stream: Stream):
        self.stream, self.order, self.again = stream, list[bytes](), 0
        self.where = dict[bytes, tuple[int, int]]()

    def draw(self, step: int, metric: Metric) -> Episode:
        """stream(step), once it is known to be a draw of episodes that were not scored before."""
        data = self.stream(step)
        if not isinstance(data, Episode):
            raise TypeError(
                f"evaluate expects episodes (support, query), got {type(data).__name__} at step {step}; "
                "`mtlib.tasks.episodes` makes such a stream"
            )
        check_draw(data)
        one_column = data.query.y.shape[-1] == 1 and metric is not auroc  # which they refuse
        if metric in OF_CLASSES and not one_column:
            _check_labels(data)
        self.see(step, digests(data))
        return data

    def see(self, step: int, found: list[bytes]) -> None:
        """Raise where as many tasks in a row as the draw has came before, two at least, or half of all did."""
        for i, digest in enumerate(found):
            self.order.append(digest)
            first = self.where.setdefault(digest, (step, i))
            self.again = self.again + 1 if first != (step, i) else 0
            kinds = len(self.where)
            if self.again >= max(2, len(found)) or 2 * kinds <= len(self.order):
                raise ValueError(
                    f"expected a stream of new tasks; stream({step}) gives as its task {i} what stream({first[0]}) gave "
                    f"as task {first[1]}, and only {kinds} of {len(self.order)} tasks so far are different. Ask for no "
                    f"more than there are, episodes={kinds}, or draw from more classes or items: repeated tasks make the "
                    "interval too short."
                )

    def name(self, episodes: int) -> str:
        """The name of the first tasks, in their order."""
        return blake2b(b"".join(self.order[:episodes]), digest_size=16).hexdigest()


def digests(draw: Episode) -> list[bytes]:
    """A hash of each task of a draw: BLAKE2 of the bytes of its x and y, support and query."""
    rows = list[Any]()

    def collect(d: Tensor) -> Tensor:
        flat = d.detach().cpu().reshape(len(d), -1).contiguous()
        rows.append(flat.view(torch.uint8).numpy())
        return d

    over(collect, draw)
    found = list[bytes]()
    for task in zip(*rows, strict=True):
        digest = blake2b(digest_size=16)
        for row in task:
            digest.update(row)
        found.append(digest.digest())
    return found


def _device(learner: Learner, params: Params) -> torch.device:
    """Where the parameters are. Raises unless they are a dict of tensors, of the shapes that the network has."""
    if not isinstance(learner, Learner):
        raise TypeError(f"expected a Learner, e.g. protonet(net), got {type(learner).__name__}")
    if not isinstance(params, Mapping) or not all(isinstance(v, Tensor) for v in params.values()):
        raise TypeError(
            "expected parameters, a dict of tensors such as `learner.init()` or `fit(...).params`, got "
            f"{type(params).__name__}"
        )
    if learner.net is not None:
        check_shapes(learner.net, params)
    return next((v.device for v in params.values()), torch.device("cpu"))


def _check_labels(draw: Episode) -> None:
    """Raise unless the query's y is one-hot, and no row of the support's y says more than one class."""
    if not is_one_hot(draw.query.y):
        raise ValueError(
            "expected one-hot rows in the query's y for accuracy, macro_f1 and auroc: one 1 in each row, 0 "
            "elsewhere. For several labels per item, or real targets, give another metric."
        )
    y = draw.support.y
    if y.shape[-1] > 1 and bool((y >= 0).all()) and bool((y.sum(-1) > 1.01).any()):
        raise ValueError(
            "expected one-hot rows in the support's y for accuracy, macro_f1 and auroc (or shares that sum to 1), got "
            f"rows with a sum of {y.sum(-1).max():g}: an item of several classes. Give another metric."
        )


def _check(stream: Stream, episodes: int, metric: Metric, chunk: int | None) -> None:
    """Raise unless `evaluate`'s arguments are what they should be."""
    if not callable(stream):
        raise TypeError(
            f"expected a stream, a function of the step such as `episodes(...)`, got {type(stream).__name__}"
        )
    positive(episodes=episodes)
    if chunk is not None:
        positive(chunk=chunk)
    if episodes < 2:
        raise ValueError(f"expected at least 2 episodes for an interval, got {episodes}")
    functions(2, metric=metric)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))


@grad_mode_kept
def answers(learner: Learner, params: Params, draw: Episode) -> Tensor:
    """What the learner predicts for the query items of each task of a draw: (T, Q, W), where `params` are.

    predict(adapt(φ, S_t), x_t) for each task t, without gradients and in evaluation mode; the labels of the queries are not
    looked at.
    """
    device = _device(learner, params)
    if not isinstance(draw, Episode):
        raise TypeError(f"expected a draw of episodes, `stream(0)`, got {type(draw).__name__}")
    check_draw(draw, numbers=False)
    draw = move(draw, device)

    def task(phi: Params, episode: Episode) -> Tensor:
        return learner.predict(learner.adapt(phi, episode.support), episode.query.x)

    def part(tasks: slice) -> Tensor:
        return run(params, take(draw, tasks))

    run = Batched(task, learner.vmap)
    with torch.no_grad(), evaluating():
        return in_chunks(part, _joined, params, draw, None, run.share)


# Intervals -----------------------------------------------------------------------------------

FEW = 10  # values away from 0 or 1, up to which their spread says too little of the interval


def interval(values: Tensor, draw: str | None = None) -> Score:
    """Mean and 95 % interval of independent numbers: ± t₀.₉₇₅ · s/√n, Student's t with n − 1 degrees of freedom.

    ```pycon
    >>> print(interval(torch.tensor([0.90, 0.92, 0.94, 0.96])))
    0.930 ± 0.041
    >>> score = interval(torch.ones(30))
    >>> print(score, f"{score.low:.3f} to {score.high:.3f}")
    1.000 ± 0.116 0.884 to 1.000

    ```

    Where all values are 0 or 1, and fewer than ten are the rarer of the two, their spread says little of what the next
    would be: there the interval is the exact one of a share, from the quantiles of beta distributions. It is not alike
    to both sides. Differences are no shares: `compare` takes them. {cite}`clopper1934use`
    """
    return _score(values, draw)


def _score(
    values: Tensor, draw: str | None, shares: bool = False, difference: bool = False
) -> Score:
    """Student's interval, or where it would be too short the exact one; `shares` are means of items, in [0, 1]."""
    values = _row(values)
    mean = values.mean().item()
    if not difference and _at_the_edge(values, shares):
        low, high = exact(mean, len(values))
        return Score(mean, max(mean - low, high - mean), values, draw, (low, high))
    half = (
        float(special.stdtrit(len(values) - 1, 0.975))
        * values.std().item()
        / math.sqrt(len(values))
    )
    return Score(mean, half, values, draw)


def _row(values: Tensor) -> Tensor:
    """The values as float64, on the CPU. Raises unless they are two or more finite numbers in a row."""
    if not isinstance(values, Tensor) or values.is_complex():
        raise TypeError(f"expected a tensor of real numbers, got {type(values).__name__}")
    values = values.cpu().double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected at least 2 numbers in one row, got shape {tuple(values.shape)}")
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        raise NotFinite(
            f"expected finite scores; {len(bad)} of {len(values)} are not, the first is number {int(bad[0])}. Did the "
            "inner steps diverge, does a support set have no labels, or for auroc a class no query item?"
        )
    return values


def _at_the_edge(values: Tensor, shares: bool) -> bool:
    """Whether the values are 0 and 1 (with `shares`: in [0, 1]), and few of them are not the commoner of 0 and 1."""
    away = min(int((values != 0).sum()), int((values != 1).sum()))
    whole = bool(((values == 0) | (values == 1)).all())
    inside = bool(((values >= 0) & (values <= 1)).all())
    return (whole or (shares and inside)) and away < FEW and 2 * away <= len(values)


def exact(share: float, n: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share that n independent cases gave.

    Quantiles of Beta(k, n − k + 1) and Beta(k + 1, n − k), k = n · share. For whole k this is the exact interval of
    Clopper and Pearson; for the mean of numbers in [0, 1], none of which varies more than 0 and 1 do, it is wider than
    needed. {cite}`clopper1934use`
    """
    k = n * share
    low = 0.0 if k <= 0 else float(special.betaincinv(k, n - k + 1, 0.025))
    high = 1.0 if k >= n else float(special.betaincinv(k + 1, n - k, 0.975))
    return low, high


def compare(a: Score, b: Score) -> Score:
    """a − b, paired: the same episodes, so what makes an episode easy cancels.

    ```pycon
    >>> one = interval(torch.tensor([0.70, 0.90, 0.80]), draw="three tasks")
    >>> other = interval(torch.tensor([0.60, 0.80, 0.71]), draw="three tasks")
    >>> compare(one, other).points()
    '+9.7 ± 1.4'

    ```

    Raises ValueError if the two were not scored on the same episodes.
    """
    for s in (a, b):
        if not isinstance(s, Score):
            raise TypeError(
                f"expected two Scores, as `evaluate` gives them, got {type(s).__name__}"
            )
    if len(a.values) != len(b.values) or a.draw is None or a.draw != b.draw:
        raise ValueError(
            f"expected two scores on the same episodes; got {len(a.values)} and {len(b.values)} values from draws "
            f"{a.draw} and {b.draw}. Evaluate both with one stream."
        )
    return _score(a.values - b.values, a.draw, difference=True)


def over_clusters(values: Tensor, clusters: Sequence[int] | Tensor) -> Score:
    """Mean and 95 % interval of numbers in C clusters of alike ones (sister genes, photographs of one crate): clusters are independent.

    θ = mean of the N `values`, n_c and m_c number and mean of cluster c:  u_c = θ + C n_c (m_c − θ) / N,
    θ ± t₀.₉₇₅ · s(u)/√C with C − 1 degrees of freedom. That is the bootstrap over clusters to first order, and `interval`
    where each value is a cluster of its own. `clusters` names the cluster of each value by a whole number; the Score's
    `values` are the u_c, in the order of these numbers.

    ```pycon
    >>> print(over_clusters(torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]), [0, 0, 1, 1, 2, 2]))
    2.000 ± 2.484

    ```

    Raises ValueError for fewer than two clusters, or other than one whole number for each value.
    """
    values = _row(values)
    whose = torch.as_tensor(clusters).cpu()
    if whose.shape != values.shape or whose.is_floating_point() or whose.dtype == torch.bool:
        raise ValueError(
            f"expected a whole number for each of {len(values)} values, its cluster, got {whose.dtype} of shape {tuple(whose.shape)}"
        )
    number = whose.unique(return_inverse=True)[1]
    c = int(number.max()) + 1
    if c < 2:
        raise ValueError("expected at least 2 clusters for an interval, all values are of one")
    mean = values.mean()
    apart = torch.zeros(c, dtype=values.dtype).index_add(0, number, values - mean)
    return _score(mean + c * apart / len(values), None, difference=True)


def over_seeds(measure: Callable[[int], float | Score], seeds: Iterable[int]) -> Score:
    """Run a whole experiment for each seed: mean and 95 % interval over training runs.

    `measure(seed)` trains and returns a number, or a Score whose mean counts. Raises ValueError where a seed comes
    twice.

    ```pycon
    >>> print(over_seeds(lambda seed: 0.9 + 0.01 * seed, range(3)).percent())
    91.0 ± 2.5

    ```
    """
    if not isinstance(seeds, Iterable):
        raise TypeError(f"expected seeds to run with, such as range(5), got {seeds!r}")
    functions(1, measure=measure)
    seeds = list(seeds)
    for seed in seeds:
        check_seed(seed)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected at least 2 seeds, each once, got {seeds}")
    return interval(torch.tensor([_number(measure(seed)) for seed in seeds]))


def over_classes(measure: Callable[[ClassSet], float | Score], data: ClassSet) -> Score:
    """How the score would differ with other classes: mean and 95 % interval over classes, by leaving out one at a time.

    θ = measure(data), θ_c = measure(data without class c):  s² = (C−1)/C Σ_c (θ_c − θ̄)²,  θ ± t₀.₉₇₅ · s with C − 1
    degrees of freedom, Tukey's jackknife {cite}`efron1981jackknife`. `measure` scores on episodes of the classes that
    it is given, with the same parameters and seed each time; it runs C + 1 times:

        over_classes(lambda some: evaluate(learner, phi, episodes(some, 5, 1, 15, 50, seed=1)), test)

    `evaluate`'s own interval is over episodes of these classes, and with few classes much shorter. The number of
    episodes adds to s, too: with few of them it is too long. `values` are the C pseudo-values Cθ − (C−1)θ_c, up to a
    constant that makes θ their mean. Raises ValueError for fewer than three classes.
    """
    functions(1, measure=measure)
    classes = len(check_classes(data))
    if classes < 3:
        raise ValueError(f"expected at least 3 classes to leave one out, got {classes}")
    whole = _number(measure(data))
    kept = [[k for k in range(classes) if k != c] for c in range(classes)]
    less = torch.tensor([_number(measure(data.select(k))) for k in kept], dtype=torch.float64)
    return _score(whole + (classes - 1) * (less.mean() - less), None, difference=True)


def _number(found: float | Score) -> float:
    """A score's mean, or the number itself."""
    if isinstance(found, Score):
        return found.mean
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected one number or a Score, got {type(found).__name__}") from error


# Choosing a setting on validation data --------------------------------------------------------


class Best(NamedTuple):
    """What `best_of` found."""

    setting: Any  # its name: a key of `settings`
    score: float | Score  # its quality, as it came
    at_edge: bool  # whether it is the first or last of an ordered grid: a better one may lie beyond
    table: dict[Any, float | Score]  # the quality of every setting; −∞ for one that diverged


def best_of(
    settings: Mapping[Any, _Setting] | Iterable[_Setting],
    quality: Callable[[_Setting], float | Score],
    ordered: bool = True,
) -> Best:
    """The setting of the highest quality(settings[name]), of equal ones the first: a grid search.

    Settings without names are their own names.

    ```pycon
    >>> best_of((0.01, 0.03, 0.1, 0.3), lambda rate: -((rate - 0.1) ** 2)).setting
    0.1

    ```

    `quality` trains and scores on validation data, never on test data; for a loss give its negative. A run that
    diverged (`Diverged`, `NotFinite`, NaN) is the worst. In an ordered grid a best setting at its edge gives a warning:
    widen the grid, or say where it ends. Names that are tuples of numbers are a grid with several axes, each with two
    edges; an axis with one value, or of other things than numbers, has none. Raises ValueError if there is no
    setting, `NotFinite` where all of them diverged.
    """
    functions(1, quality=quality)
    try:
        named = dict(settings) if isinstance(settings, Mapping) else {s: s for s in settings}
    except TypeError as error:
        raise TypeError(
            f"expected settings that are numbers, strings or tuples, or a dict of names and settings: {error}"
        ) from error
    if not named:
        raise ValueError("expected at least one setting to choose from, got none")
    table = {name: _or_worst(quality, setting) for name, setting in named.items()}
    means = {k: s.mean if isinstance(s, Score) else s for k, s in table.items()}
    best = max(means, key=means.__getitem__)
    if means[best] == -math.inf:
        raise NotFinite(f"expected a setting that does not diverge; all did: {list(named)}")
    edge = ordered and at_edge(best, list(named))
    if edge:
        warnings.warn(
            f"the best setting, {best}, lies at the edge of its grid, {list(named)}: widen the grid, or say why it "
            "ends there",
            stacklevel=2,
        )
    return Best(best, table[best], edge, table)


def _or_worst(quality: Callable[[_Setting], float | Score], setting: _Setting) -> float | Score:
    """The quality of a setting, −∞ where its run diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossRose)  # a rate that is too high shows in its quality
        try:
            found = quality(setting)
        except (Diverged, NotFinite):
            return -math.inf
    return (
        -math.inf
        if math.isnan(_number(found))
        else found
        if isinstance(found, Score)
        else float(found)
    )


def at_edge(best: Any, names: Sequence[Any]) -> bool:
    """Whether `best` is the first or the last of the grid `names`, along one of its axes; as `best_of` tells it.

    Names that are tuples have an axis each; one with a single value, or of other things than numbers, has no edge. Raises
    ValueError where `best` is none of the names.
    """
    names = list(names)
    if best not in names:
        raise ValueError(f"expected one of the settings {names}, got {best!r}")
    if not isinstance(best, tuple) and not _numbers(names):
        return len(names) > 1 and best in (names[0], names[-1])
    rows = [name if isinstance(name, tuple) else (name,) for name in names]
    own = best if isinstance(best, tuple) else (best,)
    columns = [[row[i] for row in rows if len(row) == len(own)] for i in range(len(own))]
    return any(
        _numbers(column) and len(set(column)) > 1 and value in (min(column), max(column))
        for value, column in zip(own, columns, strict=True)
    )


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
