"""The logic over many slices, as a script uses it: map, segmentation and table that fill slice by slice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.application import load_bundle, save_bundle
from harness.phantom import (
    add_bending_transform,
    add_linear_transform,
    add_volume,
    axial_matrix,
    rotation,
    translation,
)
from harness.phantom import head as phantom_head
from MedAnomalyCLIPLib.errors import (
    Cancelled,
    GeometryRefused,
    InvalidRequest,
    OutputFailed,
    UnsupportedImage,
)

ROOT = Path(__file__).parents[2]
VOXELS, SPOT = phantom_head()
THRESHOLD = 0.75
DEPTH = len(VOXELS)


@pytest.fixture
def logic(hosted_module, views, detector):
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    logic.detectorFactory = lambda folder: detector
    yield logic
    detector.gate.set()
    logic.close()


def finish(logic, wait):
    wait(lambda: not logic.poll(), seconds=60)


def map_voxels(node):
    import slicer

    return slicer.util.arrayFromVolume(node)


def mask_on(detection, volume_node):
    import slicer

    return slicer.util.arrayFromSegmentBinaryLabelmap(
        detection.segmentationNode, detection.volumeMap.segment_id, volume_node
    ).astype(bool)


def expected_map(slices=range(DEPTH)):
    values = np.full(VOXELS.shape, -2, np.float32)
    values[list(slices)] = np.clip(VOXELS[list(slices)] / 1000, 0, 1)
    return values


def table_column(node, name):
    from vtk.util.numpy_support import vtk_to_numpy

    return vtk_to_numpy(node.GetTable().GetColumnByName(name)).tolist()


# One map, one segmentation, one table


def test_a_volume_gives_one_map_one_segmentation_and_one_table(logic, head):
    import slicer

    detection = logic.detectVolume(head)
    np.testing.assert_array_equal(map_voxels(detection.mapNode), expected_map())
    np.testing.assert_array_equal(mask_on(detection, head), expected_map() >= THRESHOLD)
    assert table_column(detection.tableNode, "Slice") == list(range(1, DEPTH + 1))
    assert table_column(detection.tableNode, "Score") == pytest.approx(VOXELS.max((1, 2)) / 1000, abs=1e-4)
    assert table_column(detection.tableNode, "Percentile") == [97.5] * DEPTH
    area = (expected_map() >= THRESHOLD).sum(axis=(1, 2)) * 4.0  # mm² of a pixel
    assert table_column(detection.tableNode, "Area mm²") == pytest.approx(area)
    brightest = [np.unravel_index(plane.argmax(), plane.shape) for plane in VOXELS]
    peaks = [axial_matrix(VOXELS.shape) @ [i, j, k, 1] for k, (j, i) in enumerate(brightest)]
    for axis, name in enumerate(("Peak R", "Peak A", "Peak S")):
        assert table_column(detection.tableNode, name) == pytest.approx([p[axis] for p in peaks], abs=0.06)
    assert detection.complete
    assert len(slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")) == 2
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1
    assert len(slicer.util.getNodesByClass("vtkMRMLTableNode")) == 1


def test_slices_that_were_not_analysed_are_marked(logic, head):
    detection = logic.detectVolume(head, indices=[12, 13, 5])
    np.testing.assert_array_equal(map_voxels(detection.mapNode), expected_map([5, 12, 13]))
    assert [row.index for row in detection.rows] == [5, 12, 13]


@pytest.mark.parametrize("axis, name", [(0, "sagittal"), (1, "coronal"), (2, None)])
def test_every_axis_can_be_gone_along(logic, head, axis, name):
    detection = logic.detectVolume(head, axis=name, indices=[20, 10])
    assert detection.volumeMap.axis == axis
    analysed = np.unique(np.argwhere(map_voxels(detection.mapNode) >= 0)[:, 2 - axis])
    assert analysed.tolist() == [10, 20]
    chosen = np.moveaxis(np.clip(VOXELS / 1000, 0, 1).astype(np.float32), 2 - axis, 0)[[10, 20]]
    np.testing.assert_array_equal(np.moveaxis(map_voxels(detection.mapNode), 2 - axis, 0)[[10, 20]], chosen)


@pytest.mark.parametrize(
    "to_world", [translation(50, -20, 7), rotation("S", 30) @ rotation("A", 20)], ids=["moved", "turned"]
)
def test_results_of_a_moved_volume_lie_where_it_is_seen(logic, head, to_world):
    import slicer

    head.SetAndObserveTransformNodeID(add_linear_transform(to_world).GetID())
    detection = logic.detectVolume(head)
    grid = to_world @ axial_matrix(VOXELS.shape)
    np.testing.assert_allclose(detection.volumeMap.grid, grid, atol=1e-6)
    node = detection.segmentationNode
    image = node.GetBinaryLabelmapInternalRepresentation(detection.volumeMap.segment_id)
    voxels = slicer.util.arrayFromSegmentInternalBinaryLabelmap(node, detection.volumeMap.segment_id)
    found = np.argwhere(voxels)[:, ::-1] + np.array(image.GetExtent()[::2])
    assert sorted(map(tuple, found)) == sorted(map(tuple, np.argwhere(expected_map() >= THRESHOLD)[:, ::-1]))
    import vtk

    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    np.testing.assert_allclose(slicer.util.arrayFromVTKMatrix(matrix), grid, atol=1e-6)


def test_a_bent_volume_is_refused(logic, head):
    head.SetAndObserveTransformNodeID(add_bending_transform().GetID())
    with pytest.raises(InvalidRequest, match="non-linear transform"):
        logic.detectVolume(head)
    assert not logic.isRunning()


def test_sheared_slices_are_refused(logic, views):
    matrix = axial_matrix(VOXELS.shape)
    matrix[0, 1] = 1.0
    with pytest.raises(GeometryRefused, match="not perpendicular"):
        logic.detectVolume(add_volume(VOXELS, matrix))


@pytest.mark.parametrize("request_", [{"indices": [99]}, {"indices": []}, {"axis": "oblique"}, {"axis": 5}])
def test_slices_that_are_not_there_are_refused(logic, head, request_):
    with pytest.raises(InvalidRequest):
        logic.detectVolume(head, **request_)


def test_a_node_that_holds_an_image_is_not_overwritten(logic, head):
    other = add_volume(VOXELS, axial_matrix(VOXELS.shape), "Other")
    with pytest.raises(InvalidRequest, match="holds an image"):
        logic.detectVolume(head, mapNode=other)
    np.testing.assert_array_equal(map_voxels(other), VOXELS)


def test_nodes_of_ones_own_are_filled(logic, head):
    import slicer

    chosen = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Mine")
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Mine too")
    detection = logic.detectVolume(head, indices=[13], mapNode=chosen, segmentationNode=segmentation)
    assert (detection.mapNode, detection.segmentationNode) == (chosen, segmentation)
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1


def test_the_map_is_shown_where_the_volume_is_shown_and_nowhere_else(logic, head, views):
    views["Green"].reset()
    detection = logic.detectVolume(head, indices=[13])
    shown = {name: view.composite.GetForegroundVolumeID() for name, view in views.items()}
    assert shown == {"Red": detection.mapNode.GetID(), "Yellow": detection.mapNode.GetID(), "Green": None}


def test_no_view_is_needed(logic, slicer_scene):
    node = add_volume(VOXELS, axial_matrix(VOXELS.shape))
    assert logic.detectVolume(node, indices=[13]).complete


def test_a_slice_detected_by_itself_joins_the_same_segment(logic, head, views):
    detection = logic.detectVolume(head)
    single = logic.detect(head, "Red", threshold=0.5)
    assert single.segmentId == detection.volumeMap.segment_id
    mask = expected_map() >= THRESHOLD
    mask[13] = expected_map()[13] >= 0.5
    np.testing.assert_array_equal(mask_on(detection, head), mask)


def test_the_scores_are_plotted_along_the_volume(logic, head, detector):
    from MedAnomalyCLIPLib.scene_table import chart_of

    detection = logic.detectVolume(head, indices=[12, 13])
    chart = chart_of(detection.tableNode)
    series = chart.GetNthPlotSeriesNode(0)
    assert series.GetTableNode() is detection.tableNode
    assert (series.GetXColumnName(), series.GetYColumnName()) == ("Slice", "Score")


def test_the_table_remarks_slices_whose_score_says_little(logic, head):
    from MedAnomalyCLIPLib.scene_table import write_table
    from MedAnomalyCLIPLib.slice_table import SliceRow

    node = logic.detectVolume(head, indices=[12]).tableNode
    row = SliceRow(0, 0.5, None, 0.0, 0.0, None)
    unlike, alike = ({"unlikeness": at, "unlike_threshold": 0.8} for at in (0.9, 0.7))
    told = [unlike, alike, {}, {**unlike, "empty": True}]
    write_table(node, [replace(row, index=at, **what) for at, what in enumerate(told)], None)
    column = node.GetTable().GetColumnByName("Remark")
    assert [column.GetValue(at) for at in range(4)] == ["unlike", "", "", "empty"]


def test_what_makes_a_score_say_little_is_read_back_from_the_scene(logic, head):
    from MedAnomalyCLIPLib.scene import result_of_map
    from MedAnomalyCLIPLib.scene_nodes import record_provenance

    little = {"unlikeness": 0.9, "unlike_threshold": 0.8}
    volume_map = logic.detectVolume(head, indices=[12]).volumeMap
    volume_map.rows[12] = replace(volume_map.rows[12], **little, empty=True)
    single = logic.detect(head, "Red")
    record_provenance(single.mapNode, replace(single.result, **little, is_empty=True))
    for result in (volume_map.result(12), result_of_map(single.mapNode)):
        assert result.is_unlike and result.is_empty
    record_provenance(single.mapNode, single.result)
    assert not result_of_map(single.mapNode).is_unlike and not result_of_map(single.mapNode).is_empty


# One slice after the other


def test_each_slice_is_in_the_scene_when_it_is_yielded(logic, head):
    seen = []
    for detection in logic.detectSlices(head, indices=[12, 13, 14]):
        seen.append(detection.result.plane.aligned.index)
        np.testing.assert_array_equal(map_voxels(detection.mapNode), expected_map(seen))
    assert seen == [12, 13, 14]


def test_leaving_the_loop_keeps_what_is_done_and_frees_the_logic(logic, head):
    for detection in logic.detectSlices(head):
        if detection.result.plane.aligned.index == 4:
            break
    assert logic.volumeDetection(head).complete is False
    assert [row.index for row in logic.volumeDetection(head).rows] == [0, 1, 2, 3, 4]
    assert not logic.isRunning()


def fail_at(detector, index, error):
    good = detector.detect

    def detect(plane, **options):
        if plane.aligned.index == index:
            raise error
        return good(plane, **options)

    detector.detect = detect


def test_a_crash_loses_one_slice_and_not_the_run(logic, head, detector):
    fail_at(detector, 3, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        list(logic.detectSlices(head, indices=range(6)))
    assert [row.index for row in logic.volumeDetection(head).rows] == [0, 1, 2]
    fail_at(detector, 3, UnsupportedImage("empty"))
    del detector.detect
    assert [
        d.result.plane.aligned.index for d in logic.detectSlices(head, indices=range(6), resume=True)
    ] == [
        3,
        4,
        5,
    ]


def test_a_slice_that_cannot_be_detected_is_told_and_left_out(logic, head, detector):
    fail_at(detector, 3, UnsupportedImage("empty"))
    failed = {}
    rows = list(logic.detectSlices(head, indices=range(6), onFailure=failed.__setitem__))
    assert len(rows) == 5
    assert {index: str(error) for index, error in failed.items()} == {3: "empty"}
    detection = logic.detectVolume(head, indices=range(6))
    assert detection.failures == {3: "empty"}
    assert not detection.complete


def test_a_detector_that_cannot_be_loaded_ends_the_run_at_once(logic, head):
    from MedAnomalyCLIPLib.errors import DependencyMissing

    asked = []

    def missing(folder):
        asked.append(folder)
        raise DependencyMissing("torch")

    logic.detectorFactory = missing
    with pytest.raises(DependencyMissing):
        logic.detectVolume(head)
    assert len(asked) <= 3
    assert logic.volumeDetection(head) is None


def test_progress_is_told_and_a_run_can_be_cancelled(logic, head):
    told = []
    detection = logic.detectVolume(
        head, onProgress=lambda *numbers: told.append(numbers), isCancelled=lambda: len(told) == 3
    )
    assert told == [(1, DEPTH), (2, DEPTH), (3, DEPTH)]
    assert len(detection.rows) == 3


# Without waiting


def start(logic, node, **request):
    ends = []
    logic.startRange(node, onDone=lambda *end: ends.append(end), **request)
    return ends


def test_a_poll_writes_one_slice_at_most(logic, head, wait):
    ends = start(logic, head)
    counts = [0]
    while logic.poll():
        detection = logic.volumeDetection(head)
        counts.append(len(detection.rows) if detection else 0)
    assert max(np.diff(counts)) == 1
    ((detection, error),) = ends
    assert error is None
    assert detection.complete


def test_only_the_worker_runs_the_detector(logic, head, detector, wait):
    start(logic, head)
    finish(logic, wait)
    assert len(detector.threads) == DEPTH
    assert len(set(detector.threads)) == 1
    assert threading.main_thread().name not in detector.threads


def test_what_is_done_when_a_run_is_cancelled_is_kept_and_gone_on_from(logic, head, detector, wait):
    start(logic, head)
    wait(lambda: logic.poll() and logic.volumeDetection(head) and len(logic.volumeDetection(head).rows) == 7)
    logic.cancel()
    assert not logic.poll()
    kept = logic.volumeDetection(head)
    np.testing.assert_array_equal(map_voxels(kept.mapNode), expected_map(range(7)))
    wait(lambda: logic._worker.call(lambda: True).result())
    before = len(detector.threads)
    ends = start(logic, head, resume=True)
    finish(logic, wait)
    assert len(detector.threads) - before == DEPTH - 7
    assert ends[0][0].mapNode is kept.mapNode
    np.testing.assert_array_equal(map_voxels(kept.mapNode), expected_map())
    np.testing.assert_array_equal(mask_on(ends[0][0], head), expected_map() >= THRESHOLD)


def test_a_run_that_is_not_resumed_starts_anew(logic, head):
    logic.detectVolume(head, indices=[3])
    detection = logic.detectVolume(head, indices=[5])
    np.testing.assert_array_equal(map_voxels(detection.mapNode), expected_map([5]))
    assert [row.index for row in detection.rows] == [5]


def test_resuming_what_is_complete_does_nothing(logic, head, wait):
    logic.detectVolume(head, indices=[3, 4])
    ends = start(logic, head, indices=[3, 4], resume=True)
    finish(logic, wait)
    assert ends[0][0].complete


def test_a_run_is_not_continued_with_another_detector_axis_or_place(logic, head, detector):
    from dataclasses import replace

    logic.detectVolume(head, indices=[3])
    with pytest.raises(InvalidRequest, match="along"):
        logic.detectVolume(head, axis=0, resume=True)
    detector.provenance = replace(detector.provenance, bundle_sha256="1" * 64)
    with pytest.raises(InvalidRequest, match="another detector"):
        logic.detectVolume(head, resume=True)
    head.SetAndObserveTransformNodeID(add_linear_transform(translation(0, 0, 60)).GetID())
    with pytest.raises(InvalidRequest, match="moved"):
        logic.detectVolume(head, resume=True)
    assert [row.index for row in logic.volumeDetection(head).rows] == [3]


def test_one_thing_at_a_time(logic, head, detector):
    detector.gate.clear()
    logic.startRange(head)
    for again in (
        lambda: logic.startRange(head),
        lambda: logic.startDetection(head, "Red"),
        lambda: logic.detectVolume(head),
    ):
        with pytest.raises(InvalidRequest, match="wait for it or cancel"):
            again()


@pytest.mark.parametrize("what", ["volume", "map"])
def test_deleting_volume_or_map_ends_the_run_in_words(logic, head, wait, what):
    import slicer

    ends = start(logic, head)
    wait(lambda: logic.poll() and logic.volumeDetection(head) is not None)
    slicer.mrmlScene.RemoveNode(head if what == "volume" else logic.volumeDetection(head).mapNode)
    finish(logic, wait)
    assert isinstance(ends[0][1], Cancelled)
    assert what in str(ends[0][1])


def test_segmentation_and_table_deleted_meanwhile_are_made_again(logic, head, wait):
    import slicer

    ends = start(logic, head)
    wait(
        lambda: logic.poll() and logic.volumeDetection(head) and logic.volumeDetection(head).segmentationNode
    )
    for class_name in ("vtkMRMLSegmentationNode", "vtkMRMLTableNode"):
        slicer.mrmlScene.RemoveNode(slicer.util.getNodesByClass(class_name)[0])
    finish(logic, wait)
    detection = ends[0][0]
    assert table_column(detection.tableNode, "Slice") == list(range(1, DEPTH + 1))
    logic.setThreshold(0.7)
    np.testing.assert_array_equal(mask_on(detection, head), expected_map() >= np.float32(0.7))


def test_a_scene_closed_meanwhile_ends_the_run(logic, head, wait):
    import slicer

    start(logic, head)
    wait(lambda: logic.poll() and logic.volumeDetection(head) is not None)
    logic.forgetResults()
    slicer.mrmlScene.Clear(False)
    assert not logic.poll()
    assert not slicer.util.getNodesByClass("vtkMRMLTableNode")


def test_a_volume_moved_meanwhile_keeps_results_together_where_it_was(logic, head, wait):
    ends = start(logic, head)
    wait(lambda: logic.poll() and logic.volumeDetection(head) is not None)
    head.SetAndObserveTransformNodeID(add_linear_transform(translation(0, 0, 60)).GetID())
    finish(logic, wait)
    detection = ends[0][0]
    np.testing.assert_allclose(detection.volumeMap.grid, axial_matrix(VOXELS.shape), atol=1e-6)
    assert detection.segmentationNode.GetSegmentation().GetNumberOfSegments() == 1


# Threshold and smallest area


def test_the_threshold_moves_all_slices_of_map_segment_and_table(logic, head):
    detection = logic.detectVolume(head)
    for threshold in (0.5, 0.9, 0.6):
        logic.setThreshold(threshold)
        mask = expected_map() >= np.float32(threshold)
        np.testing.assert_array_equal(mask_on(detection, head), mask)
        assert detection.mapNode.GetDisplayNode().GetLowerThreshold() == pytest.approx(threshold)
        assert table_column(detection.tableNode, "Area mm²") == pytest.approx(mask.sum((1, 2)) * 4.0)


def test_a_threshold_may_change_again_before_all_slices_followed(logic, head, wait, monkeypatch):
    from MedAnomalyCLIPLib import scene_jobs

    monkeypatch.setattr(scene_jobs, "_REFRESH_SECONDS", 1e-9)
    detection = logic.detectVolume(head, threshold=0.4)
    for threshold in (0.87, 0.62, 0.8):
        logic.setThreshold(threshold, wait=False)
        for _ in range(5):
            logic.poll()
    monkeypatch.undo()
    finish(logic, wait)
    np.testing.assert_array_equal(mask_on(detection, head), expected_map() >= np.float32(0.8))


def test_small_parts_leave_segment_and_overlay_and_come_back(logic, head, views):
    from MedAnomalyCLIPLib.components import drop_small

    detection = logic.detectVolume(head, threshold=0.65)
    logic.setSmallestArea(60.0)  # 15 pixels
    masks = np.stack([drop_small(m, 15) for m in expected_map() >= np.float32(0.65)])
    assert 0 < masks.sum() < (expected_map() >= np.float32(0.65)).sum()
    np.testing.assert_array_equal(mask_on(detection, head), masks)
    np.testing.assert_array_equal(map_voxels(detection.mapNode) >= np.float32(0.65), masks)
    logic.setSmallestArea(0.0)
    np.testing.assert_array_equal(map_voxels(detection.mapNode), expected_map())
    np.testing.assert_array_equal(mask_on(detection, head), expected_map() >= np.float32(0.65))


def test_the_smallest_area_acts_on_single_slices_too(logic, head, views):
    logic.smallestArea = 60.0
    one = logic.detect(head, "Red", threshold=0.65)
    assert one.result.area_mm2 < (VOXELS[13] >= 650).sum() * 4.0
    shown = map_voxels(one.mapNode)[0]
    np.testing.assert_array_equal(shown >= np.float32(0.65), one.result.mask)
    logic.setSmallestArea(0.0)
    np.testing.assert_array_equal(map_voxels(one.mapNode)[0], one.result.map)


def test_a_threshold_changed_during_the_run_holds_for_all_slices(logic, head, wait):
    ends = start(logic, head)
    wait(lambda: logic.poll() and logic.volumeDetection(head) and len(logic.volumeDetection(head).rows) == 5)
    logic.setThreshold(0.55, wait=False)
    finish(logic, wait)
    np.testing.assert_array_equal(mask_on(ends[0][0], head), expected_map() >= np.float32(0.55))


# Going from slice to slice


def test_the_next_candidate_is_gone_to_and_views_across_meet_its_peak(logic, head, views, detector):
    detection = logic.detectVolume(head)
    views["Red"].node.JumpSliceByOffsetting(0, 0, -1000)
    visited = []
    while (index := logic.nextCandidate(head)) is not None:
        visited.append(index)
        row = detection.volumeMap.rows[index]
        assert views["Red"].node.GetSliceOffset() == pytest.approx(row.peak_ras[2])
        across = views["Yellow"].node.GetSliceToRAS().GetElement(0, 3)
        assert across == pytest.approx(row.peak_ras[0], abs=1e-3)
    assert visited == detection.candidates
    assert len(visited) > 2
    assert logic.nextCandidate(head, -1) == visited[-2]


def test_without_results_there_is_no_candidate(logic, head):
    assert logic.nextCandidate(head) is None


# To pandas and files


def test_results_go_to_pandas(logic, head):
    frame = logic.detectVolume(head, indices=[12, 13]).to_pandas()
    assert frame["number"].tolist() == [13, 14]
    assert frame["score"].tolist() == pytest.approx((VOXELS[[12, 13]].max((1, 2)) / 1000).tolist())


def test_an_export_has_the_files_of_the_command_line(logic, head, tmp_path):
    import SimpleITK

    logic.detectVolume(head, indices=[12, 13])
    logic.setThreshold(0.5)
    logic.exportResults(head, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("overlay_K_012.png", "overlay_K_013.png", "map.nii.gz"),
        *("segmentation.seg.nrrd", "scores.csv", "result.json"),
    }
    manifest = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (manifest["threshold"], manifest["complete"], len(manifest["slices"])) == (0.5, False, 2)
    written = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out" / "map.nii.gz")))
    np.testing.assert_array_equal(written, np.where(expected_map([12, 13]) < 0, 0, expected_map([12, 13])))
    with pytest.raises(OutputFailed, match="exists"):
        logic.exportResults(head, tmp_path / "out")


def test_an_export_in_the_background_can_be_cancelled_and_leaves_nothing(logic, head, tmp_path, wait):
    logic.detectVolume(head)
    logic.startExport(head, tmp_path / "out")
    logic.poll()
    logic.cancel()
    logic._worker.call(lambda: None).result()
    assert list(tmp_path.iterdir()) == []
    ends = []
    logic.startExport(head, tmp_path / "out", onDone=lambda *end: ends.append(end))
    finish(logic, wait)
    assert ends == [(None, None)]
    assert len(list((tmp_path / "out").glob("overlay*.png"))) == DEPTH


def test_nothing_to_export_is_said(logic, head, tmp_path):
    with pytest.raises(InvalidRequest, match="detect first"):
        logic.exportResults(head, tmp_path / "out")


def test_no_window_and_no_view_are_needed(tmp_path):
    """In a process of its own, as `Slicer --no-main-window --python-script` is."""
    program = f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(ROOT / "Testing")!r}, {str(ROOT / "MedAnomalyCLIP")!r}]
        from harness import application
        application.start()
        from harness.fake_detector import BrightnessDetector
        from harness.phantom import add_volume, axial_matrix, head
        from harness.scripted_module import HostedModule
        import slicer
        assert slicer.app.layoutManager() is None
        module = HostedModule(Path({str(ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIP.py")!r}))
        logic = module.code.MedAnomalyCLIPLogic()
        logic.detectorFactory = lambda folder: BrightnessDetector()
        voxels, _ = head((6, 40, 36))
        node = add_volume(voxels, axial_matrix(voxels.shape))
        detection = logic.detectVolume(node)
        logic.setThreshold(0.5)
        logic.exportResults(node, {str(tmp_path / "out")!r})
        print(len(detection.to_pandas()), logic.nextCandidate(node) is not None)
        logic.close()
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.split() == ["6", "True"], ran.stderr
    assert (tmp_path / "out" / "result.json").is_file()


def test_the_example_of_the_readme_runs(logic, head, tmp_path, monkeypatch, capsys):
    import slicer

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```\n(for detection in logic.*?)```", text, re.DOTALL)
    head.SetName("MRHead")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"logic": logic, "slicer": slicer})
    assert len(capsys.readouterr().out.splitlines()) > 10
    assert (tmp_path / "results" / "mrhead" / "result.json").is_file()
    assert (tmp_path / "scores.csv").is_file()


@pytest.fixture
def undo(slicer_scene):
    """A scene whose user has undo on for nodes of the kinds that we make; undoes a step."""
    import slicer

    kinds = ("ScalarVolume", "Segmentation", "Table", "PlotChart", "PlotSeries")
    defaults = [getattr(slicer, f"vtkMRML{kind}Node")() for kind in kinds]
    for node in defaults:
        node.UndoEnabledOn()
        slicer_scene.AddDefaultNode(node)
    slicer_scene.SetUndoOn()
    yield slicer_scene.Undo
    slicer_scene.SetUndoOff()
    slicer_scene.ClearUndoStack()
    for node in defaults:  # a scene lets go of all of them or none
        slicer_scene.GetDefaultNodeByClass(node.GetClassName()).UndoEnabledOff()


def test_a_detection_is_undone_as_a_whole_and_the_next_one_works(logic, undo, head):
    import slicer

    logic.detectVolume(head, indices=[12])
    logic.detectVolume(head, indices=[13], resume=True)
    undo()
    left = logic.volumeDetection(head)
    assert [row.index for row in left.rows] == [12]
    np.testing.assert_array_equal(map_voxels(left.mapNode), expected_map([12]))
    np.testing.assert_array_equal(mask_on(left, head), expected_map([12]) >= THRESHOLD)
    assert table_column(left.tableNode, "Slice") == [13]
    undo()
    assert logic.volumeDetection(head) is None
    assert slicer.mrmlScene.IsNodePresent(head)
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert logic.detectVolume(head).complete


def test_a_detection_on_one_slice_is_a_step_to_undo(logic, undo, head, slicer_scene):
    before = slicer_scene.GetNumberOfUndoLevels()
    logic.detect(head, "Red")
    assert slicer_scene.GetNumberOfUndoLevels() == before + 1


# Saved and loaded again


def test_a_volume_of_60_slices_cancelled_resumed_saved_and_reloaded(logic, views, detector, wait, tmp_path):
    import slicer

    voxels, _ = phantom_head((60, 64, 48))
    node = add_volume(voxels, axial_matrix(voxels.shape, (2, 2, 3)), "Sixty")
    expected = np.clip(voxels / 1000, 0, 1).astype(np.float32)
    start(logic, node)
    wait(lambda: logic.poll() and logic.volumeDetection(node) and len(logic.volumeDetection(node).rows) == 20)
    logic.cancel()
    save_bundle(tmp_path / "cancelled.mrb")
    logic.forgetResults()
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "cancelled.mrb")
    node = slicer.util.getNode("Sixty")
    kept = logic.volumeDetection(node)
    assert [row.index for row in kept.rows] == list(range(20))
    assert (map_voxels(kept.mapNode)[20:] == -2).all()

    ends = start(logic, node, resume=True)
    finish(logic, wait)
    assert ends[0][1] is None
    save_bundle(tmp_path / "whole.mrb")
    logic.forgetResults()
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "whole.mrb")
    node = slicer.util.getNode("Sixty")
    detection = logic.volumeDetection(node)
    np.testing.assert_array_equal(map_voxels(detection.mapNode), expected)
    np.testing.assert_array_equal(mask_on(detection, node), expected >= THRESHOLD)
    assert table_column(detection.tableNode, "Slice") == list(range(1, 61))
    assert len(slicer.util.getNodesByClass("vtkMRMLTableNode")) == 1

    logic.showVolumeMap(detection.mapNode)
    views["Red"].show(node)
    logic.showVolumeMap(detection.mapNode)
    logic.setThreshold(0.55)
    np.testing.assert_array_equal(mask_on(detection, node), expected >= np.float32(0.55))


def test_the_segments_of_a_reloaded_scene_follow_the_threshold(logic, head, views, tmp_path):
    import slicer

    logic.detect(head, "Red")
    views["Green"].tilt(15)
    logic.detect(head, "Green")
    views["Green"].node.SetOrientation("Coronal")
    save_bundle(tmp_path / "case.mrb")
    logic.forgetResults()
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")

    def pixels_marked():
        node = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")[0]
        return [
            int(slicer.util.arrayFromSegmentInternalBinaryLabelmap(node, i).astype(bool).sum())
            for i in node.GetSegmentation().GetSegmentIDs()
        ]

    before = pixels_marked()
    logic.setThreshold(0.5)
    maps = [
        n
        for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
        if n.GetAttribute("MedAnomalyCLIP.Role")
    ]
    assert sorted(pixels_marked()) == sorted(int((map_voxels(n) >= 0.5).sum()) for n in maps)
    assert sum(pixels_marked()) > 2 * sum(before)
