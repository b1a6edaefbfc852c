"""Records as arrays that a detector is trained on, made by the same steps as a slice that is detected on.

Reading and resizing is done once; the arrays are kept in a file, so that an interrupted run goes on at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..configuration import to_mapping
from ..datasets.planes import lesion_mask, planes_of
from ..datasets.records import ImageRecord
from ..errors import Cancelled, DatasetInvalid
from ..preprocess import PreprocessSpec, SlicePreprocessor, mask_in_square
from ..tensor_file import write_tensors

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """Images in a network's square, before normalisation.

    Attributes:
        images: (N, C, S, S) uint8, windowed; one channel where the network is shown grey.
        valid: (N, S, S) bool, False on padding.
        masks: (N, S, S) bool, lesions.
        has_mask: (N,) bool, False for abnormal images whose lesions nobody outlined.
        abnormal: (N,) bool.
        origins: (N,) number of the image that each one is a view of, as they were prepared.
        objects: for each image its place among the names of what images show, (N,).
    """

    images: Tensor
    valid: Tensor
    masks: Tensor
    has_mask: Tensor
    abnormal: Tensor
    origins: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | Sequence[int] | slice) -> PreparedImages:
        chosen = torch.as_tensor(index) if isinstance(index, (list, tuple)) else index
        return PreparedImages(*(getattr(self, name)[chosen] for name in _FIELDS))


_FIELDS = ("images", "valid", "masks", "has_mask", "abnormal", "origins", "objects")


def prepare_images(
    records: Sequence[ImageRecord],
    spec: PreprocessSpec,
    objects: Sequence[int],
    folder: Path,
    *,
    stage: str = "prepare",
    on_progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> PreparedImages:
    """Read, window, resize and pad images and their masks; or take them from the file of an earlier time.

    Args:
        records: labelled images.
        spec: of the detector; only its normalisation is left for later.
        objects: for each record its place among the names of what images show.
        folder: where the file is kept; it is named after what it holds.
        stage, on_progress: on_progress(stage, done, all).
        is_cancelled: asked after each image.

    Raises:
        Cancelled: `is_cancelled` said so.
        MedAnomalyCLIPError: an image or mask cannot be read or does not fit; its name is in the message.
    """
    if not records:
        raise DatasetInvalid("There are no images to prepare")
    file = folder / f"prepared-{_digest(records, spec)}.safetensors"
    stored = _stored(file)
    if stored is None:
        stored = _prepare(records, spec, stage, on_progress, is_cancelled)
        write_tensors(file, stored)
    return PreparedImages(
        **stored,
        origins=torch.arange(len(records)),
        objects=torch.tensor(list(objects)),
    )


def _stored(file: Path) -> dict[str, Tensor] | None:
    """Arrays of an earlier time; None where there are none, or damaged ones."""
    try:
        stored = load_file(file) if file.is_file() else {}
    except (SafetensorError, OSError):
        return None
    return stored if stored.keys() == set(_FIELDS[:5]) else None


def _prepare(
    records: Sequence[ImageRecord],
    spec: PreprocessSpec,
    stage: str,
    on_progress: Progress | None,
    is_cancelled: Callable[[], bool] | None,
) -> dict[str, Tensor]:
    count, side, channels = len(records), spec.size, 1 if spec.colour == "grey" else 3
    images = torch.empty(count, channels, side, side, dtype=torch.uint8)
    valid, masks = (torch.zeros(count, side, side, dtype=torch.bool) for _ in range(2))
    has_mask = torch.zeros(count, dtype=torch.bool)
    preprocessor = SlicePreprocessor(replace(spec, mean=(0.0,) * 3, std=(1.0,) * 3))
    for index, (record, plane) in enumerate(zip(records, planes_of(records), strict=True)):
        prepared = preprocessor.prepare(plane)
        images[index] = (prepared.tensor[:channels] * 255).round().to(torch.uint8)
        valid[index] = prepared.valid
        mask = lesion_mask(record, plane)
        if mask is not None:
            masks[index] = mask_in_square(mask, prepared.fit)
            has_mask[index] = True
        if on_progress is not None:
            on_progress(stage, index + 1, count)
        if is_cancelled is not None and is_cancelled():
            raise Cancelled(f"Stopped after preparing {index + 1} of {count} images")
    abnormal = torch.tensor([bool(record.abnormal) for record in records])
    return {"images": images, "valid": valid, "masks": masks, "has_mask": has_mask, "abnormal": abnormal}


def network_input(images: Tensor, spec: PreprocessSpec) -> Tensor:
    """Images in [0, 1] as the tower expects them.

    Shapes:
        images: (B, 1 or 3, S, S).
        returns: (B, 3, S, S).
    """
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    return (images.expand(-1, 3, -1, -1) - mean) / std


def _digest(records: Sequence[ImageRecord], spec: PreprocessSpec) -> str:
    """Changes with any file, label, slice or number that the arrays depend on."""
    files = [
        [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns]
        if path is not None and path.is_file()
        else [str(path)]
        for record in records
        for path in (record.path, record.mask)
    ]
    told = [[r.abnormal, r.modality, r.slice_at] for r in records]
    text = json.dumps([to_mapping(spec), files, told], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
