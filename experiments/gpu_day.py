"""All that has to be seen on a GPU once, in 25 minutes, with a report.

    pip install "jax[cuda12]" torch torchvision pytest pytest-xdist chex hypothesis
    python experiments/gpu_day.py --out gpu_day --cifar tfds:cifar10

expects a GPU; without one it stops with exit code 2, unless --any-backend is given. Each step is a
process of its own with a limit of its own. Its output and its result lie in OUT/STEP as soon as it
ends, and OUT/report.md tells of all steps after each. What is done is not done again: after an
interruption the same command goes on, and tries again what failed, was stopped by its limit or was
skipped. A step that lacks a package or its data is skipped, with the reason. The exit code is 1
where a step failed or was stopped.

--tiny does the same steps with little work, so that all of this can be tried on a CPU:

    python experiments/gpu_day.py --out tiny --any-backend --tiny --steps doctor profile

On a CPU that was done; on a GPU nothing of it yet.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 25.0
_BMJAX = (sys.executable, "-m", "bmjax.cli")
_BACKEND = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='\\n')"
# Of what GPUs compute in a way of their own. On several virtual CPU devices the others run.
_TESTS = (
    *("recomputed", "pooling", "normalization", "one_pass_normalization", "convolution"),
    *("layers", "losses", "metrics", "preprocess", "lowered"),
)
# Kept short in the report.
_LINES = 40


@dataclass(frozen=True)
class Step:
    """Something to do in processes of its own.

    Attributes:
        name: also of its folder.
        about: in the report.
        seconds: that its commands may take together.
        commands: one after the other, until one fails.
        packages: that have to be there.
        environment: for its commands.
        no_data: what a command prints where its data cannot be had; the step then is skipped.
    """

    name: str
    about: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    packages: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    no_data: str | None = None


def make_steps(out: Path, cifar: str, tiny: bool) -> list[Step]:
    """Returns all steps, whose commands write into folders of `out`."""
    torch = ("torch", "torchvision")
    return [
        Step(
            "doctor",
            "what is there",
            30,
            ((*_BMJAX, "doctor", "--expect", "any" if tiny else "gpu"),),
        ),
        _tests(tiny),
        Step(
            "certificate",
            "a ResNet with random weights, against torchvision",
            480 if tiny else 240,
            _certificate(out / "certificate", tiny),
            torch,
        ),
        *_throughput(tiny),
        Step(
            "distillation",
            "the tour on digits: teacher, student alone, student taught",
            120,
            (_into(out / "distillation", ("distill", *_short(tiny))),),
        ),
        Step(
            "profile",
            "a trace of some steps",
            60,
            (
                _into(
                    out / "profile",
                    ("train", "--model", "mlp" if tiny else "resnet18", "--epochs", "1"),
                    ("--image-size", "28", "--profile"),
                ),
            ),
        ),
        _cifar(out / "cifar", cifar, tiny),
    ]


def _into(folder: Path, *words: Sequence[str]) -> tuple[str, ...]:
    """Returns a command of bmjax that writes a run, or goes on with it."""
    run = folder / "run"
    resume = ("--resume",) if (run / "config.json").is_file() else ()
    return (*_BMJAX, *(word for part in words for word in part), "--out", str(run), *resume)


def _short(tiny: bool) -> tuple[str, ...]:
    if not tiny:
        return ()
    return ("--epochs", "1", "--teacher-epochs", "1", "--teacher-model", "mlp")


def _tests(tiny: bool) -> Step:
    names = ("metrics",) if tiny else _TESTS
    files = [f"tests/test_{name}.py" for name in names]
    # Tolerances are float32's, and a GPU's own default for products is TF32.
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = (sys.executable, "-m", "pytest", "-n", "0", *files)
    packages = ("pytest", "xdist", "chex")
    return Step("tests", "those of kernels, losses and layers", 240, (command,), packages, exact)


def _certificate(folder: Path, tiny: bool) -> tuple[tuple[str, ...], ...]:
    side = "64" if tiny else "224"
    weights, converted = folder / "active.pth", folder / "converted"
    # Weights that magnify no rounding, see certify_all.
    script = (
        "import sys, torch; from experiments.certify_all import draw; "
        "drawn = draw('resnet18', int(sys.argv[2]), 'active'); "
        "torch.save({name: torch.from_numpy(value) for name, value in drawn.items()}, sys.argv[1])"
    )
    anew = "import os, shutil, sys; shutil.rmtree(sys.argv[1], True); os.makedirs(sys.argv[1])"
    convert = ("convert", str(weights), "--model", "resnet18", "--image-size", side, "--certify")
    return (
        (sys.executable, "-c", script, str(weights), side),
        # What an interruption left cannot be written over.
        (sys.executable, "-c", anew, str(converted)),
        (*_BMJAX, *convert, "--out", str(converted / "run")),
    )


def _throughput(tiny: bool) -> list[Step]:
    cases = [("resnet18", "bfloat16"), ("resnet50", "bfloat16"), ("resnet50", "tf32")]
    steps = []
    for model, precision in [("cnn", "float32")] if tiny else cases:
        side, batch, turns = ("28", "8", "1") if tiny else ("224", "256", "10")
        work = ("--model", model, "--image-size", side, "--batch-size", batch, "--turns", turns)
        others = () if tiny else ("torch-compiled",)
        contenders = ("--contenders", "bmjax", "linen", *others)
        steps.append(
            Step(
                f"throughput-{model}-{precision}",
                "bmjax beside plain Linen" + ("" if tiny else " and torch.compile"),
                140,
                ((*_BMJAX, "bench", *work, "--precision", precision, *contenders),),
                () if tiny else ("torch", "torchvision"),
            )
        )
    return steps


def _cifar(folder: Path, data: str, tiny: bool) -> Step:
    script = "import sys, bmjax; print(len(bmjax.load_dataset(sys.argv[1]).train), 'images')"
    model, epochs, batch = ("mlp", "1", "64") if tiny else ("resnet32x4", "60", "512")
    settings = (
        *("--optimizer", "sgd", "--nesterov", "--learning-rate", "0.4", "--weight-decay", "5e-4"),
        *("--schedule", "one-cycle", "--label-smoothing", "0.1", "--precision", "bfloat16"),
        *("--flip", "0.5", "--shift", "0.125", "--rotate", "0", "--scale", "0"),
    )
    work = ("train", "--model", model, "--data", data, "--epochs", epochs, "--batch-size", batch)
    run = str(folder / "run")
    return Step(
        "cifar",
        "CIFAR-10 from scratch, 94% hoped for",
        390,
        (
            (sys.executable, "-c", script, data),
            _into(folder, work, () if tiny else settings),
            (*_BMJAX, "evaluate", run),
        ),
        no_data="UserError",
    )


def perform(step: Step, folder: Path) -> dict[str, Any]:
    """Does a step; returns and keeps its status, the seconds it took, and the reason if any."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    missing = [name for name in step.packages if importlib.util.find_spec(name) is None]
    if missing:
        status, reason = "skipped", f"not installed: {', '.join(missing)}"
    else:
        status, reason = _run(step, folder / "output.txt")
    seconds = time.monotonic() - begin
    result = {"status": status, "reason": reason, "seconds": round(seconds, 1)}
    # Whole or not at all.
    draft = folder / "result.json.new"
    draft.write_text(json.dumps(result))
    draft.replace(folder / "result.json")
    return result


