"""The exported files, opened by Slicer's own readers."""

from __future__ import annotations

import numpy as np
import pytest

from MedAnomalyCLIPLib.export import ResultWriter
from MedAnomalyCLIPLib.geometry import cut_slice
from MedAnomalyCLIPLib.resources import resource_path
from MedAnomalyCLIPLib.result import AnomalyResult, Provenance
from MedAnomalyCLIPLib.terminology import TERMINOLOGY_ENTRY, TERMS
from MedAnomalyCLIPLib.volume import Volume

slicer = pytest.importorskip("slicer")
vtk = pytest.importorskip("vtk")
numpy_support = pytest.importorskip("vtk.util.numpy_support")

PROVENANCE = Provenance("a detector", "1.2.3", "ab" * 32, "0.1.0", "cpu", "float32")
SHAPE = (6, 20, 30)


def tilted() -> np.ndarray:
    turn = vtk.vtkTransform()
    turn.Translate(12.5, -40.0, 733.0)
    turn.RotateWXYZ(23, 0.3, 0.9, -0.2)
    turn.Scale(-0.7, -0.4, 2.5)
    return np.array([[turn.GetMatrix().GetElement(r, c) for c in range(4)] for r in range(4)])


def sheared() -> np.ndarray:
    matrix = np.diag([-0.7, -0.4, 2.5, 1.0])
    matrix[1, 2] = 0.8
    return matrix


def write(folder, ijk_to_ras: np.ndarray, anomalous: bool = True) -> Volume:
    """Results with an anomalous pixel in column 5, row 3 of slice 4, or with none."""
    volume = Volume(np.zeros(SHAPE, np.int16), ijk_to_ras)
    plane = cut_slice(volume, 2, 4)
    anomaly = np.zeros(plane.shape, np.float32)
    anomaly[3, 5] = 0.9 if anomalous else 0.1
    with ResultWriter(folder, volume) as writer:
        writer.add(AnomalyResult(plane, 0.7, anomaly, 0.5, PROVENANCE))
    return volume


@pytest.fixture
def read_segmentation():
    """Reads a file as Slicer's "Add data" does; the scene lives as long as the test."""
    scene = slicer.vtkMRMLScene()

    def read(path):
        node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        node.AddDefaultStorageNode(str(path))
        assert node.GetStorageNode().ReadData(node)
        return node

    yield read
    scene.Clear(1)


def image_to_ras(image) -> np.ndarray:
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


@pytest.mark.parametrize("ijk_to_ras", [tilted(), sheared()], ids=["tilted", "sheared"])
def test_slicer_finds_the_segment_at_its_place(tmp_path, read_segmentation, ijk_to_ras):
    volume = write(tmp_path / "out", ijk_to_ras)
    node = read_segmentation(tmp_path / "out/segmentation.seg.nrrd")
    image = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(node.GetSegmentation().GetNthSegmentID(0), image)
    voxels = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(
        image.GetDimensions()[::-1]
    )
    ((k, j, i),) = np.argwhere(voxels)
    first_i, _, first_j, _, first_k, _ = image.GetExtent()
    place = image_to_ras(image) @ [i + first_i, j + first_j, k + first_k, 1]
    assert np.linalg.norm(place[:3] - cut_slice(volume, 2, 4).to_ras(5, 3)) < 1e-3


def test_slicer_finds_the_images_grid(tmp_path, read_segmentation):
    volume = write(tmp_path / "out", tilted())
    segmentation = read_segmentation(tmp_path / "out/segmentation.seg.nrrd").GetSegmentation()
    geometry = slicer.vtkOrientedImageData()
    name = slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()
    found = segmentation.GetConversionParameter(name)
    assert slicer.vtkSegmentationConverter.DeserializeImageGeometry(found, geometry, False)
    np.testing.assert_allclose(image_to_ras(geometry), volume.ijk_to_ras, atol=1e-6)
    assert geometry.GetExtent() == (0, 29, 0, 19, 0, 5)


def test_slicer_reads_name_colour_and_terminology(tmp_path, read_segmentation):
    write(tmp_path / "out", tilted())
    segment = read_segmentation(tmp_path / "out/segmentation.seg.nrrd").GetSegmentation().GetNthSegment(0)
    entry = vtk.reference("")
    segment.GetTag("TerminologyEntry", entry)
    assert (segment.GetName(), str(entry)) == (TERMS.name, TERMINOLOGY_ENTRY)
    assert segment.GetColor() == pytest.approx([c / 255 for c in TERMS.colour], abs=1e-4)


def test_slicer_keeps_a_segment_without_voxels(tmp_path, read_segmentation):
    write(tmp_path / "out", tilted(), anomalous=False)
    node = read_segmentation(tmp_path / "out/segmentation.seg.nrrd")
    assert node.GetSegmentation().GetNumberOfSegments() == 1


def test_slicer_finds_our_entry_in_our_terminology_file():
    logic = slicer.vtkSlicerTerminologiesModuleLogic()
    context = logic.LoadTerminologyFromFile(str(resource_path("MedAnomalyCLIP.term.json")))
    entry = slicer.vtkSlicerTerminologyEntry()
    assert logic.DeserializeTerminologyEntry(TERMINOLOGY_ENTRY, entry)
    assert logic.UpdateEntryFromLoadedTerminologies(entry, [context], [])
    # Only the file knows the colour: to have it, the entry must have been found there.
    assert tuple(entry.GetTypeObject().GetRecommendedDisplayRGBValue()) == TERMS.colour
