"""What can be set, and its defaults: frozen dataclasses that the command line is made from.

Nothing here imports JAX, so that help texts and wrong flags are answered at once. The
attributes' descriptions are the help texts of the flags.
"""

from bmjax.config.commands import (
    BenchConfig,
    CalibrateConfig,
    ConvertConfig,
    DoctorConfig,
    EvaluateConfig,
    PredictConfig,
    VerifyResumeConfig,
)
from bmjax.config.distillation import EMA_TEACHER, DistillConfig
from bmjax.config.finetuning import FinetuneConfig
from bmjax.config.training import (
    AUTO,
    PROCESSES,
    AugmentConfig,
    BaseConfig,
    DeviceConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AUTO",
    "EMA_TEACHER",
    "PROCESSES",
    "AugmentConfig",
    "BaseConfig",
    "BenchConfig",
    "CalibrateConfig",
    "ConvertConfig",
    "DeviceConfig",
    "DistillConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "OptimConfig",
    "PredictConfig",
    "RunConfig",
    "TrainConfig",
    "VerifyResumeConfig",
]
