"""The section Advanced: device, precision, window, what the network sees, and the log."""

from __future__ import annotations

import numpy as np
import pytest

from harness.application import load_bundle, save_bundle
from MedAnomalyCLIPLib.errors import DependencyMissing, InvalidRequest


@pytest.fixture
def seen(panel, detector):
    """Windows that the detector was called with."""
    windows = []
    plain = detector.detect

    def record(plane, *, threshold=None, window=None, prompt=None):
        windows.append(window)
        return plain(plane, threshold=threshold, window=window)

    detector.detect = record
    return windows


def choose(selector, data):
    selector.setCurrentIndex(selector.findData(data))


def offered(selector):
    return [selector.itemData(index) for index in range(selector.count)]


def show_window(node, low, high):
    node.GetDisplayNode().AutoWindowLevelOff()
    node.GetDisplayNode().SetWindowLevelMinMax(low, high)


# Window


def test_the_detectors_own_rule_is_the_default(panel, head, detect, seen):
    detect()
    assert seen == [None]
    assert not panel.ui.windowLowBox.enabled


def test_the_window_that_the_reader_sees_reaches_the_detector(panel, head, detect, seen):
    choose(panel.ui.windowSelector, "view")
    show_window(head, -50, 350)
    detect()
    assert seen == [(-50, 350)]


def test_a_manual_range_starts_as_the_reader_sees_it_and_is_then_the_readers(panel, head, detect, seen):
    show_window(head, 10, 600)
    choose(panel.ui.windowSelector, "manual")
    assert (panel.ui.windowLowBox.value, panel.ui.windowHighBox.value) == (10, 600)
    assert panel.ui.windowLowBox.enabled
    panel.ui.windowHighBox.value = 500
    detect()
    assert seen == [(10, 500)]
    choose(panel.ui.windowSelector, "detector")
    choose(panel.ui.windowSelector, "manual")
    assert panel.ui.windowHighBox.value == 500


def test_a_range_without_width_is_refused_in_words(panel, head, detect, detector):
    """By the detector itself, whose words the panel shows."""
    choose(panel.ui.windowSelector, "manual")

    def refuse(plane, *, threshold=None, window=None, prompt=None):
        assert window == (900, 100)
        raise InvalidRequest("A window needs the lower value first")

    detector.detect = refuse
    panel.ui.windowLowBox.value = 900
    panel.ui.windowHighBox.value = 100
    detect()
    assert panel.ui.messageLabel.text == "A window needs the lower value first"
    assert "A window needs the lower value first" in panel.ui.logText.plainText


def test_a_volume_that_is_not_displayed_has_no_window(slicer_scene, hosted_module):
    from MedAnomalyCLIPLib.scene_views import displayed_window

    hidden = slicer_scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    for node in (hidden, None):
        with pytest.raises(InvalidRequest, match="not displayed"):
            displayed_window(node)


def test_a_window_by_an_unknown_name_is_refused(panel, head):
    with pytest.raises(InvalidRequest, match="not bone"):
        panel.logic.detect(head, "Red", window="bone")


def test_while_no_scene_is_open_nothing_can_be_shown(panel, head):
    assert panel.ui.previewButton.enabled
    panel.setParameterNode(None)
    assert not panel.ui.previewButton.enabled


def test_choices_are_saved_with_the_scene(panel, head, tmp_path):
    choose(panel.ui.windowSelector, "manual")
    panel.ui.windowLowBox.value = -100
    panel._parameterNode.device = "cpu"
    choose(panel.ui.precisionSelector, "float32")
    save_bundle(tmp_path / "scene.mrb")
    choose(panel.ui.windowSelector, "detector")
    choose(panel.ui.precisionSelector, "int8")
    load_bundle(tmp_path / "scene.mrb")
    panel.initializeParameterNode()
    assert panel.ui.windowSelector.currentData == "manual"
    assert panel.ui.windowLowBox.value == -100
    assert panel.ui.deviceSelector.currentData == "cpu"
    assert panel.ui.precisionSelector.currentData == "float32"


# Device


def test_devices_are_asked_for_when_the_section_is_opened(panel, wait, monkeypatch):
    from MedAnomalyCLIPLib import runtime

    monkeypatch.setattr(runtime, "available_devices", lambda: ("cpu", "cuda:0", "cuda:1"))
    assert offered(panel.ui.deviceSelector) == ["auto", "cpu"]
    assert panel.ui.advancedSection.collapsed
    panel.ui.advancedSection.collapsed = False
    wait(lambda: offered(panel.ui.deviceSelector) == ["auto", "cpu", "cuda:0", "cuda:1"])
    assert panel.ui.deviceSelector.itemText(2) == "NVIDIA GPU (cuda:0)"


