import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.errors import StorageError, UserError
from bmjax.runs import checkpoint


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {"a": {"kernel": rng.normal(size=(4, 3)).astype(np.float32)}, "step": np.int32(seed)}


def save(folder, steps, keep=3):
    writer = checkpoint.CheckpointWriter(folder, keep)
    for step in steps:
        named = checkpoint.to_named(draw(step))
        writer.save(step, {"state": named, "best": named}, {"step": step})
    writer.close()


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, [5])
    step, said = checkpoint.newest_sound(tmp_path)
    assert (step, said) == (5, [])
    read = checkpoint.read(tmp_path, 5, ("state", "best", "absent"))
    assert set(read) == {"state", "best", "meta"}
    assert read["meta"] == {"step": 5}
    back = checkpoint.from_named(read["state"], draw(), "it")
    chex.assert_trees_all_equal(back, draw(5))
    chex.assert_trees_all_equal_dtypes(back, draw(5))


def test_low_precision_and_typed_keys_come_back(tmp_path):
    tree = {"key": jax.random.key(7), "half": jnp.array([1.5, 2.0], jnp.bfloat16)}
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.save(1, {"state": checkpoint.to_named(tree)}, {})
    writer.close()
    read = checkpoint.read(tmp_path, 1, ("state",))["state"]
    back = checkpoint.from_named(read, tree, "it")
    np.testing.assert_array_equal(
        jax.random.key_data(back["key"]), jax.random.key_data(tree["key"])
    )
    assert back["half"].dtype == jnp.bfloat16


def test_arrays_are_written_as_they_are(tmp_path):
    named = {"kernel": np.ones(250_000, np.float32)}  # compressed, next to nothing
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.save(1, {"state": named}, {})
    writer.close()
    size = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert size >= named["kernel"].nbytes
    read = checkpoint.read(tmp_path, 1, ("state",))["state"]
    np.testing.assert_array_equal(read["kernel"], named["kernel"])


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert checkpoint.saved_steps(tmp_path) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


# Orbax, at work in two threads, may wake an event loop that the other has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_reading_while_others_save_and_delete_never_fails(tmp_path):
    save(tmp_path, [1], keep=1)
    done = threading.Event()

    def train():
        writer = checkpoint.CheckpointWriter(tmp_path, 1)
        for step in range(2, 400):
            if done.is_set():
                break
            writer.save(step, {"state": checkpoint.to_named(draw(step))}, {"step": step})
        writer.close()

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            steps: list[int] = []
            while len(steps) < 40 and not training.done():
                step, said, values = checkpoint.read_newest(tmp_path, ("state",))
                assert said == []
                assert step is not None
                assert values["meta"] == {"step": step}
                back = checkpoint.from_named(values["state"], draw(), "it")
                chex.assert_trees_all_equal(back, draw(step))
                steps.append(step)
        finally:
            done.set()
        training.result()
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


@pytest.mark.parametrize("moment", ["while hashed", "before it is read", "while it is read"])
def test_a_checkpoint_that_is_deleted_gives_way_to_the_next(tmp_path, monkeypatch, moment):
    save(tmp_path, [1])
    name = "damage" if moment == "while hashed" else "read"
    call = getattr(checkpoint, name)

    def deleting(*arguments):
        monkeypatch.setattr(checkpoint, name, call)
        early = call(*arguments) if moment == "while it is read" else None
        save(tmp_path, [2], keep=1)
        return early or call(*arguments)

    monkeypatch.setattr(checkpoint, name, deleting)
    step, said, values = checkpoint.read_newest(tmp_path, ("state",))
    assert (step, said) == (2, [])
    chex.assert_trees_all_equal(checkpoint.from_named(values["state"], draw(), "it"), draw(2))


