"""Training: the pure step, its compiled forms, and the loop over a whole run."""

from bmjax.train.loop import fit
from bmjax.train.step import TrainState, train_step

__all__ = ["TrainState", "fit", "train_step"]
