"""A folder, volume or series of normal images, read as records to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DatasetInvalid, UnreadableImage
from ..geometry import acquisition_axis
from ..neighbours import Origin, left_out
from ..volume import Volume, read_volume, recognise
from .records import ImageRecord

SUPPORT = "support images"
# Other files may lie among images; files of these names are meant to be some.
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_VOLUMES = (".dcm", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")


def read_support(path: Path | str, *, modality: str = "", body_part: str = "") -> list[ImageRecord]:
    """Every image as normal: pictures, slices of volumes along their acquisition, slices of a DICOM series.

    Slices that show nothing, of one value throughout, are left out.

    Args:
        path: an image file, or a folder of them or of one DICOM series.
        modality, body_part: what the images show, where files do not say.

    Raises:
        DatasetInvalid: there is no image.
        UnreadableImage, SeriesAmbiguous: a file is damaged, or the folder holds several series.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        kinds = {file: recognise(file) for file in files}
        meant = _PICTURES + _VOLUMES
        broken = [f.name for f, kind in kinds.items() if not kind and f.name.lower().endswith(meant)]
        if broken:
            raise UnreadableImage(f"{broken[0]} is no image that can be read; replace it, or move it away")
        images = [file for file, kind in kinds.items() if kind and kind != "DICOM"]
        if any(kind == "DICOM" for kind in kinds.values()):
            images.append(path)
    else:
        images = [path]
    words = {"modality": modality, "body_part": body_part}
    records = [record for image in images for record in _slices(image, words)]
    if not records:
        raise DatasetInvalid(f"{path.name} holds no image to learn from")
    return records


def left_out_records(records: Sequence[ImageRecord]) -> np.ndarray:
    """Which records are left out when each normal one is compared with the other normal ones.

    Returns:
        (N, N) bool, see `neighbours.left_out`; abnormal records are left out of everything.
    """
    normal = np.array([index for index, record in enumerate(records) if not record.abnormal], dtype=int)
    out = np.ones((len(records), len(records)), dtype=bool)
    out[np.ix_(normal, normal)] = left_out([_origin(records[index]) for index in normal])
    return out


def _origin(record: ImageRecord) -> Origin:
    source = (record.set, record.cluster) if record.cluster else record.path
    if record.slice_at is None or record.slice_step <= 0:
        return Origin(source, record.path)
    axis, index = record.slice_at
    normal = np.eye(3)[axis]
    centre = index * record.slice_step * normal
    return Origin(source, record.path, tuple(centre.tolist()), tuple(normal.tolist()))


def _slices(image: Path, words: dict[str, str]) -> list[ImageRecord]:
    volume = read_volume(image, modality=words["modality"] or None)
    axis = acquisition_axis(volume)
    return [
        ImageRecord(
            path=image,
            mask=None,
            set=SUPPORT,  # not the name of a folder or file, which may be a patient's
            split="train",
            abnormal=False,
            modality=words["modality"] or volume.modality,
            body_part=words["body_part"],
            view="",
            findings="",
            slice_at=(axis, index),
            slice_step=volume.spacing[axis],
        )
        for index in range(volume.voxels.shape[2 - axis])
        if _shows_something(volume, axis, index)
    ]


def _shows_something(volume: Volume, axis: int, index: int) -> bool:
    pixels = np.take(volume.voxels, index, axis=2 - axis)
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    return finite.size > 0 and finite.min() < finite.max()
