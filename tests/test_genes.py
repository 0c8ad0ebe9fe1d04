"""Binding of 8-mers: the real files, both strands, the drawn motifs, looked-up profiles, the page's numbers and choices."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from machine import FOLDER, damage, files_of, real, served
from pages import run_until
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score

from mtlib.book.results import recorded
from mtlib.data import download, motifs
from mtlib.data import tf_binding as module
from mtlib.data.download import Altered
from mtlib.data.motifs import (
    STRONG,
    canonical,
    counts,
    drawn,
    log_odds,
    looked_up,
    reverse_complement,
)
from mtlib.data.tf_binding import ARCHIVE, EXPERIMENTS, read, remote, tf_binding
from mtlib.evaluate import interval
from mtlib.learners.closed_form import ridge_toward

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


def test_looked_up_profiles_have_relatives_strangers_and_means():
    """By hand: three known genes, two of them relatives; where none is akin, all are."""
    y = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
    x = looked_up(y, torch.tensor([True, True, False]), [4, 0, 2], 5)
    assert x.shape == (2, 12)
    kin, strange, means = x[:, :5], x[:, 5:10], x[:, 10:]
    torch.testing.assert_close(means, torch.tensor([[2.0, 3.0], [1.0, 2.0]]))
    torch.testing.assert_close(kin[:, [4, 0]], torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) / 2**0.5)
    torch.testing.assert_close(strange[:, 2], torch.tensor([2.0, 2.0]))
    assert kin[:, 1:4].count_nonzero() == 0 == strange[:, [0, 1, 3, 4]].count_nonzero()
    alone = looked_up(y, torch.zeros(3, dtype=torch.bool), [4, 0, 2], 5)
    assert alone[:, 5:10].count_nonzero() == 0
    torch.testing.assert_close(alone[:, 10], y.mean(0))


# The page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    return drawn(length=6)


def page(small, data, name):
    small.setattr(module, "tf_binding", lambda: data)
    return run_until("genes", name)


def test_the_pages_metrics_are_those_of_the_libraries(small, few):
    space = page(small, few, "quality")
    p = np.random.default_rng(0).normal(size=len(few.kmers)) + 2 * few.escore[0].numpy()
    asked, _, _ = space["asked"](0, 10, 0)
    assert len(asked) == len(few.kmers) - 10
    e = few.escore[0].numpy()[asked]
    wanted = spearmanr(p[asked], e).statistic, average_precision_score(e > STRONG, p[asked])
    np.testing.assert_allclose(space["quality"](p, 0, 10, 0), wanted, rtol=1e-9)


def test_no_gene_is_read_by_its_own_task(small, few):
    """A gene's columns of x are blank in its own episodes, and those of test genes in all."""
    space = page(small, few, "tasks")
    genes = (0, 1, 2, 3, 10, 11, 12, 13)  # 4 homeobox, 3 C2H2, one forkhead without relatives
    draw = space["tasks"](genes, 1000, 0, 1)
    columns = torch.cat([draw.support.x, draw.query.x], 1)[..., -34:-2]
    blank = (columns == 0).all(1).unflatten(1, (2, 16)).all(1)  # (T, G)
    assert blank[:, [g for g in range(16) if g not in genes]].all()
    assert (blank[:, list(genes)].sum(1) == 1).all()  # the gene's own
    assert len(draw.support.x[0]) == space["LABELS"][1]


def shuffled(data, genes):
    """The data with each of these genes' scores in another order."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data.kmers)))
    escore = data.escore.clone()
    escore[list(genes)] = escore[list(genes)][:, order]
    assert not torch.equal(escore, data.escore)
    return data._replace(escore=escore)


def choices_of(space, fold):
    """Every way's qualities on the known genes of a fold, of a few settings of its grid."""
    ways = {k: way._replace(grid=way.grid[::11]) for k, way in space["WAYS"].items()}
    space["WAYS"].update(ways)
    found = {k: space["trial"](k, fold) for k in ways}
    assert all(len(found[k]) == len(ways[k].grid) for k in ways)
    return found


def test_the_settings_are_chosen_without_labels_of_the_test_genes(small, few):
    """With the test genes' scores shuffled, every quality that decides stays, to its last digit."""
    space = page(small, few, "chosen")
    before, tested, held = choices_of(space, 1), space["FOLD"][1], space["FOLD"][0]
    assert choices_of(page(small, shuffled(few, tested), "chosen"), 1) == before
    assert choices_of(page(small, shuffled(few, held), "chosen"), 1) != before


