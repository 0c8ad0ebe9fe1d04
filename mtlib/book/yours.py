"""What stands for a reader's own data and networks on the page that shows how to bring them: made here, from a seed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mtlib.data.download import Unreachable
from mtlib.data.glyphs import glyphs
from mtlib.models.encoders import small_bert
from mtlib.nets import seeded
from mtlib.tasks import positive

ACTS = ["open", "close", "find", "book", "cancel", "pay", "move", "count", "share", "sell"]
THINGS = ["door", "card", "flight", "song", "bill", "room", "light", "recipe", "parcel", "alarm"]
OTHERS = ["please", "can", "you", "now", "the", "my", "a", "today", "would", "like", "me", "to"]

DATASET = """import numpy as np, torch


class Recordings(torch.utils.data.Dataset):
    def __init__(self, path, labels):
        self.targets = labels
        self.values = np.memmap(path, "float32", "r").reshape(-1, 16)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.from_numpy(self.values[i].copy()), self.targets[i]
"""


def photos(classes: int) -> Path:
    """A new folder with one folder for each class, of 8 to 20 drawings in it, as PNG files."""
    positive(classes=classes)
    folder, drawn = Path(mkdtemp()) / "photos", glyphs(classes)
    paper = 255 - (255 * drawn.items[:, :, 0]).byte().numpy()
    for i, (name, sheets) in enumerate(zip(drawn.names, paper, strict=True)):
        own = folder / name.replace("/", "-")
        own.mkdir(parents=True)
        for j, sheet in enumerate(sheets[: 8 + i % 13]):
            Image.fromarray(sheet).save(own / f"{j:02d}.png")
    return folder


def requests() -> dict[str, list[str]]:
    """A hundred intents, "move parcel" and the like, each with 12 to 19 sentences: its two words among five others."""
    rng, sentences = np.random.default_rng(0), dict[str, list[str]]()
    for act in ACTS:
        for thing in THINGS:
            count = rng.integers(12, 20)
            said = [[act, thing, *rng.choice(OTHERS, 5)] for _ in range(count)]
            sentences[f"{act} {thing}"] = [" ".join(rng.permutation(w)) for w in said]
    return sentences


def reader(ways: int) -> tuple[Any, Any, str]:
    """(tokenizer, classifier with `ways` labels, what made it): a small BERT that knows the words of `requests` alone.

    Without the library transformers it is a `Stand`, which is called in the same way.
    """
    positive(ways=ways)
    words = [*ACTS, *THINGS, *OTHERS]
    try:
        return *small_bert(words, ways), "a small BERT of transformers, not pretrained"
    except Unreachable:
        with seeded(0):
            return Words(words), Stand(len(words) + 2, ways), "a stand-in; transformers is absent"


class Words:
    """A tokenizer of whole words that is called as those of transformers are: 0 pads, 1 is a word it does not know."""

    def __init__(self, words: Sequence[str]):
        self.number = {w: i for i, w in enumerate(words, 2)}

    def __call__(self, texts: Sequence[str], max_length: int, **_: Any) -> dict[str, Tensor]:
        """Tokens and mask, each (B, max_length)."""
        rows = [[self.number.get(w, 1) for w in t.split()][:max_length] for t in texts]
        ids = torch.tensor([r + [0] * (max_length - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Stand(nn.Module):
    """One layer of attention over words, then their mean; called by keywords, it answers with an object that has `logits`."""

    def __init__(self, words: int, ways: int, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.classifier = nn.Linear(width, width), nn.Linear(width, ways)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        z = self.words(input_ids)
        match = self.query(z) @ self.key(z).mT / z.shape[-1] ** 0.5
        there = attention_mask.to(z)
        match = match + (1 - there[:, None]) * torch.finfo(z.dtype).min
        z = z + match.softmax(-1) @ self.value(z)
        mean = (z * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.classifier(mean))


def backbone() -> nn.Sequential:
    """A convolutional classifier of a thousand classes with timm's `pretrained_cfg`, for images 28 × 28; not trained."""
    with seeded(0):
        net = nn.Sequential()
        for i, o in (3, 16), (16, 32), (32, 64):
            net.extend([nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.ReLU()])
        net.extend([nn.Flatten(), nn.Linear(64 * 16, 1000)])
    net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # type: ignore[assignment]
    return net


def machines(number: int = 60, readings: int = 40) -> dict[str, np.ndarray]:
    """A table by columns: how load and heat wear a part down, machine by machine, wear = a load + b heat + c + noise."""
    positive(number=number, readings=readings)
    rng = np.random.default_rng(0)
    machine = np.arange(number * readings) % number
    load, heat, noise = rng.normal(size=(3, len(machine)))
    a, b, c = rng.normal([1, 0, 0], [0.3, 1, 1], (number, 3))[machine].T
    wear = a * load + b * heat + c + 0.1 * noise
    return {"machine": machine, "load": load, "heat": heat, "wear": wear}


def recordings(items: int = 2400) -> tuple[Path, np.ndarray]:
    """A file with sixteen float32 numbers for each item, and the labels, one of sixty classes.

    Beside the file stands `recordings.py` with the data set that reads it, `Recordings(path, labels)`; Python finds it.
    """
    positive(items=items)
    folder, rng = Path(mkdtemp()), np.random.default_rng(0)
    labels = np.arange(items) % 60
    values = rng.normal(size=(60, 16))[labels] + rng.normal(size=(items, 16))
    values.astype("float32").tofile(folder / "recordings.bin")
    (folder / "recordings.py").write_text(DATASET, "utf8")
    sys.path.append(str(folder))
    return folder / "recordings.bin", labels
