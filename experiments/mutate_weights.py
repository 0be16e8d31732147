"""What bmjax says to damaged and hostile `.pth` files: no wrong weights, no crash, no code run.

Takes a checkpoint as it is (zip container) and once more in PyTorch's older container, and reads
mutants of both. Half of the places are drawn from the structure (headers, directory, pickle,
counts), since nearly all bytes of a real file are numbers. The rows:

- damage: bits flipped; bytes overwritten, inserted, removed; the end cut; two parts exchanged
  ("move"); two names swapped, in the directory alone and everywhere.
- forged: the pickle mutated and packed again with a right checksum. Anyone could have written such
  a file, so that other weights are no fault; crashes are.
- hostile: the pickle replaced by one of 23 that run a command or try to reach one.

What may not be: in the zip container, damage that is read as other weights; anywhere, an exception
that is no UserError ("crash"), or code run (seen by a file that the payloads make, and by Python's
audit events). The older container has no checksum: what is read as other numbers there, or other
names or shapes, is counted. Commands that read such a file say so, with its SHA-256.

    uv run python experiments/mutate_weights.py --weights resnet18-cifar10.pth

On two virtual cores of an AMD EPYC, with a ResNet-18 of 45 MB for CIFAR-10 (seed 0, 102 seconds;
0 of 1,000 had an outcome that must not be; exit code 0):

    kind                              refused  identical  numbers  names, shapes  crash  ran code
    zip    hostile                        100          0        0              0      0         0
    zip    forged                          85          4        0             11      0         0
    zip    damage: remove                  32          0        0              0      0         0
    zip    damage: overwrite               20         17        0              0      0         0
    zip    damage: names swapped           47          0        0              0      0         0
    zip    damage: move                    28          0        0              0      0         0
    zip    damage: insert                  30          0        0              0      0         0
    zip    damage: flip                    39         29        0              0      0         0
    zip    damage: directory swapped       27          0        0              0      0         0
    zip    damage: cut                     31          0        0              0      0         0
    legacy hostile                        100          0        0              0      0         0
    legacy forged                          90          0        0             10      0         0
    legacy damage: remove                  43          0        0              0      0         0
    legacy damage: overwrite               25          0       19              2      0         0
    legacy damage: move                    42          0        0              0      0         0
    legacy damage: insert                  46          0        0              0      0         0
    legacy damage: flip                    46          2       30              8      0         0
    legacy damage: cut                     37          0        0              0      0         0
"""

import argparse
import collections
import io
import pickle
import random
import re
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bmjax.errors import UserError
from bmjax.weights import pickles
from bmjax.weights.files import read_state_dict, write_state_dict
from bmjax.weights.writing import dump

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
OUTCOMES = ("refused", "identical", "numbers", "names, shapes", "crash", "ran code")
TELLTALE = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"}

Named = dict[str, np.ndarray]


def legacy_container(pickled: bytes, storages: list[np.ndarray]) -> bytes:
    """Packs a pickle whose storages are named 0, 1, ... as PyTorch did before version 1.6."""
    header = (pickle.dumps(value, 2) for value in (MAGIC, 1001, SYSTEM))
    keys = pickle.dumps([str(number) for number in range(len(storages))], 2)
    data = (struct.pack("<q", array.size) + array.tobytes() for array in storages)
    return b"".join((*header, pickled, keys, *data))


