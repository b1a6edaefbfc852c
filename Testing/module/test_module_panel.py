"""The panel as a reader uses it: choose, click, look, change, take away."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.application import load_bundle, save_bundle
from harness.phantom import add_volume, axial_matrix
from harness.phantom import head as phantom_head
from MedAnomalyCLIPLib.errors import UnsupportedImage

MESSAGE_OF_DETECTOR = "This detector wants grey images"
SCORE = f"Score {phantom_head()[0][13].max() / 1000:.2f}"


def is_coloured(picture) -> np.ndarray:
    return np.ptp(picture.astype(int), axis=-1) > 30


def coloured_views(views) -> set[str]:
    return {name for name, view in views.items() if is_coloured(view.layers()).any()}


def segment_points() -> np.ndarray:
    """(N, 3) world positions of all voxels of all our segments."""
    import slicer
    import vtk

    points = []
    for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
        for segment_id in node.GetSegmentation().GetSegmentIDs():
            image = node.GetBinaryLabelmapInternalRepresentation(segment_id)
            matrix = vtk.vtkMatrix4x4()
            image.GetImageToWorldMatrix(matrix)
            voxels = slicer.util.arrayFromSegmentInternalBinaryLabelmap(node, segment_id)
            ijk = np.argwhere(voxels)[:, ::-1] + np.array(image.GetExtent()[::2])
            homogeneous = np.c_[ijk, np.ones(len(ijk))]
            points.append((slicer.util.arrayFromVTKMatrix(matrix) @ homogeneous.T).T[:, :3])
    return np.vstack(points) if points else np.zeros((0, 3))


def spot_centre() -> np.ndarray:
    voxels, spot = phantom_head()
    k, j, i = np.argwhere(spot).mean(axis=0)
    return (axial_matrix(voxels.shape) @ [i, j, k, 1])[:3]


# Choosing


def test_nothing_can_be_detected_without_a_volume(panel):
    assert not panel.ui.detectButton.enabled


def test_the_volume_that_the_views_show_is_chosen(views, hosted_module, slot_errors):
    voxels, _ = phantom_head()
    add_volume(voxels, axial_matrix(voxels.shape), "First")
    shown = add_volume(voxels, axial_matrix(voxels.shape), "Shown")
    views["Green"].show(shown)
    panel = hosted_module.make_panel()
    assert panel.ui.inputSelector.currentNode() is shown
    panel.cleanup()


def test_a_volume_loaded_later_can_be_chosen(panel, head):
    assert panel.ui.inputSelector.currentNode() is head
    assert panel.ui.detectButton.enabled


def test_label_maps_are_not_offered(panel):
    import slicer

    slicer.util.addVolumeFromArray(np.zeros((3, 5, 4), np.uint8), nodeClassName="vtkMRMLLabelMapVolumeNode")
    assert panel.ui.inputSelector.currentNode() is None


def test_all_slice_views_are_offered(panel):
    offered = [panel.ui.viewSelector.itemText(i) for i in range(panel.ui.viewSelector.count)]
    assert offered == ["Last touched (Red)", "Red", "Yellow", "Green"]


def test_the_view_last_scrolled_is_taken(panel, head, views):
    views["Green"].node.SetSliceOffset(12)
    assert panel.currentViewName() == "Green"
    assert panel.ui.viewSelector.currentText == "Last touched (Green)"


def test_a_view_that_was_moved_from_another_one_is_not_taken(panel, head, views):
    """With shift held, moving the mouse over one view scrolls the others."""
    import slicer

    crosshair = slicer.util.getNode("Crosshair")
    crosshair.SetCursorPositionXYZ([10, 10, 0], views["Yellow"].node)
    views["Green"].node.SetSliceOffset(12)
    crosshair.SetCursorPositionInvalid()
    assert panel.currentViewName() == "Yellow"


def test_passing_over_a_view_with_the_mouse_is_no_touch(panel, head, views):
    import slicer

    views["Green"].node.SetSliceOffset(12)
    crosshair = slicer.util.getNode("Crosshair")
    crosshair.SetCursorPositionXYZ([10, 10, 0], views["Yellow"].node)
    crosshair.SetCursorPositionInvalid()
    assert panel.currentViewName() == "Green"


def test_zooming_is_no_touch(panel, head, views):
    views["Green"].node.SetFieldOfView(50, 50, 1)
    assert panel.currentViewName() == "Red"


def test_a_view_chosen_by_name_stays_chosen(panel, head, views):
    panel.ui.viewSelector.setCurrentIndex(panel.ui.viewSelector.findData("Yellow"))
    views["Green"].node.SetSliceOffset(12)
    assert panel.currentViewName() == "Yellow"


def test_the_plane_is_told_in_words(panel, head, views, wait):
    wait(lambda: panel.ui.planeLabel.text == "Axial 14 of 24, aligned")
    views["Red"].tilt(8)
    wait(lambda: panel.ui.planeLabel.text.startswith("Axial oblique 8°"))


def test_a_plane_beside_the_volume_is_told_in_words(panel, head, views, wait):
    views["Red"].node.SetSliceOffset(500)
    wait(lambda: "does not cut the image" in panel.ui.planeLabel.text)


def test_it_is_said_when_the_view_shows_another_volume(panel, head, wait):
    voxels, _ = phantom_head(seed=1)
    panel.ui.inputSelector.setCurrentNode(add_volume(voxels, axial_matrix(voxels.shape), "Other"))
    wait(lambda: "does not show this volume" in panel.ui.planeLabel.text)


# Detecting


@pytest.mark.parametrize("name", ["Red", "Yellow", "Green"])
@pytest.mark.parametrize("tilt", [0, 15])
def test_clicking_detect_colours_the_view_and_marks_the_spot(panel, head, views, detect, name, tilt):
    views[name].node.SetSliceOffset(views[name].node.GetSliceOffset() + 0.3)
    if tilt:
        views[name].tilt(tilt)
        views[name].node.JumpSlice(*spot_centre())
    detect()
    assert coloured_views(views) == {name}
    points = segment_points()
    assert len(points) > 20
    assert np.linalg.norm(points.mean(axis=0) - spot_centre()) < 6
    coloured = is_coloured(views[name].layers())
    at_spot = np.array([coloured[views[name].pixel_at(point)] for point in points])
    assert at_spot.mean() > 0.95


def test_the_score_is_shown_with_its_reference_and_its_limits(panel, head, detect):
    detect()
    assert panel.ui.scoreLabel.text == SCORE
    assert panel.ui.resultLabel.text.splitlines() == [
        "Axial 14 of 24, aligned",
        "Higher than 97 % of the detector's normal reference images",
        "Detector: brightness, version 1.2",
        "A candidate, not a diagnosis",
    ]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"unlikeness": 0.9, "unlike_threshold": 0.8}, "Unlike what this detector was made for"),
        ({"unlikeness": 0.7, "unlike_threshold": 0.8}, ""),
        ({"is_empty": True}, "Shows nothing but background"),
    ],
)
def test_a_score_that_says_little_is_told_so_before_anything_else(panel, head, detect, detector, made, words):
    plain = detector.detect
    detector.detect = lambda *plane, **options: replace(plain(*plane, **options), **made)
    detect()
    second = panel.ui.resultLabel.text.splitlines()[1]
    assert second.startswith(words or "Higher than 97 %")


def test_ctrl_return_detects(panel, head, views, wait):
    from PySide6 import QtCore, QtTest

    panel.parent.show()
    panel.parent.activateWindow()
    QtTest.QTest.qWaitForWindowActive(panel.parent)
    QtTest.QTest.keyClick(panel.parent, QtCore.Qt.Key_Return, QtCore.Qt.ControlModifier)
    wait(lambda: coloured_views(views) == {"Red"})


def test_the_detector_runs_on_one_thread_that_is_not_the_main_one(panel, head, views, detect, detector):
    detect()
    views["Red"].node.SetSliceOffset(0)
    detect()
    assert len(detector.threads) == 2
    assert len(set(detector.threads)) == 1
    assert threading.main_thread().name not in detector.threads


def test_the_panel_stays_alive_while_the_detector_runs(panel, head, views, detector, wait):
    detector.gate.clear()
    panel.ui.detectButton.click()
    wait(lambda: bool(detector.threads))
    assert panel.ui.detectButton.text == "Cancel"
    assert panel.ui.scoreLabel.text == "Detecting…"
    views["Green"].node.SetSliceOffset(12)
    assert panel.currentViewName() == "Green"
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert panel.ui.detectButton.text == "Detect"


def test_the_plane_is_that_of_the_click(panel, head, views, detector, wait):
    detector.gate.clear()
    panel.ui.detectButton.click()
    views["Red"].node.SetSliceOffset(views["Red"].node.GetSliceOffset() + 15)
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert not is_coloured(views["Red"].layers()).any()
    views["Red"].node.SetSliceOffset(views["Red"].node.GetSliceOffset() - 15)
    assert is_coloured(views["Red"].layers()).any()


def test_a_second_click_cancels(panel, head, views, detector, wait):
    detector.gate.clear()
    panel.ui.detectButton.click()
    wait(lambda: bool(detector.threads))
    panel.ui.detectButton.click()
    detector.gate.set()
    assert panel.ui.messageLabel.text == "Cancelled."
    assert panel.ui.detectButton.text == "Detect"
    panel.ui.detectButton.click()
    wait(lambda: not panel.logic.isRunning())
    assert len(detector.threads) == 2
    assert not panel.ui.messageLabel.text


def test_a_cancelled_run_leaves_no_node(panel, head, detector, wait):
    import slicer

    detector.gate.clear()
    panel.ui.detectButton.click()
    wait(lambda: bool(detector.threads))
    panel.ui.detectButton.click()
    detector.gate.set()
    panel.cleanup()
    assert [n.GetName() for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")] == ["Head"]


# Display


def test_the_detectors_own_threshold_is_shown(panel, head, detect):
    detect()
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)


def test_the_threshold_slider_acts_at_once_on_overlay_and_segment(panel, head, views, detect, detector):
    detect()
    coloured, marked = is_coloured(views["Red"].layers()).sum(), len(segment_points())
    panel.ui.thresholdSlider.value = 0.5
    assert is_coloured(views["Red"].layers()).sum() > 2 * coloured
    assert len(segment_points()) > 2 * marked
    panel.ui.thresholdSlider.value = 1.0
    assert not is_coloured(views["Red"].layers()).any()
    assert len(segment_points()) == 0
    assert len(detector.threads) == 1


def test_a_threshold_that_the_reader_chose_is_used_from_then_on(panel, head, views, detect):
    detect()
    panel.ui.thresholdSlider.value = 0.6
    views["Red"].node.SetSliceOffset(0)
    detect()
    assert panel.ui.thresholdSlider.value == pytest.approx(0.6)


def test_a_threshold_that_the_reader_did_not_choose_follows_the_detector(
    panel, head, views, detect, detector
):
    detect()
    detector.threshold = 0.65
    panel.ui.opacitySlider.value = 0.8
    detect()
    assert panel.ui.thresholdSlider.value == pytest.approx(0.65)


def test_sliders_moved_while_the_detector_runs_keep_their_place(panel, head, views, detector, wait):
    detector.gate.clear()
    panel.ui.detectButton.click()
    panel.ui.thresholdSlider.value = 0.6
    panel.ui.opacitySlider.value = 0.9
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert panel.ui.thresholdSlider.value == pytest.approx(0.6)
    assert views["Red"].composite.GetForegroundOpacity() == pytest.approx(0.9)
    assert len(segment_points()) == (phantom_head()[0][13] >= 600).sum()


def test_the_opacity_slider_acts_at_once(panel, head, views, detect):
    detect()
    panel.ui.opacitySlider.value = 0.0
    assert not coloured_views(views)
    panel.ui.opacitySlider.value = 1.0
    assert coloured_views(views) == {"Red"}


def test_detecting_uses_the_opacity_of_the_slider(panel, head, views, detect):
    panel.ui.opacitySlider.value = 0.25
    detect()
    assert views["Red"].composite.GetForegroundOpacity() == pytest.approx(0.25)


def test_restore_puts_back_the_previous_foreground(panel, head, views, detect):
    assert not panel.ui.restoreButton.enabled
    voxels, _ = phantom_head(seed=1)
    pet = add_volume(voxels, axial_matrix(voxels.shape), "PET")
    views["Red"].composite.SetForegroundVolumeID(pet.GetID())
    views["Red"].composite.SetForegroundOpacity(0.3)
    before = views["Red"].layers()
    panel.ui.inputSelector.setCurrentNode(head)
    detect()
    panel.ui.restoreButton.click()
    np.testing.assert_array_equal(views["Red"].layers(), before)
    assert not panel.ui.restoreButton.enabled


# What can go wrong


def test_an_error_that_the_reader_can_mend_is_shown(panel, head, detect, detector):
    def refuse(*_, **__):
        raise UnsupportedImage(MESSAGE_OF_DETECTOR)

    detector.detect = refuse
    detect()
    assert panel.ui.messageLabel.text == MESSAGE_OF_DETECTOR
    assert not panel.ui.messageLabel.isHidden()
    assert panel.ui.scoreLabel.text == "No result yet"


def test_the_message_goes_when_the_next_detection_starts(panel, head, detect, detector):
    def refuse(*_, **__):
        raise UnsupportedImage(MESSAGE_OF_DETECTOR)

    good, detector.detect = detector.detect, refuse
    detect()
    detector.detect = good
    detect()
    assert panel.ui.messageLabel.isHidden()


def test_a_plane_beside_the_volume_is_refused_in_words(panel, head, views):
    views["Red"].node.SetSliceOffset(500)
    panel.ui.detectButton.click()
    assert panel.ui.messageLabel.text
    assert not panel.logic.isRunning()


def test_our_own_map_is_refused_as_input(panel, head, detect):
    import slicer

    detect()
    panel.ui.inputSelector.setCurrentNode(slicer.util.getNode("Head anomaly map*"))
    panel.ui.detectButton.click()
    assert "not an image" in panel.ui.messageLabel.text


def test_a_bug_is_not_hidden_and_leaves_the_panel_usable(panel, head, detect, detector, slot_errors):
    def crash(*_, **__):
        raise ZeroDivisionError("a bug")

    good, detector.detect = detector.detect, crash
    detect()
    assert [str(error) for error in slot_errors] == ["a bug"]
    slot_errors.clear()
    assert panel.ui.detectButton.text == "Detect"
    detector.detect = good
    detect()
    assert panel.ui.scoreLabel.text == SCORE


def test_missing_packages_are_named_with_what_to_do(panel, head, detect, monkeypatch):
    from MedAnomalyCLIPLib import panel_packages

    monkeypatch.setattr(panel_packages, "missing_light_requirements", lambda: ["numpy>=9", "tqdm>=99"])
    panel.logic.detectorFactory = panel_packages.load_detector
    detect()
    text = panel.ui.messageLabel.text
    assert "numpy>=9, tqdm>=99" in text
    assert "Click Install light in the section Setup" in text
    assert "setupPythonRequirements(light=True)" in text


def test_a_volume_deleted_meanwhile_drops_the_result_with_a_message(panel, head, detector, wait):
    import slicer

    detector.gate.clear()
    panel.ui.detectButton.click()
    slicer.mrmlScene.RemoveNode(head)
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert "deleted" in panel.ui.messageLabel.text
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")


def test_a_scene_closed_meanwhile_drops_the_result_with_a_message(panel, head, detector, wait):
    import slicer

    detector.gate.clear()
    panel.ui.detectButton.click()
    wait(lambda: bool(detector.threads))
    slicer.mrmlScene.Clear(False)
    detector.gate.set()
    assert not panel.logic.isRunning()
    assert "closed" in panel.ui.messageLabel.text
    assert not slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")


def test_after_closing_the_scene_the_next_case_starts_clean(panel, head, views, detect):
    import slicer

    detect()
    panel.ui.thresholdSlider.value = 0.6
    slicer.mrmlScene.Clear(False)
    assert panel.ui.scoreLabel.text == "No result yet"
    assert not panel.ui.detectButton.enabled
    voxels, _ = phantom_head()
    node = add_volume(voxels, axial_matrix(voxels.shape), "Next")
    views["Red"].reset()
    views["Red"].show(node)
    views["Red"].node.JumpSlice(*spot_centre())
    detect()
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)
    assert coloured_views(views) == {"Red"}


@pytest.mark.parametrize("class_name", ["vtkMRMLScalarVolumeNode", "vtkMRMLSegmentationNode"])
def test_result_nodes_may_be_deleted_between_detections(panel, head, views, detect, class_name):
    import slicer

    detect()
    for node in slicer.util.getNodesByClass(class_name):
        if node is not head:
            slicer.mrmlScene.RemoveNode(node)
    panel.ui.thresholdSlider.value = 0.7
    detect()
    assert coloured_views(views) == {"Red"}
    assert len(segment_points()) > 0


# Coming and going


def test_the_panel_ignores_the_scene_while_another_module_is_shown(panel, head, views, detect):
    detect()
    panel.exit()
    views["Green"].node.SetSliceOffset(12)
    voxels, _ = phantom_head(seed=1)
    add_volume(voxels, axial_matrix(voxels.shape), "Other")
    panel.enter()
    assert panel.ui.inputSelector.currentNode() is head
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)


def test_a_result_that_arrives_while_another_module_is_shown_is_still_shown(
    panel, head, views, detector, wait
):
    detector.gate.clear()
    panel.ui.detectButton.click()
    panel.exit()
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert coloured_views(views) == {"Red"}
    panel.enter()
    assert panel.ui.scoreLabel.text == SCORE
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)


def test_a_reloaded_panel_works_and_the_old_one_is_silent(panel, head, views, hosted_module, detector, wait):
    panel.cleanup()
    old = panel.ui.planeLabel.text
    fresh = hosted_module.make_panel()
    fresh.logic.detectorFactory = lambda folder: detector
    fresh.ui.detectButton.click()
    wait(lambda: not fresh.logic.isRunning())
    assert coloured_views(views) == {"Red"}
    views["Red"].node.SetSliceOffset(0)
    wait(lambda: fresh.ui.planeLabel.text == "Axial 13 of 24, aligned")
    assert panel.ui.planeLabel.text == old
    fresh.cleanup()


@pytest.fixture
def reload(hosted_module, monkeypatch):
    """The developer's Reload button: what Slicer does then, in its order; returns the new panel."""
    from harness import base_python
    from harness.scripted_module import HostedModule

    before = {name: module for name, module in sys.modules.items() if name.startswith("MedAnomalyCLIP")}
    made = []

    def reload_module(widget):
        fresh = HostedModule(Path(hosted_module.metadata.path))
        widget.cleanup()
        made.append(fresh.make_panel())

    monkeypatch.setattr(base_python.ScriptedLoadableModuleWidget, "onReload", reload_module, raising=False)
    yield lambda panel: panel.onReload() or made[-1]
    made[-1].cleanup()
    for name in [name for name in sys.modules if name.startswith("MedAnomalyCLIP")]:
        del sys.modules[name]
    sys.modules.update(before)


