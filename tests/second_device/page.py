"""Run one notebook's code on the second device: `python page.py ../../book/NAME.ipynb`, in an environment of the book."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

import matplotlib
import torch
from device import name
from IPython.core.interactiveshell import InteractiveShell

from mtlib.book import page


def main(notebook: Path) -> None:
    """Stops at the first cell that fails, with its number and its error."""
    matplotlib.use("Agg")
    warnings.simplefilter("ignore")  # the tests of the pages judge them
    device = torch.device(name())
    page.device = lambda: device
    cells = json.loads(notebook.read_text("utf8"))["cells"]
    os.chdir(notebook.parent)
    shell = InteractiveShell.instance()
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                done = shell.run_cell("".join(cell["source"]), silent=True)
            if not done.success:
                sys.exit(f"{notebook.name} stops in cell {number} on {device}\n{shown.getvalue()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
