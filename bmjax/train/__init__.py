"""Training: the pure step, its compiled forms, and the loop over a whole run.

Besides `fit`, here is what an own loss or callback is written with.
"""

from bmjax.data.preprocess import normalize
from bmjax.train.apply import apply_train
from bmjax.train.job import Epoch
from bmjax.train.loop import fit
from bmjax.train.step import LossFn, TrainState, classification_loss, label_loss, train_step

__all__ = [
    "Epoch",
    "LossFn",
    "TrainState",
    "apply_train",
    "classification_loss",
    "fit",
    "label_loss",
    "normalize",
    "train_step",
]
