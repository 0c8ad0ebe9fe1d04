"""Figures from runs and scores. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.rcsetup import cycler
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}; figures need the extra `pages`: mtlib-book[pages]"
    ) from missing

from mtlib.evaluate import Score
from mtlib.tasks import positive, within
from mtlib.train import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, for what is no method: classes, seeds, tasks."""

POINTS = ".^xs+dv"
"""Markers that go with `COLOURS`, one by one."""

BOXES = ("#000000", "#009e73", "#f0e442", "#56b4e9", "#cc79a7")
"""Colours of boxes on a photograph, of Okabe and Ito's palette, none of them a method's."""

META, TRANSFER, BASELINE, REFERENCE = "#0072b2", "#d55e00", "#7a7a7a", "#000000"
"""The colour code of the book: meta-learning blue, transfer orange, baselines grey, a reference line dashed black."""

BLUES = (META, "#56b4e9", "#003a66", "#6a8fd8", "#00929e")
ORANGES = (TRANSFER, "#f0a050", "#8a3a00", "#e69f00", "#b5651d")
GREYS = (BASELINE, "#b0b0b0", "#4d4d4d", COLOURS[6])
OTHERS = ("#009e73", "#cc79a7", "#882255", "#999933", "#44aa99")
LINES: dict[tuple[str, ...], Any] = {BLUES: "-", ORANGES: (0, (6, 1.5)), GREYS: ":", OTHERS: "-."}
"""A family's dashes, which no other family has, nor the reference line."""

MARKERS = {BLUES: "o^v<>", ORANGES: "sDPXh", GREYS: "x+1|234_", OTHERS: "*pd8H"}
"""A family's markers, by its shades: with the dashes, all that print in grey leaves of the colours."""

METHODS = {
    **dict.fromkeys(("meta-learned", "meta-learning", "MAML", "bi-level"), (BLUES, 0)),
    "hypergradient": (BLUES, 0),
    **dict.fromkeys(
        ("first-order MAML", "FOMAML", "matching network", "Bayesian head"), (BLUES, 1)
    ),
    **dict.fromkeys(("ProtoNet", "ANIL", "attentive CNP", "ALPaCA"), (BLUES, 2)),
    **dict.fromkeys(("Reptile", "R2-D2", "ridge", "relation network", "CNP"), (BLUES, 3)),
    **dict.fromkeys(
        ("iMAML", "ProtoMAML", "BOIL", "MetaOptNet", "FEAT", "Meta-SGD", "CAVIA"), (BLUES, 4)
    ),
    **dict.fromkeys(("pre-training, then", "attention over class means"), (BLUES, 4)),
    **dict.fromkeys(("transferred", "transfer", "pre-training", "class means"), (ORANGES, 0)),
    "cosine head": (ORANGES, 1),
    **dict.fromkeys(("pre-training + linear probe", "linear probe", "last layers"), (ORANGES, 1)),
    **dict.fromkeys(("pre-training + fine-tuning", "fine-tuning"), (ORANGES, 2)),
    **dict.fromkeys(("joint", "summed loss", "the summed loss"), (ORANGES, 3)),
    **dict.fromkeys(("no norm, ", "own statistics"), (ORANGES, 4)),
    **dict.fromkeys(("L2-SP", "LoRA", "feature pull"), (ORANGES, 4)),
    "SimpleShot": (ORANGES, 2),
    "whitened class means": (ORANGES, 4),
    **dict.fromkeys(("IRM", "Mixup"), (ORANGES, 0)),
    **dict.fromkeys(("VREx", "inter-domain Mixup"), (ORANGES, 1)),
    "Group DRO": (ORANGES, 2),
    "MLDG": (BLUES, 0),
    "ERM": (GREYS, 1),
    **dict.fromkeys(("from scratch", "fine-tuning from scratch", "untrained"), (GREYS, 0)),
    "joint on episodes": (GREYS, 1),
    "random search": (GREYS, 0),
    "logistic regression": (GREYS, 0),
    **dict.fromkeys(("source only", "no norm", "no norm, source only"), (GREYS, 1)),
    **dict.fromkeys(("pooled", "ridge on profiles"), (GREYS, 1)),
    "k-mer ridge": (GREYS, 2),
    "mean of relatives": (GREYS, 0),
    **dict.fromkeys(("target only", "target alone", "targets alone", "raw inputs"), (GREYS, 2)),
    "equal weights": (GREYS, 0),
    **dict.fromkeys(("biases", "film's average"), (GREYS, 0)),
    "factors": (GREYS, 1),
    "boosting": (GREYS, 2),
    "share of the class": (GREYS, 1),
    **dict.fromkeys(("which sources", "pulled"), (ORANGES, 0)),
    **dict.fromkeys(("one weight", "one source"), (ORANGES, 1)),
    "a weight each": (ORANGES, 2),
    "in the large": (ORANGES, 1),
    "logistic recalibration": (ORANGES, 2),
    "share known": (ORANGES, 2),
    "learned prior": (BLUES, 2),
    "learned optimizer": (BLUES, 0),
    "in context": (BLUES, 2),
    **dict.fromkeys(("gradient descent", "momentum"), (GREYS, 1)),
    "Adam": (GREYS, 2),
    **dict.fromkeys(("a network each", "source's network"), (GREYS, 0)),
    "not trained on": (GREYS, 1),
    "TIES": (ORANGES, 2),
    "sum": (ORANGES, 0),
}
"""The beginning of a method's name -> its family's shades, and which. The longest beginning that fits decides."""


