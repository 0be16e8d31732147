"""Programs for devices that are not there, lowered: bmjax's own, and plain Linen's."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jax.tree_util import Partial

from bmjax.bench.jax_contenders import (
    DTYPES,
    bmjax_model,
    bmjax_optimizer,
    distillation_loss,
    linen_step,
    plain_model,
)
from bmjax.bench.workload import (
    NO_SCHEDULE,
    NUM_CLASSES,
    Workload,
    pixel_normalization,
)
from bmjax.config import AugmentConfig, BenchConfig
from bmjax.data import loader
from bmjax.data.feed import is_divided
from bmjax.data.rows import Rows
from bmjax.machine.jit import jit_for
from bmjax.machine.parallel import AXIS, Parallel
from bmjax.machine.precision import in_precision
from bmjax.models import contract
from bmjax.ops.target import tracing_for
from bmjax.runs.inference import make_evaluate
from bmjax.train import sharded
from bmjax.train.compiled import make_train_steps, outline_of_batch, zero_totals
from bmjax.train.room import check_room, least_memory
from bmjax.train.step import classification_loss, state_maker

# Batches of a split in memory: more than a window has, as an epoch does.
_BATCHES = 8
# Of the images of a split that is divided over the devices.
_DIVIDED_BYTES = 8 * 10**9
_VIEWS = AugmentConfig(crop=0.25, flip=0.5, shift=0.0, rotate=0.0, scale=0.0)
_NO_VIEWS = AugmentConfig(augment=False)
_VIEWS_OF_JOBS = {"random views": _VIEWS, "affine views": AugmentConfig()}

Shape = tuple[int, int, int]


class Bmjax:
    """The programs of `bmjax train`, `distill`, `evaluate` and `predict`.

    Args:
        workload: the model and its images.
        devices: that would run them.
        platform: whose lowering they take, such as `cuda`; None: that of the devices.
        config: the optimizer, and what saves memory.
        room: bytes of a device's memory; 0: it is not known.
    """

    name = "bmjax"

    def __init__(
        self,
        workload: Workload,
        devices: Sequence[jax.Device],
        platform: str | None = None,
        config: BenchConfig | None = None,
        room: int = 0,
    ):
        self._room = room
        self._platform, self._config = platform, config or BenchConfig()
        self._workload, self._shape = workload, workload.image_shape
        shards = self._config.shard_state, self._config.shard_params
        self._parallel = Parallel("jit", devices, workload.precision, *shards)
        options = {name: getattr(self._config, name) for name in ("remat", "remat_stages")}
        self._model = bmjax_model(workload.model, workload.precision, **options)
        self._normalization = pixel_normalization(workload.channels)

    def lower(self, job: str) -> Lowered:
        """Lowers one of `JOBS`."""
        if job == "evaluation":
            return self._evaluation()
        if job == "prediction":
            return self._prediction()
        return self._training(job)

    def _everywhere(self, tree: Any) -> Any:
        return _divided(tree, self._parallel.everywhere)

    def _arrays(self, job: str) -> dict[str, Any]:
        """Returns shapes and types of the data, lying on the devices as a `Feed` puts them."""
        size, parallel, shape = self._workload.batch_size, self._parallel, self._shape
        leading: tuple[int, ...] = (_BATCHES * size,)
        if job == "divided data":
            number = max(size, _DIVIDED_BYTES // math.prod(shape))
            leading = (number // len(parallel.devices) * len(parallel.devices),)
        divided = job == "divided data" or is_divided(leading[0], shape, parallel)
        over = sharding = parallel.everywhere
        names: tuple[str, ...] = ()
        if job == "streamed" or (divided and job == "evaluation"):
            leading, divided, names = (_BATCHES, size), False, ("first", "count", "num_batches")
            over = sharding = parallel.windows
        elif divided:
            over = parallel.divided
        image = Rows.outline(leading, shape, parallel.folds_images, over, divided)
        label = jax.ShapeDtypeStruct(leading, jnp.int32, sharding=sharding)
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.everywhere)
        return {"image": image, "label": label, **dict.fromkeys(names, scalar)}

    def _training(self, job: str) -> Lowered:
        workload, model, shape = self._workload, self._model, self._shape
        optimizer = bmjax_optimizer(self._config.optimizer)
        state = jax.eval_shape(state_maker(model, optimizer, shape, seed=0))
        loss_fn = Partial(classification_loss(model, self._normalization))
        if job == "distillation":
            assert workload.teacher is not None
            teacher = bmjax_model(workload.teacher, workload.precision)
            held = _variables(partial(contract.init, teacher), shape)
            loss = partial(distillation_loss, model, teacher, self._normalization)
            loss_fn = Partial(loss, held)
        views = _VIEWS_OF_JOBS.get(job, _NO_VIEWS)
        view = loader.make_view(views, shape[:2], self._normalization.mean)
        steps = make_train_steps(
            self._parallel,
            lambda _: optimizer,
            workload.batch_size,
            own_statistics=job == "device statistics",
            outline=state,
        )
        totals = zero_totals(_without_shapes(loss_fn), state, shape)
        functions = (view, loss_fn, NO_SCHEDULE)
        state = sharded.outline(self._parallel, state)
        held = map(self._everywhere, (totals, functions))
        arrays = self._arrays(job)
        self._check_room(state, _without_shapes(loss_fn), arrays)
        return _lower(steps, state, *held, arrays, np.int32(_BATCHES), platform=self._platform)

    def _check_room(self, state: Any, loss_fn: Partial, arrays: Any) -> None:
        devices = self._parallel.devices
        batch = outline_of_batch(self._shape, self._workload.batch_size // len(devices))
        if self._room:
            needed = least_memory(self._parallel, state, loss_fn, arrays, batch, self._room)
            check_room(needed, self._room, devices[0].device_kind)

    def _evaluation(self) -> Lowered:
        evaluate = make_evaluate(
            self._parallel,
            self._model,
            self._normalization,
            NUM_CLASSES,
            self._workload.batch_size,
        )
        variables = _variables(partial(contract.init, self._model), self._shape)
        arguments = self._everywhere(variables), self._arrays("evaluation")
        return _lower(evaluate, *arguments, platform=self._platform)

    def _prediction(self) -> Lowered:
        apply = partial(contract.apply, self._model)
        variables = _variables(partial(contract.init, self._model), self._shape)
        devices, precision = self._parallel.devices, self._workload.precision
        along = _shardings(devices)[1]
        compiled = jit_for(devices[0], apply, precision, out_shardings=along)
        return _lower_prediction(compiled, variables, self._workload, devices, self._platform)


class Linen:
    """The same jobs as one writes them with Linen's layers; images come normalised."""

    name = "plain Linen"

    def __init__(self, workload: Workload, devices: Sequence[jax.Device]):
        self._workload, self._shape, self._devices = workload, workload.image_shape, devices
        self._model = plain_model(workload.model, DTYPES[workload.precision])

    def lower(self, job: str) -> Lowered:
        """Lowers one of `JOBS`."""
        variables = _variables(self._model.init, self._shape)
        if job in ("evaluation", "prediction"):
            apply = in_precision(self._model.apply, self._workload.precision)
            compiled = jax.jit(apply, out_shardings=_shardings(self._devices)[1])
            return _lower_prediction(compiled, variables, self._workload, self._devices)
        teacher, held = None, None
        if job == "distillation":
            assert self._workload.teacher is not None
            teacher = plain_model(self._workload.teacher, DTYPES[self._workload.precision])
            held = _variables(teacher.init, self._shape)
        everywhere, along = _shardings(self._devices)
        step, begin = linen_step(self._model, self._workload.precision, teacher)
        state = _divided(jax.eval_shape(begin, variables), everywhere)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
        images, labels = _batch(self._workload, along)
        return compiled.lower(state, _divided(held, everywhere), images, labels)


