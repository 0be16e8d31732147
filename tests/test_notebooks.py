"""The notebooks are run by `.ci/run`; here it is seen that they can be read, and are kept clean."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bmjax import cli

FOLDER = Path(__file__).parent.parent / "experiments" / "notebooks"
NOTEBOOKS = ("colab_tpu.ipynb", "kaggle_tpu.ipynb")


def cells(name, kind):
    content = json.loads((FOLDER / name).read_text())
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_is_kept(name):
    for cell in cells(name, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_command_is_one_and_its_failure_stops_the_notebook(name):
    seen = []
    for cell in cells(name, "code"):
        lines = "".join(cell["source"]).splitlines()
        for number, line in enumerate(lines):
            found = re.match(r"(?:\w+ = )?!bmjax (.*)", line)
            if found:
                words = re.sub(r"\{\w+\}", "cpu", found[1]).split()
                seen.append(type(cli.parse(words)).__name__)
                assert lines[number + 1].startswith("assert not _exit_code"), line
    assert {"Doctor", "Train", "Finetune", "Distill", "Evaluate", "Predict", "VerifyResume"} == {
        name.removesuffix("Config") for name in seen
    }


def test_they_differ_in_where_things_are_alone():
    one, other = (cells(name, "code") for name in NOTEBOOKS)
    assert one[1:] == other[1:]
    for name in NOTEBOOKS:
        for cell in cells(name, "code"):
            assert "import jax" not in "".join(cell["source"])


def begin(name, inputs):
    """Runs the cells that say where things are, and that fetch what is compiled; Kaggle's inputs
    lie elsewhere here.
    """
    sources = ["".join(cell["source"]) for cell in cells(name, "code")]
    fetch = next(source for source in sources if "def keep_cache" in source)
    names: dict[str, Any] = {}
    for source in (sources[0], fetch):
        exec(source.replace('"/kaggle/input"', repr(str(inputs))), names)
    return names


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_compiled_is_fetched_and_kept(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    monkeypatch.setenv("BMJAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    before = tmp_path / "input" / "my-notebook" if "kaggle" in name else tmp_path
    earlier = before / "runs" / "cache" / "compiled"
    earlier.mkdir(parents=True)
    (earlier / "a-cache").write_text("program")
    names = begin(name, tmp_path / "input")
    assert (tmp_path / "cache" / "compiled" / "a-cache").read_text() == "program"
    (tmp_path / "cache" / "compiled" / "b-cache").write_text("new")
    names["keep_cache"]()
    kept = (tmp_path / "runs" / "cache" / "compiled").iterdir()
    assert {path.name for path in kept} == {"a-cache", "b-cache"}
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("1 compiled programs from an earlier session")
    assert said[-1] == "2 compiled programs kept, 1 of them new"


def test_drive_is_mounted_on_colab(monkeypatch):
    mounted: list[str] = []
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mounted.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.delenv("BMJAX_RUNS", raising=False)
    monkeypatch.setenv("BMJAX_CACHE", "/no/such/cache")
    names = begin("colab_tpu.ipynb", "")
    assert (mounted, names["SOURCE"]) == (["/content/drive"], Path("/content/drive/MyDrive/bmjax"))
    assert names["EARLIER"] == Path("/content/drive/MyDrive/runs/cache")
