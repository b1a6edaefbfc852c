"""Headers of MetaImage files, .mha and .mhd (https://itk.org/Wiki/ITK/MetaIO/Documentation)."""

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
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2"},
    **{"MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4"},
    **{"MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_OFFSET = ("Offset", "Position", "Origin")
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_MOST_DIMENSIONS = 10


def read_metaimage_header(path: Path) -> VolumeHeader:
    """What a MetaImage file says of its voxels.

    Raises:
        HeaderFault, ValueError: it is damaged.
        UnreadableImage, UnsupportedImage: its data are not there, or not of a kind that is taken.
    """
    head = read_head(path)
    fields, start = _fields(head)
    dimension = int(fields.get("NDims", "0"))
    if not 1 <= dimension <= _MOST_DIMENSIONS:
        raise HeaderFault("its number of dimensions is none")
    size = spatial_sizes(path.name, sizes(fields.get("DimSize", ""), dimension))
    i, j, k = size
    order = ">" if _is_true(_first(fields, _BIG_ENDIAN)) else "<"
    code = _TYPES.get(fields.get("ElementType", "").removesuffix("_ARRAY"))
    if code is None:
        raise UnsupportedImage(f"{path.name} holds voxels of a type that is not read: save it as numbers")
    dtype = np.dtype(order + code)
    components = int(fields.get("ElementNumberOfChannels", "1"))
    check_components(path.name, components, dtype, "vector")
    detached = fields["ElementDataFile"].upper() != "LOCAL"
    behind = head[start:].decode("latin-1").splitlines()
    packing = "zlib" if _is_true(fields.get("CompressedData")) else ""
    voxels = StoredVoxels(
        files=data_files(path, fields["ElementDataFile"], behind) if detached else (path,),
        dtype=dtype,
        shape=(k, j, i) if components == 1 else (k, j, i, components),
        packing="text" if not _is_true(fields.get("BinaryData", "True")) else packing,
        start=_start(fields, 0 if detached else start),
    )
    return VolumeHeader(
        kind="MetaImage",
        size=size,
        ijk_to_ras=RAS_FROM_LPS @ _ijk_to_lps(fields, dimension),
        spacing_known="ElementSpacing" in fields or "ElementSize" in fields,
        voxels=voxels,
        detached=detached,
    )


def _fields(head: bytes) -> tuple[dict[str, str], int]:
    """Fields of a header by name, and where the line that names the data, its last, ends."""
    last = re.search(rb"(?m)^\s*ElementDataFile[ \t]*=[^\n]*\n?", head)
    if last is None:
        raise HeaderFault("its header names no data")
    fields: dict[str, str] = {}
    for line in head[: last.end()].decode("latin-1").splitlines():
        name, separator, value = line.partition("=")
        if not line.strip():
            continue
        if not separator or name.strip() in fields:
            raise HeaderFault("a line of its header is no field, or stands there twice")
        fields[name.strip()] = value.strip()
    return fields, last.end()


def _start(fields: dict[str, str], start: int) -> int:
    size = int(fields.get("HeaderSize", "0"))
    if size < -1 or size > 2**40:
        raise HeaderFault("its header states a length that it cannot have")
    return size if size else start


def _ijk_to_lps(fields: dict[str, str], dimension: int) -> np.ndarray:
    """4x4; a flat image becomes one slice 1 mm thick."""
    stated = fields.get("ElementSpacing", fields.get("ElementSize"))
    spacing = np.ones(dimension) if stated is None else numbers(stated, dimension)
    if (spacing <= 0).any():
        raise HeaderFault("its spacing is not above 0")
    directions = np.eye(dimension)
    text = _first(fields, _MATRIX)
    if text is not None:
        directions = numbers(text, dimension**2).reshape(dimension, dimension)
    offset = _first(fields, _OFFSET)
    origin = np.zeros(dimension) if offset is None else numbers(offset, dimension)
    used = min(dimension, 3)
    matrix = np.eye(4)
    matrix[:used, :used] = directions.T[:used, :used] * spacing[:used]  # one row of the file for each axis
    matrix[:used, 3] = origin[:used]
    return matrix


def _first(fields: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((fields[name] for name in names if name in fields), None)


def _is_true(text: str | None) -> bool:
    return (text or "")[:1] in ("T", "t", "1")
