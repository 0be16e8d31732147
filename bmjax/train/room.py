"""Whether a run fits into the memory of a device, said before anything is compiled."""

import math
from typing import Any

import jax
from jax.tree_util import Partial

from bmjax.data.feed import shapes_of_train
from bmjax.data.preprocess import Normalization
from bmjax.data.rows import Rows
from bmjax.errors import UserError
from bmjax.machine.layout import bytes_of
from bmjax.machine.parallel import Parallel
from bmjax.train import sharded
from bmjax.train.compiled import outline_of_batch
from bmjax.train.optim import merge, select
from bmjax.train.programs import TrainingPrograms
from bmjax.train.step import TrainState, with_average

# What JAX keeps of the forward pass for the backward one is more than what the compilers do: of
# ResNets, those of TPUs and GPUs took between 0.60 and 0.65 of it as temporaries.
_KEPT_OF_ACTIVATIONS = 0.55
# A network that keeps more than so many times its images as float32 is not known: ResNet-152 keeps
# 200 times. Where even that would fit, nothing is counted, which takes seconds.
_MOST_TIMES_IMAGES = 1000
_GIB = 2**30


def least_memory(
    parallel: Parallel,
    state: TrainState,
    loss_fn: Partial,
    arrays: Any,
    batch: dict[str, Any],
    room: int,
    trained: Any = None,
) -> dict[str, float]:
    """Returns the least bytes that a training step takes of each device, by kind.

    Args:
        parallel: the devices.
        state: its shapes and types.
        loss_fn: of the run; see `step.LossFn`.
        arrays: shapes and types of the data on the device.
        batch: of what a step is trained on, for one device.
        room: bytes of a device; of what cannot fill it, activations are not counted.
        trained: see `train_step`.
    """
    layout = sharded.state_layout(parallel, state)
    moving = state.params if trained is None else select(state.params, trained)
    found: dict[str, float] = {
        "params": bytes_of(state.params, layout.params),
        "the optimizer's state": bytes_of(state.opt_state, layout.opt_state),
        "gradients": bytes_of(moving, parallel.params_layout(moving)),
        "images": _bytes_of_data(arrays),
    }
    if state.ema_params is not None:
        found["averaged params"] = bytes_of(state.ema_params, layout.ema_params)
    images = 4 * math.prod(batch["image"].shape)
    if sum(found.values()) + _MOST_TIMES_IMAGES * images > room:
        kept = _bytes_kept(loss_fn, state, batch, moving, trained)
        found["activations"] = _KEPT_OF_ACTIVATIONS * kept
    return found


def _bytes_of_data(arrays: Any) -> int:
    image = arrays["image"]
    values = image.values if isinstance(image, Rows) else image
    sharding = getattr(values, "sharding", None)
    shape = values.shape if sharding is None else sharding.shard_shape(values.shape)
    return math.prod(shape)


def _bytes_kept(
    loss_fn: Partial, state: TrainState, batch: dict[str, Any], moving: Any, trained: Any
) -> int:
    """Returns the bytes of what JAX keeps of a batch between forward and backward pass."""
    loss, (size,) = with_average(loss_fn, state), batch["label"].shape

    def kept(moving: Any, params: Any, batch_stats: Any, batch: Any, key: Any) -> Any:
        def summed(moving: Any) -> Any:
            whole = moving if trained is None else merge(moving, params)
            return loss(whole, batch_stats, batch, key)[0].sum()

        return jax.vjp(summed, moving)[1]

    shapes = jax.eval_shape(kept, moving, state.params, state.batch_stats, batch, state.key)
    of_batch = [leaf for leaf in jax.tree.leaves(shapes) if leaf.shape[:1] == (size,)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in of_batch)


def check_room(needed: dict[str, float], room: int, device: str) -> None:
    """Raises UserError where a step needs more memory than a device has.

    Args:
        needed: bytes by kind, see `least_memory`.
        room: bytes of a device.
        device: what it is called.
    """
    if sum(needed.values()) <= room:
        return
    parts = ", ".join(f"{name} {value / _GIB:.2g}" for name, value in needed.items() if value)
    largest = max(needed, key=lambda name: needed[name])
    raise UserError(
        f"training needs at least {sum(needed.values()) / _GIB:.3g} GiB of each device ({parts}), "
        f"but {device} has {room / _GIB:.3g} GiB. {_REMEDIES[largest]}"
    )


_REMEDIES = {
    "activations": "A smaller --batch-size, --accumulate, --remat, --precision bfloat16 or more "
    "devices help.",
    "images": "A smaller --memory-gib has them read while it trains; a smaller --image-size or "
    "more devices help, too.",
    **dict.fromkeys(
        ("params", "gradients", "averaged params"),
        "With more devices, --shard-params and --shard-state divide them; a smaller --model helps.",
    ),
    "the optimizer's state": "With more devices, --shard-state divides it; --optimizer sgd has "
    "half of that of adamw.",
}


def check_fits(programs: TrainingPrograms, view_targets: Any = None) -> None:
    """Raises UserError where a run cannot fit into the memory of its devices, if that is known.

    Args:
        programs: of the run.
        view_targets: what belongs to the batches beside images and labels.
    """
    parallel, phase = programs.parallel, programs.phases[-1]
    device = parallel.devices[0]
    room = _room_of(device)
    if not room:
        return
    config, spec = programs.config, programs.spec
    _, loss_fn, _ = programs.functions(phase, Normalization.none(spec.image_shape[2]))
    size = config.batch_size // config.accumulate // len(parallel.devices)
    arrays = shapes_of_train(spec, config.batch_size, parallel)
    batch = outline_of_batch(spec.image_shape, size, view_targets)
    needed = least_memory(parallel, phase.outline, loss_fn, arrays, batch, room, phase.trained)
    check_room(needed, room, device.device_kind)


def _room_of(device: jax.Device) -> int:
    """Returns the bytes that a device has for arrays; 0: it is a CPU, or does not say."""
    if device.platform == "cpu":
        return 0
    return int((device.memory_stats() or {}).get("bytes_limit", 0))
