"""A page's code, run in this process up to the cell that defines a name: for tests of what a page chooses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtlib.data import characters as letters
from mtlib.data import planted as plants
from mtlib.tasks import ClassSet

BOOK = Path(__file__).resolve().parent.parent / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))


@contextlib.contextmanager
def at_small_scale(patch: pytest.MonkeyPatch | None = None) -> Iterator[pytest.MonkeyPatch]:
    """The small scale without a record, on one thread: networks this small gain nothing from a second one.

    A test's own `monkeypatch` must be given here: two of them would undo each other's settings in the wrong order.
    """
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        patch = patch or stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MTLIB_SCALE", "small")
        patch.setenv("MTLIB_PROGRESS", "0")
        patch.delenv("MTLIB_RECORD", raising=False)
        torch.set_num_threads(1)
        yield patch
    torch.set_num_threads(threads)


def run_until(page: str, name: str) -> dict[str, Any]:
    """The page's variables once `name` is defined; figures and installs are left out."""
    space: dict[str, Any] = {"__name__": page}
    for text in code_cells(page):
        exec(compile(text, f"{page}.ipynb", "exec"), space)
        if name in space:
            return space
    raise NameError(f"{page}.ipynb defines no {name!r}")


def code_cells(page: str) -> list[str]:
    """The page's code, cell by cell; figures and installs are left out."""
    cells = json.loads((BOOK / f"{page}.ipynb").read_text("utf8"))["cells"]
    kept = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "remove-cell" not in cell["metadata"].get("tags", [])
    ]
    return [text for text in kept if "with figure(" not in text]


def mixed(data: ClassSet) -> ClassSet:
    """The same items under each other's names."""
    flat = data.items.flatten(0, 1)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(flat)))
    return data._replace(items=flat[rows].view(data.items.shape))


def mix_test_characters(monkeypatch) -> None:
    """Test drawings stand under each other's names from here on."""
    plain = letters.characters

    def other(part="train", **options):
        data = plain(part, **options)
        return mixed(data) if part == "test" else data

    monkeypatch.setattr(letters, "characters", other)


def mix_test_planted(monkeypatch) -> None:
    """Planted items of the pages' test seed, 2, stand under each other's names from here on."""
    plain = plants.planted

    def other(*args, seed=0, **options):
        data = plain(*args, seed=seed, **options)
        return mixed(data) if seed == 2 else data

    monkeypatch.setattr(plants, "planted", other)
