"""A run on a file system of 3 MB, which takes the rights of an administrator to make."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bmjax.runs import checkpoint


def mount(*words):
    command = shutil.which("mount")
    return command and subprocess.run([command, "-t", "tmpfs", *words], capture_output=True)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 3 MB, and a function that makes room for 30."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = mount("-o", "size=3m", "tmpfs", str(folder))
    if not done or done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder, lambda: mount("-o", "remount,size=30m", "tmpfs", str(folder))
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["umount", str(folder)], check=True)


def train(out, data, *more):
    words = ["train", "--model", "mlp", "--hidden-sizes", "700", "--data", f"npz:{data}"]
    words += ["--epochs", "20", "--batch-size", "16", "--save-minutes", "0", "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "bmjax.cli", *words, *more],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_full_disk_ends_a_run_and_more_room_lets_it_go_on(tmp_path, shapes_npz, small_disk):
    folder, enlarge = small_disk
    done = train(folder / "run", shapes_npz)
    assert done.returncode == 1
    assert done.stderr.startswith("bmjax: the checkpoint ")
    assert "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    checkpoints = folder / "run" / "checkpoints"
    steps = checkpoint.saved_steps(checkpoints)
    assert steps
    assert {path.name for path in checkpoints.iterdir()} == {str(step) for step in steps}
    assert all(checkpoint.damage(checkpoints / str(step)) == [] for step in steps)
    enlarge()
    done = train(folder / "run", shapes_npz, "--resume")
    assert done.returncode == 0, done.stderr
    assert train(tmp_path / "whole", shapes_npz).returncode == 0
    states = [
        checkpoint.read(out / "checkpoints", 120, ("state",))["state"]
        for out in (folder / "run", tmp_path / "whole")
    ]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name])
    assert json.loads((folder / "run" / "config.json").read_text())["config"]["epochs"] == 20
