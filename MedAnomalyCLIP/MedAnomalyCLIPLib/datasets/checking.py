"""Whether a set of images can be used, told before hours are spent on it.

Records in, one report out: how many images of which kind there are, and everything that is wrong with them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..bundle import file_sha256
from ..errors import Cancelled, DatasetInvalid, MedAnomalyCLIPError
from ..plain_files import is_file
from .planes import read_mask, read_record_volume
from .records import ImageRecord

_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """One kind of fault and where it was found.

    Attributes:
        kind: what is wrong, in words.
        places: files or sets that have it.
        fatal: whether figures would be wrong or missing; otherwise it is worth knowing.
    """

    kind: str
    places: tuple[str, ...]
    fatal: bool = True

    def describe(self) -> str:
        """One line for people, with the first few places."""
        more = f" and {len(self.places) - _SHOWN} more" if len(self.places) > _SHOWN else ""
        weight = "error" if self.fatal else "note"
        return f"{weight}: {self.kind} ({len(self.places)}): {'; '.join(self.places[:_SHOWN])}{more}"


@dataclass(frozen=True)
class Count:
    """How many images one split of a set has, and how many of the abnormal ones have a mask."""

    set: str
    split: str
    normal: int
    abnormal: int
    masks: int
    unlabelled: int


@dataclass(frozen=True)
class DatasetReport:
    """What is there, and what is wrong with it.

    Attributes:
        counts: one for each split of each set.
        problems: fatal ones first.
    """

    counts: tuple[Count, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        return not any(problem.fatal for problem in self.problems)

    def describe(self) -> str:
        """The report as lines of text."""
        lines = [
            f"{c.set}, {c.split}: {c.normal} normal, {c.abnormal} abnormal ({c.masks} with a mask)"
            + (f", {c.unlabelled} without a label" if c.unlabelled else "")
            for c in self.counts
        ]
        return "\n".join([*lines, *(problem.describe() for problem in self.problems)])

    def require(self) -> None:
        """Raise DatasetInvalid with the whole report unless the set is usable."""
        if not self.usable:
            raise DatasetInvalid(f"The images cannot be used as they are\n{self.describe()}")


def check_records(
    records: Sequence[ImageRecord],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> DatasetReport:
    """Open every image and mask, and compare them with each other and with their labels.

    Args:
        records: the images.
        on_progress: called with the number of files done and to do.
        is_cancelled: asked before each file.

    Raises:
        Cancelled: `is_cancelled` said so.
    """
    faults = _Faults(records)
    files: dict[Path, list[ImageRecord]] = defaultdict(list)
    for record in records:
        files[record.path].append(record)
    hashes: dict[str, list[Path]] = defaultdict(list)
    for done, (path, shown) in enumerate(files.items(), start=1):
        if is_cancelled is not None and is_cancelled():
            raise Cancelled(f"Stopped after {done - 1} of {len(files)} files")
        with suppress(OSError):  # of what cannot be read, `_check_file` tells
            if is_file(path):
                hashes[file_sha256(path)].append(path)
        _check_file(shown, faults)
        if on_progress is not None:
            on_progress(done, len(files))
    _check_copies([[r for path in paths for r in files[path]] for paths in hashes.values()], faults)
    _check_clusters(records, faults)
    counts = count_records(records)
    _check_counts(counts, faults)
    if not records:
        faults.add("there are no images", "the list is empty")
    return DatasetReport(counts, faults.problems())


def count_records(records: Iterable[ImageRecord]) -> tuple[Count, ...]:
    """Numbers of images for each split of each set, in the order in which they come."""
    groups: dict[tuple[str, str], list[ImageRecord]] = defaultdict(list)
    for record in records:
        groups[record.set, record.split].append(record)
    return tuple(
        Count(
            set=name,
            split=split,
            normal=sum(r.abnormal is False for r in group),
            abnormal=sum(r.abnormal is True for r in group),
            masks=sum(r.abnormal is True and r.mask is not None for r in group),
            unlabelled=sum(r.abnormal is None for r in group),
        )
        for (name, split), group in groups.items()
    )


class _Faults:
    """Collects faults by kind; files are named below the folder that all of them share."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        parents = [str(record.path.absolute().parent) for record in records]
        self._root = os.path.commonpath(parents) if parents else ""
        self._places: dict[tuple[bool, str], dict[str, None]] = defaultdict(dict)

    def add(self, kind: str, place: Path | str, *, fatal: bool = True) -> None:
        name = place if isinstance(place, str) else self.name(place)
        self._places[fatal, kind][name] = None

    def name(self, path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), self._root)).as_posix()

    def problems(self) -> tuple[Problem, ...]:
        found = sorted(self._places.items(), key=lambda item: not item[0][0])
        return tuple(Problem(kind, tuple(places), fatal) for (fatal, kind), places in found)


