"""One notebook's code on the second device, at the small scale: `python tests/second_device/page.py book/NAME.ipynb`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

NOT_HERE = 77  # the exit status where there is no such device


def main(notebook: Path) -> int | str:
    """0, or in which cell the page stops, and of what."""
    os.environ |= {"MTLIB_SCALE": "small", "MTLIB_PROGRESS": "0"}
    import matplotlib
    import torch
    from device import Unavailable, name
    from IPython.core.interactiveshell import InteractiveShell

    from mtlib.book import page

    try:
        device = torch.device(name(), 0)
    except Unavailable as reason:
        print(reason)
        return NOT_HERE
    matplotlib.use("Agg")
    warnings.simplefilter("ignore")  # the tests of the pages themselves judge those
    page.device = lambda: device
    os.chdir(notebook.parent)
    shell = InteractiveShell.instance(colors="nocolor")
    for number, cell in enumerate(json.loads(notebook.read_text("utf8"))["cells"]):
        shown = io.StringIO()
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(shown):
                done = shell.run_cell("".join(cell["source"]), silent=True)
            if not done.success:
                return f"{notebook.name} stops in cell {number} on {device}:\n{shown.getvalue()}"
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
