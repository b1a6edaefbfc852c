"""What the bundled detector's heads learn by, with the towers or alone: losses of maps and of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..detectors.detector import Aligned, AnomalyDetector
from ..detectors.scoring import anomaly_map, smooth, two_class_cosines
from .losses import dice_loss, focal_loss, image_loss

PEAK_SHARE = 0.001  # of pixels, whose mean stands for the highest one while training


@dataclass(frozen=True)
class TermWeights:
    """Weights of the losses: `focal`, `dice` of maps, `image` of the score, `peak` of the highest pixels."""

    focal: float = 4.0
    dice: float = 1.0
    image: float = 1.0
    peak: float = 0.5

    def sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss: all four terms of `anomaly_terms`, weighted; a scalar."""
        weighted = (self.focal * terms["focal"], self.dice * terms["dice"], self.image * terms["image"])
        return sum(weighted, self.peak * terms["peak"])


class Truth(NamedTuple):
    """What is known of the images of a batch.

    Attributes:
        masks: (B, S, S) bool, lesions; the maps are made at this side.
        has_mask: (B,) bool, whether the mask is known.
        abnormal: (B,) float, 1 for abnormal.
        has_label: (B,) bool, whether that is known.
    """

    masks: Tensor
    has_mask: Tensor
    abnormal: Tensor
    has_label: Tensor

    def to(self, device: torch.device) -> Truth:
        return Truth(*(part.to(device) for part in self))


def anomaly_terms(
    detector: AnomalyDetector, aligned: Aligned, text: Tensor, truth: Truth
) -> dict[str, Tensor]:
    """The four losses of a batch, each a scalar.

    Args:
        detector: whose class head, scale, fusion and smoothing are used.
        aligned: what its heads gave for the images.
        text: (B, 2, E) what each image is compared with.
        truth: what is known of the images, on the device of the detector.
    """
    spec, side = detector.spec, truth.masks.shape[-1]
    maps = anomaly_map(
        [two_class_cosines(patches, text) for patches in aligned.segmentation.patches],
        aligned.grid,
        side,
        scale=spec.scale,
        fusion=spec.fusion,
    )
    outlined, labelled = truth.has_mask, truth.has_label
    masks, label = truth.masks[outlined].float(), truth.abnormal[labelled]
    score = detector.class_score(aligned, text, torch.ones_like(maps, dtype=torch.bool))
    smoothed = smooth(maps, spec.smoothing * side / spec.tower.image_size).flatten(1)
    highest = smoothed.topk(max(1, round(PEAK_SHARE * side**2)), dim=1).values.mean(1)
    return {
        "focal": focal_loss(maps[outlined], masks),
        "dice": dice_loss(maps[outlined], masks),
        "image": image_loss(score[labelled], label),
        "peak": image_loss(highest[labelled], label),
    }
