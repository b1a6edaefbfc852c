"""The mask becomes a segment at the place of the voxels it was computed from, wherever those were moved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness.application import load_bundle, save_bundle
from harness.fake_detector import BrightnessDetector
from harness.phantom import (
    add_bending_transform,
    add_linear_transform,
    add_volume,
    axial_matrix,
    head,
    rotation,
    translation,
)
from MedAnomalyCLIPLib.terminology import TERMINOLOGY_ENTRY, TERMS

THRESHOLD = 0.75
VOXELS, SPOT = head()
GRID = axial_matrix(VOXELS.shape)
SPOT_SLICE = 13


@pytest.fixture
def node(views):
    volume_node = add_volume(VOXELS, GRID, "Head")
    for view in views.values():
        view.show(volume_node)
    look_at_slice(views, SPOT_SLICE)
    return volume_node


def look_at_slice(views, k, to_world=None):
    """Point the red view at a slice of the phantom; `to_world` is where its transform puts it."""
    i, j = np.argwhere(SPOT[SPOT_SLICE]).mean(axis=0)[::-1]
    place = GRID @ [i, j, k, 1]
    views["Red"].node.JumpSlice(*(place if to_world is None else to_world @ place)[:3])


def detect(node, view_name="Red", **options):
    from MedAnomalyCLIPLib.scene import plane_in_view

    return BrightnessDetector().detect(plane_in_view(node, view_name), **options)


def write(result, node):
    from MedAnomalyCLIPLib.scene_segments import write_segment

    return write_segment(result, node)


def labelmap(segmentation_node, segment_id):
    """(voxels (K, J, I) bool, IJK to world 4x4) of a segment, as stored."""
    import slicer
    import vtk

    segmentation_node.GetSegmentation().SeparateSegmentLabelmap(segment_id)
    image = segmentation_node.GetBinaryLabelmapInternalRepresentation(segment_id)
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    matrix = slicer.util.arrayFromVTKMatrix(matrix)
    voxels = slicer.util.arrayFromSegmentInternalBinaryLabelmap(segmentation_node, segment_id)
    label = segmentation_node.GetSegmentation().GetSegment(segment_id).GetLabelValue()
    matrix[:3, 3] += matrix[:3, :3] @ np.array(image.GetExtent()[::2])
    return voxels == label, matrix


def points_of(segmentation_node, segment_id) -> np.ndarray:
    """(N, 3) sorted world positions of the voxels of a segment."""
    voxels, matrix = labelmap(segmentation_node, segment_id)
    ijk = np.argwhere(voxels)[:, ::-1]
    return in_order((matrix @ np.c_[ijk, np.ones(len(ijk))].T).T[:, :3])


def points_above(threshold, slices, to_world=None) -> np.ndarray:
    """(N, 3) sorted world positions of the phantom's bright voxels in some slices."""
    bright = threshold <= (VOXELS / 1000)
    chosen = np.zeros_like(bright)
    chosen[list(slices)] = bright[list(slices)]
    ijk = np.argwhere(chosen)[:, ::-1]
    matrix = GRID if to_world is None else to_world @ GRID
    return in_order((matrix @ np.c_[ijk, np.ones(len(ijk))].T).T[:, :3])


def in_order(points) -> np.ndarray:
    points = np.round(points, 5)
    return points[np.lexsort(points.T)]


def test_the_segment_has_the_voxels_that_were_found(node):
    segmentation, segment_id = write(detect(node), node)
    np.testing.assert_allclose(
        points_of(segmentation, segment_id), points_above(THRESHOLD, [SPOT_SLICE]), atol=1e-4
    )


@pytest.mark.parametrize(
    "to_world",
    [translation(100, -20, 7), rotation("S", 90), rotation("R", 90) @ translation(5, 6, 7)],
    ids=["translated", "turned about S", "turned about R"],
)
def test_the_segment_of_a_moved_volume_is_where_its_voxels_are(node, views, to_world):
    node.SetAndObserveTransformNodeID(add_linear_transform(to_world).GetID())
    views["Red"].node.RotateToVolumePlane(node)
    look_at_slice(views, SPOT_SLICE, to_world)
    result = detect(node)
    assert result.plane.aligned is not None
    segmentation, segment_id = write(result, node)
    found = points_of(segmentation, segment_id)
    slices = [result.plane.aligned.index]
    if result.plane.aligned.axis == 2:
        np.testing.assert_allclose(found, points_above(THRESHOLD, slices, to_world), atol=1e-4)
    assert len(found) == result.mask.sum()
    np.testing.assert_allclose(found, in_order(mask_points(result)), atol=1e-4)


