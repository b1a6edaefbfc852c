"""DICOM files and folders: which of them make one volume, in which order, and where it lies.

A file or folder in, `Volume` or `InputSummary` out; used by `volume.py` only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_header import DISCRIMINATORS, SAME_DIRECTION, FramePlaces, ImageHeader, read_header
from .dicom_pixels import read_frames, stack_values
from .errors import GeometryRefused, InvalidRequest, SeriesAmbiguous, UnreadableImage, UnsupportedImage
from .limits import VARIABLE, limits
from .volume import (
    RAS_FROM_LPS,
    DicomFrame,
    InputSummary,
    Volume,
    assemble,
    check_size,
    reading,
    recognise,
    shown_name,
)

_SAME_PLACE = 1e-3  # mm
_UNEVEN = (0.002, 0.01)  # mm, and share of a step: how far a slice may lie from its place in a regular grid


@dataclass(frozen=True, eq=False)
class _Stack:
    """Files that make one volume: many of one frame each, or one of any number of frames.

    Attributes:
        headers: the files.
        identifier: what the user passes to choose it; empty for a file read by itself.
    """

    headers: tuple[ImageHeader, ...]
    identifier: str = ""

    @property
    def first(self) -> ImageHeader:
        return self.headers[0]

    @property
    def slices(self) -> int:
        return sum(header.shape[0] for header in self.headers)

    @property
    def kind(self) -> str:
        if len(self.headers) > 1:
            return "DICOM series"
        return "DICOM multi-frame image" if self.slices > 1 else "DICOM image"


def read_dicom_file(path: Path, *, modality: str | None = None) -> Volume:
    """Read one DICOM file as a volume of its frames.

    Args:
        path: the file.
        modality: stands above what the file says.
    """
    return _read(_file_stack(path), path, modality)


def read_dicom_series(folder: Path, series: str | None = None, *, modality: str | None = None) -> Volume:
    """Read one series of a folder, its slices ordered by position along their normal.

    Args:
        folder: searched with its subfolders; files that are not DICOM are passed over.
        series: identifier of `InputSummary`, a series number, or a SeriesInstanceUID; may be left out when
            the folder holds one series.
        modality: stands above what the files say.
    """
    stacks = _folder_stacks(folder)
    chosen = stacks if series is None else [stack for stack in stacks if _answers_to(stack, series.strip())]
    if len(chosen) == 1:
        return _read(chosen[0], folder, modality)
    name = shown_name(folder)
    offered = chosen or stacks
    if series is None:
        message = f"{name} holds {len(stacks)} series; choose one with --series (in Python: series=...)"
    elif chosen:
        message = f"{name} holds {len(chosen)} series called {series!r}; choose one by its whole identifier"
    else:
        message = f"{name} holds no series {series!r}; it holds these {len(stacks)}"
    raise SeriesAmbiguous(message, choices=[_summary(stack, folder).describe() for stack in offered])


def summarise_dicom(path: Path) -> tuple[InputSummary, ...]:
    """What a DICOM file or folder holds, told from the headers."""
    stacks = _folder_stacks(path) if path.is_dir() else [_file_stack(path)]
    return tuple(_summary(stack, path) for stack in stacks)


def frames_on_grid(paths: Sequence[Path], volume: Volume) -> tuple[DicomFrame, ...]:
    """Where each slice along K of a volume comes from that another program read from DICOM files.

    Args:
        paths: the files, all of them.
        volume: as the other program has it; its slices may run against ours.

    Raises:
        UnsupportedImage: a file holds no image.
        GeometryRefused: the volume is not, or not any more, what the files hold, where they have it.
    """
    stack = _Stack(tuple(_file_stack(path).first for path in paths))
    order, matrix = _placed(stack, "The volume")
    frames = _frames(stack, order)
    _, rows, columns = stack.first.shape
    if volume.size != (columns, rows, stack.slices):
        raise GeometryRefused(
            "The volume has another size than its DICOM files: it was cropped or resampled since it was read"
        )
    if _all_places(stack.headers) is None:
        return frames
    if _same_corners(matrix, volume):
        return frames
    last = (0, 0, stack.slices - 1, 1)
    matrix[:3, 3], matrix[:3, 2] = (matrix @ last)[:3], -matrix[:3, 2]
    if _same_corners(matrix, volume):
        return frames[::-1]
    raise GeometryRefused(
        "The volume lies elsewhere than its DICOM files say, perhaps under a transform, so that DICOM "
        "results would miss them: detect on the volume as it was loaded"
    )


def _same_corners(ijk_to_ras: np.ndarray, volume: Volume) -> bool:
    """Whether the volume's corner voxels lie where a matrix has them, to a tenth of a voxel."""
    ends = [(0, count - 1) for count in volume.size]
    corners = np.array([[i, j, k, 1] for i in ends[0] for j in ends[1] for k in ends[2]])
    apart = corners @ (ijk_to_ras - volume.ijk_to_ras).T
    return bool(np.linalg.norm(apart, axis=1).max() <= min(volume.spacing) / 10)


