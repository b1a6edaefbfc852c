"""Figures at pixel level, over the pixels of all images together: AUROC, AP, PRO, Dice.

Maps and lesion masks in, `PixelCounts` in between: for each image, how many pixels fall between neighbouring
thresholds. From these few thousand counts come the figures of all images and of every bootstrap draw, so tens
of millions of pixels are gone through once.

The thresholds are quantiles of the lesion pixels and of the other pixels, `_QUANTILES` of each. Maps with
fewer different values lose nothing; for others no figure is off by more than a quantile, 0.0005. Measured
on 20 million pixels: AUROC 1e-6, average precision 2e-4; 3 s and 0.2 GB instead of 39 s and 2.2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .metrics import Curve, Figures, ranking_figures, ranking_figures_of_draws

PRO_LIMIT = 0.3
_QUANTILES = 2048
_TOUCHING = np.ones((3, 3))  # also at corners, as scikit-image's and most published code has it


@dataclass(frozen=True, eq=False)
class LesionPixels:
    """Lesion masks, and how much of its region each lesion pixel is.

    Attributes:
        masks: N times (H, W) bool.
        shares: for each image, one over the size of its region for each lesion pixel, row by row.
        regions: (N,) number of connected regions.
    """

    masks: tuple[np.ndarray, ...]
    shares: tuple[np.ndarray, ...]
    regions: np.ndarray

    @classmethod
    def of(cls, masks: Sequence[np.ndarray]) -> LesionPixels:
        """Find the regions of masks; pixels that touch at a corner are of one region."""
        shares, regions = [], []
        for mask in masks:
            labels, count = ndimage.label(mask, structure=_TOUCHING)
            own = labels[mask]
            shares.append(1 / np.bincount(own, minlength=1)[own])
            regions.append(count)
        return cls(tuple(masks), tuple(shares), np.array(regions, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """Where the pixels of N images lie among T thresholds.

    Attributes:
        thresholds: (T,) ascending.
        lesion: (N, T) lesion pixels of each image from one threshold to below the next.
        normal: (N, T) likewise other pixels.
        covered: (N, T) likewise shares of regions, summed over the regions of the image.
        regions: (N,) number of regions.
    """

    thresholds: np.ndarray
    lesion: np.ndarray
    normal: np.ndarray
    covered: np.ndarray
    regions: np.ndarray

    @classmethod
    def of(cls, maps: Sequence[np.ndarray], truth: LesionPixels) -> PixelCounts:
        """Count the pixels of maps (H, W), each on the pixels of its mask."""
        lesion = np.concatenate([m[t] for m, t in zip(maps, truth.masks, strict=True)])
        normal = np.concatenate([m[~t] for m, t in zip(maps, truth.masks, strict=True)])
        quantiles = _quantiles(lesion)
        # A lesion pixel that gave a threshold is at the low end of what lies above it, which would favour the
        # lesions; it gets a place of its own.
        above = np.nextafter(quantiles, np.inf, dtype=quantiles.dtype)
        thresholds = np.unique(np.concatenate([quantiles, above, _quantiles(normal)]))
        size = len(thresholds)
        counts = np.zeros((3, len(maps), size), dtype=np.float32)
        for i, (values, mask) in enumerate(zip(maps, truth.masks, strict=True)):
            bins = np.searchsorted(thresholds, values, side="right") - 1
            counts[0, i] = np.bincount(bins[mask], minlength=size)
            counts[1, i] = np.bincount(bins[~mask], minlength=size)
            counts[2, i] = np.bincount(bins[mask], weights=truth.shares[i], minlength=size)
        return cls(thresholds, counts[0], counts[1], counts[2], truth.regions)

    def figures(self) -> Figures:
        """ "auroc", "ap", "f1max", "sensitivity" and "pro" of all images; empty without lesion pixels."""
        lesion, normal = (part.sum(axis=0, dtype=np.float64) for part in (self.lesion, self.normal))
        if not lesion.any() or not normal.any():
            return {}
        figures = ranking_figures(
            np.tile(self.thresholds, 2),
            np.repeat([True, False], len(self.thresholds)),
            np.concatenate([lesion, normal]),
        )
        once = np.ones((1, len(self.regions)))
        return figures | {"pro": float(self.figures_of_draws(once)["pro"][0])}

    def pro_curve(self) -> Curve:
        """(x, y) of the false positive rate and the mean overlap with a region, up to `PRO_LIMIT`."""
        alarms, covered = (np.cumsum(p.sum(axis=0)[::-1]) for p in (self.normal, self.covered))
        rate, overlap = np.append(0, alarms / alarms[-1]), np.append(0, covered / self.regions.sum())
        inside = rate <= PRO_LIMIT
        end = np.interp(PRO_LIMIT, rate, overlap)
        return np.append(rate[inside], PRO_LIMIT), np.append(overlap[inside], end)

    def figures_of_draws(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(D,) of the same figures, for D draws in which each image counts as often as (D, N) says."""
        hits, alarms, covered = (
            np.cumsum((weights @ part)[:, ::-1], axis=1) for part in (self.lesion, self.normal, self.covered)
        )
        regions = weights @ self.regions
        figures = ranking_figures_of_draws(hits, alarms, hits[:, -1], alarms[:, -1])
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap, rate = covered / regions[:, None], alarms / alarms[:, -1:]
        return figures | {"pro": area_up_to(rate, overlap, PRO_LIMIT) / PRO_LIMIT}


@dataclass(frozen=True, eq=False)
class Overlap:
    """Overlap of thresholded maps with their masks.

    Attributes:
        common, called, true: (N,) pixels of each image in both, in the thresholded map, in the mask.
    """

    common: np.ndarray
    called: np.ndarray
    true: np.ndarray

    @classmethod
    def of(cls, called: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Overlap:
        """Compare N thresholded maps (H, W) bool with N masks."""
        counts = [[(c & t).sum(), c.sum(), t.sum()] for c, t in zip(called, masks, strict=True)]
        return cls(*np.array(counts, dtype=np.float64).T)

    def figures_of_draws(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(D,) "dice" over all pixels together, and "dice per image", the mean over images with a lesion."""
        with np.errstate(invalid="ignore", divide="ignore"):
            pooled = 2 * (weights @ self.common) / (weights @ (self.called + self.true))
            each = np.where(self.true > 0, 2 * self.common / (self.called + self.true), 0)
            mean = weights @ each / (weights @ (self.true > 0))
        return {"dice": pooled, "dice per image": mean}

    def figures(self) -> Figures:
        """The same for all images."""
        once = np.ones((1, len(self.true)))
        return {name: float(values[0]) for name, values in self.figures_of_draws(once).items()}


def pixel_figures(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Figures:
    """Figures over the pixels of all images together; maps and masks (H, W), each pair of one size."""
    return PixelCounts.of(maps, LesionPixels.of(masks)).figures()


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """(D,) area below D curves (D, T) from (0, 0) to x = `limit`, straight between their points."""
    left, start = np.pad(x, ((0, 0), (1, 0)))[:, :-1], np.pad(y, ((0, 0), (1, 0)))[:, :-1]
    width = x - left
    used = np.clip(limit - left, 0, width)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.where(width > 0, (y - start) / width, 0)
    return (used * (start + slope * used / 2)).sum(axis=1)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Up to `_QUANTILES` of the values themselves, the lowest and the highest among them."""
    if not values.size:
        return values
    ordered = np.sort(values)
    return ordered[np.linspace(0, len(ordered) - 1, min(_QUANTILES, len(ordered))).astype(np.intp)]
