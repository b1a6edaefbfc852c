"""Folder layouts of published benchmarks, each read into a list of `ImageRecord`s.

Only names are looked at here, except for volumes, whose segmentations say which slices are abnormal;
`checking.check_records` opens the files. Masks that a layout calls for are named even when they are missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetInvalid
from ..geometry import acquisition_axis
from ..limits import limits
from ..plain_files import read_small_file
from ..volume import read_volume
from .planes import read_mask
from .records import ImageRecord, read_manifest

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm")
_VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_SEGMENTATION_NAMES = ("seg", "label", "mask", "segmentation", "labels")
_LABEL_WORDS = ("", "normal", "good", "abnormal", "defective")  # of one class, where others name the set
_MASK_FOLDERS = ("anomaly_mask", "label")  # MVFA's copy of BMAD, and BMAD itself


def read_dataset(path: Path | str, *, modality: str = "", body_part: str = "") -> list[ImageRecord]:
    """Read a set of images in whichever layout it has.

    A CSV manifest, or a folder with `manifest.csv`; MediCLIP's JSON lines, or a folder with `samples/`;
    folders `<set>_AD` as BMAD and MVFA have them; MVTec's folders; volumes with segmentations.

    Args:
        path: file or folder.
        modality, body_part: what the images show, for layouts that do not say.

    Raises:
        DatasetInvalid: the path is none of these.
    """
    path, words = Path(path), {"modality": modality, "body_part": body_part}
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return read_manifest(path)
        if path.suffix.lower() in (".json", ".jsonl"):
            return read_json_lines(path, **words)
        raise DatasetInvalid(f"{path.name} is no manifest: choose a .csv or .jsonl file, or a folder")
    if not path.is_dir():
        raise DatasetInvalid(f"{path.name} does not exist")
    if (path / "manifest.csv").is_file():
        return read_manifest(path / "manifest.csv")
    if (path / "samples").is_dir():
        files = [f for f in _files(path / "samples") if f.suffix in (".json", ".jsonl")]
        return [record for file in files for record in read_json_lines(file, **words)]
    if path.name.endswith("_AD") or any(path.glob("*_AD")):
        return read_bmad(path, **words)
    if (path / "train" / "good").is_dir() or any(path.glob("*/train/good")):
        return read_mvtec(path, **words)
    if any(_is_volume(file) for file in path.rglob("*")):
        return read_volumes(path, modality=modality, body_part=body_part)
    raise DatasetInvalid(
        f"{path.name} is in no layout that is known: a manifest.csv, samples/*.json, <set>_AD/test/good/img, "
        "train/good and test/<kind>, or volumes with segmentations"
    )


def read_bmad(folder: Path, *, modality: str = "", body_part: str = "") -> list[ImageRecord]:
    """`<set>_AD/{train,valid,test}/{good,Ungood}/{img,anomaly_mask}`; one set, or a folder of sets.

    `Ungood_nomask` holds abnormal images whose lesions nobody outlined, `unlabeled` images without a label. A
    split where `Ungood` has no folder of masks counts as one without masks.

    Raises:
        DatasetInvalid: there is no image in any of these places.
    """
    labels = {"good": False, "Ungood": True, "Ungood_nomask": True, "unlabeled": None}
    records = []
    for root in [folder] if folder.name.endswith("_AD") else sorted(folder.glob("*_AD")):
        for split in ("train", "valid", "test"):
            for name, abnormal in labels.items():
                place = root / split / name
                masks = next((place / m for m in _MASK_FOLDERS if (place / m).is_dir()), None)
                images = place / "img" if (place / "img").is_dir() else place
                for path in _images(images):
                    mask = _mask_beside(masks, path) if masks and abnormal else None
                    set_name = root.name.removesuffix("_AD")
                    records.append(
                        ImageRecord(path, mask, set_name, split, abnormal, modality, body_part, "", "")
                    )
    return _found(records, folder, "<set>_AD/{train,valid,test}/{good,Ungood}/img")


def read_mvtec(folder: Path, *, modality: str = "", body_part: str = "") -> list[ImageRecord]:
    """`train/good`, `test/good`, `test/<kind>`, `ground_truth/<kind>/<image>_mask.png`; one class or more.

    Raises:
        DatasetInvalid: there is no image in any of these places.
    """
    records = []
    classes = [folder] if (folder / "train").is_dir() else sorted(p for p in folder.iterdir() if p.is_dir())
    for root in classes:
        for place in sorted(p for p in root.glob("*/*") if p.parent.name in ("train", "valid", "test")):
            split, kind = place.parent.name, place.name
            masks = root / "ground_truth" / kind
            for path in _images(place):
                mask = None
                if kind != "good" and masks.is_dir():
                    mask = _mask_beside(masks, path.with_name(f"{path.stem}_mask.png"))
                findings = "" if kind == "good" else kind
                records.append(
                    ImageRecord(
                        path, mask, root.name, split, kind != "good", modality, body_part, "", findings
                    )
                )
    return _found(records, folder, "{train,test}/good and test/<kind>")


def read_json_lines(path: Path, *, modality: str = "", body_part: str = "") -> list[ImageRecord]:
    """One JSON object a line, as MediCLIP has them: filename, label, clsname and, where there is one, mask.

    Names are relative to the folder `images` beside the file's own folder, or else to the file's own folder.
    The split is the file's name ("train.json"), the set `clsname`, or else the name of the folder.

    Raises:
        DatasetInvalid: a line that is not understood, by its number.
    """
    beside = path.parent.parent / "images"
    root = beside if beside.is_dir() else path.parent
    split = path.stem if path.stem in ("train", "valid", "test") else "pool"
    folder_name = path.resolve().parents[1 if beside.is_dir() else 0].name
    records = []
    try:
        lines = read_small_file(path, limits().text_bytes).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetInvalid(f"{path.name} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _json_row(line, f"{path.name}, line {number}")
            mask = root / row["mask"] if row.get("mask") else None
            named = str(row.get("clsname") or "")
            records.append(
                ImageRecord(
                    root / row["filename"],
                    mask,
                    folder_name if named in _LABEL_WORDS else named,
                    split,
                    bool(row["label"]),
                    modality,
                    body_part,
                    "",
                    "",
                )
            )
    return _found(records, path, "one JSON object a line")


def read_volumes(
    folder: Path,
    *,
    modality: str = "",
    body_part: str = "",
    axis: int | None = None,
    split: str = "pool",
) -> list[ImageRecord]:
    """Every slice of volumes with segmentations; a slice is abnormal when any of its voxels is labelled.

    Understood are `imagesTr/` and `labelsTr/` (also `images/` and `labels/`; a channel such as `_0000` is
    left out of the names), and one folder for each case, in which the segmentation is the file called or
    ending in seg, label or mask. Slices that show a single value, as beyond the head, are left out. All
    slices of a case are one cluster.

    Args:
        folder: where the volumes lie.
        modality, body_part: what they show.
        axis: 0, 1 or 2 for I, J or K; None for the axis along which the slices were acquired.
        split: of all records.

    Raises:
        DatasetInvalid: a volume without a segmentation, or one of another size.
    """
    pairs = list(_volume_pairs(folder))
    alone = [image.relative_to(folder).as_posix() for image, mask, _ in pairs if mask is None]
    if alone:
        raise DatasetInvalid(f"{folder.name}: no segmentation was found for {_some(alone)}")
    records = []
    for image, mask, case in pairs:
        assert mask is not None  # refused above
        volume, labelled = read_volume(image), read_mask(mask)
        if labelled.shape != volume.voxels.shape[:3]:
            raise DatasetInvalid(
                f"The segmentation {mask.name} has {_size(labelled)} voxels, its volume {image.name} "
                f"{_size(volume.voxels)}"
            )
        along = acquisition_axis(volume) if axis is None else axis
        others = tuple(a for a in range(3) if a != 2 - along)
        abnormal = np.asarray(labelled.any(axis=others))
        for index in range(volume.size[along]):
            shown = volume.voxels.take(index, axis=2 - along)
            if np.nanmin(shown) < np.nanmax(shown):
                records.append(
                    ImageRecord(
                        image,
                        mask,
                        folder.resolve().name,
                        split,
                        bool(abnormal[index]),
                        modality or volume.modality,
                        body_part,
                        "",
                        "",
                        cluster=case,
                        slice_at=(along, index),
                        slice_step=volume.spacing[along],
                    )
                )
    return _found(records, folder, "volumes with segmentations")


def _volume_pairs(folder: Path) -> Iterator[tuple[Path, Path | None, str]]:
    """(volume, its segmentation, its case) for all volumes below a folder."""
    volumes = sorted(file for file in folder.rglob("*") if _is_volume(file))
    segmentations = [file for file in volumes if _is_segmentation(file)]
    for image in volumes:
        if image in segmentations:
            continue
        if image.parent.name.startswith("images"):
            labels = image.parent.with_name(image.parent.name.replace("images", "labels", 1))
            name = _stem(image)
            case = name[:-5] if name[-5:-4] == "_" and name[-4:].isdigit() else name
            mask = next((f for f in segmentations if f.parent == labels and _stem(f) == case), None)
        else:
            beside = [file for file in segmentations if file.parent == image.parent]
            own = [file for file in beside if re.match(re.escape(_stem(image)) + r"[-_.]", _stem(file))]
            only = beside if len(beside) == 1 else []
            mask = next(iter(own or only), None)
            case = image.parent.relative_to(folder).as_posix() if image.parent != folder else _stem(image)
        yield image, mask, case


def _is_segmentation(file: Path) -> bool:
    last_word = _stem(file).lower().replace("-", "_").replace(".", "_").rsplit("_", 1)[-1]
    return last_word in _SEGMENTATION_NAMES or file.parent.name.startswith("labels")


def _is_volume(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return file.name.lower().endswith(_VOLUMES) and file.is_file() and not hidden


def _stem(file: Path) -> str:
    suffix = next(s for s in _VOLUMES if file.name.lower().endswith(s))
    return file.name[: -len(suffix)]


def _files(folder: Path) -> list[Path]:
    """Files of a folder; hidden ones, such as the doubles that macOS leaves in archives, are passed over."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return [file for file in _files(folder) if file.suffix.lower() in _IMAGES]


def _mask_beside(folder: Path, image: Path) -> Path:
    """The mask of an image: of the same name, or the same stem, whether it is there or not."""
    same = folder / image.name
    if same.is_file():
        return same
    names = (folder / f"{image.stem}{suffix}" for suffix in _IMAGES)
    return next((name for name in names if name.is_file()), folder / f"{image.stem}.png")


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetInvalid(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DatasetInvalid(f"{where} is no JSON object")
    missing = [key for key in ("filename", "label") if key not in row]
    if missing:
        raise DatasetInvalid(f"{where}: key {', '.join(map(repr, missing))} is missing")
    if not isinstance(row["filename"], str) or row["label"] not in (0, 1):
        raise DatasetInvalid(f"{where}: filename must be text and label 0 or 1")
    if not isinstance(row.get("mask"), (str, type(None))):
        raise DatasetInvalid(f"{where}: mask must be the name of a file")
    return row


def _found(records: list[ImageRecord], place: Path, layout: str) -> list[ImageRecord]:
    if not records:
        raise DatasetInvalid(f"{place.name} holds no images in the layout {layout}")
    return records


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _size(voxels: np.ndarray) -> str:
    return " x ".join(str(count) for count in voxels.shape[2::-1])
