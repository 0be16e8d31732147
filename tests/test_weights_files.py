"""Weight files: real ones of PyTorch are read, damaged and hostile ones are refused in words.

`tests/data/*.pth` were written by torch 2.15 itself. Their tensors count from 0, so that the
values expected of them are stated here without it.
"""

import collections
import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.weights import pickles
from bmjax.weights.files import read_state_dict, unseen_damage, write_state_dict
from bmjax.weights.tensors import BadFileError, Tensor
from bmjax.weights.writing import dump
from experiments import mutate_weights as mutate

DATA = Path(__file__).parent / "data"


def count(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# `view` and `transposed` share one storage of 0 to 19; `expanded` repeats a row of 3 by stride 0.
EXPECTED = {
    "float": count(2, 3),
    "transposed": count(4, 5).T,
    "view": np.array([[7, 8], [12, 13]], np.float32),
    "expanded": np.array([[0, 1, 2]] * 4, np.float32),
    "half": count(3, dtype=np.float16),
    "bfloat": count(3, dtype=ml_dtypes.bfloat16),
    "double": count(3, dtype=np.float64),
    "long": np.array(2**40 + 7),
    "byte": count(3, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": count(2, 2),
}
SMALL = {"weight": count(2, 3), "bias": np.array([0.5, -1.0, np.nan], np.float32)}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        assert actual[name].dtype == array.dtype, name
        assert actual[name].tobytes() == array.tobytes(), name


SIX_ZEROS = np.zeros(6, np.float32)


def packed(tmp_path, pickled, storages=(SIX_ZEROS,), container="zip"):
    path = tmp_path / "made.pth"
    path.write_bytes(mutate.pack(container, pickled, list(storages)))
    return path


def tensor_pickle(key="0", numel=6, offset=0, shape=(6,), strides=(1,), kind="FloatStorage"):
    """One tensor named t, with any fields: `dump` would not write wrong ones."""
    fields = [pickle.dumps(value, 2)[2:-1] for value in (key, numel, offset, shape, strides)]
    dumped_key, dumped_numel, *rest = fields
    storage = b"(X\7\0\0\0storagectorch\n" + kind.encode() + b"\n" + dumped_key
    storage += b"X\3\0\0\0cpu" + dumped_numel + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(rest) + b"\x89}tR"
    return b"\x80\x02}X\1\0\0\0t" + tensor + b"s."


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08", "compressed"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "before version 0.4"),
        (b"hello", r"begins with b'hello'"),
        (b"PK\x03\x04" + b"\0" * 100, "zip directory cannot be read.*Fetch or save it again"),
        (pickle.dumps({"a": 1}), "is a pickle, but not of PyTorch"),
        (pickle.dumps(np.zeros(3)), "is a pickle, but not of PyTorch|refused to import numpy"),
        (b"\x05\0\0\0\0\0\0\0{oh!}", "safetensors header does not fit"),
    ],
)
def test_other_files_are_told_from_weights(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"is not a file\. If it is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(UserError, match=r"is not a file|cannot be read"):
        read_state_dict("a\0b.pth")


def test_a_zip_without_weights_is_told(tmp_path):
    np.savez(tmp_path / "a.npz", a=count(3))
    with pytest.raises(UserError, match=r"without the data\.pkl.*It holds 'a\.npy'"):
        read_state_dict(tmp_path / "a.npz")


def test_a_compressed_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="compressed or encrypted"):
        read_state_dict(tmp_path / "a.pth")


