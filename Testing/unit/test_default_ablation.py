"""The table of what each ingredient of the default recipe buys: each row lacks what it says, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from MedAnomalyCLIPLib.datasets import ImageRecord
from MedAnomalyCLIPLib.training import default_ablation
from MedAnomalyCLIPLib.training.anomaly_batches import AnomalyImages
from MedAnomalyCLIPLib.training.default_ablation import ABLATIONS, short_recipe
from MedAnomalyCLIPLib.training.packed_set import write_packed_set


@pytest.fixture
def images():
    plain = ImageRecord(Path("0.png"), None, "own", "train", False, "MR", "brain", "", "")
    records = [plain, replace(plain, abnormal=True), replace(plain, set="other", split="pool", abnormal=None)]
    pictures = np.full((3, 3, 32, 32), 90, np.uint8)
    return AnomalyImages(records, pictures, {1: np.ones((32, 32), bool)}, np.ones(3, np.float32))


def test_each_row_lacks_what_it_says(images):
    whole = short_recipe(5, 7)
    trials = {name: change(whole, images) for name, change in ABLATIONS.items()}
    assert trials["everything"] == (whole, images)
    batch = {
        name: recipe.joint.outlined + recipe.joint.painted + recipe.joint.others
        for name, (recipe, _) in trials.items()
    }
    assert len(set(batch.values())) == 1, "a smaller batch would be another change"
    assert trials["no painted lesions"][0].joint.painted == 0
    recipe, learned = trials["no outlined lesions"]
    assert (recipe.joint.outlined, learned.masks) == (0, {})
    recipe, _ = trials["no distillation"]
    assert (recipe.tower.distillation, recipe.joint.distillation) == (0, 0)
    recipe, _ = trials["no captions"]
    assert (recipe.tower.contrastive_weight, recipe.joint.contrastive) == (0, 0)
    recipe, _ = trials["no change of appearance"]
    assert not recipe.tower.appearance and not recipe.joint.appearance
    assert trials["no first stage"][0].tower.steps == 0
    recipe, _ = trials["no averaging of weights"]
    assert (recipe.tower.ema_decay, recipe.joint.ema_decay) == (0, 0)
    recipe, learned = trials["no images without labels"]
    assert recipe == whole and [record.set for record in learned.records] == ["own", "own"]


def test_rows_with_the_same_first_stage_share_it_and_the_table_holds_all(images, monkeypatch, tmp_path):
    write_packed_set(tmp_path / "set.safetensors", images)
    (tmp_path / "manifest.csv").write_text(
        "image,set,split,label,modality,body_part\n0.png,own,valid,0,MR,brain\n"
    )
    trained = []

    def train(recipe, learned, spec, place):
        tower = place.work / "tower.safetensors"
        if recipe.tower.steps and not tower.exists():
            trained.append(place.work.name)
            place.work.mkdir(parents=True, exist_ok=True)
            tower.write_bytes(b"tower")

    monkeypatch.setattr(default_ablation, "train_stages", train)
    monkeypatch.setattr(default_ablation, "learning_figures", lambda *given: {"own image auroc": 0.5})
    asked = ["--packed", "set.safetensors", "--data", ".", "--teacher", "none", "--work", "work"]
    monkeypatch.chdir(tmp_path)
    assert default_ablation.main(asked) == 0
    assert set(json.loads(Path("work/ablation.json").read_text())) == set(ABLATIONS)
    assert trained == [
        "everything", "no-distillation", "no-captions", "no-change-of-appearance", "no-averaging-of-weights",
        "no-images-without-labels",
    ]  # fmt: skip


def test_without_validation_images_there_is_nothing_to_measure(images, tmp_path, capsys):
    write_packed_set(tmp_path / "set.safetensors", images)
    (tmp_path / "manifest.csv").write_text(
        "image,set,split,label,modality,body_part\n0.png,own,train,0,MR,brain\n"
    )
    asked = ["--packed", str(tmp_path / "set.safetensors"), "--data", str(tmp_path), "--teacher", "none"]
    assert default_ablation.main([*asked, "--work", str(tmp_path / "work")]) == 2
    assert "no validation images" in capsys.readouterr().err
