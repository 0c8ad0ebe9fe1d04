"""Run notebooks as their reader does: each alone, in an empty folder, from the first cell to the last.

    python tools/rerun.py _build/notebooks --report report.md           # all of a folder
    python tools/rerun.py _build/notebooks --only background --keep out   # some of them, with what they show
    python tools/rerun.py _build/notebooks --without mtlib-book            # each first cell installs what its page needs

The kernel is this Python's. Prints the seconds of each. What fails is written to the report, in Markdown, with its last
lines; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SHOWN = 25  # lines of an error
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def rerun(path: Path, timeout: int, keep: Path | None = None) -> str:
    """What went wrong when the notebook ran: nothing, or an error's last lines."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": empty}},
        )
        try:
            client.execute()
        except (CellExecutionError, TimeoutError, RuntimeError) as error:  # or the kernel died
            said = COLOURS.sub("", str(error)).strip().splitlines()
            return "\n".join(said[-SHOWN:]) or type(error).__name__
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, keep / path.name)
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the notebooks are")
    parser.add_argument("--only", nargs="+", default=[], metavar="PAGE", help="these alone")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a cell may take")
    parser.add_argument("--keep", type=Path, help="a folder for the notebooks with their outputs")
    parser.add_argument("--without", metavar="PACKAGE", help="uninstall it before each of them")
    parser.add_argument("--report", type=Path, help="a file for what failed")
    options = parser.parse_args(arguments)
    found = {path.stem: path for path in sorted(options.folder.glob("*.ipynb"))}
    unknown = set(options.only) - found.keys()
    if unknown or not found:
        parser.error(
            f"expected notebooks in {options.folder}, found no {sorted(unknown) or 'file'}"
        )
    failed = {}
    for name in options.only or found:
        if options.without:
            pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", options.without]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)  # it may not be there
        began = time.perf_counter()
        problem = rerun(found[name], options.timeout, options.keep)
        seconds = time.perf_counter() - began
        print(f"{name:22} {seconds:6.1f} s{'  FAILED' if problem else ''}", flush=True)
        if problem:
            print(problem, file=sys.stderr, flush=True)
            failed[name] = problem
    if options.report and failed:
        parts = [f"## {name}\n\n```\n{problem}\n```\n" for name, problem in failed.items()]
        options.report.write_text("\n".join(parts), "utf8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
