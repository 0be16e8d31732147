import io
from typing import Any

from rich.console import Console

from bmjax.train.session import _Calls
from bmjax.train.tracking import Display

FIGURES = {"loss": 1.0, "accuracy": 0.5, "examples_per_second": 1200.0}


def lines_of(terminal):
    console: Any = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    display = Display("mlp", 2, 3, 0, console)
    display.say_stage("compiling")
    for step in range(1, 7):
        display.advance(step, FIGURES)
        if step % 3 == 0:
            display.epoch(step // 3, {**FIGURES, "validation_accuracy": 0.25})
    display.close()
    text = console.file.getvalue()
    return [line for line in text.replace("\x1b[2K", "\n").splitlines() if "validation" in line]


def test_the_lines_of_epochs_stay_on_a_terminal_and_elsewhere():
    for terminal in (False, True):
        lines = lines_of(terminal)
        assert len(lines) == 2
        for number, line in enumerate(lines, 1):
            begin = f"mlp epoch {number}/2  loss 1.0000  accuracy 50.00%  validation 25.00%"
            assert line.startswith(f"{begin}  1,200 images/s  0:0")
            assert line.endswith(" left")


def test_a_speed_that_was_not_measured_is_not_shown():
    console: Any = Console(file=io.StringIO(), width=120)
    Display("mlp", 1, 1, 0, console).epoch(1, {"loss": 1.0, "examples_per_second": 0.0})
    assert console.file.getvalue() == "mlp epoch 1/1  loss 1.0000  0:00 left\n"


def test_the_speed_is_that_of_the_epoch():
    calls = _Calls()
    assert calls.steps_that_fit() == 1
    calls.add(1, 30.0)  # compiles
    assert (calls.steps_per_second(), calls.steps_that_fit()) == (0.0, 1)
    calls.add(10, 1.0)
    calls.add(30, 1.0)
    assert calls.steps_per_second() == 20
    calls.begin_epoch()
    assert (calls.steps_per_second(), calls.steps_that_fit()) == (0.0, 10)
    calls.add(50, 0.5)
    assert (calls.steps_per_second(), calls.steps_that_fit()) == (100, 50)
