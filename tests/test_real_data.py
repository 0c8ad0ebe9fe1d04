"""Every real file of every loader: found and verified, refused when altered, and downloaded whole from a server."""

from __future__ import annotations

import http.server
import importlib
import os
import pkgutil
import threading
from pathlib import Path

import pytest

import mtlib.data
from mtlib.data import download
from mtlib.data.download import Altered, Remote, Unreachable, fetch

FOLDER = os.environ.get("MTLIB_DATA", "")


def remotes(value: object) -> list[Remote]:
    """The pinned files in a module's constant: one, or those of a dict or tuple."""
    if isinstance(value, Remote):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [r for v in value for r in remotes(v)] if isinstance(value, (tuple, list)) else []


MODULES = [
    importlib.import_module(f"mtlib.data.{m.name}")
    for m in pkgutil.iter_modules(mtlib.data.__path__)
]
ALL = {r.name: r for m in MODULES for k, v in vars(m).items() if k[:1] != "_" for r in remotes(v)}


def here(remote: Remote) -> Path | None:
    places = [Path(FOLDER) / remote.name] if FOLDER else []
    places += [p.with_name(a) for p in places for a in remote.aliases]
    return next((p for p in places if p.is_file()), None)


@pytest.fixture(params=sorted(ALL))
def remote(request):
    return ALL[request.param]


@pytest.fixture
def real(remote):
    path = here(remote)
    if path is None:
        pytest.skip(f"MTLIB_DATA names no folder with {remote.name}")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("MTLIB_OFFLINE", raising=False)
    monkeypatch.setenv("MTLIB_PROGRESS", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "cache", lambda: tmp_path / "cache")
    return tmp_path


def test_the_address_is_pinned_and_the_digest_whole(remote):
    assert remote.url.startswith("https://") and "/main/" not in remote.url
    assert remote.sha256 and all(len(d) == 64 and int(d, 16) for d in remote.sha256)
    assert remote.name.count("/") >= 1 and ".." not in remote.name


def test_the_real_file_is_found_and_verified(remote, real):
    assert fetch(remote) == real


def test_an_altered_copy_is_refused(remote, real, home, monkeypatch):
    copy = home / "data" / remote.name
    copy.parent.mkdir(parents=True)
    data = bytearray(real.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))
    with pytest.raises(Altered, match="truncated or altered"):
        fetch(remote)


def test_it_downloads_from_a_server(remote, real, home, monkeypatch):
    body = real.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.delenv("MTLIB_DATA")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        local = remote._replace(url=f"http://127.0.0.1:{server.server_port}/file")
        try:
            path = fetch(local)
        finally:
            server.shutdown()
            thread.join()
    assert path == home / "cache" / remote.name and path.read_bytes() == body
    assert fetch(local) == path, "asked again for what it has"


def test_without_file_and_network_it_says_what_to_do(remote, monkeypatch):
    monkeypatch.delenv("MTLIB_DATA", raising=False)
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    with pytest.raises(Unreachable, match="put the file at"):
        fetch(remote)
