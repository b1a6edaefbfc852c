"""A slice shows its voxels untouched and the right way up, and a map goes back to where it came from."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from MedAnomalyCLIPLib import resampling
from MedAnomalyCLIPLib.background import EMPTY, Background
from MedAnomalyCLIPLib.errors import GeometryRefused, InvalidRequest
from MedAnomalyCLIPLib.geometry import (
    SlicePlane,
    acquisition_axis,
    cut_plane,
    cut_slice,
    cut_slices,
    place_in_volume,
    resolve_axis,
    slice_count,
    to_slab,
    view_name,
)
from MedAnomalyCLIPLib.volume import Volume
from unit.grids import (
    DIAGONAL,
    SIGNED_PERMUTATIONS,
    bounded,
    empty,
    grids,
    numbered,
    planes_of_grids,
    rotation,
    view_through,
    voxel_positions,
    voxels_of_grids,
)


class TestAlignedSlices:
    @bounded
    @given(voxels_of_grids(), st.integers(0, 2))
    def test_a_marked_voxel_is_the_brightest_pixel_at_its_own_position(self, grid, axis):
        size, matrix, voxel = grid
        voxels = empty(size)
        voxels[voxel[::-1]] = 1000
        plane = cut_slice(Volume(voxels, matrix), axis, voxel[axis])
        row, column = np.unravel_index(np.argmax(plane.pixels), plane.shape)
        np.testing.assert_allclose(plane.to_ras(column, row), (matrix @ [*voxel, 1])[:3], atol=1e-6)

    @bounded
    @given(voxels_of_grids(), st.integers(0, 2), st.floats(-180, 180), st.floats(-0.45, 0.45), st.booleans())
    def test_a_view_parallel_to_the_voxels_takes_the_nearest_slice_untouched(
        self, grid, axis, turn, offset, left_handed
    ):
        size, matrix, voxel = grid
        volume = Volume(numbered(size), matrix)
        axes = np.roll(matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0), 2 - axis, axis=1)
        axes = axes @ rotation(turn, 2) @ np.diag([1, 1, -1 if left_handed else 1])
        point = (matrix @ [*voxel, 1])[:3] + offset * matrix[:3, axis]
        plane = cut_plane(volume, view_through(point, axes, slide=(2000.0, -3000.0)))
        assert (plane.aligned.axis, plane.aligned.index) == (axis, voxel[axis])
        np.testing.assert_array_equal(
            to_slab(plane.aligned, plane.pixels), volume.voxels.take(voxel[axis], axis=2 - axis)
        )

    @bounded
    @given(voxels_of_grids(), st.integers(0, 2), st.floats(-180, 180))
    def test_a_parallel_view_is_turned_by_at_most_45_degrees_and_never_mirrored(self, grid, axis, turn):
        size, matrix, voxel = grid
        axes = np.roll(matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0), 2 - axis, axis=1)
        view = view_through((matrix @ [*voxel, 1])[:3], axes @ rotation(turn, 2))
        plane = cut_plane(Volume(empty(size), matrix), view)
        column, row = plane.ijk_to_ras[:3, :2].T
        assert view[:3, 0] @ column / np.linalg.norm(column) > 0.7
        assert -view[:3, 1] @ row / np.linalg.norm(row) > 0.7

    @settings(bounded, max_examples=20)
    @given(grids(), st.integers(0, 2))
    @example(DIAGONAL, 0)
    @example(DIAGONAL, 2)
    def test_the_same_anatomy_in_any_of_48_voxel_orders_gives_the_same_slice(self, grid, axis):
        size, matrix = grid
        reference = cut_slice(Volume(numbered(size), matrix), axis, 1)
        for reorder in SIGNED_PERMUTATIONS:
            volume, new_axis, index = reordered(Volume(numbered(size), matrix), reorder, axis, 1)
            plane = cut_slice(volume, new_axis, index)
            np.testing.assert_array_equal(plane.pixels, reference.pixels)
            np.testing.assert_allclose(plane.ijk_to_ras, reference.ijk_to_ras, atol=1e-9)

    @pytest.mark.parametrize(
        ("axis", "left", "right", "top", "bottom"),
        [(0, "A", "P", "S", "I"), (1, "R", "L", "S", "I"), (2, "R", "L", "A", "P")],
    )
    def test_a_slice_reads_as_radiologists_read_it(self, axis, left, right, top, bottom):
        size, matrix = (5, 6, 7), np.diag([1.0, 1.0, 1.0, 1.0])  # stored to the right, front and top
        position = dict(zip("RAS", np.moveaxis(voxel_positions(size, matrix), -1, 0), strict=True))
        position |= {opposite: -position[letter] for opposite, letter in zip("LPI", "RAS", strict=True)}
        towards = {
            letter: cut_slice(Volume(values, matrix), axis, 0).pixels for letter, values in position.items()
        }
        assert np.all(np.diff(towards[right], axis=1) > 0), f"columns do not go to {right}"
        assert np.all(np.diff(towards[left], axis=1) < 0)
        assert np.all(np.diff(towards[bottom], axis=0) > 0), f"rows do not go to {bottom}"
        assert np.all(np.diff(towards[top], axis=0) < 0)

    def test_a_picture_stays_as_it_is_stored(self):
        voxels = numbered((4, 3, 1))
        plane = cut_slice(Volume(voxels, np.diag([-1.0, -1.0, 1.0, 1.0]), spacing_known=False), 2, 0)
        np.testing.assert_array_equal(plane.pixels, voxels[0])
        assert plane.description == "Image 1 of 1, aligned"

    @bounded
    @given(grids(), st.integers(0, 2), st.booleans())
    def test_slices_put_back_one_by_one_make_the_volume_again(self, grid, axis, colour):
        size, matrix = grid
        voxels = numbered(size)
        if colour:
            voxels = np.stack([voxels, voxels + 1, -voxels], axis=-1)
        volume, out = Volume(voxels, matrix), np.full_like(voxels, -1)
        for index in range(slice_count(volume, axis)):
            plane = cut_slice(volume, axis, index)
            place_in_volume(plane, plane.pixels, out)
        np.testing.assert_array_equal(out, voxels)

    def test_a_plane_does_not_change_when_its_volume_does(self):
        voxels = empty((3, 3, 3))
        plane = cut_slice(Volume(voxels, np.eye(4)), 2, 1)
        voxels[:] = 7
        assert not plane.pixels.any()

    @bounded
    @given(grids(), st.integers(0, 2))
    def test_the_third_column_leads_to_the_next_slice(self, grid, axis):
        size, matrix = grid
        volume = Volume(empty(size), matrix)
        step = cut_slice(volume, axis, 2).ijk_to_ras[:3, 3] - cut_slice(volume, axis, 1).ijk_to_ras[:3, 3]
        third = cut_slice(volume, axis, 1).ijk_to_ras[:3, 2]
        assert min(np.linalg.norm(step - third), np.linalg.norm(step + third)) < 1e-6

    def test_a_nearly_parallel_view_shows_the_slice_at_the_volume_not_at_its_far_origin(self):
        volume = Volume(numbered((20, 20, 20)), np.eye(4))
        tilted = rotation(0.09, 0)
        plane = cut_plane(volume, view_through(np.array([9.5, 9.5, 7.0]), tilted, slide=(0.0, 5000.0)))
        assert plane.aligned.index == 7

    @pytest.mark.parametrize(("degrees", "aligned"), [(0.09, True), (0.11, False)])
    def test_a_view_counts_as_aligned_up_to_a_tenth_of_a_degree(self, degrees, aligned):
        volume = Volume(numbered((20, 20, 20)), np.eye(4))
        plane = cut_plane(volume, view_through(np.array([9.5, 9.5, 7.0]), rotation(degrees, 0)))
        assert (plane.aligned is not None) == aligned

    def test_pixels_that_are_not_numbers_are_invalid(self):
        voxels = np.ones((3, 4, 5), np.float32)
        voxels[1, 2, 3], voxels[1, 0, 0] = np.nan, np.inf
        plane = cut_slice(Volume(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), 2, 1)
        assert {tuple(place) for place in np.argwhere(~plane.valid)} == {(2, 3), (0, 0)}

    def test_people_count_slices_from_one(self):
        plane = cut_slice(Volume(empty((4, 4, 40)), np.diag([-1.0, -1.0, 2.0, 1.0])), 2, 16)
        assert plane.description == "Axial 17 of 40, aligned"


def reordered(volume: Volume, reorder: np.ndarray, axis: int, index: int) -> tuple[Volume, int, int]:
    """The same anatomy with its voxel axes permuted and flipped, and where one of its slices has gone."""
    order, signs = np.argmax(np.abs(reorder), axis=1), reorder.sum(axis=1)
    voxels = volume.voxels.transpose([2 - order[2 - a] for a in range(3)])
    matrix = volume.ijk_to_ras.copy()
    matrix[:3, :3] = volume.ijk_to_ras[:3, order]
    new_axis = int(np.flatnonzero(order == axis)[0])
    for a in range(3):
        if signs[a] < 0:
            count = voxels.shape[2 - a]
            voxels = np.flip(voxels, 2 - a)
            matrix[:3, 3] += (count - 1) * matrix[:3, a]
            matrix[:3, a] *= -1
            index = count - 1 - index if a == new_axis else index
    return Volume(voxels, matrix), new_axis, index


class TestRefusals:
    @bounded
    @given(planes_of_grids(), st.sampled_from([-1, 1]))
    def test_a_plane_beside_the_volume_is_refused(self, case, side):
        size, matrix, view = case
        view = view.copy()
        view[:3, 3] += side * 1.1 * np.abs(matrix[:3, :3]).sum() * max(size) * view[:3, 2]
        with pytest.raises(GeometryRefused, match="does not cut the image"):
            cut_plane(Volume(empty(size), matrix), view)

    @pytest.mark.parametrize("height", [-0.51, 8.51])
    def test_an_aligned_plane_more_than_half_a_voxel_beyond_the_last_slice_is_refused(self, height):
        with pytest.raises(GeometryRefused):
            cut_plane(Volume(empty((9, 9, 9)), np.eye(4)), view_through(np.array([4, 4, height]), np.eye(3)))

    @pytest.mark.parametrize(("height", "index"), [(-0.5, 0), (8.5, 8)])
    def test_the_outer_faces_belong_to_the_outermost_slices(self, height, index):
        view = view_through(np.array([4, 4, height]), np.eye(3))
        assert cut_plane(Volume(empty((9, 9, 9)), np.eye(4)), view).aligned.index == index

    @pytest.mark.parametrize("index", [-1, 9, 2.0, True])
    def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(self, index):
        with pytest.raises(InvalidRequest, match="choose 0 to 8"):
            cut_slice(Volume(empty((9, 9, 9)), np.eye(4)), 2, index)

    @pytest.mark.parametrize("axis", [-1, 3, True])
    def test_an_axis_that_does_not_exist_is_refused(self, axis):
        with pytest.raises(InvalidRequest, match="0, 1 or 2"):
            cut_slice(Volume(empty((9, 9, 9)), np.eye(4)), axis, 0)

    @pytest.mark.parametrize(
        ("matrix", "reason"),
        [
            (np.eye(3), "4x4"),
            (np.full((4, 4), np.nan), "finite"),
            (np.diag([0.0, 1, 1, 1]), "singular"),
            (np.array([[1.0, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "perpendicular"),
        ],
    )
    def test_a_matrix_that_is_no_view_is_refused(self, matrix, reason):
        with pytest.raises(GeometryRefused, match=reason):
            cut_plane(Volume(empty((9, 9, 9)), np.eye(4)), matrix)

    def test_a_grid_too_large_for_the_memory_is_refused_before_it_is_made(self, monkeypatch):
        monkeypatch.setattr(resampling, "MAX_PIXELS", 50)
        with pytest.raises(GeometryRefused, match="more than 50"):
            cut_plane(Volume(empty((9, 9, 9)), np.eye(4)), view_through(np.full(3, 4.0), rotation(8, 0)))

    def test_an_image_of_another_shape_is_not_put_into_a_plane(self):
        plane = cut_slice(Volume(empty((4, 5, 6)), np.eye(4)), 2, 0)
        with pytest.raises(ValueError, match="does not fit"):
            place_in_volume(plane, np.zeros((4, 4)), np.zeros((6, 5, 4)))


class TestNamesOfAxes:
    @bounded
    @given(grids(sheared=True))
    def test_each_view_has_its_own_axis(self, grid):
        size, matrix = grid
        volume = Volume(empty(size), matrix)
        names = ("axial", "coronal", "sagittal")
        axes = [resolve_axis(volume, name) for name in names]
        assert sorted(axes) == [0, 1, 2]
        assert [view_name(volume, axis).lower() for axis in axes] == list(names)

    def test_axial_slices_of_a_sagittal_series_run_along_its_rows(self):
        matrix = np.array([[0.0, 0, 3, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        assert resolve_axis(Volume(empty((8, 9, 5)), matrix), "Axial") == 1

    @pytest.mark.parametrize(("name", "axis"), [("I", 0), ("j", 1), (" K ", 2)])
    def test_letters_name_voxel_axes(self, name, axis):
        assert resolve_axis(Volume(empty((3, 3, 3)), np.eye(4)), name) == axis

    def test_an_unknown_name_is_refused_with_those_known(self):
        with pytest.raises(InvalidRequest, match="choose I, J, K, axial"):
            resolve_axis(Volume(empty((3, 3, 3)), np.eye(4)), "transverse")

    @pytest.mark.parametrize(
        ("size", "spacing", "axis"),
        [
            ((9, 9, 5), (0.5, 0.5, 5), 2),
            ((5, 9, 9), (5, 0.5, 0.5), 0),
            ((9, 9, 9), (0.9, 0.9, 0.6), 2),
            ((9, 9, 9), (1, 1, 1), 2),
            ((9, 1, 9), (1, 1, 1), 1),
            ((9, 9, 1), (0.5, 0.8, 1), 2),
        ],
    )
    def test_the_acquisition_axis_is_the_odd_one_out(self, size, spacing, axis):
        volume = Volume(empty(size), np.diag([*map(float, spacing), 1]))
        assert resolve_axis(volume, "acquisition") == acquisition_axis(volume) == axis


@bounded
@given(planes_of_grids(), st.floats(-5, 20), st.floats(-5, 20))
def test_a_pixel_position_survives_the_way_to_the_patient_and_back(case, column, row):
    size, matrix, view = case
    plane = cut_plane(Volume(empty(size), matrix), view)
    assert plane.to_pixel(plane.to_ras(column, row)) == pytest.approx((column, row), abs=1e-6)


def test_slices_cut_in_a_row_are_those_cut_one_by_one():
    generator = np.random.default_rng(3)
    turned, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turned * [0.7, 1.1, 3.0], [5, -3, 40]
    volume = Volume(generator.integers(0, 99, (4, 5, 6)), matrix)
    for axis in range(3):
        for plane, index in zip(cut_slices(volume, axis, [3, 0, 2]), [3, 0, 2], strict=True):
            alone = cut_slice(replace(volume), axis, index)  # of which nothing is known yet
            assert (plane.aligned, plane.description) == (alone.aligned, alone.description)
            assert np.array_equal(plane.ijk_to_ras, alone.ijk_to_ras)
            assert np.array_equal(plane.pixels, alone.pixels)
            # The first pixel's place, by the volume's own matrix.
            ijk = np.argwhere(volume.voxels == plane.pixels[0, 0])[:, ::-1]
            places = ijk @ matrix[:3, :3].T + matrix[:3, 3]
            assert np.isclose(places, plane.ijk_to_ras[:3, 3], atol=1e-9).all(axis=1).any()


def test_what_is_known_of_a_volume_goes_with_it():
    volume = Volume(empty((6, 5, 4)), np.eye(4))
    cut_slice(volume, 2, 1)
    watched = weakref.ref(volume)
    del volume
    gc.collect()
    assert watched() is None


def shown_in(pixels):
    return SlicePlane(pixels, np.eye(4), np.ones(pixels.shape, bool))


@bounded
@given(single=st.integers(0, 40), side=st.integers(0, 8), seed=st.integers(0, 1000))
def test_a_slice_is_empty_by_all_its_pixels_but_single_ones(single, side, seed):
    pixels = np.zeros((400, 500), np.uint16)
    random = np.random.default_rng(seed)
    pixels.flat[random.choice(pixels.size, single, replace=False)] = 250
    background = Background(0.0, 100.0)
    assert background.is_all_of(shown_in(pixels))
    row, column = random.integers(10, 380, 2)
    pixels[:] = 0
    pixels[row : row + side, column : column + side] = 1000
    shown = (side + 2) ** 2 if side else 0  # with the neighbours, whose mean it lifts
    assert background.is_all_of(shown_in(pixels)) == (shown / pixels.size < EMPTY)
    unknown = pixels.astype(np.float32)
    unknown[:, 0] = np.nan
    assert background.is_all_of(shown_in(unknown)) == background.is_all_of(shown_in(pixels))
