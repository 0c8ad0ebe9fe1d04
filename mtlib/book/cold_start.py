"""What the page on recommendation needs: films told by their past, users in the order of time, and contenders that adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor, nn

from mtlib.core import Batch, Episode, Learner, Params, Stream, move
from mtlib.data.movietweetings import Known, Past, Ratings, past, rated_before
from mtlib.evaluate import Score, answers, interval
from mtlib.learners.closed_form import ridge_solution
from mtlib.metrics import recall_at
from mtlib.nets import seeded, two_halves
from mtlib.tasks import above_zero, check_seed, positive, within

MIDDLE = 7.0  # ratings are told from here
MISSING = 99.0  # in y, where a user has no more ratings
GENRES = 18  # the commonest, in the features
FILM = 8 + GENRES  # features of a film

# Films and users -----------------------------------------------------------------------------


def described(r: Ratings, k: Known | Past, film: np.ndarray, time: np.ndarray) -> Tensor:
    """Features of films at times (m, 26), from what is known of them; the first is the film's average so far, less 7.

    The average again at two other strengths of shrinking, the logarithm of how many rated the film, year, spread, bias times
    that logarithm, age in years, and the 18 commonest genres, 0.5 for each that is there. `k` was shrunk by 2.
    """
    if not len(film) == len(time) == len(k.seen):
        raise ValueError(
            f"expected what is known of each film and time, got {len(k.seen)} for {len(film)} and {len(time)}"
        )
    total, rated = k.bias * (k.seen + 2), np.log1p(k.seen) / 3
    columns = [k.mean - MIDDLE + total / (k.seen + s) for s in (2, 0.5, 6)]
    age = np.clip(1970 + time / 31_557_600 - r.year[film], 0, 3) - 1
    year = (np.clip(r.year[film], 1960, 2014) - 2005) / 10
    columns += [rated - 1, year, k.spread - 1.5, k.bias * rated, age]
    genres = np.zeros((len(film), GENRES))
    there = min(GENRES, r.genres.shape[1])
    genres[:, :there] = 0.5 * r.genres[film, :there]
    return torch.from_numpy(np.concatenate([np.stack(columns, 1), genres], 1)).float()


@dataclass(frozen=True, eq=False)
class Users:
    """Ratings of users who stand together, each in the order of time."""

    x: Tensor  # (n, D) features of each rating's film
    y: Tensor  # (n, 1) the rating
    first: np.ndarray  # (U,) where a user's ratings begin
    count: np.ndarray  # (U,) how many; a smaller number leaves the last out

    def test(self, users: np.ndarray, shots: int, after: int) -> Episode:
        """The first `shots` ratings of users, and all later ones but the first `after`; y is 99 where a user has no more."""
        self._check(users, after, 1)
        first, count = self.first[users][:, None], self.count[users][:, None] - after
        place = np.arange(count.max())
        later = first + after + np.minimum(place, count - 1)
        y = self.y[later].masked_fill(torch.from_numpy(place >= count)[..., None], MISSING)
        some = first + np.arange(shots)
        return Episode(Batch(self.x[some], self.y[some]), Batch(self.x[later], y))

    def practice(
        self, users: np.ndarray, shots: Sequence[int], after: int, queries: int, seed: int
    ) -> Stream:
        """A stream of 64 users: the first ratings, one of `shots` many, and some of those later than the first `after`."""
        self._check(users, after, queries)
        check_seed(seed)

        def stream(step: int) -> Episode:
            rng = np.random.default_rng([seed, step])
            some = rng.choice(users, 64)
            first, n = self.first[some][:, None], rng.choice(shots)
            draw = [rng.choice(m, queries, replace=False) for m in self.count[some] - after]
            rows = first + np.arange(n), first + after + np.stack(draw)
            return Episode(*(Batch(self.x[i], self.y[i]) for i in rows))

        return stream

    def pooled(self, users: np.ndarray, each: int, seed: int) -> Stream:
        """A stream of `each` ratings of 64 users, drawn out of all that they have, as one task."""
        self._check(users, 0, each)
        check_seed(seed)

        def stream(step: int) -> Batch:
            rng = np.random.default_rng([seed, step])
            some = rng.choice(users, 64)
            draw = [rng.choice(m, each, replace=False) for m in self.count[some]]
            rows = (self.first[some][:, None] + np.stack(draw)).reshape(1, -1)
            return Batch(self.x[rows], self.y[rows])

        return stream

    def _check(self, users: np.ndarray, after: int, more: int) -> None:
        if not len(users) or self.count[users].min() < after + more:
            raise ValueError(
                f"expected users with at least {after + more} ratings, got {len(users)} users with as few as "
                f"{self.count[users].min() if len(users) else 0}"
            )


def mean_absolute_error(said: Tensor, y: Tensor) -> Tensor:
    """Σ |said − y| / n over the rows whose y is not 99, of one user: (B, 1), (B, 1) -> scalar."""
    if said.shape != y.shape:
        raise ValueError(
            f"expected answers of the ratings' shape {tuple(y.shape)}, got {tuple(said.shape)}"
        )
    there = y < MISSING
    return ((said - y).abs() * there).sum() / there.sum()


def told(
    learner: Learner, phi: Params, users: Users, who: np.ndarray, shots: int, after: int
) -> list[Tensor]:
    """Answers to the ratings of `Users.test`, one (n,) for each user, on the CPU."""
    data = users.test(who, shots, after)
    place = next((v.device for v in phi.values()), torch.device("cpu"))
    said = answers(learner, phi, move(data, place)).cpu()
    return [one[y < MISSING] for one, y in zip(said, data.query.y, strict=True)]


def off(said: Tensor, y: Tensor) -> Tensor:
    """The mean absolute error of one user's answers: (n,), (n,) -> scalar."""
    return (said - y).abs().mean()


