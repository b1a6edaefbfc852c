"""Volumes that are read for the page, as nodes of a scene."""

from __future__ import annotations

import numpy as np
import pytest

from harness.phantom import axial_matrix, head
from MedAnomalyCLIPLib.volume import Volume


@pytest.mark.parametrize(
    ("modality", "units", "colour"), [("MR", "", False), ("CT", "HU", False), ("US", "", True)]
)
def test_a_volume_comes_back_from_its_node(slicer_scene, modality, units, colour):
    from MedAnomalyCLIPLib.scene import volume_from_node
    from MedAnomalyCLIPLib.web.study import add_volume

    voxels, _ = head((5, 20, 16))
    voxels = np.stack([voxels, voxels // 2, voxels // 3], axis=-1).astype(np.uint8) if colour else voxels
    volume = Volume(voxels, axial_matrix((5, 20, 16)), modality=modality, units=units)
    back = volume_from_node(add_volume(volume))
    np.testing.assert_array_equal(back.voxels, voxels)
    np.testing.assert_allclose(back.ijk_to_ras, volume.ijk_to_ras)
    assert (back.modality, back.units) == (modality, units)


def test_a_node_tells_what_presets_are_guessed_from_and_nothing_else(slicer_scene):
    from MedAnomalyCLIPLib.scene import words_of
    from MedAnomalyCLIPLib.web.study import add_volume

    volume = Volume(head((5, 20, 16))[0], np.eye(4), modality="MR", body_part="brain", source="Zebrowski.nii")
    assert words_of(add_volume(volume)) == ("MR", "MR brain image")
