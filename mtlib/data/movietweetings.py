"""Film ratings from tweets {cite}`dooms2013movietweetings`; drawn ratings if those cannot be downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtlib.data.download import Remote, Unreachable, fetch

_FOLDER = (
    "https://raw.githubusercontent.com/adrianrfreedman/MovieTweetings/"
    "3ae51d9ab4bac513259a36665182d1fd0e7afdf9/snapshots/100K"
)

FILES = {
    "ratings": Remote(
        "movietweetings/ratings.dat",
        f"{_FOLDER}/ratings.dat",
        ("c0dd868c2632d10002ebc928ddc5345f33adeaa59eca52c2941c26a2c5e36fd6",),
    ),
    "films": Remote(
        "movietweetings/movies.dat",
        f"{_FOLDER}/movies.dat",
        ("e63fb84bc734e3c574f135634a40d3cbafab22b8f94f5fc0b80f80d1d2076efc",),
    ),
}


class Ratings(NamedTuple):
    """Who rated which film, how, and when; each user's ratings stand together, the earliest first."""

    user: np.ndarray  # (n,) 0 to U − 1, sorted
    film: np.ndarray  # (n,) 0 to F − 1
    rating: np.ndarray  # (n,) 0 to 10
    time: np.ndarray  # (n,) seconds since 1970
    year: np.ndarray  # (F,) the film's year
    genres: np.ndarray  # (F, G) 1 where a film is of a genre, the commonest genres first
    source: str


def movietweetings() -> Ratings:
    """100,000 ratings, or drawn ones if they cannot be downloaded; `source` says which.

    Raises `mtlib.data.download.Altered` for a file with the wrong digest.
    """
    try:
        return read(fetch(FILES["ratings"]), fetch(FILES["films"]))
    except Unreachable:
        return drawn()


def read(ratings: Path, films: Path) -> Ratings:
    """Files with lines `user::film::rating::time` and `film::title (year)::genre|genre`."""
    rows = np.array(
        [
            [int(v) for v in line.split("::")]
            for line in ratings.read_text("utf8").split("\n")
            if line
        ]
    )
    known = {}
    for line in films.read_text("utf8").split("\n"):
        if line:
            number, title, genres = [*line.split("::"), ""][:3]
            found_year = re.search(r"\((\d{4})\)\s*$", title)
            known[int(number)] = (int(found_year[1]) if found_year else 2000, genres.split("|"))
    numbers, film = np.unique(rows[:, 1], return_inverse=True)
    _, user = np.unique(rows[:, 0], return_inverse=True)
    names = sorted({g for _, genres in known.values() for g in genres if g})
    table = np.array(
        [[g in known.get(k, (0, []))[1] for g in names] for k in numbers.tolist()], dtype=np.float32
    )
    table = table[:, np.argsort(-table.sum(0), kind="stable")]
    year = np.array([known.get(k, (2000, []))[0] for k in numbers.tolist()])
    found = Ratings(user, film, rows[:, 2].astype(np.float64), rows[:, 3], year, table, "")
    source = f"{len(rows)} ratings by {user.max() + 1} users of {len(numbers)} films (real)"
    return sorted_by_time(found)._replace(source=source)


def sorted_by_time(r: Ratings) -> Ratings:
    """Each user's ratings together, the earliest first; equal times keep their order."""
    order = np.lexsort((np.arange(len(r.user)), r.time, r.user))
    return r._replace(
        user=r.user[order], film=r.film[order], rating=r.rating[order], time=r.time[order]
    )


def drawn(seed: int = 0, users: int = 600, films: int = 300) -> Ratings:
    """Users who love genres, films that are good or bad, and noise; popular films are rated more often."""
    rng = np.random.default_rng(seed)
    genres = (rng.random((films, 6)) < 0.3).astype(np.float32)
    genres = genres[:, np.argsort(-genres.sum(0), kind="stable")]
    good, year = rng.normal(size=films), rng.integers(1960, 2014, size=films)
    popular = rng.dirichlet(np.full(films, 0.5))
    rows = []
    for u in range(users):
        mood, taste = rng.normal() * 0.8, rng.normal(size=6) * 0.8
        count = min(int(rng.integers(4, 45)), int((popular > 0).sum()))
        seen = rng.choice(films, size=count, replace=False, p=popular)
        value = 7 + mood + good[seen] + genres[seen] @ taste + rng.normal(size=count)
        for k, (f, v) in enumerate(zip(seen, value, strict=True)):
            rows.append((u, f, np.clip(np.round(v), 0, 10), 1_360_000_000 + 86_400 * k))
    user, film, rating, time = (np.array(c) for c in zip(*rows, strict=True))
    source = f"{len(rows)} ratings by {users} users drawn from seed {seed} (stand-in)"
    return sorted_by_time(
        Ratings(user, film, rating.astype(np.float64), time, year, genres, source)
    )


class Known(NamedTuple):
    """What the training users' ratings say about films, as far as each row of the ratings may use it."""

    mean: float  # of the training ratings
    seen: np.ndarray  # (n,) training users who rated the row's film, the row's own user not counted
    bias: np.ndarray  # (n,) the film's shrunk bias, without the row's own rating
    spread: np.ndarray  # (n,) the spread of the film's ratings around its users' biases, likewise


def known(r: Ratings, training: np.ndarray, shrink: float, rounds: int = 10) -> Known:
    """Fit r ≈ μ + b_user + b_film on the `training` rows, by turns.

    Each bias is shrunk, as if there were `shrink` more ratings with a deviation of 0.
    A training row's film bias leaves its own rating out: otherwise it would contain the answer.
    """
    users, films = r.user.max() + 1, r.film.max() + 1
    u, f, y = r.user[training], r.film[training], r.rating[training]
    mean = float(y.mean())
    of_user, of_film = np.zeros(users), np.zeros(films)
    total = np.bincount(f, minlength=films)
    for _ in range(rounds):
        sums = np.bincount(f, y - mean - of_user[u], minlength=films)
        of_film = sums / (total + shrink)
        counted = np.bincount(u, minlength=users) + shrink
        of_user = np.bincount(u, y - mean - of_film[f], minlength=users) / counted
    left = r.rating - mean - of_user[r.user]
    sums = np.bincount(f, left[training], minlength=films)
    squares = np.bincount(f, left[training] ** 2, minlength=films)
    own = np.where(training, left, 0)
    seen = total[r.film] - training
    bias = (sums[r.film] - own) / (seen + shrink)
    spread = np.sqrt((squares[r.film] - own**2 + 5) / (seen + 2))
    return Known(mean, seen, bias, spread)
