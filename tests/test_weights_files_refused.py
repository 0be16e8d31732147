"""Files that are no weights, damaged and hostile ones: they are refused in words."""

import collections
import json
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.weights import pickles
from bmjax.weights.files import read_state_dict, write_state_dict
from bmjax.weights.tensors import BadFileError, Tensor
from experiments import mutate_weights as mutate
from tests.weights_files_helpers import DATA, EXPECTED, assert_equal, count, packed, tensor_pickle


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


def test_a_torchscript_program_is_told_though_its_code_is_compressed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/data.pkl", "a/code/net.py", "a/constants.pkl"):
            archive.writestr(name, b"\0" * 100)
    with pytest.raises(UserError, match=r"TorchScript program\. Load it with torch\.jit\.load"):
        read_state_dict(tmp_path / "a.pt")


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
        (lambda records: [*records, ("zip/constants.pkl", b"")], "TorchScript.*torch.jit.load"),
        (lambda records: [*records, ("zip/models/model.json", b"")], "program of torch.export"),
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
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "ends too early"),
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
