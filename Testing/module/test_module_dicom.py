"""DICOM results from Slicer: of volumes that its DICOM database knows, and of no others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from pydicom import dcmread

from harness import phantom
from MedAnomalyCLIPLib.errors import GeometryRefused, NotDicom
from unit.dicom_objects import farthest, identity, positions_of
from unit.grids import pixel_positions
from unit.images import write_dicom_series

SHAPE = (6, 24, 20)


def voxels() -> np.ndarray:
    pixels = np.full(SHAPE, 10, np.int16)
    pixels[2:4, 5:14, 6:10] = 900
    pixels[2, 13, 9:14] = 850
    return pixels


@pytest.fixture
def logic(hosted_module, views, detector):
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    logic.detectorFactory = lambda folder: detector
    yield logic
    logic.close()


@pytest.fixture
def study(tmp_path):
    """A series of files, with slices along a tilted direction."""
    orientation = [0.8, 0.6, 0.0, 0.0, 0.0, -1.0]
    normal = np.cross(orientation[:3], orientation[3:])
    positions = [[5.0, -7.0, 11.0] + 3.0 * k * normal for k in range(SHAPE[0])]
    return write_dicom_series(
        tmp_path / "study",
        voxels(),
        positions,
        **identity(),
        ImageOrientationPatient=orientation,
        PixelSpacing=[0.9, 1.1],
    )


@pytest.fixture
def database(study, monkeypatch):
    """Slicer's DICOM database, which slicer-core does not have."""
    import slicer

    paths = {str(dcmread(path).SOPInstanceUID): str(path) for path in study}
    known = SimpleNamespace(isOpen=True, fileForInstance=lambda uid: paths.get(uid, ""), paths=paths)
    monkeypatch.setattr(slicer, "dicomDatabase", known, raising=False)
    return known


@pytest.fixture
def volume(study, database, views):
    """The series as Slicer's own reader loads it, with what its DICOM plugin notes on it."""
    import slicer
    import vtk

    names = vtk.vtkStringArray()
    ordered = sorted(study, key=lambda path: dcmread(path).InstanceNumber)
    for path in ordered:
        names.InsertNextValue(str(path))
    node = slicer.modules.volumes.logic().AddArchetypeVolume(str(ordered[0]), "Head", 0, names)
    node.SetAttribute("DICOM.instanceUIDs", " ".join(dcmread(path).SOPInstanceUID for path in ordered))
    views["Red"].show(node)
    return node


def mask_positions(results) -> np.ndarray:
    return np.concatenate([pixel_positions(result.plane)[result.mask] for result in results])


def test_an_export_of_a_volume_from_dicom_lies_where_the_masks_were(logic, volume, tmp_path):
    found = [detection.result for detection in logic.detectSlices(volume)]
    logic.exportResults(volume, tmp_path / "out", dicom=["segmentation", "report", "capture"])
    names = {path.name for path in (tmp_path / "out").glob("*.dcm")}
    assert {"segmentation.dcm", "anomaly_map.dcm", "report.dcm", "overlay_K_000.dcm"} <= names
    assert farthest(positions_of(tmp_path / "out" / "segmentation.dcm"), mask_positions(found)) < 0.01


@pytest.mark.parametrize("name", ["segmentation.dcm", "anomaly_map.dcm"])
def test_slicers_own_reader_places_mask_and_map_where_they_were(name, logic, volume, tmp_path):
    import slicer

    found = [detection.result for detection in logic.detectSlices(volume)]
    logic.exportResults(volume, tmp_path / "out", dicom=["segmentation"])
    read = slicer.modules.volumes.logic().AddArchetypeVolume(str(tmp_path / "out" / name), name)
    indices = np.argwhere(slicer.util.arrayFromVolume(read) >= 128)[:, ::-1]
    matrix = volume_matrix(read)
    points = indices @ matrix[:3, :3].T + matrix[:3, 3]
    masks = [r.mask if name == "segmentation.dcm" else np.around(255 * r.map) >= 128 for r in found]
    expected = [pixel_positions(r.plane)[mask] for r, mask in zip(found, masks, strict=True)]
    assert farthest(points, np.concatenate(expected)) < 0.01


