import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import bmjax
from bmjax import cli
from bmjax.cli.commands import COMMANDS
from bmjax.config import DistillConfig, EvaluateConfig, TrainConfig
from bmjax.config.flat import flatten, unflatten
from bmjax.errors import UserError
from bmjax.ops import onednn
from bmjax.runs import checkpoint
from tests.conftest import with_cache
from tests.folder_helpers import write, write_class


def run(capsys, *argv):
    """Runs a command in this process; returns its exit code, output and errors."""
    code: Any = 0
    try:
        cli.main([str(word) for word in argv])
    except SystemExit as leave:
        code = leave.code
    out, err = capsys.readouterr()
    return code, out, err


SHORT = ("--hidden-sizes", "16", "--epochs", "2", "--batch-size", "16", "--no-tensorboard")


def test_train_evaluate_predict(capsys, tmp_path, monkeypatch, shapes, shapes_npz):
    out = tmp_path / "run"
    words = ("train", "--data", f"npz:{shapes_npz}", "--out", out, *SHORT)
    code, shown, err = run(capsys, *words)
    assert (code, err) == (0, "")
    lines = shown.splitlines()
    assert lines[:2] == [
        f"training mlp on npz:{shapes_npz}, into {out}",
        "compiling the training step",
    ]
    assert lines[2].startswith("mlp epoch 1/2  loss ")
    assert "images/s" in lines[2]
    assert "left" in lines[2]
    assert lines[-2].startswith("test accuracy ")
    assert str(out) in lines[-1]

    code, shown, err = run(capsys, "evaluate", out, "--json")
    assert (code, err) == (0, "")
    metrics = json.loads(shown)
    assert f"{metrics['accuracy']:.2%}" in lines[-2]
    code, shown, _ = run(capsys, "evaluate", out, "--split", "validation")
    assert code == 0
    for word in (
        "top-1 accuracy",
        "top-5",
        "calibration",
        "precision",
        "recall",
        "F1",
        "confusion",
    ):
        assert word in shown

    Image.fromarray(shapes.test.images[0, :, :, 0]).save(tmp_path / "a.png")
    # It needs no cache, where there is none.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file"))
    used = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    code, shown, _ = run(capsys, "predict", out, tmp_path / "a.png", "--top", "2")
    jax.config.update("jax_compilation_cache_dir", used)
    assert code == 0
    assert shown.startswith(f"{tmp_path}/a.png: ")
    assert shown.count("%") == 2
    code, shown, _ = run(capsys, "predict", out, tmp_path / "a.png", tmp_path / "a.png", "--json")
    assert [json.loads(line)["label"] in (0, 1, 2) for line in shown.splitlines()] == [True, True]


def test_resume_takes_the_settings_of_the_run(capsys, tmp_path, shapes_npz):
    out = tmp_path / "run"
    words = ("train", "--data", f"npz:{shapes_npz}", "--out", out, *SHORT)
    assert run(capsys, *words)[0] == 0
    assert run(capsys, "train", "--out", out, "--resume")[0] == 0
    code, _, err = run(capsys, "train", "--out", out, "--resume", "--seed", "3", "--model", "cnn")
    assert code == 2
    assert "seed is 0 in the run and 3 now" in err
    assert "model is 'mlp' in the run and 'cnn' now" in err
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "already holds a run" in err


def test_data_that_moved_are_known_by_their_content(capsys, tmp_path, shapes_npz):
    out, moved, other = tmp_path / "run", tmp_path / "moved.npz", tmp_path / "other.npz"
    assert run(capsys, "train", "--data", f"npz:{shapes_npz}", "--out", out, *SHORT)[0] == 0
    shapes_npz.rename(moved)
    code, _, err = run(capsys, "train", "--out", out, "--resume", "--epochs", "3")
    assert code == 2
    assert str(shapes_npz) in err
    words = ("train", "--out", out, "--resume", "--data")
    code, shown, _ = run(capsys, *words, f"npz:{moved}", "--epochs", "3")
    assert code == 0
    assert "moved.npz now, with the same content" in shown.replace("\n", "")
    assert "epochs 3 instead of 2" in shown
    saved = json.loads((out / "config.json").read_text())
    assert saved["config"]["data"] == f"npz:{moved}"
    assert run(capsys, "evaluate", out)[0] == 0

    arrays = dict(np.load(moved))
    np.savez(other, **{**arrays, "train_image": arrays["train_image"][::-1]})
    code, _, err = run(capsys, *words, f"npz:{other}")
    assert code == 2
    assert "other.npz are not those that the run" in err
    assert json.loads((out / "config.json").read_text()) == saved


