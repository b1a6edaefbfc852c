"""Training: batches depend on the seed alone, an interrupted run goes on, losses are what they claim."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from MedAnomalyCLIPLib.bundle import Bundle
from MedAnomalyCLIPLib.datasets import ImageRecord, read_manifest
from MedAnomalyCLIPLib.errors import MedAnomalyCLIPError, UnreadableImage
from MedAnomalyCLIPLib.training.augmentation import random_appearance, random_placement, random_view
from MedAnomalyCLIPLib.training.captions import caption, subject
from MedAnomalyCLIPLib.training.checkpoint import load_checkpoint, save_checkpoint
from MedAnomalyCLIPLib.training.image_set import pack, read_square, read_square_mask
from MedAnomalyCLIPLib.training.tower import DistillingClip, TowerTraining, contrastive_loss, train_tower


def record(tmp_path, name="a.png", **changes):
    return replace(
        ImageRecord(tmp_path / name, None, "made-up", "train", False, "MR T1", "brain, axial", "axial", ""),
        **changes,
    )


@pytest.fixture
def picture_folder(tmp_path):
    """Six 40 x 30 pictures, a manifest and a mask."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 30), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "label": number % 2,
                "modality": "CT",
                "body_part": "chest",
                "mask": "",
            }
        )
    rows[1]["mask"] = "mask.png"
    Image.fromarray(np.pad(np.full((8, 6), 255, np.uint8), ((16, 16), (12, 12)))).save(tmp_path / "mask.png")
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_padding_is_equal_on_both_sides_for_image_and_mask(picture_folder):
    image = read_square(picture_folder / "0.png", 80, colour=False)
    mask = read_square_mask(picture_folder / "mask.png", 80)
    assert image[:, :10].max() == image[:, 70:].max() == 0 < image[:, 12:68].min(axis=0).max()
    assert mask.sum() == 16 * 12
    assert mask[32:48, 34:46].all()


def test_packed_images_are_taken_from_the_file_the_second_time(picture_folder, tmp_path):
    records = read_manifest(picture_folder / "manifest.csv")
    first = pack(records, tmp_path / "work", 32)
    records[0].path.unlink()
    assert np.array_equal(pack(records, tmp_path / "work", 32), first)


def test_packed_images_of_another_list_are_not_taken_for_these(picture_folder, tmp_path):
    records = read_manifest(picture_folder / "manifest.csv")
    first = pack(records[:3], tmp_path / "work", 32)
    assert not np.array_equal(pack(records[3:], tmp_path / "work", 32), first)


def test_packing_that_fails_leaves_no_file(picture_folder, tmp_path):
    records = read_manifest(picture_folder / "manifest.csv")
    records[3].path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"3\.png"):
        pack(records, tmp_path / "work", 32)
    assert not list((tmp_path / "work").glob("*.npy"))


def test_captions_say_nothing_of_health_that_the_source_does_not(tmp_path):
    rng = np.random.default_rng(0)
    unknown = record(tmp_path, abnormal=None, findings="brain tumor")
    sentences = {caption(unknown, rng) for _ in range(200)}
    assert len(sentences) > 10
    assert not [s for s in sentences if "normal" in s or "tumor" in s or "health" in s]


def test_captions_of_abnormal_images_never_call_them_normal(tmp_path):
    rng = np.random.default_rng(0)
    sick = record(tmp_path, abnormal=True, findings="glioma")
    sentences = [caption(sick, rng) for _ in range(200)]
    assert any("glioma" in s for s in sentences)
    assert not [s for s in sentences if "normal" in s.replace("abnormal", "") or "healthy" in s]


def test_normal_and_abnormal_images_are_different_subjects(tmp_path):
    assert subject(record(tmp_path)) != subject(record(tmp_path, abnormal=True))


def test_views_stay_in_range_and_repeat_with_their_generator():
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    one = random_view(images, 32, torch.Generator().manual_seed(5))
    two = random_view(images, 32, torch.Generator().manual_seed(5))
    other = random_view(images, 32, torch.Generator().manual_seed(6))
    assert one.shape == (4, 3, 32, 32)
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_an_image_and_its_mask_move_together():
    spot = torch.zeros(6, 2, 64, 64)
    spot[:, :, 20:28, 36:46] = 1.0
    moved = random_placement(spot, 64, torch.Generator().manual_seed(2))
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert not torch.equal(moved[0], moved[1])


