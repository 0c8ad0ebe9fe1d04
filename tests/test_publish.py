"""The repository's own address, from its remote, and the workflows that publish the book, acted out without a network."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from machine import ROOT, tool

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
OWN = "https://github.com/someone/mtlib-book"
STAMPED = ["pyproject.toml", "_config.yml", "README.md", "CITATION.cff", "tools/address.py"]


@pytest.fixture(scope="module")
def address() -> ModuleType:
    return tool("address")


def git(folder: Path, *arguments: str) -> str:
    command = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The address ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("https://github.com/someone/mtlib-book.git", OWN),
        ("https://github.com/someone/mtlib-book", OWN),
        ("https://github.com/someone/mtlib-book/", OWN),
        ("https://a-name:a-secret@github.com/someone/mtlib-book.git", OWN),
        ("git@github.com:someone/mtlib-book.git", OWN),
        ("ssh://git@github.com/someone/mtlib-book.git", OWN),
        ("ssh://git@github.com:22/someone/mtlib-book", OWN),
        ("https://GitHub.com/someone/a.b_c", "https://github.com/someone/a.b_c"),
        ("https://gitlab.com/someone/book.git", "https://gitlab.com/someone/book"),
        ("git@github.example.org:someone/book.git", "https://github.example.org/someone/book"),
        ("", None),
        ("../main", None),
        ("/srv/github.com/someone/book", None),
        ("file:///srv/github.com/someone/book.git", None),
        ("C:\\github.com\\book", None),
        ("https://example.org/someone/book.git", None),
        ("https://github.com/someone", None),
        ("https://gitlab.com/group/part/book.git", None),
        ("https://github.com.example.org.evil/a/b c", None),
    ],
)
def test_the_address_of_a_remote(address, remote, expected):
    assert address.of_remote(remote) == expected


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("https://github.com/Some-One/mtlib-book", "https://some-one.github.io/mtlib-book/"),
        ("https://github.com/someone/someone.github.io", "https://someone.github.io/"),
        ("https://gitlab.com/someone/book", ""),
        (None, ""),
    ],
)
def test_where_the_book_is_published(address, repository, expected):
    assert address.published(repository) == expected


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the files that hold the address, and one page; the address is open."""
    for name in STAMPED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    shutil.copyfile(ROOT / "book/background.ipynb", tmp_path / "book/background.ipynb")
    done = tool("address").main(["https://github.com/OWNER/mtlib-book"], tmp_path)
    assert done == 0
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    return tmp_path


def test_a_remote_goes_before_what_is_set(address, copy):
    assert address.known(copy) is None
    git(copy, "remote", "add", "origin", str(copy))
    assert address.known(copy) is None  # a path is no address
    assert address.main(["https://github.com/first/book"], copy) == 0
    assert address.known(copy) == "https://github.com/first/book"
    git(copy, "remote", "set-url", "origin", "git@github.com:someone/mtlib-book.git")
    assert address.known(copy) == OWN


def test_a_repository_around_the_copy_is_another_one(address, copy):
    git(copy, "remote", "add", "origin", "https://github.com/another/project")
    inner = copy / "inner"
    inner.mkdir()
    shutil.copyfile(copy / "pyproject.toml", inner / "pyproject.toml")
    assert address.known(inner) is None


def test_the_remote_is_set_everywhere(address, copy, capsys):
    with pytest.raises(SystemExit):
        address.main(["--remote"], copy)
    assert "git remote get-url origin" in capsys.readouterr().err
    git(copy, "remote", "add", "origin", f"{OWN}.git")
    assert address.main(["--remote"], copy) == 0
    for name in [*STAMPED[:-1], "book/background.ipynb"]:
        text = (copy / name).read_text("utf8")
        assert "/OWNER/" not in text and OWN in text, name


def test_the_installing_cell(address):
    first = address.INSTALL.format(
        extras="pages,text", address="https://github.com/OWNER/mtlib-book"
    )
    assert address.install(first, OWN) == address.INSTALL.format(extras="pages,text", address=OWN)
    alone = address.install(first, None)
    assert 'pip install ".[pages,text]"' in alone and "OWNER" not in alone
    compile(alone, "cell", "exec")
    with pytest.raises(ValueError, match="installs the package"):
        address.install("x = 1", OWN)


# In the build ---------------------------------------------------------------------------------


