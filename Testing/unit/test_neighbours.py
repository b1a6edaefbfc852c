"""Which normal images may not vouch for each other."""

from __future__ import annotations

import numpy as np
import pytest

from MedAnomalyCLIPLib.geometry import cut_plane, cut_slice
from MedAnomalyCLIPLib.neighbours import NEAR_MM, Origin, left_out, same_slice
from MedAnomalyCLIPLib.volume import Volume


def volume(spacing=(1.0, 1.0, 2.0), size=40, turn=0.0):
    angle = np.deg2rad(turn)
    matrix = np.eye(4)
    matrix[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    matrix[:3, :3] *= spacing
    return Volume(np.zeros((size, 8, 8), np.int16), matrix)


def slices(of, indices, name="head", axis=2):
    return [Origin.of_plane(cut_slice(of, axis, index), name) for index in indices]


@pytest.mark.parametrize("turn", [0.0, 33.0])
def test_slices_of_one_volume_are_left_out_where_they_lie_close(turn):
    indices = np.array([0, 1, 2, 3, 9, 20])
    apart = 2.0 * np.abs(indices[:, None] - indices)
    np.testing.assert_array_equal(left_out(slices(volume(turn=turn), indices)), apart < NEAR_MM)


def test_a_tilted_plane_is_as_near_as_its_centre_is():
    head = volume(size=20)
    tilted = np.eye(4)
    tilted[:3, 1:3] = [[0, 0], [np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    tilted[2, 3] = 20
    plane = Origin.of_plane(cut_plane(head, tilted), "head")
    near, far = slices(head, [9, 15])
    assert left_out([plane, near, far]).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]


def test_planes_across_each_other_are_no_copies():
    head = volume()
    assert not left_out(slices(head, [4]) + slices(head, [4], axis=0))[0, 1]


def test_another_volume_is_never_left_out_though_its_slices_lie_at_the_same_place():
    out = left_out(slices(volume(), [3, 12], "one") + slices(volume(), [3, 12], "two"))
    np.testing.assert_array_equal(out, np.kron(np.eye(2), np.ones((2, 2))))


def test_a_volume_is_left_out_whole_only_where_the_others_hold_as_many_slices():
    most, one = slices(volume(), range(0, 30, 5), "most"), slices(volume(), [3], "one")
    out = left_out(most + one)
    assert out[:6, :6].sum() == 6  # themselves: the one slice of the other volume could not judge them alone
    assert out[6].tolist() == [False] * 6 + [True]


def test_images_of_one_patient_without_places_are_left_out_in_blocks():
    out = left_out([Origin("patient")] * 10)
    np.testing.assert_array_equal(out, np.kron(np.eye(5), np.ones((2, 2))))


def test_two_volumes_of_one_patient_cannot_judge_each_other():
    def origin(name, place):
        return Origin("patient", name, (0.0, 0.0, place), (0.0, 0.0, 1.0))

    out = left_out([origin("t1", 0.0), origin("t1", 50.0), origin("t2", 50.0), origin("t2", 100.0)])
    np.testing.assert_array_equal(out, [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]])


def test_the_same_slice_is_known_again_and_the_next_one_is_not_it():
    first, again, following = slices(volume(), [3, 3, 4])
    assert same_slice(first, again)
    assert not same_slice(first, following)
    assert not same_slice(first, slices(volume(), [3], "other")[0])
    assert not same_slice(Origin("a"), Origin("a"))
