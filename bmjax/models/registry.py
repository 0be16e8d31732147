"""The table of all models: ours, those of installed packages, and the user's own."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import flax.linen as nn

from bmjax.errors import UserError, unknown_name
from bmjax.models import cifar_resnet, cnn, mlp, resnet
from bmjax.models.architecture import Architecture, TorchNames
from bmjax.ops.memory import share_memory

_FAMILIES = (mlp, cnn, resnet, cifar_resnet)
_TABLE = {each.name: each for family in _FAMILIES for each in family.ARCHITECTURES}
# Packages announce models under it: the name of the model, and what makes it.
ENTRY_POINTS = "bmjax.models"
# What a run's settings can ask of a model.
OPTIONS = ("dtype", "hidden_sizes", "norm", "remat")


class UnknownModelError(UserError):
    """No model of that name is known."""


def architectures() -> list[Architecture]:
    """Returns the records of all models that are known, without loading any package."""
    return list(_TABLE.values())


def list_models() -> list[str]:
    """Returns the names that `create_model` takes, in alphabetical order."""
    return sorted({*_TABLE, *(point.name for point in _entry_points())})


def find(name: str) -> Architecture:
    """Returns the record of the model `name`; of an installed package, it is loaded.

    Raises:
        UnknownModelError: there is none; the nearest names are given.
        UserError: the package that announces it cannot be loaded.
    """
    if name not in _TABLE:
        for point in _entry_points():
            if point.name == name:
                _load(point)
                return _TABLE[name]
        raise UnknownModelError(
            f"{unknown_name('model', name, list_models())} A model of your own is known once it "
            "is registered: name the file that calls bmjax.register_model by --import FILE."
        )
    return _TABLE[name]


def _entry_points() -> metadata.EntryPoints:
    return metadata.entry_points(group=ENTRY_POINTS)


def _load(point: metadata.EntryPoint) -> None:
    """Loads what a package announces: what makes a model, or a module that registers it."""
    try:
        made = point.load()
        if point.name not in _TABLE and not inspect.ismodule(made):
            register_model(point.name, made)
    # The package is not ours: it may fail in any way.
    except Exception as error:
        raise UserError(
            f"the model {point.name!r} of an installed package cannot be loaded from {point.value} "
            f"({type(error).__name__}: {error}). Mend or remove that package."
        ) from error
    if point.name not in _TABLE:
        raise UserError(
            f"{point.value} of an installed package announces the model {point.name!r}, but does "
            "not register it. Mend or remove that package."
        )


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Returns the Linen module `name`.

    A model that convolves has this process share its memory, see `bmjax.ops.memory.share_memory`:
    call this before JAX computes anything.

    Every model maps images [batch, height, width, channels] to float32 logits
    [batch, num_classes], and takes `train=True` for training mode and `mask` [batch] for the
    examples that count in the statistics of a batch; a registered one may take neither.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits, at least 1.
        **options: attributes of the module: `dtype` (of the computation), `hidden_sizes` of mlp,
            `features` of cnn, `norm` and `remat` of ResNets.

    Raises:
        UserError: an unknown name, the nearest ones named, or an option it does not have.
    """
    return make_module(find(name), num_classes, **options)


