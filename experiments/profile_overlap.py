"""Whether decoding and transfer hide behind compute, read out of a profile.

    uv run python experiments/profile_overlap.py FOLDER

Trains a small CNN at 224 px, a step of which takes about as long as decoding its images, on
`folder:FOLDER` for an epoch with `--profile`, its images streamed from files (`--memory-gib 0`),
and reads the trace that TensorBoard and Perfetto show. Of the traced calls it prints how long
compiled programs ran, how much decoding happened meanwhile, how long transfers took, and how long
the loop waited for images: where that is nothing, input does not limit training.
"""

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from bmjax.config import DeviceConfig, RunConfig, TrainConfig
from bmjax.train.loop import fit

DECODE, WAIT = "decode an image", "wait for decoded images"
TRANSFER, STEP = "transfer", "training"
Spans = list[tuple[float, float]]


def merged(spans: Iterable[tuple[float, float]]) -> Spans:
    """Returns spans of time without those that overlap."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Spans) -> float:
    """Returns seconds, of spans in microseconds."""
    return sum(end - begin for begin, end in spans) / 1e6


def common(some: Spans, others: Spans) -> Spans:
    """Returns when both happen."""
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return [(begin, end) for begin, end in pairs if begin < end]


def main() -> None:
    """Trains, reads the trace, and prints what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of image files, a folder for each class")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", default="cnn_tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/profiled"))
    args = parser.parse_args()
    config = TrainConfig(
        model=args.model,
        data=f"folder:{args.folder}",
        image_size=args.image_size,
        batch_size=args.batch_size,
        epochs=1,
        out=str(args.out),
        device=DeviceConfig(memory_gib=0),
        run=RunConfig(tensorboard=False, profile=True),
    )
    fit(config)
    (trace,) = (args.out / "profile").rglob("perfetto_trace.json.gz")
    spans: dict[str, Spans] = {DECODE: [], WAIT: [], TRANSFER: [], STEP: [], "compute": []}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X":
            name = "compute" if "hlo_op" in event.get("args", {}) else event["name"]
            if name in spans:
                spans[name].append((event["ts"], event["ts"] + event["dur"]))
    images = len(spans[DECODE])
    steps, compute, decode = (merged(spans[name]) for name in (STEP, "compute", DECODE))
    if not steps or not compute:
        raise SystemExit(
            "the trace holds no step: an epoch has too few of them; lower --batch-size"
        )
    whole = (steps[-1][1] - steps[0][0]) / 1e6
    print(f"traced {len(spans[STEP])} calls in {whole:.2f} s, {images} images decoded")
    print(f"programs ran for {length(compute):.2f} s, {length(compute) / whole:.0%} of it")
    together = length(common(decode, compute))
    print(f"images were decoded for {length(decode):.2f} s, {together:.2f} s of it meanwhile")
    print(f"transfers took {length(merged(spans[TRANSFER])):.3f} s")
    print(f"the loop waited for images for {length(merged(spans[WAIT])):.3f} s")


if __name__ == "__main__":
    main()
