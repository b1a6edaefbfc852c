"""A detector that was taught: how it scores its own slices, and how it is kept among the user's detectors."""

from __future__ import annotations

import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import BundleManifest, save_bundle
from .errors import InvalidRequest
from .output_folder import writing

if TYPE_CHECKING:
    from .detectors.detector import AnomalyDetector

_LONGEST_NAME = 80
_LONGEST_FOLDER = 60
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


@dataclass(frozen=True)
class LeaveOneOut:
    """What the new detector says of one of its slices when its memory is without it and its near copies.

    Attributes:
        score: image score in [0, 1].
        marked_share: share of the slice's pixels at or above the pixel threshold, from 0 to 1.
    """

    score: float
    marked_share: float


class TaughtDetector:
    """A detector that is made and not kept yet. It lies in a temporary folder and is gone with this object.

    Attributes:
        bundle: the detector on disk; where it was kept, once it was.
        left_one_out: of each slice, in their order.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        detector: AnomalyDetector,
        card: str,
        left_one_out: Sequence[LeaveOneOut],
    ) -> None:
        """Write the detector to a temporary folder.

        Args:
            manifest, detector, card: as for `bundle.save_bundle`.
            left_one_out: of each slice.

        Raises:
            OutputFailed: it cannot be written; nothing of it is left.
        """
        with writing(Path(tempfile.gettempdir())):
            place = tempfile.TemporaryDirectory(prefix="medanomalyclip-", ignore_cleanup_errors=True)
        try:
            self.bundle = save_bundle(Path(place.name) / folder_name(manifest.name), manifest, detector, card)
        except BaseException:
            place.cleanup()
            raise
        self.left_one_out = tuple(left_one_out)
        self._place: tempfile.TemporaryDirectory | None = place

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    def worst_first(self) -> list[int]:
        """Places of the slices, that with the highest leave-one-out score first."""
        return sorted(range(len(self.left_one_out)), key=lambda place: -self.left_one_out[place].score)

    def keep(self, folder: Path | str) -> Path:
        """Store the detector in a folder of detectors, complete or not at all.

        Args:
            folder: made if it is not there.

        Returns:
            The detector's own folder in it, named after the detector and like no other there.

        Raises:
            InvalidRequest: it was kept or discarded before.
            OutputFailed: it cannot be written; the detector can still be kept elsewhere.
        """
        if self._place is None:
            raise InvalidRequest("This detector was kept or discarded before; teach it again")
        folder = Path(folder).absolute()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".taught-", suffix=".partial", dir=folder))
            try:
                partial.chmod(0o755)
                try:
                    shutil.copytree(self.bundle.folder, partial, dirs_exist_ok=True)
                except shutil.Error as error:  # a list of what went wrong with each file
                    raise OSError(error.args[0][0][2]) from error
                place = _take_free_place(partial, folder, folder_name(self.name))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self.bundle = replace(self.bundle, folder=place)
        self.discard()
        return place

    def discard(self) -> None:
        """Remove what is temporary; what was kept stays."""
        if self._place is not None:
            self._place.cleanup()
            self._place = None


def checked_name(name: str) -> str:
    """A detector's name in one line.

    Raises:
        InvalidRequest: it is empty or very long.
    """
    words = " ".join(name.split())
    if not words or len(words) > _LONGEST_NAME or not words.isprintable():
        raise InvalidRequest(
            f"Give the detector a name of 1 to {_LONGEST_NAME} characters, for example that of the scanner "
            "and protocol; leave out patients' names"
        )
    return words


def folder_name(name: str) -> str:
    """A name for a folder that every file system takes, from the name of a detector."""
    safe = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFKC", name)).strip("-._")
    safe = safe[:_LONGEST_FOLDER].rstrip("-._")
    return f"detector-{safe}".rstrip("-") if not safe or _RESERVED.fullmatch(safe) else safe


def _take_free_place(partial: Path, folder: Path, stem: str) -> Path:
    """Give a finished folder the first name that is free; one that somebody takes meanwhile is not."""
    for number in count(1):
        place = folder / (stem if number == 1 else f"{stem}-{number}")
        if place.exists():
            continue
        try:
            return partial.rename(place)
        except OSError:
            if not place.exists():
                raise
    raise AssertionError("unreachable: numbers do not end")