def test_without_torch_opening_the_section_asks_nothing(panel, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(panel.logic, "availableDevices", lambda: pytest.fail("torch is not there"))
    panel.ui.advancedSection.collapsed = False


def test_the_chosen_device_reaches_the_detector_that_is_then_loaded_anew(panel, head, detect, detector):
    loaded = []
    panel.logic.detectorFactory = lambda folder, device="auto": loaded.append(device) or detector
    detect()
    choose(panel.ui.deviceSelector, "cpu")
    detect()
    detect()
    assert loaded == ["auto", "cpu"]


def test_a_device_of_another_computer_stays_visible_until_it_is_changed(panel, head, detect):
    panel._parameterNode.device = "cuda:3"
    assert panel.ui.deviceSelector.currentData == "cuda:3"
    choose(panel.ui.deviceSelector, "auto")
    assert offered(panel.ui.deviceSelector) == ["auto", "cpu"]


def test_a_device_that_does_not_exist_is_refused_in_words(panel, head, detect):
    from MedAnomalyCLIPLib.panel_packages import load_detector

    panel.logic.detectorFactory = load_detector
    panel._parameterNode.device = "cuda:3"
    detect()
    assert "cannot be used here; choose auto" in panel.ui.messageLabel.text


# Precision


def test_the_chosen_precision_reaches_the_detector_that_is_then_loaded_anew(panel, head, detect, detector):
    loaded = []
    panel.logic.detectorFactory = lambda folder, precision="auto": loaded.append(precision) or detector
    assert offered(panel.ui.precisionSelector) == ["auto", "float32", "int8", "bfloat16"]
    detect()
    choose(panel.ui.precisionSelector, "float32")
    detect()
    detect()
    assert loaded == ["auto", "float32"]


def test_the_bundled_detector_detects_in_the_chosen_precision(panel, head, detect):
    from MedAnomalyCLIPLib.panel_packages import load_detector
    from MedAnomalyCLIPLib.scene_nodes import provenance_of

    panel.logic.detectorFactory = load_detector
    found = {}
    for precision in ("auto", "float32"):
        choose(panel.ui.precisionSelector, precision)
        detection = panel.logic.detect(head, "Red", **panel.choice())
        found[precision] = detection.result.score
        assert provenance_of(detection.mapNode).precision == {"auto": "int8"}.get(precision, precision)
    assert found["auto"] == pytest.approx(found["float32"], abs=0.01)


def test_a_precision_that_cannot_be_had_is_refused_in_words(panel, head, detect):
    from MedAnomalyCLIPLib.panel_packages import load_detector

    panel.logic.detectorFactory = load_detector
    choose(panel.ui.precisionSelector, "int8")
    panel._parameterNode.device = "cuda"
    detect()
    assert "used on the CPU only" in panel.ui.messageLabel.text


# What the network sees


def preview(panel, wait):
    panel.ui.previewButton.click()
    wait(lambda: not panel._advanced._preparing.running, seconds=60)


def test_the_picture_is_what_the_network_gets(panel, head, wait, views):
    from MedAnomalyCLIPLib.bundle import default_bundle_path, read_manifest
    from MedAnomalyCLIPLib.preprocess import SlicePreprocessor
    from MedAnomalyCLIPLib.scene import plane_in_view

    choose(panel.ui.windowSelector, "view")
    show_window(head, 0, 800)
    assert panel.ui.previewLabel.isHidden()
    picture = panel.logic.previewInput(head, "Red", window="view").result(timeout=60)
    spec = read_manifest(default_bundle_path()).preprocess
    prepared = SlicePreprocessor(spec).prepare(plane_in_view(head, "Red"), (0, 800))
    shown = prepared.tensor.numpy() * np.reshape(spec.std, (3, 1, 1)) + np.reshape(spec.mean, (3, 1, 1))
    np.testing.assert_allclose(picture.pixels / 255, shown.transpose(1, 2, 0), atol=0.51 / 255)
    assert not picture.pixels[~prepared.valid.numpy()].any()
    preview(panel, wait)
    assert not panel.ui.previewLabel.isHidden()
    side = spec.size
    assert panel.ui.previewCaption.text == (
        f"Axial 14 of 24, aligned: {side} × {side} pixels; black is 0, white is 800"
    )
    assert panel.ui.previewCaption.text in panel.ui.logText.plainText


def test_the_picture_follows_the_window(panel, head):
    wide, narrow = (
        panel.logic.previewInput(head, "Red", window=window).result(timeout=60).pixels
        for window in ((0, 5000), (0, 300))
    )
    assert narrow.mean() > 2 * wide.mean()


def test_a_picture_can_be_saved_as_png(panel, head, tmp_path):
    from PIL import Image

    picture = panel.logic.previewInput(head, "Red").result(timeout=60)
    picture.save(tmp_path / "seen.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "seen.png")), picture.pixels)


def test_without_a_volume_there_is_nothing_to_show(panel):
    assert not panel.ui.previewButton.enabled


def test_a_plane_beside_the_volume_is_refused_in_words(panel, head, views, wait):
    preview(panel, wait)
    views["Red"].node.SetSliceOffset(500)
    panel.ui.previewButton.click()
    assert "does not cut the image" in panel.ui.previewCaption.text
    assert panel.ui.previewLabel.isHidden()
    assert not panel._advanced._preparing.running


def test_missing_packages_are_named_instead_of_an_import_that_fails(panel, head, monkeypatch):
    from MedAnomalyCLIPLib import panel_packages

    monkeypatch.setattr(panel_packages, "missing_light_requirements", lambda: ["tqdm>=99"])
    with pytest.raises(DependencyMissing, match="tqdm"):
        panel.logic.previewInput(head, "Red")
    panel.ui.previewButton.click()
    assert "Click Install" in panel.ui.previewCaption.text


# Log


def test_the_log_tells_what_was_detected_without_naming_the_volume(panel, head, detect):
    head.SetName("Doe^Jane 1970")
    detect()
    text = panel.ui.logText.plainText
    assert "Axial 14 of 24, aligned: score 0." in text
    assert "brightness 1.2 on cpu" in text
    assert "Doe" not in text
    assert panel.ui.logText.readOnly


def test_the_log_does_not_grow_without_end(panel):
    for number in range(700):
        panel._advanced.log.add(str(number))
    lines = panel.ui.logText.plainText.splitlines()
    assert len(lines) == 500
    assert lines[-1].endswith("  699")
