"""Paths that begin with a home folder, wherever a path is taken."""

import dataclasses
import pwd
from pathlib import Path

import pytest

from bmjax.cli import parse
from bmjax.config import TrainConfig, paths
from bmjax.config.paths import user_path, with_user_paths
from bmjax.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder(home, monkeypatch):
    assert user_path("~/a/b") == home / "a" / "b"
    assert user_path("~") == home
    assert user_path("a/~/b") == Path("a/~/b")
    monkeypatch.chdir(home.parent)
    Path("~$photo.jpg").write_text("")
    assert user_path("~$photo.jpg") == Path("~$photo.jpg")


def test_a_home_that_is_not_known_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"~nosuch/x cannot be found: there is no user nosuch"):
        user_path("~nosuch/x")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="the home folder is not known, as HOME is not set"):
        user_path("~/x")


def test_every_path_of_every_command_may_begin_with_one(home):
    """By the words of the command line, whose configs know no other path than these."""
    commands = {
        "train --out ~/o": {"out"},
        "finetune --weights ~/w --data npz:x --out ~/o": {"weights", "out"},
        "distill --teacher ~/a ~/b --teacher-cache ~/c --student-weights ~/s --out ~/o": {
            *("teacher", "teacher_cache", "student_weights", "out")
        },
        "evaluate ~/r": {"path"},
        "predict ~/r ~/a.png ~/b.png": {"path", "images"},
        "convert ~/w --out ~/o --images ~/i": {"path", "out", "images"},
        "verify-resume --out ~/o": {"out"},
    }
    seen = set()
    for words, names in commands.items():
        config = parse(words.split())
        for name in names:
            value = getattr(config, name)
            each = value if isinstance(value, tuple) else (value,)
            assert all(path.startswith(f"{home}/") for path in each), (words, name)
        seen |= names
    assert seen == set(paths._PATHS)
    assert TrainConfig(out="~/o").resolved().out == f"{home}/o"
    plain = TrainConfig(out="./o/")
    assert dataclasses.replace(with_user_paths(plain)) == plain