def _read(stack: _Stack, path: Path, modality: str | None) -> Volume:
    """Voxels (K, J, I) with K along the normal of the slices."""
    order, matrix = _placed(stack, shown_name(path))
    _, rows, columns = stack.first.shape
    check_size(path, rows * columns * stack.slices * (3 if stack.first.colour else 1))
    if len(stack.headers) == 1:
        decoded = [read_frames(stack.first.path)]
        voxels = decoded[0].values
        voxels = voxels if np.array_equal(order, np.arange(len(order))) else voxels[order]
    else:
        decoded = [read_frames(stack.headers[index].path) for index in order]
        voxels = stack_values([frames.values[0] for frames in decoded])
    return assemble(
        path,
        voxels,
        matrix,
        modality=stack.first.modality if modality is None else modality,
        source=f"{stack.kind}, {stack.slices} {'slice' if stack.slices == 1 else 'slices'}",
        spacing_known=stack.first.spacing is not None,
        hounsfield=all(frames.hounsfield for frames in decoded),
        body_part=stack.first.body_part,
        frames=_frames(stack, order),
    )


def _frames(stack: _Stack, order: np.ndarray) -> tuple[DicomFrame, ...]:
    """Where each slice comes from, in the order of the slices."""
    if len(stack.headers) == 1:
        return tuple(DicomFrame(stack.first.path, int(index) + 1) for index in order)
    return tuple(DicomFrame(stack.headers[index].path, 1) for index in order)


def _summary(stack: _Stack, path: Path) -> InputSummary:
    first, problem = stack.first, ""
    rows_apart, columns_apart = first.spacing or (first.aspect, 1.0)
    spacing = (columns_apart, rows_apart, first.step)
    try:
        _, matrix = _placed(stack, shown_name(path))
        i, j, k = np.linalg.norm(matrix[:3, :3], axis=0)
        spacing = (float(i), float(j), float(k))
    except GeometryRefused as error:
        problem = str(error)
    size = (first.shape[2], first.shape[1], stack.slices)
    known = first.spacing is not None
    study = hashlib.sha256(first.study_uid.encode()).hexdigest()[:16] if first.study_uid else ""
    return InputSummary(stack.identifier, stack.kind, first.modality, size, spacing, known, problem, study)


def _file_stack(path: Path) -> _Stack:
    header = read_header(path)
    if header is None:
        raise UnsupportedImage(
            f"{shown_name(path)} is a DICOM file without an image, for example a report, a plan, a "
            "segmentation or an index (DICOMDIR): give an image, or the folder of a series"
        )
    return _Stack((header,))


# Series of a folder


def _folder_stacks(folder: Path) -> list[_Stack]:
    """The volumes that a folder holds, each with its identifier, in the order of their series numbers."""
    name = shown_name(folder)
    dicom, others = _files_by_content(folder)
    headers = [header for header in map(read_header, dicom) if header is not None]
    if headers:
        return _stacks(headers)
    if dicom:
        raise UnsupportedImage(f"{name} holds {len(dicom)} DICOM files, but none with an image")
    if others:
        raise UnreadableImage(
            f"{name} holds no DICOM files; give one image file instead of the folder, "
            f"for example {others[0].name}"
        )
    raise UnreadableImage(f"{name} holds no DICOM files")