def test_placement_keeps_a_constant_middle_and_appearance_keeps_grey_grey():
    grey = torch.full((8, 3, 64, 64), 0.5)
    placed = random_placement(grey, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(placed[:, :, 32, 32], torch.full((8, 3), 0.5))
    looked = random_appearance(grey, torch.Generator().manual_seed(0))
    assert torch.equal(looked[:, 0], looked[:, 2])


def test_contrastive_loss_is_lowest_when_subjects_meet_their_own_sentences():
    embeddings = torch.nn.functional.normalize(
        torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    same = torch.eye(4, dtype=torch.bool)
    right = contrastive_loss(embeddings, embeddings, same, torch.tensor(50.0))
    swapped = contrastive_loss(embeddings, embeddings.flip(0), same, torch.tensor(50.0))
    assert float(right) < 0.1 < float(swapped)


def test_contrastive_loss_with_one_right_answer_each_is_clips_own():
    from MedAnomalyCLIPLib.clip.importing import import_open_clip

    loss = import_open_clip().ClipLoss()
    g = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8, generator=g), dim=1) for _ in range(2))
    ours = contrastive_loss(image, text, torch.eye(5, dtype=torch.bool), torch.tensor(10.0))
    torch.testing.assert_close(ours, loss(image, text, torch.tensor(10.0)))


@pytest.fixture
def teacher_weights(tmp_path):
    """The teacher's architecture with random weights."""
    from safetensors.torch import save_file

    from MedAnomalyCLIPLib.clip.importing import import_open_clip

    import_open_clip()
    import timm

    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=1001)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(weights, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def test_an_interrupted_tower_run_ends_like_an_uninterrupted_one(tiny_tower, teacher_weights, tmp_path):
    spec = replace(tiny_tower, taps=(1, 2, 3, 4), conv_stem=(8, 8, 16, 32))
    records = [record(tmp_path, abnormal=bool(i % 2)) for i in range(8)]
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 80, 80), dtype=np.uint8)
    settings = TowerTraining(steps=4, batch_size=4, warmup=1, checkpoint_every=2)

    def run(name, steps):
        steps = replace(settings, steps=steps) if steps != 4 else settings
        where = tmp_path / f"{name}.safetensors"
        return train_tower(spec, records, images, teacher_weights, steps, where, device=torch.device("cpu"))

    class Stop(Exception):
        pass

    def stop_at_three(step, terms):
        assert {"loss", "tap1", "tap4", "pooled", "contrastive"} <= terms.keys()
        if step == 3:
            raise Stop

    whole = run("whole", 4)
    with pytest.raises(Stop):
        train_tower(
            spec, records, images, teacher_weights, settings, tmp_path / "part.safetensors",
            device=torch.device("cpu"), on_step=stop_at_three,
        )  # fmt: skip
    resumed = run("part", 4)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[key], atol=1e-6, rtol=1e-5)


def test_a_damaged_checkpoint_is_refused(tiny_tower, tmp_path):
    student = DistillingClip(replace(tiny_tower, taps=(1, 2, 3, 4)))
    optimizer = torch.optim.AdamW(student.parameters())
    save_checkpoint(tmp_path / "c.safetensors", {"student": student}, optimizer, {"step": 7})
    assert load_checkpoint(tmp_path / "c.safetensors", {"student": student}, optimizer) == {"step": 7}
    content = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match=r"c\.safetensors"):
        load_checkpoint(tmp_path / "c.safetensors", {"student": student}, optimizer)


@pytest.mark.parametrize("taken", [-1e4, float("nan"), 3e38])
def test_a_checkpoint_of_steps_that_cannot_be_is_refused(tmp_path, taken):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    next(iter(optimizer.state.values()))["step"].fill_(taken)
    save_checkpoint(tmp_path / "c.safetensors", {"module": module}, optimizer, {"step": 1})
    with pytest.raises(UnreadableImage, match="has not taken"):
        load_checkpoint(tmp_path / "c.safetensors", {"module": module}, optimizer)


