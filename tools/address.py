"""The repository's address: one source, pyproject.toml's [project.urls], and its copies.

python tools/address.py ADDRESS    set it and write every copy
python tools/address.py            write every copy
python tools/address.py --check    list the copies that differ; the exit status is then 1
python tools/address.py --remote   where none is set yet, set that of `git remote get-url origin`

The build of the book takes `known`, and changes no file of the repository.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("pyproject.toml", r'(?m)^Repository = "(.+)"$')
COPIES = [  # file, and where in it the address stands
    ("_config.yml", r"(?m)^repository:\n(?:[ \t]+.*\n)*?[ \t]+url: *(\S+)$"),
    ("README.md", r"git clone (\S+) mtlib-book"),
    ("README.md", r"mtlib-book @ git\+(\S+)@main"),
    ("README.md", r"url += \{(.+)\}"),
    ("README.md", r"\((\S+?)/actions/workflows/ci\.yml"),
    ("CITATION.cff", r'(?m)^repository-code: "(.+)"$'),
]
PUBLISHED = [  # and the one at which GitHub shows the book
    ("README.md", r"(https://[\w.-]+\.github\.io/[\w.-]+/)"),
]
INSTALL = """\
# On Colab or a fresh machine this installs the book's package; where it is installed it does nothing.
from importlib.metadata import PackageNotFoundError, version

try:
    version("mtlib-book")
except PackageNotFoundError:
    %pip install -q "mtlib-book[{extras}] @ git+{address}@main\""""
UNKNOWN = """\
# Where this book was built its repository had no address. Install the book's package from a copy of
# the repository first; in its folder: pip install ".[{extras}]"
from importlib.metadata import version

version("mtlib-book")"""
EXTRAS = r"mtlib-book\[([\w,]+)\] @ git\+"  # a page may name more than `pages`; they stay


def address(root: Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text("utf8"))["project"]["urls"][
        "Repository"
    ]


def of_remote(remote: str) -> str | None:
    """The page in the web of a remote at GitHub or GitLab; None for a path, another host, another form.

    A user's name, a password and a port are left out: `ssh://git@github.com:22/a/b.git` -> `https://github.com/a/b`.
    """
    host, path = (
        r"(?P<host>(?:[\w-]+\.)*(?:github|gitlab)(?:\.[\w-]+)+)",
        r"(?P<path>[\w.-]+/[\w.-]+)",
    )
    url = rf"(?:https?|ssh|git)://(?:[^@/\s]+@)?{host}(?::\d+)?/{path}"
    short = rf"(?:[\w.-]+@)?{host}:/?{path}"
    found = re.fullmatch(rf"(?i){url}/?", remote) or re.fullmatch(rf"(?i){short}/?", remote)
    return (
        f"https://{found['host'].lower()}/{found['path'].removesuffix('.git')}" if found else None
    )


def known(root: Path) -> str | None:
    """Where a reader finds this repository: its remote `origin`, or else what pyproject.toml says, or nowhere."""
    # This folder's own git: without it, git would ask the folders above.
    command = ["git", f"--git-dir={root / '.git'}", "remote", "get-url", "origin"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # a copy without git, on a machine without git
        return stamp(root)
    own = of_remote(asked.stdout.strip()) if asked.returncode == 0 else None
    return own or stamp(root)


def stamp(root: Path) -> str | None:
    """The address that pyproject.toml has; None where it is still the placeholder."""
    return None if "/OWNER/" in (found := address(root)) else found


def published(repository: str | None) -> str:
    """Where GitHub Pages shows the book, with a slash at its end; "" where that is not known."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+)", repository or "")
    if not found:
        return ""
    owner, name = found[1].lower(), found[2]
    own = name.lower() == f"{owner}.github.io"
    return f"https://{owner}.github.io/" + ("" if own else f"{name}/")


def install(source: str, repository: str | None) -> str:
    """The installing cell of a page, which `source` is, for a reader of the built book."""
    named = re.search(EXTRAS, source)
    if not named:
        raise ValueError(f"expected the cell that installs the package, got {source[:80]!r}")
    form = INSTALL if repository else UNKNOWN
    return form.format(address=repository, extras=named[1])


def replace(text: str, pattern: str, new: str) -> str:
    """`text` with `new` for group 1 of the pattern's matches; ValueError where there is none."""
    if not re.search(pattern, text):
        raise ValueError(f"expected a place for the address, {pattern!r}")
    return re.sub(pattern, lambda m: m[0].replace(m[1], new), text)


def with_first_cell(notebook: str, new: str) -> str:
    """The notebook's text with the installing cell as its first code cell; unchanged where it is."""
    book = json.loads(notebook)
    first = next((c for c in book["cells"] if c["cell_type"] == "code"), None)
    named = re.search(EXTRAS, "".join(first["source"])) if first else None
    extras = named[1] if named else "pages"
    source = INSTALL.format(address=new, extras=extras).splitlines(keepends=True)
    if first and named:
        same = "".join(first["source"]) == "".join(source)
        if same and "remove-cell" in first["metadata"].get("tags", []):
            return notebook
        first["source"] = source
        first["metadata"]["tags"] = ["remove-cell"]
    else:
        cell = {
            "cell_type": "code",
            "execution_count": None,
            "id": "install",
            "metadata": {"tags": ["remove-cell"]},
            "outputs": [],
            "source": source,
        }
        book["cells"].insert(0, cell)
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def stamped(root: Path, new: str) -> tuple[dict[Path, str], list[str]]:
    """The files that change when the address is `new`, with their new text, and what cannot be stamped."""
    before: dict[Path, str] = {}
    after: dict[Path, str] = {}
    wrong = []
    shown = re.sub(r"https://github\.com/([\w.-]+)/([\w.-]+)", r"https://\1.github.io/\2/", new)
    places = [(*place, new) for place in (SOURCE, *COPIES)] + [
        (*place, shown) for place in PUBLISHED
    ]
    for name, pattern, value in places:
        path = root / name
        if not path.exists():
            wrong.append(f"{name}: expected a file")
            continue
        before.setdefault(path, path.read_text("utf8"))
        try:
            after[path] = replace(after.get(path, before[path]), pattern, value)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    for path in sorted((root / "book").glob("*.ipynb")):
        before[path] = path.read_text("utf8")
        after[path] = with_first_cell(before[path], new)
    return {path: text for path, text in after.items() if text != before[path]}, wrong


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", nargs="?", help="https://github.com/OWNER/NAME")
    parser.add_argument("--check", action="store_true", help="write nothing, list what differs")
    parser.add_argument("--remote", action="store_true", help="set the remote's, where none is set")
    options = parser.parse_args(arguments)
    if options.remote:
        options.address = known(root)
        if not options.address:
            parser.error("expected `git remote get-url origin` to be a repository at GitHub")
    new = (options.address or address(root)).removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", new):
        parser.error(f"expected an address such as https://github.com/OWNER/NAME, got {new!r}")
    changed, wrong = stamped(root, new)
    for path, text in changed.items():
        print(f"{path.relative_to(root)}: {'differs from' if options.check else 'now has'} {new}")
        if not options.check:
            path.write_text(text, "utf8")
    for line in wrong:
        print(line)
    return int(bool(wrong or (options.check and changed)))


if __name__ == "__main__":
    sys.exit(main())
