"""torchvision's state dicts to Flax variables and back: a table of names, strict both ways."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bmjax.errors import UserError, listed, unknown_name
from bmjax.models import Architecture, TorchNames, architectures, contract, find
from bmjax.models.registry import list_models, make_module
from bmjax.weights.files import read_state_dict
from bmjax.weights.name_fitting import Fitted, explain, fit_names, under_one_prefix

Flat = dict[str, Any]

_COUNT = ".num_batches_tracked"
_BUFFERS = (_COUNT, ".running_mean", ".running_var")
# In one message, all its lists together.
_MAX_NAMES = 10


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
            and the result has none.
        norm: of the model, see `bmjax.models.ResNet`.
        where: what messages call a state dict that is no file.

    Prefixes of names (`module.`, `backbone.`), heads of other names, and entries that are no
    weights are seen to first, see `fit_names`.

    Returns:
        `{"params": ..., "batch_stats": ...}` of float32 numpy arrays.

    Raises:
        UserError: a file that cannot be read; an unknown model; names and shapes other than the
            model's: what is missing, unexpected or of another shape, in one message of at most
            ten names; or values that are not finite as float32.
    """
    if isinstance(source, str | Path):
        where, source = str(source), read_state_dict(source)
    architecture, names = _with_torch_names(model)
    arrays = _fit(architecture, source, head, norm, where).arrays
    if num_classes is None:
        num_classes = _num_classes(arrays, _head_name(architecture))
    expected = _wanted(architecture, num_classes, head, norm)
    if problems := _differences(arrays, expected, names):
        hint = _hint(source, arrays, architecture, head, norm, where)
        raise UserError(f"{where} does not fit {model}: {'; '.join(problems)}. {hint}")
    flat = {path: _to_flax(path, leaf, arrays, names) for path, leaf in expected.items()}
    values = {names.variable(path): array for path, array in flat.items()}
    refuse_not_finite(
        {n: arrays.get(n, a) if n.endswith(_COUNT) else a for n, a in values.items()}, where
    )
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def fit_state_dict(
    source: Mapping[str, np.ndarray],
    model: str,
    *,
    head: bool = True,
    norm: str = "batch",
    where: str = "the state dict",
) -> Fitted:
    """Brings a state dict's names to those of torchvision's `model`, see `fit_names`.

    Args:
        source: arrays by name.
        model: name of the model.
        head: whether the last layer is wanted.
        norm: of the model.
        where: what messages call the state dict.

    Raises:
        UserError: an unknown model, or one that the source holds several times.
    """
    return _fit(_with_torch_names(model)[0], source, head, norm, where)


def _fit(
    architecture: Architecture,
    source: Mapping[str, np.ndarray],
    head: bool,
    norm: str,
    where: str,
) -> Fitted:
    arrays = {name: np.asarray(value) for name, value in source.items()}
    names, head_name = _torch_names(architecture, norm), _head_name(architecture)
    return fit_names(arrays, names, head=head_name, keep_head=head, where=where)


def refuse_not_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises UserError where values are not finite; the message names the arrays."""
    broken = [
        f"{name} ({'NaN' if np.isnan(array).any() else 'infinite'})"
        for name, array in arrays.items()
        if _is_float(array) and not np.isfinite(array).all()
    ]
    if broken:
        raise UserError(
            f"{where} has values that are not finite in {len(broken)} of {len(arrays)} arrays: "
            f"{listed(broken)}. The training that made it diverged, or the file is damaged: take "
            "an earlier checkpoint."
        )


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
    bias = flat.get(f"params/{architecture.head}/bias")
    num_classes = 1000 if bias is None else max(1, np.size(bias))
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
    architecture = find(model) if model in list_models() else None
    if architecture is None or architecture.torch is None:
        known = sorted(each.name for each in architectures() if each.torch)
        raise unknown_name("model of torchvision", model, known)
    return architecture, architecture.torch


def _names_of(architecture: Architecture) -> TorchNames:
    assert architecture.torch is not None
    return architecture.torch


def _head_name(architecture: Architecture) -> str:
    return _names_of(architecture).layer(architecture.head)


@cache
def _expected(architecture: Architecture, num_classes: int, norm: str) -> Flat:
    options = {"norm": norm} if "norm" in architecture.options else {}
    module = make_module(architecture, num_classes, **options)
    images = jnp.zeros((1, *architecture.image_shape))
    return _flatten(jax.eval_shape(partial(contract.init, module), jax.random.key(0), images))


def _flatten(variables: Mapping[str, Any]) -> Flat:
    kept = {name: variables[name] for name in ("params", "batch_stats") if variables.get(name)}
    return dict(traverse_util.flatten_dict(kept, sep="/"))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not path.endswith("/kernel"):
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _num_classes(arrays: Mapping[str, np.ndarray], head: str) -> int:
    """Returns the number of logits that the head tells of; ImageNet's where it is absent."""
    weight = arrays.get(f"{head}.weight")
    return 1000 if weight is None or not weight.ndim else max(1, len(weight))


