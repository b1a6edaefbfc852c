"""DICOM Secondary Capture of the overlay: the picture that a reader without any viewer of segments sees.

An `AnomalyResult` and its `DicomSource` in, a colour image out, with what the colours mean and "research use
only" in its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..overlay import render_overlay
from ..result import RESEARCH_USE_ONLY, AnomalyResult
from ..volume import RAS_FROM_LPS
from .segmentation import shows_frame
from .source import DicomSource, making
from .terms import SERIES_DESCRIPTION, equipment

if TYPE_CHECKING:
    from PIL.Image import Image
    from pydicom import Dataset

_SERIES_NUMBER = 9104
_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))  # against and along the axes of LPS
_OBLIQUE = 0.1  # share of a direction from which its letter is told


def secondary_capture(
    result: AnomalyResult,
    source: DicomSource,
    *,
    series: str | None = None,
    number: int = 1,
    picture: Image | None = None,
) -> Dataset:
    """The overlay of one slice as an image of the patient's study.

    Args:
        result: of one slice.
        source: what it was detected on.
        series: UID of the series that it joins; None for a new one.
        number: of the image in its series, from 1.
        picture: as `overlay.render_overlay` makes it, if it was made already.

    Raises:
        NotDicom: the source's header lacks what a capture asks for.
    """
    from highdicom import UID
    from highdicom.sc import SCImage

    pixels = np.asarray(picture or render_overlay(result), dtype=np.uint8)
    first = source.first
    with making("secondary capture"):
        capture = SCImage(
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            study_instance_uid=first.StudyInstanceUID,
            series_instance_uid=series or UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=UID(),
            instance_number=number,
            patient_id=first.PatientID,
            patient_name=first.PatientName,
            patient_birth_date=first.PatientBirthDate,
            patient_sex=first.PatientSex,
            accession_number=first.AccessionNumber,
            study_id=first.StudyID,
            study_date=first.StudyDate or None,
            study_time=first.StudyTime or None,
            referring_physician_name=first.ReferringPhysicianName,
            patient_orientation=("L", "P"),  # stated below, where it is known
            specific_character_set=first.SpecificCharacterSet,
            series_description=SERIES_DESCRIPTION.format(what="Overlay"),
            **equipment(result.provenance),
        )
        capture.copy_patient_and_study_information(first)
    directions = patient_orientation(result) if source.placed else source.stated_orientation(result.plane)
    setattr(capture, "PatientOrientation", directions)  # noqa: B010  # unlike in highdicom, it may be unknown
    if first.get("BodyPartExamined"):
        capture.BodyPartExamined = first.BodyPartExamined
    capture.Laterality = first.get("Laterality") or ""  # as unknown where nobody says
    capture.DerivationDescription = RESEARCH_USE_ONLY
    capture.ImageComments = RESEARCH_USE_ONLY
    if first.get("BurnedInAnnotation"):
        capture.BurnedInAnnotation = first.BurnedInAnnotation  # the slice's own pixels are in the picture
    capture.SourceImageSequence = _references(result, source)
    capture.ReferencedSeriesSequence = [_series_of(capture.SourceImageSequence, source)]
    return capture


def patient_orientation(result: AnomalyResult) -> list[str]:
    """The letters of the row and the column direction, for example ["L", "P"]; oblique ones have several."""
    directions = (RAS_FROM_LPS @ result.plane.ijk_to_ras)[:3, :2].T
    words = []
    for direction in directions:
        share = direction / np.linalg.norm(direction)
        axes = [axis for axis in np.argsort(-np.abs(share), kind="stable") if abs(share[axis]) >= _OBLIQUE]
        words.append("".join(_LETTERS[axis][int(share[axis] > 0)] for axis in axes))
    return words


def _references(result: AnomalyResult, source: DicomSource) -> list[Dataset]:
    """The image that the picture shows; all of its series, where the plane cuts through them."""
    from pydicom import Dataset

    index = shows_frame(result.plane)
    headers = source.headers if index is None else [source.header_of(index)]
    references = []
    for header in headers:
        reference = Dataset()
        reference.ReferencedSOPClassUID = header.SOPClassUID
        reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
        if index is not None and (number := source.frame_number(index)) is not None:
            reference.ReferencedFrameNumber = number
        references.append(reference)
    return references


def _series_of(references: Sequence[Dataset], source: DicomSource) -> Dataset:
    """Which series the images are of (PS3.3 C.12.2), so that an archive can tell what was looked at."""
    from pydicom import Dataset

    series = Dataset()
    series.SeriesInstanceUID = source.first.SeriesInstanceUID
    series.ReferencedInstanceSequence = []
    for reference in references:
        instance = Dataset()
        instance.ReferencedSOPClassUID = reference.ReferencedSOPClassUID
        instance.ReferencedSOPInstanceUID = reference.ReferencedSOPInstanceUID
        series.ReferencedInstanceSequence.append(instance)
    return series
