"""What bfloat16 and float16 are widened to where sums, statistics or several steps follow.

XLA for CPU computes each step on bfloat16 in float32 and rounds what it gives, by several
instructions for each number. Steps that are taken in float32 and rounded once are faster, and as
exact or more.
"""

import jax
import jax.numpy as jnp
from jax import Array


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the type that sums and statistics of values of `dtype` are kept in."""
    return jnp.promote_types(dtype, jnp.float32)


def wider(values: Array) -> Array:
    """Returns values as at least float32."""
    return values.astype(at_least_float32(values.dtype))
