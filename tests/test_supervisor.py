"""What the supervisor makes of a command's end; the command is a script here."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from bmjax.cli import supervisor
from bmjax.cli.supervisor import lost, supervise

PYTHON = sys.executable
DUMP = "F1127 09:31:02 3370 client.h:80] Terminating process because the JAX distributed service"
LOST = f"bmjax: {lost('process 3')}\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capfdbinary):
    """Runs Python code as the command; returns its exit code and what was printed."""

    def run(code):
        script = tmp_path / "python"
        script.write_text(f"#!{PYTHON}\nimport os, signal, sys, time\n{code}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(supervisor.sys, "executable", str(script))
        exit_code = supervise(["train"], "process 3")
        out, err = capfdbinary.readouterr()
        return exit_code, out.decode(), err.decode()

    return run


def says(*lines):
    text = "".join(f"{line}\n" for line in lines).encode()
    return f"os.write(2, {text!r})\n"


def test_what_the_command_says_and_how_it_ends_is_handed_on(run):
    code = "print(sys.argv[1:])\n" + says("bmjax: no such file") + "os._exit(2)"
    assert run(code) == (2, "['-m', 'bmjax.cli', 'train']\n", "bmjax: no such file\n")
    assert run("pass") == (0, "", "")


def test_progress_in_connecting_is_left_out(run):
    lines = ("[Gloo] Rank 1 is connected to 1 peer ranks.", "1 is connected peer ranks is : 1")
    assert run(says(*lines, "one warning")) == (0, "", "one warning\n")


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(1)"])
def test_after_a_dump_the_loss_is_said_once(run, end):
    lines = ("E1127 unhealthy: 2", DUMP, "*** Check failure stack trace: ***", "  @ 0x7f xla::")
    assert run(says(*lines) + end) == (1, "", f"E1127 unhealthy: 2\n{LOST}")
    # What the command said before stands alone.
    assert run(says("bmjax: process 3 ended", *lines[1:]) + end) == (
        1,
        "",
        "bmjax: process 3 ended\n",
    )


def test_those_that_never_met_are_told_what_to_look_at(run):
    code = says(DUMP, "RPC: /xla.coordination.CoordinationService/RegisterTask") + "os.abort()"
    exit_code, _, err = run(code)
    assert exit_code == 1
    assert err.startswith("bmjax: process 3 did not meet all the others in time. Check that as")


def test_an_error_of_its_own_is_not_taken_for_a_loss(run):
    assert run(says("Traceback", "ValueError") + "os._exit(1)") == (
        1,
        "",
        "Traceback\nValueError\n",
    )


def test_a_signal_to_the_command_is_named(run):
    assert run("os.kill(os.getpid(), signal.SIGKILL)") == (
        137,
        "",
        "bmjax: process 3 got SIGKILL\n",
    )


def test_signals_are_handed_on(run):
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert run(code)[0] == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_ends_with_its_supervisor():
    reads, holds = os.pipe()
    code = (
        "import os, sys, time\nfrom bmjax.cli import supervisor\n"
        "assert supervisor.watch() and not supervisor.watch()\nprint('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "BMJAX_SUPERVISOR": str(reads)},
        pass_fds=(reads,),
        stdout=subprocess.PIPE,
    )
    os.close(reads)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.close(holds)
    assert process.wait(20) == 1
    process.stdout.close()
