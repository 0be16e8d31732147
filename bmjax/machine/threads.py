"""How many threads compute on the CPU: one, where a step is too small to be divided.

To wake a second thread, and to hand a call over to JAX's own, takes tens of microseconds. An mlp of
28x28 pixels trains on a batch of 64 in 0.29 ms in the calling thread, and in 0.35 ms in two others;
its inference takes 0.11 and 0.24 ms. With random views, which are more work than the model, two
threads are faster by 7%. At a batch of 128 both ways are even, at 256 two threads win.
(Two cores of an Intel Xeon, jax 0.10.2, medians of 11 turns in 3 processes each.)
"""

import os

import jax

from bmjax.machine import hosts
from bmjax.machine.compiler_settings import Setting, are_known, left_to_bmjax

# Of a batch, forward: those of an mlp of 28x28 pixels at a batch of 72.
_SMALL_FLOPS = 16_000_000
# Matmuls of one thread are left to Eigen: YNNPACK packs the kernel anew in each call. In the same
# step 0.30 instead of 0.34 ms (medians of 6 processes each, in turns).
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_chosen: list[bool] = []


def suits_one_thread(flops: float) -> bool:
    """Returns whether a batch of so many FLOPs, forward, is done first by a single thread."""
    return flops <= _SMALL_FLOPS


def compute_in_calling_thread() -> bool:
    """Has JAX compute on the CPU in the thread that calls it, and in no other.

    It is for all that the process computes afterwards, and cannot be undone: for a command, not for
    a library. It has no effect once JAX has computed anything, and none on accelerators. A number
    of threads of one's own, by `NPROC` or `PJRT_NPROC`, is respected, and several CPU devices or
    processes need their threads.

    Returns:
        Whether it was tried, on a CPU.
    """
    several = jax.config.jax_num_cpu_devices > 1 or hosts.several()  # type: ignore[attr-defined]
    several = several or "device_count" in os.environ.get("XLA_FLAGS", "")
    if several or {"NPROC", "PJRT_NPROC"} & os.environ.keys():
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ["PJRT_NPROC"] = "1"
    try:
        if jax.default_backend() != "cpu":  # this has JAX look at both, once
            return False
    finally:
        del os.environ["PJRT_NPROC"]
    _chosen.append(True)
    return True


def compiler_options() -> dict[str, str]:
    """Returns the options that programs are compiled with which `compute_in_calling_thread` is for.

    There are none where it wasn't called, or where this version of JAX does not know them, and
    those that `XLA_FLAGS` sets are left to it.
    """
    return left_to_bmjax(_OPTIONS) if _chosen and are_known(**_OPTIONS) else {}


def settings_of_bmjax() -> list[Setting]:
    """Returns what `compiler_options` sets where one thread computes."""
    options = left_to_bmjax(_OPTIONS) if are_known(**_OPTIONS) else {}
    return [Setting(name, value, "bmjax, for small steps") for name, value in options.items()]
