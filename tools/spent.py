"""What a page spends its time on: imports, data, training, evaluation, figures, and the rest.

    python tools/spent.py                          # every page of the table of contents, one after the other
    python tools/spent.py background which         # these
    python tools/spent.py --report spent.json      # ... and a file, to which pages are added

The book's own record is mtlib/book/results/benchmarks/spent.json, which the page on speed shows. Each page runs once, at the scale of MTLIB_SCALE, with a clock around the functions of each kind. A second counts for the
innermost of them alone: where `fit` scores on validation tasks, that is evaluation. "the rest" is the page's own code,
scikit-learn and the start of its kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import nbformat
import yaml
from execute import pages
from nbclient import NotebookClient

from mtlib.book.results import provenance, write

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("imports", "data", "training", "evaluation", "figures")
CLOCK = '''
import builtins, functools, inspect, pkgutil, threading, time
from importlib import import_module

spent, stack, home = {}, [[None, time.perf_counter()]], threading.current_thread()


def charge():
    """What has passed since the last change goes to the innermost kind."""
    now = time.perf_counter()
    kind, since = stack[-1]
    spent[kind] = spent.get(kind, 0.0) + now - since
    stack[-1][1] = now


def timed(kind, f):
    @functools.wraps(f)
    def g(*args, **kwargs):
        if threading.current_thread() is not home:
            return f(*args, **kwargs)
        charge()
        stack.append([kind, time.perf_counter()])
        try:
            return f(*args, **kwargs)
        finally:
            charge()
            stack.pop()
            stack[-1][1] = time.perf_counter()

    return g


def watch(kind, place, names):
    for name in names:
        setattr(place, name, timed(kind, getattr(place, name)))


builtins.__import__ = timed("imports", builtins.__import__)
import matplotlib.backend_bases, mtlib.data, mtlib.evaluate, mtlib.norm, mtlib.train

watch("figures", matplotlib.backend_bases.FigureCanvasBase, ["print_figure"])
watch("training", mtlib.train, ["fit"])
watch("evaluation", mtlib.evaluate, ["evaluate", "answers"])
watch("evaluation", mtlib.norm, ["calibrate"])
for module in pkgutil.iter_modules(mtlib.data.__path__):
    room = import_module("mtlib.data." + module.name)
    for name, f in list(vars(room).items()):
        if inspect.isfunction(f) and f.__module__ == room.__name__ and name[0] != "_":
            setattr(room, name, timed("data", f))
'''
BEGIN = f"""
import sys, types

sys.modules["mtlib_clock"] = types.ModuleType("mtlib_clock")  # apart from the page's own names
exec({CLOCK!r}, vars(sys.modules["mtlib_clock"]))
"""
TELL = """
import json, sys

sys.modules["mtlib_clock"].charge()
print(json.dumps({str(k): v for k, v in sys.modules["mtlib_clock"].spent.items()}))
"""


def measure(page: str) -> dict[str, float]:
    """Kind -> seconds of one page, with its total."""
    notebook = nbformat.read(ROOT / f"{page}.ipynb", as_version=4)
    clock, tell = map(nbformat.v4.new_code_cell, (BEGIN, TELL))
    notebook.cells = [clock, *notebook.cells, tell]
    began = time.perf_counter()
    where = {"metadata": {"path": str((ROOT / page).parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    total = time.perf_counter() - began
    spent = json.loads(tell_of(notebook.cells[-1]))
    kinds = {kind: round(spent.get(kind, 0.0), 1) for kind in KINDS}
    return {**kinds, "the rest": round(total - sum(kinds.values()), 1), "in all": round(total, 1)}


def tell_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="such as background; all of them otherwise")
    parser.add_argument("--report", type=Path, help="a file for the table; what it has is kept")
    given = parser.parse_args()
    found = pages(yaml.safe_load((ROOT / "_toc.yml").read_text("utf8")))
    found = [p for p in found if (ROOT / f"{p}.ipynb").exists()]
    names = [f"book/{p}" for p in given.pages] or found
    if lacking := [p for p in names if p not in found]:
        parser.error(f"expected pages that hold code; there is no {', '.join(lacking)}")
    print(f"{'':20}" + "".join(f"{kind:>11}" for kind in (*KINDS, "the rest", "in all")))
    report = {}
    if given.report and given.report.exists():
        report = json.loads(given.report.read_text("utf8"))["kinds"]
    for page in names:
        row = report[page] = measure(page)
        print(
            f"{page.removeprefix('book/'):20}" + "".join(f"{s:11.1f}" for s in row.values()),
            flush=True,
        )
        if given.report:
            write(given.report, {"kinds": report, "provenance": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
