"""Many slices in the panel: run, cancel, go on, look through, correct, export."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from harness.application import load_bundle, save_bundle
from harness.phantom import add_volume, axial_matrix
from harness.phantom import head as phantom_head
from MedAnomalyCLIPLib.errors import UnsupportedImage

VOXELS, _SPOT = phantom_head()
DEPTH = len(VOXELS)


@pytest.fixture
def run(panel, wait):
    """Click Detect range and wait for the end of the run."""

    def click():
        panel.ui.rangeButton.click()
        wait(lambda: not panel.logic.isRunning(), seconds=60)

    return click


def rows_of(panel):
    model = panel.ui.resultsTable.model()
    return [[model.index(r, c).data() for c in range(model.columnCount())] for r in range(model.rowCount())]


def volume_map(panel):
    detection = panel.logic.volumeDetection(panel.ui.inputSelector.currentNode())
    return detection and detection.volumeMap


# Choosing slices


def test_all_slices_along_the_acquisition_are_offered_at_first(panel, head):
    assert panel.ui.rangeAxisSelector.currentText == "As acquired: axial, 24 slices"
    assert (panel.ui.rangeWidget.minimumValue, panel.ui.rangeWidget.maximumValue) == (1, DEPTH)
    assert panel.ui.rangeButton.text == "Detect on all 24 slices"


def test_without_a_volume_there_is_no_range(panel):
    assert not panel.ui.rangeButton.enabled
    assert not panel.ui.rangeWidget.enabled


def test_another_direction_has_its_own_slices(panel, head, run):
    panel.ui.rangeAxisSelector.setCurrentIndex(panel.ui.rangeAxisSelector.findData("coronal"))
    assert panel.ui.rangeWidget.maximumValue == 80
    panel.ui.rangeWidget.minimumValue, panel.ui.rangeWidget.maximumValue = 40, 42
    assert panel.ui.rangeButton.text == "Detect on 3 slices"
    run()
    assert sorted(volume_map(panel).rows) == [39, 40, 41]
    assert volume_map(panel).axis == 1


def test_another_volume_brings_its_own_slices_and_results(panel, head, run):
    run()
    other = add_volume(VOXELS[:10], axial_matrix((10, 80, 72)), "Other")
    panel.ui.inputSelector.setCurrentNode(other)
    assert panel.ui.rangeWidget.maximum == 10
    assert rows_of(panel) == []
    panel.ui.inputSelector.setCurrentNode(head)
    assert len(rows_of(panel)) == DEPTH


# Running


def test_a_run_fills_map_segmentation_and_table(panel, head, run, views):
    run()
    assert [row[0] for row in rows_of(panel)] == [str(k + 1) for k in range(DEPTH)]
    assert panel.ui.outputMapSelector.currentNode() is volume_map(panel).node
    assert panel.ui.outputSegmentationSelector.currentNode() is volume_map(panel).segmentation
    assert views["Red"].composite.GetForegroundVolumeID() == volume_map(panel).node.GetID()
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)
    assert panel.ui.rangeProgress.isHidden()
    assert not panel.ui.messageLabel.text


def test_while_it_runs_the_button_is_cancel_and_the_bar_counts(panel, head, detector, wait):
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    assert panel.ui.rangeProgress.maximum == DEPTH
    assert panel.ui.rangeButton.text == "Cancel"
    assert not panel.ui.detectButton.enabled
    assert not panel.ui.rangeWidget.enabled
    panel._detect.click()  # as by its keys
    assert panel.logic.isRunning()


def test_a_second_click_cancels_and_keeps_what_is_done(panel, head, wait, run, detector):
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 5)
    panel.ui.rangeButton.click()
    assert not panel.logic.isRunning()
    assert panel.ui.messageLabel.text == "Cancelled after 5 of 24 slices; their results are kept."
    assert len(rows_of(panel)) == 5
    panel.ui.rangeResumeCheckBox.checked = True
    panel.logic._worker.call(lambda: None).result()
    before = len(detector.threads)
    run()
    assert len(rows_of(panel)) == DEPTH
    assert len(detector.threads) - before == DEPTH - 5


def test_one_slice_runs_and_the_range_waits(panel, head, detector, wait):
    detector.gate.clear()
    panel.ui.detectButton.click()
    assert panel.ui.detectButton.text == "Cancel"
    assert not panel.ui.rangeButton.enabled
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert panel.ui.rangeButton.enabled


def test_views_and_sliders_stay_free_while_it_runs(panel, head, views, wait):
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    views["Red"].node.SetSliceOffset(12)
    panel.ui.thresholdSlider.value = 0.6
    wait(lambda: not panel.logic.poll(), seconds=30)
    assert volume_map(panel).threshold == pytest.approx(0.6)
    assert views["Red"].node.GetSliceOffset() == 12


def test_a_slice_that_fails_is_told_and_the_others_are_done(panel, head, run, detector):
    good = detector.detect

    def detect(plane, **options):
        if plane.aligned.index == 4:
            raise UnsupportedImage("it is empty")
        return good(plane, **options)

    detector.detect = detect
    run()
    assert len(rows_of(panel)) == DEPTH - 1
    assert panel.ui.messageLabel.text == "Slices without a result: 1. Slice 5: it is empty"


def test_a_bug_is_not_hidden_and_what_was_done_is_kept(panel, head, detector, run, slot_errors):
    good = detector.detect

    def detect(plane, **options):
        if plane.aligned.index == 4:
            raise ZeroDivisionError("a bug")
        return good(plane, **options)

    detector.detect = detect
    run()
    assert [str(error) for error in slot_errors] == ["a bug"]
    slot_errors.clear()
    assert len(rows_of(panel)) == 4
    assert panel.ui.rangeButton.enabled
    assert panel.ui.rangeProgress.isHidden()


def test_a_bent_volume_is_refused_in_words(panel, head):
    from harness.phantom import add_bending_transform

    head.SetAndObserveTransformNodeID(add_bending_transform().GetID())
    panel.ui.rangeButton.click()
    assert "non-linear transform" in panel.ui.messageLabel.text
    assert not panel.logic.isRunning()


@pytest.mark.parametrize("what", ["volume", "map"])
def test_deleting_volume_or_map_meanwhile_ends_the_run_in_words(panel, head, wait, what):
    import slicer

    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    slicer.mrmlScene.RemoveNode(head if what == "volume" else volume_map(panel).node)
    wait(lambda: not panel.logic.isRunning())
    assert what in panel.ui.messageLabel.text
    assert "deleted" in panel.ui.messageLabel.text
    assert panel.ui.rangeProgress.isHidden()


def test_closing_the_scene_meanwhile_ends_the_run(panel, head, wait):
    import slicer

    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    slicer.mrmlScene.Clear(False)
    assert not panel.logic.isRunning()
    assert "closed" in panel.ui.messageLabel.text
    assert rows_of(panel) == []
    assert not slicer.util.getNodesByClass("vtkMRMLTableNode")


def test_leaving_the_panel_meanwhile_ends_the_run_and_keeps_what_is_done(panel, head, wait, hosted_module):
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    panel.cleanup()  # reload, or closing Slicer
    fresh = hosted_module.make_panel()
    assert len(rows_of(fresh)) == 3
    assert fresh.ui.rangeButton.enabled
    fresh.cleanup()


def test_a_run_goes_on_while_another_module_is_shown(panel, head, wait):
    panel.ui.rangeButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 3)
    panel.exit()
    wait(lambda: not panel.logic.isRunning())
    panel.enter()
    assert len(rows_of(panel)) == DEPTH
    assert panel.ui.thresholdSlider.value == pytest.approx(0.75)


def test_the_main_thread_stays_free(panel, views, wait, monkeypatch):
    """By the processor time of each poll that writes a slice: other work on the machine does not count."""
    voxels = np.zeros((30, 512, 512), np.int16)
    voxels[:, 200:260, 200:260] = 900
    node = add_volume(voxels, axial_matrix(voxels.shape, (0.5, 0.5, 2.0)), "Large")
    views["Red"].show(node)
    panel.ui.inputSelector.setCurrentNode(node)
    seconds, poll = [], panel.logic.poll

    def timed():
        done, start = panel.ui.rangeProgress.value, time.thread_time()
        try:
            return poll()
        finally:
            if panel.ui.rangeProgress.value > done:
                seconds.append(time.thread_time() - start)

    monkeypatch.setattr(panel.logic, "poll", timed)
    panel.ui.rangeButton.click()
    wait(lambda: not panel.logic.isRunning(), seconds=60)
    assert len(seconds) == 30
    assert sorted(seconds)[-2] < 0.05  # in one of them Python may have collected its garbage


def test_a_run_writes_into_one_image_and_one_labelmap(panel, views, wait, monkeypatch):
    """Whatever is made anew at each slice would take longer, the larger the volume."""
    import slicer

    from MedAnomalyCLIPLib import scene_segments

    voxels = np.full((60, 16, 16), 900, np.int16)
    node = add_volume(voxels, axial_matrix(voxels.shape), "Long")
    panel.ui.inputSelector.setCurrentNode(node)
    grown, images, grow = [], set(), scene_segments._grown_labelmap
    monkeypatch.setattr(scene_segments, "_grown_labelmap", lambda *about: grown.append(1) or grow(*about))
    panel.ui.rangeButton.click()
    while panel.logic.isRunning():
        wait(lambda count=panel.ui.rangeProgress.value: panel.ui.rangeProgress.value != count, seconds=20)
        if volume_map(panel) is not None:
            images.add(slicer.util.arrayFromVolume(volume_map(panel).node).ctypes.data)
    assert len(images) == 1
    assert len(grown) == 1


# Looking through


def choose_row(panel, row):
    panel.ui.resultsTable.selectRow(row)


def test_a_row_brings_the_views_to_its_slice(panel, head, run, views):
    run()
    choose_row(panel, 9)
    row = volume_map(panel).rows[9]
    assert views["Red"].node.GetSliceOffset() == pytest.approx(row.peak_ras[2])
    assert views["Green"].node.GetSliceToRAS().GetElement(1, 3) == pytest.approx(row.peak_ras[1], abs=1e-3)


def test_new_rows_do_not_move_the_views(panel, head, run, views):
    views["Red"].node.SetSliceOffset(11)
    run()
    panel.ui.thresholdSlider.value = 0.6
    assert views["Red"].node.GetSliceOffset() == 11


def test_candidates_are_gone_through_with_buttons_and_keys(panel, head, run, views):
    from PySide6 import QtCore, QtTest

    run()
    candidates = panel.logic.volumeDetection(head).candidates
    views["Red"].node.SetSliceOffset(-1000)
    panel.ui.nextButton.click()
    panel.ui.nextButton.click()
    assert panel.ui.resultsTable.currentIndex().row() == candidates[1]
    panel.parent.show()
    panel.parent.activateWindow()
    QtTest.QTest.qWaitForWindowActive(panel.parent)
    QtTest.QTest.keyClick(panel.parent, QtCore.Qt.Key_Left, QtCore.Qt.AltModifier)
    assert panel.ui.resultsTable.currentIndex().row() == candidates[0]
    panel.ui.previousButton.click()
    assert "no candidate before" in panel.ui.messageLabel.text


class PlotView:
    def __init__(self):
        self.slot = None

    def connect(self, signal, slot):
        assert signal == "dataSelected(vtkStringArray*,vtkCollection*)"
        self.slot = slot

    def disconnect(self, signal, slot):
        self.slot = None


def test_a_point_of_the_plot_brings_the_views_to_its_slice(panel, head, run, views, monkeypatch):
    import slicer
    import vtk

    run()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLPlotViewNode")
    view = PlotView()
    widget = SimpleNamespace(mrmlPlotViewNode=lambda: node, plotView=lambda: view)
    layout = SimpleNamespace(plotViewCount=1, plotWidget=lambda index: widget)
    logic = SimpleNamespace(ShowChartInLayout=lambda chart: node.SetPlotChartNodeID(chart.GetID()))
    monkeypatch.setattr(slicer.app, "layoutManager", lambda: layout)
    monkeypatch.setattr(slicer.modules, "plots", SimpleNamespace(logic=lambda: logic), raising=False)
    panel.ui.plotButton.click()
    assert node.GetInteractionMode() == node.InteractionModeSelectPoints
    series, points, point = vtk.vtkStringArray(), vtk.vtkCollection(), vtk.vtkIdTypeArray()
    series.InsertNextValue(node.GetPlotChartNode().GetNthPlotSeriesNode(0).GetID())
    point.InsertNextValue(7)
    points.AddItem(point)
    view.slot(series, points)
    assert views["Red"].node.GetSliceOffset() == pytest.approx(volume_map(panel).rows[7].peak_ras[2])
    panel.cleanup()
    assert view.slot is None


# Display


def test_small_parts_can_be_left_out_live(panel, head, run, wait):
    panel.ui.thresholdSlider.value = 0.65
    run()
    before = sum(row.area_mm2 for row in volume_map(panel).rows.values())
    panel.ui.smallestAreaSlider.value = 60
    wait(lambda: not panel.logic.poll())
    after = sum(row.area_mm2 for row in volume_map(panel).rows.values())
    assert 0 < after < before
    panel.ui.smallestAreaSlider.value = 0
    wait(lambda: not panel.logic.poll())
    assert sum(row.area_mm2 for row in volume_map(panel).rows.values()) == pytest.approx(before)


def test_reset_is_followed_by_all_slices_and_waits_for_none(panel, head, run, wait, monkeypatch):
    from MedAnomalyCLIPLib import scene_jobs

    run()
    areas = {index: row.area_mm2 for index, row in volume_map(panel).rows.items()}
    own = panel._detectors.selected.manifest.threshold
    panel.ui.thresholdSlider.value = 0.9
    wait(lambda: not panel.logic.poll())
    chosen = {index: row.area_mm2 for index, row in volume_map(panel).rows.items()}
    assert chosen != areas
    with monkeypatch.context() as patched:
        patched.setattr(scene_jobs, "_REFRESH_SECONDS", -1.0)  # no slice follows yet
        panel.ui.ownThresholdButton.click()
        assert {index: row.area_mm2 for index, row in volume_map(panel).rows.items()} == chosen
        assert volume_map(panel).node.GetDisplayNode().GetLowerThreshold() == pytest.approx(own)
    wait(lambda: not panel._pollTimer.active)
    voxels = np.clip(VOXELS / 1000, 0, 1).astype(np.float32)
    expected = {k: pytest.approx((voxels[k] >= np.float32(own)).sum() * 4.0) for k in range(DEPTH)}
    assert {index: row.area_mm2 for index, row in volume_map(panel).rows.items()} == expected


def is_coloured(view):
    return bool((np.ptp(view.layers().astype(int), axis=-1) > 30).any())


def test_the_overlay_can_be_hidden_and_comes_back(panel, head, detect, views):
    import slicer

    detect()
    segmentation = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")[0]
    panel.ui.overlayCheckBox.checked = False
    assert not is_coloured(views["Red"])
    assert not segmentation.GetDisplayNode().GetVisibility()
    panel.ui.opacitySlider.value = 0.8
    assert not is_coloured(views["Red"])
    panel.ui.overlayCheckBox.checked = True
    assert is_coloured(views["Red"])
    assert segmentation.GetDisplayNode().GetVisibility()
    assert views["Red"].composite.GetForegroundOpacity() == pytest.approx(0.8)


def test_the_legend_can_be_hidden(panel, head, detect, views):
    import slicer

    detect()
    node = slicer.mrmlScene.GetNodeByID(views["Red"].composite.GetForegroundVolumeID())
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode(node)
    assert legend.GetVisibility()
    panel.ui.legendCheckBox.checked = False
    assert not legend.GetVisibility()
    detect()
    assert not legend.GetVisibility()


def test_other_colours_can_be_chosen_and_hold_for_the_next_detection(panel, head, detect, views):
    import slicer

    detect()
    rainbow = slicer.mrmlScene.GetNodeByID("vtkMRMLColorTableNodeRainbow")
    panel.ui.coloursSelector.setCurrentNode(rainbow)
    node = slicer.mrmlScene.GetNodeByID(views["Red"].composite.GetForegroundVolumeID())
    assert node.GetDisplayNode().GetColorNode() is rainbow
    detect()
    assert node.GetDisplayNode().GetColorNode() is rainbow
    panel.ui.coloursSelector.setCurrentNode(None)
    assert node.GetDisplayNode().GetColorNode().GetName() == "MedAnomalyCLIP heat"


# Nodes, Segment Editor, export


def test_a_new_map_can_be_made_beside_the_first(panel, head, run):
    run()
    first = volume_map(panel).node
    panel.ui.outputMapSelector.addNode()
    panel.ui.outputSegmentationSelector.setCurrentNode(None)
    panel.ui.thresholdSlider.value = 0.5
    run()
    second = panel.ui.outputMapSelector.currentNode()
    assert second is not first
    assert len(rows_of(panel)) == DEPTH
    panel.ui.outputMapSelector.setCurrentNode(first)
    assert panel.logic.volumeDetection(first).tableNode is panel.ui.resultsTable.mrmlTableNode()
    panel.ui.outputMapSelector.setCurrentNode(second)
    panel.exit()
    panel.enter()
    assert panel.ui.outputMapSelector.currentNode() is second


def test_the_segment_editor_opens_with_segmentation_and_volume(panel, head, run, monkeypatch):
    import slicer

    run()
    opened = []
    monkeypatch.setattr(slicer.util, "selectModule", opened.append)
    panel.ui.editorButton.click()
    editor = slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")
    assert opened == ["SegmentEditor"]
    assert editor.GetSegmentationNode() is volume_map(panel).segmentation
    assert editor.GetSourceVolumeNode() is head
    assert editor.GetSelectedSegmentID() == volume_map(panel).segment_id


def test_results_are_exported_to_a_new_folder(panel, head, run, wait, tmp_path, monkeypatch):
    from harness.pythonqt import qt

    run()
    monkeypatch.setattr(qt.QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path))
    for folder in ("MedAnomalyCLIP results", "MedAnomalyCLIP results 2"):
        panel.ui.exportButton.click()
        assert panel.ui.rangeButton.text == "Cancel"
        wait(lambda: not panel.logic.isRunning(), seconds=60)
        assert (tmp_path / folder / "result.json").is_file()
        assert folder in panel.ui.messageLabel.text


def test_a_cancelled_export_leaves_nothing(panel, head, run, wait, tmp_path, monkeypatch):
    from harness.pythonqt import qt

    run()
    monkeypatch.setattr(qt.QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path))
    panel.ui.exportButton.click()
    wait(lambda: panel.ui.rangeProgress.value == 2)
    panel.ui.rangeButton.click()
    assert "nothing was written" in panel.ui.messageLabel.text
    panel.logic._worker.call(lambda: None).result()
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_done_with_results_that_are_not_there(panel, head):
    names = ("previousButton", "nextButton", "plotButton", "editorButton", "exportButton")
    assert not any(getattr(panel.ui, name).enabled for name in names)


# Saved and loaded again


def test_a_reloaded_scene_shows_its_results_and_they_follow_the_threshold(panel, head, run, tmp_path, wait):
    import slicer

    run()
    panel.ui.smallestAreaSlider.value = 8
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")
    panel.enter()
    assert len(rows_of(panel)) == DEPTH
    assert panel.ui.smallestAreaSlider.value == 8
    before = volume_map(panel).rows[13].area_mm2
    panel.ui.thresholdSlider.value = 0.5
    wait(lambda: not panel.logic.poll())
    assert volume_map(panel).rows[13].area_mm2 > 2 * before