def zip_container(pickled: bytes, storages: list[bytes]) -> bytes:
    """Packs a pickle whose storages are named 0, 1, ... as PyTorch does, with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for number, data in enumerate(storages):
            archive.writestr(f"archive/data/{number}", data)
    return buffer.getvalue()


def hostile_pickles(command: str) -> dict[str, bytes]:
    """Returns pickles that run a shell command where `pickle.load` reads them, or try to."""
    text = pickle.BINUNICODE + struct.pack("<I", len(command)) + command.encode()
    code = f"__import__('os').system({command!r})".encode()
    code = pickle.BINUNICODE + struct.pack("<I", len(code)) + code

    def string(word: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()

    start, run = b"\x80\x04", text + b"\x85R."
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"((X\7\0\0\0storagectorch\nFloatStorage\n" + string("0") + string("cpu") + b"K\1tQ"
    return {
        "os.system": start + b"cos\nsystem\n" + run,
        "posix.system": start + b"cposix\nsystem\n" + run,
        "STACK_GLOBAL": start + string("os") + string("system") + b"\x93" + run,
        "memoised names": start
        + string("os")
        + b"\x940"
        + string("system")
        + b"\x94h\0h\1\x93"
        + run,
        "builtins.eval": start + b"cbuiltins\neval\n" + code + b"\x85R.",
        "builtins.exec": start + b"c__builtin__\nexec\n" + code + b"\x85R.",
        "getattr": start
        + b"cbuiltins\ngetattr\ncos\n__dict__\n"
        + string("system")
        + b"\x86R"
        + run,
        "getattr of a known name": start
        + b"cbuiltins\ngetattr\nccollections\nOrderedDict\n"
        + string("__init__")
        + b"\x86R.",
        "dotted name": start
        + string("collections")
        + string("OrderedDict.__init__.__globals__")
        + b"\x93"
        + run,
        "torch.load": start + b"ctorch\nload\n" + run,
        "torch.hub.load": start + b"ctorch.hub\nload\n" + run,
        "numpy.load": start + b"cnumpy\nload\n" + run,
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "NEWOBJ": start + b"csubprocess\nPopen\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": start + b"csubprocess\nPopen\n)}" + string("args") + text + b"s\x92.",
        "BUILD": start
        + b"ctypes\nSimpleNamespace\n)R}"
        + string("__setstate__")
        + b"cos\nsystem\nsb"
        + text
        + b"b.",
        "BUILD of a known name": start
        + b"ctorch\nFloatStorage\n}"
        + string("__class__")
        + string("x")
        + b"sb.",
        "hook of a tensor": start
        + tensor
        + storage
        + b"K\0K\1\x85K\1\x85\x89cos\nsystem\n"
        + text
        + b"\x85RtR.",
        "call of a storage type": start + b"ctorch\nFloatStorage\n" + run,
        "call of a text": start + string("os.system") + run,
        "extension": start + b"\x82\x01" + run,
        "text identity": start + b"Pos.system\n.",
    }


def structure(content: bytes) -> list[range]:
    """Returns where a file holds anything else than numbers."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries, directory = archive.infolist(), archive.start_dir
        parts = [range(directory, len(content))]
        for entry in entries:
            size = entry.file_size if entry.filename.endswith(".pkl") else 0
            parts.append(range(entry.header_offset, entry.header_offset + 90 + size))
        return parts
    end = 0
    for _ in range(5):
        end = pickles.load(content, end).end
    return [range(end + 8)]


