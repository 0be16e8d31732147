"""torchvision's state dicts to Flax variables and back: a table of names, strict both ways."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bmjax.errors import UserError, unknown_name
from bmjax.models import Architecture, architectures, contract, find
from bmjax.models.architecture import TorchNames
from bmjax.models.registry import list_models, make_module
from bmjax.weights.files import read_state_dict

Flat = dict[str, Any]

_COUNT = ".num_batches_tracked"
_BUFFERS = (_COUNT, ".running_mean", ".running_var")


def from_torchvision(
    source: str | Path | Mapping[str, np.ndarray],
    model: str,
    *,
    num_classes: int | None = None,
    head: bool = True,
    norm: str = "batch",
    where: str = "the state dict",
) -> dict[str, Any]:
    """Converts the weights of a torchvision model to Flax variables, strictly.

    Kernels go from [out, in, height, width] to [height, width, in, out], that of the head from
    [out, in] to [in, out]; all else keeps its form. Values are kept to the bit where they are
    float32, and converted to it otherwise. A file from before PyTorch counted the updates of its
    statistics lacks `num_batches_tracked`, which is then 0.

    Args:
        source: a file that `read_state_dict` reads, or a state dict as numpy arrays.
        model: name of the model, one that torchvision has.
        num_classes: number of logits asked for; None takes what the source has.
        head: whether the last layer is converted; without it, it may have any size or be absent,
            and the result has no `params/head`.
        norm: of the model, see `bmjax.models.ResNet`.
        where: what messages call a state dict that is no file.

    Returns:
        `{"params": ..., "batch_stats": ...}` of float32 numpy arrays.

    Raises:
        UserError: a file that cannot be read; an unknown model; or names and shapes other than
            the model's: all that is missing, unexpected or of another shape, in one message.
    """
    if isinstance(source, str | Path):
        where, source = str(source), read_state_dict(source)
    arrays = {name: np.asarray(value) for name, value in source.items()}
    architecture, names = _with_torch_names(model)
    of_head = f"{names.layer(architecture.head)}."
    if num_classes is None:
        num_classes = _num_classes(arrays.get(f"{of_head}bias"))
    if not head:
        arrays = {name: value for name, value in arrays.items() if not name.startswith(of_head)}
    expected = _wanted(architecture, num_classes, head, norm)
    problems = _differences(arrays, expected, names)
    if problems:
        fitting = _fitting(arrays, head, norm)
        hint = (
            f"It fits {' and '.join(fitting)}: give --model {fitting[0]}."
            if fitting
            else f"Check --model, and that the file is a state dict of torchvision's {model}."
        )
        raise UserError(f"{where} does not fit {model}: {'; '.join(problems)}. {hint}")
    flat = {path: _to_flax(path, leaf, arrays, names) for path, leaf in expected.items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def to_torchvision(variables: Mapping[str, Any], model: str) -> dict[str, np.ndarray]:
    """Converts Flax variables to torchvision's names and layouts.

    The inverse of `from_torchvision`, to the bit. `torchvision.models.MODEL(num_classes=N)
    .load_state_dict` takes the result with `strict=True` once its arrays are tensors, as
    `write_state_dict` writes them.

    Args:
        variables: `params` and `batch_stats`.
        model: name of the model, one that torchvision has.

    Returns:
        `{torchvision's name: array}` in torchvision's order, of the variables' types, and
        `num_batches_tracked` int64.

    Raises:
        UserError: an unknown model, or variables that are not this model's, all differences named.
    """
    architecture, names = _with_torch_names(model)
    flat = _flatten(variables)
    num_classes = _num_classes(flat.get(f"params/{architecture.head}/bias"))
    norm = "batch" if any(path.endswith("/mean") for path in flat) else "group"
    expected = _wanted(architecture, num_classes, True, norm)
    shapes = {path: tuple(leaf.shape) for path, leaf in expected.items()}
    problems = _list_differences({path: np.shape(leaf) for path, leaf in flat.items()}, shapes)
    if problems:
        raise UserError(
            f"the variables do not fit {model}: {'; '.join(problems)}. Check the model's name."
        )
    return {
        names.variable(path): _to_torch(path, flat[path])
        for path in sorted(expected, key=names.rank)
    }


def expected_arrays(model: str, num_classes: int, norm: str = "batch") -> Flat:
    """Returns shape and type of each variable of a model, by its path.

    Raises:
        UserError: torchvision has no such model.
    """
    return dict(_expected(_with_torch_names(model)[0], num_classes, norm))


def _with_torch_names(model: str) -> tuple[Architecture, TorchNames]:
    known = sorted(each.name for each in architectures() if each.torch)
    architecture = find(model) if model in list_models() else None
    if architecture is None or architecture.torch is None:
        raise unknown_name("model of torchvision", model, known)
    return architecture, architecture.torch


@cache
def _expected(architecture: Architecture, num_classes: int, norm: str) -> Flat:
    options = {"norm": norm} if "norm" in architecture.options else {}
    module = make_module(architecture, num_classes, **options)
    images = jnp.zeros((1, *architecture.image_shape))
    init = partial(contract.init, module)
    return _flatten(jax.eval_shape(init, jax.random.key(0), images))


def _fitting(arrays: Flat, head: bool, norm: str) -> list[str]:
    """Returns the names of the models whose state dict this is.

    To trace a deep model takes a second, so those are passed over of which it is known that they
    have another number of params.
    """
    fitting = []
    for each in architectures():
        if each.torch is None:
            continue
        of_head = f"{each.torch.layer(each.head)}."
        kept = {name: array for name, array in arrays.items() if not name.startswith(of_head)}
        if not _may_have_as_many(each, kept):
            continue
        num_classes = _num_classes(arrays.get(f"{of_head}bias"))
        expected = _wanted(each, num_classes, head, norm)
        if not _differences(arrays if head else kept, expected, each.torch):
            fitting.append(each.name)
    return fitting


def _may_have_as_many(architecture: Architecture, arrays: Flat) -> bool:
    """Whether the published number of params is that of these, without a head, and of a head.

    A head of 1000 classes has 1000 params for each feature, and 1000 biases.
    """
    number = sum(array.size for name, array in arrays.items() if not name.endswith(_BUFFERS))
    rests = [weights.num_params - number for weights in architecture.published]
    return not rests or any(rest > 0 and rest % 1000 == 0 for rest in rests)


def _flatten(variables: Mapping[str, Any]) -> Flat:
    kept = {name: variables[name] for name in ("params", "batch_stats") if variables.get(name)}
    return dict(traverse_util.flatten_dict(kept, sep="/"))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not path.endswith("/kernel"):
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _num_classes(bias: Any) -> int:
    """Returns the number of logits that the head's bias tells of; ImageNet's where it is absent."""
    return 1000 if bias is None else max(1, np.size(bias))


def _wanted(architecture: Architecture, num_classes: int, head: bool, norm: str) -> Flat:
    of_head = f"params/{architecture.head}/"
    expected = _expected(architecture, num_classes, norm)
    return {path: leaf for path, leaf in expected.items() if head or not path.startswith(of_head)}


def _differences(arrays: Flat, expected: Flat, names: TorchNames) -> list[str]:
    shapes = {
        names.variable(path): _torch_shape(path, tuple(leaf.shape))
        for path, leaf in expected.items()
    }
    given = {name: value.shape for name, value in arrays.items()}
    if not any(name.endswith(_COUNT) for name in given):
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(_COUNT)}
    problems = _list_differences(given, shapes)
    no_floats = [
        f"{name} ({arrays[name].dtype})"
        for name in shapes
        if name in arrays and not name.endswith(_COUNT) and not _is_float(arrays[name])
    ]
    if no_floats:
        problems.append(f"not of a float type: {', '.join(no_floats)}")
    return problems


def _is_float(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _list_differences(
    given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [
        f"{name} is {list(given[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != shape
    ]
    named = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    return [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in named if names]


def _to_flax(path: str, leaf: Any, arrays: Flat, names: TorchNames) -> np.ndarray:
    name = names.variable(path)
    if name.endswith(_COUNT):
        count = np.clip(arrays.get(name, 0), 0, np.iinfo(np.int32).max)
        return np.asarray(count, np.int32)
    array = np.asarray(arrays[name]).astype(np.float32)
    if path.endswith("/kernel"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array).reshape(leaf.shape)


def _to_torch(path: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if path.endswith("/count"):
        return array.astype(np.int64)
    if path.endswith("/kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.array(array, order="C")
