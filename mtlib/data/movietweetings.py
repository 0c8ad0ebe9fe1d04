"""Film ratings from tweets {cite}`dooms2013movietweetings`; drawn ratings without file and network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from mtlib.data.download import Remote, Unreachable, fetch
from mtlib.data.parsing import content, parsing, whole
from mtlib.tasks import above_zero, check_seed, positive

_FOLDER = (
    "https://raw.githubusercontent.com/adrianrfreedman/MovieTweetings/"
    "3ae51d9ab4bac513259a36665182d1fd0e7afdf9/snapshots/100K"
)

FILES = {
    "ratings": Remote(
        "movietweetings/ratings.dat",
        f"{_FOLDER}/ratings.dat",
        ("c0dd868c2632d10002ebc928ddc5345f33adeaa59eca52c2941c26a2c5e36fd6",),
        size=2_945_101,
    ),
    "films": Remote(
        "movietweetings/movies.dat",
        f"{_FOLDER}/movies.dat",
        ("e63fb84bc734e3c574f135634a40d3cbafab22b8f94f5fc0b80f80d1d2076efc",),
        size=542_192,
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
    """100,000 ratings, or drawn ones without file and network; `source` says which.

    Raises `mtlib.data.download.Altered` for a file with the wrong digest.
    """
    try:
        return read(fetch(FILES["ratings"]), fetch(FILES["films"]))
    except Unreachable:
        return drawn()


def read(ratings: Path, films: Path) -> Ratings:
    """Files with lines `user::film::rating::time` and `film::title (year)::genre|genre`.

    Raises ValueError for a line of another form, a rating that is not 0 to 10, a film that is not in `films` or stands
    there twice, and a user who rates a film twice.
    """
    with parsing(films, "a list of films"):
        known = _films(content(films).decode("utf8"))
    with parsing(ratings, "a file of ratings"):
        lines = [line for line in content(ratings).decode("utf8").split("\n") if line]
        found_rows = [_RATING.fullmatch(line) for line in lines]
        if not lines or None in found_rows:
            wrong = lines[found_rows.index(None)] if lines else ""
            raise ValueError(f"expected lines `user::film::rating::time`, got {wrong[:80]!r}")
        rows = np.array([[int(v) for v in found.groups()] for found in found_rows if found])
        if rows[:, 2].max() > 10:
            raise ValueError(f"expected ratings from 0 to 10, got {rows[:, 2].max()}")
        if len(np.unique(rows[:, :2], axis=0)) < len(rows):
            raise ValueError("expected each user to rate a film once")
        missing = set(rows[:, 1].tolist()) - known.keys()
        if missing:
            raise ValueError(
                f"expected films of {films}, got {min(missing)} and {len(missing) - 1} others"
            )
    numbers, film = np.unique(rows[:, 1], return_inverse=True)
    _, user = np.unique(rows[:, 0], return_inverse=True)
    names = sorted({g for _, genres in known.values() for g in genres if g})
    table = np.array(
        [[g in known[k][1] for g in names] for k in numbers.tolist()], dtype=np.float32
    ).reshape(len(numbers), len(names))
    table = table[:, np.argsort(-table.sum(0), kind="stable")]
    year = np.array([known[k][0] for k in numbers.tolist()])
    found = Ratings(user, film, rows[:, 2].astype(np.float64), rows[:, 3], year, table, "")
    source = f"{len(rows)} ratings by {user.max() + 1} users of {len(numbers)} films (real)"
    return sorted_by_time(found)._replace(source=source)


_RATING = re.compile("([0-9]{1,18})::([0-9]{1,18})::([0-9]{1,2})::([0-9]{1,12})")


def _films(text: str) -> dict[int, tuple[int, list[str]]]:
    """Film -> its year, 2000 where the title has none, and its genres."""
    known: dict[int, tuple[int, list[str]]] = {}
    for line in text.split("\n"):
        if line:
            parts = line.split("::")
            if len(parts) not in (2, 3):
                raise ValueError(f"expected lines `film::title (year)::genres`, got {line[:80]!r}")
            film, title, genres = [*parts, ""][:3]
            found = re.search(r"\(([0-9]{4})\)\s*$", title)
            key = whole(film, 0, 10**18 - 1, "a film's number")
            if key in known:
                raise ValueError(f"film {key} stands there twice")
            year = whole(found[1], 1850, 2100, "a film's year") if found else 2000
            known[key] = (year, genres.split("|"))
    genres_met = {g for _, genres in known.values() for g in genres}
    if len(genres_met) > 200:
        raise ValueError(f"expected at most 200 genres, got {len(genres_met)}")
    return known


def sorted_by_time(r: Ratings) -> Ratings:
    """Each user's ratings together, the earliest first; equal times keep their order."""
    order = np.lexsort((np.arange(len(r.user)), r.time, r.user))
    return r._replace(
        user=r.user[order], film=r.film[order], rating=r.rating[order], time=r.time[order]
    )