def by_user(
    said: Sequence[Tensor],
    truth: Sequence[Tensor],
    measure: Callable[[Tensor, Tensor], Tensor] = off,
    keep: Sequence[np.ndarray] | None = None,
) -> Score:
    """A measure of each user's answers, with its interval over users; on the ratings to `keep`, of users who have one.

    `said`, `truth` and the masks in `keep` have one row for each user, as long as the others.
    """
    masks = keep or [np.full(len(y), True) for y in truth]
    if [len(v) for v in said] != [len(v) for v in truth] or len(masks) != len(truth):
        raise ValueError(
            f"expected an answer to each rating of each user, got {len(said)} users for {len(truth)}"
        )
    found = [
        measure(s[k], y[k]).double()
        for s, y, k in zip(said, truth, map(torch.from_numpy, masks), strict=True)
        if k.any()
    ]
    return interval(torch.stack(found), "users")


# Contenders ----------------------------------------------------------------------------------


def biases(
    slope: float, shrink: float, columns: Sequence[int] = (), strength: float = 1.0
) -> Learner:
    """The film's average on a slope, and the user's shrunk mood; with `columns` of x, the film's factors, a taste as well.

    r̂ = s x₀ + m, m = Σ_j (r_j − s x₀ⱼ) / (n + κ), s = `slope`, κ = `shrink`, x₀ the first feature. The taste is a ridge
    regression of what s x₀ + m leaves on the factors, of this `strength`. φ is empty. {cite}`koren2009matrix`
    """
    within(0, shrink=shrink)
    above_zero(slope=slope, strength=strength)
    z = list(columns)

    def adapt(phi: Params, support: Batch) -> Params:
        left = support.y - slope * support.x[:, :1]
        mood = left.sum() / (len(left) + shrink)
        strong = left.new_tensor(strength)
        taste = ridge_solution(support.x[:, z], left - mood, strong) if z else mood
        return {"mood": mood, "taste": taste}

    def predict(theta: Params, x: Any) -> Tensor:
        said: Tensor = slope * x[:, :1] + theta["mood"]
        return said + x[:, z] @ theta["taste"] if z else said

    return Learner(dict, adapt, predict)


class Scaled(nn.Module):
    """The features of films, each times a scale of its own, and eight more, from a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(FILM))
        self.more = nn.Sequential(nn.Linear(FILM, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :FILM]  # what follows is for factors
        return torch.cat([x * self.log_scale.exp(), 0.3 * self.more(x)], -1)


def network(seed: int) -> nn.Module:
    """`Scaled` and a linear head, which start as the film's average: slope 1, and nothing else."""
    check_seed(seed)
    with seeded(seed):
        head, body = nn.Linear(FILM + 8, 1), Scaled()
    nn.init.zeros_(head.bias)
    nn.init.zeros_(head.weight).data[0, 0] = 1
    return two_halves(body, head)


def summarised(first: Batch, x: Tensor) -> Tensor:
    """Five numbers of a user beside the features of later films: (…, n, D), (…, n, 1) and (…, Q, D) -> (…, Q, 31).

    Mood, as `biases` has it with slope 1 and κ = 2; the spread of what it leaves; its slope on the films' averages, shrunk;
    the mean rating; and the mean of what the mood leaves on films of like genres, weighted by exp(−2 d²), shrunk.
    """
    level, n = first.x[..., :1], first.x.shape[-2] + 2
    mood = (first.y - level).sum(-2, keepdim=True) / n
    rest, bend = first.y - level - mood, level - level.mean(-2, keepdim=True)
    slope = (bend * rest).sum(-2, keepdim=True) / ((bend**2).sum(-2, keepdim=True) + 2)
    own = [mood, rest.std(-2, keepdim=True), slope, first.y.mean(-2, keepdim=True)]
    apart = torch.cdist(x[..., 8:FILM], first.x[..., 8:FILM])
    near = torch.exp(-2 * apart**2)
    taste = near @ rest / (near.sum(-1, keepdim=True) + 2)
    return torch.cat([x[..., :FILM], torch.cat(own, -1).expand(*x.shape[:-1], 4), taste], -1)


