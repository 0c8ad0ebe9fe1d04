"""What a release needs: one version, a change log, the workflows, and a wheel with all its files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mtlib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mtlib.__version__"}
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert str(Version(mtlib.__version__)) == mtlib.__version__


def test_the_change_log_names_what_comes_and_then_the_releases():
    heads = re.findall(r"(?m)^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf8"))
    assert heads[0] == "[Unreleased]"
    for head in heads[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", head), head


# The lowest versions -------------------------------------------------------------------------


def lowest(*extras: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lowest.py"), *extras]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_lowest_versions_are_the_bounds():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["pages"], *extras["book"][1:]]
    printed = [Requirement(line) for line in lowest("pages", "book").stdout.splitlines()]
    for r, low in zip(map(Requirement, wanted), printed, strict=True):
        assert low.name == r.name
        bounds = {s.version for s in r.specifier if s.operator == ">="}
        assert {(s.operator, s.version) for s in low.specifier} == {("==", v) for v in bounds}
    assert lowest("figures").returncode == 2


# The workflows -------------------------------------------------------------------------------


def workflow(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text("utf8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_parse_and_pin_their_actions(path):
    jobs = workflow(path)["jobs"]
    for name, job in jobs.items():
        used = [job["uses"]] if "uses" in job else [s["uses"] for s in job["steps"] if "uses" in s]
        for action in used:
            local = action.startswith("./") and (ROOT / action).is_file()
            assert local or re.search(r"@(release/)?v\d+$", action), f"{name}: {action}"
        needs = job.get("needs", [])
        assert {*([needs] if isinstance(needs, str) else needs)} <= jobs.keys(), name
        assert "uses" in job or "timeout-minutes" in job, f"{name} may run for ever"


def test_a_release_comes_from_a_tag_alone():
    release = workflow(ROOT / ".github/workflows/release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert set(release["jobs"]["publish"]["needs"]) == {"ci", "build"}
    writing = [name for name, job in release["jobs"].items() if "permissions" in job]
    assert writing == ["publish"]


def test_style_comes_first():
    jobs = workflow(ROOT / ".github/workflows/ci.yml")["jobs"]
    assert [name for name, job in jobs.items() if job.get("needs") != "style"] == ["style"]


# The wheel -----------------------------------------------------------------------------------


def test_the_wheel_has_all_the_packages_files(tmp_path):
    """Built from a copy of what git has, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", "70.1", reason="the first that builds wheels by itself")
    command = ["git", "ls-files", "-z", "mtlib", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [n for n in listed.stdout.split("\0") if n and (ROOT / n).is_file()]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--wheel-dir", str(tmp_path), str(tmp_path / "tree")]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob(f"mtlib_book-{mtlib.__version__}-*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("mtlib/")}
    assert held == {n for n in names if n.startswith("mtlib/")}
    assert "mtlib/py.typed" in held and "mtlib/book/results/benchmarks/book.json" in held
