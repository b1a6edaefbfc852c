"""What a detector is made of, as data; importable without torch, so that a bundle can be checked anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from ..clip.specification import TowerSpec
from ..errors import BundleInvalid

FUSIONS = ("mean_then_softmax", "softmax_then_mean")
IMAGE_SCORES = ("max_map", "mean_map")


@dataclass(frozen=True)
class DetectorSpec:
    """One detector as a row of configuration.

    Attributes:
        tower: the CLIP vision tower and its taps.
        scale: what cosines are multiplied with before the softmax, 1 / temperature.
        fusion: order of averaging over taps and softmax, see `scoring.anomaly_map`.
        image_score: how a map becomes a score, see `scoring.image_score`.
        smoothing: sigma in network pixels of the Gaussian that smooths the map.
    """

    tower: TowerSpec
    scale: float = 1 / 0.07
    fusion: str = "softmax_then_mean"
    image_score: str = "max_map"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for value, known in ((self.fusion, FUSIONS), (self.image_score, IMAGE_SCORES)):
            if value not in known:
                raise BundleInvalid(
                    f"Unknown value {value!r} in the detector; choose one of {', '.join(known)}"
                )
        if not self.scale > 0 or not self.smoothing >= 0:
            raise BundleInvalid("The detector's scale must be positive and its smoothing not negative")
