"""Connected parts of a mask, and which of them are too small to count."""

from __future__ import annotations

import numpy as np

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
        inside = labels[box] == part
        rows = np.arange(len(inside))
        left, right = inside.argmax(axis=1) - 0.5, inside.shape[1] - 0.5 - inside[:, ::-1].argmax(axis=1)
        ends = [(end, rows + half) for end in (left, right) for half in (-0.5, 0.5)]
        outline = np.concatenate([np.stack(end, axis=1) for end in ends])  # corners of each row's two ends
        # The two points that are farthest apart lie on the hull, which has few points.
        hull = outline[ConvexHull(outline).vertices]
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
