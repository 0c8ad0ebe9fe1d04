"""Figures from runs and scores. The only module that imports matplotlib."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    import matplotlib.pyplot as plt
    from IPython.display import HTML
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes
    from matplotlib.rcsetup import cycler
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}; figures need the extra `pages`: mtlib-book[pages]"
    ) from missing

from mtlib.evaluate import Score
from mtlib.tasks import positive, within
from mtlib.train import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; a method keeps its colour within a page."""


@contextmanager
def figure(width: float = 6.4, height: float = 3.2, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """`with figure() as (fig, axes):` one figure in the book's style, laid out and closed at the end."""
    within(0.1, width=width, height=height)
    style: dict[str, Any] = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "figure.dpi": 110,
        "font.size": 10,
        "legend.frameon": False,
    }
    with plt.rc_context(style):  # type: ignore[arg-type]
        fig, axes = plt.subplots(figsize=(width, height), layout="constrained", **subplots)
        yield fig, axes
        plt.show()


def losses(
    axes: Axes, runs: Mapping[str, Run], window: int = 100, ylabel: str = "objective"
) -> None:
    """The objective over the steps of each run, averaged over `window` steps."""
    positive(window=window)
    _named(runs, Run)
    for name, run in runs.items():
        if not run.losses:
            raise ValueError(f"expected runs of at least 1 of their steps, {name!r} has none")
    for name, run in runs.items():
        w = max(1, min(window, len(run.losses) // 5))
        smooth = np.convolve(run.losses, np.ones(w) / w, mode="valid")
        axes.plot(np.arange(len(smooth)) + w, smooth, label=name)
    axes.set(xlabel="outer step", ylabel=ylabel)
    axes.legend()


def scores(axes: Axes, results: Mapping[str, Score], xlabel: str, percent: bool = True) -> None:
    """One row per method: the mean and its 95 % interval, the best at the top."""
    _named(results, Score)
    ranked = sorted(results.items(), key=lambda item: item[1].mean)
    unit = 100 if percent else 1
    for row, (_, s) in enumerate(ranked):
        axes.errorbar(
            unit * s.mean, row, xerr=unit * s.interval, fmt="o", color=COLOURS[0], capsize=3
        )
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set(xlabel=xlabel, ylim=(-0.6, len(ranked) - 0.4))


def against(
    axes: Axes, x: Sequence[float], results: Mapping[str, Sequence[Score]], xlabel: str, ylabel: str
) -> None:
    """Scores against a number (steps, shots): one line per method, its 95 % interval as a band."""
    _named(results, Sequence)
    for name, row in results.items():
        _named({f"{name} {i}": s for i, s in enumerate(row)}, Score)
        mean, half = (np.array([getattr(s, k) for s in row]) for k in ("mean", "interval"))
        band(axes, x, mean, half, name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()


def band(
    axes: Axes, x: Any, mean: Any, half: Any, label: str | None = None, color: str | None = None
) -> None:
    """A line, and its interval mean ± half as a band."""
    mean, half = np.asarray(mean, float), _half(x, mean, half)
    (line,) = axes.plot(x, mean, marker="o", markersize=3, label=label, color=color)
    axes.fill_between(x, mean - half, mean + half, alpha=0.2, color=line.get_color(), linewidth=0)


def bars(
    axes: Axes,
    x: Any,
    mean: Any,
    half: Any,
    label: str | None = None,
    color: str | None = None,
    **style: Any,
) -> None:
    """Points with error bars mean ± half above `x`; `style` is matplotlib's."""
    options = {"fmt": "o", "capsize": 3, **style}
    axes.errorbar(x, mean, yerr=_half(x, mean, half), label=label, color=color, **options)


def _named(found: Any, kind: type) -> None:
    """Raise unless `found` is a dict of name -> `kind`, at least one."""
    if not isinstance(found, Mapping) or not found:
        raise TypeError(
            f"expected a dict of name -> {kind.__name__}, at least one, got {type(found).__name__}"
        )
    for name, value in found.items():
        if not isinstance(value, kind):
            raise TypeError(f"expected a {kind.__name__} for {name!r}, got {type(value).__name__}")


def _half(x: Any, mean: Any, half: Any) -> Any:
    """The half-widths of intervals as numbers, 0 where there is none; ValueError unless they go with x and mean."""
    half = np.nan_to_num(np.asarray(half, float))
    n = np.shape(mean)
    if np.shape(x) != n or half.shape not in ((), n, (2, *n)):
        raise ValueError(
            f"expected as many x, means and half-widths, got {np.shape(x)}, {n} and {half.shape}"
        )
    if (half < 0).any():
        raise ValueError(f"expected half-widths of at least 0, got {half.min():g}")
    return half


def player(animation: FuncAnimation, alt: str, mode: str = "once") -> HTML:
    """A frame player that needs no server and no network, with a text alternative and a named slider."""
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"expected alt to be a text that says what is shown, got {alt!r}")
    if not isinstance(animation, FuncAnimation):
        raise TypeError(
            f"expected a FuncAnimation, an animation of matplotlib, got {type(animation).__name__}"
        )
    text = html.escape(alt, quote=True)
    page = animation.to_jshtml(default_mode=mode)
    plt.close(animation._fig)  # type: ignore[attr-defined]
    page = re.sub(r'<link rel="stylesheet"\s+href="https?://[^>]*>', "", page)
    page = page.replace('<img id="_anim_img', f'<img alt="{text}" id="_anim_img')
    return HTML(
        page.replace(
            '<input id="_anim_slider', f'<input aria-label="{text}: frame" id="_anim_slider'
        )
    )
