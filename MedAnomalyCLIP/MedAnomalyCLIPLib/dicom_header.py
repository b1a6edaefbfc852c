"""What one DICOM file says about its image before the pixels are read: kind, size, spacing, place.

A path in, `ImageHeader` out. Only the elements of `_TAGS` are parsed, so nothing that identifies the patient
is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dicom_pixels import functional_group, open_dataset
from .errors import UnreadableImage
from .volume import check_size, header_body_part, header_modality, reading

if TYPE_CHECKING:
    from pydicom import Dataset

SAME_DIRECTION = 1e-3
"""Largest difference between components of unit vectors that count as one direction."""

# What tells apart images that were taken at one place, in the order in which it is tried.
DISCRIMINATORS = (
    "ImageType",
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "DiffusionBValue",
    "AcquisitionNumber",
)
_TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "Modality"),
    *("StudyInstanceUID", "BodyPartExamined"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *(
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "SpacingBetweenSlices",
        "SliceThickness",
    ),
    *("ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio", "SequenceOfUltrasoundRegions"),
    *("DetectorInformationSequence", "TotalPixelMatrixColumns"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *DISCRIMINATORS,
)
_NO_PICTURES = ("SEG", "RTDOSE")  # they have rows and columns, but show no patient
_CENTIMETRES = 3  # PhysicalUnitsXDirection of an ultrasound region
_TISSUE = 1  # RegionSpatialFormat: two-dimensional picture, not a spectrum or a curve


@dataclass(frozen=True, eq=False)
class FramePlaces:
    """Where the frames of one file lie.

    Attributes:
        directions: (frames, 6) LPS unit vectors along a row and down a column.
        positions: (frames, 3) LPS mm, centre of the first pixel of each frame.
    """

    directions: np.ndarray
    positions: np.ndarray

    @property
    def along_row(self) -> np.ndarray:
        """(3,) unit vector, LPS."""
        return self.directions[0, :3] / np.linalg.norm(self.directions[0, :3])

    @property
    def down_column(self) -> np.ndarray:
        """(3,) unit vector, LPS."""
        return self.directions[0, 3:] / np.linalg.norm(self.directions[0, 3:])

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector, LPS, away from the viewer."""
        return np.cross(self.along_row, self.down_column)

    def problem(self) -> str:
        """Why these frames make no stack, in words; empty when they may."""
        directions = self.directions
        if not (np.isfinite(directions).all() and np.isfinite(self.positions).all()):
            return "its header states a position that is not a number"
        lengths = np.linalg.norm(directions.reshape(-1, 3), axis=1)
        lean = np.abs(np.einsum("fi,fi->f", directions[:, :3], directions[:, 3:]))
        if np.abs(lengths - 1).max() > 0.01 or lean.max() > SAME_DIRECTION:
            return "its header states row and column directions that are not perpendicular unit vectors"
        if np.abs(directions - directions[0]).max() > SAME_DIRECTION:
            return "its frames point in different directions: split it into one image for each"
        return ""


@dataclass(frozen=True, eq=False)
class ImageHeader:
    """What one DICOM file says about its image, before its pixels are read.

    Attributes:
        path: the file.
        study_uid: StudyInstanceUID, empty when missing.
        series_uid: SeriesInstanceUID.
        series_number: SeriesNumber, empty when missing.
        instance: InstanceNumber, 0 when missing.
        modality: DICOM modality code, empty when missing.
        body_part: BodyPartExamined, empty when missing.
        localizer: whether it is a scout image.
        shape: (frames, rows, columns).
        colour: whether it decodes to three channels.
        spacing: mm between (rows, columns); None when not stated.
        aspect: height of a pixel over its width, for images without a spacing.
        step: mm between slices, where positions do not tell.
        places: where the frames lie; None for an image without a place in the patient.
        discriminators: values of `DISCRIMINATORS` as text.
        problem: what keeps it from being placed, in words; empty when nothing does.
    """

    path: Path
    study_uid: str
    series_uid: str
    series_number: str
    instance: int
    modality: str
    body_part: str
    localizer: bool
    shape: tuple[int, int, int]
    colour: bool
    spacing: tuple[float, float] | None
    aspect: float
    step: float
    places: FramePlaces | None
    discriminators: tuple[str, ...]
    problem: str


