"""What stands beside weights is read as inert, and what could run commands is refused."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import pickle
import random
import types
import uuid

import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.weights import pickles
from bmjax.weights.files import read_state_dict
from bmjax.weights.pickles import Inert
from bmjax.weights.tensors import BadFileError
from tests.weights_files_helpers import (
    assert_equal,
    count,
    dict_piece,
    packed,
    pickled,
    piece,
    tensor_pickle,
    tensors_piece,
)

GETATTR = b"cbuiltins\ngetattr\n"
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"
NAMED = {"a.weight": count(2, 3), "a.bias": count(2)}
ran: list[str] = []


class Mode(enum.Enum):
    FAST = "fast"


class Outer:
    class Inner(enum.Enum):
        ONE = 1

    def method(self):
        return 1


class Settings(dict):
    """A user's own dictionary."""


class Tracked:
    """Says when any of what unpickling may call is called."""

    def __init__(self):
        self.lr = 0.1

    def __new__(cls):
        ran.append("new")
        return super().__new__(cls)

    def __setstate__(self, state):
        ran.append("setstate")

    def __reduce__(self):
        return noted, ("reduce",), self.__dict__


def noted(what):
    ran.append(what)
    return Tracked()


BESIDE = {
    "path": pathlib.PurePosixPath("/data/x"),
    "windows path": pathlib.PureWindowsPath("c:/x"),
    "datetime": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "date and time passed": (datetime.date(2024, 1, 1), datetime.timedelta(3)),
    "namespace": argparse.Namespace(model="resnet18", out=pathlib.PurePosixPath("/x")),
    "simple namespace": types.SimpleNamespace(a=1),
    "defaultdict": collections.defaultdict(list, loss=[0.1, 0.2]),
    "nested defaultdict": collections.defaultdict(
        functools.partial(collections.defaultdict, int), {"a": collections.defaultdict(int)}
    ),
    "counter": collections.Counter("abca"),
    "deque": collections.deque([1, 2], maxlen=5),
    "ordered": collections.OrderedDict(a=1),
    "NumPy scalars": [np.float64(0.5), np.int64(3), np.bool_(True), np.float32(1)],
    "NumPy arrays": [np.eye(3), np.array(["a", "b"]), np.array([None, {}], object)],
    "random states": [random.Random(0).getstate(), np.random.RandomState(0).get_state()],
    "generator": np.random.default_rng(0),
    "sets": [{1, 2}, frozenset("ab"), set()],
    "bytes": [b"abc", bytearray(b"abc"), b""],
    "numbers": [2**100, 1j, decimal.Decimal("0.1"), fractions.Fraction(1, 3), range(3)],
    "enum": [Mode.FAST, Outer.Inner.ONE],
    "bound method": Outer().method,
    "own dictionary": Settings(a=1, b=[2]),
    "error": ValueError("it was"),
    "types": [dict, int, Outer, len, uuid.UUID(int=5)],
    "own object": Tracked(),
}


@pytest.mark.parametrize("kind", list(BESIDE))
def test_what_stands_beside_weights_is_inert(tmp_path, kind):
    ran.clear()
    for protocol in (2, 4, 5):
        beside = pickle.dumps(BESIDE[kind], protocol)[2:-1]
        # It stands first, as younger protocols count what was noted before.
        written = dict_piece(beside=beside, model=tensors_piece(NAMED))
        read = read_state_dict(packed(tmp_path, pickled(written), list(NAMED.values())))
        assert_equal(read, NAMED)
    assert ran == []


def test_an_inert_object_is_its_name_and_its_plain_data():
    loaded = pickles.load(pickle.dumps(argparse.Namespace(lr=0.5), 2)).value
    assert isinstance(loaded, Inert)
    assert (loaded.kind, loaded.state) == ("argparse.Namespace", {"lr": 0.5})
    assert pickles.load(pickle.dumps(Settings(a=1), 2)).value.items == {"a": 1}
    # Nothing is kept in what all the unnamed share.
    pickles.load(b"\x80\x04\x8fK\x01K\x02\x86b.")
    assert (pickles.INERT.items, pickles.INERT.state) == (None, None)


