"""Figures that need no detector: how far brightness, shape and the middle of the picture go."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

IMAGE_BASELINES = ("mean intensity", "contrast", "dark share", "shape", "size")
PIXEL_BASELINES = ("brightness", "darkness", "centre")
SMOOTHING = 4 / 224  # standard deviation over the longer side


def image_baselines(pixels: np.ndarray) -> dict[str, float]:
    """Numbers of one grey image (H, W) in [0, 1] that know nothing of anatomy."""
    height, width = pixels.shape
    return {
        "mean intensity": float(pixels.mean()),
        "contrast": float(pixels.std()),
        "dark share": float((pixels < 0.1).mean()),
        "shape": height / width,
        "size": float(max(height, width)),
    }


def pixel_baseline(name: str, pixels: np.ndarray) -> np.ndarray:
    """Map (H, W) of one grey image in [0, 1] that knows nothing of anatomy, by its name.

    Brightness and darkness are smoothed as a detector's map is: single bright pixels are a far weaker rival
    (average precision .18 instead of .43 on brain MR with tumours).
    """
    if name == "centre":
        rows, columns = (np.linspace(-1, 1, count, dtype=np.float32) for count in pixels.shape)
        return np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * 0.5**2))
    smooth = ndimage.gaussian_filter(pixels, SMOOTHING * max(pixels.shape))
    return {"brightness": smooth, "darkness": 1 - smooth}[name]
