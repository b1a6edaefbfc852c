"""Teaching a detector with normal slices: what it remembers, how it is judged, what it leaves behind."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import files_limited_to

from MedAnomalyCLIPLib import taught_detector
from MedAnomalyCLIPLib.bundle import Bundle
from MedAnomalyCLIPLib.bundle_list import list_bundles
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.errors import Cancelled, InvalidRequest, OutputFailed
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.neighbours import left_out
from MedAnomalyCLIPLib.preprocess import SlicePreprocessor
from MedAnomalyCLIPLib.taught_detector import folder_name
from MedAnomalyCLIPLib.teaching import origins_of, teach, teaching
from MedAnomalyCLIPLib.training.thresholds import specific_threshold
from MedAnomalyCLIPLib.volume import Volume


def head(seed=0, slices=30, modality="MR"):
    """Discs on noise that shrink towards both ends, 2 mm apart."""
    rng = np.random.default_rng(seed)
    k, j, i = np.meshgrid(*(np.linspace(-1, 1, n) for n in (slices, 48, 44)), indexing="ij")
    voxels = 90.0 * (j**2 + i**2 < 0.9 - 0.7 * k**2) + 60.0 * (j**2 + i**2 < 0.2 - 0.1 * k)
    return Volume(
        (voxels + rng.normal(0, 6, voxels.shape)).astype(np.float32), np.diag([1, 1, 2.0, 1]), modality
    )


def planes(indices, **of):
    return [cut_slice(head(**of), 2, index) for index in indices]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty but for what is tested."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def start(tiny_bundle):
    return tiny_bundle.folder


@pytest.fixture
def taught(start):
    return teach(planes(range(2, 28, 4)), name="My scanner", start=start, device="cpu")


def rebuilt_scores(bundle, slices, volumes):
    """Slowly: for each slice a memory that is made anew without it and what is left out with it."""
    prepare = SlicePreprocessor(bundle.manifest.preprocess).prepare
    prepared = [prepare(plane) for plane in slices]
    images, valid = (torch.stack([getattr(p, key) for p in prepared]) for key in ("tensor", "valid"))
    whole = bundle.build()
    out = left_out(origins_of(slices, volumes))
    scores = []
    with torch.no_grad():
        for place in range(len(slices)):
            others = np.flatnonzero(~out[place])
            seen = whole.align(images[others])
            rows = [patches.flatten(0, 1) for patches in whole.map_head(seen).patches]
            spec = replace(
                whole.spec, memory=replace(whole.spec.memory, rows=len(rows[0]), precision="float32")
            )
            without = type(whole)(spec).eval()
            state = {k: v for k, v in whole.state_dict().items() if k != "memory.rows"}
            without.load_state_dict(state, strict=False)
            without.memory.fill(rows)
            scores.append(float(without(images[place][None], valid[place][None]).score))
    return scores


@pytest.mark.parametrize("volumes", [None, ["a"] * 3 + ["b"] * 4])
def test_leave_one_out_is_what_a_memory_rebuilt_without_the_slice_says(start, volumes):
    slices = planes([2, 4, 9, 13, 14, 20, 25])
    taught = teach(slices, name="x", volumes=volumes, start=start, device="cpu")
    scores = [one.score for one in taught.left_one_out]
    np.testing.assert_allclose(scores, rebuilt_scores(taught.bundle, slices, volumes), atol=2e-3)
    assert np.ptp(scores) > 0.02


def test_a_near_copy_does_not_vouch_for_a_slice(start):
    """Each slice twice, 2 mm apart: without the rule each would find its double in the memory."""
    volume = head()
    thin = replace(volume, voxels=np.repeat(volume.voxels[::5], 4, axis=0))
    single = [cut_slice(thin, 2, k) for k in range(0, 24, 4)]
    double = [cut_slice(thin, 2, k + more) for k in range(0, 24, 4) for more in (0, 1)]
    single, doubled = (teach(some, name="x", start=start, device="cpu") for some in (single, double))
    np.testing.assert_allclose(
        [one.score for one in doubled.left_one_out[::2]],
        [one.score for one in single.left_one_out],
        atol=1e-4,
    )


def test_thresholds_and_reference_are_those_of_the_slices_left_out(taught):
    scores = sorted(one.score for one in taught.left_one_out)
    manifest = taught.bundle.manifest
    assert list(manifest.reference.scores) == scores
    assert manifest.image_threshold == max(scores), "of few images, all stay below"
    marked = np.mean([one.marked_share for one in taught.left_one_out])
    assert marked == pytest.approx(0.005, abs=0.001)  # 99.5 % of normal pixels stay below
    assert taught.worst_first()[0] == np.argmax([one.score for one in taught.left_one_out])


def test_it_detects_and_knows_its_own_slices(taught, start, tmp_path):
    detector = SliceDetector.load(taught.keep(tmp_path / "mine"), device="cpu")
    own = [r.score for r in detector.detect_many(planes(range(2, 28, 4)))]
    left = [one.score for one in taught.left_one_out]
    assert np.mean(own) < np.mean(left)
    bright = planes([14])[0]
    bright.pixels[20:30, 10:20] += 150
    assert detector.detect(bright).score > max(left)


def test_the_same_slices_give_the_same_detector(start, tmp_path):
    one, two = (
        teach(planes(range(2, 28, 4)), name="x", start=start, device="cpu").keep(tmp_path) for _ in range(2)
    )
    for file in ("bundle.json", "weights.safetensors", "MODEL_CARD.md"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_a_memory_smaller_than_its_slices_is_taught_too(start, monkeypatch):
    import MedAnomalyCLIPLib.training.recipe as recipes

    whole = recipes.read_recipe
    monkeypatch.setattr(recipes, "read_recipe", lambda name, c: whole(name, [*c, "detector.memory.rows=40"]))
    stages = []
    taught = teach(
        planes(range(2, 28, 4)), name="x", start=start, device="cpu", on_progress=lambda p: stages.append(p)
    )
    assert taught.bundle.manifest.detector.memory.rows == 40
    assert taught.bundle.build().memory.rows.shape[1] == 40
    assert [p.done for p in stages if p.stage == "choose"][-1] == 2 * 40


def test_a_taught_detector_can_be_taught_again(taught, tmp_path):
    folder = taught.keep(tmp_path)
    again = teach(planes(range(0, 30, 3)), name="Again", start=folder, device="cpu")
    direct = again.bundle.build()
    assert direct.memory.rows.shape[1] == 10 * 16
    assert "It started from My scanner, version 1" in again.bundle.card


def test_the_card_tells_what_it_was_made_from(taught):
    card = taught.bundle.card
    for words in (
        "Taught with 7 slices of 1 volume that its maker called normal (MR, axial, pixels of 1 mm).",
        "It started from tiny, version 1",
        "less than 5 mm away",
        f"| 1 | Axial 3 of 30, aligned | {taught.left_one_out[0].score:.3f} |",
        f"Pixel threshold {taught.bundle.manifest.threshold:.2f}",
        "Research use only",
    ):
        assert words in card
    assert taught.bundle.manifest.training_data[-1].images == 7


def test_nothing_tells_where_the_slices_or_the_start_lay(taught, start):
    text = taught.bundle.card + (taught.bundle.folder / "bundle.json").read_text()
    assert str(start.parent) not in text


# Time


def test_time_is_told_from_the_first_slice_on_and_shrinks(start):
    told = []
    teach(planes(range(2, 28, 4)), name="x", start=start, device="cpu", on_progress=told.append)
    compared = [p for p in told if p.stage == "compare"]
    assert [(p.done, p.total) for p in compared] == [(n, 7) for n in range(1, 8)]
    assert all(p.seconds_left > 0 for p in compared[:-1])
    assert compared[-1].seconds_left == 0  # nothing is left to choose from
    assert told[-1].stage == "write"


def test_the_estimate_after_the_first_slice_is_about_what_it_takes(monkeypatch, start):
    """With a clock on which every slice takes one second, and comparing two a tenth."""
    from MedAnomalyCLIPLib import teaching as module
    from MedAnomalyCLIPLib.detectors import support
    from MedAnomalyCLIPLib.steps import Step

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(support, "comparison_seconds", lambda detector: 0.1)
    detector = Bundle.load(start).build()
    detector.memory = torch.nn.Module()
    detector.memory.rows = torch.zeros(2, 7 * 16, 32)
    clock = module._Clock(7, detector)
    left = []
    for done in range(1, 8):
        now[0] += 1.0 + 0.1 * (done - 1)
        left.append(clock.progress(Step("compare", done, 7)).seconds_left)
    np.testing.assert_allclose(left, [6 - n + 0.1 * (21 - n * (n + 1) / 2) for n in range(7)], atol=1e-9)


# Leaving early, and what can go wrong


@pytest.mark.parametrize("stop_at", range(0, 18, 4))
def test_stopping_at_any_step_leaves_nothing(start, temporary, stop_at):
    calls = iter(range(100))
    with pytest.raises(Cancelled):
        teach(
            planes(range(2, 28, 4)),
            name="x",
            start=start,
            device="cpu",
            is_cancelled=lambda: next(calls) >= stop_at,
        )
    assert not list(temporary.iterdir())


def test_steps_that_are_dropped_leave_nothing(start, temporary):
    steps = teaching(planes(range(2, 28, 4)), name="x", start=start, device="cpu")
    for _ in range(12):
        next(steps)
    steps.close()
    assert not list(temporary.iterdir())
    assert torch.is_grad_enabled()


def test_gradients_are_on_for_others_between_steps(start):
    for _ in teaching(planes(range(2, 28, 4)), name="x", start=start, device="cpu"):
        assert torch.is_grad_enabled()


def test_a_detector_that_is_not_kept_is_gone_with_its_object(taught, temporary):
    assert list(temporary.iterdir())
    taught.discard()
    assert not list(temporary.iterdir())
    with pytest.raises(InvalidRequest, match="teach it again"):
        taught.keep(temporary)


def test_a_full_disk_while_it_is_made_leaves_nothing(start, temporary):
    with files_limited_to(20_000), pytest.raises(OutputFailed):
        teach(planes(range(2, 28, 4)), name="x", start=start, device="cpu")
    assert not list(temporary.iterdir())


def test_a_full_disk_while_it_is_kept_leaves_the_folder_as_it_was_and_the_detector_alive(taught, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    with files_limited_to(20_000), pytest.raises(OutputFailed):
        taught.keep(mine)
    assert not list(mine.iterdir())
    assert taught.keep(mine).is_dir()


def test_a_place_that_cannot_be_written_is_told(taught, tmp_path):
    (tmp_path / "file").write_text("in its place")
    with pytest.raises(OutputFailed):
        taught.keep(tmp_path / "file")


# Names


def test_kept_detectors_of_one_name_get_folders_of_their_own(start, tmp_path, temporary):
    folders = []
    for _ in range(3):
        taught = teach(planes(range(2, 28, 4)), name="3T / FLAIR", start=start, device="cpu")
        folders.append(taught.keep(tmp_path / "mine").name)
    assert folders == ["3T-FLAIR", "3T-FLAIR-2", "3T-FLAIR-3"]
    found, damaged = list_bundles(tmp_path / "mine")
    assert [bundle.name for bundle in found] == ["3T / FLAIR"] * 3
    assert not damaged
    assert not list(temporary.iterdir())


def test_a_name_that_is_taken_at_the_last_moment_is_not_overwritten(taught, tmp_path, monkeypatch):
    taken = tmp_path / "My-scanner"

    def rename(path, place):
        if place == taken and not taken.exists():
            taken.mkdir()
            (taken / "file").write_text("somebody else's")
        return whole(path, place)

    whole = Path.rename
    monkeypatch.setattr(taught_detector.Path, "rename", rename)
    assert taught.keep(tmp_path).name == "My-scanner-2"
    assert [f.name for f in taken.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("3T FLAIR", "3T-FLAIR"),
        ("../../etc", "etc"),
        ("con", "detector-con"),
        ("LPT1.x", "detector-LPT1.x"),
        ("???", "detector"),
        ("Schädel µCT", "Schädel-μCT"),
        ("x" * 80, "x" * 60),
        (".hidden.", "hidden"),
    ],
)
def test_a_folder_gets_a_name_that_every_system_takes(name, folder):
    assert folder_name(name) == folder


@pytest.mark.parametrize("name", ["", "  \n", "x" * 81, "a\x00b"])
def test_a_detector_needs_a_name(name):
    with pytest.raises(InvalidRequest, match="name"):
        teaching(planes([2, 9]), name=name)


# Which slices


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "at least 2 .* there are 0"),
        (planes([3]), "there is 1"),
        (planes([3, 9, 3]), "Axial 4 of 30, aligned is among the slices already"),
        (planes([3, 4, 5]), "Axial 4 of 30, aligned lies less than 5 mm"),
        (planes([3, 9]) + planes([20], modality="CT"), "is CT and others are MR"),
    ],
)
def test_slices_that_teach_nothing_are_refused_before_any_work(slices, message):
    with pytest.raises(InvalidRequest, match=message):
        teaching(slices, name="x")


def test_colour_and_grey_are_not_mixed():
    grey, colour = planes([3, 9])
    colour = replace(colour, pixels=np.repeat(colour.pixels[..., None], 3, axis=2).astype(np.uint8))
    with pytest.raises(InvalidRequest, match="is colour and the others are grey"):
        teaching([grey, colour], name="x")


def test_a_volume_has_to_be_named_for_each_plane():
    with pytest.raises(InvalidRequest, match="2 planes and 1 volumes"):
        teaching(planes([3, 9]), name="x", volumes=["a"])


def test_a_start_that_needs_more_than_an_image_is_refused(make_bundle, tiny_tower):
    from MedAnomalyCLIPLib.detectors.presets import PRESETS

    spec = replace(PRESETS["diffusionclip"].detector, tower=replace(tiny_tower, taps=(1, 2, 3, 4)))
    spec = replace(spec, text=replace(spec.text, name="Brain"))
    with pytest.raises(InvalidRequest, match="cannot be taught"):
        teach(planes([2, 9, 16]), name="x", start=make_bundle("fused", detector=spec).folder, device="cpu")


def test_an_image_threshold_holds_what_it_promises_with_the_confidence_that_it_names():
    """Of many references of 60 normal images, four in five give one that 5 % of others exceed at most."""
    rng = np.random.default_rng(0)
    thresholds = np.array([specific_threshold(rng.exponential(size=60).tolist()) for _ in range(2000)])
    exceeded = np.exp(-thresholds)
    assert 0.79 < np.mean(exceeded <= 0.05) < 0.95
    assert np.median(exceeded) > 0.01, "nor is it far above what is needed"
    assert specific_threshold([0.2, 0.9, 0.5]) == 0.9