def test_every_gene_is_tested_once_and_trains_in_no_fold_of_its_own(small, few):
    space = page(small, few, "without")
    assert sorted(g for part in space["FOLD"] for g in part) == list(range(16))
    for k, tested in enumerate(space["FOLD"]):
        held = space["FOLD"][k - 1]
        known = space["without"](held, tested)
        assert sorted([*known, *held, *tested]) == list(range(16))
        assert space["without"](tested) == tuple(sorted([*known, *held]))


def test_a_way_that_learned_nothing_says_what_its_head_says(small, few):
    """The mean of relatives, whatever the labels; and a k-mer ridge is scikit-learn's on centred words."""
    space = page(small, few, "WAYS")
    genes, y = tuple(range(1, 10)), log_odds(few.escore)
    grid = space["WAYS"]["mean of relatives"].grid
    [said] = space["answers"]("mean of relatives", genes, 0, 50, 0, grid)
    np.testing.assert_allclose(said, y[1:10].mean(0), atol=1e-5)
    [said] = space["answers"]("k-mer ridge", genes, 0, 50, 0, [(1.0, "as they are", 0.1, "zero")])
    x = np.concatenate([space["KMERS"], np.ones((len(said), 1))], 1)
    rows = space["mixed"](50, 0, 0)[:50]
    model = Ridge(alpha=0.1, fit_intercept=False).fit(x[rows], y[0].numpy()[rows])
    np.testing.assert_allclose(said, model.predict(x), atol=2e-4)


# The record ------------------------------------------------------------------------------------


@there
def test_the_headline_numbers_are_scikit_learns_on_the_real_data():
    """Near genes, fifty labels, seed 0: features, ridge and rank correlation computed anew from the E-scores."""
    data, details = tf_binding(), recorded("genes").details
    name, column = "transferred, by a grid", "Spearman, 50"
    each = details["genes"]["ways"][name]["columns"][column]["each"]
    cases = [at.split(" to ") for at in details["genes"]["between"]]
    tables = counts(data.kmers, (1, 2, 3, 4))
    words = np.concatenate(tables, 1) - np.concatenate(tables, 1).mean(0)
    words = words / np.sqrt((words**2).sum(1).mean())
    e = data.escore.numpy().astype(float)
    y = np.log((0.502 + e) / (0.502 - e)) / 4
    home = np.array(["homeodomain" in f for f in data.families])
    family = np.where(home, "homeodomain", data.families)
    mine, theirs = [], []
    for (fold, called), runs in zip(cases, each, strict=True):
        gene = data.genes.index(called)
        if not home[gene]:
            continue
        tested = [data.genes.index(g) for f, g in cases if f == fold]
        others = np.setdiff1d(np.arange(len(e)), tested)
        kin = family[others] == family[gene]
        mean, all_of_them = y[others[kin]].mean(0), y[others].mean(0)
        deviations = (y[others[kin]] - mean) / kin.sum() ** 0.5
        strangers = (y[others[~kin]] - all_of_them) / (~kin).sum() ** 0.5
        x = np.stack([*words.T, *deviations, *strangers, mean, all_of_them, np.ones(len(mean))], 1)
        quality = np.array(details["tuning"][name][fold])[:, 1]
        grid = [
            (start, weight, unit, strength)
            for start in (0.0, 1.0)
            for weight in (0.03, 0.1, 0.3, 1.0)
            for unit in (False, True)
            for strength in (0.003, 0.01, 0.03, 0.1)
        ]
        start, weight, unit, strength = grid[quality.argmax()]
        if unit:
            x = x / np.maximum(x.std(0, ddof=1), 1e-3) / 16
        x[:, : words.shape[1]] *= weight
        rows = np.random.default_rng([50, 0, gene]).permutation(len(mean))
        seen, asked = rows[:50], rows[50:]
        model = Ridge(alpha=strength, fit_intercept=False).fit(
            x[seen], (y[gene] - start * mean)[seen]
        )
        said = start * mean + model.predict(x)
        mine.append(spearmanr(said[asked], e[gene][asked]).statistic)
        theirs.append(runs[0])
    assert len(mine) == 23
    np.testing.assert_allclose(mine, theirs, atol=2e-3)
    assert np.mean(mine) == pytest.approx(np.mean(theirs), abs=3e-4)


