"""The joint training: what a batch holds and claims, losses that fall, interruptions, text of presets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from MedAnomalyCLIPLib.datasets import ImageRecord
from MedAnomalyCLIPLib.detectors.specification import (
    AdapterSpec,
    ClusterSpec,
    DetectorSpec,
    PresetSpec,
    TextSpec,
)
from MedAnomalyCLIPLib.errors import DatasetInvalid
from MedAnomalyCLIPLib.training.anomaly_batches import AnomalyImages, JointBatches
from MedAnomalyCLIPLib.training.captions import state_sentences
from MedAnomalyCLIPLib.training.joint import MANY_SCALES, JointTraining, text_banks, train_jointly
from MedAnomalyCLIPLib.training.packed_set import read_packed_set, write_packed_set
from MedAnomalyCLIPLib.training.tower import DistillingClip

SIDE = 64
BRAIN = PresetSpec("brain-mr", "Brain, MR", ("MR",), "brain")


def record(number, **changes):
    plain = ImageRecord(Path(f"{number}.png"), None, "made-up", "train", None, "MR", "brain", "", "")
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def images():
    """Four heads without, four with an outlined bright spot, two of unknown health and two of label alone."""
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    head = np.where(rows**2 + columns**2 < 0.7, 100, 0).astype(np.uint8)
    spot = rows**2 + (columns - 0.3) ** 2 < 0.05
    records, pictures, masks = [], [], {}
    for number in range(12):
        sick = 4 <= number < 8 or number == 11
        picture = head + (number % 3) * (head > 0).astype(np.uint8) * 10
        if sick:
            picture = np.where(spot, 240, picture)
        if 4 <= number < 8:
            masks[number] = spot
        known = None if number in (8, 9) else sick
        records.append(record(number, abnormal=known, mask=Path("m") if number in masks else None))
        pictures.append(np.repeat(picture[None], 3, axis=0))
    return AnomalyImages(records, np.stack(pictures).astype(np.uint8), masks, np.ones(12, np.float32))


def batches(images, **changes):
    settings = {"outlined": 3, "painted": 3, "others": 4, "synthesis": MANY_SCALES, "seed": 0, **changes}
    return JointBatches(images, **settings)


def drawn(batches, step, side):
    return batches.show(batches.draw(step, side), torch.device("cpu"))


def test_a_batch_depends_on_seed_and_step_alone(images):
    one, again = drawn(batches(images), 7, 32), drawn(batches(images), 7, 32)
    other = drawn(batches(images), 8, 32)
    assert torch.equal(one.pictures, again.pictures)
    assert torch.equal(one.truth.masks, again.truth.masks)
    assert not torch.equal(one.pictures, other.pictures)


def test_drawing_ahead_in_other_processes_changes_no_batch(images):
    sides = {3: 32, 4: 32, 5: SIDE}
    here, ahead = (list(batches(images).batches(sides, torch.device("cpu"), workers)) for workers in (0, 1))
    assert [step for step, _ in ahead] == [3, 4, 5]
    for (_, one), (_, other) in zip(here, ahead, strict=True):
        assert one.captions == other.captions and one.kinds == other.kinds
        assert all(torch.equal(a, b) for a, b in zip(one.truth, other.truth, strict=True))
        assert torch.equal(one.plain, other.plain) and torch.equal(one.pictures, other.pictures)


def test_a_part_of_a_batch_may_be_left_out_also_where_there_is_nothing_to_draw_it_from(images):
    plain = drawn(batches(replace(images, masks={}), painted=0), 1, 32)
    assert len(plain.pictures) == 4
    assert not plain.truth.masks.any()
    alike = drawn(batches(images, appearance=False), 1, 32)
    assert torch.equal(alike.pictures, alike.plain)


def test_a_packed_set_comes_back_nearly_as_it_was_and_without_anybodys_folders(images, tmp_path):
    records = [replace(r, path=Path("/home/somebody") / r.path, slice_at=(2, 5)) for r in images.records]
    write_packed_set(tmp_path / "set.safetensors", replace(images, records=records))
    found = read_packed_set(tmp_path / "set.safetensors")
    assert found.records == [replace(r, slice_at=(2, 5)) for r in images.records]
    assert np.abs(found.images.astype(int) - images.images).mean() < 3
    assert found.masks.keys() == images.masks.keys()
    assert all(np.array_equal(found.masks[i], images.masks[i]) for i in images.masks)
    assert np.array_equal(found.inner, images.inner)
    assert b"somebody" not in (tmp_path / "set.safetensors").read_bytes()


def test_a_packed_set_that_is_damaged_is_refused(images, tmp_path):
    write_packed_set(tmp_path / "set.safetensors", images)
    content = (tmp_path / "set.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-50])
    begins = content.index(b"RIFF")
    (tmp_path / "hurt.safetensors").write_bytes(content[:begins] + b"RAFF" + content[begins + 4 :])
    for name in ("cut", "hurt", "missing"):
        with pytest.raises(DatasetInvalid, match=name):
            read_packed_set(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("notes", "arrays"),
    [
        ({"side": str(10**9)}, {}),
        ({"side": "0"}, {}),
        ({"records": "[]"}, {}),
        ({"records": "[1]"}, {}),
        ({"records": "[" * 10**5}, {}),
        ({}, {"outlined": np.array([4, 5, 6, 99])}),
        ({}, {"outlined": np.array([4])}),
        ({}, {"pictures lengths": np.full(12, -5)}),
        ({}, {"pictures lengths": np.full(13, 9)}),
        ({}, {"inner": np.ones(3, np.float32)}),
    ],
)
def test_a_packed_set_that_contradicts_itself_is_refused(images, tmp_path, notes, arrays):
    file = tmp_path / "set.safetensors"
    write_packed_set(file, images)
    with safe_open(file, "np") as stored:
        told, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    save_file({**tensors, **arrays}, file, metadata={**told, **notes})
    with pytest.raises(DatasetInvalid, match="no packed training set"):
        read_packed_set(file)


def test_what_is_painted_is_abnormal_and_masked_and_what_is_not_is_neither(images):
    painted = [drawn(batches(images, outlined=0, painted=4, others=1), step, SIDE) for step in range(12)]
    lesions = torch.cat([b.truth.masks[:4].flatten(1).any(1) for b in painted])
    labels = torch.cat([b.truth.abnormal[:4] for b in painted])
    assert torch.equal(lesions, labels > 0)
    assert 0 < lesions.float().mean() < 1
    assert all(b.truth.has_mask[:4].all() and b.truth.has_label[:4].all() for b in painted)


def test_what_no_source_says_is_not_claimed(images):
    for step in range(20):
        batch = drawn(batches(images, outlined=1, painted=1, others=8), step, 32)
        for place, sentence in enumerate(batch.captions[2:], start=2):
            if not batch.truth.has_label[place]:
                assert "normal" not in sentence
            if batch.truth.has_mask[place] and batch.truth.abnormal[place] and batch.truth.has_label[place]:
                assert batch.truth.masks[place].any()


def test_an_outlined_lesion_that_was_cropped_away_has_no_label(images):
    far = replace_masks(images, np.zeros((SIDE, SIDE), bool))
    batch = drawn(batches(far, painted=1, others=1), 1, 32)
    assert not batch.truth.has_label[:3].any()


def replace_masks(images, mask):
    return AnomalyImages(images.records, images.images, dict.fromkeys(images.masks, mask), images.inner)


@pytest.fixture(scope="module")
def spec(tiny_tower):
    tower = replace(tiny_tower, taps=(1, 2, 3, 4), conv_stem=(8, 8, 16, 32))
    return DetectorSpec(
        tower,
        fusion="mean_then_softmax",
        image_score="class_and_peak",
        adapter=AdapterSpec(subdivisions=2),
        text=TextSpec(prompts="presets"),
        clusters=ClusterSpec(weight=0.0),
        presets=(BRAIN,),
    )


def train(spec, images, checkpoint, steps=4, on_step=None, **changes):
    torch.manual_seed(0)
    training = JointTraining(
        **{
            **{
                "steps": steps,
                "horizon": 2 * steps,
                "outlined": 4,
                "painted": 2,
                "others": 2,
                "small_side": 32,
                "small_steps": 2,
                "warmup": 1,
            },
            **{"distillation": 0.0, "checkpoint_every": 2, "ema_decay": 0.5, **changes},
        }
    )
    distilled = DistillingClip(spec.tower)
    return train_jointly(
        distilled,
        spec,
        images,
        Path("none"),
        training,
        checkpoint,
        device=torch.device("cpu"),
        on_step=on_step,
    )


def test_the_spot_is_learned_and_nothing_is_found_where_there_is_none(spec, images, tmp_path):
    model = train(
        spec,
        images,
        tmp_path / "c.safetensors",
        steps=60,
        learning_rate=4e-3,
        contrastive=0.0,
        small_steps=0,
    )
    any_kind, presets = text_banks(model.clip, spec)
    torch.testing.assert_close(any_kind.norm(dim=-1), torch.ones(2))
    assert presets.shape == (1, 2, 32)
    pictures = torch.from_numpy(images.images[[0, 4]]).float() / 255
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        found = model.detector((pictures - mean) / std, torch.ones(2, SIDE, SIDE) > 0, text=presets[0])
    spot = torch.from_numpy(images.masks[4])
    assert found.map[1][spot].mean() > found.map[1][~spot].mean() + 0.2
    assert found.score[1] > found.score[0]


def test_an_interrupted_training_ends_like_an_uninterrupted_one(spec, images, tmp_path):
    class Stop(Exception):
        pass

    def stop_at_three(step, terms):
        assert {"loss", "focal", "dice", "image", "peak", "contrastive"} <= terms.keys()
        if step == 3:
            raise Stop

    whole = train(spec, images, tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        train(spec, images, tmp_path / "part.safetensors", on_step=stop_at_three)
    resumed = train(spec, images, tmp_path / "part.safetensors")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[key], atol=1e-6, rtol=1e-5)


def test_sentences_about_normal_and_abnormal_images_differ_in_the_finding_alone():
    normal, abnormal = (state_sentences("MR", "brain", abnormal=sick) for sick in (False, True))
    assert all("brain" in sentence for sentence in [*normal, *abnormal])
    assert not set(normal) & set(abnormal)
    assert not [s for s in abnormal if "healthy" in s or "no lesion" in s]
    assert all("brain" not in s for s in state_sentences("", "", abnormal=True))
