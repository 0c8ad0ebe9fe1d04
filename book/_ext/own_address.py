"""The book's own address, which its remote knows: for buttons, links and commands. No file of the repository changes.

Where `tools/address.py` knows none, what could only lead nowhere is left out: the buttons to the repository, to Colab,
to edit a page and to report an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import address  # noqa: E402

BRANCH = "notebooks"  # of the repository, with the notebooks that the build makes
TO_REPOSITORY = ("use_repository_button", "use_edit_page_button", "use_issues_button")


def set_options(app: Any, config: Any) -> None:
    """The theme's buttons, and the published book's address, which its notebooks link to."""
    own, options = address.known(ROOT), config.html_theme_options
    config.own_address = own or ""
    launch = dict(options.get("launch_buttons", {}))
    if not (own or "").startswith("https://github.com/"):
        launch.pop("colab_url", None)  # Colab opens GitHub's notebooks alone
    here = {"repository_url": own} if own else dict.fromkeys(TO_REPOSITORY, False)
    config.html_theme_options = {**options, **here, "launch_buttons": launch}
    if not own:
        config.html_theme_options.pop("repository_url", None)
    config.html_baseurl = config.html_baseurl or address.published(own)


def written(text: str, own: str) -> str:
    """A page's text with the own address. Where there is none its reader has a copy, and need not fetch one."""
    old = address.address(ROOT)
    if not own:
        text = re.sub(rf"git clone {re.escape(old)}(?:\.git)? [\w-]+ && ", "", text)
    return text.replace(old, own or "ADDRESS")


def read(app: Any, page: str, source: list[str]) -> None:
    if not app.env.doc2path(page).endswith(".ipynb"):
        source[0] = written(source[0], app.config.own_address)


def lead_to_notebooks(
    app: Any, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Colab opens the notebook that the build made of a page, on a branch of its own."""
    for button in context.get("header_buttons", ()):
        for link in button.get("buttons", ()):
            if "colab" in link.get("url", ""):
                link["url"] = re.sub(r"/blob/[^/]+/", f"/blob/{BRANCH}/", link["url"])


def sources(app: Any, problem: Exception | None) -> None:
    """The sources of pages of words, which a button downloads, have the own address, too."""
    for path in Path(app.outdir).glob("_sources/**/*.md"):
        text = path.read_text("utf8")
        if (new := written(text, app.config.own_address)) != text:
            path.write_text(new, "utf8")


def setup(app: Any) -> dict[str, bool]:
    app.add_config_value("own_address", "", "env", str)
    app.connect("config-inited", set_options)
    app.connect("source-read", read)
    app.connect("html-page-context", lead_to_notebooks, priority=900)
    app.connect("build-finished", sources)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
