"""What is measured of a classifier: sums over a split, confidence, and how sure a number is."""

from bmjax.metrics.sums import CALIBRATION_BINS, ClassificationSums, OwnMetric, summarize

__all__ = ["CALIBRATION_BINS", "ClassificationSums", "OwnMetric", "summarize"]
