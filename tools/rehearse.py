"""Act out the workflow `publish` on this machine: its own steps, in fresh clones whose remote has a made-up address.

    python tools/rehearse.py                                   # all of it, hours where the environment must be made
    python tools/rehearse.py --here --skip "make test-book"    # with this checkout's environment and what it has built

What is committed is acted out. Pushes go to a repository in a folder; what would be uploaded is kept in another one.
`SCALE=small` before it makes the build quick. The exit status is 1 where a step fails, or an address is left open.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
REMOTE = "https://github.com/someone/mtlib-book.git"
LEFT_OUT = ("setup-python", "cache", "deploy-pages")  # actions that need their place


class Stage:
    """Where the workflow is acted out: `there`, what stands at the address, and `kept`, what jobs hand on."""

    def __init__(self, folder: Path, remote: str = REMOTE, source: Path = ROOT) -> None:
        self.folder, self.remote = folder, remote
        self.there, self.kept = folder / "there.git", folder / "kept"
        run("git", "clone", "--quiet", "--bare", source, self.there)
        run("git", "-C", self.there, "update-ref", "refs/heads/main", "HEAD")
        run("git", "-C", self.there, "symbolic-ref", "HEAD", "refs/heads/main")
        asked = ("git", "-C", self.there, "rev-parse", "main")
        self.commit = subprocess.run(
            asked, check=True, capture_output=True, text=True
        ).stdout.strip()

    def checkout(self, job: str) -> Path:
        """The commit that was pushed, whose remote is the made-up one; only what it pushes goes to the folder."""
        clone = self.folder / job
        run("git", "clone", "--quiet", "--no-checkout", self.there, clone)
        run("git", "-C", clone, "checkout", "--quiet", "-B", "main", self.commit)
        run("git", "-C", clone, "remote", "set-url", "origin", self.remote)
        run("git", "-C", clone, "config", f"url.{self.there}.pushInsteadOf", self.remote)
        return clone

    def act(
        self, name: str, job: dict[str, Any], here: bool = False, skip: tuple[str, ...] = ()
    ) -> None:
        """The steps of one job; CalledProcessError where one fails."""
        clone = self.folder / name
        for step in job["steps"]:
            what = step.get("name") or step.get("uses") or step["run"].strip()
            began = time.perf_counter()
            if "uses" in step:
                done = self.use(
                    step["uses"].split("@")[0].split("/")[-1], step.get("with", {}), name
                )
                if done and here and "checkout" in step["uses"]:
                    lend(clone)
            elif done := not any(text in step["run"] for text in skip):
                run("bash", "-eo", "pipefail", "-c", step["run"], cwd=clone, env=variables(clone))
            took = f"{time.perf_counter() - began:.1f} s" if done else "left out"
            print(f"{name}: {what} ({took})", flush=True)

    def use(self, action: str, told: dict[str, Any], job: str) -> bool:
        """What an action does here; False where it is left out."""
        clone = self.folder / job
        match action:
            case "checkout":
                self.checkout(job)
            case "upload-pages-artifact" | "upload-artifact":
                what, to = clone / told["path"], self.kept / told.get("name", "pages")
                if what.is_dir():
                    shutil.copytree(what, to)
                else:
                    to.mkdir(parents=True)
                    shutil.copy(what, to)
            case "download-artifact":
                shutil.copytree(self.kept / told["name"], clone / told["path"])
            case _:
                if action not in LEFT_OUT:
                    raise ValueError(f"expected one of the known actions, got {action!r}")
                return False
        return True


def variables(clone: Path) -> dict[str, str]:
    hidden = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(clone)}


def lend(clone: Path) -> None:
    """This checkout's environment and what it has built, so that nothing is installed or run twice."""
    (clone / ".venv").symlink_to((ROOT / ".venv").resolve(), target_is_directory=True)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(
            clone / name, (0, 0)
        )  # older than the environment, which `make` would else bring up to date
    if (ROOT / "_build").is_dir():
        shutil.copytree(ROOT / "_build", clone / "_build", symlinks=True)


def run(*command: str | Path, **options: Any) -> None:
    subprocess.run(command, check=True, **options)


def ordered(jobs: dict[str, Any]) -> list[str]:
    """Jobs, each after those it needs."""
    done: list[str] = []
    while left := [name for name in jobs if name not in done]:
        for name in left:
            needs = jobs[name].get("needs", [])
            if {*([needs] if isinstance(needs, str) else needs)} <= {*done}:
                done.append(name)
    return done


def open_addresses(stage: Stage) -> list[str]:
    """Files with a placeholder in what is published."""
    files = [p for p in stage.kept.rglob("*") if p.is_file()]
    return [str(p.relative_to(stage.folder)) for p in files if b"/OWNER/" in p.read_bytes()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remote", default=REMOTE, help="the made-up address")
    parser.add_argument("--here", action="store_true", help="use this checkout's .venv and _build")
    parser.add_argument(
        "--skip", action="append", default=[], help="leave out steps with this text"
    )
    parser.add_argument("--keep", type=Path, help="an empty folder for all of it, which stays")
    options = parser.parse_args(arguments)
    jobs = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf8"))["jobs"]
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(options.keep or Path(folder), options.remote)
        for name in ordered(jobs):
            stage.act(name, jobs[name], options.here, tuple(options.skip))
        left = open_addresses(stage)
        run("git", "-C", stage.there, "log", "--oneline", "-1", "main")
        run("git", "-C", stage.there, "ls-tree", "-r", "--name-only", "notebooks")
    print("\n".join(left) or "no address is left open")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
