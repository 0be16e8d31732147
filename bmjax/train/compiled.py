"""The training step, compiled into a loop over data on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.tree_util import Partial

from bmjax.data import loader
from bmjax.data.feed import ViewTargets
from bmjax.errors import UserError
from bmjax.machine.parallel import AXIS, Parallel
from bmjax.train import sharded
from bmjax.train.gradients import Batch, Gradient, Parts, whole_batch
from bmjax.train.step import LossFn, TrainState, train_step, with_average


def draw_batches(
    parallel: Parallel,
    arrays: Any,
    key: Array,
    step: Array,
    batch_size: int,
    view: Callable[[Array, Batch], Batch],
    view_passes: int | None = None,
) -> tuple[Callable[[Array], Batch], Array]:
    """Returns `draw(step)`, the batch that a step of the run is trained on.

    Args:
        parallel: the devices.
        arrays: of a `Feed`.
        key: the run's key.
        step: any of those whose batches `arrays` hold.
        batch_size: over all devices.
        view: from `loader.make_view`.
        view_passes: epochs after which order and views repeat; None: they never do.

    Returns:
        `draw`, and whether `step` is the first of an epoch.
    """
    num_examples = len(arrays["label"])  # of a window, batches
    num_batches = arrays.get("num_batches", loader.num_batches(num_examples, batch_size))
    order_key, view_key, _ = jax.random.split(key, 3)
    epoch = step // num_batches
    if "first" in arrays:  # a window, which is in order
        first, order = arrays["first"], None
    else:
        first = epoch * num_batches
        number = epoch % view_passes if view_passes else epoch
        order = loader.epoch_order(order_key, number, num_examples, batch_size)
    period = view_passes * num_batches if view_passes else None

    def draw(step: Array) -> Batch:
        batch = loader.take_batch(parallel, arrays, order, step - first, batch_size)
        number = step % period if period is not None else step
        return view(jax.random.fold_in(view_key, number), parallel.divide(batch))

    return draw, step == epoch * num_batches


def make_train_steps(
    parallel: Parallel,
    make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    batch_size: int,
    gradient: Gradient = whole_batch,
    ema_decay: float = 0.0,
    trained: Any = None,
    view_passes: int | None = None,
    own_statistics: bool = False,
    outline: TrainState | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles training over data that lies on the device.

    Args:
        parallel: the devices.
        make_optimizer: returns the optimizer for a schedule of the learning rate.
        batch_size: over all devices.
        gradient: see `train_step`.
        ema_decay: see `train_step`.
        trained: see `train_step`.
        view_passes: epochs after which order and views repeat; None: they never do.
        own_statistics: whether batch statistics are of each device's own part, see `Parts`.
        outline: shapes and types of the state, where the devices divide it, see `sharded`.

    Returns:
        `steps(state, totals, (view, loss_fn, schedule), arrays, until) -> (state, totals)`, which
        goes on to step `until` of the run, at most to the end of the epoch or of the window that
        `arrays` holds (see `Feed`), as one compiled call for any number of steps. `view`,
        from `loader.make_view`, `loss_fn` and `schedule` are `Partial`s, so that the numbers that
        they depend on are inputs; `totals` come from `zero_totals`, begin
        anew with each epoch, and grow by the step's sums. State and totals are donated. Where a
        loss is not finite it stops at once, and `totals["bad_step"]` is that step's number,
        otherwise -1; so it is where the last update of the call left params that are not finite.
    """
    axis_name = parallel.axis_name
    mesh = None if axis_name else parallel.mesh
    parts = Parts(AXIS if axis_name else parallel.axes, mesh) if own_statistics else None
    layout = None
    if parallel.divides_state:
        assert outline is not None
        layout = (sharded.state_layout(parallel, outline), parallel.everywhere)
        # Where each device does its part, params are gathered as they come to it, all at once.
        if parallel.shard_params > 1 and parts is None:
            gradient = sharded.gathering(parallel, gradient)

    def steps(
        state: TrainState,
        totals: dict[str, Array],
        functions: tuple[Partial, Partial, Partial],
        arrays: Any,
        until: Array,
    ) -> tuple[TrainState, dict[str, Array]]:
        view, loss_fn, schedule = functions
        optimizer = make_optimizer(schedule)
        if parallel.divides_state:
            optimizer = sharded.divided_optimizer(parallel, optimizer)
        draw, begins = draw_batches(
            parallel, arrays, state.key, state.step, batch_size, view, view_passes
        )
        # Begun anew here, as copying zeros to the device takes longer than some whole steps.
        totals = {
            name: jnp.where(begins, -1 if name == "bad_step" else 0, total).astype(total.dtype)
            for name, total in totals.items()
        }

        def unfinished(carry: Any) -> Array:
            state, totals = carry
            return (state.step < until) & (totals["bad_step"] < 0)

        def one_step(carry: Any) -> Any:
            state, totals = carry
            batch = draw(state.step)
            new, sums = train_step(
                state, batch, loss_fn, optimizer, gradient, ema_decay, axis_name, trained, parts
            )
            bad = jnp.where(jnp.isfinite(sums["loss"]), -1, state.step)
            totals = {
                name: bad if name == "bad_step" else totals[name] + sums[name] for name in totals
            }
            return sharded.constrained(parallel, new) if parallel.divides_state else new, totals

        state, totals = lax.while_loop(unfinished, one_step, (state, totals))
        # The losses are those before the updates: the last update is judged by its params.
        sound = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)])
        )
        broken = (totals["bad_step"] < 0) & ~sound
        totals["bad_step"] = jnp.where(broken, state.step - 1, totals["bad_step"])
        return state, totals

    return parallel.compile(steps, held=4, donated=(0, 1), layout=layout)


