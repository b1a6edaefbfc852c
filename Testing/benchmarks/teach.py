"""Measure teaching: its time, and how well what it makes tells painted anomalies from normal slices.

    python Testing/benchmarks/teach.py head.nii.gz --modality MR
    python Testing/benchmarks/teach.py head.nii.gz --exclude tumour.nii.gz --slices 16 --json figures.json

Takes normal slices of one volume, evenly spread, teaches a detector with them, and detects on slices that
lie between them: as they are, and with lesions painted in (`synthesis`, as in MediCLIP). Beside the taught
detector stands the one that it started from, on the same slices. The held-out slices are of the same patient,
so the figures say how teaching works, not how it does on the next patient.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "MedAnomalyCLIP"))

from MedAnomalyCLIPLib.background import LEAST_ANATOMY, Background  # noqa: E402
from MedAnomalyCLIPLib.detection import SliceDetector  # noqa: E402
from MedAnomalyCLIPLib.evaluation.metrics import ranking_figures  # noqa: E402
from MedAnomalyCLIPLib.geometry import SlicePlane, acquisition_axis, cut_slice  # noqa: E402
from MedAnomalyCLIPLib.neighbours import NEAR_MM  # noqa: E402
from MedAnomalyCLIPLib.preprocess import SlicePreprocessor  # noqa: E402
from MedAnomalyCLIPLib.synthesis import (  # noqa: E402
    AnomalySynthesizer,
    SynthesisConfig,
    foreground,
    sample_generator,
)
from MedAnomalyCLIPLib.taught_detector import TaughtDetector  # noqa: E402
from MedAnomalyCLIPLib.teaching import teach  # noqa: E402
from MedAnomalyCLIPLib.volume import Volume, read_volume  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A slice to detect on, and where something was painted into it (all False where nothing was)."""

    plane: SlicePlane
    mask: np.ndarray


def main() -> None:
    arguments = parse_arguments()
    volume = read_volume(arguments.volume, modality=arguments.modality)
    axis = acquisition_axis(volume) if arguments.axis is None else arguments.axis
    taught_at, held_out = divided(
        volume, axis, normal_slices(volume, axis, arguments.exclude), arguments.slices
    )
    planes = [cut_slice(volume, axis, index) for index in taught_at]
    warm_up(planes)

    begun, processor = time.perf_counter(), time.process_time()
    taught = teach(planes, name="Benchmark", start=arguments.start, device="cpu")
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    cases = [
        case
        for number, index in enumerate(held_out)
        for case in painted(cut_slice(volume, axis, index), number, arguments.seed)
    ]
    report = {
        "volume": {"size": volume.size, "spacing": [round(s, 2) for s in volume.spacing], "axis": axis},
        "slices": {"taught": taught_at, "held_out": held_out},
        "seconds": {"wall": round(seconds, 2), "processor": round(processor, 2)},
        "leave_one_out": [round(one.score, 4) for one in taught.left_one_out],
        "threshold": round(taught.bundle.manifest.threshold, 4),
        "taught": figures(SliceDetector.load(taught.bundle.folder, device="cpu"), cases),
        "before": figures(SliceDetector.load(arguments.start, device="cpu"), cases),
    }
    tell(report, taught)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("volume", type=Path, help="volume file, or folder of a DICOM series")
    parser.add_argument("--modality", help="DICOM code, for files that do not say it")
    parser.add_argument("--exclude", type=Path, help="segmentation; slices that it marks are not normal")
    parser.add_argument("--axis", type=int, choices=(0, 1, 2), help="I, J or K; as acquired if left out")
    parser.add_argument("--slices", type=int, default=16, help="to teach with")
    parser.add_argument("--start", type=Path, help="detector to start from; the bundled one if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the painted anomalies")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def normal_slices(volume: Volume, axis: int, exclude: Path | None) -> list[int]:
    """Slices that show something and that no segmentation marks."""
    background = Background.of(volume)
    marked = np.zeros(volume.size[axis], dtype=bool)
    if exclude is not None:
        marked = (read_volume(exclude).voxels > 0).any(axis=tuple(a for a in range(3) if a != 2 - axis))
    return [
        index
        for index in range(volume.size[axis])
        if not marked[index] and background.anatomy_share(cut_slice(volume, axis, index)) >= LEAST_ANATOMY
    ]