def mask_points(result) -> np.ndarray:
    rows, columns = np.nonzero(result.mask)
    points = np.stack([columns, rows, np.zeros_like(rows), np.ones_like(rows)])
    return (result.plane.ijk_to_ras @ points)[:3].T


def test_a_turned_volume_seen_along_its_slices_gets_voxels_of_its_own_grid(node, views):
    to_world = rotation("S", 30) @ rotation("A", 20)
    node.SetAndObserveTransformNodeID(add_linear_transform(to_world).GetID())
    views["Red"].node.RotateToVolumePlane(node)
    look_at_slice(views, SPOT_SLICE, to_world)
    segmentation, segment_id = write(detect(node), node)
    np.testing.assert_allclose(
        points_of(segmentation, segment_id), points_above(THRESHOLD, [SPOT_SLICE], to_world), atol=1e-4
    )


def test_an_oblique_mask_keeps_the_grid_of_its_plane(node, views):
    views["Red"].tilt(20)
    result = detect(node)
    segmentation, segment_id = write(result, node)
    np.testing.assert_allclose(points_of(segmentation, segment_id), in_order(mask_points(result)), atol=1e-4)


def test_the_segment_of_a_bent_volume_is_where_the_volume_is_seen(node, views):
    """The view shows the spot where the segment lies; where the voxels lie unbent, it does not."""
    node.SetAndObserveTransformNodeID(add_bending_transform(bend_mm=25).GetID())
    look_at_slice(views, SPOT_SLICE)
    result = detect(node)
    segmentation, segment_id = write(result, node)
    shown = views["Red"].displayed_values()
    at_segment = np.array([shown[views["Red"].pixel_at(p)] for p in points_of(segmentation, segment_id)])
    assert result.plane.aligned is None
    assert np.median(at_segment) > 750


def test_the_segmentation_is_under_no_transform(node, views):
    node.SetAndObserveTransformNodeID(add_linear_transform(translation(100, 0, 0)).GetID())
    look_at_slice(views, SPOT_SLICE, translation(100, 0, 0))
    segmentation, _ = write(detect(node), node)
    assert segmentation.GetParentTransformNode() is None


def test_detections_on_different_slices_gather_in_one_segment(node, views):
    ids = set()
    for k in (SPOT_SLICE, SPOT_SLICE - 2, SPOT_SLICE + 1):
        look_at_slice(views, k)
        segmentation, segment_id = write(detect(node), node)
        ids.add(segment_id)
    slices = [SPOT_SLICE, SPOT_SLICE - 2, SPOT_SLICE + 1]
    assert len(ids) == 1
    np.testing.assert_allclose(
        points_of(segmentation, segment_id), points_above(THRESHOLD, slices), atol=1e-4
    )


def test_slices_of_different_views_gather_in_one_segment(node, views):
    _, red = write(detect(node, "Red"), node)
    views["Green"].node.JumpSlice(*points_above(THRESHOLD, [SPOT_SLICE]).mean(axis=0))
    segmentation, green = write(detect(node, "Green"), node)
    assert red == green
    crossing = len(points_above(THRESHOLD, [SPOT_SLICE]))
    assert len(points_of(segmentation, green)) > crossing


def test_another_threshold_replaces_the_slice_and_no_other(node, views):
    write(detect(node), node)
    look_at_slice(views, SPOT_SLICE + 1)
    write(detect(node), node)
    segmentation, segment_id = write(detect(node, threshold=0.5), node)
    expected = in_order(
        np.vstack([points_above(THRESHOLD, [SPOT_SLICE]), points_above(0.5, [SPOT_SLICE + 1])])
    )
    np.testing.assert_allclose(points_of(segmentation, segment_id), expected, atol=1e-4)


def test_a_threshold_that_nothing_reaches_clears_the_slice(node):
    write(detect(node), node)
    segmentation, segment_id = write(detect(node, threshold=1.0), node)
    assert len(points_of(segmentation, segment_id)) == 0


def test_nothing_found_makes_no_node(node):
    import slicer

    assert write(detect(node, threshold=1.0), node) is None
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")


def test_planes_of_different_tilt_get_segments_of_their_own(node, views):
    views["Red"].tilt(20)
    _, first = write(detect(node), node)
    views["Red"].tilt(5)
    segmentation, second = write(detect(node), node)
    assert first != second
    assert segmentation.GetSegmentation().GetNumberOfSegments() == 2


def test_the_same_tilted_plane_updates_its_segment(node, views):
    views["Red"].tilt(20)
    _, first = write(detect(node), node)
    segmentation, second = write(detect(node, threshold=0.5), node)
    assert first == second
    assert len(points_of(segmentation, second)) == detect(node, threshold=0.5).mask.sum()


