"""Results that pages share: recorded with their recipe, kept with the package, checked by the page that made them.

One JSON file a page, beside this module. A page calls `record`; the summary calls `recorded`.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlib.book.page import is_full
from mtlib.evaluate import Score, interval
from mtlib.run.checkpoint import replace
from mtlib.run.switches import is_on

FOLDER = Path(__file__).parent
KINDS = ("baseline", "transfer", "meta")
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn")


class Entry(NamedTuple):
    """One method on one problem."""

    method: str
    kind: str  # "baseline", "transfer" or "meta"
    mean: float
    cases: float  # half the 95 % interval over episodes, users, genes or patients
    seeds: float | None = None  # the same over training seeds; None where nothing is drawn


class Paired(NamedTuple):
    """What `ours` gains on `baseline`, case by case: a positive mean is a gain, whatever the metric."""

    ours: str
    baseline: str
    mean: float
    low: float  # 95 % interval
    high: float
    unit: str = ""  # what the interval is over: "test classes", "users", "seeds"
    n: int = 0  # how many of them

    def told(self, by: float = 1, digits: int = 3) -> str:
        """`by` times the mean, and half of the 95 % interval: '+0.015 ± 0.010', and in points, by 100, '+5.1 ± 1.4'."""
        half = by * (self.high - self.low) / 2
        return f"{by * self.mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")

    @property
    def over(self) -> str:
        """What the interval is over, with its number: '1,154 users'; '' where the record does not say."""
        return f"{self.n:,} {self.unit}" if self.unit else ""


class Result(NamedTuple):
    """What a page found on one problem, as its file keeps it: plain JSON.

    `page` is the page's file name without its suffix, `field` its title ("Gene sequences"), `metric` what was measured
    ("AUROC") and `higher` whether more is better. `labels` says what the target gives ("10 patients"), `protocol` how
    it was done in one sentence, and `data` is the data's source, which says whether they are real. `entries` are the
    methods, `gain` is what one gains on another, and `details` are what the page itself reads again. `versus` is what the
    best meta-learner gains on the best transfer, each chosen on validation data, with equally many labels of the target.
    """

    page: str
    field: str
    metric: str
    higher: bool
    labels: str
    protocol: str
    data: str
    entries: tuple[Entry, ...]
    gain: Paired
    details: dict[str, Any] = {}  # noqa: RUF012 - never written to
    versus: Paired | None = None


def row(
    method: str,
    kind: str,
    runs: Sequence[float] | Tensor,
    cases: float | Score,
    mean: float | None = None,
) -> Entry:
    """A method's row from its numbers over training seeds: their mean unless given, and their 95 % interval.

    `cases` is the interval over episodes (users, genes, patients), or the Score that has it. Raises ValueError for an
    unknown kind, no run, or numbers that are not finite.
    """
    numbers = torch.as_tensor(runs, dtype=torch.float64).flatten()
    if not len(numbers):
        raise ValueError(f"expected at least one run of {method!r}, got none")
    half = cases.interval if isinstance(cases, Score) else float(cases)
    seeds = interval(numbers).interval if len(numbers) > 1 else None
    entry = Entry(method, kind, numbers.mean().item() if mean is None else mean, half, seeds)
    _check_entry(entry)
    return entry


def paired(
    ours: str, baseline: str, gain: Score | Mapping[str, Score], mean: float | None = None
) -> Paired:
    """The row that says what `ours` gains on `baseline`, from their paired difference.

    `gain` may be the same difference over several units, such as {"users": score, "seeds": score}: the row has the widest of
    their intervals, with its unit and how many there are, about `mean`, or about the mean of the first.
    """
    if isinstance(gain, Score):
        _check_gain(ours, baseline, {"": gain})
        return Paired(ours, baseline, gain.mean, gain.low, gain.high)
    _check_gain(ours, baseline, gain)
    unit = max(gain, key=lambda u: gain[u].interval)
    low, high = gain[unit].mean - gain[unit].low, gain[unit].high - gain[unit].mean
    middle = next(iter(gain.values())).mean if mean is None else mean
    return Paired(ours, baseline, middle, middle - low, middle + high, unit, len(gain[unit].values))


def kept(page: str, real: bool = True) -> dict[str, Any]:
    """The details of a page's record where this run may use them, else {}.

    That is at the full scale, on `real` data, where there is a record and none is being made.
    """
    _check_page(page)
    usable = is_full() and real and not recording() and page in recorded_pages()
    return recorded(page).details if usable else {}


def agrees(here: float, runs: Sequence[float] | Tensor, cases: float = 0.0) -> bool:
    """Whether a run here may be the first of the recorded `runs`: |here − runs[0]| ≤ max(cases, 2 h, 10⁻³).

    On the same processor it is that run; on another, rounding makes it another run, and these lie h = half the 95 %
    interval of their mean apart. `cases` is the interval over episodes.
    """
    if not len(runs):
        raise ValueError("expected at least one recorded run, got none")
    if not math.isfinite(here):
        raise ValueError(f"expected a finite number to compare with the record, got {here}")
    spread = interval(torch.as_tensor(runs)).interval if len(runs) > 1 else 0.0
    return abs(here - float(runs[0])) <= max(cases, 2 * spread, 1e-3)


def recording() -> bool:
    """Whether this run writes results (MTLIB_RECORD=1): a page then runs all its seeds, however long it takes."""
    return is_on("MTLIB_RECORD")


def record(result: Result, tolerance: float = 1.0) -> str:
    """Compare a page's result with the recorded one; with MTLIB_RECORD=1, write it instead. Returns what was done.

    At the small scale, on stand-in data, and where nothing is recorded, it only says so. A dirty tree is not recorded from.
    A mean that differs from the recorded one by more than `tolerance` times its interval over cases, or twice the recorded
    one over seeds (as in `agrees`), raises ValueError: the page, or the file, is out of date.
    """
    _check(result)
    if not tolerance > 0:
        raise ValueError(f"expected a tolerance above 0, got {tolerance}")
    if not is_full():
        return "not recorded at the small scale"
    path = FOLDER / f"{result.page}.json"
    if not result.data.endswith("(real)"):
        return f"not recorded: {result.data}"
    if recording():
        clean_commit()
        write(path, {**_plain(result), "provenance": provenance()})
        return f"recorded as {path.name}"
    if not path.exists():
        return "nothing is recorded to compare with"
    kept = {e.method: e for e in recorded(result.page).entries}
    for e in result.entries:
        if e.method not in kept:
            raise ValueError(f"{path.name} has no {e.method!r}; record anew with MTLIB_RECORD=1")
        old = kept[e.method]
        allowed = tolerance * max(e.cases, e.seeds or 0.0, 2 * (old.seeds or 0.0), 1e-3)
        if abs(e.mean - old.mean) > allowed:
            raise ValueError(
                f"{e.method}: {e.mean:.4f} here, {old.mean:.4f} in {path.name}, which differ by more than "
                f"± {allowed:.4f}; record anew with MTLIB_RECORD=1"
            )
    return f"agrees with {path.name}"


def recorded(page: str) -> Result:
    """The result recorded for a page. Raises FileNotFoundError where there is none."""
    held = _read(page)
    entries = tuple(Entry(**e) for e in held.pop("entries"))
    gain = Paired(**held.pop("gain"))
    versus = held.pop("versus", None)
    held.pop("provenance")
    return Result(entries=entries, gain=gain, versus=versus and Paired(**versus), **held)


def recorded_pages() -> list[str]:
    """The pages that have a recorded result, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def made(page: str) -> dict[str, Any]:
    """Where a recorded result comes from: date, commit, device, versions."""
    found: dict[str, Any] = _read(page)["provenance"]
    return found


