"""A folder of labelled 2-D images described by manifests, and a packed copy of it that fits in memory.

`manifest.csv` files in, `ImageRecord`s and uint8 arrays out. The columns that are read: image, modality,
body_part, label (0/1 or normal/abnormal/unknown), and where present split, set, view, caption_terms or
class_terms, mask.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UnreadableImage

_LABELS = {"0": False, "normal": False, "1": True, "abnormal": True}


@dataclass(frozen=True)
class ImageRecord:
    """One image and what its source says about it.

    Attributes:
        path: image file.
        mask: file of its lesion mask, None when there is none.
        set: name of the collection.
        split: "train", "valid", "test", or "pool" for collections without splits.
        abnormal: None when the source does not say.
        modality, body_part, view, findings, licence: words of the source, may be empty.
    """

    path: Path
    mask: Path | None
    set: str
    split: str
    abnormal: bool | None
    modality: str
    body_part: str
    view: str
    findings: str
    licence: str = ""


def read_manifest(path: Path) -> list[ImageRecord]:
    """The images listed in one manifest; their paths are relative to its folder.

    Raises:
        UnreadableImage: the manifest is missing or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UnreadableImage(f"{path.name} cannot be read: {error.strerror}") from error
    missing = {"image", "modality", "body_part", "label"} - set(rows[0] if rows else ())
    if missing:
        raise UnreadableImage(f"{path.name} has no column {', '.join(sorted(missing))}")
    return [_record(path.parent, row) for row in rows]


def _record(folder: Path, row: dict[str, str]) -> ImageRecord:
    return ImageRecord(
        path=folder / row["image"],
        mask=folder / row["mask"] if row.get("mask") else None,
        set=row.get("set") or Path(row["image"]).parts[0],
        split=row.get("split") or "pool",
        abnormal=_LABELS.get(row["label"]),
        modality=row["modality"],
        body_part=row["body_part"],
        view=row.get("view") or "",
        findings=row.get("caption_terms") or row.get("class_terms") or "",
        licence=row.get("licence") or "",
    )


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


def _pad_and_resize(image: Image.Image, side: int, how: Image.Resampling, *, colour: bool) -> np.ndarray:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new(image.mode, (side, side))
    square.paste(image.resize(size, how), ((side - size[0]) // 2, (side - size[1]) // 2))
    array = np.asarray(square)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if colour else array


def pack(
    records: Sequence[ImageRecord],
    file: Path,
    side: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """All images as one (N, 3, side, side) uint8 array in memory, and as a file that is read the next time.

    The file appears under its name only when complete. It is read whole: random access to a mapped file
    waits for the disk whenever the system has dropped its pages.
    """
    shape = (len(records), 3, side, side)
    if file.is_file() and np.load(file, mmap_mode="r").shape == shape:
        return np.load(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    packed = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    for index, record in enumerate(records):
        packed[index] = read_square(record.path, side, colour=True)
        if on_progress is not None:
            on_progress(index + 1, len(records))
    packed.flush()
    del packed
    partial.replace(file)
    return np.load(file)
