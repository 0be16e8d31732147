"""What the text of a program that is compiled for a GPU says: bytes, FLOPs, libraries, layouts.

XLA's compiler for GPUs gives no cost analysis where there is no GPU, so bytes and FLOPs are
counted here. A kernel reads its operands once and writes its results once; of an operand of which
it takes a slice or gathers rows, that much. Convolutions are calls of cuDNN, matmuls of cuBLAS, or
kernels of the compiler's own; the memory that a library works in is not in the text. The FLOPs are
those of convolutions and matmuls, a multiplication and an addition being two; padding counts, and
a call whose shapes cannot be read makes the number None. Loops within a step count once.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bmjax.bench.compiled_text import COLLECTIVES, Instruction, Line, Step, size_of

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*))?")
_LIBRARY = re.compile(r'custom_call_target="__(?:cudnn|cublas|cusolver|cub)\$')
_CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv(\w+)"')
_MATMUL = re.compile(r'custom_call_target="__cublas\$')
_GRAPH = re.compile(r"__cudnn\$fusion")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_TAKES_PART = {"dynamic-slice", "slice", "gather"}
_LAYS_OUT = {"copy", "transpose"}
_CHANGES_NOTHING = {"parameter", "bitcast", "reshape", "convert", "tuple"}
# What begins and ends apart from these computes something.
_COMPUTES = {"fusion", "custom-call", "dot", "convolution", "reduce"}


class Array(NamedTuple):
    """An array's type.

    Attributes:
        kind: such as `bf16`.
        shape: as written.
        layout: dimensions from the innermost out; empty where it is not said.
    """

    kind: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def arrays(types: str) -> list[Array]:
    """Returns all arrays of a type."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part)

    return [
        Array(kind, numbers(sides), numbers(inner)) for kind, sides, inner in _ARRAY.findall(types)
    ]


def count_on_gpu(step: Step, batch: int) -> dict[str, Any]:
    """Counts what a step does on one GPU.

    Args:
        step: of a program for GPUs.
        batch: images of a step on one GPU.

    Returns:
        `flops`, None where a call's shapes cannot be read, and `bytes_accessed`; `library_calls`;
        `convolutions`, how many by type and layout, such as `bf16 NHWC`; `fused_convolutions`, how
        many add a bias or apply ReLU as well; `transposes` and `transposed_bytes` of what is laid
        out otherwise and nothing else, and of these `transposed_activations`, whose first side is
        the batch; `float32_activations` and `float32_activation_bytes`, results of four dimensions
        whose first side is the batch, and whose shape is no kernel's; `collectives_overlapped`.
    """
    types = {line.name: line.result for line in step.lines}
    kernels = _kernel_shapes(step, types)

    def is_activation(array: Array) -> bool:
        sides = tuple(sorted(array.shape))
        return len(sides) == 4 and array.shape[0] == batch and sides not in kernels

    calls = [each for each in step.instructions if _is_library(each)]
    convolutions = [each for each in calls if _CONVOLUTION.search(each.attributes)]
    moved = [each for each in step.instructions if _only_lays_out(each, step.computations)]
    wide = [
        array
        for each in step.instructions
        for array in arrays(each.result)
        if array.kind == "f32" and is_activation(array)
    ]
    return {
        "flops": _flops(step, types),
        "bytes_accessed": sum(_bytes(each, types, step.computations) for each in step.instructions),
        "library_calls": len(calls),
        "convolutions": dict(Counter(_format(each, types) for each in convolutions)),
        "fused_convolutions": sum("BiasActivation" in each.attributes for each in convolutions)
        + sum(bool(_GRAPH.search(each.attributes)) for each in calls),
        "transposes": len(moved),
        "transposed_bytes": sum(each.bytes for each in moved),
        "transposed_activations": sum(
            any(map(is_activation, arrays(each.result))) for each in moved
        ),
        "float32_activations": len(wide),
        "float32_activation_bytes": sum(4 * array.size for array in wide),
        "collectives_overlapped": overlapped(step.lines),
    }


def overlapped(lines: Sequence[Line]) -> int:
    """Returns how many collectives have some computation between their begin and their end."""
    begun: dict[str, int] = {}
    number = computed = 0
    for line in lines:
        computed += line.kind in _COMPUTES
        if line.kind.removesuffix("-start") in COLLECTIVES and line.kind.endswith("-start"):
            begun[line.name] = computed
        elif line.kind.endswith("-done"):
            number += any(begun.get(each, computed) < computed for each in line.operands)
    return number


def _kernel_shapes(step: Step, types: Mapping[str, str]) -> set[tuple[int, ...]]:
    """Returns the sides of all kernels, in order of size: as many features may be the batch."""
    found = set()
    for each in step.instructions:
        match = _CONVOLUTION.search(each.attributes)
        if match and (roles := _roles(match[1], each, types)):
            found.add(tuple(sorted(roles[0].shape)))
    return found


def _is_library(each: Instruction) -> bool:
    return bool(_LIBRARY.search(each.attributes) or _GRAPH.search(each.attributes))


def _called(each: Instruction | Line, computations: Mapping[str, Sequence[Line]]) -> Sequence[Line]:
    match = re.search(r"calls=%([\w.\-]+)", each.attributes)
    return computations.get(match[1], ()) if match else ()