def zero_totals(
    loss_fn: LossFn,
    state: TrainState,
    image_shape: tuple[int, int, int],
    view_targets: ViewTargets | None = None,
) -> dict[str, Array]:
    """Returns the totals before the first example, with a name for each metric of the loss.

    Of `state` it takes shapes and types alone.
    """
    batch = outline_of_batch(image_shape, 1, view_targets)
    # Batch statistics add up along the devices' axis, which has to be there.

    def of_batch(state: TrainState, batch: Batch) -> Any:
        averaged = with_average(loss_fn, state)
        return averaged(state.params, state.batch_stats, batch, state.key)

    on_one = jax.vmap(of_batch, (None, None), axis_name=AXIS, axis_size=1)
    metrics = _metrics_of(jax.eval_shape(on_one, state, batch))
    totals = {name: jnp.zeros(()) for name in ("count", "loss", *metrics)}
    return {**totals, "bad_step": jnp.full((), -1, jnp.int32)}


def outline_of_batch(
    image_shape: tuple[int, int, int],
    size: int,
    view_targets: ViewTargets | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of what a loss function is given of so many examples."""
    rows = view_targets.rows(0, 1) if view_targets else {}
    beside = {name: ((size, *row.shape[1:]), row.dtype) for name, row in rows.items()}
    shapes = {
        **beside,
        "image": ((size, *image_shape), jnp.float32),
        "label": ((size,), jnp.int32),
        "mask": ((size,), jnp.bool_),
        "position": ((size,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*of_leaf) for name, of_leaf in shapes.items()}


def _metrics_of(result: Any) -> dict[str, Any]:
    """Returns the metrics of what a loss function gave for one example on one device.

    Raises:
        UserError: the loss function does not keep to `step.LossFn`.
    """
    match result:
        case (loss, (_, dict() as metrics)):
            pass
        case _:
            raise UserError(
                "the loss function must return (loss, (batch_stats, metrics)), with metrics as a "
                "dict, such as (loss, (batch_stats, {}))."
            )
    for name, value in {"loss": loss, **metrics}.items():
        shape = getattr(value, "shape", (None,))[1:]
        if shape != (1,):
            raise UserError(
                f"the loss function gives {name!r} of shape {shape} for 1 example, but it must "
                "give one number for each: [batch]. The mean is taken afterwards."
            )
    if taken := {"count", "loss", "bad_step"} & metrics.keys():
        raise UserError(
            f"the loss function has a metric called {', '.join(sorted(taken))}, a name that is "
            "taken. Choose another."
        )
    return metrics
