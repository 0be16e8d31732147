"""torchvision's state dicts to Flax variables and back: a table of names, strict both ways."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bmjax.errors import UserError, listed, unknown_name
from bmjax.models import RESNETS
from bmjax.weights.files import read_state_dict
from bmjax.weights.name_fitting import Fitted, explain, fit_names, under_one_prefix

Flat = dict[str, Any]

# Where a layer lies. Blocks are counted from 1 here and from 0 in torchvision, hence the group.
_PLACES = (
    (r"stem_conv", "conv1"),
    (r"stem_norm", "bn1"),
    (r"stage(\d+)_block(\d+)/conv(\d+)", "layer{0}.{1}.conv{2}"),
    (r"stage(\d+)_block(\d+)/norm(\d+)", "layer{0}.{1}.bn{2}"),
    (r"stage(\d+)_block(\d+)/downsample/conv", "layer{0}.{1}.downsample.0"),
    (r"stage(\d+)_block(\d+)/downsample/norm", "layer{0}.{1}.downsample.1"),
    (r"head", "fc"),
)
# What a layer holds.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
_HEAD = "params/head/"
_HEAD_NAME = "fc"
_COUNT = ".num_batches_tracked"
# In one message, all its lists together.
_MAX_NAMES = 10


def torchvision_name(path: str) -> str:
    """Returns torchvision's name of a variable of a ResNet.

    Args:
        path: such as `params/stage1_block1/conv1/kernel`.

    Raises:
        KeyError: no layer of a ResNet.
    """
    place, _, leaf = path.partition("/")[2].rpartition("/")
    for pattern, name in _PLACES:
        if match := re.fullmatch(pattern, place):
            numbers = [int(number) for number in match.groups()]
            if len(numbers) > 1:
                numbers[1] -= 1
            return f"{name.format(*numbers)}.{_LEAVES[leaf]}"
    raise KeyError(path)


def from_torchvision(
    source: str | Path | Mapping[str, np.ndarray],
    model: str,
    *,
    num_classes: int | None = None,
    head: bool = True,
    norm: str = "batch",
    where: str = "the state dict",
) -> dict[str, Any]:
    """Converts the weights of a torchvision ResNet to Flax variables, strictly.

    Kernels go from [out, in, height, width] to [height, width, in, out], that of the head from
    [out, in] to [in, out]; all else keeps its form. Values are kept to the bit where they are
    float32, and converted to it otherwise. A file from before PyTorch counted the updates of its
    statistics lacks `num_batches_tracked`, which is then 0.

    Args:
        source: a file that `read_state_dict` reads, or a state dict as numpy arrays.
        model: name of the ResNet, see `bmjax.list_models()`.
        num_classes: number of logits asked for; None takes what the source has.
        head: whether the last layer is converted; without it, it may have any size or be absent,
            and the result has no `params/head`.
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
    arrays = fit_state_dict(source, model, head=head, norm=norm, where=where).arrays
    if num_classes is None:
        num_classes = _num_classes(arrays)
    expected = _wanted(model, num_classes, head, norm)
    if problems := _differences(arrays, expected):
        hint = _hint(source, arrays, model, head, norm, where)
        raise UserError(f"{where} does not fit {model}: {'; '.join(problems)}. {hint}")
    flat = {path: _to_flax(path, leaf, arrays) for path, leaf in expected.items()}
    values = {torchvision_name(path): array for path, array in flat.items()}
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
        model: name of the ResNet.
        head: whether the last layer is wanted.
        norm: of the model.
        where: what messages call the state dict.

    Raises:
        UserError: an unknown model, or one that the source holds several times.
    """
    arrays = {name: np.asarray(value) for name, value in source.items()}
    names = _torch_names(model, norm)
    return fit_names(arrays, names, head=_HEAD_NAME, keep_head=head, where=where)


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
    """Converts Flax variables of a ResNet to torchvision's names and layouts.

    The inverse of `from_torchvision`, to the bit. `torchvision.models.MODEL(num_classes=N)
    .load_state_dict` takes the result with `strict=True` once its arrays are tensors, as
    `write_state_dict` writes them.

    Args:
        variables: `params` and `batch_stats`.
        model: name of the ResNet.

    Returns:
        `{torchvision's name: array}` in torchvision's order, of the variables' types, and
        `num_batches_tracked` int64.

    Raises:
        UserError: an unknown model, or variables that are not this model's, all differences named.
    """
    flat = _flatten(variables)
    num_classes = max(1, np.size(flat[_HEAD + "bias"])) if _HEAD + "bias" in flat else 1000
    norm = "batch" if any(path.endswith("/mean") for path in flat) else "group"
    expected = expected_arrays(model, num_classes, norm)
    shapes = {path: tuple(leaf.shape) for path, leaf in expected.items()}
    problems = _list_differences({path: np.shape(leaf) for path, leaf in flat.items()}, shapes)
    if problems:
        raise UserError(
            f"the variables do not fit {model}: {'; '.join(problems)}. Check the model's name."
        )
    return {torchvision_name(path): _to_torch(path, flat[path]) for path in _in_order(expected)}


def expected_arrays(model: str, num_classes: int, norm: str = "batch") -> Flat:
    """Returns shape and type of each variable of a ResNet, by its path.

    Raises:
        UserError: the model is no ResNet.
    """
    if model not in RESNETS:
        raise unknown_name("ResNet", model, sorted(RESNETS))
    return dict(_expected(model, num_classes, norm))


@cache
def _expected(model: str, num_classes: int, norm: str) -> Flat:
    module = RESNETS[model](num_classes=num_classes, norm=norm)
    images = jnp.zeros((1, 64, 64, 3))
    return _flatten(jax.eval_shape(module.init, jax.random.key(0), images))


def _flatten(variables: Mapping[str, Any]) -> Flat:
    kept = {name: variables[name] for name in ("params", "batch_stats") if variables.get(name)}
    return dict(traverse_util.flatten_dict(kept, sep="/"))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not path.endswith("/kernel"):
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _num_classes(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the number of logits that the head tells of; ImageNet's where it is absent."""
    weight = arrays.get(f"{_HEAD_NAME}.weight")
    return 1000 if weight is None or not weight.ndim else max(1, len(weight))


