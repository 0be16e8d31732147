"""The part of Python's pickle format that PyTorch needs for tensors: read by rule, never run.

`pickle.Unpickler` imports and calls what a file names. `load` is no such machine: it knows the
opcodes below, and a global is a name that it compares with a fixed list. It can make plain data
and tensors, and has no way to import or to call anything else. What stands in training
checkpoints beside tensors (settings, paths, dates, NumPy scalars, a user's own classes) becomes
`Inert`: the name of its kind, and the plain data that it was given.

Sources: CPython's `pickletools` for the opcodes, and PyTorch's serialization notes,
https://pytorch.org/docs/stable/notes/serialization.html, for what a tensor is made of.
"""

import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bmjax.weights import pickle_names as names
from bmjax.weights.pickle_names import shorten
from bmjax.weights.tensors import (
    BadFileError,
    Storage,
    Tensor,
    are_counts,
    damaged,
    is_count,
)

# An opcode of one byte can make a dictionary of 64: this bounds them at some 300 MB.
MAX_OPCODES = 5_000_000
_MAX_NAME = 300


class Inert:
    """An object of any other kind, which was not made.

    Attributes:
        kind: module and name of its class or of the function that makes it; may be empty.
        items: what it was given as a dictionary.
        state: its attributes, where they are a dictionary.
    """

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: str = ""):
        self.kind = kind
        self.items: dict[Any, Any] | None = None
        self.state: dict[Any, Any] | None = None


INERT = Inert()


@dataclass(frozen=True)
class Global:
    """A name which a pickle would import; here it stays a name.

    Attributes:
        name: module and name, joined by a dot.
    """

    name: str


@dataclass(frozen=True)
class Loaded:
    """What one pickle held.

    Attributes:
        value: plain data, tensors, `Inert`.
        end: the position after it.
        storages: all that it names, by their key.
    """

    value: Any
    end: int
    storages: Mapping[str, Storage]


def load(content: bytes | memoryview, start: int = 0) -> Loaded:
    """Reads the pickle that begins at `start`, without running anything.

    Raises:
        BadFileError: it is damaged, or names something that is neither tensor nor plain data, or
            a tensor reaches beyond its storage.
    """
    machine = _Machine(content, start)
    value = machine.run()
    return Loaded(value, machine.position, machine.storages)


