"""What a detector's network is shown of a slice: after window, resampling and padding.

`SlicePlane` in, a picture with its caption out; no network is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .geometry import SlicePlane
from .numpy_preprocess import NumpyPreprocessor
from .preprocess import PreprocessSpec


@dataclass(frozen=True, eq=False)
class NetworkPicture:
    """A slice as the network sees it.

    Attributes:
        pixels: (S, S, 3) uint8.
        window: (low, high) stored values that became black and white.
        description: of the plane, in words.
    """

    pixels: np.ndarray
    window: tuple[float, float]
    description: str

    @property
    def side(self) -> int:
        """S, in pixels."""
        return self.pixels.shape[0]

    def save(self, path: Path) -> None:
        """Write it as PNG."""
        from PIL import Image

        Image.fromarray(self.pixels).save(path)


def network_picture(
    plane: SlicePlane, spec: PreprocessSpec, window: tuple[float, float] | None = None
) -> NetworkPicture:
    """Make the picture.

    Args:
        plane: the slice.
        spec: the detector's preprocessing.
        window: as for `SliceDetector.detect`.

    Raises:
        InvalidRequest: a window that is not two finite numbers in order.
    """
    preprocessor = NumpyPreprocessor(spec)
    prepared = preprocessor.prepare(plane, window)
    return NetworkPicture(preprocessor.picture(prepared), prepared.window, plane.description)
