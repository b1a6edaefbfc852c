"""DICOM Structured Report of what was found: a measurement report (TID 1500) with a group for each slice.

`AnomalyResult`s, their `DicomSource` and their segmentations in; a Comprehensive SR out. A slice with a
candidate has a region of interest that refers to its segment; one without is measured as a whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

from ..errors import InvalidRequest
from ..result import RESEARCH_USE_ONLY, AnomalyResult
from .segmentation import SegmentationObject, shows_frame
from .source import DicomSource, making
from .terms import (
    CATEGORY,
    LARGEST_DIAMETER,
    LIKENESS,
    MANUFACTURER,
    PERCENTILE,
    SCORE,
    SERIES_DESCRIPTION,
    TYPE,
    concept,
    equipment,
    line,
    parameters,
)

if TYPE_CHECKING:
    from highdicom.sr import (
        AlgorithmIdentification,
        Measurement,
        MeasurementsAndQualitativeEvaluations,
        PlanarROIMeasurementsAndQualitativeEvaluations,
        QualitativeEvaluation,
        SourceImageForSegmentation,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom import Dataset

    Group = (
        MeasurementsAndQualitativeEvaluations
        | PlanarROIMeasurementsAndQualitativeEvaluations
        | VolumetricROIMeasurementsAndQualitativeEvaluations
    )

_SERIES_NUMBER = 9103
_LONGEST_IDENTIFIER = 64


def measurement_report(
    segmentations: Sequence[SegmentationObject],
    source: DicomSource,
    *,
    complete: bool = True,
) -> Dataset:
    """Score, percentile, area and largest diameter of each slice, and which segment they belong to.

    Args:
        segmentations: binary ones, whose results are reported.
        source: what they were made from.
        complete: whether all slices that were asked for are there.

    Raises:
        NotDicom: the source's header lacks what a report asks for.
    """
    from highdicom import UID
    from highdicom.sr import ComprehensiveSR, MeasurementReport, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes

    if not segmentations:
        raise InvalidRequest("There is no segmentation to report on; detect first")
    first = segmentations[0].results[0]
    with making("report"):
        content = MeasurementReport(
            observation_context=ObservationContext(
                observer_device_context=ObserverContext(
                    observer_type=codes.DCM.Device, observer_identifying_attributes=_device(first)
                )
            ),
            procedure_reported=codes.cid100.ImagingProcedure,
            imaging_measurements=[
                _group(result, frame, segmentation.dataset, source)
                for segmentation in segmentations
                for result, frame in zip(segmentation.results, segmentation.frames, strict=True)
            ],
        )
        report = ComprehensiveSR(
            evidence=[*source.headers, *(segmentation.dataset for segmentation in segmentations)],
            content=content[0],
            series_instance_uid=UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=UID(),
            instance_number=1,
            is_complete=complete,
            series_description=SERIES_DESCRIPTION.format(what="Measurements"),
            **equipment(first.provenance),
        )
    report.CompletionFlagDescription = RESEARCH_USE_ONLY
    return report


def _device(result: AnomalyResult) -> Any:
    from highdicom.sr import DeviceObserverIdentifyingAttributes

    made = result.provenance
    return DeviceObserverIdentifyingAttributes(
        # The same for the same detector, wherever it runs.
        uid=f"2.25.{uuid5(NAMESPACE_OID, f'{made.bundle} {made.bundle_sha256}').int}",
        name=f"{line(made.bundle)} {line(made.bundle_version)}",
        manufacturer_name=MANUFACTURER,
        model_name=line(made.bundle),
        serial_number=line(made.bundle_sha256),
    )


def _group(result: AnomalyResult, frame: int | None, segmentation: Dataset, source: DicomSource) -> Group:
    """The measurements of one slice, on its segment if it has one."""
    from highdicom import UID
    from highdicom.sr import (
        MeasurementsAndQualitativeEvaluations,
        PlanarROIMeasurementsAndQualitativeEvaluations,
        ReferencedSegment,
        ReferencedSegmentationFrame,
        SourceSeriesForSegmentation,
        TrackingIdentifier,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )

    common: dict[str, Any] = {
        "tracking_identifier": TrackingIdentifier(
            uid=UID(), identifier=(result.plane.description or "Slice")[:_LONGEST_IDENTIFIER]
        ),
        "measurements": _measurements(result, found=frame is not None),
        "qualitative_evaluations": _evaluations(result),
        "algorithm_id": _algorithm(result),
    }
    shown = shows_frame(result.plane)
    if frame is None:
        images = None if shown is None else [_source_of_measurement(shown, source)]
        return MeasurementsAndQualitativeEvaluations(source_images=images, **common)
    common |= {"finding_type": concept(TYPE), "finding_category": concept(CATEGORY)}
    if shown is not None:
        reference = ReferencedSegmentationFrame(
            segmentation.SOPClassUID, segmentation.SOPInstanceUID, frame, 1, _source_of_segment(shown, source)
        )
        _name_frame_alone(reference[0])
        return PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=reference, **common)
    # A plane that cuts through the frames of its source comes from no single image of it.
    whole = ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        1,
        [frame],
        source_series=SourceSeriesForSegmentation(source.first.SeriesInstanceUID),
    )
    _name_frame_alone(whole[0])
    return VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=whole, **common)


def _name_frame_alone(item: Dataset) -> None:
    """A frame holds one segment, and a reference names either of them, not both (PS3.3 table 10-3)."""
    for reference in item.ReferencedSOPSequence:
        del reference.ReferencedSegmentNumber


def _measurements(result: AnomalyResult, *, found: bool) -> list[Measurement]:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    taken = [Measurement(concept(SCORE), round(float(result.score), 6), codes.UCUM.NoUnits)]
    if result.percentile is not None:
        share = round(float(result.percentile), 2)
        taken.append(Measurement(concept(PERCENTILE), share, codes.UCUM.Percent))
    if not result.plane.spacing_known:
        pixels = Code("{pixels}", "UCUM", "pixels")
        taken.append(Measurement(codes.SCT.Area, int(result.mask.sum()), pixels))
        return taken
    taken.append(Measurement(codes.SCT.Area, round(result.area_mm2, 4), codes.UCUM.SquareMillimeter))
    if found:
        longest = round(result.largest_diameter_mm, 4)
        taken.append(Measurement(concept(LARGEST_DIAMETER), longest, codes.UCUM.Millimeter))
    return taken


def _evaluations(result: AnomalyResult) -> list[QualitativeEvaluation] | None:
    """Whether the detector knows images of this kind; nothing where it cannot tell."""
    from highdicom.sr import QualitativeEvaluation
    from pydicom.sr.codedict import codes

    if result.unlikeness is None or result.unlike_threshold is None:
        return None
    answer = codes.cid230.No if result.is_unlike else codes.cid230.Yes
    return [QualitativeEvaluation(concept(LIKENESS), answer)]


def _algorithm(result: AnomalyResult) -> AlgorithmIdentification:
    from highdicom.sr import AlgorithmIdentification

    made = result.provenance
    return AlgorithmIdentification(
        name=made.bundle or "unknown",
        version=made.bundle_version or "unknown",
        parameters=parameters(result),
        manufacturer=MANUFACTURER,
    )


def _source_of_segment(index: int, source: DicomSource) -> SourceImageForSegmentation:
    from highdicom.sr import SourceImageForSegmentation

    return SourceImageForSegmentation(*_reference(index, source))


def _source_of_measurement(index: int, source: DicomSource) -> Any:
    from highdicom.sr import SourceImageForMeasurementGroup

    return SourceImageForMeasurementGroup(*_reference(index, source))


def _reference(index: int, source: DicomSource) -> tuple[str, str, list[int] | None]:
    """SOP class, instance and frame that a slice along K was read from."""
    header, number = source.header_of(index), source.frame_number(index)
    return header.SOPClassUID, header.SOPInstanceUID, None if number is None else [number]
