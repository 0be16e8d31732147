"""One file from a web server: checked, resumed where it broke off, whole or not at all.

Range requests are RFC 9110, section 14; the guard against a file that changed in between is its
`If-Range`, section 13.1.5.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import requests
import urllib3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bmjax.errors import UserError
from bmjax.machine.terminal import forgiving_console

PAUSES = (1.0, 2.0, 4.0)
_TIMEOUTS = (10.0, 30.0)  # seconds to connect, and between two pieces of the answer
_CHUNK_BYTES = 64 * 1024  # the most that is lost when a connection breaks off
_WORTH_ANOTHER_TRY = {408, 429, 500, 502, 503, 504}
_WAY_AROUND = (
    "Behind a proxy set HTTPS_PROXY. Without a connection download the file elsewhere and give "
    "its path in place of the name (--weights FILE), or set BMJAX_WEIGHTS_URL to the folder of a "
    "mirror."
)


class _TryAgainError(Exception):
    """What came so far stays, and another try may bring the rest."""

    def __init__(self, cause: str, unreachable: bool = False):
        super().__init__(cause)
        self.unreachable = unreachable


@dataclass(frozen=True)
class _Part:
    """What has come of a file, and the ETag of the version that it is a part of."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def tag(self) -> str:
        return self._tag_path.read_text("utf-8") if self._tag_path.exists() else ""

    @property
    def _tag_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.etag")

    def start(self, tag: str) -> None:
        """Empties the part before it is bound to another version."""
        self.path.write_bytes(b"")
        self._tag_path.unlink(missing_ok=True)
        # A weak tag may stand for different bytes, so If-Range does not admit it.
        if tag and not tag.startswith("W/"):
            self._tag_path.write_text(tag, "utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._tag_path.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        self.path.replace(target)
        self.remove()


def download(
    url: str,
    target: Path,
    sha256_prefix: str,
    *,
    pauses: Sequence[float] = PAUSES,
    console: Console | None = None,
) -> Path:
    """Brings a file to `target` unless it is there intact.

    What comes is gathered in `NAME.part` beside `target`, checked, and renamed. A lock keeps
    processes apart that want the same file: one downloads, the others wait and use it. A part
    stays when the download breaks off or the disk is full, and the next call goes on from there;
    if the whole then has the wrong SHA-256, it is downloaded anew from the start. The prefix in
    use has 32 bits: it shows damage, and does not protect from a server that means harm.

    Args:
        url: of the file, `http://` or `https://`; proxies of the environment are respected.
        target: where the file belongs; its folder is made if need be.
        sha256_prefix: how the SHA-256 of the file begins, in lower-case hexadecimal digits.
        pauses: seconds to wait before the second try, the third, and so on. One that finds no
            server at all at first is not repeated.
        console: where to say what happens; standard error if not given.

    Returns:
        `target`.

    Raises:
        UserError: the file cannot be had from `url`, is not the one meant, or `target` cannot
            be written.
    """
    console = forgiving_console(console, stderr=True)
    try:
        # Before the lock: a cache that is shared may be readable only.
        if _is_intact(target, sha256_prefix):
            return target
        with _lock(target, console):
            if not _is_intact(target, sha256_prefix):
                if target.exists():
                    _say(console, f"{target} is damaged (wrong SHA-256): downloading it again")
                    target.unlink()
                _bring(url, target, sha256_prefix, pauses, console)
    except OSError as error:
        raise _disk_error(target, error) from error
    return target


@contextlib.contextmanager
def _lock(target: Path, console: Console) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        _say(console, f"waiting for another process that is downloading {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _bring(
    url: str, target: Path, sha256_prefix: str, pauses: Sequence[float], console: Console
) -> None:
    part = _Part(target.with_name(f"{target.name}.part"))
    spliced = _receive(url, part, pauses, console)
    if spliced and not _is_intact(part.path, sha256_prefix):
        _say(console, f"the parts of {target.name} do not fit together: starting over")
        part.remove()
        _receive(url, part, pauses, console)
    found = _sha256(part.path)
    if not found.startswith(sha256_prefix):
        part.remove()
        raise UserError(
            f"what came from {_shown(url)} is not the file meant: its SHA-256 begins with "
            f"{found[: len(sha256_prefix)]}, not {sha256_prefix}. A proxy may have answered with "
            f"a page of its own, or the mirror holds another file. {_WAY_AROUND}"
        )
    part.finish(target)


def _receive(url: str, part: _Part, pauses: Sequence[float], console: Console) -> bool:
    """Fills `part` with as many tries as `pauses` allow; returns whether it has a seam."""
    begun = f" from {part.size / 1e6:.1f} MB on" if part.size else ""
    _say(console, f"downloading {_shown(url)}{begun} to {part.path.parent}")
    tries = 0
    while True:
        try:
            return _try_once(url, part, console)
        except _TryAgainError as error:
            if tries == len(pauses) or (tries == 0 and error.unreachable):
                raise _cannot(url, str(error), part) from error
            _say(console, f"{error}; trying again in {pauses[tries]:g} s")
        time.sleep(pauses[tries])
        tries += 1


def _try_once(url: str, part: _Part, console: Console) -> bool:
    begun, tag = part.size, part.tag
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes as they are sent
    if begun:
        headers["Range"] = f"bytes={begun}-"
        if tag:
            headers["If-Range"] = tag
    with requests.Session() as session, _open(session, url, headers, part) as response:
        if response.status_code == 416 and begun:
            return True  # nothing comes after the part: whole, or wrong, as its hash will show
        if response.status_code == 206:
            total = _check_range(response, part)
        else:
            part.start(response.headers.get("ETag", ""))
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        _append(response, part, total, console)
        return response.status_code == 206 and begun > 0


def _open(
    session: requests.Session, url: str, headers: dict[str, str], part: _Part
) -> requests.Response:
    try:
        response = session.get(url, headers=headers, stream=True, timeout=_TIMEOUTS)
    except requests.RequestException as error:
        cause = _cause(error)
        repeatable = isinstance(error, requests.ConnectionError | requests.Timeout)
        refused = isinstance(error, requests.exceptions.ProxyError | requests.exceptions.SSLError)
        if not repeatable or refused:
            raise _cannot(url, cause, part) from error
        raise _TryAgainError(cause, _never_connected(error)) from error
    status = response.status_code
    if status in (200, 206) or (status == 416 and "Range" in headers):
        return response
    response.close()
    cause = f"the answer is {status} {response.reason}"
    if status in _WORTH_ANOTHER_TRY:
        raise _TryAgainError(cause)
    raise _cannot(url, cause, part)


def _check_range(response: requests.Response, part: _Part) -> int | None:
    """Returns how long the whole file is, where the answer goes on exactly from the part."""
    sent = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range", ""))
    tag = response.headers.get("ETag")
    other_version = bool(part.tag and tag) and tag != part.tag
    if not sent or int(sent[1]) != part.size or other_version:
        part.remove()
        raise _TryAgainError("the server sent another part than the one asked for")
    return None if sent[2] == "*" else int(sent[2])


def _append(response: requests.Response, part: _Part, total: int | None, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(
        *columns,
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar, part.path.open("ab") as file:
        task = bar.add_task(part.path.stem, total=total, completed=part.size)
        try:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                bar.advance(task, len(chunk))
        except requests.RequestException as error:
            raise _TryAgainError(_cause(error)) from error
        file.flush()
        os.fsync(file.fileno())
    if total is not None and part.size < total:
        raise _TryAgainError(f"the connection ended after {part.size:,} of {total:,} bytes")


def _cause(error: requests.RequestException) -> str:
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy refuses or cannot be reached ({root})"
    if isinstance(error, requests.exceptions.SSLError):
        return (
            f"the encrypted connection (TLS) failed ({root}). Where a proxy puts in a certificate "
            "of its own, set REQUESTS_CA_BUNDLE to the file of that"
        )
    if isinstance(error, requests.Timeout):
        return "there is no answer in time"
    if _never_connected(error):
        return f"there is no connection ({root})"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return f"the connection broke off ({root})"
    return str(error)


def _never_connected(error: requests.RequestException) -> bool:
    # Requests wraps what urllib3 says before a connection stands into this one.
    return isinstance(error, requests.ConnectTimeout) or any(
        isinstance(part, urllib3.exceptions.MaxRetryError) for part in error.args
    )


def _cannot(url: str, cause: str, part: _Part) -> UserError:
    kept = "What came so far is kept for the next try. " if part.size else ""
    return UserError(f"cannot download {_shown(url)}: {cause}. {kept}{_WAY_AROUND}")


def _disk_error(target: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"there is no room for {target.name} in {target.parent} ({error.strerror}). Free some "
            "and start again, which goes on from what came so far, or set BMJAX_CACHE to a "
            "folder with more."
        )
    return UserError(
        f"the cache folder {target.parent} cannot be used ({error.strerror or error}). "
        "Set BMJAX_CACHE to a folder that can be read and written."
    )


def _shown(url: str) -> str:
    """Returns `url` without a password, which belongs in no log."""
    return re.sub(r"//[^/@]*@", "//", url)


def _is_intact(path: Path, sha256_prefix: str) -> bool:
    try:
        return _sha256(path).startswith(sha256_prefix)
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
