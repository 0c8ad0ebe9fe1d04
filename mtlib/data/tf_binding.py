"""Transcription factors and the 8-mers they bind, from microarrays {cite}`barrera2016survey`; drawn ones without file and network."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtlib.data.download import Remote, Unreachable, contents, fetch, in_data_folder
from mtlib.data.motifs import LETTERS, Binding, canonical, reverse_complement
from mtlib.data.motifs import drawn as drawn_binding
from mtlib.data.parsing import content, number, parsing

_COMMIT = (
    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f"
)
_FOLDER = f"{_COMMIT}/flexs/landscapes/data/tf_binding"

ARCHIVE = Remote(
    "tf_binding/pbm_escores.npz",
    f"{_FOLDER}/",
    ("badc5465baf47cd092b1b634655b1915a969393f049f2404c3ad3ef3b95f8c03",),
    size=17_808_257,
)
"""All 200 experiments in one file, which is only read from the folder MTLIB_DATA: it cannot be downloaded."""

_HEADER = ["8-mer", "8-mer", "E-score", "Median", "Z-score"]
_LENGTH = 8


def tf_binding() -> Binding:
    """33 genes with the E-scores of all 32,896 8-mers; drawn ones without file and network.

    One experiment per gene, of the reference allele: the replicate with the most 8-mers above 0.45. A gene is left
    out if no experiment of it, of any allele, has fifty (BCL6, HOXB7, KLF11, NR2E3, PAX6, PAX7, VENTX, WT1).
    Reads the archive if the folder MTLIB_DATA has it, otherwise fetches 33 files of 1.4 MB. `source` says which data
    it is. Raises `mtlib.data.download.Altered` for a file with the wrong digest.
    """
    try:
        if in_data_folder(ARCHIVE):
            kmers, escore = read_archive(fetch(ARCHIVE))
        else:
            kmers, escore = read_all()
    except Unreachable:
        return drawn_binding()
    if kmers != canonical(_LENGTH):
        raise ValueError(f"expected all 8-mers in alphabetical order, got {len(kmers)}")
    genes, families = [gene for gene, *_ in EXPERIMENTS], [row[2] for row in EXPERIMENTS]
    source = f"protein-binding microarrays, {len(genes)} genes, {len(kmers):,} 8-mers (real)"
    return Binding(kmers, genes, families, escore, source)


def remote(gene: str, replicate: str, digest: str) -> Remote:
    """The raw file of one reference-allele experiment."""
    name = f"{gene}_REF_{replicate}_8mers.txt"
    return Remote(f"tf_binding/{name}", f"{_FOLDER}/{name}", (digest,), size=2_000_000)


def read_archive(path: Path) -> tuple[list[str], Tensor]:
    """8-mers (K), and E-scores (33, K), from the archive. Raises ValueError for one that is damaged or of another kind."""
    with parsing(path, "an archive of E-scores"):
        held = {name: _array(data) for name, data in contents(path)}
        names = [str(name, "ascii") for name in held["experiments.npy"].tolist()]
        kmers = _checked([str(k, "ascii") for k in held["kmers.npy"].tolist()])
        table = held["escore_x1e5.npy"]
        if table.shape != (len(names), len(kmers)) or table.dtype.kind != "i":
            raise ValueError(
                f"expected whole numbers {(len(names), len(kmers))}, got {table.shape}"
            )
        rows = {name: i for i, name in enumerate(names)}
        kept = [rows[f"{gene}_REF_{replicate}"] for gene, replicate, *_ in EXPERIMENTS]
        if len(rows) < len(names) or (table < -50_000).any() or (table > 50_000).any():
            raise ValueError("expected each experiment once, and E-scores from -0.5 to 0.5")
        return kmers, torch.from_numpy(table[kept] / 1e5).float()


def _array(data: bytes) -> np.ndarray:
    """One array of an npz file, whose head must fit its bytes: numpy would reserve whatever the head says."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("expected arrays in numpy's format 1.0")
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    if kind.kind not in "iS" or min(shape, default=1) < 0:
        raise ValueError(f"expected whole numbers or bytes, got {kind} of shape {shape}")
    if kind.itemsize * math.prod(shape) != len(data) - file.tell():
        raise ValueError(f"the head says {kind} {shape}, which is not what follows")
    file.seek(0)
    found: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _checked(kmers: list[str]) -> list[str]:
    wrong = next((k for k in kmers if len(k) != _LENGTH or set(k) - set(LETTERS)), None)
    if wrong is not None:
        raise ValueError(f"expected 8-mers of the letters {LETTERS}, got {wrong!r}")
    if len(set(kmers)) < len(kmers) or not kmers:
        raise ValueError(f"expected each 8-mer once, got {len(kmers)}")
    return kmers


def read_all() -> tuple[list[str], Tensor]:
    """The same from the 33 raw files, each fetched and verified."""
    kmers: list[str] = []
    rows: list[Tensor] = []
    for gene, replicate, _, digest in EXPERIMENTS:
        file = remote(gene, replicate, digest)
        order, escore = read(fetch(file))
        if kmers and order != kmers:
            raise ValueError(f"{file.name} lists its 8-mers in another order than the files before")
        kmers, rows = order, [*rows, escore]
    return kmers, torch.stack(rows)


