"""Evaluate a detector on labelled images and write the report: JSON, CSV and one page of HTML.

Bundle and records in, a folder out that is complete when it appears. Nothing in it tells whose images they
are: no file name and no path, unless the caller asks for names.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..datasets.checking import DatasetReport, check_records
from ..datasets.records import ImageRecord
from ..detection import SliceDetector
from ..errors import InvalidRequest
from ..output_folder import OutputFolder, writing
from ..result import RESEARCH_USE_ONLY, AnomalyResult
from .bootstrap import LEVEL
from .charts import thinned
from .contact_sheet import OUTCOMES, OperatingPoint, contact_sheet
from .image_sets import POOLED, SetMeasurement, detect_records, mean_and_spread, measure_sets
from .metrics import SPECIFICITY, scikit_learn_metrics
from .page import Spread, report_page
from .pixels import PRO_LIMIT

MANIFEST, FIGURES, IMAGES, PAGE = "report.json", "figures.csv", "images.csv", "report.html"
SCHEMA_VERSION = 1

Progress = Callable[[str, int, int], None]
DetectorLoader = Callable[["Path | str | None", str], SliceDetector]


def load_detector(bundle: Path | str | None, device: str) -> SliceDetector:
    """The detector in a bundle's folder, or the bundled one, ready on its device."""
    return SliceDetector.load(bundle, device=device)


@dataclass(frozen=True, eq=False)
class _Run:
    """One detector on all images."""

    detector: SliceDetector
    results: list[AnomalyResult]
    measured: list[SetMeasurement]


def evaluate(
    bundle: Path | str | Sequence[Path | str] | None,
    records: Sequence[ImageRecord],
    output: Path | str,
    *,
    device: str = "auto",
    draws: int = 1000,
    seed: int = 0,
    names: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    load: DetectorLoader = load_detector,
) -> dict[str, Any]:
    """Check the images, detect on all of them, measure, and write the report.

    Args:
        bundle: folder of the detector; None for the bundled one; several folders for detectors that learned
            from different draws of support images, of which mean and standard deviation are told.
        records: labelled images, usually those of the test split.
        output: folder of the report.
        device: see `runtime.select_device`.
        draws: of the bootstrap, 0 for no intervals; seed: of the bootstrap.
        names: whether `images.csv` tells the names of the image files; they may tell who a patient is.
        overwrite: replace an earlier report.
        on_progress: called with what is being done, and how much of it is done and to do.
        is_cancelled: asked after each image.
        load: what turns a bundle and a device name into a detector.

    Returns:
        The content of `report.json`.

    Raises:
        DatasetInvalid: images cannot be used as they are; told before the first one is detected on.
        OutputFailed: the folder cannot be written, or holds something else.
        Cancelled: `is_cancelled` said so; nothing is written.
    """
    labelled = [record for record in records if record.abnormal is not None]
    if len({record.abnormal for record in labelled}) < 2:
        raise InvalidRequest(
            f"{len(labelled)} of {len(records)} images have a label, but not both normal and abnormal are "
            "among them: there is nothing to tell apart"
        )
    scikit_learn_metrics()
    step = on_progress or (lambda stage, done, total: None)
    with OutputFolder(output, MANIFEST, overwrite=overwrite) as folder:
        checked = check_records(labelled, on_progress=lambda *n: step("check", *n), is_cancelled=is_cancelled)
        checked.require()
        runs = []
        for path in [bundle] if bundle is None or isinstance(bundle, (str, Path)) else bundle:
            detector = load(path, device)
            results = detect_records(detector, labelled, lambda *n: step("detect", *n), is_cancelled)
            measured = measure_sets(
                labelled,
                results,
                draws=draws,
                seed=seed,
                on_progress=lambda *n: step("measure", *n),
                is_cancelled=is_cancelled,
            )
            runs.append(_Run(detector, results, measured))
        point = operating_point(runs[0].detector, labelled, runs[0].results)
        bootstrap = {"draws": draws, "seed": seed, "level": LEVEL}
        manifest = _manifest(runs, labelled, checked, point, bootstrap)
        with writing(folder.place):
            _write_files(folder.staging, manifest, runs, labelled, point, names)
    return manifest


