"""Measuring a detector on images with known labels and masks."""

from .image_sets import SetMeasurement, measure_sets
from .report import evaluate

__all__ = ["SetMeasurement", "evaluate", "measure_sets"]
