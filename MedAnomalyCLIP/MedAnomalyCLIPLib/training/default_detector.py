"""The recipe of the bundled detector: `python -m MedAnomalyCLIPLib.training.default_detector --help`.

A folder of images with manifests and the teacher's weights in, a bundle out, by the stages of
`default_stages`. An interrupted run goes on where it stopped. Only training images are learned from,
thresholds come from the validation images, and the test images are looked at once, for the figures on the
model card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..bundle import FORMAT, BundleManifest, default_bundle_path, save_bundle
from ..clip.specification import TowerSpec
from ..clip.towers import text_side
from ..configuration import to_mapping
from ..datasets.planes import planes_of
from ..datasets.records import ImageRecord, read_manifest
from ..detection import SliceDetector
from ..detectors.detector import AnomalyDetector
from ..detectors.specification import (
    AdapterSpec,
    ClusterSpec,
    DetectorSpec,
    FamiliaritySpec,
    PresetSpec,
    TextSpec,
)
from ..errors import InvalidRequest, MedAnomalyCLIPError
from ..evaluation.image_sets import detect_records, set_figures
from ..preprocess import STANDARD_WINDOWS, PreprocessSpec, SlicePreprocessor
from ..runtime import select_device
from .anomaly_batches import AnomalyImages
from .default_stages import DefaultRecipe, Place, bar, name_of, train_stages
from .finishing import calibrate, training_sources
from .image_set import inner_square, pack, read_lesion_mask
from .joint import JointModel, JointTraining, text_banks
from .model_card import model_card
from .packed_set import read_packed_set, write_packed_set
from .tower import CLIP_MEAN, CLIP_STD, TowerTraining
from .volume_slices import volume_slices

PACKED_SIDE = 256
Training = TypeVar("Training", TowerTraining, JointTraining)
SLICES_PER_AXIS = 24
LOOKS_AT_ONCE = 16
DRAWS = 1000  # of the bootstrap, for the card's intervals
HELD_OUT_HEAD = "template_ch2"  # a healthy head that is kept for the question how often it is flagged
TOWER = TowerSpec("MedAnomalyCLIP-S16", 256, (2, 4, 6, 8), conv_stem=(32, 64, 128, 256))
PRESETS = (
    PresetSpec("brain-mr", "Brain, MR", ("MR",), "brain", ("head", "skull", "cerebr", "neuro")),
    PresetSpec("brain-ct", "Brain, CT", ("CT",), "brain", ("head", "skull", "cerebr", "neuro")),
    PresetSpec("breast-us", "Breast, ultrasound", ("US",), "breast", ("mamma",)),
    PresetSpec("breast-mr", "Breast, MR", ("MR",), "breast", ("mamma",)),
    PresetSpec("thyroid-us", "Thyroid, ultrasound", ("US",), "thyroid"),
    PresetSpec("chest-xr", "Chest, X-ray", ("XR",), "chest", ("thorax", "lung", "cxr")),
    PresetSpec("chest-ct", "Chest, CT", ("CT",), "chest", ("thorax", "lung")),
    PresetSpec("abdomen-ct", "Abdomen, CT", ("CT",), "abdomen", ("liver", "pelvis", "trunk")),
    PresetSpec("hand-xr", "Hand, X-ray", ("XR",), "hand", ("wrist",)),
    PresetSpec("fundus", "Eye, fundus photograph", ("fundus",), "eye (retina)", ("eye", "retina", "fundus")),
)
DETECTOR = DetectorSpec(
    TOWER,
    fusion="mean_then_softmax",
    image_score="class_and_peak",
    smoothing=3.0,
    adapter=AdapterSpec(subdivisions=2),
    text=TextSpec(prompts="presets"),
    clusters=ClusterSpec(weight=0.0),
    presets=PRESETS,
    familiarity=FamiliaritySpec(rows=900),
)
PREPROCESS = PreprocessSpec(
    size=TOWER.image_size,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    windows=dict(STANDARD_WINDOWS),
    colour="grey",
)
HOW_MADE = """\
A vision transformer behind a convolution stem and a small text tower. First, features and sentences: the
vision tower learns to give what an ImageNet MobileNetV2 gives (the teacher, not shipped), whatever the
appearance of a view, and both towers to match images with sentences made from what the sources say of each
image. Then everything at once: the same, and the heads of the detector, which compare patches and images with
sentences about their kind, on outlined lesions, on lesions painted into normal images, and on images with a
label alone. The weights are running averages. Thresholds come from validation images. The test images below
took no part in fitting or in thresholds.

