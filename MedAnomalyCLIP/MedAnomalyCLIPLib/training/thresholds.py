"""Thresholds and the normal reference of a bundle, from what its detector says of normal images.

Importable with what detection needs, as the panel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..bundle import BundleManifest, NormalReference
from ..detectors.detector import Detection

NORMAL_PIXELS_BELOW = 0.995  # share of normal pixels below the threshold where no lesion is outlined
NORMAL_IMAGES_BELOW = 0.95


class HeldOut(NamedTuple):
    """What a detector says of normal images that its memory was without.

    Attributes:
        scores: of each view.
        pixels: map values where images are, of all views.
    """

    scores: list[float]
    pixels: np.ndarray

    @classmethod
    def of(cls, detections: Sequence[Detection], valid: Tensor) -> HeldOut:
        """From one image each, and (K, S, S) bool where they are."""
        pixels = [d.map[shown[None]].cpu().numpy() for d, shown in zip(detections, valid, strict=True)]
        return cls([float(d.score) for d in detections], np.concatenate(pixels))


def with_held_out(manifest: BundleManifest, held_out: HeldOut, description: str) -> BundleManifest:
    """Thresholds that most of the held-out normal images and nearly all of their pixels stay below."""
    return replace(
        with_reference(manifest, held_out.scores, description),
        threshold=float(np.quantile(held_out.pixels, NORMAL_PIXELS_BELOW)),
    )


def with_reference(manifest: BundleManifest, scores: Sequence[float], description: str) -> BundleManifest:
    """The scores of normal images, and the image threshold that most of them stay below."""
    if not scores:
        return manifest
    return replace(
        manifest,
        image_threshold=float(np.quantile(scores, NORMAL_IMAGES_BELOW)),
        reference=NormalReference(description, tuple(sorted(scores))),
    )
