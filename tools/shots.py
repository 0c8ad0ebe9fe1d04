"""Pictures of built pages: `python tools/shots.py FOLDER [index background ...]`.

Each page 1,280 and 390 pixels wide, light and dark, down to its end. `python tools/shots.py --readme` writes the one that
the README shows, `.github/page.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pages import ROOT, TYPESET, WIDTHS, chromium
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

BUILT = ROOT / "_build" / "html" / "book"
README = ROOT / ".github" / "page.png"


def shoot(browser: Browser, page: str, width: int, mode: str, to: Path, height: int = 0) -> None:
    """Save a picture of one page; of its first `height` pixels where that is given."""
    size = {"width": width, "height": height or 900}
    tab = browser.new_page(viewport=size, color_scheme=mode, is_mobile=width < 600)
    tab.goto((BUILT / f"{page}.html").as_uri())
    tab.evaluate(TYPESET)
    tab.screenshot(path=str(to), full_page=not height)
    tab.close()


def main(arguments: list[str]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        if arguments == ["--readme"]:
            shoot(browser, "concepts", WIDTHS[0], "light", README, height=1060)
            Image.open(README).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(
                README, optimize=True
            )
            print(f"{README.relative_to(ROOT)}: {README.stat().st_size // 1000} kB")
            return
        folder, pages = Path(arguments[0]), arguments[1:] or ["index"]
        folder.mkdir(parents=True, exist_ok=True)
        for page in pages:
            for width in WIDTHS:
                for mode in ("light", "dark"):
                    shoot(browser, page, width, mode, folder / f"{page}-{width}-{mode}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