def test_frames_refer_to_the_files_that_show_them(logic, volume, database, tmp_path):
    logic.detectVolume(volume)
    logic.exportResults(volume, tmp_path / "out", dicom=["segmentation"])
    segmentation = dcmread(tmp_path / "out" / "segmentation.dcm")
    for frame, item in zip(
        segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True
    ):
        image = item.DerivationImageSequence[0].SourceImageSequence[0]
        shown = dcmread(database.paths[image.ReferencedSOPInstanceUID]).pixel_array
        assert np.array_equal(frame, shown >= 750)


def test_a_tilted_slice_of_a_view_can_be_written_too(logic, volume, views, tmp_path):
    view = views["Red"]
    centre = (volume_matrix(volume) @ [8, 9, 2.5, 1])[:3]
    tilt = phantom.rotation("R", 20)[:3, :3]
    view.node.SetSliceToRASByNTP(*(tilt @ [0, 0.6, 0.8]), *(tilt @ [1, 0, 0]), *centre, 0)
    detection = logic.detect(volume, "Red", threshold=0.4)
    assert detection.result.plane.aligned is None and detection.result.mask.any()
    files = logic.exportDicom(volume, [detection.result], tmp_path / "out")
    segmentation = next(path for path in files if path.name == "segmentation.dcm")
    assert farthest(positions_of(segmentation), mask_positions([detection.result])) < 0.01


def volume_matrix(node) -> np.ndarray:
    import slicer
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def test_a_volume_that_was_not_loaded_from_dicom_is_refused(logic, head, tmp_path):
    logic.detectVolume(head, indices=[12])
    with pytest.raises(NotDicom, match="DICOM module"):
        logic.exportResults(head, tmp_path / "out", dicom=["report"])
    assert not (tmp_path / "out").exists()


def test_files_that_the_database_has_no_more_are_told(logic, volume, database, tmp_path):
    logic.detectVolume(volume, indices=[2])
    for lost in (lambda: database.paths.popitem(), lambda: setattr(database, "isOpen", False)):
        lost()
        with pytest.raises(NotDicom, match="import the study again"):
            logic.exportResults(volume, tmp_path / "out", dicom=["report"])


def test_a_volume_that_was_moved_is_refused(logic, volume, tmp_path):
    transform = phantom.add_linear_transform(phantom.translation(4, 0, 0))
    volume.SetAndObserveTransformNodeID(transform.GetID())
    logic.detectVolume(volume, indices=[2])
    with pytest.raises(GeometryRefused, match="under a transform"):
        logic.exportResults(volume, tmp_path / "out", dicom=["report"])
    assert not (tmp_path / "out").exists()


def test_the_boxes_of_the_panel_choose_what_is_written(
    hosted_module, panel, volume, wait, tmp_path, monkeypatch
):
    from harness.pythonqt import qt

    boxes = (panel.ui.dicomSegmentationBox, panel.ui.dicomReportBox, panel.ui.dicomCaptureBox)
    assert not any(box.enabled for box in boxes)
    panel.ui.inputSelector.setCurrentNode(volume)
    panel.ui.rangeButton.click()
    wait(lambda: not panel.logic.isRunning())
    assert all(box.enabled for box in boxes)
    monkeypatch.setattr(qt.QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path))
    panel.ui.dicomReportBox.checked = True
    panel.ui.exportButton.click()
    wait(lambda: not panel.logic.isRunning(), seconds=60)
    written = {path.name for path in (tmp_path / "MedAnomalyCLIP results").glob("*.dcm")}
    assert written == {"segmentation.dcm", "report.dcm"}


def test_the_boxes_are_grey_for_a_volume_that_did_not_come_from_dicom(panel, head, wait):
    panel.ui.rangeButton.click()
    wait(lambda: not panel.logic.isRunning())
    assert panel.ui.exportButton.enabled
    assert not panel.ui.dicomSegmentationBox.enabled
