"""The device that the tests call second: not the CPU. `name()` loads it into this process, which it changes for good.

MTLIB_TEST_DEVICE=cuda takes a real one instead.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager, nullcontext
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "second"


class Unavailable(Exception):
    """There is no such device, and none can be made here."""


@cache
def name() -> str:
    """The device's name, once torch knows it; `Unavailable` says why there is none."""
    chosen = os.environ.get("MTLIB_TEST_DEVICE", NAME)
    if chosen != NAME:
        if not torch.get_device_module(chosen).is_available():
            raise Unavailable(f"there is no {chosen} here")
        return chosen
    torch.ops.load_library(_library())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(NAME))
    return NAME


@contextmanager
def without_float64():
    """The second device refuses float64 here, as MPS does."""
    torch.ops.second_device.without_float64(True)
    try:
        yield
    finally:
        torch.ops.second_device.without_float64(False)


def _library() -> Path:
    """The compiled device. It is compiled once for this source and this torch, which takes a quarter of a minute."""
    key = f"{torch.__version__} {platform.platform()} {SOURCE.read_text('utf8')}"
    folder = SOURCE.parents[2] / "_build" / "second_device"
    library = folder / f"{sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None
    )
    if compiler is None or sys.platform == "win32":
        raise Unavailable("the second device needs a C++ compiler, c++ or g++, on Linux or macOS")
    torch_ = Path(torch.__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")  # another process may compile it, too
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    here = [f"-I{torch_ / 'include'}", f"-L{torch_ / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", *undefined, str(SOURCE), *here]
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{SOURCE.name} does not compile with torch {torch.__version__}:\n{done.stderr}"
        )
    part.replace(library)
    return library


class _Module(types.ModuleType):
    """What torch looks for in `torch.second`. Its random state is that of `torch.Generator("second")`'s first one."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, _: object) -> nullcontext:
        return nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        torch.ops.second_device.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.ops.second_device.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.ops.second_device.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]
