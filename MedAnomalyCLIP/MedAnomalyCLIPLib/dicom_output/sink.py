"""Results as DICOM files in a folder, beside those that `export.py` writes.

`AnomalyResult`s of one volume in, one after the other; files with neutral names out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InvalidRequest
from ..geometry import cut_slice
from ..output_folder import writing
from ..result import AnomalyResult, Provenance
from ..volume import Volume
from .capture import secondary_capture
from .report import measurement_report
from .segmentation import SegmentationObject, anomaly_maps, segmentations, stacks
from .source import DicomSource, silence

if TYPE_CHECKING:
    from PIL.Image import Image
    from pydicom import Dataset


class DicomKind(str, Enum):
    """What can be written as DICOM."""

    SEGMENTATION = "segmentation"
    REPORT = "report"
    CAPTURE = "capture"

    @classmethod
    def of(cls, names: Iterable[str]) -> tuple[DicomKind, ...]:
        """Kinds by their names, each once, in the order of their declaration.

        Raises:
            InvalidRequest: there is no such kind.
        """
        wanted = {str(getattr(name, "value", name)) for name in names}
        unknown = sorted(wanted - {kind.value for kind in cls})
        if unknown:
            known = ", ".join(kind.value for kind in cls)
            raise InvalidRequest(f"There is no DICOM output {unknown[0]!r}; choose among {known}")
        return tuple(kind for kind in cls if kind.value in wanted)


ALL_KINDS = tuple(kind.value for kind in DicomKind)


class DicomSink:
    """Takes results one by one, and writes their DICOM objects at the end.

    A report refers to segments, so that it brings the segmentation with it.

    Attributes:
        files: names of the files that were written.
    """

    def __init__(self, source: DicomSource, kinds: Collection[str]) -> None:
        """
        Args:
            source: what the results come from.
            kinds: names of `DicomKind`s.
        """
        from highdicom import UID

        self.files: list[str] = []
        self._source, self._kinds = source, DicomKind.of(kinds)
        self._results: list[AnomalyResult] = []
        self._series = str(UID())

    def rehearse(self, volume: Volume) -> None:
        """Raise what could not be written at the end, from a blank result on the first slice of the source.

        Detection is too slow to learn at its end that a header is no good.

        Raises:
            NotDicom: the source's header lacks what is asked of it.
        """
        from PIL import Image

        plane = cut_slice(volume, 2, 0)
        nobody = Provenance("", "", "", "", "", "")
        blank = AnomalyResult(plane, 0.0, np.zeros(plane.shape, np.float32), 1.0, nobody)
        measurement_report(segmentations([blank], self._source), self._source)
        secondary_capture(blank, self._source, picture=Image.new("RGB", (1, 1)))

    def add(self, result: AnomalyResult, folder: Path, stem: str = "", picture: Image | None = None) -> None:
        """Take a result; its capture is written at once.

        Args:
            result: of a slice that was not given before.
            folder: where files go.
            stem: name of its capture, without a suffix.
            picture: its overlay, if it was drawn already.
        """
        stacks([result], self._source)  # refuses a plane that could not be written
        if DicomKind.CAPTURE in self._kinds:
            number = len(self._results) + 1
            capture = secondary_capture(
                result, self._source, series=self._series, number=number, picture=picture
            )
            self._save(capture, folder, stem or f"overlay_{number:03d}")
        # What is written at the end needs no pixels; a volume's would fill the memory.
        bare = np.broadcast_to(np.uint8(0), result.plane.shape)
        self._results.append(replace(result, plane=replace(result.plane, pixels=bare)))

    def finish(self, folder: Path, *, complete: bool = True) -> None:
        """Write what belongs to all results.

        Args:
            folder: where files go.
            complete: whether these are all that were asked for.
        """
        if not self._results or set(self._kinds) <= {DicomKind.CAPTURE}:
            return
        found = segmentations(self._results, self._source)
        self._save_all(found, folder, "segmentation")
        if DicomKind.SEGMENTATION in self._kinds:
            self._save_all(anomaly_maps(self._results, self._source), folder, "anomaly_map")
        if DicomKind.REPORT in self._kinds:
            self._save(measurement_report(found, self._source, complete=complete), folder, "report")

    def _save_all(self, objects: Sequence[SegmentationObject], folder: Path, stem: str) -> None:
        for number, item in enumerate(objects, start=1):
            self._save(item.dataset, folder, stem if len(objects) == 1 else f"{stem}_{number:03d}")

    def _save(self, dataset: Dataset, folder: Path, stem: str) -> None:
        name = f"{stem}.dcm"
        with writing(folder / name), silence():
            dataset.save_as(folder / name, enforce_file_format=True)
        self.files.append(name)


def write_dicom_results(
    results: Iterable[AnomalyResult],
    source: DicomSource,
    folder: Path | str,
    kinds: Collection[str] = ALL_KINDS,
) -> list[Path]:
    """Write results of one source as DICOM files into a folder that is there.

    Args:
        results: of one source, each slice once.
        source: what they were detected on.
        folder: where files go.
        kinds: names of `DicomKind`s.

    Returns:
        The files.

    Raises:
        NotDicom: the source's header lacks what is asked of it.
        OutputFailed: a file cannot be written.
    """
    folder = Path(folder)
    sink = DicomSink(source, kinds)
    for result in results:
        sink.add(result, folder)
    sink.finish(folder)
    return [folder / name for name in sink.files]
