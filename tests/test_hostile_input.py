"""Thousands of damaged and hostile files for every reader of bmjax.

A reader may say what is wrong, or return what the sound file holds; what has no checksum may come
out changed. No other exception, nothing that takes long, and no code that a file brings along.
"""

import collections
import dataclasses
import io
import json
import os
import pickle
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmjax import cli, load_dataset
from bmjax.config import DistillConfig, TrainConfig
from bmjax.config.flat import flatten
from bmjax.data.kinds import mnist5k, prepare
from bmjax.data.kinds.files import DecodingError, Encoded, View
from bmjax.data.kinds.folder import PathReader
from bmjax.data.preprocess import squash
from bmjax.distill.settings import read_settings
from bmjax.distill.teacher_cache import INDEX, _open
from bmjax.errors import UserError, printable
from bmjax.machine.storage import write_settings
from bmjax.runs import checkpoint
from bmjax.runs.folder import CONFIG, TOUR, Run, create_run, read_run
from bmjax.runs.history import read_metrics
from bmjax.weights.files import read_state_dict, write_state_dict
from tests.folder_helpers import encode, load, write_class
from tests.mutation_helpers import HOSTILE, json_mutant, mutant

LONGEST_SECONDS = 5.0
TELLTALE = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"}


class Reader(NamedTuple):
    """A way into bmjax.

    Attributes:
        make: writes a sound file into a folder, and returns its path.
        read: reads it; what it returns can be compared.
        checked: whether a change is noticed, or changes nothing.
        mutants: how many.
        change: makes one.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    checked: bool
    mutants: int
    change: Callable[[random.Random, bytes], bytes] = mutant


def make_npz(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (30, 4, 4)).astype(np.uint8)
    np.savez(folder / "data.npz", image=images, label=np.arange(30) % 2)
    return folder / "data.npz"


def plain(dataset: Any) -> Any:
    parts = (dataset.train, dataset.validation, dataset.test)
    arrays = [(part.images.tobytes(), part.labels.tobytes()) for part in parts]
    return arrays, dataset.class_names, dataset.image_shape


def make_weights(ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        named: dict[str, np.ndarray] = {
            "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
            "b": np.arange(5),
        }
        write_state_dict(folder / f"weights{ending}", named)
        return folder / f"weights{ending}"

    return make


def read_weights(path: Path) -> Any:
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in read_state_dict(path).items()}


def make_run(folder: Path) -> Path:
    data = {
        **{"name": "two", "fingerprint": "f", "class_names": ["a", "b"], "transform": None},
        **{"image_shape": (4, 4, 1), "mean": [0.5], "std": [0.5]},
    }
    create_run(Run(folder, TrainConfig(model="mlp").resolved(), data, {"head": "new"}))
    return folder / CONFIG


def make_tour(folder: Path) -> Path:
    write_settings(folder / TOUR, flatten(DistillConfig()))
    return folder / TOUR


def make_metrics(folder: Path) -> Path:
    lines = [json.dumps({"step": n, "split": "train", "loss": 1 / (n + 1)}) for n in range(20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "metrics.jsonl"


def read_records(path: Path) -> Any:
    records = read_metrics(path)
    assert all(isinstance(record["step"], int) for record in records)
    return records


def make_checkpoint(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        writer = checkpoint.CheckpointWriter(folder / "checkpoints", 1)
        arrays: dict[str, np.ndarray] = {
            "a": np.arange(300, dtype=np.float32),
            "b": np.arange(3),
        }
        writer.save(7, {"state": arrays}, {"step": 7})
        writer.close()
        paths = (folder / "checkpoints" / "7").rglob(name)
        return max((path for path in paths if path.is_file()), key=lambda p: p.stat().st_size)

    return make


def read_checkpoint(path: Path) -> Any:
    folder = next(parent for parent in path.parents if parent.name == "checkpoints")
    step, said = checkpoint.newest_sound(folder)
    if step is None:
        raise UserError(said[0])
    state = checkpoint.read(folder, step, ("state",))["state"]
    return {name: array.tobytes() for name, array in state.items()}


def make_picture(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "picture").write_bytes(encode(size=(12, 10), kind=kind))
        return folder / "picture"

    return make


def read_picture(path: Path) -> Any:
    reader = PathReader(str(path.parent))
    encoded = Encoded(reader, [path.name], np.zeros(1, np.int32), "", ())
    image = encoded.wide(0, View(squash(8, 8), 3))
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    return image.tobytes()


def make_kept(folder: Path) -> Path:
    os.environ["BMJAX_CACHE"] = str(folder)
    prepare.remembered("key", lambda: {"3": "cut off", "15": "not an image"})
    (path,) = (folder / "checked").rglob("kept.json")
    return path


def read_kept(path: Path) -> Any:
    del path  # it is found by its key, and made anew where it is damaged
    return prepare.remembered("key", lambda: {"3": "cut off", "15": "not an image"})


def make_teacher_cache(folder: Path) -> Path:
    np.save(folder / "teacher_logits.npy", np.zeros((2, 3, 4, 5), np.float32))
    from bmjax.distill.teacher_cache import _sha256

    digests = {"teacher_logits": _sha256(folder / "teacher_logits.npy")}
    content = {"of": {"seed": 0, "mean": [0.5]}, "passes": 2, "sha256": digests}
    (folder / INDEX).write_text(json.dumps(content))
    return folder / INDEX


def read_teacher_cache(path: Path) -> Any:
    cache = _open(path.parent, {"seed": 0, "mean": [0.5]}, 2)
    return {name: np.asarray(array).tobytes() for name, array in cache.arrays.items()}


def make_digits(folder: Path) -> Path:
    arrays = {f"{split}_image": np.zeros((3, 2, 2, 1), np.uint8) for split in prepare.SPLITS}
    labels = {f"{split}_label": np.arange(3, dtype=np.int32) for split in prepare.SPLITS}
    np.savez(folder / "decoded.npz", allow_pickle=False, **arrays, **labels)
    return folder / "decoded.npz"


def read_digits(path: Path) -> Any:
    try:
        parts = mnist5k._read(path.parent)
    except mnist5k.DAMAGE as error:  # then it is made anew
        raise UserError(str(error)) from error
    return {name: (p.images.tobytes(), p.labels.tobytes()) for name, p in parts.items()}


READERS = {
    "npz": Reader(make_npz, lambda path: plain(load_dataset(f"npz:{path}")), True, 1500),
    "pth": Reader(make_weights(".pth"), read_weights, True, 1500),
    "safetensors": Reader(make_weights(".safetensors"), read_weights, False, 1500),
    "config.json": Reader(make_run, lambda p: read_run(p.parent), True, 1500, json_mutant),
    "distill.json": Reader(make_tour, lambda p: read_settings(p.parent), True, 700, json_mutant),
    "metrics.jsonl": Reader(make_metrics, read_records, False, 1000),
    "manifest": Reader(make_checkpoint("manifest.json"), read_checkpoint, True, 500, json_mutant),
    "array data": Reader(make_checkpoint("d/*"), read_checkpoint, True, 300),
    "jpeg": Reader(make_picture("JPEG"), read_picture, False, 700),
    "png": Reader(make_picture("PNG"), read_picture, False, 700),
    "kept.json": Reader(make_kept, read_kept, True, 500, json_mutant),
    "teacher cache": Reader(make_teacher_cache, read_teacher_cache, True, 500, json_mutant),
    "mnist5k": Reader(make_digits, read_digits, True, 500),
}


@pytest.fixture
def ran_code(monkeypatch):
    """A list of what a file had Python run."""
    seen: list[str] = []
    watching = [True]

    def note(event: str, arguments: Any) -> None:
        if watching[0] and event in TELLTALE:
            seen.append(f"{event} {arguments}")

    sys.addaudithook(note)  # which nothing can take away again
    monkeypatch.setenv("BMJAX_CACHE", os.environ.get("BMJAX_CACHE", ""))
    yield seen
    watching[0] = False


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_refused_or_read_right(tmp_path, ran_code, name):
    reader = READERS[name]
    path = reader.make(tmp_path)
    sound, expected = path.read_bytes(), reader.read(path)
    draw = random.Random(0)
    outcomes = collections.Counter[str]()
    slowest = 0.0
    for number in range(reader.mutants):
        changed = reader.change(draw, sound)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(changed)
        begin = time.monotonic()
        try:
            found = reader.read(path)
            outcome = "identical" if found == expected else "changed"
        except (UserError, DecodingError) as error:
            outcome = "refused" if str(error).strip() else "refused without a word"
        slowest = max(slowest, time.monotonic() - begin)
        outcomes[outcome] += 1
        if outcome == "changed" and reader.checked:
            pytest.fail(f"mutant {number} was read as something else: {changed[:300]!r}")
    assert not ran_code
    assert slowest < LONGEST_SECONDS
    assert outcomes.total() == reader.mutants
    assert set(outcomes) <= {"identical", "refused", "changed"}
    print(f"{name}: {reader.mutants:,} mutants, {dict(outcomes)}, at most {slowest:.2f} s")


def test_there_are_ten_thousand_of_them():
    assert sum(reader.mutants for reader in READERS.values()) >= 10_000


values = st.recursive(
    st.sampled_from([v for v in HOSTILE if v == v]) | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_settings_of_any_form_are_refused_or_are_settings(tmp_path_factory, older, data):
    """Of an older version, too, which wrote no SHA-256."""
    folder = tmp_path_factory.mktemp("run")
    path = make_run(folder)
    content = json.loads(path.read_text())
    part = data.draw(st.sampled_from(["config", "data", "extra"]))
    names = st.sampled_from([*content[part], "new"])
    content[part][data.draw(names)] = data.draw(values)
    content.pop("sha256")
    if older:
        path.write_text(json.dumps(content))
    else:
        write_settings(path, content)  # someone who knows how it is made
    try:
        run = read_run(folder)
    except UserError:
        return
    assert dataclasses.is_dataclass(run.config)
    assert len(run.data["mean"]) == run.data["image_shape"][2]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_an_npz_with_pickled_objects_is_refused(tmp_path, ran_code):
    evil = tmp_path / "evil"
    objects = np.empty(1, object)
    objects[0] = Evil(evil)
    np.savez(tmp_path / "a.npz", image=objects, label=np.zeros(1, int), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("image.npy", pickle.dumps(Evil(evil)))
    for name in ("a", "b"):
        with pytest.raises(UserError):
            load_dataset(f"npz:{tmp_path / name}.npz")
    assert not evil.exists()
    with pytest.raises(FileExistsError):  # it would have worked
        pickle.loads(pickle.dumps(Evil(tmp_path)))


def test_names_that_lead_out_of_a_folder_are_not_followed(tmp_path):
    make_teacher_cache(tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    content = json.loads((tmp_path / INDEX).read_text())
    digest = content["sha256"].pop("teacher_logits")
    content["sha256"]["../teacher_logits"] = digest
    (inner / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"it names '\.\./teacher_logits'"):
        read_teacher_cache(inner / INDEX)
    path = make_checkpoint("manifest.json")(tmp_path)
    hashes = json.loads(path.read_text())["sha256"]
    hashes["../../cache.json"] = "0" * 64
    path.write_text(json.dumps({"sha256": hashes, "own_sha256": checkpoint._own_sha256(hashes)}))
    assert checkpoint.damage(path.parent) == ["../../cache.json is missing"]


def test_a_picture_of_gigabytes_is_refused_before_it_is_decoded(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)))
    file.write(chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)) + chunk(b"IEND", b""))
    (tmp_path / "bomb.png").write_bytes(file.getvalue())
    begin = time.monotonic()
    with pytest.raises(DecodingError, match="too many pixels"):
        read_picture(tmp_path / "bomb.png")
    assert time.monotonic() - begin < LONGEST_SECONDS


def test_names_with_control_characters_are_shown_as_escapes(tmp_path, capsys):
    assert printable("\x1b[2J a\nb\u202e\udcff é 字 \u200c") == (
        "\\x1b[2J a\\nb\\u202e\\udcff é 字 \u200c"
    )
    for name in ("ant", "b\x1b[31mee\n"):
        write_class(tmp_path / "train" / name, 120)
        write_class(tmp_path / "test" / name, 1)
    (tmp_path / "train" / "ant" / "evil\x1b]0;name\x07.jpg").write_bytes(b"")
    dataset = load(tmp_path)
    assert dataset.class_names == ("ant", "b\x1b[31mee\n")
    (warning,) = dataset.warnings
    assert "evil\\x1b]0;name\\x07.jpg" in warning
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", f"folder:{tmp_path}/no\x1b[2Jne", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "no\\x1b[2Jne does not exist" in error
