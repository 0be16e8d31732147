import json
import random

import pytest

from bmjax import cli
from bmjax.config import VerifyResumeConfig
from bmjax.errors import UserError
from bmjax.train.verify_resume import MOMENTS, Times, _Runner, check, verify_resume


def test_words_after_two_dashes_are_the_command_that_is_verified():
    config = cli.parse(["verify-resume", "--kills", "3", "--", "train", "--model", "cnn"])
    assert config == VerifyResumeConfig(kills=3, command=("train", "--model", "cnn"))
    assert cli.parse(["verify-resume"]).command[0] == "train"
    assert set(cli.parse(["verify-resume"]).at) == set(MOMENTS)


def test_a_wrong_flag_of_that_command_is_said_before_anything_is_trained(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify-resume", "--", "train", "--modle", "cnn"])
    assert "--modle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": ("evaluate", "runs/mlp")}, "one of the commands train, finetune, distill"),
        ({"command": ("train", "--out", "x")}, "--out is for verify-resume to choose"),
        ({"command": ("train", "--resume")}, "--resume is for verify-resume"),
        ({"kills": 0}, "--kills must be at least 1"),
        ({"kills_per_run": 0}, "--kills-per-run must be at least 1"),
        ({"at": ()}, "--at needs at least one of start"),
    ],
)
def test_misuse_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        check(VerifyResumeConfig(**changes))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is there already"):
        verify_resume(VerifyResumeConfig(out=str(tmp_path)))


def words(data, *more):
    return (
        *("train", "--model", "mlp", "--hidden-sizes", "16", "--data", f"npz:{data}"),
        *("--epochs", "300", "--batch-size", "16", "--no-tensorboard", *more),
    )


@pytest.mark.slow
def test_a_command_that_fails_by_itself_is_said(tmp_path, shapes_npz):
    wrong = words(shapes_npz, "--optimizer", "sgd", "--learning-rate", "1e30")
    with pytest.raises(UserError, match=r"exit code 0, but 1: .*loss is not finite"):
        verify_resume(VerifyResumeConfig(kills=1, out=str(tmp_path / "out"), command=wrong))


@pytest.mark.slow
def test_killed_runs_are_compared_with_the_whole_one(tmp_path, shapes_npz, capsys):
    out = tmp_path / "out"
    moments = ["compile", "save", "clean-up", "end"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(
            [
                *("verify-resume", "--kills", "5", "--at", *moments, "--out", str(out)),
                *("--", *words(shapes_npz)),
            ]
        )
    shown = capsys.readouterr().out
    assert "5 of 5 equal" in shown
    report = json.loads((out / "verify-resume.json").read_text())
    kills = [trial["kills"][0] for trial in report["trials"]]
    assert [kill["moment"] for kill in kills] == [*moments, "compile"]
    assert [kill["signal"] for kill in kills] == ["SIGKILL"] * 4 + ["SIGTERM"]
    assert kills[3]["step"] == 300 * 6
    assert {path.name for path in out.iterdir()} == {"whole", "whole.log", "verify-resume.json"}
    # What is expected is looked at: nothing equals a run that has something more.
    runner = _Runner(words(shapes_npz), out, 6, Times(1.0, 2.0, 3.0), random.Random(0))
    trial = runner.run("save", "SIGTERM", 2, {"thing": 1})
    assert [kill.signal for kill in trial.kills] == ["SIGTERM"] * 2
    assert all(kill.saved for kill in trial.kills)
    assert "thing is missing" in trial.differences
    assert (out / "killed-6" / "checkpoints").is_dir()
