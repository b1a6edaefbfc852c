"""The heat colour map, one for pictures and scene: number of colours in, RGB table out.

Black, purple, orange, pale yellow: lightness rises evenly from end to end, so the order of the colours
is seen without colour vision and survives a greyscale print. The colours are those of "inferno" by Nathaniel
Smith and Stéfan van der Walt (CC0), read at every sixteenth.
"""

from __future__ import annotations

import numpy as np

_ANCHORS = np.array(
    [
        (0, 0, 4),
        (11, 7, 36),
        (33, 12, 74),
        (61, 9, 101),
        (87, 16, 110),
        (113, 25, 110),
        (138, 34, 106),
        (163, 44, 97),
        (188, 55, 84),
        (208, 69, 69),
        (227, 89, 51),
        (241, 113, 31),
        (249, 140, 10),
        (252, 170, 15),
        (249, 201, 50),
        (242, 232, 101),
        (252, 255, 164),
    ],
    dtype=np.float64,
)


def heat_colours(n: int = 256) -> np.ndarray:
    """(n, 3) uint8 colours for anomaly values evenly spaced from 0 to 1."""
    at = np.linspace(0, len(_ANCHORS) - 1, n)
    channels = [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)
