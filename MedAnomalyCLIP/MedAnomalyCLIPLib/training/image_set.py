"""Images of records as uint8 arrays: one at a time, or all of them packed so that they fit in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..datasets.planes import lesion_mask, planes_of
from ..datasets.records import ImageRecord
from ..errors import UnreadableImage
from ..geometry import SlicePlane


def read_square(path: Path, side: int, *, colour: bool) -> np.ndarray:
    """An image, padded with black to a square and resized.

    Returns:
        (3, side, side) uint8 when `colour`, else (side, side).
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if colour else "L")
    except OSError as error:
        raise UnreadableImage(f"{path.name} is not an image that can be read: {error}") from error
    return _pad_and_resize(image, side, Image.Resampling.BICUBIC, colour=colour)


def read_square_mask(path: Path, side: int) -> np.ndarray:
    """(side, side) bool lesion mask, padded like its image, nearest neighbour."""
    try:
        with Image.open(path) as file:
            mask = file.convert("L")
    except OSError as error:
        raise UnreadableImage(f"{path.name} is not a mask that can be read: {error}") from error
    return _pad_and_resize(mask, side, Image.Resampling.NEAREST, colour=False) > 0


def read_square_slice(record: ImageRecord, side: int, *, colour: bool) -> np.ndarray:
    """A slice of a volume, as `read_square` gives a picture; black and white are the ends of its bulk."""
    plane = next(planes_of([record]))
    pixels = plane.pixels.astype(np.float64)
    if plane.pixels.dtype != np.uint8:
        low, high = np.percentile(pixels[plane.valid], (0.5, 99.5))
        pixels = np.clip((pixels - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1) * 255
    image = Image.fromarray(np.rint(pixels).astype(np.uint8)).convert("RGB" if colour else "L")
    return _pad_and_resize(_square_pixels(image, plane), side, Image.Resampling.BICUBIC, colour=colour)


def read_square_slice_mask(record: ImageRecord, side: int) -> np.ndarray:
    """(side, side) bool lesion mask of a slice of a volume, padded like its image, nearest neighbour.

    Raises:
        UnreadableImage: the record has no mask.
    """
    plane = next(planes_of([record]))
    mask = lesion_mask(record, plane)
    if mask is None:
        raise UnreadableImage(f"No lesion is outlined in {record.path.name}")
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    square = _square_pixels(image, plane, Image.Resampling.NEAREST)
    return _pad_and_resize(square, side, Image.Resampling.NEAREST, colour=False) > 0


def _square_pixels(
    image: Image.Image, plane: SlicePlane, how: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The picture of a plane with pixels as wide as high, as fine as the finer of the two."""
    row, column = plane.spacing
    fine = min(column, row)
    size = (max(1, round(image.width * column / fine)), max(1, round(image.height * row / fine)))
    return image if size == image.size else image.resize(size, how)


def _pad_and_resize(image: Image.Image, side: int, how: Image.Resampling, *, colour: bool) -> np.ndarray:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new(image.mode, (side, side))
    square.paste(image.resize(size, how), ((side - size[0]) // 2, (side - size[1]) // 2))
    array = np.asarray(square)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if colour else array


def pack(
    records: Sequence[ImageRecord],
    folder: Path,
    side: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """All images as one (N, 3, side, side) uint8 array in memory, and as a file that is read the next time.

    The file is named after the images, and appears under its name only when complete. It is read whole:
    random access to a mapped file waits for the disk whenever the system has dropped its pages.
    """
    shape = (len(records), 3, side, side)
    file = folder / f"images-{side}-{_digest(records)}.npy"
    if file.is_file() and np.load(file, mmap_mode="r").shape == shape:
        return np.load(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    packed = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    for index, record in enumerate(records):
        if record.slice_at is None:
            packed[index] = read_square(record.path, side, colour=True)
        else:
            packed[index] = read_square_slice(record, side, colour=True)
        if on_progress is not None:
            on_progress(index + 1, len(records))
    packed.flush()
    del packed
    partial.replace(file)
    return np.load(file)


def read_lesion_mask(record: ImageRecord, side: int) -> np.ndarray | None:
    """(side, side) bool outlined lesion of a record; None where there is none."""
    if record.mask is None or not record.abnormal:
        return None
    if record.slice_at is None:
        return read_square_mask(record.mask, side)
    return read_square_slice_mask(record, side)


def inner_square(record: ImageRecord) -> float:
    """Side of the largest square inside a picture, as a share of the square that it is padded to."""
    if record.slice_at is not None:
        return 1.0
    try:
        with Image.open(record.path) as file:
            width, height = file.size
    except OSError as error:
        raise UnreadableImage(f"{record.path.name} is not an image that can be read: {error}") from error
    return min(width, height) / max(width, height)


def _digest(records: Sequence[ImageRecord]) -> str:
    """Tells lists of images apart."""
    names = [[record.set, record.path.name, record.slice_at] for record in records]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
