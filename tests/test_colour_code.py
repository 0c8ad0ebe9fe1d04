"""The book's figures: one colour code, legends off the curves, drawings that compute what they show; equations that are stated."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_curve

from mtlib.book.drawings import alone_or_together, bowls, episode_and_trainings, two_losses
from mtlib.book.page import equal, recorded_claim
from mtlib.book.results import recorded, recorded_pages
from mtlib.data.linear import exact_stream, linear_tasks
from mtlib.evaluate import interval
from mtlib.plots import (
    BASELINE,
    BLUES,
    GREYS,
    LINES,
    MARKERS,
    META,
    ORANGES,
    TRANSFER,
    against,
    by_group,
    calibration,
    confusion,
    curves,
    decision,
    dots,
    figure,
    framed,
    lines,
    losses,
    reference,
    roc,
    scores,
    style,
    styles,
)
from mtlib.train import Run

mpl.use("Agg")


def score(mean):
    return interval(torch.tensor([mean - 0.1, mean, mean + 0.1]))


@pytest.mark.parametrize(
    ("name", "shades"),
    [
        *(
            (name, BLUES)
            for name in ("meta-learned", "MAML, 10 steps", "First-order MAML", "iMAML")
        ),
        *((name, BLUES) for name in ("ProtoNet, 50 labels", "R2-D2", "Reptile", "ANIL")),
        *((name, ORANGES) for name in ("transferred", "pre-training + class means", "joint")),
        *((name, ORANGES) for name in ("pre-training + fine-tuning", "fine-tuning, 5 steps")),
        ("pre-training, then ProtoNet", BLUES),
        ("cosine head + cosine class means", ORANGES),
        *((name, GREYS) for name in ("from scratch", "fine-tuning from scratch", "source only")),
    ],
)
def test_a_methods_family_has_its_colour(name, shades):
    assert style(name)["color"] in shades
    assert style(name) == style(name + ", 20 labels")


def test_the_colours_say_what_the_records_say():
    """A method that has a colour has that of its kind, in every record."""
    families = {"meta": BLUES, "transfer": ORANGES, "baseline": GREYS}
    entries = [e for page in recorded_pages() for e in recorded(page).entries]
    assert len(entries) > 100
    wrong = {
        e.method for e in entries if style(e.method).get("color", "") not in (*families[e.kind], "")
    }
    assert not wrong


def test_the_longest_beginning_decides():
    assert style("MAML") != style("first-order MAML") != style("ProtoMAML")
    assert (
        style("fine-tuning")["color"] == style("pre-training + fine-tuning")["color"] == ORANGES[2]
    )
    assert style("pre-training + class means")["color"] == style("class means")["color"] == TRANSFER
    assert "color" not in style("noise 0.5")


def test_no_two_of_one_figure_look_alike():
    names = [f"MAML, {k} steps" for k in range(9)] + ["from scratch", "noise", "more noise", "ANIL"]
    found = styles(names)
    assert list(found) == names and len({tuple(s.values()) for s in found.values()}) == len(names)
    assert all(found[n]["color"] == META for n in names[:9])
    assert found["noise"]["color"] not in (*BLUES, *ORANGES, *GREYS)


def test_curves_follow_the_code_and_their_legend_lies_below(shown):
    with figure(ncols=2) as (_, (left, right)):
        against(left, [1, 2], {"MAML": [score(1.0)] * 2, "transferred": [score(2.0)] * 2}, "x", "y")
        runs = {"MAML": Run({}, [1.0, 2.0, 3.0], 1.0), "from scratch": Run({}, [1.0, 2.0], 1.0)}
        losses(right, runs)
        reference(right, 1.5, "best possible")
        right.legend()
    fig = shown[0]
    colours = [line.get_color() for ax in (left, right) for line in ax.get_lines()]
    assert colours == [META, TRANSFER, META, BASELINE, "#000000"]
    fig.canvas.draw()
    [legend] = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "MAML" and {"transferred", "from scratch", "best possible"} <= set(names)
    below = legend.get_window_extent().y1
    assert all(
        below < ax.get_window_extent().y0 and ax.get_legend() is None for ax in (left, right)
    )
    assert legend.get_window_extent().width <= fig.bbox.width


def test_lines_follow_the_code(shown):
    with figure() as (fig, axes):
        lines(
            axes,
            (0.1, 1.0),
            {"MAML": [1, 2], "joint training": torch.ones(2)},
            "x",
            "y",
            xscale="log",
        )
    meta, joint = axes.get_lines()
    assert [meta.get_color(), joint.get_color()] == [META, ORANGES[3]]
    assert list(meta.get_ydata()) == [1, 2] and axes.get_xscale() == "log"
    assert len(fig.legends) == 1 and axes.get_legend() is None


MIXED = (
    "MAML",
    "transferred",
    "from scratch",
    "noise",
    "ProtoNet",
    "joint",
    "source only",
    "no norm, all",
    "R2-D2",
)


def family(colour):
    return next((f for f in (BLUES, ORANGES, GREYS) if colour in f), colour)


def alike(axes):
    """Pairs of named curves of two families, or of no family, that print in grey makes one."""
    named = [c for c in axes.containers if hasattr(c, "has_xerr")]
    shown = [(c.get_label(), c[0]) for c in named] + [(x.get_label(), x) for x in axes.get_lines()]
    looks = [
        (
            name,
            (
                line.get_linestyle(),
                str(line._unscaled_dash_pattern),
                line.get_marker(),
                line.get_fillstyle(),
            ),
            family(line.get_color()),
        )
        for name, line in shown
        if not str(name).startswith("_")
    ]
    return {
        (a, b) for a, look, of in looks for b, other, of_b in looks if look == other and of != of_b
    }


@pytest.mark.parametrize(
    "drawn", ["lines", "curves", "against", "losses", "by_group", "calibration", "decision"]
)
def test_families_differ_in_print_without_colours(shown, drawn):
    """Curves of two families have other dashes and another marker, in whatever draws methods by name."""
    x, rng = np.arange(20), np.random.default_rng(0)
    rows = {name: rng.random(20) for name in MIXED}
    y = rng.integers(0, 2, 20)
    with figure() as (_, axes):
        match drawn:
            case "lines":
                lines(axes, x, rows, "x", "y")
            case "curves":
                curves(axes, {k: (x, v) for k, v in rows.items()}, "x", "y")
            case "against":
                against(axes, x, {k: [score(r) for r in v] for k, v in rows.items()}, "x", "y")
            case "losses":
                losses(axes, {k: Run({}, [*v], 1.0) for k, v in rows.items()})
            case "by_group":
                by_group(axes, rows, [*map(str, x)], "x")
            case "calibration":
                calibration(axes, rows, y)
            case "decision":
                decision(axes, rows, y)
    [axes] = shown[0].axes
    assert len([x for x in axes.get_lines() if x.get_label() in rows]) == len(MIXED)
    assert not alike(axes)
    assert all(len(x.get_marker()) for x in axes.get_lines() if x.get_label() in rows)


def test_no_marker_and_no_dash_is_of_two_families():
    every = [mark for family in MARKERS.values() for mark in family]
    assert len({*every}) == len(every) >= 4 * 5
    assert len({*map(str, LINES.values())}) == 4 and "--" not in LINES.values()  # the reference's


def test_curves_drawn_by_hand_get_the_dashes_of_their_family(shown):
    with figure() as (_, axes):
        for colour in (META, TRANSFER, BASELINE, "#009e73"):
            axes.plot([0, 1], [0, 1], color=colour, label=colour)
            axes.errorbar([0, 1], [1, 2], yerr=0.1, color=colour, label=f"{colour}, bars")
        axes.plot([0, 1], [0, 2], ":", color=TRANSFER, label="chosen by hand")
        axes.plot([0, 1], [0, 2], color=TRANSFER)
        axes.legend()
    [axes] = shown[0].axes
    one = {x.get_label(): x._unscaled_dash_pattern for x in axes.get_lines()[:-1]}
    two = {c.get_label(): c[0]._unscaled_dash_pattern for c in axes.containers}
    by_hand = one.pop("chosen by hand")
    one = {k: v for k, v in one.items() if not k.startswith("_")}
    assert len({*one.values()}) == 4 and by_hand == one[BASELINE]  # it stays as it was drawn
    assert [*one.values()] == [*two.values()]
    [legend] = shown[0].legends
    told = [x._unscaled_dash_pattern for x in legend.findobj(Line2D) if x.get_linestyle() != "None"]
    assert all(told.count(dash) >= 2 for dash in one.values())
    assert axes.get_lines()[-1].get_linestyle() == "-"  # what has no name stays


def test_dots_show_every_run_and_the_mean(shown):
    rows = {"above": [[1.0, 2.0], [3.0, 6.0]], "below": torch.zeros(1, 2)}
    with figure() as (fig, axes):
        dots(axes, rows, ["x", "y"], "%")
    points = [line for line in axes.get_lines() if line.get_marker() != "|"]
    assert {line.get_marker() for line in points} == {".", "^"} and not alike(axes)
    assert sorted(v for line in points for v in line.get_xdata()) == [0, 0, 1, 2, 3, 6]
    height = {
        t.get_text(): y for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
    }
    assert height["above"] > height["below"]
    bars = {
        round(line.get_ydata()[0]): line.get_xdata()[0]
        for line in axes.get_lines()
        if line.get_marker() == "|"
    }
    assert bars == {height["above"]: 3.0, height["below"]: 0.0}
    assert len(fig.legends) == 1


def test_roc_curves_are_scikit_learns_with_their_mean(shown):
    rng = np.random.default_rng(0)
    inside = np.arange(90) < 40
    values = rng.normal(size=(3, 90)) + inside
    values[1] = np.round(values[1])  # ties
    with figure() as (_, axes):
        roc(axes, inside, values)
    found = [line.get_ydata() / 100 for line in axes.get_lines()]
    grid = np.linspace(0, 1, 201)
    for row, curve in zip(values, found[:3], strict=True):
        wrong, fine, _ = roc_curve(inside, row, drop_intermediate=False)
        assert np.allclose(curve, np.interp(grid, wrong, fine))
    assert np.allclose(found[3], np.mean(found[:3], 0))


def test_a_confusion_matrix_counts_answers_by_class(shown):
    y, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 2, 2, 1, 2])
    with figure() as (_, axes):
        confusion(axes, y, predicted, "abc")
    found = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert found == {(0, 0): "1", (0, 2): "2", (1, 1): "1", (2, 2): "1"}
    np.testing.assert_allclose(axes.images[0].get_array()[0], [1 / 3, 0, 2 / 3])


def test_calibration_curves_are_those_of_scikit_learn(shown):
    rng = np.random.default_rng(0)
    risk = rng.random(50)
    y = (rng.random(50) < risk).astype(int)
    with figure() as (_, axes):
        calibration(axes, {"source only": risk, "in the large": risk**2}, y)
    one, other, true = axes.get_lines()
    share, mean = calibration_curve(y, risk, n_bins=5, strategy="quantile")
    np.testing.assert_allclose(one.get_data(), [mean, share])
    assert [one.get_color(), other.get_color()] == [GREYS[1], ORANGES[1]]
    assert true.get_linestyle() == "--"


def test_decision_curves_count_true_and_false_positives(shown):
    rng = np.random.default_rng(1)
    risk = rng.random(60).round(2)
    y, at = (rng.random(60) < 0.4).astype(int), (0.1, 0.35, 0.8)
    with figure() as (_, axes):
        decision(axes, {"source only": risk}, y, at)
    model, everyone, nobody = axes.get_lines()
    for t, told, all_of_them in zip(at, model.get_ydata(), everyone.get_ydata(), strict=True):
        (_, fp), (_, tp) = confusion_matrix(y, risk >= t)
        assert told == pytest.approx(tp / 60 - fp / 60 * t / (1 - t))
        assert all_of_them == pytest.approx(y.mean() - (1 - y.mean()) * t / (1 - t))
    assert set(nobody.get_ydata()) == {0}


def test_one_name_with_two_looks_keeps_its_legends(shown):
    with figure(ncols=2) as (_, axes):
        for ax, colour in zip(axes, ("red", "green"), strict=True):
            ax.plot([0, 1], color=colour, label="a line")
            ax.legend()
    assert not shown[0].legends and all(ax.get_legend() for ax in axes)


def test_scores_have_the_colours_of_their_families(shown):
    with figure() as (_, axes):
        scores(axes, {"MAML": score(0.9), "from scratch": score(0.5), "other": score(0.6)}, "%")
    found = [c[0].get_color() for c in axes.containers]
    assert found == [BASELINE, "#000000", META]


def test_two_losses_shows_what_it_says(shown):
    """The step is φ − α∇L^S(φ); the two objectives' curves have their minima where calculus has them."""
    two_losses(rate=0.35, start=-1.6)
    left, right = shown[0].axes
    (step,) = [line for line in left.get_lines() if line.get_marker() == "o"]
    assert step.get_xdata()[1] == pytest.approx(-1.6 - 0.35 * (-1.6 - 1.0))
    tops = [line.get_xdata()[0] for line in right.get_lines() if line.get_marker() == "o"]
    tasks = ((0.4, 1.6), (2.5, -0.6))
    for at, keep in zip(tops, (lambda a: a, lambda a: a * (1 - 0.35 * a) ** 2), strict=True):
        weights = np.array([keep(a) for a, _ in tasks])
        best = (weights * [c for _, c in tasks]).sum() / weights.sum()
        assert at == pytest.approx(best, abs=0.02)


