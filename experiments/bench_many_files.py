"""What many small files cost: starts and memory of a training on 200,000 JPEG files of 64 pixels.

    uv run python experiments/bench_many_files.py --folder /tmp/many

makes the files, in 100 folders of classes, and runs

    bmjax train --model cnn_tiny --image-size 32 --epochs 1 --no-augment

twice, the cache being empty before the first time; then once more with `--memory-gib 0`, where
images are decoded when they are asked for. The files are deleted afterwards. On two virtual cores
of an AMD EPYC, Python 3.11, jax 0.10.2, with 381 MB of files and 0.82 GB of decoded pixels:

    first: first step after 44.9 s (46.9 s of processors), all in 65 s (66 s); peak 1.44 GB
    second: first step after 5.2 s (5.1 s of processors), all in 23 s (23 s); peak 1.31 GB
    streamed, second: 10.0 s of processors up to the first step, 58 s in all; peak 0.78 GB (others
        were using the cores as well)

Before pixels and the digest of the files were kept in the cache, each start was like the first;
before the host's memory was used as it is, the peak was 2.57 GB.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 100
DISTINCT = 400
SIDE = 64
# Notes when the first step was computed, and what of it all was the processors' time till then.
NOTING = """
import os, sys, time
from bmjax.cli.main import main
from bmjax.train import session
add = session._Calls.add
def noting(self, steps, seconds):
    if not noted:
        noted.append(True)
        print(f"\\nFIRST {time.time()} {sum(os.times()[:2])}", flush=True)
        if "BENCH_ENDS" in os.environ:
            os._exit(0)
    add(self, steps, seconds)
noted = []
session._Calls.add = noting
sys.exit(main(sys.argv[1:]))
"""


def write_files(folder: Path, number: int) -> int:
    """Writes JPEG files that all differ, if only in a comment; returns their bytes in all."""
    draw, total = np.random.default_rng(0), 0
    encoded = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for label in range(CLASSES):
        (folder / f"class_{label:03}").mkdir(parents=True)
    for index in range(number):
        data, comment = encoded[index % DISTINCT], f"{index:010}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        data = data[:2] + marker + data[2:]
        path = folder / f"class_{index % CLASSES:03}" / f"{index:07}.jpg"
        total += path.write_bytes(data)
    return total


def start(out: Path, data: Path, cache: Path, *flags: str) -> dict[str, float]:
    """Runs the command; returns seconds, of wall and processors, and peak memory in bytes."""
    command = f"train --data folder:{data} --model cnn_tiny --image-size 32 --epochs 1 --no-augment"
    words = [sys.executable, "-c", NOTING, *command.split(), "--out", str(out), *flags]
    begin = time.time()
    process = subprocess.Popen(
        words,
        env={**os.environ, "BMJAX_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = {}
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            found.setdefault("line", time.time() - begin)
        if line.startswith("FIRST"):
            at, spent = map(float, line.split()[1:])
            found |= {"first_step": at - begin, "first_step_processor": spent}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the command ended with {process.returncode}")
    return found | {
        "wall": time.time() - begin,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }


def main() -> None:
    """Prints a line for each start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bmjax_many_files"))
    parser.add_argument("--number", type=int, default=200_000)
    parser.add_argument("--keep", action="store_true", help="leave the files, and take them again")
    parser.add_argument("--end", action="store_true", help="end after the first step")
    parser.add_argument("--starts", default="first,second,streamed", help="some of these")
    arguments = parser.parse_args()
    if arguments.end:
        os.environ["BENCH_ENDS"] = "yes"
    data, cache, out = (arguments.folder / name for name in ("data", "cache", "runs"))
    if not data.is_dir():
        begin = time.time()
        total = write_files(data, arguments.number)
        print(f"{arguments.number:,} files of {total:,} bytes made in {time.time() - begin:.0f} s")
    decoded = arguments.number * 37 * 37 * 3
    shutil.rmtree(out, ignore_errors=True)
    if "first" in arguments.starts:
        shutil.rmtree(cache, ignore_errors=True)
    try:
        for number, name in enumerate(arguments.starts.split(",")):
            flags = ["--memory-gib", "0"] if name == "streamed" else []
            found = start(out / str(number), data, cache, *flags)
            over = (found["peak"] - 500e6) / decoded
            print(
                f"{name}: first line after {found['line']:.1f} s, first step after "
                f"{found['first_step']:.1f} s ({found['first_step_processor']:.1f} s of processors)"
                f", all in {found['wall']:.0f} s ({found['processor']:.0f} s of processors); peak "
                f"{found['peak'] / 1e9:.2f} GB: 500 MB and {over:.2f} times the "
                f"{decoded / 1e9:.2f} GB of decoded pixels",
                flush=True,
            )
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
