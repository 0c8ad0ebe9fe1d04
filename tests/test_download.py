"""`fetch`: found, verified, downloaded whole or not at all; every failure says what to do."""

from __future__ import annotations

import hashlib
import http.server
import stat
import threading
import zipfile

import pytest

from mtlib import download
from mtlib.download import Altered, Remote, Unreachable, fetch, members

DATA = b"sixteen bytes ok" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    body, length, requests = DATA, None, 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200 if self.path == "/file" else 404)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        if self.path == "/file":
            self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        thread = threading.Thread(target=s.serve_forever)
        thread.start()
        handler.url = f"http://127.0.0.1:{s.server_port}/file"
        yield handler
        s.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache and a data folder of the test's own."""
    monkeypatch.delenv("MTLIB_DATA", raising=False)
    monkeypatch.delenv("MTLIB_OFFLINE", raising=False)
    monkeypatch.setattr(download, "cache", lambda: tmp_path / "cache")
    return tmp_path


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
def test_a_truncated_or_altered_download_leaves_nothing(server, home, body, length):
    server.body, server.length = body, length
    with pytest.raises((Altered, Unreachable), match=r"file\.bin"):
        fetch(remote(server.url))
    assert left(home) == []
    server.body, server.length = DATA, None  # and the next try starts cleanly
    assert fetch(remote(server.url)).read_bytes() == DATA


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


def test_a_missing_address_is_unreachable(server):
    with pytest.raises(Unreachable, match="404"):
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
    assert [m.filename for m in members(archive(home, "b/2.txt", "b/", "a/1.txt"))] == ["a/1.txt", "b/2.txt"]


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "a/../b.txt", "/etc/out.txt", "C:/out.txt", "a\\..\\b"])
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
