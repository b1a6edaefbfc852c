"""The plane cut for a view is the plane that the view displays."""

from __future__ import annotations

import numpy as np
import pytest

from harness.phantom import (
    add_bending_transform,
    add_linear_transform,
    add_volume,
    axial_matrix,
    head,
    rotation,
    translation,
)
from harness.slice_views import SIZE
from MedAnomalyCLIPLib.errors import GeometryRefused, InvalidRequest

TURNED = translation(4, -7, 11) @ rotation("S", 12) @ rotation("R", -8)


@pytest.fixture
def smooth(slicer_scene):
    """A volume without noise, whose values change slowly, so that resampling twice costs little."""
    k, j, i = np.indices((30, 80, 72))
    ramp = 10 * i + 5 * j + 20 * k
    return add_volume(ramp.astype(np.float32), axial_matrix(ramp.shape), "Smooth")


def cut(node, view):
    from MedAnomalyCLIPLib.scene import plane_in_view

    return plane_in_view(node, view.name)


def difference_from_display(view, plane) -> float:
    """Largest difference between the plane's pixels and what the view displays at the same place."""
    import slicer

    displayed = view.displayed_values()
    ras_to_xy = np.linalg.inv(slicer.util.arrayFromVTKMatrix(view.node.GetXYToRAS()))
    rows, columns = np.nonzero(plane.valid)
    points = np.stack([columns, rows, np.zeros_like(rows), np.ones_like(rows)])
    x, y = (ras_to_xy @ plane.ijk_to_ras @ points)[:2]
    shown_rows, shown_columns = SIZE[1] - 1 - y, x
    # Only pixels whose place on the screen is well inside the picture and hit almost exactly.
    near = (
        np.maximum(abs(shown_rows - np.rint(shown_rows)), abs(shown_columns - np.rint(shown_columns))) < 0.1
    )
    near &= (
        (shown_rows > 2) & (shown_rows < SIZE[1] - 3) & (shown_columns > 2) & (shown_columns < SIZE[0] - 3)
    )
    assert near.sum() > 20
    at_view = displayed[np.rint(shown_rows[near]).astype(int), np.rint(shown_columns[near]).astype(int)]
    inside = at_view > 0
    assert inside.sum() > 20
    return float(np.abs(at_view - plane.pixels[rows[near], columns[near]])[inside].max())


# A pixel of the screen is at most 0.1 pixel from the pixel it is compared with: 0.1 x 2 mm x 10 per 2 mm.
CLOSE = 3.0


@pytest.mark.parametrize("name", ["Red", "Yellow", "Green"])
def test_an_aligned_plane_has_the_values_that_are_displayed(views, smooth, name):
    view = views[name]
    view.show(smooth)
    view.logic.SnapSliceOffsetToIJK()
    plane = cut(smooth, view)
    assert plane.aligned is not None
    assert difference_from_display(view, plane) < CLOSE


@pytest.mark.parametrize("name", ["Red", "Yellow", "Green"])
def test_a_tilted_plane_has_the_values_that_are_displayed(views, smooth, name):
    view = views[name]
    view.show(smooth)
    view.tilt(17)
    plane = cut(smooth, view)
    assert plane.aligned is None
    assert difference_from_display(view, plane) < CLOSE


def test_a_plane_through_a_transformed_volume_has_the_values_that_are_displayed(views, smooth):
    smooth.SetAndObserveTransformNodeID(add_linear_transform(TURNED).GetID())
    views["Red"].show(smooth)
    plane = cut(smooth, views["Red"])
    assert plane.aligned is None
    assert difference_from_display(views["Red"], plane) < CLOSE


def test_a_plane_through_a_warped_volume_has_the_values_that_are_displayed(views, smooth):
    smooth.SetAndObserveTransformNodeID(add_bending_transform().GetID())
    views["Red"].show(smooth)
    plane = cut(smooth, views["Red"])
    assert plane.aligned is None
    assert difference_from_display(views["Red"], plane) < CLOSE


def test_a_view_turned_to_the_volume_takes_its_voxels_untouched(views):
    voxels, _ = head()
    node = add_volume(voxels, TURNED @ axial_matrix(voxels.shape))
    views["Red"].show(node)
    views["Red"].node.RotateToVolumePlane(node)
    views["Red"].logic.SnapSliceOffsetToIJK()
    plane = cut(node, views["Red"])
    np.testing.assert_array_equal(plane.pixels, voxels[plane.aligned.index])


def test_the_plane_keeps_its_pixels_when_the_volume_changes(views):
    import slicer

    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    views["Red"].show(node)
    plane = cut(node, views["Red"])
    before = plane.pixels.copy()
    slicer.util.arrayFromVolume(node)[...] = 0
    np.testing.assert_array_equal(plane.pixels, before)


def test_zoom_and_window_size_do_not_change_the_plane(views):
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    views["Red"].show(node)
    views["Red"].tilt(10)
    before = cut(node, views["Red"])
    views["Red"].node.SetFieldOfView(50, 50, 1)
    views["Red"].node.SetDimensions(200, 100, 1)
    after = cut(node, views["Red"])
    np.testing.assert_array_equal(after.pixels, before.pixels)


def test_an_unknown_view_is_refused_with_those_there_are(views):
    voxels, _ = head()
    from MedAnomalyCLIPLib.scene import plane_in_view

    with pytest.raises(InvalidRequest, match="Red, Yellow, Green"):
        plane_in_view(add_volume(voxels, np.eye(4)), "Purple")


def test_a_view_that_misses_the_volume_is_refused(views):
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    views["Red"].show(node)
    views["Red"].node.SetSliceOffset(500)
    with pytest.raises(GeometryRefused):
        cut(node, views["Red"])
