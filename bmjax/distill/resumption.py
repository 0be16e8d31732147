"""What a resumption changes of a tour: its file, its runs, and the advice after a divergence."""

import dataclasses
from pathlib import Path

from bmjax.config import DistillConfig, TrainConfig
from bmjax.config.flat import CHANGEABLE, flatten, settings_to_keep
from bmjax.errors import DivergenceError, UserError
from bmjax.machine import hosts
from bmjax.machine.storage import read_settings, write_settings
from bmjax.runs.changes import keep_settings
from bmjax.runs.folder import CONFIG, TOUR, has_ended, read_run


def update_settings(config: DistillConfig, out: Path) -> None:
    """Writes what a resumption changes into the file of a tour."""
    new, file = settings_to_keep(config), out / TOUR
    old = read_settings(file)
    changed = {name: new[name] for name in ("data", *CHANGEABLE) if old.get(name) != new[name]}
    if changed:
        write_settings(file, {**old, **changed})


def check_generations(config: DistillConfig, saved: DistillConfig, out: Path) -> None:
    """Raises UserError where a change would make another teacher than a generation began with."""
    before, after = flatten(saved), flatten(config)
    names = [name for name in CHANGEABLE if before[name] != after[name]]
    if names and (out / "generation-2" / CONFIG).is_file():
        raise UserError(
            f"{', '.join(names)} cannot be changed any more: generation 2 has begun to learn from "
            "generation 1 as it is. Leave these flags out, or start another run in another --out."
        )


def settings_to_go_on(config: TrainConfig) -> TrainConfig:
    """Returns the settings with which a part of a tour is begun or gone on with.

    Args:
        config: of the part, as the tour has them now. A resumed tour may not have begun it yet;
            one that has ended stays as it is, unless it is to go on for longer.
    """
    path = Path(config.folder)
    started = hosts.on_first((path / CONFIG).is_file)
    resume = config.run.resume and started
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=resume))
    if not resume or not hosts.on_first((path.parent / TOUR).is_file):
        return config
    saved = hosts.on_first(read_run, path)
    if saved.config.epochs == config.epochs and hosts.on_first(has_ended, saved):
        return keep_settings(saved.config, config)
    return config


def settings_of_teacher(config: TrainConfig) -> TrainConfig:
    """Returns the settings of a tour's teacher; what `bmjax train` changed of its run holds."""
    path = Path(config.folder)
    if config.run.resume and hosts.on_first((path / CONFIG).is_file):
        return keep_settings(hosts.on_first(read_run, path).config, config)
    return config


def go_on_with_student(error: DivergenceError, config: DistillConfig) -> DivergenceError:
    """Returns the error of a student's run, with the command that goes on with the whole."""
    rate = config.optim.learning_rate / 10
    command = f"bmjax distill --resume --out {config.folder}{config.import_flags}"
    go_on = f"{command} --learning-rate {rate:.2g}"
    return DivergenceError(error.what, go_on)


def go_on_with_teacher(error: DivergenceError, config: DistillConfig) -> DivergenceError:
    """Returns the error of a tour's teacher, with the commands that go on with the whole."""
    return DivergenceError(
        error.what,
        f"{error.go_on}; then: bmjax distill --resume --out {config.folder}{config.import_flags}",
    )
