import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import AugmentConfig, DistillConfig
from bmjax.distill import teacher_cache
from bmjax.distill.teacher_cache import INDEX, cached_teacher, expand
from bmjax.errors import UserError

CONFIG = DistillConfig(
    epochs=2,
    batch_size=16,
    views=AugmentConfig(shift=0.05),
    hidden_sizes=(16,),
    data="shapes",
    precision="float32",
)
MEAN = [0.5]


def make(folder, teacher, shapes, quiet, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return cached_teacher(folder, teacher, shapes, config, MEAN, quiet)


def test_rows_are_those_of_the_steps(tmp_path, teacher, shapes, quiet):
    cache = make(tmp_path / "cache", teacher, shapes, quiet)
    stored = cache.arrays["teacher_logits"]
    assert stored.shape == (2, 6, 16, 3)
    assert stored.dtype == np.float32
    assert isinstance(stored, np.memmap)
    assert np.abs(stored).min(axis=-1).max() > 0  # every row was written
    rows = cache.rows(7, 9)["teacher_logits"]
    np.testing.assert_array_equal(rows, stored[1, 1:3].reshape(32, 3))
    # After as many passes as there are the views begin anew.
    np.testing.assert_array_equal(
        cache.rows(12, 18)["teacher_logits"], cache.rows(0, 6)["teacher_logits"]
    )
    assert not np.array_equal(stored[0], stored[1])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        INDEX,
        "teacher_logits.npy",
    ]


def test_a_longer_cache_serves_a_shorter_run(tmp_path, teacher, shapes, quiet, monkeypatch):
    folder = tmp_path / "cache"
    long = make(folder, teacher, shapes, quiet).arrays["teacher_logits"]
    monkeypatch.setattr(teacher_cache, "_make", None)
    short = make(folder, teacher, shapes, quiet, epochs=1)
    np.testing.assert_array_equal(short.rows(0, 6)["teacher_logits"], long[0].reshape(96, 3))
    views = dataclasses.replace(CONFIG.views, view_passes=1)
    repeated = make(folder, teacher, shapes, quiet, views=views, epochs=50)
    np.testing.assert_array_equal(repeated.rows(6, 12)["teacher_logits"], long[0].reshape(96, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0 in the cache and 1 now"),
        ({"views": AugmentConfig(shift=0.1)}, "shift is 0.05 in the cache and 0.1 now"),
        ({"batch_size": 32}, "batch_size is 16 in the cache and 32 now"),
        ({"epochs": 3}, "holds 2 passes, and 3 are needed"),
        ({"cache_top": 2}, "cache_top is 0 in the cache and 2 now"),
    ],
)
def test_other_views_are_refused(tmp_path, teacher, shapes, quiet, changes, message):
    make(tmp_path / "cache", teacher, shapes, quiet)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "cache", teacher, shapes, quiet, **changes)


def test_another_teacher_and_other_data_are_refused(tmp_path, teacher, shapes, quiet):
    folder = tmp_path / "cache"
    make(folder, teacher, shapes, quiet)
    other = dataclasses.replace(teacher, fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"teacher is .* in the cache and '0000"):
        make(folder, other, shapes, quiet)
    fewer = dataclasses.replace(shapes, train=shapes.validation)
    with pytest.raises(UserError, match=r"data is .*examples is 90 in the cache and 30 now"):
        make(folder, teacher, fewer, quiet)


def test_damage_is_seen(tmp_path, teacher, shapes, quiet):
    folder = tmp_path / "cache"
    make(folder, teacher, shapes, quiet)
    file = folder / "teacher_logits.npy"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match="damaged: its SHA-256"):
        make(folder, teacher, shapes, quiet)
    file.unlink()
    with pytest.raises(UserError, match="damaged"):
        make(folder, teacher, shapes, quiet)
    (folder / INDEX).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        make(folder, teacher, shapes, quiet)


def test_a_folder_of_other_things_is_left_alone(tmp_path, teacher, shapes, quiet):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is no cache of a teacher"):
        make(folder, teacher, shapes, quiet)
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_nothing_is_left_of_a_cache_that_was_not_finished(
    tmp_path, teacher, shapes, quiet, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache, "_compress", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "caches" / "cache", teacher, shapes, quiet)
    assert list((tmp_path / "caches").iterdir()) == []


def test_too_little_space_is_said_before_the_teacher_is_asked(
    tmp_path, teacher, shapes, quiet, monkeypatch
):
    monkeypatch.setattr(teacher_cache, "_ask_all", None)
    with pytest.raises(UserError, match=r"passes take .* GiB, but .*Lower --view-passes"):
        make(tmp_path / "cache", teacher, shapes, quiet, epochs=10**12)


def test_the_largest_logits_stand_for_all(tmp_path, teacher, shapes, quiet):
    whole = make(tmp_path / "whole", teacher, shapes, quiet).rows(0, 6)["teacher_logits"]
    cache = make(tmp_path / "top", teacher, shapes, quiet, cache_top=2)
    rows = cache.rows(0, 6)
    assert {name: row.dtype.name for name, row in rows.items()} == {
        "teacher_logits": "float16",
        "teacher_classes": "uint16",
        "teacher_rest": "float32",
    }
    got = jax.nn.softmax(expand({name: jnp.array(row) for name, row in rows.items()}, 3))
    # With one class left, all that is lost is what float16 rounds away.
    np.testing.assert_allclose(got, jax.nn.softmax(whole), atol=2e-3)
    assert np.abs(got - jax.nn.softmax(whole)).max() > 0


def test_what_is_left_is_spread_over_the_other_classes():
    logits = np.log(np.array([[0.5, 0.2, 0.15, 0.1, 0.05]], np.float32))
    kept = teacher_cache._compress(logits, 2)
    rows = {name: jnp.array(row) for name, row in kept.items()}
    np.testing.assert_allclose(
        jax.nn.softmax(expand(rows, 5)), [[0.5, 0.2, 0.1, 0.1, 0.1]], atol=1e-3
    )
    every = {name: jnp.array(row) for name, row in teacher_cache._compress(logits, 5).items()}
    np.testing.assert_allclose(jax.nn.softmax(expand(every, 5)), np.exp(logits), atol=1e-3)


def test_the_index_says_what_it_is_of(tmp_path, teacher, shapes, quiet):
    folder = Path(tmp_path / "cache")
    make(folder, teacher, shapes, quiet)
    content = json.loads((folder / INDEX).read_text())
    assert content["of"]["teacher"] == teacher.fingerprint
    assert content["of"]["jax"] == jax.__version__
    assert content["passes"] == 2


def test_a_cache_is_of_one_precision(tmp_path, teacher, shapes, quiet):
    make(tmp_path / "cache", teacher, shapes, quiet)
    with pytest.raises(UserError, match="precision is None in the cache and 'bfloat16' now"):
        make(tmp_path / "cache", teacher, shapes, quiet, precision="bfloat16")
