"""The benchmarks run, and what they time reaches the same end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_probes_objective_is_no_worse_than_that_of_epochs():
    command = [sys.executable, "benchmarks/linear_probe.py"]
    command += ["--images", "40", "--epochs", "3", "--repeats", "1", "--batch", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["objective"]["probe"] <= report["objective"]["epochs"]
    assert min(report["seconds"].values()) > 0
    assert report["setting"]["images"] == 40 and report["provenance"]["versions"]["torch"]
