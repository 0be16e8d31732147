"""`jax.jit` with what a program needs to know of the device that it is compiled for."""

from collections.abc import Callable
from typing import Any

import jax

from bmjax.machine.compiler_settings import for_kind
from bmjax.machine.precision import in_precision
from bmjax.machine.threads import compiler_options
from bmjax.ops.target import traced_for


def jit_for(
    device: jax.Device, function: Callable[..., Any], precision: str, **options: Any
) -> Callable[..., Any]:
    """Returns the compiled function, for one kind of device.

    Args:
        device: one of that kind.
        function: of arrays.
        precision: of its products, see `in_precision`.
        options: those of `jax.jit`.
    """
    function = traced_for(in_precision(function, precision), device.platform)
    settings = compiler_options() | for_kind(device.device_kind)
    compiled: Callable[..., Any] = jax.jit(function, compiler_options=settings, **options)
    return compiled
