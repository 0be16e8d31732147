"""Weight files: real ones of PyTorch are read, and written ones are read back."""

import collections
import hashlib
import io
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.weights.files import read_state_dict, unseen_damage, write_state_dict
from bmjax.weights.writing import dump
from tests.weights_files_helpers import (
    DATA,
    EXPECTED,
    SMALL,
    assert_equal,
    count,
    packed,
    tensor_pickle,
)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_reads_what_torch_writes(name):
    actual = read_state_dict(DATA / f"{name}.pth")
    assert_equal(actual, EXPECTED)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in actual.values())


def test_reads_dtypes_that_have_no_storage_of_their_own():
    expected = {
        "uint16": np.array([1, 65535], np.uint16),
        "float8": count(3, dtype=ml_dtypes.float8_e4m3fn),
    }
    assert_equal(read_state_dict(DATA / "untyped.pth"), expected)


def test_finds_the_state_dict_of_a_training_checkpoint():
    # It holds the names as `module.weight`, and an optimizer's state, a namespace and a NumPy
    # scalar beside it.
    expected = {
        "weight": count(2),
        "bias": np.zeros(2, np.float32),
        "running_mean": np.zeros(2, np.float32),
        "running_var": np.ones(2, np.float32),
        "num_batches_tracked": np.array(0),
    }
    assert_equal(read_state_dict(DATA / "training.pth"), expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["module.", "module.b"], ["module.", "module.b"]),
    ],
)
def test_a_prefix_is_taken_off_where_all_names_have_it(tmp_path, names, expected):
    write_state_dict(tmp_path / "a.pth", dict.fromkeys(names, count(2)))
    assert list(read_state_dict(tmp_path / "a.pth")) == expected


