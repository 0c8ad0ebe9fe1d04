"""Short pieces of DNA, what binds them, and families of motifs drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtlib.tasks import above_zero, check_seed, positive

LETTERS = "ACGT"
STRONG = 0.45
"""An E-score above this counts as strong binding."""

FAMILIES = (*("homeodomain",) * 10, *("C2H2",) * 3, *("forkhead",) * 2, "nuclear_receptor")
"""The drawn genes' families."""


class Binding(NamedTuple):
    """How strongly each of G genes' proteins binds each of K short sequences."""

    kmers: list[str]  # K sequences, each standing for itself and its reverse complement
    genes: list[str]  # G names
    families: list[str]  # G families of the part that touches DNA
    escore: Tensor  # (G, K) in [-0.5, 0.5]: area under a ROC curve minus one half
    source: str


def reverse_complement(sequence: str) -> str:
    """What the other strand reads: A and T, C and G exchanged, backwards."""
    if sequence.strip(LETTERS):  # nothing is left of a word of these letters
        raise ValueError(f"expected the letters {LETTERS}, got {sequence[:40]!r}")
    return sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1]


def canonical(length: int) -> list[str]:
    """All sequences of a length; of a sequence and its reverse complement, only the first in the alphabet."""
    positive(length=length)
    words = map("".join, product(LETTERS, repeat=length))
    return [w for w in words if w <= reverse_complement(w)]


def counts(kmers: Sequence[str], lengths: Iterable[int]) -> list[Tensor]:
    """For each length, how often each canonical word occurs in each sequence: (K, words of that length).

    A word and its reverse complement count as one, so both strands of a sequence have the same row.
    """
    size = len(kmers[0]) if len(kmers) else 0
    if not size or any(len(s) != size for s in kmers):
        raise ValueError(
            f"expected sequences of one length, got {sorted({len(s) for s in kmers})[:5]}"
        )
    if wrong := next((s for s in kmers if s.strip(LETTERS)), ""):
        raise ValueError(f"expected the letters {LETTERS}, got {wrong[:40]!r}")
    result = []
    for length in lengths:
        if not length <= size:
            raise ValueError(
                f"expected words of a length up to {size}, the sequences', got {length}"
            )
        column = {w: i for i, w in enumerate(canonical(length))}
        column |= {reverse_complement(w): i for w, i in column.items()}
        table = np.zeros((len(kmers), len(set(column.values()))), np.float32)
        rows = np.arange(len(kmers))
        for start in range(size - length + 1):
            found = np.array([column[s[start : start + length]] for s in kmers])
            table[rows, found] += 1
        result.append(torch.from_numpy(table))
    return result


def looked_up(profiles: Tensor, kin: Tensor, places: Sequence[int], size: int) -> Tensor:
    """What other genes' proteins do with sequences, as features of a new gene that is akin to some of them: (n, 2·size + 2).

    profiles: (k, n), a row for each known gene; kin: (k,), whether it is of the new gene's family; where none is, all
    count as relatives. Columns: each relative's deviation from the relatives' mean, over √(number of relatives); each
    stranger's from the mean of all, over √(number of strangers); the mean of relatives; the mean of all. Known gene i has
    column `places`[i] of the `size` in the first two parts, and other columns are 0, so that a gene's column is the same
    whoever else is known. No label of the new gene takes part.
    """
    kin = torch.as_tensor(kin)
    k = len(profiles) if profiles.ndim == 2 else 0
    if not k or kin.shape != (k,) or kin.dtype != torch.bool or len(places) != k:
        raise ValueError(
            f"expected profiles (k, n), and for each of them whether it is kin and its place, got {tuple(profiles.shape)}, "
            f"{kin.dtype} of shape {tuple(kin.shape)} and {len(places)} places"
        )
    if len({*places}) < k or not all(0 <= i < size for i in places):
        raise ValueError(f"expected different places from 0 to {size - 1}, got {[*places][:9]}")
    kin = kin | ~kin.any()
    means = torch.stack([profiles[kin].mean(0), profiles.mean(0)])
    parts = profiles.new_zeros(2, size, profiles.shape[1])
    for part, who, mean in zip(parts, (kin, ~kin), means, strict=True):
        part[torch.tensor(places)[who]] = (profiles[who] - mean) / max(1, int(who.sum())) ** 0.5
    return torch.cat([*parts, means]).mT


def log_odds(escore: Tensor, margin: float = 0.002) -> Tensor:
    """¼ log((½ + m + E) / (½ + m − E)): slope one at E = 0, and the crowded ends of the scale stretched."""
    above_zero(margin=margin)
    if not bool((escore.abs() <= 0.5).all()):
        raise ValueError(
            f"expected E-scores from −0.5 to 0.5, got {escore.min().item():g} to {escore.max().item():g}"
        )
    return ((0.5 + margin + escore) / (0.5 + margin - escore)).log() / 4


def drawn(seed: int = 0, length: int = 8) -> Binding:
    """Motif families: each family has a motif of log-odds (6, 4), each gene a variation of its family's.

    A sequence's energy is the best match over its positions and both strands, plus an effect of the array on each
    sequence, the same for all genes, plus noise. E = ½ tanh of it, scaled so that one in two hundred
    sequences binds strongly.
    """
    check_seed(seed)
    positive(length=length)
    if length < 6:
        raise ValueError(
            f"expected sequences of at least 6 letters, a motif's length, got {length}"
        )
    rng = np.random.default_rng(seed)
    kmers = canonical(length)
    letters = np.array([[LETTERS.index(c) for c in s] for s in kmers])
    array = 0.25 * rng.normal(size=len(kmers))
    core = {family: 1.5 * rng.normal(size=(6, 4)) for family in dict.fromkeys(FAMILIES)}
    rows = []
    for family in FAMILIES:
        motif = core[family] + 0.6 * rng.normal(size=(6, 4))
        energy = _best_match(letters, motif)
        energy = (energy - energy.mean()) / energy.std()
        energy = energy + array + 0.25 * rng.normal(size=len(kmers))
        top = np.quantile(energy, 0.995)
        rows.append(0.5 * np.tanh(np.arctanh(STRONG / 0.5) * energy / top))
    escore = torch.from_numpy(np.stack(rows)).float()
    genes = [f"{family[:5]}-{i}" for i, family in enumerate(FAMILIES)]
    source = f"motif families drawn from seed {seed}, {len(genes)} genes, {len(kmers):,} sequences (stand-in)"
    return Binding(kmers, genes, list(FAMILIES), escore, source)


def _best_match(letters: np.ndarray, motif: np.ndarray) -> np.ndarray:
    """(K, length) letter numbers, (w, 4) -> (K,): the soft maximum over positions and strands."""
    w = len(motif)
    found = [
        motif[np.arange(w), strand[:, start : start + w]].sum(1)
        for strand in (letters, 3 - letters[:, ::-1])
        for start in range(letters.shape[1] - w + 1)
    ]
    soft: np.ndarray = np.logaddexp.reduce(found, axis=0)
    return soft
