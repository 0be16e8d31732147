"""Datasets: where they come from, how they reach the device, how they are varied."""

from bmjax.data.load import load_dataset
from bmjax.data.sources import ArraySource, Dataset

__all__ = ["ArraySource", "Dataset", "load_dataset"]
