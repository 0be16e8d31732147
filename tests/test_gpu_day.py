"""The order of experiments/gpu_day.py, with steps that take no time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bmjax import cli
from experiments import gpu_day
from experiments.gpu_day import Step, work_through

SAYS = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write('x')"


def python(script, *words):
    return (sys.executable, "-c", script, *map(str, words))


def step(name, *commands, seconds=20.0, **options):
    return Step(name, f"about {name}", seconds, commands, **options)


def results(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}


def test_what_is_done_is_not_done_again_and_the_rest_is(tmp_path, capsys):
    counted, there = tmp_path / "counted", tmp_path / "there"
    steps = [
        step("first", python(SAYS, counted)),
        step("second", python("import sys, os; sys.exit(not os.path.exists(sys.argv[1]))", there)),
    ]
    assert not work_through(steps, tmp_path / "out", "a machine", 1)
    assert {name: each["status"] for name, each in results(tmp_path / "out").items()} == {
        "first": "done",
        "second": "failed",
    }
    there.touch()
    assert work_through(steps, tmp_path / "out", "a machine", 1)
    assert counted.read_text() == "x"
    assert "first: done before" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| second | about second | done |" in report
    assert "a machine" in report


def test_a_step_that_fails_tells_its_last_line_and_the_others_go_on(tmp_path):
    fails = python("print('before'); raise SystemExit('what was wrong')")
    steps = [step("fails", fails, python("print('never')")), step("goes-on", python("print(7)"))]
    assert not work_through(steps, tmp_path, "", 1)
    found = results(tmp_path)
    assert found["fails"]["reason"] == "exit code 1: what was wrong"
    assert found["goes-on"]["status"] == "done"
    report = (tmp_path / "report.md").read_text()
    assert "what was wrong" in report
    assert "never" not in report.split("## fails")[1].split("$")[-1]


@pytest.mark.slow
def test_a_step_has_a_limit_which_what_it_starts_has_too(tmp_path):
    there = tmp_path / "child"
    child = f"import time; time.sleep(1.5); open({str(there)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert not work_through([step("slow", python(parent), seconds=0.3)], tmp_path / "out", "", 1)
    assert time.monotonic() - begin < 1.5
    assert results(tmp_path / "out")["slow"]["status"] == "stopped"
    time.sleep(1.7)
    assert not there.exists()


def test_what_cannot_be_had_is_skipped_with_the_reason(tmp_path):
    lacks = step("lacks", python("print()"), packages=("no_such_package",))
    no_data = step("no-data", python("raise SystemExit('Fault: no network')"), no_data="Fault")
    assert work_through([lacks, no_data], tmp_path, "", 1)
    found = results(tmp_path)
    assert found["lacks"]["reason"] == "not installed: no_such_package"
    assert (found["no-data"]["status"], found["no-data"]["reason"]) == (
        "skipped",
        "Fault: no network",
    )


def test_nothing_begins_when_the_time_is_over(tmp_path, capsys):
    assert not work_through([step("late", python("print()"))], tmp_path, "", 0)
    assert "late: no time left" in capsys.readouterr().out
    assert "| late | about late | not done |" in (tmp_path / "report.md").read_text()


def test_all_steps_end_within_the_time_that_is_said(tmp_path):
    steps = gpu_day.make_steps(tmp_path, "tfds:cifar10", tiny=False)
    assert sum(each.seconds for each in steps) <= 60 * gpu_day.MINUTES
    assert len({each.name for each in steps}) == len(steps)


@pytest.mark.parametrize("tiny", [False, True])
def test_its_commands_are_understood(tiny, tmp_path):
    begin = (sys.executable, "-m", "bmjax.cli")
    commands = [
        command[3:]
        for each in gpu_day.make_steps(tmp_path, "tfds:cifar10", tiny)
        for command in each.commands
        if command[:3] == begin
    ]
    assert len(commands) >= 7
    for command in commands:
        cli.parse(list(command))
    files = [gpu_day.ROOT / "tests" / f"test_{name}.py" for name in gpu_day._TESTS]
    assert all(file.is_file() for file in files)


def test_an_interrupted_run_is_gone_on_with(tmp_path):
    """A run's folder that is there already is told to the command."""

    def of_cifar():
        steps = gpu_day.make_steps(tmp_path, "mnist5k", True)
        return next(each for each in steps if each.name == "cifar").commands[1]

    assert "--resume" not in of_cifar()
    (tmp_path / "cifar" / "run").mkdir(parents=True)
    (tmp_path / "cifar" / "run" / "config.json").touch()
    assert of_cifar()[-1] == "--resume"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "JAX computes on cpu, and a GPU is expected; or give --any-backend"),
        (["--steps", "nothing"], "there is no step nothing; these are: doctor, tests"),
    ],
)
def test_misuse_ends_with_2(words, said, tmp_path):
    root = Path(gpu_day.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, gpu_day.__file__, "--out", str(tmp_path), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert said in done.stderr