def make_module(architecture: Architecture, num_classes: int, **options: Any) -> nn.Module:
    """Returns the Linen module of a record; see `create_model`."""
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, but it must be at least 1.")
    name = architecture.name
    try:
        inspect.signature(architecture.make).bind(num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take these options: {error}.") from error
    if architecture.shares_memory:
        share_memory()
    model = architecture.make(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"what makes the model {name!r} gives a {type(model).__name__}, but it must give a "
            "flax.linen.Module. Wrap an NNX module by flax.nnx.bridge.ToLinen."
        )
    return model


def register_model(
    name: str,
    make: Callable[..., nn.Module],
    *,
    stages: Mapping[str, str] | None = None,
    head: str = "head",
    options: Sequence[str] | None = None,
    torch: TorchNames | None = None,
    image_shape: tuple[int, int, int] = (224, 224, 3),
    epochs: int = 20,
) -> None:
    r"""Makes a module of one's own known by name, as ours are.

    A module maps images [batch, height, width, channels] to logits [batch, num_classes]. One with
    dropout or batch statistics takes `train`, True in training; one that takes `mask` [batch]
    is given the examples that count. It may hold `params` of any names, of float types, and
    `batch_stats`. Random numbers come as `rngs={"dropout": ...}`. Attributes `axis_name` and
    `frozen_layers` are set where there are such: under pmap, for batch statistics over all
    devices; and to the paths of the layers that `--freeze` leaves nothing to train of.

    The same name may be registered again by the same code, as when a notebook's cell runs twice.

    >>> import bmjax, flax.linen as nn
    >>> class Linear(nn.Module):
    ...     num_classes: int
    ...     @nn.compact
    ...     def __call__(self, images):
    ...         return nn.Dense(self.num_classes, name="head")(images.reshape(len(images), -1))
    >>> bmjax.register_model("linear", Linear)
    >>> bmjax.create_model("linear", num_classes=3).num_classes
    3

    Args:
        name: what `--model`, `create_model` and a run's settings call it.
        make: the module's class, or a function: called as `make(num_classes=N, **options)`.
        stages: from the input on, names of stages and regular expressions that match the whole
            paths of their params, such as `{"stem": "stem/.*", "stage{}": r"block(\d+)/.*"}`;
            for `--freeze`, `--layer-decay` and, where the module sows intermediates of these
            names, for the distillation of features.
        head: path of the last dense layer in the params, which a linear probe replaces.
        options: those of `dtype`, `hidden_sizes`, `norm` and `remat` that `make` takes; by default
            those that its signature names.
        torch: the names that a state dict of PyTorch has for its variables.
        image_shape: height, width and channels of the images that weights without a run are for.
        epochs: passes over the training split where none are asked for.

    Raises:
        UserError: a name that is taken or cannot be one, or something that makes no module.
    """
    _check_name(name, make)
    parameters = _check_make(name, make)
    pairs = tuple((stages or {}).items())
    _check_stages(name, pairs)
    if options is None:
        options = [option for option in OPTIONS if option in parameters]
    if unknown := [option for option in options if option not in OPTIONS]:
        raise UserError(
            f"the model {name!r} has the option {unknown[0]!r}, but settings only know of "
            f"{', '.join(OPTIONS)}. Give others their values in what makes the model."
        )
    if epochs < 1:
        raise UserError(f"epochs of the model {name!r} is {epochs}, but it must be at least 1.")
    _TABLE[name] = Architecture(
        name,
        make,
        family=name,
        stages=pairs,
        head=head,
        options=tuple(options),
        torch=torch,
        image_shape=image_shape,
        epochs=epochs,
        own=True,
    )


def _check_name(name: str, make: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"{name!r} cannot be the name of a model: it may have letters, digits, and . _ + - "
            "after the first."
        )
    before = _TABLE.get(name)
    if before is not None and not (before.own and _origin(before.make) == _origin(make)):
        whose = "one of bmjax's own" if not before.own else f"made by {_origin(before.make)[0]}"
        raise UserError(f"there is a model {name!r} already, {whose}. Choose another name.")


def _origin(make: Any) -> tuple[Any, ...]:
    """Returns where code stands, which stays the same when it runs again."""
    if isinstance(make, functools.partial):
        return (*_origin(make.func), make.args, tuple(sorted(make.keywords.items())))
    if hasattr(make, "__qualname__"):
        return (f"{make.__module__}.{make.__qualname__}",)
    return (repr(make),)


def _check_make(name: str, make: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of what makes a model."""
    if isinstance(make, nn.Module) or not callable(make):
        raise UserError(
            f"the model {name!r} is given as {make!r:.60}, but needs what makes it: a class of "
            "flax.linen.Module, or a function that takes num_classes and returns one."
        )
    signature = inspect.signature(make)
    try:
        signature.bind(num_classes=2)
    except TypeError as error:
        raise UserError(
            f"what makes the model {name!r} is called as make(num_classes=N), but has the "
            f"signature {signature!s:.200} ({error}). Add num_classes, and defaults for the others."
        ) from error
    return signature.parameters


def _check_stages(name: str, stages: tuple[tuple[str, str], ...]) -> None:
    for stage, pattern in stages:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise UserError(
                f"the stage {stage!r} of the model {name!r} has {pattern!r}, which is no regular "
                f"expression ({error})."
            ) from error
        if stage.count("{}") != groups:
            raise UserError(
                f"the stage {stage!r} of the model {name!r} has {stage.count('{}')} places for "
                f"numbers, but {pattern!r} has {groups} groups. Write one (\\d+) for each {{}}."
            )


def architecture_of(model: str | nn.Module) -> Architecture:
    """Returns the record of a model, by name or by a module.

    A module that one of the table makes has that one's name, so that a run of it can be read
    again; another has the name of its class, and is known in this process alone.

    Args:
        model: a name, or a Linen module with its number of classes.

    Raises:
        UserError: an unknown name, or no Linen module.
    """
    if isinstance(model, str):
        return find(model)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the model is a {type(model).__name__}, but must be a flax.linen.Module or the name "
            "of one. Wrap an NNX module by flax.nnx.bridge.ToLinen."
        )
    kin = [each for each in _TABLE.values() if _class_of(each.make) is type(model)]
    like = next((each for each in kin if makes(each, model)), None)
    fields = {field.name for field in dataclasses.fields(type(model))}
    name = like.name if like else type(model).__name__
    first = like or (kin[0] if kin else Architecture(name, type(model), name))
    return dataclasses.replace(
        first,
        name=name,
        make=functools.partial(_same, model),
        options=tuple(option for option in OPTIONS if option in fields),
        own=True,
    )


def _same(model: nn.Module, num_classes: int, **options: Any) -> nn.Module:
    del num_classes  # it has its own
    return model.clone(**options) if options else model


def _class_of(make: Any) -> Any:
    return _class_of(make.func) if isinstance(make, functools.partial) else make


def makes(architecture: Architecture, model: nn.Module) -> bool:
    """Whether a record makes just this module, for its number of classes."""
    try:
        made = architecture.make(num_classes=getattr(model, "num_classes", None))
        return bool(made == model)
    except (TypeError, ValueError):  # attributes that cannot be compared, such as arrays
        return False
