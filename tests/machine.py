"""What a test needs of the machine: real data, a server, a process of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("MTLIB_DATA") or os.devnull)  # nothing is below the second


def real(*names: str) -> pytest.MarkDecorator:
    """Skips a test where MTLIB_DATA has no folder of one of these names."""
    missing = not all((FOLDER / name).is_dir() for name in names)
    return pytest.mark.skipif(missing, reason=f"MTLIB_DATA has no folder {' or '.join(names)}")


_CXX = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
_HEADER = Path(sysconfig.get_path("include")) / "Python.h"


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what torch.compile makes: skipped where the machine has no compiler for it."""
    marks = (
        pytest.mark.skipif(
            shutil.which(_CXX) is None or not _HEADER.is_file(),
            reason=f"on a CPU, torch.compile needs the C++ compiler {_CXX} and {_HEADER.name}",
        ),
        # Warnings of torch's compiler about torch itself, and about Python 3.13.0.
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
    )
    for mark in marks:
        test = mark(test)
    return test


def tool(name: str) -> ModuleType:
    """The program `tools/NAME.py`, imported."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Silent:
    def log_message(self, *_: object) -> None:
        pass


class _Files(Silent, SimpleHTTPRequestHandler):
    pass


def files_of(folder: Path) -> Callable[..., SimpleHTTPRequestHandler]:
    """What `served` answers with: the files of a folder."""
    return functools.partial(_Files, directory=str(folder))


def always(body: bytes, length: int | None = None) -> type[BaseHTTPRequestHandler]:
    """What `served` answers with: the same to every question; with `length` it says that there is more."""

    class Handler(Silent, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine, which ends with the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def printed(*command: str, **options) -> str:
    """What a Python process of its own prints, with these arguments."""
    quiet = {**os.environ, "MTLIB_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=quiet, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
