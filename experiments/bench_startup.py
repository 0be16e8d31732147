"""How long a start takes: importing bmjax, and a training command up to its first step.

    uv run python experiments/bench_startup.py

On two virtual cores of an AMD EPYC, Python 3.11, jax 0.10.2:

    import jax 0.57 s; bmjax on top -0.037 s (median of 7; -0.076 to +0.075)
    mlp: first step after 3.71 s at the first start (22 programs compiled), after 1.55 s at the
        next (1.43 to 1.81; [0] compiled)
    cnn: first step after 4.66 s at the first start (22 programs compiled), after 1.90 s at the
        next (1.78 to 1.99; [0] compiled)

with the packages' modules compiled to bytecode, as Python leaves them after the first start;
where it may not (PYTHONDONTWRITEBYTECODE), importing takes 2 s more at every start.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 7

# Ends the process as soon as the first step is computed, and says how many programs were
# compiled up to there.
FIRST_STEP = """
import sys, jax
missed = []
jax.monitoring.register_event_listener(
    lambda name, **_: missed.append(name) if name.endswith("/cache_misses") else None)
from bmjax.train import session
from bmjax.cli import main
import os
def first(self, steps, seconds):
    print(len(missed), flush=True)
    os._exit(0)
session._Calls.add = first
main(sys.argv[1:])
"""


def seconds(code: str, *words: str, cache: str | None = None) -> tuple[float, str]:
    """Runs Python code in a process of its own; returns its wall time and output."""
    environment = {**os.environ, **({"BMJAX_CACHE": cache} if cache else {})}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - begin, done.stdout


def main() -> None:
    """Prints medians and spreads."""
    pairs = [(seconds("import bmjax, jax")[0], seconds("import jax")[0]) for _ in range(REPEATS)]
    extra = [both - alone for both, alone in pairs]
    print(
        f"import jax {statistics.median(alone for _, alone in pairs):.2f} s; bmjax on top "
        f"{statistics.median(extra):+.3f} s (median of {REPEATS}; "
        f"{min(extra):+.3f} to {max(extra):+.3f})"
    )
    for model in ("mlp", "cnn", "resnet18"):
        with tempfile.TemporaryDirectory() as folder:
            cache = str(Path(folder) / "cache")
            seconds("import bmjax; bmjax.load_dataset('mnist5k')", cache=cache)
            starts = [
                seconds(
                    FIRST_STEP, "train", "--model", model, "--out", f"{folder}/{n}", cache=cache
                )
                for n in range(REPEATS)
            ]
        cold, warm = starts[0], starts[1:]
        times = [wall for wall, _ in warm]
        compiled = {int(out.split()[-1]) for _, out in warm}
        print(
            f"{model}: first step after {cold[0]:.2f} s at the first start "
            f"({int(cold[1].split()[-1])} programs compiled), after "
            f"{statistics.median(times):.2f} s at the next ({min(times):.2f} to "
            f"{max(times):.2f}; {sorted(compiled)} compiled)"
        )


if __name__ == "__main__":
    main()