def rewrite(source, target, change):
    """Packs the records of a zip again after `change(list of (name, bytes))`."""
    with zipfile.ZipFile(source) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in change(records):
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: [r for r in records if r[0] != "zip/data/3"], "does not have .'3'"),
        (lambda records: [*records, ("zip/data/99", b"x")], "some without a name .'99'"),
        (lambda records: [*records, ("other/data/1", b"x")], "records of another archive"),
        (lambda records: [(n, d[:-1] if n == "zip/data/0" else d) for n, d in records], "23 bytes"),
        (
            lambda records: [(n, b"big" if "byteorder" in n else d) for n, d in records],
            "big-endian",
        ),
        (lambda records: [*records, ("zip/constants.pkl", b"")], "TorchScript"),
        (lambda records: list(reversed(records)), "not in the order"),
    ],
)
def test_a_zip_that_is_packed_wrongly_is_refused(tmp_path, change, message):
    rewrite(DATA / "zip.pth", tmp_path / "a.pth", change)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_a_zip_whose_directory_differs_from_its_records_is_refused(tmp_path):
    content = (DATA / "zip.pth").read_bytes()
    swapped = mutate.swap_names(content, random.Random(0), only_directory=True)
    (tmp_path / "a.pth").write_bytes(swapped)
    with pytest.raises(UserError, match="has another name in its own header"):
        read_state_dict(tmp_path / "a.pth")
    # In an entry of the directory the size stands 22 bytes before the name.
    at = content.rindex(b"zip/data/2") - 22
    assert content[at] == 12
    (tmp_path / "a.pth").write_bytes(content[:at] + b"\5" + content[at + 1 :])
    with pytest.raises(UserError, match="has another size than its zip directory says"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # it is made on purpose
def test_a_name_twice_in_a_zip_is_refused(tmp_path):
    rewrite(DATA / "zip.pth", tmp_path / "a.pth", lambda records: [*records, records[-1]])
    with pytest.raises(UserError, match="a name twice"):
        read_state_dict(tmp_path / "a.pth")


def test_records_on_top_of_each_other_are_refused(tmp_path):
    # A zip bomb without compression: many entries of the directory show the same bytes.
    name, data = b"a/data/%03d", b"\0" * 5000
    local = b"PK\x03\x04" + b"\0" * 10 + struct.pack("<LLLHH", 0, 5000, 5000, 10, 0)
    directory = b"".join(
        b"PK\x01\x02"
        + b"\0" * 12
        + struct.pack("<LLLHH", 0, 5000, 5000, 10, 0)
        + b"\0" * 14
        + name % number
        for number in range(50)
    )
    content = local + name % 0 + data
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 50, 50, len(directory), len(content), 0)
    (tmp_path / "a.pth").write_bytes(content + directory + end)
    with pytest.raises(UserError, match=r"zip directory cannot be read|more bytes than the file"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (7,)}, r"sizes \[7\].*beyond its storage of 6 elements"),
        ({"offset": 1}, "offset 1, which reaches beyond"),
        ({"shape": (2, 3), "strides": (4, 1)}, "reaches beyond"),
        ({"shape": (2**40, 2**40), "strides": (2**40, 1)}, "reaches beyond"),
        ({"offset": -1}, "are not counts"),
        ({"strides": (-1,)}, "are not counts"),
        ({"shape": (2.0,)}, "are not counts"),
        ({"shape": (True,)}, "are not counts"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "are not counts"),
        ({"strides": (1, 1)}, "more sizes than strides"),
        ({"numel": 2**40}, "24 bytes and not the 4398046511104"),
        ({"numel": -1}, "describes a storage in a way"),
        ({"key": "7"}, "names storages that it does not have"),
        ({"kind": "DoubleStorage"}, "24 bytes and not the 48"),
        ({"kind": "QInt8Storage"}, r"refused to import torch\.QInt8Storage"),
        ({"shape": (2**28,), "strides": (0,)}, "more than 8 times its size"),
        ({"shape": (0, 2**62), "strides": (1, 1)}, "more than 8 times its size"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, fields, message):
    assert_equal(read_state_dict(packed(tmp_path, tensor_pickle())), {"t": np.zeros(6, np.float32)})
    with pytest.raises(UserError, match=message):
        read_state_dict(packed(tmp_path, tensor_pickle(**fields)))