def _torch_names(architecture: Architecture, norm: str) -> list[str]:
    names = _names_of(architecture)
    return [names.variable(path) for path in _expected(architecture, 1000, norm)]


def _hint(
    source: Mapping[str, np.ndarray],
    arrays: Flat,
    architecture: Architecture,
    head: bool,
    norm: str,
    where: str,
) -> str:
    """Returns the likely cause and the remedy where a state dict does not fit.

    To trace a deep model takes a second, so those are passed over of which it is known that they
    have another number of params.
    """
    names, head_name = _torch_names(architecture, norm), _head_name(architecture)
    wanted = [name for name in names if head or not name.startswith(f"{head_name}.")]
    cause = explain(arrays, wanted, head_name)
    numbers = _numbers_without_head(arrays)
    for other in architectures() if not cause else ():
        if other is architecture or other.torch is None or not _may_have(other, numbers):
            continue
        fitted = _fit(other, source, head, norm, where).arrays
        num_classes = _num_classes(fitted, _head_name(other))
        if not _differences(fitted, _wanted(other, num_classes, head, norm), other.torch):
            return f"It fits {other.name}: give --model {other.name}."
    return (
        cause or f"Check --model, and that it is a state dict of torchvision's {architecture.name}."
    )


def _numbers_without_head(arrays: Flat) -> set[int]:
    """Returns how many params there are, if all are the backbone's or any dense layer is the head.

    Prefixes of the names may be unknown still, so no name says which.
    """
    sizes = {name: array.size for name, array in arrays.items() if not name.endswith(_BUFFERS)}
    total = sum(sizes.values())
    heads = [
        sizes[name] + sizes.get(f"{name.removesuffix('weight')}bias", 0)
        for name in sizes
        if arrays[name].ndim == 2 and name.endswith("weight")
    ]
    return {total, *(total - number for number in heads)}


def _may_have(architecture: Architecture, numbers: set[int]) -> bool:
    """Whether one of some numbers may be that of the published params, but for the head's.

    A head of 1000 classes has 1000 params for each feature, and 1000 biases.
    """
    rests = [each.num_params - number for each in architecture.published for number in numbers]
    return not architecture.published or any(rest > 0 and rest % 1000 == 0 for rest in rests)


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
    no_floats = [
        f"{name} ({arrays[name].dtype})"
        for name in shapes
        if name in arrays and not name.endswith(_COUNT) and not _is_float(arrays[name])
    ]
    return _list_differences(given, shapes, no_floats)


def _is_float(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _list_differences(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    no_floats: Sequence[str] = (),
) -> list[str]:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [
        f"{name} is {list(given[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != shape
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": wrong,
        "not of a float type": no_floats,
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    prefix = under_one_prefix(unexpected)
    all_under = {"unexpected": f", all under the prefix {prefix}" if prefix else ""}
    most = _MAX_NAMES // max(len(kinds), 1)
    return [
        f"{len(names)} {kind}{all_under.get(kind, '')}: {listed(names, most)}"
        for kind, names in kinds.items()
    ]


def _to_flax(path: str, leaf: Any, arrays: Flat, names: TorchNames) -> np.ndarray:
    name = names.variable(path)
    if name.endswith(_COUNT):
        # Averages of models hold counts as floats.
        count = np.clip(np.nan_to_num(arrays.get(name, 0)), 0, np.iinfo(np.int32).max)
        return np.asarray(count, np.int32)
    # What is too large for float32 becomes infinite, and is refused by its name.
    with np.errstate(over="ignore"):
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
