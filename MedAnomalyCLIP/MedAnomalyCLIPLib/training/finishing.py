"""From trained weights to a bundle: memory, thresholds, the normal reference, a card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bundle import (
    FORMAT,
    Bundle,
    BundleManifest,
    NormalReference,
    PresetCalibration,
    TrainingSource,
    save_bundle,
)
from ..configuration import to_mapping
from ..datasets.planes import lesion_mask
from ..datasets.records import ImageRecord, modality_family
from ..datasets.support import left_out_records
from ..detection import FeatureMaps, SliceDetector
from ..detectors.detector import AnomalyDetector
from ..detectors.support import SupportSet, remembering
from ..evaluation.image_sets import detect_records
from ..evaluation.metrics import best_f1_threshold
from ..neighbours import RULE
from ..result import AnomalyResult
from ..steps import Step, run_steps
from .images import ChosenImages
from .model_card import model_card
from .prepared import PreparedImages, Progress, network_input
from .recipe import Recipe
from .run_folder import UNCALIBRATED
from .thresholds import NORMAL_PIXELS_BELOW, HeldOut, specific_threshold, with_held_out, with_reference

FAMILIAR_BELOW = 0.99
FEWEST_NORMAL = 10  # images, below which a reference would say more than it knows


def finish(
    recipe: Recipe,
    detector: AnomalyDetector,
    chosen: ChosenImages,
    learned_from: PreparedImages,
    folder: Path,
    kept: dict[str, Any],
    *,
    device: torch.device,
    features: FeatureMaps | None = None,
    on_progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Bundle:
    """Fill the memory, find the thresholds, and write the bundle.

    Thresholds come from validation images where there are any; else from the images that were learned from,
    each without itself where a memory is all that knows them; the card says which.

    Args:
        recipe, chosen: of the training.
        detector: with trained weights, on the CPU.
        learned_from: the images, in all their views.
        folder: of the bundle.
        kept: epoch and validation figure of the weights.
        device: where to measure.
        features: gives the maps of another network, for detectors that fuse them.
        on_progress: on_progress(stage, done, all).
        is_cancelled: asked after each image that thresholds are measured on.
    """
    held_out: HeldOut | None = None
    if recipe.detector.memory is not None:
        left_out = torch.from_numpy(left_out_records(chosen.training))
        held_out = fill_memory(recipe, detector.to(device), learned_from, left_out, on_progress, is_cancelled)
        detector = detector.cpu()
    manifest = BundleManifest(
        format=FORMAT,
        name=recipe.name,
        version="1",
        description=recipe.description,
        licence="Research use only: that of its CLIP, its training images and its published system",
        detector=detector.spec,
        preprocess=recipe.preprocess,
        threshold=0.5,
        training_data=training_sources(chosen.training),
    )
    ready = _as_it_will_be(manifest, detector, folder.with_name(UNCALIBRATED), device, features)
    manifest = _calibrated(manifest, ready, chosen, held_out, on_progress, is_cancelled)
    settings = {"recipe": _told(recipe), "images": chosen.origin, "kept": kept}
    card = model_card(manifest, _how_made(recipe, chosen, kept), settings)
    return save_bundle(folder, manifest, detector, card)


def calibrate(
    manifest: BundleManifest,
    detector: SliceDetector,
    records: Sequence[ImageRecord],
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> BundleManifest:
    """Thresholds and the normal reference from labelled images, through the door that every face takes."""
    results = detect_records(detector, records, on_progress, is_cancelled)
    presets = [detector.guess_preset(record.modality, record.body_part) for record in records]
    calibrations = []
    for preset in detector.presets:
        chosen = [i for i, name in enumerate(presets) if name == preset.name]
        own, found = [records[i] for i in chosen], [results[i] for i in chosen]
        normal = [r.score for r, record in zip(found, own, strict=True) if record.abnormal is False]
        if len(normal) >= FEWEST_NORMAL:
            words = f"{len(normal)} normal validation images of {_sets(own)}"
            calibrations.append(
                PresetCalibration(
                    preset.name,
                    _pixel_threshold(own, found),
                    specific_threshold(normal),
                    NormalReference(words, tuple(sorted(normal))),
                )
            )
    normal = [r.score for r, record in zip(results, records, strict=True) if record.abnormal is False]
    return replace(
        with_reference(manifest, normal, f"{len(normal)} normal validation images of {_sets(records)}"),
        threshold=_pixel_threshold(records, results),
        calibrations=tuple(calibrations),
        unlike_threshold=_unlike_threshold(results),
    )


def _sets(records: Sequence[ImageRecord]) -> str:
    return ", ".join(dict.fromkeys(record.set for record in records))


def _unlike_threshold(results: Sequence[AnomalyResult]) -> float | None:
    """Distance from the training images that nearly all of these images of the same kinds stay below."""
    distances = [result.unlikeness for result in results if result.unlikeness is not None]
    return float(np.quantile(distances, FAMILIAR_BELOW)) if distances else None


def training_sources(records: Sequence[ImageRecord]) -> tuple[TrainingSource, ...]:
    """One entry for each collection, with its terms as the manifest gives them."""
    sources = []
    for name in dict.fromkeys(record.set for record in records):
        chosen = [record for record in records if record.set == name]
        shown = {(modality_family(r.modality), r.body_part) for r in chosen}
        content = sorted(", ".join(filter(None, words)) for words in shown)
        licences = sorted({r.licence or "not stated" for r in chosen})
        sources.append(TrainingSource(name, "; ".join(content), len(chosen), "; ".join(licences)))
    return tuple(sources)


def _as_it_will_be(
    manifest: BundleManifest,
    detector: AnomalyDetector,
    place: Path,
    device: torch.device,
    features: FeatureMaps | None,
) -> SliceDetector:
    """The detector read back from disk, so that thresholds belong to weights as they are stored."""
    try:
        save_bundle(place, manifest, detector, "")
        return SliceDetector.load(place, device=str(device), precision="float32", features=features)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def fill_memory(
    recipe: Recipe,
    detector: AnomalyDetector,
    prepared: PreparedImages,
    left_out: Tensor,
    on_progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> HeldOut:
    """Fill the memory from normal images; returns what it says of each view without its original.

    Args:
        recipe: of the training.
        detector: with a memory.
        prepared: images in all their views.
        left_out: (N, N) bool, which originals are left out for which, beside themselves.
        on_progress: on_progress(stage, done, all).
        is_cancelled: asked after each image, and while rows are chosen.
    """
    sets = []
    device = detector.text_bank.device
    for abnormal in (False, True):
        chosen = prepared[prepared.abnormal == abnormal]
        images = network_input(chosen.images.float() / 255, recipe.preprocess)
        of = chosen.origins
        views = SupportSet(images, chosen.valid, tuple(of.tolist()), left_out[of][:, of])
        sets.append(views._replace(images=images.to(device), valid=chosen.valid.to(device)))
    steps = remembering(detector, sets[0], sets[1] if len(sets[1].images) else None)

    def told(step: Step) -> None:
        if on_progress is not None:
            on_progress(step.stage, step.done, step.total)

    found = run_steps(steps, told, is_cancelled)
    return HeldOut.of(found, sets[0].valid)


def _calibrated(
    manifest: BundleManifest,
    detector: SliceDetector,
    chosen: ChosenImages,
    held_out: HeldOut | None,
    on_progress: Progress | None,
    is_cancelled: Callable[[], bool] | None,
) -> BundleManifest:
    def progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("thresholds", done, total)

    if any(record.abnormal is False for record in chosen.validation):
        return calibrate(manifest, detector, chosen.validation, progress, is_cancelled)
    if held_out is not None:
        words = f"{len(held_out.scores)} views of the normal images it remembers. {RULE}"
        return with_held_out(manifest, held_out, words)
    normal = [record for record in chosen.training if record.abnormal is False]
    found = calibrate(manifest, detector, normal, progress, is_cancelled)
    words = f"{len(normal)} normal images that it was trained on, so scores of others tend to be higher"
    return with_reference(found, found.reference.scores if found.reference else (), words)


def _pixel_threshold(records: Sequence[ImageRecord], results: Sequence[AnomalyResult]) -> float:
    """Best F1 where lesions are outlined; else what nearly all pixels of normal images stay below."""
    masks = [lesion_mask(record, result.plane) for record, result in zip(records, results, strict=True)]
    pairs = [(result.map, mask) for result, mask in zip(results, masks, strict=True) if mask is not None]
    if any(mask.any() for _, mask in pairs):
        return best_f1_threshold([m for m, _ in pairs], [m for _, m in pairs])
    normal = [r.map[r.plane.valid] for r, record in zip(results, records, strict=True) if not record.abnormal]
    return float(np.quantile(np.concatenate(normal), NORMAL_PIXELS_BELOW))


def _told(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a card tells it: names of files without their folders, which are nobody's concern."""
    told = to_mapping(recipe)
    told["clip"], told["start"] = Path(recipe.clip).name, Path(recipe.start).name
    told["data"]["shot_list"] = Path(recipe.data.shot_list).name
    return told


def _how_made(recipe: Recipe, chosen: ChosenImages, kept: dict[str, Any]) -> str:
    normal = sum(record.abnormal is False for record in chosen.training)
    abnormal = len(chosen.training) - normal
    lines = [
        f"{recipe.description}. Learned from {normal} normal and {abnormal} abnormal images "
        f"({chosen.origin}).",
    ]
    if recipe.optimisation.epochs:
        how = (
            "the last" if kept["figure"] is None else f"chosen on {len(chosen.validation)} validation images"
        )
        lines.append(f"Weights of epoch {kept['epoch']} of {recipe.optimisation.epochs}, {how}.")
    if recipe.start:
        lines.append(
            "It started from the weights of another detector; its card says what those learned from."
        )
    of_others = any(record.split == "test" for record in chosen.training)
    whose = f"Test images of {recipe.data.target}" if of_others else "Test images"
    lines.append(f"{whose} took no part in fitting, in the choice of the epoch or in thresholds.")
    return "\n".join(lines)
