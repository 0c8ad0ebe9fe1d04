"""The project around the package: one address, loose bounds, imports in a star, clean notebooks, a README that runs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from machine import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import NOTEBOOKS

PACKAGE = ROOT / "mtlib"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
PROJECT = PYPROJECT["project"]

# What each room of the package may import of the package. A new module needs a row here.
STAR = {
    "core": set(),
    "run": {"core", "run", "tasks"},
    "objective": {"core", "run", "tasks"},
    "bilevel": {"core", "objective", "run", "tasks"},
    "joint": {"core", "objective", "run", "tasks"},
    "norm": {"core", "run"},
    "nets": {"core", "norm", "run", "tasks"},
    "tasks": {"core"},
    "learners": {"core", "norm", "learners", "run", "tasks"},
    "transfer": {
        "core",
        "objective",
        "joint",
        "bilevel",
        "learners",
        "nets",
        "run",
        "tasks",
        "transfer",
    },
    "data": {"core", "tasks", "run", "data"},
    "models": {"core", "data", "models", "nets", "run", "tasks"},
    "train": {"core", "objective", "tasks", "run"},
    "metrics": {"run"},
    "evaluate": {"core", "metrics", "objective", "tasks", "run", "train"},
    "plots": {"train", "evaluate", "tasks"},
    "book": {
        "bilevel",
        "book",
        "core",
        "data",
        "evaluate",
        "joint",
        "learners",
        "metrics",
        "models",
        "nets",
        "norm",
        "objective",
        "plots",
        "run",
        "tasks",
        "train",
        "transfer",
    },
}
ONLY_IN = {  # third-party name -> its rooms; the first three are the extra `pages`
    "matplotlib": {"plots"},
    "IPython": {"book", "plots"},
    "pycocotools": {"models"},
    "sentence_transformers": {"models"},
    "transformers": {"models"},
    "torchvision": {"models"},
}
NEED_PAGES = {
    "mtlib.plots",
    "mtlib.book.page",
    "mtlib.book.results",
    "mtlib.book.drawings",
    "mtlib.book.contest",
    "mtlib.book.pictures",
    "mtlib.book.directions",
    "mtlib.book.arriving",
    "mtlib.book.benchmarked",
    "mtlib.book.across",
    "mtlib.book.choices",
    "mtlib.book.sentences",
    "mtlib.book.hand",
    "mtlib.book.heads",
    "mtlib.book.ways",
    "mtlib.book.catalogue",
    "mtlib.book.shop",
    "mtlib.book.weighing",
    "mtlib.book.tables",
    "mtlib.book.merging",
}
# A room that needs one of these says so where it is absent.
OPTIONAL = {"sentence_transformers", "transformers", "torchvision"}
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where it is not the module's name


# Imports -------------------------------------------------------------------------------------

FOLDERS = {
    module.removesuffix(".__init__")
    for path in PACKAGE.rglob("__init__.py")
    if (module := ".".join(path.relative_to(ROOT).with_suffix("").parts))
    != "mtlib.book.results.__init__"
}


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if node.module in FOLDERS else {node.module}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


GRAPH = {module_name(path): imports(path) for path in sorted(PACKAGE.rglob("*.py"))}
ROOMED = {name: found for name, found in GRAPH.items() if name != "mtlib"}


@pytest.mark.parametrize("name", ROOMED)
def test_imports_form_a_star(name):
    room = name.split(".")[1]
    assert room in STAR, f"{name} is new: say in STAR what it may import"
    used = {m.split(".")[1] for m in ROOMED[name] if m.startswith("mtlib.")}
    assert used <= STAR[room], f"{name} imports {used - STAR[room]}"
    for library, rooms in ONLY_IN.items():
        if room not in rooms:
            assert not any(m.split(".")[0] == library for m in ROOMED[name]), (
                f"{name} imports {library}"
            )


def test_contributing_says_which_test_is_whose():
    """Each room stands in the map, and each test that the map names exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf8")
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", text, re.MULTILINE)
    rooms = {room for first, _ in rows for room in re.findall(r"`(\w+)/?`", first)}
    assert rooms == {name.split(".")[1] for name in ROOMED}
    named = {name for _, tests in rows for name in re.findall(r"`(test_\w+\.py)`", tests)}
    assert named and not {name for name in named if not (ROOT / "tests" / name).is_file()}
    assert all("`test_" in tests for _, tests in rows)


def test_the_root_is_small():
    held = [p for p in PACKAGE.iterdir() if p.is_file()]
    assert len(held) <= 13, sorted(p.name for p in held)
    text = (PACKAGE / "__init__.py").read_text("utf8")
    rooms = {name.split(".")[1] for name in ROOMED}
    assert rooms <= set(re.findall(r"`(\w+)`", text)), "each room has its line in mtlib/__init__"


