"""What frozen layers cost: step time and peak memory with all but the head frozen, and in full.

    uv run python experiments/bench_frozen.py

On two virtual cores of an Intel Xeon (Sapphire Rapids), Python 3.11, jax 0.10.2, batch 64 at 64
px, medians and ranges of three turns:

    seconds: head alone 0.125, full 0.441 s a step; ratio 0.283 (0.279 to 0.289)
    memory_mib: head alone 351.543, full 889.848 MiB; ratio 0.395 (0.390 to 0.404)
    optimizer_mib: head alone 0.039, full 85.309 MiB; ratio 0.000 (0.000 to 0.000)

where memory is the growth of the process's peak while it compiles and trains.

ResNet-18 with one of two things to train, in processes of their own that take turns; each runs
the compiled training steps of `bmjax finetune` on random images.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

TURNS, CALLS, STEPS = 3, 3, 4


def measure(freeze: tuple[str, ...], size: int, batch_size: int) -> dict[str, float]:
    """Returns seconds per step, and peak memory of the process in MiB before and after."""
    import jax
    import numpy as np
    from jax.tree_util import Partial

    from bmjax.config import FinetuneConfig
    from bmjax.data import ArraySource, loader
    from bmjax.data.feed import as_arrays
    from bmjax.machine.parallel import Parallel
    from bmjax.models.build import build_model
    from bmjax.train.compiled import make_train_steps, zero_totals
    from bmjax.train.job import Job, StartingPoint
    from bmjax.train.phases import make_phases
    from bmjax.train.step import classification_loss
    from bmjax.weights.pretrained import IMAGENET

    config = FinetuneConfig(model="resnet18", batch_size=batch_size).train_config()
    model = build_model(config, 10)
    shape = (size, size, 3)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *shape), np.float32))
    start = StartingPoint(dict(variables), IMAGENET, freeze)
    num = batch_size * STEPS
    images = np.random.default_rng(0).integers(0, 256, (num, *shape)).astype(np.uint8)
    source = ArraySource(images, (np.arange(num) % 10).astype(np.int32))
    parallel = Parallel("jit", jax.devices()[:1])
    phase = make_phases(config, model, shape, STEPS, Job(start=start))[-1]
    loss_fn = classification_loss(phase.model, IMAGENET, config.label_smoothing)
    view = loader.make_view(config.views, shape[:2], IMAGENET.mean)
    steps = make_train_steps(
        parallel,
        phase.make_optimizer,
        batch_size,
        ema_decay=config.ema_decay,
        trained=phase.trained,
    )
    totals = parallel.put(zero_totals(loss_fn, phase.make_fresh(), shape))
    functions = (view, Partial(loss_fn), phase.schedule)
    arrays = parallel.put(as_arrays(source))
    state = parallel.put(phase.make_fresh())
    before = _peak()
    state, totals = steps(state, totals, functions, arrays, np.int32(1))  # compiles
    seconds = []
    for call in range(1, CALLS + 1):
        begin = time.perf_counter()
        state, totals = steps(state, totals, functions, arrays, np.int32(call * STEPS))
        jax.block_until_ready(totals)
        done = STEPS - 1 if call == 1 else STEPS
        seconds.append((time.perf_counter() - begin) / done)
    momenta = sum(leaf.nbytes for leaf in jax.tree.leaves(phase.make_fresh().opt_state))
    return {
        "seconds": statistics.median(seconds),
        "memory_mib": _peak() - before,
        "optimizer_mib": momenta / 2**20,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints medians and spreads of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--freeze", nargs="*", help="measure this alone, and print JSON")
    args = parser.parse_args()
    if args.freeze is not None:
        print(json.dumps(measure(tuple(args.freeze), args.image_size, args.batch_size)))
        return
    sizes = ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
    turns = []
    for _ in range(TURNS):
        turn = {}
        for name, freeze in (("full", []), ("head", ["backbone"])):
            done = subprocess.run(
                [sys.executable, __file__, *sizes, "--freeze", *freeze],
                capture_output=True,
                text=True,
                check=True,
            )
            turn[name] = json.loads(done.stdout.splitlines()[-1])
        turns.append(turn)
    for key, unit in (("seconds", "s a step"), ("memory_mib", "MiB"), ("optimizer_mib", "MiB")):
        full, head = ([turn[name][key] for turn in turns] for name in ("full", "head"))
        ratios = [one / other for one, other in zip(head, full, strict=True)]
        print(
            f"{key}: head alone {statistics.median(head):.3f}, full {statistics.median(full):.3f} "
            f"{unit}; ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
