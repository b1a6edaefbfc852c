"""The recipe of the bundled detector: `python -m MedAnomalyCLIPLib.training.default_detector --help`.

A folder of images with manifests and the teacher's weights in, a bundle out. First both towers learn features
and sentences, then everything at once, the detector's heads included, last the heads alone, on many views. An
interrupted run goes on where it stopped. Only training images are learned from, thresholds come from the
validation images, and the test images are looked at once, for the figures on the model card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..bundle import FORMAT, Bundle, BundleManifest, default_bundle_path, save_bundle
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
from .checkpoint import load_checkpoint, save_checkpoint
from .finishing import calibrate, training_sources
from .heads import HeadTraining, train_heads
from .image_set import inner_square, pack, read_lesion_mask
from .joint import JointModel, JointTraining, text_banks, train_jointly
from .log import TrainingLog
from .model_card import model_card
from .tower import CLIP_MEAN, CLIP_STD, DistillingClip, TowerTraining, train_tower
from .volume_slices import volume_slices

PACKED_SIDE = 256
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
label alone. Last, these heads for longer, the towers as they are. The towers' weights are running averages.
Thresholds come from validation images. The test images below took no part in fitting or in thresholds.

`text_tower.safetensors` is the small text tower. Detection reads it only for a reader's own phrases; other
detectors are trained from it, and it stands under the same terms."""


@dataclass(frozen=True)
class DefaultRecipe:
    """All numbers of the recipe.

    Attributes:
        tower: of the first training.
        joint: of the second.
        heads: of the third, of the heads alone.
        without: sets, or clusters of sets, that are left out of all training, beside the held-out head.
    """

    tower: TowerTraining = field(default_factory=TowerTraining)
    joint: JointTraining = field(default_factory=JointTraining)
    heads: HeadTraining = field(default_factory=HeadTraining)
    without: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train and measure the bundled detector.")
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="folder with manifest.csv, and pool/ and volumes/ with theirs if there are any",
    )
    add("--teacher", type=Path, required=True, help="safetensors file of the ImageNet MobileNetV2")
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
    add("--tower-steps", type=int, default=TowerTraining.steps)
    add("--joint-steps", type=int, default=JointTraining.steps)
    add("--joint", nargs="+", default=[], metavar="NAME=NUMBER", help="other numbers of the joint training")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        changes = {**_numbers(arguments.joint), "steps": arguments.joint_steps, "seed": arguments.seed}
        recipe = DefaultRecipe(
            TowerTraining(steps=arguments.tower_steps, seed=arguments.seed),
            replace(JointTraining(), **changes),
            HeadTraining(seed=arguments.seed),
            tuple(arguments.without),
        )
        run(
            recipe,
            arguments.data,
            arguments.teacher,
            arguments.work,
            arguments.output or default_bundle_path(),
            select_device(arguments.device),
            arguments.start,
        )
    except MedAnomalyCLIPError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(
    recipe: DefaultRecipe,
    data: Path,
    teacher: Path,
    work: Path,
    output: Path,
    device: torch.device,
    start: Path | None = None,
    detector_spec: DetectorSpec = DETECTOR,
) -> None:
    """Both trainings, thresholds, figures, bundle."""
    records = read_records(data)
    training = training_records(records, data, recipe.without)
    packed = pack(training, work, PACKED_SIDE, _bar("pack"))
    distilled = _distil(recipe, training, packed, teacher, work, device, start, detector_spec.tower)
    images = anomaly_images(training, packed)
    valid = [record for record in records if record.split == "valid"]

    def measure(step: int, model: JointModel) -> None:
        """A point of the learning curve, on validation images."""
        if not valid or step % (4 * recipe.joint.checkpoint_every):
            return
        detector = finish_detector(model, images)
        ready = _as_bundle(detector, training, work / "curve", device)
        log.figures(step, _flat(_measure(ready, valid, quiet=True)))
        detector.to(device)

    with TrainingLog(work / "log" / "joint", recipe.joint.steps, title="joint") as log:
        model = train_jointly(
            distilled,
            detector_spec,
            images,
            teacher,
            recipe.joint,
            work / "joint.safetensors",
            device=device,
            on_step=log.step,
            on_checkpoint=measure,
        )
    _fit_heads(recipe.heads, model, images, work, device)
    detector = finish_detector(model, images)
    # Not in the place of a finished detector before it is one itself.
    ready = _as_bundle(detector, training, work / "uncalibrated", device)
    manifest = calibrate(_manifest_of(detector, training), ready, valid, _bar("calibrate"))
    calibrated = save_bundle(work / "calibrated", manifest, detector, "", text_side(model.clip))
    ready = SliceDetector.load(calibrated.folder, device=str(device), precision="float32")
    tested = [record for record in records if record.split == "test"]
    manifest = replace(manifest, quality=_measure(ready, tested))
    settings = {**to_mapping(recipe), "started from": "" if start is None else _name_of(start)}
    save_bundle(output, manifest, detector, model_card(manifest, HOW_MADE, settings), text_side(model.clip))