def read(path: Path) -> tuple[list[str], Tensor]:
    """One raw file, `8-mer TAB reverse complement TAB E-score TAB median TAB Z-score`: K 8-mers, E-scores (K,).

    Raises ValueError for a different header, for a line whose second column is not the first's reverse complement, for
    an 8-mer of other letters or that occurs twice, and for an E-score outside [-0.5, 0.5].
    """
    with parsing(path, "a file of E-scores"):
        header, *lines = content(path).decode("ascii").splitlines() or [""]
        if header.split("\t") != _HEADER:
            raise ValueError(f"expected the columns {_HEADER}, got {header[:80]!r}")
        kmers, escore = [], []
        for line in lines:
            cells = line.split("\t")
            if (
                len(cells) != 5
                or len(cells[0]) != _LENGTH
                or cells[1] != reverse_complement(cells[0])
            ):
                raise ValueError(f"expected an 8-mer and its reverse complement, got {line[:80]!r}")
            kmers.append(cells[0])
            escore.append(number(cells[2], -0.5, 0.5, "an E-score"))
        return _checked(kmers), torch.tensor(escore)


_TABLE = """
ARX R1 homeodomain 301d23160c3f980ff970268ebb77eb8da703ef06b11da2eab2ecd6c2a8d1c96f
CRX R1 homeodomain 5e09bdc2e27889fac07cc566ad7674f478387565ee1675707eacb9537457319c
EGR2 R1 C2H2 dc1636c510d399b2db21d5e8e9d144faba2c7646a5cac522195136ea144b2ab2
ESX1 R1 homeodomain 5f94a8523f75e1a29da31e4efc586d97a2e53bf04e2bf9e76e983415d6d03957
FOXC1 R1 forkhead 467861bf0e06618f909fc6530313c0e4fddffd137b9d025f16937a98a66acdc9
GFI1 R1 C2H2 257c630d26e947c9af1b5ee301b5f300b9489e122f5966347d1db211d75ccf23
GFI1B R2 C2H2 cbf4ec4e31e45b6bd7d9857cfa213c766e714870092c2b0fe9d8bf867befadc2
HESX1 R1 homeodomain 56421f65aee644691f1b84b2552c56ebbc1eb7a81fcb80bc4a1f3db6719511c9
HOXC4 R1 homeodomain f9f582ebd25dc3e77ac22a11e061e6866304ce1d0d72b173801f380a148e722a
HOXD13 R1 homeodomain 0c5a6208e85339f153f88faba2269b76d01261861777b330580b1f7c94001d0f
ISX R1 homeodomain f7ccedc8d31952f72c34892ef8fdb74eef61dce6123432e7cd0deb62fc6cf921
KLF1 R1 C2H2 4450dfef55600c20024b056d89b8998d92bfe07d55b0b538096eac1099483bd8
MSX2 R1 homeodomain d3fa5e9c710e2bc0ab075510cf7cfdef72b5439b016594c738a0e3b3af2a8bd3
NKX2-5 R1 homeodomain ef01f9e3e89f4bf497d9b2956284b29da2f574061c6f5741ba680b74759afe92
NKX2-8 R1 homeodomain 244f947a7ea6d4a0cbc4fb1f55c252a6c70a3929c363925431936b2bce1d5375
NR1H4 R1 nuclear_receptor 14f72d72a48637daf4656528e277789c57a664f62745e21a0efeae3ed142d61e
OVOL2 R1 C2H2 7bace4ae960f16daa9dfcee0ae2c579d24fc0a17d87d0cbaefe37349b7fd8ee0
PAX3 R1 paired+homeodomain 46081c7125940cbc3a56f078a382d8438f8228c41317d874dcd69e7aab82d7a0
PAX4 R3 paired+homeodomain b67922cc41b7039ce74b8f09c88e86aef279267969bf361991bf23f64e5bb64e
PBX4 R2 homeodomain e5f35b9156d2aea03b652a300186c84a621cb7073ec81b1c80c3f436767dda12
PHOX2B R1 homeodomain 7f7ffd653ffadfd504194a60061084a795eb7d3706b5eaf6b35c16804a81e1fc
PITX2 R1 homeodomain d1044d7e10df72089df632bdbe50b1b7426278ec092b5dc1155a51a9b80f2b43
POU3F4 R1 POU+homeodomain fe4d6c529a8a380445fe9b9f2f6e9daeca3b67de93a784a69ff556b5cf5f8bdf
POU4F3 R1 POU+homeodomain 2fdef3fa3970c2930caa812ce7cd64415d6c61bbdf43e45331a5ae4fdd10fa3b
POU6F2 R1 POU+homeodomain 39f83e3b458c9f951cdd6a163cf67450a70568800aec291c22cd2e9c8f9b1a2c
PROP1 R1 homeodomain 88a259507ed90caedc2c0379a4185532724d2e9a597ca1891286db3ed91d7317
SIX6 R1 homeodomain cf586a49b3409c5c525512dcef99d16db9f5d0c3dbca75b12aae111934bf114d
SNAI2 R1 C2H2 a2bd4adb9704935ce4e700df4111fb9e9d863fa0e203f54e10f877b3018f7fe4
VAX2 R2 homeodomain 92e3e6bd1f57a678f8c927133ce053bbcd351d9d6d948d0ed6d5e5f94919ce76
VSX1 R1 homeodomain 0efe67c2adc63c0c82f2a7c4050b60951848ccd7f6d51dfe501f701b389d8895
VSX2 R1 homeodomain b84645946db59461d461efb26c61887f2982aea118fc88768824eaf35a9ebc52
ZNF200 R1 C2H2 eeb53500c760c0acf6977d58b8d08978a79d1f50b336c82308043ab2acb349ab
ZNF655 R1 C2H2 cf66b3800108b9e8df9add80984e6b2849ef4e83d0c3a3652b6ac05b7ec404c6
"""

EXPERIMENTS = tuple(tuple(line.split()) for line in _TABLE.split("\n") if line)
"""Gene, replicate, family of the binding domain, SHA-256 of the raw file."""
