"""Series of an archive as the inputs of a batch: found by a query, fetched when they are read, removed after.

A DICOMweb `Archive` and a query in; `ArchivedSeries` out, which a batch takes as it takes files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .batch_source import hashed
from .dicom_output.terms import SERIES_DESCRIPTION
from .dicomweb import Archive, Attributes, check_count, first, tag
from .errors import ArchiveFailed, InvalidRequest, SeriesAmbiguous
from .output_folder import Staging, writing
from .volume import Volume, read_volume

# Attributes that are matched against each series; all others, against its study (PS3.4 tables C.6-3, C.6-4).
_OF_SERIES = (
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "SeriesDate", "SeriesTime"),
    *("BodyPartExamined", "Laterality", "ProtocolName", "OperatorsName", "PerformingPhysicianName"),
    *("PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "Manufacturer", "StationName"),
)
_NO_IMAGES = (
    *("ANN", "ASMT", "AU", "DOC", "ECG", "EPS", "FID", "HC", "HD", "KER", "KO", "LEN", "M3D", "PLAN", "POS"),
    *(
        "PR",
        "REG",
        "RESP",
        "RTDOSE",
        "RTINTENT",
        "RTPLAN",
        "RTRAD",
        "RTRECORD",
        "RTSEGANN",
        "RTSTRUCT",
        "RWV",
    ),
    *("SEG", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP"),
)
_OUR_MARK = SERIES_DESCRIPTION.format(what="")


@dataclass(frozen=True)
class ArchivedSeries:
    """One series of an archive. Its `repr` tells no UID, since other libraries' logs may print it.

    Attributes:
        archive: where it is.
        study_uid, series: its StudyInstanceUID and SeriesInstanceUID.
        place: modality, date and UID for the terminal.
        images: how many files it has; 0 where the archive does not tell.
        problem: see `SeriesInput`.
    """

    archive: Archive
    study_uid: str = field(repr=False)
    series: str = field(repr=False)
    place: str = field(repr=False)
    images: int = 0
    problem: str = ""

    @property
    def key(self) -> str:
        return hashed(self.series)

    @property
    def study(self) -> str:
        return hashed(self.study_uid)

    @contextmanager
    def opened(
        self, modality: str | None, is_stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Volume]:
        """The image, in a folder of this computer's temporary files that only its user can open.

        The folder goes when the context ends; if the process is killed before, then when the series is
        fetched the next time.
        """
        if self.images:
            check_count(self.images)
        place = Path(tempfile.gettempdir()) / f"medanomalyclip-{self.key}"
        with writing(place):
            staging = Staging(place)
        try:
            with writing(place):
                staging.folder.chmod(0o700)
                folder = staging.folder / "series"
                folder.mkdir()
            fetched = self.archive.connect().fetch(self.study_uid, self.series, folder, is_stopped=is_stopped)
            if fetched < self.images:
                raise ArchiveFailed(f"The archive sent {fetched} of the {self.images} files of the series")
            yield _only_volume(folder, modality)
        finally:
            staging.discard()

    def private_words(self) -> set[str]:
        return {self.study_uid, self.series}


def _only_volume(folder: Path, modality: str | None) -> Volume:
    try:
        return read_volume(folder, modality=modality)
    except SeriesAmbiguous as error:
        raise SeriesAmbiguous(
            f"The series makes {len(error.choices)} volumes, for example time points or echoes, of which "
            "none can be chosen in an archive: fetch it, and give its folder to batch",
            error.choices,
        ) from None


def parse_query(words: Sequence[str]) -> dict[str, str]:
    """A query as typed, "Keyword=value" each, with DICOM's keywords.

    Raises:
        InvalidRequest: a word that is none of that.
    """
    query = {}
    for word in words:
        keyword, _, value = word.partition("=")
        if not (keyword and value and tag(keyword)):
            raise InvalidRequest(
                "The query wants DICOM keywords with values, such as StudyDate=20260101-20260131, "
                f"not {keyword!r}"
            )
        query[keyword] = value
    return query


def search_archive(archive: Archive, query: Mapping[str, str]) -> Iterator[ArchivedSeries]:
    """Every series of images in the studies that match, as the archive finds them.

    Series that hold no images are passed over, and so are the pictures that earlier results were stored as.

    Args:
        archive: where to look.
        query: attributes by DICOM keyword. Those of a series ("Modality", "SeriesDescription", ...) are
            matched against each series, all others against its study; values match as QIDO-RS has it:
            "20260101-20260131" is a range of dates, "*" stands for any text.

    Raises:
        ArchiveFailed: the archive cannot be reached, or refuses.
        InvalidRequest: nothing matches.
    """
    of_series = {keyword: value for keyword, value in query.items() if keyword in _OF_SERIES}
    of_study = {keyword: value for keyword, value in query.items() if keyword not in _OF_SERIES}
    connection = archive.connect()
    found = False
    for study in connection.studies(of_study):
        for series in connection.series(first(study, "StudyInstanceUID"), of_series):
            if first(series, "Modality") in _NO_IMAGES or is_result(series):
                continue
            found = True
            yield _item(archive, study, series)
    if not found:
        raise InvalidRequest("The archive has no series of images that matches the query")


def is_result(series: Attributes) -> bool:
    """Whether a series is called as those are that our results are stored in."""
    return first(series, "SeriesDescription").endswith(_OUR_MARK)


def _item(archive: Archive, study: Attributes, series: Attributes) -> ArchivedSeries:
    told = first(series, "NumberOfSeriesRelatedInstances")
    uid = first(series, "SeriesInstanceUID")
    words = (first(series, "Modality"), first(study, "StudyDate"), first(series, "SeriesDescription"), uid)
    return ArchivedSeries(
        archive,
        first(study, "StudyInstanceUID"),
        uid,
        "".join(filter(str.isprintable, " ".join(filter(None, words)))),
        int(told) if told.isdecimal() else 0,
    )
