"""Small images for tests: DICOM files and series, volume files, each with a known place in the patient."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
PATIENT_NAME = "Invented^Patience"
PATIENT_ID = "ID-4711"
SERIES_DESCRIPTION = "Head of P. Invented"
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def ramp(slices: int = 1, rows: int = 4, columns: int = 5, dtype: Any = np.int16) -> np.ndarray:
    """(slices, rows, columns) of numbers that are all different."""
    return np.arange(slices * rows * columns).reshape(slices, rows, columns).astype(dtype)


def dicom_dataset(pixels: np.ndarray, **elements: Any) -> Dataset:
    """A CT image with a patient's name in it, ready to be saved.

    Args:
        pixels: (R, C) or (F, R, C) grey, (R, C, 3) uint8 colour.
        elements: DICOM keywords that stand above the defaults; None leaves an element out.
    """
    colour = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    frames = pixels.shape[0] if pixels.ndim == 3 and not colour else None
    rows, columns = pixels.shape[:2] if frames is None else pixels.shape[1:]
    bits = pixels.dtype.itemsize * 8
    defaults = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "PatientName": PATIENT_NAME,
        "PatientID": PATIENT_ID,
        "SeriesDescription": SERIES_DESCRIPTION,
        "Modality": "CT",
        "SeriesNumber": 3,
        "InstanceNumber": 1,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": [1.0, 1.0],
        "SliceThickness": 2.0,
        "NumberOfFrames": frames,
        "Rows": rows,
        "Columns": columns,
        "SamplesPerPixel": 3 if colour else 1,
        "PlanarConfiguration": 0 if colour else None,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 1 if pixels.dtype.kind == "i" else 0,
        "PixelData": pixels.tobytes(),
    }
    dataset = Dataset()
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def write_dicom(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    """Save `dicom_dataset(pixels, **elements)`."""
    dicom_dataset(pixels, **elements).save_as(path, enforce_file_format=True)
    return path


def write_dicom_series(
    folder: Path, voxels: np.ndarray, positions: Sequence[Sequence[float]], **elements: Any
) -> list[Path]:
    """Save each slice of (K, R, C) at its position; file names and instance numbers run against the order."""
    folder.mkdir(parents=True, exist_ok=True)
    elements = {"SeriesInstanceUID": generate_uid(), **elements}
    last = len(voxels) - 1
    return [
        write_dicom(
            folder / f"{last - k:03d}",
            voxels[k],
            ImagePositionPatient=list(map(float, positions[k])),
            InstanceNumber=last - k + 1,
            **elements,
        )
        for k in range(len(voxels))
    ]


def write_enhanced(
    path: Path,
    voxels: np.ndarray,
    positions: Sequence[Sequence[float]],
    *,
    rescales: Sequence[tuple[float, float]] | None = None,
    orientations: Sequence[Sequence[float]] | None = None,
    spacing: Sequence[float] = (1.0, 1.0),
    **elements: Any,
) -> Path:
    """Save (F, R, C) as one enhanced CT: places and rescales for each frame, the rest shared."""
    dataset = dicom_dataset(
        voxels,
        SOPClassUID=EnhancedCTImageStorage,
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelSpacing=None,
        SliceThickness=None,
        NumberOfFrames=len(voxels),
        **elements,
    )
    shared = Dataset()
    shared.PixelMeasuresSequence = [_item(PixelSpacing=list(spacing), SliceThickness=2.0)]
    if orientations is None:
        shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=list(AXIAL))]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for index, position in enumerate(positions):
        frame = _item(PlanePositionSequence=[_item(ImagePositionPatient=list(map(float, position)))])
        if rescales is not None:
            slope, intercept = rescales[index]
            frame.PixelValueTransformationSequence = [
                _item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
            ]
        if orientations is not None:
            frame.PlaneOrientationSequence = [_item(ImageOrientationPatient=list(orientations[index]))]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.save_as(path, enforce_file_format=True)
    return path


def deeply_nested_dicom(depth: int) -> bytes:
    """A DICOM file whose sequences of undefined length lie in each other, `depth` of them."""
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    sequence = b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff"
    syntax = b"1.2.840.10008.1.2.1\x00"
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(syntax)) + syntax
    return bytes(128) + b"DICM" + meta + (sequence + item) * depth


def write_volume(
    path: Path,
    voxels: np.ndarray,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
    compressed: bool = False,
) -> Path:
    """Save (K, J, I) voxels through SimpleITK; geometry in ITK's own terms (LPS)."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(list(map(float, spacing)))
    image.SetOrigin(list(map(float, origin)))
    image.SetDirection(list(map(float, direction)))
    sitk.WriteImage(image, str(path), compressed)
    return path


def write_nifti(
    path: Path,
    voxels: np.ndarray,
    *,
    sform: np.ndarray | None = None,
    qform_code: int = 0,
    pixdim: Sequence[float] = (1.0, 1.0, 1.0),
    dimensions: int = 3,
    sizes: Sequence[int] | None = None,
    units: int = 2,
    slope: float = 1.0,
    intercept: float = 0.0,
    order: str = "<",
) -> Path:
    """Save int16 (K, J, I) voxels as NIfTI with exactly this header, consistent or not."""
    header = bytearray(352)
    sizes = [*(sizes or reversed(voxels.shape)), 1, 1, 1, 1][:7]
    for offset, types, values in (
        (0, "i", (348,)),
        (40, "8h", (dimensions, *sizes)),
        (70, "2h", (4, 16)),
        (76, "8f", (1.0, *pixdim, 1.0, 1.0, 1.0, 1.0)),
        (108, "3f", (352.0, slope, intercept)),
        (252, "2h", (qform_code, 0 if sform is None else 1)),
        (280, "12f", np.zeros(12) if sform is None else np.asarray(sform, dtype=float)[:3].ravel()),
    ):
        struct.pack_into(order + types, header, offset, *values)
    header[123] = units
    header[344:348] = b"n+1\0"
    path.write_bytes(bytes(header) + voxels.astype(order + "i2").tobytes())
    return path


def _item(**elements: Any) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item
