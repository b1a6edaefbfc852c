"""Which images a recipe learns from and which it chooses with, and what sentences call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..datasets.protocols import Fold, draw_shots, read_shot_list
from ..datasets.records import ImageRecord
from ..datasets.support import left_out_records
from ..errors import DatasetInvalid, InvalidRequest
from ..neighbours import NEAR_MM
from .recipe import DataPlan, Recipe


@dataclass(frozen=True)
class ChosenImages:
    """The images of one training.

    Attributes:
        training: learned from.
        validation: chosen with, and thresholds taken from; may be empty.
        names: what images show, as sentences call it.
        target: which of them the detector is for.
        origin: where the images come from, in words.
    """

    training: tuple[ImageRecord, ...]
    validation: tuple[ImageRecord, ...]
    names: tuple[str, ...]
    target: int
    origin: str
    plan: DataPlan

    def objects(self, records: Sequence[ImageRecord]) -> list[int]:
        """For each record its place among the names."""
        return [self.names.index(object_name(record, self.plan)) for record in records]


def choose_images(records: Sequence[ImageRecord], recipe: Recipe) -> ChosenImages:
    """Divide labelled images as the recipe's plan says; test images take no part.

    Raises:
        DatasetInvalid: sets, normal images or shots are missing, or a patient is on both sides of the test.
        InvalidRequest: sentences need one name, and the images have several.
    """
    plan = recipe.data
    known = list(dict.fromkeys(record.set for record in records))
    missing = [name for name in (*plan.sets, *([plan.target] if plan.target else [])) if name not in known]
    if missing:
        raise DatasetInvalid(f"There is no set {', '.join(missing)}; there are: {', '.join(known)}")
    wanted = set(plan.sets or known) | ({plan.target} if plan.target else set())
    labelled = [r for r in records if r.set in wanted and r.abnormal is not None]
    training, validation, origin = _divided(labelled, plan)
    _check_training(training, recipe, labelled)
    used = set(training)
    test = tuple(r for r in labelled if r.split == "test" and r not in used)
    if test:
        Fold(recipe.name, training, validation, test)  # refuses patients on both sides
    names, target = _names(recipe, training, validation, labelled)
    return ChosenImages(training, validation, names, target, origin, plan)


def _check_training(training: Sequence[ImageRecord], recipe: Recipe, labelled: Sequence[ImageRecord]) -> None:
    """Refuse images that the recipe cannot learn from, before they are prepared for hours."""
    if not training:
        splits = ", ".join(dict.fromkeys(record.split for record in labelled)) or "none that are labelled"
        raise DatasetInvalid(
            f"No image is in the splits that the recipe learns from; there are: {splits}. "
            "Change data.learn_from, or data.pool where a few are drawn"
        )
    if not any(record.abnormal is False for record in training):
        raise DatasetInvalid("There is no normal image to learn from; a detector needs some")
    if recipe.detector.memory is not None:
        normal = [record for record in training if record.abnormal is False]
        if left_out_records(normal).all(axis=1).any():
            raise DatasetInvalid(
                "A memory needs two different normal images, to learn how much they differ; "
                + (
                    f"slices of one volume only differ where they lie {NEAR_MM:g} mm apart"
                    if len(normal) > 1
                    else "there is one"
                )
            )
    if recipe.optimisation.epochs == 0 or recipe.painting.share > 0:
        return
    abnormal = [record for record in training if record.abnormal]
    if not abnormal:
        raise DatasetInvalid(
            "There is no abnormal image to learn from, and painting.share is 0, so none is painted either; "
            "take a recipe for normal images, as mediclip, mvfa_normal_only or memory"
        )
    if recipe.objective.maps != "none" and all(record.mask is None for record in abnormal):
        raise DatasetInvalid(
            "No abnormal image has a mask to learn maps from; learn from labels alone, with "
            "objective.maps=none, or paint anomalies, with painting.share"
        )


def object_name(record: ImageRecord, plan: DataPlan) -> str:
    """What an image shows, as the plan or its source calls it."""
    return plan.objects.get(record.set) or record.body_part.partition(",")[0].strip() or record.set


def _divided(
    records: Sequence[ImageRecord], plan: DataPlan
) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...], str]:
    if plan.protocol == "few_shot":
        pool = [record for record in records if record.split == plan.pool]
        if not pool:
            return (), (), ""
        if plan.shot_list:
            shots = read_shot_list(Path(plan.shot_list), pool)
        else:
            shots = draw_shots(pool, plan.normal, plan.abnormal, seed=plan.shots_seed)
        used = {_whose(record) for record in shots.records}
        validation = tuple(r for r in records if r.split == "valid" and _whose(r) not in used)
        return shots.records, validation, shots.origin
    others = [record for record in records if record.set != plan.target]
    training = tuple(record for record in others if record.split in plan.learn_from)
    validation = tuple(r for r in others if r.split == "valid" and "valid" not in plan.learn_from)
    sets = ", ".join(dict.fromkeys(record.set for record in training))
    return training, validation, f"split {', '.join(plan.learn_from)} of {sets}"


def _whose(record: ImageRecord) -> tuple[object, ...]:
    """The patient of an image, or the image where patients are not known."""
    return (record.set, record.cluster) if record.cluster else (record.path, record.slice_at)


def _names(
    recipe: Recipe,
    training: Sequence[ImageRecord],
    validation: Sequence[ImageRecord],
    records: Sequence[ImageRecord],
) -> tuple[tuple[str, ...], int]:
    plan, own = recipe.data, recipe.detector.text.name
    names = list(dict.fromkeys(object_name(record, plan) for record in (*training, *validation)))
    if recipe.detector.text.prompts == "coop":
        return tuple(names), 0
    if own:
        wanted = own
    elif plan.target:
        wanted = object_name(next(r for r in records if r.set == plan.target), plan)
    elif len(names) == 1:
        wanted = names[0]
    else:
        raise InvalidRequest(
            f"The images show {', '.join(names)}; name with detector.text.name what the detector is for"
        )
    if wanted not in names:
        names.append(wanted)
    return tuple(names), names.index(wanted)
