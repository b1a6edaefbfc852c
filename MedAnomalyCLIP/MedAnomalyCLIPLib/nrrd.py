"""Headers of NRRD files, attached and detached (http://teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from .errors import UnsupportedImage
from .stored_voxels import StoredVoxels
from .text_header import (
    HeaderFault,
    VolumeHeader,
    check_components,
    data_files,
    numbers,
    read_head,
    sizes,
    spatial_sizes,
)
from .volume import RAS_FROM_LPS

_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), "i8"),
    **dict.fromkeys(("signed long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_PACKINGS = {"raw": "", "gzip": "zlib", "gz": "zlib", "txt": "text", "text": "text", "ascii": "text"}
# Axes of the space in terms of LPS; spaces that name no sides of the patient are taken as LPS, as ITK does.
_SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1.0, -1.0, 1.0)),
}
_DOMAIN_KINDS = ("domain", "space", "???", "none", "")
_MOST_DIMENSIONS = 16


def read_nrrd_header(path: Path) -> VolumeHeader:
    """What a NRRD file says of its voxels.

    Raises:
        HeaderFault, ValueError: it is damaged.
        UnreadableImage, UnsupportedImage: its data are not there, or not of a kind that is taken.
    """
    head = read_head(path)
    fields, start, behind = _fields(head)
    dimension = int(fields.get("dimension", "0"))
    if not 1 <= dimension <= _MOST_DIMENSIONS:
        raise HeaderFault("its dimension is none")
    found = sizes(fields.get("sizes", ""), dimension)
    vectors = _directions(fields, dimension)
    channels = _channel_axes(fields, dimension, vectors)
    dtype = _dtype(path.name, fields)
    components = int(np.prod([found[axis] for axis in channels], dtype=object))
    kinds = fields.get("kinds", "").split()
    check_components(path.name, components, dtype, ", ".join(kinds[a] for a in channels if a < len(kinds)))
    if components > 1 and channels != [0]:
        raise UnsupportedImage(f"{path.name} has its colours apart from each other: save it as RGB voxels")
    axes = [axis for axis in range(dimension) if axis not in channels]
    i, j, k = spatial_sizes(path.name, [found[axis] for axis in axes])
    data = fields.get("data file", fields.get("datafile"))
    voxels = StoredVoxels(
        files=(path,) if data is None else data_files(path, data, behind),
        dtype=dtype,
        shape=(k, j, i) if components == 1 else (k, j, i, components),
        packing=_packing(path.name, fields),
        **_offsets(fields, start if data is None else 0, path.name),
    )
    return VolumeHeader(
        kind="NRRD",
        size=(i, j, k),
        ijk_to_ras=RAS_FROM_LPS @ _ijk_to_lps(fields, axes[:3], vectors, dimension),
        spacing_known=vectors is not None or "spacings" in fields,
        voxels=voxels,
        detached=data is not None,
    )


def _fields(head: bytes) -> tuple[dict[str, str], int, list[str]]:
    """Fields by name in small letters, where the data starts, and the lines behind "data file"."""
    match = re.search(rb"\r?\n\r?\n", head)
    end, start = (len(head), len(head)) if match is None else match.span()
    lines = head[:end].decode("latin-1").replace("\r\n", "\n").split("\n")
    if not re.fullmatch(r"NRRD\d{4}", lines[0].strip()):
        raise HeaderFault("its first line is that of no NRRD file")
    fields: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if line.startswith("#") or re.match(r"[^:]*:=", line):
            continue
        name, separator, value = line.partition(":")
        if not separator or name.strip().lower() in fields:
            raise HeaderFault("a line of its header is no field, or stands there twice")
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() in ("data file", "datafile"):
            return fields, start, lines[number:]
    if match is None:
        raise HeaderFault("its header has no end")
    return fields, start, []


def _dtype(name: str, fields: dict[str, str]) -> np.dtype:
    code = _TYPES.get(fields.get("type", "").lower())
    if code is None:
        raise UnsupportedImage(f"{name} holds voxels of a type that is not read: save it as numbers")
    order = {"little": "<", "big": ">"}.get(fields.get("endian", "little").lower())
    if order is None:
        raise HeaderFault("its byte order is none")
    return np.dtype(order + code)


def _packing(name: str, fields: dict[str, str]) -> str:
    packing = _PACKINGS.get(fields.get("encoding", "").lower())
    if packing is None:
        raise UnsupportedImage(f"{name} is packed in a way that is not read: save it raw or with gzip")
    return packing


def _offsets(fields: dict[str, str], start: int, name: str) -> dict[str, int]:
    lines = int(fields.get("line skip", fields.get("lineskip", "0")))
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if lines:
        raise UnsupportedImage(f"{name} has lines to be skipped before its voxels: save it without")
    return {"start": -1, "skip": 0} if skip == -1 else {"start": start, "skip": skip}


def _directions(fields: dict[str, str], dimension: int) -> list[np.ndarray | None] | None:
    """Step along each axis in the file's own space, None for an axis that is none of space."""
    text = fields.get("space directions")
    if text is None:
        return None
    found = re.findall(r"none|\([^()]*\)", text)
    if len(found) != dimension or re.sub(r"none|\([^()]*\)|\s", "", text):
        raise HeaderFault("its space directions are not one for each dimension")
    return [None if word == "none" else _vector(word) for word in found]