def _torch_names(model: str, norm: str) -> list[str]:
    return [torchvision_name(path) for path in expected_arrays(model, 1000, norm)]


def _hint(
    source: Mapping[str, np.ndarray], arrays: Flat, model: str, head: bool, norm: str, where: str
) -> str:
    """Returns the likely cause and the remedy where a state dict does not fit."""
    cause = explain(arrays, _torch_names(model, norm), _HEAD_NAME)
    for name in RESNETS if not cause else ():
        if name != model:
            fitted = fit_state_dict(source, name, head=head, norm=norm, where=where).arrays
            if not _differences(fitted, _wanted(name, _num_classes(fitted), head, norm)):
                return f"It fits {name}: give --model {name}."
    return cause or "Check --model, and that the file is a torchvision ResNet's state dict."


def _wanted(model: str, num_classes: int, head: bool, norm: str) -> Flat:
    expected = expected_arrays(model, num_classes, norm)
    return {path: leaf for path, leaf in expected.items() if head or not path.startswith(_HEAD)}


def _differences(arrays: Flat, expected: Flat) -> list[str]:
    shapes = {
        torchvision_name(path): _torch_shape(path, tuple(leaf.shape))
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


def _to_flax(path: str, leaf: Any, arrays: Flat) -> np.ndarray:
    name = torchvision_name(path)
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


def _in_order(expected: Flat) -> list[str]:
    """Orders the variables as torchvision does: layer by layer, downsample last in its block."""
    leaves = list(_LEAVES)

    def rank(path: str) -> tuple[Any, ...]:
        place, _, leaf = path.partition("/")[2].rpartition("/")
        parts = re.findall(r"stem|stage|head|downsample|conv|norm|block|\d+", place)
        order = {"stem": 0, "stage": 1, "head": 2, "block": 0, "conv": 0, "norm": 1}
        numbers = [int(part) for part in parts if part.isdigit()]
        depth = 99 if "downsample" in parts else (numbers[2] if len(numbers) > 2 else 0)
        kind = order.get("norm" if "norm" in parts else "conv", 0)
        return (order[parts[0]], *(numbers[:2] or (0, 0)), depth, kind, leaves.index(leaf))

    return sorted(expected, key=rank)