def boosting(
    tasks: Callable[[int], Episode], rate: float, leaves: int, trees: int = 100
) -> Learner:
    """Gradient boosting of absolute errors on `summarised` users: scikit-learn's, fitted once for each number of ratings.

    `tasks(n)` are the training users, as `Users.test` gives them, with n ratings each to adapt to. φ is empty.
    """
    above_zero(rate=rate)
    positive(leaves=leaves - 1, trees=trees)
    how = {"learning_rate": rate, "max_leaf_nodes": leaves, "max_iter": trees}

    @cache
    def fitted(n: int) -> Any:
        data = tasks(n)
        there = (data.query.y < MISSING)[..., 0]
        x = summarised(data.support, data.query.x)[there].numpy()
        made = HistGradientBoostingRegressor(
            loss="absolute_error", min_samples_leaf=40, early_stopping=False, random_state=0, **how
        )
        return made.fit(x, data.query.y[there][:, 0].numpy())

    def adapt(phi: Params, support: Batch) -> Params:
        return {"x": support.x, "y": support.y}

    def predict(theta: Params, x: Any) -> Tensor:
        said: Tensor = _Told.apply(  # type: ignore[no-untyped-call]
            summarised(Batch(theta["x"], theta["y"]), x), fitted(len(theta["y"]))
        )
        return said

    return Learner(dict, adapt, predict)


class _Told(torch.autograd.Function):
    """What a fitted model of scikit-learn says: (…, Q, D) -> (…, Q, 1), under `vmap` of all tasks at once."""

    @staticmethod
    def forward(x: Tensor, model: Any) -> Tensor:
        said = model.predict(x.reshape(-1, x.shape[-1]).cpu().numpy())
        return torch.from_numpy(said).to(x).reshape(*x.shape[:-1], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, model: Any) -> tuple[Tensor, int]:
        return _Told.apply(x.movedim(in_dims[0], 0), model), 0  # type: ignore[no-untyped-call]


# Films to show -------------------------------------------------------------------------------


class Shelf(NamedTuple):
    """What could be shown to a user at the end of the first ratings."""

    own: np.ndarray  # rows of the user's first ratings
    x: Tensor  # (m, 26) the films, as `described`
    ever: Tensor  # (m,) how many training users had rated them
    lately: Tensor  # (m,) how many within four weeks
    liked: Tensor  # (m,) 1 for those that the user gave `least` or more afterwards


def shelves(
    r: Ratings,
    training: np.ndarray,
    users: np.ndarray,
    shots: int,
    least: float = 8,
    known: int = 5,
) -> list[Shelf]:
    """For each user the films that `known` training users had rated at the user's rating number `shots`, and the user not.

    Users who liked none of them afterwards are left out.
    """
    positive(shots=shots, known=known)
    often = np.bincount(r.film[training], minlength=len(r.year))
    films, found = np.flatnonzero(often >= known), []
    ends = [np.flatnonzero(r.user == user) for user in users]
    when = np.array([r.time[rows[shots - 1]] for rows in ends])
    film, time = np.tile(films, len(users)), np.repeat(when, len(films))
    k = past(r, training, 2.0, film, time)
    month = np.maximum(time - 28 * 86_400, r.time.min())
    lately = k.seen - rated_before(r, training, film, month)
    x = described(r, k, film, time)
    for i, rows in enumerate(ends):
        here = slice(i * len(films), (i + 1) * len(films))
        keep = (k.seen[here] >= known) & ~np.isin(films, r.film[rows[:shots]])
        later = rows[shots:]
        good = np.isin(films[keep], r.film[later[r.rating[later] >= least]])
        liked, ever, new = (
            torch.from_numpy(v.astype(np.float64))
            for v in (good, k.seen[here][keep], lately[here][keep])
        )
        if good.any():
            found.append(Shelf(rows[:shots], x[here][keep], ever, new, liked))
    return found


def foretold(films: Sequence[Shelf], learner: Learner, phi: Params, users: Users) -> list[Tensor]:
    """What a learner predicts for each shelf's films, adapted to the user's first ratings: (m,) each, on the CPU."""
    found, place = [], next((v.device for v in phi.values()), torch.device("cpu"))
    with torch.no_grad():
        for film in films:
            first = Batch(users.x[film.own], users.y[film.own])
            theta = learner.adapt(phi, move(first, place))
            found.append(learner.predict(theta, film.x.to(place))[:, 0].cpu())
    return found


def recall(
    films: Sequence[Shelf],
    said: Sequence[Tensor],
    rule: Callable[[Tensor, Shelf], Tensor],
    n: int = 10,
) -> Tensor:
    """For each shelf which share of the liked films is among the n first by `rule(predictions, shelf)`: (shelves,)."""
    if not films or len(films) != len(said):
        raise ValueError(
            f"expected predictions for each shelf, one at least, got {len(said)} for {len(films)}"
        )
    pairs = zip(films, said, strict=True)
    return torch.stack([recall_at(rule(s, film).double(), film.liked, n) for film, s in pairs])
