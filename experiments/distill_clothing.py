r"""A fine-tuned ResNet-18 as the teacher of a small CNN and a ResNet-8: photographs of clothes.

    uv run bmjax finetune --model resnet18 --weights FOLDER/resnet18-cifar10.pth \
        --data folder:FOLDER/clothing --image-size 64 --out runs/teacher
    uv run python experiments/distill_clothing.py runs/teacher

The data are the teacher's. Each student is trained alone and distilled: same views, same number of
steps, the params after the last step; no epoch is chosen. Speed is that of inference, teacher and
student in turns on the same machine.

The README's table is of the defaults, on 2 cores; 35 minutes.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from bmjax.config import AugmentConfig, DistillConfig, EvaluateConfig, OptimConfig, RunConfig
from bmjax.data import Dataset
from bmjax.data.sources import Source
from bmjax.distill.tour import load_data, train_student
from bmjax.errors import UserError
from bmjax.evaluate.measure import inference_speed, measure
from bmjax.models import num_params
from bmjax.runs.folder import CONFIG
from bmjax.runs.trained import TrainedRun, load_run
from bmjax.train.loop import fit

BATCH_SIZE = 256
TURNS = 5


def settings(
    arguments: argparse.Namespace, teacher: TrainedRun, student: str, seed: int, kind: str
) -> DistillConfig:
    """Returns the settings of a student; one whose folder is there goes on."""
    out = arguments.out / f"{student}-{kind}-{seed}"
    return DistillConfig(
        data=teacher.run.config.data,
        image_size=teacher.run.config.image_size,
        split_seed=teacher.run.config.split_seed,
        teacher=(str(arguments.teacher),),
        student=student,
        epochs=arguments.epochs,
        seed=seed,
        out=str(out),
        alpha=arguments.alpha,
        temperature=arguments.temperature,
        teacher_cache=str(arguments.out / f"logits-{seed}"),
        optim=OptimConfig(weight_decay=0.05),
        views=AugmentConfig(
            crop=0.6, flip=0.5, shift=0.0, rotate=0.0, scale=0.0, view_passes=arguments.view_passes
        ),
        run=RunConfig(resume=(out / CONFIG).is_file(), tensorboard=False),
    )


def train(config: DistillConfig, teacher: TrainedRun, kind: str, dataset: Dataset) -> TrainedRun:
    """Trains a student, or reads back one that is finished."""
    out, console = Path(config.folder), Console()
    if kind == "alone":
        alone = config.train_config(config.student, config.folder)
        fit(alone, dataset, console=console, title=f"{config.student} alone, seed {config.seed},")
    else:
        train_student(config, teacher, out, dataset, console)
    return load_run(out)


def speeds(runs: list[TrainedRun], source: Source) -> list[float]:
    """Returns images/s of inference of each run over those of the first: medians of turns."""
    turns = []
    for _ in range(TURNS):
        rates = [inference_speed(run, source, BATCH_SIZE) for run in runs]
        turns.append([rate / rates[0] for rate in rates])
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def row(name: str, runs: list[TrainedRun], source: Source, speed: float) -> str:
    """Returns a row of the table."""
    measured: list[dict[str, Any]] = [
        measure(run, source, EvaluateConfig(str(run.run.path))) for run in runs
    ]
    cells = [name]
    for key in ("accuracy", "expected_calibration_error"):
        values = [100 * each[key] for each in measured]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{deviation}%")
    cells.append(", ".join(f"{100 * each['accuracy']:.1f}" for each in measured))
    size = num_params(runs[0].variables["params"])
    return "| " + " | ".join([*cells, f"{size:,}", f"{speed:.1f}"]) + " |"


def compare(arguments: argparse.Namespace) -> None:
    """Trains all and prints a table in Markdown."""
    teacher = load_run(arguments.teacher)
    first = settings(arguments, teacher, arguments.students[0], arguments.seeds[0], "alone")
    dataset = load_data(first, [teacher])
    runs = {
        (student, kind): [
            train(settings(arguments, teacher, student, seed, kind), teacher, kind, dataset)
            for seed in arguments.seeds
        ]
        for student in arguments.students
        for kind in ("alone", "distilled")
    }
    source = dataset.test if len(dataset.test) else dataset.validation
    firsts = [teacher, *(runs[student, "alone"][0] for student in arguments.students)]
    of_teacher, *others = speeds(firsts, source)
    speed = dict(zip(arguments.students, others, strict=True))
    print("| model | accuracy | calibration error | each seed | parameters | speed |")
    print("|---|---|---|---|---|---|")
    print(row(f"{teacher.run.config.model}, teacher", [teacher], source, of_teacher))
    for (student, kind), trained in runs.items():
        print(row(f"{student}, {kind}", trained, source, speed[student]))


def main() -> None:
    """Reads the command line; what is wrong with it is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("teacher", type=Path, help="folder of the fine-tuned run")
    parser.add_argument("--students", nargs="+", default=["cnn", "resnet8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--view-passes", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("runs/distilled-clothing"))
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
