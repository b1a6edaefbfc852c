"""Volume files: NIfTI, read here with SimpleITK's help for its header, NRRD and MetaImage.

A path and the format that its content shows in, `Volume` or `InputSummary` out; used by `volume.py` only.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from .errors import GeometryRefused, UnreadableImage, UnsupportedImage
from .metaimage import read_metaimage_header
from .nrrd import read_nrrd_header
from .stored_voxels import StoredVoxels
from .text_header import HeaderFault, VolumeHeader, check_components, spatial_sizes
from .volume import RAS_FROM_LPS, InputSummary, Volume, assemble, check_size, reading, rescaled, shown_name

_NIFTI_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 128: "u1"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_NIFTI_RGB = 128


def read_volume_file(path: Path, kind: str, *, modality: str) -> Volume:
    """Read a volume file; one that holds several volumes is refused.

    Args:
        path: the file.
        kind: its format as `volume.recognise` names it.
        modality: what the caller says it shows; these formats do not tell.
    """
    header = _open(path, kind)
    what = f"{header.kind} with its data in a file beside it" if header.detached else header.kind
    with reading(path, what):
        voxels = header.voxels.read()
        if header.scale is not None:
            voxels = rescaled(voxels, *header.scale)
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


def _open(path: Path, kind: str) -> VolumeHeader:
    kind = _checked_name(path, kind)
    read = {"NIfTI": _read_nifti_header, "NRRD": read_nrrd_header, "MetaImage": read_metaimage_header}[kind]
    with reading(path, kind):
        try:
            header = read(path)
        except HeaderFault as error:
            raise UnreadableImage(f"{shown_name(path)} cannot be read as {kind}: {error}") from error
        check_size(path, int(np.prod(header.voxels.shape, dtype=object)))
    return header


def _read_nifti_header(path: Path) -> VolumeHeader:
    """What a NIfTI file says, as ITK understands it and as its own numbers have it."""
    name = shown_name(path)
    with _quiet_itk() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NiftiImageIO")
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
        size = spatial_sizes(name, list(reader.GetSize()))
        components, pixel = reader.GetNumberOfComponents(), reader.GetPixelIDValue()
        is_colour = components == 3 and pixel == sitk.sitkVectorUInt8
        numbers = 2 if pixel in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64) else components
        stored = np.dtype(np.uint8) if is_colour else np.dtype(np.float64)
        check_components(name, numbers, stored, sitk.GetPixelIDValueAsString(pixel))
        matrix = _checked_against_nifti(name, _matrix(reader), list(size), reader)
    code, order, offset, slope, intercept = _nifti_layout(path)
    detached = path.suffix.lower() == ".hdr"
    data = path.with_suffix(".img") if detached else path
    compressed = data.is_file() and _is_gzip(data)
    i, j, k = size
    voxels = StoredVoxels(
        files=(data,),
        dtype=np.dtype(order + _NIFTI_TYPES[code]),
        shape=(k, j, i, 3) if code == _NIFTI_RGB else (k, j, i),
        packing="zlib" if compressed else "",
        skip=offset,
    )
    scaled = code != _NIFTI_RGB and slope != 0 and np.isfinite([slope, intercept]).all()
    return VolumeHeader("NIfTI", size, matrix, True, voxels, (slope, intercept) if scaled else None, detached)


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


def _nifti_layout(path: Path) -> tuple[int, str, int, float, float]:
    """Type code, byte order, offset of the voxels, slope and intercept."""
    with gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
        head = file.read(348)
    order = "<" if unpack_from("<i", head)[0] == 348 else ">"  # the header begins with its own length
    (code,) = unpack_from(f"{order}h", head, 70)
    offset, slope, intercept = unpack_from(f"{order}3f", head, 108)
    return code, order, int(offset), slope, intercept


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


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