def made_up_data(folder):
    """Twelve pictures in three splits, half of them with an outlined bright square."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number, split in enumerate(("train", "valid", "test") * 4):
        abnormal = number >= 6
        pixels, mask = rng.integers(30, 90, (50, 40), dtype=np.uint8), np.zeros((50, 40), np.uint8)
        if abnormal:
            pixels[20:32, 10:22], mask[20:32, 10:22] = 240, 255
            Image.fromarray(mask).save(folder / f"mask{number}.png")
        Image.fromarray(pixels).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "set": "made-up", "split": split, "label": int(abnormal)}
        row |= {"modality": "MR", "body_part": "brain", "mask": f"mask{number}.png" if abnormal else ""}
        rows.append({**row, "licence": "none needed"})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_the_command_learns_from_a_packed_file_what_it_learns_from_the_folder(monkeypatch, tmp_path, capsys):
    from MedAnomalyCLIPLib.training import default_detector

    asked = []
    monkeypatch.setattr(default_detector, "run", lambda *arguments: asked.append(arguments))
    data, work = str(made_up_data(tmp_path / "data")), str(tmp_path / "work")
    packed = str(tmp_path / "set.safetensors")
    common = ["--work", work, "--teacher", "teacher.safetensors", "--joint", "steps=5", "--seed", "3"]
    assert default_detector.main(["--data", data, "--work", work, "--pack", packed]) == 0
    assert not asked
    assert default_detector.main(["--data", data, *common]) == 0
    assert default_detector.main(["--packed", packed, *common, "--workers", "2"]) == 0
    (recipe, images, folder, _, _), (again, unpacked, nowhere, _, place) = asked
    assert recipe == again and (recipe.joint.steps, recipe.tower.seed) == (5, 3)
    assert (folder, nowhere, place.workers) == (Path(data), None, 2)
    assert [r.path.name for r in images.records] == [r.path.name for r in unpacked.records]
    assert np.abs(images.images.astype(int) - unpacked.images).mean() < 8
    assert default_detector.main(["--packed", packed, *common, "--without", "atlantis"]) == 2
    assert "no set or cluster atlantis" in capsys.readouterr().err
    for wrong in (["--packed", packed, "--work", work], ["--work", work]):
        assert default_detector.main(wrong) == 2
    assert default_detector.main(["--data", data, *common, "--tower", "stps=5"]) == 2
    assert "stps=5: write one of steps" in capsys.readouterr().err


def test_the_recipe_makes_a_bundle_that_detects_and_says_what_it_was_made_from(teacher_weights, tmp_path):
    """A step or two of each stage; a second run takes over what the first one made."""
    from MedAnomalyCLIPLib.detection import SliceDetector
    from MedAnomalyCLIPLib.detectors.specification import FamiliaritySpec
    from MedAnomalyCLIPLib.training.default_detector import (
        DETECTOR,
        anomaly_images,
        pack,
        read_records,
        run,
        training_records,
    )
    from MedAnomalyCLIPLib.training.default_stages import DefaultRecipe, Place
    from MedAnomalyCLIPLib.training.joint import JointTraining

    data = made_up_data(tmp_path / "data")
    recipe = DefaultRecipe(
        TowerTraining(steps=1, batch_size=4, warmup=1, side=32),
        JointTraining(steps=2, outlined=2, painted=1, others=1, small_side=32, small_steps=1),
    )
    work, cpu = tmp_path / "work", torch.device("cpu")
    spec = replace(DETECTOR, familiarity=FamiliaritySpec(2))

    def make(changed):
        records = training_records(read_records(data), data, changed.without)
        images = anomaly_images(records, pack(records, work, 256))
        place = Place(work, teacher_weights, cpu)
        run(changed, images, data, tmp_path / "bundle", place, detector_spec=spec)

    make(recipe)
    first = Bundle.load(tmp_path / "bundle").manifest
    assert [(source.name, source.images) for source in first.training_data] == [("made-up", 4)]
    assert first.quality["made-up"]["images"] == 4
    assert len(first.reference.scores) == 2
    detector = SliceDetector.load(tmp_path / "bundle", device="cpu")
    assert "none needed" in detector.card
    assert detector.reads_phrases

    make(recipe)
    assert Bundle.load(tmp_path / "bundle").manifest.weights_sha256 == first.weights_sha256
    others = (
        replace(recipe, tower=replace(recipe.tower, steps=2)),
        replace(recipe, joint=replace(recipe.joint, steps=3)),
    )
    for other in others:
        with pytest.raises(MedAnomalyCLIPError, match="other settings"):
            make(other)
    with pytest.raises(MedAnomalyCLIPError, match="no set or cluster atlantis"):
        make(replace(recipe, without=("atlantis",)))
