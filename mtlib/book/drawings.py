"""Pictures of ideas, drawn from small computed examples; their words stand here, in code, for whoever translates them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtlib.core import Batch, Episode, expect, parameters
from mtlib.data.linear import LinearTasks
from mtlib.learners.metric import protonet
from mtlib.learners.transductive import laplacian_shot
from mtlib.plots import BASELINE, BLUES, COLOURS, META, REFERENCE, TRANSFER, figure

BOX = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.6"}


def two_losses(rate: float = 0.35, start: float = -1.6) -> None:
    """MAML's two losses over one parameter, and what the outer loop sees.

    Left, one task: the support loss L^S(φ) = ½(φ − 1)² moves the start φ to θ = φ − α∇L^S(φ), and the query loss
    L^Q, of the same task with other points, is read there. Right, two tasks of curvatures 0.4 and 2.5: the mean of
    L^Q(φ), which transfer learning lowers, and of L^Q(φ − α∇L^S(φ)), which meta-learning lowers.
    """
    x: Any = np.linspace(-2.6, 2.9, 300)

    def support(p: Any) -> Any:
        return 0.5 * (p - 1.0) ** 2

    def query(p: Any) -> Any:
        return 0.25 + 0.5 * (p - 0.6) ** 2

    end = start - rate * (start - 1.0)
    with figure(7.4, 3.3, ncols=2) as (_, (left, right)):
        left.plot(x, support(x), color=BASELINE, label="support loss")
        left.plot(x, query(x), color=BLUES[1], label="query loss")
        left.plot([start, end], [support(start), support(end)], "o", color=BASELINE)
        arrow(left, (start, support(start)), (end, support(end)), "0.3")
        left.plot([end, end], [0, query(end)], ":", color=BLUES[1])
        left.plot(end, query(end), "s", color=BLUES[1])
        say(left, "1 start φ", (start, support(start)), (-0.7, 5.0))
        say(left, "2 one step on the\nsupport loss: θ", (end, support(end)), (-0.3, 4.2))
        say(left, "3 judged here, by\nthe query loss", (end, query(end)), (0.5, 2.7))
        left.set(title="inside one task", xlabel="the parameter", ylabel="loss", ylim=(0, 5.4))

        tasks = ((0.4, 1.6), (2.5, -0.6))  # curvature, solution
        before: Any = sum(0.5 * a * (x - c) ** 2 for a, c in tasks) / 2
        after: Any = sum(0.5 * a * ((1 - rate * a) * (x - c)) ** 2 for a, c in tasks) / 2
        for curve, colour, name in (
            (before, TRANSFER, "joint objective: loss before the step"),
            (after, META, "bi-level objective: loss after the step"),
        ):
            right.plot(x, curve, color=colour, label=name)
            right.plot(x[curve.argmin()], curve.min(), "o", color=colour)
        right.set(title="what the outer loop lowers", xlabel="the start φ", ylim=(0, 2.4))
        for axes in (left, right):
            axes.grid(False)
            axes.legend()


def bowls(tasks: LinearTasks, points: Mapping[str, Tensor], rate: float) -> None:
    """Linear tasks in the plane as lines of equal loss, a panel for each of the `points` w (2,), by its name.

    From w an arrow for each task shows one gradient step, w − α Σ_t (w − w_t). Raises ValueError unless the tasks have two
    dimensions.
    """
    plane = isinstance(tasks, LinearTasks) and tasks.weights.shape[-1] == 2
    expect(plane, "LinearTasks of two dimensions", tasks)
    expect(bool(points), "points, name -> w, at least one", points)
    turn: Any = np.linspace(0, 2 * np.pi, 60)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    with figure(7.0, 3.4, ncols=len(points), **shared) as (_, axes):
        for ax, (name, at) in zip(axes[0], points.items(), strict=True):
            w = at.numpy()
            for t, (sigma, lowest) in enumerate(zip(*_arrays(tasks), strict=True)):
                values, vectors = np.linalg.eigh(sigma)
                edge = lowest[:, None] + 0.7 * vectors @ (circle / values[:, None] ** 0.5)
                colour = COLOURS[t % len(COLOURS)]
                ax.plot(*edge, color=colour, linewidth=1)
                ax.plot(*lowest, "+", color=colour, markersize=9)
                arrow(ax, tuple(w), tuple(w - rate * sigma @ (w - lowest)), colour)
            ax.plot(*w, "o", color="black")
            ax.set(title=name, xlabel="$w_1$", aspect="equal")
        axes[0, 0].set_ylabel("$w_2$")


def _arrays(tasks: LinearTasks) -> tuple[Any, Any]:
    return tasks.covariances.numpy(), tasks.weights.numpy()


def episode_and_trainings() -> None:
    """An episode as a diagram, beside one training step of MAML, of a prototypical network and of pre-training."""
    with figure(7.4, 6.4, nrows=2, ncols=2) as (_, axes):
        for ax, draw in zip(axes.flat, (_episode, _maml, _protonet, _pretraining), strict=True):
            ax.set(xlim=(0, 10), ylim=(0, 8), xticks=[], yticks=[])
            ax.grid(False)
            for side in ax.spines.values():
                side.set(visible=True, color="0.8")
            draw(ax)


def _episode(ax: Any) -> None:
    ax.set_title("An episode: one small task")
    for i in range(3):
        square(ax, (2 + 2.6 * i, 5.6), COLOURS[i + 2], str(i + 1))
        square(ax, (2 + 2.6 * i, 2.2), COLOURS[i + 2], "?")
    ax.text(5, 7.0, "support set: labels are shown", ha="center")
    ax.text(5, 3.6, "query set: labels are asked for", ha="center")
    ax.text(5, 0.6, "the classes are numbered anew\nin every episode", ha="center", color="0.35")


def _maml(ax: Any) -> None:
    ax.set_title("MAML practises steps", color=META)
    ax.plot([2], [2.2], "o", color=META, markersize=9)
    ax.plot([7.6], [5.2], "s", color=META, markersize=9)
    arrow(ax, (2, 2.2), (7.6, 5.2), META)
    arrow(ax, (7.4, 5.8), (1.7, 2.9), META, style="--", bend=0.35)
    ax.text(1.6, 1.2, "start φ", ha="center")
    ax.text(8.1, 4.3, "adapted θ", ha="center")
    ax.text(6.2, 2.7, "gradient steps\non the support set", ha="center")
    ax.text(4.6, 7.0, "the query loss at θ moves φ,\nback through the steps", ha="center")


def _protonet(ax: Any) -> None:
    ax.set_title("A prototypical network practises features", color=META)
    centres = ((2.2, 5.4), (7.6, 5.8), (5.2, 2.4))
    for i, (x, y) in enumerate(centres):
        for dx, dy in ((-0.6, -0.4), (0.5, -0.3), (0.1, 0.6)):
            ax.plot([x + dx], [y + dy], "o", color=COLOURS[i + 2], markersize=5)
        ax.plot([x], [y], "*", color=COLOURS[i + 2], markersize=14, markeredgecolor="black")
    ax.plot([6.2], [4.5], "o", color="black", markersize=6)
    arrow(ax, (6.2, 4.5), (7.4, 5.6), "black")
    ax.text(6.0, 3.75, "query", ha="center")
    ax.text(5, 7.2, "★ mean of a class's support features", ha="center")
    ax.text(5, 0.6, "the query loss moves the features", ha="center")


def _pretraining(ax: Any) -> None:
    ax.set_title("Pre-training studies all classes at once", color=TRANSFER)
    box(ax, (1.7, 5), "images of\nall classes", "0.6")
    box(ax, (5, 5), "features", TRANSFER)
    box(ax, (8.2, 5), "a head for\nall classes", "0.6")
    arrow(ax, (3.0, 5), (4.0, 5), "0.3")
    arrow(ax, (6.0, 5), (7.0, 5), "0.3")
    box(ax, (5, 2.1), "class means, a probe\nor fine-tuning", TRANSFER)
    arrow(ax, (5, 4.4), (5, 2.9), TRANSFER)
    ax.text(8.2, 3.5, "thrown away", ha="center", color="0.35")
    ax.text(5, 6.8, "no episodes in training", ha="center")
    ax.text(5, 0.5, "an episode comes afterwards", ha="center")


def two_trainings() -> None:
    """Transfer and meta-learning from the first training step to the last answer: what comes before the new task, and what after.

    Rows differ on the left, in whether a task adapts before the loss is read. On the right they are one.
    """
    with figure(7.4, 4.6, nrows=2) as (_, axes):
        for ax, colour, title in zip(
            axes,
            (TRANSFER, META),
            (
                "Transfer learning: train, then adapt",
                "Meta-learning: practise adapting, then adapt",
            ),
            strict=True,
        ):
            ax.set(xlim=(0, 10), ylim=(0, 4), xticks=[], yticks=[])
            ax.grid(False)
            ax.axvspan(0, 6, color="0.95")
            ax.set_title(title, color=colour, loc="left")  # a phone shows the left part first
            for side in ax.spines.values():
                side.set(visible=True, color="0.8")
            ax.text(3, 3.55, "before: old tasks, many labels", ha="center", color="0.35")
            ax.text(8, 3.55, "then: a new task, few labels", ha="center", color="0.35")
            _steps(ax, (6.7, 9.1), colour, "adapt", "query set:\nanswers", "0.6")
            arrow(ax, (5.5, 1.7), (6.3, 1.7), "0.3")
            ax.text(7.9, 0.3, "judged here, once", ha="center")
        _before(axes[0], TRANSFER, "θ")
        _before(axes[1], META, "φ")


def _before(ax: Any, colour: str, name: str) -> None:
    """The left half of a row: a start, what training reads, and the way back."""
    box(ax, (0.7, 1.7), f"start {name}", colour)
    if colour == META:
        _steps(ax, (2.5, 4.7), colour, "adapt", "query set:\nloss", META)
        arrow(ax, (1.3, 1.7), (2.0, 1.7), META)
        ax.text(2.7, 0.15, "the loss after adapting changes φ", ha="center")
    else:
        box(ax, (4.7, 1.7), "all tasks\nat once: loss", colour)
        arrow(ax, (1.3, 1.7), (3.8, 1.7), TRANSFER)
        ax.text(2.5, 2.0, "nothing adapts", ha="center")
        ax.text(2.7, 0.15, "the loss as it is changes θ", ha="center")
    arrow(ax, (4.5, 1.2), (0.9, 1.3), colour, style="--", bend=-0.25)


def _steps(ax: Any, at: tuple[float, float], colour: str, do: str, end: str, edge: str) -> None:
    """A box that the support set goes into, and the box of the query set behind it."""
    box(ax, (at[0], 1.7), do, colour)
    box(ax, (at[0], 2.85), "support set", "0.6")
    arrow(ax, (at[0], 2.6), (at[0], 1.95), "0.3")
    box(ax, (at[1], 1.7), end, edge)
    arrow(ax, (at[0] + 0.5, 1.7), (at[1] - 0.7, 1.7), "0.3")


def drawn_episodes(episode: Episode) -> None:
    """Few-shot episodes as pictures, a row for each task.

    Left stand the support images over their class numbers, right the query images over a question mark. `episode` has
    images x (T, N, 1, h, w), 1 is ink, and one-hot labels y (T, N, W). Raises ValueError for other shapes.
    """
    parts = (episode.support, episode.query) if isinstance(episode, Episode) else ()
    right = [p.x.ndim == 5 and p.x.shape[2] == 1 and p.y.ndim == 3 for p in parts]
    expect(
        bool(right) and all(right),
        "an Episode of images (T, N, 1, h, w), labels (T, N, W)",
        episode,
    )
    tasks, shown = len(episode.support.x), episode.support.x.shape[1]
    with figure(7.4, 1.45 * tasks, nrows=tasks, squeeze=False) as (_, axes):
        for t, ax in enumerate(axes[:, 0]):
            images = torch.cat([p.x[t, :, 0] for p in parts])
            height, width = images.shape[1:]
            numbers = [str(k + 1) for k in episode.support.y[t].argmax(1).tolist()]
            for i, image in enumerate(images):
                left = (width + 4) * i + (width if i >= shown else 0)
                where = (left, left + width, height, 0)
                ax.imshow(1 - image.cpu().numpy(), cmap="gray", vmin=0, vmax=1, extent=where)
                words = numbers[i] if i < shown else "?"
                ax.text(left + width / 2, 1.35 * height, words, ha="center", weight="bold")
            ends = (0, (width + 4) * shown), ((width + 4) * shown + width, left + width)
            for words, (a, b) in zip(("support set", "query set"), ends, strict=True):
                ax.text((a + b) / 2, -0.15 * height, words, ha="center", color="0.35")
            ax.set(
                xlim=(0, left + width), ylim=(1.45 * height, -0.5 * height), xticks=[], yticks=[]
            )
            ax.set_ylabel(f"episode {t + 1}")
            ax.grid(False)
            for side in ax.spines.values():
                side.set_visible(False)


class Shift(NamedTuple):
    """One number x and two classes at a target, and what a threshold on x gets wrong there."""

    x: Any  # (n,): a grid
    both: Any  # (2, n): the densities P(x, y) of both classes there
    best: float  # the threshold with the least error
    least: float  # its error
    carried: float  # the error of the source's threshold, 0


def three_shifts() -> dict[str, Shift]:
    """Three ways in which a target may differ from one source, exactly; the source's classes are N(∓1, 1), equally frequent.

    There P(1 | x) = σ(2x), so the best threshold is 0. *Inputs*: P(x) is N(1.5, 1), and P(y | x) as it was. *Shares*: P(x | y)
    as it was, and nine of ten are of class 1. *Rule*: P(x) as it was, and P(1 | x) = σ(2x − 3).
    """
    x: Any = np.linspace(-12, 14, 26001)
    normal = np.exp(-0.5 * (x - np.array([[-1.0], [1.0], [1.5]])) ** 2) / np.sqrt(2 * np.pi)
    source, elsewhere = 0.5 * (normal[0] + normal[1]), normal[2]
    one, other = (1 / (1 + np.exp(-(2 * x - c))) for c in (0, 3))
    kinds = {
        "inputs": elsewhere * np.stack([1 - one, one]),
        "shares": np.stack([0.1 * normal[0], 0.9 * normal[1]]),
        "rule": source * np.stack([1 - other, other]),
    }
    return {name: _judged(x, both) for name, both in kinds.items()}


def _judged(x: Any, both: Any) -> Shift:
    """The thresholds' errors: class 0 above the threshold, class 1 below it."""
    step = x[1] - x[0]
    above = both[0].sum() - np.cumsum(both[0])
    error = step * (above + np.cumsum(both[1]))
    best, zero = int(error.argmin()), int(np.abs(x).argmin())
    return Shift(x, both, float(x[best]), float(error[best]), float(error[zero]))


