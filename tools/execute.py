"""Run the book's notebooks, several at a time, into the cache that `jupyter-book build` reads.

python tools/execute.py --jobs 2                    every page of the table of contents
python tools/execute.py --jobs 1 --page background  this one

Each job gets its share of the cores, and at most half of them: more threads would wait for each other. What the cache
has already is not run again. Says how long it will take, by what each page took in a whole build on a quiet machine
(mtlib/book/results/benchmarks/book.json). Prints the seconds of each page and what is left, and keeps the seconds in
_build/seconds.json; the exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

from mtlib.book.results import provenance, write

ROOT = Path(__file__).resolve().parent.parent
ALONE = ("book/algorithms",)  # it shows how long training takes, on all cores
RECORDED = ROOT / "mtlib/book/results/benchmarks/book.json"
SMALL = 10.0  # seconds of a page at the small scale, at most


def pages(toc: Any) -> list[str]:
    """Files of the table of contents, in its order."""
    if isinstance(toc, list):
        return [name for part in toc for name in pages(part)]
    if not isinstance(toc, dict):
        return []
    own = [toc["file"]] if "file" in toc else []
    return own + [name for part in toc.values() for name in pages(part)]


def run(page: str, settings: dict[str, Any], threads: int) -> tuple[str, float, str]:
    """Execute one notebook -> its name, seconds, and what went wrong."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    path, began = str(ROOT / f"{page}.ipynb"), time.perf_counter()
    cache = get_cache(ROOT / settings["cache"])
    executor = load_executor("local-serial", cache, logging.getLogger("execute"))
    done = executor.run_and_cache(filter_uris=[path], timeout=settings["timeout"])
    failed = done.excepted or done.errored
    record = cache.get_project_record(path) if failed else None
    return (
        page,
        time.perf_counter() - began,
        (record and record.traceback) or "failed" * bool(failed),
    )


def expected(pages: list[str], scale: str) -> dict[str, float]:
    """Seconds that each page may take; a page that was not there then takes the mean of the others."""
    if scale == "small":
        return dict.fromkeys(pages, SMALL)
    known = json.loads(RECORDED.read_text("utf8"))["pages"]
    mean = sum(known.values()) / len(known)
    return {page: known.get(page, mean) for page in pages}


def left(guess: dict[str, float], taken: dict[str, float], jobs: int) -> float:
    """Seconds until all pages are done: the guess for the others, times what the guess for these was short of."""
    done = sum(guess[page] for page in taken)
    pace = sum(taken.values()) / done if done else 1.0
    return pace * sum(guess[page] for page in guess if page not in taken) / jobs


def in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return "less than a minute" if minutes < 1 else f"about {minutes} minute{'s' * (minutes > 1)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    parser.add_argument("--page", help="run this page alone, as `background`")
    options = parser.parse_args()
    jobs = max(1, options.jobs)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["execute"]
    found = pages(yaml.safe_load((ROOT / "_toc.yml").read_text("utf8")))
    notebooks = [p for p in found if (ROOT / f"{p}.ipynb").exists()]
    if options.page:
        notebooks = [p for p in notebooks if p == f"book/{options.page}"]
        if not notebooks:
            parser.error(
                f"expected a page that holds code, such as background; got {options.page!r}"
            )
    cache = get_cache(ROOT / settings["cache"])
    for page in notebooks:
        cache.add_nb_to_project(str(ROOT / f"{page}.ipynb"))

    new = [page for page in notebooks if not kept(cache, page)]
    scale = os.environ.get("MTLIB_SCALE", "full")
    guess = expected(new, scale)
    print(
        f"{len(new)} of {len(notebooks)} pages to run, {jobs} at a time; the others are kept from before."
    )
    if new:
        print(
            f"That takes {in_words(left(guess, {}, jobs))} on two quiet cores. "
            "Stop it when you like: it goes on where it was.",
            flush=True,
        )
    failures, taken = 0, dict[str, float]()
    groups = (
        ([p for p in new if p in ALONE], 1, cores),
        ([p for p in new if p not in ALONE], jobs, max(1, cores // max(2, jobs))),
    )
    for names, at_once, threads in groups:
        with ProcessPoolExecutor(at_once) as pool:
            for done in as_completed([pool.submit(run, p, settings, threads) for p in names]):
                page, seconds, problem = done.result()
                taken[page] = round(seconds, 1)
                rest = in_words(left(guess, taken, at_once))
                ahead = f"{len(taken)} of {len(new)}" + (
                    f", {rest} left" if len(taken) < len(new) else ""
                )
                print(
                    f"{page:22} {seconds:6.1f} s   {'FAILED  ' if problem else ''}{ahead}",
                    flush=True,
                )
                if problem:
                    print(problem, file=sys.stderr, flush=True)
                    failures += 1
    facts = {"jobs": jobs, "cores": cores, "scale": scale}
    ordered = {page: taken[page] for page in notebooks if page in taken}  # of those that ran
    write(ROOT / "_build/seconds.json", {"pages": ordered, **facts, "provenance": provenance()})
    return 1 if failures else 0


def kept(cache: Any, page: str) -> bool:
    """Whether the cache has a page's outputs."""
    try:
        cache.match_cache_file(str(ROOT / f"{page}.ipynb"))
    except KeyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
