"""A page's code, run in this process up to the cell that defines a name: for tests of what a page chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parent.parent / "book"


def run_until(page: str, name: str) -> dict[str, Any]:
    """The page's variables once `name` is defined; figures and installs are left out."""
    cells = json.loads((BOOK / f"{page}.ipynb").read_text("utf8"))["cells"]
    space: dict[str, Any] = {"__name__": page}
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or "remove-cell" in cell["metadata"].get("tags", []):
            continue
        if "with figure(" in text:
            continue
        exec(compile(text, f"{page}.ipynb", "exec"), space)
        if name in space:
            return space
    raise NameError(f"{page}.ipynb defines no {name!r}")
