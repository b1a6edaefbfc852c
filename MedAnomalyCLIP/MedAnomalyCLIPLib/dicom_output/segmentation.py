"""DICOM Segmentation: masks as a binary one, maps as a fractional one, each where its plane lies.

`AnomalyResult`s and their `DicomSource` in, highdicom's datasets out. A slice of the source's own frames
keeps their pixel matrix, so that any viewer can lay it over them. Any other plane, reformatted or oblique, is
a frame of its own geometry. An image without a place in the patient has segmentations on its own pixels, one
for each frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GeometryRefused, InvalidRequest
from ..geometry import SlicePlane, to_slab
from ..result import RESEARCH_USE_ONLY, AnomalyResult
from ..terminology import TERMS
from ..volume import RAS_FROM_LPS
from .source import DicomSource, making, unit_directions
from .terms import CATEGORY, SERIES_DESCRIPTION, TYPE, algorithm, concept, equipment

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

_FRAME_AXIS = 2  # K: the slices that files hold as frames
_BINARY_NUMBER, _FRACTIONAL_NUMBER = 9101, 9102  # of their series within the study
_MAP_WORDS = "Anomaly value of each pixel, 0 to 1; not a calibrated probability"


@dataclass(frozen=True, eq=False)
class SegmentationObject:
    """A DICOM Segmentation and which of its frames shows which result.

    Attributes:
        dataset: ready to be saved.
        results: of the slices that it was made from.
        frames: of each result, its frame, from 1; None where nothing reached the threshold, so that the frame
            was left out.
    """

    dataset: Dataset
    results: tuple[AnomalyResult, ...]
    frames: tuple[int | None, ...]


def segmentations(results: Sequence[AnomalyResult], source: DicomSource) -> list[SegmentationObject]:
    """Binary segmentations of what reaches the threshold.

    Args:
        results: of one source, each slice once.
        source: what they were detected on.

    Returns:
        One for all slices along one axis, one for each resampled plane, or one for each frame of an image
        without a place in the patient; all in one new series.

    Raises:
        GeometryRefused: a plane that lies on no frame of an image without a place in the patient.
        NotDicom: the source's header lacks what a segmentation asks for.
    """
    return _series(results, source, fractional=False)


def anomaly_maps(results: Sequence[AnomalyResult], source: DicomSource) -> list[SegmentationObject]:
    """The maps themselves as fractional segmentations in 255 steps; otherwise as `segmentations`."""
    return _series(results, source, fractional=True)


def _series(
    results: Sequence[AnomalyResult], source: DicomSource, *, fractional: bool
) -> list[SegmentationObject]:
    from highdicom import UID

    series = UID()
    return [
        _segmentation(stack, source, series, number, fractional=fractional)
        for number, stack in enumerate(stacks(results, source), start=1)
    ]


def stacks(results: Sequence[AnomalyResult], source: DicomSource) -> list[list[AnomalyResult]]:
    """Results that make one multi-frame object: parallel, on one grid; in the order of their planes."""
    if not results:
        raise InvalidRequest("There is no result to write as DICOM; detect first")
    found: dict[object, list[AnomalyResult]] = {}
    for number, result in enumerate(results):
        aligned = result.plane.aligned
        if not source.placed:
            _check_on_frame(result.plane, source)
        together = source.placed and aligned is not None
        found.setdefault(("axis", aligned.axis) if together and aligned else number, []).append(result)
    for members in found.values():
        members.sort(key=lambda result: result.plane.aligned.index if result.plane.aligned else 0)
    return list(found.values())


def _check_on_frame(plane: SlicePlane, source: DicomSource) -> None:
    if plane.aligned is None or plane.aligned.axis != _FRAME_AXIS:
        raise GeometryRefused(
            f"{plane.description or 'This plane'} cannot be written as DICOM: the image has no place in the "
            "patient, so that only results on its own frames can refer to it"
        )


def shows_frame(plane: SlicePlane) -> int | None:
    """The slice along K that a plane shows as it was stored, turns and flips aside; None for other planes."""
    aligned = plane.aligned
    return aligned.index if aligned is not None and aligned.axis == _FRAME_AXIS else None


def frame_grid(plane: SlicePlane) -> np.ndarray:
    """4x4, (column, row, 0, 1) of the frame that a plane is written as to LPS in mm."""
    grid = RAS_FROM_LPS @ plane.ijk_to_ras
    if shows_frame(plane) is None or plane.aligned is None:
        return grid
    rows, columns = plane.shape
    turn = np.eye(4)  # from the slab's columns and rows to the plane's
    if plane.aligned.transpose:
        turn = turn[[1, 0, 2, 3]]
    for axis, count, flip in (
        (0, columns, plane.aligned.flip_columns),
        (1, rows, plane.aligned.flip_rows),
    ):
        if flip:
            turn[axis] = -turn[axis]
            turn[axis, 3] = count - 1
    return grid @ turn


def frame_pixels(plane: SlicePlane, image: np.ndarray) -> np.ndarray:
    """An (H, W) image on a plane's grid as the frame that it is written as."""
    if shows_frame(plane) is None or plane.aligned is None:
        return image
    return to_slab(plane.aligned, image)


