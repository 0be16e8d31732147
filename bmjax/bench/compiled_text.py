"""What XLA's text of a compiled program says of memory traffic, collectives and copies.

The text of a program that is compiled for one kind of device has each instruction's result with its
layout in that device's memory, such as `bf16[128,56,56,64]{0,3,2,1:T(8,128)(2,1)}`: the dimensions
from the innermost out, and the tiles that the innermost are filled up to. Sizes are of memory, the
filling included. Of the while loops the longest is the step, with the loops in it; where there is
none, the program is.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# Names of what is there already, and of no traffic of its own.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional"}
_TO_HOST = re.compile(r" (?:infeed|outfeed|send|recv)\(|is_host_transfer=true")


class Instruction(NamedTuple):
    """One instruction that the device carries out.

    Attributes:
        name: in the program.
        kind: its opcode, such as `fusion`.
        result: its type with layout.
        operands: names.
        source: what of the Python program it is of, JAX's `op_name`; may be empty.
        bytes: of its operands and results.
        attributes: the rest of its line, such as `kind=kLoop, calls=%fused`.
    """

    name: str
    kind: str
    result: str
    operands: tuple[str, ...]
    source: str
    bytes: int
    attributes: str = ""


class Line(NamedTuple):
    """One line of the text; see `Instruction`.

    Attributes:
        arguments: what stands in its parentheses, such as the number of a parameter.
    """

    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    source: str
    attributes: str
    arguments: str = ""


class Collective(NamedTuple):
    """One collective of a step.

    Attributes:
        kind: such as `all-reduce`.
        bytes: of its results.
        overlapped: whether it begins and ends in two instructions, with others between.
    """

    kind: str
    bytes: int
    overlapped: bool

    def sent(self, devices: int) -> float:
        """Returns the bytes that each device sends, the best that a ring or a mesh can do.

        Args:
            devices: how many take part.
        """
        others = devices - 1
        if self.kind == "all-reduce":  # once to add up, once to tell the sum
            return 2 * self.bytes * others / devices
        if self.kind == "reduce-scatter":  # the result is one part
            return float(self.bytes * others)
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * others / devices  # of a gathered or an exchanged whole all but its own


@dataclass(frozen=True)
class Step:
    """The instructions of a step.

    Attributes:
        instructions: in the order that they begin in.
        host_transfers: instructions anywhere that exchange data with the host.
        lines: all of the step's, in order, with those that cost nothing.
        computations: the lines of each computation of the program, by its name.
    """

    instructions: tuple[Instruction, ...]
    host_transfers: int
    lines: tuple[Line, ...] = ()
    computations: Mapping[str, Sequence[Line]] = field(default_factory=dict)

    @property
    def collectives(self) -> list[Collective]:
        """Those between devices."""
        found = []
        for each in self.instructions:
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                overlapped = each.kind.endswith("-start")
                found.append(Collective(kind, size_of(each.result) // (1 + overlapped), overlapped))
        return found

    @property
    def copies(self) -> int:
        """Bytes of what is copied or transposed and nothing else."""
        return sum(
            each.bytes
            for each in self.instructions
            if each.kind in ("copy", "transpose") or re.match(r"(copy|transpose)_", each.name)
        )

    def largest(self, number: int) -> list[Instruction]:
        """Returns those with the most bytes."""
        return sorted(self.instructions, key=lambda each: -each.bytes)[:number]


def size_of(types: str) -> int:
    """Returns the bytes of all arrays in a type, filled up to whole tiles."""
    return sum(_size(*match) for match in _ARRAY.findall(types))


def _size(kind: str, sides: str, layout: str, tile: str) -> int:
    lengths = [int(side) for side in sides.split(",") if side]
    if tile and layout:
        lengths = [lengths[int(axis)] for axis in layout.split(",")]
        for place, length in enumerate(reversed([int(part) for part in tile.split(",")])):
            if place < len(lengths):
                lengths[place] = -(-lengths[place] // length) * length
    digits = re.search(r"\d+", kind)
    width = _BYTES.get(kind) or (int(digits[0]) // 8 if digits else 0)
    return width * math.prod(lengths)


def read_step(text: str) -> Step:
    """Finds the step in the text of a compiled program."""
    computations = _computations(text)
    loops = [name for name in re.findall(r"body=%([\w.\-]+)", text) if name in computations]
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    names = loops or ([entry[1]] if entry else [])
    longest = max(names, key=lambda name: len(computations[name]), default=None)
    lines = list(_through_loops(longest, computations)) if longest else []
    types = {line.name: line.result for line in lines}
    instructions = [
        Instruction(
            line.name,
            line.kind,
            line.result,
            line.operands,
            line.source,
            size_of(line.result) + sum(size_of(types.get(each, "")) for each in set(line.operands)),
            line.attributes,
        )
        for line in lines
        if line.kind not in _FREE and not line.kind.endswith("-done")
    ]
    transfers = len(_TO_HOST.findall(text))
    return Step(tuple(instructions), transfers, tuple(lines), computations)


def _through_loops(name: str, computations: Mapping[str, Sequence[Line]]) -> Iterator[Line]:
    """Yields a computation's lines, after each loop those of its body: once, however often it runs.

    Loops within a step are few, such as the one that exchanges images, and mostly run once.
    """
    for line in computations[name]:
        yield line
        body = re.search(r"body=%([\w.\-]+)", line.attributes) if line.kind == "while" else None
        if body and body[1] in computations:
            yield from _through_loops(body[1], computations)


def _computations(text: str) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    lines: list[Line] = []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            lines = found.setdefault(begins[1], [])
        elif (match := _INSTRUCTION.match(line)) and (parsed := _parse(match[1], match[2])):
            lines.append(parsed)
    return found


def _parse(name: str, rest: str) -> Line | None:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not match:
        return None
    first = end + match.end()
    last = _closing(rest, first - 1)
    source = re.search(r'op_name="([^"]*)"', rest[last:])
    arguments, attributes = rest[first:last], rest[last + 1 :].lstrip(", ")
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    of = source[1] if source else ""
    return Line(name, rest[:end], match[1], operands, of, attributes, arguments)


def _closing(text: str, opening: int) -> int:
    """Returns where the parenthesis that opens there is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)
