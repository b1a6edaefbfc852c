"""Thresholds and the normal reference of a bundle, from what its detector says of normal images.

Importable with what detection needs, as the panel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.stats import binom
from torch import Tensor

from ..bundle import BundleManifest, NormalReference
from ..detectors.detector import Detection

NORMAL_PIXELS_BELOW = 0.995  # share of normal pixels below the threshold where no lesion is outlined
NORMAL_IMAGES_BELOW = 0.95
CONFIDENCE = 0.8


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


def specific_threshold(scores: Sequence[float]) -> float:
    """Score that 95 % of normal images do not exceed, with a confidence of 80 %.

    The plain quantile of a few images is exceeded by more than 5 % of others about every other time. So it is
    the lowest score that is an upper bound of that quantile with this confidence, whatever the distribution
    (Hahn & Meeker, Statistical Intervals, 1991, section 5.2); of fewer than 32 scores, of which none is, the
    highest.
    """
    count = len(scores)
    # With this chance no more than so many of `count` images lie below the quantile.
    bounds = binom.cdf(np.arange(count), count, NORMAL_IMAGES_BELOW) >= CONFIDENCE
    return float(sorted(scores)[int(bounds.argmax()) if bounds.any() else count - 1])


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
        image_threshold=specific_threshold(scores),
        reference=NormalReference(description, tuple(sorted(scores))),
    )
