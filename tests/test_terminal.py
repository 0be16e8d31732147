"""No print raises, whatever a terminal can encode; and files are UTF-8 whatever the locale is."""

import ast
import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bmjax import cli
from bmjax.cli.commands import COMMANDS
from bmjax.config import DoctorConfig
from bmjax.machine.terminal import forgiving_console
from bmjax.train.loop import fit

PACKAGE = Path(__file__).parents[1] / "bmjax"
BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAME = "café漢"


class Own:
    """A stream of another kind, which knows its encoding alone."""

    encoding = "ascii"

    def write(self, text):
        return len(text.encode("ascii"))

    def flush(self):
        pass


STREAMS: dict[str, Any] = {
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), "cp1252"),
    "utf-8": lambda: io.TextIOWrapper(io.BytesIO(), "utf-8"),
    "writer": lambda: codecs.getwriter("ascii")(io.BytesIO()),
    "text": io.StringIO,
    "own": Own,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_console_on_any_stream_takes_any_text(kind):
    console = forgiving_console(Console(file=STREAMS[kind](), force_terminal=True))
    table = Table(NAME, title=NAME)
    table.add_row("\udce9")  # half a character, as of a file name that is no UTF-8
    console.print(table)
    with Progress(console=forgiving_console(console)) as progress:
        progress.add_task(f"{NAME} …", total=2)
    console.print(f"{NAME} \udce9")


def test_fit_prints_on_an_ascii_stream(small, shapes):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    fit(small, shapes, console=Console(file=stream), title=NAME)
    stream.seek(0)
    assert r"caf\xe9\u6f22 epoch 1/6  loss " in stream.read()


@pytest.fixture
def run(monkeypatch):
    """Runs a command whose standard output has an encoding; returns exit code and output."""

    def run(encoding, *words):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        texts = []
        for stream in streams:
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(encoding))
        return end.value.code, *texts

    return run


def test_commands_print_names_that_the_terminal_cannot_encode(run, tmp_path, shapes):
    for index, (image, label) in enumerate(zip(shapes.train.images, shapes.train.labels)):  # noqa: B905
        folder = tmp_path / "data" / ("bee", NAME, "cat")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / f"{index}.png")
    out, file = tmp_path / "run", next((tmp_path / "data" / NAME).iterdir())
    settings = ("--hidden-sizes", "8", "--epochs", "1", "--batch-size", "16", "--no-tensorboard")
    words = ("train", "--data", f"folder:{tmp_path / 'data'}", "--image-size", "12", "--out", out)
    code, shown, err = run("ascii", *words, *settings)
    assert (code, err) == (0, "")
    assert "test accuracy" in shown
    for encoding, escaped in (("ascii", r"caf\xe9\u6f22"), ("cp1252", r"café\u6f22")):
        code, shown, err = run(encoding, "predict", out, file)
        assert (code, err) == (0, "")
        assert f"{escaped}{os.sep}{file.name}: " in shown
        code, shown, err = run(encoding, "predict", out, file, "--json")
        assert (code, err) == (0, "")
        assert json.loads(shown)["file"] == str(file)
        code, shown, err = run(encoding, "evaluate", out)
        assert (code, err) == (0, "")
        assert "confusion" in shown
        code, _, err = run(encoding, "evaluate", f"no{NAME}")
        assert code == 2
        assert escaped in err


def test_a_name_that_the_locale_has_no_bytes_for_is_said(run, monkeypatch):
    monkeypatch.setitem(COMMANDS, DoctorConfig, lambda config: os.stat("half\ud800"))
    code, _, err = run("utf-8", "doctor")
    assert code == 2
    assert "Set PYTHONUTF8=1" in err
    assert err.count("\n") == 1


def command(*words, shell="", **environment):
    """Runs a command in a process of its own, of a shell that may close streams for it."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "bmjax.cli", *words],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
    )


def test_help_where_only_ascii_is_shown():
    for environment in (BARE, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}):
        done = command("-h", **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"distill" in done.stdout


def test_streams_may_be_closed():
    assert command("--version", shell=">&-").returncode == 0
    done = command("-h", shell=">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = command("trian", shell="<&- >&-")
    assert done.returncode == 2
    assert done.stderr.startswith(b"bmjax: unknown command 'trian'")
    assert command("trian", shell="2>&-").returncode == 2


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import sys\nfrom bmjax.machine.terminal import prepare_streams\nprepare_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'wb')\nprint('lost')\n"
        "sys.exit(file.fileno())"
    )
    done = subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", sys.executable, "-c", code])
    assert done.returncode > 2
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device to print to")
def test_output_that_cannot_be_written_is_said():
    done = command("--version", shell=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(b"bmjax: ")
    assert done.stderr.count(b"\n") == 1


def opened_as_the_locale_says(path):
    """Lists the lines of a file that read or write text without saying in which encoding."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        text = ast.unparse(node)
        wrong = {
            "read_text": not (node.args or "encoding" in words),
            "write_text": not (len(node.args) > 1 or "encoding" in words),
            "open": "encoding" not in words and "'b" not in text and "b'" not in text,
            "fdopen": "encoding" not in words and "b'" not in text,
            "run": "text" in words and "encoding" not in words,
            "Popen": "text" in words and "encoding" not in words,
        }
        module = ast.unparse(node.func).partition(".")[0]
        if wrong.get(name) and module not in ("os", "Image", "tarfile", "zipfile"):
            yield f"{path}:{node.lineno}: {text}"


def test_text_files_are_utf8_whatever_the_locale_is():
    assert [
        line for path in PACKAGE.rglob("*.py") for line in opened_as_the_locale_says(path)
    ] == []
