"""The DICOM image that results refer to: whose it is, in which study, and where its frames lie.

A `Volume` that was read from DICOM in, `DicomSource` out. Headers are read here, when results are written,
and nowhere before, so that no patient's identity goes through the rest of the program.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dicom_header import read_header
from ..dicom_pixels import open_dataset
from ..errors import DependencyMissing, MedAnomalyCLIPError, NotDicom
from ..geometry import SlicePlane
from ..volume import RAS_FROM_LPS, Volume, reading, shown_name

if TYPE_CHECKING:
    from pydicom import Dataset

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Every object states them, if only as unknown (PS3.3 C.7.1.1, C.7.2.1).
_STATED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
_SEXES = ("M", "F", "O")
_PLACE = (
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DetectorInformationSequence"),
)


@dataclass(frozen=True, eq=False)
class DicomSource:
    """What results refer to, read from the headers of their image.

    Attributes:
        headers: one for each file, without pixels; places are those of the volume, as both single- and
            multi-frame images state them, so that what is made of them need not tell the two apart.
        frames: of each slice along K: which header, and which frame in it, from 1.
        placed: whether the frames lie in a patient coordinate system; if not, results have to lie on the
            frames' own pixels.
        patient_spacing: whether the header states the size of a pixel in the patient, not at a detector.
        frame_shape: (rows, columns) of a frame.
    """

    headers: tuple[Dataset, ...]
    frames: tuple[tuple[int, int], ...]
    placed: bool
    patient_spacing: bool
    frame_shape: tuple[int, int]

    @classmethod
    def of_volume(cls, volume: Volume) -> DicomSource:
        """Read the headers of the files that a volume was read from.

        Raises:
            NotDicom: it did not come from DICOM, or its headers lack what results have to refer to.
            DependencyMissing: highdicom is not installed.
            UnreadableImage: a file is gone or damaged.
        """
        require_highdicom()
        if not volume.frames:
            raise NotDicom(
                "Only what is detected on a DICOM image can be written as DICOM: a segmentation, report or "
                "capture belongs to a patient, a study and the images it was made from, which other formats "
                "do not tell. Take the DICOM files, or leave DICOM output out"
            )
        paths = list(dict.fromkeys(frame.path for frame in volume.frames))
        headers = [_read_identity(path) for path in paths]
        index_of = {path: index for index, path in enumerate(paths)}
        frames = tuple((index_of[frame.path], frame.number) for frame in volume.frames)
        first = read_header(paths[0])
        has_place = first is not None and first.places is not None
        if has_place and not all(header.get("FrameOfReferenceUID") for header in headers):
            raise NotDicom(
                f"{shown_name(paths[0])} says where it lies, but in no FrameOfReferenceUID, which DICOM "
                "objects made of it have to refer to"
            )
        placed = has_place
        patient_spacing = bool(
            headers[0].get("PixelSpacing") or headers[0].get("SequenceOfUltrasoundRegions")
        )
        with _stating(paths[0]):
            _check_frames(paths, headers, frames)
            if placed:
                _state_places(headers, frames, volume)
            else:
                for header in headers:
                    _forget_place(header)
        shape = (volume.size[1], volume.size[0])
        return cls(tuple(headers), frames, placed, placed or patient_spacing, shape)

    @property
    def first(self) -> Dataset:
        return self.headers[0]

    @property
    def is_multi_frame(self) -> bool:
        return len(self.headers) == 1 and len(self.frames) > 1

    def header_of(self, index: int) -> Dataset:
        """The header of the file that a slice along K is in."""
        return self.headers[self.frames[index][0]]

    def stated_orientation(self, plane: SlicePlane) -> list[str] | None:
        """What a header without a place says of a frame's directions, if the plane shows it unturned."""
        turn = plane.aligned
        if turn is None or turn.transpose or turn.flip_rows or turn.flip_columns:
            return None
        return list(self.first.get("PatientOrientation") or []) or None

    def frame_number(self, index: int) -> int | None:
        """The frame of a slice along K in its file, from 1; None for a file of one frame."""
        return self.frames[index][1] if self.is_multi_frame else None


