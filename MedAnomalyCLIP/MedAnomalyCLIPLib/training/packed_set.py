"""A training set in one file, so that training can run where the images themselves are not.

Packed images, their outlined lesions and what is known of them in; one safetensors file out, and back.
Pictures are stored as lossy WebP, in a fortieth of the memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..datasets.records import ImageRecord
from ..errors import DatasetInvalid
from ..tensor_file import write_tensors
from .anomaly_batches import AnomalyImages

QUALITY = 84
_FORMAT = "MedAnomalyCLIP training set 1"
_LARGEST_SIDE = 4096
_DAMAGE = (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError)


def write_packed_set(path: Path, images: AnomalyImages, quality: int = QUALITY) -> None:
    """Write images and records into one file; of the paths their names alone.

    Args:
        path: file; the folder is made.
        images: what is learned from.
        quality: of the pictures, 1 to 100.
    """
    side = images.images.shape[-1]

    def coded(image: Image.Image, kind: str, **how: int) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **how)
        return buffer.getvalue()

    def picture(number: int) -> bytes:
        return coded(Image.fromarray(images.images[number].transpose(1, 2, 0)), "WEBP", quality=quality)

    with ThreadPoolExecutor() as threads:
        pictures = list(threads.map(picture, range(len(images.images))))
    outlined = sorted(images.masks)
    masks = [coded(Image.fromarray(images.masks[i]), "PNG") for i in outlined]
    tensors = {
        **_joined("pictures", pictures),
        **_joined("masks", masks),
        "outlined": np.array(outlined, np.int64),
        "inner": images.inner,
    }
    told = [asdict(record) | _names(record) for record in images.records]
    notes = {"format": _FORMAT, "side": str(side), "records": json.dumps(told)}
    write_tensors(path, {name: torch.from_numpy(array) for name, array in tensors.items()}, notes)


def read_packed_set(path: Path) -> AnomalyImages:
    """What `write_packed_set` wrote.

    Raises:
        DatasetInvalid: the file is damaged, or no such set.
    """
    try:
        with safe_open(path, "np") as file:
            notes = file.metadata() or {}
            if notes.get("format") != _FORMAT:
                raise ValueError("it has another format")
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        side, records = int(notes["side"]), [_record(told) for told in json.loads(notes["records"])]
        places = arrays["outlined"].tolist()
        if not len(records) == len(arrays["pictures lengths"]) == len(arrays["inner"]):
            raise ValueError("its parts differ in number")
        if not 0 < side <= _LARGEST_SIDE or not all(0 <= place < len(records) for place in places):
            raise ValueError("its numbers are out of range")
        pictures = np.empty((len(records), 3, side, side), np.uint8)
        for number, picture in _decoded(arrays, "pictures", "RGB", side):
            pictures[number] = picture.transpose(2, 0, 1)
        decoded = _decoded(arrays, "masks", "L", side)
        masks = {place: mask > 0 for place, (_, mask) in zip(places, decoded, strict=True)}
        return AnomalyImages(records, pictures, masks, arrays["inner"])
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DatasetInvalid(f"{path.name} is no packed training set that can be read: {error}") from error


def _joined(name: str, codes: Sequence[bytes]) -> dict[str, np.ndarray]:
    lengths = np.array([len(code) for code in codes], np.int64)
    return {name: np.frombuffer(b"".join(codes), np.uint8).copy(), f"{name} lengths": lengths}


def _decoded(
    arrays: Mapping[str, np.ndarray], name: str, mode: str, side: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers and pixels of pictures that `_joined` put together."""
    codes, lengths = arrays[name], arrays[f"{name} lengths"]
    ends = np.cumsum(lengths)

    def decode(number: int) -> np.ndarray:
        code = codes[ends[number] - lengths[number] : ends[number]]
        with Image.open(io.BytesIO(code.tobytes()), formats=["WEBP", "PNG"]) as picture:
            if picture.size != (side, side):
                raise ValueError(f"a picture has {picture.size} pixels")
            return np.asarray(picture.convert(mode))

    with ThreadPoolExecutor() as threads:
        yield from enumerate(threads.map(decode, range(len(lengths))))


def _names(record: ImageRecord) -> dict[str, str | None]:
    return {"path": record.path.name, "mask": None if record.mask is None else record.mask.name}


def _record(told: dict[str, Any]) -> ImageRecord:
    slice_at: Sequence[int] | None = told["slice_at"]
    return ImageRecord(
        **{
            **told,
            "path": Path(told["path"]),
            "mask": None if told["mask"] is None else Path(told["mask"]),
            "slice_at": None if slice_at is None else (slice_at[0], slice_at[1]),
        }
    )