def test_bowls_have_arrows_where_a_gradient_step_ends(shown):
    """Each line of equal loss has one loss; each arrow ends where autograd's step does."""
    plane, w = linear_tasks(4, dims=2, seed=0), torch.tensor([0.3, -0.2], dtype=torch.float64)
    bowls(plane, {"here": w, "there": -w}, rate=0.5)
    ax, _ = shown[0].axes
    episode = exact_stream(plane)(0)
    edges = [line for line in ax.get_lines() if len(line.get_xdata()) == 60]
    ends = [text.xy for text in ax.texts]
    assert len(edges) == len(ends) == 4
    for t, (edge, end) in enumerate(zip(edges, ends, strict=True)):
        x, y = (part[t] for part in episode.support)
        off = torch.from_numpy(np.array(edge.get_data())) - plane.weights[t][:, None]
        level = ((x @ off) ** 2).mean(0)
        assert (level - level[0]).abs().max() <= 1e-9
        v = w.clone().requires_grad_()
        (0.5 * ((x @ v[:, None] - y) ** 2).mean()).backward()
        assert np.allclose(end, (w - 0.5 * v.grad).numpy(), atol=1e-12)


def test_the_episode_has_four_panels(shown):
    episode_and_trainings()
    assert len(shown[0].axes) == 4 and all(ax.get_title() for ax in shown[0].axes)


