"""Binding of 8-mers: the real files, both strands, the drawn motifs, the page's metrics and its choices."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from machine import FOLDER, damage, files_of, real, served
from pages import run_until
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from mtlib.data import download, motifs
from mtlib.data import tf_binding as module
from mtlib.data.download import Altered
from mtlib.data.motifs import STRONG, canonical, counts, drawn, log_odds, reverse_complement
from mtlib.data.tf_binding import ARCHIVE, EXPERIMENTS, read, remote, tf_binding

there = real("tf_binding")


@there
def test_counts_and_traps():
    data = tf_binding()
    assert data.source.endswith("(real)") and data.escore.shape == (33, 32896)
    assert len(set(data.genes)) == 33 and data.escore.abs().max() <= 0.5
    assert sum("homeodomain" in f for f in data.families) == 23
    assert not {"BCL6", "HOXB7", "KLF11", "NR2E3", "PAX6", "PAX7", "VENTX", "WT1"} & set(data.genes)
    assert data.kmers == canonical(8)
    strong = dict(zip(data.genes, (data.escore > STRONG).sum(1).tolist(), strict=True))
    assert strong.pop("PHOX2B") == 37 and min(strong.values()) >= 50


@there
def test_the_archive_holds_what_the_raw_files_hold():
    data, seen = tf_binding(), 0
    for gene, replicate, _, digest in EXPERIMENTS:
        file = remote(gene, replicate, digest)
        if (FOLDER / file.name).exists():
            kmers, escore = read(download.fetch(file))
            assert kmers == data.kmers
            torch.testing.assert_close(escore, data.escore[data.genes.index(gene)], atol=0, rtol=0)
            seen += 1
    assert seen == 3


@there
def test_an_altered_archive_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / ARCHIVE.name
    copy.parent.mkdir()
    shutil.copyfile(FOLDER / "tf_binding" / "pbm_escores.npz", copy)
    damage(copy)
    monkeypatch.setenv("MTLIB_DATA", str(tmp_path))
    with pytest.raises(Altered, match="pbm_escores"):
        tf_binding()


@there
def test_a_reader_downloads_the_raw_files(home, monkeypatch):
    here = [row for row in EXPERIMENTS if row[0] in ("CRX", "FOXC1", "KLF1")]
    monkeypatch.setattr(module, "EXPERIMENTS", here)
    with served(files_of(FOLDER / "tf_binding")) as url:
        monkeypatch.setattr(module, "_FOLDER", url)
        data = tf_binding()
    assert data.genes == ["CRX", "FOXC1", "KLF1"] and data.source.endswith("(real)")
    assert len(list((home / "cache" / "tf_binding").iterdir())) == 3
    assert data.kmers == canonical(8) and (data.escore > STRONG).sum(1).tolist() == [157, 68, 82]


def test_every_address_is_pinned():
    for gene, replicate, _, digest in EXPERIMENTS:
        file = remote(gene, replicate, digest)
        assert "/dd409167b5575b51967d325b4e48aef3577a505f/" in file.url
        assert file.url.endswith(f"/{gene}_REF_{replicate}_8mers.txt")
        assert len(digest) == 64
    assert len({row[3] for row in EXPERIMENTS}) == 33


def test_a_file_that_is_none_is_refused(tmp_path):
    header = "8-mer\t8-mer\tE-score\tMedian\tZ-score\n"
    for text, message in (
        ("kmer\tE\n", "expected the columns"),
        (header + "AAAAAAAC\tGTTTTTTA\t0.1\t1\t1\n", "reverse complement"),
        (header + "AAAAAAAC\tGTTTTTTT\t0.7\t1\t1\n", "from -0.5 to 0.5"),
    ):
        path = tmp_path / "file.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_both_strands_have_the_same_words():
    assert reverse_complement("AACG") == "CGTT"
    found = canonical(8)
    assert len(found) == (4**8 + 4**4) // 2 and found == sorted(found)
    some = found[::97]
    lengths = (1, 2, 3, 4)
    a, b = counts(some, lengths), counts([reverse_complement(s) for s in some], lengths)
    for length, x, y in zip(lengths, a, b, strict=True):
        torch.testing.assert_close(x, y)
        assert (x.sum(1) == 8 - length + 1).all()
        assert x.shape[1] == len(canonical(length))
    (one,) = counts(["AACG"], (2,))
    assert {w for w, n in zip(canonical(2), one[0], strict=True) if n} == {"AA", "AC", "CG"}


def test_log_odds_keep_the_order_and_the_slope():
    e = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64).requires_grad_()
    y = log_odds(e, margin=0.0 + 1e-9)
    assert (y.diff() > 0).all()
    (slope,) = torch.autograd.grad(y.sum(), e)
    torch.testing.assert_close(slope[500].item(), 1.0, atol=1e-6, rtol=0)
    assert slope[950] > 4  # at E = 0.45


def test_the_stand_in_is_the_same_each_time_and_says_so(offline):
    data = tf_binding()
    assert data.source.endswith("(stand-in)") and data.kmers == canonical(8)
    torch.testing.assert_close(data.escore, drawn().escore, atol=0, rtol=0)
    assert not torch.equal(data.escore, drawn(seed=1).escore)
    assert data.escore.abs().max() <= 0.5 and ((data.escore > STRONG).sum(1) > 50).all()
    near = torch.tensor(["homeodomain" in f for f in data.families])
    alike = torch.corrcoef(data.escore)
    assert alike[near][:, near].median() > 0.5 > 0.2 > alike[near][:, ~near].median().abs()


def test_a_motif_is_found_on_either_strand():
    motif = np.zeros((6, 4))
    motif[np.arange(6), [0, 1, 2, 3, 0, 0]] = 5.0  # ACGTAA
    words = ["TTACGTAA", "ACGTAATT", "GGGGGGGG"]
    both = words + [reverse_complement(w) for w in words]
    letters = np.array([["ACGT".index(c) for c in w] for w in both])
    found = motifs._best_match(letters, motif)
    np.testing.assert_allclose(found[:3], found[3:])
    assert min(found[0], found[1]) > found[2] + 4


@pytest.fixture(scope="module")
def few():
    return drawn(length=6)


def page(small, data, name):
    small.setattr(module, "tf_binding", lambda: data)
    return run_until("genes", name)


def test_the_pages_metrics_are_those_of_the_libraries(small, few):
    space = page(small, few, "quality")
    p = np.random.default_rng(0).normal(size=len(few.kmers)) + 2 * few.escore[0].numpy()
    _, asked, _, _ = space["question"](0, 10, 0)
    e = few.escore[0].numpy()[asked]
    wanted = (
        spearmanr(p[asked], e).statistic,
        roc_auc_score(e > STRONG, p[asked]),
        average_precision_score(e > STRONG, p[asked]),
    )
    np.testing.assert_allclose(space["quality"](p, 0, 10, 0), wanted, rtol=1e-9)


def test_no_gene_is_read_by_its_own_task(small, few):
    """A gene's columns of x are blank in its own episodes, and test genes appear in none."""
    space = page(small, few, "tasks")
    genes = (0, 1, 2, 3, 10, 11, 12, 13)  # 4 homeobox, 3 C2H2, one forkhead without relatives
    draw = space["tasks"](genes, "E-scores", True, 0)(1)
    columns = torch.cat([draw.support.x, draw.query.x], 1)[..., 180:-2]
    blank = (columns == 0).all(1).unflatten(1, (2, 16)).all(1)  # (T, G)
    assert blank[:, [g for g in range(16) if g not in genes]].all()
    assert (blank[:, list(genes)].sum(1) == 1).all()  # the gene's own


