"""The two stages in which the bundled detector is trained: images in, a trained model out.

First both towers learn features and sentences, then everything at once, the detector's heads included. Each
stage goes on where it was interrupted, and what came of both is kept in one file, so that thresholds and
figures can be made of it later, or on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..bundle import Bundle
from ..configuration import to_mapping
from ..datasets.records import ImageRecord
from ..detectors.specification import DetectorSpec
from ..errors import InvalidRequest
from .anomaly_batches import AnomalyImages
from .checkpoint import load_checkpoint, save_checkpoint
from .joint import JointModel, JointTraining, train_jointly
from .log import TrainingLog
from .tower import DistillingClip, TowerTraining, train_tower

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class DefaultRecipe:
    """All numbers of the recipe.

    Attributes:
        tower: of the first training.
        joint: of the second.
        without: sets, or clusters of sets, that are left out of all training, beside the held-out head.
    """

    tower: TowerTraining = field(default_factory=TowerTraining)
    joint: JointTraining = field(default_factory=JointTraining)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a training runs.

    Attributes:
        work: folder of its checkpoints and logs.
        teacher: safetensors file of the teacher.
        device: that trains.
        workers: processes that draw and paint ahead; they change nothing but the time.
        start: folder of a detector whose CLIP training goes on from; None for random weights.
    """

    work: Path
    teacher: Path
    device: torch.device
    workers: int = 0
    start: Path | None = None


def train_stages(
    recipe: DefaultRecipe,
    images: AnomalyImages,
    spec: DetectorSpec,
    place: Place,
    on_checkpoint: Callable[[int, JointModel], dict[str, float]] | None = None,
) -> JointModel:
    """Train, or take what an earlier run of the same recipe and images has trained.

    Args:
        recipe: all numbers.
        images: what is learned from.
        spec: of the detector.
        place: where.
        on_checkpoint: called with step and averaged model after each checkpoint of the second stage; what it
            returns goes into the log.

    Raises:
        InvalidRequest: what lies in the folder was trained with other settings or images.

    Returns:
        The model, on the CPU.
    """
    file, notes = place.work / TRAINED, _told(recipe, images, place)
    if file.is_file():
        model = JointModel(DistillingClip(spec.tower), spec)
        if load_checkpoint(file, {"model": model}, None) != notes:
            raise InvalidRequest(
                f"{file.name} was trained with other settings or images; delete it to start anew"
            )
        return model.eval()
    distilled = _distil(recipe.tower, images, spec, place)
    model = _train_jointly(recipe.joint, distilled, images, spec, place, on_checkpoint)
    save_checkpoint(file, {"model": model.cpu().eval()}, None, notes)
    return model


def _told(recipe: DefaultRecipe, images: AnomalyImages, place: Place) -> dict[str, Any]:
    """What a trained model belongs to."""
    return {
        "recipe": to_mapping(recipe),
        "images": _counts(images.records),
        "started from": "" if place.start is None else name_of(place.start),
    }


def _counts(records: Sequence[ImageRecord]) -> dict[str, int]:
    names = [record.set for record in records]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def name_of(start: Path) -> str:
    """Name, version and hash of a detector that training goes on from."""
    manifest = Bundle.load(start).manifest
    return f"{manifest.name}, version {manifest.version}, {manifest.weights_sha256[:12]}"


def _distil(
    training: TowerTraining, images: AnomalyImages, spec: DetectorSpec, place: Place
) -> DistillingClip:
    weights: dict[str, Tensor] | None = None
    if place.start is not None:
        weights = Bundle.load(place.start).build_clip().state_dict()
    with TrainingLog(place.work / "log" / "tower", training.steps, title="tower") as log:
        return train_tower(
            spec.tower,
            images.records,
            images.images,
            place.teacher,
            training,
            place.work / "tower.safetensors",
            device=place.device,
            weights=weights,
            on_step=log.step,
        )


def _train_jointly(
    training: JointTraining,
    distilled: DistillingClip,
    images: AnomalyImages,
    spec: DetectorSpec,
    place: Place,
    on_checkpoint: Callable[[int, JointModel], dict[str, float]] | None,
) -> JointModel:
    with TrainingLog(place.work / "log" / "joint", training.steps, title="joint") as log:

        def told(step: int, model: JointModel) -> None:
            figures = on_checkpoint(step, model) if on_checkpoint is not None else {}
            if figures:
                log.figures(step, figures)
            model.to(place.device)

        return train_jointly(
            distilled,
            spec,
            images,
            place.teacher,
            training,
            place.work / "joint.safetensors",
            device=place.device,
            workers=place.workers,
            on_step=log.step,
            on_checkpoint=told,
        )


def bar(title: str) -> Callable[[int, int], None]:
    """A progress bar that is told what is done, and of how many."""
    shown: tqdm = tqdm(desc=title, disable=None)

    def show(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)
        if done == total:
            shown.close()

    return show
