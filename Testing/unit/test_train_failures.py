"""What goes wrong around a training: said early, by name, and nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from full_disk import files_limited_to
from PIL import Image
from small_runs import CPU, run, small

from MedAnomalyCLIPLib.cli import main
from MedAnomalyCLIPLib.datasets import left_out_records, read_dataset, read_support
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.errors import (
    Cancelled,
    InvalidRequest,
    MedAnomalyCLIPError,
    OutputFailed,
    UnreadableImage,
)
from MedAnomalyCLIPLib.tensor_file import write_tensors
from MedAnomalyCLIPLib.training.finishing import fill_memory
from MedAnomalyCLIPLib.training.images import choose_images
from MedAnomalyCLIPLib.training.prepared import prepare_images
from MedAnomalyCLIPLib.training.recipe import read_recipe
from MedAnomalyCLIPLib.training.trainer import BUNDLE, train


def test_a_tensor_file_on_a_full_disk_is_an_error_that_names_it_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "best.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    with files_limited_to(1000), pytest.raises(OutputFailed, match=r"best\.safetensors could not be written"):
        write_tensors(path, {"a": torch.zeros(3000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [10_000, 100_000, 200_000])  # prepared images, the best epoch, the bundle
def test_a_run_that_met_a_full_disk_goes_on_when_there_is_room(size, clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "mediclip")
    whole = run(recipe, dataset, tmp_path / "whole")
    with files_limited_to(size), pytest.raises(OutputFailed, match="could not be written"):
        run(recipe, dataset, tmp_path / "run")
    trained = run(recipe, dataset, tmp_path / "run")
    assert trained.bundle.manifest == whole.bundle.manifest
    assert {path.name for path in (tmp_path / "run").iterdir()} - {
        path.name for path in (tmp_path / "whole").iterdir() if "events" not in path.name
    } <= {path.name for path in (tmp_path / "run").glob("events*")}


@pytest.fixture
def begun(clip_folder, dataset, tmp_path):
    """A run stopped after its first epoch, and a function that goes on with it."""
    recipe = small(clip_folder, "mediclip", "selection.every=1")
    with pytest.raises(Cancelled):
        run(recipe, dataset, tmp_path / "run", is_cancelled=lambda: (tmp_path / "run" / "log.csv").is_file())
    return tmp_path / "run", lambda: run(recipe, dataset, tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"{}", bytes(range(256)) * 4, None])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "best.safetensors"])
def test_a_damaged_checkpoint_is_named_with_what_helps(name, content, begun):
    folder, go_on = begun
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UnreadableImage, match=rf"{name} is damaged.*delete checkpoint\.safetensors"):
        go_on()
    (folder / "checkpoint.safetensors").unlink()
    assert go_on().epoch > 0


def test_damaged_arrays_are_prepared_again(begun, clip_folder):
    folder, go_on = begun
    one, other = sorted(folder.glob("prepared-*"))
    one.write_bytes(b"")
    other.write_bytes((clip_folder / "weights.safetensors").read_bytes())
    assert go_on().epoch > 0


def test_damaged_settings_keep_a_run_from_being_written_over(begun):
    folder, go_on = begun
    (folder / "settings.json").write_bytes(b"\xff\xfe")
    with pytest.raises(OutputFailed, match="other settings"):
        go_on()


def test_two_runs_in_one_folder_keep_out_of_each_others_way(begun):
    folder, go_on = begun
    with FileLock(folder / "run.lock"), pytest.raises(OutputFailed, match="runs in run already"):
        go_on()
    assert go_on().epoch > 0


def test_what_a_kill_left_half_written_is_cleared_up(clip_folder, dataset, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.partial").write_text("{")
    run(small(clip_folder, "memory"), dataset, folder)
    (folder / ".bundle-abc").mkdir()
    (folder / "checkpoint.partial").write_text("")
    run(small(clip_folder, "memory"), dataset, folder)
    assert not list(folder.glob("*.partial")) + list(folder.glob(".bundle-*"))


def test_training_that_runs_away_is_told_with_what_to_change(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "medvmad", "optimisation.learning_rate=1e18", "optimisation.epochs=4")
    with pytest.raises(InvalidRequest, match=r"is not a number.*optimisation\.learning_rate"):
        run(recipe, dataset, tmp_path / "run")


def test_some_masks_may_be_missing_in_batches_of_one(clip_folder, dataset, tmp_path):
    records = [
        replace(record, mask=None) if number % 2 else record
        for number, record in enumerate(read_dataset(dataset))
    ]
    recipe = small(clip_folder, "medvmad", "optimisation.batch_size=1", "optimisation.epochs=1")
    train(recipe, records, tmp_path / "run", device=CPU, quiet=True)
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    focal = [float(row[rows[0].index("focal")]) for row in rows[1:]]
    assert sum(value == 0 for value in focal) == 3  # of six abnormal images


def refusal(records, recipe):
    with pytest.raises(MedAnomalyCLIPError) as caught:
        choose_images(records, recipe)
    return str(caught.value)


def test_images_that_cannot_teach_a_recipe_are_refused_before_they_are_prepared(clip_folder, dataset):
    records = read_dataset(dataset)
    normal = [record for record in records if not record.abnormal]
    blind = [replace(record, mask=None) for record in records]
    assert "painting.share" in refusal(normal, small(clip_folder, "medvmad"))
    assert "objective.maps=none" in refusal(blind, small(clip_folder, "adaclip"))
    assert "two different normal images" in refusal(
        records, small(clip_folder, "mvfa_few_shot", "data.normal=1")
    )
    assert "there are: train, valid, test" in refusal(
        records, small(clip_folder, "medvmad", 'data.learn_from=["trian"]')
    )
    assert "data.pool" in refusal(records, small(clip_folder, "mediclip", "data.pool=pool"))


def test_what_is_learned_from_is_no_test(clip_folder):
    for change in ('data.learn_from=["train", "test"]', "data.pool=test"):
        with pytest.raises(InvalidRequest, match="is no test"):
            small(clip_folder, "mediclip", change)


def test_a_card_says_whose_test_images_were_learned_from(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "mvfa_zero_shot", 'data.learn_from=["test"]', "optimisation.epochs=1")
    assert "Test images of heads took no part" in run(recipe, dataset, tmp_path / "run").bundle.card


def test_images_of_many_thousands_are_divided_at_once(clip_folder, dataset):
    record = next(r for r in read_dataset(dataset) if r.set == "heads" and not r.abnormal)
    many = [
        replace(record, path=record.path.with_name(f"{split}{number}.png"), split=split)
        for split in ("train", "test")
        for number in range(5000)
    ]
    chosen = choose_images(many, small(clip_folder, "medvmad", "painting.share=0.5"))
    assert len(chosen.training) == 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimisation.learning_rate=nan", "learning_rate is nan"),
        ("optimisation.learning_rate=inf", "learning_rate is inf"),
        ("optimisation.betas=[2, 3]", "optimisation.betas"),
        ("optimisation.weight_decay=-1", "optimisation.weight_decay"),
        ("optimisation.epochs=99999999999999999999", "epochs is 9999"),
        ("seed=-1", "seed is -1"),
        ("data.shots_seed=-1", "data.shots_seed"),
        ("objective.map_weight=-1", "objective.map_weight"),
        ("preset=[1]", "Unknown preset"),
        ("detector=3", "detector is 3"),
        ("detector.tower=[1]", "detector.tower is"),
        ("detector.tower.bogus=1", "unknown key 'bogus'"),
        ("preprocess.bogus=1", "unknown key 'bogus'"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(change, message, clip_folder):
    with pytest.raises(MedAnomalyCLIPError, match=message):
        small(clip_folder, "medvmad", change)


def test_changes_stand_above_what_a_bundle_says_of_its_tower(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "mediclip", "detector.tower.taps=[3]", "optimisation.epochs=1")
    assert run(recipe, dataset, tmp_path / "run").bundle.manifest.detector.tower.taps == (3,)


def test_unknown_keys_of_a_file_are_refused_where_a_bundle_takes_their_table(clip_folder, tmp_path):
    (tmp_path / "mine.toml").write_text('base = "mediclip"\n[preprocess]\nbogus = 1\n')
    with pytest.raises(InvalidRequest, match="unknown key 'bogus'"):
        read_recipe(tmp_path / "mine.toml", [f"clip={json.dumps(str(clip_folder))}"])


def test_a_base_lies_beside_its_recipe_and_does_not_stand_on_it(tmp_path):
    (tmp_path / "low.json").write_text('\ufeff{"base": "mediclip", "clip": "bundled", "seed": 4}')
    (tmp_path / "high").write_text('base = "low.json"\n')
    assert read_recipe(tmp_path / "high").seed == 4
    (tmp_path / "low.json").write_text('{"base": "high"}')
    with pytest.raises(InvalidRequest, match="stands on itself"):
        read_recipe(tmp_path / "high")


@pytest.mark.parametrize("name", ["nu\0l", "x" * 5000])
def test_a_base_that_no_file_can_be_called_is_refused(tmp_path, name):
    (tmp_path / "mine.json").write_text(json.dumps({"base": name}))
    with pytest.raises(InvalidRequest, match="neither a file that can be read"):
        read_recipe(tmp_path / "mine.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"= 3"])
@pytest.mark.parametrize("suffix", [".toml", ".json", ""])
def test_a_recipe_that_is_none_is_refused_by_name(content, suffix, tmp_path):
    (tmp_path / f"mine{suffix}").write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"mine{suffix} is not valid"):
        read_recipe(tmp_path / f"mine{suffix}")


def test_names_of_support_files_stay_out_of_the_bundle(clip_folder, dataset, tmp_path):
    folder = (dataset / "heads_AD/train/good/img").rename(tmp_path / "Doe^Jane")
    arguments = ["train", "--support", str(folder), "--set", f"start={json.dumps(str(clip_folder))}"]
    assert main([*arguments, "--output", str(tmp_path / "run"), "--quiet"]) == 0
    files = [path for path in (tmp_path / "run" / BUNDLE).iterdir() if path.suffix in (".json", ".md")]
    assert files
    assert not any("Doe" in path.read_text() for path in files)


def test_sentences_ask_what_support_images_show(clip_folder, dataset, tmp_path, capsys):
    good = dataset / "heads_AD/train/good/img"
    arguments = ["train", "mvfa_normal_only", "--support", str(good), "--clip", str(clip_folder)]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "--object" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padding_takes_no_part_in_the_threshold_of_a_memory(clip_folder, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.integers(0, 255, (16, 64), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    recipe = small(clip_folder, "memory", "detector.memory.rows=8")
    records = read_support(tmp_path)
    images = prepare_images(records, recipe.preprocess, [0] * 3, tmp_path)
    left_out = torch.from_numpy(left_out_records(records))
    held_out = fill_memory(recipe, AnomalyDetector(recipe.detector), images, left_out)
    assert len(held_out.pixels) == images.valid.sum() == 3 * 16 * 64


def test_stopping_while_thresholds_are_measured_loses_nothing(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "mediclip", "optimisation.epochs=1")
    stages = []
    with pytest.raises(Cancelled):
        run(
            recipe,
            dataset,
            tmp_path / "run",
            on_progress=lambda stage, *_: stages.append(stage),
            is_cancelled=lambda: "thresholds" in stages,
        )
    log = (tmp_path / "run" / "log.csv").read_bytes()
    assert run(recipe, dataset, tmp_path / "run").epoch == 1
    assert (tmp_path / "run" / "log.csv").read_bytes() == log


def test_a_normal_patient_beside_an_abnormal_one_is_divided_for_a_memory(dataset):
    records = [replace(r, cluster="a" if r.abnormal else "n") for r in read_dataset(dataset)[:12]]
    out, abnormal = left_out_records(records), np.array([bool(r.abnormal) for r in records])
    assert not out[np.ix_(~abnormal, ~abnormal)].all(axis=1).any()
    assert out[abnormal].all()
    assert out[:, abnormal].all()


def test_a_damaged_picture_among_support_images_is_named_and_other_files_are_left_alone(dataset):
    folder = dataset / "heads_AD/train/good/img"
    (folder / "notes.txt").write_text("six normal heads")
    assert len(read_support(folder)) == 6
    (folder / "7.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"7\.png"):
        read_support(folder)
