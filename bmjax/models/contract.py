"""How a module is called, and what is said of one that cannot be called so."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.errors import InvalidRngError
from jax import Array

from bmjax.errors import UserError
from bmjax.models.architecture import Architecture

_COLLECTIONS = ("params", "batch_stats")
# Other names that modules have for the mode.
_MODES = ("training", "deterministic", "is_training", "use_running_average")


def parameters_of(model: Any) -> frozenset[str]:
    """Returns the names of what a module's call takes; of a wrapped NNX module, that one's."""
    kind: Any = model.nnx_class if isinstance(model, nnx.bridge.ToLinen) else type(model)
    if not isinstance(model, nn.Module):
        return frozenset()
    return frozenset(inspect.signature(kind.__call__).parameters)


def has_field(model: nn.Module, name: str) -> bool:
    """Whether a module has an attribute that can be set anew."""
    return any(field.name == name for field in dataclasses.fields(model))


def init(model: Any, key: Array, images: Array) -> dict[str, Any]:
    """Returns the initial variables, `params` and where there are some `batch_stats`.

    Args:
        model: a Linen module, or what stands for one.
        key: of the random params.
        images: [batch, height, width, channels].
    """
    if not isinstance(model, nn.Module):
        return dict(model.init(key, images))
    # The second is for NNX modules, which make their dropout together with their params.
    keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
    return dict(meta.unbox(model.init(keys, images, **_mode(model, False))))


def apply(
    model: Any,
    variables: Any,
    images: Array,
    *,
    train: bool = False,
    mask: Array | None = None,
    key: Array | None = None,
    mutable: Sequence[str] = (),
) -> Any:
    """Applies a module, as far as its call takes what is given.

    Args:
        model: a Linen module, or what stands for one.
        variables: `params` and `batch_stats`.
        images: [batch, height, width, channels], normalised.
        train: training mode.
        mask: [batch] bool, the examples that count.
        key: of what is random, such as dropout.
        mutable: collections that are returned beside the logits.

    Returns:
        The logits; with `mutable`, these and the collections.
    """
    options: dict[str, Any] = _mode(model, train)
    if mask is not None and "mask" in parameters_of(model):
        options["mask"] = mask
    if mutable:
        options["mutable"] = list(mutable)
    if key is not None:
        # The second is for streams of any other name, which Linen takes from it.
        options["rngs"] = {"dropout": key, "params": jax.random.fold_in(key, 1)}
    if "intermediates" not in mutable:
        return model.apply(variables, images, **options)
    logits, new = model.apply(variables, images, **options)
    sown = new.get("intermediates", {})
    # Linen's own sow keeps a tuple of all that it was given.
    last = {name: leaf[-1] if isinstance(leaf, tuple) else leaf for name, leaf in sown.items()}
    return logits, {**new, "intermediates": last}


def _mode(model: Any, train: bool) -> dict[str, Any]:
    return {"train": train} if "train" in parameters_of(model) else {}


def features_before(model: nn.Module, variables: Any, images: Array, head: str) -> Array:
    """Applies a module in evaluation mode up to its head.

    Args:
        model: a Linen module.
        variables: `params` and `batch_stats`.
        images: [batch, height, width, channels], normalised.
        head: path of the last layer in the params.

    Returns:
        The intermediate `pre_logits`, or where the module sows none, what the head is given:
        [batch, features].

    Raises:
        UserError: there is neither, or it is of another shape.
    """
    given: list[Array] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and "/".join(context.module.path) == head:
            given.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        _, new = apply(model, variables, images, mutable=["intermediates"])
    features = new["intermediates"].get("pre_logits", given[-1] if given else None)
    if features is None or features.ndim != 2:
        found = "" if features is None else f", but of shape {features.shape}"
        raise UserError(
            f"a linear probe needs what goes into the last layer, [batch, features]{found}: sow it "
            "as the intermediate pre_logits, name the last layer by bmjax.register_model(..., "
            "head=...), or give --head random."
        )
    return features


def check_module(
    architecture: Architecture,
    model: nn.Module,
    num_classes: int,
    image_shape: tuple[int, int, int],
    several_devices: bool = False,
) -> None:
    """Checks that a module does what training and evaluation ask of it, without computing it.

    Args:
        architecture: its record; of ours, only the shape of the images can be wrong.
        model: the module.
        num_classes: of the data.
        image_shape: height, width and channels of an image.
        several_devices: whether devices see parts of a batch by themselves (pmap).

    Raises:
        UserError: what is wrong, and how to mend it.
    """
    name, images = architecture.name, jnp.zeros((2, *image_shape))
    if architecture.own:
        _check_mode(name, model)
    try:
        variables = jax.eval_shape(lambda key: init(model, key, images), jax.random.key(0))
        if not architecture.own:
            return
        _check_variables(name, model, variables, several_devices)
        for train in (False, True):
            logits = _logits(name, model, variables, images, train)
            _check_logits(name, logits, len(images), num_classes)
    except UserError:
        raise
    # The user's code may fail in any way; ours in one.
    except Exception as error:
        if not architecture.own:
            if isinstance(error, ValueError):
                raise UserError(f"{name} cannot take these images: {error}") from error
            raise
        raise UserError(
            f"the model {name!r} cannot take images of shape {tuple(image_shape)} (height, width, "
            f"channels): {type(error).__name__}: {error}"
        ) from error


def _check_mode(name: str, model: nn.Module) -> None:
    parameters = parameters_of(model)
    other = [each for each in _MODES if each in parameters]
    if other and "train" not in parameters:
        raise UserError(
            f"the call of the model {name!r} takes {other[0]}, but it is told of training by "
            "train: True in training, False otherwise. Rename the argument to train."
        )


def _check_variables(name: str, model: nn.Module, variables: Any, several_devices: bool) -> None:
    if other := sorted(set(variables) - set(_COLLECTIONS)):
        raise UserError(
            f"the model {name!r} has variables in {other[0]!r}, but a run keeps "
            f"{' and '.join(_COLLECTIONS)} alone. Keep them in batch_stats."
        )
    leaves = jax.tree_util.tree_leaves_with_path(variables.get("params", {}))
    if not leaves:
        raise UserError(f"the model {name!r} has no params, so there is nothing to train.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"the param {where} of the model {name!r} is of type {leaf.dtype}, but params must "
                "be of a float type. Keep what is not trained in batch_stats."
            )
    if "batch_stats" not in variables:
        return
    if "train" not in parameters_of(model):
        raise UserError(
            f"the model {name!r} has batch_stats, but its call takes no train, so it cannot know "
            "when to update them. Add train: bool = False, and use_running_average=not train."
        )
    if several_devices and not has_field(model, "axis_name"):
        raise UserError(
            f"the model {name!r} has batch_stats, but no attribute axis_name: under --parallel "
            "pmap each device would have statistics of its own. Take --parallel jit, or hand "
            "axis_name on to its normalisations."
        )


def _logits(name: str, model: nn.Module, variables: Any, images: Array, train: bool) -> Any:
    key, mask = jax.random.key(0), jnp.ones(len(images), bool)

    def call(variables: Any) -> Any:
        if not train:
            return apply(model, variables, images)
        options: dict[str, Any] = {"train": True, "mask": mask, "mutable": ["batch_stats"]}
        return apply(model, variables, images, key=key, **options)[0]

    try:
        return jax.eval_shape(call, variables)
    except InvalidRngError as error:
        if train:
            raise
        cause = (
            "Give its Dropout deterministic=not train."
            if "train" in parameters_of(model)
            else "Add train: bool = False to its call, and give its Dropout deterministic=not "
            "train."
        )
        raise UserError(
            f"the model {name!r} asks for random numbers in evaluation mode too. {cause}"
        ) from error


def _check_logits(name: str, logits: Any, number: int, num_classes: int) -> None:
    shape = getattr(logits, "shape", None)
    if shape != (number, num_classes):
        found = f"of shape {shape}" if shape is not None else f"a {type(logits).__name__}"
        raise UserError(
            f"the model {name!r} gives logits {found} for {number} images of {num_classes} "
            f"classes, but they must be of shape ({number}, {num_classes})."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(
            f"the model {name!r} gives logits of type {logits.dtype}, not of a float type."
        )