def style(name: str) -> dict[str, Any]:
    """How the whole book draws a method, by its name: {"color", "linestyle", "marker"}.

    A blue for a meta-learner, an orange for transfer, a grey for a baseline; their lines are solid, dashed and dotted, and
    no marker is of two families. A name that none of `METHODS` begins has no "color"; `styles` gives it one within its
    figure.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected a method's name, a text, got {type(name).__name__}")
    fits = [m for m in METHODS if _begins(name.lower(), m.lower())]
    if not fits:
        return {"linestyle": LINES[OTHERS], "marker": MARKERS[OTHERS][0]}
    shades, i = METHODS[max(fits, key=len)]
    return {"color": shades[i], "linestyle": LINES[shades], "marker": MARKERS[shades][i]}


def _begins(name: str, words: str) -> bool:
    """Whether the name begins with these words, whole ones: "FEAT" begins no "feature pull"."""
    ends = not name[len(words) :][:1].isalnum() or not words[-1:].isalnum()
    return name.startswith(words) and ends


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`style` of several methods of one figure: two of one family differ by marker, others get other colours."""
    if isinstance(names, str):
        raise TypeError(f"expected several names, got one text, {names!r}")
    found: dict[str, dict[str, Any]] = {}
    free = cycle(OTHERS)
    for name in names:
        own = style(name)
        own = own if "color" in own else {"color": next(free), **own}
        shades = _family(own["color"])
        first = shades.index(own["color"])
        marks = [*MARKERS[shades][first:], *MARKERS[shades][:first]]
        looks: list[dict[str, Any]] = [{"marker": m} for m in marks]
        looks += [{"marker": m, "markerfacecolor": "white"} for m in marks]  # where these run out
        taken = [{k: s[k] for k in s if "marker" in k} for s in found.values()]
        first_free = min(range(len(looks)), key=lambda i: taken.count(looks[i]))
        found[name] = {**own, **looks[first_free]}
    return found


def _family(colour: Any) -> tuple[str, ...]:
    """The shades among which a colour is; () where it is no method's."""
    return next((shades for shades in LINES if colour in shades), ())


def reference(axes: Axes, y: float, label: str) -> None:
    """A level to compare with (the best possible, the exact value, chance): a dashed black line."""
    axes.axhline(y, color=REFERENCE, linestyle="--", linewidth=1, label=label)


