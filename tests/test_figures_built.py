"""The figures that answer the hand, on the built pages in a browser, by keyboard alone. Run `make book` first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, Tab, sideways
from playwright.sync_api import Browser, Locator

WHERE = {"sliders": "background", "matrix": "meta_or_transfer", "path": "meta_or_transfer"}
MOST = 300_000  # bytes that the figures of a page may take

# Parts of a figure whose words, or lines, are too near to what they stand on: [what, contrast].
FAINT = r"""
(kind) => {
  const root = document.querySelector(`.mtlib-hand[data-kind=${kind}]`);
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const c of colours) { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const below = [];
    for (let at = e; at; at = at.parentElement) below.unshift(getComputedStyle(at).backgroundColor);
    return ["#fff", ...below];
  };
  const found = [];
  const judge = (what, colour, e, least) => {
    const [a, b] = [light(over([...ground(e), colour])), light(over(ground(e)))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < least) found.push([what, Number(contrast.toFixed(2))]);
  };
  for (const e of root.querySelectorAll("*")) {
    if (!e.checkVisibility() || e.closest("script, style, :disabled, .hand-heard")) continue;
    const words = [...e.childNodes].some((n) => n.nodeType == 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    if (words) judge(e.textContent.trim().slice(0, 40), e.closest("svg") ? style.fill : style.color, e, 4.5);
    if (e.matches(".hand-curve")) judge("a curve", style.stroke, e, 3);
    if (e.matches(".hand-mark.box")) judge("a mark", style.backgroundColor, e.parentElement, 3);
  }
  return found;
}
"""


def shown(on: Tab, site: str, kind: str) -> tuple[Locator, dict[str, Any]]:
    """The figure on its page, and the numbers that it holds."""
    on.open(f"{site}/book/{WHERE[kind]}.html")
    root = on.page.locator(f".mtlib-hand[data-kind={kind}]")
    assert root.count() == 1
    return root, json.loads(root.locator("script[type='application/json']").text_content() or "")


def press(on: Tab, *keys: str) -> None:
    for key in keys:
        on.page.keyboard.press(key)


def focused(on: Tab) -> str:
    return str(on.run("document.activeElement.textContent"))


# Sliders ---------------------------------------------------------------------------------------


def drawn(root: Locator, data: dict[str, Any]) -> list[list[float]]:
    """The y of each network's curve, read off the drawing by the support points, whose y is known."""
    marks = [float(c.get_attribute("cy") or "") for c in root.locator("circle").all()]
    known = data["points"]["y"]
    low, high = known.index(min(known)), known.index(max(known))
    slope = (known[high] - known[low]) / (marks[high] - marks[low])
    curves = []
    for curve in root.locator("path.hand-curve").all():
        points = (curve.get_attribute("d") or "").replace("M", "L").split("L")[1:]
        pixels = [float(p.split(",")[1]) for p in points]
        curves.append([known[low] + slope * (y - marks[low]) for y in pixels])
    return curves


def check_sliders(root: Locator, data: dict[str, Any], rate: int, step: int) -> None:
    """What is drawn, said and told to a screen reader at one place of the two sliders."""
    wanted = [[y for y in way["curves"][rate][step] if y is not None] for way in data["ways"]]
    for here, there in zip(drawn(root, data), wanted, strict=True):
        assert here == pytest.approx(there, abs=0.05)
    said = root.locator("[role=status]").text_content() or ""
    errors = [way["errors"][rate][step] for way in data["ways"]]
    for way, error in zip(data["ways"], errors, strict=True):
        assert f"{way['name']} {data['beyond'] if error is None else f'{error:.2f}'}" in said
    for axis, at, control in zip(
        data["axes"], (rate, step), root.locator("input[type=range]").all(), strict=True
    ):
        assert f"{axis['name']} {axis['values'][at]}" in said
        assert control.get_attribute("aria-valuetext") == axis["values"][at]


def test_the_sliders_move_by_keyboard(site: str, tab: Tab):
    root, data = shown(tab, site, "sliders")
    rates, steps = (len(axis["values"]) - 1 for axis in data["axes"])
    rate, step = data["start"]
    check_sliders(root, data, rate, step)
    asked: list[str] = []
    tab.page.on("request", lambda r: asked.append(r.url))
    root.get_by_role("slider", name="inner rate").focus()
    press(tab, "ArrowRight")
    check_sliders(root, data, rate + 1, step)
    press(tab, "End")
    check_sliders(root, data, rates, step)
    press(tab, "Tab")  # to the other slider
    press(tab, "End")
    check_sliders(root, data, rates, steps)
    press(tab, "ArrowLeft", "ArrowLeft")
    check_sliders(root, data, rates, steps - 2)
    press(tab, "Home", "Shift+Tab", "Home")
    check_sliders(root, data, 0, 0)
    assert not asked and tab.faults == []