def _fit_heads(
    training: HeadTraining, model: JointModel, images: AnomalyImages, work: Path, device: torch.device
) -> None:
    """The heads, from an earlier run where that came so far.

    Raises:
        InvalidRequest: the earlier run had other settings.
    """
    finished, settings = work / "heads.safetensors", to_mapping(training)
    heads = {"adapters": model.detector.adapters, "class_head": model.detector.class_head}
    if finished.is_file():
        if load_checkpoint(finished, heads, None) != {"settings": settings}:
            raise InvalidRequest(f"{finished.name} was trained with other settings; delete it to start anew")
        return
    steps = training.epochs * training.batches
    with TrainingLog(work / "log" / "heads", steps, title="heads") as log:
        train_heads(model, images, training, device=device, on_progress=_bar("keep tokens"), on_step=log.step)
    save_checkpoint(finished, heads, None, {"settings": settings})


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
    unknown = sorted(set(without) - {r.set for r in offered} - {r.cluster for r in offered})
    if unknown:
        raise InvalidRequest(f"There is no set or cluster {', '.join(unknown)} to leave out")
    left_out = {*without, HELD_OUT_HEAD}
    return [r for r in offered if r.set not in left_out and r.cluster not in left_out]


def anomaly_images(records: Sequence[ImageRecord], packed: np.ndarray) -> AnomalyImages:
    """Packed images with their outlined lesions."""
    masks = {index: read_lesion_mask(record, PACKED_SIDE) for index, record in enumerate(records)}
    return AnomalyImages(
        records,
        packed,
        {index: mask for index, mask in masks.items() if mask is not None},
        np.array([inner_square(record) for record in records], dtype=np.float32),
    )


@torch.no_grad()
def finish_detector(model: JointModel, images: AnomalyImages) -> AnomalyDetector:
    """The detector with its text and with the looks of some of what it learned from, on the CPU."""
    detector = model.detector.cpu().eval()
    any_kind, presets = text_banks(model.clip.cpu().eval(), detector.spec)
    detector.text_bank.copy_(any_kind)
    if len(presets):
        detector.preset_banks.copy_(presets)
    if detector.spec.familiarity is not None:
        rows = detector.spec.familiarity.rows
        chosen = _evenly(images.records, rows)
        parts = [chosen[at : at + LOOKS_AT_ONCE] for at in range(0, rows, LOOKS_AT_ONCE)]
        detector.familiarity.fill(torch.cat([_look(detector, images, part) for part in parts]))
    return detector


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


def _look(detector: AnomalyDetector, images: AnomalyImages, chosen: np.ndarray) -> Tensor:
    """(B, D) looks of images, prepared as any image is that a detector is given."""
    preprocessor = SlicePreprocessor(PREPROCESS)
    prepared = [preprocessor.prepare(plane) for plane in planes_of(images.records[i] for i in chosen)]
    valid = torch.stack([item.valid for item in prepared])
    return detector.look(detector.align(torch.stack([item.tensor for item in prepared])), valid)


def _distil(
    recipe: DefaultRecipe,
    training: Sequence[ImageRecord],
    packed: np.ndarray,
    teacher: Path,
    work: Path,
    device: torch.device,
    start: Path | None,
    tower: TowerSpec,
) -> DistillingClip:
    weights = None if start is None else Bundle.load(start).build_clip().state_dict()
    with TrainingLog(work / "log" / "tower", recipe.tower.steps, title="tower") as log:
        return train_tower(
            tower,
            training,
            packed,
            teacher,
            recipe.tower,
            work / "tower.safetensors",
            device=device,
            weights=weights,
            on_step=log.step,
        )


def _manifest_of(detector: AnomalyDetector, training: Sequence[ImageRecord]) -> BundleManifest:
    return BundleManifest(
        format=FORMAT,
        name="MedAnomalyCLIP default",
        version="2",
        description="Compact CLIP that compares patches and images with sentences about their kind",
        licence="Research use only: the terms of several training collections are research-only or unstated",
        detector=detector.spec,
        preprocess=PREPROCESS,
        threshold=0.5,
        training_data=training_sources(training),
    )


def _as_bundle(
    detector: AnomalyDetector, training: Sequence[ImageRecord], place: Path, device: torch.device
) -> SliceDetector:
    """The detector read back from disk, so that thresholds belong to weights as they are stored."""
    bundle = save_bundle(place, _manifest_of(detector, training), detector, "")
    return SliceDetector.load(bundle.folder, device=str(device), precision="float32")


def _measure(
    detector: SliceDetector, records: Sequence[ImageRecord], *, quiet: bool = False
) -> dict[str, dict[str, float]]:
    quality = {}
    for name in dict.fromkeys(record.set for record in records):
        chosen = [record for record in records if record.set == name]
        bar = None if quiet else _bar(f"measure {name}")
        quality[name] = set_figures(chosen, detect_records(detector, chosen, bar), 0 if quiet else DRAWS)
    return quality


def _flat(quality: dict[str, dict[str, float]]) -> dict[str, float]:
    """Those figures that a learning curve shows."""
    shown = ("image auroc", "pixel ap", "pixel pro")
    return {
        f"{name} {key}": figures[key] for name, figures in quality.items() for key in shown if key in figures
    }


def _name_of(start: Path) -> str:
    manifest = Bundle.load(start).manifest
    return f"{manifest.name}, version {manifest.version}, {manifest.weights_sha256[:12]}"


def _numbers(changes: Sequence[str]) -> dict[str, Any]:
    """NAME=NUMBER of the joint training, as keyword arguments.

    Raises:
        InvalidRequest: there is no such number, or this is none.
    """
    known = {
        name: value for name, value in to_mapping(JointTraining()).items() if type(value) in (int, float)
    }
    found: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            found[name] = type(known[name])(text)
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"--joint {change}: write one of {', '.join(known)} and a number") from error
    return found


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
