"""bmjax trains, fine-tunes and distils image classifiers in JAX.

The public names below load when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmjax import distill, evaluate, finetune, losses, metrics
    from bmjax.config import DistillConfig, FinetuneConfig, TrainConfig
    from bmjax.data import Dataset, load_dataset
    from bmjax.errors import UserError
    from bmjax.models import create_model, list_models, register_model
    from bmjax.runs.trained import load_run
    from bmjax.train.loop import fit
    from bmjax.version import __version__ as __version__
    from bmjax.weights.convert import from_torchvision, to_torchvision

_HOMES = {
    "__version__": "bmjax.version",
    "Dataset": "bmjax.data",
    "DistillConfig": "bmjax.config",
    "FinetuneConfig": "bmjax.config",
    "TrainConfig": "bmjax.config",
    "UserError": "bmjax.errors",
    "create_model": "bmjax.models",
    "fit": "bmjax.train.loop",
    "from_torchvision": "bmjax.weights.convert",
    "list_models": "bmjax.models",
    "load_dataset": "bmjax.data",
    "load_run": "bmjax.runs.trained",
    "register_model": "bmjax.models",
    "to_torchvision": "bmjax.weights.convert",
}
_MODULES = ("distill", "evaluate", "finetune", "losses", "metrics")

__all__ = [
    "Dataset",
    "DistillConfig",
    "FinetuneConfig",
    "TrainConfig",
    "UserError",
    "create_model",
    "distill",
    "evaluate",
    "finetune",
    "fit",
    "from_torchvision",
    "list_models",
    "load_dataset",
    "load_run",
    "losses",
    "metrics",
    "register_model",
    "to_torchvision",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"bmjax.{name}")
    raise AttributeError(f"module 'bmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