def _variables(init: Callable[..., Any], shape: Shape) -> Any:
    return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def _without_shapes(loss_fn: Partial) -> Partial:
    """Returns the loss with zeros in place of shapes, as they are traced."""
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        ),
        loss_fn,
    )


def _divided(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _shardings(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    mesh = Mesh(np.array(devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))


def _batch(workload: Workload, along: NamedSharding) -> tuple[Any, Any]:
    number = workload.batch_size
    images = jax.ShapeDtypeStruct((number, *workload.image_shape), jnp.float32, sharding=along)
    return images, jax.ShapeDtypeStruct((number,), jnp.int32, sharding=along)


def _lower_prediction(
    compiled: Any,
    variables: Any,
    workload: Workload,
    devices: Sequence[jax.Device],
    platform: str | None = None,
) -> Lowered:
    everywhere, along = _shardings(devices)
    images = _batch(workload, along)[0]
    return _lower(compiled, _divided(variables, everywhere), images, platform=platform)


def _lower(compiled: Any, *arguments: Any, platform: str | None) -> Lowered:
    if not platform:
        own: Lowered = compiled.lower(*arguments)
        return own
    with tracing_for(platform):
        lowered: Lowered = compiled.trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered


CONTENDERS: dict[str, type[Bmjax] | type[Linen]] = {"bmjax": Bmjax, "linen": Linen}
# Kinds of training that plain Linen has no counterpart of.
OF_BMJAX_ALONE = (
    "random views",
    "affine views",
    "streamed",
    "divided data",
    "device statistics",
)
JOBS = ("training", *OF_BMJAX_ALONE, "distillation", "evaluation", "prediction")


def does(contender: str, job: str) -> bool:
    """Whether a contender does a job."""
    return contender == "bmjax" or job not in OF_BMJAX_ALONE