def test_curves_differ_and_the_picture_has_words(site: str, tab: Tab):
    root, data = shown(tab, site, "sliders")
    first = root.locator("path.hand-curve").first.get_attribute("d")
    root.get_by_role("slider", name="gradient steps").focus()
    press(tab, "ArrowRight", "ArrowRight")
    assert root.locator("path.hand-curve").first.get_attribute("d") != first
    assert root.locator("svg[role=img]").get_attribute("aria-label") == data["alt"]


def test_curves_differ_in_print_without_colours(site: str, tab: Tab):
    """And each line of the key is dashed as its curve."""
    root, data = shown(tab, site, "sliders")
    dashes = "all => all.map(e => e.getAttribute('stroke-dasharray'))"
    drawn = root.locator("path.hand-curve").evaluate_all(dashes)
    assert len({*drawn}) == len(drawn) == len(data["ways"])
    assert root.locator("svg.hand-line line").evaluate_all(dashes)[1:] == drawn


# The matrix ------------------------------------------------------------------------------------


def test_the_matrix_changes_by_keyboard(site: str, tab: Tab):
    root, data = shown(tab, site, "matrix")
    live = root.locator(".hand-live")
    for i, level in enumerate(data["levels"]):
        if i:
            press(tab, "ArrowRight")
        else:
            live.get_by_role("radio").first.focus()
        assert live.get_by_role("radio", name=level["name"], exact=True).is_checked()
        caption = live.locator("caption").text_content() or ""
        assert caption == f"{data['measure']}, {data['axis']}: {level['name']}"
        rows = live.locator("tbody tr").all()
        assert [(r.locator("th").text_content() or "").strip() for r in rows] == [
            r["name"] for r in data["rows"]
        ]
        for row, cells in zip(rows, level["cells"], strict=True):
            for td, cell in zip(row.locator("td").all(), cells, strict=True):
                assert td.text_content() == f"{cell['text']} {cell['half']}".strip()
                assert td.get_attribute("class") == cell["is"]
        assert live.locator("[role=status]").text_content() == level["said"]
    assert tab.faults == []


# The path --------------------------------------------------------------------------------------


