"""The heat map appears over the slice it was computed from, in that view only, and can be taken away."""

from __future__ import annotations

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
)
from harness.slice_views import slice_views
from MedAnomalyCLIPLib.heat import heat_colours


@pytest.fixture
def node(views):
    """The phantom, shown in all views through the middle of its bright spot."""
    voxels, spot = head()
    volume_node = add_volume(voxels, axial_matrix(voxels.shape), "Head")
    for view in views.values():
        view.show(volume_node)
        view.node.JumpSlice(*spot_centre(spot))
    return volume_node


def spot_centre(spot) -> np.ndarray:
    k, j, i = np.argwhere(spot).mean(axis=0)
    return (axial_matrix(spot.shape) @ [i, j, k, 1])[:3]


def detect(node, view_name, **options):
    from MedAnomalyCLIPLib.scene import plane_in_view

    return BrightnessDetector().detect(plane_in_view(node, view_name), **options)


def overlay(node, view_name, *, opacity=1.0, **options):
    """Detect and show; returns the result and the map node."""
    from MedAnomalyCLIPLib.scene import show_map, write_map

    result = detect(node, view_name, **options)
    map_node = write_map(result, node, view_name)
    show_map(map_node, view_name, opacity)
    return result, map_node


def is_coloured(picture) -> np.ndarray:
    """(H, W) bool: pixels that are not grey."""
    return np.ptp(picture.astype(int), axis=-1) > 30


def test_the_map_node_has_the_voxels_and_the_place_of_the_result(node):
    import slicer
    import vtk

    result, map_node = overlay(node, "Red")
    matrix = vtk.vtkMatrix4x4()
    map_node.GetIJKToRASMatrix(matrix)
    np.testing.assert_allclose(slicer.util.arrayFromVTKMatrix(matrix), result.plane.ijk_to_ras, atol=1e-9)
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(map_node)[0], result.map)


def test_the_spot_is_covered_with_the_colour_of_its_value(node, views):
    result, _ = overlay(node, "Red", threshold=0.75)
    row, column = result.peak
    peak_colour = views["Red"].layers()[views["Red"].pixel_at(result.plane.to_ras(column, row))]
    expected = heat_colours()[round(255 * result.map[row, column])]
    assert np.abs(peak_colour.astype(int) - expected).max() < 25


def test_what_is_below_the_threshold_stays_grey(node, views):
    result, _ = overlay(node, "Red", threshold=0.75)
    coloured = is_coloured(views["Red"].layers())
    spot = views["Red"].pixel_at(result.peak_ras)
    assert coloured[spot]
    mirrored = views["Red"].pixel_at(result.peak_ras * [-1, 1, 1])
    assert not coloured[mirrored]


@pytest.mark.parametrize("name", ["Red", "Yellow", "Green"])
def test_only_the_view_that_was_asked_for_is_coloured(node, views, name):
    overlay(node, name)
    coloured = {other: bool(is_coloured(view.layers()).any()) for other, view in views.items()}
    assert coloured == {other: other == name for other in views}


def test_other_views_keep_their_layers(node, views):
    voxels, _ = head(seed=1)
    pet = add_volume(voxels, axial_matrix(voxels.shape), "PET")
    views["Yellow"].composite.SetForegroundVolumeID(pet.GetID())
    views["Yellow"].composite.SetForegroundOpacity(0.3)
    before = views["Yellow"].layers()
    overlay(node, "Red")
    np.testing.assert_array_equal(views["Yellow"].layers(), before)


def test_linked_views_are_not_drawn_along(node, views):
    """Desktop Slicer's view controller answers a changed opacity as if the user had moved its slider."""
    import vtk

    seen = []

    def controller(view):
        def answer(composite, _event):
            if composite.GetForegroundOpacity() != seen[0]:
                seen[0] = composite.GetForegroundOpacity()
                flag = composite.ForegroundOpacityFlag | composite.ForegroundVolumeFlag
                view.logic.StartSliceCompositeNodeInteraction(flag)
                view.logic.EndSliceCompositeNodeInteraction()

        return answer

    for view in views.values():
        view.composite.SetLinkedControl(True)
        view.composite.SetHotLinkedControl(True)
    red = views["Red"]
    seen.append(red.composite.GetForegroundOpacity())
    tag = red.composite.AddObserver(vtk.vtkCommand.ModifiedEvent, controller(red))
    overlay(node, "Red", opacity=0.5)
    red.composite.RemoveObserver(tag)
    assert seen == [0.5]
    assert views["Yellow"].composite.GetForegroundVolumeID() is None
    assert views["Yellow"].composite.GetForegroundOpacity() == 0
    assert red.composite.GetLinkedControl()