def _files_by_content(folder: Path) -> tuple[list[Path], list[Path]]:
    """DICOM files and other image files in a folder and its subfolders."""
    dicom: list[Path] = []
    others: list[Path] = []
    seen = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        seen += len(names)
        if seen > limits().folder_files:
            raise InvalidRequest(
                f"{shown_name(folder)} holds more than {limits().folder_files:,} files: "
                f"give the folder of one study or series; {VARIABLE} moves the limit"
            )
        for path in (Path(place, name) for name in sorted(names)):
            if path.is_file():
                with reading(path, "image"):
                    kind = recognise(path)
                if kind:
                    (dicom if kind == "DICOM" else others).append(path)
    return dicom, others


def _stacks(headers: Iterable[ImageHeader]) -> list[_Stack]:
    """Group headers into volumes and name them: series number, hash of the UID, and the part if several."""
    series = _grouped(headers, lambda header: (header.series_number, header.series_uid))
    found = []
    for (number, uid), members in sorted(series.items(), key=lambda item: (int(item[0][0] or 0), item[0][1])):
        digest = hashlib.sha256(uid.encode()).hexdigest()[:6]
        identifier = f"{number}-{digest}" if number else digest
        parts = sorted(
            _volumes_of_series(members), key=lambda part: (min(h.instance for h in part), part[0].path)
        )
        for index, part in enumerate(parts, start=1):
            found.append(_Stack(tuple(part), identifier if len(parts) == 1 else f"{identifier}.{index}"))
    return found


def _volumes_of_series(headers: Sequence[ImageHeader]) -> list[list[ImageHeader]]:
    """Split one series into what can be one volume each.

    Multi-frame files and images without a place stand alone. The others share size, spacing and direction,
    and no two of them lie at one place, if anything in the headers tells such images apart.
    """
    volumes = [[header] for header in headers if header.places is None or header.shape[0] > 1]
    slices = [header for header in headers if header.places is not None and header.shape[0] == 1]
    kinds = _grouped(slices, lambda header: (header.shape, header.modality, header.colour, header.localizer))
    for members in kinds.values():
        grids: list[list[ImageHeader]] = []
        for header in members:
            grid = next((grid for grid in grids if _same_grid(grid[0], header)), None)
            if grid is None:
                grids.append([header])
            else:
                grid.append(header)
        for grid in grids:
            volumes.extend(_without_repeats(_without_copies(grid), range(len(DISCRIMINATORS))))
    return volumes


def _same_grid(one: ImageHeader, other: ImageHeader) -> bool:
    """Whether two slices have the same direction and spacing."""
    if one.places is None or other.places is None or one.problem != other.problem:
        return False
    if (one.spacing is None) != (other.spacing is None):
        return False
    close = np.abs(one.places.directions - other.places.directions).max() <= SAME_DIRECTION
    return bool(close) and np.allclose(one.spacing or (1, 1), other.spacing or (1, 1), rtol=1e-3, atol=0)


def _without_copies(headers: Sequence[ImageHeader]) -> list[ImageHeader]:
    """Leave out files that are the same, byte for byte, as another one of a series with repeated places."""
    if _count_places(headers) == len(headers):
        return list(headers)
    different: dict[bytes, ImageHeader] = {}
    for header in headers:
        with reading(header.path, "DICOM"):
            different.setdefault(hashlib.sha256(header.path.read_bytes()).digest(), header)
    return list(different.values())


def _without_repeats(headers: list[ImageHeader], discriminators: Sequence[int]) -> list[list[ImageHeader]]:
    """Split images that lie at one place by what tells them apart, for example their echo time.

    A split is taken only when each part covers all places; otherwise the images stay together, to be refused.
    """
    places = _count_places(headers)
    if places == len(headers) or not discriminators:
        return [headers]
    parts = list(_grouped(headers, lambda header: header.discriminators[discriminators[0]]).values())
    if len(parts) == 1 or any(_count_places(part) != places for part in parts):
        return _without_repeats(headers, discriminators[1:])
    return [volume for part in parts for volume in _without_repeats(part, discriminators[1:])]


