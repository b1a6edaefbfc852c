"""The recipe of the bundled detector: `python -m MedAnomalyCLIPLib.training.default_detector --help`.

A folder of images with manifests and the teacher's weights in, a bundle out. An interrupted run goes on where
it stopped. Only training images are learned from, thresholds come from the validation images, and the test
images are looked at once, for the figures on the model card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from ..bundle import (
    FORMAT,
    BundleManifest,
    default_bundle_path,
    save_bundle,
)
from ..clip.specification import TowerSpec
from ..clip.towers import text_side
from ..configuration import to_mapping
from ..datasets.records import ImageRecord, modality_family, read_manifest
from ..detection import SliceDetector
from ..detectors.detector import AnomalyDetector
from ..detectors.specification import DetectorSpec
from ..errors import BundleInvalid, MedAnomalyCLIPError
from ..evaluation.image_sets import detect_records, set_figures
from ..preprocess import STANDARD_WINDOWS, PreprocessSpec
from ..runtime import select_device
from ..tensor_file import write_tensors
from .finishing import calibrate, training_sources
from .image_set import pack, read_square_mask
from .log import TrainingLog
from .model_card import model_card
from .prompt_tuning import PromptTuning, TuningImages, tune_prompts
from .tower import CLIP_MEAN, CLIP_STD, TowerTraining, train_tower

PACKED_SIDE = 256
TOWER = TowerSpec("MedAnomalyCLIP-S16", 224, (2, 4, 6, 8), conv_stem=(32, 64, 128, 256))
DETECTOR = DetectorSpec(TOWER, fusion="mean_then_softmax", smoothing=4.0)
PREPROCESS = PreprocessSpec(
    size=TOWER.image_size,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    windows=dict(STANDARD_WINDOWS),
    colour="grey",
)
# Collections whose images nobody labelled, but which hold no lesions as far as their sources tell.
HEALTHY_COLLECTIONS = (
    "templates",
    "totalseg_ct",
    "mednist_abdomen_ct",
    "mednist_chest_ct",
    "mednist_breast_mr",
    "mednist_hand_xray",
)
HOW_MADE = """\
A vision transformer behind a convolution stem and a small text tower, from random weights: distillation of an
ImageNet MobileNetV2 (the teacher, not shipped), and image-sentence matching with sentences made from what the
sources say of each image. Then, with both towers frozen, one linear adapter for each tap and prompts behind
learned vectors (the parts of MediCLIP, MICCAI 2024), fitted to anomalies painted into normal images and to
the outlined lesions of the training images. Thresholds come from validation images. The test images below
took no part in fitting or in thresholds.

