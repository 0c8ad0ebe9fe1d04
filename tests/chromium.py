"""Chromium without a window and without a network, driven over its DevTools protocol."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--remote-allow-origins=*",
    "--remote-debugging-port=0",
)
PATIENCE = 60.0  # seconds; one page takes less than one
MOVED = ("Inspected target navigated", "context was destroyed", "Cannot find context")


def program() -> str | None:
    """Where Chromium is, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page of the browser. `faults` lists what went wrong while it was shown."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=PATIENCE)
        self._count = 0
        self._events: list[dict[str, Any]] = []
        self._asked: dict[str, str] = {}
        self.faults: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are noted."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, event = message.get("method", ""), message.get("params", {})
        self._events.append(message)
        if method == "Network.requestWillBeSent":
            url = event["request"]["url"]
            self._asked[event["requestId"]] = url
            if not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "about:")):
                self.faults.append(f"asked another host: {url}")
        elif method == "Network.loadingFailed" and not event.get("canceled"):
            url = self._asked.get(event["requestId"], "?")
            self.faults.append(f"not loaded: {url} ({event['errorText']})")
        elif method == "Network.responseReceived" and event["response"]["status"] >= 400:
            self.faults.append(f"{event['response']['status']}: {event['response']['url']}")
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            self.faults.append(f"exception: {text}")
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            said = " ".join(str(a.get("value", a.get("description"))) for a in event["args"])
            self.faults.append(f"console error: {said}")
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            entry = event["entry"]
            self.faults.append(f"error: {entry['text']} {entry.get('url', '')}")

    def open(self, url: str, width: int = 1200) -> None:
        """Show a page at a width in pixels; return when it, its scripts and its equations are there."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._events.clear()
        self.faults.clear()
        answer = self.send("Page.navigate", url=url)
        if "errorText" in answer:
            raise RuntimeError(f"{url}: {answer['errorText']}")
        while not any(e.get("method") == "Page.loadEventFired" for e in self._events):
            self._note(json.loads(self._socket.recv()))
        self.run("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited.

        Where the page moves on to another while it is asked, the other is asked.
        """
        end = time.monotonic() + PATIENCE / 4
        while True:
            try:
                answer = self.send(
                    "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
                )
                break
            except RuntimeError as error:
                if time.monotonic() > end or not any(said in str(error) for said in MOVED):
                    raise
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true; None if it does not become so in time."""
        end = time.monotonic() + PATIENCE / 4
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        return None

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of the first visible element."""
        x, y = self.run(
            f"(() => {{ const e = [...document.querySelectorAll({selector!r})]"
            ".find(e => e.checkVisibility() && e.getBoundingClientRect().width > 0);"
            "if (!e) throw Error('nothing to click');"
            "const b = e.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A tab of a fresh Chromium whose profile is in an empty folder; ended with the block."""
    found = program()
    if found is None:
        raise FileNotFoundError(f"expected one of {', '.join(NAMES)} on the path; install Chromium")
    command = [found, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with Tab(_address(process, profile)) as tab:
            yield tab
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The DevTools address of the browser's first tab."""
    port = profile / "DevToolsActivePort"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended at once, with {process.returncode}")
        if port.exists() and (lines := port.read_text().splitlines()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=PATIENCE) as answer:
                tabs = [t for t in json.load(answer) if t["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise TimeoutError(f"Chromium did not open its DevTools port in {PATIENCE:.0f} s")
