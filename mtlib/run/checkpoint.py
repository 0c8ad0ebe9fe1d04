"""Checkpoints: one safetensors file with plain JSON in its header. Nothing is pickled or unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mtlib.core import Params


class Checkpoint(NamedTuple):
    """What one file holds: tensors by name, and facts about them."""

    tensors: Params
    facts: dict[str, Any]  # JSON: step, settings, versions


def write(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write atomically: the file at `path` is the old one or the complete new one, even after a power cut.

    A SHA-256 of everything in it lies in the file, so that `read` sees a changed bit.
    """
    path = Path(path)
    facts = json.dumps({"torch": torch.__version__, **checkpoint.facts})
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    data = save(tensors, metadata={"mtlib": facts, "sha256": _digest(facts, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path}: {error}. Is the folder writable, the disk full?"
        ) from error


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


def _digest(facts: str, tensors: Params) -> str:
    """SHA-256 of the facts and of each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(facts.encode())
    for k, v in sorted(tensors.items()):
        found.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        found.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(path: Path | str) -> Checkpoint:
    """Read what `write` wrote. Raises ValueError for a damaged file or one of another kind."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}; there is no such file")
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
    if held.get("sha256") != _digest(facts, tensors):
        raise ValueError(
            f"{path} is damaged: its content has another SHA-256 than when it was written. Delete it to start afresh."
        )
    return Checkpoint(tensors, json.loads(facts))


def save_params(path: Path | str, params: Params, **facts: Any) -> None:
    """Keep trained parameters, with any JSON-able facts about them (recipe, seed, data)."""
    write(path, Checkpoint({f"params/{k}": v for k, v in params.items()}, facts))


def load_params(path: Path | str) -> Params:
    """The parameters in a checkpoint or in a file of `save_params`."""
    tensors = read(path).tensors
    return {k.removeprefix("params/"): v for k, v in tensors.items() if k.startswith("params/")}