def test_an_oblique_segment_does_not_change_the_one_on_the_voxel_grid(node, views):
    segmentation, aligned = write(detect(node), node)
    before = points_of(segmentation, aligned)
    views["Red"].tilt(20)
    write(detect(node), node)
    np.testing.assert_array_equal(points_of(segmentation, aligned), before)


def test_a_volume_moved_since_the_last_detection_starts_a_segment(node, views):
    segmentation, first = write(detect(node), node)
    before = points_of(segmentation, first)
    node.SetAndObserveTransformNodeID(add_linear_transform(translation(3, 0, 0)).GetID())
    look_at_slice(views, SPOT_SLICE, translation(3, 0, 0))
    _, second = write(detect(node), node)
    assert first != second
    np.testing.assert_array_equal(points_of(segmentation, first), before)


def test_a_volume_moved_between_click_and_result_leaves_the_mask_where_it_was_seen(node):
    result = detect(node)
    node.SetAndObserveTransformNodeID(add_linear_transform(translation(50, 0, 0)).GetID())
    segmentation, segment_id = write(result, node)
    np.testing.assert_allclose(points_of(segmentation, segment_id), in_order(mask_points(result)), atol=1e-4)


def test_segments_of_the_user_in_the_same_node_stay_as_they_are(node, views):
    """Slicer lets segments share one labelmap; ours is taken out of it before it is changed."""
    segmentation, ours = write(detect(node), node)
    theirs = segmentation.GetSegmentation().AddEmptySegment("users", "User's")
    other = np.zeros(VOXELS.shape, np.uint8)
    other[SPOT_SLICE, 10:20, 10:20] = 1
    import slicer

    slicer.util.updateSegmentBinaryLabelmapFromArray(other, segmentation, theirs, node)
    segmentation.GetSegmentation().CollapseBinaryLabelmaps(False)
    assert segmentation.GetSegmentation().GetNumberOfLayers() == 1
    write(detect(node), node)
    look_at_slice(views, SPOT_SLICE + 1)
    write(detect(node), node)
    np.testing.assert_array_equal(
        slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, theirs, node), other
    )
    stored = slicer.util.arrayFromSegmentInternalBinaryLabelmap(segmentation, ours)
    assert set(np.unique(stored)) == {0, 1}
    np.testing.assert_allclose(
        points_of(segmentation, ours), points_above(THRESHOLD, [SPOT_SLICE, SPOT_SLICE + 1]), atol=1e-4
    )


def test_a_segment_that_somebody_gave_another_grid_is_left_alone(node, views):
    import slicer

    segmentation, first = write(detect(node), node)
    coarse = add_volume(
        np.zeros((6, 20, 18), np.int16), axial_matrix((6, 20, 18), (8.0, 8.0, 20.0)), "Coarse"
    )
    resampled = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, first, coarse)
    resampled[2, 3, 4] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(resampled, segmentation, first, coarse)
    before = points_of(segmentation, first)
    look_at_slice(views, SPOT_SLICE + 1)
    _, second = write(detect(node), node)
    assert second != first
    np.testing.assert_array_equal(points_of(segmentation, first), before)


def test_a_surface_in_3d_follows_the_threshold(node):
    segmentation, segment_id = write(detect(node), node)

    def surface_volume():
        import vtk

        segmentation.CreateClosedSurfaceRepresentation()
        surface = vtk.vtkPolyData()
        segmentation.GetClosedSurfaceRepresentation(segment_id, surface)
        mass = vtk.vtkMassProperties()
        mass.SetInputData(surface)
        return mass.GetVolume()

    before = surface_volume()
    write(detect(node, threshold=0.5), node)
    assert surface_volume() > 2 * before


def test_a_deleted_segmentation_is_made_anew(node):
    import slicer

    segmentation, _ = write(detect(node), node)
    slicer.mrmlScene.RemoveNode(segmentation)
    again, segment_id = write(detect(node), node)
    assert len(points_of(again, segment_id)) > 0


def test_a_deleted_segment_is_made_anew(node):
    segmentation, segment_id = write(detect(node), node)
    segmentation.GetSegmentation().RemoveSegment(segment_id)
    again, segment_id = write(detect(node), node)
    assert again is segmentation
    assert len(points_of(again, segment_id)) > 0


def test_a_loaded_segmentation_is_continued(node, views, tmp_path):
    import slicer

    write(detect(node), node)
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")
    loaded = slicer.util.getNode("Head")
    look_at_slice(views, SPOT_SLICE + 1)
    segmentation, segment_id = write(detect(loaded), loaded)
    assert segmentation.GetSegmentation().GetNumberOfSegments() == 1
    np.testing.assert_allclose(
        points_of(segmentation, segment_id), points_above(THRESHOLD, [SPOT_SLICE, SPOT_SLICE + 1]), atol=1e-3
    )


