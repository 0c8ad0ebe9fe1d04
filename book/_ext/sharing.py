"""What a search engine and a chat window show of a page: its description, its picture, and a map of the site.

The description is the page's own question (`door.question`). Nothing here asks another host. A picture and a map need
the book's address: they are made where `html_baseurl` has one.
"""

from __future__ import annotations

import posixpath
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin
from xml.sax.saxutils import escape as escape_xml

from docutils import nodes

from door import MOST, sentences

PICTURE = "_static/result.png"  # of a page that has none of its own
PICTURE_SAYS = (
    "A new sine wave, ten points of it, and three networks after 0, 1 and 10 gradient steps."
)


def describe(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Add a page's `<meta>` tags."""
    asked = app.env.metadata.get(page, {}).get("question", "")
    if tree is None or not asked:
        return
    said = sentences(asked, MOST)
    title = app.env.titles[page].astext()
    tags = [("name", "description", said)]
    tags += [("property", "og:title", title), ("property", "og:description", said)]
    tags += [
        ("property", "og:type", "article"),
        ("property", "og:site_name", app.config.html_title),
    ]
    if base := app.config.html_baseurl:
        picture, says = shown(app, tree)
        tags += [("property", "og:url", urljoin(base, quote(f"{page}.html")))]
        tags += [("property", "og:image", urljoin(base, quote(picture)))]
        tags += [
            ("property", "og:image:alt", says),
            ("name", "twitter:card", "summary_large_image"),
        ]
    context["metatags"] = context.get("metatags", "") + "".join(
        f'\n<meta {kind}="{name}" content="{escape(text, quote=True)}" />'
        for kind, name, text in tags
    )


def shown(app: Any, tree: nodes.document) -> tuple[str, str]:
    """The first picture of a page, from the root of the site, and its text alternative."""
    written = set(app.builder.images.values())
    for image in tree.findall(nodes.image):  # whose address is by now that on the page
        name = unquote(posixpath.basename(image["uri"]))
        if name in written and image.get("alt"):
            return f"{app.builder.imagedir}/{name}", image["alt"]
    return PICTURE, PICTURE_SAYS


def list_pages(app: Any, error: Exception | None) -> None:
    """Write `sitemap.xml` and name it in `robots.txt`, if the address is known."""
    base = getattr(app.config, "html_baseurl", "")
    if error or app.builder.format != "html" or not base:
        return
    pages = [urljoin(base, quote(f"{page}.html")) for page in sorted(app.env.found_docs)]
    rows = "".join(f"<url><loc>{escape_xml(page)}</loc></url>\n" for page in pages)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    head += '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
    out = Path(app.outdir)
    (out / "sitemap.xml").write_text(f"{head}{rows}</urlset>\n", "utf8")
    (out / "robots.txt").write_text(f"Sitemap: {urljoin(base, 'sitemap.xml')}\n", "utf8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", describe)
    app.connect("build-finished", list_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