def ends(node: dict[str, Any], taken: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if "page" in node:
        return [(taken, node)]
    return [e for answer in ("yes", "no") for e in ends(node[answer], (*taken, answer))]


def test_each_end_of_the_path_is_reached_by_keyboard(site: str, built: Path, tab: Tab):
    root, data = shown(tab, site, "path")
    live = root.locator(".hand-live")
    live.get_by_role("button", name="Yes").focus()
    for taken, end in ends(data["root"]):
        for answer in taken:
            if focused(tab).lower() != answer:
                press(tab, "Tab" if answer == "no" else "Shift+Tab")
            assert focused(tab).lower() == answer
            press(tab, "Enter")
        assert focused(tab) == end["title"]
        assert end["text"] in (live.locator(".hand-now").text_content() or "")
        answers = live.locator(".hand-asked li strong").all_text_contents()
        assert [a.lower() for a in answers] == [*taken]
        file, _, section = (live.locator("a").get_attribute("href") or "").partition("#")
        page = built / "book" / file
        assert file == f"{end['page']}.html" and page.is_file()
        assert section == end["section"]
        assert not section or f'id="{section}"' in page.read_text("utf8")
        press(tab, "Tab", "Tab", "Enter")  # behind the link: back, start again
        assert focused(tab) == "Yes" and not live.locator(".hand-asked li").count()
    assert tab.faults == []


def test_a_step_back_keeps_the_rest_of_the_path(site: str, tab: Tab):
    root, data = shown(tab, site, "path")
    live = root.locator(".hand-live")
    live.get_by_role("button", name="Yes").focus()
    press(tab, "Enter", "Tab", "Enter")
    assert live.locator("a").is_visible()
    press(tab, "Tab", "Enter")
    assert focused(tab) == "Back" and not live.locator("a").is_visible()
    assert live.locator(".hand-now p").text_content() == data["root"]["yes"]["text"]
    press(tab, "Enter")
    assert focused(tab) == "Yes"
    assert live.locator(".hand-now p").text_content() == data["root"]["text"]


# All three -------------------------------------------------------------------------------------


def words(kind: str, data: dict[str, Any]) -> list[str]:
    """What the text of a figure has to say."""
    if kind == "sliders":
        return [*data["axes"][0]["values"], *(way["name"] for way in data["ways"])]
    if kind == "matrix":
        cells = [c["text"] for level in data["levels"] for row in level["cells"] for c in row]
        return [*cells, *(level["plain"] for level in data["levels"])]
    return [end[key] for _, end in ends(data["root"]) for key in ("text", "title")]


@pytest.mark.parametrize("kind", WHERE)
def test_its_text_opens_by_keyboard(kind: str, site: str, tab: Tab):
    root, data = shown(tab, site, kind)
    plain, button = root.locator(".hand-plain"), root.locator(".hand-plain-button")
    assert not plain.is_visible() and button.get_attribute("aria-expanded") == "false"
    button.focus()
    press(tab, "Enter")
    assert plain.is_visible() and button.get_attribute("aria-expanded") == "true"
    text = plain.inner_text()
    assert not [w for w in words(kind, data) if w not in text]
    press(tab, "Enter")
    assert not plain.is_visible()


@pytest.mark.parametrize("kind", WHERE)
def test_without_a_script_the_text_stands(kind: str, site: str, browser: Browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"{site}/book/{WHERE[kind]}.html")
    root = page.locator(f".mtlib-hand[data-kind={kind}]")
    data = json.loads(root.locator("script[type='application/json']").text_content() or "")
    text = root.locator(".hand-plain").inner_text()
    assert not [w for w in words(kind, data) if w not in text]
    assert root.locator(".hand-live").inner_text() == ""
    page.close()


@pytest.mark.parametrize("kind", WHERE)
def test_it_fits_a_phone(kind: str, site: str, phone: Tab):
    root, _ = shown(phone, site, kind)
    root.locator(".hand-plain-button").click()
    right = phone.run(
        f"Math.max(...[...document.querySelectorAll('.mtlib-hand[data-kind={kind}] *')]"
        ".filter(e => e.checkVisibility() && !e.closest('svg svg, .hand-heard'))"
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert right <= PHONE
    assert phone.run("document.documentElement.scrollWidth") <= PHONE


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", WHERE)
def test_words_and_lines_stand_out(kind: str, theme: str, site: str, tab: Tab):
    root, _ = shown(tab, site, kind)
    root.locator(".hand-plain-button").click()
    tab.run(f"document.documentElement.dataset.theme = '{theme}'")
    tab.page.wait_for_timeout(300)  # a cell's colour takes its time
    assert tab.page.evaluate(FAINT, kind) == []


def test_what_is_faint_is_found_out(site: str, tab: Tab):
    root, _ = shown(tab, site, "path")
    root.evaluate("e => e.style.color = '#aaaaaa'")
    tab.run("document.documentElement.dataset.theme = 'light'")
    assert tab.page.evaluate(FAINT, "path")


@pytest.mark.parametrize("kind", WHERE)
def test_on_paper_it_is_its_text(kind: str, site: str, browser: Browser):
    paper = Tab(browser, 718)
    paper.page.emulate_media(media="print")
    root, data = shown(paper, site, kind)
    text = root.locator(".hand-plain").inner_text()
    assert not [w for w in words(kind, data) if w not in text]
    assert not root.locator("button:visible, input:visible").count()
    assert root.locator(".hand-live").is_visible() == (kind == "sliders")
    assert [s for s in sideways(paper) if "table" in s or "page" in s] == []
    paper.page.close()


def test_nothing_moves_where_less_motion_is_wanted(site: str, browser: Browser):
    for motion, time in (("reduce", "0s"), ("no-preference", "0.2s")):
        still = Tab(browser, 1280)
        still.page.emulate_media(reduced_motion=motion)
        root, _ = shown(still, site, "matrix")
        cell = root.locator(".hand-live td").first
        assert cell.evaluate("e => getComputedStyle(e).transitionDuration") == time
        still.page.close()


@pytest.mark.parametrize("page", sorted(set(WHERE.values())))
def test_the_figures_of_a_page_are_small(page: str, site: str, tab: Tab):
    tab.open(f"{site}/book/{page}.html")
    sizes = tab.run(
        "[...document.querySelectorAll('.mtlib-hand')].map(e => new Blob([e.outerHTML]).size)"
    )
    assert sizes and sum(sizes) <= MOST
