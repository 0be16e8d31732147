"""How exactly products of float32 are computed: the one place that decides it.

GPUs and TPUs round the factors of float32 matmuls and convolutions where they are not told
otherwise: to TensorFloat-32 (10 bits) or to bfloat16 (7 bits). What is called float32 here has
products of float32 everywhere. CPUs compute such products exactly in any case.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

from bmjax.config import AUTO
from bmjax.errors import unknown_name

Function = TypeVar("Function", bound=Callable[..., object])

# What JAX calls the precision of a product; None leaves it as it is: factors of bfloat16 are not
# rounded, and float32 beside them may be.
PRECISIONS = {"float32": "highest", "tf32": "high", "bfloat16": None}

# Of NVIDIA's GPUs, the first compute capability with bfloat16: Ampere's.
_AMPERE = 8


def choose_precision(
    asked: str, only_float32: bool = False, device: jax.Device | None = None
) -> str:
    """Returns the precision that is computed in.

    `auto` is bfloat16 where the device has units for it: on a TPU, and on a GPU from Ampere on. It
    is float32 on others, such as a T4, and on a CPU.

    Args:
        asked: one of `PRECISIONS`, which is returned as it is, or `auto`.
        only_float32: whether the model cannot be computed in anything else.
        device: one of those that compute; None: the first that JAX has.
    """
    if asked != AUTO:
        return asked
    device = device or jax.local_devices()[0]
    return "bfloat16" if not only_float32 and _has_bfloat16(device) else "float32"


def _has_bfloat16(device: jax.Device) -> bool:
    if device.platform != "gpu":
        return device.platform == "tpu"
    # "8.0" of NVIDIA; AMD names its architecture instead, such as gfx90a.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return not major.isdecimal() or int(major) >= _AMPERE


def in_precision(function: Function, precision: str) -> Function:
    """Returns a function that computes as `function` does, products in the given precision.

    To be compiled from outside, so that what is differentiated inside has it too.

    Args:
        function: a function of arrays.
        precision: `float32`; `tf32`, whose products a GPU rounds to TensorFloat-32, and a
            TPU, which has none, makes of three of bfloat16; or `bfloat16`, of a model with that
            dtype.

    Raises:
        UserError: another precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    of_products = PRECISIONS[precision]
    if of_products is None:
        return function

    @functools.wraps(function)
    def within(*arguments: object, **named: object) -> object:
        with jax.default_matmul_precision(of_products):
            return function(*arguments, **named)

    return within  # type: ignore[return-value]
