"""Evaluation: a trained run measured on a dataset, and its predictions."""

from bmjax.evaluate.measure import evaluate
from bmjax.evaluate.prediction import predict
from bmjax.runs.trained import load_run

__all__ = ["evaluate", "load_run", "predict"]
