"""Measuring a detector on images with known labels and masks."""
