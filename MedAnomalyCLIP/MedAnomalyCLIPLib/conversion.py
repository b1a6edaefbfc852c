"""A published system's checkpoint and its CLIP in, a bundle that detects as the authors' code does out.

Every tensor of the checkpoint is used, or known to be read by nobody, or the reason to refuse it; likewise
every weight that the system needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bundle import FORMAT, Bundle, BundleManifest, check_bundle_place, file_sha256, save_bundle
from .clip.towers import check_trained_size, clip_with_state, find_clip_file
from .clip.weights import flattened, read_clip_state, read_weights
from .conversion_card import SourceFile, conversion_card
from .datasets import ImageRecord, planes_of, read_dataset
from .detectors.detector import AnomalyDetector
from .detectors.presets import CONVERTIBLE, PRESETS, Preset
from .detectors.published import NAMES, load_published, never_read
from .detectors.specification import DetectorSpec
from .detectors.support import SupportSet, remember
from .errors import BundleInvalid, InvalidRequest
from .preprocess import PreprocessSpec, SlicePreprocessor
from .training.views import VIEW_COUNT, few_shot_views

MOST_SUPPORT_IMAGES = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Attributes:
        bundle: the detector on disk.
        sources: the files that it was made of.
        used: how many weights of the checkpoint it is made of.
        unused: names in the checkpoint that the published code saves and never reads, and what is no tensor.
        notes: what its user has to know, in sentences.
    """

    bundle: Bundle
    sources: tuple[SourceFile, ...]
    used: int
    unused: tuple[str, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def convert(
    system: str,
    checkpoints: Sequence[Path],
    clip: Path | str,
    output: Path,
    *,
    shows: str = "",
    support: Path | None = None,
    threshold: float = 0.5,
    download: bool = False,
    overwrite: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> Conversion:
    """Make a bundle of published weights.

    Args:
        system: which of `presets.CONVERTIBLE` the weights are of.
        checkpoints: files that together hold them.
        clip: file of its CLIP, or name of pretrained weights that open_clip knows.
        output: folder of the bundle; it appears complete or not at all.
        shows: what the images show, for systems whose sentences name it, for example "Brain".
        support: labelled images whose normal ones fill the memory, for systems that have one.
        threshold: map value from which a pixel counts as anomalous.
        download: allow open_clip to fetch its pretrained weights over the network.
        overwrite: replace a bundle that is there.
        on_progress: called with a stage, and how much of it is done and to do.

    Raises:
        InvalidRequest: the system is unknown, or needs something that is not given, or has no use for it.
        UnreadableImage: a file cannot be read without running what is in it.
        BundleInvalid: weights do not fit; all mismatches are listed.
        OutputFailed: the place is taken, or cannot be written.
    """
    preset = _preset(system)
    spec = _spec(preset, system, shows, support)
    check_bundle_place(output, overwrite=overwrite)
    records = [] if support is None else _support_records(support)
    weights, others = _checkpoint_weights(checkpoints)
    unused = (*never_read(weights, NAMES[system]), *others)
    clip_file = find_clip_file(spec.tower, clip, download=download)
    preprocess = preset.preprocess
    normal, abnormal = _support_sets(records, preprocess, on_progress)
    on_progress("read weights and sentences", 0, 1)
    detector = _detector(system, spec, weights, clip_file, normal)
    if normal is not None:
        on_progress("remember support images", 0, 1)
        remember(detector, normal, abnormal)
    manifest = BundleManifest(
        format=FORMAT,
        name=f"{system} {shows}".strip(),
        version="1",
        description=f"Published weights, converted from {', '.join(path.name for path in checkpoints)}",
        licence=f"See the authors' repository: {preset.source}",
        detector=detector.spec,
        preprocess=preprocess,
        threshold=threshold,
    )
    sources = tuple(SourceFile(path.name, file_sha256(path)) for path in (*checkpoints, clip_file))
    notes = _notes(spec, records)
    card = conversion_card(manifest, system, preset.source, sources, unused, notes, output.name)
    bundle = save_bundle(output, manifest, detector, card)
    return Conversion(bundle, sources, len(weights) + len(others) - len(unused), unused, notes)


def _preset(system: str) -> Preset:
    if system not in CONVERTIBLE:
        raise InvalidRequest(f"There are no published weights of {system!r}, but of {', '.join(CONVERTIBLE)}")
    return PRESETS[system]


def _spec(preset: Preset, system: str, shows: str, support: Path | None) -> DetectorSpec:
    """The system's specification with what the user says; refuses what is missing or of no use."""
    spec = preset.detector
    named = spec.text.prompts in ("ensemble", "hybrid")
    if named and not shows:
        raise InvalidRequest(
            f"The sentences of {system} name what the images show; say it as its authors do, "
            "for example --object Brain"
        )
    if shows and not named:
        raise InvalidRequest(f"The prompts of {system} do not name what images show; leave --object away")
    if spec.memory is not None and support is None:
        raise InvalidRequest(
            f"{system} compares with normal images, which its checkpoint does not hold; give those that it "
            "was trained on with --support"
        )
    if support is not None and spec.memory is None:
        raise InvalidRequest(f"{system} compares with no images; leave --support away")
    return replace(spec, text=replace(spec.text, name=shows)) if named else spec


def _checkpoint_weights(paths: Sequence[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of all files under their joined names, and the names of what is no tensor."""
    weights: dict[str, Tensor] = {}
    others: list[str] = []
    for path in paths:
        tensors, plain = flattened(read_weights(path))
        twice = sorted(tensors.keys() & weights.keys())
        if twice:
            raise BundleInvalid(f"{path.name} holds what another file holds too: {', '.join(twice)}")
        weights |= tensors
        others += plain
    if not weights:
        raise BundleInvalid(f"There are no weights in {', '.join(path.name for path in paths)}")
    bad = sorted(name for name, value in weights.items() if not value.to(torch.float16).isfinite().all())
    if bad:
        raise BundleInvalid(
            f"These weights are no numbers, or too large for half precision: {', '.join(bad)}"
        )
    return weights, others


def _detector(
    system: str, spec: DetectorSpec, weights: dict[str, Tensor], clip_file: Path, normal: SupportSet | None
) -> AnomalyDetector:
    """The system with its weights; its memory, if any, has room for all of the normal images and is empty."""
    state = read_clip_state(clip_file)
    check_trained_size(spec.tower, state, clip_file.name)
    clip: Any = clip_with_state(spec.tower, state, clip_file.name)
    if normal is not None and spec.memory is not None:
        height, width = clip.visual.grid_size
        per_image = height * width + int(spec.memory.class_token)
        spec = replace(spec, memory=replace(spec.memory, rows=len(normal.images) * per_image))
    detector = AnomalyDetector(spec).eval()
    load_published(detector, system, weights, clip)
    return detector


def _support_records(folder: Path) -> list[ImageRecord]:
    """Labelled images of a set, but none of its test images.

    Raises:
        InvalidRequest: there are too few normal ones to learn how they differ, or too many to compare with.
    """
    records = [r for r in read_dataset(folder) if r.split != "test" and r.abnormal is not None]
    normal = sum(record.abnormal is False for record in records)
    if not 2 <= normal <= MOST_SUPPORT_IMAGES:
        raise InvalidRequest(
            f"{folder.name} has {normal} normal images beside those of its test split; give 2 to "
            f"{MOST_SUPPORT_IMAGES}, for example by a CSV manifest of chosen ones"
        )
    return records


def _support_sets(
    records: Sequence[ImageRecord], spec: PreprocessSpec, on_progress: Progress
) -> tuple[SupportSet | None, SupportSet | None]:
    """Normal images in the views that MVFA remembers, and abnormal ones as they are; None without any."""
    preprocessor = SlicePreprocessor(spec)
    views: list[tuple[Tensor, Tensor]] = []
    lesions: list[tuple[Tensor, Tensor]] = []
    for done, (record, plane) in enumerate(zip(records, planes_of(records), strict=True), start=1):
        prepared = preprocessor.prepare(plane)
        if record.abnormal:
            lesions.append((prepared.tensor[None], prepared.valid[None]))
        else:
            images, _, valid = few_shot_views(
                prepared.tensor, torch.zeros_like(prepared.valid), prepared.valid
            )
            views.append((images, valid))
        on_progress("read support images", done, len(records))
    originals = tuple(i for i in range(len(views)) for _ in range(VIEW_COUNT))
    return _joined(views, originals), _joined(lesions, ())


def _joined(parts: Sequence[tuple[Tensor, Tensor]], originals: tuple[int, ...]) -> SupportSet | None:
    if not parts:
        return None
    images, valid = zip(*parts, strict=True)
    return SupportSet(torch.cat(images), torch.cat(valid), originals)


def _notes(spec: DetectorSpec, records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """What a user of the bundle has to know, in sentences."""
    notes = []
    if spec.memory is not None:
        normal = sum(record.abnormal is False for record in records)
        notes.append(
            f"Its memory comes from {normal} normal images, the ranges of its evidence from these and "
            f"{len(records) - normal} abnormal ones. The published evaluation takes the ranges from the "
            "whole test set instead, which no single image has."
        )
    if spec.feature_fusion is not None:
        notes.append(
            f"It cannot detect alone: beside each image it needs {len(spec.feature_fusion.channels)} feature "
            "maps of a Stable Diffusion UNet, which are not part of it. Panel and command line refuse it; "
            "from Python, hand them in: SliceDetector.load(folder, features=...)."
        )
    return tuple(notes)
