"""Checkpoints: one safetensors file with plain JSON in its header. Nothing is pickled or unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mtlib.core import Params


class Checkpoint(NamedTuple):
    """What one file holds: tensors by name, and facts about them."""

    tensors: Params
    facts: dict[str, Any]  # JSON: step, settings, versions


def write(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write atomically: the file at `path` is the old one or the complete new one, even after a power cut.

    A SHA-256 of everything in it lies in the file, so that `read` sees a changed bit. Tensors that share memory are each
    written whole. Raises TypeError or ValueError for what such a file cannot keep.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            f"expected a Checkpoint(tensors, facts), got a {type(checkpoint).__name__}: for φ alone, "
            "`save_params(path, params)`"
        )
    path = as_path(path)
    if path.is_dir():
        raise ValueError(f"expected a file to write to, got the folder {path}: name a file in it")
    try:
        facts = json.dumps({"torch": torch.__version__, **checkpoint.facts})
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected facts that JSON can hold (numbers, words, lists and dicts of them): {error}"
        ) from error
    tensors = {k: _dense(k, v) for k, v in checkpoint.tensors.items()}
    try:
        data = save(tensors, metadata={"mtlib": facts, "sha256": sha256(facts, tensors)})
    except (SafetensorError, KeyError, UnicodeError) as error:
        raise ValueError(f"cannot keep these tensors in a safetensors file: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path}: {error}. Is the folder writable, the disk full?"
        ) from error


def as_path(path: Path | str) -> Path:
    """The path of a file. Raises TypeError for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a file, got a {type(path).__name__}")
    return Path(path)


def _dense(name: str, v: object) -> Tensor:
    """A copy on the CPU, in memory of its own."""
    if not isinstance(v, Tensor):
        raise TypeError(f"expected a tensor for {name}, got {type(v).__name__}")
    if v.is_meta or v.layout != torch.strided or v.is_quantized:
        what = "no data (the meta device)" if v.is_meta else f"layout {v.layout}, {v.dtype}"
        raise ValueError(f"expected a dense tensor for {name}, got one with {what}")
    copy = v.detach().resolve_conj().resolve_neg()
    return copy.to("cpu", copy=True).contiguous()


def replace(path: Path, data: bytes) -> None:
    """Write a file in one step: a new file beside it, on the disk as a whole, takes its place or is removed."""
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed before it is moved
        dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False
    )
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def sha256(facts: str, tensors: Params) -> str:
    """SHA-256 of the facts and of each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(facts.encode())
    for k, v in sorted(tensors.items()):
        found.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        found.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(path: Path | str) -> Checkpoint:
    """Read what `write` wrote. Raises ValueError for a damaged file or one of another kind."""
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}; there is no such file")
    if path.is_dir():
        raise ValueError(f"expected a checkpoint at {path}, which is a folder: name a file in it")
    data = (
        path.read_bytes()
    )  # not mapped: what happens to the file later does not reach the tensors
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file: {error}. Delete it to start afresh."
        ) from error
    held = header.get("__metadata__") or {}
    facts = held.get("mtlib")
    if facts is None:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of mtlib")
    if held.get("sha256") != sha256(facts, tensors):
        raise ValueError(
            f"{path} is damaged: its content has another SHA-256 than when it was written. Delete it to start afresh."
        )
    try:
        known = json.loads(facts)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: its facts are no JSON ({error}). Delete it."
        ) from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} is damaged: its facts are a {type(known).__name__}. Delete it.")
    return Checkpoint(tensors, known)


def save_params(path: Path | str, params: Params, **facts: Any) -> None:
    """Keep trained parameters, with any JSON-able facts about them (recipe, seed, data).

    Values, shapes and dtypes come back as they are, on the CPU; entries that share memory come back as two. Raises
    TypeError for what is no dict of tensors, ValueError for tensors without numbers of their own (sparse, meta).
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"expected parameters by name, got a {type(params).__name__}: for a module, `parameters(net)`"
        )
    if not params or not all(isinstance(k, str) for k in params):
        raise ValueError(f"expected parameters with words as names, got {list(params)[:5]}")
    write(path, Checkpoint({f"params/{k}": v for k, v in params.items()}, facts))


def load_params(path: Path | str) -> Params:
    """The parameters in a run's checkpoint or in a file of `save_params`, on the CPU.

    Of a run with early stopping the best φ so far, as `Run.params`. Raises ValueError for a file without parameters.
    """
    tensors = read(path).tensors
    prefix = "best/" if any(k.startswith("best/") for k in tensors) else "params/"
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(f"expected parameters in {path}, it has none: {list(tensors)[:5]}")
    return found
