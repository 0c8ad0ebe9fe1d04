"""Times of the meta-gradient beside other libraries and the arithmetic floor, once all of them agree in float64.

    python benchmarks/meta_gradient.py                       # every workload; the result as JSON
    python benchmarks/meta_gradient.py --only W1 W2 --repeats 21 --threads 2
    python benchmarks/meta_gradient.py --device cuda --write # keeps the result with the package
    python benchmarks/meta_gradient.py --only W2 --write     # in the kept file these workloads are new, others stay

Implementations take turns, with the same seed, weights and data: all of torch in one process, JAX in one of its own, for
which this one waits (`with_jax.py`). `ratio` is the fastest peer's time over
one's own in the same round: above 1 is faster. A peer is what is not mtlib; `peers.py` says which there are, learn2learn's
loop among them (it does not install on Python 3.11 and later). `floors` is the median over the arithmetic floor: the
operations of convolutions and matrix products, at the speed of one 64-channel 3×3 convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from devices import loaded
from peers import HAND, Make, Run, implementations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from with_jax import is_here
from workloads import Workload, case, reduced, small, workloads

from mtlib.book.results import FOLDER, provenance, write
from mtlib.run.progress import bar

TOLERANCE = 1e-9
MAY_BE_WRONG = ("JAX", "torch.func, torch's norm")  # listed with their distance then, and not timed
WARM_UP = 2  # rounds
SHORT = 0.05  # seconds


class Disagreement(Exception):
    """Two implementations give different gradients: their times are not to be compared."""


def main() -> None:
    given = options().parse_args()
    if given.list:
        print("\n".join(workloads()))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    device = loaded(given.device)
    report = suite(device, given.repeats, given.only, given.small, given.without)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if given.write:
        keep(report, f"{slug(device)}-{torch.get_num_threads()}-threads", "workloads")


def options() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--device", default="cpu", help="cpu, cuda, or the tests' second")
    ask.add_argument("--threads", type=int, help="of one operation; torch's own choice otherwise")
    ask.add_argument("--repeats", type=int, default=11, help="rounds, at least 2")
    ask.add_argument("--only", nargs="+", default=[""], help="how workloads begin: W1 W2")
    ask.add_argument("--list", action="store_true", help="the workloads' names, and no more")
    ask.add_argument("--without", nargs="+", default=[], help="implementations: JAX, higher")
    ask.add_argument("--small", action="store_true", help="tiny workloads: whether all runs")
    ask.add_argument("--write", action="store_true", help="keep the result with the package")
    return ask


def suite(
    device: str, repeats: int, only: list[str], tiny: bool, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Check every chosen workload, then time it."""
    every = workloads(device)
    chosen = {k: w for k, w in every.items() if k.startswith(tuple(only))}
    if not chosen:
        raise SystemExit(f"no workload begins with {only}; there are {list(every)}")
    if tiny:
        chosen = {k: small(w) for k, w in chosen.items()}
    compiled = not tiny and compiles(device)
    warnings.filterwarnings("error", "torch.compile failed")  # or its row would be another's
    makes = {
        name: {k: m for k, m in implementations(work, compiled, device).items() if k not in without}
        for name, work in chosen.items()
    }
    with bar(len(chosen), "float64") as shown:
        gaps = {}
        for name, work in chosen.items():
            gaps[name] = check(work, makes[name], device)
            for wrong in [k for k, gap in gaps[name].items() if not gap <= TOLERANCE]:
                del makes[name][wrong]
            shown.update()
    speed, results = peak(device), {}
    with bar(len(chosen) * (WARM_UP + repeats), "rounds") as shown:
        for name, work in chosen.items():
            seconds = rounds(work, makes[name], device, repeats, shown.update)
            results[name] = summary(
                work, seconds, gaps[name], flops(work, makes[name][HAND], device) / speed
            )
            tqdm.write(table(name, results[name]), file=sys.stderr)
    return {
        "setting": {
            **setting(device, tiny),
            "repeats": repeats,
            "warm-up": WARM_UP,
            "peak GFLOP/s": speed / 1e9,
            "peak GB/s": bandwidth(device, tiny) / 1e9,
            "absent": sorted({*without, *([] if is_here() and device == "cpu" else ["JAX"])}),
        },
        "workloads": results,
        "provenance": made(),
    }