def test_reload_reads_the_library_anew_and_ends_what_ran(panel, head, views, detector, wait, reload):
    library = sys.modules["MedAnomalyCLIPLib.scene"]
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    fresh = reload(panel)
    assert sys.modules["MedAnomalyCLIPLib.scene"] is not library
    assert not panel.logic.isRunning()
    assert panel.logic._worker is None
    assert len(fresh.logic.volumeDetection(head).rows) == 3
    fresh.logic.detectorFactory = lambda folder: detector
    fresh.ui.detectButton.click()
    wait(lambda: not fresh.logic.isRunning(), seconds=60)
    assert fresh.ui.scoreLabel.text == SCORE


def test_a_saved_scene_brings_back_volume_view_threshold_and_opacity(panel, head, detect, tmp_path):
    import slicer

    panel.ui.viewSelector.setCurrentIndex(panel.ui.viewSelector.findData("Green"))
    detect()
    panel.ui.thresholdSlider.value = 0.6
    panel.ui.opacitySlider.value = 0.8
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")
    panel.enter()
    assert panel.ui.inputSelector.currentNode().GetName() == "Head"
    assert panel.currentViewName() == "Green"
    assert panel.ui.thresholdSlider.value == pytest.approx(0.6)
    assert panel.ui.opacitySlider.value == pytest.approx(0.8)


def test_the_panel_can_be_drawn(panel, head, detect, tmp_path):
    detect()
    panel.parent.resize(380, 480)
    panel.parent.show()
    picture = panel.parent.grab()
    assert picture.save(str(tmp_path / "panel.png"))
    colours = {picture.toImage().pixel(x, y) for x in range(0, 380, 3) for y in range(0, 480, 3)}
    assert len(colours) > 10
