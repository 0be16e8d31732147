"""bmjax trains, fine-tunes and distils image classifiers in JAX.

The public names below load when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmjax import metrics
    from bmjax.config import DistillConfig, FinetuneConfig, TrainConfig
    from bmjax.data import load_dataset
    from bmjax.distill import tour as distill
    from bmjax.evaluate import measure as evaluate
    from bmjax.evaluate.measure import load_run
    from bmjax.finetune import tune as finetune
    from bmjax.losses import logits as losses
    from bmjax.models import create_model, list_models
    from bmjax.train.loop import fit
    from bmjax.weights.convert import from_torchvision, to_torchvision

__version__ = "0.1.0"

_HOMES = {
    "DistillConfig": "bmjax.config",
    "FinetuneConfig": "bmjax.config",
    "TrainConfig": "bmjax.config",
    "create_model": "bmjax.models",
    "fit": "bmjax.train.loop",
    "from_torchvision": "bmjax.weights.convert",
    "list_models": "bmjax.models",
    "load_dataset": "bmjax.data",
    "load_run": "bmjax.evaluate",
    "to_torchvision": "bmjax.weights.convert",
}
_MODULES = ("distill", "evaluate", "finetune", "losses", "metrics")

__all__ = [
    "DistillConfig",
    "FinetuneConfig",
    "TrainConfig",
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