def _segmentation(
    results: list[AnomalyResult], source: DicomSource, series: str, number: int, *, fractional: bool
) -> SegmentationObject:
    from highdicom import UID
    from highdicom.seg import Segmentation

    what = "Anomaly map" if fractional else "Abnormality"
    if fractional:
        pixels = np.stack([np.clip(frame_pixels(r.plane, r.map), 0, 1) for r in results])
    else:
        pixels = np.stack([frame_pixels(r.plane, r.mask) for r in results]).astype(np.uint8)
    with making("segmentation"):
        dataset = Segmentation(
            source_images=_source_images(results, source),
            pixel_array=pixels if source.placed else pixels[0],
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=[_description(results[0], fractional)],
            series_instance_uid=series,
            series_number=_FRACTIONAL_NUMBER if fractional else _BINARY_NUMBER,
            sop_instance_uid=UID(),
            instance_number=number,
            omit_empty_frames=bool(pixels.any()),
            content_label="ANOMALY_MAP" if fractional else "ABNORMALITY",
            content_description=RESEARCH_USE_ONLY,
            series_description=SERIES_DESCRIPTION.format(what=what),
            **_geometry(results, source),
            **equipment(results[0].provenance),
        )
    dataset.ContentCreatorName = None  # asked for, and nobody's
    if not source.placed:
        _refer_to_frame(dataset, results[0], source)
    elif not any(item.DerivationImageSequence for item in dataset.PerFrameFunctionalGroupsSequence):
        _refer_to_all(dataset, source)
    return SegmentationObject(dataset, tuple(results), _frames_of(dataset, results, source, pixels))


def _source_images(results: list[AnomalyResult], source: DicomSource) -> list[Dataset]:
    """The files that took part: those of the slices, or all, when other planes were cut from them."""
    shown = [shows_frame(result.plane) for result in results]
    if None in shown:
        return list(source.headers)
    return [source.headers[i] for i in sorted({source.frames[k][0] for k in shown if k is not None})]


def _description(result: AnomalyResult, fractional: bool) -> SegmentDescription:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    description = SegmentDescription(
        segment_number=1,
        segment_label=TERMS.name,
        segmented_property_category=concept(CATEGORY),
        segmented_property_type=concept(TYPE),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm(result),
        display_color=CIELabColor.from_rgb(*TERMS.colour),
    )
    description.SegmentDescription = _MAP_WORDS if fractional else RESEARCH_USE_ONLY
    return description


def _geometry(results: list[AnomalyResult], source: DicomSource) -> dict[str, Any]:
    """Where the frames lie, from their planes; without a place in the patient, perhaps a pixel size."""
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence

    grids = [frame_grid(result.plane) for result in results]
    column, row = (float(step) for step in np.linalg.norm(grids[0][:3, :2], axis=0))
    if not source.placed:
        measured = source.patient_spacing and results[0].plane.spacing_known
        return {"pixel_measures": PixelMeasuresSequence([row, column], None) if measured else None}
    between = float(
        np.linalg.norm(results[0].plane.ijk_to_ras[:3, 2])
    )  # the plane's normal times the distance
    return {
        "pixel_measures": PixelMeasuresSequence([row, column], between, between),
        "plane_orientation": PlaneOrientationSequence("PATIENT", unit_directions(grids[0])),
        "plane_positions": [
            PlanePositionSequence("PATIENT", [float(x) for x in grid[:3, 3]]) for grid in grids
        ],
    }


def _refer_to_frame(dataset: Dataset, result: AnomalyResult, source: DicomSource) -> None:
    """Name the one frame that a segmentation without a place belongs to; drop a made-up pixel size."""
    dataset.PatientOrientation = source.first.get("PatientOrientation") or None
    shared = dataset.SharedFunctionalGroupsSequence[0]
    if not (source.patient_spacing and result.plane.spacing_known) and "PixelMeasuresSequence" in shared:
        del shared.PixelMeasuresSequence
    index = shows_frame(result.plane)
    assert index is not None  # `stacks` has refused other planes
    number = source.frame_number(index)
    if number is not None:
        for derivation in dataset.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence:
            for image in derivation.SourceImageSequence:
                image.ReferencedFrameNumber = number


def _refer_to_all(dataset: Dataset, source: DicomSource) -> None:
    """Say of frames that cut through the source's frames that they were made from all of them."""
    from highdicom.sr import CodedConcept
    from pydicom import Dataset as Item
    from pydicom.sr.codedict import codes

    images = []
    for header in source.headers:
        image = Item()
        image.ReferencedSOPClassUID = header.SOPClassUID
        image.ReferencedSOPInstanceUID = header.SOPInstanceUID
        image.PurposeOfReferenceCodeSequence = [
            CodedConcept.from_code(codes.cid7202.SourceImageForImageProcessingOperation)
        ]
        image.SpatialLocationsPreserved = "NO"
        images.append(image)
    derivation = Item()
    derivation.DerivationCodeSequence = [CodedConcept.from_code(codes.cid7203.SegmentationImageDerivation)]
    derivation.SourceImageSequence = images
    for item in dataset.PerFrameFunctionalGroupsSequence:
        item.DerivationImageSequence = [derivation]


def _frames_of(
    dataset: Dataset, results: list[AnomalyResult], source: DicomSource, pixels: np.ndarray
) -> tuple[int | None, ...]:
    """Number of the frame that shows each result; highdicom sorts them, and leaves out empty ones."""
    if not source.placed:
        return (1,) if pixels.any() else (None,)
    places = np.array(
        [
            item.PlanePositionSequence[0].ImagePositionPatient
            for item in dataset.PerFrameFunctionalGroupsSequence
        ],
        dtype=np.float64,
    )
    numbers: list[int | None] = []
    for result, frame in zip(results, pixels, strict=True):
        apart = np.linalg.norm(places - frame_grid(result.plane)[:3, 3], axis=1)
        numbers.append(1 + int(np.argmin(apart)) if frame.any() else None)
    return tuple(numbers)
