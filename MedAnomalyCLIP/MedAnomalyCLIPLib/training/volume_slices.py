"""Slices of labelled volumes in three orientations, as records to learn from.

A manifest of volumes (`manifest.csv` with the columns case, file, mask, modality, body_part, label,
caption_terms, licence) in, `ImageRecord`s out.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..datasets.planes import planes_of, read_mask, read_record_volume
from ..datasets.records import ImageRecord
from ..errors import DatasetInvalid
from ..geometry import slice_count

MIDDLE = (0.1, 0.9)  # share of an axis that slices are taken from: what lies outside is mostly air
LEAST_FOREGROUND = (
    0.08  # share of pixels that are not the darkest value, below which a slice shows too little
)


def volume_slices(manifest: Path, per_axis: int) -> list[ImageRecord]:
    """Slices of each volume, evenly spaced along each axis.

    A slice is abnormal where its mask shows a lesion, normal where the mask shows none, and of no label
    without a mask.

    Args:
        manifest: CSV file in the folder of the volumes.
        per_axis: slices along each axis, at most.

    Raises:
        DatasetInvalid: the manifest lacks a column.
    """
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), set(reader.fieldnames or ())
    missing = {"case", "file", "modality", "body_part"} - columns
    if missing:
        raise DatasetInvalid(f"{manifest.name} has no column {', '.join(sorted(missing))}")
    return [record for row in rows for record in _slices(manifest.parent, row, per_axis)]


def _slices(folder: Path, row: dict[str, str], per_axis: int) -> list[ImageRecord]:
    whole = ImageRecord(
        path=folder / row["file"],
        mask=folder / row["mask"] if row.get("mask") else None,
        set=row["case"],
        split="train",
        abnormal=None,
        modality=row["modality"],
        body_part=row["body_part"],
        view="",
        findings=row.get("caption_terms") or "",
        licence=row.get("licence") or "",
        cluster=row["case"],
        slice_at=(2, 0),
    )
    volume = read_record_volume(whole)
    found = []
    for axis in range(3):
        count = slice_count(volume, axis)
        places = np.unique(np.linspace(MIDDLE[0] * count, MIDDLE[1] * count - 1, per_axis).astype(int))
        for index in places.tolist():
            abnormal = None
            if whole.mask is not None:
                abnormal = bool(read_mask(whole.mask).take(index, axis=2 - axis).any())
            record = replace(whole, abnormal=abnormal, slice_at=(axis, index))
            pixels = next(planes_of([record])).pixels
            if np.mean(pixels > pixels.min()) >= LEAST_FOREGROUND:
                found.append(record if abnormal else replace(record, mask=None))
    return found
