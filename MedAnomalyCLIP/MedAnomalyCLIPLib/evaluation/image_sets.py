"""Measure a detector on sets of images, through the same door as a user's file.

Records and a detector in; for each set, and for all of them together, figures with bootstrap intervals out,
and those of trivial baselines beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..datasets.planes import lesion_mask, planes_of
from ..datasets.records import ImageRecord
from ..detection import SliceDetector
from ..errors import Cancelled
from ..overlay import display_window
from ..prompt import Prompt
from ..result import AnomalyResult
from .baselines import PIXEL_BASELINES, image_baselines, pixel_baseline
from .bootstrap import Interval, figures_in_parts, intervals, resampling_weights
from .metrics import Curve, Figures, ranking_curves, ranking_figures, ranking_figures_of_draws
from .pixels import LesionPixels, Overlap, PixelCounts

DETECTOR = "detector"
POOLED = "all sets together"


@dataclass(frozen=True)
class Row:
    """Figures of one ranking of images or pixels.

    Attributes:
        level: "image" or "pixel".
        ranker: "detector", or the name of a trivial baseline.
        figures: values by name.
        intervals: (low, high) of those figures that have one.
    """

    level: str
    ranker: str
    figures: Figures
    intervals: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class SetMeasurement:
    """What was measured on one set.

    Attributes:
        name: of the set.
        normal, abnormal: numbers of images.
        masks: abnormal images with a mask, which pixel figures rest on, together with the normal ones.
        rows: those of the detector first at each level.
        curves: (x, y) of the detector's "roc", "pr" and, with masks, "pro".
    """

    name: str
    normal: int
    abnormal: int
    masks: int
    rows: tuple[Row, ...]
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def row(self, level: str, ranker: str = DETECTOR) -> Row | None:
        return next((r for r in self.rows if (r.level, r.ranker) == (level, ranker)), None)


def detect_records(
    detector: SliceDetector,
    records: Sequence[ImageRecord],
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> list[AnomalyResult]:
    """Results in the order of the records, each with the detector's preset for what the record shows.

    Raises:
        Cancelled: `is_cancelled`, asked after each image, said so.
    """
    results: list[AnomalyResult] = []

    def preset_of(record: ImageRecord) -> str:
        return detector.guess_preset(record.modality, record.body_part)

    for preset, alike in itertools.groupby(records, preset_of):
        for result in detector.detect_many(planes_of(alike), prompt=Prompt(preset), batch_size=16):
            results.append(result)
            if on_progress is not None:
                on_progress(len(results), len(records))
            if is_cancelled is not None and is_cancelled():
                raise Cancelled(f"Stopped after {len(results)} of {len(records)} images")
    return results


def measure_sets(
    records: Sequence[ImageRecord],
    results: Sequence[AnomalyResult],
    *,
    draws: int = 1000,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> list[SetMeasurement]:
    """Each set by itself and, when there are several, all of them together.

    Args:
        records: labelled images; those without a label are left out.
        results: one for each record.
        draws: of the bootstrap; 0 for none.
        seed: of the bootstrap.
        on_progress: called with the number of sets done and to do.
        is_cancelled: asked before each set.

    Raises:
        Cancelled: `is_cancelled` said so.
    """
    sets: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record.abnormal is not None:
            sets.setdefault(record.set, []).append(index)
    if len(sets) > 1:
        sets[POOLED] = [index for members in list(sets.values()) for index in members]
    measured: list[SetMeasurement] = []
    for name, chosen in sets.items():
        if is_cancelled is not None and is_cancelled():
            raise Cancelled(f"Stopped after measuring {len(measured)} of {len(sets)} sets")
        own, found = [records[i] for i in chosen], [results[i] for i in chosen]
        measured.append(measure_set(name, own, found, draws=draws, seed=seed))
        if on_progress is not None:
            on_progress(len(measured), len(sets))
    return measured


def measure_set(
    name: str,
    records: Sequence[ImageRecord],
    results: Sequence[AnomalyResult],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> SetMeasurement:
    """Image and pixel figures of one set, and what trivial baselines reach on it.

    The direction of each trivial image feature is chosen with the labels, so it is an upper value. Pixel
    figures leave out abnormal images without a mask.
    """
    labels = np.array([bool(record.abnormal) for record in records])
    weights = resampling_weights(
        labels, [r.cluster for r in records], [r.set for r in records], draws=draws, seed=seed
    )
    greys = [_grey(result) for result in results]
    rows = _image_rows(labels, results, greys, weights)
    scores = np.array([result.score for result in results])
    curves = ranking_curves(scores, labels) if rows else {}
    masks = [lesion_mask(record, result.plane) for record, result in zip(records, results, strict=True)]
    known = [i for i, mask in enumerate(masks) if mask is not None]
    truth = LesionPixels.of([mask for mask in masks if mask is not None])
    if truth.regions.any() and not all(mask.all() for mask in truth.masks):
        own = None if weights is None else weights[:, known]
        pixel_rows, pro = _pixel_rows(truth, [results[i] for i in known], [greys[i] for i in known], own)
        rows, curves = rows + pixel_rows, curves | {"pro": pro}
    with_mask = sum(bool(labels[i]) for i in known)
    return SetMeasurement(name, int((~labels).sum()), int(labels.sum()), with_mask, tuple(rows), curves)


def set_figures(records: Sequence[ImageRecord], results: Sequence[AnomalyResult], draws: int = 0) -> Figures:
    """The figures of one set in one flat table, for a bundle's manifest, as in "pixel auroc of centre".

    With draws of the bootstrap, the detector's own figures have their intervals beside them, as in
    "image auroc low".
    """
    measured = measure_set("", records, results, draws=draws)
    flat: Figures = {"images": float(len(records)), "abnormal": float(measured.abnormal)}
    for row in measured.rows:
        of = "" if row.ranker == DETECTOR else f" of {row.ranker}"
        flat |= {f"{row.level} {name}{of}": value for name, value in row.figures.items()}
        if row.ranker == DETECTOR:
            for name, (low, high) in row.intervals.items():
                flat |= {f"{row.level} {name} low": low, f"{row.level} {name} high": high}
    return flat


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample) over draws of support images."""
    array = np.array(list(values))
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def _image_rows(
    labels: np.ndarray,
    results: Sequence[AnomalyResult],
    greys: Sequence[np.ndarray],
    weights: np.ndarray | None,
) -> list[Row]:
    features = [image_baselines(grey) for grey in greys]
    rankers = {DETECTOR: np.array([result.score for result in results])}
    for name in features[0]:
        values = np.array([feature[name] for feature in features])
        auroc = ranking_figures(values, labels).get("auroc", 1.0)
        rankers[name] = values if auroc >= 0.5 else -values
    rows = []
    for name, scores in rankers.items():
        figures = ranking_figures(scores, labels)
        if figures:
            spread: dict[str, np.ndarray] = {}
            if weights is not None:
                of_draws = partial(_image_figures_of_draws, scores, labels)
                spread = figures_in_parts(of_draws, weights)
            rows.append(Row("image", name, figures, intervals(spread)))
    return rows


