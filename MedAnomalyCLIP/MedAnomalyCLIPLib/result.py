"""What a detector says about one slice, and everything needed to explain it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .components import drop_small, largest_diameter
from .geometry import SlicePlane

RESEARCH_USE_ONLY = "Research use only. A candidate, not a diagnosis."
UNLIKE = "Unlike what this detector was made for: its score says little."


@dataclass(frozen=True)
class Provenance:
    """Which detector made a result, and on what.

    Attributes:
        bundle: name of the detector's bundle.
        bundle_version: its version.
        bundle_sha256: hash of its weights.
        software_version: version of this package.
        device: for example "cpu" or "cuda:0".
        precision: what the network's large products were computed in, for example "float32" or "int8".
        runtime: what computed, for example "PyTorch 2.13.0"; empty where it was not kept.
    """

    bundle: str
    bundle_version: str
    bundle_sha256: str
    software_version: str
    device: str
    precision: str
    runtime: str = ""


@dataclass(frozen=True, eq=False)
class AnomalyResult:
    """Score, map and mask of one slice.

    Attributes:
        plane: the slice as it was when detection was asked for.
        score: image-level anomaly score in [0, 1].
        map: (H, W) float32 in [0, 1] on the plane's own grid; 0 where the plane has no image.
        threshold: map value from which a pixel counts as anomalous.
        provenance: detector, device, versions.
        percentile: share in % of the detector's normal reference images that score lower; None when the
            bundle has no reference.
        image_threshold: score that 95 % of such images do not exceed; None when the bundle has none.
        prompt: what the image was compared with, in words, for example "Brain, MR"; empty for the detector's
            only text.
        unlikeness: distance from the images that the detector learned from; None when it does not know them.
        unlike_threshold: distance that nearly all images of the kinds that it learned from stay below.
        window: (darkest, brightest) pixel value that the detector told apart; None for colour.
        is_empty: whether the slice shows nothing but noise, so that nothing was looked for.
        timings: seconds spent in each step.
        min_area_mm2: connected parts of the mask that are smaller are left out of it.
    """

    plane: SlicePlane
    score: float
    map: np.ndarray
    threshold: float
    provenance: Provenance
    percentile: float | None = None
    image_threshold: float | None = None
    prompt: str = ""
    unlikeness: float | None = None
    unlike_threshold: float | None = None
    window: tuple[float, float] | None = None
    is_empty: bool = False
    timings: Mapping[str, float] = field(default_factory=dict)
    min_area_mm2: float = 0.0

    def __post_init__(self) -> None:
        if self.map.shape != self.plane.shape:
            raise ValueError(f"map {self.map.shape} does not fit its plane {self.plane.shape}")

    @cached_property
    def mask(self) -> np.ndarray:
        """(H, W) bool: pixels of the image at or above the threshold, in parts that are large enough."""
        return drop_small(self._reached, self.min_area_mm2 / self.plane.pixel_area_mm2)

    @property
    def dropped(self) -> np.ndarray:
        """(H, W) bool: pixels that reach the threshold in parts too small for the mask."""
        return self._reached & ~self.mask

    @cached_property
    def _reached(self) -> np.ndarray:
        return (self.map >= self.threshold) & self.plane.valid

    @property
    def is_unlike(self) -> bool:
        """Whether the image is unlike what the detector was made for, so that its score says little."""
        if self.unlikeness is None or self.unlike_threshold is None:
            return False
        return self.unlikeness > self.unlike_threshold

    @property
    def area_mm2(self) -> float:
        """Area of the mask in mm², on the plane's own grid."""
        return float(self.mask.sum()) * self.plane.pixel_area_mm2

    @property
    def largest_diameter_mm(self) -> float:
        """Longest extent in mm of one connected part of the mask, on the plane's own grid; 0 for none."""
        return largest_diameter(self.mask, self.plane.ijk_to_ras[:3, :2])

    @property
    def peak(self) -> tuple[int, int]:
        """(row, column) of the highest map value."""
        row, column = np.unravel_index(int(np.argmax(self.map)), self.map.shape)
        return int(row), int(column)

    @property
    def peak_ras(self) -> np.ndarray:
        """(3,) position in RAS mm of the highest map value."""
        row, column = self.peak
        return self.plane.to_ras(column, row)