def provenance() -> dict[str, Any]:
    """Date, commit, processor and versions of this run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": gpu or f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


@cache
def commit() -> str:
    """The commit of the code that runs, "-dirty" where a file of it was changed since (other than a record).

    As it was when first asked, at the start of a recording: what is committed while it runs is not what runs.
    """
    look = ["describe", "--always", "--abbrev=12", "--exclude=*"]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)*.json"]
    try:
        at, since = (
            subprocess.run(["git", *c], cwd=FOLDER, capture_output=True, text=True, check=True)
            for c in (look, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{at.stdout.strip()}{'-dirty' * bool(since.stdout.strip())}"


def clean_commit() -> str:
    """The commit, for a record that says what it was made from. ValueError where the tree is dirty, or git does not tell."""
    at = commit()
    if at == "unknown" or at.endswith("-dirty"):
        raise ValueError(
            f"expected a clean tree to record from, got {at}: commit first, so that the record says what it was made from"
        )
    return at


def _check_page(page: str) -> None:
    if not isinstance(page, str) or not page or Path(page).name != page:
        raise ValueError(f"expected a page's name, such as 'metric', got {page!r}")


def _read(page: str) -> dict[str, Any]:
    _check_page(page)
    path = FOLDER / f"{page}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no result is recorded for {page!r}; recorded are {recorded_pages()}. "
            "Run the page on real data with MTLIB_RECORD=1."
        )
    held: dict[str, Any] = json.loads(path.read_text("utf8"))
    return held


def _plain(result: Result) -> dict[str, Any]:
    return {
        **result._asdict(),
        "entries": [e._asdict() for e in result.entries],
        "gain": result.gain._asdict(),
        "versus": result.versus and result.versus._asdict(),
    }


def _check(result: Result) -> None:
    if not isinstance(result, Result):
        raise TypeError(f"expected a Result, got {type(result).__name__}")
    _check_page(result.page)
    names = [e.method for e in result.entries]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"expected one entry per method, got {names}")
    for e in result.entries:
        _check_entry(e)
    for name in (result.gain.ours, result.gain.baseline):
        if name not in names:
            raise ValueError(f"expected the gain between two entries of {names}, got {name!r}")
    if result.versus:
        _check_versus(result.versus, {e.method: e.kind for e in result.entries})


def _check_gain(ours: str, baseline: str, gain: Mapping[str, Score]) -> None:
    if not isinstance(gain, Mapping) or not all(isinstance(g, Score) for g in gain.values()):
        raise TypeError(
            f"expected the gain to be a Score, of `compare`, or unit -> Score, got {type(gain).__name__}"
        )
    if not gain:
        raise ValueError("expected a gain over one unit at least, got none")
    if ours == baseline:
        raise ValueError(f"expected the gain of two methods, got {ours!r} twice")


def _check_versus(versus: Paired, kinds: Mapping[str, str]) -> None:
    kind = (kinds.get(versus.ours), kinds.get(versus.baseline))
    if kind != ("meta", "transfer"):
        raise ValueError(
            f"expected `versus` between an entry that is meta and one that is transfer, got {versus.ours!r}, {kind[0]}, and "
            f"{versus.baseline!r}, {kind[1]}"
        )
    if not versus.unit or versus.n < 2:
        raise ValueError(
            f"expected the unit that the interval of `versus` is over, and how many, got {versus.unit!r} and {versus.n}"
        )


def _check_entry(e: Entry) -> None:
    if e.kind not in KINDS:
        raise ValueError(f"expected the kind of {e.method!r} to be one of {KINDS}, got {e.kind!r}")
    if not all(math.isfinite(n) for n in (e.mean, e.cases, e.seeds or 0.0)) or e.cases < 0:
        raise ValueError(
            f"expected finite numbers for {e.method!r}, and cases of at least 0, got {tuple(e)}"
        )


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, and strict JSON: NaN raises ValueError."""
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected plain JSON and finite numbers for {path.name}: {error}; convert tensors with .tolist()"
        ) from error
    replace(path, f"{text}\n".encode())