def _image_figures_of_draws(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    taken, sick = weights[:, order], labels[order]
    hits, alarms = np.cumsum(taken * sick, axis=1), np.cumsum(taken * ~sick, axis=1)
    return ranking_figures_of_draws(
        hits[:, last_of_equals], alarms[:, last_of_equals], hits[:, -1], alarms[:, -1]
    )


def _pixel_rows(
    truth: LesionPixels,
    results: Sequence[AnomalyResult],
    greys: Sequence[np.ndarray],
    weights: np.ndarray | None,
) -> tuple[list[Row], Curve]:
    rows = []
    for name in (DETECTOR, *PIXEL_BASELINES):
        if name == DETECTOR:
            maps: list[np.ndarray] = [result.map for result in results]
        else:
            maps = [pixel_baseline(name, grey) for grey in greys]
        counts = PixelCounts.of(maps, truth)
        figures, spread = counts.figures(), {}
        if weights is not None:
            spread = figures_in_parts(counts.figures_of_draws, weights)
        if name == DETECTOR:
            curve = counts.pro_curve()
            overlap = Overlap.of([result.mask for result in results], truth.masks)
            figures |= overlap.figures()
            spread |= {} if weights is None else overlap.figures_of_draws(weights)
        rows.append(Row("pixel", name, figures, intervals(spread)))
    return rows, curve


def _grey(result: AnomalyResult) -> np.ndarray:
    """(H, W) float32 in [0, 1]: of an 8-bit picture its own values, of others what the window shows."""
    pixels = result.plane.pixels.astype(np.float32)
    low, high = (0.0, 255.0) if result.plane.pixels.dtype == np.uint8 else display_window(result)
    grey = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
    return grey.mean(axis=2) if grey.ndim == 3 else grey