def test_a_damaged_checkpoint_is_named(capsys, tmp_path, shapes_npz, monkeypatch):
    out = tmp_path / "run"
    # As if killed before the checkpoints but the last were deleted.
    monkeypatch.setattr(checkpoint.CheckpointWriter, "finish", checkpoint.CheckpointWriter.wait)
    run(capsys, "train", "--data", f"npz:{shapes_npz}", "--out", out, *SHORT)
    victim = out / "checkpoints" / "12" / "state" / "_METADATA"
    victim.write_bytes(victim.read_bytes()[:-3])
    code, shown, err = run(capsys, "evaluate", out, "--json")
    assert code == 0
    assert json.loads(shown)["checkpoint_step"] == 6
    assert "state/_METADATA was changed" in err
    assert "the checkpoint at step 6 is used instead" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --model resnet19 --out X", "unknown model 'resnet19'"),
        ("train --data mnist --out X", "unknown dataset 'mnist'. Did you mean mnist5k?"),
        ("train --data npz:nowhere.npz --out X", "there is no file nowhere.npz"),
        ("train --data npz:bad.npz --out X", "pixels must be uint8"),
        ("train --out X --resume", "there is no run in X"),
        ("train --out X --learning-rate -1", "--learning-rate is -1.0, but it must be positive"),
        ("train --out X --devices 9", "--devices 9 asks for more than the 8 cpu device(s)"),
        ("train --out file", "file is a file, not a folder"),
        ("distill --temperature 0 --out X", "--temperature is 0.0, but it must be positive"),
        ("distill --alpha -0.1 --out X", "--alpha is -0.1, but it must be in [0, 1]"),
        ("distill --teacher nowhere --out X", "--teacher nowhere is not there: neither"),
        ("distill --out X --resume", "no run"),
        ("evaluate nowhere", "there is no run in nowhere"),
        ("predict nowhere a.png", "there is no run in nowhere"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", image=np.zeros((4, 8, 8)), label=np.arange(4))
    Path("file").write_text("")
    code, out, err = run(capsys, *words.split())
    assert code == 2
    assert out.count("\n") <= 2  # what was about to begin
    assert message not in out
    assert err.count("\n") == 1
    assert err.startswith("bmjax: ")
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.npz", "file"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "usage: bmjax"),
        ("trian", "bmjax: unknown command 'trian'. Did you mean train? Known: train, "),
        ("train --epoch-s 3", "Unrecognized options: --epoch-s"),
        ("train --epochs three", "Error parsing --epochs: "),
        ("train --optimizer adagrad", "invalid choice 'adagrad' for argument '--optimizer'"),
        ("predict", "Missing from bmjax predict:"),
    ],
)
def test_wrong_words_exit_with_2(capsys, words, message):
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"bmjax {bmjax.__version__}\n", "")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom bmjax.cli import main\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'PIL', 'numpy', 'requests'}\n"
        "try:\n    main(['train', '-h'])\n"
        "finally:\n    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_doctor(capsys, monkeypatch, tmp_path):
    code, shown, _ = run(capsys, "doctor", "--json")
    found = json.loads(shown)
    assert code == (1 if found["problems"] else 0)
    assert found["backend"] == "cpu"
    assert len(found["devices"]) == 8
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("TPU_NAME", "pretended")
    code, shown, _ = run(capsys, "doctor")
    assert code == 1
    for part in ("there is a TPU", 'pip install --upgrade "jax[tpu]"', "Set BMJAX_CACHE"):
        assert part in shown


def test_doctor_says_who_sets_what_and_which_sizes_fit(capsys, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_pretended=7")
    monkeypatch.setattr("bmjax.machine.doctor.advice", lambda *found: [f"sizes for {found[2]}"])
    _, shown, _ = run(capsys, "doctor")
    assert "xla_tpu_pretended" in shown
    assert "7, by LIBTPU_INIT_ARGS" in shown
    assert "hint: sizes for 8" in shown
    found = json.loads(run(capsys, "doctor", "--json")[1])
    assert found["hints"] == ["sizes for 8"]
    setting = {"name": "xla_tpu_pretended", "value": "7", "source": "LIBTPU_INIT_ARGS"}
    assert setting in found["compiler"]


def test_doctor_says_why_convolutions_are_slow(capsys, monkeypatch):
    monkeypatch.setattr(onednn, "library", lambda: None)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn, "PACKAGE", "no-such-package")
    code, shown, _ = run(capsys, "doctor")
    assert code == 1
    assert "oneDNN is not installed" in shown
    assert "pip install no-such-package" in shown
    monkeypatch.setenv("BMJAX_ONEDNN", "0")
    assert "switched off by BMJAX_ONEDNN=0" in run(capsys, "doctor")[1]


