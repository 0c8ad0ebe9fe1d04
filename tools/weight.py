"""What a page of the built book weighs: `python tools/weight.py [_build/html [book/digits ...]]` prints a table.

requests   files that the browser asks for, on its first visit
kB         what comes over the wire: text compressed, as a web server does it
paint      seconds to the first text or picture
loaded     seconds to the last file that the page asks for by itself

All by Chromium on a slow 4G network: 1.6 Mbit/s down, 0.75 up, 150 ms for each answer.
"""

from __future__ import annotations

import functools
import gzip
import runpy
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

HERE = runpy.run_path(str(Path(__file__).parent / "pages.py"))
ROOT, chromium = HERE["ROOT"], HERE["chromium"]
PAGES = ("book/index", "book/background", "book/digits", "book/reference/learners", "book/glossary")
SLOW_4G = {
    "offline": False,
    "latency": 150,
    "downloadThroughput": 1.6e6 / 8,
    "uploadThroughput": 0.75e6 / 8,
}
TEXT = {".html", ".css", ".js", ".svg", ".json"}
PAINTED = "performance.getEntriesByName('first-contentful-paint').map(e => e.startTime / 1000)[0]"
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"


class Weight(NamedTuple):
    """What one page asks for, and how long that takes."""

    requests: int
    kilobytes: float
    paint: float
    loaded: float


class Compressed(SimpleHTTPRequestHandler):
    """Files of a folder, text of them compressed."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix not in TEXT or not path.is_file():
            return super().do_GET()
        body = gzip.compress(path.read_bytes(), 6)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def weights(built: Path, pages: tuple[str, ...]) -> dict[str, Weight]:
    """Each page in a browser that has seen none before."""
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Compressed, directory=str(built))
    found = {}
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium())
        for page in pages:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            tab = context.new_page()
            network = context.new_cdp_session(tab)
            network.send("Network.enable")
            network.send("Network.emulateNetworkConditions", SLOW_4G)
            sizes: list[float] = []
            network.on(
                "Network.loadingFinished",
                lambda e, sizes=sizes: sizes.append(e["encodedDataLength"]),
            )
            url = f"http://127.0.0.1:{server.server_port}/{page}.html"
            tab.goto(url, wait_until="networkidle", timeout=120_000)
            found[page] = Weight(
                len(sizes), sum(sizes) / 1000, tab.evaluate(PAINTED), tab.evaluate(LOADED)
            )
            context.close()
        browser.close()
        server.shutdown()
    return found


if __name__ == "__main__":
    BUILT = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_build" / "html").resolve()
    print(f"{'page':26}{'requests':>10}{'kB':>8}{'paint, s':>10}{'loaded, s':>11}")
    for name, row in weights(BUILT, tuple(sys.argv[2:]) or PAGES).items():
        print(
            f"{name:26}{row.requests:>10}{row.kilobytes:>8.0f}{row.paint:>10.1f}{row.loaded:>11.1f}"
        )
