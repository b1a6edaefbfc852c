"""Measure the bundled detector: `python -m MedAnomalyCLIPLib.training.default_figures --help`.

The data that it was trained with and a bundle in; a folder out with the evaluation's report on the test
images, and `figures.json` with what no report of labelled sets tells: a memory of few normal images, a
healthy head that was left out of training, images unlike those of training, and time. Every question and its
rule stood here before the first answer was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from ..bundle import default_bundle_path
from ..datasets.planes import planes_of
from ..datasets.records import ImageRecord
from ..detection import SliceDetector
from ..errors import InvalidRequest, MedAnomalyCLIPError
from ..evaluation.image_sets import detect_records, mean_and_spread, set_figures
from ..evaluation.report import evaluate
from ..geometry import SlicePlane
from ..output_folder import writing
from ..overlay import render_overlay
from ..prompt import Prompt
from ..result import AnomalyResult
from ..runtime import TORCH
from ..torch_network import TorchNetwork
from .default_detector import HELD_OUT_HEAD, read_records
from .recipe import read_recipe
from .trainer import train

SHOTS = (4, 16)
SEEDS = (0, 1, 2)
SHOWN = ("image auroc", "pixel auroc", "pixel ap", "pixel pro")
CENTRE_CROPPED = "cxr_kermany"  # the shape of its pictures gives the class away
UNLIKE_EACH = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions that were asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure the bundled detector beyond labelled sets.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that it was trained with")
    add("--model", type=Path, help="folder of the bundle (default: the bundled one)")
    add("--few-shot-sets", nargs="+", default=[], metavar="SET", help="sets to show few normal images of")
    add(
        "--unlike-sets", nargs="+", default=[], metavar="SET", help="sets whose kind took no part in training"
    )
    add("--skip", nargs="+", default=[], choices=QUESTIONS, help="questions to leave out")
    add("--output", type=Path, required=True, help="folder of the answers")
    add("--device", default="auto")
    arguments = parser.parse_args(argv)
    try:
        figures = _answer(arguments)
        with writing(arguments.output):
            text = json.dumps(figures, indent=2)
            (arguments.output / "figures.json").write_text(text + "\n", encoding="utf-8")
    except MedAnomalyCLIPError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return 0


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    bundle = arguments.model or default_bundle_path()
    records = read_records(arguments.data)
    detector = SliceDetector.load(bundle, device=arguments.device, runtime=TORCH, precision="float32")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tested = [record for record in records if record.split == "test"]
    figures: dict[str, Any] = {"detector": detector.provenance.bundle_sha256}
    if "report" not in arguments.skip:
        evaluate(bundle, tested, output / "report", device=arguments.device, overwrite=True)
        figures["centre-cropped"] = centre_cropped(detector, [r for r in tested if r.set == CENTRE_CROPPED])
    if "few-shot" not in arguments.skip:
        figures["few-shot"] = {
            name: few_shot(bundle, records, name, output / "few-shot", arguments.device)
            for name in arguments.few_shot_sets
        }
    if "healthy" not in arguments.skip:
        head = [record for record in records if record.cluster == HELD_OUT_HEAD]
        figures["healthy head"] = healthy(detector, head, output / "healthy head")
    if "unlike" not in arguments.skip:
        figures["unlike"] = unlike(detector, records, arguments.unlike_sets)
    if "time" not in arguments.skip:
        figures["milliseconds"] = milliseconds(detector, tested)
    return figures


QUESTIONS = ("report", "few-shot", "healthy", "unlike", "time")


def centre_cropped(detector: SliceDetector, records: Sequence[ImageRecord]) -> dict[str, float]:
    """Image AUROC of a set whose pictures are cut to the square in their middle."""
    if not records:
        return {}
    scores = [
        detector.detect(
            _central_square(plane), prompt=Prompt(detector.guess_preset(record.modality, record.body_part))
        ).score
        for record, plane in zip(records, planes_of(records), strict=True)
    ]
    return {"image auroc": float(roc_auc_score([bool(r.abnormal) for r in records], scores))}


def few_shot(
    bundle: Path, records: Sequence[ImageRecord], name: str, work: Path, device: str
) -> dict[str, dict[str, list[float]]]:
    """Figures on a set's test images with a memory of k of its normal training images, mean and spread.

    Args:
        bundle: detector that has learned nothing from the set nor from its kin.
        records: all images.
        name: of the set.
        work: folder of the runs.
        device: where to run.
    """
    own = [record for record in records if record.set == name]
    tested = [record for record in own if record.split == "test"]
    if not tested:
        raise InvalidRequest(f"There is no set {name!r} with test images")
    learned = [replace(r, split="train") for r in own if r.split in ("train", "valid")]
    told: dict[str, dict[str, list[float]]] = {}
    for shots in SHOTS:
        drawn = []
        for seed in SEEDS:
            changes = [
                f"start={json.dumps(str(bundle))}",
                'data.protocol="few_shot"',
                f"data.normal={shots}",
                f"data.shots_seed={seed}",
            ]
            folder = work / f"{name}-{shots}-{seed}"
            trained = train(
                read_recipe("memory", changes), learned, folder, device=torch.device("cpu"), quiet=True
            )
            detector = SliceDetector.load(trained.bundle.folder, device=device, precision="float32")
            drawn.append(set_figures(tested, detect_records(detector, tested)))
        told[str(shots)] = {
            key: list(mean_and_spread(f[key] for f in drawn)) for key in SHOWN if key in drawn[0]
        }
    return told


def healthy(detector: SliceDetector, records: Sequence[ImageRecord], output: Path) -> dict[str, float]:
    """How many slices of a healthy head that was left out of training are flagged; their pictures."""
    if not records:
        return {}
    results = detect_records(detector, records)
    flagged = [r for r in results if r.image_threshold is not None and r.score >= r.image_threshold]
    output.mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(flagged):
        render_overlay(result).save(output / f"flagged-{number:02}.png")
    return {"slices": float(len(results)), "flagged": float(len(flagged))}


def unlike(
    detector: SliceDetector, records: Sequence[ImageRecord], unlike_sets: Sequence[str]
) -> dict[str, float]:
    """AUROC of unlikeness against test images of training kinds: of photographs, noise, kinds left out."""
    own = [r for r in records if r.split == "test" and r.set not in unlike_sets]
    familiar = _unlikeness(detect_records(detector, own[:: max(1, len(own) // 300)]))
    strangers = {
        "photographs": _photographs(),
        "noise": _noise(),
        **{
            name: list(planes_of([r for r in records if r.set == name][:UNLIKE_EACH])) for name in unlike_sets
        },
    }
    told = {}
    for name, planes in strangers.items():
        found = _unlikeness(list(detector.detect_many(planes)))
        labels = [0] * len(familiar) + [1] * len(found)
        told[name] = float(roc_auc_score(labels, [*familiar, *found]))
    limit = detector.unlike_threshold
    if limit is not None:
        told["training kinds called unlike"] = float(np.mean(np.array(familiar) > limit))
    return told


def milliseconds(detector: SliceDetector, records: Sequence[ImageRecord]) -> dict[str, float]:
    """Median time of one slice by itself: tower alone, and all the way from plane to map."""
    plane = next(planes_of(records[:1]))
    network = detector.network
    assert isinstance(network, TorchNetwork)  # only there can the tower be run alone
    images = torch.randn(1, 3, detector.input_size, detector.input_size, device=network.device)
    tower = network.module.tower
    whole, alone = [], []
    with torch.inference_mode():
        for _ in range(30):
            started = time.perf_counter()
            tower(images)
            alone.append(time.perf_counter() - started)
            started = time.perf_counter()
            detector.detect(plane)
            whole.append(time.perf_counter() - started)
    return {
        "tower": 1000 * float(np.median(alone[5:])),
        "plane to map": 1000 * float(np.median(whole[5:])),
        "threads": float(torch.get_num_threads()),
    }


def _unlikeness(results: Sequence[AnomalyResult]) -> list[float]:
    return [result.unlikeness for result in results if result.unlikeness is not None]


def _photographs() -> list[SlicePlane]:
    """Everyday pictures that come with scikit-image, in pieces."""
    from skimage import data

    pieces = []
    for name in (
        "astronaut",
        "chelsea",
        "coffee",
        "camera",
        "coins",
        "page",
        "text",
        "brick",
        "grass",
        "gravel",
    ):
        picture = getattr(data, name)()
        grey = picture.mean(axis=2) if picture.ndim == 3 else picture
        height, width = grey.shape
        half = min(height, width) // 2
        corners = [(0, 0), (0, width - half), (height - half, 0), (height - half, width - half)]
        pieces += [grey[r : r + half, c : c + half] for r, c in corners] + [grey]
    return [_plane(piece.astype(np.uint8)) for piece in pieces]


def _noise() -> list[SlicePlane]:
    """Noise of different grain."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    pictures = []
    for number in range(UNLIKE_EACH):
        noise = gaussian_filter(rng.normal(size=(256, 256)), (0, 1, 2, 4, 8)[number % 5])
        low, high = noise.min(), noise.max()
        pictures.append(((noise - low) / (high - low) * 255).astype(np.uint8))
    return [_plane(picture) for picture in pictures]


def _plane(pixels: np.ndarray) -> SlicePlane:
    return SlicePlane(pixels, np.eye(4), np.ones(pixels.shape[:2], dtype=bool))


def _central_square(plane: SlicePlane) -> SlicePlane:
    height, width = plane.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = (slice(top, top + side), slice(left, left + side))
    return replace(plane, pixels=plane.pixels[cut], valid=plane.valid[cut], aligned=None)


if __name__ == "__main__":
    sys.exit(main())