_CONSTANTS = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
    pickle.EMPTY_SET: INERT,
}
_FRESH = {pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict}
_NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_TEXTS = {
    pickle.SHORT_BINUNICODE: ("<B", "utf-8"),
    pickle.BINUNICODE: ("<I", "utf-8"),
    pickle.BINUNICODE8: ("<Q", "utf-8"),
    # Written by Python 2.
    pickle.SHORT_BINSTRING: ("<B", "latin-1"),
    pickle.BINSTRING: ("<i", "latin-1"),
}
_BYTES = {
    pickle.SHORT_BINBYTES: "<B",
    pickle.BINBYTES: "<I",
    pickle.BINBYTES8: "<Q",
    pickle.BYTEARRAY8: "<Q",
}
_PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_SKIPPED = {pickle.PROTO: 1, pickle.FRAME: 8}


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, content: bytes | memoryview, start: int):
        self._content = bytes(content) if isinstance(content, memoryview) else content
        self.position = start
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._actions = {
            pickle.MARK: self._mark,
            pickle.MEMOIZE: lambda: self._put(len(self._memo)),
            pickle.LONG1: self._long,
            pickle.TUPLE: lambda: self._push(tuple(self._to_mark())),
            pickle.APPEND: lambda: self._append([self._pop()]),
            pickle.APPENDS: lambda: self._append(self._to_mark()),
            pickle.ADDITEMS: lambda: self._append(self._to_mark()),
            pickle.SETITEM: lambda: self._set_items(self._pop_some(2)),
            pickle.SETITEMS: lambda: self._set_items(self._to_mark()),
            pickle.GLOBAL: lambda: self._global(self._line(), self._line()),
            pickle.STACK_GLOBAL: lambda: self._global(*self._pop_some(2)),
            pickle.REDUCE: self._reduce,
            pickle.NEWOBJ: self._new_object,
            pickle.NEWOBJ_EX: self._new_object_of_named,
            pickle.FROZENSET: self._frozen_set,
            pickle.BUILD: self._build,
            pickle.BINPERSID: self._storage,
        }

    def run(self) -> Any:
        """Follows the opcodes up to the STOP."""
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == pickle.STOP:
                return self._pop()
            self._follow(opcode)
        raise BadFileError(
            f"its pickle has more than {MAX_OPCODES} steps, far more than any model. Load it with "
            "torch if you trust it, and save the model's state_dict() alone."
        )

    def _follow(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self._push(_CONSTANTS[opcode])
        elif opcode in _FRESH:
            self._push(_FRESH[opcode]())
        elif opcode in _NUMBERS:
            self._push(self._number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            self._push(self._text(*_TEXTS[opcode]))
        elif opcode in _PUTS:
            self._put(self._number(_PUTS[opcode]))
        elif opcode in _GETS:
            self._get(self._number(_GETS[opcode]))
        elif opcode in _TUPLES:
            self._push(tuple(self._pop_some(_TUPLES[opcode])))
        elif opcode in _SKIPPED:
            self._take(_SKIPPED[opcode])
        elif opcode in _BYTES:
            self._take(self._number(_BYTES[opcode]))
            self._push(INERT)
        elif opcode in self._actions:
            self._actions[opcode]()
        else:
            raise damaged(f"its pickle has the step {opcode!r}, which weight files do not use")

    def _take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if num_bytes < 0 or end > len(self._content):
            raise damaged("its pickle ends too early")
        taken = self._content[self.position : end]
        self.position = end
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, layout: str, encoding: str) -> str:
        try:
            return self._take(self._number(layout)).decode(encoding)
        except UnicodeDecodeError:
            raise damaged("its pickle has a text that is not UTF-8") from None

    def _line(self) -> str:
        end = self._content.find(b"\n", self.position, self.position + _MAX_NAME)
        if end < 0:
            raise damaged("its pickle has a name without an end")
        line = self._content[self.position : end]
        self.position = end + 1
        if not line.isascii():
            raise damaged("its pickle has a name that is not ASCII")
        return line.decode("ascii")

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._pop_some(1)[0]

    def _pop_some(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise damaged("its pickle uses a value that it never made")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _top(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        if not self._below:
            raise damaged("its pickle ends a group that it never began")
        values, self._stack = self._stack, self._below.pop()
        return values

    def _frozen_set(self) -> None:
        self._to_mark()
        self._push(INERT)

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise damaged("its pickle uses a value that it never made")
        self._push(self._memo[index])

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise damaged("its pickle appends to something that is not a list")

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert) and target is not INERT:
            target.items = {} if target.items is None else target.items
            target = target.items
        if isinstance(target, dict) and len(values) % 2 == 0:
            self._fill(target, zip(values[::2], values[1::2], strict=True))
        elif target is not INERT:
            raise damaged("its pickle fills something that is not a dictionary")

    @staticmethod
    def _fill(target: dict[Any, Any], pairs: Iterable[Any]) -> None:
        for key, value in pairs:
            # No other key can name a tensor, and hashing deeply nested ones overflows the stack.
            if isinstance(key, str | int | float | None):
                if key in target:
                    raise damaged(f"its pickle sets {shorten(key)} twice")
                target[key] = value

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise damaged("its pickle has a name that is not a text")
        self._push(Global(names.check(module, name)))

    def _reduce(self) -> None:
        function, arguments = self._pop_some(2)
        if not (isinstance(function, Global | Inert) and isinstance(arguments, tuple)):
            raise damaged("its pickle calls something that is not a function")
        self._push(self._result(function, arguments))

    def _result(self, function: Global | Inert, arguments: tuple[Any, ...]) -> Any:
        """Returns what a call would give: a tensor, plain data, or the name of what was called."""
        if isinstance(function, Inert):
            return Inert(function.kind)
        name = function.name
        if name == names.GETATTR and not _is_plain_attribute(arguments):
            raise damaged("its pickle looks up something that is no attribute of an object")
        if name not in names.KNOWN:
            return Inert(name)
        if name in names.DICTS:
            return self._dict(name, arguments)
        if name == names.SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return tuple(arguments[0])
        if name == names.FROM_TYPE and len(arguments) == 4:
            rebuild, _, given, _ = arguments
            inner = isinstance(rebuild, Global) and rebuild.name in names.TENSOR_MAKERS
            if inner and isinstance(given, tuple):
                return self._result(rebuild, given)
        for table, make in ((names.TENSORS, _tensor), (names.PARAMETERS, _data_of)):
            if name in table and table[name][0] <= len(arguments) <= table[name][1]:
                return make(*arguments)
        raise damaged(f"its pickle calls {name} with arguments that PyTorch does not use")

    def _dict(self, name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        if name == "collections.OrderedDict" and arguments:
            # Python 2 wrote the items as one list of pairs.
            pairs = arguments[0]
            if not isinstance(pairs, list) or not all(
                isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
            ):
                raise damaged("its pickle makes a dictionary of something else than pairs")
            self._fill(made, pairs)
        return made

    def _new_object(self) -> None:
        kind, arguments = self._pop_some(2)
        if not (isinstance(kind, Global | Inert) and isinstance(arguments, tuple)):
            raise damaged("its pickle makes an object of something that is not a class")
        self._push(self._result(kind, arguments))

    def _new_object_of_named(self) -> None:
        if not isinstance(self._pop(), dict):
            raise damaged("its pickle makes an object with names that are not a dictionary")
        self._new_object()

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Inert) and target is not INERT and isinstance(state, dict):
            target.state = state
        settings = isinstance(target, Tensor) and isinstance(state, tuple) and len(state) == 3
        # PyTorch keeps the versions of modules beside an OrderedDict; they are not needed.
        if not (isinstance(target, Inert | dict) or settings):
            raise damaged("its pickle sets the state of something that has none")

    def _storage(self) -> None:
        """Makes the storage of `("storage", type, key, device, numel[, None])`."""
        identity = self._pop()
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise damaged("its pickle refers to something that is not a storage")
        word, kind, key, _, numel = identity[:5]
        known = isinstance(kind, Global) and kind.name in names.STORAGE_OF
        if not (word == "storage" and known and isinstance(key, str) and is_count(numel)):
            raise damaged("its pickle describes a storage in a way that PyTorch does not")
        if identity[5:] not in ((), (None,)):
            raise BadFileError(
                "it has a view of a storage, as only old versions of PyTorch saved. Load it with "
                "torch and save the state_dict() again."
            )
        storage = Storage(key, names.STORAGE_OF[kind.name], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"its pickle describes storage {shorten(key)} in two ways")
        self._push(storage)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """Makes the tensor of PyTorch's rebuilding functions; the third of `rest` may be its dtype."""
    if not isinstance(storage, Storage):
        raise damaged("its pickle makes a tensor of something that is not a storage")
    if not (is_count(offset) and are_counts(shape) and are_counts(strides)):
        raise damaged("its pickle has a tensor whose offset, sizes or strides are not counts")
    if len(shape) != len(strides):
        raise damaged("its pickle has a tensor with more sizes than strides, or fewer")
    dtype = storage.dtype
    if len(rest) > 2 and isinstance(rest[2], Global):
        if rest[2].name not in names.DTYPE_OF:
            raise damaged(f"its pickle makes a tensor of {rest[2].name}, which is not a dtype")
        dtype = names.DTYPE_OF[rest[2].name]
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _data_of(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise damaged("its pickle makes a parameter of something that is not a tensor")
    return data


def _is_plain_attribute(arguments: tuple[Any, ...]) -> bool:
    """Tells whether `getattr` is asked for a method or a nested class, as pickles need it."""
    return (
        len(arguments) == 2
        and isinstance(arguments[0], Global | Inert)
        and isinstance(arguments[1], str)
        and not names.reaches_inside(arguments[1])
    )
