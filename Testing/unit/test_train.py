"""Recipes and training: what is told is used, interruptions change nothing, test images are not seen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import CPU, run, small

from MedAnomalyCLIPLib.cli import main
from MedAnomalyCLIPLib.datasets import left_out_records, planes_of, read_dataset, read_support
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import Cancelled, DatasetInvalid, InvalidRequest, OutputFailed
from MedAnomalyCLIPLib.training.batches import Batches, with_views
from MedAnomalyCLIPLib.training.images import choose_images
from MedAnomalyCLIPLib.training.learner import Learner
from MedAnomalyCLIPLib.training.prepared import prepare_images
from MedAnomalyCLIPLib.training.recipe import RECIPES, bundle_named, read_recipe, shipped_recipes, with_object
from MedAnomalyCLIPLib.training.tower_cache import TowerCache
from MedAnomalyCLIPLib.training.trainer import BUNDLE, batch_of, train


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_trains_a_detector_that_detects(name, clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, name)
    trained = run(recipe, dataset, tmp_path / "run")
    records = [r for r in read_dataset(dataset) if r.split == "test" and r.set == "heads"]
    detector = SliceDetector.load(trained.bundle.folder, device="cpu")
    results = list(detector.detect_many(planes_of(records)))
    assert len({round(result.score, 9) for result in results}) > 1
    assert all(np.isfinite(result.map).all() and result.percentile is not None for result in results)
    assert "Research use only" in trained.bundle.card
    assert str(tmp_path) not in trained.bundle.card + (trained.bundle.folder / "bundle.json").read_text()


@pytest.mark.parametrize("name", ["mvfa_few_shot", "mediclip", "medvmad", "diffusionclip"])
def test_training_lowers_its_loss_on_what_it_learns_from(name, clip_folder, dataset, tmp_path):
    recipe = small(
        clip_folder, name, "optimisation.epochs=8", "selection.criterion=last", "selection.every=8"
    )
    run(recipe, dataset, tmp_path / "run")
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])


def test_the_tower_stays_as_it_was(clip_folder, dataset, tmp_path):
    run(small(clip_folder, "medvmad"), dataset, tmp_path / "run")
    before = load_file(clip_folder / "weights.safetensors")
    after = load_file(tmp_path / "run" / BUNDLE / "weights.safetensors")
    towers = [key for key in before if key.startswith("tower.")]
    assert towers
    assert all(torch.equal(before[key], after[key]) for key in towers)


@pytest.mark.parametrize("name", ["mvfa_normal_only", "diffusionclip"])
def test_an_interrupted_run_ends_like_one_that_was_not(name, clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, name, "selection.every=1", "optimisation.batch_size=5")  # and a rest
    whole = run(recipe, dataset, tmp_path / "whole")
    steps = iter(range(1000))
    for stop in (2, 3):
        count = next(steps)
        with pytest.raises(Cancelled, match="run it again to go on"):
            calls = iter(range(10_000))
            run(recipe, dataset, tmp_path / "parts", is_cancelled=_after(calls, stop + 20 * (count == 0)))
    parts = run(recipe, dataset, tmp_path / "parts")
    assert parts.bundle.manifest.weights_sha256 == whole.bundle.manifest.weights_sha256
    assert parts.bundle.manifest == whole.bundle.manifest
    for log in ("log.csv", "validation.csv"):
        assert (tmp_path / "parts" / log).read_text() == (tmp_path / "whole" / log).read_text()


def _after(calls, count):
    return lambda: next(calls) >= count


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
def test_a_run_that_is_killed_goes_on_to_the_same_result(clip_folder, dataset, tmp_path):
    options = ["mediclip", "--data", str(dataset), "--clip", str(clip_folder), "--sets", "heads", "--quiet"]
    for change in (
        "data.normal=6",
        "optimisation.epochs=12",
        "optimisation.batch_size=4",
        "selection.every=1",
    ):
        options += ["--set", change]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *options, "--output", str(whole)]) == 0
    command = ["train", *options, "--output", str(parts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The tiny architecture is made known by the test, so the command is run with it known.
    known = "import sys, pathlib; from MedAnomalyCLIPLib.clip.importing import import_open_clip as clip"
    known += "; clip().add_model_config(pathlib.Path(sys.argv.pop(1)))"
    code = f"{known}; from MedAnomalyCLIPLib.cli import main; sys.exit(main(sys.argv[1:]))"
    architectures = str(Path(__file__).parents[1] / "data" / "architectures")
    process = subprocess.Popen(
        [sys.executable, "-c", code, architectures, *command], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (parts / "checkpoint.safetensors").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (parts / BUNDLE).exists()
    assert main(command) == 0
    for file in ("bundle/bundle.json", "log.csv", "validation.csv"):
        assert (parts / file).read_text() == (whole / file).read_text()


def test_test_images_are_not_even_opened(clip_folder, dataset, tmp_path):
    records = read_dataset(dataset)
    for record in records:
        if record.split == "test":
            record.path.write_bytes(b"not an image")
    train(small(clip_folder, "mvfa_few_shot"), records, tmp_path / "run", device=CPU, quiet=True)


def test_labels_alone_leave_the_head_for_masks_untrained(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "mvfa_few_shot_labels")
    chosen = choose_images(read_dataset(dataset), recipe)
    recipe = with_object(recipe, chosen.names[chosen.target])
    learner = Learner(recipe, bundle_named(str(clip_folder)).build_clip(), chosen.names)
    trained = {id(p) for group in learner.parameters_to_train() for p in group}
    heads = dict(learner.detector.adapters.named_parameters())
    assert {name.split(".")[1] for name, p in heads.items() if id(p) in trained} == {"detection"}


def test_shots_come_from_the_pool_and_validation_images_are_others(clip_folder, dataset):
    recipe = small(clip_folder, "mvfa_few_shot", "data.normal=2", "data.abnormal=1")
    chosen = choose_images(read_dataset(dataset), recipe)
    assert {r.split for r in chosen.training} == {"valid"}
    assert [r.abnormal for r in chosen.training] == [False, False, True]
    assert not set(chosen.training) & set(chosen.validation)
    assert len(chosen.validation) == 3


def test_seeds_draw_other_shots(clip_folder, dataset):
    records = read_dataset(dataset)
    draws = {
        choose_images(records, small(clip_folder, "mediclip", f"data.shots_seed={seed}")).training
        for seed in range(4)
    }
    assert len(draws) > 1


def test_leaving_a_set_out_learns_from_the_others_and_is_for_it(clip_folder, dataset):
    chosen = choose_images(read_dataset(dataset), small(clip_folder, "mvfa_zero_shot"))
    assert {r.set for r in chosen.training} == {"chests"}
    assert chosen.names[chosen.target] == "heads"


def test_a_bundle_of_few_normal_images_scores_oddities_higher(clip_folder, dataset, tmp_path):
    good = dataset / "heads_AD" / "train" / "good" / "img"
    assert (
        main(
            [
                "train",
                "--support",
                str(good),
                "--set",
                f"start={clip_folder}",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    detector = SliceDetector.load(tmp_path / "run" / BUNDLE, device="cpu")
    records = [r for r in read_dataset(dataset) if r.set == "heads" and r.split == "test"]
    scores = [result.score for result in detector.detect_many(planes_of(records))]
    odd = [score for score, record in zip(scores, records, strict=True) if record.abnormal]
    even = [score for score, record in zip(scores, records, strict=True) if not record.abnormal]
    assert np.mean(odd) > np.mean(even)
    assert detector.image_threshold is not None


def test_slices_of_a_volume_are_support_and_neighbours_are_left_out_together(tmp_path):
    import SimpleITK as sitk

    voxels = np.random.default_rng(0).integers(1, 200, (10, 40, 40)).astype(np.int16)
    voxels[0] = 7
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, tmp_path / "head.nii.gz")
    records = read_support(tmp_path / "head.nii.gz", modality="MR")
    assert len(records) == 9
    assert {r.abnormal for r in records} == {False}
    apart = 2.0 * np.abs(np.arange(9)[:, None] - np.arange(9))
    np.testing.assert_array_equal(left_out_records(records), apart < 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["optimisation.epoch=3"], InvalidRequest, "unknown key 'epoch'"),
        (["optimiser.epochs=3"], InvalidRequest, "unknown key 'optimiser'"),
        (["optimisation.epochs=three"], InvalidRequest, "optimisation.epochs"),
        (["selection.criterion=test"], InvalidRequest, "selection.criterion"),
        (["preset=mvfa"], InvalidRequest, "Unknown preset 'mvfa'"),
        (["epochs"], InvalidRequest, "write key=value"),
    ],
)
def test_a_recipe_that_is_off_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        read_recipe("mvfa_few_shot", ["clip=bundled", *changes])


def test_a_recipe_that_is_no_file_names_those_that_are_shipped():
    with pytest.raises(InvalidRequest, match="mediclip"):
        read_recipe("mvfa_many_shot")


def test_a_recipe_of_ones_own_stands_on_a_shipped_one(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "mediclip"\nclip = "bundled"\n[data]\nnormal = 3\n')
    mine, theirs = read_recipe(tmp_path / "mine.toml"), read_recipe("mediclip", ["clip=bundled"])
    assert mine.data == replace(theirs.data, normal=3)
    assert mine.painting == theirs.painting


def test_recipes_have_the_numbers_of_their_papers():
    mvfa, mediclip, ada = (read_recipe(name) for name in ("mvfa_few_shot", "mediclip", "adaclip"))
    assert (mvfa.optimisation.learning_rate, mvfa.optimisation.epochs, mvfa.detector.scale) == (1e-3, 50, 100)
    assert (mediclip.optimisation.epochs, mediclip.optimisation.batch_size, mediclip.data.normal) == (
        200,
        8,
        16,
    )
    assert (ada.optimisation.optimizer, ada.optimisation.learning_rate, ada.optimisation.epochs) == (
        "adamw",
        0.01,
        5,
    )
    assert {r.detector.tower.model for r in (mvfa, ada)} == {"ViT-L-14-336"}
    assert {r.detector.tower.activation for r in (mvfa, mediclip, ada)} == {"quick_gelu"}


def test_more_shots_than_there_are_is_refused_before_anything_is_written(clip_folder, dataset, tmp_path):
    with pytest.raises(DatasetInvalid, match="50 normal images are asked for"):
        run(small(clip_folder, "mediclip", "data.normal=50"), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_without_a_normal_one_are_refused(clip_folder, dataset, tmp_path):
    records = [r for r in read_dataset(dataset) if r.abnormal]
    with pytest.raises(DatasetInvalid, match="no normal image"):
        train(small(clip_folder, "medvmad"), records, tmp_path / "run", device=CPU)


def test_an_unknown_set_is_named(clip_folder, dataset, tmp_path):
    with pytest.raises(DatasetInvalid, match="no set livers; there are"):
        run(small(clip_folder, "medvmad", 'data.sets=["livers"]'), dataset, tmp_path / "run")


def test_a_mask_of_another_size_is_named_before_training(clip_folder, dataset, tmp_path):
    mask = dataset / "heads_AD" / "train" / "Ungood" / "anomaly_mask" / "3.png"
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(mask)
    with pytest.raises(DatasetInvalid, match=r"3\.png"):
        run(small(clip_folder, "medvmad"), dataset, tmp_path / "run")


def test_a_folder_with_another_run_is_left_alone(clip_folder, dataset, tmp_path):
    run(small(clip_folder, "memory"), dataset, tmp_path / "run")
    before = (tmp_path / "run" / BUNDLE / "bundle.json").read_text()
    with pytest.raises(OutputFailed, match="other settings or images"):
        run(small(clip_folder, "memory", "seed=5"), dataset, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(OutputFailed, match="no training run"):
        run(small(clip_folder, "memory"), dataset, tmp_path / "mine")
    assert (tmp_path / "run" / BUNDLE / "bundle.json").read_text() == before


@pytest.fixture
def prepared(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "medvmad")
    chosen = choose_images(read_dataset(dataset), recipe)
    objects = chosen.objects(chosen.training)
    return prepare_images(chosen.training, recipe.preprocess, objects, tmp_path / "prepared")


def test_images_are_prepared_once(clip_folder, dataset, tmp_path, prepared):
    recipe = small(clip_folder, "medvmad")
    chosen = choose_images(read_dataset(dataset), recipe)
    told = []
    again = prepare_images(
        chosen.training,
        recipe.preprocess,
        chosen.objects(chosen.training),
        tmp_path / "prepared",
        on_progress=lambda *progress: told.append(progress),
    )
    assert not told
    assert torch.equal(again.images, prepared.images)
    assert torch.equal(again.masks, prepared.masks)


def test_batches_depend_on_seed_and_step_alone(clip_folder, prepared):
    recipe = small(clip_folder, "mediclip", "augmentation=random")
    one, two = Batches(prepared, recipe), Batches(prepared, recipe)
    last = two[3]
    assert all(torch.equal(a, b) for a, b in zip(one[3], last, strict=True))
    other = Batches(prepared, replace(recipe, seed=9))[3]
    assert not torch.equal(other.images, last.images)


def test_workers_change_nothing(clip_folder, prepared):
    batches = Batches(prepared, small(clip_folder, "mediclip"))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(4), num_workers=2)
    for step, batch in enumerate(loader):
        assert torch.equal(batch.images, batches[step].images)


def test_every_image_is_drawn_once_in_an_epoch(clip_folder, prepared):
    batches = Batches(prepared, small(clip_folder, "medvmad"))
    drawn = torch.cat([batches[step].indices for step in range(batches.steps_per_epoch)])
    assert sorted(drawn.tolist()) == list(range(len(prepared)))


def test_balanced_draws_show_as_many_normal_as_abnormal_images(clip_folder, prepared):
    few_normal = prepared[(prepared.abnormal | (torch.arange(len(prepared)) == 0)).nonzero()[:, 0]]
    batches = Batches(
        few_normal, small(clip_folder, "medvmad", "data.balanced=true", "optimisation.epochs=60")
    )
    share = torch.cat([batches[step].abnormal for step in range(len(batches))]).float().mean()
    assert 0.4 < float(share) < 0.6


def test_painted_lesions_are_new_in_every_epoch_and_lie_on_normal_images_only(clip_folder, prepared):
    recipe = small(clip_folder, "mediclip", "painting.synthesis.identity_share=0.0")
    batches = Batches(prepared, recipe)
    seen = {}
    for step in range(2 * batches.steps_per_epoch):
        batch = batches[step]
        for index, mask in zip(batch.indices.tolist(), batch.masks, strict=True):
            seen.setdefault(index, []).append(mask)
    for index, (first, second) in seen.items():
        assert torch.equal(first, second) == bool(prepared.abnormal[index])


def test_views_keep_labels_masks_and_origins_together(prepared):
    views = with_views(prepared)
    assert len(views) == 11 * len(prepared)
    assert torch.equal(views.images[::11], prepared.images)
    assert torch.equal(views.origins.view(-1, 11)[:, 5], prepared.origins)
    assert torch.equal(views.masks.view(-1, 11, 64, 64).any(-1).any(-1).all(1), prepared.abnormal)


def test_what_is_not_moved_is_what_detection_sees(clip_folder, dataset, prepared):
    records = choose_images(read_dataset(dataset), small(clip_folder, "medvmad")).training
    detector = SliceDetector.load(clip_folder, device="cpu")
    plane = next(planes_of(records[:1]))
    seen = detector._preprocessor.prepare(plane)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5,) * 3, (0.25,) * 3))
    batch = batch_of(prepared, [0])
    torch.testing.assert_close(
        batch.images[0].expand(3, -1, -1), seen.tensor * std + mean, atol=0.5 / 255 + 1e-6, rtol=0
    )
    assert torch.equal(batch.valid[0], seen.valid)


def test_train_on_the_command_line_tells_what_came_of_it(clip_folder, dataset, tmp_path, capsys):
    arguments = ["train", "mediclip", "--data", str(dataset), "--sets", "heads", "--clip", str(clip_folder)]
    arguments += ["--set", "data.normal=4", "--set", "optimisation.epochs=1", "--seed", "3", "--json"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bundle"] == str(tmp_path / "run" / BUNDLE)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["recipe"]
    assert settings["seed"] == settings["data"]["shots_seed"] == 3


def test_train_without_images_says_how_to_name_them(tmp_path, capsys):
    assert main(["train", "mediclip", "--output", str(tmp_path / "run")]) == 2
    assert "--data or --support" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["medvmad", "adaclip", "mediclip"])
def test_keeping_what_the_tower_gave_changes_no_loss(name, clip_folder, dataset, prepared):
    recipe = small(clip_folder, name, "painting.share=0.0", "data.abnormal=2")
    chosen = choose_images(read_dataset(dataset), recipe)
    recipe = with_object(recipe, chosen.names[chosen.target])
    torch.manual_seed(0)
    learner = Learner(recipe, bundle_named(str(clip_folder)).build_clip(), chosen.names).eval()
    batch, cache = batch_of(prepared, [3, 0, 7]), TowerCache()
    batch = batch._replace(objects=torch.zeros(3, dtype=torch.int64))
    losses = [
        float(learner.losses(batch, torch.Generator().manual_seed(0), torch.float32, kept)["loss"].detach())
        for kept in (None, cache, cache)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == losses[2]


def test_a_cache_runs_the_tower_once_for_each_image_and_no_further_than_its_room():
    calls = []

    def rows(indices):
        def compute(part):
            calls.extend(indices[part].tolist())
            return (indices[part, None].float() * torch.ones(1, 4),)

        return compute

    cache = TowerCache(largest=3 * 16)
    for wanted in ([0, 1], [1, 0], [2, 3], [2, 3], [0, 2]):
        indices = torch.tensor(wanted)
        assert torch.equal(cache.through("x", indices, rows(indices))[0][:, 0], indices.float())
    assert calls == [0, 1, 2, 3, 3]


def test_a_detector_that_fuses_other_maps_works_with_what_gives_them(clip_folder, dataset, tmp_path):
    recipe = small(clip_folder, "adaclip", "preset=diffusionclip", "detector.feature_fusion.channels=[3,6]")
    with pytest.raises(InvalidRequest, match="feature maps of another network"):
        run(recipe, dataset, tmp_path / "run")

    def maps(images):
        small = torch.nn.functional.avg_pool2d(images, 8)
        return [small, torch.cat([small, small], dim=1)]

    trained = run(recipe, dataset, tmp_path / "run", features=maps)
    before, after = (
        load_file(clip_folder / "weights.safetensors"),
        load_file(trained.bundle.folder / "weights.safetensors"),
    )
    assert "feature_fusion.0.gate.0.weight" in after.keys() - before.keys()
    plane = next(planes_of([r for r in read_dataset(dataset) if r.split == "test"]))
    with pytest.raises(InvalidRequest, match="feature maps"):
        SliceDetector.load(trained.bundle.folder, device="cpu").detect(plane)
    result = SliceDetector.load(trained.bundle.folder, device="cpu", features=maps).detect(plane)
    blind = SliceDetector.load(trained.bundle.folder, device="cpu", features=lambda x: maps(0 * x)).detect(
        plane
    )
    assert not np.allclose(result.map, blind.map)


def test_shipped_recipes_are_listed_with_what_they_make(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in RECIPES.glob("*.toml"))
    assert all(line[24:].strip() for line in lines)


def test_the_recipe_shown_to_contributors_is_the_one_that_ships():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    assert tomllib.loads(shown) == tomllib.loads((RECIPES / "memory.toml").read_text())


def test_a_validation_speaks_with_the_stored_text_and_encodes_no_prompts(clip_folder, dataset, prepared):
    recipe = small(clip_folder, "mediclip")
    chosen = choose_images(read_dataset(dataset), recipe)
    learner = Learner(recipe, bundle_named(str(clip_folder)).build_clip(), chosen.names).eval()
    batch = batch_of(prepared, [0, 5])
    learner.store_text(0)
    aligned, text = learner.align(batch)
    expected = learner.detector.decide(aligned, text, batch.valid)
    learner.prompts.register_forward_hook(lambda *_: pytest.fail("prompts were encoded again"))
    torch.testing.assert_close(learner.detect(batch).map, expected.map)
