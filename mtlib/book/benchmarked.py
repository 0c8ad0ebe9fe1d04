"""What the benchmarks recorded, read and drawn; and ways of computing the same number, timed in turns.

`benchmarks/*.py` write files into `mtlib/book/results/benchmarks`. Each holds one kind of thing, under a key of that name:
"workloads" (times of a meta-gradient beside other libraries), "training" (seconds until a network is good), "methods"
(accuracy after a minute), "columns" (Omniglot's columns after an equal time), "processes" (two against one), "tables"
(resident memory), "pages" (seconds of the book's pages) and "kinds" (what each page spends them on). What nobody has recorded is an empty dict, and the pages say so.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from mtlib.book import results
from mtlib.book.page import equal, table
from mtlib.core import expect
from mtlib.evaluate import interval
from mtlib.plots import BLUES, REFERENCE, styles
from mtlib.tasks import positive

OURS = "mtlib"
NOT_TORCH = ("JAX",)  # peers that are no library of torch's
NOTHING = "(nothing is recorded yet)"

Report = dict[str, Any]
"""A record's file, read."""
Call = Callable[[], Any]
"""What is timed or counted."""


# What is recorded ----------------------------------------------------------------------------


def reports(kind: str) -> dict[str, Report]:
    """Name -> recorded file that has this key, sorted by name. A trial at the small scale is none."""
    expect(
        isinstance(kind, str) and bool(kind), "the key of a kind of record, as 'workloads'", kind
    )
    held = {
        path.stem: json.loads(path.read_text("utf8"))
        for path in sorted((results.FOLDER / "benchmarks").glob("*.json"))
    }
    return {k: r for k, r in held.items() if kind in r and not r.get("setting", {}).get("small")}


def shown(rows: Mapping[str, Any], columns: Sequence[str] = (), corner: str = "") -> None:
    """`mtlib.book.page.table` of what is recorded, or a line that says that nothing is."""
    if rows:
        table(rows, columns, corner)
    else:
        print(f"{corner}: {NOTHING}" if corner else NOTHING)


def origins(files: Mapping[str, Report]) -> dict[str, dict[str, str]]:
    """When and with what files were made, as rows of a table: a column for each file."""

    def facts(report: Report) -> dict[str, str]:
        made, setting = report.get("provenance", {}), report.get("setting", {})
        versions = made.get("versions", {})
        return {
            "date": made.get("date", ""),
            "commit": made.get("commit", "")[:7],
            "Python": made.get("python", ""),
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
            "threads": str(setting.get("threads", "")),
            "rounds": str(setting.get("repeats", "")),
            "ceilings": ", ".join(
                f"{setting[f'peak {unit}']:,.0f} {unit}"
                for unit in ("GFLOP/s", "GB/s")
                if f"peak {unit}" in setting
            ),
            "not installed": ", ".join(setting.get("absent", [])),
        }

    held = {name: facts(report) for name, report in files.items()}
    names = next(iter(held.values()), {})
    return {fact: {name: held[name][fact] for name in held} for fact in names}