def test_torchs_own_objects_are_inert(tmp_path):
    beside = [
        b"ctorch\ndevice\nX\x03\0\0\0cpu\x85R",
        b"ctorch\nSize\nK\1K\2\x86\x85R",
        b"ctorch\nfloat16\n",
        b"ctorch.nn.modules.loss\nCrossEntropyLoss\n)\x81}X\x08\0\0\0trainingK\1sb",
        b"comegaconf.dictconfig\nDictConfig\n)\x81}X\1\0\0\0a]sb",
        # As OneCycleLR kept one of its own functions.
        b"c__builtin__\ngetattr\nctorch.optim.lr_scheduler\nOneCycleLR\n"
        + piece("_annealing_cos")
        + b"\x86R",
    ]
    for written in beside:
        whole = pickled(dict_piece(beside=written, model=tensors_piece(NAMED)))
        assert_equal(read_state_dict(packed(tmp_path, whole, list(NAMED.values()))), NAMED)


def test_a_tensor_with_attributes_of_its_own_is_read(tmp_path):
    tensor = tensor_pickle(numel=2, shape=(2,))[9:-3]
    function, arguments = tensor.split(b"\n(", 1)
    written = FROM_TYPE + b"(" + function
    written += b"\nctorch.nn.parameter\nParameter\n(" + arguments + b"}tR"
    path = packed(tmp_path, pickled(dict_piece(t=written)), [count(2)])
    assert_equal(read_state_dict(path), {"t": count(2)})


@pytest.mark.parametrize(
    "name",
    [
        *("os system", "posix execv", "nt startfile", "subprocess Popen", "sys exit"),
        *("builtins eval", "__builtin__ exec", "builtins __import__", "builtins open"),
        *("importlib import_module", "runpy run_path", "shutil rmtree", "ctypes.util find_library"),
        *("torch load", "torch.hub load", "torch.jit load", "numpy load", "numpy.testing x"),
        *("pickle loads", "_pickle loads", "types FunctionType", "os.path x"),
        *("collections OrderedDict.__init__", "mine Net.__globals__.get", "mine __reduce_ex__"),
    ],
)
def test_names_that_can_run_commands_are_refused_wherever_they_stand(tmp_path, name):
    module, word = name.split()
    by_line = b"c" + f"{module}\n{word}\n".encode()
    by_stack = piece(module) + piece(word) + b"\x93"
    for asked in (by_line, by_stack):
        for hidden in (asked, asked + b"K\1\x85R", b"]" + asked + b"a", asked + b")\x81}b"):
            written = dict_piece(model=tensors_piece(NAMED), beside=hidden)
            path = packed(tmp_path, pickled(written), list(NAMED.values()))
            with pytest.raises(UserError, match=r"refused to import .*do not load it with torch"):
                read_state_dict(path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            b"cbuiltins\ngetattr\nccollections\nOrderedDict\n" + piece("__init__") + b"\x86R",
            "looks",
        ),
        (b"cbuiltins\ngetattr\n" + piece("text") + piece("format") + b"\x86R", "looks up"),
        (b"cbuiltins\ngetattr\n)R", "looks up"),
        (b"ctorch\nQInt8Storage\n", "of a kind that weights here do not have"),
        (b"ctorch\nComplexFloatStorage\n", "quantized, sparse or complex"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", "quantized, sparse or complex"),
        (b"ctorch._utils\n_rebuild_tensor\n)R", "arguments that PyTorch does not use"),
        (FROM_TYPE + b"(cmine\nrun\nN)}tR", "arguments that PyTorch"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\ndevice\nN)}tR",
            "arguments that PyTorch",
        ),
        (b"cmine\nNet\n)K\1\x92", "names that are not a dictionary"),
        (b"cmine\nNet\nK\1\x81", "not a class"),
        (b"K\1)R", "not a function"),
        (b"cmine\nNet\n}b", "state of something that has none"),
        (b"cmine\nNet\n)\x81K\1K\2K\3\x87K\1sb", "uses a value|has none"),
    ],
)
def test_what_no_program_writes_is_refused(asked, message):
    with pytest.raises(BadFileError, match=message):
        pickles.load(pickled(b"}" + piece("a") + asked + b"s"))