def mutate(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damages a file in one of several ways; returns how, and the bytes."""
    kinds = ["flip", "flip", "overwrite", "insert", "remove", "cut", "move"]
    kind = rng.choice([*kinds, "names", "names", "directory"] if content[:2] == b"PK" else kinds)
    if kind in ("names", "directory"):
        return f"damage: {kind} swapped", swap_names(content, rng, kind == "directory")
    parts = structure(content)
    place = rng.choice([*(rng.choice(parts) for _ in range(2)), range(len(content))])
    at, size = rng.choice(place), rng.choice((1, 2, 8, 300))
    at = min(at, len(content) - 1)
    before, after = content[:at], content[at:]
    changed = {
        "flip": lambda: before + bytes([after[0] ^ 1 << rng.randrange(8)]) + after[1:],
        "overwrite": lambda: before + rng.randbytes(size)[: len(after)] + after[size:],
        "insert": lambda: before + rng.randbytes(size) + after,
        "remove": lambda: before + after[size:],
        "cut": lambda: before,
        "move": lambda: after + before,
    }
    return f"damage: {kind}", changed[kind]()


def swap_names(content: bytes, rng: random.Random, only_directory: bool) -> bytes:
    """Exchanges the names of two records, in the directory alone or everywhere."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [entry.filename for entry in archive.infolist() if "/data/" in entry.filename]
        begin = archive.start_dir if only_directory else 0
    lengths = [len(name) for name in names]
    first = rng.choice([name for name in names if lengths.count(len(name)) > 1])
    second = rng.choice([name for name in names if len(name) == len(first) and name != first])
    other = {first.encode(): second.encode(), second.encode(): first.encode()}
    # In a header a name follows fixed fields, and no other record's name goes on after it.
    either = re.compile(b"(?<![0-9/])(" + b"|".join(map(re.escape, other)) + b")(?![0-9])")
    return content[:begin] + either.sub(lambda found: other[found[1]], content[begin:])


def mutants(named: Named, zipped: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields what was done (container, kind) and the bytes, `count` of them."""
    rng = random.Random(seed)
    arrays = list(named.values())
    legacy = legacy_container(dump(named), arrays)
    small = {name: array for name, array in named.items() if array.nbytes < 10_000}
    for number in range(count):
        container, content = (("zip", zipped), ("legacy", legacy))[number % 2]
        if number % 10 < 2:
            kind, pickled = "forged", bytearray(dump(small))
            for _ in range(rng.choice((1, 1, 3))):
                pickled[rng.randrange(len(pickled))] ^= 1 << rng.randrange(8)
            mutant = pack(container, bytes(pickled), list(small.values()))
        elif number % 10 < 4:
            kind, payloads = "hostile", hostile_pickles(f"touch {CANARY}")
            mutant = pack(
                container, payloads[rng.choice(list(payloads))], [np.zeros(1, np.float32)]
            )
        else:
            kind, mutant = mutate(content, rng)
        yield f"{container:7}{kind}", mutant


def pack(container: str, pickled: bytes, arrays: list[np.ndarray]) -> bytes:
    """Packs a pickle and its storages in either container."""
    if container == "legacy":
        return legacy_container(pickled, arrays)
    return zip_container(pickled, [array.tobytes() for array in arrays])


CANARY = Path(tempfile.gettempdir()) / "bmjax-canary"
_events: list[str] = []


def judge(path: Path, expected: list[Named]) -> str:
    """Reads a file and returns one of `OUTCOMES`; `expected` are the right contents."""
    _events.clear()
    CANARY.unlink(missing_ok=True)
    try:
        named = read_state_dict(path)
        outcome = min((difference(named, right) for right in expected), key=OUTCOMES.index)
    except UserError as error:
        outcome = "refused" if len(str(error)) > 30 else "crash"
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        outcome = "crash"
    return "ran code" if CANARY.exists() or _events else outcome


def difference(named: Named, right: Named) -> str:
    """Compares what was read with what should have been."""
    kinds = [(name, array.shape, array.dtype) for name, array in named.items()]
    if kinds != [(name, array.shape, array.dtype) for name, array in right.items()]:
        return "names, shapes"
    same = all(right[name].tobytes() == array.tobytes() for name, array in named.items())
    return "identical" if same else "numbers"


def forbidden(kind: str) -> tuple[str, ...]:
    """Returns the outcomes which must not be for a kind of mutant."""
    if kind.startswith("zip    damage"):
        return ("numbers", "names, shapes", "crash", "ran code")
    if kind.endswith("hostile"):
        return ("identical", "numbers", "names, shapes", "crash", "ran code")
    return ("crash", "ran code")


def watch() -> None:
    """Notes from now on what Python says about code being run or imported by name."""
    sys.addaudithook(lambda event, _: _events.append(event) if event in TELLTALE else None)


def example(path: Path) -> None:
    """Writes a small checkpoint."""
    rng = np.random.default_rng(0)
    named: Named = {}
    for layer in range(12):
        named[f"layer{layer}.weight"] = rng.normal(size=(16, 8, 3, 3)).astype(np.float32)
        named[f"layer{layer}.bias"] = rng.normal(size=16).astype(np.float32)
        named[f"layer{layer}.num_batches_tracked"] = np.array(layer)
    write_state_dict(path, named)


def run(weights: Path, folder: Path, count: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Returns how many mutants of each kind had which outcome."""
    named = read_state_dict(weights)
    small = {name: array for name, array in named.items() if array.nbytes < 10_000}
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    path = folder / "mutant.pth"
    for kind, content in mutants(named, weights.read_bytes(), count, seed):
        path.write_bytes(content)
        table[kind][judge(path, [small if kind.endswith("forged") else named])] += 1
    return dict(table)


def main() -> None:
    """Prints the table; exits with 1 if there is anything that must not be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a .pth file; by default a small one is made")
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    watch()
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or Path(folder) / "example.pth"
        if arguments.weights is None:
            example(weights)
        table = run(weights, Path(folder), arguments.mutants, arguments.seed)
    seconds = time.perf_counter() - begin
    wrong = report(table)
    print(
        f"{arguments.mutants} mutants in {seconds:.0f} s; {wrong} had an outcome that must not be"
    )
    sys.exit(1 if wrong else 0)


def report(table: dict[str, collections.Counter[str]]) -> int:
    """Prints the table and returns how many mutants had a forbidden outcome."""
    print(f"{'kind':32}" + "".join(f"{name:>{_width(name)}}" for name in OUTCOMES))
    for kind, counts in sorted(table.items(), reverse=True):
        print(f"{kind:32}" + "".join(f"{counts[name]:>{_width(name)}}" for name in OUTCOMES))
    return sum(counts[name] for kind, counts in table.items() for name in forbidden(kind))


def _width(name: str) -> int:
    return len(name) + 2


if __name__ == "__main__":
    main()
