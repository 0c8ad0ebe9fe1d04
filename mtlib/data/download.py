"""Files of real data: from a folder, the cache or a download, and always verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import platformdirs
import pooch
import requests
from tqdm import tqdm

from mtlib.run.progress import bar
from mtlib.run.switches import is_on


class Remote(NamedTuple):
    """One file, pinned."""

    name: str  # "omniglot/images_background.zip": folder and file, in MTLIB_DATA and in the cache
    url: str  # an address with a commit in it
    sha256: tuple[str, ...]  # the accepted digests; the first is that of the file at `url`
    aliases: tuple[str, ...] = ()  # other file names under which the folder MTLIB_DATA may hold it


class Unreachable(OSError):
    """The file is not on this machine and its address cannot be reached."""


class Altered(ValueError):
    """The file is there, but has the wrong digest."""


def fetch(remote: Remote, timeout: float = 10.0, local: bool = False) -> Path:
    """The path of a verified file: from the folder MTLIB_DATA, the user's cache, or `remote.url`, in this order.

    A download goes to a temporary file in the same folder, is verified, and is moved into place in one step.
    Raises `Altered` if a file's digest is wrong or a download breaks off; `Unreachable` if there is neither file nor
    network (`local` and MTLIB_OFFLINE=1 do not try); NotADirectoryError if MTLIB_DATA is set, but not to the absolute
    path of a folder (empty counts as not set); OSError if the cache cannot be written.
    """
    found = _in_data_folder(remote)
    if found:
        return verified(found, remote)
    target = cache() / remote.name
    if os.path.exists(target):
        return verified(target, remote)
    if local or offline():
        why = "a local file was asked for" if local else "MTLIB_OFFLINE=1 is set"
        raise _unreachable(remote, target, why)
    return _download(remote, target, timeout)


def cache() -> Path:
    """The user's cache folder, in the platform's usual place."""
    return Path(platformdirs.user_cache_dir("mtlib-book", appauthor=False))


def offline() -> bool:
    """Whether nothing may be downloaded: MTLIB_OFFLINE=1."""
    return is_on("MTLIB_OFFLINE")


def verified(path: Path, remote: Remote) -> Path:
    """`path`, if its SHA-256 is an accepted one; else `Altered` is raised."""
    digest = _digest(path)
    if digest not in remote.sha256:
        raise Altered(
            f"{path} is not the file {remote.name}: its SHA-256 is {digest}, expected "
            f"{' or '.join(remote.sha256)}. It is truncated or altered; delete it and download it again from {remote.url}"
        )
    return path


def _digest(path: Path) -> str:
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    """The digest of a file, computed again only if its size or time has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_data_folder(remote: Remote) -> Path | None:
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


def _download(remote: Remote, target: Path, timeout: float) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise _unwritable(remote, target, error) from error
    os.close(handle)
    part = Path(name)
    try:
        with bar(None, target.name, sys.stderr.isatty(), unit="B", unit_scale=True) as shown:
            loader = pooch.HTTPDownloader(progressbar=_Shown(shown), timeout=timeout)
            loader(remote.url, str(part), None)
        digest = _digest(part)
        if digest not in remote.sha256:
            raise _broken(remote, part, f"SHA-256 {digest}, expected {' or '.join(remote.sha256)}")
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except requests.exceptions.RequestException as error:
        if shown.total is not None:  # the server answered, then the download broke off
            raise _broken(remote, part, str(error)) from error
        raise _unreachable(remote, target, str(error)) from error
    except OSError as error:
        raise _unwritable(remote, target, error) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _sweep(target: Path) -> None:
    """Remove partial files left by downloads that were killed more than a day ago."""
    for part in target.parent.glob(f"{target.name}*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep, too
            if time.time() - part.stat().st_mtime > 86400:
                part.unlink()


class _Shown:
    """A tqdm bar with the interface that pooch expects."""

    def __init__(self, shown: tqdm) -> None:
        self._bar = shown

    @property
    def total(self) -> int | None:
        total: int | None = self._bar.total
        return total

    @total.setter
    def total(self, value: int) -> None:
        self._bar.total = value

    def update(self, n: int) -> None:
        self._bar.update(n)

    def reset(self) -> None:
        self._bar.reset()

    def close(self) -> None:
        self._bar.close()


def _unreachable(remote: Remote, target: Path, why: str) -> Unreachable:
    return Unreachable(
        f"{remote.name} is not on this machine, and its address cannot be reached ({why}). "
        f"Download {remote.url} where there is a network and put the file at {target}, "
        f"or {_by_hand(remote)}"
    )


def _broken(remote: Remote, part: Path, why: str) -> Altered:
    return Altered(
        f"the download of {remote.name} is truncated or altered: {part.stat().st_size} bytes from {remote.url}, {why}. "
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


def members(path: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip archive, sorted by name. Raises ValueError if it is damaged or a name points outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda m: m.filename)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    for m in entries:
        name = m.filename
        leaves = name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/")
        if leaves or stat.S_ISLNK(m.external_attr >> 16):
            raise ValueError(
                f"{path} holds the member {name!r}, which points outside its folder; nothing was read from it"
            )
    return [m for m in entries if not m.is_dir()]


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each of `members(path)`, read in place; nothing is unpacked."""
    entries = members(path)
    with zipfile.ZipFile(path) as archive:
        for m in entries:
            try:
                data = archive.read(m)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise _damaged(path, error) from error
            yield m.filename, data


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over the files in the order given, each as path, NUL, hex SHA-256 of its bytes, newline."""
    total = hashlib.sha256()
    for name, data in files:
        total.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged or not a zip archive ({error}); delete it and download it again"
    )