def shifts_drawn() -> None:
    """The targets of `three_shifts`: both classes, the source's in outline, its threshold and the best one."""
    titles = ("other inputs: P(x)", "other shares: P(y)", "another rule: P(y | x)")
    with figure(7.4, 2.6, ncols=3, sharex=True, sharey=True) as (_, axes):
        for ax, title, shift in zip(axes, titles, three_shifts().values(), strict=True):
            x = shift.x
            for k, colour in enumerate(COLOURS[2:4]):
                name = f"class {k}, target"
                ax.fill_between(x, shift.both[k], color=colour, alpha=0.4, label=name)
                source = np.exp(-0.5 * (x + 1 - 2 * k) ** 2) / np.sqrt(8 * np.pi)
                ax.plot(x, source, ":", color="0.4", label="source")
            ax.axvline(shift.best, color="0.6", linewidth=3, label="best at the target")
            ax.axvline(0, color=REFERENCE, linestyle="--", label="best at the source")
            ax.set(title=title, xlabel="x", xlim=(-4, 5), ylim=(0, 0.42), yticks=[])
            ax.grid(False)
            ax.legend()


def regions(panels: Mapping[str, tuple[Any, Any, Callable[[Tensor], Tensor]]]) -> None:
    """A plane of features for each title: support items (crosses), query items (dots), and the region of each answer.

    `panels` are title -> (support, query, rule): batches of features (N, 2) with one-hot labels, and the class numbers
    (P,) that the rule answers at points (P, 2).
    """
    with figure(7.4, 2.8, ncols=len(panels)) as (_, axes):
        for ax, (title, (support, query, rule)) in zip(np.ravel(axes), panels.items(), strict=True):
            edge = 1.15 * max(part[0].abs().max().item() for part in (support, query))
            line = torch.linspace(-edge, edge, 150)
            answer = rule(torch.cartesian_prod(line, line)).view(150, 150).T
            ax.contourf(line, line, answer, np.arange(6) - 0.5, colors=COLOURS[:5], alpha=0.18)
            for (z, y), mark, size in ((query, ".", 12), (support, "x", 30)):
                colours = [COLOURS[k] for k in y.argmax(1)]
                ax.scatter(*z.T, size, colours, marker=mark, linewidths=1.5)
            ax.set(title=title, xlabel="$z_1$", xticks=[], yticks=[])
            ax.grid(False)
        np.ravel(axes)[0].set_ylabel("$z_2$")


