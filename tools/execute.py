"""Run the book's notebooks, several at a time, into the cache that `jupyter-book build` reads.

python tools/execute.py --jobs 2

Each job gets its share of the cores. What the cache has already is not run again. Prints the seconds of each page, and
keeps them in _build/seconds.json (the one of a whole build on a quiet machine is mtlib/book/results/benchmarks/book.json);
the exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    jobs = max(1, parser.parse_args().jobs)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["execute"]
    found = pages(yaml.safe_load((ROOT / "_toc.yml").read_text("utf8")))
    notebooks = [p for p in found if (ROOT / f"{p}.ipynb").exists()]
    cache = get_cache(ROOT / settings["cache"])
    for page in notebooks:
        cache.add_nb_to_project(str(ROOT / f"{page}.ipynb"))

    failures, taken = 0, dict[str, float]()
    groups = (
        ([p for p in notebooks if p in ALONE], 1),
        ([p for p in notebooks if p not in ALONE], jobs),
    )
    for names, at_once in groups:
        with ProcessPoolExecutor(at_once) as pool:
            threads = max(1, cores // at_once)
            for done in as_completed([pool.submit(run, p, settings, threads) for p in names]):
                page, seconds, problem = done.result()
                taken[page] = round(seconds, 1)
                print(f"{page:22} {seconds:6.1f} s{'  FAILED' if problem else ''}", flush=True)
                if problem:
                    print(problem, file=sys.stderr, flush=True)
                    failures += 1
    facts = {"jobs": jobs, "cores": cores, "scale": os.environ.get("MTLIB_SCALE", "full")}
    ordered = {page: taken[page] for page in notebooks}
    write(ROOT / "_build/seconds.json", {"pages": ordered, **facts, "provenance": provenance()})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
