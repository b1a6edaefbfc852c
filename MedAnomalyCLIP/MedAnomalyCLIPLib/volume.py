"""A medical image in memory: voxels, where they lie in the patient, and what made them.

File or series in, `Volume` out. The content of a file tells its format; `dicom.py`, `volumefiles.py` and
`pictures.py` read it.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .background import Background
from .errors import (
    DependencyMissing,
    GeometryRefused,
    InvalidRequest,
    MedAnomalyCLIPError,
    UnreadableImage,
    UnsupportedImage,
)
from .limits import VARIABLE, limits

Warp = Callable[[np.ndarray], np.ndarray]

READABLE_FORMATS = "DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF and BMP"

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""4x4 from the axes of DICOM and ITK (left, posterior, superior) to RAS."""

_HOUNSFIELD_MINIMUM = -200  # no CT in other units reaches this far down: air is -1000 HU, fat about -100 HU
_HEAD_BYTES = 4096
_PICTURES = ("PNG", "JPEG", "TIFF", "BMP")
_SIGNATURES = (
    (b"NRRD", "NRRD"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
_METAIMAGE_KEY = re.compile(rb"^\s*(ObjectType|NDims|DimSize)\s*=", re.MULTILINE)
_MODALITY_CODE = re.compile(r"[A-Z0-9_]{1,16}")
_BODY_PART = re.compile(r"[A-Z]{2,16}( [A-Z]{2,16})?")  # a code string, in which nothing else is looked for
_MODALITY_WORDS = {"MRI": "MR", "PET": "PT", "ULTRASOUND": "US", "XRAY": "DX", "XR": "DX"}
_PACKAGES = {"PIL": "pillow"}


class DicomFrame(NamedTuple):
    """Where a slice was read from.

    Attributes:
        path: the DICOM file; it may name the patient, so it is shown and written nowhere.
        number: the frame in it, from 1.
    """

    path: Path
    number: int


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels on a regular grid and the place of that grid in the patient.

    Attributes:
        voxels: (K, J, I) or (K, J, I, 3) colour; real numbers, dtype as stored, never reordered.
        ijk_to_ras: 4x4 float64; voxel centre (i, j, k, 1) to RAS in mm.
        modality: DICOM modality code (CT, MR, CR, DX, US, ...), empty when unknown.
        units: "HU" when the voxels are Hounsfield units, else empty.
        source: what was read, in words, without anything that identifies the patient.
        spacing_known: False for pictures (PNG, JPEG) whose pixel size in mm is an assumption of 1 mm.
        body_part: what is shown, as the file says in DICOM's words, lower case; empty when unknown.
        warp: (N, 3) world RAS to (N, 3) the volume's own RAS, both mm, for a volume under a non-linear
            transform; None when `ijk_to_ras` is the whole truth.
        frames: where each slice along K was read from; empty for anything but DICOM.
    """

    voxels: np.ndarray
    ijk_to_ras: np.ndarray
    modality: str = ""
    units: str = ""
    source: str = ""
    spacing_known: bool = True
    body_part: str = ""
    warp: Warp | None = None
    frames: tuple[DicomFrame, ...] = field(default=(), repr=False)

    @cached_property
    def background(self) -> Background:
        """What surrounds the body, learned once from a few of the voxels."""
        return Background.of(self)

    def __post_init__(self) -> None:
        voxels = self.voxels
        if voxels.ndim not in (3, 4) or (voxels.ndim == 4 and voxels.shape[3] != 3):
            raise UnsupportedImage(
                f"An image of shape {voxels.shape} is neither (slices, rows, columns) nor colour (…, 3)"
            )
        if min(voxels.shape) == 0:
            raise UnsupportedImage(f"The image has no voxels: its shape is {voxels.shape}")
        if voxels.dtype.kind not in "iufb":
            raise UnsupportedImage(f"Voxels of type {voxels.dtype} are not real numbers")
        matrix = np.array(self.ijk_to_ras, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise GeometryRefused("The image's position is not a finite 4x4 matrix")
        # Relative to the voxel's edges, so that micrometre spacings are not taken for a flat grid.
        edges = np.linalg.norm(matrix[:3, :3], axis=0)
        flat = edges.min() == 0 or abs(np.linalg.det(matrix[:3, :3] / edges)) < 1e-6
        if np.any(matrix[3] != (0, 0, 0, 1)) or flat:
            raise GeometryRefused("The image's position matrix is singular: its voxels have no volume")
        matrix.setflags(write=False)
        object.__setattr__(self, "ijk_to_ras", matrix)

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels along I, J and K."""
        k, j, i = self.voxels.shape[:3]
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between voxel centres along I, J and K."""
        i, j, k = np.linalg.norm(self.ijk_to_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def is_colour(self) -> bool:
        return self.voxels.ndim == 4


@dataclass(frozen=True)
class InputSummary:
    """What would be read from a file, or as one series of a folder; nothing that identifies the patient.

    Attributes:
        identifier: what to pass as `series` to read it; empty for a single file.
        kind: the format in words, for example "DICOM series".
        modality: DICOM modality code, empty when the file does not tell.
        size: number of voxels along I, J and K.
        spacing: distance in mm between voxel centres along I, J and K.
        spacing_known: False when the pixel size in mm is an assumption.
        problem: why it cannot be read, in words; empty when nothing stands against it.
        study: the same for all series of one study, a hash; empty when the file does not tell.
    """

    identifier: str
    kind: str
    modality: str
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    spacing_known: bool = True
    problem: str = ""
    study: str = ""

    @property
    def slices(self) -> int:
        return self.size[2]

    def describe(self) -> str:
        """One line for people, starting with the identifier."""
        size = " x ".join(str(count) for count in self.size)
        spacing = " x ".join(f"{step:.4g}" for step in self.spacing) + " mm"
        parts = [self.kind, self.modality or "modality unknown", f"{size} voxels"]
        parts.append(spacing if self.spacing_known else "pixel size unknown")
        if self.problem:
            parts.append(f"cannot be read: {self.problem}")
        return (f"{self.identifier}  " if self.identifier else "") + ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The same for machines: plain types, ready for JSON."""
        return {**asdict(self), "size": list(self.size), "spacing": list(self.spacing), "slices": self.slices}


def read_volume(path: Path | str, *, modality: str | None = None, series: str | None = None) -> Volume:
    """Read one image file, or one series of a DICOM folder.

    Args:
        path: a file in any of `READABLE_FORMATS`, or a folder of DICOM files.
        modality: DICOM modality code; stands above what the file says.
        series: which series of a folder that holds several, as `InputSummary.identifier` names it.

    Raises:
        UnreadableImage: missing, empty, damaged, or no image.
        UnsupportedImage: an image that this package does not take, for example a time series.
        SeriesAmbiguous: the folder holds several series and none, or an unknown one, was chosen.
        GeometryRefused: the slices do not form a regular grid, or the header contradicts itself.
        DependencyMissing: a package is needed to decode the file.
        InvalidRequest: a modality or series that makes no sense here.
    """
    from .dicom import read_dicom_file, read_dicom_series
    from .pictures import read_picture
    from .volumefiles import read_volume_file

    path = Path(path)
    code = None if modality is None else _requested_modality(modality)
    kind = _recognise_input(path)
    if kind == "folder":
        return read_dicom_series(path, series, modality=code)
    if series is not None:
        raise InvalidRequest(
            f"{path.name} is a single file: a series can only be chosen in a folder of DICOM files"
        )
    if kind == "DICOM":
        return read_dicom_file(path, modality=code)
    if kind in _PICTURES:
        return read_picture(path, kind, modality=code or "")
    return read_volume_file(path, kind, modality=code or "")


def list_contents(path: Path | str) -> tuple[InputSummary, ...]:
    """What `read_volume` would find at a path, told from the headers alone.

    Raises:
        UnreadableImage: missing, empty, damaged, or no image.
        UnsupportedImage: an image that this package does not take.
    """
    from .dicom import summarise_dicom
    from .pictures import summarise_picture
    from .volumefiles import summarise_volume_file

    path = Path(path)
    kind = _recognise_input(path)
    if kind in ("folder", "DICOM"):
        return summarise_dicom(path)
    if kind in _PICTURES:
        return (summarise_picture(path, kind),)
    return (summarise_volume_file(path, kind),)


def recognise(path: Path) -> str:
    """Format of a file as its content tells it, whatever its name; empty when it is none of ours.

    Returns:
        "DICOM", "NRRD", "MetaImage", "PNG", "JPEG", "TIFF", "BMP"; "NIfTI", "NIfTI-2" or "Analyze", perhaps
        followed by ", compressed"; or "".
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _starts_like_dicom(head):
        return "DICOM"
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    if head.startswith(b"\x1f\x8b"):
        inner = _recognise_nifti(_first_bytes_of_gzip(head))
        return f"{inner}, compressed" if inner else ""
    return _recognise_nifti(head) or ("MetaImage" if _METAIMAGE_KEY.search(head) else "")


def shown_name(path: Path) -> str:
    """Name of a file or folder for messages: never the folders that it lies in."""
    return path.name or path.resolve().name or "The folder"


def check_size(path: Path, voxels: int) -> None:
    """Refuse an image by its header, before memory is asked for.

    Args:
        path: the file, for the message.
        voxels: number of values that the header claims.
    """
    largest = limits().image_voxels
    if voxels > largest:
        raise UnsupportedImage(
            f"{shown_name(path)} claims {voxels:,} voxels, more than the {largest:,} that are read: "
            f"the file is damaged, or has to be cropped or downsampled first; {VARIABLE} moves the limit"
        )


@contextmanager
def reading(path: Path, kind: str, fault: str = "") -> Iterator[None]:
    """Turn whatever a parser makes of a bad file into one typed error that names the file.

    pydicom, SimpleITK and Pillow meet damaged and hostile files here, and raise nearly every exception type
    there is for them, undocumented; so this is the one place that catches them all. Their texts are left out
    of the message: they quote header values and whole paths. Warnings are silenced for the same reason.

    Args:
        path: the file.
        kind: format that it is read as.
        fault: what is wrong when reading fails; by default, that the file is damaged or of another kind.
    """
    name = shown_name(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MedAnomalyCLIPError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        raise DependencyMissing(f"{name} cannot be read without {package}: pip install {package}") from error
    except MemoryError as error:
        raise UnsupportedImage(f"{name} does not fit into this computer's memory") from error
    except Exception as error:
        fault = fault or f"the file is damaged, incomplete or no {kind} at all"
        reason = getattr(error, "strerror", None) or fault
        raise UnreadableImage(f"{name} cannot be read as {kind}: {reason}") from error


def assemble(
    path: Path,
    voxels: np.ndarray,
    ijk_to_ras: np.ndarray,
    *,
    modality: str,
    source: str,
    spacing_known: bool = True,
    hounsfield: bool = False,
    body_part: str = "",
    frames: tuple[DicomFrame, ...] = (),
) -> Volume:
    """A `Volume` from what a reader found, with the rules that hold for every format.

    Colour whose three channels are the same is grey. A volume without a single finite voxel is refused.
    Voxels of a CT are Hounsfield units when the header says so or when they reach down to -200.

    Args:
        path: where it was read from, for messages.
        voxels: (K, J, I) or (K, J, I, 3).
        ijk_to_ras: 4x4, mm.
        modality: DICOM modality code or empty.
        source: what was read, in words.
        spacing_known: whether the pixel size in mm was stated.
        hounsfield: whether the header says that the values are Hounsfield units.
        body_part: as `Volume.body_part`.
        frames: as `Volume.frames`.
    """
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.ndim == 4 and voxels.shape[3] == 3 and (voxels[..., :1] == voxels[..., 1:]).all():
        voxels = np.ascontiguousarray(voxels[..., 0])
    name = shown_name(path)
    if voxels.dtype.kind == "f" and voxels.size and not any(np.isfinite(slab).any() for slab in voxels):
        raise UnsupportedImage(f"{name} holds no finite value: every voxel is NaN or infinite")
    reaches_air = modality == "CT" and _finite_minimum(voxels) <= _HOUNSFIELD_MINIMUM
    units = "HU" if modality == "CT" and (hounsfield or reaches_air) else ""
    try:
        return Volume(voxels, ijk_to_ras, modality, units, source, spacing_known, body_part, frames=frames)
    except MedAnomalyCLIPError as error:
        raise type(error)(f"{name}: {error}") from None


def header_modality(text: str) -> str:
    """Modality as a header states it, empty when that is no DICOM code."""
    code = text.strip().upper()
    return code if _MODALITY_CODE.fullmatch(code) else ""


def rescaled(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """slope * values + intercept; whole numbers stay whole where they can, anything else becomes float32."""
    if slope == 1 and intercept == 0:
        return values
    if slope == 1 and intercept.is_integer() and values.dtype.kind in "iu":
        shift = int(intercept)
        low, high = int(values.min()), int(values.max())
        for dtype in (np.int16, np.int32, np.int64):
            limits = np.iinfo(dtype)
            if limits.min <= min(low, low + shift, shift) and max(high, high + shift, shift) <= limits.max:
                return np.add(values, shift, dtype=dtype, casting="unsafe")
    return (values.astype(np.float64) * slope + intercept).astype(np.float32)


def header_body_part(text: str) -> str:
    """Body part as a header states it, lower case; empty when that is none of DICOM's plain words."""
    words = text.strip().upper()
    return words.lower() if _BODY_PART.fullmatch(words) else ""


def _requested_modality(text: str) -> str:
    code = header_modality(text)
    if not code:
        raise InvalidRequest(f"{text!r} is no modality: give a DICOM code such as CT, MR, CR, DX, US or PT")
    return _MODALITY_WORDS.get(code, code)


def _finite_minimum(voxels: np.ndarray) -> float:
    if voxels.dtype.kind != "f":
        return float(voxels.min(initial=0))
    return float(np.min(voxels, where=np.isfinite(voxels), initial=np.inf))


def _recognise_input(path: Path) -> str:
    """ "folder" or a format of `recognise`; refuses what is neither."""
    name = shown_name(path)
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise UnreadableImage(f"{name} does not exist")
    if not path.is_file():
        raise UnreadableImage(f"{name} is neither a file nor a folder")
    with reading(path, "image"):
        if path.stat().st_size == 0:
            raise UnreadableImage(f"{name} is empty (0 bytes)")
        kind = recognise(path)
    if not kind:
        raise UnreadableImage(
            f"{name} is no image that can be read: its content is none of {READABLE_FORMATS}. "
            "Unpack archives first; convert other formats"
        )
    return kind


def _starts_like_dicom(head: bytes) -> bool:
    """With the preamble of a DICOM file, or, as old files do, straight with an element of group 2 or 8."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    explicit = re.fullmatch(rb"[A-Z]{2}", head[4:6]) is not None
    short = struct.unpack("<I", head[4:8])[0] < 1024
    group, element = struct.unpack("<HH", head[:4])
    if group in (2, 8) and element < 0x2000 and (explicit or short):
        return True
    group, element = struct.unpack(">HH", head[:4])
    return group in (2, 8) and element < 0x2000 and explicit


def _recognise_nifti(head: bytes) -> str:
    if len(head) < 348:
        return ""
    header_sizes = {struct.unpack("<i", head[:4])[0], struct.unpack(">i", head[:4])[0]}
    if 348 in header_sizes:
        return "NIfTI" if head[344:347] in (b"n+1", b"ni1") else "Analyze"
    return "NIfTI-2" if 540 in header_sizes and head[4:7] in (b"n+2", b"ni2") else ""


def _first_bytes_of_gzip(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
    except zlib.error:
        return b""