def require_highdicom() -> None:
    """Raise DependencyMissing unless highdicom can be imported."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise DependencyMissing(
            f"Python package {error.name} is not installed, which DICOM output needs: pip install highdicom "
            "(in Slicer's Python console: slicer.util.pip_install('highdicom'))"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep what highdicom and pydicom say of odd headers from being printed: they quote names of patients."""
    loggers = [logging.getLogger(name) for name in ("highdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def making(what: str) -> Iterator[None]:
    """Turn highdicom's refusal of a source into one typed error, whose message quotes no header.

    highdicom checks source headers as it copies from them, and raises Python's own errors.
    """
    try:
        with silence():
            yield
    except MedAnomalyCLIPError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise NotDicom(
            f"No DICOM {what} can be made for this image: its header lacks, or contradicts, what the "
            f"standard asks of its kind ({type(error).__name__}). Leave this output out, or mend the header"
        ) from error


@contextmanager
def _stating(path: Path) -> Iterator[None]:
    with reading(path, "DICOM", fault="its header states places that contradict each other"):
        yield


def _read_identity(path: Path) -> Dataset:
    """Header without pixels and private elements, in UTF-8, with all that any object has to state."""
    from pydicom.valuerep import DA, TM

    with reading(path, "DICOM"):
        header = open_dataset(path, pixels=False)
        header.remove_private_tags()
        header.decode()
        header.SpecificCharacterSet = "ISO_IR 192"
        # Stored as another kind of element, a name say, it is no identifier that anything could refer to.
        missing = [k for k in _NEEDED if not header.get(k) or not isinstance(header.get(k), str)]
        if missing:
            raise NotDicom(
                f"{shown_name(path)} has no {missing[0]}, which DICOM objects made of it have to refer to"
            )
        for keyword in _STATED:
            if header.get(keyword) is None:
                setattr(header, keyword, "")
        if header.PatientSex not in _SEXES:
            header.PatientSex = ""
        if header.get("LossyImageCompression") not in ("00", "01"):
            header.pop("LossyImageCompression", None)
        for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
            # Full stops and colons are ACR-NEMA's way, which the standard does not allow any more.
            text = str(header[keyword].value)
            text = text.replace(".", "") if kind is DA else text.replace(":", "")
            setattr(header, keyword, text if _is_readable(kind, text) else "")
    return header


def _is_readable(kind: Any, value: object) -> bool:
    try:
        kind(value)
    except (ValueError, TypeError):
        return False
    return True


def _check_frames(paths: list[Path], headers: list[Dataset], frames: tuple[tuple[int, int], ...]) -> None:
    """Refuse a file of several frames whose kind has one: no reference could name one of them."""
    # highdicom's public face does not offer this, so its version is bounded in pyproject.toml.
    from highdicom._standard_utils import is_multiframe_image

    if len(frames) > len(headers) and not is_multiframe_image(headers[0]):
        raise NotDicom(
            f"{shown_name(paths[0])} holds several frames, but is of a kind that has one, so that no result "
            "can refer to one of them: split it into files of one frame"
        )


def _state_places(headers: list[Dataset], frames: tuple[tuple[int, int], ...], volume: Volume) -> None:
    """State in each header where the frames of the volume lie, as single- and multi-frame images do."""
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
    from pydicom import Dataset

    to_lps = RAS_FROM_LPS @ volume.ijk_to_ras
    steps = np.linalg.norm(to_lps[:3, :3], axis=0)
    orientation = PlaneOrientationSequence("PATIENT", unit_directions(to_lps))
    across = np.cross(*(to_lps[:3, axis] / steps[axis] for axis in (0, 1)))
    between = float(abs(across @ to_lps[:3, 2]))
    measures = PixelMeasuresSequence([float(steps[1]), float(steps[0])], between, between)
    for which, header in enumerate(headers):
        own = sorted((number, k) for k, (index, number) in enumerate(frames) if index == which)
        positions = [
            PlanePositionSequence("PATIENT", [float(x) for x in to_lps[:3, 3] + k * to_lps[:3, 2]])
            for _, k in own
        ]
        shared = Dataset()
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = orientation, measures
        per_frame = []
        for position in positions:
            item = Dataset()
            item.PlanePositionSequence = position
            per_frame.append(item)
        header.SharedFunctionalGroupsSequence = [shared]
        header.PerFrameFunctionalGroupsSequence = per_frame
        header.NumberOfFrames = len(per_frame)
        header.ImagePositionPatient = positions[0][0].ImagePositionPatient
        header.ImageOrientationPatient = orientation[0].ImageOrientationPatient
        header.PixelSpacing = measures[0].PixelSpacing
        header.SliceThickness = measures[0].SliceThickness
        header.SpacingBetweenSlices = measures[0].SpacingBetweenSlices


def _forget_place(header: Dataset) -> None:
    """Leave nothing that half states a place; the frames' own pixels are what there is to refer to."""
    from highdicom import PixelMeasuresSequence
    from pydicom import Dataset

    for keyword in (*_PLACE, "PixelSpacing"):
        if keyword in header:
            delattr(header, keyword)
    header.NumberOfFrames = 1  # results are made for one frame after the other
    shared = Dataset()
    shared.PixelMeasuresSequence = PixelMeasuresSequence([1.0, 1.0], None)
    header.SharedFunctionalGroupsSequence = [shared]


def unit_directions(grid: np.ndarray) -> list[float]:
    """Six cosines: along a row and down a column of a 4x4 grid."""
    columns = grid[:3, :2] / np.linalg.norm(grid[:3, :2], axis=0)
    return [float(x) for x in columns.T.ravel()]
