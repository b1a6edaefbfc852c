"""From records to what a detector takes and is measured with: planes, and lesion masks on the same pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import DatasetInvalid, GeometryRefused, UnreadableImage
from ..geometry import SlicePlane, acquisition_axis, cut_slice
from ..plain_files import is_file
from ..volume import Volume, header_modality, read_volume
from .records import ImageRecord, modality_family

_LOSSY = (".jpg", ".jpeg")


def planes_of(records: Iterable[ImageRecord]) -> Iterator[SlicePlane]:
    """Each record's image as a plane, read as any file is; a volume is read once for its slices in a row."""
    for record in records:
        volume = read_record_volume(record)
        axis, index = record.slice_at or (acquisition_axis(volume), 0)
        yield cut_slice(volume, axis, index)


def read_record_volume(record: ImageRecord) -> Volume:
    """The file of a record; what the record says of its modality stands above what the file says."""
    modality = header_modality(modality_family(record.modality)) or None
    return _read_volume(record.path, modality, _stamp(record.path))


def lesion_mask(record: ImageRecord, plane: SlicePlane) -> np.ndarray | None:
    """(H, W) bool lesion mask on the pixels of a record's plane.

    All False for a normal image; None for an abnormal one without a mask, and for one without a label.

    Raises:
        DatasetInvalid: the mask has another size than the image.
        UnreadableImage: the mask cannot be read.
    """
    if record.abnormal is False:
        return np.zeros(plane.shape, dtype=bool)
    if record.mask is None or record.abnormal is None:
        return None
    if plane.aligned is None:
        raise GeometryRefused(f"{record.path.name} has oblique voxel axes: its mask cannot be laid over it")
    voxels = read_mask(record.mask)
    axis, index = plane.aligned.axis, plane.aligned.index
    if index >= voxels.shape[2 - axis]:
        raise DatasetInvalid(f"The mask {record.mask.name} has no slice {index + 1} for {record.path.name}")
    mask = voxels.take(index, axis=2 - axis)
    if plane.aligned.transpose:
        mask = mask.swapaxes(0, 1)
    if plane.aligned.flip_columns:
        mask = mask[:, ::-1]
    if plane.aligned.flip_rows:
        mask = mask[::-1]
    if mask.shape != plane.shape:
        raise DatasetInvalid(
            f"The mask {record.mask.name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image "
            f"{record.path.name} {plane.shape[1]} x {plane.shape[0]}"
        )
    return mask


def read_mask(path: Path) -> np.ndarray:
    """(K, J, I) bool: every value above 0, and above half of the range in a JPEG, whose zeros are not exact.

    Not to be written to: the slices of a volume share it.
    """
    return _read_mask(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    """What tells that a file has changed since it was kept."""
    if not is_file(path):
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# Slices of a volume come one after the other, so the last one is all that has to be kept.
@lru_cache(maxsize=1)
def _read_volume(path: Path, modality: str | None, _stamp: tuple[int, int]) -> Volume:
    return read_volume(path, modality=modality)


@lru_cache(maxsize=1)
def _read_mask(path: Path, _stamp: tuple[int, int]) -> np.ndarray:
    try:
        voxels = read_volume(path).voxels
    except UnreadableImage as error:
        raise UnreadableImage(f"Mask {error}") from error
    if voxels.ndim == 4:
        voxels = voxels.max(axis=3)
    mask = voxels > (127 if path.suffix.lower() in _LOSSY else 0)
    mask.setflags(write=False)
    return mask
