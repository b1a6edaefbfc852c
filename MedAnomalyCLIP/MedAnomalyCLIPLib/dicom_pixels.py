"""The pixels of one DICOM file: decoded, in the units of their modality, bright where the body is dense.

A path in, frames out; pydicom and its plugins decode. Which files make a volume is decided in `dicom.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dicom_deflated import check_deflated
from .errors import DependencyMissing, UnreadableImage, UnsupportedImage
from .plain_files import BoundedFile
from .volume import reading, rescaled, shown_name

if TYPE_CHECKING:
    from pydicom import Dataset

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom decodes all of them to RGB
_CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


@dataclass(frozen=True, eq=False)
class DecodedFrames:
    """All frames of one file.

    Attributes:
        values: (F, R, C) numbers after rescaling, or (F, R, C, 3) uint8 colour.
        hounsfield: whether the file says that the values are Hounsfield units.
    """

    values: np.ndarray
    hounsfield: bool = False


def open_dataset(path: Path, tags: Sequence[str] | None = None, *, pixels: bool = True) -> Dataset:
    """Parse a DICOM file; with `tags`, only these elements and no pixels; else without pixels if so asked.

    Files without a preamble are taken, and a missing transfer syntax is filled in as pydicom guessed it.
    """
    from pydicom import dcmread, uid

    only = None if tags is None else list(tags)
    with BoundedFile(path) as file:
        check_deflated(file, shown_name(path))
        dataset = dcmread(
            file, force=True, stop_before_pixels=not pixels or tags is not None, specific_tags=only
        )
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        plain = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = plain if little else uid.ExplicitVRBigEndian
    return dataset


def functional_group(dataset: Dataset, frame: int, keyword: str) -> Dataset | None:
    """A functional group of an enhanced multi-frame image: of one frame, or the one that all frames share."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (per_frame[frame : frame + 1], shared[:1]):
        for group in groups:
            if group.get(keyword):
                return group[keyword].value[0]
    return None


def read_frames(path: Path) -> DecodedFrames:
    """Decode a file and bring its values into the units of its modality.

    Raises:
        UnreadableImage: damaged or cut short.
        UnsupportedImage: no pixels, or a pixel layout or compression that pydicom does not decode.
        DependencyMissing: a decoder has to be installed.
    """
    with reading(path, "DICOM", fault="its pixels are damaged, or cut short"):
        dataset = open_dataset(path)
        stored = _decoded(dataset, path)
        photometric = str(dataset.PhotometricInterpretation)
        if photometric in _GREY and stored.ndim == 3:
            values, hounsfield = _modality_values(dataset, stored, photometric == "MONOCHROME1")
            return DecodedFrames(values, hounsfield)
        if photometric == "PALETTE COLOR" and stored.ndim == 3:
            return DecodedFrames(_palette_colour(dataset, stored))
        if photometric in _COLOUR and stored.ndim == 4 and stored.shape[3] == 3:
            return DecodedFrames(_in_8_bits(stored, int(dataset.BitsStored)))
    raise UnsupportedImage(
        f"{shown_name(path)} stores its pixels as {photometric}, which is not read: "
        "convert it to MONOCHROME2 or RGB"
    )


def _decoded(dataset: Dataset, path: Path) -> np.ndarray:
    """(F, R, C) or (F, R, C, samples) values as stored."""
    from pydicom.pixels import get_decoder, pixel_array

    name = shown_name(path)
    if not any(keyword in dataset for keyword in _PIXELS):
        raise UnsupportedImage(f"{name} holds no pixels")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise UnsupportedImage(
            f"{name} is compressed as {syntax.name}, which pydicom does not decode: "
            "convert it to uncompressed DICOM"
        ) from error
    wanted = f"{name} is compressed as {syntax.name}; to decode it: {_CODECS}"
    if not decoder.is_available:
        raise DependencyMissing(wanted)
    try:
        pixels = pixel_array(dataset, allow_excess_frames=False)
    except RuntimeError as error:
        # A plugin that is there may decode only a part of its syntax, as Pillow does for 12-bit JPEG.
        if syntax.is_encapsulated and find_spec("pylibjpeg") is None:
            raise DependencyMissing(wanted) from error
        raise
    frames = int(dataset.get("NumberOfFrames") or 1)
    shape = (frames, int(dataset.Rows), int(dataset.Columns))
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if pixels.size != int(np.prod(shape)) * samples:
        raise UnreadableImage(f"{name} holds another number of pixels than its header says")
    return pixels.reshape(shape if samples == 1 else (*shape, samples))


def _modality_values(dataset: Dataset, stored: np.ndarray, inverted: bool) -> tuple[np.ndarray, bool]:
    """Stored values through the modality LUT or rescale, and whether they are Hounsfield units.

    MONOCHROME1 is turned round within the range of its stored values, so that bright means dense as in
    MONOCHROME2; the numbers then no longer are in the units that the header names.
    """
    if dataset.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        values = apply_modality_lut(stored, dataset)
        bits = int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])
        return (_turned_round(values, bits) if inverted else values), False
    if inverted:
        stored = _turned_round(stored, int(dataset.get("BitsStored") or 0))
    rescales = [_rescale(dataset, frame) for frame in range(len(stored))]
    if len(set(rescales)) == 1:
        values = rescaled(stored, *rescales[0][:2])
    else:
        parts = [rescaled(frame, *rescale[:2]) for frame, rescale in zip(stored, rescales, strict=True)]
        values = stack_values(parts)
    return values, not inverted and all(rescale[2] == "HU" for rescale in rescales)


def _rescale(dataset: Dataset, frame: int) -> tuple[float, float, str]:
    """(slope, intercept, type) of one frame."""
    source: Any = functional_group(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ValueError(f"rescale slope {slope}, intercept {intercept}")
    return slope, intercept, str(source.get("RescaleType") or "")


def _turned_round(values: np.ndarray, bits: int) -> np.ndarray:
    """Mirror values within the range of their bits: the lowest possible becomes the highest."""
    if values.dtype.kind == "f":
        return -values
    if values.dtype.kind == "i":
        return np.invert(values)
    highest = values.dtype.type(2**bits - 1)
    return highest - np.minimum(values, highest)


def _palette_colour(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    colour = apply_color_lut(stored, dataset)[..., :3]
    # Some devices declare 16-bit entries and fill in 8 bits.
    return _in_8_bits(colour, 8 if colour.max() <= 255 else 8 * colour.dtype.itemsize)


def _in_8_bits(colour: np.ndarray, bits: int) -> np.ndarray:
    return (colour >> max(bits - 8, 0)).astype(np.uint8)


def stack_values(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(N, ...) array of slices that may differ in type: whole numbers of any width, else float32."""
    dtype = np.result_type(*parts)
    if dtype.kind == "f" and not any(part.dtype == np.float64 for part in parts):
        dtype = np.dtype(np.float32)
    return np.stack([part.astype(dtype, copy=False) for part in parts])