def test_questions_together_are_answered_better_and_those_of_one_class_worse(shown):
    alone_or_together()
    rings = [
        len(next(line for line in ax.get_lines() if line.get_marker() == "o").get_xdata())
        for ax in shown[0].axes
    ]
    assert rings[1] < rings[0] / 3 and rings[0] / 75 < 0.2 < 0.4 < rings[2] / 25


# Equations that a page states ---------------------------------------------------------------------


def test_equal_states_what_holds(capsys):
    a = {"w": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.float64)}
    equal("a nest and itself", a, {k: v.clone() for k, v in reversed(a.items())}, 0)
    equal("numbers", 1.0, 1.0 + 1e-14)
    equal("something near 0", 1e-13, 0.0)
    assert capsys.readouterr().out.splitlines() == [
        "checked to the last bit: a nest and itself",
        "checked to 1e-12: numbers",
        "checked to 1e-12: something near 0",
    ]


@pytest.mark.parametrize(
    ("left", "right", "error"),
    [
        (1.0, 1.0 + 1e-11, AssertionError),
        (float("nan"), float("nan"), AssertionError),
        (float("inf"), float("inf"), AssertionError),
        (torch.ones(2), torch.ones(2, 1), ValueError),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, ValueError),
        (1e-11, 0.0, AssertionError),
        (torch.tensor([1j]), torch.tensor([1j]), TypeError),
        (1j, 1j, TypeError),
    ],
)
def test_equal_stops_the_page(left, right, error):
    with pytest.raises(error):
        equal("no equation", left, right)