def compiles(device: str) -> bool:
    """Whether torch.compile works here; on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception:  # torch names it differently from version to version
        return False
    return True


# Agreement -----------------------------------------------------------------------------------


def check(work: Workload, makes: dict[str, Make], device: str = "cpu") -> dict[str, float]:
    """Name -> ‖g − g_hand‖ / ‖g_hand‖ in float64, on few tasks, at the second call, as what is timed is never the first.

    Raises Disagreement above 1e-9, but for those that are known to go wrong: their distance is listed.
    """
    data = case(reduced(work), dtype=torch.float64, device=device)
    grads = {name: flat(second_call(make(data))) for name, make in makes.items()}
    hand = grads[HAND]
    gaps = {name: ((g - hand).norm() / hand.norm()).item() for name, g in grads.items()}
    for name, gap in gaps.items():
        if not (gap <= TOLERANCE or name in MAY_BE_WRONG):
            raise Disagreement(
                f"{work.what}, {work.method}: the gradients of {name!r} and {HAND!r} differ by {gap:.1e} in float64, "
                f"expected at most {TOLERANCE:.0e}; nothing is timed"
            )
    return gaps


def second_call(run: Run) -> list[Tensor]:
    run()
    return run()


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


# Time ----------------------------------------------------------------------------------------


def rounds(
    work: Workload,
    makes: dict[str, Make],
    device: str,
    repeats: int,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Name -> seconds of each round, in which every implementation has one turn; every other round runs backwards."""
    data = case(work, device=device)
    runs = {name: make(data) for name, make in makes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(WARM_UP + repeats):
        for name in list(runs) if i % 2 else reversed(runs):
            spent = clock(runs[name], device)
            if i >= WARM_UP:
                seconds[name].append(spent)
        tick()
    return seconds


def clock(run: Run | Callable[[], Tensor], device: str) -> float:
    """Seconds of one call, to the end of what it started; what runs in another process says its own.

    A short call is made twice, and the second counts: the first one finds cold caches and threads asleep, or not, by whose
    turn it was before.
    """
    if hasattr(run, "seconds"):
        return run.seconds()
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    spent = 0.0
    for _ in range(2):
        wait()
        began = time.perf_counter()
        run()
        wait()
        spent = time.perf_counter() - began
        if spent > SHORT:
            break
    return spent


# The floor -----------------------------------------------------------------------------------


def flops(work: Workload, by_hand: Make, device: str) -> float:
    """Operations of convolutions and matrix products in the loop by hand: one task's, times their number."""
    run = by_hand(case(work._replace(tasks=1), device=device))
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() * work.tasks


def peak(device: str, images: int = 75) -> float:
    """Operations a second of a 3×3 convolution of 64 channels on 28×28, channels last: the best of 20."""
    if device != "cpu":
        images *= 32
    x = torch.rand(images, 64, 28, 28, device=device).to(memory_format=torch.channels_last)
    w = torch.rand(64, 64, 3, 3, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        best = min(
            clock(lambda: torch.nn.functional.conv2d(x, w, padding=1), device) for _ in range(20)
        )
    return 2 * x.numel() * 64 * 9 / best


def bandwidth(device: str, tiny: bool = False) -> float:
    """Bytes a second that a copy reads and writes, of more than any cache holds: the best of 20."""
    x = torch.ones(2**16 if tiny else 2**26, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(clock(lambda: y.copy_(x), device) for _ in range(20))


# The report ----------------------------------------------------------------------------------


def summary(
    work: Workload, seconds: dict[str, list[float]], gaps: dict[str, float], floor: float
) -> dict[str, Any]:
    """Medians, quartiles, ratios to the fastest peer round by round, and distances to the floor."""
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    fastest = min((name for name in seconds if not name.startswith("mtlib")), key=medians.get)

    def row(name: str) -> dict[str, Any]:
        ratios = [p / s for p, s in zip(seconds[fastest], seconds[name], strict=True)]
        return {
            "median": medians[name],
            "quartiles": quartiles(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio quartiles": quartiles(ratios),
            "floors": medians[name] / floor,
            "float64 discrepancy": gaps[name],
        }

    return {
        "workload": work._asdict(),
        "fastest peer": fastest,
        "floor": floor,
        "implementations": {name: row(name) for name in seconds},
        "wrong": {
            k: gap if math.isfinite(gap) else None for k, gap in gaps.items() if k not in seconds
        },
    }


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def table(name: str, result: dict[str, Any]) -> str:
    """A workload's rows as text."""
    rows = [f"{name}: {result['workload']['what']}, floor {1e3 * result['floor']:.3g} ms"]
    for label, r in result["implementations"].items():
        low, high = r["ratio quartiles"]
        rows.append(
            f"  {label:<22}{1e3 * r['median']:9.2f} ms   × {r['ratio']:.2f} [{low:.2f}, {high:.2f}]"
            f"   {r['floors']:.1f} floors"
        )
    rows += [f"  {label:<22} not timed: off by {gap}" for label, gap in result["wrong"].items()]
    return "\n".join(rows)


def keep(report: dict[str, Any], name: str, part: str | None = None, depth: int = 1) -> None:
    """With the package, as mtlib/book/results/benchmarks/NAME.json.

    With a `part` such as "workloads", what is new goes into the file that is there: what the report does not have under
    `part`, so many keys deep, stays, unless one of the two is a trial and the other is not. `commits` says which each is of.
    """
    folder = FOLDER / "benchmarks"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    if part:
        old = json.loads(path.read_text("utf8")) if path.exists() else {}
        if old.get("setting", {}).get("small", False) != report["setting"]["small"]:
            old = {}
        before = dict.fromkeys(old.get(part, {}), old.get("provenance", {}).get("commit"))
        now = dict.fromkeys(report[part], report["provenance"]["commit"])
        report = {
            **report,
            part: merged(old.get(part, {}), report[part], depth),
            "commits": {**before, **old.get("commits", {}), **now},
        }
    write(path, report)


def merged(old: dict[str, Any], new: dict[str, Any], depth: int) -> dict[str, Any]:
    """Both, in the order of the old; of what both have the new, or below `depth` 1 both of that."""
    if depth == 1:
        return {**old, **new}
    return {**old, **{k: merged(old.get(k, {}), v, depth - 1) for k, v in new.items()}}


def setting(device: str, tiny: bool) -> dict[str, Any]:
    """What the numbers depend on beside the code. Times are in seconds."""
    return {
        "device": slug(device),
        "threads": torch.get_num_threads(),
        "small": tiny,
        "dtype": "float32",
    }


def slug(device: str) -> str:
    """The device in words fit for a file's name: cpu-avx512, nvidia-h100-80gb-hbm3."""
    name = device
    if device == "cpu":
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    elif device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def made() -> dict[str, Any]:
    """`provenance`, with the peers' versions."""
    here = provenance()
    for name in ("higher", "torchopt", "jax"):
        with contextlib.suppress(PackageNotFoundError):
            here["versions"][name] = version(name)
    return here


if __name__ == "__main__":
    main()
