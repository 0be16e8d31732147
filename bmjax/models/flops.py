"""How much a function computes, by its jaxpr."""

from typing import Any

import jax
import numpy as np


def count_flops(function: Any, *arguments: Any) -> int:
    """Counts the FLOPs of the matmuls and convolutions in a function of JAX, by its jaxpr.

    Of a convolution, all of the kernel counts for each pixel of the output, padding too.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inputs, name = [each.aval for each in equation.invars], equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = int(np.prod([inputs[0].shape[axis] for axis in contracted]))
            total += 2 * depth * equation.outvars[0].aval.size
        elif name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = inputs[1]
            per_output = kernel.size // kernel.shape[spec[0]]
            total += 2 * per_output * equation.outvars[0].aval.size
        elif name in ("convolution_in_roles", "convolution_normalized"):
            geometry = equation.params["geometry"]
            kernel, output = geometry.shape("kernel"), geometry.shape("output")
            total += 2 * int(np.prod(kernel[:3])) * int(np.prod(output))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _count(inner)
    return total