def drawn(seed: int = 0, users: int = 600, films: int = 300) -> Ratings:
    """Users who love genres, films that are good or bad, and noise; popular films are rated more often."""
    positive(users=users, films=films)
    check_seed(seed)
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
    above_zero(shrink=shrink)
    positive(rounds=rounds)
    _check_training(r, training)
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


def _check_training(r: Ratings, training: np.ndarray) -> None:
    if training.dtype != bool or training.shape != r.user.shape or not training.any():
        raise ValueError(
            f"expected training to be a mask of the {len(r.user)} ratings that marks at least one, got "
            f"{training.shape} of {training.dtype}"
        )


class Past(NamedTuple):
    """What the training users' ratings had said about films when each question was asked; one number a question."""

    mean: (
        np.ndarray
    )  # (m,) of the training ratings so far; 5, the middle of the scale, before the first
    seen: np.ndarray  # (m,) training users who had rated the film
    bias: np.ndarray  # (m,) the film's shrunk bias
    spread: np.ndarray  # (m,) the spread of the film's ratings around its users' biases


def past(
    r: Ratings,
    training: np.ndarray,
    shrink: float,
    film: np.ndarray | None = None,
    time: np.ndarray | None = None,
    every: int = 86_400,
    rounds: int = 3,
) -> Past:
    """`known` without looking ahead: what is said of a `film` at a `time` is fitted on earlier ratings alone.

    A question is a film and a time, one for each rating unless given. Time is cut into periods of `every` seconds, a day,
    from the first rating on. At the beginning of each, r ≈ μ + b_user + b_film is fitted on the `training` rows of the
    periods before, by `rounds` turns that go on from the last period's biases, and it answers all questions of the period.
    So no answer contains its own rating, or one that came later. Raises ValueError for questions before the first rating.
    """
    above_zero(shrink=shrink)
    positive(rounds=rounds, every=every)
    _check_training(r, training)
    film, time = (r.film, r.time) if film is None or time is None else (film, time)
    begin = int(r.time.min())
    if len(film) != len(time) or not len(film) or time.min() < begin or film.max() > r.film.max():
        raise ValueError(
            f"expected as many films as times, of films that were rated, none before the first rating, at {begin}"
        )
    order = np.argsort(r.time[training], kind="stable")
    u, f, y = (column[training][order] for column in (r.user, r.film, r.rating))
    until = (r.time[training][order] - begin) // every
    period = (time - begin) // every
    asked = np.argsort(period, kind="stable")
    users, films = r.user.max() + 1, r.film.max() + 1
    of_user, of_film = np.zeros(users), np.zeros(films)
    total, counted = np.zeros(films, int), np.zeros(users, int)
    found, n = np.empty((4, len(film))), 0
    for one in np.unique(period):
        new = slice(n, n := int(np.searchsorted(until, one)))
        total += np.bincount(f[new], minlength=films)
        counted += np.bincount(u[new], minlength=users)
        uu, ff, yy = u[:n], f[:n], y[:n]
        mean = yy.mean() if n else 5.0
        for _ in range(rounds):
            of_film = np.bincount(ff, yy - mean - of_user[uu], films) / (total + shrink)
            of_user = np.bincount(uu, yy - mean - of_film[ff], users) / (counted + shrink)
        left = yy - mean - of_user[uu]
        bias = np.bincount(ff, left, films) / (total + shrink)
        spread = np.sqrt((np.bincount(ff, left**2, films) + 5) / (total + 2))
        rows = asked[slice(*np.searchsorted(period[asked], (one, one + 1)))]
        some = film[rows]
        found[:, rows] = np.full(len(rows), mean), total[some], bias[some], spread[some]
    return Past(*found)