def divided(volume: Volume, axis: int, normal: list[int], count: int) -> tuple[list[int], list[int]]:
    """Slices to teach with, evenly spread, and those between them that are no near copies of any."""
    chosen = sorted({normal[round(place)] for place in np.linspace(0, len(normal) - 1, count)})
    step = volume.spacing[axis]
    # Where the taught slices themselves lie closer together, as far from them as can be.
    apart = min(NEAR_MM, step * np.diff(chosen).min() / 2)
    return chosen, [i for i in normal if min(abs(i - taught) * step for taught in chosen) >= apart]


def warm_up(planes: list[SlicePlane]) -> None:
    """Import what teaching imports, so that its time is that of teaching."""
    next(SliceDetector.load(device="cpu").detect_many(planes[:1]))


def painted(plane: SlicePlane, number: int, seed: int) -> list[Case]:
    """A slice as it is, and with one kind of lesion each painted into its window."""
    clean = np.zeros(plane.shape, dtype=bool)
    cases = [Case(plane, clean)]
    grey = plane.pixels if plane.pixels.ndim == 2 else plane.pixels.mean(axis=2)
    low, high = window(plane)
    image = np.clip((np.nan_to_num(grey) - low) / (high - low), 0, 1).astype(np.float32)
    body = foreground(image)
    synthesizer = AnomalySynthesizer(SynthesisConfig())
    for place, kind in enumerate(("cut_paste", "gauss_intensity", "source_deformation")):
        found = synthesizer.paint(kind, image, body, sample_generator(seed, place, number))
        if found.mask.any():
            changed = np.where(found.mask, low + (high - low) * found.image, grey).astype(np.float32)
            cases.append(Case(replace(plane, pixels=changed), found.mask))
    return cases


def window(plane: SlicePlane) -> tuple[float, float]:
    """What the bundled detector shows as black and white on this slice."""
    from MedAnomalyCLIPLib.bundle import default_bundle_path, read_manifest

    low, high = SlicePreprocessor(read_manifest(default_bundle_path()).preprocess).prepare(plane).window
    return low, max(high, low + 1e-6)


def figures(detector: SliceDetector, cases: list[Case]) -> dict[str, float]:
    """Image and pixel AUROC, and shares of normal and of painted slices at or above the image threshold."""
    results = list(detector.detect_many(case.plane for case in cases))
    scores = np.array([result.score for result in results])
    abnormal = np.array([case.mask.any() for case in cases])
    inside = [result.plane.valid for result in results]
    pixels = np.concatenate([result.map[shown] for result, shown in zip(results, inside, strict=True)])
    lesion = np.concatenate([case.mask[shown] for case, shown in zip(cases, inside, strict=True)])
    reached = scores >= (detector.image_threshold or 1.0)
    image, pixel = ranking_figures(scores, abnormal), ranking_figures(pixels, lesion)
    return {
        "normal": int((~abnormal).sum()),
        "painted": int(abnormal.sum()),
        "image_auroc": round(image["auroc"], 3),
        "pixel_auroc": round(pixel["auroc"], 3),
        "pixel_ap": round(pixel["ap"], 3),
        "false_alarms": round(float(reached[~abnormal].mean()), 3),
        "found": round(float(reached[abnormal].mean()), 3),
    }


def tell(report: dict, taught: TaughtDetector) -> None:
    size = taught.bundle.manifest.weights_bytes / 1e6
    seconds = report["seconds"]
    print(f"{len(taught.left_one_out)} slices taught in {seconds['wall']:.1f} s", end=" ")
    print(f"({seconds['processor']:.1f} s of processor), {size:.1f} MB")
    for name in ("taught", "before"):
        print(f"{name:8}", ", ".join(f"{key} {value}" for key, value in report[name].items()))


if __name__ == "__main__":
    main()
