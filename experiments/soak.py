"""Whether a long run needs more and more of anything: memory, open files, threads, checkpoints.

    uv run python experiments/soak.py

trains a small `mlp` for 72,000 steps, as many as a ResNet takes in two hours at 10 a second, in
36,000 epochs of two steps on 8 virtual CPU devices, with event files, and a checkpoint every three
seconds. All that an epoch does is done 36,000 times. On two virtual cores of an AMD EPYC, Python
3.11, jax 0.10.2, beside other work:

    36,000 epochs, 72,000 records in 957 s; after a quarter:
    memory 836 to 868 MiB, 1.06 MiB per 1,000 epochs
    open files: 12 to 33, at the begin 12.9, at the end 13.5 on average
    threads: 45 to 53, at the begin 46.3, at the end 46.4 on average
    checkpoints: 3 to 3, at the begin 3.0, at the end 3.0 on average

The records of 1,000 epochs, which `fit` keeps as it returns them, take 0.85 MiB.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from bmjax.config import DeviceConfig, RunConfig, TrainConfig  # noqa: E402
from bmjax.data import ArraySource, Dataset  # noqa: E402
from bmjax.runs import checkpoint  # noqa: E402
from bmjax.runs.history import read_metrics  # noqa: E402
from bmjax.train.loop import fit  # noqa: E402

# Of the run, which is left out: caches fill, and threads start.
WARM_UP = 0.25


def make_dataset() -> Dataset:
    """Returns 16 random images of two classes, for each split."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
    source = ArraySource(images, (np.arange(16) % 2).astype(np.int32))
    return Dataset("random", source, source, source, ("even", "odd"))


class Watch(threading.Thread):
    """Notes once a second what the process holds: MiB of memory, open files, threads."""

    def __init__(self, out: Path):
        super().__init__(daemon=True)
        self._out, self._over = out, threading.Event()
        self.rows: list[tuple[float, ...]] = []

    def run(self) -> None:
        """Notes until it is told to stop."""
        while not self._over.wait(1.0):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            epochs = Path(self._out / "metrics.jsonl")
            row = (
                epochs.stat().st_size if epochs.is_file() else 0,
                pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
                len(checkpoint.saved_steps(self._out / "checkpoints")),
            )
            self.rows.append(tuple(map(float, row)))

    def stop(self) -> np.ndarray:
        """Returns [seconds, 5]: bytes of metrics, MiB, files, threads, checkpoints."""
        self._over.set()
        self.join()
        return np.array(self.rows)


def main() -> None:
    """Prints how each changes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=36_000, help="(default: 36,000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        config = TrainConfig(
            model="mlp",
            hidden_sizes=(8,),
            epochs=arguments.epochs,
            batch_size=8,
            data="random",
            device=DeviceConfig(devices=8),
            run=RunConfig(save_minutes=0.05),
            out=str(Path(folder) / "run"),
        )
        watch = Watch(Path(config.folder))
        watch.start()
        begin = time.monotonic()
        fit(config, make_dataset(), console=Console(file=nowhere))
        seconds = time.monotonic() - begin
        rows = watch.stop()
        records = len(read_metrics(Path(config.folder) / "metrics.jsonl"))
    later = rows[int(WARM_UP * len(rows)) :]
    epochs = later[:, 0] / rows[:, 0].max() * arguments.epochs
    slope = np.polyfit(epochs, later[:, 1], 1)[0]
    print(f"{arguments.epochs:,} epochs, {records:,} records in {seconds:.0f} s; after a quarter:")
    first, last = later[0, 1], later[-1, 1]
    print(f"memory {first:.0f} to {last:.0f} MiB, {1000 * slope:.2f} MiB per 1,000 epochs")
    for name, column in (("open files", 2), ("threads", 3), ("checkpoints", 4)):
        values = later[:, column]
        print(
            f"{name}: {values.min():.0f} to {values.max():.0f}, at the begin "
            f"{values[:10].mean():.1f}, at the end {values[-10:].mean():.1f} on average"
        )


if __name__ == "__main__":
    main()
