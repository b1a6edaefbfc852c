"""A volume node of any kind, under any transform, becomes the `Volume` that lies where Slicer shows it."""

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
from MedAnomalyCLIPLib.errors import UnsupportedImage

pytestmark = pytest.mark.usefixtures("slicer_scene")

OBLIQUE = rotation("S", 12) @ rotation("R", -8) @ translation(4, -7, 11)


def read(node, **options):
    from MedAnomalyCLIPLib.scene import volume_from_node

    return volume_from_node(node, **options)


def test_voxels_and_matrix_are_those_of_the_node():
    voxels, _ = head()
    matrix = OBLIQUE @ axial_matrix(voxels.shape)
    volume = read(add_volume(voxels, matrix))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.ijk_to_ras, matrix, atol=1e-9)


def test_nested_linear_transforms_are_multiplied_in():
    voxels, _ = head()
    outer, inner = rotation("A", 20), translation(10, 20, 30) @ rotation("R", 35)
    node = add_volume(voxels, axial_matrix(voxels.shape))
    inner_node, outer_node = add_linear_transform(inner), add_linear_transform(outer)
    inner_node.SetAndObserveTransformNodeID(outer_node.GetID())
    node.SetAndObserveTransformNodeID(inner_node.GetID())
    np.testing.assert_allclose(read(node).ijk_to_ras, outer @ inner @ axial_matrix(voxels.shape), atol=1e-9)


def test_a_non_linear_transform_becomes_a_warp_from_the_world_to_the_volume():
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    transform = add_bending_transform(bend_mm=12)
    node.SetAndObserveTransformNodeID(transform.GetID())
    volume = read(node)
    np.testing.assert_allclose(volume.ijk_to_ras, axial_matrix(voxels.shape), atol=1e-9)
    landmarks_in_world = np.array([[0.0, 12.0, 0.0], [80.0, 90.0, 70.0]])
    np.testing.assert_allclose(volume.warp(landmarks_in_world), [[0, 0, 0], [80, 90, 70]], atol=0.01)


def test_without_a_non_linear_transform_there_is_no_warp():
    voxels, _ = head()
    assert read(add_volume(voxels, axial_matrix(voxels.shape))).warp is None


def test_an_extent_that_does_not_start_at_zero_moves_the_first_voxel():
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    k, j, i = voxels.shape
    node.GetImageData().SetExtent(3, i + 2, 4, j + 3, 5, k + 4)
    moved = read(node).ijk_to_ras @ [0, 0, 0, 1]
    np.testing.assert_allclose(moved, axial_matrix(voxels.shape) @ [3, 4, 5, 1], atol=1e-9)


def test_a_fourth_component_is_dropped_as_alpha():
    rgba = np.random.default_rng(1).integers(0, 255, (3, 5, 4, 4), dtype=np.uint8)
    volume = read(add_volume(rgba, np.eye(4)))
    np.testing.assert_array_equal(volume.voxels, rgba[..., :3])


def test_two_components_are_refused_with_their_number():
    pair = np.zeros((3, 5, 4, 2), dtype=np.uint8)
    with pytest.raises(UnsupportedImage, match="2 values in each voxel"):
        read(add_volume(pair, np.eye(4)))


def test_a_node_without_voxels_is_refused():
    import slicer

    with pytest.raises(UnsupportedImage, match="no voxels"):
        read(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty"))


def test_no_node_is_refused_in_words():
    with pytest.raises(UnsupportedImage, match="choose one"):
        read(None)


def test_a_label_map_is_not_an_image():
    import slicer

    labels = slicer.util.addVolumeFromArray(
        np.zeros((3, 5, 4), np.uint8), nodeClassName="vtkMRMLLabelMapVolumeNode"
    )
    with pytest.raises(UnsupportedImage, match="not an image"):
        read(labels)


def test_the_subject_hierarchy_tells_the_modality():
    import slicer

    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    item = hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
    hierarchy.SetItemAttribute(item, "DICOM.Modality", "MR")
    assert read(node).modality == "MR"


def test_a_node_attribute_tells_the_modality_of_a_node_outside_the_hierarchy():
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    node.SetAttribute("DICOM.Modality", "MR")
    assert read(node).modality == "MR"


def test_a_modality_asked_for_overrides_the_scene():
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    node.SetAttribute("DICOM.Modality", "MR")
    assert read(node, modality="CT").modality == "CT"


def test_nothing_known_leaves_modality_and_units_empty():
    voxels, _ = head()
    volume = read(add_volume(voxels, axial_matrix(voxels.shape)))
    assert (volume.modality, volume.units) == ("", "")


def test_a_ct_that_reaches_below_fat_is_in_hounsfield_units():
    voxels, _ = head()
    node = add_volume(voxels - 1000, axial_matrix(voxels.shape))
    node.SetAttribute("DICOM.Modality", "CT")
    assert read(node).units == "HU"


def test_a_ct_of_unknown_scaling_is_not_taken_for_hounsfield_units():
    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    node.SetAttribute("DICOM.Modality", "CT")
    assert read(node).units == ""


def test_voxels_that_dicom_import_marked_as_hounsfield_are_those_of_a_ct():
    import slicer

    voxels, _ = head()
    node = add_volume(voxels, axial_matrix(voxels.shape))
    units = slicer.vtkCodedEntry()
    units.SetValueSchemeMeaning("[hnsf'U]", "UCUM", "Hounsfield unit")
    node.SetVoxelValueUnits(units)
    volume = read(node)
    assert (volume.modality, volume.units) == ("CT", "HU")


def test_the_pixel_size_of_a_picture_is_not_taken_for_millimetres():
    picture = np.zeros((1, 5, 4), np.uint8)
    node = add_volume(picture, np.eye(4))
    node.AddDefaultStorageNode("photo.PNG")
    node.GetStorageNode().SetFileName("photo.PNG")
    assert not read(node).spacing_known