`text_tower.safetensors` is the small text tower. Detection reads it only for a reader's own phrases; other
detectors are trained from it, and it stands under the same terms."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train and measure the bundled detector.")
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="folder with manifest.csv, and pool/ and volumes/ with theirs if there are any",
    )
    add("--teacher", type=Path, help="safetensors file of the ImageNet MobileNetV2")
    add("--work", type=Path, required=True, help="folder for packed images, checkpoints and logs")
    add("--output", type=Path, help="folder of the bundle (default: the bundled detector's)")
    add("--start", type=Path, metavar="BUNDLE", help="detector whose CLIP training goes on from")
    add(
        "--without",
        nargs="+",
        default=[],
        metavar="SET",
        help="sets or clusters to leave out of all training",
    )
    add("--device", default="auto")
    add("--workers", type=int, default=0, help="processes that draw and paint ahead")
    for stage in ("tower", "joint"):
        add(
            f"--{stage}", nargs="+", default=[], metavar="NAME=NUMBER", help=f"numbers of the stage {stage!r}"
        )
    add("--seed", type=int, default=0)
    add("--pack", type=Path, metavar="FILE", help="write the training images into one file, and stop")
    add(
        "--packed",
        type=Path,
        metavar="FILE",
        help="learn from such a file; without --data, stop when all is trained, and go on later with --data",
    )
    arguments = parser.parse_args(argv)
    try:
        _run_as_asked(arguments)
    except MedAnomalyCLIPError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run_as_asked(arguments: argparse.Namespace) -> None:
    if arguments.data is None and arguments.packed is None:
        raise InvalidRequest("Say with --data where the images are, or with --packed which file holds them")
    images = _images(arguments.data, arguments.packed, tuple(arguments.without), arguments.work)
    if arguments.pack is not None:
        write_packed_set(arguments.pack, images)
        return
    if arguments.teacher is None:
        raise InvalidRequest("Say with --teacher where the weights of the teacher are")
    seed = arguments.seed
    recipe = DefaultRecipe(
        _changed(TowerTraining(seed=seed), arguments.tower),
        _changed(JointTraining(seed=seed), arguments.joint),
        tuple(arguments.without),
    )
    device = select_device(arguments.device)
    place = Place(arguments.work, arguments.teacher, device, arguments.workers, arguments.start)
    run(recipe, images, arguments.data, arguments.output or default_bundle_path(), place)


def _images(data: Path | None, packed: Path | None, without: Sequence[str], work: Path) -> AnomalyImages:
    """What is learned from, out of the folder or the packed file."""
    if packed is not None:
        images = read_packed_set(packed)
        kept = set(_not_left_out(images.records, without))
        return images.chosen([i for i, record in enumerate(images.records) if record in kept])
    assert data is not None
    training = training_records(read_records(data), data, without)
    return anomaly_images(training, pack(training, work, PACKED_SIDE, bar("pack")))


def run(
    recipe: DefaultRecipe,
    images: AnomalyImages,
    data: Path | None,
    output: Path,
    place: Place,
    detector_spec: DetectorSpec = DETECTOR,
) -> None:
    """All stages; with the folder of the data also thresholds, figures and the bundle."""
    records = [] if data is None else read_records(data)
    valid = [record for record in records if record.split == "valid"]

    def measure(step: int, model: JointModel) -> dict[str, float]:
        """A point of the learning curve, on validation images."""
        if not valid or step % (4 * recipe.joint.checkpoint_every):
            return {}
        return learning_figures(model, images.records, valid, place)

    model = train_stages(recipe, images, detector_spec, place, measure)
    if data is None:
        return
    detector = model.detector.cpu().eval()
    store_text(detector, model.clip.cpu())
    learned = training_records(records, data, recipe.without)
    fill_looks(detector, learned)
    manifest = _manifest_of(detector, learned)
    # Not in the place of a finished detector before it is one itself.
    ready = _as_bundle(manifest, detector, place.work / "uncalibrated", place.device)
    manifest = calibrate(manifest, ready, valid, bar("calibrate"))
    calibrated = save_bundle(place.work / "calibrated", manifest, detector, "", text_side(model.clip))
    ready = SliceDetector.load(calibrated.folder, device=str(place.device), precision="float32")
    tested = [record for record in records if record.split == "test"]
    manifest = replace(manifest, quality=_measure(ready, tested))
    started = "" if place.start is None else name_of(place.start)
    card = model_card(manifest, HOW_MADE, {**to_mapping(recipe), "started from": started})
    save_bundle(output, manifest, detector, card, text_side(model.clip))


def read_records(data: Path) -> list[ImageRecord]:
    """All images of a folder with manifests."""
    pool = data / "pool" / "manifest.csv"
    return [*read_manifest(data / "manifest.csv"), *(read_manifest(pool) if pool.is_file() else [])]


def training_records(
    records: Sequence[ImageRecord], data: Path, without: Sequence[str] = ()
) -> list[ImageRecord]:
    """What may be learned from: training images, the pool, slices of volumes.

    Raises:
        InvalidRequest: a set that is to be left out is not there.
    """
    volumes = data / "volumes" / "manifest.csv"
    slices = volume_slices(volumes, SLICES_PER_AXIS) if volumes.is_file() else []
    offered = [*(r for r in records if r.split in ("train", "pool")), *slices]
    return _not_left_out(offered, without)


def _not_left_out(records: Sequence[ImageRecord], without: Sequence[str]) -> list[ImageRecord]:
    unknown = sorted(set(without) - {r.set for r in records} - {r.cluster for r in records})
    if unknown:
        raise InvalidRequest(f"There is no set or cluster {', '.join(unknown)} to leave out")
    left_out = {*without, HELD_OUT_HEAD}
    return [r for r in records if r.set not in left_out and r.cluster not in left_out]


