"""Connected parts of a mask, and which of them are too small to count."""

from __future__ import annotations

import numpy as np

_CORNERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5))  # of a pixel, around its centre
_TOUCHING = np.ones((3, 3), dtype=bool)  # diagonal neighbours belong together


def largest_diameter(mask: np.ndarray, pixel_to_mm: np.ndarray) -> float:
    """Longest distance between two points of one connected part, on the outlines of its pixels; 0 for none.

    Shapes:
        mask: (H, W) bool.
        pixel_to_mm: (n, 2) steps in mm to the next column and the next row.
    """
    from scipy import ndimage
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist

    labels, _ = ndimage.label(mask, structure=_TOUCHING)
    longest = 0.0
    for part, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = np.nonzero(labels[box] == part)
        centres = np.stack([columns, rows], axis=1)
        corners = np.unique(np.concatenate([centres + np.array(step) for step in _CORNERS]), axis=0)
        # The two points that are farthest apart lie on the hull, which has few points; scale changes neither.
        hull = corners[ConvexHull(corners).vertices]
        longest = max(longest, float(pdist(hull @ pixel_to_mm.T).max()))
    return longest


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
