"""Contenders in turns, in one process: medians of ratios, and whether they do equal work."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.bench.workload import Contender, Workload
from bmjax.errors import UserError
from bmjax.machine.precision import in_precision

WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """What a contender took, turn by turn.

    Attributes:
        contender: its name.
        job: `training` or `inference`.
        seconds: of each turn, for one batch.
        flops: of one batch, forward and, in training, backward, where they are known.
    """

    contender: str
    job: str
    seconds: list[float] = field(default_factory=list)
    flops: int = 0

    @property
    def median(self) -> float:
        """Median of the seconds for a batch."""
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing") -> list[float]:
        """Returns how many times as fast as `other` this was, turn by turn."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [theirs / ours for ours, theirs in pairs]


def take_turns(
    contenders: Sequence[Contender], workload: Workload, steps: int, turns: int
) -> list[Timing]:
    """Times training and inference of all contenders, one after the other in each turn.

    Args:
        contenders: to be timed.
        workload: what they do.
        steps: batches that `train` goes through.
        turns: counted ones, after warm-ups that compile.

    Raises:
        UserError: they don't do equal work, or a loss is not finite.
    """
    check_equal_work(contenders)
    timings = []
    for job in ("training", "inference"):
        # Forward once; backward twice as much, by the images and by the kernels.
        times = 3 if job == "training" else 1
        these = [
            Timing(each.name, job, [], times * (each.flops or 0) * workload.batch_size)
            for each in contenders
        ]
        for number in range(WARM_UPS + turns):
            # Each turn begins with another, so that none always follows the same one.
            for offset in range(len(contenders)):
                index = (number + offset) % len(contenders)
                seconds = _time(contenders[index], job, steps)
                if number >= WARM_UPS:
                    these[index].seconds.append(seconds)
        timings += these
    return timings


def _time(contender: Contender, job: str, steps: int) -> float:
    begin = time.perf_counter()
    if job == "training":
        loss = contender.train()
        seconds = (time.perf_counter() - begin) / steps
        if not np.isfinite(loss):
            raise UserError(f"{contender.name} trains to a loss of {loss}: nothing to be timed.")
        return seconds
    for _ in range(steps):
        contender.infer()
    return (time.perf_counter() - begin) / steps


def check_equal_work(contenders: Sequence[Contender]) -> None:
    """Raises UserError where contenders have other numbers of params or of FLOPs."""
    first = contenders[0]
    size = sum(each.size for each in first.variables())
    for other in contenders[1:]:
        params = sum(each.size for each in other.variables())
        if params != size:
            raise UserError(f"{other.name} has {params:,} params, {first.name} {size:,}.")
        if first.flops and other.flops and abs(other.flops / first.flops - 1) > 0.01:
            raise UserError(
                f"{other.name} takes {other.flops:,} FLOPs an image, {first.name} {first.flops:,}."
            )


def matmul_peak(precision: str = "float32", size: int = 2048, turns: int = 10) -> float:
    """Returns FLOP/s of the best of some square matmuls on the first device of JAX."""
    one = jnp.ones((size, size), jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    multiply: Callable[..., jax.Array] = jax.jit(in_precision(jnp.matmul, precision))
    jax.block_until_ready(multiply(one, one))
    best = float("inf")
    for _ in range(turns):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(one, one))
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_elsewhere(precision: str = "float32") -> float:
    """Returns `matmul_peak` as a new process finds it, which has all threads."""
    code = f"from bmjax.bench import timing; print(timing.matmul_peak({precision!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    return float(done.stdout)


def describe_machine() -> str:
    """Returns processor, cores, device and versions in one line."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line for line in info.read_text("utf-8").splitlines() if line.startswith("model name")
        ]
        processor = names[0].partition(":")[2].strip() if names else processor
    return (
        f"{processor}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, Python "
        f"{platform.python_version()}, jax {jax.__version__}"
    )
