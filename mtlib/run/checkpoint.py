"""Checkpoints: one safetensors file with plain JSON in its header. Nothing is pickled or unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mtlib.core import Params


class Checkpoint(NamedTuple):
    """What one file holds: tensors by name, and facts about them."""

    tensors: Params
    facts: dict[str, Any]  # JSON: step, settings, versions


def write(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write atomically: the file at `path` is the old one or the complete new one, even after a power cut."""
    path = Path(path)
    facts = {"torch": torch.__version__, **checkpoint.facts}
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    data = save(tensors, metadata={"mtlib": json.dumps(facts)})
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path}: {error}. Is the folder writable, the disk full?"
        ) from error


def read(path: Path | str) -> Checkpoint:
    """Read what `write` wrote. Raises ValueError for a damaged file or one of another kind."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}; there is no such file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            facts = (file.metadata() or {}).get("mtlib")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file: {error}. Delete it to start afresh."
        ) from error
    if facts is None:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of mtlib")
    return Checkpoint(tensors, json.loads(facts))


def save_params(path: Path | str, params: Params, **facts: Any) -> None:
    """Keep trained parameters, with any JSON-able facts about them (recipe, seed, data)."""
    write(path, Checkpoint({f"params/{k}": v for k, v in params.items()}, facts))


def load_params(path: Path | str) -> Params:
    """The parameters in a checkpoint or in a file of `save_params`."""
    tensors = read(path).tensors
    return {k.removeprefix("params/"): v for k, v in tensors.items() if k.startswith("params/")}
