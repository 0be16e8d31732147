"""What commands that measure a run begin with: the run, its data, and a split that fits it."""

from typing import Any

from bmjax.config import CalibrateConfig, EvaluateConfig
from bmjax.data import Dataset
from bmjax.data.sources import SPLITS
from bmjax.errors import UserError
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import request_devices
from bmjax.runs.trained import Fitting, TrainedRun, load_for, load_run


def open_run(config: EvaluateConfig | CalibrateConfig) -> tuple[TrainedRun, str]:
    """Returns a run and the name of the data that it is measured on, once devices are asked for.

    Raises:
        UserError: no such run, or no data to measure it on.
    """
    request_devices(config.device)
    use_compilation_cache()
    trained = load_run(config.path, config.checkpoint)
    name = config.data or trained.run.config.data
    if not name:
        raise UserError(f"the weights in {config.path} came without data. Name some by --data.")
    return trained, name


def load_split(
    trained: TrainedRun,
    name: str,
    split: str,
    config: EvaluateConfig | CalibrateConfig,
    memory_gib: float | None = None,
    split_seed: int | None = None,
) -> Dataset:
    """Loads data as a run takes images, one split of them.

    Args:
        trained: the run.
        name: of the data.
        split: train, validation, test or all.
        config: how the data are read.
        memory_gib: see `load_dataset`; None: the config's.
        split_seed: see `load_dataset`; None: the run's.

    Raises:
        UserError: see `load_dataset`.
    """
    return load_for(
        trained,
        name,
        config.image_size,
        SPLITS if split == "all" else (split,),
        config.device.memory_gib if memory_gib is None else memory_gib,
        split_seed=split_seed,
        max_unreadable=config.max_unreadable,
    )


def open_split(trained: TrainedRun, name: str, split: str, *how: Any, **more: Any) -> Fitting:
    """Returns what `load_split` loads as it fits the run; raises UserError as `Fitting.of` does."""
    return Fitting.of(trained, load_split(trained, name, split, *how, **more), split)