def test_relatives_and_strangers_have_columns_of_their_own(small, few):
    """Means and deviations by hand: of the genes of a family, and of the others; without a family all are relatives."""
    space = page(small, few, "read")
    genes, rows = (0, 1, 10, 11), torch.tensor([3, 5])
    y = few.escore[list(genes)][:, rows]
    x = space["read"](rows, genes, "E-scores", "homeodomain")
    kin, strange = x[:, 180:196], x[:, 196:212]
    torch.testing.assert_close(x[:, 212], y[:2].mean(0))
    torch.testing.assert_close(x[:, 213], y.mean(0))
    torch.testing.assert_close(kin[:, 0], (y[0] - y[1]) / 2 / 2**0.5)
    torch.testing.assert_close(strange[:, 11], (y[3] - y.mean(0)) / 2**0.5)
    assert kin[:, 2:].count_nonzero() == 0 and strange[:, :10].count_nonzero() == 0
    alone = space["read"](rows, genes, "E-scores", "forkhead")
    torch.testing.assert_close(alone[:, 212], y.mean(0))
    torch.testing.assert_close(alone[:, 190], (y[2] - y.mean(0)) / 2)
    assert alone[:, 196:212].count_nonzero() == 0


def shuffled(data, genes):
    """The data with each of these genes' scores in another order."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data.kmers)))
    escore = data.escore.clone()
    escore[list(genes)] = escore[list(genes)][:, order]
    assert not torch.equal(escore, data.escore)
    return data._replace(escore=escore)


def test_the_settings_are_chosen_without_labels_of_the_test_genes(small, few):
    """With the test genes' scores shuffled, everything that is chosen stays, to the last digit of its score."""
    space = page(small, few, "CHOSEN")
    before, (_, held, tested) = space["CHOSEN"], space["parts"](1)
    assert set(before) == {"1"}
    assert set(before["1"]["methods"]) == {*space["BASELINES"], *space["LEARNED"]}
    assert page(small, shuffled(few, tested), "CHOSEN")["CHOSEN"] == before
    other = page(small, shuffled(few, held), "CHOSEN")["CHOSEN"]
    assert other != before  # it does look at the validation genes


def test_the_homeobox_settings_are_chosen_without_labels_of_other_families(small, few):
    space = page(small, few, "HOMEOBOX")
    before = space["choose_all"](*space["HOMEOBOX"])
    far = [i for i, family in enumerate(few.families) if family != "homeodomain"]
    assert not set(far) & {*space["HOMEOBOX"][0], *space["HOMEOBOX"][1]}
    space = page(small, shuffled(few, far), "HOMEOBOX")
    assert space["choose_all"](*space["HOMEOBOX"]) == before


def test_every_gene_is_tested_once_and_trains_in_no_fold_of_its_own(small, few):
    space = page(small, few, "parts")
    folds = [space["parts"](k) for k in range(space["FOLDS"])]
    assert sorted(g for _, _, tested in folds for g in tested) == list(range(16))
    for train, held, tested in folds:
        assert sorted(train + held + tested) == list(range(16))
