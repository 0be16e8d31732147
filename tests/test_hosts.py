"""Several processes that train one run: two real ones, on this machine."""

import dataclasses
import signal
import time
from typing import Any

import numpy as np
import pytest

from bmjax import cli
from bmjax.cli.parsing import resumed as asked_again
from bmjax.config import DeviceConfig
from bmjax.config.flat import settings_to_keep
from bmjax.data.sources import all_images
from bmjax.errors import UserError
from bmjax.evaluate.measure import evaluate
from bmjax.machine import hosts
from bmjax.train.loop import fit
from bmjax.train.run_contents import contents, differences
from tests.folder_helpers import write_class
from tests.hosts_helpers import Processes, timeless
from tests.test_loop import resumed

# Sums of a batch's gradients are rounded in another order on other devices.
LOSS = 2e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"coordinator": "here"}, "must be HOST:PORT of process 0"),
        ({"coordinator": "here:0"}, "a port from 1 to 65535"),
        ({"coordinator": ":8000"}, "must be HOST:PORT"),
        ({"coordinator": "here:http"}, "must be HOST:PORT"),
        ({"num_processes": 2}, "belong to --coordinator"),
        ({"process_id": 0}, "belong to --coordinator"),
        ({"coordinator": "here:8000", "num_processes": 2, "process_id": 2}, "numbered from 0"),
        ({"coordinator": "here:8000", "num_processes": -1}, "numbered from 0"),
        ({"coordinator": "here:8000", "parallel": "pmap"}, "--parallel pmap is for"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        hosts.check(DeviceConfig(**changes))


@pytest.mark.parametrize("address", ["10.0.0.1:8476", "node-1.cluster:1", "[::1]:65535", "auto"])
def test_addresses_that_can_be(address):
    hosts.check(DeviceConfig(coordinator=address))


def test_wrong_settings_end_a_command_at_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--coordinator", "here"])
    assert capsys.readouterr().err.startswith("bmjax: --coordinator is 'here'")


def test_alone_everything_is_done_here():
    assert not hosts.several()
    assert hosts.is_first()
    assert hosts.share() == (0, 1)
    assert hosts.largest(3, 0) == (3, 0)
    assert hosts.on_first(divmod, 7, 2) == (3, 1)
    hosts.check_same("settings", {"seed": 0}, "")


def test_where_a_process_is_may_differ_and_nothing_else(small):
    one = settings_to_keep(small)
    device = DeviceConfig(devices=1, coordinator="a:1", num_processes=2, process_id=1)
    assert settings_to_keep(dataclasses.replace(small, device=device)) == one
    assert settings_to_keep(dataclasses.replace(small, seed=1)) != one
    # One with its images in memory would run another program.
    device = dataclasses.replace(device, memory_gib=0.0)
    assert settings_to_keep(dataclasses.replace(small, device=device)) != one


def test_a_resumption_does_not_look_for_the_processes_of_the_run(small, shapes, quiet):
    device = DeviceConfig(devices=1, coordinator="gone:1", num_processes=2, process_id=0)
    config = dataclasses.replace(small, epochs=1, device=device)
    kept = settings_to_keep(config)
    assert {"epochs", "devices"} < kept.keys()
    assert kept.keys().isdisjoint({"coordinator", "num_processes", "process_id"})
    fit(dataclasses.replace(small, epochs=1), shapes, console=quiet)
    words = ["train", "--resume", "--out", small.out]
    config = asked_again(cli.parse(words), words)
    assert (config.epochs, config.device) == (1, DeviceConfig(devices=1))


def words(small, data, epochs, *more):
    return (
        *("--model", "mlp", "--hidden-sizes", "16", "--data", data, "--out", "run"),
        *("--epochs", str(epochs), "--batch-size", "16", "--shift", "0.05", *more),
    )


def assert_close(records, expected):
    assert len(records) == len(expected)
    for one, other in zip(records, expected, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], abs=LOSS)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-9)


@pytest.mark.slow
def test_two_processes_train_as_one_does(small, shapes, shapes_npz, quiet, tmp_path):
    config = dataclasses.replace(small, data=f"npz:{shapes_npz}")
    _, history = fit(config, console=quiet)
    two = Processes(tmp_path, "train", *words(small, config.data, 6))
    assert two.wait() == [0, 0], [two.said(0), two.said(1)]
    run = two.folders[0] / "run"
    assert_close(timeless(run), history)
    # The first writes and says all, the other nothing.
    assert two.said(0) == two.said(1) == two.said(1, "out") == ""
    assert "epoch 6/6" in two.said(0, "out")
    assert sorted(path.name for path in two.folders[1].iterdir()) == ["err.txt", "out.txt"]
    # What two saved, one takes: every example was counted once.
    result = evaluate(dataclasses.replace(EVALUATE, path=str(run)))
    assert f"test accuracy {result['accuracy']:.2%} on 50 images" in two.said(0, "out")


