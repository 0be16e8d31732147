"""Datasets: where they come from, how they reach the device, how they are varied."""

from bmjax.data.sources import ArraySource, Dataset, load_dataset

__all__ = ["ArraySource", "Dataset", "load_dataset"]