@contextmanager
def figure(width: float = 6.4, height: float = 3.2, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """`with figure() as (fig, axes):` one figure in the book's style, laid out and closed at the end.

    Curves with a name that were drawn solid in a family's colour get its dashes, so that print in grey tells them apart.
    Legends of the axes become one below the figure, where no curve runs.
    """
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
        _dash(fig)
        _legend_below(fig)
        plt.show()


def _dash(fig: Any) -> None:
    """The dashes of their families for named curves that are solid, and for what stands for them in a legend."""
    for ax in fig.axes:
        handles, _ = ax.get_legend_handles_labels()
        drawn = [line for line in map(_line, handles) if isinstance(line, Line2D)]
        legend = ax.get_legend()
        for line in (*drawn, *(legend.findobj(Line2D) if legend else ())):
            shades = _family(line.get_color())
            if shades and line.get_linestyle() == "-":
                line.set_linestyle(LINES[shades])


def _line(drawn: Any) -> Any:
    """A curve with error bars is a container; its first part is the curve."""
    return drawn[0] if isinstance(drawn, tuple) and drawn else drawn


def _sparse(n: int) -> dict[str, Any]:
    """About eight markers on a curve of n points."""
    return {"markersize": 4, "markevery": max(1, n // 8)}


def _legend_below(fig: Any) -> None:
    """One legend under the figure in the place of those on its axes; as they are where one name has two looks."""
    axes = [ax for ax in fig.axes if ax.get_legend() is not None]
    held = [ax.get_legend() for ax in axes]
    if not held or fig.legends or any(legend.get_title().get_text() for legend in held):
        return
    shown: dict[str, Any] = {}
    for ax, legend in zip(axes, held, strict=True):
        handles, names = ax.get_legend_handles_labels()
        drawn = dict(
            zip(names, handles, strict=True)
        )  # a legend's own handle of error bars is but the bar
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            name = text.get_text()
            handle = drawn.get(name, handle)
            if _look(shown.setdefault(name, handle)) != _look(handle):
                return
    for legend in held:
        legend.remove()
    room = int(12 * fig.get_figwidth())  # characters in a line
    columns = max(1, min(len(shown), room // (max(map(len, shown)) + 8)))
    rows = -(-len(shown) // columns)
    fig.set_figheight(fig.get_figheight() + 0.25 * rows)
    look: dict[str, Any] = {"ncols": columns, "fontsize": 9, "handlelength": 3}
    fig.legend(shown.values(), shown, loc="outside lower center", **look)


def _look(handle: Any) -> tuple[Any, ...]:
    """What tells two entries of legends apart."""
    names = ("get_color", "get_facecolor", "get_linestyle")
    return tuple(str(getattr(_line(handle), n)()) for n in names if hasattr(_line(handle), n))


def losses(
    axes: Axes, runs: Mapping[str, Run], window: int = 100, ylabel: str = "objective"
) -> None:
    """The objective over the steps of each run, averaged over `window` steps."""
    positive(window=window)
    _named(runs, Run)
    for name, run in runs.items():
        if not run.losses:
            raise ValueError(f"expected runs of at least 1 of their steps, {name!r} has none")
    looks = styles(runs)
    for name, run in runs.items():
        w = max(1, min(window, len(run.losses) // 5))
        smooth = np.convolve(run.losses, np.ones(w) / w, mode="valid")
        look: Any = {**looks[name], **_sparse(len(smooth))}
        axes.plot(np.arange(len(smooth)) + w, smooth, label=name, **look)
    axes.set(xlabel="outer step", ylabel=ylabel)
    axes.legend()


def scores(axes: Axes, results: Mapping[str, Score], xlabel: str, percent: bool = True) -> None:
    """One row per method: the mean and its 95 % interval, the best at the top."""
    _named(results, Score)
    ranked = sorted(results.items(), key=lambda item: item[1].mean)
    unit = 100 if percent else 1
    for row, (name, s) in enumerate(ranked):
        colour = style(name).get("color", REFERENCE)
        axes.errorbar(unit * s.mean, row, xerr=unit * s.interval, fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set(xlabel=xlabel, ylim=(-0.6, len(ranked) - 0.4))


def against(
    axes: Axes,
    x: Sequence[float],
    results: Mapping[str, Sequence[Score]],
    xlabel: str,
    ylabel: str,
    **axis: Any,
) -> None:
    """Scores against a number (steps, shots): one line per method, its 95 % interval as a band; `axis` as of `lines`."""
    _named(results, Sequence)
    looks = styles(results)
    for name, row in results.items():
        _named({f"{name} {i}": s for i, s in enumerate(row)}, Score)
        mean, half = (np.array([getattr(s, k) for s in row]) for k in ("mean", "interval"))
        band(axes, x, mean, half, name, **looks[name])
    axes.set(xlabel=xlabel, ylabel=ylabel, **axis)
    axes.legend()


def lines(
    axes: Axes, x: Any, rows: Mapping[str, Any], xlabel: str, ylabel: str, **axis: Any
) -> None:
    """Numbers against a number, without intervals: one line per method; `axis` is matplotlib's, as xscale="log"."""
    _named(rows, object)
    looks: Any = styles(rows)
    for name, row in rows.items():
        if np.shape(row) != np.shape(x):
            raise ValueError(
                f"expected a number of {name!r} for each x, got {np.shape(row)} for {np.shape(x)}"
            )
        axes.plot(x, row, label=name, **looks[name], **_sparse(len(row)))
    axes.set(xlabel=xlabel, ylabel=ylabel, **axis)
    axes.legend()


def curves(axes: Axes, rows: Mapping[str, Any], xlabel: str, ylabel: str, **axis: Any) -> None:
    """Curves that each have their own x, such as precision against recall: name -> (x, y); `axis` is matplotlib's."""
    _named(rows, object)
    looks: Any = styles(rows)
    for name, row in rows.items():
        if len(row) != 2 or np.ndim(row[0]) != 1 or np.shape(row[0]) != np.shape(row[1]):
            raise ValueError(
                f"expected x and y of {name!r}, two rows of one length, got {[np.shape(r) for r in row]}"
            )
        axes.plot(*row, label=name, **looks[name], **_sparse(len(row[0])))
    axes.set(xlabel=xlabel, ylabel=ylabel, **axis)
    axes.legend()


def band(
    axes: Axes,
    x: Any,
    mean: Any,
    half: Any,
    label: str | None = None,
    color: str | None = None,
    **look: Any,
) -> None:
    """A line, and its interval mean ± half as a band; `look` is matplotlib's for the line, as of `style`."""
    mean, half = np.asarray(mean, float), _half(x, mean, half)
    options = {"marker": "o", "markersize": 4, **look}
    (line,) = axes.plot(x, mean, label=label, color=color, **options)
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


def dots(axes: Axes, rows: Mapping[str, Any], groups: Sequence[str], xlabel: str) -> None:
    """Every run: one row per method, the first at the top; `rows` are (groups, runs), a colour and a marker each, a bar at the mean."""
    _named(rows, object)
    names = [*rows][::-1]
    for height, name in enumerate(names):
        each = np.asarray(rows[name], float)
        if each.ndim != 2 or not each.size or len(each) > len(groups):
            raise ValueError(
                f"expected numbers of {name!r} for at most {len(groups)} groups (groups, runs), got {each.shape}"
            )
        for i, (group, runs) in enumerate(zip(groups, each, strict=False)):
            place = np.full(len(runs), height + 0.4 * (i / max(1, len(groups) - 1) - 0.5))
            look: Any = {"color": COLOURS[i % len(COLOURS)], "markersize": 4}
            mark = POINTS[i % len(POINTS)]
            axes.plot(runs, place, mark, label=group if not height else None, **look)
        axes.plot(each.mean(), height, "|", color=REFERENCE, markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=xlabel, ylim=(-0.6, len(rows) - 0.4))
    axes.legend()


def framed(
    axes: Axes, image: Any, boxes: Any, labels: Any, classes: Sequence[str], **look: Any
) -> None:
    """An image (3, H, W) with boxes (K, 4), x1, y1, x2, y2 in pixels: a colour for each class number; `look` is matplotlib's."""
    image, boxes, labels = np.asarray(image), np.asarray(boxes, float), np.asarray(labels)
    right = image.ndim == 3 and len(image) in (1, 3) and boxes.shape == (len(labels), 4)
    if not right or not all(0 <= k < len(classes) for k in labels.tolist()):
        raise ValueError(
            f"expected an image (3, H, W), boxes (K, 4) and K class numbers below {len(classes)}, got {image.shape}, "
            f"{boxes.shape} and {labels.tolist()[:5]}"
        )
    axes.imshow(np.moveaxis(image, 0, 2).squeeze(), cmap="gray")
    shown: set[int] = set()
    for (x1, y1, x2, y2), k in zip(boxes.tolist(), labels.tolist(), strict=True):
        options: dict[str, Any] = {"color": BOXES[k % len(BOXES)], "linewidth": 1.3, **look}
        if k not in shown:
            options["label"] = classes[k]
        shown.add(k)
        axes.plot((x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1), **options)
    axes.set_axis_off()


def by_group(axes: Axes, rows: Mapping[str, Any], groups: Sequence[str], xlabel: str) -> None:
    """A number for each group and method: one row a group, sorted by the first method, the best at the top."""
    _named(rows, object)
    looks: Any = styles(rows)
    numbers = {name: np.asarray(row, float) for name, row in rows.items()}
    for name, row in numbers.items():
        if row.shape != (len(groups),):
            raise ValueError(
                f"expected a number of {name!r} for each of {len(groups)} groups, got {row.shape}"
            )
    order = next(iter(numbers.values())).argsort()
    for name, row in numbers.items():
        look = {**looks[name], "linestyle": "", "alpha": 0.8}
        axes.plot(row[order], range(len(order)), label=name, **look)
    axes.set_yticks(range(len(order)), [groups[i] for i in order])
    axes.set(xlabel=xlabel, ylim=(-0.6, len(order) - 0.4))
    axes.legend()


def confusion(axes: Axes, y: Any, predicted: Any, classes: Sequence[str]) -> None:
    """A confusion matrix: how many items of each class, a row, were given each answer, a column."""
    n, y, predicted = len(classes), np.asarray(y), np.asarray(predicted)
    right = y.ndim == 1 and y.shape == predicted.shape and len(y)
    if not right or not all(
        v.dtype.kind in "iu" and 0 <= v.min() <= v.max() < n for v in (y, predicted)
    ):
        raise ValueError(
            f"expected a class number from 0 to {n - 1} for each item, twice, got {y.shape} and {predicted.shape}"
        )
    table = np.bincount(n * y + predicted, minlength=n * n).reshape(n, n)
    axes.imshow(table / table.sum(1, keepdims=True).clip(1), cmap="Greys", vmin=0, vmax=1)
    middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    for i, j in zip(*table.nonzero(), strict=True):
        dark = 2 * table[i, j] > table[i].sum()
        axes.text(j, i, str(table[i, j]), color="white" if dark else "black", **middle)
    axes.set_xticks(range(n), classes)
    axes.set_yticks(range(n), classes)
    axes.set(xlabel="answer", ylabel="class")
    axes.grid(False)


def calibration(axes: Axes, risks: Mapping[str, Any], y: Any, groups: int = 5) -> None:
    """A calibration curve for each model: in `groups` of equal size by the risk, the mean risk and the share with y = 1.

    `risks` are name -> (n,) from 0 to 1, y (n,) is 0 or 1. A dashed line is where risks are true.
    """
    y = _outcomes(risks, y)
    positive(groups=groups)
    for name, look in styles(risks).items():
        risk = np.asarray(risks[name], float)
        parts = np.array_split(np.argsort(risk, kind="stable"), groups)
        mean, share = ([v[p].mean() for p in parts if len(p)] for v in (risk, y))
        axes.plot(mean, share, label=name, markersize=4, **look)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1)
    axes.set(xlabel="risk as told", ylabel="share with the outcome")
    axes.legend()


def decision(
    axes: Axes, risks: Mapping[str, Any], y: Any, thresholds: Sequence[float] | None = None
) -> None:
    """A decision curve for each model: the net benefit of acting on all whose risk is at least t, against t.

    NB(t) = TP/n − FP/n · t / (1 − t), with true and false positives TP and FP {cite}`vickers2006decision`. Beside the models
    stand acting on everyone and on nobody. `risks` are name -> (n,) from 0 to 1, y (n,) is 0 or 1; thresholds lie between
    0 and 1, without the ends; by default 0.05 to 0.9.
    """
    y = _outcomes(risks, y)
    t = np.linspace(0.05, 0.9, 18) if thresholds is None else np.asarray(thresholds, float)
    if t.ndim != 1 or not len(t) or not ((t > 0) & (t < 1)).all():
        raise ValueError(f"expected thresholds between 0 and 1, without the ends, got {thresholds}")
    worth = y - (1 - y) * (t / (1 - t))[:, None]  # (T, n), of acting on a person
    for name, look in styles(risks).items():
        acted = np.asarray(risks[name], float) >= t[:, None]
        axes.plot(t, (acted * worth).mean(1), label=name, **look, **_sparse(len(t)))
    axes.plot(t, worth.mean(1), color=BASELINE, linestyle=":", label="everyone")
    reference(axes, 0, "nobody")
    axes.set(xlabel="threshold", ylabel="net benefit")
    axes.legend()


def _outcomes(risks: Any, y: Any) -> Any:
    """y as an array of 0 and 1; ValueError unless each model has a risk for each person."""
    _named(risks, object)
    y = np.asarray(y, float)
    if y.ndim != 1 or not len(y) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"expected outcomes y (n,) of 0 and 1, got {y.shape}")
    for name, risk in risks.items():
        v = np.asarray(risk, float)
        if v.shape != y.shape or not ((v >= 0) & (v <= 1)).all():
            raise ValueError(
                f"expected risks from 0 to 1 of {name!r}, one for each of {len(y)} outcomes, got {v.shape}"
            )
    return y


def roc(axes: Axes, inside: Any, values: Any) -> None:
    """ROC curves: how much of the `inside` (N,), a bool each, is above a level that lets in so much of the rest; in percent.

    `values` (K, N) are K rankings of the same items: a grey curve each, and a black one, their mean at each share of the rest.
    """
    inside, values = np.asarray(inside), np.asarray(values, float)
    if inside.dtype != bool or values.ndim != 2 or values.shape[1:] != inside.shape:
        raise ValueError(
            f"expected rows of numbers for items that are inside or not, got {values.shape} and {inside.shape}"
        )
    if not 0 < inside.sum() < len(inside):
        raise ValueError(f"expected items of both kinds, got {inside.sum()} of {len(inside)}")
    grid, curves = np.linspace(0, 1, 201), []
    for row in values:
        levels = np.sort(row)[::-1]
        above = [(row[k] >= levels[:, None]).sum(1) / k.sum() for k in (~inside, inside)]
        curves.append(np.interp(grid, *(np.r_[0, share] for share in above)))
        axes.plot(100 * grid, 100 * curves[-1], color=GREYS[1], linewidth=0.8)
    axes.plot(100 * grid, 100 * np.mean(curves, 0), color=REFERENCE)
    axes.set(xlabel="outside: answered, %", ylabel="inside: answered, %")


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
