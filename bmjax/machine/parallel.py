"""Running one pure function on several devices: by jit over a mesh, or by pmap.

The batch is divided; all else is held by every device, but for large data, and for those parts of
a state that are to be divided under jit. There the function sees the whole batch and the compiler
divides the work, over the devices of several processes too; under pmap it sees its device's part
and adds up by `axis_name`.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bmjax.config import DeviceConfig
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.exchange import take_divided
from bmjax.machine.jit import jit_for
from bmjax.machine.layout import layout_of
from bmjax.machine.precision import in_precision
from bmjax.ops.target import traced_for

AXIS = "devices"
# Where params are divided, the second axis of the mesh: of the devices that share them.
SHARDS = "shards"


class Parallel:
    """Devices, and how a function is compiled for them.

    Attributes:
        devices: those that are used.
        axis_name: what a function adds up along; None under jit, where there is no need.
        precision: of the products in all that is compiled for them, see `in_precision`.
        mesh: of the devices.
        everywhere: how what every device holds lies on them, under jit.
        divided: how a batch lies on them, and what `put_divided` gives.
        axes: of the mesh, over all of which a batch is divided.
        shard_state: whether each device keeps a part of the optimizer's state; under jit.
        shard_params: over how many devices params are divided, 1: each has all; under jit.
    """

    def __init__(
        self,
        kind: str,
        devices: Sequence[jax.Device],
        precision: str = "float32",
        shard_state: bool = False,
        shard_params: int = 1,
    ):
        self.devices, self.precision = list(devices), precision
        self.axis_name = AXIS if kind == "pmap" else None
        self.shard_state, self.shard_params = shard_state, shard_params
        self.axes = (AXIS,) if shard_params == 1 else (AXIS, SHARDS)
        grid = np.array(self.devices)
        grid = grid if shard_params == 1 else grid.reshape(-1, shard_params)
        self.mesh = mesh = Mesh(grid, self.axes, axis_types=(AxisType.Auto,) * len(self.axes))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.divided = NamedSharding(mesh, PartitionSpec(self.axes))
        self._own = [device for device in self.devices if device in jax.local_devices()]

    @property
    def folds_images(self) -> bool:
        """Whether images lie in the memory of these devices as folded `rows.Rows`."""
        return self.devices[0].platform == "tpu"

    @property
    def windows(self) -> NamedSharding:
        """How arrays [batches, batch, ...] from `put_windows` lie on the devices under jit."""
        return NamedSharding(self.mesh, PartitionSpec(None, self.axes))

    @property
    def divides_state(self) -> bool:
        """Whether some of a state does not lie on every device."""
        return self.shard_state or self.shard_params > 1

    def params_layout(self, params: Any) -> Any:
        """Returns a sharding for each of the params, or of what is as large as they are."""
        return layout_of(params, self.mesh, (SHARDS,) if self.shard_params > 1 else ())

    def optimizer_layout(self, tree: Any) -> Any:
        """Returns a sharding for each array of an optimizer's state, or of an average of params."""
        return (
            layout_of(tree, self.mesh, self.axes) if self.shard_state else self.params_layout(tree)
        )

    def put(self, tree: Any) -> Any:
        """Copies a tree of arrays to every device; the copies are never the originals.

        Where there are several processes, each has to give the same tree.
        """
        # device_put may hand out the memory of its source, and a call that is donated the result
        # would destroy both; may_alias=False does not help where there are several devices.
        return self.put_data(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree))

    def put_data(self, tree: Any) -> Any:
        """Gives a tree of arrays to every device, without a copy where the device can do without.

        On a CPU the result may be the memory of the originals: they must not change afterwards, and
        no call may be donated the result. `arrays.empty_images` makes such memory.

        Where there are several processes, each has to give the same tree.
        """
        if self.axis_name:
            return jax.tree.map(self._put_stacked, tree)
        if len(self._own) < len(self.devices):
            copies = [jax.device_put(tree, device) for device in self._own]
            return jax.tree.map(self._replicate, *copies)
        return jax.device_put(tree, self.everywhere)

    def put_by(self, tree: Any, layout: Any) -> Any:
        """Copies a tree of arrays to the devices, under jit; the copies are never the originals.

        Where there are several processes, each has to give the same tree.

        Args:
            tree: of arrays.
            layout: a sharding for each.
        """

        def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
            if sharding.is_fully_replicated:
                whole: jax.Array = self.put(leaf)
                return whole
            array = np.array(leaf, copy=True)
            return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

        return jax.tree.map(put, tree, layout)

    def _put_stacked(self, leaf: Any) -> jax.Array:
        parts = [jax.device_put(leaf[None], device) for device in self._own]
        shape = (len(parts), *leaf.shape)
        return jax.make_array_from_single_device_arrays(shape, self.divided, parts)

    def _replicate(self, *copies: jax.Array) -> jax.Array:
        shape = copies[0].shape
        return jax.make_array_from_single_device_arrays(shape, self.everywhere, list(copies))

    def _stack(self, *copies: jax.Array) -> jax.Array:
        shape = (len(copies), *copies[0].shape)
        parts = [jnp.expand_dims(copy, 0) for copy in copies]
        return jax.make_array_from_single_device_arrays(shape, self.divided, parts)

    def put_windows(self, tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Divides batches over the devices, as each example is needed by one of them alone.

        Args:
            tree: arrays [batches, batch, ...], of several processes this one's part of the batch
                (see `hosts.share`).

        Returns:
            Arrays for `loader.take_batch`: [batches, batch, ...], divided along the batch.
        """

        def put(leaf: np.ndarray) -> jax.Array:
            size = leaf.shape[1] // len(self._own)
            parts = [
                jax.device_put(leaf[:, number * size : (number + 1) * size], device)
                for number, device in enumerate(self._own)
            ]
            if self.axis_name:
                return self._stack(*parts)
            shape = (len(leaf), size * len(self.devices), *leaf.shape[2:])
            return jax.make_array_from_single_device_arrays(shape, self.windows, parts)

        return jax.tree.map(put, tree)

    def put_divided(self, tree: Any) -> Any:
        """Divides arrays [examples, ...] over the devices, in order, filled up with zeros.

        Where the devices are those of a CPU a part may be the memory of the original, as in
        `put_data`. Where there are several processes, each has to give the same tree.

        Returns:
            Arrays for `take`.
        """

        def put(leaf: np.ndarray) -> jax.Array:
            size = -(-len(leaf) // len(self.devices))
            parts = []
            for number, device in enumerate(self.devices):
                if device in self._own:
                    part = leaf[number * size : (number + 1) * size]
                    missing = size - len(part)
                    filled = np.pad(part, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)))
                    parts.append(jax.device_put(filled if missing else part, device))
            if self.axis_name:
                return self._stack(*parts)
            shape = (size * len(self.devices), *leaf.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self.divided, parts)

        return jax.tree.map(put, tree)

    def take(self, values: jax.Array, rows: jax.Array) -> jax.Array:
        """Inside a compiled function: takes a batch out of what `put_divided` gave.

        Each device sends each other one those rows that it holds, see `exchange`.

        Args:
            values: [examples, ...]; under pmap this device's part.
            rows: [batch], of the whole batch, the same on all devices.

        Returns:
            [batch, ...], divided as a batch is; under pmap this device's part.
        """
        take = partial(take_divided, axes=self.axes)
        if self.axis_name:
            return take(values, rows)
        divided, whole = PartitionSpec(self.axes), PartitionSpec()
        given = (divided, whole)
        taken: jax.Array = jax.shard_map(
            take, mesh=self.mesh, in_specs=given, out_specs=divided, check_vma=False
        )(values, rows)
        return taken

    def get(self, tree: Any) -> Any:
        """Copies a tree back to the host, as numpy arrays that nothing else can change.

        A typed PRNG key becomes its raw data. Arrays that are divided become whole; where several
        processes divide them, each has to call this.
        """

        def to_host(leaf: jax.Array) -> np.ndarray:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            if not (self.axis_name or leaf.is_fully_replicated):
                if leaf.is_fully_addressable:
                    return np.array(leaf, copy=True)
                return np.array(multihost_utils.process_allgather(leaf, tiled=True))
            shard = leaf.addressable_shards[0].data
            return np.array(shard[0] if self.axis_name else shard, copy=True)

        return jax.tree.map(to_host, tree)

    def divide(self, batch: Any) -> Any:
        """Inside a function under jit: divides a batch over the devices. Under pmap it is."""
        if self.axis_name or len(self.devices) == 1:
            return batch
        return jax.lax.with_sharding_constraint(batch, self.divided)

    def compile(
        self,
        function: Callable[..., Any],
        held: int,
        donated: Sequence[int] = (),
        layout: Any = None,
    ) -> Callable[..., Any]:
        """Compiles a pure function.

        Args:
            function: its first `held` arguments are trees from `put`, any others host scalars.
            held: number of those.
            donated: which of them the call may overwrite.
            layout: a sharding for each result, under jit; None: every device holds all.

        Returns:
            The compiled function; its results lie as `layout` says, or as those of `put`.
        """
        if self.axis_name is None:
            return jit_for(
                self.devices[0],
                function,
                self.precision,
                donate_argnums=donated,
                out_shardings=self.everywhere if layout is None else layout,
            )
        function = in_precision(function, self.precision)
        function = traced_for(function, self.devices[0].platform)
        compiled: dict[int, Callable[..., Any]] = {}

        def call(*arguments: Any) -> Any:
            number = len(arguments)
            if number not in compiled:
                compiled[number] = jax.pmap(
                    function,
                    axis_name=AXIS,
                    in_axes=(0,) * held + (None,) * (number - held),
                    donate_argnums=donated,
                    devices=self.devices,
                )
            return compiled[number](*arguments)

        return call

    def compile_ahead(
        self, compiled: Callable[..., Any], held: Sequence[Any], *scalars: Any
    ) -> None:
        """Has a function from `compile` compiled for arguments that need not be there yet.

        Under jit; the first call under pmap compiles as ever.

        Args:
            compiled: the function.
            held: its arguments that will come from `put`: trees of arrays, or of what has their
                `shape` and `dtype`; a `jax.ShapeDtypeStruct` may say by its sharding that it will
                come from `put_windows`.
            scalars: the others.
        """
        if self.axis_name is None:

            def outline(leaf: Any) -> jax.ShapeDtypeStruct:
                divided = isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding
                sharding = divided or self.everywhere
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

            # A later call finds what this leaves in JAX's own caches.
            compiled.lower(*jax.tree.map(outline, tuple(held)), *scalars).compile()  # type: ignore[attr-defined]


def request_devices(config: DeviceConfig) -> None:
    """Joins other processes and makes virtual CPU devices where the config asks for them.

    To be called before all else that JAX does.

    Raises:
        UserError: see `hosts.join`.
    """
    if config.devices is not None and config.devices > 1:
        # Where JAX runs already, it has the devices that it has; make_parallel judges their number.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", config.devices)
    hosts.join(config)


def make_parallel(config: DeviceConfig, precision: str = "float32") -> Parallel:
    """Returns the devices that the config asks for: of each process as many.

    Args:
        config: which devices, and how they share a batch.
        precision: of the products in all that is compiled for them, see `in_precision`.

    Raises:
        UserError: there are fewer.
    """
    available = jax.local_devices()
    number = config.devices or len(available)
    if number > len(available):
        raise UserError(
            f"--devices {number} asks for more than the {len(available)} "
            f"{available[0].platform} device(s) there are. Lower it, or leave it out to use all."
        )
    processes = range(jax.process_count())
    # In order of the processes, each of which reads its own part of a batch.
    devices = [d for index in processes for d in jax.local_devices(index)[:number]]
    if len(devices) < number * len(processes):
        raise UserError(
            f"another process has fewer than the {number} device(s) of this one. Give all the same "
            "--devices."
        )
    _check_shards(config, len(devices))
    return Parallel(config.parallel, devices, precision, config.shard_state, config.shard_params)


def _check_shards(config: DeviceConfig, number: int) -> None:
    flag = "--shard-state" if config.shard_state else f"--shard-params {config.shard_params}"
    if config.parallel == "pmap" and (config.shard_state or config.shard_params > 1):
        raise UserError(
            f"{flag} divides what under --parallel pmap each device holds. Leave one of them out."
        )
    if number % config.shard_params:
        raise UserError(
            f"--shard-params {config.shard_params} does not divide the {number} device(s). Choose "
            "a divisor of their number."
        )


def check_divides(parallel: Parallel, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError where a batch does not divide over the devices, each part of it too."""
    number = len(parallel.devices)
    if batch_size % (number * accumulate):
        parts = f"{number} device(s)" + (f" times {accumulate} parts" if accumulate > 1 else "")
        raise UserError(
            f"--batch-size {batch_size} does not divide over {parts}. Choose a multiple of "
            f"{number * accumulate}, or other --devices."
        )
