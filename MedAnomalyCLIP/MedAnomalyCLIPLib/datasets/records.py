"""One labelled image, and lists of them written as CSV manifests.

`manifest.csv` in, `ImageRecord`s out. The columns that are read: image, modality, body_part, label (0/1 or
normal/abnormal/unknown), and where present split, set, view, caption_terms or class_terms, mask, licence,
cluster.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetInvalid
from ..limits import limits
from ..plain_files import read_small_file

SPLITS = ("train", "valid", "test", "pool")
_FAMILY_OF_CODE = {"CR": "XR", "DX": "XR", "RG": "XR", "OP": "fundus", "SM": "microscopy", "GM": "microscopy"}
_LABELS = {"0": False, "normal": False, "1": True, "abnormal": True, "": None, "unknown": None}


@dataclass(frozen=True)
class ImageRecord:
    """One image and what its source says about it.

    Attributes:
        path: image file; for a slice of a volume, the file of the volume.
        mask: file of its lesion mask, None when there is none; for a slice, the segmentation of the volume.
        set: name of the collection.
        split: "train", "valid", "test", or "pool" for collections without splits.
        abnormal: None when the source does not say.
        modality, body_part, view, findings, licence: words of the source, may be empty.
        cluster: patient, or group of look-alike files, that must not be divided; empty when not known.
        slice_at: (axis, index) of a slice of a volume, axis 0, 1 or 2 for I, J or K; None for a flat image.
        slice_step: mm from one slice of that volume to the next; 0 where it is not known.
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
    cluster: str = ""
    slice_at: tuple[int, int] | None = None
    slice_step: float = 0.0


def modality_family(modality: str) -> str:
    """The family of a modality as sources word it; the words themselves when it is none of the known ones."""
    if modality in _FAMILY_OF_CODE:  # as DICOM has it
        return _FAMILY_OF_CODE[modality]
    text = modality.lower()
    families = (
        ("fundus", "fundus"),
        ("microscopy", "microscopy"),
        ("ultrasound", "US"),
        ("x-ray", "XR"),
        ("mr", "MR"),
        ("ct", "CT"),
        ("us", "US"),
        ("xr", "XR"),
    )
    return next((family for start, family in families if start in text), modality)


def read_manifest(path: Path) -> list[ImageRecord]:
    """The images listed in one manifest; their paths are relative to its folder.

    Raises:
        DatasetInvalid: the manifest cannot be read, lacks a column, or holds a word that is not understood.
    """
    try:
        text = read_small_file(path, limits().text_bytes).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows, columns = list(reader), set(reader.fieldnames or ())
    except OSError as error:
        raise DatasetInvalid(f"{path.name} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetInvalid(f"{path.name} is no CSV table in UTF-8: {error}") from error
    missing = {"image", "modality", "body_part", "label"} - columns
    if missing:
        raise DatasetInvalid(f"{path.name} has no column {', '.join(sorted(missing))}")
    return [_record(path, number, row) for number, row in enumerate(rows, start=2)]


def _record(manifest: Path, number: int, row: dict[str, str | None]) -> ImageRecord:
    cells = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
    where = f"{manifest.name}, line {number}"
    if not cells["image"]:
        raise DatasetInvalid(f"{where}: the column image is empty")
    label, split = cells["label"].lower(), cells.get("split") or "pool"
    if label not in _LABELS:
        raise DatasetInvalid(
            f"{where}: label {cells['label']!r} is not known; write 0 or normal, 1 or abnormal, or unknown"
        )
    if split not in SPLITS:
        raise DatasetInvalid(f"{where}: split {split!r} is not known; choose from {', '.join(SPLITS)}")
    folder = manifest.parent
    return ImageRecord(
        path=folder / cells["image"],
        mask=folder / cells["mask"] if cells.get("mask") else None,
        set=cells.get("set") or next(iter(Path(cells["image"]).parts), ""),
        split=split,
        abnormal=_LABELS[label],
        modality=cells["modality"],
        body_part=cells["body_part"],
        view=cells.get("view") or "",
        findings=cells.get("caption_terms") or cells.get("class_terms") or "",
        licence=cells.get("licence") or "",
        cluster=cells.get("cluster") or "",
    )