@pytest.mark.parametrize("command", ["train", "distill", "evaluate", "predict", "bench", "doctor"])
def test_every_flag_has_a_help_text(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = run(capsys, command, "--help")
    assert code == 0
    kind = next(kind for kind, function in COMMANDS.items() if function.__name__ == f"_{command}")
    names = unflatten_names(kind)
    assert len(names) >= 1
    for name in names:
        flag = "--import" if name == "imports" else f"--{name.replace('_', '-')}"
        line = next((line for line in shown.splitlines() if flag in line), None)
        assert line is not None or name in ("path", "other", "images"), f"{flag} is not shown"
        assert f"{name}:" in documentation(kind), f"{flag} has no help text"
    assert "(default: " in shown


def unflatten_names(kind):
    if kind is EvaluateConfig or kind.__name__ == "PredictConfig":
        return [name for name in kind.__dataclass_fields__ if name != "device"]
    return list(flatten(kind()))


def documentation(kind):
    kinds = (
        [*kind.__mro__, *(type(v) for v in vars(kind()).values())]
        if kind in (TrainConfig, DistillConfig)
        else kind.__mro__
    )
    return "\n".join(each.__doc__ or "" for each in kinds)


def test_json_has_no_number_that_is_not_finite(capsys, monkeypatch):
    result = {"loss": float("nan"), "f1": [0.5, float("inf")], "examples": 3, "warnings": []}
    monkeypatch.setattr("bmjax.evaluate.measure.evaluate", lambda config: result)
    code, shown, _ = run(capsys, "evaluate", "RUN", "--json")
    assert code == 0
    assert json.loads(shown, parse_constant=pytest.fail) == {
        **result,
        "loss": None,
        "f1": [0.5, None],
    }


def test_configs_survive_json():
    for config in (TrainConfig(hidden_sizes=(3, 4), seed=2), DistillConfig(alpha=0.25)):
        flat = json.loads(json.dumps(flatten(config)))
        assert unflatten(type(config), flat, "it") == config
    with pytest.raises(UserError, match="of type int"):
        unflatten(TrainConfig, {"epochs": True}, "it")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --model cnn --out X", "training cnn on mnist5k, into X"),
        ("train --model cnn --out X --resume", "going on with the run in X"),
        (
            "finetune --weights a.pth --data npz:b.npz --out X",
            "fine-tuning a.pth on npz:b.npz, into X",
        ),
        (
            "distill --teacher A B --student mlp",
            "distilling A and B into mlp, on mnist5k",
        ),
    ],
)
def test_a_command_says_what_it_begins_before_it_imports_jax(words, line):
    code = (
        "import builtins, os, sys\nfrom rich.console import Console\nfrom bmjax import cli\n"
        "def first(*words, **_):\n"
        "    os.write(1, f'{words[-1]}\\n{\"jax\" in sys.modules}'.encode())\n"
        "    os._exit(0)\n"
        "Console.print = builtins.print = first\ncli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True)
    assert done.stdout.decode() == f"{line}\nFalse"


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path, shapes_npz):
    """By JAX's own count of programs that were not in its persistent cache."""
    code = """
import sys, jax
missed = []
jax.monitoring.register_event_listener(
    lambda name, **_: missed.append(name) if name.endswith("/cache_misses") else None)
from bmjax.cli import main
try:
    main(sys.argv[1:])
finally:
    print("missed", len(missed))
"""
    counts = []
    for number in range(2):
        words = [
            "train",
            "--data",
            f"npz:{shapes_npz}",
            "--out",
            str(tmp_path / str(number)),
            *SHORT,
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=with_cache(tmp_path / "cache"),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        counts.append(int(done.stdout.split()[-1]))
    assert counts[0] > 5
    assert counts[1] == 0


@pytest.mark.slow
def test_what_may_be_unreadable_is_asked_for_and_kept(capsys, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for name in ("a", "b"):
        write_class(data / "train" / name, 4)
        write_class(data / "val" / name, 2)
        for index in range(3):
            write(data / "train" / name / f"bad{index}.jpg", b"bad")
    words = ("--data", f"folder:{data}", "--image-size", "8")
    code, _, err = run(capsys, "train", *words, "--out", out, *SHORT)
    assert code == 2
    assert "6 of 18 images (33.3%) cannot be decoded" in err
    code, shown, err = run(capsys, "train", *words, "--out", out, *SHORT, "--max-unreadable", "0.4")
    assert code == 0, err
    assert "\nwarning: 6 of 14 images of train cannot be decoded and are left out" in shown
    assert run(capsys, "evaluate", out, "--split", "train", "--json")[0] == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = ("evaluate", out, "--data", f"folder:{tmp_path / 'moved'}", "--split")
    assert run(capsys, *moved, "validation")[0] == 0  # none of the six is in this split
    code, _, err = run(capsys, *moved, "train")
    assert (code, "6 of 18 images" in err) == (2, True)
    assert run(capsys, *moved, "train", "--max-unreadable", "0.4")[0] == 0
    code, _, err = run(capsys, *moved, "train", "--max-unreadable", "1.5")
    assert (code, "--max-unreadable is 1.5, but it must be in [0, 1]" in err) == (2, True)