@pytest.fixture
def own_address(monkeypatch) -> ModuleType:
    pytest.importorskip("sphinx", reason="the extra `book` is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    return importlib.import_module("own_address")


def options(
    module: ModuleType, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    monkeypatch.setattr(module.address, "known", lambda root: known)
    held = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    theme = {"repository_url": held["repository"]["url"], "launch_buttons": held["launch_buttons"]}
    theme |= {name: held["html"][name] for name in module.TO_REPOSITORY}
    config = SimpleNamespace(html_theme_options=theme, html_baseurl="")
    module.set_options(None, config)
    return config


def test_buttons_that_lead_somewhere(own_address, monkeypatch):
    config = options(own_address, OWN, monkeypatch)
    theme = config.html_theme_options
    assert theme["repository_url"] == OWN and theme["launch_buttons"]["colab_url"]
    assert all(theme[name] for name in own_address.TO_REPOSITORY)
    assert config.html_baseurl == "https://someone.github.io/mtlib-book/"


def test_buttons_that_lead_nowhere_are_left_out(own_address, monkeypatch):
    config = options(own_address, None, monkeypatch)
    theme = config.html_theme_options
    assert "repository_url" not in theme and "colab_url" not in theme["launch_buttons"]
    assert not any(theme[name] for name in own_address.TO_REPOSITORY)
    assert config.html_baseurl == ""


def test_elsewhere_than_at_github_there_is_no_colab(own_address, monkeypatch):
    theme = options(own_address, "https://gitlab.com/a/b", monkeypatch).html_theme_options
    assert theme["use_repository_button"] and "colab_url" not in theme["launch_buttons"]


def test_colab_opens_the_branch_with_the_notebooks(own_address):
    colab = {"url": "https://colab.research.google.com/github/a/b/blob/main/book/x.ipynb"}
    edit = {"url": f"{OWN}/edit/main/book/x.ipynb"}
    context = {"header_buttons": [{"buttons": [colab, edit]}, {"type": "javascript"}]}
    own_address.lead_to_notebooks(None, "book/x", "", context, None)
    assert colab["url"].endswith("/github/a/b/blob/notebooks/book/x.ipynb")
    assert edit["url"] == f"{OWN}/edit/main/book/x.ipynb"


def test_a_page_names_the_own_address(own_address, address):
    old = address.address(ROOT)
    text = f"git clone {old} mtlib-book && cd mtlib-book\nurl = {{{old}}}"
    assert own_address.written(text, OWN) == text.replace(old, OWN)
    if "/OWNER/" in old:
        assert own_address.written(text, "") == "cd mtlib-book\nurl = {ADDRESS}"


# The workflows --------------------------------------------------------------------------------


def steps(path: Path) -> list[tuple[str, str]]:
    """Each shell step of a workflow, with its job."""
    jobs = yaml.safe_load(path.read_text("utf8"))["jobs"].items()
    return [(name, s["run"]) for name, job in jobs for s in job.get("steps", ()) if "run" in s]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_steps_of_the_shell_are_well_formed(path):
    for job, script in steps(path):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, f"{job}: {done.stderr}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_script_that_a_workflow_names_exists(path):
    for job, script in steps(path):
        for word in script.replace("\\\n", " ").split():
            if word.startswith("tools/"):
                assert (ROOT / word).is_file(), f"{job}: {word}"


def test_writing_is_allowed_where_it_is_needed_alone():
    jobs = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf8"))["jobs"]
    writing = {
        name: {k for k, v in job.get("permissions", {}).items() if v == "write"}
        for name, job in jobs.items()
    }
    assert writing == {
        "address": {"contents"},
        "book": set(),
        "pages": {"pages", "id-token"},
        "notebooks": {"contents"},
    }


def test_the_workflow_acted_out(copy, tmp_path_factory):
    """All but the long build: the address is set and pushed, and the notebooks are a branch of their own."""
    rehearse = tool("rehearse")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--no-verify", "--message=first")
    stage = rehearse.Stage(tmp_path_factory.mktemp("stage"), source=copy)
    jobs = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf8"))["jobs"]
    built = stage.kept / "notebooks"
    built.mkdir(parents=True)
    (built / "background.ipynb").write_text("{}", "utf8")
    order = rehearse.ordered(jobs)
    assert order.index("book") < order.index("notebooks") and {*order} == {*jobs}
    for job in ("address", "notebooks"):
        stage.act(job, jobs[job])
    there = git(stage.there, "show", "main:pyproject.toml")
    assert f'Repository = "{OWN}"' in there
    listed = git(stage.there, "ls-tree", "-r", "--name-only", "notebooks").split()
    assert listed == ["README.md", "book/background.ipynb"]
    assert len(git(stage.there, "log", "--oneline", "notebooks").splitlines()) == 1
    pdf = stage.folder / "book" / "_build" / "book.pdf"
    pdf.parent.mkdir(parents=True)
    pdf.write_text("%PDF", "utf8")
    stage.use("upload-artifact", {"name": "book-pdf", "path": "_build/book.pdf"}, "book")
    assert (stage.kept / "book-pdf" / "book.pdf").is_file()  # as one file, not as a folder
    stage.folder = tmp_path_factory.mktemp("again")
    stage.act("notebooks", jobs["notebooks"])  # the second time it takes the first one's place
    assert len(git(stage.there, "log", "--oneline", "notebooks").splitlines()) == 1


def test_an_address_that_is_left_open_is_found(tmp_path):
    rehearse = tool("rehearse")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "page.html").write_text('<a href="https://github.com/OWNER/mtlib-book">', "utf8")
    assert rehearse.open_addresses(SimpleNamespace(kept=kept, folder=tmp_path)) == [
        "kept/page.html"
    ]


# The weekly run -------------------------------------------------------------------------------


def notebook(folder: Path, name: str, source: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def test_what_fails_is_told(tmp_path, capsys):
    """Each notebook runs alone in an empty folder; the report names the one that fails, and why."""
    rerun = tool("rerun")
    notebook(tmp_path, "bad", "raise ValueError('too few rows')")
    notebook(tmp_path, "good", "import os\nassert os.listdir() == []\nopen('left', 'w').close()")
    notebook(tmp_path, "next", "import os\nassert os.listdir() == []")
    report = tmp_path / "report.md"
    assert rerun.main([str(tmp_path), "--report", str(report)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("FAILED") == 1 and "good" in printed.out
    told = report.read_text("utf8")
    assert told.startswith("## bad") and "ValueError: too few rows" in told and "next" not in told
    assert rerun.main([str(tmp_path), "--only", "good"]) == 0
    with pytest.raises(SystemExit):
        rerun.main([str(tmp_path), "--only", "nowhere"])