`text_tower.safetensors` is the small text tower. Detection does not read it; other detectors are trained from
it, and it stands under the same terms."""
ANATOMY = ("MR", "CT", "US", "XR", "fundus")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train and measure the bundled detector.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with manifest.csv, and pool/ if there is one"
    )
    parser.add_argument(
        "--teacher", type=Path, required=True, help="safetensors file of the ImageNet MobileNetV2"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for packed images, checkpoints and logs"
    )
    parser.add_argument("--output", type=Path, help="folder of the bundle (default: the bundled detector's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tower-steps", type=int, default=TowerTraining.steps)
    parser.add_argument("--prompt-steps", type=int, default=PromptTuning.steps)
    arguments = parser.parse_args(argv)
    try:
        run(
            arguments.data,
            arguments.teacher,
            arguments.work,
            arguments.output or default_bundle_path(),
            TowerTraining(steps=arguments.tower_steps),
            PromptTuning(steps=arguments.prompt_steps),
            select_device(arguments.device),
        )
    except MedAnomalyCLIPError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(
    data: Path,
    teacher: Path,
    work: Path,
    output: Path,
    tower_training: TowerTraining,
    tuning: PromptTuning,
    device: torch.device,
) -> None:
    """Tower, prompts, thresholds, figures, bundle."""
    records = [r for name in ("manifest.csv", "pool/manifest.csv") for r in _manifest(data / name)]
    training = [r for r in records if r.split in ("train", "pool")]
    images = pack(training, work / f"images-{PACKED_SIDE}.npy", PACKED_SIDE, _bar("pack"))
    with TrainingLog(work / "log" / "tower", tower_training.steps, title="tower") as log:
        clip = train_tower(
            TOWER,
            training,
            images,
            teacher,
            tower_training,
            work / "tower.safetensors",
            device=device,
            on_step=log.step,
        )
    detector = _tune(training, images, clip, tuning, device, work)

    manifest = BundleManifest(
        format=FORMAT,
        name="MedAnomalyCLIP default",
        version="1",
        description="Compact CLIP, linear adapters and learned prompts, fitted to painted and real lesions",
        licence="Research use only: the terms of several training collections are research-only or unstated",
        detector=DETECTOR,
        preprocess=PREPROCESS,
        threshold=0.5,
        training_data=training_sources(training),
    )
    # Not in the place of a finished detector before it is one itself.
    bundle = save_bundle(work / "uncalibrated", manifest, detector, "")
    ready = SliceDetector.load(bundle.folder, device=str(device))
    valid = [record for record in records if record.split == "valid"]
    manifest = calibrate(bundle.manifest, ready, valid, _bar("calibrate"))
    quality = _measure(ready, [r for r in records if r.split == "test"])
    manifest = replace(manifest, quality=quality)
    settings = {"tower": asdict(tower_training), "prompts": asdict(tuning)}
    save_bundle(output, manifest, detector, model_card(manifest, HOW_MADE, settings), text_side(clip))


def _tune(
    records: Sequence[ImageRecord],
    images: np.ndarray,
    clip: nn.Module,
    tuning: PromptTuning,
    device: torch.device,
    work: Path,
) -> AnomalyDetector:
    """The detector, from an earlier run where that came so far."""
    finished = work / "detector.safetensors"
    if finished.is_file():
        detector = AnomalyDetector(DETECTOR)
        try:
            with safe_open(finished, "pt") as file:
                settings = (file.metadata() or {}).get("settings")
            detector.load_state_dict(load_file(finished))
        except (SafetensorError, RuntimeError) as error:
            raise BundleInvalid(f"{finished.name} is from another recipe; delete it to tune anew") from error
        if settings != _settings(tuning):
            raise BundleInvalid(f"{finished.name} was tuned with other settings; delete it to tune anew")
        return detector.eval()
    normal = [i for i, record in enumerate(records) if can_be_painted(record)]
    lesions = {i: record.mask for i, record in enumerate(records) if record.mask is not None}
    learned_from = TuningImages(
        normal=_grey(images, normal),
        normal_odds=_odds([records[i] for i in normal]),
        lesions=_grey(images, list(lesions)),
        masks=np.stack([read_square_mask(mask, PACKED_SIDE) for mask in lesions.values()]),
        lesion_odds=_odds([records[i] for i in lesions]),
    )
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with TrainingLog(work / "log" / "prompts", tuning.steps, title="prompts") as log:
        detector = tune_prompts(
            DETECTOR, clip, learned_from, tuning, lambda x: (x - mean) / std, device=device, on_step=log.step
        )
    write_tensors(finished, detector.state_dict(), {"settings": _settings(tuning)})
    return detector


def _settings(tuning: PromptTuning) -> str:
    """What a detector was tuned with, so that a card never tells other numbers than those that made it."""
    return json.dumps(to_mapping(tuning), sort_keys=True)


def _grey(images: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """(n, H, W) uint8 of packed colour images."""
    return np.stack([images[i].mean(axis=0).astype(np.uint8) for i in chosen])


def _odds(records: Sequence[ImageRecord]) -> list[float]:
    """Relative odds of drawing each image: a collection counts with the square root of its size."""
    sets = [record.set for record in records]
    return [sets.count(record.set) ** -0.5 for record in records]


def can_be_painted(record: ImageRecord) -> bool:
    """Whether an image shows anatomy without a lesion, so that what is painted on it is the only one."""
    healthy = record.abnormal is False or record.set in HEALTHY_COLLECTIONS
    return healthy and modality_family(record.modality) in ANATOMY


def _measure(detector: SliceDetector, records: Sequence[ImageRecord]) -> dict[str, dict[str, float]]:
    quality = {}
    for name in dict.fromkeys(record.set for record in records):
        chosen = [record for record in records if record.set == name]
        quality[name] = set_figures(chosen, detect_records(detector, chosen, _bar(f"measure {name}")))
    return quality


def _manifest(path: Path) -> list[ImageRecord]:
    return read_manifest(path) if path.is_file() or path.parent.name != "pool" else []


def _bar(title: str) -> Callable[[int, int], None]:
    bar: tqdm = tqdm(desc=title, disable=None)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


if __name__ == "__main__":
    sys.exit(main())