def test_a_storage_described_in_two_ways_is_refused(tmp_path):
    parts = [tensor_pickle(kind=kind)[9:-2] for kind in ("FloatStorage", "IntStorage")]
    both = b"X\1\0\0\0a" + parts[0] + b"X\1\0\0\0b" + parts[1]
    with pytest.raises(UserError, match="describes storage '0' in two ways"):
        read_state_dict(packed(tmp_path, b"\x80\x02}(" + both + b"u."))


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


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b"x", "1 bytes after its end"),
        (-1, "is not of . elements"),
        (-200, "too early|not of|list"),
    ],
)
def test_the_older_container_must_end_where_its_sizes_say(tmp_path, tail, message):
    content = (DATA / "legacy.pth").read_bytes()
    changed = content + tail if isinstance(tail, bytes) else content[:tail]
    (tmp_path / "a.pth").write_bytes(changed)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_the_older_container_of_a_big_endian_machine_is_refused(tmp_path):
    content = (DATA / "legacy.pth").read_bytes()
    little = content.index(b"little_endian") + len("little_endian") + 2
    assert content[little : little + 1] == pickle.NEWTRUE
    (tmp_path / "a.pth").write_bytes(content[:little] + pickle.NEWFALSE + content[little + 1 :])
    with pytest.raises(UserError, match="big-endian machine"):
        read_state_dict(tmp_path / "a.pth")


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


def checkpoint_of(*keys, extra=b""):
    """A pickle of `{key: {"t": tensor}}` for some keys; the tensors share a storage."""
    inner = tensor_pickle()[2:-1]
    items = [pickle.dumps(key, 2)[2:-1] + inner for key in keys]
    return b"\x80\x02}(" + b"".join(items) + extra + b"u."


def test_the_state_dict_must_be_told_from_others(tmp_path):
    for key in ("state_dict", "model", "model_state_dict", "net", "model_ema"):
        read = read_state_dict(packed(tmp_path, checkpoint_of(key, "teacher")))
        assert list(read) == ["t"]
    with pytest.raises(UserError, match=r"several state dicts \(model, model_ema\)"):
        read_state_dict(packed(tmp_path, checkpoint_of("model", "model_ema")))
    with pytest.raises(UserError, match="no state dict; its keys are 'teacher', 'student'"):
        read_state_dict(packed(tmp_path, checkpoint_of("teacher", "student")))
    with pytest.raises(UserError, match="holds no dictionary of named tensors"):
        read_state_dict(packed(tmp_path, pickle.dumps([1, 2]), ()))


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("kind", list(mutate.hostile_pickles("")))
def test_hostile_pickles_are_refused_before_anything_is_run(tmp_path, kind, container):
    marker = tmp_path / "it-was-run"
    payload = mutate.hostile_pickles(f"touch {marker}")[kind]
    with pytest.raises(UserError, match=r"refused to import|its pickle .*damaged"):
        read_state_dict(packed(tmp_path, payload, container=container))
    assert not marker.exists()


def test_a_hostile_pickle_is_live_and_its_import_is_named(tmp_path):
    marker = tmp_path / "it-was-run"
    payload = mutate.hostile_pickles(f"touch {marker}")["os.system"]
    (tmp_path / "bare.pth").write_bytes(payload)
    for path in (packed(tmp_path, payload), tmp_path / "bare.pth"):
        with pytest.raises(UserError, match=r"made\.pth|bare\.pth: refused to import os\.system"):
            read_state_dict(path)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".", "no dictionary"),
        (b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"K\1s.", "no state dict"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "no dictionary"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "ends too early"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.", "ends too early"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "step b.*x96"),
        (b"\x80\x02" + b"]" + b"(h\0h\0e" * 3 + b".", "never made"),
        (b"\x80\x02]q\0(" + b"h\0" * 50 + b"e.", "no dictionary"),
        (b"\x80\x02" + b"]0" * 9, "step b'0'"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "no dictionary"),
        (b"\x80\x02}K\1K\2sK\1K\2s.", "sets 1 twice"),
        (b"\x80\x02ctorch.nn.parameter\nParameter\n)\x81.", "arguments that PyTorch does not use"),
        (b"\x80\x02ctorch.nn.parameter\nParameter\nK\1\x85\x81.", "not a tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n]K\1a\x85R.", "something else than pairs"),
    ],
)
def test_bombs_and_broken_pickles_are_refused(tmp_path, pickled, message):
    for container in ("zip", "legacy"):
        with pytest.raises(UserError, match=message):
            read_state_dict(packed(tmp_path, pickled, (), container))