class Case(NamedTuple):
    """One recorded workload on one device. `ratio` in a row is the time of the fastest peer over the row's own."""

    name: str  # "W2, second order"
    what: str  # "Omniglot shape, 5-way 1-shot"
    device: str
    peer: str  # the fastest
    rows: dict[str, dict[str, Any]]  # implementation -> its times, and its distance in float64
    wrong: Mapping[str, float | None] = {}  # not timed -> that distance; None: not finite

    @property
    def default(self) -> float:
        """The ratio of mtlib without any argument."""
        ratio: float = self.plain["ratio"]
        return ratio

    @property
    def plain(self) -> dict[str, Any]:
        """The row of mtlib without any argument; of its first way where the workload needs an argument."""
        return next(r for n, r in sorted(self.rows.items()) if n.startswith(OURS))

    @property
    def best(self) -> float:
        """The ratio of the faster of mtlib's recorded ways."""
        ratio: float = max(r["ratio"] for n, r in self.rows.items() if n.startswith(OURS))
        return ratio

    @property
    def floors(self) -> float:
        """The default's time over the arithmetic floor."""
        floors: float = self.plain["floors"]
        return floors

    def ahead(self, others: Sequence[str] = ()) -> dict[str, float]:
        """Peers that are faster than each of mtlib's ways -> how many times; `others` are left out."""
        return {
            n: r["ratio"] / self.best
            for n, r in self.rows.items()
            if not n.startswith((OURS, *others)) and r["ratio"] > self.best
        }

    def cells(self) -> dict[str, str]:
        """A row of the page's table."""
        compiled = self.rows.get(f"{OURS}, compiled")
        return {
            "fastest peer": self.peer,
            "mtlib": f"{self.default:.2f}",
            "compiled": f"{compiled['ratio']:.2f}" if compiled else "",
            "floors": f"{self.floors:.1f}",
        }


def cases(files: Mapping[str, Report]) -> list[Case]:
    """The workloads of files of times, the first file's first; with several files a name says its device."""
    return [
        Case(
            f"{name}, {device}" if len(files) > 1 else name,
            found["workload"]["what"],
            device,
            found["fastest peer"],
            found["implementations"],
            found.get("wrong", {}),
        )
        for device, report in files.items()
        for name, found in report["workloads"].items()
    ]


def discrepancy(found: Sequence[Case]) -> float:
    """The largest relative distance, in float64, of one of mtlib's gradients from the loop by hand; 0 of no case."""
    ours = (r for c in found for n, r in c.rows.items() if n.startswith(OURS))
    return max((r["float64 discrepancy"] for r in ours), default=0.0)


def told(found: Sequence[Case]) -> dict[str, str]:
    """What the page says of all cases, by the name of each sentence's part; where nothing is recorded, that."""
    behind = [f"{c.name} ({c.default:.2f})" for c in found if c.default < 1]
    ahead = [
        f"{name}, {by:.1f} times as fast on {c.name}"
        for c in found
        for name, by in c.ahead().items()
    ]
    order = sorted(found, key=lambda c: c.default)
    ends = [f"{c.default:.2f} ({c.name})" for c in order]
    return {
        "off": f"{discrepancy(found):.0e}",
        "workloads": f"{len(found)}",
        "faster": f"{len(found) - len(behind)}",
        "behind": "; ".join(behind) or ("nothing" if found else NOTHING),
        "ahead": "; ".join(ahead) or ("nowhere, in what is recorded" if found else NOTHING),
        "untimed": "; ".join(
            f"{name} on {c.name} (off by {'no finite number' if gap is None else f'{gap:.0e}'})"
            for c in found
            for name, gap in c.wrong.items()
        )
        or ("nobody" if found else NOTHING),
        "least": ends[0] if ends else NOTHING,
        "most": ends[-1] if ends else NOTHING,
        "devices": ", ".join(dict.fromkeys(c.device for c in found)) or NOTHING,
    }


