"""DICOM images to detect on, and judges of the objects that were made of them, none of which is ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from MedAnomalyCLIPLib.volume import Volume

VALIDATOR = shutil.which("dciodvfy")
needs_validator = pytest.mark.skipif(
    VALIDATOR is None, reason="dciodvfy is missing: apt-get install dicom3tools"
)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def identity() -> dict[str, str]:
    """Elements that images of a real study have, apart from those of `images.dicom_dataset`."""
    return {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "PatientBirthDate": "19310217",
        "PatientSex": "F",
        "StudyDate": "20010911",
        "StudyTime": "034157.77",
        "StudyID": "S8",
        "AccessionNumber": "A77",
        "ReferringPhysicianName": "Doctor^R",
    }


def errors_of(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    found = subprocess.run([VALIDATOR, "-new", path], capture_output=True, text=True, check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert any(re.fullmatch(r"\w+", line) for line in lines), (
        lines
    )  # it names the kind of object that it knows
    return [line for line in lines if line.startswith(("Error", "Abort"))]


def positions_of(path: Path) -> np.ndarray:
    """(N, 3) RAS mm of the pixels of a segmentation that are not zero, by PS3.3 equation C.7.6.2.1-1."""
    dataset = dcmread(path)
    frames = np.reshape(dataset.pixel_array, (-1, dataset.Rows, dataset.Columns))
    shared = dataset.SharedFunctionalGroupsSequence[0]
    row_step, column_step = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    found = []
    for frame, item in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        first = np.array(item.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        rows, columns = np.nonzero(frame)
        found.append(
            first + columns[:, None] * column_step * cosines[:3] + rows[:, None] * row_step * cosines[3:]
        )
    return np.concatenate(found) @ LPS[:3, :3]


def positions_in(volume_file: Path) -> np.ndarray:
    """(N, 3) RAS mm of the voxels of a volume file that are not zero, as ITK places them."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(volume_file))
    indices = np.argwhere(sitk.GetArrayFromImage(image))[:, ::-1]
    directions = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return (indices @ directions.T + image.GetOrigin()) @ LPS[:3, :3]


def farthest(points: np.ndarray, others: np.ndarray) -> float:
    """How far the farthest point of either set lies from the other set, in mm."""
    apart = np.linalg.norm(points[:, None] - others, axis=2)
    return float(max(apart.min(axis=0).max(), apart.min(axis=1).max()))


def series_positions(volume: Volume) -> list[list[float]]:
    """ImagePositionPatient of each slice along K of a volume that is to be written as a series."""
    grid = LPS @ volume.ijk_to_ras
    return [[float(x) for x in grid[:3, 3] + k * grid[:3, 2]] for k in range(volume.size[2])]


def series_orientation(volume: Volume) -> list[float]:
    grid = LPS @ volume.ijk_to_ras
    return [float(x) for x in (grid[:3, :2] / np.linalg.norm(grid[:3, :2], axis=0)).T.ravel()]


def text_items(dataset: Dataset) -> dict[str, list[str]]:
    """Everything that a report says, by the meaning of what it is about."""
    said: dict[str, list[str]] = {}
    waiting = list(dataset.ContentSequence)
    while waiting:
        item = waiting.pop(0)
        waiting += item.get("ContentSequence", [])
        name = item.ConceptNameCodeSequence[0].CodeMeaning if "ConceptNameCodeSequence" in item else ""
        for keyword in ("TextValue", "UID"):
            if keyword in item:
                said.setdefault(name, []).append(str(item[keyword].value))
        if "ConceptCodeSequence" in item:
            said.setdefault(name, []).append(item.ConceptCodeSequence[0].CodeMeaning)
        if "MeasuredValueSequence" in item:
            value = item.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeValue
            said.setdefault(name, []).append(f"{float(value.NumericValue):g} {unit}")
    return said
