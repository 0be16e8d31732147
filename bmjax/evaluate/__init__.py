"""Evaluation: a trained run measured on a dataset, and its predictions."""

from bmjax.evaluate.measure import evaluate, load_run, predict

__all__ = ["evaluate", "load_run", "predict"]
