"""What each ingredient of the bundled detector's recipe buys.

Packed images and validation images in; a table of short trainings out, each without one ingredient, measured
on the validation images: `python -m MedAnomalyCLIPLib.training.default_ablation --help`. An interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..configuration import to_mapping
from ..errors import InvalidRequest, MedAnomalyCLIPError
from ..output_folder import writing
from ..runtime import select_device
from .anomaly_batches import AnomalyImages
from .default_detector import DETECTOR, learning_figures, read_records
from .default_stages import DefaultRecipe, Place, train_stages
from .joint import JointTraining
from .packed_set import read_packed_set
from .tower import TowerTraining

Trial = tuple[DefaultRecipe, AnomalyImages]


def short_recipe(tower_steps: int, joint_steps: int) -> DefaultRecipe:
    """The recipe in small: smaller pictures, half the batch."""
    return DefaultRecipe(
        TowerTraining(
            steps=tower_steps, horizon=tower_steps * 5 // 4, side=160, batch_size=64, ema_decay=0.99
        ),
        JointTraining(
            steps=joint_steps,
            horizon=joint_steps,
            outlined=20,
            painted=16,
            others=28,
            small_side=192,
            small_steps=joint_steps,
            ema_decay=0.99,
            checkpoint_every=joint_steps,
        ),
    )


def _whole(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    return recipe, images


def _without_painting(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    joint = recipe.joint
    return replace(recipe, joint=replace(joint, painted=0, others=joint.others + joint.painted)), images


def _without_outlines(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    joint = recipe.joint
    painting = replace(joint, outlined=0, painted=joint.painted + joint.outlined)
    return replace(recipe, joint=painting), replace(images, masks={})


def _without_averages(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    tower, joint = replace(recipe.tower, ema_decay=0.0), replace(recipe.joint, ema_decay=0.0)
    return replace(recipe, tower=tower, joint=joint), images


def _without_distillation(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    tower, joint = replace(recipe.tower, distillation=0.0), replace(recipe.joint, distillation=0.0)
    return replace(recipe, tower=tower, joint=joint), images


def _without_captions(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    tower, joint = replace(recipe.tower, contrastive_weight=0.0), replace(recipe.joint, contrastive=0.0)
    return replace(recipe, tower=tower, joint=joint), images


def _without_appearance(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    tower, joint = replace(recipe.tower, appearance=False), replace(recipe.joint, appearance=False)
    return replace(recipe, tower=tower, joint=joint), images


def _without_first_stage(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    return replace(recipe, tower=replace(recipe.tower, steps=0)), images


def _without_pool(recipe: DefaultRecipe, images: AnomalyImages) -> Trial:
    return recipe, images.chosen([i for i, r in enumerate(images.records) if r.split != "pool"])


ABLATIONS: dict[str, Callable[[DefaultRecipe, AnomalyImages], Trial]] = {
    "everything": _whole,
    "no painted lesions": _without_painting,
    "no outlined lesions": _without_outlines,
    "no distillation": _without_distillation,
    "no captions": _without_captions,
    "no change of appearance": _without_appearance,
    "no first stage": _without_first_stage,
    "no averaging of weights": _without_averages,
    "no images without labels": _without_pool,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure all of them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what each ingredient of the recipe buys.")
    add = parser.add_argument
    add("--packed", type=Path, required=True, help="training images, as default_detector --pack writes them")
    add("--data", type=Path, required=True, help="folder whose validation images are measured on")
    add("--teacher", type=Path, required=True, help="safetensors file of the ImageNet MobileNetV2")
    add("--work", type=Path, required=True, help="folder of the trainings and of ablation.json")
    add("--device", default="auto")
    add("--workers", type=int, default=0, help="processes that draw and paint ahead")
    add("--tower-steps", type=int, default=500)
    add("--joint-steps", type=int, default=600)
    add("--only", nargs="+", default=list(ABLATIONS), choices=list(ABLATIONS), metavar="NAME")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except MedAnomalyCLIPError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    images = read_packed_set(arguments.packed)
    valid = [record for record in read_records(arguments.data) if record.split == "valid"]
    if not valid:
        raise InvalidRequest("There are no validation images to measure on")
    device = select_device(arguments.device)
    table: dict[str, dict[str, float]] = {}
    towers: dict[str, Path] = {}
    for name in arguments.only:
        recipe, learned = ABLATIONS[name](short_recipe(arguments.tower_steps, arguments.joint_steps), images)
        place = Place(arguments.work / name.replace(" ", "-"), arguments.teacher, device, arguments.workers)
        tower = place.work / "tower.safetensors"
        kept = towers.setdefault(json.dumps([to_mapping(recipe.tower), len(learned.records)]), tower)
        if kept.is_file() and not tower.exists():  # another one had the same first stage
            with writing(tower):
                place.work.mkdir(parents=True, exist_ok=True)
                shutil.copy(kept, tower)
        model = train_stages(recipe, learned, DETECTOR, place)
        table[name] = learning_figures(model, learned.records, valid, place)
        print(name, json.dumps(table[name]), flush=True)
        with writing(arguments.work):
            text = json.dumps(table, indent=2) + "\n"
            (arguments.work / "ablation.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
