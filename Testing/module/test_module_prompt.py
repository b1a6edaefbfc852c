"""What a slice is compared with, as the panel offers it: presets, the guess for a volume, own phrases."""

from __future__ import annotations

import pytest

from MedAnomalyCLIPLib.prompt import Prompt

PRESETS = [("brain-mr", "Brain, MR"), ("chest-ct", "Chest, CT")]


@pytest.fixture
def asked(detector):
    """The prompts that the detector was given."""
    plain, prompts = detector.detect, []

    def record(plane, *, threshold=None, window=None, prompt=None):
        prompts.append(prompt)
        return plain(plane, threshold=threshold, window=window)

    detector.detect = record
    return prompts


@pytest.fixture
def with_presets(panel, tmp_path, tiny_manifest):
    """The panel with a detector that has two presets and reads phrases."""
    from dataclasses import replace

    import torch

    from MedAnomalyCLIPLib.bundle import save_bundle
    from MedAnomalyCLIPLib.clip.towers import create_clip, text_side
    from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector
    from MedAnomalyCLIPLib.detectors.specification import PresetSpec, TextSpec

    torch.manual_seed(0)
    presets = tuple(
        PresetSpec(name, title, (title.split(", ")[1],), title.split(", ")[0].lower(), ("head",))
        for name, title in PRESETS
    )
    spec = replace(tiny_manifest.detector, text=TextSpec(prompts="presets"), presets=presets)
    clip, manifest = create_clip(spec.tower), replace(tiny_manifest, detector=spec)
    save_bundle(tmp_path / "presets", manifest, AnomalyDetector(spec), "", text_side(clip))
    panel.logic.getParameterNode().detector = str(tmp_path / "presets")
    return panel


def offered(panel):
    return [panel.ui.presetSelector.itemText(i) for i in range(panel.ui.presetSelector.count)]


def choose(panel, title):
    panel.ui.presetSelector.setCurrentIndex(offered(panel).index(title))


def test_kinds_of_images_are_offered_with_the_guess_for_the_volume(with_presets, head):
    import slicer

    head.SetAttribute(slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName(), "MR")
    with_presets.logic.getParameterNode().inputVolume = head
    with_presets.exit()
    with_presets.enter()
    titles = [title for _, title in PRESETS]
    assert offered(with_presets) == ["Automatic (Brain, MR)", "Images of any kind", *titles, "Own phrases"]


def test_a_volume_that_says_too_little_is_compared_with_text_about_any_kind(
    with_presets, head, detect, asked
):
    with_presets.logic.getParameterNode().inputVolume = head
    assert offered(with_presets)[0] == "Automatic (images of any kind)"
    detect()
    assert asked == [Prompt()]


def test_the_chosen_preset_reaches_the_detector(with_presets, head, detect, asked):
    with_presets.logic.getParameterNode().inputVolume = head
    choose(with_presets, "Chest, CT")
    detect()
    assert asked == [Prompt("chest-ct")]
    assert with_presets.logic.getParameterNode().preset == "chest-ct"


def test_own_phrases_are_written_where_they_are_wanted(with_presets, head, detect, asked):
    ui = with_presets.ui
    with_presets.logic.getParameterNode().inputVolume = head
    assert not ui.normalPhrasesEdit.isVisibleTo(with_presets.parent)
    choose(with_presets, "Own phrases")
    assert ui.normalPhrasesEdit.isVisibleTo(with_presets.parent)
    ui.normalPhrasesEdit.text = "a normal knee; healthy knee ;"
    ui.abnormalPhrasesEdit.text = "a torn meniscus"
    detect()
    assert asked == [Prompt(normal=("a normal knee", "healthy knee"), abnormal=("a torn meniscus",))]


def test_missing_phrases_are_asked_for(with_presets, head, detect, asked):
    with_presets.logic.getParameterNode().inputVolume = head
    choose(with_presets, "Own phrases")
    detect()
    assert asked == []
    assert "Write phrases" in with_presets.ui.messageLabel.text


def test_a_range_is_compared_with_the_same(with_presets, head, wait, asked):
    parameters = with_presets.logic.getParameterNode()
    parameters.inputVolume, parameters.preset = head, "brain-mr"
    with_presets.ui.rangeButton.click()
    wait(lambda: not with_presets.logic.isRunning(), seconds=30)
    assert len(asked) > 1
    assert set(asked) == {Prompt("brain-mr")}


def test_a_detector_without_presets_offers_none(panel, head, make_bundle):
    panel.logic.getParameterNode().detector = str(make_bundle().folder)
    assert not panel.ui.presetSelector.isVisibleTo(panel.parent)
