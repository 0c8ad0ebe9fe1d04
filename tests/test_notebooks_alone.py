"""Each notebook by itself: copied into an empty folder, on a machine like Colab that has not got the package.

The first cell installs it from the repository's address, which git is told to find in a copy of this tree.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from machine import ROOT
from pages import NOTEBOOKS

ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["urls"][
    "Repository"
]
COLAB = [  # what Colab has; newer torch, as pinned, because of its builds without CUDA
    *re.findall(r"(?m)^(?!torch)\w\S*==\S+$", (ROOT / "tools/colab.txt").read_text("utf8")),
    "ipykernel==6.17.1",
    "jupyter_client<8",
    "nbclient==0.10.4",
    "torch==2.13.0",
]
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "JUPYTER_PATH", "JUPYTER_CONFIG_PATH")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A git repository with this tree's files, committed on `main`: what stands at the address, by then."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    there = tmp_path_factory.mktemp("repository")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, there / name)
    who = [
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    run("git", "init", "--quiet", "--initial-branch=main", cwd=there)
    run("git", "add", "--all", "--force", cwd=there)
    run("git", *who, "commit", "--quiet", "--no-verify", "--message=this tree", cwd=there)
    return there


@pytest.fixture(scope="session")
def environment(repository, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder of programs of a fresh environment, and the variables to run them with."""
    fresh = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", fresh)
    programs = fresh / "bin"
    variables = {k: v for k, v in os.environ.items() if k not in HIDDEN} | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "IPYTHONDIR": str(fresh / "ipython"),
        "JUPYTER_CONFIG_DIR": str(fresh / "jupyter"),
        "JUPYTER_DATA_DIR": str(fresh / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
        "MTLIB_SCALE": "small",
        "MTLIB_PROGRESS": "0",
        "OMP_NUM_THREADS": "1",
    }
    run(programs / "pip", "install", "--quiet", *COLAB, env=variables)
    return programs, variables


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_alone(notebook, environment, tmp_path):
    programs, variables = environment
    have = "import importlib.metadata as m; print(*[d.name for d in m.distributions()])"
    if "mtlib-book" in run(programs / "python", "-c", have, env=variables).split():
        run(programs / "pip", "uninstall", "--quiet", "--yes", "mtlib-book", env=variables)

    shutil.copyfile(notebook, tmp_path / notebook.name)
    run(
        programs / "jupyter-execute",
        "--kernel_name=python3",
        "--timeout=300",
        notebook.name,
        cwd=tmp_path,
        env=variables,
    )

    where = "import mtlib; print(mtlib.__file__)"
    used = run(programs / "python", "-c", where, cwd=tmp_path, env=variables).strip()
    assert Path(used).is_relative_to(programs.parent), f"the package came from {used}"
    installed = run(programs / "pip", "freeze", env=variables).splitlines()
    for pin in (pin for pin in COLAB if "==" in pin):
        assert any(line.startswith(pin) for line in installed), (
            f"installing the book replaced {pin}"
        )