def operating_point(
    detector: SliceDetector, records: Sequence[ImageRecord], results: Sequence[AnomalyResult]
) -> OperatingPoint:
    """The bundle's own image threshold, or else the score that few of these normal images reach."""
    if detector.image_threshold is not None:
        return OperatingPoint(detector.image_threshold, "the detector's own threshold")
    normal = [result.score for record, result in zip(records, results, strict=True) if not record.abnormal]
    limit = float(np.quantile(normal, SPECIFICITY))
    return OperatingPoint(limit, f"which {1 - SPECIFICITY:.0%} of these normal images reach")


def _manifest(
    runs: Sequence[_Run],
    records: Sequence[ImageRecord],
    checked: DatasetReport,
    point: OperatingPoint,
    bootstrap: Mapping[str, Any],
) -> dict[str, Any]:
    first = runs[0]
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": RESEARCH_USE_ONLY,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "software": {"name": "medanomalyclip", "version": __version__},
        "detectors": [_describe(run.detector) for run in runs],
        "image_threshold": {"score": point.threshold, "origin": point.origin},
        "bootstrap": bootstrap,
        "specificity": SPECIFICITY,
        "pro_limit": PRO_LIMIT,
        "images": [vars(count) for count in checked.counts],
        "notes": _notes(checked),
        "sets": [
            _set_entry(entry, _outcomes(entry, records, first.results, point)) for entry in first.measured
        ],
        "over_draws": [
            {"set": name, "level": level, "figures": {k: list(v) for k, v in figures.items()}}
            for (name, level), figures in _over_draws(runs).items()
        ],
        "files": [FIGURES, IMAGES, PAGE, MANIFEST],
    }


def _notes(checked: DatasetReport) -> list[str]:
    """What a reader of the figures has to know, without the names of files."""
    notes = [
        problem.kind + (f" ({len(problem.places)} times)" if len(problem.places) > 1 else "")
        for problem in checked.problems
    ]
    learned = [count.set for count in checked.counts if count.split == "train"]
    if learned:
        notes.append(f"training images of {', '.join(learned)} are among those measured")
    return notes


def _describe(detector: SliceDetector) -> dict[str, Any]:
    origin = detector.provenance
    return {
        "name": origin.bundle,
        "version": origin.bundle_version,
        "sha256": origin.bundle_sha256,
        "threshold": detector.threshold,
        "device": origin.device,
        "precision": origin.precision,
    }


def _outcomes(
    entry: SetMeasurement,
    records: Sequence[ImageRecord],
    results: Sequence[AnomalyResult],
    point: OperatingPoint,
) -> dict[str, int]:
    own = [
        point.outcome(record, result)
        for record, result in zip(records, results, strict=True)
        if entry.name in (record.set, POOLED)
    ]
    return {outcome: own.count(outcome) for outcome in OUTCOMES}


def _set_entry(entry: SetMeasurement, outcomes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "normal": entry.normal,
        "abnormal": entry.abnormal,
        "masks": entry.masks,
        "at_image_threshold": outcomes,
        "rows": [
            {
                "level": row.level,
                "ranker": row.ranker,
                "figures": row.figures,
                "intervals": {name: list(interval) for name, interval in row.intervals.items()},
            }
            for row in entry.rows
        ],
        "curves": {
            name: [np.round(axis, 5).tolist() for axis in thinned(curve)]
            for name, curve in entry.curves.items()
        },
    }


