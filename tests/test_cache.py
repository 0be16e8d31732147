"""The folder for what can be made again: where it is, and where there is none."""

import errno
import os
import pwd
import re

import jax
import pytest

from bmjax.errors import UserError
from bmjax.machine import cache
from bmjax.machine.doctor import examine


def setting(name):
    return getattr(jax.config, name)


@pytest.fixture
def plain(monkeypatch):
    """As in a process that has not looked for its cache yet."""
    cache._of_home_or_temporary.cache_clear()
    before = setting("jax_compilation_cache_dir")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("BMJAX_CACHE")
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_compilation_cache_max_size", cache.COMPILED_BYTES)
    cache._of_home_or_temporary.cache_clear()


def nobody(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))


def full(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=2**20))


def over_quota(monkeypatch, tmp_path):
    def refuse(**_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (nobody, "the home folder is not known"),
        (a_file, "file/.cache/bmjax cannot be written: Not a directory"),
        (full, "the disk of .*/.cache/bmjax is full"),
        (over_quota, ".cache/bmjax cannot be written: Disk quota exceeded"),
    ],
)
@pytest.mark.usefixtures("plain")
def test_without_a_home_the_cache_is_temporary_and_said_once(
    capsys, tmp_path, monkeypatch, spoil, why
):
    spoil(monkeypatch, tmp_path)
    cache.use_compilation_cache(needed=False)
    assert setting("jax_compilation_cache_dir") is None
    assert capsys.readouterr().err == ""
    folder = cache.cache_folder()
    assert not folder.is_relative_to(tmp_path)
    (err,) = capsys.readouterr().err.splitlines()
    assert err.startswith("bmjax: warning: there is no folder for the cache (")
    assert re.search(why, err)
    assert cache.prepare_once(folder / "made", lambda made: None).is_dir()
    cache.use_compilation_cache()
    assert setting("jax_compilation_cache_dir") == str(folder / "compiled")
    assert cache.cache_folder() == folder
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("plain")
def test_a_home_that_can_be_written_keeps_the_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "bmjax"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("plain")
def test_without_a_name_for_the_user_jax_keeps_to_no_size(tmp_path, monkeypatch):
    nobody(monkeypatch, tmp_path)
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path))
    cache.use_compilation_cache()
    assert setting("jax_compilation_cache_dir") == str(tmp_path / "compiled")
    assert setting("jax_compilation_cache_max_size") == -1


@pytest.mark.usefixtures("plain")
def test_a_cache_that_was_asked_for_and_cannot_be_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file is a file, not a folder.*Set BMJAX_CACHE"):
        cache.use_compilation_cache()
    with pytest.raises(UserError, match=r"file/a cannot be written.*Set BMJAX_CACHE"):
        cache.prepare_once(cache.cache_folder() / "a" / "b", lambda folder: None)
    cache.use_compilation_cache(needed=False)
    assert setting("jax_compilation_cache_dir") is None
    found = examine()
    assert found["cache"] is None
    assert "file is a file, not a folder. Set BMJAX_CACHE" in " ".join(found["problems"])
    monkeypatch.setenv("BMJAX_CACHE", "~nosuch/cache")
    with pytest.raises(UserError, match="there is no user nosuch"):
        cache.use_compilation_cache()


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_disk_that_becomes_full_is_named_and_nothing_is_left(tmp_path, kind):
    def prepare(folder):
        (folder / "part").write_text("1")
        raise kind(f"write() failed: {os.strerror(errno.ENOSPC)}; writing part")

    with pytest.raises(UserError, match=r"cannot be written: No space left on device.*BMJAX_CACHE"):
        cache.prepare_once(tmp_path / "made", prepare)
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_the_time_of_its_use_is_removed(tmp_path):
    for name in ("one-cache", "one-atime", "killed-cache", "now-cache"):
        (tmp_path / name).write_bytes(b"8 bytes.")
    os.utime(tmp_path / "killed-cache", (0, 0))
    cache._mend_compiled(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "now-cache",
        "one-atime",
        "one-cache",
    ]