def ratios(axes: Any, found: Sequence[Case]) -> None:
    """A row for each case: how many times as fast as the fastest peer each implementation is, with its quartiles."""
    names = list(dict.fromkeys(n for c in found for n in c.rows))
    others = [n for n in names if not n.startswith(OURS)]
    looks: Any = styles(others)
    own = [n for n in names if n.startswith(OURS)]
    looks |= {n: {"color": BLUES[2 * i % 3], "marker": "sD"[i % 2]} for i, n in enumerate(own)}
    for j, name in enumerate(others + own):
        rows = {i: c.rows[name] for i, c in enumerate(found) if name in c.rows}
        shift = 0.6 * (j / max(1, len(names) - 1) - 0.5)
        middle = [r["ratio"] for r in rows.values()]
        ends = [r["ratio quartiles"] for r in rows.values()]
        reach = [[abs(m - e[k]) for m, e in zip(middle, ends, strict=True)] for k in (0, 1)]
        look = {
            **looks[name],
            "linestyle": "",
            "markersize": 8 if looks[name]["marker"] == "*" else 6,
        }
        axes.errorbar(middle, [i + shift for i in rows], xerr=reach, capsize=2, label=name, **look)
    axes.axvline(1, color=REFERENCE, linewidth=1, linestyle="--")
    axes.set(xscale="log", xlabel="times as fast as the fastest peer")
    axes.set_yticks(range(len(found)), [c.name for c in found])
    left, right = axes.get_xlim()
    step = 4.0 if right > 64 * left else 2.0
    ticks = [step**k for k in range(-8, 9) if left <= step**k <= right]
    axes.set_xticks(ticks, [f"{t:.2g}" for t in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    if found:
        axes.legend()


def shapes(found: Sequence[Case]) -> dict[str, list[str]]:
    """What each workload is: "W2" -> its shape; the first case of a number speaks for all of it."""
    rows: dict[str, list[str]] = {}
    for c in found:
        rows.setdefault(c.name.split(",")[0], [c.what])
    return rows


def minutes(files: Mapping[str, Report]) -> dict[str, dict[str, str]]:
    """What training for a given time came to: accuracy ± its 95 % interval over training seeds, mean steps and seconds."""

    def cells(runs: Sequence[Report]) -> dict[str, str]:
        accuracy, steps, seconds = (
            torch.tensor([float(r[k]) for r in runs]) for k in ("accuracy", "steps", "seconds")
        )
        several = len(runs) > 1
        return {
            "accuracy, %": interval(accuracy).percent() if several else f"{100 * accuracy[0]:.1f}",
            "seeds": f"{len(runs)}",
            "steps": f"{steps.mean():,.0f}",
            "seconds": f"{seconds.mean():.0f}",
        }

    return {
        method: cells([*runs.values()])
        for report in files.values()
        for method, runs in report["methods"].items()
    }


def reached(files: Mapping[str, Report]) -> dict[str, dict[str, str]]:
    """Seconds of training until the target, and accuracy on test characters then: a row for each contender."""
    return {
        f"{method}, {name}": {
            "seconds": _until(run, report["setting"]["limit"]),
            "steps": f"{run['steps']:,}",
            "test, %": f"{100 * run['test']:.1f}",
        }
        for report in files.values()
        for method, runs in report["training"].items()
        for name, run in runs.items()
    }


def told_training(files: Mapping[str, Report]) -> str:
    """The seconds until the target of mtlib's fastest contender and of those in torch alone, method by method."""
    rows = []
    for report, method, runs in _races(files):
        limit = report["setting"]["limit"]
        ours = _fastest(runs)
        others = [
            f"{_until(run, limit)} s by "
            + ("the same recipe" if n.startswith(_recipe(ours)) else _recipe(n))
            for n, run in runs.items()
            if n.endswith(TORCH)
        ]
        rows.append(
            f"{method} {_until(runs[ours], limit)} s, in torch alone {' and '.join(others)}"
        )
    return "; ".join(rows) or NOTHING


def told_shares(files: Mapping[str, Report]) -> str:
    """What a recipe brings by itself, and what mtlib brings on top of it: factors of time, method by method."""
    rows = []
    for report, method, runs in _races(files):
        limit, ours = report["setting"]["limit"], _fastest(runs)
        same = runs[_recipe(ours) + TORCH]
        (other,) = (n for n in runs if n.endswith(TORCH) and not n.startswith(_recipe(ours)))
        rows.append(
            f"{method}: {_recipe(ours)} in the place of {_recipe(other)} {_factor(runs[other], same, limit)}, "
            f"and mtlib in the place of torch {_factor(same, runs[ours], limit)}"
        )
    return "; ".join(rows)


TORCH = ", torch"
"""How the name of a contender without mtlib ends; before it stands its recipe."""


def _races(files: Mapping[str, Report]) -> Iterator[tuple[Report, str, dict[str, Report]]]:
    for report in files.values():
        for method, runs in report["training"].items():
            yield report, method, runs


def _fastest(runs: Mapping[str, Report]) -> str:
    """mtlib's contender that reached the target first; where none did, the one that is best on the test."""
    ours = [n for n in runs if not n.endswith(TORCH)]
    return min(ours, key=lambda n: (runs[n]["seconds"] or math.inf, -runs[n]["test"]))


def _recipe(contender: str) -> str:
    return contender.split(",")[0]


def _factor(slow: Report, fast: Report, limit: float) -> str:
    """In words, how many times as fast."""
    if fast["seconds"] is None:
        return "did not arrive in time, either" if slow["seconds"] is None else "was slower"
    least = "at least " if slow["seconds"] is None else ""
    return f"brought {least}{(slow['seconds'] or limit) / fast['seconds']:.1f} times the speed"


def _until(run: Report, limit: float) -> str:
    return f"over {limit:.0f}" if run["seconds"] is None else f"{run['seconds']:.0f}"


def columns(files: Mapping[str, Report]) -> dict[str, dict[str, str]]:
    """Accuracy in % of each method in each of Omniglot's columns, ± half the 95 % interval over seeds."""

    def told(cell: Report) -> str:
        seeds = "" if cell["seeds"] is None else f" ± {100 * cell['seeds']:.1f}"
        return f"{100 * cell['mean']:.1f}{seeds}"

    return {
        method: {column: told(cell) for column, cell in row.items()}
        for report in files.values()
        for method, row in report["columns"].items()
    }


def megabytes(report: Report, title: str) -> dict[str, dict[str, str]]:
    """How far the resident memory of a process rises, in MB: the rows of one of the report's tables."""
    return {
        who: {n: f"{cell['grown'] / 1e6:.0f}" for n, cell in cells.items()}
        for who, cells in report["tables"][title].items()
    }


def told_memory(files: Mapping[str, Report]) -> str:
    """How many times mtlib's memory each peer takes, at the largest number that both have, as a sentence."""
    told = [
        f"for {n} {title} {peer} took {cells[n]['grown'] / rows[OURS][n]['grown']:.1f} times as much"
        for report in files.values()
        for title, rows in report["tables"].items()
        for peer, cells in rows.items()
        if OURS in rows and not peer.startswith(OURS)
        for n in [max(cells.keys() & rows[OURS].keys(), key=int)]
        if rows[OURS][n]["grown"] > 0
    ]
    return "; ".join(told) or NOTHING


def spent_by_kind(report: Report, count: int = 10) -> dict[str, dict[str, str]]:
    """The pages that take longest, with their seconds of imports, data, training, …, and all pages together."""
    positive(count=count)
    pages = sorted(report["kinds"].items(), key=lambda item: -item[1]["in all"])
    total = {kind: sum(row[kind] for _, row in pages) for kind in pages[0][1]}
    shown = {page.removeprefix("book/"): row for page, row in pages[:count]}
    return {
        page: {kind: f"{seconds:.0f}" for kind, seconds in row.items()}
        for page, row in {**shown, f"all {len(pages)} pages": total}.items()
    }


def told_processes(files: Mapping[str, Report]) -> dict[str, str]:
    """How many times as fast as one process two are, together and apart, and what averaging takes in %: of the last file."""
    for report in reversed([*files.values()]):
        two, apart = (f"{report['processes'][kind]['median']:.2f}" for kind in ("two", "apart"))
        return {"two": two, "apart": apart, "exchange": f"{100 * report['exchange']:.1f}"}
    return dict.fromkeys(("two", "apart", "exchange"), NOTHING)


def told_pages(files: Mapping[str, Report]) -> dict[str, str]:
    """How many pages were timed, minutes in all, and how many ran at a time: of the last file."""
    for report in reversed([*files.values()]):
        spent = report["pages"].values()
        return {
            "pages": f"{len(spent)}",
            "total": f"{sum(spent) / 60:.0f}",
            "jobs": f"{report['jobs']}",
        }
    return dict.fromkeys(("pages", "total", "jobs"), NOTHING)


def straight(x: Sequence[float], y: Sequence[float], tolerance: float = 0.05) -> float:
    """The slope of numbers that lie on a line, but for this part of the last; AssertionError if they do not."""
    expect(len(x) == len(y) > 1, "as many numbers as x, at least two", y)
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    off = max(abs(y[0] + slope * (a - x[0]) - b) for a, b in zip(x, y, strict=True))
    if off > tolerance * abs(y[-1]):
        raise AssertionError(
            f"expected numbers on a straight line, got {list(y)}, off by {off:.3g}"
        )
    return slope


# What an idea brings -------------------------------------------------------------------------


@contextmanager
def reference(*rooms: str) -> Iterator[None]:
    """The plain reference in these rooms alone ("norm", "run.fast"), or everywhere where none is named; a decorator, too.

    Everywhere, it is what MTLIB_PLAIN=1 asks for.
    """
    with ExitStack() as stack:
        for room in rooms:
            module = import_module(f"mtlib.{room}")
            expect(hasattr(module, "plain"), "a room that has a reference to fall back to", room)
            stack.enter_context(patch.object(module, "plain", lambda: True))
        if not rooms:
            stack.enter_context(patch.dict("os.environ", MTLIB_PLAIN="1"))
        yield


def plainly(make: Callable[..., Call], *rooms: str) -> Callable[..., Call]:
    """`make`, whose function is computed by the plain reference in these rooms, or everywhere where none is named."""

    def made(*args: Any, **options: Any) -> Call:
        return reference(*rooms)(make(*args, **options))

    return made


def swapped(net: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """The network with `make(layer)` in the place of each layer of a kind; it is changed itself."""
    for parent in [*net.modules()]:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, kind):
                setattr(parent, name, make(layer))
    return net


def in_turns(ways: Mapping[str, Call], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each way. All take turns, every other round backwards, after one round to warm up.

    So a machine that slows down slows all of them.
    """
    positive(rounds=rounds)
    expect(bool(ways) and all(map(callable, ways.values())), "functions to call, by name", ways)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(ways) if i % 2 else reversed([*ways]):
            began = time.perf_counter()
            ways[name]()
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}


def fastest(f: Call, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    positive(repeats=repeats)
    return min(in_turns({"": f}, 1)[""] for _ in range(repeats))


class Gain(NamedTuple):
    """What an idea brings: median seconds with it and without it."""

    fast: float
    slow: float

    @property
    def factor(self) -> float:
        return self.slow / self.fast

    def cells(self) -> dict[str, str]:
        """A row of a table."""
        seconds = {"with, ms": self.fast, "without, ms": self.slow}
        shown = {k: f"{1e3 * s:.1f}" for k, s in seconds.items()}
        return {**shown, "times as fast": f"{self.factor:.1f}"}


def gain(
    idea: str,
    fast: Callable[[torch.dtype], Call],
    slow: Callable[[torch.dtype], Call],
    rounds: int = 7,
) -> Gain:
    """What an idea brings. `fast(dtype)` and `slow(dtype)` each give a function without arguments: value and gradients.

    Both must agree in float64, ‖fast − slow‖ ≤ 10⁻¹⁰ ‖slow‖, else AssertionError; then they are timed in float32.
    """
    expect(callable(fast) and callable(slow), "two functions of a dtype", (fast, slow))
    one, other = (
        {"": value, **grads} for value, grads in (f(torch.float64)() for f in (fast, slow))
    )
    equal(idea, one, other, 1e-10)
    spent = in_turns({"fast": fast(torch.float32), "slow": slow(torch.float32)}, rounds)
    return Gain(**spent)
