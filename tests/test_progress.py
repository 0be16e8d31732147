import io
import threading
from typing import Any

import pytest
from rich.console import Console

from bmjax.machine import progress


def console(terminal) -> Any:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def bars() -> Any:
    board: Any = progress._board
    return board._progress


def test_elsewhere_than_on_a_terminal_each_stage_is_a_line():
    shown = console(False)
    with progress.shown_on(shown):
        with progress.stage("reading 3 images", 3) as advance:
            advance(3)
        with progress.stage("measuring", line=False):
            pass
        with progress.shown_on(console(False)), progress.stage("compiling [b]"):
            pass
    assert shown.file.getvalue() == "reading 3 images\ncompiling [b]\n"


def test_on_a_terminal_stages_under_way_share_the_bars():
    shown = console(True)
    with progress.shown_on(shown):
        with progress.stage("reading 2,000 images", 2000) as advance:
            threads = [threading.Thread(target=advance, args=(500,)) for _ in range(2)]
            for thread in threads:
                thread.start()
                thread.join()
            with progress.stage("compiling [b]"):
                bars().refresh()
                shown.print("said meanwhile")
        assert bars() is None
        with progress.stage("again"):
            pass
    text = shown.file.getvalue()
    for part in ("reading 2,000 images", "1,000 of 2,000", "compiling [b]", "said meanwhile\n"):
        assert part in text
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and no bar is left


def test_stages_end_with_what_fails_in_them():
    with progress.shown_on(console(True)):
        with pytest.raises(ValueError, match="no"), progress.stage("reading"):
            raise ValueError("no")
        assert bars() is None
    assert progress._board is None


def test_where_nothing_shows_them_stages_are_silent_at_first(capfd):
    with progress.stage("reading", 2) as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")
