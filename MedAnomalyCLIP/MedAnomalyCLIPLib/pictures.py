"""Pictures, PNG, JPEG, TIFF and BMP, read through Pillow: upright, at their own depth, without a pixel size.

A path and the format that its content shows in, `Volume` or `InputSummary` out; used by `volume.py` only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UnsupportedImage
from .plain_files import BoundedFile
from .volume import RAS_FROM_LPS, InputSummary, Volume, assemble, check_size, reading

if TYPE_CHECKING:
    from PIL import Image

_EXIF_ORIENTATION = 0x0112
_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)  # rows and columns are exchanged
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


def read_picture(path: Path, kind: str, *, modality: str) -> Volume:
    """Read a picture as one slice, or a TIFF of several pages as a volume of them.

    Args:
        path: the file.
        kind: its format as `volume.recognise` names it.
        modality: what the caller says it shows; pictures do not tell.
    """
    with reading(path, kind):
        from PIL import UnidentifiedImageError

        try:
            with _opened_picture(path, kind) as picture:
                check_size(path, int(np.prod(_picture_shape(picture))) * len(picture.getbands()))
                pages = [_page(picture, index) for index in range(_page_count(picture))]
        except UnidentifiedImageError:
            if kind != "TIFF":
                raise
            pages = _pages_unknown_to_pillow(path)
    if len({page.shape for page in pages}) > 1:
        raise UnsupportedImage(
            f"{path.name} has {len(pages)} pages of different sizes, which make no volume: "
            "save one page by itself"
        )
    return assemble(
        path, np.stack(pages), RAS_FROM_LPS, modality=modality, source=f"{kind} picture", spacing_known=False
    )


def summarise_picture(path: Path, kind: str) -> InputSummary:
    """What `read_picture` would return, told from the header."""
    with reading(path, kind):
        from PIL import UnidentifiedImageError

        try:
            with _opened_picture(path, kind) as picture:
                pages, rows, columns = _picture_shape(picture)
        except UnidentifiedImageError:
            if kind != "TIFF":
                raise
            found = _pages_unknown_to_pillow(path)
            pages, (rows, columns) = len(found), found[0].shape[:2]
    size = (columns, rows, pages)
    return InputSummary("", f"{kind} picture", "", size, (1.0, 1.0, 1.0), spacing_known=False)


@contextmanager
def _opened_picture(path: Path, kind: str) -> Iterator[Image.Image]:
    """A picture opened by Pillow, its pixels not yet decoded; no more of them than Pillow deems safe."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Given a name, Pillow maps plain TIFFs into memory and scrambles those that lie on their side.
            with path.open("rb") as file, Image.open(file, formats=(kind,)) as picture:
                yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnsupportedImage(
            f"{path.name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that are read from a picture: "
            "crop or downsample it first"
        ) from error


def _page_count(picture: Image.Image) -> int:
    """Pages of a TIFF; the extra pictures of other formats are previews and animations."""
    return getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1


def _picture_shape(picture: Image.Image) -> tuple[int, int, int]:
    """(pages, rows, columns) once the picture is upright; Pillow turns TIFF by itself."""
    columns, rows = picture.size
    if picture.format != "TIFF" and picture.getexif().get(_EXIF_ORIENTATION) in _SWAPPING_ORIENTATIONS:
        columns, rows = rows, columns
    return _page_count(picture), rows, columns


def _page(picture: Image.Image, index: int) -> np.ndarray:
    """One page upright: (rows, columns) with its own depth, or (rows, columns, 3) uint8.

    Transparency becomes black, the background of medical images; what the colour channels hold beneath it was
    never meant to be seen.
    """
    from PIL import Image, ImageOps

    picture.seek(index)
    tags = dict(getattr(picture, "tag_v2", {}))
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("L", "I", "F") or upright.mode.startswith("I;16"):
        return _as_stored(np.asarray(upright), upright.mode, tags)
    if upright.mode == "1":
        return np.asarray(upright.convert("L"))
    if upright.has_transparency_data:
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, upright.convert("RGBA"))
    return np.asarray(upright.convert("RGB"))


def _as_stored(values: np.ndarray, mode: str, tags: dict[int, Any]) -> np.ndarray:
    """Undo what Pillow's few pixel types do to the many of TIFF, and to 16-bit PNG before Pillow 11.3."""
    if not tags:
        return values.astype(np.uint16) if mode == "I" else values
    bits = tags.get(_TIFF_BITS, (1,))[0]
    signed = tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 2
    white_is_zero = tags.get(_TIFF_PHOTOMETRIC) == 0
    if mode.startswith("I;16") and white_is_zero:  # Pillow itself inverts 8 bits only
        return np.invert(values)
    if mode == "L" and signed:
        return values.view(np.int8)
    if mode == "I" and bits == 16:
        return values.astype(np.int16)
    if mode == "I" and not signed:
        return values.view(np.uint32)
    return values


def _pages_unknown_to_pillow(path: Path) -> list[np.ndarray]:
    """Pages of a TIFF with a pixel type that Pillow lacks, for example 64-bit floats."""
    import tifffile

    with _silenced("tifffile"), BoundedFile(path) as content, tifffile.TiffFile(content) as file:
        pages = list(file.pages)
        if not pages or any(len(page.shape) != 2 or page.dtype is None for page in pages):
            raise UnsupportedImage(
                f"{path.name} has a pixel layout that is not read: save it as grey or RGB with 8 or 16 bits"
            )
        check_size(path, sum(int(np.prod(page.shape, dtype=object)) for page in pages))
        return [page.asarray() for page in pages]


@contextmanager
def _silenced(logger_name: str) -> Iterator[None]:
    """Keep a library from writing to stderr about a file of which an error tells already."""
    logger = logging.getLogger(logger_name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
