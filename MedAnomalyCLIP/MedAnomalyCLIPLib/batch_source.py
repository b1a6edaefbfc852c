"""Where a batch gets its series from: anything that gives one `SeriesInput` after the other.

`search` finds them in files and folders, `dicomweb_source.search_archive` in an archive on the network.
Another source is another iterable of objects with the same few attributes; nothing else has to know.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import InvalidRequest, MedAnomalyCLIPError, UnreadableImage
from .volume import list_contents, read_volume, reading, recognise, shown_name

if TYPE_CHECKING:
    from .volume import Volume

_SEGMENTATION = ".seg.nrrd"


class SeriesInput(Protocol):
    """One series: what is detected on, and recorded, as a whole. It is sent to other processes by pickle.

    Attributes:
        key: the same for the same series in every run, and no name.
        study: the same for all series of one study, and no name.
        place: where it is, for the terminal only: it may name the patient.
        problem: why it cannot be read; empty when nothing stands against it.
    """

    @property
    def key(self) -> str: ...

    @property
    def study(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def problem(self) -> str: ...

    def opened(self, modality: str | None, is_stopped: Callable[[], bool]) -> AbstractContextManager[Volume]:
        """The image; its files stay while the context lasts. Errors as of `read_volume`, and `Cancelled`."""

    def private_words(self) -> set[str]:
        """Names that no message may repeat."""


SeriesSource = Iterable[SeriesInput]


@dataclass(frozen=True)
class FileInput:
    """One image file, or one series of a folder of DICOM files.

    Its `repr` tells none of its names, since other libraries' logs may print it.

    Attributes:
        path: the file or folder.
        place: its path from the INPUT on that it was found in.
        series: which series of a folder; empty for a file.
        problem: see `SeriesInput`.
        study_uid: hash of the DICOM study; empty for other files, which belong with those of their folder.
    """

    path: Path = field(repr=False)
    place: str = field(repr=False)
    series: str = field(default="", repr=False)
    problem: str = field(default="", repr=False)
    study_uid: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        return hashed(f"{self.place}\n{self.series}")

    @property
    def study(self) -> str:
        return self.study_uid or hashed(Path(self.place).parent.as_posix())

    def opened(
        self, modality: str | None, is_stopped: Callable[[], bool] = lambda: False
    ) -> AbstractContextManager[Volume]:
        return nullcontext(read_volume(self.path, series=self.series or None, modality=modality))

    def private_words(self) -> set[str]:
        names = {*Path(self.place).parts, self.path.name, self.path.stem, self.series}
        if self.path.is_dir():
            names |= {name for path in self.path.rglob("*") for name in (path.name, path.stem)}
        return names


def hashed(text: str) -> str:
    """A key that tells no name."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def search(places: Sequence[Path | str], *, leave_out: Path | str | None = None) -> Iterator[FileInput]:
    """Every image and series in files, folders and their subfolders, in the order of their paths.

    Files are known by their content. Hidden files, segmentations and whatever is no image are passed over.
    They are found while one goes on, so that an archive need not be searched to its end before work begins.

    Args:
        places: where to look. What is found is known by its path from there on.
        leave_out: a folder not to look into, for results that lie within.

    Raises:
        UnreadableImage: a place is not there, or holds no image.
        InvalidRequest: two places have the same name, so that what they hold could be taken for one another.
    """
    roots = [Path(place) for place in places]
    names = [shown_name(root.resolve()) for root in roots]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"Two inputs are called {name}; give the folder that holds both instead")
    for root, name in zip(roots, names, strict=True):
        if not root.exists():
            raise UnreadableImage(f"{name} is not there; give image files, or folders that hold images")
    hidden = None if leave_out is None else Path(leave_out).resolve()
    return _search(list(zip(roots, names, strict=True)), hidden)


def _search(roots: Sequence[tuple[Path, str]], hidden: Path | None) -> Iterator[FileInput]:
    for root, name in roots:
        found = False
        for item in _walk(root, name, hidden, within_dicom=False) if root.is_dir() else _file(root, name):
            found = True
            yield item
        if not found:
            problem = f"{name} holds no image that can be read"
            if len(roots) == 1:
                raise UnreadableImage(problem)
            yield FileInput(root, name, problem=problem)


def _file(path: Path, place: str) -> Iterator[FileInput]:
    if not _kind(path):
        return
    try:
        (summary,) = list_contents(path)
        yield FileInput(path, place, study_uid=summary.study)
    except MedAnomalyCLIPError as error:
        yield FileInput(path, place, problem=str(error))


def _walk(folder: Path, place: str, hidden: Path | None, *, within_dicom: bool) -> Iterator[FileInput]:
    files: list[Path] = []
    folders: list[Path] = []
    try:
        with reading(folder, "folder"):
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") or path.resolve() == hidden:
                    continue
                (folders if path.is_dir() else files).append(path)
    except MedAnomalyCLIPError as error:
        yield FileInput(folder, place, problem=str(error))
        return
    kinds = {path: _kind(path) for path in files}
    if "DICOM" in kinds.values() and not within_dicom:
        within_dicom = True  # series are gathered from here downward
        yield from _series(folder, place)
    for path, kind in kinds.items():
        if kind and kind != "DICOM" and not path.name.lower().endswith(_SEGMENTATION):
            yield FileInput(path, f"{place}/{path.name}")
    for path in folders:
        yield from _walk(path, f"{place}/{path.name}", hidden, within_dicom=within_dicom)


def _kind(path: Path) -> str:
    try:
        return recognise(path) if path.is_file() else ""
    except OSError:
        return ""


def _series(folder: Path, place: str) -> Iterator[FileInput]:
    try:
        summaries = list_contents(folder)
    except MedAnomalyCLIPError as error:
        yield FileInput(folder, place, problem=str(error))
        return
    for summary in summaries:
        yield FileInput(folder, place, summary.identifier, study_uid=summary.study)


class SearchAhead:
    """Goes through a source on a thread of its own, some way ahead of who takes the series from it.

    So work begins with the first series, what waits has a bound, and how many there are is soon known.

    Attributes:
        found: series found so far.
        complete: whether those are all.
    """

    def __init__(self, source: SeriesSource, *, most_waiting: int = 10_000) -> None:
        self.found = 0
        self.complete = False
        self._waiting: queue.Queue[SeriesInput | BaseException | None] = queue.Queue(most_waiting)
        self._settled = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._search, args=(source,), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until the search has come to its end, but no longer than some seconds."""
        self._settled.wait(seconds)

    def close(self) -> None:
        """Search no further."""
        self._closed = True

    def __iter__(self) -> Iterator[SeriesInput]:
        """What was found, in order; ends where the source does, and raises what it raises."""
        while (item := self._waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _search(self, source: SeriesSource) -> None:
        try:
            for item in source:
                self._put(item)
                self.found += 1
                if self._closed:
                    return
            self.complete = True
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self._settled.set()

    def _put(self, item: SeriesInput | BaseException | None) -> None:
        while not self._closed:
            with suppress(queue.Full):
                self._waiting.put(item, timeout=0.2)
                return
            self._settled.set()  # no use in waiting for the end
