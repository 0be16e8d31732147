"""Downloads of published weights, from a server of our own."""

import errno
import io
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from rich.console import Console

from bmjax.errors import UserError
from bmjax.weights import download as download_module
from bmjax.weights.download import download
from tests.weights_named_helpers import BODY, PREFIX, Answer, Server, serve

OTHER = random.Random(2).randbytes(300_000)
NO_WAIT = (0.0, 0.0, 0.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve(monkeypatch) as state:
        yield state


@pytest.fixture
def get(server: Server, tmp_path: Path) -> SimpleNamespace:
    """`get()` downloads `BODY`; `target`, `part` and `said` show what it left."""
    said = io.StringIO()
    target = tmp_path / "cache" / "weights" / "net.pth"

    class Get(SimpleNamespace):
        def __call__(self, url: str = f"{server.url}/net.pth", prefix: str = PREFIX) -> Path:
            return download(url, target, prefix, pauses=NO_WAIT, console=Console(file=said))

    return Get(target=target, part=target.with_name("net.pth.part"), said=said)


def left(get: SimpleNamespace) -> set[str]:
    return {path.name for path in get.target.parent.iterdir()} - {"net.pth.lock"}


def test_a_file_is_downloaded_once(server, get):
    assert get() == get.target
    assert get.target.read_bytes() == BODY
    assert left(get) == {"net.pth"}
    assert "Range" not in server.requests[0]
    get()
    assert len(server.requests) == 1


def test_a_damaged_file_in_the_cache_is_downloaded_again(server, get):
    get()
    get.target.write_bytes(BODY[:-1] + b"?")
    assert get().read_bytes() == BODY
    assert len(server.requests) == 2
    assert "damaged" in get.said.getvalue()


def test_a_file_with_another_hash_is_refused_and_removed(server, get):
    with pytest.raises(UserError, match=rf"{server.url}/net.pth.*{PREFIX}, not 00000000.*in place"):
        get(prefix="00000000")
    assert left(get) == set()
    assert len(server.requests) == 1


def test_a_cut_connection_is_resumed_where_it_broke_off(server, get):
    server.plan = [Answer(cut=200_000)]
    assert get().read_bytes() == BODY
    first, second = server.requests
    assert "Range" not in first
    begin = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - download_module._CHUNK_BYTES < begin <= 200_000
    assert second["If-Range"] == '"one"'
    assert left(get) == {"net.pth"}


def test_a_server_that_ignores_ranges_starts_from_the_first_byte(server, get):
    server.plan = [Answer(cut=200_000), Answer(ranges=False)]
    assert get().read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_range_other_than_asked_is_not_used(server, get):
    server.plan = [Answer(cut=200_000), Answer(off_by=7)]
    assert get().read_bytes() == BODY
    assert ["Range" in request for request in server.requests] == [False, True, False]


def test_a_range_shorter_than_asked_is_not_the_end(server, get):
    server.plan = [Answer(cut=200_000), Answer(piece=50_000)]
    assert get().read_bytes() == BODY
    first, second = (int(request["Range"][6:-1]) for request in server.requests[1:])
    assert second == first + 50_000
    assert "starting over" not in get.said.getvalue()


@pytest.mark.parametrize("if_range", [True, False], ids=["if-range", "no-if-range"])
def test_a_file_that_changed_between_two_tries_is_not_spliced(server, get, if_range):
    server.plan = [Answer(cut=200_000), *[Answer(cut=0)] * 3]
    server.body, server.if_range = OTHER, if_range
    with pytest.raises(UserError, match="kept for the next try"):
        get()
    begun = get.part.stat().st_size
    server.body, server.tag, server.plan = BODY, '"two"', [Answer(cut=250_000)]
    assert get().read_bytes() == BODY
    resumed = server.requests[4]
    assert (resumed["Range"], resumed["If-Range"]) == (f"bytes={begun}-", '"one"')
    # The first answer was the whole new file, or a range of it that was not used.
    last = server.requests[-1]
    assert last.get("If-Range") == ('"two"' if if_range else None)
    assert "starting over" not in get.said.getvalue()


def test_parts_that_do_not_fit_are_downloaded_anew(server, get):
    """Without an ETag only the hash shows that the file changed, or that the part was damaged."""
    server.tag = None
    get.part.parent.mkdir(parents=True)
    get.part.write_bytes(OTHER[:100_000])
    assert get().read_bytes() == BODY
    assert [request.get("Range") for request in server.requests] == ["bytes=100000-", None]
    assert "If-Range" not in server.requests[0]
    assert "starting over" in get.said.getvalue()


def test_a_weak_etag_binds_no_range(server, get):
    server.tag, server.plan = 'W/"one"', [Answer(cut=200_000)]
    assert get().read_bytes() == BODY
    assert "Range" in server.requests[1]
    assert "If-Range" not in server.requests[1]


def test_a_part_that_is_whole_already_needs_no_byte_more(server, get):
    get.part.parent.mkdir(parents=True)
    get.part.write_bytes(BODY)
    assert get().read_bytes() == BODY
    assert len(server.requests) == 1  # answered by 416


def test_a_part_that_is_too_long_is_downloaded_anew(server, get):
    get.part.parent.mkdir(parents=True)
    get.part.write_bytes(OTHER + b"more")
    assert get().read_bytes() == BODY
    assert len(server.requests) == 2


def test_four_cut_tries_are_an_error_and_the_next_call_goes_on(server, get):
    server.plan = [Answer(cut=70_000)] * 4
    with pytest.raises(
        UserError, match=rf"{server.url}/net.pth: the connection .*kept.*path in place"
    ):
        get()
    assert len(server.requests) == 4
    assert left(get) == {"net.pth.part", "net.pth.part.etag"}
    begun = get.part.stat().st_size
    assert begun >= 4 * 65_536
    assert get().read_bytes() == BODY
    assert server.requests[4]["Range"] == f"bytes={begun}-"
    assert "from 0.3 MB on" in get.said.getvalue()


def test_the_pauses_between_tries_grow(server, get, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", slept.append)
    server.plan = [Answer(cut=0)] * 3
    download(f"{server.url}/net.pth", get.target, PREFIX, console=Console(file=get.said))
    assert slept == [1.0, 2.0, 4.0]
    assert "trying again in 4 s" in get.said.getvalue()


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, get):
    server.plan = [Answer(status=503), Answer(status=429)]
    get()
    assert len(server.requests) == 3
    get.target.unlink()
    server.plan = [Answer(status=404)]
    with pytest.raises(UserError, match=rf"{server.url}/net.pth: .*404 Not Found.*path in place"):
        get()
    assert len(server.requests) == 4


def test_no_server_is_said_at_once(server, get):
    url = "http://127.0.0.1:1/net.pth"  # a reserved port
    with pytest.raises(UserError, match=rf"{url}: there is no connection .*refused.*path in place"):
        get(url)
    assert "trying again" not in get.said.getvalue()


def test_a_host_without_an_address_is_said(get, monkeypatch):
    def fail(*_, **__):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    with pytest.raises(
        UserError, match=r"http://nowhere.invalid/a.pth: .*not known.*path in place"
    ):
        get("http://nowhere.invalid/a.pth")


def test_a_silent_server_is_said(server, get, monkeypatch):
    hold = threading.Event()
    server.plan = [Answer(cut=0, hold=hold) for _ in range(4)]
    monkeypatch.setattr(download_module, "_TIMEOUTS", (5.0, 0.05))
    with pytest.raises(UserError, match=r"timed out.*path in place"):
        get()
    hold.set()


def test_failed_encryption_is_said(server, get):
    url = server.url.replace("http:", "https:") + "/net.pth"
    with pytest.raises(UserError, match=rf"{url}: .*TLS.*REQUESTS_CA_BUNDLE.*path in place"):
        get(url)


def test_a_proxy_is_used_and_its_refusal_is_said(server, get, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(UserError, match=r"https://a.invalid/net.pth: .*proxy .*403.*path in place"):
        get("https://a.invalid/net.pth")
    assert get("http://a.invalid/net.pth").read_bytes() == BODY
    assert server.paths == ["http://a.invalid/net.pth"]


def test_an_address_that_is_none_is_said(server, get):
    with pytest.raises(UserError, match=r"files/net.pth: Invalid URL.*No scheme.*path in place"):
        get("files/net.pth")


def test_a_password_in_the_address_is_not_shown(server, get):
    server.plan = [Answer(status=403)]
    with pytest.raises(UserError) as caught:
        get(server.url.replace("://", "://me:secret@") + "/net.pth")
    assert "Authorization" in server.requests[0]
    assert "secret" not in str(caught.value) + get.said.getvalue()


def test_a_full_disk_is_said_and_what_came_is_kept(server, get, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=rf"no room for net.pth in {get.target.parent}"):
            get()
    assert get.part.read_bytes() == BODY
    assert get().read_bytes() == BODY


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_disk_full_in_the_middle_is_not_taken_for_a_cut_connection(server, get):
    get.part.parent.mkdir(parents=True)
    get.part.symlink_to("/dev/full")
    with pytest.raises(UserError, match="no room"):
        get()
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_is_said(server, get):
    get.target.parent.parent.write_text("a file where the folder belongs")
    with pytest.raises(UserError, match=r"cannot be used .*BMJAX_CACHE"):
        get()
    assert server.requests == []


def test_a_file_in_a_cache_that_can_only_be_read_is_used(server, get, monkeypatch):
    get()
    monkeypatch.setattr(filelock, "FileLock", None)  # no lock can be made there
    assert get() == get.target


def test_of_two_at_once_one_downloads_and_the_other_waits(server, get):
    hold = threading.Event()
    server.plan = [Answer(hold=hold)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(get), pool.submit(get)]
        for _ in range(500):
            if "waiting for another process" in get.said.getvalue() and server.requests:
                break
            threading.Event().wait(0.01)
        hold.set()
        assert [future.result(20) for future in both] == [get.target] * 2
    assert "waiting for another process" in get.said.getvalue()
    assert get.target.read_bytes() == BODY
    assert len(server.requests) == 1


def test_a_killed_process_leaves_a_part_and_no_lock(server, get):
    hold = threading.Event()
    server.plan = [Answer(hold=hold)]
    code = (
        "import sys; from pathlib import Path; from bmjax.weights.download import download; "
        "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, f"{server.url}/net.pth", str(get.target), PREFIX]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        with ThreadPoolExecutor(1) as pool:
            for _ in range(2000):
                if get.part.exists() and get.part.stat().st_size:
                    break
                threading.Event().wait(0.01)
            waiting = pool.submit(get)  # while the other process holds the lock
            for _ in range(500):
                if "waiting for another process" in get.said.getvalue():
                    break
                threading.Event().wait(0.01)
            process.send_signal(signal.SIGKILL)
            assert waiting.result(20).read_bytes() == BODY
        hold.set()
    assert "waiting for another process" in get.said.getvalue()
    assert "If-Range" in server.requests[1]


def test_a_terminal_shows_the_progress_and_a_file_does_not(server, get, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    download(f"{server.url}/net.pth", get.target, PREFIX, console=terminal)
    assert "300.0/300.0 kB" in shown.getvalue()
    get.target.unlink()
    get()
    # Older versions of rich end what is no terminal with an empty line.
    said = get.said.getvalue().rstrip("\n")
    assert said == f"downloading {server.url}/net.pth to {get.target.parent}"
