"""Trainings cut down to seconds: a tiny data set, and shipped recipes on a tiny CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from MedAnomalyCLIPLib.datasets import read_dataset
from MedAnomalyCLIPLib.training.recipe import read_recipe
from MedAnomalyCLIPLib.training.trainer import train

CPU = torch.device("cpu")
SIDE = 72


def write_dataset(root: Path) -> None:
    """Two sets of discs on noise; abnormal ones have a bright square, outlined by a mask."""
    rng = np.random.default_rng(0)
    for name in ("heads", "chests"):
        for split, count in (("train", 6), ("valid", 3), ("test", 3)):
            for kind in ("good", "Ungood"):
                folder = root / f"{name}_AD" / split / kind
                (folder / "img").mkdir(parents=True)
                for number in range(count):
                    image, mask = _picture(rng, kind == "Ungood")
                    Image.fromarray(image).save(folder / "img" / f"{number}.png")
                    if kind == "Ungood":
                        (folder / "anomaly_mask").mkdir(exist_ok=True)
                        Image.fromarray(mask).save(folder / "anomaly_mask" / f"{number}.png")


def _picture(rng, abnormal):
    rows, columns = np.indices((SIDE, SIDE)) - SIDE / 2
    image = 90.0 * (rows**2 + columns**2 < 30**2) + rng.normal(0, 6, (SIDE, SIDE)) + 10
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if abnormal:
        top, left = rng.integers(20, 40, 2)
        mask[top : top + 12, left : left + 12] = 255
        image[mask > 0] += 100
    return image.clip(0, 255).astype(np.uint8), mask


def small(clip_folder, name, *changes):
    """A shipped recipe on the tiny CLIP, cut down to seconds."""
    common = [f"clip={json.dumps(str(clip_folder))}", "optimisation.epochs=2", "optimisation.batch_size=4"]
    extra = {
        "mvfa_zero_shot": ["data.target=heads"],
        "mediclip": ["data.normal=4"],
        "mvfa_few_shot": ["data.normal=2", "data.abnormal=2"],
        "mvfa_few_shot_labels": ["data.normal=2", "data.abnormal=2"],
        "mvfa_normal_only": ["data.normal=2"],
        "memory": [f"start={json.dumps(str(clip_folder))}", "optimisation.epochs=0"],
    }
    sets = [] if name == "mvfa_zero_shot" else ['data.sets=["heads"]']
    return read_recipe(name, [*common, *sets, *extra.get(name, []), *changes])


def run(recipe, dataset, folder, **options):
    return train(recipe, read_dataset(dataset), folder, device=CPU, quiet=True, **options)
