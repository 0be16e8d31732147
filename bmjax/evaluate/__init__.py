"""Evaluation: a trained run measured on a dataset, and its predictions."""

from bmjax.evaluate.measure import evaluate, predict
from bmjax.runs.trained import load_run

__all__ = ["evaluate", "load_run", "predict"]
