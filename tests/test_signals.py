"""Signals before a command trains; those while it trains are in test_loop."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bmjax.machine import signals

SAID = {
    signal.SIGINT: (130, "bmjax: stopped by Ctrl-C\n"),
    signal.SIGTERM: (143, "bmjax: stopped by SIGTERM\n"),
}
KILL = "import os, sys, signal\nos.kill(os.getpid(), int(sys.argv[1]))\n"


def run(code, signum, folder):
    done = subprocess.run(
        [sys.executable, "-c", f"from bmjax.machine import signals\n{code}", str(int(signum))],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "begun\n"
    return done.returncode, done.stderr


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def signum(request):
    return request.param


def test_a_package_that_swallows_everything_does_not_swallow_signals(tmp_path, signum):
    (tmp_path / "inner.py").write_text(KILL)
    (tmp_path / "outer.py").write_text("try:\n    import inner\nexcept BaseException:\n    pass\n")
    code = "signals.leave_on_signals()\nprint('begun')\nimport outer\nprint('went on')"
    assert run(code, signum, tmp_path) == SAID[signum]


def test_a_callback_whose_exceptions_python_drops_does_not_swallow_signals(tmp_path, signum):
    code = (
        "import gc, os, sys\nsignals.leave_on_signals()\nprint('begun')\n"
        "gc.callbacks.append(lambda *_: os.kill(os.getpid(), int(sys.argv[1])))\n"
        "gc.collect()\nprint('went on')"
    )
    assert run(code, signum, tmp_path) == SAID[signum]


def test_a_signal_swallowed_before_is_answered_when_training_begins(signum):
    before = signals.leave_on_signals()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            signal.raise_signal(signum)
        assert signals.asked() == signum
        with pytest.raises((KeyboardInterrupt, SystemExit)), signals.noting_signals():
            raise AssertionError("training began")
    finally:
        signals.restore(before)
    assert signal.getsignal(signum) == before[signum]


def test_what_tells_a_whole_group_may_come_twice(signum):
    before = signals.leave_on_signals()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            signal.raise_signal(signum)
        signal.raise_signal(signum)
    finally:
        signals.restore(before)


def test_a_command_is_light_until_it_takes_care_of_signals():
    code = "import sys, bmjax.cli; print(sorted({'tyro', 'rich', 'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def words(tmp_path):
    return ["-m", "bmjax.cli", "train", "--model", "mlp", "--out", str(tmp_path / "run")]


def test_a_signal_while_a_command_imports_jax(tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *words(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr as errors:
        next(line for line in errors if line.endswith("jax._src.config\n"))
        process.send_signal(signum)
        said = [line for line in errors if not line.startswith("import time:")]
    assert (process.wait(60), *said) == SAID[signum]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_the_command(tmp_path, signum):
    code, said = SAID[signum]
    for number in range(30):
        process = subprocess.Popen(
            [sys.executable, *words(tmp_path / str(number))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.3 + 0.1 * number)  # before, a busy machine may not have begun
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert errors.startswith(said.strip())
        assert errors.count("\n") == 1