def _check_file(records: Sequence[ImageRecord], faults: _Faults) -> None:
    """One image file, a volume perhaps, and the mask of each record that it has."""
    path = records[0].path
    if not is_file(path):
        faults.add("image missing", path)
        return
    try:
        volume = read_record_volume(records[0])
    except MedAnomalyCLIPError as error:
        faults.add("image cannot be read", f"{faults.name(path)} ({error})")
        return
    if len(records) > len({record.slice_at for record in records}):
        faults.add("image listed twice", path)
    for record in records:
        axis, index = record.slice_at or (2, 0)
        if index >= volume.size[axis]:
            faults.add("slice beyond the end of its volume", f"{faults.name(path)}, slice {index + 1}")
        elif record.mask is not None:
            _check_mask(record, record.mask, volume.voxels.shape[:3], faults)


def _check_mask(record: ImageRecord, path: Path, shape: tuple[int, ...], faults: _Faults) -> None:
    if not is_file(path):
        faults.add("mask missing", path)
        return
    try:
        mask = read_mask(path)
    except MedAnomalyCLIPError as error:
        faults.add("mask cannot be read", f"{faults.name(path)} ({error})")
        return
    if mask.shape != shape:
        sizes = f"{_size(mask.shape)}, not {_size(shape)}"
        faults.add("mask of another size than its image", f"{faults.name(path)}: {sizes}")
        return
    shown = mask if record.slice_at is None else mask.take(record.slice_at[1], axis=2 - record.slice_at[0])
    if record.abnormal and not shown.any():
        faults.add("mask of an abnormal image is empty", path)
    if record.abnormal is False and shown.any():
        faults.add("image is labelled normal but its mask is not empty", path)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(count) for count in (shape[:0:-1] if shape[0] == 1 else shape[::-1]))


def _check_copies(groups: Iterable[list[ImageRecord]], faults: _Faults) -> None:
    """Files of the same content: worse when they disagree, or stand on both sides of the test."""
    for group in groups:
        paths = list(dict.fromkeys(record.path for record in group))
        if len(paths) < 2:
            continue
        names = " = ".join(map(faults.name, paths))
        if len({record.abnormal for record in group if record.slice_at is None}) > 1:
            faults.add("the same image under two labels", names)
        elif _crosses_test(group):
            faults.add("the same image in the test split and outside it", names)
        else:
            faults.add("the same image more than once", names, fatal=False)


def _check_clusters(records: Iterable[ImageRecord], faults: _Faults) -> None:
    clusters: dict[tuple[str, str], list[ImageRecord]] = defaultdict(list)
    for record in records:
        if record.cluster:
            clusters[record.set, record.cluster].append(record)
    for (_, cluster), group in clusters.items():
        if _crosses_test(group):
            faults.add("one patient or cluster in the test split and outside it", cluster)


def _crosses_test(records: Iterable[ImageRecord]) -> bool:
    splits = {record.split for record in records}
    return "test" in splits and len(splits) > 1


def _check_counts(counts: Iterable[Count], faults: _Faults) -> None:
    for count in counts:
        place = f"{count.set}, {count.split}"
        if count.normal + count.abnormal == 0:
            continue
        is_test = count.split == "test"
        if count.normal == 0:
            faults.add("no normal images", place, fatal=is_test)
        if count.abnormal == 0 and is_test:
            faults.add("no abnormal images", place)
        if 0 < count.masks < count.abnormal:
            place = f"{place}: {count.abnormal - count.masks} of {count.abnormal}"
            faults.add("abnormal images without a mask, left out at pixel level", place, fatal=False)