def test_what_is_there_but_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    save(tmp_path, [1])

    def broken(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(checkpoint, "read", broken)
    with pytest.raises(ValueError, match="broken"):
        checkpoint.read_newest(tmp_path, ("state",))


def test_at_its_end_a_run_keeps_the_newest_alone(tmp_path):
    save(tmp_path, [1, 2, 3])
    writer = checkpoint.CheckpointWriter(tmp_path, 3)
    writer.save(4, {"state": checkpoint.to_named(draw(4))}, {})
    writer.finish()
    writer.close()
    assert checkpoint.saved_steps(tmp_path) == [4]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_damage_to_every_file_is_noticed(tmp_path):
    save(tmp_path / "whole", [1, 2])
    names = [path.relative_to(tmp_path / "whole") for path in files(tmp_path / "whole" / "2")]
    assert len(names) > 8

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    noticed = 0
    for name in names:
        for harm in (flip, cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()):
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            before = (tmp_path / "copy" / name).read_bytes()
            harm(tmp_path / "copy" / name)
            changed = not (tmp_path / "copy" / name).exists() or (
                (tmp_path / "copy" / name).read_bytes() != before
            )
            step, said = checkpoint.newest_sound(tmp_path / "copy")
            if changed:
                assert step == 1, f"{name} was harmed unnoticed"
                assert name.name in said[0]
                noticed += 1
            shutil.rmtree(tmp_path / "copy")
    assert noticed >= 4 * len(names) - 2
    print(f"{noticed} of {noticed} damages of {len(names)} files noticed")


def test_a_damaged_checkpoint_is_set_aside_and_named(tmp_path):
    save(tmp_path, [1, 2])
    victim = files(tmp_path / "2" / "state" / "d")[0]
    victim.write_bytes(b"?" + victim.read_bytes()[1:])
    step, said = checkpoint.newest_sound(tmp_path, set_aside=True)
    assert step == 1
    assert f"{victim.relative_to(tmp_path / '2')} was changed" in said[0]
    assert (tmp_path / "damaged" / "2").is_dir()
    save(tmp_path, [2])
    assert checkpoint.newest_sound(tmp_path) == (2, [])


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    save(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / ".removing-2")
    (tmp_path / ".removing-2" / "manifest.json").unlink()
    (tmp_path / ".saving-3.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / ".saving-4")
    assert checkpoint.newest_sound(tmp_path) == (1, [])
    checkpoint.newest_sound(tmp_path, set_aside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("moment", ["saved", "named", "unnamed"])
def test_killed_at_each_moment_of_a_save_it_leaves_sound_checkpoints(tmp_path, monkeypatch, moment):
    save(tmp_path, [1, 2])

    class Killed(BaseException):
        """Ends the writing, and lets nothing tidy up."""

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, "_remove_unfinished", lambda _: None)
    with monkeypatch.context() as patch:
        if moment == "saved":
            patch.setattr(checkpoint, "_write_manifest", die)
        elif moment == "named":
            patch.setattr(checkpoint, "_sync", lambda path: path == tmp_path and die())
        else:
            patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            save(tmp_path, [3], keep=2)
    monkeypatch.undo()
    newest = 2 if moment == "saved" else 3
    assert checkpoint.newest_sound(tmp_path, set_aside=True) == (newest, [])
    expected = {"saved": ["1", "2"], "named": ["1", "2", "3"], "unnamed": ["2", "3"]}[moment]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_restoring_is_strict_both_ways(tmp_path):
    named = checkpoint.to_named(draw())
    named["extra"] = named.pop("step")
    named["a/kernel"] = named["a/kernel"].astype(np.float64)
    with pytest.raises(UserError) as error:
        checkpoint.from_named(named, draw(), "the checkpoint")
    for part in ("missing step", "unexpected extra", "a/kernel is float64[4, 3], needed float32"):
        assert part in str(error.value)


def test_a_failure_in_the_background_is_raised(tmp_path):
    (tmp_path / "file").write_text("")
    writer = checkpoint.CheckpointWriter(tmp_path / "file", 1)
    writer.save(1, {"state": checkpoint.to_named(draw())}, {})
    with pytest.raises(Exception, match=r"Not a directory|NOT_FOUND|exists|file"):
        writer.close()


def test_manifests_of_any_form_are_judged(tmp_path):
    save(tmp_path, [1])
    for content in ("", "[]", "{}", json.dumps({"sha256": 3}), "null"):
        (tmp_path / "1" / "manifest.json").write_text(content)
        assert checkpoint.damage(tmp_path / "1") == ["manifest.json was changed"]


@pytest.mark.parametrize("name", ["os.posix_fallocate", "bmjax.runs.checkpoint._write_manifest"])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch, name):
    save(tmp_path, [1, 2])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        with pytest.raises(StorageError, match=r"disk is full .* that at step 2 is whole"):
            save(tmp_path, [3], keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    save(tmp_path, [3], keep=1)
    assert checkpoint.newest_sound(tmp_path) == (3, [])


def test_a_file_system_that_cannot_reserve_is_written_to(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    save(tmp_path, [1])
    assert checkpoint.newest_sound(tmp_path) == (1, [])


def test_params_of_a_loss_are_read_by_the_name_they_had_before(tmp_path):
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.save(1, {"state": {"state/params/of_the_loss/hint": np.ones(2)}}, {"step": 1})
    writer.wait()
    writer.close()
    read = checkpoint.read(tmp_path, 1, ("state",))
    assert list(read["state"]) == ["state/params/loss_params/hint"]