EVALUATE = cli.parse(["evaluate", "run", "--devices", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--shard-state",), ("--shard-params", "4")])
def test_two_processes_divide_a_state(small, shapes, shapes_npz, quiet, tmp_path, flags):
    wide = ("--hidden-sizes", "256")  # the first layer's kernel has more than layout.SMALLEST
    config = dataclasses.replace(small, data=f"npz:{shapes_npz}", hidden_sizes=(256,))
    _, history = fit(config, console=quiet)
    two = Processes(tmp_path, "train", *words(small, config.data, 6, *wide, *flags))
    assert two.wait() == [0, 0], [two.said(0), two.said(1)]
    assert_close(timeless(two.folders[0] / "run"), history)


@pytest.mark.slow
def test_processes_with_other_flags_both_say_so(small, shapes_npz, tmp_path):
    data = f"npz:{shapes_npz}"
    two = Processes(tmp_path, "train", *words(small, data, 2), each=((), ("--seed", "5")))
    assert two.wait() == [2, 2]
    for number in (0, 1):
        said = two.said(number)
        assert said.startswith("bmjax: the processes have other settings: seed is 0 in process 0 ")
        assert "and 5 in process 1. Start all with the same flags." in said
        assert said.count("\n") == 1
    assert not (two.folders[0] / "run").exists()


@pytest.mark.slow
def test_two_processes_read_their_own_part_of_a_folder(small, quiet, tmp_path):
    for number, name in enumerate(("ant", "bee", "cow")):
        write_class(tmp_path / "data" / "train" / name, 9, number)
        write_class(tmp_path / "data" / "validation" / name, 7, number)
    data = f"folder:{tmp_path / 'data'}"
    device = DeviceConfig(devices=1, memory_gib=0)
    config = dataclasses.replace(small, data=data, image_size=8, device=device)
    _, history = fit(config, console=quiet)
    more = ("--image-size", "8", "--memory-gib", "0")
    two = Processes(tmp_path, "train", *words(small, data, 6, *more), slurm=True)
    assert two.wait() == [0, 0], [two.said(0), two.said(1)]
    assert_close(timeless(two.folders[0] / "run"), history)


@pytest.mark.slow
def test_processes_with_other_data_both_say_so(small, shapes_npz, tmp_path):
    other = tmp_path / "other.npz"
    other.write_bytes(shapes_npz.read_bytes())
    arrays: dict[str, Any] = dict(np.load(shapes_npz))
    arrays["train_image"][0, 0, 0] ^= 1
    np.savez(other, **arrays)
    for name, file in (("host0", shapes_npz), ("host1", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.npz").write_bytes(file.read_bytes())
    two = Processes(tmp_path, "train", *words(small, "npz:data.npz", 2))
    assert two.wait() == [2, 2]
    for number in (0, 1):
        assert "the processes have other data: fingerprint is" in two.said(number)
    assert not (two.folders[0] / "run").exists()


@pytest.mark.slow
def test_what_one_lacks_the_other_does_not_wait_for(small, shapes_npz, tmp_path):
    (tmp_path / "host0").mkdir()
    (tmp_path / "host0" / "data.npz").write_bytes(shapes_npz.read_bytes())
    two = Processes(tmp_path, "train", *words(small, "npz:data.npz", 2))
    assert two.wait(90) == [1, 2]
    assert two.said(1) == "bmjax: there is no file data.npz. Check the path after 'npz:'.\n"
    # JAX may say before it which one.
    assert two.said(0).splitlines()[-1].startswith("bmjax: process 0 ended because another one is")
    assert "Traceback" not in two.said(0)
    assert "stack trace" not in two.said(0)


LONG = 100


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    arrays: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        arrays[f"{name}_image"] = all_images(shapes.split(name))
        arrays[f"{name}_label"] = shapes.split(name).labels
    np.savez(folder / "shapes.npz", **arrays)
    data = f"npz:{folder / 'shapes.npz'}"
    flags = words(None, data, LONG, "--save-minutes", "0.01", "--no-tensorboard")
    two = Processes(folder, "train", *flags)
    assert two.wait() == [0, 0], [two.said(0), two.said(1)]
    return flags, two.folders[0] / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "to_worker"), [(0, False), (1, True)])
def test_one_killed_the_other_ends_and_a_restart_resumes(whole, tmp_path, victim, to_worker):
    flags, expected = whole
    two = Processes(tmp_path, "train", *flags)
    run = two.folders[0] / "run"
    two.await_records(run, 40)
    two.send(victim, signal.SIGKILL, to_worker)
    begin = time.monotonic()
    codes = two.wait()
    assert time.monotonic() - begin < 60
    assert codes[1 - victim] == 1
    said = two.said(1 - victim)
    assert f"bmjax: process {1 - victim} ended because another one is gone" in said
    assert "start all of them again, with --resume" in said
    assert "Traceback" not in said
    assert "stack trace" not in said
    # Whether to resume is the first one's to say.
    again = Processes(tmp_path, "train", *flags, each=(("--resume",), ()))
    assert again.wait() == [0, 0], [again.said(0), again.said(1)]
    assert differences(contents(expected), contents(run)) == []


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_goes_on(whole, quiet, tmp_path):
    flags, expected = whole
    two = Processes(tmp_path, "train", *flags)
    run = two.folders[0] / "run"
    two.await_records(run, 40)
    two.send(1, signal.SIGTERM)
    assert two.wait() == [143, 143], [two.said(0), two.said(1)]
    assert "stopped by SIGTERM at step" in two.said(0)
    assert "a checkpoint is saved" in two.said(1)
    line = ["train", *flags, "--out", str(run), "--resume", "--devices", "1"]
    config = asked_again(cli.parse(line), line)
    fit(resumed(config), console=quiet)
    assert_close(timeless(run), timeless(expected))