def test_the_overlay_vanishes_on_the_next_slice(node, views):
    overlay(node, "Red")
    red = views["Red"]
    red.node.SetSliceOffset(red.node.GetSliceOffset() + 5)
    assert not is_coloured(red.layers()).any()


def test_the_threshold_acts_on_display_without_touching_the_map(node, views):
    import slicer

    from MedAnomalyCLIPLib.scene import set_map_threshold

    result, map_node = overlay(node, "Red", threshold=0.75)
    spot_only = is_coloured(views["Red"].layers()).sum()
    set_map_threshold(map_node, 0.5)
    with_white_matter = is_coloured(views["Red"].layers()).sum()
    set_map_threshold(map_node, 1.0)
    nothing = is_coloured(views["Red"].layers()).sum()
    assert with_white_matter > 3 * spot_only > 3 * nothing == 0
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(map_node)[0], result.map)


def test_opacity_blends_the_overlay_with_the_image(node, views):
    from MedAnomalyCLIPLib.scene import set_overlay_opacity

    result, _ = overlay(node, "Red", opacity=1.0)
    at = views["Red"].pixel_at(result.peak_ras)
    opaque = views["Red"].layers()[at].astype(int)
    set_overlay_opacity("Red", 0.0)
    clear = views["Red"].layers()[at].astype(int)
    set_overlay_opacity("Red", 0.5)
    half = views["Red"].layers()[at].astype(int)
    assert np.abs(half - (opaque + clear) / 2).max() <= 2


def test_opacity_leaves_a_foreground_that_is_not_ours_alone(node, views):
    from MedAnomalyCLIPLib.scene import set_overlay_opacity

    views["Red"].composite.SetForegroundVolumeID(node.GetID())
    set_overlay_opacity("Red", 0.9)
    assert views["Red"].composite.GetForegroundOpacity() == 0


def test_restoring_puts_back_volume_and_opacity(node, views):
    from MedAnomalyCLIPLib.scene import restore_foreground

    voxels, _ = head(seed=1)
    pet = add_volume(voxels, axial_matrix(voxels.shape), "PET")
    views["Red"].composite.SetForegroundVolumeID(pet.GetID())
    views["Red"].composite.SetForegroundOpacity(0.3)
    before = views["Red"].layers()
    overlay(node, "Red")
    overlay(node, "Red")
    assert restore_foreground("Red")
    assert views["Red"].composite.GetForegroundVolumeID() == pet.GetID()
    np.testing.assert_array_equal(views["Red"].layers(), before)


def test_restoring_an_empty_foreground_empties_it(node, views):
    from MedAnomalyCLIPLib.scene import restore_foreground

    overlay(node, "Red")
    assert restore_foreground("Red")
    assert views["Red"].composite.GetForegroundVolumeID() is None


def test_restoring_does_nothing_once_the_user_has_chosen_another_foreground(node, views):
    from MedAnomalyCLIPLib.scene import restore_foreground

    overlay(node, "Red")
    views["Red"].composite.SetForegroundVolumeID(node.GetID())
    assert not restore_foreground("Red")
    assert views["Red"].composite.GetForegroundVolumeID() == node.GetID()


def test_restoring_survives_the_deletion_of_the_previous_foreground(node, views):
    import slicer

    from MedAnomalyCLIPLib.scene import restore_foreground

    voxels, _ = head(seed=1)
    pet = add_volume(voxels, axial_matrix(voxels.shape), "PET")
    views["Red"].composite.SetForegroundVolumeID(pet.GetID())
    overlay(node, "Red")
    slicer.mrmlScene.RemoveNode(pet)
    assert restore_foreground("Red")
    assert views["Red"].composite.GetForegroundVolumeID() is None


def test_a_map_of_another_volume_is_not_remembered_as_the_users_foreground(node, views):
    from MedAnomalyCLIPLib.scene import restore_foreground

    voxels, _ = head(seed=1)
    other = add_volume(voxels, axial_matrix(voxels.shape), "Other")
    overlay(node, "Red")
    overlay(other, "Red")
    assert restore_foreground("Red")
    assert views["Red"].composite.GetForegroundVolumeID() is None


def test_detecting_again_updates_the_same_node(node, views):
    _, first = overlay(node, "Red")
    views["Red"].node.SetSliceOffset(0)
    result, second = overlay(node, "Red")
    assert second is first
    assert second.GetAttribute("MedAnomalyCLIP.PlaneDescription") == result.plane.description


def test_each_view_has_a_map_of_its_own(node):
    _, red = overlay(node, "Red")
    _, green = overlay(node, "Green")
    assert red is not green


def test_a_deleted_map_is_made_anew(node):
    import slicer

    _, map_node = overlay(node, "Red")
    slicer.mrmlScene.RemoveNode(map_node)
    _, again = overlay(node, "Red")
    assert slicer.mrmlScene.IsNodePresent(again)