def anomaly_images(records: Sequence[ImageRecord], packed: np.ndarray) -> AnomalyImages:
    """Packed images with their outlined lesions."""
    masks = {index: read_lesion_mask(record, PACKED_SIDE) for index, record in enumerate(records)}
    return AnomalyImages(
        records,
        packed,
        {index: mask for index, mask in masks.items() if mask is not None},
        np.array([inner_square(record) for record in records], dtype=np.float32),
    )


def learning_figures(
    model: JointModel, learned: Sequence[ImageRecord], valid: Sequence[ImageRecord], place: Place
) -> dict[str, float]:
    """What a model reaches on validation images, by set and figure; leaves it on the CPU."""
    detector = model.detector.cpu().eval()
    store_text(detector, model.clip.cpu())
    ready = _as_bundle(_manifest_of(detector, learned), detector, place.work / "curve", place.device)
    return _flat(_measure(ready, valid, quiet=True))


@torch.no_grad()
def store_text(detector: AnomalyDetector, clip: Any) -> None:
    """Put what the sentences of all presets mean into the detector; both on the CPU."""
    any_kind, presets = text_banks(clip.eval(), detector.spec)
    detector.text_bank.copy_(any_kind)
    if len(presets):
        detector.preset_banks.copy_(presets)


@torch.no_grad()
def fill_looks(detector: AnomalyDetector, records: Sequence[ImageRecord]) -> None:
    """Let the detector know the looks of some of what it learned from, so that it can tell what is unlike."""
    if detector.spec.familiarity is None:
        return
    rows = detector.spec.familiarity.rows
    chosen = [records[i] for i in _evenly(records, rows)]
    parts = [chosen[at : at + LOOKS_AT_ONCE] for at in range(0, rows, LOOKS_AT_ONCE)]
    detector.familiarity.fill(torch.cat([_look(detector, part) for part in parts]))


def _evenly(records: Sequence[ImageRecord], count: int) -> np.ndarray:
    """Indices of images, of each collection as many as of the others where it has them.

    Raises:
        InvalidRequest: there are not so many images.
    """
    if len(records) < count:
        raise InvalidRequest(
            f"The detector is to know the looks of {count} images, but there are {len(records)}"
        )
    rng = np.random.default_rng(0)
    sets = [record.set for record in records]
    rank = np.zeros(len(records))
    for name in dict.fromkeys(sets):
        own = np.flatnonzero(np.array(sets) == name)
        rank[rng.permutation(own)] = np.arange(len(own))
    return np.sort(np.argsort(rank, kind="stable")[:count])


def _look(detector: AnomalyDetector, records: Sequence[ImageRecord]) -> Tensor:
    """(B, D) looks of images, prepared as any image is that a detector is given."""
    preprocessor = SlicePreprocessor(PREPROCESS)
    prepared = [preprocessor.prepare(plane) for plane in planes_of(records)]
    valid = torch.stack([item.valid for item in prepared])
    return detector.look(detector.align(torch.stack([item.tensor for item in prepared])), valid)


def _manifest_of(detector: AnomalyDetector, training: Sequence[ImageRecord]) -> BundleManifest:
    return BundleManifest(
        format=FORMAT,
        name="MedAnomalyCLIP default",
        version="3",
        description="Compact CLIP that compares patches and images with sentences about their kind",
        licence="Research use only: the terms of several training collections are research-only or unstated",
        detector=detector.spec,
        preprocess=PREPROCESS,
        threshold=0.5,
        training_data=training_sources(training),
    )


def _as_bundle(
    manifest: BundleManifest, detector: AnomalyDetector, place: Path, device: torch.device
) -> SliceDetector:
    """The detector read back from disk, so that thresholds belong to weights as they are stored."""
    bundle = save_bundle(place, manifest, detector, "")
    return SliceDetector.load(bundle.folder, device=str(device), precision="float32")


def _measure(
    detector: SliceDetector, records: Sequence[ImageRecord], *, quiet: bool = False
) -> dict[str, dict[str, float]]:
    quality = {}
    for name in dict.fromkeys(record.set for record in records):
        chosen = [record for record in records if record.set == name]
        results = detect_records(detector, chosen, None if quiet else bar(f"measure {name}"))
        quality[name] = set_figures(chosen, results, 0 if quiet else DRAWS)
    return quality


def _flat(quality: dict[str, dict[str, float]]) -> dict[str, float]:
    """Those figures that a learning curve shows."""
    shown = ("image auroc", "pixel ap", "pixel pro")
    return {
        f"{name} {key}": figures[key] for name, figures in quality.items() for key in shown if key in figures
    }


def _changed(training: Training, changes: Sequence[str]) -> Training:
    """Numbers of a stage with some NAME=NUMBER changed.

    Raises:
        InvalidRequest: there is no such number, or this is none.
    """
    known = {name: value for name, value in to_mapping(training).items() if type(value) in (int, float)}
    found: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            found[name] = type(known[name])(text)
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"{change}: write one of {', '.join(known)} and a number") from error
    return replace(training, **found)


if __name__ == "__main__":
    sys.exit(main())