def test_imports_form_no_cycle():
    TopologicalSorter(ROOMED).prepare()  # raises CycleError


def test_the_package_re_exports_nothing():
    assert GRAPH["mtlib"] == {"mtlib.run.copies", "mtlib.run.fast"}, "they fill the slots of core"


def test_every_import_is_a_declared_dependency():
    base, pages = PROJECT["dependencies"], PROJECT["optional-dependencies"]["pages"]
    declared = {canonicalize_name(Requirement(r).name) for r in (*base, *pages)}
    used = {m.split(".")[0] for found in GRAPH.values() for m in found}
    third = used - set(sys.stdlib_module_names) - {"mtlib"} - OPTIONAL
    assert {canonicalize_name(DISTRIBUTION.get(m, m)) for m in third} <= declared
    alone = {canonicalize_name(Requirement(r).name) for r in pages}
    assert alone <= {canonicalize_name(DISTRIBUTION.get(m, m)) for m in ONLY_IN}


def test_without_the_extra_pages_all_but_figures_and_pages_import(tmp_path):
    """None of the extra's libraries can be found there; the two modules that need them say what to install."""
    program = f"""
import importlib, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "IPython", "pycocotools"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.path.insert(0, {str(ROOT)!r})
sys.meta_path.insert(0, Hidden())
for name in {sorted(GRAPH.keys() - NEED_PAGES)!r}:
    importlib.import_module(name)
for name in ("mtlib.plots", "mtlib.book.page"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    figures, pages = run_alone(program, tmp_path).splitlines()
    need = "need the extra `pages`: mtlib-book[pages]"
    assert figures == f"No module named 'matplotlib'; figures {need}"
    assert pages == f"No module named 'IPython'; pages {need}"


def test_core_and_one_learner_run_as_a_lone_script(tmp_path):
    """Pasted together, without the package: a reader may take a method away."""
    parts = ["from __future__ import annotations"]
    for name in ("core.py", "learners/gradient.py"):
        text = (PACKAGE / name).read_text("utf8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("mtlib", "__future__")
            ):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (
                    node.end_lineno - node.lineno + 1
                )
        parts.append("\n".join(lines))
    parts.append(
        "import sys\n"
        "net = nn.Linear(1, 1)\n"
        "learner = maml(net, nn.functional.mse_loss, lr=0.1, steps=3)\n"
        "support = Batch(torch.ones(4, 1), torch.ones(4, 1))\n"
        "phi = learner.init()\n"
        "theta = learner.adapt(phi, support)\n"
        "gap = [(learner.predict(p, support.x) - 1).abs().max().item() for p in (phi, theta)]\n"
        "assert gap[1] < gap[0], gap\n"
        "assert not any(m.split('.')[0] == 'mtlib' for m in sys.modules)\n"
        "print('ran')\n"
    )
    assert run_alone("\n".join(parts), tmp_path) == "ran\n"


# The README ----------------------------------------------------------------------------------


def run_alone(program: str, folder: Path) -> str:
    """What a program prints, run in a process of its own in an empty folder."""
    script = folder / "program.py"
    script.write_text(program, "utf8")
    quiet = {"MTLIB_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_the_readme_runs(tmp_path):
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.DOTALL
    )
    scores = re.findall(
        r"^(.+) (\d+\.\d+) ± (\d+\.\d+)$", run_alone(program, tmp_path), re.MULTILINE
    )
    (scratch, before, _), (meta, after, _) = scores
    assert (scratch, meta) == ("from scratch", "meta-learned")
    assert float(after) < 0.8 * float(before)


# The address ---------------------------------------------------------------------------------


def address_tool(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "address.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_copies_of_the_address_agree():
    done = address_tool("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_address_is_stamped_everywhere(tmp_path):
    """On a copy: a new address differs, is written, agrees; a first cell that is missing is put in."""
    names = ["pyproject.toml", "_config.yml", "README.md", "CITATION.cff", "tools/address.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text("utf8"), "utf8")
    page = tmp_path / "book" / "page.ipynb"
    page.parent.mkdir()
    prose = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title"]}
    page.write_text(
        json.dumps({"cells": [prose], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )

    new = "https://github.com/some-one/a.book"
    assert address_tool("--check", root=tmp_path).returncode == 1  # the page has no first cell
    assert address_tool(new, root=tmp_path).returncode == 0
    assert address_tool("--check", root=tmp_path).returncode == 0
    assert not any(
        PROJECT["urls"]["Repository"] in (tmp_path / name).read_text("utf8") for name in names
    )
    readme = (tmp_path / "README.md").read_text("utf8")
    assert "<https://some-one.github.io/a.book/>" in readme and "OWNER" not in readme
    first = json.loads(page.read_text("utf8"))["cells"][0]
    assert first["metadata"]["tags"] == ["remove-cell"]
    assert f"[pages] @ git+{new}@main" in "".join(first["source"])

    page.write_text(page.read_text("utf8").replace("[pages]", "[pages,text]"), "utf8")
    assert address_tool(new + "s", root=tmp_path).returncode == 0  # a page's other extras stay
    assert f"[pages,text] @ git+{new}s@main" in page.read_text("utf8")
    assert address_tool(new, root=tmp_path).returncode == 0

    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text("utf8").replace(new, new + "s", 1), "utf8")
    done = address_tool("--check", root=tmp_path)
    assert done.returncode == 1 and "README.md" in done.stdout
    assert address_tool("a.book", root=tmp_path).returncode == 2


# Versions ------------------------------------------------------------------------------------

EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(r) for r in PROJECT["dependencies"]]
EVERY = REQUIRED + [
    Requirement(r) for extra in EXTRAS.values() for r in extra if not r.startswith("mtlib-book")
]


def test_dependencies_have_lower_bounds_only():
    for r in REQUIRED:
        assert [s.operator for s in r.specifier] == [">="], f"{r}: expected one lower bound"
    pinned = {r.name for r in EVERY if any(s.operator not in (">=", "<") for s in r.specifier)}
    assert pinned == {"higher", "torchopt"}


def pins(path: Path) -> dict[str, str]:
    """The versions of a constraints file."""
    lines = path.read_text("utf8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_colab_satisfies_the_bounds():
    bounds = {r.name: r.specifier for r in REQUIRED}
    bounds |= {r.name: r.specifier for r in map(Requirement, EXTRAS["pages"])}
    for name, version in pins(ROOT / "tools/colab.txt").items():
        assert version in bounds[name], f"{name} {version} is not {bounds[name]}"


def test_constraints_pin_every_dependency():
    pinned = pins(ROOT / "constraints.txt")
    for r in EVERY:
        assert pinned[canonicalize_name(r.name)] in r.specifier, f"{r}: pinned outside its bounds"


# What is in the repository -------------------------------------------------------------------


def code_cells(path: Path) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_store_no_outputs_and_short_cells(path):
    for i, cell in enumerate(code_cells(path)):
        assert not cell["outputs"] and cell["execution_count"] is None, f"code cell {i}: outputs"
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 30, f"code cell {i}: {len(lines)} lines, expected at most 30"


LOADED = re.compile(r"\b(characters|omniglot)\(")


def names_its_data(code: str) -> bool:
    """Whether a call of `print` or `table` in this code reads some data's `source`."""
    shown = (
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"print", "table"}
    )
    return any(
        isinstance(n, ast.Attribute) and n.attr == "source" for s in shown for n in ast.walk(s)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_page_says_which_data_it_used(path):
    """A page that asks for characters shows whether they are real or a stand-in."""
    code = "\n".join("".join(c["source"]) for c in code_cells(path))
    code = re.sub(r"%pip.*", "pass", code)
    assert names_its_data(code) or not LOADED.search(code)


def test_data_that_are_not_named_are_found():
    assert names_its_data("print('Data:', test.source)") and names_its_data(
        "table({d.source: 1 for d in D})"
    )
    assert not names_its_data("contest(data=test.source)")


def files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [p for name in done.stdout.split("\0") if name and (p := ROOT / name).is_file()]


def test_no_file_names_a_registry_host_or_a_place_on_some_machine():
    dot = r"\."
    forbidden = [
        dot.join(["pypi", "org"]),
        dot.join(["pythonhosted", "org"]),
        dot.join(["registry", "npmjs"]),
        dot.join(["deb", "debian", "org"]),
        "/" + "work/",
        "/" + "root/" + dot,
        "ipykernel" + r"_\d",
        "/" + "tmp/" + "[A-Za-z]",
    ]
    pattern = re.compile("|".join(forbidden))
    found = [
        f"{path.relative_to(ROOT)}:{n}: {match[0]}"
        for path in files()
        for n, line in enumerate(path.read_text("utf8", errors="replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)


def test_nothing_installs_the_stranger_of_our_name():  # a warning in prose, in backticks, may name it
    pattern = re.compile(r"(?<!`)pip3? install(?: +-\S+)* +[\"']?mtlib(?![-\w])")
    found = [
        str(path.relative_to(ROOT))
        for path in files()
        if pattern.search(path.read_text("utf8", errors="replace"))
    ]
    assert not found
