"""Leave out sphinx-thebe's scripts and styles: Jupyter Book puts them, unused, on every page.

One of them stands there twice and declares a constant, which is an error in the browser's console.
"""

from __future__ import annotations

from typing import Any


def leave_out(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if "thebe" not in text(file)]


def text(file: Any) -> str:
    return f"{getattr(file, 'filename', file)} {getattr(file, 'attributes', {}).get('body', '')}".lower()


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", leave_out, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
