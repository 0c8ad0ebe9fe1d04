"""What is mended in the theme's HTML, and what is left of its pictures."""

from __future__ import annotations

import importlib.util

from machine import ROOT

spec = importlib.util.spec_from_file_location("mended", ROOT / "book" / "_ext" / "mended.py")
mended = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mended)


def same(text: str, page: str = "book/a") -> str:
    """A page mended; mending it again changes nothing."""
    better = mended.mended(text, page)
    assert mended.mended(better, page) == better
    return better


def test_what_opens_has_a_name():
    menu = (
        '<a class="reference internal" href="a.html">A &amp; <code>b</code></a><details><summary>'
    )
    assert same(menu).endswith('<details><summary aria-label="Pages below A &amp; b">')
    here = menu.replace("reference", "current reference").replace(
        "<details>", '<details open="open">'
    )
    assert 'open="open"><summary aria-label="Pages below A' in same(here)
    assert same('<summary aria-label="Toggle hidden content">x') == "<summary>x"
    assert same('<summary aria-label="Another">x') == '<summary aria-label="Another">x'
    button = '<button class="btn search-button-field" title="Search" aria-label="Search" a="b">'
    assert same(button) == '<button class="btn search-button-field" title="Search" a="b">'


def test_lists_and_tables_say_what_they_are():
    listed = '<dl>\n<dd><em class="sig-param">x</em></dd></dl><dl><dt>a</dt><dd>b</dd></dl>'
    assert same(listed) == listed.replace("<dl>", '<dl role="presentation">', 1)
    entries = '<div role="list" class="citation-list"><div class="citation" id="a" role="doc-biblioentry">'
    assert same(entries) == '<div class="citation-list"><div class="citation" id="a">'
    row = '<tr><th class="head"><p></p></th><th class="head"><p>a</p></th><th></th></tr><thead><tr>'
    assert same(row) == (
        '<tr><td class="head"><p></p></td><th class="head"><p>a</p></th><td></td></tr><thead><tr>'
    )


def test_only_the_page_that_searches_loads_the_index():
    scripts = '<script src="../_static/searchtools.js?v=1"></script>\n<script src="../searchindex.js"></script>'
    kept = '<script src="../_static/doctools.js"></script>'
    assert same(scripts + kept) == kept
    assert same(scripts + kept, "search") == scripts + kept


def test_pictures_in_use_stay():
    icons = 'a={"sun":[1,2,[],"f1","M0"],moon:[1,2,["luna",8],"f2",["M1","M2"]],"star":[1,2,[],"f3","M3"]}'
    assert mended.lean(icons, {"sun", "luna"}) == (
        'a={"sun":[1,2,[],"f1","M0"],moon:[1,2,["luna",8],"f2",["M1","M2"]],}'
    )
    assert mended.lean("written otherwise", {"sun"}) == "written otherwise"
