"""How exactly products of float32 are computed: the one place that decides it.

GPUs and TPUs round the factors of float32 matmuls and convolutions where they are not told
otherwise: to TensorFloat-32 (10 bits) or to bfloat16 (7 bits). What is called float32 here has
products of float32 everywhere. CPUs compute such products exactly in any case.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

from bmjax.errors import unknown_name

Function = TypeVar("Function", bound=Callable[..., object])

# What JAX calls the precision of a product; None leaves it as it is: factors of bfloat16 are not
# rounded, and float32 beside them may be.
PRECISIONS = {"float32": "highest", "tf32": "high", "bfloat16": None}


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
