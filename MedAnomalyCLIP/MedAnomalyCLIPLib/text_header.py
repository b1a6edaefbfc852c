"""What the headers of NRRD and MetaImage share: lines of text before the voxels, parsed without trust.

An image's path in; a `VolumeHeader` out, which tells size and place and can read the voxels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UnsupportedImage
from .limits import limits
from .stored_voxels import StoredVoxels, data_file

HEADER_BYTES = 1 << 24  # a segmentation tells of each of its segments in the header
_MOST_FILES = 100_000
_LARGEST_SIDE = 2**31


class HeaderFault(ValueError):
    """What is wrong with a header, as the end of a sentence that begins with the file's name."""


@dataclass(frozen=True, eq=False)
class VolumeHeader:
    """What the header of a volume file says.

    Attributes:
        kind: "NIfTI", "NRRD" or "MetaImage".
        size: number of voxels along I, J and K.
        ijk_to_ras: 4x4, mm.
        spacing_known: whether the header states a spacing.
        voxels: where they lie.
        scale: (slope, intercept) of stored values; None for none.
        detached: whether the voxels are in another file.
    """

    kind: str
    size: tuple[int, int, int]
    ijk_to_ras: np.ndarray
    spacing_known: bool
    voxels: StoredVoxels
    scale: tuple[float, float] | None = None
    detached: bool = False


def sizes(text: str, count: int) -> list[int]:
    """Number of voxels along each axis, as a header writes them."""
    words = text.split()
    values = [int(word) for word in words if re.fullmatch(r"[0-9]{1,12}", word)]
    if len(words) != count or len(values) != count or not all(0 < v < _LARGEST_SIDE for v in values):
        raise HeaderFault("its sizes are no whole numbers above 0")
    return values


def numbers(text: str, count: int) -> np.ndarray:
    """(count,) finite numbers, as a header writes them."""
    values = np.array([float(word) for word in text.split()])
    if len(values) != count or not np.isfinite(values).all():
        raise HeaderFault("a line of its header holds other numbers than it should")
    return values


def spatial_sizes(name: str, found: list[int]) -> tuple[int, int, int]:
    """Three sizes; a flat image is one slice, more than three are several volumes."""
    if any(count != 1 for count in found[3:]):
        raise UnsupportedImage(
            f"{name} has {len(found)} dimensions ({' x '.join(map(str, found))}): several volumes, for "
            "example time points. Save the one to look at as a file of its own"
        )
    i, j, k = [*found, 1, 1][:3]
    return i, j, k


def check_components(name: str, components: int, dtype: np.dtype, what: str) -> None:
    """Take one real number per voxel, or RGB in 8 bits; a field of three floats is no colour."""
    if components == 1 or (components == 3 and dtype == np.uint8):
        return
    raise UnsupportedImage(
        f"{name} has {components} values per voxel ({what}): only one real number, or red, green and blue in "
        "8 bits, can be used"
    )


def data_files(header: Path, first_line: str, listed: list[str]) -> tuple[Path, ...]:
    """The files that a header names: one, "LIST" with a name on each line behind it, or a numbered pattern.

    Args:
        header: the header's file.
        first_line: what it says.
        listed: the lines behind that one.
    """
    words = first_line.split()
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in listed if line.strip()]
    else:
        pattern = re.fullmatch(
            r"([^%\n]*)%(0?[0-9]?)d([^%\n]*?) +(\d{1,6}) +(\d{1,6}) +(\d{1,6})( +\d+)?", first_line
        )
        if pattern is None:
            return (data_file(header, first_line.strip()),)
        before, width, behind = pattern[1], pattern[2], pattern[3]
        first, last, step = (int(pattern[group]) for group in (4, 5, 6))
        wanted = range(first, last + 1, max(step, 1))
        names = [f"{before}{number:{width or ''}d}{behind}" for number in wanted[: _MOST_FILES + 1]]
    if not names or len(names) > _MOST_FILES:
        raise HeaderFault("it names no files, or too many, that hold its voxels")
    return tuple(data_file(header, name) for name in names)


def read_head(path: Path) -> bytes:
    """The beginning of a file, long enough for any header."""
    with path.open("rb") as file:
        return file.read(min(HEADER_BYTES, limits().text_bytes))
