"""The settings and the folder of a distillation: where they are, and whether they may go on."""

import dataclasses
from pathlib import Path

from bmjax.config import DistillConfig
from bmjax.config.checks import check_distill
from bmjax.config.flat import contradictions, flatten, unflatten
from bmjax.config.paths import user_path
from bmjax.distill.resumption import check_generations
from bmjax.errors import UserError
from bmjax.machine.storage import free_folder
from bmjax.machine.storage import read_settings as read_file
from bmjax.models.registry import find
from bmjax.runs.folder import CONFIG, TOUR, check_kind, read_run, refuse_existing
from bmjax.train.precision import as_before, with_precision

DEFAULT_OUT = "runs/distill"


def settled(config: DistillConfig) -> DistillConfig:
    """Fills in the folder, and checks that it holds what is to be gone on with, or nothing."""
    out = folder_of(config)
    if config.run.resume:
        saved = read_settings(out)
        config = as_before(config, saved.precision)
        if saved.student_weights:  # which decide these where nothing else does
            norm = config.norm if config.norm == DistillConfig().norm else saved.norm
            sizes = config.hidden_sizes and saved.hidden_sizes
            saved = dataclasses.replace(saved, norm=norm, hidden_sizes=sizes)
        if saved.teacher:  # then nothing depends on how long one would be trained
            saved = dataclasses.replace(saved, teacher_epochs=config.teacher_epochs)
        differing = contradictions(saved, config)
        if differing:
            raise UserError(
                f"--resume contradicts the run in {out}: {'; '.join(differing)}. Leave these "
                "flags out, or start another run in another --out."
            )
        check_generations(config, saved, out)
    else:
        refuse_existing(out)
    return dataclasses.replace(config, out=str(out))


def with_precision_of_all(config: DistillConfig) -> DistillConfig:
    """Returns settings with a precision that all models which they train can be computed in."""
    trained = [config.student, *([] if config.teacher else [config.teacher_model])]
    return with_precision(config, *map(find, trained))


def folder_of(config: DistillConfig) -> Path:
    """Returns the folder; where none is given, a new one, or for a resumption the newest."""
    if config.out:
        return user_path(config.out)
    default = Path(DEFAULT_OUT)
    if not config.run.resume:
        return free_folder(default)
    tours = [path.parent for path in default.parent.glob(f"{default.name}*/{TOUR}")]
    return max(tours, key=lambda path: (path / TOUR).stat().st_mtime, default=default)


def read_settings(out: Path) -> DistillConfig:
    """Reads the settings that a tour, or a single student's run, left in its folder.

    Raises:
        UserError: there is neither, or the file was changed.
    """
    file = out / TOUR
    if not file.is_file():
        run = read_run(out)
        check_kind(run, "distill")
        flat = {**flatten(run.config), "student": run.config.model, **run.extra}
        for name in ("model", "teacher_fingerprint", "student_weights_fingerprint"):
            flat.pop(name, None)
        return unflatten(DistillConfig, flat, str(out / CONFIG))
    try:
        flat = {"precision": "float32"} | read_file(file)  # before there was a choice
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or start anew.") from error
    settings: DistillConfig = unflatten(DistillConfig, flat, str(file))
    check_distill(settings)
    return settings