def test_too_many_steps_are_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    assert pickles.load(b"\x80\x02" + b"]" * 900 + b".").value == []
    with pytest.raises(BadFileError, match="more than 1000 steps"):
        pickles.load(b"\x80\x02" + b"]" * 1100 + b".")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8, "does not fit"),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8, "'a' is C64; known"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "does not fit"),
        ({}, 0, "holds no tensors"),
    ],
)
def test_safetensors_that_do_not_fit_are_refused(tmp_path, header, data, message):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"\0" * data
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "a.safetensors")


def test_tensors_are_checked_by_exact_arithmetic():
    """Against NumPy's own bounds, over all small views of a storage of 8 elements."""
    storage = pickles.load(tensor_pickle(numel=8)).storages["0"]
    content, flat = memoryview(count(8).tobytes()), count(8)
    for offset, rows, columns, row_step, column_step in np.ndindex(4, 4, 4, 4, 4):
        shape, strides = (rows, columns), (row_step, column_step)
        indices = [
            [offset + r * row_step + c * column_step for c in range(columns)] for r in range(rows)
        ]
        inside = all(index < 8 for row in indices for index in row)
        if not inside:
            with pytest.raises(BadFileError, match="beyond"):
                Tensor(storage, storage.dtype, offset, shape, strides)
            continue
        array = Tensor(storage, storage.dtype, offset, shape, strides).to_array(content)
        np.testing.assert_array_equal(array, flat[np.array(indices, int).reshape(shape)])


def test_mutants_are_refused_or_read_right(tmp_path):
    named = read_state_dict(DATA / "zip.pth")
    del named["empty"], named["bool"]  # forged files of these would not be compared bit by bit
    write_state_dict(tmp_path / "right.pth", named)
    table = mutate.run(tmp_path / "right.pth", tmp_path, count=300, seed=1)
    wrong = {
        kind: counts
        for kind, counts in table.items()
        if any(counts[outcome] for outcome in mutate.forbidden(kind))
    }
    assert wrong == {}
    refused = sum(counts["refused"] for counts in table.values())
    assert 200 < refused < 300


def flip_outcomes(content, path, step):
    """Reads the file with one bit flipped, at every `step`-th byte; counts the outcomes."""
    outcomes = collections.Counter[str]()
    for at in range(0, len(content), step):
        changed = content[at] ^ 1 << at % 8
        path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
        outcomes[mutate.judge(path, [EXPECTED])] += 1
    return outcomes


# The step only saves time; it has no factor in common with the sizes of headers.
def test_torchs_own_zip_with_a_flipped_bit_is_never_read_wrongly(tmp_path):
    content = (DATA / "zip.pth").read_bytes()
    outcomes = flip_outcomes(content, tmp_path / "mutant.pth", step=11)
    assert set(outcomes) == {"refused", "identical"}


def test_the_older_container_with_a_flipped_bit_never_crashes(tmp_path):
    content = (DATA / "legacy.pth").read_bytes()
    outcomes = flip_outcomes(content, tmp_path / "mutant.pth", step=5)
    # It has no checksum: a flipped number or letter is read as it stands there.
    assert set(outcomes) <= set(mutate.OUTCOMES[:4])
    assert outcomes["refused"] > 0.6 * outcomes.total()


def test_what_has_no_checksum_is_said_with_its_sha256(tmp_path):
    content = (DATA / "legacy.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert f"SHA-256 is {digest}: compare" in unseen_damage(DATA / "legacy.pth")
    named = tmp_path / f"old-{digest[:8]}.pth"
    named.write_bytes(content)
    assert unseen_damage(named) == ""
    assert unseen_damage(DATA / "zip.pth") == ""
