"""Convolution, pooling and normalisation, each as fast as its backend allows."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bmjax.ops import target
from bmjax.ops.channels import normalize_by
from bmjax.ops.convolution import Pending, make_pending
from bmjax.ops.fused_convolution import convolve_normalize, finish
from bmjax.ops.normalization import normalize
from bmjax.ops.pooled_normalization import normalize_pooled
from bmjax.ops.pooling import max_pool_3x3
from bmjax.ops.precision import wider
from bmjax.ops.recomputed import Activated, Source, activate, computed, plain


class Dense(nn.Module):
    """A dense layer; params `kernel` and `bias` as those of `flax.linen.Dense`.

    The bias is added in float32, and so is its gradient summed: XLA for CPU (jax 0.10.2) sums
    bfloat16 in bfloat16, and Linen's is wrong by percents.

    Attributes:
        features: number of outputs.
        dtype: of the computation; params are float32.
    """

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps [..., inputs] to [..., features]."""
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=self.dtype)
        return _add(inputs @ kernel, bias)


def _add(values: Array, bias: Array) -> Array:
    """Adds a bias to each [features]; see `Dense`."""
    along = bias.reshape(*(1,) * (values.ndim - 1), -1)
    return (wider(values) + along).astype(values.dtype)


class Conv(nn.Module):
    """2-D convolution; params `kernel` and `bias` as those of `flax.linen.Conv`.

    A bias is added as in `Dense`.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        padding: zeros added on each side, [[top, bottom], [left, right]].
        stride: step between outputs, in both directions.
        groups: parts that input and output channels are split into, each seeing only its own.
        use_bias: whether a bias is added.
        kernel_init: initializer of the kernel.
        dtype: of the computation; params are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: Sequence[tuple[int, int]]
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        out = self._pending(images).compute()
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return _add(out, bias)

    def _pending(self, images: Array) -> Pending:
        shape = (*self.kernel_size, images.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        images, kernel = nn.dtypes.promote_dtype(images, kernel, dtype=self.dtype)
        return make_pending(images, kernel, self.padding, self.stride, self.groups)


class PendingConv(Conv):
    """A convolution without bias that the normalisation behind it computes."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, images: Array | Activated) -> Pending:  # type: ignore[override]
        """Takes [batch, height, width, channels]; gives what a `make_norm` layer takes."""
        if not isinstance(images, Activated):
            return self._pending(images)
        pending = self._pending(images.values)
        same = pending.dtype == images.values.dtype
        return pending._replace(source=images.source) if same else pending


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's conventions (Ioffe and Szegedy 2015).

    In training mode the batch's mean and biased variance normalise, and the running ones move
    by a tenth of the way to the batch's mean and its *unbiased* variance, as
    `torch.nn.BatchNorm2d(momentum=0.1)` does; Flax's own uses the biased variance there. All
    statistics are at least float32, by two passes over the values. Params `scale` and `bias`;
    `batch_stats` are `mean`, `var` and `count`, the number of updates.

    Attributes:
        frozen: the running statistics normalise in training mode too, and stay as they are.
        axis_name: under pmap, the axis of the devices that share a batch.
        dtype: of the result.
    """

    frozen: bool = False
    axis_name: str | None = None
    dtype: jnp.dtype | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        values: Array | Pending,
        train: bool = False,
        mask: Array | None = None,
        shortcut: Array | Activated | None = None,
        relu: bool = False,
        inner: bool = False,
        pool: bool = False,
    ) -> Any:
        """Normalises [batch, height, width, channels] per channel.

        Args:
            values: of any float type, or a convolution that gives them.
            train: whether the batch's own statistics are used, and the running ones moved.
            mask: [batch] bool, False for the examples that don't count; None: all count.
            shortcut: what is added to the result.
            relu: whether negative values of that become 0.
            inner: whether nothing but a convolution takes the result, or the sum at the end of a
                block.
            pool: whether it goes through `max_pool_3x3` before ReLU; without a shortcut.

        Returns:
            an array of that shape, or pooled; or, where `inner`, perhaps an `Activated`.
        """
        size = (values.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), size)
        bias = self.param("bias", nn.initializers.zeros_init(), size)
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if not train or self.frozen:
            factor = lax.rsqrt(var.value + self.epsilon) * scale
            affine = mean.value, factor, bias
            last = relu and not pool
            if isinstance(values, Pending) and self.dtype in (None, values.dtype):
                out = convolve_normalize(values, *affine, _bare(shortcut), last)
            else:
                out = normalize_by(computed(values), *affine, self.dtype)
                out = finish(out, _bare(shortcut), last)
            return _pooled(out, relu) if pool else out
        axis_name = None if self.is_initializing() else self.axis_name
        same = self.dtype in (None, values.dtype)
        # On a TPU; where each device sees its own part alone, sums are taken otherwise.
        pools_first = pool and same and axis_name is None and target.platform() == "tpu"
        if pools_first and isinstance(values, Pending):
            out, of_batch, number = normalize_pooled(
                values, scale, bias, mask, self.epsilon, mean.value
            )
        else:
            values = computed(values)
            given = values if same else wider(values)
            out, of_batch, number = normalize(
                given, scale, bias, mask, self.epsilon, axis_name, mean.value
            )
            out = max_pool_3x3(out) if pool else out
        if not self.is_initializing():
            unbiased = of_batch[1] * (number / jnp.maximum(number - 1, 1))
            some = number > 0  # a part of a filled-up batch may hold nothing that counts
            step = jnp.where(some, self.momentum, 0.0)
            mean.value += step * (of_batch[0] - mean.value)
            var.value += step * (unbiased - var.value)
            count.value += some.astype(jnp.int32)
        out = out.astype(self.dtype or values.dtype)
        source: tuple[Array, ...] = ()
        if same and not isinstance(values, Pending):
            factor = lax.rsqrt(of_batch[1] + self.epsilon) * scale
            source = lax.stop_gradient(Source(values, of_batch[0], factor, bias))
        return _end(out, source, shortcut, relu, inner)


def _end(
    out: Array,
    source: tuple[Array, ...],
    shortcut: Array | Activated | None,
    relu: bool,
    inner: bool,
) -> Array | Activated:
    """Adds a shortcut and applies ReLU; says what the result is computed from where it helps."""
    on_tpu = target.platform() == "tpu"
    if isinstance(shortcut, Activated) and relu and source and on_tpu:
        source = (*source, *shortcut.source)
        return Activated(activate(out, shortcut.values, source), source)
    shortcut = _bare(shortcut)
    if not relu:
        out = finish(out, shortcut, relu)
        return Activated(out, source) if inner and source and on_tpu else out
    if not (inner and source) or shortcut is not None:
        return activate(out, shortcut)
    return Activated(activate(out, source=source), source)


def _bare(shortcut: Array | Activated | None) -> Array | None:
    return None if shortcut is None else plain(shortcut)


def _pooled(values: Array, relu: bool) -> Array:
    # Pooling first gives the same values, and ReLU then has a quarter of the work.
    pooled = max_pool_3x3(values)
    return activate(pooled) if relu else pooled


def make_norm(kind: str, **options: Any) -> Callable[..., Any]:
    """Returns the normalisation `kind` as a layer called as `BatchNorm` is.

    Args:
        kind: `batch`; `frozen`, batch normalisation by the running statistics in training mode
            too; or `group`, groups of at least one channel, at most 32 groups (Wu and He 2018).
        **options: `name`, `dtype` and `axis_name`.

    Raises:
        ValueError: another kind.
    """
    if kind in ("batch", "frozen"):
        return BatchNorm(frozen=kind == "frozen", **options)
    if kind != "group":
        raise ValueError(f"norm is {kind!r}, but must be batch, frozen or group")
    options.pop("axis_name", None)  # each example has its own statistics

    def group_norm(
        values: Array | Pending,
        train: bool = False,
        mask: Array | None = None,
        shortcut: Array | Activated | None = None,
        relu: bool = False,
        inner: bool = False,
        pool: bool = False,
    ) -> Array:
        del train, mask, inner
        layer = nn.GroupNorm(min(32, values.shape[-1]), epsilon=1e-5, **options)
        out = layer(computed(values))
        return _pooled(out, relu) if pool else finish(out, _bare(shortcut), relu)

    return group_norm


def name_intermediate(module: nn.Module, name: str, value: Array) -> Array:
    """Records `value` as the intermediate `name` of `module` and returns it.

    Read it with `model.apply(variables, images, mutable=["intermediates"])`, whose second
    result then has `["intermediates"][name]`.
    """
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


def num_params(params: object) -> int:
    """Counts the scalars in a tree of params."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