def _run(step: Step, output: Path) -> tuple[str, str]:
    end = time.monotonic() + step.seconds
    with output.open("w") as file:
        for command in step.commands:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            code = _wait(command, step, file, end - time.monotonic())
            if code is None:
                return "stopped", f"took over {step.seconds:.0f} s"
            if code:
                said = _last_line(output)
                if step.no_data and step.no_data in said:
                    return "skipped", said
                return "failed", f"exit code {code}: {said}"
    return "done", ""


def _wait(command: Sequence[str], step: Step, file: Any, seconds: float) -> int | None:
    """Returns the exit code; None where the command was stopped by the limit."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **(step.environment or {})}
    # In a group of its own, so that what it starts is stopped with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def read_result(folder: Path) -> dict[str, Any] | None:
    """Returns what `perform` kept of a step; None: it did not end."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_report(out: Path, steps: Sequence[Step], machine: str) -> None:
    """Writes OUT/report.md: a table, and the end of each step's output."""
    lines = ["# A day on a GPU", "", machine, ""]
    lines += ["| step | about | status | s | reason |", "|---|---|---|---|---|"]
    for step in steps:
        result = read_result(out / step.name) or {"status": "not done", "seconds": "", "reason": ""}
        reason = str(result["reason"]).replace("|", "\\|")
        cells = (step.name, step.about, result["status"], str(result["seconds"]), reason)
        lines.append("| " + " | ".join(cells) + " |")
    for step in steps:
        output = out / step.name / "output.txt"
        if output.is_file():
            last = output.read_text(errors="replace").splitlines()[-_LINES:]
            lines += ["", f"## {step.name}", "", "```text", *last, "```"]
    (out / "report.md").write_text("\n".join([*lines, ""]))


def work_through(steps: Sequence[Step], out: Path, machine: str, minutes: float) -> bool:
    """Does the steps that are not done yet, while there is time; returns whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    sound = True
    for step in steps:
        folder = out / step.name
        result = read_result(folder)
        if result and result["status"] == "done":
            print(f"{step.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"{step.name}: no time left", flush=True)
            sound = False
            continue
        (folder / "result.json").unlink(missing_ok=True)
        result = perform(replace(step, seconds=min(step.seconds, left)), folder)
        told = f"{result['status']} in {result['seconds']} s"
        print(f"{step.name}: {told}{': ' * bool(result['reason'])}{result['reason']}", flush=True)
        sound &= result["status"] in ("done", "skipped")
        write_report(out, steps, machine)
    write_report(out, steps, machine)
    return sound


def find_backend() -> tuple[str, str]:
    """Returns JAX's backend and the kind of its devices, by a process that then lets go of them."""
    done = subprocess.run([sys.executable, "-c", _BACKEND], capture_output=True, text=True)
    backend, _, kind = done.stdout.strip().partition("\n")
    return backend or "none", kind


def main() -> None:
    """Works through all steps, or those asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of the results")
    parser.add_argument("--cifar", default="tfds:cifar10", help="as of bmjax train --data")
    parser.add_argument("--steps", nargs="+", help="names of steps; none given: all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that all may take")
    parser.add_argument("--tiny", action="store_true", help="little work, for a CPU")
    parser.add_argument("--any-backend", action="store_true", help="go on without a GPU")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    steps = make_steps(out, arguments.cifar, arguments.tiny)
    names = [step.name for step in steps]
    for name in arguments.steps or ():
        if name not in names:
            parser.error(f"there is no step {name}; these are: {', '.join(names)}")
    chosen = [step for step in steps if not arguments.steps or step.name in arguments.steps]
    backend, kind = find_backend()
    if backend != "gpu" and not arguments.any_backend:
        parser.error(f"JAX computes on {backend}, and a GPU is expected; or give --any-backend")
    machine = f"JAX computes on {backend}: {kind}."
    sound = work_through(chosen, out, machine, arguments.minutes)
    print(out / "report.md")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
