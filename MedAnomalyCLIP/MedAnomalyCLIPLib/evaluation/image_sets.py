"""Measure a detector on 2-D image sets, through the same door as a user's file.

Records and a detector in, a row of figures for each set out, with trivial baselines in the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..datasets.planes import lesion_mask, planes_of
from ..datasets.records import ImageRecord
from ..detection import SliceDetector
from ..geometry import SlicePlane
from ..result import AnomalyResult
from .baselines import image_baselines, pixel_baselines
from .metrics import pixel_figures, ranking_figures

Figures = dict[str, float]


def detect_records(
    detector: SliceDetector,
    records: Sequence[ImageRecord],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[AnomalyResult]:
    """Results in the order of the records."""
    results = []
    for result in detector.detect_many(planes_of(records), batch_size=16):
        results.append(result)
        if on_progress is not None:
            on_progress(len(results), len(records))
    return results


def set_figures(records: Sequence[ImageRecord], results: Sequence[AnomalyResult]) -> Figures:
    """Image and pixel figures of one set, and the best that trivial baselines reach on it.

    The direction of each trivial image feature is chosen with the labels, so it is an upper value. Pixel
    figures leave out abnormal images without a mask.
    """
    labels = np.array([bool(record.abnormal) for record in records])
    figures: Figures = {"images": float(len(records)), "abnormal": float(labels.sum())}
    scores = np.array([result.score for result in results])
    figures |= {f"image {name}": value for name, value in ranking_figures(scores, labels).items()}
    greys = [_grey(result.plane) for result in results]
    features = [image_baselines(grey) for grey in greys]
    for name in features[0]:
        area = ranking_figures(np.array([f[name] for f in features]), labels).get("auroc")
        if area is not None:
            figures[f"image auroc of {name}"] = max(area, 1 - area)

    masks = [lesion_mask(record, result.plane) for record, result in zip(records, results, strict=True)]
    known = [i for i, mask in enumerate(masks) if mask is not None]
    if not any(masks[i].any() for i in known):  # type: ignore[union-attr]
        return figures
    chosen = [masks[i] for i in known if masks[i] is not None]
    measured = pixel_figures([results[i].map for i in known], chosen)  # type: ignore[arg-type]
    figures |= {f"pixel {name}": value for name, value in measured.items()}
    for name in ("brightness", "darkness", "centre"):
        trivial = pixel_figures([pixel_baselines(greys[i])[name] for i in known], chosen)  # type: ignore[arg-type]
        figures |= {f"pixel {key} of {name}": value for key, value in trivial.items()}
    return figures


def _grey(plane: SlicePlane) -> np.ndarray:
    """(H, W) in [0, 1] of an 8-bit picture."""
    pixels = plane.pixels.astype(np.float32) / 255
    return pixels.mean(axis=2) if pixels.ndim == 3 else pixels
