"""Results of a batch into the archive that its series came from, where a viewer finds them beside the images.

The folder of one series' results in, their DICOM objects stored in its study.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .batch_source import SeriesInput
from .dicom_output.sink import DicomKind
from .dicom_output.terms import MANUFACTURER, line
from .dicomweb import Attributes, Connection, first, values_of
from .dicomweb_source import ArchivedSeries, is_result

_MODALITIES = {DicomKind.CAPTURE: "OT", DicomKind.SEGMENTATION: "SEG", DicomKind.REPORT: "SR"}


@dataclass(frozen=True)
class StoredInArchive:
    """Stores the DICOM objects of each series' results in its archive.

    Attributes:
        kinds: names of `DicomKind`s, as the batch writes them.
    """

    kinds: tuple[str, ...]

    def has(self, item: SeriesInput, bundle_sha256: str) -> bool:
        """Whether the archive holds results of every kind for this series, made by this very detector."""
        if not isinstance(item, ArchivedSeries) or not self.kinds:
            return False
        connection = item.archive.connect()
        return all(_is_there(connection, item, kind, bundle_sha256) for kind in DicomKind.of(self.kinds))

    def take(self, item: SeriesInput, folder: Path, files: Sequence[str]) -> None:
        """Store what is DICOM among the files of a folder; what is there already is left as it is.

        Raises:
            ArchiveFailed: the archive cannot be reached, or does not take all of them.
        """
        if isinstance(item, ArchivedSeries):
            paths = [folder / name for name in files if name.endswith(".dcm")]
            item.archive.connect().store(item.study_uid, paths)


def _is_there(connection: Connection, item: ArchivedSeries, kind: DicomKind, bundle_sha256: str) -> bool:
    for series in connection.series(item.study_uid, {"Modality": _MODALITIES[kind]}):
        if not is_result(series):
            continue
        made = connection.sample(item.study_uid, first(series, "SeriesInstanceUID"))
        if (
            first(made, "Manufacturer") == MANUFACTURER
            and first(made, "DeviceSerialNumber") == line(bundle_sha256)
            and item.series in _referenced_series(made)
        ):
            return True
    return False


def _referenced_series(attributes: Attributes) -> Iterator[str]:
    """UIDs of the series that an object refers to, in whichever of its sequences."""
    for name in attributes:
        for item in values_of(attributes, name):
            if isinstance(item, dict):  # of a sequence, or a person's name, which has no such attribute
                yield first(item, "SeriesInstanceUID")
                yield from _referenced_series(item)
