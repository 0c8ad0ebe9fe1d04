"""Recorded results: written whole, compared with what a page computes, refused where they make no sense."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

from mtlib.book import results
from mtlib.book.results import (
    Entry,
    Paired,
    Result,
    made,
    paired,
    record,
    recorded,
    recorded_pages,
)
from mtlib.evaluate import interval

APPLICATIONS = ("images", "digits", "detection", "intents", "sentiment", "films", "genes", "heart")

GOOD = Result(
    page="trees",
    field="Botany",
    metric="accuracy",
    higher=True,
    labels="5 leaves",
    protocol="leaves of other trees",
    data="leaves (real)",
    entries=(Entry("nearest leaf", "baseline", 0.7, 0.02), Entry("ours", "meta", 0.8, 0.02, 0.01)),
    gain=Paired("ours", "nearest leaf", 0.1, 0.08, 0.12),
    details={"by tree": [0.7, 0.9]},
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    return tmp_path


def test_a_result_is_recorded_with_its_provenance_and_read_again(folder, monkeypatch):
    assert "nothing is recorded" in record(GOOD) and recorded_pages() == []
    monkeypatch.setenv("MTLIB_RECORD", "1")
    assert record(GOOD) == "recorded as trees.json"
    assert recorded("trees") == GOOD and recorded_pages() == ["trees"]
    assert {"date", "commit", "device", "python", "versions"} == made("trees").keys()
    assert [p.name for p in folder.iterdir()] == ["trees.json"]


def test_a_page_is_held_to_what_was_recorded(folder, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    record(GOOD)
    monkeypatch.delenv("MTLIB_RECORD")
    near, far = (Entry("ours", "meta", m, 0.02, 0.01) for m in (0.815, 0.83))
    assert record(GOOD._replace(entries=(GOOD.entries[0], near))) == "agrees with trees.json"
    with pytest.raises(ValueError, match=r"ours: 0\.8300 here, 0\.8000"):
        record(GOOD._replace(entries=(GOOD.entries[0], far)))
    other = GOOD.entries[1]._replace(method="another")
    with pytest.raises(ValueError, match="has no 'another'"):
        record(GOOD._replace(entries=(*GOOD.entries, other)))


def test_a_dirty_tree_is_not_recorded_from(folder, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    for at in ("0123456789ab-dirty", "unknown"):
        monkeypatch.setattr(results, "commit", lambda at=at: at)
        with pytest.raises(ValueError, match="commit first"):
            record(GOOD)
    assert list(folder.iterdir()) == []


def test_where_git_knows_nothing_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.commit.cache_clear()
    assert results.commit() == "unknown"
    results.commit.cache_clear()


def test_a_commit_is_dirty_by_a_changed_file_and_not_by_a_record(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for name in ("page.py", "page.json"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    results.commit.cache_clear()
    assert re.fullmatch("[0-9a-f]{12}", results.commit())
    results.commit.cache_clear()
    (tmp_path / "page.json").write_text("2")
    (tmp_path / "new.txt").write_text("2")
    assert re.fullmatch("[0-9a-f]{12}", results.clean_commit())
    (tmp_path / "page.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{12}", results.commit())  # as it was when first asked
    results.commit.cache_clear()
    assert results.commit().endswith("-dirty")
    with pytest.raises(ValueError, match="commit first"):
        results.clean_commit()
    results.commit.cache_clear()


# Recorded from a changed tree, before that was refused: each leaves the list when its page is recorded anew.
DIRTY: set[str] = set()


def test_records_are_of_a_clean_commit():
    assert {p for p in recorded_pages() if made(p)["commit"].endswith("-dirty")} == DIRTY


def test_stand_in_data_are_never_recorded(folder, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    assert record(GOOD._replace(data="leaves (stand-in)")).startswith("not recorded")
    assert list(folder.iterdir()) == []


def test_what_is_not_a_number_is_refused_in_details_too_and_leaves_no_file(folder, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    with pytest.raises(ValueError, match="JSON"):
        record(GOOD._replace(details={"tried": [0.7, float("nan")]}))
    assert list(folder.iterdir()) == []


def test_what_makes_no_sense_is_refused(folder):
    bad = GOOD.entries[0]
    for entries, said in (
        ((bad, bad), "one entry per method"),
        ((bad, bad._replace(method="x", kind="magic")), "kind of 'x'"),
        ((bad, bad._replace(method="x", mean=float("nan"))), "finite"),
        ((bad,), "gain between two entries"),
    ):
        with pytest.raises(ValueError, match=said):
            record(GOOD._replace(entries=entries))
    with pytest.raises(FileNotFoundError, match="no result is recorded for 'oaks'"):
        recorded("oaks")


def test_a_paired_row_has_the_widest_of_its_intervals():
    over = {
        "users": interval(torch.tensor([0.1, 0.3, 0.2])),
        "seeds": interval(torch.tensor([0.0, 0.5])),
    }
    row = paired("ours", "rival", over)
    assert (row.unit, row.n) == ("seeds", 2) and row.mean == pytest.approx(0.2)
    assert row.high - row.mean == pytest.approx(over["seeds"].interval)
    assert paired("ours", "rival", over, 0.25).mean == 0.25
    assert paired("ours", "rival", over["users"]).unit == ""
    for wrong, error in (({}, ValueError), (0.3, TypeError), ({"users": 0.3}, TypeError)):
        with pytest.raises(error):
            paired("ours", "rival", wrong)


def test_versus_is_of_a_meta_learner_and_transfer_and_says_over_what(folder, monkeypatch):
    monkeypatch.setenv("MTLIB_RECORD", "1")
    entries = (*GOOD.entries, Entry("tuned leaf", "transfer", 0.75, 0.02))
    good = GOOD._replace(
        entries=entries, versus=Paired("ours", "tuned leaf", 0.05, 0.01, 0.09, "trees", 12)
    )
    record(good)
    assert recorded("trees") == good
    for changed, said in (
        ({"baseline": "nearest leaf"}, "one that is transfer"),
        ({"ours": "tuned leaf"}, "an entry that is meta"),
        ({"ours": "no such"}, "an entry that is meta"),
        ({"unit": ""}, "unit"),
        ({"n": 1}, "how many"),
    ):
        with pytest.raises(ValueError, match=said):
            record(good._replace(versus=good.versus._replace(**changed)))


# Applications that are not written anew yet have no `versus`.
WITHOUT = {"digits"}


def test_every_application_says_what_meta_gains_on_transfer():
    assert {p for p in APPLICATIONS if recorded(p).versus is None} == WITHOUT


def test_what_the_package_ships_is_whole():
    for page in recorded_pages():
        result = recorded(page)
        results._check(result)
        assert result.page == page and result.data.endswith("(real)")
        assert set(made(page)) >= {"date", "commit", "device", "versions"}
        json.dumps(result)
