r"""Cost at scale, by counting: the collectives of a compiled step, and what links make of them.

    uv run python experiments/scaling.py --out experiments/scaling.md

Compiles the training step of each model for 8 virtual devices of the CPU (jit over a mesh, the
batch divided, everything else on each), and counts the collectives in the compiled program and the
bytes that go into them. They are the same for any larger number of devices: each gradient once, and
for each batch normalisation its sums forward and backward.

The rest is arithmetic, and no measurement. A ring all-reduce of n bytes over N devices moves
2 (N - 1) / N n bytes over each link, and takes N - 1 latencies twice; a tree moves all of them
log2(N) times up and down, which is faster for few bytes. The faster of both is taken. The time of a
step's arithmetic is `3 x forward FLOPs x images / (peak x share)` for an assumed share of the peak.
Where the all-reduce of the gradients hides behind the backward pass (XLA's latency-hiding
scheduler), it costs only what is longer than two thirds of the step; the sums of batch
normalisation never hide.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)

from bmjax.bench import collectives  # noqa: E402
from bmjax.models import create_model, num_params  # noqa: E402
from bmjax.models.flops import count_flops  # noqa: E402

NUMBERS = (1, 8, 64, 512)
SMALL = 2048  # elements; no kernel of a convolution has fewer


@dataclass(frozen=True)
class Machine:
    """A kind of accelerator with its links, as published.

    Attributes:
        name: for the table.
        flops: peak of dense bfloat16, FLOP/s.
        fast: bytes/s of a device each way within `island` devices.
        slow: bytes/s of a device each way beyond them.
        island: devices with fast links.
        latency: seconds of a step of a ring; assumed.
        source: where the figures are from.
    """

    name: str
    flops: float
    fast: float
    slow: float
    island: int
    latency: float
    source: str


MACHINES = [
    Machine(
        *("H100 SXM, NVLink, 400 Gb/s InfiniBand", 989e12, 450e9, 50e9, 8, 2e-6),
        "NVIDIA's datasheets: H100 SXM (989 TFLOP/s, 900 GB/s both ways), ConnectX-7 (400 Gb/s)",
    ),
    Machine(
        *("TPU v5e, 2-D torus, pods of 256", 197e12, 200e9, 3.125e9, 256, 1e-6),
        "Google Cloud's page on v5e (197 TFLOP/s, 1,600 Gb/s of interconnect a chip, 6.4 Tb/s of "
        "network a pod)",
    ),
]


@dataclass(frozen=True)
class Counted:
    """What a step of a model has to do.

    Attributes:
        model: its name.
        collectives: number of each kind.
        gradients: bytes of the gradients.
        rest: bytes of all else that is added up.
        small: collectives without gradients of kernels.
        flops: forward, for an image.
    """

    model: str
    collectives: dict[str, int]
    gradients: int
    rest: int
    small: int
    flops: int


def count(name: str, side: int) -> Counted:
    """Compiles a model's step for eight devices and counts."""
    found, state = collectives.of_step(name, side, 1000)
    params = num_params(state.params)
    kinds = dict(Counter(each.kind for each in found))
    total = sum(sum(each.sizes) for each in found)
    small = sum(max(each.sizes) <= SMALL for each in found)
    apply = jax.jit(create_model(name, 1000).apply)
    flops = count_flops(apply, state.variables, np.zeros((1, side, side, 3), np.float32))
    return Counted(name, kinds, 4 * params, 4 * (total - params), small, flops)


def all_reduce(number: int, size: float, machine: Machine) -> float:
    """Returns seconds of an all-reduce of `size` bytes over `number` devices: a ring or a tree."""
    tree = 2 * math.ceil(math.log2(number)) * (size / machine.slow + machine.latency)
    return min(ring(number, size, machine), tree)


def ring(number: int, size: float, machine: Machine) -> float:
    """Returns seconds of an all-reduce by rings.

    Within an island by its fast links; between islands each device then adds up its part of
    `1 / island` with its peers.
    """
    if number == 1:
        return 0.0
    inside = min(number, machine.island)
    outside = number // inside
    seconds = 2 * (inside - 1) * (size / inside / machine.fast + machine.latency)
    if outside > 1:
        part = size / inside
        seconds += 2 * (outside - 1) * (part / outside / machine.slow + machine.latency)
    return seconds


def predict(counted: Counted, machine: Machine, number: int, batch: int, share: float) -> float:
    """Returns the predicted efficiency: the time of a step on one device over that on many."""
    compute = 3 * counted.flops * batch / (machine.flops * share)
    of_gradients = all_reduce(number, counted.gradients, machine)
    shown = max(0.0, of_gradients - 2 / 3 * compute)
    each = counted.rest / max(counted.small, 1)
    of_norms = counted.small * all_reduce(number, each, machine)
    return compute / (compute + shown + of_norms)


def plural(number: int) -> str:
    """Returns a number of devices in words."""
    return f"{number} device{'s' if number > 1 else ''}"


def main() -> None:
    """Counts, predicts and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet18", "resnet50"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256, help="images of a device")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak, assumed")
    parser.add_argument("--out", type=Path, default=Path("scaling.md"))
    arguments = parser.parse_args()
    side = arguments.image_size
    all_counted = [count(name, side) for name in arguments.models]
    command = "Written by `uv run python experiments/scaling.py --out experiments/scaling.md`."
    parts = ["# Cost at scale, counted and predicted", command, *(__doc__ or "").split("\n\n")[2:]]
    lines = [line for part in parts for line in (" ".join(part.split()), "")]
    lines += [
        f"Counted, {side} px:",
        "",
        "| model | collectives of a step | gradients, MB | all else, MB | FLOPs of an image |",
        "|---|---|---|---|---|",
    ]
    for each in all_counted:
        kinds = ", ".join(f"{number} {kind}" for kind, number in each.collectives.items())
        lines.append(
            f"| {each.model} | {kinds} | {each.gradients / 1e6:.2f} | {each.rest / 1e6:.3f} | "
            f"{each.flops / 1e9:.3f} G |"
        )
    for machine in MACHINES:
        lines += [
            "",
            f"Predicted efficiency on {machine.name}, {arguments.batch_size} images a device, at "
            f"{arguments.share:.0%} of {machine.flops / 1e12:.0f} TFLOP/s; latency of "
            f"{1e6 * machine.latency:.0f} microseconds assumed. Source: {machine.source}.",
            "",
            "| model | " + " | ".join(plural(number) for number in NUMBERS) + " |",
            "|---|" + "---|" * len(NUMBERS),
        ]
        for each in all_counted:
            cells = [
                f"{predict(each, machine, number, arguments.batch_size, arguments.share):.1%}"
                for number in NUMBERS
            ]
            lines.append(f"| {each.model} | " + " | ".join(cells) + " |")
    arguments.out.write_text("\n".join([*lines, ""]))
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
