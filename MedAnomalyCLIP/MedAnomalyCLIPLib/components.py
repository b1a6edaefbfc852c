"""Connected parts of a mask, and which of them are too small to count."""

from __future__ import annotations

import numpy as np

_TOUCHING = np.ones((3, 3), dtype=bool)  # diagonal neighbours belong together


def drop_small(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    """The mask without its connected parts that have fewer pixels than this; corners that touch connect.

    Shapes:
        mask: (H, W) bool.
        returns: (H, W) bool; the mask itself when nothing can be too small.
    """
    from scipy import ndimage

    if min_pixels <= 1 or not mask.any():
        return mask
    labels, _ = ndimage.label(mask, structure=_TOUCHING)
    kept = np.bincount(labels.ravel()) >= min_pixels
    kept[0] = False
    return kept[labels]