def alone_or_together() -> None:
    """Questions of three classes in a plane, whose labelled items are untypical, and rings around wrong answers.

    Left, nearest labelled item; middle, neighbouring questions get the same class; right, the questions of one class under
    LaplacianShot, which moves their mean onto that of the labelled items.
    """
    angles = torch.arange(3) * 2 * torch.pi / 3 + 0.5
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    aside = torch.stack([-angles.sin(), angles.cos()], 1)
    drawn = torch.randn(3, 25, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(3)
    shown = Batch(centres + 1.6 * aside, labels)
    x, y = (centres[:, None] + 0.6 * drawn).flatten(0, 1), labels.repeat_interleave(25, 0)
    halves = OrderedDict(body=nn.Identity(), head=nn.Linear(2, 3))
    plane = nn.Sequential(halves)  # z(x) = x
    tied = partial(laplacian_shot, plane, 2.0, 5, normalise=False)
    views = {
        "each alone": (protonet(plane), 75),
        "together": (tied(shift=False, rectify=False), 75),
        "together, one class": (tied(), 25),
    }
    with figure(7.4, 2.7, ncols=3, sharex=True, sharey=True) as (_, axes):
        for ax, (title, (learner, n)) in zip(axes, views.items(), strict=True):
            theta = learner.adapt(parameters(plane), shown)
            wrong = learner.predict(theta, x[:n]).argmax(1) != y[:n].argmax(1)
            for k in range(3):
                ax.plot(*x[:n][y[:n, k] == 1].T, ".", color=COLOURS[k], markersize=4)
                ax.plot(*shown.x[k], "X", color=COLOURS[k], markersize=9)
            ax.plot(*x[:n][wrong].T, "o", color=REFERENCE, fillstyle="none", markersize=7)
            ax.set(title=title, xlabel="$z_1$", aspect="equal")
        axes[0].set_ylabel("$z_2$")


def arrow(ax: Any, a: Any, b: Any, colour: str, style: str = "-", bend: float = 0.0) -> None:
    """An arrow from a to b."""
    look = {
        "arrowstyle": "-|>",
        "color": colour,
        "linestyle": style,
        "linewidth": 1.6,
        "connectionstyle": f"arc3,rad={bend}",
        "shrinkA": 5,
        "shrinkB": 5,
    }
    ax.annotate("", b, a, arrowprops=look)


def say(ax: Any, words: str, point: Any, place: Any) -> None:
    """Words at a place, and a thin line to the point they speak of."""
    line = {"arrowstyle": "-", "color": REFERENCE, "linewidth": 0.6, "shrinkB": 4}
    ax.annotate(words, point, place, arrowprops=line, fontsize=9, va="center")


def box(ax: Any, centre: Any, words: str, colour: str) -> None:
    """Words in a box."""
    ax.text(*centre, words, ha="center", va="center", fontsize=9, bbox={**BOX, "edgecolor": colour})


def square(ax: Any, centre: Any, colour: str, words: str) -> None:
    """An item of a class."""
    look = {"boxstyle": "square,pad=0.55", "facecolor": colour, "edgecolor": "none"}
    ax.text(*centre, words, ha="center", va="center", color="white", weight="bold", bbox=look)
