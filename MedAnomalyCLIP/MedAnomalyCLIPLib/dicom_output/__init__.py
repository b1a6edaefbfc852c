"""Results as DICOM objects: segmentation, map, structured report, secondary capture (needs highdicom).

`AnomalyResult`s and the `DicomSource` they came from in, datasets or files out. These are the only outputs
that hold a patient's identity, copied from the source as the standard asks.
"""

from .capture import secondary_capture
from .report import measurement_report
from .segmentation import SegmentationObject, anomaly_maps, segmentations
from .sink import DicomKind, DicomSink, write_dicom_results
from .source import DicomSource

__all__ = [
    "DicomKind",
    "DicomSink",
    "DicomSource",
    "SegmentationObject",
    "anomaly_maps",
    "measurement_report",
    "secondary_capture",
    "segmentations",
    "write_dicom_results",
]
