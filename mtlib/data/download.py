"""Files of real data: from a folder, the cache or a download, and always verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import platformdirs
import requests

from mtlib.data.parsing import MOST, parsing
from mtlib.run.progress import bar
from mtlib.run.switches import is_on

T = TypeVar("T")


class Remote(NamedTuple):
    """One file, pinned."""

    name: str  # "omniglot/images_background.zip": folder and file, in MTLIB_DATA and in the cache
    url: str  # an address with a commit in it
    sha256: tuple[str, ...]  # the accepted digests; the first is that of the file at `url`
    aliases: tuple[str, ...] = ()  # other file names under which the folder MTLIB_DATA may hold it
    size: int = MOST  # in bytes; a download of more is refused
    check: Callable[[Path], object] | None = None  # see below


"""`check` is for an archive that its server zips anew for each request: a file of another digest is accepted if
`check(path)` does not raise ValueError."""


class Unreachable(OSError):
    """The file is not on this machine, and there is no network to its address: no name, no route, no connection."""


class Refused(OSError):
    """The server was reached and did not give the file: 403, 404, 429, 5xx, a redirect elsewhere, no answer in time."""


class Altered(ValueError):
    """The file is there, or a download of it began, but it is not the expected one."""


def fetch(
    remote: Remote, timeout: float = 10.0, local: bool = False, longest: float = 1800.0
) -> Path:
    """The path of a verified file: from the folder MTLIB_DATA, the user's cache, or `remote.url`, in this order.

    A download goes to a temporary file of its own in the same folder, is verified, and is moved into place in one
    step. It ends after `timeout` seconds without a byte, after `longest` seconds in all, and at `remote.size` bytes.
    A redirect may lead to https, or to the scheme of `remote.url`, and nowhere else.

    Raises `Unreachable` if there is neither file nor network (`local` and MTLIB_OFFLINE=1 do not try): then, and only
    then, a page takes its stand-in. `Refused` if the server answers with an error or not at all; `Altered` if a file's
    digest is wrong or a download breaks off; NotADirectoryError if MTLIB_DATA is set, but not to the absolute path of
    a folder (empty counts as not set); OSError if the cache cannot be written.
    """
    if not isinstance(remote, Remote):
        raise TypeError(
            f"expected a Remote(name, url, sha256), a pinned file, got {type(remote).__name__}"
        )
    if not ((isinstance(remote.sha256, tuple | list) and remote.sha256) or remote.check):
        raise ValueError(
            f"expected at least one SHA-256 of {remote.name} in a tuple, got {remote.sha256!r}: without it any file "
            "would be taken"
        )
    found = in_data_folder(remote)
    if found:
        return verified(found, remote)
    target = cache() / remote.name
    if os.path.exists(target):
        return verified(target, remote)
    if local or offline():
        why = "a local file was asked for" if local else "MTLIB_OFFLINE=1 is set"
        raise _unreachable(remote, target, why)
    return _download(remote, target, timeout, longest)


def cache() -> Path:
    """The user's cache folder, in the platform's usual place."""
    return Path(platformdirs.user_cache_dir("mtlib-book", appauthor=False))


def offline() -> bool:
    """Whether nothing may be downloaded: MTLIB_OFFLINE=1."""
    return is_on("MTLIB_OFFLINE")


def verified(path: Path, remote: Remote) -> Path:
    """`path`, if it is the file that `remote` names; else `Altered` is raised."""
    wrong = _wrong(path, remote)
    if wrong:
        raise Altered(
            f"{path} is not the file {remote.name}: {wrong}. "
            f"It is truncated or altered; delete it and download it again from {remote.url}"
        )
    return path


def _wrong(path: Path, remote: Remote) -> str:
    """What is wrong with the file: nothing if its digest is an accepted one, or `remote.check` finds nothing."""
    digest = _digest(path)
    if digest in remote.sha256:
        return ""
    if remote.check is None:
        return f"its SHA-256 is {digest}, expected {' or '.join(remote.sha256)}"
    try:
        remote.check(path)
    except ValueError as error:
        return str(error)
    return ""


def _digest(path: Path) -> str:
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    """The digest of a file, computed again only if its size or time has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_data_folder(remote: Remote) -> Path | None:
    """Where the folder MTLIB_DATA has the file, not verified; None if it has not, or is not set."""
    folder = os.environ.get("MTLIB_DATA")
    if not folder:
        return None
    if not (os.path.isabs(folder) and os.path.isdir(folder)):
        raise NotADirectoryError(
            f"MTLIB_DATA is set to {folder!r}: expected the absolute path of an existing "
            f"folder (with {remote.name} and the like in it). Correct it or unset it."
        )
    place = Path(folder) / remote.name
    candidates = [place, *(place.with_name(a) for a in remote.aliases)]
    return next((p for p in candidates if p.exists()), None)