def test_a_loaded_oblique_segment_gets_its_own_grid_back(node, views, tmp_path):
    """Slicer's file format has one grid for all segments of a node, so the mask was resampled."""
    import slicer

    write(detect(node), node)
    views["Red"].tilt(20)
    result = detect(node)
    write(result, node)
    views["Red"].reset()
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")
    segmentation, segment_id = write(result, slicer.util.getNode("Head"))
    assert segmentation.GetSegmentation().GetNumberOfSegments() == 2
    np.testing.assert_allclose(points_of(segmentation, segment_id), in_order(mask_points(result)), atol=1e-4)


def test_the_reference_geometry_is_that_of_the_volume_in_the_world(node, views):
    import slicer

    to_world = rotation("S", 30)
    node.SetAndObserveTransformNodeID(add_linear_transform(to_world).GetID())
    views["Red"].node.RotateToVolumePlane(node)
    look_at_slice(views, SPOT_SLICE, to_world)
    segmentation, _ = write(detect(node), node)
    name = slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()
    numbers = [float(x) for x in segmentation.GetSegmentation().GetConversionParameter(name).split(";") if x]
    np.testing.assert_allclose(np.reshape(numbers[:16], (4, 4)), to_world @ GRID, atol=1e-6)


def test_the_segment_carries_its_coded_meaning_name_and_colour(node):
    import slicer
    import vtk

    segmentation, segment_id = write(detect(node), node)
    segment = segmentation.GetSegmentation().GetSegment(segment_id)
    entry = vtk.reference("")
    segment.GetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), entry)
    assert str(entry) == TERMINOLOGY_ENTRY
    assert segment.GetName() == TERMS.name
    np.testing.assert_allclose(segment.GetColor(), np.array(TERMS.colour) / 255)


def test_slicer_knows_the_coded_term(node):
    import slicer

    write(detect(node), node)
    names = slicer.modules.terminologies.logic().GetLoadedTerminologyNames
    import vtk

    loaded = vtk.vtkStringArray()
    names(loaded)
    context = TERMINOLOGY_ENTRY.split("~")[0]
    assert context in [loaded.GetValue(i) for i in range(loaded.GetNumberOfValues())]


def test_every_slice_of_the_segment_keeps_its_own_score_and_threshold(node, views):
    import vtk

    write(detect(node), node)
    look_at_slice(views, SPOT_SLICE + 1)
    segmentation, segment_id = write(detect(node, threshold=0.6), node)
    text = vtk.reference("")
    segmentation.GetSegmentation().GetSegment(segment_id).GetTag("MedAnomalyCLIP.Results", text)
    thresholds = {key: entry["threshold"] for key, entry in json.loads(str(text)).items()}
    assert thresholds == {f"K {SPOT_SLICE}": 0.75, f"K {SPOT_SLICE + 1}": 0.6}


def test_the_segmentation_lies_beside_its_volume_in_the_subject_hierarchy(node):
    """Slicer's plugins give every node an item; here the test gives them theirs."""
    import slicer

    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.CreateItem(study, node)

    def plugin(_scene, _event):
        for segmentation in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
            if not hierarchy.GetItemByDataNode(segmentation):
                hierarchy.CreateItem(hierarchy.GetSceneItemID(), segmentation)

    tag = slicer.mrmlScene.AddObserver(slicer.mrmlScene.NodeAddedEvent, plugin)
    segmentation, _ = write(detect(node), node)
    slicer.mrmlScene.RemoveObserver(tag)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(segmentation)) == study


def test_the_outline_is_drawn_around_the_spot(node, views):
    view = views["Red"]
    view.open_window()
    before = view.picture()
    segmentation, segment_id = write(detect(node), node)
    changed = np.argwhere((view.picture() != before).any(axis=-1))
    pixels = np.array([view.pixel_at(p) for p in points_of(segmentation, segment_id)])
    assert len(changed) > 0
    assert np.abs(changed.min(axis=0) - pixels.min(axis=0)).max() <= 8
    assert np.abs(changed.max(axis=0) - pixels.max(axis=0)).max() <= 8
    assert np.abs(changed.mean(axis=0) - pixels.mean(axis=0)).max() <= 3


def test_the_outline_follows_the_threshold(node, views):
    view = views["Red"]
    view.open_window()
    empty = view.picture()
    write(detect(node), node)
    outlined = view.picture()
    write(detect(node, threshold=0.5), node)
    wider = view.picture()
    write(detect(node, threshold=1.0), node)
    cleared = view.picture()
    changed = [(picture != empty).any(axis=-1).sum() for picture in (outlined, wider, cleared)]
    assert changed[1] > 1.5 * changed[0] > changed[2] == 0
