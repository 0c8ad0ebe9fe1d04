"""The page on one's own data and model: each part alone in an empty folder, each call beside another library's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from machine import ROOT, printed
from pages import BOOK

CELLS = json.loads((BOOK / "own.ipynb").read_text("utf8"))["cells"]
TEXT = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
OTHERS = "Coming from learn2learn, higher, TorchMeta, easyfsl"
TABLES = TEXT.partition(f"## {OTHERS}")[2].partition("\n## ")[0]
ROWS = re.findall(r"(?m)^\| (.+?) \| (.+?) \|$", TABLES)


def parts() -> dict[str, str]:
    """Title -> the cell of names and the code under the title, as one program."""
    found, title = dict[str, list[str]](), ""
    for cell in CELLS:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            title = [title, *re.findall(r"(?m)^## (.+)$", text)][-1]
        elif "remove-cell" not in cell["metadata"].get("tags", []):
            found.setdefault(title, []).append(text)
    ((names,), _) = found.pop("The idea"), found.pop("What came out")  # the figure reads all parts
    return {title: "\n".join([names, *cells]) for title, cells in found.items()}


PARTS = parts()


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Path:
    """An empty folder; a program run in it finds the package, and takes the small scale."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MTLIB_SCALE", "small")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("title", PARTS)
def test_a_part_runs_alone(title, alone):
    program = alone / "part.py"
    program.write_text(PARTS[title], "utf8")
    assert printed(str(program), cwd=alone, timeout=300) or title == OTHERS


# Coming from another library -----------------------------------------------------------------


def calls() -> list[tuple[str, str]]:
    """The rows of the last part's tables: another library's call, and ours."""
    found = [(theirs, re.findall(r"`([^`]+)`", ours)) for theirs, ours in ROWS]
    return [(theirs, ours[0]) for theirs, ours in found if ours and ours[0] != "mtlib"]


def test_every_call_of_the_tables_runs(alone):
    """In one process of its own, with the names that the page gives before the tables."""
    folder = "from pathlib import Path\nfrom PIL import Image\n" + "".join(
        f"Path('photos/{k}').mkdir(parents=True)\nImage.new('L', (9, 9)).save('photos/{k}/a.png')\n"
        for k in "ab"
    )
    lines = [f"{code}\nprint({code!r})" for _, code in calls()]
    program = alone / "calls.py"
    program.write_text("\n".join([folder, PARTS[OTHERS], *lines]), "utf8")
    shown = printed(str(program), cwd=alone, timeout=300).splitlines()
    assert len(calls()) > 30 and shown == [code for _, code in calls()]


def test_a_call_without_a_counterpart_says_so():
    without = {theirs for theirs, ours in ROWS if ours == "none"}
    assert without == {"`hardness_metric`, tabular and rotated data sets", "`TIM`, `PTMAP`"}


# Serving -------------------------------------------------------------------------------------


def test_the_server_runs_without_the_package(alone):
    """The program that the page shows, beside the file that its part wrote."""
    (code,) = re.findall(r"```python\n(import torch\n\nmodel.+?)```", TEXT, re.DOTALL)
    (alone / "part.py").write_text(PARTS["Save, export, serve"] + "\nprint(folder)", "utf8")
    folder = printed("part.py", cwd=alone, timeout=300).splitlines()[-1]
    code += "\nimport sys\nassert not any(m.split('.')[0] == 'mtlib' for m in sys.modules)"
    assert re.fullmatch(r"tensor\(\[\d, \d, \d\]\)\n", printed("-c", code, cwd=folder))


def test_the_exported_protonet_of_the_exercise_answers(alone):
    """The program of the last solution, after the part it follows."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT.partition("ex-own-export")[2], re.DOTALL)
    same = (
        "\nprint(torch.equal(few.module()(*task.support, x[:3]), Few(model)(*task.support, x[:3])))"
    )
    (alone / "part.py").write_text(PARTS["Save, export, serve"] + "\n" + code + same, "utf8")
    *_, chosen, equal = printed("part.py", cwd=alone, timeout=300).splitlines()
    assert re.fullmatch(r"tensor\(\[\d, \d, \d\]\)", chosen) and equal == "True"


def test_onnx_gives_what_the_module_gives(alone):
    """The page names this call; it needs two packages that the book does not."""
    pytest.importorskip("onnxscript")
    code = PARTS["Save, export, serve"] + (
        "\nimport onnxruntime, numpy as np"
        "\ntorch.onnx.export(program, f=folder / 'adapted.onnx')"
        "\nsession = onnxruntime.InferenceSession(str(folder / 'adapted.onnx'))"
        "\n(found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})"
        "\nassert np.allclose(found, model(x).detach(), atol=1e-4)"
    )
    pytest.importorskip("onnxruntime")
    (alone / "part.py").write_text(code, "utf8")
    printed("part.py", cwd=alone, timeout=300)


# How the page is written ---------------------------------------------------------------------


def test_lines_are_short_and_every_part_runs_after_the_names():
    for cell in CELLS:
        code = cell["cell_type"] == "code" and cell["id"] != "install"
        wide = [line for line in cell["source"] if code and len(line.rstrip()) > 76]
        assert not wide, wide
    assert len(PARTS) == 8 and sys.version_info >= (3, 11)
