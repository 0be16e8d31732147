"""The notebooks are run by `.ci/run`; here it is seen that they can be read, and are kept clean."""

import json
import re
from pathlib import Path

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
