"""`--import`: a user's own code is imported because the command line says so, never otherwise."""

import json
import sys
from typing import Any

import pytest
from PIL import Image

from bmjax import cli
from bmjax.cli import supervisor
from bmjax.cli.imports import import_one
from bmjax.config import TrainConfig, VerifyResumeConfig
from bmjax.errors import UserError
from bmjax.machine.storage import read_settings, write_settings
from bmjax.models import find, registry
from bmjax.train import verify_resume
from tests.test_cli import run

pytestmark = pytest.mark.usefixtures("own_names")

MINE = """
import flax.linen as nn
import bmjax
from beside import WIDTH

class Mine(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(WIDTH)(images.reshape(len(images), -1)))
        return nn.Dense(self.num_classes, name="head")(hidden)

bmjax.register_model("mine", Mine)
"""
SHORT = ("--epochs", "1", "--batch-size", "15", "--devices", "1", "--no-tensorboard")


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 6\n")
    (folder / "mine.py").write_text(MINE)
    return folder / "mine.py"


def forget():
    registry._TABLE.pop("mine", None)
    sys.modules.pop("mine", None)


def test_a_model_of_ones_own_from_the_command_line(capsys, tmp_path, shapes_npz, mine):
    out, data = tmp_path / "run", f"npz:{shapes_npz}"
    words = ("train", "--model", "mine", "--data", data, "--out", out, *SHORT)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "unknown model 'mine'" in err
    assert "--import FILE" in err
    assert not out.exists()
    assert run(capsys, *words, "--import", mine)[::2] == (0, "")
    assert "mine.py" not in (out / "config.json").read_text()

    image = tmp_path / "image.png"
    Image.new("L", (12, 12), 99).save(image)
    forget()
    code, _, err = run(capsys, "predict", out, image)
    assert code == 2
    assert f"the run in {out} is of a model that is not known: 'mine'" in err
    assert "by --import FILE; in Python, import that file first" in err
    code, shown, err = run(capsys, "predict", out, image, "--import", mine, "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(shown)["probabilities"]) == {"0", "1", "2"}
    forget()
    code, shown, err = run(capsys, "evaluate", out, "--import", mine, "--json")
    assert code == 0, err
    assert json.loads(shown)["model"] == "mine"
    forget()
    assert run(capsys, "train", "--resume", "--out", out)[0] == 2
    assert run(capsys, "train", "--resume", "--out", out, "--import", mine)[0] == 0


def test_a_run_that_names_a_file_to_import_imports_nothing(capsys, tmp_path, shapes_npz, mine):
    out, marker = tmp_path / "run", tmp_path / "imported"
    words = ("--model", "mine", "--data", f"npz:{shapes_npz}", "--out", out, *SHORT)
    assert run(capsys, "train", *words, "--import", mine)[0] == 0
    forget()
    hostile = tmp_path / "hostile.py"
    hostile.write_text(f"{MINE}\nopen({str(marker)!r}, 'w').close()\n")
    for part in ("config", "extra", None):
        for key in ("imports", "import"):
            content = read_settings(out / "config.json")
            changed = content if part is None else content[part]
            changed[key] = [str(hostile)]
            write_settings(out / "config.json", content)
            for command in (["evaluate", out], ["train", "--resume", "--out", out]):
                assert run(capsys, *command)[0] == 2
            del changed[key]
            write_settings(out / "config.json", content)
    assert not marker.exists()
    assert "hostile" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import bmjax\n1 / 0\n", r"failed: ZeroDivisionError: division by zero \(line 2 of "),
        ("def f(:\n", r"failed: SyntaxError: invalid syntax \(line 1 of "),
        ("import sys\n\nsys.exit('enough')\n", r"failed: SystemExit: enough \(line 3 of "),
        ("import no_such_thing\n", r"failed: ModuleNotFoundError: No module named 'no_such_thing'"),
        (
            "import bmjax\nbmjax.register_model('mlp', lambda num_classes: None)\n",
            r"failed: there is a model 'mlp' already, .* name \(line 2 of ",
        ),
    ],
)
def test_a_file_that_fails_is_answered_in_one_line(text, message, capsys, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(text)
    code, out, err = run(capsys, "evaluate", tmp_path, "--import", file)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "broken" not in sys.modules
    with pytest.raises(UserError, match=message):
        import_one(str(file))
    assert f"--import {file} failed: " in err
    assert f" of {file})" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py", "--import nowhere.py: there is no such file"),
        ("no/where", "--import no/where: there is no such file"),
        ("nowhere.models", "there is no such module, nor a file of that name"),
    ],
)
def test_what_is_not_there_is_said(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        import_one(name)


def test_a_module_is_found_from_the_current_folder(tmp_path, monkeypatch, mine):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MINE.replace("from beside import WIDTH", "WIDTH = 3"))
    monkeypatch.chdir(tmp_path)
    assert import_one("my_package.models") is import_one("my_package.models")
    assert find("mine").make.__module__ == "my_package.models"
    (package / "other.py").write_text("import nothing_there\n")
    with pytest.raises(UserError, match=r"failed: ModuleNotFoundError.*'nothing_there'"):
        import_one("my_package.other")


def test_a_file_is_imported_once_and_takes_no_other_modules_name(tmp_path, mine):
    first = import_one(str(mine))
    assert import_one(str(mine.parent / ".." / mine.parent.name / "mine.py")) is first
    theirs = sys.modules["jax"]
    (tmp_path / "jax.py").write_text("VALUE = 3\n")
    ours: Any = import_one(str(tmp_path / "jax.py"))
    assert ours.VALUE == 3
    assert sys.modules["jax"] is theirs


def test_verify_resume_hands_it_on(tmp_path, monkeypatch):
    seen: list[Any] = []

    def note(process):
        seen.extend(process._words)
        raise UserError("enough")

    monkeypatch.setattr(verify_resume, "_time_whole", note)
    config = VerifyResumeConfig(out=str(tmp_path / "out"), imports=("a.py", "b.py"))
    with pytest.raises(UserError, match="enough"):
        verify_resume.verify_resume(config)
    assert " --import a.py --import b.py " in " ".join(seen)


def test_each_of_several_processes_imports_for_itself(monkeypatch, mine):
    words = ["train", "--model", "mine", "--import", str(mine), "--process-id", "1"]
    words += ["--num-processes", "2", "--coordinator", "localhost:1234"]
    seen: list[Any] = []
    monkeypatch.setattr(supervisor, "watch", lambda: False)
    monkeypatch.setattr(supervisor, "supervise", lambda *given: seen.extend(given))
    with pytest.raises(SystemExit):
        cli.main(words)
    assert seen[0] == words  # the supervisor hands all flags on
    assert "mine" not in sys.modules  # and has no need of the model


def test_the_command_that_goes_on_names_the_files():
    flags = TrainConfig(imports=("my file.py", "b")).import_flags
    assert flags == " --import 'my file.py' --import b"
    assert TrainConfig().import_flags == ""


def test_every_command_that_makes_a_model_takes_it(tmp_path):
    file = tmp_path / "x.py"
    for words in (
        ["train"],
        ["finetune"],
        ["distill"],
        ["evaluate", "RUN"],
        ["predict", "RUN", "IMAGE"],
        ["convert", "FILE", "--out", "OUT"],
        ["bench"],
        ["verify-resume"],
    ):
        config = cli.parse([*words, "--import", str(file), "--import", "b.c"])
        assert config.imports == (str(file), "b.c")
