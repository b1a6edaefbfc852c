"""How much of a slice shows something: tissue told from the air around it, quickly and for any modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .geometry import SlicePlane
    from .volume import Volume

LEAST_ANATOMY = 0.05
"""A slice that shows less than this share of its pixels is hardly worth learning from."""

EMPTY = 1e-4
"""A slice of which fewer pixels show something holds noise and nothing else."""

_SAMPLED = 8  # each eighth pixel of each eighth row mostly shows enough
_LOOKED_AT = 32  # voxels along each axis are enough to learn what a volume holds
_CONTRAST = 0.1
_AIR = -1000.0  # in HU; scanners write anything below it where nothing was measured


@dataclass(frozen=True)
class Background:
    """What surrounds the body in a volume.

    Attributes:
        value: of the voxels along the volume's edges.
        contrast: how far from it a pixel has to be to show something.
    """

    value: float
    contrast: float

    @classmethod
    def of(cls, volume: Volume) -> Background:
        """Learn it from a few of the volume's voxels."""
        steps = tuple(slice(None, None, max(1, size // _LOOKED_AT)) for size in volume.voxels.shape[:3])
        grey = _grey(volume.voxels[steps], volume.is_colour, volume.units)
        inner = [np.isin(np.arange(size), (0, size - 1)) for size in grey.shape]
        on_faces = inner[0][:, None, None].astype(int) + inner[1][:, None] + inner[2]
        finite = np.isfinite(grey)
        if not finite.any():
            return cls(0.0, np.inf)
        edges = grey[finite & (on_faces >= 2)]
        low, high = np.percentile(grey[finite], (0.5, 99.5))
        value = float(np.median(edges)) if edges.size else float(low)
        return cls(value, float(_CONTRAST * (high - low)) or np.inf)

    def is_all_of(self, plane: SlicePlane) -> bool:
        """Whether a plane shows nothing beside it, but for noise."""
        from scipy.ndimage import uniform_filter

        coarse = np.s_[::_SAMPLED, ::_SAMPLED]
        if self._shown(plane, coarse).sum() >= EMPTY * plane.valid.size:  # as nearly all planes, told at once
            return False
        # Single pixels of noise stand out, and in a small slice enough of them; with their neighbours none.
        grey = _grey(plane.pixels, plane.pixels.ndim == 3, plane.units)
        grey = np.where(np.isfinite(grey), grey, self.value)  # else one pixel would spoil its row
        return float((self._stands_out(uniform_filter(grey, 3)) & plane.valid).mean()) < EMPTY

    def anatomy_share(self, plane: SlicePlane) -> float:
        """Share of a plane's pixels that differ from the background, from 0 to 1."""
        return float(self._shown(plane, np.s_[:, :]).mean())

    def _shown(self, plane: SlicePlane, where: tuple[slice, slice]) -> np.ndarray:
        """Which pixels of a part of a plane differ from the background."""
        grey = _grey(plane.pixels[where], plane.pixels.ndim == 3, plane.units)
        return self._stands_out(grey) & plane.valid[where]

    def _stands_out(self, grey: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.abs(grey - self.value) > self.contrast


def _grey(pixels: np.ndarray, colour: bool, units: str) -> np.ndarray:
    """float32, colours averaged."""
    with np.errstate(over="ignore"):
        grey = pixels.astype(np.float32)
    if colour:
        grey = grey.mean(axis=-1)
    return np.maximum(grey, _AIR) if units == "HU" else grey