ALL_KINDS = {
    **{key: value for key, value in EXPECTED.items() if key != "float"},
    "not finite": np.array([np.inf, -np.inf, np.nan], np.float32),
    "uint64": np.array([2**64 - 1], np.uint64),
    "float8": count(3, dtype=ml_dtypes.float8_e5m2),
    "über.weight": np.array(1.5, np.float32),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_written_files_are_read_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_state_dict(path, ALL_KINDS)
    by_name = dict(sorted(ALL_KINDS.items()))
    assert_equal(read_state_dict(path), by_name if suffix == ".safetensors" else ALL_KINDS)
    first = path.read_bytes()
    write_state_dict(path, {name: array.copy() for name, array in ALL_KINDS.items()})
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_known_by_its_content(tmp_path):
    write_state_dict(tmp_path / "a.safetensors", SMALL)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert_equal(read_state_dict(tmp_path / "a.pth"), dict(sorted(SMALL.items())))


def test_a_safetensors_file_may_begin_as_a_pickle_does(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in range(1, 300, 8):
        write_state_dict(path, {"a" * length: count(2)})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert_equal(read_state_dict(path), {"a" * length: count(2)})


def test_the_zip_container_is_as_torch_lays_it_out(tmp_path):
    write_state_dict(tmp_path / "a.pth", SMALL)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entries = archive.infolist()
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/data/0") == SMALL["weight"].tobytes()
    assert entries[0].filename == "archive/data.pkl"
    for entry in entries:
        begin = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
        assert (begin % 64, entry.compress_type) == (0, zipfile.ZIP_STORED)


def test_the_pickle_means_to_python_what_pytorch_reads():
    """Python's own unpickler, with stand-ins for PyTorch's names, is the judge of `dump`."""

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "collections":
                return collections.OrderedDict
            return (lambda *fields: (name, *fields)) if name.startswith("_") else name

        def persistent_load(self, identity):
            return identity

    named = {**SMALL, "steps": np.array(3), "wide": np.zeros((1, 2, 0, 4), np.uint16)}
    value = Reader(io.BytesIO(dump(named))).load()
    typed = "_rebuild_tensor_v2"
    none: collections.OrderedDict[str, object] = collections.OrderedDict()
    assert dict(value) == {
        "weight": (
            typed,
            ("storage", "FloatStorage", "0", "cpu", 6),
            0,
            (2, 3),
            (3, 1),
            False,
            none,
        ),
        "bias": (typed, ("storage", "FloatStorage", "1", "cpu", 3), 0, (3,), (1,), False, none),
        "steps": (typed, ("storage", "LongStorage", "2", "cpu", 1), 0, (), (), False, none),
        "wide": (
            "_rebuild_tensor_v3",
            ("storage", "UntypedStorage", "3", "cpu", 0),
            0,
            (1, 2, 0, 4),
            (0, 0, 4, 1),
            False,
            none,
            "uint16",
        ),
    }


@pytest.mark.parametrize(
    ("name", "state_dict", "message"),
    [
        ("a.bin", SMALL, r"ends in '\.bin'\. Use \.pth, \.pt or \.safetensors"),
        ("a.pth", {}, "no arrays"),
        ("a.pth", {"a": np.zeros(2, np.complex64)}, "'a' is complex64; weight files hold float32"),
        ("a.pth", {"a": np.array(["x"])}, "weight files hold"),
        ("a.safetensors", {"__metadata__": count(2)}, "cannot name a tensor"),
        ("a.pth", {"a\nb": count(2)}, "cannot name a tensor"),
        ("a.pth", {3: count(2)}, "3 cannot name a tensor"),
        ("none/a.pth", SMALL, r"cannot be written \(No such file.*Check that its folder exists"),
        ("resnet18-f37072fd.pth", SMALL, "Choose another name"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, name, state_dict, message):
    with pytest.raises(UserError, match=message):
        write_state_dict(tmp_path / name, state_dict)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_state_dict(tmp_path / "a.pth", SMALL)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_state_dict(tmp_path / "a.pth", EXPECTED)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert_equal(read_state_dict(tmp_path / "a.pth"), SMALL)


def test_any_bit_of_a_boolean_means_true(tmp_path):
    path = packed(
        tmp_path,
        tensor_pickle(kind="BoolStorage", numel=3, shape=(3,)),
        [np.array([0, 1, 2], np.uint8)],
    )
    assert read_state_dict(path)["t"].view(np.uint8).tolist() == [0, 1, 1]


def test_parameters_as_before_version_04_are_read(tmp_path):
    tensor = tensor_pickle()[9:-2]
    called = b"\x80\x02}X\1\0\0\0tctorch.nn.parameter\nParameter\n" + tensor + b"\x85R"
    state = b"\x88\x89ccollections\nOrderedDict\n)R\x87b"
    expected = {"t": np.zeros(6, np.float32)}
    assert_equal(read_state_dict(packed(tmp_path, called + state + b"s.")), expected)
    # Another state could change what the tensor is.
    with pytest.raises(UserError, match="sets the state of something that has none"):
        read_state_dict(packed(tmp_path, called + b"K\1K\2\x86bs."))


def test_a_side_of_one_element_may_have_any_stride(tmp_path):
    path = packed(tmp_path, tensor_pickle(shape=(1, 6), strides=(2**62, 1)))
    assert_equal(read_state_dict(path), {"t": np.zeros((1, 6), np.float32)})


def test_a_name_like_torchvisions_promises_a_hash(tmp_path):
    content = (DATA / "legacy.pth").read_bytes()
    right = tmp_path / f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    right.write_bytes(content)
    assert_equal(read_state_dict(right), EXPECTED)
    right.write_bytes(content[:-1] + b"\x41")  # nothing else could tell
    with pytest.raises(UserError, match=r"SHA-256 begins with .*the download is damaged"):
        read_state_dict(right)
    (tmp_path / "model-20240131.pth").write_bytes(content)
    assert_equal(read_state_dict(tmp_path / "model-20240131.pth"), EXPECTED)


def test_a_file_without_a_state_dict_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no state dict; its keys are 'epoch', 'best'"):
        read_state_dict(packed(tmp_path, pickle.dumps({"epoch": 1, "best": 0.5}, 2), ()))
    with pytest.raises(UserError, match="holds no dictionary of named tensors"):
        read_state_dict(packed(tmp_path, pickle.dumps([1, 2], 2), ()))
    with pytest.raises(UserError, match=r"holds an object of pathlib.* and no named tensors"):
        read_state_dict(packed(tmp_path, pickle.dumps(pathlib.PurePosixPath("/x"), 2), ()))


def test_what_has_no_checksum_is_said_with_its_sha256(tmp_path):
    content = (DATA / "legacy.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert f"SHA-256 is {digest}: compare" in unseen_damage(DATA / "legacy.pth")
    named = tmp_path / f"old-{digest[:8]}.pth"
    named.write_bytes(content)
    assert unseen_damage(named) == ""
    assert unseen_damage(DATA / "zip.pth") == ""
