"""A plane between the voxels shows what lies in it, at its own place, and knows where the image ends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from MedAnomalyCLIPLib.errors import GeometryRefused, InvalidRequest
from MedAnomalyCLIPLib.geometry import cut_plane, cut_slice, place_in_volume
from MedAnomalyCLIPLib.volume import Volume
from unit.grids import (
    bounded,
    directions,
    empty,
    grids,
    in_voxel_centres,
    numbered,
    pixel_positions,
    planes_of_grids,
    positions,
    rotation,
    rotations,
    view_through,
    voxel_positions,
)


class TestObliquePlanes:
    @bounded
    @given(planes_of_grids())
    def test_every_pixel_shows_the_value_of_its_own_place(self, case):
        size, matrix, view = case
        slope = np.array([1.0, -2.0, 0.5])
        ramp = voxel_positions(size, matrix) @ slope
        volume = Volume(ramp.astype(np.float32), matrix)
        plane = cut_plane(volume, view)
        ras = pixel_positions(plane)
        sure = in_voxel_centres(volume, ras) & plane.valid
        np.testing.assert_allclose(plane.pixels[sure], (ras @ slope)[sure], atol=1e-3 * np.ptp(ramp))

    @bounded
    @given(rotations(), directions, positions, st.tuples(*[st.floats(-3, 3)] * 3))
    def test_a_marker_in_the_plane_comes_back_at_its_own_place(self, axes, direction, origin, away):
        size, spacing = (25, 23, 21), np.array([0.9, 1.1, 1.3])
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = direction * spacing, origin
        marker = (matrix @ [*((np.array(size) - 1) / 2), 1])[:3] + away
        distance = np.linalg.norm(voxel_positions(size, matrix) - marker, axis=-1)
        plane = cut_plane(Volume(np.exp(-((distance / 2.5) ** 2) / 2), matrix), view_through(marker, axes))
        bright = np.where(plane.pixels > 0.4, plane.pixels, 0)
        row, column = (np.average(place, weights=bright) for place in np.indices(plane.shape))
        miss = plane.to_ras(column, row) - marker
        offset = miss - miss @ axes[:, 2] * axes[:, 2]
        assert np.linalg.norm(offset) <= min(plane.spacing) / 2

    @settings(bounded, max_examples=25)
    @given(planes_of_grids(), st.booleans())
    def test_a_slow_trilinear_loop_gives_the_same_pixels_and_validity(self, case, colour):
        size, matrix, view = case
        voxels = np.random.default_rng(0).integers(-1000, 1000, size[::-1]).astype(np.int16)
        if colour:
            voxels = np.stack([voxels, voxels[::-1], -voxels], axis=-1)
        volume = Volume(voxels, matrix)
        plane = cut_plane(volume, view)
        assume(plane.aligned is None)
        for row, column in np.ndindex(plane.shape):
            expected = naive_trilinear(volume, plane.to_ras(column, row))
            assert plane.valid[row, column] == (expected is not None)
            if expected is not None:
                np.testing.assert_allclose(plane.pixels[row, column], expected, atol=0.01)

    @bounded
    @given(planes_of_grids(), st.tuples(*[st.floats(-1.5, 1.5)] * 2))
    def test_no_part_of_the_cut_is_lost(self, case, step):
        size, matrix, view = case
        volume = Volume(empty(size), matrix)
        plane = cut_plane(volume, view)
        extent = np.linalg.norm(matrix[:3, :3] @ size)
        point = view[:3, 3] + view[:3, :2] @ (np.array(step) * extent / 3)
        assume(plane.aligned is None and naive_trilinear(volume, point) is not None)
        column, row = plane.to_pixel(point)
        assert -0.5 <= row <= plane.shape[0] - 0.5
        assert -0.5 <= column <= plane.shape[1] - 0.5

    @bounded
    @given(planes_of_grids())
    def test_columns_follow_the_view_and_rows_go_down_it(self, case):
        size, matrix, view = case
        plane = cut_plane(Volume(empty(size), matrix), view)
        assume(plane.aligned is None)
        column, row = plane.ijk_to_ras[:3, :2].T
        np.testing.assert_allclose(column / np.linalg.norm(column), view[:3, 0], atol=1e-9)
        np.testing.assert_allclose(row / np.linalg.norm(row), -view[:3, 1], atol=1e-9)

    @bounded
    @given(rotations(), st.sampled_from([0.4, 1.0, 2.5]))
    def test_an_isotropic_volume_is_sampled_at_its_own_spacing(self, axes, spacing):
        volume = Volume(empty((8, 8, 8)), np.diag([spacing] * 3 + [1]))
        plane = cut_plane(volume, view_through(np.full(3, 3.5 * spacing), axes))
        assert plane.spacing == pytest.approx((spacing, spacing))

    def test_pixels_keep_the_spacing_of_the_voxel_axes_they_follow(self):
        volume = Volume(empty((20, 20, 20)), np.diag([0.5, 0.8, 5.0, 1.0]))
        axes = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T  # a coronal view
        plane = cut_plane(volume, view_through(np.array([5.0, 8.0, 50.0]), axes @ rotation(1, 1)))
        assert plane.spacing == pytest.approx((5.0, 0.5), rel=0.01)

    def test_the_grid_stays_on_the_voxels_it_does_not_turn_away_from(self):
        volume = Volume(empty((8, 9, 7)), np.diag([2.0, 1.0, 1.0, 1.0]))
        plane = cut_plane(volume, view_through(np.array([7.0, 4.0, 3.0]), rotation(8, 0)))
        np.testing.assert_allclose(pixel_positions(plane)[0, :, 0], 2.0 * np.arange(8), atol=1e-9)

    def test_the_third_column_is_the_distance_of_slices_along_the_normal(self):
        volume = Volume(empty((20, 20, 20)), np.diag([1.0, 1.0, 4.0, 1.0]))
        plane = cut_plane(volume, view_through(np.array([10.0, 10.0, 40.0]), rotation(8, 0)))
        assert np.linalg.norm(plane.ijk_to_ras[:3, 2]) == pytest.approx(4 / np.cos(np.radians(8)))
        assert np.linalg.det(plane.ijk_to_ras[:3, :3]) > 0

    def test_pixels_made_of_a_voxel_that_is_no_number_are_invalid_and_filled(self):
        voxels = np.full((9, 9, 9), 5, np.float32)
        voxels[4, 4, 4] = np.nan
        plane = cut_plane(Volume(voxels, np.eye(4)), view_through(np.full(3, 4.2), rotation(10, 0)))
        near = np.linalg.norm(pixel_positions(plane) - 4, axis=-1)
        assert not plane.valid[near < 0.7].any()
        assert plane.valid[(near > 2) & (np.abs(pixel_positions(plane) - 4).max(axis=-1) < 3.9)].all()
        assert np.all(plane.pixels == 5)

    def test_pixels_outside_the_volume_are_filled_with_its_darkest_value_there(self):
        voxels = np.full((9, 9, 9), -1000, np.int16)
        axes = rotation(40, 0) @ rotation(40, 1)
        plane = cut_plane(Volume(voxels, np.eye(4)), view_through(np.full(3, 4.0), axes))
        assert not plane.valid.all()
        assert np.all(plane.pixels == -1000)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            (np.int16, -32768),
            (np.uint16, 65535),
            (np.int32, 2**31 - 1),
            (np.float16, 60000.0),
            (np.float64, 1e300),
            (np.bool_, True),
            (">i2", 300),
        ],
    )
    def test_a_resampled_plane_holds_every_voxel_type_exactly(self, dtype, value):
        volume = Volume(np.full((6, 6, 6), value, dtype), np.eye(4))
        plane = cut_plane(volume, view_through(np.full(3, 2.5), rotation(20, 0)))
        np.testing.assert_allclose(plane.pixels, float(value), rtol=1e-12)

    def test_the_description_names_angle_and_spacing(self):
        volume = Volume(empty((20, 20, 20)), np.diag([0.8, 0.8, 0.8, 1.0]))
        plane = cut_plane(volume, view_through(np.full(3, 7.6), rotation(8, 0)))
        assert plane.description == "Axial oblique 8°, resampled 0.8 mm"

    def test_a_resampled_plane_is_not_put_back_into_voxels(self):
        volume = Volume(empty((9, 9, 9)), np.eye(4))
        plane = cut_plane(volume, view_through(np.full(3, 4.0), rotation(8, 0)))
        with pytest.raises(GeometryRefused, match="oblique 8°"):
            place_in_volume(plane, plane.pixels, np.zeros((9, 9, 9)))


def naive_trilinear(volume: Volume, ras: np.ndarray) -> np.ndarray | None:
    """The value at one point, corner by corner, outermost voxels continued for half a voxel; None outside."""
    index = np.linalg.solve(volume.ijk_to_ras, [*ras, 1.0])[:3]
    last = np.array(volume.size) - 1
    if np.any(index < -0.5 - 1e-6) or np.any(index > last + 0.5 + 1e-6):
        return None
    index = np.clip(index, 0, last)
    value = np.zeros(volume.voxels.shape[3:])
    for corner in itertools.product((0, 1), repeat=3):
        place = np.floor(index).astype(int) + corner
        weight = np.prod(1 - np.abs(index - place))
        i, j, k = np.minimum(place, last)
        value = value + weight * volume.voxels[k, j, i]
    return value


class TestShearedVolumes:
    GANTRY_TILT = np.array([[1.0, 0, 0, 0], [0, 1, 0.8, 0], [0, 0, 3, 0], [0, 0, 0, 1]])

    def test_axial_slices_of_a_tilted_gantry_are_voxels_untouched(self):
        volume = Volume(numbered((6, 7, 8)), self.GANTRY_TILT)
        plane = cut_plane(volume, view_through(np.array([2.0, 2, 9]), np.eye(3)))
        assert (plane.aligned.axis, plane.aligned.index) == (2, 3)
        assert np.linalg.norm(plane.ijk_to_ras[:3, 2]) == pytest.approx(3.0)

    def test_slices_whose_voxel_axes_are_not_perpendicular_are_resampled(self):
        volume = Volume(numbered((6, 7, 8)), self.GANTRY_TILT)
        plane = cut_slice(volume, 0, 2)
        assert plane.aligned is None
        assert plane.description.startswith("Sagittal sheared, resampled")
        np.testing.assert_allclose(pixel_positions(plane)[..., 0], 2.0, atol=1e-9)

    def test_a_view_parallel_to_such_slices_is_resampled_too(self):
        volume = Volume(numbered((6, 7, 8)), self.GANTRY_TILT)
        sagittal = np.array([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]).T
        plane = cut_plane(volume, view_through(np.array([2.0, 5, 9]), sagittal))
        assert plane.aligned is None
        assert np.ptp(np.linalg.norm(np.diff(pixel_positions(plane), axis=0), axis=-1)) < 1e-9

    @bounded
    @given(rotations(), positions, st.sampled_from([-0.5, 7.5]))
    def test_a_plane_on_the_outer_face_is_in_the_volume(self, axes, origin, index):
        """Rounding puts the face's corners on either side of the plane."""
        matrix = np.eye(4)
        matrix[:3, :3] = axes @ np.array([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])
        matrix[:3, 3] = origin
        face = view_through((matrix @ [2.0, 3.0, index, 1])[:3], axes, slide=(100.0, -70.0))
        assert cut_plane(Volume(empty((6, 7, 8)), matrix), face).valid.any()

    @bounded
    @given(grids(sheared=True), st.integers(0, 2))
    def test_any_slice_shows_every_pixel_at_its_own_place(self, grid, axis):
        size, matrix = grid
        slope = np.array([1.0, -2.0, 0.5])
        ramp = voxel_positions(size, matrix) @ slope
        volume = Volume(ramp, matrix)
        plane = cut_slice(volume, axis, 1)
        ras = pixel_positions(plane)
        sure = in_voxel_centres(volume, ras) & plane.valid
        np.testing.assert_allclose(plane.pixels[sure], (ras @ slope)[sure], atol=1e-3 * np.ptp(ramp))