def _vector(word: str) -> np.ndarray:
    inside = word.strip()[1:-1].replace(",", " ")
    vector = numbers(inside, len(inside.split()))
    return np.pad(vector, (0, 3))[:3]  # of more dimensions than space has, the others are time


def _channel_axes(
    fields: dict[str, str], dimension: int, vectors: list[np.ndarray | None] | None
) -> list[int]:
    """Axes whose samples belong to one voxel."""
    kinds = fields.get("kinds", "").replace("???", "none").split()
    if kinds and len(kinds) != dimension:
        raise HeaderFault("its kinds are not one for each dimension")
    return [
        axis
        for axis in range(dimension)
        if (vectors is not None and vectors[axis] is None)
        or (vectors is None and kinds and kinds[axis].lower() not in _DOMAIN_KINDS)
    ]


def _ijk_to_lps(
    fields: dict[str, str], axes: list[int], vectors: list[np.ndarray | None] | None, dimension: int
) -> np.ndarray:
    """4x4 of the first three spatial axes."""
    matrix = np.eye(4)
    if vectors is None:
        _put_spacings(matrix, fields, axes, dimension)
    else:
        for column, axis in enumerate(axes):
            matrix[:3, column] = vectors[axis]
        if len(axes) == 2:
            normal = np.cross(matrix[:3, 0], matrix[:3, 1])
            matrix[:3, 2] = normal / np.linalg.norm(normal)
    origin = fields.get("space origin")
    if origin is not None and "nan" not in origin.lower():
        matrix[:3, 3] = _vector(origin)
    signs = _SPACES.get(fields.get("space", "").lower(), (1.0, 1.0, 1.0))
    return np.diag([*signs, 1.0]) @ matrix


def _put_spacings(matrix: np.ndarray, fields: dict[str, str], axes: list[int], dimension: int) -> None:
    """Steps and start along axes that have no direction in space."""
    spacings = _per_axis(fields.get("spacings"), dimension)
    starts = _per_axis(fields.get("axis mins", fields.get("axismins")), dimension)
    centers = fields.get("centers", fields.get("centerings", "")).lower().split()
    placed = np.isfinite(
        [spacings[axes], starts[axes]]
    ).all()  # else the first voxel is the origin, as for ITK
    for column, axis in enumerate(axes):
        step = spacings[axis]
        matrix[column, column] = step if np.isfinite(step) else 1.0
        if placed:
            on_node = axis < len(centers) and centers[axis] == "node"
            matrix[column, 3] = starts[axis] + (0.0 if on_node else step / 2)


def _per_axis(text: str | None, dimension: int) -> np.ndarray:
    """(dimension,) numbers, NaN where none is stated."""
    words = ["nan"] * dimension if text is None else text.split()
    if len(words) != dimension:
        raise HeaderFault("its spacings are not one for each dimension")
    return np.array([float(word) for word in words])