def _download(remote: Remote, target: Path, timeout: float, longest: float) -> Path:
    until = time.monotonic() + longest
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise _unwritable(remote, target, error) from error
    part = Path(name)
    try:
        with open(handle, "wb") as file, _answer(remote, target, timeout, until) as response:
            known = int(response.headers.get("Content-Length", "0")) or None
            with bar(known, target.name, sys.stderr.isatty(), unit="B", unit_scale=True) as shown:
                for data in _body(response, remote, until):
                    file.write(data)
                    shown.update(len(data))
            file.flush()
            os.fsync(file.fileno())
        wrong = _wrong(part, remote)
        if wrong:
            raise _broken(remote, part.stat().st_size, wrong)
        os.replace(part, target)
        _on_disk(target.parent)
    except (Unreachable, Refused):
        raise
    except OSError as error:
        raise _unwritable(remote, target, error) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _answer(remote: Remote, target: Path, timeout: float, until: float) -> requests.Response:
    """The server's answer at the end of all redirects: status 200, its body not yet read."""
    url, allowed = remote.url, {"https", urlsplit(remote.url).scheme}
    try:
        for _ in range(10):
            ask = partial(
                requests.get,
                url,
                stream=True,
                allow_redirects=False,
                timeout=timeout,
                headers={"Accept-Encoding": "identity"},
            )
            response = _within(until - time.monotonic(), ask)
            if not response.is_redirect:
                break
            response.close()
            url = urljoin(url, response.headers["Location"])
            if urlsplit(url).scheme not in allowed:
                raise _refused(remote, f"a redirect to {url}, which is not followed")
        else:
            raise _refused(remote, "ten redirects")
    except Refused:
        raise
    except TimeoutError as error:
        raise _refused(remote, "no complete answer in time") from error
    except Exception as error:  # of requests or of its libraries
        if _no_network(error):
            raise _unreachable(remote, target, str(error)) from error
        raise _refused(remote, f"no answer ({error})") from error
    length = response.headers.get("Content-Length", "0")
    if response.status_code != 200:
        why = f"HTTP {response.status_code} {response.reason}"
    elif response.headers.get("Content-Encoding", "identity") != "identity":
        why = f"an encoding that was not asked for, {response.headers['Content-Encoding']!r}"
    elif not re.fullmatch("[0-9]{1,18}", length):
        why = f"the length {length!r}"
    elif int(length) > remote.size:
        response.close()
        raise _broken(remote, 0, f"which has {length} bytes, expected at most {remote.size}")
    else:
        return response
    response.close()
    raise _refused(remote, why)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, or TimeoutError after so many seconds: a trickle of headers has no end of its own."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(max(seconds, 0))