def test_versus_is_the_mean_difference_over_genes_with_its_widest_interval():
    result = recorded("genes")
    ways = result.details["genes"]["ways"]
    ours, rival = (
        np.array(ways[k]["columns"]["Spearman, 50"]["each"])
        for k in (result.versus.ours, result.versus.baseline)
    )
    d = ours - rival
    assert d.shape == (33, 5) and result.versus.mean == pytest.approx(d.mean())
    half = result.versus.high - result.versus.mean
    over_genes = interval(torch.from_numpy(d.mean(1))).interval
    assert half >= over_genes - 1e-12
    assert (result.versus.unit, result.versus.n) != ("seeds", 5)
    best = {
        k: np.mean([np.array(q)[:, 1].max() for q in folds.values()])
        for k, folds in result.details["tuning"].items()
    }
    kinds = {e.method: e.kind for e in result.entries}
    for kind, chosen in (("meta", result.versus.ours), ("transfer", result.versus.baseline)):
        assert chosen == max((k for k in kinds if kinds[k] == kind), key=best.__getitem__)


@there
def test_the_tables_in_the_solutions(small):
    """Strands apart against joined, and three choices of what to label: eight near genes, the page's own functions."""
    space = run_until("genes", "WAYS")
    mixed, quality, y = space["mixed"], space["quality"], space["Y"].numpy()
    near = np.flatnonzero(space["NEAR"])[::3]
    kmers = [[("ACGT".index(c)) for c in k] for k in space["DATA"].kmers]
    letters, tables = np.array(kmers), []
    for length in (1, 2, 3, 4):
        table = np.zeros((len(letters), 4**length), np.float32)
        for at in range(8 - length + 1):
            word = letters[:, at : at + length] @ 4 ** np.arange(length)
            table[np.arange(len(table)), word] += 1
        tables.append(table)
    apart = np.concatenate(tables, 1)
    apart = apart - apart.mean(0)
    apart = apart / np.sqrt((apart**2).sum(1).mean())
    for n, stated in ((10, (0.54, 0.46)), (50, (0.69, 0.66)), (200, (0.73, 0.72))):
        for x, said in zip((space["KMERS"].numpy(), apart), stated, strict=True):
            found = []
            for gene in near:
                rows = mixed(n, 0, gene)[:n]
                model = Ridge(alpha=3.0 if n == 10 else 0.3).fit(x[rows], y[gene][rows])
                found.append(quality(model.predict(x), gene, n, 0)[0])
            assert np.mean(found) == pytest.approx(said, abs=0.0051), (n, found)
    stated = {"top": (0.85, 0.67), "random": (0.88, 0.69), "spread": (0.89, 0.73)}
    found = {k: [] for k in stated}
    for gene in near:
        genes = tuple(i for i in range(33) if i != gene)
        x, order = space["whole"](gene, genes), np.argsort(-y[list(genes)].var(0, ddof=1))
        labels = {"top": order[:50], "random": mixed(50, 0, gene)[:50], "spread": order[:3000:60]}
        asked = np.setdiff1d(np.arange(len(order)), np.concatenate([*labels.values()]))
        setting = 0.1, "as they are", 0.01, "relatives"
        prior = space["prior"]("transferred, by a grid", genes, gene, 0, *setting)
        e = space["SCORES"][gene][asked]
        for k, rows in labels.items():
            w = ridge_toward(x[rows], space["Y"][gene, rows, None], *prior)
            said = (x @ w)[:, 0].numpy()[asked]
            both = spearmanr(said, e).statistic, average_precision_score(e > STRONG, said)
            found[k].append(both)
    for k, said in stated.items():
        np.testing.assert_allclose(np.mean(found[k], 0), said, atol=0.0051)


def test_twice_the_width_is_a_quarter_of_the_strength():
    g = torch.Generator().manual_seed(0)
    x, y, h = (torch.randn(5, k, generator=g).double() for k in (4, 1, 1))
    d = torch.rand(4, generator=g).double()
    torch.testing.assert_close(
        ridge_toward(x, y, h[:4], 2 * d, 0.4), ridge_toward(x, y, h[:4], d, 0.1)
    )