def rated_before(
    r: Ratings, training: np.ndarray, film: np.ndarray, time: np.ndarray, every: int = 86_400
) -> np.ndarray:
    """`past(…).seen` alone, which needs no fit: (m,) training users who had rated the film."""
    positive(every=every)
    _check_training(r, training)
    begin = int(r.time.min())
    if len(film) != len(time) or not len(film) or time.min() < begin or film.min() < 0:
        raise ValueError(
            f"expected as many films as times, none before the first rating, at {begin}"
        )
    until, period = (r.time[training] - begin) // every, (time - begin) // every
    span = 1 + max(until.max(), period.max())
    known = np.sort(r.film[training].astype(np.int64) * span + until)
    first = film.astype(np.int64) * span
    seen: np.ndarray = np.searchsorted(known, first + period) - np.searchsorted(known, first)
    return seen


def factors(
    user: np.ndarray,
    film: np.ndarray,
    left: np.ndarray,
    start: np.ndarray,
    strength: float,
    rounds: int = 5,
) -> np.ndarray:
    """Where each film stands, (F, K): matrix factorisation by alternating least squares, on what was rated alone.

    min Σ_{(u, f) rated} (left − p_uᵀq_f)² + λ (Σ_u ‖p_u‖² + Σ_f ‖q_f‖²), `left` what biases leave of each rating, λ =
    `strength`. From `start` (F, K) each round solves for all p_u = (Σ_f q_f q_fᵀ + λI)⁻¹ Σ_f left q_f, sums over the films
    that u rated, and then likewise for all q_f. A new user's p is that equation on the own ratings. A film that nobody
    rated is at 0. {cite}`koren2009matrix`
    """
    above_zero(strength=strength)
    positive(rounds=rounds)
    if not len(user) == len(film) == len(left) or start.ndim != 2 or not np.isfinite(left).all():
        raise ValueError(
            "expected a user, a film and a finite number for each rating, and start (F, K), got "
            f"{len(user)}, {len(film)}, {len(left)} and {start.shape}"
        )
    if len(film) and not 0 <= film.min() <= film.max() < len(start):
        raise ValueError(f"expected films from 0 to {len(start) - 1}, got up to {film.max()}")
    whose, user = np.unique(user, return_inverse=True)
    which, film = np.unique(film, return_inverse=True)
    q, values = start[which], csr_matrix((left, (user, film)), (len(whose), len(which)))
    rated = csr_matrix((np.ones(len(left)), (user, film)), values.shape)
    for _ in range(rounds):
        p = _half(values, rated, q, strength)
        q = _half(values.T, rated.T, p, strength)
    found = np.zeros_like(start)
    found[which] = q
    return found


def factors_in_time(
    r: Ratings,
    training: np.ndarray,
    left: np.ndarray,
    rank: int,
    strength: float,
    every: int = 28 * 86_400,
) -> np.ndarray:
    """Where each rating's film stands (n, rank), by `factors` fitted at the beginning of each period on earlier ratings alone.

    Time is cut into periods of `every` seconds, four weeks. A period's factors are those of what users' shrunk means leave of
    `left` (n,), on the `training` rows of the periods before, and go on from the last period's. In the first, and for films
    that nobody had rated, they are 0.
    """
    positive(rank=rank, every=every)
    _check_training(r, training)
    if left.shape != r.rating.shape:
        raise ValueError(f"expected a number for each of {len(r.rating)} ratings, got {left.shape}")
    period = (r.time - r.time.min()) // every
    q = 0.1 * np.random.default_rng(0).normal(size=(len(r.year), rank))
    z = np.zeros((len(r.film), rank))
    for one in range(1, int(period.max()) + 1):
        old = np.flatnonzero(training & (period < one))
        if len(old):
            user, now = r.user[old], period == one
            mood = np.bincount(user, left[old]) / (np.bincount(user) + 2)
            q = factors(user, r.film[old], left[old] - mood[user], q, strength)
            z[now] = q[r.film[now]]
    return z


def _half(values: csr_matrix, rated: csr_matrix, q: np.ndarray, strength: float) -> np.ndarray:
    """Each row's ridge regression of its values on the q of what it rated."""
    k = q.shape[1]
    squares = (q[:, :, None] * q[:, None]).reshape(len(q), k * k)
    grams = (rated @ squares).reshape(-1, k, k) + strength * np.eye(k)
    solved: np.ndarray = np.linalg.solve(grams, (values @ q)[..., None])[..., 0]
    return solved
