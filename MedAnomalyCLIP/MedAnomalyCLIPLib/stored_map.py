"""How a map is kept in the voxels of a node: map and mask in, signed values out, and exactly back.

    0 to 1      the map
    below 0     minus the map: reaches the threshold, in a part smaller than the smallest area
    -2          not analysed, or no image there

So one lower limit of display hides what does not count, a slice that was not looked at is never taken for a
normal one, and nothing is lost: threshold and smallest area can be changed without detecting again.
"""

from __future__ import annotations

import numpy as np

from .result import AnomalyResult

NOT_ANALYSED = np.float32(-2)


def to_stored(result: AnomalyResult) -> np.ndarray:
    """(H, W) float32 as kept in a node, on the plane's own grid."""
    signed = np.where(result.dropped, -result.map, result.map)
    return np.where(result.plane.valid, signed, NOT_ANALYSED).astype(np.float32, copy=False)


def from_stored(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map, 0 where there is none, and where there is one: both of the shape given, float32 and bool."""
    valid = stored >= -1
    return np.where(valid, np.abs(stored), np.float32(0)), valid