def wavy(points: np.ndarray) -> np.ndarray:
    """A smooth non-linear transform, world to volume: waves of 4 mm, then a rotation and a large shift."""
    waves = 4 * np.sin(np.roll(points, 1, axis=1) / 15)
    return (points + waves) @ rotation(25, 0).T + (150.0, -60.0, 20.0)


class TestWarpedVolumes:
    @bounded
    @given(rotations(), directions, st.tuples(*[st.floats(-10, 10)] * 3))
    def test_a_marker_comes_back_at_its_own_place_in_the_patient(self, axes, direction, marker):
        """The volume lies around where the warp takes the marker; the blob is round in the patient."""
        size, spacing = (25, 23, 21), 1.3
        marker = np.array(marker)
        matrix = np.eye(4)
        matrix[:3, :3] = direction * spacing
        matrix[:3, 3] = wavy(marker[None])[0] - matrix[:3, :3] @ ((np.array(size) - 1) / 2)
        patient = unwarped(voxel_positions(size, matrix).reshape(-1, 3), marker)
        blob = np.exp(-(np.linalg.norm(patient - marker, axis=1) ** 2) / 2 / 2.5**2).reshape(size[::-1])
        plane = cut_plane(Volume(blob, matrix, warp=wavy), view_through(marker, axes))
        bright = np.where(plane.pixels > 0.4, plane.pixels, 0)
        row, column = (np.average(place, weights=bright) for place in np.indices(plane.shape))
        assert np.linalg.norm(plane.to_ras(column, row) - marker) <= min(plane.spacing) / 2

    @bounded
    @given(rotations(), st.tuples(*[st.floats(-10, 10)] * 3), st.tuples(*[st.floats(-40, 40)] * 2))
    def test_no_part_of_the_cut_is_lost_and_nothing_else_is_valid(self, axes, centre, step):
        volume = self.around(np.array(centre))
        plane = cut_plane(volume, view_through(np.array(centre), axes))
        point = np.array(centre) + axes[:, :2] @ step
        column, row = np.round(plane.to_pixel(point)).astype(int)
        in_grid = 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]
        pixel = plane.to_ras(column, row)
        shown = in_grid and plane.valid[row, column]
        assert shown == (naive_trilinear(volume, wavy(pixel[None])[0]) is not None)

    @bounded
    @given(rotations())
    def test_the_grid_is_no_larger_than_what_it_shows(self, axes):
        plane = cut_plane(self.around(np.zeros(3)), view_through(np.zeros(3), axes))
        assert plane.valid[[0, -1]].any(axis=1).all()
        assert plane.valid[:, [0, -1]].any(axis=0).all()

    @bounded
    @given(st.tuples(*[st.floats(-8, 8)] * 2))
    def test_a_small_patch_where_a_bent_volume_touches_the_plane_is_found(self, touch):
        def bent(points):
            return points + np.sum((points[:, :2] - touch) ** 2, axis=1)[:, None] * (0, 0, 0.06)

        matrix = np.eye(4)
        matrix[:3, 3] = (-19.5, -19.5, 0)
        plane = cut_plane(Volume(empty((40, 40, 1)), matrix, warp=bent), view_through(np.zeros(3), np.eye(3)))
        radius = np.linalg.norm(pixel_positions(plane)[..., :2] - touch, axis=-1)[plane.valid]
        assert 1.5 < radius.max() < 3.0
        assert plane.valid.sum() == pytest.approx(np.pi * 0.5 / 0.06, rel=0.3)

    def test_a_warped_plane_is_never_called_aligned(self):
        volume = Volume(empty((9, 9, 9)), np.eye(4), warp=lambda points: points)
        plane = cut_plane(volume, view_through(np.full(3, 4.0), np.eye(3)))
        assert plane.aligned is None
        assert plane.description == "Axial warped, resampled 1 mm"

    def test_a_plane_beside_a_warped_volume_is_refused(self):
        with pytest.raises(GeometryRefused, match="does not cut"):
            cut_plane(self.around(np.zeros(3)), view_through(np.array([0, 0, 80.0]), np.eye(3)))

    def test_slices_of_a_warped_volume_are_refused_because_they_are_curved(self):
        with pytest.raises(InvalidRequest, match="slice view"):
            cut_slice(self.around(np.zeros(3)), 2, 0)

    @staticmethod
    def around(centre: np.ndarray) -> Volume:
        size = (20, 24, 16)
        matrix = np.diag([1.5, 1.0, 2.0, 1.0])
        matrix[:3, 3] = wavy(centre[None])[0] - matrix[:3, :3] @ ((np.array(size) - 1) / 2)
        return Volume(empty(size), matrix, warp=wavy)


def unwarped(points: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Where `wavy` takes its points from, by fixed-point iteration on the waves, which are a contraction."""
    straight = (points - (150.0, -60.0, 20.0)) @ rotation(25, 0)
    found = np.tile(start, (len(points), 1))
    for _ in range(20):
        found = straight - 4 * np.sin(np.roll(found, 1, axis=1) / 15)
    return found