def _only_lays_out(each: Instruction, computations: Mapping[str, Sequence[Line]]) -> bool:
    if each.kind == "copy":  # within a loop's carry it is but moved, in the same layout
        return False
    if each.kind != "fusion":
        return each.kind == "transpose"
    kinds = {line.kind for line in _called(each, computations)}
    return bool(kinds & _LAYS_OUT) and kinds <= _LAYS_OUT | _CHANGES_NOTHING


def _bytes(
    each: Instruction, types: Mapping[str, str], computations: Mapping[str, Sequence[Line]]
) -> int:
    """Returns the bytes of results and operands, of operands no more than what is taken of them."""
    sizes = {name: size_of(types.get(name, "")) for name in each.operands}
    if each.kind in _TAKES_PART:
        first = each.operands[0]
        sizes[first] = min(sizes[first], size_of(each.result))
    for number, taken in _parts(_called(each, computations)).items():
        if number < len(each.operands):
            name = each.operands[number]
            sizes[name] = min(sizes[name], taken)
    return size_of(each.result) + sum(sizes.values())


def _parts(lines: Sequence[Line]) -> dict[int, int]:
    """Returns for each parameter that only parts are taken of, its number and their bytes."""
    found = {}
    for line in lines:
        if line.kind != "parameter":
            continue
        users = [other for other in lines if line.name in other.operands]
        if users and all(
            user.kind in _TAKES_PART and user.operands[0] == line.name for user in users
        ):
            found[int(line.arguments)] = sum(size_of(user.result) for user in users)
    return found


def _format(each: Instruction, types: Mapping[str, str]) -> str:
    """Returns a convolution's type and layout, such as `bf16 NHWC`."""
    kind = arrays(types.get(each.operands[0], ""))[:1]
    labels = _LABELS.search(each.attributes)
    layouts = {"b01f": "NHWC", "bf01": "NCHW"}
    layout = layouts.get(labels[1], labels[1]) if labels else "unknown"
    return f"{kind[0].kind if kind else 'unknown'} {layout}"


def _flops(step: Step, types: Mapping[str, str]) -> int | None:
    total = 0
    for each in step.instructions:
        if match := _CONVOLUTION.search(each.attributes):
            found = _convolved(match[1], each, types)
        elif _MATMUL.search(each.attributes):
            found = _multiplied(each, types)
        elif _GRAPH.search(each.attributes):
            found = None
        else:
            found = _within(_called(each, step.computations) or [_as_line(each)], types)
        if found is None:
            return None
        total += found
    return total


def _as_line(each: Instruction) -> Line:
    return Line(each.name, each.result, each.kind, each.operands, each.source, each.attributes)


def _roles(kind: str, each: Instruction, types: Mapping[str, str]) -> tuple[Array, Array] | None:
    """Returns kernel and output of the convolution that a call of cuDNN is of.

    Forward it takes images and kernel and gives the output; backward by the images it takes the
    output's gradient and the kernel; backward by the kernel, images and the output's gradient.
    """
    made = arrays(each.result)
    given = [arrays(types.get(name, ""))[:1] for name in each.operands[:2]]
    if not (made and len(given) == 2 and all(given)):
        return None
    (first,), (second,) = given
    if kind.startswith("BackwardInput"):
        return second, first
    return (made[0], second) if kind.startswith("BackwardFilter") else (second, made[0])


def _convolved(kind: str, each: Instruction, types: Mapping[str, str]) -> int | None:
    """Returns the FLOPs of a call of cuDNN, whose labels are those of the convolution forward."""
    labels, roles = _LABELS.search(each.attributes), _roles(kind, each, types)
    if not (labels and roles):
        return None
    kernel, output = roles
    return 2 * output.size * kernel.size // kernel.shape[labels[2].index("o")]


def _multiplied(each: Instruction, types: Mapping[str, str]) -> int | None:
    """Returns the FLOPs of a matmul: with M K, K N and M N elements, of b matrices each."""
    batches = re.search(r'"lhs_batch_dimensions":\[([^\]]*)\]', each.attributes)
    given = [arrays(types.get(name, ""))[:1] for name in each.operands[:2]]
    made = arrays(each.result)
    if not (made and len(given) == 2 and all(given)):
        return None
    left, right, out = given[0][0], given[1][0], made[0]
    axes = [int(part.strip('" ')) for part in batches[1].split(",") if part] if batches else []
    number = math.prod(left.shape[axis] for axis in axes)
    depth = math.isqrt(left.size * right.size // (out.size * number))
    return 2 * depth * out.size


def _within(lines: Sequence[Line], types: Mapping[str, str]) -> int:
    """Returns the FLOPs of the matmuls and convolutions of a kernel of the compiler's own."""
    inside = {**types, **{line.name: line.result for line in lines}}
    total = 0
    for line in lines:
        made = arrays(line.result)
        if line.kind == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
            left = arrays(inside.get(line.operands[0], ""))
            if axes and left:
                sides = [left[0].shape[int(axis)] for axis in axes[1].split(",") if axis]
                total += 2 * math.prod(sides) * made[0].size
        elif line.kind == "convolution":
            labels, kernel = _LABELS.search(line.attributes), arrays(inside[line.operands[1]])
            if labels and kernel:
                features = kernel[0].shape[labels[2].index("o")]
                total += 2 * made[0].size * kernel[0].size // features
    return total
