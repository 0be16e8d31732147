"""The runs of a distillation, measured side by side at its end."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from bmjax.config import DistillConfig, EvaluateConfig
from bmjax.data import Dataset
from bmjax.data.sources import HELD_OUT, Source
from bmjax.distill.teachers import as_one
from bmjax.evaluate.measure import measure
from bmjax.machine import hosts
from bmjax.machine.progress import stage
from bmjax.machine.storage import write_atomically
from bmjax.models import num_params
from bmjax.runs.trained import TrainedRun, load_for, load_run


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the runs of a distillation go.

    Attributes:
        teacher, alone: of a tour, the teacher's and that of the student alone.
        students: of the students that have a teacher, one per generation.
        of_student: all but the teacher's.
    """

    teacher: Path
    alone: Path
    students: list[Path]
    of_student: list[Path]

    @classmethod
    def of(cls, config: DistillConfig, out: Path) -> "Folders":
        """Returns those of a config, below or at `out`."""
        if config.generations > 1:
            names = [f"generation-{number}" for number in range(1, config.generations + 1)]
        else:
            names = [""] if config.teacher else ["distilled"]
        students, alone = [out / name for name in names], out / "alone"
        of_student = students if config.teacher else [alone, *students]
        return cls(out / "teacher", alone, students, of_student)


def finish(
    config: DistillConfig, dataset: Dataset, folders: Folders, teachers: list[TrainedRun]
) -> dict[str, Any]:
    """Measures teacher and students on the test split, which nothing before has looked at.

    A teacher that takes images of another size is measured on the data at its own; of several, at
    the size of the largest.

    Data without one is measured on its validation split; no params were chosen by it. Where that
    is empty too, it is the training split.
    """
    split = next((name for name in HELD_OUT if len(dataset.split(name))), "train")
    which = "best" if config.patience else "latest"
    source = dataset.split(split)
    students = [load_run(path, which) for path in folders.students]
    roles = ["distilled" if len(students) == 1 else path.name for path in folders.students]
    trained = list(zip(roles, students, strict=True))
    if not config.teacher:
        trained.insert(0, ("alone", load_run(folders.alone, which)))
    with stage(f"measuring {len(trained) + bool(teachers)} models"):
        rows = [_row(role, run, source, config) for role, run in trained]
        if teachers:
            rows.insert(0, _row("teacher", *_at_its_size(teachers, dataset, split, config), config))
    result: dict[str, Any] = {
        "rows": rows,
        "split": split,
        "steps": students[-1].step,
        "same_steps": len({run.step for _, run in trained}) == 1,
        "folder": config.out,
    }
    if not config.teacher:
        result["gain_points"] = 100 * (rows[-1]["accuracy"] - rows[1]["accuracy"])
    file = Path(config.folder) / "results.json"
    hosts.on_first(write_atomically, file, json.dumps(result, indent=2) + "\n")
    return result


def _at_its_size(
    teachers: list[TrainedRun], dataset: Dataset, split: str, config: DistillConfig
) -> tuple[TrainedRun, Source]:
    """Returns all teachers as one, and the split as the largest of them takes images."""
    shapes = {tuple(teacher.run.data["image_shape"]) for teacher in teachers}
    largest = max(teachers, key=lambda teacher: math.prod(teacher.run.data["image_shape"]))
    if shapes != {dataset.image_shape}:
        dataset = load_for(
            largest,
            config.data_name,
            splits=(split,),
            memory_gib=config.device.memory_gib,
            split_seed=config.split_seed,
            max_unreadable=config.max_unreadable,
        )
    teacher = as_one(teachers, config.teacher_weights, dataset)
    assert teacher is not None
    return teacher, dataset.split(split)


def _row(role: str, run: TrainedRun, source: Source, config: DistillConfig) -> dict[str, Any]:
    # On as many devices as the batch of the training divides over.
    how = EvaluateConfig(str(run.run.path), batch_size=config.batch_size, device=config.device)
    metrics = measure(run, source, how)
    names = ("accuracy", "expected_calibration_error", "loss", "inference_images_per_second")
    return {
        "role": role,
        "model": run.run.config.model,
        "parameters": num_params(run.variables["params"]),
        **{name: metrics[name] for name in names},
    }
