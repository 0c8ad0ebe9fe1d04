"""C files of this package, compiled on the machine that runs them where it has a compiler, and kept.

A library is ready after a second at the first call ever, and at once in later processes. Without a compiler, with one that
fails, or in a folder that cannot be written, there is none, and who asks takes another way: nothing is ever printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
WAYS = (("-fopenmp",), ())
"""With threads, and where the compiler knows none, without. The threads are those of torch's own library of them."""
PATIENCE = 60.0  # seconds that a compiler is given
KINDS = {torch.float32: "float", torch.float64: "double"}
"""What C calls the numbers that the kernels know."""


def library(name: str, **macros: str) -> ctypes.CDLL | None:
    """`mtlib/run/NAME.c` with these macros, as functions that let go of Python's lock; None where there is none.

    Each call looks anew, so the caller keeps what it got.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.name != "posix":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    for way in WAYS:
        flags = [*FLAGS, *way, *(f"-D{k}={v}" for k, v in macros.items())]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return _loaded(compiler, source, flags)
    return None


def agree(found: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether tensors are the right ones, ‖found − right‖ ≤ 10³ ε ‖right‖: what a kernel is held to before it is used."""
    return all(
        bool((a - b).norm() <= 1e3 * torch.finfo(b.dtype).eps * b.norm())
        for a, b in zip(found, right, strict=True)
    )


def _loaded(compiler: str, source: Path, flags: list[str]) -> ctypes.CDLL:
    """The library from the cache, or compiled into it. Raises OSError or SubprocessError where that fails."""
    kept = folder() / f"{source.stem}-{_digest(compiler, source, flags)}.so"
    with contextlib.suppress(OSError):  # none there yet, or one that no longer loads
        if kept.stat().st_uid == os.getuid():
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as fresh:
        made = Path(fresh) / "made.so"
        _run(compiler, *flags, "-c", str(source), "-o", f"{made}.o")
        _run(compiler, "-shared", f"{made}.o", "-o", str(made), "-lm")
        with contextlib.suppress(
            OSError
        ):  # a home that cannot be written: it lives for this process
            kept.parent.mkdir(parents=True, exist_ok=True)
            beside = kept.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
            shutil.copyfile(made, beside)
            os.replace(beside, kept)  # whoever looks sees all of it or nothing
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(made))


def folder() -> Path:
    """Where libraries are kept: the user's cache, in the platform's usual place."""
    return Path(platformdirs.user_cache_dir("mtlib-book", appauthor=False)) / "compiled"


def _run(*command: str) -> None:
    """Run a command in silence, out of reach of a Ctrl-C at the terminal. Raises SubprocessError where it fails."""
    subprocess.run(
        command,
        check=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _digest(compiler: str, source: Path, flags: list[str]) -> str:
    """Of all that a compiled library depends on: the source, the compiler, the processor that -march=native means."""
    tool = Path(compiler).resolve()
    about = [*flags, str(tool), str(tool.stat().st_mtime_ns), platform.machine(), _processor()]
    return hashlib.sha256(
        "\n".join([source.read_text(), *about, torch.__version__]).encode()
    ).hexdigest()[:24]


def _processor() -> str:
    """The processor's model and what it can do, as far as the system says."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(words)}))
    return platform.processor()
