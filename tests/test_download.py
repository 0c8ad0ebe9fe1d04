"""`fetch`: found, verified, downloaded whole or not at all; every failure says what to do."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from machine import Silent, served

from mtlib.data import download
from mtlib.data.download import Altered, Refused, Remote, Unreachable, contents, fetch, members

DATA = b"sixteen bytes ok" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


pytestmark = pytest.mark.usefixtures("home")


class Server(Silent, http.server.BaseHTTPRequestHandler):
    body, length, requests, hold = DATA, None, 0, None

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200 if self.path == "/file" else 404)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        if self.path == "/file":
            self.wfile.write(self.body)
            if self.hold:  # the connection stays open, with no more data
                self.wfile.flush()
                self.hold.wait(20)


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {})
    with served(handler) as url:
        handler.url = f"{url}/file"
        yield handler


def remote(url="http://127.0.0.1:9/file", **changes):
    return Remote("set/file.bin", url, (DIGEST,))._replace(**changes)


def folder(home, monkeypatch, data=DATA, name="file.bin"):
    (home / "data" / "set").mkdir(parents=True)
    (home / "data" / "set" / name).write_bytes(data)
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))


def left(home):
    return sorted(p.name for p in (home / "cache").rglob("*") if p.is_file())


def test_a_download_is_verified_cached_and_not_repeated(server, home):
    path = fetch(remote(server.url))
    assert path.read_bytes() == DATA and path == home / "cache" / "set" / "file.bin"
    assert fetch(remote(server.url)) == path and server.requests == 1
    assert left(home) == ["file.bin"]


def test_the_data_folder_comes_first_also_under_another_name(server, home, monkeypatch):
    folder(home, monkeypatch, name="file.again.bin")
    path = fetch(remote(server.url, aliases=("file.again.bin",)))
    assert path.name == "file.again.bin" and server.requests == 0


def test_a_data_folder_that_lacks_the_file_falls_through_to_the_download(server, home, monkeypatch):
    (home / "data").mkdir()
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))
    assert fetch(remote(server.url)).read_bytes() == DATA


def test_several_digests_are_accepted(home, monkeypatch):
    folder(home, monkeypatch)
    assert fetch(remote(sha256=("0" * 64, DIGEST))).exists()


@pytest.mark.parametrize("value", ["data", "./data", "~/data", "/no/such/folder"])
def test_a_data_folder_that_is_none_is_an_error(home, monkeypatch, value):
    monkeypatch.setenv("MTLIB_DATA", value)
    with pytest.raises(NotADirectoryError, match=r"MTLIB_DATA is set to .*absolute path"):
        fetch(remote())


def test_a_relative_data_folder_is_an_error_also_where_it_exists(home, monkeypatch):
    folder(home, monkeypatch)
    monkeypatch.chdir(home)
    monkeypatch.setenv("MTLIB_DATA", "data")
    with pytest.raises(NotADirectoryError, match="absolute path"):
        fetch(remote())


def test_a_file_in_the_place_of_the_data_folder_is_an_error(home, monkeypatch):
    (home / "data").write_text("no folder")
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))
    with pytest.raises(NotADirectoryError, match="absolute path"):
        fetch(remote())


def test_an_altered_file_in_the_data_folder_is_an_error_and_no_stand_in(server, home, monkeypatch):
    folder(home, monkeypatch, data=DATA[:-1] + b"x")
    with pytest.raises(Altered, match=rf"file.bin is not the file.*expected {DIGEST}"):
        fetch(remote(server.url))
    assert server.requests == 0


def test_a_file_altered_after_it_was_verified_is_noticed(home, monkeypatch):
    folder(home, monkeypatch)
    path = fetch(remote())
    path.write_bytes(DATA + b"x")
    with pytest.raises(Altered):
        fetch(remote())


def test_an_altered_cache_is_an_error(server, home):
    path = fetch(remote(server.url))
    path.write_bytes(b"altered")
    with pytest.raises(Altered, match="delete it"):
        fetch(remote(server.url))


@pytest.mark.parametrize(
    ("body", "length"), [(DATA[:-7], None), (DATA[:-1] + b"x", None), (DATA[:100], len(DATA))]
)
def test_a_truncated_or_altered_download_is_an_error_and_leaves_nothing(server, home, body, length):
    server.body, server.length = body, length
    with pytest.raises(
        Altered, match=r"download of set/file\.bin is truncated or altered.*Try again"
    ):
        fetch(remote(server.url))
    assert left(home) == []
    server.body, server.length = DATA, None  # and the next try starts cleanly
    assert fetch(remote(server.url)).read_bytes() == DATA


def test_a_download_that_stalls_ends_with_an_error(server, home):
    server.body, server.length, server.hold = DATA[:1500], len(DATA), threading.Event()
    try:
        with pytest.raises(Altered, match="truncated"):
            fetch(remote(server.url), timeout=0.3)
    finally:
        server.hold.set()
    assert left(home) == []


def test_a_killed_download_is_never_taken_for_the_file(server, home):
    server.body, server.length, server.hold = DATA[:1500], len(DATA), threading.Event()
    code = (
        "import sys, pathlib; from mtlib.data import download as d\n"
        "d.cache = lambda: pathlib.Path(sys.argv[1])\n"
        "d.fetch(d.Remote('set/file.bin', sys.argv[2], (sys.argv[3],)))"
    )
    command = [sys.executable, "-c", code, str(home / "cache"), server.url, DIGEST]
    root = str(Path(download.__file__).parent.parent)
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}) as process:
        until = time.monotonic() + 60
        while not left(home) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    server.hold.set()
    (part,) = left(home)
    assert part.endswith(".part")
    server.body, server.hold = DATA, None
    path = fetch(remote(server.url))
    assert path.read_bytes() == DATA and left(home) == ["file.bin", part]
    old = path.with_name(part)
    os.utime(old, (time.time() - 100_000,) * 2)
    path.unlink()
    fetch(remote(server.url))
    assert left(home) == ["file.bin"], "what a killed download left is removed a day later"


@pytest.mark.parametrize(("setting", "terminal"), [("0", True), ("1", False), ("1", True)])
def test_the_progress_bar_shows_on_a_terminal_only_and_can_be_switched_off(
    server, monkeypatch, capsys, setting, terminal
):
    monkeypatch.setenv("MTLIB_PROGRESS", setting)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    fetch(remote(server.url))
    shown = capsys.readouterr()
    assert ("file.bin" in shown.err) == (setting == "1" and terminal) and shown.out == ""


def test_an_interrupted_download_leaves_nothing(server, home, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(remote(server.url))
    assert left(home) == []


def test_offline_says_where_to_put_the_file(home):
    with pytest.raises(Unreachable) as error:
        fetch(remote())
    text = str(error.value)
    assert "http://127.0.0.1:9/file" in text and str(home / "cache" / "set" / "file.bin") in text
    assert "MTLIB_DATA=" in text


def test_offline_with_a_data_folder_names_that_folder(home, monkeypatch):
    (home / "data").mkdir()
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))
    with pytest.raises(Unreachable) as error:
        fetch(remote())
    assert isinstance(error.value, OSError) and str(home / "data" / "set" / "file.bin") in str(
        error.value
    )


def test_a_missing_address_is_no_lack_of_network(server):
    with pytest.raises(Refused, match="404"):
        fetch(remote(server.url.replace("/file", "/gone")))


def test_offline_can_be_asked_for(server, monkeypatch):
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    with pytest.raises(Unreachable, match="MTLIB_OFFLINE"):
        fetch(remote(server.url))
    assert server.requests == 0


def test_a_cache_that_cannot_be_written_says_so(server, home):
    (home / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write to the cache folder .*MTLIB_DATA"):
        fetch(remote(server.url))


def test_a_full_disk_says_so_and_leaves_nothing(server, home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write to the cache folder .*No space left") as error:
        fetch(remote(server.url))
    assert not isinstance(error.value, Unreachable) and left(home) == []


# Archives ------------------------------------------------------------------------------------


def archive(home, *names, link=False):
    path = home / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        for name in names:
            info = zipfile.ZipInfo(name)
            if link:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, "content")
    return path


def test_members_are_the_files_sorted(home):
    assert [m.filename for m in members(archive(home, "b/2.txt", "b/", "a/1.txt"))] == [
        "a/1.txt",
        "b/2.txt",
    ]


@pytest.mark.parametrize(
    "name",
    ["../out.txt", "a/../../out.txt", "a/../b.txt", "/etc/out.txt", "C:/out.txt", "a\\..\\b"],
)
def test_a_member_that_points_outside_is_refused(home, name):
    with pytest.raises(ValueError, match="outside its folder"):
        members(archive(home, "fine.txt", name))


def test_a_link_is_refused(home):
    with pytest.raises(ValueError, match="outside its folder"):
        members(archive(home, "link", link=True))


def test_a_damaged_archive_is_an_error(home):
    path = archive(home, "a.txt")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        members(path)


def test_contents_are_read_in_place(home):
    assert list(contents(archive(home, "b.txt", "a.txt"))) == [
        ("a.txt", b"content"),
        ("b.txt", b"content"),
    ]
    assert [p.name for p in home.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_an_error(home, method):
    path = home / "a.zip"
    with zipfile.ZipFile(path, "w", method) as z:
        z.writestr("a.txt", bytes(range(256)) * 20)
    data = bytearray(path.read_bytes())
    data[60:70] = b"0123456789"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        list(contents(path))