def test_a_claim_of_the_record_is_judged_at_any_scale(monkeypatch, capsys):
    monkeypatch.setenv("MTLIB_SCALE", "small")
    recorded_claim("it holds", torch.tensor(True))
    assert capsys.readouterr().out == "holds in the record: it holds\n"
    with pytest.raises(AssertionError, match="in the record: it fails"):
        recorded_claim("it fails", False)
    with pytest.raises(TypeError):
        recorded_claim("no truth value", "yes")


def test_a_name_begins_with_whole_words():
    assert style("feature pull")["color"] in ORANGES and style("FEAT, 5 labels")["color"] in BLUES
    assert "color" not in style("features alone") and "color" not in style("poolers")


def test_boxes_and_curves_of_their_own_x(shown):
    with figure(ncols=2) as (_, (left, right)):
        framed(left, torch.zeros(3, 8, 8), [[1, 1, 4, 5], [2, 2, 6, 6]], [0, 0], ["cell"])
        curves(right, {"MAML": ([0, 1, 2], [1, 2, 3]), "joint": (range(20), range(20))}, "x", "y")
    boxes, (one, other) = left.get_lines(), right.get_lines()
    assert boxes[0].get_label() == "cell" and len(boxes) == 2
    assert boxes[0].get_xdata().tolist() == [1, 4, 4, 1, 1]
    assert one.get_color() == META
    assert [len(line.get_xdata()[:: line.get_markevery()]) <= 10 for line in (one, other)]