def test_a_deleted_display_node_is_made_anew(node, views, vtk_errors):
    import slicer

    _, map_node = overlay(node, "Red")
    slicer.mrmlScene.RemoveNode(map_node.GetDisplayNode())
    overlay(node, "Red")
    assert is_coloured(views["Red"].layers()).any()
    vtk_errors.clear()  # of Slicer's legend, if it was drawn in between


def test_the_overlay_of_a_turned_volume_lies_on_its_spot(node, views):
    node.SetAndObserveTransformNodeID(add_linear_transform(rotation("A", 25)).GetID())
    overlay(node, "Red", threshold=0.8)
    coloured = is_coloured(views["Red"].layers())
    shown_spot = views["Red"].displayed_values() > 800
    assert (coloured & shown_spot).sum() / (coloured | shown_spot).sum() > 0.8


def test_the_overlay_of_a_bent_volume_lies_on_its_spot(node, views):
    node.SetAndObserveTransformNodeID(add_bending_transform(bend_mm=20).GetID())
    overlay(node, "Red", threshold=0.8)
    coloured = is_coloured(views["Red"].layers())
    shown_spot = views["Red"].displayed_values() > 800
    assert (coloured & shown_spot).sum() / (coloured | shown_spot).sum() > 0.8


def test_the_overlay_of_a_tilted_view_lies_on_the_spot(node, views):
    views["Red"].tilt(30)
    overlay(node, "Red", threshold=0.8)
    coloured = is_coloured(views["Red"].layers())
    shown_spot = views["Red"].displayed_values() > 800
    assert (coloured & shown_spot).sum() / (coloured | shown_spot).sum() > 0.8


def test_a_closed_scene_does_not_leave_an_empty_colour_table(node, views):
    import slicer

    overlay(node, "Red")
    slicer.mrmlScene.Clear(False)
    voxels, _ = head()
    fresh = add_volume(voxels, axial_matrix(voxels.shape))
    views["Red"].reset()
    views["Red"].show(fresh)
    _, map_node = overlay(fresh, "Red", threshold=0.5)
    assert map_node.GetDisplayNode().GetColorNode().GetNumberOfColors() == 256
    assert is_coloured(views["Red"].layers()).any()


def test_the_node_says_what_made_it(node):
    result, map_node = overlay(node, "Red")
    said = {
        key: map_node.GetAttribute(f"MedAnomalyCLIP.{key}")
        for key in ("Bundle", "BundleVersion", "BundleSHA256", "Threshold", "Device", "Precision", "View")
    }
    assert said == {
        "Bundle": "brightness",
        "BundleVersion": "1.2",
        "BundleSHA256": "0" * 64,
        "Threshold": "0.75",
        "Device": "cpu",
        "Precision": "float32",
        "View": "Red",
    }
    assert float(map_node.GetAttribute("MedAnomalyCLIP.Score")) == pytest.approx(result.score, rel=1e-5)
    assert map_node.GetAttribute("MedAnomalyCLIP.Notice").startswith("Research use only")


def test_the_node_refers_to_its_source(node):
    _, map_node = overlay(node, "Red")
    assert map_node.GetNodeReference("MedAnomalyCLIP.Source") is node


def test_the_legend_is_drawn_in_its_own_view_only(node, views):
    for view in views.values():
        view.open_window()
    before = {name: view.picture() for name, view in views.items()}
    overlay(node, "Red", threshold=1.0)
    changed = {name: bool((view.picture() != before[name]).any()) for name, view in views.items()}
    assert changed == {"Red": True, "Yellow": False, "Green": False}


def test_overlay_and_memory_of_the_foreground_survive_saving_and_loading(node, views, tmp_path):
    import slicer

    from MedAnomalyCLIPLib.scene import restore_foreground, shown_map

    voxels, _ = head(seed=1)
    pet = add_volume(voxels, axial_matrix(voxels.shape), "PET")
    views["Red"].composite.SetForegroundVolumeID(pet.GetID())
    views["Red"].composite.SetForegroundOpacity(0.3)
    overlay(node, "Red")
    picture = views["Red"].layers()
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    load_bundle(tmp_path / "case.mrb")
    assert shown_map("Red").GetNodeReference("MedAnomalyCLIP.Source").GetName() == "Head"
    np.testing.assert_array_equal(slice_views()["Red"].layers(), picture)
    assert restore_foreground("Red")
    composite = slice_views()["Red"].composite
    assert slicer.mrmlScene.GetNodeByID(composite.GetForegroundVolumeID()).GetName() == "PET"
    assert composite.GetForegroundOpacity() == pytest.approx(0.3)