def _count_places(headers: Sequence[ImageHeader]) -> int:
    """How many different positions along their normal the images have."""
    places = _all_places(headers)
    if places is None or not np.isfinite(places.positions).all():
        return len(headers)
    return 1 + int(np.count_nonzero(np.diff(np.sort(places.positions @ places.normal)) > _SAME_PLACE))


def _grouped(
    headers: Iterable[ImageHeader], key: Callable[[ImageHeader], Hashable]
) -> dict[Any, list[ImageHeader]]:
    groups: dict[Any, list[ImageHeader]] = {}
    for header in headers:
        groups.setdefault(key(header), []).append(header)
    return groups


def _answers_to(stack: _Stack, series: str) -> bool:
    return series in (stack.identifier, stack.first.series_number, stack.first.series_uid)


# Geometry


def _all_places(headers: Sequence[ImageHeader]) -> FramePlaces | None:
    """Places of the frames of all files in turn; None when a file has none."""
    places = [header.places for header in headers if header.places is not None]
    if len(places) < len(headers):
        return None
    return FramePlaces(
        np.concatenate([place.directions for place in places]),
        np.concatenate([place.positions for place in places]),
    )


def _placed(stack: _Stack, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(slices,) order along the normal, and 4x4 ijk_to_ras in mm."""
    first = stack.first
    problem = next((header.problem for header in stack.headers if header.problem), "")
    if problem:
        raise GeometryRefused(f"{name} cannot be placed: {problem}")
    rows_apart, columns_apart = first.spacing or (first.aspect, 1.0)
    matrix = np.diag([columns_apart, rows_apart, first.step, 1.0])
    places = _all_places(stack.headers)
    if places is None:
        return np.arange(stack.slices), RAS_FROM_LPS @ matrix
    order = np.argsort(places.positions @ places.normal, kind="stable")
    positions = places.positions[order]
    matrix[:3, 0] = places.along_row * columns_apart
    matrix[:3, 1] = places.down_column * rows_apart
    matrix[:3, 2] = places.normal * first.step
    if len(positions) > 1:
        _check_even(positions, positions @ places.normal, name)
        # The true way from slice to slice, which a tilted gantry turns away from the normal.
        matrix[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    matrix[:3, 3] = positions[0]
    return order, RAS_FROM_LPS @ matrix


def _check_even(positions: np.ndarray, depths: np.ndarray, name: str) -> None:
    """Refuse slices that do not lie on a regular grid.

    Args:
        positions: (N, 3) mm, ordered along the normal.
        depths: (N,) mm along the normal.
        name: the file or folder, for the message.
    """
    count = len(positions)
    gaps = np.diff(depths)
    repeated = int(np.count_nonzero(gaps <= _SAME_PLACE))
    if repeated:
        raise GeometryRefused(
            f"{name} has {count} slices at {count - repeated} places: time points, echoes or copies "
            "are mixed. Keep one slice for each place in a folder of its own"
        )
    step = (positions[-1] - positions[0]) / (count - 1)
    astray = np.linalg.norm(positions - (positions[0] + np.arange(count)[:, None] * step), axis=1).max()
    if astray <= _UNEVEN[0] + _UNEVEN[1] * np.linalg.norm(step):
        return
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    if abs(gaps[worst] - usual) <= _UNEVEN[0] + _UNEVEN[1] * usual:
        raise GeometryRefused(
            f"{name} has slices that lie up to {astray:.3g} mm beside a straight, even stack: "
            "resample it to a regular grid first"
        )
    raise GeometryRefused(
        f"{name} has unevenly spaced slices: {gaps[worst]:.4g} mm between slices {worst + 1} and {worst + 2} "
        f"of {count} (along their normal) where {usual:.4g} mm is usual. Slices are missing, or several "
        "series are mixed: add what is missing, or resample it to a regular grid first"
    )