def _no_network(error: Exception) -> bool:
    """Whether no connection came about, to the server or to a proxy; one that broke is another matter."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    reason = getattr(reason, "original_error", reason)  # a proxy's
    names = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")
    return isinstance(error, requests.exceptions.ConnectTimeout) or type(reason).__name__ in names


def _body(response: requests.Response, remote: Remote, until: float) -> Iterator[bytes]:
    """The body as it comes: it ends with the answer, and with `Altered` after too many bytes or too long a time."""
    raw, done = response.raw, 0
    read = partial(raw.read1, 2**16) if hasattr(raw, "read1") else partial(raw.read, 2**10)
    while True:
        try:
            data = read(decode_content=False)
        except Exception as error:  # whosever it is: the server had answered
            raise _broken(remote, done, f"then it broke off: {error}") from error
        done += len(data)
        if done > remote.size:
            raise _broken(remote, done, f"and more came than the expected {remote.size}")
        if time.monotonic() > until:
            raise _broken(remote, done, "then its time was over")
        if not data:
            return
        yield data


def _on_disk(folder: Path) -> None:
    """Write the folder's list of files to the disk, where a system can do so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(target: Path) -> None:
    """Remove partial files left by downloads that were killed more than a day ago."""
    for part in target.parent.glob(f"{target.name}*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep, too
            if time.time() - part.stat().st_mtime > 86400:
                part.unlink()


def _unreachable(remote: Remote, target: Path, why: str) -> Unreachable:
    return Unreachable(
        f"{remote.name} is not on this machine, and its address cannot be reached ({why}). "
        f"Download {remote.url} where there is a network and put the file at {target}, "
        f"or {_by_hand(remote)}"
    )


def _refused(remote: Remote, why: str) -> Refused:
    return Refused(
        f"the server of {remote.name} was reached, but did not give the file: {remote.url} led to {why}. "
        f"Try again later, or download it by hand and put it {_by_hand(remote)}"
    )


def _broken(remote: Remote, size: int, why: str) -> Altered:
    return Altered(
        f"the download of {remote.name} is truncated or altered: {size} bytes from {remote.url}, {why}. "
        f"Nothing was kept. Try again; if it fails again, download it by hand and put it "
        f"{_by_hand(remote)}"
    )


def _unwritable(remote: Remote, target: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write to the cache folder {target.parent}: {error}. Make it writable, "
        f"or download {remote.url} by hand and put it {_by_hand(remote)}"
    )


def _by_hand(remote: Remote) -> str:
    folder = os.environ.get("MTLIB_DATA")
    if folder:
        return f"into your MTLIB_DATA, as {Path(folder) / remote.name}."
    return f"into a folder of yours as <data>/{remote.name}, and set MTLIB_DATA=<data> (an absolute path)."


# Archives ------------------------------------------------------------------------------------


MEMBERS = 50_000
"""An archive of more members is refused, and one whose members say that they hold more than 256 MiB together."""


def members(path: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip archive, sorted by name.

    Raises ValueError if it is damaged, a name points outside, or it is larger than any of ours: nothing is unpacked.
    """
    if isinstance(path, str | os.PathLike) and os.path.isdir(path):
        raise ValueError(f"expected a zip archive, a file; {path} is a folder")
    with _unharmed(path), zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda m: m.filename)
    for m in entries:
        name = m.filename
        leaves = name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/")
        if leaves or stat.S_ISLNK(m.external_attr >> 16):
            raise ValueError(
                f"{path} holds the member {name!r}, which points outside its folder; nothing was read from it"
            )
    sizes = [m.file_size for m in entries]
    if len(sizes) > MEMBERS or max(sizes, default=0) > MOST or sum(sizes) > 4 * MOST:
        raise ValueError(
            f"{path} holds {len(sizes):,} members of {sum(sizes):,} bytes together; expected at most {MEMBERS:,} "
            f"members, {MOST:,} bytes in one and {4 * MOST:,} in all. Nothing was read from it"
        )
    return [m for m in entries if not m.is_dir()]


def contents(path: Path, below: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each of `members(path)` whose name contains `below`, read in place; nothing is unpacked.

    A member is read up to the size that it states, so that a small file cannot fill the memory. Raises ValueError.
    """
    entries = [m for m in members(path) if below in m.filename]
    with zipfile.ZipFile(path) as archive:
        for m in entries:
            with _unharmed(path):
                if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{m.filename} is compressed by a method that is not read")
                with archive.open(m) as file:
                    data = b"".join(iter(partial(file.read, 2**16), b""))
            yield m.filename, data


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over the files in the order given, each as path, NUL, hex SHA-256 of its bytes, newline."""
    total = hashlib.sha256()
    for file in files:
        name, data = file if isinstance(file, tuple) and len(file) == 2 else (file, None)
        if not isinstance(data, bytes):
            raise TypeError(f"expected pairs of a path and its bytes, got {str(file)[:80]!r}")
        total.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def check_content(files: Iterable[tuple[str, bytes]], content: str) -> None:
    """Raises ValueError unless `content` is the `digest_of` the files: the same files, however they were zipped."""
    digest = digest_of(files)
    if digest != content:
        raise ValueError(f"its content digest is {digest}, expected {content}")


@contextlib.contextmanager
def _unharmed(path: Path) -> Iterator[None]:
    """Whatever goes wrong with an archive in the block is a ValueError that says so."""
    try:
        with parsing(path, "a zip archive"):
            yield
    except ValueError as error:
        raise ValueError(f"{error}. It is damaged; delete it and download it again") from error
