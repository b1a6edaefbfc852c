"""What a slice is compared with: presets, guesses, a reader's own phrases, and what scores then mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from MedAnomalyCLIPLib.bundle import Bundle, NormalReference, PresetCalibration, save_bundle
from MedAnomalyCLIPLib.clip.towers import create_clip, text_side
from MedAnomalyCLIPLib.detection import SliceDetector
from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
from MedAnomalyCLIPLib.detectors.familiarity import Familiarity, look_of, mean_token
from MedAnomalyCLIPLib.detectors.specification import FamiliaritySpec, PresetSpec, TextSpec
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.prompt import Prompt, guess_preset
from MedAnomalyCLIPLib.volume import Volume

BRAIN = PresetSpec("brain-mr", "Brain, MR", ("MR",), "brain", ("head",))
CHEST = PresetSpec("chest-xr", "Chest, X-ray", ("XR",), "chest")
BREAST = PresetSpec("breast-mr", "Breast, MR", ("MR",), "breast")


@pytest.fixture
def detector(tmp_path, tiny_manifest):
    """A detector with two presets, of which one is calibrated, and its text tower."""
    torch.manual_seed(0)
    spec = replace(
        tiny_manifest.detector,
        text=TextSpec(prompts="presets"),
        presets=(BRAIN, CHEST),
        familiarity=FamiliaritySpec(3),
    )
    clip, network = create_clip(spec.tower), AnomalyDetector(spec)
    network.tower.visual.load_state_dict(clip.visual.state_dict())
    network.text_bank.copy_(torch.nn.functional.normalize(torch.randn(2, 32), dim=-1))
    network.preset_banks.copy_(torch.nn.functional.normalize(torch.randn(2, 2, 32), dim=-1))
    network.familiarity.fill(torch.randn(3, 2 * 2 * 64))
    own = PresetCalibration("brain-mr", 0.25, 0.9, NormalReference("two heads", (0.0, 0.1)))
    manifest = replace(tiny_manifest, detector=spec, calibrations=(own,), unlike_threshold=0.5)
    save_bundle(tmp_path / "presets", manifest, network, "", text_side(clip))
    return SliceDetector.load(tmp_path / "presets", device="cpu")


@pytest.fixture
def plane():
    voxels = np.random.default_rng(0).integers(0, 200, (1, 40, 40), dtype=np.uint8)
    return cut_slice(Volume(voxels, np.eye(4), "MR"), 2, 0)


@pytest.mark.parametrize(
    ("modality", "words", "guess"),
    [
        ("MR", "T1 axial Head", "brain-mr"),
        ("MRI", "brain", "brain-mr"),
        ("DX", "CHEST", "chest-xr"),
        ("MR", "", ""),
        ("CT", "brain", ""),
        ("MR", "head and breast", ""),
    ],
)
def test_a_preset_is_guessed_only_where_modality_and_part_are_told(modality, words, guess):
    assert guess_preset((BRAIN, CHEST, BREAST), modality, words) == guess


def test_a_preset_brings_its_own_text_threshold_and_reference(detector, plane):
    plain, brain = detector.detect(plane), detector.detect(plane, prompt=Prompt("brain-mr"))
    assert not np.allclose(plain.map, brain.map)
    assert (brain.threshold, brain.image_threshold, brain.prompt) == (0.25, 0.9, "Brain, MR")
    assert brain.percentile == 100.0
    assert plain.threshold == detector.threshold


def test_a_preset_without_normal_images_gives_no_percentile(detector, plane):
    result = detector.detect(plane, prompt=Prompt("chest-xr"))
    assert result.percentile is None
    assert result.image_threshold is None
    assert result.prompt == "Chest, X-ray"


def test_own_phrases_are_read_by_the_text_tower(detector, plane):
    prompt = Prompt(normal=("a normal knee",), abnormal=("a torn meniscus", "a swollen knee"))
    result = detector.detect(plane, prompt=prompt)
    assert result.prompt == "a torn meniscus, a swollen knee"
    assert result.percentile is None
    text = detector._bundle.encode_phrases(prompt.normal, prompt.abnormal)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, atol=1e-6)
    swapped = detector.detect(plane, prompt=Prompt(normal=prompt.abnormal, abnormal=prompt.normal))
    assert not np.allclose(result.map, swapped.map)


def test_a_detector_without_phrases_or_presets_says_so(tiny_bundle, plane):
    plain = SliceDetector.load(tiny_bundle.folder, device="cpu")
    with pytest.raises(InvalidRequest, match="not made to read phrases"):
        plain.detect(plane, prompt=Prompt(normal=("a",), abnormal=("b",)))
    with pytest.raises(InvalidRequest, match="no preset 'brain-mr'"):
        plain.detect(plane, prompt=Prompt("brain-mr"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"normal": ("a",)},
        {"abnormal": ("b",)},
        {"preset": "brain-mr", "normal": ("a",), "abnormal": ("b",)},
        {"normal": (" ",), "abnormal": ("b",)},
        {"normal": ("a" * 500,), "abnormal": ("b",)},
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(InvalidRequest):
        Prompt(**wrong)


def test_a_calibration_for_a_preset_that_is_not_there_is_refused(detector):
    manifest = Bundle.load(detector._bundle.folder).manifest
    with pytest.raises(BundleInvalid, match="calibrated for brain-mr"):
        replace(manifest, detector=replace(manifest.detector, presets=(CHEST,)))


def test_unlikeness_is_the_distance_to_the_nearest_look():
    looks = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    familiarity = Familiarity(5, 8)
    familiarity.fill(looks)
    torch.testing.assert_close(familiarity(looks), torch.zeros(5), atol=1e-3, rtol=0)
    far = torch.full((8,), 7.0)
    nearest = min((((far - look) / looks.std(0)) ** 2).mean() ** 0.5 for look in looks)
    torch.testing.assert_close(familiarity(far[None])[0], nearest)


def test_a_look_leaves_padding_out():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 8.0], [100.0, 100.0]]])
    shown = torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(mean_token(tokens, shown), torch.tensor([[2.0, 5.0]]))
    # mean (2, 5) and spread (1, 3), each brought to mean 0 and deviation 1
    torch.testing.assert_close(
        look_of([tokens], shown), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), atol=1e-4, rtol=0
    )


def test_what_is_far_from_all_that_was_learned_from_is_called_unlike(detector, plane):
    result = detector.detect(plane)
    assert result.unlikeness is not None
    assert result.is_unlike == (result.unlikeness > 0.5)
    assert replace(result, unlike_threshold=result.unlikeness - 0.01).is_unlike
    assert not replace(result, unlike_threshold=result.unlikeness + 0.01).is_unlike
