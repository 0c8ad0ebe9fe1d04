"""Every real file of every loader: found and verified, refused when altered, and downloaded whole from a server."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from pathlib import Path

import pytest
from machine import FOLDER, always, damage, served

import mtlib.data
from mtlib.data.download import Altered, Remote, Unreachable, fetch


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
    places = [FOLDER / remote.name, *((FOLDER / remote.name).with_name(a) for a in remote.aliases)]
    return next((p for p in places if p.is_file()), None)


@pytest.fixture(params=sorted(ALL))
def remote(request):
    return ALL[request.param]


@pytest.fixture
def real(remote, home, monkeypatch):
    path = here(remote)
    if path is None:
        pytest.skip(f"MTLIB_DATA names no folder with {remote.name}")
    monkeypatch.setenv("MTLIB_DATA", str(FOLDER))
    return path


def test_the_address_is_pinned_and_the_digest_whole(remote):
    assert remote.url.startswith("https://") and "/main/" not in remote.url
    assert remote.sha256 and all(len(d) == 64 and int(d, 16) for d in remote.sha256)
    assert remote.name.count("/") >= 1 and ".." not in remote.name


def test_the_real_file_is_found_and_verified(remote, real):
    assert fetch(remote) == real


def test_an_altered_copy_is_refused(remote, real, home, monkeypatch):
    copy = home / "data" / remote.name
    copy.parent.mkdir(parents=True)
    shutil.copyfile(real, copy)
    damage(copy)
    monkeypatch.setenv("MTLIB_DATA", str(home / "data"))
    with pytest.raises(Altered, match="truncated or altered"):
        fetch(remote)


def test_it_downloads_from_a_server(remote, real, home, monkeypatch):
    body = real.read_bytes()
    monkeypatch.delenv("MTLIB_DATA")
    with served(always(body)) as url:
        local = remote._replace(url=f"{url}/file")
        path = fetch(local)
    assert path == home / "cache" / remote.name and path.read_bytes() == body
    assert fetch(local) == path, "asked again for what it has"


def test_without_file_and_network_it_says_what_to_do(remote, offline):
    with pytest.raises(Unreachable, match="put the file at"):
        fetch(remote)
