"""Every notebook runs on a device that is not the CPU, each in a process of its own: `make test-device`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import ROOT
from page import NOT_HERE
from pages import NOTEBOOKS

PAGE = Path(__file__).with_name("page.py")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_the_device(notebook):
    command = [sys.executable, str(PAGE), str(notebook)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode == NOT_HERE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
