"""The one family of errors that a user can cause and a user can mend.

Every message says what is wrong, with what, and what to do. Each face catches `MedAnomalyCLIPError` once:
the command line prints it and exits 2, the panel shows it, a script catches it. Bugs are not caught.
"""

from __future__ import annotations

from collections.abc import Sequence


class MedAnomalyCLIPError(Exception):
    """Base of all errors whose message is meant for the user."""


class UnreadableImage(MedAnomalyCLIPError):
    """A file that cannot be read: missing, empty, truncated, or not an image."""


class UnsupportedImage(MedAnomalyCLIPError):
    """An image that can be read but not used: no slices, no finite pixel, an unknown pixel layout."""


class NotDicom(MedAnomalyCLIPError):
    """An image whose results cannot be written as DICOM: it does not come from DICOM, or says too little."""


class SeriesAmbiguous(MedAnomalyCLIPError):
    """A folder that holds several series, of which the user has to choose one.

    Attributes:
        choices: one line for each series, starting with the identifier to pass on.
    """

    def __init__(self, message: str, choices: Sequence[str]) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


class GeometryRefused(MedAnomalyCLIPError):
    """A position that cannot be mapped exactly: singular matrix, plane outside the volume, uneven slices."""


class InvalidRequest(MedAnomalyCLIPError):
    """A request that does not fit the data: a slice out of range, an unknown axis, a bad threshold."""


class BundleInvalid(MedAnomalyCLIPError):
    """A detector on disk that is incomplete, altered, or not understood."""


class DependencyMissing(MedAnomalyCLIPError):
    """A Python package that this step needs and that cannot be imported."""


def needs_full(what: str, error: ImportError) -> DependencyMissing:
    """The error for something that the light installation leaves out; `what` begins its sentence."""
    return DependencyMissing(
        f"{what} the Python package {error.name}, which is not installed. In Slicer, click Install full "
        "in the section Setup; elsewhere: pip install 'medanomalyclip[full]'"
    )


class DeviceMemoryExhausted(MedAnomalyCLIPError):
    """A GPU whose memory does not hold a single image's share of a detector's work."""


class OutputFailed(MedAnomalyCLIPError):
    """A result that could not be written: unwritable folder, full disk, existing files."""


class ClusterFailed(MedAnomalyCLIPError):
    """Workers that cannot be started or reached, or a scheduler that was lost. What was done is kept."""


class ArchiveFailed(MedAnomalyCLIPError):
    """An archive on the network that cannot be reached, refuses what it is asked, or answers strangely."""


class Cancelled(MedAnomalyCLIPError):
    """The user stopped the run."""


class DatasetInvalid(MedAnomalyCLIPError):
    """A set of images that cannot be used as it is: files missing or damaged, labels or masks that clash."""
