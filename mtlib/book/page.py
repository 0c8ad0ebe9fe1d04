"""What a page of the book needs besides mathematics: its scale, its device, and claims that can fail."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

try:
    from IPython.display import Markdown, display
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}; pages need the extra `pages`: mtlib-book[pages]"
    ) from missing

T = TypeVar("T")


def is_full() -> bool:
    """True unless MTLIB_SCALE=small: the tests run every page small, the book and a reader run it full."""
    chosen = os.environ.get("MTLIB_SCALE", "full")
    if chosen not in ("small", "full"):
        raise ValueError(f'expected MTLIB_SCALE to be "small" or "full", got {chosen!r}')
    return chosen == "full"


def scale(small: T, full: T) -> T:
    """One setting of a page at its two scales. With a GPU, raise `full` in the page: that is the switch."""
    return full if is_full() else small


def device() -> torch.device:
    """CUDA whenever there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def claim(text: str, holds: bool) -> None:
    """State a claim about this run; at the full scale a claim that does not hold stops the page."""
    true = _judged(text, holds)
    if not is_full():
        print(f"not judged at the small scale: {text}")
        return
    if not true:
        raise AssertionError(f"the claim fails: {text}")
    print(f"holds: {text}")


def recorded_claim(text: str, holds: bool) -> None:
    """State a claim about a committed record, which no run changes: judged at either scale."""
    if not _judged(text, holds):
        raise AssertionError(f"the claim fails in the record: {text}")
    print(f"holds in the record: {text}")


def _judged(text: str, holds: bool) -> bool:
    """Whether a claim holds; TypeError or ValueError unless it is a text and one truth value."""
    if not isinstance(text, str) or isinstance(holds, str):
        raise TypeError(f"expected a text and whether it holds, got {text!r} and {holds!r}")
    if str(getattr(holds, "dtype", type(holds).__name__)).removeprefix("torch.") != "bool":
        raise TypeError(
            f"expected one truth value for the claim {text!r}, a bool, got {type(holds).__name__}"
        )
    if getattr(holds, "ndim", 0) != 0:
        raise ValueError(
            f"expected one truth value for the claim {text!r}, got {holds}; reduce them by .all()"
        )
    return bool(holds)


def equal(text: str, left: Any, right: Any, tolerance: float = 1e-12) -> None:
    """State an equation whose sides were both computed; AssertionError if they differ by more than `tolerance`.

    The difference is ‖left − right‖ / ‖right‖, and ‖left‖ where right is 0; with tolerance 0 each entry is the same. A
    side is a number, a tensor or a dict of tensors. Raises ValueError where the two have not the same shape.
    """
    a, b = _entries(left), _entries(right)
    if _shape(left) != _shape(right):
        raise ValueError(
            f"expected two sides of one shape for {text!r}, got {_shape(left)} and {_shape(right)}"
        )
    scale_of = b.norm() if b.norm() > 0 else torch.ones((), dtype=b.dtype)
    off = float((a - b).norm() / scale_of)
    if not off <= tolerance:
        raise AssertionError(f"{text}: off by {off:.1g}, more than {tolerance:g}")
    print(f"checked to {tolerance:g}: {text}" if tolerance else f"checked to the last bit: {text}")


def _entries(side: Any) -> torch.Tensor:
    """All numbers of one side in float64, by the sorted names of a dict."""
    if isinstance(side, Mapping):
        return torch.cat([_entries(side[k]) for k in sorted(side)])
    if isinstance(side, str):
        raise TypeError(f"expected a number, a tensor or a dict of tensors, got {side!r}")
    a_tensor = isinstance(side, torch.Tensor)
    found = side.detach().cpu() if a_tensor else torch.as_tensor(side, dtype=torch.float64)
    if found.is_complex():
        raise TypeError("expected real numbers, got complex ones; torch.view_as_real(...)")
    return found.double().reshape(-1)


def _shape(side: Any) -> Any:
    if isinstance(side, Mapping):
        return {k: _shape(side[k]) for k in sorted(side)}
    return tuple(torch.as_tensor(side).shape)


def glue(name: str, value: Any, form: str = "") -> None:
    """Keep a computed value for the prose, which shows it with the `glue` role.

    What `myst_nb.glue` writes, through IPython alone, so that pages also run where MyST-NB is absent.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a name for the value, a text, got {name!r}")
    text = _formatted(value, form)
    meta = {"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}}
    display({"application/papermill.record/text/plain": text}, metadata=meta, raw=True)


def table(
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    columns: Sequence[str] = (),
    corner: str = "",
    form: str = ".3f",
) -> None:
    """Show a table: a real one in the book, in Jupyter and in Colab.

    `rows` are name -> {column: cell}, or name -> the cells of `columns` in their order, or a list of {column: cell}.
    Real numbers are written in the `form`, a Score as it prints; an absent cell stays empty. `corner` stands above the
    names. Raises ValueError if a row has another number of cells than there are columns.
    """
    if not isinstance(rows, Mapping | Sequence) or isinstance(rows, str) or not rows:
        raise TypeError(f"expected rows, name -> cells, at least one row, got {rows!r}")
    listed = [("", r) for r in rows] if not isinstance(rows, Mapping) else list(rows.items())
    held = [(name, r if isinstance(r, Mapping) else _named(name, r, columns)) for name, r in listed]
    heads = list(columns) or list(dict.fromkeys(k for _, r in held for k in r))
    lines = [[_cell(r.get(k, ""), form) for k in heads] for _, r in held]
    if isinstance(rows, Mapping):
        heads = [corner, *heads]
        lines = [[_cell(name, form), *line] for (name, _), line in zip(held, lines, strict=True)]
    rule = [":--" if i == 0 and isinstance(rows, Mapping) else "--:" for i in range(len(heads))]
    text = "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
    display(Markdown(text))


def _named(name: str, cells: Any, columns: Sequence[str]) -> dict[str, Any]:
    """The cells of a row by column; one number, word or Score is a row of one."""
    one = isinstance(cells, str) or hasattr(cells, "_fields") or not isinstance(cells, Sequence)
    row = [cells] if one else list(cells)
    if len(row) != len(columns):
        raise ValueError(f"expected {len(columns)} cells in the row {name!r}, got {len(row)}")
    return dict(zip(columns, row, strict=True))


def _cell(value: Any, form: str) -> str:
    scalar = hasattr(value, "item") and getattr(value, "ndim", 0) == 0  # numpy's and torch's
    value = value.item() if scalar else value
    text = _formatted(value, form) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _formatted(value: Any, form: str) -> str:
    try:
        return format(value, form)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a form that fits {value!r}, got {form!r}: {error}") from error


def source(*functions: Callable[..., Any]) -> None:
    """Show functions as they stand in the package, so that no page retypes them."""
    for f in functions:
        if not (inspect.isfunction(f) or inspect.isclass(f)):
            raise TypeError(f"expected functions and classes written in Python, got {f!r}")
    text = "\n\n\n".join(inspect.getsource(f).rstrip() for f in functions)
    display(Markdown(f"```python\n{text}\n```"))