def read_header(path: Path) -> ImageHeader | None:
    """What a file says about its image; None when it holds none."""
    with reading(path, "DICOM"):
        dataset = open_dataset(path, _TAGS)
        modality = header_modality(str(dataset.get("Modality") or ""))
        if not (dataset.get("Rows") and dataset.get("Columns")) or modality in _NO_PICTURES:
            return None
        frames = _checked_frames(dataset, path)
        measures: Any = functional_group(dataset, 0, "PixelMeasuresSequence") or dataset
        spacing, aspect = _pixel_spacing(dataset, measures)
        step = _slice_step_stated(measures)
        places = _frame_places(dataset, frames, step)
        number = dataset.get("SeriesNumber")
        return ImageHeader(
            path=path,
            study_uid=str(dataset.get("StudyInstanceUID") or ""),
            series_uid=str(dataset.get("SeriesInstanceUID") or ""),
            series_number="" if number is None else str(int(number)),
            instance=int(dataset.get("InstanceNumber") or 0),
            modality=modality,
            body_part=header_body_part(str(dataset.get("BodyPartExamined") or "")),
            localizer="LOCALIZER" in str(dataset.get("ImageType") or "").upper(),
            shape=(frames, int(dataset.Rows), int(dataset.Columns)),
            colour=int(dataset.get("SamplesPerPixel") or 1) > 1
            or dataset.get("PhotometricInterpretation") == "PALETTE COLOR",
            spacing=spacing,
            aspect=aspect,
            step=abs(step),
            places=places,
            discriminators=tuple(str(dataset.get(keyword) or "") for keyword in DISCRIMINATORS),
            problem=_problem(dataset, spacing) or (places.problem() if places else ""),
        )


def _checked_frames(dataset: Dataset, path: Path) -> int:
    """How many frames the file claims; refused before anything is made for each of them.

    A frame takes at least a byte, also where it is compressed.
    """
    frames = int(dataset.get("NumberOfFrames") or 1)
    check_size(path, frames * int(dataset.Rows) * int(dataset.Columns))
    if not 1 <= frames <= path.stat().st_size:
        raise UnreadableImage(f"{path.name} states {frames:,} frames, which it cannot hold")
    return frames


def _problem(dataset: Dataset, spacing: tuple[float, float] | None) -> str:
    """Why an image cannot be placed, apart from its position; empty when it can."""
    if "TotalPixelMatrixColumns" in dataset:
        return "it is a microscopy image cut into tiles: export the region to look at as one image"
    if "MOSAIC" in str(dataset.get("ImageType") or "").upper():
        return "it is a mosaic of slices in one image: convert it with dcm2niix first"
    if spacing is not None and not (np.isfinite(spacing).all() and min(spacing) > 0):
        return f"its header states a pixel spacing of {spacing[0]:g} x {spacing[1]:g} mm"
    return ""


def _numbers(dataset: Any, keyword: str, count: int) -> np.ndarray | None:
    value = dataset.get(keyword)
    if value is None or (np.ndim(value) == 0 and value == "") or np.size(value) == 0:
        return None
    if np.size(value) != count:
        raise ValueError(f"{keyword} has {np.size(value)} values instead of {count}")
    return np.array(value, dtype=np.float64).reshape(count)


def _pixel_spacing(dataset: Dataset, measures: Any) -> tuple[tuple[float, float] | None, float]:
    """mm between (rows, columns), None when no element states it; height of a pixel over its width."""
    sources = (
        (measures, "PixelSpacing"),
        (dataset, "ImagerPixelSpacing"),
        (dataset, "NominalScannedPixelSpacing"),
    )
    for source, keyword in sources:
        stated = _numbers(source, keyword, 2)
        if stated is not None:
            return (float(stated[0]), float(stated[1])), 1.0
    regions = {
        (abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10)
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("RegionSpatialFormat") == _TISSUE
        and region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRES
    }
    if len(regions) == 1:
        return regions.pop(), 1.0
    ratio = _numbers(dataset, "PixelAspectRatio", 2)
    return None, 1.0 if ratio is None or not ratio.all() else abs(float(ratio[0] / ratio[1]))


def _slice_step_stated(measures: Any) -> float:
    """mm between slices as the header states it, 1 when it does not.

    Negative when the frames of a nuclear medicine image run against their normal (PS3.3 C.8.4.15).
    """
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        stated = _numbers(measures, keyword, 1)
        if stated is not None and np.isfinite(stated[0]) and stated[0] != 0:
            return float(stated[0])
    return 1.0


def _frame_places(dataset: Dataset, frames: int, step: float) -> FramePlaces | None:
    if dataset.get("PerFrameFunctionalGroupsSequence"):
        return _places_from_groups(dataset, frames)
    source: Any = dataset
    if "ImagePositionPatient" not in dataset and dataset.get("DetectorInformationSequence"):
        source = dataset.DetectorInformationSequence[0]  # nuclear medicine
    direction = _numbers(source, "ImageOrientationPatient", 6)
    position = _numbers(source, "ImagePositionPatient", 3)
    if direction is None or position is None:
        return None
    normal = np.cross(direction[:3], direction[3:])
    positions = position + np.arange(frames)[:, None] * normal * step
    return FramePlaces(np.tile(direction, (frames, 1)), positions)


def _places_from_groups(dataset: Dataset, frames: int) -> FramePlaces | None:
    """Places of an enhanced multi-frame image, which states one for each frame."""
    directions, positions = [], []
    for frame in range(frames):
        orientation: Any = functional_group(dataset, frame, "PlaneOrientationSequence") or {}
        plane: Any = functional_group(dataset, frame, "PlanePositionSequence") or {}
        directions.append(_numbers(orientation, "ImageOrientationPatient", 6))
        positions.append(_numbers(plane, "ImagePositionPatient", 3))
    if any(value is None for value in (*directions, *positions)):
        return None
    return FramePlaces(np.array(directions), np.array(positions))