def _over_draws(runs: Sequence[_Run]) -> Spread:
    """Mean and standard deviation of the detector's figures, when there are several."""
    if len(runs) < 2:
        return {}
    spread = {}
    for entry in runs[0].measured:
        for level in ("image", "pixel"):
            rows = [next(m for m in run.measured if m.name == entry.name).row(level) for run in runs]
            figures = [row.figures for row in rows if row is not None]
            if figures:
                spread[entry.name, level] = {
                    name: mean_and_spread(each[name] for each in figures) for name in figures[0]
                }
    return spread


def _write_files(
    staging: Path,
    manifest: Mapping[str, Any],
    runs: Sequence[_Run],
    records: Sequence[ImageRecord],
    point: OperatingPoint,
    names: bool,
) -> None:
    _write_table(staging / FIGURES, list(_figure_lines(runs)))
    _write_table(staging / IMAGES, list(_image_lines(runs, records, point, names)))
    picture = io.BytesIO()
    contact_sheet(records, runs[0].results, point).save(picture, "PNG", optimize=True)
    sheet = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    page = report_page("Evaluation report", _facts(manifest), runs[0].measured, _over_draws(runs), sheet)
    (staging / PAGE).write_text(page, encoding="utf-8")
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _facts(manifest: Mapping[str, Any]) -> list[str]:
    """What the page says above its tables."""
    detectors = manifest["detectors"]
    first = detectors[0]
    named = f"Detector {first['name']} {first['version']} ({first['sha256'][:12]})"
    if len(detectors) > 1:
        named += f" and {len(detectors) - 1} more that learned from other draws; intervals, curves and "
        named += "examples are those of the first"
    threshold = manifest["image_threshold"]
    entry = manifest["sets"][-1]["at_image_threshold"]
    counts = ", ".join(f"{number} {outcome}" for outcome, number in entry.items())
    images = "; ".join(
        f"{c['set']} {c['split']} {c['normal']} normal, {c['abnormal']} abnormal ({c['masks']} outlined)"
        for c in manifest["images"]
    )
    drawn = manifest["bootstrap"]
    return [
        f"{named}, pixel threshold {first['threshold']:.2f}.",
        f"Images: {images}." + "".join(f" Note: {note}." for note in manifest["notes"]),
        f"Image threshold {threshold['score']:.2f}, {threshold['origin']}: {counts}.",
        f"Bootstrap: {drawn['draws']} draws, seed {drawn['seed']}, patients and clusters kept together. "
        f"Written by medanomalyclip {manifest['software']['version']}, {manifest['created']}.",
    ]


def _figure_lines(runs: Sequence[_Run]) -> Iterator[dict[str, Any]]:
    for draw, run in enumerate(runs):
        for entry in run.measured:
            for row in entry.rows:
                for name, value in row.figures.items():
                    low, high = row.intervals.get(name, ("", ""))
                    yield {
                        "draw": draw,
                        "set": entry.name,
                        "level": row.level,
                        "ranker": row.ranker,
                        "figure": name,
                        "value": value,
                        "low": low,
                        "high": high,
                        "notice": RESEARCH_USE_ONLY,
                    }


def _image_lines(
    runs: Sequence[_Run], records: Sequence[ImageRecord], point: OperatingPoint, names: bool
) -> Iterator[dict[str, Any]]:
    """One line for each image and detector; images are numbered as they were given."""
    for draw, run in enumerate(runs):
        for number, (record, result) in enumerate(zip(records, run.results, strict=True), start=1):
            yield {
                "draw": draw,
                "number": number,
                **({"name": record.path.name} if names else {}),
                "slice": "" if record.slice_at is None else record.slice_at[1],
                "set": record.set,
                "split": record.split,
                "abnormal": int(bool(record.abnormal)),
                "score": round(result.score, 6),
                "percentile": "" if result.percentile is None else round(result.percentile, 2),
                "area_pixels": int(result.mask.sum()),
                "outcome": point.outcome(record, result),
                "notice": RESEARCH_USE_ONLY,
            }


def _write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]) if lines else [], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
