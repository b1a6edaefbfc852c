"""Volume files, NIfTI, NRRD and MetaImage, read through SimpleITK.

A path and the format that its content shows in, `Volume` or `InputSummary` out; used by `volume.py` only.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from .errors import GeometryRefused, UnreadableImage, UnsupportedImage
from .volume import RAS_FROM_LPS, InputSummary, Volume, assemble, check_size, reading, rescaled, shown_name

_READERS = {"NIfTI": "NiftiImageIO", "NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}
_SPACING_KEYS = {
    "NRRD": rb"(?m)^space directions:|^spacings:",
    "MetaImage": rb"(?m)^\s*Element(Spacing|Size)\s*=",
}
_NIFTI_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 128: "u1"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_NIFTI_RGB = 128
_HEADER_BYTES = 1 << 16
_CHUNK = 1 << 20
_CHUNKS_TO_THE_END = 64  # more than any trailer, less than a file made to unpack without end


@dataclass(frozen=True, eq=False)
class _Header:
    """A volume file opened by SimpleITK, pixels not yet read.

    Attributes:
        kind: "NIfTI", "NRRD" or "MetaImage".
        reader: SimpleITK's ImageFileReader.
        size: number of voxels along I, J and K.
        ijk_to_ras: 4x4, mm.
        spacing_known: whether the header states a spacing.
    """

    kind: str
    reader: Any
    size: tuple[int, int, int]
    ijk_to_ras: np.ndarray
    spacing_known: bool


def read_volume_file(path: Path, kind: str, *, modality: str) -> Volume:
    """Read a volume file; one that holds several volumes is refused.

    Args:
        path: the file.
        kind: its format as `volume.recognise` names it.
        modality: what the caller says it shows; these formats do not tell.
    """
    header = _open(path, kind)
    detached = path.suffix.lower() in (".mhd", ".nhdr", ".hdr")
    what = f"{header.kind} with its data in a file beside it" if detached else header.kind
    with reading(path, what), _quiet_itk() as sitk:
        if header.kind == "NIfTI":
            voxels = _nifti_voxels(path, header)
        else:
            if header.kind == "MetaImage":
                _check_metaimage(path)
            voxels = sitk.GetArrayFromImage(header.reader.Execute())
            i, j, k = header.size
            voxels = voxels.reshape((k, j, i, *voxels.shape[header.reader.GetDimension() :]))
    return assemble(
        path,
        voxels,
        header.ijk_to_ras,
        modality=modality,
        source=f"{header.kind} volume",
        spacing_known=header.spacing_known,
    )


def summarise_volume_file(path: Path, kind: str) -> InputSummary:
    """What `read_volume_file` would return, told from the header."""
    header = _open(path, kind)
    i, j, k = np.linalg.norm(header.ijk_to_ras[:3, :3], axis=0)
    spacing = (float(i), float(j), float(k))
    return InputSummary("", f"{header.kind} volume", "", header.size, spacing, header.spacing_known)


def _open(path: Path, kind: str) -> _Header:
    name = shown_name(path)
    kind = _checked_name(path, kind)
    with reading(path, kind), _quiet_itk() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetImageIO(_READERS[kind])
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            if "orthonormal" in str(error):
                raise GeometryRefused(
                    f"{name} has slices that are sheared against each other, which SimpleITK does not read "
                    "from NIfTI: save it as NRRD, or resample it to a rectangular grid first"
                ) from error
            raise
        size = [*reader.GetSize(), 1][:3] if reader.GetDimension() == 2 else list(reader.GetSize())
        if any(count != 1 for count in size[3:]):
            raise UnsupportedImage(
                f"{name} has {len(size)} dimensions ({' x '.join(map(str, size))}): several volumes, for "
                "example time points. Save the one to look at as a file of its own"
            )
        _check_pixels(name, reader, sitk)
        check_size(path, int(np.prod(size, dtype=object)) * reader.GetNumberOfComponents())
        matrix = _matrix(reader)
        if kind == "NIfTI":
            matrix = _checked_against_nifti(name, matrix, size[:3], reader)
        known = kind not in _SPACING_KEYS or re.search(_SPACING_KEYS[kind], _text_header(path)) is not None
    return _Header(kind, reader, (size[0], size[1], size[2]), matrix, known)


def _checked_name(path: Path, kind: str) -> str:
    """The format without its compression; refuses names that the readers of that format do not accept."""
    plain, _, compressed = kind.partition(", ")
    if plain == "Analyze":
        raise UnsupportedImage(
            f"{path.name} is an Analyze 7.5 image, which does not say where the patient's left is: "
            "convert it to NIfTI"
        )
    if plain == "NIfTI-2":
        raise UnsupportedImage(
            f"{path.name} is NIfTI version 2, which SimpleITK does not read: save it as NIfTI version 1"
        )
    if plain == "NIfTI":
        ending = (".nii.gz",) if compressed else (".nii", ".nii.gz", ".hdr")
        if not path.name.lower().endswith(ending):
            packed = "a compressed" if compressed else "a"
            raise UnreadableImage(
                f"{path.name} holds {packed} NIfTI image; rename it so that it ends in {ending[0]}"
            )
    return plain


def _check_pixels(name: str, reader: Any, sitk: Any) -> None:
    """Take one real number per voxel, or RGB in 8 bits; a field of three floats is no colour."""
    components = reader.GetNumberOfComponents()
    pixel = reader.GetPixelID()
    if components == 1 and pixel not in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        return
    if components == 3 and pixel == sitk.sitkVectorUInt8:
        return
    raise UnsupportedImage(
        f"{name} has {components} values per voxel ({sitk.GetPixelIDValueAsString(pixel)}): only one real "
        "number, or red, green and blue in 8 bits, can be used"
    )


def _matrix(reader: Any) -> np.ndarray:
    """4x4 ijk_to_ras of a file that SimpleITK has opened; a flat image becomes one slice 1 mm thick."""
    dimension = reader.GetDimension()
    used = min(dimension, 3)
    direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:used, :used]
    matrix = np.eye(4)
    matrix[:used, :used] = direction * np.asarray(reader.GetSpacing()[:used])
    matrix[:used, 3] = reader.GetOrigin()[:used]
    return RAS_FROM_LPS @ matrix


def _checked_against_nifti(name: str, matrix: np.ndarray, size: list[int], reader: Any) -> np.ndarray:
    """Hold ITK's reading of a NIfTI header against the header itself.

    ITK takes directions from one field (sform, qform) and spacings from another (pixdim), and does not say so
    when they disagree; of a flat image it loses the third dimension.

    Returns:
        4x4 ijk_to_ras: ITK's, for a flat image completed from the header.
    """
    if not np.isfinite(matrix).all():
        raise GeometryRefused(f"{name} states a position that is not a number: correct its sform or qform")
    stated = _nifti_matrices(reader)
    if not stated:
        return matrix
    flat = reader.GetDimension() == 2
    if flat:
        matrix = matrix.copy()
        matrix[2, 3] = stated[0][2, 3]
        if stated[0][:3, 2].any():
            matrix[:, 2] = stated[0][:, 2]
    corners = np.array(list(np.ndindex(2, 2, 2))) * np.subtract(size, 1)
    corners = np.column_stack([corners, np.ones(8)])
    tolerance = 0.05 * np.linalg.norm(matrix[:3, :3], axis=0).min()
    for candidate in stated:
        if np.linalg.norm(corners @ (candidate - matrix).T, axis=1).max() <= tolerance:
            return matrix
    if flat:
        raise GeometryRefused(
            f"{name} is a single slice that is not axial: save it as three-dimensional, one slice thick"
        )
    raise GeometryRefused(
        f"{name} contradicts itself: the spacing in its sform or qform is not the one in pixdim. "
        "Correct the header, for example with nibabel or FSL"
    )


def _nifti_matrices(reader: Any) -> list[np.ndarray]:
    """4x4 matrices in mm that a NIfTI header states: sform, then qform, those that are in force."""

    def number(key: str) -> float:
        return float(reader.GetMetaData(key))

    millimetres = {1: 1000.0, 3: 0.001}.get(int(number("xyzt_units")) & 7, 1.0)
    scale = np.array([millimetres] * 3 + [1.0])[:, None]
    matrices = []
    if number("sform_code") > 0:
        rows = [np.array(reader.GetMetaData(f"srow_{axis}").split(), dtype=float) for axis in "xyz"]
        matrices.append(np.vstack([rows, [0, 0, 0, 1]]) * scale)
    if number("qform_code") > 0:
        b, c, d = (number(f"quatern_{part}") for part in "bcd")
        a = np.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_quat([b, c, d, a]).as_matrix()
        matrix[:3, 2] *= -1.0 if number("pixdim[0]") < 0 else 1.0
        matrix[:3, :3] *= [number(f"pixdim[{axis}]") for axis in (1, 2, 3)]
        matrix[:3, 3] = [number(f"qoffset_{axis}") for axis in "xyz"]
        matrices.append(matrix * scale)
    return matrices


def _nifti_voxels(path: Path, header: _Header) -> np.ndarray:
    """(K, J, I) voxels, or (K, J, I, 3) colour, of a NIfTI image.

    ITK is not asked for them: it fills files that are cut short with zeros, damaged ones with what it has,
    and puts zeros in the place of NaN, all without a word.
    """
    data = path.with_suffix(".img") if path.suffix.lower() == ".hdr" else path
    with _opened(path) as file:
        head = file.read(348)
    code, order, offset, slope, intercept = _nifti_layout(head)
    i, j, k = header.size
    voxels = np.empty((k, j, i, 3) if code == _NIFTI_RGB else (k, j, i), order + _NIFTI_TYPES[code])
    with _opened(data) as file:
        file.seek(offset)
        _fill(voxels, file, data.name)
    if code == _NIFTI_RGB or slope == 0 or not np.isfinite([slope, intercept]).all():
        return voxels
    return rescaled(voxels, slope, intercept)


def _nifti_layout(head: bytes) -> tuple[int, str, int, float, float]:
    """Type code, byte order, offset of the voxels, slope and intercept."""
    order = "<" if unpack_from("<i", head)[0] == 348 else ">"  # the header begins with its own length
    (code,) = unpack_from(f"{order}h", head, 70)
    offset, slope, intercept = unpack_from(f"{order}3f", head, 108)
    return code, order, int(offset), slope, intercept


def _fill(voxels: np.ndarray, file: Any, name: str) -> None:
    """Read an array from a file, and on to its end, where the checksum of a compressed file lies."""
    space = memoryview(voxels.reshape(-1).view(np.uint8))
    filled = 0
    while filled < len(space):
        count = file.readinto(space[filled : filled + _CHUNK])
        if not count:
            raise UnreadableImage(
                f"{name} is cut short: it holds {filled:,} of {len(space):,} bytes of voxels"
            )
        filled += count
    for _ in range(_CHUNKS_TO_THE_END):
        if not file.read(_CHUNK):
            break


def _opened(path: Path) -> Any:
    """A file opened for reading, unpacked on the way if it is compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _check_metaimage(path: Path) -> None:
    """Refuse damaged compressed data, which ITK lets pass with whatever was in memory."""
    text = _text_header(path)
    data = re.search(rb"(?m)^\s*ElementDataFile\s*=\s*(\S+)[ \t]*\r?\n?", text)
    if data and re.search(rb"(?mi)^\s*CompressedData\s*=\s*True", text):
        local = data[1].upper() == b"LOCAL"
        _check_zlib_stream(path if local else path.parent / data[1].decode(), data.end() if local else 0)


def _check_zlib_stream(path: Path, offset: int) -> None:
    """Unpack a zlib stream to nowhere; raises when it is damaged or ends early."""
    stream = zlib.decompressobj()
    with path.open("rb") as file:
        file.seek(offset)
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            while chunk:
                stream.decompress(chunk, _CHUNK)
                chunk = stream.unconsumed_tail
    if not stream.eof:
        raise UnreadableImage(f"{path.name} is cut short: its compressed data ends too early")


def _text_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES)


@contextmanager
def _quiet_itk() -> Iterator[Any]:
    """SimpleITK, without the warnings that its C++ writes to stderr."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
